"""The compiled network: equal to the eager one, padded to one shape of batches, and given up where compiling fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from geomcache.da3.backbone import RotaryTables
from geomcache.da3.encoder import DA3Encoder
from geomcache.geometry import HEAD_OUTPUTS, Camera
from tests.support.da3 import assert_one_step
from tests.support.logs import logged_lines

CAMERAS = tuple(Camera(key=f"observation.images.{name}", height=28, width=28) for name in ("front", "wrist"))


def images(frames: int) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (frames, 28, 28, 3), np.uint8) for _ in CAMERAS]


@pytest.fixture(scope="module")
def eager(random_da3_folder: Path) -> DA3Encoder:
    return load(random_da3_folder)


def load(folder: Path, **options: Any) -> DA3Encoder:
    return DA3Encoder.from_pretrained(str(folder), cameras=CAMERAS, process_res=28, device="cpu", **options)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch trace the functions and run what it traced: it takes seconds, and no C++ compiler."""
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_function(function, **options, backend="eager")
    )


class Failing:
    """Stands for torch.compile: what it returns fails from a call on."""

    def __init__(self, error: Exception, *, after: int = 0) -> None:
        self.error, self.calls, self.after = error, 0, after

    def __call__(self, function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        assert dynamic is False

        def run(*args: Any) -> Any:
            self.calls += 1
            if self.calls > self.after:
                raise self.error
            return function(*args)

        return run


@pytest.mark.usefixtures("quick_compiler")
def test_the_compiled_network_gives_the_same_padded_or_not(
    random_da3_folder: Path, eager: DA3Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = load(random_da3_folder)
    assert compiled.engine == "eager"
    assert compiled.compile(3) > 0
    assert (compiled.engine, compiled.calls) == ("compiled", 0)
    shapes: list[tuple[int, ...]] = []
    run = compiled._forward._run

    def watched(scenes: torch.Tensor, outputs: Any) -> dict[str, torch.Tensor]:
        shapes.append(tuple(scenes.shape))
        return run(scenes, outputs)

    monkeypatch.setattr(compiled._forward, "_run", watched)
    expected = eager.encode(images(3))
    for frames in (3, 2, 1):
        geometry = compiled.encode([view[:frames] for view in images(3)])
        for name, values in geometry.items():
            assert values.shape == (frames, *getattr(expected, name).shape[1:])
            assert_one_step(values, getattr(expected, name)[:frames].numpy())
    assert set(shapes) == {(3, 2, 3, 28, 28)}  # one shape: nothing is compiled again
    compiled.encode(images(4))
    assert shapes[-1] == (4, 2, 3, 28, 28)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_torch_compiles_gives_the_same_within_its_rounding(random_da3_folder: Path, dtype: str) -> None:
    reference, compiled = load(random_da3_folder, dtype=dtype), load(random_da3_folder, dtype=dtype)
    compiled.compile(2)
    assert compiled.engine == "compiled"
    bound = {"fp32": 1e-3, "bf16": 0.1}[dtype]
    for name, values in compiled.encode(images(2)).items():
        expected = getattr(reference.encode(images(2)), name).float()
        assert (values.float() - expected).abs().max() < bound * expected.std()


@pytest.mark.usefixtures("quick_compiler")
def test_outputs_with_depth_run_the_whole_head(random_da3_folder: Path) -> None:
    options: dict[str, Any] = {"outputs": HEAD_OUTPUTS, "grid": "native"}
    expected, compiled = load(random_da3_folder, **options), load(random_da3_folder, **options)
    compiled.compile(1)
    for name, values in compiled.encode(images(1)).items():
        assert_one_step(values, getattr(expected.encode(images(1)), name).numpy())


def test_a_compilation_that_fails_is_one_warning_and_the_same_numbers(
    random_da3_folder: Path, eager: DA3Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(RuntimeError("no C++ compiler\nwas found"), after=5)
    monkeypatch.setattr(torch, "compile", failing)
    encoder = load(random_da3_folder)
    with logged_lines() as lines:
        encoder.compile(2)
        geometry = encoder.encode(images(2))
        encoder.encode(images(1))
    assert encoder.engine == "eager"
    assert failing.calls == 6
    (line,) = lines
    assert "RuntimeError" in line
    assert "no C++ compiler" in line
    assert "\n" not in line
    assert torch.equal(geometry.ray, eager.encode(images(2)).ray)


def test_no_memory_is_no_failed_compilation(random_da3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", Failing(torch.OutOfMemoryError("out of memory")))
    encoder = load(random_da3_folder)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.compile(2)
    assert encoder.engine == "compiled"  # a smaller batch may still compile


def test_an_error_after_compiling_is_not_hidden(random_da3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(RuntimeError("the device was lost"), after=1000)
    monkeypatch.setattr(torch, "compile", failing)
    encoder = load(random_da3_folder)
    encoder.compile(1)
    failing.after = 0
    with pytest.raises(RuntimeError, match="the device was lost"):
        encoder.encode(images(1))


def test_rotary_tables_are_made_under_the_networks_autocast(
    random_da3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's autocast rounds upstream's angles: tables that are made outside of it are others."""
    seen: list[bool] = []
    make = RotaryTables.make

    def watched(*args: Any) -> RotaryTables | None:
        seen.append(torch.is_autocast_enabled("cpu"))
        return make(*args)

    monkeypatch.setattr(RotaryTables, "make", watched)
    for dtype in ("fp32", "bf16"):
        encoder = load(random_da3_folder, dtype=dtype)
        encoder.encode(images(1))
        encoder.encode(images(1))  # once for a size
    assert seen == [False, True]
