"""A network that knows a room: true depth and poses with what real networks add to them."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from disturb import generator
from torch import Tensor
from torch.nn import functional as F

from vggt_cli.geometry import compose, from_first_camera, invert, pixel_centers, unproject
from vggt_cli.scene import Cameras, ImageSet, Prediction

ROOM = torch.tensor([12.0, 3.0, 9.0])  # half its sides, metres
FREQUENCIES = 2.0 * torch.randn(6, 16, generator=generator(5))


@dataclass(frozen=True)
class StandIn:
    """Frames on laps around a room, looking ahead and outwards; frame i is called str(i)."""

    count: int
    lap: int = 1000  # frames
    size: tuple[int, int] = (12, 16)
    turn: float = 0.05  # degrees that the cameras of a window turn away, each from the one before
    stretch: float = 0.002  # and how much longer or shorter the world becomes
    rough: float = 0.01  # noise of depth, of itself
    wrong: float = 0.05  # share of pixels with any depth
    tokens: bool = True

    @cached_property
    def cameras(self) -> Cameras:
        """The truth, in metres."""
        H, W = self.size
        angle = 2 * math.pi * torch.arange(self.count).double() / self.lap
        radius = 6 + 0.5 * torch.sin(3 * angle)
        height = 0.3 * torch.sin(5 * angle)
        center = torch.stack([radius * angle.cos(), height, radius * angle.sin()], -1)
        ahead = torch.stack([-angle.sin(), 0 * angle, angle.cos()], -1)
        out = torch.stack([angle.cos(), 0.1 * torch.sin(2 * angle), angle.sin()], -1)
        z = F.normalize(0.5 * ahead + out, dim=-1)
        down = torch.tensor([0.0, 1.0, 0.0]).double().expand_as(z)
        x = F.normalize(torch.linalg.cross(down, z), dim=-1)
        rotation = torch.stack([x, torch.linalg.cross(z, x), z], -2)
        extrinsics = torch.cat([rotation, -rotation @ center[..., None]], -1)
        k = torch.tensor([[0.8 * W, 0, W / 2], [0, 0.8 * W, H / 2], [0, 0, 1]]).double()
        size = torch.tensor([self.size]).expand(self.count, 2)
        return Cameras(extrinsics, k.expand(self.count, 3, 3), size)

    def images(self, frames: list[int]) -> ImageSet:
        """Frames that show nothing but their names; without tokens patterned walls."""
        n, (H, W) = len(frames), self.size
        names = tuple(str(frame) for frame in frames)
        identity = torch.eye(3).double().expand(n, 3, 3)
        valid = torch.ones(n, H, W, dtype=torch.bool)
        source_size = torch.tensor([self.size]).expand(n, 2)
        pixels = torch.zeros(n, 3, H, W)
        if not self.tokens:
            here = self.cameras[frames]
            walls = unproject(self.depth(here), here.intrinsics, here.extrinsics)
            shades = (0.2 * walls @ FREQUENCIES[:3, :3].double()).sin()
            pixels = ((127.5 + 127.5 * shades).round() / 255).movedim(-1, 1).float()
        return ImageSet(names, pixels, valid, identity, source_size)

    def depth(self, cameras: Cameras) -> Tensor:
        """[S, H, W] z-depth of the walls."""
        xy = pixel_centers(self.size, cameras.intrinsics).flatten(0, 1)
        k = cameras.intrinsics[0]
        rays = torch.cat([(xy - k[:2, 2]) / k[0, 0], torch.ones(len(xy), 1).double()], -1)
        direction = rays @ cameras.extrinsics[..., :3]  # R^T of each, on rows
        walls = direction.sign() * ROOM.double()
        z = ((walls - cameras.centers[:, None]) / direction).amin(-1)
        depth: Tensor = z.unflatten(1, self.size)
        return depth

    def __call__(self, images: ImageSet) -> Prediction:
        """What a network would say of these frames, seen together: the world is the first's."""
        frames = [int(name) for name in images.names]
        random = generator(1 + frames[0] + 100_003 * len(frames))

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        n, cameras = len(frames), self.cameras[frames]
        depth = self.depth(cameras)
        here = from_first_camera(Prediction(cameras, depth, torch.ones_like(depth))).cameras
        to_next = compose(here.extrinsics[1:], invert(here.extrinsics[:-1]))
        turns = _turns(noise(n - 1, 3) * math.radians(self.turn))
        length = torch.exp(0.3 * noise(1) + torch.cumsum(self.stretch * noise(n), 0))  # [n]
        extrinsics = [here.extrinsics[0]]
        for step, turn, unit in zip(to_next, turns, length, strict=False):
            bent = torch.cat([turn @ step[:, :3], unit * step[:, 3:]], -1)
            extrinsics.append(compose(bent, extrinsics[-1]))
        depth = depth * length[:, None, None] * (1 + self.rough * noise(*depth.shape))
        wrong = torch.rand(depth.shape, generator=random) < self.wrong
        depth = torch.where(wrong, depth * (1 + 2 * noise(*depth.shape).abs()), depth)
        confidence = 2 + noise(*depth.shape).abs()
        moved = replace(cameras, extrinsics=torch.stack(extrinsics).float())
        said = replace(moved, intrinsics=cameras.intrinsics.float())
        tokens = self._tokens(cameras, noise(n, 3, 32)) if self.tokens else None
        return Prediction(said, depth.float(), confidence.float(), tokens)

    def _tokens(self, cameras: Cameras, noise: Tensor) -> Tensor:
        place = torch.cat([0.3 * cameras.centers, cameras.extrinsics[:, 2, :3]], -1).float()
        waves = place @ FREQUENCIES
        said = torch.cat([waves.sin(), waves.cos()], -1)
        return said[:, None] + 0.2 * noise.float()


def flawless(count: int, lap: int = 1000, tokens: bool = True) -> StandIn:
    """One that makes no mistake."""
    return StandIn(count, lap, turn=0, stretch=0, rough=0, wrong=0, tokens=tokens)


def _turns(vectors: Tensor) -> Tensor:
    """Rotations [n, 3, 3] by the angles and axes of `vectors` [n, 3]."""
    x, y, z = vectors.unbind(-1)
    none = torch.zeros_like(x)
    rows = [[none, -z, y], [z, none, -x], [-y, x, none]]
    return torch.matrix_exp(torch.stack([torch.stack(row, -1) for row in rows], -2))
