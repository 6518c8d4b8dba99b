"""Faster prediction, against the network it was made from."""

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from act_lightning.batch import DataSpec, Observation
from act_lightning.execution import ExecutionConfig
from act_lightning.nets.act import ACTConfig
from act_lightning.nets.backbone import BackboneConfig
from act_lightning.nets.bc import BCConfig
from act_lightning.nets.inference import InferenceNet, fold
from act_lightning.nets.normalize import Stats
from act_lightning.policy import Policy

B = 3
LIMITS = {"float32": 1e-5, "bfloat16": 3e-2}
"""Largest error, in standard deviations of the actions; what the docstrings promise."""
FROZEN = BackboneConfig(stages=2)
GROUP = BackboneConfig(weights="none", norm="group", width=16, stages=2)
ACT = ACTConfig(
    chunk_size=6,
    dim_model=32,
    num_heads=4,
    dim_feedforward=48,
    num_cvae_layers=1,
    num_obs_layers=2,
    num_decoder_layers=2,
    dim_latent=8,
    backbone=FROZEN,
)
BC = BCConfig(chunk_size=4, dim_hidden=32, num_layers=2, dropout=0.1, backbone=FROZEN)
NETS = {
    "act": ACT,
    "own backbones": replace(ACT, backbone=replace(FROZEN, shared=False)),
    "group norm": replace(ACT, backbone=GROUP),
    "pre-norm": replace(ACT, pre_norm=True, activation="gelu", qpos_encoder="mlp"),
    "no layers": replace(ACT, num_obs_layers=0, num_decoder_layers=1),
    "no latent": replace(ACT, use_cvae=False),
    "sampled latent": replace(ACT, latent_at_inference="sample"),
    "mlp cvae": replace(ACT, cvae_encoder="mlp"),
    "bc": BC,
    "bc, group norm": replace(BC, backbone=replace(GROUP, shared=False)),
}
compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
)


def make_spec(cameras, env_state=False):
    return DataSpec(
        task="t",
        fps=50,
        dim_qpos=5,
        dim_action=3,
        dim_env_state=7 if env_state else 0,
        cameras=tuple(f"cam{i}" for i in range(cameras)),
        image_size=(40, 56) if cameras else (0, 0),
    )


def make_net(config, spec):
    """Random weights, statistics that matter, and frozen norms that have seen something."""
    torch.manual_seed(0)
    stats = Stats.from_arrays(
        qpos=1 + 2 * torch.randn(50, spec.dim_qpos),
        actions=-3 + 0.2 * torch.randn(50, spec.dim_action),
        env_state=torch.randn(50, spec.dim_env_state) if spec.dim_env_state else None,
    )
    net = config.build(spec, stats, pretrained=False)
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            randomize(module)
    return net.eval()


def randomize(norm):
    for name, low, high in (("weight", 0.5, 1), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3)):
        getattr(norm, name).uniform_(low, high)
    norm.running_var.uniform_(1, 2)


def make_observation(spec, rows=B):
    torch.manual_seed(1)
    shape = (rows, len(spec.cameras), 3, *spec.image_size)
    return Observation(
        qpos=1 + 2 * torch.randn(rows, spec.dim_qpos),
        images=torch.randint(0, 256, shape, dtype=torch.uint8) if spec.cameras else None,
        env_state=torch.randn(rows, spec.dim_env_state) if spec.dim_env_state else None,
    )


def error(net, chunk, expected):
    """The largest, in standard deviations."""
    assert chunk.dtype == torch.float32
    assert chunk.shape == expected.shape
    return float(((chunk - expected) / net.normalizer.action_std).abs().max())


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize(
    ("cameras", "env_state"), [(0, True), (1, False), (2, True)], ids=["blind", "one", "two"]
)
@pytest.mark.parametrize("name", NETS)
def test_predicts_what_the_network_does(name, cameras, env_state, precision):
    spec = make_spec(cameras, env_state)
    net = make_net(NETS[name], spec)
    observation, seeds = make_observation(spec), torch.arange(B) + 5
    expected = net.predict_chunk(observation, seeds)
    found = InferenceNet(net, precision).predict_chunk(observation, seeds)
    assert error(net, found, expected) < LIMITS[precision]
    if precision == "bfloat16":  # or it was not used
        assert error(net, found, expected) > 1e-5


def test_predictions_would_differ_if_a_norm_were_lost():
    spec = make_spec(1)
    net = make_net(ACT, spec)
    observation = make_observation(spec)
    expected = net.predict_chunk(observation)
    net.backbone.resnets[0].layer2[1].bn2 = nn.Identity()
    assert error(net, net.predict_chunk(observation), expected) > LIMITS["bfloat16"]


