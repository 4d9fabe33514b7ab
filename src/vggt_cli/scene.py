"""The nouns: what one photo set is from its files to the finished scene.

Frozen dataclasses of CPU tensors without a batch axis. S frames, H x W network pixels,
N points, K observations. Sizes are (height, width); pixel centres lie at +0.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # an array type only: `vggt --help` must not wait for torch
    from torch import Tensor


@dataclass(frozen=True)
class Shaping:
    """How a network wants its images: the size that its weights were trained at."""

    mode: Literal["longer-side", "balanced"]  # VGGT; VGGT-Omega and mini
    resolution: int  # pixels: longer side, or side of the square of equal area
    patch_size: int  # pixels


RECODED = ("AVIF", "HEIF")  # kinds that few programs read: a scene holds them as JPEG


@dataclass(frozen=True)
class Frame:
    """Where in a video a photo comes from."""

    video: str  # path relative to the source folder
    number: int  # counted from 0
    seconds: float
    folder: object = field(default=None, repr=False, compare=False)  # it lasts as long as this


@dataclass(frozen=True)
class Photo:
    """A file that was read, and what its header says."""

    path: Path
    name: str  # path relative to the source folder, with "/"
    size: tuple[int, int]  # of the upright image
    rotated: bool = False  # EXIF orientation is not 1
    camera: str = ""  # EXIF make and model
    focal_length: str = ""  # EXIF, as written
    focal_35mm: float = 0.0  # EXIF, of a 36 x 24 mm sensor with the same view; 0: not written
    kind: str = ""  # of the file, as Pillow names it
    mask: Path | None = None  # white where pixels count
    transparent: bool = False  # alpha says that some pixels do not count
    frame: Frame | None = None  # of a video; None: a photo

    @property
    def rewritten(self) -> bool:
        """Whether a scene holds a copy: of a photo that is not upright, or of a rare kind."""
        return self.rotated or self.kind in RECODED

    @property
    def focal_pixels(self) -> float:
        """Focal length in pixels of the upright photo by its header; NaN where it has none.

        By the diagonal, as CIPA DCG-001 has it.
        """
        return self.focal_35mm / math.hypot(36, 24) * math.hypot(*self.size) or math.nan


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Frames as the network sees them, and the way back to their files."""

    names: tuple[str, ...]  # path relative to the source folder
    pixels: Tensor  # [S, 3, H, W] float32 sRGB in [0, 1]; padding white
    valid: Tensor  # [S, H, W] bool, False on padding and masked pixels
    source_from_network: Tensor  # [S, 3, 3] float64 network pixel -> upright source pixel
    source_size: Tensor  # [S, 2] int64 size of the upright source

    def __post_init__(self) -> None:
        S, channels, H, W = self.pixels.shape
        assert channels == 3, self.pixels.shape
        assert len(self.names) == S, (len(self.names), S)
        assert self.valid.shape == (S, H, W), self.valid.shape
        assert self.source_from_network.shape == (S, 3, 3), self.source_from_network.shape
        assert self.source_size.shape == (S, 2), self.source_size.shape

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, frames: slice | list[int]) -> ImageSet:
        rows = range(len(self))[frames] if isinstance(frames, slice) else frames
        return ImageSet(
            tuple(self.names[row] for row in rows),
            self.pixels[frames],
            self.valid[frames],
            self.source_from_network[frames],
            self.source_size[frames],
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


@dataclass(frozen=True, eq=False)
class Cameras:
    """Pinhole cameras of S frames, OpenCV axes: x right, y down, z forward."""

    extrinsics: Tensor  # [S, 3, 4] world-to-camera [R | t], scene units
    intrinsics: Tensor  # [S, 3, 3] pixels of image_size, pixel centres at +0.5
    image_size: Tensor  # [S, 2] (height, width) in pixels

    def __post_init__(self) -> None:
        assert self.extrinsics.shape[1:] == (3, 4), self.extrinsics.shape
        assert self.intrinsics.shape[1:] == (3, 3), self.intrinsics.shape
        assert self.image_size.shape[1:] == (2,), self.image_size.shape

    def __len__(self) -> int:
        return len(self.extrinsics)

    def __getitem__(self, frames: slice | list[int]) -> Cameras:
        return Cameras(self.extrinsics[frames], self.intrinsics[frames], self.image_size[frames])

    @property
    def centers(self) -> Tensor:
        """[S, 3] optical centres in the world."""
        rotation, translation = self.extrinsics[:, :, :3], self.extrinsics[:, :, 3:]
        return -(rotation.mT @ translation)[..., 0]


@dataclass(frozen=True, eq=False)
class Similarity:
    """A map from one world to another: x -> scale * rotation x + translation."""

    scale: float  # > 0, units of the other world in one of the first
    rotation: Tensor  # [3, 3] proper
    translation: Tensor  # [3] units of the other world

    def __call__(self, xyz: Tensor) -> Tensor:
        """The points [..., 3] in the other world, in their own dtype."""
        rotation, translation = self.rotation.to(xyz), self.translation.to(xyz)
        return self.scale * xyz @ rotation.mT + translation

    def __matmul__(self, first: Similarity) -> Similarity:
        """This map after `first`."""
        rotation = self.rotation @ first.rotation
        return Similarity(self.scale * first.scale, rotation, self(first.translation))

    @property
    def inverse(self) -> Similarity:
        """The way back."""
        rotation = self.rotation.mT
        return Similarity(1 / self.scale, rotation, -(rotation @ self.translation) / self.scale)


@dataclass(frozen=True, eq=False)
class Setup:
    """Cameras of the upright photos with what refinement knows besides: their lenses."""

    cameras: Cameras  # float64, pixels of the upright source images
    radial: Tensor  # [S] float64 term of each lens, see `geometry.distort`; 0: pinhole
    group: tuple[int, ...]  # [S] frames with equal numbers share a lens

    def __post_init__(self) -> None:
        assert len(self.cameras) == len(self.radial) == len(self.group), len(self.group)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says about an ImageSet; cameras in network pixels."""

    cameras: Cameras
    depth: Tensor  # [S, H, W] float32 z-depth > 0, scene units
    confidence: Tensor  # [S, H, W] float32 >= 1; larger is surer, not a probability
    tokens: Tensor | None = None  # [S, 1+R, 2D] camera and register tokens
    text: Tensor | None = None  # [2D] text embedding of the whole set

    def __post_init__(self) -> None:
        assert len(self.cameras) == len(self.depth), (len(self.cameras), len(self.depth))
        assert self.depth.shape == self.confidence.shape, self.confidence.shape

    def __len__(self) -> int:
        return len(self.depth)

    def __getitem__(self, frames: slice | list[int]) -> Prediction:
        tokens = None if self.tokens is None else self.tokens[frames]
        return Prediction(
            self.cameras[frames], self.depth[frames], self.confidence[frames], tokens, self.text
        )


@dataclass(frozen=True, eq=False)
class Tracks:
    """Which point is seen where."""

    xyz: Tensor  # [N, 3] float32 world, scene units
    point: Tensor  # [K] int64 index into xyz, ascending
    frame: Tensor  # [K] int32
    xy: Tensor  # [K, 2] float32 pixels of the upright source image

    def __post_init__(self) -> None:
        assert self.point.shape == self.frame.shape == self.xy.shape[:1], self.xy.shape


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Fused points; `observations` are the pixels that were fused into each (or None)."""

    xyz: Tensor  # [N, 3] float32 world, scene units
    normals: Tensor  # [N, 3] float32 unit, towards the camera
    rgb: Tensor  # [N, 3] uint8 sRGB
    confidence: Tensor  # [N] float32, as in Prediction
    observations: Tracks | None = None

    def __len__(self) -> int:
        return len(self.xyz)


@dataclass(frozen=True)
class Provenance:
    """How a scene came about; report.json holds it as it is."""

    model: str  # name of the weights
    sha256: str
    licence: str
    commercial: bool
    device: str
    dtype: str  # of the aggregator's matrix products
    options: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)  # per stage
    peak_memory: Mapping[str, int] = field(default_factory=dict)  # bytes, up to the stage's end
    content: str = ""  # sha256 of photos, options and weights together


