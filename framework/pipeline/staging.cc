#include "framework/pipeline/staging.h"

#include <algorithm>
#include <limits>

namespace sikv {

const void* Staging::bring(int i, const void* data, size_t bytes) {
  if (bytes == 0 || device_->holds(data)) return data;
  DeviceBuffer& copy = copies_.at(static_cast<size_t>(i));
  if (copy.bytes() < bytes) {
    copy = {};
    copy = DeviceBuffer(*device_, bytes);
  }
  device_->copy_in(copy.as<>(), data, bytes);
  return copy.as<>();
}

sikv_rows Staging::bring_rows(int i, const sikv_rows& rows, int B, int H, int D) {
  if (!device_->is_cuda()) return rows;
  int32_t low = std::numeric_limits<int32_t>::max(), high = 0;
  for (int b = 0; b < B; ++b) {
    low = std::min(low, rows.first[b]);
    high = std::max(high, rows.first[b] + rows.count[b]);
  }
  const bool in_place = device_->holds(rows.data);
  if (in_place) low = 0;
  const int64_t element = sikv_dtype_bytes(rows.dtype);
  const int64_t end = (high - 1) * rows.token_stride + (H - 1) * rows.head_stride + D;
  sikv_rows brought = rows;
  brought.data = bring(i, static_cast<const char*>(rows.data) + low * rows.token_stride * element,
                       static_cast<size_t>((end - low * rows.token_stride) * element));
  const size_t n = static_cast<size_t>(B);
  MirroredArray& first = first_.at(static_cast<size_t>(i));
  MirroredArray& count = count_.at(static_cast<size_t>(i));
  if (first.size() != n) {
    first = MirroredArray(*device_, n, 0);
    count = MirroredArray(*device_, n, 0);
  }
  std::transform(rows.first, rows.first + B, first.edit(0, n),
                 [&](int32_t row) { return row - low; });
  std::copy_n(rows.count, B, count.edit(0, n));
  brought.first = first.device();
  brought.count = count.device();
  return brought;
}

void Staging::clear() {
  for (DeviceBuffer& copy : copies_) copy = {};
}

}  // namespace sikv
