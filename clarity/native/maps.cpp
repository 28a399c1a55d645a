// Convolutional networks on CPUs: 3x3 convolutions of stride 1 or 2, or transposed of stride 2, each with a bias, an
// activation (one slope below zero for each channel) and, if asked, the maxima of 2x2 windows.
//
// Each vector lane holds one image, and no operation mixes lanes: an image's bits depend on the image and the weights
// alone. Products are those of Winograd's minimal filtering (Lavin and Gray 2016): 16 instead of 36 for 2x2 outputs of
// stride 1, 25 instead of 36 for 2x2 outputs of stride 2, and for 4x4 outputs of a transposed convolution. One source,
// compiled once for each instruction set, as search.cpp.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#ifndef CLARITY_MODULE
#define CLARITY_MODULE _clarity_maps_base
#endif

// SUMS vectors accumulate in registers: of up to MOST tiles, times channels.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, MOST = 4, SUMS = 24;
#elif defined(__AVX__)
constexpr int WIDTH = 8, MOST = 2, SUMS = 12;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, MOST = 4, SUMS = 24;
#else
constexpr int WIDTH = 4, MOST = 2, SUMS = 12;
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 24")

namespace {

typedef float Vec __attribute__((vector_size(WIDTH * 4)));

INLINE Vec larger(Vec x, Vec y) { return x > y ? x : y; }

// Along one axis: a tile of IN inputs, STEP after the one before and beginning at FIRST, becomes TERMS factors, and the
// TERMS products with those of the weights become OUT outputs.
struct Same {
    static constexpr int IN = 4, FIRST = -1, STEP = 2, TERMS = 4, OUT = 2;
    INLINE static void factors(const Vec *d, Vec *t) {
        t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
    }
    INLINE static void outputs(const Vec *t, Vec *y) { y[0] = t[0] + t[1] + t[2], y[1] = t[1] - t[2] - t[3]; }
};
struct Down {
    static constexpr int IN = 5, FIRST = -1, STEP = 4, TERMS = 5, OUT = 2;
    INLINE static void factors(const Vec *d, Vec *t) {
        t[0] = d[0] - d[2], t[1] = d[2], t[2] = d[2] - d[4], t[3] = d[1], t[4] = d[3];
    }
    INLINE static void outputs(const Vec *t, Vec *y) { y[0] = t[0] + t[1] + t[3], y[1] = t[1] - t[2] + t[4]; }
};
struct Up {
    static constexpr int IN = 3, FIRST = 0, STEP = 2, TERMS = 5, OUT = 4;
    INLINE static void factors(const Vec *d, Vec *t) {
        t[0] = d[0] - d[1], t[1] = d[1], t[2] = d[1] - d[2], t[3] = d[0], t[4] = d[1];
    }
    INLINE static void outputs(const Vec *t, Vec *y) {
        y[0] = t[3], y[1] = t[0] + t[1], y[2] = t[4], y[3] = t[1] - t[2];
    }
};

// At least so many values, the memory of more kept.
inline void grow(std::vector<Vec> &values, int64_t size) {
    if (static_cast<int64_t>(values.size()) < size) values.resize(size);
}

// A convolution as the caller describes it; height and width are those of its outputs, before the maxima.
struct Layer {
    int kind, in, out, height, width, pooled;
    const float *weight, *bias, *slope;  // (TERMS * TERMS, in, out), (out), (out)
};

// The tiles of a convolution's outputs, and how many of them are computed together.
inline int tiles_of(const Layer &layer) {
    const int side = layer.kind == 2 ? Up::OUT : Same::OUT;
    return (layer.height + side - 1) / side * ((layer.width + side - 1) / side);
}
inline int tiles_at_once(const Layer &layer) {
    const int tiles = tiles_of(layer);
    return tiles > 2 ? MOST : tiles;
}
// The first of `size` channels of part p of n.
INLINE int bound(int size, int n, int p) { return static_cast<int>(static_cast<int64_t>(size) * p / n); }

// Maps of WIDTH images within zeros: one line before, three behind, which a last tile may read.
struct Maps {
    int channels = 0, height = 0, width = 0;
    std::vector<Vec> values;

    int64_t stride() const { return width + 4; }
    int64_t size() const { return (height + 4) * stride(); }
    Vec *at(int channel, int y, int x) { return values.data() + channel * size() + (y + 1) * stride() + x + 1; }

