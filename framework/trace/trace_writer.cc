#include <algorithm>
#include <set>
#include <system_error>

#include "framework/base/file.h"
#include "framework/base/interrupt.h"
#include "framework/base/text.h"
#include "framework/trace/trace.h"
#include "framework/trace/trace_format.h"

namespace sikv {

using trace_format::guarded;
using trace_format::layer_path;

namespace {

constexpr std::string_view kUnwritten = "free some space or choose another folder";

// Level 9 takes several times as long for about 1 % less: the low mantissa bytes are noise.
constexpr int kDeflateLevel = 4;

// Room for what HDF5 writes besides the elements: its trees, headers and strings.
constexpr uint64_t kOverhead = 1 << 20;

void write_string(const H5::H5Object& object, const char* name, const std::string& text) {
  H5::StrType type(H5::PredType::C_S1, H5T_VARIABLE);
  type.setCset(H5T_CSET_UTF8);
  object.createAttribute(name, type, H5::DataSpace()).write(type, text);
}

void write_integer(const H5::H5Object& object, const char* name, int64_t value) {
  object.createAttribute(name, H5::PredType::STD_I64LE, H5::DataSpace())
      .write(H5::PredType::NATIVE_INT64, &value);
}

// As h5py stores a bool.
void write_bool(const H5::H5Object& object, const char* name, bool value) {
  H5::EnumType type(H5::PredType::STD_I8LE);
  int8_t element = 0;
  type.insert("FALSE", &element);
  element = 1;
  type.insert("TRUE", &element);
  element = value;
  object.createAttribute(name, type, H5::DataSpace()).write(type, &element);
}

}  // namespace

struct TraceWriter::Impl {
  std::string file;
  TraceMeta meta;
  int64_t num_tokens;
  AtomicPath target;
  H5::H5File hdf5;
  std::set<int> written;

  Impl(const std::filesystem::path& path, const TraceMeta& trace_meta,
       std::span<const int32_t> tokens)
      : file(path.string()),
        meta(trace_meta),
        num_tokens(static_cast<int64_t>(tokens.size())),
        target(path) {
    trace_format::judge_meta(file, meta);
    if (tokens.empty()) throw Error("{}: a trace needs at least one token", file);
    target.reserve(kOverhead);
    writing([&] {
      hdf5 = H5::H5File(target.temporary().string(), H5F_ACC_TRUNC);
      const H5::Group root = hdf5.openGroup("/");
      write_string(root, "model", meta.model);
      write_string(root, "text", meta.text);
      write_string(root, "license", meta.license);
      write_string(root, "tokenizer", meta.tokenizer);
      write_string(root, "rope_layout", meta.rope_layout);
      write_integer(root, "num_layers", meta.num_layers);
      write_integer(root, "num_query_heads", meta.num_query_heads);
      write_integer(root, "num_kv_heads", meta.num_kv_heads);
      write_integer(root, "head_dim", meta.head_dim);
      root.createAttribute("rope_theta", H5::PredType::IEEE_F64LE, H5::DataSpace())
          .write(H5::PredType::NATIVE_DOUBLE, &meta.rope_theta);
      write_bool(root, "rope_applied", meta.rope_applied);
      hdf5.createGroup("layers");
      write_rows("tokens", H5::PredType::STD_I32LE, H5::PredType::NATIVE_INT32, {tokens.size()},
                 std::as_bytes(tokens));
    });
  }

  uint64_t file_size() const {
    hsize_t bytes = 0;
    if (H5Fget_filesize(hdf5.getId(), &bytes) < 0) throw H5::FileIException();
    return bytes;
  }

  template <typename F>
  void writing(F&& f) {
    guarded("cannot write " + file, kUnwritten, f);
  }

  H5::DataSet write_rows(const std::string& name, const H5::DataType& on_disk,
                         const H5::DataType& in_memory, std::vector<hsize_t> shape,
                         std::span<const std::byte> data) {
    const hsize_t rows = shape[0], row_bytes = data.size() / rows;
    std::vector<hsize_t> chunk = shape;
    chunk[0] = std::clamp<hsize_t>(trace_format::kChunkBytes / row_bytes, 1, rows);
    H5::DSetCreatPropList plan;
    plan.setChunk(static_cast<int>(chunk.size()), chunk.data());
    plan.setShuffle();
    plan.setDeflate(kDeflateLevel);
    const H5::DataSpace space(static_cast<int>(shape.size()), shape.data());
    H5::DataSet set = hdf5.createDataSet(name, on_disk, space, plan);
    std::vector<hsize_t> start(shape.size(), 0), count = shape;
    for (; start[0] < rows; start[0] += chunk[0]) {
      check_interrupt();
      target.reserve(file_size() + chunk[0] * row_bytes + kOverhead);
      count[0] = std::min(chunk[0], rows - start[0]);
      space.selectHyperslab(H5S_SELECT_SET, count.data(), start.data());
      const H5::DataSpace slab(static_cast<int>(count.size()), count.data());
      set.write(data.data() + start[0] * row_bytes, in_memory, slab, space);
    }
    return set;
  }

  std::string where(int layer, const char* tensor) const {
    return fmt::format("{}: {}/{}", file, layer_path(layer), tensor);
  }

