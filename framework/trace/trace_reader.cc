#include <algorithm>
#include <charconv>
#include <cstring>
#include <limits>
#include <optional>
#include <system_error>
#include <utility>

#include "framework/base/interrupt.h"
#include "framework/base/text.h"
#include "framework/trace/trace.h"
#include "framework/trace/trace_format.h"

namespace sikv {

using trace_format::guarded;
using trace_format::layer_path;
using trace_format::shape_text;

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kDamaged = "the file is damaged, copy or capture it again";

// Deflate cannot pack more than 1032 bytes into one. A dataset that claims more than that is
// damaged, and allocating what it claims could end the process.
constexpr double kLargestRatio = 1100;

constexpr int64_t kSlabBytes = 16 << 20;

std::string type_text(const H5::DataType& type) {
  const size_t bits = type.getSize() * 8;
  switch (type.getClass()) {
    case H5T_FLOAT:
      return fmt::format("{}-bit floats", bits);
    case H5T_INTEGER:
      return fmt::format("{}-bit integers", bits);
    case H5T_STRING:
      return "strings";
    default:
      return "elements of another kind";
  }
}

std::vector<hsize_t> shape_of(const H5::DataSet& dataset) {
  const H5::DataSpace space = dataset.getSpace();
  std::vector<hsize_t> shape(static_cast<size_t>(std::max(space.getSimpleExtentNdims(), 0)));
  if (!shape.empty()) space.getSimpleExtentDims(shape.data());
  return shape;
}

std::optional<std::string> string_attribute(const H5::H5Object& object, const char* name) {
  const H5::Attribute attribute = object.openAttribute(name);
  if (attribute.getTypeClass() != H5T_STRING ||
      attribute.getSpace().getSimpleExtentNpoints() != 1) {
    return std::nullopt;
  }
  H5std_string text;
  attribute.read(attribute.getStrType(), text);
  // Fixed-length strings come padded with zeros.
  text.resize(std::strlen(text.c_str()));
  return text;
}

std::optional<int64_t> integer_attribute(const H5::H5Object& object, const char* name) {
  const H5::Attribute attribute = object.openAttribute(name);
  const H5T_class_t kind = attribute.getTypeClass();
  if ((kind != H5T_INTEGER && kind != H5T_ENUM) ||
      attribute.getSpace().getSimpleExtentNpoints() != 1) {
    return std::nullopt;
  }
  int64_t value = 0;
  attribute.read(H5::PredType::NATIVE_INT64, &value);
  return value;
}

std::optional<double> number_attribute(const H5::H5Object& object, const char* name) {
  const H5::Attribute attribute = object.openAttribute(name);
  const H5T_class_t kind = attribute.getTypeClass();
  if ((kind != H5T_FLOAT && kind != H5T_INTEGER) ||
      attribute.getSpace().getSimpleExtentNpoints() != 1) {
    return std::nullopt;
  }
  double value = 0;
  attribute.read(H5::PredType::NATIVE_DOUBLE, &value);
  return value;
}

std::optional<int32_t> element_type(const H5::DataSet& dataset) {
  const H5T_class_t kind = dataset.getTypeClass();
  if (kind == H5T_FLOAT) {
    const H5::FloatType type = dataset.getFloatType();
    size_t sign, exponent, exponent_bits, mantissa, mantissa_bits;
    type.getFields(sign, exponent, exponent_bits, mantissa, mantissa_bits);
    if (type.getSize() == 4 && exponent_bits == 8 && mantissa_bits == 23) return SIKV_FP32;
    if (type.getSize() == 2 && exponent_bits == 5 && mantissa_bits == 10) return SIKV_FP16;
  } else if (kind == H5T_INTEGER) {
    const H5::IntType type = dataset.getIntType();
    if (type.getSize() == 2 && type.getSign() == H5T_SGN_NONE && dataset.attrExists("dtype") &&
        string_attribute(dataset, "dtype") == "bf16") {
      return SIKV_BF16;
    }
  }
  return std::nullopt;
}

// "7" but neither "07" nor "+7": the writer's spelling, so that no layer can be there twice.
std::optional<int> layer_number(const std::string& name) {
  int number = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  if (error != std::errc() || end != name.data() + name.size() || std::to_string(number) != name) {
    return std::nullopt;
  }
  return number;
}

}  // namespace

