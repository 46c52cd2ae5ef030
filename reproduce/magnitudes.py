"""How large hidden states are: a picture as in figure 8 of the paper, of a teacher and its student, layer by layer.

    python reproduce/magnitudes.py --student out/distill/student.pt --out out/magnitudes.png

Top: the least and the largest element and the standard deviation of the layers' outputs, over 64 samples of fixed
noise and times. Bottom: the largest distance of an element from its sample's mean, in standard deviations of that
sample. What lies beyond 2 (the table says how much does) is masked in L_Rep.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from chart import COLOURS, Axes
from distill import HiddenStates, load_teacher
from extract_latents import Batches, Latents
from model import load_model

@torch.no_grad()
def statistics_of(net, latents) -> list:
    """Per layer: std, min, max, the largest |h - mean| in standard deviations of its sample, the share beyond 2."""
    device = next(net.parameters()).device
    layers = list(range(len(net.layers())))
    hidden, objective = HiddenStates(net, layers), net.objective()
    x, y, noise = next(iter(Batches(latents, min(64, len(latents)), 1, seed=2025, device=device)(0)))
    objective.predict(net, objective.make_batch(x, y, noise))
    rows = []
    for h in hidden.take():  # (B, T, D)
        h = h.float()
        variance, mean = torch.var_mean(h, dim=(1, 2), keepdim=True)
        far = (h - mean).abs() / variance.sqrt()
        values = dict(std=h.std(), min=h.min(), max=h.max(), largest=far.max(), beyond=(far >= 2).float().mean())
        rows.append({k: round(v.item(), 4) for k, v in values.items()})
    return rows

def picture_of(nets: dict) -> Image.Image:
    """nets: {title: rows of statistics_of}."""
    places = {title: [(i + 1) / len(rows) for i in range(len(rows))] for title, rows in nets.items()}
    every = [row for rows in nets.values() for row in rows]
    xs, x_name = [0, 1], "depth of the layer, as a share of the network"
    top = Axes("Hidden states: least and largest element, and +- one standard deviation", x_name, "element of h", xs,
               [v for row in every for v in (row["min"], row["max"])])
    bottom = Axes("The largest element, in standard deviations of its sample", x_name, "|h - mean| / std", xs,
                  [0, *(row["largest"] for row in every)])
    for (title, rows), colour in zip(nets.items(), COLOURS):
        for key in ("min", "max"):
            top.line([(x, row[key]) for x, row in zip(places[title], rows)], colour)
        for sign in (-1, 1):
            top.line([(x, sign * row["std"]) for x, row in zip(places[title], rows)], colour, dots=False)
        bottom.line([(x, row["largest"]) for x, row in zip(places[title], rows)], colour)
    bottom.line([(x, 2) for x in xs], "#888888", dots=False)
    bottom.draw.text((bottom.x(0), bottom.y(2) - 4), "masked above 2", "#888888", bottom.font, anchor="ls")
    for axes in (top, bottom):
        axes.legend(nets, COLOURS)
    canvas = Image.new("RGB", (top.width, 2 * top.height), "white")
    for i, axes in enumerate((top, bottom)):
        canvas.paste(axes.image, (0, i * top.height))
    return canvas

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="out/distill/student.pt")
    parser.add_argument("--teacher", help="default: the network that the student was cut from")
    parser.add_argument("--latents", default="out/latents")
    parser.add_argument("--out", type=Path, default=Path("out/magnitudes.png"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.mode = "masked-kd"
    net, config = load_model(None, args.student, args.device)
    teacher, latents = load_teacher(args, net, config, args.device), Latents(args.latents)
    found = {f"{title}, {len(n.layers())} layers": statistics_of(n, latents)
             for title, n in (("teacher", teacher), ("student", net))}
    for title, rows in found.items():
        print(f"\n{title}\n\n| layer | std | min | max | largest, in std | beyond 2 std |\n|---|---|---|---|---|---|")
        for i, row in enumerate(rows):
            print("| {} | {std:.3f} | {min:.2f} | {max:.2f} | {largest:.1f} | {beyond:.1%} |".format(i, **row))
    picture_of(found).save(args.out)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwrote {args.out} and {args.out.with_suffix('.json')}")

if __name__ == "__main__":
    main()
