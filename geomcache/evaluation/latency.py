"""Time a policy's chunks of actions and their parts: the geometry, the prefix, the denoising.

    predict_action_chunk ─┬─ geometry_of                    DA3, where the policy encodes pictures
                          ├─ (all else)                     picture sizes, adapter, embedding and pass of the prefix
                          └─ model.denoise_step, repeated   the denoising

The three methods are wrapped on the policy object itself; its class stays as it is. Threads may share the policy: each
chunk is timed by the thread that predicts it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from geomcache.geometry import batch_key


@dataclass(frozen=True, kw_only=True)
class ChunkTime:
    """Seconds that one chunk took."""

    total: float
    geometry: float
    """DA3's part; about zero for a batch that brings its geometry."""
    denoising: float
    denoising_steps: int

    @property
    def prefix(self) -> float:
        """Seconds of all that is neither geometry nor denoising."""
        return self.total - self.geometry - self.denoising


class _Parts(threading.local):
    """Seconds that the parts of the current chunk took, of each thread by itself."""

    def __init__(self) -> None:
        self.geometry: list[float] = []
        self.denoising: list[float] = []
        self.encoder_calls = 0
        """Calls of the encoder since the timer was made; not only those of the current chunk."""


class ChunkTimer:
    """Timer of every chunk that a policy predicts from now on.

    A policy that is compiled (`compile_model`) denoises inside of the compiled function: its prefix and denoising are
    not told apart.

    Attributes:
        times: times of the chunks, in the order in which they were finished.
    """

    def __init__(self, policy: Any) -> None:
        """Start to time a policy of LeRobot's or a `GeometryPolicy`, wrapped in a `PeftModel` or not."""
        self.times: list[ChunkTime] = []
        self._policy = unwrapped(policy)
        self._cuda = str(self._policy.config.device).startswith("cuda")
        self._parts = _Parts()
        chunk_method = getattr(self._policy, "chunk_method", "predict_action_chunk")
        predict = getattr(self._policy, chunk_method)
        if hasattr(self._policy, "geometry_of"):
            self._policy.geometry_of = self._counted(
                self._timed(self._policy.geometry_of, lambda: self._parts.geometry)
            )
        if not self._policy.config.compile_model:
            denoise_step = self._policy.model.denoise_step
            self._policy.model.denoise_step = self._timed(denoise_step, lambda: self._parts.denoising)
        setattr(self._policy, chunk_method, lambda *args, **kwargs: self._chunk(predict, *args, **kwargs))

    @property
    def encoder_calls(self) -> int:
        """Calls of the policy's DA3 encoder since it was loaded."""
        encoder = getattr(getattr(self._policy, "online", None), "encoder", None)
        return 0 if encoder is None else int(encoder.calls)

    @property
    def encoder_calls_of_thread(self) -> int:
        """Calls of the encoder for chunks that this thread has predicted."""
        return self._parts.encoder_calls

    def lines(self) -> list[str]:
        """Return a table for the user: median and 95th percentile in milliseconds, of all chunks but the first.

        The first chunk loads the encoder and warms up; it has a line of its own.
        """
        if not self.times:
            return ["chunks of actions: 0"]
        lines = [
            f"chunks of actions: {len(self.times)}; calls of the encoder: {self.encoder_calls}",
            f"first chunk: {self.times[0].total:.2f} s, with loading",
        ]
        warm = self.times[1:]
        if not warm:
            return lines
        parts = {"DA3": [chunk.geometry for chunk in warm], "prefix": [chunk.prefix for chunk in warm]}
        if warm[0].denoising_steps:
            parts["denoising"] = [chunk.denoising for chunk in warm]
        parts["chunk"] = [chunk.total for chunk in warm]
        lines.append(f"{'latency, ms':<12}{'median':>9}{'p95':>9}")
        for name, seconds in parts.items():
            median, p95 = np.percentile(seconds, (50, 95)) * 1e3
            lines.append(f"  {name:<10}{median:>9.1f}{p95:>9.1f}")
        return lines

    def _chunk(self, predict: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        parts = self._parts
        parts.geometry.clear()
        parts.denoising.clear()
        total: list[float] = []
        chunk = self._timed(predict, lambda: total)(*args, **kwargs)
        self.times.append(
            ChunkTime(
                total=total[0],
                geometry=sum(parts.geometry),
                denoising=sum(parts.denoising),
                denoising_steps=len(parts.denoising),
            )
        )
        return chunk

    def _counted(self, geometry_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap the policy's method so that batches without geometry are counted: those it encodes."""

        def counted(batch: Any) -> Any:
            geometry = geometry_of(batch)
            self._parts.encoder_calls += batch_key("ray") not in batch
            return geometry

        return counted

    def _timed(self, function: Callable[..., Any], seconds: Callable[[], list[float]]) -> Callable[..., Any]:
        """Wrap a function so that the seconds of each call are appended to what `seconds` returns then."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            result = function(*args, **kwargs)
            seconds().append(self._now() - began)
            return result

        return timed

    def _now(self) -> float:
        if self._cuda:
            import torch

            torch.cuda.synchronize()  # kernels run on after the call that started them returns
        return time.perf_counter()


def unwrapped(policy: Any) -> Any:
    """Return the policy without the `PeftModel` around it."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy
