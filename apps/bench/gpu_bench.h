// What the GPU benches share: prompts on the GPU, the copy rate, quantiles.
#ifndef SIKV_APPS_BENCH_GPU_BENCH_H_
#define SIKV_APPS_BENCH_GPU_BENCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <vector>

#include "apps/bench/gpu_synth.h"
#include "framework/base/error.h"
#include "framework/device/device.h"

namespace sikv::bench {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error("{} failed: {}", what, cudaGetErrorString(status));
}

inline double quantile(std::vector<double> x, double share) {
  std::sort(x.begin(), x.end());
  return x[std::min(x.size() - 1, static_cast<size_t>(share * static_cast<double>(x.size())))];
}
inline double median(const std::vector<double>& x) { return quantile(x, 0.5); }
inline double mean(const std::vector<double>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

// An H100 runs a step of 78 us in 86 for the first 8 ms.
inline constexpr auto kWarm = std::chrono::milliseconds(50);

// Milliseconds of each of `runs` calls of work(), after `warmup` more, which take kWarm at least if
// there are any.
template <typename Work>
std::vector<double> time_ms(Device& device, int warmup, int runs, Work&& work) {
  const auto stream = static_cast<cudaStream_t>(device.stream());
  const auto count = static_cast<size_t>(runs);
  std::vector<cudaEvent_t> events(2 * count);
  for (cudaEvent_t& event : events) check_cuda(cudaEventCreate(&event), "cudaEventCreate");
  int call = 0;
  for (const auto begin = std::chrono::steady_clock::now();
       call < warmup || (warmup > 0 && std::chrono::steady_clock::now() - begin < kWarm);) {
    work(call++, events[0], events[1], stream);
    if (call % 8 == 0) device.synchronize();
  }
  for (size_t i = 0; i < count; ++i) work(call++, events[2 * i], events[2 * i + 1], stream);
  device.synchronize();
  std::vector<double> ms;
  for (size_t i = 0; i < count; ++i) {
    float elapsed = 0;
    check_cuda(cudaEventElapsedTime(&elapsed, events[2 * i], events[2 * i + 1]),
               "cudaEventElapsedTime");
    ms.push_back(double{elapsed});
  }
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  return ms;
}

// The same where nothing comes before the clock starts.
template <typename Work>
std::vector<double> time_calls_ms(Device& device, int warmup, int runs, Work&& work) {
  return time_ms(device, warmup, runs,
                 [&](int, cudaEvent_t begin, cudaEvent_t end, cudaStream_t stream) {
                   check_cuda(cudaEventRecord(begin, stream), "cudaEventRecord");
                   work();
                   check_cuda(cudaEventRecord(end, stream), "cudaEventRecord");
                 });
}

// Of 1 GiB, bytes read and written.
inline double copy_tb_per_s(Device& device) {
  constexpr size_t kBytes = size_t{1} << 30;
  const DeviceBuffer from(device, kBytes), to(device, kBytes);
  const auto stream = static_cast<cudaStream_t>(device.stream());
  return 2e-9 * kBytes / median(time_calls_ms(device, 3, 12, [&] {
           check_cuda(
               cudaMemcpyAsync(to.as<>(), from.as<>(), kBytes, cudaMemcpyDeviceToDevice, stream),
               "copying");
         }));
}

// K, V and the last queries of one layer's prompts, all of one length; made anew for every layer.
class Prompt {
 public:
  Prompt(Device& device, SynthShape shape, int num_queries)
      : shape_(shape),
        device_(device),
        num_queries_(num_queries),
        first_(static_cast<size_t>(shape.batch)),
        count_(first_.size(), shape.tokens),
        k_(device, bytes()),
        v_(device, bytes()),
        q_(device,
           size_t{2} * num_queries * shape.batch * shape.kv_heads * shape.group * shape.head_dim) {
    for (int b = 0; b < shape.batch; ++b) first_[static_cast<size_t>(b)] = b * shape.tokens;
  }

  void make(int layer) {
    shape_.seed = static_cast<uint64_t>(layer) + 1;
    const auto stream = static_cast<cudaStream_t>(device_.stream());
    fill_keys(k_.as<>(), shape_, stream);
    fill_values(v_.as<>(), shape_, stream);
    if (num_queries_ > 0) fill_queries(q_.as<>(), shape_, num_queries_, -num_queries_, stream);
    check_cuda(cudaGetLastError(), "making tokens");
  }
  // Data on the device, `first` and `count` on the host.
  sikv_rows keys() const { return rows(k_.as<>()); }
  sikv_rows values() const { return rows(v_.as<>()); }
  const void* queries() const { return q_.as<>(); }
  // Of K, and of V.
  size_t bytes() const {
    return size_t{2} * shape_.batch * shape_.tokens * shape_.kv_heads * shape_.head_dim;
  }
  size_t query_bytes() const { return q_.bytes(); }

 private:
  sikv_rows rows(const void* data) const {
    return {data,           SIKV_FP16,     shape_.tokens,
            first_.data(),  count_.data(), int64_t{shape_.kv_heads} * shape_.head_dim,
            shape_.head_dim};
  }

  SynthShape shape_;
  Device& device_;
  int num_queries_;
  std::vector<int32_t> first_, count_;
  DeviceBuffer k_, v_, q_;
};

}  // namespace sikv::bench

#endif  // SIKV_APPS_BENCH_GPU_BENCH_H_
