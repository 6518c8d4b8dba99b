import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.nets.act import ACT, ACTConfig
from act_lightning.nets.backbone import BackboneConfig
from act_lightning.nets.chunk_net import standard_normal
from act_lightning.nets.losses import KLSchedule, kl_divergence, masked_l1
from act_lightning.nets.normalize import Stats

B, K, D, A, E = 4, 6, 5, 3, 7
TINY = ACTConfig(
    chunk_size=K,
    dim_model=32,
    num_heads=4,
    dim_feedforward=48,
    dropout=0.0,
    num_cvae_layers=2,
    num_obs_layers=2,
    num_decoder_layers=2,
    dim_latent=8,
    backbone=BackboneConfig(weights="none", norm="group", width=16, stages=3),
)


def spec(cameras: int = 0, env_state: bool = True) -> DataSpec:
    return DataSpec(
        task="t",
        fps=50,
        dim_qpos=D,
        dim_action=A,
        dim_env_state=E if env_state else 0,
        cameras=tuple(f"cam{i}" for i in range(cameras)),
        image_size=(40, 56) if cameras else (0, 0),
    )


def stats(data: DataSpec) -> Stats:
    rng = np.random.default_rng(0)
    return Stats.from_arrays(
        qpos=rng.normal(1.0, 2.0, (50, D)),
        actions=rng.normal(-3.0, 0.2, (50, A)),
        env_state=rng.normal(0.5, 0.1, (50, E)) if data.dim_env_state else None,
    )


def observe(data: DataSpec) -> Observation:
    shape = (B, len(data.cameras), 3, *data.image_size)
    return Observation(
        qpos=torch.randn(B, D),
        images=torch.randint(0, 256, shape, dtype=torch.uint8) if data.cameras else None,
        env_state=torch.randn(B, E) if data.dim_env_state else None,
    )


def chunk() -> tuple[torch.Tensor, torch.Tensor]:
    return 0.2 * torch.randn(B, K, A) - 3.0, torch.arange(K) >= torch.tensor([6, 4, 1, 3])[:, None]


def loss_of(act: ACT, observation: Observation, actions, is_pad) -> torch.Tensor:
    out = act(observation, actions, is_pad)
    loss = masked_l1(out.chunk, act.normalizer.normalize_actions(actions), is_pad)
    return loss if out.mu is None else loss + 0.1 * kl_divergence(out.mu, out.logvar)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("use_cvae", [True, False])
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize(
    ("cameras", "env_state", "shared"),
    [(0, True, True), (0, False, True), (1, False, True), (2, True, True), (2, False, False)],
)
def test_every_parameter_gets_a_gradient(use_cvae, pre_norm, cameras, env_state, shared):
    data = spec(cameras, env_state)
    config = replace(
        TINY,
        use_cvae=use_cvae,
        pre_norm=pre_norm,
        backbone=replace(TINY.backbone, shared=shared),
    )
    act = ACT(config, data, stats(data))
    for parameter in act.parameters():  # biases of 0 would hide what depends on them
        parameter.data += 0.05 * torch.randn_like(parameter)
    loss_of(act, observe(data), *chunk()).backward()
    # Exactly 0, but not None: the decoder's first self-attention sees only zeros (pre-norm: only
    # the norm's bias), so attending cannot matter; and without CVAE the latent is 0.
    first = "chunk_decoder.decoder.layers.0.self_"
    constant = {first + "attention.in_proj.weight", first + "residual.norm.weight"}
    if not use_cvae:
        constant.add("obs_encoder.latent_proj.weight")
        assert not any("cvae" in name for name, _ in act.named_parameters())
    for name, parameter in act.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name in constant or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "options",
    [
        {"cvae_encoder": "mlp"},
        {"qpos_encoder": "mlp"},
        {"num_obs_layers": 0},
        {"num_obs_layers": 0, "pre_norm": True, "cvae_encoder": "mlp", "num_decoder_layers": 4},
    ],
)
@pytest.mark.parametrize("cameras", [0, 2])
def test_every_parameter_of_the_options_gets_a_gradient(options, cameras):
    data = spec(cameras)
    act = ACT(replace(TINY, **options), data, stats(data))
    for parameter in act.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    loss_of(act, observe(data), *chunk()).backward()
    first = "chunk_decoder.decoder.layers.0.self_"
    constant = {first + "attention.in_proj.weight", first + "residual.norm.weight"}
    for name, parameter in act.named_parameters():
        assert parameter.grad is not None, name
        assert name in constant or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("cvae_encoder", ["transformer", "mlp"])
