#include "framework/model/weight_allocator.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace sikv {
namespace {

using Bytes = std::vector<char, WeightAllocator<char>>;

bool is_mapped(const void* data) {
  unsigned char resident = 0;
  const auto page = reinterpret_cast<uintptr_t>(data) / 4096 * 4096;
  return mincore(reinterpret_cast<void*>(page), 1, &resident) == 0;
}

TEST(WeightAllocator, NeighboursLieSideBySide) {
  const Bytes a(300'000, 'a'), b(100, 'b'), c(100, 'c');
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data()) % 64, 0u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b.data()) % 64, 0u);
  EXPECT_EQ(c.data() - b.data(), 128);
}

TEST(WeightAllocator, TheLastOfABlockGivesItBack) {
  constexpr size_t kMoreThanABlock = (70 << 20) - 5000;
  auto* const alone = static_cast<char*>(allocate_weights(kMoreThanABlock));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(alone) % (2 << 20), 0u);
  alone[0] = alone[kMoreThanABlock - 1] = 1;
  // What is left of its last huge page.
  void* const behind = allocate_weights(1000);
  release_weights(alone);
  EXPECT_TRUE(is_mapped(alone));
  std::memset(behind, 1, 1000);
  release_weights(behind);
  EXPECT_FALSE(is_mapped(alone));
}

}  // namespace
}  // namespace sikv
