"""Lines of `extract --dry-run` that depend on the cameras and the resolution alone."""

from dataclasses import replace

import pytest

from geomcache.extraction.plan import _enlarged
from geomcache.geometry import Camera
from tests.support.stores import make_spec


@pytest.mark.parametrize(
    ("sides", "process_res", "expected"),
    [
        (((256, 256), (256, 256)), 504, ("256 px", "4.0 times", "--process-res 252")),
        (((480, 640),), 644, ("640 px", "1.0 times", "--process-res 630")),  # the longest side counts
        (((10, 10),), 28, ("10 px", "4.0 times", "--process-res 14")),
        (((256, 256),), 252, ()),
        (((504, 504), (100, 504)), 504, ()),
    ],
)
def test_enlarging_is_said_with_what_it_costs(
    sides: tuple[tuple[int, int], ...], process_res: int, expected: tuple[str, ...]
) -> None:
    cameras = tuple(Camera(key=f"camera{n}", height=height, width=width) for n, (height, width) in enumerate(sides))
    lines = list(_enlarged(replace(make_spec(), cameras=cameras, process_res=process_res)))
    assert len(lines) == (1 if expected else 0)
    for text in expected:
        assert text in lines[0]
