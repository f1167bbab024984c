// Top-k plus mask on CPU: the kernel's interface, free of torch.
//
// For every row of x [rows, hidden] select the k coordinates with the largest keys (x or |x|),
// write y = x on them (bitwise) and +0 elsewhere, and write the selection as a bitmask of
// ceil(hidden / 32) words per row, lowest bit first. Ties go to the lowest index, +0 equals -0 and
// NaN is larger than everything. The contract and its reference are in ops/reference.py.
#pragma once

#include <cstdint>

namespace topk_megatron {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum class Mode : int { kValue = 0, kAbs = 1 };

// Instruction sets, worst first. float64 always runs on kPortable.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set that both this build and this CPU have.
Isa cpu_best_isa();

struct ForwardArgs {
  const void* x;   // [rows, hidden], row-major, any alignment
  void* y;         // [rows, hidden]
  uint32_t* bits;  // [rows, ceil(hidden / 32)]
  int64_t hidden;
  int64_t k;  // 1 <= k <= hidden
  Dtype dtype;
  Mode mode;
  // Write y around the caches: faster if y is larger than the last private cache level, slower if
  // it fits. Ignored where y's rows are not aligned to 64 bytes.
  bool stream;
};

struct BackwardArgs {
  const void* dy;        // [rows, hidden]
  const uint32_t* bits;  // [rows, ceil(hidden / 32)]
  void* dx;              // [rows, hidden]; dy where the bit is set, +0 elsewhere
  int64_t hidden;
  Dtype dtype;
  bool stream;
};

// Both work on rows [begin, end), so that the caller decides how to spread rows over threads.
void cpu_forward(const ForwardArgs& args, Isa isa, int64_t begin, int64_t end);
void cpu_backward(const BackwardArgs& args, Isa isa, int64_t begin, int64_t end);

// dst = src, by non-temporal stores where dst is aligned: the yardstick of the benchmarks.
void cpu_stream_copy(const void* src, void* dst, int64_t num_bytes, Isa isa);

// Write the positions of each row's set bits in ascending order, k per row. Return the first row in
// [begin, end) that does not have exactly k bits set, or -1.
int64_t cpu_bits_to_indices(const uint32_t* bits, void* indices, int64_t hidden, int64_t k,
                            int index_bytes, int64_t begin, int64_t end);

// Add to counts[j] the number of rows in which bit j is set, for words [begin, end) of each row.
void cpu_count_bits(const uint32_t* bits, int64_t* counts, int64_t rows, int64_t hidden,
                    int64_t begin, int64_t end);

}  // namespace topk_megatron
