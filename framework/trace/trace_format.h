// Private to framework/trace: what reader and writer both hold a trace to, and HDF5 without its
// habit of printing.
#ifndef SIKV_FRAMEWORK_TRACE_TRACE_FORMAT_H_
#define SIKV_FRAMEWORK_TRACE_TRACE_FORMAT_H_

#include <H5Cpp.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "framework/base/error.h"
#include "framework/trace/trace.h"

namespace sikv::trace_format {

// Chunks of about this size: a layer's rows are read and written by the slab, and 1 MiB is also
// HDF5's chunk cache.
inline constexpr int64_t kChunkBytes = 1 << 20;

// Counts above these are damage, not models; they keep sizes far from overflow.
inline constexpr int64_t kMaxLayers = 1 << 16;
inline constexpr int64_t kMaxHeads = 1 << 16;

// The HDF5 type of `dtype` in memory and, little-endian, on disk.
H5::DataType hdf5_type(int32_t dtype);

const char* dtype_name(int32_t dtype);

// Names in messages: where is "<file>: layers/<l>/<tensor>".
std::string layer_path(int layer);
std::string shape_text(std::span<const hsize_t> shape);

// Throw an Error that starts with `file`.
void judge_meta(const std::string& file, const TraceMeta& meta);
// `position` is that of the tensor's first row. elements: [rows, heads, head_dim].
void judge_finite(const std::string& where, std::span<const std::byte> elements, int32_t dtype,
                  int64_t heads, int64_t head_dim, int64_t position);
// w_o: [rows, columns]
void judge_finite(const std::string& where, std::span<const float> w_o, int64_t columns);
void judge_needles(const std::string& file, std::span<const int64_t> needles, int64_t num_tokens);
void judge_query_positions(const std::string& where, const TraceLayer& layer);

// Redirects HDF5's error stack from stderr into a string for as long as it lives.
class Hdf5Errors {
 public:
  Hdf5Errors();
  ~Hdf5Errors();
  Hdf5Errors(const Hdf5Errors&) = delete;
  Hdf5Errors& operator=(const Hdf5Errors&) = delete;

  // The most specific description of the latest failure.
  const std::string& reason() const { return reason_; }

 private:
  H5E_auto2_t old_function_ = nullptr;
  void* old_data_ = nullptr;
  std::string reason_;
};

// Runs f; a failure inside HDF5 becomes "<subject>: <reason>; <remedy>".
template <typename F>
auto guarded(const std::string& subject, std::string_view remedy, F&& f) {
  Hdf5Errors errors;
  try {
    return f();
  } catch (const H5::Exception& exception) {
    const std::string& reason = errors.reason();
    throw Error("{}: {}; {}", subject, reason.empty() ? exception.getDetailMsg() : reason, remedy);
  }
}

}  // namespace sikv::trace_format

#endif  // SIKV_FRAMEWORK_TRACE_TRACE_FORMAT_H_
