# SPDX-License-Identifier: Apache-2.0
"""Weights of a paper's own code as a checkpoint of this package, and back.

``python -m d2_decouple.checkpoint.convert METHOD OFFICIAL OUT``
``python -m d2_decouple.checkpoint.convert --back METHOD OURS OUT``
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conversion import Converted
from .convert_decoupled_rcnn import convert_decoupled_rcnn
from .convert_pdnet import convert_pdnet
from .convert_salt import (
    convert_gflv2,
    convert_salt,
    gflv2_left_out,
    revert_gflv2,
    revert_salt,
    salt_left_out,
)
from .errors import CheckpointError
from .files import read_torch_file, write_whole

__all__ = [
    "CONVERTERS",
    "WAYS_BACK",
    "Converted",
    "WayBack",
    "convert_checkpoint",
    "main",
    "revert_checkpoint",
]

CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], Converted]] = {
    "pdnet": convert_pdnet,
    "decoupled_rcnn": convert_decoupled_rcnn,
    "salt": convert_salt,
    "gflv2": convert_gflv2,
}
"""For each method: tensors by its authors' names -> tensors by ours."""


class WayBack(NamedTuple):
    """How weights of this package become an authors' file.

    Attributes:
        left_out: tensors by the authors' names -> those that the converter has no place for.
        revert: tensors by our names, and what was left out of the file that they come from, if
            they come from one -> tensors by the authors' names.
    """

    left_out: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    revert: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Converted]


WAYS_BACK: dict[str, WayBack] = {
    "salt": WayBack(salt_left_out, revert_salt),
    "gflv2": WayBack(gflv2_left_out, revert_gflv2),
}
"""For the methods that have one."""

_TENSORS = ("model", "state_dict")  # under which they lie, of Detectron's kin and of mmcv's
_TRAINING_STATE = ("optimizer", "scheduler", "iteration", "meta")
_OURS = "converted"  # says in a file that it comes from here, and from what
_LEFT_OUT = "left_out"  # tensors of that file, below it
# Suffixes by which our checkpointer expects other formats.
_OTHER_FORMATS = (".pkl", ".safetensors")
_EPILOG = """
examples:
  python tools/convert_checkpoint.py pdnet official.pth pdnet_R_50.pth
  python tools/train_net.py --config-file pdnet_R_50_FPN_2x_official --eval-only \\
    train.init_checkpoint=pdnet_R_50.pth
  python tools/convert_checkpoint.py decoupled_rcnn epoch_24.pth decoupled_rcnn_R_50.pth
  python tools/train_net.py --config-file decoupled_rcnn_R_50_FPN_2x --eval-only \\
    train.init_checkpoint=decoupled_rcnn_R_50.pth
  python tools/convert_checkpoint.py salt epoch_24.pth salt_R_50.pth
  python tools/convert_checkpoint.py --back salt output/model_final.pth for_their_code.pth
"""


def convert_checkpoint(
    method: str, official: str | Path, out: str | Path, *, force: bool = False
) -> str:
    """Read the authors' file and write ours; returns one line about it.

    Args:
        method: a key of :data:`CONVERTERS`.
        official: a file of ``torch.save``: tensors by name, or a dict with these under "model"
            or "state_dict". All names may begin with ``module.``. Only tensors and plain
            containers are read.
        out: where the converted weights go; its folder is made.
        force: replace a file that exists.

    Raises:
        CheckpointError: there is no such method or file, the file is damaged or has other
            tensors than the method's, or ``out`` exists.
    """
    _known(method, CONVERTERS, "converter")

    def convert(content: Mapping[str, Any]) -> tuple[Converted, dict[str, Any], str]:
        state = _tensors(content)
        converted = CONVERTERS[method](state)
        origin: dict[str, Any] = {"method": method, "file": Path(official).name}
        if method in WAYS_BACK:
            origin[_LEFT_OUT] = WAYS_BACK[method].left_out(state)
        return converted, {"model": converted.tensors, _OURS: origin}, ""

    return _rewrite(
        method,
        Path(official),
        Path(out),
        convert,
        force=force,
        title=method,
        missing="give the weights that were published",
        misfit=f"as weights of {method}",
        wanted="the whole file that the authors' code saved or published",
    )


