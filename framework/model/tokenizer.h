// Byte-level BPE: text to token ids and back, from the vocabulary of a model file.
//
// A text is cut into words by a regular expression (the pre-tokenizer), the bytes of a word become
// tokens, and neighbours are merged by rank. The same ids as the `tokenizers` library gives for the
// same vocabulary.
#ifndef SIKV_FRAMEWORK_MODEL_TOKENIZER_H_
#define SIKV_FRAMEWORK_MODEL_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "framework/model/model_file.h"

namespace sikv {

// What the name of a special token means when it occurs in a text.
enum class SpecialTokens { kAsText, kParsed };

class Tokenizer {
 public:
  // Error for an unknown pre-tokenizer, and for a merge that names a token that is none.
  explicit Tokenizer(const Vocabulary& vocabulary);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  // Without a begin-of-sequence token. Error where the text is not UTF-8, and for a byte that has
  // no token (SmolLM2's vocabulary lacks 18 control characters).
  std::vector<int32_t> encode(std::string_view text,
                              SpecialTokens special = SpecialTokens::kAsText) const;

  // The bytes of the tokens; special tokens by their names. May end within a character.
  std::string decode(std::span<const int32_t> tokens) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_TOKENIZER_H_
