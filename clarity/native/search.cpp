// Algorithm 1 over stacked latent classifiers on CPUs: many searches in parallel, one for each vector lane.
//
// No operation mixes lanes, so that a row's bits depend neither on the other rows, nor on their order, nor on the number
// of threads. What makes it fast:
//   - a weight is a broadcast operand, and up to TILE outputs x GROUPS vectors of lanes accumulate in registers, which
//     keeps both multiply-add units busy;
//   - members go through a layer in chunks, so that one member's multiplications hide another's latencies;
//   - a lane whose search has ended takes the next row at once;
//   - the weights are packed once, in the order in which both passes read them.
// One source, compiled once for each instruction set under a module name of its own. Vectors are the compiler's
// extension, so that gcc or clang can build the base version anywhere. Not to be built with -ffast-math: loading such a
// library disables denormals in the whole process, and the tests for NaN are optimised away.

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
#define CLARITY_MODULE _clarity_engine_base
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
constexpr int MAX_CHUNK = 4;            // members computed together in a layer
constexpr int64_t CHUNK_BYTES = 32768;  // of their activations, which should stay in the first-level cache

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Int __attribute__((vector_size(WIDTH * 4)));

INLINE Vec splat(float x) { return x - (Vec){}; }
// Maximum; y where either is NaN, so that a NaN in y survives.
INLINE Vec larger(Vec x, Vec y) {
#ifdef __AVX512F__  // gcc does not compile the line below to this instruction
    return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y)));
#else
    return x > y ? x : y;
#endif
}

struct Layer {
    int in, out;
    const float *weight, *bias;  // (M, in, out), (M, out)
};

// The number of tiles that `size` is split into, and the first unit of tile t of n.
INLINE int tiles(int size) { return (size + TILE - 1) / TILE; }
INLINE int bound(int size, int n, int t) { return static_cast<int>(static_cast<int64_t>(size) * t / n); }

// What the threads share. A task is a search, or, where `gradient` is set, one evaluation for each row of `start`.
struct Task {
    int64_t rows = 0;
    int dim = 0, classes = 0, members = 0;
    int chunk = 1;            // members computed together in a layer
    int64_t activations = 0;  // of one member: all hidden layers and the logits
    std::vector<Layer> layers;
    std::vector<float> packed;  // the weights in the order in which `Worker::evaluate` reads them
    const float *start = nullptr, *reference = nullptr, *min_target_prob = nullptr;
    const float *fixed = nullptr;  // (directions, dim), orthonormal: no update moves along them
    int64_t directions = 0;
    const int64_t *target = nullptr;
    float distance_weight = 0;
    int max_steps = 0;
    std::vector<float> rate, root;  // Adam's bias corrections after step + 1 updates, as torch.optim.Adam rounds them
    float *point = nullptr, *initial = nullptr, *final_prob = nullptr, *gradient = nullptr;
    int32_t *steps = nullptr;
    uint8_t *finite = nullptr;
    std::atomic<int64_t> next{0};
    std::atomic<bool> stop{false};
};

enum class First { bias, zero, add };     // initial value of the accumulators
enum class Last { none, relu, masked };   // what is applied to them at the end

// y[r] = last(first + sum over i of w[i][r] * x[i]) for R units and all lanes. The inputs are `parts` runs of `count`,
// `next` apart. Returns the end of the weights.
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

// The same for `size` units, tile by tile.
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
    x = larger(splat(-100.f), x);  // smaller powers count as 2^-100: denormal numbers are slow
#ifdef __AVX512F__
    const Vec f = reinterpret_cast<Vec>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEG_INF));
#else
    constexpr float MAGIC = 12582912.f + 127.f;  // 1.5 * 2^23 + bias: adding it rounds, its low bits are the exponent
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

enum class Of { cross_entropy, probability };  // what is differentiated

// Softmax in place of logits in units of log 2. Leaves the gradient of the target's cross-entropy, or of its
// probability, by the logits in natural units; adds the target's probability to prob.
template <Of OF>
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
        UNROLL for (int g = 0; g < GROUPS; g++) {
            if (OF == Of::cross_entropy) p[g] = p[g] * sum[g] - o[g];
            else p[g] = (o[g] - p[g] * sum[g]) * (chosen[g] * sum[g]);
        }
}

