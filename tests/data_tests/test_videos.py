# SPDX-License-Identifier: Apache-2.0
"""Videos come back as they were written, as far as their codec allows."""

import cv2
import numpy as np
import pytest

from d2_decouple.data import videos
from d2_decouple.data.videos import VideoError, VideoReader, VideoWriter


def film(folder, count=7, size=(48, 64), fps=10.0):
    """Frames that become brighter, and whose left half is red."""
    with VideoWriter(folder / "film.v2", fps=fps) as writer:
        for index in range(count):
            frame = np.full((*size, 3), 20 * index, np.uint8)
            frame[:, : size[1] // 2] = (200, 0, 0)
            writer.write(frame)
    return writer.path


def test_frames_come_back_in_order_with_their_colours(tmp_path):
    path = film(tmp_path)
    assert path.name == "film.v2.mp4"
    with VideoReader(path) as reader:
        assert reader.fps == pytest.approx(10)
        frames = list(reader)
    assert [index for index, _ in frames] == list(range(7))
    for index, frame in frames:
        assert frame.shape == (48, 64, 3)
        assert frame[24, 10, 0] > 150 > 60 > frame[24, 10, 2]
        assert abs(int(frame[24, 50].mean()) - 20 * index) < 12


def test_each_nth_frame_is_taken(tmp_path):
    with VideoReader(film(tmp_path), every=3) as reader:
        assert [index for index, _ in reader] == [0, 3, 6]


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    for name in ("bad.mp4", "none.mp4"):
        with pytest.raises(VideoError, match=rf"{name} cannot be opened as a video"):
            VideoReader(tmp_path / name)


def test_a_video_cut_off_ends_or_is_named(tmp_path):
    path = film(tmp_path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(VideoError, match=r"film\.v2\.mp4"), VideoReader(path) as reader:
        list(reader)


def test_frames_that_are_missing_are_counted(tmp_path, caplog):
    path = film(tmp_path, count=12)
    with caplog.at_level("WARNING"), VideoReader(path) as reader:
        assert len(list(reader)) == 12
    assert not caplog.text
    with VideoReader(path) as reader:
        reader._capture = Declaring(reader._capture, 120)
        list(reader)
    assert "only 12 frames of about 120 could be decoded" in caplog.text


class Declaring:
    """A capture of a file that declares more frames than it holds."""

    def __init__(self, capture, frames):
        self.capture, self.frames = capture, frames

    def get(self, what):
        return self.frames if what == cv2.CAP_PROP_FRAME_COUNT else self.capture.get(what)

    def __getattr__(self, name):
        return getattr(self.capture, name)


def test_where_the_first_codec_is_missing_the_second_is_written(tmp_path, monkeypatch):
    class OnlyAvi:
        def __init__(self, path, *args):
            self.works = path.endswith(".avi")
            self.frames = []

        def isOpened(self):  # noqa: N802 - OpenCV's name
            return self.works

        def write(self, frame):
            self.frames.append(frame)

        def release(self):
            pass

        fourcc = staticmethod(cv2.VideoWriter.fourcc)

    monkeypatch.setattr(videos.cv2, "VideoWriter", OnlyAvi)
    assert film(tmp_path).name == "film.v2.avi"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    writer = VideoWriter(tmp_path / "none" / "film", fps=10)
    with pytest.raises(VideoError, match=r"none/film: OpenCV can write neither mp4v in \.mp4"):
        writer.write(np.zeros((8, 8, 3), np.uint8))
