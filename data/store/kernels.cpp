// The store's inner loops: checksums, rows to their places, chunks from disk. Plain C interface, called through ctypes.
// One call does many chunks, so that Python's lock is let go of once and for long.
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <sys/uio.h>
#if defined(__SSE4_2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a store's bytes are little-endian"
#endif

namespace {

// -- crc32c -----------------------------------------------------------------------------------------------------------

constexpr uint32_t kPolynomial = 0x82F63B78;  // Castagnoli, bits reversed

struct Tables {
  uint32_t byte[8][256];
  Tables() {
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t sum = i;
      for (int bit = 0; bit < 8; bit++) sum = (sum >> 1) ^ (sum & 1 ? kPolynomial : 0);
      byte[0][i] = sum;
    }
    for (int k = 1; k < 8; k++)
      for (int i = 0; i < 256; i++) byte[k][i] = (byte[k - 1][i] >> 8) ^ byte[0][byte[k - 1][i] & 255];
  }
};
const Tables kTables;

inline uint64_t load64(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, 8);
  return word;
}

inline uint64_t step8(uint64_t sum, uint64_t word) {
#if defined(__SSE4_2__)
  return _mm_crc32_u64(sum, word);
#elif defined(__ARM_FEATURE_CRC32)
  return __crc32cd(static_cast<uint32_t>(sum), word);
#else
  word ^= sum;
  uint32_t out = 0;
  for (int k = 0; k < 8; k++) out ^= kTables.byte[7 - k][(word >> (8 * k)) & 255];
  return out;
#endif
}

// What a sum becomes when kBytes zeros follow: a linear map, looked up byte by byte.
template <int kBytes>
struct Shift {
  uint32_t table[4][256];
  Shift() {
    uint32_t basis[32];
    for (int bit = 0; bit < 32; bit++) {
      uint64_t sum = 1u << bit;
      for (int i = 0; i < kBytes / 8; i++) sum = step8(sum, 0);
      basis[bit] = static_cast<uint32_t>(sum);
    }
    for (int k = 0; k < 4; k++)
      for (int i = 0; i < 256; i++) {
        table[k][i] = 0;
        for (int bit = 0; bit < 8; bit++)
          if (i >> bit & 1) table[k][i] ^= basis[8 * k + bit];
      }
  }
  uint32_t operator()(uint64_t sum) const {
    return table[0][sum & 255] ^ table[1][sum >> 8 & 255] ^ table[2][sum >> 16 & 255] ^ table[3][sum >> 24 & 255];
  }
};

// Three neighbouring runs at once: the instruction takes three cycles, and a new one can begin in each.
template <int kRun>
uint64_t three_runs(uint64_t sum, const uint8_t*& data, int64_t& size) {
  static const Shift<kRun> shift;
  for (; size >= 3 * kRun; data += 3 * kRun, size -= 3 * kRun) {
    uint64_t second = 0, third = 0;
    for (int i = 0; i < kRun; i += 8) {
      sum = step8(sum, load64(data + i));
      second = step8(second, load64(data + kRun + i));
      third = step8(third, load64(data + 2 * kRun + i));
    }
    sum = shift(shift(sum) ^ second) ^ third;
  }
  return sum;
}

#if defined(__VPCLMULQDQ__) && defined(__AVX512F__) && defined(__AVX512DQ__)
// x^power mod the polynomial, the highest power in the lowest of 64 bits.
uint64_t power_of_x(int power) {
  uint32_t value = 0x80000000;
  for (; power; power--) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
  return static_cast<uint64_t>(value) << 32;
}

// The same sum by carry-less products: 256 bytes are moved onto the next 256, which are worth as much, until only
// the last 256 are left. Bits being reversed, a product comes out one power too high: hence 8 * 256 - 1 and + 63.
uint64_t folded(uint64_t sum, const uint8_t*& data, int64_t& size) {
  if (size < 1024) return sum;
  static const uint64_t far = power_of_x(8 * 256 + 63), near = power_of_x(8 * 256 - 1);
  const __m512i powers = _mm512_broadcast_i64x2(_mm_set_epi64x(near, far));
  __m512i x[4];
  for (int k = 0; k < 4; k++) x[k] = _mm512_loadu_si512(data + 64 * k);
  x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi64_si128(sum)));
  for (data += 256, size -= 256; size >= 256; data += 256, size -= 256) {
    for (int k = 0; k < 4; k++) {
      const __m512i low = _mm512_clmulepi64_epi128(x[k], powers, 0x00);
      const __m512i high = _mm512_clmulepi64_epi128(x[k], powers, 0x11);
      x[k] = _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(data + 64 * k), 0x96);
    }
  }
  uint8_t last[256];
  for (int k = 0; k < 4; k++) _mm512_storeu_si512(last + 64 * k, x[k]);
  sum = 0;
  for (int i = 0; i < 256; i += 8) sum = step8(sum, load64(last + i));
  return sum;
}
#else
uint64_t folded(uint64_t sum, const uint8_t*&, int64_t&) { return sum; }
#endif

