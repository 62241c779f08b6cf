// SPDX-License-Identifier: Apache-2.0
// The kernels for the CPU: which loops run, over what, and in which share of the threads.
//
// Nothing depends on the number of threads: the forward writes each location once, and the backward
// cuts the channels into blocks of which each belongs to one thread alone.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bilinear.h"
#include "problem.h"

namespace d2_decouple {
namespace {

// One location of one image, in the order of memory.
struct Place {
  int64_t image, row, column;

  Place(const Sizes& size, int64_t index)
      : image(index / size.locations()),
        row(index % size.locations() / size.columns),
        column(index % size.columns) {}

  void step(const Sizes& size) {
    if (++column == size.columns) {
      column = 0;
      if (++row == size.rows) {
        row = 0;
        ++image;
      }
    }
  }
  int64_t index(const Sizes& size) const {
    return (image * size.rows + row) * size.columns + column;
  }
};

template <typename Real>
struct Points {
  const Real* data;
  int64_t image, point, axis, row, column;  // strides

  explicit Points(const at::Tensor& points)
      : data(points.const_data_ptr<Real>()),
        image(points.stride(0)),
        point(points.stride(1)),
        axis(points.stride(2)),
        row(points.stride(3)),
        column(points.stride(4)) {}

  const Real* at(const Place& place, int64_t number) const {
    return data + place.image * image + place.row * row + place.column * column + number * point;
  }
};

// The cells around a point; an offset of -1 is outside the map. All are for an ignored point.
template <typename Real>
struct Corners {
  int64_t offsets[4] = {-1, -1, -1, -1};
  Real weights[4] = {};
  Bilinear<Real> point{};

  Corners() = default;
  Corners(const Sizes& size, const Points<Real>& points, const Place& place, int64_t number) {
    const Real* x = points.at(place, number);
    if (locate(x[0], x[points.axis], size.width, size.height, point)) {
      const int64_t first = point.y * size.width + point.x;
      for (int k = 0; k < 4; ++k) {
        offsets[k] = point.in(k) ? first + k / 2 * size.width + k % 2 : -1;
        weights[k] = point.weight(k);
      }
    }
  }

  bool ignored() const { return (offsets[0] & offsets[1] & offsets[2] & offsets[3]) == -1; }
};

// Channels low to high of one group of one image, and the points that read them. `low` is where a
// part of the channels begins, `part` its number.
struct Block {
  int64_t image, group, part, low, high, first_point, last_point;
};

// The way through the locations of a block and their points.
struct Visit {
  Place place;
  int64_t point;

  Visit(const Sizes& size, const Block& block)
      : place(size, block.image * size.locations()), point(block.first_point) {}

  void step(const Sizes& size, const Block& block) {
    if (++point == block.last_point) {
      point = block.first_point;
      place.step(size);
    }
  }
};

template <typename Map, typename Real>
struct Gradients {
  const Map *grad, *input;
  Real* grad_input;               // null where it is not wanted
  Real* parts;                    // (parts, N, P, 2, Ho, Wo)
  int64_t part_width, part_size;  // channels of a part; numbers in `parts` for each

