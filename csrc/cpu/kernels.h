// SPDX-License-Identifier: Apache-2.0
// The loops over points and channels. Included once for each instruction set, in a namespace of
// its own, while the compiler may use that set: hence no include guard, and no header from here.

// As many numbers as fill a register; D2D_REGISTER is its size in bytes.
typedef float Floats __attribute__((vector_size(D2D_REGISTER)));
typedef double Doubles __attribute__((vector_size(D2D_REGISTER)));
typedef uint16_t Shorts __attribute__((vector_size(D2D_REGISTER / 2)));
typedef uint32_t Words __attribute__((vector_size(D2D_REGISTER)));

template <typename Real>
using Vector = std::conditional_t<std::is_same_v<Real, double>, Doubles, Floats>;

template <typename Number>
constexpr int64_t lanes =
    std::is_arithmetic_v<Number>
        ? 1
        : D2D_REGISTER / (std::is_same_v<Number, Doubles> ? sizeof(double) : sizeof(float));

// Between memory and one number or a vector of them, converting what the map holds.
template <typename Number, typename Map>
inline Number load(const Map* from) {
  if constexpr (lanes<Number> == 1) {
    return static_cast<Number>(*from);
  } else if constexpr (sizeof(Map) >= sizeof(float)) {
    Number result;
    std::memcpy(&result, from, sizeof(result));
    return result;
  } else {
    Shorts bits;
    std::memcpy(&bits, from, sizeof(bits));
    const Words wide = __builtin_convertvector(bits, Words);
    if constexpr (std::is_same_v<Map, at::BFloat16>) {
      return (Floats)(wide << 16);
    } else {
      // Half's exponents are 112 smaller; infinity and NaN have all bits set, and keep them.
      // Subnormal numbers count 2^-24, which is what the last bit of 0.5 is worth.
      const Words magnitude = wide & 0x7fff;
      const Words tiny = (Words)(magnitude < 0x400);
      const Words counted = (Words)((Floats)(magnitude | 0x3f000000) - 0.5f);
      const Words normal = (magnitude << 13) + 0x38000000;
      const Words special = (Words)(magnitude >= 0x7c00) & 0x7f800000;
      return (Floats)((tiny & counted) | (~tiny & normal) | special | (wide & 0x8000) << 16);
    }
  }
}

template <typename Number, typename Map>
inline void store(Map* to, const Number& value) {
  if constexpr (lanes<Number> == 1) {
    *to = static_cast<Map>(value);
  } else if constexpr (sizeof(Map) >= sizeof(float)) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    for (int64_t lane = 0; lane < lanes<Number>; ++lane) {
      to[lane] = static_cast<Map>(value[lane]);
    }
  }
}

// The sum of all lanes: the halves are added until one number is left.
template <typename Real, int bytes = D2D_REGISTER>
inline Real total(const void* lanes_of_vector) {
  typedef Real Half __attribute__((vector_size(bytes / 2)));
  Half low, high;
  std::memcpy(&low, lanes_of_vector, sizeof(Half));
  std::memcpy(&high, static_cast<const char*>(lanes_of_vector) + sizeof(Half), sizeof(Half));
  low += high;
  if constexpr (sizeof(Half) == sizeof(Real)) {
    return low[0];
  } else {
    return total<Real, bytes / 2>(&low);
  }
}

// Ask for the cache lines of a row before they are needed: rows lie too far apart for the processor
// to foresee them.
template <int written, typename Number>
inline void prefetch(const Number* row, int64_t channels) {
  for (int64_t i = 0; i < channels; i += 64 / sizeof(Number)) {
    __builtin_prefetch(row + i, written);
  }
}

// Channels-last: the weighted sum of `count` rows, from `channel` on, `unroll` vectors at a time.
template <typename Number, int unroll, typename Map, typename Real>
inline void blend(const Map* const* rows, const Real* weights, int64_t count, Map* out,
                  int64_t& channel, int64_t channels) {
  constexpr int64_t step = unroll * lanes<Number>;
  for (; channel + step <= channels; channel += step) {
    Number sums[unroll] = {};
    for (int64_t row = 0; row < count; ++row) {
      for (int i = 0; i < unroll; ++i) {
        sums[i] += weights[row] * load<Number>(rows[row] + channel + i * lanes<Number>);
      }
    }
    for (int i = 0; i < unroll; ++i) {
      store(out + channel + i * lanes<Number>, sums[i]);
    }
  }
}

