"""LeRobotDataset v3.0, v2.1 and v2.0, read with pyarrow and PyAV; LeRobot itself is not needed."""

from act_lightning.ingest.lerobot.dataset import FORMAT, LeRobotSource, matches, open_source

__all__ = ["FORMAT", "LeRobotSource", "matches", "open_source"]
