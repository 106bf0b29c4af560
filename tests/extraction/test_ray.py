"""Stage one on a Ray cluster: what it refuses, and, slowly, that its caches are those of one process whatever dies."""

from pathlib import Path
from typing import Any, cast

import pytest

from geomcache.errors import ClusterError, UserInputError
from geomcache.extraction import ray_run
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.run import extract
from geomcache.frames.source import open_dataset
from tests.faults import ray_cluster
from tests.support.datasets import DEMO
from tests.support.logs import logged_lines
from tests.support.stores import open_writer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"actors": 2}, ["actors", "--cluster"]),
        ({"gpus_per_actor": 0.5}, ["gpus-per-actor", "--cluster"]),
        ({"cluster": "ray", "actors": 0}, ["actors", "0"]),
        ({"cluster": "ray", "gpus_per_actor": 2.0}, ["gpus-per-actor", "2"]),
        ({"cluster": "ray", "gpus_per_actor": 1.0, "device": "cpu"}, ["gpus-per-actor", "--device"]),
        ({"cluster": "ray", "device": "cuda:1"}, ["device", "cuda:1"]),
        ({"cluster": "ray", "num_workers": 0}, ["num-workers", "0"]),
        ({"cluster": "ray", "dry_run": True}, ["--dry-run"]),
        ({"cluster": "ray", "follow": True, "root": DEMO}, ["--follow"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserInputError) as caught:
        ExtractOptions(model="m", dataset="d", **options)
    assert all(name in str(caught.value) for name in named)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserInputError, match=r"geomcache\[ray\]"):
        ExtractOptions(model="m", dataset="d", cluster="ray")


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **_options: object) -> None:
        assert address == "head:6379"
        raise ConnectionError("no\nanswer")

    monkeypatch.setattr("ray.init", init)
    options = ray_cluster.demo_options(tmp_path, tmp_path / "x.zarr", cluster="ray", cluster_address="head:6379")
    with pytest.raises(ClusterError, match="^cluster head:6379: .*no answer") as caught:
        extract(options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["equal", "later", "actors", "nodes", "drivers"])
def test_a_cluster_makes_the_cache_of_one_process(kind: str, random_da3_folder: Path, tmp_path: Path) -> None:
    """`Scene.check` compares. Three kills of each kind; `python -m tests.faults.ray_cluster` does as many as asked."""
    ray_cluster.run(kind, 3, tmp_path, random_da3_folder)


class NoActors:
    """A pool in which no actor has started."""

    actors: tuple[object, ...] = ()
    decoders = 1

    def describe_wait(self) -> str:
        return "waiting for an actor: it needs 1 GPU"


def test_an_actor_that_has_no_room_is_waited_for_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_run, "WAIT_LINE_S", 0.0)
    dataset, _ = open_dataset("demo", root=DEMO)
    with open_writer(tmp_path / "cache.zarr") as writer, logged_lines() as lines:
        run = ray_run._Run(writer, cast("Any", NoActors()), dataset, 0.0)
        run._log_wait()
    assert lines == ["waiting for an actor: it needs 1 GPU"]
