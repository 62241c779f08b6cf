# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.zoo``: the models of this package, one of them, or its training."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from ..config import ConfigError
from .catalogue import Entry, ZooError, entries, entry, train_command
from .models import train, trained_weights

__all__ = ["main"]

_EPILOG = """
examples:
  python -m d2_decouple.zoo
  python -m d2_decouple.zoo list --method tscode --data coco
  python -m d2_decouple.zoo list "fcos_*" --json
  python -m d2_decouple.zoo show fcos_R_18_FPN_bccd --costs
  python -m d2_decouple.zoo train fcos_R_18_FPN_bccd
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        if args.command == "show":
            _show(args)
        elif args.command == "train":
            print(train(args.name, seed=args.seed))
        elif args.command == "update":
            _update(args)
        else:
            _list(args)
    except (ConfigError, ZooError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; without a command, everything is listed."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.zoo",
        description="The models of this package: what they are, cost and reached.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    listing = commands.add_parser("list", help="a table of models (without a command: of all)")
    listing.add_argument("pattern", nargs="?", default="*", help="part of a name, or with * and ?")
    listing.add_argument("--method", default="", help="what names begin with, such as tscode")
    listing.add_argument("--data", default="", help="coco, bccd, voc, val2017 or test-dev")
    listing.add_argument("--json", action="store_true", help="print JSON")
    showing = commands.add_parser("show", help="everything about one model")
    showing.add_argument("name")
    showing.add_argument("--costs", action="store_true", help="count its costs anew")
    showing.add_argument("--json", action="store_true", help="print JSON")
    training = commands.add_parser("train", help="train a model of the small-data experiment")
    training.add_argument("name")
    training.add_argument("--seed", type=int, default=1)
    updating = commands.add_parser("update", help="make the table anew (in a checkout)")
    updating.add_argument("--recount", action="store_true", help="count the costs of all models")
    updating.add_argument("--only", metavar="NAME,...", help="count the costs of these alone")
    typed = sys.argv[1:] if arguments is None else list(arguments)
    return parser.parse_args(typed or ["list"])


def _list(args: argparse.Namespace) -> None:
    found = entries(pattern=args.pattern, method=args.method, data=args.data)
    if args.json:
        print(json.dumps([_as_dict(item) for item in found], indent=1))
        return
    header = ("model", "data", "schedule", "AP, paper", "AP, here", "parameters", "mult-adds")
    lines = [header, *(_cells(item) for item in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(
        f"\n{len(found)} models. `python -m d2_decouple.zoo show NAME` says where a number is "
        "from; AP, here is the mean of the seeds that were run."
    )


def _cells(item: Entry) -> tuple[str, ...]:
    runs = len(item.measured)
    here = "-" if item.measured_ap is None else f"{item.measured_ap:.1f} ({runs})"
    return (
        item.name,
        item.data,
        f"{item.iterations} x {item.batch}",
        "-" if item.paper_ap is None else f"{item.paper_ap:.1f}",
        here,
        f"{item.costs.parameters / 1e6:.1f} M" if item.costs else "-",
        f"{item.costs.multiply_adds / 1e9:.1f} G" if item.costs else "-",
    )


def _show(args: argparse.Namespace) -> None:
    item = entry(args.name)
    if args.costs:
        from ..config import get_config
        from .costs import count_costs

        try:
            item = item._replace(costs=count_costs(get_config(args.name)))
        except ValueError as error:
            raise ZooError(f"{item.name} cannot be built here: {error}") from error
    if args.json:
        print(json.dumps(_as_dict(item), indent=1))
        return
    print(*_described(item), sep="\n")


def _described(item: Entry) -> list[str]:
    lines = [
        f"model:       {item.name}" + (f", {item.about}" if item.about else ""),
        f"recipe:      {item.config}",
        f"schedule:    {item.iterations} iterations of {item.batch} images",
        f"data:        {item.data}",
        f"AP, paper:   {item.paper}",
    ]
    for run in item.measured:
        lines.append(f"AP, here:    {run.ap:.1f}, seed {run.seed}, commit {run.commit}")
    if not item.measured:
        lines.append("AP, here:    not run")
    if item.costs:
        height, width = item.costs.image
        lines += [
            f"parameters:  {item.costs.parameters:,}",
            f"mult-adds:   {item.costs.multiply_adds:,} of one {height}x{width} image",
        ]
    else:
        lines.append("costs:       not counted; type --costs")
    if "_bccd" not in item.name:
        return [*lines, "weights:     none are published"]
    try:
        return [*lines, f"weights:     {trained_weights(item.name)}"]
    except ZooError:
        return [*lines, f"weights:     none yet; to train them: {train_command(item.name)}"]


def _as_dict(item: Entry) -> dict[str, object]:
    made = item._asdict()
    made["measured"] = [run._asdict() for run in item.measured]
    made["measured_ap"] = item.measured_ap
    made["costs"] = item.costs._asdict() if item.costs else None
    return made


def _update(args: argparse.Namespace) -> None:
    from .update import update

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    models, counted = update(recount=args.recount, only=args.only.split(",") if args.only else None)
    print(f"{models} models, costs of {counted} counted")


if __name__ == "__main__":
    sys.exit(main())
