"""LeRobotDatasets in and out, against LeRobot's own writer, reader and converter.

Runs in the environment that `make lerobot-env` builds. LeRobot decodes with PyAV here, as we do.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lerobot.datasets", reason="needs LeRobot: make lerobot-env")

from lerobot.configs import RGBEncoderConfig
from lerobot.datasets import LeRobotDataset
from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from lerobot_files import (
    CAMERAS,
    FPS,
    NAMES,
    TASK,
    Layout,
    draw,
    make_demos,
    psnr,
    read_step,
    write_dataset,
)

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.data.store import Store
from act_lightning.data.writer import StoreWriter
from act_lightning.ingest.lerobot import open_source
from act_lightning.ingest.source import IngestOptions
from act_lightning.lerobot.dataset_exporting import export_dataset

pytestmark = pytest.mark.lerobot
REPO = "test/demonstrations"
QPOS, ACTION, ENV = "observation.state", "action", "observation.environment_state"
LENGTHS = (14, 1, 9, 21)
SAFE_LENGTHS = (14, 6, 9, 21)
"""For h264: LeRobot cannot join a video of one frame to another."""
SIZE = (96, 128)
CHUNK = 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keeps the arrow files that `datasets` makes out of the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def open_theirs(root, **options):
    return LeRobotDataset(REPO, root=root, video_backend="pyav", return_uint8=True, **options)


def to_uint8(image):
    """LeRobot's (3, H, W) as (H, W, 3) uint8: it gives videos so, and images divided by 255."""
    if image.is_floating_point():
        image = (image * 255).round().byte()
    return image.permute(1, 2, 0).numpy()


def read_ours(root, **options):
    """(episode, frames (T, N, H, W, 3)) of every episode, read in blocks as the writer does."""
    source = open_source(root, IngestOptions(**options))
    for id in source.ids:
        episode = source.read(id)
        num_steps, num_cameras = episode.images.shape[:2]
        cameras = [
            np.concatenate(
                [episode.images.read(n, t, min(t + 4, num_steps)) for t in range(0, num_steps, 4)]
            )
            for n in range(num_cameras)
        ]
        yield source, episode, np.stack(cameras, axis=1)


def compare_with_theirs(root, demos, *, exact, least_psnr=30):
    """Ours equals theirs in everything, and both equal what was written as far as the codec can."""
    theirs, index = open_theirs(root), 0
    for number, (source, episode, frames) in enumerate(read_ours(root)):
        demo = demos[number]
        assert source.spec.cameras == CAMERAS
        np.testing.assert_array_equal(episode.qpos, demo.tables[QPOS])
        np.testing.assert_array_equal(episode.actions, demo.tables[ACTION])
        np.testing.assert_array_equal(episode.env_state, demo.tables[ENV])
        assert len(frames) == len(demo)
        for step in range(len(demo)):
            item = theirs[index]
            index += 1
            assert item["task"] == demo.task == source.spec.task
            for key, ours in ((QPOS, episode.qpos), (ACTION, episode.actions)):
                np.testing.assert_array_equal(item[key].numpy(), ours[step])
            for column, name in enumerate(CAMERAS):
                their_frame = to_uint8(item[f"observation.images.{name}"])
                np.testing.assert_array_equal(frames[step, column], their_frame)
                assert read_step(frames[step, column]) == (number, column, step)
        for column, name in enumerate(CAMERAS):
            if exact:
                np.testing.assert_array_equal(frames[:, column], demo.frames[name])
            else:
                assert psnr(frames[:, column], demo.frames[name]) > least_psnr
    assert index == len(theirs) == sum(map(len, demos))


