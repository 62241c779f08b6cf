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
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm

from .config import ConfigError, add_decouple_config, check_key, find_config, get_config
from .engine import (
    EXPECTED_ERRORS,
    Recipe,
    check_recipe,
    evaluate,
    lazy_recipe,
    set_up,
    train,
    yacs_recipe,
)
from .engine.train import distributed, load_weights

__all__ = ["main", "parse_arguments", "run"]

_EPILOG = """
examples:
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
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        if not args.config_file:
            raise ConfigError("no config given: type --config-file NAME_OR_FILE")
        late = [option for option in args.opts if option.startswith("--")]
        if late:
            raise ConfigError(
                f"{', '.join(late)} would be taken for an override: type options before key=value"
            )
        args.config_file = str(find_config(args.config_file))
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
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    return 0


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
    if not args.eval_only:
        return train(recipe, resume=args.resume)
    model = recipe.model()
    load_weights(recipe, model, resume=args.resume)
    return evaluate(recipe, distributed(recipe, model))


def _recipe(args: argparse.Namespace) -> Recipe:
    path = Path(args.config_file)
    if path.suffix == ".py":
        return lazy_recipe(get_config(path, args.opts))
    cfg = get_cfg()
    add_decouple_config(cfg)
    # The shipped yaml files say nothing about the device; the machine does.
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    if len(args.opts) % 2:
        raise ConfigError(
            f"a yacs config is overridden by pairs, KEY VALUE; got {' '.join(args.opts)!r}"
        )
    for key in args.opts[::2]:
        check_key(cfg, key, key)
    try:
        cfg.merge_from_file(str(path))
        cfg.merge_from_list(args.opts)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f"{path.name} or an override of it: {error}") from error
    return yacs_recipe(cfg)


if __name__ == "__main__":
    sys.exit(main())