struct TraceReader::Impl {
  std::string file;
  double file_bytes = 0;
  H5::H5File hdf5;
  TraceMeta meta;
  std::vector<int> layers;
  int64_t num_tokens = 0;

  explicit Impl(const fs::path& path) : file(path.string()) {
    open(path);
    read_meta();
    trace_format::judge_meta(file, meta);
    num_tokens = static_cast<int64_t>(integers_shape("tokens"));
    if (num_tokens < 1) throw Error("{}: tokens is empty; capture the trace again", file);
    list_layers();
  }

  void open(const fs::path& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (!fs::exists(status)) {
      throw Error("there is no trace {}; check the path", file);
    }
    if (!fs::is_regular_file(status)) {
      throw Error("{} is not a file; name an HDF5 trace", file);
    }
    const uintmax_t bytes = fs::file_size(path, error);
    file_bytes = static_cast<double>(bytes);
    trace_format::Hdf5Errors errors;
    try {
      if (!H5::H5File::isHdf5(file)) {
        throw Error("{} is not an HDF5 file; name a trace", file);
      }
      hdf5.openFile(file, H5F_ACC_RDONLY);
    } catch (const H5::Exception&) {
      if (errors.reason().find("truncated") != std::string::npos) {
        throw Error("{} is truncated: it ends after {}; copy or capture it again", file,
                    bytes_text(bytes));
      }
      throw Error("cannot open {}: {}; check that it may be read and is whole", file,
                  errors.reason());
    }
  }

  template <typename Read>
  auto attribute(const char* name, const char* kind, Read read) {
    return guarded(file + ": attribute " + name, kDamaged, [&] {
      const H5::Group root = hdf5.openGroup("/");
      if (!root.attrExists(name)) {
        throw Error("{}: attribute '{}' is missing; add it or capture the trace again", file, name);
      }
      const auto value = read(root, name);
      if (!value) throw Error("{}: attribute '{}' must be {}", file, name, kind);
      return *value;
    });
  }

  std::string string_at(const char* name) {
    return attribute(name, "one string", string_attribute);
  }

  int count_at(const char* name) {
    const int64_t value = attribute(name, "one integer", integer_attribute);
    // judge_meta tells the limits; here only the narrowing must be safe.
    return static_cast<int>(std::clamp<int64_t>(value, -1, std::numeric_limits<int>::max()));
  }

  void read_meta() {
    meta.model = string_at("model");
    meta.text = string_at("text");
    meta.license = string_at("license");
    meta.tokenizer = string_at("tokenizer");
    meta.rope_layout = string_at("rope_layout");
    meta.num_layers = count_at("num_layers");
    meta.num_query_heads = count_at("num_query_heads");
    meta.num_kv_heads = count_at("num_kv_heads");
    meta.head_dim = count_at("head_dim");
    meta.rope_theta = attribute("rope_theta", "one number", number_attribute);
    meta.rope_applied = attribute("rope_applied", "true or false", integer_attribute) != 0;
  }

  void list_layers() {
    guarded(file + ": layers", kDamaged, [&] {
      if (!has("layers")) throw Error("{}: group layers is missing; capture the trace again", file);
      if (hdf5.childObjType("layers") != H5O_TYPE_GROUP) {
        throw Error("{}: layers is not a group; capture the trace again", file);
      }
      const H5::Group group = hdf5.openGroup("layers");
      const hsize_t count = group.getNumObjs();
      for (hsize_t i = 0; i < count; ++i) {
        const std::string name = group.getObjnameByIdx(i);
        const std::optional<int> number = layer_number(name);
        if (!number || *number < 0 || *number >= meta.num_layers) {
          throw Error("{}: layers/{} is not a layer; the model has layers 0 to {}", file, name,
                      meta.num_layers - 1);
        }
        layers.push_back(*number);
      }
    });
    if (layers.empty()) throw Error("{}: it holds no layer; capture at least one", file);
    std::sort(layers.begin(), layers.end());
  }

