// Algorithm 1 over stacked latent classifiers on CPUs: many searches side by side, each in a lane of its own.
//
// A lane is one search, and no operation mixes lanes: a row's bits depend neither on its mates, nor on the order, nor on
// the number of threads. What makes it fast:
//   - a weight is a broadcast operand, and up to TILE outputs x GROUPS vectors of lanes accumulate in registers, so that
//     both multiply-add units are busy;
//   - members go through a layer in chunks, so that one member's multiplications hide another's latencies;
//   - a finished lane takes the next search at once;
//   - the weights are packed once, in the order in which both passes read them.
// One source, compiled once for each instruction set under a module name of its own; the vectors are the compiler's, so
// that any machine with gcc or clang can have the plain one. Not to be built with -ffast-math: loading such a library
// switches denormals off for the whole process, and the tests for NaN vanish.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef CLARITY_MODULE
#define CLARITY_MODULE _clarity_native_base
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16, GROUPS = 3, TILE = 8;
#elif defined(__AVX__)
constexpr int WIDTH = 8, GROUPS = 2, TILE = 6;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, GROUPS = 2, TILE = 8;
#else
constexpr int WIDTH = 4, GROUPS = 2, TILE = 4;
#endif
constexpr int LANES = WIDTH * GROUPS;
constexpr int MAX_CHUNK = 4;            // members that go through a layer together
constexpr int64_t CHUNK_BYTES = 32768;  // of their activations: they should stay in the first-level cache

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Int __attribute__((vector_size(WIDTH * 4)));

INLINE Vec splat(float x) { return x - (Vec){}; }
// Both give y where either is NaN, so that a NaN in y survives.
INLINE Vec larger(Vec x, Vec y) {
#ifdef __AVX512F__  // gcc finds the instruction in the line below for the other instruction sets only
    return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y)));
#else
    return x > y ? x : y;
#endif
}

// --- what the threads share ------------------------------------------------------------------------------------------

struct Layer {
    int in, out;
    const float *weight, *bias;  // (M, in, out), (M, out)
};

// Tiles of nearly equal size: the bounds of tile t of n when size is split.
INLINE int tiles(int size) { return (size + TILE - 1) / TILE; }
INLINE int bound(int size, int n, int t) { return static_cast<int>(static_cast<int64_t>(size) * t / n); }

struct Task {
    int64_t rows = 0;
    int dim = 0, classes = 0, members = 0;
    int chunk = 1;            // members that go through a layer together
    int64_t activations = 0;  // of one member: all hidden layers and the logits
    std::vector<Layer> layers;
    std::vector<float> packed;  // the weights in the order in which `Worker::evaluate` reads them
    const float *start = nullptr, *reference = nullptr;
    const int64_t *target = nullptr;
    float min_target_prob = 0, distance_weight = 0;
    int max_steps = 0;
    std::vector<float> rate, root;  // Adam's bias corrections after step + 1 updates, as torch.optim.Adam rounds them
    float *point = nullptr, *initial = nullptr, *final_prob = nullptr;
    int32_t *steps = nullptr;
    uint8_t *finite = nullptr;
    std::atomic<int64_t> next{0};
    std::atomic<bool> stop{false};
};

// --- the inner loops -------------------------------------------------------------------------------------------------

enum class First { bias, zero, add };     // what the accumulators begin with
enum class Last { none, relu, masked };   // what is done to them at the end

// y[r] = last(first + sum over i of w[i][r] * x[i]) for R units and all lanes. The inputs come in `parts` of `count`, `next`
// apart. Returns where the weights end.
template <int R, First FIRST, Last LAST>
INLINE const float *tile(const float *w, const Vec *x, int count, int parts, int64_t next, Vec *y) {
    Vec a[R][GROUPS];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int g = 0; g < GROUPS; g++)
        a[r][g] = FIRST == First::add ? y[r * GROUPS + g] : (Vec){};
    const float *b = w;
    if (FIRST == First::bias) w += R;
    for (int p = 0; p < parts; p++, x += next)
        for (const Vec *v = x, *end = x + count * GROUPS; v < end; v += GROUPS, w += R)
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int g = 0; g < GROUPS; g++) a[r][g] += w[r] * v[g];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int g = 0; g < GROUPS; g++) {
        Vec v = a[r][g];
        if (FIRST == First::bias) v += b[r];
        if (LAST == Last::relu) v = larger((Vec){}, v);
        if (LAST == Last::masked) v = y[r * GROUPS + g] > 0 ? v : (Vec){};
        y[r * GROUPS + g] = v;
    }
    return w;
}

