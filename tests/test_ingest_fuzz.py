"""Readers of foreign formats on mutated files: no crash, no hang, no silent wrong data.

What "silent wrong data" can mean depends on the format. The rules, from strict to lenient:

- Where bytes lie under a checksum (HDF5 of format 2 with fletcher32, gzip's adler32, zstd's own,
  a zip's CRC-32), a mutated file is refused, or read as if it had not been touched.
- Raw data without a checksum (HDF5 as the original recorders write it, Zarr without compression,
  JPEG, blosc) may change the steps whose bytes were hit, and nothing else: all other values are
  the original's, bit by bit.
- Metadata without a checksum (HDF5's old object headers, Zarr's JSON) can be changed to other
  metadata that is just as valid. There the episode is refused or well-formed: finite, of the data
  set's shapes and types. In a folder of files, other files' episodes are untouched.

Every refusal names the file. Where a library in C crashes or hangs, the ingest must survive it, as
it reads in a process of its own; such inputs are counted apart. INGEST_FUZZ=10000 sets the number
of mutated files; the default is a few hundred, always the same ones.
"""

import json
import os
import shutil
from collections import Counter
from functools import partial

import foreign
import h5py
import numcodecs
import numpy as np
import pytest
import zarr
from fuzz_worker import TIME_LIMIT_S, DiedError, Worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from act_lightning.ingest.formats import open_source
from act_lightning.ingest.isolate import IsolatedSource
from act_lightning.ingest.source import IngestOptions, SourceError

INPUTS = int(os.environ.get("INGEST_FUZZ", "300"))
SLOW_INPUTS = 4000
LENGTHS = (3, 5)
SIZE = (8, 10)
PUSHT = IngestOptions(qpos=("state[:14]",), env_state=("state[14:]",), fps=10.0)


class Base:
    """A good data set, and what each byte of its files means."""

    format: str
    options = IngestOptions()

    def __init__(self, folder):
        self.folder = folder
        self.path = self.write(folder)
        self.files = (
            sorted(file for file in self.path.rglob("*") if file.is_file())
            if self.path.is_dir()
            else [self.path]
        )
        self.contents = {file: file.read_bytes() for file in self.files}

    def write(self, folder):
        raise NotImplementedError

    def rule(self, file, changed):
        """What may differ, given the offsets that changed in a file.

        Returns:
            "same", or "formed", or the set of (id, array, step) whose values may differ.
        """
        raise NotImplementedError

    def restore(self, file):
        file.write_bytes(self.contents[file])


class Aloha(Base):
    format = "aloha"
    compress = False

    def write(self, folder):
        episodes = [foreign.make_episode(i, n, size=SIZE) for i, n in enumerate(LENGTHS)]
        return foreign.write_aloha(folder / "cube", episodes, compress=self.compress)

    def rule(self, file, changed):
        id = int(file.stem.removeprefix("episode_"))
        with h5py.File(file) as root:
            names = {"observations/qpos": "qpos", "action": "action"}
            names |= {
                f"observations/images/{camera}": f"images_{camera}"
                for camera in root["observations/images"]
            }
            extents = [
                (start, stop, id, name, row, row_bytes)
                for key, name in names.items()
                for start, stop, row, row_bytes in hdf5_extents(root[key])
            ]
        return covered(extents, changed)


class AlohaJpeg(Aloha):
    compress = True


class AlohaChecked(Aloha):
    """The same groups, in HDF5's newer format, whose every part has a checksum."""

    def write(self, folder):
        path = super().write(folder)
        for file in path.iterdir():
            old = file.with_suffix(".old")
            file.rename(old)
            with h5py.File(old) as source, h5py.File(file, "w", libver="latest") as target:
                target.attrs["sim"] = source.attrs["sim"]
                source.visititems(lambda name, item: checked_copy(target, name, item))  # noqa: B023
            old.unlink()
        return path

    def rule(self, file, changed):
        return "same"


