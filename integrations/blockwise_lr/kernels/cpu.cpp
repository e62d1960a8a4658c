// One optimizer step over one flat float32 tensor, threads over tiles, vectors within them.
//
// Plain C interface, no PyTorch headers: it compiles in seconds. Tiles are rows of ten int64 numbers:
//   offset, outer, stride, inner, class, slot, slot_step, unit, segment_numel, spread
// `outer` runs of `inner` consecutive elements every `stride`; see tiling.py. A tile's segments belong to no other
// tile, and each is summed by one thread in one order, so results do not depend on the number of threads.
//
// Built without -ffast-math: NaN and inf go through as in PyTorch. `out`, where it is not null, takes the updated
// parameters rounded to bfloat16.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Tile {
  int64_t offset, outer, stride, inner, cls, slot, slot_step, unit, segment_numel, spread;
};

struct Values {
  const float *lrs, *decays;  // per class
  float beta1, beta2, eps, correction1, correction2_sqrt;
};

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};
using Half = _Float16;

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

constexpr int64_t copied = 4096;  // elements updated before they are copied: still in the cache

inline void copy_out(uint16_t *out, const float *p, int64_t at, int64_t n) {
  if (out == nullptr) return;
#pragma omp simd
  for (int64_t i = at; i < at + n; ++i) out[i] = to_bfloat16(p[i]);
}

constexpr int64_t burst = 128;  // memory is read in bursts, one array after another

template <typename G>
inline void adamw_run(float *p, const G *g, float *m, float *v, int64_t n, const Values &values, int64_t cls) {
  const float lr = values.lrs[cls], keep = 1.0f - lr * values.decays[cls], step = lr / values.correction1;
  const float rest1 = 1.0f - values.beta1, beta2 = values.beta2, rest2 = 1.0f - beta2, eps = values.eps;
  const float inverse_root = 1.0f / values.correction2_sqrt;
  int64_t start = 0;
  for (; start + burst <= n; start += burst) {
    float grads[burst], firsts[burst], seconds[burst];
#pragma omp simd
    for (int64_t i = 0; i < burst; ++i) grads[i] = static_cast<float>(g[start + i]);
#pragma omp simd
    for (int64_t i = 0; i < burst; ++i) m[start + i] = firsts[i] = m[start + i] + rest1 * (grads[i] - m[start + i]);
#pragma omp simd
    for (int64_t i = 0; i < burst; ++i) v[start + i] = seconds[i] = beta2 * v[start + i] + rest2 * grads[i] * grads[i];
#pragma omp simd
    for (int64_t i = 0; i < burst; ++i)
      p[start + i] = p[start + i] * keep - step * (firsts[i] / (std::sqrt(seconds[i]) * inverse_root + eps));
  }
#pragma omp simd
  for (int64_t i = start; i < n; ++i) {
    const float grad = static_cast<float>(g[i]);
    const float first = m[i] + rest1 * (grad - m[i]);
    const float second = beta2 * v[i] + rest2 * grad * grad;
    m[i] = first;
    v[i] = second;
    p[i] = p[i] * keep - step * (first / (std::sqrt(second) * inverse_root + eps));
  }
}

// Sums of squares: element i of a block is added to lane i % lanes, a block's lanes pairwise, blocks in double. The order
// is the same wherever a sum is taken, so results repeat.
constexpr int64_t lanes = 64, block = 1024;

struct LaneSums {
  float lane[lanes] = {};
  double total() {
    for (int64_t half = lanes / 2; half > 0; half /= 2)
#pragma omp simd
      for (int64_t k = 0; k < half; ++k) lane[k] += lane[k + half];
    return lane[0];
  }
};

template <typename G>
inline double block_sum(const G *g, int64_t n) {
  LaneSums sums;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
#pragma omp simd
    for (int64_t k = 0; k < lanes; ++k) sums.lane[k] += static_cast<float>(g[i + k]) * static_cast<float>(g[i + k]);
  for (int64_t k = 0; i + k < n; ++k) sums.lane[k] += static_cast<float>(g[i + k]) * static_cast<float>(g[i + k]);
  return sums.total();
}

template <typename G>
inline double sum_squares(const G *g, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += block) total += block_sum(g + start, std::min(block, n - start));
  return total;
}

