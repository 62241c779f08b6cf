// SPDX-License-Identifier: Apache-2.0
// What the kernels of all devices share: the sizes of a call, its checks, its results' layout.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <string>

namespace d2_decouple {

struct Sizes {
  int64_t images, groups, channels;  // channels: of one group
  int64_t height, width;             // of the map that is read
  int64_t points, rows, columns;     // rows and columns of locations, each with its points
  bool sum;

  int64_t cells() const { return height * width; }
  int64_t locations() const { return rows * columns; }
  int64_t depth() const { return groups * channels; }
  int64_t out_depth() const { return sum ? channels : points * channels; }
};

// As Python writes it.
inline std::string name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kHalf:
      return "torch.float16";
    default:
      return at::toString(type);
  }
}

inline Sizes checked(const at::Tensor& input, const at::Tensor& points, int64_t groups, bool sum) {
  TORCH_CHECK(input.dim() == 4, "maps have shape ", input.sizes(),
              "; wanted is (N, groups * C, H, W)");
  TORCH_CHECK(points.dim() == 5 && points.size(2) == 2, "points have shape ", points.sizes(),
              "; wanted is (N, P, 2, Ho, Wo)");
  TORCH_CHECK(points.size(0) == input.size(0), "points are of ", points.size(0),
              " images, maps of ", input.size(0), "; wanted are as many");
  const int64_t channels = input.size(1);
  TORCH_CHECK(groups == 1 || groups == points.size(1), "groups are ", groups,
              "; wanted is 1 or the number of points, ", points.size(1));
  TORCH_CHECK(groups ? channels % groups == 0 : channels == 0, "maps have ", channels,
              " channels; wanted is a multiple of ", groups, " groups");
  const auto type = input.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
      "maps are ", name(type), "; wanted is float32, float64, bfloat16 or float16");
  const auto wanted = type == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(points.scalar_type() == wanted, "points are ", name(points.scalar_type()),
              "; wanted is ", name(wanted), " with ", name(type), " maps",
              at::isReducedFloatingType(points.scalar_type())
                  ? " (half precision is too coarse for coordinates)"
                  : "");
  TORCH_CHECK(points.device() == input.device(), "points are on ", points.device(), ", maps on ",
              input.device(), "; wanted is one");
  return {input.size(0),  groups,         groups ? channels / groups : 0,
          input.size(2),  input.size(3),  points.size(1),
          points.size(3), points.size(4), sum};
}

// Contiguous maps are read as planes, all others channels-last; results are laid out like them.
inline at::MemoryFormat layout(const at::Tensor& input) {
  return input.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

inline at::Tensor empty_output(const at::Tensor& input, const Sizes& size) {
  return at::empty({size.images, size.out_depth(), size.rows, size.columns}, input.options(),
                   layout(input));
}

inline void check_gradient(const at::Tensor& grad, const at::Tensor& input, const Sizes& size) {
  const auto wanted = {size.images, size.out_depth(), size.rows, size.columns};
  TORCH_CHECK(grad.sizes() == at::IntArrayRef(wanted), "the gradient has shape ", grad.sizes(),
              "; wanted is ", at::IntArrayRef(wanted));
  TORCH_CHECK(grad.scalar_type() == input.scalar_type() && grad.device() == input.device(),
              "the gradient is ", name(grad.scalar_type()), " on ", grad.device(), "; wanted is ",
              name(input.scalar_type()), " on ", input.device());
}

}  // namespace d2_decouple
