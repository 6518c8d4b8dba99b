"""Policies of LeRobot's ACT in and out: folders of weights, sizes and normalisation.

The format is LeRobot 0.6.1's (`ACTPolicy.save_pretrained` and the processors' `save_pretrained`).
Nothing here imports LeRobot: a folder is JSON and safetensors. Tests in `tests/lerobot` hold the
result against LeRobot's own code.
"""

from act_lightning.lerobot.exporting import export_lerobot
from act_lightning.lerobot.importing import import_lerobot

__all__ = ["export_lerobot", "import_lerobot"]
