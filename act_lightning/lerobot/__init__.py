"""LeRobot's formats: policies of its ACT in and out, and demonstrations out as its data sets.

The formats are LeRobot 0.6.1's (`ACTPolicy.save_pretrained`, the processors' `save_pretrained`, and
LeRobotDataset v3.0). Nothing here imports LeRobot: a policy is JSON and safetensors, a data set
JSON, parquet and mp4. Tests in `tests/lerobot` hold the result against LeRobot's own code.

Demonstrations are written (`dataset_*.py`) without the networks and without torch, which take
seconds and half a gigabyte to import.
"""
