#include "framework/base/error.h"

#include <gtest/gtest.h>

#include <string>

namespace sikv {
namespace {

TEST(Error, FormatsItsSentence) {
  const Error error("budget is {}; it must be at least {}", 0, 1);
  EXPECT_STREQ(error.what(), "budget is 0; it must be at least 1");
}

TEST(Error, AssertNamesExpressionAndPlace) {
  try {
    SIKV_ASSERT(1 + 1 == 3);
    FAIL() << "the assertion held";
  } catch (const InternalError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("1 + 1 == 3"), std::string::npos) << text;
    EXPECT_NE(text.find("error_test.cc:"), std::string::npos) << text;
  }
  EXPECT_NO_THROW(SIKV_ASSERT(1 + 1 == 2));
}

TEST(Error, CallersFaultAndInternalErrorAreUnrelatedTypes) {
  EXPECT_THROW(
      try { SIKV_ASSERT(false); } catch (const Error&){}, InternalError);
}

}  // namespace
}  // namespace sikv
