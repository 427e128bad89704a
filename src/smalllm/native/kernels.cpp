// The inner loops of a GPT step between its matrix products, for CPUs: norms, activations, attention, cross-entropy.
//
// T is the type of activations: float, or bfloat16 with sums in float. Every loop over rows or heads is divided among
// threads so that no sum depends on which thread was faster. Attention takes each document apart, packed into a core's own
// cache, and never visits keys after a tile's queries (Dao et al., FlashAttention, arXiv 2205.14135, without its online
// softmax: a tile's scores fit).

#include <vector>

#include "vectors.h"

namespace {

using std::int32_t;
using std::int64_t;

// ── residual sum and norm ──

template <class T>
void add_norm_forward(const float* x, const T* delta, const float* weight, const float* bias, float* sum, T* y,
                      float* statistics, int64_t rows, int64_t width, bool centre, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float* in = x + row * width;
        float* s = sum + row * width;
        float total = 0, square = 0;
        if (delta) {
            const T* d = delta + row * width;
#pragma omp simd reduction(+ : total)
            for (int64_t c = 0; c < width; c++) total += s[c] = in[c] + load(d[c]);
        } else {
#pragma omp simd reduction(+ : total)
            for (int64_t c = 0; c < width; c++) total += s[c] = in[c];
        }
        float mean = centre ? total / width : 0.0f;
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < width; c++) square += (s[c] - mean) * (s[c] - mean);
        float inverse = 1.0f / std::sqrt(square / width + eps);
        T* out = y + row * width;
        if (bias) {
#pragma omp simd
            for (int64_t c = 0; c < width; c++) store(out[c], (s[c] - mean) * inverse * weight[c] + bias[c]);
        } else {
#pragma omp simd
            for (int64_t c = 0; c < width; c++) store(out[c], (s[c] - mean) * inverse * weight[c]);
        }
        statistics[2 * row] = mean;
        statistics[2 * row + 1] = inverse;
    }
}

// weight_slope holds [threads, 2, width]: what each thread's rows give for weight and bias.
template <class T>
void add_norm_backward(const T* y_slope, const float* sum_slope, const float* sum, const float* weight,
                       const float* statistics, float* x_slope, T* delta_slope, float* weight_slope, int64_t rows,
                       int64_t width, bool centre, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < threads; part++) {
        float* of_weight = weight_slope + part * 2 * width;
        float* of_bias = of_weight + width;
        std::fill(of_weight, of_weight + 2 * width, 0.0f);
        for (int64_t row = rows * part / threads; row < rows * (part + 1) / threads; row++) {
            const T* dy = y_slope + row * width;
            const float* s = sum + row * width;
            float mean = statistics[2 * row], inverse = statistics[2 * row + 1];
            float along = 0, total = 0;
#pragma omp simd reduction(+ : along, total)
            for (int64_t c = 0; c < width; c++) {
                float slope = load(dy[c]), unit = (s[c] - mean) * inverse;
                of_weight[c] += slope * unit;
                of_bias[c] += slope;
                along += slope * weight[c] * unit;
                total += slope * weight[c];
            }
            along /= width;
            total = centre ? total / width : 0.0f;
            const float* ds = sum_slope ? sum_slope + row * width : nullptr;
            float* dx = x_slope + row * width;
            #pragma omp simd
            for (int64_t c = 0; c < width; c++) {
                float unit = (s[c] - mean) * inverse;
                dx[c] = (load(dy[c]) * weight[c] - total - unit * along) * inverse;
            }
            if (ds) {
#pragma omp simd
                for (int64_t c = 0; c < width; c++) dx[c] += ds[c];
            }
            if (delta_slope) convert(dx, delta_slope + row * width, width);
        }
    }
}

// ── activations ──

template <class T>
void swiglu_forward(const T* up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = up + 2 * row * width, *value = gate + width;
        T* y = out + row * width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
            store(y[c], silu(load(gate[c])) * load(value[c]));
        }
    }
}

