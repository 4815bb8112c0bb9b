// Product quantisation of keys (Jegou, Douze and Schmid 2011): a key is cut into equal parts, each
// replaced by the nearest of its part's centroids. With r the rest that is lost of a part,
// |q.k - q.k'| <= sum over parts |q_part| |r_part|.
#ifndef SIKV_SELECTORS_PQCACHE_PRODUCT_QUANTISER_H_
#define SIKV_SELECTORS_PQCACHE_PRODUCT_QUANTISER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/kmeans.h"

namespace sikv::pqcache {

class ProductQuantiser {
 public:
  ProductQuantiser() = default;
  // Fitted on rows [n, dim]; dim is a multiple of `subspaces`.
  ProductQuantiser(std::span<const float> rows, int n, int dim, int subspaces, int centroids,
                   int iterations)
      : part_(dim / subspaces), centroids_(centroids) {
    std::vector<float> part(static_cast<size_t>(n * part_));
    for (int s = 0; s < subspaces; ++s) {
      for (int i = 0; i < n; ++i) {
        std::copy_n(rows.data() + int64_t{i} * dim + s * part_, part_,
                    part.data() + int64_t{i} * part_);
      }
      const KMeans fit = kmeans(
          part, n, part_,
          {.centroids = centroids, .iterations = iterations, .seed = static_cast<uint64_t>(s)});
      parts_.emplace_back(fit.centroids, fit.count, part_);
    }
  }

  int subspaces() const { return static_cast<int>(parts_.size()); }
  // Centroids of a part at most: entries of its table.
  int centroids() const { return centroids_; }
  const Centroids& part(int subspace) const { return parts_[static_cast<size_t>(subspace)]; }
  uint64_t bytes() const {
    uint64_t sum = 0;
    for (const Centroids& part : parts_) sum += part.bytes();
    return sum;
  }

  // codes [subspaces] of key [D].
  void encode(const float* key, uint8_t* codes) const {
    float scratch[256];
    for (int s = 0; s < subspaces(); ++s) {
      codes[s] = static_cast<uint8_t>(part(s).nearest(key + s * part_, scratch));
    }
  }
  // out [subspaces, centroids]: what each centroid adds to q.k'.
  void tables(const float* q, float* out) const {
    for (int s = 0; s < subspaces(); ++s) part(s).dots(q + s * part_, out + s * centroids_);
  }

 private:
  int part_ = 0, centroids_ = 0;
  std::vector<Centroids> parts_;
};

}  // namespace sikv::pqcache

#endif  // SIKV_SELECTORS_PQCACHE_PRODUCT_QUANTISER_H_
