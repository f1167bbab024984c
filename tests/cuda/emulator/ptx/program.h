// PTX as a parsed program.
#pragma once

#include <stdint.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"
#include "text.h"

namespace emulator::ptx {

// Addresses outside global memory, as generic pointers see them.
constexpr uint64_t kSharedWindow = 1ull << 56, kLocalWindow = 1ull << 57;

enum class Kind { kUnsigned, kSigned, kBits, kFloat, kPredicate };
enum class Space { kGeneric, kGlobal, kShared, kLocal, kParameter };

struct Type {
  Kind kind = Kind::kBits;
  int bits = 32;                  // of one element
  int elements = 1;               // 2: packed halves
  Float format = Float::kSingle;  // of kFloat
  bool is_float() const { return kind == Kind::kFloat; }
  bool is_signed() const { return kind == Kind::kSigned; }
};

enum class Special {
  kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaidX, kCtaidY, kCtaidZ, kNctaidX, kNctaidY,
  kNctaidZ, kLaneid, kWarpid, kNwarpid, kSmid, kNsmid, kMaskEq, kMaskLt, kMaskLe, kMaskGt,
  kMaskGe, kClock, kDynamicShared, kTotalShared
};

enum class Place { kNone, kRegister, kImmediate, kSpecial, kShared, kParameter, kVector, kMemory,
                   kSink };

struct Operand {
  Place place = Place::kNone;
  Place base = Place::kNone;  // of a memory operand
  int reg = -1, second = -1;  // second: the other register of "a|b"
  uint64_t value = 0;         // immediate, address, offset or Special
  bool negated = false;       // !p
  std::vector<Operand> parts;
};

class Machine;
struct Instruction;
using Handler = void (*)(Machine&, const Instruction&, uint32_t lanes);

struct Instruction {
  std::string text, name, opcode;  // name: opcode with modifiers
  std::vector<std::string> modifiers;
  std::vector<Operand> operands;
  Type type, source;  // source: the second type, or the first again
  Space space = Space::kGeneric;
  Handler handler = nullptr;
  Rounding rounding = Rounding::kNearest;
  int predicate = -1, target = -1, line = 0, vector = 1;
  bool predicate_negated = false, high = false, wide = false, flush = false, saturate = false,
       relu = false, nan = false;

  bool has(const char* modifier) const { return contains(modifiers, modifier); }
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<int> register_bits;
  std::vector<std::pair<int, int>> parameters;  // offset and size
  int parameter_bytes = 0, shared_bytes = 0, local_bytes = 0;
};

// Adds the kernels of a PTX text to the map.
void parse(const std::string& text, std::map<std::string, Kernel>& kernels);

// The function that executes an opcode, or null if it is unknown.
Handler find_handler(const std::string& opcode);

}  // namespace emulator::ptx
