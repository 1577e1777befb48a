// Products in AMX tiles, or in their emulation.
// A part of group_attention.h, which includes it once for each instruction set.

#ifdef EMULATED
thread_local vec tiles[8][LANES];
INLINE void begin_tiles() {}
INLINE void end_tiles() {}

NOINLINE void load_tile(int tile, const float *from, int64_t step) {
  for (int i = 0; i < LANES; i++) tiles[tile][i] = load(from + i * step);
}

NOINLINE void store_tile(int tile, float *to, int64_t step) {
  for (int i = 0; i < LANES; i++) store(to + i * step, tiles[tile][i]);
}

NOINLINE void add_product(int c, int a, int b) {
  for (int i = 0; i < LANES; i++)
    for (int k = 0; k < LANES; k++)
      tiles[c][i] = dot_pairs(all(tiles[a][i][k]), tiles[b][k], tiles[c][i]);
}

#define ZERO_TILE(tile) std::memset(tiles[tile], 0, sizeof tiles[tile])
#define LOAD_TILE load_tile
#define STORE_TILE store_tile
#define ADD_PRODUCT add_product
#endif

#if HAS_TILES
// Sums of products are in the tiles 0 and 1 and, below, 2 and 3; `c` is their place in memory.
template <int COLUMNS> INLINE void begin_sums(const float *c, int64_t c_step, bool is_first) {
  if (is_first) {
    ZERO_TILE(0);
    ZERO_TILE(2);
    if (COLUMNS > 1) ZERO_TILE(1);
    if (COLUMNS > 1) ZERO_TILE(3);
  } else {
    LOAD_TILE(0, c, c_step);
    LOAD_TILE(2, c + LANES * c_step, c_step);
    if (COLUMNS > 1) LOAD_TILE(1, c + LANES, c_step);
    if (COLUMNS > 1) LOAD_TILE(3, c + LANES * c_step + LANES, c_step);
  }
}

template <int COLUMNS> INLINE void end_sums(float *c, int64_t c_step) {
  STORE_TILE(0, c, c_step);
  STORE_TILE(2, c + LANES * c_step, c_step);
  if (COLUMNS > 1) STORE_TILE(1, c + LANES, c_step);
  if (COLUMNS > 1) STORE_TILE(3, c + LANES * c_step + LANES, c_step);
}

// Adds the products of LANES words of depth: a is in the tiles 4 and, below, 5, columns of b in 6.
template <int COLUMNS>
INLINE void add_to_sums(const float *a, int64_t row, const float *b, int64_t b_step) {
  LOAD_TILE(4, a, row);
  LOAD_TILE(6, b, b_step);
  ADD_PRODUCT(0, 4, 6);
  LOAD_TILE(5, a + LANES * row, row);
  ADD_PRODUCT(2, 5, 6);
  if (COLUMNS == 1) return;
  LOAD_TILE(6, b + LANES, b_step);
  ADD_PRODUCT(1, 4, 6);
  ADD_PRODUCT(3, 5, 6);
}

// c[i*c_step + j] = c[...] * !is_first + sum of a[i*row + k] * b[k*b_step + j], for ROWS rows and
// COLUMNS registers of columns.
template <int COLUMNS>
INLINE void multiply_tiles(float *c, int64_t c_step, const float *a, int64_t row, const float *b,
                           int64_t b_step, int64_t depth, bool is_first) {
  asm volatile("" ::: "memory");  // GCC does not know that tiles are read from memory
  begin_sums<COLUMNS>(c, c_step, is_first);
  for (int64_t k = 0; k < depth; k += LANES)
    add_to_sums<COLUMNS>(a + k, row, b + k * b_step, b_step);
  end_sums<COLUMNS>(c, c_step);
}

// Products of ROWS rows of a and TILE columns of b of LANES words each; sums in tiles stay.
INLINE void multiply_beside(float *c, const float *a, const float *b) {
  LOAD_TILE(4, a, LANES);
  LOAD_TILE(5, a + LANES * LANES, LANES);
  for (int64_t j = 0; j < TILE; j += LANES) {
    LOAD_TILE(6, b + j, TILE);
    ZERO_TILE(7);
    ADD_PRODUCT(7, 4, 6);
    STORE_TILE(7, c + j, TILE);
    ZERO_TILE(7);
    ADD_PRODUCT(7, 5, 6);
    STORE_TILE(7, c + LANES * TILE + j, TILE);
  }
}
#endif
