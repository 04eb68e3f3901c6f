#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

#ifndef __x86_64__
#error "the emulator changes stacks in x86-64 assembly"
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers and the stack pointer in *save, and continues where `load` was saved.
extern "C" void ercn_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl ercn_emulator_switch
.hidden ercn_emulator_switch
.type ercn_emulator_switch, @function
ercn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ercn_emulator_switch, .-ercn_emulator_switch
)");

namespace ercn::emulator {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif
constexpr int kMostThreads = 1024, kBarriers = 16, kMostShared = 227 << 10, kAlignment = 1024;

struct Free {
  void operator()(unsigned char* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
};

struct Machine {
  Block block;
  Thread* current = nullptr;
  void* scheduler = nullptr;  // its stack pointer while a fiber runs
  std::vector<Thread*> ready;
  std::string failure;
  std::mt19937_64 random;
  uint64_t lagging = 0;  // warp
  const std::function<void(unsigned char*)>* body = nullptr;
  unsigned char* stacks = nullptr;
#ifdef __SANITIZE_ADDRESS__
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};

Machine* machine = nullptr;
uint64_t seed = 0;

unsigned char* stack_of(const Thread& thread) { return machine->stacks + kStack * thread.index; }

void resume(Thread& thread) {
  machine->current = &thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake;
  __sanitizer_start_switch_fiber(&fake, stack_of(thread), kStack);
  ercn_emulator_switch(&machine->scheduler, thread.stack_pointer);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  ercn_emulator_switch(&machine->scheduler, thread.stack_pointer);
#endif
  machine->current = nullptr;
}

void to_scheduler(bool last) {
  Thread& self = *machine->current;
#ifdef __SANITIZE_ADDRESS__
  void* fake;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, machine->scheduler_bottom, machine->scheduler_size);
  ercn_emulator_switch(&self.stack_pointer, machine->scheduler);
  __sanitizer_finish_switch_fiber(fake, &machine->scheduler_bottom, &machine->scheduler_size);
#else
  (void)last;
  ercn_emulator_switch(&self.stack_pointer, machine->scheduler);
#endif
}

// Tells AddressSanitizer that frames on this stack ended without a return.
void forget([[maybe_unused]] unsigned char* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, bytes);
#endif
}

void fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine->scheduler_bottom, &machine->scheduler_size);
#endif
  (*machine->body)(machine->block.shared);
  machine->current->done = true;
  to_scheduler(true);
}

void prepare(Thread& thread) {
  unsigned char* bottom = stack_of(thread);
  forget(bottom, kStack);
  void** top = reinterpret_cast<void**>(bottom + kStack) - 1;  // a call leaves the stack 8 bytes off 16
  *--top = reinterpret_cast<void*>(&fiber);
  top -= 6;
  std::fill(top, top + 6, nullptr);
  thread.stack_pointer = top;
}

std::string deadlock() {
  std::map<std::string, std::vector<int>> waiting;
  for (const Thread& thread : machine->block.threads) {
    if (!thread.done) waiting[thread.waits_for].push_back(thread.index);
  }
  std::string message = "deadlock:";
  for (const auto& [what, threads] : waiting) {
    message += "\n  threads";
    for (size_t i = 0; i < threads.size();) {
      size_t end = i + 1;
      while (end < threads.size() && threads[end] == threads[end - 1] + 1) ++end;
      message += " " + std::to_string(threads[i]);
      if (end - i > 1) message += "-" + std::to_string(threads[end - 1]);
      i = end;
    }
    message += " wait for " + what;
  }
  for (const auto& [offset, barrier] : machine->block.mbarriers) {
    message += "\n  mbarrier at offset " + std::to_string(offset) + " is in phase " + std::to_string(barrier.phase) +
               ", lacks " + std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) +
               " arrivals and " + std::to_string(barrier.bytes) + " bytes";
  }
  return message;
}