// sums of squares of the units of a tile whose runs share their slots
template <typename G>
void spread_sums(const G *g, const Tile &t, std::vector<double> &sums) {
  std::vector<float> columns(t.inner);
  std::vector<double> totals(t.inner, 0.0);
  for (int64_t start = 0; start < t.outer; start += 1024) {
    std::fill(columns.begin(), columns.end(), 0.0f);
    const int64_t end = start + 1024 < t.outer ? start + 1024 : t.outer;
    for (int64_t run = start; run < end; ++run) {
      const G *row = g + t.offset + run * t.stride;
      float *sum = columns.data();
#pragma omp simd
      for (int64_t i = 0; i < t.inner; ++i) sum[i] += static_cast<float>(row[i]) * static_cast<float>(row[i]);
    }
    for (int64_t i = 0; i < t.inner; ++i) totals[i] += columns[i];
  }
  sums.assign(t.inner / t.unit, 0.0);
  for (int64_t i = 0; i < t.inner; ++i) sums[i / t.unit] += totals[i];
}

template <typename G>
inline void mini_run(float *p, const G *g, float *m, int64_t n, float keep, float rest1, float step) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float first = m[i] + rest1 * (static_cast<float>(g[i]) - m[i]);
    m[i] = first;
    p[i] = p[i] * keep - step * first;
  }
}

template <typename G>
inline void mini_burst(float *p, const G *g, float *m, float keep, float rest1, float step) {
  float firsts[burst];
#pragma omp simd
  for (int64_t i = 0; i < burst; ++i) m[i] = firsts[i] = m[i] + rest1 * (static_cast<float>(g[i]) - m[i]);
#pragma omp simd
  for (int64_t i = 0; i < burst; ++i) p[i] = p[i] * keep - step * firsts[i];
}

// Updates one segment. The sum of squares has just read its gradient, which is still in the cache; fetching the next
// segment's during the update, or summing it there, was slower with huge pages.
template <typename G>
inline void mini_segment(float *p, const G *g, float *m, int64_t n, float keep, float rest1, float step) {
  int64_t start = 0;
  for (; start + burst <= n; start += burst) mini_burst(p + start, g + start, m + start, keep, rest1, step);
  mini_run(p + start, g + start, m + start, n - start, keep, rest1, step);
}

// step / (sqrt(v) / sqrt(1 - beta2^t) + eps) of one segment
inline float mini_step(float second, float lr, const Values &values) {
  return lr / values.correction1 / (std::sqrt(second) / values.correction2_sqrt + values.eps);
}

inline float next_moment(float moment, double sum, int64_t numel, const Values &values) {
  return values.beta2 * moment + (1.0f - values.beta2) * static_cast<float>(sum / numel);
}

template <typename G>
void mini_tile(float *p, const G *g, float *m, float *v, uint16_t *out, const Tile &t, const Values &values,
               bool own_sums) {
  const float lr = values.lrs[t.cls], keep = 1.0f - lr * values.decays[t.cls], rest1 = 1.0f - values.beta1;
  const int64_t units = t.inner / t.unit;
  if (own_sums && t.spread) {
    std::vector<double> sums;
    spread_sums(g, t, sums);
    for (int64_t j = 0; j < units; ++j) v[t.slot + j] = next_moment(v[t.slot + j], sums[j], t.segment_numel, values);
  }
  for (int64_t run = 0; run < t.outer; ++run) {
    for (int64_t j = 0; j < units; ++j) {
      const int64_t at = t.offset + run * t.stride + j * t.unit;
      float &moment = v[t.slot + run * t.slot_step + j];
      if (own_sums && !t.spread) moment = next_moment(moment, sum_squares(g + at, t.unit), t.segment_numel, values);
      mini_segment(p + at, g + at, m + at, t.unit, keep, rest1, mini_step(moment, lr, values));
      copy_out(out, p, at, t.unit);
    }
  }
}

// A thread's tiles that nobody has begun, as first << 32 | end, on a cache line of its own.
struct alignas(64) Part {
  std::atomic<uint64_t> span;
  static int64_t first(uint64_t s) { return static_cast<int64_t>(s >> 32); }
  static int64_t end(uint64_t s) { return static_cast<int64_t>(s & 0xffffffffu); }

  int64_t left() const {
    const uint64_t now = span.load(std::memory_order_relaxed);
    return end(now) - first(now);
  }
  // a tile from the front, for the thread itself, or from the end, for another thread; -1 where none is left
  int64_t take(bool front) {
    uint64_t now = span.load(std::memory_order_relaxed);
    while (first(now) < end(now))
      if (span.compare_exchange_weak(now, front ? now + (uint64_t{1} << 32) : now - 1, std::memory_order_relaxed))
        return front ? first(now) : end(now) - 1;
    return -1;
  }
};

