// How a launcher starts a kernel: every launch is checked, and an error becomes an exception.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace clmfast {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// `grid` blocks in clusters of `cluster` (1: none), which share one multiprocessor group and each other's shared memory.
// Pass kernels by name: the type of a kernel fixes the types that the arguments are converted to.
template <class... Params, class... Args>
void launch_cluster(void (*kernel)(Params...), unsigned cluster, dim3 grid, dim3 block, size_t smem_bytes,
                    cudaStream_t stream, Args&&... args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (smem_bytes > 48 * 1024)  // what a kernel may have without asking
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes)));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (cluster > 1) {
    if (cluster > 8)  // 8 is what every device with clusters can do
      check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream, Args&&... args) {
  launch_cluster(kernel, 1, grid, block, smem_bytes, stream, std::forward<Args>(args)...);
}

// ---- what the current device can do

inline int device_attribute(cudaDeviceAttr attribute) {
  int device, value;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline int n_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Shared memory that one block may have.
inline size_t max_shared_bytes() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// wgmma exists on 9.0 alone, in the code built for sm_90a; other devices take the mma.sync variant of a kernel.
inline bool has_wgmma() { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

inline bool has_clusters() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// How many clusters of this shape the device can hold at once; 0: it cannot run even one.
template <class... Params>
int n_resident_clusters(void (*kernel)(Params...), unsigned cluster, unsigned block, size_t smem_bytes) {
  const void* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes)));
  if (cluster > 8) check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchConfig_t config = {};
  config.gridDim = cluster;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int n = 0;
  check(cudaOccupancyMaxActiveClusters(&n, kernel, &config));
  return n;
}

}  // namespace clmfast
