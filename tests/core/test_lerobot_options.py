"""LeRobot's warning of missing FFmpeg libraries becomes one line, and no other does."""

import logging

import pytest

from geomcache.lerobot_options import short_ffmpeg_warning

UPSTREAM = "lerobot.utils.import_utils"  # where LeRobot logs why it does not take torchcodec


def upstream_message(*reasons: str) -> str:
    """LeRobot's text: torchcodec's error with a traceback for each version of FFmpeg, then what LeRobot does."""
    tracebacks = "\n".join(
        f"FFmpeg version {8 - number}:\nTraceback (most recent call last):\n  ctypes.CDLL(path)\nOSError: {reason}\n\n"
        "The above exception was the direct cause of the following exception:\n\nTraceback (most recent call last):\n"
        f"OSError: Could not load this library: /site-packages/torchcodec/libtorchcodec_core{8 - number}.so"
        for number, reason in enumerate(reasons)
    )
    return (
        "Could not load libtorchcodec. Likely causes:\n  1. FFmpeg is not properly installed in your environment.\n"
        f"[start of libtorchcodec loading traceback]\n{tracebacks}\n[end of libtorchcodec loading traceback].\n"
        "'torchcodec' is installed but cannot be loaded. Falling back to 'pyav' as a default decoder."
    )


MISSING = ("libavutil.so.60: cannot open shared object file: No such file or directory",) * 5


def test_missing_ffmpeg_is_one_line_with_the_package(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=UPSTREAM):
        with short_ffmpeg_warning():
            for _ in range(2):  # LeRobot asks for its default decoder more than once
                logging.getLogger(UPSTREAM).warning(upstream_message(*MISSING))
        (record,) = caplog.records
        assert record.name == "geomcache.lerobot_options"
        assert "\n" not in record.getMessage()
        assert "apt-get install ffmpeg" in record.getMessage()
        logging.getLogger(UPSTREAM).warning(upstream_message(*MISSING))
        assert len(caplog.records) == 2  # outside, LeRobot's log is as it was


@pytest.mark.parametrize(
    "message",
    [
        upstream_message(*MISSING[:-1], "/torchcodec/libtorchcodec_core4.so: undefined symbol: _ZN3c10"),
        upstream_message("libcudart.so.13: cannot open shared object file: No such file or directory"),
        "'torchcodec' is not available in your platform, falling back to 'pyav' as a default decoder",
        "Could not load libtorchcodec. No reason is given.",
    ],
)
def test_other_reasons_are_logged_as_they_are(message: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=UPSTREAM), short_ffmpeg_warning():
        logging.getLogger(UPSTREAM).warning(message)
    assert [record.getMessage() for record in caplog.records] == [message]


def test_lerobot_still_logs_there(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.utils import import_utils

    def missing(_name: str) -> None:
        raise RuntimeError(upstream_message(*MISSING))

    monkeypatch.setattr(import_utils.importlib.util, "find_spec", lambda _name: True)
    monkeypatch.setattr(import_utils.importlib, "import_module", missing)
    with caplog.at_level(logging.WARNING, logger=UPSTREAM), short_ffmpeg_warning():
        assert import_utils.get_safe_default_video_backend() == "pyav"
    assert [record.name for record in caplog.records] == ["geomcache.lerobot_options"]
