// Generation on a CPU: a GPT forward pass over a static key/value cache, for the few rows of a decoding step or the many of
// a prompt, and the choice of the next token.
//
// T is the type of weights: float, bfloat16, or int8 in groups with a scale each. Matrices lie in panels of LANES outputs,
// summed dimension downwards in units of 32 bits (a float, 2 bfloat16, 4 int8), so that one instruction multiplies a unit
// of a row with a unit of each of LANES outputs. Keys (outputs: positions) and values (outputs: a head's channels) are kept
// in the same form, so that attention is the same product. A sum is always added up in the same order, alone or in company:
// what a row gives never depends on its neighbours.

#include <omp.h>
#include <sys/mman.h>

#include <atomic>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t GROUP = 64;  // weights, and inputs, that share a scale
constexpr int ROWS = 4;        // of a register tile
constexpr int PANELS = 4;      // of a register tile

// ── matrices ──

// Zeros, on huge pages where the system has them: a pass over all weights then misses no page table entries.
class Arena {
    char* bytes = nullptr;
    size_t size = 0, used = 0;

   public:
    ~Arena() {
        if (bytes) munmap(bytes, size);
    }
    bool reserve(size_t wanted) {
        size = (wanted + (1 << 21)) & ~size_t((1 << 21) - 1);
        void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (found == MAP_FAILED) return size = 0, false;
#ifdef MADV_HUGEPAGE
        madvise(found, size, MADV_HUGEPAGE);
#endif
        bytes = (char*)found;
        return true;
    }
    unit* take(int64_t units_count) {
        unit* taken = (unit*)(bytes + used);
        used += (units_count * sizeof(unit) + 63) & ~size_t(63);
        return taken;
    }
};

template <class T>
constexpr int PER_UNIT = 4 / sizeof(T);

template <class T>
constexpr bool GROUPED = false;
template <>
constexpr bool GROUPED<int8_t> = true;

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Units of a row's summed dimension; with groups, whole groups.
template <class T>
int64_t steps_of(int64_t inputs) {
    return GROUPED<T> ? divided_up(inputs, GROUP) * (GROUP / PER_UNIT<T>) : divided_up(inputs, PER_UNIT<T>);
}

// LANES units a step, and for int8 a row of LANES scales after each group.
template <class T>
int64_t panel_units(int64_t inputs) {
    return (steps_of<T>(inputs) + (GROUPED<T> ? divided_up(inputs, GROUP) : 0)) * LANES;
}

// Greatest absolute value; NaN where a number is NaN or infinite, so that neither is lost in rounding.
inline float magnitude(const float* x, int64_t count) {
    float most = 0;
    int32_t broken = 0;
#pragma omp simd reduction(max : most) reduction(| : broken)
    for (int64_t i = 0; i < count; i++) {
        float size = std::fabs(x[i]);
        most = std::max(most, size);
        broken |= !(size <= std::numeric_limits<float>::max());
    }
    return broken ? std::numeric_limits<float>::quiet_NaN() : most;
}

template <class T>
struct Matrix {
    int64_t outputs = 0, inputs = 0;
    unit* data = nullptr;
    std::vector<float> bias;

    int64_t panels() const { return divided_up(outputs, LANES); }
    int64_t size() const { return panels() * panel_units<T>(inputs); }
    void pack(const float* weight);
};

template <class T>
void Matrix<T>::pack(const float* weight) {
    constexpr int per = PER_UNIT<T>;
    for (int64_t o = 0; o < outputs; o++) {
        T* panel = (T*)(data + o / LANES * panel_units<T>(inputs)) + o % LANES * per;
        for (int64_t i = 0; i < inputs; i++) store(panel[i / per * LANES * per + i % per], weight[o * inputs + i]);
    }
}

// The stored byte is the weight + 128: the instruction wants one factor without sign.
template <>
void Matrix<int8_t>::pack(const float* weight) {
    for (int64_t o = 0; o < outputs; o++) {
        unit* panel = data + o / LANES * panel_units<int8_t>(inputs) + o % LANES;
        for (int64_t first = 0; first < inputs; first += GROUP, panel += (GROUP / 4 + 1) * LANES) {
            const float* w = weight + o * inputs + first;
            int64_t count = std::min(GROUP, inputs - first);
            float most = magnitude(w, count), scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
            for (int64_t i = 0; i < GROUP; i++) {
                float rounded = i < count ? __builtin_rintf(w[i] * inverse) : 0.0f;
                ((uint8_t*)(panel + i / 4 * LANES))[i % 4] = uint8_t(int(rounded) + 128);
            }
            std::memcpy(panel + GROUP / 4 * LANES, &scale, 4);
        }
    }
}

