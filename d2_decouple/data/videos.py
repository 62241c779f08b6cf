# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file, and a video file of frames, in the order red, green, blue."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np

__all__ = ["VideoError", "VideoReader", "VideoWriter"]

_logger = logging.getLogger(__name__)
_USUAL_FPS = 25.0
_MOST = 0.9  # of the frames that a file declares, which some only estimate
# Tried in this order: not every OpenCV can write the first.
_CODECS = ((".mp4", "mp4v"), (".avi", "MJPG"))


class VideoError(ValueError):
    """A video that cannot be read or written; the message names it, and why."""


class VideoReader:
    """Iterate over (index, frame): a frame is (H, W, 3) uint8, red first, rotated as displayed.

    Attributes:
        fps: frames per second that the file declares; 25 where it declares none.
    """

    def __init__(self, path: Path, *, every: int = 1) -> None:
        """
        Args:
            path: of the file.
            every: take the first of each so many frames.

        Raises:
            VideoError: it is missing, or no video that OpenCV can decode.
        """
        self._path, self._every = path, every
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise VideoError(f"{path} cannot be opened as a video: missing, damaged or unknown")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = float(fps) if 0 < fps < 1000 else _USUAL_FPS  # NaN is no number either

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        index = 0
        declared = int(max(0.0, self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        while self._capture.grab():
            if index % self._every == 0:
                decoded, frame = self._capture.retrieve()
                if not decoded:
                    break
                yield index, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            index += 1
        if not index:
            raise VideoError(f"{self._path} holds no frame that can be decoded")
        if index < _MOST * declared:
            _logger.warning(
                "%s: only %d frames of about %d could be decoded; it may be damaged or cut off",
                self._path,
                index,
                declared,
            )

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        self._capture.release()


class VideoWriter:
    """Writes frames of one size; the file begins with the first of them.

    Attributes:
        path: of the file, with the suffix of the format that could be written; None before.
    """

    def __init__(self, path: Path, *, fps: float) -> None:
        """
        Args:
            path: of the file, without its suffix.
            fps: frames per second.
        """
        self._stem, self._fps = path, fps
        self._writer: Any = None
        self.path: Path | None = None

    def write(self, frame: np.ndarray) -> None:
        """Add a frame (H, W, 3) uint8, red first.

        Raises:
            VideoError: this OpenCV can write no video there.
        """
        if self._writer is None:
            self._open(frame.shape[1], frame.shape[0])
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def _open(self, width: int, height: int) -> None:
        for suffix, codec in _CODECS:
            path = self._stem.with_name(self._stem.name + suffix)
            fourcc = cv2.VideoWriter.fourcc(*codec)
            writer = cv2.VideoWriter(str(path), fourcc, self._fps, (width, height))
            if writer.isOpened():
                self._writer, self.path = writer, path
                return
            writer.release()
        raise VideoError(
            f"{self._stem}: OpenCV can write neither "
            + " nor ".join(f"{codec} in {suffix}" for suffix, codec in _CODECS)
            + f" with {width} x {height} pixels there; is the folder writable?"
        )

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()
