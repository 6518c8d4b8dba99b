"""Contenders in processes of their own: they take orders and answer, a line of JSON each way.

`Peer` is the side that gives orders, `Orders` the one that takes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
PEER_PYTHON = ROOT / ".venv-lerobot" / "bin" / "python"
"""Of the environment that `make lerobot-env` makes."""
ANSWERS = "BENCH_ANSWERS"
"""Variable with the number of the file that answers go to."""


class Peer:
    """A process that does what it is told.

    Args:
        command: what is run.
        log: file that takes all that it prints.
        cwd: where it runs; here, if not given.
        settings: environment variables, besides those that are set.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        cwd: Path | None = None,
        **settings: str | Path,
    ) -> None:
        self._log = log
        source, target = os.pipe()
        variables = settings | {ANSWERS: f"{target}"}
        with log.open("ab") as printed:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=cwd,
                env=os.environ | {name: str(value) for name, value in variables.items()},
                pass_fds=[target],
            )
        os.close(target)
        self._answers = os.fdopen(source)

    def ask(self, order: Mapping[str, Any]) -> Any:
        """Gives an order, and waits for the answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self.receive()

    def receive(self) -> Any:
        """Waits for an answer.

        Raises:
            SystemExit: the process has ended.
        """
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"{self._log.stem} ended:\n{self._log.read_text()[-2000:]}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends it, at the latest when it sees that no order will come."""
        self._process.communicate()
        self._answers.close()


class Orders:
    """Takes orders from stdin, and answers."""

    def __init__(self) -> None:
        number = int(os.environ[ANSWERS])
        os.set_inheritable(number, False)
        self._answers = os.fdopen(number, "w")

    def next(self) -> dict[str, Any] | None:
        """Waits for an order; None when no other will come."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, value: Mapping[str, Any]) -> None:
        """Answers the last order, or says that all is ready."""
        self._answers.write(json.dumps(value) + "\n")
        self._answers.flush()
