// What CUDA plugins say of a GPU that they were not built for, and of a launch that fails. Needs no
// GPU.
#define SIKV_PLUGIN_ARCHITECTURES "sm_90,sm_100"
#include "kernels/common/cuda_launch.h"

#include <gtest/gtest.h>

namespace sikv::cuda {
namespace {

std::string answer(sikv_device_type type, int compute_capability) {
  sikv_device device{};
  device.type = type;
  device.compute_capability = compute_capability;
  sikv_message reason{};
  const int32_t score = probe(&device, &reason);
  return score > 0 ? std::to_string(score) : reason.text;
}

TEST(CudaProbe, OfAGpuThatTheLibraryWasNotBuiltFor) {
  EXPECT_EQ(answer(SIKV_CUDA, 86),
            "it was built for sm_90,sm_100 and the GPU is sm_86; build with preset cuda-all");
  EXPECT_EQ(answer(SIKV_CPU, 0), "it runs on CUDA devices, and device is cpu");
  EXPECT_EQ(answer(SIKV_CUDA, 90), "100");
  EXPECT_EQ(answer(SIKV_CUDA, 120), "100");
}

TEST(CudaProbe, ReadsTheOldestOfTheArchitectures) {
  EXPECT_EQ(oldest_architecture("sm_100,sm_90a"), 90);
  EXPECT_EQ(oldest_architecture("sm_120"), 120);
  EXPECT_EQ(oldest_architecture(""), 0);
}

TEST(CudaLaunch, AFailureNamesKernelShapeAndStream) {
  const cudaError_t left = cudaSetDevice(-1);  // as a failed launch leaves its own
  ASSERT_NE(left, cudaSuccess);
  try {
    check_launch("scan", {3, 2, 1}, {128, 4, 1}, reinterpret_cast<cudaStream_t>(64));
    FAIL() << "expected a PluginBug";
  } catch (const PluginBug& bug) {
    EXPECT_EQ(
        std::string(bug.what()),
        std::string("kernel scan <<<3x2x1, 128x4x1>>> on stream 0x40 could not be launched: ") +
            cudaGetErrorString(left));
  }
}

}  // namespace
}  // namespace sikv::cuda
