"""A DA3-SMALL folder with random weights, and upstream's own network on it: what geometry is compared with."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model

from pipelines.make_random_da3 import save_random_da3


@pytest.fixture(scope="session")
def random_da3_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """config.json and model.safetensors (137 MB) of DA3-SMALL, as upstream's save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("random-da3-small")
    save_random_da3(folder)
    yield folder
    shutil.rmtree(folder)


def upstream_network(folder: Path) -> Any:
    """Upstream's whole DepthAnything3Net with the folder's weights, loaded as upstream loads them."""
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    network = create_object(load_config(MODEL_REGISTRY["da3-small"]))
    holder = torch.nn.ModuleDict({"model": network})
    load_model(holder, folder / "model.safetensors", strict=True)
    return network.eval()


def upstream_maps(
    network: Any, images: Sequence[NDArray[np.uint8]], process_res: int, *, bf16: bool = False
) -> dict[str, NDArray[np.float32]]:
    """What upstream's head gives for the views of ONE frame, as one scene: float32 [V, h, w, ...], native sizes.

    DepthAnything3Net.forward runs as a whole; the head's output is taken as it leaves the head: rays are deleted later.
    """
    from depth_anything_3.utils.io.input_processor import InputProcessor

    inputs, _, _ = InputProcessor()(list(images), process_res=process_res)
    taken: dict[str, NDArray[np.float32]] = {}
    hook = network.head.register_forward_hook(
        lambda _module, _args, output: taken.update({name: value[0].numpy() for name, value in output.items()})
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        network(inputs[None], ref_view_strategy="first")
    hook.remove()
    return taken


def area_average(values: NDArray[np.float32], grid_hw: tuple[int, int]) -> NDArray[Any]:
    """[V, h', w', ...] -> [V, h, w, ...], each cell the mean of the cells that it touches: by hand, in float64."""
    height, width = values.shape[1:3]
    result = np.empty((len(values), *grid_hw, *values.shape[3:]))
    for i in range(grid_hw[0]):
        rows = slice(i * height // grid_hw[0], -(-(i + 1) * height // grid_hw[0]))
        for j in range(grid_hw[1]):
            columns = slice(j * width // grid_hw[1], -(-(j + 1) * width // grid_hw[1]))
            result[:, i, j] = values[:, rows, columns].astype(np.float64).mean(axis=(1, 2))
    return result


def assert_one_step(actual: torch.Tensor | NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal to one float16 step. Around zero, where steps are finer than float32's own noise, to a few millionths."""
    np.testing.assert_allclose(
        np.asarray(actual).astype(np.float64), expected.astype(np.float16).astype(np.float64), rtol=2.0**-10, atol=4e-6
    )