  Real* grad_points(const Sizes& size, const Block& block, int64_t point) const {
    const int64_t row = block.image * size.points + point;
    return parts + block.part * part_size + row * 2 * size.locations();
  }
};

namespace portable {
#define D2D_REGISTER 16
#include "kernels.h"
#undef D2D_REGISTER
}  // namespace portable
// Clang has other words for this; it uses what the whole build may use.
#if defined(__x86_64__) && !defined(__clang__)
#define D2D_X86_KERNELS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define D2D_REGISTER 32
#include "kernels.h"
#undef D2D_REGISTER
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define D2D_REGISTER 64
#include "kernels.h"
#undef D2D_REGISTER
}  // namespace avx512
#pragma GCC pop_options
#endif

// Calls a kernel of the best set of instructions there is, or of the one that is asked for.
int capability() {
  const char* name = std::getenv("D2D_CPU_CAPABILITY");
  const std::string wanted = name ? name : "";
  TORCH_CHECK(wanted.empty() || wanted == "default" || wanted == "avx2" || wanted == "avx512",
              "D2D_CPU_CAPABILITY is '", wanted, "'; wanted is default, avx2 or avx512");
  int level = 0;
#ifdef D2D_X86_KERNELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  level = avx512 ? 2 : avx2 ? 1 : 0;
#endif
  return wanted == "default" ? 0 : wanted == "avx2" ? std::min(level, 1) : level;
}

#ifdef D2D_X86_KERNELS
#define D2D_CALL(kernel, ...)                 \
  (level == 2   ? avx512::kernel(__VA_ARGS__) \
   : level == 1 ? avx2::kernel(__VA_ARGS__)   \
                : portable::kernel(__VA_ARGS__))
#else
#define D2D_CALL(kernel, ...) portable::kernel(__VA_ARGS__)
#endif

// Calls f(number of the maps' type, number of the points' type).
template <typename Function>
void dispatch(at::ScalarType type, const Function& f) {
  switch (type) {
    case at::kDouble:
      return f(double{}, double{});
    case at::kBFloat16:
      return f(at::BFloat16{}, float{});
    case at::kHalf:
      return f(at::Half{}, float{});
    default:
      return f(float{}, float{});
  }
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& points, int64_t groups, bool sum) {
  static const int level = capability();
  const Sizes size = checked(input, points, groups, sum);
  const at::MemoryFormat format = layout(input);
  const at::Tensor out = empty_output(input, size);
  if (out.numel() == 0) {
    return out;
  }
  if (size.cells() == 0 || size.points == 0) {
    return out.zero_();
  }
  const at::Tensor maps = input.contiguous(format);
  const bool planes = format == at::MemoryFormat::Contiguous;
  const int64_t share = planes ? portable::tile : 1, locations = size.locations();
  const int64_t shares = (locations + share - 1) / share;
  const int64_t grain =
      1 + (1 << 15) / (share * size.points * std::max<int64_t>(size.channels, 16));
  dispatch(input.scalar_type(), [&](auto map, auto real) {
    using Map = decltype(map);
    using Real = decltype(real);
    const Points<Real> where(points);
    const Map* from = maps.const_data_ptr<Map>();
    Map* to = out.mutable_data_ptr<Map>();
    at::parallel_for(0, size.images * shares, grain, [&](int64_t begin, int64_t end) {
      if (planes) {
        const auto at = [&](int64_t i) {
          return i / shares * locations + std::min(i % shares * share, locations);
        };
        D2D_CALL(forward_planes, size, from, where, to, at(begin), at(end));
      } else {
        D2D_CALL(forward_rows, size, from, where, to, begin, end);
      }
    });
  });
  return out;
}

// Lets a fresh tensor have memory that was used before. Large memory goes back to the system when
// it is freed, and to get it again, page by page, takes as long as all else in a backward. So some
// is kept here, for when nobody else has it: at most `limit` bytes, the oldest goes first.
void use_again(at::Tensor& tensor) {
  constexpr size_t least = size_t(1) << 20, limit = size_t(256) << 20;
  static std::mutex mutex;
  static auto* const kept = new std::deque<c10::Storage>;  // never destroyed: PyTorch may be gone
  const size_t bytes = tensor.nbytes();
  if (bytes < least || bytes > limit) {
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::find_if(kept->begin(), kept->end(), [&](const c10::Storage& storage) {
    return storage.nbytes() == bytes && storage.use_count() == 1 && storage.resizable();
  });
  if (found != kept->end()) {
    tensor.set_(*found, 0, tensor.sizes().vec(), tensor.strides().vec());
    return;
  }
  kept->push_back(tensor.storage());
  size_t total = 0;
  for (const c10::Storage& storage : *kept) {
    total += storage.nbytes();
  }
  for (; total > limit; kept->pop_front()) {
    total -= kept->front().nbytes();
  }
}

at::Tensor zeros(at::IntArrayRef shape, const at::TensorOptions& options, at::MemoryFormat format) {
  at::Tensor result = at::empty(shape, options, format);  // takes no pages yet
  use_again(result);
  return result.zero_();
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& input,
                                            const at::Tensor& points, int64_t groups, bool sum,
                                            std::array<bool, 2> output_mask) {
  static const int level = capability();
  const Sizes size = checked(input, points, groups, sum);
  check_gradient(grad, input, size);
  const at::MemoryFormat format = layout(input);
  // Each part is summed by itself, whoever does it: so the sums do not depend on the threads.
  const int64_t count = std::max<int64_t>((size.channels + 63) / 64, 1);
  const int64_t width = std::max<int64_t>(((size.channels + count - 1) / count + 15) / 16 * 16, 16);
  at::Tensor grad_input = output_mask[0] ? zeros(input.sizes(), points.options(), format)
                                         : at::empty({0}, points.options());
  at::Tensor parts =
      at::zeros({count, size.images, size.points, 2, size.rows, size.columns}, points.options());
  const at::Tensor maps = input.contiguous(format), upstream = grad.contiguous(format);
  dispatch(input.scalar_type(), [&](auto map, auto real) {
    using Map = decltype(map);
    using Real = decltype(real);
    const Points<Real> where(points);
    const Gradients<Map, Real> to{upstream.const_data_ptr<Map>(),
                                  maps.const_data_ptr<Map>(),
                                  output_mask[0] ? grad_input.mutable_data_ptr<Real>() : nullptr,
                                  parts.mutable_data_ptr<Real>(),
                                  width,
                                  points.numel()};
    const bool nothing = upstream.numel() == 0 || size.cells() == 0;
    const int64_t all = nothing ? 0 : size.images * size.groups * count;
    at::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // the parts of one group at a time
        const int64_t part = begin % count, group = begin / count % size.groups;
        const int64_t next = std::min(end, begin - part + count);
        const int64_t high = std::min((part + next - begin) * width, size.channels);
        const bool shared = size.groups == 1;
        const Block block{
            begin / count / size.groups,     group, part, part * width, high, shared ? 0 : group,
            shared ? size.points : group + 1};
        if (format == at::MemoryFormat::Contiguous) {
          D2D_CALL(backward_planes, size, block, to, where);
        } else {
          D2D_CALL(backward_rows, size, block, to, where);
        }
        begin = next;
      }
    });
  });
  if (output_mask[0]) {
    grad_input = grad_input.to(input.scalar_type());
  } else {
    grad_input = at::empty({0}, input.options());
  }
  at::Tensor grad_points = at::empty({0}, points.options());
  if (output_mask[1]) {
    grad_points = count == 1 ? parts[0] : parts[0].clone();
    for (int64_t part = 1; part < count; ++part) {
      grad_points.add_(parts[part]);
    }
  }
  return {grad_input, grad_points};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2_decouple, CPU, library) {
  library.impl("point_gather", forward);
  library.impl("_point_gather_backward", backward);
}

}  // namespace d2_decouple
