# SPDX-License-Identifier: Apache-2.0
"""Operators that PyTorch's exporter to ONNX cannot write by itself, in ONNX's own."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .graph import class_wise_nms

__all__ = ["FreeSizes", "translations", "window_maximum"]

_FLOAT, _INT64, _BOOL = 1, 7, 9  # ONNX's numbers of types


@torch.library.custom_op("d2_decouple::window_maximum", mutates_args=())
def window_maximum(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, H, W) -> (N, C, height, width), as ``adaptive_max_pool2d``.

    Of that one a traced program keeps the sizes of the example.
    """
    return F.adaptive_max_pool2d(x, (height, width))


@window_maximum.register_fake
def _(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:2], height, width)


class FreeSizes(TorchFunctionMode):
    """While this is entered, operators that would fix sizes are exchanged for ones that do not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.adaptive_max_pool2d:
            x, (height, width) = args
            return window_maximum(x, height, width)
        return func(*args, **(kwargs or {}))


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export``: operator -> what builds its nodes. Needs onnxscript."""
    op: Any = import_module("onnxscript").opset18  # not everyone has it

    def nms(boxes, scores, iou_threshold, score_threshold, limit):  # type: ignore[no-untyped-def]
        """Rows (image, class, candidate) of ``NonMaxSuppression``, written into a mask."""
        picked = op.NonMaxSuppression(
            boxes,
            scores,
            op.Cast(op.Reshape(limit, op.Constant(value_ints=[1])), to=_INT64),
            op.Cast(op.Reshape(iou_threshold, op.Constant(value_ints=[1])), to=_FLOAT),
            op.Cast(op.Reshape(score_threshold, op.Constant(value_ints=[1])), to=_FLOAT),
        )
        nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
        marks = op.Expand(op.Constant(value_float=1.0), op.Shape(picked, start=0, end=1))
        return op.Cast(op.ScatterND(nothing, picked, marks), to=_BOOL)

    def pool(x, height, width):  # type: ignore[no-untyped-def]
        """The largest of each window, which is a product of one in y and one in x."""
        return _pooled_along(op, _pooled_along(op, x, height, 2), width, 3)

    return {
        class_wise_nms._opoverload: nms,
        window_maximum._opoverload: pool,
    }


def _pooled_along(op: Any, x: Any, size: Any, axis: int) -> Any:
    """Window i of ``size`` reads from floor(i L / size) up to before ceil((i + 1) L / size)."""
    one, zero = op.Constant(value_int=1), op.Constant(value_int=0)
    row = op.Constant(value_ints=[-1])
    size = op.Cast(op.Squeeze(size), to=_INT64)
    length = op.Squeeze(op.Shape(x, start=axis, end=axis + 1))
    window = op.Range(zero, size, one)
    first = op.Div(op.Mul(window, length), size)
    ends = op.Div(op.Sub(op.Add(op.Mul(op.Add(window, one), length), size), one), size)
    widest = op.ReduceMax(op.Sub(ends, first), keepdims=0)
    steps = op.Range(zero, widest, one)
    index = op.Min(op.Add(op.Unsqueeze(first, row), steps), op.Sub(op.Unsqueeze(ends, row), one))
    gathered = op.Gather(x, index, axis=axis)  # (..., size, widest, ...)
    return op.ReduceMax(gathered, op.Constant(value_ints=[axis + 1]), keepdims=0)
