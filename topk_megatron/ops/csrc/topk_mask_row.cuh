// Which warps work on a row (the team), and what each of them holds of it (its chunks).
// Legend: topk_mask.cuh.
#pragma once

#include "topk_mask_format.cuh"

namespace topk_mask {

constexpr uint32_t kFullWarp = 0xffffffffu;

// ---- Warp and team ----------------------------------------------------------------------------

TOPK_INLINE uint32_t inclusive_scan(uint32_t value, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const uint32_t left = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += left;
  }
  return value;
}

// The warps of one row and what they share. All of them call every method together.
template <bool kOneWarp>
class Team {
 public:
  TOPK_INLINE Team(int warps, int warp, int lane, uint32_t* exchanged)
      : warps(warps), warp(warp), lane(lane), exchanged_(exchanged) {}

  TOPK_INLINE uint32_t sum(uint32_t of_warp) {
    return kOneWarp ? of_warp : __reduce_add_sync(kFullWarp, exchange(of_warp, 0));
  }
  TOPK_INLINE uint32_t min(uint32_t of_warp) {
    return kOneWarp ? of_warp : __reduce_min_sync(kFullWarp, exchange(of_warp, 0xffffffffu));
  }
  TOPK_INLINE uint32_t max(uint32_t of_warp) {
    return kOneWarp ? of_warp : __reduce_max_sync(kFullWarp, exchange(of_warp, 0));
  }
  TOPK_INLINE uint32_t sum_of_warps_before(uint32_t of_warp) {
    if (kOneWarp) return 0;
    const uint32_t value = exchange(of_warp, 0);
    return __reduce_add_sync(kFullWarp, lane < warp ? value : 0);
  }

  const int warps, warp, lane;

 private:
  // Lane i gets the value of warp i, or `neutral` past the last warp. Two buffers alternate, so one
  // barrier is enough: before a warp writes a buffer again, it passes the other buffer's barrier,
  // which all warps reach after their reads of this one.
  TOPK_INLINE uint32_t exchange(uint32_t of_warp, uint32_t neutral) {
    uint32_t* buffer = exchanged_ + turn_ * kLanes;
    turn_ ^= 1;
    if (lane == 0) buffer[warp] = of_warp;
    __syncthreads();
    return lane < warps ? buffer[lane] : neutral;
  }

  uint32_t* exchanged_;
  int turn_ = 0;
};

// ---- A warp's part of the row -----------------------------------------------------------------

struct Row {
  const uint8_t* x;
  uint8_t* y;
  uint8_t* bits;
  uint32_t hidden;
  bool aligned;  // rows start on 16 bytes
};

// Load a slot's elements one by one, for rows that do not start on 16 bytes or end within a slot.
template <class Fmt>
TOPK_INLINE void load_elements(const uint8_t* slot, uint32_t count, uint32_t (&raw)[4]) {
#pragma unroll
  for (int i = 0; i < Fmt::kElements; ++i) {
    if (static_cast<uint32_t>(i) >= count) continue;
    if (Fmt::kWide) {
      raw[i % 4] = reinterpret_cast<const uint32_t*>(slot)[i];
    } else {
      const uint32_t element = reinterpret_cast<const uint16_t*>(slot)[i];
      const int shift = i % 2 * 16;
      raw[i / 2] = (raw[i / 2] & ~(0xffffu << shift)) | element << shift;
    }
  }
}

template <class Fmt>
TOPK_INLINE void store_elements(uint8_t* slot, uint32_t count, const uint32_t (&kept)[4]) {
#pragma unroll
  for (int i = 0; i < Fmt::kElements; ++i) {
    if (static_cast<uint32_t>(i) >= count) continue;
    if (Fmt::kWide) {
      reinterpret_cast<uint32_t*>(slot)[i] = kept[i % 4];
    } else {
      reinterpret_cast<uint16_t*>(slot)[i] = static_cast<uint16_t>(kept[i / 2] >> (i % 2 * 16));
    }
  }
}

TOPK_INLINE void prefetch_l2(const uint8_t* at) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
#endif
}

TOPK_INLINE void load_vector(const uint8_t* slot, uint32_t (&raw)[4]) {
  const uint4 vector = *reinterpret_cast<const uint4*>(slot);
  raw[0] = vector.x, raw[1] = vector.y, raw[2] = vector.z, raw[3] = vector.w;
}

// The chunks of one warp. kHeld > 0: at most that many, held in registers. kHeld == 0: any number,
// which every pass reads again (after the first pass, from L2).
template <class Fmt, int kHeld>
class WarpChunks {
 public:
  static constexpr int kUnroll = kHeld > 0 ? kHeld : 2;
  static constexpr uint32_t kChunkBytes = kLanes * kSlotBytes;
  static constexpr uint32_t kBitsBytes = kLanes * Fmt::kElements / 8;  // of a chunk

  TOPK_INLINE WarpChunks(const Row& row, int warps, int warp, int lane) : row_(row) {
    const uint32_t slots = (row.hidden + Fmt::kElements - 1) / Fmt::kElements;
    const uint32_t chunks = (slots + kLanes - 1) / kLanes;
    count_ = (chunks + warps - 1) / warps;
    const uint32_t first = warp * count_, first_slot = first * kLanes + lane;
    limit_ = limit(slots, first * kLanes, count_ * kLanes) - lane;
    row_.x += first_slot * static_cast<size_t>(kSlotBytes);
    row_.y += first_slot * static_cast<size_t>(kSlotBytes);
    row_.hidden -= first_slot * Fmt::kElements;  // may wrap; then the limit is not positive
    // The nibbles of two chunks make 32 bytes: even lanes write those of the first chunk.
    const int byte = Fmt::kWide ? lane / 2 + lane % 2 * 16 : lane;
    row_.bits += first * kBitsBytes + byte;
    const uint32_t bits_bytes = (row.hidden + 31) / 32 * 4;
    bits_limit_ = limit(bits_bytes, first * kBitsBytes, count_ * kBitsBytes) - byte;
  }

