"""The Makefile and .ci/setup, in a copy of the checkout with stand-ins for Python, pip and apt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = (
    "setup",
    "data",
    "train",
    "slurm",
    "resume",
    "eval",
    "watch",
    "compare",
    "test",
    "test-cluster",
    "lerobot-env",
    "test-lerobot",
    "lint",
    "type",
    "tensorboard",
    "clean",
)

ALOHA, PUSHT = "pip --no-deps gym-aloha>=0.1.3", "pip --no-deps gym-pusht>=0.1.8,<0.2"
INSTALL = ["pip", PUSHT]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Stands in for the Python of .venv, and for the one that makes .venv: logs what is asked of it.
STUB_PYTHON = """\
#!/usr/bin/env bash
case "$*" in
    *"print(sys.version_info[1])") echo "${MINOR:-12}" ;;
    "-m pip install --no-deps"*) echo "pip ${*:4}" >>"$LOG"; [ ! -e fail_pip_no_deps ] ;;
    "-m pip install"*) echo pip >>"$LOG"; [ ! -e fail_pip ] ;;
    "-m pip --version") ;;
    "-m act_lightning.sim.opengl")
        echo opengl >>"$LOG"
        [ -e opengl_is_there ] || { cat opengl_message >&2; exit 1; }
        echo "OpenGL: osmesa" ;;
    "-m venv "*) echo venv >>"$LOG"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Checkout:
    """A copy of the files under test, with stand-ins for what they call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log"
        for name in ("Makefile", "pyproject.toml", ".ci/setup"):
            target = path / name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, target)
        for name in ("base", "debug", "paper/insertion", "studies/chunk"):
            file = path / "experiments" / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        self.add_program("python-stub", STUB_PYTHON)
        self.be_root(False)
        (path / "opengl_is_there").touch()
        (path / "opengl_message").write_text("OpenGL: none; `apt-get install libosmesa6`\n")

    def add_program(self, name: str, text: str) -> None:
        program = self.path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(textwrap.dedent(text))
        program.chmod(0o755)

    def be_root(self, yes: bool) -> None:
        self.add_program("id", f"#!/bin/sh\necho {0 if yes else 1000}\n")
        self.add_program("apt-get", '#!/bin/sh\necho "apt $*" >>"$LOG"\ntouch opengl_is_there\n')

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        # Under `make test ARGS=...`, make's own variables would reach the make under test.
        inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "EXP", "RUN", "RUNS", "STUDY", "JOBS"}
        inherited |= {"ARGS", "EPISODES", "DEVICES", "NODES", "GPUS", "SEEDS", "TIME", "PARTITION"}
        inherited |= {"DRY"}
        env = {name: value for name, value in os.environ.items() if name not in inherited}
        env |= {
            "PATH": f"{self.path / 'bin'}:{env['PATH']}",
            "PYTHON_BASE": str(self.path / "bin/python-stub"),
            "REAL_PYTHON": sys.executable,
            "LOG": str(self.log),
        }
        return subprocess.run(
            command, cwd=self.path, env=env | variables, capture_output=True, text=True, timeout=60
        )

    def setup(self, **variables: str) -> list[str]:
        """Runs .ci/setup, which must succeed; returns what it called."""
        self.log.unlink(missing_ok=True)
        result = self.run(".ci/setup", **variables)
        assert result.returncode == 0, result.stderr
        return self.log.read_text().splitlines() if self.log.exists() else []

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text()
        assert old in text
        (self.path / name).write_text(text.replace(old, new))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_help_lists_every_target_and_experiment(checkout: Checkout) -> None:
    output = checkout.run("make").stdout
    assert output == checkout.run("make", "help").stdout
    for target in TARGETS:
        assert f"  make {target} " in output
    assert "debug paper/insertion\n" in output


@pytest.mark.parametrize(
    "exp", ["EXP=nope", "EXP=", "EXP=base", "EXP=studies/chunk", "EXP=%", "EXP=debug x"]
)
@pytest.mark.parametrize("target", ["train", "data"])
def test_unknown_experiment_lists_those_that_exist(
    checkout: Checkout, target: str, exp: str
) -> None:
    result = checkout.run("make", target, exp)
    assert result.returncode != 0
    assert f"{exp}: no such experiment; these exist: debug paper/insertion\n" in result.stderr
    assert not checkout.log.exists(), "nothing may be set up for an experiment that does not exist"


def test_every_experiment_of_this_checkout_is_listed() -> None:
    result = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True)
    listed = result.stdout.split("Experiments (EXP=):")[1].split("\n")[0].split()
    files = (ROOT / "experiments").rglob("*.yaml")
    names = {file.relative_to(ROOT / "experiments").with_suffix("").as_posix() for file in files}
    others = {"base", "executions"}
    assert set(listed) == {n for n in names - others if not n.startswith("studies/")}


def test_train_records_then_fits_with_overrides(checkout: Checkout) -> None:
    result = checkout.run(
        "make", "-n", "train", "EXP=paper/insertion", "ARGS=--trainer.max_steps=3"
    )
    configs = "--config experiments/base.yaml --config experiments/paper/insertion.yaml"
    calls = [line for line in result.stdout.splitlines() if "act_lightning" in line]
    assert calls == [
        f".venv/bin/python -m act_lightning {verb} {configs} --trainer.max_steps=3"
        for verb in ("record", "fit")
    ]


def test_devices_train_together(checkout: Checkout) -> None:
    result = checkout.run("make", "-n", "train", "EXP=debug", "DEVICES=2", "ARGS=--a=1")
    calls = [line for line in result.stdout.splitlines() if "act_lightning" in line]
    config = "--config experiments/debug.yaml"
    assert calls[0].endswith(f"{config} --a=1")  # demonstrations are recorded once
    assert calls[1].endswith(f"{config} --trainer.devices=2 --a=1")


def test_slurm_passes_on_what_a_job_asks_for(checkout: Checkout) -> None:
    def call(*variables: str) -> str:
        output = checkout.run("make", "-n", "slurm", "EXP=debug", *variables).stdout
        return output.splitlines()[-1].partition(" --config experiments/debug.yaml ")[2]

    assert call() == "--slurm gpus_per_node=1 "
    assert call("GPUS=0", "DRY=1", "ARGS=--tasks-per-node=2") == (
        "--dry-run --slurm --tasks-per-node=2"
    )
    asked = ("NODES=4", "GPUS=8", "SEEDS=0-4", "TIME=60", "PARTITION=big", "ARGS=--a=1")
    assert call(*asked) == (
        "--nodes=4 --seeds=0-4 --slurm gpus_per_node=8 timeout_min=60 partition=big --a=1"
    )


def test_a_folder_of_experiments_records_all_then_fits_each(checkout: Checkout) -> None:
    (checkout.path / "experiments/paper/transfer.yaml").touch()
    result = checkout.run("make", "-n", "train", "EXP=paper", "ARGS=--trainer.max_steps=3")
    calls = [line for line in result.stdout.splitlines() if "act_lightning" in line]
    assert calls == [
        f".venv/bin/python -m act_lightning {verb} --config experiments/base.yaml "
        f"--config experiments/paper/{name}.yaml --trainer.max_steps=3"
        for verb in ("record", "fit")
        for name in ("insertion", "transfer")
    ]
    part = checkout.run("make", "train", "EXP=pap")
    assert part.returncode != 0
    assert "EXP=pap: no such experiment" in part.stderr


def test_eval_and_resume_take_the_run_trained_last(checkout: Checkout) -> None:
    for age, name in enumerate(("b", "a")):
        run = checkout.path / "runs/debug" / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").touch()
        (run / "checkpoints/last.ckpt").touch()
        os.utime(run / "checkpoints/last.ckpt", (1000 - age, 1000 - age))
    newest = checkout.run("make", "-n", "eval", "EXP=debug", "EPISODES=5").stdout
    assert ".venv/bin/python -m act_lightning evaluate runs/debug/b --episodes 5" in newest
    resumed = checkout.run("make", "-n", "resume", "RUN=runs/debug/a").stdout
    assert "fit --config runs/debug/a/config.yaml" in resumed
    assert "--ckpt_path runs/debug/a/checkpoints/last.ckpt" in resumed
    unknown = checkout.run("make", "eval", "RUN=runs/debug/c")
    assert unknown.returncode != 0
    assert (
        "RUN=runs/debug/c: no run there; these exist: runs/debug/a runs/debug/b" in unknown.stderr
    )


def test_setup_is_done_once(checkout: Checkout) -> None:
    assert checkout.setup() == ["venv", *INSTALL, "opengl"]
    assert checkout.setup() == []


def test_setup_ignores_touched_files_and_comments(checkout: Checkout) -> None:
    checkout.setup()
    for file in checkout.path.rglob("*"):
        os.utime(file)
    checkout.edit("pyproject.toml", "[project]", "# a remark\n[project]")
    checkout.edit("pyproject.toml", "line-length = 100", "line-length = 99")
    assert checkout.setup() == []


def test_setup_installs_again_when_dependencies_change(checkout: Checkout) -> None:
    checkout.setup()
    checkout.edit("pyproject.toml", '"scipy>=', '"einops", "scipy>=')
    assert checkout.setup() == INSTALL
    assert checkout.setup() == []


def test_setup_installs_again_where_the_checkout_was_moved(checkout: Checkout) -> None:
    checkout.setup()
    moved = checkout.path / "moved"
    shutil.copytree(checkout.path, moved, ignore=shutil.ignore_patterns("moved"))
    elsewhere = Checkout.__new__(Checkout)
    elsewhere.path, elsewhere.log = moved, moved / "log"
    assert elsewhere.setup() == INSTALL


def test_interrupted_setup_is_mended(checkout: Checkout) -> None:
    (checkout.path / "fail_pip").touch()
    assert checkout.run(".ci/setup").returncode != 0
    (checkout.path / "fail_pip").unlink()
    assert checkout.setup() == [*INSTALL, "opengl"]
    (checkout.path / ".venv/bin/python").unlink()
    assert checkout.setup() == ["venv", *INSTALL]


def test_missing_opengl_is_installed_by_root(checkout: Checkout) -> None:
    (checkout.path / "opengl_is_there").unlink()
    checkout.be_root(True)
    package = "libegl1 libgl1" if os.path.exists("/dev/nvidiactl") else "libosmesa6"
    install = f"apt -qq install -y --no-install-recommends {package}"
    opengl = ["opengl", "apt -qq update", install, "opengl", "opengl"]
    assert checkout.setup() == ["venv", *INSTALL, *opengl]
    assert checkout.setup() == []


def test_missing_opengl_is_one_line_for_others(checkout: Checkout) -> None:
    (checkout.path / "opengl_is_there").unlink()
    result = checkout.run("make", "setup")
    assert result.returncode != 0
    assert "setup: OpenGL: none; `apt-get install libosmesa6`\n" in result.stderr
    assert result.stderr.count("libosmesa6") == 1
    assert "apt" not in checkout.log.read_text()
    (checkout.path / "opengl_is_there").touch()
    assert checkout.setup() == ["opengl"], "only what was missing is done again"


def test_apt_is_left_alone_when_something_else_is_broken(checkout: Checkout) -> None:
    (checkout.path / "opengl_is_there").unlink()
    (checkout.path / "opengl_message").write_text("OpenGL: No module named mujoco\n")
    checkout.be_root(True)
    result = checkout.run(".ci/setup")
    assert result.returncode != 0
    assert "No module named mujoco" in result.stderr
    assert "apt" not in checkout.log.read_text()


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_what_has_no_wheels_for_all_it_needs_comes_alone(checkout: Checkout, minor: int) -> None:
    alone = {11: [PUSHT], 12: [PUSHT], 13: [ALOHA, PUSHT], 14: [ALOHA]}[minor]
    assert checkout.setup(MINOR=str(minor)) == ["venv", "pip", *alone, "opengl"]
    assert checkout.setup(MINOR=str(minor)) == []


def test_setup_interrupted_before_gym_aloha_is_mended(checkout: Checkout) -> None:
    (checkout.path / "fail_pip_no_deps").touch()
    assert checkout.run(".ci/setup", MINOR="13").returncode != 0
    (checkout.path / "fail_pip_no_deps").unlink()
    assert checkout.setup(MINOR="13") == ["pip", ALOHA, PUSHT, "opengl"]


def test_python3_is_taken_where_none_is_named(checkout: Checkout) -> None:
    checkout.add_program("python3", STUB_PYTHON)
    assert checkout.setup(PYTHON_BASE="", MINOR="11") == ["venv", *INSTALL, "opengl"]


@pytest.mark.parametrize("minor", [9, 10])
def test_old_python_is_refused(checkout: Checkout, minor: int) -> None:
    checkout.add_program("python-stub", f"#!/bin/sh\necho {minor}\n")
    result = checkout.run(".ci/setup")
    assert result.returncode != 0
    assert f"is 3.{minor}; name another: make setup PYTHON_BASE=" in result.stderr


def test_python_without_venv_says_what_to_install(checkout: Checkout) -> None:
    checkout.add_program(
        "python-stub",
        """\
        #!/bin/sh
        case "$2" in *ensurepip*) exit 1 ;; *) echo 12 ;; esac
        """,
    )
    result = checkout.run(".ci/setup")
    assert result.returncode != 0
    assert "sudo apt-get install python3.12-venv" in result.stderr


def test_setups_at_once_install_once(checkout: Checkout) -> None:
    command = ".ci/setup & .ci/setup & wait"
    assert checkout.run("bash", "-c", command).returncode == 0
    assert checkout.log.read_text().splitlines() == ["venv", *INSTALL, "opengl"]


def test_half_installed_packages_are_forgotten(checkout: Checkout) -> None:
    """A killed pip can leave metadata without files, and then takes the package for installed."""
    site = checkout.path / "site"
    for name, size in (("whole", 4), ("cut", 40)):
        info = site / f"{name}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "RECORD").write_text(f"{name}.py,,{size}\n")
        (site / f"{name}.py").write_text("1234")
    (site / "killed-1.dist-info").mkdir()
    (site / "killed-1.dist-info/METADATA").write_text("Name: killed\nVersion: 1\n")
    script = (checkout.path / ".ci/setup").read_text()
    code = script.split("forget_half_installed() {")[1].split("<<'PY'\n")[1].split("\nPY\n")[0]
    # No package of this machine may be in sight.
    only_site = f"sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(site)!r}]"
    code = f"import sys\n{only_site}\n{code}"
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)
    assert sorted(path.name for path in site.glob("*.dist-info")) == ["whole-1.dist-info"]
