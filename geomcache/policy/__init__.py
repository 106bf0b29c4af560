"""The LeRobot policy plugins: `pi05_geometry`, `pi0_geometry` and `smolvla_geometry`, each LeRobot's with geometry.

Importing this package registers the policies' configurations and processor steps with LeRobot. LeRobot imports it by
the name of the distribution `lerobot_policy_pi05_geometry`, or by `--discover_packages_path=geomcache.policy`. The
models themselves are imported when they are built. Neither zarr nor depth_anything_3 is imported here; the encoder is,
by the first prediction that has to encode pictures.

What the policies share is in `options`, `prefix` and `geometry_policy`; what Pi0 and Pi0.5 share, in `paligemma`.
"""

from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig
from geomcache.policy.pi0.configuration_pi0_geometry import PI0GeometryConfig
from geomcache.policy.processor_pi05_geometry import make_pi05_geometry_pre_post_processors
from geomcache.policy.smolvla.configuration_smolvla_geometry import SmolVLAGeometryConfig

__all__ = [
    "PI0GeometryConfig",
    "PI05GeometryConfig",
    "SmolVLAGeometryConfig",
    "make_pi05_geometry_pre_post_processors",
]