def checked_copy(target, name, item):
    if isinstance(item, h5py.Dataset):
        chunks = (1, *item.shape[1:])
        target.create_dataset(name, data=item[...], chunks=chunks, fletcher32=True)


class Robomimic(Base):
    format = "robomimic"
    compress = False
    options = IngestOptions(env_state=("object",))

    def write(self, folder):
        episodes = [foreign.make_episode(i, n, size=SIZE) for i, n in enumerate(LENGTHS)]
        return foreign.write_robomimic(folder / "x.hdf5", episodes, compress=self.compress)

    def rule(self, file, changed):
        arrays = {"actions": "action", "obs/object": "env_state"}
        arrays |= {f"obs/{key}": "qpos" for key in foreign.ROBOMIMIC_QPOS}
        arrays |= {f"obs/{key}_image": f"images_{key}_image" for key in ("top", "left_wrist")}
        extents = []
        with h5py.File(file) as root:
            for id in range(len(LENGTHS)):
                for key, name in arrays.items():
                    for start, stop, row, size in hdf5_extents(root[f"data/demo_{id}/{key}"]):
                        extents.append((start, stop, id, name, row, size))
                # A reward decides on success alone, which is not compared.
                rewards = root[f"data/demo_{id}/rewards"]
                extents += [(*extent[:2], id, "success", 0, 1) for extent in hdf5_extents(rewards)]
        return covered(extents, changed)


class RobomimicGzip(Robomimic):
    compress = True

    def rule(self, file, changed):
        rule = super().rule(file, changed)
        if rule == "formed":
            return rule
        # Chunks under gzip's checksum must not differ; actions and rewards are not compressed.
        return {place for place in rule if place[1] in ("action", "success")}


class DiffusionPolicy(Base):
    format = "diffusion_policy"
    options = PUSHT
    compressor = None

    def write(self, folder):
        episodes = [
            foreign.make_episode(i, n, size=SIZE, cameras=("img",), dims=(14, 2))
            for i, n in enumerate(LENGTHS)
        ]
        return foreign.write_diffusion_policy(
            folder / "p.zarr", episodes, images_dtype="u1", compressor=self.compressor
        )

    def rule(self, file, changed):
        if not changed or file.name in (".zattrs", ".zgroup"):
            return "same"
        array = file.parent.name
        if file.name == ".zarray" or array == "episode_ends":
            return "formed"
        names = {"state": ("qpos", "env_state"), "action": ("action",), "img": ("images_img",)}
        first = int(file.name.split(".")[0]) * 3
        rows = range(first, first + 3)
        if self.compressor is None:
            row_bytes = len(self.contents[file]) // 3
            rows = {first + offset // row_bytes for offset in changed}
        elif isinstance(self.compressor, numcodecs.Zstd):
            return "same"
        steps = [(id, t) for id, n in enumerate(LENGTHS) for t in range(n)]
        return {
            (steps[row][0], name, steps[row][1])
            for row in rows
            if row < len(steps)
            for name in names[array]
        }


class DiffusionPolicyBlosc(DiffusionPolicy):
    compressor = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.NOSHUFFLE)


class DiffusionPolicyZstd(DiffusionPolicy):
    compressor = numcodecs.Zstd(level=1, checksum=True)


class DiffusionPolicyZip(DiffusionPolicyBlosc):
    """Packed: every member has a CRC-32."""

    def write(self, folder):
        return foreign.pack(super().write(folder), folder / "p.zarr.zip")

    def rule(self, file, changed):
        return "same"


def hdf5_extents(dataset):
    """(start, stop, first row, bytes a row) of the places of a dataset's raw data in its file."""
    row_bytes = int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is None:  # compact, inside the metadata
            return []
        return [(start, start + dataset.nbytes, 0, row_bytes)]
    infos = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
    extents = []
    for info in infos:
        # Of a compressed chunk every row may be hit.
        rows = dataset.chunks[0] if dataset.compression else 1
        for row in range(rows):
            size = info.size if dataset.compression else row_bytes
            begin = info.byte_offset if dataset.compression else info.byte_offset + row * row_bytes
            extents.append((begin, begin + size, info.chunk_offset[0] + row, size))
    return extents


