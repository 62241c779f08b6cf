# SPDX-License-Identifier: Apache-2.0
"""Files that were made to do harm, one function each, and what must be said of them.

A case makes its files in a folder and hands back the call that reads them. Beside the folder lies
``outside`` with files that nothing may read, and where no file may appear.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from d2_decouple.data import load_coco, load_voc, register_folder

Call = Callable[[], Any]


class Case(NamedTuple):
    """A hostile input.

    Attributes:
        make: folder -> the call.
        errors: names of classes, one of which is raised.
        says: a pattern of the message.
    """

    make: Callable[[Path], Call]
    errors: tuple[str, ...]
    says: str

    def make_in(self, base: Path) -> Call:
        """The call, for files in new folders below ``base``."""
        folder, outside = base / "folder", base / "outside"
        folder.mkdir()
        outside.mkdir()
        picture(outside / "secret.png")
        (outside / "secret.txt").write_text("0 0.5 0.5 0.1 0.1\n")
        return self.make(folder)


CASES: dict[str, Case] = {}
WIDTH, HEIGHT = 60, 40


def case(says: str, *errors: str) -> Callable[[Callable[[Path], Call]], Callable[[Path], Call]]:
    """Enter a function under its name."""

    def enter(make: Callable[[Path], Call]) -> Callable[[Path], Call]:
        CASES[make.__name__] = Case(make, errors or ("DataError",), says)
        return make

    return enter


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(file)


def sparse(file: Path, gib: float, start: bytes = b"") -> None:
    """A file that is so long and takes no room on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(start)
    os.truncate(file, int(gib * 2**30))


def voc_xml(**given: str) -> str:
    part = {"filename": "a.png", "width": str(WIDTH), "height": str(HEIGHT), "head": "", **given}
    corners = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (3, 4, 20, 30), strict=True)
    )
    name = part.get("name", "cat")
    return (
        f"{part['head']}<annotation><filename>{part['filename']}</filename><size><width>"
        f"{part['width']}</width><height>{part['height']}</height></size><object><name>{name}"
        f"</name><bndbox>{corners}</bndbox></object></annotation>"
    )


def voc_folder(folder: Path, xml: str | bytes, ids: str = "a\n") -> Call:
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    picture(folder / "JPEGImages/a.png")
    (folder / "ImageSets/Main/train.txt").write_text(ids)
    file = folder / "Annotations/a.xml"
    file.write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    return lambda: load_voc(folder, "train", ["cat"])


def entities(levels: int) -> str:
    """Entities, each of which is ten of the one before, and one character at the end."""
    lines = ['<!ENTITY e0 "x">']
    lines += [f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, levels + 1)]
    return f"<!DOCTYPE annotation [{''.join(lines)}]>"


@case("DOCTYPE")
def voc_billion_laughs(folder: Path) -> Call:
    return voc_folder(folder, voc_xml(head=entities(10), name="&e10;"))


@case("DOCTYPE")
def voc_billion_laughs_in_utf16(folder: Path) -> Call:
    return voc_folder(folder, voc_xml(head=entities(10), name="&e10;").encode("utf-16"))


@case("DOCTYPE")
def voc_entity_from_a_file(folder: Path) -> Call:
    secret = (folder.parent / "outside/secret.txt").as_uri()
    head = f'<!DOCTYPE annotation [<!ENTITY x SYSTEM "{secret}">]>'
    return voc_folder(folder, voc_xml(head=head, name="&x;"))


@case("DOCTYPE")
def voc_definitions_from_a_file(folder: Path) -> Call:
    secret = (folder.parent / "outside/secret.txt").as_uri()
    return voc_folder(folder, voc_xml(head=f'<!DOCTYPE annotation SYSTEM "{secret}">'))


@case(r"a\.xml: <size/height> is None, wanted a number")
def voc_elements_in_elements(folder: Path) -> Call:
    return voc_folder(folder, "<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>")


@case(r"a\.xml is not read: it has 3072 MiB, and at most 16 MiB.*export D2D_MAX_FILE_MIB=3072")
def voc_3_gib_xml(folder: Path) -> Call:
    call = voc_folder(folder, "")
    sparse(folder / "Annotations/a.xml", 3)
    return call


