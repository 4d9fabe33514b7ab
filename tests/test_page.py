"""The page that shows a scene: what it holds, and what a real browser makes of it."""

import base64
import dataclasses
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, chromium
from torch import Tensor
from typer.testing import CliRunner
from wall import EVERYTHING, wall

from vggt_cli.cli import app
from vggt_cli.formats import colmap, page
from vggt_cli.formats.page import POINT, Page
from vggt_cli.geometry import project
from vggt_cli.reconstruction.fuse import fuse
from vggt_cli.scene import Cameras

NAMES = ("a.jpg", "</script><script>alert(1)</script>.jpg", "\"'&<img src=x onerror=alert(1)>.png",
         "日本\u2028\N{DROMEDARY CAMEL}.jpg", "not unicode \udcff.jpg")  # fmt: skip


def scene(count: int = 2000, names: tuple[str, ...] = NAMES) -> Page:
    """A coloured ball of radius 1 in a far ground, and cameras in an arc before it."""
    random = torch.Generator().manual_seed(0)
    ball = torch.nn.functional.normalize(torch.randn(count, 3, generator=random), dim=-1)
    ball[: count // 50] *= 30
    turn = torch.linspace(-0.2, 0.2, len(names), dtype=torch.float64)
    rotation = torch.eye(3, dtype=torch.float64).repeat(len(names), 1, 1)
    rotation[:, 0, 0] = rotation[:, 2, 2] = turn.cos()
    rotation[:, 0, 2], rotation[:, 2, 0] = turn.sin(), -turn.sin()
    back = torch.tensor([0.0, 0, 4], dtype=torch.float64).expand(len(names), 3)
    intrinsics = torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    cameras = Cameras(
        torch.cat([rotation, back[:, :, None]], -1),
        intrinsics.repeat(len(names), 1, 1),
        torch.tensor([[480, 640]]).repeat(len(names), 1),
    )
    rgb = ((ball.clamp(-1, 1) + 1) * 127).to(torch.uint8)
    return Page("a scene", names, cameras, ball, rgb, 1 + torch.rand(count, generator=random))


def moved(cameras: Cameras, scale: float, shift: Tensor) -> Cameras:
    """The cameras in a world that is larger by `scale` and then shifted."""
    extrinsics = cameras.extrinsics.clone()
    extrinsics[:, :, 3] = scale * extrinsics[:, :, 3] - extrinsics[:, :, :3] @ shift
    return dataclasses.replace(cameras, extrinsics=extrinsics)


class Elements(HTMLParser):
    """Every element that a browser would see, and the text of those with an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        self.texts[self.open] = self.texts.get(self.open, "") + data


def written(shown: Page, folder: Path) -> Elements:
    page.write(shown, folder / "scene.html")
    return Elements((folder / "scene.html").read_text(encoding="utf-8"))


def content(shown: Page, folder: Path) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """What the script reads: JSON, and the points as records."""
    texts = written(shown, folder).texts
    return json.loads(texts["scene"]), np.frombuffer(base64.b64decode(texts["cloud"]), POINT)


# What the file holds.


def test_the_same_scene_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        page.write(scene(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_names_come_through_and_make_no_elements(tmp_path: Path) -> None:
    for title in NAMES:
        hostile = written(dataclasses.replace(scene(), title=title), tmp_path)
        harmless = written(scene(names=("a",) * 5), tmp_path)
        assert hostile.tags == harmless.tags
        assert tuple(json.loads(hostile.texts["scene"])["names"]) == NAMES
        assert hostile.texts["title"].strip() == title.replace("\udcff", "?")


def test_nothing_in_the_page_points_elsewhere(tmp_path: Path) -> None:
    page.write(scene(), tmp_path / "scene.html")
    text = (tmp_path / "scene.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc=(?!x)|href=|@import|url\(", text)


def test_points_are_exact_near_by_and_keep_their_direction_far_away(tmp_path: Path) -> None:
    shown = scene()
    _, record = content(shown, tmp_path)
    found = record["xyz"] / 65535 * 4 - 2
    length = np.linalg.norm(found, axis=1, keepdims=True)
    found = np.where(length > 1, found / length / np.maximum(2 - length, 1e-4), found)
    xyz = (shown.xyz - shown.xyz.median(0).values).double().numpy()
    centers = shown.cameras.centers - shown.xyz.median(0).values
    radius = np.quantile(np.linalg.norm(np.concatenate([xyz, centers]), axis=1), 0.9)
    error = np.linalg.norm(found - xyz / radius, axis=1)
    distance = np.linalg.norm(xyz / radius, axis=1)
    assert (distance > 20).any()
    assert error.max() < 0.06
    assert error[distance < 1].max() < 6e-5
    assert (error < 6e-5 * np.maximum(distance, 1) ** 2).all()
    np.testing.assert_array_equal(record["rgb"], shown.rgb)


def test_ranks_are_the_share_of_points_that_are_less_sure(tmp_path: Path) -> None:
    shown = scene()
    assert shown.confidence is not None
    described, record = content(shown, tmp_path)
    assert described["sure"]
    order = shown.confidence.argsort().numpy()
    np.testing.assert_array_equal(record["rank"][order], np.arange(2000) * 255 // 2000)
    equal = dataclasses.replace(shown, confidence=torch.ones(2000))
    assert not content(equal, tmp_path)[1]["rank"].any()


def test_a_world_of_other_units_and_origin_looks_the_same(tmp_path: Path) -> None:
    shown, shift = scene(), torch.tensor([5.0, -3, 9], dtype=torch.float64)
    other = dataclasses.replace(
        shown, xyz=7 * shown.xyz.double() + shift, cameras=moved(shown.cameras, 7, shift)
    )
    (one, points), (two, same) = content(shown, tmp_path), content(other, tmp_path)
    for key in ("cameras", "up", "target", "eye", "size"):
        np.testing.assert_allclose(one[key], two[key], atol=2e-6)
    assert np.abs(points["xyz"].astype(int) - same["xyz"].astype(int)).max() <= 1


def test_frusta_end_where_the_corners_of_the_image_are_seen(tmp_path: Path) -> None:
    shown = scene()
    described, _ = content(shown, tmp_path)
    frusta = torch.tensor(described["cameras"], dtype=torch.float64)
    apart = shown.cameras.centers[-1] - shown.cameras.centers[0]
    unit = float(apart.norm() / (frusta[-1, 0] - frusta[0, 0]).norm())
    ends = shown.cameras.centers[:, None] + unit * frusta[:, 1:]
    intrinsics, extrinsics = shown.cameras.intrinsics.double(), shown.cameras.extrinsics
    xy, depth = project(ends[:, None], intrinsics, extrinsics)
    corners = torch.tensor([[0.0, 0], [640, 0], [640, 480], [0, 480]], dtype=torch.float64)
    torch.testing.assert_close(xy[:, 0], corners.expand(5, 4, 2), atol=0.01, rtol=0)
    torch.testing.assert_close(depth, torch.full_like(depth, unit), rtol=1e-4, atol=0)


def test_the_view_starts_upright_behind_the_middle_camera(tmp_path: Path) -> None:
    described, _ = content(scene(), tmp_path)
    eye, target = np.array(described["eye"]), np.array(described["target"])
    np.testing.assert_allclose(described["up"], [0, -1, 0], atol=1e-6)
    middle = np.array(described["cameras"][2][0])
    assert eye[2] < middle[2] < target[2]
    assert eye[1] < middle[1]  # from above: y is down
    assert abs(eye[0] - middle[0]) < 1e-3
    assert np.linalg.norm(target) < 0.3  # the ball


def test_more_points_than_fit_are_thinned_and_the_page_says_of_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "POINTS", 500)
    described, record = content(scene(), tmp_path)
    assert described["points"] == 2000
    assert len(record) == 500
    assert record["rank"].max() > 250


def test_scenes_without_points_and_points_that_are_no_numbers_are_no_trouble(
    tmp_path: Path,
) -> None:
    shown = scene()
    empty = dataclasses.replace(shown, xyz=shown.xyz[:0], rgb=shown.rgb[:0], confidence=None)
    described, record = content(empty, tmp_path)
    assert len(record) == 0
    assert np.isfinite(np.array(described["eye"])).all()
    shown.xyz[7] = torch.nan
    shown.xyz[8] = torch.inf
    described, record = content(shown, tmp_path)
    assert (described["points"], len(record)) == (1998, 1998)
    alone = dataclasses.replace(empty, cameras=empty.cameras[:1], names=("a",))
    assert content(alone, tmp_path)[0]["size"] > 0


# The command.


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a COLMAP model and nothing else."""
    prediction, images = wall()
    cloud = fuse(prediction, images, EVERYTHING)
    tracks = cloud.observations
    assert tracks is not None
    names = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
    found = colmap.Model(names, prediction.cameras, (0, 0, 0, 0), tracks, cloud.rgb.numpy())
    colmap.write(found, tmp_path / "model/sparse/0")
    return tmp_path / "model"


def test_a_model_without_page_is_shown_and_stays_as_it_is(model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    for folder in (model, model / "sparse/0"):
        done = CliRunner().invoke(app, ["view", str(folder), "--no-open"])
        assert done.exit_code == 0, done.output
        shown = Path(done.stdout.removesuffix("\n"))
        assert shown.is_file()
        assert model not in shown.parents
        assert '"names":["a.jpg","b.jpg","c.jpg","d.jpg"]' in shown.read_text(encoding="utf-8")
        assert '"sure":false' in shown.read_text(encoding="utf-8")
        shown.unlink()
        shown.parent.rmdir()
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before


def test_the_page_of_a_scene_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a #1 scene"
    folder.mkdir()
    page.write(scene(), folder / "scene.html")
    opened: list[str] = []

    def open_once(url: str) -> bool:
        opened.append(url)
        return len(opened) == 1

    monkeypatch.setattr("webbrowser.open", open_once)
    done = CliRunner().invoke(app, ["view", str(folder)])
    assert (done.stdout, done.stderr) == (f"{folder / 'scene.html'}\n", "")
    assert opened == [(folder / "scene.html").as_uri()]
    assert "%231" in opened[0]
    without = CliRunner().invoke(app, ["view", str(folder)])
    assert without.exit_code == 0
    assert "no browser" in without.stderr
    CliRunner().invoke(app, ["view", str(folder), "--no-open"])
    assert len(opened) == 2


def test_a_folder_without_model_is_named(tmp_path: Path) -> None:
    from vggt_cli.errors import InputError

    done = CliRunner().invoke(app, ["view", str(tmp_path), "--no-open"])
    assert isinstance(done.exception, InputError)
    assert str(tmp_path) in str(done.exception)


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def opened(browser: Browser, shown: Page, folder: Path) -> Browser:
    page.write(shown, folder / "scene.html")
    browser.open(folder / "scene.html")
    assert browser.complaints == []
    return browser


def covered(browser: Browser) -> float:
    """Share of the screen, right of the panel, that is not background."""
    pixels = np.asarray(browser.picture().crop((300, 0, 1000, 600)))
    return float((pixels != pixels[0, -1]).any(-1).mean())


def put(browser: Browser, control: str, value: object) -> None:
    browser.do(
        f"{{ const control = element('{control}'); control.value = {json.dumps(value)};"
        "control.dispatchEvent(new Event('input')); }"
    )


def place_of(browser: Browser, kind: str, index: int) -> tuple[float, float]:
    """Where on the screen a camera's optical centre is."""
    x, y, _ = browser.do(f"onScreen(clipFromWorld(), ...scene.{kind}[{index}][0])")
    return x, y


@pytest.mark.parametrize("count", [200_000, 1_000_000])
def test_a_large_cloud_is_drawn_and_nothing_is_fetched(
    browser: Browser, tmp_path: Path, count: int
) -> None:
    opened(browser, scene(count), tmp_path)
    assert browser.requests == [(tmp_path / "scene.html").as_uri()]
    colors = browser.picture().crop((300, 0, 1000, 600)).getcolors(700 * 600)
    assert colors is not None
    assert len(colors) > 1000  # the ball's
    assert max(colors)[0] < 0.93 * 700 * 600  # the ground's
    assert browser.do("element('count').textContent") == f"5 photos, {count:,} points"


def test_the_page_may_fetch_nothing_and_run_no_other_script(
    browser: Browser, tmp_path: Path
) -> None:
    opened(browser, scene(), tmp_path)
    violated = browser.do(
        "new Promise(done => { document.addEventListener('securitypolicyviolation',"
        "event => done(event.effectiveDirective)); fetch('http://127.0.0.1:9/').catch(() => 0); })"
    )
    assert violated == "connect-src"
    script = "s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append"
    assert browser.do(f"{script}(s); window.ran") is None


def test_the_slider_hides_the_least_sure_points(browser: Browser, tmp_path: Path) -> None:
    opened(browser, scene(20_000), tmp_path)
    put(browser, "points", 1)
    before = covered(browser)
    put(browser, "confidence", 90)
    assert browser.do("element('percent').textContent") == "90 %"
    words = browser.do("element('count').textContent")
    assert words.startswith("5 photos, 1,9") or words.startswith("5 photos, 2,0")
    assert words.endswith(" of 20,000 points")
    assert covered(browser) < before / 2
    hidden = covered(browser)
    put(browser, "points", 3)
    assert covered(browser) > 2 * hidden


def test_a_model_without_confidence_has_no_slider(browser: Browser, tmp_path: Path) -> None:
    opened(browser, dataclasses.replace(scene(), confidence=None), tmp_path)
    assert browser.do("element('sure').hidden && element('before').hidden")
    assert covered(browser) > 0.01


@pytest.mark.parametrize("index", range(len(NAMES)))
def test_a_camera_tells_its_photo_and_can_be_looked_from(
    browser: Browser, tmp_path: Path, index: int
) -> None:
    opened(browser, scene(), tmp_path)
    x, y = place_of(browser, "cameras", index)
    browser.mouse("Moved", x, y)
    said = browser.do("[element('label').hidden, element('label').textContent]")
    assert said == [False, NAMES[index]]
    browser.click(x, y)
    assert browser.do("element('photo').value") == str(index)
    expected = browser.do(f"scene.cameras[{index}][0]")
    np.testing.assert_allclose(browser.do("frame().place"), expected, atol=1e-6)
    # What the photo shows is on the screen, in full.
    corners = browser.do(
        f"scene.cameras[{index}].slice(1).map(ray => "
        f"onScreen(clipFromWorld(), ...add(scene.cameras[{index}][0], ray)).slice(0, 2))"
    )
    width, height = browser.do("[innerWidth, innerHeight]")
    assert all(0 < x < width and 0 < y < height for x, y in corners)
    assert browser.complaints == []


def test_dragging_turns_and_the_view_comes_back(browser: Browser, tmp_path: Path) -> None:
    opened(browser, scene(), tmp_path)
    browser.mouse("Moved", 950, 20)
    start = np.asarray(browser.picture())
    x, _ = place_of(browser, "cameras", 0)
    browser.mouse("Pressed", 600, 300, button="left")
    browser.mouse("Moved", 640, 300, button="left", buttons=1)
    browser.mouse("Released", 640, 300, button="left")
    assert place_of(browser, "cameras", 0)[0] > x  # what is nearer than the target goes along
    distance = browser.do("eye.distance")
    browser.mouse("Wheel", 600, 300, deltaX=0, deltaY=-200)
    browser.mouse("Moved", 950, 20)
    assert browser.do("eye.distance") < distance
    assert (np.asarray(browser.picture()) != start).any()
    browser.do("element('reset').click()")
    np.testing.assert_array_equal(np.asarray(browser.picture()), start)


def test_a_double_click_turns_about_the_point_there(browser: Browser, tmp_path: Path) -> None:
    opened(browser, scene(20_000), tmp_path)
    put(browser, "size", -2)
    x, y, _ = browser.do("onScreen(clipFromWorld(), ...scene.target)")
    browser.do(f"canvas.dispatchEvent(new MouseEvent('dblclick', {{clientX: {x}, clientY: {y}}}))")
    # On the near side of the ball.
    assert browser.do("eye.target")[2] < browser.do("scene.target")[2] - 0.1


def test_predicted_cameras_are_shown_beside_the_refined(browser: Browser, tmp_path: Path) -> None:
    refined = scene()
    predicted = moved(refined.cameras, 1, torch.tensor([0, -1, 0], dtype=torch.float64))
    opened(browser, dataclasses.replace(refined, predicted=predicted), tmp_path)
    x, y = place_of(browser, "predicted", 2)
    assert y < place_of(browser, "cameras", 2)[1] - 20
    browser.mouse("Moved", x, y)
    assert browser.do("element('label').textContent").endswith("(predicted)")
    browser.mouse("Moved", 950, 20)

    def blue() -> int:
        r, _, b = np.asarray(browser.picture().crop((300, 0, 1000, 600)), int).transpose(2, 0, 1)
        return int(((b == 235) & (r == 46)).sum())

    assert blue() > 50
    browser.do("element('predicted').click()")
    assert blue() == 0


def test_light_and_dark(browser: Browser, tmp_path: Path) -> None:
    def corner() -> Any:
        return browser.picture().getpixel((990, 5))

    try:
        for scheme, wanted in (("light", (247, 247, 245)), ("dark", (22, 24, 28))):
            feature = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.call("Emulation.setEmulatedMedia", features=feature)
            opened(browser, scene(), tmp_path)
            assert corner() == wanted
            browser.do("element('theme').click()")
            assert corner() != wanted
    finally:
        browser.call("Emulation.setEmulatedMedia", features=[])


def test_a_browser_without_webgl_is_told(browser: Browser, tmp_path: Path) -> None:
    source = "HTMLCanvasElement.prototype.getContext = () => null"
    added = browser.call("Page.addScriptToEvaluateOnNewDocument", source=source)
    try:
        opened(browser, scene(), tmp_path)
        assert "no WebGL 2" in browser.do("element('message').textContent")
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
