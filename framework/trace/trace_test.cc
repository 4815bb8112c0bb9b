#include "framework/trace/trace.h"

#include <H5Cpp.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/random.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kTokens = 37;
constexpr int64_t kQueries = 5;

TraceMeta small_meta() {
  TraceMeta meta;
  meta.model = "tiny";
  meta.text = "made for this test, \xc3\xa9\xc3\xa8";
  meta.license = "none";
  meta.tokenizer = "none";
  meta.rope_layout = "interleaved";
  meta.num_layers = 9;
  meta.num_query_heads = 6;
  meta.num_kv_heads = 2;
  meta.head_dim = 64;
  meta.rope_theta = 123456.5;
  meta.rope_applied = true;
  return meta;
}

std::vector<int32_t> small_tokens() {
  std::vector<int32_t> tokens(kTokens);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7);
  return tokens;
}

std::vector<std::byte> random_elements(uint64_t seed, int64_t size, int32_t dtype) {
  std::vector<std::byte> elements(static_cast<size_t>(size * sikv_dtype_bytes(dtype)));
  Random random(seed);
  for (int64_t i = 0; i < size; ++i) {
    sikv_store(elements.data(), dtype, i, static_cast<float>(random.normal()));
  }
  return elements;
}

TraceLayer small_layer(int layer, int32_t dtype) {
  const TraceMeta meta = small_meta();
  TraceLayer result;
  result.layer = layer;
  result.dtype = dtype;
  result.num_tokens = kTokens;
  result.num_queries = kQueries;
  result.first_query_position = kTokens - kQueries;
  const int64_t kv = meta.num_kv_heads * meta.head_dim, q = meta.num_query_heads * meta.head_dim;
  result.k = random_elements(1, kTokens * kv, dtype);
  result.v = random_elements(2, kTokens * kv, dtype);
  result.q = random_elements(3, kQueries * q, dtype);
  result.w_o.resize(static_cast<size_t>(q * 11));
  Random(4).fill_normal(result.w_o);
  return result;
}

void expect_equal(const TraceLayer& a, const TraceLayer& b) {
  EXPECT_EQ(a.layer, b.layer);
  EXPECT_EQ(a.dtype, b.dtype);
  EXPECT_EQ(a.num_tokens, b.num_tokens);
  EXPECT_EQ(a.num_queries, b.num_queries);
  EXPECT_EQ(a.first_query_position, b.first_query_position);
  EXPECT_TRUE(a.k == b.k);
  EXPECT_TRUE(a.v == b.v);
  EXPECT_TRUE(a.q == b.q);
  EXPECT_TRUE(a.w_o == b.w_o);
}

class TraceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "sikv-trace-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    path_ = folder_ / "a.h5";
  }
  void TearDown() override { fs::remove_all(folder_); }

  // Layers 3 and 5 of the nine.
  void write_small(int32_t dtype = SIKV_FP16) const {
    TraceWriter writer(path_, small_meta(), small_tokens());
    writer.write_layer(small_layer(5, dtype));
    writer.write_layer(small_layer(3, dtype));
    writer.write_needles(std::vector<int64_t>{4, 30});
    writer.finish();
  }

  void damage(const std::function<void(H5::H5File&)>& f) const {
    write_small();
    H5::H5File file(path_.string(), H5F_ACC_RDWR);
    f(file);
  }

  static std::string sentence(const std::function<void()>& f) {
    ::testing::internal::CaptureStderr();
    std::string text = "no error";
    try {
      f();
    } catch (const Error& error) {
      text = error.what();
    }
    EXPECT_EQ(::testing::internal::GetCapturedStderr(), "") << "a library never prints";
    return text;
  }

  // The sentence, with the file's name replaced by "F".
  std::string open_error() const {
    return without_name(sentence([&] { TraceReader reader(path_); }));
  }
  std::string read_error(int layer = 3) const {
    return without_name(sentence([&] { TraceReader(path_).read_layer(layer); }));
  }
  std::string without_name(std::string text) const {
    const std::string name = path_.string();
    for (size_t at; (at = text.find(name)) != std::string::npos;)
      text = text.substr(0, at) + "F" + text.substr(at + name.size());
    return text;
  }
  std::vector<std::string> findings() const {
    std::vector<std::string> result = check(TraceReader(path_));
    for (std::string& text : result) text = without_name(text);
    return result;
  }

  static void replace_dataset(H5::H5File& file, const std::string& name, const H5::DataType& type,
                              const std::vector<hsize_t>& shape) {
    file.unlink(name);
    file.createDataSet(name, type, H5::DataSpace(static_cast<int>(shape.size()), shape.data()));
  }
  template <typename Value>
  static void replace_attribute(H5::H5Object&& object, const char* name, const H5::DataType& type,
                                Value value) {
    object.removeAttr(name);
    object.createAttribute(name, type, H5::DataSpace()).write(type, &value);
  }
  static void replace_integer(H5::H5File& file, const char* name, int64_t value) {
    replace_attribute(file.openGroup("/"), name, H5::PredType::NATIVE_INT64, value);
  }
  // Stores one element of a dataset of 16-bit words.
  static void poke(H5::H5File& file, const std::string& name, std::vector<hsize_t> at,
                   uint16_t word) {
    H5::DataSet set = file.openDataSet(name);
    const std::vector<hsize_t> one(at.size(), 1);
    H5::DataSpace space = set.getSpace();
    space.selectHyperslab(H5S_SELECT_SET, one.data(), at.data());
    set.write(&word, set.getDataType(), H5::DataSpace(static_cast<int>(one.size()), one.data()),
              space);
  }

  fs::path folder_, path_;
};

TEST_F(TraceTest, RoundTripInEveryType) {
  for (const int32_t dtype : {SIKV_FP32, SIKV_FP16, SIKV_BF16}) {
    SCOPED_TRACE(dtype);
    write_small(dtype);
    const TraceReader reader(path_);
    const TraceMeta meta = small_meta();
    EXPECT_EQ(reader.meta().model, meta.model);
    EXPECT_EQ(reader.meta().text, meta.text);
    EXPECT_EQ(reader.meta().license, meta.license);
    EXPECT_EQ(reader.meta().tokenizer, meta.tokenizer);
    EXPECT_EQ(reader.meta().rope_layout, meta.rope_layout);
    EXPECT_EQ(reader.meta().num_layers, meta.num_layers);
    EXPECT_EQ(reader.meta().num_query_heads, meta.num_query_heads);
    EXPECT_EQ(reader.meta().num_kv_heads, meta.num_kv_heads);
    EXPECT_EQ(reader.meta().head_dim, meta.head_dim);
    EXPECT_EQ(reader.meta().rope_theta, meta.rope_theta);
    EXPECT_EQ(reader.meta().rope_applied, meta.rope_applied);
    EXPECT_EQ(reader.layers(), (std::vector<int>{3, 5}));
    EXPECT_EQ(reader.num_tokens(), kTokens);
    EXPECT_EQ(reader.tokens(), small_tokens());
    EXPECT_EQ(reader.needles(), (std::vector<int64_t>{4, 30}));
    expect_equal(reader.read_layer(3), small_layer(3, dtype));
    expect_equal(reader.read_layer(5), small_layer(5, dtype));
    EXPECT_EQ(findings(), std::vector<std::string>());
  }
}

TEST_F(TraceTest, LayerInfoReadsNoTensor) {
  write_small();
  const TraceLayer info = TraceReader(path_).layer_info(3);
  EXPECT_EQ(info.num_tokens, kTokens);
  EXPECT_EQ(info.num_queries, kQueries);
  EXPECT_EQ(info.first_query_position, kTokens - kQueries);
  EXPECT_TRUE(info.k.empty());
  EXPECT_TRUE(TraceReader(path_).has_w_o(3));
}

