"""Networks of the published build, small enough for a test, and a machine without weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from vggt_cli.models import checkpoint, networks, store
from vggt_cli.models.networks import Config
from vggt_cli.models.omega import OmegaConfig
from vggt_cli.models.tracker import TrackConfig
from vggt_cli.models.vggt import VGGTConfig

OMEGA = OmegaConfig(
    embed_dim=32,
    heads=2,
    depth=2,
    registers=2,
    register_blocks=(1,),
    cached_layers=(0, 0, 1, 1),
    head_heads=2,
    head_depth=1,
    features=16,
    level_channels=(8, 8, 8, 8),
    encoder_depth=1,
    storage_tokens=1,
)
VGGT = VGGTConfig(
    trained_grid=3,
    embed_dim=32,
    heads=2,
    encoder_depth=1,
    encoder_registers=1,
    depth=2,
    registers=2,
    cached_layers=(0, 0, 1, 1),
    camera_heads=2,
    camera_depth=1,
    features=16,
    level_channels=(8, 8, 8, 8),
    tracker=TrackConfig(width=16, hidden=16, heads=2, depth=1, virtual_tracks=2, levels=2),
)
CONFIGS: dict[str, Config] = {
    "omega-1b": OMEGA,
    "omega-1b-text": replace(OMEGA, text_head=True),
    "vggt-1b": VGGT,
    "vggt-1b-tracker": replace(VGGT, track_position_embedding=True),
    "mini": replace(OMEGA, registers=3),
}


def install(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Puts the small networks in place of the real ones, and empty caches under `folder`."""
    patch.setattr(checkpoint, "CONFIGS", CONFIGS)
    patch.setattr(store, "bundled", lambda: None)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setenv("VGGT_HOME", str(folder / "home"))


def state(config: str) -> dict[str, Tensor]:
    """Fresh values for every tensor of a small network, the same in every test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = networks.build(CONFIGS[config]).state_dict()
        return {key: torch.rand_like(value) for key, value in values.items()}


def saved(path: Path, config: str = "omega-1b") -> Path:
    """A file with a small network, of the kind that its name says."""
    if path.suffix == ".safetensors":
        save_file(state(config), path)
    else:
        torch.save(state(config), path)
    return path