// Rows of numbers in the form that matrices of T are multiplied with.
template <class T>
struct Input {
    int64_t steps = 0, groups = 0;
    std::vector<unit> data;
    std::vector<float> scales;     // of each row's groups (int8)
    std::vector<int32_t> offsets;  // -128 times the sum of a group: takes back what the weights' 128 adds

    void resize(int64_t rows, int64_t inputs) {
        steps = steps_of<T>(inputs);
        groups = GROUPED<T> ? divided_up(inputs, GROUP) : 0;
        data.assign(rows * steps, 0);
        scales.assign(rows * groups, 0);
        offsets.assign(rows * groups, 0);
    }
    const unit* row(int64_t r) const { return data.data() + r * steps; }
    void set(int64_t row, const float* x, int64_t count);
};

template <class T>
void Input<T>::set(int64_t r, const float* x, int64_t count) {
    convert(x, (T*)(data.data() + r * steps), count);
}

template <>
void Input<int8_t>::set(int64_t r, const float* x, int64_t count) {
    for (int64_t g = 0; g < groups; g++) {
        int64_t size = std::min(GROUP, count - g * GROUP);
        const float* in = x + g * GROUP;
        int8_t* out = (int8_t*)(data.data() + r * steps) + g * GROUP;
        float most = magnitude(in, size);
        float inverse = most > 0 ? 127.0f / most : 0.0f;
        int32_t rounded[GROUP] = {}, sum = 0;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) rounded[i] = int32_t(__builtin_rintf(in[i] * inverse));
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < GROUP; i++) sum += rounded[i];
        for (int64_t i = 0; i < GROUP; i++) out[i] = int8_t(rounded[i]);
        scales[r * groups + g] = most / 127.0f;
        offsets[r * groups + g] = -128 * sum;
    }
}

// ── products ──

// R rows by W panels: sums[r][w] = the products of row r with the LANES outputs of panel w.
template <class T, int R, int W>
inline void tile(const unit* x, int64_t x_stride, const unit* panel, int64_t panel_stride, int64_t steps, vector (&sums)[R][W]) {
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) sums[r][w] = vector{};
    for (int64_t step = 0; step < steps; step++) {
        units column[W];
        for (int w = 0; w < W; w++) column[w] = *(const units*)(panel + w * panel_stride + step * LANES);
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++) sums[r][w] = multiply_add<T>(sums[r][w], x[r * x_stride + step], column[w]);
    }
}

template <int R, int W>
inline void grouped_tile(const unit* x, const float* scales, const int32_t* offsets, int64_t groups, const unit* panel,
                         int64_t panel_stride, vector (&sums)[R][W]) {
    constexpr int64_t steps = GROUP / 4;
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) sums[r][w] = vector{};
    for (int64_t g = 0; g < groups; g++, panel += (steps + 1) * LANES, x += steps) {
        units whole[R][W];
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++) whole[r][w] = units{} + offsets[r * groups + g];
#pragma GCC unroll 8
        for (int64_t step = 0; step < steps; step++)
            for (int w = 0; w < W; w++) {
                units column = *(const units*)(panel + w * panel_stride + step * LANES);
                for (int r = 0; r < R; r++)
                    whole[r][w] = multiply_add_bytes(whole[r][w], column, x[r * groups * steps + step]);
            }
        for (int w = 0; w < W; w++) {
            vector scale = *(const vector*)(panel + w * panel_stride + steps * LANES);
            for (int r = 0; r < R; r++)
                sums[r][w] += __builtin_convertvector(whole[r][w], vector) * (scale * scales[r * groups + g]);
        }
    }
}

template <class T, int R, int W, class Store>
inline void rows_by_panels(const Input<T>& x, int64_t row, const Matrix<T>& m, int64_t p, Store store_vector) {
    vector sums[R][W];
    int64_t stride = panel_units<T>(m.inputs);
    const unit* panel = m.data + p * stride;
    if constexpr (GROUPED<T>)
        grouped_tile<R, W>(x.row(row), &x.scales[row * x.groups], &x.offsets[row * x.groups], x.groups, panel, stride, sums);
    else
        tile<T, R, W>(x.row(row), x.steps, panel, stride, x.steps, sums);
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store_vector(row + r, (p + w) * LANES, sums[r][w]);
}

