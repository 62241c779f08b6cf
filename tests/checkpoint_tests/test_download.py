# SPDX-License-Identifier: Apache-2.0
"""Files from a server on this machine: fetched once, whole, and with the hash that was wanted."""

import hashlib
import io
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from torch import nn

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.checkpoint import download as module
from d2_decouple.checkpoint.download import Address, download, parse_address
from d2_decouple.checkpoint.errors import CheckpointError, DamagedCheckpointError
from d2_decouple.checkpoint.sources import local_file

CONTENT = b"weights" * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()
PIN = "a" * 64


class Handler(BaseHTTPRequestHandler):
    """Serves what the test put into the server's ``files``, and counts."""

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        if self.server.in_pieces:  # the last of which, an empty one, does not come
            self.send_header("Transfer-Encoding", "chunked")
            content = f"{len(content):x}\r\n".encode() + content + b"\r\n"
        else:
            self.send_header("Content-Length", str(len(content) + self.server.kept_back))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.files, http.asked, http.kept_back = {"/models/a.pth": CONTENT}, [], 0
    http.in_pieces = False
    http.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()


def left(folder):
    return sorted(x.name for x in folder.rglob("*") if x.is_file() and x.suffix != ".lock")


def test_a_file_is_fetched_once_and_its_hash_is_kept(server, tmp_path):
    file = download(f"{server.url}/models/a.pth")
    assert file.read_bytes() == CONTENT
    host = f"127.0.0.1_{server.server_port}"
    assert file == tmp_path / "cache" / host / "models" / "a.pth"
    assert (file.parent / "a.pth.sha256").read_text() == SHA + "\n"
    assert download(f"{server.url}/models/a.pth") == file
    assert server.asked == ["/models/a.pth"]
    assert left(tmp_path) == ["a.pth", "a.pth.sha256"]


@pytest.mark.parametrize("digits", [8, 64])
def test_a_pinned_file_comes_if_it_is_the_right_one(server, digits):
    pin = SHA[:digits].upper() if digits == 8 else SHA
    assert download(f"{server.url}/models/a.pth#sha256={pin}").read_bytes() == CONTENT
    assert server.asked == ["/models/a.pth"]  # the pin is not the server's business


def test_another_file_than_the_pinned_one_is_thrown_away(server, tmp_path):
    with pytest.raises(DamagedCheckpointError) as raised:
        download(f"{server.url}/models/a.pth#sha256={PIN}", called="my weights")
    assert f"my weights was fetched, and its SHA-256 begins with {SHA[:16]}" in str(raised.value)
    assert f"wanted is {PIN}" in str(raised.value)
    assert left(tmp_path) == []


def test_the_hash_in_a_files_name_is_a_pin(server, tmp_path):
    server.files["/net-0123abcd.pth"] = CONTENT
    with pytest.raises(DamagedCheckpointError, match="wanted is 0123abcd"):
        download(f"{server.url}/net-0123abcd.pth")
    server.files[f"/net-{SHA[:8]}.pth"] = CONTENT
    assert download(f"{server.url}/net-{SHA[:8]}.pth").read_bytes() == CONTENT
    assert left(tmp_path) == [f"net-{SHA[:8]}.pth", f"net-{SHA[:8]}.pth.sha256"]


@pytest.mark.parametrize("path", ["/a.pth?token=1", "/a.pth?"])
def test_a_query_does_not_skip_the_pin(server, tmp_path, path):
    server.files[path] = CONTENT
    with pytest.raises(DamagedCheckpointError, match=f"wanted is {PIN}"):
        local_file(f"{server.url}{path}#sha256={PIN}")
    assert left(tmp_path) == []
    file = local_file(f"{server.url}{path}#sha256={SHA}")
    assert server.asked == [path] * 2
    with open(file, "ab") as kept:
        kept.write(b"!")
    with pytest.raises(DamagedCheckpointError, match=r"\.sha256 says"):
        local_file(server.url + path)


def test_each_query_has_a_file_below_its_host(server, tmp_path):
    names = ["/c/m.safetensors", "/c/m.safetensors?download=true", "/c/m.safetensors?v=../2"]
    for name in names:
        server.files[name] = name.encode()
    files = [Path(local_file(server.url + name)) for name in names * 2]
    assert [file.read_text() for file in files] == names * 2
    assert server.asked == names
    assert {file.parent for file in files} == {
        tmp_path / "cache" / f"127.0.0.1_{server.server_port}" / "c"
    }
    assert {file.suffix for file in files} == {".safetensors"}
    assert len({file.name for file in files}) == 3
    assert all((file.parent / f"{file.name}.sha256").is_file() for file in files)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"layer": nn.Linear(2, 2)})


