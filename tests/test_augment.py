"""Augmentation: pixels against torchvision picture by picture, random numbers by place alone."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torchvision.transforms import functional as reference

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.data.order import FrameSampling, SampleOrder
from act_lightning.data.stream import TrainingStream
from act_lightning.nets import pixels
from act_lightning.nets.augment import (
    QPOS,
    Augmentation,
    AugmentConfig,
    PictureDraws,
    draw_normal,
    draw_pictures,
)

H, W = 20, 26
SPEC = DataSpec(
    task="t", fps=50, dim_qpos=5, dim_action=2, cameras=("top", "left"), image_size=(H, W)
)
STD = torch.tensor([0.01, 0.1, 1.0, 2.0, 5.0])
ALL = AugmentConfig(
    shift=3, crop=0.8, brightness=0.4, contrast=0.4, saturation=0.5, hue=0.1, qpos_noise=0.05
)
SETTINGS = [{name: getattr(ALL, name)} for name in ALL.active]


def make_batch(rows=6, position=40, seed=0):
    """A batch whose images are laid out as the store's reader does."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(0, 256, (rows, 2, H, W, 3), generator=generator, dtype=torch.uint8)
    return Batch(
        observation=Observation(
            qpos=torch.randn(rows, 5, generator=generator), images=memory.permute(0, 1, 4, 2, 3)
        ),
        actions=torch.randn(rows, 3, 2, generator=generator),
        is_pad=torch.zeros(rows, 3, dtype=torch.bool),
        position=position,
    )


def rows_of(batch, start, stop):
    part = slice(start, stop)
    return Batch(
        observation=Observation(
            qpos=batch.observation.qpos[part], images=batch.observation.images[part]
        ),
        actions=batch.actions[part],
        is_pad=batch.is_pad[part],
        position=batch.position + start,
    )


def augmented(config, batch, seed=0):
    return Augmentation(config, SPEC, seed)(batch, STD).observation


def draws_of(config, rows, position=40, seed=0):
    return PictureDraws(*draw_pictures(config, SPEC, seed, position, rows))


def moved(picture, down, right):
    """Pads with the edge by more than any shift, and cuts out."""
    margin = 8
    padded = pad(picture[None].float(), (margin,) * 4, mode="replicate")[0]
    top, left = margin + int(down), margin + int(right)
    return padded[:, top : top + H, left : left + W]


def windowed(picture, draws, row):
    """torchvision's crop and enlargement of the shifted picture."""
    shifted = moved(picture, draws.down[row], draws.right[row])
    top, left, height, width = (int(draw[row]) for draw in draws[2:6])
    return reference.resized_crop(shifted, top, left, height, width, [H, W], antialias=False)


def test_off_is_the_very_batch():
    batch = make_batch()
    assert Augmentation(AugmentConfig(), SPEC, 0)(batch, STD) is batch
    without = replace(batch, position=None)
    assert Augmentation(AugmentConfig(), SPEC, 0)(without, STD) is without


@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_shift_is_a_cut_out_of_the_padded_picture(layout):
    config = AugmentConfig(shift=3)
    batch = make_batch()
    images = batch.observation.images
    if layout == "channels first":
        batch = replace(batch, observation=replace(batch.observation, images=images.contiguous()))
    shown = augmented(config, batch).images.flatten(0, 1)
    draws = draws_of(config, 6)
    for row, picture in enumerate(images.flatten(0, 1)):
        expected = moved(picture, draws.down[row], draws.right[row]).to(torch.uint8)
        assert torch.equal(shown[row], expected)
    assert len(set(zip(draws.down.tolist(), draws.right.tolist(), strict=True))) > 6


@pytest.mark.parametrize("config", [AugmentConfig(crop=0.5), AugmentConfig(crop=0.7, shift=3)])
def test_crop_is_torchvisions_of_the_shifted_picture(config):
    batch = make_batch(rows=20)
    shown = augmented(config, batch).images.flatten(0, 1)
    draws = draws_of(config, 20)
    assert len(set(draws.height.tolist())) > 3
    for row, picture in enumerate(batch.observation.images.flatten(0, 1)):
        expected = windowed(picture, draws, row)
        assert (shown[row] - expected).abs().max() <= 0.501  # rounding


def test_whole_picture_as_window_is_the_picture():
    pictures = make_batch().observation.images[:, 0].float()
    zero = torch.zeros(6)
    rows, columns = (zero, zero, zero + H), (zero, zero, zero + W)
    shown = pixels.resample(pictures, rows, columns)
    assert torch.equal(shown.round(), pictures)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("kind", ["noise", "greys", "primaries", "flat"])
