import json
import multiprocessing
import os
import pickle
import resource
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
import zstandard
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from act_lightning.data import files as data_files
from act_lightning.data.files import LocalFiles
from act_lightning.data.images import ChunkFrames, DirectFrames, ZarrFrames, open_frames
from act_lightning.data.layout import (
    StoreError,
    frames_document,
    read_shard_index,
    set_length,
    write_frames,
    write_json,
)

NAME = "data/images_top"
SIZE = (6, 8)
FRAMES = np.random.default_rng(0).integers(1, 256, (20, *SIZE, 3), np.uint8)
FRAMES[:, :, 4:] = FRAMES[:, :, :1]  # something to compress


def ours(folder, frames=FRAMES):
    """An array as our writer makes it."""
    array = folder / NAME
    array.mkdir(parents=True)
    write_json(array / "zarr.json", frames_document(*frames.shape[1:3]))
    write_frames(array, 0, len(frames), iter(frames))
    set_length(array, len(frames))
    return array


def foreign(folder, *, shard_frames=None, compressors, frames=FRAMES, index_location="end", **more):
    """The same by zarr-python, in another layout."""
    chunk = (1, *frames.shape[1:])
    if shard_frames is None:
        layout = {"chunks": chunk, "compressors": compressors}
    else:
        inside = ShardingCodec(
            chunk_shape=chunk, codecs=[BytesCodec(), *compressors], index_location=index_location
        )
        layout = {"chunks": (shard_frames, *chunk[1:]), "serializer": inside, "compressors": None}
    array = zarr.create_array(folder / NAME, shape=frames.shape, dtype="uint8", **layout, **more)
    array[:] = frames
    return folder / NAME


def open_at(folder):
    return open_frames(LocalFiles(folder), NAME)


def read(reader, frame, size=SIZE):
    out = np.full((*size, 3), 99, np.uint8)
    reader.read_into(frame, out)
    return out


def edit(path, change):
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


ZSTD, CHECKED = ZstdCodec(level=3), ZstdCodec(level=1, checksum=True)
BLOSC = BloscCodec(cname="lz4")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (DirectFrames, {"shard_frames": 8, "compressors": [ZSTD]}),
        (DirectFrames, {"shard_frames": 8, "compressors": [ZSTD, Crc32cCodec()]}),
        (DirectFrames, {"shard_frames": 20, "compressors": [CHECKED]}),
        (ChunkFrames, {"compressors": [ZSTD]}),
        (ChunkFrames, {"compressors": [CHECKED, Crc32cCodec()]}),
        (ChunkFrames, {"compressors": "auto"}),
        (ZarrFrames, {"compressors": [BLOSC]}),
        (ZarrFrames, {"compressors": None}),
        (ZarrFrames, {"shard_frames": 8, "compressors": [BLOSC]}),
        (ZarrFrames, {"shard_frames": 8, "compressors": []}),
        (ZarrFrames, {"shard_frames": 8, "compressors": [ZSTD], "index_location": "start"}),
        (
            ZarrFrames,
            {"compressors": [ZSTD], "chunk_key_encoding": {"name": "default", "separator": "."}},
        ),
    ],
)
def test_every_layout_of_zarr_python_is_read(tmp_path, kind, layout):
    foreign(tmp_path, **layout)
    reader = open_at(tmp_path)
    assert type(reader) is kind
    for frame in np.random.default_rng(1).permutation(20).tolist():
        np.testing.assert_array_equal(read(reader, frame), FRAMES[frame])


def test_chunks_that_split_frames_or_join_them_are_read(tmp_path):
    for name, chunks in {"split": (1, 3, 8, 3), "joined": (5, 6, 8, 3)}.items():
        array = zarr.create_array(tmp_path / name, shape=FRAMES.shape, chunks=chunks, dtype="uint8")
        array[:] = FRAMES
        reader = open_frames(LocalFiles(tmp_path), name)
        assert type(reader) is ZarrFrames
        np.testing.assert_array_equal(read(reader, 13), FRAMES[13])


def test_ours_is_read_directly_and_by_zarr_python_alike(tmp_path):
    array = ours(tmp_path)
    reader = open_at(tmp_path)
    assert type(reader) is DirectFrames
    by_zarr = ZarrFrames(LocalFiles(tmp_path), NAME, {"fill_value": 0})
    np.testing.assert_array_equal(zarr.open_array(array, mode="r")[:], FRAMES)
    for frame in range(20):
        np.testing.assert_array_equal(read(reader, frame), FRAMES[frame])
        np.testing.assert_array_equal(read(by_zarr, frame), FRAMES[frame])


