// Principal axes of the keys of a model, as a file:
//
//   char[8]  "SIKVPCA1"
//   uint32   L layers, H KV heads, D channels, 0
//   uint32   number of each layer in the model [L]
//   fp32     mean [L, H, D]
//   fp32     eigenvalues [L, H, D], falling
//   fp32     axes [L, H, D, D], row i = axis i, norm 1
//
// Little-endian, and nothing behind it.
#ifndef SIKV_KERNELS_COMMON_PCA_FILE_H_
#define SIKV_KERNELS_COMMON_PCA_FILE_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "kernels/common/pca.h"
#include "plugins/abi/sikv_abi.h"
#include "plugins/sdk/error.h"

namespace sikv {

static_assert(std::endian::native == std::endian::little, "PCA files are read as they lie");

inline constexpr char kPcaMagic[8] = {'S', 'I', 'K', 'V', 'P', 'C', 'A', '1'};

struct PcaFile {
  int layers = 0, heads = 0, dim = 0;
  std::vector<float> axes;  // [L, H, D, D]

  const float* axes_of(int layer, int head) const {
    return axes.data() + (int64_t{layer} * heads + head) * dim * dim;
  }
};

// 0,5,11
template <typename Numbers>
std::string listed(const Numbers& numbers) {
  std::string text;
  for (const auto number : numbers) text += (text.empty() ? "" : ",") + std::to_string(number);
  return text;
}

// Of a model with this shape, whose `layers` are the cache's, in the same order; without any of them
// the file's are not compared.
inline PcaFile read_pca_file(const std::string& path, const sikv_shape& shape,
                             std::span<const int32_t> layers) {
  const auto refuse = [&](const std::string& what, const std::string& of = "") {
    throw Refused("the PCA file '" + path + "' " + what + "; `sikv dataset pca" + of +
                  "` writes one from a trace");
  };
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) refuse("cannot be opened");
  const int64_t size = in.tellg();
  in.seekg(0);
  char magic[sizeof kPcaMagic] = {};
  uint32_t header[4] = {};
  in.read(magic, sizeof magic).read(reinterpret_cast<char*>(header), sizeof header);
  if (!in || std::memcmp(magic, kPcaMagic, sizeof magic) != 0) {
    refuse("does not begin with SIKVPCA1");
  }
  const auto check = [&](uint32_t has, int32_t wanted, const char* what) {
    if (has == static_cast<uint32_t>(wanted)) return;
    refuse("has " + std::to_string(has) + " " + what + ", the cache has " + std::to_string(wanted));
  };
  check(header[0], shape.num_layers, "layers");
  check(header[1], shape.num_kv_heads, "KV heads");
  check(header[2], shape.head_dim, "channels per head");
  PcaFile file{shape.num_layers, shape.num_kv_heads, shape.head_dim, {}};
  const int64_t rows = int64_t{file.layers} * file.heads, d = file.dim;
  const int64_t skipped = 24 + 4 * file.layers + 4 * 2 * rows * d;
  const int64_t wanted = skipped + 4 * rows * d * d;
  if (size != wanted) {
    refuse("has " + std::to_string(size) + " bytes, not the " + std::to_string(wanted) +
           " that its header asks for");
  }
  std::vector<uint32_t> numbers(static_cast<size_t>(file.layers));
  in.read(reinterpret_cast<char*>(numbers.data()),
          static_cast<std::streamsize>(numbers.size() * sizeof(uint32_t)));
  if (!layers.empty() && !std::equal(numbers.begin(), numbers.end(), layers.begin(), layers.end(),
                                     [](uint32_t has, int32_t wanted) {
                                       return has == static_cast<uint32_t>(wanted);
                                     })) {
    const std::string wanted = listed(layers);
    refuse("is of the model's layers " + listed(numbers) + ", the cache has " + wanted,
           " --layers " + wanted);
  }
  file.axes.resize(static_cast<size_t>(rows * d * d));
  in.seekg(skipped);
  in.read(reinterpret_cast<char*>(file.axes.data()),
          static_cast<std::streamsize>(file.axes.size() * sizeof(float)));
  if (!in) refuse("cannot be read to its end");
  for (float x : file.axes) {
    if (!(std::abs(x) <= 1.001f)) refuse("has axes that are not of norm 1");
  }
  return file;
}

// The same from fits of [L, H], `layers` of which are their numbers in the model.
inline void write_pca_file(std::ostream& out, const std::vector<int>& layers, int heads,
                           const std::vector<Pca>& fits) {
  const auto write = [&](const auto* data, size_t n) {
    out.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(n * sizeof *data));
  };
  const uint32_t header[4] = {static_cast<uint32_t>(layers.size()), static_cast<uint32_t>(heads),
                              static_cast<uint32_t>(fits.front().dim), 0};
  write(kPcaMagic, sizeof kPcaMagic);
  write(header, std::size(header));
  for (int layer : layers) {
    const auto number = static_cast<uint32_t>(layer);
    write(&number, 1);
  }
  for (const auto field : {&Pca::mean, &Pca::eigenvalues, &Pca::axes}) {
    for (const Pca& fit : fits) write((fit.*field).data(), (fit.*field).size());
  }
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_PCA_FILE_H_
