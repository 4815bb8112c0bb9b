// Every byte of a cache, by role.
#ifndef SIKV_FRAMEWORK_CACHE_LEDGER_H_
#define SIKV_FRAMEWORK_CACHE_LEDGER_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "plugins/abi/sikv_abi.h"

namespace sikv {

struct LedgerLine {
  std::string role;
  uint64_t bytes;
};

// Lines in a fixed order: planes of pages in use by role, then line_padding, side_tables, tail,
// pinned, page_tables, selection, workspace, selector_state. Roles with no bytes are left out.
class Ledger {
 public:
  void add(std::string_view role, uint64_t bytes);
  const std::vector<LedgerLine>& lines() const { return lines_; }
  uint64_t total() const;
  uint64_t bytes(std::string_view role) const;

 private:
  std::vector<LedgerLine> lines_;
};

// "index_code", "magnitude" ...
std::string_view role_name(uint32_t role);

// Bytes one page takes in one plane, in all planes of a layout, and of its tokens' lines (keys and
// values together) what no plane uses.
uint64_t plane_page_bytes(const sikv_plane& plane);
uint64_t layout_page_bytes(const sikv_layout& layout);
inline constexpr std::string_view kLinePadding = "line_padding";
uint64_t line_padding_page_bytes(const sikv_layout& key, const sikv_layout& value);

// Empty, or why IN_LINE planes of the values find no place in the lines of the keys.
std::string line_conflict(const sikv_layout& key, const sikv_layout& value);

// "sign4(magnitude_bits=2,scale=fp16).v1"
std::string layout_text(const sikv_layout& layout);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CACHE_LEDGER_H_
