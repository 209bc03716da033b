// Verification on CPU: one thread a row, vector code over blocks of it.
//
// A row is read from memory once, for the maxima of its blocks; what follows looks again, in cache, at blocks that may
// matter.

#include <algorithm>
#include <cstring>

#include "../operators.h"
#include "../verify_ops.h"
#include "drawing.h"
#include "masses.h"
#include "rows.h"
#include "team.h"
#include "thresholds.h"

namespace dflash_ray {
namespace {

constexpr int64_t kTokensWorthAThread = 16384;

template <class T>
void adjust(const PlanView& plan, int64_t row, Row<T>& logits) {
  const int64_t s = plan.row(row)[kRowSequence];
  const int64_t* sequence = plan.sequence(s);
  if (!Penalties(plan.parameters(s)).are_off()) {
    for (int64_t e = 0; e < sequence[kHistoryLen]; ++e) penalise_history(plan, row, e, logits);
    penalise_path(plan, row, logits);
  }
  for (int64_t e = 0; e < sequence[kBiasLen]; ++e) add_bias(plan, sequence, e, logits);
  if (plan.row(row)[kRowPosition] < sequence[kBanBelow]) {
    for (int64_t e = 0; e < sequence[kBannedLen]; ++e) ban(plan, sequence, e, logits);
  }
}

template <class T>
void best_greedy(const Row<T>& row, const Scan& scan, Best& best) {
  if (scan.maximum == kMinusInf) return;
  const int64_t block = scan.block_of_maximum(), end = scan.end(block);
  for (int64_t i = scan.begin(block); i < end; ++i) {
    if (to_float(row.data[i]) == scan.maximum) return best.take(scan.maximum, row.start + i);
  }
}

void write_partial(double* partial, const Best& best, float maximum, bool is_bad) {
  partial[kBestScore] = best.score;
  partial[kBestToken] = static_cast<double>(best.token);
  partial[kMaximum] = maximum;
  partial[kIsBad] = is_bad;
}

// Calls work(Row, index) for every row, in parallel.
template <class Work>
void for_rows(const LogitsView& logits, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kTokensWorthAThread / std::max<int64_t>(logits.size, 1));
  in_ranges(logits.num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      switch (logits.kind) {
        case Kind::kFloat32:
          work(Row<float>{static_cast<float*>(logits.data) + i * logits.stride, logits.size, logits.start}, i);
          break;
        case Kind::kBfloat16:
          work(Row<Bfloat16>{static_cast<Bfloat16*>(logits.data) + i * logits.stride, logits.size, logits.start}, i);
          break;
        case Kind::kFloat16:
          work(Row<Float16>{static_cast<Float16*>(logits.data) + i * logits.stride, logits.size, logits.start}, i);
          break;
      }
    }
  });
}

float temperature_scale(const PlanView& plan, int64_t row) {
  const float* parameters = plan.parameters(plan.row(row)[kRowSequence]);
  return is_greedy(parameters) ? 1.0f : parameters[kInvTemperature];
}

struct CpuBackend {
  static void prepare(const LogitsView& logits, const PlanView& plan, double* stats) {
    for_rows(logits, [&](auto row, int64_t i) {
      thread_local Scan scan;
      adjust(plan, i, row);
      scan.run(row);
      stats[2 * i] = scan.maximum * temperature_scale(plan, i);
      stats[2 * i + 1] = scan.is_bad();
    });
  }

  static void threshold_start(const double* maxima, const PlanView& plan, int64_t* state) {
    for (int64_t i = 0; i < plan.num_rows; ++i) {
      dflash_ray::start_threshold(plan.parameters(plan.row(i)[kRowSequence]), maxima[i], state + i * kStateColumns);
    }
  }

