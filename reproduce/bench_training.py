"""What the training flags are worth on this machine: time of forward + backward, and bytes kept for the backward pass.

    python reproduce/bench_training.py            # width 384, depth 12, 64 tokens, batch 32; the same work in one run
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prune
from model import RowNoise, build_model


class DenseLayer(prune.MaskedLayer):
    """The formula as it stands: every sample through every block, with autograd."""

    def forward(self, x, *conditions):
        m = self.mask.view(-1, 1, 1)
        return m * self.block(x, *conditions) + (1 - m) * x


def network(layer=None, delta_w="full", checkpointing=False, compile=False):
    torch.manual_seed(0)
    net = build_model("dit-s", input_size=16)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    prune.add_delta_w(net, delta_w, 8)
    net.checkpointing = checkpointing
    for block in net.layers() if compile else []:
        block.compile()
    if layer:
        net.replace_layers([layer(block) for block in net.layers()])
    return net


def step(net, masks, dtype=torch.float32):
    noise = RowNoise((0,), 0, 32, 32)
    objective = net.objective()
    batch = objective.draw(noise.normal(4, 16, 16), torch.zeros(32, dtype=torch.long), noise)
    if masks:
        masks.draw(net.layers(), noise, tau=1.0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        objective.loss(objective.predict(net, batch), batch).mean().backward()


def measure(*arguments):
    """-> seconds (the best of 3), MiB saved for the backward pass."""
    own, saved = {p.untyped_storage().data_ptr() for p in arguments[0].parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t):
        step(*arguments)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step(*arguments)
        times.append(time.perf_counter() - start)
    return min(times), sum(v for k, v in saved.items() if k not in own) / 2**20


masks = prune.LayerMasks([(1, 2)] * 6, "cpu")
print(f"{'':34}{'s':>8}{'MiB':>8}")
for name, *arguments in [
        ("1:2 masks, LoRA, dense formula", network(DenseLayer, "lora"), masks), ("1:2 masks, LoRA, as in prune.py", network(prune.MaskedLayer, "lora"), masks),
        ("1:2 masks, full dW, dense formula", network(DenseLayer), masks), ("1:2 masks, full dW, as in prune.py", network(prune.MaskedLayer), masks),
        ("plain training", network(), None), ("  --checkpointing", network(checkpointing=True), None),
        ("  --compile", network(compile=True), None), ("  --dtype bfloat16", network(), None, torch.bfloat16)]:
    seconds, mebibytes = measure(*arguments)
    print(f"{name:34}{seconds:8.2f}{mebibytes:8.0f}", flush=True)
