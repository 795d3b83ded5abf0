#include "../stream.h"
#include "launch.cuh"

namespace clmfast {

void use_device(int index) { check(cudaSetDevice(index)); }

}  // namespace clmfast