// Locations begin to end of all images. The rows of a location are asked for one location ahead.
template <typename Map, typename Real>
void forward_rows(const Sizes& size, const Map* input, const Points<Real>& points, Map* out,
                  int64_t begin, int64_t end) {
  const int64_t channels = size.channels, depth = size.depth(), count = 4 * size.points;
  const std::vector<Map> nothing(channels, Map(0));
  std::vector<const Map*> rows(2 * count);  // of this location and of the next
  std::vector<Real> weights(2 * count);
  Place next(size, begin);
  const auto look_up = [&](int64_t slot) {
    const Map* group = input + next.image * size.cells() * depth;
    for (int64_t row = slot; row < slot + count; row += 4) {
      const Corners<Real> cells(size, points, next, (row - slot) / 4);
      for (int k = 0; k < 4; ++k) {
        const bool outside = cells.offsets[k] < 0;
        rows[row + k] = outside ? nothing.data() : group + cells.offsets[k] * depth;
        weights[row + k] = cells.weights[k];
        prefetch<0>(rows[row + k], channels);
      }
      group += size.groups == 1 ? 0 : channels;
    }
    next.step(size);
  };
  look_up(0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t slot = (i - begin) % 2 * count;
    if (i + 1 < end) {
      look_up(count - slot);
    }
    const int64_t together = size.sum ? count : 4;
    Map* to = out + i * size.out_depth();
    for (int64_t row = slot; row < slot + count; row += together, to += channels) {
      int64_t channel = 0;
      blend<Vector<Real>, 5>(&rows[row], &weights[row], together, to, channel, channels);
      blend<Vector<Real>, 1>(&rows[row], &weights[row], together, to, channel, channels);
      blend<Real, 1>(&rows[row], &weights[row], together, to, channel, channels);
    }
  }
}

// Channels-last: adds the shares of a point's four rows, and sums what its place changes.
template <typename Number, typename Map, typename Real>
inline void spread(const Corners<Real>& cells, const Map* grad, const Map* const* rows,
                   Real* const* grad_rows, Number& dx, Number& dy, int64_t& channel,
                   int64_t channels) {
  Number products[4] = {};
  for (; channel + lanes<Number> <= channels; channel += lanes<Number>) {
    const Number g = load<Number>(grad + channel);
    for (int k = 0; k < 4; ++k) {
      products[k] += g * load<Number>(rows[k] + channel);
      Real* row = grad_rows[k] + channel;
      store(row, load<Number>(row) + g * cells.weights[k]);
    }
  }
  for (int k = 0; k < 4; ++k) {
    if (cells.offsets[k] >= 0) {  // or infinity times nothing would be NaN
      dx += cells.point.weight_dx(k) * products[k];
      dy += cells.point.weight_dy(k) * products[k];
    }
  }
}

// Channels low to high of a block and all points that read them, in all locations of an image.
template <typename Map, typename Real>
void backward_rows(const Sizes& size, const Block& block, const Gradients<Map, Real>& to,
                   const Points<Real>& points) {
  constexpr int64_t ahead = 6;  // visits between the asking for a row and its use
  const int64_t depth = size.depth(), width = block.high - block.low;
  const int64_t locations = size.locations(), out_depth = size.out_depth();
  const std::vector<Map> nothing(width, Map(0));
  std::vector<Real> ignored(width);
  const int64_t first =
      block.image * size.cells() * depth + block.group * size.channels + block.low;
  const Map* input = to.input + first;
  Real* grad_input = to.grad_input ? to.grad_input + first : nullptr;
  Corners<Real> ring[ahead];
  Visit now(size, block), next = now;
  const auto look_up = [&](Corners<Real>& cells) {
    cells = Corners<Real>(size, points, next.place, next.point);
    for (const int64_t offset : cells.offsets) {
      if (offset >= 0) {
        prefetch<0>(input + offset * depth, width);
        if (grad_input) {
          prefetch<1>(grad_input + offset * depth, width);
        }
      }
    }
    next.step(size, block);
  };
  const int64_t visits = locations * (block.last_point - block.first_point);
  for (int64_t i = 0; i < std::min(ahead, visits); ++i) {
    look_up(ring[i]);
  }
  for (int64_t i = 0, slot = 0; i < visits; ++i, now.step(size, block)) {
    Corners<Real>& cells = ring[slot];
    if (!cells.ignored()) {
      const Map* rows[4];
      Real* grad_rows[4];
      for (int k = 0; k < 4; ++k) {
        const int64_t offset = cells.offsets[k];
        rows[k] = offset < 0 ? nothing.data() : input + offset * depth;
        grad_rows[k] = offset < 0 || !grad_input ? ignored.data() : grad_input + offset * depth;
      }
      const int64_t location = now.place.index(size);
      const Map* grad = to.grad + location * out_depth + block.low;
      grad += size.sum ? 0 : now.point * size.channels;
      Real* result = to.grad_points(size, block, now.point) + location % locations;
      int64_t channel = 0;
      for (; channel < width; result += to.part_size) {
        const int64_t end = std::min(channel + to.part_width, width);
        Vector<Real> along{}, across{};
        Real dx = 0, dy = 0;
        spread(cells, grad, rows, grad_rows, along, across, channel, end);
        spread(cells, grad, rows, grad_rows, dx, dy, channel, end);
        result[0] = dx + total<Real>(&along);
        result[locations] = dy + total<Real>(&across);
      }
    }
    if (i + ahead < visits) {
      look_up(cells);
    }
    slot = slot + 1 == ahead ? 0 : slot + 1;
  }
}

