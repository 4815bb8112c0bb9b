// libFuzzer target: whatever a file holds, opening, reading and checking it as a trace ends in a
// result or in sikv::Error.
//
// The bytes are a script of edits to a sound trace: objects removed, replaced by others of any type
// and shape, linked in circles; attributes likewise; elements and compressed chunks overwritten;
// the end cut off. Mutating the file itself would test the parser of HDF5 instead, which on damaged
// metadata loops and leaks (1.10), and would seldom get past it.
#include <fuzzer/FuzzedDataProvider.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "framework/base/error.h"
#include "framework/trace/synth.h"
#include "framework/trace/trace.h"

namespace {

namespace fs = std::filesystem;

constexpr std::array kObjects = {
    "/",          "tokens",       "needles",  "layers",     "layers/0", "layers/0/k", "layers/0/v",
    "layers/0/q", "layers/0/w_o", "layers/1", "layers/1/k", "layers/2", "layers/x"};
constexpr std::array kAttributes = {"model",
                                    "text",
                                    "license",
                                    "tokenizer",
                                    "rope_layout",
                                    "num_layers",
                                    "num_query_heads",
                                    "num_kv_heads",
                                    "head_dim",
                                    "rope_theta",
                                    "rope_applied",
                                    "dtype",
                                    "first_query_position"};

// Three sound traces, one for each element type, and the file that is edited.
struct Files {
  fs::path folder;
  std::array<fs::path, 3> sound;
  fs::path edited;

  Files() {
    std::string pattern = (fs::temp_directory_path() / "sikv-trace-fuzz-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) std::abort();
    folder = pattern;
    edited = folder / "edited.h5";
    for (const int32_t dtype : {SIKV_FP32, SIKV_FP16, SIKV_BF16}) {
      sikv::SynthSpec spec;
      spec.kind = sikv::SynthKind::kNeedle;
      spec.context = 64;
      spec.steps = 2;
      spec.num_layers = 2;
      spec.num_query_heads = 2;
      spec.num_kv_heads = 1;
      spec.head_dim = 64;
      spec.dtype = dtype;
      sikv::Synthesizer synthesizer(spec);
      fs::path& path = sound.at(static_cast<size_t>(dtype));
      path = folder / (std::to_string(dtype) + ".h5");
      sikv::write_trace(path, synthesizer, 0);
    }
  }
  ~Files() { fs::remove_all(folder); }
};

// The caller closes it.
hid_t any_type(FuzzedDataProvider& script) {
  switch (script.ConsumeIntegralInRange(0, 9)) {
    case 0:
      return H5Tcopy(H5T_NATIVE_INT8);
    case 1:
      return H5Tcopy(H5T_STD_I64BE);
    case 2:
      return H5Tcopy(H5T_NATIVE_UINT16);
    case 3:
      return H5Tcopy(H5T_NATIVE_INT32);
    case 4:
      return H5Tcopy(H5T_NATIVE_FLOAT);
    case 5:
      return H5Tcopy(H5T_IEEE_F64BE);
    case 6: {
      const hid_t half = H5Tcopy(H5T_IEEE_F32LE);
      H5Tset_fields(half, 15, 10, 5, 0, 10);
      H5Tset_size(half, 2);
      H5Tset_ebias(half, 15);
      return half;
    }
    case 7: {
      const hid_t text = H5Tcopy(H5T_C_S1);
      H5Tset_size(text, script.ConsumeIntegralInRange<size_t>(1, 16));
      return text;
    }
    case 8: {
      const hid_t text = H5Tcopy(H5T_C_S1);
      H5Tset_size(text, H5T_VARIABLE);
      return text;
    }
    default:
      return H5Tcreate(H5T_COMPOUND, 8);
  }
}

hid_t any_space(FuzzedDataProvider& script, std::vector<hsize_t>& shape) {
  const int rank = script.ConsumeIntegralInRange(-1, 4);
  if (rank <= 0) return H5Screate(rank < 0 ? H5S_NULL : H5S_SCALAR);
  for (int i = 0; i < rank; ++i) {
    const hsize_t likely = script.PickValueInArray<hsize_t>({0, 1, 2, 64, 66, 128});
    shape.push_back(script.ConsumeBool() ? likely
                                         : hsize_t{1} << script.ConsumeIntegralInRange(0, 62));
  }
  return H5Screate_simple(rank, shape.data(), nullptr);
}

void replace_dataset(FuzzedDataProvider& script, hid_t file, const char* name) {
  const hid_t type = any_type(script);
  std::vector<hsize_t> shape;
  const hid_t space = any_space(script, shape);
  const hid_t plan = H5Pcreate(H5P_DATASET_CREATE);
  if (!shape.empty() && script.ConsumeBool()) {
    for (hsize_t& n : shape) n = script.ConsumeBool() ? n : 1;
    H5Pset_chunk(plan, static_cast<int>(shape.size()), shape.data());
    if (script.ConsumeBool()) H5Pset_shuffle(plan);
    if (script.ConsumeBool()) H5Pset_deflate(plan, 1);
  }
  H5Ldelete(file, name, H5P_DEFAULT);
  const hid_t set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, plan, H5P_DEFAULT);
  H5Dclose(set);
  H5Pclose(plan);
  H5Sclose(space);
  H5Tclose(type);
}

void replace_attribute(FuzzedDataProvider& script, hid_t file, const char* name) {
  const hid_t object = H5Oopen(file, name, H5P_DEFAULT);
  const char* attribute = script.PickValueInArray(kAttributes);
  H5Adelete(object, attribute);
  if (script.ConsumeBool()) {
    const hid_t type = any_type(script);
    std::vector<hsize_t> shape;
    const hid_t space = any_space(script, shape);
    const hid_t made = H5Acreate2(object, attribute, type, space, H5P_DEFAULT, H5P_DEFAULT);
    if (H5Sget_simple_extent_npoints(space) == 1) {
      std::string value = script.ConsumeBool() ? std::string(1, script.ConsumeIntegral<char>())
                                               : script.ConsumeRandomLengthString(16);
      if (H5Tis_variable_str(type) > 0) {
        const char* text = value.c_str();
        H5Awrite(made, type, &text);
      } else {
        value.resize(std::max<size_t>(H5Tget_size(type), 16));
        H5Awrite(made, type, value.data());
      }
    }
    H5Aclose(made);
    H5Sclose(space);
    H5Tclose(type);
  }
  H5Oclose(object);
}

// A few elements from the start, in the dataset's own type, so NaN and infinity come up.
void overwrite_elements(FuzzedDataProvider& script, hid_t file, const char* name) {
  const hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
  const hid_t type = H5Dget_type(set), space = H5Dget_space(set);
  const hssize_t points = H5Sget_simple_extent_npoints(space);
  const size_t bytes = H5Tget_size(type);
  if (set >= 0 && points > 0 && points < 100000 && H5Tis_variable_str(type) == 0) {
    std::vector<uint8_t> elements(static_cast<size_t>(points) * bytes);
    H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, elements.data());
    const std::vector<uint8_t> change =
        script.ConsumeBytes<uint8_t>(script.ConsumeIntegralInRange<size_t>(0, 32));
    const size_t most = elements.size() - std::min(elements.size(), change.size());
    const size_t at = script.ConsumeIntegralInRange<size_t>(0, most);
    for (size_t i = 0; i < change.size() && at + i < elements.size(); ++i) {
      elements[at + i] = change[i];
    }
    H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, elements.data());
  }
  H5Sclose(space);
  H5Tclose(type);
  H5Dclose(set);
}

