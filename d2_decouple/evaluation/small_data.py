# SPDX-License-Identifier: Apache-2.0
"""The small-data experiment: its rows, what is the same in all of them, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ..config import ConfigError, get_config
from .bootstrap import ap_on_draws, match_images, paired_difference
from .runs import check_packed
from .truth import GroundTruth, ImageDetections, ImageId

__all__ = ["REQUIRED", "ROWS", "Row", "Run", "table"]

_COLUMNS = ("AP", "AP50", "AP75", "AP90")

REQUIRED: dict[str, Any] = {
    "train.max_iter": 800,
    "train.init_checkpoint": "",
    "train.accumulate": 1,
    "dataloader.train.dataset.names": "bccd_train",
    "dataloader.test.dataset.names": "bccd_test",
    "dataloader.train.total_batch_size": 4,
    "dataloader.train.mapper.augmentations[0].short_edge_length": 240,
    "dataloader.test.mapper.augmentations[0].short_edge_length": 240,
    "model.backbone.bottom_up.stages.depth": 18,
    "model.backbone.bottom_up.stages.norm": "BN",
    "model.backbone.bottom_up.freeze_at": 0,
    "model.backbone.out_channels": 64,
}
"""What is the same in every row, or its numbers could not be compared."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table.

    Attributes:
        recipe: its config.
        hosts: recipes of the rows that it is compared with.
        seeds: three for hosts and final models, one for others.
        weights: the recipe whose trained model it tests, if it is not trained itself; the two
            differ in ``model.selection`` alone, which a training never asks.
    """

    recipe: str
    hosts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    weights: str = ""


_SALT_HOSTS = ("gfl_R_18_FPN_bccd", "gflv2_R_18_FPN_bccd")

ROWS = (
    Row(recipe="retinanet_R_18_FPN_bccd_d2"),
    Row(recipe="fcos_R_18_FPN_bccd_d2"),
    Row(
        recipe="fcos_R_18_FPN_bccd",
        hosts=("retinanet_R_18_FPN_bccd_d2", "fcos_R_18_FPN_bccd_d2"),
    ),
    Row(recipe="pdnet_R_18_FPN_bccd_off", hosts=("fcos_R_18_FPN_bccd",)),
    *(
        Row(recipe=recipe, hosts=("fcos_R_18_FPN_bccd", "pdnet_R_18_FPN_bccd_off"))
        for recipe in ("pdnet_R_18_FPN_bccd_cls", "pdnet_R_18_FPN_bccd_box", "pdnet_R_18_FPN_bccd")
    ),
    Row(recipe="atss_R_18_FPN_bccd", hosts=("fcos_R_18_FPN_bccd",)),
    Row(recipe="gfl_R_18_FPN_bccd", hosts=("atss_R_18_FPN_bccd",)),
    *(
        Row(
            recipe=f"tscode_{host}_R_18_FPN_bccd{half}",
            hosts=(f"{host}_R_18_FPN_bccd",),
            seeds=(1,) if half else (1, 2, 3),
        )
        for host in ("fcos", "atss", "gfl")
        for half in ("_sce", "_dpe", "")
    ),
    Row(recipe="gflv2_R_18_FPN_bccd", hosts=("gfl_R_18_FPN_bccd",), seeds=(1,)),
    Row(recipe="salt_R_18_FPN_bccd_free", hosts=_SALT_HOSTS, seeds=(1,)),
    Row(recipe="salt_R_18_FPN_bccd_nosdr", hosts=_SALT_HOSTS, seeds=(1,)),
    Row(recipe="salt_R_18_FPN_bccd", hosts=(*_SALT_HOSTS, "salt_R_18_FPN_bccd_nosdr")),
    Row(
        recipe="salt_R_18_FPN_bccd_s1",
        hosts=("salt_R_18_FPN_bccd",),
        weights="salt_R_18_FPN_bccd",
    ),
    Row(recipe="salt_R_18_FPN_bccd_dpe", hosts=(*_SALT_HOSTS, "salt_R_18_FPN_bccd"), seeds=(1,)),
    Row(
        recipe="sapd_R_18_FPN_bccd_baseline",
        hosts=("retinanet_R_18_FPN_bccd_d2", "fcos_R_18_FPN_bccd"),
    ),
    Row(recipe="sapd_R_18_FPN_bccd_sw", hosts=("sapd_R_18_FPN_bccd_baseline",), seeds=(1,)),
    Row(
        recipe="sapd_R_18_FPN_bccd_nobfp",
        hosts=("sapd_R_18_FPN_bccd_baseline", "sapd_R_18_FPN_bccd_sw"),
        seeds=(1,),
    ),
    Row(
        recipe="sapd_R_18_FPN_bccd",
        hosts=("sapd_R_18_FPN_bccd_baseline", "sapd_R_18_FPN_bccd_nobfp"),
    ),
    Row(recipe="sapd_fcos_R_18_FPN_bccd", hosts=("fcos_R_18_FPN_bccd",), seeds=(1,)),
    Row(recipe="sapd_atss_R_18_FPN_bccd", hosts=("atss_R_18_FPN_bccd",), seeds=(1,)),
    Row(
        recipe="composed_dpe_pdnet_R_18_FPN_bccd",
        hosts=("pdnet_R_18_FPN_bccd", "tscode_fcos_R_18_FPN_bccd_dpe"),
        seeds=(1,),
    ),
    Row(
        recipe="composed_soft_dpe_pdnet_R_18_FPN_bccd",
        hosts=("composed_dpe_pdnet_R_18_FPN_bccd", "pdnet_R_18_FPN_bccd"),
        seeds=(1,),
    ),
    Row(
        recipe="composed_soft_salt_dpe_R_18_FPN_bccd",
        hosts=("salt_R_18_FPN_bccd_dpe", "salt_R_18_FPN_bccd"),
        seeds=(1,),
    ),
    Row(recipe="faster_rcnn_R_18_FPN_bccd_d2"),
    Row(recipe="cascade_rcnn_R_18_FPN_bccd_d2", hosts=("faster_rcnn_R_18_FPN_bccd_d2",)),
    Row(recipe="decoupled_rcnn_R_18_FPN_bccd_single", hosts=("faster_rcnn_R_18_FPN_bccd_d2",)),
    Row(
        recipe="decoupled_rcnn_R_18_FPN_bccd",
        hosts=(
            "faster_rcnn_R_18_FPN_bccd_d2",
            "cascade_rcnn_R_18_FPN_bccd_d2",
            "decoupled_rcnn_R_18_FPN_bccd_single",
        ),
    ),
    *(
        Row(
            recipe=f"composed_{host}_decoupled_rcnn_R_18_FPN_bccd",
            hosts=(f"{host}_R_18_FPN_bccd", "decoupled_rcnn_R_18_FPN_bccd"),
            seeds=(1,),
        )
        for host in ("fcos", "atss")
    ),
)


@dataclass(frozen=True)
class Run:
    """One training of a row."""

    recipe: str
    seed: int
    iterations: int | None = None  # None: as the experiment has it

    @property
    def name(self) -> str:
        """What its files are called."""
        length = "" if self.iterations is None else f"_{self.iterations}_iterations"
        return f"{self.recipe}_seed{self.seed}{length}"

    def overrides(self) -> list[str]:
        """What it changes in its recipe."""
        length = [] if self.iterations is None else [f"train.max_iter={self.iterations}"]
        return [f"train.seed={self.seed}", *length]

    def config(self) -> DictConfig:
        """Its config, checked against what all rows share.

        Raises:
            ConfigError: a value differs from the experiment's.
        """
        cfg = get_config(self.recipe, self.overrides())
        wrong = [
            f"{key} is {OmegaConf.select(cfg, key)!r}, wanted {wanted!r}"
            for key, wanted in REQUIRED.items()
            if OmegaConf.select(cfg, key) != wanted
            and (key != "train.max_iter" or self.iterations is None)
        ]
        if wrong:
            raise ConfigError(
                f"recipe {self.recipe} does not belong into this table: {'; '.join(wrong)}"
            )
        return cfg


def table(results: Mapping[Run, Mapping[str, Any]], truth: GroundTruth) -> str:
    """Markdown: a line for each row that has results, and below it what they were made with."""
    names = list(truth.class_names)
    header = ["row", "seeds", *_COLUMNS, *(f"AP {name}" for name in names), "minutes"]
    header += ["AP less the host's (95 %)"]
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 2) + ["---"])]
    drawn = {
        run: ap_on_draws(match_images(truth, _detections(run, item, truth)))
        for run, item in results.items()
    }
    for row in ROWS:
        mine = {run.seed: item for run, item in results.items() if run.recipe == row.recipe}
        if not mine:
            continue
        numbers = [_spread([item["metrics"][name] for item in mine.values()]) for name in _COLUMNS]
        numbers += [
            _mean([item["classes"][name]["AP"] for item in mine.values()]) for name in names
        ]
        minutes = [item["seconds"] / 60 for item in mine.values() if item["seconds"] is not None]
        compared = "<br>".join(_against(row.recipe, host, drawn) for host in row.hosts) or "–"
        seeds = ", ".join(str(seed) for seed in sorted(mine))
        lines.append(_line([f"`{row.recipe}`", seeds, *numbers, _mean(minutes), compared]))
    return "\n".join([*lines, "", _origin(results.values())])


def _detections(
    run: Run, result: Mapping[str, Any], truth: GroundTruth
) -> dict[ImageId, ImageDetections]:
    return check_packed(run.name, result["images"], truth, result["metrics"]["AP"])


def _against(recipe: str, host: str, drawn: Mapping[Run, np.ndarray]) -> str:
    pairs = [
        (drawn[run], drawn[Run(host, run.seed)])
        for run in drawn
        if run.recipe == recipe and Run(host, run.seed) in drawn
    ]
    if not pairs:
        return f"`{host}`: no paired seed yet"
    ours, theirs = zip(*pairs, strict=True)
    result = paired_difference(ours, theirs)
    difference, low, high = (f"{100 * value:+.1f}" for value in result)
    seeds = "1 seed" if len(pairs) == 1 else f"{len(pairs)} seeds"
    return f"{difference} ({low} to {high}; {seeds}) `{host}`"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f}" if values else "–"


def _spread(values: Sequence[float]) -> str:
    mean = _mean(values)
    return f"{mean} ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else mean


def _origin(results: Iterable[Mapping[str, Any]]) -> str:
    made = {
        (
            item["machine"]["gpu"] or item["machine"]["processor"],
            f"{item['machine']['threads']} threads",
            f"torch {item['machine']['torch']}",
            "commit "
            + (item["commit"]["id"] or "unknown")[:7]
            + (" with changes" if item["commit"]["dirty"] else ""),
        )
        for item in results
    }
    origins = "; ".join(", ".join(item) for item in sorted(made))
    return (
        "Mean of the seeds, lowest and highest in brackets. The last column is the difference on "
        "the same seeds, and the interval that holds 95 % of it when the 72 test images are drawn "
        f"anew, 1,000 times, with replacement. Made on: {origins}."
    )