template <class T>
void swiglu_backward(const T* slope, const T* up, T* up_slope, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = up + 2 * row * width, *value = gate + width, *dy = slope + row * width;
        T *dg = up_slope + 2 * row * width, *dv = dg + width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
            float g = load(gate[c]), d = load(dy[c]), open = 1.0f / (1.0f + exponential(-g));
            store(dv[c], d * g * open);
            store(dg[c], d * load(value[c]) * open * (1.0f + g * (1.0f - open)));
        }
    }
}

template <class T>
void gelu_forward(const T* x, T* y, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        store(y[i], gelu(load(x[i])));
    }
}

template <class T>
void gelu_backward(const T* slope, const T* x, T* x_slope, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float v = load(x[i]);
        float open = 1.0f / (1.0f + exponential(-2.0f * GELU_A * (v + GELU_B * v * v * v)));
        float inner = 2.0f * GELU_A * (1.0f + 3.0f * GELU_B * v * v);
        store(x_slope[i], load(slope[i]) * open * (1.0f + v * (1.0f - open) * inner));
    }
}

// ── cross-entropy ──

// Loss of each row of logits [rows, vocab] at its target (0 where the target is negative); with_slope overwrites the
// logits with softmax - one-hot (0 where the target is negative).
template <class T>
void cross_entropy(T* logits, const int64_t* targets, float* losses, int64_t rows, int64_t vocab, bool with_slope,
                   int threads) {
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> grown;
        grown.resize(std::max(grown.size(), size_t(vocab)));
        float* powers = grown.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            T* l = logits + row * vocab;
            int64_t target = targets[row];
            losses[row] = 0;
            if (target < 0) {
                if (with_slope) std::memset(l, 0, vocab * sizeof(T));
                continue;
            }
            float most = -std::numeric_limits<float>::infinity(), total = 0, wanted = load(l[target]);
#pragma omp simd reduction(max : most)
            for (int64_t c = 0; c < vocab; c++) most = std::max(most, load(l[c]));
#pragma omp simd reduction(+ : total)
            for (int64_t c = 0; c < vocab; c++) total += powers[c] = power_of_two((load(l[c]) - most) * LOG2_E);
            losses[row] = std::log(total) + (most - wanted);
            if (!with_slope) continue;
            float share = 1.0f / total;
#pragma omp simd
            for (int64_t c = 0; c < vocab; c++) powers[c] *= share;
            powers[target] -= 1.0f;
            convert(powers, l, vocab);
        }
    }
}

// ── small matrix products in a core's cache ──

template <class T>
constexpr int PER_UNIT = 4 / sizeof(T);

constexpr int ROWS = 4;       // of a register tile
constexpr int PANELS = 4;     // vectors of a register tile
constexpr int ALIGN = 16;     // positions are padded to multiples of this
constexpr int TILE = 32;      // queries (forward) or keys (backward) at a time
constexpr float UNSEEN = -1e30f;

