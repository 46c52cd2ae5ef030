"""What the README's estimates start from: multiply-adds of one 256 x 256 image, parameters, and what training keeps of it. Allocates nothing.

    python reproduce/flops.py
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


for depth in (28, 19, 14, 7):
    name, net = f"D{depth}", build_model("dit-xl", depth).to("meta")
    inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    weights, kept = {p.untyped_storage()._cdata for p in net.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t.untyped_storage()) and t, lambda t: t):
        out = net(*inputs)
    mebibytes = sum(storage.nbytes() for key, storage in kept.items() if key not in weights) / 2**20
    print(f"{name:8} {sum(p.numel() for p in net.parameters()) / 1e6:6.1f} M parameters  {multiply_adds(net, *inputs)}  {mebibytes:4.0f} MiB kept for the backward pass (float32)")
for name in ("sd-ema", "kl16"):
    vae = AutoencoderKL(VAES[name])
    side = 256 // vae.factor
    print(f"{name:8} encode {multiply_adds(vae.encoder, torch.empty(1, 3, 256, 256))}, decode {multiply_adds(vae.decoder, torch.empty(1, vae.config['latent'], side, side))}")
