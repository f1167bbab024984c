// Reads program files: a line per kernel, then a line per instruction.
//
//   KERNEL name shared_bytes local_bytes offset:size ...
//   0010 @!P0 IADD3 R1, R2, R3, RZ
//
// What the emulator does not know, be it an opcode or a modifier, stops it with its text.
#include <ctype.h>
#include <stdlib.h>

#include <sstream>

#include "memory.h"
#include "program.h"
#include "text.h"

namespace emulator::sass {

namespace {

using std::string;
using std::vector;

bool starts_with(const string& s, const string& prefix) { return s.rfind(prefix, 0) == 0; }

bool is_number(const string& s) { return !s.empty() && s.find_first_not_of("0123456789") == string::npos; }

uint64_t parse_integer(const string& s) {
  return s[0] == '-' ? static_cast<uint64_t>(-strtoll(s.c_str() + 1, nullptr, 0))
                     : strtoull(s.c_str(), nullptr, 0);
}

bool is_integer(const string& s) { return starts_with(s, "0x") || starts_with(s, "-0x"); }

// "R5", "RZ", "UR4", "URZ", "P0", "PT", "UP0", "UPT", or not a register.
bool parse_register(const string& s, Operand& operand) {
  const struct {
    const char* prefix;
    Place place;
    const char* last_name;
    int last;
  } files[] = {{"UR", Place::kUniform, "Z", kZeroUniform},
               {"UP", Place::kUniformPredicate, "T", kTrue},
               {"R", Place::kRegister, "Z", kZeroRegister},
               {"P", Place::kPredicate, "T", kTrue}};
  for (const auto& file : files) {
    if (!starts_with(s, file.prefix)) continue;
    const string number = s.substr(string(file.prefix).size());
    if (number != file.last_name && !is_number(number)) continue;
    operand.place = file.place;
    operand.index = number == file.last_name ? file.last : atoi(number.c_str());
    return true;
  }
  return false;
}

// The inside of brackets: "R38.64+0x200", "R39+UR4+-0x8", "R5.X4".
Memory parse_memory(const string& text) {
  Memory memory;
  for (string part : split(text, '+')) {
    if (is_integer(part)) {
      memory.offset += static_cast<int64_t>(parse_integer(part));
      continue;
    }
    vector<string> names = split(part, '.');
    Operand reg;
    if (!parse_register(names[0], reg)) stop("unknown address part " + part);
    const bool uniform = reg.place == Place::kUniform;
    (uniform ? memory.uniform : memory.reg) = reg.index;
    for (size_t i = 1; i < names.size(); ++i) {
      if (names[i] == "64") {
        (uniform ? memory.wide_uniform : memory.wide) = true;
      } else if (names[i][0] == 'X') {
        memory.scale = atoi(names[i].c_str() + 1);
      } else if (names[i] != "U32" && names[i] != "reuse") {
        stop("unknown address part " + part);
      }
    }
  }
  return memory;
}

string inside_last_bracket(const string& s) {
  const size_t open = s.rfind('['), close = s.rfind(']');
  return s.substr(open + 1, close - open - 1);
}

bool parse_real(const string& s, Operand& operand) {
  const bool named = s.find("INF") != string::npos || s.find("QNAN") != string::npos;
  if (!named && !isdigit(s[0]) && !(s.size() > 1 && strchr("-+.", s[0]) && strchr("0123456789.", s[1])))
    return false;
  operand.place = Place::kReal;
  const double size = s.find("INF") != string::npos ? INFINITY : NAN;
  operand.real[0] = named ? (s[0] == '-' ? -size : size) : strtod(s.c_str(), nullptr);
  operand.real[1] = operand.real[0];
  return true;
}

// Takes a suffix such as ".reuse" or ".H0_H0" off the text.
void take_suffixes(string& text, Operand& operand) {
  static const struct {
    const char* name;
    char halves;
  } suffixes[] = {{".reuse", 0}, {".64", 0}, {".H0_H0", '0'}, {".H1_H1", '1'}, {".H1_H0", 0}};
  for (bool found = true; found;) {
    found = false;
    for (const auto& suffix : suffixes) {
      const string name = suffix.name;
      if (text.size() <= name.size() || text.compare(text.size() - name.size(), name.size(), name))
        continue;
      if (suffix.halves) operand.halves = suffix.halves;
      text.resize(text.size() - name.size());
      found = true;
    }
  }
}

Operand parse_operand(string text) {
  Operand operand;
  if (is_integer(text)) {
    operand.place = Place::kInteger;
    operand.value = parse_integer(text);
    return operand;
  }
  if (parse_real(text, operand)) return operand;
  take_suffixes(text, operand);
  for (; strchr("-+~!", text[0]); text = text.substr(1)) {
    operand.minus |= text[0] == '-';
    operand.inverted |= text[0] == '~' || text[0] == '!';
  }
  if (text[0] == '|') {
    operand.absolute = true;
    text = text.substr(1, text.find('|', 1) - 1);
    take_suffixes(text, operand);
  }
  if (starts_with(text, "c[")) {
    operand.place = Place::kConstant;
    operand.index = static_cast<int>(strtol(text.c_str() + 2, nullptr, 0));
    operand.memory = parse_memory(inside_last_bracket(text));
  } else if (text.find('[') != string::npos) {
    operand.place = Place::kMemory;
    operand.memory = parse_memory(inside_last_bracket(text));
  } else if (!parse_register(text, operand)) {
    operand.name = text;
  }
  return operand;
}

// Packed halves print an immediate as two numbers, the upper half first.
void join_halves(Instruction& i) {
  if (i.opcode[0] != 'H') return;
  vector<Operand> joined;
  for (size_t n = 0; n < i.operands.size(); ++n) {
    joined.push_back(i.operands[n]);
    if (n + 1 == i.operands.size() || i.operands[n].place != Place::kReal ||
        i.operands[n + 1].place != Place::kReal)
      continue;
    joined.back().real[0] = i.operands[++n].real[0];
  }
  i.operands = joined;
}

void check_opcode(Instruction& i) {
  const Entry* entry = find_entry(i.opcode);
  if (!entry && i.opcode[0] == 'U') {
    i.uniform = true;
    entry = find_entry(i.opcode.substr(1));
    if (entry) i.opcode = i.opcode.substr(1);
  }
  if (!entry) stop("instruction is not supported: " + i.text);
  for (const string& m : i.modifiers)
    if (entry->modifiers.find(" " + m + " ") == string::npos)
      stop("modifier ." + m + " is not supported: " + i.text);
  i.handler = entry->handler;
}

Instruction parse_instruction(const string& line) {
  Instruction i;
  const size_t space = line.find(' ');
  i.address = strtoull(line.substr(0, space).c_str(), nullptr, 16);
  string rest = trim(line.substr(space));
  i.text = rest;
  if (rest[0] == '@') {
    const size_t end = rest.find(' ');
    i.guarded = true;
    i.guard = parse_operand(rest.substr(1, end - 1));
    rest = trim(rest.substr(end));
  }
  const size_t end = rest.find(' ');
  i.name = rest.substr(0, end);
  i.modifiers = split(i.name, '.');
  i.opcode = i.modifiers[0];
  i.modifiers.erase(i.modifiers.begin());
  check_opcode(i);
  if (end != string::npos)  // RET separates its operands by a space
    for (const string& operand : split(trim(rest.substr(end)), i.opcode == "RET" ? ' ' : ','))
      i.operands.push_back(parse_operand(operand));
  join_halves(i);
  const bool global = i.opcode.back() == 'G' || i.opcode == "RED";
  for (Operand& operand : i.operands)  // global addresses are pairs, said or unsaid
    if (global && operand.place == Place::kMemory && operand.memory.reg >= 0)
      operand.memory.wide = true;
  return i;
}

Kernel parse_header(const string& line) {
  std::istringstream stream(line);
  string word;
  Kernel kernel;
  stream >> word >> kernel.name >> kernel.shared_bytes >> kernel.local_bytes;
  while (stream >> word) {
    const size_t colon = word.find(':');
    kernel.parameters.push_back({atoi(word.c_str()), atoi(word.c_str() + colon + 1)});
  }
  return kernel;
}

void resolve_targets(Kernel& kernel) {
  for (Instruction& i : kernel.code) {
    const bool jumps = i.opcode == "BRA" || i.opcode == "BSSY" || i.opcode == "CALL";
    if (!jumps) continue;
    const auto target = kernel.index_of.find(i.operands.back().value);
    if (target == kernel.index_of.end()) stop("unknown target: " + i.text);
    i.target = target->second;
  }
}

}  // namespace

void parse(const string& text, std::map<string, Kernel>& kernels) {
  std::istringstream stream(text);
  Kernel* kernel = nullptr;
  for (string line; std::getline(stream, line);) {
    if (line.empty()) continue;
    if (starts_with(line, "KERNEL ")) {
      Kernel next = parse_header(line);
      kernel = &(kernels[next.name] = next);
    } else {
      if (!kernel) stop("an instruction before the first kernel: " + line);
      kernel->code.push_back(parse_instruction(line));
      kernel->index_of[kernel->code.back().address] = static_cast<int>(kernel->code.size()) - 1;
    }
  }
  for (auto& [name, parsed] : kernels) resolve_targets(parsed);
}

}  // namespace emulator::sass
