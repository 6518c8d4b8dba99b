"""What a run says of where it comes from."""

import json
import shlex
import subprocess

import pytest
import torch

from act_lightning import __version__, provenance
from act_lightning.provenance import read_provenance, write_provenance

ARGUMENTS = ["--config=a b.yaml", "--run", "seed_0"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A package in a folder of a repository, which stands in for this one."""
    package = tmp_path / "checkout" / "act_lightning"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    (package / "weights.bin").write_bytes(bytes(range(256)))
    (package.parent / "notes.md").write_text("notes\n")
    (package.parent / ".gitignore").write_text("*.log\n")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "sys", Modules(package / "__init__.py"))
    return package.parent


class Modules:
    """Stands in for `sys`, where the package is found."""

    def __init__(self, file):
        self.modules = {"act_lightning": type("Module", (), {"__file__": str(file)})}


def git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_what_a_run_says(repository, run):
    write_provenance(run, ARGUMENTS, resumes=False)
    record = json.loads((run / "run.json").read_text())
    assert record == read_provenance(run)
    assert record["arguments"] == ARGUMENTS
    assert shlex.split(record["command"]) == ["python", "-m", "act_lightning", "fit", *ARGUMENTS]
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["act_lightning"] == __version__
    assert {"python", "lightning", "numpy", "mujoco"} <= record["versions"].keys()
    assert "pytest" not in record["versions"]
    assert record["machine"]["torch_threads"] == torch.get_num_threads()
    head = git(repository, "rev-parse", "HEAD").strip()
    assert record["git"] == {"commit": head, "dirty": False, "untracked": []}
    assert [path.name for path in run.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "settings", [[], ["color.ui=always", "diff.noprefix=true", "diff.relative=true"]]
)
def test_the_patch_makes_the_commit_what_it_was(repository, run, tmp_path, settings):
    """Also where git is told to show differences otherwise."""
    for setting in settings:
        git(repository, "config", *setting.split("="))
    package = repository / "act_lightning"
    (package / "__init__.py").write_text("a = 1\nb = 2\n")
    (package / "weights.bin").write_bytes(bytes(range(255, -1, -1)))
    (package / "new.py").write_text("c = 3\n")
    (package / "some.log").write_text("ignored\n")
    (repository / "notes.md").write_text("other notes\n")
    write_provenance(run, ARGUMENTS, resumes=False)
    state = read_provenance(run)["git"]
    assert state["dirty"]
    assert state["untracked"] == ["act_lightning/new.py"]
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(repository), str(clone))
    git(clone, "checkout", "-q", state["commit"])
    git(clone, "apply", str(run / "uncommitted.patch"))
    for name in ("__init__.py", "weights.bin"):
        assert (clone / "act_lightning" / name).read_bytes() == (package / name).read_bytes()
    assert (clone / "notes.md").read_text() == "notes\n"  # nothing that runs
    git(repository, "checkout", "-q", ".")
    (package / "new.py").unlink()
    write_provenance(run, ARGUMENTS, resumes=False)
    assert not (run / "uncommitted.patch").exists()


def test_outside_of_a_repository_there_is_no_state(repository, run, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere" / "act_lightning"
    elsewhere.mkdir(parents=True)
    monkeypatch.setattr(provenance, "sys", Modules(elsewhere / "__init__.py"))
    write_provenance(run, ARGUMENTS, resumes=False)
    assert read_provenance(run)["git"] is None


def test_installed_below_somebody_elses_repository_there_is_no_state(repository, run, monkeypatch):
    (repository / ".gitignore").write_text("site\n")
    site = repository / "site" / "act_lightning"
    site.mkdir(parents=True)
    (site / "__init__.py").touch()
    monkeypatch.setattr(provenance, "sys", Modules(site / "__init__.py"))
    write_provenance(run, ARGUMENTS, resumes=False)
    assert read_provenance(run)["git"] is None


def test_a_resumed_run_keeps_its_beginning(repository, run):
    (repository / "act_lightning/__init__.py").write_text("a = 2\n")
    write_provenance(run, ARGUMENTS, resumes=False)
    begun, patch = read_provenance(run), (run / "uncommitted.patch").read_bytes()
    git(repository, "checkout", "-q", ".")
    for _ in range(2):
        write_provenance(run, ["--config=run/config.yaml", "--ckpt_path=last.ckpt"], resumes=True)
    resumed = read_provenance(run)
    again = resumed.pop("resumed")
    assert resumed == begun
    assert (run / "uncommitted.patch").read_bytes() == patch
    assert [entry["git"]["dirty"] for entry in again] == [False, False]
    assert "--ckpt_path=last.ckpt" in again[0]["command"]
    write_provenance(run, ARGUMENTS, resumes=False)
    assert read_provenance(run).keys() == begun.keys()


def test_a_run_that_says_nothing_and_a_damaged_one(run):
    assert read_provenance(run) is None
    for content in ("{", "[]", '{"command": "x"}'):
        (run / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run.json is damaged .* delete the run's folder"):
            read_provenance(run)