// The same for `size` units, a tile after another.
template <First FIRST, Last LAST>
INLINE const float *pass(const float *w, const Vec *x, int count, Vec *y, int size, int parts = 1, int64_t next = 0) {
    const int n = tiles(size);
    for (int t = 0; t < n; t++) {
        const int from = bound(size, n, t), units = bound(size, n, t + 1) - from;
#define CASE(R) \
    case R: if (R <= TILE) w = tile<(R <= TILE ? R : 1), FIRST, LAST>(w, x, count, parts, next, y + from * GROUPS); break;
        switch (units) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
#undef CASE
    }
    return w;
}

// 2^x for x <= 0 with an error below 2 ulp: 2^n * 2^f with n = floor(x), a polynomial for 2^f.
INLINE Vec power(Vec x) {
    x = larger(splat(-100.f), x);  // what is smaller counts as 2^-100: no denormal numbers, which are slow
#ifdef __AVX512F__
    const Vec f = reinterpret_cast<Vec>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEG_INF));
#else
    constexpr float MAGIC = 12582912.f + 127.f;  // 1.5 * 2^23 + bias: adding it rounds, the low bits are the exponent's
    const Vec t = x - 0.5f + MAGIC, f = x - (t - MAGIC);
#endif
    const Vec e = 0.999999881f + f * (0.693154752f + f * (0.240139708f + f * (0.0558662452f + f * (0.00894282945f + f * 0.00189646112f))));
#ifdef __AVX512F__
    return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(e), reinterpret_cast<__m512>(x)));
#else
    Int bits;
    memcpy(&bits, &t, sizeof bits);
    bits <<= 23;
    Vec scale;
    memcpy(&scale, &bits, sizeof scale);
    return e * scale;
#endif
}

// Softmax of the logits in place, which are in units of log 2; leaves the gradient of the cross-entropy by the logits in
// natural units, adds the target's probability to prob.
INLINE void softmax(Vec *logits, const Vec *onehot, int classes, Vec *prob) {
    Vec top[GROUPS], sum[GROUPS], chosen[GROUPS];
    UNROLL for (int g = 0; g < GROUPS; g++) top[g] = logits[g], sum[g] = chosen[g] = (Vec){};
    const Vec *const end = logits + classes * GROUPS;
    for (const Vec *p = logits + GROUPS; p < end; p += GROUPS)
        UNROLL for (int g = 0; g < GROUPS; g++) top[g] = larger(top[g], p[g]);
    const Vec *o = onehot;
    for (Vec *p = logits; p < end; p += GROUPS, o += GROUPS)
        UNROLL for (int g = 0; g < GROUPS; g++) {
            const Vec e = power(p[g] - top[g]);
            p[g] = e;
            sum[g] += e;
            chosen[g] += e * o[g];
        }
    UNROLL for (int g = 0; g < GROUPS; g++) {
        sum[g] = 1.f / sum[g];
        prob[g] += chosen[g] * sum[g];
    }
    o = onehot;
    for (Vec *p = logits; p < end; p += GROUPS, o += GROUPS)
        UNROLL for (int g = 0; g < GROUPS; g++) p[g] = p[g] * sum[g] - o[g];
}

INLINE Vec root_of(Vec x) {
    Vec y;
    UNROLL for (int j = 0; j < WIDTH; j++) y[j] = std::sqrt(x[j]);
    return y;
}

// --- one thread ------------------------------------------------------------------------------------------------------

