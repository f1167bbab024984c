// Runs kernels of the form name(const uint32_t* in, uint32_t* out), for tests of the emulator.
//
//   snippet <program file> < cases
//
// A case is a line "kernel grid.x grid.y block.x block.y input output output_bytes".
#include <stdio.h>
#include <stdlib.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "executor.h"

int main(int argc, char** argv) {
  using emulator::Dim;
  if (argc != 2) emulator::stop("usage: snippet <program file> < cases");
  emulator::load_program(argv[1]);
  char kernel[256], input[4096], output[4096];
  Dim grid, block;
  size_t bytes;
  while (scanf("%255s %u %u %u %u %4095s %4095s %zu", kernel, &grid.x, &grid.y, &block.x, &block.y,
               input, output, &bytes) == 8) {
    std::ifstream file(input, std::ios::binary);
    std::vector<char> in{std::istreambuf_iterator<char>(file), {}};
    in.resize(in.size() + 16);  // an empty input still has an address
    std::vector<char> out(bytes);
    emulator::GlobalMemory memory;
    memory.allow(in.data(), in.size(), false);
    memory.allow(out.data(), out.size(), true);
    void *in_at = in.data(), *out_at = out.data(), *arguments[] = {&in_at, &out_at};
    emulator::Counters counters;
    emulator::run_kernel({kernel, grid, block, 0, arguments}, memory, counters);
    std::ofstream(output, std::ios::binary).write(out.data(), out.size());
  }
  return 0;
}
