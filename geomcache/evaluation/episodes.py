"""Results of an evaluation: one CSV row for each episode, written as it goes, by one process or several.

    episodes.csv         a header and rows; a row is appended whole and made durable
    episodes.csv.json    the options that the rows depend on: a run with others is refused
    episodes.csv.lock    byte i is a process's claim of the task with this number, as of a cache's shards

A run that was killed resumes: an episode that has a row is not run again. When a process finds every task of its run
complete, it puts the rows in order, so that the file does not depend on who ran what when.
"""

import csv
import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from geomcache.cache import durable, locks
from geomcache.errors import UserInputError
from geomcache.geometry import canonical_json, differences

logger = logging.getLogger(__name__)

DIGEST = 12  # hexadecimal digits of a hash in a row


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One row: an episode and how it ended."""

    environment: str
    suite: str
    task: int
    """Number of the task or variant in the suite."""
    variant: str
    base_task: str
    axis: str
    camera: str
    camera_moved_m: float
    camera_turned_deg: float
    episode: int
    """Number of the episode in the task, from 0; it decides the initial state."""
    seed: int
    success: bool
    steps: int
    """Actions until success, or until the episode was cut off."""
    sum_reward: float
    max_reward: float
    encoder_calls: int
    """Calls of DA3 during the batch of episodes that this one was part of; 0 where geometry came with the batch."""
    policy: str
    weights: str
    """First digits of the sha256 of the checkpoint's weights."""
    fingerprint: str
    """Of the cache that the policy was last trained from; empty without geometry."""
    settings: str
    """Hash of the options of policy and evaluation."""
    world: str
    """Hash of the environment's options. Runs can be compared if theirs are the same."""

    @property
    def key(self) -> tuple[str, int, int]:
        """Return (suite, task, episode), which is unique in a file."""
        return self.suite, self.task, self.episode


COLUMNS = tuple(field.name for field in dataclasses.fields(Episode))
_PARSERS: dict[Any, Any] = {str: str, int: int, float: float, bool: lambda text: {"0": False, "1": True}[text]}


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What the rows of a file have in common."""

    environment: str
    """LeRobot's type of it."""
    world: Mapping[str, Any]
    """Options of the environment that an outcome depends on, JSON types."""
    settings: Mapping[str, Any]
    """Options of the policy and of the evaluation that an outcome depends on, JSON types."""
    policy: str
    weights: str
    """sha256 of the checkpoint's weights, hexadecimal."""
    fingerprint: str
    seed: int
    """Of each task's first episode; the others count up."""

    def to_dict(self) -> dict[str, Any]:
        """Return what a run must agree with to add rows to a file. The policy's path is a label."""
        content: dict[str, Any] = json.loads(canonical_json(dataclasses.asdict(self)))
        del content["policy"]
        return content

    def columns(self) -> dict[str, Any]:
        """Return the columns that all rows share."""
        return {
            "environment": self.environment,
            "policy": self.policy,
            "weights": self.weights[:DIGEST],
            "fingerprint": self.fingerprint,
            "settings": _digest(self.settings),
            "world": _digest(self.world),
        }


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()[:DIGEST]