template <class T, int R, int W, class Store>
inline void all_rows(const Input<T>& x, int64_t row, int64_t rows, const Matrix<T>& m, int64_t p, Store store_vector) {
    for (; row + R <= rows; row += R) rows_by_panels<T, R, W>(x, row, m, p, store_vector);
    if constexpr (R > 1) {
        if (row < rows) all_rows<T, R - 1, W>(x, row, rows, m, p, store_vector);
    }
}

// x m' for the panels [first, last): store_vector(row, output, LANES sums).
template <class T, class Store>
void product(const Input<T>& x, int64_t rows, const Matrix<T>& m, int64_t first, int64_t last, Store store_vector) {
    int64_t p = first;
    if (rows == 1)
        for (; p + 8 <= last; p += 8) rows_by_panels<T, 1, 8>(x, 0, m, p, store_vector);
    for (; p + PANELS <= last; p += PANELS) all_rows<T, ROWS, PANELS>(x, 0, rows, m, p, store_vector);
    for (; p < last; p++) all_rows<T, ROWS, 1>(x, 0, rows, m, p, store_vector);
}

// ── the model ──

struct Norm {
    std::vector<float> weight, bias;
    bool centre = false;

    void apply(const float* x, float* y) const {
        int64_t width = weight.size();
        float total = 0, square = 0;
        if (centre) {
#pragma omp simd reduction(+ : total)
            for (int64_t c = 0; c < width; c++) total += x[c];
        }
        float mean = total / width;
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < width; c++) square += (x[c] - mean) * (x[c] - mean);
        float inverse = 1.0f / std::sqrt(square / width + 1e-5f);
        const float* b = bias.empty() ? nullptr : bias.data();
        if (b) {
#pragma omp simd
            for (int64_t c = 0; c < width; c++) y[c] = (x[c] - mean) * inverse * weight[c] + b[c];
        } else {
#pragma omp simd
            for (int64_t c = 0; c < width; c++) y[c] = (x[c] - mean) * inverse * weight[c];
        }
    }
};

struct Shape {  // as decode.py passes it
    int64_t layers, width, heads, kv_heads, head_width, hidden, vocab, context, slots, gated, centre, rope, learned, qk_norm;
};

// Threads that wait for each other many times in a millisecond: they spin, and yield when one of them is not running.
class Barrier {
    std::atomic<int> arrived{0}, phase{0};

   public:
    void wait(int threads) {
        if (threads == 1) return;
        int now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int tries = 0; phase.load(std::memory_order_acquire) == now; tries++) tries < 4096 ? pause() : yield();
    }
};

class Model {
   public:
    virtual ~Model() = default;
    virtual void forward(int64_t rows, const int32_t* ids, const int32_t* slots, const int32_t* positions, int64_t outputs,
                         const int32_t* output_rows, float* logits, int threads) = 0;
};

template <class T>
class Decoder : public Model {
    using A = std::conditional_t<sizeof(T) == 4, float, bfloat16>;  // of keys, values and attention's factors

    struct Block {
        Norm attention_norm, mlp_norm, q_norm, k_norm;
        Matrix<T> qkv, out, up, down;
    };

    Shape shape;
    std::vector<Block> blocks;
    Norm norm;
    Matrix<T> head;
    const float *embedding, *position_embedding, *cosines, *sines;
    Arena weights, cache;
    int64_t key_units, value_units;  // of a head of a slot of a layer
    unit *keys, *values;

    // of a step
    std::vector<float> x, y, hidden;
    std::vector<int32_t> row_ids;
    Input<T> wide, deep;
    Barrier barrier;

    int64_t row_width() const { return (shape.heads + 2 * shape.kv_heads) * shape.head_width; }
    int64_t up_width() const { return shape.hidden * (shape.gated ? 2 : 1); }
    int64_t query_steps() const { return divided_up(shape.head_width, PER_UNIT<A>); }
    int64_t place(int64_t layer, int64_t slot, int64_t group) const {
        return (layer * shape.slots + slot) * shape.kv_heads + group;
    }