struct Free {
    void operator()(Vec *p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<Vec, Free>;

Buffer vectors(int64_t count) {
    const size_t bytes = sizeof(Vec) * static_cast<size_t>(count);
    Buffer p(static_cast<Vec *>(::operator new(bytes, std::align_val_t(64))));
    memset(static_cast<void *>(p.get()), 0, bytes);
    return p;
}

class Worker {
    Task &task;
    const int D, K;
    Buffer memory;
    Vec *z, *moved, *reference, *mean, *square, *grad, *onehot, *active;
    int64_t row[LANES];
    int step[LANES];
    Vec prob[GROUPS];

    float &at(Vec *p, int64_t unit, int lane) { return reinterpret_cast<float *>(p)[unit * LANES + lane]; }

   public:
    explicit Worker(Task &task) : task(task), D(task.dim), K(task.classes) {
        memory = vectors((6 * static_cast<int64_t>(D) + K + task.chunk * task.activations) * GROUPS);
        Vec *p = memory.get();
        auto take = [&](int64_t units) { Vec *q = p; p += units * GROUPS; return q; };
        z = take(D), moved = take(D), reference = take(D), mean = take(D), square = take(D), grad = take(D);
        onehot = take(K), active = take(task.chunk * task.activations);
    }

    void run() {
        bool any = false;
        for (int j = 0; j < LANES; j++) any |= load(j);
        while (any && !task.stop.load(std::memory_order_relaxed)) {
            evaluate();
            const uint64_t odd = update();
            any = settle(odd);
        }
    }

   private:
    // The next waiting row enters lane j; a lane for which there is none computes on at 0, to no effect.
    bool load(int j) {
        const int64_t q = task.next.load(std::memory_order_relaxed) < task.rows
                              ? task.next.fetch_add(1, std::memory_order_relaxed) : task.rows;
        const bool found = q < task.rows;
        step[j] = 0;
        for (int k = 0; found && k < K; k++) at(onehot, k, j) = k == task.target[q];
        for (int k = 0; k < D; k++) {
            if (found) {
                at(z, k, j) = task.start[q * D + k];
                at(reference, k, j) = task.reference[q * D + k];
            } else {
                at(z, k, j) = at(reference, k, j) = 0;
            }
            at(mean, k, j) = at(square, k, j) = 0;
        }
        row[j] = found ? q : -1;
        return found;
    }

    // Sums over the members: the target's probability and the gradient of the cross-entropy.
    void evaluate() {
        const Layer *layers = task.layers.data();
        const int depth = static_cast<int>(task.layers.size());
        const int64_t stride = task.activations * GROUPS;
        const float *w = task.packed.data();
        UNROLL for (int g = 0; g < GROUPS; g++) prob[g] = (Vec){};
        for (int k = 0; k < D * GROUPS; k++) grad[k] = (Vec){};
        for (int m = 0; m < task.members; m += task.chunk) {
            Vec *const end = active + std::min(task.chunk, task.members - m) * stride;
            int64_t at = 0, before = 0;  // where a layer's outputs begin, and those of the layer before it
            for (int l = 0; l < depth; l++) {
                for (Vec *p = active; p < end; p += stride) {
                    const Vec *x = l ? p + before : z;
                    if (l + 1 < depth) w = pass<First::bias, Last::relu>(w, x, layers[l].in, p + at, layers[l].out);
                    else w = pass<First::bias, Last::none>(w, x, layers[l].in, p + at, layers[l].out);
                }
                before = at;
                at += static_cast<int64_t>(layers[l].out) * GROUPS;
            }
            at = before;
            for (Vec *p = active; p < end; p += stride) softmax(p + at, onehot, K, prob);
            // Backwards; the gradient by a layer's outputs takes the place of the outputs.
            for (int l = depth - 1; l; l--) {
                before = at - static_cast<int64_t>(layers[l].in) * GROUPS;
                for (Vec *p = active; p < end; p += stride)
                    w = pass<First::zero, Last::masked>(w, p + at, layers[l].out, p + before, layers[l].in);
                at = before;
            }
            w = pass<First::add, Last::none>(w, active, layers[0].out, grad, D, static_cast<int>((end - active) / stride), stride);
        }
    }

    // Adam's next points, into `moved`. Returns the lanes whose next point is not finite, as bits.
    uint64_t update() {
        constexpr float BETA2 = 0.999f, REST1 = 0.1f, REST2 = 0.001f, EPS = 1e-8f;
        const float share = 1.f / static_cast<float>(task.members);
        uint64_t odd = 0;
        const int last = static_cast<int>(task.rate.size()) - 1;
        UNROLL for (int g = 0; g < GROUPS; g++) {
            Vec rate, root, check = {};
            for (int j = 0; j < WIDTH; j++) {
                const int s = std::min(step[g * WIDTH + j], last);
                rate[j] = task.rate[s], root[j] = task.root[s];
            }
            for (int k = 0; k < D; k++) {
                const int i = k * GROUPS + g;
                const Vec away = z[i] - reference[i];
                const Vec sign = (away > 0 ? splat(1) : (Vec){}) - (away < 0 ? splat(1) : (Vec){});
                const Vec slope = grad[i] * share + task.distance_weight * sign;
                const Vec a = mean[i] + (slope - mean[i]) * REST1, b = square[i] * BETA2 + slope * REST2 * slope;
                const Vec next = z[i] - rate * (a / (root_of(b) * root + EPS));
                mean[i] = a, square[i] = b, moved[i] = next;
                check += next * 0.f;
            }
            for (int j = 0; j < WIDTH; j++) odd |= static_cast<uint64_t>(!(check[j] == 0)) << (g * WIDTH + j);
        }
        return odd;
    }

    // Writes out the rows that have ended, lets the others move, refills. False when no lane has a row left.
    bool settle(uint64_t odd) {
        const float members = static_cast<float>(task.members);
        bool any = false;
        std::swap(z, moved);  // `moved` now holds the points that were tested
        for (int j = 0; j < LANES; j++) {
            const int64_t q = row[j];
            if (q < 0) continue;
            const float p = prob[j / WIDTH][j % WIDTH] / members;
            if (!step[j]) task.initial[q] = p;
            const bool reached = p > task.min_target_prob, last = step[j] >= task.max_steps, known = std::isfinite(p);
            if (reached || last || !known || (odd >> j & 1)) {
                for (int k = 0; k < D; k++) task.point[q * D + k] = at(moved, k, j);
                task.steps[q] = step[j];
                task.final_prob[q] = p;
                task.finite[q] = known && (reached || last);
                any |= load(j);
            } else {
                step[j]++;
                any = true;
            }
        }
        return any;
    }
};

// --- the whole search ------------------------------------------------------------------------------------------------

// Writes the weights in the order of Worker::evaluate: for each chunk of members forwards and then backwards through the
// layers, for each member and tile of outputs its biases and a row for each input, for each tile of inputs a row for each
// output; in the first layer the tile comes before the member.
void pack(Task &task) {
    constexpr float LOG2E = 1.44269504f;  // the softmax takes powers of two
    const int depth = static_cast<int>(task.layers.size());
    int64_t size = 0;
    for (const Layer &layer : task.layers) size += (2 * static_cast<int64_t>(layer.in) + 1) * layer.out;
    task.packed.reserve(static_cast<size_t>(size) * task.members);
    for (int first = 0; first < task.members; first += task.chunk) {
        const int last = std::min(first + task.chunk, task.members);
        for (int l = 0; l < depth; l++) {
            const int I = task.layers[l].in, O = task.layers[l].out, n = tiles(O);
            const float unit = l + 1 < depth ? 1.f : LOG2E;
            for (int m = first; m < last; m++)
                for (int t = 0; t < n; t++)
                    for (int64_t i = -1; i < I; i++) {
                        const float *from = i < 0 ? task.layers[l].bias + static_cast<int64_t>(m) * O
                                                  : task.layers[l].weight + (static_cast<int64_t>(m) * I + i) * O;
                        for (int o = bound(O, n, t); o < bound(O, n, t + 1); o++) task.packed.push_back(from[o] * unit);
                    }
        }
        for (int l = depth - 1; l >= 0; l--) {
            const int I = task.layers[l].in, O = task.layers[l].out, n = tiles(I);
            auto rows = [&](int m, int t) {
                const float *from = task.layers[l].weight + static_cast<int64_t>(m) * I * O;
                for (int o = 0; o < O; o++)
                    for (int64_t i = bound(I, n, t); i < bound(I, n, t + 1); i++) task.packed.push_back(from[i * O + o]);
            };
            if (l)
                for (int m = first; m < last; m++)
                    for (int t = 0; t < n; t++) rows(m, t);
            else
                for (int t = 0; t < n; t++)
                    for (int m = first; m < last; m++) rows(m, t);
        }
    }
}

// Runs `threads` workers to the end; `interrupted` is asked now and then whether to give up. False when it did.
// Throws bad_alloc and, when not one thread could be started, system_error.
template <class Ask>
bool search(Task &task, int threads, Ask interrupted) {
    std::mutex mutex;
    std::condition_variable ready;
    int running = 0;
    bool starved = false, given_up = false;
    std::vector<std::thread> pool;
    pool.reserve(threads);
    auto work = [&] {
        bool failed = false;
        try {
            Worker(task).run();
        } catch (const std::bad_alloc &) {
            failed = true;
            task.stop = true;
        }
        const std::lock_guard<std::mutex> lock(mutex);
        starved |= failed;
        running--;
        ready.notify_one();
    };
    for (int t = 0; t < threads; t++) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            running++;
        }
        try {
            pool.emplace_back(work);
        } catch (const std::system_error &) {  // the machine allows no more threads: those that run do the work
            {
                const std::lock_guard<std::mutex> lock(mutex);
                running--;
            }
            if (pool.empty()) throw;
            break;
        }
    }
    {
        std::unique_lock<std::mutex> lock(mutex);
        while (!ready.wait_for(lock, std::chrono::milliseconds(200), [&] { return running == 0; })) {
            lock.unlock();
            if (!given_up && interrupted()) given_up = task.stop = true;
            lock.lock();
        }
    }
    for (std::thread &thread : pool) thread.join();
    if (starved) throw std::bad_alloc();
    return !given_up;
}

