// Packed attention on the CPU: which kernels run here, and how the work is shared out.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

namespace mm::cpu::attention {
namespace {

const Kernels& kernels([[maybe_unused]] DType dtype) {
#if MM_ATTENTION_X86
  static const bool bf16_products = [] {
    __builtin_cpu_init();
    return MM_X86_LEVEL >= 5 && __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  }();
  if (dtype == DType::kBFloat16 && bf16_products) return kAvx512Bf16;
  static const Kernels* const chosen = [] {
    __builtin_cpu_init();
    if (MM_X86_LEVEL >= 4 && __builtin_cpu_supports("x86-64-v4")) return &kAvx512;
    return MM_X86_LEVEL >= 3 && __builtin_cpu_supports("x86-64-v3") ? &kAvx2 : &kBaseline;
  }();
  return *chosen;
#else
  return kBaseline;
#endif
}

constexpr std::align_val_t kLine{64};
struct Release {
  void operator()(float* memory) const { ::operator delete(memory, kLine); }
};

constexpr int64_t kTasksLeft = 4;         // per thread
constexpr double kPairsPerThread = 4096;  // of width 64: some 10 us, below which another thread costs more than it does

// body(task, following, scratch) for tasks 0, 1, ... of `count`, each by whichever thread is free next, with scratch of
// its own.  While plenty of tasks are left a thread takes its next one before it begins, so that it can fetch that
// one's rows meanwhile; towards the end it would only keep them from threads that have none.   pairs: of all tasks
template <typename Body>
void share_out(int64_t count, double pairs, int64_t D, int64_t scratch_floats, const Parallel& parallel,
               const Body& body) {
  std::atomic<int64_t> next{0}, started{0};
  const double threads = 1.0 + pairs * static_cast<double>(D) / (64.0 * kPairsPerThread);
  parallel(threads < static_cast<double>(count) ? static_cast<int64_t>(threads) : count, [&](int64_t, int64_t) {
    int64_t task = next++;
    if (task >= count) return;
    ++started;
    const std::unique_ptr<float, Release> scratch(
        static_cast<float*>(::operator new(sizeof(float) * scratch_floats, kLine)));
    while (task < count) {
      const int64_t following = count - next >= kTasksLeft * started ? next++ : kNone;
      body(task, following < count ? following : kNone, scratch.get());
      task = following == kNone ? next++ : following;
    }
  });
}

struct Sample {
  int64_t first_query, last_query, first_key, last_key;
  int64_t queries() const { return last_query - first_query; }
  int64_t keys() const { return last_key - first_key; }
  double pairs() const { return static_cast<double>(queries()) * static_cast<double>(keys()); }
};

Sample sample_at(const Backward& b, int64_t s) {
  const int32_t* at = b.samples + 4 * s;
  return {at[0], at[1], at[2], at[3]};
}

double pairs_of(const Backward& b) {
  double total = 0;
  for (int64_t s = 0; s < b.num_samples; ++s) total += sample_at(b, s).pairs();
  return total;
}

// Each chunk has its own part of dq, which takes memory and is added up afterwards.
constexpr int64_t kEnoughTasks = 16;  // of all samples and heads
constexpr int64_t kMinKeys = 256;     // of a chunk
constexpr int64_t kMaxChunks = 8;     // of a sample

// Into how many key ranges each sample is cut.  One, unless there are too few samples and heads to keep many threads
// busy; the layout alone decides, so that sums never depend on the number of threads.
std::vector<int64_t> chunks_of(const Backward& b) {
  std::vector<int64_t> chunks(b.num_samples, 1);
  if (exact_delta(b)) return chunks;
  const double total = pairs_of(b);
  for (int64_t s = 0; s < b.num_samples && total > 0; ++s) {
    const Sample at = sample_at(b, s);
    const double share = at.pairs() / total;
    const auto wanted = static_cast<int64_t>(share * kEnoughTasks / static_cast<double>(b.in.G) + 0.5);
    chunks[s] = std::max<int64_t>(1, std::min({wanted, at.keys() / kMinKeys, kMaxChunks}));
  }
  return chunks;
}

template <typename T>
void add_up(const float* partial, int64_t chunks, int64_t stride, int64_t D, char* to) {
  for (int64_t d = 0; d < D; ++d) {
    float total = partial[d];
    for (int64_t c = 1; c < chunks; ++c) total += partial[c * stride + d];
    reinterpret_cast<T*>(to)[d] = narrow<T>(total);
  }
}

// dq of the samples that were cut: the chunks' parts in order.
void sum_chunks(const Backward& b, const std::vector<int64_t>& chunks, const std::vector<float*>& partials,
                const Parallel& parallel) {
  const Inputs& in = b.in;
  for (int64_t s = 0; s < b.num_samples; ++s) {
    if (chunks[s] == 1) continue;
    const Sample at = sample_at(b, s);
    const int64_t part = at.queries() * in.group() * in.D;
    parallel(at.queries() * in.H, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t query = row / in.H, head = row % in.H, kv_head = head / in.group();
        const float* from = partials[s] + kv_head * chunks[s] * part + (query * in.group() + head % in.group()) * in.D;
        char* to = b.dq.at(at.first_query + query, head);
        if (in.dtype == DType::kFloat32) add_up<float>(from, chunks[s], part, in.D, to);
        if (in.dtype == DType::kBFloat16) add_up<BFloat16>(from, chunks[s], part, in.D, to);
        if (in.dtype == DType::kFloat16) add_up<Float16>(from, chunks[s], part, in.D, to);
      }
    });
  }
}

