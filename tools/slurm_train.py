# SPDX-License-Identifier: Apache-2.0
"""Train on a Slurm cluster: the options of d2_decouple.train, and those of the job.

    python tools/slurm_train.py --nodes 2 --partition gpu --config-file fcos_R_50_FPN_1x

A job that Slurm is about to stop (its time is over, or another one is preferred) ends its step,
saves, and is queued again; it goes on from there. It needs submitit: pip install "submitit>=1.5".
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d2_decouple import train
from d2_decouple.config import ConfigError, find_config

_TOOLS = str(Path(__file__).resolve().parent)
_BELOW = f"\n{'-' * 22}\nYou can check"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args, rest = parse_arguments(arguments)
    try:
        return submit(args, rest)
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The job's options, and what is left for ``python -m d2_decouple.train``."""
    parser = argparse.ArgumentParser(
        description="Train on a Slurm cluster. All other options and key=value are those of "
        "`python -m d2_decouple.train`: --config-file, --dataset, --method, --host, --size, "
        "--eval-only, --resume.",
        allow_abbrev=False,
    )
    parser.add_argument("--partition", help="where the job runs")
    parser.add_argument("--nodes", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, help="one process each; 0 for CPUs (%(default)s)"
    )
    parser.add_argument(
        "--processes-per-node", type=int, help="by default one for each GPU, on CPUs one"
    )
    parser.add_argument("--cpus-per-process", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--time", type=int, default=1440, help="minutes (%(default)s)")
    parser.add_argument(
        "--requeues", type=int, default=10, help="times that it may run out of time (%(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("output/slurm"), help="of the job's logs (%(default)s)"
    )
    parser.add_argument("--name", default="d2_decouple", help="of the job (%(default)s)")
    parser.add_argument(
        "--sbatch",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a further option of sbatch, such as account=vision; may be repeated",
    )
    parser.add_argument(
        "--executor",
        choices=("slurm", "local"),
        default="slurm",
        help="local: on this machine, to try it (%(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and stop")
    args, rest = parser.parse_known_args(arguments)
    args.processes = args.processes_per_node or max(1, args.gpus_per_node)
    return args, rest


def submit(args: argparse.Namespace, rest: list[str]) -> int:
    """Check the command line here, where its mistakes are seen, and send the job off."""
    wanted = train.parse_arguments(rest)
    if wanted.config_file:
        find_config(wanted.config_file)
    elif not wanted.dataset:
        raise ConfigError("no config given: type --config-file NAME_OR_FILE, or --dataset FOLDER")
    if args.gpus_per_node and args.processes != args.gpus_per_node:
        raise ConfigError(
            f"--processes-per-node {args.processes} with --gpus-per-node {args.gpus_per_node}: a "
            "process has one GPU; leave --processes-per-node out, or type --gpus-per-node 0"
        )
    submitit = _submitit()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        print(sbatch_script(args))
        return 0
    executor = _executor(submitit, args)
    # The job's processes import this file.
    paths = [_TOOLS, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    job = executor.submit(Training(rest))
    print(f"job {job.job_id}; its logs: {job.paths.stdout.parent}")
    return _wait(job, args.processes) if args.executor == "local" else 0


def _wait(job: Any, processes: int) -> int:
    """The exit status of a job on this machine; what went wrong is said, with the log to read."""
    status = 0
    for index in range(processes):
        task = job.task(index)
        if failure := task.exception():
            said = str(failure)  # a traceback, and below it where submitit's logs are
            lines = (said.rpartition(_BELOW)[0] or said).split("\n")
            what = next(line for line in reversed(lines) if line.strip())
            status = max(status, 1)
        elif result := task.result():
            what = f"the training ended with status {result}"
            status = max(status, result)
        else:
            continue
        print(f"error: process {index}: {what}; its log: {task.paths.stdout}", file=sys.stderr)
    return status


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise ConfigError('submitit is not installed; type: pip install "submitit>=1.5"') from error


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What sbatch is told, by submitit's names for Slurm."""
    more = {}
    for item in args.sbatch:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--sbatch {item!r} has no value; type --sbatch KEY=VALUE")
        more[key.replace("_", "-")] = value
    parameters = {
        "job_name": args.name,
        "partition": args.partition,
        "time": args.time,
        "nodes": args.nodes,
        "ntasks_per_node": args.processes,
        "cpus_per_task": args.cpus_per_process,
        "gpus_per_node": args.gpus_per_node or None,
        "signal_delay_s": 120,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **more},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def sbatch_script(args: argparse.Namespace) -> str:
    """What would be given to sbatch; a cluster is not needed for it."""
    slurm = importlib.import_module("submitit.slurm.slurm")
    folder = args.folder.resolve()
    command = f"{sys.executable} -u -m submitit.core._submit {folder}"
    return str(slurm._make_sbatch_string(command=command, folder=folder, **_parameters(args)))


def _executor(submitit: Any, args: argparse.Namespace) -> Any:
    if args.executor == "local":
        if args.nodes > 1:
            raise ConfigError(f"--executor local is one machine, got --nodes {args.nodes}")
        executor = submitit.LocalExecutor(args.folder, max_num_timeout=args.requeues)
        executor.update_parameters(
            timeout_min=args.time,
            tasks_per_node=args.processes,
            gpus_per_node=args.gpus_per_node,
            stderr_to_stdout=True,
        )
        return executor
    try:
        executor = submitit.SlurmExecutor(args.folder, max_num_timeout=args.requeues)
    except RuntimeError as error:
        raise ConfigError(
            f"{error} Type --dry-run to see the script here, or --executor local to run it here"
        ) from error
    executor.update_parameters(**_parameters(args))
    return executor


class Training:
    """A training as a job: what each of its processes calls, and calls again after a break."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """
        Args:
            arguments: of ``python -m d2_decouple.train``.
        """
        self.arguments = list(arguments)

    def __call__(self) -> int:
        """Train in this process; the exit status."""
        submitit = _submitit()
        environment = submitit.JobEnvironment()
        # Each process sees all GPUs and takes its own, as under torchrun.
        submitit.helpers.TorchDistributedEnvironment().export(
            set_cuda_visible_devices=False, overwrite=True
        )
        os.environ["TORCHELASTIC_RUN_ID"] = str(environment.job_id)  # several processes
        number = getattr(signal, f"SIG{environment.USR_SIG}")
        queue_again: Any = signal.getsignal(number)  # submitit's
        told: list[int] = []
        signal.signal(number, _stop_first(queue_again, told))
        again = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
        status = train.main([*["--resume"][: int(again)], *self.arguments])
        if told and status:
            queue_again(number, None)  # does not come back in the first process
        return status

    def checkpoint(self) -> Any:
        """The same training from its last checkpoint on, which is saved by now."""
        return _submitit().helpers.DelayedSubmission(Training(["--resume", *self.arguments]))


def _stop_first(queue_again: Any, told: list[int]) -> Callable[[int, Any], None]:
    """A handler of Slurm's warning: the training stops when its step is done, and saves."""
    before, process = signal.getsignal(signal.SIGTERM), os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a worker: Slurm signals all processes of a task
            return
        if signal.getsignal(signal.SIGTERM) is before:  # it is not training yet, or not any more
            queue_again(number, frame)
            return
        told.append(number)
        signal.raise_signal(signal.SIGTERM)

    return handle


if __name__ == "__main__":
    # So that the job finds the class by a name, and not in a main module of its own.
    from slurm_train import main as _main

    sys.exit(_main())
