"""What a command says when a signal stops it is true of that command."""

import signal

import pytest

from geomcache.cli import main as cli


@pytest.mark.parametrize("command", ["extract", "push", "pull"])
def test_commands_that_resume(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "same command again to resume" in stopped(monkeypatch, capsys, command)


@pytest.mark.parametrize("command", ["train", "eval", "verify", "info"])
def test_commands_that_start_again(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing is resumed" in stopped(monkeypatch, capsys, command)


def test_a_training_run_says_it_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(monkeypatch, capsys, "train", note="resume from step 20 with `x`") == "resume from step 20 with `x`"


def stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, note: str | None = None
) -> str:
    """The advice printed after ``stopped by SIGTERM``, and the exit code checked."""

    def app(**_: object) -> int:
        error = cli._Stopped(signal.SIGTERM)
        if note is not None:
            error.add_note(note)
        raise error

    monkeypatch.setattr("sys.argv", ["geomcache", command])
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 128 + signal.SIGTERM
    head, _, advice = capsys.readouterr().err.strip().removeprefix("geomcache: ").partition(": ")
    assert head == "stopped by SIGTERM"
    return advice
