// What an emulator of one machine language offers. A program is linked with one implementation:
// ptx/ (what nvcc wrote) or sass/ (what ptxas made of it).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

#include "memory.h"

namespace emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  uint64_t count() const { return static_cast<uint64_t>(x) * y * z; }
};

struct Launch {
  std::string kernel;
  Dim grid, block;
  size_t shared_bytes;  // dynamic
  void** arguments;     // pointers to the parameters' values, in order
  uint32_t seed = 1;    // determines the order of warps
};

// Reads a file with the text of kernels; adds to what was loaded before.
void load_program(const std::string& file);

// Runs every block of the grid, one after the other, and adds to the counters. An error of the
// kernel ends the process with a message and status 98; lesser faults count as warnings.
void run_kernel(const Launch& launch, const GlobalMemory& memory, Counters& counters);

}  // namespace emulator
