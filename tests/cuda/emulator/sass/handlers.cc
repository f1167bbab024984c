#include "handlers.h"

namespace emulator::sass {

Relation::Relation(const Instruction& instruction) {
  static const std::map<std::string, Compare> relations = {
      {"EQ", Compare::kEq},   {"NE", Compare::kNe},   {"LT", Compare::kLt},   {"LE", Compare::kLe},
      {"GT", Compare::kGt},   {"GE", Compare::kGe},   {"EQU", Compare::kEqu}, {"NEU", Compare::kNeu},
      {"LTU", Compare::kLtu}, {"LEU", Compare::kLeu}, {"GTU", Compare::kGtu}, {"GEU", Compare::kGeu},
      {"NUM", Compare::kNum}, {"NAN", Compare::kNan}};
  for (const std::string& m : instruction.modifiers) {
    const auto relation = relations.find(m);
    if (relation != relations.end()) {
      compare = relation->second;
      found = true;
    }
    if (m == "AND") combine = '&';
    if (m == "OR") combine = '|';
    if (m == "XOR") combine = '^';
  }
  if (!found) stop("unknown comparison: " + instruction.text);
}

const Entry* find_entry(const std::string& opcode) {
  for (const Entries* entries : {&integer_entries(), &logic_entries(), &float_entries(),
                                 &movement_entries(), &control_entries()}) {
    const auto found = entries->find(opcode);
    if (found != entries->end()) return &found->second;
  }
  return nullptr;
}

}  // namespace emulator::sass
