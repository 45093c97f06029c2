// Attention that also yields what every key received, for float32 and bfloat16 on the CPU, and for
// entries of int8.
//
// Plain C++ behind a C interface: no PyTorch headers, so that it compiles in seconds and does not
// depend on the version of PyTorch. GCC and Clang vector types serve every instruction set.
//
// Prefill. A block of BLOCK queries lies across the vector lanes. Both products are then the same
// small matrix kernel (`multiply`): scores[key][lane] = sum_d K[key][d] Q[d][lane], and
// out[d][lane] = sum_key V[key][d] P[key][lane]. Keys come in tiles, which are packed once for
// several blocks; maximum, sum and output of the softmax are carried from tile to tile, lane by lane.
// A key's column sum needs the final maximum and sum of each query, so a block whose queries are
// observed keeps its weights of all visible keys (BLOCK * n floats), each tile's against the maximum of
// its time, and goes over them once more at its end: cheaper than computing Q K^T twice. Everything
// else stays in the caches near a core, however long the prompt.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;  // 16 registers hold 4 x 3 accumulators
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int COLS = 3, BLOCK = COLS * LANES;
constexpr int64_t TILE = 128;  // keys whose scores, K and V share the caches near a core
constexpr int64_t SIDE = 2;    // blocks of queries that share a packed tile
constexpr int64_t STRETCH = 64;  // keys whose V stays in the first-level cache for a group of heads

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

constexpr float INF = std::numeric_limits<float>::infinity();

// --- numbers -------------------------------------------------------------------------------------

struct bfloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
    bfloat16& operator=(float x) {  // rounded to nearest, ties to even
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        bits = x != x ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
        return *this;
    }
};

static inline vec load(const float* p) { return *(const loose*)p; }
static inline vec load(const bfloat16* p) {
    return (vec)(__builtin_convertvector(*(const halves*)p, ivec) << 16);
}
static inline vec load(const int8_t* p) {
#if defined(__AVX512F__)  // GCC 12 would convert each half of the vector by itself
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    return __builtin_convertvector(*(const bytes*)p, vec);
#endif
}
static inline void store(float* p, vec x) { *(loose*)p = x; }
static inline vec max(vec a, vec b) { return a > b ? a : b; }

static inline float sum(vec x) {
    // Halving within the vector.
#if defined(__AVX512F__)  // by shuffles; GCC 12 would go through memory
    return _mm512_reduce_add_ps((__m512)x);
#else
    float lane[LANES];
    store(lane, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
#endif
}

// e^x for x <= 0 to about 2 ulp: 2^k e^r with |r| <= ln(2)/2 and the Taylor series of e^r up to
// r^7 / 7!; 0 where the result would be denormal, so also for -inf.
static inline vec exp(vec x) {
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    vec shifted = x * 1.44269504f + magic;
    vec k = shifted - magic;
    vec r = x - k * 0.693359375f + k * 2.12194440e-4f;  // ln 2 in two parts (Cody and Waite)
    vec p = r * (1.f / 5040) + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    p = (vec)((ivec)p + ((ivec)shifted << 23));
    return x < -87.f ? vec{} : p;
}

// An entry of int8 has its numbers, from -127 to 127, and behind them the float that they are times.
template <class K>
constexpr bool IS_INT8 = std::is_same<K, int8_t>::value;
template <class K>
constexpr int64_t BEHIND = IS_INT8<K> ? sizeof(float) : 0;

template <class K>
static inline float scale_of(const K* entry, int64_t dim) {
    float scale = 1;
    if (IS_INT8<K>) std::memcpy(&scale, entry + dim, sizeof scale);
    return scale;
}

// Write the vector of a new entry.
template <class T>
static inline void write(const T* x, int64_t dim, T* entry) {
    std::copy_n(x, dim, entry);
}
template <class T>
static inline void write(const T* x, int64_t dim, int8_t* entry) {
    float top = 0, odd = 0;
    for (int64_t d = 0; d < dim; d++) {
        top = std::max(top, std::fabs(float(x[d])));
        odd += float(x[d]) * 0;  // NaN if any is no number, and then all are to be
    }
    const float scale = top / 127 + odd;
    for (int64_t d = 0; d < dim; d++)
        entry[d] = scale > 0 ? int8_t(std::nearbyint(float(x[d]) / scale)) : 0;
    std::memcpy(entry + dim, &scale, sizeof scale);
}

struct Strides {  // in elements; the last dimension is dense
    int64_t batch, head, token;
};

struct Shape {
    int64_t batch, heads, kv_heads, queries, keys, dim, value_dim, observe;
};

enum Kind { FLOAT, HALF, INT8 };  // of what is read; queries beside INT8 are floats

// --- prefill -------------------------------------------------------------------------------------

// What the products are of: floats, or pairs of bfloat16 where the processor multiplies both and
// adds them to a float in one instruction. Two elements of what is summed over make a pair.
template <class T>
struct Operand {
    typedef float type;
};
#if defined(__AVX512BF16__)
typedef uint32_t pair;
template <>
struct Operand<bfloat16> {
    typedef pair type;
};
static inline void add_product(vec& acc, pair a, const pair* b) {
    acc = (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a),
                                (__m512bh)_mm512_loadu_si512(b));
}
#endif
static inline void add_product(vec& acc, float a, const float* b) { acc += a * load(b); }

