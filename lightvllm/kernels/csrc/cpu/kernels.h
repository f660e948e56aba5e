// The kernels on plain pointers; no torch header here, so that they compile fast and can be read by themselves.
//
// Strides count elements, between rows; the elements of a row lie side by side. `threads` is an upper bound. No result
// depends on it, nor on how many rows stand beside a row in the batch: each output has one fixed order of sums.
#pragma once

#include <cstdint>

namespace lightvllm {

enum class Type { f32, bf16, f16 };

// The instance of a kernel for a type.
template <typename F>
F of(Type type, F f32, F bf16, F f16) {
    return type == Type::f32 ? f32 : type == Type::bf16 ? bf16 : f16;
}

// An integer tensor of either width.
struct Indices {
    const void* data;
    bool wide;
    int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

// y[t, n] = sum_k x[t, k] w[n, k] + bias[n]; w is [N, K] as it lies, bias may be null.
void linear(Type type, const void* x, int64_t x_stride, const void* w, const void* bias, void* y, int64_t T, int64_t N,
            int64_t K, int threads);

// y = norm(x); with a residual: residual += x, y = norm(residual).
void rms_norm(Type type, const void* x, int64_t x_stride, void* residual, int64_t residual_stride, const void* weight,
              void* y, int64_t T, int64_t N, float eps, int threads);

struct Rows {  // [T, heads, D]; heads lie side by side
    void* data;
    int64_t stride, heads;
};

void rotary_embedding(Type type, Indices positions, const Rows* rows, int count, const float* cos_sin, int64_t T,
                      int64_t D, int threads);

// Copies row t of each source, `row_bytes` long, to row slots[t] of its destination. Strides are in bytes here.
struct Copy {
    const char* from;
    char* to;
    int64_t stride;
};

void scatter_rows(const Copy* copies, int count, Indices slots, int64_t T, int64_t row_bytes, int threads);

void silu_and_mul(Type type, const void* x, int64_t x_stride, void* y, int64_t T, int64_t N, int threads);

struct Attention {
    const void *query, *key_cache, *value_cache;
    void* out;
    int64_t query_stride, block_size, H, G, D;
    Indices block_tables, seq_lens, query_start_loc;
    int64_t S, block_table_stride;
    float scale;
};

void paged_attention(Type type, const Attention& a, int threads);

}  // namespace lightvllm