@pytest.mark.parametrize("compressors", [[ZSTD], [BLOSC]])
def test_missing_chunks_of_others_are_the_fill_value(tmp_path, compressors):
    frames = FRAMES.copy()
    frames[3] = 7
    array = foreign(tmp_path, compressors=compressors, frames=frames, fill_value=7)
    assert not (array / "c/3").exists()
    np.testing.assert_array_equal(read(open_at(tmp_path), 3), frames[3])


def test_nothing_is_added_behind_a_missing_frame(tmp_path):
    array = ours(tmp_path)
    with pytest.raises(StoreError, match="a frame before number 25 is missing"):
        write_frames(array, 25, 1, iter(FRAMES))


def test_frame_missing_in_our_layout_is_damage(tmp_path):
    frames = FRAMES.copy()
    frames[3] = 0
    foreign(tmp_path, shard_frames=8, compressors=[ZSTD], frames=frames)
    reader = open_at(tmp_path)
    np.testing.assert_array_equal(read(reader, 4), frames[4])
    with pytest.raises(
        StoreError, match=r"data/images_top/c/0/0/0/0: frame 3 cannot be read: it is missing"
    ):
        read(reader, 3)
    shutil.rmtree(tmp_path / "data/images_top/c/1")
    with pytest.raises(
        StoreError, match=r"frame 9 .*data/images_top/c/1/0/0/0: a shard of images is missing"
    ):
        read(reader, 9)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "layout",
    [
        {"shard_frames": 8, "compressors": [ZSTD]},
        {"compressors": [ZSTD]},
        {"compressors": [BLOSC]},
        {"shard_frames": 8, "compressors": [BLOSC]},
    ],
)
def test_deleted_array_is_noticed_by_the_next_read(tmp_path, layout, whole):
    """And never filled: black frames would be trained on without a word."""
    foreign(tmp_path / "a", **layout)
    reader = open_at(tmp_path / "a")
    read(reader, 0)
    shutil.rmtree(tmp_path / "a" if whole else tmp_path / "a/data/images_top")
    for frame in (0, 19):
        with pytest.raises(
            StoreError, match=rf"data/images_top.*[Ff]rame {frame} .*|frame {frame}"
        ):
            read(reader, frame)


@pytest.mark.parametrize(
    "layout",
    [
        {"shard_frames": 2, "compressors": [CHECKED]},
        {"shard_frames": 2, "compressors": [ZSTD, Crc32cCodec()]},
        {"compressors": [CHECKED]},
    ],
)
def test_no_flipped_bit_gives_another_picture(tmp_path, layout):
    array = foreign(tmp_path, **layout, frames=FRAMES[:2])
    shard = array / "c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    outcomes = []
    for position in range(len(content)):
        for flip in (1, 4, 128):
            content[position] ^= flip
            shard.write_bytes(content)
            content[position] ^= flip
            reader = open_at(tmp_path)
            try:
                assert np.array_equal(read(reader, 0), FRAMES[0])
                outcomes.append("same")
            except StoreError:
                outcomes.append("error")
    # Flips in the other frame leave this one as it is, so about half of them are harmless.
    assert outcomes.count("error") > 0.3 * len(outcomes)


def test_no_cut_gives_another_picture(tmp_path):
    shard = ours(tmp_path, FRAMES[:2]) / "c/0/0/0/0"
    content = shard.read_bytes()
    before = open_at(tmp_path)
    read(before, 0)
    for length in [*range(0, len(content), 7), len(content) - 1]:
        shard.write_bytes(content[:length])
        with pytest.raises(StoreError, match=r"frame 1 .*(cut off|checksum)"):
            read(open_at(tmp_path), 1)
    # One that knows the index reads on until the frame itself is cut.
    shard.write_bytes(content)
    size = read_shard_index(LocalFiles(tmp_path), NAME + "/c/0/0/0/0", 128)[1].sum()
    shard.write_bytes(content[:size])
    np.testing.assert_array_equal(read(before, 1), FRAMES[1])
    shard.write_bytes(content[: size - 1])
    with pytest.raises(StoreError, match="frame 1 cannot be read: the file is cut off"):
        read(before, 1)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("num_bytes", [0, 143, 144, 145, 100_000])
