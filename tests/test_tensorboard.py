"""What a run shows in TensorBoard: read back as TensorBoard does, and looked at in a browser."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context
from torch.utils.tensorboard import SummaryWriter

from act_lightning.main import main
from act_lightning.tensorboard import (
    COLUMNS_FILE,
    SEED,
    as_text,
    changes_table,
    describe_run,
    finish_run,
    shown_settings,
    write_experiment,
)

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "build" / "screenshots"
WEIGHT = "model.net.kl_schedule.weight"
SUCCESS = "evaluation/chunked/success_rate"


def settings(weight=10.0, seed=0, **others):
    net = {"chunk_size": 20, "num_cycles": None, "kl_schedule": {"weight": weight}}
    return {
        "seed_everything": seed,
        "experiment": f"e/{weight}",
        "run": None,
        "env": {"cameras": ["top", "left_wrist"], "make_kwargs": {}, "env_state": True},
        "model": {"net": {"class_path": "nets.ACT", "init_args": net}},
        "rollout": {"executions": {"chunked": {"n_action_steps": None}}},
        **others,
    }


def report(success):
    summary = {"success_rate": success, "wilson_95": [success - 0.1, success + 0.1]}
    return {"step": 300, "execution": {"chunked": summary}}


def write_run(folder, config, base=None, success=None):
    with SummaryWriter(str(folder)) as writer:
        describe_run(writer, yaml.safe_dump(config), base)
        writer.add_scalar("val/kl", 1.5, 100)
    if success is not None:
        finish_run(folder, report(success))


class Board:
    """TensorBoard's own reading of a folder."""

    def __init__(self, folder):
        self.runs = EventMultiplexer().AddRunsFromDirectory(str(folder))
        self.runs.Reload()
        provider = MultiplexerDataProvider(self.runs, str(folder))
        self.context = Context(TBContext(data_provider=provider, logdir=str(folder)))

    def experiment(self):
        request = api_pb2.GetExperimentRequest()
        return get_experiment.Handler(RequestContext(), self.context, "", request).run()

    def columns(self):
        return [info.name for info in self.experiment().hparam_infos]

    def groups(self, *columns):
        request = api_pb2.ListSessionGroupsRequest(
            col_params=columns,
            slice_size=100,
            allowed_statuses=[
                api_pb2.STATUS_UNKNOWN,
                api_pb2.STATUS_SUCCESS,
                api_pb2.STATUS_RUNNING,
            ],
        )
        handler = list_session_groups.Handler(RequestContext(), self.context, "", request)
        return handler.run().session_groups

    def text(self, run, tag):
        event = self.runs.Tensors(run, f"{tag}/text_summary")[-1]
        return event.tensor_proto.string_val[0].decode()


def columns_shown(study):
    """As `make tensorboard STUDY=...` does it."""
    shutil.copy(study / COLUMNS_FILE, study / "events.out.tfevents.0.columns")


def test_settings_are_numbers_booleans_and_strings_under_short_names():
    flat = shown_settings(settings(weight=0.1))
    assert flat == {
        "seed_everything": 0,
        "env.cameras": "[top, left_wrist]",
        "env.make_kwargs": "{}",
        "env.env_state": True,
        "model.net.class_path": "nets.ACT",
        "model.net.chunk_size": 20,
        WEIGHT: 0.1,
    }


def test_values_read_as_on_the_command_line():
    for value in (None, 0.1, 1e-5, True, "a b", ["a", 1], {}, "a: b"):
        assert yaml.safe_load(as_text(value)) == value
        assert "\n" not in as_text(value)


