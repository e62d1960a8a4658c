// The loops of an optimizer step over one flat float32 tensor: threads over tiles, vectors within them. What is done to an
// element is the rule's body (rules/*.py); cpu.py writes them after this file, one struct each.
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

// the rule's numbers of one step; by value, so that the compiler knows that no store into a tensor changes them
struct Scalars {
  float value[8];
  float operator[](int i) const { return value[i]; }
};

struct Values {
  const float *lrs, *decays;  // per class
  Scalars scalars;
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

// n elements of one class, of one segment where the rule has segments. Rule::update is the rule's own body, given n as a
// constant wherever a burst is full.
template <typename Rule, typename G>
inline void update_run(float *p, const G *g, float *first, float *second, float of_segment, int64_t n, float lr,
                       float keep, const Scalars s) {
  int64_t i = 0;
  for (; i + burst <= n; i += burst) Rule::update(burst, p + i, g + i, first + i, second + i, of_segment, lr, keep, s);
  Rule::update(n - i, p + i, g + i, first + i, second + i, of_segment, lr, keep, s);
}

// the same for elements of segments shorter than a burst: each has what it needs of its segment beside it
template <typename Rule, typename G>
inline void update_run_each(float *p, const G *g, float *first, const float *of_segments, int64_t n, float lr, float keep,
                            const Scalars s) {
  int64_t i = 0;
  for (; i + burst <= n; i += burst)
    Rule::update_each(burst, p + i, g + i, first + i, first + i, of_segments + i, lr, keep, s);
  Rule::update_each(n - i, p + i, g + i, first + i, first + i, of_segments + i, lr, keep, s);
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
  if (n < lanes / 4) {  // lanes take longer than the sum
    for (int64_t i = 0; i < n; ++i) total += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    return total;
  }
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

template <typename Rule, typename G>
void segment_tile(float *p, const G *g, float *first, float *moments, uint16_t *out, const Tile &t, const Values &values,
                  bool own_sums) {
  const float lr = values.lrs[t.cls], keep = 1.0f - lr * values.decays[t.cls];
  const Scalars s = values.scalars;
  const int64_t units = t.inner / t.unit;
  const auto next = [&](float moment, double sum) {
    return Rule::moment(moment, static_cast<float>(sum / t.segment_numel), s);
  };
  if (own_sums && t.spread) {
    std::vector<double> sums;
    spread_sums(g, t, sums);
    for (int64_t j = 0; j < units; ++j) moments[t.slot + j] = next(moments[t.slot + j], sums[j]);
  }
  std::vector<float> each(t.unit < burst && units > 1 ? t.inner : 0);
  for (int64_t run = 0; run < t.outer; ++run) {
    const int64_t start = t.offset + run * t.stride;
    float *moment = moments + t.slot + run * t.slot_step;
    if (!each.empty()) {
      if (own_sums && !t.spread)
        for (int64_t j = 0; j < units; ++j) moment[j] = next(moment[j], sum_squares(g + start + j * t.unit, t.unit));
      if (run == 0 || t.slot_step != 0)
        for (int64_t i = 0, j = 0; j < units; ++j)
          for (const float of = Rule::of_segment(moment[j], lr, s); i < (j + 1) * t.unit; ++i) each[i] = of;
      update_run_each<Rule>(p + start, g + start, first + start, each.data(), t.inner, lr, keep, s);
      copy_out(out, p, start, t.inner);
      continue;
    }
    for (int64_t j = 0; j < units; ++j) {
      const int64_t at = start + j * t.unit;
      if (own_sums && !t.spread) moment[j] = next(moment[j], sum_squares(g + at, t.unit));
      // fetching the next segment's gradient during the update, or summing it there, was slower with huge pages
      update_run<Rule>(p + at, g + at, first + at, first + at, Rule::of_segment(moment[j], lr, s), t.unit, lr, keep, s);
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

template <typename Rule, typename G>
void element_all(float *p, const G *g, float *const *states, uint16_t *out, const Tile *tiles, int64_t count,
                 const Values &values, int threads) {
  float *const first = states[0], *const second = states[1];
  each_tile(count, threads, [=, &values](int64_t i) {
    const Tile &t = tiles[i];
    const float lr = values.lrs[t.cls], keep = 1.0f - lr * values.decays[t.cls];
    for (int64_t run = 0; run < t.outer; ++run) {
      const int64_t end = t.offset + run * t.stride + t.inner;
      int64_t n;
      for (int64_t at = end - t.inner; at < end; at += n) {
        n = out == nullptr ? t.inner : std::min(end - at, copied);
        update_run<Rule>(p + at, g + at, first + at, second + at, 0.0f, n, lr, keep, values.scalars);
        copy_out(out, p, at, n);
      }
    }
  });
}

template <typename Rule, typename G>
void segment_all(float *p, const G *g, float *const *states, float *moments, uint16_t *out, const Tile *tiles,
                 int64_t count, const Values &values, int own_sums, int threads) {
  float *const first = states[0];
  each_tile(count, threads, [=, &values](int64_t i) {
    segment_tile<Rule>(p, g, first, moments, out, tiles[i], values, own_sums != 0);
  });
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
#define BY_TYPE(call)                                                     \
  switch (type) {                                                         \
    case 0: { const auto *g = static_cast<const float *>(grad); call; } break;    \
    case 1: { const auto *g = static_cast<const BFloat16 *>(grad); call; } break; \
    default: { const auto *g = static_cast<const Half *>(grad); call; } break;    \
  }

// One function per rule, all of one signature: `states`, two pointers, to the element states (the first again where a rule
// has one); `moments`, the segment states, not used by rules without; `scalars`, at most eight.
#define RULE_STEP(name, call)                                                                                            \
  extern "C" void blockwise_step_##name(float *p, const void *grad, int type, float *const *states, float *moments,      \
                                        uint16_t *out, const int64_t *tiles, int64_t count, const float *lrs,            \
                                        const float *decays, const float *scalars, int own_sums, int threads) {          \
    Values values{lrs, decays, {}};                                                                                      \
    std::copy(scalars, scalars + 8, values.scalars.value);                                                               \
    const Tile *table = reinterpret_cast<const Tile *>(tiles);                                                           \
    BY_TYPE(call)                                                                                                        \
  }
#define ELEMENT_RULE(name, Rule) RULE_STEP(name, (element_all<Rule>(p, g, states, out, table, count, values, threads)))
#define SEGMENT_RULE(name, Rule) \
  RULE_STEP(name, (segment_all<Rule>(p, g, states, moments, out, table, count, values, own_sums, threads)))

extern "C" void blockwise_sum_squares(const void *grad, int type, float *sums, const int64_t *tiles, int64_t count,
                                      int threads) {
  const Tile *table = reinterpret_cast<const Tile *>(tiles);
  BY_TYPE((sums_all(g, sums, table, count, threads)))
}
