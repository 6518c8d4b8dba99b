"""The stream: order and chunks against brute force; threads that end; errors that arrive."""

import gc
import itertools
import threading
import time

import numpy as np
import pytest
import torch

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.data.order import (
    DRAWN_AHEAD,
    EpisodeSampling,
    FrameSampling,
    SampleOrder,
    frames_of,
    sample_order,
    split_episodes,
)
from act_lightning.data.store import Store
from act_lightning.data.stream import (
    BatchReader,
    FixedBatches,
    TrainingStream,
    count_batches,
    spread,
)
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
LENGTHS = (7, 1, 12, 5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    with StoreWriter.create(path, SPEC, {}, len(LENGTHS)) as writer:
        for seed, length in enumerate(LENGTHS):
            writer.append(
                Episode(
                    qpos=rng.normal(size=(length, 2)),
                    actions=rng.normal(size=(length, 3)),
                    env_state=rng.normal(size=(length, 1)),
                    images=rng.integers(0, 256, (length, 2, 3, 4, 6), np.uint8),
                    id=seed,
                )
            )
    return Store.open(path)


def reader_of(store, cameras=("left", "top"), chunk_size=4):
    return BatchReader(store=store, chunk_size=chunk_size, cameras=cameras, use_env_state=True)


def each_frame(store, seed=3):
    return FrameSampling(seed=seed, frames=np.arange(store.num_frames))


def each_episode(store, seed=3):
    return EpisodeSampling(seed=seed, starts=store.episode_starts, ends=store.episode_ends)


def stream_of(store, sampling=each_frame, **changes):
    settings = {
        "reader": reader_of(store),
        "order": SampleOrder(sampling(store)),
        "batch_size": 4,
    }
    return TrainingStream(**(settings | changes))


def positions(stream, steps):
    return [stream._frames_at(step).tolist() for step in range(steps)]


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("act-data")]


def test_chunks_equal_brute_force(store):
    frames = np.arange(store.num_frames)
    batch = reader_of(store)(frames)
    for frame in frames:
        episode = next(e for e in range(len(LENGTHS)) if frame < store.episode_ends[e])
        last = int(store.episode_ends[episode]) - 1
        for k in range(4):
            wanted = store.actions[min(frame + k, last)]
            np.testing.assert_array_equal(batch.actions[frame, k], wanted)
            assert bool(batch.is_pad[frame, k]) == (frame + k > last)
    np.testing.assert_array_equal(batch.observation.qpos, store.qpos)
    np.testing.assert_array_equal(batch.observation.env_state, store.env_state)
    # The reader was asked for the cameras in reverse order.
    np.testing.assert_array_equal(batch.observation.images.flip(1), store.read_images(frames))
    assert batch.actions.dtype == batch.observation.qpos.dtype == torch.float32
    assert batch.observation.images.dtype == torch.uint8
    flat = batch.observation.images.flatten(0, 1)
    assert flat.is_contiguous(memory_format=torch.channels_last)


# Argsort of Philox4x64-10's first 8 outputs for key 0. If it moved, resumed runs would be wrong.
ORDER_OF_SEED_0 = [0, 2, 1, 5, 4, 3, 6, 7]


def test_order_is_a_permutation_fixed_for_ever():
    order = sample_order(seed=0, pass_index=0, num_samples=8)
    assert order.tolist() == ORDER_OF_SEED_0
    for pass_index in (0, 1, 7):
        order = sample_order(5, pass_index, 1000)
        assert sorted(order) == list(range(1000))
    assert (sample_order(5, 0, 1000) != sample_order(5, 1, 1000)).mean() > 0.9
    assert (sample_order(5, 0, 1000) != sample_order(6, 0, 1000)).mean() > 0.9


EPISODE_OF = np.repeat(np.arange(len(LENGTHS)), LENGTHS)


