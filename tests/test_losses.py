import math
import runpy
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl
from torch.nn import functional

from act_lightning.nets.losses import (
    KLSchedule,
    kl_divergence,
    kl_per_dim,
    masked_l1,
    masked_mse,
)

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


@pytest.mark.parametrize(
    ("loss", "original"), [(masked_l1, functional.l1_loss), (masked_mse, functional.mse_loss)]
)
def test_reduction_all_is_the_originals(case, loss, original):
    """The expression of tonyzhaozh/act, policy.py."""
    pred, target, is_pad = case
    expected = (original(target, pred, reduction="none") * ~is_pad.unsqueeze(-1)).mean()
    diluted = loss(pred, target, is_pad, reduction="all")
    torch.testing.assert_close(diluted, expected)
    real = (~is_pad).float().mean()
    torch.testing.assert_close(loss(pred, target, is_pad) * real, diluted)


@pytest.mark.parametrize("loss", [masked_l1, masked_mse])
@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_reductions_agree_without_padding(case, loss, reduction):
    pred, target, _ = case
    error = (pred - target).abs() if loss is masked_l1 else (pred - target) ** 2
    value = loss(pred, target, torch.zeros(B, K, dtype=torch.bool), reduction=reduction)
    torch.testing.assert_close(value, error.mean())


@pytest.mark.parametrize("loss", [masked_l1, masked_mse])
@pytest.mark.parametrize("reduction", ["valid", "all"])
@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan, math.inf])
def test_garbage_in_padding_changes_nothing(case, loss, reduction, garbage):
    pred, target, is_pad = case
    loss(pred, target, is_pad, reduction=reduction).backward()
    clean, pred.grad = pred.grad, None
    dirty = target.masked_fill(is_pad[..., None], garbage)
    value = loss(pred, dirty, is_pad, reduction=reduction)
    value.backward()
    assert torch.equal(value, loss(pred, target, is_pad, reduction=reduction))
    assert torch.equal(pred.grad, clean)
    assert (pred.grad[is_pad] == 0).all()
    assert (pred.grad[~is_pad] != 0).all()


@pytest.mark.parametrize("loss", [masked_l1, masked_mse])
@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_all_padding_is_zero_with_finite_gradient(case, loss, reduction):
    pred, target, _ = case
    value = loss(pred, target, torch.ones(B, K, dtype=torch.bool), reduction=reduction)
    value.backward()
    assert value == 0
    assert (pred.grad == 0).all()


@pytest.mark.parametrize("loss", [masked_l1, masked_mse])
def test_losses_of_bfloat16_are_float32(case, loss):
    """In bfloat16 itself, whose spacing at 256 is 2, the mean of these would lose the small one."""
    pred = torch.tensor([[[256.0], [0.5]]], dtype=torch.bfloat16)
    value = loss(pred, torch.zeros_like(pred), torch.zeros(1, 2, dtype=torch.bool))
    power = 1 if loss is masked_l1 else 2
    assert value.dtype == torch.float32
    assert value.item() == (256**power + 0.5**power) / 2


