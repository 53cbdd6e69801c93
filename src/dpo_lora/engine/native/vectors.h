// Vectors of float32 as wide as the machine's registers, and work divided among threads.
//
// The vectors are the compiler's own (GCC's and Clang's vector extension), so the same lines are AVX-512, AVX2 or NEON.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
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
inline vec broadcast(float x) { return x - vec{}; }

inline float sum(vec x) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += x[i];
    return total;
}

inline Int rounded_up(Int n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// e^min(x, 0), relative error 2e-7; 0 for x < -87; NaN for NaN. The polynomial is that of Cephes' expf.
inline vec exp_nonpositive(vec x) {
    x = x > vec{} ? vec{} : x;
    const vec shifted = x * 1.44269504f + 12582912.0f;  // the lowest bits are x / ln 2, rounded
    const vec n = shifted - 12582912.0f;
    const vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const vec scaled = (vec)((ivec)p + ((ivec)shifted << 23));
    return x < broadcast(-87.0f) ? vec{} : x == x ? scaled : x;
}

// work(i) for i in [0, count), in up to so many threads; each takes the next i when it is done with one. Where the
// system gives fewer threads, those do it all. What is thrown in one of them is thrown here, once all have stopped.
template <typename Work>
void parallel_for(Int count, Int threads, Work work) {
    std::atomic<Int> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;
    auto take = [&]() noexcept {
        try {
            for (Int i = next++; i < count; i = next++) work(i);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
            next = count;
        }
    };
    std::vector<std::thread> others;
    const Int wanted = std::min(threads, count) - 1;
    others.reserve(std::max<Int>(0, wanted));
    try {
        for (Int i = 0; i < wanted; i++) others.emplace_back(take);
    } catch (const std::exception&) {
    }
    take();
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}

// What a function for C returns: 0, or 1 where memory ran out, the one thing that can fail here.
template <typename Work>
int status_of(Work work) noexcept {
    try {
        work();
        return 0;
    } catch (...) {
        return 1;
    }
}

}  // namespace dpo_lora
