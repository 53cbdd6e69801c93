// Where the queries and keys of a packed row of preference pairs lie, and which of them meet (dpo_lora/engine/runs.py).
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "tiles.h"

namespace dpo_lora {

struct Shape {
    Int groups, repeat, size;  // G key heads, R query heads for each, D floats a head
    Int heads() const { return groups * repeat; }
    Int query_row() const { return heads() * size; }
    Int key_row() const { return groups * size; }
};

struct Run {
    std::vector<Int> rows;  // where its keys lie in the packed row, in the order of their sequence, its own last
    Int first, count;       // its queries are rows [first, first + count)
    Int seen;               // keys before its own
    Int given;              // the sum of `seen` over the runs before this one
    Int keys() const { return seen + count; }
};

// runs: of each, how many pieces it sees and (first, length) of each piece, its own last.
inline std::vector<Run> read_runs(const Int* runs, Int count) {
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

// Keys or values of one head of a run, `from` [T, ...] in rows `row` floats apart: transposed, [D, keys] in panels with
// zeros behind the last key.
inline Right transposed(const float* from, Int row, const Run& run, Int size, std::vector<float>& into) {
    const Int columns = (run.keys() + PANEL - 1) / PANEL * PANEL;
    into.resize(columns * size);
    for (Int j = 0; j < columns; j++) {
        float* column = &into[j / PANEL * PANEL * size + j % PANEL];
        for (Int d = 0; d < size; d++) column[d * PANEL] = j < run.keys() ? from[run.rows[j] * row + d] : 0.0f;
    }
    return {into.data(), PANEL, PANEL * size};
}

// The same as they are, [keys, D].
inline Right gathered(const float* from, Int row, const Run& run, Int size, std::vector<float>& into) {
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

// The keys that a run's query sees, where `before` keys lie before the run's own. Keys count from the first of a tile,
// so `before` may be negative, and what a query sees of earlier tiles is left out.
inline Range visible_keys(Int query, Int before, Int window) {
    const Int last = before + query + 1;
    return {window ? std::max<Int>(0, last - window) : 0, std::max<Int>(0, last)};
}

// Queries [at, at + count) of a run and the keys they see together: from the begin of a panel to the end of a vector.
struct Block {
    Int at, count;
    Range keys;
};

// The blocks of so many queries that see some of the first `keys` keys.
template <typename Work>
void by_blocks(Int queries, Int block_size, Int before, Int window, Int keys, Work work) {
    for (Int at = 0; at < queries; at += block_size) {
        const Int count = std::min(block_size, queries - at);
        const Int begin = visible_keys(at, before, window).begin / PANEL * PANEL;
        const Int end = rounded_up(visible_keys(at + count - 1, before, window).end);
        const Block block{at, count, Range{begin, end}.within({0, rounded_up(keys)})};
        if (block.keys.length()) work(block);
    }
}

// Masks a query's row of scores in the block's range: minus infinity in vectors that are visible in part, 0 in the
// hidden ones. Returns the range of the vectors that are visible at all, the only ones to be read again before a
// product.
inline Range mask(float* scores, Range visible, Range block) {
    const Range whole{visible.begin / WIDTH * WIDTH, rounded_up(visible.end)};
    std::fill(scores + block.begin, scores + whole.begin, 0.0f);
    std::fill(scores + whole.begin, scores + visible.begin, -std::numeric_limits<float>::infinity());
    std::fill(scores + visible.end, scores + whole.end, -std::numeric_limits<float>::infinity());
    std::fill(scores + whole.end, scores + block.end, 0.0f);
    return whole;
}

}  // namespace dpo_lora