// The tasks' parts of each head in the order of tasks.
void sum_dbias(const Backward& b, const std::vector<BackwardTask>& tasks) {
  const Inputs& in = b.in;
  const int64_t size = in.Mq * in.Mk;
  std::vector<double> total(in.H * size, 0.0);
  for (const BackwardTask& task : tasks)
    for (int64_t i = 0; i < in.group() * size; ++i) total[task.kv_head * in.group() * size + i] += task.dbias[i];
  std::transform(total.begin(), total.end(), b.dbias, [](double x) { return static_cast<float>(x); });
}

}  // namespace

void forward(const Forward& f, const Parallel& parallel) {
  double pairs = 0;
  for (int64_t t = 0; t < f.num_tiles; ++t) {
    const int32_t* tile = f.tiles + 4 * t;
    for (int64_t s = tile[2]; s < tile[3]; ++s)
      pairs += static_cast<double>(tile[1] - tile[0]) * (f.spans[3 * s + 1] - f.spans[3 * s]);
  }
  share_out(f.num_tiles * f.in.H, pairs * static_cast<double>(f.in.H), f.in.D, kernels(f.in.dtype).forward_scratch(f),
            parallel, [&](int64_t task, int64_t following, float* scratch) {
              kernels(f.in.dtype).forward(f, task, following, scratch);
            });
}

void backward(const Backward& b, const Parallel& parallel) {
  const Inputs& in = b.in;
  const std::vector<int64_t> chunks = chunks_of(b);
  std::vector<BackwardTask> tasks;
  std::vector<float*> partials(b.num_samples, nullptr);
  int64_t max_queries = 0, max_keys = 0, partial_floats = 0;
  for (int64_t s = 0; s < b.num_samples; ++s)
    if (chunks[s] > 1) partial_floats += sample_at(b, s).queries() * in.H * in.D * chunks[s];
  const std::unique_ptr<float[]> memory(new float[partial_floats]);
  float* free = memory.get();
  for (int64_t s = 0; s < b.num_samples; ++s) {
    const Sample at = sample_at(b, s);
    const int64_t part = at.queries() * in.group() * in.D, step = (at.keys() + chunks[s] - 1) / chunks[s];
    if (chunks[s] > 1) partials[s] = free;
    for (int64_t g = 0; g < in.G; ++g)
      for (int64_t c = 0; c < chunks[s]; ++c) {
        const int64_t begin = at.first_key + c * step, end = std::min(begin + step, at.last_key);
        tasks.push_back({s, g, begin, end, chunks[s] > 1 ? free : nullptr, nullptr});
        if (chunks[s] > 1) free += part;
      }
    max_queries = std::max(max_queries, at.queries());
    max_keys = std::max(max_keys, step);
  }
  std::vector<double> dbias;
  if (b.dbias) {
    const int64_t size = in.group() * in.Mq * in.Mk;
    dbias.assign(tasks.size() * size, 0.0);
    for (size_t i = 0; i < tasks.size(); ++i) tasks[i].dbias = dbias.data() + i * size;
  }
  share_out(static_cast<int64_t>(tasks.size()), pairs_of(b) * static_cast<double>(in.H), in.D,
            kernels(in.dtype).backward_scratch(b, max_queries, max_keys), parallel,
            [&](int64_t task, int64_t following, float* scratch) {
              kernels(in.dtype).backward(b, tasks[task], following == kNone ? nullptr : &tasks[following], scratch);
            });
  sum_chunks(b, chunks, partials, parallel);
  if (b.dbias) sum_dbias(b, tasks);
}

int terms(DType dtype) { return kernels(dtype).terms; }

}  // namespace mm::cpu::attention
