// Levels of a quantiser of single numbers: Lloyd's algorithm in one dimension, over numbers that were
// first sorted into cells. A cell is a weight and a first moment, so levels are exact means and only
// the boundaries between them lie on the grid; an iteration costs as much as there are cells.
#ifndef SIKV_KERNELS_COMMON_LLOYD_LEVELS_H_
#define SIKV_KERNELS_COMMON_LLOYD_LEVELS_H_

#include <algorithm>
#include <cstddef>
#include <vector>

namespace sikv {

// Equal cells over [low, high]; what lies outside goes to the first or the last.
class LevelCells {
 public:
  LevelCells(double low, double high, int cells)
      : low_(low),
        cells_per_unit_(cells / (high - low)),
        weight_(static_cast<size_t>(cells)),
        moment_(static_cast<size_t>(cells)) {}

  void add(double x, double weight = 1.0) {
    const double last = static_cast<double>(weight_.size() - 1);
    const auto cell = static_cast<size_t>(std::clamp((x - low_) * cells_per_unit_, 0.0, last));
    weight_[cell] += weight;
    moment_[cell] += weight * x;
  }

  // `count` levels, ascending, from equal shares of the weight and after at most `iterations` of
  // Lloyd's. Levels beyond the number of distinct cells repeat others; all 0 without any number.
  std::vector<double> levels(int count, int iterations) const {
    std::vector<double> levels = equal_shares(count);
    for (bool moved = true; moved && iterations > 0; --iterations) moved = step(levels);
    return levels;
  }

 private:
  // Sums over the cells that a level got.
  struct Share {
    double weight = 0.0, moment = 0.0;
  };

  // levels[i] <- mean of share i, where it has one. Whether anything moved.
  static bool settle(const std::vector<Share>& shares, std::vector<double>& levels) {
    bool moved = false;
    for (size_t i = 0; i < shares.size(); ++i) {
      if (shares[i].weight <= 0.0) continue;
      const double mean = shares[i].moment / shares[i].weight;
      moved |= mean != levels[i];
      levels[i] = mean;
    }
    return moved;
  }

  std::vector<double> equal_shares(int count) const {
    double total = 0.0, below = 0.0;
    for (const double weight : weight_) total += weight;
    std::vector<double> levels(static_cast<size_t>(count));
    if (total <= 0.0) return levels;
    std::vector<Share> shares(levels.size());
    for (size_t cell = 0; cell < weight_.size(); ++cell) {
      const double middle = (below + weight_[cell] / 2) / total;
      Share& share = shares[std::min(static_cast<size_t>(middle * count), shares.size() - 1)];
      share.weight += weight_[cell];
      share.moment += moment_[cell];
      below += weight_[cell];
    }
    // Levels without a share repeat the one below, the first ones the one above.
    const auto first = std::find_if(shares.begin(), shares.end(),
                                    [](const Share& share) { return share.weight > 0.0; });
    std::fill(levels.begin(), levels.end(), first->moment / first->weight);
    settle(shares, levels);
    for (size_t i = 1; i < levels.size(); ++i) {
      if (shares[i].weight <= 0.0) levels[i] = std::max(levels[i], levels[i - 1]);
    }
    return levels;
  }

  // Gives every cell to the level nearest to its mean, the lower of equally near ones.
  bool step(std::vector<double>& levels) const {
    std::vector<Share> shares(levels.size());
    size_t level = 0;
    for (size_t cell = 0; cell < weight_.size(); ++cell) {
      if (weight_[cell] <= 0.0) continue;
      const double mean = moment_[cell] / weight_[cell];
      while (level + 1 < levels.size() && (levels[level] + levels[level + 1]) / 2 < mean) ++level;
      shares[level].weight += weight_[cell];
      shares[level].moment += moment_[cell];
    }
    return settle(shares, levels);
  }

  double low_, cells_per_unit_;
  std::vector<double> weight_, moment_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_LLOYD_LEVELS_H_