// out [ROWS, W vectors] (+)= a b: a unit at a[row * a_row + step * a_step], a row of b at b[step * b_step].
template <class T, int W>
inline void register_tile(const unit* a, int64_t a_row, int64_t a_step, const unit* b, int64_t b_step, int64_t steps,
                          float* out, int64_t out_row, bool add) {
    vector sum[ROWS][W];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < W; w++) sum[r][w] = add ? *(const vector*)(out + r * out_row + w * LANES) : vector{};
    for (int64_t step = 0; step < steps; step++) {
        units row[W];
        for (int w = 0; w < W; w++) row[w] = *(const units*)(b + step * b_step + w * LANES);
        for (int r = 0; r < ROWS; r++) {
            unit value = a[r * a_row + step * a_step];
            for (int w = 0; w < W; w++) sum[r][w] = multiply_add<T>(sum[r][w], value, row[w]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < W; w++) *(vector*)(out + r * out_row + w * LANES) = sum[r][w];
}

// out [rows, columns] (+)= a b; rows a multiple of ROWS, columns of LANES.
template <class T>
void product(const unit* a, int64_t a_row, int64_t a_step, const unit* b, int64_t b_step, int64_t steps, float* out,
             int64_t out_row, int64_t rows, int64_t columns, bool add) {
    int64_t c = 0;
    for (; c + PANELS * LANES <= columns; c += PANELS * LANES)
        for (int64_t r = 0; r < rows; r += ROWS)
            register_tile<T, PANELS>(a + r * a_row, a_row, a_step, b + c, b_step, steps, out + r * out_row + c, out_row, add);
    for (; c < columns; c += LANES)
        for (int64_t r = 0; r < rows; r += ROWS)
            register_tile<T, 1>(a + r * a_row, a_row, a_step, b + c, b_step, steps, out + r * out_row + c, out_row, add);
}

// ── attention ──

struct Shape {
    int64_t heads, groups, width;  // groups: key/value heads; width: of a head
    float scale, eps;
    int64_t columns() const { return (heads + 2 * groups) * width; }
};

struct Inputs {
    const float *query_norm, *key_norm;  // [width], or null
    const float *cosine, *sine;          // [positions, width / 2], or null
    const int64_t* bounds;               // [documents + 1]: first rows of the documents, and the number of rows
    int64_t documents;
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t d = 0; d < documents; d++) most = std::max(most, bounds[d + 1] - bounds[d]);
        return most;
    }
};

inline int64_t pad(int64_t positions) { return (positions + ALIGN - 1) / ALIGN * ALIGN; }

// One query or key head at one position: normed (if weight) and rotated (if cosine) into out [width].
template <class T>
inline void prepare(const T* in, const float* weight, const float* cosine, const float* sine, int64_t width, float eps,
                    float* out) {
    float inverse = 1.0f;
    if (weight) {
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t d = 0; d < width; d++) square += load(in[d]) * load(in[d]);
        inverse = 1.0f / std::sqrt(square / width + eps);
    }
#pragma omp simd
    for (int64_t d = 0; d < width; d++) out[d] = load(in[d]) * inverse * (weight ? weight[d] : 1.0f);
    if (!cosine) return;
    int64_t half = width / 2;
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
        float low = out[d], high = out[d + half];
        out[d] = low * cosine[d] - high * sine[d];
        out[d + half] = high * cosine[d] + low * sine[d];
    }
}

// The slope of `prepare`: from that of its result (overwritten) to that of its input; adds to the norm weight's.
template <class T>
inline void prepare_backward(float* slope, const T* in, const float* weight, const float* cosine, const float* sine,
                             int64_t width, float eps, T* in_slope, float* weight_slope) {
    int64_t half = width / 2;
    if (cosine) {
#pragma omp simd
        for (int64_t d = 0; d < half; d++) {
            float low = slope[d], high = slope[d + half];
            slope[d] = low * cosine[d] + high * sine[d];
            slope[d + half] = high * cosine[d] - low * sine[d];
        }
    }
    if (!weight) {
        for (int64_t d = 0; d < width; d++) store(in_slope[d], slope[d]);
        return;
    }
    float square = 0, along = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < width; d++) square += load(in[d]) * load(in[d]);
    float inverse = 1.0f / std::sqrt(square / width + eps);
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < width; d++) {
        float unit_value = load(in[d]) * inverse;
        weight_slope[d] += slope[d] * unit_value;
        along += slope[d] * weight[d] * unit_value;
    }
    along /= width;
    for (int64_t d = 0; d < width; d++)
        store(in_slope[d], (slope[d] * weight[d] - load(in[d]) * inverse * along) * inverse);
}

// [row][unit along width] -> [unit along width][row]; rows a multiple of ALIGN.
inline void transpose(const unit* in, unit* out, int64_t rows, int64_t across) {
    for (int64_t first = 0; first < rows; first += ALIGN)
        for (int64_t u = 0; u < across; u++)
            for (int64_t r = first; r < first + ALIGN; r++) out[u * rows + r] = in[r * across + u];
}