@pytest.mark.parametrize("cameras", [0, 2])
@pytest.mark.parametrize("garbage", [1e6, math.nan])
def test_garbage_in_padded_actions_changes_nothing(cameras, garbage, cvae_encoder):
    data = spec(cameras)
    act = ACT(replace(TINY, cvae_encoder=cvae_encoder), data, stats(data))
    observation = observe(data)
    actions, is_pad = chunk()
    results = []
    for values in (actions, actions.masked_fill(is_pad[..., None], garbage)):
        act.zero_grad()
        torch.manual_seed(1)  # the same latent noise
        loss = loss_of(act, observation, values, is_pad)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in act.parameters())])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_padded_steps_do_not_reach_the_posterior():
    """A padded chunk has the posterior of the same chunk cut short."""
    data = spec()
    act = ACT(TINY, data, stats(data)).eval()
    observation = observe(data)
    actions, _ = chunk()
    is_pad = (torch.arange(K) >= 4).expand(B, K)
    short = ACT(replace(TINY, chunk_size=4), data).eval()
    state = act.state_dict()
    state["chunk_decoder.queries"] = state["chunk_decoder.queries"][:4]
    short.load_state_dict(state)
    padded = act(observation, actions, is_pad)
    cut = short(observation, actions[:, :4], is_pad[:, :4])
    torch.testing.assert_close(padded.mu, cut.mu, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.logvar, cut.logvar, atol=1e-5, rtol=1e-5)


def test_all_padding_gives_no_reconstruction_loss():
    data = spec(1)
    act = ACT(TINY, data, stats(data))
    actions, _ = chunk()
    is_pad = torch.ones(B, K, dtype=torch.bool)
    out = act(observe(data), actions, is_pad)
    loss = masked_l1(out.chunk, act.normalizer.normalize_actions(actions), is_pad)
    (loss + kl_divergence(out.mu, out.logvar)).backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in act.parameters())


def test_latent_is_sampled_in_training_and_the_mean_in_evaluation():
    data = spec()
    act = ACT(TINY, data, stats(data))
    observation, (actions, is_pad) = observe(data), chunk()
    torch.manual_seed(5)
    sampled = act(observation, actions, is_pad)
    torch.manual_seed(5)
    noise = torch.randn(B, TINY.dim_latent)
    latent = sampled.mu + (0.5 * sampled.logvar).exp() * noise
    torch.testing.assert_close(sampled.chunk, act.decode(observation, latent))
    act.eval()
    posterior = act(observation, actions, is_pad)
    torch.testing.assert_close(posterior.chunk, act.decode(observation, posterior.mu))
    prior = act(observation)
    assert prior.mu is prior.logvar is None
    assert torch.equal(prior.chunk, act.decode(observation, torch.zeros(B, TINY.dim_latent)))
    assert not torch.allclose(prior.chunk, posterior.chunk, atol=1e-4)


def test_predict_chunk_is_in_physical_units():
    data = spec(2)
    act = ACT(TINY, data, stats(data)).eval()
    observation = observe(data)
    found = act.predict_chunk(observation)
    s = stats(data)
    torch.testing.assert_close(found, act(observation).chunk * s.action_std + s.action_mean)
    assert found.shape == (B, K, A)
    assert not found.requires_grad


def test_predict_chunk_refuses_training_mode():
    data = spec()
    with pytest.raises(RuntimeError, match="eval"):
        ACT(TINY, data).predict_chunk(observe(data))


def test_without_cvae_there_is_no_posterior():
    data = spec()
    with pytest.raises(ValueError, match="use_cvae"):
        ACT(replace(TINY, use_cvae=False), data).posterior(observe(data), *chunk())


def test_sampled_latents_depend_on_the_seed_alone():
    data = spec()
    act = ACT(replace(TINY, latent_at_inference="sample"), data, stats(data)).eval()
    observation = observe(data)
    alike = replace(
        observation, qpos=observation.qpos[:1].expand(B, -1), env_state=torch.zeros(B, E)
    )
    drawn = act.predict_chunk(alike, torch.tensor([5, 6, 5, 7]))
    torch.testing.assert_close(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-4)
    alone = Observation(qpos=alike.qpos[:1], env_state=alike.env_state[:1])
    torch.testing.assert_close(act.predict_chunk(alone, torch.tensor([7]))[0], drawn[3])
    # Without seeds torch's own generator decides.
    torch.manual_seed(3)
    first = act.predict_chunk(alike)
    assert not torch.allclose(first, act.predict_chunk(alike), atol=1e-4)
    torch.manual_seed(3)
    assert torch.equal(first, act.predict_chunk(alike))


