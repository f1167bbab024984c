// Executes a CUDA kernel's source on a CPU: every CUDA thread is a fiber, and blocks run in order.
//
// A fiber runs until it reaches a barrier or a warp operation, so everything between two of them is
// atomic. The next fiber is drawn at random: first a warp, which then runs, lane by lane in a new
// random order, as far as it can or for a random number of rounds. A missing barrier or __syncwarp
// shows as a wrong result under some seed. Misuse stops the process with a message: lanes that meet
// in different operations, a lane outside its own mask, a barrier that not all threads reach.
//
// Emulated: grids of one or two dimensions, one-dimensional blocks, dynamic shared memory, and the operations below. Not
// emulated: memory ordering, inline assembly (the kernel has portable twins), time.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATION_UCONTEXT 1  // the sanitizer follows swapcontext but not longjmp to a fiber
#endif

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace cuda_emulation {

constexpr int kWarpLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

struct Index {
  unsigned x = 0, y = 0;
};

enum class Wait { kNothing, kBarrier, kWarp, kDone };
enum class Operation { kNone, kSyncWarp, kBallot, kShuffle, kReduce, kMatch };

// A switchable stack. setjmp changes fibers without a system call; the first entry needs ucontext.
class Fiber {
 public:
  Fiber() : stack_(new char[kStackBytes]) {}

  void prepare(void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    started_ = false;
  }

  // From the scheduler into the fiber, until it yields.
  void resume() {
#if defined(CUDA_EMULATION_UCONTEXT)
    swapcontext(&scheduler_, &context_);
#else
    if (_setjmp(scheduler_) != 0) return;
    if (started_) _longjmp(position_, 1);
    started_ = true;
    setcontext(&context_);
#endif
  }

  void yield() {
#if defined(CUDA_EMULATION_UCONTEXT)
    swapcontext(&context_, &scheduler_);
#else
    if (_setjmp(position_) == 0) _longjmp(scheduler_, 1);
#endif
  }

  Wait wait = Wait::kNothing;
  Index thread;

 private:
  std::unique_ptr<char[]> stack_;
  ucontext_t context_;
  bool started_ = false;
#if defined(CUDA_EMULATION_UCONTEXT)
  ucontext_t scheduler_;
#else
  jmp_buf position_, scheduler_;
#endif
};

// The values that a warp's lanes bring to the operation in which they meet. Results stay readable
// until the next operation but one, hence two buffers.
struct Warp {
  Operation operation = Operation::kNone;
  int line = 0;
  uint32_t mask = 0, arrived = 0;
  unsigned meetings = 0;
  uint64_t brought[2][kWarpLanes] = {};
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  template <class Kernel, class... Args>
  void launch(Index blocks, unsigned threads, size_t shared_bytes, uint64_t seed, Kernel kernel,
              Args... args) {
    random_ = seed * 2 + 1;
    block_size.x = threads;
    grid_size = blocks;
    body_ = [=] { kernel(args...); };
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    // Exactly the bytes requested, so that a sanitizer sees an access behind them.
    for (block_index.y = 0; block_index.y < blocks.y; ++block_index.y) {
      for (block_index.x = 0; block_index.x < blocks.x; ++block_index.x) {
        shared_.reset(new uint32_t[shared_bytes / sizeof(uint32_t)]);
        litter(shared_bytes / sizeof(uint32_t));
        run(threads);
      }
    }
  }

  uint32_t* shared_words() { return shared_.get(); }
  Index thread_index() const { return running_->thread; }
  int lane() const { return running_->thread.x % kWarpLanes; }

  void barrier(int line) {
    if (barrier_arrived_ > 0 && line != barrier_line_) fail("barriers of different lines meet");
    barrier_line_ = line;
    ++barrier_arrived_;
    running_->wait = Wait::kBarrier;
    running_->yield();
  }

  // Returns every lane's value, once all lanes of the mask have arrived.
  const uint64_t* meet(uint32_t mask, Operation operation, uint64_t value, int line) {
    Warp& warp = warps_[running_->thread.x / kWarpLanes];
    if ((mask >> lane() & 1) == 0) fail("a lane is not in its own mask");
    if (warp.arrived != 0 &&
        (warp.operation != operation || warp.line != line || warp.mask != mask))
      fail("lanes of a warp meet in different operations");
    warp.operation = operation, warp.line = line, warp.mask = mask;
    uint64_t* brought = warp.brought[warp.meetings % 2];
    brought[lane()] = value;
    warp.arrived |= 1u << lane();
    running_->wait = Wait::kWarp;
    running_->yield();
    return brought;
  }

  Index block_index, block_size, grid_size;

 private:
  static void enter() {
    Block& block = current();
    block.body_();
    block.running_->wait = Wait::kDone;
    block.running_->yield();
  }

  // Shared memory starts with arbitrary words, as if left by earlier blocks, or with small ones
  // that could pass for counters.
  void litter(size_t words) {
    const uint32_t below = draw(2) ? 64 : 0xffffffffu;
    for (size_t i = 0; i < words; ++i) shared_[i] = draw(below);
  }

  uint32_t draw(uint32_t below) {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>((random_ >> 33) % below);
  }

  void run(unsigned threads) {
    warps_.assign(threads / kWarpLanes, Warp());
    barrier_arrived_ = 0;
    for (unsigned i = 0; i < threads; ++i) {
      fibers_[i]->thread.x = i;
      fibers_[i]->wait = Wait::kNothing;
      fibers_[i]->prepare(enter);
    }
    for (;;) {
      const unsigned first = draw(warps_.size());
      bool moved = false;
      for (unsigned i = 0; i < warps_.size(); ++i) moved |= drive((first + i) % warps_.size());
      if (moved) continue;
      if (all_done(threads)) return;
      release_barrier(threads);
    }
  }

  // Runs one warp for some rounds; returns false if it could not move.
  bool drive(unsigned warp) {
    bool moved = false;
    for (unsigned rounds = draw(2) ? 1 + draw(4) : ~0u; rounds > 0; --rounds) {
      const unsigned start = draw(kWarpLanes), step = 2 * draw(kWarpLanes / 2) + 1;
      bool in_round = false;
      for (unsigned i = 0; i < kWarpLanes; ++i) {
        Fiber& fiber = *fibers_[warp * kWarpLanes + (start + i * step) % kWarpLanes];
        if (fiber.wait != Wait::kNothing) continue;
        running_ = &fiber;
        fiber.resume();
        in_round = true;
      }
      in_round |= release_warp(warp);
      if (!in_round) break;
      moved = true;
    }
    return moved;
  }

  bool release_warp(unsigned index) {
    Warp& warp = warps_[index];
    if (warp.arrived == 0 || warp.arrived != warp.mask) return false;
    for (int lane = 0; lane < kWarpLanes; ++lane)
      if (warp.arrived >> lane & 1) fibers_[index * kWarpLanes + lane]->wait = Wait::kNothing;
    warp.arrived = 0;
    ++warp.meetings;
    return true;
  }

  void release_barrier(unsigned threads) {
    if (barrier_arrived_ != threads) fail("deadlock: threads wait for different things");
    barrier_arrived_ = 0;
    for (unsigned i = 0; i < threads; ++i) fibers_[i]->wait = Wait::kNothing;
  }

  bool all_done(unsigned threads) const {
    for (unsigned i = 0; i < threads; ++i)
      if (fibers_[i]->wait != Wait::kDone) return false;
    return true;
  }

  [[noreturn]] void fail(const char* what) {
    fprintf(stderr, "cuda_emulation: %s (block %u, thread %u)\n", what, block_index.x,
            running_ ? running_->thread.x : 0);
    abort();
  }

  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::unique_ptr<uint32_t[]> shared_;
  Fiber* running_ = nullptr;
  unsigned barrier_arrived_ = 0;
  int barrier_line_ = 0;
  uint64_t random_ = 1;
};

inline uint32_t* shared_words() { return Block::current().shared_words(); }

template <class Combine>
uint32_t reduce(uint32_t mask, uint32_t value, int line, Combine combine) {
  const uint64_t* brought = Block::current().meet(mask, Operation::kReduce, value, line);
  uint32_t result = value;  // min, max and or may count the caller twice; add starts from zero
  for (int lane = 0; lane < kWarpLanes; ++lane)
    if (mask >> lane & 1) result = combine(result, static_cast<uint32_t>(brought[lane]));
  return result;
}

// The value of lane `from` of the calling lane's warp.
inline uint32_t shuffle(uint32_t mask, uint32_t value, int from, int line) {
  Block& block = Block::current();
  const int own = block.lane();
  const uint64_t* brought = block.meet(mask, Operation::kShuffle, value, line);
  const bool inside = from >= 0 && from < kWarpLanes && (mask >> from & 1);
  return static_cast<uint32_t>(brought[inside ? from : own]);
}

}  // namespace cuda_emulation

