"""Videos in: keyframes are sharp and spaced by motion, upright, at most so many, named by frame."""

import errno
import gc
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from vggt_cli.errors import InputError, OutputError
from vggt_cli.formats import export, files, motion, scene_read, video
from vggt_cli.reconstruction import pipeline
from vggt_cli.reconstruction.settings import Options
from vggt_cli.scene import Frame

Positions = list[float]
W, H = 320, 180
DIAGONAL = math.hypot(W, H)


def texture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (90, 700, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((2800, 360), Image.Resampling.BICUBIC)


def film(path: Path, at: Positions, blurred: tuple[int, ...] = (), turn: int = 0) -> Path:
    """A video of 20 frames a second that pans over a texture, at pixel `at` in each frame."""
    wall = texture()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "12", "preset": "ultrafast"}
        if turn:
            stream.set_display_rotation(turn)
        for i, x in enumerate(at):
            view = wall.crop((round(x), 60, round(x) + W, 60 + H))
            if i in blurred:
                view = view.filter(ImageFilter.GaussianBlur(3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(view), "rgb24")))
        container.mux(stream.encode())
    return path


def chosen(path: Path, fps: float | None = None) -> list[int]:
    return [look.number for look in video.keyframes(path, fps)]


def test_keyframes_lie_a_step_of_the_view_apart_however_fast_it_moves(tmp_path: Path) -> None:
    slow, fast = [3.0 * i for i in range(50)], [150 + 8.0 * i for i in range(40)]
    at = [*slow, *[150.0] * 20, *fast]  # the camera rests between
    found = chosen(film(tmp_path / "pan.mp4", at))
    steps = [abs(at[b] - at[a]) / DIAGONAL for a, b in itertools.pairwise(found)]
    assert min(steps[:-1]) > 0.4 * motion.STEP
    assert max(steps) < 1.5 * motion.STEP
    assert sum(50 <= number < 70 for number in found) <= 1


def test_of_neighbours_the_sharp_one_is_chosen(tmp_path: Path) -> None:
    blurred = tuple(i for i in range(60) if i % 4)  # three of four
    found = chosen(film(tmp_path / "shaken.mp4", [4.0 * i for i in range(60)], blurred))
    assert len(found) > 4
    assert not set(found) & set(blurred)


def test_frames_by_time_are_so_many_a_second(tmp_path: Path) -> None:
    path = film(tmp_path / "still.mp4", [0.0] * 40)  # 2 seconds
    assert len(chosen(path, 2)) == 4
    assert [number // 10 for number in chosen(path, 2)] == [0, 1, 2, 3]
    assert len(chosen(path, 1000)) == 40
    assert len(chosen(path)) == 1  # nothing moves


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_the_rotation_in_the_header_is_applied(tmp_path: Path, turn: int) -> None:
    path = film(tmp_path / "phone.mp4", [0.0] * 3, turn=turn)
    view = np.asarray(texture().crop((0, 60, W, 60 + H)).convert("L"), np.float32)
    expected = np.rot90(view, turn // 90)  # counterclockwise
    frame = video.picture(next(video.keyframes(path, None)).frame)
    assert video.header(path)[0] == expected.shape[:2]
    assert np.abs(np.asarray(frame.convert("L"), np.float32) - expected).mean() < 6


def extracted(
    root: Path, paths: list[Path], most: int
) -> tuple[Path, dict[Path, Frame], list[tuple[str, str]]]:
    return video.as_photos(root, paths, None, most, lambda done, total: None)


def test_frames_are_photos_named_by_video_and_number_and_go_with_the_last_of_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "day 1").mkdir()
    path = film(tmp_path / "day 1/clip.mp4", [6.0 * i for i in range(40)])
    folder, frames, unread = extracted(tmp_path, [path], 200)
    assert not unread
    for file, frame in frames.items():
        assert file == folder / "day 1" / f"clip_{frame.number:06d}.jpg"
        assert frame.video == "day 1/clip.mp4"
        assert frame.seconds == pytest.approx(frame.number / 20)
    assert sorted(folder.rglob("*.jpg")) == sorted(frames)
    assert list(frames) == sorted(frames)
    kept = next(iter(frames.values()))
    del frames, frame
    gc.collect()
    assert folder.exists()
    del kept
    gc.collect()
    assert not folder.exists()


def test_videos_that_differ_by_their_ending_alone_keep_their_own_frames(tmp_path: Path) -> None:
    first = film(tmp_path / "a.mp4", [8.0 * i for i in range(30)])
    second = film(tmp_path / "a.mkv", [8.0 * i for i in range(30)])
    folder, frames, _ = extracted(tmp_path, [first, second], 10)
    assert [f.video for f in frames.values()] == ["a.mp4"] * 5 + ["a.mkv"] * 5
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{f.video}_{f.number:06d}.jpg" for f in frames.values()}


def test_of_more_videos_than_frames_no_more_frames_are_left_than_asked(tmp_path: Path) -> None:
    videos = [film(tmp_path / f"{i}.mp4", [0.0, 8.0]) for i in range(5)]
    _, frames, _ = extracted(tmp_path, videos, 3)
    assert [f.video for f in frames.values()] == ["0.mp4", "2.mp4", "4.mp4"]


HOLDS = """
import sys
from pathlib import Path
from vggt_cli.formats import video
path = Path(sys.argv[1])
found = video.as_photos(path.parent, [path], None, 5, lambda done, total: None)
print(found[0], flush=True)
sys.stdin.read()
"""


def test_frames_of_a_killed_run_go_with_the_next_and_those_of_a_living_one_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a.mp4", [0.0, 8.0])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    others = [
        f"vggt-frames-{host}-abcdefgh/{state}"
        for host, state in (
            ("elsewhere", "locked"),
            (f"{socket.gethostname()}-2", "locked"),
            (socket.gethostname(), "frames"),
        )
    ]
    for other in others:
        (scratch / other).mkdir(parents=True)
    environment = {**os.environ, "TMPDIR": str(scratch)}

    def run() -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-c", HOLDS, str(path)], subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    with run() as one, run() as two:
        assert one.stdout
        assert two.stdout
        killed, living = Path(one.stdout.readline()[:-1]), Path(two.stdout.readline()[:-1])
        one.kill()
        one.wait()
        assert list(killed.iterdir())
        folder, frames, _ = extracted(tmp_path, [path], 10)
        assert not killed.parent.exists()
        assert list(living.iterdir())
        two.communicate()
    assert not living.parent.exists()
    del frames
    gc.collect()
    assert not folder.parent.exists()
    assert sorted(str(p.relative_to(scratch)) for p in scratch.glob("*/*")) == sorted(others)


