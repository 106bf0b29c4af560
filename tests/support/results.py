"""Rows of results, made up."""

from typing import Any

from geomcache.evaluation.episodes import Episode, RunIdentity

SHARED: dict[str, Any] = {
    "environment": "libero_plus_variants",
    "policy": "checkpoint",
    "weights": "0a" * 6,
    "fingerprint": "f0" * 32,
    "settings": "0b" * 6,
    "world": "0c" * 6,
}


def make_row(task: int = 0, episode: int = 0, *, success: bool = True, **fields: Any) -> Episode:
    """A row of task `task` of a suite."""
    values = {
        "suite": "libero_object",
        "task": task,
        "variant": f"variant {task}",
        "base_task": f"task {task}",
        "axis": "camera",
        "camera": "45_15_130_5_0",
        "camera_moved_m": 0.3,
        "camera_turned_deg": 12.5,
        "episode": episode,
        "seed": 1000 + episode,
        "success": success,
        "steps": 100,
        "sum_reward": float(success),
        "max_reward": float(success),
        "encoder_calls": 2,
    }
    return Episode(**(SHARED | values | fields))


def make_identity(**fields: Any) -> RunIdentity:
    """What the rows of a run have in common."""
    values: dict[str, Any] = {
        "environment": "libero_plus_variants",
        "world": {"episode_length": None, "observation_height": 64},
        "settings": {"batch_size": 1, "policy": {"n_action_steps": 4}},
        "policy": "checkpoint",
        "weights": "0a" * 32,
        "fingerprint": "f0" * 32,
        "seed": 1000,
    }
    return RunIdentity(**(values | fields))