  static void threshold_histogram(const LogitsView& logits, const PlanView& plan, const double* maxima,
                                  const int64_t* states, int index, int64_t* histograms) {
    const Round round(index);
    for_rows(logits, [&](auto row, int64_t i) {
      int64_t* histogram = histograms + i * kBins;
      const int64_t s = plan.row(i)[kRowSequence], *state = states + i * kStateColumns;
      const float inv_temperature = plan.parameters(s)[kInvTemperature], maximum = static_cast<float>(maxima[i]);
      std::fill_n(histogram, kBins, 0);
      if (!round.concerns(plan.sequence(s), plan.parameters(s))) return;
      // Neighbours fall into few bins: histograms of their own keep additions from waiting for each other.
      constexpr int kLanesOfBins = 4;
      double bins[kLanesOfBins][kBins]{};  // exact, as in kept_mass
      const uint64_t low = std::max(state[kFloorKey], round.shift == 24 ? 0 : state[kPrefix]);
      const uint64_t high = round.shift == 24 ? uint64_t{1} << 32 : state[kPrefix] + (uint64_t{1} << (round.shift + 8));
      float buffer[kChunk];
      uint32_t keys[kChunk];
      float weights[kChunk];
      for (int64_t at = 0; at < row.size; at += kChunk) {
        const int64_t count = std::min(kChunk, row.size - at);
        const float* values = floats_at(row.data + at, count, buffer);
        uint32_t any = 0;
        for (int64_t j = 0; j < count; ++j) {
          keys[j] = key_of(values[j] * inv_temperature);
          any |= keys[j] >= low && keys[j] < high;
        }
        if (!any) continue;
        if (round.is_top_k) {
          std::fill_n(weights, kChunk, 1.0f);
        } else {
          masses_of(values, count, inv_temperature, maximum, kMinusInf, weights);
        }
        for (int64_t j = 0; j < count; ++j) {
          if (keys[j] < low || keys[j] >= high) continue;
          bins[j % kLanesOfBins][keys[j] >> round.shift & (kBins - 1)] += static_cast<double>(weights[j]);
        }
      }
      for (const auto& lane : bins) {
        for (int bin = 0; bin < kBins; ++bin) histogram[bin] += static_cast<int64_t>(lane[bin]);
      }
    });
  }

  static void threshold_narrow(const int64_t* histograms, const PlanView& plan, int round, int64_t* states) {
    for (int64_t i = 0; i < plan.num_rows; ++i) {
      const int64_t s = plan.row(i)[kRowSequence];
      narrow_threshold(round, plan.sequence(s), plan.parameters(s), histograms + i * kBins, states + i * kStateColumns);
    }
  }

  static void greedy(const LogitsView& logits, const PlanView& plan, bool adjusts, double* partials) {
    for_rows(logits, [&](auto row, int64_t i) {
      thread_local Scan scan;
      if (adjusts) adjust(plan, i, row);
      scan.run(row);
      Best best;
      best_greedy(row, scan, best);
      write_partial(partials + i * kPlainPartials, best, scan.maximum, scan.is_bad());
    });
  }

  // One row of a mixed batch, scanned: greedy or drawn.
  template <class T>
  static void draw_row(const Row<T>& row, const Scan& scan, int64_t i, const PlanView& plan, float floor,
                       const DraftView& drafts, double* partial) {
    Best best;
    if (is_greedy(plan.parameters(plan.row(i)[kRowSequence]))) {
      best_greedy(row, scan, best);
    } else if (!scan.is_bad()) {
      best_drawn(row, scan, row_draw(plan, drafts, i, floor), best);
    }
    write_partial(partial, best, scan.maximum * temperature_scale(plan, i), scan.is_bad());
  }

  // What rejection sampling needs of a row beside its draw.
  template <class T>
  static void write_masses(const Row<T>& row, const Scan& scan, int64_t i, const PlanView& plan, float maximum,
                           float floor, const DraftView& drafts, double* partial) {
    std::fill_n(partial + kMass, 1 + drafts.width, 0.0);
    if (!is_judged(plan, drafts, i) || partial[kIsBad] != 0) return;
    const float inv_temperature = temperature_scale(plan, i);
    partial[kMass] = kept_mass(ScaledRow<T>{row, scan, inv_temperature, maximum}, floor);
    for (int64_t j = 0; j < drafts.width; ++j) {
      const int64_t token = drafts.ids[i * drafts.width + j];
      if (!row.has(token) || row.get(token) * inv_temperature < floor) continue;
      partial[kDraftMass + j] = static_cast<double>(mass_of(row.get(token), inv_temperature, maximum));
    }
  }

