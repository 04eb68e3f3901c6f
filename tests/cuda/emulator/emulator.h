// Runs CUDA kernels on the CPU to show that they are right, not fast. Each thread of a block is a fiber; fibers run in
// a seeded random order and change only where threads wait. What the PTX ISA leaves undefined until it is waited for is
// made wrong until then: the targets of copies and the accumulators of wgmma hold NaN, and both happen as late as is
// legal. Blocks run one after another, in random order, on shared memory that starts out as NaN.
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

// A copy of 16 bytes that was asked for and has not happened.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;  // then zeros
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

// Threads that take part in one instruction: the last to come carries it out for all.
struct Meeting {
  const char* instruction = nullptr;
  std::vector<void*> arguments;
  std::vector<Thread*> threads;
};

// Accumulators of a warp's lanes while wgmma works on them; the lanes' registers hold NaN.
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
  std::vector<uint64_t> wgmmas;  // all of them, which the warps of a warpgroup must agree in
};

struct Barrier {
  int threads = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

// In shared memory.
struct Mbarrier {
  int count, pending;  // arrivals of a phase, and those that are missing
  int64_t bytes;       // expected and not here
  int phase;
  bool fenced;
  std::vector<Thread*> waiting;
};

struct Block {
  Coordinates index, grid;
  unsigned char* shared;
  int shared_bytes;
  // Shared memory as the copy engine and wgmma see it: without ordinary stores that no fence_proxy_async followed.
  std::vector<unsigned char> async_view;
  std::vector<Action> transfers;  // of the copy engine, that have not happened
  std::map<ptrdiff_t, Mbarrier> mbarriers;  // by their offset
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Barrier> barriers;
};

// The block and thread that run; only within a kernel.
Block& block();
Thread& thread();

// Ends the kernel with a message: where the device would do something undefined or hang.
[[noreturn]] void fail(const std::string& message);

// Heads or tails, from the seed.
bool coin();

// Lets others run until somebody calls wake.
void wait(const std::string& what);
void wake(Thread& thread);

// All lanes of the warp come with an argument each; the last one calls all(arguments of lanes 0 … 31).
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

// The barrier at an address in shared memory, which must have been initialised; and after something came to it.
Mbarrier& mbarrier(const void* pointer, const char* instruction);
void mbarrier_advance(Mbarrier& barrier);

// Bytes into shared memory by the copy engine: NaN now, and what write(destination) puts there as late as can be.
void transfer(unsigned char* to, int bytes, Mbarrier& barrier, const std::function<void(unsigned char*)>& write);

// `pointer` lies in shared memory with `bytes` after it, aligned; else the kernel fails.
unsigned char* in_shared(const void* pointer, int bytes, int alignment, const char* instruction);

// Runs body(shared) in every thread of every block. Throws std::runtime_error with what failed, in which block.
void run(Coordinates grid, int threads, int shared_bytes, const std::function<void(unsigned char*)>& body);

// The seed of the order of threads and blocks in later runs; each run takes the next one.
void set_seed(uint64_t seed);

}  // namespace ercn::emulator
