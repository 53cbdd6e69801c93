// Attention of a packed row of preference pairs in float32, forward and backward.
//
// Each run's queries (dpo_lora/engine/runs.py) meet the keys that they see, in blocks of neighbouring queries of one
// head: a block's scores lie in the cache, whole rows of them, so the softmax needs no second look. Keys behind a
// causal mask or before a sliding window are not computed beyond the vectors they share with others.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "tiles.h"

namespace dpo_lora {
namespace {

constexpr Int BLOCK = 48;  // queries at a time
constexpr Int TILE = 512;  // keys at a time in the backward pass: with what belongs to them they fit a core's cache
static_assert(BLOCK % ROWS == 0 && TILE % PANEL == 0);

struct Shape {
    Int tokens, groups, repeat, size;  // G key heads, R query heads for each, D floats a head
    Int heads() const { return groups * repeat; }
    Int query_row() const { return heads() * size; }
    Int key_row() const { return groups * size; }
};

struct Run {
    std::vector<Int> rows;  // where in the packed row its keys lie, in the order of their sequence, its own last
    Int first, count, seen, given;  // queries [first, first + count), keys before its own, and of those in runs before
    Int keys() const { return seen + count; }
};

// runs: of each, how many pieces it sees and (first, length) of each piece, its own last.
std::vector<Run> read(const Int* runs, Int count) {
    std::vector<Run> found(count);
    Int given = 0;
    for (Run& run : found) {
        const Int pieces = *runs++;
        for (Int p = 0; p < pieces; p++, runs += 2) {
            run.first = runs[0], run.count = runs[1];
            for (Int i = 0; i < run.count; i++) run.rows.push_back(run.first + i);
        }
        run.seen = static_cast<Int>(run.rows.size()) - run.count, run.given = given;
        given += run.seen;
    }
    return found;
}

// Keys or values of a run across, [D, keys] in panels, zeros behind the last key; or as they are, [keys, D].
Right across(const float* from, Int row, const Run& run, Int size, std::vector<float>& into) {
    const Int panels = (run.keys() + PANEL - 1) / PANEL;
    into.resize(panels * PANEL * size);
    for (Int j = 0; j < panels * PANEL; j++) {
        float* column = &into[j / PANEL * PANEL * size + j % PANEL];
        for (Int d = 0; d < size; d++) column[d * PANEL] = j < run.keys() ? from[run.rows[j] * row + d] : 0.0f;
    }
    return {into.data(), PANEL, PANEL * size};
}

Right panels_from(Right x, Int column) { return {x.data + column / PANEL * x.panel, x.row, x.panel}; }

Right gathered(const float* from, Int row, const Run& run, Int size, std::vector<float>& into) {
    into.resize(run.keys() * size);
    for (Int j = 0; j < run.keys(); j++) std::memcpy(&into[j * size], from + run.rows[j] * row, size * sizeof(float));
    return in_rows(into.data(), size);
}

struct Range {
    Int begin, end;
    Int length() const { return end - begin; }
    Range within(Range other) const {
        const Int from = std::clamp(begin, other.begin, other.end);
        return {from, std::clamp(end, from, other.end)};
    }
};

// The keys that a run's query sees, where so many keys of its sequence lie before the run's own. Both count from any key
// of the sequence: what is seen before that one is left out.
Range seen_by(Int query, Int before, Int window) {
    const Int last = before + query + 1;
    return {window ? std::max<Int>(0, last - window) : 0, std::max<Int>(0, last)};
}

// A block of a run's queries, numbers [at, at + count), and the whole panels and vectors of the keys it sees.
struct Block {
    Int at, count;
    Range keys;
};

// The blocks of so many queries that see some of the first `keys` keys.
template <typename Work>
void by_blocks(Int queries, Int before, Int window, Int keys, Work work) {
    for (Int at = 0; at < queries; at += BLOCK) {
        const Int count = std::min(BLOCK, queries - at);
        const Int begin = seen_by(at, before, window).begin / PANEL * PANEL;
        const Int end = rounded_up(seen_by(at + count - 1, before, window).end);
        const Block block{at, count, Range{begin, end}.within({0, rounded_up(keys)})};
        if (block.keys.length()) work(block);
    }
}

// Nothing is left of a row of scores in the block's range where the query does not see. The whole vectors around what
// it sees are what remains to be worked on.
Range hide(float* scores, Range seen, Range block) {
    const Range whole{seen.begin / WIDTH * WIDTH, rounded_up(seen.end)};
    std::fill(scores + block.begin, scores + whole.begin, 0.0f);
    std::fill(scores + whole.begin, scores + seen.begin, -std::numeric_limits<float>::infinity());
    std::fill(scores + seen.end, scores + whole.end, -std::numeric_limits<float>::infinity());
    std::fill(scores + whole.end, scores + block.end, 0.0f);
    return whole;
}

// The softmax of a row of scores is exp((score - top) * scale) * inverse; both are kept for the backward pass. As one
// number, top * scale - log(inverse), they would lose what a large top leaves no digits for.
struct Level {
    float top, inverse;
};

Level softmax(float* scores, Range keys, float scale) {
    vec highest = all(-std::numeric_limits<float>::infinity());
    for (Int j = keys.begin; j < keys.end; j += WIDTH) {
        const vec x = load(scores + j);
        highest = x > highest ? x : highest;
    }
    float top = highest[0];
    for (int i = 1; i < WIDTH; i++) top = std::max(top, highest[i]);
    vec total{};
    for (Int j = keys.begin; j < keys.end; j += WIDTH) {
        const vec x = exponential((load(scores + j) - top) * scale);
        store(scores + j, x);
        total += x;
    }
    const Level level{top, 1.0f / sum(total)};
    for (Int j = keys.begin; j < keys.end; j += WIDTH) store(scores + j, load(scores + j) * level.inverse);
    return level;
}

// out [count, D] (+)= weights [count, keys] times x [keys, D]: ROWS queries at a time, up to the last key they see.
template <bool ADD>
void weighted(const Block& block, Int before, const float* weights, Int wide, Right x, Int size, float* out, Int row) {
    for (Int i = 0; i < block.count; i += ROWS) {
        const Int rows = std::min<Int>(ROWS, block.count - i);
        const Range met = block.keys.within({0, seen_by(block.at + i + rows - 1, before, 0).end});
        const Right values{x.data + met.begin * x.row, x.row, x.panel};
        product<ADD>(rows, size, met.length(), {weights + i * wide + met.begin, wide, 1}, values, out + i * row, row);
    }
}

void attend(const Run& run, Int group, const Shape& s, const float* q, const float* k, const float* v, float* out,
            Level* levels, float scale, Int window) {
    static thread_local std::vector<float> k_across, v_rows, scores;
    const Right keys = across(k + group * s.size, s.key_row(), run, s.size, k_across);
    const Right values = gathered(v + group * s.size, s.key_row(), run, s.size, v_rows);
    const Int wide = rounded_up(run.keys()) | WIDTH, row = s.query_row();
    scores.resize(BLOCK * wide);
    for (Int head = group * s.repeat; head < (group + 1) * s.repeat; head++)
        by_blocks(run.count, run.seen, window, run.keys(), [&](const Block& block) {
            const Int place = (run.first + block.at) * row + head * s.size, begin = block.keys.begin;
            product<false>(block.count, block.keys.length(), s.size, {q + place, row, 1}, panels_from(keys, begin),
                           &scores[begin], wide);
            for (Int i = 0; i < block.count; i++) {
                float* of_query = &scores[i * wide];
                const Range whole = hide(of_query, seen_by(block.at + i, run.seen, window), block.keys);
                levels[(run.first + block.at + i) * s.heads() + head] = softmax(of_query, whole, scale);
            }
            weighted<false>(block, run.seen, scores.data(), wide, values, s.size, out + place, row);
        });
}

struct Gradients {
    float *q, *k, *v;
};

void attend_backward(const Run& run, Int group, const Shape& s, const float* grad, const float* q, const float* k,
                     const float* v, const float* out, const Level* levels, Gradients into, Gradients given,
                     float scale, Int window) {
    static thread_local std::vector<float> k_across, v_across, k_rows, p, dp, d_keys, d_values;
    constexpr Int wide = TILE + WIDTH;  // rows a power of two apart would share a few places of the cache
    const Int size = s.size, row = s.query_row();
    const Right keys_across = across(k + group * size, s.key_row(), run, size, k_across);
    const Right values_across = across(v + group * size, s.key_row(), run, size, v_across);
    const Right keys = gathered(k + group * size, s.key_row(), run, size, k_rows);
    p.resize(BLOCK * wide), dp.resize(BLOCK * wide);
    d_keys.assign(run.keys() * size, 0.0f), d_values.assign(run.keys() * size, 0.0f);

    // One head's block of queries and the keys from `first` on, from which the block counts its own.
    auto meet = [&](Int head, Int first, const Block& block) {
        const Int place = (run.first + block.at) * row + head * size, before = run.seen - first;
        const Int begin = block.keys.begin, met = block.keys.length();
        const float *queries = q + place, *upstream = grad + place;
        product<false>(block.count, met, size, {queries, row, 1}, panels_from(keys_across, first + begin), &p[begin], wide);
        product<false>(block.count, met, size, {upstream, row, 1}, panels_from(values_across, first + begin), &dp[begin],
                       wide);
        for (Int i = 0; i < block.count; i++) {
            const float *of_out = out + place + i * row, *of_grad = upstream + i * row;
            vec along{};  // sum_j p_j dp_j over all keys is the output times its gradient
            for (Int d = 0; d < size; d += WIDTH) along += load(of_out + d) * load(of_grad + d);
            const float mean = sum(along);
            const Level level = levels[(run.first + block.at + i) * s.heads() + head];
            float *of_p = &p[i * wide], *of_dp = &dp[i * wide];
            const Range whole = hide(of_p, seen_by(block.at + i, before, window).within(block.keys), block.keys);
            std::fill(of_dp + block.keys.begin, of_dp + whole.begin, 0.0f);
            std::fill(of_dp + whole.end, of_dp + block.keys.end, 0.0f);
            for (Int j = whole.begin; j < whole.end; j += WIDTH) {
                const vec probability = exponential((load(of_p + j) - level.top) * scale) * level.inverse;
                store(of_p + j, probability);
                store(of_dp + j, probability * (load(of_dp + j) - mean) * scale);
            }
        }
        const bool begun = seen_by(block.at, run.seen, window).begin / PANEL * PANEL < first;
        const Right from_first{keys.data + first * size, keys.row, keys.panel};
        (begun ? weighted<true> : weighted<false>)(block, before, dp.data(), wide, from_first, size, into.q + place, row);
        const Int rows = std::min(met, run.keys() - first - begin), to = (first + begin) * size;
        product<true>(rows, size, block.count, {&dp[begin], 1, wide}, in_rows(queries, row), &d_keys[to], size);
        product<true>(rows, size, block.count, {&p[begin], 1, wide}, in_rows(upstream, row), &d_values[to], size);
    };
    for (Int first = 0; first < run.keys(); first += TILE)
        for (Int head = group * s.repeat; head < (group + 1) * s.repeat; head++)
            by_blocks(run.count, run.seen - first, window, std::min(TILE, run.keys() - first),
                      [&](const Block& block) { meet(head, first, block); });

    // What only this run's queries have met so far goes where it belongs, what is for earlier runs' keys is put aside.
    for (Int j = 0; j < run.keys(); j++) {
        const bool own = j >= run.seen;
        const Int to = (own ? run.rows[j] : run.given + j) * s.key_row() + group * size;
        std::memcpy((own ? into.k : given.k) + to, &d_keys[j * size], size * sizeof(float));
        std::memcpy((own ? into.v : given.v) + to, &d_values[j * size], size * sizeof(float));
    }
}

}  // namespace
}  // namespace dpo_lora

