// Runs the operator's entry points in an emulator, case by case.
//
//   driver <multiprocessors> <program file>... < cases
//
// A case is a line "direction dtype mode rows hidden k input output". The direction is forward,
// backward or sparse, the input file holds x (otherwise: dy or x, then the bits), and the output
// file receives y and the bits (backward: dx). A sparse case turns the bits into indices of 1, 2, 4
// or 8 bytes (mode 0 to 3), gathers x there, scatters that and counts the bits; the output file
// receives the four results. The driver prints one JSON object with the counters per case. The
// emulator ends the process at an access out of bounds or a deadlock, and counts lesser faults
// (shared races) as warnings.
#include "topk_mask_cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "cuda_runtime.h"

namespace {

constexpr size_t kAlignment = 256;  // of memory from the CUDA allocator

struct Case {
  char direction[16], input[4096], output[4096];
  int dtype, mode, hidden, k;
  long rows;
  bool forward() const { return direction[0] == 'f'; }
};

[[noreturn]] void give_up(const char* message, const char* about) {
  fprintf(stderr, "driver: %s: %s\n", message, about);
  exit(2);
}

// Aligned like memory from the CUDA allocator; the emulator knows its exact size.
class Buffer {
 public:
  Buffer(size_t bytes, bool writable) : bytes_(bytes) {
    data_ = aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment);
    memset(data_, 0xee, bytes);
    emulator::device().memory.allow(data_, bytes, writable);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data_); }
  void read(FILE* file) {
    if (fread(data_, 1, bytes_, file) != bytes_) give_up("short input", "a case's file");
  }
  void write(FILE* file) const { fwrite(data_, 1, bytes_, file); }
  template <class T = void>
  T* pointer() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_;
};

FILE* open(const char* name, const char* mode) {
  FILE* file = fopen(name, mode);
  if (!file) give_up("cannot open", name);
  return file;
}

void print(const std::string& kernel, const emulator::Counters& c) {
  printf("{\"kernel\": \"%s\", \"warp_instructions\": %lu, \"thread_instructions\": %lu, "
         "\"load_requests\": %lu, \"load_sectors\": %lu, \"store_requests\": %lu, "
         "\"store_sectors\": %lu, \"shared_requests\": %lu, \"shared_wavefronts\": %lu, "
         "\"atomic_requests\": %lu, \"atomic_serial\": %lu, \"barriers\": %lu, "
         "\"warnings\": %d, \"opcodes\": {",
         kernel.c_str(), c.warp_instructions, c.thread_instructions, c.load_requests,
         c.load_sectors, c.store_requests, c.store_sectors, c.shared_requests,
         c.shared_wavefronts, c.atomic_requests, c.atomic_serial, c.barriers, c.warnings);
  const char* separator = "";
  for (const auto& [opcode, count] : c.opcodes) {
    printf("%s\"%s\": %lu", separator, opcode.c_str(), count);
    separator = ", ";
  }
  printf("}}\n");
  fflush(stdout);
}

void check(int error, const Case& c) {
  if (error) give_up("the launcher refused", (c.direction + (" " + std::to_string(error))).c_str());
}

void run_sparse(const Case& c) {
  const int word_bytes = c.dtype == 0 ? 4 : 2, index_bytes = 1 << c.mode;
  emulator::Device& device = emulator::device();
  device.clear();
  Buffer x(c.rows * c.hidden * word_bytes, false), bits(c.rows * ((c.hidden + 31) / 32) * 4, false);
  Buffer indices(c.rows * c.k * index_bytes, true), values(c.rows * c.k * word_bytes, true);
  Buffer dense(c.rows * c.hidden * word_bytes, true), counts(c.hidden * 8, true);
  FILE* file = open(c.input, "rb");
  x.read(file);
  bits.read(file);
  fclose(file);
  memset(counts.pointer(), 0, c.hidden * 8);
  check(topk_bits_to_indices_cuda(bits.pointer<uint32_t>(), indices.pointer(), c.rows, c.hidden,
                                  c.k, index_bytes, nullptr), c);
  check(topk_gather_row_cuda(x.pointer(), indices.pointer(), values.pointer(), c.rows, c.hidden,
                             c.k, word_bytes, index_bytes, nullptr), c);
  check(topk_scatter_row_cuda(values.pointer(), indices.pointer(), dense.pointer(), c.rows,
                              c.hidden, c.k, word_bytes, index_bytes, nullptr), c);
  check(topk_count_bits_cuda(bits.pointer<uint32_t>(), counts.pointer<int64_t>(), c.rows, c.hidden,
                             nullptr), c);
  file = open(c.output, "wb");
  for (const Buffer* result : {&indices, &values, &dense, &counts}) result->write(file);
  fclose(file);
  print(device.kernels, device.counters);
}

void run(const Case& c) {
  if (c.direction[0] == 's') return run_sparse(c);
  const size_t row_bytes = static_cast<size_t>(c.hidden) * (c.dtype == 0 ? 4 : 2);
  const size_t bits_bytes = static_cast<size_t>(c.hidden + 31) / 32 * 4;
  emulator::Device& device = emulator::device();
  device.clear();
  Buffer in(c.rows * row_bytes, false), bits(c.rows * bits_bytes, c.forward());
  Buffer out(c.rows * row_bytes, true);
  FILE* file = open(c.input, "rb");
  in.read(file);
  if (!c.forward()) bits.read(file);
  fclose(file);
  const int error =
      c.forward() ? topk_mask_cuda_forward(in.pointer(), out.pointer(), bits.pointer<uint32_t>(),
                                           c.rows, c.hidden, c.k, c.dtype, c.mode, nullptr)
                  : topk_mask_cuda_backward(in.pointer(), bits.pointer<uint32_t>(), out.pointer(),
                                            c.rows, c.hidden, c.dtype, nullptr);
  check(error, c);
  file = open(c.output, "wb");
  out.write(file);
  if (c.forward()) bits.write(file);
  fclose(file);
  print(device.kernels, device.counters);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) give_up("usage", "driver <multiprocessors> <program file>... < cases");
  emulator::device().multiprocessors = atoi(argv[1]);
  for (int i = 2; i < argc; ++i) emulator::load_program(argv[i]);
  Case c;
  while (scanf("%15s %d %d %ld %d %d %4095s %4095s", c.direction, &c.dtype, &c.mode, &c.rows,
               &c.hidden, &c.k, c.input, c.output) == 8)
    run(c);
  return 0;
}
