"""What the README's estimates start from: multiply-adds of a 256 x 256 image, parameters, and what training keeps.

    python reproduce/flops.py         # allocates nothing
"""
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extract_latents import VAES, AutoencoderKL
from model import build_model

torch.set_default_device("meta")  # shapes without numbers

def multiply_adds(net, *inputs) -> str:
    with FlopCounterMode(display=False) as counter:
        net(*inputs)
    return f"{counter.get_total_flops() / 2e9:6.1f} G multiply-adds"

def kept(net, *inputs) -> float:
    """MiB that autograd keeps for the backward pass, weights left out."""
    weights, found = {p.untyped_storage()._cdata for p in net.parameters()}, {}

    def keep(t):
        found.setdefault(t.untyped_storage()._cdata, t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = net(*inputs)
    assert out.requires_grad
    return sum(storage.nbytes() for place, storage in found.items() if place not in weights) / 2**20

for depth in (28, 19, 14, 7):
    name, net = f"D{depth}", build_model("dit-xl", depth).to("meta")
    inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{name:8} {size:6.1f} M parameters  {multiply_adds(net, *inputs)}  "
          f"{kept(net, *inputs):4.0f} MiB kept for the backward pass (float32)")
for name in ("sd-ema", "kl16"):
    vae = AutoencoderKL(VAES[name])
    side = 256 // vae.factor
    latent = torch.empty(1, vae.config["latent"], side, side)
    print(f"{name:8} encode {multiply_adds(vae.encoder, torch.empty(1, 3, 256, 256))}, "
          f"decode {multiply_adds(vae.decoder, latent)}")
