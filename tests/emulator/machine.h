// A processor that runs CUDA kernels without a GPU, slowly and suspiciously: to find mistakes, not to be fast.
//
// Every thread of a block, and of all blocks of a cluster, is a fiber, a stack of its own in the one real thread. A fiber
// runs until it must meet others (a barrier, a warp collective, the end); who runs next is drawn anew for every seed, so
// that a result that depends on a missing barrier differs from seed to seed. Shared memory begins poisoned. What a
// fiber does wrong ends the launch, and the text says which thread did it.
#pragma once

#if !defined(__x86_64__)
#error "the emulator switches stacks by x86-64 instructions"
#endif

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "types.h"

namespace emulator {

// ---- settings

struct Settings {
  uint64_t seed = 0;
  int capability = 90;         // of the device: 80 or 90
  int n_multiprocessors = 3;   // few, so that grids made for them do several rounds
  int n_resident_clusters = 2;
};
inline Settings settings;

constexpr size_t MAX_SHARED = 227 * 1024, GUARD = 1024, STATIC_ROOM = 48 * 1024;
constexpr size_t STACK = 256 * 1024;

// ---- fibers

struct Fiber;
struct Block;

// Threads that wait for each other: all that run of a warp, a block or a cluster, or a given number.
struct Meeting {
  const char* what = nullptr;
  std::vector<Fiber*> waiting;
  std::function<void()> complete;
};

struct Warp {
  int n_running = 0;
  void* slot[32] = {};  // by lane: what a thread brought to the meeting
  Meeting meeting;
};

struct Copy {
  void* to;
  const void* from;
  int n_bytes, n_all;
};

// Multiplies one thread's part of a wgmma; see ptx.cuh.
using Multiply = std::function<void(float* d)>;

struct Wgmma {
  float* d;
  int n;
  Multiply multiply;
};

// Work of one thread that goes on beside it, in groups of which the open one is last.
template <class T>
using Groups = std::deque<std::vector<T>>;

struct Fiber {
  Block* block;
  uint3 thread;
  unsigned linear;
  void* stack_pointer;
  char* stack;
  int n_true;  // the answer of __syncthreads_count
  Groups<Copy> copies = {{}};
  Groups<Wgmma> wgmmas = {{}};
  std::vector<std::pair<float*, std::vector<float>>> sums;  // of wgmmas that have not been waited for
  bool is_fenced = false;

  Warp& warp() const;
  int lane() const { return static_cast<int>(linear % 32); }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int n_running = 0;
  Meeting meeting;
};

struct Block {
  uint3 index;
  unsigned rank;
  Cluster* cluster;
  std::vector<Warp> warps;
  int n_running = 0, n_true = 0;
  Meeting meeting, named[16];
  std::vector<std::pair<Copy, void*>> bulk;  // and the barriers that they are counted at
  char* shared;  // what the launch asked for, a guard, the static part
};

struct Launch {
  dim3 grid, block;
  unsigned cluster;
  size_t dynamic_bytes, static_bytes = 0;
  std::vector<std::pair<const void*, size_t>> statics;  // where each type lies
  std::function<void()> body;

  size_t static_begin() const { return (dynamic_bytes + GUARD + 1023) / 1024 * 1024; }
};

inline Launch* launched = nullptr;
inline Fiber* self = nullptr;
inline std::vector<Fiber*> runnable;
inline void* scheduler_stack = nullptr;
inline std::string failure;  // of the first launch that failed; later ones do nothing

inline Warp& Fiber::warp() const { return block->warps[linear / 32]; }

// Saves the registers that a call keeps on the stack, and goes on where `to` saved its own.
extern "C" void emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void to_scheduler() { emulator_switch(&self->stack_pointer, scheduler_stack); }

// Ends the launch; does not return to a kernel.
inline void fail(const std::string& text) {
  if (failure.empty()) {
    failure = text;
    if (self) {
      auto at = [](uint3 i) {
        return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
      };
      failure += " [block " + at(self->block->index) + ", thread " + at(self->thread) + "]";
    }
  }
  if (self) to_scheduler();
}

inline uint64_t random_state;
inline uint64_t draw(uint64_t n) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545f4914f6cdd1d >> 16) % n;
}

