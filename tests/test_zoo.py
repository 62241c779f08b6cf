# SPDX-License-Identifier: Apache-2.0
"""Models by name: the table says what documents and recipes say; models load, or say why not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from util import TORCH

from d2_decouple import zoo
from d2_decouple.checkpoint import CheckpointError
from d2_decouple.config import ConfigError, config_names, get_config
from d2_decouple.evaluation.runs import config_hash, config_text
from d2_decouple.evaluation.small_data import Run
from d2_decouple.zoo import catalogue, models, update
from d2_decouple.zoo.__main__ import main
from d2_decouple.zoo.catalogue import Measured, ZooError, entries, entry, read_table
from d2_decouple.zoo.costs import count_costs, image_size

ROOT = Path(__file__).resolve().parents[1]
SMALL = "fcos_R_18_FPN_bccd"
MAKE = "type python -m d2_decouple.zoo update"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of two recipes in the place of the real one."""
    content = {
        "fcos_R_50_FPN_1x": {
            "config": "configs/baselines/fcos_R_50_FPN_1x.py",
            "about": "",
            "data": "COCO val2017",
            "paper": "38.7 (TSCODE, Table 1)",
            "paper_ap": 38.7,
            "iterations": 90000,
            "batch": 16,
            "measured": [],
            "costs": {"parameters": 32244245, "multiply_adds": 10**11, "image": [800, 1216]},
        },
        SMALL: {
            "config": f"configs/baselines/{SMALL}.py",
            "about": "small",
            "data": "BCCD test",
            "paper": "none",
            "paper_ap": None,
            "iterations": 800,
            "batch": 4,
            "measured": [
                {"seed": 1, "ap": 46.0, "commit": "aaaaaaa"},
                {"seed": 2, "ap": 49.0, "commit": "bbbbbbb"},
            ],
        },
    }
    file = tmp_path / "table.json"
    file.write_text(json.dumps(content))
    monkeypatch.setattr(catalogue, "TABLE", file)
    read_table.cache_clear()
    yield content
    read_table.cache_clear()


@pytest.fixture
def nothing_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("D2D_ZOO", str(tmp_path / "zoo"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the kept table


def test_the_table_says_what_documents_and_results_say():
    kept = read_table()
    for name, known in update.known_of().items():
        assert {key: kept.get(name, {}).get(key) for key in known} == known, f"{name}: {MAKE}"
    assert sorted(kept) == config_names(), MAKE


def test_the_table_is_of_the_recipes_as_they_are():
    kept = read_table()
    for name in config_names():
        cfg = get_config(name)
        assert kept[name]["model"] == update.model_hash(cfg), f"{name}: {MAKE}"
        batch = cfg.dataloader.train.total_batch_size * cfg.train.accumulate
        assert (kept[name]["iterations"], kept[name]["batch"]) == (cfg.train.max_iter, batch), MAKE


def test_the_costs_of_every_model_were_counted():
    assert [name for name, known in read_table().items() if "costs" not in known] == [], MAKE


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("tscode_fcos_R_18_FPN_bccd", 0.0),
        # Others do not count attention, or count it otherwise.
        ("sapd_R_18_FPN_bccd", 0.0 if (2, 6) <= TORCH < (2, 15) else 0.01),
        ("faster_rcnn_R_18_FPN_bccd_d2", 0.02),  # as many regions as noise gave
    ],
)
def test_kept_costs_are_those_of_the_model(name, tolerance):
    kept, now = entry(name).costs, count_costs(get_config(name))
    assert (kept.parameters, kept.image) == (now.parameters, now.image), MAKE
    assert kept.multiply_adds == pytest.approx(now.multiply_adds, rel=tolerance, abs=0), MAKE


# --- costs


class Small(nn.Module):
    """A backbone of one convolution, and a head of one."""

    head_in_features = ("map",)

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), Named())
        self.head = Head()
        self.assigner = nn.Linear(10, 10)


class Named(nn.Module):
    def forward(self, x):
        return {"map": x}


class Head(nn.Conv2d):
    def __init__(self):
        super().__init__(4, 5, 1)

    def forward(self, maps):
        return super().forward(maps[0])