   public:
    bool build(const Shape& given, const float* const* tensors) {
        shape = given;
        blocks.resize(shape.layers);
        const float* const* next = tensors;
        std::vector<std::pair<Matrix<T>*, const float*>> matrices;
        auto vector_of = [&](int64_t size) {
            const float* from = *next++;
            return from ? std::vector<float>(from, from + size) : std::vector<float>();
        };
        auto norm_of = [&](int64_t size) {
            std::vector<float> weight = vector_of(size);
            return Norm{weight, vector_of(size), bool(shape.centre)};
        };
        auto matrix_of = [&](Matrix<T>& m, int64_t outputs, int64_t inputs) {
            m.outputs = outputs, m.inputs = inputs;
            matrices.emplace_back(&m, *next++);
            m.bias = vector_of(outputs);
        };
        for (Block& block : blocks) {
            block.attention_norm = norm_of(shape.width);
            matrix_of(block.qkv, row_width(), shape.width);
            if (shape.qk_norm) block.q_norm = norm_of(shape.head_width), block.k_norm = norm_of(shape.head_width);
            matrix_of(block.out, shape.width, shape.heads * shape.head_width);
            block.mlp_norm = norm_of(shape.width);
            matrix_of(block.up, up_width(), shape.width);
            matrix_of(block.down, shape.width, shape.hidden);
        }
        norm = norm_of(shape.width);
        matrix_of(head, shape.vocab, shape.width);
        embedding = *next++, position_embedding = *next++, cosines = *next++, sines = *next++;

        int64_t total = 0;
        for (auto& [m, from] : matrices) total += m->size() + 16;
        if (!weights.reserve(total * sizeof(unit))) return false;
        for (auto& [m, from] : matrices) m->data = weights.take(m->size());
#pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < matrices.size(); i++) matrices[i].first->pack(matrices[i].second);

        int64_t capacity = divided_up(shape.context, LANES) * LANES;
        key_units = capacity * query_steps();
        value_units = divided_up(shape.head_width, LANES) * divided_up(capacity, PER_UNIT<A>) * LANES;
        int64_t places = shape.layers * shape.slots * shape.kv_heads;
        if (!cache.reserve(places * (key_units + value_units) * sizeof(unit) + 128)) return false;
        keys = cache.take(places * key_units), values = cache.take(places * value_units);
        return true;
    }

    void forward(int64_t rows, const int32_t* ids, const int32_t* slots, const int32_t* positions, int64_t outputs,
                 const int32_t* output_rows, float* logits, int threads) override {
        resize(rows);
#pragma omp parallel num_threads(threads)
        {
            int me = omp_get_thread_num(), all = omp_get_num_threads();
            for (int64_t r = me; r < rows; r += all) embed(ids[r], positions[r], &x[r * shape.width]);
            barrier.wait(all);
            for (int64_t layer = 0; layer < shape.layers; layer++) {
                const Block& block = blocks[layer];
                normed(block.attention_norm, rows, nullptr, me, all);
                linear(wide, rows, block.qkv, y.data(), row_width(), false, me, all);
                for (int64_t i = me; i < rows * (shape.heads + 2 * shape.kv_heads); i += all)
                    place_head(block, layer, i, slots, positions);
                barrier.wait(all);
                attention(layer, rows, slots, positions, me, all);
                linear(wide, rows, block.out, x.data(), shape.width, true, me, all);
                normed(block.mlp_norm, rows, nullptr, me, all);
                linear(wide, rows, block.up, y.data(), up_width(), false, me, all);
                for (int64_t r = me; r < rows; r += all) activate(r);
                barrier.wait(all);
                linear(deep, rows, block.down, x.data(), shape.width, true, me, all);
            }
            normed(norm, outputs, output_rows, me, all);
            linear(wide, outputs, head, logits, shape.vocab, false, me, all);
        }
    }

   private:
    void resize(int64_t rows) {
        x.resize(rows * shape.width);
        y.resize(rows * std::max(row_width(), up_width()));
        hidden.resize(rows * std::max({shape.hidden, shape.width, shape.heads * shape.head_width}));
        wide.resize(rows, std::max(shape.width, shape.heads * shape.head_width));
        deep.resize(rows, shape.hidden);
    }

    void embed(int64_t id, int64_t position, float* out) const {
        const float *token = embedding + id * shape.width, *where = position_embedding + position * shape.width;
        for (int64_t c = 0; c < shape.width; c++) out[c] = token[c] + (shape.learned ? where[c] : 0.0f);
    }

