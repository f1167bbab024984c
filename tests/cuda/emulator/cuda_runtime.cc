// The part of the CUDA runtime that the launcher's host code calls. nvcc compiles the launcher, and
// its calls end here: a launch runs the kernel of that name in the emulator. So the tests execute
// the real entry points, with the real launch configuration, and a launch that a GPU would refuse
// fails here, too.
#include "cuda_runtime.h"

#include <string.h>

#include <algorithm>
#include <map>
#include <vector>

namespace emulator {

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidDeviceFunction = 98;
constexpr size_t kSharedWithoutAsking = 48 << 10;
constexpr int kMaxThreads = 1024, kThreadsPerProcessor = 2048, kBlocksPerProcessor = 32;
constexpr int kSharedPerProcessor = 228 << 10;

// Attributes of an H100, by the numbers of cudaDeviceAttr.
const std::map<int, int> kAttributes = {
    {1, kMaxThreads}, {8, kSharedWithoutAsking}, {10, kWarpLanes}, {12, 65536},
    {39, kThreadsPerProcessor}, {75, 9}, {76, 0}, {81, kSharedPerProcessor}, {82, 65536},
    {106, kBlocksPerProcessor}};
constexpr int kSharedOptIn = 97, kMultiprocessors = 16;

struct Function {
  std::string name;
  size_t shared_allowed = kSharedWithoutAsking;
};

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> functions;
  return functions;
}

struct Configuration {
  Dim grid, block;
  size_t shared_bytes;
  void* stream;
};
std::vector<Configuration> configurations;
int last_error = kSuccess;

int launch(const void* function, Dim grid, Dim block, void** arguments, size_t shared_bytes) {
  const auto found = functions().find(function);
  if (found == functions().end()) return last_error = kInvalidDeviceFunction;
  const bool refused = block.count() == 0 || block.count() > kMaxThreads || grid.count() == 0 ||
                       grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
                       shared_bytes > found->second.shared_allowed;
  if (refused) return last_error = kInvalidValue;
  Device& device = emulator::device();
  device.kernels += (device.kernels.empty() ? "" : "+") + found->second.name;
  run_kernel({found->second.name, grid, block, shared_bytes, arguments, device.seed}, device.memory,
             device.counters);
  return kSuccess;
}

}  // namespace

Device& device() {
  static Device device;
  return device;
}

void Device::clear() {
  memory.clear();
  counters = Counters();
  kernels.clear();
}

}  // namespace emulator

using emulator::Dim;

extern "C" {

// What nvcc generates calls to. A kernel's handle is the address of its host function.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  emulator::functions()[host].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char* name, int, size_t, int, int) {
  emulator::stop(std::string("variables on the device are not supported: ") + name);
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared_bytes, void* stream) {
  emulator::configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared_bytes, void* stream) {
  const emulator::Configuration& last = emulator::configurations.back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<void**>(stream) = last.stream;
  emulator::configurations.pop_back();
  return emulator::kSuccess;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return emulator::kSuccess;
}
int __cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments,
                       size_t shared_bytes, void*) {
  return emulator::launch(kernel, grid, block, arguments, shared_bytes);
}

// What the launcher calls.
int cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared_bytes,
                     void*) {
  return emulator::launch(kernel, grid, block, arguments, shared_bytes);
}
int cudaGetDevice(int* device) {
  *device = 0;
  return emulator::kSuccess;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const auto found = emulator::kAttributes.find(attribute);
  if (attribute == emulator::kMultiprocessors) {
    *value = emulator::device().multiprocessors;
  } else if (attribute == emulator::kSharedOptIn) {
    *value = static_cast<int>(emulator::device().shared_limit);
  } else if (found != emulator::kAttributes.end()) {
    *value = found->second;
  } else {
    emulator::stop("unknown device attribute " + std::to_string(attribute));
  }
  return emulator::kSuccess;
}
int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  constexpr int kMaxDynamicShared = 8;
  const bool allowed = static_cast<size_t>(value) <= emulator::device().shared_limit;
  if (attribute != kMaxDynamicShared) return emulator::kSuccess;
  if (!allowed) return emulator::last_error = emulator::kInvalidValue;
  emulator::functions()[host].shared_allowed = value;
  return emulator::kSuccess;
}
int cudaGetLastError() {
  const int error = emulator::last_error;
  emulator::last_error = emulator::kSuccess;
  return error;
}
int cudaPeekAtLastError() { return emulator::last_error; }
const char* cudaGetErrorString(int) { return "an error of the emulated CUDA runtime"; }
int cudaMemsetAsync(void* start, int value, size_t bytes, void*) {
  if (emulator::device().memory.fault(reinterpret_cast<uint64_t>(start), 1, true))
    return emulator::last_error = emulator::kInvalidValue;
  memset(start, value, bytes);
  return emulator::kSuccess;
}
// One block at a time, so that a persistent grid has fewer blocks than there is work for.
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                           size_t shared_bytes, unsigned) {
  const bool possible = threads >= 1 && threads <= emulator::kMaxThreads &&
                        shared_bytes <= emulator::device().shared_limit;
  *blocks = possible;
  return possible ? emulator::kSuccess : emulator::kInvalidValue;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                  size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads,
                                                                shared_bytes, 0);
}

}  // extern "C"