uint32_t checksum(const uint8_t* data, int64_t size) {
  uint64_t sum = folded(0xFFFFFFFF, data, size);
  sum = three_runs<4096>(sum, data, size);
  sum = three_runs<256>(sum, data, size);
  for (; size >= 8; data += 8, size -= 8) sum = step8(sum, load64(data));
  uint32_t rest = static_cast<uint32_t>(sum);
  for (; size; data++, size--) rest = (rest >> 8) ^ kTables.byte[0][(rest ^ *data) & 255];
  return ~rest;
}

// -- numbers ----------------------------------------------------------------------------------------------------------

constexpr int64_t kTile = 256;  // numbers converted at once: they stay in the first-level cache
enum Kind { kBytes, kFloat32, kFloat16, kBfloat16 };

// Half precision in plain C++, for the ends of rows and for processors without an instruction for it.
inline float widen_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, bits = half & 0x7FFF;
  float value;
  if (bits >= 0x7C00) {
    const uint32_t word = 0x7F800000 | (bits & 0x3FF) << 13;
    std::memcpy(&value, &word, 4);
  } else {
    const uint32_t word = bits << 13;  // exponents differ by 112, subnormal numbers included
    std::memcpy(&value, &word, 4);
    value *= 0x1p112f;
  }
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word |= sign;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t narrow_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint32_t sign = word >> 16 & 0x8000;
  word &= 0x7FFFFFFF;
  if (word > 0x7F800000) return sign | 0x7E00 | (word >> 13 & 0x3FF);  // not a number
  if (word >= 0x477FF000) return sign | 0x7C00;                        // rounds to infinity
  if (word < 0x38800000) {                                             // subnormal: let the addition round
    float small;
    std::memcpy(&small, &word, 4);
    small += 0.5f;
    std::memcpy(&word, &small, 4);
    return sign | (word - 0x3F000000);
  }
  return sign | ((word - 0x38000000 + 0xFFF + (word >> 13 & 1)) >> 13);
}

inline float widen_bfloat(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t narrow_bfloat(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint16_t rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16;
  return value != value ? 0x7FC0 : rounded;
}

const float* widened(const uint8_t* from, Kind kind, int64_t n, float* tile) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
  if (kind == kFloat32) return reinterpret_cast<const float*>(from);
  int64_t i = 0;
  if (kind == kBfloat16) {
    for (; i < n; i++) tile[i] = widen_bfloat(half[i]);
    return tile;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(tile + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
#endif
  for (; i < n; i++) tile[i] = widen_half(half[i]);
  return tile;
}

void narrowed(const float* from, Kind kind, int64_t n, uint16_t* to) {
  int64_t i = 0;
  if (kind == kBfloat16) {
    for (; i < n; i++) to[i] = narrow_bfloat(from[i]);
    return;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; i++) to[i] = narrow_half(from[i]);
}

// Past the caches where that is possible: the rows of a window are not read again before long, and reading a line of
// memory only to overwrite it would double the traffic.
inline void copy_past(uint8_t* to, const uint8_t* from, int64_t size) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && size % 64 == 0) {
    for (int64_t i = 0; i < size; i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    return;
  }
#elif defined(__AVX__)
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0 && size % 32 == 0) {
    for (int64_t i = 0; i < size; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    return;
  }
#endif
  std::memcpy(to, from, size);
}

inline int64_t bytes_of(Kind kind) { return kind == kBytes ? 1 : kind == kFloat32 ? 4 : 2; }

// One row of one layer: converted, summed, its largest number found.
float put_run(const uint8_t* from, Kind kind, uint8_t* to, Kind stored, int64_t width, double* total, double* square) {
  alignas(64) float tile[kTile];
  alignas(64) uint16_t halves[kTile];
  float largest = 0;
  double squares = 0;
  if (kind == stored) copy_past(to, from, width * bytes_of(kind));
  if (kind == stored && !total) return 0;
  for (int64_t start = 0; start < width; start += kTile) {
    const int64_t n = std::min(kTile, width - start);
    const float* values = widened(from + start * bytes_of(kind), kind, n, tile);
    if (total) {
      double* __restrict__ sums = total + start;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < n; i++) {
        const double x = values[i];
        sums[i] += x;
        squares += x * x;
      }
    }
    if (kind == stored) continue;
    if (stored == kFloat32) {
      copy_past(to + start * 4, reinterpret_cast<const uint8_t*>(values), n * 4);
      continue;
    }
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, std::fabs(values[i]));
    narrowed(values, stored, n, halves);
    copy_past(to + start * 2, reinterpret_cast<const uint8_t*>(halves), n * 2);
  }
  if (square) *square += squares;
  return largest;
}

enum Outcome { kFine, kDamaged, kShort, kFailed };

struct Chunks {
  const int32_t* files;
  const int64_t* offsets;
  int64_t n, size;  // without the checksum behind it
  bool announced;   // the system knows which ones will be wanted
};

