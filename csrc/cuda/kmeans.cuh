// kmeans on the GPU, as the torch side calls it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../element.h"
#include "../kmeans.h"

namespace clmfast {

// any: resident where it can be. The two give the same bits.
enum class KmeansPath { any, resident, streaming };

// Bytes of device memory that a call needs, aligned to 256.
size_t kmeans_cuda_scratch(const Kmeans& op);

// op.points points at the element's type; all pointers but those to op and op.known are the device's.
void kmeans_cuda(const Kmeans& op, Element element, KmeansPath path, cudaStream_t stream, void* scratch);

}  // namespace clmfast
