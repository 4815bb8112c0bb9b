#include "selectors/laprox/laprox.h"

namespace sikv::laprox {

std::vector<float> gram_norms(const sikv_observe_args& args, const CacheView& view, int row,
                              const float* w) {
  const int heads = view.num_kv_heads(), dim = view.head_dim(), hidden = args.hidden;
  const int b = row / heads, h = row % heads;
  if (hidden <= dim) return explicit_norms(args, view, row, w);
  const auto size = static_cast<size_t>(dim);
  std::vector<float> gram(size * size);
  for (int x = 0; x < dim; ++x) {
    for (int y = 0; y <= x; ++y) {
      float lanes[16] = {};  // adds side by side
      for (int i = 0; i < hidden; i += 16) {
        for (int lane = 0; lane < std::min(16, hidden - i); ++lane) {
          lanes[lane] += w[int64_t{x} * hidden + i + lane] * w[int64_t{y} * hidden + i + lane];
        }
      }
      float sum = 0.0f;
      for (const float lane : lanes) sum += lane;
      gram[static_cast<size_t>(x * dim + y)] = gram[static_cast<size_t>(y * dim + x)] = sum;
    }
  }
  std::vector<float> norms, v(size), product(size);
  for (int t = 0; t < args.prompt_len[b]; ++t) {
    RowsView(args.values).load(b, t, h, dim, v.data());
    std::fill(product.begin(), product.end(), 0.0f);
    for (int x = 0; x < dim; ++x) {
      const float* row_of_gram = gram.data() + int64_t{x} * dim;
      for (int y = 0; y < dim; ++y) {
        product[static_cast<size_t>(y)] += v[static_cast<size_t>(x)] * row_of_gram[y];
      }
    }
    double square = 0.0;
    for (size_t y = 0; y < size; ++y) square += double{product[y]} * v[y];
    norms.push_back(static_cast<float>(std::sqrt(std::max(square, 0.0))));
  }
  return norms;
}

std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args) {
  return make(args, {*simd_window_math(), gram_norms});
}

}  // namespace sikv::laprox