#define threadIdx (cuda_emulation::Block::current().thread_index())
#define blockIdx (cuda_emulation::Block::current().block_index)
#define blockDim (cuda_emulation::Block::current().block_size)
#define gridDim (cuda_emulation::Block::current().grid_size)

// Every operation takes its caller's line, to tell apart operations that must not meet.
#define CUDA_EMULATION_LINE int line = __builtin_LINE()

inline void __syncthreads(CUDA_EMULATION_LINE) { cuda_emulation::Block::current().barrier(line); }

inline void __syncwarp(uint32_t mask = 0xffffffffu, CUDA_EMULATION_LINE) {
  cuda_emulation::Block::current().meet(mask, cuda_emulation::Operation::kSyncWarp, 0, line);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, CUDA_EMULATION_LINE) {
  auto& block = cuda_emulation::Block::current();
  const uint64_t* brought =
      block.meet(mask, cuda_emulation::Operation::kBallot, predicate != 0, line);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) result |= static_cast<uint32_t>(brought[lane]) << lane;
  return result;
}

inline uint32_t __shfl_sync(uint32_t mask, uint32_t value, int from, CUDA_EMULATION_LINE) {
  return cuda_emulation::shuffle(mask, value, from, line);
}
inline uint32_t __shfl_up_sync(uint32_t mask, uint32_t value, unsigned by, CUDA_EMULATION_LINE) {
  const int own = cuda_emulation::Block::current().lane();
  return cuda_emulation::shuffle(mask, value, own - static_cast<int>(by), line);
}
inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t value, int flip, CUDA_EMULATION_LINE) {
  const int own = cuda_emulation::Block::current().lane();
  return cuda_emulation::shuffle(mask, value, own ^ flip, line);
}

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value, CUDA_EMULATION_LINE) {
  const uint32_t twice = cuda_emulation::reduce(
      mask, value, line, [](uint32_t a, uint32_t b) { return a + b; });
  return twice - value;
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value, CUDA_EMULATION_LINE) {
  return cuda_emulation::reduce(mask, value, line,
                                [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value, CUDA_EMULATION_LINE) {
  return cuda_emulation::reduce(mask, value, line,
                                [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}

inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline int __ffs(uint32_t word) { return __builtin_ffs(static_cast<int>(word)); }

template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
