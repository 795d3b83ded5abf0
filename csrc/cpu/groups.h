// Who has a group: points by the value of their group, found by hashing, ascending within it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace clmfast {

class Groups {
 public:
  Groups() = default;
  Groups(const int64_t* group, int64_t n) : member_(n) {
    while (static_cast<int64_t>(slots_.size()) < 2 * n) slots_.resize(2 * slots_.size());
    std::vector<int64_t> slot(n);
    for (int64_t i = 0; i < n; ++i) {
      slot[i] = find(group[i]);
      slots_[slot[i]].group = group[i];
      ++slots_[slot[i]].n;
    }
    int64_t begin = 0;
    for (Slot& s : slots_) s.begin = std::exchange(begin, begin + s.n), s.n = 0;
    for (int64_t i = 0; i < n; ++i) member_[slots_[slot[i]].begin + slots_[slot[i]].n++] = i;
  }

  // Calls visit(i) for the points of the group that lie in [first, first + n), ascending.
  template <class Visit>
  void for_members(int64_t group, int64_t first, int64_t n, const Visit& visit) const {
    if (member_.empty()) return;
    const Slot& slot = slots_[find(group)];
    const auto begin = member_.begin() + slot.begin, end = begin + slot.n;
    for (auto i = std::lower_bound(begin, end, first); i != end && *i < first + n; ++i) visit(*i);
  }

 private:
  struct Slot {
    int64_t group = 0, n = 0, begin = 0;
  };

  // Where the group is, or would be.
  int64_t find(int64_t group) const {
    const uint64_t mask = slots_.size() - 1;
    uint64_t at = static_cast<uint64_t>(group) * 0x9e3779b97f4a7c15;  // Fibonacci hashing (Knuth, vol. 3, 6.4)
    for (at = (at >> 32) & mask; slots_[at].n && slots_[at].group != group; at = (at + 1) & mask) {
    }
    return static_cast<int64_t>(at);
  }

  std::vector<Slot> slots_ = std::vector<Slot>(2);
  std::vector<int64_t> member_;
};

}  // namespace clmfast
