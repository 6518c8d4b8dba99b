"""A small store of random demonstrations, whose rows say which frame they are."""

import numpy as np

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.data.writer import StoreWriter

SPEC = DataSpec(
    task="t",
    fps=50,
    dim_qpos=2,
    dim_action=3,
    dim_env_state=1,
    cameras=("top", "left"),
    image_size=(4, 6),
)


def write_store(path, lengths, spec=SPEC):
    """Writes episodes of these lengths; `qpos` is (position in the store, number of the episode).

    Ids are 100, 101, ..., so that a message which mixes up id, number and position is noticed.
    """
    rng = np.random.default_rng(0)
    ends = np.cumsum(lengths)
    with StoreWriter.create(path, spec, {}, len(lengths)) as writer:
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            position = np.arange(end - length, end)
            images = rng.integers(
                0, 256, (length, len(spec.cameras), 3, *spec.image_size), np.uint8
            )
            writer.append(
                Episode(
                    qpos=np.stack([position, np.full(length, number)], 1).astype(np.float32),
                    actions=rng.normal(size=(length, spec.dim_action)),
                    env_state=rng.normal(size=(length, 1)),
                    images=images,
                    id=100 + number,
                )
            )
    return path
