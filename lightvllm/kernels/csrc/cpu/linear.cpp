// Linear layers over row-major weights: dot products of rows, so that neither side needs a packed copy.
//
// A tile is 4 rows of weights by up to 6 rows of x, one vector accumulator for each of its outputs: 24 accumulators,
// 4 + 1 operands, 29 of 32 registers. Every output is summed in the same order whatever the tile's shape.
#include <algorithm>

#include "kernels.h"
#include "team.h"
#include "vec.h"

namespace lightvllm {
namespace {

constexpr int TILE_N = 4;
#if defined(__AVX512F__)
constexpr int TILE_T = 6;
#else
constexpr int TILE_T = 2;  // sixteen registers of eight floats: 4 x 1 accumulators are pairs already
#endif
constexpr int64_t LEAST_PIECE = 32 * 1024;  // bytes of weights
constexpr int64_t L2_SHARE = 512 * 1024;  // bytes of weights that are kept near while the rows of x pass by

// One step along K: `width` elements of both operands into sixteen partial sums.
template <typename E>
struct Step : E {
    using operand = f32x16;
    static constexpr int width = LANES;
    static operand get(const typename E::type* p) { return E::load(p); }
    static f32x16 add(f32x16 acc, operand a, operand b) { return a * b + acc; }
};

using StepF32 = Step<F32>;
using StepF16 = Step<F16>;
#if LIGHTVLLM_DPBF16
struct StepBF16 : BF16 {
    using operand = __m512bh;
    static constexpr int width = 2 * LANES;
    static operand get(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static f32x16 add(f32x16 acc, operand a, operand b) { return (f32x16)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
#else
using StepBF16 = Step<BF16>;
#endif

// Without this the compiler folds the load of x into each of the four products, and loads become the limit.
template <typename V>
inline void keep_in_register(V& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

template <typename S>
[[gnu::noinline]] typename S::operand get_tail(const typename S::type* p, int64_t n) {
    typename S::type padded[S::width] = {};
    std::memcpy(padded, p, n * sizeof(padded[0]));
    return S::get(padded);
}

// Four outputs of each of C rows. `rows` (1 to 4) of the four are stored; w[] of the others repeats a valid row.
template <typename S, int C>
void tile(const typename S::type* x, int64_t x_stride, const typename S::type* const* w, f32x16 bias,
          typename S::type* y, int64_t y_stride, int64_t K, int rows, const typename S::type* ahead, int ahead_rows) {
    f32x16 acc[C][TILE_N] = {};
    int64_t k = 0;
    for (; k + S::width <= K; k += S::width) {
        typename S::operand b[TILE_N];
        for (int n = 0; n < TILE_N; n++) b[n] = S::get(w[n] + k);
        for (int n = 0; n < ahead_rows; n++) __builtin_prefetch(ahead + n * K + k);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            typename S::operand a = S::get(x + c * x_stride + k);
            keep_in_register(a);
#pragma GCC unroll 8
            for (int n = 0; n < TILE_N; n++) acc[c][n] = S::add(acc[c][n], a, b[n]);
        }
    }
    if (k < K) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            typename S::operand a = get_tail<S>(x + c * x_stride + k, K - k);
#pragma GCC unroll 8
            for (int n = 0; n < TILE_N; n++) acc[c][n] = S::add(acc[c][n], a, get_tail<S>(w[n] + k, K - k));
        }
    }
    f32x16 quads[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) quads[c] = fold(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
#pragma GCC unroll 8
    for (int c = 0; c < C; c += 4) {
        const int last = C - 1;
        typename S::type out[LANES];
        S::store(out, fold_quads(quads[c], quads[std::min(c + 1, last)], quads[std::min(c + 2, last)],
                                 quads[std::min(c + 3, last)]) + bias);
        for (int i = 0; i < std::min(4, C - c); i++) {
            typename S::type* to = y + (c + i) * y_stride;
            if (rows == TILE_N)
                std::memcpy(to, out + i * TILE_N, TILE_N * sizeof(out[0]));
            else
                std::memcpy(to, out + i * TILE_N, rows * sizeof(out[0]));
        }
    }
}

template <typename S>
using Tile = void (*)(const typename S::type*, int64_t, const typename S::type* const*, f32x16,
                      typename S::type*, int64_t, int64_t, int, const typename S::type*, int);

template <typename S>
struct Problem {
    using type = typename S::type;
    const type *x, *w, *bias;
    type* y;
    int64_t x_stride, T, N, K;

    // Outputs [t, t + c) x [n, n + 4), or as far as n_end; asks for `ahead_rows` rows of weights from `ahead` on.
    void one(int64_t t, int c, int64_t n, int64_t n_end, int64_t ahead, int ahead_rows) const {
        static constexpr Tile<S> tiles[] = {
            nullptr,
            tile<S, 1>,
            tile<S, 2>,
#if defined(__AVX512F__)
            tile<S, 3>,
            tile<S, 4>,
            tile<S, 5>,
            tile<S, 6>,
#endif
        };
        const int rows = static_cast<int>(std::min<int64_t>(TILE_N, n_end - n));
        const type* four[TILE_N];
        for (int j = 0; j < TILE_N; j++) four[j] = w + (n + std::min(j, rows - 1)) * K;
        f32x16 b = {};  // the four biases, once for each of four rows of x
        if (bias) {
            const f32x16 four_biases = load_first<S>(bias + n, rows);
            for (int j = 0; j < LANES; j++) b[j] = four_biases[j % TILE_N];
        }
        tiles[c](x + t * x_stride, x_stride, four, b, y + t * N + n, N, K, rows, w + ahead * K, ahead_rows);
    }

    // The rows of x, from t0 to t1, in tiles of nearly equal height: f(first row, height, number of the tile).
    template <typename F>
    static void for_tiles(int64_t t0, int64_t t1, const F& f) {
        const int64_t count = (t1 - t0 + TILE_T - 1) / TILE_T;
        const int64_t height = (t1 - t0) / count, taller = (t1 - t0) % count;
        for (int64_t i = 0, t = t0; i < count; i++) {
            const int c = static_cast<int>(height + (i < taller));
            f(t, c, i);
            t += c;
        }
    }

    // All rows of x, which stay near, with weights that stream by. The next four rows of weights are asked for while
    // these four are worked on, a share by each tile; past the last row that does no harm.
    void stream(int64_t n0, int64_t n1) const {
        const int64_t count = (T + TILE_T - 1) / TILE_T;
        const int share = count == 1 ? 4 : count <= 3 ? 2 : 1;
        for (int64_t n = n0; n < n1; n += TILE_N)
            for_tiles(0, T, [&](int64_t t, int c, int64_t i) {
                one(t, c, n, n1, n + TILE_N + i * share, i * share < TILE_N ? share : 0);
            });
    }

    // Weights that stay near, with rows of x that pass by.
    void pass(int64_t t0, int64_t t1, int64_t n0, int64_t n1) const {
        for_tiles(t0, t1, [&](int64_t t, int c, int64_t) {
            for (int64_t n = n0; n < n1; n += TILE_N) one(t, c, n, n1, 0, 0);
        });
    }
};

template <typename S>
void run(const Problem<S>& p, int threads) {
    const int64_t row_bytes = p.K * static_cast<int64_t>(sizeof(typename S::type)), four = TILE_N * row_bytes;
    if (p.T * row_bytes <= L2_SHARE / 2) {
        const int64_t groups = std::max<int64_t>(1, std::max(LEAST_PIECE, p.N * row_bytes / (32 * threads)) / four);
        const int64_t block_n = groups * TILE_N;
        parallel((p.N + block_n - 1) / block_n, threads, [&](int64_t i) {
            p.stream(i * block_n, std::min((i + 1) * block_n, p.N));
        });
    } else {
        const int64_t groups = std::min(L2_SHARE / four, (p.N / threads + TILE_N) / TILE_N);
        const int64_t block_n = std::max<int64_t>(1, groups) * TILE_N, block_t = 16 * TILE_T;
        const int64_t blocks_n = (p.N + block_n - 1) / block_n, blocks_t = (p.T + block_t - 1) / block_t;
        parallel(blocks_n * blocks_t, threads, [&](int64_t i) {
            const int64_t n = i / blocks_t * block_n, t = i % blocks_t * block_t;
            p.pass(t, std::min(t + block_t, p.T), n, std::min(n + block_n, p.N));
        });
    }
}

template <typename S>
void start(const void* x, int64_t x_stride, const void* w, const void* bias, void* y, int64_t T, int64_t N, int64_t K,
           int threads) {
    using type = const typename S::type*;
    run(Problem<S>{(type)x, (type)w, (type)bias, (typename S::type*)y, x_stride, T, N, K}, threads);
}

}  // namespace

void linear(Type type, const void* x, int64_t x_stride, const void* w, const void* bias, void* y, int64_t T, int64_t N,
            int64_t K, int threads) {
    auto go = of(type, start<StepF32>, start<StepBF16>, start<StepF16>);
    go(x, x_stride, w, bias, y, T, N, K, threads);
}

}  // namespace lightvllm
