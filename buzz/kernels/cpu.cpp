// Attention that also yields what every key received, for float32 on the CPU.
//
// Plain C++ behind a C interface: no PyTorch headers, so that it compiles in seconds and does not
// depend on the version of PyTorch. GCC and Clang vector types serve every instruction set.
//
// Prefill. A block of BLOCK queries lies across the vector lanes. Both products are then the same
// small matrix kernel (`multiply`): scores[key][lane] = sum_d K[key][d] Q[d][lane], and
// out[d][lane] = sum_key V[key][d] P[key][lane]; K and V are read where they lie, and maximum,
// sum and normalisation of the softmax run lane by lane. One block keeps its scores of all visible
// keys (BLOCK * n floats a thread), because a key's column sum needs the final normaliser of each
// query: holding them is cheaper than computing Q K^T twice.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;  // 16 registers hold 4 x 3 accumulators
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int COLS = 3, BLOCK = COLS * LANES;
constexpr int64_t TILE = 64;  // keys whose P and V share the first-level cache

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr float INF = std::numeric_limits<float>::infinity();

static inline vec load(const float* p) { return *(const loose*)p; }
static inline void store(float* p, vec x) { *(loose*)p = x; }
static inline vec max(vec a, vec b) { return a > b ? a : b; }

static inline float sum(vec x) {
    // Halving within the vector; compilers turn it into shuffles.
    float lane[LANES];
    store(lane, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
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

// acc[i][:] += sum_t a[i * row + t * step] * b[t * BLOCK + :], the accumulators in registers.
template <int R>
static inline __attribute__((always_inline)) void multiply(
    vec (&acc)[R][COLS], const float* a, int64_t row, int64_t step, const float* b, int64_t depth) {
    for (int64_t t = 0; t < depth; t++, a += step, b += BLOCK) {
        vec lanes[COLS];
        for (int c = 0; c < COLS; c++) lanes[c] = load(b + c * LANES);
        for (int i = 0; i < R; i++)
            for (int c = 0; c < COLS; c++) acc[i][c] += a[i * row] * lanes[c];
    }
}

struct Strides {  // in elements; the last dimension is dense
    int64_t batch, head, token;
};

struct Shape {
    int64_t batch, heads, kv_heads, queries, keys, dim, value_dim, observe;
};

struct Scratch {
    std::unique_ptr<float, decltype(&std::free)> memory;
    float *scores, *query, *out;
    Scratch(int64_t keys, int64_t dim, int64_t value_dim)
        : memory((float*)std::aligned_alloc(64, (keys + dim + value_dim) * BLOCK * 4 / 64 * 64 + 64),
                 &std::free),
          scores(memory.get()),
          query(scores + keys * BLOCK),
          out(query + dim * BLOCK) {}
};

template <int R>
static void score_rows(const float* k, int64_t row, int64_t dim, const float* query, float* scores,
                       vec (&top)[COLS]) {
    vec acc[R][COLS] = {};
    multiply<R>(acc, k, row, 1, query, dim);
    for (int i = 0; i < R; i++)
        for (int c = 0; c < COLS; c++) {
            top[c] = max(top[c], acc[i][c]);
            store(scores + i * BLOCK + c * LANES, acc[i][c]);
        }
}

template <int R>
static void add_values(const float* v, int64_t step, int64_t keys, const float* p, float* out) {
    vec acc[R][COLS];
    for (int i = 0; i < R; i++)
        for (int c = 0; c < COLS; c++) acc[i][c] = load(out + i * BLOCK + c * LANES);
    multiply<R>(acc, v, 1, step, p, keys);
    for (int i = 0; i < R; i++)
        for (int c = 0; c < COLS; c++) store(out + i * BLOCK + c * LANES, acc[i][c]);
}

// `count` queries from `q` on, the first of which sees `visible` keys and each further one more.
// What keys receive from a query counts `decay` to the power of how many come after it: `after` the
// last of these.
static void attend_block(const float* q, const float* k, const float* v, float* out, float* received,
                         int64_t count, int64_t visible, int64_t first_observed, float scale,
                         float decay, int64_t after, Strides sq, Strides sk, Strides sv, Strides so, const Shape& shape,
                         Scratch& s) {
    const int64_t keys = visible + count - 1;
    std::memset(s.query, 0, shape.dim * BLOCK * 4);
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < shape.dim; d++)
            s.query[d * BLOCK + i] = q[i * sq.token + d] * scale;

    vec top[COLS], total[COLS] = {};
    for (int c = 0; c < COLS; c++) top[c] = vec{} - INF;
    int64_t j = 0;
    for (; j + ROWS <= visible; j += ROWS)
        score_rows<ROWS>(k + j * sk.token, sk.token, shape.dim, s.query, s.scores + j * BLOCK, top);
    for (; j < keys; j++) {  // the diagonal, row by row
        vec unmasked[COLS] = {};
        float* row = s.scores + j * BLOCK;
        score_rows<1>(k + j * sk.token, sk.token, shape.dim, s.query, row, unmasked);
        if (j >= visible) std::fill_n(row, j - visible + 1, -INF);
        for (int c = 0; c < COLS; c++) top[c] = max(top[c], load(row + c * LANES));
    }

    std::memset(s.out, 0, shape.value_dim * BLOCK * 4);
    for (int64_t t = 0; t < keys; t += TILE) {
        const int64_t size = std::min(TILE, keys - t);
        float* p = s.scores + t * BLOCK;
        for (j = 0; j < size; j++)
            for (int c = 0; c < COLS; c++) {
                vec e = exp(load(p + j * BLOCK + c * LANES) - top[c]);
                total[c] += e;
                store(p + j * BLOCK + c * LANES, e);
            }
        const float* tile = v + t * sv.token;
        int64_t d = 0;
        for (; d + ROWS <= shape.value_dim; d += ROWS)
            add_values<ROWS>(tile + d, sv.token, size, p, s.out + d * BLOCK);
        for (; d < shape.value_dim; d++)
            add_values<1>(tile + d, sv.token, size, p, s.out + d * BLOCK);
    }

    float norm[BLOCK];
    for (int c = 0; c < COLS; c++) store(norm + c * LANES, 1.f / total[c]);
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < shape.value_dim; d++)
            out[i * so.token + d] = s.out[d * BLOCK + i] * norm[i];

    if (count <= first_observed) return;
    for (int64_t i = 0; i < BLOCK; i++)
        if (i < first_observed || i >= count)
            norm[i] = 0;
        else if (decay != 1)
            norm[i] *= std::pow(decay, float(after + count - 1 - i));
    for (j = 0; j < keys; j++) {
        vec share{};
        for (int c = 0; c < COLS; c++)
            share += load(norm + c * LANES) * load(s.scores + j * BLOCK + c * LANES);
        received[j] += sum(share);
    }
}

