#include "apps/throughput/sweep_file.h"

#include <algorithm>
#include <fstream>
#include <utility>

#include "framework/base/error.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"

namespace sikv {

using Json = nlohmann::ordered_json;

SweepFile::SweepFile(std::filesystem::path path, Json environment)
    : path_(std::move(path)), environment_(std::move(environment)) {
  if (path_.empty()) return;
  check_writable(path_);
  if (std::filesystem::exists(path_)) read();
}

void SweepFile::read() {
  std::ifstream stream(path_);
  const Json file = Json::parse(stream, nullptr, false);
  const auto is_row = [](const Json& row) { return row.is_object() && row.contains("setup"); };
  if (!file.is_object() || !file.contains("rows") || !file["rows"].is_array() ||
      !std::all_of(file["rows"].begin(), file["rows"].end(), is_row)) {
    throw Error("{} is there and holds no throughput sweep: name another file, or remove it",
                path_.string());
  }
  const Json made = file.value("environment", Json::object());
  for (const Json& row : file["rows"]) {
    rows_.push_back(row);
    if (!row.contains("environment") && !same_environment(made, environment_)) {
      rows_.back()["environment"] = made;
    }
  }
  read_ = rows_.size();
}

const Json* SweepFile::find(const Json& key) const {
  const Json* here = find_here(key);
  return here != nullptr ? here : find_from(key, true);
}

const Json* SweepFile::find_here(const Json& key) const { return find_from(key, false); }

const Json* SweepFile::find_from(const Json& key, bool elsewhere) const {
  const auto found = std::find_if(rows_.begin(), rows_.end(), [&](const Json& row) {
    if (row.contains("environment") != elsewhere) return false;
    return std::all_of(key.items().begin(), key.items().end(), [&](const auto& item) {
      const auto value = row.find(item.key());
      return value != row.end() && *value == item.value();
    });
  });
  return found == rows_.end() ? nullptr : &*found;
}

const Json& SweepFile::add(Json row) {
  rows_.push_back(std::move(row));
  if (!path_.empty()) {
    write_json(path_, {{"environment", environment_},
                       {"source", "synthetic; see setup of each row"},
                       {"rows", rows_}});
  }
  return rows_.back();
}

}  // namespace sikv
