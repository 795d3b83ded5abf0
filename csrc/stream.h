// What the torch side and the CUDA launchers share without a CUDA header.
//
// A launcher NAME_cuda(op, ..., stream) puts its kernels into the stream of the current device and returns: it allocates
// nothing, waits for nothing, and throws if a launch fails. Memory that it needs beside its op's is passed in as
// `scratch`, NAME_cuda_scratch(op) bytes on that device, of any content.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace clmfast {

using CudaStream = CUstream_st*;

// Makes a device the current one of the CUDA runtime that is linked into this library.
void use_device(int index);

}  // namespace clmfast