def test_frames_of_another_size_are_refused(tmp_path, num_bytes, known):
    """Also where the compressed frame does not say how large it is, as streaming writers do."""
    array = foreign(tmp_path, compressors=[ZSTD])
    blob = zstandard.ZstdCompressor(write_content_size=known).compress(bytes(num_bytes))
    (array / "c/5/0/0/0").write_bytes(blob)
    reader = open_at(tmp_path)
    if num_bytes == 144:
        assert not read(reader, 5).any()
    else:
        with pytest.raises(StoreError, match="c/5/0/0/0: frame 5 .*: it does not hold 144 bytes"):
            read(reader, 5)


def test_crc32c_residue_is_that_of_the_library():
    for content in (b"", b"1", bytes(1000)):
        packed = content + google_crc32c.value(content).to_bytes(4, "little")
        assert google_crc32c.value(packed) == 0x48674BC7


def test_reader_of_a_growing_array_stays_right(tmp_path):
    array = ours(tmp_path)
    before = open_at(tmp_path)
    read(before, 0)
    write_frames(array, 20, 20, iter(255 - FRAMES))
    set_length(array, 40)
    for frame in range(20):
        np.testing.assert_array_equal(read(before, frame), FRAMES[frame])
        np.testing.assert_array_equal(read(open_at(tmp_path), 20 + frame), 255 - FRAMES[frame])


LARGE = np.random.default_rng(1).integers(0, 256, (200, 48, 64, 3), np.uint8)


@pytest.mark.parametrize("kind", [DirectFrames, ChunkFrames, ZarrFrames])
def test_threads_forks_and_pickles_read_the_same(tmp_path, kind):
    """Children are forked while the parent's threads are in the midst of reading."""
    if kind is DirectFrames:
        ours(tmp_path, LARGE)
    else:
        compressors = [ZSTD if kind is ChunkFrames else BLOSC]
        foreign(tmp_path, compressors=compressors, frames=LARGE)
    reader = open_at(tmp_path)
    assert type(reader) is kind
    order = np.random.default_rng(2).integers(0, 200, 300).tolist()

    def check(frames):
        for frame in frames:
            np.testing.assert_array_equal(read(reader, frame, (48, 64)), LARGE[frame])

    done = threading.Event()

    def keep_reading():
        while not done.is_set():
            check(order[:20])

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(keep_reading) for _ in range(2)]
        others = [pool.submit(check, order[start::2]) for start in range(2)]
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=check, args=(order[:50],)) for _ in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        done.set()
        for future in (*busy, *others):
            future.result()
    assert [child.exitcode for child in children] == [0, 0, 0]
    if kind is not ZarrFrames:  # a Store sends its location instead
        reader = pickle.loads(pickle.dumps(reader))
        check(order[:20])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_many_shards_are_read_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_OPEN", 256)
    frames = np.random.default_rng(3).integers(0, 256, (600, 2, 2, 3), np.uint8)
    foreign(tmp_path, shard_frames=1, compressors=[ZSTD], frames=frames)
    reader = open_at(tmp_path)
    before = len(os.listdir("/proc/self/fd"))

    def check(seed):
        for frame in np.random.default_rng(seed).permutation(600).tolist():
            np.testing.assert_array_equal(read(reader, frame, (2, 2)), frames[frame])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads meet in the middle of opening and closing
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(check, range(12)))
    finally:
        sys.setswitchinterval(interval)
    assert len(os.listdir("/proc/self/fd")) <= before + 300


@pytest.mark.parametrize(
    ("limit", "expected"), [(200, 50), (20_000, 4096), (resource.RLIM_INFINITY, 4096)]
)
def test_files_stay_open_as_far_as_the_process_may_open_them(monkeypatch, limit, expected):
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_NOFILE: (limit, limit)}.get)
    assert data_files._max_open() == expected


def test_damaged_document_is_refused_or_read_right(tmp_path):
    """Each key left out, and each value replaced, in turn: never another picture, nor a crash."""
    array = foreign(tmp_path, shard_frames=8, compressors=[ZSTD])
    original = json.loads((array / "zarr.json").read_bytes())
    changes = list(_changes(original, ()))
    assert len(changes) > 100
    for path, value in changes:
        document = json.loads(json.dumps(original))
        place = document
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        (array / "zarr.json").write_text(json.dumps(document))
        try:
            picture = read(open_at(tmp_path), 9)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
        np.testing.assert_array_equal(picture, FRAMES[9], err_msg=f"{path} = {value}")


def _changes(node, path):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        for other in (..., None, "x", -1, 3, [], {}):
            yield (*path, key), other
        if isinstance(value, dict | list):
            yield from _changes(value, (*path, key))


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_at(Path(tmp_path))
