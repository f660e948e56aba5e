// The kernels as torch operators of the namespace `lightvllm`, for CPU tensors.
//
// An operator looks at its tensors and either hands their pointers to the kernel or, where the kernel does not serve
// them (another dtype, a layout with gaps inside a row), calls the operator of the same name with "_reference"
// behind, which Python registers. Sizes that contradict each other are the reference's to complain about as well.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace {

using at::Tensor;
using lightvllm::Indices;
using lightvllm::Rows;
using lightvllm::Type;

// The threads of the kernels; 0: as many as torch's operations have.
std::atomic<int64_t> chosen_threads{0};

int threads() {
    const int64_t chosen = chosen_threads.load(std::memory_order_relaxed);
    return chosen ? static_cast<int>(chosen) : at::get_num_threads();
}

void set_num_threads(int64_t count) { chosen_threads.store(count); }

template <typename Signature>
c10::TypedOperatorHandle<Signature> reference(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// All on the CPU, of one dtype that the kernels know, and with something in them.
bool served(std::initializer_list<const Tensor*> tensors) {
    at::ScalarType type = (*tensors.begin())->scalar_type();
    if (type != at::kFloat && type != at::kBFloat16 && type != at::kHalf) return false;
    for (const Tensor* t : tensors)
        if (t->scalar_type() != type || !t->is_cpu() || t->numel() == 0) return false;
    return true;
}

// The elements of a row, all dimensions but the first, lie side by side in order.
bool rows_whole(const Tensor& t) {
    int64_t expected = 1;
    for (int64_t d = t.dim() - 1; d > 0; d--) {
        if (t.size(d) != 1 && t.stride(d) != expected) return false;
        expected *= t.size(d);
    }
    return t.dim() > 0;
}

bool integers(std::initializer_list<const Tensor*> tensors) {
    for (const Tensor* t : tensors)
        if ((t->scalar_type() != at::kLong && t->scalar_type() != at::kInt) || !t->is_cpu()) return false;
    return true;
}

Type type_of(const Tensor& t) {
    at::ScalarType type = t.scalar_type();
    return type == at::kFloat ? Type::f32 : type == at::kBFloat16 ? Type::bf16 : Type::f16;
}

Indices indices(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == at::kLong}; }

Rows rows(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.size(1)}; }

void check_range(Indices values, int64_t count, int64_t limit, const char* what, const char* of) {
    for (int64_t i = 0; i < count; i++)
        TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < limit, what, " ", values[i], " is outside ", of, " (0 to ",
                          limit - 1, ")");
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    bool ok = x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && served({&x, &weight}) &&
              rows_whole(x) && weight.is_contiguous();
    if (ok && bias)
        ok = served({&x, &*bias}) && bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous();
    if (!ok) {
        static auto op = reference<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&)>(
            "lightvllm::linear_reference");
        return op.call(x, weight, bias);
    }
    Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
    lightvllm::linear(type_of(x), x.const_data_ptr(), x.stride(0), weight.const_data_ptr(),
                      bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), x.size(0), weight.size(0),
                      x.size(1), threads());
    return y;
}

bool norm_served(const Tensor& x, const Tensor& weight) {
    return x.dim() == 2 && weight.dim() == 1 && weight.size(0) == x.size(1) && served({&x, &weight}) &&
           rows_whole(x) && weight.is_contiguous();
}

Tensor normed(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
    Tensor y = at::empty(x.sizes(), x.options());
    lightvllm::rms_norm(type_of(x), x.const_data_ptr(), x.stride(0), residual ? residual->mutable_data_ptr() : nullptr,
                        residual ? residual->stride(0) : 0, weight.const_data_ptr(), y.mutable_data_ptr(), x.size(0),
                        x.size(1), static_cast<float>(eps), threads());
    return y;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    if (!norm_served(x, weight)) {
        static auto op =
            reference<Tensor(const Tensor&, const Tensor&, double)>("lightvllm::rms_norm_reference");
        return op.call(x, weight, eps);
    }
    return normed(x, nullptr, weight, eps);
}

