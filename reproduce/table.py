"""Prints what was measured as a table, and puts the grids of samples side by side.

    python reproduce/table.py "Digits" "teacher||out/sample-teacher" "student||out/sample" --picture out/demo.png
    python reproduce/table.py "Table 8" "2e-4|207.27 3.73|DIR" "1e-4|194.31 4.10|DIR" --paper "IS FID"

A row is NAME|PAPER|DIR: DIR is an --out of sample.py, with fid.json of fid.py there, and PAPER holds the numbers that
the paper has for it, one for each name in --paper. They are shown beside ImageNet's only: the digits have others.
"""
import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS = {  # key in samples.json or fid.json -> title, format
    "depth": ("layers", "{}"), "parameters": ("parameters", "{:.2f} M"), "images_per_s": ("images/s", "{:.1f}"),
    "speed_up": ("speed-up", "{:.2f} x"), "by_depth": ("by depth alone", "{:.2f} x"),
    "cut_loss": ("loss after the cut", "{:.3f}"), "is": ("IS", "{:.2f}"), "fid": ("FID", "{:.2f}"),
    "sfid": ("sFID", "{:.2f}"), "precision": ("precision", "{:.3f}"), "recall": ("recall", "{:.3f}"),
    "accuracy": ("right digit", "{:.1%}")}

def facts_of(folder: Path) -> dict:
    """What is known of a cell: of its samples, and the loss right after its cut, which prune.py logged above."""
    facts = {}
    for file in (folder / "samples.json", folder / "fid.json"):
        facts |= json.loads(file.read_text()) if file.exists() else {}
    log = next((f / "log.jsonl" for f in folder.parents if (f / "shallow.pt").exists()), None)
    for line in log.read_text().splitlines() if log else []:
        facts["cut_loss"] = json.loads(line).get("calibration_loss")
    if "parameters" in facts:
        facts["parameters"] /= 1e6
    return {k: v for k, v in facts.items() if v is not None}

def picture_of(cells: list) -> Image.Image:
    """The grids of samples, at most four side by side, each under its name."""
    side, across = 360, min(4, len(cells))
    canvas = Image.new("RGB", ((side + 15) * across + 15, (side + 45) * -(-len(cells) // across)), "white")
    for i, (name, facts, folder) in enumerate(cells):
        x, y = 15 + (side + 15) * (i % across), (side + 45) * (i // across)
        canvas.paste(Image.open(folder / "grid.png").convert("RGB").resize((side, side), Image.LANCZOS), (x, y + 32))
        title = f"{name}: {facts['depth']} layers" + (f", FID {facts['fid']:.2f}" if "fid" in facts else "")
        ImageDraw.Draw(canvas).text((x, y + 6), title, fill="black", font=ImageFont.load_default(17))
    return canvas

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("title")
    parser.add_argument("rows", nargs="+", metavar="NAME|PAPER|DIR")
    parser.add_argument("--paper", default="", help="names of the paper's numbers, like 'IS FID'")
    parser.add_argument("--speed-up", action="store_true", help="also how many times as fast as the first row")
    parser.add_argument("--picture", type=Path, help="where the grids go")
    parser.add_argument("--write", type=Path, help="where the table goes, too")
    args = parser.parse_args()
    rows = [row.split("|") for row in args.rows]
    cells = [(name, facts_of(Path(folder)), Path(folder)) for name, _, folder in rows]
    first = cells[0][1]
    for _, facts, _ in cells if args.speed_up else []:
        facts["speed_up"] = facts["images_per_s"] / first["images_per_s"]
        facts["by_depth"] = first["depth"] / facts["depth"]
    shown = [k for k in COLUMNS if any(k in facts for _, facts, _ in cells)]
    beside = args.paper.split() if any("sfid" in facts for _, facts, _ in cells) else []
    lines = [["", *(COLUMNS[k][0] for k in shown), *(f"paper's {k}" for k in beside)]]
    lines.append(["---"] * len(lines[0]))
    for (name, paper, folder), (_, facts, _) in zip(rows, cells):
        missing = "diverged" if (Path(folder).parent / "diverged").exists() else "-"
        own = [COLUMNS[k][1].format(facts[k]) if k in facts else missing for k in shown]
        lines.append([name, *own, *(paper.split() + ["-"] * len(beside))[: len(beside)]])
    text = f"{args.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    print(f"\n{text}")
    if args.write:
        args.write.write_text(text)
    drawn = [cell for cell in cells if (cell[2] / "grid.png").exists()]
    if args.picture and drawn:
        picture_of(drawn).save(args.picture)

if __name__ == "__main__":
    main()
