"""Starts the command line, and makes one rank fail on the way.

    python tests/failing_rank.py PLACE KIND RANK fit --config ...

KIND is what happens there: an error that the program expects of its surroundings, a fault that it
does not, `kill`, `sleep`, after which the rank never comes back, or `orphan`: it is killed while
the others sleep, and cannot notice. At PLACE `files` the rank is on a machine that has
none of the files which are named by a relative path. When it happens is the time of the file
`failed` in the working directory.
"""

import os
import signal
import sys
import tempfile
import time
from functools import wraps
from pathlib import Path

from lightning.pytorch import Trainer

from act_lightning import callbacks, cli
from act_lightning.main import main
from act_lightning.module import ACTModule
from act_lightning.nets.bc import BCConfig

PLACES = {
    "model": (BCConfig, "build"),
    "simulator": (callbacks, "data_spec"),
    "start": (Trainer, "fit"),
    "step": (ACTModule, "training_step"),
    "rollout": (callbacks, "play_share"),
    "evaluation": (cli, "evaluate_run"),
}


def fail(place, kind):
    """Puts a fault in place of what is done there."""

    # The command line asks what Trainer.fit takes.
    @wraps(getattr(*PLACES[place]))
    def fault(*args, **kwargs):
        Path("failed").touch()
        if kind == "orphan":
            time.sleep(5)  # until the others sleep
        if kind in ("kill", "orphan"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "sleep":
            time.sleep(1000)
        raise {"error": OSError, "fault": KeyError}[kind](f"nothing goes in {place}")

    setattr(*PLACES[place], fault)


if __name__ == "__main__":
    place, kind, rank, *arguments = sys.argv[1:]
    is_meant = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == rank
    if place == "files" and is_meant:
        Path("failed").touch()
        os.chdir(tempfile.gettempdir())
    elif kind == "orphan":
        fail(place, kind if is_meant else "sleep")
    elif is_meant:
        fail(place, kind)
    sys.exit(main(arguments))
