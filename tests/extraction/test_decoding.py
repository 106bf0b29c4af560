"""Batches come in order, whoever decodes them: this process while the workers' imports last, then the workers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geomcache.cache.writer import Claim
from geomcache.da3.encoder import DA3Preprocessor
from geomcache.errors import FrameDecodeError
from geomcache.extraction import decoding
from geomcache.extraction.decoding import Batches, Decoder, ForkServer, Work, decode
from geomcache.frames.source import FrameDataset, open_dataset
from tests.support.datasets import make_dataset

ROWS = 23


class Writer:
    """Three claims; the second has a gap."""

    def __init__(self) -> None:
        self.claims = [Claim(1, ((8, 11), (12, 16))), Claim(2, ((16, ROWS),))]

    def claim(self) -> Claim | None:
        return self.claims.pop(0) if self.claims else None


class Sink:
    def __init__(self) -> None:
        self.claims: list[Claim] = []

    def expect(self, claim: Claim) -> None:
        self.claims.append(claim)


class Server:
    """Is ready after it was asked so often."""

    def __init__(self, after: int) -> None:
        self.after = after

    @property
    def ready(self) -> bool:
        self.after -= 1
        return self.after < 0


class Marked(Decoder):
    """Leaves the process's number in the place of a time."""

    def __getitem__(self, rows: tuple[int, int]) -> Any:
        work = super().__getitem__(rows)
        assert isinstance(work, Work)
        return Work(start=work.start, stop=work.stop, inputs=work.inputs, decode_s=os.getpid(), preprocess_s=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FrameDataset:
    root = tmp_path_factory.mktemp("decoding") / "dataset"
    make_dataset(root, (10, ROWS - 10))
    return open_dataset("test", root=root)[0]


@pytest.fixture
def preprocessor(dataset: FrameDataset) -> DA3Preprocessor:
    return DA3Preprocessor(dataset.cameras, 56, "upper_bound_resize")


def batches(sink: Sink) -> Batches:
    return Batches(Writer(), Claim(0, ((0, 8),)), sink, 4)  # type: ignore[arg-type]


EXPECTED = [(0, 4), (4, 8), (8, 11), (12, 16), (16, 20), (20, 23)]


def run(dataset: FrameDataset, preprocessor: DA3Preprocessor, **options: Any) -> Iterator[Work]:
    return decode(dataset.reader, preprocessor, batches(Sink()), pin_memory=False, **options)


def test_rows_in_order_and_claims_told_to_the_sink(dataset: FrameDataset, preprocessor: DA3Preprocessor) -> None:
    sink = Sink()
    found = list(decode(dataset.reader, preprocessor, batches(sink), 0, server=None, pin_memory=False))
    assert [(work.start, work.stop) for work in found] == EXPECTED
    assert [claim.shard for claim in sink.claims] == [0, 1, 2]
    for work in found:
        expected = preprocessor(dataset.reader.read(work.start, work.stop).images)
        assert torch.equal(work.inputs, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("after", [0, 2, 100])
def test_this_process_decodes_until_the_workers_can(
    dataset: FrameDataset, preprocessor: DA3Preprocessor, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    reference = list(run(dataset, preprocessor, workers=0, server=None))
    monkeypatch.setattr(decoding, "Decoder", Marked)
    found = list(run(dataset, preprocessor, workers=1, server=Server(after)))
    assert [(work.start, work.stop) for work in found] == EXPECTED
    here = [work.decode_s == os.getpid() for work in found]
    assert here == [True] * min(after, 6) + [False] * max(0, 6 - after)
    for work, expected in zip(found, reference, strict=True):
        assert torch.equal(work.inputs, expected.inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("after", [0, 100])
def test_a_bad_frame_is_one_line_from_either(
    dataset: FrameDataset, preprocessor: DA3Preprocessor, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(dataset.reader, "root", Path("/nowhere"))
    with pytest.raises(FrameDecodeError) as caught:
        list(run(dataset, preprocessor, workers=1, server=Server(after)))
    assert "\n" not in str(caught.value)
    assert "/nowhere" in str(caught.value)


def test_the_fork_server_becomes_ready() -> None:
    server = ForkServer()
    server._starting.join(120)
    assert server.ready