// --- the door to Python ----------------------------------------------------------------------------------------------

// A C-contiguous array lent by Python for as long as this lives.
class Array {
    Py_buffer view{};

   public:
    Array() = default;
    Array(const Array &) = delete;
    ~Array() { PyBuffer_Release(&view); }

    // False, with a Python error, unless the object is an array of that type and shape (-1: any size).
    bool take(PyObject *object, const char *name, const char *formats, std::initializer_list<int64_t> shape, bool writable) {
        if (PyObject_GetBuffer(object, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0))) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s: expected a%s C-contiguous array, got %s", name, writable ? " writable" : "",
                         Py_TYPE(object)->tp_name);
            return false;
        }
        const char *format = view.format ? view.format : "B";
        const bool typed = std::strlen(format) == 1 && std::strchr(formats, *format) &&
                           view.itemsize == (std::strchr("lq", *formats) ? 8 : *formats == '?' ? 1 : 4);
        bool fits = typed && view.ndim == static_cast<int>(shape.size());
        std::string expected, found;
        int axis = 0;
        for (const int64_t size : shape) {
            if (fits && size >= 0 && view.shape[axis] != size) fits = false;
            expected += (axis++ ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
        }
        for (axis = 0; axis < view.ndim; axis++) found += (axis ? ", " : "") + std::to_string(view.shape[axis]);
        if (!fits)
            PyErr_Format(PyExc_ValueError, "%s: expected an array (%s) of format %.1s, got (%s) of format %s", name,
                         expected.c_str(), formats, found.c_str(), format);
        return fits;
    }
    int64_t size(int axis) const { return view.shape[axis]; }
    template <class T> T *data() const { return static_cast<T *>(view.buf); }
};

