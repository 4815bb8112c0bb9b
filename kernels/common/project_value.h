// What a query head makes of a value: v W, W [D, hidden] its rows of the output projection.
#ifndef SIKV_KERNELS_COMMON_PROJECT_VALUE_H_
#define SIKV_KERNELS_COMMON_PROJECT_VALUE_H_

#include <algorithm>
#include <cstdint>

namespace sikv {

// product [hidden] = v [D] w [D, hidden].
inline void project_value(const float* v, const float* w, int head_dim, int hidden,
                          float* product) {
  std::fill_n(product, hidden, 0.0f);
  for (int d = 0; d < head_dim; ++d) {
    const float* row = w + int64_t{d} * hidden;
    for (int i = 0; i < hidden; ++i) product[i] += v[d] * row[i];
  }
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_PROJECT_VALUE_H_
