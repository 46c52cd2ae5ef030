"""The losses right after the cuts that `prune.py --criterion lowest-loss` tried: figure 5 of the paper.

    python reproduce/histogram.py CUT --layers median         # CUT: an --out of that search; also lowest, highest
    python reproduce/histogram.py CUT "learned||DIR" --picture losses.png   # DIR: samples of a recovered cut
"""
import argparse
import json
import math
from pathlib import Path

from chart import COLOURS, Axes
from table import facts_of

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", type=Path)
    parser.add_argument("rows", nargs="*", metavar="NAME|PAPER|DIR", help="cuts to mark, as table.py takes them")
    parser.add_argument("--layers", choices=["lowest", "median", "highest"], help="print the layers of this cut")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    lines = map(json.loads, (args.search / "log.jsonl").read_text().splitlines())
    tried = next(line for line in lines if "losses" in line)
    losses = sorted(loss for loss in tried["losses"] if math.isfinite(loss))
    if args.layers:
        rank = dict(lowest=0, median=len(losses) // 2, highest=-1)[args.layers]
        return print(",".join(map(str, tried["cuts"][tried["losses"].index(losses[rank])])))
    marks = [(name, facts_of(Path(folder))) for name, _, folder in (row.split("|") for row in args.rows)]
    result = lambda facts: f"FID {facts['fid']:.2f}" if "fid" in facts else "diverged"
    marks = sorted((facts["cut_loss"], f"{name}: {result(facts)}") for name, facts in marks if "cut_loss" in facts)
    low, high = min(losses[0], *(x for x, _ in marks)), max(losses[-1], *(x for x, _ in marks))
    width = (high - low) / 60 or 1
    counts = [sum(low + i * width <= loss < low + (i + 1) * width for loss in losses) for i in range(61)]
    axes = Axes(f"Loss right after the cut, of {len(losses):,} cuts, and what some recover to", "loss after the cut",
                "number of cuts", [low, high], [0, max(counts)])
    for i, count in enumerate(counts):
        start, end = axes.x(low + i * width), axes.x(low + (i + 1) * width) - 1
        axes.draw.rectangle([start, axes.y(count), end, axes.y(0)], "#bbccdd")
    for i, (loss, text) in enumerate(marks):
        x, y, colour = axes.x(loss), axes.top + 20 + 30 * i, COLOURS[i % len(COLOURS)]
        axes.draw.line([(x, y), (x, axes.y(0))], colour, 2)
        to_left = x > axes.width * 0.6
        axes.draw.text((x - 8 if to_left else x + 8, y), text, colour, axes.font, anchor="rm" if to_left else "lm")
    axes.image.save(args.picture)

if __name__ == "__main__":
    main()