TEST_F(TraceTest, NeedlesAndOutputProjectionAreOptional) {
  TraceWriter writer(path_, small_meta(), small_tokens());
  TraceLayer layer = small_layer(0, SIKV_FP16);
  layer.w_o.clear();
  writer.write_layer(layer);
  writer.finish();
  const TraceReader reader(path_);
  EXPECT_TRUE(reader.needles().empty());
  EXPECT_FALSE(reader.has_w_o(0));
  expect_equal(reader.read_layer(0), layer);
}

// A layer of 4 slabs of 16 MiB, so that slab borders are crossed.
TEST_F(TraceTest, LongLayer) {
  TraceMeta meta = small_meta();
  meta.num_layers = meta.num_query_heads = meta.num_kv_heads = 1;
  meta.head_dim = 256;
  TraceLayer layer;
  layer.num_tokens = 33333;
  layer.num_queries = 1;
  layer.first_query_position = layer.num_tokens - 1;
  layer.k = random_elements(1, layer.num_tokens * 256, SIKV_FP16);
  layer.v = layer.k;
  layer.q = random_elements(2, 256, SIKV_FP16);
  TraceWriter writer(path_, meta, std::vector<int32_t>(33333, 1));
  writer.write_layer(layer);
  writer.finish();
  expect_equal(TraceReader(path_).read_layer(0), layer);
}

TEST_F(TraceTest, RealTrace) {
  const fs::path real = fs::path(SIKV_SOURCE_DIR) / "datasets/smollm2-135m-4k.h5";
  const TraceReader reader(real);
  EXPECT_EQ(reader.meta().num_layers, 30);
  EXPECT_EQ(reader.meta().num_query_heads, 9);
  EXPECT_EQ(reader.meta().num_kv_heads, 3);
  EXPECT_EQ(reader.meta().head_dim, 64);
  EXPECT_EQ(reader.meta().rope_theta, 100000);
  EXPECT_EQ(reader.meta().rope_layout, "half");
  EXPECT_TRUE(reader.meta().rope_applied);
  EXPECT_EQ(reader.layers(), (std::vector<int>{0, 5, 11, 17, 23, 29}));
  EXPECT_EQ(reader.tokens().size(), 4096u);
  for (const int number : reader.layers()) {
    const TraceLayer layer = reader.read_layer(number);
    EXPECT_EQ(layer.dtype, SIKV_FP16);
    EXPECT_EQ(layer.num_tokens, 4096);
    EXPECT_EQ(layer.num_queries, 160);
    EXPECT_EQ(layer.first_query_position, 3936);
    EXPECT_EQ(layer.k.size(), 4096u * 3 * 64 * 2);
    EXPECT_EQ(layer.v.size(), layer.k.size());
    EXPECT_EQ(layer.q.size(), 160u * 9 * 64 * 2);
  }
  EXPECT_EQ(check(reader), std::vector<std::string>());
}

TEST_F(TraceTest, MissingFile) { EXPECT_EQ(open_error(), "there is no trace F; check the path"); }

TEST_F(TraceTest, Folder) {
  fs::create_directory(path_);
  EXPECT_EQ(open_error(), "F is not a file; name an HDF5 trace");
}

TEST_F(TraceTest, NotHdf5) {
  std::ofstream(path_) << "model: llama";
  EXPECT_EQ(open_error(), "F is not an HDF5 file; name a trace");
  std::ofstream(path_, std::ios::trunc).flush();
  EXPECT_EQ(open_error(), "F is not an HDF5 file; name a trace");
}

TEST_F(TraceTest, Truncated) {
  write_small();
  fs::resize_file(path_, 8192);
  EXPECT_EQ(open_error(), "F is truncated: it ends after 8.00 KiB; copy or capture it again");
  fs::resize_file(path_, 60);
  EXPECT_NE(open_error().find("F"), std::string::npos);
  EXPECT_NE(open_error(), "no error");
}

