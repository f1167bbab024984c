// Reads PTX text. What the emulator does not know, be it an opcode or a modifier, stops it.
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "memory.h"
#include "names.h"
#include "program.h"
#include "text.h"

namespace emulator::ptx {

namespace {

using std::string;
using std::vector;

struct Symbol {
  Place place;
  uint64_t value;
};
using Symbols = std::map<string, Symbol>;

uint64_t parse_number(const string& text) {
  const bool float_bits = text.size() > 2 && text[0] == '0' && strchr("fFdD", text[1]);
  if (float_bits) return strtoull(text.c_str() + 2, nullptr, 16);
  return text[0] == '-' ? static_cast<uint64_t>(strtoll(text.c_str(), nullptr, 0))
                        : strtoull(text.c_str(), nullptr, 0);
}

// A declaration such as ".shared .align 4 .b8 name[1024]".
struct Declaration {
  explicit Declaration(const string& text) {
    const vector<string> words = words_of(text);
    Type type;
    for (size_t i = 0; i < words.size(); ++i) {
      if (words[i] == ".align") {
        align = atoi(words[++i].c_str());
      } else if (words[i][0] != '.') {
        name = words[i];
      } else if (words[i] == ".shared" || words[i] == ".local" || words[i] == ".param") {
        space = words[i];
      } else {
        parse_type(words[i].substr(1), type);  // or a word such as .visible
      }
    }
    const size_t bracket = name.find('[');
    bytes = type.bits / 8;
    align = std::max<size_t>(align, bytes);
    if (bracket == string::npos) return;
    bytes *= strtoull(name.c_str() + bracket + 1, nullptr, 0);  // [] is 0: dynamic shared memory
    name.resize(bracket);
  }
  size_t place(int& total) const {
    const size_t offset = (total + align - 1) / align * align;
    total = offset + bytes;
    return offset;
  }
  string name, space;
  size_t align = 1, bytes = 0;
};

class Parser {
 public:
  Parser(const string& text, std::map<string, Kernel>& kernels) : kernels_(kernels) { clean(text); }
  void run();

 private:
  void clean(const string& text);
  void parse_parameters(const string& list);
  void parse_body();
  void parse_statement(const string& statement);
  void parse_registers(const string& statement);
  void parse_instruction(string statement);
  void apply_modifiers(Instruction& instruction);
  Operand parse_operand(string text);
  void declare(const Declaration& declaration);
  int find_register(const string& name) const;
  void skip_space() {
    while (at_ < text_.size() && isspace(text_[at_])) ++at_;
  }

