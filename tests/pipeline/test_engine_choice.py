"""Which engine extraction takes, for a device, a rate and a number of frames."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.engine import EngineName
from geomcache.pipeline import engine_choice
from geomcache.pipeline.engine_choice import LONG_ENOUGH_S, choose_engine
from tests.support.logs import logged_lines

RATE = 100.0  # views/s


class Encoder:
    """Stands for an encoder on a device; `error` is raised by compiling, `falls_back` leaves it eager."""

    def __init__(self, device: str, *, error: Exception | None = None, falls_back: bool = False) -> None:
        self.device, self.engine = torch.device(device), "eager"
        self.spec = SimpleNamespace(cameras=("front", "wrist"))
        self.compiled_for: list[int] = []
        self._error, self._falls_back = error, falls_back

    def compile(self, frames: int) -> float:
        self.compiled_for.append(frames)
        if self._error is not None:
            raise self._error
        self.engine = "eager" if self._falls_back else "compiled"
        return 20.0


def choose(encoder: Encoder, asked: EngineName | None, frames: int) -> list[str]:
    with logged_lines() as lines:
        choose_engine(asked, cast("DA3Encoder", encoder), frames, 16)
    return lines


@pytest.fixture(autouse=True)
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "measure_views_per_s", lambda _encoder, _batch_size: RATE)


def test_a_long_run_on_cuda_compiles_and_a_short_one_does_not() -> None:
    just_long_enough = int(LONG_ENOUGH_S * RATE / 2)  # of two views each
    for frames, engine in ((just_long_enough, "eager"), (just_long_enough + 1, "compiled")):
        encoder = Encoder("cuda")
        lines = choose(encoder, None, frames)
        assert encoder.engine == engine
        assert len(lines) == (1 if engine == "compiled" else 0)
    assert "batches of 16" in lines[0]
    assert "20" in lines[0]


def test_a_cpu_compiles_only_if_it_is_asked_to() -> None:
    encoder = Encoder("cpu")
    assert choose(encoder, None, 10**9) == []
    assert encoder.engine == "eager"
    choose(encoder, "compiled", 1)
    assert encoder.engine == "compiled"


def test_eager_is_never_measured_nor_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(engine_choice, "measure_views_per_s")
    encoder = Encoder("cuda")
    assert choose(encoder, "eager", 10**9) == []
    assert encoder.compiled_for == []


def test_a_device_without_memory_for_the_measurement_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "measure_views_per_s", lambda _encoder, _batch_size: None)
    encoder = Encoder("cuda")
    choose(encoder, None, 10**9)
    assert encoder.engine == "eager"


def test_no_memory_while_compiling_leaves_it_to_the_run() -> None:
    encoder = Encoder("cuda", error=torch.OutOfMemoryError("out of memory"))
    assert choose(encoder, "compiled", 1) == []
    with pytest.raises(RuntimeError, match="lost"):
        choose(Encoder("cuda", error=RuntimeError("the device was lost")), "compiled", 1)


def test_a_fallback_is_not_reported_as_compiled() -> None:
    assert choose(Encoder("cuda", falls_back=True), "compiled", 1) == []
