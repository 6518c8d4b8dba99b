"""Every reader against its format, as its project writes it; every bad episode is named."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import foreign
import h5py
import numpy as np
import psutil
import pytest
import zarr
from foreign import make_episode
from PIL import Image

from act_lightning.data.store import Store
from act_lightning.ingest.aloha import AlohaSource
from act_lightning.ingest.columns import Columns
from act_lightning.ingest.formats import open_source
from act_lightning.ingest.frames import resize
from act_lightning.ingest.isolate import IsolatedSource
from act_lightning.ingest.run import ingest, verify
from act_lightning.ingest.source import IngestOptions, SourceError
from act_lightning.ingest.verbs import ingest_verb

LENGTHS = (7, 1, 12)
GOLDENS = Path(__file__).parent / "goldens" / "ingest"
PUSHT = {"qpos": ("state[:14]",), "env_state": ("state[14:]",), "fps": 10.0}


def make_episodes(lengths=LENGTHS, **options):
    return [make_episode(seed, length, **options) for seed, length in enumerate(lengths)]


def check(store_path, episodes, qpos="qpos", columns=None, tolerance=0):
    """The store holds these episodes, frame by frame."""
    store = Store.open(store_path)
    assert store.complete
    assert np.diff(store.episode_ends, prepend=0).tolist() == [len(one["qpos"]) for one in episodes]
    for start, one in zip(store.episode_starts, episodes, strict=True):
        stop = start + len(one["qpos"])
        np.testing.assert_array_equal(
            store.qpos[start:stop], one[qpos][:, :columns].astype(np.float32)
        )
        np.testing.assert_array_equal(store.actions[start:stop], one["action"].astype(np.float32))
        if store.env_state is not None:
            np.testing.assert_array_equal(
                store.env_state[start:stop], one["object"].astype(np.float32)
            )
        for reader, frames in zip(store.cameras.values(), one["images"].values(), strict=True):
            for step, frame in enumerate(frames):
                out = np.empty_like(frame)
                reader.read_into(int(start + step), out)
                if not tolerance:
                    np.testing.assert_array_equal(out, frame)
                else:
                    error = np.mean((out.astype(float) - frame) ** 2)
                    assert 10 * np.log10(255**2 / error) > tolerance
    return store


def fill(source_path, store_path, skip_bad=False, **options):
    source = open_source(source_path, IngestOptions(**options))
    ingest(source, str(store_path), skip_bad=skip_bad)
    verify(source, str(store_path))
    return source


@pytest.mark.parametrize("sim", [False, True])
def test_aloha_raw(tmp_path, sim):
    episodes = make_episodes()
    source = fill(foreign.write_aloha(tmp_path / "cube", episodes, sim=sim), tmp_path / "s")
    for one in episodes:  # cameras come in the file's order, by name
        one["images"] = dict(sorted(one["images"].items()))
    store = check(tmp_path / "s", episodes)
    assert store.spec.cameras == ("left_wrist", "top")
    assert (store.spec.task, store.spec.fps) == ("cube", 50)
    assert store.provenance["source"]["sim"] is sim
    assert store.episode_success.tolist() == [-1, -1, -1]
    assert source.unused == ("observations/qvel",)
    assert store.units["qpos"].startswith("rad")


def test_aloha_jpeg_is_what_cv2_decodes_and_close_to_what_was_recorded(tmp_path):
    episodes = make_episodes(cameras=("top",))
    fill(foreign.write_aloha(tmp_path / "a", episodes, compress=True), tmp_path / "s")
    store = check(tmp_path / "s", episodes, tolerance=30)
    frames = np.empty((store.num_frames, 24, 32, 3), np.uint8)
    for i, out in enumerate(frames):
        store.cameras["top"].read_into(i, out)
    recorded = np.concatenate([one["images"]["top"] for one in episodes])
    decoded = [
        np.asarray(Image.open(io.BytesIO(foreign.cv2_jpeg(one).tobytes())))[..., ::-1]
        for one in recorded
    ]
    np.testing.assert_array_equal(frames, decoded)
    with pytest.raises(AssertionError):  # the channels are told apart
        check(
            tmp_path / "s",
            [one | {"images": {"top": one["images"]["top"][..., ::-1]}} for one in episodes],
            tolerance=30,
        )


def test_aloha_jpeg_made_by_cv2(tmp_path):
    """The file, and what cv2.imdecode makes of it, come from cv2 itself: goldens/ingest/make.py."""
    expected = np.load(GOLDENS / "episode_0.npz")
    cameras = ("cam_high", "cam_left_wrist")
    with h5py.File(GOLDENS / "episode_0.hdf5") as file:
        tables = {"qpos": file["observations/qpos"][...], "action": file["action"][...]}
    fill(GOLDENS / "episode_0.hdf5", tmp_path / "s")
    check(tmp_path / "s", [tables | {"images": {name: expected[name] for name in cameras}}])
    recorded = {name: expected[f"recorded_{name}"] for name in cameras}
    check(tmp_path / "s", [tables | {"images": recorded}], tolerance=30)


@pytest.mark.parametrize("packed", [False, True])
def test_replay_buffer_made_by_zarr_2(tmp_path, packed):
    """Written by zarr 2.18 itself, as diffusion_policy's ReplayBuffer calls it."""
    path = GOLDENS / "replay.zarr.zip"
    if not packed:
        shutil.unpack_archive(path, tmp_path / "replay.zarr", "zip")
        path = tmp_path / "replay.zarr"
    fill(path, tmp_path / "s", fps=10, qpos=("state[:2]",), env_state=("state[2:]",))
    expected = np.load(GOLDENS / "replay.npz")
    episodes = [
        {
            "qpos": expected["state"][rows, :2],
            "object": expected["state"][rows, 2:],
            "action": expected["action"][rows],
            "images": {"img": expected["img"][rows].astype(np.uint8)},
        }
        for rows in (slice(0, 5), slice(5, 10))
    ]
    check(tmp_path / "s", episodes)


