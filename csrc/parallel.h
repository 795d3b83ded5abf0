// How a CPU op uses threads without knowing whose they are: the torch side hands in torch's own pool.
#pragma once

#include <atomic>
#include <cstdint>

namespace clmfast {

// Splits [0, n) into ranges, one per thread that joins, calls body(begin, end, context) on each, and returns when all
// are done.
using ParallelFor = void (*)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// One thread does it all.
inline void in_line(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context) {
  body(0, n, context);
}

// How many threads join where there is enough to do.
inline int64_t n_threads(ParallelFor parallel_for) {
  std::atomic<int64_t> n{0};
  parallel_for(
      int64_t{1} << 20, [](int64_t, int64_t, void* n) { ++*static_cast<std::atomic<int64_t>*>(n); }, &n);
  return n;
}

// Calls task(i) once for every i in [0, n), in no particular order. Whoever finishes a task takes the next one, so
// tasks of unequal length balance. A result must therefore never depend on which thread ran what: give each task its
// own output, and add partial results up afterwards in the order of i.
template <class Task>
void for_each(ParallelFor parallel_for, int64_t n, const Task& task) {
  struct Shared {
    const Task& task;
    int64_t n;
    std::atomic<int64_t> next{0};
  } shared{task, n};
  // The range given to a thread is ignored: being called says that it joins.
  auto join = [](int64_t, int64_t, void* context) {
    Shared& shared = *static_cast<Shared*>(context);
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.n;) shared.task(i);
  };
  if (n > 0) parallel_for(n, join, &shared);
}

}  // namespace clmfast
