# SPDX-License-Identifier: Apache-2.0
"""The launcher on real images: both kinds of config, several processes, bad input."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from torch.multiprocessing import ProcessExitedException
from util import environment

from d2_decouple.checkpoint import Checkpointer, CheckpointError
from d2_decouple.config import find_config, get_config
from d2_decouple.engine import TrainingStoppedError
from d2_decouple.train import _launched, main, parse_arguments

MINI = [
    "dataloader.train.dataset.names=bccd_mini_train",
    "dataloader.test.dataset.names=bccd_mini_val",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.log_period=1",
]
YACS = ["--config-file", "fcos_R_18_FPN_bccd.yaml"]
YACS_TWO_STAGES = ["--config-file", "decoupled_rcnn_R_18_FPN_bccd.yaml"]
MINI_YACS = [
    *("DATASETS.TRAIN", "('bccd_mini_train',)", "DATASETS.TEST", "('bccd_mini_val',)"),
    *("DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "0"),
]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def run_subprocess(command, cwd):
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_lazy_recipe_trains_evaluates_resumes(tmp_path):
    options = ["--config-file", "fcos_R_18_FPN_bccd", *MINI, f"train.output_dir={tmp_path}"]
    assert main([*options, "train.max_iter=3", "train.eval_period=0"]) == 0
    assert {"model_final.pth", "config.yaml", "log.txt"} <= {p.name for p in tmp_path.iterdir()}
    stored = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert stored["classes"] == ["RBC", "WBC", "Platelets"]
    assert "OneStageDetector" in stored["config"]
    rows = metrics(tmp_path)
    assert [row["iteration"] for row in rows if "total_loss" in row] == [0, 1, 2]
    assert {"loss_cls", "loss_box_reg", "loss_quality", "num_positives_per_image"} <= rows[0].keys()
    assert any("bbox/AP50" in row for row in rows)

    assert main(["--resume", *options, "train.max_iter=5", "train.eval_period=0"]) == 0
    iterations = [row["iteration"] for row in metrics(tmp_path) if "total_loss" in row]
    assert iterations == [0, 1, 2, 3, 4]
    weights = tmp_path / "model_final.pth"
    assert main(["--eval-only", *options, f"train.init_checkpoint={weights}"]) == 0


def test_yacs_recipe_trains_and_evaluates(tmp_path):
    config = str(find_config("fcos_R_18_FPN_bccd.yaml"))
    options = ["--config-file", config, "OUTPUT_DIR", str(tmp_path), *MINI_YACS]
    assert main([*options, "SOLVER.MAX_ITER", "2"]) == 0
    assert (tmp_path / "model_final.pth").is_file()
    weights = str(tmp_path / "model_final.pth")
    assert main([*options[:2], "--eval-only", *options[2:], "MODEL.WEIGHTS", weights]) == 0


def test_torchrun_with_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "d2_decouple.train", "--config-file", "fcos_R_18_FPN_bccd", *MINI]
    command += [f"train.output_dir={tmp_path}", "train.max_iter=2", "train.eval_period=0"]
    output = run_subprocess(command, tmp_path)
    assert "World size: 2" in output
    assert any("bbox/AP50" in row for row in metrics(tmp_path))


def test_detectron2s_own_launcher_runs_the_lazy_recipe(tmp_path):
    """The file comes with Detectron2's sources, which the installer keeps."""
    script = detectron2_tools() / "lazyconfig_train_net.py"
    command = [sys.executable, str(script), "--config-file", str(find_config("fcos_R_18_FPN_bccd"))]
    command += [*MINI, f"train.output_dir={tmp_path}", "train.max_iter=2", "train.eval_period=0"]
    run_subprocess(command, tmp_path)
    assert (tmp_path / "model_final.pth").is_file()


