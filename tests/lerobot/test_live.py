"""Ours against LeRobot's own code, every element; and the goldens against what it computes now.

Runs in the environment that `make lerobot-env` builds; prints a table of the errors measured.
"""

import pytest
import torch

pytest.importorskip("lerobot.policies.act", reason="needs LeRobot: make lerobot-env")

from lerobot.policies.act import modeling_act
from lerobot.policies.act.modeling_act import ACTTemporalEnsembler
from make_goldens import golden, reference_ensemble, reference_results
from parity_cases import (
    CASES,
    DECAYS,
    GOLDENS,
    A,
    B,
    K,
    gradient_error,
    kink_distance,
    our_ensemble,
    our_results,
    result_error,
)
from safetensors.torch import load_file

from act_lightning.execution import TemporalEnsembler

pytestmark = pytest.mark.lerobot
LIMIT = 1e-5
LIMIT_FLOAT64 = 1e-12


@pytest.mark.parametrize("case", CASES, ids=str)
def test_goldens_are_what_lerobot_computes(case):
    stored, fresh = load_file(GOLDENS / f"{case}.safetensors"), golden(case)
    assert set(stored) == set(fresh)
    for name, value in fresh.items():
        error = gradient_error if name.startswith("gradients/") else result_error
        assert error(stored[name], value) < LIMIT, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_lerobot(case, measured):
    errors = measured[str(case)] = measure(case, torch.float32)
    assert largest(errors) < LIMIT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_lerobot_in_float64(case, measured, monkeypatch):
    """What is left in float32 is rounding: in float64 it all but vanishes."""
    in_float64(monkeypatch)
    try:
        errors = measured[f"{case} float64"] = measure(case, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert largest(errors) < LIMIT_FLOAT64


def measure(case, dtype):
    """Errors by quantity, of gradients relative to the tensor's largest, and `absolute`."""
    expected, expected_gradients = reference_results(case, dtype=dtype)
    expected.pop("noise", None)
    results, gradients = our_results(case, dtype)
    assert set(results) == set(expected)
    assert set(gradients) == set(expected_gradients)
    errors = {name: result_error(results[name], value) for name, value in expected.items()}
    by_part = {"backbone": 0.0, "rest": 0.0}
    for name, value in expected_gradients.items():
        part = "backbone" if name.startswith("model.backbone") else "rest"
        by_part[part] = max(by_part[part], gradient_error(gradients[name], value))
    differences = (gradients[name] - value for name, value in expected_gradients.items())
    return errors | {
        **({"g. backbone": by_part["backbone"]} if case.cameras else {}),
        "gradients": by_part["rest"],
        "absolute": max(difference.abs().max().item() for difference in differences),
    }


def largest(errors):
    return max(value for name, value in errors.items() if name != "absolute")


def in_float64(monkeypatch):
    """Makes float64 of what both networks make float32 whatever their weights are."""

    class Torch:
        def __getattr__(self, name):
            return torch.float64 if name == "float32" else getattr(torch, name)

    monkeypatch.setattr(modeling_act, "torch", Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_activation_is_near_a_kink(case):
    """Else rounding would decide on which side it is, on this machine or on another."""
    in_backbone, in_transformers = kink_distance(case)
    assert in_backbone > 5e-6
    assert in_transformers > 1e-4


@pytest.mark.parametrize("decay", DECAYS)
def test_ensembler_golden_is_what_lerobot_computes(decay, measured):
    stored, fresh = load_file(GOLDENS / "ensembles.safetensors"), reference_ensemble(decay)
    assert torch.equal(stored[str(decay)], fresh)
    error = result_error(our_ensemble(decay), fresh)
    measured[f"ensembler {decay}"] = {"actions": error}
    assert error < LIMIT


@pytest.mark.parametrize("seed", range(20))
def test_ensembler_equals_lerobots_for_any_decay(seed):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.randn(1, generator=generator).item()
    theirs, ours, rows = ACTTemporalEnsembler(decay, K), TemporalEnsembler(B, K, A, decay), range(B)
    for _ in range(3 * K):
        chunks = torch.randn(B, K, A, generator=generator)
        ours.push(torch.tensor(rows), chunks)
        assert result_error(ours.pop(torch.tensor(rows)), theirs.update(chunks)) < LIMIT
