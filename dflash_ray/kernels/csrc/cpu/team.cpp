#include "team.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

namespace dflash_ray {
namespace {

constexpr uint64_t kPieceBits = 32, kPieceMask = (uint64_t{1} << kPieceBits) - 1;
constexpr int64_t kDefaultSpinMicroseconds = 50;

// How long a thread looks for work before it sleeps. Longer than what lies between two phases or two operators of one
// pass, and short enough that whoever else needs the core gets it soon.
std::chrono::microseconds spin_time() {
  const char* text = std::getenv("DFLASH_RAY_SPIN_US");
  return std::chrono::microseconds(text ? std::atoll(text) : kDefaultSpinMicroseconds);
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  void run(const std::vector<Phase>& phases) {
    int64_t pieces = 0;
    for (const Phase& phase : phases) pieces = std::max(pieces, phase.count);
    const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    if (threads <= 1 || pieces <= 1 || is_busy_.exchange(true, std::memory_order_acquire)) return run_alone(phases);
    while (static_cast<int>(num_workers_) < threads - 1) add_worker();
    num_wanted_.store(threads - 1, std::memory_order_relaxed);
    end_ = phases.data() + phases.size();
    is_finished_.store(false, std::memory_order_relaxed);
    begin(phases.data());
    for (;;) {
      const uint32_t seen = signal_.load(std::memory_order_acquire);
      while (take_one()) {
      }
      if (is_finished_.load(std::memory_order_acquire)) break;
      wait(seen);
    }
    is_busy_.store(false, std::memory_order_release);
  }

 private:
  static void run_alone(const std::vector<Phase>& phases) {
    for (const Phase& phase : phases) {
      for (int64_t piece = 0; piece < phase.count; ++piece) phase.work(piece);
    }
  }

  // Takes and completes a piece; false where there is none to take.
  bool take_one() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      // These may belong to a later phase than the ticket. Then the ticket has changed already, and is not ours.
      const Phase* phase = phase_.load(std::memory_order_acquire);
      const int64_t count = count_.load(std::memory_order_acquire);
      const int64_t piece = static_cast<int64_t>(ticket & kPieceMask);
      if (piece >= count) return false;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      phase->work(piece);
      if (num_done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) begin(phase + 1);
      return true;
    }
  }

  // Opens the first phase from here on that has pieces, or ends the run. Nobody holds a piece meanwhile.
  void begin(const Phase* phase) {
    while (phase != end_ && phase->count == 0) ++phase;
    const bool is_end = phase == end_;
    num_done_.store(0, std::memory_order_relaxed);
    // Closed before the phase changes: a ticket of the last phase must not be taken for one of the next.
    const uint64_t turn = (ticket_.load(std::memory_order_relaxed) >> kPieceBits) + 1;
    ticket_.store(turn << kPieceBits | kPieceMask, std::memory_order_relaxed);
    phase_.store(is_end ? nullptr : phase, std::memory_order_release);
    count_.store(is_end ? 0 : phase->count, std::memory_order_release);
    if (is_end) {
      is_finished_.store(true, std::memory_order_release);
    } else {
      ticket_.store((turn + 1) << kPieceBits, std::memory_order_release);
    }
    signal_.fetch_add(1);
    signal_.notify_all();
  }

  // Until the signal changes: awake for a short while, then asleep.
  void wait(uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + spin_;
    do {
      for (int i = 0; i < 32; ++i) {
        if (signal_.load(std::memory_order_acquire) != seen) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < until);
    signal_.wait(seen);
  }

  void add_worker() {
    // Signals are for the interpreter's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread([this, index = num_workers_] {
      for (;;) {
        const uint32_t seen = signal_.load(std::memory_order_acquire);
        while (index < num_wanted_.load(std::memory_order_relaxed) && take_one()) {
        }
        wait(seen);
      }
    }).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    ++num_workers_;
  }

  // Turn and next piece of the open phase; piece kPieceMask while none is open.
  alignas(64) std::atomic<uint64_t> ticket_{kPieceMask};
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};  // grows whenever a phase begins or a run ends
  alignas(64) std::atomic<const Phase*> phase_{nullptr};
  std::atomic<int64_t> count_{0};
  std::atomic<int> num_wanted_{0};
  std::atomic<bool> is_finished_{true}, is_busy_{false};
  const Phase* end_ = nullptr;
  int num_workers_ = 0;  // of whoever made the team busy
  const std::chrono::microseconds spin_ = spin_time();
};

std::atomic<Team*> current{nullptr};

// Never destroyed: its threads may sleep in it until the process ends.
Team& team() {
  static const bool is_made = [] {
    current = new Team;
    // Threads don't survive a fork, and the state may be in the middle of a run: a child begins anew.
    pthread_atfork(nullptr, nullptr, [] { current = new Team; });
    return true;
  }();
  (void)is_made;
  return *current.load(std::memory_order_acquire);
}

}  // namespace

void run_phases(const std::vector<Phase>& phases) { team().run(phases); }

}  // namespace dflash_ray