@dataclass(frozen=True)
class Finding:
    """Something that a user should know about the photos or the scene; report.json holds it."""

    kind: str  # a word: see docs/diagnosis.md
    words: str  # what was found, with figures
    files: tuple[str, ...]  # names of the photos concerned, all of them
    command: str  # what to do next: a command, or an action in words


@dataclass(frozen=True, eq=False)
class Refinement:
    """What became of the predicted cameras; report.json holds the two reports as they are."""

    method: str  # "none": the predicted cameras were kept
    predicted: Cameras  # source pixels
    lens: Setup  # the refined cameras with their lenses, as the photos are without undistortion
    report: Mapping[str, Any]
    images: tuple[Mapping[str, Any], ...]  # [S]


@dataclass(frozen=True, eq=False)
class Scene:
    """A finished reconstruction in memory; `formats.export` writes it."""

    photos: tuple[Photo, ...]  # [S]
    images: ImageSet
    prediction: Prediction
    camera_of_image: tuple[int, ...]  # [S] frames with equal numbers share a camera
    tracks: Tracks  # for COLMAP, in source pixels
    rgb: Tensor  # [N, 3] uint8 sRGB of their points
    dense: PointCloud | None  # for points.ply; None: no depth is known, and all of it is 0
    made_by: Provenance
    unreadable: tuple[tuple[str, str], ...] = ()  # (name, reason) of photos left out
    warnings: tuple[str, ...] = ()
    scale: Literal["arbitrary", "metric"] = "arbitrary"
    seen_in: Literal["depth", "image"] = "depth"  # what says that a pixel shows a track's point
    refinement: Refinement | None = None  # None: not asked for
    priors: Mapping[str, Any] = field(default_factory=dict)  # what was given, for report.json
    findings: tuple[Finding, ...] = ()
    windows: Mapping[str, Any] = field(
        default_factory=dict
    )  # see windows.Joined; empty: seen at once