// Sums of several lists each, in a fixed order, so that results do not depend on timing.
static void reduce_received(const std::vector<float>& partial, int64_t lists, int64_t per_head,
                            int64_t keys, float* received) {
    for (int64_t h = 0; h < lists / per_head; h++)
        for (int64_t i = 0; i < per_head; i++)
            for (int64_t j = 0; j < keys; j++)
                received[h * keys + j] += partial[(h * per_head + i) * keys + j];
}

extern "C" void buzz_scored_prefill(const float* query, const float* key, const float* value,
                                    float* out, float* received, const Shape* shape_,
                                    const Strides* strides, float scale, int threads,
                                    float decay) {
    const Shape shape = *shape_;
    const Strides sq = strides[0], sk = strides[1], sv = strides[2], so = strides[3];
    // Few heads: each is shared out over several tasks, which take its blocks in turn, so that
    // all have about the same area of the causal triangle.
    const int64_t rows = shape.batch * shape.heads;
    const int64_t split = (8 * threads + rows - 1) / rows;
    std::vector<float> partial(rows * split * shape.keys);
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(shape.keys, shape.dim, shape.value_dim);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < rows * split; task++) {
            const int64_t b = task / split / shape.heads, h = task / split % shape.heads;
            const int64_t g = h / (shape.heads / shape.kv_heads);
            const float* q = query + b * sq.batch + h * sq.head;
            float* o = out + b * so.batch + h * so.head;
            for (int64_t i = task % split * BLOCK; i < shape.queries; i += split * BLOCK) {
                const int64_t count = std::min<int64_t>(BLOCK, shape.queries - i);
                attend_block(q + i * sq.token, key + b * sk.batch + g * sk.head,
                             value + b * sv.batch + g * sv.head, o + i * so.token,
                             &partial[task * shape.keys], count,
                             shape.keys - shape.queries + i + 1,
                             std::max<int64_t>(0, shape.queries - shape.observe - i), scale, decay,
                             shape.queries - i - count, sq, sk, sv, so, shape, scratch);
            }
        }
    }
    reduce_received(partial, rows * split, split * shape.heads / shape.kv_heads, shape.keys,
                    received);
}

