"""Writes tests/goldens: what LeRobot's own ACT computes, which `tests/test_parity.py` compares.

Run it in the environment that `make lerobot-env` builds:

    .venv-lerobot/bin/python tests/lerobot/make_goldens.py

`tests/lerobot/test_live.py` fails when the files are not what this would write.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act import ACTConfig, ACTPolicy
from lerobot.policies.act.modeling_act import ACTTemporalEnsembler
from parity_cases import (
    CASES,
    DECAYS,
    GOLDENS,
    KL_WEIGHT,
    A,
    Case,
    D,
    E,
    K,
    L,
    data_spec,
    digest,
    ensemble_chunks,
    make_batch,
    same_noise,
    weight,
)

from act_lightning.nets.normalize import IMAGENET_MEAN, IMAGENET_STD


def build_reference(case: Case) -> ACTPolicy:
    """LeRobot's policy, with the weights of `parity_cases.weight`."""
    spec = data_spec(case)
    features = {"observation.state": PolicyFeature(FeatureType.STATE, (D,))}
    if case.env_state:
        features["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (E,))
    for name in spec.cameras:
        features[f"observation.images.{name}"] = PolicyFeature(
            FeatureType.VISUAL, (3, *spec.image_size)
        )
    policy = ACTPolicy(
        ACTConfig(
            input_features=features,
            output_features={"action": PolicyFeature(FeatureType.ACTION, (A,))},
            device="cpu",
            pretrained_backbone_weights=None,
            chunk_size=K,
            n_action_steps=K,
            dim_model=64,
            n_heads=4,
            dim_feedforward=96,
            feedforward_activation=case.activation,
            n_encoder_layers=2,
            n_vae_encoder_layers=2,
            n_decoder_layers=case.decoder_layers,
            use_vae=case.cvae,
            latent_dim=L,
            pre_norm=case.pre_norm,
            dropout=0.0,
            kl_weight=KL_WEIGHT,
        )
    )
    state = policy.state_dict()
    weights = {
        name: weight(name, tuple(value.shape))
        for name, value in state.items()
        if "pos_enc" not in name
    }
    missing, unexpected = policy.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("pos_enc" in name for name in missing)
    return policy


def reference_batch(case: Case) -> dict[str, torch.Tensor]:
    """The batch of `parity_cases.make_batch`, normalised as LeRobot's processors would."""
    batch = make_batch(case)
    observation = batch.observation
    tensors = {
        "observation.state": observation.qpos,
        "action": batch.actions,
        "action_is_pad": batch.is_pad,
    }
    if observation.env_state is not None:
        tensors["observation.environment_state"] = observation.env_state
    if observation.images is not None:
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        for i, name in enumerate(data_spec(case).cameras):
            tensors[f"observation.images.{name}"] = (observation.images[:, i] / 255 - mean) / std
    return tensors


def reference_results(case: Case, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Everything compared, of LeRobot's network: results and gradients by name."""
    policy = build_reference(case).to(dtype)
    batch = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in reference_batch(case).items()
    }
    outputs = []
    hook = policy.model.register_forward_hook(lambda *args: outputs.append(args[-1]))
    policy.train()
    with same_noise() as noise:
        loss, losses = policy(batch)
    hook.remove()
    loss.backward()
    chunk, (mu, logvar) = outputs[0]
    results = {"chunk_train": chunk, "loss": loss, "l1": torch.tensor(losses["l1_loss"])}
    if case.cvae:
        kl = torch.tensor(losses["kld_loss"])
        results |= {"noise": noise, "mu": mu, "logvar": logvar, "kl": kl}
    policy.eval()
    results["chunk_eval"] = policy.predict_action_chunk(batch)
    gradients = {
        name: parameter.grad
        for name, parameter in policy.named_parameters()
        if parameter.grad is not None
    }
    return {name: value.detach() for name, value in results.items()}, gradients


def reference_ensemble(decay: float) -> torch.Tensor:
    """(steps, B, A) actions of LeRobot's ensembler."""
    ensembler = ACTTemporalEnsembler(decay, K)
    return torch.stack([ensembler.update(chunks) for chunks in ensemble_chunks(decay)])


def golden(case: Case) -> dict[str, torch.Tensor]:
    """The content of a case's golden file."""
    results, gradients = reference_results(case)
    kept = {f"gradients/{name}": digest(name, value).float() for name, value in gradients.items()}
    return {f"results/{name}": value.clone() for name, value in results.items()} | kept


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for case in CASES:
        save_file(golden(case), GOLDENS / f"{case}.safetensors")
    ensembles = {str(decay): reference_ensemble(decay) for decay in DECAYS}
    save_file(ensembles, GOLDENS / "ensembles.safetensors")
    total = sum(path.stat().st_size for path in GOLDENS.iterdir())
    print(f"{len(CASES) + 1} files, {total / 1e6:.2f} MB, in {GOLDENS}")


if __name__ == "__main__":
    main()