    // The norm of the residual stream as input of a product; `chosen` picks rows (null: all of them).
    void normed(const Norm& n, int64_t rows, const int32_t* chosen, int me, int all) {
        for (int64_t r = me; r < rows; r += all) {
            float* out = &hidden[r * shape.width];
            n.apply(&x[(chosen ? chosen[r] : r) * shape.width], out);
            wide.set(r, out, shape.width);
        }
        barrier.wait(all);
    }

    void linear(const Input<T>& in, int64_t rows, const Matrix<T>& m, float* out, int64_t width, bool add, int me, int all) {
        int64_t panels = m.panels();
        product(in, rows, m, panels * me / all, panels * (me + 1) / all, [&](int64_t row, int64_t first, vector sum) {
            float* to = out + row * width + first;
            if (first + LANES <= m.outputs) {
                if (!m.bias.empty()) sum += *(const vector*)&m.bias[first];
                *(vector*)to = add ? *(const vector*)to + sum : sum;
            } else {
                for (int64_t i = 0; i < m.outputs - first; i++)
                    to[i] = (add ? to[i] : 0.0f) + sum[i] + (m.bias.empty() ? 0.0f : m.bias[first + i]);
            }
        });
        barrier.wait(all);
    }

    // One head of one row after its projection: normed, turned, and (keys and values) written into the cache.
    void place_head(const Block& block, int64_t layer, int64_t item, const int32_t* slots, const int32_t* positions) {
        int64_t per_row = shape.heads + 2 * shape.kv_heads, row = item / per_row, h = item % per_row, D = shape.head_width;
        float* data = &y[row * row_width() + h * D];
        int64_t position = positions[row];
        bool key = h >= shape.heads, value = h >= shape.heads + shape.kv_heads;
        if (!value) {
            if (shape.qk_norm) (key ? block.k_norm : block.q_norm).apply(data, data);
            if (shape.rope) turn(data, position);
        }
        if (!key) return;
        int64_t at = place(layer, slots[row], (h - shape.heads) % shape.kv_heads);
        if (value) {
            A* to = (A*)(values + at * value_units);
            int64_t panel = value_units / divided_up(D, LANES) * PER_UNIT<A>;
            int64_t within = position / PER_UNIT<A> * LANES * PER_UNIT<A> + position % PER_UNIT<A>;
            for (int64_t d = 0; d < D; d++) store(to[d / LANES * panel + within + d % LANES * PER_UNIT<A>], data[d]);
        } else {
            A* to = (A*)(keys + at * key_units + (position / LANES * query_steps()) * LANES + position % LANES);
            for (int64_t d = 0; d < D; d++) store(to[d / PER_UNIT<A> * LANES * PER_UNIT<A> + d % PER_UNIT<A>], data[d]);
        }
    }

    void turn(float* data, int64_t position) const {
        int64_t half = shape.head_width / 2;
        const float *c = cosines + position * half, *s = sines + position * half;
        for (int64_t d = 0; d < half; d++) {
            float low = data[d], high = data[d + half];
            data[d] = low * c[d] - high * s[d];
            data[d + half] = high * c[d] + low * s[d];
        }
    }

    void attention(int64_t layer, int64_t rows, const int32_t* slots, const int32_t* positions, int me, int all) {
        int64_t D = shape.head_width;
        static thread_local std::vector<float> scores, mixed;
        static thread_local std::vector<unit> query, weight;
        scores.resize(divided_up(shape.context, LANES) * LANES);
        mixed.resize(divided_up(D, LANES) * LANES);
        query.assign(query_steps(), 0);
        weight.resize(scores.size());
        for (int64_t item = me; item < rows * shape.heads; item += all) {
            int64_t row = item / shape.heads, h = item % shape.heads;
            int64_t at = place(layer, slots[row], h * shape.kv_heads / shape.heads), seen = positions[row] + 1;
            convert(&y[row * row_width() + h * D], (A*)query.data(), D);
            score(query.data(), keys + at * key_units, seen, scores.data());
            soften(scores.data(), seen, (A*)weight.data());
            mix(weight.data(), values + at * value_units, seen, mixed.data());
            std::memcpy(&hidden[row * shape.heads * D + h * D], mixed.data(), D * sizeof(float));
        }
        barrier.wait(all);
        for (int64_t r = me; r < rows; r += all) wide.set(r, &hidden[r * shape.heads * D], shape.heads * D);
        barrier.wait(all);
    }