  // A judged row whose only candidate was drawn for certain. As no other shard has a say, acceptance is known: a row that
  // accepts draws nothing, and one that rejects whatever the total tells the likeliest token's mass in its place.
  template <class T>
  static void judge_alone(const Row<T>& row, const Scan& scan, int64_t i, const PlanView& plan, float maximum,
                          float floor, const DraftView& drafts, double* partial) {
    const float inv_temperature = temperature_scale(plan, i);
    const int64_t token = drafts.ids[i], seed = plan.sequence(plan.row(i)[kRowSequence])[kSeed];
    const bool is_kept = row.has(token) && row.get(token) * inv_temperature >= floor;
    const double mass = is_kept ? static_cast<double>(mass_of(row.get(token), inv_temperature, maximum)) : 0.0;
    const double least = static_cast<double>(mass_of(scan.maximum, inv_temperature, maximum));
    const double uniform = uniform_of(noise_words(seed, plan.row(i)[kRowPosition], 0, kAcceptDraw).at[0]);
    const bool is_rejected = mass <= least && uniform * least >= mass;
    const double total = is_rejected ? least : kept_mass(ScaledRow<T>{row, scan, inv_temperature, maximum}, floor);
    if (uniform * total < mass) {
      write_partial(partial, {}, maximum, false);
    } else {
      draw_row(row, scan, i, plan, floor, drafts, partial);
    }
    partial[kMass] = total;
    partial[kDraftMass] = mass;
  }

  static void coupled(const LogitsView& logits, const PlanView& plan, const int64_t* state, bool adjusts,
                      double* partials) {
    for_rows(logits, [&](auto row, int64_t i) {
      thread_local Scan scan;
      if (adjusts) adjust(plan, i, row);
      scan.run(row);
      draw_row(row, scan, i, plan, floor_of(state, i), {}, partials + i * kPlainPartials);
    });
  }

  static void rejection(const LogitsView& logits, const PlanView& plan, const double* maxima, const int64_t* state,
                        const DraftView& drafts, double* partials) {
    for_rows(logits, [&](auto row, int64_t i) {
      thread_local Scan scan;
      double* partial = partials + i * (kDraftMass + drafts.width);
      const float floor = floor_of(state, i);
      scan.run(row);
      draw_row(row, scan, i, plan, floor, drafts, partial);
      write_masses(row, scan, i, plan, static_cast<float>(maxima[i]), floor, drafts, partial);
    });
  }

  // All of it for rows that lie here whole, while each is in cache. `width` is that of the partials.
  static void unsharded(const LogitsView& logits, const PlanView& plan, const DraftView& drafts, bool adjusts,
                        const Limits&, int64_t width, double* partials) {
    for_rows(logits, [&](auto row, int64_t i) {
      thread_local Scan scan;
      const int64_t* sequence = plan.sequence(plan.row(i)[kRowSequence]);
      const float* parameters = plan.parameters(plan.row(i)[kRowSequence]);
      if (adjusts) adjust(plan, i, row);
      scan.run(row);
      const float scale = temperature_scale(plan, i), maximum = scan.maximum * scale;
      const bool is_finite = !scan.is_bad() && maximum > kMinusInf, is_drawn = !is_greedy(parameters) && is_finite;
      const bool is_judged = dflash_ray::is_judged(plan, drafts, i), has_top_p = is_drawn && parameters[kTopP] < 1;
      const ScaledRow scaled{row, scan, scale, maximum};
      double* partial = partials + i * width;
      int64_t state[kStateColumns];
      dflash_ray::start_threshold(parameters, maximum, state);
      if (is_drawn && sequence[kTopK] > 0) keep_top_k(scaled, sequence[kTopK], state);
      bool is_settled = false;
      if (has_top_p && !is_judged) {
        // The winner among all tokens is the winner among those of top-p if it is one of them, as it mostly is.
        draw_row(row, scan, i, plan, floor_of(state, 0), drafts, partial);
        const int64_t token = static_cast<int64_t>(partial[kBestToken]);
        is_settled = row.has(token) &&
                     surely_in_top_p(scaled, parameters[kTopP], floor_of(state, 0), row.get(token) * scale);
      }
      if (has_top_p && !is_settled) keep_top_p(scaled, parameters[kTopP], state);
      const float floor = floor_of(state, 0);
      if (is_judged && is_finite && drafts.width == 1 && drafts.probs[i] == 1) {
        judge_alone(row, scan, i, plan, maximum, floor, drafts, partial);
        return;
      }
      if (!is_settled) draw_row(row, scan, i, plan, floor, drafts, partial);
      if (drafts.width > 0) write_masses(row, scan, i, plan, maximum, floor, drafts, partial);
    });
  }