def test_colours_can_be_exchanged(tmp_path):
    episodes = make_episodes(cameras=("top",))
    fill(foreign.write_aloha(tmp_path / "a", episodes), tmp_path / "s", swap_red_blue=True)
    for one in episodes:
        one["images"] = {"top": one["images"]["top"][..., ::-1]}
    check(tmp_path / "s", episodes)


def test_robomimic(tmp_path):
    episodes = make_episodes(dims=(9, 7))
    path = foreign.write_robomimic(tmp_path / "x.hdf5", episodes, success=[1, 0, 1], compress=True)
    source = fill(path, tmp_path / "s", env_state=("object",))
    for one in episodes:
        one["images"] = dict(sorted(one["images"].items()))
    store = check(tmp_path / "s", episodes)
    assert store.episode_success.tolist() == [1, 0, 1]
    assert (store.spec.task, store.spec.fps) == ("Lift", 20)
    assert store.spec.cameras == ("left_wrist_image", "top_image")
    assert source.unused == ("states",)


def test_robomimic_filter_key(tmp_path):
    episodes = make_episodes([3] * 12, dims=(9, 7), cameras=())
    masks = {"train": ["demo_11", "demo_2", "demo_10"]}
    path = foreign.write_robomimic(tmp_path / "x.hdf5", episodes, masks=masks)
    fill(path, tmp_path / "s", episodes="train")
    store = check(tmp_path / "s", [episodes[2], episodes[10], episodes[11]])
    assert store.episode_ids.tolist() == [2, 10, 11]
    with pytest.raises(SourceError, match=r"no filter key valid; it has train"):
        open_source(path, IngestOptions(episodes="valid"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["f4", "u1"])
def test_diffusion_policy(tmp_path, packed, dtype):
    episodes = make_episodes(cameras=("img",), dims=(14, 2))
    path = foreign.write_diffusion_policy(tmp_path / "p.zarr", episodes, images_dtype=dtype)
    if packed:
        path = foreign.pack(path, tmp_path / "p.zarr.zip")
    fill(path, tmp_path / "s", **PUSHT)
    store = check(tmp_path / "s", episodes)
    assert (store.spec.task, store.spec.fps, store.spec.cameras) == ("p", 10, ("img",))


def test_cameras_are_chosen_renamed_and_resized(tmp_path):
    episodes = make_episodes()
    path = foreign.write_aloha(tmp_path / "a", episodes)
    options = {"cameras": (("high", "top"), ("wrist", "left_wrist")), "image_size": (12, 16)}
    fill(path, tmp_path / "s", **options)
    for one in episodes:
        blocks = {name: one["images"][key] for name, key in options["cameras"]}
        one["images"] = {
            name: np.floor(frames.reshape(-1, 12, 2, 16, 2, 3).mean((2, 4)) + 0.5).astype(np.uint8)
            for name, frames in blocks.items()
        }
    store = check(tmp_path / "s", episodes, tolerance=50)  # Pillow rounds after each axis
    assert store.spec.cameras == ("high", "wrist")


def test_resize_averages_over_areas():
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3), np.uint8)
    exact = frames.reshape(2, 2, 3, 3, 3, 3).mean((2, 4))
    assert np.abs(resize(frames, (2, 3)) - exact).max() <= 1
    assert resize(frames, (6, 9)) is frames


