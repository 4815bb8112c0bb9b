// A table for people: aligned columns, the best value of each column marked.
//
//        dropped mass   bytes
//     mean        p99  /token  pipeline
//   budget 96
//     0.122*    0.410      44  rot_lm(bits=3)+rot_lm(bits=2) > self_index(rerank=4) > ...
//     0.149     0.553      56  sign_vq+intq > self_index > ...
//
// Plain text with nothing but spaces in a pipe, as wide as COLUMNS says or as it gets; on a terminal
// the header is bold and the best are coloured. Where a row and its label do not fit side by side
// the label gets lines of its own, above.
#ifndef SIKV_FRAMEWORK_REPORT_TABLE_H_
#define SIKV_FRAMEWORK_REPORT_TABLE_H_

#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sikv {

// Columns that UTF-8 text takes up on a terminal; a byte that is not UTF-8 counts as one.
int display_width(std::string_view text);

struct TableStyle {
  int width = 0;  // 0 = as wide as it gets
  bool colour = false;

  // What suits `stream`: of a terminal its width, and colours where NO_COLOR is not set; else the
  // width that COLUMNS gives.
  static TableStyle of(std::FILE* stream);
};

class Table {
 public:
  enum class Align { kLeft, kRight };
  enum class Better { kNeither, kLower, kHigher };

  struct Column {
    std::string header;  // with its unit; '\n' breaks it into lines
    Align align = Align::kRight;
    Better better = Better::kNeither;
  };
  struct Cell {
    std::string text;
    std::optional<double> value = {};  // what is compared; NaN is not
  };

  // `label`: header of the column that closes each row; empty = there is none.
  explicit Table(std::vector<Column> columns, std::string label = "");

  // Rows that follow belong to a group: they stand under `title` and compete among themselves.
  // Where all are alike there is no best.
  void group(std::string title);
  // As many cells as there are columns. A row that does not compete is never marked.
  void row(std::vector<Cell> cells, std::string label = "", bool competes = true);

  std::string text(const TableStyle& style = {}) const;

 private:
  struct Row {
    std::vector<Cell> cells;
    std::string label;
    bool competes;
  };
  struct Group {
    std::string title;
    std::vector<Row> rows;
  };

  std::optional<double> best(const Group& group, size_t column) const;

  std::vector<Column> columns_;
  std::string label_;
  std::vector<Group> groups_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REPORT_TABLE_H_
