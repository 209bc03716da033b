// The arithmetic of verification, the same on every device: noise, sampling law, acceptance, commit.
//
// Everything that can change a token is decided here, by integers, by comparisons, or by floating point operations in a
// fixed order (fused multiply-adds are spelled out, so that no compiler may add or drop one). What differs between
// devices is only how a row is read.
//
// Terms are those of sampling/verify.py; the columns of a plan are described in kernels/columns.py.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define DFLASH_FN __host__ __device__ __forceinline__
#else
#define DFLASH_FN inline
#endif

namespace dflash_ray {

// Columns of a plan; the order is that of kernels/columns.py.
enum RowColumn { kRowSequence, kRowPosition, kRowToken, kRowParent, kRowColumns };
enum IntColumn {
  kSeed, kMode, kTopK, kFirstRow, kNumRows, kRootPosition, kBanBelow, kMinLen, kMaxLen, kFeatureRow,
  kHistoryAt, kHistoryLen, kBiasAt, kBiasLen, kBannedAt, kBannedLen, kStopAt, kStopLen, kIntColumns
};
enum FloatColumn { kInvTemperature, kTopP, kLogMinP, kPresence, kFrequency, kRepetition, kFloatColumns };
enum Mode { kCoupled, kRejection };
enum Purpose { kTargetDraw, kAcceptDraw, kResidualDraw };
enum Finish { kGoesOn, kStopped, kFull };

// What a shard says of a row: numbers that are gathered from all shards.
// The mass and one mass for each draft candidate only in rejection mode.
enum Partial { kBestScore, kBestToken, kMaximum, kIsBad, kMass, kDraftMass, kPlainPartials = kMass };

constexpr float kMinusInf = -INFINITY;
constexpr double kMaxGumbel = 17.33;           // above -log(-log(1 - 2^-25)) by more than its rounding
constexpr uint32_t kNoWord = 1u << 24;         // above all 24-bit words
constexpr double kMassUnit = 4294967296.0;     // masses are multiples of 2^-32 of the likeliest token's
constexpr float kMassless = -22.3f;            // further below the likeliest token, a token's mass is 0

// Which limits a step's sequences have.
struct Limits {
  bool has_min_p, has_top_k, has_top_p;
};

enum class Kind { kFloat32, kBfloat16, kFloat16 };

// Rows of a shard's logits: tokens start ... start + size - 1.
struct LogitsView {
  void* data;
  Kind kind;
  int64_t num_rows, size, stride, start;
};

struct PlanView {
  const int64_t* rows;     // [R, kRowColumns]
  const int64_t* ints;     // [S, kIntColumns]
  const float* floats;     // [S, kFloatColumns]
  const int64_t* ids;      // [E] of histories, biases, banned and stop tokens
  const float* values;     // [E]
  int64_t num_rows, num_sequences;

