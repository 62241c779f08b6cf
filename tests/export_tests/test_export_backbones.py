# SPDX-License-Identifier: Apache-2.0
"""Networks other than a ResNet in a file: any size of image, or one, or a clear refusal."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import BasicStem, ResNet
from torch import nn
from util import TORCH, excite, tiny

from d2_decouple.config import configs_root, get_config
from d2_decouple.export import ExportError, exportable
from d2_decouple.export.description import describe
from d2_decouple.export.programs import export_file, traced
from d2_decouple.export.verify import deviation
from d2_decouple.layers.deform import DeformBottleneckBlock, DeformConv, resnext_block
from d2_decouple.layers.res2net import DeepStem, DeformRes2NetBlock
from d2_decouple.modeling.detectron2_backbones import mvit, swin, vit
from d2_decouple.modeling.timm_backbone import TimmBackbone
from d2_decouple.runtime import Detections, ExportedDetector

if TORCH < (2, 10):
    pytest.skip("the export needs torch 2.10 or newer", allow_module_level=True)
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

STAGES = ["res2", "res3", "res4", "res5"]
CLASSES = ["ant", "bee", "cat"]
SWIN = dict(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 1, 1, 1], window_size=4)
MVIT = dict(embed_dim=8, depth=4, last_block_indexes=[0, 1, 2, 3], window_size=8)
VIT = dict(embed_dim=32, depth=2, num_heads=2, img_size=64, window_size=2, global_blocks=[1])
try:
    importlib.import_module("detectron2.modeling.backbone.swin")
except ImportError:
    HAS_THEM = False
else:
    HAS_THEM = True
needs_newer = pytest.mark.skipif(not HAS_THEM, reason="this Detectron2 is older than 2022")


def stages_of(block, *, stem=BasicStem, **options):
    """A ResNet of one narrow block a stage."""
    stages, before = [], 16
    # Widths differ: Detectron2's block has no shortcut otherwise, whatever its stride.
    for stride, width in ((1, 32), (2, 48), (2, 40), (2, 56)):
        shape = dict(in_channels=before, out_channels=width, bottleneck_channels=32, norm="BN")
        stages.append(ResNet.make_stage(block, 1, stride_per_block=[stride], **shape, **options))
        before = width
    return ResNet(stem(3, 16, norm="BN"), stages, out_features=STAGES)


def randomised(model):
    """Offsets that point between cells, and tables of positions and norms that do something."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "offset" in name:
            nn.init.normal_(value, std=1.5 if value.dim() == 1 else 0.05)
        elif "rel_pos" in name or "relative_position_bias" in name:
            nn.init.normal_(value)
        elif name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 2)
    return model


class Networks(nn.Module):
    """Several networks without heads, which reads a padded image as a detector's does."""

    nms_inside = False

    def __init__(self, *networks):
        super().__init__()
        self.backbone = nn.ModuleList(networks)
        self.output_names = [f"map{i}" for i in range(4 * len(networks))]

    def forward(self, image):
        below, right = ((side + 31) // 32 * 32 - side for side in image.shape[-2:])
        seen = F.pad(image / 64 - 2, (0, right, 0, below))
        return tuple(x for net in self.backbone for x in net(seen).values())


def test_maps_are_the_networks_at_every_size(tmp_path):
    pytest.importorskip("timm")
    networks = Networks(
        stages_of(DeformBottleneckBlock, deform_num_groups=2),
        stages_of(
            partial(resnext_block, block=DeformBottleneckBlock),
            num_groups=4,
            width_per_group=16,
            deform_modulated=True,
        ),
        TimmBackbone(name="test_resnet"),
        TimmBackbone(name="test_convnext"),
    )
    networks = randomised(networks).eval()
    assert sum(isinstance(x, DeformConv) for x in networks.modules()) == 8
    export_file(networks, {}, tmp_path / "maps.onnx", opset=19)
    session = onnxruntime.InferenceSession(tmp_path / "maps.onnx")
    for shape in ((1, 3, 97, 64), (3, 3, 130, 75)):
        image = torch.rand(shape) * 255
        with torch.no_grad():
            wanted = networks(image)
        assert len({float(x.std()) for x in wanted}) == 16
        found = session.run(networks.output_names, {"image": image.numpy()})
        for one, other in zip(wanted, found, strict=True):
            reach = float(one.abs().max())
            torch.testing.assert_close(torch.from_numpy(other), one, rtol=0, atol=1e-5 * reach)


def exported(model, file, **options):
    """The graph of a model, and its file as it is run."""
    graph = exportable(model, nms_inside=False)
    described = describe(
        model,
        recipe="a",
        classes=CLASSES,
        augmentations=[],
        nms_inside=False,
        fixed_size=options.get("fixed_size"),
    )
    export_file(graph, described, file, **options)
    return graph, ExportedDetector(file)


def agree(graph, detector, images):
    """Whether the graph, which then suppresses itself, and its file find the same, and enough."""
    graph.nms_inside = True
    with torch.no_grad():
        chosen = graph(images)
    for index, found in enumerate(detector.run(images.numpy())):
        wanted = Detections(*(x[index][: chosen[3][index]].numpy() for x in chosen[:3]))
        apart = deviation(wanted, found, limit=detector.description["selection"])
        assert apart.detections > 3
        assert apart.accepted, apart


def test_a_detector_on_a_deformable_res2net(tmp_path):
    cfg = tiny(get_config("fcos_R_18_FPN_bccd"))
    cfg.model.backbone.bottom_up = L(stages_of)(block=DeformRes2NetBlock, stem=DeepStem)
    model = randomised(excite(instantiate(cfg.model), 0.7)).eval()
    graph, detector = exported(model, tmp_path / "model.onnx", opset=19)
    for size in ((70, 101), (200, 130)):
        agree(graph, detector, torch.rand(2, 3, *size) * 255)


class Windowed(Backbone):
    """Counts windows in Python, as Detectron2's ViT does: traced, their number is fixed."""

    size_divisibility = 32

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        return {"p3": x[..., : self.count(x.shape[-1])]}

    def output_shape(self):
        return {"p3": ShapeSpec(channels=3, stride=8)}


class Pyramid(nn.Module):
    """As much of a detector as is traced."""

    nms_inside = False

    def __init__(self, count):
        super().__init__()
        self.backbone = Windowed(count)

    def forward(self, image):
        return self.backbone(image)["p3"]


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (lambda width: int(width) // 32, 3),  # refused by PyTorch
        (lambda width: 7 if width // 32 == 14 else 5, 5),  # traced with 450 pixels
    ],
    ids=["number", "branch"],
)
def test_a_network_that_is_traced_for_one_size_needs_it(count, wanted):
    with pytest.raises(ExportError, match=r"^Windowed, or .*wrong for others.*--size H W"):
        traced(Pyramid(count), guarded=False)
    program = traced(Pyramid(count), fixed_size=(64, 96))
    assert program.module()(torch.zeros(1, 3, 64, 96)).shape[-1] == wanted


def detector_on(network):
    """FCOS or GFL on a small network of a newer Detectron2."""
    part = f"{configs_root()}/common/models/backbones.py"
    cfg = tiny(get_config("fcos_R_50_FPN_1x"))
    if network == "vit":
        LazyConfig.load(part, "vitdet_base")(cfg.model)
        cfg.model.backbone.net = L(vit)(**VIT)
    else:
        make, options, channels = {"swin": (swin, SWIN, 12), "mvit": (mvit, MVIT, 8)}[network]
        LazyConfig.load(part, "put_under")(cfg.model, L(make)(**options), channels)
    return randomised(excite(instantiate(cfg.model), 0.7)).eval()


@needs_newer
@pytest.mark.parametrize("network", ["mvit", "swin", "vit"])
def test_transformers_of_detectron2_are_exported_for_one_size(network, tmp_path):
    model = detector_on(network)
    graph, detector = exported(model, tmp_path / "model.onnx", fixed_size=(70, 101))
    agree(graph, detector, torch.rand(1, 3, 70, 101) * 255)


@needs_newer
@pytest.mark.parametrize(("network", "name"), [("mvit", "MViT"), ("vit", "ViT")])
def test_transformers_of_detectron2_need_a_size(network, name, tmp_path):
    with pytest.raises(ExportError, match=rf"^{name}, or .*wrong for others .*--size H W"):
        exported(detector_on(network), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