@pytest.mark.parametrize("most", [1, 3, 5])
def test_no_more_frames_are_left_than_asked_and_they_are_spread(tmp_path: Path, most: int) -> None:
    path = film(tmp_path / "a.mp4", [8.0 * i for i in range(70)])
    folder, frames, _ = extracted(tmp_path, [path], most)
    assert len(frames) == len(list(folder.iterdir())) == most
    gaps = np.diff([frame.number for frame in frames.values()])
    assert most == 1 or gaps.max() < 3 * gaps.min()


def test_a_video_cut_short_gives_what_is_there_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = film(tmp_path / "whole.mkv", [6.0 * i for i in range(40)])
    data = whole.read_bytes()
    cut, none, fake = (tmp_path / f"{name}.mkv" for name in ("cut", "none", "fake"))
    cut.write_bytes(data[: len(data) // 2])
    none.write_bytes(b"")
    fake.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    _, frames, unread = extracted(tmp_path, [cut, none, fake], 100)
    assert {frame.video for frame in frames.values()} == {"cut.mkv"}
    assert [name for name, _ in unread] == ["none.mkv", "fake.mkv"]
    with pytest.raises(InputError, match=r"none\.mkv"):
        extracted(tmp_path, [none], 100)


def test_a_scene_of_a_video_says_where_its_frames_are_from(tmp_path: Path) -> None:
    path = film(tmp_path / "my clip.mp4", [8.0 * i for i in range(40)])
    options = Options(model="mini", points=500, device="cpu", refine="none", frames=3)
    plan = pipeline.foresee(str(path), options)
    assert plan["images"] == 3
    assert plan["network_size"][1] > plan["network_size"][0]
    scene = pipeline.reconstruct(str(path), options)
    assert len(scene.photos) == 3
    out = tmp_path / "out"
    export.write(scene, out, html=False)
    rows = json.loads((out / "report.json").read_text())["images"]
    for row, photo in zip(rows, scene.photos, strict=True):
        assert photo.frame is not None
        number = photo.frame.number
        assert row["file"] == f"images/my_clip_{number:06d}.jpg"
        assert row["video"] == {
            "file": "my clip.mp4", "frame": number, "seconds": pytest.approx(number / 20)
        }  # fmt: skip
    again = scene_read.read(out)
    assert [photo.frame for photo in again.photos] == [photo.frame for photo in scene.photos]
    assert again.camera_of_image == (0, 0, 0)


def test_frames_that_find_no_room_are_an_error_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a.mp4", [8.0 * i for i in range(20)])
    (tmp_path / "frames").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "frames"))

    def full(*_: object, **how: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match=r"cannot write frames: .*No space left"):
        extracted(tmp_path, [path], 10)
    gc.collect()
    assert not list((tmp_path / "frames").iterdir())


def test_options_of_videos_are_an_error_for_photos(tmp_path: Path) -> None:
    texture().save(tmp_path / "a.png")
    with pytest.raises(InputError, match="--fps and --frames are of videos"):
        pipeline.foresee(str(tmp_path), Options(model="mini", device="cpu", fps=1.0))


def test_without_pyav_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"PyAV, which is not here: .*a\.mp4") as caught:
        next(video.keyframes(tmp_path / "a.mp4", None))
    assert caught.value.hint == "pip install 'vggt-cli[video]'"
    with pytest.raises(InputError, match="PyAV, which is not here"):
        pipeline.reconstruct(str(tmp_path), Options(model="mini", device="cpu"))


@pytest.mark.parametrize("damage", ["middle", "noise"])
def test_a_damaged_video_gives_what_can_be_decoded_or_is_refused(
    tmp_path: Path, damage: str
) -> None:
    data = bytearray(film(tmp_path / "a.mkv", [8.0 * i for i in range(40)]).read_bytes())
    half = len(data) // 2
    noise = np.random.default_rng(0).integers(0, 256, len(data), dtype=np.uint8).tobytes()
    data[half : half + 3000] = noise[:3000]
    if damage == "noise":
        data[100:] = noise[100:]
    (tmp_path / "a.mkv").write_bytes(data)
    try:
        found = chosen(tmp_path / "a.mkv", 5)
    except InputError:
        found = []
    assert bool(found) == (damage == "middle")


def test_a_pipe_is_no_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="not a regular one"):
        pipeline.foresee(str(tmp_path), Options(model="mini", device="cpu"))


def test_videos_beside_photos_are_left_out_and_alone_they_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.mp4", "a2.MOV", "a10.webm"):
        (tmp_path / name).touch()
    names = [path.name for path in files.find(str(tmp_path))[1]]
    assert names == ["a2.MOV", "a10.webm", "b.mp4"]
    (tmp_path / "c.jpg").touch()
    assert [path.name for path in files.find(str(tmp_path))[1]] == ["c.jpg"]
    assert "3 videos beside photos left out" in caplog.text