TEST_F(TraceTest, DamagedChunk) {
  write_small();
  uint64_t offset = 0;
  {
    H5::H5File file(path_.string(), H5F_ACC_RDONLY);
    const H5::DataSet set = file.openDataSet("layers/3/k");
    hsize_t start[3], bytes;
    haddr_t address;
    unsigned filters;
    ASSERT_GE(H5Dget_chunk_info(set.getId(), set.getSpace().getId(), 0, start, &filters, &address,
                                &bytes),
              0);
    offset = address;
  }
  std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(offset));
  file << "not deflated";
  file.close();
  EXPECT_EQ(read_error(),
            "F: layers/3/k: inflate() failed; the file is damaged, copy or capture it again");
  EXPECT_EQ(findings().size(), 1u);
}

// HDF5 would read zeros, or past the end of the chunk.
TEST_F(TraceTest, ChunksThatWereNeverWritten) {
  damage([](H5::H5File& file) {
    H5::DSetCreatPropList plan;
    const std::vector<hsize_t> shape = {37, 2, 64}, chunk = {10, 2, 64}, rows = {20, 2, 64};
    plan.setChunk(3, chunk.data());
    plan.setDeflate(1);
    file.unlink("layers/3/v");
    const H5::DataSpace space(3, shape.data());
    H5::DataSet set =
        file.createDataSet("layers/3/v", file.openDataSet("layers/3/k").getDataType(), space, plan);
    space.selectHyperslab(H5S_SELECT_SET, rows.data(), std::vector<hsize_t>(3, 0).data());
    const std::vector<uint16_t> ones(20 * 2 * 64, 0x3c00);
    set.write(ones.data(), set.getDataType(), H5::DataSpace(3, rows.data()), space);
  });
  EXPECT_EQ(read_error(), "F: layers/3/v holds no data at [20, 0, 0]; capture it again");
  damage([](H5::H5File& file) {
    const hsize_t origin[3] = {0, 0, 0};
    const char short_chunk[8] = {};
    constexpr uint32_t kNoFilterRan = 3;
    H5Dwrite_chunk(file.openDataSet("layers/3/v").getId(), H5P_DEFAULT, kNoFilterRan, origin,
                   sizeof short_chunk, short_chunk);
  });
  EXPECT_EQ(read_error(), "F: layers/3/v holds no data at [0, 0, 0]; capture it again");
  damage([](H5::H5File& file) {
    replace_dataset(file, "layers/3/v", file.openDataSet("layers/3/k").getDataType(), {37, 2, 64});
  });
  EXPECT_EQ(read_error(), "F: layers/3/v holds no data; capture it again");
}

TEST_F(TraceTest, EveryAttributeIsNeeded) {
  for (const char* name :
       {"model", "text", "license", "tokenizer", "rope_layout", "num_layers", "num_query_heads",
        "num_kv_heads", "head_dim", "rope_theta", "rope_applied"}) {
    damage([&](H5::H5File& file) { file.openGroup("/").removeAttr(name); });
    EXPECT_EQ(open_error(), fmt::format("F: attribute '{}' is missing; add it or capture the trace "
                                        "again",
                                        name));
  }
  damage([](H5::H5File& file) { file.openGroup("layers/3").removeAttr("first_query_position"); });
  EXPECT_EQ(read_error(), "F: layers/3: attribute 'first_query_position' is missing; add it");
  EXPECT_EQ(read_error(5), "no error");
}

TEST_F(TraceTest, EveryDatasetIsNeeded) {
  for (const char* name : {"tokens", "layers"}) {
    damage([&](H5::H5File& file) { file.unlink(name); });
    EXPECT_NE(open_error().find(fmt::format("{} is missing; capture the trace again", name)),
              std::string::npos);
  }
  for (const char* name : {"layers/3/k", "layers/3/v", "layers/3/q"}) {
    damage([&](H5::H5File& file) { file.unlink(name); });
    EXPECT_EQ(read_error(), fmt::format("F: dataset {} is missing; capture the trace again", name));
  }
}