// How many elements are summed over at a time.
template <class E>
constexpr int64_t SUMMED = std::is_same<E, float>::value ? 1 : 2;

template <class T>
static inline void pack(float& to, const T* first, const T*) {
    to = *first;
}
static inline void pack(uint32_t& to, const bfloat16* first, const bfloat16* second) {
    to = first->bits | (second ? uint32_t(second->bits) << 16 : 0);
}

// acc[i][:] += sum_t a[i * row + t * step] * b[t * BLOCK + :], the accumulators in registers.
template <int R, class E>
static inline __attribute__((always_inline)) void multiply(
    vec (&acc)[R][COLS], const E* a, int64_t row, int64_t step, const E* b, int64_t depth) {
    for (int64_t t = 0; t < depth; t++, a += step, b += BLOCK)
        for (int i = 0; i < R; i++)
            for (int c = 0; c < COLS; c++) add_product(acc[i][c], a[i * row], b + c * LANES);
}

template <int R, class E>
static inline __attribute__((always_inline)) void score_rows(const E* k, int64_t depth,
                                                             const E* query, float scale,
                                                             float* scores, vec (&top)[COLS]) {
    vec acc[R][COLS] = {};
    multiply<R>(acc, k, depth, 1, query, depth);
    for (int i = 0; i < R; i++)
        for (int c = 0; c < COLS; c++) {
            acc[i][c] *= scale;
            top[c] = max(top[c], acc[i][c]);
            store(scores + i * BLOCK + c * LANES, acc[i][c]);
        }
}

template <int R, class E>
static inline __attribute__((always_inline)) void add_values(const E* v, int64_t step,
                                                             int64_t depth, const E* p,
                                                             float* out) {
    vec acc[R][COLS];
    for (int i = 0; i < R; i++)
        for (int c = 0; c < COLS; c++) acc[i][c] = load(out + i * BLOCK + c * LANES);
    multiply<R>(acc, v, 1, step, p, depth);
    for (int i = 0; i < R; i++)
        for (int c = 0; c < COLS; c++) store(out + i * BLOCK + c * LANES, acc[i][c]);
}

// Keys and values of a tile, laid out for the products; K: as they are held.
template <class T, class K>
struct Tile {
    typedef typename Operand<T>::type E;
    int64_t dim, value_dim, depth;
    std::vector<E> keys, values;

    Tile(int64_t dim, int64_t value_dim)
        : dim(dim), value_dim(value_dim), depth((dim + SUMMED<E> - 1) / SUMMED<E>),
          keys(TILE * depth), values(TILE * value_dim) {}

    void read(const int8_t* k, int64_t k_step, const int8_t* v, int64_t v_step, int64_t size) {
        const auto widen = [&](const int8_t* entry, int64_t width, float* to) {
            const float scale = scale_of(entry, width);
            for (int64_t d = 0; d < width; d++) to[d] = entry[d] * scale;
        };
        for (int64_t j = 0; j < size; j++, k += k_step, v += v_step) {
            widen(k, dim, &keys[j * dim]);
            widen(v, value_dim, &values[j * value_dim]);
        }
    }

    void read(const T* k, int64_t k_step, const T* v, int64_t v_step, int64_t size) {
        for (int64_t j = 0; j < size; j++, k += k_step)
            for (int64_t t = 0; t < depth; t++) {
                const int64_t d = t * SUMMED<E>;
                pack(keys[j * depth + t], k + d, d + 1 < dim ? k + d + 1 : nullptr);
            }
        for (int64_t j = 0; j < size; j += SUMMED<E>)
            for (int64_t d = 0; d < value_dim; d++) {
                const T* first = v + j * v_step + d;
                pack(values[j / SUMMED<E> * value_dim + d], first,
                     j + 1 < size ? first + v_step : nullptr);
            }
    }
};

// The weights of a tile as the second product takes them: where they are, or rounded to pairs.
static inline const float* as_operand(const float* weights, int64_t, std::vector<float>&) {
    return weights;
}
static inline const uint32_t* as_operand(const float* weights, int64_t size,
                                         std::vector<uint32_t>& pairs) {
    pairs.resize(TILE / 2 * BLOCK);
    for (int64_t j = 0; j < size; j += 2)
        for (int c = 0; c < BLOCK; c += LANES) {
            const float* row = weights + j * BLOCK + c;
            const ivec first = (ivec)load(row) + 0x8000;
            const ivec second = j + 1 < size ? (ivec)load(row + BLOCK) + 0x8000 : ivec{};
            store((float*)&pairs[j / 2 * BLOCK + c],
                  (vec)((first >> 16 & 0xffff) | (second & ~0xffff)));
        }
    return pairs.data();
}

// A block of queries of one head on its way through the keys.
template <class T, class K>
struct Block {
    typedef typename Operand<T>::type E;
    int64_t count, visible, keys;  // queries; keys of the first of them; of the last
    bool keeps;                    // whether anybody asks what keys receive
    vec top[COLS], total[COLS];    // of the softmax so far
    float* weights;                // [keys or TILE][BLOCK], each tile's against its row of `tops`
    std::vector<float> tops, out;  // [tile][BLOCK], [value_dim][BLOCK]
    std::vector<E> query, rounded;

