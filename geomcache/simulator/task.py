"""What a task of a suite is."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What a task of a suite is; for a variant of LIBERO-Plus, what differs from its base task."""

    variant: str
    """Its name, which is unique in the suite."""
    base_task: str
    """The task whose goal it has: the variant itself where there is no other."""
    axis: str = ""
    """Such as ``camera``; empty for a task as it is."""
    camera: str = ""
    """The numbers of the camera in the variant's name, such as ``45_15_130_5_0``; empty without any."""
    camera_moved_m: float = 0.0
    """Distance of the first view's camera from its place in the base task, in metres."""
    camera_turned_deg: float = 0.0
    """Angle between its orientation and that in the base task, in degrees."""
    description: str = ""
    """The task in words, for the user; not in the rows."""

    def columns(self) -> dict[str, Any]:
        """Return the columns of a row."""
        return {name: value for name, value in vars(self).items() if name != "description"}
