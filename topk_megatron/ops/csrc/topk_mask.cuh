// Top-k plus mask over rows: y = x on the k coordinates with the largest keys, +0 elsewhere, and
// the selection as packed bits. A row is read from memory once, into registers, and written once.
//
// What limits such a kernel on Hopper is the ALU pipe: integer, logic and comparison run there at
// half the rate of floating-point arithmetic. So the kernel counts instead of comparing keys. One
// packed comparison of two 16-bit values, which the hardware orders as the operator does, gives two
// masks, and one addition adds up two of them. A row goes through these steps:
//   1. load      the row's words into registers. They are compared as they are.
//   2. threshold count the elements above a bound, and move the bound until the count is k or the
//                bound is between two neighbouring values. The first bound is the threshold of the
//                row before; interpolation then needs four or five counts for 16 bits, and about
//                seven for float32. The result is exact whatever the first bound was.
//   3. ties      equal values at the threshold are taken in index order up to a cut slot, found by
//                counting them per chunk. The cost does not depend on the number of ties.
//   4. write     the masks of one more comparison give y and the bits.
// Nothing in these steps depends on where in the row its large elements are.
//
// Legend. lane: a thread of a warp. slot: 16 bytes of a row, which a lane loads at once (8 elements
// of 16 bits or 4 of 32). chunk: 32 neighbouring slots of a warp, one per lane. A warp owns
// consecutive chunks and lane l holds slot l of each, so (warp, chunk, lane, element) is in index
// order. team: the warps of one row. order: the place of a value among all values of its type.
#pragma once

#include "topk_mask_write.cuh"

