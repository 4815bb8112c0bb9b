#include "framework/model/model_file.h"

#include <H5Cpp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string_view>

#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/base/text.h"
#include "framework/trace/trace_format.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

using trace_format::guarded;
using trace_format::shape_text;
using Shape = std::vector<hsize_t>;

constexpr std::string_view kRemedy = "export the model again";

// Counts above these are damage, not models; they keep sizes far from overflow.
constexpr int64_t kMaxCount = 1 << 16;
constexpr int64_t kMaxSize = int64_t{1} << 24;

// Deflate cannot pack more than 1032 bytes into one. A dataset that claims more is damaged, and
// allocating what it claims could end the process.
constexpr double kLargestRatio = 1100;

std::vector<std::string> architectures() { return {"llama", "qwen2", "qwen3", "mistral"}; }

std::optional<WeightType> weight_type(const H5::DataSet& dataset) {
  const size_t bytes = dataset.getDataType().getSize();
  if (dataset.getTypeClass() == H5T_FLOAT) {
    if (bytes == 4) return WeightType::kFp32;
    if (bytes == 2) return WeightType::kFp16;
  } else if (dataset.getTypeClass() == H5T_INTEGER) {
    const bool is_signed = dataset.getIntType().getSign() != H5T_SGN_NONE;
    if (bytes == 1 && is_signed) return WeightType::kInt8;
    if (bytes == 2 && !is_signed && dataset.attrExists("dtype")) return WeightType::kBf16;
  }
  return std::nullopt;
}

H5::DataType memory_type(WeightType type) {
  switch (type) {
    case WeightType::kFp32:
      return H5::PredType::IEEE_F32LE;
    case WeightType::kFp16:
      return trace_format::hdf5_type(SIKV_FP16);
    case WeightType::kBf16:
      return H5::PredType::STD_U16LE;
    case WeightType::kInt8:
      return H5::PredType::STD_I8LE;
  }
  SIKV_ASSERT(false);
}

// Column of the first element of `row` that is NaN or infinite.
std::optional<int64_t> first_not_finite(const WeightMatrix& matrix, int64_t row,
                                        std::vector<float>& scratch) {
  load_weights(matrix, row, scratch.data());
  const auto bad = std::find_if(scratch.begin(), scratch.end(),
                                [](float weight) { return !std::isfinite(weight); });
  if (bad == scratch.end()) return std::nullopt;
  return bad - scratch.begin();
}

class Reader {
 public:
  explicit Reader(const fs::path& path) : file_(path.string()) { open(path); }

  ModelFile read() {
    ModelFile model;
    read_config(model.config);
    const ModelConfig& config = model.config;
    const int64_t hidden = config.hidden_size;
    model.embedding = matrix("embedding", config.vocab_size, hidden);
    const bool tied = integer("tie_embeddings", 0, 1) == 1;
    if (tied && has("output")) {
      throw Error("{}: it holds an output matrix although tie_embeddings is 1; {}", file_, kRemedy);
    }
    if (!tied) model.output = matrix("output", config.vocab_size, hidden);
    model.norm = vector("norm", hidden);
    for (int l = 0; l < config.num_layers; ++l) {
      check_interrupt();
      model.layers.push_back(layer(config, "layers/" + std::to_string(l)));
    }
    if (has("layers/" + std::to_string(config.num_layers))) {
      throw Error("{}: it holds more layers than num_layers ({}); {}", file_, config.num_layers,
                  kRemedy);
    }
    read_vocabulary(config.vocab_size, model.vocabulary);
    return model;
  }

 private:
  void open(const fs::path& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (!fs::exists(status)) {
      throw Error(
          "there is no model file {}; check the path, or make it with "
          "datasets/capture/export_model.py",
          file_);
    }
    if (!fs::is_regular_file(status)) throw Error("{} is not a file; name a model file", file_);
    bytes_ = static_cast<double>(fs::file_size(path, error));
    trace_format::Hdf5Errors errors;
    try {
      if (!H5::H5File::isHdf5(file_)) {
        throw Error(
            "{} is not an HDF5 file; name a model file, as datasets/capture/export_model.py makes "
            "it from GGUF or safetensors",
            file_);
      }
      hdf5_.openFile(file_, H5F_ACC_RDONLY);
    } catch (const H5::Exception&) {
      if (errors.reason().find("truncated") != std::string::npos) {
        throw Error("{} is truncated: it ends after {}; copy it again, or {}", file_,
                    bytes_text(static_cast<uint64_t>(bytes_)), kRemedy);
      }
      throw Error("cannot open {}: {}; check that it may be read and is whole", file_,
                  errors.reason());
    }
  }

