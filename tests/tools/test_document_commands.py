# SPDX-License-Identifier: Apache-2.0
"""Every command of the documents has a decision, and is only added to."""

from __future__ import annotations

import importlib
import shlex
import sys

import pytest
from helpers_of_tools import TOOLS
from test_docs_commands import EVERY

from d2_decouple.evaluation.small_data import ROWS

sys.path.append(str(TOOLS))
document_commands = importlib.import_module("document_commands")
ADDED, RUN = document_commands.ADDED, document_commands.RUN
Decision, Need = document_commands.Decision, document_commands.Need
UndecidedError = document_commands.UndecidedError
decide, needs = document_commands.decide, document_commands.needs

SMALL = "dataloader.{0}.mapper.augmentations.0.short_edge_length=64 "
SMALL += "dataloader.{0}.mapper.augmentations.0.max_size=96 dataloader.{0}.num_workers=0"
TEST = SMALL.format("test")
TRAINING = "train.max_iter=2 dataloader.train.total_batch_size=2 " + SMALL.format("train")
TRAIN = "python -m d2_decouple.train --config-file"


@pytest.mark.parametrize(("document", "line"), EVERY)
def test_every_command_has_a_decision_and_is_only_added_to(document: str, line: str) -> None:
    decision = decide(document, line)
    if decision.how != RUN:
        assert decision.reason
        assert not decision.command
        return
    left = shlex.split(decision.command)
    for word in shlex.split(line, comments=True):
        left.remove(word)
    added = [word for name in decision.added for word in shlex.split(ADDED[name])]
    assert sorted(left) == sorted(added)
    for need in needs(document, line):
        assert need.file.endswith(".pth")


def test_all_kinds_of_decisions_are_in_use() -> None:
    kinds = {decide(document, line).how for document, line in EVERY}
    assert kinds == {"run", "by the suite", "by CI", "by hand", "not run"}
    used = {name for document, line in EVERY for name in decide(document, line).added}
    assert used == set(ADDED)


@pytest.mark.parametrize(
    ("line", "command", "added"),
    [
        (
            f"{TRAIN} pdnet_R_50_FPN_1x --num-gpus 8",
            f"{TRAIN} pdnet_R_50_FPN_1x --num-gpus 8 --num-gpus 1 {TRAINING} {TEST} "
            "train.init_checkpoint=",
            ("one process on the CPU in the place of N GPUs", "training", "test", "random weights"),
        ),
        (
            f"{TRAIN} pdnet_R_18_FPN_bccd  # note",
            f"{TRAIN} pdnet_R_18_FPN_bccd {TRAINING} {TEST}",
            ("training", "test"),
        ),
        (
            f"{TRAIN} salt_R_50_FPN_2x_ms --eval-only train.init_checkpoint=x.pth",
            f"{TRAIN} salt_R_50_FPN_2x_ms --eval-only train.init_checkpoint=x.pth {TEST}",
            ("test",),
        ),
        (
            "python tools/train_net.py --dataset FOLDER --method pdnet",
            f"python tools/train_net.py --dataset FOLDER --method pdnet {TRAINING} {TEST}",
            ("training", "test"),
        ),
        (
            "python tools/train_net.py --dataset FOLDER --method pdnet --size m",
            f"python tools/train_net.py --dataset FOLDER --method pdnet --size m {TRAINING} {TEST} "
            "train.init_checkpoint=",
            ("training", "test", "random weights"),
        ),
        (
            f"{TRAIN} sapd_R_18_FPN_bccd.yaml SOLVER.BASE_LR 0.005",
            f"{TRAIN} sapd_R_18_FPN_bccd.yaml SOLVER.BASE_LR 0.005 SOLVER.MAX_ITER 2 "
            "SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0 INPUT.MIN_SIZE_TRAIN '(64,)' "
            "INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96",
            ("yacs training",),
        ),
        (
            f"torchrun --nproc-per-node 4 {TRAIN.removeprefix('python ')} fcos_R_18_FPN_bccd",
            "torchrun --nproc-per-node 4 --nproc-per-node 2 "
            f"{TRAIN.removeprefix('python ')} fcos_R_18_FPN_bccd {TRAINING} {TEST}",
            ("two processes on the CPU", "training", "test"),
        ),
        (
            "python tools/fuzz.py --minutes 10 voc",
            "python tools/fuzz.py --minutes 10 voc --minutes 0.02",
            ("one second",),
        ),
        ("python tools/fuzz.py --cases", "python tools/fuzz.py --cases", ()),
        (
            "python tools/slurm_train.py --nodes 2 --dry-run --config-file fcos_R_50_FPN_1x",
            "python tools/slurm_train.py --nodes 2 --dry-run --config-file fcos_R_50_FPN_1x",
            (),
        ),
    ],
)
def test_what_commands_become(line: str, command: str, added: tuple[str, ...]) -> None:
    assert decide("README.md", line) == Decision(RUN, command, added)


