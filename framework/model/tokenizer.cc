#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>
#include <queue>
#include <unordered_map>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/model/tokenizer.h"

namespace sikv {
namespace {

constexpr int32_t kNone = -1;

// Unicode's White_Space. PCRE's own \s also has U+180E, which lost that property in Unicode 6.3.
#define SIKV_SPACE "\\x{9}-\\x{d}\\x{85}\\p{Z}"

// How each pre-tokenizer cuts a text into words; llama.cpp's list of them is the source.
constexpr const char* kGpt2Words =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SIKV_SPACE "\\p{L}\\p{N}]+|[" SIKV_SPACE
    "]+(?![^" SIKV_SPACE "])|[" SIKV_SPACE "]+";

std::string llama3_words(const std::string& number) {
  return "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" + number +
         "| ?[^" SIKV_SPACE "\\p{L}\\p{N}]+[\\r\\n]*|[" SIKV_SPACE "]*[\\r\\n]+|[" SIKV_SPACE
         "]+(?![^" SIKV_SPACE "])|[" SIKV_SPACE "]+";
}

#undef SIKV_SPACE

struct WordRule {
  const char* name;
  // Each applied to the pieces that the one before left; what does not match is a piece, too.
  std::vector<std::string> patterns;
  // Llama 3 takes a word that is in the vocabulary whole, even where merges would not build it.
  bool whole_words_first;
};

std::vector<WordRule> word_rules() {
  return {{"smollm", {"\\p{N}", kGpt2Words}, false},
          {"gpt-2", {kGpt2Words}, false},
          {"llama-bpe", {llama3_words("\\p{N}{1,3}")}, true},
          {"qwen2", {llama3_words("\\p{N}")}, false}};
}

class Pattern {
 public:
  explicit Pattern(const std::string& pattern) {
    int error = 0;
    PCRE2_SIZE where = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP, &error, &where, nullptr));
    SIKV_ASSERT(code_ != nullptr);
    // Without it matching is 5 times slower and still right.
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
    match_.reset(pcre2_match_data_create_from_pattern(code_.get(), nullptr));
  }

  // Appends the pieces of `text`, which is valid UTF-8.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const {
    size_t done = 0;
    const auto add = [&](size_t from, size_t to) {
      if (from < to) pieces.push_back(text.substr(from, to - from));
    };
    while (done < text.size()) {
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()),
                                    text.size(), done, PCRE2_NO_UTF_CHECK, match_.get(), nullptr);
      if (found < 0) break;
      const PCRE2_SIZE* const at = pcre2_get_ovector_pointer(match_.get());
      add(done, at[0]);
      add(at[0], at[1]);
      done = at[1];
    }
    add(done, text.size());
  }

 private:
  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  };
  std::unique_ptr<pcre2_code, Free> code_;
  std::unique_ptr<pcre2_match_data, Free> match_;
};

// Length of the UTF-8 character that starts `text`; 0 if none does.
size_t character_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  const size_t length = lead < 0x80   ? 1
                        : lead < 0xc2 ? 0
                        : lead < 0xe0 ? 2
                        : lead < 0xf0 ? 3
                        : lead < 0xf5 ? 4
                                      : 0;
  if (length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  const unsigned char second = length > 1 ? byte(1) : 0;
  const bool overlong = (lead == 0xe0 && second < 0xa0) || (lead == 0xf0 && second < 0x90);
  const bool surrogate = lead == 0xed && second >= 0xa0;
  const bool beyond = lead == 0xf4 && second >= 0x90;
  return overlong || surrogate || beyond ? 0 : length;
}

std::string utf8(uint32_t point) {
  if (point < 0x80) return {static_cast<char>(point)};
  return {static_cast<char>(0xc0 | (point >> 6)), static_cast<char>(0x80 | (point & 0x3f))};
}

// The character that stands for each byte: itself where it is printable Latin-1, else one from
// U+0100 on, in order (GPT-2's table).
std::array<std::string, 256> byte_alphabet() {
  std::array<std::string, 256> alphabet;
  uint32_t next = 0x100;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    alphabet[byte] = utf8(printable ? byte : next++);
  }
  return alphabet;
}

struct Merge {
  int32_t rank;
  int32_t merged;
};

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

