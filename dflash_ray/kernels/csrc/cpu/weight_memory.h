// Memory of packed weights: behind each other, on huge pages where the system has them. A pass reads all weights once, which
// is more small pages than the processor remembers.
#pragma once

#include <ATen/ATen.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace dflash_ray {

constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kStretch = int64_t{1} << 26;  // of addresses; memory is taken where it is written

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Addresses that begin with a huge page.
class Stretch {
 public:
  explicit Stretch(int64_t size) : size_(size) {
    mapped_ = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(mapped_ != MAP_FAILED, "no memory for ", size, " bytes of weights");
    begin_ = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<int64_t>(mapped_), kHugePage));
#ifdef MADV_HUGEPAGE
    madvise(begin_, size, MADV_HUGEPAGE);  // a system without them ignores it
#endif
  }

  ~Stretch() { munmap(mapped_, size_ + kHugePage); }
  Stretch(const Stretch&) = delete;
  Stretch& operator=(const Stretch&) = delete;

  std::byte* begin() const { return begin_; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  void* mapped_;
  std::byte* begin_;
};

// Gives room to one weight after the other. A stretch is returned to the system when no weight of it is left.
class WeightMemory {
 public:
  // `bytes` bytes of any content, at a cache line's beginning.
  at::Tensor take(int64_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (open_ && open_.use_count() == 1) used_ = 0;
    if (!open_ || used_ + bytes > open_->size()) {
      open_ = std::make_shared<Stretch>(std::max(kStretch, round_up(bytes, kHugePage)));
      used_ = 0;
    }
    std::byte* at = open_->begin() + used_;
    used_ += round_up(bytes, 64);
    return at::from_blob(at, {bytes}, [stretch = open_](void*) {}, at::kByte);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Stretch> open_;
  int64_t used_ = 0;
};

}  // namespace dflash_ray
