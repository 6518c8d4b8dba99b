"""Policy folders in and out without LeRobot; `lerobot/test_weights.py` holds them against it."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from act_lightning.batch import DataSpec, Observation
from act_lightning.execution import ExecutionConfig
from act_lightning.lerobot.exporting import export_lerobot, write_policy
from act_lightning.lerobot.importing import import_lerobot, read_policy
from act_lightning.lerobot.verbs import export_verb, import_verb
from act_lightning.nets.act import ACT, ACTConfig
from act_lightning.nets.backbone import BackboneConfig
from act_lightning.nets.bc import BCConfig
from act_lightning.nets.losses import KLSchedule
from act_lightning.nets.normalize import Stats
from act_lightning.policy import Policy, bare_checkpoint
from act_lightning.sim.config import EnvConfig

ROOT = Path(__file__).parent.parent
BASE = ROOT / "experiments" / "base.yaml"
CONFIG, MODEL = "config.json", "model.safetensors"
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
PRE_STATE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
POST_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"

STATE = DataSpec(task="insertion", fps=50, dim_qpos=14, dim_action=14, dim_env_state=14)
PIXELS = replace(STATE, dim_env_state=0, cameras=("top", "left"), image_size=(32, 48))
TINY = ACTConfig(
    chunk_size=6,
    dim_model=16,
    num_heads=2,
    dim_feedforward=24,
    dropout=0.2,
    num_cvae_layers=1,
    num_obs_layers=1,
    num_decoder_layers=2,
    dim_latent=4,
    camera_embedding=False,
    kl_schedule=KLSchedule(weight=3.0),
)


def build(spec=STATE, config=TINY):
    """A network with statistics that change something."""
    torch.manual_seed(0)
    stats = {
        f"{name}_{kind}": torch.rand(size) + 0.1
        for name, size in (("qpos", spec.dim_qpos), ("action", spec.dim_action))
        for kind in ("mean", "std")
    }
    if spec.dim_env_state:
        sizes = {"env_state_mean": spec.dim_env_state, "env_state_std": spec.dim_env_state}
        stats |= {name: torch.rand(size) + 0.1 for name, size in sizes.items()}
    return ACT(config, spec, Stats(**stats), pretrained=False).eval()


def save_run(net, run):
    (run / "checkpoints").mkdir(parents=True)
    torch.save(bare_checkpoint(net, step=7), run / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy that sees states, and one that sees two cameras."""
    folder = tmp_path_factory.mktemp("policies")
    for name, spec in (("state", STATE), ("pixels", PIXELS)):
        write_policy(build(spec), folder / name)
    return folder


@pytest.fixture
def policy(folders, tmp_path):
    """A copy of the former, to be damaged."""
    return Path(shutil.copytree(folders / "state", tmp_path / "policy"))


@pytest.fixture
def pixels(folders, tmp_path):
    """Likewise of the latter."""
    return Path(shutil.copytree(folders / "pixels", tmp_path / "pixels"))


def edit_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def normalizer(document):
    return document["steps"][3]["config"]


def read(folder):
    return read_policy(folder, "t", 50)


# ---- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [STATE, PIXELS], ids=["state", "pixels"])
def test_import_of_export_is_the_same_policy(spec, tmp_path):
    net = build(spec)
    save_run(net, tmp_path / "run")
    export_lerobot(tmp_path / "run", tmp_path / "policy")
    path = import_lerobot(tmp_path / "policy", tmp_path / "again", task=spec.task, fps=spec.fps)
    again = Policy.from_checkpoint(path)
    assert again.step == 0
    assert again.net.config == net.config
    assert again.spec == spec
    for name, value in net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value), name
    observation = Observation(
        qpos=torch.randn(2, spec.dim_qpos),
        env_state=torch.randn(2, spec.dim_env_state) if spec.dim_env_state else None,
        images=torch.randint(0, 256, (2, 2, 3, 32, 48), dtype=torch.uint8)
        if spec.cameras
        else None,
    )
    assert torch.equal(again.predict_chunk(observation), net.predict_chunk(observation))
    assert sorted(p.name for p in (tmp_path / "again").rglob("*")) == ["best.ckpt", "checkpoints"]


