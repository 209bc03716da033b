// Verification on CPU: one thread a row, vector code over chunks of it.
//
// A row is read from memory once, for the maxima of its chunks; drawing then looks again only at chunks that may hold
// the winner, which for a language model's logits are a few.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../operators.h"
#include "../scalars.h"
#include "../verify_ops.h"
#include "vectors.h"

namespace dflash_ray {
namespace {

constexpr int64_t kChunk = 256;  // tokens
constexpr int64_t kTokensWorthAThread = 16384;
constexpr double kGapOfFew = 12;  // to a block's likeliest token, from which on few of its tokens may win
constexpr float kMassless = -22.3f;  // further below the likeliest token, a token's mass is 0
constexpr int64_t kBlock = 64;   // tokens whose noise is drawn together: 16 counters of 4 words

// `count` values as floats: where they lie, or converted into `buffer`.
inline const float* floats_at(const float* from, int64_t, float*) { return from; }

inline const float* floats_at(const Bfloat16* from, int64_t count, float* buffer) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(from[i]);
  return buffer;
}

inline const float* floats_at(const Float16* from, int64_t count, float* buffer) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(bits));
  }
#endif
  for (; i < count; ++i) buffer[i] = to_float(from[i]);
  return buffer;
}

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

// The largest of `count` values; sets `has_nan` where one is not a number.
float maximum_of(const float* x, int64_t count, bool& has_nan) {
  Lanes best[2], nan[2]{};
  best[0] = best[1] = Lanes{} + kMinusInf;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int j = 0; j < 2; ++j) {
      const Lanes value = load(x + i + j * kLanes);
      best[j] = value > best[j] ? value : best[j];
      nan[j] = value != value ? value : nan[j];
    }
  }
  float lanes[2 * kLanes], nans[2 * kLanes];
  for (int j = 0; j < 2; ++j) {
    store(lanes + j * kLanes, best[j]);
    store(nans + j * kLanes, nan[j]);
  }
  float result = kMinusInf;
  for (int j = 0; j < 2 * kLanes; ++j) {
    result = lanes[j] > result ? lanes[j] : result;
    has_nan |= nans[j] != nans[j];
  }
  for (; i < count; ++i) {
    result = x[i] > result ? x[i] : result;
    has_nan |= x[i] != x[i];
  }
  return result;
}

// Maxima of a row's chunks, from the one pass over its memory.
struct Scan {
  std::vector<float> maxima;
  float maximum = kMinusInf;
  bool has_nan = false;

  template <class T>
  void run(const Row<T>& row) {
    float buffer[kChunk];
    maxima.clear();
    maximum = kMinusInf;
    has_nan = false;
    for (int64_t at = 0; at < row.size; at += kChunk) {
      const int64_t count = std::min(kChunk, row.size - at);
      maxima.push_back(maximum_of(floats_at(row.data + at, count, buffer), count, has_nan));
      maximum = std::max(maximum, maxima.back());
    }
  }

  bool is_bad() const { return has_nan || maximum == INFINITY; }

  int64_t chunk_of_maximum() const { return std::find(maxima.begin(), maxima.end(), maximum) - maxima.begin(); }
};

template <class T>
void best_greedy(const Row<T>& row, const Scan& scan, Best& best) {
  if (scan.maximum == kMinusInf) return;
  const int64_t end = std::min(row.size, (scan.chunk_of_maximum() + 1) * kChunk);
  for (int64_t i = scan.chunk_of_maximum() * kChunk; i < end; ++i) {
    if (to_float(row.data[i]) == scan.maximum) return best.take(scan.maximum, row.start + i);
  }
}

// Philox over the 16 counters of a block, two products of 32-bit words a round.
#if defined(__AVX512F__)
struct Counters {
  __m512i at;

  static Counters all(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }
  static Counters from(uint32_t value) {
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm512_add_epi32(all(value).at, steps)};
  }
  Counters operator^(Counters other) const { return {_mm512_xor_si512(at, other.at)}; }
  void multiply(uint32_t factor, Counters& high, Counters& low) const {
    const __m512i by = _mm512_set1_epi64(factor);
    const __m512i even = _mm512_mul_epu32(at, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(at, 32), by);
    high.at = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    low.at = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
  void store(uint32_t* to) const { _mm512_storeu_si512(to, at); }
};
#else
struct Counters {
  uint32_t at[kBlock / 4];

