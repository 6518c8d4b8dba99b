"""Simulated worlds: environments, scripted demonstrators, the recorder and rollouts."""

import os


def num_cpus() -> int:
    """CPUs this process may use, which in a container or job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def register_envs() -> None:
    """Registers our environments with gymnasium, whose `make` then knows their ids."""
    import gymnasium

    aloha, detour = "act_lightning.sim.env:AlohaEnv", "act_lightning.sim.detour:DetourEnv"
    for name, entry_point, settings in (
        ("AlohaInsertion-v0", aloha, {"task": "insertion"}),
        ("AlohaTransferCube-v0", aloha, {"task": "transfer_cube"}),
        ("Detour-v0", detour, {}),
    ):
        env_id = f"act_lightning/{name}"
        if env_id not in gymnasium.registry:
            gymnasium.register(id=env_id, entry_point=entry_point, kwargs=settings)