def test_evaluation_compares_three_latents():
    data = spec(1)
    act = ACT(TINY, data, stats(data)).eval()
    observation, (actions, is_pad) = observe(data), chunk()
    seeds = torch.arange(B)
    errors, metrics, chunk_prior, posterior = act.evaluate(
        Batch(observation=observation, actions=actions, is_pad=is_pad), seeds
    )
    target = act.normalizer.normalize_actions(actions)
    latents = {
        "l1_prior": torch.zeros(B, TINY.dim_latent),
        "l1_posterior": posterior.mu,
        "l1_sampled": standard_normal(B, TINY.dim_latent, seeds, torch.device("cpu")),
    }
    for name, latent in latents.items():
        expected = masked_l1(act.decode(observation, latent), target, is_pad)
        torch.testing.assert_close(errors[name], expected)
    torch.testing.assert_close(metrics["kl"], kl_divergence(*posterior))
    torch.testing.assert_close(chunk_prior, act.decode(observation, latents["l1_prior"]))
    plain = ACT(replace(TINY, use_cvae=False), data, stats(data)).eval()
    batch = Batch(observation=observation, actions=actions, is_pad=is_pad)
    errors, metrics, chunk_prior, posterior = plain.evaluate(batch, seeds)
    assert (list(errors), metrics) == (["l1_prior"], {})
    torch.testing.assert_close(chunk_prior, plain.decode(observation))
    assert posterior is None


def test_loss_is_what_the_options_say():
    data = spec()
    observation, (actions, is_pad) = observe(data), chunk()
    batch = Batch(observation=observation, actions=actions, is_pad=is_pad)
    reference = ACT(TINY, data, stats(data))
    with torch.no_grad():  # far from the prior, so that no free bits hide it
        reference.cvae_encoder.latent_head.bias.fill_(1.5)

    def losses(**options):
        act = ACT(replace(TINY, **options), data, stats(data))
        act.load_state_dict(reference.state_dict())
        torch.manual_seed(2)
        return act.losses(batch, step=5)

    constant = KLSchedule(kind="constant", weight=2.0)
    plain = losses(kl_schedule=constant)
    torch.testing.assert_close(plain["loss"], plain["l1"] + 2 * plain["kl"])
    rising = losses(kl_schedule=KLSchedule(kind="linear", weight=8.0, warmup_steps=20))
    assert rising["kl_weight"] == 2.0
    torch.testing.assert_close(rising["loss"], plain["loss"])
    mean = losses(kl_schedule=constant, kl_reduction="mean")
    torch.testing.assert_close(mean["loss"], plain["l1"] + 2 * plain["kl"] / TINY.dim_latent)
    free = losses(kl_schedule=constant, free_bits=100.0)
    torch.testing.assert_close(free["loss"], plain["l1"] + 2 * 100.0 * TINY.dim_latent)
    torch.testing.assert_close(free["kl"], plain["kl"])
    diluted = losses(kl_schedule=constant, l1_reduction="all")
    valid = (~is_pad).float().mean()
    torch.testing.assert_close(diluted["l1"], plain["l1"] * valid)
    squared = losses(kl_schedule=constant, reconstruction="mse")
    torch.testing.assert_close(squared["loss"], squared["mse"] + 2 * squared["kl"])
    assert "l1" not in squared


def swapped(observation: Observation) -> Observation:
    return replace(observation, images=observation.images.flip(1))


def test_cameras_have_an_identity():
    """Swapping two cameras' pictures changes the actions; without the embedding it does not."""
    data = spec(2)
    observation = observe(data)
    named = ACT(TINY, data, stats(data)).eval()
    assert not torch.allclose(
        named.predict_chunk(observation), named.predict_chunk(swapped(observation)), atol=1e-4
    )
    nameless = ACT(replace(TINY, camera_embedding=False), data, stats(data)).eval()
    torch.testing.assert_close(
        nameless.predict_chunk(observation), nameless.predict_chunk(swapped(observation))
    )


def test_a_lone_camera_needs_no_embedding():
    assert ACT(TINY, spec(1)).obs_encoder.camera_embedding is None


@pytest.mark.parametrize("pre_norm", [False, True])
def test_without_observation_encoder_the_memory_is_the_tokens(pre_norm):
    data = spec(1)
    act = ACT(replace(TINY, num_obs_layers=0, pre_norm=pre_norm), data, stats(data)).eval()
    latent = torch.randn(B, TINY.dim_latent)
    tokens = act.observe(observe(data))
    memory, positions = act.obs_encoder(latent, tokens)
    expected = torch.cat([act.obs_encoder.latent_proj(latent)[:, None], tokens], dim=1)
    if pre_norm:
        expected = torch.nn.functional.layer_norm(expected, (TINY.dim_model,))
    torch.testing.assert_close(memory, expected)
    assert positions.shape == memory.shape[1:]


