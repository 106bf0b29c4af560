"""SIGKILL during `geomcache update`: the old cache or the new one, whole, and the same command finishes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.common import Figure
from tests.support.stores import output_of, run_python

PROGRAM = "from tests.faults.killing_updates import main; main()"


def update(what: str, count: int, folder: Path) -> dict[str, Any]:
    facts = json.loads(output_of(run_python(PROGRAM, what, count, folder), timeout=3600))
    assert isinstance(facts, dict)
    return facts


@pytest.mark.slow  # each kill is a process that imports torch
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [100])
def test_a_kill_at_a_random_moment_leaves_the_old_cache_or_the_new_one(
    tmp_path: Path, kills: int, figure: Figure
) -> None:
    facts = update("random_moments", kills, tmp_path)
    assert facts["kills"] >= kills
    figure(f"{facts}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("step", [1])
def test_a_kill_at_every_step_leaves_the_old_cache_or_the_new_one(tmp_path: Path, step: int, figure: Figure) -> None:
    facts = update("every_step", step, tmp_path)
    assert facts["kills"] > 100 // step
    figure(f"every {step}. file operation: {facts}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rounds", [20])
def test_two_updates_at_once_share_the_work(tmp_path: Path, rounds: int, figure: Figure) -> None:
    figure(f"{update('two_at_once', rounds, tmp_path)}")
