// SPDX-License-Identifier: Apache-2.0
// The kernels for CUDA. To them maps are channels-last; planes are turned before and after. Each
// location has some threads of one warp, its lanes. They work out once where its points lie, share
// that, and then take the channels in turns, each lane a pack of neighbouring ones.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <type_traits>

#include "bilinear.h"
#include "problem.h"

namespace d2_decouple {
namespace {

constexpr int most_threads = 256;    // of a block; four blocks fit, so that loads need not wait
constexpr int64_t most_points = 32;  // of a location, in shared memory at a time
constexpr auto channels_last = at::MemoryFormat::ChannelsLast;

template <typename Real>
using Points = at::PackedTensorAccessor64<const Real, 5>;

// A point as all its lanes need it.
template <typename Real>
struct alignas(16) Sample {
  int64_t offset;    // of the first channel that it reads, in the cell at or before it
  Real right, down;  // how far beyond that cell it lies
  int corners;       // bit k: corner k is in the map; none of an ignored point is
  Real dx, dy;       // gradient of its coordinates

  __device__ bool in(int corner) const { return corners >> corner & 1; }
  __device__ Bilinear<Real> weights() const {
    Bilinear<Real> at{};
    at.right = right;
    at.down = down;
    return at;
  }
};

// A block takes a tile of locations.
struct Tiling {
  dim3 block;            // lanes, columns, rows
  int64_t across, down;  // tiles of an image
  int64_t steps[4];      // from the cell at or before a point to each around it

  Tiling(const Sizes& size, int width) {
    // Few locations leave most of a GPU idle, unless each is shared out among more threads. Else
    // there are as many as leave fewer of them without a channel in the last turn.
    const bool few = size.images * size.locations() < 8192;
    const int64_t packs = (size.channels + width - 1) / width;
    const unsigned most_lanes = few ? 32 : (packs - 1) % 8 < 4 ? 4 : 8;
    unsigned lanes = 1, rows = 1;
    while (lanes < most_lanes && lanes < packs) lanes *= 2;
    // Neighbours read the same cells: the squarer a tile, the more of them are in the cache.
    const unsigned locations = std::max(few ? 8u : 32u, 32 / lanes);
    while (4 * rows * rows <= locations && 2 * rows <= size.rows) rows *= 2;
    block = dim3(lanes, locations / rows, rows);
    across = (size.columns + block.y - 1) / block.y;
    down = (size.rows + block.z - 1) / block.z;
    for (int k = 0; k < 4; ++k) steps[k] = (k / 2 * size.width + k % 2) * size.depth();
  }
  template <typename Real>
  size_t shared_bytes(const Sizes& size) const {
    return sizeof(Sample<Real>) * block.y * block.z * std::min(size.points, most_points);
  }
};

// What a thread works on.
template <typename Real>
struct Place {
  int64_t image, location;  // location: counted over all images
  int64_t xy;               // offset of its first point
  bool inside;              // tiles reach over the border
  Sample<Real>* samples;

  __device__ Place(const Sizes& size, const Tiling& tiling, const Points<Real>& points) {
    extern __shared__ __align__(16) unsigned char shared[];
    const unsigned across = tiling.across, down = tiling.down;  // dividing 64 bits is slow
    const int64_t column = blockIdx.x % across * int64_t(blockDim.y) + threadIdx.y;
    const int64_t row = blockIdx.x / across % down * int64_t(blockDim.z) + threadIdx.z;
    image = blockIdx.x / across / down;
    location = (image * size.rows + row) * size.columns + column;
    inside = row < size.rows && column < size.columns;
    xy = image * points.stride(0) + row * points.stride(3) + column * points.stride(4);
    samples = reinterpret_cast<Sample<Real>*>(shared) +
              (threadIdx.z * blockDim.y + threadIdx.y) * min(size.points, most_points);
  }