    void reset(int channels_, int height_, int width_) {  // all within the zeros is written later
        channels = channels_, height = height_, width = width_;
        grow(values, channels * size());
        for (int c = 0; c < channels; c++) {
            Vec *map = values.data() + c * size();
            std::fill(map, map + stride(), Vec{});
            for (int y = 1; y <= height; y++) {
                map[y * stride()] = Vec{};
                std::fill(map + y * stride() + width + 1, map + (y + 1) * stride(), Vec{});
            }
            std::fill(map + (height + 1) * stride(), map + size(), Vec{});
        }
    }
};

// sum[r][t] = sum over i of weight[i][r] * factor[i][t] for R channels and T tiles.
template <int R, int T>
INLINE void multiply(const float *weight, int in, const Vec *factor, Vec *sum) {
    Vec a[R][T];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) a[r][t] = Vec{};
    for (int i = 0; i < in; i++, weight += R, factor += T)
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) a[r][t] += weight[r] * factor[t];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) sum[r * T + t] = a[r][t];
}

// The same for all `terms` products of R channels; the weights lie as they are read.
template <int R, int T>
INLINE void multiply_all(const float *weight, int in, int terms, const Vec *factors, Vec *sums) {
    for (int k = 0; k < terms; k++) multiply<R, T>(weight + k * in * R, in, factors + k * in * T, sums + k * R * T);
}

// One convolution, T tiles at a time, and then as many channels as fit into the registers.
template <class Shape, int T>
void convolve(const Layer &layer, Maps &from, Maps &to, std::vector<Vec> &factors) {
    constexpr int IN = Shape::IN, TERMS = Shape::TERMS, OUT = Shape::OUT, LIMIT = SUMS / T;
    const int in = layer.in, out = layer.out, height = layer.height, width = layer.width;
    const int columns = (width + OUT - 1) / OUT, total = tiles_of(layer), parts = (out + LIMIT - 1) / LIMIT;
    const int64_t stride = from.stride(), next = int64_t{in} * T;
    grow(factors, TERMS * TERMS * next);
    Vec sums[TERMS * TERMS * SUMS];
    for (int first = 0; first < total; first += T) {
        int row[T], column[T];
        for (int t = 0; t < T; t++) {  // beyond the end the last tile once more
            const int tile = std::min(first + t, total - 1);
            row[t] = tile / columns, column[t] = tile % columns;
        }
        for (int i = 0; i < in; i++)
            for (int t = 0; t < T; t++) {
                const Vec *d = from.at(i, Shape::STEP * row[t] + Shape::FIRST, Shape::STEP * column[t] + Shape::FIRST);
                Vec high[TERMS][IN];
                UNROLL for (int c = 0; c < IN; c++) {
                    Vec line[IN], term[TERMS];
                    UNROLL for (int r = 0; r < IN; r++) line[r] = d[r * stride + c];
                    Shape::factors(line, term);
                    UNROLL for (int r = 0; r < TERMS; r++) high[r][c] = term[r];
                }
                Vec *factor = factors.data() + i * T + t;
                UNROLL for (int r = 0; r < TERMS; r++) {
                    Vec term[TERMS];
                    Shape::factors(high[r], term);
                    UNROLL for (int c = 0; c < TERMS; c++, factor += next) *factor = term[c];
                }
            }
        for (int p = 0; p < parts; p++) {
            const int begin = bound(out, parts, p), channels = bound(out, parts, p + 1) - begin;
            const float *weight = layer.weight + static_cast<int64_t>(TERMS * TERMS) * in * begin;
            switch (channels) {
#define CASE(R) \
    case R: \
        if (R <= LIMIT) multiply_all<(R <= LIMIT ? R : 1), T>(weight, in, TERMS * TERMS, factors.data(), sums); \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
                CASE(13) CASE(14) CASE(15) CASE(16) CASE(17) CASE(18) CASE(19) CASE(20) CASE(21) CASE(22) CASE(23)
                CASE(24)
#undef CASE
            }
            for (int o = 0; o < channels; o++) {
                const float bias = layer.bias[begin + o], slope = layer.slope[begin + o];
                for (int t = 0; t < T; t++) {
                    const Vec *sum = sums + o * T + t;
                    Vec high[OUT][TERMS], found[OUT][OUT];
                    UNROLL for (int c = 0; c < TERMS; c++) {
                        Vec term[TERMS], line[OUT];
                        UNROLL for (int r = 0; r < TERMS; r++) term[r] = sum[(TERMS * r + c) * channels * T];
                        Shape::outputs(term, line);
                        UNROLL for (int r = 0; r < OUT; r++) high[r][c] = line[r];
                    }
                    UNROLL for (int r = 0; r < OUT; r++) {
                        Shape::outputs(high[r], found[r]);
                        UNROLL for (int c = 0; c < OUT; c++) {
                            const Vec v = found[r][c] + bias, below = v * slope;
                            found[r][c] = v > 0 ? v : below;
                        }
                    }
                    const int top = OUT * row[t], left = OUT * column[t];
                    const int rows = std::min(OUT, height - top), lines = std::min(OUT, width - left);
                    Vec *at = layer.pooled ? to.at(begin + o, row[t], column[t]) : to.at(begin + o, top, left);
                    if (layer.pooled) {
                        Vec most{};  // no value is below zero where maxima are taken
                        for (int r = 0; r < rows; r++)
                            for (int c = 0; c < lines; c++) most = larger(most, found[r][c]);
                        *at = most;
                    } else if (rows == OUT && lines == OUT) {
                        UNROLL for (int r = 0; r < OUT; r++, at += to.stride())
                            UNROLL for (int c = 0; c < OUT; c++) at[c] = found[r][c];
                    } else {
                        for (int r = 0; r < rows; r++, at += to.stride())
                            for (int c = 0; c < lines; c++) at[c] = found[r][c];
                    }
                }
            }
        }
    }
}