    // `count` queries from `q` on, the first of which sees `visible` keys and each further one more.
    // `sink`: a logit that takes part in the softmax and has no value; -inf: none.
    void begin(const T* q, int64_t step, int64_t count_, int64_t visible_, bool keeps_, float sink,
               const Tile<T, K>& tile) {
        count = count_, visible = visible_, keys = visible + count - 1, keeps = keeps_;
        query.assign(tile.depth * BLOCK, 0);
        for (int64_t i = 0; i < count; i++, q += step)
            for (int64_t t = 0; t < tile.depth; t++) {
                const int64_t d = t * SUMMED<E>;
                pack(query[t * BLOCK + i], q + d, d + 1 < tile.dim ? q + d + 1 : nullptr);
            }
        for (int c = 0; c < COLS; c++) top[c] = vec{} + sink, total[c] = vec{} + float(sink > -INF);
        out.assign(tile.value_dim * BLOCK, 0);
        tops.clear();
    }

    // Attend the tile's keys, the first of which is key `from`.
    __attribute__((always_inline)) void attend(const Tile<T, K>& tile, int64_t from, float scale) {
        if (from >= keys) return;
        const int64_t size = std::min(TILE, keys - from), depth = tile.depth;
        const int64_t free = std::min(size, visible - from);  // keys that all of these queries see
        float* p = weights + (keeps ? from * BLOCK : 0);
        vec before[COLS];
        for (int c = 0; c < COLS; c++) before[c] = top[c];
        int64_t j = 0;
        for (; j + ROWS <= free; j += ROWS)
            score_rows<ROWS>(&tile.keys[j * depth], depth, query.data(), scale, p + j * BLOCK, top);
        for (; j < size; j++) {  // the diagonal, row by row
            vec unmasked[COLS] = {};
            float* row = p + j * BLOCK;
            score_rows<1>(&tile.keys[j * depth], depth, query.data(), scale, row, unmasked);
            if (j >= free) std::fill_n(row, j + from - visible + 1, -INF);
            for (int c = 0; c < COLS; c++) top[c] = max(top[c], load(row + c * LANES));
        }
        rescale(before);
        for (j = 0; j < size; j++)
            for (int c = 0; c < COLS; c++) {
                float* weight = p + j * BLOCK + c * LANES;
                const vec e = exp(load(weight) - top[c]);
                total[c] += e;
                store(weight, e);
            }
        const E *b = as_operand(p, size, rounded), *v = tile.values.data();
        const int64_t rows = (size + SUMMED<E> - 1) / SUMMED<E>, value_dim = tile.value_dim;
        int64_t d = 0;
        for (; d + ROWS <= value_dim; d += ROWS)
            add_values<ROWS>(v + d, value_dim, rows, b, &out[d * BLOCK]);
        for (; d < value_dim; d++) add_values<1>(v + d, value_dim, rows, b, &out[d * BLOCK]);
    }

    // Sums that were made against lower maxima.
    void rescale(const vec (&before)[COLS]) {
        for (int c = 0; c < COLS; c++) {
            float now[LANES], then[LANES];
            store(now, top[c]), store(then, before[c]);
            tops.insert(tops.end(), now, now + LANES);
            if (!std::memcmp(now, then, sizeof now)) continue;
            const vec factor = exp(before[c] - top[c]);
            total[c] *= factor;
            for (size_t d = c * LANES; d < out.size(); d += BLOCK)
                store(&out[d], load(&out[d]) * factor);
        }
    }

    // The output, and what keys receive: from the queries after `first_observed`, each by `decay` to
    // the power of how many come after it, `after` the last of these.
    void end(T* o, int64_t step, float* received, int64_t first_observed, float decay,
             int64_t after) {
        float norm[BLOCK];
        for (int c = 0; c < COLS; c++) store(norm + c * LANES, 1.f / total[c]);
        const int64_t value_dim = out.size() / BLOCK;
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < value_dim; d++) o[i * step + d] = out[d * BLOCK + i] * norm[i];
        if (!keeps) return;
        for (int64_t i = 0; i < BLOCK; i++)
            if (i < first_observed || i >= count)
                norm[i] = 0;
            else if (decay != 1)
                norm[i] *= std::pow(decay, float(after + count - 1 - i));
        for (int64_t from = 0; from < keys; from += TILE) {
            vec factor[COLS];
            for (int c = 0; c < COLS; c++)
                factor[c] = load(norm + c * LANES) *
                            exp(load(&tops[from / TILE * BLOCK + c * LANES]) - top[c]);
            for (int64_t j = from; j < std::min(from + TILE, keys); j++) {
                vec share{};
                for (int c = 0; c < COLS; c++)
                    share += factor[c] * load(weights + j * BLOCK + c * LANES);
                received[j] += sum(share);
            }
        }
    }
};

// Sums of several lists each, in a fixed order, so that results do not depend on timing.
static void reduce_received(const std::vector<float>& partial, int64_t lists, int64_t keys,
                            float* received) {
    for (size_t i = 0; i < partial.size(); i++)
        received[i / (lists * keys) * keys + i % keys] += partial[i];
}

