// How a grid runs, the same for both languages: block by block, each warp as far as it goes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>
#include <vector>

#include "executor.h"

namespace emulator {

// Calls f(index) for every block of the grid.
template <class F>
void for_each_block(const Dim& grid, F f) {
  Dim index;
  for (index.z = 0; index.z < grid.z; ++index.z)
    for (index.y = 0; index.y < grid.y; ++index.y)
      for (index.x = 0; index.x < grid.x; ++index.x) f(index);
}

// Steps the warps of a block, in a random order, until no thread is left. step(warp) returns
// whether the warp could move; deadlock() is called, and must not return, when none can.
template <class Warp, class Step, class Deadlock>
void run_warps(std::vector<Warp>& warps, uint32_t& seed, const unsigned& live_threads, Step step,
               Deadlock deadlock) {
  std::vector<Warp*> order;
  for (Warp& warp : warps) order.push_back(&warp);
  for (size_t i = order.size(); i-- > 1;) {
    seed = seed * 1664525u + 1013904223u;
    std::swap(order[i], order[(seed >> 8) % (i + 1)]);
  }
  while (live_threads) {
    bool moved = false;
    for (Warp* warp : order)
      while (step(*warp)) moved = true;
    if (!moved && live_threads) deadlock();
  }
}

// Adds how often each instruction was executed to the counts of its opcode.
template <class Instruction>
void count_opcodes(const std::vector<Instruction>& code, const std::vector<uint64_t>& executed,
                   Counters& counters) {
  for (size_t pc = 0; pc < executed.size(); ++pc)
    if (executed[pc]) counters.opcodes[code[pc].name] += executed[pc];
}

}  // namespace emulator