TEST_F(TraceTest, AttributesOfTheWrongType) {
  damage([](H5::H5File& file) {
    replace_attribute(file.openGroup("/"), "model", H5::PredType::NATIVE_INT, 7);
  });
  EXPECT_EQ(open_error(), "F: attribute 'model' must be one string");
  damage([](H5::H5File& file) {
    replace_attribute(file.openGroup("/"), "head_dim", H5::PredType::NATIVE_DOUBLE, 64.0);
  });
  EXPECT_EQ(open_error(), "F: attribute 'head_dim' must be one integer");
  damage([](H5::H5File& file) {
    const hsize_t two = 2;
    H5::Group root = file.openGroup("/");
    root.removeAttr("rope_theta");
    root.createAttribute("rope_theta", H5::PredType::NATIVE_DOUBLE, H5::DataSpace(1, &two));
  });
  EXPECT_EQ(open_error(), "F: attribute 'rope_theta' must be one number");
}

TEST_F(TraceTest, FixedLengthStringsAndIntegerFlagsAreRead) {
  damage([](H5::H5File& file) {
    H5::Group root = file.openGroup("/");
    root.removeAttr("rope_layout");
    const H5::StrType type(H5::PredType::C_S1, 16);
    root.createAttribute("rope_layout", type, H5::DataSpace()).write(type, std::string("half"));
    replace_attribute(file.openGroup("/"), "rope_applied", H5::PredType::NATIVE_INT, 0);
  });
  const TraceReader reader(path_);
  EXPECT_EQ(reader.meta().rope_layout, "half");
  EXPECT_FALSE(reader.meta().rope_applied);
}

TEST_F(TraceTest, ImpossibleModels) {
  damage([](H5::H5File& file) { replace_integer(file, "num_query_heads", 7); });
  EXPECT_EQ(
      open_error(),
      "F: 7 query heads cannot share 2 KV heads evenly; num_query_heads must be a multiple of "
      "num_kv_heads");
  damage([](H5::H5File& file) { replace_integer(file, "head_dim", 80); });
  EXPECT_EQ(open_error(),
            "F: head_dim 80 is not supported; use a model with one of 64, 96, 128, 256");
  for (const int64_t value : {int64_t{0}, int64_t{-4}, std::numeric_limits<int64_t>::max()}) {
    damage([&](H5::H5File& file) { replace_integer(file, "num_kv_heads", value); });
    EXPECT_NE(open_error().find("it must be from 1 to 65536"), std::string::npos) << value;
  }
  damage([](H5::H5File& file) {
    replace_attribute(file.openGroup("/"), "rope_theta", H5::PredType::NATIVE_DOUBLE, double{NAN});
  });
  EXPECT_EQ(open_error(), "F: rope_theta is nan; it must be a positive number");
  damage([](H5::H5File& file) {
    H5::Group root = file.openGroup("/");
    root.removeAttr("rope_layout");
    const H5::StrType type(H5::PredType::C_S1, 16);
    root.createAttribute("rope_layout", type, H5::DataSpace()).write(type, std::string("haff"));
  });
  EXPECT_EQ(open_error(),
            "F: rope_layout is 'haff'; it must be half or interleaved; did you mean 'half'?");
}

TEST_F(TraceTest, WrongShapes) {
  const H5::PredType fp32 = H5::PredType::IEEE_F32LE;
  damage([&](H5::H5File& file) { replace_dataset(file, "layers/3/k", fp32, {37, 4, 64}); });
  EXPECT_EQ(read_error(),
            "F: layers/3/k is [37, 4, 64]; expected [37, 2, 64] (tokens, num_kv_heads, head_dim)");
  damage([&](H5::H5File& file) { replace_dataset(file, "layers/3/k", fp32, {36, 2, 64}); });
  EXPECT_EQ(read_error(),
            "F: layers/3/k is [36, 2, 64]; expected [37, 2, 64] (tokens, num_kv_heads, head_dim)");
  damage([&](H5::H5File& file) { replace_dataset(file, "layers/3/k", fp32, {37, 128}); });
  EXPECT_EQ(read_error(),
            "F: layers/3/k is [37, 128]; expected [37, 2, 64] (tokens, num_kv_heads, head_dim)");
  damage([&](H5::H5File& file) {
    file.unlink("layers/3/k");
    file.createDataSet("layers/3/k", fp32, H5::DataSpace());
  });
  EXPECT_EQ(read_error(),
            "F: layers/3/k is []; expected [37, 2, 64] (tokens, num_kv_heads, head_dim)");
  damage([](H5::H5File& file) {
    replace_dataset(file, "layers/3/q", file.openDataSet("layers/3/q").getDataType(), {5, 2, 64});
  });
  EXPECT_EQ(read_error(),
            "F: layers/3/q is [5, 2, 64]; expected [any, 6, 64] (queries, num_query_heads, "
            "head_dim)");
  damage([&](H5::H5File& file) { replace_dataset(file, "layers/3/w_o", fp32, {64, 64}); });
  EXPECT_EQ(read_error(),
            "F: layers/3/w_o is [64, 64]; expected [384, hidden] (num_query_heads * head_dim)");
  damage([](H5::H5File& file) {
    replace_dataset(file, "tokens", H5::PredType::STD_I32LE, {37, 1});
  });
  EXPECT_EQ(open_error(), "F: tokens is [37, 1]; expected one dimension");
  damage([](H5::H5File& file) { replace_dataset(file, "tokens", H5::PredType::STD_I32LE, {0}); });
  EXPECT_EQ(open_error(), "F: tokens is empty; capture the trace again");
}

