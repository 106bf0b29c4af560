"""Variants of LIBERO-Plus, to the bit, as its own class renders them: pictures of both cameras over a few steps.

The package wants older versions of NumPy and MuJoCo, and modules that are not installed here: it runs in a process of
its own, from a copy that finds LIBERO's assets, with stand-ins for what its variants of these axes do not use (`wand`,
`gym`) or what is SciPy's own filter (`skimage.filters.gaussian`).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geomcache.simulator import plus
from geomcache.simulator.environments import LiberoPlusVariants, make_environment
from tests.support.simulator import ASSETS, libero_config, needs_plus, needs_simulator, simulator

__all__ = ["libero_config", "simulator"]

SIZE, SEED, WAIT = 256, 3, 2  # WAIT: LeRobot lets a scene settle for 10 steps; fewer cost less time
ACTIONS = ([0.3, -0.2, -0.5, 0.0, 0.1, 0.2, -1.0], [0.0, 0.4, -0.5, 0.1, 0.0, 0.0, 1.0])
VARIANTS = (  # suite, axis, part of the name; the first variant that fits
    ("libero_object", "camera", "_view_3.._15_100"),
    ("libero_object", "camera", "_100_354_352_"),
    ("libero_object", "camera", "_view_0_0_1[5-9]"),
    ("libero_spatial", "camera", "_view_7._15_"),
    ("libero_goal", "camera", "_view_3.._0_100_0_0"),
    ("libero_10", "camera", "KITCHEN.*_view_[1-9]"),
    ("libero_object", "robot", ""),
    ("libero_10", "robot", "LIVING"),
    ("libero_goal", "language", ""),
    ("libero_object", "layout_level", ""),
    ("libero_object", "noise", "_noise_1[1-9]$"),
    ("libero_object", "noise", "_noise_2[1-9]$"),
    ("libero_spatial", "noise", "_noise_4[1-9]$"),
)

THEIRS = """
import json, sys, types
from pathlib import Path

import numpy as np

def module(name, **names):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(names)

def gaussian(image, sigma, channel_axis):
    from scipy.ndimage import gaussian_filter
    return gaussian_filter(image, (sigma, sigma, 0), mode="nearest", truncate=4.0)

module("wand"), module("wand.image", Image=object), module("skimage"), module("skimage.filters", gaussian=gaussian)
module("wand.api", library=types.SimpleNamespace(MagickMotionBlurImage=types.SimpleNamespace()))
import gymnasium
sys.modules["gym"] = gymnasium
job = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, job["package"])
import torch
from liberoplus.liberoplus.envs.env_wrapper import OffScreenRenderEnv

for number, variant in enumerate(job["variants"]):
    environment = OffScreenRenderEnv(
        bddl_file_name=variant["bddl"], camera_heights=job["size"], camera_widths=job["size"], control_freq=20,
        hard_reset=True,
    )
    environment.reset()
    environment.seed(job["seed"])
    environment.reset()
    states = torch.load(variant["init_states"], weights_only=False)
    environment.set_init_state(states.reshape(1, -1)[0] if variant["layout"] else states[0])
    for _ in range(job["wait"]):
        observation, *_ = environment.step([0, 0, 0, 0, 0, 0, -1])
    for robot in environment.robots:
        robot.controller.use_delta = True
    pictures = [observation]
    for action in job["actions"]:
        pictures.append(environment.step(np.array(action))[0])
    names = ("agentview_image", "robot0_eye_in_hand_image")
    np.save(Path(job["out"]) / f"{number}.npy", np.stack([[each[name] for name in names] for each in pictures]))
    environment.close()
"""


def jobs() -> list[tuple[str, int]]:
    found = []
    for suite, axis, part in VARIANTS:
        found.append((suite, plus.select(suite, axis, part, None, None)[0]))
    return found


@needs_simulator
@needs_plus
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_variants_are_those_of_libero_plus_to_the_bit(simulator: None, tmp_path: Path) -> None:
    assert ASSETS is not None
    data = plus.data_folder()
    package = tmp_path / "liberoplus" / "liberoplus"
    shutil.copytree(data, package, ignore=shutil.ignore_patterns("bddl_files", "init_files", "assets", "*.pyc"))
    (tmp_path / "liberoplus" / "__init__.py").touch()
    (package / "assets").symlink_to(ASSETS)
    chosen, variants = jobs(), []
    for suite, number in chosen:
        variation = plus.variation(suite, number)
        # The class takes the variant out of the name of a file that does not exist.
        bddl = data / "bddl_files" / suite / f"{variation.name}.bddl"
        variants.append({"bddl": str(bddl), "init_states": str(variation.init_states), "layout": variation.is_layout})
    job = {
        "package": str(tmp_path),
        "variants": variants,
        "out": str(tmp_path),
        "actions": ACTIONS,
        "size": SIZE,
        "seed": SEED,
        "wait": WAIT,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "theirs.py").write_text(THEIRS)
    environment = os.environ | {"LIBERO_CONFIG_PATH": str(tmp_path / "config"), "NUMBA_CACHE_DIR": str(tmp_path)}
    (tmp_path / "config").mkdir()
    done = subprocess.run(
        [sys.executable, tmp_path / "theirs.py", tmp_path / "job.json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for number, (suite, variant) in enumerate(chosen):
        theirs = np.load(tmp_path / f"{number}.npy")  # [steps, 2, H, W, 3]
        ours = render(suite, variant)
        name = plus.variant_names(suite)[variant]
        different = int((ours != theirs).any(axis=-1).sum())
        print(f"{suite} {name}: {different} of {theirs[..., 0].size} pixels differ")
        assert theirs.std() > 20, name
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def render(suite: str, number: int) -> Any:
    """The same by our environment: [steps, 2, H, W, 3]."""
    config = LiberoPlusVariants(task=suite, observation_height=SIZE, observation_width=SIZE)
    environment: Any = make_environment(config, suite, number, 0, 1)
    environment.num_steps_wait = WAIT
    pictures = [environment.reset(seed=SEED)[0]["pixels"]]
    pictures += [environment.step(np.array(action))[0]["pixels"] for action in ACTIONS]
    environment.close()
    return np.stack([[each["image"], each["image2"]] for each in pictures])
