from dataclasses import replace

import numpy as np
import pytest
import torch

from act_lightning.batch import DataSpec
from act_lightning.nets.normalize import MIN_STD, Normalizer, Stats

SPEC = DataSpec(
    task="t", fps=50, dim_qpos=3, dim_action=2, dim_env_state=4, cameras=("top",), image_size=(8, 6)
)


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "qpos": rng.normal(5.0, 3.0, (1000, 3)).astype(np.float32),
        "actions": rng.normal(-2.0, 0.5, (1000, 2)).astype(np.float32),
        "env_state": rng.normal(0.0, 0.1, (1000, 4)).astype(np.float32),
    }


@pytest.fixture
def data() -> dict[str, np.ndarray]:
    return arrays(np.random.default_rng(0))


def test_normalised_training_data_has_mean_0_and_std_1(data):
    normalizer = Normalizer(SPEC, Stats.from_arrays(**data))
    for values in (
        normalizer.normalize_qpos(torch.from_numpy(data["qpos"])),
        normalizer.normalize_actions(torch.from_numpy(data["actions"])),
        normalizer.normalize_env_state(torch.from_numpy(data["env_state"])),
    ):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            values.std(0, correction=0), torch.ones(values.shape[1]), atol=1e-5, rtol=0
        )


def test_actions_round_trip(data):
    normalizer = Normalizer(SPEC, Stats.from_arrays(**data))
    actions = torch.from_numpy(data["actions"]).view(10, 100, 2)
    torch.testing.assert_close(
        normalizer.unnormalize_actions(normalizer.normalize_actions(actions)), actions
    )


def test_std_of_a_still_joint_is_clipped(data):
    data["qpos"][:, 1] = 0.7
    stats = Stats.from_arrays(**data)
    assert stats.qpos_std[1] == pytest.approx(MIN_STD)
    assert stats.qpos_mean.dtype == stats.qpos_std.dtype == torch.float32


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["qpos", "actions", "env_state"])
def test_bad_numbers_are_refused_by_name(data, name, value):
    data[name][7, 1] = value
    with pytest.raises(ValueError, match=rf"{name} dimension 1 .* step 7"):
        Stats.from_arrays(**data)


@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 3, 3)])
def test_bad_shapes_are_refused(data, shape):
    with pytest.raises(ValueError, match="qpos has shape"):
        Stats.from_arrays(**{**data, "qpos": np.zeros(shape)})


def test_state_dict_carries_the_statistics(data):
    source = Normalizer(SPEC, Stats.from_arrays(**data))
    restored = Normalizer(SPEC)
    restored.load_state_dict(source.state_dict())
    assert restored.state_dict().keys() == source.state_dict().keys()
    for name, value in source.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(restored.state_dict()[name], value)


def test_identity_changes_nothing():
    actions = torch.randn(2, 5, 2)
    normalizer = Normalizer(SPEC)
    assert torch.equal(normalizer.normalize_actions(actions), actions)
    assert torch.equal(normalizer.unnormalize_actions(actions), actions)


def test_statistics_of_other_data_are_refused(data):
    stats = Stats.from_arrays(**data)
    with pytest.raises(ValueError, match=r"qpos_mean has shape \(3,\), the data has \(5,\)"):
        Normalizer(replace(SPEC, dim_qpos=5), stats)
    with pytest.raises(ValueError, match="env_state_mean has shape None"):
        Normalizer(SPEC, replace(stats, env_state_mean=None))


def test_images_are_imagenet_normalised_and_channels_last():
    images = torch.randint(0, 256, (2, 3, 3, 8, 6), dtype=torch.uint8)
    spec = replace(SPEC, cameras=("a", "b", "c"))
    found = Normalizer(spec).normalize_images(images)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(found, (images / 255 - mean) / std)
    assert found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_the_caller_keeps_its_statistics(data):
    stats = Stats.from_arrays(**data)
    before = stats.qpos_mean.clone()
    Normalizer(SPEC, stats).qpos_mean.zero_()
    assert torch.equal(stats.qpos_mean, before)
