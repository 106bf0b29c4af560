"""SIGKILL at random moments and at every step of the protocol, and many writers of which some are killed."""

import json
from pathlib import Path
from typing import Any

from tests.faults.common import Figure, few_or_many
from tests.support.stores import output_of, run_python

PROGRAM = "from tests.faults.killing import main; main()"


def kill(what: str, count: int, folder: Path) -> dict[str, Any]:
    facts = json.loads(output_of(run_python(PROGRAM, what, count, folder), timeout=1800))
    assert isinstance(facts, dict)
    return facts


@few_or_many("kills", 10, 500)
def test_a_kill_at_a_random_moment_loses_nothing_acknowledged(tmp_path: Path, kills: int, figure: Figure) -> None:
    facts = kill("random_moments", kills, tmp_path)
    assert facts["kills"] >= kills
    assert facts["frames computed again"]["worst"] <= 16  # the shard at hand
    figure(f"{facts}")


@few_or_many("step", 7, 1)
def test_a_kill_at_every_step_loses_nothing_acknowledged(tmp_path: Path, step: int, figure: Figure) -> None:
    facts = kill("every_step", step, tmp_path)
    assert facts["kills"] > 100 // step
    figure(f"every {step}. file operation: {facts}")


@few_or_many("rounds", 2, 70)
def test_many_writers_of_which_some_are_killed_make_every_shard_once(
    tmp_path: Path, rounds: int, figure: Figure
) -> None:
    facts = kill("many_writers", rounds, tmp_path)
    assert facts["killed"] > 0
    figure(f"{facts}")
