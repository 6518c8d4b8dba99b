"""Ours against what LeRobot 0.6.1's ACT computed, kept in goldens/ (lerobot/make_goldens.py).

`lerobot/test_live.py` does the same with LeRobot itself, and every element of every gradient.
"""

import pytest
import torch
from parity_cases import (
    CASES,
    DECAYS,
    GOLDENS,
    digest,
    gradient_error,
    our_ensemble,
    our_results,
    result_error,
    same_noise,
)
from safetensors.torch import load_file

LIMIT = 1e-5


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from more, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read_golden(case):
    """The results and the gradients' digests of a golden file."""
    tensors = load_file(GOLDENS / f"{case}.safetensors")
    kinds = {"results": {}, "gradients": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        kinds[kind][rest] = value
    return kinds["results"], kinds["gradients"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_lerobot(case):
    expected, expected_gradients = read_golden(case)
    results, gradients = our_results(case)
    if case.cvae:
        with same_noise() as noise:
            # Not bit for bit: torch's normal numbers differ in the last digit between CPUs.
            assert result_error(noise, expected.pop("noise")) < 1e-6, "torch.randn has changed"
    assert set(results) == set(expected)
    assert set(gradients) == set(expected_gradients)
    errors = {name: result_error(results[name], value) for name, value in expected.items()}
    for name, value in expected_gradients.items():
        errors[f"gradient of {name}"] = gradient_error(digest(name, gradients[name]), value)
    assert {name: error for name, error in errors.items() if error > LIMIT} == {}


@pytest.mark.parametrize("decay", DECAYS)
def test_ensembler_equals_lerobots(decay):
    expected = load_file(GOLDENS / "ensembles.safetensors")[str(decay)]
    assert result_error(our_ensemble(decay), expected) < LIMIT


def test_goldens_stay_small():
    assert sum(path.stat().st_size for path in GOLDENS.glob("*.safetensors")) < 2e6
    assert {path.stem for path in GOLDENS.glob("*.safetensors")} == {*map(str, CASES), "ensembles"}


@pytest.mark.parametrize("index", [0, 123_456, 299_999])
def test_digest_sees_a_change_of_any_element(index):
    gradient = torch.randn(300, 1000)
    changed = gradient.clone()
    changed.view(-1)[index] += gradient.abs().max()
    assert gradient_error(digest("x", changed), digest("x", gradient)) > 10 * LIMIT
    assert torch.equal(digest("x", gradient), digest("x", gradient))
    assert not torch.equal(digest("y", gradient), digest("x", gradient))


def test_a_slightly_other_network_is_told_apart(monkeypatch):
    """A weight of 33 thousand, changed by a thousandth, exceeds the limit."""
    from parity_cases import build

    case = CASES[0]
    expected, _ = read_golden(case)
    net = build(case)
    net.chunk_decoder.action_head.weight.data[0, 0] += 1e-3
    monkeypatch.setattr("parity_cases.build", lambda case: net)
    results, _ = our_results(case)
    assert result_error(results["chunk_eval"], expected["chunk_eval"]) > LIMIT
