"""Data sets as other projects write them, call by call as their own writers do."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import zarr
from PIL import Image


def smooth_frames(rng, num_steps, height, width):
    """Frames that JPEG keeps well: colour gradients that move."""
    y, x = np.mgrid[:height, :width]
    t = np.arange(num_steps)[:, None, None]
    phase = rng.uniform(0, 6, 3)
    waves = [np.sin((x + y) / (8 + 3 * i) + t / 5 + phase[i]) for i in range(3)]
    return np.round(np.stack(waves, -1) * (100, 60, 20) + 128).astype(np.uint8)


def make_episode(seed, num_steps=7, cameras=("top", "left_wrist"), size=(24, 32), dims=(14, 14)):
    """What one episode holds, before any format."""
    rng = np.random.default_rng(seed)
    return {
        "qpos": rng.normal(size=(num_steps, dims[0])),
        "qvel": rng.normal(size=(num_steps, dims[0])),
        "action": rng.normal(size=(num_steps, dims[1])),
        "object": rng.normal(size=(num_steps, 10)),
        "images": {camera: smooth_frames(rng, num_steps, *size) for camera in cameras},
    }


def cv2_jpeg(frame, quality=50):
    """The file that cv2.imencode(".jpg", frame) makes, which takes the array for BGR."""
    buffer = io.BytesIO()
    Image.fromarray(frame[..., ::-1]).save(buffer, "JPEG", quality=quality)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def write_aloha(folder, episodes, *, compress=False, sim=False):
    """As MarkFzp/mobile-aloha record_episodes.py and act-plus-plus compress_data.py do."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, episode in enumerate(episodes):
        write_aloha_episode(folder / f"episode_{number}.hdf5", episode, compress, sim)
    return folder


def write_aloha_episode(path, episode, compress=False, sim=False):
    # The originals name no dtype where "f4" stands here; it is h5py's default.
    num_steps = len(episode["action"])
    with h5py.File(path, "w", rdcc_nbytes=1024**2 * 2) as root:
        root.attrs["sim"] = sim
        if compress:
            root.attrs["compress"] = True
        obs = root.create_group("observations")
        image = obs.create_group("images")
        lengths = []
        for camera, frames in episode["images"].items():
            if compress:
                encoded = [cv2_jpeg(frame) for frame in frames]
                longest = max(len(one) for one in encoded)
                data = image.create_dataset(camera, (num_steps, longest), dtype="uint8")
                for i, one in enumerate(encoded):
                    data[i, : len(one)] = one
                lengths.append([len(one) for one in encoded])
            else:
                shape = frames.shape
                image.create_dataset(camera, shape, dtype="uint8", chunks=(1, *shape[1:]))
                image[camera][...] = frames
        obs.create_dataset("qpos", episode["qpos"].shape, dtype="f4")
        obs.create_dataset("qvel", episode["qvel"].shape, dtype="f4")
        root.create_dataset("action", episode["action"].shape, dtype="f4")
        for name in ("qpos", "qvel"):
            obs[name][...] = episode[name]
        root["action"][...] = episode["action"]
        if compress:
            root.create_dataset("compress_len", np.shape(lengths), dtype="f4")
            root["compress_len"][...] = lengths


ROBOMIMIC_QPOS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}


def write_robomimic(path, episodes, *, compress=False, success=None, masks=None):
    """As ARISE-Initiative/robomimic scripts/dataset_states_to_obs.py does; qpos has 9 columns."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        total = 0
        options = {"compression": "gzip"} if compress else {}
        for number, episode in enumerate(episodes):
            num_steps = len(episode["action"])
            demo = data.create_group(f"demo_{number}")
            rewards = np.zeros(num_steps)
            rewards[-1] = 1.0 if success is None or success[number] else 0.0
            demo.create_dataset("actions", data=episode["action"])
            demo.create_dataset("states", data=np.zeros((num_steps, 5)))
            demo.create_dataset("rewards", data=rewards)
            demo.create_dataset("dones", data=(np.arange(num_steps) == num_steps - 1).astype(int))
            start = 0
            for key, size in ROBOMIMIC_QPOS.items():
                columns = episode["qpos"][:, start : start + size]
                demo.create_dataset(f"obs/{key}", data=columns, **options)
                start += size
            demo.create_dataset("obs/object", data=episode["object"], **options)
            for camera, frames in episode["images"].items():
                demo.create_dataset(f"obs/{camera}_image", data=frames, **options)
            demo.attrs["model_file"] = "<mujoco/>"
            demo.attrs["num_samples"] = num_steps
            total += num_steps
        data.attrs["total"] = total
        env = {
            "env_name": "Lift",
            "env_version": "1.4.1",
            "type": 1,
            "env_kwargs": {"control_freq": 20, "reward_shaping": False},
        }
        data.attrs["env_args"] = json.dumps(env, indent=4)
        for name, demos in (masks or {}).items():
            file[f"mask/{name}"] = np.array(demos, dtype="S")
    return Path(path)


def write_diffusion_policy(path, episodes, *, images_dtype="f4", chunk=3, compressor="default"):
    """As real-stanford/diffusion_policy common/replay_buffer.py does, on Zarr v2.

    As in PushT's, qpos is the beginning of `state`, and one camera's frames are floats.
    """
    path = Path(path)
    root = zarr.open_group(path, mode="w", zarr_format=2)
    blosc = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.NOSHUFFLE)
    compressor = blosc if compressor == "default" else compressor
    joined = {
        "state": np.concatenate([np.c_[one["qpos"], one["object"]] for one in episodes]),
        "action": np.concatenate([one["action"] for one in episodes]),
    }
    for camera in episodes[0]["images"]:
        frames = [one["images"][camera] for one in episodes]
        joined[camera] = np.concatenate(frames).astype(images_dtype)
    data = root.require_group("data")
    for key, value in joined.items():
        array = data.create_array(
            key,
            shape=value.shape,
            chunks=(chunk, *value.shape[1:]),
            dtype=value.dtype,
            compressors=compressor,
            config={"write_empty_chunks": True},
        )
        array[:] = value
    ends = np.cumsum([len(one["action"]) for one in episodes])
    meta = root.require_group("meta").create_array(
        "episode_ends", shape=ends.shape, chunks=ends.shape, dtype="i8", compressors=None
    )
    meta[:] = ends
    return path


def pack(folder, target):
    """Packs a Zarr folder as .zarr.zip, uncompressed, as zarr's ZipStore does."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return Path(target)
