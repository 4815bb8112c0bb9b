// Memory for outputs and workspaces that shows what was written outside of it.
#ifndef SIKV_TESTS_SUPPORT_GUARDED_H_
#define SIKV_TESTS_SUPPORT_GUARDED_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace sikv::testing {

// n elements between two guards, aligned as a device's allocations are; every byte 0xff until
// written: NaN, or -1.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t n)
      : n_(n), storage_(n * sizeof(T) + 2 * kGuard + kAlignment, kGuardByte) {
    poison();
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(storage_.data() + offset()); }
  const T* data() const { return reinterpret_cast<const T*>(storage_.data() + offset()); }
  T operator[](size_t i) const { return data()[i]; }
  size_t size() const { return n_; }
  void poison(uint8_t byte = 0xff) {
    std::memset(storage_.data() + offset(), byte, n_ * sizeof(T));
  }
  bool intact() const {
    const auto is_guard = [](uint8_t byte) { return byte == kGuardByte; };
    const auto first = storage_.begin() + static_cast<ptrdiff_t>(offset());
    return std::all_of(storage_.begin(), first, is_guard) &&
           std::all_of(first + static_cast<ptrdiff_t>(n_ * sizeof(T)), storage_.end(), is_guard);
  }

  // Everything, guards included, and where data() lies in it.
  std::span<uint8_t> storage() { return storage_; }
  size_t offset() const {
    const auto first = reinterpret_cast<uintptr_t>(storage_.data()) + kGuard;
    return kGuard + (kAlignment - first % kAlignment) % kAlignment;
  }

 private:
  static constexpr uint8_t kGuardByte = 0x5a;
  static constexpr size_t kGuard = 128, kAlignment = 64;

  size_t n_;
  std::vector<uint8_t> storage_;
};

// Memory a plugin may not take anything for granted about.
class Workspace : public Guarded<uint8_t> {
 public:
  explicit Workspace(size_t bytes) : Guarded(bytes) { make_dirty(); }
  void make_dirty() { poison(0xa5); }
};

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_GUARDED_H_
