// What stands between torch and an op: checks, memory, and errors that keep their text.
//
// An op throws std::invalid_argument where its caller is wrong (ValueError in Python), NoMemory where memory cannot be
// had (MemoryError), and std::runtime_error for the rest. `guarded` sees to it that nothing else leaves an op.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sys/sysinfo.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <iomanip>
#include <new>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// torch has this from 2.13 on; before, it is null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace clmfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- what must hold

// Throws what Python sees as a ValueError with this text.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class Sizes>
std::string listed(const Sizes& sizes) {
  std::ostringstream text;
  text << '[';
  const char* between = "";
  for (int64_t size : sizes) text << std::exchange(between, ", ") << size;
  text << ']';
  return text.str();
}

inline std::string shape(const Tensor& x) { return listed(x.sizes()); }
inline std::string strides(const Tensor& x) { return listed(x.strides()); }

inline bool has_shape(const Tensor& x, std::initializer_list<int64_t> sizes) {
  if (x.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes)
    if (x.size(i++) != size) return false;
  return true;
}

// As Python calls it.
inline std::string dtype(const Tensor& x) {
  const std::pair<ScalarType, const char*> names[] = {
      {ScalarType::Float, "float32"},       {ScalarType::Double, "float64"},      {ScalarType::BFloat16, "bfloat16"},
      {ScalarType::Half, "float16"},        {ScalarType::Long, "int64"},          {ScalarType::Int, "int32"},
      {ScalarType::Short, "int16"},         {ScalarType::Char, "int8"},           {ScalarType::Byte, "uint8"},
      {ScalarType::UInt16, "uint16"},       {ScalarType::UInt32, "uint32"},       {ScalarType::UInt64, "uint64"},
      {ScalarType::Bool, "bool"},           {ScalarType::ComplexHalf, "complex32"},
      {ScalarType::ComplexFloat, "complex64"}, {ScalarType::ComplexDouble, "complex128"}};
  for (const auto& [type, name] : names)
    if (x.scalar_type() == type) return name;
  return "another dtype";
}

inline bool is_same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

// Bytes from the first element to behind the last; strides are never negative.
inline int64_t n_bytes_spanned(const Tensor& x) {
  if (x.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
  return (last + 1) * static_cast<int64_t>(x.element_size());
}

// Throws unless x is on the device of `beside` and has the memory that its shape speaks of: of a storage that was
// resized there may be less.
inline void require_there(const char* op, const char* name, const Tensor& x, const Tensor& beside) {
  require(is_same_device(x, beside), op, ": all tensors must be on one device, but ", name, " is on another");
  int64_t size = 0, offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(x.get(), &offset));
  const int64_t needed = x.numel() ? offset * static_cast<int64_t>(x.element_size()) + n_bytes_spanned(x) : 0;
  require(needed <= size, op, ": the storage of ", name, " must hold its elements, ", needed, " bytes, got ", size);
}

// Whether two elements may lie in one place: not if every stride is longer than all that the shorter ones span.
inline bool overlaps_itself(const Tensor& x) {
  if (x.numel() == 0) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t i = 0; i < x.dim(); ++i)
    if (x.size(i) > 1) dims.emplace_back(x.stride(i), x.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t spanned = 0;
  for (auto [stride, size] : dims) {
    if (stride <= spanned) return true;
    spanned += stride * (size - 1);
  }
  return false;
}

