# SPDX-License-Identifier: Apache-2.0
"""The launcher: ``python -m d2_decouple.train --config-file NAME_OR_FILE [key=value ...]``.

Takes LazyConfig recipes (.py, or their bare names) and yacs configs (.yaml), one process or
many: ``--num-gpus`` starts one process per GPU, ``torchrun`` brings its own (on CPUs as well).
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from .checkpoint import Checkpointer
from .config import ConfigError, apply_overrides, find_config, get_config
from .data import register_folder
from .engine import (
    EXPECTED_ERRORS,
    Recipe,
    check_data,
    check_recipe,
    evaluate,
    lazy_recipe,
    report_error,
    set_up,
    train,
    yacs_recipe,
)
from .engine.defaults import use_defaults
from .engine.inference_config import yacs_config
from .engine.methods import METHODS, SIZES, chosen_recipe, resize_network
from .engine.own_data import best_checkpoint, use_folder, use_folder_yacs
from .engine.processes import meeting
from .engine.train import distributed, load_weights

_SMALL_RECIPE = "fcos_R_18_FPN_bccd"  # learns from a few dozen images, without pretrained weights

__all__ = ["main", "parse_arguments", "run"]

_EPILOG = """
examples:
  python -m d2_decouple.train --dataset FOLDER --method pdnet
  python -m d2_decouple.train --dataset FOLDER --method tscode --host gfl --size m
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
        help="train on this folder of labelled images (Pascal VOC, COCO or YOLO format) with its "
        "own classes and splits; without --config-file and --method the recipe is "
        f"{_SMALL_RECIPE}",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help=f"with --dataset: {', '.join(METHODS)}; image size, batch, rate and length are chosen "
        "from the data, and it stops when the AP does not rise any more",
    )
    parser.add_argument("--host", metavar="NAME", help="the detector that the method stands on")
    sizes = "; ".join(f"{name}: {size.about}" for name, size in SIZES.items())
    parser.add_argument("--size", metavar="s|m|l", help=f"of the method's network ({sizes})")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        _check_choice(args)
        late = [option for option in args.opts if option.startswith("--")]
        if late:
            raise ConfigError(
                f"{', '.join(late)} would be taken for an override: type options before key=value"
            )
        wanted = args.config_file or _SMALL_RECIPE
        if args.method is not None:
            wanted = chosen_recipe(args.method, args.host, args.size or "s")
        args.config_file = str(find_config(wanted))
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
        return report_error(error)
    except ProcessExitedException as error:  # one of several, which has said why
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    return 0


def _check_choice(args: argparse.Namespace) -> None:
    """Refuse options that do not say which recipe, or say it twice."""
    if args.method is None:
        for option in ("host", "size"):
            if getattr(args, option) is not None:
                raise ConfigError(
                    f"--{option} belongs to --method; type --method {' or '.join(METHODS)}"
                )
        if not args.config_file and not args.dataset:
            raise ConfigError(
                "no config given: type --config-file NAME_OR_FILE, or --dataset FOLDER"
            )
    elif args.config_file:
        raise ConfigError(
            f"--method {args.method} and --config-file {args.config_file} both name a recipe; "
            "leave one of them out"
        )
    elif not args.dataset:
        raise ConfigError(
            f"--method {args.method} chooses its numbers from your data: type --dataset FOLDER (or "
            "--config-file NAME_OR_FILE in the place of --method)"
        )


def _launched(args: argparse.Namespace) -> None:
    """:func:`run`, in one of several processes with a message in place of a traceback, too."""
    try:
        run(args)
    except EXPECTED_ERRORS as error:
        if comm.get_world_size() == 1:
            raise
        sys.exit(report_error(error))


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
    with meeting("nccl" if on_gpu else "gloo"):
        if hasattr(comm, "create_local_process_group"):  # newer Detectron2 only
            comm.create_local_process_group(processes)
        run(args, recipe)
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
        results = train(recipe, resume=args.resume)
        return results if args.method is None else _use_best(recipe, args, results)
    model = recipe.model()
    load_weights(recipe, model, resume=args.resume)
    return evaluate(recipe, distributed(recipe, model))


def _use_best(recipe: Recipe, args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the best checkpoint, unless it is the last, and say how to use it."""
    comm.synchronize()  # with the process that writes it
    best = best_checkpoint(recipe.output_dir)
    if best is None:
        return results
    if best.iterations < best.last_iterations:
        model = recipe.model()
        Checkpointer(model, complete=True).load(str(best.file))
        results = evaluate(recipe, distributed(recipe, model))
    if comm.is_main_process():
        images = Path(DatasetCatalog.get(recipe.test_datasets[0])[0]["file_name"]).parent
        print(
            f"best AP on the test images: {best.ap:.2f}, after {best.iterations} of "
            f"{best.last_iterations} iterations; its weights: {best.file}",
            "pictures of what it finds:",
            f"  python tools/demo.py --config-file {_quoted(best.file.with_name('config.yaml'))} "
            f"--weights {_quoted(best.file)} --input {_quoted(images)} --output found",
            sep="\n",
        )
    return results


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _recipe(args: argparse.Namespace) -> Recipe:
    path = Path(args.config_file)
    folder = register_folder(args.dataset) if args.dataset else None
    if folder is not None and comm.is_main_process():
        print(*folder.notes, f"recipe: {path.stem}", sep="\n")
    if path.suffix == ".py":
        cfg = get_config(path)
        if folder is not None:
            use_folder(cfg, folder)
        if folder is not None and args.method is not None:
            size = SIZES[args.size or "s"]
            resize_network(cfg, size)
            processes = int(os.environ.get("WORLD_SIZE", args.num_gpus * args.num_machines))
            lines = use_defaults(cfg, folder.train, size, args.opts, processes=processes)
            if comm.is_main_process():
                print(*lines, sep="\n")
        return lazy_recipe(apply_overrides(cfg, args.opts))
    given = (lambda cfg: use_folder_yacs(cfg, folder)) if folder else (lambda cfg: None)
    return yacs_recipe(yacs_config(path, args.opts, given))


if __name__ == "__main__":
    sys.exit(main())
