"""Does extraction keep the encoder busy, and does its memory stay where it is?

    python benchmarks/bench_extract.py [--model M] [--process-res 504] [--frames 64] [--batch-size 4] [--repeats 3]
                                       [--engine compiled] [--repeat-dataset 12] [--no-memory]

Three tables: views/s of `geomcache extract` compared with the encoder alone on the same batches, in turn, its start-up
apart from its steady state; what feeding the encoder takes, step by step; and the peak memory of extracting 100 and
1,000 frames. Random weights are good enough: speed does not depend on them.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.common import real_dataset, repeat_dataset, table
from geomcache.da3.encoder import RESIZE_METHOD, DA3Encoder
from geomcache.da3.preprocess import DA3Preprocessor
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import extract
from geomcache.frames.signature import sign_pictures
from geomcache.frames.source import open_dataset
from geomcache.pipeline.handover import open_channel, receive, send
from pipelines.make_random_da3 import save_random_da3

MOST_IN_MEMORY = 480  # frames that the encoder is timed on by itself
FEEDING_BATCHES = 24

# Runs one extraction and prints its peak memory in kilobytes.
MEMORY = """
import json, resource, sys
from pathlib import Path
from geomcache.extraction.run import extract
from geomcache.extraction.options import ExtractOptions
options = json.loads(sys.argv[1])
options.update(root=Path(options["root"]), output=Path(options["output"]))
report = extract(ExtractOptions(**options))
print(json.dumps([report.frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def encoder_alone(encoder: DA3Encoder, batches: list[torch.Tensor]) -> float:
    """Time the encoder alone, its results copied to the host as extraction does; views/s."""
    began = time.perf_counter()
    for batch in batches:
        geometry = encoder.forward(batch)
        for _, values in geometry.items():
            values.cpu()
    views = sum(batch.shape[0] * batch.shape[1] for batch in batches)
    return views / (time.perf_counter() - began)


def median_ratio(rates: list[float], references: list[float]) -> float:
    return statistics.median(rate / reference for rate, reference in zip(rates, references, strict=True))


def speed(arguments: argparse.Namespace, model: str, root: Path, folder: Path) -> None:
    dataset, _ = open_dataset("bench", root=root)
    encoder = DA3Encoder.from_pretrained(model, cameras=dataset.cameras, process_res=arguments.process_res)
    if arguments.engine == "compiled":
        encoder.compile(arguments.batch_size)
    lengths = dataset.reader.episode_length.cumsum()
    episodes = int((lengths < arguments.frames).sum()) + 1
    rows = int(lengths[episodes - 1])
    size = arguments.batch_size
    batches: list[torch.Tensor] = []
    for start in range(0, min(rows, MOST_IN_MEMORY), size):
        inputs = encoder.preprocess(dataset.reader.read(start, min(start + size, rows)).images)
        assert isinstance(inputs, torch.Tensor), "cameras of one size"
        batches.append(inputs)
    encoder_alone(encoder, batches[:2])
    alone, whole, steady, startup = [], [], [], []
    for repeat in range(arguments.repeats):
        alone.append(encoder_alone(encoder, batches))
        report = extract(
            ExtractOptions(
                model=model,
                dataset="bench",
                root=root,
                episodes=f"0:{episodes}",
                output=folder / f"speed{repeat}.zarr",
                process_res=arguments.process_res,
                batch_size=size,
                num_workers=arguments.num_workers,
                engine=arguments.engine,
            )
        )
        shutil.rmtree(folder / f"speed{repeat}.zarr")
        whole.append(report.views / report.seconds)
        steady.append(report.views_per_s or float("nan"))
        startup.append(report.startup_s)
    table(
        f"Extraction compared with the encoder alone, {report.engine}",
        f"{encoder.spec.model_name} at {arguments.process_res} px, {rows} frames of {len(dataset.cameras)} views,"
        f" batches of {size}, engine {report.engine}, {report.workers} decoding process(es). In turn,"
        f" {arguments.repeats} times; medians, the ratios' too. The encoder alone: its forward pass on batches in"
        " memory. `extract` from its first claim to the"
        " seal includes the start of the decoding processes; its steady state begins after the first batch. Start-up"
        f" (metadata, weights, processes, first batch) took {statistics.median(startup):.1f} s; imports are before it.",
        ["", "views/s", "ratio"],
        [
            ["encoder alone", f"{statistics.median(alone):.2f}", "1"],
            ["extract, first claim to seal", f"{statistics.median(whole):.2f}", f"{median_ratio(whole, alone):.3f}"],
            ["extract, steady state", f"{statistics.median(steady):.2f}", f"{median_ratio(steady, alone):.3f}"],
        ],
    )
    for line in report.lines():
        print(line)
    print()


def feeding(arguments: argparse.Namespace, root: Path) -> None:
    """Measure the CPU time of each step between a dataset's files and the encoder's input."""
    dataset, _ = open_dataset("bench", root=root)
    preprocess = DA3Preprocessor(
        cameras=dataset.cameras, process_res=arguments.process_res, resize_method=RESIZE_METHOD
    )
    size = arguments.batch_size
    batches = min(FEEDING_BATCHES, int(dataset.reader.episode_length.sum()) // size)
    channel = open_channel()
    steps: dict[str, list[float]] = {}

    def timed(step: str, run: Callable[..., Any], *values: Any) -> Any:
        began = time.process_time()
        result = run(*values)
        steps.setdefault(step, []).append((time.process_time() - began) / (size * len(dataset.cameras)))
        return result

    for start in range(0, batches * size, size):
        images = timed("decode", dataset.reader.read, start, start + size).images
        timed("signatures", sign_pictures, images)
        inputs = timed("resize", preprocess, images)
        timed("hand over to another process", send, channel[0], inputs)
        received = timed("receive", receive, channel[1])
        timed("read what was received", received.clone)  # maps its pages
    medians = {step: statistics.median(times) for step, times in steps.items()}
    total = sum(medians.values())
    camera = dataset.cameras[0]
    table(
        "Feeding the encoder",
        f"CPU time a view of {camera.height}x{camera.width}, to {arguments.process_res} px, medians of {batches}"
        f" batches of {size} frames of {len(dataset.cameras)} views. The first four steps are a decoding process's.",
        ["step", "us a view", "share", "views/s of one core"],
        [[step, f"{1e6 * each:.0f}", f"{100 * each / total:.0f}%", f"{1 / each:.0f}"] for step, each in medians.items()]
        + [["together", f"{1e6 * total:.0f}", "100%", f"{1 / total:.0f}"]],
    )


def memory(arguments: argparse.Namespace, model: str, root: Path, folder: Path) -> None:
    dataset, _ = open_dataset("bench", root=root)
    lengths = dataset.reader.episode_length.cumsum()
    rows = []
    for frames in (100, 1000):
        episodes = min(int((lengths < frames).sum()) + 1, len(lengths))
        options = {
            "model": model,
            "dataset": "bench",
            "root": str(root),
            "episodes": f"0:{episodes}",
            "output": str(folder / f"memory{frames}.zarr"),
            "process_res": 112,
            "grid": "native",
            "batch_size": 4,
            "num_workers": 1,
        }
        command = [sys.executable, "-c", MEMORY, json.dumps(options)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        count, own = json.loads(done.stdout.splitlines()[-1])
        rows.append([str(count), f"{own / 1024:.0f}"])
    table(
        "Peak memory",
        "Whole episodes that hold at least 100 and 1,000 frames, at 112 px on the native grid; peak resident memory of"
        " the process, MiB. Its decoding processes are a fork server's children and not in it.",
        ["frames", "extract"],
        rows,
    )


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: random weights of DA3-LARGE on CUDA, of DA3-SMALL on a CPU")
    parser.add_argument("--root", type=Path, default=real_dataset())
    parser.add_argument("--process-res", type=int, default=504 if cuda else 252)
    parser.add_argument("--frames", type=int, default=2000 if cuda else 120)
    parser.add_argument("--batch-size", type=int, default=16 if cuda else 4)
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--repeat-dataset", type=int, default=1, metavar="N", help="take its episodes N times")
    parser.add_argument("--no-memory", action="store_true", help="leave the last table out")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-extract-"))
    try:
        model = arguments.model
        if model is None:
            model = str(folder / "model")
            save_random_da3(folder / "model", "da3-large" if cuda else "da3-small")
        root = arguments.root
        if arguments.repeat_dataset > 1:
            root = repeat_dataset(root, folder / "dataset", arguments.repeat_dataset)
        speed(arguments, model, root, folder)
        feeding(arguments, root)
        if not arguments.no_memory:
            memory(arguments, model, root, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
