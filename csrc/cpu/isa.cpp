#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace clmfast {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) return __builtin_cpu_supports("avx512vnni") ? Isa::avx512vnni : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen() {
  const char* wish = std::getenv("CLMFAST_ISA");
  if (!wish || !*wish) return best();
  const std::string name = wish;
  constexpr const char* NAMES[] = {"baseline", "avx2", "avx512", "avx512vnni"};
  const auto found = std::find(std::begin(NAMES), std::end(NAMES), name);
  if (found == std::end(NAMES))
    throw std::runtime_error("CLMFAST_ISA must be baseline, avx2, avx512 or avx512vnni, got " + name);
  const Isa isa = static_cast<Isa>(found - std::begin(NAMES));
  if (isa > best()) throw std::runtime_error("CLMFAST_ISA=" + name + ": this processor does not have it");
  return isa;
}

}  // namespace

Isa isa() {
  static const Isa once = chosen();
  return once;
}

}  // namespace clmfast
