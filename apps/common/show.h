// Numbers as the tables of all commands show them.
#ifndef SIKV_APPS_COMMON_SHOW_H_
#define SIKV_APPS_COMMON_SHOW_H_

#include <optional>
#include <string>

#include "framework/cache/ledger.h"
#include "framework/report/table.h"

namespace sikv {

// Three decimals.
Table::Cell share_cell(double value);
// Four significant digits at most, whole numbers as such.
Table::Cell number_cell(double value);
// Rounded to a whole number; "-" where there is none.
Table::Cell whole_cell(const std::optional<double>& value);
// Whole and tenths of microseconds, from seconds.
Table::Cell micros_cell(double seconds);
Table::Cell bytes_cell(uint64_t bytes);

// Bytes by role. Of roles that lie in pages also the bytes per token and KV head, which add up to
// `bytes_per_token`.
std::string memory_table(const Ledger& ledger, double bytes_per_token, const TableStyle& style);

// "recall" -> "recall", "dropped_mass" -> "dropped mass"
std::string spaced(std::string name);

}  // namespace sikv

#endif  // SIKV_APPS_COMMON_SHOW_H_
