"""Data sets of other formats, read into a store: ALOHA, LeRobot, diffusion_policy, robomimic."""
