"""The papers' claims in miniature: variants of a small network, trained alike and measured.

python benchmarks/ablation.py [--steps N] [--seeds N] [--jobs N] [--root FOLDER]

Writes docs/ablation.md, docs/ablation.png and benchmarks/results/ablation.json under the root.
Finished runs stay in the last, so a command that was stopped goes on. Batches are rendered once
per seed into runs/ablation, which may be deleted afterwards.
"""

import argparse
import copy
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_report import FIGURES, report
from ablation_variants import SMALL, VARIANTS, Small, Variant, build, bundled, kept_bytes
from common import circumstances, write
from torch import nn

from vggt_cli.geometry import compose, decode_pose, invert
from vggt_cli.learning import losses, synthetic
from vggt_cli.learning.evaluate import evaluate
from vggt_cli.learning.losses import Truth
from vggt_cli.learning.objectives import Batch, Teacher, objective
from vggt_cli.learning.stream import Data, Stream, seed_of
from vggt_cli.learning.train import TrainConfig, follow, groups, schedule
from vggt_cli.models.mini import MiniConfig

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
Run = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    steps: int = 900  # of about 0.11 seconds: all runs take 35 minutes of two free cores
    pixels: int = 80  # height and width
    spread: float = 0.4  # of the cameras, in training and in the measure
    frames: tuple[int, ...] = (2, 3, 4)  # of a sequence in training; measured with the most
    batch_frames: int = 8
    held_out: int = 24  # scenes that are measured
    config: MiniConfig = SMALL

    def stream(self, seed: int) -> Stream:
        """The batches of all runs of a seed."""
        data = Data(
            frames=self.frames,
            batch_frames=self.batch_frames,
            pixels=self.pixels,
            aspects=(1.0,),
            near=self.spread,
            near_steps=10**9,  # the spread stays what it is
            seed=seed,
        )
        return Stream(data, self.config.patch_size, CPU)

    def listed(self) -> dict[str, Any]:
        """The first held-out scenes, as these networks see them."""
        listed = json.loads((bundled() / "heldout.json").read_text())
        size = (self.pixels, self.pixels)
        seeds = listed["seeds"][: self.held_out]
        return {"seeds": seeds, "frames": [max(self.frames)], "size": size, "spread": self.spread}


def render(seed: int, setting: Setting, folder: Path) -> Path:
    """The file with all batches of a seed; rendered unless it is there."""
    torch.set_num_threads(1)
    path = folder / f"batches-{seed}-{seed_of(*map(ord, repr(setting)))}.pt"
    if not path.exists():
        stream = setting.stream(seed)
        batches = (stream[step] for step in range(setting.steps))
        kept = [((b.pixels * 255).round().to(torch.uint8), *b.truth) for b in batches]
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        torch.save(kept, draft)
        draft.replace(path)
    return path


def batches(path: Path) -> Iterator[Batch]:
    """What `render` has written, with the pixels that it had: they have eight bits."""
    for pixels, *truth in torch.load(path, mmap=True):  # processes share the pages
        yield Batch(pixels / 255, Truth(*truth))


def train(
    network: Small, teacher: Teacher, path: Path, variant: Variant, steps: int
) -> tuple[Small, Teacher]:
    """The moving averages of network and teacher after such steps as `vggt train` makes."""
    config = TrainConfig(Path(), steps=steps)
    averages = copy.deepcopy(network), copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(groups(network, teacher, config), betas=(0.9, 0.95))
    for step, batch in enumerate(batches(path)):
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * config.learning_rate * schedule(step, config)
        loss, _ = objective(network, teacher, batch, variant.weights)
        optimizer.zero_grad()
        loss.backward()
        norms = [
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            for part in (*network.children(), teacher)
        ]
        if torch.stack(norms).isfinite().all():
            optimizer.step()
            follow(averages[0], network, step)
            follow(averages[1], teacher, step)
    return averages


