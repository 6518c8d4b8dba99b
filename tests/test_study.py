"""Files of studies: what they name, what is wrong with them, and that those shipped are right."""

from pathlib import Path

import pytest
import yaml

from act_lightning.settings import flatten
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.record import RecordConfig
from act_lightning.study.resolve import Resolved, check_run, resolve_study
from act_lightning.study.study import PlannedRun, read_study

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "experiments" / "studies").glob("*.yaml"))
HEAD = "title: t\nquestion: q\nexperiment: insertion_state\n"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a study from what its file holds."""
    monkeypatch.chdir(ROOT)

    def from_text(text="", **entries):
        path = tmp_path / "mine.yaml"
        path.write_text(HEAD + text + (yaml.safe_dump(entries, sort_keys=False) if entries else ""))
        return read_study(path)

    return from_text


def names(study):
    return [variant.name for variant in study.variants]


# --- reading ---


def test_runs_are_named_by_what_varies(read):
    study = read(
        settings={"trainer.max_steps": 7, "env.cameras": []},
        variants={"plain": {}, "other": {"experiment": "insertion_state_bc", "data.seed": 5}},
        grid={"model.net.init_args.chunk_size": [1, 4]},
        seeds=[0, 3],
        report={"reference": "plain,chunk_size=4"},
    )
    assert names(study) == [
        "plain,chunk_size=1",
        "plain,chunk_size=4",
        "other,chunk_size=1",
        "other,chunk_size=4",
    ]
    assert study.reference == "plain,chunk_size=4"
    runs = study.runs()
    assert [run.seed for run in runs] == [0] * 4 + [3] * 4  # something of each variant first
    assert runs[7].folder == Path("runs/studies/mine/other,chunk_size=4/seed_3")
    assert runs[7].arguments == (
        *("--config", "experiments/base.yaml"),
        *("--config", "experiments/insertion_state_bc.yaml"),
        "--trainer.max_steps=7",
        "--env.cameras=[]",
        "--data.seed=5",
        "--model.net.init_args.chunk_size=4",
        "--experiment=studies/mine/other,chunk_size=4",
        "--run=seed_3",
        "--seed_everything=3",
    )


def test_without_anything_that_varies_there_is_one_variant(read):
    assert names(read()) == ["all"]
    assert read().seeds == (0, 1, 2)
    assert names(read("settings:\nvariants:\ngrid:\n")) == ["all"]


def test_values_and_settings_are_short_in_names(read):
    cameras = read("grid: {env.cameras: [[], [top], [top, left_wrist]], data.num_episodes: [null]}")
    assert names(cameras) == [
        "cameras=none,num_episodes=null",
        "cameras=top,num_episodes=null",
        "cameras=top+left_wrist,num_episodes=null",
    ]
    same = read("grid: {model.optimizer.lr: [1, 2.5], other.lr: [x]}")
    assert names(same) == ["optimizer.lr=1,other.lr=x", "optimizer.lr=2.5,other.lr=x"]


def test_values_are_those_that_yaml_has(read):
    """Numbers without a point are text to YAML; what is in quotes stays text."""
    study = read(
        "grid: {model.optimizer.lr: [1e-3, 1.0e-4]}\n"
        "variants: {'off': {demonstrations.path: 'off'}, b: {trainer.deterministic: on}}\n"
    )
    assert names(study)[:2] == ["off,lr=1e-3", "off,lr=0.0001"]
    arguments = [run.arguments[4:-3] for run in study.runs()]
    assert arguments[0] == ("--demonstrations.path=off", "--model.optimizer.lr=1e-3")
    assert arguments[2] == ("--trainer.deterministic=true", "--model.optimizer.lr=1e-3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: {off: {}, on: {}}", "variants: YAML reads a name as False; put it in quotes"),
        ("variants: {1: {}}", "variants: YAML reads a name as 1; put it in quotes"),
        ("variants: {a b: {}}", "variant 'a b' cannot name a folder; give it a name under"),
        ("variants: {a: }", "Expected a <class 'dict'>. Got value: None"),
        ("variants: {sweep: {}}", "variant 'sweep': a folder of the study has that name"),
        ("grid: {demonstrations.path: [a/b, c]}", "variant 'path=a/b' cannot name a folder"),
        ("grid: {data.batch_size: 3}", "Expected a <class 'list'>. Got value: 3"),
        ("grid: {data.batch_size: []}", "grid.data.batch_size=[]; give different values"),
        ("grid: {data.batch_size: [3, 3]}", "grid.data.batch_size=[3, 3]; give different values"),
        ("settings: {experiment: base}", "settings sets experiment, which the study does"),
        ("settings: {run: x}", "settings sets run, which the study does"),
        ("variants: {a: {seed_everything: 3}}", "variants.a sets seed_everything, which the study"),
        ("grid: {ckpt_path: [a, b]}", "grid sets ckpt_path, which the study does"),
        ("record: {run: a}", "record sets run, which the study does"),
        ("seeds: [1, 1]", "seeds=[1, 1]; give different ones, 0 or more"),
        ("seeds: [-1]", "seeds=[-1]; give different ones, 0 or more"),
        ("seeds: []", "seeds=[]; give different ones, 0 or more"),
        ("seeds: 3", "Expected a <class 'list'>. Got value: 3"),
        ("seed: [3]", "does not accept option 'seed'"),
        ("report: {reference: b}\nvariants: {a: {}}", "report.reference=b; the variants are a"),
        ("title: [", "while parsing a flow node"),
    ],
)
def test_what_is_no_study_is_refused(read, text, message):
    with pytest.raises(ValueError, match="mine.yaml does not describe a study") as refusal:
        read(text)
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ["", "- a", "title: t", "title: t\nquestion:\nexperiment: x"])
def test_what_is_missing_is_named(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"holds no settings|'study\.\w+' is required"):
        read_study(path)


def test_a_missing_file_names_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match="there are none"):
        read_study(tmp_path / "mine.yaml")
    (tmp_path / "other.yaml").touch()
    with pytest.raises(ValueError, match="these exist: other"):
        read_study(tmp_path / "mine.yaml")


# --- resolving ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: {data.bach_size: 3}", "Unrecognized arguments: --data.bach_size=3"),
        ("settings: {data.batch_size: 0}", "data.batch_size=0; give 1 or more"),
        ("settings: {model.net.init_args.dim_model: 33}", "dim_model=33 must be a multiple of 4"),
        ("variants: {a: {experiment: nope}}", "there is no experiments/nope.yaml"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("settings: {data.batch_size: x}", 'key "data.batch_size":'),
                ("settings: {model.optimizer.lr: -1}", "optimizer.lr=-1.0 must not be negative"),
                ("settings: {demonstrations.episodes: 0}", "demonstrations.episodes=0; give 1 or"),
                ("settings: {model.optimizer.schedule: off}", "Got value: false"),
                ("settings: {trainer.max_steps: 1500}", "multiple of trainer.val_check_interval"),
                ("record: {env.camras: [top]}", "Unrecognized arguments: --env.camras"),
            )
        ),
    ],
)
def test_wrong_settings_are_refused_by_study_and_variant(read, text, message):
    study = read(text)
    with pytest.raises(ValueError, match="study mine, (all|a): ") as refusal:
        resolve_study(study)
    assert message in str(refusal.value)


def test_dictionaries_are_replaced_whole(read, capfd):
    study = read(
        settings={"rollout.executions": {"mine": {"ensemble_decay": 0.1}}},
        record={"env.cameras": ["top"]},
    )
    [found] = resolve_study(study).values()
    assert found.executions == ("mine",)
    assert found.recorded_env.cameras == ("top",)
    assert found.settings["env.cameras"] == []
    assert found.max_steps == 3000
    assert found.settings["demonstrations.expert.init_args.action_noise"] == 0.02
    assert not found.settings.keys() & {"seed_everything", "run", "data.seed", "trainer.precision"}
    assert capfd.readouterr() == ("", "")


def test_what_a_run_was_made_with_is_compared(tmp_path):
    run = PlannedRun(variant="v", seed=1, folder=tmp_path, arguments=())
    planned = Resolved(
        settings={"a.b": 1, "c": [1], "younger": 1},
        max_steps=1,
        executions=(),
        demonstrations=RecordConfig(),
        recorded_env=EnvConfig(),
    )
    (tmp_path / "config.yaml").write_text("{a: {b: 1}, c: [1], older: 3}")
    check_run(run, planned)
    for made, complaint in (
        ("{a: {b: 2}, c: [1]}", "settings: a.b 2 there and 1 now. Delete"),
        ("{a: {b: 2}, c: [2]}", r"a.b 2 there and 1 now; c \[2\] there and \[1\] now"),
        ("nothing", "is damaged"),
        ("a: [", "is damaged"),
    ):
        (tmp_path / "config.yaml").write_text(made)
        with pytest.raises(ValueError, match=complaint):
            check_run(run, planned)


@pytest.mark.parametrize("there", ["{chunked: {m: 1}, even: {m: 1}}", "{}", "{even: {m: 1}}"])
def test_a_way_of_executing_more_or_less_is_another_setting(tmp_path, there):
    planned = Resolved(
        settings={"rollout.executions.chunked.m": 1},
        max_steps=1,
        executions=("chunked",),
        demonstrations=RecordConfig(),
        recorded_env=EnvConfig(),
    )
    run = PlannedRun(variant="v", seed=0, folder=tmp_path, arguments=())
    (tmp_path / "config.yaml").write_text("rollout: {executions: {chunked: {m: 1}}}")
    check_run(run, planned)
    (tmp_path / "config.yaml").write_text(f"rollout: {{executions: {there}}}")
    with pytest.raises(ValueError, match=r"rollout.executions holds .* there and chunked now"):
        check_run(run, planned)


def test_nested_settings_by_dotted_name():
    assert flatten({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": {}}) == {
        "a.b": 1,
        "a.c.d": [1, {"e": 2}],
        "f": {},
    }


# --- those shipped ---


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_read(path):
    study = read_study(path)
    assert path.read_text().startswith("# ")
    assert len({run.folder for run in study.runs()}) == len(study.variants) * len(study.seeds)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_resolved(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    by_name = resolve_study(study)
    stores = {}
    for variant in study.variants:
        found = by_name[variant.name]
        assert (study.settings | variant.settings).keys() - found.settings.keys() <= {
            "rollout.executions"
        }
        recording = (found.demonstrations, found.recorded_env)
        assert stores.setdefault(found.demonstrations.path, recording) == recording


def test_the_exercises_are_covered():
    exercises = {"kl_weight", "ensembling", "chunk_size", "multimodality"}
    exercises |= {"cvae", "cameras", "demos", "decoder_layers"}
    studies = {path.stem: read_study(path) for path in SHIPPED}
    assert exercises <= studies.keys()
    assert all(len(studies[name].seeds) >= 3 for name in exercises)
