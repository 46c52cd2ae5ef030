"""Peak memory of loading DiT-XL: a child process writes a 2.7 GB checkpoint, this one loads it.

    python reproduce/load_memory.py

(The writer is the child because a process inherits its parent's peak.)
"""
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import build_model, load_model

if len(sys.argv) == 2:
    with torch.device("meta"):
        shapes = build_model("dit-xl").state_dict()
    torch.save({k: torch.full(v.shape, 0.01) for k, v in shapes.items()}, sys.argv[1])
    raise SystemExit

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, __file__, f"{folder}/xl.pt"], check=True)
    start = peak()
    net, _ = load_model("dit-xl", f"{folder}/xl.pt")
    loaded = peak()
    sum(p.detach().sum() for p in net.parameters())
size = sum(p.numel() * 4 for p in net.parameters()) / 2**30
print(f"weights {size:.2f} GiB; peak after imports {start:.2f}, after loading {loaded:.2f}, "
      f"after reading every weight {peak():.2f} GiB")