@case(r"train\.txt is not read: it has 3072 MiB")
def voc_3_gib_list(folder: Path) -> Call:
    call = voc_folder(folder, voc_xml())
    sparse(folder / "ImageSets/Main/train.txt", 3)
    return call


@case(r"a\.xml: <size/width> is '1e300', wanted the image's size")
def voc_width_of_1e300(folder: Path) -> Call:
    return voc_folder(folder, voc_xml(width="1e300"))


@case("wanted a path inside the dataset's folder")
def voc_filename_that_leads_out(folder: Path) -> Call:
    return voc_folder(folder, voc_xml(filename="../outside/secret.png"))


@case("wanted a path inside the dataset's folder")
def voc_id_that_leads_out(folder: Path) -> Call:
    return voc_folder(folder, voc_xml(), ids="../../outside/secret\n")


@case("names no file: names have at most 250 bytes")
def voc_name_of_5000_bytes(folder: Path) -> Call:
    return voc_folder(folder, voc_xml(), ids="a" * 5000 + "\n")


@case("names no file: it holds a control character")
def voc_id_with_a_zero(folder: Path) -> Call:
    return voc_folder(folder, voc_xml(), ids="a\0b\n")


def coco_folder(folder: Path, change: Callable[[dict[str, Any]], Any] | str | None) -> Call:
    sizes = {"width": WIDTH, "height": HEIGHT}
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", **sizes}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 4, 20, 30]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    picture(folder / "images/a.png")
    if callable(change):
        change(content)
    text = change if isinstance(change, str) else json.dumps(content)
    (folder / "instances_train.json").write_text(text)
    return lambda: load_coco(folder / "instances_train.json", folder / "images")


def coco_name(folder: Path, name: str) -> Call:
    return coco_folder(folder, lambda content: content["images"][0].update(file_name=name))


@case(r"instances_train\.json is not read: it has 2048 MiB, and at most 1536 MiB")
def coco_2_gib_of_zeros(folder: Path) -> Call:
    call = coco_folder(folder, None)
    sparse(folder / "instances_train.json", 2)
    return call


@case(r"cannot read .*instances_train\.json as JSON \(it begins with ")
def coco_1_gib_of_zeros(folder: Path) -> Call:
    call = coco_folder(folder, None)
    sparse(folder / "instances_train.json", 1)
    return call


@case(r"cannot read .*instances_train\.json as JSON \(it begins with ")
def coco_1_gib_behind_a_brace(folder: Path) -> Call:
    call = coco_folder(folder, None)
    sparse(folder / "instances_train.json", 1, b"{")
    return call


@case(r"cannot read .*instances_train\.json as JSON")
def coco_brackets_in_brackets(folder: Path) -> Call:
    return coco_folder(folder, "[" * 1_000_000)


@case("an image has id None, wanted int or str")
def coco_entry_of_900_levels(folder: Path) -> Call:
    return coco_folder(
        folder,
        '{"annotations": [], "categories": [], "images": [' + "[" * 900 + "]" * 900 + "]}",
    )


@case("wanted a path inside the dataset's folder")
def coco_file_name_that_leads_out(folder: Path) -> Call:
    return coco_name(folder, "../../outside/secret.png")


@case("wanted a path inside the dataset's folder")
def coco_absolute_file_name(folder: Path) -> Call:
    return coco_name(folder, str(folder.parent / "outside/secret.png"))


@case("names no file: it holds half of a character")
def coco_half_a_character(folder: Path) -> Call:
    return coco_name(folder, "a\ud800.png")


@case("names no file: it holds a control character")
def coco_file_name_with_a_zero(folder: Path) -> Call:
    return coco_name(folder, "a\0/b.png")


@case("names no file: names have at most 250 bytes")
def coco_folder_of_5000_bytes(folder: Path) -> Call:
    return coco_name(folder, "a" * 5000 + "/b.png")


@case("category 1 needs another name: it holds half of a character")
def coco_half_a_class(folder: Path) -> Call:
    return coco_folder(folder, lambda content: content["categories"][0].update(name="\udfff"))


@case(r"'a\.png' is a number of 1329 bits x 40, wanted its size")
def coco_width_of_400_digits(folder: Path) -> Call:
    return coco_folder(folder, lambda content: content["images"][0].update(width=10**400))


@case(r"no annotations .*pipe\.json", "FileNotFoundError")
def coco_pipe(folder: Path) -> Call:
    os.mkfifo(folder / "pipe.json")
    return lambda: register_folder(folder)