def test_detectron2s_heuristics_are_no_part_of_the_address(server, tmp_path):
    weights = nn.Linear(2, 2).state_dict()
    content = io.BytesIO()
    torch.save({f"layer.{name}": x for name, x in weights.items()}, content)
    server.files["/a.pth"] = server.files["/a.pth?token=1"] = content.getvalue()
    pin = f"#sha256={hashlib.sha256(content.getvalue()).hexdigest()}"
    parameter = "matching_heuristics=True"
    (tmp_path / "mine.pth").write_bytes(content.getvalue())
    for source in (
        f"{server.url}/a.pth?{parameter}{pin}",
        f"{server.url}/a.pth?token=1&{parameter}{pin}",
        f"{tmp_path / 'mine.pth'}?{parameter}",
    ):
        model = Net()
        Checkpointer(model, complete=True).load(source)
        assert torch.equal(model.net["layer"].weight, weights["weight"])
    assert server.asked == ["/a.pth", "/a.pth?token=1"]
    for source in ("/a.pth?token=1", "/a.pth?matching_heuristics=False"):
        with pytest.raises(CheckpointError, match="none of the 2 tensors"):
            Checkpointer(Net()).load(server.url + source)
    assert server.asked == ["/a.pth", "/a.pth?token=1"]
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*mine\.pth\?x=1; set"):
        Checkpointer(Net()).load(f"{tmp_path / 'mine.pth'}?x=1")


def test_a_path_may_be_a_path(tmp_path):
    model = nn.Linear(2, 2)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    for method in ("load", "resume_or_load"):
        other = nn.Linear(2, 2)
        getattr(Checkpointer(other), method)(tmp_path / "a.pth")
        assert torch.equal(other.weight, model.weight)


def test_a_file_that_changed_later_is_not_used(server):
    address = f"{server.url}/models/a.pth"
    file = download(address)
    file.write_bytes(CONTENT + b"!")
    with pytest.raises(DamagedCheckpointError) as raised:
        download(address)
    assert f"a.pth.sha256 says {SHA[:16]}" in str(raised.value)
    assert f"delete it and {file.name}.sha256" in str(raised.value)
    (file.parent / "a.pth.sha256").unlink()
    with pytest.raises(DamagedCheckpointError, match=f"the address says {SHA[:16]}"):
        download(f"{address}#sha256={SHA}")


def test_a_file_put_there_by_hand_is_used_and_watched_from_then_on(server, tmp_path):
    file = tmp_path / "cache" / f"127.0.0.1_{server.server_port}" / "b.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    assert download(f"{server.url}/b.pth") == file
    assert server.asked == []
    file.write_bytes(b"x")
    with pytest.raises(DamagedCheckpointError):
        download(f"{server.url}/b.pth")


def test_a_download_that_breaks_off_leaves_nothing(server, tmp_path):
    server.kept_back = 5
    with pytest.raises(CheckpointError, match=r"could not be fetched .*bytes"):
        download(f"{server.url}/models/a.pth")
    assert left(tmp_path) == []


def test_pieces_that_break_off_leave_nothing(server, tmp_path):
    server.in_pieces = True
    with pytest.raises(CheckpointError, match=r"could not be fetched \(IncompleteRead.*bring the"):
        download(f"{server.url}/models/a.pth")
    assert left(tmp_path) == []


def test_an_address_with_a_blank_is_named(server):
    with pytest.raises(CheckpointError, match=r"my weights\.pth could not be fetched \(URL can't"):
        download(f"{server.url}/models/my weights.pth")


def test_a_cache_that_cannot_be_made_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match=r"could not be fetched \(.*Not a directory.*put it"):
        download(f"{server.url}/models/a.pth")


def test_a_damaged_note_is_another_hash(server):
    file = download(f"{server.url}/models/a.pth")
    (file.parent / "a.pth.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedCheckpointError, match=r"delete it and a\.pth\.sha256"):
        download(f"{server.url}/models/a.pth")


def test_a_cache_that_is_somebody_elses_is_used(server, tmp_path, caplog):
    file = tmp_path / "cache" / f"127.0.0.1_{server.server_port}" / "b.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    (file.parent / "b.pth.sha256").mkdir()  # root could write into any folder
    assert download(f"{server.url}/b.pth") == file
    assert "b.pth is not watched" in caplog.text


def test_without_a_network_the_message_says_where_the_file_belongs(server, tmp_path):
    url = f"{server.url}/models/a.pth"
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError) as raised:
        local_file(url)
    message = str(raised.value)
    place = tmp_path / "cache" / f"127.0.0.1_{server.server_port}" / "models" / "a.pth"
    assert f"{url} could not be fetched" in message
    assert f"bring the file {url} here and put it to {place}" in message
    assert "train.init_checkpoint (yacs: MODEL.WEIGHTS)" in message
    place.write_bytes(CONTENT)
    assert local_file(url) == str(place)


