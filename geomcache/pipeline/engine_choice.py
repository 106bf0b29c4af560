"""Which engine stage one runs the network with."""

import logging

from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.engine import EngineName, is_out_of_memory
from geomcache.pipeline.batch_size import measure_views_per_s
from geomcache.progress import human_time

logger = logging.getLogger(__name__)

# Compiling DA3-LARGE takes about 20 s and a compiled network 0.63 of the time (one H200, benchmarks/RESULTS.md): a run
# is shorter with it from about 55 s of eager work on. Shorter ones would also start later, for nothing that anyone
# would notice.
LONG_ENOUGH_S = 120.0


def choose_engine(asked: EngineName | None, encoder: DA3Encoder, frames: int, batch_size: int) -> None:
    """Compile the encoder if it was asked for, or if it is worth it: on CUDA, for `LONG_ENOUGH_S` of eager work.

    Args:
        asked: by the user; None leaves the choice to this function.
        encoder: eager.
        frames: that this process has to encode.
        batch_size: frames per forward pass.
    """
    if asked is None and encoder.device.type == "cuda":
        rate = measure_views_per_s(encoder, batch_size)
        eager_s = frames * len(encoder.spec.cameras) / rate if rate else 0.0  # without the memory for it: eager
        asked = "compiled" if eager_s > LONG_ENOUGH_S else "eager"
    if asked != "compiled":
        return
    try:
        seconds = encoder.compile(batch_size)
    except RuntimeError as error:  # the run itself continues with smaller batches
        if not is_out_of_memory(error):
            raise
        return
    if encoder.engine == "compiled":
        logger.info("%s: compiled the encoder for batches of %d in %s", encoder.device, batch_size, human_time(seconds))
