#include "framework/device/cuda_device.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/device/cuda_error.h"
#include "framework/device/cuda_refusal.h"

namespace sikv {
namespace {

// The context and what the driver keeps beside it; never ours to give away.
constexpr uint64_t kDriverReserve = uint64_t{256} << 20;

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, int threads) : ordinal_(ordinal), cpu_(open_cpu_device(threads)) {
    check_cuda(cudaSetDevice(ordinal), "cudaSetDevice");
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    cudaDeviceProp properties{};
    check_cuda(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
    info_.struct_size = sizeof info_;
    info_.type = SIKV_CUDA;
    info_.ordinal = ordinal;
    info_.num_threads = cpu_->info().num_threads;
    info_.compute_capability = properties.major * 10 + properties.minor;
    info_.multiprocessors = properties.multiProcessorCount;
    info_.memory_bytes = properties.totalGlobalMem;
    std::snprintf(info_.name, sizeof info_.name, "%.127s", properties.name);
    host_ = cpu_->host();
  }
  ~CudaDevice() override {
    cudaStreamSynchronize(stream_);
    for (cudaEvent_t mark : marks_) cudaEventDestroy(mark);
    cudaStreamDestroy(stream_);
  }

  void* allocate(size_t bytes) override {
    void* data = nullptr;
    const cudaError_t status = cudaMalloc(&data, bytes);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // not sticky: forget it
      throw Error(
          "cannot allocate {} on {}: {} of {} are free; lower the batch, the context or the "
          "number of layers",
          bytes_text(bytes), info_.name, bytes_text(raw_free_bytes()),
          bytes_text(info_.memory_bytes));
    }
    check_cuda(status, "cudaMalloc");
    check_cuda(cudaMemsetAsync(data, 0, bytes, stream_), "cudaMemset");
    return data;
  }
  void release(void* data, size_t) noexcept override { cudaFree(data); }

  void copy_in(void* to, const void* from, size_t bytes) override {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "copy to the GPU");
  }
  void copy_out(void* to, const void* from, size_t bytes) override {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "copy from the GPU");
    synchronize();
  }
  void* stream() override { return stream_; }
  void synchronize() override { check_cuda(cudaDeviceSynchronize(), "work on the GPU"); }

  uint64_t free_bytes() const override {
    const uint64_t free = raw_free_bytes();
    return free > kDriverReserve ? free - kDriverReserve : 0;
  }
  bool holds(const void* data) const override {
    cudaPointerAttributes attributes{};
    check_cuda(cudaPointerGetAttributes(&attributes, data), "cudaPointerGetAttributes");
    return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  }

  void mark(int i) override {
    while (marks_.size() <= static_cast<size_t>(i)) {
      check_cuda(cudaEventCreate(&marks_.emplace_back()), "cudaEventCreate");
    }
    check_cuda(cudaEventRecord(marks_.at(static_cast<size_t>(i)), stream_), "cudaEventRecord");
  }
  double seconds(int from, int to) override {
    const cudaEvent_t end = marks_.at(static_cast<size_t>(to));
    float milliseconds = 0;
    check_cuda(cudaEventSynchronize(end), "work on the GPU");
    check_cuda(cudaEventElapsedTime(&milliseconds, marks_.at(static_cast<size_t>(from)), end),
               "cudaEventElapsedTime");
    return milliseconds * 1e-3;
  }

  std::unique_ptr<Recording> record(const std::function<void()>& enqueue) override {
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
               "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      enqueue();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    check_cuda(cudaStreamEndCapture(stream_, &graph), "recording a CUDA graph");
    return std::make_unique<Graph>(graph, stream_);
  }

 private:
  class Graph final : public Recording {
   public:
    Graph(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
      const cudaError_t status = cudaGraphInstantiate(&run_, graph, 0);
      cudaGraphDestroy(graph);
      check_cuda(status, "cudaGraphInstantiate");
      check_cuda(cudaGraphUpload(run_, stream), "cudaGraphUpload");
    }
    ~Graph() override { cudaGraphExecDestroy(run_); }
    void replay() override { check_cuda(cudaGraphLaunch(run_, stream_), "cudaGraphLaunch"); }

   private:
    cudaGraphExec_t run_ = nullptr;
    cudaStream_t stream_;
  };

  static uint64_t raw_free_bytes() {
    size_t free = 0, total = 0;
    check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return free;
  }

  int ordinal_;
  std::unique_ptr<Device> cpu_;  // whose workers serve the host side
  cudaStream_t stream_ = nullptr;
  std::vector<cudaEvent_t> marks_;
};

}  // namespace

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw InternalError(fmt::format("{} failed: {}", what, cudaGetErrorString(status)));
}

void check_cuda_launch(const char* kernel, dim3 grid, dim3 block, cudaStream_t stream) {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return;
  throw InternalError(fmt::format(
      "kernel {} <<<{}x{}x{}, {}x{}x{}>>> on stream {} could not be launched: {}", kernel, grid.x,
      grid.y, grid.z, block.x, block.y, block.z, fmt::ptr(stream), cudaGetErrorString(status)));
}

std::string cuda_refusal(int ordinal) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return driver_refusal(driver, CUDART_VERSION);
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    return "this host has no NVIDIA GPU that it may use (see CUDA_VISIBLE_DEVICES); use device cpu";
  }
  if (status != cudaSuccess) {
    return fmt::format("the CUDA runtime cannot start: {}; use device cpu",
                       cudaGetErrorString(status));
  }
  if (std::string why = ordinal_refusal(ordinal, count); !why.empty()) return why;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  return architecture_refusal(ordinal, major * 10 + minor, SIKV_OLDEST_ARCHITECTURE);
}

std::string served_devices(sikv_device_type type) {
  if (type == SIKV_CPU) return "";
  static const std::string refusal = cuda_refusal();
  return refusal.substr(0, refusal.find(';'));  // the remedy is another one for a library
}

std::unique_ptr<Device> open_cuda_device(int ordinal, int threads) {
  if (const std::string why = cuda_refusal(ordinal); !why.empty()) {
    throw Error("device cuda: {}", why);
  }
  return std::make_unique<CudaDevice>(ordinal, threads);
}

}  // namespace sikv