  // ---- attributes -------------------------------------------------------------------------------

  template <typename Read>
  auto attribute(const char* name, const char* kind, Read read) {
    return guarded(file_ + ": attribute " + name, kRemedy, [&] {
      const H5::Group root = hdf5_.openGroup("/");
      if (!root.attrExists(name)) {
        throw Error("{}: attribute '{}' is missing; {}", file_, name, kRemedy);
      }
      const H5::Attribute value = root.openAttribute(name);
      if (value.getSpace().getSimpleExtentNpoints() != 1 || !read(value)) {
        throw Error("{}: attribute '{}' must be {}", file_, name, kind);
      }
    });
  }

  std::string text(const char* name) {
    H5std_string value;
    attribute(name, "one string", [&](const H5::Attribute& stored) {
      if (stored.getTypeClass() != H5T_STRING) return false;
      stored.read(stored.getStrType(), value);
      return true;
    });
    value.resize(std::strlen(value.c_str()));  // fixed-length strings come padded with zeros
    return value;
  }

  double number(const char* name) {
    double value = 0;
    attribute(name, "one number", [&](const H5::Attribute& stored) {
      const H5T_class_t kind = stored.getTypeClass();
      if (kind != H5T_FLOAT && kind != H5T_INTEGER) return false;
      stored.read(H5::PredType::NATIVE_DOUBLE, &value);
      return true;
    });
    if (!std::isfinite(value) || value <= 0) {
      throw Error("{}: attribute '{}' is {}; it must be positive", file_, name, value);
    }
    return value;
  }

  int64_t integer(const char* name, int64_t low, int64_t high) {
    int64_t value = 0;
    attribute(name, "one integer", [&](const H5::Attribute& stored) {
      const H5T_class_t kind = stored.getTypeClass();
      if (kind != H5T_INTEGER && kind != H5T_ENUM) return false;
      stored.read(H5::PredType::NATIVE_INT64, &value);
      return true;
    });
    if (value < low || value > high) {
      throw Error("{}: attribute '{}' is {}; it must be from {} to {}", file_, name, value, low,
                  high);
    }
    return value;
  }

  void read_config(ModelConfig& config) {
    if (const std::string format = text("format"); format != "sikv-model") {
      throw Error("{}: attribute 'format' is '{}', not 'sikv-model'; name a model file", file_,
                  format);
    }
    if (const int64_t version = integer("version", 1, kMaxCount); version != 1) {
      throw Error(
          "{} has version {} of the format; this program reads version 1: export the model "
          "again, or update the program",
          file_, version);
    }
    config.architecture = text("architecture");
    const auto known = architectures();
    if (std::find(known.begin(), known.end(), config.architecture) == known.end()) {
      throw Error("{}: architecture '{}' is not supported; there are {}", file_,
                  config.architecture, join(known));
    }
    config.name = text("name");
    config.source = text("source");
    config.license = text("license");
    config.num_layers = static_cast<int>(integer("num_layers", 1, kMaxCount));
    config.num_query_heads = static_cast<int>(integer("num_query_heads", 1, kMaxCount));
    config.num_kv_heads = static_cast<int>(integer("num_kv_heads", 1, kMaxCount));
    config.head_dim = static_cast<int>(integer("head_dim", 1, kMaxCount));
    config.hidden_size = integer("hidden_size", 1, kMaxSize);
    config.intermediate_size = integer("intermediate_size", 1, kMaxSize);
    config.vocab_size = integer("vocab_size", 1, kMaxSize);
    config.max_positions = integer("max_positions", 1, int64_t{1} << 31);
    config.rope_theta = number("rope_theta");
    config.rope_scaling = text("rope_scaling");
    config.rms_norm_eps = number("rms_norm_eps");
    if (config.num_query_heads % config.num_kv_heads != 0) {
      throw Error("{}: {} query heads cannot share {} KV heads evenly; {}", file_,
                  config.num_query_heads, config.num_kv_heads, kRemedy);
    }
    constexpr int kHeadDims[] = {64, 96, 128, kLargestHeadDim};
    if (std::find(std::begin(kHeadDims), std::end(kHeadDims), config.head_dim) ==
        std::end(kHeadDims)) {
      throw Error("{}: head_dim is {}; pipelines support 64, 96, 128 and 256", file_,
                  config.head_dim);
    }
  }

