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
constexpr int kControlWords = 64;   // what the warps of a row exchange, see class Team
constexpr int kHeldByTeam = 8;      // slots that a lane holds where several warps share a row
constexpr int kMaxBlockWarps = 16;
constexpr int kMaxStreamWarps = 32;
constexpr int kRowsPerBlock = 4;    // rows of a block where one warp has a whole row
constexpr int64_t kMostBlocks = 0x7fffffff;  // CUDA's limit for a grid in x

// How a row is held. The number is a lane's slots in registers.
enum Variant { kWarp2, kWarp4, kWarp8, kWarp16, kBlock8, kStream, kNumVariants };

inline const char* variant_name(int variant) {
  static const char* const names[] = {"warp2", "warp4", "warp8", "warp16", "block8", "stream"};
  return names[variant];
}

struct Plan {
  int variant;
  int threads;
  size_t shared_bytes;
  int64_t blocks;  // enough for one row per warp or team; a persistent grid may have fewer
};

constexpr int element_bytes(int dtype) { return dtype == 0 ? 4 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every row of these tensors starts on 16 bytes, which 128-bit accesses need.
TOPK_HOST_DEVICE inline bool rows_aligned(const void* a, const void* b, int hidden, int bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return (start | static_cast<uintptr_t>(hidden) * bytes) % kSlotBytes == 0;
}

// aligned: rows_aligned(x, y, ...).
inline Plan plan_forward(int64_t rows, int hidden, int dtype, bool aligned) {
  const int slot_elements = kSlotBytes / element_bytes(dtype);
  const int chunks = ceil_div(ceil_div(hidden, slot_elements), kLanes);  // one slot per lane
  if (aligned && chunks <= 16) {
    const int variant = chunks <= 2   ? kWarp2
                        : chunks <= 4 ? kWarp4
                        : chunks <= 8 ? kWarp8
                                      : kWarp16;
    return {variant, kRowsPerBlock * kLanes, 0, ceil_div(rows, kRowsPerBlock)};
  }
  const int warps = ceil_div(chunks, kHeldByTeam);
  const size_t shared_bytes = kControlWords * sizeof(uint32_t);
  if (aligned && warps <= kMaxBlockWarps) return {kBlock8, warps * kLanes, shared_bytes, rows};
  const int most = warps < kMaxStreamWarps ? warps : kMaxStreamWarps;
  return {kStream, most * kLanes, shared_bytes, rows};
}

// A persistent grid: at most `resident` blocks, each with the same number of turns.
inline int64_t persistent_blocks(int64_t blocks, int64_t resident) {
  return blocks <= resident ? blocks : ceil_div(blocks, ceil_div(blocks, resident));
}

// ---- Backward ---------------------------------------------------------------------------------

constexpr int kBackwardThreads = 256;
constexpr int kBackwardSlots = 4;  // of a thread

struct BackwardPlan {
  bool flat;  // slots are numbered through the whole tensor: no row ends within a slot or a word
  int64_t blocks;
};

inline BackwardPlan plan_backward(const void* dy, const void* dx, int64_t rows, int hidden,
                                  int dtype) {
  const int bytes = element_bytes(dtype);
  if (hidden % 32 == 0 && rows_aligned(dy, dx, hidden, bytes)) {
    const int64_t slots = rows * hidden / (kSlotBytes / bytes);
    return {true, ceil_div(slots, kBackwardThreads * kBackwardSlots)};
  }
  return {false, rows};
}

}  // namespace topk_mask
