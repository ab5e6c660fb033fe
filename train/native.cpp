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

// For every feature f, with entries j of its list (token[j], value of entry order[j]):
//   grad_values[order[j]] = grad[token[j]] . weight[f]
//   grad_weight[f]        = (add ? grad_weight[f] : 0) + scale[f] * weight[f] + sum of values[order[j]] * grad[token[j]]
// Both need the same rows at the same time: one pass over the decoder, one over its gradient.
template <typename T>
void decode_backward(const T* grad, int64_t grad_stride, const T* weight, const int64_t* token, const int64_t* order,
                     const int64_t* pointer, const T* values, const T* scale, int64_t n_features, int64_t columns,
                     T* grad_values, T* grad_weight, int64_t add) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t f = 0; f < n_features; f++) {
    for (int64_t j = pointer[f]; j < pointer[f + 1]; j++) grad_values[order[j]] = T(0);
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const T* __restrict__ w = weight + f * columns + start;
      T* __restrict__ d = grad_weight + f * columns + start;
      if (!add) std::fill(d, d + n, T(0));
      if (scale && scale[f] != T(0)) {
        const T s = scale[f];
#pragma omp simd
        for (int64_t c = 0; c < n; c++) d[c] += s * w[c];
      }
      for (int64_t j = pointer[f]; j < pointer[f + 1]; j++) {
        const T* __restrict__ g = grad + token[j] * grad_stride + start;
        const T v = values[order[j]];
        T dot = 0;
        if (v == T(0)) {  // an entry in the estimator's window carries a gradient but writes nothing
#pragma omp simd reduction(+ : dot)
          for (int64_t c = 0; c < n; c++) dot += g[c] * w[c];
        } else {
#pragma omp simd reduction(+ : dot)
          for (int64_t c = 0; c < n; c++) {
            dot += g[c] * w[c];
            d[c] += v * g[c];
          }
        }
        grad_values[order[j]] += dot;
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

#define EXPORT(T, suffix)                                                                                             \
  void gather_sum_##suffix(const T* rows, int64_t row_stride, const int64_t* index, const int64_t* pointer,           \
                           const T* weights, int64_t n_lists, int64_t columns, T* out, int64_t out_stride, int64_t add) { \
    gather_sum<T>(rows, row_stride, index, pointer, weights, n_lists, columns, out, out_stride, add);                 \
  }                                                                                                                   \
  void decode_backward_##suffix(const T* grad, int64_t grad_stride, const T* weight, const int64_t* token,            \
                                const int64_t* order, const int64_t* pointer, const T* values, const T* scale,        \
                                int64_t n_features, int64_t columns, T* grad_values, T* grad_weight, int64_t add) {       \
    decode_backward<T>(grad, grad_stride, weight, token, order, pointer, values, scale, n_features, columns,          \
                       grad_values, grad_weight, add);                                                                \
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
