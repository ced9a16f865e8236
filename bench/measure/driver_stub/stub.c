/* A CUDA driver that does nothing: the functions of libcuda that Triton's launcher calls, for a device of
   capability 9.0.  It counts launches and accepts pointers of the host as pointers of the device. */
#include <stdint.h>

static uint64_t launches;
static int something;

uint64_t stub_launches(void) { return __atomic_load_n(&launches, __ATOMIC_RELAXED); }

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  __atomic_fetch_add(&launches, 1, __ATOMIC_RELAXED);
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  enum { WARP_SIZE = 10, MAJOR = 75, MINOR = 76, SHARED_MEMORY_PER_BLOCK = 97 };
  *value = attribute == WARP_SIZE ? 32 : attribute == MAJOR ? 9 : attribute == MINOR ? 0
         : attribute == SHARED_MEMORY_PER_BLOCK ? 227 * 1024 : 1;
  return 0;
}

int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { *value = pointer; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = &something; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &something; return 0; }
int cuCtxGetCurrent(void **context) { *context = &something; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 99000; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "the stub of the driver"; return 0; }

enum { NO_DEVICE = 100 };
int cuInit(unsigned flags) { return NO_DEVICE; } /* what others than Triton, who does not ask, are told */

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuModuleUnload) NOTHING(cuCtxSetCurrent) NOTHING(cuDevicePrimaryCtxRetain) NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit)
NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)
