# SPDX-License-Identifier: Apache-2.0
"""Weights of a paper's own code as a checkpoint of this package.

``python -m d2_decouple.checkpoint.convert METHOD OFFICIAL OUT``
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .conversion import Converted
from .convert_decoupled_rcnn import convert_decoupled_rcnn
from .convert_pdnet import convert_pdnet
from .errors import CheckpointError
from .files import read_torch_file, write_whole

__all__ = ["CONVERTERS", "Converted", "convert_checkpoint", "main"]

CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], Converted]] = {
    "pdnet": convert_pdnet,
    "decoupled_rcnn": convert_decoupled_rcnn,
}
"""For each method: tensors by its authors' names -> tensors by ours."""

_TENSORS = ("model", "state_dict")  # under which they lie, of Detectron's kin and of mmcv's
_TRAINING_STATE = ("optimizer", "scheduler", "iteration", "meta")
_OURS = "converted"  # says in a file that it comes from here, and from what
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
    source, target = Path(official), Path(out)
    if method not in CONVERTERS:
        raise CheckpointError(
            f"there is no converter {method!r}; there are: {', '.join(CONVERTERS)}"
        )
    if not source.is_file():
        raise CheckpointError(f"there is no file {source}; give the weights that were published")
    _prepare_target(source, target, force, f"{method}.pth")
    try:
        converted = CONVERTERS[method](_tensors(read_torch_file(str(source))))
    except CheckpointError as error:
        if str(source) in str(error):
            raise
        raise CheckpointError(
            f"{source} cannot be converted as weights of {method}: {error}. Give the whole file "
            "that the authors' code saved or published"
        ) from error
    content = {"model": converted.tensors, _OURS: {"method": method, "file": source.name}}
    write_whole(target, lambda file: torch.save(content, file))
    return (
        f"{method}: {len(converted.tensors)} tensors converted ({converted.description}): "
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
    args = parser.parse_args(arguments)
    try:
        print(convert_checkpoint(args.method, args.official, args.out, force=args.force))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