    void score(const unit* query, const unit* from, int64_t seen, float* out) const {
        int64_t panel = query_steps() * LANES, panels = divided_up(seen, LANES), p = 0;
        auto some = [&](auto count) {
            constexpr int W = decltype(count)::value;
            for (; p + W <= panels; p += W) {
                vector sums[1][W];
                tile<A, 1, W>(query, 0, from + p * panel, panel, query_steps(), sums);
                for (int w = 0; w < W; w++) *(vector*)(out + (p + w) * LANES) = sums[0][w];
            }
        };
        some(std::integral_constant<int, 8>());
        some(std::integral_constant<int, 1>());
    }

    // Softmax of scores / sqrt(D), its sum divided out at once; beyond `seen` up to a whole unit, zero.
    void soften(float* scores, int64_t seen, A* out) const {
        float most = -std::numeric_limits<float>::infinity(), total = 0, scale = LOG2_E / std::sqrt(float(shape.head_width));
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < seen; i++) most = std::max(most, scores[i]);
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < seen; i++) total += scores[i] = power_of_two((scores[i] - most) * scale);
        float share = 1.0f / total;
#pragma omp simd
        for (int64_t i = 0; i < seen; i++) scores[i] *= share;
        for (int64_t i = seen; i % PER_UNIT<A>; i++) scores[i] = 0;
        convert(scores, out, divided_up(seen, PER_UNIT<A>) * PER_UNIT<A>);
    }

    void mix(const unit* weight, const unit* from, int64_t seen, float* out) const {
        int64_t panels = divided_up(shape.head_width, LANES), stride = value_units / panels, p = 0;
        int64_t steps = divided_up(seen, PER_UNIT<A>);
        auto some = [&](auto count) {
            constexpr int W = decltype(count)::value;
            for (; p + W <= panels; p += W) {
                vector sums[1][W];
                tile<A, 1, W>(weight, 0, from + p * stride, stride, steps, sums);
                for (int w = 0; w < W; w++) *(vector*)(out + (p + w) * LANES) = sums[0][w];
            }
        };
        some(std::integral_constant<int, 4>());
        some(std::integral_constant<int, 1>());
    }

    void activate(int64_t r) {
        const float* in = &y[r * up_width()];
        float* out = &hidden[r * shape.hidden];
        if (shape.gated) {
            const float* value = in + shape.hidden;
#pragma omp simd
            for (int64_t c = 0; c < shape.hidden; c++) out[c] = silu(in[c]) * value[c];
        } else {
#pragma omp simd
            for (int64_t c = 0; c < shape.hidden; c++) out[c] = gelu(in[c]);
        }
        deep.set(r, out, shape.hidden);
    }
};

// ── the choice of a token ──

struct Wish {  // as decode.py passes it, one a row
    float temperature, top_p, min_p, penalty, uniform;
    int32_t top_k, alternatives;  // alternatives: -1 for no log probabilities at all
    int32_t history, edits;       // how many of the ids and of the changes that follow one another are this row's
};

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Greatest of numbers that are all finite or -infinity; +infinity or NaN where one is not.
inline float greatest(const float* x, int64_t count) {
    float most = NEVER;
    int32_t broken = 0;
#pragma omp simd reduction(max : most) reduction(| : broken)
    for (int64_t i = 0; i < count; i++) {
        most = std::max(most, x[i]);
        broken |= !(x[i] <= std::numeric_limits<float>::max());
    }
    return broken ? std::numeric_limits<float>::quiet_NaN() : most;
}

// A bound from above downwards, doubling its distance from 0, until `enough(bound)`.
template <class Enough>
float lowered(Enough enough) {
    for (float bound = -1.0f; bound > -256.0f; bound *= 2)
        if (enough(bound)) return bound;
    return std::numeric_limits<float>::lowest();
}

int64_t count_at_least(const float* x, int64_t count, float bound) {
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) total += x[i] >= bound;
    return total;
}

std::vector<int32_t> at_least(const float* x, int64_t count, float bound) {
    constexpr int64_t PART = 128;  // most parts hold none
    std::vector<int32_t> found;
    for (int64_t first = 0; first < count; first += PART) {
        int64_t size = std::min(PART, count - first);
        if (!count_at_least(x + first, size, bound)) continue;
        for (int64_t i = first; i < first + size; i++)
            if (x[i] >= bound) found.push_back(int32_t(i));
    }
    return found;
}