def detectron2_tools():
    """Detectron2's ``tools/``: beside a checkout of it, or where our installer keeps it."""
    import detectron2

    candidates = [Path(detectron2.__file__).parents[1], *Path(sys.prefix).glob("share/*")]
    for folder in candidates:
        if (folder / "tools" / "lazyconfig_train_net.py").is_file():
            return folder / "tools"
    raise AssertionError(
        f"Detectron2's tools are in none of {candidates}; run tools/install_detectron2.py"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config-file", "fcos_R_18_FPN_bcd"], ["fcos_R_18_FPN_bcd", "fcos_R_18_FPN_bccd"]),
        ([], ["--config-file"]),
        (["--config-file", "fcos_R_18_FPN_bccd", "trian.max_iter=3"], ["trian", "train"]),
        (["--config-file", "fcos_R_18_FPN_bccd", "train.max_iters=3"], ["max_iters", "max_iter"]),
        (
            [
                "--config-file",
                "fcos_R_18_FPN_bccd",
                "dataloader.train.dataset.names=bccd_mini_tran",
            ],
            ["bccd_mini_tran", "bccd_mini_train"],
        ),
        (
            ["--config-file", "fcos_R_18_FPN_bccd", *MINI, "model.num_classes=4"],
            ["4 classes", "has 3", "RBC, WBC, Platelets", "model.num_classes=3"],
        ),
        (
            ["--eval-only", "--config-file", "fcos_R_18_FPN_bccd", *MINI],
            ["no weights to evaluate", "train.init_checkpoint=FILE"],
        ),
        (
            ["--num-gpus", "64", "--config-file", "fcos_R_18_FPN_bccd", *MINI],
            ["--num-gpus 64", "torchrun", "--nproc-per-node 64"],
        ),
        (
            ["--num-machines", "2", "--config-file", "fcos_R_18_FPN_bccd", *MINI],
            ["--num-machines 2", "torchrun --nnodes 2"],
        ),
        ([*YACS, *MINI_YACS, "SOLVER.MAX_ITER"], ["KEY VALUE"]),
        (["--config-file", "fcos_R_18_FPN_bccd", *MINI, "train.max_iter=abc"], ["'abc'", "1000"]),
        (
            ["--resume", "--eval-only", "--config-file", "fcos_R_18_FPN_bccd", *MINI],
            ["no last_checkpoint", "train.init_checkpoint=FILE"],
        ),
        (["--config-file", "fcos_R_18_FPN_bccd", *MINI, "--eval-only"], ["--eval-only", "before"]),
        (
            ["--config-file", "fcos_R_18_FPN_bccd", *MINI, "train.device=cuda:99"],
            ["cuda:99", "train.device=cpu"],
        ),
        ([*YACS, *MINI_YACS, "TEST.AUG.ENABLED", "True"], ["type TEST.AUG.ENABLED False"]),
        (
            [*YACS, *MINI_YACS, "SOLVER.REFERENCE_WORLD_SIZE", "8"],
            ["SOLVER.REFERENCE_WORLD_SIZE is 8", "type SOLVER.REFERENCE_WORLD_SIZE 0"],
        ),
        (
            [*YACS, *MINI_YACS, "MODEL.DECOUPLE.OVERRIDES", "['optimizer.lr=3']"],
            ["'optimizer.lr=3'", "train.accumulate"],
        ),
        (
            [*YACS, *MINI_YACS, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.3"],
            ["MODEL.RETINANET.SCORE_THRESH_TEST is 0.3", "MODEL.DECOUPLE.SCORE_THRESH_TEST 0.3"],
        ),
        (
            [*YACS_TWO_STAGES, *MINI_YACS, "MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.7"],
            ["MODEL.ROI_HEADS.NMS_THRESH_TEST is 0.7", "MODEL.DECOUPLE.NMS_THRESH_TEST 0.7"],
        ),
        (
            [*YACS_TWO_STAGES, *MINI_YACS, "TEST.DETECTIONS_PER_IMAGE", "300"],
            [
                "TEST.DETECTIONS_PER_IMAGE is 300",
                "OVERRIDES \"['model.roi_heads.selection.max_detections_per_image=300']\"",
            ],
        ),
        (
            [*YACS, *MINI_YACS, "TEST.DETECTIONS_PER_IMAGE", "300"],
            ["['model.selection.max_detections_per_image=300']"],
        ),
        (
            [*YACS, *MINI_YACS, "SOLVER.MAX_ITR", "3"],
            ["SOLVER.MAX_ITR", "'MAX_ITER'"],
        ),
        (
            [*YACS, *MINI_YACS, "MODEL.DECOUPLE.NUM_CLASSES", "80"],
            ["80 classes", "MODEL.DECOUPLE.NUM_CLASSES 3"],
        ),
    ],
)
def test_bad_input_names_what_to_type(arguments, named, tmp_path, capsys, monkeypatch):
    if "train.device=cuda:99" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    message = capsys.readouterr().err
    for word in named:
        assert word in message
    assert not list(tmp_path.rglob("*.pth"))


def test_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "output"
    status = main(["--config-file", "fcos_R_18_FPN_bccd", *MINI, f"train.output_dir={folder}"])
    assert status == 1
    message = capsys.readouterr().err
    assert str(folder) in message
    assert "train.output_dir=FOLDER" in message
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_loss_that_explodes_stops_with_term_rate_and_images(tmp_path, capsys):
    options = ["--config-file", "fcos_R_18_FPN_bccd", *MINI, f"train.output_dir={tmp_path}"]
    options += ["optimizer.lr=1e15", "train.max_iter=10", "train.eval_period=0"]
    assert main(options) == 1
    message = capsys.readouterr().err.rsplit("error: ", 1)[1]
    for word in ("loss_box_reg", "learning rate", "BloodImage_", "optimizer.lr=0.001", "--resume"):
        assert word in message
    assert not (tmp_path / "model_final.pth").exists()


def test_the_advice_for_a_wrong_class_count_works_as_typed(tmp_path, capsys):
    options = [*YACS, "OUTPUT_DIR", str(tmp_path), *MINI_YACS, "SOLVER.MAX_ITER", "1"]
    assert main([*options, "MODEL.DECOUPLE.NUM_CLASSES", "80"]) == 1
    advice = capsys.readouterr().err.rsplit("type ", 1)[1].split()
    assert main([*options, *advice]) == 0


