// Refinements over fixed neighbours on the CPU, registered as ercn_native::pixel_adaptive_refinement_cpu, its backward
// and random_walk_cpu (LibTorch stable ABI): `steps` times
//   m[c][i] <- Σ_p w_p[i] m[c][i + o_p]
// Beyond the border the edge repeats (adaptive) or there is nothing (random walk). cam, image, value and weights are
// fp32 or fp64, with any strides. Images run one after the other, the rows of a step in parallel. One thread writes a
// row, in one order, so results do not depend on threads. Extra memory: the image and two copies of the map with their
// margins, and the weights of one image. The adaptive forward stores the weights only where they fit in the bytes
// given, else it forms them anew for every row at every step.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../backend.h"
#include "../convert.h"
#include "../kernels.h"
#include "../tasks.h"

namespace ercn {
namespace {

template <typename T>
const RefinementKernel<T>& kernel_of() {
  if constexpr (std::is_same_v<T, double>) return kernels(isa()).refinement_double;
  else return kernels(isa()).refinement_float;
}

struct Offset {
  int64_t dy, dx;
};

// The 8 neighbours at every distance, row by row. `most` is the longer side of the map: from there on a neighbour is
// always beyond the border, and margins need not be wider.
std::vector<Offset> ring_offsets(const std::vector<int64_t>& dilations, int64_t most) {
  std::vector<Offset> offsets;
  for (const int64_t dilation : dilations) {
    const int64_t d = std::min(dilation, most);
    for (int64_t dy = -1; dy <= 1; ++dy) {
      for (int64_t dx = -1; dx <= 1; ++dx) {
        if (dy || dx) offsets.push_back({d * dy, d * dx});
      }
    }
  }
  return offsets;
}

// The neighbours within a circle and the pixel itself, row by row.
std::vector<Offset> disc_offsets(int64_t radius) {
  std::vector<Offset> offsets;
  for (int64_t dy = 1 - radius; dy < radius; ++dy) {
    for (int64_t dx = 1 - radius; dx < radius; ++dx) {
      if (dy * dy + dx * dx < radius * radius) offsets.push_back({dy, dx});
    }
  }
  return offsets;
}

enum class Border { repeated, zero };

// A map with margins beside its rows, [height, channels, left + width + …], a piece of a workspace. The rows of all
// channels lie side by side, so that the neighbours of a pixel are on few pages; from one pixel to the pixel above, and
// from channel to channel, it is an odd number of cache lines, so that they are in different sets of the cache.
template <typename T>
struct Map {
  int64_t channels, height, width, left, plane, row;
  Border border;
  T* memory;

  // Columns from -margin to `end`.
  Map(Workspace& workspace, int64_t channels, int64_t height, int64_t width, int64_t margin, int64_t end, Border border)
      : channels(channels),
        height(height),
        width(width),
        left(round_up(margin, kLine)),
        plane(odd_lines(left + end)),
        row(odd_lines(channels * plane)),
        border(border) {
    workspace.reserve(memory, height * row);
  }

  static constexpr int64_t kLine = 64 / sizeof(T);
  static int64_t odd_lines(int64_t n) { return (round_up(n, kLine) / kLine | 1) * kLine; }

  T* at(int64_t y) const { return memory + y * row + left; }

