// What a selector counted, by name.
#ifndef SIKV_TESTS_SUPPORT_COUNTERS_H_
#define SIKV_TESTS_SUPPORT_COUNTERS_H_

#include <map>
#include <string>

#include "framework/registry/instance.h"

namespace sikv::testing {

inline std::map<std::string, double> counters_of(const SelectorInstance& selector) {
  std::map<std::string, double> counters;
  for (const sikv_counter& c : selector.counters()) counters[c.name] = c.value;
  return counters;
}

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_COUNTERS_H_
