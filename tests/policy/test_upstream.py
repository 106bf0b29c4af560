"""Other versions of LeRobot: overrides take what LeRobot's own take, and what does not work is refused by name."""

import inspect
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.policies.pi0.modeling_pi0 import PI0Policy, PI0Pytorch
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching

from geomcache.errors import UserInputError
from geomcache.policy import lerobot_version
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy, PI05GeometryPytorch
from geomcache.policy.pi0.modeling_pi0_geometry import PI0GeometryPolicy, PI0GeometryPytorch
from geomcache.policy.smolvla.modeling_smolvla_geometry import SmolVLAGeometryNetwork, SmolVLAGeometryPolicy
from geomcache.training.checks import check_options
from tests.support.policy import CHUNK, QUICK, loss_and_chunk, make_batch, make_config, make_plain_policy, make_policy

SUBCLASSES = [
    (PI05GeometryPytorch, PI05Pytorch),
    (PI05GeometryPolicy, PI05Policy),
    (PI0GeometryPytorch, PI0Pytorch),
    (PI0GeometryPolicy, PI0Policy),
    (SmolVLAGeometryNetwork, VLAFlowMatching),
    (SmolVLAGeometryPolicy, SmolVLAPolicy),
]
OVERRIDES = [
    (ours, theirs, name)
    for ours, theirs in SUBCLASSES
    for name in sorted({name for base in ours.__mro__[: ours.__mro__.index(theirs)] for name in vars(base)})
    if inspect.isfunction(getattr(ours, name)) and hasattr(theirs, name) and name != "__init__"
]
KINDS = inspect.Parameter


def calls(signature: inspect.Signature) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
    """Arguments of calls that a signature takes: as few as it can, all by position, all by name."""
    named = [
        p
        for p in list(signature.parameters.values())[1:]
        if p.kind in (KINDS.POSITIONAL_OR_KEYWORD, KINDS.KEYWORD_ONLY)
    ]
    positional = [p.name for p in named if p.kind is KINDS.POSITIONAL_OR_KEYWORD]
    keyword_only = [p.name for p in named if p.kind is KINDS.KEYWORD_ONLY]
    yield tuple(p.name for p in named if p.default is KINDS.empty), {}
    yield tuple(positional), {name: name for name in keyword_only}
    yield (), {p.name: p.name for p in named}


@pytest.mark.parametrize(("ours", "theirs", "name"), OVERRIDES, ids=lambda value: getattr(value, "__name__", value))
def test_an_override_takes_every_call_that_lerobots_takes(ours: type, theirs: type, name: str) -> None:
    mine, upstream = inspect.signature(getattr(ours, name)), inspect.signature(getattr(theirs, name))
    for args, kwargs in calls(upstream):
        upstream.bind("self", *args, **kwargs)
        mine.bind("self", *args, **kwargs)


def test_the_overrides_are_found() -> None:
    for network, policy in zip(SUBCLASSES[::2], SUBCLASSES[1::2], strict=True):
        names = {name for ours, _, name in OVERRIDES if ours in (network[0], policy[0])}
        assert {"embed_prefix", "forward", "sample_actions", "select_action"} <= names
        assert names & {"predict_action_chunk", "_get_action_chunk"}


@pytest.mark.parametrize("name", ["embed_prefix", "forward", "sample_actions"])
def test_the_network_passes_on_what_it_does_not_know(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LeRobot's next version calls it: with positions and keywords that this one does not have."""
    seen: list[tuple[Any, ...]] = []

    def upstream(_self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return "result"

    network = make_policy().model
    monkeypatch.setattr(PI05Pytorch, name, upstream)
    result = getattr(network, name)(["pictures"], ["masks"], "tokens", "text masks", "states", state_masks="more")
    assert result == "result"
    assert seen == [((["pictures"], ["masks"], "tokens", "text masks", "states"), {"state_masks": "more"})]


def test_the_policy_passes_on_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = make_policy(use_geom_prefix=False), []
    for name in ("forward", "predict_action_chunk", "select_action"):
        monkeypatch.setattr(PI05Policy, name, lambda _self, *args, **kwargs: seen.append((args, kwargs)))
        getattr(policy, name)({}, "more", other=1)
    assert seen == [(({}, "more"), {"other": 1})] * 3


# What LeRobot's next version adds


@pytest.mark.parametrize("name", ["use_visual_memory", "use_proprioceptive_memory"])
def test_memory_is_refused_by_name(name: str) -> None:
    config = make_config()
    setattr(config, name, True)
    with pytest.raises(UserInputError, match=name):
        config.validate_features()


def test_checkpoints_in_shards_are_refused_by_name() -> None:
    dataset = SimpleNamespace(streaming=False, episodes=None)
    config = SimpleNamespace(steps=1, batch_size=1, num_workers=0, dataset=dataset)
    check_options(config)
    config.checkpoint_format = SimpleNamespace(value="safetensors")
    check_options(config)
    config.checkpoint_format = SimpleNamespace(value="safetensors_dcp")
    with pytest.raises(UserInputError, match=r"checkpoint_format: .*'safetensors_dcp'"):
        check_options(config)


def test_split_parameters_are_refused_by_name() -> None:
    dataset = SimpleNamespace(streaming=False, episodes=None)
    config = SimpleNamespace(steps=1, batch_size=1, num_workers=0, dataset=dataset)
    config.parallelism = SimpleNamespace(is_sharded=False, dp_shard=1)
    check_options(config)
    config.parallelism = SimpleNamespace(is_sharded=True, dp_shard=-1)
    with pytest.raises(UserInputError, match=r"parallelism: .*dp_shard=-1.*dp_replicate"):
        check_options(config)


needs_trained_rtc = pytest.mark.skipif(
    not hasattr(make_config(), "rtc_training_max_delay"), reason="LeRobot 0.6.1 has no trained real-time chunking"
)


@needs_trained_rtc
def test_trained_real_time_chunking_trains_and_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"rtc_training_max_delay": 2}
    policy = make_policy(**options)
    plain = make_plain_policy(monkeypatch, **options)
    off = make_policy(use_geom_prefix=False, **options)
    off.load_state_dict(plain.state_dict())
    for ours, theirs in zip(loss_and_chunk(off, make_batch()), loss_and_chunk(plain, make_batch()), strict=True):
        assert torch.equal(ours, theirs)
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy.config.rtc_config = RTCConfig(mode="trained")
    policy.init_rtc_processor()
    batch = make_batch()
    first = policy.predict_action_chunk(batch)
    second = policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=first)
    torch.testing.assert_close(second[:, :2], first[:, :2])  # what the robot does meanwhile stays as it is
    assert second.shape == (2, CHUNK, QUICK["max_action_dim"])


# Versions


@pytest.mark.parametrize(
    ("installed", "said"), [("0.6.0", True), ("0.6.1", False), ("0.6.2", False), ("0.6.3", True), ("0.7.0.dev1", True)]
)
def test_a_version_that_was_not_tested_is_said_once(
    installed: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lerobot_version, "version", lambda _name: installed)
    lerobot_version.warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING, logger="geomcache"):
        make_config()
        make_config()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == said
    assert all(installed in line and "0.6.1" in line and "\n" not in line for line in lines)
    lerobot_version.warn_if_untested.cache_clear()
