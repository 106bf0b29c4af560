"""Let LeRobot's sampler tell which shards come next, so that they are fetched before the loader asks for their rows."""

import contextlib
from collections.abc import Iterator
from typing import Any

from geomcache.cache.store import GeometryStore
from geomcache.lerobot_options import replaced
from geomcache.sharing.fetching_store import FetchingGeometryStore


@contextlib.contextmanager
def fetching_ahead(store: GeometryStore | None) -> Iterator[None]:
    """Let LeRobot's trainer fetch ahead, in the order of its sampler, if the cache is one that is fetched."""
    if not isinstance(store, FetchingGeometryStore):
        yield
        return
    from lerobot.scripts import lerobot_train

    with (
        contextlib.closing(store),
        replaced(lerobot_train, "EpisodeAwareSampler", lambda upstream: looking_ahead(upstream, store)),
    ):
        yield


def looking_ahead(upstream: Any, store: FetchingGeometryStore) -> Any:
    """Return a class of samplers that draw the same positions as LeRobot's, some thousand before they are asked for."""

    class LookingAhead(upstream):  # type: ignore[misc]  # LeRobot is not typed
        def __init__(
            self, *arguments: Any, absolute_to_relative_idx: dict[int, int] | None = None, **options: Any
        ) -> None:
            super().__init__(*arguments, absolute_to_relative_idx=absolute_to_relative_idx, **options)
            rows = absolute_to_relative_idx or {}
            self._rows = {relative: absolute for absolute, relative in rows.items()}

        def __iter__(self) -> Iterator[int]:
            return store.expect(super().__iter__(), lambda position: self._rows.get(position, position))

    return LookingAhead
