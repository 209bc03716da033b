// The CUDA kernels under emulation, as operators on CPU tensors: torch.ops.dflash_ray_emulated. For tests.

#include "../layer_ops.h"
#include "../verify_ops.h"
#include "backend.h"

TORCH_LIBRARY(dflash_ray_emulated, library) {
  dflash_ray::define_layer_ops(library);
  dflash_ray::define_verify_ops(library);
}

TORCH_LIBRARY_IMPL(dflash_ray_emulated, CPU, library) {
  dflash_ray::LayerOps<dflash_ray::LayerCudaBackend, dflash_ray::NoGuard>::register_in(library);
  dflash_ray::VerifyOps<dflash_ray::CudaBackend, dflash_ray::NoGuard>::register_in(library);
}