  // Moves to another row; the held words are those of the old one until load_held().
  TOPK_INLINE void move(int64_t rows, uint32_t hidden) {
    const int64_t bytes = rows * hidden * (kSlotBytes / Fmt::kElements);
    row_.x += bytes;
    row_.y += bytes;
    row_.bits += rows * ((hidden + 31) / 32) * 4;
  }

  TOPK_INLINE void load_held() {
    if (kHeld == 0) return;
    if (limit_ > (kHeld - 1) * kLanes) {
#pragma unroll
      for (int v = 0; v < kHeld; ++v) load_vector(row_.x + v * kChunkBytes, raw_[v]);
    } else {
#pragma unroll
      for (int v = 0; v < kHeld; ++v) load(v, raw_[v]);
    }
  }

  // Tells the L2 cache that the row `rows` further on will be read, so that its way from memory
  // overlaps this row's search. One instruction asks for 4 KiB.
  TOPK_INLINE void prefetch(int64_t rows, uint32_t hidden) const {
    constexpr int kLineBytes = 128, kLineSlots = kLineBytes / kSlotBytes;
    const int lane = threadIdx.x % kLanes;
    const uint8_t* from = row_.x + rows * hidden * (kSlotBytes / Fmt::kElements);
#pragma unroll
    for (int line = 0; line < (kHeld + kLineSlots - 1) / kLineSlots; ++line) {
      const int slot = (line * kLanes + lane) * kLineSlots - lane;  // from this lane's first slot
      if (slot < limit_) prefetch_l2(from + slot * kSlotBytes);
    }
  }

  // Whether chunk v belongs to this warp. A chunk that does not holds pads.
  TOPK_INLINE bool owns(uint32_t v) const { return v < count_; }

  // Calls f(chunk, chunk modulo kUnroll as a constant, words of this lane's slot).
  template <class F>
  TOPK_INLINE void for_each(F f) const {
    if (kHeld > 0) {
#pragma unroll
      for (int v = 0; v < kHeld; ++v) f(v, v, raw_[v]);
    } else {
      for_each_read(f);
    }
  }

  // The same, but reads held chunks again, too: for what rarely happens, in little code.
  template <class F>
  TOPK_INLINE void for_each_read(F f) const {
    constexpr int kStep = kHeld >= 4 ? 4 : 2;
    for (uint32_t v = 0; v < count_; v += kStep) {
#pragma unroll
      for (int u = 0; u < kStep; ++u) {
        uint32_t raw[4];
        load(v + u, raw);
        f(v + u, u, raw);
      }
    }
  }

  TOPK_INLINE uint32_t count_above(uint32_t bound) const {
    typename Fmt::Count count = 0;
    for_each([&](uint32_t, int, const uint32_t(&raw)[4]) { count += Fmt::above_in(raw, bound); });
    return Fmt::decode(__reduce_add_sync(kFullWarp, Fmt::summand(count)), kLanes);
  }

  TOPK_INLINE void store(uint32_t v, const uint32_t (&kept)[4]) const {
    if (static_cast<int>(v * kLanes) >= limit_) return;
    uint8_t* slot = row_.y + v * kChunkBytes;
    if (kHeld > 0 || row_.aligned) {
      *reinterpret_cast<uint4*>(slot) = make_uint4(kept[0], kept[1], kept[2], kept[3]);
    } else {
      store_elements<Fmt>(slot, row_.hidden - v * kLanes * Fmt::kElements, kept);
    }
  }

  // One byte per lane: the bits of chunk v or, with four elements per slot, of chunks v and v + 1.
  TOPK_INLINE void store_bits(uint32_t v, uint32_t byte) const {
    if (static_cast<int>(v * kBitsBytes) < bits_limit_)
      row_.bits[v * kBitsBytes] = static_cast<uint8_t>(byte);
  }

 private:
  // How many of `own` items, starting at `first`, are before `end`; may be negative.
  TOPK_INLINE static int limit(uint32_t end, uint32_t first, uint32_t own) {
    const int left = static_cast<int>(end) - static_cast<int>(first);
    return left < static_cast<int>(own) ? left : static_cast<int>(own);
  }

  TOPK_INLINE void load(uint32_t v, uint32_t (&raw)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[i] = Fmt::kPad;
    if (static_cast<int>(v * kLanes) >= limit_) return;
    const uint8_t* slot = row_.x + v * kChunkBytes;
    if (kHeld > 0 || row_.aligned) {
      load_vector(slot, raw);
    } else {
      load_elements<Fmt>(slot, row_.hidden - v * kLanes * Fmt::kElements, raw);
    }
  }

  Row row_;  // with pointers at this lane's first slot, and `hidden` counted from there
  int limit_, bits_limit_;
  uint32_t count_;
  uint32_t raw_[kHeld > 0 ? kHeld : 1][4];
};

}  // namespace topk_mask