  static Counters all(uint32_t value) {
    Counters counters;
    std::fill_n(counters.at, kBlock / 4, value);
    return counters;
  }
  static Counters from(uint32_t value) {
    Counters counters;
    for (uint32_t i = 0; i < kBlock / 4; ++i) counters.at[i] = value + i;
    return counters;
  }
  Counters operator^(Counters other) const {
    for (int i = 0; i < kBlock / 4; ++i) other.at[i] ^= at[i];
    return other;
  }
  void multiply(uint32_t factor, Counters& high, Counters& low) const {
    for (int i = 0; i < kBlock / 4; ++i) {
      const uint64_t product = uint64_t{factor} * at[i];
      high.at[i] = static_cast<uint32_t>(product >> 32);
      low.at[i] = static_cast<uint32_t>(product);
    }
  }
  void store(uint32_t* to) const { std::copy_n(at, kBlock / 4, to); }
};
#endif

// The noise of a block's tokens: words[w][c] belongs to token first_token + 4 c + w.
void block_words(const RowDraw& draw, int64_t first_token, uint32_t (&words)[4][kBlock / 4]) {
  const uint64_t at = static_cast<uint64_t>(draw.position), key = static_cast<uint64_t>(draw.seed);
  Counters c0 = Counters::all(static_cast<uint32_t>(at)), c1 = Counters::all(static_cast<uint32_t>(at >> 32));
  Counters c2 = Counters::from(static_cast<uint32_t>(first_token >> 2));
  Counters c3 = Counters::all(static_cast<uint32_t>(draw.purpose));
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Counters high0, low0, high1, low1;
    c0.multiply(0xD2511F53u, high0, low0);
    c2.multiply(0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ Counters::all(k0);
    c1 = low1;
    c2 = high0 ^ c3 ^ Counters::all(k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  c0.store(words[0]);
  c1.store(words[1]);
  c2.store(words[2]);
  c3.store(words[3]);
}

// word_that_may_reach for gaps in steps of 1/16, rounded towards smaller words.
struct NeededWords {
  static constexpr int kSteps = 16;
  uint32_t words[static_cast<int>(kMaxGumbel * kSteps) + 1];

  NeededWords() {
    for (size_t i = 0; i < std::size(words); ++i) words[i] = word_that_may_reach(static_cast<float>(i) / kSteps);
  }
  uint32_t operator()(double gap) const {
    if (gap > kMaxGumbel) return kNoWord;
    return gap <= 0 ? 0 : words[static_cast<int>(gap * kSteps)];
  }
};

const NeededWords needed_words;

// Considers the tokens of an aligned, whole block that may still win, four at a time as they share their noise. False,
// with nothing considered, where so many may win that drawing the block's noise at once is quicker.
bool draw_singly(const RowDraw& draw, const float* values, int64_t first_token, Best& best) {
  constexpr int kGroups = kBlock / 4, kFewGroups = 4;
  const float reach = static_cast<float>(best.score - kMaxGumbel) - 1e-3f;  // the margin covers rounding
  uint32_t may_win[kBlock];
  for (int i = 0; i < kBlock; ++i) may_win[i] = values[i] * draw.inv_temperature >= reach;
  int groups[kGroups], num_groups = 0;
  for (int g = 0; g < kGroups; ++g) {
    groups[num_groups] = g;
    num_groups += (may_win[4 * g] | may_win[4 * g + 1] | may_win[4 * g + 2] | may_win[4 * g + 3]) != 0;
  }
  if (num_groups > kFewGroups) return false;
  for (int n = 0; n < num_groups; ++n) {
    const int64_t group = (first_token >> 2) + groups[n];
    const Words words = noise_words(draw.seed, draw.position, group, draw.purpose);
    for (int w = 0; w < 4; ++w) {
      const float scaled = values[4 * groups[n] + w] * draw.inv_temperature;
      if ((words.at[w] >> 8) < needed_words(best.score - static_cast<double>(scaled))) continue;
      consider(draw, scaled, words.at[w], 4 * group + w, best);
    }
  }
  return true;
}

// Considers the tokens [at, end) of a row, block by block; blocks that cannot win cost one maximum or one draw.
template <class T>
void draw_chunk(const Row<T>& row, const RowDraw& draw, int64_t at, int64_t end, Best& best) {
  while (at < end) {
    const int64_t first = (row.start + at) & ~(kBlock - 1), offset = row.start + at - first;
    const int64_t count = std::min(kBlock - offset, end - at);
    float buffer[kBlock];
    const float* values = floats_at(row.data + at, count, buffer);
    bool ignored = false;
    const float highest = maximum_of(values, count, ignored) * draw.inv_temperature;
    const bool is_out = highest == kMinusInf || highest < draw.floor;
    const double gap = best.token < 0 ? 0 : best.score - static_cast<double>(highest);
    const uint32_t needed = is_out ? kNoWord : needed_words(gap);
    const bool has_few = gap > kGapOfFew && count == kBlock;
    if (needed < kNoWord && !(has_few && draw_singly(draw, values, first, best))) {
      uint32_t words[4][kBlock / 4];
      block_words(draw, first, words);
      uint32_t any = 0;
      for (const auto& line : words) {
        for (const uint32_t word : line) any |= (word >> 8) >= needed;
      }
      for (int64_t i = 0; any && i < count; ++i) {
        const uint32_t word = words[(offset + i) & 3][(offset + i) >> 2];
        if ((word >> 8) >= needed) consider(draw, values[i] * draw.inv_temperature, word, row.start + at + i, best);
      }
    }
    at += count;
  }
}

template <class T>
void best_drawn(const Row<T>& row, const Scan& scan, const RowDraw& draw, Best& best) {
  if (scan.maximum == kMinusInf) return;
  // The likeliest chunk first: its winner rules out most others.
  const int64_t likeliest = scan.chunk_of_maximum(), num_chunks = static_cast<int64_t>(scan.maxima.size());
  for (int64_t step = -1; step < num_chunks; ++step) {
    const int64_t chunk = step < 0 ? likeliest : step;
    if (step == likeliest) continue;
    const float highest = scan.maxima[chunk] * draw.inv_temperature;
    if (highest == kMinusInf || highest < draw.floor) continue;
    if (best.token >= 0 && best.score - static_cast<double>(highest) > kMaxGumbel) continue;
    draw_chunk(row, draw, chunk * kChunk, std::min(row.size, (chunk + 1) * kChunk), best);
  }
}

float floor_of(const int64_t* state, int64_t row) {
  return state ? value_of_key(static_cast<uint32_t>(state[row * kStateColumns + kFloorKey])) : kMinusInf;
}

void write_partial(double* partial, const Best& best, float maximum, bool is_bad) {
  partial[kBestScore] = best.score;
  partial[kBestToken] = static_cast<double>(best.token);
  partial[kMaximum] = maximum;
  partial[kIsBad] = is_bad;
}

// Masses of `count` values from `floor` on. What stands behind them up to kChunk is 0.
void masses_of(const float* values, int64_t count, float inv_temperature, float maximum, float floor, float* masses) {
  for (int64_t i = 0; i < count; ++i) {
    const float mass = integral_mass(values[i], inv_temperature, maximum);
    masses[i] = values[i] * inv_temperature >= floor ? mass : 0.0f;
  }
  std::fill(masses + count, masses + kChunk, 0.0f);
}

// Calls work(values, count) for the chunks of a row in which a token may be kept and have a mass.
template <class T, class Work>
void for_massive_chunks(const Row<T>& row, const Scan& scan, float inv_temperature, float maximum, float floor,
                        const Work& work) {
  float buffer[kChunk];
  for (int64_t at = 0; at < row.size; at += kChunk) {
    const float highest = scan.maxima[at / kChunk] * inv_temperature;
    if (highest < floor || highest - maximum < kMassless) continue;
    const int64_t count = std::min(kChunk, row.size - at);
    work(floats_at(row.data + at, count, buffer), count);
  }
}

// Doubles hold a row's sums exactly: less than 2^21 tokens of at most 2^32 each.
template <class T>
double kept_mass(const Row<T>& row, const Scan& scan, float inv_temperature, float maximum, float floor) {
  float masses[kChunk];
  double totals[kLanes]{};
  for_massive_chunks(row, scan, inv_temperature, maximum, floor, [&](const float* values, int64_t count) {
    masses_of(values, count, inv_temperature, maximum, floor, masses);
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) totals[j] += static_cast<double>(masses[i + j]);
    }
  });
  return std::accumulate(totals, totals + kLanes, 0.0);
}

