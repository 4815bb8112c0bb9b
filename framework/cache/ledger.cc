#include "framework/cache/ledger.h"

#include <fmt/format.h>

#include "framework/base/error.h"

namespace sikv {

void Ledger::add(std::string_view role, uint64_t bytes) {
  if (bytes == 0) return;
  for (LedgerLine& line : lines_) {
    if (line.role == role) {
      line.bytes += bytes;
      return;
    }
  }
  lines_.push_back({std::string(role), bytes});
}

uint64_t Ledger::total() const {
  uint64_t sum = 0;
  for (const LedgerLine& line : lines_) sum += line.bytes;
  return sum;
}

uint64_t Ledger::bytes(std::string_view role) const {
  for (const LedgerLine& line : lines_) {
    if (line.role == role) return line.bytes;
  }
  return 0;
}

std::string_view role_name(uint32_t role) {
  switch (role) {
    case SIKV_INDEX_CODE:
      return "index_code";
    case SIKV_MAGNITUDE:
      return "magnitude";
    case SIKV_SCALE:
      return "scale";
    case SIKV_VALUE_CODE:
      return "value_code";
    case SIKV_VALUE_SCALE:
      return "value_scale";
    default:
      return "unknown";
  }
}

uint64_t plane_page_bytes(const sikv_plane& plane) {
  SIKV_ASSERT(plane.tile_tokens > 0 && SIKV_PAGE_TOKENS % plane.tile_tokens == 0);
  return uint64_t{SIKV_PAGE_TOKENS} / plane.tile_tokens * plane.bytes_per_tile;
}

uint64_t layout_page_bytes(const sikv_layout& layout) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < layout.num_planes; ++i) sum += plane_page_bytes(layout.planes[i]);
  return sum;
}

namespace {

// visit(first, end) for the bytes of each IN_LINE plane.
template <typename Visit>
void for_each_in_line(const sikv_layout& layout, Visit&& visit) {
  for (uint32_t i = 0; i < layout.num_planes; ++i) {
    if (layout.planes[i].organisation != SIKV_IN_LINE) continue;
    visit(layout.line_offset[i], layout.line_offset[i] + layout.planes[i].bytes_per_tile);
  }
}

}  // namespace

uint64_t line_padding_page_bytes(const sikv_layout& key, const sikv_layout& value) {
  uint64_t used = 0;
  for (const sikv_layout* layout : {&key, &value}) {
    for_each_in_line(*layout, [&](uint32_t first, uint32_t end) { used += end - first; });
  }
  SIKV_ASSERT(used <= key.line_bytes);
  return SIKV_PAGE_TOKENS * (key.line_bytes - used);
}

std::string line_conflict(const sikv_layout& key, const sikv_layout& value) {
  if (value.line_bytes == 0) return "";
  if (key.line_bytes == 0) return "which has no lines";
  if (key.line_bytes != value.line_bytes) {
    return fmt::format("whose lines have {} bytes and not {}", key.line_bytes, value.line_bytes);
  }
  std::string conflict;
  for_each_in_line(value, [&](uint32_t first, uint32_t end) {
    for_each_in_line(key, [&](uint32_t begin, uint32_t behind) {
      if (first < behind && begin < end) {
        conflict = fmt::format("which has bytes {} to {} of a line in use", begin, behind - 1);
      }
    });
  });
  return conflict;
}

std::string layout_text(const sikv_layout& layout) {
  std::string text = layout.family;
  for (uint32_t i = 0; i < layout.num_params; ++i) {
    text += i == 0 ? "(" : ",";
    text += std::string(layout.params[i].name) + "=" + layout.params[i].value;
  }
  if (layout.num_params > 0) text += ")";
  return text + ".v" + std::to_string(layout.version);
}

}  // namespace sikv
