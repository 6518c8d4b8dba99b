"""Simulated worlds: environments, scripted demonstrators, the recorder and rollouts."""

import os


def num_cpus() -> int:
    """CPUs this process may use, which in a container or job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def register_envs() -> None:
    """Registers our environments; gymnasium calls it through its plug-in entry point."""
    import gymnasium

    for env_id, task in (
        ("act_lightning/AlohaInsertion-v0", "insertion"),
        ("act_lightning/AlohaTransferCube-v0", "transfer_cube"),
    ):
        if env_id not in gymnasium.registry:
            gymnasium.register(
                id=env_id, entry_point="act_lightning.sim.env:AlohaEnv", kwargs={"task": task}
            )
