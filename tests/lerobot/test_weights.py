"""Policies from LeRobot to here and back, held against LeRobot's own code at both ends."""

import json

import pytest
import torch

pytest.importorskip("lerobot.policies.act", reason="needs LeRobot: make lerobot-env")

from lerobot.configs import NormalizationMode
from lerobot.policies.act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from make_goldens import build_reference
from parity_cases import CASES, A, D, E, build, make_batch, result_error
from safetensors.torch import load_file

from act_lightning.batch import Observation
from act_lightning.lerobot.exporting import export_lerobot, write_policy
from act_lightning.lerobot.importing import import_lerobot
from act_lightning.policy import Policy, bare_checkpoint

pytestmark = pytest.mark.lerobot
LIMIT = 1e-5
SAVED = [CASES[0], CASES[3], CASES[5], CASES[9], CASES[12]]
"""Without camera, with one and two; with and without CVAE; pre-norm and post-norm."""


def random_stats(policy, seed=0):
    """Statistics of a made-up data set, all kinds, for every feature."""
    generator = torch.Generator().manual_seed(seed)
    stats = {}
    for key, feature in {**policy.config.input_features, **policy.config.output_features}.items():
        is_image = len(feature.shape) == 3
        # The cameras share theirs, as in LeRobot's training, which gives all of them ImageNet's.
        draw = torch.Generator().manual_seed(99) if is_image else generator
        low = torch.rand(feature.shape[0], generator=draw) * (0.3 if is_image else -2.0)
        high = low + 0.1 + torch.rand(feature.shape[0], generator=draw)
        mean, std = (low + high) / 2, (high - low) / 3
        kinds = {"mean": mean, "std": std, "min": low, "max": high, "q01": low, "q99": high}
        stats[key] = {
            kind: values.reshape(-1, 1, 1) if is_image else values for kind, values in kinds.items()
        }
    return stats


def raw_of(observation: Observation, cameras):
    """An observation as LeRobot's processors get it."""
    raw = {"observation.state": observation.qpos.clone()}
    if observation.env_state is not None:
        raw["observation.environment_state"] = observation.env_state.clone()
    for i, name in enumerate(cameras):
        raw[f"observation.images.{name}"] = observation.images[:, i].float() / 255
    return raw


def lerobot_act(policy, processors, observation, cameras):
    """The chunk that LeRobot executes for an observation."""
    preprocess, postprocess = processors
    policy.reset()
    chunk = policy.predict_action_chunk(preprocess(raw_of(observation, cameras)))
    return torch.stack([postprocess(chunk[:, step]) for step in range(chunk.shape[1])], dim=1)


def open_folder(folder):
    """A policy and its processors, through LeRobot's own loader."""
    policy = ACTPolicy.from_pretrained(folder, strict=True)
    processors = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    return policy, processors


def save_reference(case, folder, modes, stats):
    """A policy folder, written by LeRobot."""
    policy = build_reference(case).eval()
    policy.config.normalization_mapping = {
        kind: NormalizationMode(mode) for kind, mode in modes.items()
    }
    processors = make_pre_post_processors(policy.config, dataset_stats=stats)
    for part in (policy, *processors):
        part.save_pretrained(folder)
    return policy, processors


def our_checkpoint(case, run):
    """A run's best checkpoint, of a network with statistics."""
    net = build(case).eval()
    generator = torch.Generator().manual_seed(0)
    for name, buffer in net.normalizer.named_buffers():
        if not name.startswith("image"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.2)
    (run / "checkpoints").mkdir(parents=True)
    torch.save(bare_checkpoint(net), run / "checkpoints" / "best.ckpt")
    return net


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_lerobot_does_what_we_exported(case, tmp_path, measured):
    net = our_checkpoint(case, tmp_path / "run")
    export_lerobot(tmp_path / "run", tmp_path / "policy")
    observation = make_batch(case).observation
    policy, processors = open_folder(tmp_path / "policy")
    theirs = lerobot_act(policy, processors, observation, net.spec.cameras)
    ours = Policy.from_checkpoint(tmp_path / "run/checkpoints/best.ckpt").predict_chunk(observation)
    error = (ours - theirs).abs().max().item()
    measured[f"export {case}"] = {"actions": error}
    assert error < LIMIT
    first = processors[1](
        policy.select_action(processors[0](raw_of(observation, net.spec.cameras)))
    )
    assert (first - ours[:, 0]).abs().max() < LIMIT