INLINE Vec root_of(Vec x) {
    Vec y;
    UNROLL for (int j = 0; j < WIDTH; j++) y[j] = std::sqrt(x[j]);
    return y;
}

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

// One thread: LANES rows at a time.
class Worker {
    Task &task;
    const int D, K;
    Buffer memory;
    Vec *z, *moved, *reference, *mean, *square, *grad, *onehot, *active;
    int64_t row[LANES];
    int step[LANES];
    float limit[LANES];  // the probability to exceed
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
            if (task.gradient) {
                evaluate<Of::probability>();
                any = write_values();
            } else {
                evaluate<Of::cross_entropy>();
                const uint64_t odd = update();
                any = settle(odd);
            }
        }
    }

   private:
    // Puts the next waiting row into lane j. Without one, the lane goes on at 0, to no effect.
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
        limit[j] = found && task.min_target_prob ? task.min_target_prob[q] : 0;
        row[j] = found ? q : -1;
        return found;
    }

    // Sums over the members: the target's probability, and the gradient of what is differentiated.
    template <Of OF>
    void evaluate() {
        const Layer *layers = task.layers.data();
        const int depth = static_cast<int>(task.layers.size());
        const int64_t stride = task.activations * GROUPS;
        const float *w = task.packed.data();
        UNROLL for (int g = 0; g < GROUPS; g++) prob[g] = (Vec){};
        for (int k = 0; k < D * GROUPS; k++) grad[k] = (Vec){};
        for (int m = 0; m < task.members; m += task.chunk) {
            Vec *const end = active + std::min(task.chunk, task.members - m) * stride;
            int64_t at = 0, before = 0;  // offsets of a layer's outputs and of the previous layer's
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
            for (Vec *p = active; p < end; p += stride) softmax<OF>(p + at, onehot, K, prob);
            // Backwards: the gradient by a layer's outputs overwrites the outputs.
            for (int l = depth - 1; l; l--) {
                before = at - static_cast<int64_t>(layers[l].in) * GROUPS;
                for (Vec *p = active; p < end; p += stride)
                    w = pass<First::zero, Last::masked>(w, p + at, layers[l].out, p + before, layers[l].in);
                at = before;
            }
            w = pass<First::add, Last::none>(w, active, layers[0].out, grad, D, static_cast<int>((end - active) / stride), stride);
        }
    }

    // Writes Adam's next points into `moved`. Returns the lanes whose next point is not finite, as bits.
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
            if (task.directions) check = project(g);
            for (int j = 0; j < WIDTH; j++) odd |= static_cast<uint64_t>(!(check[j] == 0)) << (g * WIDTH + j);
        }
        return odd;
    }

    // Removes from the step from z to `moved` its part along each fixed direction, for one group of lanes. Returns 0
    // where the result is finite.
    __attribute__((noinline)) Vec project(int g) {
        for (int64_t q = 0; q < task.directions; q++) {
            const float *direction = task.fixed + q * D;
            Vec along = {};
            for (int k = 0; k < D; k++) along += direction[k] * (moved[k * GROUPS + g] - z[k * GROUPS + g]);
            for (int k = 0; k < D; k++) moved[k * GROUPS + g] -= direction[k] * along;
        }
        Vec check = {};
        for (int k = 0; k < D; k++) check += moved[k * GROUPS + g] * 0.f;
        return check;
    }

    // Writes the means over the members and loads the next rows. False when no lane has a row left.
    bool write_values() {
        const float members = static_cast<float>(task.members);
        bool any = false;
        for (int j = 0; j < LANES; j++) {
            const int64_t q = row[j];
            if (q < 0) continue;
            task.final_prob[q] = prob[j / WIDTH][j % WIDTH] / members;
            for (int k = 0; k < D; k++) task.gradient[q * D + k] = at(grad, k, j) / members;
            any |= load(j);
        }
        return any;
    }

    // Writes the rows that have ended, moves the others, loads the next ones. False when no lane has a row left.
    bool settle(uint64_t odd) {
        const float members = static_cast<float>(task.members);
        bool any = false;
        std::swap(z, moved);  // from here on `moved` holds the points that were evaluated
        for (int j = 0; j < LANES; j++) {
            const int64_t q = row[j];
            if (q < 0) continue;
            const float p = prob[j / WIDTH][j % WIDTH] / members;
            if (!step[j]) task.initial[q] = p;
            const bool reached = p > limit[j], last = step[j] >= task.max_steps, known = std::isfinite(p);
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

// Packs the weights in the order of Worker::evaluate: for each chunk of members forwards and then backwards through the
// layers; forwards, for each member and tile of outputs, its biases and a row for each input; backwards, for each member
// and tile of inputs, a row for each output; in the first layer the tile is the outer loop.
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

// Runs `threads` workers to the end, polling `interrupted`. False when that returned true and the workers were stopped.
// Throws bad_alloc and, when not one thread could be started, system_error.
template <class Poll>
bool run_workers(Task &task, int threads, Poll interrupted) {
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
        } catch (const std::system_error &) {  // no more threads are allowed: those that run do the work
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

// A C-contiguous array of Python, borrowed for the lifetime of this object.
class Array {
    Py_buffer view{};

   public:
    Array() = default;
    Array(const Array &) = delete;
    ~Array() { PyBuffer_Release(&view); }

    // False, with a Python error, unless the object is an array of this type and shape (-1: any size).
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

bool read_target(PyObject *object, Array &target, Task &task) {
    if (!target.take(object, "target", "lq", {task.rows}, false)) return false;
    task.target = target.data<const int64_t>();
    for (int64_t q = 0; q < task.rows; q++)
        if (task.target[q] < 0 || task.target[q] >= task.classes) {
            PyErr_Format(PyExc_ValueError, "target: expected classes from 0 to %d, got %lld in row %lld", task.classes - 1,
                         static_cast<long long>(task.target[q]), static_cast<long long>(q));
            return false;
        }
    return true;
}

// Packs the weights and runs the task without the GIL. None, or null with a Python error.
PyObject *run(Task &task, int threads) {
    if (!task.rows) Py_RETURN_NONE;
    const int useful = static_cast<int>(std::min<int64_t>(threads, (task.rows + LANES - 1) / LANES));
    bool finished = false, starved = false;
    std::string broken;
    Py_BEGIN_ALLOW_THREADS;
    try {
        pack(task);
        finished = run_workers(task, useful, [] {
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
    if (!finished) return nullptr;  // the signal handler's exception is set
    Py_RETURN_NONE;
}

PyObject *search(PyObject *, PyObject *arguments, PyObject *keywords) {
    static const char *names[] = {"weights", "biases", "start", "reference", "target", "min_target_prob", "fixed", "point",
                                  "steps", "target_prob_initial", "target_prob_final", "finite", "max_steps",
                                  "distance_weight", "learning_rate", "threads", nullptr};
    PyObject *weights, *biases, *starts, *references, *targets, *limits, *directions;
    PyObject *points, *counts, *initials, *finals, *finites;
    double distance_weight, learning_rate;
    int max_steps, threads;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "$OOOOOOOOOOOOiddi", const_cast<char **>(names), &weights,
                                     &biases, &starts, &references, &targets, &limits, &directions, &points, &counts,
                                     &initials, &finals, &finites, &max_steps, &distance_weight, &learning_rate, &threads))
        return nullptr;
    try {
        Task task;
        std::vector<std::unique_ptr<Array>> arrays;
        if (!read_layers(weights, biases, task, arrays)) return nullptr;
        Array start, reference, target, limit, fixed, point, steps, initial, final_prob, finite;
        if (!start.take(starts, "start", "f", {-1, task.dim}, false)) return nullptr;
        const int64_t rows = task.rows = start.size(0);
        if (!reference.take(references, "reference", "f", {rows, task.dim}, false) || !read_target(targets, target, task) ||
            !limit.take(limits, "min_target_prob", "f", {rows}, false) ||
            !fixed.take(directions, "fixed", "f", {-1, task.dim}, false) ||
            !point.take(points, "point", "f", {rows, task.dim}, true) || !steps.take(counts, "steps", "il", {rows}, true) ||
            !initial.take(initials, "target_prob_initial", "f", {rows}, true) ||
            !final_prob.take(finals, "target_prob_final", "f", {rows}, true) ||
            !finite.take(finites, "finite", "?", {rows}, true))
            return nullptr;
        if (max_steps < 0 || threads < 1) {
            refuse("expected max_steps of at least 0 and threads of at least 1");
            return nullptr;
        }
        if (!(std::isfinite(distance_weight) && std::isfinite(learning_rate))) {
            refuse("expected distance_weight and learning_rate to be finite");
            return nullptr;
        }
        task.start = start.data<const float>(), task.reference = reference.data<const float>();
        task.min_target_prob = limit.data<const float>();
        task.fixed = fixed.data<const float>(), task.directions = fixed.size(0);
        task.point = point.data<float>(), task.steps = steps.data<int32_t>(), task.initial = initial.data<float>();
        task.final_prob = final_prob.data<float>(), task.finite = finite.data<uint8_t>();
        for (int64_t q = 0; q < rows; q++)
            if (!(task.min_target_prob[q] > 0)) {
                refuse("min_target_prob: expected numbers above 0");
                return nullptr;
            }
        task.distance_weight = static_cast<float>(distance_weight);
        task.max_steps = max_steps;
        // From about 17,000 updates on the corrections are 1 in float32.
        for (int s = 1; s <= std::min(max_steps, 20000) + 1; s++) {
            task.rate.push_back(static_cast<float>(learning_rate / (1 - std::pow(0.9, s))));
            task.root.push_back(static_cast<float>(1 / std::sqrt(1 - std::pow(0.999, s))));
        }
        return run(task, threads);
    } catch (const std::bad_alloc &) {
        return PyErr_NoMemory();
    }
}

PyObject *value_and_grad(PyObject *, PyObject *arguments, PyObject *keywords) {
    static const char *names[] = {"weights", "biases", "points", "target", "target_prob", "gradient", "threads", nullptr};
    PyObject *weights, *biases, *points, *targets, *probs, *gradients;
    int threads;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "$OOOOOOi", const_cast<char **>(names), &weights, &biases,
                                     &points, &targets, &probs, &gradients, &threads))
        return nullptr;
    try {
        Task task;
        std::vector<std::unique_ptr<Array>> arrays;
        if (!read_layers(weights, biases, task, arrays)) return nullptr;
        Array point, target, prob, gradient;
        if (!point.take(points, "points", "f", {-1, task.dim}, false)) return nullptr;
        const int64_t rows = task.rows = point.size(0);
        if (!read_target(targets, target, task) || !prob.take(probs, "target_prob", "f", {rows}, true) ||
            !gradient.take(gradients, "gradient", "f", {rows, task.dim}, true))
            return nullptr;
        if (threads < 1) {
            refuse("expected threads of at least 1");
            return nullptr;
        }
        task.start = task.reference = point.data<const float>();
        task.final_prob = prob.data<float>(), task.gradient = gradient.data<float>();
        return run(task, threads);
    } catch (const std::bad_alloc &) {
        return PyErr_NoMemory();
    }
}

// The builds of this file that the processor can run, fastest first.
PyObject *builds(PyObject *, PyObject *) {
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
    {"search", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(search)), METH_VARARGS | METH_KEYWORDS,
     "Algorithm 1 for each row of start; writes point, steps, target_prob_initial, target_prob_final and finite.\n\n"
     "weights: list of (M, in, out) float32, biases: list of (M, out), a ReLU between two layers; start, reference\n"
     "(B, D) float32, target (B,) int64, min_target_prob (B,) float32, fixed (k, D) float32 with orthonormal rows;\n"
     "point (B, D) float32, steps (B,) int32, finite (B,) bool. Arrays are read through the buffer protocol,\n"
     "C-contiguous. Raises ValueError for arguments that do not fit."},
    {"value_and_grad", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(value_and_grad)),
     METH_VARARGS | METH_KEYWORDS,
     "Mean target probability of each of the points (B, D) into target_prob (B,), its gradient into gradient (B, D)."},
    {"builds", builds, METH_NOARGS, "Names of the builds that this processor can run, fastest first."},
    {nullptr, nullptr, 0, nullptr},
};

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define JOIN_(x, y) x##y
#define JOIN(x, y) JOIN_(x, y)

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, STRING(CLARITY_MODULE), "Algorithm 1 on CPUs: see clarity/native/search.cpp.",
                      0, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC JOIN(PyInit_, CLARITY_MODULE)() {
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "lanes", LANES)) Py_CLEAR(module);
    return module;
}