template <class Shape>
void convolve(const Layer &layer, Maps &from, Maps &to, std::vector<Vec> &factors) {
    if (layer.pooled) to.reset(layer.out, (layer.height + 1) / 2, (layer.width + 1) / 2);
    else to.reset(layer.out, layer.height, layer.width);
    switch (tiles_at_once(layer)) {
        case MOST: return convolve<Shape, MOST>(layer, from, to, factors);
        case 1: return convolve<Shape, 1>(layer, from, to, factors);
        default: return convolve<Shape, 2>(layer, from, to, factors);
    }
}

// The last maps of images (rows, channels, height, width).
void apply(const float *images, int64_t rows, int channels, int height, int width, const std::vector<Layer> &layers,
           float *found, int64_t outputs) {
    thread_local Maps from, to;  // their memory is kept from call to call
    thread_local std::vector<Vec> factors;
    for (int64_t first = 0; first < rows; first += WIDTH) {
        const int lanes = static_cast<int>(std::min<int64_t>(WIDTH, rows - first));
        const float *image = images + first * channels * height * width;
        from.reset(channels, height, width);
        for (int c = 0; c < channels; c++)
            for (int y = 0; y < height; y++) {
                float *line = reinterpret_cast<float *>(from.at(c, y, 0));
                for (int lane = 0; lane < WIDTH; lane++) {  // lanes without an image repeat the last one
                    const int64_t plane = std::min(lane, lanes - 1) * int64_t{channels} + c;
                    const float *pixel = image + (plane * height + y) * width;
                    for (int x = 0; x < width; x++) line[x * WIDTH + lane] = pixel[x];
                }
            }
        for (const Layer &layer : layers) {
            if (layer.kind == 0) convolve<Same>(layer, from, to, factors);
            if (layer.kind == 1) convolve<Down>(layer, from, to, factors);
            if (layer.kind == 2) convolve<Up>(layer, from, to, factors);
            std::swap(from, to);
        }
        for (int c = 0; c < from.channels; c++)
            for (int y = 0; y < from.height; y++) {
                const float *line = reinterpret_cast<const float *>(from.at(c, y, 0));
                for (int lane = 0; lane < lanes; lane++) {
                    float *pixel = found + (first + lane) * outputs + (int64_t{c} * from.height + y) * from.width;
                    for (int x = 0; x < from.width; x++) pixel[x] = line[x * WIDTH + lane];
                }
            }
    }
}

// Reads what a caller says of a network's layers; false where it does not fit. `used` counts the parameters.
bool read_layers(const Py_buffer &described, const float *weight, int channels, int height, int width,
                 std::vector<Layer> &layers, int64_t &used) {
    constexpr int FIELDS = 5, MOST_SIDE = 1 << 14;
    if (std::min({channels, height, width}) < 1 || std::max({channels, height, width}) > MOST_SIDE) return false;
    for (int64_t i = 0; i < described.len / (4 * FIELDS); i++) {
        const int32_t *field = static_cast<const int32_t *>(described.buf) + FIELDS * i;
        const int kind = field[0], out = field[1], high = field[2], wide = field[3], pooled = field[4];
        if (kind < 0 || kind > 2 || out < 1 || out > MOST_SIDE || (pooled && kind != 0)) return false;
        // The sizes that a kernel of 3 with padding 1 gives; a transposed one may add a line.
        for (const auto &[before, after] : {std::pair<int, int>{height, high}, {width, wide}}) {
            const int expected = kind == 0 ? before : kind == 1 ? (before + 1) / 2 : 2 * before - 1;
            if (after != expected && !(kind == 2 && after == expected + 1)) return false;
        }
        const int64_t size = int64_t{kind == 0 ? 16 : 25} * channels * out;
        const float *first = weight + used;
        layers.push_back({kind, channels, out, high, wide, pooled, first, first + size, first + size + out});
        used += size + 2 * out;
        channels = out, height = pooled ? (high + 1) / 2 : high, width = pooled ? (wide + 1) / 2 : wide;
    }
    return !layers.empty();
}