  // The margins of row y of every channel.
  void close(int64_t y) const {
    for (int64_t c = 0; c < channels; ++c) {
      T* const pixels = at(y) + c * plane;
      std::fill(pixels - left, pixels, border == Border::repeated ? pixels[0] : T(0));
      std::fill(pixels + width, pixels - left + plane, border == Border::repeated ? pixels[width - 1] : T(0));
    }
  }
};

// Runs body(y, worker) for every row. A worker gets at least 2^19 multiply-adds, some 20 µs.
template <typename F>
void for_each_row(int64_t rows, int64_t work_of_a_row, const F& body) {
  for_each_task(rows, body, std::max<int64_t>(1, (1 << 19) / std::max<int64_t>(work_of_a_row, 1)));
}

// Image b of a tensor [B, C, H, W].
template <typename T>
void load_map(const Tensor& from, int64_t b, const Map<T>& to) {
  const T* const base = static_cast<const T*>(from.const_data_ptr()) + b * from.stride(0);
  for_each_row(to.height, to.channels * to.width, [&](int64_t y, int64_t) {
    for (int64_t c = 0; c < to.channels; ++c) {
      const T* const row = base + c * from.stride(1) + y * from.stride(2);
      T* const into = to.at(y) + c * to.plane;
      for (int64_t x = 0; x < to.width; ++x) into[x] = row[x * from.stride(3)];
    }
    to.close(y);
  });
}

template <typename T>
void save_map(const Map<T>& from, T* to) {
  for (int64_t c = 0; c < from.channels; ++c) {
    for (int64_t y = 0; y < from.height; ++y) {
      to = std::copy_n(from.at(y) + c * from.plane, from.width, to);
    }
  }
}

// Weights of one image, [rows, blocks, slots, block].
template <typename T>
struct Weights {
  int64_t blocks, slots, block, row;
  T* memory;

  Weights(Workspace& workspace, int64_t rows, int64_t width, int64_t slots, int64_t block)
      : blocks(round_up(width, block) / block), slots(slots), block(block), row(blocks * slots * block) {
    workspace.reserve(memory, rows * row);
  }

  T* at(int64_t y) const { return memory + y * row; }
  // Stores the weights `slot` of row y, from a row with zeros beyond its end.
  void pack(int64_t y, int64_t slot, const T* from) const {
    for (int64_t i = 0; i < blocks; ++i) std::copy_n(from + i * block, block, at(y) + (i * slots + slot) * block);
  }
};

// The neighbours of a pixel of row y that exist.
std::vector<Tap> taps_of_row(
    const std::vector<Offset>& offsets, int64_t y, int64_t height, int64_t stride, Border border) {
  std::vector<Tap> taps;
  taps.reserve(offsets.size());
  for (size_t p = 0; p < offsets.size(); ++p) {
    const int64_t row = y + offsets[p].dy, inside = std::clamp(row, int64_t{0}, height - 1);
    if (row == inside || border == Border::repeated) taps.push_back({int64_t(p), inside * stride + offsets[p].dx});
  }
  return taps;
}

int64_t reach_of(const std::vector<Offset>& offsets) {
  int64_t reach = 0;
  for (const Offset& o : offsets) reach = std::max({reach, std::abs(o.dy), std::abs(o.dx)});
  return reach;
}

// Runs the steps; weights(y, worker) gives the weights of a row. The result is in `map`.
template <typename T, typename F>
void propagate(
    const RefinementKernel<T>& kernel, const std::vector<Offset>& offsets, Map<T>& map, Map<T>& other, int64_t steps,
    const F& weights) {
  const int64_t blocks = round_up(map.width, kernel.block) / kernel.block, slots = offsets.size();
  for (int64_t step = 0; step < steps; ++step) {
    for_each_row(map.height, slots * map.channels * map.width, [&](int64_t y, int64_t worker) {
      const std::vector<Tap> taps = taps_of_row(offsets, y, map.height, map.row, map.border);
      kernel.sums(
          {.weights = weights(y, worker),
           .blocks = blocks,
           .slots = slots,
           .taps = taps.data(),
           .count = int64_t(taps.size()),
           .map = map.at(0),
           .map_plane = map.plane,
           .out = other.at(y),
           .out_plane = other.plane,
           .channels = map.channels,
           .add = false});
      other.close(y);
    });
    std::swap(map, other);
  }
}

// PAMR's or PAR's weights of a picture, a row at a time.
template <typename T>
class Adaptive {
 public:
  Adaptive(Workspace& workspace, const Tensor& image, const std::vector<int64_t>& dilations, bool par, int64_t block)
      : kernel_(kernel_of<T>()),
        offsets_(ring_offsets(dilations, std::max(image.size(2), image.size(3)))),
        own_(par ? 0 : dilations.size()),
        position_(par ? position(dilations) : std::vector<T>()),
        picture_(
            workspace, image.size(1), image.size(2), image.size(3), reach_of(offsets_),
            round_up(image.size(3), block) + reach_of(offsets_), Border::repeated) {}