@pytest.mark.parametrize("sampling", [each_frame, each_episode])
@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (2, 2), (1, 4), (3, 3), (64, 1)])
def test_no_sample_is_repeated_or_dropped_in_a_pass(store, sampling, batch_size, world_size):
    """25 frames never divide into the batches: passes must still join without a seam."""
    streams = [
        stream_of(store, sampling, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = 4 * 25 // (batch_size * world_size) + 1
    per_rank = [positions(stream, steps) for stream in streams]
    order = [sample for step in zip(*per_rank, strict=True) for rank in step for sample in rank]
    assert order == stream_of(store, sampling).order(0, len(order)).tolist()
    samples = order if sampling is each_frame else EPISODE_OF[order].tolist()
    size = len(sampling(store))
    for start in range(0, 3 * size + 1, size):
        assert sorted(samples[start : start + size]) == list(range(size))


def test_frames_of_an_episode_are_drawn_uniformly():
    """20,000 draws of each of 4 frames: chi-square with 3 degrees exceeds 16.3 once in 1,000."""
    sampling = EpisodeSampling(seed=1, starts=np.arange(0, 4000, 4), ends=np.arange(4, 4001, 4))
    drawn = np.stack([np.sort(sampling(i)) - sampling.starts for i in range(80)])
    counts = np.bincount(drawn.ravel(), minlength=4)
    assert counts.sum() == 80_000
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 16.3
    # Neither passes nor neighbouring episodes draw alike.
    assert abs((drawn[1:] == drawn[:-1]).mean() - 0.25) < 0.01
    assert abs((drawn[:, 1:] == drawn[:, :-1]).mean() - 0.25) < 0.01
    # What is drawn says nothing of when in the pass it comes.
    places = np.argsort(sampling(0))
    assert abs(np.corrcoef(places, drawn[0])[0, 1]) < 0.1


# From Philox4x64-10: order by the words of counter 0, frames by those of counter 2**192.
EPISODES_OF_SEED_0 = [2, 9, 7, 23]


def test_episode_sampling_is_fixed_for_ever(store):
    assert each_episode(store, seed=0)(0).tolist() == EPISODES_OF_SEED_0
    again = [SampleOrder(each_episode(store))(start, 7).tolist() for start in (0, 7, 3)]
    assert (again[0] + again[1])[3:10] == again[2]


def test_a_pass_drawn_ahead_is_the_same_and_leaves_no_thread():
    sampling = FrameSampling(seed=0, frames=np.arange(DRAWN_AHEAD))
    order = SampleOrder(sampling)
    for start in (0, DRAWN_AHEAD - 1, 2 * DRAWN_AHEAD, 5 * DRAWN_AHEAD, DRAWN_AHEAD):
        pass_index, offset = divmod(start, DRAWN_AHEAD)
        assert order(start, 1) == sampling(pass_index)[offset]
    while any(thread.name.startswith("act-order") for thread in threading.enumerate()):
        time.sleep(0.01)


def test_starting_later_goes_on_where_the_first_run_was(store):
    straight = positions(stream_of(store), 9)
    assert positions(stream_of(store, start=5 * 4), 4) == straight[5:]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_threads_change_nothing(store, prefetch):
    stream = stream_of(store, prefetch=prefetch)
    for step, batch in zip(range(20), stream, strict=False):
        wanted = stream_of(store).batch(step)
        assert batch.position == wanted.position == 4 * step
        for name in ("qpos", "images", "env_state"):
            assert torch.equal(getattr(batch.observation, name), getattr(wanted.observation, name))
        assert torch.equal(batch.actions, wanted.actions)
        assert torch.equal(batch.is_pad, wanted.is_pad)


def test_threads_end_with_the_iterator(store):
    batches = iter(stream_of(store))
    next(batches)
    assert data_threads()
    batches.close()
    assert not data_threads()
    batches = iter(stream_of(store))
    next(batches)
    del batches
    gc.collect()
    assert not data_threads()


def test_slow_reads_overlap_and_stay_in_order(store):
    reading, at_once = set(), []

    class Slow(BatchReader):
        def __call__(self, frames):
            reading.add(frames[0])
            at_once.append(len(reading))
            time.sleep(0.05 * (1 + frames[0] % 3))
            reading.discard(frames[0])
            return super().__call__(frames)

    store_qpos = torch.from_numpy(store.qpos)
    slow = Slow(**vars(reader_of(store)))
    stream = stream_of(store, reader=slow, prefetch=4)
    for step, batch in zip(range(12), stream, strict=False):
        assert torch.equal(batch.observation.qpos, store_qpos[positions(stream, step + 1)[step]])
    assert max(at_once) > 1


def test_errors_of_threads_reach_the_caller(store):
    class Broken(BatchReader):
        def __call__(self, frames):
            raise ValueError("frame 7 cannot be read")

    with pytest.raises(ValueError, match="frame 7 cannot be read"):
        next(iter(stream_of(store, reader=Broken(**vars(reader_of(store))))))
    assert not data_threads()


def test_split_is_by_episode_and_depends_on_seed_only():
    train, val = split_episodes(50, 0.1, seed=0)
    assert len(val) == 5
    assert sorted([*train, *val]) == list(range(50))
    again = split_episodes(50, 0.1, seed=0)
    assert again[1].tolist() == val.tolist()
    assert split_episodes(50, 0.1, seed=1)[1].tolist() != val.tolist()
    assert len(split_episodes(3, 0.1, 0)[1]) == 1
    assert len(split_episodes(3, 0.0, 0)[1]) == 0
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_episodes(1, 0.1, 0)


def test_frames_of_episodes(store):
    assert frames_of(store, np.array([1, 3])).tolist() == [7, 20, 21, 22, 23, 24]
    assert frames_of(store, np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_is_bounded_and_shared_out_among_ranks(store, world_size):
    frames = np.arange(100, 125)
    for limit in (1000, 10, 1):
        starts, parts = zip(
            *(spread(frames, limit, rank, world_size) for rank in range(world_size)), strict=True
        )
        alone = spread(frames, limit, 0, 1)[1]
        assert len(alone) == min(limit, 25) == len(set(alone) & set(frames))
        if limit < world_size:  # no rank is without one
            assert all(part.tolist() == alone.tolist() for part in parts)
            continue
        assert np.concatenate(parts).tolist() == alone.tolist()
        assert list(starts) == np.cumsum([0, *map(len, parts)])[:-1].tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_validation_batches_are_as_many_on_each_rank(store):
    batches = FixedBatches(reader=reader_of(store), frames=np.arange(25), num_batches=4, start=7)
    assert [len(batch) for batch in batches] == [6, 6, 6, 7]
    assert [batch.position for batch in batches] == [7, 13, 19, 25]
    assert len(batches) == 4
    assert count_batches(25, 8, 1) == 4
    assert count_batches(24, 8, 1) == 3
    for num_frames, batch_size, ranks in itertools.product(range(1, 30), (1, 3, 8), (1, 2, 5)):
        number = count_batches(num_frames, batch_size, ranks)
        for rank in range(ranks):
            _, frames = spread(np.arange(num_frames), num_frames, rank, ranks)
            assert 1 <= number <= len(frames) <= number * batch_size + (batch_size == 1)
