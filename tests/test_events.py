"""Scalars of a run as they are written, also by a run that was cut off and resumed."""

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from act_lightning.study.events import RunEvents


def test_scalars_are_read_as_they_come(tmp_path):
    events = RunEvents(tmp_path / "run")
    events.reload()
    assert events.scalars == {}
    with SummaryWriter(tmp_path / "run") as writer:
        for step in range(3000):
            writer.add_scalar("train/loss", step / 2, step, walltime=1000.0 + step)
        writer.add_histogram("val/kl_per_dim", np.zeros(3), 1)
        writer.flush()
        events.reload()
        assert events.scalars.keys() == {"train/loss"}
        loss = events.scalars["train/loss"]
        assert loss.steps.tolist() == list(range(3000))
        assert loss.values[-1] == 2999 / 2
        assert loss.times[-1] - loss.times[0] == 2999
        writer.add_scalar("train/loss", 0.0, 5000)
        writer.flush()
        events.reload()
        assert events.scalars["train/loss"].steps[-1] == 5000


def test_steps_taken_twice_count_as_the_second_time(tmp_path):
    """A run is killed at step 50 and goes on from its checkpoint of step 20."""
    with SummaryWriter(tmp_path, filename_suffix=".0") as writer:
        for step in (10, 20, 30, 40, 50):
            writer.add_scalar("train/loss", 1.0, step)
        writer.add_scalar("val/l1_prior", 1.0, 20)
    events = RunEvents(tmp_path)
    events.reload()
    assert events.scalars["train/loss"].steps.tolist() == [10, 20, 30, 40, 50]
    with SummaryWriter(tmp_path, filename_suffix=".1") as writer:
        for step in (30, 40):
            writer.add_scalar("train/loss", 2.0, step)
    events.reload()
    loss = events.scalars["train/loss"]
    assert loss.steps.tolist() == [10, 20, 30, 40]
    assert loss.values.tolist() == [1.0, 1.0, 2.0, 2.0]
    assert events.scalars["val/l1_prior"].steps.tolist() == [20]