  // Reads image b of the constructor's tensor.
  void load(const Tensor& image, int64_t b) const { load_map(image, b, picture_); }

  const std::vector<Offset>& offsets() const { return offsets_; }

  // Forms the weights of row y, [blocks, slots, block].
  void make(int64_t y, T* to) const {
    std::vector<Tap> taps = taps_of_row(offsets_, y, picture_.height, picture_.row, Border::repeated);
    for (Tap& tap : taps) tap.offset -= y * picture_.row;
    for (int64_t x = 0; x < picture_.width; x += kernel_.block, to += taps.size() * kernel_.block) {
      kernel_.weights(
          {.image = picture_.at(y) + x,
           .plane = picture_.plane,
           .channels = picture_.channels,
           .taps = taps.data(),
           .count = int64_t(taps.size()),
           .own = own_,
           .position = position_.empty() ? nullptr : position_.data(),
           .weights = to});
    }
  }

 private:
  // 0.01 softmax(-(r / (0.3 (σ_r + 1e-8)))²) of the neighbours' distances r.
  static std::vector<T> position(const std::vector<int64_t>& dilations) {
    std::vector<double> r;
    for (const int64_t d : dilations) {
      for (const bool corner : {true, false, true, false, false, true, false, true}) {
        r.push_back(corner ? std::sqrt(2.) * d : d);
      }
    }
    double mean = 0, spread = 0, total = 0;
    for (const double x : r) mean += x / r.size();
    for (const double x : r) spread += (x - mean) * (x - mean) / (r.size() - 1);
    const double least = *std::min_element(r.begin(), r.end()), width = 0.3 * (std::sqrt(spread) + 1e-8);
    for (double& x : r) total += x = std::exp((least * least - x * x) / (width * width));
    std::vector<T> weights;
    for (const double x : r) weights.push_back(T(0.01 * x / total));
    return weights;
  }

