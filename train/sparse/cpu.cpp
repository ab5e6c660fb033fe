// CPU kernels of the sparse step. Plain C interface, no PyTorch headers: one second to compile, called through ctypes.
//
// Every output number is summed by one thread in one order, so results do not depend on timing.
// Lists of active entries are compressed: list s holds entries pointer[s] .. pointer[s + 1].
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t kBlock = 2048;  // columns worked on at once: a block of each operand stays in the first-level cache

// out[s] = (add ? out[s] : 0) + sum of weights[j] * rows[index[j]] over list s
template <typename T>
void gather_sum(const T* rows, int64_t row_stride, const int64_t* index, const int64_t* pointer, const T* weights,
                int64_t n_lists, int64_t columns, T* out, int64_t out_stride, int64_t add) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t s = 0; s < n_lists; s++) {
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      T* __restrict__ o = out + s * out_stride + start;
      if (!add) std::fill(o, o + n, T(0));
      int64_t j = pointer[s];
      const int64_t end = pointer[s + 1];
      for (; j + 1 < end; j += 2) {
        const T* __restrict__ r0 = rows + index[j] * row_stride + start;
        const T* __restrict__ r1 = rows + index[j + 1] * row_stride + start;
        const T w0 = weights[j], w1 = weights[j + 1];
#pragma omp simd
        for (int64_t c = 0; c < n; c++) o[c] += w0 * r0[c] + w1 * r1[c];
      }
      if (j < end) {
        const T* __restrict__ r = rows + index[j] * row_stride + start;
        const T w = weights[j];
#pragma omp simd
        for (int64_t c = 0; c < n; c++) o[c] += w * r[c];
      }
    }
  }
}

// What determines the gradient of a matrix with one row a feature:
//   gradient[f] = scale[f] * weight[f] + left[f] * right + sum of values[j] * source[index[j]] over list f
// Missing terms are null.
template <typename T>
struct Rows {
  const T* source;
  int64_t stride;
  const int64_t *index, *pointer;
  const T *values, *scale, *left, *right, *weight;
  int64_t columns;

  // A block of row f into d (or added to what is there).
  inline void block(int64_t f, int64_t start, int64_t n, bool add, T* __restrict__ d) const {
    const T l = left ? left[f] : T(0), s = scale ? scale[f] : T(0);
    if (!add) std::fill(d, d + n, T(0));
    if (l != T(0)) {
#pragma omp simd
      for (int64_t c = 0; c < n; c++) d[c] += l * right[start + c];
    }
    if (s != T(0)) {
      const T* __restrict__ w = weight + f * columns + start;
#pragma omp simd
      for (int64_t c = 0; c < n; c++) d[c] += s * w[c];
    }
  }

  inline const T* row(int64_t j, int64_t start) const { return source + index[j] * stride + start; }

  // Its sum over the entries, two at a time: half as many passes over d.
  inline void entries(int64_t f, int64_t start, int64_t n, T* __restrict__ d) const {
    int64_t one = -1;  // an entry that waits for a second one
    for (int64_t j = pointer[f]; j < pointer[f + 1]; j++) {
      if (values[j] == T(0)) continue;  // in the estimator's window: it carries a gradient but writes nothing
      if (one < 0) {
        one = j;
        continue;
      }
      const T *__restrict__ g0 = row(one, start), *__restrict__ g1 = row(j, start);
      const T v0 = values[one], v1 = values[j];
      one = -1;
#pragma omp simd
      for (int64_t c = 0; c < n; c++) d[c] += v0 * g0[c] + v1 * g1[c];
    }
    if (one < 0) return;
    const T* __restrict__ g = row(one, start);
    const T v = values[one];
#pragma omp simd
    for (int64_t c = 0; c < n; c++) d[c] += v * g[c];
  }
};

template <typename T>
inline T square_sum(const T* __restrict__ d, int64_t n) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < n; c++) total += d[c] * d[c];
  return total;
}

