// The tables of handlers, one per file.
#pragma once

#include <map>
#include <string>

#include "machine.h"

namespace emulator::ptx {

using Handlers = std::map<std::string, Handler>;

const Handlers& arithmetic_handlers();
const Handlers& bit_handlers();
const Handlers& movement_handlers();

bool compare(const std::string& relation, uint64_t a, uint64_t b, const Type& type, bool flush);

// Which of the modifiers is the relation, and how a predicate joins in.
struct Relation {
  explicit Relation(const Instruction& instruction);
  bool join(bool result, bool predicate) const;
  std::string name;
  char combine = 0;  // '&', '|', '^'
};

}  // namespace emulator::ptx