def test_what_varies_comes_first_in_any_set_of_runs(tmp_path):
    write_run(tmp_path / "a" / "version_0", settings(weight=10.0), success=0.5)
    write_run(tmp_path / "a" / "version_1", settings(weight=10.0, seed=1), success=0.25)
    write_run(tmp_path / "b" / "version_0", settings(weight=0.1), success=0.75)
    board = Board(tmp_path)
    assert board.columns()[:2] == [WEIGHT, "seed_everything"]
    assert [info.differs for info in board.experiment().hparam_infos][:3] == [True, True, False]
    found = {group.name: group.hparams for group in board.groups()}
    assert {name: dict(hparams)[WEIGHT].number_value for name, hparams in found.items()} == {
        "a/version_0": 10.0,
        "a/version_1": 10.0,
        "b/version_0": 0.1,
    }


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (api_pb2.ORDER_DESC, ["b/version_0", "a/version_0", "a/version_1"]),
        (api_pb2.ORDER_ASC, ["a/version_1", "a/version_0", "b/version_0"]),
    ],
)
def test_runs_are_sorted_by_success(tmp_path, order, names):
    write_run(tmp_path / "a" / "version_0", settings(), success=0.5)
    write_run(tmp_path / "a" / "version_1", settings(seed=1), success=0.25)
    write_run(tmp_path / "b" / "version_0", settings(weight=0.1), success=0.75)
    success = api_pb2.ColParams(metric=api_pb2.MetricName(tag=SUCCESS), order=order)
    assert [group.name for group in Board(tmp_path).groups(success)] == names


def test_the_grade_stands_at_the_step_of_its_checkpoint(tmp_path):
    write_run(tmp_path / "run", settings(), success=0.5)
    runs = Board(tmp_path).runs
    for which, value in (("rate", 0.5), ("low", 0.4), ("high", 0.6)):
        (event,) = runs.Tensors("run", f"evaluation/chunked/success_{which}")
        assert event.step == 300
        assert event.tensor_proto.float_val[0] == pytest.approx(value)


def test_an_interrupted_run_shows_up_and_a_finished_one_has_an_end(tmp_path):
    write_run(tmp_path / "cut", settings())
    write_run(tmp_path / "done", settings(), success=0.5)
    finish_run(tmp_path / "ungraded", None)
    write_run(tmp_path / "ungraded", settings())
    statuses = {group.name: group.sessions[0].status for group in Board(tmp_path).groups()}
    assert statuses == {
        "cut": api_pb2.STATUS_UNKNOWN,
        "done": api_pb2.STATUS_SUCCESS,
        "ungraded": api_pb2.STATUS_SUCCESS,
    }


def test_a_resumed_run_is_still_one_run(tmp_path):
    write_run(tmp_path / "run", settings(), base=("base.yaml", settings(weight=1.0)))
    write_run(tmp_path / "run", settings(), success=0.5)
    board = Board(tmp_path)
    (group,) = board.groups()
    assert dict(group.hparams)[WEIGHT].number_value == 10.0
    assert f"| {WEIGHT} | `1.0` | `10.0` |" in board.text("run", "config/changed")


