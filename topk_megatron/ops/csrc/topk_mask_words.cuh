// The kernel's lowest layer: words, their bits, and floats as words. Legend: topk_mask.cuh.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "topk_mask_plan.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define TOPK_SHARED_WORDS(name) extern __shared__ __align__(16) uint32_t name[]
#else  // the tests include their emulation header before this one
#define TOPK_SHARED_WORDS(name) uint32_t* name = cuda_emulation::shared_words()
#endif

namespace topk_mask {

#define TOPK_INLINE __device__ __forceinline__

// ---- Instructions that the compiler does not generate by itself -------------------------------
// Each has a portable twin with the same meaning, which the tests' g++ build executes.

// Every byte becomes 0xff or 0x00 by the top bit of the byte that its nibble of the selector names.
TOPK_INLINE uint32_t spread_signs(uint32_t word, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(out) : "r"(word), "r"(selector | 0x8888u));
  return out;
#else
  uint32_t out = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t source = (selector >> (4 * byte)) & 3u;
    if (word >> (8 * source + 7) & 1u) out |= 0xffu << (8 * byte);
  }
  return out;
#endif
}

// (a & b) | c
TOPK_INLINE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  return (a & b) | c;
#endif
}

// The bits of a where the mask is set, of b elsewhere.
TOPK_INLINE uint32_t select(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}

// bits += weight and kept = raw where x > bound or x is a NaN, else kept = 0. `bits` is a float
// whose mantissa holds an integer: the sum then occupies the FMA pipe and not the crowded ALU.
TOPK_INLINE void keep_if_above(float& bits, float weight, uint32_t& kept, uint32_t raw, float x,
                               float bound) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.gtu.f32 p, %2, %3; @p add.f32 %0, %0, %4; selp.b32 %1, %5, 0, p;}"
      : "+f"(bits), "=r"(kept)
      : "f"(x), "f"(bound), "f"(weight), "r"(raw));
#else
  const bool above = !(x <= bound);
  if (above) bits += weight;
  kept = above ? raw : 0;
#endif
}

TOPK_INLINE float as_float(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(word);
#else
  float x;
  memcpy(&x, &word, sizeof x);
  return x;
#endif
}

TOPK_INLINE uint32_t as_word(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  return word;
#endif
}

// An approximation: what is computed from it must not depend on its last bits.
TOPK_INLINE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// Rounds down, and to the nearest integer that an unsigned word holds.
TOPK_INLINE uint32_t floor_to_word(float x) {
#if defined(__CUDA_ARCH__)
  return __float2uint_rd(x);
#else
  return x >= 4294967296.0f ? 0xffffffffu : x > 0 ? static_cast<uint32_t>(x) : 0;
#endif
}

// A float in [2^23, 2^24) whose lowest mantissa bits are an integer.
constexpr float kCounter = 8388608.0f;
constexpr uint32_t kCounterWord = 0x4b000000u;

}  // namespace topk_mask
