#include "codecs/kvquant/kvquant.h"

#include <algorithm>
#include <functional>

#include "kernels/common/lloyd_levels.h"

namespace sikv {
namespace {

// On either side of a channel's range: half of the 1% that the paper takes for outliers.
constexpr double kTail = 0.005;
constexpr int kCells = 4096;     // boundaries between levels are 1/2048 of half a range apart
constexpr int kIterations = 50;  // the paper's

kvquant::Params read_options(const CreateArgs& args) {
  return {checked_head_dim(args, "kvquant"), static_cast<int>(args.options.integer("bits"))};
}

sikv_layout describe_keys(const kvquant::Params& p) {
  return LayoutBuilder(kvquant::kKeyFamily, kvquant::kVersion, p.head_dim)
      .param("bits", p.bits)
      .plane(SIKV_MAGNITUDE, SIKV_PER_TOKEN, 1, kvquant::code_bytes(p))
      .plane(SIKV_SCALE, SIKV_PER_TOKEN, 1, kvquant::key_scale_bytes(p))
      .table(SIKV_CODEBOOK, kvquant::num_levels(p))
      .table(SIKV_KEY_MEAN, p.head_dim)
      .table(SIKV_KEY_SCALE, p.head_dim)
      .build();
}

sikv_layout describe_values(const kvquant::Params& p) {
  return LayoutBuilder(kvquant::kValueFamily, kvquant::kVersion, p.head_dim)
      .param("bits", p.bits)
      .plane(SIKV_VALUE_CODE, SIKV_PER_TOKEN, 1, kvquant::code_bytes(p))
      .plane(SIKV_VALUE_SCALE, SIKV_PER_TOKEN, 1, kvquant::value_scale_bytes(p))
      .table(SIKV_CODEBOOK, kvquant::num_levels(p))
      .build();
}

kvquant::Page key_page(const StoreView& store, int row, int page) {
  return {store.page(SIKV_MAGNITUDE, row, page), store.page(SIKV_SCALE, row, page)};
}
kvquant::Page value_page(const StoreView& store, int row, int page) {
  return {store.page(SIKV_VALUE_CODE, row, page), store.page(SIKV_VALUE_SCALE, row, page)};
}
kvquant::KeyTables key_tables(const StoreView& store, int row) {
  return {store.table(SIKV_CODEBOOK, row), store.table(SIKV_KEY_MEAN, row),
          store.table(SIKV_KEY_SCALE, row)};
}

// The levels of a row, by k-means of what lies inside its range.
class LevelFit {
 public:
  LevelFit() : cells_(-1.0, 1.0, kCells) {}

  void add(float x, const kvquant::Extent& extent) {
    if (x < extent.lowest || x > extent.highest || kvquant::half_of(extent) <= 0.0f) return;
    cells_.add(kvquant::normalised(x, kvquant::centre_of(extent), kvquant::half_of(extent)));
  }
  void finish(const kvquant::Params& p, float* levels) const {
    const std::vector<double> fitted = cells_.levels(kvquant::num_levels(p), kIterations);
    std::copy(fitted.begin(), fitted.end(), levels);
  }

 private:
  LevelCells cells_;
};

// Between the numbers below and above which a share of kTail lies, by straight lines between
// neighbours. Reorders `column`.
kvquant::Extent percentiles(std::span<float> column) {
  const double place = kTail * static_cast<double>(column.size() - 1);
  const auto whole = static_cast<ptrdiff_t>(place);
  const auto at_rank = [&](auto&& before) {
    std::nth_element(column.begin(), column.begin() + whole, column.end(), before);
    const double first = column[static_cast<size_t>(whole)];
    if (whole + 1 == std::ssize(column)) return static_cast<float>(first);
    const double next = *std::min_element(column.begin() + whole + 1, column.end(), before);
    return static_cast<float>(first + (next - first) * (place - static_cast<double>(whole)));
  };
  return {at_rank(std::less<float>()), at_rank(std::greater<float>())};
}

}  // namespace

// ---- keys ---------------------------------------------------------------------------------------

KvquantKeys::KvquantKeys(const CreateArgs& args)
    : TokenCodec(args, SIKV_KEY_CODEC, describe_keys(read_options(args))),
      params_(read_options(args)) {}

// Holds the row in fp32 while it lasts: 64 MB at 128K tokens and D = 128.
void KvquantKeys::fit_row(const RowTokens& tokens, const StoreView& store, int row) {
  const int head_dim = params_.head_dim;
  const auto count = static_cast<size_t>(tokens.count());
  std::vector<float> columns(count * static_cast<size_t>(head_dim));
  size_t t = 0;
  tokens.for_each([&](int, int, const float* key) {
    for (int d = 0; d < head_dim; ++d) columns[count * static_cast<size_t>(d) + t] = key[d];
    ++t;
  });
  float* centre = store.table(SIKV_KEY_MEAN, row);
  float* half = store.table(SIKV_KEY_SCALE, row);
  LevelFit levels;
  for (int d = 0; d < head_dim; ++d) {
    const std::span<float> column(&columns[count * static_cast<size_t>(d)], count);
    const kvquant::Extent extent = percentiles(column);
    centre[d] = kvquant::centre_of(extent);
    half[d] = kvquant::half_of(extent);
    for (const float x : column) levels.add(x, extent);
  }
  levels.finish(params_, store.table(SIKV_CODEBOOK, row));
}

void KvquantKeys::encode_token(const StoreView& store, int row, int page, int token,
                               const float* key) {
  kvquant::pack_1(params_, key_page(store, row, page), token, key_tables(store, row), key);
}

void KvquantKeys::decode_token(const StoreView& store, int row, int page, int token,
                               float* key) const {
  kvquant::unpack_1(params_, key_page(store, row, page), token, key_tables(store, row), key);
}

// ---- values -------------------------------------------------------------------------------------

KvquantValues::KvquantValues(const CreateArgs& args)
    : TokenCodec(args, SIKV_VALUE_CODEC, describe_values(read_options(args))),
      params_(read_options(args)) {}

void KvquantValues::fit_row(const RowTokens& tokens, const StoreView& store, int row) {
  LevelFit levels;
  tokens.for_each([&](int, int, const float* value) {
    const kvquant::Extent extent = kvquant::narrowest(params_, value);
    for (int d = 0; d < params_.head_dim; ++d) levels.add(value[d], extent);
  });
  levels.finish(params_, store.table(SIKV_CODEBOOK, row));
}

void KvquantValues::encode_token(const StoreView& store, int row, int page, int token,
                                 const float* value) {
  kvquant::pack_1(params_, value_page(store, row, page), token, store.table(SIKV_CODEBOOK, row),
                  value);
}

void KvquantValues::decode_token(const StoreView& store, int row, int page, int token,
                                 float* value) const {
  kvquant::unpack_1(params_, value_page(store, row, page), token, store.table(SIKV_CODEBOOK, row),
                    value);
}

std::unique_ptr<Codec> make_kvquant_keys_ref(const CreateArgs& args) {
  return std::make_unique<KvquantKeys>(args);
}
std::unique_ptr<Codec> make_kvquant_values_ref(const CreateArgs& args) {
  return std::make_unique<KvquantValues>(args);
}

}  // namespace sikv