// Contiguous maps: neighbouring locations side by side, so that weights serve all channels.
constexpr int64_t tile = 64;

template <typename Map, typename Real>
void forward_planes(const Sizes& size, const Map* input, const Points<Real>& points, Map* out,
                    int64_t begin, int64_t end) {
  const int64_t channels = size.channels, cells = size.cells(), locations = size.locations();
  std::vector<Real> sums(channels * tile);
  std::vector<Corners<Real>> corners(tile);
  for (int64_t start = begin; start < end;) {
    Place place(size, start);
    const int64_t image = place.image, location = start % locations;
    const int64_t length = std::min({tile, end - start, locations - location});
    for (int64_t point = 0; point < size.points; ++point) {
      Place at = place;
      for (int64_t i = 0; i < length; ++i, at.step(size)) {
        corners[i] = Corners<Real>(size, points, at, point);
      }
      if (point == 0 || !size.sum) {
        std::fill(sums.begin(), sums.end(), Real(0));
      }
      const int64_t group = size.groups == 1 ? 0 : point;
      const Map* plane = input + (image * size.groups + group) * channels * cells;
      for (int64_t channel = 0; channel < channels; ++channel, plane += cells) {
        for (int64_t i = 0; i < length; ++i) {
          for (int k = 0; k < 4; ++k) {
            if (corners[i].offsets[k] >= 0) {
              sums[channel * tile + i] +=
                  corners[i].weights[k] * static_cast<Real>(plane[corners[i].offsets[k]]);
            }
          }
        }
      }
      if (point + 1 == size.points || !size.sum) {
        Map* to = out + (image * size.out_depth() + (size.sum ? 0 : point * channels)) * locations;
        for (int64_t channel = 0; channel < channels; ++channel) {
          for (int64_t i = 0; i < length; ++i) {
            to[channel * locations + location + i] = static_cast<Map>(sums[channel * tile + i]);
          }
        }
      }
    }
    start += length;
  }
}

// Some locations of one channel: shares of the cells, and what the points' places change.
template <typename Map, typename Real>
inline void scatter_plane(const Corners<Real>* corners, int64_t length, const Map* grad,
                          const Map* plane, Real* grad_plane, Real* dx, Real* dy) {
  for (int64_t i = 0; i < length; ++i) {
    const Real g = static_cast<Real>(grad[i]);
    for (int k = 0; k < 4; ++k) {
      const int64_t cell = corners[i].offsets[k];
      if (cell >= 0) {
        const Real product = g * static_cast<Real>(plane[cell]);
        dx[i] += corners[i].point.weight_dx(k) * product;
        dy[i] += corners[i].point.weight_dy(k) * product;
        if (grad_plane) {
          grad_plane[cell] += g * corners[i].weights[k];
        }
      }
    }
  }
}

template <typename Map, typename Real>
void backward_planes(const Sizes& size, const Block& block, const Gradients<Map, Real>& to,
                     const Points<Real>& points) {
  const int64_t cells = size.cells(), locations = size.locations();
  std::vector<Corners<Real>> corners(tile);
  const int64_t group = (block.image * size.groups + block.group) * size.channels;
  for (int64_t point = block.first_point; point < block.last_point; ++point) {
    Place place(size, block.image * locations);
    for (int64_t start = 0; start < locations; start += tile) {
      const int64_t length = std::min(tile, locations - start);
      for (int64_t i = 0; i < length; ++i, place.step(size)) {
        corners[i] = Corners<Real>(size, points, place, point);
      }
      Real* result = to.grad_points(size, block, point) + start;
      for (int64_t low = block.low; low < block.high; low += to.part_width) {
        Real dx[tile] = {}, dy[tile] = {};
        for (int64_t c = low; c < std::min(low + to.part_width, block.high); ++c) {
          const int64_t from = block.image * size.out_depth() + c;
          const int64_t apart = size.sum ? 0 : point * size.channels;
          scatter_plane(corners.data(), length, to.grad + (from + apart) * locations + start,
                        to.input + (group + c) * cells,
                        to.grad_input ? to.grad_input + (group + c) * cells : nullptr, dx, dy);
        }
        std::copy(dx, dx + length, result);
        std::copy(dy, dy + length, result + locations);
        result += to.part_size;
      }
    }
  }
}
