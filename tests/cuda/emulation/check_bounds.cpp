// Runs the emulated kernels on buffers of exactly the right size. Built with sanitizers, it stops
// at the first access outside them, misaligned access or undefined operation.
#include <stdlib.h>

#include <memory>

#include "topk_mask_emulated.cpp"

namespace {

// Exactly `bytes` bytes on the heap, at `offset` elements from an aligned start.
struct Buffer {
  Buffer(size_t bytes, size_t offset) : start(new uint8_t[bytes + offset]), data(&start[offset]) {}
  std::unique_ptr<uint8_t[]> start;
  uint8_t* data;
};

// Fills with few distinct values for two thirds of the seeds, with arbitrary bits for the others.
void fill(uint8_t* x, size_t elements, int bytes, unsigned seed) {
  srand(seed);
  for (size_t i = 0; i < elements; ++i) {
    const uint32_t value = seed % 3 ? (rand() % 4) * 0x3f8030u : static_cast<uint32_t>(rand()) * 5u;
    memcpy(x + i * bytes, &value, bytes);
  }
}

int check(int rows, int hidden, int k, int dtype, int mode, size_t offset) {
  const int bytes = topk_mask::element_bytes(dtype), words = (hidden + 31) / 32;
  const size_t size = static_cast<size_t>(rows) * hidden;
  Buffer x(size * bytes, offset * bytes), y(size * bytes, offset * bytes);
  std::unique_ptr<uint32_t[]> bits(new uint32_t[static_cast<size_t>(rows) * words]);
  fill(x.data, size, bytes, hidden + k);
  emulated_forward(x.data, y.data, bits.get(), rows, hidden, k, dtype, mode, 1, k);
  for (int row = 0; row < rows; ++row) {
    int selected = 0;
    for (int word = 0; word < words; ++word) selected += __popc(bits[row * words + word]);
    if (selected != k) return fprintf(stderr, "%d selected, not %d\n", selected, k), 1;
  }
  emulated_backward(y.data, bits.get(), x.data, rows, hidden, dtype, 1);
  return 0;
}

}  // namespace

int main() {
  int failures = 0;
  for (int hidden : {1, 7, 40, 256, 257, 1000, 1024, 2048, 2312, 4096, 8193})
    for (int dtype = 0; dtype < 3; ++dtype)
      for (int k : {1, (hidden + 7) / 8, (hidden + 1) / 2, hidden})
        failures += check(5, hidden, k, dtype, k % 2, hidden % 3 == 0);
  return failures != 0;
}
