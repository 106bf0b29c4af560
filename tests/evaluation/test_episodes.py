"""The file of results: rows as written, other runs refused, what a kill leaves, claims."""

import csv
import json
from pathlib import Path

import pytest

from geomcache.errors import UserInputError
from geomcache.evaluation.episodes import COLUMNS, EpisodeLog, read_episodes
from tests.support.results import make_identity, make_row
from tests.support.stores import run_python


def test_rows_are_read_as_they_were_written_and_by_any_reader(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "episodes.csv"
    rows = [make_row(3, 0, camera_moved_m=0.1 + 0.2), make_row(3, 1, success=False, variant='with, a "quote"')]
    with EpisodeLog(file, make_identity()) as log:
        log.append(rows)
        assert log.of_task("libero_object", 3) == {0: rows[0], 1: rows[1]}
        assert log.of_task("libero_goal", 3) == {}
    assert read_episodes(file) == tuple(rows)
    with file.open(newline="") as opened:
        (first, second) = csv.DictReader(opened)
    assert tuple(first) == COLUMNS
    assert (first["success"], second["success"], second["variant"]) == ("1", "0", 'with, a "quote"')
    assert float(first["camera_moved_m"]) == 0.1 + 0.2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"world": {"episode_length": 9, "observation_height": 64}}, "world.episode_length"),
        ({"settings": {"batch_size": 1, "policy": {"n_action_steps": 8}}}, "settings.policy.n_action_steps"),
        ({"weights": "0d" * 32}, "weights"),
        ({"seed": 7}, "seed"),
        ({"environment": "libero"}, "environment"),
    ],
)
def test_rows_of_another_run_are_not_added(tmp_path: Path, fields: dict[str, object], named: str) -> None:
    file = tmp_path / "episodes.csv"
    with EpisodeLog(file, make_identity()) as log:
        log.append([make_row()])
    before = file.read_bytes()
    with pytest.raises(UserInputError, match=named.replace(".", r"\.")):
        EpisodeLog(file, make_identity(**fields))
    assert file.read_bytes() == before
    with EpisodeLog(file, make_identity(policy="moved")) as log:  # a label
        assert list(log.of_task("libero_object", 0)) == [0]


def test_an_incomplete_last_row_is_removed_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "episodes.csv"
    with EpisodeLog(file, make_identity()) as log:
        log.append([make_row(0)])
        whole = file.read_bytes()
        log.append([make_row(1)])
    file.write_bytes(file.read_bytes()[:-5])
    with EpisodeLog(file, make_identity()) as log:
        assert log.of_task("libero_object", 0)
        assert not log.of_task("libero_object", 1)
        assert file.read_bytes() == whole
        log.append([make_row(1)])
    assert [row.task for row in read_episodes(file)] == [0, 1]
    assert str(file) in caplog.text


def test_what_is_no_file_of_results(tmp_path: Path) -> None:
    file = tmp_path / "episodes.csv"
    with pytest.raises(UserInputError, match="No such file"):
        read_episodes(file)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UserInputError, match="found a, b"):
        read_episodes(file)
    with EpisodeLog(tmp_path / "good.csv", make_identity()) as log:
        log.append([make_row()])
    header, row = (tmp_path / "good.csv").read_text().splitlines()
    file.write_text(f"{header}\n{row}\n{row}\n")
    with pytest.raises(UserInputError, match=r"line 3: .*libero_object task 0 episode 0 .*line 2"):
        read_episodes(file)
    file.write_text(f"{header}\n{row.replace('libero_object,0', 'libero_object,x')}\n")
    with pytest.raises(UserInputError, match="line 2"):
        read_episodes(file)
    (tmp_path / "good.csv.json").unlink()
    with pytest.raises(UserInputError, match=r"good\.csv\.json"):
        EpisodeLog(tmp_path / "good.csv", make_identity())


def test_rows_are_put_in_order(tmp_path: Path) -> None:
    file = tmp_path / "episodes.csv"
    rows = [make_row(10, 0), make_row(9, 1), make_row(9, 0), make_row(0, 0, suite="libero_goal")]
    with EpisodeLog(file, make_identity()) as log:
        for row in rows:
            log.append([row])
        log.put_in_order()
        log.append([make_row(11, 0)])
    assert [row.key for row in read_episodes(file)] == [
        ("libero_goal", 0, 0),
        ("libero_object", 9, 0),
        ("libero_object", 9, 1),
        ("libero_object", 10, 0),
        ("libero_object", 11, 0),
    ]


OTHER = """
import sys
from pathlib import Path
from geomcache.evaluation.episodes import EpisodeLog
from tests.support.results import make_identity, make_row

with EpisodeLog(Path(sys.argv[1]), make_identity()) as log:
    print(log.claim("libero_object", 0), log.claim("libero_object", 1), flush=True)
    sys.stdin.readline()
    log.append([make_row(1)])
    print("added", flush=True)
    sys.stdin.readline()
"""


def test_a_task_belongs_to_one_process_until_it_gives_it_back_or_dies(tmp_path: Path) -> None:
    file = tmp_path / "episodes.csv"
    with EpisodeLog(file, make_identity()) as log:
        assert log.claim("libero_object", 0)
        assert not log.claim("libero_object", 0)
        with run_python(OTHER, file) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline().split() == ["False", "True"]
            assert not log.claim("libero_object", 1)
            log.append([make_row(0)])
            print(file=process.stdin, flush=True)
            assert process.stdout.readline().strip() == "added"
            process.kill()
        assert log.claim("libero_object", 1)
        assert list(log.of_task("libero_object", 1)) == [0]  # read when it was claimed
        log.release("libero_object", 0)
        assert log.claim("libero_object", 0)
    assert sorted(row.task for row in read_episodes(file)) == [0, 1]
    assert json.loads(file.with_name("episodes.csv.json").read_text())["seed"] == 1000
