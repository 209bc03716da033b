// Runs the kernels on the host: every thread of a block is a fiber, blocks run one after the other.
//
// Threads switch at barriers and shuffles only, so a run is repeatable. What a GPU would leave to chance is an error
// here: a shared value that two threads touch without a barrier in between (one of them writing), an index outside a
// shared array, a barrier or shuffle that not all threads reach.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct Index3 {
  unsigned x = 0;
};
inline thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct SharedBase {
  virtual ~SharedBase() = default;
};

struct Fiber {
  enum State { kReady, kAtBarrier, kAtShuffle, kDone } state = kReady;
  ucontext_t context;  // to enter it
  jmp_buf resume;      // to go on: a jump is much cheaper than a change of context
  bool has_entered = false;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
};

class Block {
 public:
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    shared_.clear();
    epoch_ = 0;
    if (fibers_.size() != threads) fibers_ = std::vector<Fiber>(threads);
    shuffles_.assign(threads / kWarpSize + 1, {});
    for (unsigned i = 0; i < threads; ++i) start(i);
    while (step()) {
    }
    if (!error_.empty()) {
      const std::string error = std::exchange(error_, {});
      throw std::runtime_error(error);
    }
  }

  void barrier() { wait(Fiber::kAtBarrier); }

  // What a lane gives at once.
  struct Words {
    uint64_t word[3] = {};
  };

  // Every lane of the warp gives its words and gets those of all lanes, until its next exchange but one.
  const Words* exchange(const Words& value) {
    Shuffle& shuffle = shuffles_[current_ / kWarpSize];
    const unsigned turn = shuffle.turn;  // lanes that are behind still read the other half
    shuffle.values[turn][lane()] = value;
    wait(Fiber::kAtShuffle);
    return shuffles_[current_ / kWarpSize].values[turn];
  }

  unsigned lane() const { return current_ % kWarpSize; }

  template <class Array>
  Array& shared(const void* key, const char* name) {
    auto& place = shared_[key];
    if (!place) place = std::make_unique<Array>(name);
    return static_cast<Array&>(*place);
  }

  unsigned current() const { return current_; }
  unsigned epoch() const { return epoch_; }

  // Ends the block; reported by run(), because exceptions cannot leave a fiber.
  void fail(const std::string& error) {
    if (error_.empty()) error_ = error + " (block " + std::to_string(blockIdx.x) + ", thread " +
                                 std::to_string(current_) + ")";
    _longjmp(scheduler_, 1);
  }

 private:
  struct Shuffle {
    Words values[2][kWarpSize];
    unsigned turn = 0;
  };

  static Block*& active() {
    static thread_local Block* block = nullptr;
    return block;
  }

  static void enter() {
    Block& block = *active();
    (*block.body_)();
    block.fibers_[block.current_].state = Fiber::kDone;
    _longjmp(block.scheduler_, 1);
  }

  void start(unsigned i) {
    Fiber& fiber = fibers_[i];
    fiber.state = Fiber::kReady;
    fiber.has_entered = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  void wait(Fiber::State state) {
    fibers_[current_].state = state;
    if (!_setjmp(fibers_[current_].resume)) _longjmp(scheduler_, 1);
  }

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    if (fiber.has_entered) _longjmp(fiber.resume, 1);
    fiber.has_entered = true;
    setcontext(&fiber.context);
  }

  // Runs every ready thread up to its next wait, then opens what all have reached; false when the block has ended.
  bool step() {
    active() = this;
    for (unsigned i = 0; i < fibers_.size() && error_.empty(); ++i) {
      if (fibers_[i].state != Fiber::kReady) continue;
      current_ = i;
      threadIdx.x = i;
      resume(fibers_[i]);
    }
    if (!error_.empty()) return false;
    bool opened = false;
    for (unsigned first = 0; first < fibers_.size(); first += kWarpSize) {
      if (count(first, first + kWarpSize, Fiber::kAtShuffle) == kWarpSize) {
        shuffles_[first / kWarpSize].turn ^= 1;
        release(first, first + kWarpSize);
        opened = true;
      }
    }
    if (opened) return true;
    const unsigned all = static_cast<unsigned>(fibers_.size());
    if (count(0, all, Fiber::kDone) == all) return false;
    if (count(0, all, Fiber::kAtBarrier) == all) {
      ++epoch_;
      release(0, all);
      return true;
    }
    error_ = "not all threads of block " + std::to_string(blockIdx.x) + " reach the same barrier or shuffle";
    return false;
  }

  unsigned count(unsigned begin, unsigned end, Fiber::State state) const {
    unsigned n = 0;
    for (unsigned i = begin; i < end && i < fibers_.size(); ++i) n += fibers_[i].state == state;
    return n;
  }

  void release(unsigned begin, unsigned end) {
    for (unsigned i = begin; i < end; ++i) fibers_[i].state = Fiber::kReady;
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Shuffle> shuffles_;
  std::map<const void*, std::unique_ptr<SharedBase>> shared_;
  jmp_buf scheduler_;
  unsigned current_ = 0, epoch_ = 0;
  std::string error_;
};

