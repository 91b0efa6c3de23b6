// NF4 and 8-bit Adam on a CPU, with GCC's vectors. Chapter 14.

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined __AVX2__ || !defined __FMA__
#error "needs a processor with AVX2 or AVX-512"
#endif

// As many numbers at a time as a register holds: sixteen of AVX-512, eight of AVX2.
#ifdef __AVX512F__
enum { LANES = 16 };
#define PAIRS_1 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define PAIRS_2 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define WORDS 0, 0, 0, 0, 1, 1, 1, 1, 16, 16, 16, 16, 17, 17, 17, 17
#define SHIFTS 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24
#else
enum { LANES = 8 };
#define PAIRS_1 0, 8, 1, 9, 2, 10, 3, 11
#define PAIRS_2 4, 12, 5, 13, 6, 14, 7, 15
#define WORDS 0, 0, 0, 0, 1, 1, 1, 1
#define SHIFTS 0, 8, 16, 24, 0, 8, 16, 24
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int64_t longs __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct Table {  // sixteen floats, in one register or in two
    floats part[16 / LANES];
    explicit Table(const float *values) { std::memcpy(part, values, sizeof part); }
    floats look_up(ints index) const {
#ifdef __AVX512F__
        return __builtin_shuffle(part[0], index & 15);
#else
        return __builtin_shuffle(part[0], part[1], index & 15);
#endif
    }
};

// As many packed bytes, one in each lane; what stands above the byte is not cleared.
static inline ints spread(const uint8_t *packed) {
    int64_t word[2] = {};
    std::memcpy(word, packed, LANES);
    ints a = (ints)(word[0] + longs{}), b = (ints)(word[1] + longs{});
    return __builtin_shufflevector(a, b, WORDS) >> ints{SHIFTS};
}

// Twice as many weights in their order: the first of each byte, then the second.
static inline void store(float *out, floats first, floats second) {
    floats a = __builtin_shufflevector(first, second, PAIRS_1);
    floats b = __builtin_shufflevector(first, second, PAIRS_2);
    std::memcpy(out, &a, sizeof a);
    std::memcpy(out + LANES, &b, sizeof b);
}

// The bits of the nearest bfloat16 in the upper half, ties to even; a NaN stays one.
static inline ints round_to_bf16(floats x) {
    ints bits = (ints)x;
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000;
}

static inline void store(uint16_t *out, floats first, floats second) {
    ints pairs = (round_to_bf16(second) & -65536) | (round_to_bf16(first) >> 16 & 65535);
    std::memcpy(out, &pairs, sizeof pairs);
}

struct Absmax {  // of a block: as it is stored, or code by code from a group's scale and the offset
    const float *values;
    const uint8_t *codes;
    const float *codebook, *offset;
    int64_t group;
    float operator()(int64_t block) const {
        return codes ? codebook[codes[block]] * values[block / group] + *offset : values[block];
    }
};

template <class T>
static void dequantize(const uint8_t *packed, Absmax absmax, const float *codebook, T *out, int64_t count,
                       int64_t size, int threads) {
    Table table(codebook);
    int64_t blocks = (count + size - 1) / size;
    #pragma omp parallel for num_threads(threads) if (count > 32768)
    for (int64_t block = 0; block < blocks; ++block) {
        float s = absmax(block);
        int64_t i = block * size, end = i + size < count ? i + size : count;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            ints codes = spread(packed + i / 2);
            store(out + i, table.look_up(codes >> 4) * s, table.look_up(codes) * s);
        }
        if (i < end) {
            uint8_t rest[LANES] = {};
            T last[2 * LANES];
            std::memcpy(rest, packed + i / 2, (end - i + 1) / 2);
            ints codes = spread(rest);
            store(last, table.look_up(codes >> 4) * s, table.look_up(codes) * s);
            std::memcpy(out + i, last, (end - i) * sizeof(T));
        }
    }
}

static inline ints load(const float *w) {
    ints bits;
    std::memcpy(&bits, w, sizeof bits);
    return bits;
}

static inline ints load(const uint16_t *w) {
    halves half;
    std::memcpy(&half, w, sizeof half);
    return __builtin_convertvector(half, ints) << 16;
}

