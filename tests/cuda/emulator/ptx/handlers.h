// The tables of handlers, one per file.
#pragma once

#include <algorithm>
#include <map>
#include <string>

#include "machine.h"

namespace emulator::ptx {

using Handlers = std::map<std::string, Handler>;

const Handlers& arithmetic_handlers();
const Handlers& comparison_handlers();
const Handlers& bit_handlers();
const Handlers& movement_handlers();

inline double read(uint64_t bits, const Type& type, bool flush) {
  bits &= low_bits(type.bits);
  return decode(flush ? flush_subnormal(bits, type.format) : bits, type.format);
}

inline uint64_t write(double value, const Type& type, const Instruction& i) {
  if (i.saturate) value = saturate(value);
  if (i.relu && value < 0) value = 0;
  const uint64_t bits = encode(value, type.format, i.rounding);
  return i.flush ? flush_subnormal(bits, type.format) : bits;
}

inline uint64_t clamp_signed(int64_t value, int bits) {
  const int64_t most = static_cast<int64_t>(low_bits(bits) >> 1);
  return std::max(-most - 1, std::min(most, value));
}

// Which of the modifiers is the relation, and how a predicate joins in.
struct Relation {
  explicit Relation(const Instruction& instruction);
  bool join(bool result, bool predicate) const {
    return combine_bools(combine, result, predicate);
  }
  std::string name;
  char combine = 0;  // '&', '|', '^'
};

}  // namespace emulator::ptx
