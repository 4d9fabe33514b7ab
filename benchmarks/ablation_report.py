"""What the runs of ablation.py say: docs/ablation.md with its tables, and the plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.special import stdtrit

Run = Mapping[str, Any]

# Each figure's unit and whether more of it is better.
FIGURES = {"rotation": ("°", False), "direction": ("°", False), "AUC@30": ("%", True)}
FIGURES |= {"AbsRel": ("", False)}

TEMPLATE = Path(__file__).with_name("ablation_template.md")


class Difference(NamedTuple):
    """Of a figure between two networks, over seeds."""

    each: list[float]
    mean: float
    reach: float  # half of the 95 % interval; NaN of a single seed

    @classmethod
    def of(cls, values: Mapping[int, float], others: Mapping[int, float]) -> "Difference":
        """That of the seeds which both have."""
        each = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
        n, reach = len(each), math.nan
        if n > 1:
            reach = float(stdtrit(n - 1, 0.975)) * statistics.stdev(each) / math.sqrt(n)
        return cls(each, statistics.mean(each), reach)

    def words(self, digits: int, more_is_better: bool) -> str:
        """The difference, its interval and what it means."""
        if math.isnan(self.reach):
            return f"{self.mean:+.{digits}f} (one seed)"
        verdict = "better" if (self.mean > 0) == more_is_better else "worse"
        if abs(self.mean) <= self.reach:
            verdict = "no effect seen"
        return f"{self.mean:+.{digits}f} ± {self.reach:.{digits}f} {verdict}"


def report(runs: Sequence[Run], beside: Mapping[str, str], folder: Path) -> Path:
    """FOLDER/ablation.md, and beside it the plot.

    beside: by name of a variant, in the order of the rows, the one to compare it with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in beside if any(run["variant"] == name for run in runs)]
    found = {
        name: {figure: _difference(runs, name, beside[name], figure) for figure in FIGURES}
        for name in names
        if name != beside[name] and beside[name] in names
    }
    plot(found, beside, folder / "ablation.png")
    setting, seeds = runs[0]["setting"], len({run["seed"] for run in runs})
    config = setting["config"]
    differences = [
        [name, beside[name], *(d.words(_digits(f), FIGURES[f][1]) for f, d in row.items())]
        for name, row in found.items()
    ]
    intervals = len(found) * len(FIGURES)
    words = {
        "pairs": config["depth"],
        "width": config["embed_dim"],
        "commit": ", ".join(sorted({run["commit"] for run in runs})),
        "seeds": seeds,
        "runs": _table(["", "trained", "MB kept", "minutes", *FIGURES], _rows(runs, names)),
        "differences": _table(["", "beside", *FIGURES], differences),
        "points": _points(runs),
        "intervals": intervals,
        "chance": round(0.05 * intervals),
        "parameters_per_register": 2 * config["embed_dim"],
    }
    frames = ", ".join(map(str, setting["frames"]))
    path = folder / "ablation.md"
    text = TEMPLATE.read_text(encoding="utf-8").format(**{**setting, "frames": frames, **words})
    path.write_text(text, encoding="utf-8")
    return path


def _difference(runs: Sequence[Run], name: str, other: str, figure: str) -> Difference:
    values, others = (
        {run["seed"]: run["figures"][figure] for run in runs if run["variant"] == variant}
        for variant in (name, other)
    )
    return Difference.of(values, others)


def _digits(figure: str) -> int:
    return 1 if FIGURES[figure][0] else 3


def _rows(runs: Sequence[Run], names: Sequence[str]) -> list[list[str]]:
    """Means over the seeds of each variant, and the constant prediction."""
    rows = []
    for name in names:
        own = [run for run in runs if run["variant"] == name]
        minutes, size = (
            statistics.mean(run[key] for run in own) for key in ("minutes", "megabytes")
        )
        head = [name, f"{own[0]['parameters']:,}", f"{size:.1f}", f"{minutes:.1f}"]
        rows.append(head + _means([run["figures"] for run in own]))
    return [*rows, ["constant", "", "", "", *_means([runs[0]["constant"]])]]


def _means(figures: Sequence[Mapping[str, float]]) -> list[str]:
    return [f"{statistics.mean(row[f] for row in figures):.{_digits(f)}f}" for f in FIGURES]


def _points(runs: Sequence[Run]) -> str:
    """The table of the baseline's two ways to points."""
    both = {run["seed"]: run["points"] for run in runs if "points" in run}
    ways = {way: {s: row[way] for s, row in both.items()} for row in both.values() for way in row}
    rows = [[way, f"{statistics.mean(values.values()):.3f}"] for way, values in ways.items()]
    unprojected, layer = ways.values()
    rows.append(["difference", Difference.of(unprojected, layer).words(3, False)])
    return _table(["points from", "error"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(
    found: Mapping[str, Mapping[str, Difference]], beside: Mapping[str, str], path: Path
) -> None:
    """A panel per figure: dots are seeds, bars the intervals; blue is better, red worse."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (14.0, 1.2 + 0.36 * len(found))
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(FIGURES), sharey=True, squeeze=False)[0]
    for panel, (name, (unit, more_is_better)) in zip(panels, FIGURES.items(), strict=True):
        for row, differences in enumerate(found.values()):
            d = differences[name]
            color = "tab:blue" if (d.mean > 0) == more_is_better else "tab:red"
            if not abs(d.mean) > d.reach:
                color = "gray"
            if not math.isnan(d.reach):
                panel.plot([d.mean - d.reach, d.mean + d.reach], [row, row], color=color)
            panel.plot(d.each, [row] * len(d.each), ".", color=color, alpha=0.5)
            panel.plot(d.mean, row, "|", color=color, markersize=12)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(f"{name}: {'more' if more_is_better else 'less'} is better")
        panel.set_xlabel(f"difference{f' [{unit}]' if unit else ''}")
        _scale(panel, [x for row in found.values() for x in row[name].each])
    labels = [n if beside[n] == "baseline" else f"{n}\n(to {beside[n]})" for n in found]
    panels[0].set_yticks(range(len(found)), labels)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=100)


def _scale(panel: Any, values: Sequence[float]) -> None:
    """Keeps the axis to what the seeds say: a wide interval may leave it."""
    reach = 1.3 * max(map(abs, values), default=1.0) or 1.0
    panel.set_xlim(-reach, reach)
