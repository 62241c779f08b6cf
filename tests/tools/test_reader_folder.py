# SPDX-License-Identifier: Apache-2.0
"""The folder in which commands of the documents are run is a reader's, and clean."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers_of_tools import ROOT, TOOLS

sys.path.append(str(TOOLS))
reader_folder = importlib.import_module("reader_folder")
document_commands = importlib.import_module("document_commands")
execute = importlib.import_module("run_documents").execute
Decision, Need, RUN = document_commands.Decision, document_commands.Need, document_commands.RUN

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a clone is needed")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    data = tmp_path_factory.mktemp("BCCD")
    return reader_folder.ReaderFolder(tmp_path_factory.mktemp("reader"), data)


@needs_git
def test_a_reader_has_a_clone_and_images_where_the_documents_have_them(reader) -> None:
    root = reader.root
    for name in ("tools/demo.py", "docs/commands.md", "d2_decouple/train.py", ".git/HEAD"):
        assert (root / name).is_file()
        assert not (root / name).is_symlink()
    assert not (root / ".venv").exists()
    content = json.loads((root / "datasets/coco/annotations/instances_train2017.json").read_text())
    assert len(content["categories"]) == 80
    assert {x["category_id"] for x in content["annotations"]} <= {1, 2, 3}
    assert content["annotations"]
    for image in content["images"]:
        assert (root / "datasets/coco/train2017" / image["file_name"]).is_file()
    assert (root / "datasets/coco/annotations/instances_val2017.json").is_file()
    for year, split in (("VOC2007", "trainval"), ("VOC2007", "test"), ("VOC2012", "trainval")):
        names = (root / "datasets" / year / f"ImageSets/Main/{split}.txt").read_text().split()
        files = [root / "datasets" / year / f"Annotations/{name}.xml" for name in names]
        found = {x.text for file in files for x in ElementTree.parse(file).iterfind("object/name")}
        assert found
        assert found <= {"person", "dog", "cat"}
    assert (root / "datasets/BCCD").is_dir()
    assert len(list((root / "FOLDER/JPEGImages").iterdir())) == 12
    assert len((root / "FOLDER/ImageSets/Main/val.txt").read_text().split()) == 4


@needs_git
def test_a_document_begins_in_a_clean_folder(reader) -> None:
    (reader.root / "found").mkdir()
    (reader.root / "report.html").touch()
    (reader.root / "FOLDER" / "model_final.pth").touch()
    reader.clean()
    assert not (reader.root / "found").exists()
    assert not (reader.root / "report.html").exists()
    assert not (reader.root / "FOLDER" / "model_final.pth").exists()
    assert (reader.root / "picture.jpg").is_file()
    assert (reader.root / "README.md").is_file()


@needs_git
def test_weights_are_those_of_the_recipe_and_older_files_do_not_stand_in_the_way(
    reader, monkeypatch
) -> None:
    output = reader.root / "output"
    recipe = "fcos_R_18_FPN_bccd"
    reader.prepare("python tools/demo.py", [Need("output/model_best.pth", recipe)])
    saved = torch.load(output / "model_best.pth", weights_only=True)
    assert saved["classes"] == ["RBC", "WBC", "Platelets"]
    assert saved["model"]["head.cls_score.weight"].shape[0] == 3
    assert "FCOSPredictor" in (output / "config.yaml").read_text()
    # PDNet adds the classes' bias outside of a convolution: without it nothing would be found.
    reader.prepare("python x", [Need("output/p/model_final.pth", "pdnet_R_18_FPN_bccd")])
    saved = torch.load(output / "p" / "model_final.pth", weights_only=True)["model"]
    assert (saved["head.predictor.cls_score.bias"] == 0).all()
    # What an earlier command made is kept; what a training is called is made anew.
    for name in ("made.pth", "model_best.pth"):
        (output / name).write_bytes(b"made")
        reader.prepare("python x", [Need(f"output/{name}", recipe)])
    assert (output / "made.pth").read_bytes() == b"made"
    assert (output / "model_best.pth").stat().st_size > 10**6
    # One name stands for the files of several authors.
    monkeypatch.setitem(reader_folder._OFFICIAL, "pdnet", ("official_pdnet", "TINY"))
    (output / "OFFICIAL.pth").write_bytes(b"of another method")
    reader.prepare("python x", [Need("output/OFFICIAL.pth", "pdnet", official=True)])
    names = torch.load(output / "OFFICIAL.pth", weights_only=True)["model"]
    assert "module.backbone.body.stem.conv1.weight" in names
    # A training and the converter refuse to replace files.
    reader.prepare("python tools/convert_checkpoint.py --back salt in.pth output/made.pth", [])
    assert not (output / "made.pth").exists()
    reader.prepare("python -m d2_decouple.train --config-file x --eval-only", [])
    assert output.exists()
    for command in ("python -m d2_decouple.train", "torchrun --nnodes 2 -m d2_decouple.train"):
        output.mkdir(exist_ok=True)
        (reader.root / "FOLDER" / "model_final.pth").touch()
        reader.prepare(f"{command} --config-file x train.output_dir=FOLDER", [])
        assert not output.exists()
        assert not (reader.root / "FOLDER" / "model_final.pth").exists()
        assert (reader.root / "FOLDER" / "JPEGImages").is_dir()


@needs_git
def test_commands_find_the_clone_and_not_the_callers_data(reader, monkeypatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    variables = reader.environment()
    assert "DETECTRON2_DATASETS" not in variables
    assert variables["PATH"].startswith(str(Path(sys.executable).parent))
    code = "python -c 'import d2_decouple; print(d2_decouple.__file__)'"
    status, output = execute(Decision(RUN, code), reader.root.parent, variables, 60)
    assert (status, Path(output.strip()).parents[1]) == (0, reader.root)