TEST_F(TraceTest, WrongTypes) {
  damage([](H5::H5File& file) {
    replace_dataset(file, "layers/3/v", H5::PredType::IEEE_F64LE, {37, 2, 64});
  });
  EXPECT_EQ(
      read_error(),
      "F: layers/3/v holds 64-bit floats; expected fp16, fp32, or uint16 with attribute dtype = "
      "\"bf16\"");
  damage([](H5::H5File& file) {
    replace_dataset(file, "layers/3/k", H5::PredType::STD_U16LE, {37, 2, 64});
  });
  EXPECT_NE(read_error().find("layers/3/k holds 16-bit integers; expected"), std::string::npos);
  damage([](H5::H5File& file) {
    replace_dataset(file, "layers/3/v", H5::PredType::IEEE_F32LE, {37, 2, 64});
  });
  EXPECT_EQ(read_error(), "F: layers/3/v is fp32, but k is fp16; store k, v and q in one type");
  damage([](H5::H5File& file) { replace_dataset(file, "tokens", H5::PredType::IEEE_F32LE, {37}); });
  EXPECT_EQ(open_error(), "F: tokens holds 32-bit floats; expected integers");
  damage([](H5::H5File& file) {
    file.unlink("layers/3/k");
    file.createGroup("layers/3/k");
  });
  EXPECT_EQ(read_error(), "F: layers/3/k is not a dataset; capture the trace again");
  damage([](H5::H5File& file) {
    file.unlink("layers/3");
    file.createDataSet("layers/3", H5::PredType::STD_I32LE, H5::DataSpace());
  });
  EXPECT_EQ(read_error(), "F: layers/3 is not a group; capture the layer again");
  damage([](H5::H5File& file) {
    file.unlink("layers");
    file.createDataSet("layers", H5::PredType::STD_I32LE, H5::DataSpace());
  });
  EXPECT_EQ(open_error(), "F: layers is not a group; capture the trace again");
}

TEST_F(TraceTest, NotFiniteIsNamedByPlace) {
  damage([](H5::H5File& file) { poke(file, "layers/3/k", {17, 1, 5}, 0x7e00); });
  EXPECT_EQ(read_error(),
            "F: layers/3/k has NaN at position 17, head 1, channel 5; capture the layer again");
  damage([](H5::H5File& file) { poke(file, "layers/5/v", {36, 0, 63}, 0xfc00); });
  EXPECT_EQ(read_error(3), "no error");
  EXPECT_EQ(read_error(5),
            "F: layers/5/v has -inf at position 36, head 0, channel 63; capture the layer again");
  damage([](H5::H5File& file) { poke(file, "layers/3/q", {2, 4, 0}, 0x7c00); });
  EXPECT_EQ(read_error(),
            "F: layers/3/q has inf at position 34, head 4, channel 0; capture the layer again");
}