def test_bad_shapes_and_reductions_are_refused(case):
    pred, target, is_pad = case
    with pytest.raises(ValueError, match="B, K, A"):
        masked_l1(pred, target[:, :1], is_pad)
    with pytest.raises(ValueError, match="is_pad"):
        masked_mse(pred, target, is_pad[:, :1])
    with pytest.raises(ValueError, match="reduction='mean'; choose valid or all"):
        masked_l1(pred, target, is_pad, reduction="mean")
    with pytest.raises(ValueError, match="reduction='valid'; choose sum or mean"):
        kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), reduction="valid")


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mu, logvar = torch.randn(16, 8), torch.randn(16, 8)
    expected = torch_kl(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(kl_per_dim(mu, logvar), expected)
    torch.testing.assert_close(kl_divergence(mu, logvar), expected.sum())
    torch.testing.assert_close(kl_divergence(mu, logvar, reduction="mean"), expected.mean())
    assert kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_kl_of_bfloat16_is_float32():
    """In bfloat16 itself, exp(logvar) - 1 - logvar of a small logvar would be lost to rounding."""
    logvar = torch.full((4, 2), 0.01, dtype=torch.bfloat16)
    mu = torch.zeros_like(logvar)
    expected = 2 * 0.5 * (math.expm1(logvar[0, 0].item()) - logvar[0, 0].item())
    kl = kl_divergence(mu, logvar)
    assert kl.dtype == kl_per_dim(mu, logvar).dtype == torch.float32
    assert kl.item() == pytest.approx(expected, rel=1e-2)


FREE_BITS = 0.125


@pytest.fixture
def posterior():
    """KL per dimension, mean over the batch of 2: 0.0625, 0.125 and 0.5 nats (logvar 0)."""
    kl = torch.tensor([0.0625, 0.125, 0.5])
    # A batch whose members differ in KL: the floor is on their mean, not on each one.
    mu = torch.stack([(4 * kl).sqrt(), torch.zeros(3)])
    return mu.requires_grad_(), torch.zeros(2, 3, requires_grad=True)


def test_free_bits_are_a_floor_for_each_dimension(posterior):
    floored = kl_divergence(*posterior, free_bits=FREE_BITS)
    assert floored.item() == pytest.approx(0.125 + 0.125 + 0.5)
    mean = kl_divergence(*posterior, reduction="mean", free_bits=FREE_BITS)
    assert mean.item() == pytest.approx(0.75 / 3)


def test_free_bits_stop_the_gradient_below_the_floor_alone(posterior):
    mu, logvar = posterior
    kl_divergence(mu, logvar, free_bits=FREE_BITS).backward()
    assert (mu.grad[:, 0] == 0).all()
    assert (logvar.grad[:, 0] == 0).all()
    # Of the mean over two: mu / 2, as without free bits.
    torch.testing.assert_close(mu.grad[:, 2], mu[:, 2].detach() / 2)


def test_no_free_bits_leave_the_gradient_at_the_prior():
    """A dimension whose KL rounds to a negative number is still pulled to the prior."""
    logvar = torch.linspace(-1e-3, 1e-3, 1001)[None].requires_grad_()
    kl = kl_per_dim(torch.zeros_like(logvar), logvar)
    assert (kl < 0).any(), "choose other values: rounding is not what is tested"
    kl_divergence(torch.zeros_like(logvar), logvar).backward()
    torch.testing.assert_close(logvar.grad, 0.5 * torch.expm1(logvar.detach()), atol=1e-7, rtol=0)


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


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_cyclical_is_the_papers(ratio):
    """Equations 6 and 7 of Fu et al., whose t counts from 1: T = 80 steps in M = 4 cycles."""
    num_steps, num_cycles = 80, 4
    schedule = KLSchedule(kind="cyclical", weight=3.0, cycle_steps=20, cycle_ratio=ratio)
    for t in range(1, num_steps + 1):
        tau = ((t - 1) % math.ceil(num_steps / num_cycles)) / (num_steps / num_cycles)
        beta = tau / ratio if tau <= ratio else 1.0
        assert schedule(t - 1) == pytest.approx(3.0 * beta)


def test_cyclical_ends_at_its_weight_after_the_last_cycle():
    settings = {"kind": "cyclical", "weight": 2.0, "cycle_steps": 10, "cycle_ratio": 1.0}
    endless, two = KLSchedule(**settings), KLSchedule(**settings, num_cycles=2)
    assert [two(s) for s in range(20)] == [endless(s) for s in range(20)]
    assert two(10) == endless(20) == 0.0
    assert two(20) == two(25) == two(10**9) == 2.0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_shortest_warm_up(kind):
    schedule = KLSchedule(kind=kind, weight=2.0, warmup_steps=1)
    assert [schedule(s) for s in range(3)] == [0.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "linear", "warmup_steps": 50},
        {"kind": "cosine", "warmup_steps": 50},
        {"kind": "cyclical", "cycle_steps": 25, "cycle_ratio": 0.4},
    ],
)
def test_every_kind_stays_within_its_weight_and_may_be_zero(settings):
    weights = [KLSchedule(weight=5.0, **settings)(step) for step in range(120)]
    assert min(weights) >= 0.0
    assert max(weights) == 5.0
    assert all(KLSchedule(weight=0.0, **settings)(step) == 0.0 for step in range(120))


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
        ({"cycle_ratio": math.nan}, "cycle_ratio=nan"),
        ({"kind": "cyclical", "cycle_steps": 10, "num_cycles": 0}, "num_cycles=0"),
        ({"warmup_steps": 5}, "warmup_steps=5 does nothing with kind=constant.*kind: linear"),
        (
            {"kind": "cyclical", "cycle_steps": 10, "warmup_steps": 5},
            "warmup_steps=5 does nothing with kind=cyclical.*cycle_ratio",
        ),
        ({"cycle_steps": 5}, "cycle_steps=5 does nothing with kind=constant"),
        (
            {"kind": "linear", "warmup_steps": 5, "cycle_ratio": 0.4},
            "cycle_ratio=0.4 does nothing with kind=linear",
        ),
        (
            {"kind": "cosine", "warmup_steps": 5, "num_cycles": 2},
            "num_cycles=2 does nothing with kind=cosine",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KLSchedule(**settings)


def test_the_picture_of_the_schedules_shows_every_kind(tmp_path):
    script = Path(__file__).parent.parent / "experiments" / "draw_kl_schedules.py"
    drawing = runpy.run_path(str(script))
    kinds = {schedule.kind for schedule in drawing["SCHEDULES"]}
    assert kinds == set(get_args(get_type_hints(KLSchedule)["kind"]))
    drawing["main"](tmp_path / "picture.png")
    assert 10_000 < (tmp_path / "picture.png").stat().st_size < 100_000
