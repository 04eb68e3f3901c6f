// Small kernels that test the emulator, for tests/cuda/test_emulator.py. A probe returns nullptr, or what failed.
#include <arch/async.h>
#include <arch/convert.h>
#include <arch/mma.h>

#include "probe.h"

namespace {

using namespace ercn;
using namespace ercn::arch;

// d [16, 8] += a [16, K] · b [8, K]ᵀ of 16-bit elements by ldmatrix; with `columns`, b is [K, 8].
template <typename Element>
void multiply_staged(const Element* a, const Element* b, bool columns, float* d, unsigned char* shared) {
  auto* sa = reinterpret_cast<Element*>(shared);
  auto* sb = sa + 16 * 16;
  const int lane = lane_index();
  for (int i = 0; i < 8; ++i) sa[8 * lane + i] = a[8 * lane + i];
  for (int i = 0; i < 4; ++i) sb[4 * lane + i] = b[4 * lane + i];
  sync_warp();
  uint32_t ra[4], rb[4];
  float sums[4] = {};
  ldmatrix(ra, sa + lane % 16 * 16 + lane / 16 * 8);
  if (columns) {
    ldmatrix_transposed(rb, sb + lane % 16 * 8);
  } else {
    ldmatrix(rb, sb + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  const uint32_t pair[2] = {rb[0], rb[1]};
  mma<Element>(sums, ra, pair);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

void multiply_registers(const float* a, const float* b, float* d) {  // a [16, 8], b [8, 8]
  const int g = lane_index() / 4, t = lane_index() % 4;
  uint32_t ra[4], rb[2];
  float sums[4] = {};
  for (int i = 0; i < 4; ++i) ra[i] = float_bits(a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
  for (int i = 0; i < 2; ++i) rb[i] = float_bits(b[(t + 4 * i) * 8 + g]);
  mma<tf32>(sums, ra, rb);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + t * 2 + i % 2] = sums[i];
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* set_seed(uint64_t seed) {
  emulator::set_seed(seed);
  return nullptr;
}

const char* multiply_bf16(const bf16* a, const bf16* b, bool columns, float* d) {
  return probe(32, 1024, [=](unsigned char* shared) { multiply_staged(a, b, columns, d, shared); });
}
const char* multiply_fp16(const fp16* a, const fp16* b, bool columns, float* d) {
  return probe(32, 1024, [=](unsigned char* shared) { multiply_staged(a, b, columns, d, shared); });
}
const char* multiply_tf32(const float* a, const float* b, float* d) {
  return probe(32, 0, [=](unsigned char*) { multiply_registers(a, b, d); });
}

// Conversions by their own: kind 0 to bf16, 1 to fp16, 2 to TF32 and back.
const char* convert(int kind, int count, const float* from, float* to) {
  for (int i = 0; i < count; ++i) {
    to[i] = kind == 0   ? to_float(from_float<bf16>(from[i]))
            : kind == 1 ? to_float(from_float<fp16>(from[i]))
                        : round_tf32(from[i]);
  }
  return nullptr;
}

// 64 threads copy 16 bytes each and read what their neighbour copied.
const char* copy(const float* from, float* to, bool waits, bool meets, bool valid) {
  return probe(64, 1024, [=](unsigned char* shared) {
    auto* stage = reinterpret_cast<float*>(shared);
    const int i = thread_index(), next = (i + 32) % 64;
    cp_async(stage + 4 * i, from + 4 * i, valid ? 16 : 0);
    cp_async_commit();
    if (waits) cp_async_wait<0>();
    if (meets) sync_threads();
    for (int k = 0; k < 4; ++k) to[4 * next + k] = stage[4 * next + k];
  });
}

const char* reduce(const float* from, float* to) {
  return probe(32, 0, [=](unsigned char*) {
    float sum = from[lane_index()];
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    to[lane_index()] = sum;
    if (arch::ballot(lane_index() % 2) != 0xaaaaaaaau) emulator::fail("ballot");
  });
}

const char* deadlock() {
  return probe(64, 0, [](unsigned char*) {
    if (warp_index() == 0) sync_threads();
    else named_barrier(3, 64);
  });
}
const char* mixed_instructions() {
  return probe(32, 0, [](unsigned char*) {
    if (lane_index() == 7) sync_warp();
    else shuffle_xor(1, 1);
  });
}
const char* beyond_shared() {
  return probe(32, 512, [](unsigned char* shared) {
    uint32_t r[4];
    ldmatrix(r, shared + 16 * (lane_index() + 1));
  });
}
const char* misaligned(const float* from) {
  return probe(32, 1024, [=](unsigned char* shared) { cp_async(shared, from + 1 + 4 * lane_index()); });
}
const char* shared_starts_as_nan(float* to) {
  return probe(32, 128, [=](unsigned char* shared) {
    to[lane_index()] = reinterpret_cast<float*>(shared)[lane_index()];
  });
}
// For AddressSanitizer, which ends the process: one float beyond `to`, or beyond shared memory.
const char* write_beyond(float* to, bool in_shared) {
  return probe(32, 128, [=](unsigned char* shared) {
    if (lane_index() == 0) (in_shared ? reinterpret_cast<float*>(shared) : to)[32] = 0;
  });
}
}
#pragma GCC visibility pop
