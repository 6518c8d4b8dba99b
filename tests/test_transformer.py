import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from act_lightning.nets.transformer import (
    Attention,
    Decoder,
    Encoder,
    LayerConfig,
    drop,
    explicit_attention,
    sine_positions_2d,
    sinusoid_table,
    xavier_uniform,
)

C, L, M, B = 16, 5, 7, 3
TORCH_NAMES = {
    "self_attention.in_proj.": "self_attn.in_proj_",
    "self_attention.out_proj.": "self_attn.out_proj.",
    "cross_attention.in_proj.": "multihead_attn.in_proj_",
    "cross_attention.out_proj.": "multihead_attn.out_proj.",
    "feed_forward.0.": "linear1.",
    "feed_forward.3.": "linear2.",
    "self_residual.norm.": "norm1.",
}


def config(**changes) -> LayerConfig:
    settings = {"dim_feedforward": 24, "dropout": 0.0, "activation": "relu", "pre_norm": False}
    return LayerConfig(dim_model=C, num_heads=4, **{**settings, **changes})


def copy_from_torch(layer: nn.Module, reference: nn.Module) -> None:
    cross = hasattr(layer, "cross_attention")
    names = {
        **TORCH_NAMES,
        "cross_residual.norm.": "norm2.",
        "feed_forward_residual.norm.": "norm3." if cross else "norm2.",
    }
    for parameter in reference.parameters():  # biases and norms start at 0 and 1: make them matter
        nn.init.normal_(parameter, std=0.3)
    source = dict(reference.named_parameters())
    used = set()
    for name, parameter in layer.named_parameters():
        prefix = next(p for p in names if name.startswith(p))
        used.add(name.replace(prefix, names[prefix]))
        parameter.data.copy_(source[name.replace(prefix, names[prefix])])
    assert used == set(source)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_equals_torch(pre_norm, activation, padded):
    ours = Encoder(config(pre_norm=pre_norm, activation=activation), 2)
    layers = [
        nn.TransformerEncoderLayer(C, 4, 24, 0.0, activation, batch_first=True, norm_first=pre_norm)
        for _ in range(2)
    ]
    for layer, reference in zip(ours.layers, layers, strict=True):
        copy_from_torch(layer, reference)
    x = torch.randn(B, L, C, requires_grad=True)
    is_pad = torch.arange(L) >= torch.tensor([5, 3, 1])[:, None] if padded else None
    expected = x
    for reference in layers:
        expected = reference(expected, src_key_padding_mask=is_pad)
    if pre_norm:
        expected = nn.functional.layer_norm(expected, (C,))
    found = ours(x, torch.zeros(L, C), is_pad)
    real = slice(None) if is_pad is None else ~is_pad
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(found[real])
    gradients = [torch.autograd.grad((out[real] * weight).sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_equals_torch(pre_norm):
    ours = Decoder(config(pre_norm=pre_norm), 2)
    layers = [
        nn.TransformerDecoderLayer(C, 4, 24, 0.0, batch_first=True, norm_first=pre_norm)
        for _ in range(2)
    ]
    for layer, reference in zip(ours.layers, layers, strict=True):
        copy_from_torch(layer, reference)
    x, memory = torch.randn(B, L, C), torch.randn(B, M, C)
    expected = x
    for reference in layers:
        expected = reference(expected, memory)
    found = ours(x, memory, torch.zeros(L, C), torch.zeros(M, C))
    torch.testing.assert_close(
        found, nn.functional.layer_norm(expected, (C,)), atol=1e-5, rtol=1e-5
    )


def test_positions_go_to_queries_and_keys_only():
    layer = Encoder(config(), 1).layers[0]
    reference = nn.MultiheadAttention(C, 4, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": layer.self_attention.in_proj.weight,
            "in_proj_bias": layer.self_attention.in_proj.bias,
            "out_proj.weight": layer.self_attention.out_proj.weight,
            "out_proj.bias": layer.self_attention.out_proj.bias,
        }
    )
    x, positions = torch.randn(B, L, C), torch.randn(L, C)
    attended, _ = reference(x + positions, x + positions, x)
    x1 = layer.self_residual.norm(x + attended)
    expected = layer.feed_forward_residual.norm(x1 + layer.feed_forward(x1))
    torch.testing.assert_close(layer(x, positions), expected, atol=1e-5, rtol=1e-5)


def test_decoder_positions_go_to_queries_and_keys_only():
    # One key makes attention's output the value whatever the positions are.
    decoder = Decoder(config(), 1)
    x, memory = torch.randn(B, 1, C), torch.randn(B, 1, C)
    outputs = [decoder(x, memory, s * torch.randn(1, C), s * torch.randn(1, C)) for s in (0.0, 5.0)]
    torch.testing.assert_close(*outputs)
    # With several, the positions of queries and of keys both matter.
    memory = torch.randn(B, M, C)
    zero_q, zero_k = torch.zeros(1, C), torch.zeros(M, C)
    plain = decoder(x, memory, zero_q, zero_k)
    assert not torch.allclose(plain, decoder(x, memory, torch.randn(1, C), zero_k), atol=1e-3)
    assert not torch.allclose(plain, decoder(x, memory, zero_q, torch.randn(M, C)), atol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fully_masked_rows_are_finite(dropout, dtype):
    attention = Attention(config(dropout=dropout))
    x = torch.randn(B, L, C, requires_grad=True)
    is_pad = torch.zeros(B, L, dtype=torch.bool)
    is_pad[1] = True
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = attention(x, x, x, is_pad)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_left_out_weigh_nothing_however_far_scores_reach(dtype):
    # Scores of -200 and 200; -200 alone where all keys are left out: the mask must not overflow.
    q, k = torch.full((2, 1, 1, 8), 5.0, dtype=dtype), torch.full((2, 1, M, 8), 14.0, dtype=dtype)
    k[0, :, ::2] *= -1
    k[1] *= -1
    v = torch.arange(M, dtype=dtype).view(1, 1, M, 1).expand(2, 1, M, 8)
    keep = torch.zeros(2, 1, 1, M, dtype=torch.bool)
    keep[0, ..., 2] = True  # the worst score of those there are
    out = explicit_attention(q, k, v, keep, 0.0)
    assert torch.equal(out[0], v[0, :, 2:3])
    assert out.isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
def test_explicit_attention_equals_torch(padded):
    q, k, v = torch.randn(B, 4, L, 8), torch.randn(B, 4, M, 8), torch.randn(B, 4, M, 8)
    lengths = torch.tensor([7, 3, 1]).view(B, 1, 1, 1)
    keep = torch.arange(M) < lengths if padded else None
    torch.testing.assert_close(
        explicit_attention(q, k, v, keep, 0.0), F.scaled_dot_product_attention(q, k, v, keep)
    )


def test_masked_keys_have_no_influence():
    attention = Attention(config())
    query, key = torch.randn(B, L, C), torch.randn(B, M, C)
    is_pad = torch.arange(M).expand(B, M) >= 4
    torch.testing.assert_close(
        attention(query, key, key, is_pad), attention(query, key[:, :4], key[:, :4])
    )


def test_dropout_is_off_in_evaluation():
    encoder = Encoder(config(dropout=0.5), 2)
    x, positions = torch.randn(B, L, C), torch.randn(L, C)
    assert not torch.equal(encoder(x, positions), encoder(x, positions))
    encoder.eval()
    assert torch.equal(encoder(x, positions), encoder(x, positions))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_drop_is_dropout(probability):
    """Each element at the same rate, wherever it lies; the bound is five standard deviations."""
    x = torch.randn(2000, 101).requires_grad_()
    dropped = drop(x, probability)
    zero = dropped == 0
    bound = 5 * (probability * (1 - probability) / 50_000) ** 0.5
    for first in range(4):  # of 64 random bits that four elements share
        assert zero.flatten()[first::4].float().mean() == pytest.approx(probability, abs=bound)
    torch.testing.assert_close(dropped[~zero], x[~zero] / (1 - probability))
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, (~zero).float() / (1 - probability))


def test_drop_repeats_with_the_seed():
    x = torch.randn(3, 5, 7)
    first, second = (drop(x, 0.5) for _ in range(2))
    torch.manual_seed(0)
    third = drop(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(third, drop(x, 0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_drop_keeps_dtype_and_layout(dtype):
    x = torch.randn(40, 60, 8, dtype=dtype).transpose(0, 1)
    dropped = drop(x, 0.5)
    assert dropped.dtype == dtype
    assert dropped.stride() == x.stride()
    kept = dropped != 0
    assert torch.equal(dropped[kept], 2 * x[kept])
    assert kept.float().mean() == pytest.approx(0.5, abs=5 * 0.5 / kept.numel() ** 0.5)


def test_drop_of_nothing():
    x = torch.randn(0, 4)
    assert drop(x, 0.5).shape == (0, 4)


def test_initialisation_matches_the_original():
    """The original calls xavier_uniform_ on every matrix of torch-shaped layers."""
    big = LayerConfig(
        dim_model=128,
        num_heads=4,
        dim_feedforward=256,
        dropout=0.0,
        activation="relu",
        pre_norm=False,
    )
    layer = Encoder(big, 1).layers[0]
    xavier_uniform(layer)
    bounds = {
        "self_attention.in_proj.weight": math.sqrt(6 / (128 + 3 * 128)),
        "self_attention.out_proj.weight": math.sqrt(6 / 256),
        "feed_forward.0.weight": math.sqrt(6 / 384),
        "feed_forward.3.weight": math.sqrt(6 / 384),
    }
    for name, bound in bounds.items():
        weight = layer.get_parameter(name)
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert (layer.self_attention.in_proj.bias == 0).all()
    assert (layer.self_attention.out_proj.bias == 0).all()


def test_sinusoid_table_by_definition():
    table = sinusoid_table(7, 8)
    for position in range(7):
        for column in range(8):
            angle = position / 10000 ** (2 * (column // 2) / 8)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert float(table[position, column]) == pytest.approx(expected, abs=1e-6)


def test_sine_positions_2d_by_definition():
    height, width, dim = 3, 5, 8
    table = sine_positions_2d(height, width, dim).view(height, width, dim)
    for y in range(height):
        for x in range(width):
            for column in range(dim):
                count, size = (y + 1, height) if column < dim // 2 else (x + 1, width)
                j = column % (dim // 2)
                angle = count / (size + 1e-6) * 2 * math.pi / 10000 ** (2 * (j // 2) / (dim // 2))
                expected = math.cos(angle) if j % 2 else math.sin(angle)
                assert float(table[y, x, column]) == pytest.approx(expected, abs=1e-6)