// The `wanted` greatest of numbers whose greatest is `most`, in order.
void most_likely(const float* x, int64_t vocab, float most, int64_t wanted, int32_t* best) {
    float below = lowered([&](float bound) { return count_at_least(x, vocab, most + bound) >= wanted; });
    std::vector<int32_t> found = at_least(x, vocab, most + below);
    std::partial_sort_copy(found.begin(), found.end(), best, best + wanted,
                           [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
}

// What transformers does, in its order: penalty, temperature, top-k, top-p, min-p, draw. x [vocab] is overwritten.
class Choice {
    float* x;
    int64_t vocab;
    std::vector<float>& powers;

   public:
    Choice(float* x, int64_t vocab, std::vector<float>& powers) : x(x), vocab(vocab), powers(powers) { powers.resize(vocab); }

    void penalize(const int32_t* ids, int64_t count, float penalty) {
        std::vector<int32_t> once(ids, ids + count);
        std::sort(once.begin(), once.end());
        once.erase(std::unique(once.begin(), once.end()), once.end());
        for (int32_t id : once) x[id] = x[id] > 0 ? x[id] / penalty : x[id] * penalty;
    }

    int64_t argmax(float most) const { return std::find(x, x + vocab, most) - x; }

    // x := (x - most) / temperature, so that the most likely token is at 0.
    void scale(float most, float temperature) {
        float inverse = 1.0f / std::min(std::max(temperature, 1e-30f), 1e30f);
#pragma omp simd
        for (int64_t i = 0; i < vocab; i++) x[i] = std::max((x[i] - most) * inverse, std::numeric_limits<float>::lowest());
    }

    void keep_top_k(int64_t k) {
        if (k >= vocab) return;
        float below = lowered([&](float bound) { return count_at_least(x, vocab, bound) >= k; });
        std::vector<int32_t> found = at_least(x, vocab, below);
        std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), [&](int32_t a, int32_t b) { return x[a] > x[b]; });
        drop_below(x[found[k - 1]]);
    }

    void keep_top_p(float p) {
        double wanted = p * mass(NEVER);
        std::vector<int32_t> found = at_least(x, vocab, lowered([&](float bound) { return mass(bound) >= wanted; }));
        std::sort(found.begin(), found.end(), [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
        double before = 0;
        size_t kept = 0;
        while (kept < found.size() && (kept == 0 || before < wanted)) before += power_of_two(x[found[kept++]] * LOG2_E);
        float last = x[found[kept - 1]];
        for (size_t i = kept; i < found.size() && x[found[i]] == last; i++) x[found[i]] = NEVER;
        drop_below(last);
    }

    void drop_below(float bound) {
#pragma omp simd
        for (int64_t i = 0; i < vocab; i++) x[i] = x[i] < bound ? NEVER : x[i];
    }

    // Where the cumulative distribution passes `uniform` of its sum.
    int64_t draw(float uniform) {
        constexpr int64_t PART = 256;
        float* out = powers.data();
#pragma omp simd
        for (int64_t i = 0; i < vocab; i++) out[i] = power_of_two(x[i] * LOG2_E);
        auto part = [&](int64_t first) {
            float sum = 0;
            int64_t end = std::min(first + PART, vocab);
#pragma omp simd reduction(+ : sum)
            for (int64_t i = first; i < end; i++) sum += powers[i];
            return double(sum);
        };
        double total = 0, passed = 0;
        for (int64_t first = 0; first < vocab; first += PART) total += part(first);
        double target = uniform * total;
        int64_t first = 0, last = 0;
        for (; first + PART < vocab && passed + part(first) <= target; first += PART) passed += part(first);
        for (int64_t i = first; i < vocab; i++) {
            if (powers[i] > 0) last = i;
            if ((passed += powers[i]) > target) return i;
        }
        if (powers[last] > 0) return last;
        return argmax(0.0f);  // rounding went past the end of a part with nothing after it
    }

   private:
    double mass(float bound) const {
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < vocab; i++) total += x[i] >= bound ? power_of_two(x[i] * LOG2_E) : 0.0f;
        return total;
    }
};

float log_of_sum(const float* x, int64_t count, float most) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) total += power_of_two((x[i] - most) * LOG2_E);
    return most + std::log(total);
}

