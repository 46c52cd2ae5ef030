"""Prints a row for each NAME=DIR: DIR holds samples.json (of sample.py) and fid.json (of fid.py --json).

    python reproduce/table.py teacher=out/sample-teacher student=out/sample
"""
import json
import sys
from pathlib import Path

print("| | model | depth | parameters | images/s | FID | IS | precision | recall | right digit |")
print("|---|---|---|---|---|---|---|---|---|---|")
for argument in sys.argv[1:]:
    name, folder = argument.split("=", 1)
    facts = json.loads((Path(folder) / "samples.json").read_text()) | json.loads((Path(folder) / "fid.json").read_text())
    print(f"| {name} | {facts['model']} | {facts['depth']} | {facts['parameters'] / 1e6:.2f} M | {facts['images_per_s']:.1f} | {facts['fid']:.2f} | "
          f"{facts['is']:.2f} | {facts['precision']:.3f} | {facts['recall']:.3f} | {100 * facts.get('accuracy', float('nan')):.1f} % |")
