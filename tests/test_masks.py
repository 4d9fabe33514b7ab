"""Masks: found by name, true to orientation and lens, without points; out in everybody's names."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import BALANCED, picture

from vggt_cli.errors import InputError
from vggt_cli.formats import copies, decode, export, files, images, masks, scene_read
from vggt_cli.formats.check import check_folder
from vggt_cli.reconstruction import pipeline
from vggt_cli.reconstruction.settings import Options
from vggt_cli.scene import Scene

MINI = Options(model="mini", points=3000, device="cpu", refine="none")


def half(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A mask (width, height) that keeps the left half."""
    keep = np.zeros(size[::-1], np.uint8)
    keep[:, : size[0] // 2] = 255
    return Image.fromarray(keep)


def load(folder: Path, mask: Path) -> images.Loaded:
    root, paths = files.find(str(folder), mask)
    found = masks.matching(mask, [files.name_in(root, path) for path in paths])
    return images.load(root, paths, BALANCED, masks=found)


@pytest.mark.parametrize(
    "name", ["a.jpg.png", "a.png", "a.jpg.mask.png", "a.mask.png", "in/a.jpg.png", "in/a.png"]
)
def test_a_mask_is_found_by_name_or_stem_with_or_without_folder(tmp_path: Path, name: str) -> None:
    mask = tmp_path / name
    mask.parent.mkdir(exist_ok=True)
    half().save(mask)
    assert masks.matching(tmp_path, ["in/a.jpg", "b.jpg"]) == [mask, None]
    twice = masks.matching(tmp_path, ["in/a.jpg", "b/a.jpg", "a.jpg"])
    assert twice == ([mask, None, None] if "/" in name else [None, None, mask])


def test_masks_of_nothing_are_an_input_error(tmp_path: Path) -> None:
    half().save(tmp_path / "other.png")
    with pytest.raises(InputError, match=r"no mask of any photo, e\.g\. a\.jpg"):
        masks.matching(tmp_path, ["a.jpg"])
    with pytest.raises(InputError, match="no such folder"):
        masks.matching(tmp_path / "gone", ["a.jpg"])


def test_masked_pixels_are_not_valid_and_keep_their_colours(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    half().save(tmp_path / "masks/a.png")
    whole = images.load(tmp_path, [tmp_path / "a.png"], BALANCED).images
    loaded = load(tmp_path, tmp_path / "masks").images
    assert loaded.names == ("a.png",)  # masks among the photos are no photos
    assert torch.equal(loaded.pixels, whole.pixels)
    assert loaded.valid[0, :, :40].all()
    assert not loaded.valid[0, :, 40:].any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "I;16", "0 and 1"])
