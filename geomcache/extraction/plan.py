"""What an extraction or an update will cost: rows, bytes, and time, which is measured on a few batches."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.codecs import Codec
from geomcache.cache.layout import HUB_FOLDER_ENTRIES, Layout, choose_shard_frames, shards_nbytes
from geomcache.cache.signatures import TOLERANCE, Signatures
from geomcache.cache.store import GeometryStore
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import OutOfSpaceError
from geomcache.frames.compare import SAMPLE_S, SAMPLED_EPISODES
from geomcache.frames.signature import sign_pictures
from geomcache.frames.source import FrameDataset
from geomcache.geometry import PATCH_SIZE, GeometrySpec
from geomcache.pipeline.carry import Carrier
from geomcache.pipeline.decoding import BatchDecoder
from geomcache.pipeline.encoding import EncoderOnDemand
from geomcache.pipeline.pipeline import Machinery
from geomcache.progress import human_bytes, human_time
from geomcache.ranges import count_rows

TIMED_BATCHES = 3
_MUCH_MEMORY = 1 << 30


def describe_plan(
    path: Path | str,
    dataset: FrameDataset,
    encoder: DA3Encoder,
    rows: list[tuple[int, int]],
    batch_size: int,
    codec: Codec,
) -> Iterator[str]:
    """Yield lines about what a run would do; a few batches are decoded and encoded, one by one, to estimate the time.

    Raises:
        GeomcacheError: a frame cannot be decoded, or the encoder fails on it.
    """
    spec, frames = encoder.spec, count_rows(rows)
    yield f"dataset   {dataset.spec.repo_id}: {dataset.spec.episodes} episodes, {dataset.spec.frames} frames"
    yield f"frames    {frames}"
    yield f"views     {frames * len(spec.cameras)} ({', '.join(spec.camera_keys)})"
    yield f"model     {spec.model_id} ({spec.model_name}) on {encoder.device}, {spec.compute_dtype}"
    cells = "x".join(map(str, spec.grid_hw))
    yield f"grid      {cells} ({spec.grid} at {spec.process_res} px), {', '.join(spec.outputs)}, {spec.storage_dtype}"
    if spec.feature is not None:
        yield f"feature   {spec.feature.dim} of {spec.feature.width} numbers a patch; a first pass fits the basis"
    yield from _enlarged(spec)
    size = human_bytes(shards_nbytes(spec, frames)) + (f", less what {codec.name} saves" if codec.compresses else "")
    if isinstance(path, Path):
        yield f"output    {path}: {size}; free {human_bytes(_free_bytes(path))}"
    else:
        yield f"output    {path}: {size}"
        requests = count_requests(spec, dataset.spec.frames)
        yield f"requests  about {requests} writes: the files of shards, and lines of the journal"
    yield from describe_shards(spec, dataset.spec.frames)
    encode_s, decode_s = _time_batches(dataset, encoder, rows[0], batch_size)
    yield (
        f"time      about {human_time(frames * encode_s)} for this process, {1e3 * encode_s:.0f} ms a frame;"
        f" decoding takes {1e3 * decode_s:.0f} ms a frame in each worker, in parallel"
    )


def count_requests(spec: GeometrySpec, frames: int) -> int:
    """Return how many objects an extraction of so many frames in a row writes to an object store, about.

    Each shard has a file for each camera and output, three tables and a journal line. Files of more than 64 MiB are
    sent in parts, which count as requests, too.
    """
    layout = Layout.of(spec, frames, choose_shard_frames(spec, frames))
    return layout.shards * (len(layout.keys) + 1)


def describe_shards(spec: GeometrySpec, frames: int) -> Iterator[str]:
    """Yield what is unusual about the shards of a new cache of a dataset with so many frames: memory, number."""
    shard_frames = choose_shard_frames(spec, frames)
    held = shard_frames * spec.frame_nbytes
    if held >= _MUCH_MEMORY:
        yield f"memory    each process holds a shard of {shard_frames} frames, {human_bytes(held)}, until it is written"
    files = -(-frames // shard_frames) + 1
    if files > HUB_FOLDER_ENTRIES:
        yield (
            f"files     {files} in a folder, and the Hub takes {HUB_FOLDER_ENTRIES}: this cache can be pushed to an"
            " object store alone; a coarser --grid makes fewer"
        )


def _enlarged(spec: GeometrySpec) -> Iterator[str]:
    """Yield a line if the network sees larger pictures than the cameras give."""
    side = max(max(camera.height, camera.width) for camera in spec.cameras)
    native = max(PATCH_SIZE, side // PATCH_SIZE * PATCH_SIZE)
    if spec.process_res > side:
        factor = (spec.process_res / native) ** 2
        yield (
            f"enlarged  from {side} px: {factor:.1f} times the work of --process-res {native}; only a run with real"
            " weights can tell what that gains"
        )


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """How many frames of a dataset an update takes from where, as far as one can tell without a look at all of them."""

    kept: int
    """At their places."""
    moved: int
    reencoded: int
    """Of episodes that were encoded again: they are carried over if the user accepts them."""
    encoded: int
    compared: int
    """Episodes whose first picture was looked at; the identities of the others decide here."""


def plan_update(carrier: Carrier, dataset: FrameDataset, wanted: NDArray[np.int64]) -> UpdatePlan:
    """Guess what an update does: look at the first frame of at most 500 episodes, in at most 20 s.

    Args:
        carrier: with an index.
        dataset: as it is now.
        wanted: the dataset's episodes that the new cache is to have.
    """
    reader, counts = dataset.reader, Counter[str]()
    spread = np.linspace(0, len(wanted) - 1, min(len(wanted), SAMPLED_EPISODES)).astype(np.int64)
    sampled, compared, end = {*wanted[spread].tolist()}, 0, time.monotonic() + SAMPLE_S
    for episode in wanted.tolist():
        start, length = int(reader.episode_start[episode]), int(reader.episode_length[episode])
        place, is_reencoded = int(carrier.guesses[episode]), False
        if episode in sampled and (not compared or time.monotonic() < end):
            compared += 1
            signatures = sign_pictures(reader.read(start, start + 1).images)
            place, is_reencoded = _find_episode(carrier, start, signatures)
        places = place + np.arange(length) if place >= 0 else np.full(length, -1)
        present = carrier.caches.present(places)
        here = present & (places == start + np.arange(length))
        counts["encoded"] += int((~present).sum())
        if is_reencoded:
            counts["reencoded"] += int(present.sum())
        else:
            counts["kept"] += int(here.sum())
            counts["moved"] += int((present & ~here).sum())
    return UpdatePlan(**{kind: counts[kind] for kind in ("kept", "moved", "reencoded", "encoded")}, compared=compared)


def _find_episode(carrier: Carrier, start: int, signatures: Signatures) -> tuple[int, bool]:
    """Return the place of an episode's first frame, or -1, and whether its pictures were only encoded again."""
    place = int(carrier.carry(start, signatures).places[0])
    expected = carrier.expected(np.array([start]))
    if place >= 0 or expected[0] < 0:
        return place, False
    distance = carrier.caches.distances(expected, signatures)
    return (int(expected[0]), True) if distance.max() <= TOLERANCE else (-1, False)