Tensor fused_add_rms_norm(const Tensor& x, Tensor& residual, const Tensor& weight, double eps) {
    if (!norm_served(x, weight) || !served({&x, &residual}) || residual.sizes() != x.sizes() ||
        !rows_whole(residual)) {
        static auto op = reference<Tensor(const Tensor&, Tensor&, const Tensor&, double)>(
            "lightvllm::fused_add_rms_norm_reference");
        return op.call(x, residual, weight, eps);
    }
    return normed(x, &residual, weight, eps);
}

bool rope_served(const Tensor& positions, const Tensor& query, const Tensor& key, const Tensor& cos_sin) {
    int64_t T = query.size(0);
    return query.dim() == 3 && key.dim() == 3 && positions.dim() == 1 && cos_sin.dim() == 2 &&
           served({&query, &key}) && integers({&positions}) && positions.is_contiguous() && positions.size(0) == T &&
           key.size(0) == T && query.size(2) % 2 == 0 && key.size(2) == query.size(2) &&
           cos_sin.size(1) == query.size(2) && cos_sin.scalar_type() == at::kFloat && cos_sin.is_cpu() &&
           cos_sin.is_contiguous() && rows_whole(query) && rows_whole(key);
}

void rotate(const Tensor& positions, const Tensor& query, const Tensor& key, const Tensor& cos_sin) {
    check_range(indices(positions), query.size(0), cos_sin.size(0), "position", "the table of cosines and sines");
    Rows both[] = {rows(query), rows(key)};
    lightvllm::rotary_embedding(type_of(query), indices(positions), both, 2, cos_sin.const_data_ptr<float>(),
                                query.size(0), query.size(2), threads());
}

void rotary_embedding(const Tensor& positions, Tensor& query, Tensor& key, const Tensor& cos_sin) {
    if (!rope_served(positions, query, key, cos_sin)) {
        static auto op = reference<void(const Tensor&, Tensor&, Tensor&, const Tensor&)>(
            "lightvllm::rotary_embedding_reference");
        op.call(positions, query, key, cos_sin);
        return;
    }
    rotate(positions, query, key, cos_sin);
}

bool cache_served(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                  const Tensor& slot_mapping) {
    if (key.dim() != 3 || key_cache.dim() != 4 || key.sizes() != value.sizes() ||
        key_cache.sizes() != value_cache.sizes() || slot_mapping.dim() != 1)
        return false;
    bool same = key_cache.size(2) == key.size(1) && key_cache.size(3) == key.size(2);
    return same && served({&key, &value, &key_cache, &value_cache}) && integers({&slot_mapping}) &&
           slot_mapping.is_contiguous() && slot_mapping.size(0) == key.size(0) && rows_whole(key) &&
           rows_whole(value) && key_cache.is_contiguous() && value_cache.is_contiguous();
}

void write_cache(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& slot_mapping) {
    int64_t size = key.element_size(), T = key.size(0);
    check_range(indices(slot_mapping), T, key_cache.size(0) * key_cache.size(1), "slot", "the cache");
    lightvllm::Copy copies[] = {
        {static_cast<const char*>(key.const_data_ptr()), static_cast<char*>(key_cache.mutable_data_ptr()),
         key.stride(0) * size},
        {static_cast<const char*>(value.const_data_ptr()), static_cast<char*>(value_cache.mutable_data_ptr()),
         value.stride(0) * size},
    };
    lightvllm::scatter_rows(copies, 2, indices(slot_mapping), T, key.size(1) * key.size(2) * size,
                            threads());
}

void reshape_and_cache(const Tensor& key, const Tensor& value, Tensor& key_cache, Tensor& value_cache,
                       const Tensor& slot_mapping) {
    if (!cache_served(key, value, key_cache, value_cache, slot_mapping)) {
        static auto op = reference<void(const Tensor&, const Tensor&, Tensor&, Tensor&, const Tensor&)>(
            "lightvllm::reshape_and_cache_reference");
        op.call(key, value, key_cache, value_cache, slot_mapping);
        return;
    }
    write_cache(key, value, key_cache, value_cache, slot_mapping);
}

