"""Training steps: exact resumption, schedules, what is in a checkpoint."""

import math
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from small_store import write_store

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.cli import ConfigReader
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.module import ACTModule, OptimizerConfig
from act_lightning.nets.act import ACTConfig
from act_lightning.nets.augment import AugmentConfig
from act_lightning.nets.backbone import BackboneConfig
from act_lightning.nets.losses import KLSchedule
from act_lightning.nets.normalize import Stats
from act_lightning.policy import Policy, read_checkpoint

SPEC = DataSpec(task="t", fps=50, dim_qpos=3, dim_action=2, cameras=("top",), image_size=(16, 24))
NET = ACTConfig(
    chunk_size=4,
    dim_model=16,
    num_heads=2,
    dim_feedforward=32,
    num_cvae_layers=1,
    num_obs_layers=1,
    dim_latent=4,
    backbone=BackboneConfig(weights="none", norm="group", stages=1, width=16),
    kl_schedule=KLSchedule(kind="linear", weight=5.0, warmup_steps=4),
)

AUGMENT = AugmentConfig(
    shift=2, crop=0.8, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, qpos_noise=0.1
)


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    is_pad = torch.zeros(6, 4, dtype=torch.bool)
    is_pad[0, 2:] = True
    return Batch(
        observation=Observation(
            qpos=torch.randn(6, 3, generator=generator),
            images=torch.randint(0, 256, (6, 1, 3, 16, 24), generator=generator, dtype=torch.uint8),
        ),
        actions=torch.randn(6, 4, 2, generator=generator),
        is_pad=is_pad,
        position=6 * step,
    )


