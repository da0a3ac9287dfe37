// What launches of CUDA kernels on the CPU share: built once, and linked to each kernel.

#include <map>
#include <utility>
#include <vector>

#include "cuda.h"

namespace cuda_on_cpu {

Warp* warps;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool inside;
};
static std::vector<std::vector<std::vector<Copy>>> copies;

void copy(void* to, const void* from, int bytes, bool inside) {
  copies[on_cpu::current->thread].back().push_back({to, from, bytes, inside});
}

void commit() { copies[on_cpu::current->thread].emplace_back(); }

void wait(unsigned pending) {
  auto& groups = copies[on_cpu::current->thread];
  while (groups.size() - 1 > pending) {
    for (const Copy& one : groups.front()) {
      if (one.inside) {
        std::memcpy(one.to, one.from, one.bytes);
      } else {
        std::memset(one.to, 0, one.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

// Calls a function of each element of a box: its address in shared memory, and that in the array, or
// null outside of it. Shared memory is swizzled by 64 bytes, of elements of 16 bits.
template <typename Function>
static void each_of_box(const TensorMap& map, const Place& place, unsigned char* at,
                        Function function) {
  const int first[4] = {place.channel, place.column, place.row, place.image};
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(at);
  std::uintptr_t offset = 0;
  for (int n = 0; n < map.box[3]; n++)
    for (int row = 0; row < map.box[2]; row++)
      for (int column = 0; column < map.box[1]; column++)
        for (int c = 0; c < map.box[0]; c++, offset += map.bytes) {
          const int i[4] = {c + first[0], column + first[1], row + first[2], n + first[3]};
          bool inside = true;
          long long element = 0;
          for (int axis = 3; axis >= 0; axis--) {
            inside &= i[axis] >= 0 && i[axis] < map.sizes[axis];
            element += map.strides[axis] * i[axis];
          }
          const std::uintptr_t here = start + offset;
          const std::uintptr_t swizzle = map.bytes == 2 ? (here >> 7 & 3) << 4 : 0;
          function(reinterpret_cast<unsigned char*>(here ^ swizzle),
                   inside ? map.array + element * map.bytes : nullptr);
        }
}

struct Load {
  unsigned char* to;
  const TensorMap* map;
  Place place;
};
struct Waiting {
  unsigned needed, arrived = 0;
  long bytes = 0;
  unsigned phases = 0;
  std::vector<Load> loads;
};
static std::map<const void*, Waiting> barriers;
static Waiting& barrier_at(const void* place) {
  const auto found = barriers.find(place);
  if (found != barriers.end()) return found->second;
  misused = true;
  return barriers[place];
}

void make(const void* barrier, unsigned arrivals) { barriers[barrier] = {arrivals}; }

static void end_phase(Waiting& one) {
  if (one.arrived != one.needed || one.bytes != 0) return;
  one.arrived = 0;
  one.phases++;
  on_cpu::moved = true;
}

void arrive(const void* barrier) {
  Waiting& one = barrier_at(barrier);
  one.arrived++;
  end_phase(one);
}

void expect(const void* barrier, unsigned bytes) {
  Waiting& one = barrier_at(barrier);
  one.arrived++;
  one.bytes += bytes;
  // Who starts copies alone lets others go on.
  on_cpu::moved = true;
}

void load_box(void* to, const TensorMap& map, const void* barrier, const Place& place) {
  // Swizzles repeat after so many bytes.
  misused |= reinterpret_cast<std::uintptr_t>(to) % (map.bytes == 2 ? 1024 : 128) != 0;
  barrier_at(barrier).loads.push_back({static_cast<unsigned char*>(to), &map, place});
}

void wait_for(const void* barrier, unsigned phase) {
  Waiting& one = barrier_at(barrier);
  while (one.phases % 2 == phase) {
    for (const Load& load : std::exchange(one.loads, {})) {
      const int bytes = load.map->bytes;
      each_of_box(*load.map, load.place, load.to, [=](unsigned char* to, const unsigned char* from) {
        if (from) {
          std::memcpy(to, from, bytes);
        } else {
          std::memset(to, 0, bytes);
        }
      });
      const int* box = load.map->box;
      one.bytes -= long(bytes) * box[0] * box[1] * box[2] * box[3];
    }
    end_phase(one);
    if (one.phases % 2 == phase) on_cpu::hand_over();
  }
}

struct Store {
  const TensorMap* map;
  Place place;
  unsigned char* from;
};
static std::vector<std::vector<Store>> stores;

void store_box(const TensorMap& map, const Place& place, const void* from) {
  misused |= reinterpret_cast<std::uintptr_t>(from) % 1024 != 0;
  auto* bytes = const_cast<unsigned char*>(static_cast<const unsigned char*>(from));
  stores[on_cpu::current->thread].push_back({&map, place, bytes});
}

void stored(unsigned pending) {
  auto& own = stores[on_cpu::current->thread];
  for (; own.size() > pending; own.erase(own.begin()))
    each_of_box(*own.front().map, own.front().place, own.front().from,
                [&](const unsigned char* from, unsigned char* to) {
                  if (to) std::memcpy(to, from, own.front().map->bytes);
                });
}

int launch(void (*function)(void**), void** values, unsigned blocks, unsigned threads,
           unsigned bytes, unsigned order) {
  on_cpu::Threads block(function, values, threads, order);
  bool together = true;
  misused = false;
  grid.x = blocks;
  for (unsigned i = 0; i < blocks; i++) {
    block_index.x = order == 1 ? blocks - 1 - i : i;
    // As aligned as on a GPU, and of exactly the size.
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, bytes + !bytes)) return 1;
    shared = static_cast<float*>(memory);
    std::fill_n(shared, bytes / sizeof(float), __uint_as_float(POISON));
    std::vector<Warp> gathered(threads / 32);
    warps = gathered.data();
    copies.assign(threads, std::vector<std::vector<Copy>>(1));
    stores.assign(threads, {});
    barriers.clear();
    together &= block.run();
    for (const auto& left : stores) misused |= !left.empty();
    std::free(memory);
  }
  return !together || misused;
}

}  // namespace cuda_on_cpu