namespace topk_mask {

// ---- Rows of a warp or a team -----------------------------------------------------------------

template <class Fmt, int kHeld, bool kOneWarp>
TOPK_INLINE void forward(const void* x, void* y, uint32_t* bits, int64_t rows, int hidden, int k) {
  constexpr int kBytes = kSlotBytes / Fmt::kElements;
  TOPK_SHARED_WORDS(shared);
  const int lane = threadIdx.x % kLanes;
  const int warp_in_block = threadIdx.x / kLanes;
  constexpr int kRows = kOneWarp ? kRowsPerBlock : 1;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + (kOneWarp ? warp_in_block : 0);
  if (row >= rows) return;  // never a part of a warp or of a team
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows;

  Team<kOneWarp> team(kOneWarp ? 1 : blockDim.x / kLanes, kOneWarp ? 0 : warp_in_block, lane,
                      shared);
  const uint32_t size = hidden;
  const bool aligned = kHeld > 0 || rows_aligned(x, y, hidden, kBytes);
  WarpChunks<Fmt, kHeld> chunks({static_cast<const uint8_t*>(x), static_cast<uint8_t*>(y),
                                 reinterpret_cast<uint8_t*>(bits), size, aligned},
                                team.warps, team.warp, lane);
  Forecast forecast = cold_forecast<Fmt>(size);
  chunks.move(row, size);
  for (;;) {
    chunks.load_held();
    const int64_t next = row + stride;
    if (next < rows) chunks.prefetch(stride, size);
    const Threshold threshold = find_threshold<Fmt>(team, chunks, size, k, forecast);
    select_and_write<Fmt>(team, chunks, threshold);
    if (next >= rows) return;
    row = next;
    chunks.move(stride, size);
  }
}

// ---- Backward ---------------------------------------------------------------------------------

// dx = dy on the selected coordinates of one slot.
template <class Fmt>
TOPK_INLINE void backward_slot(const uint32_t (&dy)[4], uint32_t byte, uint32_t odd, uint8_t* dx) {
  uint32_t kept[4];
  keep_selected<Fmt>(dy, Fmt::kWide ? byte >> (4 * odd) : byte, kept);
  *reinterpret_cast<uint4*>(dx) = make_uint4(kept[0], kept[1], kept[2], kept[3]);
}

// Rows that start on 16 bytes and fill their last word of bits: the slots of all rows are
// numbered through. A thread loads all its slots before it stores one.
template <class Fmt>
TOPK_INLINE void backward_flat(const void* dy, const uint32_t* bits, void* dx, int64_t rows,
                               int hidden) {
  const int64_t slots = rows * hidden / Fmt::kElements;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * (kBackwardThreads * kBackwardSlots) + threadIdx.x;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(bits);
  const uint8_t* from = static_cast<const uint8_t*>(dy) + first * kSlotBytes;
  uint8_t* to = static_cast<uint8_t*>(dx) + first * kSlotBytes;
  const uint8_t* byte_at = bytes + (Fmt::kWide ? first / 2 : first);
  constexpr int kByteStride = Fmt::kWide ? kBackwardThreads / 2 : kBackwardThreads;
  uint32_t raw[kBackwardSlots][4], byte[kBackwardSlots];
  const int64_t left = slots - first;
#pragma unroll
  for (int i = 0; i < kBackwardSlots; ++i) {
    if (i * kBackwardThreads >= left) continue;
    load_vector(from + i * (kBackwardThreads * kSlotBytes), raw[i]);
    byte[i] = byte_at[i * kByteStride];
  }
#pragma unroll
  for (int i = 0; i < kBackwardSlots; ++i)
    if (i * kBackwardThreads < left)
      backward_slot<Fmt>(raw[i], byte[i], threadIdx.x % 2,
                         to + i * (kBackwardThreads * kSlotBytes));
}

// Any rows: a block per row, element by element where rows do not start on 16 bytes.
template <class Fmt>
TOPK_INLINE void backward_rows(const void* dy, const uint32_t* bits, void* dx, int hidden) {
  constexpr int kBytes = kSlotBytes / Fmt::kElements;
  const bool aligned = rows_aligned(dy, dx, hidden, kBytes);
  const int64_t row = blockIdx.x;
  const uint32_t size = hidden, slots = (size + Fmt::kElements - 1) / Fmt::kElements;
  const uint8_t* dy_row = static_cast<const uint8_t*>(dy) + row * hidden * kBytes;
  uint8_t* dx_row = static_cast<uint8_t*>(dx) + row * hidden * kBytes;
  const uint8_t* bits_row = reinterpret_cast<const uint8_t*>(bits + row * ((hidden + 31) / 32));
  for (uint32_t slot = threadIdx.x; slot < slots; slot += kBackwardThreads) {
    const uint32_t at = slot * kSlotBytes, elements = size - slot * Fmt::kElements;
    const uint32_t byte = bits_row[Fmt::kWide ? slot / 2 : slot];
    uint32_t raw[4] = {}, kept[4];
    if (aligned) {
      load_vector(dy_row + at, raw);
      backward_slot<Fmt>(raw, byte, slot % 2, dx_row + at);
    } else {
      load_elements<Fmt>(dy_row + at, elements, raw);
      keep_selected<Fmt>(raw, Fmt::kWide ? byte >> (slot % 2 * 4) : byte, kept);
      store_elements<Fmt>(dx_row + at, elements, kept);
    }
  }
}

// ---- Kernels ----------------------------------------------------------------------------------
// They have C names, so that profilers and the PTX tests can tell them apart.

// X(name, dtype, abs, slots in registers or 0, one warp per row, maximum threads, minimum blocks
// per processor). The last one sets the register budget.
#define TOPK_VARIANTS(X, dtype_name, dtype, mode_name, abs)                       \
  X(topk_mask_##dtype_name##_##mode_name##_warp2, dtype, abs, 2, true, 128, 8)    \
  X(topk_mask_##dtype_name##_##mode_name##_warp4, dtype, abs, 4, true, 128, 7)    \
  X(topk_mask_##dtype_name##_##mode_name##_warp8, dtype, abs, 8, true, 128, 5)    \
  X(topk_mask_##dtype_name##_##mode_name##_warp16, dtype, abs, 16, true, 128, 4)  \
  X(topk_mask_##dtype_name##_##mode_name##_block8, dtype, abs, 8, false, 512, 1)  \
  X(topk_mask_##dtype_name##_##mode_name##_stream, dtype, abs, 0, false, 1024, 1)

// Ordered by ((dtype * 2) + mode) * kNumVariants + variant.
#define TOPK_FORWARD_KERNELS(X)                    \
  TOPK_VARIANTS(X, float32, 0, value, false)       \
  TOPK_VARIANTS(X, float32, 0, abs, true)          \
  TOPK_VARIANTS(X, bfloat16, 1, value, false)      \
  TOPK_VARIANTS(X, bfloat16, 1, abs, true)         \
  TOPK_VARIANTS(X, float16, 2, value, false)       \
  TOPK_VARIANTS(X, float16, 2, abs, true)

#define TOPK_DEFINE_FORWARD(name, dtype, abs, held, one_warp, threads, blocks)                    \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                   \
      name(const void* __restrict__ x, void* __restrict__ y, uint32_t* __restrict__ bits,         \
           int64_t rows, int hidden, int k) {                                                     \
    forward<Format<dtype, abs>, held, one_warp>(x, y, bits, rows, hidden, k);                     \
  }
TOPK_FORWARD_KERNELS(TOPK_DEFINE_FORWARD)
#undef TOPK_DEFINE_FORWARD

// Backward moves bits and compares nothing: one kernel for each width.
#define TOPK_DEFINE_BACKWARD(name, dtype)                                                         \
  extern "C" __global__ void __launch_bounds__(kBackwardThreads)                                  \
      name##_flat(const void* __restrict__ dy, const uint32_t* __restrict__ bits,                 \
                  void* __restrict__ dx, int64_t rows, int hidden) {                              \
    backward_flat<Format<dtype, true>>(dy, bits, dx, rows, hidden);                               \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(kBackwardThreads)                                  \
      name##_rows(const void* __restrict__ dy, const uint32_t* __restrict__ bits,                 \
                  void* __restrict__ dx, int64_t /* rows */, int hidden) {                        \
    backward_rows<Format<dtype, true>>(dy, bits, dx, hidden);                                     \
  }
TOPK_DEFINE_BACKWARD(topk_mask_backward_32bit, 0)
TOPK_DEFINE_BACKWARD(topk_mask_backward_16bit, 1)
#undef TOPK_DEFINE_BACKWARD

// ---- Which kernel? ----------------------------------------------------------------------------

using ForwardKernel = void (*)(const void*, void*, uint32_t*, int64_t, int, int);
#define TOPK_KERNEL_POINTER(name, ...) name,
const ForwardKernel kForwardKernels[] = {TOPK_FORWARD_KERNELS(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

inline ForwardKernel forward_kernel(int dtype, int mode, int variant) {
  return kForwardKernels[(dtype * 2 + mode) * kNumVariants + variant];
}

using BackwardKernel = void (*)(const void*, const uint32_t*, void*, int64_t, int);

inline BackwardKernel backward_kernel(int dtype, bool flat) {
  if (dtype == 0) return flat ? topk_mask_backward_32bit_flat : topk_mask_backward_32bit_rows;
  return flat ? topk_mask_backward_16bit_flat : topk_mask_backward_16bit_rows;
}

}  // namespace topk_mask