template <class T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[draw(i)]);
}

// Of even seeds anyone runs next; of odd ones who was freed last, so that one warp runs far ahead of the others.
inline Fiber* next_runnable() {
  if (settings.seed % 2 == 0) std::swap(runnable.back(), runnable[draw(runnable.size())]);
  Fiber* fiber = runnable.back();
  runnable.pop_back();
  return fiber;
}

inline int poison() { return settings.seed / 2 % 2 ? 0xcd : 0xff; }  // 0xff: NaN in every floating-point type

// ---- meetings

inline void release(Meeting& meeting) {
  if (meeting.complete) meeting.complete();
  std::vector<Fiber*> freed;
  freed.swap(meeting.waiting);
  meeting.what = nullptr;
  meeting.complete = nullptr;
  shuffle(freed);
  runnable.insert(runnable.end(), freed.begin(), freed.end());
}

// Waits until n_needed threads are there. The last to come calls `complete`.
inline void meet(Meeting& meeting, int n_needed, const char* what, std::function<void()> complete = nullptr) {
  if (meeting.what && std::strcmp(meeting.what, what) != 0)
    return fail(std::string("threads that must meet are at ") + meeting.what + " and at " + what);
  meeting.what = what;
  if (complete) meeting.complete = std::move(complete);
  meeting.waiting.push_back(self);
  if (static_cast<int>(meeting.waiting.size()) == n_needed) release(meeting);
  to_scheduler();
}

inline void release_if_all_left(Meeting& meeting, int n_needed) {
  if (!meeting.waiting.empty() && static_cast<int>(meeting.waiting.size()) == n_needed) release(meeting);
}

// Every running thread of the warp brings `mine`; complete(slots) is given those of all lanes, null where none runs.
template <class T, class F>
void meet_warp(const char* what, T& mine, const F& complete) {
  Warp& warp = self->warp();
  warp.slot[self->lane()] = &mine;
  meet(warp.meeting, warp.n_running, what, [&warp, complete] {
    T* slots[32];
    for (int lane = 0; lane < 32; ++lane) slots[lane] = static_cast<T*>(warp.slot[lane]);
    complete(slots);
    std::fill_n(warp.slot, 32, nullptr);
  });
}

// As above, of instructions that need all 32.
template <class T, class F>
void meet_whole_warp(const char* what, T& mine, const F& complete) {
  if (self->warp().n_running != 32) return fail(std::string(what) + " in a warp of which not all threads run");
  meet_warp(what, mine, complete);
}

// The number of threads of the block for which `holds`.
inline int meet_block(const char* what, bool holds) {
  Block& block = *self->block;
  block.n_true += holds;
  meet(block.meeting, block.n_running, what, [&block] {
    for (Fiber* fiber : block.meeting.waiting) fiber->n_true = block.n_true;
    block.n_true = 0;
  });
  return self->n_true;
}

// ---- a launch

inline void run_thread() {
  launched->body();
  Block& block = *self->block;
  Warp& warp = self->warp();
  if (self->copies.size() > 1 || !self->copies.back().empty()) fail("a thread ended before its cp.async were waited for");
  if (!self->sums.empty()) fail("a thread ended before its wgmma were waited for");
  release_if_all_left(warp.meeting, --warp.n_running);
  release_if_all_left(block.meeting, --block.n_running);
  release_if_all_left(block.cluster->meeting, --block.cluster->n_running);
  if (block.n_running == 0) {
    for (size_t i = 0; i < GUARD; ++i)
      if (static_cast<unsigned char>(block.shared[launched->dynamic_bytes + i]) != 0xa5) {
        fail("a kernel wrote behind its dynamic shared memory");
        break;
      }
    // What another block of the cluster still reads of it.
    std::memset(block.shared, poison(), launched->static_begin() + launched->static_bytes);
  }
  self->stack_pointer = nullptr;
  void* nowhere;
  emulator_switch(&nowhere, scheduler_stack);
}

