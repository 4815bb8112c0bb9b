// What a host is told that cannot use its GPU, or whose GPU fails. Needs no GPU.
#include <gtest/gtest.h>

#include "framework/base/error.h"
#include "framework/device/cuda_error.h"
#include "framework/device/cuda_refusal.h"

namespace sikv {
namespace {

TEST(CudaRefusal, OfADriver) {
  EXPECT_EQ(driver_refusal(11040, 13000),
            "the NVIDIA driver serves CUDA 11.4 and this sikv was built with 13.0; update the "
            "driver, or use device cpu");
  EXPECT_EQ(driver_refusal(0, 13000),
            "no NVIDIA driver is installed here; install one, or use device cpu");
}

TEST(CudaRefusal, OfAnOrdinal) {
  EXPECT_EQ(ordinal_refusal(1, 2), "");
  EXPECT_EQ(ordinal_refusal(2, 2), "there is no GPU 2: this host has 2, numbered from 0");
  EXPECT_EQ(ordinal_refusal(-1, 2), "there is no GPU -1: this host has 2, numbered from 0");
}

TEST(CudaRefusal, OfAnOldGpu) {
  EXPECT_EQ(architecture_refusal(0, 80, 80), "");
  EXPECT_EQ(architecture_refusal(0, 120, 90), "");
  EXPECT_EQ(architecture_refusal(3, 75, 80),
            "GPU 3 is sm_75 and this sikv was built for sm_80 and newer; build it with "
            "-DCMAKE_CUDA_ARCHITECTURES=75, or use device cpu");
}

TEST(CudaError, OfALaunchNamesKernelShapeAndStream) {
  const cudaError_t left = cudaSetDevice(-1);  // as a failed launch leaves its own
  ASSERT_NE(left, cudaSuccess);
  try {
    check_cuda_launch("fill_tails", {3, 2, 1}, {128, 4, 1}, reinterpret_cast<cudaStream_t>(0x40));
    FAIL() << "expected an InternalError";
  } catch (const InternalError& error) {
    EXPECT_EQ(std::string(error.what()),
              std::string("kernel fill_tails <<<3x2x1, 128x4x1>>> on stream 0x40 could not be "
                          "launched: ") +
                  cudaGetErrorString(left));
  }
}

}  // namespace
}  // namespace sikv
