"""How LeRobot calls what a robot senses and does, in policies and in data sets."""

QPOS = "observation.state"
ENV_STATE = "observation.environment_state"
IMAGES = "observation.images."
ACTION = "action"
SUCCESS = "next.success"
