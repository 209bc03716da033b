// The CUDA kernels under emulation, as operators on CPU tensors: torch.ops.dflash_ray_emulated. For tests.

#include "../attention_ops.h"
#include "../draft_ops.h"
#include "../layer_ops.h"
#include "../verify_ops.h"
#include "attention_backend.h"
#include "drafts_backend.h"

namespace dflash_ray {

std::shared_ptr<char> scratch_memory(int64_t bytes) {
  const auto tensor = std::make_shared<at::Tensor>(at::empty({bytes + 1}, at::device(at::kCPU).dtype(at::kByte)));
  return {tensor, static_cast<char*>(tensor->data_ptr())};
}

}  // namespace dflash_ray

TORCH_LIBRARY(dflash_ray_emulated, library) {
  dflash_ray::define_layer_ops(library);
  dflash_ray::define_verify_ops(library);
  dflash_ray::define_attention_ops(library);
  dflash_ray::define_draft_ops(library);
}

TORCH_LIBRARY_IMPL(dflash_ray_emulated, CPU, library) {
  dflash_ray::LayerOps<dflash_ray::LayerCudaBackend, dflash_ray::NoGuard>::register_in(library);
  dflash_ray::VerifyOps<dflash_ray::CudaBackend, dflash_ray::NoGuard>::register_in(library);
  dflash_ray::DraftOps<dflash_ray::DraftCudaBackend, dflash_ray::NoGuard>::register_in(library);
  library.impl("attend_pages", &dflash_ray::AttentionOps<dflash_ray::CudaAttention, dflash_ray::NoGuard>::attend);
}