def test_cameras_of_two_sizes_need_a_size(tmp_path):
    one = make_episode(0)
    one["images"]["top"] = one["images"]["top"][:, :10]
    path = foreign.write_aloha(tmp_path / "a", [one])
    with pytest.raises(SourceError, match=r"left_wrist 24x32, top 10x32.*--image-size H W"):
        open_source(path, IngestOptions())
    fill(path, tmp_path / "s", image_size=(8, 8))
    assert Store.open(tmp_path / "s").spec.image_size == (8, 8)


def test_without_images(tmp_path):
    episodes = make_episodes()
    fill(foreign.write_aloha(tmp_path / "a", episodes), tmp_path / "s", cameras=())
    for one in episodes:
        one["images"] = {}
    assert check(tmp_path / "s", episodes).spec.cameras == ()


@pytest.mark.parametrize(
    ("text", "columns"),
    [("k", (0, None)), ("a/b[3]", (3, 4)), ("k[:2]", (0, 2)), ("k[2:]", (2, None))],
)
def test_columns(text, columns):
    parsed = Columns.parse(text)
    assert (parsed.start, parsed.stop) == columns


@pytest.mark.parametrize("text", ["", "k[", "k[]", "k[a]", "k[-1]", "[2]", "k[1:2:3]"])
def test_columns_written_wrongly(text):
    with pytest.raises(ValueError, match="is not a key"):
        Columns.parse(text)


