// Norms, rotary embedding, the gated activation, and the write to the cache. Each rounds where the reference does: to the rows' type after
// every operation that torch would do by itself.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "team.h"
#include "vec.h"

namespace lightvllm {
namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 15;  // elements; below that waking a thread costs more than the work

// Calls f(t) for every row; `elements` of all rows together say how much work that is.
template <typename F>
void for_rows(int64_t T, int64_t elements, int threads, const F& f) {
    const int64_t pieces = std::min(T, std::max<int64_t>(1, elements / WORTH_A_THREAD));
    parallel(pieces, threads, [&](int64_t i) {
        for (int64_t t = T * i / pieces; t < T * (i + 1) / pieces; t++) f(t);
    });
}

int in_group(int64_t i, int64_t n) { return n - i < LANES ? static_cast<int>(n - i) : LANES; }

template <typename E>
void norm_rows(const void* x_, int64_t x_stride, void* residual_, int64_t residual_stride, const void* weight_,
               void* y_, int64_t T, int64_t N, float eps, int threads) {
    using type = typename E::type;
    for_rows(T, T * N, threads, [&](int64_t t) {
        const type* x = static_cast<const type*>(x_) + t * x_stride;
        const type* weight = static_cast<const type*>(weight_);
        type* y = static_cast<type*>(y_) + t * N;
        f32x16 squares = {};
        if (residual_) {
            type* residual = static_cast<type*>(residual_) + t * residual_stride;
            for (int64_t i = 0; i < N; i += LANES) {
                int n = in_group(i, N);
                f32x16 v = E::rounded(load_group<E>(x + i, n) + load_group<E>(residual + i, n));
                store_group<E>(residual + i, v, n);
                squares = v * v + squares;
            }
            x = residual;
        } else {
            for (int64_t i = 0; i < N; i += LANES) {
                f32x16 v = load_group<E>(x + i, in_group(i, N));
                squares = v * v + squares;
            }
        }
        float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(N) + eps);
        for (int64_t i = 0; i < N; i += LANES) {
            int n = in_group(i, N);
            f32x16 v = E::rounded(load_group<E>(x + i, n) * scale);
            store_group<E>(y + i, v * load_group<E>(weight + i, n), n);
        }
    });
}

template <typename E>
void rotate_rows(Indices positions, const Rows* rows, int count, const float* cos_sin, int64_t T, int64_t D,
                 int threads) {
    using type = typename E::type;
    int64_t half = D / 2, heads = 0;
    for (int j = 0; j < count; j++) heads += rows[j].heads;
    for_rows(T, T * heads * D, threads, [&](int64_t t) {
        const float* table = cos_sin + positions[t] * D;
        for (int64_t i = 0; i < half; i += LANES) {
            int n = in_group(i, half);
            f32x16 cos = E::rounded(load_group<F32>(table + i, n));
            f32x16 sin = E::rounded(load_group<F32>(table + half + i, n));
            for (int j = 0; j < count; j++) {
                type* head = static_cast<type*>(rows[j].data) + t * rows[j].stride + i;
                for (int64_t h = 0; h < rows[j].heads; h++, head += D) {
                    f32x16 left = load_group<E>(head, n), right = load_group<E>(head + half, n);
                    store_group<E>(head, E::rounded(left * cos) - E::rounded(right * sin), n);
                    store_group<E>(head + half, E::rounded(right * cos) + E::rounded(left * sin), n);
                }
            }
        }
    });
}

template <typename E>
void activate_rows(const void* x_, int64_t x_stride, void* y_, int64_t T, int64_t N, int threads) {
    using type = typename E::type;
    for_rows(T, 2 * T * N, threads, [&](int64_t t) {
        const type* gate = static_cast<const type*>(x_) + t * x_stride;
        type* y = static_cast<type*>(y_) + t * N;
        for (int64_t i = 0; i < N; i += LANES) {
            int n = in_group(i, N);
            f32x16 g = load_group<E>(gate + i, n), up = load_group<E>(gate + N + i, n);
            store_group<E>(y + i, E::rounded(g / (1.0f + exp(-g))) * up, n);
        }
    });
}

}  // namespace

void rms_norm(Type type, const void* x, int64_t x_stride, void* residual, int64_t residual_stride, const void* weight,
              void* y, int64_t T, int64_t N, float eps, int threads) {
    auto go = of(type, norm_rows<F32>, norm_rows<BF16>, norm_rows<F16>);
    go(x, x_stride, residual, residual_stride, weight, y, T, N, eps, threads);
}

void rotary_embedding(Type type, Indices positions, const Rows* rows, int count, const float* cos_sin, int64_t T,
                      int64_t D, int threads) {
    auto go = of(type, rotate_rows<F32>, rotate_rows<BF16>, rotate_rows<F16>);
    go(positions, rows, count, cos_sin, T, D, threads);
}

void silu_and_mul(Type type, const void* x, int64_t x_stride, void* y, int64_t T, int64_t N, int threads) {
    auto go = of(type, activate_rows<F32>, activate_rows<BF16>, activate_rows<F16>);
    go(x, x_stride, y, T, N, threads);
}

void scatter_rows(const Copy* copies, int count, Indices slots, int64_t T, int64_t row_bytes, int threads) {
    for_rows(T, T * count * row_bytes / 4, threads, [&](int64_t t) {
        for (int j = 0; j < count; j++)
            std::memcpy(copies[j].to + slots[t] * row_bytes, copies[j].from + t * copies[j].stride, row_bytes);
    });
}

}  // namespace lightvllm
