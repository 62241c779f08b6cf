# SPDX-License-Identifier: Apache-2.0
"""What becomes of each command of the documents: run, run shortened, or left to somebody else.

A command is never changed. Options and ``key=value`` are added at its end, or behind the option
that they outweigh, since the last one counts; :data:`ADDED` has them by a short name. What is run
by nobody here has a reason.
"""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

__all__ = [
    "ADDED",
    "BY_CI",
    "BY_HAND",
    "BY_SUITE",
    "OF_OTHERS",
    "RUN",
    "Decision",
    "Need",
    "RunError",
    "UndecidedError",
    "decide",
    "needs",
    "without_comment",
]

RUN, BY_SUITE, BY_CI, BY_HAND, OF_OTHERS = "run", "by the suite", "by CI", "by hand", "not run"

_SIZES = "dataloader.{0}.mapper.augmentations.0.short_edge_length=64"
_SIZES += " dataloader.{0}.mapper.augmentations.0.max_size=96 dataloader.{0}.num_workers=0"
ADDED = {
    "training": "train.max_iter=2 dataloader.train.total_batch_size=2 " + _SIZES.format("train"),
    "test": _SIZES.format("test"),
    "yacs training": "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0 "
    "INPUT.MIN_SIZE_TRAIN '(64,)' INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 "
    "INPUT.MAX_SIZE_TEST 96",
    "random weights": "train.init_checkpoint=",
    "one process on the CPU in the place of N GPUs": "--num-gpus 1",
    "two processes on the CPU": "--nproc-per-node 2",
    "two nodes on this machine": "--nproc-per-node 1 --master-addr 127.0.0.1",
    "this machine in the place of a cluster": "--executor local --nodes 1 --gpus-per-node 0",
    "small images": "dataloader.test.mapper.augmentations.0.short_edge_length=64 "
    "dataloader.test.mapper.augmentations.0.max_size=96",
    "few images": "--limit 4 --draws 20 --repeats 1",
    "one iteration of one row": "--iterations 1 --threads 1 --only salt_R_18_FPN_bccd",
    "one kill": "--kills 1",
    "one second": "--minutes 0.02",
}
"""Short name -> what is added to a command."""

_LEFT: dict[str, tuple[str, str]] = {
    r"(git|pip|pre-commit|mkdocs|sudo|sbatch|scancel|srun) ": (
        OF_OTHERS,
        "another program, which needs the network or another machine",
    ),
    r"make (setup|test|lint|docs)\b|\.ci/run": (BY_CI, "`.ci/run` is this, or begins with it"),
    r"python tools/install_detectron2\.py": (BY_CI, "changes the environment; `.ci/run` does it"),
    r"make \w": (BY_HAND, "makes an environment first: 2 GB from the network"),
    r"python tools/sanitize\.py": (BY_HAND, "compiles for minutes, and cannot be shortened"),
    r"python tools/compatibility\.py \w": (BY_HAND, "an environment of 6 GB, and the whole suite"),
    r"python tools/soak\.py": (BY_HAND, "a short run cannot tell growth from noise"),
    r"python -m d2_decouple\.zoo train": (BY_HAND, "800 iterations, and cannot be shortened"),
    r"python tools/run_documents\.py": (BY_HAND, "this tool"),
}
# Beginning of a command -> short names of what is added to its end; the first that fits.
_SHORTENED: dict[str, tuple[str, ...]] = {
    r"python -m d2_decouple\.(zoo|data\.checks|config|collect_env)\b": (),
    r"python tools/(convert_checkpoint|gallery|demo)\.py": (),
    r"python -m d2_decouple\.demo": (),
    r"python tools/compatibility\.py --write": (),
    r"python tools/fuzz\.py --cases": (),
    r"python tools/fuzz\.py --minutes": ("one second",),
    r"python tools/faults\.py --kills": ("one kill",),
    r"python tools/bccd_table\.py": ("one iteration of one row",),
    r"python -m d2_decouple\.analyze": ("few images",),
    r"python -m d2_decouple\.export": ("small images",),
}
_TRAINS = r"python (-m d2_decouple\.train|tools/train_net\.py) "
_LOOKS = {
    "--show-stages": "decoupled_rcnn_R_18_FPN_bccd",
    "--show-context": "tscode_fcos_R_18_FPN_bccd",
    "--show-points": "pdnet_R_18_FPN_bccd",
}
_HOSTED = {"tscode": "tscode_fcos"}


class RunError(RuntimeError):
    """Something that prevents the whole run; the message says what to type."""


class UndecidedError(RunError):
    """A command of the documents that no rule knows."""


class Decision(NamedTuple):
    """What becomes of a command.

    Attributes:
        how: RUN, BY_SUITE, BY_CI, BY_HAND or OF_OTHERS.
        command: what is run; "" where it is not.
        added: keys of ADDED.
        reason: why it is not run.
        beside: a second command that must run at the same time, or "".
    """

    how: str
    command: str = ""
    added: tuple[str, ...] = ()
    reason: str = ""
    beside: str = ""