class EpisodeLog:
    """A file of results that is open for adding rows, next to any number of other processes.

    Attributes:
        path: the CSV file.
        identity: what the rows of this run have in common.
    """

    def __init__(self, path: Path, identity: RunIdentity) -> None:
        """Create the file, or open the one that is there to resume.

        Raises:
            UserInputError: it is no file of results, or one of other options, weights or seeds.
            CacheLockedError: the file system has no POSIX locks.
        """
        self.path, self.identity = path.absolute(), identity
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = locks.LockFile(self.path.with_name(f"{path.name}.lock"))
        try:
            with self._lock.exclusive():
                self._open()
                self._episodes = self._read()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> None:
        options = self.path.with_name(f"{self.path.name}.json")
        content = self.identity.to_dict()
        if not self.path.exists():
            text = json.dumps(content, indent=2, sort_keys=True)
            durable.replace_file(options, text.encode())
            durable.replace_file(self.path, _encode([COLUMNS]))
            return
        try:
            stored = json.loads(options.read_text())
        except (OSError, ValueError) as error:
            raise UserInputError(
                f"{options}: expected the options that {self.path.name} was made with, found none that can be read"
                f" ({error}): choose another --results"
            ) from None
        for name, stored_value, value in differences(stored, content):
            raise UserInputError(
                f"{self.path}: {name}: its rows were made with {stored_value}, this run has {value}: use the same"
                " options to resume, or choose another --results"
            )

    def _read(self) -> dict[tuple[str, int, int], Episode]:
        """Read the rows, and cut off an incomplete last one. Only under the lock."""
        content = self.path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            logger.warning("%s: the last row is incomplete, a kill interrupted it: removed", self.path)
            with durable.synchronised(durable.open_file(self.path, 0)) as descriptor:
                durable.truncate(descriptor, complete)
        return {episode.key: episode for episode in parse_episodes(content[:complete], str(self.path))}

    def refresh(self) -> None:
        """Read what other processes have added."""
        with self._lock.exclusive():
            self._episodes = self._read()

    def of_task(self, suite: str, task: int) -> dict[int, Episode]:
        """Return the episodes of a task that have a row, by number, as they were when the file was last read."""
        return {number: row for (s, t, number), row in sorted(self._episodes.items()) if (s, t) == (suite, task)}

    def claim(self, suite: str, task: int) -> bool:
        """Take the exclusive right to run a task and return True, or return False if another process has it."""
        if not self._lock.claim(_claim_number(suite, task)):
            return False
        self.refresh()  # its last owner may have added rows
        return True

    def release(self, suite: str, task: int) -> None:
        """Give a claim back."""
        self._lock.release(_claim_number(suite, task))

    def append(self, episodes: Sequence[Episode]) -> None:
        """Add rows and make them durable."""
        data = _encode([_cells(episode) for episode in episodes])
        with self._lock.exclusive():
            with durable.file_errors(self.path), durable.synchronised(self._appending()) as descriptor:
                durable.write_all(descriptor, data)
            self._episodes = self._read()

    def _appending(self) -> int:
        return durable.open_file(self.path, os.O_APPEND)

    def put_in_order(self) -> None:
        """Sort the rows by suite, task and episode."""
        with self._lock.exclusive():
            self._episodes = dict(sorted(self._read().items()))
            durable.replace_file(self.path, _encode([COLUMNS, *map(_cells, self._episodes.values())]))

    def close(self) -> None:
        """Give all claims back."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_episodes(path: Path) -> tuple[Episode, ...]:
    """Read a file of results.

    Raises:
        UserInputError: there is no such file, or it is none of results.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserInputError(
            f"{path}: expected a file of results of `geomcache eval`, cannot read it ({error.strerror}): check the path"
        ) from None
    return tuple(parse_episodes(content, str(path)))


def parse_episodes(content: bytes, name: str) -> Iterator[Episode]:
    """Yield the episodes of a CSV file; `name` is for messages.

    Raises:
        UserInputError: the header is another one, a row is malformed, or an episode has two rows.
    """
    rows = csv.reader(io.StringIO(content.decode(errors="replace")))
    header = next(rows, [])
    if tuple(header) != COLUMNS:
        raise UserInputError(
            f"{name}: expected results of `geomcache eval` with the columns {', '.join(COLUMNS)}, found"
            f" {', '.join(header) or 'none'}: give an episodes.csv of this version of geomcache"
        )
    seen: dict[tuple[str, int, int], int] = {}
    for line, row in enumerate(rows, 2):
        try:
            values = {
                field.name: _PARSERS[field.type](cell)
                for field, cell in zip(dataclasses.fields(Episode), row, strict=True)
            }
        except (ValueError, KeyError):
            raise UserInputError(
                f"{name}: line {line}: expected a row of results, found {','.join(row)!r:.200}"
            ) from None
        episode = Episode(**values)
        if episode.key in seen:
            raise UserInputError(
                f"{name}: line {line}: expected each episode once, {episode.suite} task {episode.task} episode"
                f" {episode.episode} is in line {seen[episode.key]} too: remove one"
            )
        seen[episode.key] = line
        yield episode


def _encode(rows: Iterable[Iterable[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _cells(episode: Episode) -> list[str]:
    return [str(int(value)) if isinstance(value, bool) else str(value) for value in dataclasses.astuple(episode)]


def _claim_number(suite: str, task: int) -> int:
    """Return the byte of the lock file that stands for a task. Two tasks of one byte would only wait for each other."""
    return int.from_bytes(hashlib.sha256(f"{suite}/{task}".encode()).digest()[:4], "big")
