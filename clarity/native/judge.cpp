// The features of held-out judges on CPUs: pairs of 3x3 convolutions with a bias and a ReLU, after each pair the maxima
// of 2x2 windows, at the end the mean of each map.
//
// Each vector lane holds one image, and no operation mixes lanes: an image's bits depend on the image and the weights
// alone. Convolutions are those of Winograd, F(2x2, 3x3) of Lavin and Gray (2016): 16 multiplications instead of 36 for
// 2x2 outputs, which are also the windows of the maxima. One source, compiled once for each instruction set, as search.cpp.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifndef CLARITY_MODULE
#define CLARITY_MODULE _clarity_judge_base
#endif

// TILES 2x2 outputs of up to CHANNELS maps accumulate in registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, TILES = 4, CHANNELS = 6;
#elif defined(__AVX__)
constexpr int WIDTH = 8, TILES = 2, CHANNELS = 5;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, TILES = 4, CHANNELS = 6;
#else
constexpr int WIDTH = 4, TILES = 2, CHANNELS = 5;
#endif
constexpr int TERMS = 16;  // products of a transformed tile

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

typedef float Vec __attribute__((vector_size(WIDTH * 4)));

INLINE Vec larger(Vec x, Vec y) { return x > y ? x : y; }

// Maps of WIDTH images with a border of zeros: (channels, 2 rows + 2, 2 columns + 2), of which height x width are used.
struct Maps {
    int channels = 0, height = 0, width = 0;
    std::vector<Vec> values;

    int rows() const { return (height + 1) / 2; }  // of 2x2 tiles
    int columns() const { return (width + 1) / 2; }
    int64_t stride() const { return 2 * columns() + 2; }
    int64_t size() const { return (2 * rows() + 2) * stride(); }
    Vec *at(int channel, int y, int x) { return values.data() + channel * size() + (y + 1) * stride() + x + 1; }

    void clear(int channels_, int height_, int width_) {
        channels = channels_, height = height_, width = width_;
        values.resize(channels * size());
        for (int c = 0; c < channels; c++) {  // all but the border is written anyway
            Vec *map = values.data() + c * size();
            const int64_t step = stride(), end = size();
            std::fill(map, map + step, Vec{});
            for (int64_t line = step; line < end; line += step) {
                map[line] = Vec{};
                std::fill(map + line + 1 + width, map + line + step, Vec{});
            }
            std::fill(map + (height + 1) * step, map + end, Vec{});
        }
    }
};

struct Layer {
    int in, out;
    const float *weight, *bias;  // (TERMS, in, out), (out)
};

// sum[r][t] = sum over i of weight[i][r] * tile[i][t], for R channels.
template <int R>
INLINE void multiply(const float *weight, int in, int out, const Vec *tile, Vec *sum) {
    Vec a[R][TILES];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < TILES; t++) a[r][t] = Vec{};
    for (int i = 0; i < in; i++, weight += out, tile += TILES)
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < TILES; t++) a[r][t] += weight[r] * tile[t];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < TILES; t++) sum[r * TILES + t] = a[r][t];
}

// A 3x3 convolution with a bias and a ReLU; `pooled` keeps the largest of each 2x2 outputs.
void convolve(const Layer &layer, Maps &from, Maps &to, bool pooled, std::vector<Vec> &tiles, std::vector<Vec> &sums) {
    const int in = layer.in, out = layer.out, rows = from.rows(), columns = from.columns(), total = rows * columns;
    to.clear(out, pooled ? rows : from.height, pooled ? columns : from.width);
    tiles.resize(static_cast<size_t>(TERMS) * in * TILES), sums.resize(static_cast<size_t>(TERMS) * out * TILES);
    const int64_t stride = from.stride();
    const int parts = (out + CHANNELS - 1) / CHANNELS;
    for (int first = 0; first < total; first += TILES) {
        int y[TILES], x[TILES];
        for (int t = 0; t < TILES; t++) {  // beyond the end the last tile once more
            const int tile = std::min(first + t, total - 1);
            y[t] = 2 * (tile / columns), x[t] = 2 * (tile % columns);
        }
        for (int i = 0; i < in; i++)
            for (int t = 0; t < TILES; t++) {
                const Vec *d = from.at(i, y[t] - 1, x[t] - 1);
                Vec h[4][4];
                UNROLL for (int c = 0; c < 4; c++) {
                    const Vec a = d[c], b = d[stride + c], e = d[2 * stride + c], f = d[3 * stride + c];
                    h[0][c] = a - e, h[1][c] = b + e, h[2][c] = e - b, h[3][c] = b - f;
                }
                UNROLL for (int r = 0; r < 4; r++) {
                    const Vec a = h[r][0], b = h[r][1], e = h[r][2], f = h[r][3];
                    const Vec v[4] = {a - e, b + e, e - b, b - f};
                    UNROLL for (int c = 0; c < 4; c++) tiles[((4 * r + c) * in + i) * TILES + t] = v[c];
                }
            }
        for (int k = 0; k < TERMS; k++)
            for (int p = 0; p < parts; p++) {
                const int begin = out * p / parts, channels = out * (p + 1) / parts - begin;
                const float *weight = layer.weight + static_cast<int64_t>(k) * in * out + begin;
                const Vec *tile = &tiles[static_cast<size_t>(k) * in * TILES];
                Vec *sum = &sums[(static_cast<size_t>(k) * out + begin) * TILES];
                switch (channels) {
#define CASE(R) case R: if (R <= CHANNELS) multiply<(R <= CHANNELS ? R : 1)>(weight, in, out, tile, sum); break;
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
                }
            }
        for (int o = 0; o < out; o++)
            for (int t = 0; t < TILES; t++) {
                Vec h[2][4];
                UNROLL for (int c = 0; c < 4; c++) {
                    Vec m[4];
                    UNROLL for (int r = 0; r < 4; r++) m[r] = sums[((4 * r + c) * out + o) * TILES + t];
                    h[0][c] = m[0] + m[1] + m[2], h[1][c] = m[1] - m[2] - m[3];
                }
                Vec v[2][2];
                UNROLL for (int r = 0; r < 2; r++) {
                    v[r][0] = larger(h[r][0] + h[r][1] + h[r][2] + layer.bias[o], Vec{});
                    v[r][1] = larger(h[r][1] - h[r][2] - h[r][3] + layer.bias[o], Vec{});
                }
                const bool below = y[t] + 1 < from.height, right = x[t] + 1 < from.width;
                if (pooled) {  // no value is below zero, so that zero stands for what lies outside
                    Vec most = larger(v[0][0], right ? v[0][1] : Vec{});
                    if (below) most = larger(most, larger(v[1][0], right ? v[1][1] : Vec{}));
                    *to.at(o, y[t] / 2, x[t] / 2) = most;
                } else {
                    *to.at(o, y[t], x[t]) = v[0][0];
                    if (right) *to.at(o, y[t], x[t] + 1) = v[0][1];
                    if (below) *to.at(o, y[t] + 1, x[t]) = v[1][0];
                    if (below && right) *to.at(o, y[t] + 1, x[t] + 1) = v[1][1];
                }
            }
    }
}