class Need(NamedTuple):
    """A file with weights that a command reads.

    Attributes:
        file: as the command names it.
        recipe: whose weights they are; of an authors' file, the converter's name.
        official: in the format of the authors' code.
    """

    file: str
    recipe: str
    official: bool = False


def without_comment(line: str) -> str:
    """A line of a bash block without what stands behind ``#``."""
    return re.sub(r"(^|\s)#\s.*", "", line).strip()


def decide(document: str, line: str) -> Decision:
    """What becomes of a line of a document's bash block.

    Raises:
        UndecidedError: no rule knows it.
    """
    if document.startswith("docs/tutorials/"):
        return Decision(BY_SUITE, reason="`tests/test_tutorials.py` runs the page")
    command = without_comment(line)
    simple = re.sub(r"^([A-Z][A-Z0-9_]*=\S* )+", "", command)
    for start, (how, reason) in _LEFT.items():
        if re.match(start, simple):
            return Decision(how, reason=reason)
    if re.search(r" (&&|\|\||;|\||&)( |$)", simple):
        raise UndecidedError(f"{document}: several commands in one line, write one each: {line}")
    for start, names in _SHORTENED.items():
        if re.match(start, simple):
            return _extended(command, names)
    if re.match(_TRAINS, simple):
        return _training(command)
    if simple.startswith("torchrun "):
        return _by_torchrun(command)
    if simple.startswith("python tools/slurm_train.py "):
        if "--dry-run" in simple:
            return Decision(RUN, command)
        return _extended(command, ("this machine in the place of a cluster", *_short(command)))
    raise UndecidedError(
        f"{document}: no rule for {line!r}; say in tools/document_commands.py what is added to run "
        "it quickly (_SHORTENED), or who runs it instead and why (_LEFT)"
    )


def _extended(command: str, names: tuple[str, ...]) -> Decision:
    return Decision(RUN, " ".join([command, *(ADDED[name] for name in names)]), names)


def _short(command: str) -> tuple[str, ...]:
    """What shortens a training, or an evaluation."""
    if ".yaml" in command:
        return ("yacs training",)
    if "--eval-only" in command:
        return ("test",)
    names = ["training", "test"]
    small = re.search(r"--config-file \w+_bccd\b", command)
    if not small and ("--method" not in command or "--size" in command):
        names.append("random weights")
    return tuple(names)


def _training(command: str) -> Decision:
    decision = _extended(command, _short(command))
    one = "one process on the CPU in the place of N GPUs"
    extended, found = re.subn(r"(--num-gpus \d+)", rf"\1 {ADDED[one]}", decision.command)
    return decision._replace(command=extended, added=(one, *decision.added)) if found else decision


def _by_torchrun(command: str) -> Decision:
    several = "--node-rank 0" in command
    name = "two nodes on this machine" if several else "two processes on the CPU"
    decision = _extended(command, _short(command))
    # Of torchrun, so in front of the module; of two, the last one counts.
    extended = decision.command.replace(" -m ", f" {ADDED[name]} -m ", 1)
    beside = extended.replace("--node-rank 0", "--node-rank 1") if several else ""
    return decision._replace(command=extended, added=(name, *decision.added), beside=beside)


def needs(document: str, line: str) -> list[Need]:
    """The files with weights that a line reads, in the order of the line."""
    command = without_comment(line)
    words = shlex.split(command)
    if "tools/convert_checkpoint.py" in words:
        method, file = [x for x in words[2:] if not x.startswith("--")][:2]
        back = "--back" in words
        return [Need(file, f"{method}_R_50_FPN_1x" if back else method, not back)]
    if "tools/gallery.py" in words:
        folder = words[words.index("--weights-dir") + 1]
        return [Need(f"{folder}/{x}_seed1_0/model_final.pth", x) for x in _gallery()]
    config = words[words.index("--config-file") + 1] if "--config-file" in words else ""
    found = []
    for index, word in enumerate(words):
        if word.startswith("train.init_checkpoint=") and "--eval-only" in words:
            found.append(Need(word.partition("=")[2], config))
        elif word == "--weights":
            recipe = _trained(document, command) if "/" in config else config
            found.append(Need(words[index + 1], recipe))
        elif word == "--model" and "d2_decouple.analyze" in words:
            recipe, file = words[index + 2 : index + 4]
            if "/" in recipe:  # a training's folder, named after the method
                method = file.split("/")[1]
                recipe = f"{_HOSTED.get(method, method)}_R_18_FPN_bccd"
            found.append(Need(file, recipe))
    return found


def _trained(document: str, command: str) -> str:
    """The recipe of which ``output`` holds a training, where a command names its config.yaml."""
    if document.startswith("projects/SALT/"):
        return "salt_R_18_FPN_bccd"
    looks = (recipe for look, recipe in _LOOKS.items() if look in command)
    return next(looks, "fcos_R_18_FPN_bccd")


def _gallery() -> list[str]:
    from d2_decouple.gallery_models import MODELS

    return [model.recipe for model in MODELS if model.trained]