template <class T, class K>
static void scored_prefill(const T* query, const K* key, const K* value, T* out, float* received,
                           const float* sinks, const Shape& shape, const Strides* strides,
                           float scale, int threads, float decay) {
    const Strides sq = strides[0], sk = strides[1], sv = strides[2], so = strides[3];
    const int64_t group = shape.heads / shape.kv_heads, rows = shape.batch * shape.kv_heads;
    // The blocks of all heads of a group, in the order of their queries. Few key heads: each is
    // shared out over several tasks, which take its blocks in turn, so that all have about the same
    // area of the causal triangle.
    const int64_t blocks = (shape.queries + BLOCK - 1) / BLOCK * group;
    const int64_t split = (8 * threads + rows - 1) / rows;
    const int64_t observed = shape.queries - shape.observe;  // the first of them
    const int64_t kept = shape.observe ? std::max(TILE, shape.keys) : TILE;
    std::vector<float> partial(shape.observe ? rows * split * shape.keys : 0);
#pragma omp parallel num_threads(threads)
    {
        Tile<T, K> tile(shape.dim, shape.value_dim);
        Block<T, K> side[SIDE];
        std::unique_ptr<float, decltype(&std::free)> weights(
            (float*)std::aligned_alloc(64, SIDE * kept * BLOCK * 4), &std::free);
        for (int64_t s = 0; s < SIDE; s++) side[s].weights = weights.get() + s * kept * BLOCK;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < rows * split; task++) {
            const int64_t b = task / split / shape.kv_heads, g = task / split % shape.kv_heads;
            const K* k = key + b * sk.batch + g * sk.head;
            const K* v = value + b * sv.batch + g * sv.head;
            for (int64_t n = task % split * SIDE; n < blocks; n += split * SIDE) {
                const int64_t together = std::min(SIDE, blocks - n);
                const auto head = [&](int64_t s) { return g * group + (n + s) % group; };
                const auto first = [&](int64_t s) { return (n + s) / group * BLOCK; };
                for (int64_t s = 0; s < together; s++) {
                    const int64_t count = std::min<int64_t>(BLOCK, shape.queries - first(s));
                    side[s].begin(query + b * sq.batch + head(s) * sq.head + first(s) * sq.token,
                                  sq.token, count, shape.keys - shape.queries + first(s) + 1,
                                  first(s) + count > observed, sinks ? sinks[head(s)] : -INF, tile);
                }
                const int64_t keys = side[together - 1].keys;
                for (int64_t from = 0; from < keys; from += TILE) {
                    tile.read(k + from * sk.token, sk.token, v + from * sv.token, sv.token,
                              std::min(TILE, keys - from));
                    for (int64_t s = 0; s < together; s++) side[s].attend(tile, from, scale);
                }
                for (int64_t s = 0; s < together; s++)
                    side[s].end(out + b * so.batch + head(s) * so.head + first(s) * so.token,
                                so.token, partial.data() + task * shape.keys,
                                std::max<int64_t>(0, observed - first(s)), decay,
                                shape.queries - first(s) - side[s].count);
            }
        }
    }
    reduce_received(partial, split, shape.keys, received);
}

extern "C" void buzz_scored_prefill(const void* query, const void* key, const void* value,
                                    void* out, float* received, const float* sinks,
                                    const Shape* shape, const Strides* strides, float scale,
                                    int threads, int kind, float decay) {
    if (kind == INT8)
        scored_prefill((const float*)query, (const int8_t*)key, (const int8_t*)value, (float*)out,
                       received, sinks, *shape, strides, scale, threads, decay);
    else if (kind == HALF)
        scored_prefill((const bfloat16*)query, (const bfloat16*)key, (const bfloat16*)value,
                       (bfloat16*)out, received, sinks, *shape, strides, scale, threads, decay);
    else
        scored_prefill((const float*)query, (const float*)key, (const float*)value, (float*)out,
                       received, sinks, *shape, strides, scale, threads, decay);
}

// --- decoding ------------------------------------------------------------------------------------

// Heads of a group that read an entry together: it is loaded, and widened, once for all of them. With
// less than 32 registers their accumulators would lie in memory.
constexpr int TOGETHER = LANES == 16 ? 4 : 1;

template <class F>
static inline void in_parts(int64_t group, const F& attend) {
    for (int64_t h = 0; h < group; h += TOGETHER)
        switch (std::min<int64_t>(TOGETHER, group - h)) {
            case 1: attend(std::integral_constant<int, 1>(), h); break;
            case 2: attend(std::integral_constant<int, 2>(), h); break;
            case 3: attend(std::integral_constant<int, 3>(), h); break;
            default: attend(std::integral_constant<int, TOGETHER>(), h);
        }
}

