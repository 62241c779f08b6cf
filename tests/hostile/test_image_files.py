# SPDX-License-Identifier: Apache-2.0
"""Whatever is changed in an image: pixels, or an error of ours; the checks say the same."""

import threading

import numpy as np
import pytest
from cases_of_images import samples
from fuzzing import PROFILE, Log, answer, changed, changes, folder_with, repeated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d2_decouple.data.image_checks import read_facts
from d2_decouple.data.images import ImageError, read_rgb

LIMIT = 1_000_000  # pixels; of random sizes many are larger


def test_whatever_is_in_an_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", LIMIT // 2)
    images, log = samples(), Log()

    @PROFILE
    @given(st.sampled_from(sorted(images)), changes)
    def check(name, how):
        with folder_with({"a.png": images["a.png"], name: changed(images[name], how)}) as folder:
            file = folder / name
            pixels = answer(lambda: read_rgb(file), (ImageError,), log)
            headers, decoded = (
                next(iter(read_facts([str(file)], decode=decode))) for decode in (False, True)
            )
            if pixels is None:
                return
            assert pixels.dtype == np.uint8
            height, width, channels = pixels.shape
            assert channels == 3
            assert 0 < height * width <= LIMIT
            for facts in (headers, decoded):
                assert facts.error or facts.shown == (width, height)

    repeated(check, log)
    assert log.answers["read"]
    assert log.answers["ImageError"]


@pytest.mark.parametrize("decode", [False, True])
def test_no_thread_waits_for_a_reader_that_gave_up(tmp_path, decode):
    file = tmp_path / "a.png"
    file.write_bytes(samples()["a.png"])
    before = threading.active_count()
    facts = read_facts([str(file)] * 9, decode=decode)
    assert next(facts).shown == (13, 9)
    assert threading.active_count() == before


@pytest.mark.parametrize("name", sorted(samples()))
def test_the_images_are_read_as_they_are(tmp_path, name):
    (tmp_path / name).write_bytes(samples()[name])
    shape = (13, 9, 3) if name == "a.jpg" else (9, 13, 3)  # that one is turned by EXIF
    assert read_rgb(tmp_path / name).shape == shape
