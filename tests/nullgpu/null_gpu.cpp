// A GPU that does nothing: launches succeed, are counted and checked, and write nothing; copies to
// it move nothing, copies from it give zeros. In place of cudart, cublas, NCCL and libcuda.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

#define API extern "C" __attribute__((visibility("default")))
// Of any arguments: the header has another declaration for the name.
#define SUCCEEDS(name)                            \
  API int null_##name() __asm__(#name);           \
  API int null_##name() { return 0; }

static const size_t TOTAL = 141ull << 30, PAGE = 2ull << 20;
static const int SHARED = 49152, SHARED_OPTIN = 232448;

// ---- counters, read by null_gpu.py
enum { LAUNCHES, SYNCS, TO_DEVICE, ON_SIDE, TO_HOST, PAGEABLE, REFUSED, IN_GRAPHS, NUM_COUNTERS };
static std::mutex mutex;
static long counters[NUM_COUNTERS];
static std::map<std::string, long>& launches() {
  static auto* all = new std::map<std::string, long>;
  return *all;
}
API void null_counts(long* out) { memcpy(out, counters, sizeof counters); }
API void null_reset() {
  std::lock_guard<std::mutex> lock(mutex);
  memset(counters, 0, sizeof counters);
  launches().clear();
}
static cudaStream_t captured_stream = nullptr;  // null outside of captures
static long num_captured = 0;                    // launches of this capture
API void null_launch(const char* name, long count) {
  std::lock_guard<std::mutex> lock(mutex);
  if (captured_stream) {
    num_captured += count;
    return;
  }
  launches()[name] += count;
  counters[LAUNCHES] += count;
}
API long null_launches_of(const char* part) {
  long total = 0;
  for (auto& entry : launches())
    if (entry.first.find(part) != std::string::npos) total += entry.second;
  return total;
}

// ---- errors and properties
static thread_local cudaError_t last = cudaSuccess;
static cudaError_t fail(cudaError_t error) { return last = error; }
API cudaError_t cudaGetLastError() {
  auto error = last;
  last = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "invalid" : "no error";
}
static int number(const char* variable, int otherwise) {
  const char* text = getenv(variable);
  return text ? atoi(text) : otherwise;
}
static thread_local int device_now = 0;
API cudaError_t cudaGetDeviceCount(int* n) { return *n = number("NULL_GPUS", 1), cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = device_now, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= number("NULL_GPUS", 1)) return fail(cudaErrorInvalidDevice);
  return device_now = device, cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "null GPU");
  p->totalGlobalMem = TOTAL;
  p->sharedMemPerBlock = SHARED, p->sharedMemPerBlockOptin = SHARED_OPTIN;
  p->sharedMemPerMultiprocessor = 233472, p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9, p->multiProcessorCount = 132, p->l2CacheSize = 60 << 20;
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->canMapHostMemory = 1;
  p->maxBlocksPerMultiProcessor = 32, p->memoryBusWidth = 6144, p->asyncEngineCount = 3;
  p->textureAlignment = 512, p->totalConstMem = 65536, p->pciBusID = p->uuid.bytes[0] = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024}, {cudaDevAttrMaxSharedMemoryPerBlock, SHARED},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED_OPTIN}, {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMultiProcessorCount, 132}, {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0}, {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxGridDimX, 2147483647}, {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535}, {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxRegistersPerBlock, 65536}, {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024}, {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrL2CacheSize, 60 << 20}, {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      {cudaDevAttrMemoryPoolsSupported, 0}, {cudaDevAttrMaxPitch, 2147483647}};
  auto found = known.find(attribute);
  *value = found == known.end() ? 1 : found->second;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) {
  if (low) *low = 0;
  if (high) *high = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int n, int) {
  return snprintf(text, n, "0000:01:00.0"), cudaSuccess;
}

