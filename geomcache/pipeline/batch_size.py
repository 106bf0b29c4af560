"""How many frames a forward pass should take: as many as fit into memory, as long as more are faster."""

import resource
import time
from pathlib import Path

import numpy as np
import torch

from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.engine import is_out_of_memory
from geomcache.errors import EncoderMemoryError

GPU_BATCH, CPU_BATCH = 16, 4  # frames per forward pass, where nothing else is asked for
MOST_FRAMES = 256
GAIN = 1.02  # views/s that doubling a batch must gain: beyond, it costs memory and brings nothing
HEADROOM = 0.8  # share of the available memory that may be used: decoding, writing and other programs need some


def default_batch_size(device: torch.device) -> int:
    """Return the frames per forward pass on a device, if the user does not say."""
    return CPU_BATCH if device.type == "cpu" else GPU_BATCH


def find_batch_size(encoder: DA3Encoder, *, most: int = MOST_FRAMES) -> tuple[int, str]:
    """Find the largest power of two of frames that fits into memory, as long as doubling makes it faster.

    Sizes are tried, doubling from 1, with black images: the cost of a forward pass does not depend on its input.

    Args:
        encoder: on its device.
        most: frames, at most.

    Returns:
        The batch size, in frames, and a text that says how fast it is and why it is no larger.

    Raises:
        EncoderMemoryError: not even one frame fits.
    """
    rate = measure_views_per_s(encoder, 1)
    if rate is None:
        raise memory_error(encoder)
    size, reason = 1, f"at most {most} frames are tried"
    while 2 * size <= most:
        doubled = measure_views_per_s(encoder, 2 * size) if _fits_twice(encoder.device) else None
        if doubled is None:
            reason = f"{2 * size} do not fit into the memory of {encoder.device}"
            break
        if doubled < GAIN * rate:
            reason = f"{2 * size} are no faster"
            break
        size, rate = 2 * size, doubled
    return size, f"{rate:.1f} views/s; {reason}"


def memory_error(encoder: DA3Encoder) -> EncoderMemoryError:
    """Return the error for the user that even one frame is too many."""
    return EncoderMemoryError(
        f"{encoder.device}: expected memory for one frame of {encoder.spec.model_name} at"
        f" {encoder.spec.process_res} px, found too little: free some, or take a smaller --model or"
        " --process-res; shards that were already written are kept"
    )


def measure_views_per_s(encoder: DA3Encoder, frames: int) -> float | None:
    """Time a batch of so many frames; None if memory does not suffice."""
    inputs = encoder.preprocess(
        [np.zeros((frames, camera.height, camera.width, 3), np.uint8) for camera in encoder.spec.cameras]
    )
    try:
        encoder.launch(inputs).result()  # the first pass at a size warms up
        began = time.perf_counter()
        encoder.launch(inputs).result()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return frames * len(encoder.spec.cameras) / (time.perf_counter() - began)
    torch.cuda.empty_cache()  # outside the handler, whose traceback keeps memory alive; does nothing without CUDA
    return None


def _fits_twice(device: torch.device) -> bool:
    """Estimate whether a forward pass fits that needs twice the memory of the largest so far.

    On a CPU this must be known beforehand: Linux grants more memory than exists and kills the process that uses it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
        return 2 * peak <= HEADROOM * (free + reserved)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak <= HEADROOM * _available_bytes()


def _available_bytes() -> int:
    """Return Linux's estimate of the memory that programs can get without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/meminfo: expected MemAvailable, found none: pass a number to --batch-size")
