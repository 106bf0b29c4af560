"""How much of DA3's features survives a projection to few numbers, and int8 instead of float16?

    python benchmarks/bench_feature.py [--da3 DIR] [--preset da3-small] [--process-res 252] [--frames 64]

A basis is fitted to frames of half of a dataset's episodes, and measured on frames of the others. The loss compares
directions, so what counts is the cosine of a feature and its projection, and how far the cosines between features of
different patches, frames and cameras move. Features of a network have a large part in common, which makes all raw
cosines high: the cosines of what is left without the mean are measured too.

The pictures are real. The weights are random, unless --da3 names a folder with real ones: those give other figures.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import da3_folder, real_dataset, table
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.feature_basis import FeatureMoments
from geomcache.frames.source import FrameDataset, open_dataset

PAIRS = 200_000


def features_of(encoder: DA3Encoder, dataset: FrameDataset, rows: list[int]) -> list[Tensor]:
    """Return the features of each frame, float32 [cells of its views, width]."""
    frames = (encoder.preprocess(dataset.reader.read(row, row + 1).images) for row in rows)
    return [encoder.raw_features(inputs).cpu() for inputs in frames]


def spread_rows(dataset: FrameDataset, episodes: list[int], frames: int) -> list[int]:
    """Return so many rows of these episodes, evenly spaced."""
    starts, lengths = dataset.reader.episode_start, dataset.reader.episode_length
    rows = np.concatenate([starts[episode] + np.arange(lengths[episode]) for episode in episodes])
    return [int(row) for row in rows[np.linspace(0, len(rows) - 1, min(frames, len(rows))).astype(int)]]


def cosines(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines of pairs of features."""
    return torch.nn.functional.cosine_similarity(features[first], features[second], dim=1)


def as_int8(projected: Tensor, scale: Tensor) -> Tensor:
    """Return what int8 keeps of numbers; `scale` is the largest size of each cell, or of each channel."""
    return (projected / scale * 127).round().clamp(-127, 127) * scale / 127


def measure(features: Tensor, kept: Tensor, basis: Tensor, mean: Tensor) -> list[str]:
    """Compare features [n, width] with what is kept of them [n, D]."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(len(features), (PAIRS,), generator=generator) for _ in range(2))
    centered, kept_centered = features - mean, kept - mean @ basis
    back = kept @ basis.T
    alone = torch.nn.functional.cosine_similarity(back, features, dim=1)
    variance = 1 - (centered - kept_centered @ basis.T).square().sum() / centered.square().sum()
    found = [f"{variance:.4f}", f"{alone.mean():.4f}", f"{alone.min():.4f}"]
    for whole, part in ((features, kept), (centered, kept_centered)):
        before, after = cosines(whole, first, second), cosines(part, first, second)
        correlation = torch.corrcoef(torch.stack([before, after]))[0, 1]
        found += [f"{(after - before).abs().mean():.4f}", f"{correlation:.4f}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--da3", type=Path, help="a DA3 folder; without one, random weights are made")
    parser.add_argument("--preset", default="da3-small", help="of the random weights (%(default)s)")
    parser.add_argument("--process-res", type=int, default=252)
    parser.add_argument("--frames", type=int, default=64, help="to fit to, and as many to measure by (%(default)s)")
    parser.add_argument("--dims", default="64,128,256", metavar="D,D")
    arguments = parser.parse_args()
    root = real_dataset()
    dataset, _ = open_dataset(root.name, root=root)
    half = max(1, dataset.spec.episodes // 2)
    rows = [
        spread_rows(dataset, list(range(*part)), arguments.frames)
        for part in ((0, half), (half, dataset.spec.episodes) if dataset.spec.episodes > 1 else (0, 1))
    ]
    with da3_folder(arguments.da3, arguments.preset) as folder:
        encoder = DA3Encoder.from_pretrained(
            str(folder), cameras=dataset.cameras, process_res=arguments.process_res, grid="patch"
        )
        fitted, held_out = (torch.cat(features_of(encoder, dataset, each)) for each in rows)
    moments = FeatureMoments(encoder.feature_width)
    moments.add(fitted)
    mean, cells = fitted.mean(0), encoder.spec.grid_hw[0] * encoder.spec.grid_hw[1]
    lines = []
    for dim in map(int, arguments.dims.split(",")):
        basis = torch.from_numpy(moments.basis(dim))
        exact, of_fitted = held_out @ basis, fitted @ basis
        by_cell = exact.abs().amax(1, keepdim=True).half().float()
        ways = {
            "float16": (exact.half().float(), 2 * dim),
            "int8, a scale a cell": (as_int8(exact, by_cell), dim + 2),
            "int8, a scale a channel": (as_int8(exact, of_fitted.abs().amax(0)), dim),
        }
        for name, (kept, nbytes) in ways.items():
            size = f"{cells * nbytes / 1000:.1f} kB"
            lines.append([f"{dim}", name, size, *measure(held_out, kept, basis, mean)])
    table(
        f"What is left of {encoder.feature_width} features a patch: {encoder.spec.model_name}, random weights",
        f"A basis fitted to {len(rows[0])} frames of {root.name}, measured on {len(rows[1])} frames of other episodes,"
        f" {len(dataset.cameras)} cameras at {arguments.process_res} px, {cells} cells a view. `variance`: share"
        " of that around the mean; `itself`: cosine of a feature and what is kept of it; `between`: the cosines of"
        f" {PAIRS:,} pairs of patches, how far they move (mean) and how they correlate with those of all numbers; then"
        " the same without the mean.",
        ["D", "stored as", "a view", "variance", "itself", "least", "between", "corr.", "no mean", "corr."],
        lines,
    )


if __name__ == "__main__":
    main()