// Ask for all chunks from number i on: a disk answers many questions in the time of one.
void announce(const Chunks& chunks, int64_t i) {
  const int64_t whole = chunks.size + 4;
  const auto neighbours = [&](int64_t a, int64_t b) {
    return chunks.files[a] == chunks.files[b] && chunks.offsets[a] + whole == chunks.offsets[b];
  };
  while (i < chunks.n) {
    int64_t end = i + 1;
    while (end < chunks.n && neighbours(end - 1, end)) end++;
    posix_fadvise(chunks.files[i], chunks.offsets[i], (end - i) * whole, POSIX_FADV_WILLNEED);
    i = end;
  }
}

// As preadv, but the first time that bytes are not in memory yet, all that will be wanted is asked for at once.
ssize_t read_some(Chunks& chunks, int64_t i, const iovec* parts, int count, int64_t offset) {
#if defined(RWF_NOWAIT)
  if (!chunks.announced) {
    const ssize_t more = preadv2(chunks.files[i], parts, count, offset, RWF_NOWAIT);
    if (more > 0) return more;
  }
#endif
  if (!chunks.announced) announce(chunks, i);
  chunks.announced = true;
  return preadv(chunks.files[i], parts, count, offset);
}

// One chunk and the checksum behind it.
Outcome read_one(Chunks& chunks, int64_t i, uint8_t* into, uint32_t* sum) {
  const int64_t size = chunks.size, whole = size + 4;
  int64_t got = 0;
  while (got < whole) {
    iovec parts[2];
    int count = 0;
    if (got < size) parts[count++] = {into + got, static_cast<size_t>(size - got)};
    const int64_t of_sum = std::max<int64_t>(0, got - size);
    parts[count++] = {reinterpret_cast<uint8_t*>(sum) + of_sum, static_cast<size_t>(4 - of_sum)};
    const ssize_t more = read_some(chunks, i, parts, count, chunks.offsets[i] + got);
    if (more == 0) return kShort;
    if (more < 0 && errno != EINTR) return kFailed;
    if (more > 0) got += more;
  }
  return kFine;
}

}  // namespace

extern "C" {

uint32_t crc32c(const uint8_t* data, int64_t size) { return checksum(data, size); }

// Chunks of `size` bytes, `stride` apart, come one after another into `room` bytes, from byte `done` of them all on. The
// checksum of each is written behind it and comes along while the chunk is in the cache. Returns the bytes that came.
int64_t pack_chunks(uint8_t* chunks, int64_t count, int64_t stride, int64_t size, int64_t done, uint8_t* into,
                    int64_t room) {
  const int64_t whole = size + 4;
  int64_t put = 0;
  for (int64_t i = done / whole, within = done % whole; i < count && put < room; i++, within = 0) {
    uint8_t* chunk = chunks + i * stride;
    if (!within) {
      const uint32_t sum = checksum(chunk, size);
      std::memcpy(chunk + size, &sum, 4);
    }
    const int64_t n = std::min(whole - within, room - put);
    std::memcpy(into + put, chunk + within, n);
    put += n;
  }
  return put;
}

// Rows to their places in an image [blocks, layers, stride] of a store's chunks. Row i is row picked[i] (or i) of every
// layer's source, whose rows are `row_bytes` apart, and goes to row places[i] of the image.
// Adds to total [layers, width] and square [layers], if given; returns the largest absolute value that was narrowed.
float put_rows(const uint8_t* const* sources, int64_t row_bytes, const int64_t* picked, int64_t n, uint8_t* image,
               const int64_t* places, int64_t block_rows, int64_t layers, int64_t stride, int64_t width, int64_t kind,
               int64_t stored, double* total, double* square) {
  const Kind from = static_cast<Kind>(kind), to = static_cast<Kind>(stored);
  const int64_t run = width * bytes_of(to);
  float largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t source = (picked ? picked[i] : i) * row_bytes;
    const int64_t block = places[i] / block_rows, within = places[i] % block_rows;
    uint8_t* row = image + block * layers * stride + within * run;
    for (int64_t l = 0; l < layers; l++)
      largest = std::max(largest, put_run(sources[l] + source, from, row + l * stride, to, width,
                                          total ? total + l * width : nullptr, square ? square + l : nullptr));
  }
#if defined(__SSE4_2__)
  _mm_sfence();  // what went past the caches is there before another thread is told of it
#endif
  return largest;
}

// Chunks of `size` bytes from files into memory; those that are not `trusted` are held against their checksum while
// they are still in the cache. Returns an Outcome; `failed` gets the chunk and errno.
int64_t read_chunks(const int32_t* files, const int64_t* offsets, uint8_t* const* into, const uint8_t* trusted,
                    int64_t n, int64_t size, int64_t* failed) {
  Chunks chunks{files, offsets, n, size, false};
  for (int64_t i = 0; i < n; i++) {
    uint32_t sum;
    Outcome outcome = read_one(chunks, i, into[i], &sum);
    if (outcome == kFine && !trusted[i] && checksum(into[i], size) != sum) outcome = kDamaged;
    if (outcome != kFine) {
      failed[0] = i;
      failed[1] = errno;
      return outcome;
    }
  }
  return kFine;
}
}