def yolo_folder(folder: Path, yaml: str | None = None, **files: str) -> Call:
    for name in ("a", "b"):
        picture(folder / f"images/train/{name}.png")
        file = folder / f"labels/train/{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("0 0.5 0.5 0.2 0.2\n")
    (folder / "data.yaml").write_text(yaml or "train: images/train\nnames: [cat]\n")
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return lambda: register_folder(folder)


def aliases(levels: int, start: str, line: str) -> str:
    """Names, each of which is ten times the one before."""
    lines = [f"n0: &n0 {start}"]
    for level in range(1, levels + 1):
        lines.append(f"n{level}: &n{level} " + line.format(", ".join([f"*n{level - 1}"] * 10)))
    return "\n".join(lines)


@case(r"cannot read .*data\.yaml as yaml: the alias \*n0 is not followed")
def yolo_aliases_of_aliases(folder: Path) -> Call:
    text = aliases(9, "[x]", "[{}]")
    return yolo_folder(folder, f"{text}\ntrain: images/train\nnames: [*n9]\n")


@case(r"cannot read .*data\.yaml as yaml: more than 32 levels")
def yolo_brackets_in_brackets(folder: Path) -> Call:
    return yolo_folder(folder, "names: " + "[" * 5000)


@case(r"cannot read .*data\.yaml as yaml: could not determine a constructor for the tag")
def yolo_yaml_that_calls(folder: Path) -> Call:
    mark = folder.parent / "outside/ran"
    return yolo_folder(folder, f"names: !!python/object/apply:os.system ['touch {mark}']\n")


@case(r"cannot read .*data\.yaml as yaml: month must be in 1\.\.12")
def yolo_date_that_is_none(folder: Path) -> Call:
    return yolo_folder(folder, "train: images/train\nnames: [2001-99-99]\n")


@case(r"cannot read .*data\.yaml as yaml: 'perhaps' is nothing for the tag tag:yaml\.org,2002:bool")
def yolo_truth_that_is_none(folder: Path) -> Call:
    return yolo_folder(folder, "train: images/train\nnames: [!!bool perhaps]\n")


@case(r"cannot read .*data\.yaml as yaml: 'now' is nothing for the tag .*timestamp")
def yolo_time_that_is_none(folder: Path) -> Call:
    return yolo_folder(folder, "train: images/train\nnames: [!!timestamp now]\n")


@case(r"cannot read .*data\.yaml as yaml: '' is nothing for the tag .*int")
def yolo_number_that_is_none(folder: Path) -> Call:
    return yolo_folder(folder, "train: images/train\nnames: [!!int '']\n")


@case(r"cannot read .*data\.yaml as yaml: ")
def yolo_character_that_is_none(folder: Path) -> Call:
    return yolo_folder(folder, 'train: images/train\nnames: ["\\UFFFFFFFF"]\n')


@case("line 1: there is no image", "FileNotFoundError")
def yolo_list_that_leads_out(folder: Path) -> Call:
    # Inside as it stands, outside without the first folder, which some tools write in front.
    (folder / "b").mkdir(parents=True)
    lines = "a/b/../../outside/secret.png\n"
    return yolo_folder(folder, "train: list.txt\nnames: [cat]\n", list=lines)


@case("line 1: there is no image", "FileNotFoundError")
def yolo_list_with_an_absolute_end(folder: Path) -> Call:
    secret = folder.parent / "outside/secret.png"
    return yolo_folder(folder, "train: list.txt\nnames: [cat]\n", list=f"x/{secret}\n")


@case(r"cannot read .*data\.yaml as yaml: a number of 20000 bits")
def yolo_number_of_5000_digits(folder: Path) -> Call:
    return yolo_folder(folder, f"path: 0x{'f' * 5000}\ntrain: images/train\nnames: [cat]\n")


@case(r"a\.txt is not read: it has 3072 MiB")
def yolo_3_gib_of_labels(folder: Path) -> Call:
    call = yolo_folder(folder)
    sparse(folder / "labels/train/a.txt", 3)
    return call


@case("1 images cannot be split")
def yolo_pipe_for_an_image(folder: Path) -> Call:
    call = yolo_folder(folder)
    (folder / "images/train/b.png").unlink()
    os.mkfifo(folder / "images/train/b.png")
    return call
