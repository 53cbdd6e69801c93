// Attention of a packed row of preference pairs in float32, forward and backward.
//
// A run's queries meet the keys that they see in blocks of neighbouring queries of one head. A block's scores stay in
// the cache, in the forward pass for all keys at once, so the softmax needs no second look. Of what a causal mask or a
// sliding window hides, only the rest of a block's panels is computed.
#include <vector>

#include "packed_row.h"

namespace dpo_lora {
namespace {

constexpr Int BLOCK = 48;  // queries at a time
constexpr Int TILE = 512;  // keys at a time in the backward pass: with what belongs to them they fit a core's cache
static_assert(BLOCK % ROWS == 0 && TILE % PANEL == 0);

// The softmax of a row of scores is exp((score - max) * scale) * inverse_sum. As one number, max * scale + log(sum),
// the two would lose what a large maximum leaves no digits for.
struct RowStats {
    float max, inverse_sum;
};

RowStats softmax(float* scores, Range keys, float scale) {
    vec highest = broadcast(-std::numeric_limits<float>::infinity());
    for (Int j = keys.begin; j < keys.end; j += WIDTH) {
        const vec x = load(scores + j);
        highest = x > highest ? x : highest;
    }
    float max = highest[0];
    for (int i = 1; i < WIDTH; i++) max = std::max(max, highest[i]);
    vec total{};
    for (Int j = keys.begin; j < keys.end; j += WIDTH) {
        const vec x = exp_nonpositive((load(scores + j) - max) * scale);
        store(scores + j, x);
        total += x;
    }
    const RowStats stats{max, 1.0f / sum(total)};
    for (Int j = keys.begin; j < keys.end; j += WIDTH) store(scores + j, load(scores + j) * stats.inverse_sum);
    return stats;
}

// out [count, D] (+)= weights [count, keys] times x [keys, D]: ROWS queries at a time, up to the last key they see.
template <bool ADD>
void weighted_sum(const Block& block, Int before, const float* weights, Int wide, Right x, Int size, float* out,
                  Int row) {
    for (Int i = 0; i < block.count; i += ROWS) {
        const Int rows = std::min<Int>(ROWS, block.count - i);
        const Range met = block.keys.within({0, visible_keys(block.at + i + rows - 1, before, 0).end});
        const Right values{x.data + met.begin * x.row, x.row, x.panel};
        product<ADD>(rows, size, met.length(), {weights + i * wide + met.begin, wide, 1}, values, out + i * row, row);
    }
}

void attend(const Run& run, Int group, const Shape& s, const float* q, const float* k, const float* v, float* out,
            RowStats* stats, float scale, Int window) {
    static thread_local std::vector<float> k_transposed, v_rows, scores;
    const Right keys = transposed(k + group * s.size, s.key_row(), run, s.size, k_transposed);
    const Right values = gathered(v + group * s.size, s.key_row(), run, s.size, v_rows);
    const Int wide = rounded_up(run.keys()) | WIDTH, row = s.query_row();
    scores.resize(BLOCK * wide);
    for (Int head = group * s.repeat; head < (group + 1) * s.repeat; head++)
        by_blocks(run.count, BLOCK, run.seen, window, run.keys(), [&](const Block& block) {
            const Int place = (run.first + block.at) * row + head * s.size, begin = block.keys.begin;
            product<false>(block.count, block.keys.length(), s.size, {q + place, row, 1}, panels_from(keys, begin),
                           &scores[begin], wide);
            for (Int i = 0; i < block.count; i++) {
                float* of_query = &scores[i * wide];
                const Range whole = mask(of_query, visible_keys(block.at + i, run.seen, window), block.keys);
                stats[(run.first + block.at + i) * s.heads() + head] = softmax(of_query, whole, scale);
            }
            weighted_sum<false>(block, run.seen, scores.data(), wide, values, s.size, out + place, row);
        });
}

struct Gradients {
    float *q, *k, *v;
};

void attend_backward(const Run& run, Int group, const Shape& s, const float* grad, const float* q, const float* k,
                     const float* v, const float* out, const RowStats* stats, Gradients into, Gradients given,
                     float scale, Int window) {
    static thread_local std::vector<float> k_transposed, v_transposed, k_rows, p, dp, d_keys, d_values;
    constexpr Int wide = TILE + WIDTH;  // rows a power of two apart would share a few places of the cache
    const Int size = s.size, row = s.query_row();
    const Right keys_t = transposed(k + group * size, s.key_row(), run, size, k_transposed);
    const Right values_t = transposed(v + group * size, s.key_row(), run, size, v_transposed);
    const Right keys = gathered(k + group * size, s.key_row(), run, size, k_rows);
    p.resize(BLOCK * wide), dp.resize(BLOCK * wide);
    d_keys.assign(run.keys() * size, 0.0f), d_values.assign(run.keys() * size, 0.0f);

    // One head's block of queries, and the keys of the tile that begins with key `first`, from which the block's count.
    auto meet = [&](Int head, Int first, const Block& block) {
        const Int place = (run.first + block.at) * row + head * size, before = run.seen - first;
        const Int begin = block.keys.begin, met = block.keys.length();
        const float *queries = q + place, *upstream = grad + place;
        product<false>(block.count, met, size, {queries, row, 1}, panels_from(keys_t, first + begin), &p[begin], wide);
        product<false>(block.count, met, size, {upstream, row, 1}, panels_from(values_t, first + begin), &dp[begin],
                       wide);
        for (Int i = 0; i < block.count; i++) {
            const float *of_out = out + place + i * row, *of_grad = upstream + i * row;
            vec products{};
            for (Int d = 0; d < size; d += WIDTH) products += load(of_out + d) * load(of_grad + d);
            const float delta = sum(products);  // sum_j p_j dp_j over all keys, also those of other tiles
            const RowStats row_stats = stats[(run.first + block.at + i) * s.heads() + head];
            float *of_p = &p[i * wide], *of_dp = &dp[i * wide];
            const Range visible = visible_keys(block.at + i, before, window).within(block.keys);
            const Range whole = mask(of_p, visible, block.keys);
            std::fill(of_dp + block.keys.begin, of_dp + whole.begin, 0.0f);
            std::fill(of_dp + whole.end, of_dp + block.keys.end, 0.0f);
            for (Int j = whole.begin; j < whole.end; j += WIDTH) {
                const vec shifted = (load(of_p + j) - row_stats.max) * scale;
                const vec probability = exp_nonpositive(shifted) * row_stats.inverse_sum;
                store(of_p + j, probability);
                store(of_dp + j, probability * (load(of_dp + j) - delta) * scale);
            }
        }
        const bool begun =
            visible_keys(block.at, run.seen, window).begin / PANEL * PANEL < first;  // in an earlier tile
        const Right from_first{keys.data + first * size, keys.row, keys.panel};
        (begun ? weighted_sum<true> : weighted_sum<false>)(block, before, dp.data(), wide, from_first, size,
                                                           into.q + place, row);
        const Int rows = std::min(met, run.keys() - first - begin), to = (first + begin) * size;
        product<true>(rows, size, block.count, {&dp[begin], 1, wide}, in_rows(queries, row), &d_keys[to], size);
        product<true>(rows, size, block.count, {&p[begin], 1, wide}, in_rows(upstream, row), &d_values[to], size);
    };
    for (Int first = 0; first < run.keys(); first += TILE)
        for (Int head = group * s.repeat; head < (group + 1) * s.repeat; head++)
            by_blocks(run.count, BLOCK, run.seen - first, window, std::min(TILE, run.keys() - first),
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

// q, out [T, G * R, D]; k, v [T, G, D]; stats [T, G * R, 2]; shape {G, R, D}, D a multiple of a vector's width; runs as
// `read_runs` wants them; window 0 for none. The gradients have the shapes of q, k and v. All return `status_of`.
extern "C" {

Int vector_width() { return dpo_lora::WIDTH; }

int attend(const float* q, const float* k, const float* v, float* out, float* stats, const Int* shape, const Int* runs,
           Int run_count, Int window, float scale, Int threads) {
    using namespace dpo_lora;
    return status_of([&] {
        const Shape s{shape[0], shape[1], shape[2]};
        const std::vector<Run> found = read_runs(runs, run_count);
        parallel_for(run_count * s.groups, threads, [&](Int i) {
            attend(found[i / s.groups], i % s.groups, s, q, k, v, out, reinterpret_cast<RowStats*>(stats), scale,
                   window);
        });
    });
}

int attend_backward(const float* grad, const float* q, const float* k, const float* v, const float* out,
                    const float* stats, float* d_q, float* d_k, float* d_v, const Int* shape, const Int* runs,
                    Int run_count, Int window, float scale, Int threads) {
    using namespace dpo_lora;
    return status_of([&] {
        const Shape s{shape[0], shape[1], shape[2]};
        const std::vector<Run> found = read_runs(runs, run_count);
        const Int given_rows = run_count ? found.back().given + found.back().seen : 0;
        std::vector<float> given_k(given_rows * s.key_row()), given_v(given_rows * s.key_row());
        const Gradients into{d_q, d_k, d_v}, given{nullptr, given_k.data(), given_v.data()};
        parallel_for(run_count * s.groups, threads, [&](Int i) {
            attend_backward(found[i / s.groups], i % s.groups, s, grad, q, k, v, out,
                            reinterpret_cast<const RowStats*>(stats), into, given, scale, window);
        });
        // A run's keys before its own lie in earlier runs; the order of the sum is the runs', whoever was done first.
        for (const Run& run : found)
            for (Int j = 0; j < run.seen; j++)
                for (Int d = 0; d < s.key_row(); d++) {
                    d_k[run.rows[j] * s.key_row() + d] += given_k[(run.given + j) * s.key_row() + d];
                    d_v[run.rows[j] * s.key_row() + d] += given_v[(run.given + j) * s.key_row() + d];
                }
    });
}
}
