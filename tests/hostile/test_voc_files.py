# SPDX-License-Identifier: Apache-2.0
"""Whatever is changed in a folder in VOC's layout: records that hold, or an error of ours."""

from cases import picture, voc_xml
from fuzzing import PROFILE, Log, answer, changed, changes, check_records, folder_with, repeated
from hypothesis import example, given
from hypothesis import strategies as st

from d2_decouple.data import DataError, load_voc

XML, LIST = "Annotations/a.xml", "ImageSets/Main/train.txt"


def test_whatever_is_in_a_voc_folder(tmp_path):
    picture(tmp_path / "a.png")
    image = (tmp_path / "a.png").read_bytes()
    files = {
        "a.png": image,
        "JPEGImages/a.png": image,
        "JPEGImages/b.png": image,
        XML: voc_xml().encode(),
        "Annotations/b.xml": voc_xml(filename="b.png").encode(),
        LIST: b"a\nb\n",
    }
    log = Log()

    @PROFILE
    @given(st.sampled_from([XML, XML, LIST]), changes)
    @example(XML, [])  # as it was
    def check(name, how):
        with folder_with({**files, name: changed(files[name], how)}) as folder:

            def read():
                return load_voc(folder, "train", ["cat", "dog"])

            records = answer(read, (DataError, FileNotFoundError), log)
            if records is not None:
                check_records(records, folder, 2)

    repeated(check, log)
    assert log.answers["read"]
    assert log.answers["DataError"]