inline Block& block() {
  static thread_local Block one;
  return one;
}

// A shared array that knows who touched each place since the last barrier.
template <class T, size_t kSize>
class Shared : public SharedBase {
 public:
  using Value = T;

  explicit Shared(const char* name) : name_(name) {}

  class Place {
   public:
    Place(Shared& array, size_t index) : array_(array), index_(index) {}
    operator T() const { return array_.read(index_); }
    Place& operator=(const T& value) {
      array_.write(index_, value);
      return *this;
    }

   private:
    Shared& array_;
    size_t index_;
  };

  Place operator[](size_t index) { return {*this, index}; }

  // Atomic additions of several threads are in order with each other, but not with plain reads and writes.
  void add(size_t index, T value) {
    touch(index, kAdds);
    values_[index] += value;
  }

 private:
  enum Touch { kReads, kWrites, kAdds };

  struct Log {
    unsigned epoch = ~0u;
    Touch touch = kReads;
    unsigned thread = 0;
    bool by_several = false;
  };

  T read(size_t index) {
    touch(index, kReads);
    return values_[index];
  }

  void write(size_t index, const T& value) {
    touch(index, kWrites);
    values_[index] = value;
  }

  void touch(size_t index, Touch how) {
    Block& b = block();
    if (index >= kSize) return b.fail(std::string(name_) + "[" + std::to_string(index) + "] is outside the array");
    Log& log = logs_[index];
    if (log.epoch != b.epoch()) {
      log = {b.epoch(), how, b.current(), false};
      return;
    }
    const bool by_another = log.by_several || log.thread != b.current();
    const bool is_harmless = how == log.touch && how != kWrites;
    if (by_another && !is_harmless) {
      return b.fail(std::string(name_) + "[" + std::to_string(index) + "] is touched by two threads without a barrier");
    }
    log.by_several |= log.thread != b.current();
    if (how == kWrites || log.touch == kReads) log.touch = how;
  }

  const char* name_;
  T values_[kSize]{};
  Log logs_[kSize];
};

template <class T, size_t kSize>
Shared<T, kSize>& shared(const void* key, const char* name) {
  return block().shared<Shared<T, kSize>>(key, name);
}

template <class Body>
void launch(int64_t blocks, unsigned threads, const Body& body) {
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    block().run(threads, body);
  }
}

}  // namespace simt

inline void __syncthreads() { simt::block().barrier(); }

inline void __threadfence() {}

namespace simt {

template <class T>
T value_of_bits(uint64_t bits) {
  static_assert(sizeof(T) <= sizeof bits);
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
uint64_t bits_of_value(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

}  // namespace simt

// Past the end of the warp a lane gets its own value.
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const unsigned from = simt::block().lane() + delta;
  const auto* all = simt::block().exchange({{simt::bits_of_value(value)}});
  return simt::value_of_bits<T>(all[from < simt::kWarpSize ? from : simt::block().lane()].word[0]);
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return simt::value_of_bits<T>(simt::block().exchange({{simt::bits_of_value(value)}})[from].word[0]);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto* all = simt::block().exchange({{vote}});
  unsigned votes = 0;
  for (unsigned lane = 0; lane < simt::kWarpSize; ++lane) votes |= static_cast<unsigned>(all[lane].word[0]) << lane;
  return votes;
}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  const auto* all = simt::block().exchange({{value}});
  unsigned sum = 0;
  for (unsigned lane = 0; lane < simt::kWarpSize; ++lane) sum += static_cast<unsigned>(all[lane].word[0]);
  return sum;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

// On memory of the device; shared arrays have their own.
template <class T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, *at + value);
}
