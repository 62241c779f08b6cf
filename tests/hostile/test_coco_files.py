# SPDX-License-Identifier: Apache-2.0
"""Whatever is changed in a COCO file: records that hold, or an error of ours."""

import copy
import json

from cases import picture
from fuzzing import PROFILE, Log, answer, changed, changes, check_records, folder_with, repeated
from hypothesis import example, given
from hypothesis import strategies as st

from d2_decouple.data import DataError, load_coco

SIZES = {"width": 60, "height": 40}
CONTENT = {
    "images": [
        {"id": 1, "file_name": "a.png", **SIZES},
        {"id": "x", "file_name": "sub/b.png", **SIZES},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [3, 4, 20, 30.5], "area": 300},
        {"id": 2, "image_id": "x", "category_id": 0, "bbox": [3, 4, 20, 30], "iscrowd": 1},
    ],
    "categories": [{"id": 7, "name": "cat", "supercategory": "pet"}, {"id": 0, "name": "dog"}],
}
NAMES = ["a.png", "../outside/secret.png", "a\0.png", "\ud800", "", ".", "a" * 999, "sub"]
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-2, 8),
        st.just(10**400),
        st.floats(),
        st.text(st.characters(), max_size=8),
        st.sampled_from(NAMES),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(node, path=()):
    """Of every value in the content."""
    yield path
    for key, value in (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    ):
        yield from paths(value, (*path, key))


def replaced(path, value):
    """The content with another value at one place."""
    content = copy.deepcopy(CONTENT)
    if not path:
        return value
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return content


structures = st.builds(replaced, st.sampled_from([*paths(CONTENT)]), values)
texts = st.one_of(
    structures.map(lambda content: json.dumps(content).encode()),
    changes.map(lambda how: changed(json.dumps(CONTENT).encode(), how)),
)


def test_whatever_is_in_a_coco_file(tmp_path):
    picture(tmp_path / "a.png")
    image = (tmp_path / "a.png").read_bytes()
    log = Log()

    @PROFILE
    @given(texts)
    @example(json.dumps(CONTENT).encode())
    def check(text):
        files = {"a.png": image, "images/a.png": image, "images/sub/b.png": image}
        with folder_with({**files, "instances.json": text}) as folder:

            def read():
                return load_coco(folder / "instances.json", folder / "images")

            records = answer(read, (DataError, FileNotFoundError), log)
            if records is not None:
                check_records(records, folder, 3)

    repeated(check, log)
    assert log.answers["read"]
    assert log.answers["DataError"]
