"""Register the policy `pi05_geometry` with LeRobot, which imports this module by the name of its distribution."""

from geomcache.policy import PI05GeometryConfig

__all__ = ["PI05GeometryConfig"]