  // ---- datasets ---------------------------------------------------------------------------------

  // Parents must exist.
  bool has(const std::string& name) const {
    const size_t slash = name.rfind('/');
    if (slash != std::string::npos && !has(name.substr(0, slash))) return false;
    return H5Lexists(hdf5_.getId(), name.c_str(), H5P_DEFAULT) > 0;
  }

  // Of this shape, and not larger than the file can hold.
  H5::DataSet dataset(const std::string& name, const Shape& expected) const {
    if (!has(name)) throw Error("{}: {} is missing; {}", file_, name, kRemedy);
    if (hdf5_.childObjType(name) != H5O_TYPE_DATASET) {
      throw Error("{}: {} is not a dataset; {}", file_, name, kRemedy);
    }
    const H5::DataSet set = hdf5_.openDataSet(name);
    const Shape shape = shape_of(set);
    if (shape != expected) {
      throw Error("{}: {} is {}, but the attributes say {}; {}", file_, name, shape_text(shape),
                  shape_text(expected), kRemedy);
    }
    judge_size(name, set);
    return set;
  }

  static Shape shape_of(const H5::DataSet& set) {
    const H5::DataSpace space = set.getSpace();
    Shape shape(static_cast<size_t>(std::max(space.getSimpleExtentNdims(), 0)));
    if (!shape.empty()) space.getSimpleExtentDims(shape.data());
    return shape;
  }

  void judge_size(const std::string& name, const H5::DataSet& set) const {
    double claimed = static_cast<double>(set.getDataType().getSize());
    for (const hsize_t n : shape_of(set)) claimed *= static_cast<double>(n);
    // Strings of any length are stored elsewhere; their references count here.
    if (claimed > kLargestRatio * bytes_) {
      throw Error("{}: {} claims {}, more than a file of {} can hold; {}", file_, name,
                  bytes_text(static_cast<uint64_t>(std::min(claimed, 1e18))),
                  bytes_text(static_cast<uint64_t>(bytes_)), kRemedy);
    }
    // HDF5 reads what was never written as zeros.
    if (claimed > 0 && set.getStorageSize() == 0) {
      throw Error("{}: {} holds no data; {}", file_, name, kRemedy);
    }
  }

  std::vector<float> vector(const std::string& name, int64_t size) const {
    return guarded(file_ + ": " + name, kRemedy, [&] {
      const H5::DataSet set = dataset(name, {static_cast<hsize_t>(size)});
      if (set.getTypeClass() != H5T_FLOAT) {
        throw Error("{}: {} must hold floats; {}", file_, name, kRemedy);
      }
      std::vector<float> values(static_cast<size_t>(size));
      set.read(values.data(), H5::PredType::NATIVE_FLOAT);
      for (size_t i = 0; i < values.size(); ++i) {
        if (!std::isfinite(values[i])) {
          throw Error("{}: {}[{}] is not finite; {}", file_, name, i, kRemedy);
        }
      }
      return values;
    });
  }

  std::vector<float> optional_vector(const std::string& name, int64_t size) const {
    return has(name) ? vector(name, size) : std::vector<float>();
  }

  WeightMatrix matrix(const std::string& name, int64_t rows, int64_t columns) const {
    return guarded(file_ + ": " + name, kRemedy, [&] {
      const H5::DataSet set =
          dataset(name, {static_cast<hsize_t>(rows), static_cast<hsize_t>(columns)});
      const auto type = weight_type(set);
      if (!type) {
        throw Error("{}: {} must be fp32, fp16, bf16 (uint16 with an attribute dtype) or int8; {}",
                    file_, name, kRemedy);
      }
      WeightMatrix matrix{*type, rows, columns, {}, {}};
      matrix.data.resize(static_cast<size_t>(rows * columns * weight_bytes(*type)));
      set.read(matrix.data.data(), memory_type(*type));
      if (*type == WeightType::kInt8) matrix.scale = vector(name + "_scale", rows);
      std::vector<float> scratch(static_cast<size_t>(columns));
      for (int64_t r = 0; r < rows; ++r) {
        if (const auto column = first_not_finite(matrix, r, scratch)) {
          throw Error("{}: {}[{}, {}] is not finite; {}", file_, name, r, *column, kRemedy);
        }
      }
      return matrix;
    });
  }