// Whether a and b may have an element in one place. Interleaved, as columns of one matrix, they do not: then all
// strides but the shortest are multiples of a period, within which each has a part of its own.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const char* first_a = static_cast<const char*>(a.const_data_ptr());
  const char* first_b = static_cast<const char*>(b.const_data_ptr());
  if (first_a + n_bytes_spanned(a) <= first_b || first_b + n_bytes_spanned(b) <= first_a) return false;
  int64_t period = 0;
  for (const Tensor* x : {&a, &b})
    for (int64_t i = 0; i < x->dim(); ++i)
      if (x->size(i) > 1 && x->stride(i) != 1)
        period = std::gcd(period, x->stride(i) * static_cast<int64_t>(x->element_size()));
  if (period == 0) return true;
  auto width = [](const Tensor& x) {  // of what lies side by side
    int64_t n = 1;
    for (int64_t i = 0; i < x.dim(); ++i)
      if (x.stride(i) == 1) n += x.size(i) - 1;
    return n * static_cast<int64_t>(x.element_size());
  };
  const int64_t apart = ((first_b - first_a) % period + period) % period;
  return apart < width(a) || apart + width(b) > period;
}

// Throws unless every element that is written has a place of its own.
using Named = std::pair<const char*, const Tensor*>;
inline void require_apart(const char* op, const std::vector<Named>& written, const std::vector<Named>& read) {
  std::vector<Named> all(written);
  all.insert(all.end(), read.begin(), read.end());
  for (size_t i = 0; i < written.size(); ++i) {
    require(!overlaps_itself(*all[i].second), op, ": ", all[i].first, " must have strides that keep its elements apart, got ",
            strides(*all[i].second));
    for (size_t j = i + 1; j < all.size(); ++j)
      require(!overlap(*all[i].second, *all[j].second), op, ": ", all[i].first, " must not share memory with ",
              all[j].first);
  }
}

// ---- memory

// MemoryError in Python.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// What torch said of the call that failed last in this thread; empty where it does not tell.
inline std::string words_of_torch() {
  if (!torch_exception_get_what_without_backtrace) return "";
  const char* told = torch_exception_get_what_without_backtrace();
  return told ? told : "";
}

inline std::string in_gb(double n_bytes) {
  std::ostringstream text;
  text << std::setprecision(3) << n_bytes / 1e9 << " GB";
  return text.str();
}

// Throws if a machine, or this one, cannot have so much memory: asked for more, Linux would promise it, and end the
// process once it is used. what() says what it is for; it is called only then, as texts take longer than checks.
template <class What>
void require_memory(const char* op, const What& what, double n_bytes, bool is_on_host) {
  constexpr double ADDRESSES = 0x1p47;  // bytes that a process can tell apart
  struct sysinfo machine;
  double most = ADDRESSES;
  if (is_on_host && sysinfo(&machine) == 0)
    most = std::min(most, (1.0 * machine.totalram + 1.0 * machine.totalswap) * machine.mem_unit);
  if (n_bytes <= most) return;
  throw NoMemory(std::string(op) + ": needs " + in_gb(n_bytes) + " for " + what() + ", there can be at most " +
                 in_gb(most));
}

// make(), which allocates a tensor of so many bytes.
template <class What, class Make>
Tensor allocated(const char* op, const What& what, double n_bytes, const Tensor& like, const Make& make) {
  const bool is_on_host = like.is_cpu();
  constexpr double SMALL = 0x1p20;  // not worth asking the machine
  if (n_bytes > SMALL) require_memory(op, what, n_bytes, is_on_host);
  try {
    return make();
  } catch (const std::exception&) {
    const std::string told = words_of_torch();
    // Other failures come to light where memory is asked for, too: those of a GPU's earlier work.
    const auto says = [&](const char* words) { return told.find(words) != std::string::npos; };
    if (!told.empty() && !says("memory") && !says("alloc"))
      throw std::runtime_error(std::string(op) + ": no tensor for " + what() + ": " + told.substr(0, told.find('\n')));
    throw NoMemory(std::string(op) + ": needs " + in_gb(n_bytes) + " for " + what() + ", which could not be had" +
                   (told.empty() ? "" : ": " + told));
  }
}

template <class Sizes>
double n_bytes_of(const Sizes& sizes, size_t element_size) {
  double n = static_cast<double>(element_size);
  for (int64_t size : sizes) n *= static_cast<double>(size);
  return n;
}

inline size_t element_size_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    default: return 8;
  }
}

