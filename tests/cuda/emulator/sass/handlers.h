// The tables of handlers, one per file, and how handlers walk through operands.
#pragma once

#include <map>
#include <string>

#include "machine.h"

namespace emulator::sass {

using Entries = std::map<std::string, Entry>;

const Entries& integer_entries();
const Entries& float_entries();
const Entries& movement_entries();

// The operands of an instruction of the form
//   destination, predicates that it sets, sources, predicates that it reads.
struct Parts {
  explicit Parts(const Instruction& i) {
    size_t n = 0;
    while (n < i.operands.size() && i.operands[n].is_predicate()) sets.push_back(&i.operands[n++]);
    if (n < i.operands.size()) destination = &i.operands[n++];
    while (n < i.operands.size() && i.operands[n].is_predicate()) sets.push_back(&i.operands[n++]);
    while (n < i.operands.size() && !i.operands[n].is_predicate())
      sources.push_back(&i.operands[n++]);
    while (n < i.operands.size()) reads.push_back(&i.operands[n++]);
  }
  const Operand* destination = nullptr;
  std::vector<const Operand*> sets, sources, reads;
};

// How comparisons end: ".GT.AND", for example.
struct Relation {
  explicit Relation(const Instruction& instruction);
  bool join(bool result, bool predicate) const;
  Compare compare = Compare::kEq;
  bool found = false;
  char combine = 0;  // '&', '|', '^'
};

}  // namespace emulator::sass