// [row][column] -> [unit along rows][column]: bfloat16 of two rows become pairs.
inline void pair_rows(const float* in, unit* out, int64_t rows, int64_t width) { std::memcpy(out, in, rows * width * 4); }

inline void pair_rows(const bfloat16* in, unit* out, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows / 2; r++) {
        const bfloat16 *even = in + 2 * r * width, *odd = even + width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) out[r * width + c] = unit(uint32_t(even[c].bits) | uint32_t(odd[c].bits) << 16);
    }
}

// Grow-only memory of a thread, handed out in pieces, so that no step asks the system for pages.
struct Scratch {
    std::vector<float> memory;
    size_t used = 0;
    void reserve(size_t floats) {
        memory.resize(std::max(memory.size(), floats));
        used = 0;
    }
    template <class U>
    U* take(size_t count) {
        U* piece = (U*)(memory.data() + used);
        used += (count + 15) / 16 * 16;
        return piece;
    }
};

// A head's queries or keys of a document, prepared, in T [padded, width].
template <class T>
void load_head(const T* qkv, int64_t positions, int64_t head, const Shape& s, const float* norm, const Inputs& in, float* row,
               T* out) {
    for (int64_t t = 0; t < positions; t++) {
        const float* cosine = in.cosine ? in.cosine + t * s.width / 2 : nullptr;
        const float* sine = in.sine ? in.sine + t * s.width / 2 : nullptr;
        prepare(qkv + t * s.columns() + head * s.width, norm, cosine, sine, s.width, s.eps, row);
        convert(row, out + t * s.width, s.width);
    }
    std::memset(out + positions * s.width, 0, (pad(positions) - positions) * s.width * sizeof(T));
}

// Rows of width that stand stride apart -> [padded, width].
template <class T>
void load_plain(const T* in, int64_t positions, int64_t stride, int64_t width, T* out) {
    for (int64_t t = 0; t < positions; t++) std::memcpy(out + t * width, in + t * stride, width * sizeof(T));
    std::memset(out + positions * width, 0, (pad(positions) - positions) * width * sizeof(T));
}

// The slope of a head's prepared queries or keys, without the scale of the scores -> that of its columns of qkv.
template <class T>
void unload_head(float* slope, const T* qkv, int64_t positions, int64_t head, const Shape& s, const float* norm,
                 const Inputs& in, T* qkv_slope, float* norm_slope) {
    for (int64_t t = 0; t < positions; t++) {
        float* row = slope + t * s.width;
        for (int64_t d = 0; d < s.width; d++) row[d] *= s.scale;
        const int64_t place = t * s.columns() + head * s.width, angle = t * s.width / 2;
        prepare_backward(row, qkv + place, norm, in.cosine ? in.cosine + angle : nullptr, in.sine ? in.sine + angle : nullptr,
                         s.width, s.eps, qkv_slope + place, norm_slope);
    }
}

// Scores of one query against `count` keys, of which it sees `seen` -> powers in T, 0 where unseen, and their sum. ``scale``
// is that of the scores, times log2(e). (Rounded apart from the sum: GCC 12 adds wrongly where a loop also stores 16 bits.)
template <class T>
inline float softmax_row(float* scores, T* powers, int64_t seen, int64_t count, float scale, float* log_sum) {
    std::fill(scores + seen, scores + count, UNSEEN);
    float most = UNSEEN, total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < count; j++) most = std::max(most, scores[j]);
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; j++) total += scores[j] = power_of_two((scores[j] - most) * scale);
    convert(scores, powers, count);
    *log_sum = most * scale + std::log2(total);
    return total;
}