bool refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return false;
}

// Reads the layers into task; the arrays must outlive `pack`.
bool read_layers(PyObject *weights, PyObject *biases, Task &task, std::vector<std::unique_ptr<Array>> &arrays) {
    if (!PyList_Check(weights) || !PyList_Check(biases) || PyList_GET_SIZE(weights) != PyList_GET_SIZE(biases) ||
        PyList_GET_SIZE(weights) < 1)
        return refuse("weights, biases: expected two lists of the same length, at least one layer");
    constexpr int64_t MOST = 1 << 20;
    for (Py_ssize_t l = 0; l < PyList_GET_SIZE(weights); l++) {
        auto weight = std::make_unique<Array>(), bias = std::make_unique<Array>();
        const int64_t members = l ? task.members : -1, in = l ? task.layers.back().out : -1;
        if (!weight->take(PyList_GET_ITEM(weights, l), "weights", "f", {members, in, -1}, false)) return false;
        for (int axis = 0; axis < 3; axis++)
            if (weight->size(axis) < 1 || weight->size(axis) > MOST)
                return refuse("weights: expected each size to be between 1 and 2**20");
        if (!bias->take(PyList_GET_ITEM(biases, l), "biases", "f", {weight->size(0), weight->size(2)}, false)) return false;
        task.members = static_cast<int>(weight->size(0));
        task.layers.push_back({static_cast<int>(weight->size(1)), static_cast<int>(weight->size(2)),
                               weight->data<const float>(), bias->data<const float>()});
        task.activations += task.layers.back().out;
        arrays.push_back(std::move(weight));
        arrays.push_back(std::move(bias));
    }
    task.dim = task.layers.front().in;
    task.classes = task.layers.back().out;
    const int64_t fit = CHUNK_BYTES / (task.activations * LANES * static_cast<int64_t>(sizeof(float)));
    task.chunk = static_cast<int>(std::clamp<int64_t>(fit, 1, std::min(MAX_CHUNK, task.members)));
    return true;
}

