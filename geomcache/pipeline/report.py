"""What an extraction did, counted and timed."""

from dataclasses import dataclass
from pathlib import Path

from geomcache.progress import human_bytes, human_time


@dataclass(kw_only=True)
class ExtractReport:
    """What this process did, except for `frames_total`, which counts all processes and runs."""

    path: Path
    address: str | None = None
    """Of a cache that is not at the path; without credentials."""
    frames_total: int = 0
    """Frames that were asked for, and those of shards that had to be made again; all of them are in the cache now."""
    frames: int = 0
    """Written; by this process, as are the counts below."""
    frames_carried: int = 0
    """Of these, those whose geometry an earlier cache had."""
    frames_linked: int = 0
    """Of these, those in shards that are files of the earlier cache."""
    shards: int = 0
    views: int = 0
    nbytes: int = 0
    sealed: bool = True
    """Whether the cache is complete; a process with a share of the shards may end before others."""
    workers: int = 0
    """Decoding processes; on a cluster, of each actor."""
    actors: int = 0
    """Actors of a cluster that made shards."""
    shards_again: int = 0
    """Shards that were given out again, because what they had been given to was lost."""
    engine: str = "eager"
    """What ran the network."""
    seconds: float = 0.0
    """From the first claim to the seal."""
    startup_s: float = 0.0
    """From the call to the end of the first batch: metadata, weights, decoding processes, the device's first pass."""
    steady_s: float = 0.0
    """From the end of the first batch until this process's last shard was written."""
    steady_views: int = 0
    """Views encoded in that time."""
    decode_s: float = 0.0
    """The sum over all decoding processes, as is `preprocess_s`."""
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0

    @property
    def views_per_s(self) -> float | None:
        """The steady rate, without the start-up; None for a run of a single batch."""
        return self.steady_views / self.steady_s if self.steady_views else None

    @property
    def frames_encoded(self) -> int:
        """How many frames the encoder ran on."""
        return self.frames - self.frames_carried

    def lines(self) -> list[str]:
        """Return the report as text for the user."""
        place = self.address or self.path
        if not self.frames:
            state = "complete" if self.sealed else "not complete yet"
            return [
                f"{place}: {state}, {self.frames_total} frames; nothing to do (compared names and sizes of files:"
                " `geomcache verify` reads their bytes)"
            ]
        rate = self.views_per_s
        steady = (
            "one batch" if rate is None else f"then {human_time(self.steady_s)} at {rate:.1f} views/s, {self.engine}"
        )
        encoders = max(1, self.actors)
        processes = max(1, self.workers) * encoders
        kept = (
            f"{self.frames_carried} frames carried over, {self.frames_linked} of them in whole shards;"
            f" {self.frames_encoded} encoded"
        )
        return [
            f"{place}: {self.frames} frames, {self.views} views, {human_bytes(self.nbytes)} in {self.shards}"
            f" shards; start-up {human_time(self.startup_s)}, {steady}",
            *([kept] if self.frames_carried else []),
            *([f"actors: {self.actors}; shards given out again: {self.shards_again}"] if self.actors else []),
            *([] if self.sealed else ["the other shards are those of other ranks"]),
            f"busy: encode {self.encode_s / self.seconds / encoders:.0%}, write {self.write_s / self.seconds:.0%},"
            f" decode {self.decode_s / self.seconds / processes:.0%}"
            f" and preprocess {self.preprocess_s / self.seconds / processes:.0%} of {processes} process(es)",
        ]
