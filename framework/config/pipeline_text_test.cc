#include "framework/config/pipeline_text.h"

#include <gtest/gtest.h>

#include "framework/base/error.h"
#include "framework/config/test_registry.h"

namespace sikv {
namespace {

const Registry& registry() {
  static const Registry* registry = new Registry(test_registry());
  return *registry;
}

std::string error_of(std::string_view text) {
  try {
    parse_pipeline(text, registry());
  } catch (const Error& error) {
    return error.what();
  }
  return "parsed";
}

TEST(PipelineText, PrintsWhatItReads) {
  for (const char* text : {
           "sign_vq(magnitude_bits=2)+intq(bits=2) > self_index(budget=2048,pinned=64) > "
           "sparse_flash @cuda",
           "rot_lm+rot_lm(bits=4) > full(pinned=0) > sparse_flash",
           "rot_lm+rot_lm > full(pinned=0) > sparse_flash @cuda:1",
           "sign_vq[ref](magnitude_bits=4,scale_group=16)+intq[ref] > "
           "self_index[cpu](budget=0.075,rerank=4,threshold=1e-3,schedule=auto,pinned=32,"
           "pin=snapkv,keep_generated=true) > sparse_flash[ref](fast=false) @cpu",
           "sign_vq+intq > self_index(budget=64K,pinned=64) > sparse_flash",
           "sign_vq+intq > top_p(p=0.5,base=self_index(budget=1K,rerank=2),pinned=64) > "
           "sparse_flash",
           "sign_vq+intq > split(base=top_p[ref](base=full,table=\"a (b),c\"),pinned=8,pin=first) "
           "> "
           "sparse_flash @cpu",
           "sign_vq+intq > top_p(base=self_index[cpu],table=../pca.h5,pinned=64) > sparse_flash",
       }) {
    EXPECT_EQ(pipeline_text(parse_pipeline(text, registry()), registry()), text);
  }
}

TEST(PipelineText, BringsOptionsIntoTheOrderOfTheList) {
  const PipelineSpec spec = parse_pipeline(
      "  sign_vq ( scale_group = 16 , magnitude_bits=2 )+intq()>\n"
      "self_index(pin=first,rerank=2,pinned=8,budget=1K)>sparse_flash@cpu  ",
      registry());
  EXPECT_EQ(pipeline_text(spec, registry()),
            "sign_vq(magnitude_bits=2,scale_group=16)+intq > "
            "self_index(budget=1K,rerank=2,pinned=8,pin=first) > sparse_flash @cpu");
  EXPECT_EQ(spec.pinned, 8);
  EXPECT_EQ(spec.pin, PinRule::kFirst);
  EXPECT_EQ(spec.device, "cpu");
}

TEST(PipelineText, ForcesVariantsByFamilyAndId) {
  const PipelineSpec spec =
      parse_pipeline("rot_lm[ref]+rot_lm > self_index[cpu] > sparse_flash", registry());
  const std::map<std::string, std::string> expected = {{"keys.rot_lm", "ref"},
                                                       {"selector.self_index", "cpu"}};
  EXPECT_EQ(spec.force, expected);
}

TEST(PipelineText, NamesTheColumnAndWhatWasExpected) {
  EXPECT_EQ(error_of(""), "column 1: expected the name of a key codec, found the end");
  EXPECT_EQ(error_of("sign_vq intq"),
            "column 9: expected '+' between key codec and value codec, found 'i'");
  EXPECT_EQ(error_of("sign_vq+intq self_index"),
            "column 14: expected '>' before the selector, found 's'");
  EXPECT_EQ(error_of("sign_vq+intq > self_index"),
            "column 26: expected '>' before the attention kernel, found the end");
  EXPECT_EQ(error_of("sign_vq(magnitude_bits"),
            "column 23: expected '=' after option 'magnitude_bits', found the end");
  EXPECT_EQ(error_of("sign_vq(magnitude_bits=2"),
            "column 25: expected ')' or ',' after an option, found the end");
  EXPECT_EQ(error_of("sign_vq(=2)"), "column 9: expected the name of an option, found '='");
  EXPECT_EQ(error_of("sign_vq[ref"), "column 12: expected ']' after the variant, found the end");
  EXPECT_EQ(error_of("sign_vq+intq > full > sparse_flash @"),
            "column 37: expected a device after '@', found the end");
  EXPECT_EQ(error_of("sign_vq+intq > full > sparse_flash twice"),
            "column 36: expected '@device' or the end, found 't'");
}

TEST(PipelineText, ForcesABaseByItsId) {
  const PipelineSpec spec =
      parse_pipeline("rot_lm+rot_lm > top_p(base=self_index[cpu]) > sparse_flash", registry());
  EXPECT_EQ(spec.force, (std::map<std::string, std::string>{{"selector.self_index", "cpu"}}));
  ASSERT_EQ(spec.selector.base.size(), 1u);
  EXPECT_EQ(spec.selector.base[0].id, "self_index");
}

TEST(PipelineText, RefusesWrappersWithoutSense) {
  const auto error_with = [](const std::string& selector) {
    return error_of("sign_vq+intq > " + selector + " > sparse_flash");
  };
  EXPECT_EQ(error_with("top_p"),
            "column 16: selector 'top_p' wraps another selector and has none; add base: {name: "
            "...} (what is pruned)");
  EXPECT_EQ(error_with("split(base=top_p(p=1))"),
            "column 16: selector 'top_p' wraps another selector and has none; add base: {name: "
            "...} (what is pruned)");
  EXPECT_EQ(
      error_with("top_p(base=top_p(base=full))"),
      "column 16: selector 'top_p' is wrapped around itself (top_p around top_p around full); "
      "name each selector once");
  EXPECT_EQ(error_with("top_p(base=split(base=top_p(base=full)))"),
            "column 16: selector 'top_p' is wrapped around itself (top_p around split around top_p "
            "around full); name each selector once");
  EXPECT_EQ(error_with("top_p(base=self_indx)"),
            "column 27: there is no selector 'self_indx'; did you mean 'self_index'?");
  EXPECT_EQ(
      error_with("top_p(budget=1,base=self_index)"),
      "column 16: selector 'top_p' has no option 'budget': it is one of 'self_index', which it "
      "wraps; write base.budget");
  EXPECT_EQ(error_with("top_p(base=self_index(bugdet=1))"),
            "column 16: selector 'self_index' has no option 'bugdet'; did you mean 'budget'?");
  EXPECT_EQ(error_with("top_p(base=self_index(pinned=1))"),
            "column 38: pinned is an option of the whole pipeline, not of a base; move it to the "
            "outermost selector");
  EXPECT_EQ(error_with("full(base=self_index(budget=1))"),
            "column 21: selector 'full' has no option 'base': it takes none");
  EXPECT_EQ(error_with("top_p(base=full,base=full)"), "column 32: option 'base' is given twice");
  EXPECT_EQ(error_with("top_p(base=full"),
            "column 32: expected ')' or ',' after an option, found '>'");
  EXPECT_EQ(error_with("top_p(base=full,table=\"x)"),
            "column 56: expected '\"' at the end of a text, found the end");
}

TEST(PipelineText, AsksTheRegistry) {
  EXPECT_EQ(error_of("sign_vg+intq"),
            "column 1: there is no key codec 'sign_vg'; did you mean 'sign_vq'?");
  EXPECT_EQ(error_of("sign_vq+sign_vq"),
            "column 9: there is no value codec 'sign_vq'; there are intq, rot_lm; --plugin-path "
            "DIR adds those of a folder");
  EXPECT_EQ(error_of("sign_vq(magnitude_bit=2)"),
            "column 1: key codec 'sign_vq' has no option 'magnitude_bit'; did you mean "
            "'magnitude_bits'?");
  EXPECT_EQ(error_of("sign_vq(magnitude_bits=3)"),
            "column 1: key codec 'sign_vq': magnitude_bits is '3', expected one of 1, 2, 4, 8");
  EXPECT_EQ(error_of("sign_vq(scale_group=32,scale_group=32)"),
            "column 1: key codec 'sign_vq': option 'scale_group' is given twice");
  EXPECT_EQ(error_of("sign_vq[cuda]"),
            "column 9: key codec 'sign_vq' has no variant 'cuda'; it has ref");
  EXPECT_EQ(error_of("sign_vq+intq > full(budget=1) > sparse_flash"),
            "column 16: selector 'full' has no option 'budget'; it takes pinned, pin, "
            "keep_generated");
  EXPECT_EQ(error_of("sign_vq+intq > full(pinnd=1) > sparse_flash"),
            "column 16: selector 'full' has no option 'pinnd'; did you mean 'pinned'?");
  EXPECT_EQ(error_of("sign_vq+intq > full(pinned=1,pinned=1) > sparse_flash"),
            "column 30: option 'pinned' is given twice");
  EXPECT_EQ(error_of("sign_vq+intq > full(pin=last) > sparse_flash"),
            "column 21: selector: pin is 'last', expected one of last_query, snapkv, first");
  EXPECT_EQ(error_of("sign_vq+intq > full > sparse_flash @gpu"),
            "column 37: device is 'gpu'; did you mean 'cuda'?");
}

}  // namespace
}  // namespace sikv
