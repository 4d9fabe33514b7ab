"""All networks by the name of their configuration."""

from __future__ import annotations

from vggt_cli.models.omega import OmegaConfig, VGGTOmega

Network = VGGTOmega
Config = OmegaConfig

CONFIGS: dict[str, Config] = {
    "omega-1b": OmegaConfig(),
    "omega-1b-text": OmegaConfig(text_head=True),
}


def build(config: Config) -> Network:
    """A fresh network; under torch.device("meta") one without memory, for weights to come."""
    return VGGTOmega(config)
