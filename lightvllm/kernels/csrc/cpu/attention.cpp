// Paged attention, for decode and prefill alike: online softmax in float32 over chunks of CHUNK tokens.
//
// Chunks begin at multiples of CHUNK from the sequence's first token, and every score and every weighted sum is
// accumulated in one order. So the result of a query row depends on its sequence alone: not on the other sequences,
// not on how its prompt was cut into prefill chunks. The rows of a tile (queries × heads that share a KV head) share
// each chunk of keys and values, which is brought into float32 once.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "team.h"
#include "vec.h"

namespace lightvllm {
namespace {

constexpr int CHUNK = 2 * LANES;
constexpr int TILE_ROWS = 24;
constexpr float MINUS_INFINITY = -__builtin_inff();
constexpr i32x16 NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Item {
    int64_t sequence, kv_head, kv_heads;  // the heads from kv_head on; they lie side by side in a token's keys
    int64_t first_row, rows;              // rows of the flattened (query, head of the group) order, for each KV head
};

struct Scratch {
    std::vector<float> keys, values, query, out;  // [D][CHUNK], [CHUNK][D], [TILE_ROWS][D] twice
    std::vector<char> raw;                        // a chunk's keys, then its values, as they lie in the cache
    float weights[TILE_ROWS][CHUNK], top[TILE_ROWS], total[TILE_ROWS];
    void fit(int64_t D) {
        for (auto* chunk : {&keys, &values}) chunk->resize(D * CHUNK);
        for (auto* rows : {&query, &out}) rows->resize(D * TILE_ROWS);
    }
};

// Sixteen rows of sixteen floats, rows to columns.
inline void transpose(f32x16 (&v)[LANES]) {
    f32x16 w[LANES];
    // Four passes over the bits of the lane number: pass b exchanges bit b of row and lane.
#define LIGHTVLLM_EXCHANGE(from, to, step, ...)                                             \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & step)) {             \
        to[i] = __builtin_shufflevector(from[i], from[i | step], __VA_ARGS__);              \
    }
    LIGHTVLLM_EXCHANGE(v, w, 1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i += 2)
        w[i | 1] = __builtin_shufflevector(v[i], v[i | 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    LIGHTVLLM_EXCHANGE(w, v, 2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & 2))
        v[i | 2] = __builtin_shufflevector(w[i], w[i | 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    LIGHTVLLM_EXCHANGE(v, w, 4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & 4))
        w[i | 4] = __builtin_shufflevector(v[i], v[i | 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    LIGHTVLLM_EXCHANGE(w, v, 8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & 8))
        v[i | 8] = __builtin_shufflevector(w[i], w[i | 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#undef LIGHTVLLM_EXCHANGE
}

// scores[r][0..CHUNK) = query[r] . keys, for R rows; even and odd dimensions are summed apart, so that a sum need not
// wait for the one before.
template <int R>
void score_rows(const float* query, const float* keys, float (*scores)[CHUNK], int64_t D) {
    f32x16 acc[R][2][2] = {};
    for (int64_t d = 0; d < D; d += 2) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            const float* key = keys + (d + odd) * CHUNK;
            f32x16 low = load_as<f32x16>(key), high = load_as<f32x16>(key + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                f32x16 q = splat(query[r * D + d + odd]);
                acc[r][odd][0] = q * low + acc[r][odd][0];
                acc[r][odd][1] = q * high + acc[r][odd][1];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        store_as(scores[r], acc[r][0][0] + acc[r][1][0]);
        store_as(scores[r] + LANES, acc[r][0][1] + acc[r][1][1]);
    }
}

// out[r][0..16 V) = out * decay[r] + weights[r] . values, for R rows and V vectors of the head's dimension.
template <int R, int V>
void gather_rows(const float (*weights)[CHUNK], const float* decay, const float* values, float* out, int64_t D,
                 int tokens) {
    f32x16 acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] = load_as<f32x16>(out + r * D + v * LANES) * decay[r];
    for (int j = 0; j < tokens; j++) {
        f32x16 value[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) value[v] = load_as<f32x16>(values + j * D + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            f32x16 p = splat(weights[r][j]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] = p * value[v] + acc[r][v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store_as(out + r * D + v * LANES, acc[r][v]);
}

template <int R>
void gather(const float (*weights)[CHUNK], const float* decay, const float* values, float* out, int64_t D,
            int tokens) {
    int64_t d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) gather_rows<R, 4>(weights, decay, values + d, out + d, D, tokens);
    for (; d < D; d += LANES) gather_rows<R, 1>(weights, decay, values + d, out + d, D, tokens);
}

// Not inlined: the scratch's address is taken once, not with every access to the thread's own memory.
template <typename E>
[[gnu::noipa]] void attend(const Attention& a, const Item& item, Scratch& s) {
    using type = typename E::type;
    const int64_t D = a.D, group = a.H / a.G, rows = item.rows, all_rows = item.kv_heads * rows;
    const int64_t begin = a.query_start_loc[item.sequence], end = a.query_start_loc[item.sequence + 1];
    const int64_t before = a.seq_lens[item.sequence] - (end - begin);  // tokens before the first query
    const int64_t last = before + (item.first_row + rows - 1) / group + 1;
    // The query of row r, which is row r % rows of KV head r / rows, and the head that it belongs to.
    auto query_of = [&](int64_t r) { return begin + (item.first_row + r % rows) / group; };
    auto head_of = [&](int64_t r) {
        return (item.kv_head + r / rows) * group + (item.first_row + r % rows) % group;
    };
    const type* query = static_cast<const type*>(a.query);
    for (int64_t r = 0; r < all_rows; r++) {
        const type* from = query + query_of(r) * a.query_stride + head_of(r) * D;
        for (int64_t d = 0; d < D; d += LANES) {
            store_as(&s.query[r * D + d], E::load(from + d) * a.scale);
            store_as(&s.out[r * D + d], f32x16{});
        }
        s.top[r] = MINUS_INFINITY;
        s.total[r] = 0;
    }
    const int64_t token_stride = a.G * D, block_stride = a.block_size * token_stride;
    const type* keys = static_cast<const type*>(a.key_cache) + item.kv_head * D;
    const type* values = static_cast<const type*>(a.value_cache) + item.kv_head * D;
    const int64_t width = item.kv_heads * D;
    s.raw.resize(2 * CHUNK * width * sizeof(type));
    type *raw_keys = reinterpret_cast<type*>(s.raw.data()), *raw_values = raw_keys + CHUNK * width;
    for (int64_t chunk = 0; chunk < last; chunk += CHUNK) {
        const int tokens = static_cast<int>(std::min<int64_t>(CHUNK, last - chunk));
        int64_t entry = item.sequence * a.block_table_stride + chunk / a.block_size, offset = chunk % a.block_size;
        for (int64_t j = 0; j < tokens; entry++, offset = 0) {
            const int64_t count = std::min<int64_t>(tokens - j, a.block_size - offset);
            const int64_t from = a.block_tables[entry] * block_stride + offset * token_stride;
            for (int64_t i = 0; i < count; i++)
                std::memcpy(raw_keys + (j + i) * width, keys + from + i * token_stride, width * sizeof(type));
            for (int64_t i = 0; i < count; i++)
                std::memcpy(raw_values + (j + i) * width, values + from + i * token_stride, width * sizeof(type));
            j += count;
        }
        for (int64_t g = 0; g < item.kv_heads; g++) {
            const type *head_keys = raw_keys + g * D, *head_values = raw_values + g * D;
            const int64_t first = g * rows, end_row = first + rows;
            for (int64_t d = 0; d < D; d += LANES) {
                for (int part = 0; part < CHUNK; part += LANES) {
                    f32x16 square[LANES];
#pragma GCC unroll 16
                    for (int j = 0; j < LANES; j++) square[j] = part + j < tokens ? E::load(head_keys + (part + j) * width + d) : f32x16{};
                    transpose(square);
#pragma GCC unroll 16
                    for (int i = 0; i < LANES; i++) store_as(&s.keys[(d + i) * CHUNK + part], square[i]);
                }
                for (int j = 0; j < tokens; j++) store_as(&s.values[j * D + d], E::load(head_values + j * width + d));
            }
            float decay[TILE_ROWS];
            int64_t r = first;
            for (; r + 6 <= end_row; r += 6) score_rows<6>(&s.query[r * D], s.keys.data(), s.weights + r, D);
            for (; r + 3 <= end_row; r += 3) score_rows<3>(&s.query[r * D], s.keys.data(), s.weights + r, D);
            for (; r < end_row; r++) score_rows<1>(&s.query[r * D], s.keys.data(), s.weights + r, D);
            for (r = first; r < end_row; r++) {
                const int64_t visible = before + (item.first_row + r - first) / group + 1 - chunk;
                f32x16 p[2] = {load_as<f32x16>(s.weights[r]), load_as<f32x16>(s.weights[r] + LANES)};
                if (visible < CHUNK) {
                    const i32x16 count = i32x16{} + static_cast<int32_t>(std::max<int64_t>(visible, 0));
                    p[0] = NUMBERS < count ? p[0] : splat(MINUS_INFINITY);
                    p[1] = NUMBERS + LANES < count ? p[1] : splat(MINUS_INFINITY);
                }
                const float top = std::max(s.top[r], maximum(p[0] > p[1] ? p[0] : p[1]));
                for (auto& part : p) part = exp(part - top);
                decay[r] = top == s.top[r] ? 1.0f : exp(splat(s.top[r] - top))[0];
                s.total[r] = s.total[r] * decay[r] + sum(p[0] + p[1]);
                s.top[r] = top;
                store_as(s.weights[r], p[0]);
                store_as(s.weights[r] + LANES, p[1]);
            }
            r = first;
            for (; r + 4 <= end_row; r += 4) gather<4>(s.weights + r, decay + r, s.values.data(), &s.out[r * D], D, tokens);
            for (; r + 3 <= end_row; r += 3) gather<3>(s.weights + r, decay + r, s.values.data(), &s.out[r * D], D, tokens);
            for (; r < end_row; r++) gather<1>(s.weights + r, decay + r, s.values.data(), &s.out[r * D], D, tokens);
        }
    }
    type* out = static_cast<type*>(a.out);
    for (int64_t r = 0; r < all_rows; r++) {
        const int64_t at = (query_of(r) * a.H + head_of(r)) * D;
        for (int64_t d = 0; d < D; d += LANES) E::store(out + at + d, load_as<f32x16>(&s.out[r * D + d]) / s.total[r]);
    }
}

template <typename E>
void attend_all(const Attention& a, int threads) {
    std::vector<Item> items;
    const int64_t group = a.H / a.G;
    for (int64_t s = 0; s < a.S; s++) {
        const int64_t rows = (a.query_start_loc[s + 1] - a.query_start_loc[s]) * group;
        // A token's heads lie side by side: where there are sequences enough for all threads, one item reads them all.
        const int64_t fit = a.S >= 2 * threads ? std::max<int64_t>(1, TILE_ROWS / rows) : 1;
        for (int64_t row = 0; row < rows; row += TILE_ROWS)
            for (int64_t g = 0; g < a.G; g += fit)
                items.push_back({s, g, std::min(fit, a.G - g), row, std::min<int64_t>(TILE_ROWS, rows - row)});
    }
    const int64_t count = static_cast<int64_t>(items.size());
    // From the back: the last rows of a prompt see the most tokens and take the longest.
    parallel(count, threads, [&](int64_t i) {
        static thread_local Scratch scratch;
        scratch.fit(a.D);
        attend<E>(a, items[count - 1 - i], scratch);
    });
}

}  // namespace

void paged_attention(Type type, const Attention& a, int threads) {
    auto go = of(type, attend_all<F32>, attend_all<BF16>, attend_all<F16>);
    go(a, threads);
}

}  // namespace lightvllm