  // Parents must exist.
  bool has(const std::string& name) const {
    return H5Lexists(hdf5.getId(), name.c_str(), H5P_DEFAULT) > 0;
  }

  H5::DataSet dataset(const std::string& name) const {
    if (!has(name)) {
      throw Error("{}: dataset {} is missing; capture the trace again", file, name);
    }
    if (hdf5.childObjType(name) != H5O_TYPE_DATASET) {
      throw Error("{}: {} is not a dataset; capture the trace again", file, name);
    }
    return hdf5.openDataSet(name);
  }

  void judge_size(const std::string& name, const H5::DataSet& dataset) const {
    const auto refuse = [&](double bytes) {
      if (bytes > kLargestRatio * file_bytes) {
        throw Error("{}: {} claims {}, more than a file of {} can hold; copy or capture it again",
                    file, name, bytes_text(static_cast<uint64_t>(std::min(bytes, 1e18))),
                    bytes_text(static_cast<uint64_t>(file_bytes)));
      }
    };
    const auto bytes_of = [&](const std::vector<hsize_t>& shape) {
      double bytes = static_cast<double>(dataset.getDataType().getSize());
      for (const hsize_t n : shape) bytes *= static_cast<double>(n);
      return bytes;
    };
    std::vector<hsize_t> shape = shape_of(dataset);
    refuse(bytes_of(shape));
    const H5::DSetCreatPropList plan = dataset.getCreatePlist();
    if (plan.getLayout() == H5D_CHUNKED) {
      plan.getChunk(static_cast<int>(shape.size()), shape.data());
      refuse(bytes_of(shape));
    }
  }

  // The length of a one-dimensional dataset of integers.
  hsize_t integers_shape(const std::string& name) const {
    return guarded(file + ": " + name, kDamaged, [&] {
      const H5::DataSet set = dataset(name);
      const std::vector<hsize_t> shape = shape_of(set);
      if (set.getTypeClass() != H5T_INTEGER) {
        throw Error("{}: {} holds {}; expected integers", file, name, type_text(set.getDataType()));
      }
      if (shape.size() != 1) {
        throw Error("{}: {} is {}; expected one dimension", file, name, shape_text(shape));
      }
      judge_size(name, set);
      return shape[0];
    });
  }

  template <typename Integer>
  std::vector<Integer> read_integers(const std::string& name, const H5::PredType& type) const {
    std::vector<Integer> values(integers_shape(name));
    guarded(file + ": " + name, kDamaged, [&] {
      const H5::DataSet set = dataset(name);
      judge_stored(name, set, shape_of(set));
      set.read(values.data(), type);
    });
    return values;
  }

  std::string where(int layer, const char* tensor) const {
    return fmt::format("{}: {}/{}", file, layer_path(layer), tensor);
  }

  // Judges shape and type of one of k, v, q; `rows` < 0 accepts any number of rows. Returns rows
  // and type.
  std::pair<int64_t, int32_t> judge_tensor(int layer, const char* tensor, int64_t rows,
                                           int64_t heads, const char* axes) const {
    return guarded(where(layer, tensor), kDamaged, [&] {
      const std::string name = layer_path(layer) + "/" + tensor;
      const H5::DataSet set = dataset(name);
      const std::optional<int32_t> dtype = element_type(set);
      if (!dtype) {
        throw Error(
            "{}: {} holds {}; expected fp16, fp32, or uint16 with attribute dtype = \"bf16\"", file,
            name, type_text(set.getDataType()));
      }
      const std::vector<hsize_t> shape = shape_of(set);
      std::vector<hsize_t> expected = {static_cast<hsize_t>(rows), static_cast<hsize_t>(heads),
                                       static_cast<hsize_t>(meta.head_dim)};
      if (rows < 0) expected[0] = shape.empty() ? 0 : shape[0];
      if (shape != expected) {
        std::string wanted = shape_text(expected);
        if (rows < 0) wanted = fmt::format("[any, {}, {}]", heads, meta.head_dim);
        throw Error("{}: {} is {}; expected {} ({})", file, name, shape_text(shape), wanted, axes);
      }
      judge_size(name, set);
      return std::pair(static_cast<int64_t>(shape[0]), *dtype);
    });
  }