// p[h * step] = scale * sum_d q[h][d] k[d] for H heads.
template <int H, class K>
static inline void dot(const float* q, const K* k, int64_t size, float scale, float* p,
                       int64_t step) {
    vec acc[H][4] = {};
    int64_t d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES)
        for (int c = 0; c < 4; c++) {
            const vec own = load(k + d + c * LANES);
            for (int h = 0; h < H; h++) acc[h][c] += load(q + h * size + d + c * LANES) * own;
        }
    for (; d + LANES <= size; d += LANES) {
        const vec own = load(k + d);
        for (int h = 0; h < H; h++) acc[h][0] += load(q + h * size + d) * own;
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
        float total = sum((acc[h][0] + acc[h][1]) + (acc[h][2] + acc[h][3]));
        for (int64_t rest = d; rest < size; rest++) total += q[h * size + rest] * k[rest];
        p[h * step] = scale * total;
    }
}

// In place and over whole vectors (the tail must hold -inf); leaves p unnormalised, returns 1 / sum.
// `sink`: a logit more, -inf: none.
static float softmax(float* p, int64_t padded, float sink) {
    vec top = load(p), total{};
    for (int64_t j = LANES; j < padded; j += LANES) top = max(top, load(p + j));
    float highest = std::max(sink, top[0]);
    for (int i = 1; i < LANES; i++) highest = std::max(highest, top[i]);
    for (int64_t j = 0; j < padded; j += LANES) {
        vec e = exp(load(p + j) - highest);
        total += e;
        store(p + j, e);
    }
    return 1.f / (sum(total) + (sink > -INF ? std::exp(sink - highest) : 0.f));
}

// out[h][0:C*LANES] += sum_j p[h * padded + j] v[j][0:C*LANES] for H heads, the accumulators in registers.
template <int H, int C, class K>
static inline __attribute__((always_inline)) void add_weighted(const float* p, int64_t padded,
                                                               const K* v, int64_t step,
                                                               int64_t keys, float* out,
                                                               int64_t width) {
    vec acc[H][C];
    for (int h = 0; h < H; h++)
        for (int c = 0; c < C; c++) acc[h][c] = load(out + h * width + c * LANES);
    for (int64_t j = 0; j < keys; j++)
        for (int c = 0; c < C; c++) {
            const vec own = load(v + j * step + c * LANES);
            for (int h = 0; h < H; h++) acc[h][c] += p[h * padded + j] * own;
        }
    for (int h = 0; h < H; h++)
        for (int c = 0; c < C; c++) store(out + h * width + c * LANES, acc[h][c]);
}

// One query of each head of a group, all of which share the `keys` entries from k and v on; what those
// receive is added to `share` (nullptr: nobody asks). `sinks`: of the group's heads, or nullptr.
template <class T, class K>
static void decode_group(const T* q, const K* k, const K* v, T* o, float* share,
                         const float* sinks, int64_t group, int64_t keys, float scale, Strides sq,
                         Strides sk, Strides sv, Strides so, const Shape& shape) {
    const int64_t padded = (keys + LANES - 1) / LANES * LANES, width = shape.value_dim;
    std::vector<float> p(group * padded, -INF), wide(group * (shape.dim + width), 0.f);
    float* out = &wide[group * shape.dim];
    for (int64_t h = 0; h < group; h++)
        for (int64_t d = 0; d < shape.dim; d++) wide[h * shape.dim + d] = q[h * sq.head + d];
    for (int64_t j = 0; j < keys; j++, k += sk.token) {
        const float own = scale * scale_of(k, shape.dim);
        in_parts(group, [&](auto heads, int64_t h) {
            dot<heads>(&wide[h * shape.dim], k, shape.dim, own, &p[h * padded + j], padded);
        });
    }
    for (int64_t h = 0; h < group; h++) {
        float* row = &p[h * padded];
        const float norm = softmax(row, padded, sinks ? sinks[h] : -INF);
        for (int64_t j = 0; j < keys; j++) row[j] *= norm;
        for (int64_t j = 0; share && j < keys; j++) share[j] += row[j];
    }
    for (int64_t j = 0; IS_INT8<K> && j < keys; j++) {
        const float own = scale_of(v + j * sv.token, width);
        for (int64_t h = 0; h < group; h++) p[h * padded + j] *= own;
    }
    for (int64_t t = 0; t < keys; t += STRETCH)
        in_parts(group, [&](auto heads, int64_t h) {
            const float* row = &p[h * padded + t];
            const K* values = v + t * sv.token;
            const int64_t size = std::min(STRETCH, keys - t), step = sv.token;
            float* mixed = out + h * width;
            int64_t d = 0;
            for (; d + 4 * LANES <= width; d += 4 * LANES)
                add_weighted<heads, 4>(row, padded, values + d, step, size, mixed + d, width);
            for (; d + LANES <= width; d += LANES)
                add_weighted<heads, 1>(row, padded, values + d, step, size, mixed + d, width);
            for (; d < width; d++)
                for (int i = 0; i < heads; i++)
                    for (int64_t j = 0; j < size; j++)
                        mixed[i * width + d] += row[i * padded + j] * values[j * step + d];
        });
    for (int64_t h = 0; h < group; h++)
        for (int64_t d = 0; d < width; d++) o[h * so.head + d] = out[h * width + d];
}