def test_masks_of_every_kind_mean_the_same(tmp_path: Path, mode: str) -> None:
    picture().save(tmp_path / "a.jpg")
    keep = half()
    if mode == "I;16":
        keep = Image.fromarray(np.asarray(keep).astype(np.uint16) * 257)
    elif mode == "0 and 1":
        keep = Image.fromarray(np.asarray(keep) // 255)
    elif mode == "LA":  # what is transparent does not count either
        keep = Image.merge("LA", (Image.new("L", keep.size, 255), keep))
    else:
        keep = keep.convert(mode)
    (tmp_path / "m").mkdir()
    keep.save(tmp_path / "m/a.png")
    photo = load(tmp_path, tmp_path / "m").photos[0]
    assert decode.kept(photo).tobytes() == half().tobytes()


@pytest.mark.parametrize("stored", [False, True])
def test_a_mask_is_of_the_upright_photo_or_of_the_one_stored(tmp_path: Path, stored: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60, 40).save(tmp_path / "a.jpg", exif=exif)  # upright: 40 x 60
    (tmp_path / "m").mkdir()
    keep = half((60, 40)) if stored else half((40, 60))
    keep.save(tmp_path / "m/a.png")
    photo = load(tmp_path, tmp_path / "m").photos[0]
    expected = keep.transpose(Image.Transpose.ROTATE_270) if stored else keep
    assert decode.kept(photo).size == (40, 60)
    assert decode.kept(photo).tobytes() == expected.tobytes()


def test_a_mask_of_another_size_is_an_error_that_says_both(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "m").mkdir()
    half((30, 20)).save(tmp_path / "m/a.png")
    with pytest.raises(InputError, match=r"mask of a\.jpg is 30 x 20, the photo 60 x 40: .*a\.png"):
        load(tmp_path, tmp_path / "m")
    (tmp_path / "m/a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"cannot be read: .*m/a\.png"):
        load(tmp_path, tmp_path / "m")


def test_mask_and_photo_pass_through_one_undistortion(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "m").mkdir()
    keep = np.asarray(half()).copy()
    keep[:8] = 255
    Image.fromarray(keep).save(tmp_path / "m/a.png")
    photo = load(tmp_path, tmp_path / "m").photos[0]
    K = torch.tensor([[50.0, 0, 30], [0, 50, 20], [0, 0, 1]])
    lens = K, torch.tensor(-0.2), K * torch.tensor([[0.9], [0.9], [1]]) + 0
    lens[2][:2, 2] = K[:2, 2]
    copies.mask_copy(photo, tmp_path / "mask.png", lens)
    Image.fromarray(keep).save(tmp_path / "as_photo.png")  # the same pixels, as a photo
    copies.straight_copy(
        dataclasses.replace(photo, path=tmp_path / "as_photo.png"), tmp_path / "photo.png", lens
    )
    with Image.open(tmp_path / "mask.png") as mask, Image.open(tmp_path / "photo.png") as same:
        straight = np.asarray(mask)
        assert set(np.unique(straight)) == {0, 255}
        assert np.array_equal(straight == 255, np.asarray(same) >= 128)
        assert not np.array_equal(straight, keep)


@pytest.fixture(scope="module")
def scene(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Two photos that keep their left half, by a mask and by alpha, and one that is whole."""
    folder = tmp_path_factory.mktemp("photos")
    for i, side in enumerate(("left", "right", "left")):
        photo = Image.open(examples / f"motorcycle/{side}.png").convert("RGB").resize((240, 160))
        if i == 1:
            photo.putalpha(half(photo.size))
        photo.save(folder / f"{i}.png")
    (folder / "masks").mkdir()
    half((240, 160)).save(folder / "masks/0.png.png")
    options = dataclasses.replace(MINI, masks=str(folder / "masks"))
    return pipeline.reconstruct(str(folder), options)


def test_a_masked_scene_has_no_points_there_and_its_masks_go_out_with_it(
    scene: Scene, tmp_path: Path
) -> None:
    tracks = scene.tracks
    masked = tracks.frame < 2
    assert masked.any()
    assert (tracks.xy[masked][:, 0] < 121).all()
    assert (tracks.xy[tracks.frame == 2][:, 0] > 121).any()
    assert scene.warnings == ("2 of 3 photos have no mask, so all of them counts, e.g. 1.png",)
    out = tmp_path / "out"
    export.write(scene, out)
    names = {f"{i}{ending}" for i in range(3) for ending in (".png", ".png.png")}
    assert {path.name for path in (out / "masks").iterdir()} == names
    for i, expected in enumerate([half((240, 160)), half((240, 160)), None]):
        for name in (f"{i}.png.png", f"{i}.png"):
            with Image.open(out / "masks" / name) as mask:
                whole = Image.new("L", (240, 160), 255)
                assert mask.tobytes() == (expected or whole).tobytes()
    assert all(verdict.verdict != "broken" for verdict in check_folder(out))


def test_nerfstudio_finds_the_masks_by_transforms_json(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out", ["nerfstudio"], html=False)
    export.add(scene_read.read(tmp_path / "out"), tmp_path / "out", ["nerfstudio"], overwrite=True)
    frames = json.loads((tmp_path / "out/transforms.json").read_text())["frames"]
    assert [frame["mask_path"] for frame in frames] == [f"masks/{i}.png" for i in range(3)]
    for frame in frames:  # one channel, of the photo's size: the parser takes nothing else
        with (
            Image.open(tmp_path / "out" / frame["mask_path"]) as mask,
            Image.open(tmp_path / "out" / frame["file_path"]) as photo,
        ):
            assert (mask.mode, mask.size) == ("L", photo.size)


def test_a_scene_that_is_read_keeps_its_masks(scene: Scene, tmp_path: Path) -> None:
    export.write(scene, tmp_path / "out", html=False)
    export.refuse_strangers(tmp_path / "out")
    again = scene_read.read(tmp_path / "out")
    assert torch.equal(again.images.valid, scene.images.valid)
    export.write(again, tmp_path / "again", html=False)
    for name in ("0.png.png", "1.png.png"):
        first, second = (tmp_path / folder / "masks" / name for folder in ("out", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_a_scene_without_masks_has_no_folder_of_them(scene: Scene, tmp_path: Path) -> None:
    photos = [dataclasses.replace(p, mask=None, transparent=False) for p in scene.photos]
    export.write(dataclasses.replace(scene, photos=tuple(photos)), tmp_path / "out", html=False)
    assert not (tmp_path / "out/masks").exists()
