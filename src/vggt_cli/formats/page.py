"""scene.html: one page that shows a scene in any browser, offline, by double click.

Everything is in the file: the markup and style of page.html, the script page.js, which draws with
WebGL 2 alone, and the data. The page may load nothing and run no other script: its
Content-Security-Policy says so.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggt_cli import __version__
from vggt_cli.formats.colmap import Array, Model
from vggt_cli.scene import Cameras

POINTS = 1_000_000  # at most, of 13.3 bytes each; of more, that many at random
POINT = np.dtype([("xyz", "<u2", 3), ("rgb", "u1", 3), ("rank", "u1")])  # as page.js reads it
UP = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Page:
    """What a page shows."""

    title: str
    names: tuple[str, ...]  # [S] of the photos
    cameras: Cameras  # [S]
    xyz: Tensor  # [N, 3] world, scene units
    rgb: Tensor  # [N, 3] uint8 sRGB
    confidence: Tensor | None = None  # [N] larger is surer; without it no slider
    predicted: Cameras | None = None  # [S] what `cameras` were before they were refined

    def __post_init__(self) -> None:
        assert len(self.cameras) == len(self.names) > 0, (len(self.cameras), len(self.names))
        assert self.xyz.shape == self.rgb.shape, (self.xyz.shape, self.rgb.shape)
        assert self.predicted is None or len(self.predicted) == len(self.cameras)


def of_model(model: Model, title: str) -> Page:
    """The page of a COLMAP model, whoever made it; its lens distortion is not shown."""
    return Page(title, model.names, model.cameras, model.tracks.xyz, torch.from_numpy(model.rgb))


def write(page: Page, path: Path) -> None:
    """The page as a file; the same page gives the same bytes."""
    folder = Path(__file__).parent
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content, points = _content(page)
    text = Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(page.title),
        digest=digest,
        script=script,
        # A name with </script> in it ends no element.
        content=json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
        points=base64.b64encode(points).decode(),
    )
    path.write_bytes(text.encode("utf-8", errors="replace"))  # a file name may be no Unicode


def _content(page: Page) -> tuple[dict[str, Any], bytes]:
    """What page.js draws: JSON, and the points as POINT records.

    Lengths are in units of the radius within which most points lie, from their median.
    """
    finite = torch.isfinite(page.xyz).all(-1)
    xyz = page.xyz[finite].double()
    centers = page.cameras.centers.double()
    center = (xyz if len(xyz) else centers).median(0).values
    radius = _quantile((torch.cat([xyz, centers]) - center).norm(dim=-1)) or 1.0
    xyz = (xyz - center) / radius
    cameras = _frusta(page.cameras, center, radius)
    predicted = None if page.predicted is None else _frusta(page.predicted, center, radius)
    kept = np.arange(len(xyz))
    if len(xyz) > POINTS:
        kept = np.sort(np.random.default_rng(0).choice(len(xyz), POINTS, replace=False))
    record = np.zeros(len(kept), POINT)
    record["xyz"] = np.round((_contract(xyz.numpy()[kept]) + 2) / 4 * 65535)
    record["rgb"] = page.rgb[finite].numpy()[kept]
    if page.confidence is not None:
        record["rank"] = _ranks(page.confidence[finite].numpy()[kept])
    content = {
        "tool": f"vggt {__version__}",
        "names": page.names,
        "points": len(xyz),
        "sure": page.confidence is not None,
        "cameras": _rounded(cameras),
        "predicted": None if predicted is None else _rounded(predicted),
        **_start(cameras, xyz),
    }
    return content, record.tobytes()


def _contract(xyz: Array) -> Array:
    """`xyz` with all that is outside the unit ball between it and the ball of radius 2.

    16 bits then suffice near by, and a point far away keeps its direction.
    Source: Barron et al., "Mip-NeRF 360", 2022, equation 10.
    """
    distance = np.maximum(np.linalg.norm(xyz, axis=-1, keepdims=True), 1)
    return np.asarray(xyz * (2 - 1 / distance) / distance)


def _ranks(confidence: Array) -> Array:
    """[N] in 0 to 255: the share of points that are less sure."""
    below = np.searchsorted(np.sort(confidence), confidence)
    return np.asarray(below * 255 // max(len(confidence), 1))


def _frusta(cameras: Cameras, center: Tensor, radius: float) -> Tensor:
    """[S, 5, 3]: the optical centre, and the vectors from it to the image's corners at depth 1.

    Corners go around: top left, top right, bottom right, bottom left.
    """
    h, w = cameras.image_size.double().unbind(-1)
    zero, one = torch.zeros_like(w), torch.ones_like(w)
    pixels = torch.stack([zero, zero, one, w, zero, one, w, h, one, zero, h, one], -1)
    directions = torch.linalg.solve(
        cameras.intrinsics.double(), pixels.unflatten(-1, (4, 3)).mT
    ).mT  # [S, 4, 3]
    corners = directions @ cameras.extrinsics[:, :, :3].double()
    return torch.cat([((cameras.centers.double() - center) / radius)[:, None], corners], 1)


def _start(frusta: Tensor, xyz: Tensor) -> dict[str, Any]:
    """Where the viewer starts: behind the most typical camera, looking where it looks.

    "up" is the cameras' own, on average; "size" is the depth to draw frusta at.
    """
    centers, corners = frusta[:, 0], frusta[:, 1:]
    axes = torch.nn.functional.normalize(corners.sum(1), dim=-1)
    first = int((axes @ axes.sum(0)).argmax())
    ups = torch.nn.functional.normalize(corners[:, 0] - corners[:, 3], dim=-1)
    up = ups.mean(0)
    up = up / up.norm() if up.norm() > 0.1 else UP
    depths = (xyz - centers[first]) @ axes[first]
    depths = depths[depths > 0]
    depth = float(depths.median()) if len(depths) else 1.0
    between = torch.cdist(centers, centers).fill_diagonal_(torch.inf).min(-1).values
    near = float(between.median()) if len(centers) > 1 else depth
    span = _quantile((centers - centers[first]).norm(dim=-1))
    target = centers[first] + depth * axes[first]
    direction = 0.15 * up - axes[first]  # from a little above
    eye = target + (1.45 * depth + 0.65 * span) * direction / direction.norm()
    size = min(max(0.4 * near, 0.04 * depth), 0.2 * depth)
    return {"up": _rounded(up), "target": _rounded(target), "eye": _rounded(eye), "size": size}


def _quantile(values: Tensor) -> float:
    """The value that 90 % are below; torch's own refuses more than 16 million."""
    return float(np.quantile(values.numpy(), 0.9))


def _rounded(values: Tensor) -> Any:
    return np.round(values.numpy(), 6).tolist()
