"""Fixtures that several test files use, and what keeps the suite quick and its output short."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from tests.support.da3 import random_da3_folder

__all__ = ["random_da3_folder"]

torch.set_num_threads(1)  # the suite runs on as many processes as there are cores
# Without FFmpeg's libraries LeRobot falls back from torchcodec to PyAV, and says so in 80 lines at every dataset.
logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
