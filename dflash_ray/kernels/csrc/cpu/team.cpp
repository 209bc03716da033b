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

constexpr int kMostThreads = 256;
constexpr int64_t kMostInRange = 0xffff;
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

// What belongs to a member of the team, a stretch of the pieces: what it reads lies behind each other, and its counter is
// its own. It takes pieces from the front; others, who have no more, take them from the back. Turn, first and end are one
// word, so that who takes one knows that they are still what it has looked at.
struct Share {
  static constexpr uint64_t of(uint32_t turn, int64_t first, int64_t end) {
    return uint64_t{turn} << 32 | static_cast<uint64_t>(first) << 16 | static_cast<uint64_t>(end);
  }

  // A piece, or -1. The phase is read between the share and the exchange: while the share is what it was, so is the phase.
  int64_t take(bool is_own, const std::atomic<const Phase*>& current, const Phase*& phase) {
    uint64_t seen = word.load(std::memory_order_acquire);
    for (;;) {
      const int64_t first = seen >> 16 & 0xffff, end = seen & 0xffff;
      if (first >= end) return -1;
      phase = current.load(std::memory_order_acquire);
      const uint64_t left = is_own ? seen + (uint64_t{1} << 16) : seen - 1;
      if (word.compare_exchange_weak(seen, left, std::memory_order_acq_rel, std::memory_order_acquire)) {
        return is_own ? first : end - 1;
      }
    }
  }

  alignas(64) std::atomic<uint64_t> word{0};
};

class Team {
 public:
  void run(const std::vector<Phase>& phases) {
    int64_t pieces = 0;
    for (const Phase& phase : phases) pieces = std::max(pieces, phase.count);
    const int threads = at::in_parallel_region() ? 1 : std::min(at::get_num_threads(), kMostThreads);
    if (threads <= 1 || pieces <= 1 || is_busy_.exchange(true, std::memory_order_acquire)) return run_alone(phases);
    while (num_workers_ < threads - 1) add_worker();
    num_members_.store(threads, std::memory_order_relaxed);
    end_ = phases.data() + phases.size();
    is_finished_.store(false, std::memory_order_relaxed);
    begin(phases.data());
    for (;;) {
      const uint32_t seen = signal_.load(std::memory_order_acquire);
      work(0);
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

  // Takes and completes pieces until there are none to take. Who completes the last one of a phase begins the next.
  void work(int member) {
    for (;;) {
      const int members = num_members_.load(std::memory_order_relaxed);
      if (member >= members) return;
      const Phase* phase = nullptr;
      int64_t num_done = 0;
      for (int i = 0; i < members; ++i) {
        const int owner = member + i < members ? member + i : member + i - members;
        for (int64_t taken; (taken = shares_[owner].take(i == 0, phase_, phase)) >= 0; ++num_done) {
          // While it holds a piece that is not counted yet, nothing of the phase changes.
          const int64_t first = first_of(owner, num_members_.load(std::memory_order_relaxed)) + taken, a_piece = a_piece_;
          for (int64_t piece = first * a_piece; piece < std::min(phase->count, (first + 1) * a_piece); ++piece) {
            phase->work(piece);
          }
        }
      }
      if (num_done == 0) return;
      const int64_t all = num_groups_;
      if (num_done_.fetch_add(num_done, std::memory_order_acq_rel) + num_done == all) begin(phase + 1);
    }
  }

  int64_t first_of(int member, int members) const { return (num_groups_ * member + members - 1) / members; }

  // Opens the first phase from here on that has pieces, or ends the run. Nobody holds a piece meanwhile.
  void begin(const Phase* phase) {
    while (phase != end_ && phase->count == 0) ++phase;
    const int members = num_members_.load(std::memory_order_relaxed);
    num_done_.store(0, std::memory_order_relaxed);
    // All shares are empty, and stay so until the phase has changed.
    phase_.store(phase, std::memory_order_release);
    if (phase == end_) {
      is_finished_.store(true, std::memory_order_release);
    } else {
      a_piece_ = (phase->count + members * kMostInRange - 1) / (members * kMostInRange);
      num_groups_ = (phase->count + a_piece_ - 1) / a_piece_;
      ++turn_;
      for (int i = members - 1; i >= 0; --i) {
        const int64_t count = first_of(i + 1, members) - first_of(i, members);
        shares_[i].word.store(Share::of(turn_, 0, count), std::memory_order_release);
      }
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
    std::thread([this, member = num_workers_ + 1] {
      for (;;) {
        const uint32_t seen = signal_.load(std::memory_order_acquire);
        work(member);
        wait(seen);
      }
    }).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    ++num_workers_;
  }

  Share shares_[kMostThreads];
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};  // grows whenever a phase begins or a run ends
  alignas(64) std::atomic<const Phase*> phase_{nullptr};
  // Of the open phase: pieces that are taken together, and how many times. Written while all shares are empty.
  int64_t a_piece_ = 1, num_groups_ = 0;
  uint32_t turn_ = 0;
  std::atomic<int> num_members_{0};
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
