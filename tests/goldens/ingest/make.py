"""Makes the files here, with the libraries that the original programs use.

    python make.py aloha    with opencv-python and h5py
    python make.py zarr     with zarr < 3

The calls are those of MarkFzp/act-plus-plus compress_data.py, and of real-stanford/diffusion_policy
replay_buffer.py (`create_empty_zarr`, `add_episode`, `save_to_path`).
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
T, H, W = 5, 24, 32


def frames(seed):
    """Colour gradients that move, red, green and blue well apart."""
    y, x = np.mgrid[:H, :W]
    t = np.arange(T)[:, None, None]
    waves = [np.sin((x + y) / (8 + 3 * i) + t / 5 + seed + i) for i in range(3)]
    return np.round(np.stack(waves, -1) * (100, 60, 20) + (140, 100, 60)).astype(np.uint8)


def make_aloha():
    """An episode of two cameras, compressed; what cv2 decodes again lies beside it."""
    import cv2
    import h5py

    images = {"cam_high": frames(0), "cam_left_wrist": frames(1)}
    rng = np.random.default_rng(0)
    with h5py.File(HERE / "episode_0.hdf5", "w") as out:
        out.attrs["sim"] = False
        out.attrs["compress"] = True
        obs = out.create_group("observations")
        group = obs.create_group("images")
        lengths, decoded = [], {}
        for name, stack in images.items():
            encoded = [
                cv2.imencode(".jpg", one, [cv2.IMWRITE_JPEG_QUALITY, 50])[1] for one in stack
            ]
            lengths.append([len(one) for one in encoded])
            data = group.create_dataset(name, (T, max(lengths[-1])), dtype="uint8")
            for i, one in enumerate(encoded):
                data[i, : len(one)] = one.reshape(-1)
            decoded[name] = np.stack([cv2.imdecode(row, 1) for row in data[...]])
        for name in ("qpos", "qvel"):
            obs[name] = rng.normal(size=(T, 14)).astype(np.float32)
        out["action"] = rng.normal(size=(T, 14)).astype(np.float32)
        out["compress_len"] = np.array(lengths, np.float32)
    recorded = {f"recorded_{name}": stack for name, stack in images.items()}
    np.savez_compressed(HERE / "episode_0.npz", **decoded, **recorded)


def make_zarr():
    """Two episodes as PushT has them, packed."""
    import numcodecs
    import zarr

    root = zarr.group(store=zarr.MemoryStore())
    data, meta = root.require_group("data"), root.require_group("meta")
    ends = meta.zeros("episode_ends", shape=(0,), dtype=np.int64, compressor=None)
    rng = np.random.default_rng(1)
    length = 0
    codec = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.NOSHUFFLE)
    for seed in (0, 1):
        episode = {
            "img": frames(seed).astype(np.float32),
            "state": rng.normal(size=(T, 5)).astype(np.float32),
            "action": rng.normal(size=(T, 2)).astype(np.float32),
        }
        length += T
        for key, value in episode.items():
            shape = (length, *value.shape[1:])
            if key in data:
                data[key].resize(shape)
            else:
                data.zeros(
                    name=key,
                    shape=shape,
                    chunks=(2, *value.shape[1:]),
                    dtype=value.dtype,
                    compressor=codec,
                )
            data[key][-T:] = value
        ends.resize(ends.shape[0] + 1)
        ends[-1] = length
    packed = zarr.ZipStore(str(HERE / "replay.zarr.zip"), mode="w")
    zarr.copy_store(root.store, packed)
    packed.close()
    np.savez_compressed(HERE / "replay.npz", **{key: array[:] for key, array in data.items()})


{"aloha": make_aloha, "zarr": make_zarr}[sys.argv[1]]()
