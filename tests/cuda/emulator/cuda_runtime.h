// The device that the launcher's host code sees. See cuda_runtime.cc.
#pragma once

#include <stddef.h>

#include <string>

#include "executor.h"

namespace emulator {

struct Device {
  GlobalMemory memory;
  size_t shared_limit = 227 << 10;  // that a kernel can ask for, per block
  int multiprocessors = 1;          // each runs one block at a time
  Counters counters;
  std::string kernels;  // names of what was launched since the last clear(), joined by "+"
  uint32_t seed = 1;
  void clear();
};

Device& device();

}  // namespace emulator
