"""How many frames a forward can take: what memory allows, and what still makes it faster."""

import resource
import time
from pathlib import Path

import numpy as np
import torch

from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import EncoderMemoryError
from geomcache.progress import Say

MOST_FRAMES = 256
GAIN = 1.02  # views/s that doubling a batch must gain: beyond, it costs memory and brings nothing
HEADROOM = 0.8  # share of the memory there is that may be used: decoding, writing and other programs need some


def find_batch_size(encoder: DA3Encoder, say: Say, *, most: int = MOST_FRAMES) -> int:
    """The largest power of two of frames that fits into memory, as far as larger ones are faster.

    Sizes are tried, doubling from 1, with black pictures: what a forward takes does not depend on its input.

    Args:
        encoder: on its device.
        say: takes a line with what was found.
        most: frames, at most.

    Raises:
        EncoderMemoryError: not even one frame fits.
    """
    rate = _try(encoder, 1)
    if rate is None:
        raise memory_error(encoder)
    size, why = 1, f"at most {most} frames are tried"
    while 2 * size <= most:
        doubled = _try(encoder, 2 * size) if _fits_twice(encoder.device) else None
        if doubled is None:
            why = f"{2 * size} do not fit into the memory of {encoder.device}"
            break
        if doubled < GAIN * rate:
            why = f"{2 * size} are no faster"
            break
        size, rate = 2 * size, doubled
    say(f"batch size {size}: {rate:.1f} views/s; {why}")
    return size


def is_out_of_memory(error: RuntimeError) -> bool:
    """There is a class for accelerators' memory alone; the CPU's allocator says it in words."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def memory_error(encoder: DA3Encoder) -> EncoderMemoryError:
    """For the user: one frame is too many."""
    return EncoderMemoryError(
        f"{encoder.device}: expected memory for one frame of {encoder.spec.model_name} at"
        f" {encoder.spec.process_res} px, found too little: free some, or take a smaller --model or"
        " --process-res; shards written before are kept"
    )


def _try(encoder: DA3Encoder, frames: int) -> float | None:
    """Views/s of batches of so many frames; None where memory does not suffice."""
    inputs = encoder.preprocess(
        [np.zeros((frames, camera.height, camera.width, 3), np.uint8) for camera in encoder.spec.cameras]
    )
    try:
        encoder.launch(inputs).result()  # the first of a size warms up
        began = time.perf_counter()
        encoder.launch(inputs).result()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return frames * len(encoder.spec.cameras) / (time.perf_counter() - began)
    torch.cuda.empty_cache()  # outside of the handler, whose traceback holds memory; nothing happens without CUDA
    return None


def _fits_twice(device: torch.device) -> bool:
    """Whether a forward will likely fit that takes twice what the largest took.

    A CPU has to be asked before: Linux gives out more memory than there is, and kills who uses it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held, most = torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
        return 2 * most <= HEADROOM * (free + held)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak <= HEADROOM * _available_bytes()


def _available_bytes() -> int:
    """Memory that programs can get without swapping, by Linux's own estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/meminfo: expected MemAvailable, found none: give --batch-size a number")
