# SPDX-License-Identifier: Apache-2.0
"""Proposals at two densities: against Detectron2's RPN, by hand, and with bad input."""

from typing import Any

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor
from util import make_instances

from d2_decouple.layers.boxes import BoxTransform
from d2_decouple.modeling import DecoupledProposals, DecoupledRPN
from d2_decouple.modeling.decoupled_rpn import dense_proposals, suppress_levels

CHANNELS = 8
SIZES = [(120, 160), (101, 67)]  # of the images; they are padded to 128x160
STRIDES = [4, 8, 16, 32, 64]
NAMES = ["p2", "p3", "p4", "p5", "p6"]


def build(kind: type[RPN], transform: Any, levels: int = 5, **changes: Any) -> RPN:
    settings: dict[str, Any] = {
        "in_features": NAMES[:levels],
        "head": StandardRPNHead(in_channels=CHANNELS, num_anchors=3),
        "anchor_generator": DefaultAnchorGenerator(
            sizes=[[8 * stride] for stride in STRIDES[:levels]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=STRIDES[:levels],
            offset=0.0,
        ),
        "anchor_matcher": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        "box2box_transform": transform,
        "batch_size_per_image": 64,
        "positive_fraction": 0.5,
        "pre_nms_topk": (150, 90),
        "post_nms_topk": (80, 60),
        "nms_thresh": 0.7,
        **changes,
    }
    return kind(**settings)


def rpn_of(**changes: Any) -> DecoupledRPN:
    """Outputs differ between cells: logits by about 1, boxes by about a tenth of their sides."""
    rpn = build(DecoupledRPN, BoxTransform(), **{"post_nms_topk_reg": 120, **changes})
    assert isinstance(rpn, DecoupledRPN)
    for layer, std in ((rpn.rpn_head.objectness_logits, 0.5), (rpn.rpn_head.anchor_deltas, 0.05)):
        torch.nn.init.normal_(layer.weight, std=std)
    torch.nn.init.kaiming_normal_(rpn.rpn_head.conv.weight)
    return rpn


def detectron2s(ours: DecoupledRPN) -> RPN:
    limits = {
        name: (getattr(ours, name)[True], getattr(ours, name)[False])
        for name in ("pre_nms_topk", "post_nms_topk")
    }
    theirs = build(RPN, Box2BoxTransform((1.0, 1.0, 1.0, 1.0)), **limits)
    theirs.load_state_dict(ours.state_dict())
    return theirs.train(ours.training)


def features_of() -> dict[str, Tensor]:
    return {
        name: torch.randn(2, CHANNELS, -(-128 // stride), -(-160 // stride))
        for name, stride in zip(NAMES, STRIDES, strict=True)
    }


def images_of() -> ImageList:
    return ImageList(torch.zeros(2, 3, 128, 160), SIZES)


def targets_of() -> list[Instances]:
    first = make_instances(SIZES[0], [[10.0, 10, 60, 50], [80, 20, 150, 110]], [0, 2])
    return [first, make_instances(SIZES[1], [], [])]


def propose(rpn: RPN, features: dict[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(7)  # of the sample of anchors
    with EventStorage():
        return rpn(images_of(), features_of() if features is None else features, targets_of())


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        assert got.image_size == want.image_size
        assert len(got) == len(want) > 0
        assert torch.equal(got.objectness_logits, want.objectness_logits)
        torch.testing.assert_close(
            got.proposal_boxes.tensor, want.proposal_boxes.tensor, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("limits", [(80, 60), (999, 999)])
def test_equals_detectron2s_rpn(limits: tuple[int, int], training: bool) -> None:
    """Its candidates are decoded before the best are chosen, ours after: these are the same. In
    training that is the class branch's set; losses are the same, whatever the second threshold.
    """
    ours = rpn_of(post_nms_topk=limits).train(training)
    theirs = detectron2s(ours)
    features = features_of()
    found, losses = propose(ours, features)
    expected, their_losses = propose(theirs, features)
    assert_same(found, expected)
    limit = ours.post_nms_topk[training]
    assert all(len(x) == limit or limit == 999 for x in found)
    assert losses.keys() == their_losses.keys()
    assert len(losses) == (2 if training else 0)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, their_losses[name])


def test_choice_and_suppression_both_drop_some() -> None:
    """What the test above needs."""
    counts = []
    for topk, threshold in ((150, 0.7), (150, 1.0), (99_999, 1.0)):
        limits = {"pre_nms_topk": (topk, topk), "post_nms_topk": (99_999, 99_999)}
        found, _ = propose(rpn_of(nms_thresh=threshold, **limits).eval())
        counts.append(min(len(x) for x in found))
    assert counts[0] + 30 < counts[1] < counts[2] - 30


def test_evaluation_has_one_set() -> None:
    found, losses = propose(rpn_of().eval())
    assert type(found) is list
    assert losses == {}


def test_same_threshold_and_limit_give_the_same_set_twice() -> None:
    found, _ = propose(rpn_of(nms_thresh_reg=0.7, post_nms_topk_reg=80))
    assert isinstance(found, DecoupledProposals)
    assert found.reg is not found
    for first, second in zip(found, found.reg, strict=True):
        assert torch.equal(first.proposal_boxes.tensor, second.proposal_boxes.tensor)
        assert torch.equal(first.objectness_logits, second.objectness_logits)


def test_the_second_set_is_denser() -> None:
    """No pair of a level overlaps more than its threshold, and some of the second more than the
    first's. All of them lie in their image, best first, without gradient.
    """
    rpn = rpn_of(levels=1, pre_nms_topk=(400, 90))
    found, _ = propose(rpn)
    largest = []
    for kind, limit in ((found, 80), (found.reg, 120)):
        overlaps = []
        for proposals, (height, width) in zip(kind, SIZES, strict=True):
            assert 20 < len(proposals) <= limit
            boxes = proposals.proposal_boxes
            inside = boxes.tensor <= torch.tensor([width, height]).repeat(2)
            assert (inside & (boxes.tensor >= 0)).all()
            assert boxes.nonempty().all()
            logits = proposals.objectness_logits
            assert not logits.requires_grad
            assert torch.equal(logits, logits.sort(descending=True)[0])
            overlaps.append(pairwise_iou(boxes, boxes).fill_diagonal_(0).max().item())
        largest.append(max(overlaps))
    assert largest[0] <= 0.7
    assert 0.7 < largest[1] <= 0.85


def test_neither_set_contains_the_other() -> None:
    """Three boxes of height 10, best first: from 0 to 100, 20 to 110, 30 to 120. The second
    overlaps the first by 80 of 110, 0.727, and the third by 80 of 100, 0.8; first and third have
    70 of 120 in common, 0.583. At 0.7 the second is dropped, so the third stays; at 0.75 the
    second stays and drops the third.
    """
    boxes = torch.tensor([[low, 0.0, high, 10.0] for low, high in ((0, 100), (20, 110), (30, 120))])
    scores = torch.tensor([3.0, 2.0, 1.0])
    assert suppress_levels(scores, [boxes], 0.7).tolist() == [0, 2]
    assert suppress_levels(scores, [boxes], 0.75).tolist() == [0, 1]


def test_levels_do_not_suppress_each_other() -> None:
    """The same box on two levels stays twice; the best of all levels come first."""
    box = torch.tensor([[0.0, 0, 9, 9]])
    other = torch.tensor([[20.0, 0, 29, 9]])
    levels = [torch.cat((box, box)), box[:0], torch.cat((other, box))]
    scores = torch.tensor([0.5, 0.9, 0.7, 0.6])
    assert suppress_levels(scores, levels, 0.7).tolist() == [1, 2, 3]
    assert suppress_levels(scores[:0], [box[:0]] * 2, 0.7).tolist() == []


def test_overlap_of_the_threshold_itself_stays() -> None:
    """10x10 and 10x5 in it: 0.5 exactly."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5]])
    assert suppress_levels(torch.tensor([2.0, 1.0]), [boxes], 0.5).tolist() == [0, 1]
    assert suppress_levels(torch.tensor([2.0, 1.0]), [boxes], 0.49).tolist() == [0]


class Given:
    """Candidates of one image from outputs that are written down, on one level."""

    def __init__(self, **changes: Any) -> None:
        self.rpn = rpn_of(**changes)
        self.anchors = [
            Boxes(torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 40, 10], [0.0, 50, 9, 59]]))
        ]
        self.logits = torch.tensor([[1.0, 3.0, 2.0]])
        self.deltas = torch.zeros(1, 3, 4)

    def propose(self, *, training: bool, size: tuple[int, int] = (80, 80)) -> Any:
        self.rpn.train(training)
        return self.rpn.predict_proposals(self.anchors, [self.logits], [self.deltas], [size])


def test_boxes_are_cut_and_small_ones_left_out() -> None:
    """The second is moved half its 20 pixels to the right; the third lies below the image."""
    given = Given()
    given.deltas[0, 1, 0] = 0.5
    (found,) = given.propose(training=False, size=(40, 35))
    assert found.proposal_boxes.tensor.tolist() == [[30, 0, 35, 10], [0, 0, 10, 10]]
    assert found.objectness_logits.tolist() == [3, 1]
    given.rpn.min_box_size = 5.0  # a side of 5 is not above it
    (found,) = given.propose(training=False, size=(40, 35))
    assert found.objectness_logits.tolist() == [1]
    (found,) = given.propose(training=False, size=(0, 0))
    assert len(found) == 0
    assert [len(x) for x in given.propose(training=True, size=(0, 0)).reg] == [0]


def test_bfloat16_outputs_are_decoded_in_float32() -> None:
    """An anchor at 2000 pixels: coordinates of bfloat16 are 8 pixels apart there."""
    given = Given()
    given.anchors = [Boxes(torch.tensor([[2001.0, 0, 2012, 10]] * 3))]
    given.logits, given.deltas = given.logits.bfloat16(), given.deltas.bfloat16()
    (found,) = given.propose(training=False, size=(3000, 3000))
    assert found.proposal_boxes.tensor.tolist() == [[2001, 0, 2012, 10]]
    assert found.objectness_logits.dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["logits", "deltas"])
def test_outputs_that_are_no_numbers(part: str, bad: float) -> None:
    """Training stops and says where; a test goes on without them, as Detectron2's does."""
    given = Given()
    getattr(given, part)[0, 1] = bad
    message = r"RPN predicts NaN or infinity for 1 proposals of level 0.*max_grad_norm=10"
    with pytest.raises(FloatingPointError, match=message):
        given.propose(training=True)
    (found,) = given.propose(training=False)
    assert found.objectness_logits.tolist() == [2, 1]


def test_diverged_weights_stop_the_training() -> None:
    rpn = rpn_of()
    rpn.rpn_head.anchor_deltas.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="150 proposals of level 0"):
        propose(rpn)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no overlap": ({"nms_thresh_reg": 0.0}, ["nms_thresh_reg", "is 0.0", "0.85"]),
    "overlap above one": ({"nms_thresh_reg": 1.01}, ["nms_thresh_reg", "is 1.01", "at most 1"]),
    "not a number": ({"nms_thresh_reg": float("nan")}, ["nms_thresh_reg", "is nan", "0.85"]),
    "the other overlap": ({"nms_thresh": -0.1}, ["nms_thresh ", "is -0.1", "0.7"]),
    "none kept": ({"post_nms_topk_reg": 0}, ["post_nms_topk_reg", "is 0", "such as 1000"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    settings, named = BAD[case]
    with pytest.raises(ValueError, match="wanted is") as raised:
        rpn_of(**settings)
    message = str(raised.value)
    assert "proposal_generator." in message
    assert all(part in message for part in named), message


def test_each_set_has_its_own_limit() -> None:
    given = Given(nms_thresh=1.0, nms_thresh_reg=1.0, post_nms_topk=(1, 3), post_nms_topk_reg=2)
    found = given.propose(training=True)
    assert ([len(x) for x in found], [len(x) for x in found.reg]) == ([1], [2])
    assert found.reg[0].objectness_logits.tolist() == [3, 2]
    assert [len(x) for x in given.propose(training=False)] == [3]


def test_an_overlap_of_one_keeps_everything() -> None:
    given = Given(nms_thresh_reg=1.0)
    given.anchors = [Boxes(torch.tensor([[0.0, 0, 10, 10]] * 3))]
    found = given.propose(training=True)
    assert ([len(x) for x in found], [len(x) for x in found.reg]) == ([1], [3])


def test_proposals_of_one_density_are_refused() -> None:
    """A list, one for fewer images, and what a slice of the right kind is."""
    right, _ = propose(rpn_of())
    assert dense_proposals(right) is right.reg
    for wrong in (list(right), right[:1], DecoupledProposals(right, right.reg[:1])):
        with pytest.raises(TypeError) as raised:
            dense_proposals(wrong)
        message = str(raised.value)
        for part in (f"got a {type(wrong).__name__} of {len(wrong)}", "precomputed", "slice"):
            assert part in message
        assert "model.proposal_generator=DecoupledRPN" in message
