// The JSON file of `sikv eval`. It is written after every row, so that an evaluation that was
// interrupted goes on where it stopped.
#ifndef SIKV_APPS_EVAL_EVAL_FILE_H_
#define SIKV_APPS_EVAL_EVAL_FILE_H_

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sikv {

class EvalFile {
 public:
  // Reads `path` if it exists; Error if it is something else than an evaluation or cannot be
  // written. An empty path keeps the rows in memory only. Rows that were made in another
  // environment get a copy of theirs, and stay until one of this environment takes their place.
  EvalFile(std::filesystem::path path, nlohmann::ordered_json environment);

  // The row of that pipeline and setup that was made in this environment, or nullptr; valid until
  // the next call of add.
  const nlohmann::ordered_json* find(const std::string& pipeline,
                                     const nlohmann::ordered_json& setup) const;
  // Adds a row and writes the file.
  const nlohmann::ordered_json& add(nlohmann::ordered_json row);

 private:
  std::filesystem::path path_;
  nlohmann::ordered_json environment_;
  std::vector<nlohmann::ordered_json> rows_;
};

}  // namespace sikv

#endif  // SIKV_APPS_EVAL_EVAL_FILE_H_
