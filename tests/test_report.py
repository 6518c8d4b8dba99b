"""Reports, end to end on made-up runs: the numbers, the pages, the plots, and what is refused."""

import io
import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import curves, write_events, write_results

from act_lightning.main import main
from act_lightning.sim.results import wilson_interval
from act_lightning.study.report.contents import make_page
from act_lightning.study.report.findings import conclusions, find
from act_lightning.study.report.over_steps import success_over_steps
from act_lightning.study.report.pages import to_markdown
from act_lightning.study.report.plots import COLOURS, Axis, draw_curves
from act_lightning.study.report.reading import read_folders, read_study_runs
from act_lightning.study.statistics import hierarchical_bootstrap, holm, mcnemar_exact
from act_lightning.study.study import read_study

STUDY = """
title: Weights
question: Does the weight decide it?
experiment: insertion_state
settings: {trainer.max_steps: 800}
grid: {model.net.init_args.weight: [1, 10, 100]}
seeds: [0, 1, 2]
"""
RATES = {"weight=1": 0.5, "weight=10": 0.95, "weight=100": 0.52}
WORLDS = 60


def warn_as_errors():
    warnings.simplefilter("error")
    # Not of what other tests left, and is collected only now.
    warnings.simplefilter("ignore", ResourceWarning)
    warnings.simplefilter("ignore", pytest.PytestUnraisableExceptionWarning)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warn_as_errors()
        yield


def training(study, variant, seed, **changes):
    return {
        "experiment": f"studies/{study}/{variant}",
        "seed": seed,
        "max_steps": 800,
        "num_parameters": 123456,
        "cpu_seconds": 150.0,
        "device": "cpu",
        "num_devices": 1,
    } | changes


def write_study(root, extra="", interrupted=(), missing=()):
    """A study's file and runs; returns the file, and (S, W) chunked outcomes by variant."""
    file = root / "weights.yaml"
    file.write_text(STUDY + extra)
    rng = np.random.default_rng(0)
    played = {}
    for i, (variant, rate) in enumerate(RATES.items()):
        for seed in range(3):
            label = f"{variant}/seed_{seed}"
            folder = root / "runs/studies/weights" / label
            chunked, ensembled = rng.random((2, WORLDS)) < [[rate], [rate + 0.02]]
            logged = curves(rng, kl=3.0 / 10**i)
            if label in missing:
                continue
            if label in interrupted:
                logged = {
                    tag: {step: value for step, value in values.items() if step <= 400}
                    for tag, values in logged.items()
                }
            else:
                played.setdefault(variant, []).append((chunked, ensembled))
                write_results(
                    folder,
                    {"chunked": chunked, "ensembled": ensembled},
                    smooth=2.0 + seed,
                    chunk_size=8 * (i + 1),
                    latent={"kl": 3.0 / 10**i, "active_units": 2 - i},
                    training=training("weights", variant, seed),
                )
            write_events(folder, logged)
    return file, {
        variant: np.stack([chunked for chunked, _ in outcomes])
        for variant, outcomes in played.items()
    }


def rows_of(markdown, heading):
    """Cells of the tables of a section."""
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def percent(interval, sign=""):
    return f"\\[{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}\\]"