def break_aloha(fault):
    """One of the ways in which episode_1.hdf5 can be bad, and words its message must have."""

    def change(path):
        if fault == "truncated":
            os.truncate(path, path.stat().st_size // 2)
            return
        if fault == "empty file":
            path.write_bytes(b"")
            return
        if fault == "no HDF5":
            path.write_bytes(b"hello" * 100)
            return
        with h5py.File(path, "a") as file:
            qpos = file["observations/qpos"]
            if fault == "NaN":
                qpos[3, 2] = np.nan
            elif fault == "infinite":
                file["action"][2, 1] = -np.inf
            elif fault == "no camera":
                del file["observations/images/top"]
            elif fault == "one camera more":
                file["observations/images/extra"] = np.zeros((5, 24, 32, 3), np.uint8)
            elif fault == "no qpos":
                del file["observations/qpos"]
            elif fault == "text":
                del file["action"]
                file["action"] = np.array([b"x"] * 5)
            else:
                shapes = {
                    "no steps": ("action", (0, 14), "f4"),
                    "shorter": ("action", (4, 14), "f4"),
                    "wider": ("action", (5, 15), "f4"),
                    "other size": ("observations/images/top", (5, 24, 30, 3), "u1"),
                    "frames short": ("observations/images/top", (4, 24, 32, 3), "u1"),
                    "float frames": ("observations/images/top", (5, 24, 32, 3), "f4"),
                    "text frames": ("observations/images/top", (5, 24, 32, 3), "S1"),
                }
                name, shape, dtype = shapes[fault]
                del file[name]
                file[name] = np.full(shape, 0.5 if dtype == "f4" and len(shape) == 4 else 0, dtype)

    return change


ALOHA_FAULTS = {
    "truncated": "cannot be read",
    "empty file": "cannot be read",
    "no HDF5": "cannot be read",
    "NaN": r"observations/qpos is nan at step 3, column 2",
    "infinite": r"action is -inf at step 2, column 1",
    "no camera": r"other cameras \(left_wrist\) than the first episode \(left_wrist, top\)",
    "one camera more": r"other cameras \(extra, left_wrist, top\)",
    "no qpos": r"has no observations/qpos; there is images, qvel",
    "text": r"action is .* not numbers",
    "no steps": r"action is empty",
    "shorter": r"qpos has shape \(5, 14\), not \(4, 14\)|has 5 frames",
    "wider": r"action has shape \(5, 15\), not \(5, 14\)",
    "other size": r"camera top has 5 frames of 24x30",
    "frames short": r"camera top has 4 frames",
    "float frames": r"images/top: frames are float32, and a value at step 0 is 0.5",
    "text frames": r"other cameras",
}


@pytest.mark.parametrize("fault", ALOHA_FAULTS)
def test_a_bad_episode_is_named_and_skipped_on_request_only(tmp_path, fault):
    episodes = make_episodes([5, 5, 5])
    folder = foreign.write_aloha(tmp_path / "a", episodes)
    break_aloha(fault)(folder / "episode_1.hdf5")
    with pytest.raises(SourceError, match=ALOHA_FAULTS[fault]) as caught:
        fill(folder, tmp_path / "s")
    assert "episode_1.hdf5" in str(caught.value)
    assert "1 episodes before it are kept" in str(caught.value)
    kept = Store.open(tmp_path / "s", allow_incomplete=True)
    assert kept.episode_ids.tolist() == [0]
    fill(folder, tmp_path / "s", skip_bad=True)
    for one in episodes:
        one["images"] = dict(sorted(one["images"].items()))
    store = check(tmp_path / "s", [episodes[0], episodes[2]])
    assert store.skipped == (1,)
    assert store.episode_ids.tolist() == [0, 2]


def test_the_first_episode_may_be_the_bad_one(tmp_path):
    episodes = make_episodes([5, 5])
    folder = foreign.write_aloha(tmp_path / "a", episodes)
    (folder / "episode_0.hdf5").write_bytes(b"")
    with pytest.raises(SourceError, match=r"episode_0.hdf5 is bad"):
        fill(folder, tmp_path / "s")
    fill(folder, tmp_path / "s", skip_bad=True)
    (folder / "episode_1.hdf5").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no episode can be read.*episode_0.hdf5 cannot be read"):
        open_source(folder, IngestOptions())


@pytest.mark.parametrize("damage", ["cut", "zeros", "size"])
def test_a_damaged_jpeg_is_named_with_its_step(tmp_path, damage):
    folder = foreign.write_aloha(tmp_path / "a", [make_episode(0), make_episode(1)], compress=True)
    with h5py.File(folder / "episode_1.hdf5", "a") as file:
        rows = file["observations/images/top"]
        row = rows[4]
        if damage == "cut":
            row[len(row) // 2 :] = 0
        elif damage == "zeros":
            row[:] = 0
        else:
            other = foreign.cv2_jpeg(np.zeros((16, 16, 3), np.uint8))
            row[:] = 0
            row[: len(other)] = other[: len(row)]
        rows[4] = row
    with pytest.raises(SourceError, match=r"episode_1.hdf5.*images/top.* at step 4") as caught:
        fill(folder, tmp_path / "s")
    assert ("16x16 pixels, not 24x32" in str(caught.value)) == (damage == "size")


def break_robomimic(file, fault):
    demo = file["data/demo_1"]
    if fault == "num_samples":
        demo.attrs["num_samples"] = 9
    elif fault == "no camera":
        del demo["obs/top_image"]
    elif fault == "NaN":
        demo["obs/robot0_eef_quat"][0, 3] = np.nan
    elif fault == "no actions":
        del demo["actions"]
    elif fault == "no obs":
        del demo["obs"]
    elif fault == "rewards":
        del demo["rewards"]
        demo["rewards"] = np.zeros(3)
    elif fault == "fractions":
        frames = demo["obs/top_image"][...] / np.float32(255)
        del demo["obs/top_image"]
        demo["obs/top_image"] = frames
    elif fault == "length":
        frames = demo["obs/top_image"][:-1]
        del demo["obs/top_image"]
        demo["obs/top_image"] = frames


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("num_samples", r"num_samples is 9, but there are 5 actions"),
        ("no camera", r"other cameras \(left_wrist_image\) than"),
        ("NaN", r"robot0_eef_quat is nan at step 0, column 3"),
        ("no actions", r"has no data/demo_1/actions"),
        ("no obs", r"has no"),
        ("rewards", r"rewards of shape \(3,\)"),
        ("fractions", r"frames are float32, and a value at step 0 is 0\.\d+; only whole numbers"),
        ("length", r"camera top_image has shape \(4, 24, 32, 3\), not \(5, 24, 32, 3\)"),
    ],
)
def test_a_bad_demonstration_is_named(tmp_path, fault, message):
    episodes = make_episodes([5, 5, 5], dims=(9, 7))
    path = foreign.write_robomimic(tmp_path / "x.hdf5", episodes)
    with h5py.File(path, "a") as file:
        break_robomimic(file, fault)
    with pytest.raises(SourceError, match=message) as caught:
        fill(path, tmp_path / "s")
    assert "demo_1" in str(caught.value)
    assert "x.hdf5" in str(caught.value)
    fill(path, tmp_path / "s", skip_bad=True)
    assert Store.open(tmp_path / "s").episode_ids.tolist() == [0, 2]