def test_columns_of_a_study(tmp_path):
    """Those that vary and the seed, nothing else; what was written before is replaced."""
    for weight in (0.1, 10.0):
        for seed in (0, 1):
            folder = tmp_path / f"weight={weight}" / f"seed_{seed}"
            write_run(folder, settings(weight, seed), success=0.5)
    write_experiment(tmp_path, {"trainer.max_steps": [1, 2]}, ["val/l1"])
    varying = {"model.net.init_args.kl_schedule.weight": [0.1, 10.0, None]}
    for _ in range(2):
        write_experiment(tmp_path, varying, [SUCCESS, "val/kl"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [COLUMNS_FILE]
    assert len(Board(tmp_path).columns()) > 5, "among other runs all settings are columns"
    columns_shown(tmp_path)
    board = Board(tmp_path)
    assert board.columns() == [WEIGHT, SEED], "TensorBoard sorts them by name"
    weights, seeds = board.experiment().hparam_infos
    assert list(weights.domain_discrete) == [0.1, 10.0]
    assert (weights.type, seeds.type) == (api_pb2.DATA_TYPE_FLOAT64, api_pb2.DATA_TYPE_FLOAT64)
    assert [info.name.tag for info in board.experiment().metric_infos] == [SUCCESS, "val/kl"]
    groups = board.groups()
    assert len(groups) == 4
    for group in groups:
        assert [(value.name.tag, value.value) for value in group.metric_values] == [
            (SUCCESS, 0.5),
            ("val/kl", 1.5),
        ]


def test_columns_of_mappings_lists_and_mixed_values(tmp_path):
    varying = {
        "rollout.executions": [{"a": {"n_action_steps": 1}}, {"b": {"n_action_steps": 2}}],
        "env.cameras": [["top"], ["top", "left"]],
        "model.net.init_args.use_cvae": [True, False],
        "trainer.deterministic": [True, "warn"],
    }
    write_experiment(tmp_path, varying, [])
    columns_shown(tmp_path)
    infos = {info.name: info for info in Board(tmp_path).experiment().hparam_infos}
    assert set(infos) == {
        "rollout.executions.a.n_action_steps",
        "rollout.executions.b.n_action_steps",
        "env.cameras",
        "model.net.use_cvae",
        "trainer.deterministic",
        "seed_everything",
    }
    assert list(infos["env.cameras"].domain_discrete) == ["[top]", "[top, left]"]
    assert infos["model.net.use_cvae"].type == api_pb2.DATA_TYPE_BOOL
    assert infos["trainer.deterministic"].type == api_pb2.DATA_TYPE_STRING


def test_charts_show_success_with_its_interval_and_errors_together(tmp_path):
    write_run(tmp_path / "run", settings())
    event = Board(tmp_path).runs.Tensors("run", "custom_scalars__config__")[0]
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    (series,) = charts["chunked"].margin.series
    assert (series.value, series.lower, series.upper) == (
        "rollout/chunked/success_rate",
        "rollout/chunked/success_low",
        "rollout/chunked/success_high",
    )
    assert "^val/kl$" in charts["KL and active units"].multiline.tag
    assert "^val/l1_sampled$" in charts["L1"].multiline.tag


def test_the_configuration_stands_there_and_what_differs_from_base(tmp_path):
    base = settings(weight=1.0, seed=0, trainer={"max_steps": 3})
    config = settings(weight=10.0, seed=0)
    config["env"]["cameras"] = ["a|b"]
    write_run(tmp_path / "run", config, base=("experiments/base.yaml", base))
    board = Board(tmp_path)
    text = board.text("run", "config/all")
    assert text.startswith("```yaml\n")
    assert yaml.safe_load(text.removeprefix("```yaml\n").removesuffix("```")) == config
    assert board.text("run", "config/changed").splitlines() == [
        "| setting | experiments/base.yaml | this run |",
        "| --- | --- | --- |",
        "| env.cameras | `[top, left_wrist]` | `[a|b]` |",
        f"| {WEIGHT} | `1.0` | `10.0` |",
        "| trainer.max_steps | `3` |  |",
    ]
    assert changes_table("base.yaml", config, config) == "Nothing differs from base.yaml."


def test_one_study_is_shown_with_its_columns_or_all_runs_without():
    def commands(*variables):
        call = ["make", "-n", "-C", str(ROOT), "tensorboard", *variables]
        result = subprocess.run(call, env=make_env(), capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr

    code, output = commands()
    assert code == 0
    assert "-m tensorboard.main --logdir runs \n" in output
    code, output = commands("STUDY=kl_weight", "ARGS=--port 1")
    assert code == 0
    logdirs = "runs/studies/kl_weight,build/tensorboard/kl_weight"
    assert f"-m tensorboard.main --logdir_spec {logdirs} --port 1\n" in output
    unknown = ["make", "-C", str(ROOT), "tensorboard", "STUDY=nope"]
    result = subprocess.run(unknown, env=make_env(), capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(r"STUDY=nope: no such study; these exist: .*\bkl_weight\b", result.stderr)


def make_env():
    """Without what a `make test` above would hand down."""
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "STUDY", "ARGS", "RUNS"}
    return {name: value for name, value in os.environ.items() if name not in inherited}


# From here on: real runs, looked at in a real browser.

STEPS = (4, 500)
"""`trainer.max_steps` of the two variants: one has learnt nothing, the other something."""
RUN_NAMES = [f"max_steps={steps}/seed_{seed}" for steps in STEPS for seed in (0, 1)]
METRICS = [SUCCESS, "rollout/success_rate", "val/l1_prior", "val/kl", "val/active_units"]


@pytest.fixture(scope="module")
def chromium():
    """A headless browser."""
    programs = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, programs)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium here; `apt-get install chromium chromium-driver`")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "disable-dev-shm-usage", "window-size=1800,1400"):
        options.add_argument(f"--{argument}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which root cannot have
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as window:
        window.set_script_timeout(60)
        yield window


@pytest.fixture(scope="module")
def project(chromium, tmp_path_factory):
    """A folder with a study of two variants and two seeds: `fit` as the launcher calls it."""
    folder = tmp_path_factory.mktemp("project")
    arguments = [
        f"--config={ROOT / 'experiments' / 'base.yaml'}",
        f"--config={ROOT / 'experiments' / 'multimodal' / 'act.yaml'}",
        "--demonstrations.expert.style=plain",
        "--demonstrations.episodes=20",
        "--data.batch_size=16",
        "--model.optimizer.warmup_steps=10",
        "--model.optimizer.lr=5e-3",
        "--model.net.latent_at_inference=zero",
        "--rollout.episodes=4",
        "--rollout.final_episodes=10",
        "--rollout.final_media=false",
    ]
    with contextlib.chdir(folder):
        assert main(["record", *arguments]) == 0
        for steps in STEPS:
            for seed in (0, 1):
                run = [
                    f"--trainer.max_steps={steps}",
                    f"--trainer.val_check_interval={steps // 2}",
                    f"--experiment=studies/steps/max_steps={steps}",
                    f"--run=seed_{seed}",
                    f"--seed_everything={seed}",
                ]
                assert main(["fit", *arguments, *run]) == 0
        study = Path("runs", "studies", "steps")
        write_experiment(study, {"trainer.max_steps": STEPS}, METRICS)
    return folder


@pytest.fixture(scope="module")
def rates(project):
    """Success rate of each run, by name: how well such short trainings do, depends on rounding."""
    found = {}
    for name in RUN_NAMES:
        report = json.loads((project / "runs/studies/steps" / name / "results.json").read_text())
        found[name] = report["execution"]["chunked"]["success_rate"]
    assert len(set(found.values())) > 1, "nothing to sort by"
    return found


@pytest.fixture(scope="module")
def address(project):
    """Of `make tensorboard STUDY=steps`, while it runs."""
    for name, content in (("experiments/studies/steps.yaml", ""), (".ci/setup", "#!/bin/sh\n")):
        file = project / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o755)
    log = project / "tensorboard.log"
    call = ["make", "-f", str(ROOT / "Makefile"), "tensorboard", "STUDY=steps"]
    call += [f"PYTHON={sys.executable}", "ARGS=--port 0 --reload_interval 1"]
    with log.open("w") as output:
        server = subprocess.Popen(
            call,
            cwd=project,
            env=make_env(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        found = wait_for(lambda: re.search(r"http://localhost:\d+/", log.read_text()), 120)
        url = found[0]
        wait_for(lambda: {*RUN_NAMES} <= {*fetch(f"{url}data/runs")}, 120)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    complaints = re.findall(r"^(?:E|W)\d{4} .*|Traceback.*", log.read_text(), re.MULTILINE)
    assert not complaints, complaints


def fetch(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


def wait_for(condition, seconds=60):
    """What `condition` returns, once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.2)
    return found


class Tab:
    """An open tab of TensorBoard."""

    def __init__(self, window):
        self.window = window

    @property
    def text(self):
        """Of all that is shown."""
        return self.window.find_element("tag name", "body").text

    def run(self, script):
        """Runs JavaScript, for which `found` is every element, those in shadow roots included."""
        return self.window.execute_script(f"""
            const found = [];
            (function look(root) {{
                for (const element of root.querySelectorAll("*")) {{
                    found.push(element);
                    if (element.shadowRoot) look(element.shadowRoot);
                }}
            }})(document);
            {script}
        """)

    def each(self, selector, expression):
        """Value of a JavaScript expression for each element `e` that a CSS selector selects."""
        return self.run(f"return found.filter(e => e.matches(`{selector}`)).map(e => {expression})")

    def wait_for_text(self, *parts):
        wait_for(lambda: all(part in self.text for part in parts))


@pytest.fixture
def show(chromium, address):
    """Opens a tab; takes a picture of it when the test ends, and looks for errors."""
    opened = []

    def open_tab(name):
        opened.append(name)
        chromium.get("about:blank")  # else only the part after # changes, and nothing is loaded
        chromium.get(f"{address}#{name}")
        return Tab(chromium)

    yield open_tab
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    chromium.save_screenshot(str(SCREENSHOTS / f"{opened[-1]}.png"))
    errors = [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_browser_time_series_shows_every_run(show, rates):
    tab = show("timeseries")
    tab.wait_for_text(*RUN_NAMES, "evaluation", "success_rate")
    # Each run's row in the table below the chart of a success rate.
    for name, rate in rates.items():
        wait_for(lambda row=f"{name}\n{rate:g}\n{rate:g}\n": row in tab.text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_browser_scalars_are_drawn(show):
    tab = show("scalars")
    tab.wait_for_text(*RUN_NAMES, f"tag: {SUCCESS}")
    wait_for(lambda: len(tab.each("circle, path.symbol", "1")) >= len(RUN_NAMES))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_browser_hparams_has_the_columns_that_vary_and_sorts_by_success(show, rates):
    tab = show("hparams")

    def table():
        """Texts of the heads, and of each run's row."""
        cells = [
            text for text in tab.each("vaadin-grid-cell-content", "e.innerText.trim()") if text
        ]
        starts = [i for i, text in enumerate(cells) if text in RUN_NAMES]
        rows = [cells[i:j] for i, j in itertools.pairwise([*starts, len(cells)])]
        return cells[: starts[0] if starts else None], rows

    heads, rows = wait_for(lambda: (found := table()) and len(found[1]) == 4 and found)
    assert heads[2:] == [SEED, "trainer.max_steps", *METRICS]
    shown = {row[0]: [float(value) for value in row[1:4]] for row in rows}
    for name in RUN_NAMES:
        steps, seed = map(float, re.findall(r"\d+", name))
        assert shown[name][:2] == [seed, steps]
        assert shown[name][2] == pytest.approx(rates[name], abs=1e-4)

    def choose(menu, item):
        tab.run(f"""
            const menu = found.find(
                e => e.matches("paper-dropdown-menu") && e.label === "{menu}");
            const items = [...menu.querySelectorAll("paper-item")];
            items.find(e => e.innerText.trim() === "{item}").click();
        """)

    choose("Sort by", SUCCESS)
    for direction in ("Descending", "Ascending"):
        choose("Direction", direction)
        wanted = sorted(rates.values(), reverse=direction == "Descending")
        wait_for(lambda wanted=wanted: [rates[row[0]] for row in table()[1]] == wanted)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_browser_custom_scalars_draw_success_with_its_interval(show, address):
    tab = show("custom_scalars")
    tab.wait_for_text(*RUN_NAMES, "chunked", "L1", "KL and active units", "Matches (4)")
    # The margin of each run, with an extent: TensorBoard also draws what it has no values of.
    heights = wait_for(lambda: tab.each("path.area", "e.getBBox().height"))
    assert len(heights) == len(RUN_NAMES)
    assert min(heights) > 10
    asked = f"{address}data/plugin/custom_scalars/scalars?run=max_steps%3D{STEPS[1]}/seed_0&tag="
    shown = fetch(asked + quote("(rollout/chunked/success_low)|(^val/kl$)"))["tag_to_events"]
    assert set(shown) == {"rollout/chunked/success_low", "val/kl"}, "and not val/kl_max_dim"
    assert [step for _, step, _ in shown["val/kl"]] == [STEPS[1] // 2, STEPS[1]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_browser_images_are_loaded(show):
    tab = show("images")
    tab.wait_for_text(*RUN_NAMES, "rollout/chunked/failure")
    wait_for(lambda: len(tab.each("img", "1")) >= 4)
    widths = wait_for(lambda: min(found := tab.each("img", "e.naturalWidth")) and found)
    assert min(widths) > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_browser_text_has_the_configuration_and_what_differs(show):
    tab = show("text")
    tab.wait_for_text("config/all", "config/changed")
    wait_for(lambda: ["data.batch_size", "64", "16"] in tab.each("tr", "e.innerText.split(`\\t`)"))
    codes = [text for text in tab.each("code", "e.innerText") if "seed_everything" in text]
    assert len(codes) == len(RUN_NAMES)
    assert yaml.safe_load(codes[0])["data"]["batch_size"] == 16
