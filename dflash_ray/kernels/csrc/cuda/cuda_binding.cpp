// The operators on CUDA tensors.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../layer_ops.h"
#include "../verify_ops.h"
#include "backend.h"

namespace dflash_ray {
namespace {

struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor& tensor) : guard(tensor.device()) {}
  c10::cuda::CUDAGuard guard;
};

}  // namespace

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

}  // namespace dflash_ray

TORCH_LIBRARY_IMPL(dflash_ray, CUDA, library) {
  dflash_ray::LayerOps<dflash_ray::LayerCudaBackend, dflash_ray::DeviceGuard>::register_in(library);
  dflash_ray::VerifyOps<dflash_ray::CudaBackend, dflash_ray::DeviceGuard>::register_in(library);
}
