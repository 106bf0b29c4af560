"""Run `geomcache train` and keep an exponential average of the weights, which LeRobot's trainer lacks.

    python pipelines/train_with_average.py --cache PATH --average DIR [every other option of geomcache train]

The actions of a policy trained from scratch on few frames change much from step to step; those of the average of its
last hundred steps do not. DIR becomes a checkpoint as LeRobot writes one: `geomcache eval --policy DIR`.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from lerobot.scripts import lerobot_train
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from geomcache.lerobot_options import given
from geomcache.training.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--average", type=Path, required=True, help="the folder to write")
    parser.add_argument("--decay", type=float, default=0.99, help="share that each step keeps (%(default)s)")
    arguments, lerobot_args = parser.parse_known_args()
    if not given("output_dir", lerobot_args):
        parser.error("--output_dir: expected a folder, got none: its last checkpoint has the processors")

    averages: list[AveragedModel] = []
    make_policy = lerobot_train.make_policy

    def make(*args: Any, **kwargs: Any) -> Any:
        policy = make_policy(*args, **kwargs)
        step_average = get_ema_multi_avg_fn(arguments.decay)  # type: ignore[no-untyped-call]  # torch's, not typed
        average = AveragedModel(policy, multi_avg_fn=step_average)
        register_optimizer_step_post_hook(lambda *_: average.update_parameters(policy))
        averages.append(average)
        return policy

    lerobot_train.make_policy = make  # the trainer keeps its policy to itself
    train(arguments.cache, lerobot_args)
    save(averages[0].module, arguments.average, processors_of(lerobot_args))


def processors_of(lerobot_args: list[str]) -> Path:
    """Return the folder of the run's last checkpoint."""
    from lerobot.configs.parser import parse_arg

    return Path(str(parse_arg("output_dir", lerobot_args))) / "checkpoints" / "last" / "pretrained_model"


def save(policy: Any, folder: Path, checkpoint: Path) -> None:
    """Write a checkpoint: the policy's weights, everything else from another checkpoint of the run."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    policy.save_pretrained(folder)


if __name__ == "__main__":
    main()
