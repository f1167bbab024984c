// The tables of handlers, one per file, and how handlers walk through operands.
#pragma once

#include <map>
#include <string>

#include "machine.h"

namespace emulator::sass {

using Entries = std::map<std::string, Entry>;

const Entries& integer_entries();
const Entries& float_entries();
const Entries& logic_entries();
const Entries& movement_entries();
const Entries& control_entries();

// What an atomic operation or a reduction, named by a modifier, makes of an old value and a new one.
uint32_t combine(const Instruction& i, uint32_t old, uint32_t b, uint32_t c);

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

// Sets the destination of each lane to f(lane, parts).
template <class F>
void compute(Machine& m, const Instruction& i, uint32_t lanes, F f) {
  const Parts parts(i);
  m.each(lanes, [&](int lane) { m.set(*parts.destination, lane, f(lane, parts)); });
}

// How comparisons end: ".GT.AND", for example.
struct Relation {
  explicit Relation(const Instruction& instruction);
  bool join(bool result, bool predicate) const {
    return combine_bools(combine, result, predicate);
  }
  Compare compare = Compare::kEq;
  bool found = false;
  char combine = 0;  // '&', '|', '^'
};

}  // namespace emulator::sass
