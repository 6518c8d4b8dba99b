"""LeRobotDatasets in and out, without LeRobot; `tests/lerobot` compares with LeRobot itself."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import (
    CAMERAS,
    FPS,
    TASK,
    Demo,
    Layout,
    draw,
    encode,
    make_demos,
    psnr,
    read_step,
    write_dataset,
)

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.data.store import Store
from act_lightning.data.writer import StoreWriter
from act_lightning.ingest.formats import open_source
from act_lightning.ingest.run import ingest
from act_lightning.ingest.source import IngestOptions, SourceError
from act_lightning.lerobot.dataset_exporting import export_dataset
from act_lightning.lerobot.dataset_stats import ImageStats, sampled_steps
from act_lightning.lerobot.verbs import export_dataset_verb

LENGTHS = (7, 1, 12, 5)
QPOS, ACTION, ENV = "observation.state", "action", "observation.environment_state"
AV1 = {"codec": "libsvtav1", "options": {"crf": "30", "g": "2", "preset": "8"}}
LONG_GROUPS = {"options": {"crf": "18", "g": "250", "bf": "3"}}
LAYOUTS = [
    Layout(),
    Layout(codec="libsvtav1", options=AV1["options"]),
    Layout(options=LONG_GROUPS["options"], episodes_a_file=4),
    Layout(video=False),
    Layout(version="v2.1"),
    Layout(version="v2.1", codec="libsvtav1", options=AV1["options"]),
    Layout(version="v2.1", options=LONG_GROUPS["options"], chunks_size=2),
    Layout(version="v2.1", video=False),
]


def read_frames(episode, camera, block):
    num_steps = episode.frames.shape[0]
    return np.concatenate(
        [
            episode.frames.read(camera, start, min(start + block, num_steps))
            for start in range(0, num_steps, block)
        ]
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x}-{x.options.get('g')}")
@pytest.mark.parametrize("block", [3, 128])
def test_reads_every_frame(tmp_path, layout, block):
    demos = make_demos(LENGTHS)
    write_dataset(tmp_path / "set", demos, layout)
    source = open_source(tmp_path / "set", IngestOptions())
    assert source.format == "lerobot"
    assert source.spec == DataSpec(
        task=TASK,
        fps=FPS,
        dim_qpos=5,
        dim_action=4,
        dim_env_state=3,
        cameras=CAMERAS,
        image_size=(48, 64),
    )
    assert source.ids == [0, 1, 2, 3]
    for number, demo in enumerate(demos):
        episode = source.read(number)
        np.testing.assert_array_equal(episode.qpos, demo.tables[QPOS])
        np.testing.assert_array_equal(episode.actions, demo.tables[ACTION])
        np.testing.assert_array_equal(episode.env_state, demo.tables[ENV])
        assert (episode.id, episode.success) == (number, None)
        for column, name in enumerate(CAMERAS):
            frames = read_frames(episode, column, block)
            steps = [read_step(frame) for frame in frames]
            assert steps == [(number, column, step) for step in range(len(demo))]
            if layout.video:
                assert psnr(frames, demo.frames[name]) > 30
            else:
                np.testing.assert_array_equal(frames, demo.frames[name])


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=str)
def test_reads_in_any_order(tmp_path, layout):
    """As a resumed ingest does, or one that skips; and frames a second time."""
    write_dataset(tmp_path / "set", make_demos(LENGTHS), layout)
    source = open_source(tmp_path / "set", IngestOptions())
    for number in (2, 0, 3, 2):
        episode = source.read(number)
        for start, stop in ((0, 2), (2, 4), (1, 5), (0, 1)):
            frames = episode.frames.read(1, start, stop)
            assert [read_step(frame)[2] for frame in frames] == list(range(start, stop))


def test_a_folder_of_links_is_read(tmp_path):
    """A hub client's cache is made of links to files elsewhere."""
    write_dataset(tmp_path / "blobs", make_demos([4]), Layout())
    for file in [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]:
        link = tmp_path / "set" / file.relative_to(tmp_path / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    episode = open_source(tmp_path / "set", IngestOptions()).read(0)
    assert read_step(episode.frames.read(0, 0, 4)[3]) == (0, 0, 3)


def test_one_row_group_for_all(tmp_path):
    """As LeRobot's converter and its older writers leave files."""
    demos = make_demos(LENGTHS)
    write_dataset(tmp_path / "set", demos, Layout(video=False, episodes_a_file=4))
    (file,) = (tmp_path / "set/data").glob("*/*.parquet")
    pq.write_table(pq.read_table(file), file)
    source = open_source(tmp_path / "set", IngestOptions())
    for number in (3, 1):
        episode = source.read(number)
        np.testing.assert_array_equal(episode.actions, demos[number].tables[ACTION])
        assert read_step(episode.frames.read(0, 0, 1)[0]) == (number, 0, 0)


def test_fixed_size_lists_and_scalars(tmp_path):
    demos = make_demos([4, 3], dims=(1, 4, 0))
    for demo in demos:
        demo.tables[QPOS] = demo.tables[QPOS][:, 0]
    write_dataset(tmp_path / "set", demos, Layout(video=False))
    (file,) = (tmp_path / "set/data").glob("*/*.parquet")
    table = pq.read_table(file)
    column = table.schema.get_field_index(ACTION)
    fixed = pa.array(table[ACTION].to_pylist(), pa.list_(pa.float32(), 4))
    pq.write_table(table.set_column(column, ACTION, fixed), file)
    source = open_source(tmp_path / "set", IngestOptions())
    assert (source.spec.dim_qpos, source.spec.dim_env_state) == (1, 0)
    for number, demo in enumerate(demos):
        np.testing.assert_array_equal(source.read(number).qpos[:, 0], demo.tables[QPOS])
        np.testing.assert_array_equal(source.read(number).actions, demo.tables[ACTION])


class TestChoices:
    def test_cameras(self, tmp_path):
        write_dataset(tmp_path / "set", make_demos([4]), Layout())
        for key in ("wrist", "observation.images.wrist"):
            options = IngestOptions(cameras=(("hand", key),), image_size=(24, 32))
            source = open_source(tmp_path / "set", options)
            assert (source.spec.cameras, source.spec.image_size) == (("hand",), (24, 32))
            assert source.read(0).frames.read(0, 0, 4).shape == (4, 24, 32, 3)
            assert source.unused == ("observation.images.top",)
        assert open_source(tmp_path / "set", IngestOptions(cameras=())).read(0).frames is None
        with pytest.raises(SourceError, match="no camera side; it holds top, wrist"):
            open_source(tmp_path / "set", IngestOptions(cameras=(("side", "side"),)))

    def test_depth_is_no_camera(self, tmp_path):
        root, key = tmp_path / "set", "observation.images.top"
        write_dataset(root, make_demos([4]), Layout())
        change_info(root, "features", key, shape=[48, 64, 1], info={"is_depth_map": True})
        source = open_source(root, IngestOptions())
        assert source.spec.cameras == ("wrist",)
        assert source.unused == (key,)

    @pytest.mark.parametrize("more", [{"shape": [48, 64, 2]}, {"info": {"is_depth_map": True}}])
    def test_no_camera_is_left_out_without_a_word(self, tmp_path, more):
        root = tmp_path / "set"
        write_dataset(root, make_demos([4]), Layout())
        change_info(root, "features", "observation.images.top", **more)
        with pytest.raises(SourceError, match=r"images.top has the shape .* with --cameras"):
            open_source(root, IngestOptions())
        options = IngestOptions(cameras=(("wrist", "wrist"),))
        assert open_source(root, options).spec.cameras == ("wrist",)

    def test_channels_first(self, tmp_path):
        write_dataset(tmp_path / "set", make_demos([4]), Layout())
        change_info(tmp_path / "set", "features", "observation.images.top", shape=[3, 48, 64])
        source = open_source(tmp_path / "set", IngestOptions())
        assert read_step(source.read(0).frames.read(0, 0, 4)[2]) == (0, 0, 2)

    def test_keys(self, tmp_path):
        demos = make_demos([4])
        write_dataset(tmp_path / "set", demos, Layout())
        options = IngestOptions(qpos=(f"{QPOS}[:2]", ENV), env_state=(f"{ENV}[1]",))
        source = open_source(tmp_path / "set", options)
        assert (source.spec.dim_qpos, source.spec.dim_env_state) == (5, 1)
        tables = demos[0].tables
        joined = np.concatenate([tables[QPOS][:, :2], tables[ENV]], axis=1)
        np.testing.assert_array_equal(source.read(0).qpos, joined)
        with pytest.raises(SourceError, match="no numbers called qvel; choose with --qpos among"):
            open_source(tmp_path / "set", IngestOptions(qpos=("qvel",)))

    def test_rate(self, tmp_path):
        write_dataset(tmp_path / "set", make_demos([4]), Layout())
        assert open_source(tmp_path / "set", IngestOptions(fps=FPS)).spec.fps == FPS
        with pytest.raises(SourceError, match="fps is 30; leave out --fps"):
            open_source(tmp_path / "set", IngestOptions(fps=50))

    @pytest.mark.parametrize("version", ["v3.0", "v2.1"])
    def test_tasks(self, tmp_path, version):
        demos = make_demos([4, 3, 5])
        demos[1] = replace(demos[1], task="open the drawer")
        write_dataset(tmp_path / "set", demos, Layout(version=version))
        with pytest.raises(SourceError, match="2 tasks: .*'open the drawer'. Choose one with"):
            open_source(tmp_path / "set", IngestOptions())
        with pytest.raises(SourceError, match="Choose one with --task"):
            open_source(tmp_path / "set", IngestOptions(task="open"))
        source = open_source(tmp_path / "set", IngestOptions(task=TASK))
        assert (source.ids, source.spec.task) == ([0, 2], TASK)
        assert read_step(source.read(2).frames.read(0, 0, 1)[0]) == (2, 0, 0)

    def test_the_only_task_may_be_renamed(self, tmp_path):
        write_dataset(tmp_path / "set", make_demos([4]), Layout())
        assert (
            open_source(tmp_path / "set", IngestOptions(task="insertion")).spec.task == "insertion"
        )

    @pytest.mark.parametrize(
        ("key", "values", "expected"),
        [
            ("next.success", np.array([False, False, True]), True),
            ("next.success", np.zeros(3, bool), False),
            ("next.reward", np.array([0, 0, 1], np.float32), True),
            ("next.reward", np.zeros(3, np.float32), False),
            ("next.reward", np.array([0, 0.4, 1], np.float32), None),
        ],
    )
    def test_success(self, tmp_path, key, values, expected):
        demos = make_demos([3], **{key: lambda length: values})
        write_dataset(tmp_path / "set", demos, Layout())
        assert open_source(tmp_path / "set", IngestOptions()).read(0).success is expected


def change_info(root, *keys, **values):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    place = info
    for key in keys:
        place = place[key]
    place.update(values)
    path.write_text(json.dumps(info))


def change_rows(path, change):
    """Rewrites a parquet file, its rows having gone through `change`."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def read_all(root, **options):
    source = open_source(root, IngestOptions(**options))
    for id in source.ids:
        episode = source.read(id)
        for camera in range(len(source.spec.cameras)):
            read_frames(episode, camera, 4)


def episodes_file(root):
    return root / "meta/episodes/chunk-000/file-000.parquet"


class TestDamage:
    """Each gives one error that names file, episode and, where there is one, step."""

    @pytest.fixture(params=["v3.0", "v2.1"])
    def root(self, tmp_path, request):
        layout = Layout(version=request.param)
        write_dataset(tmp_path / "set", make_demos(LENGTHS), layout)
        read_all(tmp_path / "set")
        return tmp_path / "set"

    def videos(self, root):
        return sorted(root.glob("videos/*wrist/*/*.mp4")) or sorted(root.glob("videos/*/*wrist/*"))

    def refused(self, root, match):
        with pytest.raises(SourceError, match=match):
            read_all(root)

    def rewrite_video(self, root, change):
        """Of episodes 2 and 3 in v3.0, of episode 2 in v2.1."""
        demos = make_demos(LENGTHS)
        v3 = (root / "meta/tasks.parquet").exists()
        frames = [demo.frames["wrist"] for demo in demos[2 : 4 if v3 else 3]]
        encode(self.videos(root)[1 if v3 else 2], [change(frames[0]), *frames[1:]], Layout())

    def test_a_frame_missing_in_the_middle(self, root):
        """It is told by the last step, where there is none; or by another episode's."""
        self.rewrite_video(root, lambda frames: np.delete(frames, 4, axis=0))
        self.refused(root, r"(episode 2, camera wrist, step 11|episode 3, camera wrist, step 4)")

    def test_a_gap_in_time(self, root):
        """A frame missing whose neighbours have kept their times."""
        import av

        v3 = (root / "meta/tasks.parquet").exists()
        path = self.videos(root)[1 if v3 else 2]
        with av.open(str(path)) as source, av.open(str(path) + ".mp4", "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
            for number, packet in enumerate(source.demux(video=0)):
                if number not in (6, 7) and packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        shutil.move(str(path) + ".mp4", path)
        self.refused(root, "episode 2, camera wrist, step (6: no frame at|4: )")

    def test_a_frame_too_many(self, root):
        self.rewrite_video(root, lambda frames: np.concatenate([frames, frames[-1:]]))
        self.refused(root, r"(episode 2|episode 3), camera wrist, step (12|5): a frame too many")

    def test_other_size(self, root):
        frames = make_demos([12], size=(32, 32))[0].frames["wrist"]
        encode(self.videos(root)[0], [frames], Layout())
        self.refused(root, "episode 0, camera wrist: frames of 32x32 pixels, info.json says 48x64")

    def test_missing_video(self, root):
        self.videos(root)[0].unlink()
        self.refused(root, r"mp4 does not exist \(episode 0, camera wrist\)")

    def test_truncated_video(self, root):
        path = self.videos(root)[0]
        path.write_bytes(path.read_bytes()[:-400])
        self.refused(root, "mp4: episode 0, camera wrist: 0 frames on, the video is damaged")

    def test_missing_table(self, root):
        sorted(root.glob("data/*/*.parquet"))[0].unlink()
        self.refused(root, "parquet does not exist; the data set is incomplete")

    def test_truncated_table(self, root):
        path = sorted(root.glob("data/*/*.parquet"))[1]
        path.write_bytes(path.read_bytes()[:-10])
        self.refused(root, f"{path.name} is damaged")

    def test_wrong_rate(self, root):
        change_info(root, fps=25)
        self.refused(root, "(episode 0: timestamp is .* at step 1, not 0.04|at 25 a second)")

    def test_missing_column(self, root):
        path = sorted(root.glob("data/*/*.parquet"))[0]
        pq.write_table(pq.read_table(path).drop_columns(["action"]), path)
        self.refused(root, r"has the columns \[.*info.json says")

    def test_swapped_rows(self, root):
        def swap(rows):
            rows[2], rows[3] = rows[3], rows[2]

        change_rows(sorted(root.glob("data/*/*.parquet"))[0], swap)
        self.refused(root, "episode 0: frame_index is 3 at step 2, not 2")

    def test_not_a_number(self, root):
        def spoil(rows):
            rows[3]["action"][1] = float("nan")

        change_rows(sorted(root.glob("data/*/*.parquet"))[0], spoil)
        self.refused(root, "episode 0: action is nan at step 3, column 1")

    def test_lost_row(self, root):
        change_rows(sorted(root.glob("data/*/*.parquet"))[0], lambda rows: rows.pop())
        self.refused(root, r"has \d rows, meta says \d")

    def test_totals(self, root):
        change_info(root, total_frames=26)
        self.refused(root, "total_frames is 26, but the episodes have 25")
        change_info(root, total_episodes=5, total_frames=25)
        self.refused(root, "total_episodes is 5, but 4 are listed")
        if not (root / "meta/tasks.parquet").exists():
            change_info(root, total_episodes=4, total_videos=9)
            self.refused(root, "total_videos is 9, but there are 4 episodes")

    def test_version(self, root):
        change_info(root, codebase_version="v1.6")
        self.refused(root, "codebase_version is 'v1.6'; v2.0, v2.1 and v3.0 can be read")

    def test_path_that_leads_away(self, root):
        change_info(root, data_path="../{episode_index}{chunk_index}.parquet")
        self.refused(root, "data_path is .*, (which leads out|of which)")
        change_info(root, data_path="data/{episode_index.__class__}.parquet")
        self.refused(root, "parquet does not exist")

    def test_json(self, root):
        (root / "meta/info.json").write_text('{"fps": ')
        self.refused(root, r"meta/info.json cannot be read \(Expecting value")


class TestDamageV3:
    """What only v3.0 can have: places in files that many episodes share."""

    @pytest.fixture
    def root(self, tmp_path):
        write_dataset(tmp_path / "set", make_demos([6, 6, 6]), Layout(episodes_a_file=3))
        return tmp_path / "set"

    def change(self, root, change):
        change_rows(episodes_file(root), change)

    def test_swapped_times(self, root):
        def swap(rows):
            for part in ("from_timestamp", "to_timestamp"):
                key = f"videos/observation.images.top/{part}"
                rows[0][key], rows[1][key] = rows[1][key], rows[0][key]

        self.change(root, swap)
        with pytest.raises(SourceError, match=r"episode 1: videos/.*top begins before the end"):
            read_all(root)

    def test_wrong_times(self, root):
        def shift(rows):
            rows[1]["videos/observation.images.top/from_timestamp"] += 0.1

        self.change(root, shift)
        with pytest.raises(SourceError, match="episode 1: .* which is not its 6 steps at 30"):
            read_all(root)

    def test_times_between_frames(self, root):
        def shift(rows):
            for row in rows:
                row["videos/observation.images.top/from_timestamp"] += 0.004

        self.change(root, shift)
        with pytest.raises(SourceError, match="episode 0, camera top, step 0: a frame too many"):
            read_all(root)

    def test_wrong_length(self, root):
        def lengthen(rows):
            rows[1]["length"] = 7

        self.change(root, lengthen)
        with pytest.raises(SourceError, match=r"episode 1: its steps are \(6, 12\), not \(6, 13\)"):
            read_all(root)

    def test_other_order(self, root):
        self.change(root, lambda rows: rows.reverse())
        with pytest.raises(SourceError, match="episode_index is 2, not 0"):
            read_all(root)

    def test_cameras_differ(self, root):
        path = root / "meta/info.json"
        path.write_text(path.read_text().replace("images.top", "images.tip"))
        with pytest.raises(SourceError, match=r"has the videos .*tip.*, meta/episodes has .*top"):
            read_all(root)

    def test_flipped_bit_in_a_png(self, tmp_path):
        """Seen by PNG's own checksum, as LeRobot writes none in parquet."""
        write_dataset(tmp_path / "png", make_demos([6]), Layout(video=False))
        (path,) = (tmp_path / "png/data").glob("*/*.parquet")
        content = bytearray(path.read_bytes())
        content[content.index(b"IDAT") + 100] ^= 4
        path.write_bytes(content)
        with pytest.raises(SourceError, match="camera .*, step 0: the image is damaged"):
            read_all(tmp_path / "png")


def make_store(path, lengths=LENGTHS, *, dims=(5, 4, 3), success=True, fps=FPS, size=(48, 64)):
    demos = make_demos(lengths, dims=dims, size=size)
    spec = DataSpec(
        task=TASK,
        fps=fps,
        dim_qpos=dims[0],
        dim_action=dims[1],
        dim_env_state=dims[2],
        cameras=CAMERAS,
        image_size=size,
    )
    units = {"qpos": "rad", "action": "rad/s"}
    with StoreWriter.create(path, spec, {}, units=units) as writer:
        for number, demo in enumerate(demos):
            images = np.stack([demo.frames[name] for name in CAMERAS], axis=1)
            episode = Episode(
                qpos=demo.tables[QPOS],
                actions=demo.tables[ACTION],
                env_state=demo.tables.get(ENV),
                images=images.transpose(0, 1, 4, 2, 3),
                id=10 * number,
                success=None if success is None else number % 2 == 0,
            )
            writer.append(episode)
        writer.finalize()
    return Store.open(path)


class TestExport:
    @pytest.mark.parametrize("images", [True, False], ids=["images", "video"])
    @pytest.mark.parametrize("limit", [100, 0.004])
    @pytest.mark.parametrize("dims", [(5, 4, 3), (1, 1, 0)])
    def test_comes_back(self, tmp_path, images, limit, dims):
        store = make_store(tmp_path / "store.zarr", (50, 1, 60, 30), dims=dims)
        options = {"data_files_size_in_mb": limit, "video_files_size_in_mb": limit}
        export_dataset(tmp_path / "store.zarr", tmp_path / "set", images=images, **options)
        kind = "data/*/*.parquet" if images else "videos/*top/*/*.mp4"
        assert (len(list((tmp_path / "set").glob(kind))) > 1) == (limit < 1)
        source = open_source(tmp_path / "set", IngestOptions())
        ingest(source, str(tmp_path / "back.zarr"))
        back = Store.open(tmp_path / "back.zarr")
        assert back.spec == store.spec
        assert back.units["qpos"] == "rad"
        assert back.units["action"] == "rad/s"
        for name in ("episode_ends", "episode_success", "qpos", "actions", "env_state"):
            np.testing.assert_array_equal(getattr(back, name), getattr(store, name))
        assert back.episode_ids.tolist() == [0, 1, 2, 3]
        every = np.arange(store.num_frames)
        ours, theirs = store.read_images(every), back.read_images(every)
        if images:
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert psnr(ours, theirs) > 30
            for a, b in zip(ours, theirs, strict=True):
                assert read_step(a[1].transpose(1, 2, 0)) == read_step(b[1].transpose(1, 2, 0))

    def test_success_that_is_not_known(self, tmp_path):
        make_store(tmp_path / "store.zarr", success=None)
        export_dataset(tmp_path / "store.zarr", tmp_path / "set")
        source = open_source(tmp_path / "set", IngestOptions())
        assert source.read(0).success is None

    def test_without_cameras(self, tmp_path):
        spec = DataSpec(task=TASK, fps=50.0, dim_qpos=2, dim_action=3)
        tables = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
        with StoreWriter.create(tmp_path / "store.zarr", spec, {}) as writer:
            for number, length in enumerate((5, 4)):
                writer.append(Episode(qpos=tables[:length, :2], actions=tables[:length], id=number))
            writer.finalize()
        for images in (True, False):
            root = tmp_path / f"set_{images}"
            export_dataset(tmp_path / "store.zarr", root, images=images)
            source = open_source(root, IngestOptions())
            assert source.spec == spec
            np.testing.assert_array_equal(source.read(1).actions, tables[:4])

    def test_refusals(self, tmp_path):
        make_store(tmp_path / "odd.zarr", [2], size=(47, 64))
        make_store(tmp_path / "slow.zarr", [2], fps=12.5)
        with pytest.raises(ValueError, match="47x64 .* export with --images"):
            export_dataset(tmp_path / "odd.zarr", tmp_path / "set")
        with pytest.raises(ValueError, match="fps is 12.5; LeRobot's are whole numbers"):
            export_dataset(tmp_path / "slow.zarr", tmp_path / "set")
        with pytest.raises(ValueError, match="--crf 60: give 0 to 51"):
            export_dataset(tmp_path / "odd.zarr", tmp_path / "set", crf=60)
        export_dataset(tmp_path / "odd.zarr", tmp_path / "set", images=True)
        with pytest.raises(FileExistsError, match="is there already"):
            export_dataset(tmp_path / "odd.zarr", tmp_path / "set", images=True)

    def test_leaves_nothing_half_written(self, tmp_path):
        make_store(tmp_path / "store.zarr")
        for shard in (tmp_path / "store.zarr/data/images_wrist/c").glob("0/0/0/*"):
            shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(ValueError, match="episode 0"):
            export_dataset(tmp_path / "store.zarr", tmp_path / "set")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["store.zarr", "store.zarr.lock"]

    def test_statistics(self, tmp_path):
        store = make_store(tmp_path / "store.zarr")
        export_dataset(tmp_path / "store.zarr", tmp_path / "set", images=True)
        stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
        np.testing.assert_allclose(stats[QPOS]["mean"], store.qpos.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(stats[QPOS]["std"], store.qpos.std(axis=0), rtol=1e-5)
        np.testing.assert_allclose(stats[QPOS]["q90"], np.quantile(store.qpos, 0.9, axis=0))
        assert stats[QPOS]["count"] == [store.num_frames]
        pixels = store.read_images(np.arange(store.num_frames), ["wrist"])[:, 0] / 255
        found = stats["observation.images.wrist"]
        for name in ("min", "max", "mean", "std"):
            expected = getattr(pixels, name)(axis=(0, 2, 3)).reshape(3, 1, 1)
            np.testing.assert_allclose(found[name], expected, rtol=1e-9)
        expected = np.quantile(pixels, 0.1, axis=(0, 2, 3), method="inverted_cdf")
        np.testing.assert_allclose(np.ravel(found["q10"]), expected)
        (row,) = pq.read_table(episodes_file(tmp_path / "set")).slice(2, 1).to_pylist()
        start, stop = store.episode_starts[2], store.episode_ends[2]
        np.testing.assert_allclose(row["stats/action/max"], store.actions[start:stop].max(axis=0))
        assert row["stats/observation.images.top/count"] == [stop - start]

    def test_large_frames_are_sampled(self):
        frames = np.random.default_rng(0).integers(0, 256, (2, 480, 640, 3), np.uint8)
        gathered = ImageStats()
        gathered.add(frames)
        looked_at = frames[:, ::4, ::4] / 255
        mean = gathered.result()["mean"]
        np.testing.assert_allclose(np.ravel(mean), looked_at.mean(axis=(0, 1, 2)))
        assert len(sampled_steps(40)) == 40
        assert len(sampled_steps(1000)) == 177
        assert sampled_steps(1000)[[0, -1]].tolist() == [0, 999]

    def test_verb(self, tmp_path, capsys):
        make_store(tmp_path / "store.zarr", [3])
        export_dataset_verb([str(tmp_path / "store.zarr"), str(tmp_path / "set"), "--images"])
        assert f"written to {tmp_path / 'set'}" in capsys.readouterr().out
        info = json.loads((tmp_path / "set/meta/info.json").read_text())
        assert info["features"]["observation.images.top"]["dtype"] == "image"
        with pytest.raises(SystemExit, match="2"):
            export_dataset_verb(["x", "y", "--images", "--video"])


INGEST = """
import sys
from pathlib import Path
from act_lightning.ingest.formats import open_source
from act_lightning.ingest.run import ingest
from act_lightning.ingest.source import IngestOptions
print("before", resident("VmRSS"))
ingest(open_source(Path(sys.argv[1]), IngestOptions()), sys.argv[2])
"""
EXPORT = """
import sys
from pathlib import Path
from act_lightning.lerobot.dataset_exporting import export_dataset
print("before", resident("VmRSS"))
export_dataset(sys.argv[1], Path(sys.argv[2]), images=sys.argv[3] == "True")
"""
# Not ru_maxrss, which counts the parent's memory at the fork.
RESIDENT = """
def resident(which):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status[which].split()[0]) // 1024
"""


def peak_memory(script, *arguments):
    """MiB that a process running `script` has at most, in all and beyond what its imports take."""
    script = f"{RESIDENT}{script}print('peak', resident('VmHWM'))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, peak = (int(run.stdout.split(word)[1].split()[0]) for word in ("before", "peak"))
    return peak, peak - before


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("video", [True, False], ids=["video", "images"])
def test_memory_is_bounded(tmp_path, video):
    """An episode of 2 cameras x 400 steps at 480x640 is 703 MiB decoded; half is never held."""
    num_steps = 400
    tables = make_demos([num_steps], cameras=())[0].tables
    shown = np.stack([draw((480, 640), (0, 0, step)) for step in range(10)])
    frames = np.broadcast_to(shown, (num_steps // 10, *shown.shape)).reshape(-1, 480, 640, 3)
    demo = Demo(tables=tables, frames=dict.fromkeys("ab", frames))
    write_dataset(tmp_path / "set", [demo], Layout(video=video, options={"preset": "ultrafast"}))
    del frames, demo
    ingesting = peak_memory(INGEST, tmp_path / "set", tmp_path / "store.zarr")
    exporting = peak_memory(EXPORT, tmp_path / "store.zarr", tmp_path / "back", not video)
    print(f"peak memory in MiB, beyond imports: ingest {ingesting}, export {exporting}")
    for in_all, beyond in (ingesting, exporting):
        assert in_all < 1024
        assert beyond < 350
