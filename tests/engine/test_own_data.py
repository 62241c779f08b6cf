# SPDX-License-Identifier: Apache-2.0
"""``--dataset FOLDER``: all that a user with labelled images has to say."""

import json

import pytest
import torch
from detectron2.config import get_cfg
from omegaconf import OmegaConf

from d2_decouple.config import ConfigError, add_decouple_config
from d2_decouple.data import FolderDataset
from d2_decouple.data.shapes import make_shapes
from d2_decouple.engine.own_data import use_folder, use_folder_yacs
from d2_decouple.modeling import TestTimeAugmentation
from d2_decouple.train import main

SHORT = [
    "train.max_iter=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=64",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
]
YACS = [
    *("SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
]


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_a_folder_is_all_that_is_needed(layout, tmp_path, capsys):
    folder = make_shapes(tmp_path / "my shapes", images=12, layout=layout)
    output = tmp_path / "out"
    assert main(["--dataset", str(folder), *SHORT, f"train.output_dir={output}"]) == 0
    said = capsys.readouterr().out
    for part in (str(folder), "3 classes", "9 images for training, 3 for the test"):
        assert part in said
    stored = torch.load(output / "model_final.pth", weights_only=True)
    assert len(stored["classes"]) == 3
    assert stored["model"]["head.cls_score.weight"].shape[0] == 3
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert {f"bbox/AP-{name}" for name in stored["classes"]} <= rows[-1].keys()
    again = [*SHORT, f"train.init_checkpoint={output / 'model_final.pth'}"]
    again.append(f"train.output_dir={tmp_path / 'evaluated'}")
    assert main(["--dataset", str(folder), "--eval-only", *again]) == 0
    assert main(["--dataset", str(folder), "--eval-only", *again, "train.tta.enabled=true"]) == 0


def test_the_yacs_door_takes_a_folder_too(tmp_path):
    folder = make_shapes(tmp_path / "shapes", images=8)
    options = ["--config-file", "fcos_R_18_FPN_bccd.yaml", "--dataset", str(folder), *YACS]
    assert main([*options, "OUTPUT_DIR", str(tmp_path / "out")]) == 0
    assert len(torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["classes"]) == 3


def test_typed_values_win_over_the_folders(tmp_path, capsys):
    folder = make_shapes(tmp_path / "shapes", images=4)
    assert main(["--dataset", str(folder), *SHORT, "model.num_classes=7"]) == 1
    message = capsys.readouterr().err
    for part in ("7 classes", "has 3", "model.num_classes=3"):
        assert part in message


def test_faults_in_the_data_stop_before_the_first_iteration(tmp_path, capsys):
    folder = make_shapes(tmp_path / "shapes", images=8, layout="coco")
    picture = next((folder / "train").iterdir())
    picture.write_bytes(b"no image")
    output = tmp_path / "out"
    assert main(["--dataset", str(folder), *SHORT, f"train.output_dir={output}"]) == 1
    message = capsys.readouterr().err
    for part in (picture.name, "would stop or spoil a training", "d2_decouple.data.checks"):
        assert part in message
    assert not (output / "metrics.json").exists()


def test_a_folder_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "holidays").mkdir()
    assert main(["--dataset", str(tmp_path / "holidays")]) == 1
    message = capsys.readouterr().err
    for part in ("holidays", "wanted one of these layouts", "Annotations"):
        assert part in message


def test_images_without_objects_are_trained_on(tmp_path):
    folder = make_shapes(tmp_path / "shapes", images=8, negatives=0.5)
    output = tmp_path / "out"
    assert main(["--dataset", str(folder), *SHORT, f"train.output_dir={output}"]) == 0
    assert "Removed" not in (output / "log.txt").read_text()


def test_test_time_augmentation_sees_the_original(tmp_path, monkeypatch):
    seen = []
    forward = TestTimeAugmentation.forward

    def watch(self, batch):
        seen.append((self.short_edge_lengths, self.max_size, self.flip, batch[0]["image"].shape))
        return forward(self, batch)

    monkeypatch.setattr(TestTimeAugmentation, "forward", watch)
    folder = make_shapes(tmp_path / "shapes", images=4, size=(90, 120))
    options = ["train.tta.enabled=true", "train.tta.flip=false", f"train.output_dir={tmp_path}/out"]
    assert main(["--dataset", str(folder), *SHORT, *options]) == 0
    assert seen == [((48, 64, 80), 500, False, (3, 90, 120))]


def test_a_model_without_a_number_of_classes_is_named():
    data = {"train": {"dataset": {}}, "test": {"dataset": {}}}
    cfg = OmegaConf.create({"model": {"parts": 3}, "dataloader": data, "train": {"output_dir": ""}})
    with pytest.raises(ConfigError, match=r"num_classes.*roi_heads.*2 classes"):
        use_folder(cfg, FolderDataset("a", "b", ("x", "y"), ()))


def test_detectron2s_own_yacs_models_are_told_their_classes():
    cfg = get_cfg()
    add_decouple_config(cfg)
    use_folder_yacs(cfg, FolderDataset("a", "b", ("x", "y"), ()))
    numbers = {cfg.MODEL[name].NUM_CLASSES for name in ("DECOUPLE", "RETINANET", "ROI_HEADS")}
    assert numbers == {2}


def test_two_stage_models_are_told_their_classes():
    data = {"train": {"dataset": {}}, "test": {"dataset": {}}}
    model = {"roi_heads": {"num_classes": 80}}
    cfg = OmegaConf.create({"model": model, "dataloader": data, "train": {"output_dir": "out"}})
    use_folder(cfg, FolderDataset("a", "b", ("x", "y"), ()))
    assert cfg.model.roi_heads.num_classes == 2
    assert cfg.dataloader.evaluator.dataset_name == "b"
