"""The published sizes, 1.1 to 1.3 billion parameters, with filled weights: minutes, 8 GB.

Run by hand: `pytest -m slow tests/test_full_size.py -s` says seconds and memory.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import FLOAT32_FACTOR, Golden, filled, recorded, shared_fill
from torch import Tensor

from vggt_cli import device
from vggt_cli.models.networks import CONFIGS, build
from vggt_cli.models.omega import VGGTOmega
from vggt_cli.models.vggt import VGGT

pytestmark = pytest.mark.slow
LATER_TRACKS = {"track", "track_iter_1", "track_iter_2", "vis", "conf"}  # float32 cannot tell


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    peak = device.peak_memory(torch.device("cpu")) / 1e9
    print(f"{what}: {time.perf_counter() - start:.1f} s, peak {peak:.1f} GB")


def check(got: Mapping[str, Tensor], golden: Golden) -> None:
    """Fails unless every value is within the reference's own float32 error, times the factor."""
    far = []
    for name, notes in golden.notes["outputs"].items():
        value = got[name].double()
        assert list(value.shape) == notes["shape"], name
        if name in LATER_TRACKS:
            continue
        atol = FLOAT32_FACTOR * notes["float32_vs_float64"]["max_abs"]
        if name in golden.tensors:
            stored = value[:, 1:] if "frame 1 only" in notes.get("stored", "") else value
            off = (stored - golden.tensors[name].double()).abs().max()
            far += [f"{name}: {off:.1e} > {atol:.1e}"] * bool(off > atol)
        far += [f"{name}: {what}" for what in _statistics_off(value, notes, atol)]
    assert not far, "\n".join(far)


def _statistics_off(value: Tensor, notes: Mapping[str, Any], atol: float) -> Iterator[str]:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": torch.mean,
        "std": torch.std,
        "min": torch.min,
        "max": torch.max,
    }
    for what, function in functions.items():
        # Some figures divide by n, some by n - 1.
        slack = atol + (notes[what] / (value.numel() - 1) if what == "std" else 0)
        if abs(function(value) - notes[what]) > slack:
            yield f"{what} {function(value)}, golden {notes[what]}"
    if "sample_flat_indices" in notes:
        samples = value.flatten()[notes["sample_flat_indices"]]
        off = (samples - torch.tensor(notes["sample_values"], dtype=torch.float64)).abs().max()
        if off > atol:
            yield f"samples {off:.1e} > {atol:.1e}"


def test_omega_with_a_billion_parameters_gives_the_golden_outputs(shared: Path) -> None:
    golden = Golden.read(shared / "golden" / "vggt_omega", "full")
    with timed("fill"):
        network = filled(lambda: build(CONFIGS["omega-1b-text"]), shared_fill(shared))
    assert isinstance(network, VGGTOmega)
    with timed("forward"), torch.no_grad(), recorded(network) as calls:
        outputs = network(golden.tensors["images"])
    cached = calls["aggregator"][0].output
    assert outputs.tokens is not None
    assert outputs.text is not None
    got = {
        "camera_and_register_tokens": outputs.tokens,
        "pose_enc": outputs.pose_passes[-1],
        "depth": outputs.depth[..., None],
        "depth_conf": outputs.confidence,
        "text_alignment_embedding": outputs.text,
        "text_alignment_token": calls["text_alignment_head.language_token_norm"][0].output,
        "patch_tokens": calls["aggregator.patch_embed"][0].output,
        **{f"cached_{i}": tokens for i, tokens in cached.items()},
    }
    check(got, golden)


def test_vggt_with_a_billion_parameters_gives_the_golden_outputs(shared: Path) -> None:
    golden = Golden.read(shared / "golden" / "vggt", "full")
    with timed("fill"):
        network = filled(lambda: build(CONFIGS["vggt-1b"]), shared_fill(shared))
    assert isinstance(network, VGGT)
    images = golden.tensors["images"]
    with timed("forward"), torch.no_grad(), recorded(network) as calls:
        cached = network.aggregate(images)
        outputs = network.read(cached, (140, 154))
        followed = network.track(cached, (140, 154), golden.tensors["query_points"])
    fed, change = calls["camera_head.embed_pose"][3], calls["camera_head.pose_branch"][3]
    assert outputs.points is not None
    assert outputs.points_confidence is not None
    got = {
        "pose_raw": fed.inputs[0] + change.output,
        "pose_enc": outputs.pose_passes[-1],
        "depth": outputs.depth[..., None],
        "depth_conf": outputs.confidence,
        "world_points": outputs.points,
        "world_points_conf": outputs.points_confidence,
        "track": followed.xy[-1],
        "vis": followed.visibility,
        "conf": followed.confidence,
        "track_features": calls["track_head.tracker.fmap_norm"][0].inputs[0].movedim(-1, 2),
        "patch_tokens": calls["aggregator.patch_embed"][0].output,
        **{f"pose_enc_{k}": outputs.pose_passes[k] for k in range(3)},
        **{f"track_iter_{k}": followed.xy[k] for k in range(3)},
        **{f"cached_{i}": tokens for i, tokens in cached.items()},
    }
    check(got, golden)
    camera = cached[23][:, :, 0].double() - golden.tensors["cached_23_camera_tokens"]
    assert camera.abs().max() < 2e-5
