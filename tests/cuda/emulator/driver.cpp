// Runs the PTX that nvcc wrote for the kernels in a PTX emulator, case by case.
//
//   driver <ptx file> <resident blocks> < cases
//
// A case is a line "direction dtype mode rows hidden k input output". The direction is forward or
// backward, the input file holds x (backward: dy, then the bits), and the output file receives y
// and the bits (backward: dx). The driver prints one JSON object with the counters per case. The
// emulator ends the process at an access out of bounds or a deadlock, and counts lesser faults
// (shared races) as warnings.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "ptxemu.h"
#include "topk_mask_plan.h"

namespace {

struct Case {
  char direction[16], input[4096], output[4096];
  int dtype, mode, hidden, k;
  long rows;
};

// Aligned to 256 bytes, like memory from the CUDA allocator; the emulator knows its exact size.
class Buffer {
 public:
  Buffer(size_t bytes, bool writable) : bytes_(bytes) {
    data_ = aligned_alloc(256, (bytes + 511) / 256 * 256);
    memset(data_, 0xee, bytes);
    ptxemu::region(data_, bytes, writable);
  }
  ~Buffer() { free(data_); }
  void read(FILE* file) {
    if (fread(data_, 1, bytes_, file) != bytes_) fprintf(stderr, "short input\n"), exit(2);
  }
  void write(FILE* file) const { fwrite(data_, 1, bytes_, file); }
  void* pointer() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

std::string kernel_name(const Case& c, int variant) {
  static const char* const dtypes[] = {"float32", "bfloat16", "float16"};
  return std::string("topk_mask_") + dtypes[c.dtype] + (c.mode ? "_abs_" : "_value_") +
         topk_mask::variant_name(variant);
}

void print(const std::string& kernel, const ptxemu::Stats& s, int warnings) {
  printf("{\"kernel\": \"%s\", \"warp_instructions\": %lu, \"thread_instructions\": %lu, "
         "\"load_sectors\": %lu, \"store_sectors\": %lu, \"shared_requests\": %lu, "
         "\"shared_wavefronts\": %lu, \"atomic_requests\": %lu, \"atomic_serial\": %lu, "
         "\"barriers\": %lu, \"warnings\": %d}\n",
         kernel.c_str(), s.warp_insn, s.lane_insn, s.gld_sectors, s.gst_sectors, s.sh_req,
         s.sh_wavefronts, s.atom_req, s.atom_serial, s.barriers, warnings);
  fflush(stdout);
}

void run(ptxemu::Module& module, const Case& c, int64_t resident) {
  const bool forward = c.direction[0] == 'f';
  const size_t row_bytes = static_cast<size_t>(c.hidden) * topk_mask::element_bytes(c.dtype);
  const size_t bits_bytes = static_cast<size_t>(c.hidden + 31) / 32 * 4;
  ptxemu::clear_regions();
  Buffer in(c.rows * row_bytes, false), bits(c.rows * bits_bytes, forward);
  Buffer out(c.rows * row_bytes, true);
  FILE* file = fopen(c.input, "rb");
  if (!file) perror(c.input), exit(2);
  in.read(file);
  if (!forward) bits.read(file);
  fclose(file);

  void *in_at = in.pointer(), *bits_at = bits.pointer(), *out_at = out.pointer();
  int64_t rows = c.rows;
  int hidden = c.hidden, k = c.k;
  const bool aligned = topk_mask::rows_aligned(in_at, out_at, hidden,
                                               topk_mask::element_bytes(c.dtype));
  void* forward_args[] = {&in_at, &out_at, &bits_at, &rows, &hidden, &k};
  void* backward_args[] = {&in_at, &bits_at, &out_at, &rows, &hidden};
  ptxemu::Stats stats;
  const int warnings = ptxemu::warnings;
  std::string kernel;
  if (forward) {
    const topk_mask::Plan plan = topk_mask::plan_forward(rows, hidden, c.dtype, aligned);
    kernel = kernel_name(c, plan.variant);
    ptxemu::launch(module, kernel, topk_mask::persistent_blocks(plan.blocks, resident), 1,
                   plan.threads, plan.shared_bytes, forward_args, stats);
  } else {
    const topk_mask::BackwardPlan plan =
        topk_mask::plan_backward(in_at, out_at, rows, hidden, c.dtype);
    kernel = c.dtype == 0 ? "topk_mask_backward_32bit" : "topk_mask_backward_16bit";
    kernel += plan.flat ? "_flat" : "_rows";
    ptxemu::launch(module, kernel, plan.blocks, 1, topk_mask::kBackwardThreads, 0, backward_args,
                   stats);
  }
  file = fopen(c.output, "wb");
  if (!file) perror(c.output), exit(2);
  out.write(file);
  if (forward) bits.write(file);
  fclose(file);
  print(kernel, stats, ptxemu::warnings - warnings);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return fprintf(stderr, "usage: driver <ptx file> <resident blocks> < cases\n"), 2;
  ptxemu::Module module;
  module.load(argv[1]);
  Case c;
  while (scanf("%15s %d %d %ld %d %d %4095s %4095s", c.direction, &c.dtype, &c.mode, &c.rows,
               &c.hidden, &c.k, c.input, c.output) == 8)
    run(module, c, strtoull(argv[2], nullptr, 0));
  return 0;
}