  void judge_tensor(const TraceLayer& layer, const char* tensor,
                    const std::vector<std::byte>& elements, int64_t rows, int64_t heads,
                    int64_t position) const {
    const int64_t expected = rows * heads * meta.head_dim * sikv_dtype_bytes(layer.dtype);
    if (static_cast<int64_t>(elements.size()) != expected) {
      throw Error("{} has {} bytes; [{}, {}, {}] in {} has {}", where(layer.layer, tensor),
                  elements.size(), rows, heads, meta.head_dim,
                  trace_format::dtype_name(layer.dtype), expected);
    }
    trace_format::judge_finite(where(layer.layer, tensor), elements, layer.dtype, heads,
                               meta.head_dim, position);
  }

  int64_t w_o_rows() const { return int64_t{meta.num_query_heads} * meta.head_dim; }

  void judge(const TraceLayer& layer) const {
    if (layer.layer < 0 || layer.layer >= meta.num_layers) {
      throw Error("{}: there is no layer {}; the model has layers 0 to {}", file, layer.layer,
                  meta.num_layers - 1);
    }
    if (written.count(layer.layer) != 0) {
      throw Error("{}: layer {} is written already; write each layer once", file, layer.layer);
    }
    if (layer.dtype != SIKV_FP32 && layer.dtype != SIKV_FP16 && layer.dtype != SIKV_BF16) {
      throw Error("{}: element type {} cannot be stored; use fp16, bf16 or fp32", file,
                  layer.dtype);
    }
    const std::string name = file + ": " + layer_path(layer.layer);
    if (layer.num_tokens != num_tokens) {
      throw Error("{} has {} tokens; the trace has {}", name, layer.num_tokens, num_tokens);
    }
    trace_format::judge_query_positions(name, layer);
    judge_tensor(layer, "k", layer.k, num_tokens, meta.num_kv_heads, 0);
    judge_tensor(layer, "v", layer.v, num_tokens, meta.num_kv_heads, 0);
    judge_tensor(layer, "q", layer.q, layer.num_queries, meta.num_query_heads,
                 layer.first_query_position);
    if (layer.w_o.empty()) return;
    const int64_t size = static_cast<int64_t>(layer.w_o.size());
    if (size % w_o_rows() != 0) {
      throw Error("{} has {} elements; they must fill [{}, hidden]", where(layer.layer, "w_o"),
                  size, w_o_rows());
    }
    trace_format::judge_finite(where(layer.layer, "w_o"), layer.w_o, size / w_o_rows());
  }

  void write_tensor(const TraceLayer& layer, const char* tensor,
                    const std::vector<std::byte>& elements, int64_t rows, int heads) {
    const H5::DataType type = trace_format::hdf5_type(layer.dtype);
    const H5::DataSet set = write_rows(layer_path(layer.layer) + "/" + tensor, type, type,
                                       {static_cast<hsize_t>(rows), static_cast<hsize_t>(heads),
                                        static_cast<hsize_t>(meta.head_dim)},
                                       elements);
    if (layer.dtype == SIKV_BF16) write_string(set, "dtype", "bf16");
  }
};

TraceWriter::TraceWriter(const std::filesystem::path& path, const TraceMeta& meta,
                         std::span<const int32_t> tokens)
    : impl_(std::make_unique<Impl>(path, meta, tokens)) {}

TraceWriter::~TraceWriter() {
  // Closing flushes, and an abandoned file may well be one that the disk had no room for.
  trace_format::Hdf5Errors silent;
  impl_.reset();
}

void TraceWriter::write_layer(const TraceLayer& layer) {
  impl_->judge(layer);
  impl_->writing([&] {
    const H5::Group group = impl_->hdf5.createGroup(layer_path(layer.layer));
    write_integer(group, "first_query_position", layer.first_query_position);
    impl_->write_tensor(layer, "k", layer.k, layer.num_tokens, impl_->meta.num_kv_heads);
    impl_->write_tensor(layer, "v", layer.v, layer.num_tokens, impl_->meta.num_kv_heads);
    impl_->write_tensor(layer, "q", layer.q, layer.num_queries, impl_->meta.num_query_heads);
    if (layer.w_o.empty()) return;
    const hsize_t rows = static_cast<hsize_t>(impl_->w_o_rows());
    impl_->write_rows(layer_path(layer.layer) + "/w_o", H5::PredType::IEEE_F32LE,
                      H5::PredType::NATIVE_FLOAT, {rows, layer.w_o.size() / rows},
                      std::as_bytes(std::span(layer.w_o)));
  });
  impl_->written.insert(layer.layer);
}

void TraceWriter::write_needles(std::span<const int64_t> needles) {
  trace_format::judge_needles(impl_->file, needles, impl_->num_tokens);
  if (needles.empty()) return;
  impl_->writing([&] {
    impl_->write_rows("needles", H5::PredType::STD_I64LE, H5::PredType::NATIVE_INT64,
                      {needles.size()}, std::as_bytes(needles));
  });
}

void TraceWriter::finish() {
  if (impl_->written.empty()) throw Error("{}: it holds no layer; write at least one", impl_->file);
  impl_->writing([&] {
    impl_->hdf5.flush(H5F_SCOPE_GLOBAL);
    const uint64_t bytes = impl_->file_size();
    impl_->hdf5.close();
    std::filesystem::resize_file(impl_->target.temporary(), bytes);
  });
  impl_->target.commit();
}

}  // namespace sikv
