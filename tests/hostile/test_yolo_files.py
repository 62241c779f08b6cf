# SPDX-License-Identifier: Apache-2.0
"""Whatever is changed in a folder with YOLO's labels: records that hold, or an error of ours."""

from cases import picture
from detectron2.data import DatasetCatalog, MetadataCatalog
from fuzzing import PROFILE, Log, answer, changed, changes, check_records, folder_with, repeated
from hypothesis import example, given
from hypothesis import strategies as st

from d2_decouple.data import DataError, register_folder

LABELS, YAML, LIST = "labels/train/a.txt", "data.yaml", "val.txt"


def test_whatever_is_in_a_yolo_folder(tmp_path):
    picture(tmp_path / "a.png")
    image = (tmp_path / "a.png").read_bytes()
    files = {
        "a.png": image,
        "images/train/a.png": image,
        "images/train/b.png": image,
        "b/c.png": image,
        "b/c.txt": b"",
        "labels/train/b.txt": b"0 0.5 0.5 0.2 0.2\n",
        LABELS: b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.2 0.2 0.3 0.1\n",
        YAML: b"path: .\ntrain: images/train\nval: val.txt\nnc: 2\nnames: [cat, dog]\n",
        LIST: b"images/train/b.png\nb/c.png\n",
    }
    log = Log()

    @PROFILE
    @given(st.sampled_from([LABELS, YAML, LIST]), changes)
    @example(YAML, [])  # as it was
    def check(name, how):
        with folder_with({**files, name: changed(files[name], how)}) as folder:
            found = answer(lambda: register_folder(folder), (DataError, FileNotFoundError), log)
            if found is None:
                return
            for dataset in (found.train, found.test):
                check_records(DatasetCatalog.get(dataset), folder, len(found.classes))
                DatasetCatalog.remove(dataset)
                MetadataCatalog.remove(dataset)

    repeated(check, log)
    assert log.answers["read"]
    assert log.answers["DataError"]
