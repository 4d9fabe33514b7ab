"""Feature tracks agree with the truth of rendered scenes and the reference of real photos."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor, nn
from tracks import errors

from vggt_cli.errors import InputError
from vggt_cli.formats import colmap_read
from vggt_cli.formats import images as files
from vggt_cli.formats.features import NOTHING, Features, TwoView, verify
from vggt_cli.geometry import project, unproject
from vggt_cli.learning import synthetic
from vggt_cli.models import networks
from vggt_cli.models.networks import Network
from vggt_cli.models.tracker import Followed
from vggt_cli.models.vggt import VGGT
from vggt_cli.reconstruction import detect
from vggt_cli.reconstruction import tracks as followed
from vggt_cli.reconstruction.pairs import Guess, guess_from_tracks
from vggt_cli.reconstruction.sources import Source, by_tracker, clear, inside
from vggt_cli.reconstruction.tracks import FeatureTracks, follow
from vggt_cli.scene import Cameras, ImageSet, Photo, Shaping, Tracks

pytestmark = pytest.mark.colmap

SHAPING = Shaping("longer-side", 224, 14)
H, W = 240, 320


@dataclass(frozen=True)
class Rendered:
    """Files of a rendered scene, and its truth."""

    truth: synthetic.Sample
    photos: tuple[Photo, ...]
    images: ImageSet

    @property
    def guess(self) -> Guess:
        S = len(self.photos)
        return Guess(self.truth.cameras, torch.ones(S, S))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    truth = synthetic.sample(2, synthetic.Path(3, (H, W), 0.4))
    return on_disk(truth, tmp_path_factory.mktemp("photos"))


def on_disk(truth: synthetic.Sample, folder: Path) -> Rendered:
    for k, pixels in enumerate(truth.pixels):
        rgb = (pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        Image.fromarray(rgb).save(folder / f"{k}.png")
    loaded = files.load(folder, sorted(folder.glob("*.png")), SHAPING)
    return Rendered(truth, loaded.photos, loaded.images)


def true_places(truth: synthetic.Sample, frame: int, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [S, n, 2] and depth [S, n] in all frames of what is at pixels [n, 2] of one."""
    k, extrinsics = truth.cameras.intrinsics, truth.cameras.extrinsics
    column, row = xy.long().unbind(-1)
    points = unproject(truth.depth[frame], k[frame], extrinsics[frame])[row, column]
    at, z = project(points.expand(len(k), 1, -1, 3), k, extrinsics)
    return at[:, 0], z[:, 0]


def distances(tracks: Tracks, truth: synthetic.Sample) -> Tensor:
    """Pixels from each observation but a track's first to where the truth puts the first."""
    starts = torch.searchsorted(tracks.point, tracks.point)
    found = []
    for a in range(len(truth.depth)):
        for b in range(a + 1, len(truth.depth)):
            of = (tracks.frame[starts] == a) & (tracks.frame == b)
            at = true_places(truth, a, tracks.xy[starts[of]])[0][b]
            # The depth is that of the pixel's centre, so the pixel's own offset is kept.
            offset = tracks.xy[starts[of]] - tracks.xy[starts[of]].floor() - 0.5
            found.append((at + offset - tracks.xy[of]).norm(dim=-1))
    return torch.cat(found)


def well_formed(found: FeatureTracks, frames: int) -> None:
    point, frame = found.tracks.point, found.tracks.frame
    assert (point.diff() >= 0).all()
    assert sorted(set(point.tolist())) == list(range(len(found.tracks.xyz)))
    assert (torch.bincount(point) >= 2).all()
    assert len({*zip(point.tolist(), frame.tolist(), strict=True)}) == len(point)
    assert [row.tracks for row in found.images] == torch.bincount(frame, minlength=frames).tolist()
    for row in found.images:
        assert row.keypoints >= row.matched >= row.verified >= row.tracks
    assert found.pairs.tolist() == sorted(found.pairs.tolist())
    assert sum(row.partners for row in found.images) == 2 * len(found.pairs)
    assert found.tracks.xyz.count_nonzero() == 0