// The means of the last maps of images (rows, channels, height, width).
void features(const float *images, int64_t rows, int channels, int height, int width, const std::vector<Layer> &layers,
              float *found) {
    thread_local Maps from, to;  // their memory is kept from call to call
    thread_local std::vector<Vec> tiles, sums;
    const int64_t pixels = static_cast<int64_t>(height) * width, outputs = layers.back().out;
    for (int64_t first = 0; first < rows; first += WIDTH) {
        const int lanes = static_cast<int>(std::min<int64_t>(WIDTH, rows - first));
        from.clear(channels, height, width);
        for (int c = 0; c < channels; c++)
            for (int y = 0; y < height; y++)
                for (int lane = 0; lane < lanes; lane++) {
                    const float *line = images + ((first + lane) * channels + c) * pixels + static_cast<int64_t>(y) * width;
                    for (int x = 0; x < width; x++) (*from.at(c, y, x))[lane] = line[x];
                }
        for (size_t i = 0; i < layers.size(); i++) {
            convolve(layers[i], from, to, i % 2, tiles, sums);
            std::swap(from, to);
        }
        for (int o = 0; o < outputs; o++) {
            Vec sum{};
            for (int y = 0; y < from.height; y++)
                for (int x = 0; x < from.width; x++) sum += *from.at(o, y, x);
            sum /= static_cast<float>(from.height * from.width);
            for (int lane = 0; lane < lanes; lane++) found[(first + lane) * outputs + o] = sum[lane];
        }
    }
}

PyObject *features(PyObject *, PyObject *arguments) {
    Py_buffer images, widths, weights, biases, found;
    int channels, height, width;
    if (!PyArg_ParseTuple(arguments, "y*iiiy*y*y*w*", &images, &channels, &height, &width, &widths, &weights, &biases, &found))
        return nullptr;
    std::vector<Layer> layers;
    int64_t weight = 0, bias = 0;
    bool fits = channels > 0 && height > 0 && width > 0;
    for (int64_t i = 0, in = channels; i < widths.len / 4; i++) {
        const int64_t out = static_cast<const int32_t *>(widths.buf)[i];
        fits = fits && out > 0;
        layers.push_back({static_cast<int>(in), static_cast<int>(out), static_cast<const float *>(weights.buf) + weight,
                          static_cast<const float *>(biases.buf) + bias});
        weight += TERMS * in * out, bias += out, in = out;
    }
    const int64_t bytes = fits ? int64_t{4} * channels * height * width : 1, rows = images.len / bytes;
    fits = fits && !layers.empty() && layers.size() % 2 == 0 && images.len % bytes == 0 && weights.len == 4 * weight &&
           biases.len == 4 * bias && found.len == 4 * rows * layers.back().out;
    bool starved = false;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        try {
            features(static_cast<const float *>(images.buf), rows, channels, height, width, layers,
                     static_cast<float *>(found.buf));
        } catch (const std::bad_alloc &) {
            starved = true;
        }
        Py_END_ALLOW_THREADS;
    }
    for (Py_buffer *buffer : {&images, &widths, &weights, &biases, &found}) PyBuffer_Release(buffer);
    if (starved) return PyErr_NoMemory();
    if (!fits) return PyErr_Format(PyExc_ValueError, "features: the sizes of the arrays do not agree");
    Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {
    {"features", features, METH_VARARGS,
     "features(images, channels, height, width, widths, weights, biases, features): the means of the last maps.\n\n"
     "C-contiguous float32: images (B, channels, height, width); of each convolution, one after the other, the\n"
     "transformed weights (16, in, out) and the biases (out,); features (B, out of the last), written. widths int32:\n"
     "the output channels of the convolutions. Raises ValueError for sizes that do not agree."},
    {nullptr, nullptr, 0, nullptr},
};

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define JOIN_(x, y) x##y
#define JOIN(x, y) JOIN_(x, y)

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, STRING(CLARITY_MODULE), "Judges on CPUs: see clarity/native/judge.cpp.",
                      0, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC JOIN(PyInit_, CLARITY_MODULE)() { return PyModule_Create(&MODULE); }