struct Tokenizer::Impl {
  WordRule rule;
  std::vector<Pattern> patterns;
  std::vector<std::string> bytes_of;               // [vocab] what a token stands for
  std::unordered_map<std::string, int32_t> words;  // normal tokens by their bytes
  std::array<int32_t, 256> byte_tokens;
  std::unordered_map<uint64_t, Merge> merges;                           // by pair_key
  std::vector<int32_t> special;                                         // longest name first
  mutable std::unordered_map<std::string, std::vector<int32_t>> cache;  // words seen

  explicit Impl(const Vocabulary& vocabulary) {
    choose_rule(vocabulary.pre_tokenizer);
    for (const std::string& pattern : rule.patterns) patterns.emplace_back(pattern);
    read_tokens(vocabulary);
    read_merges(vocabulary);
  }

  void choose_rule(const std::string& name) {
    std::vector<std::string> known;
    for (WordRule& candidate : word_rules()) {
      known.emplace_back(candidate.name);
      if (name != candidate.name) continue;
      rule = std::move(candidate);
      return;
    }
    if (name.empty()) {
      throw Error("the model file has no vocabulary: give token ids, or export it again with one");
    }
    throw Error("pre-tokenizer '{}' is not supported; there are {}", name, join(known));
  }

  void read_tokens(const Vocabulary& vocabulary) {
    const auto alphabet = byte_alphabet();
    std::unordered_map<std::string, char> byte_of;
    for (size_t byte = 0; byte < alphabet.size(); ++byte) {
      byte_of[alphabet[byte]] = static_cast<char>(byte);
    }
    byte_tokens.fill(kNone);
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
      const std::string& token = vocabulary.tokens[id];
      const TokenType type = vocabulary.types[id];
      const bool is_special = type == TokenType::kControl || type == TokenType::kUserDefined;
      std::optional<std::string> bytes;
      if (!is_special) bytes = to_bytes(token, byte_of);
      bytes_of.push_back(bytes.value_or(token));
      if (is_special && !token.empty()) special.push_back(static_cast<int32_t>(id));
      if (!bytes) continue;
      words.emplace(*bytes, static_cast<int32_t>(id));
      if (bytes->size() == 1) {
        byte_tokens[static_cast<unsigned char>(bytes->front())] = static_cast<int32_t>(id);
      }
    }
    std::stable_sort(special.begin(), special.end(), [&](int32_t a, int32_t b) {
      return bytes_of[static_cast<size_t>(a)].size() > bytes_of[static_cast<size_t>(b)].size();
    });
  }

  static std::optional<std::string> to_bytes(std::string_view token,
                                             const std::unordered_map<std::string, char>& byte_of) {
    std::string bytes;
    while (!token.empty()) {
      const size_t length = character_length(token);
      const auto found = byte_of.find(std::string(token.substr(0, length)));
      if (length == 0 || found == byte_of.end()) return std::nullopt;
      bytes += found->second;
      token.remove_prefix(length);
    }
    return bytes;
  }

  void read_merges(const Vocabulary& vocabulary) {
    std::unordered_map<std::string_view, int32_t> ids;
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
      ids.emplace(vocabulary.tokens[id], static_cast<int32_t>(id));
    }
    for (size_t rank = 0; rank < vocabulary.merges.size(); ++rank) {
      const std::string& merge = vocabulary.merges[rank];
      const size_t space = merge.find(' ', 1);
      if (space == std::string::npos) {
        throw Error("merge {} of the vocabulary is '{}'; expected two tokens", rank, merge);
      }
      const std::string left = merge.substr(0, space), right = merge.substr(space + 1);
      const auto id_of = [&](const std::string& token) {
        const auto found = ids.find(token);
        if (found == ids.end()) {
          throw Error(
              "merge {} of the vocabulary ('{}') needs the token '{}', which is missing: "
              "export the model again",
              rank, merge, token);
        }
        return found->second;
      };
      const Merge entry{static_cast<int32_t>(rank), id_of(left + right)};
      merges.emplace(pair_key(id_of(left), id_of(right)), entry);
    }
  }

  // ---- encoding ---------------------------------------------------------------------------------

  void encode_text(std::string_view text, std::vector<int32_t>& tokens) const {
    std::vector<std::string_view> pieces = {text};
    for (const Pattern& pattern : patterns) {
      std::vector<std::string_view> finer;
      for (const std::string_view piece : pieces) pattern.split(piece, finer);
      pieces = std::move(finer);
    }
    for (const std::string_view word : pieces) {
      const auto [entry, is_new] = cache.try_emplace(std::string(word));
      if (is_new) entry->second = encode_word(word);
      tokens.insert(tokens.end(), entry->second.begin(), entry->second.end());
    }
  }

  std::vector<int32_t> encode_word(std::string_view word) const {
    if (rule.whole_words_first) {
      const auto whole = words.find(std::string(word));
      if (whole != words.end()) return {whole->second};
    }
    // A list of symbols, linked so that a merge takes constant time; the best pair comes from a
    // heap, where entries of symbols that have changed since are skipped.
    struct Symbol {
      int32_t token;
      int previous, next;
    };
    struct Candidate {
      int32_t rank;
      int left;
      uint64_t pair;
      bool operator>(const Candidate& other) const {
        return std::pair(rank, left) > std::pair(other.rank, other.left);
      }
    };
    std::vector<Symbol> symbols;
    for (const char c : word) {
      const int32_t token = byte_tokens[static_cast<unsigned char>(c)];
      if (token == kNone) {
        throw Error(
            "the vocabulary has no token for the byte 0x{:02x} of the text: remove it from "
            "the text",
            static_cast<unsigned char>(c));
      }
      const int at = static_cast<int>(symbols.size());
      symbols.push_back({token, at - 1, at + 1});
    }
    const int end = static_cast<int>(symbols.size());
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap;
    const auto symbol = [&](int i) -> Symbol& { return symbols[static_cast<size_t>(i)]; };
    const auto offer = [&](int left) {
      if (left < 0 || symbol(left).next >= end) return;
      const uint64_t pair = pair_key(symbol(left).token, symbol(symbol(left).next).token);
      const auto found = merges.find(pair);
      if (found != merges.end()) heap.push({found->second.rank, left, pair});
    };
    for (int i = 0; i < end; ++i) offer(i);
    while (!heap.empty()) {
      const Candidate best = heap.top();
      heap.pop();
      Symbol& left = symbol(best.left);
      if (left.token == kNone || left.next >= end ||
          pair_key(left.token, symbol(left.next).token) != best.pair) {
        continue;
      }
      Symbol& right = symbol(left.next);
      left.token = merges.find(best.pair)->second.merged;
      right.token = kNone;
      left.next = right.next;
      if (left.next < end) symbol(left.next).previous = best.left;
      offer(left.previous);
      offer(best.left);
    }
    std::vector<int32_t> tokens;
    for (int i = 0; i < end; i = symbol(i).next) tokens.push_back(symbol(i).token);
    return tokens;
  }

  // The special token whose name `text` starts with, or kNone.
  int32_t special_at(std::string_view text) const {
    for (const int32_t id : special) {
      if (text.starts_with(bytes_of[static_cast<size_t>(id)])) return id;
    }
    return kNone;
  }
};