// qkv [rows, heads + 2 groups, width] -> y [rows, heads, width], log_sums [heads, rows] (in log2). A document and a
// key/value head at a time.
template <class T>
void attention_forward(const T* qkv, const Inputs& in, T* y, float* log_sums, const Shape& s, int threads) {
    const int64_t width = s.width, across = width / PER_UNIT<T>, share = s.heads / s.groups, rows = in.bounds[in.documents];
    const int64_t longest = pad(in.longest());
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        scratch.reserve(3 * longest * width + TILE * (2 * longest + width) + width + 256);
        float* line = scratch.take<float>(width);
        unit *queries = scratch.take<unit>(longest * width), *keys = scratch.take<unit>(longest * width);
        unit* values = scratch.take<unit>(longest * width);
        float *scores = scratch.take<float>(TILE * longest), *sums = scratch.take<float>(TILE * width);
        unit* powers = scratch.take<unit>(TILE * longest);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t d = 0; d < in.documents; d++)
            for (int64_t g = 0; g < s.groups; g++) {
                const int64_t begin = in.bounds[d], positions = in.bounds[d + 1] - begin, padded = pad(positions);
                const T* from = qkv + begin * s.columns();
                load_head(from, positions, s.heads + g, s, in.key_norm, in, line, (T*)queries);
                transpose(queries, keys, padded, across);
                load_plain(from + (s.heads + s.groups + g) * width, positions, s.columns(), width, (T*)queries);
                pair_rows((const T*)queries, values, padded, width);
                for (int64_t h = g * share; h < (g + 1) * share; h++) {
                    load_head(from, positions, h, s, in.query_norm, in, line, (T*)queries);
                    for (int64_t i = 0; i < positions; i += TILE) {
                        int64_t count = std::min<int64_t>(TILE, padded - i), real = std::min(count, positions - i);
                        int64_t seen = i + count;
                        product<T>(queries + i * across, across, 1, keys, padded, across, scores, seen, count, seen, false);
                        float totals[TILE];
                        for (int64_t r = 0; r < real; r++)
                            totals[r] = softmax_row(scores + r * seen, (T*)powers + r * seen, i + r + 1, seen, s.scale * LOG2_E,
                                                    log_sums + h * rows + begin + i + r);
                        std::memset((T*)powers + real * seen, 0, (count - real) * seen * sizeof(T));
                        product<T>(powers, seen / PER_UNIT<T>, 1, values, width, seen / PER_UNIT<T>, sums, width, count, width, false);
                        for (int64_t r = 0; r < real; r++) {
                            float inverse = 1.0f / totals[r];
#pragma omp simd
                            for (int64_t c = 0; c < width; c++) sums[r * width + c] *= inverse;
                            convert(sums + r * width, y + ((begin + i + r) * s.heads + h) * width, width);
                        }
                    }
                }
            }
    }
}

// P and dS of one key against `count` queries, of which the first `before` do not see it, in T. ``log_sums`` and ``scale``
// are in log2.
template <class T>
inline void slope_row(float* scores, float* slopes, T* out_powers, T* out_slopes, const float* log_sums, const float* deltas,
                      int64_t before, int64_t count, float scale) {
    std::fill(scores, scores + before, UNSEEN);
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        scores[i] = power_of_two(scores[i] * scale - log_sums[i]);
        slopes[i] = scores[i] * (slopes[i] - deltas[i]);
    }
    convert(scores, out_powers, count);
    convert(slopes, out_slopes, count);
}