// The chosen id, or -1 for logits that are not numbers.
int64_t choose(float* x, int64_t vocab, const Wish& wish, const int32_t* history, const int32_t* edited, const float* edits,
               float* log_probability, int32_t* best, float* best_log, std::vector<float>& raw, std::vector<float>& powers) {
    float most = greatest(x, vocab);
    if (!std::isfinite(most)) return -1;
    bool told = wish.alternatives >= 0;
    float sum = 0;
    if (told) {
        raw.assign(x, x + vocab);
        sum = log_of_sum(x, vocab, most);
    }
    if (wish.alternatives > 0) most_likely(x, vocab, most, wish.alternatives, best);
    for (int32_t n = 0; n < wish.alternatives; n++) best_log[n] = x[best[n]] - sum;
    for (int32_t i = 0; i < wish.edits; i++) x[edited[i]] += edits[i];
    Choice choice(x, vocab, powers);
    if (wish.penalty != 1.0f) choice.penalize(history, wish.history, wish.penalty);
    if (wish.edits || wish.penalty != 1.0f) most = greatest(x, vocab);
    if (!std::isfinite(most)) return -1;
    int64_t id;
    if (wish.temperature == 0.0f) {
        id = choice.argmax(most);
    } else {
        choice.scale(most, wish.temperature);
        if (wish.top_k > 0) choice.keep_top_k(wish.top_k);
        if (wish.top_p < 1.0f) choice.keep_top_p(wish.top_p);
        if (wish.min_p > 0.0f) choice.drop_below(std::log(wish.min_p));
        id = choice.draw(wish.uniform);
    }
    if (told) *log_probability = raw[id] - sum;
    return id;
}

}  // namespace

extern "C" {

// type: 0 float, 1 bfloat16, 2 int8. Null when memory is lacking. `tensors` as decode.py orders them; embeddings and
// tables among them are read later, the rest is copied.
void* smalllm_decoder(int32_t type, const int64_t* shape, const float* const* tensors) {
    Shape given;
    std::memcpy(&given, shape, sizeof given);
    auto built = [&](auto* decoder) -> Model* {
        if (decoder->build(given, tensors)) return decoder;
        delete decoder;
        return nullptr;
    };
    switch (type) {
        case 0: return built(new Decoder<float>);
        case 1: return built(new Decoder<bfloat16>);
        default: return built(new Decoder<int8_t>);
    }
}

void smalllm_decoder_free(void* decoder) { delete (Model*)decoder; }

// Rows take their positions in their slots' caches; logits [outputs, vocab] of the rows in `output_rows`.
void smalllm_forward(void* decoder, int64_t rows, const int32_t* ids, const int32_t* slots, const int32_t* positions,
                     int64_t outputs, const int32_t* output_rows, float* logits, int32_t threads) {
    ((Model*)decoder)->forward(rows, ids, slots, positions, outputs, output_rows, logits, threads);
}

// Of each row of logits [rows, vocab], which are overwritten: its id, -1 where they are not numbers; where the wish asks,
// the log probability of that id and the `most` most likely ids with theirs [rows, most].
void smalllm_choose(float* logits, int64_t rows, int64_t vocab, const int32_t* forbidden, int64_t forbidden_count,
                    const int32_t* wishes, const int32_t* histories, const int32_t* edited, const float* edits, int32_t* ids, float* log_probabilities, int32_t* best,
                    float* best_logs, int32_t most, int32_t threads) {
    std::vector<Wish> wish(rows);
    std::memcpy(wish.data(), wishes, rows * sizeof(Wish));
    std::vector<int64_t> history(rows + 1), edit(rows + 1);
    for (int64_t r = 0; r < rows; r++) history[r + 1] = history[r] + wish[r].history, edit[r + 1] = edit[r] + wish[r].edits;
#pragma omp parallel for schedule(static, 1) num_threads(std::min<int64_t>(threads, rows))
    for (int64_t r = 0; r < rows; r++) {
        static thread_local std::vector<float> raw, powers;
        for (int64_t i = 0; i < forbidden_count; i++) logits[r * vocab + forbidden[i]] = NEVER;
        ids[r] = int32_t(choose(logits + r * vocab, vocab, wish[r], histories + history[r], edited + edit[r], edits + edit[r],
                                log_probabilities + r, best + r * most, best_logs + r * most, raw, powers));
    }
}
}
