#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>

#include "selectors/saap/saap.h"

namespace sikv::saap {

static_assert(std::endian::native == std::endian::little, "networks are read as they lie");

Network read_network(const std::string& path, const sikv_shape& shape, Rope rope) {
  constexpr char kMagic[8] = {'S', 'I', 'K', 'V', 'S', 'A', 'P', '1'};
  const auto refuse = [&](const std::string& what) {
    throw Refused("the network file '" + path + "' " + what +
                  "; datasets/capture/train_saap.py writes one from a trace");
  };
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) refuse("cannot be opened");
  const int64_t size = in.tellg();
  in.seekg(0);
  char magic[sizeof kMagic] = {};
  uint32_t header[8] = {};
  in.read(magic, sizeof magic).read(reinterpret_cast<char*>(header), sizeof header);
  if (!in || std::memcmp(magic, kMagic, sizeof magic) != 0) refuse("does not begin with SIKVSAP1");
  const auto check = [&](uint32_t has, int32_t wanted, const char* what) {
    if (has == static_cast<uint32_t>(wanted)) return;
    refuse("has " + std::to_string(has) + " " + what + ", the cache has " + std::to_string(wanted));
  };
  check(header[0], shape.num_layers, "layers");
  check(header[1], shape.num_kv_heads, "KV heads");
  check(header[2], shape.num_query_heads, "query heads");
  check(header[3], shape.head_dim, "channels per head");
  const uint32_t clusters = header[4], hidden = header[5];
  if (clusters < 1 || clusters > 65536) {
    refuse("has " + std::to_string(clusters) + " centroids, not 1 to 65536");
  }
  if (hidden < 1 || hidden > 65536) {
    refuse("has " + std::to_string(hidden) + " hidden units, not 1 to 65536");
  }
  if (header[6] != static_cast<uint32_t>(rope)) {
    refuse("was trained with another option `rope`");
  }
  Network network{shape.num_kv_heads,         shape.num_query_heads,    shape.head_dim,
                  static_cast<int>(clusters), static_cast<int>(hidden), {}};
  const int64_t floats = shape.num_layers * network.layer_floats();
  const int64_t wanted = int64_t{sizeof magic} + int64_t{sizeof header} + 4 * floats;
  if (size != wanted) {
    refuse("has " + std::to_string(size) + " bytes, not the " + std::to_string(wanted) +
           " that its header asks for");
  }
  network.data.resize(static_cast<size_t>(floats));
  in.read(reinterpret_cast<char*>(network.data.data()), static_cast<std::streamsize>(4 * floats));
  if (!in) refuse("cannot be read to its end");
  for (const float x : network.data) {
    if (!std::isfinite(x)) refuse("has numbers that are not finite");
  }
  return network;
}

}  // namespace sikv::saap
