// Numbers and vectors that kernels.cpp and decode.cpp share: bfloat16, exponentials, and products of units.
//
// A unit is 32 bits: a float, or 2 bfloat16 or 4 int8 that one instruction multiplies and adds. Matrices are read in units
// along the summed dimension, so that all types share the code around `multiply_add`.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using std::int32_t;
using std::int64_t;

// ── numbers ──

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float& to, float x) { to = x; }

// To nearest, ties to even. NaN as processors make it stays NaN.
inline void store(bfloat16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// 2^x with a relative error under 3e-7, in a form that vectorizes; exactly 0 below -126.5; infinity is 2^127.
inline float power_of_two(float x) {
    float in_range = std::min(std::max(x, -127.0f), 127.0f);
    float whole = __builtin_rintf(in_range), rest = in_range - whole;
    float sum = 1.535336188e-4f;
    sum = sum * rest + 1.339887440e-3f;
    sum = sum * rest + 9.618437357e-3f;
    sum = sum * rest + 5.550332548e-2f;
    sum = sum * rest + 2.402264791e-1f;
    sum = sum * rest + 6.931472028e-1f;
    sum = sum * rest + 1.0f;
    int32_t power = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return sum * scale;
}

constexpr float LOG2_E = 1.442695041f;

inline float exponential(float x) { return power_of_two(x * LOG2_E); }

inline void convert(const float* in, float* out, int64_t count) { std::memcpy(out, in, count * sizeof(float)); }

inline void convert(const float* in, bfloat16* out, int64_t count) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in + i)));
#endif
    for (; i < count; i++) store(out[i], in[i]);
}

// ── activations ──

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// The tanh form: 0.5 x (1 + tanh(z)) = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float GELU_A = 0.7978845608f, GELU_B = 0.044715f;

inline float gelu(float x) { return x / (1.0f + exponential(-2.0f * GELU_A * (x + GELU_B * x * x * x))); }

// ── units ──

using unit = int32_t;

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t units __attribute__((vector_size(4 * LANES), aligned(4)));

template <class T>
inline vector multiply_add(vector sum, unit a, units b);

template <>
inline vector multiply_add<float>(vector sum, unit a, units b) {
    float value;
    std::memcpy(&value, &a, 4);
    return sum + value * (vector)b;
}

template <>
inline vector multiply_add<bfloat16>(vector sum, unit a, units b) {
#ifdef __AVX512BF16__
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
    float low, high;
    unit low_bits = unit(uint32_t(a) << 16), high_bits = a & unit(0xFFFF0000);
    std::memcpy(&low, &low_bits, 4);
    std::memcpy(&high, &high_bits, 4);
    return sum + low * (vector)(b << 16) + high * (vector)(b & unit(0xFFFF0000));
#endif
}

// sums + the 4 products of bytes without sign (a, LANES units) and with sign (b, one unit).
inline units multiply_add_bytes(units sums, units a, unit b) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (units)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVXVNNI__)
    return (units)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, _mm256_set1_epi32(b));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    unit first = (b << 24 >> 24 & 0xFFFF) | (b << 8 >> 24) << 16, second = (b << 16 >> 24 & 0xFFFF) | b >> 24 << 16;
    __m256i even = _mm256_and_si256((__m256i)a, _mm256_set1_epi32(0x00FF00FF));
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32((__m256i)a, 8), _mm256_set1_epi32(0x00FF00FF));
    return sums + (units)_mm256_madd_epi16(even, _mm256_set1_epi32(first)) +
           (units)_mm256_madd_epi16(odd, _mm256_set1_epi32(second));
#else
    return sums + (a & 255) * (b << 24 >> 24) + (a >> 8 & 255) * (b << 16 >> 24) + (a >> 16 & 255) * (b << 8 >> 24) +
           (a >> 24 & 255) * (b >> 24);
#endif
}

// ── waiting ──

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

inline void yield() { sched_yield(); }

}  // namespace
