# SPDX-License-Identifier: Apache-2.0
"""Hostile images: headers that lie, programs in disguise, and much that was packed small."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from cases import Call, case, sparse
from PIL import Image

from d2_decouple.data.images import read_rgb

SIDE = 60_000


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    checked = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checked)


def png(side: int, *others: bytes, content: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *others, chunk(b"IDAT", content), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(side: int, bits: int) -> bytes:
    """Three colours, one strip, packed by deflate; of 32 bits they are fractions."""
    content = zlib.compress(bytes(1000))
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, 200), (259, 3, 1, 8)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 300), (277, 3, 1, 3), (278, 4, 1, side)]
    tags += [(279, 4, 1, len(content)), (284, 3, 1, 1)]
    tags += [(339, 3, 3, 210)]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    lists = struct.pack("<3H", *[bits] * 3).ljust(10, b"\0") + struct.pack(
        "<3H", *[1 if bits < 32 else 3] * 3
    )
    return (head.ljust(200, b"\0") + lists).ljust(300, b"\0") + content


def reading(folder: Path, name: str, content: bytes) -> Call:
    file = folder / name
    file.write_bytes(content)
    return lambda: read_rgb(file)


def large_header(name: str, content: bytes) -> None:
    """A case for a header that declares 60,000 x 60,000 pixels."""

    def make(folder: Path) -> Call:
        return reading(folder, name, content)

    make.__name__ = f"image_{SIDE}_{name.replace('.', '_')}"
    case(r"declares more pixels than are decoded: .*3600000000.*MAX_IMAGE_PIXELS", "ImageError")(
        make
    )


large_header("a.png", png(SIDE))
large_header("a.tif", tiff(SIDE, 8))
large_header("deep.tif", tiff(SIDE, 16))
large_header("fractions.tif", tiff(SIDE, 32))  # unknown to Pillow
bmp = struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, SIDE, SIDE, 1, 24, *[0] * 6)
large_header("a.bmp", b"BM" + bmp)
large_header("a.ppm", f"P6 {SIDE} {SIDE} 255\n".encode())
screen = struct.pack("<HHBBB6x", SIDE, SIDE, 128, 0, 0)
frame = struct.pack("<4HBB", 0, 0, SIDE, SIDE, 0, 8)
large_header("a.gif", b"GIF89a" + screen + b"," + frame + bytes(9))
# Start of the image, then of a frame: 8 bits, the size, three colours with a table each.
frame = struct.pack(">BHHB9B", 8, SIDE, SIDE, 3, 1, 17, 0, 2, 17, 0, 3, 17, 0)
large_header("a.jpg", b"\xff\xd8\xff\xc0\0\x11" + frame + b"\xff\xda\0\x0c" + bytes(100))


@case("declares more pixels than are decoded", "ImageError")
def image_tiff_below_opencvs_limit(folder: Path) -> Call:
    return reading(folder, "a.tif", tiff(30_000, 32))


@case(r"\(4000, 4000, 3\)", "returned")
def image_of_4000_x_4000_in_47_kb(folder: Path) -> Call:
    """Below the limit: what a pixel costs."""
    content = zlib.compress(bytes(4000 * (3 * 4000 + 1)), 9)
    call = reading(folder, "a.png", png(4000, content=content))
    return lambda: call().shape


@case("Decompressed [Dd]ata [Tt]oo [Ll]arge", "ImageError")
def image_text_of_256_mib_in_260_kb(folder: Path) -> Call:
    packer = zlib.compressobj(9)
    text = b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
    return reading(folder, "a.png", png(4, chunk(b"zTXt", b"Comment\0\0" + text)))


@case("is no image of a known format", "ImageError")
def image_postscript_for_a_jpeg(folder: Path) -> Call:
    mark = folder.parent / "outside/ran"
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    read = reading(folder, "a.jpg", text.encode())

    def call() -> Any:
        # Ghostscript itself need not be there: whatever has its name would be started. Not outside
        # of the call, which has a process of its own.
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        return read()

    return call


@case(r"a\.png is not read: it has 3072 MiB, and at most 1024 MiB", "ImageError")
def image_of_3_gib(folder: Path) -> Call:
    sparse(folder / "a.png", 3, png(4))
    return lambda: read_rgb(folder / "a.png")


@case(r"a\.png is no regular file", "ImageError")
def image_pipe(folder: Path) -> Call:
    os.mkfifo(folder / "a.png")
    return lambda: read_rgb(folder / "a.png")


@case(r"a\.png is no regular file", "ImageError")
def image_link_to_a_device(folder: Path) -> Call:
    (folder / "a.png").symlink_to("/dev/zero")
    return lambda: read_rgb(folder / "a.png")


@case(r"a\.png is no image of a known format", "ImageError")
def image_link_to_a_secret(folder: Path) -> Call:
    (folder / "a.png").symlink_to("/etc/passwd")
    return lambda: read_rgb(folder / "a.png")


def samples() -> dict[str, bytes]:
    """Small images of every kind that is read, by the names of their files."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    found = {}
    exif = Image.Exif()
    exif[0x112] = 6
    for name, kind, options in (
        ("a.png", "PNG", {}),
        ("a.jpg", "JPEG", {"exif": exif}),
        ("a.gif", "GIF", {}),
        ("a.bmp", "BMP", {}),
        ("a.webp", "WEBP", {}),
        ("a.ppm", "PPM", {}),
        ("a.tif", "TIFF", {"compression": "tiff_lzw"}),
        ("b.tif", "TIFF", {}),
    ):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, kind, **options)
        found[name] = stream.getvalue()
    deep = noise.astype(np.uint16) * 257
    for name in ("deep.png", "deep.tif"):
        found[name] = cv2.imencode(name[-4:], deep)[1].tobytes()
    return found