  static void combine(const PartialsView& partials, const PlanView& plan, const DraftView& drafts, int64_t depth,
                      int64_t* outcomes) {
    for (int64_t s = 0; s < plan.num_sequences; ++s) {
      walk(plan, drafts, partials, s, depth, outcomes + s * (kOutcomeHead + 2 * depth));
    }
  }

  static void commit(const int64_t* outcomes, int64_t width, const PlanView& plan, char* features, int64_t row_bytes,
                     int64_t* commits) {
    const int64_t depth = (width - kOutcomeHead) / 2;
    for (int64_t s = 0; s < plan.num_sequences; ++s) {
      const int64_t* outcome = outcomes + s * width;
      commit_sequence(plan, s, outcome, commits + s * kCommitColumns);
      const int64_t first = plan.sequence(s)[kFeatureRow];
      if (features == nullptr || first < 0) continue;
      for (int64_t j = 0; j < outcome[kNumAccepted]; ++j) {
        // Accepted rows ascend, so no row is overwritten before it is read.
        const int64_t from = outcome[kOutcomeHead + depth + j], to = j + 1;
        if (from != to) std::memcpy(features + (first + to) * row_bytes, features + (first + from) * row_bytes, row_bytes);
      }
    }
  }

  static void logprobs(const LogitsView& logits, const int64_t* chosen, int64_t num_top, double* out) {
    for_rows(logits, [&](auto row, int64_t i) {
      thread_local Scan scan;
      scan.run(row);
      double* line = out + i * (3 + 2 * num_top);
      float buffer[kChunk];
      line[0] = scan.maximum;
      line[1] = 0;
      for (int64_t at = 0; at < row.size && scan.maximum > kMinusInf; at += kChunk) {
        const int64_t count = std::min(kChunk, row.size - at);
        const float* values = floats_at(row.data + at, count, buffer);
        for (int64_t j = 0; j < count; ++j) line[1] += exp_of_nonpositive(values[j] - scan.maximum);
      }
      line[2] = row.has(chosen[i]) ? row.get(chosen[i]) : kMinusInf;
      Best last{INFINITY, -1};
      for (int64_t n = 0; n < num_top; ++n) {
        Best next;
        for (int64_t j = 0; j < row.size; ++j) {
          const float value = to_float(row.data[j]);
          const bool is_after = value < last.score || (value == last.score && row.start + j > last.token);
          if (is_after && value > next.score) next = {value, row.start + j};
        }
        line[3 + 2 * n] = next.score;
        line[4 + 2 * n] = static_cast<double>(next.token);
        last = next;
      }
    });
  }

  static void noise(const int64_t* seeds, const int64_t* positions, const int64_t* ids, int64_t count, int64_t width,
                    int purpose, double* out) {
    for (int64_t i = 0; i < count * width; ++i) {
      out[i] = gumbel(seeds[i / width], positions[i / width], ids[i], purpose);
    }
  }
};

}  // namespace

void register_verify_cpu(torch::Library& library) { VerifyOps<CpuBackend, NoGuard>::register_in(library); }

}  // namespace dflash_ray
