# SPDX-License-Identifier: Apache-2.0
"""Names of a Res2Net (v1b, v1d): Res2Net's own code, timm, mmdetection -> ours.

``layers/res2net.py`` is the network. The three differ in the stem alone.
"""

import re
from collections.abc import Iterable

__all__ = ["holds_res2net", "res2net_name"]

_VALUE = r"\.(?P<value>weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK = re.compile(
    r"layer(?P<stage>[1-4])\.(?P<block>\d+)\."
    r"(?P<layer>conv[13]|bn[13]|convs\.\d+(\.conv_offset)?|bns\.\d+|downsample\.[12])" + _VALUE
)
_STEM = re.compile(r"(?P<layer>conv1\.[01346]|bn1|stem\.[013467])" + _VALUE)
# Of a sequence of convolution, norm and ReLU, three times; in two of them the last norm is bn1.
_STEM_LAYERS = ("conv1", "conv1.norm", "", "conv2", "conv2.norm", "", "conv3", "conv3.norm")


def holds_res2net(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a Res2Net under one of their names."""
    return any(name.startswith("layer1.0.convs.") for name in names)


def res2net_name(name: str) -> str | None:
    """A tensor's name in Detectron2's manner (``res2.0.convs.1.norm.bias``), or None."""
    if stem := _STEM.fullmatch(name):
        place = stem["layer"].partition(".")[2] or "7"
        return f"stem.{_STEM_LAYERS[int(place)]}.{stem['value']}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    layer = match["layer"]
    if layer.startswith("bn"):
        layer = layer.replace("bn", "conv") + ".norm"
    layer = layer.replace("downsample.1", "shortcut").replace("downsample.2", "shortcut.norm")
    return f"res{int(match['stage']) + 1}.{match['block']}.{layer}.{match['value']}"
