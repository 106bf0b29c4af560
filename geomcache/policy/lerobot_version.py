"""Say so when LeRobot's version is outside of what the policy was tested with.

The policy extends a few of LeRobot's own methods. It passes on what it does not know of their arguments, and `make
test-next` runs the tests with a checkout of LeRobot's next version; a version that nobody ran is named in one line.
"""

import functools
import logging
from importlib.metadata import version

from packaging.version import Version

FIRST_TESTED, LAST_TESTED = "0.6.1", "0.6.2"  # of 0.6.2 the development snapshot 7427f31, August 2026

logger = logging.getLogger(__name__)


@functools.cache
def warn_if_untested() -> None:
    """Log one line, once in a process, if the installed LeRobot is older or newer than those that were tested."""
    installed = version("lerobot")
    if not Version(FIRST_TESTED) <= Version(installed) <= Version(LAST_TESTED):
        logger.warning(
            "lerobot %s: geomcache was tested with %s to %s: if it fails, install one of these (pip install"
            " lerobot==%s)",
            installed,
            FIRST_TESTED,
            LAST_TESTED,
            FIRST_TESTED,
        )
