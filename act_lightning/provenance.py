"""Where a run comes from: `run.json` has the command, the versions, the state of git, the machine.

With `config.yaml` beside it that is what it takes to repeat the run: on the same machine and with
`trainer.deterministic=true` bit for bit.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from act_lightning import __version__
from act_lightning.new_file import write_file
from act_lightning.sim import num_cpus

RUN_FILE = "run.json"
PATCH_FILE = "uncommitted.patch"
PLAIN = (
    "--binary",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--no-relative",
    "--src-prefix=a/",
    "--dst-prefix=b/",
)
"""For a patch that `git apply` takes, whatever the user's git is told to show."""


def write_provenance(run: Path, arguments: Sequence[str], *, resumes: bool) -> None:
    """Writes `run.json`, and `uncommitted.patch` if the code differs from its commit.

    A resumed run keeps those of its beginning, and adds to `resumed` what resumed it.

    Args:
        run: the run's folder.
        arguments: those of `fit`.
        resumes: whether it goes on from a checkpoint.
    """
    path = run / RUN_FILE
    git, patch = _git_state()
    here = {
        "command": shlex.join(["python", "-m", "act_lightning", "fit", *arguments]),
        "git": git,
        "versions": _versions(),
        "machine": _machine(),
    }
    begun = read_provenance(run)
    if begun is not None and resumes:
        record = begun | {"resumed": [*begun.get("resumed", []), here], "finished": False}
    else:
        record = {"arguments": list(arguments), **here, "finished": False}
        (run / PATCH_FILE).unlink(missing_ok=True)
        if patch:
            write_file(run / PATCH_FILE, patch)
    write_file(path, json.dumps(record, indent=1).encode())


def finish_provenance(run: Path) -> None:
    """Notes in `run.json` that `fit` came to its end, evaluation included."""
    record = (read_provenance(run) or {}) | {"finished": True}
    write_file(run / RUN_FILE, json.dumps(record, indent=1).encode())


def read_provenance(run: Path) -> dict[str, Any] | None:
    """Content of `run.json`; None without one.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / RUN_FILE
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        record["arguments"]  # noqa: B018  (the one entry that is relied on)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); delete the run's folder") from error
    return record


def _versions() -> dict[str, str | None]:
    """Of Python, this package and all that it needs to run."""
    names = set()
    try:
        needed = requires("act_lightning") or []
    except PackageNotFoundError:  # it runs from its folder, and was never installed
        needed = []
    for line in needed:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            names.add(requirement.name)
    # Torch itself says for which CUDA it was built.
    found = {name: _version(name) for name in sorted(names)} | {"torch": torch.__version__}
    return {"python": platform.python_version(), "act_lightning": __version__, **found}


def _version(name: str) -> str | None:
    """None for what a package of another name provides, such as tb-nightly for tensorboard."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": num_cpus(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _git_state() -> tuple[dict[str, Any] | None, bytes]:
    """Commit of this package, and what it differs in; None where it is in no repository."""
    folder = Path(sys.modules["act_lightning"].__file__ or "").parent

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout

    try:
        if not git("ls-files", "__init__.py"):
            return None, b""  # installed below somebody else's repository
        commit = git("rev-parse", "HEAD").decode().strip()
        patch = git("diff", *PLAIN, "HEAD", ".")
        untracked = git("ls-files", "--others", "--exclude-standard", "--full-name", ".")
    except (OSError, subprocess.SubprocessError):
        return None, b""
    names = untracked.decode().splitlines()
    return {"commit": commit, "dirty": bool(patch or names), "untracked": names}, patch
