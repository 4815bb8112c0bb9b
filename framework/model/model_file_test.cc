#include "framework/model/model_file.h"

#include <H5Cpp.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>

#include "framework/base/error.h"
#include "tests/support/temporary.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

fs::path tiny(const std::string& name) {
  return fs::path(SIKV_SOURCE_DIR) / "datasets/tiny" / (name + ".h5");
}

// The sentence that reading `path` ends with; "" if it does not.
std::string refusal(const fs::path& path) {
  try {
    read_model(path);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

class BadModel : public testing::Test {
 protected:
  // What is said of a copy of a tiny model after `change`.
  std::string after(const std::function<void(H5::H5File&)>& change,
                    const std::string& model = "llama") {
    fs::copy_file(tiny(model), path_, fs::copy_options::overwrite_existing);
    {
      H5::H5File file(path_.string(), H5F_ACC_RDWR);
      change(file);
    }
    return refusal(path_);
  }

  // With an attribute of another value.
  std::string with(const char* name, int64_t value) {
    return after([&](H5::H5File& file) {
      const H5::Group root = file.openGroup("/");
      root.openAttribute(name).write(H5::PredType::NATIVE_INT64, &value);
    });
  }
  std::string with(const char* name, const std::string& value) {
    return after([&](H5::H5File& file) {
      H5::Group root = file.openGroup("/");
      root.removeAttr(name);
      const H5::StrType type(H5::PredType::C_S1, value.size() + 1);
      root.createAttribute(name, type, H5::DataSpace(H5S_SCALAR)).write(type, value);
    });
  }
  std::string without(const char* dataset) {
    return after([&](H5::H5File& file) { file.unlink(dataset); });
  }

  TemporaryFolder folder_;
  fs::path path_ = folder_ / "model.h5";
};

#define EXPECT_SAYS(text, part) \
  EXPECT_NE((text).find(part), std::string::npos) << "\"" << (text) << "\" lacks \"" << part << '"'

TEST(ModelFile, ReadsEveryArchitectureAndType) {
  const ModelFile llama = read_model(tiny("llama"));
  EXPECT_EQ(llama.config.architecture, "llama");
  EXPECT_EQ(llama.config.num_layers, 2);
  EXPECT_EQ(llama.config.head_dim, 64);
  EXPECT_EQ(llama.config.hidden_size, 128);
  EXPECT_EQ(llama.embedding.type, WeightType::kFp16);
  EXPECT_EQ(&llama.unembedding(), &llama.embedding);
  EXPECT_EQ(llama.layers.size(), 2u);
  EXPECT_TRUE(llama.layers[0].bq.empty());
  EXPECT_EQ(llama.vocabulary.pre_tokenizer, "smollm");
  EXPECT_EQ(llama.vocabulary.tokens.size(), 300u);
  EXPECT_EQ(llama.vocabulary.merges.size(), 36u);
  EXPECT_EQ(llama.vocabulary.types[0], TokenType::kControl);

  const ModelFile llama3 = read_model(tiny("llama3"));
  EXPECT_EQ(llama3.layers[1].w_down.type, WeightType::kInt8);
  EXPECT_EQ(llama3.layers[1].w_down.scale.size(), 128u);
  EXPECT_TRUE(llama3.vocabulary.add_bos);
  EXPECT_EQ(llama3.vocabulary.bos_token, 0);

  const ModelFile qwen2 = read_model(tiny("qwen2"));
  EXPECT_EQ(qwen2.embedding.type, WeightType::kBf16);
  EXPECT_EQ(&qwen2.unembedding(), &qwen2.output);
  EXPECT_EQ(qwen2.layers[0].bq.size(), 256u);

  const ModelFile qwen3 = read_model(tiny("qwen3"));
  EXPECT_EQ(qwen3.layers[0].wq.type, WeightType::kFp32);
  EXPECT_EQ(qwen3.layers[0].q_norm.size(), 64u);
  EXPECT_EQ(qwen3.config.rope_theta, 1e6);
}

TEST_F(BadModel, WithoutVocabularyItIsFedWithTokens) {
  fs::copy_file(tiny("llama"), path_, fs::copy_options::overwrite_existing);
  {
    H5::H5File file(path_.string(), H5F_ACC_RDWR);
    file.unlink("tokenizer");
    H5::Group root = file.openGroup("/");
    root.removeAttr("pre_tokenizer");
    const H5::StrType type(H5::PredType::C_S1, 1);
    root.createAttribute("pre_tokenizer", type, H5::DataSpace(H5S_SCALAR))
        .write(type, std::string());
  }
  EXPECT_TRUE(read_model(path_).vocabulary.tokens.empty());
}

TEST_F(BadModel, IsNamedWithTheReason) {
  EXPECT_SAYS(refusal("/no/such/model.h5"), "there is no model file /no/such/model.h5");
  EXPECT_SAYS(refusal(fs::path(SIKV_SOURCE_DIR)), "is not a file");
  EXPECT_SAYS(refusal(fs::path(SIKV_SOURCE_DIR) / "LICENSE"), "is not an HDF5 file");
  EXPECT_SAYS(refusal(fs::path(SIKV_SOURCE_DIR) / "datasets/smollm2-135m-4k.h5"), "'format'");
  EXPECT_SAYS(with("format", "sikv-cache"), "'format' is 'sikv-cache'");
  EXPECT_SAYS(with("version", 2), "version 2");
  EXPECT_SAYS(with("architecture", "mamba"), "architecture 'mamba' is not supported");
}

TEST_F(BadModel, TruncatedAnywhereIsRefused) {
  for (const double share : {0.0, 0.01, 0.3, 0.9, 0.999}) {
    fs::copy_file(tiny("llama"), path_, fs::copy_options::overwrite_existing);
    fs::resize_file(path_, static_cast<uintmax_t>(share * double(fs::file_size(path_))));
    const std::string said = refusal(path_);
    EXPECT_SAYS(said, path_.string());
    EXPECT_EQ(said.find('\n'), std::string::npos) << said;
  }
}

TEST_F(BadModel, SizesMustAgree) {
  EXPECT_SAYS(with("head_dim", 80), "head_dim is 80; pipelines support 64, 96, 128 and 256");
  EXPECT_SAYS(with("head_dim", 96), "layers/0/wq is [128, 128]");
  EXPECT_SAYS(with("num_kv_heads", 3), "2 query heads cannot share 3 KV heads");
  EXPECT_SAYS(with("num_layers", 0), "'num_layers' is 0");
  EXPECT_SAYS(with("num_layers", 3), "layers/2");
  EXPECT_SAYS(with("num_layers", 1), "more layers than num_layers (1)");
  EXPECT_SAYS(with("hidden_size", 64), "embedding is [300, 128], but the attributes say [300, 64]");
  EXPECT_SAYS(with("hidden_size", int64_t{1} << 40), "'hidden_size'");
  EXPECT_SAYS(with("vocab_size", 200), "embedding");
  EXPECT_SAYS(with("tie_embeddings", 0), "output is missing");
  EXPECT_SAYS(with("eos_token", 300), "'eos_token' is 300");
}

TEST_F(BadModel, MissingPartsAreNamed) {
  EXPECT_SAYS(without("norm"), "norm is missing");
  EXPECT_SAYS(without("layers/1/w_up"), "layers/1/w_up is missing");
  EXPECT_SAYS(without("tokenizer/tokens"), "tokenizer/tokens is missing");
  EXPECT_SAYS(without("tokenizer"), "tokenizer/tokens is missing");
  EXPECT_SAYS(after([](H5::H5File& file) { file.openGroup("/").removeAttr("rope_theta"); }),
              "'rope_theta' is missing");
  EXPECT_SAYS(after([](H5::H5File& file) { file.unlink("embedding_scale"); }, "llama3"),
              "embedding_scale is missing");
  EXPECT_SAYS(
      after([](H5::H5File& file) { file.openDataSet("output").removeAttr("dtype"); }, "qwen2"),
      "output must be fp32, fp16, bf16");
}

TEST_F(BadModel, WeightsMustBeFinite) {
  const auto poison = [](const char* name, hsize_t row, hsize_t column) {
    return [=](H5::H5File& file) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      const H5::DataSet set = file.openDataSet(name);
      H5::DataSpace where = set.getSpace();
      const hsize_t at[] = {row, column}, one[] = {1, 1};
      where.selectHyperslab(H5S_SELECT_SET, one, at);
      set.write(&nan, H5::PredType::NATIVE_FLOAT, H5::DataSpace(H5S_SCALAR), where);
    };
  };
  EXPECT_SAYS(after(poison("layers/1/wo", 3, 77), "qwen3"), "layers/1/wo[3, 77] is not finite");
  EXPECT_SAYS(after(poison("norm", 5, 0), "qwen3"), "norm[5] is not finite");
}

TEST_F(BadModel, HollowDatasetsAreRefused) {
  const auto hollow = [](H5::H5File& file) {
    file.unlink("layers/0/wk");
    const hsize_t shape[] = {64, 128};
    file.createDataSet("layers/0/wk", H5::PredType::IEEE_F32LE, H5::DataSpace(2, shape));
  };
  EXPECT_SAYS(after(hollow), "layers/0/wk holds no data");
}

}  // namespace
}  // namespace sikv