inline char* map_memory(size_t n_bytes) {
  void* memory = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

// Stacks are kept from launch to launch.
inline char* stack_of(size_t i) {
  static std::vector<char*> stacks;
  while (stacks.size() <= i) stacks.push_back(map_memory(STACK));
  return stacks[i];
}

inline char* shared_of(size_t i) {
  static std::vector<char*> arenas;
  while (arenas.size() <= i) arenas.push_back(map_memory(MAX_SHARED + 3 * 1024 + STATIC_ROOM));
  return arenas[i];
}

inline void run_cluster(Launch& launch, dim3 first_block) {
  Cluster cluster;
  std::vector<std::unique_ptr<Fiber>> fibers;
  const unsigned n_threads = launch.block.x * launch.block.y * launch.block.z;
  runnable.clear();
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    cluster.blocks.push_back(std::make_unique<Block>());
    Block& block = *cluster.blocks.back();
    block.index = {first_block.x + rank, first_block.y, first_block.z};
    block.rank = rank;
    block.cluster = &cluster;
    block.warps.resize((n_threads + 31) / 32);
    block.shared = shared_of(rank);
    std::memset(block.shared, poison(), launch.static_begin() + STATIC_ROOM);
    std::memset(block.shared + launch.dynamic_bytes, 0xa5, GUARD);
    for (unsigned i = 0; i < n_threads; ++i) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      fiber.block = &block;
      fiber.linear = i;
      fiber.thread = {i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y};
      fiber.stack = stack_of(fibers.size() - 1);
      std::memset(fiber.stack, 0xa5, 64);
      void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 1;  // as a call would leave it
      *--top = reinterpret_cast<void*>(run_thread);
      fiber.stack_pointer = top - 6;
      ++fiber.warp().n_running, ++block.n_running, ++cluster.n_running;
      runnable.push_back(&fiber);
    }
  }
  shuffle(runnable);
  while (!runnable.empty() && failure.empty()) {
    self = next_runnable();
    emulator_switch(&scheduler_stack, self->stack_pointer);
    if (static_cast<unsigned char>(self->stack[0]) != 0xa5) fail("a thread's local arrays overran the emulator's stack");
    self = nullptr;
  }
  self = nullptr;
  if (!failure.empty() || cluster.n_running == 0) return;
  failure = "threads wait for others that never come:";
  auto tell = [](const Meeting& meeting) {
    if (!meeting.waiting.empty())
      failure += " " + std::to_string(meeting.waiting.size()) + " at " + meeting.what + " (the first is thread " +
                 std::to_string(meeting.waiting[0]->linear) + " of block rank " +
                 std::to_string(meeting.waiting[0]->block->rank) + ");";
  };
  tell(cluster.meeting);
  for (const auto& block : cluster.blocks) {
    tell(block->meeting);
    for (const Meeting& meeting : block->named) tell(meeting);
    for (const Warp& warp : block->warps) tell(warp.meeting);
  }
}

