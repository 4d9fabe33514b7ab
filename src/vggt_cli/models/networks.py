"""All networks by the name of their configuration."""

from __future__ import annotations

from vggt_cli.models.mini import Mini, MiniConfig
from vggt_cli.models.omega import OmegaConfig, VGGTOmega
from vggt_cli.models.vggt import VGGT, VGGTConfig

Network = VGGT | VGGTOmega | Mini
Config = VGGTConfig | OmegaConfig | MiniConfig

CONFIGS: dict[str, Config] = {
    "vggt-1b": VGGTConfig(),
    "vggt-1b-tracker": VGGTConfig(track_position_embedding=True),
    "omega-1b": OmegaConfig(),
    "omega-1b-text": OmegaConfig(text_head=True),
    "mini": MiniConfig(),
}


def build(config: Config) -> Network:
    """A fresh network; under torch.device("meta") one without memory, for weights to come."""
    if isinstance(config, VGGTConfig):
        return VGGT(config)
    if isinstance(config, MiniConfig):
        return Mini(config)
    return VGGTOmega(config)