def test_two_nodes_run_at_the_same_time() -> None:
    line = "torchrun --nnodes 2 --node-rank 0 --master-addr HOST -m d2_decouple.train --config-file"
    decision = decide("README.md", f"{line} fcos_R_18_FPN_bccd")
    here = "--master-addr HOST --nproc-per-node 1 --master-addr 127.0.0.1 -m"
    assert f"--node-rank 0 {here}" in decision.command
    assert decision.beside == decision.command.replace("--node-rank 0", "--node-rank 1")
    assert decision.beside != decision.command


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("D2D_USE_EXT=0 make test  # the suite", "by CI"),
        (".ci/run", "by CI"),
        ("make run", "by hand"),
        ("git clone https://host/x datasets", "not run"),
        ('pip install "x>=1"', "not run"),
        ("python tools/compatibility.py oldest --python python3.10", "by hand"),
        ("python tools/compatibility.py --write", "run"),
        ("python tools/soak.py --iterations 5000 --method all", "by hand"),
    ],
)
def test_who_runs_what(line: str, how: str) -> None:
    assert decide("README.md", line).how == how
    assert decide("docs/tutorials/x.md", line).how == "by the suite"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            "python tools/new_tool.py --x",
            "no rule for 'python tools/new_tool.py --x'; say in tools",
        ),
        ("python -m d2_decouple.zoo && rm x", "several commands in one line"),
    ],
)
def test_a_command_without_a_decision_is_an_error(line: str, complaint: str) -> None:
    with pytest.raises(UndecidedError, match=f"docs/x.md: {complaint}"):
        decide("docs/x.md", line)


FILE = "output/model_final.pth"


@pytest.mark.parametrize(
    ("document", "line", "wanted"),
    [
        ("README.md", f"{TRAIN} a --eval-only train.init_checkpoint=b.pth", [Need("b.pth", "a")]),
        ("README.md", f"{TRAIN} a train.init_checkpoint=torchvision://resnet50", []),
        (
            "README.md",
            f"python tools/demo.py --config-file output/config.yaml --weights {FILE} --show-stages",
            [Need(FILE, "decoupled_rcnn_R_18_FPN_bccd")],
        ),
        (
            "projects/SALT/README.md",
            f"python tools/demo.py --config-file output/config.yaml --weights {FILE} --show-points",
            [Need(FILE, "salt_R_18_FPN_bccd")],
        ),
        (
            "docs/export.md",
            f"python -m d2_decouple.export --config-file output/config.yaml --weights {FILE}",
            [Need(FILE, "fcos_R_18_FPN_bccd")],
        ),
        (
            "README.md",
            f"python tools/demo.py --config-file atss_R_18_FPN_bccd --weights {FILE}",
            [Need(FILE, "atss_R_18_FPN_bccd")],
        ),
        ("README.md", "python -m d2_decouple.demo --model model.onnx --input photo.jpg", []),
        (
            "README.md",
            "python -m d2_decouple.analyze --model A atss_R_18_FPN_bccd output/x/m.pth "
            "--model T output/tscode/config.yaml output/tscode/m.pth",
            [
                Need("output/x/m.pth", "atss_R_18_FPN_bccd"),
                Need("output/tscode/m.pth", "tscode_fcos_R_18_FPN_bccd"),
            ],
        ),
        (
            "README.md",
            "python tools/convert_checkpoint.py salt official.pth x.pth",
            [Need("official.pth", "salt", official=True)],
        ),
        (
            "README.md",
            f"python tools/convert_checkpoint.py --back gflv2 {FILE} x.pth",
            [Need(FILE, "gflv2_R_50_FPN_1x")],
        ),
    ],
)
def test_weights_that_a_command_reads(document: str, line: str, wanted: list[Need]) -> None:
    assert needs(document, line) == wanted


def test_the_gallery_reads_one_training_of_each_model() -> None:
    found = needs("docs/gallery.md", "python tools/gallery.py --weights-dir output/t")
    assert Need("output/t/pdnet_R_18_FPN_bccd_seed1_0/model_final.pth", "pdnet_R_18_FPN_bccd") in (
        found
    )
    assert len({need.file for need in found}) == len(found) == 7


def test_short_names_of_what_is_added_are_told_apart() -> None:
    assert len({*ADDED.values()}) == len(ADDED)
    assert document_commands.without_comment("make x  # y # z") == "make x"
    assert document_commands.without_comment("# only") == ""
    assert document_commands.without_comment("a#b c") == "a#b c"


def test_rows_that_are_not_trained_here_are_rows_of_the_experiment() -> None:
    lines = [shlex.split(line) for _, line in EVERY if "tools/bccd_table.py" in line]
    names = [name for words in lines for name in words[words.index("--only") + 1].split(",")]
    assert "salt_R_18_FPN_bccd" in names  # which is the one that is trained
    assert {*names} <= {row.recipe for row in ROWS}