def test_state_dict_is_self_contained():
    data = spec(2)
    act = ACT(TINY, data, stats(data)).eval()
    restored = ACT(TINY, data, pretrained=False).eval()
    restored.load_state_dict(act.state_dict())
    observation = observe(data)
    assert torch.equal(act.predict_chunk(observation), restored.predict_chunk(observation))


def test_samples_are_independent():
    data = spec(2)
    act = ACT(TINY, data, stats(data)).eval()
    observation = observe(data)
    one = Observation(
        qpos=observation.qpos[2:3],
        images=observation.images[2:3],
        env_state=observation.env_state[2:3],
    )
    torch.testing.assert_close(
        act.predict_chunk(observation)[2:3], act.predict_chunk(one), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["qpos", "env_state", "images"])
def test_every_input_matters(name):
    data = spec(2)
    act = ACT(TINY, data, stats(data)).eval()
    observation = observe(data)
    changed = replace(observation, **{name: getattr(observe(data), name)})
    assert not torch.allclose(act.predict_chunk(observation), act.predict_chunk(changed), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("cameras", [0, 2])
def test_bf16_autocast_stays_close_to_float32(dropout, cameras):
    data = spec(cameras)
    act = ACT(replace(TINY, dropout=dropout), data, stats(data))
    observation, (actions, is_pad) = observe(data), chunk()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(act, observation, actions, is_pad)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in act.parameters())
    act.eval()
    exact = act(observation).chunk
    with torch.autocast("cpu", torch.bfloat16):
        rough = act(observation).chunk
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.05)


def test_overfits_one_batch():
    data = spec()
    act = ACT(TINY, data, stats(data))
    observation, (actions, is_pad) = observe(data), chunk()
    optimizer = torch.optim.AdamW(act.parameters(), lr=2e-3)
    first = None
    for _ in range(150):
        loss = loss_of(act, observation, actions, is_pad)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_what_does_not_fit_is_refused():
    data = spec(2)
    act = ACT(TINY, data, stats(data))
    observation, (actions, is_pad) = observe(data), chunk()
    with pytest.raises(ValueError, match=r"observation.images is \(1, 3, 40, 56\)"):
        act(replace(observation, images=observation.images[:, :1]), actions, is_pad)
    with pytest.raises(ValueError, match="observation.env_state is None"):
        act(replace(observation, env_state=None), actions, is_pad)
    with pytest.raises(ValueError, match="observation.images"):
        ACT(TINY, spec(0))(observation, actions, is_pad)
    with pytest.raises(ValueError, match="needs both"):
        act(observation)
    with pytest.raises(ValueError, match=r"actions \(4, 5, 3\)"):
        act(observation, actions[:, :5], is_pad[:, :5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"num_decoder_layers": -1}, "num_decoder_layers=-1"),
        ({"dim_model": 100}, "num_heads=8"),
        ({"dim_model": 6, "num_heads": 3}, "multiple of 4"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"num_obs_layers": -1}, "num_obs_layers=-1 must be at least 0"),
        ({"cvae_encoder": "rnn"}, "cvae_encoder='rnn'; choose transformer or mlp"),
        ({"reconstruction": "huber"}, "reconstruction='huber'"),
        ({"free_bits": -0.5}, "free_bits=-0.5"),
        ({"latent_at_inference": "sample", "use_cvae": False}, "no latent to sample"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ACTConfig(**settings)


def test_config_parses_from_the_command_line():
    parser = ArgumentParser()
    parser.add_argument("--act", type=ACTConfig, default=ACTConfig())
    args = parser.parse_args(
        ["--act.dim_model=64", "--act.backbone.weights=none", "--act.backbone.norm=group"]
    )
    config = parser.instantiate_classes(args).act
    expected = BackboneConfig(weights="none", norm="group")
    assert config == ACTConfig(dim_model=64, backbone=expected)


def test_paper_sizes():
    """Parameters of the paper's network, counted by hand from facts.md: LeRobot's 51.6M."""
    data = DataSpec(
        task="t", fps=50, dim_qpos=14, dim_action=14, cameras=("top",), image_size=(480, 640)
    )
    with torch.device("meta"):
        act = ACT(ACTConfig(), data, pretrained=False)
    assert sum(p.numel() for p in act.parameters()) == pytest.approx(51.6e6, rel=0.002)
    assert act.obs_encoder.image_positions.shape == (300, 512)