FEATURES = {
    QPOS: {"dtype": "float32", "shape": (5,), "names": None},
    ACTION: {"dtype": "float32", "shape": (4,), "names": None},
    ENV: {"dtype": "float32", "shape": (3,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
}


def write_theirs(root, demos, encoder):
    """A data set by LeRobot's own writer, in as many files as can be."""
    dtype = "image" if encoder is None else "video"
    image = {"dtype": dtype, "shape": (*SIZE, 3), "names": NAMES}
    dataset = LeRobotDataset.create(
        REPO,
        FPS,
        FEATURES | {f"observation.images.{name}": image for name in CAMERAS},
        root=root,
        use_videos=encoder is not None,
        rgb_encoder=encoder,
        video_files_size_in_mb=0.007,
        data_files_size_in_mb=0.03,
    )
    for demo in demos:
        for step in range(len(demo)):
            frame = {key: table[step] for key, table in demo.tables.items()}
            frame["next.success"] = np.array([step == len(demo) - 1])
            frame |= {f"observation.images.{k}": v[step] for k, v in demo.frames.items()}
            dataset.add_frame(frame | {"task": demo.task})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


ENCODERS = {
    "their-default": RGBEncoderConfig,
    "h264": lambda: RGBEncoderConfig(vcodec="h264", crf=20, g=10),
    "h264-one-key-frame": lambda: RGBEncoderConfig(vcodec="h264", crf=20, g=250),
    "images": lambda: None,
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_reads_what_their_writer_wrote(tmp_path, encoder):
    demos = make_demos(SAFE_LENGTHS if "h264" in encoder else LENGTHS, size=SIZE)
    write_theirs(tmp_path / "set", demos, ENCODERS[encoder]())
    files = "data/*/*.parquet" if encoder == "images" else "videos/*top/*/*.mp4"
    # Several files, and episodes that share one.
    assert 1 < len(list((tmp_path / "set").glob(files))) < len(demos)
    compare_with_theirs(tmp_path / "set", demos, exact=encoder == "images")
    for _, episode, _ in read_ours(tmp_path / "set"):
        assert episode.success is True


@pytest.mark.parametrize(
    "layout",
    [
        Layout(version="v2.1", options={"crf": "18"}),
        Layout(version="v2.1", codec="libsvtav1", options={"crf": "30", "g": "2", "preset": "12"}),
        Layout(version="v2.1", video=False),
    ],
    ids=str,
)
def test_v21_is_what_their_converter_takes(tmp_path, layout):
    """Our v2.1 files are right, as LeRobot converts them; and read before and after as the same."""
    demos = make_demos(SAFE_LENGTHS, size=SIZE)
    root = tmp_path / "set"
    write_dataset(root, demos, layout)
    before = list(read_ours(root))
    convert_dataset(REPO, root=root, push_to_hub=False)
    assert (tmp_path / "set_old/meta/episodes.jsonl").exists()
    compare_with_theirs(root, demos, exact=not layout.video, least_psnr=28)
    for (_, old, old_frames), (_, new, new_frames) in zip(before, read_ours(root), strict=True):
        np.testing.assert_array_equal(old.qpos, new.qpos)
        np.testing.assert_array_equal(old_frames, new_frames)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store.zarr", LENGTHS)


def make_store(path, lengths):
    demos = make_demos(lengths, size=SIZE)
    spec = DataSpec(
        task=TASK,
        fps=FPS,
        dim_qpos=5,
        dim_action=4,
        dim_env_state=3,
        cameras=CAMERAS,
        image_size=SIZE,
    )
    with StoreWriter.create(path, spec, {}, units={"qpos": "rad"}) as writer:
        for number, demo in enumerate(demos):
            images = np.stack([demo.frames[name] for name in CAMERAS], axis=1)
            episode = Episode(
                qpos=demo.tables[QPOS],
                actions=demo.tables[ACTION],
                env_state=demo.tables[ENV],
                images=images.transpose(0, 1, 4, 2, 3),
                id=number,
                success=number % 2 == 0,
            )
            writer.append(episode)
        writer.finalize()
    return Store.open(path)


@pytest.mark.parametrize("images", [True, False], ids=["images", "video"])
def test_their_class_opens_our_export(tmp_path, store, images):
    root = tmp_path / "set"
    export_dataset(
        tmp_path / "store.zarr",
        root,
        images=images,
        data_files_size_in_mb=0.05,
        video_files_size_in_mb=0.007,
    )
    files = "data/*/*.parquet" if images else "videos/*top/*/*.mp4"
    assert 1 < len(list(root.glob(files))) < len(LENGTHS)
    compare_with_theirs(root, make_demos(LENGTHS, size=SIZE), exact=images)
    theirs = open_theirs(root)
    assert theirs.meta.fps == FPS
    assert theirs.meta.total_episodes == store.num_episodes
    assert theirs.meta.camera_keys == [f"observation.images.{name}" for name in CAMERAS]


@pytest.mark.parametrize("images", [True, False], ids=["images", "video"])
def test_their_action_chunks_are_the_stores(tmp_path, store, images):
    root = tmp_path / "set"
    export_dataset(tmp_path / "store.zarr", root, images=images)
    deltas = {"action": [k / FPS for k in range(CHUNK)], "observation.images.top": [-1 / FPS, 0]}
    theirs = open_theirs(root, delta_timestamps=deltas)
    for episode, (start, stop) in enumerate(
        zip(store.episode_starts, store.episode_ends, strict=True)
    ):
        for index in range(start, stop):
            item = theirs[index]
            steps = np.arange(index, index + CHUNK)
            expected = store.actions[np.minimum(steps, stop - 1)]
            np.testing.assert_array_equal(item["action"].numpy(), expected)
            np.testing.assert_array_equal(item["action_is_pad"].numpy(), steps >= stop)
            shown = [read_step(to_uint8(frame))[2] for frame in item["observation.images.top"]]
            assert shown == [max(index - start - 1, 0), index - start]
            assert int(item["episode_index"]) == episode
            succeeded = store.episode_success[episode] == 1 and index == stop - 1
            assert bool(item["next.success"]) == succeeded


def test_their_subset_of_episodes(tmp_path, store):
    root = tmp_path / "set"
    export_dataset(tmp_path / "store.zarr", root, video_files_size_in_mb=0.02)
    theirs = open_theirs(root, episodes=[2, 3])
    assert len(theirs) == LENGTHS[2] + LENGTHS[3]
    assert read_step(to_uint8(theirs[LENGTHS[2]]["observation.images.wrist"])) == (3, 1, 0)


def test_statistics_are_theirs(tmp_path, store):
    """Equal to what LeRobot computes of the same data, but for the quantiles that it estimates."""
    demos = make_demos(LENGTHS, size=SIZE)
    export_dataset(tmp_path / "store.zarr", tmp_path / "ours", images=True)
    write_theirs(tmp_path / "theirs", demos, None)
    ours, theirs = open_theirs(tmp_path / "ours").meta, open_theirs(tmp_path / "theirs").meta
    assert ours.stats.keys() == theirs.stats.keys()
    for key, their_stats in theirs.stats.items():
        assert ours.stats[key].keys() == their_stats.keys()
        for name, value in their_stats.items():
            assert ours.stats[key][name].shape == value.shape, (key, name)
            if not name.startswith("q") and key != "next.success":
                np.testing.assert_allclose(ours.stats[key][name], value, rtol=1e-3)
    np.testing.assert_array_equal(ours.stats[QPOS]["q50"], np.quantile(store.qpos, 0.5, axis=0))


def test_a_long_episode_keeps_its_times(tmp_path):
    """Times of late frames, far into a file, still find their frames."""
    frames = np.stack([draw((32, 64), (0, t // 256, t % 256)) for t in range(700)])
    spec = DataSpec(
        task=TASK, fps=FPS, dim_qpos=1, dim_action=1, cameras=("top",), image_size=(32, 64)
    )
    with StoreWriter.create(tmp_path / "store.zarr", spec, {}) as writer:
        for number in range(2):
            tables = np.arange(700, dtype=np.float32)[:, None] + number
            images = frames[:, None].transpose(0, 1, 4, 2, 3)
            writer.append(Episode(qpos=tables, actions=-tables, images=images, id=number))
        writer.finalize()
    export_dataset(tmp_path / "store.zarr", tmp_path / "set")
    theirs = open_theirs(tmp_path / "set")
    for index in (0, 699, 700, 1399):
        item = theirs[index]
        assert item[QPOS].item() == index % 700 + index // 700
        step = index % 700
        shown = read_step(to_uint8(item["observation.images.top"]))
        assert shown[1:] == (step // 256, step % 256)
    _, _, ours = list(read_ours(tmp_path / "set"))[1]
    assert [read_step(frame)[1:] for frame in ours[::99, 0]] == [
        (step // 256, step % 256) for step in range(0, 700, 99)
    ]
