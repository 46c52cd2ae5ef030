"""Prints what was measured as a table, and puts the grids of samples side by side.

    python reproduce/table.py out/demo.png teacher=out/sample-teacher student=out/sample

NAME=DIR: an --out of sample.py, where fid.py has left its numbers too: --json DIR/fid.json.
"""
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS = {  # key in samples.json or fid.json: (title, format)
    "depth": ("layers", "{}"),
    "parameters": ("parameters", "{:,}"),
    "images_per_s": ("images/s", "{:.1f}"),
    "cut_loss": ("loss after the cut", "{:.3f}"),
    "is": ("IS", "{:.2f}"),
    "fid": ("FID", "{:.2f}"),
    "sfid": ("sFID", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "accuracy": ("right digit", "{:.1%}"),
}


def markdown(names, lines):
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def facts_of(samples: Path):
    """What sample.py and fid.py wrote about these samples."""
    facts = {}
    for name in ("samples.json", "fid.json"):
        if (samples / name).exists():
            facts |= json.loads((samples / name).read_text())
    return facts


def show(cells, paper=()):
    """cells: (name, facts, the paper's numbers). The columns are those that some cell has."""
    known = {key for _, facts, _ in cells for key in facts}
    columns = {key: column for key, column in COLUMNS.items() if key in known}
    lines = []
    for name, facts, numbers in cells:
        line = [name]
        for key, (_, form) in columns.items():
            line.append(form.format(facts[key]) if key in facts else facts.get("missing", "-"))
        lines.append(line + numbers)
    titles = [title for title, _ in columns.values()]
    if all(facts.get("features") == "digits" for _, facts, _ in cells):
        titles = [title.replace("FID", "FD") for title in titles]  # FID is Inception's alone
    return markdown(["", *titles, *(f"paper's {name}" for name in paper)], lines)


def side_by_side(grids, path, side=360):
    """The grids of samples, each under its title. grids: (title, folder)."""
    canvas = Image.new("RGB", ((side + 15) * len(grids) + 15, side + 45), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, folder) in enumerate(grids):
        x = 15 + (side + 15) * i
        grid = Image.open(folder / "grid.png").convert("RGB")
        canvas.paste(grid.resize((side, side), Image.LANCZOS), (x, 32))
        draw.text((x, 6), title, "black", ImageFont.load_default(17))
    canvas.save(path)


def main():
    picture, *arguments = sys.argv[1:] or ["-h"]
    if picture.startswith("-"):
        sys.exit(__doc__)
    cells = []
    grids = []
    for argument in arguments:
        name, folder = argument.split("=")
        facts = facts_of(Path(folder))
        cells.append((name, facts, []))
        distance = "FD" if facts["features"] == "digits" else "FID"
        grids.append((f"{name}: {facts['depth']} layers, {distance} {facts['fid']:.2f}", Path(folder)))
    print(show(cells))
    side_by_side(grids, picture)


if __name__ == "__main__":
    main()
