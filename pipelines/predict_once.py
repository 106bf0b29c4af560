"""Predict once with DA3 online, and compare with the same prediction from the frame's cached geometry.

python pipelines/predict_once.py --policy CHECKPOINT --cache PATH --root DATASET [--index 60]
"""

import argparse
import sys
from pathlib import Path

import torch
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors

import geomcache.policy  # noqa: F401 - registers the policy and its processor steps
from geomcache.cache.store import GeometryStore
from geomcache.errors import GeomcacheError
from geomcache.geometry import Geometry
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--policy", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--index", type=int, default=60, help="the frame (%(default)s)")
    arguments = parser.parse_args()

    policy = PI05GeometryPolicy.from_pretrained(arguments.policy)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=arguments.policy)
    item = LeRobotDataset("frame", root=arguments.root, video_backend="pyav")[arguments.index]
    batch = preprocess({key: value for key, value in item.items() if key.startswith("observation.") or key == "task"})
    row = GeometryStore.open(arguments.cache).batch([arguments.index])
    cached = Geometry(**{name: torch.from_numpy(maps) for name, maps in row.items()})

    def predict(extra: dict[str, torch.Tensor]) -> torch.Tensor:  # [chunk, action]
        torch.manual_seed(0)  # of the noise that the flow starts from
        chunks: torch.Tensor = postprocess(policy.predict_action_chunk(batch | extra))
        return chunks[0]

    online, given = predict({}), predict(cached.to_batch())
    adapter = policy.model.geometry_adapter
    with torch.no_grad():
        tokens = [adapter(geometry).embs for geometry in (policy.geometry_of(batch), cached)]
    difference = (tokens[0] - tokens[1]).abs().max() / tokens[1].abs().max()
    print(f"frame {arguments.index}: a chunk of {len(online)} actions, DA3 online; the first:")
    print("  " + "  ".join(f"{value:+.3f}" for value in online[0].tolist()))
    print(f"tokens online compared with tokens of the cache: largest difference {difference:.1e} of the largest value")
    print(f"actions online compared with actions of the cache: largest difference {(online - given).abs().max():.1e}")


if __name__ == "__main__":
    try:
        main()
    except GeomcacheError as error:
        print(f"predict_once: {error}", file=sys.stderr)
        sys.exit(2)