def test_colours_are_torchvisions(name, kind):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(12, 3, H, W, generator=generator)
    if kind == "greys":
        pictures = pictures[:, :1].expand(-1, 3, -1, -1)
    elif kind == "primaries":
        pictures = pictures.round()
    elif kind == "flat":
        pictures = (pictures * 2).round() / 2  # many equal channels
    factors = torch.linspace(-0.5, 0.5, 12) if name == "hue" else torch.linspace(0, 2.5, 12)
    ours = getattr(pixels, f"adjust_{name}")(255 * pictures, factors) / 255
    theirs = getattr(reference, f"adjust_{name}")
    for row in range(12):
        expected = theirs(pictures[row], float(factors[row]))
        torch.testing.assert_close(ours[row], expected, atol=2e-6, rtol=1e-5)


def test_everything_at_once_is_torchvisions_one_after_the_other():
    batch = make_batch(rows=8)
    shown = augmented(ALL, batch).images.flatten(0, 1)
    draws = draws_of(ALL, 8)
    for row, picture in enumerate(batch.observation.images.flatten(0, 1)):
        expected = windowed(picture, draws, row) / 255
        for name in ("brightness", "contrast", "saturation", "hue"):
            factor = float(getattr(draws, name)[row])
            expected = getattr(reference, f"adjust_{name}")(expected, factor)
        assert (shown[row] - 255 * expected).abs().max() <= 0.51


@pytest.mark.parametrize("settings", [*SETTINGS, {}, ALL], ids=str)
def test_what_comes_out_fits_the_contract(settings):
    config = settings if isinstance(settings, AugmentConfig) else AugmentConfig(**settings)
    batch = make_batch()
    before = rows_of(batch, 0, 6)
    result = Augmentation(config, SPEC, 0)(batch, STD)
    images, qpos = result.observation.images, result.observation.qpos
    assert images.shape == (6, 2, 3, H, W)
    assert images.dtype == torch.uint8
    assert images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert qpos.dtype == torch.float32
    assert result.actions is batch.actions
    assert result.is_pad is batch.is_pad
    pictures = bool(set(config.active) - {"qpos_noise"})
    assert torch.equal(images, before.observation.images) != pictures
    assert torch.equal(qpos, before.observation.qpos) != bool(config.qpos_noise)
    # The loader's memory is not written to.
    assert torch.equal(batch.observation.images, before.observation.images)


def test_a_sample_is_augmented_by_its_place_alone():
    batch = make_batch(rows=8)
    whole = augmented(ALL, batch)
    for size in (4, 2, 1):  # two ranks, four, eight
        parts = [augmented(ALL, rows_of(batch, i, i + size)) for i in range(0, 8, size)]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.qpos for part in parts]), whole.qpos)
    other_place = augmented(ALL, replace(batch, position=41))
    assert not torch.equal(other_place.images, whole.images)
    assert not torch.equal(augmented(ALL, batch, seed=1).images, whole.images)


def test_the_stream_is_augmented_alike_whatever_the_ranks():
    frames = make_batch(rows=20)

    def read(positions):
        images, qpos = frames.observation.images[positions], frames.observation.qpos[positions]
        observation = Observation(qpos=qpos, images=images)
        actions, is_pad = frames.actions[positions], frames.is_pad[positions]
        return Batch(observation=observation, actions=actions, is_pad=is_pad)

    def images(batch_size, rank=0, world_size=1, start=0):
        """What a rank is shown, from a position on; the passes are 20 long."""
        stream = TrainingStream(
            reader=read,
            order=SampleOrder(FrameSampling(seed=0, frames=np.arange(20))),
            batch_size=batch_size,
            start=start,
            rank=rank,
            world_size=world_size,
        )
        return [augmented(ALL, stream.batch(step)).images for step in range(3)]

    alone = torch.cat(images(12))
    shares = zip(*(images(4, rank, 3) for rank in range(3)), strict=True)
    assert torch.equal(torch.cat([torch.cat(share) for share in shares]), alone)
    resumed = zip(*(images(6, rank, 2, start=12) for rank in range(2)), strict=True)
    assert torch.equal(torch.cat([torch.cat(share) for share in resumed])[:24], alone[12:])
    # The same frame again, in the next pass, is augmented in another way.
    assert len(torch.unique(alone, dim=0)) == len(alone)


def test_far_places_are_reached_at_once():
    far = 10**15
    assert torch.equal(draw_normal(0, QPOS, far, 4, 5)[2:], draw_normal(0, QPOS, far + 2, 2, 5))
    ours = draw_pictures(ALL, SPEC, 2**32 - 1, far, 4)
    assert torch.equal(ours[:, 4:], draw_pictures(ALL, SPEC, 2**32 - 1, far + 2, 2))


def test_a_setting_leaves_the_others_draws_alone():
    everything = draws_of(ALL, 50)
    for settings in SETTINGS:
        name = next(iter(settings))
        alone = draws_of(AugmentConfig(**settings), 50)
        drawn = {"shift": ("down", "right"), "crop": ("top", "left", "height", "width")}
        for field in drawn.get(name, (name,)):
            if name != "qpos_noise":
                assert torch.equal(getattr(alone, field), getattr(everything, field)), field


