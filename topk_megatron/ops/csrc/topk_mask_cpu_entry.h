// The entry points of one unit: each chooses the format, runs the rows and orders the stores.
//
// Include this once per unit, with TOPK_ISA set to the unit's namespace, after that namespace has
// defined Ops (see topk_mask_cpu_row.h) and
//   struct Traits {
//     static constexpr bool kFloat64;                  // whether Ops accepts Float64
//     static constexpr int kStreamBytes;               // of a non-temporal store; 0: there is none
//     static void stream(const char* from, char* to);  // copies kStreamBytes by such a store
//     static void fence();                             // orders such stores before later ones
//   };
// Every name here is in the unit's own namespace. If two units shared an inline function, the
// linker would keep one copy, and that copy might use instructions that the CPU lacks.

#include "topk_mask_cpu_row.h"

namespace topk_megatron {
namespace TOPK_ISA {

inline bool streamable(const void* out, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(row_bytes)) % 64 == 0;
}

template <typename F>
void forward_format(const ForwardArgs& args, int64_t begin, int64_t end) {
  const bool stream = args.stream && streamable(args.y, args.hidden * sizeof(typename F::Raw));
  const bool abs = args.mode == Mode::kAbs;
  if (stream) {
    abs ? forward_rows<F, true, true>(args, begin, end)
        : forward_rows<F, false, true>(args, begin, end);
  } else {
    abs ? forward_rows<F, true, false>(args, begin, end)
        : forward_rows<F, false, false>(args, begin, end);
  }
}

template <typename F>
void backward_format(const BackwardArgs& args, int64_t begin, int64_t end) {
  const bool stream = args.stream && streamable(args.dx, args.hidden * sizeof(typename F::Raw));
  stream ? backward_rows<F, true>(args, begin, end) : backward_rows<F, false>(args, begin, end);
}

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
  T::fence();  // streamed stores are ordered before what the next thread reads
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
      for (; at + T::kStreamBytes <= num_bytes; at += T::kStreamBytes)
        T::stream(from + at, to + at);
  }
  std::memcpy(to + at, from + at, static_cast<size_t>(num_bytes - at));
  T::fence();
}

constexpr Unit kUnit{forward<Traits>, backward<Traits>, stream_copy<Traits>};

}  // namespace TOPK_ISA
}  // namespace topk_megatron