def test_a_run_that_can_be_evaluated(policy, tmp_path):
    edit_json(policy / CONFIG, lambda config: config.update(n_action_steps=3))
    ensembled = {"ensembled": ExecutionConfig(ensemble_decay=0.01)}
    env = EnvConfig(max_episode_steps=30)
    import_lerobot(policy, tmp_path / "run", env=env, executions=ensembled)
    from act_lightning.cli import build_world, read_world

    world = build_world(read_world(tmp_path / "run" / "config.yaml"))
    assert world.env == env
    assert world.rollout.env == env
    assert world.rollout.executions == ensembled | {"lerobot": ExecutionConfig(n_action_steps=3)}


def test_verbs(policy, tmp_path, capsys):
    run = tmp_path / "run"
    import_verb([str(policy), str(run), "--config", str(BASE), "--env.max_episode_steps=20"])
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["env"]["max_episode_steps"] == 20
    assert set(settings["rollout"]["executions"]) == {"chunked", "ensembled", "lerobot"}
    export_verb([str(run), str(tmp_path / "back")])
    assert str(tmp_path / "back") in capsys.readouterr().out.replace("\n", "")
    before, after = (load_file(folder / MODEL) for folder in (policy, tmp_path / "back"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("verb", [import_verb, export_verb])
def test_verbs_have_help(verb, capsys):
    with pytest.raises(SystemExit) as exit_info:
        verb(["--help"])
    assert exit_info.value.code == 0
    assert "RUN" in capsys.readouterr().out


@pytest.mark.slow
def test_an_imported_policy_plays(policy, tmp_path):
    from act_lightning.main import main

    run = tmp_path / "run"
    import_verb([str(policy), str(run), "--config", str(BASE), "--env.max_episode_steps=20"])
    assert main(["evaluate", str(run), "--episodes", "2"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["execution"]["lerobot"]["episodes"] == 2


# ---- normalisation ------------------------------------------------------------------------------


def test_modes_are_means_and_standard_deviations(policy):
    low, high = torch.linspace(-3, 1, 14), torch.linspace(2, 4, 14)
    low[2] = high[2] = 0.5  # never moved
    edit_tensors(
        policy / PRE_STATE,
        lambda t: t.update({"observation.state.min": low, "observation.state.max": high}),
    )
    edit_json(
        policy / PRE,
        lambda d: normalizer(d)["norm_map"].update(STATE="MIN_MAX", ENV="IDENTITY"),
    )
    norm = read(policy).normalizer
    assert torch.equal(norm.env_state_mean, torch.zeros(14))
    assert torch.equal(norm.env_state_std, torch.ones(14))
    moves = torch.arange(14) != 2
    torch.testing.assert_close(norm.normalize_qpos(low)[moves], -torch.ones(13))
    torch.testing.assert_close(norm.normalize_qpos(high)[moves], torch.ones(13))
    assert norm.normalize_qpos(low)[2] == -1


def test_eps_is_added_where_lerobot_divides_only(policy):
    for path, step in ((PRE, 3), (POST, 0)):
        edit_json(policy / path, lambda d, step=step: d["steps"][step]["config"].update(eps=0.25))
    norm, stats = read(policy).normalizer, load_file(policy / PRE_STATE)
    torch.testing.assert_close(norm.qpos_std, stats["observation.state.std"] + 0.25)
    torch.testing.assert_close(norm.action_std, stats["action.std"].clamp(min=0.25))


def test_keys_that_lerobot_leaves_alone_are_left_alone(policy):
    edit_json(
        policy / PRE,
        lambda d: normalizer(d).update(normalize_observation_keys=["observation.state"]),
    )
    norm = read(policy).normalizer
    assert torch.equal(norm.env_state_std, torch.ones(14))
    assert torch.equal(norm.qpos_std, load_file(policy / PRE_STATE)["observation.state.std"])


def to_old_format(folder):
    """As LeRobot saved before 0.4: statistics among the weights, no processors."""
    stats, weights = load_file(folder / PRE_STATE), load_file(folder / MODEL)
    for name, value in stats.items():
        key, _, kind = name.rpartition(".")
        sides = (
            ("normalize_targets", "unnormalize_outputs")
            if key == "action"
            else ("normalize_inputs",)
        )
        for side in sides:
            weights[f"{side}.buffer_{key.replace('.', '_')}.{kind}"] = value.clone()
    save_file(weights, folder / MODEL)
    for path in [*folder.glob("policy_*")]:
        path.unlink()


@pytest.mark.parametrize("name", ["policy", "pixels"])
def test_statistics_among_the_weights(name, request):
    folder = request.getfixturevalue(name)
    expected = read(folder).state_dict()
    to_old_format(folder)
    found = read(folder).state_dict()
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=0)


def test_old_policies_without_modes_have_the_default(policy):
    """LeRobot's ACT does not mention env_state there, so leaves it alone."""
    stats = load_file(policy / PRE_STATE)
    to_old_format(policy)
    edit_json(policy / CONFIG, lambda config: config.pop("normalization_mapping"))
    norm = read(policy).normalizer
    torch.testing.assert_close(norm.qpos_std, stats["observation.state.std"])
    assert torch.equal(norm.env_state_std, torch.ones(14))


def test_statistics_never_filled_in_are_refused(policy):
    """Old policies start with infinite statistics."""
    to_old_format(policy)
    key = "normalize_inputs.buffer_observation_state.mean"
    edit_tensors(policy / MODEL, lambda t: t[key].fill_(torch.inf))
    with pytest.raises(
        ValueError, match=r"model.safetensors: observation.state.mean is not finite"
    ):
        read(policy)


# ---- what is refused ----------------------------------------------------------------------------


def config_change(**changes):
    return lambda folder: edit_json(folder / CONFIG, lambda config: config.update(changes))


def without_state(folder):
    edit_json(folder / CONFIG, lambda c: c["input_features"].pop("observation.state"))


def resize_camera(folder):
    def change(config):
        config["input_features"]["observation.images.left"]["shape"] = [3, 32, 32]

    edit_json(folder / CONFIG, change)


def set_feature(key, feature):
    return lambda folder: edit_json(
        folder / CONFIG, lambda c: c["input_features"].update({key: feature})
    )


def drop_tensor(file, name):
    return lambda folder: edit_tensors(folder / file, lambda tensors: tensors.pop(name))


def set_tensor(file, name, value):
    return lambda folder: edit_tensors(folder / file, lambda tensors: tensors.update({name: value}))


def edit_step(file, index, **changes):
    return lambda folder: edit_json(folder / file, lambda d: d["steps"][index].update(changes))


def edit_norm_map(**modes):
    return lambda folder: edit_json(folder / PRE, lambda d: normalizer(d)["norm_map"].update(modes))


HEAD = "model.action_head.weight"
REFUSED = {
    "other kind": (
        "policy",
        config_change(type="diffusion"),
        "config.json: type='diffusion'; only",
    ),
    "no kind": ("policy", config_change(type=None), "config.json: type=None; only"),
    "backbone": ("pixels", config_change(vision_backbone="resnet34"), "vision_backbone='resnet34'"),
    "dilation": (
        "pixels",
        config_change(replace_final_stride_with_dilation=True),
        "replace_final_stride_with_dilation=True",
    ),
    "activation": ("policy", config_change(feedforward_activation="glu"), "activation='glu'"),
    "steps": ("policy", config_change(n_obs_steps=2), "n_obs_steps=2, only 1"),
    "adapter": ("policy", config_change(use_peft=True), "use_peft=True"),
    "size": ("policy", config_change(n_heads=3), "config.json: ACTConfig: dim_model=16 must"),
    "type of size": (
        "policy",
        config_change(n_encoder_layers="2"),
        "n_encoder_layers='2' is no int",
    ),
    "type of choice": ("policy", config_change(pre_norm=1), "pre_norm=1 is no bool"),
    "no state": ("policy", without_state, "input_features has no 'observation.state'"),
    "features": (
        "policy",
        config_change(input_features=None),
        "input_features=None is not a table",
    ),
    "actions": ("policy", config_change(output_features={}), "action has shape None"),
    "state shape": (
        "policy",
        set_feature("observation.state", {"type": "STATE", "shape": [2, 7]}),
        r"observation.state has shape \[2, 7\]; expected one number",
    ),
    "camera sizes": ("pixels", resize_camera, "the cameras' shapes differ"),
    "grey": (
        "policy",
        set_feature("observation.image", {"type": "VISUAL", "shape": [1, 32, 32]}),
        r"images of shape \(1, 32, 32\)",
    ),
    "alike": (
        "pixels",
        set_feature("observation.top", {"type": "VISUAL", "shape": [3, 32, 48]}),
        "two cameras are called alike",
    ),
    "camera statistics": (
        "pixels",
        set_tensor(PRE_STATE, "observation.images.left.mean", torch.zeros(3, 1, 1)),
        "images of left are normalised otherwise than those of top",
    ),
    "statistic": (
        "policy",
        drop_tensor(PRE_STATE, "observation.state.std"),
        f"{PRE_STATE} has no statistic 'std' of 'observation.state'",
    ),
    "action statistic": (
        "policy",
        drop_tensor(POST_STATE, "action.mean"),
        f"{POST_STATE} has no statistic 'mean' of 'action'",
    ),
    "statistic of mode": ("policy", edit_norm_map(STATE="MIN_MAX"), "no statistic 'min'"),
    "no statistics": ("policy", edit_step(PRE, 3, state_file=None), f"{PRE} has no statistic"),
    "statistic's size": (
        "policy",
        set_tensor(PRE_STATE, "observation.state.mean", torch.zeros(7)),
        r"observation.state.mean has shape \(7,\), the feature 14 values",
    ),
    "statistic's value": (
        "policy",
        set_tensor(PRE_STATE, "observation.state.std", torch.full((14,), torch.nan)),
        "observation.state.std is not finite",
    ),
    "negative": (
        "policy",
        set_tensor(PRE_STATE, "observation.state.std", -torch.ones(14)),
        "observation.state.std must be positive",
    ),
    "mode": ("policy", edit_norm_map(STATE="LOG"), "normalisation of STATE is 'LOG'"),
    "step": (
        "policy",
        edit_step(PRE, 1, registry_name="delta_actions_processor"),
        "steps has 'delta_actions_processor', which changes",
    ),
    "half": (
        "policy",
        edit_step(PRE, 2, config={"device": "cpu", "float_dtype": "float16"}),
        "float_dtype='float16'",
    ),
    "no modes": (
        "policy",
        lambda f: edit_json(f / PRE, lambda d: normalizer(d).pop("norm_map")),
        "norm_map=None is not a table",
    ),
    "no normaliser": (
        "policy",
        edit_step(PRE, 3, registry_name="to_batch_processor"),
        "steps has 0 of 'normalizer_processor'",
    ),
    "steps' type": ("policy", lambda f: (f / PRE).write_text('{"steps": 3}'), "steps=3 is not"),
    "weight": ("policy", drop_tensor(MODEL, HEAD), f"does not fit .*lacks {HEAD}"),
    "extra weight": (
        "policy",
        set_tensor(MODEL, "model.lora", torch.zeros(1)),
        "this network has not, model.lora",
    ),
    "weight's shape": (
        "policy",
        set_tensor(MODEL, HEAD, torch.zeros(14, 8)),
        rf"{HEAD} has shape \(14, 8\), config.json says \(14, 16\)",
    ),
    "flat convolution": (
        "pixels",
        set_tensor(MODEL, "model.encoder_img_feat_input_proj.weight", torch.zeros(16, 512)),
        r"encoder_img_feat_input_proj.weight has shape \(16, 512\)",
    ),
    "positions": (
        "policy",
        set_tensor(MODEL, "model.vae_encoder_pos_enc", torch.zeros(1, 8, 16)),
        "not the sinusoid table",
    ),
    "positions' shape": ("policy", config_change(chunk_size=7), "pos_enc has shape"),
    "layers": ("policy", config_change(n_decoder_layers=3), "lacks model.decoder.layers.2"),
    "json": ("policy", lambda f: (f / CONFIG).write_text("{"), "config.json is not JSON"),
    "json's type": ("policy", lambda f: (f / CONFIG).write_text("[]"), "holds a list"),
    "damaged": (
        "policy",
        lambda f: (f / MODEL).write_bytes(b"x" * 99),
        "model.safetensors is damaged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused(name, request, tmp_path):
    fixture, damage, message = REFUSED[name]
    folder = request.getfixturevalue(fixture)
    read(folder)  # it is sound before
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        import_lerobot(folder, tmp_path / "run", task="t", fps=50)
    assert str(folder) in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", [CONFIG, MODEL, PRE, POST, PRE_STATE, POST_STATE])
def test_missing_file_is_named(file, policy):
    (policy / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        read(policy)


def test_task_and_fps_are_asked_for(policy, tmp_path):
    for given in ({}, {"task": "t"}, {"fps": 50.0}):
        with pytest.raises(ValueError, match="give both .* or the configuration of an environment"):
            import_lerobot(policy, tmp_path / "run", **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env_state": False}, "dim_env_state is 14 in the policy and 0 in the environment"),
        ({"cameras": ("top",)}, r"cameras is \(\) in the policy"),
    ],
)
def test_environment_must_fit(change, message, policy, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_lerobot(policy, tmp_path / "run", env=EnvConfig(**change))
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(policy, tmp_path):
    save_run(build(), tmp_path / "run")
    before = (tmp_path / "run/checkpoints/best.ckpt").read_bytes()
    with pytest.raises(FileExistsError, match="run is there already"):
        import_lerobot(policy, tmp_path / "run", task="t", fps=50)
    with pytest.raises(FileExistsError, match="policy is there already"):
        export_lerobot(tmp_path / "run", policy)
    assert (tmp_path / "run/checkpoints/best.ckpt").read_bytes() == before
    assert not [*tmp_path.glob("*.part")]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("act_lightning.lerobot.exporting.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        write_policy(build(), tmp_path / "policy")
    assert [*tmp_path.iterdir()] == []


ONE = replace(PIXELS, cameras=("top",))
FROM_SCRATCH = BackboneConfig(weights="none", norm="group", width=16)
INEXPRESSIBLE = {
    "qpos only": (replace(STATE, dim_env_state=0), {}, "sees qpos only"),
    "camera embedding": (PIXELS, {"camera_embedding": True}, "camera_embedding=True"),
    "cvae encoder": (STATE, {"cvae_encoder": "mlp"}, "cvae_encoder=mlp"),
    "qpos encoder": (STATE, {"qpos_encoder": "mlp"}, "qpos_encoder=mlp"),
    "sampling": (STATE, {"latent_at_inference": "sample"}, "latent_at_inference=sample"),
    "no observation encoder": (STATE, {"num_obs_layers": 0}, "num_obs_layers=0"),
    "GroupNorm": (ONE, {"backbone": FROM_SCRATCH}, "backbone.norm=group"),
    "stages": (ONE, {"backbone": BackboneConfig(stages=3)}, "backbone.stages=3"),
    "backbones": (PIXELS, {"backbone": BackboneConfig(shared=False)}, "backbone.shared=False"),
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_lerobot_cannot_be_is_refused(name, tmp_path):
    spec, changes, message = INEXPRESSIBLE[name]
    with pytest.raises(ValueError, match=message):
        write_policy(build(spec, replace(TINY, **changes)), tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_refusal_names_the_checkpoint(tmp_path):
    save_run(build(STATE, replace(TINY, qpos_encoder="mlp")), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"best.ckpt cannot be exported to LeRobot: .*qpos_encoder"
    ):
        export_lerobot(tmp_path / "run", tmp_path / "policy")


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (ONE, {"camera_embedding": True}),
        (ONE, {"backbone": BackboneConfig(shared=False)}),
        (STATE, {"use_cvae": False, "cvae_encoder": "mlp"}),
        (STATE, {"backbone": FROM_SCRATCH}),
    ],
    ids=["embedding of one", "backbone of one", "encoder of no CVAE", "backbone of no camera"],
)
def test_settings_without_effect_do_not_matter(spec, changes, tmp_path):
    net = build(spec, replace(TINY, **changes))
    write_policy(net, tmp_path / "policy")
    again = read(tmp_path / "policy")
    assert {n: v.shape for n, v in again.state_dict().items()} == {
        n: v.shape for n, v in net.state_dict().items()
    }


def test_another_network_is_refused(tmp_path):
    save_run(BCConfig(dim_hidden=8).build(STATE), tmp_path / "run")
    with pytest.raises(ValueError, match="it holds a BC, not an ACT"):
        export_lerobot(tmp_path / "run", tmp_path / "policy")


# ---- the environment ----------------------------------------------------------------------------


def run_script(folder, **variables):
    """`.ci/lerobot-env` where there is no Python but the ones named."""
    (folder / ".ci").mkdir()
    (folder / "bin").mkdir()
    script = shutil.copy(ROOT / ".ci" / "lerobot-env", folder / ".ci")
    for tool in ("bash", "dirname", "cat"):
        (folder / "bin" / tool).symlink_to(shutil.which(tool))
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder), **variables}
    return subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)


def test_without_a_python_there_is_a_reason(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 3
    assert "no Python 3.12 or newer" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_python_that_is_too_old_is_refused(tmp_path):
    old = tmp_path / "python3.11"
    old.write_text("#!/bin/sh\necho 11\n")
    old.chmod(0o755)
    done = run_script(tmp_path, PYTHON_LEROBOT=str(old))
    assert done.returncode == 1
    assert "is 3.11; LeRobot 0.6.1 needs Python 3.12" in done.stderr