def run(variant: Variant, seed: int, setting: Setting, path: Path) -> Run:
    """One training and its figures."""
    torch.set_num_threads(1)
    network, teacher = build(variant, setting.config, seed)
    began = time.process_time()  # of one thread, so others on the machine do not count
    trained, taught = train(network, teacher, path, variant, setting.steps)
    minutes = (time.process_time() - began) / 60
    rows = {str(row["prediction"]): row for row in evaluate(trained, setting.listed())}
    figures = {way: {name: row[name] for name in FIGURES} for way, row in rows.items()}
    done: Run = {
        "variant": variant.name,
        "seed": seed,
        "steps": setting.steps,
        "minutes": round(minutes, 2),
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "megabytes": round(kept_bytes(network) / 1e6, 1),
        "figures": figures["network"],
        "constant": figures["constant"],
        **circumstances(),
    }
    if variant.name == "baseline":
        done["points"] = point_errors(trained, taught, setting)
    return done


@torch.inference_mode()
def point_errors(network: Small, teacher: Teacher, setting: Setting) -> dict[str, float]:
    """Mean distance of points to the true ones, both of depth and camera and of the point layer.

    At the middles of patches, in units of the mean distance of the scene's points to the first
    camera, after the medians of the distances have been made equal.
    """
    listed, errors = setting.listed(), {"depth and camera": 0.0, "point layer": 0.0}
    for seed in listed["seeds"]:
        sample = synthetic.sample(
            seed, synthetic.Path(listed["frames"][0], listed["size"], setting.spread)
        )
        pixels = synthetic.photographed(torch.Generator().manual_seed(seed), sample.pixels)
        cameras = sample.cameras
        parts = (cameras.extrinsics, cameras.intrinsics, sample.depth, sample.valid)
        truth, _ = losses.normalize(Truth(*(x[None] for x in parts)))
        seen = network.aggregate(pixels[None])
        outputs = network.read(seen)
        extrinsics, lenses = decode_pose(outputs.pose_passes[-1], (setting.pixels, setting.pixels))
        extrinsics = compose(extrinsics, invert(extrinsics[:, :1]).expand_as(extrinsics))
        said = Truth(extrinsics, lenses, outputs.depth, truth.valid)
        patch = setting.config.patch_size
        true, valid = losses.patch_points(truth, patch)
        patches = seen.layers[-1][:, :, 1 + network.config.registers :]
        found = {
            "depth and camera": losses.patch_points(said, patch)[0],
            "point layer": teacher.points(patches).unflatten(2, true.shape[2:4]),
        }
        for way, points in found.items():
            a, b = points[valid], true[valid]
            scale = b.norm(dim=-1).median() / a.norm(dim=-1).median()
            errors[way] += float((scale * a - b).norm(dim=-1).mean()) / len(listed["seeds"])
    return errors


def ablate(
    variants: Sequence[Variant], seeds: int, setting: Setting, jobs: int, root: Path
) -> list[Run]:
    """All runs, those that are already in the results file as they stand there."""
    folder, numbers = root / "benchmarks/results", json.loads(json.dumps(asdict(setting)))
    file, runs = folder / "ablation.json", []
    if file.exists():
        runs = json.loads(file.read_text())["figures"]
        if any(not _fits(done["setting"], numbers) for done in runs):
            raise SystemExit(f"runs of another setting: {file}\ntake another --root, or remove it")
    there = {(done["variant"], done["seed"]) for done in runs}
    wanted = [(v, s) for s in range(seeds) for v in variants if (v.name, s) not in there]
    # A forked process may inherit locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        missing = sorted({s for _, s in wanted})
        made = {s: pool.submit(render, s, setting, root / "runs/ablation") for s in missing}
        files = {s: future.result() for s, future in made.items()}
        futures = [pool.submit(run, v, s, setting, files[s]) for v, s in wanted]
        for count, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)  # the next call goes on
            done = future.result() | {"setting": numbers}
            runs.append(done)
            write("ablation", runs, folder)
            words = f"{done['variant']}, seed {done['seed']}: {done['minutes']} min"
            print(f"{count} of {len(wanted)}: {words}", flush=True)
    return runs


def _fits(made: Any, now: Any) -> bool:
    """Whether numbers of old runs are those of now; a network may have got others since."""
    if isinstance(made, dict):
        return all(_fits(value, now.get(key)) for key, value in made.items())
    return bool(made == now)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--root", type=Path, default=ROOT, help="where results and docs go")
    options = parser.parse_args(arguments)
    setting = Setting(steps=options.steps)
    runs = ablate(VARIANTS, options.seeds, setting, options.jobs, options.root)
    print(report(runs, {v.name: v.beside for v in VARIANTS}, options.root / "docs"))


if __name__ == "__main__":
    main()
