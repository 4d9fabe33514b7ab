"""The weights this tool knows: where they come from, what they allow, what size they want.

A table and nothing more; `weights` says what of it is on this machine. Imports no torch.
"""

from dataclasses import dataclass

from vggt_cli.errors import WeightsError
from vggt_cli.scene import Shaping


@dataclass(frozen=True)
class Licence:
    """Terms in plain words; the licence text itself is what binds."""

    name: str
    commercial: bool
    forbids: str


VGGT_NONCOMMERCIAL = Licence("CC BY-NC 4.0", False, "commercial use")
VGGT_COMMERCIAL = Licence(
    "VGGT License v1",
    True,
    "military use and the other uses that its acceptable use policy excludes",
)
OMEGA = Licence(
    "FAIR Noncommercial Research License v1",
    False,
    "anything but noncommercial research, for the weights and for every output made with them",
)
OURS = Licence("Apache-2.0", True, "nothing that Apache-2.0 does not")


@dataclass(frozen=True)
class Entry:
    """One set of weights."""

    name: str
    config: str  # key of networks.CONFIGS
    source: str  # repository on the Hugging Face hub, "" if the weights come with the tool
    files: tuple[str, ...]  # names as published, the one to fetch first
    size: int  # bytes of all values as published
    licence: Licence
    shaping: Shaping  # belongs to the weights: another size runs and is silently worse
    # Frames at once that are still told apart well. VGGT falls off beyond about 100 on streets and
    # 200 around an object; chunks of 120 frames did best for its kin (VGGT-Long, DA3-Streaming).
    window: int = 120
    gated: bool = False  # the repository asks for a login and consent


# Best first: `--model auto` takes the first that is on the machine. Omega leads VGGT in its
# authors' measurements; of its files they find 512 the better one on photos from the wild and
# 416 the one to benchmark with. The text file sees a quarter of the pixels.
CATALOG = (
    Entry(
        "omega-1b-512",
        "omega-1b",
        "facebook/VGGT-Omega",
        ("vggt_omega_1b_512.pt",),
        4_576_239_908,
        OMEGA,
        Shaping("balanced", 512, 16),
        gated=True,
    ),
    Entry(
        "omega-1b-416",
        "omega-1b",
        "facebook/VGGT-Omega",
        ("vggt_omega_1b_416_reproduce.pt",),
        4_576_239_908,
        OMEGA,
        Shaping("balanced", 416, 16),
        gated=True,
    ),
    Entry(
        "vggt-1b",
        "vggt-1b",
        "facebook/VGGT-1B",
        ("model.safetensors", "model.pt"),
        5_026_150_064,
        VGGT_NONCOMMERCIAL,
        Shaping("longer-side", 518, 14),
    ),
    Entry(
        "vggt-1b-commercial",
        "vggt-1b",
        "facebook/VGGT-1B-Commercial",
        ("vggt_1B_commercial.pt", "model.safetensors"),
        5_026_150_064,
        VGGT_COMMERCIAL,
        Shaping("longer-side", 518, 14),
        gated=True,
    ),
    Entry(
        "vggt-1b-tracker",
        "vggt-1b-tracker",
        "facebook/VGGT_tracker_fixed",
        ("model_tracker_fixed_e20.pt",),
        5_026_150_064,
        VGGT_NONCOMMERCIAL,
        Shaping("longer-side", 518, 14),
    ),
    Entry(
        "omega-1b-256-text",
        "omega-1b-text",
        "facebook/VGGT-Omega",
        ("vggt_omega_1b_256_text.pt",),
        5_398_974_756,
        OMEGA,
        Shaping("balanced", 256, 16),
        gated=True,
    ),
    Entry(
        "mini",
        "mini",
        "",
        ("mini.safetensors",),
        0,
        OURS,
        Shaping("balanced", 288, 32),
        window=16,
    ),
)


def entry(name: str) -> Entry:
    """The entry called `name`; WeightsError if there is none."""
    for known in CATALOG:
        if known.name == name:
            return known
    names = ", ".join(known.name for known in CATALOG)
    raise WeightsError(f"unknown weights: {name}", hint=f"known are {names}")


def require_commercial(entry: Entry) -> None:
    """Raises WeightsError if the licence of `entry` forbids commercial use."""
    if entry.licence.commercial:
        return
    allowed = ", ".join(known.name for known in CATALOG if known.licence.commercial)
    raise WeightsError(
        f"weights not licensed for commercial use: {entry.name} ({entry.licence.name})",
        hint=f"use {allowed}, or leave out --require-commercial",
    )
