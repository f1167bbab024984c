// Keys: the order of the contract as plain integers, shared by every instruction set.
//
// key(x) is the magnitude's bit pattern with x's sign: +0 and -0 share key 0, larger numbers have
// larger keys, and every NaN is clamped to the one key above infinity.
#pragma once

#include <cstdint>

namespace topk_megatron {

template <typename Raw_, typename Key_, typename Lane_, Raw_ kInf_>
struct Format {
  using Raw = Raw_;    // the bit pattern as an unsigned integer
  using Key = Key_;    // for arithmetic on keys
  using Lane = Lane_;  // as wide as Raw, which is just enough for +-kNanKey
  static constexpr Raw kInf = kInf_;
  static constexpr Raw kMagnitude = static_cast<Raw>(~Raw{0}) >> 1;
  static constexpr Key kNanKey = static_cast<Key>(kInf_) + 1;

  template <bool Abs>
  static constexpr Key min_key() {
    return Abs ? Key{0} : -static_cast<Key>(kInf);
  }

  // A bit pattern whose key is min_key, to pad short rows with.
  template <bool Abs>
  static constexpr Raw padding() {
    return Abs ? Raw{0} : static_cast<Raw>(kInf | static_cast<Raw>(~kMagnitude));
  }

  template <bool Abs>
  static constexpr Key key(Raw raw) {  // branch-free, for the vectoriser
    const Key magnitude = static_cast<Key>(raw & kMagnitude);
    const Key number = (!Abs && raw > kMagnitude) ? -magnitude : magnitude;
    return magnitude > static_cast<Key>(kInf) ? kNanKey : number;
  }
};

using Float32 = Format<uint32_t, int32_t, int32_t, 0x7f800000u>;
using BFloat16 = Format<uint16_t, int32_t, int16_t, 0x7f80u>;
using Float16 = Format<uint16_t, int32_t, int16_t, 0x7c00u>;
using Float64 = Format<uint64_t, int64_t, int64_t, 0x7ff0000000000000ull>;

constexpr int kBlock = 32;  // elements processed at once: one word of the bitmask

}  // namespace topk_megatron
