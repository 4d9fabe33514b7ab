"""What a run tells while it goes: CSV files, TensorBoard, pictures of what the network sees."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from vggt_cli.device import exact_convolutions
from vggt_cli.learning import synthetic
from vggt_cli.learning.evaluate import evaluate
from vggt_cli.learning.synthetic import Sample
from vggt_cli.models.networks import Network

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

SEEDS = tuple(range(900_000, 900_008))  # scenes to look at: neither training's nor heldout.json's


class Journal:
    """The tables, curves and pictures in a run's folder, of steps up to `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        for table in folder.glob("*.csv"):
            _cut(table, step)
        self.curves = _curves(folder / "tensorboard", step)

    def write(self, table: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a row to TABLE.csv, whose columns its first row fixed, and points to the curves."""
        path = self.folder / f"{table}.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.6g}" for value in values.values())])
        if self.curves:
            for name, value in values.items():
                self.curves.add_scalar(f"{table}/{name}", value, step)

    def look(self, network: Network, step: int, frames: int, size: tuple[int, int]) -> None:
        """Measures `network` on held-out scenes: validation.csv, and a picture of the first."""
        listed = {"seeds": SEEDS, "frames": [frames], "size": size, "spread": 1.0}
        row = next(row for row in evaluate(network, listed) if row["prediction"] == "network")
        self.write("validation", step, {k: v for k, v in row.items() if isinstance(v, float)})
        pixels = picture(network, synthetic.sample(SEEDS[0], synthetic.Path(frames, size)))
        folder = self.folder / "pictures"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{step:07d}.png")
        if self.curves:
            self.curves.add_image("held-out scene", pixels.numpy(), step, dataformats="HWC")

    def close(self) -> None:
        """The end of it."""
        if self.curves:
            self.curves.close()


def picture(network: Network, sample: Sample) -> Tensor:
    """[4 H, S W, 3] uint8: photos, nearness as it is and as `network` says, its confidence.

    Nearness is 1 / depth, the predicted brought to the true one's median; brighter is nearer.
    """
    device = next(network.parameters()).device
    with torch.inference_mode(), exact_convolutions():
        outputs = network(sample.pixels[None].to(device))
    depth, confidence = outputs.depth[0].float().cpu(), outputs.confidence[0].float().cpu()
    near = torch.where(sample.valid, 1 / sample.depth, 0)
    said = 1 / depth
    said = said * (near[sample.valid].median() / said[sample.valid].median())
    brightest = near.flatten().quantile(0.98)
    doubt = confidence.log() / confidence.log().max().clamp(min=1e-6)
    gray = torch.stack([near / brightest, said / brightest, doubt])  # [3, S, H, W]
    rows = torch.cat([sample.pixels[None], gray[:, :, None].expand(-1, -1, 3, -1, -1)])
    beside = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # [4 H, S W, 3]
    return (beside.clamp(0, 1) * 255).round().to(torch.uint8)


def _cut(table: Path, step: int) -> None:
    """Leaves out the rows after `step`: those of work that was lost."""
    rows = list(csv.reader(io.StringIO(table.read_text(encoding="utf-8"))))
    kept = rows[:1] + [row for row in rows[1:] if int(row[0]) <= step]
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(kept)


def _curves(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("metrics go to CSV files alone; for TensorBoard: pip install 'vggt-cli[train]'")
        return None
    return SummaryWriter(folder, purge_step=step + 1)
