// The query's side of the index scan: one table of 16 entries per group of 4 channels.
//
//   table[g][c] = sum over i = 0..3 of q[4g + i] * codebook[g][c][i]
//   score[t]    = sum over g of table[g][nibble of token t in group g]
//
// rlm4 keeps rotated keys, so the query is rotated first. Built once per scan from D/4 * 64
// products (3 us at D = 128), by the same code in every variant: equal tables, hence equal integer
// scores.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TABLES_H_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TABLES_H_

#include <cstdint>

namespace sikv {
class CacheView;
class LayoutView;
}  // namespace sikv

namespace sikv::self_index {

struct Config;

// Throws Refused unless the layout has an index that self_index reads with these options.
void check_layout(const LayoutView& layout, const Config& config);
bool is_rotated(const LayoutView& layout);

// exact score ~ scale * integer score + offset.
struct TableScale {
  float scale;
  float offset;
};

inline constexpr int kTableMax = 63;

// Each group loses its minimum, one scale makes the widest group span 0..63, round to nearest with
// ties to even. `exact` and `quantised` [groups, 16].
TableScale quantise_tables(const float* exact, int groups, uint8_t* quantised);

// The tables of one row: one set, or one per query head.
struct IndexTables {
  int sets;    // 1, or G with group: max_over_heads
  int groups;  // D/4
  bool six_bit;
  float* exact;        // [sets, groups, 16]
  uint8_t* quantised;  // [sets, groups, 16], filled where six_bit
  TableScale* scales;  // [sets], filled where six_bit

  // A set's contribution to the score, in the exact tables' unit.
  float score(int set, int integer) const {
    return scales[set].scale * static_cast<float>(integer) + scales[set].offset;
  }
};

// Fills tables.exact, .quantised and .scales for a row from its query: `heads` [G, D] and their
// mean [D].
void build_tables(const CacheView& view, int row, const float* heads, const float* mean,
                  IndexTables& tables);

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TABLES_H_
