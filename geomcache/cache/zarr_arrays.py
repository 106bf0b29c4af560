"""The Zarr group of a cache: its arrays, made and read through zarr-python."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.header import COORDINATE_CHUNK, COORDINATES, EPISODE_TABLE, Header
from geomcache.cache.layout import CHECKSUMS


def create_arrays(folder: Path, header: Header, episode_lengths: NDArray[np.int64]) -> None:
    """Make the Zarr group of a cache, with coordinates and episode table, and no frame."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

    little, layout = BytesCodec(endian="little"), header.layout
    group = zarr.create_group(folder, zarr_format=3, attributes=header.attributes())

    def create(name: str, chunks: tuple[int, ...], **options: Any) -> Any:
        return group.create_array(
            name, chunks=chunks, filters=None, chunk_key_encoding={"name": "default", "separator": "."}, **options
        )

    for column in layout.columns:
        create(
            column.key,
            (layout.shard_frames, *column.shape),
            shape=(layout.frames, *column.shape),
            dtype="float16",
            fill_value=np.nan,  # what other readers see where a frame is missing
            serializer=ShardingCodec(
                chunk_shape=(1, *column.shape),
                codecs=[little, *layout.codec.zarr_codecs(), Crc32cCodec()],
                index_codecs=[little, Crc32cCodec()],
                index_location="end",
            ),
            compressors=None,
            dimension_names=("frame", "row", "column", "channel")[: len(column.shape) + 1],
        )
    keys = [column.key for column in layout.columns]
    create(
        CHECKSUMS,
        (layout.shard_frames, len(keys)),
        shape=(layout.frames, len(keys)),
        dtype="uint32",
        fill_value=0,
        serializer=little,
        compressors=[Crc32cCodec()],
        dimension_names=("frame", "array"),
        attributes={"columns": keys},
    )
    starts = np.cumsum(episode_lengths) - episode_lengths
    # A fill value that no row has: zarr writes no chunk that holds nothing else.
    options = {"dtype": "int64", "fill_value": -1, "serializer": little}
    for name, values in zip(EPISODE_TABLE, (starts, episode_lengths), strict=True):
        table = create(name, values.shape, shape=values.shape, compressors=[Crc32cCodec()], **options)
        table[:] = values
    compressors = [ZstdCodec(level=3), Crc32cCodec()]
    shape, chunks = (layout.frames,), (min(layout.frames, COORDINATE_CHUNK),)
    episode_index, frame_index = (
        create(name, chunks, shape=shape, compressors=compressors, dimension_names=("frame",), **options)
        for name in COORDINATES
    )
    for start in range(0, layout.frames, COORDINATE_CHUNK):
        rows = np.arange(start, min(start + COORDINATE_CHUNK, layout.frames))
        episodes = starts.searchsorted(rows, "right") - 1
        episode_index[rows[0] : rows[-1] + 1] = episodes
        frame_index[rows[0] : rows[-1] + 1] = rows - starts[episodes]


def read_coordinates(folder: Path) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """(first row, episode of each row, frame of each row), chunk after chunk: what other readers see."""
    import zarr

    arrays = [zarr.open_array(folder / name, mode="r") for name in COORDINATES]
    for start in range(0, arrays[0].shape[0], COORDINATE_CHUNK):
        episodes, frames = (np.asarray(array[start : start + COORDINATE_CHUNK]) for array in arrays)
        yield start, episodes, frames
