// One ranking for all KV heads of a layer.
#ifndef SIKV_KERNELS_COMMON_HEAD_MEAN_H_
#define SIKV_KERNELS_COMMON_HEAD_MEAN_H_

#include <cstddef>
#include <vector>

namespace sikv {

// scores_of(row) of the `heads` rows from `first_row` on, all of one length, become their mean.
template <typename ScoresOf>
void average_heads(int first_row, int heads, ScoresOf&& scores_of) {
  std::vector<float> mean = scores_of(first_row);
  for (int h = 1; h < heads; ++h) {
    const std::vector<float>& other = scores_of(first_row + h);
    for (size_t t = 0; t < mean.size(); ++t) mean[t] += other[t];
  }
  for (float& score : mean) score /= static_cast<float>(heads);
  for (int h = 0; h < heads; ++h) scores_of(first_row + h) = mean;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_HEAD_MEAN_H_