def test_tracks_agree_with_the_true_depth_and_cameras_and_are_the_same_again(
    scene: Rendered, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    found = follow(
        scene.photos,
        scene.images,
        scene.guess,
        cache=tmp_path,
        progress=lambda *now: told.append(now),
    )
    well_formed(found, 3)
    assert len(found.tracks.xyz) > 100
    assert (torch.bincount(found.tracks.point) == 3).sum() > 20
    distance = distances(found.tracks, scene.truth)
    assert distance.median() < 0.5
    assert (distance < 1.5).float().mean() > 0.9
    assert [row.name for row in found.images] == ["0.png", "1.png", "2.png"]
    assert all(row.sources == ("sift",) and row.partners == 2 for row in found.images)
    assert ("find features", 3, 3) in told
    assert told[-1] == ("match features", 3, 3)
    again = follow(scene.photos, scene.images, scene.guess, cache=tmp_path)
    for name in ("point", "frame", "xy"):
        torch.testing.assert_close(
            getattr(again.tracks, name), getattr(found.tracks, name), rtol=0, atol=0
        )
    assert again.images == found.images


def test_a_wrong_prediction_does_not_starve_the_tracks(scene: Rendered) -> None:
    right = follow(scene.photos, scene.images, scene.guess)
    cameras = scene.truth.cameras
    turned = cameras.extrinsics.clone()
    turned[1] = torch.diag(torch.tensor([-1.0, 1, -1])) @ turned[1]
    wide = cameras.intrinsics * torch.tensor([1.4, 1.4, 1])[:, None].where(torch.eye(3) > 0, 1)
    wrong = Guess(Cameras(turned, wide, cameras.image_size), torch.zeros(3, 3))
    found = follow(scene.photos, scene.images, wrong)
    assert len(found.tracks.point) > 0.8 * len(right.tracks.point)
    assert distances(found.tracks, scene.truth).median() < 0.5


def test_nothing_is_observed_in_masked_pixels_or_at_the_border(scene: Rendered) -> None:
    valid = scene.images.valid.clone()
    valid[:, :, : valid.shape[2] // 2] = False
    found = follow(scene.photos, replace(scene.images, valid=valid), scene.guess)
    xy, step = found.tracks.xy, W / 224  # a network pixel
    assert len(xy) > 20
    assert xy[:, 0].min() >= W / 2 + step
    assert (xy >= step).all()
    assert (xy <= torch.tensor([W, H]) - step).all()
    nothing = replace(scene.images, valid=torch.zeros_like(valid))
    assert [row.keypoints for row in follow(scene.photos, nothing, scene.guess).images] == [0, 0, 0]


def test_a_photo_in_which_nothing_is_found_stops_nothing(scene: Rendered, tmp_path: Path) -> None:
    pixels = scene.truth.pixels.clone()
    pixels[2] = 0.5
    blank = on_disk(replace(scene.truth, pixels=pixels), tmp_path)
    found = follow(blank.photos, blank.images, blank.guess)
    well_formed(found, 3)
    assert [row.keypoints > 0 for row in found.images] == [True, True, False]
    assert found.images[2].sources == ()
    assert found.pairs.tolist() == [[0, 1]]
    assert len(found.tracks.xyz) > 50
    first = Guess(scene.truth.cameras[:1], torch.ones(1, 1))
    alone = follow(scene.photos[:1], scene.images[:1], first)
    assert len(alone.tracks.point) == len(alone.tracks.xyz) == len(alone.pairs) == 0
    assert alone.images[0].matched == 0


class Knowing(VGGT):
    """A tracker that knows the rendered scene, by the frame that is put first."""

    def __init__(self, scene: Rendered) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(()))
        self.track_head = nn.Identity()  # type: ignore[assignment]
        self.scene = scene

    def aggregate(self, images: Tensor) -> dict[int, Tensor]:
        return {0: torch.arange(images.shape[1])[None, :, None, None]}

    def track(
        self,
        cached: dict[int, Tensor],
        size: tuple[int, int],
        query_points: Tensor,
        frames_per_chunk: int = 8,
    ) -> Followed:
        order = cached[0].flatten().tolist()
        scale = self.scene.images.source_from_network.diagonal(dim1=1, dim2=2)[0, :2].float()
        asked = (query_points[0] + 0.5) * scale
        xy, z = true_places(self.scene.truth, order[0], asked)
        seen = (z > 0) & (xy >= 0).all(-1) & (xy < torch.tensor([W, H])).all(-1)
        sure = seen[order].float()[None]
        return Followed((xy[order] / scale - 0.5)[None, None], sure, sure)


def test_the_networks_tracker_is_asked_where_sift_finds_too_little(
    scene: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "sift", lambda photos, *_: [NOTHING] * len(photos))
    network = cast(Network, Knowing(scene))
    found = follow(scene.photos, scene.images, scene.guess, network)
    well_formed(found, 3)
    assert all(row.sources == ("tracker",) for row in found.images)
    assert len(found.tracks.xyz) > 100
    distance = distances(found.tracks, scene.truth)
    assert distance.median() < 1  # the truth is that of the pixel's centre
    assert (distance < 3).float().mean() > 0.9


def test_a_point_that_a_network_follows_is_where_it_was_asked_in_its_own_frame(
    scene: Rendered,
) -> None:
    network = networks.build(tiny.CONFIGS["vggt-1b"]).eval()
    (source,) = by_tracker(network, scene.images, clear(scene.images), {1: [0, 2]})
    pixel = np.array([W / 224, H / 168])
    np.testing.assert_allclose(source.xy[1][0], 8.5 * pixel, rtol=1e-5)
    np.testing.assert_allclose(source.xy[1][1], [24.5, 8.5] * pixel, rtol=1e-5)
    assert [len(xy) for xy in source.xy] == [14 * 10] * 3
    assert [pair for pair, _ in source.matches] == [(0, 1), (1, 2)]


def test_learned_features_are_asked_last_and_their_absence_is_said(
    scene: Rendered, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    by_sift = detect.sift(scene.photos, None, lambda done: None)
    known = dict(zip(scene.photos, by_sift, strict=True))

    def xfeat(photo: Photo, cache: Path | None) -> Features:
        return known[photo]

    monkeypatch.setattr(detect, "sift", lambda photos, *_: [NOTHING] * len(photos))
    monkeypatch.setattr(detect, "xfeat", xfeat)
    found = follow(scene.photos, scene.images, scene.guess)
    assert all(row.sources == ("xfeat",) for row in found.images)
    assert distances(found.tracks, scene.truth).median() < 0.5

    def missing(photo: Photo, cache: Path | None) -> Features:
        raise InputError("learned features are not installed: x", hint="pip install it")

    monkeypatch.setattr(detect, "xfeat", missing)
    found = follow(scene.photos, scene.images, scene.guess)
    assert len(found.tracks.xyz) == 0
    assert "pip install it" in caplog.text


def test_of_many_photos_the_largest_features_are_compared(
    scene: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed, "EXHAUSTIVE", 2)
    monkeypatch.setattr(followed, "COMPARED", 400)
    monkeypatch.setattr(followed, "ENOUGH", 0)  # no other source is asked
    found = follow(scene.photos, scene.images, scene.guess)
    assert all(300 < row.keypoints <= 400 for row in found.images)  # two may lie at one place
    region = clear(scene.images)
    for i, features in enumerate(detect.sift(scene.photos, None, lambda done: None)):
        largest = features.xy[inside(features.xy, i, scene.images, region)][:400]
        seen = found.tracks.xy[found.tracks.frame == i]
        assert len(seen)
        assert {tuple(xy) for xy in seen.tolist()} <= {tuple(xy) for xy in largest.tolist()}


def test_pairs_with_too_few_matches_to_hold_are_not_verified(
    scene: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[int] = []

    def counted(cameras: Any, xy: Any, matches: Any) -> TwoView:
        tested.append(len(matches))
        return verify(cameras, xy, matches)

    places = [np.random.default_rng(i).random((20, 2)).astype(np.float32) * 90 for i in range(3)]
    rows = np.stack([np.arange(20)] * 2, 1)
    pairs = iter([((0, 1), rows[:14]), ((0, 2), rows[:15])])
    monkeypatch.setattr(followed, "verify", counted)
    found = followed._verified(
        Source("sift", places, 2, pairs), scene.guess, lambda done, total: None
    )
    assert tested == [15]
    assert [int(x.sum()) for x in found.matched] == [
        15,
        14,
        15,
    ]  # they count as matched all the same


def test_a_pair_against_the_prediction_takes_more_evidence() -> None:
    there, turned = np.eye(3), np.diag([-1.0, 1, -1])

    def holds(
        inliers: int,
        matches: int,
        rotation: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None,
    ) -> bool:
        return followed._holds(TwoView(np.zeros((inliers, 2)), rotation), matches, there)

    assert holds(15, 100, there)
    assert not holds(14, 14, there)
    assert not holds(29, 29, turned)
    assert holds(30, 100, turned)
    assert not holds(30, 200, turned)
    assert not holds(20, 20, None)
    assert holds(40, 50, None)


def test_tracks_of_real_photos_agree_with_reference_cameras(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(detect.LONGEST, "sift", 512)
    folder = shared / "data" / "herzjesu_p8"
    if not folder.is_dir():
        pytest.skip(f"no photos at {folder}")
    model = colmap_read.read(folder / "reference")
    names = model.names[3:6]
    loaded = files.load(folder / "images", [folder / "images" / n for n in names], SHAPING)
    whole = guess_from_tracks(model.cameras, model.tracks)
    few = Guess(model.cameras[3:6], whole.covisible[3:6, 3:6])
    found = follow(loaded.photos, loaded.images, few)
    well_formed(found, 3)
    assert len(found.tracks.xyz) > 200
    error = errors(found.tracks, few.cameras)
    assert (error < 2).float().mean() > 0.9
