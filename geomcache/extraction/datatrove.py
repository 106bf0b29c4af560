"""Stage one as a step of a datatrove pipeline, whose executors start ranks here or as Slurm jobs: LeRobot's way.

A rank makes its share of the shards and ends. datatrove remembers which ranks are done, and starts those that failed
again; the rank that finds the whole cache durable seals it. The ranks share the cache through the locks of its file
system, as the jobs of an array do.
"""

import logging

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import Share, extract


class ExtractShards(PipelineStep):  # type: ignore[misc]
    """The step: stage one over a rank's shards.

    Args:
        options: as of `geomcache extract`; the same for all ranks.
    """

    type = "geomcache"
    name = "extract"

    def __init__(self, options: ExtractOptions) -> None:
        super().__init__()
        self._options = options

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002 - datatrove's signature
        """Make the rank's shards.

        Raises:
            GeomcacheError: as `extract`.
        """
        package, handler = logging.getLogger("geomcache"), _ToDatatrove()
        package.setLevel(logging.INFO)
        package.addHandler(handler)
        package.propagate = False  # one line of each
        try:
            self._extract(rank, world_size)
        finally:
            package.removeHandler(handler)
            package.propagate = True

    def _extract(self, rank: int, world_size: int) -> None:
        with self.track_time():
            report = extract(self._options, Share(rank, world_size))
        self.stat_update("frames", value=report.frames)
        self.stat_update("shards", value=report.shards)
        for line in report.lines():
            logger.info(line)


class _ToDatatrove(logging.Handler):
    """Passes lines for the user on to the log of the rank."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.log(record.levelname, record.getMessage())