PyObject *search_rows(PyObject *, PyObject *arguments, PyObject *keywords) {
    static const char *names[] = {"weights", "biases", "start", "reference", "target", "point", "steps",
                                  "target_prob_initial", "target_prob_final", "finite", "min_target_prob", "max_steps",
                                  "distance_weight", "learning_rate", "threads", nullptr};
    PyObject *weights, *biases, *starts, *references, *targets, *points, *counts, *initials, *finals, *finites;
    double min_target_prob, distance_weight, learning_rate;
    int max_steps, threads;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "$OOOOOOOOOOdiddi", const_cast<char **>(names), &weights, &biases,
                                     &starts, &references, &targets, &points, &counts, &initials, &finals, &finites,
                                     &min_target_prob, &max_steps, &distance_weight, &learning_rate, &threads))
        return nullptr;
    try {
        Task task;
        std::vector<std::unique_ptr<Array>> arrays;
        if (!read_layers(weights, biases, task, arrays)) return nullptr;
        Array start, reference, target, point, steps, initial, final_prob, finite;
        if (!start.take(starts, "start", "f", {-1, task.dim}, false)) return nullptr;
        const int64_t rows = task.rows = start.size(0);
        if (!reference.take(references, "reference", "f", {rows, task.dim}, false) ||
            !target.take(targets, "target", "lq", {rows}, false) ||
            !point.take(points, "point", "f", {rows, task.dim}, true) || !steps.take(counts, "steps", "il", {rows}, true) ||
            !initial.take(initials, "target_prob_initial", "f", {rows}, true) ||
            !final_prob.take(finals, "target_prob_final", "f", {rows}, true) ||
            !finite.take(finites, "finite", "?", {rows}, true))
            return nullptr;
        if (max_steps < 0 || threads < 1) {
            refuse("expected max_steps of at least 0 and threads of at least 1");
            return nullptr;
        }
        if (!(min_target_prob > 0 && std::isfinite(distance_weight) && std::isfinite(learning_rate))) {
            refuse("expected min_target_prob above 0, distance_weight and learning_rate to be finite");
            return nullptr;
        }
        task.target = target.data<const int64_t>();
        for (int64_t q = 0; q < rows; q++)
            if (task.target[q] < 0 || task.target[q] >= task.classes) {
                PyErr_Format(PyExc_ValueError, "target: expected classes from 0 to %d, got %lld in row %lld", task.classes - 1,
                             static_cast<long long>(task.target[q]), static_cast<long long>(q));
                return nullptr;
            }
        task.start = start.data<const float>(), task.reference = reference.data<const float>();
        task.point = point.data<float>(), task.steps = steps.data<int32_t>(), task.initial = initial.data<float>();
        task.final_prob = final_prob.data<float>(), task.finite = finite.data<uint8_t>();
        task.min_target_prob = static_cast<float>(min_target_prob);
        task.distance_weight = static_cast<float>(distance_weight);
        task.max_steps = max_steps;
        // From about 17,000 updates on the corrections are 1 in float32.
        for (int s = 1; s <= std::min(max_steps, 20000) + 1; s++) {
            task.rate.push_back(static_cast<float>(learning_rate / (1 - std::pow(0.9, s))));
            task.root.push_back(static_cast<float>(1 / std::sqrt(1 - std::pow(0.999, s))));
        }
        if (!rows) Py_RETURN_NONE;
        const int useful = static_cast<int>(std::min<int64_t>(threads, (rows + LANES - 1) / LANES));
        bool finished = false, starved = false;
        std::string broken;
        Py_BEGIN_ALLOW_THREADS;
        try {
            pack(task);
            finished = search(task, useful, [] {
                const PyGILState_STATE state = PyGILState_Ensure();
                const bool raised = PyErr_CheckSignals() != 0;
                PyGILState_Release(state);
                return raised;
            });
        } catch (const std::bad_alloc &) {
            starved = true;
        } catch (const std::exception &error) {
            broken = error.what();
        }
        Py_END_ALLOW_THREADS;
        if (starved) return PyErr_NoMemory();
        if (!broken.empty()) return PyErr_Format(PyExc_RuntimeError, "the search could not start: %s", broken.c_str());
        if (!finished) return nullptr;  // the signal's exception is set
        Py_RETURN_NONE;
    } catch (const std::bad_alloc &) {
        return PyErr_NoMemory();
    }
}