  DFLASH_FN const int64_t* row(int64_t i) const { return rows + i * kRowColumns; }
  DFLASH_FN const int64_t* sequence(int64_t s) const { return ints + s * kIntColumns; }
  DFLASH_FN const float* parameters(int64_t s) const { return floats + s * kFloatColumns; }
};

// Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (position, token / 4, purpose), word = token % 4.
struct Words {
  uint32_t at[4];
};

DFLASH_FN Words philox(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.at[0], p1 = uint64_t{0xCD9E8D57u} * c.at[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.at[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.at[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

DFLASH_FN Words noise_words(int64_t seed, int64_t position, int64_t token_group, int purpose) {
  const uint64_t key = static_cast<uint64_t>(seed), at = static_cast<uint64_t>(position);
  return philox({{static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), static_cast<uint32_t>(token_group),
                  static_cast<uint32_t>(purpose)}},
                static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// One of the words; chosen by comparisons, so that they can stay in registers.
DFLASH_FN uint32_t noise_word(int64_t seed, int64_t position, int64_t token, int purpose) {
  const Words words = noise_words(seed, position, token >> 2, purpose);
  const uint32_t even = token & 2 ? words.at[2] : words.at[0], odd = token & 2 ? words.at[3] : words.at[1];
  return token & 1 ? odd : even;
}

// Open uniform of the word's upper 24 bits.
DFLASH_FN double uniform_of(uint32_t word) { return (static_cast<double>(word >> 8) + 0.5) * 0x1p-24; }

DFLASH_FN float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DFLASH_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// log((1 + x) * 2^exponent) for 1 + x between the roots of 1/2 and 2, to about 1e-7. Polynomial after Cephes' logf.
DFLASH_FN float log_near_one(float x, float exponent) {
  float p = 7.0376836292e-2f;
  p = fmaf(p, x, -1.1514610310e-1f);
  p = fmaf(p, x, 1.1676998740e-1f);
  p = fmaf(p, x, -1.2420140846e-1f);
  p = fmaf(p, x, 1.4249322787e-1f);
  p = fmaf(p, x, -1.6668057665e-1f);
  p = fmaf(p, x, 2.0000714765e-1f);
  p = fmaf(p, x, -2.4999993993e-1f);
  p = fmaf(p, x, 3.3333331174e-1f);
  const float square = x * x;
  p = fmaf(exponent, -2.12194440e-4f, p * x * square);
  p = fmaf(-0.5f, square, p);
  return fmaf(exponent, 0.693359375f, x + p);
}

constexpr uint32_t kRootOfHalf = 0x3F3504F3u;  // as bits of a float

// Natural logarithm of a positive, normal float.
DFLASH_FN float log_of(float value) {
  const uint32_t above = bits_of(value) - kRootOfHalf;
  const float mantissa = float_of_bits((above & 0x7FFFFFu) + kRootOfHalf);
  return log_near_one(mantissa - 1.0f, static_cast<float>(static_cast<int32_t>(above) >> 23));
}

// Standard Gumbel noise -log(-log(uniform_of(word))), at most kMaxGumbel, to about 1e-6. The uniform has 25 bits; it is
// taken apart as an integer, so that what stands before the logarithms is exact.
DFLASH_FN float gumbel_of(uint32_t word) {
  constexpr uint32_t kRoot = 23726566u;  // the root of 1/2 in units of 2^-25
  const uint32_t odd = (word >> 8) * 2 + 1;
#ifdef __CUDA_ARCH__
  const int shift = __clz(static_cast<int>(odd)) - 7;
#else
  const int shift = __builtin_clz(odd) - 7;
#endif
  const uint32_t mantissa = odd << shift;  // from 2^24 on, below 2^25
  const bool is_high = mantissa > kRoot;
  const float x = is_high ? static_cast<float>((1u << 25) - mantissa) * -0x1p-25f
                          : static_cast<float>(mantissa - (1u << 24)) * 0x1p-24f;
  return -log_of(-log_near_one(x, static_cast<float>(is_high ? -shift : -shift - 1)));
}

DFLASH_FN float gumbel(int64_t seed, int64_t position, int64_t token, int purpose) {
  return gumbel_of(noise_word(seed, position, token, purpose));
}

// exp(x) for x <= 0 (tiny positive x are allowed) with a relative error below 2^-22; 0 below the range of normal
// floats, and for NaN (a row with one is flagged; its sums need only be defined). Branch-free, so that loops over it
// become vector code. Range reduction and polynomial after Cephes' expf.
DFLASH_FN float exp_of_nonpositive(float x) {
  const bool counts = x >= -87.0f;
  const float clamped = counts ? x : -87.0f;
  const float n = floorf(fmaf(clamped, 1.44269504f, 0.5f));
  const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, clamped));
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p * r, r, r) + 1.0f;
  const float scale = float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return counts ? p * scale : 0.0f;
}

// A lower bound of the 24-bit words whose noise reaches `gap`; kNoWord when none does. Exact pruning: a token with a
// smaller word cannot win. The uniform needed is exp(-exp(-gap)) >= 1 - exp(-gap); the margins cover rounding.
DFLASH_FN uint32_t word_that_may_reach(float gap) {
  if (gap > static_cast<float>(kMaxGumbel) + 1e-3f) return kNoWord;
  if (gap <= 1e-2f) return 0;
  const float word = (1.0f - 1.001f * exp_of_nonpositive(1e-3f - gap)) * 16777216.0f - 8.0f;
  return word <= 0 ? 0 : static_cast<uint32_t>(word);
}

// Unsigned integers in the order of the floats; both zeros are one.
DFLASH_FN uint32_t key_of(float value) {
  const uint32_t bits = bits_of(value == 0.0f ? 0.0f : value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DFLASH_FN float value_of_key(uint32_t key) {
  return float_of_bits(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

// Mass of a token relative to the likeliest one, in multiples of 2^-32 and of integral value, so that sums over threads
// and shards do not depend on their order.
DFLASH_FN float integral_mass(float logit, float inv_temperature, float maximum) {
  return floorf(exp_of_nonpositive(fmaf(logit, inv_temperature, -maximum)) * 4294967296.0f);
}

DFLASH_FN int64_t mass_of(float logit, float inv_temperature, float maximum) {
  return static_cast<int64_t>(integral_mass(logit, inv_temperature, maximum));
}

struct Penalties {
  float presence, frequency, repetition;

  DFLASH_FN explicit Penalties(const float* parameters)
      : presence(parameters[kPresence]), frequency(parameters[kFrequency]), repetition(parameters[kRepetition]) {}

  DFLASH_FN bool are_off() const { return presence == 0 && frequency == 0 && repetition == 1; }

  // A logit of a token that the prompt or the output has, `times` times in the output.
  DFLASH_FN float operator()(float logit, float times) const {
    logit = logit > 0 ? logit / repetition : logit * repetition;
    logit = fmaf(-frequency, times, logit);
    return times > 0 ? logit - presence : logit;
  }
};

DFLASH_FN bool is_greedy(const float* parameters) { return parameters[kInvTemperature] == 0; }

// How often a row's path from below the root has a token, the row's own included.
DFLASH_FN int times_on_path(const PlanView& plan, int64_t row, int64_t token) {
  int times = 0;
  for (; plan.row(row)[kRowParent] >= 0; row = plan.row(row)[kRowParent]) times += plan.row(row)[kRowToken] == token;
  return times;
}

// Penalises history entry e of the row's sequence; `logits` is the row's shard. Entries have different tokens.
template <class Row>
DFLASH_FN void penalise_history(const PlanView& plan, int64_t row, int64_t e, Row& logits) {
  const int64_t s = plan.row(row)[kRowSequence], at = plan.sequence(s)[kHistoryAt] + e;
  const int64_t token = plan.ids[at];
  if (!logits.has(token)) return;
  const float times = plan.values[at] + static_cast<float>(times_on_path(plan, row, token));
  logits.set(token, Penalties(plan.parameters(s))(logits.get(token), times));
}

// Penalises the drafts on the row's path that its sequence's history lacks. History ids ascend.
template <class Row>
DFLASH_FN void penalise_path(const PlanView& plan, int64_t row, Row& logits) {
  const int64_t s = plan.row(row)[kRowSequence];
  const int64_t* sequence = plan.sequence(s);
  const int64_t* history = plan.ids + sequence[kHistoryAt];
  for (int64_t at = row; plan.row(at)[kRowParent] >= 0; at = plan.row(at)[kRowParent]) {
    const int64_t token = plan.row(at)[kRowToken];
    // Once for each token: at its first occurrence below the root.
    if (!logits.has(token) || times_on_path(plan, at, token) > 1) continue;
    int64_t low = 0, high = sequence[kHistoryLen];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (history[middle] < token) low = middle + 1; else high = middle;
    }
    if (low < sequence[kHistoryLen] && history[low] == token) continue;
    const float times = static_cast<float>(times_on_path(plan, row, token));
    logits.set(token, Penalties(plan.parameters(s))(logits.get(token), times));
  }
}

template <class Row>
DFLASH_FN void add_bias(const PlanView& plan, const int64_t* sequence, int64_t e, Row& logits) {
  const int64_t token = plan.ids[sequence[kBiasAt] + e];
  if (logits.has(token)) logits.set(token, logits.get(token) + plan.values[sequence[kBiasAt] + e]);
}

template <class Row>
DFLASH_FN void ban(const PlanView& plan, const int64_t* sequence, int64_t e, Row& logits) {
  const int64_t token = plan.ids[sequence[kBannedAt] + e];
  if (logits.has(token)) logits.set(token, kMinusInf);
}

// Top-k and top-p are one threshold, the lowest kept value, found by a radix select over the ordered keys.
// Rounds 0 to 3 find the k-th largest value, rounds 4 to 7 the value at which the mass from the largest value down
// first reaches top-p. Each round fixes eight bits of the key from a histogram of counts or masses, which are integers.
// Tokens that tie with the threshold are kept together.

enum StateColumn { kPrefix, kWanted, kFloorKey, kStateColumns };
constexpr int kBins = 256, kRounds = 8;

struct Round {
  bool is_top_k;
  int shift;

  DFLASH_FN explicit Round(int round) : is_top_k(round < 4), shift(24 - 8 * (round & 3)) {}

  DFLASH_FN bool concerns(const int64_t* sequence, const float* parameters) const {
    return !is_greedy(parameters) && (is_top_k ? sequence[kTopK] > 0 : parameters[kTopP] < 1);
  }

  // Whether the key is among those that earlier rounds left over.
  DFLASH_FN bool has(uint32_t key, const int64_t* state) const {
    const bool is_kept = key >= static_cast<uint32_t>(state[kFloorKey]);
    return is_kept && (shift == 24 || key >> (shift + 8) == static_cast<uint32_t>(state[kPrefix]) >> (shift + 8));
  }
};

// Before the first round: min-p alone.
DFLASH_FN void start_threshold(const float* parameters, double maximum, int64_t* state) {
  const float floor = is_greedy(parameters) ? kMinusInf : static_cast<float>(maximum) + parameters[kLogMinP];
  state[kPrefix] = state[kWanted] = 0;
  state[kFloorKey] = key_of(floor != floor ? kMinusInf : floor);
}

// The mass that top-p keeps at least, of the mass of all tokens.
DFLASH_FN int64_t wanted_mass(float top_p, int64_t total) {
  const double share = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  const int64_t wanted = share < 1 ? 1 : static_cast<int64_t>(share);
  return wanted < total ? wanted : total;
}

// Takes a round's histogram, summed over shards.
DFLASH_FN void narrow_threshold(int index, const int64_t* sequence, const float* parameters, const int64_t* histogram,
                                int64_t* state) {
  const Round round(index);
  if (!round.concerns(sequence, parameters)) return;
  if (round.shift == 24) {
    int64_t total = 0;
    for (int bin = 0; bin < kBins; ++bin) total += histogram[bin];
    const int64_t k = sequence[kTopK] < total ? sequence[kTopK] : total;  // fewer tokens than wanted: all stay
    state[kWanted] = round.is_top_k ? k : wanted_mass(parameters[kTopP], total);
    state[kPrefix] = 0;
  }
  int64_t above = 0;
  int bin = kBins - 1;
  while (bin > 0 && above + histogram[bin] < state[kWanted]) above += histogram[bin--];
  state[kWanted] -= above;
  state[kPrefix] |= static_cast<int64_t>(bin) << round.shift;
  if (round.shift == 0 && state[kPrefix] > state[kFloorKey]) state[kFloorKey] = state[kPrefix];
}

// The best token seen so far.
struct Best {
  double score = kMinusInf;
  int64_t token = -1;

  // The higher score; of equal ones the lower token.
  DFLASH_FN void take(double other_score, int64_t other_token) {
    if (other_score > score || (other_score == score && other_token >= 0 && (token < 0 || other_token < token))) {
      score = other_score;
      token = other_token;
    }
  }
};

// How the row draws: which noise, and which tokens a rejected draft leaves out.
struct RowDraw {
  int64_t seed, position;
  float inv_temperature, floor;
  int purpose;
  const int64_t* excluded;  // draft candidates, or null
  int64_t num_excluded;

  DFLASH_FN bool leaves_out(int64_t token) const {
    for (int64_t i = 0; i < num_excluded; ++i) {
      if (excluded[i] == token) return true;
    }
    return false;
  }
};

// Drafts of the rows, for rejection sampling: candidates of the row's child and their draft probabilities.
struct DraftView {
  const int64_t* ids;   // [R, width], -1 for none
  const float* probs;   // [R, width]
  int64_t width;        // 0 outside rejection mode
};

DFLASH_FN bool is_judged(const PlanView& plan, const DraftView& drafts, int64_t row) {
  const int64_t s = plan.row(row)[kRowSequence];
  return drafts.width > 0 && plan.sequence(s)[kMode] == kRejection && !is_greedy(plan.parameters(s)) &&
         drafts.ids[row * drafts.width] >= 0;
}

DFLASH_FN RowDraw row_draw(const PlanView& plan, const DraftView& drafts, int64_t row, float floor) {
  const int64_t s = plan.row(row)[kRowSequence];
  const bool judged = is_judged(plan, drafts, row);
  return {plan.sequence(s)[kSeed],  plan.row(row)[kRowPosition],
          plan.parameters(s)[kInvTemperature], floor,
          judged ? kResidualDraw : kTargetDraw, judged ? drafts.ids + row * drafts.width : nullptr,
          judged ? drafts.width : 0};
}

// Exact score of one token.
DFLASH_FN void consider(const RowDraw& draw, float scaled, uint32_t word, int64_t token, Best& best) {
  if (scaled < draw.floor || scaled == kMinusInf || draw.leaves_out(token)) return;
  best.take(static_cast<double>(scaled) + gumbel_of(word), token);
}

struct PartialsView {
  const double* values;  // [N, R, width]
  int64_t num_shards, num_rows, width;

  DFLASH_FN const double* at(int64_t shard, int64_t row) const { return values + (shard * num_rows + row) * width; }
};

DFLASH_FN bool row_is_bad(const PartialsView& partials, int64_t row) {
  double maximum = kMinusInf;
  for (int64_t n = 0; n < partials.num_shards; ++n) {
    const double* partial = partials.at(n, row);
    if (partial[kIsBad] != 0) return true;
    maximum = partial[kMaximum] > maximum ? partial[kMaximum] : maximum;
  }
  return !(maximum > kMinusInf && maximum < INFINITY);
}

DFLASH_FN Best best_of_shards(const PartialsView& partials, int64_t row) {
  Best best;
  for (int64_t n = 0; n < partials.num_shards; ++n) {
    const double* partial = partials.at(n, row);
    best.take(partial[kBestScore], static_cast<int64_t>(partial[kBestToken]));
  }
  return best;
}

// Rejection sampling at one row (Leviathan et al. 2023): accepts `child` with probability target / draft, else draws
// from what the target has beyond the draft. Best of the tokens that the draft cannot propose comes from the shards.
DFLASH_FN int64_t judge(const PlanView& plan, const DraftView& drafts, const PartialsView& partials, int64_t row,
                        int64_t child, bool& accepts) {
  const int64_t seed = plan.sequence(plan.row(row)[kRowSequence])[kSeed], position = plan.row(row)[kRowPosition];
  double total = 0;
  for (int64_t n = 0; n < partials.num_shards; ++n) total += partials.at(n, row)[kMass];
  Best residual = best_of_shards(partials, row);
  double maximum = kMinusInf;
  for (int64_t n = 0; n < partials.num_shards; ++n) {
    maximum = partials.at(n, row)[kMaximum] > maximum ? partials.at(n, row)[kMaximum] : maximum;
  }
  accepts = false;
  for (int64_t i = 0; i < drafts.width; ++i) {
    const int64_t token = drafts.ids[row * drafts.width + i];
    if (token < 0) continue;
    double mass = 0;
    for (int64_t n = 0; n < partials.num_shards; ++n) mass += partials.at(n, row)[kDraftMass + i];
    // Not a plain product, which a compiler might join with the subtraction below.
    const double drafted = fma(static_cast<double>(drafts.probs[row * drafts.width + i]), total, 0.0);
    if (token == child) {
      const uint32_t word = noise_words(seed, position, 0, kAcceptDraw).at[0];
      accepts = uniform_of(word) * drafted < mass;
    }
    if (mass > drafted) {
      const float share = log_of(static_cast<float>((mass - drafted) / kMassUnit));
      residual.take(share + maximum + gumbel(seed, position, token, kResidualDraw), token);
    }
  }
  if (accepts || residual.token < 0) {
    accepts = true;  // nothing is left beyond the draft: it is the target's own law
    return child;
  }
  return residual.token;
}

// Columns of an outcome: accepted drafts, flag, then the tokens and the accepted rows, each padded to `depth`.
enum OutcomeColumn { kNumAccepted, kIsFlagged, kOutcomeHead };

// Walks from the root to the child that is accepted, until none is. `depth` is the longest path in rows.
DFLASH_FN void walk(const PlanView& plan, const DraftView& drafts, const PartialsView& partials, int64_t s,
                    int64_t depth, int64_t* outcome) {
  const int64_t* sequence = plan.sequence(s);
  int64_t* tokens = outcome + kOutcomeHead;
  int64_t* accepted = tokens + depth;
  for (int64_t i = 0; i < depth; ++i) tokens[i] = accepted[i] = -1;
  outcome[kNumAccepted] = outcome[kIsFlagged] = 0;
  const int64_t first = sequence[kFirstRow], stop = first + sequence[kNumRows];
  for (int64_t row = first; row < stop; ++row) outcome[kIsFlagged] |= row_is_bad(partials, row);
  if (outcome[kIsFlagged]) return;
  int64_t row = first;
  for (int64_t count = 0; count < depth; ++count) {
    int64_t token;
    bool goes_on = true;
    if (is_judged(plan, drafts, row)) {
      int64_t child = row + 1;
      while (plan.row(child)[kRowParent] != row) ++child;
      token = judge(plan, drafts, partials, row, plan.row(child)[kRowToken], goes_on);
    } else {
      token = best_of_shards(partials, row).token;
    }
    tokens[count] = token;
    int64_t child = goes_on ? row + 1 : stop;
    while (child < stop && !(plan.row(child)[kRowParent] == row && plan.row(child)[kRowToken] == token)) ++child;
    if (child == stop) return;
    accepted[outcome[kNumAccepted]++] = child - first;
    row = child;
  }
}

// Columns of a commit.
enum CommitColumn { kNumTokens, kFinish, kCommitRows, kNewKvLen, kCommitColumns };

// Cuts the outcome's tokens after a stop token or at the length limit; all visited rows stay in the cache.
DFLASH_FN void commit_sequence(const PlanView& plan, int64_t s, const int64_t* outcome, int64_t* commit) {
  const int64_t* sequence = plan.sequence(s);
  commit[kNumTokens] = commit[kFinish] = commit[kCommitRows] = 0;
  commit[kNewKvLen] = sequence[kRootPosition];
  if (outcome[kIsFlagged]) return;
  commit[kCommitRows] = 1 + outcome[kNumAccepted];
  commit[kNewKvLen] += commit[kCommitRows];
  const int64_t* stops = plan.ids + sequence[kStopAt];
  while (commit[kNumTokens] <= outcome[kNumAccepted] && commit[kFinish] == kGoesOn) {
    const int64_t token = outcome[kOutcomeHead + commit[kNumTokens]++];
    const int64_t length = sequence[kRootPosition] + 1 + commit[kNumTokens];
    bool stops_here = false;
    for (int64_t i = 0; i < sequence[kStopLen]; ++i) stops_here |= stops[i] == token;
    if (stops_here && length > sequence[kMinLen]) {
      commit[kFinish] = kStopped;
    } else if (length >= sequence[kMaxLen]) {
      commit[kFinish] = kFull;
    }
  }
}

}  // namespace dflash_ray
