#pragma once
// Which hidden units dropout drops: a random function of seed, instance and unit, which the backward evaluates again.
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#include <arch/host_device.h>

#include <cstdint>

namespace ercn::pool {

// Dropping either branch drops their product, so one mask serves both; units that stay are scaled.
struct Dropout {
  const int64_t* seed;  // on the device, or null for no dropout
  uint32_t limit;       // drops a branch where its 16 bits, as the upper ones of a word, are at most this
  float scale;          // 1 / (1 - p) for each branch; 1 without dropout
};

// Units l, l + 16, l + 32 and l + 48 of 64 share a counter; each has a word of its own.
ERCN_HOST_DEVICE constexpr uint32_t counter_of(int unit) { return unit / 64 * 16 + unit % 16; }
ERCN_HOST_DEVICE constexpr int word_of(int unit) { return unit / 16 % 4; }

struct Words {
  uint32_t at[4];
};

// Philox of the counter (instance, instance >> 32, counter, 0) and the key (seed, seed >> 32).
ERCN_HOST_DEVICE constexpr Words random_words(uint64_t seed, uint64_t instance, uint32_t counter) {
  uint32_t a = static_cast<uint32_t>(instance), b = static_cast<uint32_t>(instance >> 32), c = counter, d = 0;
  uint32_t key = static_cast<uint32_t>(seed), other = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * a, second = uint64_t{0xCD9E8D57} * c;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ key;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ other;
    d = static_cast<uint32_t>(first);
    key += 0x9E3779B9, other += 0xBB67AE85;
  }
  return {{a, b, c, d}};
}

// V's branch has the lower 16 bits of a unit's word, U's branch the upper ones.
template <bool GATED>
ERCN_HOST_DEVICE constexpr bool is_dropped(uint32_t word, uint32_t limit) {
  return word << 16 <= limit || (GATED && word <= limit);
}

}  // namespace ercn::pool
