// Sixteen floats at a time, in GCC's vector extensions: one source for AVX-512 (one register), AVX2 (two), NEON (four).
//
// What it does not do: choose instructions at run time. The library is built for the machine it runs on, and the
// cache key holds that machine's flags. Sums never depend on anything but the length of what is summed.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__)
#define LIGHTVLLM_DPBF16 1
#endif

namespace lightvllm {

constexpr int LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
#if !defined(__AVX512F__)
typedef _Float16 f16x16 __attribute__((vector_size(32)));
#endif

template <typename V, typename T>
inline V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

template <typename V, typename T>
inline void store_as(T* p, V v) {
    std::memcpy(p, &v, sizeof(V));
}

inline f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// A bfloat16 number as the float of the same value, and back: to nearest, ties to even, NaN stays NaN.
inline f32x16 widen(u16x16 v) {
#if defined(__AVX512F__)
    return (f32x16)((u32x16)_mm512_cvtepu16_epi32((__m256i)v) << 16);  // GCC 12 makes four instructions of the other
#else
    return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
#endif
}

inline u32x16 round_bits(f32x16 v) {
    u32x16 bits = (u32x16)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return v == v ? bits : (u32x16{} + 0x7fc0);
}

// An element type: how it is loaded (all sixteen, or the first n with zeros behind), stored, and rounded to.
struct F32 {
    using type = float;
    static f32x16 load(const float* p) { return load_as<f32x16>(p); }
    static void store(float* p, f32x16 v) { store_as(p, v); }
    static f32x16 rounded(f32x16 v) { return v; }
};

struct BF16 {
    using type = uint16_t;
    static f32x16 load(const uint16_t* p) { return widen(load_as<u16x16>(p)); }
    static void store(uint16_t* p, f32x16 v) { store_as(p, __builtin_convertvector(round_bits(v), u16x16)); }
    static f32x16 rounded(f32x16 v) { return (f32x16)(round_bits(v) << 16); }
};

struct F16 {
    using type = uint16_t;
#if defined(__AVX512F__)
    static f32x16 load(const uint16_t* p) { return (f32x16)_mm512_cvtph_ps((__m256i)load_as<u16x16>(p)); }
    static void store(uint16_t* p, f32x16 v) {
        store_as(p, (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#else
    static f32x16 load(const uint16_t* p) { return __builtin_convertvector(load_as<f16x16>(p), f32x16); }
    static void store(uint16_t* p, f32x16 v) { store_as(p, __builtin_convertvector(v, f16x16)); }
#endif
    static f32x16 rounded(f32x16 v) {
        uint16_t narrow[LANES];
        store(narrow, v);
        return load(narrow);
    }
};

template <typename E>
inline f32x16 load_first(const typename E::type* p, int n) {
    typename E::type padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(padded[0]));
    return E::load(padded);
}

template <typename E>
inline void store_first(typename E::type* p, f32x16 v, int n) {
    typename E::type padded[LANES];
    E::store(padded, v);
    std::memcpy(p, padded, n * sizeof(padded[0]));
}

// A group of `count` elements, LANES for all but a row's last: the full groups stay free of copies.
template <typename E>
inline f32x16 load_group(const typename E::type* p, int count) {
    return count == LANES ? E::load(p) : load_first<E>(p, count);
}

template <typename E>
inline void store_group(typename E::type* p, f32x16 v, int count) {
    if (count == LANES)
        E::store(p, v);
    else
        store_first<E>(p, v, count);
}

// The sums of many vectors, in two stages, each by the same tree. `fold` leaves four quads, whose sum holds the four
// vectors' sums; `fold_quads` gives the sums of the quads of four such results, in order.
inline f32x16 fold(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
    f32x16 ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    f32x16 cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    return __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

inline f32x16 fold_quads(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
    f32x16 ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    f32x16 cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    return __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

inline float sum(f32x16 v) {
    f32x16 quads = fold(v, v, v, v);
    return fold_quads(quads, quads, quads, quads)[0];
}

inline float maximum(f32x16 v) {
    f32x16 w = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v = v > w ? v : w;
    w = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v = v > w ? v : w;
    float m = v[0];
    for (int i = 1; i < 4; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// e^x to about 1e-7 relative; exactly 1 at 0, exactly 0 below the range (so for -inf), infinite above it.
inline f32x16 exp(f32x16 x) {
    const f32x16 low = splat(-87.33654f), high = splat(88.72283f);
    f32x16 y = x < low ? low : x;
    y = y > high ? high : y;
    const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    f32x16 n = (y * 1.44269504f + magic) - magic;
    f32x16 r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    // n reaches 128 at the top: two factors keep each exponent in range.
    i32x16 whole = __builtin_convertvector(n, i32x16), half = whole >> 1;
    p = p * (f32x16)((half + 127) << 23) * (f32x16)((whole - half + 127) << 23);
    p = x < low ? splat(0.0f) : p;
    return x > high ? splat(__builtin_inff()) : (x == x ? p : x);
}

}  // namespace lightvllm
