"""Multiply-adds of one image's forward pass, and parameters: what the README's estimates start from. Allocates nothing.

    python reproduce/flops.py
"""
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import build_model

for name in ("dit-xl", "dit-d19", "dit-d14", "dit-d7"):
    with torch.device("meta"):
        net = build_model(name).to("meta")
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long))
    print(f"{name:8} {sum(p.numel() for p in net.parameters()) / 1e6:6.1f} M parameters  {counter.get_total_flops() / 2e9:6.1f} G multiply-adds")
