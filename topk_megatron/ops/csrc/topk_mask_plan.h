// Which kernel a shape gets and how it is launched. This is plain host code, shared by the launcher
// and by the tests that execute the kernels on a CPU, so that both run the same configuration.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define TOPK_HOST_DEVICE __host__ __device__
#else
#define TOPK_HOST_DEVICE
#endif

namespace topk_mask {

constexpr int kLanes = 32;          // threads of a warp
constexpr int kSlotBytes = 16;      // one lane's load: a slot of 8 or 4 elements
constexpr int kListCapacity = 512;  // candidates that one row's compact list holds
constexpr int kStreamColumn = 16;   // candidates that one lane of the streaming kernel can hold
constexpr int kControlWords = 96;   // a row's counters in shared memory, see class Team
constexpr int kMaxBlockWarps = 16;  // register-resident rows: 512 threads at up to 128 registers
constexpr int kMaxStreamWarps = 32;
constexpr int kRowsPerBlock = 4;    // rows of a block where one warp has a whole row

// How a row is held. The number is a lane's slots in registers.
enum Variant { kWarp2, kWarp4, kWarp8, kBlock8, kStream, kNumVariants };

inline const char* variant_name(int variant) {
  static const char* const names[] = {"warp2", "warp4", "warp8", "block8", "stream"};
  return names[variant];
}

struct Plan {
  int variant;
  int warps_per_row;
  int rows_per_block;
  int threads;
  size_t shared_bytes;
  int64_t blocks;
};

constexpr int element_bytes(int dtype) { return dtype == 0 ? 4 : 2; }

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Words of shared memory for one row: a column per lane, the compact list, the counters.
TOPK_HOST_DEVICE constexpr size_t shared_words(int warps, int column) {
  return static_cast<size_t>(warps) * kLanes * column + kListCapacity + kControlWords;
}

inline Plan make_plan(int variant, int warps, int column, int64_t rows) {
  const int rows_per_block = variant <= kWarp8 ? kRowsPerBlock : 1;
  return {variant,
          warps,
          rows_per_block,
          warps * rows_per_block * kLanes,
          shared_words(warps, column) * rows_per_block * sizeof(uint32_t),
          (rows + rows_per_block - 1) / rows_per_block};
}

// Whether every row of these tensors starts on 16 bytes, which 128-bit accesses need.
TOPK_HOST_DEVICE inline bool rows_aligned(const void* a, const void* b, int hidden, int bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return (start | static_cast<uintptr_t>(hidden) * bytes) % kSlotBytes == 0;
}

// aligned: rows_aligned(x, y, ...). shared_limit: bytes of shared memory available to a block.
inline Plan plan_forward(int64_t rows, int hidden, int dtype, bool aligned, size_t shared_limit) {
  const int slot_elements = kSlotBytes / element_bytes(dtype);
  const int chunks = ceil_div(ceil_div(hidden, slot_elements), kLanes);  // one slot per lane
  if (aligned && chunks <= 8) {
    const int variant = chunks <= 2 ? kWarp2 : chunks <= 4 ? kWarp4 : kWarp8;
    const int slots = 2 << (variant - kWarp2);
    return make_plan(variant, 1, slots * slot_elements, rows);
  }
  const int warps = ceil_div(chunks, 8);
  if (aligned && warps <= kMaxBlockWarps) {
    const Plan plan = make_plan(kBlock8, warps, 8 * slot_elements, rows);
    if (plan.shared_bytes <= shared_limit) return plan;
  }
  return make_plan(kStream, warps < kMaxStreamWarps ? warps : kMaxStreamWarps, kStreamColumn, rows);
}

// A row gets as many lanes in backward as it has slots, at most 256, and a block gets as many rows
// as fill it.
inline Plan plan_backward(int64_t rows, int hidden, int dtype) {
  const int slot_elements = kSlotBytes / element_bytes(dtype);
  const int chunks = ceil_div(ceil_div(hidden, slot_elements), kLanes);
  const int warps = chunks < 8 ? chunks : 8;
  const int rows_per_block = 8 / warps;
  return {0,
          warps,
          rows_per_block,
          warps * rows_per_block * kLanes,
          0,
          (rows + rows_per_block - 1) / rows_per_block};
}

}  // namespace topk_mask