// The stored form of a chunk: what follows is inflated and unshuffled.
void overwrite_chunk(FuzzedDataProvider& script, hid_t file, const char* name) {
  const hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
  const std::array<hsize_t, 4> origin = {};
  const std::vector<uint8_t> stored =
      script.ConsumeBytes<uint8_t>(script.ConsumeIntegralInRange<size_t>(1, 64));
  hsize_t chunks = 0;
  // Only where one is stored: HDF5 1.10 crashes on making the first of some datasets.
  if (!stored.empty() && H5Dget_num_chunks(set, H5S_ALL, &chunks) >= 0 && chunks > 0) {
    H5Dwrite_chunk(set, H5P_DEFAULT, script.ConsumeIntegralInRange<uint32_t>(0, 3), origin.data(),
                   stored.size(), stored.data());
  }
  H5Dclose(set);
}

void link_elsewhere(FuzzedDataProvider& script, hid_t file, const char* name) {
  const char* other = script.PickValueInArray(kObjects);
  H5Ldelete(file, name, H5P_DEFAULT);
  if (script.ConsumeBool()) {
    H5Lcreate_hard(file, other, file, name, H5P_DEFAULT, H5P_DEFAULT);
  } else {
    H5Lcreate_soft(other, file, name, H5P_DEFAULT, H5P_DEFAULT);
  }
}

void edit(FuzzedDataProvider& script, const fs::path& path) {
  const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
  if (file < 0) std::abort();
  for (int i = script.ConsumeIntegralInRange(0, 6); i > 0; --i) {
    const char* name = script.PickValueInArray(kObjects);
    switch (script.ConsumeIntegralInRange(0, 6)) {
      case 0:
        H5Ldelete(file, name, H5P_DEFAULT);
        break;
      case 1:
        H5Gclose(H5Gcreate2(file, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
        break;
      case 2:
        replace_dataset(script, file, name);
        break;
      case 3:
        replace_attribute(script, file, name);
        break;
      case 4:
        overwrite_elements(script, file, name);
        break;
      case 5:
        overwrite_chunk(script, file, name);
        i = 1;  // the last edit: overwrite_elements would read the chunk unguarded
        break;
      default:
        link_elsewhere(script, file, name);
    }
  }
  H5Fclose(file);
  if (script.ConsumeBool()) {
    fs::resize_file(path, script.ConsumeIntegralInRange<uintmax_t>(0, fs::file_size(path)));
  }
}

}  // namespace

// HDF5 1.10 leaks on files that it refuses.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Files files;
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  FuzzedDataProvider script(data, size);
  fs::copy_file(files.sound.at(script.ConsumeIntegralInRange<size_t>(0, 2)), files.edited,
                fs::copy_options::overwrite_existing);
  edit(script, files.edited);
  try {
    const sikv::TraceReader reader(files.edited);
    for (const int layer : reader.layers()) {
      try {
        reader.read_layer(layer);
      } catch (const sikv::Error&) {
      }
    }
    sikv::check(reader);
  } catch (const sikv::Error&) {
  }
  return 0;
}