// Raises the floor to the k-th largest value; fewer kept tokens than k all stay.
template <class T>
void keep_top_k(const Row<T>& row, const Scan& scan, int64_t k, float inv_temperature, int64_t* state) {
  thread_local std::vector<float> maxima;
  thread_local std::vector<uint32_t> kept;
  // The k largest chunk maxima are k tokens, so that the k-th largest token lies no lower than the least of them.
  uint32_t low = static_cast<uint32_t>(state[kFloorKey]);
  if (k <= static_cast<int64_t>(scan.maxima.size())) {
    maxima = scan.maxima;
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<>());
    low = std::max(low, key_of(maxima[k - 1] * inv_temperature));
  }
  kept.clear();
  float buffer[kChunk];
  uint32_t keys[kChunk];
  for (int64_t at = 0; at < row.size; at += kChunk) {
    if (key_of(scan.maxima[at / kChunk] * inv_temperature) < low) continue;
    const int64_t count = std::min(kChunk, row.size - at);
    const float* values = floats_at(row.data + at, count, buffer);
    for (int64_t j = 0; j < count; ++j) keys[j] = key_of(values[j] * inv_temperature);
    for (int64_t j = 0; j < count; ++j) {
      if (keys[j] >= low) kept.push_back(keys[j]);
    }
  }
  if (kept.empty()) return;
  const auto last = kept.begin() + (std::min<int64_t>(k, kept.size()) - 1);
  std::nth_element(kept.begin(), last, kept.end(), std::greater<>());
  state[kFloorKey] = std::max<int64_t>(state[kFloorKey], *last);
}