def test_draws_are_spread_as_the_settings_say():
    count = 20_000
    draws = draws_of(ALL, count // 2)
    for name in ("down", "right"):
        counts = torch.bincount((getattr(draws, name) + 3).long(), minlength=7)
        assert len(counts) == 7
        chi_square = ((counts - count / 7) ** 2 / (count / 7)).sum()
        assert chi_square < 22.5, name  # 6 degrees of freedom: exceeded once in a thousand
    for name, reach in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.5), ("hue", 0.1)):
        values = getattr(draws, name) - (0.0 if name == "hue" else 1.0)
        assert values.abs().max() <= reach
        assert abs(values.mean()) < 4 * reach / math.sqrt(3 * count)
        assert abs(values.std() - reach / math.sqrt(3)) < 0.02 * reach
    for size, start, length in (("height", "top", H), ("width", "left", W)):
        window, corner = getattr(draws, size), getattr(draws, start)
        assert set(window.tolist()) == set(range(round(0.8 * length), length + 1))
        for pixels_wide in set(window.tolist()):
            places = set(corner[window == pixels_wide].tolist())
            assert places == set(range(length - int(pixels_wide) + 1))
    aspect = (draws.height / H - draws.width / W).abs()
    assert aspect.max() <= 0.5 / H + 0.5 / W + 1e-6
    # No two of what is drawn for a picture, nor cameras, nor neighbours, go together.
    values = torch.stack([draws.down, draws.right, *draws[6:]])
    values = torch.cat([values[:, ::2], values[:, 1::2]])  # the two cameras
    values = torch.cat([values[:, 1:], values[:, :-1]]).numpy()
    together = np.corrcoef(values) - np.eye(len(values))
    assert np.abs(together).max() < 5 / math.sqrt(count / 2)


def test_wide_settings_stop_at_black():
    draws = draws_of(AugmentConfig(brightness=3.0), 500)
    assert draws.brightness.min() >= 0
    assert draws.brightness.max() > 3.9


def test_noise_is_normal_in_standard_deviations_of_each_joint():
    rows = 20_000
    spec = replace(SPEC, cameras=(), image_size=(0, 0))
    zeros = torch.zeros(rows, 5)
    batch = replace(make_batch(rows=1), observation=Observation(qpos=zeros))
    qpos = Augmentation(AugmentConfig(qpos_noise=0.05), spec, 0)(batch, STD).observation.qpos
    noise = qpos / (0.05 * STD)
    assert noise.mean(0).abs().max() < 4 / math.sqrt(rows)
    assert (noise.std(0) - 1).abs().max() < 4 / math.sqrt(2 * rows)
    assert 3 < noise.abs().max() < 6
    inside = (noise.abs() < 1).float().mean()
    assert abs(inside - 0.6827) < 0.01
    together = np.corrcoef(noise.T.numpy()) - np.eye(5)
    assert np.abs(together).max() < 5 / math.sqrt(rows)


def test_mixed_precision_changes_nothing():
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = augmented(ALL, batch)
    full = augmented(ALL, batch)
    assert torch.equal(mixed.images, full.images)
    assert torch.equal(mixed.qpos, full.qpos)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", -1),
        ("crop", 0.0),
        ("crop", 1.1),
        ("brightness", -0.1),
        ("contrast", math.nan),
        ("saturation", math.inf),
        ("hue", 0.6),
        ("hue", -0.1),
        ("qpos_noise", -1.0),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=rf"augment\.{name}={value}; give"):
        AugmentConfig(**{name: value})


def test_every_setting_is_off_by_default():
    assert AugmentConfig().active == ()
    assert set(ALL.active) == {field.name for field in fields(AugmentConfig)}


def test_settings_that_cannot_work_are_refused():
    blind = replace(SPEC, cameras=(), image_size=(0, 0))
    with pytest.raises(ValueError, match=r"augment\.hue=0\.1, but observations have no cameras"):
        Augmentation(AugmentConfig(hue=0.1), blind, 0)
    with pytest.raises(ValueError, match=r"augment\.shift=20 moves pictures of 20x26"):
        Augmentation(AugmentConfig(shift=20), SPEC, 0)
    with pytest.raises(ValueError, match=r"Batch\.position is None"):
        augmented(ALL, replace(make_batch(), position=None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_shows_the_same_without_being_waited_for():
    batch = make_batch()
    expected = augmented(ALL, batch)
    there = batch.to("cuda")
    augmentation, std = Augmentation(ALL, SPEC, 0), STD.cuda()
    augmentation(there, std)  # loads the kernels, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        shown = augmentation(there, std).observation
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(shown.qpos.cpu(), expected.qpos)
    difference = (shown.images.cpu().float() - expected.images.float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.001
    assert shown.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