  TraceLayer info(int layer) const {
    if (!std::binary_search(layers.begin(), layers.end(), layer)) {
      std::vector<std::string> held;
      for (const int l : layers) held.push_back(std::to_string(l));
      throw Error("{} has no layer {}; it holds {}", file, layer, join(held));
    }
    TraceLayer result;
    result.layer = layer;
    result.num_tokens = num_tokens;
    const auto same_type = [&](const char* tensor, int32_t dtype) {
      if (dtype == result.dtype) return;
      throw Error("{} is {}, but k is {}; store k, v and q in one type", where(layer, tensor),
                  trace_format::dtype_name(dtype), trace_format::dtype_name(result.dtype));
    };
    guarded(file + ": " + layer_path(layer), kDamaged, [&] {
      if (hdf5.childObjType(layer_path(layer)) != H5O_TYPE_GROUP) {
        throw Error("{}: {} is not a group; capture the layer again", file, layer_path(layer));
      }
    });
    const char* kv_axes = "tokens, num_kv_heads, head_dim";
    result.dtype = judge_tensor(layer, "k", num_tokens, meta.num_kv_heads, kv_axes).second;
    same_type("v", judge_tensor(layer, "v", num_tokens, meta.num_kv_heads, kv_axes).second);
    const auto [num_queries, dtype] =
        judge_tensor(layer, "q", -1, meta.num_query_heads, "queries, num_query_heads, head_dim");
    same_type("q", dtype);
    result.num_queries = num_queries;
    const std::string group_where = file + ": " + layer_path(layer);
    result.first_query_position = guarded(group_where, kDamaged, [&] {
      const H5::Group group = hdf5.openGroup(layer_path(layer));
      if (!group.attrExists("first_query_position")) {
        throw Error("{}: attribute 'first_query_position' is missing; add it", group_where);
      }
      const std::optional<int64_t> first = integer_attribute(group, "first_query_position");
      if (!first) {
        throw Error("{}: attribute 'first_query_position' must be one integer", group_where);
      }
      return *first;
    });
    trace_format::judge_query_positions(group_where, result);
    return result;
  }

  // HDF5 reads a chunk that was never written as zeros, and past the end of one that is stored too
  // short.
  void judge_stored(const std::string& name, const H5::DataSet& dataset,
                    const std::vector<hsize_t>& shape) const {
    const auto refuse = [&](std::string_view place) {
      throw Error("{}: {} holds no data{}; capture it again", file, name, place);
    };
    if (std::find(shape.begin(), shape.end(), hsize_t{0}) != shape.end()) return;
    const H5::DSetCreatPropList plan = dataset.getCreatePlist();
    if (plan.getLayout() != H5D_CHUNKED) {
      if (dataset.getStorageSize() == 0) refuse("");
      return;
    }
    std::vector<hsize_t> chunk(shape.size()), at(shape.size(), 0);
    plan.getChunk(static_cast<int>(chunk.size()), chunk.data());
    hsize_t whole = dataset.getDataType().getSize();
    for (const hsize_t n : chunk) whole *= n;
    for (bool more = true; more;) {
      unsigned skipped_filters = 0;
      haddr_t address = HADDR_UNDEF;
      hsize_t stored = 0;
      if (H5Dget_chunk_info_by_coord(dataset.getId(), at.data(), &skipped_filters, &address,
                                     &stored) < 0) {
        throw H5::DataSetIException();
      }
      if (address == HADDR_UNDEF || (skipped_filters != 0 && stored < whole)) {
        refuse(" at " + shape_text(at));
      }
      // To the next chunk, the last axis fastest.
      more = false;
      for (size_t axis = shape.size(); axis > 0 && !more; --axis) {
        at[axis - 1] += chunk[axis - 1];
        more = at[axis - 1] < shape[axis - 1];
        if (!more) at[axis - 1] = 0;
      }
    }
  }