// From the slope of y to that of qkv, and of the norm weights for each document and key/value head: [documents, groups, 2,
// width]. Scores are made again, a tile of keys against all queries that see it.
template <class T>
void attention_backward(const T* y_slope, const T* qkv, const T* y, const float* log_sums, const Inputs& in, T* qkv_slope,
                        float* norm_slopes, const Shape& s, int threads) {
    const int64_t width = s.width, across = width / PER_UNIT<T>, share = s.heads / s.groups, rows = in.bounds[in.documents];
    const int64_t longest = pad(in.longest()), size = longest * width;
    constexpr int P = PER_UNIT<T>;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        scratch.reserve(11 * size + TILE * longest * 5 + 2 * longest + width + 512);
        float *line = scratch.take<float>(width), *key_sum = scratch.take<float>(size);
        float *value_sum = scratch.take<float>(size), *query_sum = scratch.take<float>(size);
        unit *key_rows = scratch.take<unit>(size), *key_pairs = scratch.take<unit>(size), *value_rows = scratch.take<unit>(size);
        unit *query_across = scratch.take<unit>(size), *query_pairs = scratch.take<unit>(size);
        unit *out_across = scratch.take<unit>(size), *out_pairs = scratch.take<unit>(size), *loaded = scratch.take<unit>(size);
        float *scores = scratch.take<float>(TILE * longest), *slopes = scratch.take<float>(TILE * longest);
        unit *powers = scratch.take<unit>(TILE * longest), *slope_rows = scratch.take<unit>(TILE * longest);
        unit* slope_pairs = scratch.take<unit>(TILE * longest);
        float *deltas = scratch.take<float>(longest), *logs = scratch.take<float>(longest);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t d = 0; d < in.documents; d++)
            for (int64_t g = 0; g < s.groups; g++) {
                const int64_t begin = in.bounds[d], positions = in.bounds[d + 1] - begin, padded = pad(positions);
                const T* from = qkv + begin * s.columns();
                T* to = qkv_slope + begin * s.columns();
                float *query_norm_slope = norm_slopes + (d * s.groups + g) * 2 * width, *key_norm_slope = query_norm_slope + width;
                std::fill(query_norm_slope, query_norm_slope + 2 * width, 0.0f);
                load_head(from, positions, s.heads + g, s, in.key_norm, in, line, (T*)key_rows);
                pair_rows((const T*)key_rows, key_pairs, padded, width);
                load_plain(from + (s.heads + s.groups + g) * width, positions, s.columns(), width, (T*)value_rows);
                for (int64_t h = g * share; h < (g + 1) * share; h++) {
                    const bool add = h > g * share;
                    load_head(from, positions, h, s, in.query_norm, in, line, (T*)loaded);
                    transpose(loaded, query_across, padded, across);
                    pair_rows((const T*)loaded, query_pairs, padded, width);
                    load_plain(y_slope + (begin * s.heads + h) * width, positions, s.heads * width, width, (T*)loaded);
                    transpose(loaded, out_across, padded, across);
                    pair_rows((const T*)loaded, out_pairs, padded, width);
                    for (int64_t t = 0; t < padded; t++) {
                        float sum = 0;
                        const T *slope = (const T*)loaded + t * width, *out = y + ((begin + t) * s.heads + h) * width;
                        if (t < positions) {
#pragma omp simd reduction(+ : sum)
                            for (int64_t c = 0; c < width; c++) sum += load(slope[c]) * load(out[c]);
                        }
                        deltas[t] = sum;
                        logs[t] = t < positions ? log_sums[h * rows + begin + t] : 0;
                    }
                    std::fill(query_sum, query_sum + padded * width, 0.0f);
                    for (int64_t j = 0; j < positions; j += TILE) {
                        const int64_t count = std::min<int64_t>(TILE, padded - j), seen = padded - j;
                        product<T>(key_rows + j * across, across, 1, query_across + j, padded, across, scores, seen, count, seen, false);
                        product<T>(value_rows + j * across, across, 1, out_across + j, padded, across, slopes, seen, count, seen, false);
                        for (int64_t r = 0; r < count; r++)
                            slope_row(scores + r * seen, slopes + r * seen, (T*)powers + r * seen, (T*)slope_rows + r * seen,
                                      logs + j, deltas + j, j + r < positions ? r : seen, seen, s.scale * LOG2_E);
                        pair_rows((const T*)slope_rows, slope_pairs, count, seen);
                        const int64_t steps = seen / P, place = j / P * width;
                        product<T>(powers, steps, 1, out_pairs + place, width, steps, value_sum + j * width, width, count, width, add);
                        product<T>(slope_rows, steps, 1, query_pairs + place, width, steps, key_sum + j * width, width, count, width, add);
                        product<T>(slope_pairs, 1, seen, key_pairs + place, width, count / P, query_sum + j * width, width, seen, width, true);
                    }
                    unload_head(query_sum, from, positions, h, s, in.query_norm, in, to, query_norm_slope);
                }
                unload_head(key_sum, from, positions, s.heads + g, s, in.key_norm, in, to, key_norm_slope);
                for (int64_t t = 0; t < positions; t++)
                    convert(value_sum + t * width, to + t * s.columns() + (s.heads + s.groups + g) * width, width);
            }
    }
}

}  // namespace

