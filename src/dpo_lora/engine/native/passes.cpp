// What a decoder layer computes besides its products, in float32: each pass goes through memory once.
#include <cmath>

#include "vectors.h"

namespace dpo_lora {
namespace {

constexpr Int SHARE = 1 << 18;  // floats that are worth a thread: a tenth of a millisecond, a start takes a fifth of it

// work(i) for rows i in [0, count) of `width` floats each, in up to so many threads; returns `status_of` it.
template <typename Work>
int by_rows(Int count, Int width, Int threads, Work work) {
    const Int parts = std::max<Int>(1, std::min(threads, count * width / SHARE));
    return status_of([&] {
        parallel_for(parts, parts, [&](Int part) {
            for (Int i = count * part / parts; i < count * (part + 1) / parts; i++) work(i);
        });
    });
}

inline void scaled_by(const float* x, float inverse, const float* weight, float* out, Int width) {
    for (Int j = 0; j < width; j += WIDTH) store(out + j, load(x + j) * inverse * load(weight + j));
}

inline vec sigmoid(vec x) {
    const vec e = exp_nonpositive(x < vec{} ? x : -x);
    return (x < vec{} ? e : broadcast(1.0f)) / (1.0f + e);
}

}  // namespace
}  // namespace dpo_lora

using dpo_lora::Int;

// Widths are multiples of a vector's. All return `status_of`.
extern "C" {

// RMS norm. x, out [rows, width]; weight [width]; inverse [rows].
int normalise(const float* x, const float* weight, float* out, float* inverse, Int rows, Int width, float epsilon,
              Int threads) {
    using namespace dpo_lora;
    return by_rows(rows, width, threads, [=](Int i) {
        const float* row = x + i * width;
        vec squares{};
        for (Int j = 0; j < width; j += WIDTH) squares += load(row + j) * load(row + j);
        inverse[i] = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
        scaled_by(row, inverse[i], weight, out + i * width, width);
    });
}

int normalise_again(const float* x, const float* inverse, const float* weight, float* out, Int rows, Int width,
                    Int threads) {
    using namespace dpo_lora;
    return by_rows(rows, width, threads,
                   [=](Int i) { scaled_by(x + i * width, inverse[i], weight, out + i * width, width); });
}

// out = the gradient for x, plus `beside` where it is not null.
int normalise_backward(const float* grad, const float* x, const float* inverse, const float* weight,
                       const float* beside, float* out, Int rows, Int width, Int threads) {
    using namespace dpo_lora;
    return by_rows(rows, width, threads, [=](Int i) {
        const float *g = grad + i * width, *row = x + i * width, *more = beside + (beside ? i * width : 0);
        vec dot{};
        for (Int j = 0; j < width; j += WIDTH) dot += load(g + j) * load(weight + j) * load(row + j);
        const float scale = inverse[i], along = sum(dot) * scale * scale * scale / static_cast<float>(width);
        for (Int j = 0; j < width; j += WIDTH) {
            const vec own = load(g + j) * load(weight + j) * scale - load(row + j) * along;
            store(out + i * width + j, beside ? own + load(more + j) : own);
        }
    });
}

// Rotary embedding in place: x [rows, heads, 2 * half]; cos, sin [rows, half].
int rotate(float* x, const float* cos, const float* sin, Int rows, Int heads, Int half, float sign, Int threads) {
    using namespace dpo_lora;
    return by_rows(rows, heads * 2 * half, threads, [=](Int i) {
        for (Int head = 0; head < heads; head++) {
            float* a = x + (i * heads + head) * 2 * half;
            for (Int j = 0; j < half; j += WIDTH) {
                const vec c = load(cos + i * half + j), s = load(sin + i * half + j) * sign;
                const vec first = load(a + j), second = load(a + half + j);
                store(a + j, first * c - second * s);
                store(a + half + j, second * c + first * s);
            }
        }
    });
}

// out = silu(gate) * up
int gated(const float* gate, const float* up, float* out, Int rows, Int width, Int threads) {
    using namespace dpo_lora;
    return by_rows(rows, width, threads, [=](Int i) {
        for (Int j = i * width; j < (i + 1) * width; j += WIDTH)
            store(out + j, load(gate + j) * sigmoid(load(gate + j)) * load(up + j));
    });
}

// The gradient for gate in the place of `grad`, and that for up.
int gated_backward(float* grad, const float* gate, const float* up, float* d_up, Int rows, Int width, Int threads) {
    using namespace dpo_lora;
    return by_rows(rows, width, threads, [=](Int i) {
        for (Int j = i * width; j < (i + 1) * width; j += WIDTH) {
            const vec g = load(grad + j), x = load(gate + j), open = sigmoid(x);
            store(d_up + j, g * x * open);
            store(grad + j, g * load(up + j) * open * (1.0f + x * (1.0f - open)));
        }
    });
}
}