// One query a head. A task is one row and key head: K and V pass once for its group of queries.
// A row that holds less than the longest begins at its entry of `starts`.
template <class T, class K>
static void scored_decode(const T* query, const K* key, const K* value, T* out, float* received,
                          const float* sinks, const int64_t* starts, const Shape& shape,
                          const Strides* strides, float scale, int threads) {
    const Strides sq = strides[0], sk = strides[1], sv = strides[2], so = strides[3];
    const int64_t group = shape.heads / shape.kv_heads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < shape.batch * shape.kv_heads; task++) {
        const int64_t b = task / shape.kv_heads, g = task % shape.kv_heads;
        const int64_t start = starts ? starts[b] : 0, keys = shape.keys - start;
        if (keys <= 0) continue;
        decode_group(query + b * sq.batch + g * group * sq.head,
                     key + b * sk.batch + g * sk.head + start * sk.token,
                     value + b * sv.batch + g * sv.head + start * sv.token,
                     out + b * so.batch + g * group * so.head,
                     received + task * shape.keys + start, sinks ? sinks + g * group : nullptr,
                     group, keys, scale, sq, sk, sv, so, shape);
    }
}

extern "C" void buzz_scored_decode(const void* query, const void* key, const void* value,
                                   void* out, float* received, const float* sinks,
                                   const int64_t* starts, const Shape* shape,
                                   const Strides* strides, float scale, int threads, int kind) {
    if (kind == INT8)
        scored_decode((const float*)query, (const int8_t*)key, (const int8_t*)value, (float*)out,
                      received, sinks, starts, *shape, strides, scale, threads);
    else if (kind == HALF)
        scored_decode((const bfloat16*)query, (const bfloat16*)key, (const bfloat16*)value,
                      (bfloat16*)out, received, sinks, starts, *shape, strides, scale, threads);
    else
        scored_decode((const float*)query, (const float*)key, (const float*)value, (float*)out,
                      received, sinks, starts, *shape, strides, scale, threads);
}

// A token of one row and key head: the new entry is written into slot `end - 1`, then attended with all
// others from `start` on; scores (nullptr: nobody asks) grow by what was received, or become it.
template <class T, class K>
static void step_head(const T* query, const T* key, const T* value, K* keys, K* values,
                      int32_t* positions, float* scores, T* out, const float* sinks, int64_t start,
                      int64_t end, int64_t token, bool adds, int64_t group, float scale, Strides sq,
                      Strides sk, Strides sv, Strides so, const Shape& shape) {
    const int64_t slot = end - 1;
    write(key, shape.dim, keys + slot * sk.token);
    write(value, shape.value_dim, values + slot * sv.token);
    positions[slot] = token;
    if (scores) std::fill(scores + (adds ? slot : start), scores + end, 0.f);
    decode_group<T, K>(query, keys + start * sk.token, values + start * sv.token, out,
                    scores ? scores + start : nullptr, sinks, group, end - start, scale, sq, sk, sv,
                    so, shape);
}

// A decoding step in one call.
// bounds: [3][batch], first slot, one past the last, index of the new token.
// least: multiplications that are worth waking other threads for.
template <class T, class K>
static void decode_step(const T* query, const T* key, const T* value, K* keys, K* values,
                        int32_t* positions, float* scores, T* out, const int64_t* bounds,
                        const float* sinks, const Shape& shape, const Strides* strides, float scale,
                        int adds, int threads, int64_t least) {
    const Strides sq = strides[0], nk = strides[1], nv = strides[2], sk = strides[3],
                  sv = strides[4], sp = strides[5], ss = strides[6], so = strides[7];
    const int64_t group = shape.heads / shape.kv_heads, tasks = shape.batch * shape.kv_heads;
    const int64_t held = bounds[shape.batch] - bounds[0];
    if (shape.batch * shape.heads * held * shape.dim <= least) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t b = task / shape.kv_heads, g = task % shape.kv_heads;
        step_head(query + b * sq.batch + g * group * sq.head, key + b * nk.batch + g * nk.head,
                  value + b * nv.batch + g * nv.head, keys + b * sk.batch + g * sk.head,
                  values + b * sv.batch + g * sv.head, positions + b * sp.batch + g * sp.head,
                  scores ? scores + b * ss.batch + g * ss.head : nullptr,
                  out + b * so.batch + g * group * so.head, sinks ? sinks + g * group : nullptr,
                  bounds[b], bounds[shape.batch + b], bounds[2 * shape.batch + b], adds, group,
                  scale, sq, sk, sv, so, shape);
    }
}

extern "C" void buzz_step(const void* query, const void* key, const void* value, void* keys,
                          void* values, int32_t* positions, float* scores, void* out,
                          const int64_t* bounds, const float* sinks, const Shape* shape,
                          const Strides* strides, float scale, int adds, int threads, int kind,
                          int64_t least) {
    if (kind == INT8)
        decode_step((const float*)query, (const float*)key, (const float*)value, (int8_t*)keys,
                    (int8_t*)values, positions, scores, (float*)out, bounds, sinks, *shape, strides,
                    scale, adds, threads, least);
    else if (kind == HALF)
        decode_step((const bfloat16*)query, (const bfloat16*)key, (const bfloat16*)value,
                    (bfloat16*)keys, (bfloat16*)values, positions, scores, (bfloat16*)out, bounds,
                    sinks, *shape, strides, scale, adds, threads, least);
    else
        decode_step((const float*)query, (const float*)key, (const float*)value, (float*)keys,
                    (float*)values, positions, scores, (float*)out, bounds, sinks, *shape, strides,
                    scale, adds, threads, least);
}

