"""What the errors have in common: one line, the builtin that a caller would catch, and attributes that pickle."""

import copy
import inspect
import pickle
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from geomcache import errors
from geomcache.errors import (
    CacheMismatchError,
    ConnectionFailedError,
    GeomcacheError,
    MissingFrameError,
    NonFiniteGeometryError,
    did_you_mean,
    errors_kept_whole,
    one_line,
)

KEYS = ("observation.images.image", "observation.images.wrist_image", "observation.images.top")
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, GeomcacheError)]

# What a class takes besides its message, and has as attributes.
ATTRIBUTES: dict[type[GeomcacheError], dict[str, Any]] = {
    CacheMismatchError: {"field": "spec.grid_hw", "cached": (14, 14), "wanted": None},
    NonFiniteGeometryError: {"places": ((0, 1, "ray"), (3, 0, "ray_conf"))},
}


def make(kind: type[GeomcacheError]) -> GeomcacheError:
    return kind("what: expected this, found that", **ATTRIBUTES.get(kind, {}))


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("da3-larg", ("DA3-SMALL", "DA3-LARGE"), "did you mean DA3-LARGE? "),
        ("libero_objct", ("libero_goal", "libero_object"), "did you mean libero_object? "),
        ("wrist", KEYS, "did you mean observation.images.wrist_image? "),
        ("observation.images.tpo", KEYS, "did you mean observation.images.top? "),
        ("observation.images.left", KEYS, ""),  # the prefix alone makes no likeness
        ("anything", (), ""),
    ],
)
def test_the_nearest_known_name_is_suggested(name: str, known: tuple[str, ...], hint: str) -> None:
    assert did_you_mean(name, known) == hint


def test_every_leaf_is_also_a_builtin_that_callers_catch() -> None:
    leaves = [kind for kind in KINDS if not kind.__subclasses__()]
    assert len(leaves) > 15
    for kind in leaves:
        others = {base for base in kind.__mro__ if not issubclass(base, GeomcacheError)}
        assert others - {Exception, BaseException, object}, kind


def test_another_librarys_message_becomes_one_short_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 500))) == 200


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_every_error_pickles_with_its_attributes(kind: type[GeomcacheError], transport: Any) -> None:
    error = make(kind)
    error.add_note("seen in the test")
    arrived = transport(error)
    assert type(arrived) is kind
    assert str(arrived) == str(error) == "what: expected this, found that"
    assert arrived.args == error.args
    assert vars(arrived) == vars(error) == {**ATTRIBUTES.get(kind, {}), "__notes__": ["seen in the test"]}


class FailingDataset(Dataset[int]):
    """Each item is an error."""

    def __init__(self, kinds: list[type[GeomcacheError]]) -> None:
        self.kinds = kinds

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> int:
        with errors_kept_whole():
            raise make(self.kinds[index])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_error_leaves_a_worker_process_with_its_attributes_and_one_line(method: str) -> None:
    kinds: list[type[GeomcacheError]] = [
        CacheMismatchError,
        NonFiniteGeometryError,
        ConnectionFailedError,
        MissingFrameError,
    ]
    loader = DataLoader(FailingDataset(kinds), batch_size=None, num_workers=1, multiprocessing_context=method)
    batches = iter(loader)
    for kind in kinds:
        with pytest.raises(kind) as caught:
            next(batches)
        assert type(caught.value) is kind
        assert str(caught.value) == "what: expected this, found that"
        assert vars(caught.value) == ATTRIBUTES.get(kind, {})
