// SPDX-License-Identifier: Apache-2.0
// Where a point lies between the cells of a map: the only bilinear weights of this library.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define D2D_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define D2D_HOST_DEVICE inline
#endif

namespace d2_decouple {

// The four cells around a point, in the order (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1).
template <typename scalar>
struct Bilinear {
  int64_t x, y;                               // the cell at or before the point
  scalar right, down;                         // how far beyond it the point lies, 0 <= . < 1
  bool left_in, right_in, top_in, bottom_in;  // columns x, x + 1 and rows y, y + 1 of the map

  D2D_HOST_DEVICE bool in(int corner) const {
    return (corner & 2 ? bottom_in : top_in) && (corner & 1 ? right_in : left_in);
  }
  D2D_HOST_DEVICE scalar weight(int corner) const {
    return (corner & 2 ? down : 1 - down) * (corner & 1 ? right : 1 - right);
  }
  // Derivatives of the weight.
  D2D_HOST_DEVICE scalar weight_dx(int corner) const {
    const scalar across = corner & 2 ? down : 1 - down;
    return corner & 1 ? across : -across;
  }
  D2D_HOST_DEVICE scalar weight_dy(int corner) const {
    const scalar along = corner & 1 ? right : 1 - right;
    return corner & 2 ? along : -along;
  }
};

// False where the point is ignored: at least a cell outside, or not a number. The comparisons are
// positive ones, so that NaN fails them and nothing unrepresentable becomes an index.
template <typename scalar>
D2D_HOST_DEVICE bool locate(scalar x, scalar y, int64_t width, int64_t height,
                            Bilinear<scalar>& point) {
  if (!(x > -1 && y > -1 && x < width && y < height)) {
    return false;
  }
  // Truncation rounds towards zero, which is up only between -1 and 0.
  point.x = static_cast<int64_t>(x) - (x < 0);
  point.y = static_cast<int64_t>(y) - (y < 0);
  point.right = x - point.x;
  point.down = y - point.y;
  point.left_in = point.x >= 0;
  point.top_in = point.y >= 0;
  point.right_in = point.x + 1 < width;
  point.bottom_in = point.y + 1 < height;
  return true;
}

}  // namespace d2_decouple
