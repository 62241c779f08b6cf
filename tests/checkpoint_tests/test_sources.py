# SPDX-License-Identifier: Apache-2.0
"""Weights by name are found, fetched once, or the message says what to type instead."""

import email.message
import io
import sys
import types
import urllib.error
import urllib.request

import pytest
import torch

from d2_decouple.checkpoint import sources
from d2_decouple.checkpoint.errors import CheckpointError, DamagedCheckpointError
from d2_decouple.checkpoint.sources import local_file, read_safetensors

NAMES = ["resnet18.a1_in1k", "resnet50.a1_in1k"]
URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder for downloads, and no network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    "path", ["weights.pth", "/a/b.pkl", "", "s3://host/x.pth?dl=1", "/a.pth?x=1", "runs/a.pth"]
)
def test_paths_and_queries_stay(path):
    assert local_file(path) == path


@pytest.mark.parametrize("name", ["resnet18", "resnet18.IMAGENET1K_V1"])
def test_torchvisions_weights_are_fetched_once(name, hub, monkeypatch):
    asked = []

    def download(url, dst, hash_prefix, progress):
        asked.append((url, hash_prefix))
        torch.save({"conv1.weight": torch.ones(1)}, dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    files = [local_file(f"torchvision://{name}") for _ in range(2)]
    assert files == [str(hub / "resnet18-f37072fd.pth")] * 2
    assert asked == [(URL, "f37072fd")]


def test_torchvisions_weights_without_a_network(hub):
    with pytest.raises(CheckpointError) as raised:
        local_file("torchvision://resnet18")
    message = str(raised.value)
    assert "torchvision://resnet18 could not be fetched" in message
    assert f"bring the file (that is {URL}) here" in message
    assert "train.init_checkpoint (yacs: MODEL.WEIGHTS) to it, or to an empty string" in message
    assert list(hub.iterdir()) == []


def test_a_file_with_another_hash_is_not_kept(hub, monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: _Response(b"not these weights"))
    with pytest.raises(CheckpointError, match=r"resnet18 could not be fetched \(invalid hash"):
        local_file("torchvision://resnet18")
    assert list(hub.iterdir()) == []


class _Response(io.BytesIO):
    def info(self):
        return email.message.Message()


@pytest.mark.parametrize(
    ("source", "nearest"),
    [
        ("torchvision://resnet5", "'torchvision://resnet50'"),
        ("torchvision://resnet50.IMAGENET1K_V3", "'torchvision://resnet50.IMAGENET1K_V2'"),
        ("torchvision://vgg16", "torchvision://"),
        ("torchvison://resnet50", "'torchvision://'"),
        ("catalog://ImageNetPretrained/MSRA/R-5", "'detectron2://ImageNetPretrained/MSRA/R-50.pkl"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(source, nearest, hub):
    with pytest.raises(CheckpointError) as raised:
        local_file(source)
    assert f"{source} is no name of weights" in str(raised.value)
    assert nearest in str(raised.value)


def test_detectron2s_catalogue(monkeypatch, tmp_path):
    known = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    (tmp_path / "R-50.pkl").touch()
    asked = []

    def kept(url, called):
        asked.append((url, called))
        return tmp_path / "R-50.pkl"

    monkeypatch.setattr(sources, "download", kept)
    assert local_file(known) == str(tmp_path / "R-50.pkl")
    folder = "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA"
    assert asked == [(f"{folder}/R-50.pkl", known)]

    def missing(url, called):
        raise urllib.error.HTTPError(url, 403, "Forbidden", None, None)

    monkeypatch.setattr(sources, "download", missing)
    with pytest.raises(CheckpointError, match=r"R50\.pkl is no .* \(.*403.*MSRA/R-50\.pkl'"):
        local_file("detectron2://ImageNetPretrained/MSRA/R50.pkl")
    with pytest.raises(CheckpointError, match=r"R-50\.pkl could not be fetched"):
        local_file(known)


def test_a_query_behind_detectron2s_names_is_fetched_like_any_other(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(sources, "download", lambda url, called: asked.append(url) or tmp_path)
    name, pin = "ImageNetPretrained/a.pkl", "#sha256=01234567"
    found = local_file(f"detectron2://{name}?x=1&matching_heuristics=True{pin}")
    assert found == f"{tmp_path}?matching_heuristics=True"
    assert asked == [f"https://dl.fbaipublicfiles.com/detectron2/{name}?x=1{pin}"]
    with pytest.raises(CheckpointError, match=r"HTTPS://h/a\.pth\?x=1 is no name .* https://"):
        local_file("HTTPS://h/a.pth?x=1")


def test_detectron2s_catalogue_without_a_network(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as raised:
        local_file("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert "detectron2://ImageNetPretrained/MSRA/R-50.pkl could not be" in str(raised.value)
    place = "dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    assert f"bring the file https://{place} here and put it to {tmp_path}" in str(raised.value)


def fake_timm(monkeypatch, tmp_path):
    """Stand-ins of timm and the hub's client, which know two models and have their files."""
    fetched = []

    def entry(name):
        return types.SimpleNamespace(hf_hub_id=f"timm/{name}", hf_hub_filename=None)

    def fetch(repository, filename):
        fetched.append((repository, filename))
        return str(tmp_path / filename)

    timm = types.ModuleType("timm")
    timm.list_models = lambda pretrained: [*NAMES, "resnet50d.ra2", "vit_base.x"]
    timm.get_pretrained_cfg = entry
    client = types.ModuleType("huggingface_hub")
    client.hf_hub_download = fetch
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    return client, fetched


def test_timms_weights_come_with_their_normalisation(monkeypatch, tmp_path):
    _, fetched = fake_timm(monkeypatch, tmp_path)
    assert local_file("timm://resnet50.a1_in1k") == str(tmp_path / "model.safetensors")
    files = ["config.json", "model.safetensors"]
    assert fetched == [("timm/resnet50.a1_in1k", file) for file in files]
    assert local_file("timm://resnet50") == str(tmp_path / "model.safetensors")
    for wrong, known in {
        "resnet50.a1_in": "did you mean 'timm://resnet50.a1_in1k'",
        "resnet5": "did you mean 'timm://resnet50'",
        "resnet50d.ra2": "did you mean 'timm://resnet50'",
        "vit_base.x": "timm://resnet18",
    }.items():
        with pytest.raises(CheckpointError) as raised:
            local_file(f"timm://{wrong}")
        assert f"timm://{wrong} is no name of weights that can be used" in str(raised.value)
        assert known in str(raised.value)


def test_timms_weights_without_a_network(monkeypatch, tmp_path):
    client, _ = fake_timm(monkeypatch, tmp_path)

    def offline(repository, filename):
        raise FileNotFoundError("check your connection")

    client.hf_hub_download = offline
    with pytest.raises(CheckpointError) as raised:
        local_file("timm://resnet18.a1_in1k")
    assert "timm://resnet18.a1_in1k could not be fetched (check your" in str(raised.value)
    assert "bring the file (that is model.safetensors and config.json of" in str(raised.value)


def test_names_of_the_real_timm(monkeypatch, tmp_path):
    timm = pytest.importorskip("timm")
    client = types.ModuleType("huggingface_hub")
    client.hf_hub_download = lambda repository, filename: f"{repository}/{filename}"
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    assert local_file("timm://resnet50.a1_in1k") == "timm/resnet50.a1_in1k/model.safetensors"
    assert local_file("timm://resnet18").startswith("timm/resnet18.")
    with pytest.raises(CheckpointError, match=r"'timm://resnet18\.a1_in1k'"):
        local_file("timm://resnet18.a1_in")
    known = [name for name in timm.list_models(pretrained=True) if name.startswith("resnet50.")]
    assert all(timm.get_pretrained_cfg(name).hf_hub_id for name in known)


def test_a_missing_package_is_named(monkeypatch):
    def without(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(sources.importlib, "import_module", without)
    with pytest.raises(CheckpointError, match=r"timm://resnet50 needs .* timm .*pip install timm"):
        local_file("timm://resnet50")
    with pytest.raises(CheckpointError, match=r"x\.safetensors needs .*pip install safetensors"):
        read_safetensors("x.safetensors")


def test_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    file = tmp_path / "model.safetensors"
    library.save_file({"conv1.weight": torch.arange(3.0)}, str(file))
    assert torch.equal(read_safetensors(str(file))["conv1.weight"], torch.arange(3.0))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors cannot be read"):
        read_safetensors(str(file))
