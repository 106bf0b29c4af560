"""Stage one into an object store: what is different when `--output` is an address."""

from collections.abc import Sequence

from geomcache.cache.codecs import Codec
from geomcache.errors import UserInputError
from geomcache.extraction.options import ExtractOptions
from geomcache.frames.of_cache import check_cached_pictures, compare_with_cache
from geomcache.frames.source import FrameDataset
from geomcache.geometry import GeometrySpec
from geomcache.sharing.address_writer import AddressWriter
from geomcache.sharing.base import errors_name
from geomcache.sharing.remote_store import open_store


def check_processes(options: ExtractOptions, count: int) -> None:
    """Refuse to let several processes write to an address.

    Raises:
        UserInputError: so many processes run, and the output is an address.
    """
    if options.address is not None and count > 1:
        raise UserInputError(
            f"output {options.place}: expected one process, which writes to the address, found {count}: use several"
            " GPUs with --cluster ray, or extract to a path that all share, then `geomcache push`"
        )


def open_at_address(
    address: str,
    options: ExtractOptions,
    dataset: FrameDataset,
    episodes: Sequence[tuple[int, int]],
    spec: GeometrySpec,
) -> AddressWriter:
    """Create the cache at an address, or open the one that is there; shards that lack an object count as missing.

    Raises:
        CacheError: as `AddressWriter.create_or_open`, or the cache there was made of other episodes or pictures.
    """
    writer = AddressWriter.create_or_open(
        address,
        spec,
        dataset.spec,
        dataset.reader.episode_length,
        dataset.rows(episodes),
        identities=dataset.identities,
        codec=Codec.of(options.codec),
        overwrite=options.overwrite,
    )
    try:
        with errors_name(writer.address, writer.path):
            compare_with_cache(writer.path, dataset)
        if writer.frames_done():
            with open_store(address) as store:
                check_cached_pictures(store, dataset, episodes)
    except BaseException:
        writer.close()
        raise
    return writer