TEST_F(TraceTest, QueriesMustBeTheLast) {
  damage([](H5::H5File& file) {
    replace_attribute(file.openGroup("layers/3"), "first_query_position",
                      H5::PredType::NATIVE_INT64, int64_t{7});
  });
  EXPECT_EQ(read_error(),
            "F: layers/3: first_query_position is 7; the last 5 of 37 tokens start at 32");
}

TEST_F(TraceTest, UnknownLayers) {
  write_small();
  EXPECT_EQ(read_error(4), "F has no layer 4; it holds 3, 5");
  for (const char* name : {"layers/9", "layers/03", "layers/x", "layers/-1"}) {
    damage([&](H5::H5File& file) { file.createGroup(name); });
    EXPECT_EQ(open_error(), fmt::format("F: {} is not a layer; the model has layers 0 to 8", name));
  }
  damage([](H5::H5File& file) {
    file.unlink("layers/3");
    file.unlink("layers/5");
  });
  EXPECT_EQ(open_error(), "F: it holds no layer; capture at least one");
}

TEST_F(TraceTest, ClaimedSizesAreNotBelieved) {
  damage([](H5::H5File& file) {
    file.unlink("tokens");
    const hsize_t many = hsize_t{1} << 50, chunk = 1 << 20;
    H5::DSetCreatPropList plan;
    plan.setChunk(1, &chunk);
    file.createDataSet("tokens", H5::PredType::STD_I32LE, H5::DataSpace(1, &many), plan);
  });
  EXPECT_NE(open_error().find("F: tokens claims 4.00 PiB, more than a file of"), std::string::npos);
}

TEST_F(TraceTest, BadNeedles) {
  for (const int64_t position : {int64_t{-1}, int64_t{36}}) {
    damage([&](H5::H5File& file) {
      const int64_t needles[2] = {position, 3};
      file.openDataSet("needles").write(needles, H5::PredType::NATIVE_INT64);
    });
    EXPECT_EQ(
        without_name(sentence([&] { TraceReader(path_).needles(); })),
        fmt::format("F: needle 0 is at position {}; its query at 35 sees only 0 to 35", position));
    EXPECT_EQ(findings().size(), 1u);
  }
}

TEST_F(TraceTest, NoNeedlesAtAll) {
  damage([](H5::H5File& file) { replace_dataset(file, "needles", H5::PredType::STD_I64LE, {0}); });
  EXPECT_TRUE(TraceReader(path_).needles().empty());
  EXPECT_EQ(findings(), std::vector<std::string>());
}

TEST_F(TraceTest, CheckFindsAllOfIt) {
  damage([](H5::H5File& file) {
    poke(file, "layers/3/k", {1, 0, 0}, 0x7e00);
    poke(file, "layers/3/q", {1, 0, 0}, 0x7e00);
    file.unlink("layers/5/v");
    const std::vector<int32_t> tokens(37, -2);
    file.openDataSet("tokens").write(tokens.data(), H5::PredType::NATIVE_INT32);
  });
  EXPECT_EQ(findings(),
            (std::vector<std::string>{
                "F: token -2 at position 0 is negative",
                "F: layers/3/k has NaN at position 1, head 0, channel 0; capture the layer again",
                "F: layers/3/q has NaN at position 33, head 0, channel 0; capture the layer again",
                "F: dataset layers/5/v is missing; capture the trace again"}));
}

TEST_F(TraceTest, CheckFindsRowsOfZeros) {
  damage([](H5::H5File& file) {
    for (hsize_t c = 0; c < 64; ++c) poke(file, "layers/5/k", {8, 1, c}, 0);
  });
  EXPECT_EQ(findings(),
            (std::vector<std::string>{"F: layers/5/k is all zero at position 8, head 1; "
                                      "was the layer captured whole?"}));
}

