"""What a long run shows: one bar on a terminal, a plain line now and then elsewhere."""

import logging
import re
import sys
import time
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
POLL_EVERY_S = 0.5


def human_bytes(count: float) -> str:
    """A size for people, in decimal units: ``9.9 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as ``50GB``, ``1.5 TB`` or ``800000``, in decimal units.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(text)
    return round(float(match[1]) * 1000.0 ** ("B", "KB", "MB", "GB", "TB").index((match[2] or "B").upper()))


def human_time(seconds: float) -> str:
    """A duration for people: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


class Progress:
    """The frames that all processes together have done, shown by one of them.

    Its clock starts with the first update, so that the rate is that of the steady state.

    Args:
        total: frames that were asked for.
        views: views per frame: the bar counts views.
        frames_done: counts the frames that are durable, no matter who wrote them; called at most twice a second.
        show: whether this process shows anything.
    """

    def __init__(self, total: int, views: int, frames_done: Callable[[], int], *, show: bool) -> None:
        self._total, self._views, self._frames_done = total, views, frames_done
        self._show = show
        self._began: float | None = None
        self._polled = self._logged = time.monotonic()
        self._first = self._durable = frames_done()
        self._bar: tqdm | None = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(
                total=total * views,
                initial=self._first * views,
                unit="view",
                unit_scale=True,
                dynamic_ncols=True,
                desc="extract",
            )

    def update(self, *, unwritten: int, nbytes: int) -> None:
        """Show where the run is.

        Args:
            unwritten: frames that this process has encoded and not yet written.
            nbytes: bytes that this process has written.
        """
        if not self._show:
            return
        now = time.monotonic()
        if now - self._polled >= POLL_EVERY_S:
            self._polled, self._durable = now, self._frames_done()
        frames = min(self._durable + unwritten, self._total)
        if self._began is None:
            self._began, self._first = now, frames
            if self._bar is not None:
                self._bar.unpause()  # its rate, too
        if self._bar is not None:
            self._bar.set_postfix_str(human_bytes(nbytes), refresh=False)
            self._bar.update(max(0, frames * self._views - self._bar.n))
        elif now - self._logged >= LINE_EVERY_S:
            self._logged = now
            rate = max(1, frames - self._first) / (now - self._began) if now > self._began else 1.0
            logger.info(
                "%d of %d frames, %.1f views/s, %s written, %s left",
                frames,
                self._total,
                rate * self._views,
                human_bytes(nbytes),
                human_time((self._total - frames) / rate),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.update(max(0, self._frames_done() * self._views - self._bar.n))
            self._bar.close()


class TransferBar:
    """Bytes of a transfer: a bar on a terminal, otherwise a log line now and then. Threads may share it."""

    def __init__(self, verb: str, total: int) -> None:
        self._verb, self._total = verb, total
        self._done, self._logged, self._guard = 0, time.monotonic(), Lock()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=verb, disable=not sys.stderr.isatty())

    def __call__(self, nbytes: int) -> None:
        """Count bytes that have been transferred."""
        with self._guard:
            self._done += nbytes
            self._bar.update(nbytes)
            if self._bar.disable and time.monotonic() - self._logged >= LINE_EVERY_S:
                self._logged = time.monotonic()
                logger.info("%s: %s of %s", self._verb, human_bytes(self._done), human_bytes(self._total))

    def __enter__(self) -> "TransferBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
