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

  // Calls use(i, left, right) for inputs begin + i, i < count, of a panel with the halves of its kPanel weights. `begin` is
  // a multiple of kBlockDepth, and so is `count` but at the weight's end.
  template <Form kForm, class Use>
  [[gnu::always_inline]] void each(int64_t panel, int64_t begin, int64_t count, const Use& use) const {
    const std::byte* from = bytes_ + panel * panel_bytes_;
    if constexpr (kForm == Form::kFloat32) {
      each_of_float32(from + begin * kPanel * 4, count, use);
    } else if constexpr (kForm == Form::kBfloat16) {
      each_of_bfloat16(from + begin / 2 * kPanel * 4, count, use);
    } else {
      constexpr int64_t kBytes = (kForm == Form::kInt8 ? kBlockDepth + 4 : kBlockDepth / 2 + 8) * kPanel;
      for (int64_t k = 0; k < count; k += kBlockDepth) {
        const std::byte* block = from + (begin + k) / kBlockDepth * kBytes;
        fetch_ahead<kBytes>(block);
        const auto put = [&use, k](int64_t i, const Lanes& left, const Lanes& right) { use(k + i, left, right); };
        if constexpr (kForm == Form::kInt8) each_of_int8(block, put);
        else each_of_int4(block, put);
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
      each<form.value>(panel, begin, count, [buffer](int64_t i, const Lanes& left, const Lanes& right) {
        store(buffer + i * kPanel, left);
        store(buffer + i * kPanel + kLanes, right);
      });
    });
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

  template <class Use>
  [[gnu::always_inline]] static void each_of_float32(const std::byte* from, int64_t count, const Use& use) {
    for (int64_t k = 0; k < count; ++k) {
      const std::byte* line = from + k * kPanel * 4;
      fetch_ahead<kPanel * 4>(line);
      use(k, load_lanes(line), load_lanes(line + sizeof(Lanes)));
    }
  }

  template <class Use>
  [[gnu::always_inline]] static void each_of_bfloat16(const std::byte* from, int64_t count, const Use& use) {
    constexpr int32_t kUpper = static_cast<int32_t>(0xffff0000u);
    for (int64_t k = 0; k < count; k += 2) {
      const std::byte* pair = from + k / 2 * kPanel * 4;
      fetch_ahead<kPanel * 4>(pair);
      const LaneBits left = load_bits(pair), right = load_bits(pair + sizeof(Lanes));
      use(k, as_floats(left << 16), as_floats(right << 16));
      if (k + 1 < count) use(k + 1, as_floats(left & kUpper), as_floats(right & kUpper));
    }
  }

  // Small integers times their scale: exact, and so is whatever `fits` (packing.cpp) has found to be.
  static Lanes times(const LaneBits& bits, const Lanes& scale, const Lanes& offset) {
    return __builtin_convertvector(bits, Lanes) * scale + offset;
  }

  template <class Use>
  [[gnu::always_inline]] static void each_of_int8(const std::byte* block, const Use& use) {
    const Lanes scale[2] = {load_lanes(block), load_lanes(block + sizeof(Lanes))};
    const Lanes offset[2] = {scale[0] * -128.0f, scale[1] * -128.0f};  // all but a word's last are stored from 0 on
    const Lanes none{};
#pragma GCC unroll 1
    for (int64_t word = 0; word < kBlockDepth / 4; ++word) {
      const std::byte* at = block + (word + 1) * kPanel * 4;
      const LaneBits left = load_bits(at), right = load_bits(at + sizeof(Lanes));
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        use(4 * word + i, times(left >> 8 * i & 0xff, scale[0], offset[0]),
            times(right >> 8 * i & 0xff, scale[1], offset[1]));
      }
      use(4 * word + 3, times(left >> 24, scale[0], none), times(right >> 24, scale[1], none));
    }
  }

  template <class Use>
  [[gnu::always_inline]] static void each_of_int4(const std::byte* block, const Use& use) {
    const Lanes scale[2] = {load_lanes(block), load_lanes(block + sizeof(Lanes))};
    const Lanes offset[2] = {load_lanes(block + kPanel * 4), load_lanes(block + kPanel * 4 + sizeof(Lanes))};
#pragma GCC unroll 1
    for (int64_t word = 0; word < kBlockDepth / 8; ++word) {
      const std::byte* at = block + (word + 2) * kPanel * 4;
      const LaneBits left = load_bits(at), right = load_bits(at + sizeof(Lanes));
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        use(8 * word + i, times(left >> 4 * i & 15, scale[0], offset[0]),
            times(right >> 4 * i & 15, scale[1], offset[1]));
      }
    }
  }

  const std::byte* bytes_ = nullptr;
  Form form_ = Form::kFloat32;
  int64_t out_ = 0, in_ = 0, panel_bytes_ = 0;
};

}  // namespace dflash_ray
