"""How large hidden states are, as in figure 8 of the paper: a table of a teacher's layers and of its student's.

    python reproduce/magnitudes.py out/distill/student.pt

Of each layer's output h, over 64 samples of fixed noise and times: standard deviation, least and largest element; the
largest |h - mean| in standard deviations of its sample; and how many lie beyond 2, which L_Rep masks.
"""
import sys

import torch

from engine import ROOT  # first: it makes the stages importable
from table import markdown

from distill import HiddenStates
from extract_latents import Batches, Latents
from model import load_model


@torch.no_grad()
def magnitudes(net):
    """A line for each layer."""
    hidden = HiddenStates(net, list(range(len(net.layers()))))
    objective = net.objective()
    x, y, rng = Batches(Latents(ROOT / "out/latents"), 64, 1, seed=2025, device="cpu")(0, 0)
    objective.predict(net, objective.make_batch(x, y, rng))
    lines = []
    for i, h in enumerate(hidden.take()):  # (B, T, D)
        variance, mean = torch.var_mean(h, dim=(1, 2), keepdim=True)
        distance = (h - mean).abs() / variance.sqrt()
        beyond = (distance >= 2).float().mean()
        elements = [f"{h.std():.3f}", f"{h.min():.2f}", f"{h.max():.2f}"]
        lines.append([i, *elements, f"{distance.max():.1f}", f"{beyond:.1%}"])
    return lines


if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
net, config = load_model(None, sys.argv[1])
teacher, _ = load_model(config["parent"])
for name, network in (("teacher", teacher), ("student", net)):
    names = ["layer", "std", "min", "max", "largest, in std", "beyond 2 std"]
    print(f"\n{name}\n\n{markdown(names, magnitudes(network))}")
