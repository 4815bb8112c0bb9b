#include "selectors/laprox/laprox.h"

namespace sikv::laprox {

ProjectedNorm gram_norm(const float* w, int head_dim, int hidden) {
  if (hidden <= head_dim) return explicit_norm(w, head_dim, hidden);
  const auto size = static_cast<size_t>(head_dim);
  std::vector<float> gram(size * size);
  for (int x = 0; x < head_dim; ++x) {
    for (int y = 0; y <= x; ++y) {
      float lanes[16] = {};  // adds side by side
      for (int i = 0; i < hidden; i += 16) {
        for (int lane = 0; lane < std::min(16, hidden - i); ++lane) {
          lanes[lane] += w[int64_t{x} * hidden + i + lane] * w[int64_t{y} * hidden + i + lane];
        }
      }
      float sum = 0.0f;
      for (const float lane : lanes) sum += lane;
      gram[static_cast<size_t>(x * head_dim + y)] = sum;
      gram[static_cast<size_t>(y * head_dim + x)] = sum;
    }
  }
  return [gram = std::move(gram), size](const float* v) {
    std::vector<float> product(size);
    for (size_t x = 0; x < size; ++x) {
      const float* row_of_gram = gram.data() + x * size;
      for (size_t y = 0; y < size; ++y) product[y] += v[x] * row_of_gram[y];
    }
    double square = 0.0;
    for (size_t y = 0; y < size; ++y) square += double{product[y]} * v[y];
    return static_cast<float>(std::sqrt(std::max(square, 0.0)));
  };
}

std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args) {
  return make(args, {*simd_window_math(), gram_norm});
}

}  // namespace sikv::laprox