// The builds of this file that the processor can run, fastest first.
PyObject *levels(PyObject *, PyObject *) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (avx512) return Py_BuildValue("(sss)", "avx512", "avx2", "base");
    if (avx2) return Py_BuildValue("(ss)", "avx2", "base");
#endif
    return Py_BuildValue("(s)", "base");
}

PyMethodDef METHODS[] = {
    {"search", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(search_rows)), METH_VARARGS | METH_KEYWORDS,
     "Algorithm 1 for each row of start; writes point, steps, target_prob_initial, target_prob_final and finite.\n\n"
     "weights: list of (M, in, out) float32, biases: list of (M, out), a ReLU between two layers; start, reference\n"
     "(B, D) float32, target (B,) int64; point (B, D) float32, steps (B,) int32, finite (B,) bool. Arrays are taken\n"
     "through the buffer protocol, C-contiguous. Raises ValueError for what does not fit."},
    {"levels", levels, METH_NOARGS, "Names of the builds that this processor can run, fastest first."},
    {nullptr, nullptr, 0, nullptr},
};

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define JOIN_(x, y) x##y
#define JOIN(x, y) JOIN_(x, y)

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, STRING(CLARITY_MODULE), "The search of clarity for CPUs: see clarity/native/search.cpp.",
                      0, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC JOIN(PyInit_, CLARITY_MODULE)() {
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "lanes", LANES)) Py_CLEAR(module);
    return module;
}
