// The entry points of one instruction set's unit: choose the format, run the rows, order the stores.
//
// Include this once per unit, with TOPK_ISA set to the unit's namespace, after that namespace has
// defined Ops (see topk_mask_cpu_row.h) and
//   struct Traits {
//     static constexpr bool kFloat64;                      // Ops takes Float64 too
//     static constexpr int kStreamBytes;                   // of one non-temporal store; 0: none
//     static void stream(const char* from, char* to);      // copies that many bytes
//     static void fence();   // orders non-temporal stores before what the next thread reads
//   };
// Every name here is in the unit's own namespace. If two units shared an inline function, the linker
// would keep one copy, and that copy might use instructions that the CPU lacks.

#include "topk_mask_cpu_row.h"

namespace topk_megatron {
namespace TOPK_ISA {

template <typename T>
void forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::kFloat32: forward_format<Float32>(args, begin, end); break;
    case Dtype::kBFloat16: forward_format<BFloat16>(args, begin, end); break;
    case Dtype::kFloat16: forward_format<Float16>(args, begin, end); break;
    case Dtype::kFloat64:
      if constexpr (T::kFloat64) forward_format<Float64>(args, begin, end);
      break;
  }
  T::fence();
}

// Backward moves bits and compares nothing, so the two 16-bit formats share their code.
template <typename T>
void backward(const BackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::kFloat32: backward_format<Float32>(args, begin, end); break;
    case Dtype::kBFloat16:
    case Dtype::kFloat16: backward_format<BFloat16>(args, begin, end); break;
    case Dtype::kFloat64:
      if constexpr (T::kFloat64) backward_format<Float64>(args, begin, end);
      break;
  }
  T::fence();
}

template <typename T>
void stream_copy(const void* src, void* dst, int64_t num_bytes) {
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  int64_t at = 0;
  if constexpr (T::kStreamBytes > 0) {
    if (reinterpret_cast<uintptr_t>(to) % T::kStreamBytes == 0)
      for (; at + T::kStreamBytes <= num_bytes; at += T::kStreamBytes) T::stream(from + at, to + at);
  }
  std::memcpy(to + at, from + at, static_cast<size_t>(num_bytes - at));
  T::fence();
}

constexpr Unit kUnit{forward<Traits>, backward<Traits>, stream_copy<Traits>};

}  // namespace TOPK_ISA
}  // namespace topk_megatron