@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=str)
def test_exported_folder_is_as_lerobot_saves_it(case, tmp_path):
    write_policy(build(case).eval(), tmp_path / "ours")
    policy, processors = open_folder(tmp_path / "ours")
    for part in (policy, *processors):
        part.save_pretrained(tmp_path / "theirs")
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for path in ours.glob("*.json"):
        found, expected = (json.loads(p.read_text()) for p in (path, theirs / path.name))
        assert found == expected
        assert list(found) == list(expected)
    for path in ours.glob("*.safetensors"):
        expected, found = load_file(theirs / path.name), load_file(path)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name


MODES = {
    "mean_std": dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "MEAN_STD"),
    "min_max": dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "MIN_MAX"),
    "identity": dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "IDENTITY"),
    "quantiles": dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "QUANTILES"),
    # LeRobot's default for ACT: env_state is not mentioned, so not normalised.
    "default": dict.fromkeys(("VISUAL", "STATE", "ACTION"), "MEAN_STD"),
    "mixed": {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ENV": "QUANTILES", "ACTION": "MEAN_STD"},
}


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("case", SAVED, ids=str)
def test_we_do_what_lerobot_saved(case, modes, tmp_path, measured):
    stats = random_stats(build_reference(case))
    policy, processors = save_reference(case, tmp_path / "policy", MODES[modes], stats)
    path = import_lerobot(tmp_path / "policy", tmp_path / "run", task="t", fps=50)
    ours = Policy.from_checkpoint(path)
    assert ours.spec.dim_qpos == D
    assert ours.spec.dim_action == A
    assert ours.spec.dim_env_state == (E if case.env_state else 0)
    observation = make_batch(case).observation
    theirs = lerobot_act(policy, processors, observation, ours.spec.cameras)
    error = result_error(ours.predict_chunk(observation), theirs)
    measured[f"import {case} {modes}"] = {"actions": error}
    assert error < LIMIT


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES"])
def test_dimensions_that_never_change_are_imported_too(mode, tmp_path):
    """A gripper that stayed put: LeRobot divides by eps, and is right where it is where it was."""
    case = CASES[0]
    stats = random_stats(build_reference(case))
    for key in ("observation.state", "observation.environment_state", "action"):
        for constant, index in ((0.7, 0), (-0.3, 1), (0.0, 2)):
            for kind in ("mean", "min", "max", "q01", "q99"):
                stats[key][kind][index] = constant
            stats[key]["std"][index] = 0.0
    modes = dict.fromkeys(("STATE", "ENV", "ACTION"), mode)
    policy, processors = save_reference(case, tmp_path / "policy", modes, stats)
    path = import_lerobot(tmp_path / "policy", tmp_path / "run", task="t", fps=50)
    observation = make_batch(case).observation
    for values in (observation.qpos, observation.env_state):
        values[:, :3] = torch.tensor([0.7, -0.3, 0.0])
    theirs = lerobot_act(policy, processors, observation, ())
    assert (Policy.from_checkpoint(path).predict_chunk(observation) - theirs).abs().max() < LIMIT


def test_weights_come_back_as_they_were(tmp_path):
    case = CASES[9]
    stats = random_stats(build_reference(case))
    policy, processors = save_reference(case, tmp_path / "theirs", MODES["mean_std"], stats)
    import_lerobot(tmp_path / "theirs", tmp_path / "run", task="t", fps=50)
    export_lerobot(tmp_path / "run", tmp_path / "back")
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back")
    )
    assert set(before) == set(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back")
    ]
    assert configs[0] == configs[1]
    observation, cameras = make_batch(case).observation, ("cam0", "cam1")
    expected = lerobot_act(policy, processors, observation, cameras)
    found = lerobot_act(*open_folder(tmp_path / "back"), observation, cameras)
    assert (found - expected).abs().max() < LIMIT


def test_the_position_table_is_lerobots(tmp_path):
    write_policy(build(CASES[0]), tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")["model.vae_encoder_pos_enc"]
    assert torch.equal(ours, build_reference(CASES[0]).state_dict()["model.vae_encoder_pos_enc"])
