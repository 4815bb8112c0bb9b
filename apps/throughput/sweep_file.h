// The JSON file of a throughput sweep. It is written after every row, so that a sweep that was
// interrupted goes on where it stopped; rows it already holds are never thrown away.
#ifndef SIKV_APPS_THROUGHPUT_SWEEP_FILE_H_
#define SIKV_APPS_THROUGHPUT_SWEEP_FILE_H_

#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

namespace sikv {

class SweepFile {
 public:
  // Reads `path` if it exists; Error if it is something else than a sweep or cannot be written. An
  // empty path keeps the rows in memory only. Rows that were made in another environment get a copy
  // of theirs.
  SweepFile(std::filesystem::path path, nlohmann::ordered_json environment);

  // What tells rows apart: pipeline, context, batch_asked and setup of `key`, nothing of the
  // environment; a row that was made in this one comes first. nullptr if there is no such row.
  const nlohmann::ordered_json* find(const nlohmann::ordered_json& key) const;
  // The same, made in this environment only.
  const nlohmann::ordered_json* find_here(const nlohmann::ordered_json& key) const;

  // Adds a row and writes the file. What it and the others give is valid until the next call.
  const nlohmann::ordered_json& add(nlohmann::ordered_json row);

  // Whether a row that find gave was in the file at the start.
  bool was_read(const nlohmann::ordered_json& row) const { return &row < rows_.data() + read_; }

 private:
  void read();
  const nlohmann::ordered_json* find_from(const nlohmann::ordered_json& key, bool elsewhere) const;

  std::filesystem::path path_;
  nlohmann::ordered_json environment_;
  std::vector<nlohmann::ordered_json> rows_;
  size_t read_ = 0;
};

}  // namespace sikv

#endif  // SIKV_APPS_THROUGHPUT_SWEEP_FILE_H_
