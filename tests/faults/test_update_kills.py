"""SIGKILL during `geomcache update`: the old cache or the new one, whole, and the same command finishes."""

import json
from pathlib import Path

from tests.faults.common import Figure, few_or_many
from tests.support.stores import output_of, run_python

PROGRAM = "from tests.faults.killing_updates import main; main()"


@few_or_many("kills", 6, 100)
def test_a_kill_at_a_random_moment_leaves_the_old_cache_or_the_new_one(
    tmp_path: Path, kills: int, figure: Figure
) -> None:
    facts = json.loads(output_of(run_python(PROGRAM, "random_moments", kills, tmp_path), timeout=1800))
    assert facts["kills"] >= kills
    figure(f"{facts}")


@few_or_many("step", 60, 1)
def test_a_kill_at_every_step_leaves_the_old_cache_or_the_new_one(tmp_path: Path, step: int, figure: Figure) -> None:
    facts = json.loads(output_of(run_python(PROGRAM, "every_step", step, tmp_path), timeout=1800))
    assert facts["kills"] > 100 // step
    figure(f"every {step}. file operation: {facts}")