def test_costs_are_those_of_the_convolutions(monkeypatch):
    cfg = get_config(SMALL)
    cfg.model = {"_target_": f"{__name__}.Small"}
    cfg.model._target_ = Small
    costs = count_costs(cfg)
    # BCCD's 240 x 320 is padded to 256 x 320, halved to 128 x 160 = 20,480 cells: each has
    # 4 outputs of 3 x 3 x 3 inputs, then 5 outputs of 4.
    assert costs.multiply_adds == 20480 * (4 * 27 + 5 * 4)
    assert costs.parameters == (4 * 27 + 4) + (5 * 4 + 5)  # not the assigner's 110
    assert costs.image == (240, 320)


def test_fcos_costs_its_convolutions():
    costs = count_costs(get_config(SMALL))
    with torch.device("meta"):
        from detectron2.config import instantiate

        model = instantiate(get_config(SMALL).model)
    assert costs.parameters == sum(x.numel() for x in model.parameters())
    # The towers alone: on 32x40 + 16x20 + 8x10 + 4x5 + 2x3 cells, 8 convolutions of 64 x 64 x 9.
    cells = 1280 + 320 + 80 + 20 + 6
    assert 8 * 64 * 64 * 9 * cells < costs.multiply_adds < 4e9


def test_sizes_of_images():
    assert image_size(get_config("fcos_R_50_FPN_1x")) == (800, 1216)  # 1200, next multiple of 32
    assert image_size(get_config(SMALL)) == (240, 320)


# --- what is read of documents and results

TABLES = """
| recipe | data | AP, paper | AP, measured here |
| --- | --- | --- | --- |
| [a_1x](configs/a_1x.py) | COCO val2017 | 38.7 (TSCODE, Table 1) | not run |
| [b_1x](configs/b_1x.py), of  two words | test-dev | 41.6 / 59.8 / 44.9 (Table 1) | not run |
| [c_1x](configs/c_1x.py) | val2017 | 41.9 to 42.1 (0.1 below) | not run |
| [d_1x](configs/d_1x.py) | BCCD test | 1.4 to 1.5 below three | not run |
| `e_1x` | COCO val2017 | 38.7 | not run |
"""


def test_rows_of_documents():
    rows = dict(update.rows_of(TABLES))
    assert list(rows) == ["a_1x", "b_1x", "c_1x", "d_1x"]
    assert rows["a_1x"] == {
        "about": "",
        "data": "COCO val2017",
        "paper": "38.7 (TSCODE, Table 1)",
        "paper_ap": 38.7,
    }
    assert rows["b_1x"]["about"] == "of two words"
    assert rows["b_1x"]["data"] == "COCO test-dev"
    assert [row["paper_ap"] for row in rows.values()] == [38.7, 41.6, None, None]


def test_rows_of_results(tmp_path):
    for seed, ap, dirty in ((2, 40.126, True), (1, 39.0, False)):
        result = {
            "recipe": "a_1x",
            "seed": seed,
            "metrics": {"AP": ap},
            "commit": {"id": "0123456789", "dirty": dirty},
        }
        (tmp_path / f"run{2 - seed}.json").write_text(json.dumps(result))
    assert update.result_rows(tmp_path) == {
        "a_1x": [
            {"seed": 1, "ap": 39.0, "commit": "0123456"},
            {"seed": 2, "ap": 40.13, "commit": "0123456 with changes"},
        ]
    }


def documents(root, text):
    (root / "README.md").write_text(text)
    return root


def test_a_recipe_without_a_row_is_named(tmp_path):
    with pytest.raises(ZooError, match=f"recipes without a row are .*'{SMALL}'.* \\['zzz'\\]"):
        update.known_of(documents(tmp_path, "| [zzz](a.py) | x | y | z |\n"))


def test_a_recipe_with_two_rows_is_named(tmp_path):
    row = f"| [{SMALL}](a.py) | x | y | z |\n"
    with pytest.raises(ZooError, match=f"{SMALL} has a second row in .*README.md"):
        update.known_of(documents(tmp_path, 2 * row))


def test_without_documents_there_is_no_update(tmp_path):
    with pytest.raises(ZooError, match="is no checkout"):
        update.known_of(tmp_path)