inline Tensor empty(const char* op, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return allocated(
      op, [&] { return "a result of shape " + listed(sizes); }, n_bytes_of(sizes, element_size_of(type)), like,
      [&] { return torch::stable::new_empty(like, sizes, type); });
}

// x as this type, its elements one after another; x itself where it is so already.
inline Tensor dense(const char* op, const Tensor& x, ScalarType type) {
  const bool is_of_type = x.scalar_type() == type;
  if (is_of_type && x.is_contiguous()) return x;
  return allocated(
      op, [&] { return "a copy of a tensor of shape " + shape(x); }, n_bytes_of(x.sizes(), element_size_of(type)), x,
      [&] { return torch::stable::contiguous(is_of_type ? x : torch::stable::to(x, type)); });
}

inline Tensor dense(const char* op, const Tensor& x) { return dense(op, x, x.scalar_type()); }

inline MaybeTensor dense(const char* op, const MaybeTensor& x) {
  return x ? MaybeTensor(dense(op, *x)) : std::nullopt;
}

// The elements. Never null, not even where there are none: a null pointer says that an argument was not given.
template <class T>
const T* data(const Tensor& x) {
  static const T none{};
  return x.numel() ? static_cast<const T*>(x.const_data_ptr()) : &none;
}

template <class T>
T* mutable_data(const Tensor& x) {
  static T none{};
  return x.numel() ? static_cast<T*>(x.mutable_data_ptr()) : &none;
}

// ---- threads

// torch's pool. It would forget what a task throws, so that is carried past it. (Not by std::exception_ptr, which needs
// symbols that not every libstdc++ has.)
inline void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  std::atomic<bool> lacks_memory{false}, has_failed{false};
  std::string text;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end, context);
    } catch (const std::bad_alloc&) {
      lacks_memory = true;
    } catch (const std::length_error&) {
      lacks_memory = true;
    } catch (const std::exception& error) {
      if (!has_failed.exchange(true)) text = error.what();
    }
  });
  if (lacks_memory) throw std::bad_alloc();
  if (has_failed) throw std::runtime_error(text);
}

// ---- errors

// torch hands None on as a tensor that is not there.
inline bool is_given(const Tensor& x) { return x.defined(); }
inline bool is_given(const MaybeTensor& x) { return !x || x->defined(); }
inline bool is_given(const std::vector<Tensor>& list) {
  return std::all_of(list.begin(), list.end(), [](const Tensor& x) { return x.defined(); });
}
template <class T>
bool is_given(const T&) {
  return true;
}

template <class Op, auto function>
struct Guarded;

// `function`, the op's implementation, whose errors say which op it was and why.
template <class Op, class Result, class... Arguments, Result (*function)(Arguments...)>
struct Guarded<Op, function> {
  static Result call(Arguments... arguments) {
    constexpr const char* op = Op::name();
    try {
      require((is_given(arguments) && ...), op, ": all tensors must be given, got None for one of them");
      return function(std::forward<Arguments>(arguments)...);
    } catch (const NoMemory&) {
      throw;
    } catch (const std::bad_alloc&) {
      throw NoMemory(std::string(op) + ": needs more memory to compute in than could be had");
    } catch (const std::length_error&) {
      throw NoMemory(std::string(op) + ": needs more memory to compute in than could be had");
    } catch (const std::runtime_error& error) {
      // The headers of torch 2.11 throw this, whichever torch runs.
      const std::string text = error.what();
      if (text.find(" API call failed at ") == std::string::npos) throw;
      const std::string told = words_of_torch();
      throw std::runtime_error(std::string(op) + ": " +
                               (told.empty() ? text + "; torch wrote the reason to standard error" : told));
    }
  }
};

#define CLMFAST_IMPLEMENT(library, op)                       \
  do {                                                       \
    struct Op {                                              \
      static constexpr const char* name() { return #op; }    \
    };                                                       \
    library.impl(#op, TORCH_BOX((&Guarded<Op, &op>::call))); \
  } while (false)

}  // namespace clmfast
