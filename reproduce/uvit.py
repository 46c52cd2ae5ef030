"""A new family in one file: U-ViT (Bao et al. 2023), a transformer with long skip connections, for the digits.

    python reproduce/uvit.py distill --mode scratch --model uvit-tiny --steps 4000 --out out/uvit/teacher
    python reproduce/uvit.py prune --ckpt out/uvit/teacher/student.pt --out out/uvit/prune
    python reproduce/uvit.py distill --student out/uvit/prune/shallow.pt --out out/uvit/distill
    python reproduce/uvit.py sample --ckpt out/uvit/distill/student.pt --out out/uvit/sample
    python fid.py out/uvit/sample/samples.npz

Of L blocks, block i of the first half also hands its output to block L - 1 - i. Where a block is removed, the hidden
state passes unchanged, to the next block and through the skip connection: just as where a mask of prune.py is 0.
"""
import importlib
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import (
    DISTILL_TINY, MODELS, PRUNE_TINY, MarBlock, Prunable, TimestepEmbedder, VelocityObjective, count_blocks, run_main)


class SkipBlock(MarBlock):
    def __init__(self, width, heads, dropout):
        super().__init__(width, heads, dropout)
        self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, x, skip):
        """x, and the output of an earlier block, which is merged with it first: both (B, T, D)."""
        return super().forward(x + self.skip_linear(torch.cat([x, skip], dim=2)))


class UViT(nn.Module, Prunable):
    """Noised latents x (B, 4, 8, 8), times t (B,), labels y (B,) -> the velocity (B, 4, 8, 8)."""

    block_lists = ("in_blocks", "out_blocks")
    channels = 4
    input_size = 8
    classes = 10

    def __init__(self, *, width, depth, original_depth, heads):
        super().__init__()
        self.original_depth = original_depth  # of both halves, before any cut; depth: of each half now
        self.patch_embed = nn.Conv2d(4, width, 2, 2)  # a token for each patch of 2 x 2
        self.time_embed = TimestepEmbedder(width)
        self.label_embed = nn.Embedding(11, width)  # the last label means "no label"
        self.pos_embed = nn.Parameter(torch.zeros(16 + 2, width))  # of patches, time and label
        self.in_blocks = nn.ModuleList(MarBlock(width, heads, 0.0) for _ in range(depth[0]))
        self.out_blocks = nn.ModuleList(SkipBlock(width, heads, 0.0) for _ in range(depth[1]))
        self.norm = nn.LayerNorm(width)
        self.to_latents = nn.ConvTranspose2d(width, 4, 2, 2)

    @staticmethod
    def shape_of(state, known):
        return known | dict(depth=[count_blocks(state, name) for name in UViT.block_lists])

    def forward(self, x, t, y):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, 16, D)
        time_and_label = torch.stack([self.time_embed(t), self.label_embed(y)], dim=1)  # (B, 2, D)
        x = torch.cat([x, time_and_label], dim=1) + self.pos_embed
        L = self.original_depth
        blocks = dict(zip(self.original_indices(), self.layers()))  # those that were not removed
        skips = []
        for i in range(L // 2):
            if i in blocks:
                x = blocks[i](x)
            skips.append(x)
        for i in range(L // 2, L):
            if i in blocks:
                x = blocks[i](x, skips[L - 1 - i])
        x = self.norm(x[:, :16]).transpose(1, 2)  # (B, D, 16)
        return self.to_latents(x.unflatten(2, (4, 4)))

    def objective(self):
        return VelocityObjective(self)


MODELS["uvit-tiny"] = dict(
    family=UViT, shape=dict(width=96, depth=[6, 6], original_depth=12, heads=3), vae="digits", prune=PRUNE_TINY,
    distill=DISTILL_TINY, sampling=dict(sampler="ode-heun", steps=32, guidance=1.5, guidance_channels=4))


def main(argv=None):
    stage, *flags = argv or sys.argv[1:]
    importlib.import_module(stage).main(flags)


if __name__ == "__main__":
    run_main(main)