def test_update_counts_what_changed(table, tmp_path, monkeypatch):
    names = ["fcos_R_50_FPN_1x", SMALL]
    row = {"about": "", "data": "x", "paper": "none", "paper_ap": None, "measured": []}
    monkeypatch.setattr(update, "TABLE", catalogue.TABLE)
    monkeypatch.setattr(update, "known_of", lambda: {name: dict(row) for name in names})
    counted = []

    def costs(cfg):
        counted.append(cfg.model.num_classes)
        return catalogue.Costs(1, 2, (3, 4))

    monkeypatch.setattr(update, "count_costs", costs)
    assert update.update() == (2, 2)  # the table above has no hashes
    assert counted == [80, 3]
    assert read_table()[SMALL]["iterations"] == 800
    assert entry(SMALL).costs == (1, 2, (3, 4))
    assert update.update() == (2, 0)
    hashes = iter("abcdef")
    monkeypatch.setattr(update, "model_hash", lambda cfg: next(hashes))  # all changed
    assert update.update(only=[SMALL]) == (2, 1)
    assert counted == [80, 3, 3]
    assert entry("fcos_R_50_FPN_1x").costs is None


def test_a_model_that_cannot_be_built_has_no_costs(table, monkeypatch, caplog):
    row = {"about": "", "data": "x", "paper": "none", "paper_ap": None, "measured": []}
    monkeypatch.setattr(update, "TABLE", catalogue.TABLE)
    monkeypatch.setattr(update, "known_of", lambda: {SMALL: row})

    def fail(cfg):
        raise ValueError("no such network")

    monkeypatch.setattr(update, "count_costs", fail)
    assert update.update() == (1, 0)
    assert f"{SMALL}: costs not counted: no such network" in caplog.text


def test_a_misspelt_name_is_not_counted_without_a_word(table, monkeypatch):
    row = {"about": "", "data": "x", "paper": "none", "paper_ap": None, "measured": []}
    monkeypatch.setattr(update, "TABLE", catalogue.TABLE)
    monkeypatch.setattr(update, "known_of", lambda: {SMALL: row})
    before = catalogue.TABLE.read_text()
    with pytest.raises(ZooError, match=f"no recipe 'fcos_R18_FPN_bccd'; did you mean '{SMALL}'"):
        update.update(only=["fcos_R18_FPN_bccd"])
    assert catalogue.TABLE.read_text() == before


def test_the_hash_is_of_the_model_and_the_images_size():
    hashes = {
        update.model_hash(get_config(SMALL, overrides))
        for overrides in (
            ["train.max_iter=5"],
            [],
            ["model.num_classes=4"],
            ["dataloader.test.mapper.augmentations.0.short_edge_length=480"],
        )
    }
    assert len(hashes) == 3


# --- entries


def test_an_entry(table):
    item = entry(SMALL)
    assert item.measured_ap == 47.5
    assert item.measured[1] == Measured(
        2, 49.0, "bbbbbbb", f"python -m d2_decouple.zoo train {SMALL} --seed 2"
    )
    assert item.measured[0].command == f"python -m d2_decouple.zoo train {SMALL}"
    assert item.costs is None
    other = entry("fcos_R_50_FPN_1x")
    assert other.measured_ap is None
    assert other.costs == (32244245, 10**11, (800, 1216))


def test_entries_are_filtered(table):
    def names(**wanted):
        return [item.name for item in entries(**wanted)]

    assert names() == config_names()
    assert names(data="bccd") == names(data="BCCD") == [SMALL]  # others are unknown in this table
    assert names(pattern="fcos_R_50_FPN_1?") == ["fcos_R_50_FPN_1x"]
    assert names(pattern="fcos_R_50_FPN_1x") == [
        name for name in config_names() if "fcos_R_50_FPN_1x" in name
    ]
    assert names(method="fcos", data="coco") == ["fcos_R_50_FPN_1x"]
    methods = {name.split("_")[0] for name in names(method="tscode")}
    assert methods == {"tscode"}


def test_no_entry_is_left(table):
    with pytest.raises(ZooError, match=r"no model with method 'fcs'; did you mean 'fcos'"):
        entries(method="fcs")
    with pytest.raises(ZooError) as raised:
        entries(pattern="fcos_R_50_FPN_1xx")
    assert "pattern '*fcos_R_50_FPN_1xx*'" in str(raised.value)
    assert "'fcos_R_50_FPN_1x'" in str(raised.value)
    with pytest.raises(ConfigError, match="'fcos_R_50_FPN_1x'"):
        entry("fcos_R50_FPN_1x")


def test_a_damaged_table(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "TABLE", tmp_path / "table.json")
    for content in (None, "{"):
        if content:
            (tmp_path / "table.json").write_text(content)
        read_table.cache_clear()
        with pytest.raises(ZooError, match=r"table\.json cannot be read .*zoo update"):
            entry(SMALL)
    read_table.cache_clear()