// For every feature f, with entries j of its list:
//   grad_values[order[j]] = source[index[j]] . weight[f]
//   the gradient of weight[f], written to `out` (or added there); where `out` is null only its norm is kept
// Both need the same rows at the same time: one pass over the decoder, and one over its gradient or none.
template <typename T>
void decode_backward(const Rows<T>& rows, const int64_t* order, int64_t n_features, T* grad_values, T* out, bool add,
                     T* norms) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t f = 0; f < n_features; f++) {
    T own[kBlock], squares = 0;
    for (int64_t j = rows.pointer[f]; j < rows.pointer[f + 1]; j++) grad_values[order[j]] = T(0);
    for (int64_t start = 0; start < rows.columns; start += kBlock) {
      const int64_t n = std::min(kBlock, rows.columns - start);
      const T* __restrict__ w = rows.weight + f * rows.columns + start;
      T* __restrict__ d = out ? out + f * rows.columns + start : own;
      rows.block(f, start, n, out && add, d);
      const int64_t end = rows.pointer[f + 1];
      for (int64_t j = rows.pointer[f]; j < end; j += 2) {
        const int64_t k = j + 1 < end ? j + 1 : j;  // a last one alone is its own partner, and counts once
        const T *__restrict__ g0 = rows.row(j, start), *__restrict__ g1 = rows.row(k, start);
        const T v0 = rows.values[j], v1 = k > j ? rows.values[k] : T(0);
        T dot0 = 0, dot1 = 0;
        if (v0 == T(0) && v1 == T(0)) {  // in the estimator's window: a gradient, but nothing written
#pragma omp simd reduction(+ : dot0, dot1)
          for (int64_t c = 0; c < n; c++) {
            dot0 += g0[c] * w[c];
            dot1 += g1[c] * w[c];
          }
        } else {
#pragma omp simd reduction(+ : dot0, dot1)
          for (int64_t c = 0; c < n; c++) {
            dot0 += g0[c] * w[c];
            dot1 += g1[c] * w[c];
            d[c] += v0 * g0[c] + v1 * g1[c];
          }
        }
        grad_values[order[j]] += dot0;
        if (k > j) grad_values[order[k]] += dot1;
      }
      if (norms) squares += square_sum(d, n);
    }
    if (norms) norms[f] = std::sqrt(squares);
  }
}

// The norm of each row's gradient, which is formed a block at a time and dropped.
template <typename T>
void gradient_norms(const Rows<T>& rows, int64_t n_features, T* norms) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t f = 0; f < n_features; f++) {
    T d[kBlock], squares = 0;
    for (int64_t start = 0; start < rows.columns; start += kBlock) {
      const int64_t n = std::min(kBlock, rows.columns - start);
      rows.block(f, start, n, false, d);
      rows.entries(f, start, n, d);
      squares += square_sum(d, n);
    }
    norms[f] = std::sqrt(squares);
  }
}

// What Adam needs beside the tensors, in the order of `rows.adam_numbers`.
template <typename T>
struct Numbers {
  T keep, rate1, beta2, rate2, size, root, eps, factor, bad;
};

// Adam on every row, its gradient formed a block at a time:
//   g = gradient * factor;  m += rate1 (g - m);  v = beta2 v + rate2 g^2;  w = keep w - size m / (root sqrt(v) + eps)
template <typename T>
void adam_rows(const Rows<T>& rows, int64_t n_features, T* weight, T* first, T* second, const Numbers<T>& with) {
  if (with.bad != T(0)) return;
  const Numbers<T> o = with;
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t f = 0; f < n_features; f++) {
    T d[kBlock];
    for (int64_t start = 0; start < rows.columns; start += kBlock) {
      const int64_t n = std::min(kBlock, rows.columns - start), at = f * rows.columns + start;
      rows.block(f, start, n, false, d);
      rows.entries(f, start, n, d);
      T* __restrict__ w = weight + at;
      T* __restrict__ m = first + at;
      T* __restrict__ v = second + at;
#pragma omp simd
      for (int64_t c = 0; c < n; c++) {
        const T g = d[c] * o.factor;
        m[c] += o.rate1 * (g - m[c]);
        v[c] = o.beta2 * v[c] + o.rate2 * g * g;
        w[c] = o.keep * w[c] - o.size * m[c] / (o.root * std::sqrt(v[c]) + o.eps);
      }
    }
  }
}

template <typename T>
void row_norms(const T* rows, int64_t n_rows, int64_t columns, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n_rows; i++) {
    const T* __restrict__ r = rows + i * columns;
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < columns; c++) total += r[c] * r[c];
    out[i] = std::sqrt(total);
  }
}

// One block of a row of h against its thresholds, per feature or one for the row: how many lie above.
template <typename T>
inline int64_t hits(const T* row, const T* per_feature, T threshold, int64_t n) {
  int64_t count = 0;
  if (per_feature) {
#pragma omp simd reduction(+ : count)
    for (int64_t c = 0; c < n; c++) count += row[c] > per_feature[c];
  } else {
#pragma omp simd reduction(+ : count)
    for (int64_t c = 0; c < n; c++) count += row[c] > threshold;
  }
  return count;
}

