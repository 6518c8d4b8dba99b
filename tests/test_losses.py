import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from act_lightning.nets.losses import KLSchedule, kl_divergence, masked_l1, masked_mse

B, K, A = 4, 6, 3


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    lengths = torch.tensor([6, 4, 1, 0])
    return (
        torch.randn(B, K, A, requires_grad=True),
        torch.randn(B, K, A),
        torch.arange(K) >= lengths[:, None],
    )


@pytest.mark.parametrize(("loss", "power"), [(masked_l1, 1), (masked_mse, 2)])
def test_equals_a_loop_over_real_actions(case, loss, power):
    pred, target, is_pad = case
    errors = [
        abs((pred[b, k, a] - target[b, k, a]).item()) ** power
        for b in range(B)
        for k in range(K)
        for a in range(A)
        if not is_pad[b, k]
    ]
    assert loss(pred, target, is_pad).item() == pytest.approx(sum(errors) / len(errors), rel=1e-6)


@pytest.mark.parametrize("loss", [masked_l1, masked_mse])
@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan, math.inf])
def test_garbage_in_padding_changes_nothing(case, loss, garbage):
    pred, target, is_pad = case
    loss(pred, target, is_pad).backward()
    clean, pred.grad = pred.grad, None
    value = loss(pred, target.masked_fill(is_pad[..., None], garbage), is_pad)
    value.backward()
    assert torch.equal(value, loss(pred, target, is_pad))
    assert torch.equal(pred.grad, clean)
    assert (pred.grad[is_pad] == 0).all()


@pytest.mark.parametrize("loss", [masked_l1, masked_mse])
def test_all_padding_is_zero_with_finite_gradient(case, loss):
    pred, target, _ = case
    value = loss(pred, target, torch.ones(B, K, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert (pred.grad == 0).all()


def test_bad_shapes_are_refused(case):
    pred, target, is_pad = case
    with pytest.raises(ValueError, match="B, K, A"):
        masked_l1(pred, target[:, :1], is_pad)
    with pytest.raises(ValueError, match="is_pad"):
        masked_mse(pred, target, is_pad[:, :1])


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mu, logvar = torch.randn(16, 8), torch.randn(16, 8)
    expected = torch_kl(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(mu, logvar), expected)
    assert kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_constant():
    assert [KLSchedule(weight=3.0)(step) for step in (0, 1, 10**9)] == [3.0] * 3


@pytest.mark.parametrize(("kind", "quarter"), [("linear", 0.25), ("cosine", 0.5 - 0.5**0.5 / 2)])
def test_rise_then_constant(kind, quarter):
    schedule = KLSchedule(kind=kind, weight=8.0, warmup_steps=100)
    assert schedule(0) == 0.0
    assert schedule(25) == pytest.approx(8.0 * quarter)
    assert schedule(50) == pytest.approx(4.0)
    assert schedule(99) < 8.0
    assert schedule(100) == schedule(101) == schedule(10**9) == 8.0


def test_cyclical():
    schedule = KLSchedule(kind="cyclical", weight=2.0, cycle_steps=100, cycle_ratio=0.5)
    assert schedule(0) == 0.0
    assert schedule(25) == pytest.approx(1.0)
    assert schedule(50) == schedule(99) == 2.0
    assert schedule(100) == 0.0
    assert [schedule(s) for s in range(100)] == [schedule(s) for s in range(700, 800)]


def test_cyclical_may_rise_all_the_time():
    schedule = KLSchedule(kind="cyclical", weight=1.0, cycle_steps=10, cycle_ratio=1.0)
    assert [schedule(s) for s in (0, 5, 9, 10)] == pytest.approx([0.0, 0.5, 0.9, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "exponential"}, "kind='exponential'"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": math.nan}, "weight=nan"),
        ({"kind": "linear"}, "warmup_steps=0"),
        ({"kind": "cosine"}, "warmup_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"kind": "cyclical"}, "cycle_steps=0"),
        ({"kind": "cyclical", "cycle_steps": 10, "cycle_ratio": 0.0}, "cycle_ratio=0.0"),
        ({"cycle_ratio": 1.5}, "cycle_ratio=1.5"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KLSchedule(**settings)
