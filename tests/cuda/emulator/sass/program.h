// SASS, the machine code of one chip, as a parsed program.
#pragma once

#include <stdint.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"
#include "text.h"

namespace emulator::sass {

constexpr int kZeroRegister = 255, kZeroUniform = 63, kTrue = 7;

enum class Place {
  kRegister, kUniform, kPredicate, kUniformPredicate, kInteger, kReal, kConstant, kMemory, kName
};

// Registers of a memory operand, -1 where there is none.
struct Memory {
  int reg = -1, uniform = -1;
  bool wide = false, wide_uniform = false;  // the registers are pairs
  int scale = 1;
  int64_t offset = 0;
};

struct Operand {
  Place place = Place::kName;
  int index = 0;         // of a register, predicate or constant bank
  uint64_t value = 0;    // integer or constant offset
  double real[2] = {};   // lower and upper half; of a scalar, both
  bool minus = false, absolute = false, inverted = false;  // -, | |, and ~ or !
  char halves = 0;       // '0': the lower half twice, '1': the upper half twice
  Memory memory;
  std::string name;      // special registers and barriers
  bool is_predicate() const {
    return place == Place::kPredicate || place == Place::kUniformPredicate;
  }
};

class Machine;
struct Instruction;
using Handler = void (*)(Machine&, const Instruction&, uint32_t lanes);

struct Instruction {
  std::string text, name, opcode;  // name: opcode with modifiers; opcode: without the uniform U
  std::vector<std::string> modifiers;
  std::vector<Operand> operands;
  Operand guard;
  bool guarded = false, uniform = false;
  int target = -1;  // index of an instruction
  uint64_t address = 0;
  Handler handler = nullptr;

  bool has(const char* modifier) const { return contains(modifiers, modifier); }
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::map<uint64_t, int> index_of;  // by address
  std::vector<std::pair<int, int>> parameters;  // offset in constant bank 0, and size
  int shared_bytes = 0, local_bytes = 0;
};

// Adds the kernels of a program file, as machine_code.py writes it from cuobjdump's text, to the map.
void parse(const std::string& text, std::map<std::string, Kernel>& kernels);

// What executes an opcode, and the modifiers that it knows; null if it is unknown.
struct Entry {
  Handler handler;
  std::string modifiers;  // separated and surrounded by spaces
};
const Entry* find_entry(const std::string& opcode);

}  // namespace emulator::sass
