// A weight [out, in] as the products read it: in panels of kPanel outputs, so that a pass over it is one linear stream
// from memory, and in the smallest form that gives back every float to the bit.
//
// Checkpoints hold bfloat16 or blocks of small integers; float32 copies of them carry no more and cost two to six times
// the bytes. The form is found in the floats themselves, so it does not matter where they come from or which rank's part
// of a layer they are.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

#include "vectors.h"

namespace dflash_ray {

constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kBlockDepth = 32;  // inputs that share scales
constexpr int64_t kBytesAhead = 6144;

// kInt4: offset + scale * q with q in 0 .. 15; kInt8: scale * q with q in -127 .. 127; scales by output and block.
enum class Form : int64_t { kFloat32, kBfloat16, kInt8, kInt4 };

// The first bytes of a packed weight; its panels follow.
struct WeightHeader {
  Form form;
  int64_t out, in;
  int64_t unused[5];
};
static_assert(sizeof(WeightHeader) == 64);

class Weight {
 public:
  Weight() = default;

  explicit Weight(const at::Tensor& packed)
      : bytes_(static_cast<const std::byte*>(packed.const_data_ptr()) + sizeof(WeightHeader)) {
    const auto& header = *reinterpret_cast<const WeightHeader*>(bytes_ - sizeof(WeightHeader));
    form_ = header.form, out_ = header.out, in_ = header.in, panel_bytes_ = panel_bytes(form_, in_);
  }

  static int64_t panel_bytes(Form form, int64_t in) {
    const int64_t blocks = in / kBlockDepth;
    switch (form) {
      case Form::kFloat32: return in * kPanel * 4;
      case Form::kBfloat16: return (in + 1) / 2 * kPanel * 4;
      case Form::kInt8: return blocks * (kBlockDepth + 4) * kPanel;
      case Form::kInt4: return blocks * (kBlockDepth / 2 + 8) * kPanel;
    }
    return 0;
  }

  int64_t out() const { return out_; }
  int64_t in() const { return in_; }
  int64_t num_panels() const { return (out_ + kPanel - 1) / kPanel; }
  Form form() const { return form_; }
  int64_t panel_bytes() const { return panel_bytes_; }

  // Inputs begin, ..., begin + count - 1 of a panel, [count, kPanel]: where they lie, or in `buffer`. `begin` is a
  // multiple of kBlockDepth.
  const float* slice(int64_t panel, int64_t begin, int64_t count, float* buffer) const {
    const std::byte* from = bytes_ + panel * panel_bytes_;
    switch (form_) {
      case Form::kFloat32: return reinterpret_cast<const float*>(from) + begin * kPanel;
      case Form::kBfloat16: from_bfloat16(from, begin, count, buffer); break;
      case Form::kInt8: from_int8(from, begin, count, buffer); break;
      case Form::kInt4: from_int4(from, begin, count, buffer); break;
    }
    return buffer;
  }

 private:
  static LaneBits load_bits(const std::byte* at) {
    LaneBits bits;
    __builtin_memcpy(&bits, at, sizeof bits);
    return bits;
  }

  static Lanes load_lanes(const std::byte* at) { return load(reinterpret_cast<const float*>(at)); }

  static Lanes as_floats(const LaneBits& bits) { return (Lanes)bits; }

  // Asks for what lies some blocks ahead: a panel is too short for the processor to foresee its stream.
  template <int64_t kBytes>
  static void fetch_ahead(const std::byte* block) {
    for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(block + kBytesAhead + at);
  }

  static void from_bfloat16(const std::byte* from, int64_t begin, int64_t count, float* to) {
    for (int64_t k = 0; k < count; k += 2) {
      const std::byte* pair = from + (begin + k) / 2 * kPanel * 4;
      fetch_ahead<kPanel * 4>(pair);
      for (int half = 0; half < 2; ++half) {
        const LaneBits bits = load_bits(pair + half * sizeof(Lanes));
        store(to + k * kPanel + half * kLanes, as_floats(bits << 16));
        store(to + (k + 1) * kPanel + half * kLanes, as_floats(bits & static_cast<int32_t>(0xffff0000u)));
      }
    }
  }

  // Small integers are taken where they lie in their words, as multiples of a power of two by which the scale is divided.
  // Both are exact, and so is whatever `fits` (packing.cpp) has found to be.
  static Lanes times(const LaneBits& bits, const Lanes& scale, const Lanes& offset) {
    return __builtin_convertvector(bits, Lanes) * scale + offset;
  }

  static void from_int8(const std::byte* from, int64_t begin, int64_t count, float* to) {
    constexpr int64_t kBytes = (kBlockDepth + 4) * kPanel;
    for (int64_t k = 0; k < count; k += kBlockDepth) {
      const std::byte* block = from + (begin + k) / kBlockDepth * kBytes;
      fetch_ahead<kBytes>(block);
      for (int half = 0; half < 2; ++half) {
        const std::byte* at = block + half * sizeof(Lanes);
        const Lanes scale = load_lanes(at), offset = scale * -128.0f;  // all but a word's last are stored from 0 on
        const Lanes second = scale * 0x1p-8f, third = scale * 0x1p-16f, last = scale * 0x1p-24f;
        float* line = to + k * kPanel + half * kLanes;
        for (int64_t word = 0; word < kBlockDepth / 4; ++word, line += 4 * kPanel) {
          at += kPanel * 4;
          const LaneBits bits = load_bits(at);
          store(line, times(bits & 0xff, scale, offset));
          store(line + kPanel, times(bits & 0xff00, second, offset));
          store(line + 2 * kPanel, times(bits & 0xff0000, third, offset));
          store(line + 3 * kPanel, __builtin_convertvector(bits & static_cast<int32_t>(0xff000000u), Lanes) * last);
        }
      }
    }
  }

  static void from_int4(const std::byte* from, int64_t begin, int64_t count, float* to) {
    constexpr int64_t kBytes = (kBlockDepth / 2 + 8) * kPanel;
    for (int64_t k = 0; k < count; k += kBlockDepth) {
      const std::byte* block = from + (begin + k) / kBlockDepth * kBytes;
      fetch_ahead<kBytes>(block);
      for (int half = 0; half < 2; ++half) {
        const std::byte* at = block + half * sizeof(Lanes);
        Lanes scale[7] = {load_lanes(at)};
        const Lanes offset = load_lanes(at + kPanel * 4);
#pragma GCC unroll 6
        for (int i = 1; i < 7; ++i) scale[i] = scale[i - 1] * 0x1p-4f;
        at += kPanel * 8;
        float* line = to + k * kPanel + half * kLanes;
        for (int64_t word = 0; word < kBlockDepth / 8; ++word, at += kPanel * 4, line += 8 * kPanel) {
          const LaneBits bits = load_bits(at);
#pragma GCC unroll 7
          for (int i = 0; i < 7; ++i) store(line + i * kPanel, times(bits & 15 << 4 * i, scale[i], offset));
          store(line + 7 * kPanel, times(bits >> 4 & 15 << 24, scale[6], offset));
        }
      }
    }
  }

  const std::byte* bytes_ = nullptr;
  Form form_ = Form::kFloat32;
  int64_t out_ = 0, in_ = 0, panel_bytes_ = 0;
};

}  // namespace dflash_ray
