// What PTX calls types, special registers and modifiers.
#pragma once

#include <string>

#include "program.h"

namespace emulator::ptx {

bool parse_type(const std::string& name, Type& type);
bool parse_special(const std::string& name, Special& special);
bool known_modifier(const std::string& m);

}  // namespace emulator::ptx