// ── what Python calls: each in float and bfloat16 ──

#define EXPORT(T, suffix)                                                                                              \
    extern "C" void add_norm_forward_##suffix(const float* x, const T* delta, const float* weight, const float* bias,  \
                                              float* sum, T* y, float* statistics, int64_t rows, int64_t width,        \
                                              int centre, float eps, int threads) {                                    \
        add_norm_forward<T>(x, delta, weight, bias, sum, y, statistics, rows, width, centre, eps, threads);            \
    }                                                                                                                  \
    extern "C" void add_norm_backward_##suffix(const T* y_slope, const float* sum_slope, const float* sum,             \
                                               const float* weight, const float* statistics, float* x_slope,           \
                                               T* delta_slope, float* weight_slope, int64_t rows, int64_t width,       \
                                               int centre, int threads) {                                              \
        add_norm_backward<T>(y_slope, sum_slope, sum, weight, statistics, x_slope, delta_slope, weight_slope, rows,    \
                             width, centre, threads);                                                                  \
    }                                                                                                                  \
    extern "C" void swiglu_forward_##suffix(const T* up, T* out, int64_t rows, int64_t width, int threads) {           \
        swiglu_forward<T>(up, out, rows, width, threads);                                                              \
    }                                                                                                                  \
    extern "C" void swiglu_backward_##suffix(const T* slope, const T* up, T* up_slope, int64_t rows, int64_t width,    \
                                             int threads) {                                                            \
        swiglu_backward<T>(slope, up, up_slope, rows, width, threads);                                                 \
    }                                                                                                                  \
    extern "C" void gelu_forward_##suffix(const T* x, T* y, int64_t count, int threads) {                              \
        gelu_forward<T>(x, y, count, threads);                                                                         \
    }                                                                                                                  \
    extern "C" void gelu_backward_##suffix(const T* slope, const T* x, T* x_slope, int64_t count, int threads) {       \
        gelu_backward<T>(slope, x, x_slope, count, threads);                                                           \
    }                                                                                                                  \
    extern "C" void cross_entropy_##suffix(T* logits, const int64_t* targets, float* losses, int64_t rows,             \
                                           int64_t vocab, int with_slope, int threads) {                               \
        cross_entropy<T>(logits, targets, losses, rows, vocab, with_slope, threads);                                   \
    }                                                                                                                  \
    extern "C" void attention_forward_##suffix(const T* qkv, const float* query_norm, const float* key_norm,           \
                                               const float* cosine, const float* sine, const int64_t* bounds, T* y,    \
                                               float* log_sums, int64_t documents, int64_t heads, int64_t groups,      \
                                               int64_t width, float eps, int threads) {                                \
        Shape shape{heads, groups, width, 1.0f / std::sqrt(float(width)), eps};                                        \
        attention_forward<T>(qkv, {query_norm, key_norm, cosine, sine, bounds, documents}, y, log_sums, shape,         \
                             threads);                                                                                 \
    }                                                                                                                  \
    extern "C" void attention_backward_##suffix(                                                                       \
        const T* y_slope, const T* qkv, const T* y, const float* log_sums, const float* query_norm,                    \
        const float* key_norm, const float* cosine, const float* sine, const int64_t* bounds, T* qkv_slope,            \
        float* norm_slopes, int64_t documents, int64_t heads, int64_t groups, int64_t width, float eps, int threads) { \
        Shape shape{heads, groups, width, 1.0f / std::sqrt(float(width)), eps};                                        \
        attention_backward<T>(y_slope, qkv, y, log_sums, {query_norm, key_norm, cosine, sine, bounds, documents},      \
                              qkv_slope, norm_slopes, shape, threads);                                                 \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