def test_robomimic_says_what_is_missing(tmp_path):
    path = foreign.write_robomimic(tmp_path / "x.hdf5", make_episodes(dims=(9, 7), cameras=()))
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = "{}"
        for demo in file["data"].values():
            del demo["obs/robot0_eef_pos"]
    with pytest.raises(SourceError, match=r"say with --qpos KEY .*robot0_eef_quat"):
        open_source(path, IngestOptions())
    with pytest.raises(SourceError, match="give --fps"):
        open_source(path, IngestOptions(qpos=("object",)))
    assert open_source(path, IngestOptions(qpos=("object[:3]",), fps=20)).spec.dim_qpos == 3


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([7, 5, 20], r"episode_ends is 5 at episode 1, less than before"),
        ([-3, 8, 20], r"episode_ends is -3 at episode 0"),
        ([7, 7, 20], r"episode 1 has no steps"),
        ([7, 8, 25], r"episode 2: data/state ends at row 20, before 25"),
    ],
)
def test_episode_ends_that_cannot_be(tmp_path, ends, message):
    path = foreign.write_diffusion_policy(tmp_path / "p.zarr", make_episodes(cameras=("img",)))
    zarr.open_group(path)["meta/episode_ends"][:] = ends
    with pytest.raises(SourceError, match=message):
        fill(path, tmp_path / "s", **PUSHT)


