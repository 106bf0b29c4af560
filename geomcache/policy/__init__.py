"""The LeRobot policy plugin `pi05_geometry`: Pi0.5 with geometry tokens.

Importing this package registers the policy's configuration and its processor steps with LeRobot. LeRobot imports it by
the name of the distribution `lerobot_policy_pi05_geometry`, or by `--discover_packages_path=geomcache.policy`. The
model itself is imported when it is built. Neither zarr nor depth_anything_3 is imported here; the encoder is, by the
first prediction that has to encode pictures.
"""

from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.processor_pi05_geometry import make_pi05_geometry_pre_post_processors

__all__ = ["PI05GeometryConfig", "make_pi05_geometry_pre_post_processors"]