Tokenizer::Tokenizer(const Vocabulary& vocabulary) : impl_(std::make_unique<Impl>(vocabulary)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text, SpecialTokens special) const {
  for (size_t at = 0; at < text.size();) {
    const size_t length = character_length(text.substr(at));
    if (length == 0) {
      throw Error("the text is not UTF-8 at byte {} (0x{:02x}): convert it first", at,
                  static_cast<unsigned char>(text[at]));
    }
    at += length;
  }
  std::vector<int32_t> tokens;
  size_t done = 0;
  for (size_t at = 0; special == SpecialTokens::kParsed && at < text.size(); ++at) {
    const int32_t id = impl_->special_at(text.substr(at));
    if (id == kNone) continue;
    impl_->encode_text(text.substr(done, at - done), tokens);
    tokens.push_back(id);
    done = at + impl_->bytes_of[static_cast<size_t>(id)].size();
    at = done - 1;
  }
  impl_->encode_text(text.substr(done), tokens);
  return tokens;
}

std::string Tokenizer::decode(std::span<const int32_t> tokens) const {
  std::string text;
  for (const int32_t token : tokens) {
    if (token < 0 || token >= static_cast<int32_t>(impl_->bytes_of.size())) {
      throw Error("token {} is not in the vocabulary, which has {} tokens", token,
                  impl_->bytes_of.size());
    }
    text += impl_->bytes_of[static_cast<size_t>(token)];
  }
  return text;
}

}  // namespace sikv
