# SPDX-License-Identifier: Apache-2.0
"""The branches: how many parameters, how they begin, and what the batch norms of one may see."""

import math
from typing import Any

import pytest
import torch
from decoupled_rcnn_parts import (
    CHANNELS,
    WIDTH,
    K,
    box_branches,
    fc_head,
    features_of,
    heads_of,
    near,
    proposals_of,
    scene,
    targets_of,
)
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from util import loss_sum, without_gradient

from d2_decouple.config import configs_root, get_config
from d2_decouple.layers.boxes import BoxTransform
from d2_decouple.modeling import (
    BoxBranch,
    ClassBranch,
    ConvBoxBranch,
    ConvHead,
    DecoupledProposals,
    FCHead,
    SharedBoxBranch,
)
from d2_decouple.modeling.regions import pool_regions
from d2_decouple.modeling.roi_branches import class_change

IDENTITY = BoxTransform()
TRUNK = 13_895_680  # two layers of 1024 on 7x7x256


def parameters_of(*parts: nn.Module) -> int:
    return sum(x.numel() for part in parts for x in part.parameters())


def full(kind: str, classes: int, stages: int) -> list[nn.Module]:
    """The branches in the paper's size, without memory."""
    with torch.device("meta"):
        head = FCHead(in_channels=256)
        parts: list[nn.Module] = [ClassBranch(head=head, num_classes=classes)]
        for stage in range(stages):
            options: Any = {"transform": IDENTITY, "num_classes": None if stage else classes}
            if kind == "shared":
                parts.append(SharedBoxBranch(in_features=1024, **options))
            elif kind == "double":
                parts.append(ConvBoxBranch(head=ConvHead(in_channels=256), **options))
            else:
                parts.append(BoxBranch(head=FCHead(in_channels=256), **options))
    return parts


COUNTS = [  # fact sheet, 2.6
    ("shared", 80, 1, 14_306_705),
    ("shared", 20, 1, 13_999_205),
    ("fc", 80, 1, 28_202_385),
    ("fc", 20, 1, 27_894_885),
    ("fc", 80, 3, 56_001_945),
    ("fc", 20, 3, 55_694_445),
    ("double", 80, 1, 19_894_161),
    ("double", 80, 3, 31_077_273),
]


@pytest.mark.parametrize(("kind", "classes", "stages", "wanted"), COUNTS)
def test_numbers_of_parameters(kind: str, classes: int, stages: int, wanted: int) -> None:
    assert parameters_of(*full(kind, classes, stages)) == wanted


def test_the_recipe_has_these_branches() -> None:
    model = get_config(configs_root() / "common" / "models" / "decoupled_rcnn.py").model
    with torch.device("meta"):
        heads = instantiate(model).roi_heads
    assert parameters_of(heads) == 56_001_945
    assert parameters_of(heads.class_branch.head) == TRUNK
    assert [parameters_of(x.head) for x in heads.box_branches] == [TRUNK] * 3


def test_weights_begin_as_the_authors() -> None:
    """Layers of the trunk uniform within sqrt(6 / (inputs + outputs)), last ones normal."""
    head = FCHead(in_channels=64, fc_dims=[64, 64])
    for layer, inputs in ((head.fc1, 64 * 49), (head.fc2, 64)):
        bound = math.sqrt(6 / (inputs + 64))
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    conv = ConvHead(in_channels=8, out_channels=64, num_convs=1)
    options: Any = {"transform": IDENTITY, "num_classes": 100}
    for layer, std in (
        (ClassBranch(head=head, num_classes=100).cls_score, 0.01),
        (BoxBranch(head=head, **options).bbox_pred, 0.001),
        (SharedBoxBranch(in_features=64, **options).bbox_pred, 0.001),
        (ConvBoxBranch(head=conv, **options).bbox_pred, 0.01),
        (BoxBranch(head=head, std=0.5, **options).bbox_pred, 0.5),
    ):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert layer.bias.eq(0).all()
    for layer in (head.fc1, head.fc2):
        assert layer.bias.eq(0).all()