using dpo_lora::Int;

// q, out [T, G * R, D]; k, v [T, G, D]; levels [T, G * R, 2]; shape {T, G, R, D}, D a multiple of a vector's width;
// runs as `read` wants them; window 0 for none. The gradients have the shapes of q, k and v.
extern "C" {

Int vector_width() { return dpo_lora::WIDTH; }

void attend(const float* q, const float* k, const float* v, float* out, float* levels, const Int* shape, const Int* runs,
            Int run_count, Int window, float scale, Int threads) {
    using namespace dpo_lora;
    const Shape s{shape[0], shape[1], shape[2], shape[3]};
    const std::vector<Run> found = read(runs, run_count);
    shared_out(run_count * s.groups, threads, [&](Int i) {
        attend(found[i / s.groups], i % s.groups, s, q, k, v, out, reinterpret_cast<Level*>(levels), scale, window);
    });
}

void attend_backward(const float* grad, const float* q, const float* k, const float* v, const float* out,
                     const float* levels, float* d_q, float* d_k, float* d_v, const Int* shape, const Int* runs,
                     Int run_count, Int window, float scale, Int threads) {
    using namespace dpo_lora;
    const Shape s{shape[0], shape[1], shape[2], shape[3]};
    const std::vector<Run> found = read(runs, run_count);
    const Int given_rows = run_count ? found.back().given + found.back().seen : 0;
    std::vector<float> given_k(given_rows * s.key_row()), given_v(given_rows * s.key_row());
    const Gradients into{d_q, d_k, d_v}, given{nullptr, given_k.data(), given_v.data()};
    shared_out(run_count * s.groups, threads, [&](Int i) {
        attend_backward(found[i / s.groups], i % s.groups, s, grad, q, k, v, out,
                        reinterpret_cast<const Level*>(levels), into, given, scale, window);
    });
    // A run's keys before its own lie in earlier runs; the order of the sum is the runs', whoever was done first.
    for (const Run& run : found)
        for (Int j = 0; j < run.seen; j++)
            for (Int d = 0; d < s.key_row(); d++) {
                d_k[run.rows[j] * s.key_row() + d] += given_k[(run.given + j) * s.key_row() + d];
                d_v[run.rows[j] * s.key_row() + d] += given_v[(run.given + j) * s.key_row() + d];
            }
}
}
