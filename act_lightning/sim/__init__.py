"""Simulated worlds: environments, scripted demonstrators, the recorder and rollouts."""


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