  std::map<string, Kernel>& kernels_;
  string text_;
  size_t at_ = 0;
  int line_ = 0;
  Kernel kernel_;
  Symbols symbols_;
  vector<Declaration> module_shared_;
  vector<std::map<string, int>> scopes_;
  std::map<string, int> labels_;
  vector<std::pair<int, string>> branches_;
};

// Drops comments and directives about files; a .loc becomes a statement, for error messages.
void Parser::clean(const string& text) {
  string plain;
  for (size_t i = 0; i < text.size();) {
    if (text.compare(i, 2, "//") == 0) {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.compare(i, 2, "/*") == 0) {
      i = text.find("*/", i) + 2;
    } else {
      plain += text[i++];
    }
  }
  for (size_t i = 0; i < plain.size();) {
    const size_t end = std::min(plain.find('\n', i), plain.size());
    const string line = plain.substr(i, end - i);
    const vector<string> words = words_of(line);
    i = end + 1;
    if (words.empty()) continue;
    if (words[0] == ".loc") {
      text_ += "@LOC " + words[2] + ";\n";
    } else if (words[0] != ".file" && words[0] != ".version" && words[0] != ".target" &&
               words[0] != ".address_size") {
      text_ += line + "\n";
    }
  }
}

int Parser::find_register(const string& name) const {
  for (size_t i = scopes_.size(); i-- > 0;) {
    const auto found = scopes_[i].find(name);
    if (found != scopes_[i].end()) return found->second;
  }
  return -1;
}

Operand Parser::parse_operand(string text) {
  Operand operand;
  text = trim(text);
  if (text.empty()) stop("empty operand");
  if (text[0] == '{') {
    operand.place = Place::kVector;
    for (const string& part : split(text.substr(1, text.size() - 2), ','))
      operand.parts.push_back(parse_operand(part));
    return operand;
  }
  if (text[0] == '[') {
    const string inside = text.substr(1, text.size() - 2);
    const size_t plus = inside.find('+');
    operand = parse_operand(inside.substr(0, plus));
    operand.base = operand.place;
    operand.place = Place::kMemory;
    if (plus != string::npos) operand.value += parse_number(trim(inside.substr(plus + 1)));
    return operand;
  }
  const size_t bar = text.find('|');
  if (bar != string::npos) {
    operand = parse_operand(text.substr(0, bar));
    operand.second = parse_operand(text.substr(bar + 1)).reg;
    return operand;
  }
  if (text == "_") return operand.place = Place::kSink, operand;
  operand.negated = text[0] == '!';
  if (operand.negated) text = trim(text.substr(1));
  operand.reg = find_register(text);
  Special special;
  const auto symbol = symbols_.find(text);
  if (operand.reg >= 0) {
    operand.place = Place::kRegister;
  } else if (parse_special(text, special)) {
    operand.place = Place::kSpecial;
    operand.value = static_cast<uint64_t>(special);
  } else if (text == "WARP_SZ") {
    operand.place = Place::kImmediate;
    operand.value = kWarpLanes;
  } else if (isdigit(text[0]) || text[0] == '-') {
    operand.place = Place::kImmediate;
    operand.value = parse_number(text);
  } else if (symbol != symbols_.end()) {
    operand.place = symbol->second.place;
    operand.value = symbol->second.value;
  } else {
    stop("unknown operand '" + text + "'");
  }
  return operand;
}

void Parser::declare(const Declaration& declaration) {
  if (declaration.space == ".shared") {
    symbols_[declaration.name] = {Place::kShared, declaration.place(kernel_.shared_bytes)};
  } else if (declaration.space == ".local") {
    symbols_[declaration.name] = {Place::kImmediate,
                                  kLocalWindow + declaration.place(kernel_.local_bytes)};
  } else {
    stop("unsupported declaration of " + declaration.name + " in " + declaration.space);
  }
}

void Parser::parse_registers(const string& statement) {
  const vector<string> words = words_of(statement);
  Type type;
  if (!parse_type(words[1].substr(1), type)) stop("unsupported register type " + words[1]);
  const size_t names = statement.find(words[1]) + words[1].size();
  for (const string& name : split(statement.substr(names), ',')) {
    const size_t angle = name.find('<');
    const int count = angle == string::npos ? 1 : atoi(name.c_str() + angle + 1);
    for (int i = 0; i < count; ++i) {
      const string full =
          angle == string::npos ? name : name.substr(0, angle) + std::to_string(i);
      scopes_.back()[full] = kernel_.register_bits.size();
      kernel_.register_bits.push_back(type.bits);
    }
  }
}

void Parser::apply_modifiers(Instruction& i) {
  static const std::map<string, Rounding> roundings = {{"rz", Rounding::kZero},
                                                       {"rm", Rounding::kDown},
                                                       {"rp", Rounding::kUp}};
  static const std::map<string, Space> spaces = {{"global", Space::kGlobal},
                                                 {"const", Space::kGlobal},
                                                 {"shared", Space::kShared},
                                                 {"local", Space::kLocal},
                                                 {"param", Space::kParameter}};
  int types = 0;
  for (const string& m : i.modifiers) {
    Type type;
    const auto rounding = roundings.find(m);
    const auto space = spaces.find(m.substr(0, m.find("::")));
    if (parse_type(m, type)) {
      (types++ ? i.source : i.type) = type;
      continue;
    }
    if (!known_modifier(m)) stop("modifier ." + m + " is not supported: " + i.text);
    if (m == "L2::cache_hint") stop("cache policies are not supported: " + i.text);
    if (rounding != roundings.end()) i.rounding = rounding->second;
    if (space != spaces.end() && i.space == Space::kGeneric) i.space = space->second;
    if (m[0] == 'v' && isdigit(m[1])) i.vector = m[1] - '0';
    i.high |= m == "hi";
    i.wide |= m == "wide";
    i.flush |= m == "ftz";
    i.saturate |= m == "sat";
    i.relu |= m == "relu";
    i.nan |= m == "NaN";
  }
  if (types == 1) i.source = i.type;
}

void Parser::parse_instruction(string statement) {
  Instruction i;
  i.text = statement;
  i.line = line_;
  if (statement[0] == '@') {
    const size_t end = statement.find_first_of(" \t\n");
    string guard = statement.substr(1, end - 1);
    i.predicate_negated = guard[0] == '!';
    i.predicate = find_register(guard.substr(i.predicate_negated));
    if (i.predicate < 0) stop("unknown predicate: " + statement);
    statement = trim(statement.substr(end));
  }
  const size_t end = statement.find_first_of(" \t\n{");
  i.name = statement.substr(0, end);
  const string rest = end == string::npos ? "" : trim(statement.substr(end));
  i.modifiers = split(i.name, '.');
  i.opcode = i.modifiers[0];
  i.modifiers.erase(i.modifiers.begin());
  i.handler = find_handler(i.opcode);
  if (!i.handler) stop("instruction is not supported: " + i.text);
  apply_modifiers(i);
  if (i.opcode == "bra") {
    branches_.push_back({static_cast<int>(kernel_.code.size()), rest});
  } else {
    for (const string& operand : split(rest, ',')) i.operands.push_back(parse_operand(operand));
  }
  kernel_.code.push_back(i);
}

void Parser::parse_statement(const string& statement) {
  if (statement.empty() || statement.compare(0, 7, ".pragma") == 0) return;
  if (statement.compare(0, 5, "@LOC ") == 0) {
    line_ = atoi(statement.c_str() + 5);
  } else if (statement.compare(0, 4, ".reg") == 0) {
    parse_registers(statement);
  } else if (statement[0] == '.') {
    declare(Declaration(statement));
  } else {
    parse_instruction(statement);
  }
}

void Parser::parse_body() {
  scopes_.assign(1, {});
  labels_.clear();
  branches_.clear();
  for (const Declaration& declaration : module_shared_) declare(declaration);
  for (int depth = 1; depth > 0;) {
    skip_space();
    if (at_ >= text_.size()) stop("the body of " + kernel_.name + " does not end");
    if (text_[at_] == '{') {
      ++depth, ++at_;
      scopes_.emplace_back();
    } else if (text_[at_] == '}') {
      --depth, ++at_;
      scopes_.pop_back();
    } else {
      const size_t colon = text_.find_first_of(";: \t\n", at_);
      if (text_[colon] == ':' && text_[colon + 1] != ':') {
        labels_[text_.substr(at_, colon - at_)] = kernel_.code.size();
        at_ = colon + 1;
        continue;
      }
      const size_t end = text_.find(';', at_);
      parse_statement(trim(text_.substr(at_, end - at_)));
      at_ = end + 1;
    }
  }
  for (const auto& [index, label] : branches_) {
    if (!labels_.count(label)) stop("unknown label " + label);
    kernel_.code[index].target = labels_[label];
  }
  parse_instruction("ret");
}

void Parser::parse_parameters(const string& list) {
  for (const string& text : split(list, ',')) {
    const Declaration parameter(text);
    const int offset = parameter.place(kernel_.parameter_bytes);
    symbols_[parameter.name] = {Place::kParameter, static_cast<uint64_t>(offset)};
    kernel_.parameters.push_back({offset, static_cast<int>(parameter.bytes)});
  }
}

void Parser::run() {
  while (skip_space(), at_ < text_.size()) {
    const size_t end = text_.find_first_of(";{(", at_);
    if (end == string::npos) break;
    const string head = text_.substr(at_, end - at_);
    if (head.find(".entry") != string::npos) {
      kernel_ = Kernel();
      kernel_.name = words_of(head.substr(head.find(".entry") + 6))[0];
      symbols_.clear();
      const size_t close = text_[end] == '(' ? text_.find(')', end) : end;
      if (close != end) parse_parameters(text_.substr(end + 1, close - end - 1));
      at_ = text_.find('{', close) + 1;
      parse_body();
      kernels_[kernel_.name] = kernel_;
    } else if (head.find(".shared") != string::npos) {
      module_shared_.emplace_back(head);
      at_ = end + 1;
    } else if (head.find(".section") != string::npos) {
      at_ = text_.find('}', end) + 1;
    } else {
      stop("only kernels and shared memory are supported at module level: " + trim(head));
    }
  }
}

}  // namespace

void parse(const string& text, std::map<string, Kernel>& kernels) { Parser(text, kernels).run(); }

}  // namespace emulator::ptx