def covered(extents, changed):
    """Places that the changed offsets belong to; "formed" if one is metadata."""
    places = set()
    for offset in changed:
        hits = [one for one in extents if one[0] <= offset < one[1]]
        if not hits:
            return "formed"
        for start, _, id, name, row, row_bytes in hits:
            places.add((id, name, row + (offset - start) // row_bytes))
    return places


BASES = {
    base.__name__: base
    for base in (
        Aloha,
        AlohaJpeg,
        AlohaChecked,
        Robomimic,
        RobomimicGzip,
        DiffusionPolicy,
        DiffusionPolicyBlosc,
        DiffusionPolicyZstd,
        DiffusionPolicyZip,
    )
}

position = st.floats(0, 1, exclude_max=True)
word = st.sampled_from([0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1])
mutation = st.one_of(
    st.tuples(
        st.just("flip"), st.lists(st.tuples(position, st.integers(1, 255)), min_size=1, max_size=4)
    ),
    st.tuples(st.just("cut"), position),
    st.tuples(st.just("zero"), position, st.integers(1, 64)),
    st.tuples(st.just("write"), position, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("word"), position, word, st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("copy"), position, position, st.integers(1, 64)),
    st.tuples(st.just("insert"), position, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("delete"), position, st.integers(1, 8)),
)


def mutate(content, mutation):
    """The mutated bytes of a file."""
    kind, *arguments = mutation
    data = bytearray(content)
    at = 0 if kind == "flip" else int(arguments[0] * len(data))
    if kind == "flip":
        for place, mask in arguments[0]:
            data[int(place * len(data))] ^= mask
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        end = min(at + arguments[1], len(data))
        data[at:end] = bytes(end - at)
    elif kind == "write":
        data[at : at + len(arguments[1])] = arguments[1]
    elif kind == "word":
        value = (arguments[1] % 256 ** arguments[2]).to_bytes(arguments[2], "little")
        data[at : at + arguments[2]] = value
    elif kind == "copy":
        source = int(arguments[1] * len(data))
        data[at : at + arguments[2]] = data[source : source + arguments[2]]
    elif kind == "insert":
        data[at:at] = arguments[1]
    elif kind == "delete":
        del data[at : at + arguments[1]]
    return bytes(data)


def changed_offsets(old, new):
    """Offsets of the old file whose byte is another now."""
    if len(old) == len(new):
        return np.flatnonzero(np.frombuffer(old, "u1") != np.frombuffer(new, "u1")).tolist()
    shared = min(len(old), len(new))
    differ = np.flatnonzero(np.frombuffer(old[:shared], "u1") != np.frombuffer(new[:shared], "u1"))
    first = int(differ[0]) if len(differ) else shared
    return list(range(first, len(old)))


def judge(base, good, reading, rule, file):
    """Checks a reading against the original's; says how it came out.

    Args:
        base: the data set.
        good: reading of the original.
        reading: of the mutated one.
        rule: what `Base.rule` gave.
        file: that was mutated.
    """
    assert reading.bug is None, reading.bug
    messages = [reading.fault] if reading.fault else []
    messages += [one for one in reading.episodes.values() if isinstance(one, str)]
    for message in messages:
        assert base.path.name in message or file.name in message, message
    if reading.fault:
        return "refused"
    assert rule == "formed" or list(reading.episodes) == list(good.episodes)
    outcome = "refused" if messages else "same"
    for id, arrays in reading.episodes.items():
        if isinstance(arrays, str):
            continue
        for name, array in arrays.items():
            original = good.episodes.get(id, {}).get(name)
            if original is not None and np.array_equal(array, original):
                continue
            untouched = base.format == "aloha" and file.stem != f"episode_{id}"
            assert rule != "same", f"{name} of {id} differs under a checksum"
            assert not untouched, f"{name} of {id} differs, whose file was not touched"
            if rule == "formed":  # shapes, types and finiteness were checked by the worker
                outcome = "other metadata"
                continue
            assert original.shape == array.shape
            differ = (original != array).reshape(len(array), -1).any(axis=1)
            for step in np.flatnonzero(differ):
                assert (id, name, int(step)) in rule, f"{name} of {id} differs at step {step}"
            outcome = "raw data"
    return outcome


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


def fuzz_bytes(base, worker, num_inputs):
    """Reads mutated copies of a data set; counts outcomes."""
    good = worker.read(base.path, base.options, base.format)
    assert good.fault is None
    assert not any(isinstance(one, str) for one in good.episodes.values())
    counts = Counter()

    @settings(
        max_examples=num_inputs,
        deadline=None,
        database=None,
        derandomize="INGEST_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(base.files), mutation)
    def check(file, mutation):
        old = base.contents[file]
        new = mutate(old, mutation)
        rule = base.rule(file, changed_offsets(old, new)) if new != old else "same"
        if len(new) > len(old) and new[: len(old)] == old:
            rule = "formed" if rule == "same" and base.format == "diffusion_policy" else rule
        file.write_bytes(new)
        try:
            reading = worker.read(base.path, base.options, base.format)
            counts[judge(base, good, reading, rule, file)] += 1
        except DiedError as error:
            counts[f"reader {error}"] += 1
            check_contained(base, file, counts.total())
        finally:
            base.restore(file)

    check()
    return counts


def check_contained(base, file, number):
    """What takes a C library down costs the ingest no more than an episode, and is kept to look at.

    The ingest reads in a process like the worker's; this is the real one.
    """
    kept = base.folder / f"died_{number}"
    kept.mkdir()
    shutil.copy(file, kept)
    print(f"the reader died over {kept / file.name}")
    opener = partial(open_source, base.path, base.options, base.format)
    faults = 0
    try:
        with IsolatedSource(opener, base.path, timeout_s=TIME_LIMIT_S) as source:
            for id in source.ids:
                try:
                    episode = source.read(id)
                    for camera in range(len(source.spec.cameras)):
                        episode.frames.read(camera, 0, len(episode.actions))
                except SourceError:
                    faults += 1
    except SourceError:
        faults += 1
    assert faults


def report(name, counts):
    print(f"FUZZ {name}: {counts.total()} inputs, {json.dumps(dict(sorted(counts.items())))}")


@pytest.mark.parametrize("name", BASES)
def test_mutated_bytes(name, tmp_path, worker):
    report(name, fuzz_bytes(BASES[name](tmp_path), worker, max(10, INPUTS // len(BASES))))


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_mutated_bytes_at_length(name, tmp_path, worker):
    report(name, fuzz_bytes(BASES[name](tmp_path), worker, SLOW_INPUTS // len(BASES)))


def h5_delete(file, key, data):
    del file[key]


def h5_replace(file, key, value, **options):
    del file[key]
    return file.create_dataset(key, data=value, **options)


def h5_shorten(file, key, data):
    h5_replace(file, key, file[key][:-1])


def h5_lengthen(file, key, data):
    h5_replace(file, key, np.concatenate([file[key], file[key][-1:]]))


def h5_transpose(file, key, data):
    h5_replace(file, key, np.swapaxes(file[key], 0, 1))


def h5_empty(file, key, data):
    h5_replace(file, key, file[key][:0])


def h5_scalar(file, key, data):
    h5_replace(file, key, 1.0)


def h5_null(file, key, data):
    del file[key]
    file[key] = h5py.Empty("f4")


def h5_text(file, key, data):
    h5_replace(file, key, np.full(file[key].shape, b"x"))


def h5_complex(file, key, data):
    h5_replace(file, key, file[key][...].astype("c8"))


def h5_compound(file, key, data):
    h5_replace(file, key, np.zeros(file[key].shape, [("a", "f4"), ("b", "i8")]))


def h5_ragged(file, key, data):
    rows = len(file[key])
    del file[key]
    file.create_dataset(key, (rows,), h5py.vlen_dtype(np.uint8))


def h5_group(file, key, data):
    del file[key]
    file.create_group(key)


def h5_dangling(file, key, data):
    del file[key]
    file[key] = h5py.SoftLink("/nowhere")


def h5_loop(file, key, data):
    del file[key]
    file[key] = h5py.SoftLink(f"/{key}")


def h5_external(file, key, data):
    del file[key]
    file[key] = h5py.ExternalLink("gone.hdf5", "/x")


def h5_unwritten(file, key, data):
    shape, dtype = file[key].shape, file[key].dtype
    del file[key]
    file.create_dataset(key, shape, dtype, chunks=(1, *shape[1:]))


def h5_huge(file, key, data):
    shape, dtype = file[key].shape, file[key].dtype
    del file[key]
    file.create_dataset(key, (2**40, *shape[1:]), dtype, chunks=(1, *shape[1:]))


def h5_wide_chunk(file, key, data):
    del file[key]
    file.create_dataset(key, (2, 2**29), "u1", chunks=(2, 2**29))


def h5_not_finite(file, key, data):
    value = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e39]))
    array = file[key][...].astype("f8")
    array.flat[data.draw(st.integers(0, array.size - 1))] = value
    h5_replace(file, key, array)


H5_REFUSED = (
    h5_delete,
    h5_shorten,
    h5_lengthen,
    h5_transpose,
    h5_empty,
    h5_scalar,
    h5_null,
    h5_text,
    h5_complex,
    h5_compound,
    h5_ragged,
    h5_group,
    h5_dangling,
    h5_loop,
    h5_external,
    h5_unwritten,
    h5_huge,
    h5_wide_chunk,
    h5_not_finite,
)


def h5_wider_type(file, key, data):
    h5_replace(file, key, file[key][...].astype("f8"))


def h5_other_storage(file, key, data):
    array = file[key][...]
    chunks = tuple(data.draw(st.integers(1, size)) for size in array.shape)
    shuffle, checksum = data.draw(st.booleans()), data.draw(st.booleans())
    h5_replace(
        file, key, array, chunks=chunks, compression="gzip", shuffle=shuffle, fletcher32=checksum
    )


def h5_unused(file, key, data):
    file[f"{key}_unused"] = np.full(data.draw(st.integers(0, 4)), np.nan)
    file.attrs["note"] = data.draw(st.text("abc", max_size=4))
    file[key].attrs["unit"] = data.draw(st.floats())


H5_SAME = (h5_wider_type, h5_other_storage, h5_unused)


def check_structure(base, worker, good, file, id, outcome):
    """One episode is refused, or like the original; all others are like the original."""
    reading = worker.read(base.path, base.options, base.format)
    assert reading.bug is None, reading.bug
    assert reading.fault is None, reading.fault
    for other, arrays in good.episodes.items():
        read = reading.episodes[other]
        if other == id and outcome == "refused":
            assert isinstance(read, str), f"{file.name}: nobody noticed"
            assert file.name in read
        else:
            assert not isinstance(read, str), read
            assert read.keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(read[name], array)


def fuzz_hdf5_structure(base, worker, keys, place, num_inputs):
    """Valid HDF5 files of another structure. `place` gives (file, prefix) of episode `id`."""
    good = worker.read(base.path, base.options, base.format)
    counts = Counter()

    @settings(
        max_examples=num_inputs,
        deadline=None,
        database=None,
        derandomize="INGEST_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        # Not the first episode, which is what the others are compared with.
        file, prefix = place(1)
        key = data.draw(st.sampled_from(keys))
        change = data.draw(st.sampled_from((*H5_REFUSED, *H5_SAME)))
        outcome = "refused" if change in H5_REFUSED else "same"
        try:
            with h5py.File(file, "a") as root:
                change(root, prefix + key, data)
            check_structure(base, worker, good, file, 1, outcome)
            counts[outcome] += 1
        except DiedError as error:
            counts[f"reader {error}"] += 1
            check_contained(base, file, counts.total())
        finally:
            base.restore(file)

    check()
    return counts


@pytest.mark.parametrize("name", ["Aloha", "Robomimic"])
def test_hdf5_of_another_structure(name, tmp_path, worker):
    base = BASES[name](tmp_path)
    num_inputs = max(30, INPUTS // 20)
    if name == "Aloha":
        keys = ["observations/qpos", "action", "observations/images/top"]
        counts = fuzz_hdf5_structure(
            base, worker, keys, lambda id: (base.files[id], ""), num_inputs
        )
    else:
        keys = ["actions", "obs/robot0_eef_quat", "obs/object", "obs/top_image"]
        counts = fuzz_hdf5_structure(
            base, worker, keys, lambda id: (base.path, f"data/demo_{id}/"), num_inputs
        )
    report(f"{name} structure", counts)


ZARRAY_REFUSED = {
    "shape": [[2, 24], [], [24], [-8, 24], [8, -24], "8", None, [8.5, 24], [8, 24, 1]],
    "chunks": [[0, 24], [-3, 24], [], [2, 24], [3, 25], [2**62, 24], None, [4, 24]],
    "dtype": ["<f4", "|S8", "|O", "<c16", "nonsense", None, 8, [["a", "<f8"]], "<U4", "<M8[s]"],
    "compressor": [{"id": "gone"}, {}, 7, {"id": "blosc", "cname": "gone"}],
    "filters": [[{"id": "gone"}], [{"id": "delta", "dtype": "nonsense"}], 7],
    "order": ["X", None, 3],
    "zarr_format": [1, 3, "2", None],
    "dimension_separator": ["/", 3],
}
"""Other values in the .zarray of `state`, (8, 24) float64 in chunks of (3, 24)."""


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in ZARRAY_REFUSED.items() for value in values]
)
def test_zarr_of_another_structure(tmp_path, worker, key, value):
    base = DiffusionPolicy(tmp_path)
    file = base.path / "data/state/.zarray"
    document = json.loads(file.read_text())
    assert document["shape"] == [8, 24]
    assert document[key] != value
    file.write_text(json.dumps(document | {key: value}))
    reading = worker.read(base.path, base.options, base.format)
    assert reading.bug is None, reading.bug
    assert (
        reading.fault
        or all(isinstance(one, str) for one in reading.episodes.values())
        or (
            key == "shape" and isinstance(reading.episodes[1], str)  # only what was cut off is lost
        )
    )


ENDS_REFUSED = ([3, 2], [-1, 8], [3, 3], [0, 8], [3, 2**62], [-(2**63), 8], [2**63 - 1, 8])


@pytest.mark.parametrize("ends", ENDS_REFUSED)
def test_episode_ends_of_another_structure(tmp_path, worker, ends):
    base = DiffusionPolicy(tmp_path)
    good = worker.read(base.path, base.options, base.format)
    zarr.open_group(base.path)["meta/episode_ends"][:] = ends
    reading = worker.read(base.path, base.options, base.format)
    assert reading.bug is None, reading.bug
    assert reading.fault or any(isinstance(one, str) for one in reading.episodes.values())
    for id, arrays in reading.episodes.items():
        if not isinstance(arrays, str):
            rows = np.concatenate([one["qpos"] for one in good.episodes.values()])
            start, stop = (0, *ends)[id], ends[id]
            np.testing.assert_array_equal(arrays["qpos"], rows[start:stop])