def revert_checkpoint(
    method: str, ours: str | Path, out: str | Path, *, force: bool = False
) -> str:
    """Read a file of this package and write one for the authors' code; returns one line about it.

    What :func:`convert_checkpoint` wrote becomes the tensors that it was given, bit for bit. Of a
    training that averaged its weights the averaged ones are taken, as everywhere in this package.

    Args:
        method: a key of :data:`WAYS_BACK`.
        ours: a converted file, or a checkpoint of a training.
        out: where the weights go, under "state_dict" and with an empty "meta", as mmcv has it; its
            folder is made.
        force: replace a file that exists.

    Raises:
        CheckpointError: there is no such way or file, the file is damaged, of another method or
            of another network than the method's, or ``out`` exists.
    """
    _known(method, WAYS_BACK, "way back")

    def revert(content: Mapping[str, Any]) -> tuple[Converted, dict[str, Any], str]:
        origin = content.get(_OURS, {})
        if origin and origin["method"] != method:
            raise CheckpointError(f"it was converted as weights of {origin['method']}: type that")
        averaged = content.get("ema")
        kind = " (averaged)" if averaged and isinstance(averaged, Mapping) else ""
        state = averaged if kind else content.get("model")
        if not isinstance(state, Mapping):
            raise CheckpointError("it has no weights under model, as the files of this package do")
        reverted = WAYS_BACK[method].revert(_by_name(state), origin.get(_LEFT_OUT, {}))
        return reverted, {"meta": {}, "state_dict": reverted.tensors}, kind

    return _rewrite(
        method,
        Path(ours),
        Path(out),
        revert,
        force=force,
        title=f"{method}, back",
        missing="give a checkpoint of this package",
        misfit=f"back to weights of {method}",
        wanted="a file of this package",
    )


def _known(method: str, among: Mapping[str, Any], what: str) -> None:
    if method not in among:
        raise CheckpointError(f"there is no {what} {method!r}; there are: {', '.join(among)}")


def _rewrite(
    method: str,
    source: Path,
    target: Path,
    make: Callable[[Mapping[str, Any]], tuple[Converted, dict[str, Any], str]],
    *,
    force: bool,
    title: str,
    missing: str,
    misfit: str,
    wanted: str,
) -> str:
    """Write what ``make`` makes of a file's content; the last four are for messages.

    ``make`` also says which weights it took, if there was a choice.
    """
    if not source.is_file():
        raise CheckpointError(f"there is no file {source}; {missing}")
    _prepare_target(source, target, force, f"{method}.pth")
    try:
        converted, content, kind = make(read_torch_file(str(source)))
    except CheckpointError as error:
        if str(source) in str(error):
            raise
        raise CheckpointError(
            f"{source} cannot be converted {misfit}: {error}. Give {wanted}"
        ) from error
    write_whole(target, lambda file: torch.save(content, file))
    return (
        f"{title}: {len(converted.tensors)} tensors{kind} converted ({converted.description}): "
        f"{source} -> {target}; {converted.advice}"
    )


def _prepare_target(source: Path, target: Path, force: bool, example: str) -> None:
    """Make the folder of the file, unless the file cannot or must not be written."""
    if target.suffix in _OTHER_FORMATS:
        raise CheckpointError(
            f"{target} would be read as another format, got {target.suffix}; name it "
            f"{target.with_suffix('.pth').name}"
        )
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file, such as {target / example}")
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the file that is read; give OUT another name")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; type --force to replace it, or another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the folder {target.parent} cannot be made ({error}); name another one"
        ) from error


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, without ``module.``; what else belongs to a training is left out."""
    state = content
    if _OURS in content:
        raise CheckpointError("it was converted already: type train.init_checkpoint=FILE with it")
    found = [name for name in _TENSORS if isinstance(content.get(name), Mapping)]
    if found:
        state = content[found[0]]
        others = [str(name) for name in content if name not in (found[0], *_TRAINING_STATE)]
        if others:
            raise CheckpointError(
                f"it has {', '.join(others)} beside {found[0]}; known are "
                f"{', '.join(_TRAINING_STATE)}"
            )
    return _by_name(state)


def _by_name(state: Mapping[str, Any]) -> dict[str, Tensor]:
    strange = [
        f"{name} is a {type(value).__name__}"
        for name, value in state.items()
        if not isinstance(value, Tensor)
    ]
    if strange:
        raise CheckpointError(f"{', '.join(strange[:3])}; wanted are tensors by name")
    tensors = {str(name).removeprefix("module."): value for name, value in state.items()}
    if len(tensors) < len(state):
        raise CheckpointError("it has the same names with and without module.; which are meant?")
    return tensors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.checkpoint.convert",
        description=str(__doc__).splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", choices=sorted(CONVERTERS), help="whose weights they are")
    parser.add_argument("official", metavar="OFFICIAL", help="file of the authors' code")
    parser.add_argument("out", metavar="OUT", help="file to write, such as pdnet_R_50.pth")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--back",
        action="store_true",
        help=f"OFFICIAL is a file of this package, OUT for the code of {', '.join(WAYS_BACK)}",
    )
    args = parser.parse_args(arguments)
    run = revert_checkpoint if args.back else convert_checkpoint
    try:
        print(run(args.method, args.official, args.out, force=args.force))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
