// Stands in for csrc/cuda/launch.cuh.
#pragma once

#include <stdexcept>
#include <utility>

#include "cuda_runtime.h"

namespace clmfast {

inline void check(cudaError_t) {}

template <class... Params, class... Args>
void launch_cluster(void (*kernel)(Params...), unsigned cluster, dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t,
                    Args&&... args) {
  emulator::Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.cluster = cluster;
  launch.dynamic_bytes = smem_bytes;
  launch.body = [&] { kernel(static_cast<Params>(args)...); };
  emulator::run(std::move(launch));
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream, Args&&... args) {
  launch_cluster(kernel, 1, grid, block, smem_bytes, stream, std::forward<Args>(args)...);
}

inline int n_multiprocessors() { return emulator::settings.n_multiprocessors; }
inline size_t max_shared_bytes() { return emulator::settings.capability == 80 ? 163 * 1024 : emulator::MAX_SHARED; }
inline bool has_wgmma() { return emulator::settings.capability == 90; }
inline bool has_clusters() { return emulator::settings.capability >= 90; }

template <class... Params>
int n_resident_clusters(void (*)(Params...), unsigned, unsigned, size_t) {
  return emulator::settings.n_resident_clusters;
}

}  // namespace clmfast