def test_evaluating_another_number_of_classes_is_refused(tmp_path, capsys):
    model = instantiate(get_config("fcos_R_18_FPN_bccd", ["model.num_classes=80"]).model)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    options = ["--eval-only", "--config-file", "fcos_R_18_FPN_bccd", *MINI]
    options += [f"train.output_dir={tmp_path}", f"train.init_checkpoint={tmp_path}/weights.pth"]
    assert main(options) == 1
    message = capsys.readouterr().err
    assert "2 of" in message
    assert "head.cls_score.bias ((80,) in the file, (3,) here)" in message


class Harmful:
    def __reduce__(self):
        return print, ("code of a checkpoint was run",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl", "weights.bin"])
def test_code_in_a_checkpoint_is_not_run(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(pickle.dumps({"model": Harmful()}))
    model = instantiate(get_config("fcos_R_18_FPN_bccd").model)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        Checkpointer(model).load(str(tmp_path / name))
    assert "was run" not in capsys.readouterr().out


def test_arrays_of_the_model_zoo_load(tmp_path):
    model = instantiate(get_config("fcos_R_18_FPN_bccd").model)
    state = {name: np.asarray(value + 1) for name, value in model.state_dict().items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "somebody"}))
    Checkpointer(model, complete=True).load(str(tmp_path / "zoo.pkl"))
    assert torch.equal(model.head.cls_score.weight, torch.tensor(state["head.cls_score.weight"]))


def test_one_of_several_processes_says_what_is_wrong_without_a_traceback(monkeypatch, capsys):
    args = parse_arguments(["--config-file", "fcos_R_18_FPN_bccd"])

    def fail(args):
        raise TrainingStoppedError("stopped by SIGTERM", 143)

    monkeypatch.setattr("d2_decouple.train.run", fail)
    with pytest.raises(TrainingStoppedError):  # alone, main() says it
        _launched(args)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(SystemExit) as ended:
        _launched(args)
    assert ended.value.code == 143
    assert "error: stopped by SIGTERM" in capsys.readouterr().err

    def launch(*_, **__):
        raise ProcessExitedException("", error_index=0, error_pid=1, exit_code=ended.value.code)

    monkeypatch.setattr("d2_decouple.train.launch", launch)
    assert main(["--config-file", "fcos_R_18_FPN_bccd"]) == 143


def test_a_tensor_alone_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    model = instantiate(get_config("fcos_R_18_FPN_bccd").model)
    with pytest.raises(CheckpointError, match=r"holds a Tensor.*dict of tensors"):
        Checkpointer(model).load(str(tmp_path / "tensor.pth"))


def test_another_launcher_needs_the_one_line(tmp_path):
    """In a process of its own, where nothing has been registered yet."""
    code = (
        "from detectron2.config import get_cfg; from detectron2.modeling import build_model; "
        "from d2_decouple import add_decouple_config; cfg = get_cfg(); add_decouple_config(cfg); "
        f"cfg.merge_from_file({str(find_config('fcos_R_18_FPN_bccd.yaml'))!r}); "
        "cfg.MODEL.DEVICE = 'cpu'; print(type(build_model(cfg)).__name__); "
        "from detectron2.data import DatasetCatalog; DatasetCatalog.get('bccd_mini_val')"
    )
    assert "OneStageDetector" in run_subprocess([sys.executable, "-c", code], tmp_path)


def test_checkpoint_of_another_model_is_counted_and_named(tmp_path, capsys):
    options = ["--eval-only", "--config-file", "fcos_R_18_FPN_bccd", *MINI]
    options += [f"train.output_dir={tmp_path}", f"train.init_checkpoint={tmp_path / 'other.pth'}"]
    torch.save({"model": {"encoder.layer.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    assert main(options) == 1
    message = capsys.readouterr().err
    assert "none of the 1 tensors" in message
    assert "encoder.layer.weight" in message
    assert "backbone." in message

    (tmp_path / "other.pth").write_bytes(b"not a checkpoint")
    assert main(options) == 1
    assert "cannot be read as a checkpoint" in capsys.readouterr().err

    (tmp_path / "other.pth").unlink()
    assert main(options) == 1
    assert "no checkpoint" in capsys.readouterr().err

    options[-1] = "train.init_checkpoint=http://localhost:9/weights.pkl"
    assert main(options) == 1
    message = capsys.readouterr().err
    assert "http://localhost:9/weights.pkl could not be fetched" in message
    assert "train.init_checkpoint" in message


def test_checkpoint_that_fits_in_part_is_counted_and_named(tmp_path, caplog):
    model = instantiate(get_config("fcos_R_18_FPN_bccd").model)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.predictor")}
    state["head.cls_score.bias"] = torch.zeros(80)
    state["roi_heads.box.weight"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "part.pth")
    total = len(model.state_dict())
    with caplog.at_level("INFO"):
        Checkpointer(model).load(str(tmp_path / "part.pth"))
    assert f"Loaded {total - 5} of {total} tensors; 5 keep their initial values" in caplog.text
    assert "head.predictor.ctrness.weight" in caplog.text
    assert "head.cls_score.bias ((80,) in the file, (3,) here)" in caplog.text
    assert "1 in the file have no place: roi_heads.box.weight" in caplog.text