  // Reads by slabs of whole chunks, so that Ctrl-C is heard within a long tensor.
  template <typename Element>
  std::vector<Element> read_slabs(const std::string& name, const H5::DataType& type,
                                  size_t elements_per_entry) const {
    return guarded(file + ": " + name, kDamaged, [&] {
      const H5::DataSet set = dataset(name);
      const std::vector<hsize_t> shape = shape_of(set);
      judge_stored(name, set, shape);
      hsize_t row = elements_per_entry;
      for (size_t i = 1; i < shape.size(); ++i) row *= shape[i];
      hsize_t chunk_rows = 1;
      const H5::DSetCreatPropList plan = set.getCreatePlist();
      if (plan.getLayout() == H5D_CHUNKED) {
        std::vector<hsize_t> chunk(shape.size());
        plan.getChunk(static_cast<int>(chunk.size()), chunk.data());
        chunk_rows = std::max<hsize_t>(chunk[0], 1);
      }
      const hsize_t row_bytes = std::max<hsize_t>(row * sizeof(Element), 1);
      const hsize_t step = std::max<hsize_t>(kSlabBytes / (row_bytes * chunk_rows), 1) * chunk_rows;
      std::vector<Element> values(shape[0] * row);
      H5::DataSpace on_disk = set.getSpace();
      std::vector<hsize_t> start(shape.size(), 0), count = shape;
      for (; start[0] < shape[0]; start[0] += step) {
        check_interrupt();
        count[0] = std::min(step, shape[0] - start[0]);
        on_disk.selectHyperslab(H5S_SELECT_SET, count.data(), start.data());
        const H5::DataSpace in_memory(static_cast<int>(count.size()), count.data());
        set.read(values.data() + start[0] * row, type, in_memory, on_disk);
      }
      return values;
    });
  }

  std::vector<std::byte> read_tensor(const TraceLayer& info, const char* tensor) const {
    const bool is_query = tensor[0] == 'q';
    std::vector<std::byte> elements = read_slabs<std::byte>(
        layer_path(info.layer) + "/" + tensor, trace_format::hdf5_type(info.dtype),
        static_cast<size_t>(sikv_dtype_bytes(info.dtype)));
    trace_format::judge_finite(where(info.layer, tensor), elements, info.dtype,
                               is_query ? meta.num_query_heads : meta.num_kv_heads, meta.head_dim,
                               is_query ? info.first_query_position : 0);
    return elements;
  }

  // Refuses one of another shape or type.
  bool has_w_o(int layer) const {
    const std::string name = layer_path(layer) + "/w_o";
    return guarded(where(layer, "w_o"), kDamaged, [&] {
      if (!has(name)) return false;
      const H5::DataSet set = dataset(name);
      if (set.getTypeClass() != H5T_FLOAT) {
        throw Error("{}: {} holds {}; expected floats", file, name, type_text(set.getDataType()));
      }
      const std::vector<hsize_t> shape = shape_of(set);
      const hsize_t rows = static_cast<hsize_t>(meta.num_query_heads) * meta.head_dim;
      if (shape.size() != 2 || shape[0] != rows || shape[1] < 1) {
        throw Error("{}: {} is {}; expected [{}, hidden] (num_query_heads * head_dim)", file, name,
                    shape_text(shape), rows);
      }
      judge_size(name, set);
      return true;
    });
  }