// A row whose entries lie in buffers of its own, dense [kv_heads][capacity][...].
struct Row {
    void *keys, *values;
    int32_t* positions;
    float* scores;
    int64_t capacity, start, end, token, adds, int8;
};

// A decoding step of rows that each have buffers and a length of their own.
template <class T>
static void step_rows(const T* query, const T* key, const T* value, T* out, const float* sinks,
                      const Row* rows, const Shape& shape, const Strides* strides, float scale,
                      int threads) {
    const Strides sq = strides[0], nk = strides[1], nv = strides[2], so = strides[3];
    const int64_t group = shape.heads / shape.kv_heads;
    const auto attend = [&](const Row& row, int64_t b, int64_t g, auto* keys, auto* values) {
        const int64_t slots = g * row.capacity, behind = BEHIND<std::decay_t<decltype(*keys)>>;
        const Strides sk{0, 0, shape.dim + behind}, sv{0, 0, shape.value_dim + behind};
        step_head(query + b * sq.batch + g * group * sq.head, key + b * nk.batch + g * nk.head,
                  value + b * nv.batch + g * nv.head, keys + slots * sk.token,
                  values + slots * sv.token, row.positions + slots,
                  row.scores ? row.scores + slots : nullptr,
                  out + b * so.batch + g * group * so.head, sinks ? sinks + g * group : nullptr,
                  row.start, row.end, row.token, row.adds, group, scale, sq, sk, sv, so, shape);
    };
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < shape.batch * shape.kv_heads; task++) {
        const int64_t b = task / shape.kv_heads, g = task % shape.kv_heads;
        const Row& row = rows[b];
        if (row.int8)
            attend(row, b, g, (int8_t*)row.keys, (int8_t*)row.values);
        else
            attend(row, b, g, (T*)row.keys, (T*)row.values);
    }
}

extern "C" void buzz_step_rows(const void* query, const void* key, const void* value, void* out,
                               const float* sinks, const Row* rows, const Shape* shape,
                               const Strides* strides, float scale, int threads, int half) {
    if (half)
        step_rows((const bfloat16*)query, (const bfloat16*)key, (const bfloat16*)value,
                  (bfloat16*)out, sinks, rows, *shape, strides, scale, threads);
    else
        step_rows((const float*)query, (const float*)key, (const float*)value, (float*)out, sinks,
                  rows, *shape, strides, scale, threads);
}

// Vectors, each as a dense entry of int8.
extern "C" void buzz_quantized(const void* from, int8_t* entries, const Shape* shape,
                               const Strides* strides, int threads, int half) {
    const int64_t heads = shape->kv_heads, keys = shape->keys, dim = shape->dim;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < shape->batch * heads * keys; n++) {
        const int64_t at = n / keys / heads * strides->batch + n / keys % heads * strides->head +
                           n % keys * strides->token;
        int8_t* to = entries + n * (dim + BEHIND<int8_t>);
        half ? write((const bfloat16*)from + at, dim, to) : write((const float*)from + at, dim, to);
    }
}

// --- moving --------------------------------------------------------------------------------------

struct Moved {  // one buffer with a row per entry; strides in bytes
    const char* source;
    char* target;
    int64_t source_batch, source_head, source_slot, target_batch, target_head, target_slot, size;
};

// Keys that are turned from how they came, and not step by step: dense [rows, heads, count, ...].
struct Leading {
    const char* source;
    const int64_t* positions;  // that each of them is rotated to
    const float* frequencies;  // [half]
    int64_t count, position;   // that the first of them moves to
};

// Cosine and sine of `steps` times each frequency. The quarter turns are taken off in double
// precision, so that angles of any size are as exact as small ones; the rest, within a quarter of pi,
// by the Taylor series up to r^8 / 8! and r^9 / 9!.
static void angles(double steps, const float* frequencies, int64_t half, float* cosine,
                   float* sine) {
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        const double magic = 6755399441055744., angle = steps * frequencies[j];  // 1.5 * 2^52
        const double shifted = angle * 0.63661977236758134 + magic, quarters = shifted - magic;
        const float r = angle - quarters * 1.5707963267948966, r2 = r * r;
        const int32_t quadrant = int32_t(int64_t(quarters) & 3);
        const float c =
            1 + r2 * (-1.f / 2 + r2 * (1.f / 24 + r2 * (-1.f / 720 + r2 * (1.f / 40320))));
        const float s = r + r * r2 *
                    (-1.f / 6 + r2 * (1.f / 120 + r2 * (-1.f / 5040 + r2 * (1.f / 362880))));
        cosine[j] = (quadrant & 1 ? s : c) * ((quadrant + 1) & 2 ? -1.f : 1.f);
        sine[j] = (quadrant & 1 ? c : s) * (quadrant & 2 ? -1.f : 1.f);
    }
}