Tensor silu_and_mul(const Tensor& x) {
    if (x.dim() != 2 || x.size(1) % 2 || !served({&x}) || !rows_whole(x)) {
        static auto op = reference<Tensor(const Tensor&)>("lightvllm::silu_and_mul_reference");
        return op.call(x);
    }
    int64_t N = x.size(1) / 2;
    Tensor y = at::empty({x.size(0), N}, x.options());
    lightvllm::silu_and_mul(type_of(x), x.const_data_ptr(), x.stride(0), y.mutable_data_ptr(), x.size(0), N,
                            threads());
    return y;
}

bool attention_served(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                      const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start_loc) {
    if (query.dim() != 3 || key_cache.dim() != 4 || key_cache.sizes() != value_cache.sizes() ||
        block_tables.dim() != 2 || seq_lens.dim() != 1 || query_start_loc.dim() != 1 ||
        !served({&query, &key_cache, &value_cache}) || !integers({&block_tables, &seq_lens, &query_start_loc}))
        return false;
    return query.size(2) % 16 == 0 && key_cache.size(3) == query.size(2) && query.size(1) % key_cache.size(2) == 0 &&
           query_start_loc.size(0) == seq_lens.size(0) + 1 && block_tables.size(0) == seq_lens.size(0) &&
           rows_whole(query) && key_cache.is_contiguous() && value_cache.is_contiguous() && rows_whole(block_tables) &&
           seq_lens.is_contiguous() && query_start_loc.is_contiguous();
}

Tensor paged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start_loc,
                       double scale) {
    if (!attention_served(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc)) {
        static auto op = reference<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, double)>("lightvllm::paged_attention_reference");
        return op.call(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale);
    }
    int64_t S = seq_lens.size(0), block_size = key_cache.size(1), stride = block_tables.stride(0);
    Indices tables = indices(block_tables), lengths = indices(seq_lens), starts = indices(query_start_loc);
    for (int64_t s = 0; s < S; s++) {
        int64_t queries = starts[s + 1] - starts[s], blocks = (lengths[s] + block_size - 1) / block_size;
        TORCH_CHECK_INDEX(starts[s] >= 0 && queries >= 0 && starts[s + 1] <= query.size(0) && queries <= lengths[s] &&
                              blocks <= block_tables.size(1),
                          "sequence ", s, " of ", lengths[s], " tokens with the query rows ", starts[s], " to ",
                          starts[s + 1], " does not fit ", query.size(0), " rows and tables of ", block_tables.size(1),
                          " blocks");
        for (int64_t b = 0; b < blocks; b++) {
            int64_t block = tables[s * stride + b];
            TORCH_CHECK_INDEX(block >= 0 && block < key_cache.size(0), "block ", block, " is outside the cache (0 to ",
                              key_cache.size(0) - 1, ")");
        }
    }
    Tensor out = at::empty(query.sizes(), query.options());
    lightvllm::Attention a{query.const_data_ptr(), key_cache.const_data_ptr(), value_cache.const_data_ptr(),
                           out.mutable_data_ptr(), query.stride(0),            block_size,
                           query.size(1),          key_cache.size(2),          query.size(2),
                           tables,                 lengths,                    starts,
                           S,                      stride,                     static_cast<float>(scale)};
    lightvllm::paged_attention(type_of(query), a, threads());
    return out;
}

}  // namespace

TORCH_LIBRARY(lightvllm, m) {
    m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
    m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
    m.def("fused_add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor");
    m.def("rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!) key, Tensor cos_sin) -> ()");
    m.def("silu_and_mul(Tensor x) -> Tensor");
    m.def(
        "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping) -> ()");
    m.def(
        "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens, "
        "Tensor query_start_loc, float scale) -> Tensor");
    m.def("set_num_threads(int count) -> ()", &set_num_threads);
}

TORCH_LIBRARY_IMPL(lightvllm, CPU, m) {
    m.impl("linear", &linear);
    m.impl("rms_norm", &rms_norm);
    m.impl("fused_add_rms_norm", &fused_add_rms_norm);
    m.impl("rotary_embedding", &rotary_embedding);
    m.impl("silu_and_mul", &silu_and_mul);
    m.impl("reshape_and_cache", &reshape_and_cache);
    m.impl("paged_attention", &paged_attention);
}