static inline float dot(const float* a, const float* b, int64_t size) {
    vec acc[4] = {};
    int64_t d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES)
        for (int c = 0; c < 4; c++) acc[c] += load(a + d + c * LANES) * load(b + d + c * LANES);
    for (; d + LANES <= size; d += LANES) acc[0] += load(a + d) * load(b + d);
    float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    for (; d < size; d++) total += a[d] * b[d];
    return total;
}

// In place and over whole vectors (the tail must hold -inf); leaves p unnormalised, returns 1 / sum.
static float softmax(float* p, int64_t padded) {
    vec top = load(p), total{};
    for (int64_t j = LANES; j < padded; j += LANES) top = max(top, load(p + j));
    float highest = top[0];
    for (int i = 1; i < LANES; i++) highest = std::max(highest, top[i]);
    for (int64_t j = 0; j < padded; j += LANES) {
        vec e = exp(load(p + j) - highest);
        total += e;
        store(p + j, e);
    }
    return 1.f / sum(total);
}

// out[0:C*LANES] += sum_j p[j] v[j][0:C*LANES], the accumulators in registers.
template <int C>
static void add_weighted(const float* p, const float* v, int64_t step, int64_t keys, float* out) {
    vec acc[C];
    for (int c = 0; c < C; c++) acc[c] = load(out + c * LANES);
    for (int64_t j = 0; j < keys; j++)
        for (int c = 0; c < C; c++) acc[c] += p[j] * load(v + j * step + c * LANES);
    for (int c = 0; c < C; c++) store(out + c * LANES, acc[c]);
}

// One query of each head of a group, all of which share the `keys` entries from k and v on; what those
// receive is added to `share` (nullptr: nobody asks).
static void decode_group(const float* q, const float* k, const float* v, float* o, float* share,
                         int64_t group, int64_t keys, float scale, Strides sq, Strides sk,
                         Strides sv, Strides so, const Shape& shape) {
    const int64_t padded = (keys + LANES - 1) / LANES * LANES;
    std::vector<float> p(group * padded, -INF);
    for (int64_t j = 0; j < keys; j++)
        for (int64_t h = 0; h < group; h++)
            p[h * padded + j] = scale * dot(q + h * sq.head, k + j * sk.token, shape.dim);
    for (int64_t h = 0; h < group; h++) {
        float* row = &p[h * padded];
        const float norm = softmax(row, padded);
        for (int64_t j = 0; j < keys; j++) row[j] *= norm;
        for (int64_t j = 0; share && j < keys; j++) share[j] += row[j];
    }
    for (int64_t t = 0; t < keys; t += TILE)
        for (int64_t h = 0; h < group; h++) {
            const float *row = &p[h * padded + t], *tile = v + t * sv.token;
            const int64_t size = std::min(TILE, keys - t);
            float* sink = o + h * so.head;
            int64_t d = 0;
            for (; d + 4 * LANES <= shape.value_dim; d += 4 * LANES)
                add_weighted<4>(row, tile + d, sv.token, size, sink + d);
            for (; d + LANES <= shape.value_dim; d += LANES)
                add_weighted<1>(row, tile + d, sv.token, size, sink + d);
            for (; d < shape.value_dim; d++)
                for (int64_t j = 0; j < size; j++) sink[d] += row[j] * tile[j * sv.token + d];
        }
}

// One query a head. A task is one row and key head: K and V pass once for its group of queries.
// A row that holds less than the longest begins at its entry of `starts`.
extern "C" void buzz_scored_decode(const float* query, const float* key, const float* value,
                                   float* out, float* received, const int64_t* starts,
                                   const Shape* shape_, const Strides* strides, float scale,
                                   int threads) {
    const Shape shape = *shape_;
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
                     received + task * shape.keys + start, group, keys, scale, sq, sk, sv, so,
                     shape);
    }
}

