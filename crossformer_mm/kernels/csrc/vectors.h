// Vectors of an instruction set: loads and stores, reductions, exp2 and log2, conversions between
// types. A part of group_attention.h, which includes it once for each instruction set.

INLINE vec load(const float *from) {
  vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(float *to, vec x) { std::memcpy(to, &x, sizeof x); }

INLINE void store_halves(float *to, int64_t at, halves x) {
  std::memcpy(reinterpret_cast<char *>(to) + 2 * at, &x, sizeof x);
}

INLINE vec all(float x) { return x - vec{}; }

#ifndef HAS_LARGER  // y, if one of them is not a number
INLINE vec larger(vec x, vec y) { return x > y ? x : y; }
INLINE vec smaller(vec x, vec y) { return x < y ? x : y; }
#endif

INLINE vec lanes() {
  vec x;
  for (int lane = 0; lane < LANES; lane++) x[lane] = lane;
  return x;
}

// The first `left` lanes of x, the others of y.
INLINE vec first_lanes(int64_t left, vec x, vec y) {
  return lanes() < all(static_cast<float>(left)) ? x : y;
}

INLINE float largest_of(vec x) {
  quad parts[LANES / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int i = 1; i < LANES / 4; i++) parts[0] = parts[0] > parts[i] ? parts[0] : parts[i];
  const float a = parts[0][0] > parts[0][1] ? parts[0][0] : parts[0][1];
  const float b = parts[0][2] > parts[0][3] ? parts[0][2] : parts[0][3];
  return a > b ? a : b;
}

INLINE float sum_of(vec x) {
  quad parts[LANES / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int i = 1; i < LANES / 4; i++) parts[0] += parts[i];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

template <int TERMS> INLINE vec polynomial(vec x, const float (&factors)[TERMS]) {
  vec y = all(factors[0]);
  UNROLL for (int i = 1; i < TERMS; i++) y = y * x + all(factors[i]);
  return y;
}

// Words of two numbers in bfloat16, the lower and the upper half.
INLINE vec words_of(halves x, halves y) {
  return (vec)(__builtin_convertvector(x, ints) | (__builtin_convertvector(y, ints) << 16));
}

// The same of floats that are such numbers, none negative.
INLINE vec words_of(vec x, vec y) { return (vec)((ints)x >> 16 | (ints)y); }

#if !HAS_PAIRS || defined(EMULATED)
INLINE halves round_bf16(vec x) {  // to the nearest, to even between two
  const ints bits = (ints)x, rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  return __builtin_convertvector(x == x ? rounded : ints{} + 0x7fc0, halves);
}

INLINE vec round_both(vec x, vec y) {
  const halves parts[2] = {round_bf16(x), round_bf16(y)};
  vec both;
  std::memcpy(&both, parts, sizeof both);
  return both;
}

INLINE vec side_by_side(vec both) {
  halves parts[2];
  std::memcpy(parts, &both, sizeof both);
  return words_of(parts[0], parts[1]);
}
#endif

// 2^x with a relative error of 2e-7, or 1e-4 if ROUGH, or that rounded to bfloat16; 0 far below 2^-126,
// infinity from 2^128 on. A power of 2 with an integer exponent times the minimax polynomial (relative
// error) of the rest.
template <Digits DIGITS = OF_FLOATS> INLINE vec exp2(vec x) {
#if HAS_POWERS
  const vec rest = above_whole(x);  // from 0 to 1
  // Half of bfloat16's last digit, for numbers from 1 to 2: rounds, because the rest is cut off.
  constexpr float half = DIGITS == OF_BFLOAT16 ? 0x1p-8f : 0;
  const vec y = DIGITS == OF_FLOATS
                    ? polynomial(rest, {1.8775748e-3f, 8.9893424e-3f, 5.5826318e-2f, 2.4015362e-1f,
                                        6.9315307e-1f, 9.9999993e-1f})
                    : polynomial(rest, {7.802428e-2f, 2.2606712e-1f, 6.9583376e-1f,
                                        9.9992517e-1f + half});
  const vec power = times_power(y, x);
  return DIGITS == OF_BFLOAT16 ? (vec)((ints)power & -0x10000) : power;
#else
  // Adding a number so large that the fraction is lost rounds to the nearest integer, in the bits that
  // are shifted to a float's exponent.
  const vec magic = all(12582912.f + 127.f);
  x = smaller(all(128.f), larger(all(-127.f), x));
  const vec shifted = x + magic, rest = x - (shifted - magic);  // from -1/2 to 1/2
  const vec y = DIGITS == OF_FLOATS
                    ? polynomial(rest, {1.3276459e-3f, 9.6755396e-3f, 5.5507133e-2f, 2.402212e-1f,
                                        6.9314697e-1f, 1.0000001f})
                    : polynomial(rest, {5.5171498e-2f, 2.4261084e-1f, 6.9326099e-1f, 9.9992809e-1f});
  const vec power = y * (vec)((ints)shifted << 23);
  if (DIGITS != OF_BFLOAT16) return power;
  return (vec)(__builtin_convertvector(round_bf16(power), ints) << 16);
#endif
}

// log2 of a normal float with an error of 5e-8; NaN if it is not finite. An exponent plus the minimax
// polynomial for a number from sqrt(1/2) to sqrt(2).
INLINE vec log2(vec x) {
  const ints power = ((ints)x - 0x3f3504f3) >> 23;
  const vec rest = (vec)((ints)x - (power << 23)) - all(1);
  const vec y = polynomial(rest, {0.12614846f, -0.20742103f, 0.21566986f, -0.23892035f, 0.28791833f,
                                  -0.36070484f, 0.4809106f, -0.72134733f, 1.442695f});
  return y * rest + __builtin_convertvector(power, vec) + (x - x);
}

#ifdef EMULATED
INLINE vec dot_pairs(vec x, vec y, vec sum) {
  const ints a = (ints)x, b = (ints)y, high = ints{} - 0x10000;
  return (vec)(a & high) * (vec)(b & high) + ((vec)(a << 16) * (vec)(b << 16) + sum);
}
#endif

// Conversions between numbers in memory, of any type, and floats.

INLINE vec from_bits(DType dtype, halves bits) {
  const ints wide = __builtin_convertvector(bits, ints);
  if (dtype == BFLOAT16) return (vec)(wide << 16);
  const vec finite = (vec)((wide & 0x7fff) << 13) * all(5.1922969e33f);  // 2^112
  const ints special = (wide & 0x7c00) == 0x7c00;
  return (vec)((ints)finite | (special & 0x7f800000) | ((wide & 0x8000) << 16));
}

INLINE halves to_bits(DType dtype, vec x) {
  if (dtype == BFLOAT16) return round_bf16(x);
  const ints bits = (ints)x, size = bits & 0x7fffffff;
  const ints normal = (size + (0xfff - (112 << 23)) + ((size >> 13) & 1)) >> 13;
  const ints tiny = (ints)((vec)size + all(0.5f)) - 0x3f000000;
  const ints above = size > 0x7f800000 ? ints{} + 0x7e00 : ints{} + 0x7c00;
  ints result = size < 0x38800000 ? tiny : normal;
  result = size >= 0x47800000 ? above : result;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000), halves);
}

INLINE vec load_numbers(DType dtype, const char *from, int64_t left) {
  if (dtype == FLOAT32) {
    vec x{};
    std::memcpy(&x, from, left < LANES ? left * 4 : sizeof x);
    return x;
  }
  halves bits{};
  std::memcpy(&bits, from, left < LANES ? left * 2 : sizeof bits);
  return from_bits(dtype, bits);
}

INLINE void store_numbers(DType dtype, char *to, vec x, int64_t left) {
  if (dtype == FLOAT32) {
    std::memcpy(to, &x, left < LANES ? left * 4 : sizeof x);
    return;
  }
  const halves bits = to_bits(dtype, x);
  std::memcpy(to, &bits, left < LANES ? left * 2 : sizeof bits);
}

template <Product HOW> INLINE vec add_product(vec x, vec y, vec sum) {
#if HAS_PAIRS
  if constexpr (HOW != FLOATS) return dot_pairs(x, y, sum);
#endif
  return x * y + sum;
}
