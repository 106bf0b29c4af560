"""Stage one through datatrove, as LeRobot's own examples port datasets: ranks here, or as an array of Slurm jobs.

    python pipelines/slurm/extract_datatrove.py --executor local --tasks 4 --workers 2 --logs logs \\
        -- --model DA3-SMALL --dataset HuggingFaceVLA/libero --output libero.zarr
    python pipelines/slurm/extract_datatrove.py --executor slurm --tasks 64 --workers 16 --partition gpu \\
        --logs /shared/logs -- --model DA3-LARGE-1.1 --dataset HuggingFaceVLA/libero --output /shared/libero.zarr

Options after `--` are those of `geomcache extract`. A task makes an equal share of the shards and is one rank: a rank
that failed is started again, alone, by the same command. `--workers` says how many run at a time. Slurm's jobs share
the cache through the locks of its file system, as those of extract_array.sh do: check_locks.sh asks the file system.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor

from geomcache.cli.extract import register
from geomcache.extraction.datatrove import ExtractShards
from geomcache.extraction.options import ExtractOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--executor", choices=("local", "slurm"), required=True)
    parser.add_argument("--tasks", type=int, required=True, help="ranks: parts of the work")
    parser.add_argument("--workers", type=int, default=-1, help="ranks at a time (all)")
    parser.add_argument("--logs", type=Path, required=True, help="datatrove's folder: logs, and which ranks are done")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument("--time", default="12:00:00", help="of a Slurm job (%(default)s)")
    parser.add_argument("--cpus", type=int, default=8, help="of a Slurm job (%(default)s)")
    parser.add_argument("--gb-per-cpu", type=int, default=4, help="memory of a Slurm job (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="of a Slurm job (%(default)s)")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of geomcache extract")
    arguments = parser.parse_args()
    if arguments.executor == "slurm" and arguments.partition is None:
        parser.error("--partition: expected with --executor slurm, got none")
    make_executor(arguments, parse_options(arguments.options)).run()


def parse_options(arguments: Sequence[str]) -> ExtractOptions:
    """Return options of `geomcache extract` as the command line reads them."""
    taken: list[ExtractOptions] = []
    app = typer.Typer(add_completion=False)
    register(app, taken.append)
    if code := app([*arguments], standalone_mode=False):  # after --help
        raise SystemExit(code)
    if not taken:
        raise SystemExit(0)
    options = taken[0]
    if options.overwrite or options.dry_run or options.follow or options.cluster:
        print(
            "extract_datatrove.py: expected none of --overwrite, --dry-run, --follow and --cluster, which are for one"
            " process, got one",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return options


def make_executor(arguments: argparse.Namespace, options: ExtractOptions) -> PipelineExecutor:
    """Return datatrove's executor: the step is the same for both."""
    pipeline = [ExtractShards(options)]
    if arguments.executor == "local":
        return LocalPipelineExecutor(
            pipeline, tasks=arguments.tasks, workers=arguments.workers, logging_dir=str(arguments.logs)
        )
    return SlurmPipelineExecutor(
        pipeline,
        tasks=arguments.tasks,
        workers=arguments.workers,
        logging_dir=str(arguments.logs),
        job_name="geomcache-extract",
        partition=arguments.partition,
        time=arguments.time,
        cpus_per_task=arguments.cpus,
        mem_per_cpu_gb=arguments.gb_per_cpu,
        gpus_per_task=arguments.gpus,
        qos="",
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",  # where launch_pickled_pipeline is
    )


if __name__ == "__main__":
    main()
