"""Films as files: videos that browsers play, animations in TensorBoard, sheets of failures."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from act_lightning.sim.results import EpisodeResult
from act_lightning.study import videos
from act_lightning.study.videos import (
    add_gif,
    caption,
    contact_sheets,
    encode_gif,
    write_contact_sheets,
    write_video,
)

STAGES = ("touched", "lifted")


def film(num_frames: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A red square on black that moves a column a frame, and gets brighter."""
    frames = np.zeros((num_frames, 3, height, width), np.uint8)
    for i, frame in enumerate(frames):
        frame[0, 8:16, i : i + 8] = 100 + 150 * i // num_frames
    return frames


def result(seed: int = 7, num_frames: int | None = None, **fields: object) -> EpisodeResult:
    frames = None if num_frames is None else film(num_frames, 120, 160)
    settings = {"success": False, "max_reward": 0.0, "total_reward": 0.0, "steps": 300}
    settings |= {"execution": "chunked", "seed": seed, "stage_names": STAGES, "frames": frames}
    return EpisodeResult(**settings | fields)


# --- mp4 ---


@pytest.mark.parametrize("size", [(24, 32), (25, 33)])
def test_a_video_reads_back_as_it_was_filmed(size: tuple[int, int], tmp_path: Path) -> None:
    frames = film(10, *size)
    write_video(frames, tmp_path / "a.mp4", fps=12.5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(25, 2)
        assert (stream.height, stream.width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    shown = np.stack(decoded).transpose(0, 3, 1, 2)[:, :, : size[0], : size[1]].astype(int)
    assert shown.shape == frames.shape
    assert np.abs(shown - frames).mean() < 6


def test_a_video_can_start_before_it_is_all_there(tmp_path: Path) -> None:
    write_video(film(10), tmp_path / "a.mp4", fps=25)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_a_video_that_fails_leaves_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"former")
    for frames, fps in ((film(0), 25), (film(3)[0], 25), (film(3), 0.0), (film(3), float("nan"))):
        with pytest.raises(ValueError, match=r"give \(F, 3, h, w\)|give more than 0"):
            write_video(frames, path, fps)
    assert path.read_bytes() == b"former"


# --- GIF ---


def read_gif(content: bytes) -> tuple[list[np.ndarray], list[int]]:
    """Frames (h, w, 3) and their durations in ms."""
    image = Image.open(io.BytesIO(content))
    assert image.format == "GIF"
    assert image.info["loop"] == 0
    frames, durations = [], []
    for number in range(image.n_frames):
        image.seek(number)
        frames.append(np.asarray(image.convert("RGB")))
        durations.append(image.info["duration"])
    return frames, durations


def test_an_animation_keeps_colours_and_times() -> None:
    frames = film(8)
    shown, durations = read_gif(encode_gif(frames, fps=12))
    assert len(shown) == 8
    for got, expected in zip(shown, frames, strict=True):
        assert np.abs(got.transpose(2, 0, 1).astype(int) - expected).max() < 20
    assert abs(sum(durations[:-1]) - 7 / 12 * 1000) <= 10
    assert durations[-1] == 1000


def test_fast_films_lose_frames_and_keep_their_length() -> None:
    shown, durations = read_gif(encode_gif(film(21), fps=100))
    assert len(shown) == 11
    assert durations[:-1] == [20] * 10


def test_large_films_are_shrunk_in_animations_only() -> None:
    shown, _ = read_gif(encode_gif(film(2, 480, 640), fps=2))
    assert shown[0].shape == (240, 320, 3)
    shown, _ = read_gif(encode_gif(film(2, 96, 96), fps=2))
    assert shown[0].shape == (96, 96, 3)


def test_tensorboard_reads_an_animation_back(tmp_path: Path) -> None:
    frames = film(5)
    with SummaryWriter(str(tmp_path)) as writer:
        add_gif(writer, "rollout/chunked/success", frames, fps=5, step=40)
        add_gif(writer, "rollout/chunked/success", frames[:3], fps=5, step=80)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["rollout/chunked/success"]
    first, second = events.Images("rollout/chunked/success")
    assert (first.step, second.step) == (40, 80)
    assert (first.height, first.width) == frames.shape[2:]
    assert first.encoded_image_string == encode_gif(frames, fps=5)
    assert len(read_gif(second.encoded_image_string)[0]) == 3


# --- contact sheets ---


def test_captions_say_how_an_episode_went() -> None:
    assert caption(result()) == "world 7, 300 steps, not touched"
    assert caption(result(max_reward=2.0)) == "world 7, 300 steps, lifted"
    assert caption(result(max_reward=3.0, success=True)) == "world 7, 300 steps, success"
    assert (
        caption(result(stage_names=(), max_reward=0.5)) == "world 7, 300 steps, highest reward 0.5"
    )
    assert caption(result(error="action nan\nat 3", steps=3)).endswith(
        "not touched, action nan at 3"
    )


def open_pages(results: list[EpisodeResult]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(page))) for page in contact_sheets(results)]


def test_a_sheet_shows_frames_from_the_first_to_the_last() -> None:
    frames = np.stack([np.full((3, 120, 160), 10 * i, np.uint8) for i in range(1, 12)])
    (page,) = open_pages([result(frames=frames)])
    cells = page[-70, 80:-20:162, 0].tolist()
    assert cells == [10, 30, 50, 70, 90, 110]


def test_every_episode_has_its_place_on_some_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "PAGE_EPISODES", 4)
    results = [result(seed, num_frames=6) for seed in range(9)]
    results[4] = result(4, error="worker died " * 40)  # a long message, and no frames
    pages = open_pages(results)
    assert len(pages) == 3
    blank = [np.count_nonzero((page == page[0, 0]).all(axis=-1)) for page in pages]
    assert pages[0].shape == pages[1].shape
    assert blank[1] > blank[0] + 5 * 120 * 160  # the place of the one without frames is blank
    assert pages[2].shape[0] < pages[0].shape[0]
    assert pages[2].shape[1] < pages[0].shape[1]
    assert contact_sheets([]) == []


def test_frames_of_other_shapes_fit_their_cells() -> None:
    for size in ((240, 320), (300, 300), (60, 80)):
        (page,) = open_pages([result(frames=np.zeros((6, 3, *size), np.uint8))])
        assert page.shape == open_pages([result(num_frames=6)])[0].shape


def test_pages_of_an_earlier_call_do_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "PAGE_EPISODES", 2)
    kept = tmp_path / "standard_failures_of_mine.png"
    kept.write_bytes(b"")
    results = [result(seed, num_frames=2) for seed in range(5)]
    paths = write_contact_sheets(results, tmp_path, "standard_failures")
    names = ["standard_failures.png", "standard_failures_2.png", "standard_failures_3.png"]
    assert [path.name for path in paths] == names
    assert [path.read_bytes() for path in paths] == contact_sheets(results)
    write_contact_sheets(results[:3], tmp_path, "standard_failures")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names[:2], kept.name]
    assert write_contact_sheets([], tmp_path, "standard_failures") == []
    assert list(tmp_path.iterdir()) == [kept]