@pytest.mark.parametrize("key", ["data/img/4.0.0.0", "data/state/0.0", "meta/episode_ends/0"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_chunk_is_no_black_frame(tmp_path, key, packed):
    path = foreign.write_diffusion_policy(tmp_path / "p.zarr", make_episodes(cameras=("img",)))
    (path / key).unlink()
    if packed:
        path = foreign.pack(path, tmp_path / "p.zarr.zip")
    with pytest.raises(SourceError, match=f"{path.name}.*the chunk {key} is missing"):
        fill(path, tmp_path / "s", **PUSHT)


def test_diffusion_policy_says_what_is_missing(tmp_path):
    episodes = make_episodes(cameras=("img",))
    path = foreign.write_diffusion_policy(tmp_path / "p.zarr", episodes)
    with pytest.raises(SourceError, match=r"give --qpos KEY \.\.\., of .*state \(24,\)"):
        open_source(path, IngestOptions(fps=10))
    with pytest.raises(SourceError, match=r"give --fps F \(PushT"):
        open_source(path, IngestOptions(qpos=("state",)))
    with pytest.raises(SourceError, match=r"no data/gone; it holds .*state"):
        open_source(path, IngestOptions(qpos=("gone",), fps=10))
    with pytest.raises(SourceError, match=r"no camera top; it holds img"):
        open_source(path, IngestOptions(qpos=("state",), fps=10, cameras=(("top", "top"),)))
    document = path / "data/img/.zarray"
    document.write_text(document.read_text().replace('"blosc"', '"imagecodecs_jpeg2k"'))
    with pytest.raises(SourceError, match="install imagecodecs"):
        open_source(path, IngestOptions(**PUSHT))


def test_resume_refuses_another_source(tmp_path):
    episodes = make_episodes(cameras=("img",))
    path = foreign.write_diffusion_policy(tmp_path / "p.zarr", episodes)
    fill(path, tmp_path / "s", **PUSHT)
    shutil.rmtree(path)
    foreign.write_diffusion_policy(path, episodes[1:])
    with pytest.raises(ValueError, match="episode_ends_sha256"):
        fill(path, tmp_path / "s", **PUSHT)


def test_resume_refuses_files_numbered_anew(tmp_path):
    episodes = make_episodes([4, 4, 4], cameras=("top",))
    folder = foreign.write_aloha(tmp_path / "a", episodes)
    fill(folder, tmp_path / "s")
    for number in (1, 2):  # the first one is taken away, and the others close up
        (folder / f"episode_{number}.hdf5").rename(folder / f"episode_{number - 1}.hdf5")
    with pytest.raises(SourceError, match="last episode, of id 2, is not that of the source"):
        fill(folder, tmp_path / "s")
    shutil.copy(folder / "episode_0.hdf5", folder / "episode_2.hdf5")
    with pytest.raises(SourceError, match="last episode, of id 2, is not that of the source"):
        fill(folder, tmp_path / "s")


def test_new_episodes_of_a_folder_are_added(tmp_path):
    episodes = make_episodes(cameras=("top",))
    folder = foreign.write_aloha(tmp_path / "a", episodes[:2])
    fill(folder, tmp_path / "s")
    foreign.write_aloha(folder, episodes)
    fill(folder, tmp_path / "s")
    check(tmp_path / "s", episodes)


def same_files(left, right):
    """The two folders hold the same files, byte by byte; the lock files lie beside them."""
    names = [
        sorted(file.relative_to(root) for file in root.rglob("*") if file.is_file())
        for root in (left, right)
    ]
    return names[0] == names[1] and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names[0]
    )


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
import act_lightning.ingest.aloha  # here, and not again in every child
from act_lightning.ingest.formats import open_source
from act_lightning.ingest.run import ingest
from act_lightning.ingest.source import IngestOptions

source, store = Path(sys.argv[1]), Path(sys.argv[2])
delay = random.Random(0)
for kills in range(100):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        ingest(open_source(source, IngestOptions(), "aloha"), str(store))
        os._exit(0)
    time.sleep(delay.uniform(0, 0.02 * (kills + 1)))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
print(kills, status)
"""
"""Forks an ingest and kills it, until one ends by itself; a process a kill would take seconds."""


def test_killed_ingest_goes_on_to_the_same_store(tmp_path):
    lengths = [100, 150, 130, 120, 110, 140] * 2
    path = foreign.write_aloha(tmp_path / "a", make_episodes(lengths, cameras=("top",)))
    fill(path, tmp_path / "straight")
    command = [sys.executable, "-c", KILLING, path, tmp_path / "killed"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kills, status = map(int, run.stdout.split())
    assert kills >= 5
    assert status == 0
    assert same_files(tmp_path / "straight", tmp_path / "killed")


RUN = """
import sys
from act_lightning.ingest.verbs import ingest_verb

if __name__ == "__main__":
    ingest_verb(sys.argv[1:])
"""


def peak_memory(command):
    """Runs a command to its end. Returns the most memory that it and its children held, in bytes.

    Pages that several of its processes share, as libraries, count once (PSS).
    """
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        total = 0
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        peak = max(peak, total * 1024)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """Two cameras of 2,500 frames of 480x640 in one episode are 4.6 GB; the limit is 1 GiB."""
    num_steps, size = 2500, (480, 640, 3)
    (tmp_path / "a").mkdir()
    with h5py.File(tmp_path / "a" / "episode_0.hdf5", "w") as file:
        file["observations/qpos"] = np.zeros((num_steps, 14), np.float32)
        file["action"] = np.zeros((num_steps, 14), np.float32)
        frame = np.random.default_rng(0).integers(0, 256, (*size[:2], 1), np.uint8) // 64 * 64
        packed = zlib.compress(np.repeat(frame, 3, axis=2).tobytes(), 1)
        for camera in ("top", "wrist"):
            frames = file.create_dataset(
                f"observations/images/{camera}",
                (num_steps, *size),
                "u1",
                chunks=(1, *size),
                compression="gzip",
            )
            for step in range(num_steps):  # thousands of frames for the price of one
                frames.id.write_direct_chunk((step, 0, 0, 0), packed)
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "a", tmp_path / "s"]
    peak = peak_memory([*command, "--format", "aloha"])
    print(f"peak {peak / 1e6:.0f} MB")
    assert peak < 2**30
    assert Store.open(tmp_path / "s").num_frames == num_steps


class CrashingSource(AlohaSource):
    """As if libhdf5 crashed over one episode, and hung over another."""

    def read(self, id):
        if id == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if id == 3:
            time.sleep(1000)
        return super().read(id)


def test_a_crashing_or_hanging_reader_costs_one_episode(tmp_path, capsys):
    episodes = make_episodes([4] * 5, cameras=("top",))
    folder = foreign.write_aloha(tmp_path / "a", episodes)
    opener = partial(CrashingSource, folder, IngestOptions())
    with IsolatedSource(opener, folder, timeout_s=30) as source:
        with pytest.raises(SourceError, match=r"episode_1.hdf5: the library .* \(SIGSEGV\)"):
            ingest(source, str(tmp_path / "s"))
        source.read(2)
        source._timeout_s = 1.0  # only now, as opening again takes longer under load
        with pytest.raises(SourceError, match=r"episode_3.hdf5: the reader gave no answer for 1 s"):
            source.read(3)
        source._timeout_s = 30.0
        assert len(source.read(4).actions) == 4
    plain = open_source(folder, IngestOptions())
    ingest(plain, str(tmp_path / "s"))
    check(tmp_path / "s", episodes)


def test_verb(tmp_path, capsys):
    folder = foreign.write_aloha(tmp_path / "cube", make_episodes(cameras=("top", "depth")))
    arguments = [str(folder), str(tmp_path / "s"), "--cameras", "front=top", "--verify"]
    ingest_verb([*arguments, "--task", "lift", "--fps", "25", "--image-size", "12", "16"])
    printed = capsys.readouterr().out
    assert "aloha, 3 episodes, 25 fps" in printed
    assert "not taken: observations/qvel, observations/images/depth" in printed
    assert "equal to the source" in printed
    spec = Store.open(tmp_path / "s").spec
    assert (spec.task, spec.fps) == ("lift", 25)
    assert (spec.cameras, spec.image_size) == (("front",), (12, 16))


def test_what_no_reader_recognises(tmp_path):
    with pytest.raises(SourceError, match="not recognised as lerobot, diffusion_policy, robomimic"):
        open_source(tmp_path, IngestOptions())
    with pytest.raises(SourceError, match="is not there"):
        open_source(tmp_path / "gone", IngestOptions())