class EndlessBatches:
    """Batches from a step on, without a length, as the data module's."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        return map(make_batch, count(self.start))


def make_module(**changes):
    torch.manual_seed(0)
    return ACTModule(
        **(
            {
                "net": NET,
                "spec": SPEC,
                "stats": Stats.identity(SPEC),
                "optimizer": OptimizerConfig(lr=1e-3, backbone_lr=1e-3, warmup_steps=3),
            }
            | changes
        )
    )


def fit(module, steps, tmp_path, ckpt_path=None, val_batches=None, **arguments):
    done = 0 if ckpt_path is None else 2 * arguments.get("accumulate_grad_batches", 1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        enable_checkpointing=any(
            isinstance(callback, ModelCheckpoint) for callback in arguments.get("callbacks", ())
        ),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=tmp_path,
        **arguments,
    )
    batches = EndlessBatches(done)
    trainer.fit(module, batches, val_batches, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("ema", [False, True])
def test_two_steps_and_resume_to_four_equal_four_straight(tmp_path, ema):
    # Saved while training: at its end, the average takes the place of the weights.
    saver = ModelCheckpoint(tmp_path, "two", every_n_train_steps=2)

    def callbacks():
        return [EMAWeightAveraging(decay=0.5)] if ema else []

    straight = make_module()
    fit(straight, 4, tmp_path, callbacks=callbacks())
    first = make_module()
    fit(first, 2, tmp_path, callbacks=[*callbacks(), saver])
    resumed = make_module(seed=0)
    fit(resumed, 4, tmp_path, tmp_path / "two.ckpt", callbacks=callbacks())
    for (name, a), b in zip(
        straight.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert not torch.equal(straight.net.chunk_decoder.queries, first.net.chunk_decoder.queries)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("parts", [1, 2])
def test_augmented_run_is_resumed_exactly(tmp_path, precision, parts):
    saver = ModelCheckpoint(tmp_path, "two", every_n_train_steps=2)
    settings = {"precision": precision, "accumulate_grad_batches": parts}
    straight, resumed = make_module(augment=AUGMENT), make_module(augment=AUGMENT)
    fit(straight, 4, tmp_path, **settings)
    fit(make_module(augment=AUGMENT), 2, tmp_path, callbacks=[saver], **settings)
    fit(resumed, 4, tmp_path, tmp_path / "two.ckpt", **settings)
    plain = make_module()
    fit(plain, 4, tmp_path, **settings)
    for (name, a), b in zip(
        straight.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    queries = straight.net.chunk_decoder.queries
    assert not torch.equal(queries, plain.net.chunk_decoder.queries)


def test_only_training_is_augmented(tmp_path):
    module = make_module(augment=AUGMENT)
    trained, validated = [], []
    losses, evaluate = module.net.losses, module.net.evaluate
    module.net.losses = lambda batch, *rest: trained.append(batch) or losses(batch, *rest)
    module.net.evaluate = lambda batch, seeds: validated.append(batch) or evaluate(batch, seeds)
    arguments = {"check_val_every_n_epoch": None, "val_check_interval": 2, "limit_val_batches": 1}
    fit(module, 2, tmp_path, None, EndlessBatches(7), num_sanity_val_steps=0, **arguments)
    assert len(trained) == 2
    assert len(validated) == 1
    for seen, given, same in (
        *((batch, make_batch(step), False) for step, batch in enumerate(trained)),
        (validated[0], make_batch(7), True),
    ):
        assert torch.equal(seen.observation.images, given.observation.images) == same
        assert torch.equal(seen.observation.qpos, given.observation.qpos) == same
        assert torch.equal(seen.actions, given.actions)


def test_noise_on_qpos_is_in_the_demonstrations_standard_deviations(tmp_path):
    std = torch.tensor([0.01, 1.0, 100.0])
    stats = replace(Stats.identity(SPEC), qpos_std=std)
    module = make_module(augment=AugmentConfig(qpos_noise=0.1), stats=stats)
    trained = []
    losses = module.net.losses
    module.net.losses = lambda batch, *rest: trained.append(batch) or losses(batch, *rest)
    fit(module, 20, tmp_path)
    noise = torch.cat(
        [
            batch.observation.qpos - make_batch(step).observation.qpos
            for step, batch in enumerate(trained)
        ]
    )
    assert ((noise / std).std(0) - 0.1).abs().max() < 0.03


def test_random_numbers_depend_on_seed_and_step_alone(tmp_path):
    a, b, other = make_module(seed=1), make_module(seed=1), make_module(seed=2)
    for module in (a, b, other):
        torch.manual_seed(id(module) % 1000)
        fit(module, 2, tmp_path)
    assert torch.equal(a.net.chunk_decoder.queries, b.net.chunk_decoder.queries)
    assert not torch.equal(a.net.chunk_decoder.queries, other.net.chunk_decoder.queries)


def test_loss_is_reconstruction_plus_weighted_kl(tmp_path):
    module = make_module(net=replace(NET, kl_schedule=KLSchedule(kind="constant", weight=3.0)))
    logged = {}
    module.log_dict = lambda metrics, **_: logged.update(metrics)
    fit(module, 1, tmp_path, log_every_n_steps=1)
    expected = logged["train/l1"] + 3.0 * logged["train/kl"]
    torch.testing.assert_close(logged["train/loss"], expected)


def test_checkpoint_alone_rebuilds_the_policy(tmp_path):
    stats = Stats(
        qpos_mean=torch.full((3,), 2.0),
        qpos_std=torch.full((3,), 3.0),
        action_mean=torch.full((2,), -1.0),
        action_std=torch.full((2,), 5.0),
        env_state_mean=None,
        env_state_std=None,
    )
    module = make_module(stats=stats)
    fit(module, 2, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    policy = Policy.from_checkpoint(tmp_path / "a.ckpt")
    assert policy.spec == SPEC
    assert policy.step == 2
    assert len(policy.sha256) == 64
    observation = make_batch(9).observation
    module.eval()
    assert torch.equal(policy.predict_chunk(observation), module.net.predict_chunk(observation))


def test_policy_acts_as_its_chunks_say(tmp_path):
    policy = Policy(make_module().net)
    observation = Observation(
        qpos=make_batch(0).observation.qpos[:1], images=make_batch(0).observation.images[:1]
    )
    with pytest.raises(RuntimeError, match="start"):
        policy.act(observation)
    chunk = policy.predict_chunk(observation)[0]
    policy.start()
    torch.testing.assert_close(policy.act(observation), chunk[0])
    # The second action averages what both chunks, which are equal, say about the second step.
    weights = torch.tensor([1.0, math.exp(-0.01)])
    expected = (weights[0] * chunk[1] + weights[1] * chunk[0]) / weights.sum()
    torch.testing.assert_close(policy.act(observation), expected)
    with pytest.raises(ValueError, match="give one"):
        policy.act(make_batch(0).observation)


def test_other_files_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Policy.from_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "bad.ckpt").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a checkpoint"):
        Policy.from_checkpoint(tmp_path / "bad.ckpt")


def test_checkpoint_from_before_class_paths_is_refused_whatever_it_is_for(tmp_path):
    fit(make_module(), 2, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["act_lightning"]["net"] = checkpoint["act_lightning"]["net"]["init_args"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for use in (Policy.from_checkpoint, read_checkpoint):  # the second also before training resumes
        with pytest.raises(ValueError, match="from before networks were chosen by class_path"):
            use(tmp_path / "old.ckpt")


def test_checkpoint_of_a_version_with_other_settings_names_both_versions(tmp_path):
    fit(make_module(), 2, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["act_lightning"]["net"]["init_args"]["dim_forgotten"] = 3
    checkpoint["act_lightning"]["version"] = "0.0.1"
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"act_lightning 0\.0\.1.*dim_forgotten"):
        Policy.from_checkpoint(tmp_path / "old.ckpt")


def test_learning_rate_corners():
    config = OptimizerConfig(schedule="cosine", warmup_steps=10, final_lr_fraction=0.1)
    assert config.lr_factor(0, 110) == pytest.approx(0.1)
    assert config.lr_factor(9, 110) == 1.0
    assert config.lr_factor(10, 110) == 1.0
    assert config.lr_factor(60, 110) == pytest.approx(0.55)
    assert config.lr_factor(110, 110) == pytest.approx(0.1)
    assert config.lr_factor(500, 110) == pytest.approx(0.1)
    assert OptimizerConfig().lr_factor(10**6, 10) == 1.0


@pytest.mark.parametrize(
    ("scaling", "factor"), [("none", 1.0), ("linear", 6.0), ("sqrt", math.sqrt(6))]
)
def test_learning_rates_follow_the_samples_of_a_step(tmp_path, capsys, scaling, factor):
    config = OptimizerConfig(lr=1e-3, backbone_lr=1e-4, scaling=scaling)
    module = make_module(optimizer=config)
    data = ACTDataModule(
        path=str(write_store(tmp_path / "a.zarr", [6, 7])),
        batch_size=2,
        batch_size_per_rank=4,
        chunk_size=NET.chunk_size,
        val_fraction=0,
    )
    trainer = Trainer(accelerator="cpu", accumulate_grad_batches=3, logger=False)
    module.trainer = data.trainer = trainer
    trainer.datamodule = data
    trainer.strategy.optimizers = [module.configure_optimizers()["optimizer"]]
    groups = trainer.optimizers[0].param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx(
        [1e-3 * factor, 1e-4 * factor]
    )
    module.on_train_start()
    said = capsys.readouterr().out
    assert "a step: 12 samples = 3 batches x 4; learning rate" in said
    assert f"{1e-3 * factor:g} (model.optimizer.scaling: {scaling})" in said


def test_backbone_has_its_own_learning_rate(tmp_path):
    module = make_module(optimizer=OptimizerConfig(lr=1e-3, backbone_lr=0.0, weight_decay=0.0))
    before = {name: p.clone() for name, p in module.net.named_parameters()}
    fit(module, 2, tmp_path)
    changed = {
        name for name, p in module.net.named_parameters() if not torch.equal(p, before[name])
    }
    assert not any(name.startswith("backbone.") for name in changed)
    assert "chunk_decoder.action_head.weight" in changed


def test_loss_that_is_not_finite_stops_training(tmp_path):
    module = make_module()
    with torch.no_grad():
        module.net.chunk_decoder.queries.fill_(float("nan"))
    with pytest.raises(ValueError, match="train/loss is nan at step 0"):
        fit(module, 1, tmp_path, log_every_n_steps=1)


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"warmup_steps": -1}, {"final_lr_fraction": 2.0}]
)
def test_bad_optimizer_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        OptimizerConfig(**settings)


def test_augmentation_is_kept_with_a_runs_configuration():
    base = Path(__file__).parent.parent / "experiments" / "base.yaml"
    reader = ConfigReader(["--config", str(base), "--model.augment.shift=2"])
    kept = yaml.safe_load(reader.parser.dump(reader.config))["model"]["augment"]
    assert AugmentConfig(**kept) == AugmentConfig(shift=2)
