// The threads of a block, or threadgroup, as fibers of one thread of the CPU.
//
// Where threads meet, each hands over to the next one, so the order of threads between two barriers
// can be chosen: forward, backward or shuffled.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace on_cpu {

constexpr std::size_t STACK = 256 << 10;

struct Fiber {
  ucontext_t context;
  // Not filled with zeros, which takes longer than a kernel does; nor a std::unique_ptr, whose
  // header <memory> takes the compiler a quarter of a second.
  char* const stack = new char[STACK];
  unsigned thread;
  bool done;

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() { delete[] stack; }
};

inline ucontext_t scheduler;
inline Fiber* current;
inline void (*kernel)(void**);
inline void** arguments;

// A place where a number of threads wait for one another, again and again.
struct Meeting {
  unsigned arrived = 0;
  unsigned long held = 0;
};

inline unsigned threads;
inline Meeting everyone;
inline bool moved;

inline void hand_over() { swapcontext(&current->context, &scheduler); }

inline void meet(Meeting& meeting, unsigned count) {
  const unsigned long before = meeting.held;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    meeting.held++;
    moved = true;
    // The others go on in the order of threads, this one too.
    hand_over();
  }
  while (meeting.held == before) hand_over();
}

inline void barrier() { meet(everyone, threads); }

inline void start() {
  kernel(arguments);
  current->done = true;
  moved = true;
  hand_over();
}

// Runs one block after the other, where threads meet in an order of their threads: 0 as they are
// numbered, 1 the other way round, any other one at random, always the same.
class Threads {
 public:
  Threads(void (*function)(void**), void** values, unsigned count, unsigned order)
      : order_(order), random_(order), fibers_(count) {
    kernel = function;
    arguments = values;
  }

  // Whether all threads of a block reached its end, and none waits for others that do not come.
  bool run() {
    everyone = {};
    threads = fibers_.size();
    std::vector<Fiber*> live;
    for (Fiber& fiber : fibers_) {
      fiber.thread = live.size();
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, start, 0);
      live.push_back(&fiber);
    }
    if (order_ == 1) std::reverse(live.begin(), live.end());
    while (!live.empty()) {
      if (order_ > 1) shuffle(live);
      moved = false;
      for (Fiber* fiber : live) {
        current = fiber;
        swapcontext(&scheduler, &fiber->context);
      }
      if (!moved) return false;
      live.erase(std::remove_if(live.begin(), live.end(), [](Fiber* f) { return f->done; }),
                 live.end());
    }
    return true;
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