PyObject *pack(PyObject *, PyObject *arguments) {
    Py_buffer described, weights;
    int channels, height, width;
    if (!PyArg_ParseTuple(arguments, "iiiy*w*", &channels, &height, &width, &described, &weights)) return nullptr;
    std::vector<Layer> layers;
    std::vector<float> packed;
    int64_t used = 0;
    const float *first = static_cast<float *>(weights.buf);
    const bool fits = read_layers(described, first, channels, height, width, layers, used) && weights.len == 4 * used;
    for (const Layer &layer : layers) {
        if (!fits) break;
        const int limit = SUMS / tiles_at_once(layer), parts = (layer.out + limit - 1) / limit;
        const int64_t rows = int64_t{layer.kind == 0 ? 16 : 25} * layer.in;
        packed.clear();
        for (int p = 0; p < parts; p++)
            for (int64_t row = 0; row < rows; row++)
                packed.insert(packed.end(), layer.weight + row * layer.out + bound(layer.out, parts, p),
                              layer.weight + row * layer.out + bound(layer.out, parts, p + 1));
        std::memcpy(const_cast<float *>(layer.weight), packed.data(), packed.size() * 4);
    }
    for (Py_buffer *buffer : {&described, &weights}) PyBuffer_Release(buffer);
    if (!fits) return PyErr_Format(PyExc_ValueError, "pack: the sizes of the arrays do not agree");
    Py_RETURN_NONE;
}

PyObject *apply(PyObject *, PyObject *arguments) {
    Py_buffer images, described, weights, found;
    int channels, height, width;
    if (!PyArg_ParseTuple(arguments, "y*iiiy*y*w*", &images, &channels, &height, &width, &described, &weights, &found))
        return nullptr;
    std::vector<Layer> layers;
    int64_t used = 0, rows = 0, outputs = 0;
    const float *first = static_cast<float *>(weights.buf);
    bool starved = false, fits = read_layers(described, first, channels, height, width, layers, used);
    if (fits) {
        const Layer &last = layers.back();
        const int64_t bytes = int64_t{4} * channels * height * width;
        rows = images.len / bytes;
        const int side = last.pooled ? 2 : 1;
        outputs = int64_t{last.out} * ((last.height + side - 1) / side) * ((last.width + side - 1) / side);
        fits = images.len == rows * bytes && weights.len == 4 * used && found.len == 4 * rows * outputs;
    }
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        try {
            apply(static_cast<const float *>(images.buf), rows, channels, height, width, layers,
                  static_cast<float *>(found.buf), outputs);
        } catch (const std::bad_alloc &) {
            starved = true;
        }
        Py_END_ALLOW_THREADS;
    }
    for (Py_buffer *buffer : {&images, &described, &weights, &found}) PyBuffer_Release(buffer);
    if (starved) return PyErr_NoMemory();
    if (!fits) return PyErr_Format(PyExc_ValueError, "apply: the sizes of the arrays do not agree");
    Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {
    {"apply", apply, METH_VARARGS,
     "apply(images, channels, height, width, layers, weights, found): the last maps of a network.\n\n"
     "C-contiguous: images (B, channels, height, width) float32; layers (L, 5) int32: of each convolution its kind\n"
     "(0 stride 1, 1 stride 2, 2 transposed of stride 2), output channels, height and width, and whether the maxima of\n"
     "2x2 windows follow, where the slope is 0; weights float32, as pack left them; found (B, channels, height, width)\n"
     "float32, written. Raises ValueError for sizes that do not agree."},
    {"pack", pack, METH_VARARGS,
     "pack(channels, height, width, layers, weights): puts weights into the order in which apply reads them.\n\n"
     "weights float32, one layer after the other: the transformed weights (16 or 25, in, out), the biases (out,), the\n"
     "slopes below zero (out,)."},
    {nullptr, nullptr, 0, nullptr},
};

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define JOIN_(x, y) x##y
#define JOIN(x, y) JOIN_(x, y)

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, STRING(CLARITY_MODULE), "Networks on CPUs: see clarity/native/maps.cpp.",
                      0, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC JOIN(PyInit_, CLARITY_MODULE)() { return PyModule_Create(&MODULE); }
