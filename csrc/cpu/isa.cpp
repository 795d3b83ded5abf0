#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace clmfast {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen() {
  const char* wish = std::getenv("CLMFAST_ISA");
  if (!wish || !*wish) return best();
  std::string name = wish;
  Isa isa = name == "baseline" ? Isa::baseline : name == "avx2" ? Isa::avx2 : Isa::avx512;
  if (isa == Isa::avx512 && name != "avx512")
    throw std::runtime_error("CLMFAST_ISA must be baseline, avx2 or avx512, got " + name);
  if (isa > best()) throw std::runtime_error("CLMFAST_ISA=" + name + ": this processor does not have it");
  return isa;
}

}  // namespace

Isa isa() {
  static const Isa once = chosen();
  return once;
}

}  // namespace clmfast
