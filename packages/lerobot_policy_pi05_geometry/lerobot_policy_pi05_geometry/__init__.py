"""Register geomcache's policies with LeRobot, which imports this module by the name of its distribution."""

from geomcache.policy import PI0GeometryConfig, PI05GeometryConfig, SmolVLAGeometryConfig

__all__ = ["PI0GeometryConfig", "PI05GeometryConfig", "SmolVLAGeometryConfig"]
