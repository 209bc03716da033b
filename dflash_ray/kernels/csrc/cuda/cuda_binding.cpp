// The operators on CUDA tensors.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../attention_ops.h"
#include "../draft_ops.h"
#include "../layer_ops.h"
#include "../verify_ops.h"
#include "attention_backend.h"
#include "drafts_backend.h"

namespace dflash_ray {
namespace {

struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor& tensor) : guard(tensor.device()) {}
  c10::cuda::CUDAGuard guard;
};

}  // namespace

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

std::shared_ptr<char> scratch_memory(int64_t bytes) {
  const auto tensor = std::make_shared<at::Tensor>(at::empty({bytes + 1}, at::device(at::kCUDA).dtype(at::kByte)));
  return {tensor, static_cast<char*>(tensor->data_ptr())};
}

}  // namespace dflash_ray

TORCH_LIBRARY_IMPL(dflash_ray, CUDA, library) {
  dflash_ray::LayerOps<dflash_ray::LayerCudaBackend, dflash_ray::DeviceGuard>::register_in(library);
  dflash_ray::VerifyOps<dflash_ray::CudaBackend, dflash_ray::DeviceGuard>::register_in(library);
  dflash_ray::DraftOps<dflash_ray::DraftCudaBackend, dflash_ray::DeviceGuard>::register_in(library);
  library.impl("attend_pages", &dflash_ray::AttentionOps<dflash_ray::CudaAttention, dflash_ray::DeviceGuard>::attend);
}
