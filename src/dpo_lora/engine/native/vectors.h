// Vectors of float32 as wide as the machine's registers, and what is worked out on them.
//
// They are the compiler's own (GCC's and Clang's vector extension), so the same lines are AVX-512, AVX2 or NEON.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace dpo_lora {

using Int = std::int64_t;

// WIDTH floats a vector.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef std::int32_t ivec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

inline vec load(const float* from) { return *reinterpret_cast<const vec*>(from); }
inline void store(float* to, vec x) { *reinterpret_cast<vec*>(to) = x; }
inline vec all(float x) { return x - vec{}; }

inline float sum(vec x) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += x[i];
    return total;
}

inline Int rounded_up(Int n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// e^x for x <= 0, within 2e-7 of it; 0 below -87; NaN stays. The polynomial is Cephes' expf.
inline vec exponential(vec x) {
    const vec shifted = x * 1.44269504f + 12582912.0f;  // x / ln 2, rounded, in the lowest bits
    const vec n = shifted - 12582912.0f;
    const vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const vec scaled = (vec)((ivec)p + ((ivec)shifted << 23));
    return x < all(-87.0f) ? vec{} : x == x ? scaled : x;
}

// Work on numbers 0 to count - 1 in so many threads; each takes the next as it is done with one.
template <typename Work>
void shared_out(Int count, Int threads, Work work) {
    std::atomic<Int> next{0};
    auto take = [&] {
        for (Int i = next++; i < count; i = next++) work(i);
    };
    std::vector<std::thread> others;
    for (Int i = 1; i < std::min(threads, count); i++) others.emplace_back(take);
    take();
    for (std::thread& other : others) other.join();
}

}  // namespace dpo_lora