def describe_update(
    plan: UpdatePlan,
    store: GeometryStore,
    dataset: FrameDataset,
    rows: list[tuple[int, int]],
    encoder: EncoderOnDemand,
    machinery: Machinery,
    *,
    accept_reencoded: bool,
) -> Iterator[str]:
    """Yield lines about what an update would do. The encoder is loaded if there is something to encode.

    Raises:
        GeomcacheError: a frame cannot be decoded, or the encoder fails on it.
    """
    frames = count_rows(rows)
    to_encode = plan.encoded + (0 if accept_reencoded else plan.reencoded)
    yield f"dataset   {dataset.spec.repo_id}: {dataset.spec.episodes} episodes, {dataset.spec.frames} frames"
    yield f"cache     {store.path}: {store.dataset.episodes} episodes, {store.frames_present} frames"
    yield f"kept      {plan.kept} frames at their places"
    yield f"moved     {plan.moved} frames from other places"
    if plan.reencoded:
        what = "kept as --accept-reencoded asks" if accept_reencoded else "encode anew, or keep with --accept-reencoded"
        yield f"again     {plan.reencoded} frames of videos that were encoded again: {what}"
    yield f"encode    {to_encode} frames"
    yield (
        f"by        identities of episodes, and the first picture of {plan.compared} episodes; the update itself"
        " compares every picture"
    )
    loaded = encoder.get() if to_encode else None
    encode_s, decode_s = _time_batches(dataset, loaded, rows[0], machinery.batch_size)
    seconds = max(frames * decode_s / max(1, machinery.workers), to_encode * encode_s)
    encoding = f", encoding {1e3 * encode_s:.0f} ms a frame" if to_encode else ""
    yield (
        f"time      about {human_time(seconds)}: decoding {1e3 * decode_s:.0f} ms a frame in each of"
        f" {max(1, machinery.workers)} process(es){encoding}"
    )


def _time_batches(
    dataset: FrameDataset, encoder: DA3Encoder | None, rows: tuple[int, int], batch_size: int
) -> tuple[float, float]:
    """Return the median seconds a frame of encoding, and of decoding with preprocessing. Without an encoder neither."""
    start, stop = rows
    count = min(batch_size, stop - start)
    decoder = BatchDecoder(dataset.reader, None if encoder is None else encoder.preprocessor)
    encode_s, decode_s = [], []
    for number in range(1 + TIMED_BATCHES):
        first = start + number * count % (stop - start - count + 1)
        batch = decoder.decode(first, first + count)
        began = time.perf_counter()
        if encoder is not None and batch.inputs is not None:
            encoder.forward(batch.inputs).ray.cpu()  # the copy waits for the device
        if number:  # the first warms up
            encode_s.append((time.perf_counter() - began) / count)
            decode_s.append((batch.decode_s + batch.preprocess_s) / count)
    return float(np.median(encode_s)), float(np.median(decode_s))


def require_space(path: Path, spec: GeometrySpec, frames: int, codec: Codec) -> None:
    """Require room for so many more frames. The size of compressed ones is not known beforehand, so those pass.

    Raises:
        OutOfSpaceError: the file system has too little free space.
    """
    if codec.compresses:
        return
    needed, free = shards_nbytes(spec, frames), _free_bytes(path)
    if needed > free:
        raise OutOfSpaceError(
            f"{path}: expected {human_bytes(needed)} of free space for {frames} frames, found {human_bytes(free)}:"
            " free some, choose another --output, or a coarser --grid"
        )


def _free_bytes(path: Path) -> int:
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
