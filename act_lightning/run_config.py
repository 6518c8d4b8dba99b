"""What a run keeps of how it was made, written into its folder before it takes its first step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from act_lightning.provenance import write_provenance
from act_lightning.tensorboard import describe_run


class RunConfig(SaveConfigCallback):
    """Keeps `config.yaml` in the run's folder, such that `fit --config` on it repeats the run.

    So it names neither the folder nor the checkpoint that a resumed run went on from. Beside it
    stands `run.json`.

    Args:
        parser: of `fit`.
        config: all settings.
        arguments: those of `fit`.
        kwargs: those of Lightning's callback.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        arguments: Sequence[str],
        **kwargs: Any,
    ) -> None:
        config = config.clone()
        self.resumes = config.ckpt_path is not None
        config.run = config.ckpt_path = None
        super().__init__(parser, config, **kwargs)
        self.arguments = arguments

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes `run.json`, and what TensorBoard shows; called by the first rank alone."""
        assert isinstance(trainer.logger, TensorBoardLogger)
        folder = Path(trainer.logger.log_dir)
        write_provenance(folder, self.arguments, resumes=self.resumes)
        config = folder / self.config_filename
        describe_run(trainer.logger.experiment, config.read_text(), self._base(config))

    def _base(self, config: Path) -> tuple[str, Any] | None:
        """Name and content of the first configuration, which the others and arguments changed.

        None if it is no whole one, or that of the run itself, which is resumed.
        """
        path = next((Path(path) for path in self.config.config or ()), None)
        if path is None or path.resolve() == config.resolve():
            return None
        exits, self.parser.exit_on_error = self.parser.exit_on_error, False
        try:
            base = self.parser.parse_path(path)
        except argparse.ArgumentError:
            return None
        finally:
            self.parser.exit_on_error = exits
        # It is valid: it has just been parsed.
        text = self.parser.dump(base, skip_none=False, skip_validation=True)
        return str(path), yaml.safe_load(text)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes it when training starts."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)
