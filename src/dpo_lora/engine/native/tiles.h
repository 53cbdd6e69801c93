// Small float32 matrix products on one core: what a cache holds, in tiles of sums that stay in registers.
#pragma once

#include "vectors.h"

namespace dpo_lora {

// A tile of sums has ROWS rows of VECTORS vectors and leaves registers for its operands: there are 32, on x86 before
// AVX-512 16.
constexpr int ROWS = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int VECTORS = 4;
#else
constexpr int VECTORS = 2;
#endif
constexpr Int PANEL = VECTORS * WIDTH;

// A matrix of which a product reads element (i, j) at data[i * row + j * column].
struct Left {
    const float* data;
    Int row, column;
};

// A matrix in panels of PANEL columns: element (i, j) at data[j / PANEL * panel + i * row + j % PANEL].
struct Right {
    const float* data;
    Int row, panel;
};

inline Right in_rows(const float* data, Int row) { return {data, row, PANEL}; }

// From a column on that begins a panel.
inline Right panels_from(Right x, Int column) { return {x.data + column / PANEL * x.panel, x.row, x.panel}; }

// C = A B, or C += A B. A [m, k]; B [k, n] and C [m, n] in rows `c_row` floats apart, n a multiple of WIDTH.
template <bool ADD, int R, int V>
inline void tile(Left a, const float* b, Int b_row, float* c, Int c_row, Int k) {
    vec sums[R][V];
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) sums[i][v] = ADD ? load(c + i * c_row + v * WIDTH) : vec{};
    for (Int j = 0; j < k; j++) {
        vec right[V];
        for (int v = 0; v < V; v++) right[v] = load(b + j * b_row + v * WIDTH);
        for (int i = 0; i < R; i++) {
            const vec left = broadcast(a.data[i * a.row + j * a.column]);
            for (int v = 0; v < V; v++) sums[i][v] += left * right[v];
        }
    }
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) store(c + i * c_row + v * WIDTH, sums[i][v]);
}

// R and V must be known to the compiler for the sums to stay in registers: this picks the tile that fits.
template <bool ADD, int R, int V>
inline void fitted(Int rows, Int vectors, Left a, const float* b, Int b_row, float* c, Int c_row, Int k) {
    if constexpr (V > 1) {
        if (vectors < V) return fitted<ADD, R, V - 1>(rows, vectors, a, b, b_row, c, c_row, k);
    }
    if constexpr (R > 1) {
        if (rows < R) return fitted<ADD, R - 1, V>(rows, vectors, a, b, b_row, c, c_row, k);
    }
    tile<ADD, R, V>(a, b, b_row, c, c_row, k);
}

template <bool ADD>
void product(Int m, Int n, Int k, Left a, Right b, float* c, Int c_row) {
    for (Int j = 0; j < n; j += PANEL) {
        const Int vectors = std::min<Int>(VECTORS, (n - j) / WIDTH);
        const float* panel = b.data + j / PANEL * b.panel;
        for (Int i = 0; i < m; i += ROWS) {
            const Left rows{a.data + i * a.row, a.row, a.column};
            const Int count = std::min<Int>(ROWS, m - i);
            fitted<ADD, ROWS, VECTORS>(count, vectors, rows, panel, b.row, c + i * c_row + j, c_row, k);
        }
    }
}

}  // namespace dpo_lora
