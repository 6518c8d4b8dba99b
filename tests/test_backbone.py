import socket
import time
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from act_lightning.nets import backbone as module
from act_lightning.nets.backbone import (
    WEIGHTS_FILE,
    Backbone,
    BackboneConfig,
    group_norm,
    read_weights,
)

SCRATCH = {"weights": "none", "norm": "group"}


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """A file as torchvision publishes it, with batch-norms that are not the identity."""
    torch.manual_seed(0)
    model = resnet18()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
        for buffer in (
            b for m in model.modules() if hasattr(m, "running_var") for b in (m.weight,)
        ):
            buffer.uniform_(0.5, 1.5)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*args, **kwargs):
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def torchvision_features(model: torch.nn.Module, images: torch.Tensor, stages: int) -> torch.Tensor:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    for stage in range(1, stages + 1):
        x = getattr(model, f"layer{stage}")(x)
    return x


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_frozen_equals_torchvision_in_evaluation(weights_file, stages):
    """In features, and in the gradients of the convolutions."""
    reference = resnet18()
    reference.load_state_dict(torch.load(weights_file))
    reference.eval()
    config = BackboneConfig(weights=str(weights_file), stages=stages)
    ours = Backbone(config, 1)
    images = torch.randn(2, 1, 3, 49, 66)
    expected = torchvision_features(reference, images[:, 0], stages)
    found = ours(images)
    assert config.feature_size((49, 66)) == expected.shape[-2:]
    assert config.dim_features == expected.shape[1]
    torch.testing.assert_close(
        found[:, 0], expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4
    )
    assert not any(k.startswith(f"resnets.0.layer{stages + 1}") for k in ours.state_dict())
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found[:, 0] * weight.flatten(2).transpose(1, 2)).sum().backward()
    for name, parameter in ours.resnets[0].named_parameters():
        gradient = reference.get_parameter(name).grad
        error = (parameter.grad - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, name


def test_frozen_norm_is_constant_but_convolutions_train(weights_file):
    ours = Backbone(BackboneConfig(weights=str(weights_file)), 1).train()
    norm = ours.resnets[0].bn1
    assert isinstance(norm, FrozenBatchNorm2d)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    ours(torch.randn(2, 1, 3, 32, 32)).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    assert all(p.dim() == 4 and p.grad is not None for p in ours.parameters())


def test_group_norm_equals_torchvision_with_group_norm():
    reference = resnet18(norm_layer=group_norm)
    ours = Backbone(BackboneConfig(**SCRATCH), 1)
    module.load_weights(ours.resnets[0], reference.state_dict(), "test")
    images = torch.randn(2, 1, 3, 64, 64)
    expected = torchvision_features(reference, images[:, 0], 4)
    torch.testing.assert_close(
        ours(images)[:, 0], expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4
    )
    assert [name for name, _ in ours.resnets[0].named_parameters()] == [
        name for name, _ in reference.named_parameters() if not name.startswith("fc.")
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_cameras_keep_their_place(shared):
    torch.manual_seed(0)
    ours = Backbone(BackboneConfig(**SCRATCH, shared=shared, width=16, stages=2), 3)
    images = torch.randn(2, 3, 3, 32, 48)
    found = ours(images)
    assert found.shape == (2, 3, 4 * 6, 32)
    for camera in range(3):
        resnet = ours.resnets[0 if shared else camera]
        for sample in range(2):
            expected = resnet(images[sample, camera][None])[0].flatten(1).T
            torch.testing.assert_close(found[sample, camera], expected, atol=1e-5, rtol=1e-4)


def test_each_camera_starts_from_the_weights(weights_file):
    ours = Backbone(BackboneConfig(weights=str(weights_file), shared=False, stages=1), 2)
    first, second = (dict(r.named_parameters()) for r in ours.resnets)
    assert len(ours.resnets) == 2
    assert all(torch.equal(first[k], second[k]) and first[k] is not second[k] for k in first)


def test_imagenet_comes_from_the_cache(offline, weights_file):
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    cache.mkdir(parents=True)
    weights_file.rename(cache / WEIGHTS_FILE)
    ours = Backbone(BackboneConfig(stages=1), 1)
    expected = torch.load(cache / WEIGHTS_FILE)["conv1.weight"]
    assert torch.equal(ours.resnets[0].conv1.weight, expected)


def test_offline_error_names_both_ways_out(offline):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as caught:
        Backbone(BackboneConfig(), 1)
    message = str(caught.value)
    assert WEIGHTS_FILE in message
    assert "checkpoints" in message
    assert "weights: none, norm: group" in message
    assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


def test_no_file_is_read_for_a_state_dict(offline):
    Backbone(BackboneConfig(), 1, pretrained=False)


def test_unusable_files_are_refused(tmp_path, weights_file):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="not a PyTorch state_dict"):
        read_weights(str(tmp_path / "text.pth"))
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(weights_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="not a PyTorch state_dict"):
        read_weights(str(truncated))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        read_weights(str(tmp_path / "list.pth"))
    content = torch.load(weights_file)
    content["layer1.0.conv1.weight"] = torch.zeros(32, 64, 3, 3)
    torch.save(content, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight is \(32, 64, 3, 3\), expected"):
        Backbone(BackboneConfig(weights=str(tmp_path / "shape.pth")), 1)
    del content["layer1.0.conv1.weight"]
    torch.save(content, tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="layer1.0.conv1.weight is missing"):
        Backbone(BackboneConfig(weights=str(tmp_path / "missing.pth")), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batch"}, "norm='batch'"),
        ({"weights": ""}, "weights is empty"),
        ({"weights": "none"}, "norm=frozen_batch"),
        ({"norm": "group"}, "weights='imagenet'"),
        ({**SCRATCH, "stages": 5}, "stages=5"),
        ({**SCRATCH, "stages": 0}, "stages=0"),
        ({**SCRATCH, "width": 24}, "width=24"),
        ({"width": 32}, "width=32"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**settings)
