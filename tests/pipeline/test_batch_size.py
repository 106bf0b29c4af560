"""The batch size that is found, with an encoder whose speed and memory are made up."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import EncoderMemoryError
from geomcache.geometry import Camera
from geomcache.pipeline import batch_size as memory


class MadeUp:
    """Encodes `fits` frames at most, in `seconds(frames)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fits: int, seconds: Callable[[int], float]) -> None:
        self.device = torch.device("cpu")
        self.spec: Any = SimpleNamespace(
            cameras=(Camera(key="a", height=4, width=6), Camera(key="b", height=8, width=6)),
            model_name="made-up",
            process_res=56,
        )
        self.fits, self.seconds, self.now, self.sizes = fits, seconds, 0.0, list[int]()
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def preprocess(self, images: list[Any]) -> int:
        assert [image.shape[1:] for image in images] == [(4, 6, 3), (8, 6, 3)]
        assert all(image.dtype == np.uint8 for image in images)
        return len(images[0])

    def launch(self, frames: int) -> Any:
        if frames > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(frames)
        self.now += self.seconds(frames)
        return SimpleNamespace(result=lambda: None)


def find(encoder: MadeUp, most: int = memory.MOST_FRAMES) -> tuple[int, str]:
    return memory.find_batch_size(cast("DA3Encoder", encoder), most=most)


def test_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MadeUp(monkeypatch, fits=21, seconds=lambda frames: 1.0 + frames / 4)
    assert find(encoder) == (16, "6.4 views/s; 32 do not fit into the memory of cpu")
    assert encoder.sizes == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]  # each once to warm up


def test_larger_ones_that_gain_nothing_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MadeUp(monkeypatch, fits=1000, seconds=lambda frames: max(1.0, frames / 4))
    assert find(encoder) == (4, "8.0 views/s; 8 are no faster")


def test_no_more_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MadeUp(monkeypatch, fits=1000, seconds=lambda frames: 1.0)
    assert find(encoder, most=12) == (8, "16.0 views/s; at most 12 frames are tried")


def test_not_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EncoderMemoryError, match="made-up.* 56 px"):
        find(MadeUp(monkeypatch, fits=0, seconds=lambda frames: 1.0))


def test_another_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MadeUp(monkeypatch, fits=9, seconds=lambda frames: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find(encoder)


def test_a_cpu_is_not_filled_to_the_brim(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MadeUp(monkeypatch, fits=1000, seconds=lambda frames: 1.0)
    peaks = iter([100, 100, 100, 100])  # before 2, 4, 8 and 16
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=next(peaks)))
    available = iter([200_000, 200_000, 200_000, 100_000])
    monkeypatch.setattr(memory, "_available_bytes", lambda: next(available))
    assert find(encoder)[0] == 8


def test_what_is_available_is_less_than_there_is() -> None:
    import os

    assert 0 < memory._available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