def test_class_branch_tells_what_it_has_read() -> None:
    branch, pooled = ClassBranch(head=fc_head(), num_classes=K), torch.randn(5, CHANNELS, 7, 7)
    logits, hidden = branch(pooled)
    assert (logits.shape, hidden.shape) == ((5, K + 1), (5, WIDTH))
    assert torch.equal(branch.cls_score(hidden), logits)
    assert torch.equal(branch.head(pooled), hidden)


def test_shared_branch_reads_the_class_branchs_layers_alone() -> None:
    branch = SharedBoxBranch(in_features=WIDTH, transform=IDENTITY, num_classes=K)
    hidden = torch.randn(5, WIDTH)
    nothing = torch.full((5, CHANNELS, 7, 7), torch.nan)
    assert torch.equal(branch(nothing, hidden), branch.bbox_pred(hidden))


def test_change_of_a_class() -> None:
    """Class c has the columns 4 c to 4 c + 3."""
    deltas = torch.arange(24.0).view(2, 12)
    found = class_change(deltas, torch.tensor([2, 0]))
    assert found.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    one_for_all = torch.randn(2, 4)
    assert class_change(one_for_all, torch.tensor([2, 0])) is one_for_all
    assert class_change(deltas[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


BAD: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "a head without a shape": (
        lambda: ClassBranch(head=nn.Linear(3, 3), num_classes=K),
        TypeError,
        ["output_shape.channels", "FCHead", "got Linear"],
    ),
    "a box head without a shape": (
        lambda: BoxBranch(head=nn.Flatten(), transform=IDENTITY),
        TypeError,
        ["output_shape.channels", "FCHead", "got Flatten"],
    ),
    "weights for a transform": (
        lambda: SharedBoxBranch(in_features=4, transform=(10, 10, 5, 5)),  # type: ignore[arg-type]
        TypeError,
        ["transform", "BoxTransform", "got (10, 10, 5, 5)"],
    ),
    "regions of no size": (
        lambda: ConvBoxBranch(head=fc_head(), transform=IDENTITY, roi_scale=0.0),
        ValueError,
        ["roi_scale", "is 0.0", "such as 1.3"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    build, error, named = BAD[case]
    with pytest.raises(error) as raised:
        build()
    assert all(part in str(raised.value) for part in named), raised.value


# Double-Head's convolutions.


class Rows:
    """How many regions each call of some modules got."""

    def __init__(self, *modules: nn.Module) -> None:
        self.counts: list[list[int]] = [[] for _ in modules]
        for module, counts in zip(modules, self.counts, strict=True):
            module.register_forward_pre_hook(lambda _, inputs, x=counts: x.append(len(inputs[0])))


def conv_heads(stages: int = 3) -> Any:
    return heads_of(box_branches(stages, kind="conv"))


def test_convolutions_by_hand() -> None:
    """One channel, one cell, no norm: widened x -> relu(w2 relu(w1 x) + w3 x), then a bottleneck
    y -> relu(y + w6 relu(w5 relu(w4 y))).
    """
    head = ConvHead(in_channels=1, out_channels=4, num_convs=1, norm="")
    for weights in (x.weight for x in head.modules() if isinstance(x, nn.Conv2d)):
        nn.init.constant_(weights, 0.5)
    for biases in (x.bias for x in head.modules() if isinstance(x, nn.Conv2d)):
        nn.init.zeros_(biases)
    # x = 2: 0.5 * 0.5 * 2 + 0.5 * 2 = 1.5 in each of 4; inner: 0.5 * 4 * 1.5 = 3, 1.5, 0.75 more.
    found = head(torch.full((1, 1, 1, 1), 2.0))
    torch.testing.assert_close(found, torch.full((1, 4), 2.25))
    # x = -2: relu(w1 x) is zero, and so is relu(-1).
    assert head(torch.full((1, 1, 1, 1), -2.0)).tolist() == [[0, 0, 0, 0]]
    assert head(torch.rand(3, 1, 7, 7)).shape == (3, 4)
    assert head.output_shape.channels == 4


def test_norms_see_every_sampled_region() -> None:
    """At first the class branch's 64 + 64 and the box branch's 64 + 64, later the latter alone."""
    heads, (proposals, targets) = conv_heads(), scene()
    crowd = [
        proposals_of(torch.cat((x.proposal_boxes.tensor, near([[5.0, 5, 20, 20]], 60))))
        for x in proposals
    ]
    proposals = DecoupledProposals(crowd, crowd)
    rows = Rows(*(branch.head for branch in heads.box_branches))
    with EventStorage():
        heads(None, features_of(), proposals, targets)
    assert rows.counts == [[256], [128], [128]]
    fc = heads_of()
    rows = Rows(*(branch.head for branch in fc.box_branches))
    with EventStorage():
        fc(None, features_of(), proposals, targets)
    assert all(0 < counts[0] < 50 for counts in rows.counts)  # positives alone
    assert all(len(counts) == 1 for counts in rows.counts)


def test_only_positives_are_learned_from() -> None:
    """Gradients by deltas of every region that went through: zero but for positives."""
    heads, (proposals, targets) = conv_heads(), scene()
    seen: list[Tensor] = []
    for branch in heads.box_branches:
        branch.bbox_pred.register_forward_hook(
            lambda _, inputs, output: (output.retain_grad(), seen.append(output))[0]
        )
    with EventStorage() as storage:
        _, losses = heads(None, features_of(), proposals, targets)
        counts = [storage.latest()[f"roi_head/num_positives_stage{k}"][0] * 2 for k in range(3)]
    loss_sum(losses).backward()
    learning = [int((x.grad != 0).any(-1).sum()) for x in seen]  # type: ignore[union-attr]
    assert learning == counts
    assert all(0 < count < len(x) for count, x in zip(learning, seen, strict=True))
    positives = seen[0].grad.ne(0).any(-1).nonzero()[:, 0]  # type: ignore[union-attr]
    # Of the class branch's regions, which come first, none.
    assert positives.min() >= len(seen[0]) - len(seen[1])


def test_regions_are_enlarged_in_training_and_at_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pooled for the class branch is not what the convolutions get."""
    scales: list[float] = []

    def spied(pooler: Any, maps: Any, regions: Any, scale: float = 1.0) -> Tensor:
        scales.append(scale)
        return pool_regions(pooler, maps, regions, scale)

    for module in ("regions", "decoupled_rcnn"):
        monkeypatch.setattr(f"d2_decouple.modeling.{module}.pool_regions", spied)
    for training in (True, False):
        heads, (proposals, targets) = conv_heads(1).train(training), scene()
        with EventStorage():
            heads(None, features_of(), proposals if training else list(proposals), targets)
        assert scales == [1.0, 1.3]
        scales.clear()


def test_norms_without_regions() -> None:
    """Their statistics stay: a mean of nothing would be NaN for ever."""
    heads = conv_heads()
    before = {name: value.clone() for name, value in heads.named_buffers()}
    none = [proposals_of([]) for _ in range(2)]
    with EventStorage():
        _, losses = heads(
            None, features_of(), DecoupledProposals(none, none), targets_of([([], [])] * 2)
        )
    assert loss_sum(losses) == 0
    loss_sum(losses).backward()
    assert without_gradient(heads) == []
    changed = {
        name for name, value in heads.named_buffers() if not torch.equal(value, before[name])
    }
    assert all(name.endswith("num_batches_tracked") for name in changed)
    assert all(len(found) == 0 for found in heads.eval()(None, features_of(), none)[0])
