"""The experiments' tables (markdown) and pictures, from docs/results/*.json alone.

    python reproduce/report.py                  # every table
    python reproduce/report.py space criteria   # these
    python reproduce/report.py --pictures       # docs/space.png, docs/length.png

FD is the Fréchet distance of 500 samples (features of the digit classifier). "a ± b (n)" is the mean and the standard deviation over n
seeds of the recovery; without ±, one seed. A cut's loss is the diffusion loss right after the cut, before any recovery.
"""
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
MODELS = ("dit-tiny", "sit-tiny", "mar-tiny")


def load(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


def recovered(model, kept, steps, mode="masked-kd", **settings) -> list:
    """The Fréchet distances of a cut recovered so, one per seed."""
    plain = dict(model=model, kept=kept, steps=steps, mode=mode, lr=None, sigma=None, source=None) | settings
    return [row["fd"] for row in load("recovered")["rows"] if all(row.get(k) == v for k, v in plain.items())]


def spread(values: list) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def losses(model: str, keep: int, grid=False) -> dict:
    """{kept: loss right after the cut}; grid: only the cuts that keep the same number of each group (1:2, 1:3, 1:4)."""
    found = load("losses")["losses"].get(f"{model} {keep}", {})
    depth = 12
    m = depth // keep
    whole = {" ".join(map(str, c)) for c in itertools.product(*[range(m * g, m * g + m) for g in range(keep)])}
    return {k: v for k, v in found.items() if not grid or k in whole}


def rank_of(kept, scores: dict) -> int:
    """1 for the lowest score."""
    return 1 + sum(v < scores[kept] for v in scores.values())


def choices(model, criterion=None, scheme=None) -> list:
    return [row for row in load("choices")["rows"] if row["model"] == model and criterion in (None, row["criterion"])
            and scheme in (None, row["scheme"])]


def table(header: str, rows: list) -> str:
    names = header.split(" | ")
    return "\n".join(["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *[map(str, row) for row in rows]]])


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


def space() -> str:
    """All 64 cuts of 1:2, dit-tiny: what a longer recovery makes of them."""
    loss, out = losses("dit-tiny", 6, grid=True), []
    lowest = min(loss, key=loss.get)
    by_steps = {steps: {k: v[0] for k in loss if (v := recovered("dit-tiny", k, steps))} for steps in (25, 100, 400)}
    for steps, fd in by_steps.items():
        if len(fd) < 3:
            continue
        ordered = sorted(fd.values())
        correlation = spearmanr([loss[k] for k in fd], list(fd.values()))
        out.append([steps, len(fd), f"{ordered[0]:.2f}", f"{statistics.median(ordered):.2f}", f"{ordered[-1]:.2f}",
                    f"{correlation.statistic:.2f} (p = {correlation.pvalue:.1g})",
                    f"{fd[lowest]:.2f} (rank {rank_of(lowest, fd)})" if lowest in fd else "-"])
    text = table("recovery steps | cuts | best | median | worst | rank correlation with the loss | the lowest loss", out)
    rows = []
    for row in choices("dit-tiny", "learned", "1:2"):
        ranks = [f"{rank_of(row['kept'], fd)} ({fd[row['kept']]:.2f})" if row["kept"] in fd else "-" for fd in by_steps.values()]
        rows.append([row["seed"], row["kept"], rank_of(row["kept"], loss), *ranks])
    return text + "\n\n" + table("search seed | keeps | rank of its loss | rank (FD), 25 steps | 100 steps | 400 steps", rows)


def free() -> str:
    """Free of 1:2: cuts out of all 924, dit-tiny."""
    loss, rows = losses("dit-tiny", 6), []
    ordered, grid = sorted(loss, key=loss.get), losses("dit-tiny", 6, grid=True)
    named = {"lowest of all": ordered[0], "second": ordered[1], "median of all": ordered[462], "highest of all": ordered[-1],
             "lowest of 1:2": min(grid, key=grid.get), "highest of 1:2": max(grid, key=grid.get)}
    for scheme in ("1:2", "3:6", "6:12"):
        named |= {f"learned {scheme}, seed {row['seed']}": row["kept"] for row in choices("dit-tiny", "learned", scheme)}
    for name, kept in named.items():
        rows.append([name, kept, f"{loss[kept]:.3f}", rank_of(kept, loss), *[spread(recovered("dit-tiny", kept, s)) for s in (100, 400, 800)]])
    return table("cut | keeps | loss | its rank of 924 | FD, 100 steps | 400 | 800", rows)


def chosen(model: str, keep=6) -> list:
    """(criterion, scheme, seed, kept) of every choice made for this model, the rivals that need no training among them."""
    found = [(r["criterion"], r["scheme"], r["seed"], r["kept"]) for r in choices(model) if len(r["kept"].split()) == keep]
    return sorted(found, key=lambda r: (r[1] != "1:2", r[0], r[2]))


def criteria(model: str, short=100, long=800) -> str:
    loss, grid = losses(model, 6), losses(model, 6, grid=True)
    rows = []
    for criterion, scheme, seed, kept in chosen(model):
        rows.append([f"{criterion}{'' if seed is None else f', seed {seed}'}", scheme, kept, f"{loss[kept]:.3f}" if kept in loss else "-",
                     spread(recovered(model, kept, short)), spread(recovered(model, kept, long))])
    return table(f"{model}: criterion | scheme | keeps | loss | FD, {short} steps | {long} steps", rows)


def modes() -> str:
    kept, rows = "0 2 4 7 8 11", []
    for mode in ("finetune", "logits-kd", "rep-kd", "masked-kd"):
        along = [row for row in load("recovered")["rows"] if row["kept"] == kept and row["mode"] == mode and row["steps"] == 800 and "at" in row]
        rows.append([mode, spread(recovered("dit-tiny", kept, 100, mode)), *[f"{along[0]['at'][s]:.2f}" if along else "-" for s in ("100", "200", "400", "600")],
                     spread(recovered("dit-tiny", kept, 800, mode))])
    return table("mode | FD, a run of 100 steps | of 800 steps: at 100 | 200 | 400 | 600 | at the end", rows)


TABLES = dict(space=space, free=free, modes=modes) | {f"criteria-{m}": (lambda m=m: criteria(m)) for m in MODELS}

# ---------------------------------------------------------------------------------------------------------------------
# Pictures.

W, H, LEFT, RIGHT, TOP, BOTTOM = 1100, 700, 90, 30, 90, 80
BLUE, RED, GREY, GREEN, ORANGE, PURPLE = "#1f77b4", "#d62728", "#999999", "#2ca02c", "#ff7f0e", "#9467bd"


def font(size):
    return ImageFont.load_default(size)


class Chart:
    """Axes, logarithmic where asked, on a white picture."""

    def __init__(self, title, subtitle, x_name, y_name, x_range, y_range, x_ticks, y_ticks):
        self.image = Image.new("RGB", (W, H), "white")
        self.draw = ImageDraw.Draw(self.image)
        (x0, x1), (y0, y1) = x_range, y_range
        self.x = lambda v: LEFT + (W - LEFT - RIGHT) * math.log(v / x0) / math.log(x1 / x0)
        self.y = lambda v: TOP + (H - TOP - BOTTOM) * math.log(y1 / v) / math.log(y1 / y0)
        self.draw.text((LEFT, 12), title, fill="black", font=font(26))
        self.draw.text((LEFT, 48), subtitle, fill="#555555", font=font(19))
        for v in x_ticks:
            self.draw.line([(self.x(v), TOP), (self.x(v), H - BOTTOM)], fill="#e4e4e4")
            self.draw.text((self.x(v), H - BOTTOM + 8), f"{v:g}", fill="black", font=font(20), anchor="ma")
        for v in y_ticks:
            self.draw.line([(LEFT, self.y(v)), (W - RIGHT, self.y(v))], fill="#e4e4e4")
            self.draw.text((LEFT - 10, self.y(v)), f"{v:g}", fill="black", font=font(20), anchor="rm")
        self.draw.rectangle([LEFT, TOP, W - RIGHT, H - BOTTOM], outline="#888888")
        self.draw.text(((W + LEFT - RIGHT) / 2, H - 38), x_name, fill="black", font=font(22), anchor="ma")
        label = Image.new("RGB", (H - TOP - BOTTOM, 30), "white")
        ImageDraw.Draw(label).text((label.width / 2, 4), y_name, fill="black", font=font(22), anchor="ma")
        self.image.paste(label.rotate(90, expand=True), (4, TOP))

    def dot(self, x, y, colour, r=6, shape="circle", ring=None):
        x, y = self.x(x), self.y(y)
        box = [x - r, y - r, x + r, y + r]
        (self.draw.ellipse if shape == "circle" else self.draw.rectangle)(box, fill=colour, outline="white")
        if ring:
            self.draw.ellipse([x - r - 5, y - r - 5, x + r + 5, y + r + 5], outline=ring, width=3)

    def text(self, x, y, text, colour="black", anchor="lm", dx=12, dy=0):
        self.draw.text((self.x(x) + dx, self.y(y) + dy), text, fill=colour, font=font(19), anchor=anchor)

    def line(self, points, colour, width=3):
        self.draw.line([(self.x(x), self.y(y)) for x, y in points], fill=colour, width=width)

    def save(self, name):
        self.image.save(ROOT / "docs" / name, optimize=True)


def space_picture(steps=100):
    """Recovered distance against the loss right after the cut: all of 1:2, and cuts free of it."""
    loss, grid = losses("dit-tiny", 6), losses("dit-tiny", 6, grid=True)
    fd = {k: v[0] for k in loss if (v := recovered("dit-tiny", k, steps))}
    low, high = min(fd.values()) * 0.85, max(fd.values()) * 1.2
    chart = Chart(f"What becomes of a cut after {steps} steps of recovery", "dit-tiny, 12 layers -> 6; every dot is one cut",
                  "diffusion loss right after the cut (logarithmic)", "Frechet distance after recovery (logarithmic)",
                  (0.15, 2.0), (low, high), (0.2, 0.3, 0.5, 1, 2), [v for v in (0.5, 1, 2, 3, 5, 10, 20, 50) if low < v < high])
    legend = {("4", "11"): (BLUE, "1:2, keeps 4 and 11"), ("4", "10"): (ORANGE, "1:2, keeps 4 and 10"),
              ("5", "11"): (PURPLE, "1:2, keeps 5 and 11"), ("5", "10"): (GREY, "1:2, keeps 5 and 10")}
    for kept, value in fd.items():
        layers = kept.split()
        if kept not in grid:
            chart.dot(loss[kept], value, GREEN, shape="square")
    for kept in [k for k in grid if k in fd]:
        layers = kept.split()
        chart.dot(loss[kept], fd[kept], legend["4" if "4" in layers else "5", "11" if "11" in layers else "10"][0])
    marks = {}
    for row in [row for scheme in ("1:2", "3:6", "6:12") for row in choices("dit-tiny", "learned", scheme)]:
        marks.setdefault(row["kept"], {}).setdefault(row["scheme"], []).append(row["seed"])
    for n, (kept, found) in enumerate((kept, found) for kept, found in marks.items() if kept in fd):
        label = ", ".join(f"{scheme}, {len(seeds)} seed{'s' * (len(seeds) > 1)}" for scheme, seeds in found.items())
        chart.dot(loss[kept], fd[kept], RED, r=7, ring=RED)
        y = chart.y(fd[kept]) + (60, 90, 0, 0, 0)[n]
        chart.draw.line([(chart.x(loss[kept]), chart.y(fd[kept])), (chart.x(loss[kept]) + 14, y)], fill=RED)
        chart.draw.text((chart.x(loss[kept]) + 18, y), f"learned, {label}", fill=RED, font=font(19), anchor="lm")
    for kept, label in ((min(loss, key=loss.get), "lowest loss of all 924"), (min(grid, key=grid.get), "lowest loss of 1:2")):
        if kept in fd:
            chart.dot(loss[kept], fd[kept], "black", r=7)
            chart.text(loss[kept], fd[kept], label, anchor="rm" if kept in grid else "lm", dx=-14 if kept in grid else 14)
    for i, (colour, label) in enumerate([*legend.values(), (GREEN, "free of 1:2"), (RED, "learned (search seeds)")]):
        y = TOP + 22 + 28 * i
        chart.draw.ellipse([LEFT + 16, y - 7, LEFT + 30, y + 7], fill=colour)
        chart.draw.text((LEFT + 40, y), label, fill="black", font=font(19), anchor="lm")
    chart.save("space.png")


def main():
    if "--pictures" in sys.argv:
        return space_picture()
    wanted = [a for a in sys.argv[1:] if not a.startswith("-")] or list(TABLES)
    for name in wanted:
        print(f"\n## {name}\n\n{TABLES[name]()}")


if __name__ == "__main__":
    main()
