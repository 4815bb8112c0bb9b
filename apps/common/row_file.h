// A JSON file of result rows, written after every row, so that what was interrupted goes on where it
// stopped.
#ifndef SIKV_APPS_COMMON_ROW_FILE_H_
#define SIKV_APPS_COMMON_ROW_FILE_H_

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sikv {

class RowFile {
 public:
  using Json = nlohmann::ordered_json;

  // Reads `path` if it exists; Error if it holds something else than `what` ("evaluation") or
  // cannot be written. Rows are told from those of other commands by `setup_key` in their setup,
  // where there is one. An empty path keeps the rows in memory only. Rows that were made in another
  // environment get a copy of theirs, and stay until one of this environment takes their place.
  RowFile(std::filesystem::path path, Json environment, const std::string& what,
          const std::string& setup_key = "");

  // The row of that pipeline and setup that was made in this environment, or nullptr; valid until
  // the next call of add.
  const Json* find(const std::string& pipeline, const Json& setup) const;
  // Adds a row and writes the file.
  const Json& add(Json row);

  const std::vector<Json>& rows() const { return rows_; }

  // Fields of the file behind its environment; written with the next row.
  Json& head() { return head_; }
  // The last call: writes `rows`, and behind them what is left of other pipelines and setups.
  void finish(std::vector<Json> rows);

 private:
  static bool same_row(const Json& a, const Json& b) {
    return a["pipeline"] == b["pipeline"] && a["setup"] == b["setup"];
  }
  void write() const;

  std::filesystem::path path_;
  Json environment_, head_ = Json::object();
  std::vector<Json> rows_;
};

}  // namespace sikv

#endif  // SIKV_APPS_COMMON_ROW_FILE_H_
