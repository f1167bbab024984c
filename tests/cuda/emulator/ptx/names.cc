#include "names.h"

#include <stdlib.h>

#include <map>
#include <set>

namespace emulator::ptx {

bool parse_type(const std::string& name, Type& type) {
  static const std::map<std::string, Type> packed = {
      {"f16", {Kind::kFloat, 16, 1, Float::kHalf}},   {"bf16", {Kind::kFloat, 16, 1, Float::kBrain}},
      {"f16x2", {Kind::kFloat, 16, 2, Float::kHalf}}, {"bf16x2", {Kind::kFloat, 16, 2, Float::kBrain}},
      {"f32", {Kind::kFloat, 32, 1, Float::kSingle}}, {"f64", {Kind::kFloat, 64, 1, Float::kDouble}},
      {"u16x2", {Kind::kUnsigned, 16, 2}},            {"s16x2", {Kind::kSigned, 16, 2}},
      {"pred", {Kind::kPredicate, 1}},
  };
  const auto found = packed.find(name);
  if (found != packed.end()) {
    type = found->second;
    return true;
  }
  const size_t digits = name.find_first_not_of("usb");
  if (digits != 1 || name.find_first_not_of("0123456789", 1) != std::string::npos) return false;
  const int bits = atoi(name.c_str() + 1);
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) return false;
  type = {name[0] == 'u'   ? Kind::kUnsigned
          : name[0] == 's' ? Kind::kSigned
                           : Kind::kBits,
          bits};
  return true;
}

bool parse_special(const std::string& name, Special& special) {
  static const std::map<std::string, Special> names = {
      {"%tid.x", Special::kTidX},         {"%tid.y", Special::kTidY},
      {"%tid.z", Special::kTidZ},         {"%ntid.x", Special::kNtidX},
      {"%ntid.y", Special::kNtidY},       {"%ntid.z", Special::kNtidZ},
      {"%ctaid.x", Special::kCtaidX},     {"%ctaid.y", Special::kCtaidY},
      {"%ctaid.z", Special::kCtaidZ},     {"%nctaid.x", Special::kNctaidX},
      {"%nctaid.y", Special::kNctaidY},   {"%nctaid.z", Special::kNctaidZ},
      {"%laneid", Special::kLaneid},      {"%warpid", Special::kWarpid},
      {"%nwarpid", Special::kNwarpid},    {"%smid", Special::kSmid},
      {"%nsmid", Special::kNsmid},        {"%lanemask_eq", Special::kMaskEq},
      {"%lanemask_lt", Special::kMaskLt}, {"%lanemask_le", Special::kMaskLe},
      {"%lanemask_gt", Special::kMaskGt}, {"%lanemask_ge", Special::kMaskGe},
      {"%clock", Special::kClock},        {"%clock64", Special::kClock},
      {"%globaltimer", Special::kClock},  {"%dynamic_smem_size", Special::kDynamicShared},
      {"%total_smem_size", Special::kTotalShared},
  };
  const auto found = names.find(name);
  if (found == names.end()) return false;
  special = found->second;
  return true;
}

// Modifiers that change nothing here (cache hints, scopes, orders), or that a handler looks for.
bool known_modifier(const std::string& m) {
  static const std::set<std::string> known = {
      "aligned", "sync", "uni", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc", "weak",
      "gpu", "cta", "sys", "cluster", "proxy", "nc", "ca", "cg", "cs", "cv", "wb", "wt", "lu",
      "L1", "L2", "evict_first", "evict_last", "evict_normal", "evict_unchanged", "no_allocate",
      "approx", "full", "ftz", "sat", "satfinite", "relu", "NaN", "noftz", "rn", "rz", "rm", "rp",
      "rni", "rzi", "rmi", "rpi", "lo", "hi", "wide", "eq", "ne", "lt", "le", "gt", "ge", "ls", "hs",
      "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan", "and", "or", "xor", "popc", "red",
      "arrive", "warp", "add", "min", "max", "exch", "cas", "inc", "dec", "idx", "up", "down", "bfly",
      "ballot", "any", "all", "to", "async", "commit_group", "wait_group", "wait_all", "l", "r",
      "wrap", "clamp", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16", "shiftamt", "cc", "global",
      "const", "local", "param", "shared", "level", "v2", "v4", "v8", "launch_dependents", "wait"};
  return known.count(m.substr(0, m.find("::"))) > 0;
}

}  // namespace emulator::ptx
