# SPDX-License-Identifier: Apache-2.0
"""The launcher: ``python -m d2_decouple.train --config-file NAME_OR_FILE [key=value ...]``.

Takes LazyConfig recipes (.py, or their bare names) and yacs configs (.yaml), one process or
many: ``--num-gpus`` starts one process per GPU, ``torchrun`` brings its own (on CPUs as well).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from .config import ConfigError, apply_overrides, find_config, get_config
from .data import register_folder
from .engine import (
    EXPECTED_ERRORS,
    Recipe,
    check_data,
    check_recipe,
    evaluate,
    lazy_recipe,
    set_up,
    train,
    yacs_recipe,
)
from .engine.inference_config import yacs_config
from .engine.own_data import use_folder, use_folder_yacs
from .engine.train import distributed, load_weights

_SMALL_RECIPE = "fcos_R_18_FPN_bccd"  # learns from a few dozen images, without pretrained weights

__all__ = ["main", "parse_arguments", "run"]

_EPILOG = """
examples:
  python -m d2_decouple.train --dataset FOLDER
  python -m d2_decouple.train --config-file fcos_R_18_FPN_bccd
  python -m d2_decouple.train --config-file fcos_R_50_FPN_1x --num-gpus 8 train.output_dir=out
  python -m d2_decouple.train --config-file fcos_R_50_FPN_1x.yaml OUTPUT_DIR out
  python -m d2_decouple.train --config-file fcos_R_50_FPN_1x --eval-only train.init_checkpoint=FILE
  torchrun --nproc-per-node 2 -m d2_decouple.train --config-file fcos_R_18_FPN_bccd

`python -m d2_decouple.config` lists all recipes.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Detectron2's own arguments, so that commands and habits carry over."""
    parser = default_argument_parser(epilog=_EPILOG)
    parser.prog = "python -m d2_decouple.train"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--dataset",
        metavar="FOLDER",
        help="train on this folder of labelled images (Pascal VOC or COCO format) with its own "
        f"classes and splits; without --config-file the recipe is {_SMALL_RECIPE}",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        if not args.config_file and not args.dataset:
            raise ConfigError(
                "no config given: type --config-file NAME_OR_FILE, or --dataset FOLDER"
            )
        late = [option for option in args.opts if option.startswith("--")]
        if late:
            raise ConfigError(
                f"{', '.join(late)} would be taken for an override: type options before key=value"
            )
        args.config_file = str(find_config(args.config_file or _SMALL_RECIPE))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return _in_torchrun(args)
        gpus = torch.cuda.device_count()
        if args.num_gpus > max(1, gpus) or (args.num_machines > 1 and not gpus):
            raise ConfigError(
                f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}, but torch sees "
                f"{gpus} GPUs; for several processes on CPUs type: torchrun --nnodes "
                f"{args.num_machines} --nproc-per-node {args.num_gpus} -m d2_decouple.train ..."
            )
        launch(
            _launched,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except ProcessExitedException as error:  # one of several, which has said why
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    return 0


def _launched(args: argparse.Namespace) -> None:
    """:func:`run`, in one of several processes with a message in place of a traceback, too."""
    try:
        run(args)
    except EXPECTED_ERRORS as error:
        if comm.get_world_size() == 1:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))


def _in_torchrun(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    on_gpu = recipe.device.startswith("cuda")
    rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu and processes > torch.cuda.device_count():
        raise ConfigError(
            f"torchrun starts {processes} processes on this machine, which has "
            f"{torch.cuda.device_count()} GPUs; type --nproc-per-node with at most that many, or "
            "train.device=cpu (yacs: MODEL.DEVICE cpu)"
        )
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        if hasattr(comm, "create_local_process_group"):  # newer Detectron2 only
            comm.create_local_process_group(processes)
        run(args, recipe)
    finally:
        dist.destroy_process_group()
    return 0


def run(args: argparse.Namespace, recipe: Recipe | None = None) -> dict[str, Any]:
    """Train or evaluate in this process.

    Args:
        args: :func:`parse_arguments`'s.
        recipe: what ``args`` name, where it has been read already.
    """
    recipe = recipe or _recipe(args)
    check_recipe(recipe, training=not args.eval_only, resume=args.resume)
    set_up(recipe, args)
    check_data(recipe, training=not args.eval_only)
    if not args.eval_only:
        return train(recipe, resume=args.resume)
    model = recipe.model()
    load_weights(recipe, model, resume=args.resume)
    return evaluate(recipe, distributed(recipe, model))


def _recipe(args: argparse.Namespace) -> Recipe:
    path = Path(args.config_file)
    folder = register_folder(args.dataset) if args.dataset else None
    if folder is not None and comm.is_main_process():
        print(*folder.notes, f"recipe: {path.stem}", sep="\n")
    if path.suffix == ".py":
        cfg = get_config(path)
        if folder is not None:
            use_folder(cfg, folder)
        return lazy_recipe(apply_overrides(cfg, args.opts))
    given = (lambda cfg: use_folder_yacs(cfg, folder)) if folder else (lambda cfg: None)
    return yacs_recipe(yacs_config(path, args.opts, given))


if __name__ == "__main__":
    sys.exit(main())
