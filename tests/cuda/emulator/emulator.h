// Runs CUDA kernels on the CPU to test their correctness. Each thread of a block is a fiber; fibers run in a seeded
// random order and switch only where threads wait. What the PTX ISA leaves undefined before a wait is wrong before it:
// targets of copies and accumulators of wgmma hold NaN, and both are written as late as is legal. Blocks run one after
// another, in random order, on shared memory that starts as NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace ercn::emulator {

constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xff;  // NaN as fp32, bf16 and fp16

struct Coordinates {
  int x, y, z;
};

// A pending copy to 16 bytes.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;  // the others become zeros
};

using Action = std::function<void()>;

struct Thread {
  int index;
  void* stack_pointer;
  bool done;
  bool ready;
  std::string waits_for;  // while not ready
  std::vector<Copy> copies;  // since the last commit
  std::vector<std::vector<Copy>> copy_groups;
  bool wgmma_fenced = false;
};

// The threads of one collective instruction: the last to arrive executes it for all.
struct Meeting {
  const char* instruction = nullptr;
  std::vector<void*> arguments;
  std::vector<Thread*> threads;
};

// A warp's accumulators of pending wgmmas; the lanes' registers hold NaN.
struct Accumulators {
  int count, unfinished;
  float* registers[kWarp];
  std::vector<float> values;  // [kWarp, count]
};

struct Warp {
  Meeting meeting;
  std::map<float*, Accumulators> accumulators;  // by lane 0's registers
  std::vector<Action> products;  // since the last commit
  std::vector<std::vector<Action>> product_groups;
  std::vector<uint64_t> wgmmas;  // the operands of each, equal in all warps of a warpgroup
};

struct Barrier {
  int threads = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

struct Mbarrier {
  int count, pending;  // arrivals of a phase, and those that are missing
  int64_t bytes;       // expected and missing
  int phase;
  bool fenced;
  std::vector<Thread*> waiting;
};

struct Block {
  Coordinates index, grid;
  unsigned char* shared;
  int shared_bytes;
  // Shared memory as TMA and wgmma see it: without ordinary stores since the last fence_proxy_async.
  std::vector<unsigned char> async_view;
  std::vector<Action> transfers;  // TMA's pending copies
  std::map<ptrdiff_t, Mbarrier> mbarriers;  // by their offset
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Barrier> barriers;
};

// The running block and thread; only within a kernel.
Block& block();
Thread& thread();

// Ends the kernel with a message where the device's behaviour is undefined or it would hang.
[[noreturn]] void fail(const std::string& message);

// A random bit from the seed.
bool coin();

// Lets other threads run until one calls wake.
void wait(const std::string& what);
void wake(Thread& thread);

// A collective instruction of a warp: the last lane to arrive calls all(arguments of lanes 0 … 31).
void meet(const char* instruction, void* argument, const std::function<void(void* const*)>& all);

template <typename Argument, typename All>
void meet(const char* instruction, Argument& argument, All&& all) {
  meet(instruction, &argument, [&](void* const* arguments) {
    Argument* lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = static_cast<Argument*>(arguments[lane]);
    all(lanes);
  });
}

void barrier(int index, int threads);

// The initialised mbarrier at an address in shared memory; ends its phase if nothing is missing.
Mbarrier& mbarrier(const void* pointer, const char* instruction);
void mbarrier_advance(Mbarrier& barrier);

// A copy to shared memory by TMA: NaN now, and write(destination) as late as is legal.
void transfer(unsigned char* to, int bytes, Mbarrier& barrier, const std::function<void(unsigned char*)>& write);

// Fails unless `pointer` is aligned and `bytes` bytes from it lie in shared memory.
unsigned char* in_shared(const void* pointer, int bytes, int alignment, const char* instruction);

// Runs body(shared) in every thread of every block. Throws std::runtime_error with what failed, in which block.
void run(Coordinates grid, int threads, int shared_bytes, const std::function<void(unsigned char*)>& body);

// Seeds the order of threads and blocks of the next run; each run takes the next seed.
void set_seed(uint64_t seed);

}  // namespace ercn::emulator
