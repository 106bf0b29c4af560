"""Read a dataset's chunks of actions without decoding the pictures of the same rows: a seam into LeRobot's reader.

LeRobot 0.6.1 asks for whole rows where it needs one column of them, and its conversion to tensors decodes all pictures
that are stored in the rows: for a chunk of 16 actions with two cameras 32 pictures, which are thrown away
(https://github.com/huggingface/lerobot/issues/4392). Datasets with video are not concerned.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor


def read_columns_alone(dataset: Any) -> None:
    """Let a `LeRobotDataset` read columns over time (`delta_timestamps`) without the others. The items stay the same.

    A dataset without such columns, or without stored pictures, is left as it is.
    """
    rows = dataset.hf_dataset  # LeRobot loads it, and makes the reader, at the first access
    reader = dataset.reader
    if not reader.delta_indices or not dataset.meta.image_keys:
        return
    narrow = {}
    for key in reader.delta_indices:
        narrow[key] = copy.copy(reader)
        narrow[key].hf_dataset = rows.select_columns([key])
    reader._query_hf_dataset = partial(_query, narrow)


def _query(narrow: Mapping[str, Any], query_indices: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return what LeRobot's `_query_hf_dataset` returns: each key's values at its rows, stacked."""
    result: dict[str, Tensor] = {}
    for key, rows in query_indices.items():
        result |= narrow[key]._query_hf_dataset({key: rows})
    return result
