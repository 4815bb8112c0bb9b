#include "selectors/self_index/self_index_tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "plugins/layouts/rlm4_v1.h"
#include "plugins/layouts/rotation.h"
#include "plugins/layouts/sign4_v1.h"
#include "selectors/self_index/self_index.h"

namespace sikv::self_index {

bool is_rotated(const LayoutView& layout) { return rlm4::is_keys(layout); }

void check_layout(const LayoutView& layout, const Config& config) {
  const std::string name = std::string(layout.family()) + ".v" + std::to_string(layout.version());
  if (!is_rotated(layout) && !layout.is(sign4::kFamily, sign4::kVersion)) {
    throw Refused("self_index scans sign nibbles, which layout " + name +
                  " does not hold: use key codec sign_vq or rot_lm");
  }
  if (config.norm_weighting && !is_rotated(layout)) {
    throw Refused("self_index weighting: norm needs one scale per token, which layout " + name +
                  " does not hold: use key codec rot_lm, or weighting: none");
  }
  if (config.norm_weighting && rlm4::read_line(layout) > 0) {
    throw Refused("self_index weighting: norm streams the scales, which layout " + name +
                  " scatters over lines: use rot_lm with layout: planes, or weighting: none");
  }
}

TableScale quantise_tables(const float* exact, int groups, uint8_t* quantised) {
  float lowest[kMaxHeadDim / 4];
  float widest = 0.0f, offset = 0.0f;
  for (int g = 0; g < groups; ++g) {
    const auto [low, high] = std::minmax_element(exact + 16 * g, exact + 16 * g + 16);
    lowest[g] = *low;
    widest = std::max(widest, *high - *low);
    offset += *low;
  }
  // All tables constant, or so nearly that the inverse overflows: every score is the offset.
  const float inverse = static_cast<float>(kTableMax) / widest;
  if (!(inverse <= std::numeric_limits<float>::max())) {
    std::memset(quantised, 0, static_cast<size_t>(groups) * 16);
    return {0.0f, offset};
  }
  for (int i = 0; i < 16 * groups; ++i) {
    const float level = std::nearbyint((exact[i] - lowest[i / 16]) * inverse);
    quantised[i] = static_cast<uint8_t>(std::min(level, static_cast<float>(kTableMax)));
  }
  return {widest / static_cast<float>(kTableMax), offset};
}

void build_tables(const CacheView& view, int row, const float* heads, const float* mean,
                  IndexTables& tables) {
  const int head_dim = view.head_dim();
  const int size = 16 * tables.groups;
  const float* codebook = view.key().table(SIKV_CODEBOOK, row);
  const bool rotated = is_rotated(view.key().layout());
  for (int set = 0; set < tables.sets; ++set) {
    float query[kMaxHeadDim];
    std::copy_n(tables.sets == 1 ? mean : heads + int64_t{set} * head_dim, head_dim, query);
    if (rotated) rotation::forward(query, head_dim);
    float* exact = tables.exact + int64_t{set} * size;
    for (int entry = 0; entry < size; ++entry) {
      const float* q = query + entry / 16 * 4;
      const float* centre = codebook + int64_t{entry} * 4;
      exact[entry] = q[0] * centre[0] + q[1] * centre[1] + q[2] * centre[2] + q[3] * centre[3];
    }
    if (tables.six_bit) {
      tables.scales[set] =
          quantise_tables(exact, tables.groups, tables.quantised + int64_t{set} * size);
    }
  }
}

}  // namespace sikv::self_index
