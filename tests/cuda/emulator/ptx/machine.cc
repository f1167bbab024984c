// What a machine holds: operands, special registers, memory.
#include "machine.h"

#include <algorithm>
#include <sstream>

namespace emulator::ptx {

namespace {
constexpr uint64_t kOffsetBits = kSharedWindow - 1;
}  // namespace

Machine::Machine(const Kernel& kernel, const Launch& launch, const GlobalMemory& memory,
                 Counters& counters)
    : kernel_(kernel), launch_(launch), memory_(memory), counters_(counters), seed_(launch.seed) {
  parameters_.assign(kernel.parameter_bytes + 16, 0);
  for (size_t i = 0; i < kernel.parameters.size(); ++i)
    memcpy(&parameters_[kernel.parameters[i].first], launch.arguments[i],
           kernel.parameters[i].second);
  warps_.resize((launch.block.count() + kWarpLanes - 1) / kWarpLanes);
  executed_.assign(kernel.code.size(), 0);
}

// ---- Operands -----------------------------------------------------------------------------------

uint64_t Machine::special(Special name, int lane) const {
  const unsigned thread = warp_->index * kWarpLanes + lane;
  const Dim &block = launch_.block, &grid = launch_.grid;
  switch (name) {
    case Special::kTidX: return thread % block.x;
    case Special::kTidY: return thread / block.x % block.y;
    case Special::kTidZ: return thread / block.x / block.y;
    case Special::kNtidX: return block.x;
    case Special::kNtidY: return block.y;
    case Special::kNtidZ: return block.z;
    case Special::kCtaidX: return block_index_.x;
    case Special::kCtaidY: return block_index_.y;
    case Special::kCtaidZ: return block_index_.z;
    case Special::kNctaidX: return grid.x;
    case Special::kNctaidY: return grid.y;
    case Special::kNctaidZ: return grid.z;
    case Special::kLaneid: return lane;
    case Special::kWarpid: return warp_->index;
    case Special::kNwarpid: return warps_.size();
    case Special::kSmid: return 0;
    case Special::kNsmid: return 1;
    case Special::kMaskEq: return 1u << lane;
    case Special::kMaskLt: return (1u << lane) - 1;
    case Special::kMaskLe: return (2u << lane) - 1;
    case Special::kMaskGt: return ~((2u << lane) - 1);
    case Special::kMaskGe: return ~((1u << lane) - 1);
    case Special::kClock: return clock_;
    case Special::kDynamicShared: return launch_.shared_bytes;
    case Special::kTotalShared: return shared_.size();
  }
  return 0;
}

uint64_t Machine::get(const Operand& operand, int lane) const {
  switch (operand.place) {
    case Place::kRegister: {
      const uint64_t value = warp_->registers[operand.reg * kWarpLanes + lane];
      return operand.negated ? !value : value;
    }
    case Place::kImmediate:
    case Place::kShared:
    case Place::kParameter: return operand.value;
    case Place::kSpecial: return special(static_cast<Special>(operand.value), lane);
    case Place::kVector: {
      const int bits = now_->type.bits / static_cast<int>(operand.parts.size());
      uint64_t value = 0;
      for (size_t i = 0; i < operand.parts.size(); ++i)
        value |= (get(operand.parts[i], lane) & low_bits(bits)) << (bits * i);
      return value;
    }
    default: fail("operand cannot be read", lane);
  }
}

void Machine::set_register(int reg, int lane, uint64_t value) {
  warp_->registers[reg * kWarpLanes + lane] = value & low_bits(kernel_.register_bits[reg]);
}

void Machine::set(const Operand& operand, int lane, uint64_t value) {
  if (operand.place == Place::kRegister) {
    set_register(operand.reg, lane, value);
  } else if (operand.place == Place::kVector) {
    const int bits = now_->type.bits / static_cast<int>(operand.parts.size());
    for (size_t i = 0; i < operand.parts.size(); ++i)
      set(operand.parts[i], lane, value >> (bits * i) & low_bits(bits));
  }
}

// ---- Messages -----------------------------------------------------------------------------------

std::string Machine::where(int lane) const {
  std::ostringstream text;
  text << kernel_.name << ": block " << block_index_.x << " warp " << warp_->index << " lane "
       << lane << ": ";
  return text.str();
}

void Machine::fail(const std::string& message, int lane) const {
  stop(where(lane) + message + "\n    " + now_->text +
       (now_->line ? "   line " + std::to_string(now_->line) : ""));
}

void Machine::warn(const std::string& message, int lane) {
  counters_.warn(where(lane) + message + "\n    " + now_->text +
                 (now_->line ? "   line " + std::to_string(now_->line) : ""));
}

// ---- Memory -------------------------------------------------------------------------------------

uint64_t Machine::address(const Operand& operand, int lane) const {
  if (operand.base != Place::kRegister) return operand.value;
  const uint64_t base = warp_->registers[operand.reg * kWarpLanes + lane];
  return (base + operand.value) & low_bits(kernel_.register_bits[operand.reg]);
}

Space Machine::resolve(Space space, uint64_t address) const {
  if (space != Space::kGeneric) return space;
  return address & kSharedWindow  ? Space::kShared
         : address & kLocalWindow ? Space::kLocal
                                  : Space::kGlobal;
}

uint8_t* Machine::at(Space space, uint64_t address, int bytes, Access access, int lane) {
  space = resolve(space, address);
  if (space == Space::kGlobal) {
    const char* fault = memory_.fault(address, bytes, access != Access::kRead);
    if (fault) fail(fault, lane);
    return reinterpret_cast<uint8_t*>(address);
  }
  if (address % bytes) fail("misaligned access of " + std::to_string(bytes) + " bytes", lane);
  if (space == Space::kShared) {
    address &= kOffsetBits;
    if (address + bytes > shared_.size()) fail("shared address out of range", lane);
    const std::string wrong = shared_.touch(address, bytes, access, warp_->index);
    if (!wrong.empty()) warn(wrong, lane);
    return shared_.data() + address;
  }
  if (space == Space::kParameter) {
    if (address + bytes > parameters_.size()) fail("parameter address out of range", lane);
    return &parameters_[address];
  }
  address &= kOffsetBits;
  if (address + bytes > static_cast<uint64_t>(kernel_.local_bytes))
    fail("local address out of range", lane);
  const size_t thread = warp_->index * kWarpLanes + lane;
  return &local_[thread * kernel_.local_bytes + address];
}

void Machine::copy_async(uint32_t lanes) {
  const auto& operands = now_->operands;
  uint64_t from[kWarpLanes];
  int bytes = 0;
  each(lanes, [&](int lane) {
    bytes = get(operands[2], lane);
    const int read = operands.size() > 3 ? get(operands[3], lane) : bytes;
    const uint64_t to = address(operands[0], lane) & kOffsetBits;
    from[lane] = address(operands[1], lane);
    if (bytes != 4 && bytes != 8 && bytes != 16) fail("copies have 4, 8 or 16 bytes", lane);
    if (to % bytes || from[lane] % bytes) fail("misaligned asynchronous copy", lane);
    if (to + bytes > shared_.size()) fail("shared address out of range", lane);
    const char* fault = read ? memory_.fault(from[lane], bytes, false) : nullptr;
    if (fault) fail(fault, lane);
    const std::string wrong = warp_->copies.add(lane, to, from[lane], bytes, std::min(read, bytes),
                                                shared_, warp_->index);
    if (!wrong.empty()) warn(wrong, lane);
  });
  if (lanes) counters_.count_global(lanes, from, bytes, false);
}

void Machine::wait_async(uint32_t lanes, int allowed_groups) {
  const std::string wrong = warp_->copies.wait(lanes, allowed_groups, shared_, warp_->index);
  if (!wrong.empty()) warn(wrong, 0);
}

}  // namespace emulator::ptx
