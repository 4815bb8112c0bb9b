#include "apps/common/show.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "framework/base/text.h"

namespace sikv {
namespace {

bool in_pages(std::string_view role) {
  for (uint32_t r = SIKV_INDEX_CODE; r <= SIKV_VALUE_SCALE; ++r) {
    if (role == role_name(r)) return true;
  }
  return role == kLinePadding;
}

}  // namespace

Table::Cell share_cell(double value) {
  if (std::isnan(value)) return {"-"};
  return {fmt::format("{:.3f}", value), value};
}

Table::Cell number_cell(double value) {
  if (std::isnan(value)) return {"-"};
  return {std::abs(value) < 1000 ? fmt::format("{:.4g}", value) : fmt::format("{:.0f}", value),
          value};
}

Table::Cell whole_cell(const std::optional<double>& value) {
  return value ? Table::Cell{fmt::format("{:.0f}", *value), value} : Table::Cell{"-"};
}

Table::Cell micros_cell(double seconds) { return {fmt::format("{:.1f}", seconds * 1e6), seconds}; }

Table::Cell bytes_cell(uint64_t bytes) { return {bytes_text(bytes), static_cast<double>(bytes)}; }

std::string memory_table(const Ledger& ledger, double bytes_per_token, const TableStyle& style) {
  double paged = 0;
  for (const LedgerLine& line : ledger.lines()) {
    if (in_pages(line.role)) paged += static_cast<double>(line.bytes);
  }
  Table table({{"memory", Table::Align::kLeft}, {"bytes/token\nand KV head"}, {"bytes"}});
  for (const LedgerLine& line : ledger.lines()) {
    Table::Cell per_token{""};
    if (in_pages(line.role)) {
      per_token = number_cell(bytes_per_token * static_cast<double>(line.bytes) / paged);
    }
    table.row({{spaced(line.role)}, per_token, bytes_cell(line.bytes)});
  }
  table.row({{"total"}, number_cell(bytes_per_token), bytes_cell(ledger.total())});
  return table.text(style);
}

std::string spaced(std::string name) {
  std::replace(name.begin(), name.end(), '_', ' ');
  return name;
}

}  // namespace sikv