// Why a warp may not end as it did, or nothing.
std::string left_open(const Block& block) {
  for (size_t warp = 0; warp < block.warps.size(); ++warp) {
    if (!block.warps[warp].accumulators.empty()) {
      return "warp " + std::to_string(warp) + " did not wait for its last wgmma";
    }
    if (block.warps[warp].wgmmas != block.warps[warp / 4 * 4].wgmmas) {
      return "warps " + std::to_string(warp / 4 * 4) + " and " + std::to_string(warp) +
             " of one warpgroup made different products by wgmma";
    }
  }
  return "";
}

// A random ready thread, rarely of the lagging warp, which changes now and then.
size_t draw(const std::vector<Thread*>& ready) {
  std::mt19937_64& random = machine->random;
  if (random() % 1024 == 0) machine->lagging = random() % machine->block.warps.size();
  size_t drawn = random() % ready.size();
  for (int i = 0; i < 8 && static_cast<uint64_t>(ready[drawn]->index / kWarp) == machine->lagging; ++i) {
    drawn = random() % ready.size();
  }
  return drawn;
}

void run_block(Coordinates index, Coordinates grid, int threads, unsigned char* shared, int shared_bytes) {
  Block& b = machine->block;
  b = Block{index, grid, shared, shared_bytes, std::vector<unsigned char>(shared_bytes, kPoison), {}, {}, {}, {}, {}};
  b.threads.resize(threads);
  b.warps.resize((threads + kWarp - 1) / kWarp);
  b.barriers.resize(kBarriers);
  std::memset(shared, kPoison, shared_bytes);
  machine->ready.clear();
  for (int i = 0; i < threads; ++i) {
    Thread& thread = b.threads[i];
    thread.index = i;
    thread.done = false;
    prepare(thread);
    wake(thread);
  }
  int alive = threads;
  while (alive > 0) {
    std::vector<Thread*>& ready = machine->ready;
    if (ready.empty() && !b.transfers.empty()) {
      std::swap(b.transfers[machine->random() % b.transfers.size()], b.transfers.back());
      const Action next = std::move(b.transfers.back());
      b.transfers.pop_back();
      next();
    } else if (ready.empty()) {
      machine->failure = deadlock();
    } else {
      std::swap(ready[draw(ready)], ready.back());
      Thread& next = *ready.back();
      ready.pop_back();
      next.ready = false;
      resume(next);
      alive -= next.done;
    }
    if (alive == 0) {
      for (const Action& next : b.transfers) next();
      machine->failure = left_open(b);
    }
    if (!machine->failure.empty()) {
      throw std::runtime_error(
          "emulated block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
          std::to_string(index.z) + "): " + machine->failure);
    }
  }
}

}  // namespace

Block& block() { return machine->block; }
Thread& thread() { return *machine->current; }

void fail(const std::string& message) {
  machine->failure = "thread " + std::to_string(thread().index) + ": " + message;
  to_scheduler(true);
  __builtin_unreachable();
}

bool coin() { return machine->random() % 2 != 0; }

void wait(const std::string& what) {
  thread().waits_for = what;
  to_scheduler(false);
}

void wake(Thread& thread) {
  thread.ready = true;
  machine->ready.push_back(&thread);
}

void meet(const char* instruction, void* argument, const std::function<void(void* const*)>& all) {
  Thread& self = thread();
  const int warp = self.index / kWarp, lane = self.index % kWarp;
  Meeting& meeting = block().warps[warp].meeting;
  if (meeting.threads.empty()) {
    meeting.instruction = instruction;
    meeting.arguments.assign(kWarp, nullptr);
  } else if (std::strcmp(meeting.instruction, instruction) != 0) {
    fail(
        std::string(instruction) + " by lane " + std::to_string(lane) + " of a warp whose other lanes are in " +
        meeting.instruction);
  }
  meeting.arguments[lane] = argument;
  meeting.threads.push_back(&self);
  if (static_cast<int>(meeting.threads.size()) < kWarp) {
    return wait(std::string(instruction) + " by all lanes of the warp");
  }
  all(meeting.arguments.data());
  for (Thread* other : meeting.threads) {
    if (other != &self) wake(*other);
  }
  meeting.threads.clear();
}