// ---- memory
static std::map<char*, size_t> on_device, pinned;
static size_t used = 0;
static bool is_in(std::map<char*, size_t>& places, const void* p) {
  auto next = places.upper_bound((char*)p);
  return next != places.begin() && (char*)p < (--next)->first + next->second;
}
API cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  return *left = TOTAL - used, *total = TOTAL, cudaSuccess;
}
API cudaError_t cudaMalloc(void** p, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  *p = nullptr;
  size_t size = bytes ? (bytes + PAGE - 1) / PAGE * PAGE : PAGE;
  if (used + size > TOTAL) return fail(cudaErrorMemoryAllocation);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (found == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  on_device[(char*)found] = size, used += size, *p = found;
  return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = on_device.find((char*)p);
  if (found == on_device.end()) return cudaSuccess;
  munmap(p, found->second), used -= found->second, on_device.erase(found);
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> lock(mutex);
  if (posix_memalign(p, 4096, bytes ? bytes : 1)) return fail(cudaErrorMemoryAllocation);
  return pinned[(char*)*p] = bytes ? bytes : 1, cudaSuccess;
}
API cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
API cudaError_t cudaFreeHost(void* p) {
  std::lock_guard<std::mutex> lock(mutex);
  return pinned.erase((char*)p), free(p), cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  std::lock_guard<std::mutex> lock(mutex);
  memset(a, 0, sizeof *a);
  a->type = is_in(on_device, p) ? cudaMemoryTypeDevice
            : is_in(pinned, p)  ? cudaMemoryTypeHost
                                : cudaMemoryTypeUnregistered;
  a->devicePointer = a->type == cudaMemoryTypeUnregistered ? nullptr : (void*)p;
  a->hostPointer = a->type == cudaMemoryTypeDevice ? nullptr : (void*)p;
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind,
                                cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex);
  bool is_to = is_in(on_device, to), is_from = is_in(on_device, from);
  if (stream && stream == captured_stream && is_to != is_from) {
    counters[REFUSED]++;  // a replay would read or write the host's memory of then
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  if (is_to && !is_from) {
    counters[TO_DEVICE]++, counters[ON_SIDE] += stream != nullptr;
    counters[PAGEABLE] += !is_in(pinned, from);
  }
  if (is_from && !is_to) counters[TO_HOST]++, memset(to, 0, n);
  if (!is_from && !is_to) memcpy(to, from, n);
  return cudaSuccess;
}
static cudaError_t wait_for(cudaStream_t stream) {
  counters[captured_stream && stream == captured_stream ? REFUSED : SYNCS]++;
  bool is_captured = captured_stream && stream == captured_stream;
  return is_captured ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
  counters[SYNCS]++;
  return cudaMemcpyAsync(to, from, n, kind, nullptr);
}
SUCCEEDS(cudaMemsetAsync)

// ---- streams and events
static size_t new_handle() {
  static size_t last_handle = 0x1000;
  return __sync_add_and_fetch(&last_handle, 64);
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  return *s = (cudaStream_t)new_handle(), cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  return *e = (cudaEvent_t)new_handle(), cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { return *p = 0, cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for(stream); }
API cudaError_t cudaDeviceSynchronize() { return wait_for(captured_stream); }
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0, cudaSuccess;
}
SUCCEEDS(cudaEventSynchronize)  // waits for a point, not for all that is queued
SUCCEEDS(cudaStreamWaitEvent) SUCCEEDS(cudaStreamQuery) SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaEventRecord) SUCCEEDS(cudaEventRecordWithFlags) SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventDestroy) SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(cudaProfilerStart) SUCCEEDS(cudaProfilerStop)

// ---- graphs: what a capture launches is counted in the graph, and a replay is one launch
static unsigned long long capture_number = 0;
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (captured_stream || !stream) return fail(cudaErrorStreamCaptureUnsupported);
  return captured_stream = stream, num_captured = 0, capture_number++, cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream != captured_stream) return fail(cudaErrorStreamCaptureUnmatched);
  return *graph = (cudaGraph_t) new long(num_captured), captured_stream = nullptr, cudaSuccess;
}
static cudaStreamCaptureStatus status_of(cudaStream_t stream) {
  bool is_captured = stream && stream == captured_stream;
  return is_captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return *status = status_of(stream), cudaSuccess;
}
API int capture_info(cudaStream_t, cudaStreamCaptureStatus*, unsigned long long*)
    __asm__("cudaStreamGetCaptureInfo");