  std::vector<float> read_w_o(int layer) const {
    const std::string name = layer_path(layer) + "/w_o";
    if (!has_w_o(layer)) return {};
    std::vector<float> w_o = read_slabs<float>(name, H5::PredType::NATIVE_FLOAT, 1);
    const int64_t rows = int64_t{meta.num_query_heads} * meta.head_dim;
    trace_format::judge_finite(where(layer, "w_o"), w_o, static_cast<int64_t>(w_o.size()) / rows);
    return w_o;
  }
};

TraceReader::TraceReader(const fs::path& path) : impl_(std::make_unique<Impl>(path)) {}
TraceReader::~TraceReader() = default;
TraceReader::TraceReader(TraceReader&&) noexcept = default;
TraceReader& TraceReader::operator=(TraceReader&&) noexcept = default;

const TraceMeta& TraceReader::meta() const { return impl_->meta; }
const std::vector<int>& TraceReader::layers() const { return impl_->layers; }
int64_t TraceReader::num_tokens() const { return impl_->num_tokens; }

std::vector<int32_t> TraceReader::tokens() const {
  return impl_->read_integers<int32_t>("tokens", H5::PredType::NATIVE_INT32);
}

std::vector<int64_t> TraceReader::needles() const {
  if (!impl_->has("needles")) return {};
  std::vector<int64_t> needles =
      impl_->read_integers<int64_t>("needles", H5::PredType::NATIVE_INT64);
  trace_format::judge_needles(impl_->file, needles, impl_->num_tokens);
  return needles;
}

TraceLayer TraceReader::layer_info(int layer) const { return impl_->info(layer); }

bool TraceReader::has_w_o(int layer) const { return impl_->has_w_o(layer); }

TraceLayer TraceReader::read_layer(int layer) const {
  TraceLayer result = impl_->info(layer);
  result.k = impl_->read_tensor(result, "k");
  result.v = impl_->read_tensor(result, "v");
  result.q = impl_->read_tensor(result, "q");
  result.w_o = impl_->read_w_o(layer);
  return result;
}

std::vector<std::string> check(const TraceReader& reader) {
  const TraceReader::Impl& impl = *reader.impl_;
  std::vector<std::string> findings;
  const auto attempt = [&](auto&& f) {
    try {
      f();
      return true;
    } catch (const Error& error) {
      findings.push_back(error.what());
      return false;
    }
  };
  attempt([&] {
    const std::vector<int32_t> tokens = reader.tokens();
    const auto bad = std::find_if(tokens.begin(), tokens.end(), [](int32_t t) { return t < 0; });
    if (bad != tokens.end()) {
      throw Error("{}: token {} at position {} is negative", impl.file, *bad, bad - tokens.begin());
    }
  });
  attempt([&] { reader.needles(); });
  for (const int layer : impl.layers) {
    TraceLayer info;
    if (!attempt([&] { info = impl.info(layer); })) continue;
    const size_t row = static_cast<size_t>(impl.meta.head_dim * sikv_dtype_bytes(info.dtype));
    attempt([&] {
      const std::vector<std::byte> k = impl.read_tensor(info, "k");
      for (size_t begin = 0; begin < k.size(); begin += row) {
        const bool zero = std::all_of(k.begin() + static_cast<std::ptrdiff_t>(begin),
                                      k.begin() + static_cast<std::ptrdiff_t>(begin + row),
                                      [](std::byte b) { return b == std::byte{0}; });
        if (!zero) continue;
        const size_t heads = static_cast<size_t>(impl.meta.num_kv_heads);
        throw Error("{} is all zero at position {}, head {}; was the layer captured whole?",
                    impl.where(layer, "k"), begin / row / heads, begin / row % heads);
      }
    });
    attempt([&] { impl.read_tensor(info, "v"); });
    attempt([&] { impl.read_tensor(info, "q"); });
    attempt([&] { impl.read_w_o(layer); });
  }
  return findings;
}

}  // namespace sikv
