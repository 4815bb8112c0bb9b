#include "framework/trace/trace_format.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "framework/base/text.h"

namespace sikv::trace_format {
namespace {

constexpr std::array kHeadDims = {64, 96, 128, 256};

herr_t first_description(unsigned n, const H5E_error2_t* error, void* text) {
  if (n == 0 && error->desc != nullptr) *static_cast<std::string*>(text) = error->desc;
  return 0;
}

herr_t collect(hid_t stack, void* text) {
  H5Ewalk2(stack, H5E_WALK_UPWARD, first_description, text);
  return 0;
}

// The index of the first element whose exponent bits are all ones, or the size.
template <typename Word>
size_t first_saturated(std::span<const std::byte> elements, Word exponent) {
  const size_t size = elements.size() / sizeof(Word);
  // The common case, all finite, runs through blocks without a branch per element.
  constexpr size_t kBlock = 4096;
  std::array<Word, kBlock> words;
  for (size_t begin = 0; begin < size; begin += kBlock) {
    const size_t count = std::min(kBlock, size - begin);
    std::memcpy(words.data(), elements.data() + begin * sizeof(Word), count * sizeof(Word));
    unsigned bad = 0;
    for (size_t i = 0; i < count; ++i) bad |= (words[i] & exponent) == exponent;
    if (bad == 0) continue;
    for (size_t i = 0; i < count; ++i) {
      if ((words[i] & exponent) == exponent) return begin + i;
    }
  }
  return size;
}

size_t first_not_finite(std::span<const std::byte> elements, int32_t dtype) {
  switch (dtype) {
    case SIKV_FP32:
      return first_saturated<uint32_t>(elements, 0x7f800000u);
    case SIKV_FP16:
      return first_saturated<uint16_t>(elements, 0x7c00u);
    default:
      return first_saturated<uint16_t>(elements, 0x7f80u);
  }
}

const char* kind_of(float x) { return std::isnan(x) ? "NaN" : x < 0 ? "-inf" : "inf"; }

void judge_count(const std::string& file, const char* name, int64_t value, int64_t most) {
  if (value < 1 || value > most) {
    throw Error("{}: {} is {}; it must be from 1 to {}", file, name, value, most);
  }
}

}  // namespace

H5::DataType hdf5_type(int32_t dtype) {
  if (dtype == SIKV_BF16) return H5::PredType::STD_U16LE;
  if (dtype == SIKV_FP32) return H5::PredType::IEEE_F32LE;
  H5::FloatType half(H5::PredType::IEEE_F32LE);
  half.setFields(15, 10, 5, 0, 10);
  half.setSize(2);
  half.setEbias(15);
  return half;
}

const char* dtype_name(int32_t dtype) {
  return dtype == SIKV_FP32 ? "fp32" : dtype == SIKV_FP16 ? "fp16" : "bf16";
}

std::string layer_path(int layer) { return fmt::format("layers/{}", layer); }

std::string shape_text(std::span<const hsize_t> shape) {
  std::vector<std::string> sizes;
  for (const hsize_t n : shape) sizes.push_back(std::to_string(n));
  return fmt::format("[{}]", join(sizes));
}

void judge_meta(const std::string& file, const TraceMeta& meta) {
  judge_count(file, "num_layers", meta.num_layers, kMaxLayers);
  judge_count(file, "num_query_heads", meta.num_query_heads, kMaxHeads);
  judge_count(file, "num_kv_heads", meta.num_kv_heads, kMaxHeads);
  if (meta.num_query_heads % meta.num_kv_heads != 0) {
    throw Error(
        "{}: {} query heads cannot share {} KV heads evenly; num_query_heads must be a multiple of "
        "num_kv_heads",
        file, meta.num_query_heads, meta.num_kv_heads);
  }
  if (std::find(kHeadDims.begin(), kHeadDims.end(), meta.head_dim) == kHeadDims.end()) {
    throw Error("{}: head_dim {} is not supported; use a model with one of 64, 96, 128, 256", file,
                meta.head_dim);
  }
  if (!std::isfinite(meta.rope_theta) || meta.rope_theta <= 0) {
    throw Error("{}: rope_theta is {}; it must be a positive number", file, meta.rope_theta);
  }
  const std::vector<std::string> layouts = {"half", "interleaved"};
  if (std::find(layouts.begin(), layouts.end(), meta.rope_layout) == layouts.end()) {
    throw Error("{}: rope_layout is '{}'; it must be half or interleaved{}", file, meta.rope_layout,
                did_you_mean(meta.rope_layout, layouts));
  }
}

void judge_finite(const std::string& where, std::span<const std::byte> elements, int32_t dtype,
                  int64_t heads, int64_t head_dim, int64_t position) {
  const size_t bad = first_not_finite(elements, dtype);
  if (bad * static_cast<size_t>(sikv_dtype_bytes(dtype)) == elements.size()) return;
  const int64_t index = static_cast<int64_t>(bad);
  throw Error("{} has {} at position {}, head {}, channel {}; capture the layer again", where,
              kind_of(sikv_load(elements.data(), dtype, index)),
              position + index / (heads * head_dim), index / head_dim % heads, index % head_dim);
}

void judge_finite(const std::string& where, std::span<const float> w_o, int64_t columns) {
  const size_t bad = first_not_finite(std::as_bytes(w_o), SIKV_FP32);
  if (bad == w_o.size()) return;
  const int64_t index = static_cast<int64_t>(bad);
  throw Error("{} has {} at row {}, column {}; capture the layer again", where, kind_of(w_o[bad]),
              index / columns, index % columns);
}

void judge_needles(const std::string& file, std::span<const int64_t> needles, int64_t num_tokens) {
  const int64_t steps = static_cast<int64_t>(needles.size());
  if (steps > num_tokens) {
    throw Error("{}: {} needles for {} tokens; there is one for each of the last positions", file,
                steps, num_tokens);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t query = num_tokens - steps + step;
    const int64_t needle = needles[static_cast<size_t>(step)];
    if (needle < 0 || needle > query) {
      throw Error("{}: needle {} is at position {}; its query at {} sees only 0 to {}", file, step,
                  needle, query, query);
    }
  }
}

void judge_query_positions(const std::string& where, const TraceLayer& layer) {
  if (layer.num_queries < 1 || layer.num_queries > layer.num_tokens) {
    throw Error(
        "{}: {} queries for {} tokens; there must be at least one and at most one per token", where,
        layer.num_queries, layer.num_tokens);
  }
  if (layer.first_query_position != layer.num_tokens - layer.num_queries) {
    throw Error("{}: first_query_position is {}; the last {} of {} tokens start at {}", where,
                layer.first_query_position, layer.num_queries, layer.num_tokens,
                layer.num_tokens - layer.num_queries);
  }
}

Hdf5Errors::Hdf5Errors() {
  H5Eget_auto2(H5E_DEFAULT, &old_function_, &old_data_);
  H5Eset_auto2(H5E_DEFAULT, collect, &reason_);
}

Hdf5Errors::~Hdf5Errors() { H5Eset_auto2(H5E_DEFAULT, old_function_, old_data_); }

}  // namespace sikv::trace_format