inline void run(Launch launch) {
  if (!failure.empty()) return;
  const unsigned n_threads = launch.block.x * launch.block.y * launch.block.z;
  if (n_threads == 0 || n_threads > 1024 || launch.block.z > 64) return fail("a block must have 1 to 1024 threads");
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return fail("a grid must have a block");
  if (launch.grid.x > 0x7fffffff || launch.grid.y > 65535 || launch.grid.z > 65535) return fail("the grid is too large");
  if (launch.cluster > 16 || launch.grid.x % launch.cluster) return fail("a grid must be made of whole clusters of up to 16");
  if (launch.dynamic_bytes > MAX_SHARED) return fail("more shared memory than a block can have");
  if (launch.cluster > 1 && settings.capability < 90) return fail("clusters on a device that has none");
  launched = &launch;
  std::vector<uint64_t> clusters(uint64_t{launch.grid.x / launch.cluster} * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  random_state = settings.seed * 0x9e3779b97f4a7c15 + 0x1234567;
  shuffle(clusters);
  const unsigned per_row = launch.grid.x / launch.cluster;
  for (uint64_t i : clusters) {
    run_cluster(launch, dim3(static_cast<unsigned>(i % per_row) * launch.cluster,
                             static_cast<unsigned>(i / per_row % launch.grid.y),
                             static_cast<unsigned>(i / per_row / launch.grid.y)));
    if (!failure.empty()) break;
  }
  launched = nullptr;
}

// ---- shared memory

template <class T>
T& static_shared() {
  static const char key = 0;
  Launch& launch = *launched;
  size_t at = launch.static_bytes;
  for (auto [known, offset] : launch.statics)
    if (known == &key) at = offset;
  if (at == launch.static_bytes) {
    at = (at + alignof(T) - 1) / alignof(T) * alignof(T);
    if (at + sizeof(T) > STATIC_ROOM || launch.dynamic_bytes + at + sizeof(T) > MAX_SHARED)
      fail("more static shared memory than a block can have");
    launch.statics.push_back({&key, at});
    launch.static_bytes = at + sizeof(T);
  }
  return *reinterpret_cast<T*>(self->block->shared + launch.static_begin() + at);
}

inline size_t shared_offset(const void* shared) {
  const char* at = static_cast<const char*>(shared);
  const size_t offset = static_cast<size_t>(at - self->block->shared);
  if (at < self->block->shared || offset >= launched->static_begin() + launched->static_bytes)
    fail("an address that is not in the block's shared memory");
  return offset;
}

inline void require_aligned(const void* address, size_t n_bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % n_bytes) fail(std::string(what) + ": address is not aligned");
}

}  // namespace emulator

// ---- what the compiler calls where it sees undefined behaviour (-fsanitize=...); all data begins with the place

namespace emulator {
struct Place {
  const char* file;
  uint32_t line, column;
};
inline void fail_at(const void* data, const char* what) {
  const Place& place = *static_cast<const Place*>(data);
  const char* name = std::strrchr(place.file, '/');
  fail(std::string(what) + " at " + (name ? name + 1 : place.file) + ":" + std::to_string(place.line));
}
}  // namespace emulator

#define EMULATOR_HANDLER(NAME, WHAT, ...)                                                                  \
  extern "C" __attribute__((visibility("hidden"), used)) inline void __ubsan_handle_##NAME(__VA_ARGS__) { \
    emulator::fail_at(data, WHAT);                                                                        \
  }
EMULATOR_HANDLER(type_mismatch_v1, "misaligned or null pointer", void* data, void*)
EMULATOR_HANDLER(out_of_bounds, "index out of an array's bounds", void* data, void*)
EMULATOR_HANDLER(shift_out_of_bounds, "shift by too much", void* data, void*, void*)
EMULATOR_HANDLER(divrem_overflow, "division by zero", void* data, void*, void*)
EMULATOR_HANDLER(add_overflow, "integer overflow", void* data, void*, void*)
EMULATOR_HANDLER(sub_overflow, "integer overflow", void* data, void*, void*)
EMULATOR_HANDLER(mul_overflow, "integer overflow", void* data, void*, void*)
EMULATOR_HANDLER(negate_overflow, "integer overflow", void* data, void*)
EMULATOR_HANDLER(float_cast_overflow, "number too large for its integer type", void* data, void*)

// ---- how the tests steer it

extern "C" {
__attribute__((used)) inline const char* emulator_failure() { return emulator::failure.c_str(); }
__attribute__((used)) inline void emulator_reset(int64_t seed, int64_t capability, int64_t n_multiprocessors,
                                                 int64_t n_resident_clusters) {
  emulator::failure.clear();
  emulator::settings = {static_cast<uint64_t>(seed), static_cast<int>(capability), static_cast<int>(n_multiprocessors),
                        static_cast<int>(n_resident_clusters)};
}
}