def test_seeds_decide_what_is_sampled():
    spec = make_spec(1)
    fast = InferenceNet(make_net(NETS["sampled latent"], spec), "bfloat16")
    observation = make_observation(spec)
    first, again, other = (
        fast.predict_chunk(observation, torch.arange(B) + start) for start in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(fast.predict_chunk(observation), fast.predict_chunk(observation))


@pytest.mark.parametrize("precision", LIMITS)
def test_the_network_stays_as_it_is(precision):
    spec = make_spec(2, env_state=True)
    net = make_net(ACT, spec)
    before = copy.deepcopy(net)
    observation = make_observation(spec)
    expected = net.predict_chunk(observation)
    InferenceNet(net, precision).predict_chunk(observation)
    for name, value in before.state_dict().items():
        found = net.state_dict()[name]
        assert torch.equal(found, value), name
        assert found.dtype == value.dtype, name
    assert [type(module) for module in net.modules()] == [type(m) for m in before.modules()]
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(net.predict_chunk(observation), expected)


@pytest.mark.parametrize("precision", LIMITS)
def test_a_trained_network_in_training_mode_predicts_without_dropout(precision):
    spec = make_spec(1)
    net = make_net(replace(ACT, dropout=0.5), spec)
    observation = make_observation(spec)
    expected = net.predict_chunk(observation)
    fast = InferenceNet(net.train(), precision)
    assert net.training
    assert error(net, fast.predict_chunk(observation), expected) < LIMITS[precision]


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("config", [ACT, BC], ids=["act", "bc"])
def test_rows_of_a_batch_are_independent(config, precision):
    spec = make_spec(2, env_state=True)
    fast = InferenceNet(make_net(config, spec), precision)
    observation = make_observation(spec)
    expected = fast.predict_chunk(observation)
    observation.qpos[1] += 1
    observation.images[1] = 255 - observation.images[1]
    observation.env_state[1] -= 1
    found = fast.predict_chunk(observation)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not torch.equal(found[1], expected[1])
    one = Observation(
        qpos=observation.qpos[1:2],
        images=observation.images[1:2],
        env_state=observation.env_state[1:2],
    )
    assert error(fast.net, fast.predict_chunk(one), found[1:2]) < LIMITS[precision]


def test_weights_are_kept_in_the_type_they_are_multiplied_in():
    fast = InferenceNet(make_net(ACT, make_spec(1, env_state=True)), "bfloat16")
    types = {name: parameter.dtype for name, parameter in fast.net.named_parameters()}
    for name in ("backbone.resnets.0.conv1", "obs_encoder.image_proj"):
        assert types[f"{name}.weight"] == torch.bfloat16
    for name in (
        "obs_encoder.qpos_proj",
        "obs_encoder.env_state_proj",
        "chunk_decoder.action_head",
    ):
        assert types[f"{name}.weight"] == torch.float32
    assert not any(name.startswith("cvae_encoder") for name in types)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in fast.net.modules())


def test_a_folded_convolution_is_convolution_and_norm():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1, bias=False)
    norm = FrozenBatchNorm2d(8)
    randomize(norm)
    x = torch.randn(2, 3, 9, 11)
    torch.testing.assert_close(fold(conv, norm)(x), norm(conv(x)), atol=1e-5, rtol=0)


def test_observations_of_other_robots_are_refused():
    fast = InferenceNet(make_net(ACT, make_spec(1)))
    with pytest.raises(ValueError, match="observation.images"):
        fast.predict_chunk(make_observation(make_spec(2)))
    with pytest.raises(ValueError, match="observation.env_state"):
        fast.predict_chunk(make_observation(make_spec(1, env_state=True)))


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="choose float32 or bfloat16"):
        InferenceNet(make_net(ACT, make_spec(0, env_state=True)), "float16")


@pytest.mark.parametrize("precision", LIMITS)
def test_an_optimized_policy_acts_like_the_policy(precision):
    spec = make_spec(1)
    policy = Policy(make_net(ACT, spec), step=7)
    fast = policy.optimized(precision)
    assert (fast.step, fast.spec, fast.chunk_size) == (7, spec, 6)
    assert fast.net is policy.net
    observation = make_observation(spec, rows=1)
    for either in (policy, fast):
        either.start(ExecutionConfig(n_action_steps=2))
    for _ in range(5):
        difference = (policy.act(observation) - fast.act(observation)).abs()
        assert (difference / policy.net.normalizer.action_std).max() < LIMITS[precision]
    used = InferenceNet(policy.net, precision).predict_chunk(observation)
    assert torch.equal(fast.predict_chunk(observation), used)


def test_optimizing_does_not_touch_an_episode_that_has_begun():
    policy = Policy(make_net(ACT, make_spec(0, env_state=True)))
    policy.start()
    with pytest.raises(RuntimeError, match="start"):
        policy.optimized().act(make_observation(policy.spec, rows=1))
    policy.act(make_observation(policy.spec, rows=1))


@pytest.mark.slow
@compiles
@pytest.mark.timeout(900)
def test_compiled_predicts_the_same_and_compiles_once():
    spec = make_spec(1, env_state=True)
    net = make_net(ACT, spec)
    fast = InferenceNet(net, "bfloat16", compiled=True)
    observation = make_observation(spec, rows=1)
    expected = net.predict_chunk(observation)
    channels_last = observation.images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    with torch.inference_mode():
        pictures = [observation.images, channels_last, observation.images.clone()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images in pictures:
            found = fast.predict_chunk(replace(observation, images=images))
            assert error(net, found, expected) < LIMITS["bfloat16"]
    torch.compiler.reset()


@pytest.mark.slow
@compiles
@pytest.mark.timeout(900)
def test_compiled_samples_what_the_seeds_say():
    spec = make_spec(0, env_state=True)
    net = make_net(replace(ACT, latent_at_inference="sample", num_obs_layers=0), spec)
    fast = InferenceNet(net, compiled=True)
    observation = make_observation(spec)
    for start in (0, 1):
        seeds = torch.arange(B) + start
        found = fast.predict_chunk(observation, seeds)
        assert error(net, found, net.predict_chunk(observation, seeds)) < LIMITS["float32"]
    torch.compiler.reset()


WITHOUT_COMPILER = """
from test_inference import ACT, make_net, make_spec
from act_lightning.policy import Policy
Policy(make_net(ACT, make_spec(0, env_state=True))).optimized(compile=True)
"""


@pytest.mark.slow
def test_without_a_compiler_compile_says_what_is_missing(tmp_path):
    env = os.environ | {
        "CXX": str(tmp_path / "none"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.path.dirname(__file__),
    }
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert "RuntimeError: torch.compile failed" in ran.stderr.splitlines()[-1]
    assert "apt install g++" in ran.stderr.splitlines()[-1]
