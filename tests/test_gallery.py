# SPDX-License-Identifier: Apache-2.0
"""The gallery: its page and pictures, what it refuses, where weights come from, the kept page."""

import hashlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from gallery_scenes import write_gallery

from d2_decouple import gallery
from d2_decouple.config import ConfigError, find_config
from d2_decouple.gallery import SECTIONS, main
from d2_decouple.gallery_models import (
    ATSS,
    DECOUPLED_RCNN,
    FCOS,
    MODELS,
    PDNET,
    SALT,
    Weights,
    find_weights,
    given_weights,
    provenance,
    training_command,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gallery.md"
IMAGES = ("BloodImage_00011", "BloodImage_00015")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_gallery(tmp_path_factory.mktemp("trained"), MODELS)


@pytest.fixture
def run(trained, tmp_path, capsys):
    """Runs the command with some models -> exit status, what it printed, and its complaints."""

    def call(*options, models=MODELS, images=IMAGES, dataset="bccd_mini_val"):
        arguments = ["--dataset", dataset, "--images", *images, "--device", "cpu"]
        arguments += ["--page", str(tmp_path / "page.md"), *options]
        for model in models:
            arguments += ["--model", *map(str, trained[model.recipe])]
        return main(arguments), *capsys.readouterr()

    return call


def blocks(text):
    """Content of each block of a page by its name."""
    found = re.findall(r"<!-- gallery: ([^>]*) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    return {name: content.strip() for name, content in found}


def links(text):
    """(alternative text, file) of each picture."""
    return re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)


def test_page_pictures_and_a_second_run_that_keeps_what_was_written_by_hand(run, tmp_path):
    status, out, err = run()
    assert (status, err) == (0, "")
    page = tmp_path / "page.md"
    text = page.read_text()
    made = blocks(text)
    assert [*made] == [*(x.name for x in SECTIONS), "made with"]
    pictures = links(text)
    names = sorted(x.name for x in (tmp_path / "page").iterdir())
    assert sorted(file for _, file in pictures) == [f"page/{name}" for name in names]
    assert {"images.jpg", "points_1.jpg", "points_2.jpg", "stages.jpg", "errors.jpg"} <= {*names}
    assert all(alt and len(alt) > 20 for alt, _ in pictures)
    assert all((tmp_path / file).stat().st_size <= 150_000 for _, file in pictures)
    assert "of ATSS, PDNet, SALT-Net and Decoupled R-CNN" in made["errors"]
    assert made["points"].startswith("![Image 1: the points at which PDNet and SALT-Net read 1 RBC")
    assert "from `BloodImage_00011`, `BloodImage_00015` of `bccd_mini_val`" in made["made with"]
    assert made["made with"].count("\n| ") == len(MODELS) + 2
    assert f"page: {page}" in out
    before = {name: (tmp_path / "page" / name).read_bytes() for name in names}

    page.write_text(text.replace("## Points\n", "## Points\n\nMy caption.\n") + "\nThe end.\n")
    status, out, _ = run("--skip-missing", models=[DECOUPLED_RCNN, FCOS])
    assert status == 0
    again = page.read_text()
    assert "## Points\n\nMy caption.\n" in again
    assert again.endswith("\nThe end.\n")
    made = blocks(again)
    assert (
        "*Not drawn: there were no weights of PDNet, SALT-Net. They are trained" in made["points"]
    )
    assert training_command([PDNET, SALT], 1) in made["points"]
    assert made["images"] == blocks(text)["images"]
    for name in ("images.jpg", "stages.jpg"):
        assert (tmp_path / "page" / name).read_bytes() == before[name]
    assert made["made with"].count("\n| ") == 1 + 2
    assert "points: left out, no weights of PDNet, SALT-Net" in out
    assert "not on the page any more, delete them: assignment_1.jpg, assignment_2.jpg, " in out
    assert "images.jpg" not in out.splitlines()[-1]


def test_missing_weights_stop_it_before_anything_is_written(run, tmp_path):
    status, out, err = run("--weights-dir", str(tmp_path / "no"), models=MODELS[:4])
    assert (status, out) == (1, "")
    recipes = [x.recipe for x in MODELS[4:]]
    assert err.startswith(f"error: no weights of {', '.join(recipes)} (looked in {tmp_path / 'no'}")
    assert f"`python tools/bccd_table.py --data datasets/BCCD --only {','.join(recipes)} " in err
    assert "--seeds 1 --no-table`" in err
    assert f"--model {recipes[0]} FILE, or leave out what needs them by --skip-missing" in err
    assert [*tmp_path.iterdir()] == []
    assert "no folder: give --weights-dir" in run(models=[])[2]


def test_what_it_refuses(run, trained, tmp_path):
    (tmp_path / "page.md").write_text("<!-- gallery: images -->\n<!-- end -->\n")
    status, _, err = run()
    assert status == 1
    assert "page.md has no place for points: put the lines <!-- gallery: points --> and" in err
    assert not (tmp_path / "page").exists()  # nothing was drawn
    (tmp_path / "page.md").write_text("<!-- gallery: images -->\n")  # no end
    assert "has no place for images" in run()[2]
    (tmp_path / "page.md").unlink()
    err = run(images=["BloodImage_0000"])[2]
    assert "--images BloodImage_0000: bccd_mini_val has no such image; did you mean 'Bl" in err
    assert "unknown dataset 'blood'" in run(dataset="blood")[2]
    nowhere = str(tmp_path / "no" / "page.md")
    assert "there is no folder" in run("--page", nowhere)[2]
    config, weights = trained[DECOUPLED_RCNN.recipe]
    content = torch.load(weights, weights_only=True)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / config.name
    other.write_text(config.read_text())
    torch.save({**content, "classes": ["a", "b", "c"]}, other.with_suffix(".pth"))
    own = ("--skip-missing", "--model", str(other), str(other.with_suffix(".pth")))
    err = run(*own, models=[])[2]
    assert "knows the classes a, b, c, bccd_mini_val has RBC, WBC, Platelets; give --dataset" in err


def test_weights_that_are_named(trained):
    config, file = map(str, trained[PDNET.recipe])
    found = given_weights([(config, file), (SALT.recipe, file)])
    assert found[PDNET.recipe] == Weights(config=config, file=Path(file), seed=None)
    assert found[SALT.recipe].config == SALT.recipe
    with pytest.raises(ConfigError, match=r"shows no such recipe; did you mean 'pdnet_R_18_FPN_b"):
        given_weights([("pdnet_R_18_FPN_bccd_box", file)])
    with pytest.raises(ConfigError, match="is given twice; give one checkpoint of it"):
        given_weights([(config, file), (PDNET.recipe, file)])
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth: there is no such checkpoint"):
        given_weights([(config, "nothing.pth")])


def test_weights_that_are_sought(tmp_path):
    def training(name, folder="a"):
        file = tmp_path / folder / name / "model_final.pth"
        file.parent.mkdir(parents=True)
        file.touch()
        return file

    folders = [tmp_path / "a", tmp_path / "b"]
    right = training(f"{SALT.recipe}_seed1_0123456789ab")
    training(f"{SALT.recipe}_dpe_seed1_0123456789ab")
    training(f"{SALT.recipe}_seed1_5_iterations_0123456789ab")
    training(f"{SALT.recipe}_seed11_0123456789ab")
    second = training(f"{SALT.recipe}_seed2_0123456789ab", "b")
    assert find_weights(SALT, {}, folders, 1) == Weights(config=SALT.recipe, file=right, seed=1)
    assert find_weights(SALT, {}, folders, 2).file == second
    assert find_weights(SALT, {}, folders, 3) is None
    assert find_weights(PDNET, {}, folders, 1) is None
    assert find_weights(FCOS, {}, [], 1) == Weights(config=FCOS.recipe, file=None, seed=None)
    given = Weights(config="x", file=second, seed=None)
    assert find_weights(SALT, {SALT.recipe: given}, folders, 1) is given
    twice = training(f"{SALT.recipe}_seed1_ba9876543210", "b")
    with pytest.raises(ConfigError, match="was trained 2 times with seed 1") as caught:
        find_weights(SALT, {}, folders, 1)
    assert f"{right} and {twice}; say which by --model {SALT.recipe} FILE" in str(caught.value)


def test_where_weights_come_from(tmp_path):
    file = tmp_path / "training" / "model_final.pth"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    digest = f"`{hashlib.sha256(b'weights').hexdigest()[:12]}`"
    weights = Weights(config=SALT.recipe, file=file, seed=2)
    assert provenance(SALT, weights, tmp_path) == ("2", "unknown", "unknown", digest)
    (file.parent / "evaluation.json").write_text(json.dumps({"metrics": {"AP": 46.38}}))
    assert provenance(SALT, weights, tmp_path) == ("2", "46.4", "unknown", digest)
    kept = {"metrics": {"AP": 46.38}, "commit": {"id": "cd525871234"}}
    (tmp_path / f"{SALT.recipe}_seed2.json").write_text(json.dumps(kept))
    assert provenance(SALT, weights, tmp_path) == ("2", "46.4", "`cd52587`", digest)
    kept["metrics"]["AP"] = 46.39  # of another training
    (tmp_path / f"{SALT.recipe}_seed2.json").write_text(json.dumps(kept))
    assert provenance(SALT, weights, tmp_path) == ("2", "46.4", "unknown", digest)
    named = Weights(config=SALT.recipe, file=file, seed=None)
    assert provenance(SALT, named, tmp_path) == ("unknown", "unknown", "unknown", digest)
    best = file.rename(file.with_name("model_best.pth"))  # AP is of the last weights
    assert provenance(SALT, Weights(config="", file=best, seed=1), tmp_path)[1] == "unknown"
    none = Weights(config=FCOS.recipe, file=None, seed=None)
    assert provenance(FCOS, none, tmp_path)[3] == "none: it assigns by geometry alone"


def test_recipes_are_rows_of_the_experiment_and_trained_by_one_command():
    from d2_decouple.evaluation.small_data import ROWS

    rows = {row.recipe: row for row in ROWS}
    for model in MODELS:
        assert 1 in rows[model.recipe].seeds
        assert not rows[model.recipe].weights
    assert training_command([PDNET, SALT], 3) == (
        "python tools/bccd_table.py --data datasets/BCCD "
        "--only pdnet_R_18_FPN_bccd,salt_R_18_FPN_bccd --seeds 3 --no-table"
    )
    assert {model for section in SECTIONS for model in section.models} == {*MODELS}


def test_recipes_are_linked_from_where_the_page_lies(tmp_path):
    name, file = ATSS.recipe, f"configs/baselines/{ATSS.recipe}.py"
    assert gallery._recipe_link(ATSS, ROOT / "page.md") == f"[{name}]({file})"
    assert gallery._recipe_link(ATSS, ROOT / "docs" / "a" / "page.md") == f"[{name}](../../{file})"
    assert gallery._recipe_link(ATSS, tmp_path / "page.md") == f"`{name}`"


def test_the_kept_page_shows_all_and_nothing_else():
    text = PAGE.read_text(encoding="utf-8")
    assert [*blocks(text)] == [*(x.name for x in SECTIONS), "made with"]
    pictures = links(text)
    assert 6 <= len(pictures) <= 10
    assert all(len(alt) > 20 for alt, _ in pictures)
    files = [PAGE.parent / file for _, file in pictures]
    assert sorted(files) == sorted((PAGE.parent / "gallery").iterdir())
    assert all(file.stat().st_size <= 150_000 for file in files)
    assert "Not drawn" not in text
    for model in MODELS:
        (row,) = re.findall(rf"^\| {re.escape(model.title)} \| (.*)$", text, re.MULTILINE)
        name, link = re.findall(r"\[(\w+)\]\(([^)]+)\)", row)[0]
        assert find_config(name) == (PAGE.parent / link).resolve()
        assert model.trained == bool(re.search(r"`[0-9a-f]{12}`", row))
    assert all(f"`{name}`" in text for name in gallery.IMAGES)


def test_the_tool_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tools" / "gallery.py"), run_name="__main__")
    assert "python -m d2_decouple.gallery" in capsys.readouterr().out
