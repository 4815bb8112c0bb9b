#include "apps/common/row_file.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#include "framework/base/error.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"

namespace sikv {

RowFile::RowFile(std::filesystem::path path, Json environment, const std::string& what,
                 const std::string& setup_key)
    : path_(std::move(path)), environment_(std::move(environment)) {
  if (path_.empty()) return;
  check_writable(path_);
  if (!std::filesystem::exists(path_)) return;
  std::ifstream stream(path_);
  const Json file = Json::parse(stream, nullptr, false);
  const auto is_row = [&](const Json& row) {
    return row.is_object() && row.contains("setup") && row.contains("pipeline") &&
           (setup_key.empty() || row["setup"].contains(setup_key));
  };
  if (!file.is_object() || !file.contains("rows") || !file["rows"].is_array() ||
      !std::all_of(file["rows"].begin(), file["rows"].end(), is_row)) {
    throw Error("{} is there and holds no {}: name another file, or remove it", path_.string(),
                what);
  }
  const Json of_file = file.value("environment", Json::object());
  for (Json row : file["rows"]) {
    const Json made_in = row.value("environment", of_file);
    row.erase("environment");
    if (!same_environment(made_in, environment_)) row["environment"] = made_in;
    rows_.push_back(std::move(row));
  }
}

const RowFile::Json* RowFile::find(const std::string& pipeline, const Json& setup) const {
  const auto found = std::find_if(rows_.begin(), rows_.end(), [&](const Json& row) {
    return row["pipeline"] == pipeline && row["setup"] == setup && !row.contains("environment");
  });
  return found == rows_.end() ? nullptr : &*found;
}

const RowFile::Json& RowFile::add(Json row) {
  std::erase_if(rows_, [&](const Json& old) { return same_row(old, row); });
  rows_.push_back(std::move(row));
  write();
  return rows_.back();
}

void RowFile::finish(std::vector<Json> rows) {
  const auto is_new = [&](const Json& old) {
    return std::any_of(rows.begin(), rows.end(),
                       [&](const Json& row) { return same_row(old, row); });
  };
  std::erase_if(rows_, is_new);
  rows_.insert(rows_.begin(), std::move_iterator(rows.begin()), std::move_iterator(rows.end()));
  write();
}

void RowFile::write() const {
  if (path_.empty()) return;
  Json file = {{"environment", environment_}};
  file.update(head_);
  file["rows"] = rows_;
  write_json(path_, file);
}

}  // namespace sikv