  ModelLayer layer(const ModelConfig& config, const std::string& at) const {
    const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size;
    const int64_t D = config.head_dim;
    const int64_t q_rows = config.num_query_heads * D, kv_rows = config.num_kv_heads * D;
    ModelLayer layer;
    layer.attention_norm = vector(at + "/attention_norm", hidden);
    layer.mlp_norm = vector(at + "/mlp_norm", hidden);
    layer.wq = matrix(at + "/wq", q_rows, hidden);
    layer.wk = matrix(at + "/wk", kv_rows, hidden);
    layer.wv = matrix(at + "/wv", kv_rows, hidden);
    layer.wo = matrix(at + "/wo", hidden, q_rows);
    layer.w_gate = matrix(at + "/w_gate", intermediate, hidden);
    layer.w_up = matrix(at + "/w_up", intermediate, hidden);
    layer.w_down = matrix(at + "/w_down", hidden, intermediate);
    layer.bq = optional_vector(at + "/bq", q_rows);
    layer.bk = optional_vector(at + "/bk", kv_rows);
    layer.bv = optional_vector(at + "/bv", kv_rows);
    layer.q_norm = optional_vector(at + "/q_norm", D);
    layer.k_norm = optional_vector(at + "/k_norm", D);
    return layer;
  }

  // ---- vocabulary -------------------------------------------------------------------------------

  // All strings of a one-dimensional dataset.
  std::vector<std::string> strings(const std::string& name) const {
    return guarded(file_ + ": " + name, kRemedy, [&] {
      if (!has(name)) throw Error("{}: {} is missing; {}", file_, name, kRemedy);
      const H5::DataSet set = hdf5_.openDataSet(name);
      const Shape shape = shape_of(set);
      if (shape.size() != 1 || set.getTypeClass() != H5T_STRING) {
        throw Error("{}: {} must be a list of strings; {}", file_, name, kRemedy);
      }
      if (shape[0] == 0) return std::vector<std::string>();
      judge_size(name, set);
      const H5::StrType type = set.getStrType();
      std::vector<std::string> texts;
      if (type.isVariableStr()) {
        std::vector<char*> pointers(shape[0]);
        set.read(pointers.data(), type);
        for (const char* text : pointers) texts.emplace_back(text == nullptr ? "" : text);
        H5Dvlen_reclaim(type.getId(), set.getSpace().getId(), H5P_DEFAULT, pointers.data());
      } else {
        const size_t width = type.getSize();
        std::vector<char> characters(shape[0] * width);
        set.read(characters.data(), type);
        for (size_t i = 0; i < shape[0]; ++i) {
          const char* const text = characters.data() + i * width;
          texts.emplace_back(text, strnlen(text, width));
        }
      }
      return texts;
    });
  }

  void read_vocabulary(int64_t vocab_size, Vocabulary& vocabulary) {
    vocabulary.pre_tokenizer = text("pre_tokenizer");
    vocabulary.bos_token = static_cast<int32_t>(integer("bos_token", -1, vocab_size - 1));
    vocabulary.eos_token = static_cast<int32_t>(integer("eos_token", -1, vocab_size - 1));
    vocabulary.add_bos = integer("add_bos", 0, 1) == 1;
    if (vocabulary.pre_tokenizer.empty() && !has("tokenizer")) return;
    vocabulary.tokens = strings("tokenizer/tokens");
    vocabulary.merges = strings("tokenizer/merges");
    if (static_cast<int64_t>(vocabulary.tokens.size()) > vocab_size) {
      throw Error("{}: tokenizer/tokens has {} entries, but vocab_size is {}; {}", file_,
                  vocabulary.tokens.size(), vocab_size, kRemedy);
    }
    if (vocabulary.add_bos && vocabulary.bos_token < 0) {
      throw Error("{}: add_bos is 1, but there is no bos_token; {}", file_, kRemedy);
    }
    const std::string name = "tokenizer/types";
    guarded(file_ + ": " + name, kRemedy, [&] {
      const H5::DataSet set = dataset(name, {vocabulary.tokens.size()});
      if (set.getTypeClass() != H5T_INTEGER) {
        throw Error("{}: {} must hold integers; {}", file_, name, kRemedy);
      }
      std::vector<int8_t> types(vocabulary.tokens.size());
      set.read(types.data(), H5::PredType::NATIVE_INT8);
      for (const int8_t type : types) vocabulary.types.push_back(static_cast<TokenType>(type));
    });
  }

  std::string file_;
  double bytes_ = 0;
  H5::H5File hdf5_;
};

}  // namespace

ModelFile read_model(const fs::path& path) { return Reader(path).read(); }

}  // namespace sikv
