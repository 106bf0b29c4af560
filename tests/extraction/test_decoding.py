"""Batches come in order, whoever decodes them: this process while the workers' imports last, then the workers."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from geomcache.cache.writer import Claim, StoreWriter
from geomcache.da3.encoder import DA3Preprocessor
from geomcache.errors import FrameDecodeError
from geomcache.extraction import decoding
from geomcache.extraction.decoding import BatchDecoder, ClaimedRanges, ForkServer, NetworkBatch, decode
from geomcache.frames.source import FrameDataset, open_dataset
from tests.support.datasets import make_dataset

ROWS = 23


class Writer:
    """Three claims; the second has a gap."""

    def __init__(self) -> None:
        self.claims = [Claim(1, ((8, 11), (12, 16))), Claim(2, ((16, ROWS),))]

    def claim(self) -> Claim | None:
        return self.claims.pop(0) if self.claims else None


class Server:
    """Is ready after it was asked so often."""

    def __init__(self, after: int) -> None:
        self.after = after

    @property
    def ready(self) -> bool:
        self.after -= 1
        return self.after < 0


class Marked(BatchDecoder):
    """Leaves the process's number in the place of a time."""

    def __getitem__(self, rows: tuple[int, int]) -> Any:
        batch = super().__getitem__(rows)
        assert isinstance(batch, NetworkBatch)
        return replace(batch, decode_s=os.getpid())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FrameDataset:
    root = tmp_path_factory.mktemp("decoding") / "dataset"
    make_dataset(root, (10, ROWS - 10))
    return open_dataset("test", root=root)[0]


@pytest.fixture
def preprocessor(dataset: FrameDataset) -> DA3Preprocessor:
    return DA3Preprocessor(dataset.cameras, 56, "upper_bound_resize")


def ranges(on_claim: Callable[[Claim], None] = lambda _: None) -> ClaimedRanges:
    return ClaimedRanges(cast("StoreWriter", Writer()), Claim(0, ((0, 8),)), 4, on_claim=on_claim)


EXPECTED = [(0, 4), (4, 8), (8, 11), (12, 16), (16, 20), (20, 23)]


def run(dataset: FrameDataset, preprocessor: DA3Preprocessor, **options: Any) -> Iterator[NetworkBatch]:
    return decode(dataset.reader, preprocessor, ranges(), pin_memory=False, **options)


def tensor(batch: NetworkBatch) -> torch.Tensor:
    assert isinstance(batch.inputs, torch.Tensor)
    return batch.inputs


def test_rows_in_order_and_claims_announced(dataset: FrameDataset, preprocessor: DA3Preprocessor) -> None:
    claims: list[Claim] = []
    batches = list(decode(dataset.reader, preprocessor, ranges(claims.append), 0, server=None, pin_memory=False))
    assert [(batch.start, batch.stop) for batch in batches] == EXPECTED
    assert [claim.shard for claim in claims] == [0, 1, 2]
    for batch in batches:
        expected = preprocessor(dataset.reader.read(batch.start, batch.stop).images)
        assert isinstance(expected, torch.Tensor)
        assert torch.equal(tensor(batch), expected)


@pytest.mark.parametrize("after", [0, 2, 100])
def test_this_process_decodes_until_the_workers_can(
    dataset: FrameDataset, preprocessor: DA3Preprocessor, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    reference = list(run(dataset, preprocessor, workers=0, server=None))
    monkeypatch.setattr(decoding, "BatchDecoder", Marked)
    batches = list(run(dataset, preprocessor, workers=1, server=Server(after)))
    assert [(batch.start, batch.stop) for batch in batches] == EXPECTED
    in_this_process = [batch.decode_s == os.getpid() for batch in batches]
    assert in_this_process == [True] * min(after, 6) + [False] * max(0, 6 - after)
    for batch, expected in zip(batches, reference, strict=True):
        assert torch.equal(tensor(batch), tensor(expected))


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