  // Fills the samples with `count` points from point `first` on.
  __device__ void stage(const Sizes& size, const Points<Real>& points, int64_t first,
                        int count) const {
    __syncwarp();  // no lane needs the samples before these any more
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      Sample<Real> sample{};
      Bilinear<Real> at;
      const Real* x = points.data() + (xy + (first + i) * points.stride(1));
      if (inside && locate(x[0], x[points.stride(2)], size.width, size.height, at)) {
        const int64_t cell = (image * size.height + at.y) * size.width + at.x;
        const int64_t group = size.groups == 1 ? 0 : first + i;
        sample.offset = (cell * size.groups + group) * size.channels;
        sample.right = at.right;
        sample.down = at.down;
        for (int k = 0; k < 4; ++k) sample.corners |= at.in(k) << k;
      }
      samples[i] = sample;
    }
    __syncwarp();
  }
};

template <typename Map, int width>
struct alignas(sizeof(Map) * width) Pack {
  Map values[width];
};

template <typename Map, int width, typename Real>
__device__ __forceinline__ void read(const Map* from, Real (&values)[width]) {
  const auto pack = *reinterpret_cast<const Pack<Map, width>*>(from);
  for (int i = 0; i < width; ++i) values[i] = static_cast<Real>(pack.values[i]);
}

template <typename Map, int width, typename Real>
__device__ __forceinline__ void write(Map* to, const Real (&values)[width]) {
  Pack<Map, width> pack;
  for (int i = 0; i < width; ++i) pack.values[i] = static_cast<Map>(values[i]);
  *reinterpret_cast<Pack<Map, width>*>(to) = pack;
}

template <int width, typename Real>
__device__ __forceinline__ void atomic_add(Real* to, const Real (&values)[width]) {
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
  constexpr int at_once = std::is_same_v<Real, float> && width % 4 == 0 ? 4 : 1;
#else
  constexpr int at_once = 1;
#endif
  for (int i = 0; i < width; i += at_once) {
    if constexpr (at_once == 4) {
      atomicAdd(reinterpret_cast<float4*>(to + i),
                make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    } else {
      atomicAdd(to + i, values[i]);
    }
  }
}

template <typename Map, typename Real, int width>
__global__ void __launch_bounds__(most_threads, 4)
    forward_kernel(const Sizes size, const Tiling tiling, const Map* __restrict__ input,
                   const Points<Real> points, Map* __restrict__ out) {
  const Place<Real> place(size, tiling, points);
  out += place.location * (size.sum ? 1 : size.points) * size.channels;
  // Lanes without a channel take their turns as well: all meet where they share points.
  for (int64_t turn = 0; turn < size.channels; turn += blockDim.x * width) {
    const int64_t channel = turn + threadIdx.x * width;
    const bool active = place.inside && channel < size.channels;
    Real sums[width] = {};
    for (int64_t first = 0; first < size.points; first += most_points) {
      const int count = min(size.points - first, most_points);
      if (turn == 0 || size.points > most_points) place.stage(size, points, first, count);
      for (int point = 0; active && point < count; ++point) {
        const Sample<Real> sample = place.samples[point];
        const int64_t offset = sample.offset + channel;
        Real corners[4][width] = {};
        for (int k = 0; k < 4; ++k) {
          if (sample.in(k)) read(input + (offset + tiling.steps[k]), corners[k]);
        }
        for (int i = 0; i < width; ++i) {
          if (!size.sum) sums[i] = 0;
          for (int k = 0; k < 4; ++k) sums[i] += sample.weights().weight(k) * corners[k][i];
        }
        if (!size.sum) write(out + (first + point) * size.channels + channel, sums);
      }
    }
    if (size.sum && active) write(out + channel, sums);
  }
}

// Either gradient may be null: not asked for. That of the points is the same in every run.
template <typename Map, typename Real, int width>
__global__ void __launch_bounds__(most_threads, 4)
    backward_kernel(const Sizes size, const Tiling tiling, const Map* __restrict__ grad,
                    const Map* __restrict__ input, const Points<Real> points,
                    Real* __restrict__ grad_input, Real* __restrict__ grad_points) {
  const Place<Real> place(size, tiling, points);
  const int64_t locations = size.rows * size.columns;
  grad += place.location * (size.sum ? 1 : size.points) * size.channels;
  for (int64_t first = 0; first < size.points; first += most_points) {
    const int count = min(size.points - first, most_points);
    place.stage(size, points, first, count);
    for (int64_t turn = 0; turn < size.channels; turn += blockDim.x * width) {
      const int64_t channel = turn + threadIdx.x * width;
      const bool active = place.inside && channel < size.channels;
      const Map* from = grad + (size.sum ? 0 : first * size.channels) + channel;
      Real upstream[width] = {};
      if (size.sum && active) read(from, upstream);
      for (int point = 0; point < count; ++point) {
        const Sample<Real> sample = place.samples[point];
        const Bilinear<Real> at = sample.weights();
        const int64_t offset = sample.offset + channel;
        if (!size.sum && active) read(from + point * size.channels, upstream);
        if (grad_points) {
          Real corners[4][width] = {}, dx = 0, dy = 0;
          for (int k = 0; k < 4; ++k) {
            if (active && sample.in(k)) read(input + (offset + tiling.steps[k]), corners[k]);
          }
          for (int k = 0; k < 4; ++k) {
            Real product = 0;
            for (int i = 0; i < width; ++i) product += upstream[i] * corners[k][i];
            // Chosen, not multiplied: an infinite gradient outside the map is none.
            dx += sample.in(k) ? at.weight_dx(k) * product : 0;
            dy += sample.in(k) ? at.weight_dy(k) * product : 0;
          }
          for (int other = blockDim.x / 2; other > 0; other /= 2) {
            dx += __shfl_xor_sync(0xffffffff, dx, other);
            dy += __shfl_xor_sync(0xffffffff, dy, other);
          }
          if (threadIdx.x == 0) {
            place.samples[point].dx += dx;
            place.samples[point].dy += dy;
          }
        }
        for (int k = 0; k < 4; ++k) {
          if (grad_input && active && sample.in(k)) {
            Real share[width];
            for (int i = 0; i < width; ++i) share[i] = at.weight(k) * upstream[i];
            atomic_add(grad_input + (offset + tiling.steps[k]), share);
          }
        }
      }
    }
    __syncwarp();
    const int64_t to = place.location + place.image * (2 * size.points - 1) * locations;
    for (int i = threadIdx.x; grad_points && place.inside && i < 2 * count; i += blockDim.x) {
      const Sample<Real>& sample = place.samples[i / 2];
      grad_points[to + (2 * first + i) * locations] = i % 2 ? sample.dy : sample.dx;
    }
  }
}

// The maps' gradient without atomics, the same in every run: a thread owns one channel of one row
// of the map, and goes through all points in their order for those that touch it.
template <typename Map, typename Real>
__global__ void __launch_bounds__(most_threads)
    ordered_kernel(const Sizes size, const Map* __restrict__ grad, const Points<Real> points,
                   Real* __restrict__ grad_input) {
  const int64_t depth = size.groups * size.channels;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t channel = thread % depth % size.channels, group = thread % depth / size.channels;
  const int64_t row = thread / depth % size.height, image = thread / depth / size.height;
  if (image >= size.images) return;
  grad_input += thread / depth * size.width * depth + thread % depth;
  const int64_t end = size.groups == 1 ? size.points : group + 1;
  for (int64_t point = group; point < end; ++point) {
    const auto xy = points[image][point];
    for (int64_t y = 0; y < size.rows; ++y) {
      for (int64_t x = 0; x < size.columns; ++x) {
        Bilinear<Real> at;
        if (!locate(xy[0][y][x], xy[1][y][x], size.width, size.height, at)) continue;
        if (row != at.y && row != at.y + 1) continue;
        const int64_t location = (image * size.rows + y) * size.columns + x;
        const int64_t from = size.sum ? location : location * size.points + point;
        const Real upstream = static_cast<Real>(grad[from * size.channels + channel]);
        const int k = row == at.y ? 0 : 2;
        if (at.in(k)) grad_input[at.x * depth] += at.weight(k) * upstream;
        if (at.in(k + 1)) grad_input[(at.x + 1) * depth] += at.weight(k + 1) * upstream;
      }
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared_bytes,
            const Arguments&... arguments) {
  constexpr int64_t most = std::numeric_limits<int>::max();
  TORCH_CHECK(blocks <= most, "this takes ", blocks, " blocks of threads; wanted are at most ",
              most, ": split the batch");
  if (blocks == 0) return;  // nothing to do, which is normal
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls `run(map, real, width)`: values of the types, and the widest pack for these tensors.
template <typename Run>
void dispatch(const Sizes& size, const at::Tensor& input, const at::Tensor& grad, const Run& run) {
  const auto addresses = reinterpret_cast<uintptr_t>(input.const_data_ptr()) |
                         reinterpret_cast<uintptr_t>(grad.const_data_ptr());
  const auto widest = [&](auto map, auto real) {
    const auto fits = [&](unsigned width) {
      return size.channels % width == 0 && addresses % (width * sizeof(map)) == 0;
    };
    constexpr int most = 16 / sizeof(map), half = sizeof(map) == 2 ? 4 : 1;
    if (fits(most)) return run(map, real, std::integral_constant<int, most>());
    if (fits(half)) return run(map, real, std::integral_constant<int, half>());
    run(map, real, std::integral_constant<int, 1>());
  };
  const auto type = input.scalar_type();
  if (type == at::kDouble) return widest(double(), double());
  if (type == at::kFloat) return widest(float(), float());
  if (type == at::kBFloat16) return widest(at::BFloat16(), float());
  widest(at::Half(), float());
}

// What a kernel writes: the result itself, if that has the kernel's layout and type.
at::Tensor buffer(const at::Tensor& result, at::ScalarType type) {
  const bool fits = result.scalar_type() == type && result.is_contiguous(channels_last);
  return fits ? result : at::empty(result.sizes(), result.options().dtype(type), channels_last);
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& points, int64_t groups, bool sum) {
  const Sizes size = checked(input, points, groups, sum);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor maps = input.contiguous(channels_last), result = empty_output(input, size);
  const at::Tensor out = buffer(result, result.scalar_type());
  dispatch(size, maps, maps, [&](auto map, auto real, auto width) {
    using Map = decltype(map);
    using Real = decltype(real);
    const Tiling tiling(size, width);
    launch(forward_kernel<Map, Real, width()>, size.images * tiling.across * tiling.down,
           tiling.block, tiling.shared_bytes<Real>(size), size, tiling, maps.const_data_ptr<Map>(),
           points.packed_accessor64<const Real, 5>(), out.mutable_data_ptr<Map>());
  });
  return out.is_same(result) ? result : result.copy_(out);
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& input,
                                            const at::Tensor& points, int64_t groups, bool sum,
                                            std::array<bool, 2> mask) {
  const Sizes size = checked(input, points, groups, sum);
  check_gradient(grad, input, size);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor maps = input.contiguous(channels_last), grads = grad.contiguous(channels_last);
  const at::Tensor nothing = at::empty({0}, input.options());
  const at::Tensor grad_input =
      mask[0] ? at::empty(input.sizes(), input.options(), layout(input)) : nothing;
  const at::Tensor grad_points =
      at::empty(mask[1] ? points.sizes() : nothing.sizes(), points.options());
  const at::Tensor sums = mask[0] ? buffer(grad_input, points.scalar_type()).zero_() : nothing;
  dispatch(size, maps, grads, [&](auto map, auto real, auto width) {
    using Map = decltype(map);
    using Real = decltype(real);
    const auto xy = points.packed_accessor64<const Real, 5>();
    const Map* from = grads.const_data_ptr<Map>();
    Real* to_input = mask[0] ? sums.mutable_data_ptr<Real>() : nullptr;
    Real* to_points = mask[1] ? grad_points.mutable_data_ptr<Real>() : nullptr;
    if (to_input && at::globalContext().deterministicAlgorithms()) {
      const int64_t owners = size.images * size.height * size.depth();
      launch(ordered_kernel<Map, Real>, (owners + most_threads - 1) / most_threads, most_threads, 0,
             size, from, xy, to_input);
      to_input = nullptr;
    }
    if (to_input || to_points) {
      const Tiling tiling(size, width);
      launch(backward_kernel<Map, Real, width()>, size.images * tiling.across * tiling.down,
             tiling.block, tiling.shared_bytes<Real>(size), size, tiling, from,
             maps.const_data_ptr<Map>(), xy, to_input, to_points);
    }
  });
  if (!sums.is_same(grad_input)) grad_input.copy_(sums);
  return {grad_input, grad_points};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2_decouple, CUDA, library) {
  library.impl("point_gather", forward);
  library.impl("_point_gather_backward", backward);
}

}  // namespace d2_decouple
