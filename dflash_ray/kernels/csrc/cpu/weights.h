// A weight [out, in] as the products read it: in panels of kPanel outputs, so that a pass over it is one linear stream
// from memory, and in the smallest form that gives back every float to the bit.
//
// Checkpoints hold bfloat16 or blocks of small integers; float32 copies of them carry no more and cost two to six times
// the bytes. The form is found in the floats themselves, so it does not matter where they come from or which rank's part
// of a layer they are.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <type_traits>

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

  // Calls use(i, halves) for inputs begin + i, i < count, with the halves of kPanel weights for each of kPanels panels that
  // follow each other. `begin` is a multiple of kBlockDepth, and so is `count` but at the weight's end. kHasRegisters:
  // `use` leaves some, to hold more than one scale of a block.
  template <Form kForm, int kPanels, bool kHasRegisters, class Use>
  [[gnu::always_inline]] void each(int64_t panel, int64_t begin, int64_t count, const Use& use) const {
    const std::byte* from = bytes_ + panel * panel_bytes_;
    if constexpr (kForm == Form::kFloat32) {
      each_of_float32<kPanels>(from, begin * kPanel * 4, count, use);
    } else if constexpr (kForm == Form::kBfloat16) {
      each_of_bfloat16<kPanels>(from, begin / 2 * kPanel * 4, count, use);
    } else {
      constexpr int64_t kBytes = (kForm == Form::kInt8 ? kBlockDepth + 4 : kBlockDepth / 2 + 8) * kPanel;
      for (int64_t k = 0; k < count; k += kBlockDepth) {
        const int64_t at = (begin + k) / kBlockDepth * kBytes;
        fetch_ahead<kPanels, kBytes>(from, at);
        const auto put = [&use, k](int64_t i, const auto& halves) { use(k + i, halves); };
        if constexpr (kForm == Form::kInt8) each_of_int8<kPanels>(from + at, put);
        else each_of_int4<kPanels, kHasRegisters>(from + at, put);
      }
    }
  }

  // Calls work(form) with the weight's form as a constant.
  template <class Work>
  void with_form(const Work& work) const {
    switch (form_) {
      case Form::kFloat32: return work(std::integral_constant<Form, Form::kFloat32>());
      case Form::kBfloat16: return work(std::integral_constant<Form, Form::kBfloat16>());
      case Form::kInt8: return work(std::integral_constant<Form, Form::kInt8>());
      case Form::kInt4: return work(std::integral_constant<Form, Form::kInt4>());
    }
  }

  // Inputs begin, ..., begin + count - 1 of a panel, [count, kPanel]: where they lie, or in `buffer`.
  const float* slice(int64_t panel, int64_t begin, int64_t count, float* buffer) const {
    if (form_ == Form::kFloat32) {
      return reinterpret_cast<const float*>(bytes_ + panel * panel_bytes_) + begin * kPanel;
    }
    with_form([&](auto form) {
      each<form.value, 1, true>(panel, begin, count, [buffer](int64_t i, const Lanes (&halves)[2]) {
        store(buffer + i * kPanel, halves[0]);
        store(buffer + i * kPanel + kLanes, halves[1]);
      });
    });
    return buffer;
  }

 private:
  // A value for each half of kPanels panels.
  template <int kPanels, class Make>
  [[gnu::always_inline]] static void make_halves(Lanes (&halves)[2 * kPanels], const Make& make) {
#pragma GCC unroll 4
    for (int half = 0; half < 2 * kPanels; ++half) halves[half] = make(half);
  }

  // Where a half's part of what begins at `at` in the first panel lies.
  [[gnu::always_inline]] const std::byte* of_half(const std::byte* at, int half) const {
    return at + half / 2 * panel_bytes_ + half % 2 * sizeof(Lanes);
  }

  [[gnu::always_inline]] LaneBits load_bits(const std::byte* at, int half) const {
    LaneBits bits;
    __builtin_memcpy(&bits, of_half(at, half), sizeof bits);
    return bits;
  }

  [[gnu::always_inline]] Lanes load_lanes(const std::byte* at, int half) const {
    return load(reinterpret_cast<const float*>(of_half(at, half)));
  }

  static Lanes as_floats(const LaneBits& bits) { return (Lanes)bits; }

  // Asks for what lies some blocks ahead: a panel is too short for the processor to foresee its stream. Behind the ends of
  // kPanels panels the next ones begin.
  template <int kPanels, int64_t kBytes>
  [[gnu::always_inline]] void fetch_ahead(const std::byte* from, int64_t at) const {
    int64_t ahead = at + kBytesAhead / kPanels;
    if (kPanels > 1 && ahead >= panel_bytes_) ahead += (kPanels - 1) * panel_bytes_;
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
      for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(from + panel * panel_bytes_ + ahead + line);
    }
  }

  template <int kPanels, class Use>
  [[gnu::always_inline]] void each_of_float32(const std::byte* from, int64_t at, int64_t count, const Use& use) const {
    Lanes halves[2 * kPanels];
    for (int64_t k = 0; k < count; ++k, at += kPanel * 4) {
      fetch_ahead<kPanels, kPanel * 4>(from, at);
      make_halves<kPanels>(halves, [&](int half) { return load_lanes(from + at, half); });
      use(k, halves);
    }
  }

  template <int kPanels, class Use>
  [[gnu::always_inline]] void each_of_bfloat16(const std::byte* from, int64_t at, int64_t count, const Use& use) const {
    constexpr int32_t kUpper = static_cast<int32_t>(0xffff0000u);
    Lanes halves[2 * kPanels];
    for (int64_t k = 0; k < count; k += 2, at += kPanel * 4) {
      fetch_ahead<kPanels, kPanel * 4>(from, at);
      make_halves<kPanels>(halves, [&](int half) { return as_floats(load_bits(from + at, half) << 16); });
      use(k, halves);
      if (k + 1 == count) break;
      make_halves<kPanels>(halves, [&](int half) { return as_floats(load_bits(from + at, half) & kUpper); });
      use(k + 1, halves);
    }
  }

  // Small integers times their scale: exact, and so is whatever `fits` (packing.cpp) has found to be. An integer that lies
  // higher in its word is taken where it is, with a power of two in its scale.
  static Lanes times(const LaneBits& bits, const Lanes& scale, const Lanes& offset) {
    return __builtin_convertvector(bits, Lanes) * scale + offset;
  }

  template <int kPanels, class Use>
  [[gnu::always_inline]] void each_of_int8(const std::byte* block, const Use& use) const {
    constexpr int kHalves = 2 * kPanels;
    Lanes scale[kHalves], offset[kHalves], halves[kHalves];
    make_halves<kPanels>(scale, [&](int half) { return load_lanes(block, half); });
    // All but a word's last are stored from 0 on.
    make_halves<kPanels>(offset, [&](int half) { return scale[half] * -128.0f; });
    const Lanes none{};
#pragma GCC unroll 1
    for (int64_t word = 0; word < kBlockDepth / 4; ++word) {
      const std::byte* at = block + (word + 1) * kPanel * 4;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        make_halves<kPanels>(halves, [&](int half) {
          return times(load_bits(at, half) >> 8 * i & 0xff, scale[half], offset[half]);
        });
        use(4 * word + i, halves);
      }
      make_halves<kPanels>(halves, [&](int half) { return times(load_bits(at, half) >> 24, scale[half], none); });
      use(4 * word + 3, halves);
    }
  }

  template <int kPanels, bool kHasRegisters, class Use>
  [[gnu::always_inline]] void each_of_int4(const std::byte* block, const Use& use) const {
    constexpr int kHalves = 2 * kPanels;
    Lanes scale[kHalves], high_scale[kHalves], offset[kHalves], halves[kHalves];
    make_halves<kPanels>(scale, [&](int half) { return load_lanes(block, half); });
    make_halves<kPanels>(high_scale, [&](int half) { return scale[half] * 0.0625f; });
    make_halves<kPanels>(offset, [&](int half) { return load_lanes(block + kPanel * 4, half); });
#pragma GCC unroll 1
    for (int64_t word = 0; word < kBlockDepth / 8; ++word) {
      const std::byte* at = block + (word + 2) * kPanel * 4;
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        make_halves<kPanels>(halves, [&](int half) {
          const LaneBits bits = load_bits(at, half);
          // Every other integer needs no shift of its own.
          if (kHasRegisters && i % 2) return times(bits >> 4 * (i - 1) & 0xf0, high_scale[half], offset[half]);
          return times(bits >> 4 * i & 0x0f, scale[half], offset[half]);
        });
        use(8 * word + i, halves);
      }
    }
  }

  const std::byte* bytes_ = nullptr;
  Form form_ = Form::kFloat32;
  int64_t out_ = 0, in_ = 0, panel_bytes_ = 0;
};

}  // namespace dflash_ray
