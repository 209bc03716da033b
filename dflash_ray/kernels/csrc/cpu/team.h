// The threads of the CPU operators: one team for the life of the process.
//
// Work comes as phases of small pieces. A piece belongs to whichever thread takes it from a shared counter, and whoever
// completes the last piece of a phase begins the next one, so that a thread that lost its core holds up no more than
// the piece that it had taken. What a piece computes must not depend on who computes it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace dflash_ray {

// Pieces 0, ..., count - 1, in any order and at the same time. `work` must not throw.
struct Phase {
  int64_t count;
  std::function<void(int64_t piece)> work;
};

// Runs phases one after the other on as many threads as torch has, the caller among them; returns when all is done.
// The team serves one caller: another one that comes meanwhile, or from within a piece, works alone.
void run_phases(const std::vector<Phase>& phases);

// One phase.
template <class Work>
void for_pieces(int64_t count, const Work& work) {
  if (count == 1) return work(0);
  run_phases({{count, [&work](int64_t piece) { work(piece); }}});
}

// [0, count) in ranges of at most `grain`: work(begin, end).
template <class Work>
void in_ranges(int64_t count, int64_t grain, const Work& work) {
  for_pieces((count + grain - 1) / grain, [&](int64_t piece) {
    work(piece * grain, std::min(count, (piece + 1) * grain));
  });
}

}  // namespace dflash_ray