class Links(HTMLParser):
    """Everything that a page asks for, and the elements it is made of."""

    def __init__(self, page):
        super().__init__()
        self.urls, self.tags = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.urls += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A study without reference, one run of it interrupted, one missing; its report, printed."""
    root = tmp_path_factory.mktemp("study")
    file, played = write_study(root, interrupted=["weight=100/seed_2"], missing=["weight=1/seed_1"])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warn_as_errors()
        patch.chdir(root)
        assert main(["compare", "--study", str(file)]) == 0
    folder = root / "runs/studies/weights/report"
    return folder, (folder / "report.md").read_text(), played


def test_the_numbers_are_those_of_the_statistics(reported):
    _, markdown, played = reported
    rows = {row[0]: row for row in rows_of(markdown, "Summary") if row[1] == "chunked"}
    for variant, outcomes in played.items():
        estimate = hierarchical_bootstrap(outcomes)
        assert rows[variant][2:5] == [
            str(len(outcomes)),
            f"{outcomes.mean():.1%}",
            percent(estimate.interval),
        ]


def test_all_pairs_are_compared_and_adjusted_together(reported):
    _, markdown, played = reported
    rows = [row for row in rows_of(markdown, "Differences") if row[0] == "chunked"]
    expected = {
        pair: hierarchical_bootstrap(played[pair[0]], played[pair[1]])
        for pair in combinations(RATES, 2)
    }
    assert [tuple(row[1:3]) for row in rows] == list(expected)
    for row, test in zip(rows, expected.values(), strict=True):
        assert row[4] == f"{100 * test.mean:+.1f}"
        assert row[5] == percent(test.interval, "+")
        shown = "\\<0.001" if test.p_value < 0.001 else f"{test.p_value:.2g}"
        assert row[6] == shown
    every = [row for row in rows_of(markdown, "Differences") if row[0] in ("chunked", "ensembled")]
    assert "6 comparisons between variants" in markdown
    adjusted = holm([float(row[6].replace("\\<", "")) for row in every])
    for row, value in zip(every, adjusted, strict=True):
        if not row[6].startswith("\\<"):
            assert float(row[7]) == pytest.approx(value, rel=0.1)


def test_what_is_missing_is_said(reported):
    _, markdown, _ = reported
    assert "Not begun: weight=1/seed\\_1." in markdown
    assert "weight=100/seed\\_2 was interrupted at step 400 of 800, or still runs" in markdown
    assert "No latent dimension is active in any run of weight=100." in markdown


def test_the_page_holds_its_pictures_and_asks_for_nothing(reported):
    folder, markdown, _ = reported
    page = (folder / "report.html").read_text()
    links = Links(page)
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 6
    assert len(links.urls) == len(pictures)
    assert all(url.startswith("data:image/png;base64,") for url in links.urls)
    assert not links.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import", re.sub(r'src="[^"]*"', "", page))
    for path in pictures:
        assert f"]({path.name})" in markdown
        assert path.stat().st_size < 60_000
        assert np.ptp(np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"))) > 200


def test_the_same_runs_give_the_same_bytes_and_old_plots_go(reported, tmp_path, monkeypatch):
    folder, _, _ = reported
    monkeypatch.chdir(folder.parents[3])
    (tmp_path / "modes_over_steps.png").write_bytes(b"of an earlier report")
    (tmp_path / "mine.png").write_bytes(b"of the reader")
    assert main(["compare", "--study", "weights.yaml", "--out", str(tmp_path)]) == 0
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert again == files | {"mine.png": b"of the reader"}


def test_other_sections_say_what_was_measured(reported):
    _, markdown, _ = reported
    errors = {row[0]: row[1:] for row in rows_of(markdown, "Prediction error by horizon")}
    assert errors["weight=10"][:3] == ["16", "0.100", "-"]
    smooth = {tuple(row[:2]): row[2:] for row in rows_of(markdown, "Smoothness")}
    assert smooth["weight=10", "chunked"][4] == "3 (2 to 4)"
    cost = {row[0]: row[1:] for row in rows_of(markdown, "Time and cost")}
    assert cost["weight=1"][:3] == ["1 x cpu", "123,456", "800"]
    latent = {row[0]: row[1:] for row in rows_of(markdown, "Latent")}
    assert latent["weight=10"][:3] == ["800", "0.3", "1"]
    assert "## Modes" not in markdown


def test_a_reference_is_what_all_are_compared_with(tmp_path, monkeypatch, capsys):
    file, played = write_study(tmp_path, "report: {reference: weight=1}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["compare", "--study", str(file), "--execution", "chunked"]) == 0
    out = capsys.readouterr().out
    test = hierarchical_bootstrap(played["weight=10"], played["weight=1"])
    low, high = test.interval
    assert (
        f"chunked: weight=10 is better than weight=1 by {100 * test.mean:.1f} points "
        f"[{100 * low:.1f}, {100 * high:.1f}]; "
    ) in out
    assert "adjusted for 2 comparisons), over 3 training seeds in 60 worlds." in out
    assert "chunked: no difference between weight=100 and weight=1 was shown" in out
    markdown = Path("runs/studies/weights/report/report.md").read_text()
    assert [row[0] for row in rows_of(markdown, "Differences")[2:]] == ["weight=10", "weight=100"]


def test_ways_of_executing_are_compared_within_the_same_policies(tmp_path):
    rng = np.random.default_rng(3)
    chunked = rng.random((3, WORLDS)) < [[0.4], [0.6], [0.8]]
    ensembled = chunked.copy()
    for row in ensembled:
        row[np.flatnonzero(~row)[:9]] = True
    for i in range(3):
        played = {"chunked": chunked[i], "ensembled": ensembled[i]}
        write_results(tmp_path / f"act/seed_{i}", played)
    findings = find(read_folders(sorted((tmp_path / "act").iterdir())))
    assert findings.variants == ()
    (difference,) = findings.ways
    expected = hierarchical_bootstrap(ensembled, chunked, same_policies=True)
    assert (difference.within, difference.first, difference.second) == (
        "act",
        "ensembled",
        "chunked",
    )
    assert difference.p_value == difference.p_holm == expected.p_value
    assert difference.interval == expected.interval
    assert "act: ensembled is better than chunked" in " ".join(conclusions(findings))
    # Paired by world alone, as two ways of training are, this could not be told.
    assert hierarchical_bootstrap(ensembled, chunked).p_value > 0.05 > expected.p_value


def test_single_runs_are_compared_as_the_policies_they_are(tmp_path, capsys):
    rng = np.random.default_rng(1)
    outcomes = {name: rng.random(WORLDS) < rate for name, rate in {"a": 0.3, "b": 0.9}.items()}
    for name, values in outcomes.items():
        write_results(tmp_path / name / "version_0", {"chunked": values}, latent=None)
    runs = [str(tmp_path / name / "version_0") for name in "ab"]
    assert main(["compare", *runs, "--report", str(tmp_path / "out")]) == 0
    test = mcnemar_exact(outcomes["a"], outcomes["b"])
    assert f"b is better than a by {-100 * test.difference:.1f} points" in (
        text := " ".join(capsys.readouterr().out.split())
    )
    assert "of these two policies in 60 worlds" in text
    markdown = (tmp_path / "out/report.md").read_text()
    low, high = wilson_interval(int(outcomes["a"].sum()), WORLDS)
    assert f"\\[{100 * low:.1f}, {100 * high:.1f}\\]" in markdown
    for absent in ("Latent", "Success over steps", "Prediction error", "Modes", "Smoothness"):
        assert f"## {absent}" not in markdown


def test_one_run_of_a_variant_is_not_compared_with_several(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("a/0", "a/1", "b/0"):
        write_results(tmp_path / name, {"chunked": rng.random(WORLDS) < 0.5})
    findings = find(read_folders([tmp_path / name for name in ("a/0", "a/1", "b/0")]))
    assert findings.variants == ()
    assert findings.remarks[0].startswith("b has one training seed")


def test_runs_in_other_worlds_are_refused(tmp_path, monkeypatch, capsys):
    file, _ = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    other = Path("runs/studies/weights/weight=100/seed_1")
    path = other / "results.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"worlds": report["worlds"][:-1]}))
    assert main(["compare", "--study", str(file)]) == 1
    error = capsys.readouterr().err
    assert f"runs/studies/weights/weight=1/seed_0 and {other} were evaluated in 60 and 59" in error
    report["config"]["env"]["object_grid"] = 8
    path.write_text(json.dumps(report))
    assert main(["compare", "--study", str(file)]) == 1
    error = capsys.readouterr().err
    assert f"{other} played in other worlds: object_grid 0 and 8" in error
    assert not Path("runs/studies/weights/report").exists()


def test_runs_that_share_no_way_of_executing_have_to_share_their_worlds(tmp_path):
    outcomes = np.ones(WORLDS, bool)
    write_results(tmp_path / "a/0", {"chunked": outcomes})
    write_results(tmp_path / "b/0", {"ensembled": outcomes})
    folders = [tmp_path / "a/0", tmp_path / "b/0"]
    assert "Not played chunked: b/0." in read_folders(folders).remarks
    write_results(folders[1], {"ensembled": outcomes}, first_seed=5)
    with pytest.raises(ValueError, match="60 and 60 worlds, of which 120 are not common to both"):
        read_folders(folders)


def test_an_interrupted_run_is_shown_as_far_as_it_came(tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_events(tmp_path / "a/seed_0", curves(rng, steps=(100, 200)))
    assert main(["compare", str(tmp_path / "a/seed_0"), "--report", str(tmp_path / "out")]) == 0
    assert "a/seed_0 was interrupted at step 200, or still runs" in capsys.readouterr().out
    markdown = (tmp_path / "out/report.md").read_text()
    assert "## Success over steps" in markdown
    assert "## Differences" not in markdown
    assert "## Conclusions" not in markdown


def test_runs_older_than_the_report(tmp_path):
    """No config, no training, no prediction, no event files."""
    for name in ("a/0", "b/0"):
        outcomes = np.arange(WORLDS) % 3 == 0
        write_results(tmp_path / name, {"chunked": outcomes}, config=None, training=None,
                      latent=None, split=None)  # fmt: skip
    runs = [str(tmp_path / name) for name in ("a/0", "b/0")]
    assert main(["compare", *runs, "--report", str(tmp_path / "out")]) == 0
    markdown = (tmp_path / "out/report.md").read_text()
    assert "a/0, b/0: evaluated before the settings" in markdown
    assert rows_of(markdown, "Time and cost")[2][1:6] == ["-", "-", "-", "800", "90 s"]


def test_runs_made_otherwise_than_planned_are_named(tmp_path, monkeypatch):
    file, _ = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    study = read_study(file)
    assert read_study_runs(study).remarks == ()
    path = Path("runs/studies/weights/weight=10/seed_1/results.json")
    report = json.loads(path.read_text())
    report["training"] |= {"max_steps": 400, "seed": 7}
    path.write_text(json.dumps(report))
    remarks = read_study_runs(study).remarks
    start = "weight=10/seed_1 was made with other settings than planned: "
    assert f"{start}max_steps 400, not 800." in remarks
    assert f"{start}seed 7, not 1." in remarks
    assert any(remark.startswith("The runs were not trained equally long.") for remark in remarks)


def test_checkpoints_before_the_last_step_are_named(tmp_path):
    rng = np.random.default_rng(0)
    for seed, step in ((0, 800), (1, 600)):
        made = training("weights", "a", seed)
        write_results(tmp_path / f"a/{seed}", {"chunked": rng.random(WORLDS) < 0.5}, step=step,
                      training=made)  # fmt: skip
        write_events(tmp_path / f"a/{seed}", curves(rng) | {"rollout/share": {400: 0.9, 800: 0.25}})
    runs = read_folders([tmp_path / "a/0", tmp_path / "a/1"])
    (remark,) = runs.remarks
    assert "is not the last of a/1 (best, step 600 of 800): their KL" in remark
    page = to_markdown(make_page(runs, find(runs)))
    assert rows_of(page, "Latent")[2][1] == "600, 800"
    headings, _, row = rows_of(page, "Time and cost")
    shown = dict(zip(headings, row, strict=True))
    assert (shown["evaluated at step"], shown["rollouts' share"]) == ("600, 800", "25%")


def test_training_seeds_that_all_do_the_same_are_not_taken_for_certain(tmp_path):
    rng = np.random.default_rng(0)
    rates = {"all": 1.0, "none": 0.0, "some": 0.5}
    for name, rate in rates.items():
        for seed in range(2):
            outcomes = {"chunked": rng.random(WORLDS) < rate}
            write_results(tmp_path / name / f"{seed}", outcomes)
    findings = find(read_folders([tmp_path / name / seed for name in rates for seed in "01"]))
    (remark,) = findings.remarks
    assert remark.startswith(
        "All training seeds have the same rate: all (chunked), none (chunked). Their intervals"
    )


def test_runs_that_are_no_seeds_of_one_variant_are_named(tmp_path):
    rng = np.random.default_rng(0)
    changes = {
        "a/0": {"seed": 0},
        "a/1": {"seed": 1},
        "b/0": {"seed": 0},
        "b/1": {"seed": 0},
        "b/2": {"seed": 1, "num_parameters": 9},
    }
    for name, changed in changes.items():
        variant = name.split("/")[0]
        same = {"checkpoint_sha256": "0"} if name in ("a/1", "b/0", "b/1") else {}
        write_results(tmp_path / name, {"chunked": rng.random(WORLDS) < 0.5},
                      training=training("s", variant, **changed), **same)  # fmt: skip
    assert read_folders([tmp_path / name for name in changes]).remarks == (
        "a/1, b/0 and b/1 are the same checkpoint.",
        "b: runs with the same training seed (0) count as several; intervals and p-values take "
        "them for independent.",
        "b: its runs differ in num_parameters (123456, 9), so they are not one way of training.",
    )


def test_a_variant_without_evaluation_is_shown_by_its_last_validation(tmp_path):
    rng = np.random.default_rng(0)
    write_results(tmp_path / "a/0", {"chunked": rng.random(WORLDS) < 0.5})
    logged = curves(rng, steps=(200, 400))
    write_events(tmp_path / "b/0", logged | {"train/loss": {199: 2.0, 449: 1.0}})
    runs = read_folders([tmp_path / "a/0", tmp_path / "b/0"])
    (remark,) = runs.remarks
    assert remark == (
        "b/0 was interrupted at step 450 of 800, or still runs: it is in the curves and, as no run "
        "of its variant is evaluated, with its last validation in the tables of KL, L1 and modes."
    )
    page = to_markdown(make_page(runs, find(runs)))
    assert rows_of(page, "Summary")[3] == ["b", "0", "-", "-", "-", "-", "-"]
    assert rows_of(page, "Latent")[3][:3] == ["b", "-", f"{logged['val/kl'][400]:.3g}"]


def test_runs_evaluated_before_their_training_ended_are_named(tmp_path):
    rng = np.random.default_rng(0)
    for name, steps in (("a/0", (200, 300)), ("a/1", (200, 790))):
        write_results(tmp_path / name, {"chunked": rng.random(WORLDS) < 0.5},
                      training=training("s", "a", int(name[-1])))  # fmt: skip
        write_events(tmp_path / name, curves(rng, steps=steps))
    (remark,) = read_folders([tmp_path / "a/0", tmp_path / "a/1"]).remarks
    assert remark == (
        "a/0 was evaluated, though its training only came to step 300 of 800; its success counts "
        "like the others'."
    )


def test_single_runs_are_not_taken_for_ways_of_training(tmp_path):
    rng = np.random.default_rng(0)
    for name, rate in {"a": 0.2, "b": 0.9}.items():
        write_results(tmp_path / name / "0", {"chunked": rng.random(WORLDS) < rate})
    findings = find(read_folders([tmp_path / name / "0" for name in "ab"]))
    best, better = conclusions(findings)
    assert best.endswith("of b (one training seed).")
    assert better.endswith(
        "of these two policies in 60 worlds; of one training seed each, so it may be chance which "
        "training came out well."
    )
    (remark,) = findings.remarks
    assert remark.startswith("One training seed only: a, b; intervals and p-values there")


def test_success_over_steps_of_one_variant_by_way_of_executing(tmp_path):
    rates = {"chunked": (0.2, 0.4), "ensembled": (0.6, 0.9)}
    steps = (100, 200)
    logged = {
        f"rollout/{way}/success_rate": dict(zip(steps, rates[way], strict=True)) for way in rates
    }
    write_events(tmp_path / "a/0", logged | {"rollout/success_rate": {100: 0.4, 200: 0.65}})
    write_results(tmp_path / "a/0", {way: np.ones(WORLDS) for way in rates})
    section = success_over_steps(read_folders([tmp_path / "a/0"]))
    wanted = {
        way: [(np.array(steps, float), np.array(values, np.float32).astype(float))]
        for way, values in rates.items()
    }
    axis = Axis(label="success rate", limits=(-0.03, 1.03))
    (picture,) = section.pictures
    assert picture.content == draw_curves(wanted, Axis(label="optimizer steps"), axis)
    assert "by way of executing" in picture.caption


def test_a_curve_of_one_place_shows_its_range_beside_the_others():
    def drawn(*values):
        members = [(np.ones(1), np.array([value])) for value in values]
        axes = Axis(label="x"), Axis(label="y", limits=(-0.2, 1.2))
        content = draw_curves({"a": members, "b": members}, *axes)
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)[:-70]
        for colour in COLOURS[:2]:
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            yield np.flatnonzero((np.abs(pixels - wanted).max(axis=2) < 40).any(axis=1))

    assert all(0 < np.ptp(rows) < 20 for rows in drawn(0.5, 0.5))
    assert all(np.ptp(rows) > 200 for rows in drawn(0.0, 1.0))


def test_runs_measured_at_other_steps_count_from_their_first_to_their_last():
    def draw(*members):
        curve = [(np.array(places, float), np.array(values, float)) for places, values in members]
        return draw_curves({"a": curve}, Axis(label="x"), Axis(label="y"))

    assert draw(([0, 2, 4], [0, 2, 8]), ([1, 3], [3, 9])) == draw(
        ([0, 1, 2, 3, 4], [0, 1, 2, 5, 8]), ([1, 2, 3], [3, 6, 9])
    )


def test_modes_of_a_run(tmp_path):
    for seed, share in ((0, 0.5), (1, 0.7)):
        folder = tmp_path / f"act/seed_{seed}"
        write_events(
            folder,
            {
                "val/modes/within_tolerance": {100: 0.2, 200: share},
                "val/modes/share_0": {100: 1.0, 200: 0.25},
            },
        )
        write_results(folder, {"chunked": np.ones(WORLDS)})
    main(["compare", *map(str, (tmp_path / "act").iterdir()), "--report", str(tmp_path / "out")])
    rows = rows_of((tmp_path / "out/report.md").read_text(), "Modes")
    assert rows[0] == ["variant", "within tolerance", "share 0"]
    assert rows[2] == ["act", "0.60 (0.50 to 0.70)", "0.25"]
    assert (tmp_path / "out/modes_over_steps.png").is_file()


def test_names_are_text_everywhere(tmp_path):
    names = ["_$x^2$", "<img src=x onerror=alert(1)>", "a|b*c*", "[l](http:evil)"]
    rng = np.random.default_rng(0)
    for name in names:
        folder = tmp_path / "runs" / name / "0"
        write_events(folder, curves(rng))
        write_results(folder, {"chunked": rng.random(WORLDS) < 0.5})
    runs = [str(tmp_path / "runs" / name / "0") for name in names]
    assert main(["compare", *runs, "--report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert all(url.startswith("data:image/png") for url in Links(page).urls)
    markdown = (tmp_path / "out/report.md").read_text()
    assert "\\<img src=x onerror=alert(1)\\>" in markdown
    assert "<img" not in markdown.replace("\\<", "")
    assert "a\\|b\\*c\\*" in markdown
    assert "[l](http" not in markdown.replace("\\[", "").replace("\\]", "")


def test_a_name_in_a_legend_is_not_taken_for_mathematics():
    def draw(name):
        curve = (np.arange(3.0), np.arange(3.0))
        picture = draw_curves({name: [curve], "b": [curve]}, Axis(label="x"), Axis(label="y"))
        return np.asarray(Image.open(io.BytesIO(picture)).convert("L"))

    def legend_width(name):
        dark = (draw(name)[-60:] < 200).any(axis=0)
        return np.ptp(np.flatnonzero(dark))

    assert legend_width("_$x$") > legend_width("_") + 10


def test_what_cannot_be_reported_on(tmp_path, monkeypatch, capsys):
    file, _ = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("runs")
    assert main(["compare", "--study", str(file)]) == 1
    assert "no run of study weights has begun" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for run, message in (("empty", "neither results.json nor event"), ("none", "does not exist")):
        assert main(["compare", run, "--report", "out"]) == 1
        assert message in capsys.readouterr().err
    assert main(["compare", "--study", "none.yaml"]) == 1
    assert "none.yaml" in capsys.readouterr().err
    for wrong in (["run", "--study", str(file)], ["run", "--report", "out", "--json"]):
        with pytest.raises(SystemExit) as exit_:
            main(["compare", *wrong])
        assert exit_.value.code == 2


@pytest.mark.slow
def test_a_study_of_36_runs_has_all_its_comparisons(tmp_path):
    """Twelve variants, all pairs, so 66 comparisons; event files of 450 values each."""
    rng = np.random.default_rng(0)
    runs = [tmp_path / f"variant_{i:02}/seed_{seed}" for i in range(12) for seed in range(3)]
    for run in runs:
        write_events(run, curves(rng, steps=range(0, 3000, 20)))
        write_results(run, {"chunked": rng.random(200) < 0.7}, smooth=2.0, chunk_size=100)
    assert main(["compare", *map(str, runs), "--report", str(tmp_path / "out")]) == 0
    assert "66 comparisons between variants" in (tmp_path / "out/report.md").read_text()