void barrier(int index, int threads) {
  const std::string name = "barrier " + std::to_string(index) + " of " + std::to_string(threads) + " threads";
  if (index < 0 || index >= kBarriers) fail(name + ": barriers are numbered 0 to 15");
  if (threads <= 0 || threads % kWarp != 0) fail(name + ": must be a multiple of 32");
  Barrier& b = block().barriers[index];
  if (b.arrived > 0 && b.threads != threads) {
    fail(name + ": others came to it for " + std::to_string(b.threads) + " threads");
  }
  b.threads = threads;
  ++b.arrived;
  if (b.arrived == threads) {
    for (Thread* other : b.waiting) wake(*other);
    b = Barrier{};
  } else {
    b.waiting.push_back(&thread());
    wait(name);
  }
}

Mbarrier& mbarrier(const void* pointer, const char* instruction) {
  const ptrdiff_t offset = in_shared(pointer, 8, 8, instruction) - block().shared;
  const auto found = block().mbarriers.find(offset);
  if (found == block().mbarriers.end()) {
    fail(
        std::string(instruction) + ": no barrier was initialised at offset " + std::to_string(offset) +
        " of shared memory");
  }
  return found->second;
}

void mbarrier_advance(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

void transfer(unsigned char* to, int bytes, Mbarrier& barrier, const std::function<void(unsigned char*)>& write) {
  if (!barrier.fenced) fail("a copy on a barrier that no fence_barrier_init followed");
  unsigned char* view = block().async_view.data() + (to - block().shared);
  std::memset(to, kPoison, bytes);
  std::memset(view, kPoison, bytes);
  block().transfers.push_back([=, &barrier] {
    std::vector<unsigned char> data(bytes);
    write(data.data());
    std::memcpy(to, data.data(), bytes);
    std::memcpy(view, data.data(), bytes);
    barrier.bytes -= bytes;
    mbarrier_advance(barrier);
  });
}

unsigned char* in_shared(const void* pointer, int bytes, int alignment, const char* instruction) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - block().shared;
  if (offset < 0 || offset + bytes > block().shared_bytes) {
    fail(
        std::string(instruction) + ": " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
        " of shared memory, which has " + std::to_string(block().shared_bytes));
  }
  if (offset % alignment != 0) {
    fail(
        std::string(instruction) + ": offset " + std::to_string(offset) + " of shared memory is not a multiple of " +
        std::to_string(alignment));
  }
  return block().shared + offset;
}

void set_seed(uint64_t value) { seed = value; }

void run(Coordinates grid, int threads, int shared_bytes, const std::function<void(unsigned char*)>& body) {
  if (threads < 1 || threads > kMostThreads || threads % kWarp != 0) {
    throw std::runtime_error("a block has a multiple of 32 threads up to 1024, not " + std::to_string(threads));
  }
  if (shared_bytes < 0 || shared_bytes > kMostShared) {
    throw std::runtime_error(
        "a block has at most 227 KiB of shared memory, not " + std::to_string(shared_bytes) + " bytes");
  }
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("a grid has at most 65535 blocks along y and z");
  Machine state;
  state.random.seed(seed++);
  state.body = &body;
  state.stacks = static_cast<unsigned char*>(
      mmap(nullptr, kStack * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (state.stacks == MAP_FAILED) throw std::bad_alloc();
  const std::unique_ptr<unsigned char, Free> shared(
      static_cast<unsigned char*>(::operator new(std::max(shared_bytes, 1), std::align_val_t(kAlignment))));
  machine = &state;
  std::exception_ptr failure;
  try {
    std::vector<int64_t> order(int64_t{1} * grid.x * grid.y * grid.z);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::shuffle(order.begin(), order.end(), state.random);
    for (const int64_t i : order) {
      const Coordinates index{
          static_cast<int>(i % grid.x), static_cast<int>(i / grid.x % grid.y), static_cast<int>(i / grid.x / grid.y)};
      run_block(index, grid, threads, shared.get(), shared_bytes);
    }
  } catch (...) {
    failure = std::current_exception();
  }
  machine = nullptr;
  forget(state.stacks, kStack * threads);
  munmap(state.stacks, kStack * threads);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace ercn::emulator
