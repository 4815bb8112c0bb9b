// Text for people: suggestions after a typo, sizes, durations, lists.
#ifndef SIKV_FRAMEWORK_BASE_TEXT_H_
#define SIKV_FRAMEWORK_BASE_TEXT_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace sikv {

// The candidate that `name` most likely meant: smallest Damerau-Levenshtein distance (insert,
// delete, replace, swap neighbours), the earlier candidate at a tie. Case and the difference
// between '-' and
// '_' do not count. None when more than a third of the letters (at least one) would have to change.
std::optional<std::string> nearest(std::string_view name, std::span<const std::string> candidates);

// "; did you mean 'x'?", or "" when nothing is near: the end of an error's sentence.
std::string did_you_mean(std::string_view name, std::span<const std::string> candidates);

// Binary units, two decimals from 1 KiB up: "1023 B", "1.25 GiB".
std::string bytes_text(uint64_t bytes);

// Three significant digits below a minute, whole units above: "12.3 us", "1.50 s", "2 min 05 s",
// "1 h 02 min".
std::string duration_text(double seconds);

std::string join(std::span<const std::string> parts, std::string_view separator = ", ");

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_BASE_TEXT_H_