API int capture_info(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id) {
  if (id) *id = capture_number;
  return *status = status_of(stream), 0;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = *(long*)graph, cudaSuccess;
}
API int instantiate(long** made, long* graph, unsigned long long) __asm__("cudaGraphInstantiate");
API int instantiate(long** made, long* graph, unsigned long long) {
  return *made = new long(*graph), 0;
}
API int instantiate_with(long** made, long* graph, unsigned long long)
    __asm__("cudaGraphInstantiateWithFlags");
API int instantiate_with(long** made, long* graph, unsigned long long) {
  return *made = new long(*graph), 0;
}
API int replay(long* made, void*) __asm__("cudaGraphLaunch");
API int replay(long* made, void*) {
  null_launch("graph", 1);
  return counters[IN_GRAPHS] += *made, 0;
}
SUCCEEDS(cudaGraphDestroy) SUCCEEDS(cudaGraphExecDestroy) SUCCEEDS(cudaGraphRetainUserObject)

// ---- kernels
struct Kernel {
  std::string name;
  int shared = SHARED;
};
static std::unordered_map<const void*, Kernel*>& kernels() {
  static auto* all = new std::unordered_map<const void*, Kernel*>;
  return *all;
}
static cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared) {
  auto found = kernels().find(function);
  null_launch(found == kernels().end() ? "?" : found->second->name.c_str(), 1);
  size_t most = found == kernels().end() ? SHARED_OPTIN : found->second->shared;
  long threads = (long)block.x * block.y * block.z;
  bool is_fine = shared <= most && threads > 0 && threads <= 1024 && grid.x && grid.y && grid.z;
  if (is_fine && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535) return cudaSuccess;
  counters[REFUSED]++;
  return fail(cudaErrorInvalidConfiguration);
}
API void** __cudaRegisterFatBinary(void*) { return (void**)new void*[1]; }
SUCCEEDS(__cudaRegisterFatBinaryEnd) SUCCEEDS(__cudaUnregisterFatBinary) SUCCEEDS(__cudaRegisterVar)
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*,
                                void*, void*, void*, int*) {
  auto* kernel = new Kernel;
  kernel->name = name;
  kernels()[function] = kernel;
}
struct Call {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local Call calls[16];
static thread_local int num_calls = 0;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  calls[num_calls++] = {grid, block, shared, stream};
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Call& call = calls[--num_calls];
  *grid = call.grid, *block = call.block, *shared = call.shared, *(void**)stream = call.stream;
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t s, cudaStream_t) {
  return launch(f, g, b, s);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
API cudaError_t __cudaGetKernel(void** kernel, const void* f) {
  return *kernel = (void*)f, cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(void* f, dim3 g, dim3 b, void**, size_t s, void*) {
  return launch(f, g, b, s);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = 90;
  return a->maxDynamicSharedSizeBytes = SHARED, cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute attribute, int value) {
  auto found = kernels().find(f);
  bool is_shared = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (found != kernels().end() && is_shared) found->second->shared = value;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int b, size_t) {
  return *n = b > 0 && b < 1024 ? 2048 / b : 2, cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int,
                                                                       size_t, unsigned) {
  return *n = 2, cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) { return cudaMalloc(p, 4096); }
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  if (flags) *flags = 0;
  return *is_active = 1, 0;
}
static int nothing() { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** p, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  bool is_state = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *p = is_state ? (void*)cuDevicePrimaryCtxGetState : (void*)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// ---- cublas
#define GEMM(name) API int name() { return null_launch("gemm", 1), 0; }
GEMM(cublasGemmEx) GEMM(cublasGemmStridedBatchedEx) GEMM(cublasSgemm_v2) GEMM(cublasLtMatmul)
GEMM(cublasSgemmStridedBatched) GEMM(cublasSgemmEx) GEMM(cublasSgemv_v2)
API int cublasCreate_v2(void** handle) { return *handle = malloc(512), 0; }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
SUCCEEDS(cublasSetStream_v2) SUCCEEDS(cublasSetWorkspace_v2) SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2) SUCCEEDS(cublasDestroy_v2) SUCCEEDS(cublasSetSmCountTarget)
API int cublasLtMatmulDescCreate(void** d, ...) { return *d = malloc(512), 0; }
API int cublasLtMatmulPreferenceCreate(void** d) { return *d = malloc(512), 0; }
API int cublasLtMatrixLayoutCreate(void** d, ...) { return *d = malloc(512), 0; }
SUCCEEDS(cublasLtMatmulDescDestroy) SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatrixLayoutDestroy) SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute) SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                       void* results, int* count) {
  return memset(results, 0, 96), *count = 1, 0;
}

