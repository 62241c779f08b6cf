# SPDX-License-Identifier: Apache-2.0
"""Other networks under any one-stage model: each function exchanges the backbone of a model node.

What a slot says stays as it is. The weights of all of them want RGB, normalised as ImageNet is, so
the data must be read so too: ``dataloader.train.mapper.image_format = "RGB"``.
"""

from typing import Any

from detectron2.config import LazyCall as L

from d2_decouple.config import ConfigError
from d2_decouple.modeling import FPN
from d2_decouple.modeling.detectron2_backbones import mvit, simple_pyramid, swin, vit
from d2_decouple.modeling.timm_backbone import TimmBackbone

_PIXELS = dict(
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    input_format="RGB",
)


def put_under(model: Any, bottom_up: Any, channels: int) -> None:
    """Exchange the network under the pyramid.

    Args:
        model: of a one-stage recipe.
        bottom_up: a lazy node with ``out_features``; its maps are named as a ResNet's.
        channels: of its ``res2``; each later map has twice as many.
    """
    finer = "res2" in model.head_in_features
    # A map that nobody reads is not asked for: its norm would get no gradient.
    bottom_up.out_features = ["res2", "res3", "res4", "res5"] if finer else ["res3", "res4", "res5"]
    model.backbone.bottom_up = bottom_up
    model.backbone.passed_on = ["res2"] if finer else []
    if model.backbone.top_block.in_feature == "res5":
        model.backbone.top_block.in_channels = 8 * channels
    if finer:
        model.head.context.finer_channels = channels
    model.update(_PIXELS)


def swin_tiny(model: Any) -> None:
    """Swin-T."""
    put_under(model, L(swin)(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]), 96)


def mvitv2_tiny(model: Any) -> None:
    """MViTv2-T."""
    put_under(model, L(mvit)(embed_dim=96, depth=10, last_block_indexes=[0, 2, 7, 9]), 96)


def timm_network(model: Any, name: str, channels: int, *, pretrained: bool = True) -> None:
    """A network of timm whose maps have ``channels``, twice as many, and so on from stride 4."""
    put_under(model, L(TimmBackbone)(name=name, pretrained=pretrained, freeze_norms=True), channels)


def vitdet_base(model: Any) -> None:
    """ViT-B with ViTDet's simple pyramid in the place of the model's own, P6 made from P5."""
    kind = model.backbone._target_
    if getattr(kind, "__name__", str(kind).rpartition(".")[2]) != FPN.__name__:
        raise ConfigError(
            f"the pyramid is {kind}, which needs several maps of the network below, and a ViT has "
            "one; take a recipe with a plain FPN, such as sapd_R_50_FPN_1x_nobfp"
        )
    top_block = model.backbone.top_block
    top_block.update(in_feature="p5", in_channels="${..out_channels}")
    finer = "res2" in model.head_in_features
    model.backbone = L(simple_pyramid)(
        net=L(vit)(embed_dim=768, depth=12, num_heads=12),
        out_channels=model.backbone.out_channels,
        top_block=top_block,
        finest="p2" if finer else "p3",
    )
    if finer:
        model.head_in_features = [
            "p2" if name == "res2" else name for name in model.head_in_features
        ]
    model.update(_PIXELS)