template <typename T>
void count_above(const T* h, const T* per_feature, const T* per_row, T threshold, int64_t n_rows, int64_t columns,
                 int64_t* counts) {
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < n_rows; b++)
    counts[b] = hits(h + b * columns, per_feature, per_row ? per_row[b] : threshold, columns);
}

// Row b's entries go to pointer[b] onwards; blocks without any are passed over.
template <typename T>
void fill_above(const T* h, const T* per_feature, const T* per_row, T threshold, int64_t n_rows, int64_t columns,
                const int64_t* pointer, int64_t* tokens, int64_t* features, T* values) {
  constexpr int64_t step = 64;
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < n_rows; b++) {
    int64_t at = pointer[b];
    const T* row = h + b * columns;
    const T limit = per_row ? per_row[b] : threshold;
    for (int64_t start = 0; start < columns && at < pointer[b + 1]; start += step) {
      const int64_t n = std::min(step, columns - start);
      if (!hits(row + start, per_feature ? per_feature + start : nullptr, limit, n)) continue;
      for (int64_t c = start; c < start + n; c++) {
        if (row[c] > (per_feature ? per_feature[c] : limit)) {
          tokens[at] = b;
          features[at] = c;
          values[at++] = row[c];
        }
      }
    }
  }
}

}  // namespace

// The arguments that make Rows<T>, in the order of `rows.RowGradient`.
#define ROWS(T)                                                                                                       \
  const T *source, int64_t stride, const int64_t *index, const int64_t *pointer, const T *values, const T *scale,     \
      const T *left, const T *right, const T *rows_of, int64_t columns
#define THE_ROWS(T) \
  Rows<T> { source, stride, index, pointer, values, scale, left, right, rows_of, columns }

#define EXPORT(T, suffix)                                                                                             \
  void gather_sum_##suffix(const T* rows, int64_t row_stride, const int64_t* index, const int64_t* pointer,           \
                           const T* weights, int64_t n_lists, int64_t columns, T* out, int64_t out_stride, int64_t add) { \
    gather_sum<T>(rows, row_stride, index, pointer, weights, n_lists, columns, out, out_stride, add);                 \
  }                                                                                                                   \
  void decode_backward_##suffix(ROWS(T), const int64_t* order, int64_t n_features, T* grad_values, T* out,            \
                                int64_t add, T* norms) {                                                              \
    decode_backward<T>(THE_ROWS(T), order, n_features, grad_values, out, add, norms);                                 \
  }                                                                                                                   \
  void gradient_norms_##suffix(ROWS(T), int64_t n_features, T* norms) {                                               \
    gradient_norms<T>(THE_ROWS(T), n_features, norms);                                                                \
  }                                                                                                                   \
  void adam_rows_##suffix(ROWS(T), int64_t n_features, T* weight, T* first, T* second, const T* numbers) {            \
    adam_rows<T>(THE_ROWS(T), n_features, weight, first, second, *reinterpret_cast<const Numbers<T>*>(numbers));      \
  }                                                                                                                   \
  void row_norms_##suffix(const T* rows, int64_t n_rows, int64_t columns, T* out) {                                   \
    row_norms<T>(rows, n_rows, columns, out);                                                                         \
  }                                                                                                                   \
  void count_above_##suffix(const T* h, const T* per_feature, const T* per_row, T threshold, int64_t n_rows,          \
                            int64_t columns, int64_t* counts) {                                                       \
    count_above<T>(h, per_feature, per_row, threshold, n_rows, columns, counts);                                                \
  }                                                                                                                   \
  void fill_above_##suffix(const T* h, const T* per_feature, const T* per_row, T threshold, int64_t n_rows,           \
                           int64_t columns, const int64_t* pointer, int64_t* tokens, int64_t* features, T* values) {  \
    fill_above<T>(h, per_feature, per_row, threshold, n_rows, columns, pointer, tokens, features, values);                      \
  }

extern "C" {
EXPORT(float, f32)
EXPORT(double, f64)

// Counting sort of entries by feature, stable in the entries' order (by token).
// pointer [n_features + 1] comes in as zeros; order [n] lists entries, token_of [n] their tokens.
void by_feature(const int64_t* features, const int64_t* tokens, int64_t n, int64_t n_features, int64_t* pointer,
                int64_t* order, int64_t* token_of) {
  for (int64_t i = 0; i < n; i++) pointer[features[i] + 1]++;
  for (int64_t f = 0; f < n_features; f++) pointer[f + 1] += pointer[f];
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = pointer[features[i]]++;
    order[at] = i;
    token_of[at] = tokens[i];
  }
  for (int64_t f = n_features; f > 0; f--) pointer[f] = pointer[f - 1];  // the fill moved each start to its end
  pointer[0] = 0;
}
}