# --- models and weights


def test_a_model_is_ready(nothing_trained):
    found = zoo.get(SMALL, overrides=["model.num_classes=5"])
    assert found.config.model.num_classes == 5
    assert found.model.num_classes == 5
    assert not found.model.training
    assert found.weights == ""
    with pytest.raises(ConfigError, match=f"'{SMALL}'"):
        zoo.get("fcos_R18_FPN_bccd")


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device, message in (
        ("cuda", "device is cuda, but torch sees no GPU; give device='cpu'"),
        ("gpu", "device 'gpu' is not known to torch; give cpu or cuda"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.get(SMALL, device=device)


def saved(model, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, file)
    return file


def test_weights_of_a_file_and_of_a_training(nothing_trained):
    torch.manual_seed(1)
    wanted = zoo.get(SMALL).model
    key = "head.cls_score.weight"
    file = saved(wanted, nothing_trained / "a.pth")
    found = zoo.get(SMALL, weights=str(file))
    assert torch.equal(found.model.state_dict()[key], wanted.state_dict()[key])
    assert found.weights == str(file)
    found = zoo.get(SMALL, weights=file)
    assert torch.equal(found.model.state_dict()[key], wanted.state_dict()[key])
    assert found.weights == str(file)
    with pytest.raises(CheckpointError, match="give the config that the checkpoint was"):
        zoo.get("atss_R_18_FPN_bccd", weights=str(file))

    folder, other = models._folders(SMALL, 1)
    name = folder.name
    assert folder == nothing_trained / "zoo" / name
    assert other == Path("output", "bccd_table", name)
    assert name.startswith(f"{SMALL}_seed1_")
    run = Run(SMALL, 2)  # the tool's folders have the same names
    of_the_tool = f"{run.name}_{config_hash(config_text(run.config()))}"
    assert {path.name for path in models._folders(SMALL, 2)} == {of_the_tool}
    moved = saved(wanted, other / "model_final.pth")
    assert zoo.get(SMALL, weights="trained").weights == str(moved)
    shutil.copytree(other, folder)
    assert zoo.trained_weights(SMALL) == folder / "model_final.pth"


def test_a_row_that_tests_anothers_weights_finds_them(nothing_trained):
    folder, _ = models._folders("salt_R_18_FPN_bccd_s1", 1)
    assert folder.name.startswith("salt_R_18_FPN_bccd_seed1_")


def test_weights_of_before_an_option_was_added_are_found(nothing_trained):
    cfg = get_config(SMALL, ["train.seed=1", "train.output_dir=elsewhere"])
    text = config_text(cfg)
    old = models.zoo_folder() / f"{SMALL}_seed1_older"
    old.mkdir(parents=True)
    (old / "model_final.pth").touch()
    lines = [line for line in text.splitlines() if "early_stopping" not in line]
    assert len(lines) == len(text.splitlines()) - 1
    (old / "config.yaml").write_text("\n".join(lines))
    assert zoo.trained_weights(SMALL) == old / "model_final.pth"
    other = re.sub(r"num_classes: 3", "num_classes: 4", "\n".join(lines), count=1)
    assert other != "\n".join(lines)
    (old / "config.yaml").write_text(other)
    with pytest.raises(ZooError, match="there are no weights"):
        zoo.trained_weights(SMALL)
    with pytest.raises(ZooError, match="there are no weights"):
        zoo.trained_weights(SMALL, seed=2)


def test_a_damaged_config_beside_weights_is_passed_over(nothing_trained, caplog):
    for name, content in (("a", b"x: [\n"), ("b", b"\xff\xfe")):
        old = models.zoo_folder() / f"{SMALL}_seed1_{name}"
        old.mkdir(parents=True)
        (old / "config.yaml").write_bytes(content)
    with pytest.raises(ZooError, match="there are no weights"):
        zoo.trained_weights(SMALL)
    assert caplog.text.count("config.yaml is passed over, it cannot be read") == 2


def test_of_a_file_of_ones_own_nothing_is_known(tmp_path, capsys):
    own = tmp_path / f"{SMALL}.py"
    own.write_text("model = None\n")
    with pytest.raises(ZooError, match=rf"{SMALL}\.py is no recipe of this package"):
        entry(str(own))
    assert main(["show", str(own)]) == 1
    assert "so nothing is known of its training" in capsys.readouterr().err


def test_a_file_of_ones_own_has_no_trained_weights(nothing_trained):
    """Even if it has a recipe's name: its model may be another one of the same shapes."""
    own = nothing_trained / f"{SMALL}.py"
    own.write_text("model = None\n")
    with pytest.raises(ZooError, match=rf"{SMALL}\.py is no recipe of this package"):
        zoo.get(str(own), weights="trained")
    with pytest.raises(ZooError, match="is no recipe of this package"):
        zoo.train(str(own))


def test_weights_that_were_not_trained(nothing_trained):
    with pytest.raises(ZooError) as raised:
        zoo.get(SMALL, weights="trained", seed=3)
    message = str(raised.value)
    assert f"there are no weights of {SMALL}, seed 3" in message
    assert f"type python -m d2_decouple.zoo train {SMALL} --seed 3" in message
    assert str(nothing_trained / "zoo") in message
    with pytest.raises(ZooError, match=r"train --config-file fcos_R_50_FPN_1x --num-gpus 8"):
        zoo.get("fcos_R_50_FPN_1x", weights="trained")


def test_folders_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("D2D_ZOO", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.zoo_folder() == tmp_path / "d2_decouple" / "zoo"
    monkeypatch.setenv("D2D_ZOO", str(tmp_path / "mine"))
    assert models.zoo_folder() == tmp_path / "mine"


def test_train_is_one_command(nothing_trained, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("d2_decouple.train.main", lambda command: asked.append(command) or 0)
    assert main(["train", SMALL, "--seed", "2"]) == 0
    folder, _ = models._folders(SMALL, 2)
    assert asked == [
        [
            *("--config-file", SMALL, "--resume", "train.seed=2"),
            f"train.output_dir='{folder}'",
        ]
    ]
    assert capsys.readouterr().out == f"{folder / 'model_final.pth'}\n"


def test_train_that_fails_or_is_not_for_this(nothing_trained, monkeypatch, capsys):
    monkeypatch.setattr("d2_decouple.train.main", lambda command: 3)
    assert main(["train", SMALL]) == 1
    assert "ended with status 3" in capsys.readouterr().err
    assert main(["train", "fcos_R_50_FPN_1x"]) == 1
    message = "type python -m d2_decouple.train --config-file fcos_R_50_FPN_1x"
    assert message in capsys.readouterr().err


# --- the command line


def test_list(table, capsys):
    assert main([]) == 0
    everything = capsys.readouterr().out
    assert all(name in everything for name in config_names())
    assert main(["list", "fcos_R_50_FPN_1?", "--data", "coco"]) == 0
    header, row, _, note = capsys.readouterr().out.splitlines()[:4]
    assert header.split("  ")[0] == "model"
    assert row.split() == [
        *("fcos_R_50_FPN_1x", "COCO", "val2017", "90000", "x", "16", "38.7", "-"),
        *("32.2", "M", "100.0", "G"),
    ]
    assert note.startswith("1 models")
    assert main(["list", "--data", "bccd"]) == 0
    assert "47.5 (2)" in capsys.readouterr().out
    assert main(["list", "--method", "fcs"]) == 1
    assert "error: no model with" in capsys.readouterr().err


def test_list_as_json(table, capsys):
    assert main(["list", "--data", "bccd", "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert item["name"] == SMALL
    assert item["measured_ap"] == 47.5
    assert item["measured"][1]["seed"] == 2
    assert item["costs"] is None


def test_show(table, nothing_trained, capsys):
    assert main(["show", "fcos_R_50_FPN_1x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "AP, paper:   38.7 (TSCODE, Table 1)" in lines
    assert "AP, here:    not run" in lines
    assert "parameters:  32,244,245" in lines
    assert "mult-adds:   100,000,000,000 of one 800x1216 image" in lines
    assert "weights:     none are published" in lines
    assert main(["show", SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"model:       {SMALL}, small" in lines
    assert "AP, here:    49.0, seed 2, commit bbbbbbb" in lines
    assert "costs:       not counted; type --costs" in lines
    assert f"weights:     none yet; to train them: python -m d2_decouple.zoo train {SMALL}" in lines
    assert main(["show", SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["iterations"] == 800
    assert main(["show", "fcos_R18_FPN_bccd"]) == 1
    assert f"'{SMALL}'" in capsys.readouterr().err


def test_show_counts_costs(table, nothing_trained, capsys):
    assert main(["show", SMALL, "--costs"]) == 0
    assert "of one 240x320 image" in capsys.readouterr().out
