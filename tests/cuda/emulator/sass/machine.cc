// What a machine holds: operands, constants, memory.
#include "machine.h"

#include <sstream>

namespace emulator::sass {

namespace {

// Constant bank 0: the launch's sizes come first, then what the driver keeps there, then parameters.
constexpr int kBlockSizeAt = 0, kGridSizeAt = 12, kStackAt = 0x28;
constexpr int kStackBytes = 1 << 12;

}  // namespace

Machine::Machine(const Kernel& kernel, const Launch& launch, const GlobalMemory& memory,
                 Counters& counters)
    : kernel_(kernel), launch_(launch), memory_(memory), counters_(counters), seed_(launch.seed) {
  fill_constants();
  warps_.resize((launch.block.count() + kWarpLanes - 1) / kWarpLanes);
  executed_.assign(kernel.code.size(), 0);
}

void Machine::fill_constants() {
  constants_.assign(4096, 0);
  const auto put = [&](int offset, const void* data, int bytes) {
    if (constants_.size() < static_cast<size_t>(offset + bytes)) constants_.resize(offset + bytes);
    memcpy(&constants_[offset], data, bytes);
  };
  const uint32_t stack = kStackBytes;
  put(kBlockSizeAt, &launch_.block, 12);
  put(kGridSizeAt, &launch_.grid, 12);
  put(kStackAt, &stack, 4);
  for (size_t i = 0; i < kernel_.parameters.size(); ++i)
    put(kernel_.parameters[i].first, launch_.arguments[i], kernel_.parameters[i].second);
}

// ---- Operands -----------------------------------------------------------------------------------

uint32_t Machine::bits(const Operand& o, int lane) const {
  uint32_t value = 0;
  switch (o.place) {
    case Place::kRegister: value = o.index == kZeroRegister ? 0 : warp_->registers[o.index][lane]; break;
    case Place::kUniform: value = o.index == kZeroUniform ? 0 : warp_->uniforms[o.index]; break;
    case Place::kInteger: value = static_cast<uint32_t>(o.value); break;
    case Place::kReal: value = static_cast<uint32_t>(encode(o.real[0], Float::kSingle)); break;
    case Place::kConstant: memcpy(&value, constant(o.index, address(o, lane), 4), 4); break;
    default: fail("operand cannot be read", lane);
  }
  return o.inverted ? ~value : value;
}

uint64_t Machine::pair(const Operand& o, int lane) const {
  uint64_t value = bits(o, lane);
  if (o.place == Place::kInteger) return sign_extend(o.value, 64);
  const bool zero = o.index == (o.place == Place::kRegister ? kZeroRegister : kZeroUniform);
  if (o.place == Place::kConstant) {
    memcpy(&value, constant(o.index, address(o, lane), 8), 8);
    return o.inverted ? ~value : value;
  }
  Operand upper = o;
  if (!zero) ++upper.index;
  return value | static_cast<uint64_t>(bits(upper, lane)) << 32;
}

uint32_t Machine::integer(const Operand& o, int lane) const {
  const uint32_t value = bits(o, lane);
  const uint32_t size = o.absolute && value >> 31 ? -value : value;
  return o.minus ? -size : size;
}

uint32_t Machine::single_bits(const Operand& o, int lane, bool flush) const {
  uint32_t value = bits(o, lane);
  if (flush) value = static_cast<uint32_t>(flush_subnormal(value, Float::kSingle));
  if (o.absolute) value &= 0x7fffffffu;
  return o.minus ? value ^ 0x80000000u : value;
}

double Machine::single(const Operand& o, int lane, bool flush) const {
  return decode(single_bits(o, lane, flush), Float::kSingle);
}

bool Machine::predicate(const Operand& o, int lane) const {
  bool value = true;
  if (o.place == Place::kPredicate) {
    value = o.index == kTrue || warp_->predicates[o.index][lane];
  } else if (o.place == Place::kUniformPredicate) {
    value = o.index == kTrue || warp_->uniform_predicates[o.index];
  } else {
    fail("operand is not a predicate", lane);
  }
  return value != o.inverted;
}

void Machine::set(const Operand& o, int lane, uint32_t value) {
  if (o.place == Place::kRegister) {
    if (o.index != kZeroRegister) warp_->registers[o.index][lane] = value;
  } else if (o.place == Place::kUniform) {
    if (o.index != kZeroUniform) warp_->uniforms[o.index] = value;
  } else {
    fail("operand cannot be written", lane);
  }
}

void Machine::set_pair(const Operand& o, int lane, uint64_t value) {
  set(o, lane, static_cast<uint32_t>(value));
  const bool zero = o.index == (o.place == Place::kRegister ? kZeroRegister : kZeroUniform);
  Operand upper = o;
  if (!zero) ++upper.index;
  set(upper, lane, static_cast<uint32_t>(value >> 32));
}

void Machine::set_predicate(const Operand& o, int lane, bool value) {
  if (o.index == kTrue) return;
  if (o.place == Place::kPredicate) {
    warp_->predicates[o.index][lane] = value;
  } else if (o.place == Place::kUniformPredicate) {
    warp_->uniform_predicates[o.index] = value;
  } else {
    fail("operand is not a predicate", lane);
  }
}

uint64_t Machine::special(const std::string& name, int lane) const {
  const unsigned thread = warp_->index * kWarpLanes + lane;
  const Dim& block = launch_.block;
  if (name == "SRZ" || name == "SR_CgaCtaId" || name == "SR_SMID" || name == "SR_VIRTUALSMID")
    return 0;
  if (name == "SR_TID.X") return thread % block.x;
  if (name == "SR_TID.Y") return thread / block.x % block.y;
  if (name == "SR_TID.Z") return thread / block.x / block.y;
  if (name == "SR_CTAID.X") return block_index_.x;
  if (name == "SR_CTAID.Y") return block_index_.y;
  if (name == "SR_CTAID.Z") return block_index_.z;
  if (name == "SR_LANEID") return lane;
  if (name == "SR_EQMASK") return 1u << lane;
  if (name == "SR_LTMASK") return (1u << lane) - 1;
  if (name == "SR_LEMASK") return (2u << lane) - 1;
  if (name == "SR_GTMASK") return ~((2u << lane) - 1);
  if (name == "SR_GEMASK") return ~((1u << lane) - 1);
  if (name == "SR_CLOCKLO" || name == "SR_CLOCKHI" || name == "SR_GLOBALTIMERLO") return clock_;
  fail("special register is not supported", lane);
}

// ---- Messages -----------------------------------------------------------------------------------

std::string Machine::where(int lane) const {
  std::ostringstream text;
  text << kernel_.name << ": block " << block_index_.x << " warp " << warp_->index << " lane "
       << lane << ": ";
  return text.str();
}

void Machine::fail(const std::string& message, int lane) const {
  std::ostringstream text;
  text << where(lane) << message << "\n    /*" << std::hex << now_->address << "*/ " << now_->text;
  stop(text.str());
}

void Machine::warn(const std::string& message, int lane) {
  std::ostringstream text;
  text << where(lane) << message << "\n    /*" << std::hex << now_->address << "*/ " << now_->text;
  counters_.warn(text.str());
}

// ---- Memory -------------------------------------------------------------------------------------

uint64_t Machine::address(const Operand& o, int lane) const {
  const Memory& m = o.memory;
  uint64_t address = 0;
  if (m.reg >= 0) {
    Operand reg;
    reg.place = Place::kRegister;
    reg.index = m.reg;
    address = m.wide ? pair(reg, lane) : static_cast<uint64_t>(bits(reg, lane)) * m.scale;
  }
  if (m.uniform >= 0) {
    Operand reg;
    reg.place = Place::kUniform;
    reg.index = m.uniform;
    address += m.wide_uniform ? pair(reg, lane) : bits(reg, lane);
  }
  address += m.offset;
  return m.wide || m.wide_uniform ? address : address & 0xffffffffu;
}

uint8_t* Machine::global(uint64_t address, int bytes, bool write, int lane) const {
  const char* fault = memory_.fault(address, bytes, write);
  if (fault) fail(fault, lane);
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* Machine::shared(uint64_t address, int bytes, Access access, int lane) {
  if (address % bytes) fail("misaligned shared access", lane);
  if (address < kSystemShared || address + bytes > shared_.size())
    fail("shared address out of range", lane);
  const std::string wrong = shared_.touch(address, bytes, access, warp_->index);
  if (!wrong.empty()) warn(wrong, lane);
  return shared_.data() + address;
}

uint8_t* Machine::local(uint64_t address, int bytes, int lane) {
  if (address % bytes) fail("misaligned local access", lane);
  if (address + bytes > kStackBytes) fail("local address out of range", lane);
  if (local_.empty()) local_.assign(warps_.size() * kWarpLanes * kStackBytes, 0xcd);
  const size_t thread = warp_->index * kWarpLanes + lane;
  return &local_[thread * kStackBytes + address];
}

const uint8_t* Machine::constant(int bank, uint64_t offset, int bytes) const {
  if (bank != 0) fail("only constant bank 0 is supported", 0);
  if (offset + bytes > constants_.size()) fail("constant address out of range", 0);
  return &constants_[offset];
}

void Machine::copy_async(int lane, uint64_t to, uint64_t from, int bytes, int read_bytes) {
  if (read_bytes) global(from, bytes, false, lane);
  if (to % bytes || to < kSystemShared || to + bytes > shared_.size())
    fail("shared address misaligned or out of range", lane);
  const std::string wrong =
      warp_->copies.add(lane, to, from, bytes, read_bytes, shared_, warp_->index);
  if (!wrong.empty()) warn(wrong, lane);
}

void Machine::wait_async(uint32_t lanes, int allowed) {
  const std::string wrong = warp_->copies.wait(lanes, allowed, shared_, warp_->index);
  if (!wrong.empty()) warn(wrong, 0);
}

}  // namespace emulator::sass
