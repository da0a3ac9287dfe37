// The threads of a block, or threadgroup, as fibers of one thread of the CPU.
//
// A barrier hands over to the next thread, so the order of threads between two barriers can be
// chosen: forward, backward or shuffled.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

namespace on_cpu {

constexpr std::size_t STACK = 256 << 10;

struct Fiber {
  ucontext_t context;
  // Not filled with zeros, which takes longer than a kernel does.
  std::unique_ptr<char[]> stack{new char[STACK]};
  unsigned thread;
  bool done;
};

inline ucontext_t scheduler;
inline Fiber* current;
inline void (*kernel)(void**);
inline void** arguments;

inline void barrier() { swapcontext(&current->context, &scheduler); }

inline void start() {
  kernel(arguments);
  current->done = true;
  barrier();
}

// Runs one block after the other, between barriers in an order of their threads: 0 as they are
// numbered, 1 the other way round, any other one at random, always the same.
class Threads {
 public:
  Threads(void (*function)(void**), void** values, unsigned count, unsigned order)
      : order_(order), random_(order), fibers_(count) {
    kernel = function;
    arguments = values;
  }

  // Whether all threads of a block reached the same number of barriers.
  bool run() {
    bool together = true;
    std::vector<Fiber*> live;
    for (Fiber& fiber : fibers_) {
      fiber.thread = live.size();
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, start, 0);
      live.push_back(&fiber);
    }
    if (order_ == 1) std::reverse(live.begin(), live.end());
    while (!live.empty()) {
      if (order_ > 1) shuffle(live);
      unsigned done = 0;
      for (Fiber* fiber : live) {
        current = fiber;
        swapcontext(&scheduler, &fiber->context);
        done += fiber->done;
      }
      if (done != 0 && done != live.size()) together = false;
      live.erase(std::remove_if(live.begin(), live.end(), [](Fiber* f) { return f->done; }),
                 live.end());
    }
    return together;
  }

 private:
  // Not the standard library's: its header <random> takes the compiler longer than a kernel does.
  void shuffle(std::vector<Fiber*>& fibers) {
    for (unsigned left = fibers.size(); left > 1; left--) {
      // Marsaglia's xorshift, whose state is never zero.
      random_ ^= random_ << 13;
      random_ ^= random_ >> 17;
      random_ ^= random_ << 5;
      std::swap(fibers[left - 1], fibers[random_ % left]);
    }
  }

  unsigned order_;
  unsigned random_;
  std::vector<Fiber> fibers_;
};

}  // namespace on_cpu
