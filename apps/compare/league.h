// A comparison by what a method stores: one table divided into memory classes, and the figure of
// output error against bytes read.
#ifndef SIKV_APPS_COMPARE_LEAGUE_H_
#define SIKV_APPS_COMPARE_LEAGUE_H_

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "framework/config/config.h"
#include "framework/experiment/measure.h"
#include "framework/report/table.h"

namespace sikv {

// One row of a comparison.
struct ComparedRow {
  Measured measured;
  EntrySpec entry;
  std::string needs;  // what its selector needs of a source beside K, V and the newest queries
  bool competes = true;
  int num_layers = 1, head_dim = 0;
};

// Label, or else the printed form.
const std::string& row_name(const ComparedRow& row);

// 0 for as many bytes per token as fp16 or more, n for 2^(n - 1) to 2^n times fewer.
int memory_class(const ComparedRow& row);
std::string memory_class_name(int memory_class, int head_dim);

// Bytes read per step for one KV head of one layer; nothing where the selector does not count its.
std::optional<double> bytes_read(const ComparedRow& row);

// By row: whether no competing row has both fewer bytes read and less output error; of all rows, or
// of those of its own memory class.
std::vector<bool> on_front(const std::vector<ComparedRow>& rows, bool of_class);

// With what its marks mean.
std::string league_table(const std::vector<ComparedRow>& rows, const TableStyle& style);

std::string league_svg(const std::vector<ComparedRow>& rows, const std::string& title);

// What a row of the table says and row_json does not.
nlohmann::ordered_json league_json(const ComparedRow& row, bool on_front, bool on_class_front);

}  // namespace sikv

#endif  // SIKV_APPS_COMPARE_LEAGUE_H_
