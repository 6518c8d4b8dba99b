"""What the parity tests compare, for which networks; used with LeRobot (goldens) and without.

Weights and data are a function of (name, shape) alone, through numpy's `RandomState`, whose stream
numpy keeps frozen: so a golden file holds LeRobot's results and no weights.
"""

import math
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.execution import TemporalEnsembler
from act_lightning.lerobot.names import from_lerobot, lerobot_shape, network_names
from act_lightning.nets.act import ACT, ACTConfig
from act_lightning.nets.losses import KLSchedule

GOLDENS = Path(__file__).parent / "goldens"
B, K, D, A, E, L = 3, 10, 14, 6, 7, 8
IMAGE_SIZE = (40, 72)
IMAGE_SEED = 11
KL_WEIGHT = 10.0
NOISE_SEED = 1
DECAYS = (0.01, 0.0, -0.3, 1.5)
NUM_CONTROL_STEPS = 25


@dataclass(frozen=True)
class Case:
    """One network."""

    cameras: int
    cvae: bool
    pre_norm: bool
    decoder_layers: int
    env_state: bool
    activation: str = "relu"
    seed: int = 0

    def __str__(self) -> str:
        return "-".join(
            (
                ("state", "camera", "cameras")[self.cameras],
                "cvae" if self.cvae else "plain",
                "pre" if self.pre_norm else "post",
                f"{self.decoder_layers}dec",
                *(["env"] if self.env_state and self.cameras else []),
                *([self.activation] if self.activation != "relu" else []),
            )
        )


CASES = [
    Case(0, cvae=True, pre_norm=False, decoder_layers=1, env_state=True, seed=16),
    Case(0, cvae=True, pre_norm=True, decoder_layers=2, env_state=True, seed=7),
    Case(0, cvae=False, pre_norm=False, decoder_layers=2, env_state=True, seed=14),
    Case(0, cvae=False, pre_norm=True, decoder_layers=1, env_state=True, seed=3),
    Case(
        0, cvae=True, pre_norm=False, decoder_layers=1, env_state=True, activation="gelu", seed=19
    ),
    Case(1, cvae=True, pre_norm=False, decoder_layers=1, env_state=False, seed=16),
    Case(1, cvae=True, pre_norm=True, decoder_layers=2, env_state=True, seed=13),
    Case(1, cvae=False, pre_norm=False, decoder_layers=2, env_state=False, seed=9),
    Case(1, cvae=False, pre_norm=True, decoder_layers=1, env_state=False, seed=5),
    Case(2, cvae=True, pre_norm=False, decoder_layers=2, env_state=True, seed=7),
    Case(2, cvae=True, pre_norm=True, decoder_layers=1, env_state=False, seed=13),
    Case(2, cvae=False, pre_norm=False, decoder_layers=1, env_state=False, seed=16),
    Case(2, cvae=False, pre_norm=True, decoder_layers=2, env_state=True, seed=13),
]


def data_spec(case: Case) -> DataSpec:
    return DataSpec(
        task="parity",
        fps=50,
        dim_qpos=D,
        dim_action=A,
        dim_env_state=E if case.env_state else 0,
        cameras=tuple(f"cam{i}" for i in range(case.cameras)),
        image_size=IMAGE_SIZE if case.cameras else (0, 0),
    )


def net_config(case: Case, **changes) -> ACTConfig:
    sizes = {
        "chunk_size": K,
        "dim_model": 64,
        "num_heads": 4,
        "dim_feedforward": 96,
        "dropout": 0.0,
        "num_cvae_layers": 2,
        "num_obs_layers": 2,
        "num_decoder_layers": case.decoder_layers,
        "dim_latent": L,
        "use_cvae": case.cvae,
        "pre_norm": case.pre_norm,
        "activation": case.activation,
        "camera_embedding": False,
        "kl_schedule": KLSchedule(weight=KL_WEIGHT),
    }
    return ACTConfig(**sizes | changes)


def build(case: Case) -> ACT:
    """Our network, with the weights of `weight`."""
    net = ACT(net_config(case), data_spec(case), pretrained=False)
    state = net.state_dict()
    names = network_names(net)
    weights = {
        theirs: weight(theirs, lerobot_shape(name, state[name])) for name, theirs in names.items()
    }
    net.load_state_dict(from_lerobot(net, weights), strict=False)
    return net


def random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


@lru_cache
def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of LeRobot's parameter or buffer `name`; activations stay about 1 with it."""
    rng = random(name)
    if name.endswith("running_var"):
        values = rng.uniform(0.5, 2.0, shape)
    elif len(shape) > 1:
        fan_in = np.prod(shape[1:]) if not name.endswith("embed.weight") else 1
        values = rng.standard_normal(shape) * np.sqrt((2.0 if len(shape) == 4 else 1.0) / fan_in)
    else:
        # Biases and means; normalisations scale by about 1, within ResNet by less, because its
        # residual sums grow from block to block.
        scale = (0.6 if "backbone" in name else 1.0) if name.endswith("weight") else 0.0
        values = 0.1 * rng.standard_normal(shape) + scale
    return torch.from_numpy(np.asarray(values, np.float32))


