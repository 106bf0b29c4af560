"""What the errors have in common: one line, and the builtin that a caller would catch."""

import pytest

from geomcache.errors import GeomcacheError, did_you_mean, one_line

KEYS = ("observation.images.image", "observation.images.wrist_image", "observation.images.top")


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


def test_every_error_of_ours_is_also_a_builtin_that_callers_catch() -> None:
    kinds = [GeomcacheError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    leaves = [kind for kind in kinds if not kind.__subclasses__() and kind.__module__ == GeomcacheError.__module__]
    assert leaves
    for kind in leaves:
        others = {base for base in kind.__mro__ if not issubclass(base, GeomcacheError)}
        assert others - {Exception, BaseException, object}, kind


def test_anothers_message_becomes_one_short_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 500))) == 200