// Returns whether any number was not finite.
template <class T>
static int quantize(const T *w, const float *codebook, uint8_t *packed, float *absmax, int64_t count,
                    int64_t size, int threads) {
    float middle[16];
    for (int k = 0; k < 15; ++k) middle[k] = (codebook[k] + codebook[k + 1]) / 2;
    middle[15] = INFINITY;
    Table table(middle);
    int64_t blocks = (count + size - 1) / size;
    int wrong = 0;
    #pragma omp parallel for num_threads(threads) if (count > 32768) reduction(|:wrong)
    for (int64_t block = 0; block < blocks; ++block) {
        int64_t start = block * size, here = start + size < count ? size : count - start;
        int64_t whole = here / LANES * LANES;
        T rest[LANES] = {};  // zeros fill it up, so that an odd count ends with the code of zero
        std::memcpy(rest, w + start + whole, (here - whole) * sizeof(T));
        ints largest = load(rest) & 0x7fffffff;  // without its sign a float orders as its bits do
        for (int64_t i = 0; i < whole; i += LANES) {
            ints bits = load(w + start + i) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        int32_t top = 0;
        for (int k = 0; k < LANES; ++k) top = largest[k] > top ? largest[k] : top;
        wrong |= top >= 0x7f800000;  // infinity, and NaN above it
        float s;
        std::memcpy(&s, &top, 4);
        absmax[block] = s;
        s = s > 1e-38f ? s : 1e-38f;
        float inverse = 1 / s;
        for (int64_t i = 0; i < here; i += LANES) {
            floats x = (floats)load(i < whole ? w + start + i : rest);
            x = here == size ? x * inverse : x / s;
            ints code = {};
            for (int step = 8; step; step /= 2) code -= (x > table.look_up(code + (step - 1))) * step;
            uint8_t bytes[LANES / 2];
            for (int k = 0; k < LANES / 2; ++k) bytes[k] = code[2 * k] << 4 | code[2 * k + 1];
            std::memcpy(packed + (start + i) / 2, bytes, i < whole ? LANES / 2 : (here - whole + 1) / 2);
        }
    }
    return wrong;
}

struct State {  // one of Adam's two: codes and absmax, codebook, midpoints, and where to begin to search
    uint8_t *codes;
    float *absmax;
    const float *codebook, *middle;
    const uint8_t *start;
    void write(const float *x, int64_t from, int64_t here, int64_t block, bool whole) {
        float s = 0;
        for (int64_t i = 0; i < here; ++i) s = std::fabs(x[i]) > s ? std::fabs(x[i]) : s;
        absmax[block] = s;
        s = s > 1e-38f ? s : 1e-38f;
        float inverse = 1 / s;
        for (int64_t i = 0; i < here; ++i) {
            float scaled = whole ? x[i] * inverse : x[i] / s;
            uint32_t bits;
            std::memcpy(&bits, &scaled, 4);
            int code = start[bits >> 16];
            while (scaled > middle[code]) ++code;
            codes[from + i] = code;
        }
    }
};

extern "C" {
void dequantize_nf4(const uint8_t *packed, const float *values, const uint8_t *codes, const float *map,
                    const float *offset, int64_t group, const float *codebook, void *out, int bf16,
                    int64_t count, int64_t size, int threads) {
    Absmax absmax{values, codes, map, offset, group};
    if (bf16) dequantize(packed, absmax, codebook, (uint16_t *)out, count, size, threads);
    else dequantize(packed, absmax, codebook, (float *)out, count, size, threads);
}

int quantize_nf4(const void *w, int bf16, const float *codebook, uint8_t *packed, float *absmax,
                 int64_t count, int64_t size, int threads) {
    if (bf16) return quantize((const uint16_t *)w, codebook, packed, absmax, count, size, threads);
    return quantize((const float *)w, codebook, packed, absmax, count, size, threads);
}

// options: beta1, 1 - beta1, beta2, 1 - beta2, root of 1 - beta2^t, eps, 1 - lr * decay, -lr / (1 - beta1^t)
void adam(float *x, const float *grad, State *m, State *v, const float *options, int64_t count, int64_t size,
          int threads) {
    float b1 = options[0], c1 = options[1], b2 = options[2], c2 = options[3];
    float root = options[4], eps = options[5], keep = options[6], rate = options[7];
    int64_t blocks = (count + size - 1) / size;
    #pragma omp parallel num_threads(threads) if (count > 32768)
    {
        float *first = new float[2 * size], *second = first + size;
        #pragma omp for
        for (int64_t block = 0; block < blocks; ++block) {
            int64_t from = block * size, here = from + size < count ? size : count - from;
            float sm = m->absmax[block], sv = v->absmax[block];
            for (int64_t i = 0; i < here; ++i) {
                float g = grad[from + i];
                float a = m->codebook[m->codes[from + i]] * sm * b1;
                float b = v->codebook[v->codes[from + i]] * sv * b2;
                first[i] = std::fma(c1, g, a);
                second[i] = std::fma(c2 * g, g, b);
                float below = std::sqrt(second[i]) / root + eps;
                x[from + i] = x[from + i] * keep + rate * first[i] / below;
            }
            m->write(first, from, here, block, here == size);
            v->write(second, from, here, block, here == size);
        }
        delete[] first;
    }
}
}