// Calls work(i) once for every tile i < count. A thread goes through a part of its own, as with schedule(static), and then
// takes tiles from the far end of the fullest other part: cores do not get memory in equal shares, and with fixed parts
// all wait for the slowest (3 to 9% of a step on two cores).
template <typename Work>
void each_tile(int64_t count, int threads, Work work) {
  std::vector<Part> parts(threads);
  for (int t = 0; t < threads; ++t)
    parts[t].span = static_cast<uint64_t>(count * t / threads) << 32 | static_cast<uint64_t>(count * (t + 1) / threads);
#pragma omp parallel num_threads(threads)
  {
    for (int64_t i; (i = parts[omp_get_thread_num()].take(true)) >= 0;) work(i);
    const auto emptier = [](const Part &a, const Part &b) { return a.left() < b.left(); };
    for (auto fullest = parts.begin(); (fullest = std::max_element(parts.begin(), parts.end(), emptier))->left() > 0;) {
      const int64_t i = fullest->take(false);
      if (i >= 0) work(i);
    }
  }
}

template <typename G>
void adamw_all(float *p, const G *g, float *m, float *v, uint16_t *out, const Tile *tiles, int64_t count,
               const Values &values, int threads) {
  each_tile(count, threads, [=, &values](int64_t i) {
    const Tile &t = tiles[i];
    for (int64_t run = 0; run < t.outer; ++run) {
      const int64_t end = t.offset + run * t.stride + t.inner;
      int64_t n;
      for (int64_t at = end - t.inner; at < end; at += n) {
        n = out == nullptr ? t.inner : std::min(end - at, copied);
        adamw_run(p + at, g + at, m + at, v + at, n, values, t.cls);
        copy_out(out, p, at, n);
      }
    }
  });
}

template <typename G>
void mini_all(float *p, const G *g, float *m, float *v, uint16_t *out, const Tile *tiles, int64_t count,
              const Values &values, int own_sums, int threads) {
  each_tile(count, threads, [=, &values](int64_t i) { mini_tile(p, g, m, v, out, tiles[i], values, own_sums != 0); });
}

// Tiles may share slots here, so only the sums run in parallel and are added one after another.
template <typename G>
void sums_all(const G *g, float *sums, const Tile *tiles, int64_t count, int threads) {
  std::vector<std::vector<double>> found(count);
  each_tile(count, threads, [&](int64_t i) {
    const Tile &t = tiles[i];
    if (t.spread) return spread_sums(g, t, found[i]);
    for (int64_t run = 0; run < t.outer; ++run)
      for (int64_t j = 0; j < t.inner / t.unit; ++j)
        found[i].push_back(sum_squares(g + t.offset + run * t.stride + j * t.unit, t.unit));
  });
  for (int64_t i = 0; i < count; ++i) {
    const Tile &t = tiles[i];
    const int64_t units = t.inner / t.unit, runs = t.spread ? 1 : t.outer;
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t j = 0; j < units; ++j)
        sums[t.slot + run * t.slot_step + j] += static_cast<float>(found[i][run * units + j]);
  }
}

}  // namespace

// `type`: 0 float32, 1 bfloat16, 2 float16 gradients
#define BY_TYPE(call_name, ...)                                                                   \
  switch (type) {                                                                                 \
    case 0: call_name(__VA_ARGS__(static_cast<const float *>(grad))); break;                      \
    case 1: call_name(__VA_ARGS__(static_cast<const BFloat16 *>(grad))); break;                   \
    default: call_name(__VA_ARGS__(static_cast<const Half *>(grad))); break;                      \
  }

extern "C" {

void blockwise_adamw(float *p, const void *grad, int type, float *m, float *v, uint16_t *out, const int64_t *tiles,
                     int64_t count, const float *lrs, const float *decays, float beta1, float beta2, float eps,
                     float correction1, float correction2_sqrt, int threads) {
  const Values values{lrs, decays, beta1, beta2, eps, correction1, correction2_sqrt};
  const Tile *table = reinterpret_cast<const Tile *>(tiles);
#define ARGUMENTS(g) p, g, m, v, out, table, count, values, threads
  BY_TYPE(adamw_all, ARGUMENTS)
#undef ARGUMENTS
}

void blockwise_adam_mini(float *p, const void *grad, int type, float *m, float *v, uint16_t *out, const int64_t *tiles,
                         int64_t count, const float *lrs, const float *decays, float beta1, float beta2, float eps,
                         float correction1, float correction2_sqrt, int own_sums, int threads) {
  const Values values{lrs, decays, beta1, beta2, eps, correction1, correction2_sqrt};
  const Tile *table = reinterpret_cast<const Tile *>(tiles);
#define ARGUMENTS(g) p, g, m, v, out, table, count, values, own_sums, threads
  BY_TYPE(mini_all, ARGUMENTS)
#undef ARGUMENTS
}

void blockwise_sum_squares(const void *grad, int type, float *sums, const int64_t *tiles, int64_t count, int threads) {
  const Tile *table = reinterpret_cast<const Tile *>(tiles);
#define ARGUMENTS(g) g, sums, table, count, threads
  BY_TYPE(sums_all, ARGUMENTS)
#undef ARGUMENTS
}

}  // extern "C"
