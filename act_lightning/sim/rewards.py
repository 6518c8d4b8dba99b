"""Rewards of the ALOHA tasks: rules on which shapes touch, from 0 to 4.

Source: gym-aloha 0.1.5, tasks/sim.py. The rules are its own, on ids instead of names; a contact
counts only in the order of its two shapes that is asked for there.
"""

from __future__ import annotations

from collections.abc import Callable

import mujoco

Contacts = set[tuple[int, int]]

STAGES = ("touched", "lifted", "contact", "success")
"""Names of rewards 1 to 4, the same for both tasks (transfer cube's 3 is an attempted transfer)."""

_LEFT_FINGER = "vx300s_left/10_left_gripper_finger"
_RIGHT_FINGER = "vx300s_right/10_right_gripper_finger"
_SOCKET = ("socket-1", "socket-2", "socket-3", "socket-4")


def _pairs(model: mujoco.MjModel, first: tuple[str, ...], second: str) -> Contacts:
    """Contacts of each of `first` with `second`, as pairs of shape ids."""
    return {(model.geom(name).id, model.geom(second).id) for name in first}


def _insertion_reward(model: mujoco.MjModel) -> Callable[[Contacts], int]:
    peg_held = _pairs(model, ("red_peg",), _RIGHT_FINGER)
    socket_held = _pairs(model, _SOCKET, _LEFT_FINGER)
    on_table = _pairs(model, ("red_peg", *_SOCKET), "table")
    inserted = _pairs(model, ("red_peg",), "pin")
    together = Contacts().union(*(_pairs(model, ("red_peg",), part) for part in _SOCKET))

    def reward(touching: Contacts) -> int:
        if touching & inserted:
            return 4
        lifted = not touching & on_table
        if lifted and touching & together:
            return 3
        if touching & peg_held and touching & socket_held:
            return 2 if lifted else 1
        return 0

    return reward


def _transfer_cube_reward(model: mujoco.MjModel) -> Callable[[Contacts], int]:
    held_left = _pairs(model, ("red_box",), _LEFT_FINGER)
    held_right = _pairs(model, ("red_box",), _RIGHT_FINGER)
    on_table = _pairs(model, ("red_box",), "table")

    def reward(touching: Contacts) -> int:
        lifted = not touching & on_table
        if touching & held_left:
            return 4 if lifted else 3
        if touching & held_right:
            return 2 if lifted else 1
        return 0

    return reward


REWARD_RULES = {"insertion": _insertion_reward, "transfer_cube": _transfer_cube_reward}
"""By task: makes the function from the current contacts (pairs of shape ids) to the reward."""