  const RefinementKernel<T>& kernel_;
  const std::vector<Offset> offsets_;
  const int64_t own_;
  const std::vector<T> position_;
  const Map<T> picture_;
};

template <typename T>
T* image_of(const Tensor& out, int64_t b) {  // out is contiguous
  return static_cast<T*>(out.mutable_data_ptr()) + b * out.stride(0);
}

template <typename T>
Tensor refine(
    const Tensor& cam, const Tensor& image, const std::vector<int64_t>& dilations, int64_t steps, bool par,
    int64_t stored_bytes) {
  const int64_t B = cam.size(0), C = cam.size(1), H = cam.size(2), W = cam.size(3);
  const Tensor out = torch::stable::new_empty(cam, {B, C, H, W});
  const RefinementKernel<T>& kernel = kernel_of<T>();
  const int64_t slots = 8 * dilations.size(), width = round_up(W, kernel.block);
  const bool stored = H * width * slots * int64_t(sizeof(T)) <= stored_bytes;
  Workspace workspace;
  const Weights<T> weights(workspace, stored ? H : 0, W, slots, kernel.block);
  const Adaptive<T> adaptive(workspace, image, dilations, par, kernel.block);
  const int64_t reach = reach_of(adaptive.offsets());
  Map<T> map(workspace, C, H, W, reach, width + reach, Border::repeated);
  Map<T> other(workspace, C, H, W, reach, width + reach, Border::repeated);
  WorkerScratch<T> scratch;  // weights of one row
  workspace.reserve(scratch, stored ? 0 : weights.row);
  workspace.allocate(cam);
  for (int64_t b = 0; b < B; ++b) {
    adaptive.load(image, b);
    load_map(cam, b, map);
    if (stored) {
      for_each_row(H, slots * W * image.size(1), [&](int64_t y, int64_t) { adaptive.make(y, weights.at(y)); });
    }
    propagate(kernel, adaptive.offsets(), map, other, steps, [&](int64_t y, int64_t worker) -> const T* {
      if (stored) return weights.at(y);
      adaptive.make(y, scratch.of(worker));
      return scratch.of(worker);
    });
    save_map(map, image_of<T>(out, b));
  }
  return out;
}

// Stores the weights where the adjoint reads them: target i uses w_p[i - o_p], 0 where that is no pixel. `own` holds
// the weights of a row as the forward uses them, `line` one slot of them between zeros.
template <typename T>
void make_adjoint_weights(
    const Adaptive<T>& adaptive, const std::vector<Offset>& back, int64_t H, int64_t W, int64_t work_of_a_row,
    const WorkerScratch<T>& own, const WorkerScratch<T>& line, const Weights<T>& weights) {
  const int64_t reach = reach_of(back), block = weights.block;
  for_each_row(H, work_of_a_row, [&](int64_t y, int64_t worker) {
    T *const from = own.of(worker), *const pixels = line.of(worker) + 2 * reach;
    std::fill(line.of(worker), pixels, T(0));
    std::fill(pixels + W, pixels + weights.blocks * block, T(0));
    adaptive.make(y, from);
    for (int64_t p = 0; p < weights.slots; ++p) {
      for (int64_t x = 0; x < W; x += block) {
        std::copy_n(from + x * weights.slots + p * block, std::min(block, W - x), pixels + x);
      }
      weights.pack(y + reach - back[p].dy, p, pixels - reach + back[p].dx);
    }
  });
}

// One step of the adjoint for row y, from `map` to `other`. Beyond the border the forward reads the edge: the adjoint
// runs on the picture with a margin of zeros, and adds its sums in the margin to the edge.
template <typename T>
void adjoint_row(
    const RefinementKernel<T>& kernel, const std::vector<Offset>& back, const Weights<T>& weights, int64_t y,
    const Map<T>& map, const Map<T>& other, T* sums) {
  const int64_t C = map.channels, H = map.height, W = map.width, reach = reach_of(back);
  const int64_t stride = weights.blocks * kernel.block;
  std::fill_n(sums, C * stride, T(0));
  for (int64_t row = y ? y : -reach; row <= (y < H - 1 ? y : H - 1 + reach); ++row) {
    const std::vector<Tap> taps = taps_of_row(back, row, H, map.row, Border::zero);
    kernel.sums(
        {.weights = weights.at(row + reach),
         .blocks = weights.blocks,
         .slots = weights.slots,
         .taps = taps.data(),
         .count = int64_t(taps.size()),
         .map = map.at(0) - reach,
         .map_plane = map.plane,
         .out = sums,
         .out_plane = stride,
         .channels = C,
         .add = true});
  }
  for (int64_t c = 0; c < C; ++c) {
    const T* const from = sums + c * stride;
    T* const to = other.at(y) + c * other.plane;
    std::copy_n(from + reach, W, to);
    for (int64_t x = 0; x < reach; ++x) {
      to[0] += from[x];
      to[W - 1] += from[reach + W + x];
    }
  }
  other.close(y);
}

template <typename T>
Tensor refine_backward(
    const Tensor& grad_out, const Tensor& image, const std::vector<int64_t>& dilations, int64_t steps, bool par) {
  const int64_t B = grad_out.size(0), C = grad_out.size(1), H = grad_out.size(2), W = grad_out.size(3);
  const Tensor grad = torch::stable::new_empty(grad_out, {B, C, H, W});
  const RefinementKernel<T>& kernel = kernel_of<T>();
  std::vector<Offset> back = ring_offsets(dilations, std::max(H, W));
  for (Offset& o : back) o = {-o.dy, -o.dx};
  const int64_t reach = reach_of(back), slots = back.size(), wide = W + 2 * reach;
  Workspace workspace;
  const Weights<T> weights(workspace, H + 2 * reach, wide, slots, kernel.block);
  const Adaptive<T> adaptive(workspace, image, dilations, par, kernel.block);
  const int64_t stride = weights.blocks * kernel.block;
  // Blocks begin with pixel -reach, in the margin.
  Map<T> map(workspace, C, H, W, 2 * reach, stride, Border::zero);
  Map<T> other(workspace, C, H, W, 2 * reach, stride, Border::zero);
  WorkerScratch<T> own, line, sums;
  workspace.reserve(own, round_up(W, kernel.block) * slots);
  workspace.reserve(line, 2 * reach + stride);
  workspace.reserve(sums, C * stride);
  workspace.allocate(grad_out);
  for (int64_t b = 0; b < B; ++b) {
    adaptive.load(image, b);
    make_adjoint_weights(adaptive, back, H, W, slots * W * image.size(1), own, line, weights);
    load_map(grad_out, b, map);
    for (int64_t step = 0; step < steps; ++step) {
      for_each_row(H, slots * C * wide, [&](int64_t y, int64_t worker) {
        adjoint_row(kernel, back, weights, y, map, other, sums.of(worker));
      });
      std::swap(map, other);
    }
    save_map(map, image_of<T>(grad, b));
  }
  return grad;
}

// weights [B, slots, H, W] has the order of disc_offsets, and 0 where the neighbour is no pixel.
template <typename T>
Tensor walk(const Tensor& value, const Tensor& weights, int64_t radius, int64_t steps) {
  const int64_t B = value.size(0), C = value.size(1), H = value.size(2), W = value.size(3);
  const Tensor out = torch::stable::new_empty(value, {B, C, H, W});
  const RefinementKernel<T>& kernel = kernel_of<T>();
  const std::vector<Offset> offsets = disc_offsets(radius);
  const int64_t slots = offsets.size(), width = round_up(W, kernel.block);
  STD_TORCH_CHECK(weights.size(1) == slots, "weights must be [B, ", slots, ", H, W] for radius ", radius);
  Workspace workspace;
  const Weights<T> packed(workspace, H, W, slots, kernel.block);
  Map<T> map(workspace, C, H, W, radius, width + radius, Border::zero);
  Map<T> other(workspace, C, H, W, radius, width + radius, Border::zero);
  WorkerScratch<T> line;
  workspace.reserve(line, width);
  workspace.allocate(value);
  for (int64_t b = 0; b < B; ++b) {
    const T* const base = static_cast<const T*>(weights.const_data_ptr()) + b * weights.stride(0);
    for_each_row(H, slots * width, [&](int64_t y, int64_t worker) {
      T* const pixels = line.of(worker);
      std::fill(pixels + W, pixels + width, T(0));
      for (int64_t p = 0; p < slots; ++p) {
        const T* const row = base + p * weights.stride(1) + y * weights.stride(2);
        for (int64_t x = 0; x < W; ++x) pixels[x] = row[x * weights.stride(3)];
        packed.pack(y, p, pixels);
      }
    });
    load_map(value, b, map);
    propagate(kernel, offsets, map, other, steps, [&](int64_t y, int64_t) { return packed.at(y); });
    save_map(map, image_of<T>(out, b));
  }
  return out;
}

void check(const Tensor& map, const char* name, const Tensor& guide, const char* guide_name, int64_t steps) {
  STD_TORCH_CHECK(map.dim() == 4 && guide.dim() == 4, name, " and ", guide_name, " must have 4 dimensions");
  for (const int dim : {0, 2, 3}) {
    STD_TORCH_CHECK(
        map.size(dim) == guide.size(dim) && map.size(dim) > 0, name, " and ", guide_name,
        " must have the same B, H and W, none of them 0");
  }
  STD_TORCH_CHECK(map.size(1) > 0 && guide.size(1) > 0, name, " and ", guide_name, " must have channels");
  STD_TORCH_CHECK(map.is_cpu() && guide.is_cpu(), name, " and ", guide_name, " must be on the CPU");
  STD_TORCH_CHECK(
      map.scalar_type() == guide.scalar_type() &&
          (map.scalar_type() == ScalarType::Float || map.scalar_type() == ScalarType::Double),
      name, " and ", guide_name, " must both be float32 or both float64");
  STD_TORCH_CHECK(steps >= 0, "steps must be at least 0");
}

// Whether the form is par.
bool check_form(const std::vector<int64_t>& dilations, const std::string& form) {
  STD_TORCH_CHECK(
      !dilations.empty() && *std::min_element(dilations.begin(), dilations.end()) > 0,
      "dilations must be at least one distance of 1 or more");
  STD_TORCH_CHECK(form == "pamr" || form == "par", "form must be pamr or par");
  return form == "par";
}

Tensor pixel_adaptive_refinement_cpu(
    const Tensor& cam, const Tensor& image, std::vector<int64_t> dilations, int64_t steps, std::string form,
    int64_t stored_bytes) {
  check(cam, "cam", image, "image", steps);
  const bool par = check_form(dilations, form);
  return cam.scalar_type() == ScalarType::Double ? refine<double>(cam, image, dilations, steps, par, stored_bytes)
                                                 : refine<float>(cam, image, dilations, steps, par, stored_bytes);
}

Tensor pixel_adaptive_refinement_backward_cpu(
    const Tensor& grad_out, const Tensor& image, std::vector<int64_t> dilations, int64_t steps, std::string form) {
  check(grad_out, "grad_out", image, "image", steps);
  const bool par = check_form(dilations, form);
  return grad_out.scalar_type() == ScalarType::Double ? refine_backward<double>(grad_out, image, dilations, steps, par)
                                                      : refine_backward<float>(grad_out, image, dilations, steps, par);
}

Tensor random_walk_cpu(const Tensor& value, const Tensor& weights, int64_t radius, int64_t steps) {
  check(value, "value", weights, "weights", steps);
  STD_TORCH_CHECK(radius > 0, "radius must be at least 1");
  return value.scalar_type() == ScalarType::Double ? walk<double>(value, weights, radius, steps)
                                                   : walk<float>(value, weights, radius, steps);
}

// Adaptive weights of an image are stored up to this size. Larger weights are formed again at every step, which takes
// two fifths longer at 1024² pixels and 5 channels.
constexpr int64_t kStoredBytes = int64_t{64} << 20;

Tensor pixel_adaptive_refinement(
    const Tensor& cam, const Tensor& image, std::vector<int64_t> dilations, int64_t steps, std::string form,
    const std::string& backend) {
  check_backend(backend, "cpu");
  const ScalarType sums = type_of_sums(cam, image);
  const Tensor out = pixel_adaptive_refinement_cpu(
      converted(cam, sums), converted(image, sums), std::move(dilations), steps, std::move(form), kStoredBytes);
  return converted(out, cam.scalar_type());
}

Tensor pixel_adaptive_refinement_backward(
    const Tensor& grad_out, const Tensor& image, std::vector<int64_t> dilations, int64_t steps, std::string form,
    const std::string& backend) {
  check_backend(backend, "cpu");
  const ScalarType sums = type_of_sums(grad_out, image);
  const Tensor grad = pixel_adaptive_refinement_backward_cpu(
      converted(grad_out, sums), converted(image, sums), std::move(dilations), steps, std::move(form));
  return converted(grad, grad_out.scalar_type());
}

}  // namespace
}  // namespace ercn

STABLE_TORCH_LIBRARY_FRAGMENT(ercn_native, m) {
  m.def(
      "pixel_adaptive_refinement_cpu(Tensor cam, Tensor image, int[] dilations, int steps, str form, int stored_bytes)"
      " -> Tensor");
  m.def(
      "pixel_adaptive_refinement_backward_cpu(Tensor grad_out, Tensor image, int[] dilations, int steps, str form)"
      " -> Tensor");
  m.def("random_walk_cpu(Tensor value, Tensor weights, int radius, int steps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ercn_native, CPU, m) {
  m.impl("pixel_adaptive_refinement_cpu", TORCH_BOX(&ercn::pixel_adaptive_refinement_cpu));
  m.impl("pixel_adaptive_refinement_backward_cpu", TORCH_BOX(&ercn::pixel_adaptive_refinement_backward_cpu));
  m.impl("random_walk_cpu", TORCH_BOX(&ercn::random_walk_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(ercn, CPU, m) {
  m.impl("pixel_adaptive_refinement", TORCH_BOX(&ercn::pixel_adaptive_refinement));
  m.impl("pixel_adaptive_refinement_backward", TORCH_BOX(&ercn::pixel_adaptive_refinement_backward));
}