def make_batch(case: Case) -> Batch:
    """Three samples: a whole chunk, one of six actions, one of two."""
    rng = random(f"batch {case.seed}")
    qpos, env_state, actions = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        for shape in ((B, D), (B, E), (B, K, A))
    )
    pixels = random(f"images {IMAGE_SEED}").randint(0, 256, (B, 2, 3, *IMAGE_SIZE))
    images = torch.from_numpy(pixels.astype(np.uint8))
    return Batch(
        observation=Observation(
            qpos=qpos,
            env_state=env_state if case.env_state else None,
            images=images[:, : case.cameras].clone() if case.cameras else None,
        ),
        actions=actions,
        is_pad=torch.arange(K) >= torch.tensor([K, 6, 2])[:, None],
    )


@contextmanager
def same_noise():
    """The latent's noise is the same for both networks; returned, to be kept in the goldens."""
    torch.manual_seed(NOISE_SEED)
    noise = torch.randn(B, L)
    torch.manual_seed(NOISE_SEED)
    yield noise


def our_results(case: Case, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Everything compared, of our network: results, and gradients by LeRobot's name and shape."""
    net = build(case).to(dtype).train()
    batch = cast(make_batch(case), dtype)
    with same_noise():
        chunk, mu, logvar = net(batch.observation, batch.actions, batch.is_pad)
    with same_noise():
        losses = net.losses(batch, step=0)
    losses["loss"].backward()
    results = {"chunk_train": chunk, "l1": losses["l1"], "loss": losses["loss"]}
    if case.cvae:
        results |= {"mu": mu, "logvar": logvar, "kl": losses["kl"]}
    results["chunk_eval"] = net.eval().predict_chunk(batch.observation)
    gradients, names = {}, network_names(net)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[names[name]] = parameter.grad.reshape(lerobot_shape(name, parameter))
    return {name: value.detach() for name, value in results.items()}, gradients


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating-point values as `dtype`."""
    observation = batch.observation
    env_state = observation.env_state
    return Batch(
        observation=Observation(
            qpos=observation.qpos.to(dtype),
            env_state=None if env_state is None else env_state.to(dtype),
            images=observation.images,
        ),
        actions=batch.actions.to(dtype),
        is_pad=batch.is_pad,
    )


def result_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference; relative to the largest value where that exceeds 1."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / max(1.0, theirs.abs().max())).item()


VANISHING = 1e-3
"""Gradients below this are compared absolutely. Those that vanish on paper hold rounding errors (of
about 1e-9): the weights of the first decoder layer's self-attention, which sees zeros only."""


def gradient_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the tensor's largest gradient."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / max(VANISHING, theirs.abs().max())).item()


def kink_distance(case: Case) -> tuple[float, float]:
    """How far from a kink the nearest ReLU input or max-pooling winner is, in standard deviations.

    Gradients jump at a kink. Within a rounding error of it, two correct networks may take different
    sides, so seeds are chosen such that none is: of the images for the backbone, of each case for
    the transformers.

    Returns:
        The least distance in the backbone, and in the transformers.
    """
    net, batch = build(case).train(), make_batch(case)
    nearest = {True: math.inf, False: math.inf}

    def look(x: torch.Tensor, margins: torch.Tensor, *, in_backbone: bool) -> None:
        distance = (margins.min() / x.std()).item()
        nearest[in_backbone] = min(nearest[in_backbone], distance)

    def before_pool(x: torch.Tensor) -> None:
        windows = F.unfold(F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1)), 3, stride=2)
        first, second = windows.topk(2, dim=1).values.unbind(1)
        look(x, (first - second)[first > 0], in_backbone=True)

    for name, module in net.named_modules():
        inside = name.startswith("backbone")
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(
                lambda _, x, inside=inside: look(x[0], x[0].abs(), in_backbone=inside)
            )
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_pre_hook(lambda _, x: before_pool(x[0]))
    with same_noise(), torch.no_grad():
        net(batch.observation, batch.actions, batch.is_pad)
    return nearest[True], nearest[False]


FULL = 64
"""Gradients of up to this many elements are kept whole; longer ones as a digest of this length."""


def digest(name: str, gradient: torch.Tensor) -> torch.Tensor:
    """What a golden file keeps of a gradient, each entry of the size of an element.

    Of a long one the root mean square, four projections on random signs (which every element
    enters) and seeded elements.
    """
    flat = gradient.detach().flatten().double().numpy()
    if len(flat) <= FULL:
        return torch.from_numpy(flat)
    rng = random(f"digest of {name}")
    kept = [np.sqrt(np.mean(flat**2))]
    for _ in range(4):
        bits = np.frombuffer(rng.bytes((len(flat) + 7) // 8), np.uint8)
        signs = np.unpackbits(bits)[: len(flat)] * 2.0 - 1.0
        kept.append(flat @ signs / np.sqrt(len(flat)))
    elements = flat[rng.randint(0, len(flat), FULL - len(kept))]
    return torch.from_numpy(np.concatenate([kept, elements]))


def ensemble_chunks(decay: float) -> torch.Tensor:
    """(steps, B, K, A) random predictions, one a control step."""
    shape = (NUM_CONTROL_STEPS, B, K, A)
    return torch.from_numpy(random(f"chunks {decay}").standard_normal(shape).astype(np.float32))


def our_ensemble(decay: float) -> torch.Tensor:
    """(steps, B, A) actions of our ensembler."""
    ensembler, rows = TemporalEnsembler(B, K, A, decay), torch.arange(B)
    actions = []
    for chunks in ensemble_chunks(decay):
        ensembler.push(rows, chunks)
        actions.append(ensembler.pop(rows))
    return torch.stack(actions)
