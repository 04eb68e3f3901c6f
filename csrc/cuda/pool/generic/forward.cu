// One block: a segment and up to kHeads heads. Scores, from kColumns columns of the projections at a time or given,
// their softmax, and Σ e h with h from the cache.
#include <cmath>

#include "pool/generic/projection.h"
#include "pool/generic/streaming.h"
#include "pool/softmax.h"

namespace ercn::pool {
namespace {

constexpr int kHeads = 8;  // of a block

template <typename Precision, bool CHANNELS_FIRST>
struct PoolForward {
  using Element = typename Precision::Element;
  using Params = PackedParams<ForwardParams>;
  using Streams = Streaming<Element, CHANNELS_FIRST>;
  static constexpr int kThreads = 128, kMinBlocks = Precision::kExact ? 2 : 3, kWarps = kThreads / 32;
  struct Shared {
    union {
      unsigned char stages[Projection<Precision, CHANNELS_FIRST>::kBytes];
      typename Streams::Shared streaming;
    };
    float scores[2][kHeads][kSegmentRows];  // of each half of the columns; then e in the first
    uint32_t real[kSegmentRows / 32];
  };

  ERCN_DEVICE static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Problem& problem = p.problem;
    const int64_t slot = arch::block_index().x;
    const int first = arch::block_index().y * kHeads, heads = problem.K - first < kHeads ? problem.K - first : kHeads;
    const Segment segment = segment_at(problem.bags, slot);
    if (segment.rows == 0) return;
    const SegmentView<Element> h(problem, segment);

    for (int i = arch::thread_index(); i < 2 * kHeads * kSegmentRows; i += kThreads) (&shared.scores[0][0][0])[i] = 0;
    store_real_rows(problem.mask, segment, shared.real);
    const int units = problem.gated ? kColumns / 2 : kColumns;
    for (int group = 0; group * units < problem.L; ++group) {
      Sums sums;
      project<Precision, CHANNELS_FIRST>(sums, h, p.packed, group, shared.stages);
      if (problem.gated) {
        add_scores<true>(p, segment, sums, group, first, heads, shared);
      } else {
        add_scores<false>(p, segment, sums, group, first, heads, shared);
      }
    }
    arch::sync_threads();
    for (int k = arch::uniform_warp_index(); k < heads; k += kWarps) {
      softmax(p, segment, slot, first + k, shared.scores, k, shared.real);
    }
    if (p.pooled == nullptr) return;
    arch::sync_threads();
    const uint64_t real = shared.real[0] | static_cast<uint64_t>(shared.real[1]) << 32;
    const int64_t width = pooled_width(problem.D);
    Streams::sum_rows(
        h, real, shared.scores[0], heads, p.pooled + (slot * problem.K + first) * width, width, shared.streaming);
  }

  // Adds w · (t ⊙ σ) over this group's units. A row and a half of the columns belong to one lane in four.
  template <bool GATED>
  ERCN_DEVICE static void add_scores(
      const Params& p, const Segment& segment, Sums& sums, int group, int first, int heads, Shared& shared) {
    constexpr int kTiles = GATED ? 4 : 8;
    const Columns columns{p.problem.L, GATED};
    const int units = padded_units(columns);
    if (p.problem.dropout.seed != nullptr) drop<GATED>(p.problem.dropout, segment.first, group, sums);
#pragma unroll
    for (int m = 0; m < Sums::kRowTiles; ++m) {
      float gated[kTiles][4];
      with_activation(p.problem.activation, [&](auto activation) {
        constexpr Activation A = decltype(activation)::value;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            gated[n][i] = gated_at<GATED, A>(sums, p.packed.biases, columns, group, m, n, i);
          }
        }
      });
      for (int k = 0; k < heads; ++k) {
        const float* w = p.packed.heads + int64_t{first + k} * units;
        float scores[2] = {};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[i / 2] += w[unit_at<GATED>(group, n, i)] * gated[n][i];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& score = scores[half];
          score += arch::shuffle_xor(score, 1);
          score += arch::shuffle_xor(score, 2);
          if (arch::lane_index() % 4 == 0) shared.scores[arch::warp_index() % 2][k][Sums::row(m, 2 * half)] += score;
        }
      }
    }
  }

  // By a warp: the scores of head k become e = exp(s - largest), 0 where not real.
  ERCN_DEVICE static void softmax(
      const Params& p, const Segment& segment, int64_t slot, int head, float (&scores)[2][kHeads][kSegmentRows], int k,
      const uint32_t (&real)[kSegmentRows / 32]) {
    const int lane = arch::lane_index();
    const Element* w_bias = static_cast<const Element*>(p.problem.weights.w_bias);
    const float bias = w_bias == nullptr ? 0 : arch::to_float(w_bias[head]);
    const int64_t at = score_offset(p.problem.bags, segment, head, p.problem.K);
    float s[2], largest = -INFINITY, sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 32 + lane;
      const bool is_real = real[half] >> lane & 1;
      float score = (scores[0][k][row] + scores[1][k][row]) * p.problem.dropout.scale + bias;
      if (is_real && p.given != nullptr) score = p.given[at + row];
      s[half] = is_real ? score : -INFINITY;
      if (row < segment.rows && p.scores != nullptr) p.scores[at + row] = s[half];
      largest = fmaxf(largest, s[half]);
    }
    if (p.pooled == nullptr) return;
    largest = reduce_warp<Max>(largest);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float e = exp_fast(s[half] - shift_of(largest));
      scores[0][k][half * 32 + lane] = e;
      sum += e;
    }
    sum = reduce_warp<Add>(sum);
    if (lane == 0) {
      p.softmax.largest[slot * p.problem.K + head] = largest;
      p.softmax.sum[slot * p.problem.K + head] = sum;
    }
  }
};

}  // namespace

void forward(const PackedParams<ForwardParams>& p, const arch::Stream& stream) {
  const Problem& problem = p.problem;
  launch<PoolForward>(p, {static_cast<int>(slot_count(problem.bags)), arch::divide_up(problem.K, kHeads)}, stream);
}

}  // namespace ercn::pool
