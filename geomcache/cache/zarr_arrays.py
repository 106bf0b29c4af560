"""The Zarr group of a cache: its arrays, made and read through zarr-python."""

import asyncio
import dataclasses
import functools
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.codecs import Codec
from geomcache.cache.header import COORDINATE_CHUNK, COORDINATES, EPISODE_IDENTITY, FEATURE_BASIS, Header
from geomcache.cache.layout import CHECKSUMS, PICTURE_HASH, PICTURE_MEANS

if TYPE_CHECKING:
    import zarr

TABLE_DIMENSIONS = {
    CHECKSUMS: ("array",),
    PICTURE_HASH: ("view",),
    PICTURE_MEANS: ("view", "row", "column", "channel"),
}


def create_arrays(
    folder: Path,
    header: Header,
    episode_lengths: NDArray[np.int64],
    identities: NDArray[np.uint64] | None,
    feature_basis: NDArray[np.float32] | None = None,
) -> None:
    """Create the Zarr group of a cache, with coordinates, episode table and basis, and no frame."""
    arrays = _create_metadata(folder, header)
    if feature_basis is not None:
        arrays[FEATURE_BASIS][:] = feature_basis
    starts = np.cumsum(episode_lengths) - episode_lengths
    columns = [starts, episode_lengths] if identities is None else [starts, episode_lengths, identities]
    for name, values in zip(header.episode_table, columns, strict=True):
        arrays[name][:] = values
    episode_index, frame_index = (arrays[name] for name in COORDINATES)
    for start in range(0, header.dataset.frames, COORDINATE_CHUNK):
        rows = np.arange(start, min(start + COORDINATE_CHUNK, header.dataset.frames))
        episodes = starts.searchsorted(rows, "right") - 1
        episode_index[rows[0] : rows[-1] + 1] = episodes
        frame_index[rows[0] : rows[-1] + 1] = rows - starts[episodes]


def open_arrays(store: Any, header: Header) -> "dict[str, zarr.Array[Any]]":
    """Open the arrays of a cache for reading through zarr-python, by their paths.

    Shapes and codecs are the header's: stored array metadata could name any codec and any size. Blosc buffers pass
    through `Codec.decode_into`, so that reading one that lies about its size is a ValueError.
    """
    import zarr
    from zarr.storage import LocalStore, MemoryStore, StorePath

    place = LocalStore(store, read_only=True) if isinstance(store, Path) else store
    return {
        name: zarr.Array(zarr.AsyncArray(_with_checks(array.metadata, header.codec), StorePath(place, name)))
        for name, array in _create_metadata(MemoryStore(), header).items()
    }


def _with_checks(metadata: Any, codec: Codec) -> Any:
    """Return array metadata whose Blosc codec checks what it is to decode."""
    if not codec.compresses or metadata.sharding_codec is None:
        return metadata
    sharding = metadata.sharding_codec
    inner = tuple(_checked_blosc()() if each in codec.zarr_codecs() else each for each in sharding.codecs)
    return dataclasses.replace(metadata, codecs=(dataclasses.replace(sharding, codecs=inner),))


@functools.cache
def _checked_blosc() -> Any:
    """Return the class of Zarr's codec ``blosc``, for reading, that checks a buffer before c-blosc sees it."""
    from zarr.abc.codec import BytesBytesCodec

    @dataclasses.dataclass(frozen=True)
    class CheckedBlosc(BytesBytesCodec):
        is_fixed_size = False

        async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
            return await asyncio.to_thread(self._decode, chunk_data, chunk_spec)

        def _decode(self, chunk_data: Any, chunk_spec: Any) -> Any:
            content = np.empty(prod(chunk_spec.shape) * np.dtype(np.float16).itemsize, np.uint8)
            Codec("zstd").decode_into(chunk_data.to_bytes(), content)
            return chunk_spec.prototype.buffer.from_array_like(content)

        def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
            raise NotImplementedError  # as of all codecs whose output has no fixed size

    return CheckedBlosc


def _create_metadata(store: Any, header: Header) -> "dict[str, zarr.Array[Any]]":
    """Create a cache's group and arrays, without content, in a folder or a Zarr store; return the arrays by path."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

    little, layout = BytesCodec(endian="little"), header.layout
    group = zarr.create_group(store, zarr_format=3, attributes=header.attributes())
    arrays: dict[str, zarr.Array[Any]] = {}

    def create(name: str, chunks: tuple[int, ...], **options: Any) -> None:
        arrays[name] = group.create_array(
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
    for table in layout.tables:
        attributes = {"columns": [column.key for column in layout.columns]} if table.key == CHECKSUMS else {}
        create(
            table.key,
            (layout.shard_frames, *table.shape),
            shape=(layout.frames, *table.shape),
            dtype=table.dtype.name,
            fill_value=0,
            serializer=little,
            compressors=[Crc32cCodec()],
            dimension_names=("frame", *TABLE_DIMENSIONS[table.key]),
            attributes=attributes,
        )
    # A fill value that no row has: zarr writes no chunk that holds nothing else. An identity may be any number.
    options = {"dtype": "int64", "fill_value": -1, "serializer": little}
    of_identities = {"dtype": "uint64", "fill_value": 0, "serializer": little, "config": {"write_empty_chunks": True}}
    episodes = header.dataset.episodes
    for name in header.episode_table:
        of_array = of_identities if name == EPISODE_IDENTITY else options
        create(name, (episodes,), shape=(episodes,), compressors=[Crc32cCodec()], **of_array)
    if (feature := header.spec.feature) is not None:
        size, names = (feature.width, feature.dim), ("feature", "channel")
        of_basis = {"dtype": "float32", "fill_value": 0, "serializer": little, "compressors": [Crc32cCodec()]}
        create(FEATURE_BASIS, size, shape=size, dimension_names=names, **of_basis)
    compressors = [ZstdCodec(level=3), Crc32cCodec()]
    shape, chunks = (layout.frames,), (min(layout.frames, COORDINATE_CHUNK),)
    for name in COORDINATES:
        create(name, chunks, shape=shape, compressors=compressors, dimension_names=("frame",), **options)
    return arrays