// A decoding step in one call: the new entry is written where `bounds` says, then attended with all
// others; scores grow by what was received, or become it.
// bounds: [3][batch], first slot, one past the last, index of the new token.
// least: multiplications that are worth waking other threads for.
extern "C" void buzz_step(const float* query, const float* key, const float* value, float* keys,
                          float* values, int32_t* positions, float* scores, float* out,
                          const int64_t* bounds, const Shape* shape_, const Strides* strides,
                          float scale, int adds, int threads, int64_t least) {
    const Shape shape = *shape_;
    const Strides sq = strides[0], nk = strides[1], nv = strides[2], sk = strides[3],
                  sv = strides[4], sp = strides[5], ss = strides[6], so = strides[7];
    const int64_t group = shape.heads / shape.kv_heads, tasks = shape.batch * shape.kv_heads;
    const int64_t held = bounds[shape.batch] - bounds[0];
    if (shape.batch * shape.heads * held * shape.dim <= least) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t b = task / shape.kv_heads, g = task % shape.kv_heads;
        const int64_t start = bounds[b], end = bounds[shape.batch + b], slot = end - 1;
        float* k = keys + b * sk.batch + g * sk.head;
        float* v = values + b * sv.batch + g * sv.head;
        std::memcpy(k + slot * sk.token, key + b * nk.batch + g * nk.head, shape.dim * 4);
        std::memcpy(v + slot * sv.token, value + b * nv.batch + g * nv.head, shape.value_dim * 4);
        positions[b * sp.batch + g * sp.head + slot] = bounds[2 * shape.batch + b];
        float* share = scores ? scores + b * ss.batch + g * ss.head + start : nullptr;
        if (share) std::fill(adds ? share + slot - start : share, share + end - start, 0.f);
        decode_group(query + b * sq.batch + g * group * sq.head, k + start * sk.token,
                     v + start * sv.token, out + b * so.batch + g * group * so.head, share, group,
                     end - start, scale, sq, sk, sv, so, shape);
    }
}

struct Moved {  // one buffer with a row per entry; strides in bytes
    const char* source;
    char* target;
    int64_t source_batch, source_head, source_slot, target_batch, target_head, target_slot, size;
};

// Row `to + i` of the target <- row `index[i]` of the source, for keys (tensors[0], float32, turned by
// row `shift + i - index[i]` of the table) and whatever lies beside them. From the last entry to the
// first: within one buffer, index[i] <= to + i, so that no row is overwritten before it was read.
// Turned in double precision: a key can move a hundred thousand times, and must not shrink by it.
extern "C" void buzz_move(const Moved* tensors, int64_t n_tensors, const int64_t* index,
                          const int64_t* rows, const double* cosine, const double* sine,
                          int64_t batch, int64_t heads, int64_t count, int64_t to, int64_t shift,
                          int64_t half, int64_t interleaved, int threads) {
    const int64_t first = interleaved ? 2 : 1, second = interleaved ? 1 : half;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        const int64_t b = rows[task / heads], h = task % heads;
        for (int64_t i = count - 1; i >= 0; i--) {
            const int64_t from = index[task * count + i], turn = shift + i - from;
            for (int64_t t = 0; t < n_tensors; t++) {
                const Moved& m = tensors[t];
                const char* source =
                    m.source + b * m.source_batch + h * m.source_head + from * m.source_slot;
                char* target =
                    m.target + b * m.target_batch + h * m.target_head + (to + i) * m.target_slot;
                if (source == target) continue;
                std::memmove(target, source, m.size);
                if (t || !half || !turn) continue;
                const double *c = cosine + turn * half, *s = sine + turn * half;
                const float* x = (const float*)source;
                float* y = (float*)target;
                for (int64_t j = 0; j < half; j++) {
                    const double p = x[j * first], q = x[j * first + second];
                    y[j * first] = p * c[j] - q * s[j];
                    y[j * first + second] = q * c[j] + p * s[j];
                }
            }
        }
    }
}