// ---- NCCL
#define CALL(name) API int name() { return null_launch(#name, 1), 0; }
CALL(ncclAllReduce) CALL(ncclAllGather) CALL(ncclReduceScatter) CALL(ncclBroadcast)
SUCCEEDS(ncclGroupStart) SUCCEEDS(ncclGroupEnd) SUCCEEDS(ncclCommAbort) SUCCEEDS(ncclCommDestroy)
SUCCEEDS(ncclCommFinalize) SUCCEEDS(ncclRedOpCreatePreMulSum) SUCCEEDS(ncclRedOpDestroy)
SUCCEEDS(ncclCommRegister) SUCCEEDS(ncclCommDeregister)
API int ncclGetVersion(int* version) { return *version = 22900, 0; }
API int ncclGetUniqueId(void* id) { return memset(id, 7, 128), 0; }
API int ncclCommInitRankConfig(void** c, int, char*, int, void*) { return *c = malloc(64), 0; }
API int ncclCommSplit(void*, int, int, void** c, void*) { return *c = malloc(64), 0; }
API int ncclCommGetAsyncError(void*, int* error) { return *error = 0; }
API int ncclCommCount(void*, int* n) { return *n = number("WORLD_SIZE", 1), 0; }
API int ncclCommUserRank(void*, int* n) { return *n = number("RANK", 0), 0; }
API const char* ncclGetErrorString(int) { return "none"; }
API const char* ncclGetLastError(void*) { return "none"; }

// ---- libcuda, for Triton, and what torch looks for in it
API int cuGetErrorString(int, const char** text) { return *text = "none", 0; }
API int cuDriverGetVersion(int* version) { return *version = CUDART_VERSION, 0; }
API int cuDeviceGetCount(int* n) { return *n = 1, 0; }
API int cuDeviceGet(int* device, int number) { return *device = number, 0; }
API int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device);
}
API int cuCtxGetCurrent(void** context) { return *context = (void*)8, 0; }
API int cuCtxGetLimit(size_t* value, int) { return *value = 0, 0; }
API int cuStreamIsCapturing(void*, int* status) { return *status = 0, 0; }
API int cuCtxGetDevice(int* device) { return *device = device_now, 0; }
API int cuDevicePrimaryCtxRetain(void** context, int) { return *context = (void*)8, 0; }
API int cuModuleLoadData(void** module, const void*) { return *module = (void*)16, 0; }
API int cuModuleGetFunction(void** f, void*, const char* name) { return *f = strdup(name), 0; }
API int cuFuncGetAttribute(int* value, int attribute, void*) {
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0, 0;
}
API int cuPointerGetAttribute(void* out, int attribute, unsigned long long p) {
  if (attribute == 3) *(unsigned long long*)out = p;
  if (attribute == 2) *(int*)out = 2;
  return 0;
}
API int cuLaunchKernel(const char* name, ...) { return null_launch(name, 1), 0; }
API int cuLaunchKernelEx(void*, const char* name, ...) { return null_launch(name, 1), 0; }
API int cuOccupancyMaxActiveClusters(int* n, ...) { return *n = 66, 0; }
API int cuGetProcAddress_v2(const char* name, void** p, int, unsigned long long, int* result) {
  *p = dlsym(RTLD_DEFAULT, name);
  if (!*p) *p = (void*)nothing;
  if (result) *result = 0;
  return 0;
}
API int cuGetProcAddress(const char* name, void** p, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, p, version, flags, nullptr);
}
SUCCEEDS(cuInit) SUCCEEDS(cuFuncSetAttribute) SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuCtxSetLimit) SUCCEEDS(cuCtxPushCurrent_v2) SUCCEEDS(cuCtxPopCurrent_v2)
SUCCEEDS(cuTensorMapEncodeTiled) SUCCEEDS(cuTensorMapEncodeIm2col) SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuModuleLoad) SUCCEEDS(cuModuleLoadDataEx) SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuLinkCreate_v2) SUCCEEDS(cuLinkAddData_v2) SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLaunchCooperativeKernel) SUCCEEDS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