// Distances from the likeliest token in steps of 1/64. What has no mass or is not kept is spread over bins of its own:
// additions to one bin wait for each other.
constexpr float kStepsANat = 64;
constexpr int kSteps = static_cast<int>(-kMassless * kStepsANat) + 1, kDropped = 16;

void steps_of(const float* values, int64_t count, float inv_temperature, float maximum, float floor, int32_t* steps) {
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = values[i] * inv_temperature, distance = (maximum - scaled) * kStepsANat;
    const float step = distance < kSteps ? distance : kSteps;
    const bool is_kept = scaled >= floor && distance < kSteps;
    steps[i] = is_kept ? static_cast<int32_t>(step) : kSteps + static_cast<int32_t>(i % kDropped);
  }
  for (int64_t i = count; i < kChunk; ++i) steps[i] = kSteps;
}

// Raises the floor to the value at which the mass from the largest value down first reaches `share` of all that is kept.
template <class T>
void keep_top_p(const Row<T>& row, const Scan& scan, float share, float inv_temperature, float maximum, int64_t* state) {
  const float floor = floor_of(state, 0);
  double bins[kSteps + kDropped]{};
  float masses[kChunk];
  int32_t steps[kChunk];
  for_massive_chunks(row, scan, inv_temperature, maximum, floor, [&](const float* values, int64_t count) {
    masses_of(values, count, inv_temperature, maximum, floor, masses);
    steps_of(values, count, inv_temperature, maximum, floor, steps);
    for (int64_t i = 0; i < kChunk; ++i) bins[steps[i]] += static_cast<double>(masses[i]);
  });
  const double total = std::accumulate(bins, bins + kSteps, 0.0);
  const double wanted = std::min(total, std::max(1.0, ceil(static_cast<double>(share) * total)));
  double above = 0;
  int step = 0;
  while (step < kSteps - 1 && above + bins[step] < wanted) above += bins[step++];
  // The bin in which it is reached, token by token.
  thread_local std::vector<std::pair<uint32_t, float>> tokens;
  tokens.clear();
  for_massive_chunks(row, scan, inv_temperature, maximum, floor, [&](const float* values, int64_t count) {
    steps_of(values, count, inv_temperature, maximum, floor, steps);
    int any = 0;
    for (int64_t i = 0; i < kChunk; ++i) any |= steps[i] == step;
    for (int64_t i = 0; any && i < count; ++i) {
      if (steps[i] != step) continue;
      tokens.emplace_back(key_of(values[i] * inv_temperature), integral_mass(values[i], inv_temperature, maximum));
    }
  });
  std::sort(tokens.begin(), tokens.end(), std::greater<>());
  for (const auto& [key, mass] : tokens) {
    above += static_cast<double>(mass);
    if (above >= wanted) {
      state[kFloorKey] = std::max<int64_t>(state[kFloorKey], key);
      return;
    }
  }
}

// Calls work(Row, index) for every row, in parallel.
template <class Work>
void for_rows(const LogitsView& logits, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kTokensWorthAThread / std::max<int64_t>(logits.size, 1));
  at::parallel_for(0, logits.num_rows, grain, [&](int64_t begin, int64_t end) {
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
    partial[kMass] = kept_mass(row, scan, inv_temperature, maximum, floor);
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
    const double total = is_rejected ? least : kept_mass(row, scan, inv_temperature, maximum, floor);
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
                        int64_t width, double* partials) {
    for_rows(logits, [&](auto row, int64_t i) {
      thread_local Scan scan;
      const int64_t* sequence = plan.sequence(plan.row(i)[kRowSequence]);
      const float* parameters = plan.parameters(plan.row(i)[kRowSequence]);
      if (adjusts) adjust(plan, i, row);
      scan.run(row);
      const float scale = temperature_scale(plan, i), maximum = scan.maximum * scale;
      const bool is_finite = !scan.is_bad() && maximum > kMinusInf;
      int64_t state[kStateColumns];
      dflash_ray::start_threshold(parameters, maximum, state);
      if (!is_greedy(parameters) && is_finite) {
        if (sequence[kTopK] > 0) keep_top_k(row, scan, sequence[kTopK], scale, state);
        if (parameters[kTopP] < 1) keep_top_p(row, scan, parameters[kTopP], scale, maximum, state);
      }
      const float floor = floor_of(state, 0);
      double* partial = partials + i * width;
      if (drafts.width == 1 && drafts.probs[i] == 1 && is_judged(plan, drafts, i) && is_finite) {
        judge_alone(row, scan, i, plan, maximum, floor, drafts, partial);
        return;
      }
      draw_row(row, scan, i, plan, floor, drafts, partial);
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