def test_a_file_that_the_server_does_not_have(server, tmp_path):
    with pytest.raises(CheckpointError, match=r"b\.pth could not be fetched .*404"):
        local_file(f"{server.url}/b.pth")
    assert left(tmp_path) == []


def test_two_threads_fetch_a_file_once(server, monkeypatch):
    fetched = module._fetch
    monkeypatch.setattr(
        module, "_fetch", lambda *args: (threading.Event().wait(0.3), fetched(*args))
    )
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(download(f"{server.url}/models/a.pth")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("https://h/a.pth", Address("https://h/a.pth")),
        ("https://h/a.pth#sha256=0123ABCD", Address("https://h/a.pth", "0123abcd")),
        ("https://h/r18-f37072fd.pth", Address("https://h/r18-f37072fd.pth", "f37072fd")),
        ("https://h/r18-f37072fd.pth#sha256=" + PIN, Address("https://h/r18-f37072fd.pth", PIN)),
        ("https://h/r18-20200130.pth", Address("https://h/r18-20200130.pth")),  # a date
        ("https://h/checkpoint-00090000.pth", Address("https://h/checkpoint-00090000.pth")),
        ("https://h/a.pth?b=1#sha256=12345678", Address("https://h/a.pth?b=1", "12345678")),
        ("https://h/model_final_5bd44e.pkl", Address("https://h/model_final_5bd44e.pkl")),
    ],
)
def test_addresses(source, address):
    assert parse_address(source) == address


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://h/a.pth#sha256=xyz", r"ends in #sha256=xyz; wanted is #sha256= and 8 to 64"),
        ("https://h/a.pth#sha256=0123abc", r"wanted is #sha256="),
        ("https://h/a.pth#md5=0123abcd", r"wanted is #sha256="),
        ("https://h", r"https://h is no address of a file"),
        ("https:///a.pth", r"is no address of a file"),
    ],
)
def test_what_is_no_address(source, message, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        download(source)


def test_an_address_cannot_lead_out_of_the_cache(server, tmp_path):
    server.files["/../../out.pth"] = CONTENT
    server.files["/%2e%2e/out.pth"] = CONTENT
    for path in ("/../../out.pth", "/%2e%2e/out.pth"):
        assert (tmp_path / "cache").resolve() in download(server.url + path).resolve().parents


def test_a_folder_is_no_file(server):
    download(f"{server.url}/models/a.pth")
    with pytest.raises(CheckpointError, match=r"models names a folder"):
        download(f"{server.url}/models")


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_names_of_detectron2s_zoo(server, monkeypatch, suffix):
    name = "COCO-Detection/retinanet_R_50_FPN_1x"
    url = model_zoo.get_checkpoint_url(f"{name}.yaml")
    path = re.sub(r"https://[^/]+/", "/", url)
    server.files[path] = CONTENT
    monkeypatch.setattr(model_zoo.model_zoo._ModelZooUrls, "S3_PREFIX", f"{server.url}/detectron2/")
    file = local_file(name + suffix)
    assert file.endswith(path)
    assert server.asked == [path]


def test_a_misspelt_name_of_detectron2s_zoo():
    with pytest.raises(CheckpointError) as raised:
        local_file("COCO-Detection/retinanet_R_50_FPN_2x")
    assert "nor is there such a file" in str(raised.value)
    assert "'COCO-Detection/retinanet_R_50_FPN_3x'" in str(raised.value)


def test_a_file_named_like_a_model_of_the_zoo_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "COCO-mine").mkdir()
    (tmp_path / "COCO-mine" / "a.pth").touch()
    assert local_file("COCO-mine/a.pth") == "COCO-mine/a.pth"


def test_a_model_of_the_zoo_without_a_network(server, monkeypatch):
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(model_zoo.model_zoo._ModelZooUrls, "S3_PREFIX", f"{server.url}/detectron2/")
    name = "COCO-Detection/retinanet_R_50_FPN_1x"
    with pytest.raises(CheckpointError) as raised:
        local_file(name)
    assert f"{name} could not be fetched" in str(raised.value)
    assert f"bring the file {server.url}/detectron2/{name}/190397773/model_final" in str(
        raised.value
    )