// Pairs of a key, in the precision of cosine and sine.
template <class T, class F>
static void turn(const T* __restrict x, T* __restrict y, const F* __restrict cosine,
                 const F* __restrict sine, int64_t half, int interleaved) {
    const auto pairs = [&](int64_t first, int64_t second) {
        for (int64_t j = 0; j < half; j++) {
            const F p = float(x[j * first]), q = float(x[j * first + second]);
            y[j * first] = p * cosine[j] - q * sine[j];
            y[j * first + second] = q * cosine[j] + p * sine[j];
        }
    };
    interleaved ? pairs(2, 1) : pairs(1, half);
}

// What moves between the buffers of one store, or of two: dense index [batch][heads][count].
struct Move {
    const Moved* tensors;  // keys, values and whatever lies beside them
    const int64_t *index, *rows;
    const double *cosine, *sine;
    Leading leading;
    int64_t n_tensors, batch, heads, count, to, shift, half;
};

// Row `to + i` of the target <- row `index[i]` of the source, for keys (tensors[0], turned by row
// `shift + i - index[i]` of the table) and whatever lies beside them, in runs of neighbours. From the
// last entry to the first: within one buffer, index[i] <= to + i, so that no row is overwritten before
// it was read. Turned in double precision: a key can move a hundred thousand times, and must not
// shrink by it.
template <class T>
static void move_head(const Move& move, int64_t task, int interleaved) {
    const int64_t b = move.rows ? move.rows[task / move.heads] : task / move.heads;
    const int64_t h = task % move.heads, half = move.half, *index = move.index + task * move.count;
    const Leading& leading = move.leading;
    std::vector<float> turns(leading.count ? 2 * half : 0);
    const auto source = [&](const Moved& m, int64_t slot) {
        return m.source + b * m.source_batch + h * m.source_head + slot * m.source_slot;
    };
    const auto target = [&](const Moved& m, int64_t slot) {
        return m.target + b * m.target_batch + h * m.target_head + slot * m.target_slot;
    };
    const Moved& keys = move.tensors[0];
    for (int64_t end = move.count, begin; end > 0; end = begin) {
        for (begin = end - 1; begin > 0 && index[begin - 1] + 1 == index[begin];) begin--;
        const int64_t steps = move.shift + begin - index[begin];
        const bool turned = move.cosine && steps;
        for (int64_t t = 0; t < move.n_tensors; t++) {
            const Moved& m = move.tensors[t];
            const char* from = source(m, index[begin]);
            char* to = target(m, move.to + begin);
            if (from == to || (!t && turned)) continue;
            if (m.source_slot == m.size && m.target_slot == m.size)
                std::memmove(to, from, (end - begin) * m.size);
            else
                for (int64_t i = end - begin - 1; i >= 0; i--)
                    std::memmove(to + i * m.target_slot, from + i * m.source_slot, m.size);
        }
        for (int64_t i = end - 1; i >= begin && turned; i--) {
            const char* from = source(keys, index[i]);
            char* to = target(keys, move.to + i);
            if (from == to) continue;
            if (2 * half * int64_t(sizeof(T)) != keys.size) std::memmove(to, from, keys.size);
            turn((const T*)from, (T*)to, move.cosine + steps * half, move.sine + steps * half, half,
                 interleaved);
        }
    }
    for (int64_t i = 0; i < std::min(leading.count, move.count); i++) {
        const int64_t own = task * leading.count + i;
        const char* came = leading.source + own * keys.size;
        char* to = target(keys, move.to + i);
        std::memcpy(to, came, keys.size);
        angles(leading.position + i - leading.positions[own], leading.frequencies, half,
               turns.data(), turns.data() + half);
        turn((const T*)came, (T*)to, turns.data(), turns.data() + half, half, interleaved);
    }
}

extern "C" void buzz_move(const Move* moves, int64_t n_moves, int interleaved, int threads,
                          int is_half) {
    std::vector<std::pair<const Move*, int64_t>> tasks;
    for (const Move* move = moves; move < moves + n_moves; move++)
        for (int64_t task = 0; task < move->batch * move->heads; task++)
            tasks.emplace_back(move, task);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size_t n = 0; n < tasks.size(); n++)
        (is_half ? move_head<bfloat16> : move_head<float>)(*tasks[n].first, tasks[n].second,
                                                           interleaved);
}

// Rows `first + index[i]` of keys, and position + index[i]; of those that were known before,
// [batch, heads, n_known, ...], what was known. Dense results; sizes in bytes.
extern "C" void buzz_originals(const char* keys, const int64_t* index, const int64_t* rows,
                               const char* known, const int64_t* known_positions, char* out,
                               int64_t* positions, int64_t batch, int64_t heads, int64_t count,
                               int64_t n_known, int64_t first, int64_t position, int64_t of_batch,
                               int64_t of_head, int64_t of_slot, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        const char* own = keys + rows[task / heads] * of_batch + task % heads * of_head;
        for (int64_t i = 0; i < count; i++) {
            const int64_t from = index[task * count + i], to = task * count + i;
            const bool is_known = from < n_known;
            std::memcpy(out + to * size,
                        is_known ? known + (task * n_known + from) * size
                                 : own + (first + from) * of_slot,
                        size);
            positions[to] = is_known ? known_positions[task * n_known + from] : position + from;
        }
    }
}
