"""Prints a row for each NAME=DIR, and puts their grids side by side: DIR is an --out of sample.py with a fid.json of fid.py --json.

    python reproduce/table.py out/demo.png teacher=out/sample-teacher student=out/sample
"""
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

picture, *rows = sys.argv[1:]
grids = []
print("| | model | depth | parameters | images/s | FID | IS | precision | recall | right digit |")
print("|---|---|---|---|---|---|---|---|---|---|")
for row in rows:
    name, folder = row.split("=", 1)
    facts = json.loads((Path(folder) / "samples.json").read_text()) | json.loads((Path(folder) / "fid.json").read_text())
    print(f"| {name} | {facts['model']} | {facts['depth']} | {facts['parameters'] / 1e6:.2f} M | {facts['images_per_s']:.1f} | {facts['fid']:.2f} | "
          f"{facts['is']:.2f} | {facts['precision']:.3f} | {facts['recall']:.3f} | {100 * facts['accuracy']:.1f} % |")
    grids.append((f"{name}: {facts['depth']} layers, FID {facts['fid']:.2f}", Image.open(Path(folder) / "grid.png").resize((360, 360), Image.LANCZOS)))
canvas = Image.new("RGB", (375 * len(grids) + 15, 400), "white")
for i, (title, grid) in enumerate(grids):
    canvas.paste(grid, (15 + 375 * i, 30))
    ImageDraw.Draw(canvas).text((15 + 375 * i, 10), title, fill="black")
canvas.save(picture)