TEST_F(TraceTest, WriterRefusesWhatReaderWould) {
  const auto refusal = [&](const std::function<void(TraceLayer&)>& change) {
    TraceLayer layer = small_layer(3, SIKV_FP16);
    change(layer);
    return without_name(sentence([&] {
      TraceWriter writer(path_, small_meta(), small_tokens());
      writer.write_layer(layer);
    }));
  };
  EXPECT_EQ(refusal([](TraceLayer& l) { l.k.pop_back(); }),
            "F: layers/3/k has 9471 bytes; [37, 2, 64] in fp16 has 9472");
  EXPECT_EQ(refusal([](TraceLayer& l) { sikv_store(l.v.data(), l.dtype, 130, INFINITY); }),
            "F: layers/3/v has inf at position 1, head 0, channel 2; capture the layer again");
  EXPECT_EQ(refusal([](TraceLayer& l) { l.w_o[12] = NAN; }),
            "F: layers/3/w_o has NaN at row 1, column 1; capture the layer again");
  EXPECT_EQ(refusal([](TraceLayer& l) { l.w_o.pop_back(); }),
            "F: layers/3/w_o has 4223 elements; they must fill [384, hidden]");
  EXPECT_EQ(refusal([](TraceLayer& l) { l.layer = 9; }),
            "F: there is no layer 9; the model has layers 0 to 8");
  EXPECT_EQ(refusal([](TraceLayer& l) { l.dtype = SIKV_FP8_E4M3; }),
            "F: element type 3 cannot be stored; use fp16, bf16 or fp32");
  EXPECT_EQ(refusal([](TraceLayer& l) { l.first_query_position = 0; }),
            "F: layers/3: first_query_position is 0; the last 5 of 37 tokens start at 32");
  EXPECT_EQ(refusal([](TraceLayer& l) { l.num_tokens = 36; }),
            "F: layers/3 has 36 tokens; the trace has 37");
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST_F(TraceTest, WriterWritesEachLayerOnce) {
  TraceWriter writer(path_, small_meta(), small_tokens());
  writer.write_layer(small_layer(3, SIKV_FP16));
  EXPECT_EQ(without_name(sentence([&] { writer.write_layer(small_layer(3, SIKV_FP16)); })),
            "F: layer 3 is written already; write each layer once");
}

TEST_F(TraceTest, WriterLeavesNothingWithoutFinish) {
  {
    TraceWriter writer(path_, small_meta(), small_tokens());
    writer.write_layer(small_layer(3, SIKV_FP16));
    EXPECT_FALSE(fs::exists(path_));
  }
  EXPECT_TRUE(fs::is_empty(folder_));
  EXPECT_EQ(
      without_name(sentence([&] { TraceWriter(path_, small_meta(), small_tokens()).finish(); })),
      "F: it holds no layer; write at least one");
  EXPECT_TRUE(fs::is_empty(folder_));
}

// In a process of its own, to see it end well: HDF5 crashes at exit if it could not write.
TEST_F(TraceTest, WriterOnAFullDisk) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto fill_the_disk = [&] {
    std::signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit;
    ::getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = 1500000;
    ::setrlimit(RLIMIT_FSIZE, &limit);
    TraceMeta meta = small_meta();
    meta.num_kv_heads = 6;
    TraceLayer layer = small_layer(0, SIKV_FP32);
    layer.num_tokens = 2000;
    layer.first_query_position = layer.num_tokens - layer.num_queries;
    layer.k = layer.v = random_elements(1, layer.num_tokens * 6 * 64, SIKV_FP32);
    const std::string text = without_name(sentence([&] {
      TraceWriter writer(path_, meta, std::vector<int32_t>(2000, 1));
      writer.write_layer(layer);
    }));
    const bool nothing_left = fs::is_empty(folder_);
    fs::remove_all(folder_);
    std::fputs(text.c_str(), stderr);
    std::exit(nothing_left ? 0 : 1);
  };
  EXPECT_EXIT(fill_the_disk(), ::testing::ExitedWithCode(0),
              "^cannot write F: .*; free some space or choose another folder$");
}

TEST_F(TraceTest, WriterInAMissingFolder) {
  EXPECT_NE(sentence([&] {
              TraceWriter(folder_ / "none" / "a.h5", small_meta(), small_tokens());
            }).find("create it first"),
            std::string::npos);
}

}  // namespace
}  // namespace sikv
