/*
 * Vectors of the widest kind that the instruction set of this object has, and numbers of 16 bits: shared by the CPU
 * kernels.
 *
 * Everything is in an anonymous namespace: each instruction set gets code of its own.
 */
#ifndef CPU_VECTORS_H
#define CPU_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

constexpr double LOG2_E = 1.4426950408889634074;

// ------------------------------------------------------------------------------------------------ vectors and numbers

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef int32_t Int;
    static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    static constexpr int mantissa = 23, bias = 127;
};

template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef uint64_t Bits __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef int64_t Int;
    static constexpr double magic = 6755399441055744.0;
    static constexpr int mantissa = 52, bias = 1023;
};

template <class T>
using Vec = typename Simd<T>::V;

template <class T>
constexpr int width() {
    return VECTOR_BYTES / (int)sizeof(T);
}

template <class T>
inline Vec<T> load(const T* p) {
    return *(const Vec<T>*)p;
}
template <class T>
inline void store(T* p, Vec<T> v) {
    *(Vec<T>*)p = v;
}
template <class T>
inline Vec<T> splat(T x) {
    return x - Vec<T>{};
}

// 2^x for x <= 0 (slightly above is fine); 0 where x underflows, NaN for NaN.
template <class T>
inline Vec<T> exp2(Vec<T> x) {
    typedef Simd<T> S;
    const Vec<T> lowest = splat<T>(-(T)S::bias), magic = splat<T>(S::magic);
    x = x < lowest ? lowest : x;
    const Vec<T> shifted = x + magic;
    const Vec<T> f = x - (shifted - magic);
    Vec<T> p;
    if (sizeof(T) == 4) {
        p = splat<T>((T)1.5252733804059841e-5);
    } else {
        p = splat<T>((T)1.3691488853904128e-12);
        p = p * f + splat<T>((T)2.5678435993488206e-11);
        p = p * f + splat<T>((T)4.4455382718708116e-10);
        p = p * f + splat<T>((T)7.0549116208011233e-9);
        p = p * f + splat<T>((T)1.0178086009239699e-7);
        p = p * f + splat<T>((T)1.3215486790144309e-6);
        p = p * f + splat<T>((T)1.5252733804059841e-5);
    }
    p = p * f + splat<T>((T)1.5403530393381609e-4);
    p = p * f + splat<T>((T)1.3333558146428443e-3);
    p = p * f + splat<T>((T)9.6181291076284772e-3);
    p = p * f + splat<T>((T)5.5504108664821580e-2);
    p = p * f + splat<T>((T)2.4022650695910071e-1);
    p = p * f + splat<T>((T)6.9314718055994531e-1);
    p = p * f + splat<T>((T)1);
    // Unsigned: lanes that hold no number that counts may wrap around.
    typedef typename S::Bits Bits;
    const Bits bits = ((Bits)shifted << S::mantissa) + ((Bits{} + S::bias) << S::mantissa);
    return p * (Vec<T>)bits;
}

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return bits_to_float((uint32_t)x.bits << 16); }
inline float widen(float16 x) {
    const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    const float small = (float)(int)rest * 5.9604644775390625e-8f;  // 2^-24, for exponent zero
    const uint32_t normal = rest >= 0x7c00 ? (rest << 13) | 0x7f800000u : (rest << 13) + (112u << 23);
    return bits_to_float((rest < 0x400 ? float_to_bits(small) : normal) | sign);
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, bfloat16* to) {  // to the nearest, ties to even
    const uint32_t bits = float_to_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = (uint16_t)((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0 : rounded);
}
inline void narrow(float x, float16* to) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    // Below the smallest normal number, adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    const uint32_t small = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    const uint32_t large = rest > 0x7f800000u ? 0x7e00 : 0x7c00;
    to->bits = (uint16_t)(sign | (rest >= 0x477ff000u ? large : rest < 0x38800000u ? small : normal));
}

// -------------------------------------------------------------------------- floats from and to numbers at any address

typedef Vec<float> V;
constexpr int W = width<float>();

typedef float UnalignedFloats __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES), may_alias));

inline V read(const float* p) { return *(const UnalignedFloats*)p; }
inline V read(const bfloat16* p) { return (V)(__builtin_convertvector(*(const Halves*)p, Words) << 16); }
inline V read(const float16* p) {
#if defined(__F16C__) && VECTOR_BYTES == 64
    return (V)_mm512_maskz_cvtph_ps(
        (__mmask16)-1, _mm256_loadu_si256((const __m256i*)p));  // GCC warns of the plain one
#elif defined(__F16C__) && VECTOR_BYTES == 32
    return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    V v;
    for (int i = 0; i < W; i++) v[i] = widen(p[i]);
    return v;
#endif
}

inline void write(float* p, V v) { *(UnalignedFloats*)p = v; }
inline void write(bfloat16* p, V v) {  // to the nearest, ties to even
    const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words quiet = Words{} + 0x7fc0;
    *(Halves*)p = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000u ? quiet : rounded, Halves);
}
inline void write(float16* p, V v) {
#if defined(__F16C__) && VECTOR_BYTES == 64
    _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && VECTOR_BYTES == 32
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; i++) narrow(v[i], p + i);
#endif
}

// The first numbers of a vector, and zeros.
template <class S>
inline V read_some(const S* p, int number) {
    S some[W] = {};
    memcpy(some, p, number * sizeof(S));
    return read(some);
}

inline float sum(V v) {
    typedef float Four __attribute__((vector_size(16)));
    Four part[VECTOR_BYTES / 16];
    memcpy(part, &v, sizeof v);
    Four s = part[0];
    for (int i = 1; i < VECTOR_BYTES / 16; i++) s += part[i];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

// x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3): the tanh approximation of GELU.
inline V gelu(V x) {
    const V t =
        x * ((float)(-2 * 0.7978845608028654 * LOG2_E) + (float)(-2 * 0.7978845608028654 * 0.044715 * LOG2_E) * x * x);
    const V e = exp2<float>(t > 0 ? -t : t);  // of a number that is not positive, so that nothing overflows
    return x * (t > 0 ? e : splat(1.0f)) / (1 + e);
}

// The derivative of it: with s the sigmoid, s + x * s * (1 - s) * 2 u'.
inline V gelu_slope(V x) {
    const float first = (float)(2 * 0.7978845608028654), third = (float)(2 * 0.7978845608028654 * 0.044715);
    const V square = x * x, t = x * (-(float)LOG2_E * first + -(float)LOG2_E * third * square);
    const V e = exp2<float>(t > 0 ? -t : t), inverse = 1 / (1 + e);
    return ((t > 0 ? e : splat(1.0f)) + x * (first + 3 * third * square) * (e * inverse)) * inverse;
}

}  // namespace
#endif
