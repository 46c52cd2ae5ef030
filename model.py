"""Networks, noise processes and checkpoints of DiT, SiT and MAR. Knows nothing of pruning or of training.

A network is what a stage loads, masks, cuts and samples from; its state-dict keys are the official release's:

    net = build_model("dit-xl")                    # also sit-*, mar-*, depth=14, and the pruned dit-d14, sit-d14, mar-d16
    net, config = load_model("dit-xl")             # the same with the official weights (downloaded once)
    net, config = load_model(ckpt="out/distill/student.pt")

An objective is what the three families differ in. Teacher and student share one `batch`, so they see the same noise:

    objective = net.objective()
    batch = objective.draw(x, y, noise)            # all the randomness of a training step
    out = objective.predict(net, batch)            # deterministic
    loss = objective.loss(out, batch)              # (B,)

Read top to bottom: layers; DiT and SiT; MAR; the Gaussian process of DiT and MAR; the interpolant of SiT; the registry;
checkpoints; what every run needs (errors, ranks, progress, seeded randomness).
"""
import argparse
import contextlib
import datetime
import fcntl
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Layers that the families share. T: tokens, D: width.


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D); names as in timm, which all three releases use."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, T, d)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, T, D)))


class Mlp(nn.Module):
    """Two linear layers with a GELU between: tanh-approximated in DiT and SiT, exact in MAR."""

    def __init__(self, width: int, hidden: int, approximate: str, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class TimestepEmbedder(nn.Module):
    """Time (N,), any real number -> (N, D): 256 cosines and sines, then an MLP. The embedding stays in float32."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half = frequencies // 2

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(self.half, dtype=torch.float32, device=t.device) / self.half)
        angles = t[:, None].float() * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def sincos_table(width: int, grid: int) -> torch.Tensor:
    """Fixed 2-D position table (1, grid * grid, width): half of the channels for the column, half for the row."""

    def one_axis(position):
        omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4.0))
        angles = np.outer(position.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid * grid, width / 2)

    column, row = np.meshgrid(np.arange(grid, dtype=np.float32), np.arange(grid, dtype=np.float32))
    table = np.concatenate([one_axis(column), one_axis(row)], axis=1)
    return torch.from_numpy(table).float()[None]


def init_linear(module: nn.Module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Prunable:
    """What prune.py and distill.py ask of a network. `block_lists` names its lists of prunable layers, in order.

    A layer is addressed by its index in the concatenation of the lists: for MAR-Large, 0-15 is the encoder, 16-31 the
    decoder. A block maps (B, T, D) to (B, T, D), its other arguments have B rows too.
    """

    block_lists: tuple = ()
    checkpointing = False  # recompute each block in the backward pass: less memory, a third more work

    def layers(self) -> list:
        """All prunable blocks, in order."""
        return [block for name in self.block_lists for block in getattr(self, name)]

    def depths(self) -> list:
        """The number of blocks in each list."""
        return [len(getattr(self, name)) for name in self.block_lists]

    def replace_layers(self, blocks: list):
        """Puts the given blocks, one per layer, in the place of the present ones. None leaves a layer out."""
        blocks = iter(blocks)
        for name in self.block_lists:
            chosen = [next(blocks) for _ in getattr(self, name)]
            setattr(self, name, nn.ModuleList(block for block in chosen if block is not None))

    def keep_layers(self, kept: list):
        """Cuts the network down, in place, to the layers with the given indices."""
        self.replace_layers([block if i in set(kept) else None for i, block in enumerate(self.layers())])

    def run_block(self, block, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


# ---------------------------------------------------------------------------------------------------------------------
# DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024): the same network.


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, T, D), row by row."""

    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class LabelEmbedder(nn.Module):
    """Class label (B,) -> (B, D). Label `classes` is the null label of classifier-free guidance."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """A transformer block whose LayerNorms are shifted, scaled and gated by the condition c (adaLN-Zero)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):  # x (B, T, D), c (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Features (..., D), modulated by a condition that broadcasts with them, -> outputs (..., out)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module, Prunable):
    """x (B, C, H, W), t (B,), y (B,) -> (B, 2C, H, W): noise prediction and variance interpolation."""

    block_lists = ("blocks",)

    def __init__(self, *, width, depth, heads, input_size=32, classes=1000, channels=4, patch=2):
        super().__init__()
        self.input_size, self.channels, self.classes, self.patch = input_size, channels, classes, patch
        self.x_embedder = PatchEmbed(patch, channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.register_buffer("pos_embed", sincos_table(width, input_size // patch))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(one_depth(depth)))
        self.final_layer = FinalLayer(width, patch * patch * 2 * channels)
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for zeroed in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(zeroed.weight)  # adaLN-Zero: at the start every block is the identity
            nn.init.zeros_(zeroed.bias)

    def forward(self, x, t, y):
        """Noised latents x (B, C, H, W), times t (B,), labels y (B,), of which `classes` is the null label -> (B, 2C, H, W)."""
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            x = self.run_block(block, x, c)
        x = self.final_layer(x, c[:, None])  # (B, T, patch * patch * 2C)
        B, grid, p = len(x), self.input_size // self.patch, self.patch
        x = x.view(B, grid, grid, p, p, -1)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(B, -1, grid * p, grid * p)

    def objective(self):
        return DiffusionObjective(self)


class SiT(DiT):
    """DiT's network with time from 0 (noise) to 1 (data). Output: the velocity (B, C, H, W).

    The release's checkpoint has the learned-sigma head, and its forward pass drops that second half: so does ours.
    """

    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, : self.channels]

    def objective(self):
        return InterpolantObjective(self)


def one_depth(depth) -> int:
    """DiT and SiT have one list of blocks: 14 or [14]."""
    return depth if isinstance(depth, int) else depth[0]


# ---------------------------------------------------------------------------------------------------------------------
# MAR (Li et al. 2024): a masked autoencoder over tokens, and a small diffusion network that draws each token.


class MarBlock(nn.Module):
    """The plain pre-norm ViT block, with dropout."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, "none", dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ResBlock(nn.Module):
    """The DiffLoss network's block: an MLP with adaLN, on single tokens (N, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class TokenDenoiser(nn.Module):
    """Noised tokens x (N, C), times t (N,), conditions z (N, D) -> (N, 2C): noise prediction and variance interpolation."""

    def __init__(self, channels: int, condition: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self.apply(init_linear)
        nn.init.normal_(self.time_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_embed.mlp[2].weight, std=0.02)
        for zeroed in [b.adaLN_modulation[1] for b in self.res_blocks] + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)

    def forward(self, x, t, z):
        x, c = self.input_proj(x), self.time_embed(t) + self.cond_embed(z)
        for block in self.res_blocks:
            x = block(x, c)
        return self.final_layer(x, c)


class DiffLoss(nn.Module):
    """Holds the token denoiser under the name that the release's checkpoints use."""

    def __init__(self, *args):
        super().__init__()
        self.net = TokenDenoiser(*args)


class MAR(nn.Module, Prunable):
    """Tokens that are known -> encoder -> decoder -> a condition z for every token -> DiffLoss network.

    `kept` (B, K) and `masked` (B, M) are token indices in ascending order. K and M are the same for all rows, so tokens
    are gathered and scattered without any host-device synchronisation.
    """

    block_lists = ("encoder_blocks", "decoder_blocks")

    def __init__(self, *, width, depth, heads, loss_width, loss_depth, input_size=16, classes=1000, channels=16, patch=1, buffer=64, dropout=0.1):
        super().__init__()
        self.input_size, self.channels, self.classes, self.patch, self.buffer = input_size, channels, classes, patch, buffer
        self.tokens, self.token_dim = (input_size // patch) ** 2, channels * patch * patch
        encoder_depth, decoder_depth = (depth // 2, depth - depth // 2) if isinstance(depth, int) else depth
        self.class_emb = nn.Embedding(classes, width)
        self.fake_latent = nn.Parameter(0.02 * torch.randn(1, width))
        self.z_proj = nn.Linear(self.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, buffer + self.tokens, width))
        self.encoder_blocks = nn.ModuleList(MarBlock(width, heads, dropout) for _ in range(encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, buffer + self.tokens, width))
        self.decoder_blocks = nn.ModuleList(MarBlock(width, heads, dropout) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, self.tokens, width))
        self.apply(init_linear)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.diffloss = DiffLoss(self.token_dim, width, loss_width, loss_depth)

    def patchify(self, x):  # (B, C, H, W) -> (B, T, C * patch * patch)
        B, C, H, W = x.shape
        p = self.patch
        return x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, self.tokens, self.token_dim)

    def unpatchify(self, tokens):  # the inverse
        B, p, grid = len(tokens), self.patch, self.input_size // self.patch
        return tokens.view(B, grid, grid, self.channels, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, self.channels, grid * p, grid * p)

    def embed_label(self, y):
        """(B,) -> (B, D); label `classes` is the null label, whose embedding is the learned fake class."""
        known = self.class_emb(y.clamp(max=self.classes - 1))
        return torch.where((y == self.classes)[:, None], self.fake_latent.to(known.dtype), known)

    def encode(self, tokens, y, kept):
        """tokens (B, T, C), of which only those at `kept` are read -> (B, buffer + K, D), buffer tokens first."""
        x = self.z_proj(gather_tokens(tokens, kept))  # (B, K, D)
        labels = self.embed_label(y)[:, None].expand(-1, self.buffer, -1)
        position = self.encoder_pos_embed_learned.expand(len(x), -1, -1)
        position = torch.cat([position[:, : self.buffer], gather_tokens(position[:, self.buffer :], kept)], dim=1)
        x = self.z_proj_ln(torch.cat([labels.to(x.dtype), x], dim=1) + position)
        for block in self.encoder_blocks:
            x = self.run_block(block, x)
        return self.encoder_norm(x)

    def decode(self, x, kept):
        """Encoder output -> conditions z (B, T, D) for all tokens, known and unknown."""
        x = self.decoder_embed(x)
        full = self.mask_token.to(x.dtype).expand(len(x), self.tokens, -1)
        full = full.scatter(1, kept[..., None].expand(-1, -1, x.shape[2]), x[:, self.buffer :])
        x = torch.cat([x[:, : self.buffer], full], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        return self.decoder_norm(x)[:, self.buffer :] + self.diffusion_pos_embed_learned

    def forward(self, tokens, y, kept, masked, x_t, t):
        """Noised masked tokens x_t (B, R, M, C) at times t (B, R, M), R repeats -> (B, R, M, 2C)."""
        z = gather_tokens(self.decode(self.encode(tokens, y, kept), kept), masked)  # (B, M, D)
        z = z[:, None].expand(-1, x_t.shape[1], -1, -1)
        out = self.diffloss.net(x_t.flatten(0, 2), t.flatten(), z.flatten(0, 2))
        return out.view(*x_t.shape[:3], -1)

    def objective(self):
        return MaskedTokenObjective(self)


def gather_tokens(x, index):
    """x (B, T, D), index (B, K) -> (B, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


# ---------------------------------------------------------------------------------------------------------------------
# Objectives. draw: the randomness of one training step; predict: the network's answer; loss, kd: per sample; sample.


def drop_labels(y, noise, classes, probability=0.1):
    """Replaces a tenth of the labels by the null label, so that one network learns both sides of guidance."""
    return torch.where(noise.uniform() < probability, classes, y)


def guide(predict, x, t, y, null, scale, channels):
    """Classifier-free guidance: the prediction at y, its first `channels` pushed away from the prediction at `null`.

    DiT and SiT guide 3 of 4 latent channels, as their releases do; the fourth, and the variances, stay as predicted at y.
    """
    if scale == 1:
        return predict(x, t, y)
    cond, uncond = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)])).chunk(2)
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)


def flat_mean(x):
    """(N, ...) -> (N,)"""
    return x.flatten(1).mean(1)


class GaussianDiffusion:
    """IDDPM (Nichol & Dhariwal 2021) with noise prediction and learned-range variance, as in the DiT and MAR releases.

    schedule: "linear" or "cosine", 1000 training steps. respacing: "" for all of them, "250" for 250 evenly spread ones,
    "ddim50" for a fixed stride. x is (N, C, ...), a network's output (N, 2C, ...), t (N,) indices into the respaced steps.
    """

    def __init__(self, schedule: str = "linear", respacing: str = ""):
        if schedule == "linear":
            betas = np.linspace(1e-4, 0.02, 1000)
        else:
            alpha_bar = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.array([min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)])
        self.timestep_map = respace(respacing)
        kept = np.cumprod(1 - betas)[self.timestep_map]
        if respacing:
            betas = 1 - kept / np.append(1.0, kept[:-1])
        self.steps = len(betas)
        alphas_cumprod = np.cumprod(1 - betas)
        previous = np.append(1.0, alphas_cumprod[:-1])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        self.tables = {k: torch.from_numpy(np.asarray(v)) for k, v in dict(
            betas=betas,
            alphas_cumprod=alphas_cumprod,
            alphas_cumprod_prev=previous,
            log_betas=np.log(betas),
            sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
            sqrt_one_minus_alphas_cumprod=np.sqrt(1 - alphas_cumprod),
            sqrt_recip_alphas_cumprod=np.sqrt(1 / alphas_cumprod),
            sqrt_recipm1_alphas_cumprod=np.sqrt(1 / alphas_cumprod - 1),
            posterior_variance=posterior_variance,
            posterior_log_variance_clipped=np.log(np.append(posterior_variance[1], posterior_variance[1:])),
            posterior_mean_coef1=betas * np.sqrt(previous) / (1 - alphas_cumprod),
            posterior_mean_coef2=(1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
            timesteps=np.array(self.timestep_map),
        ).items()}

    def at(self, name, t, like):
        """Table entries at t, (N,) -> float32 (N, 1, ...) to multiply with `like`."""
        if self.tables[name].device != t.device:
            self.tables = {k: v.to(t.device) for k, v in self.tables.items()}
        return self.tables[name][t].float().view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x_start, t, noise):
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        return self.at("sqrt_alphas_cumprod", t, x_start) * x_start + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean(self, x_start, x_t, t):
        return self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t

    def p_mean_variance(self, out, x_t, t, clip=False):
        """-> mean and log variance of p(x_{t-1} | x_t), and the predicted x_0. The variance lies between beta and posterior."""
        eps, v = out.chunk(2, dim=1)
        low, high = self.at("posterior_log_variance_clipped", t, x_t), self.at("log_betas", t, x_t)
        log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low
        x_start = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        if clip:
            x_start = x_start.clamp(-1, 1)
        return self.q_posterior_mean(x_start, x_t, t), log_variance, x_start

    def variance_bound(self, out, x_start, x_t, t, target=None):
        """The learned variances' loss, bits per dimension, (N,): KL(target || ours) for t > 0, likelihood of x_0 at t = 0.

        target: (mean, log variance) of a teacher; without one, the true posterior. The means get no gradient.
        """
        eps, v = out.chunk(2, dim=1)
        mean, log_variance, _ = self.p_mean_variance(torch.cat([eps.detach(), v], dim=1), x_t, t)
        if target is None:
            target = self.q_posterior_mean(x_start, x_t, t), self.at("posterior_log_variance_clipped", t, x_t)
        kl = 0.5 * (-1 + log_variance - target[1] + (target[1] - log_variance).exp() + (target[0] - mean) ** 2 * (-log_variance).exp())
        nll = -discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
        return torch.where(t == 0, flat_mean(nll), flat_mean(kl)) / math.log(2)

    def loss(self, out, x_start, x_t, t, noise):
        """MSE on the noise + the bound on the variances, (N,)."""
        out = out.float()
        mse = flat_mean((out.chunk(2, dim=1)[0] - noise) ** 2)
        return mse + self.variance_bound(out, x_start, x_t, t)

    def kd(self, out, out_teacher, x_start, x_t, t):
        """Output distillation: MSE between the noise predictions + KL(teacher || student) of the variances, (N,)."""
        out, out_teacher = out.float(), out_teacher.float()
        mse = flat_mean((out.chunk(2, dim=1)[0] - out_teacher.chunk(2, dim=1)[0]) ** 2)
        return mse + self.variance_bound(out, x_start, x_t, t, target=self.p_mean_variance(out_teacher, x_t, t)[:2])

    def ancestral_step(self, out, x, t, noise, temperature=1.0):
        """x_t -> x_{t-1}; the step to x_0 (t = 0) adds no noise."""
        mean, log_variance, _ = self.p_mean_variance(out, x, t)
        return mean + (t > 0).view(-1, *[1] * (x.ndim - 1)) * (0.5 * log_variance).exp() * noise * temperature

    def ddim_step(self, out, x, t, noise=None, eta=0.0):
        """DDIM (Song et al. 2021), eq. 12; eta 0 is deterministic."""
        _, _, x_start = self.p_mean_variance(out, x, t)
        eps = (self.at("sqrt_recip_alphas_cumprod", t, x) * x - x_start) / self.at("sqrt_recipm1_alphas_cumprod", t, x)
        abar, previous = self.at("alphas_cumprod", t, x), self.at("alphas_cumprod_prev", t, x)
        sigma = eta * ((1 - previous) / (1 - abar)).sqrt() * (1 - abar / previous).sqrt()
        mean = x_start * previous.sqrt() + (1 - previous - sigma**2).sqrt() * eps
        return mean if eta == 0 else mean + (t > 0).view(-1, *[1] * (x.ndim - 1)) * sigma * noise

    def sample_loop(self, predict, x, draw, sampler="ddpm", temperature=1.0, on_step=None):
        """From x at the last step down to x_0. predict(x, t_model) -> (N, 2C, ...); draw() -> noise like x."""
        for i in reversed(range(self.steps)):
            t = torch.full((len(x),), i, device=x.device)
            out = predict(x, torch.full((len(x),), self.timestep_map[i], device=x.device)).float()
            x = self.ddim_step(out, x, t) if sampler == "ddim" else self.ancestral_step(out, x, t, draw(), temperature)
            if on_step:
                on_step(self.steps - i, self.steps)
        return x


def respace(respacing: str, total: int = 1000) -> list:
    """Which of the training timesteps a sampler visits: "250" evenly spread, both ends included; "ddim50" every 20th."""
    if not respacing:
        return list(range(total))
    if not re.fullmatch(r"(ddim)?\d+", respacing):
        fail(f"{respacing!r} is no number of diffusion steps; give one like 50 or ddim50")
    if respacing.startswith("ddim"):
        count = int(respacing[4:])
        for stride in range(1, total):
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))
        fail(f"no stride visits exactly {count} of {total} timesteps; give a count like 50, 100 or 250")
    count = int(respacing)
    if not 2 <= count <= total:
        fail(f"{count} sampling steps asked of {total} training timesteps; give 2 to {total}")
    stride = (total - 1) / (count - 1)
    return [round(i * stride) for i in range(count)]


def discretized_log_likelihood(x, mean, log_scale):
    """Log probability of x under a Gaussian integrated over bins of width 2/255, the outermost reaching to infinity."""

    def normal_cdf(z):  # the tanh approximation of the releases
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = (-log_scale).exp()
    upper, lower = normal_cdf(inverse * (x - mean + 1 / 255)), normal_cdf(inverse * (x - mean - 1 / 255))
    log = lambda p: p.clamp(min=1e-12).log()
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))


class DiffusionObjective:
    """DiT: noise prediction at a uniform timestep, learned variances."""

    samplers = ("ddpm", "ddim")
    defaults = dict(sampler="ddpm", steps=250, guidance=1.5, guidance_channels=3)  # of `sample`
    beta_rep, epochs = 1e-2, 100  # table 6

    def __init__(self, net):
        self.shape, self.classes = (net.channels, net.input_size, net.input_size), net.classes
        self.diffusion = GaussianDiffusion("linear")

    def draw(self, x, y, noise):
        """Latents x (B, C, H, W), labels y (B,), noise: RowNoise -> a batch: dict of tensors with B rows."""
        t = (noise.uniform() * self.diffusion.steps).long()
        eps = noise.normal(*x.shape[1:])
        x_t = self.diffusion.q_sample(x, t, eps)
        return dict(x_start=x, x_t=x_t, t=t, noise=eps, y=drop_labels(y, noise, self.classes))

    def predict(self, net, batch):
        return net(batch["x_t"], batch["t"], batch["y"])

    def loss(self, out, batch):
        return self.diffusion.loss(out, batch["x_start"], batch["x_t"], batch["t"], batch["noise"])

    def kd(self, out, out_teacher, batch):
        return self.diffusion.kd(out, out_teacher, batch["x_start"], batch["x_t"], batch["t"])

    def sample(self, net, y, noise, sampler, steps, guidance, guidance_channels, on_step=None):
        """Labels y (B,), noise: RowNoise -> latents (B, C, H, W). Guidance 1 is none."""
        process = GaussianDiffusion("linear", str(steps))
        predict = lambda x, t: guide(net, x, t, y, self.classes, guidance, guidance_channels)
        draw = lambda: noise.normal(*self.shape)
        return process.sample_loop(predict, draw(), draw, sampler, on_step=on_step)


class MaskedTokenObjective:
    """MAR: hide 70 to 100 % of the tokens, predict the noise on each hidden one from what the rest says (DiffLoss)."""

    samplers = ("mar",)
    defaults = dict(sampler="mar", steps=64, guidance=3.0, guidance_schedule="linear", temperature=1.0, token_steps=100)
    beta_rep, epochs = 1e-2, 40  # table 6
    repeats = 4  # diffusion_batch_mul: timesteps per token, since the small network is cheap beside the encoder
    mask_ratio = scipy.stats.truncnorm(-0.3 / 0.25, 0, loc=1.0, scale=0.25)

    def __init__(self, net):
        self.classes, self.tokens, self.token_dim = net.classes, net.tokens, net.token_dim
        self.patchify = net.patchify
        self.diffusion = GaussianDiffusion("cosine")

    def draw(self, x, y, noise):
        """As DiffusionObjective.draw. All rows hide the same number of tokens; which ones is a random order a row."""
        hidden = math.ceil(self.tokens * self.mask_ratio.ppf(noise.host.random()))
        order = noise.uniform(self.tokens).argsort(dim=1)
        masked, kept = order[:, :hidden].sort(dim=1)[0], order[:, hidden:].sort(dim=1)[0]
        tokens = self.patchify(x)
        x_start = gather_tokens(tokens, masked)[:, None].expand(-1, self.repeats, -1, -1)  # (B, R, M, C)
        t = (noise.uniform(self.repeats, hidden) * self.diffusion.steps).long()
        eps = noise.normal(*x_start.shape[1:])
        x_t = self.diffusion.q_sample(x_start.flatten(0, 2), t.flatten(), eps.flatten(0, 2)).view_as(eps)
        return dict(tokens=tokens, y=drop_labels(y, noise, self.classes), kept=kept, masked=masked, x_start=x_start, x_t=x_t, t=t, noise=eps)

    def predict(self, net, batch):
        return net(*(batch[k] for k in ("tokens", "y", "kept", "masked", "x_t", "t")))

    def loss(self, out, batch):
        per_token = self.diffusion.loss(*(v.flatten(0, 2) for v in (out, batch["x_start"], batch["x_t"], batch["t"], batch["noise"])))
        return per_token.view(len(out), -1).mean(1)

    def kd(self, out, out_teacher, batch):
        per_token = self.diffusion.kd(*(v.flatten(0, 2) for v in (out, out_teacher, batch["x_start"], batch["x_t"], batch["t"])))
        return per_token.view(len(out), -1).mean(1)

    def sample(self, net, y, noise, sampler, steps, guidance, guidance_schedule, temperature, token_steps, on_step=None):
        """Labels y (B,) -> latents (B, C, H, W) in `steps` rounds, each filling in more tokens than the last."""
        order = noise.uniform(self.tokens).argsort(dim=1)
        process = GaussianDiffusion("cosine", str(token_steps))
        tokens = torch.zeros(len(y), self.tokens, self.token_dim, device=y.device)
        schedule = mar_schedule(self.tokens, steps)
        for step, (hidden, remain) in enumerate(zip(schedule, schedule[1:])):
            if hidden > remain:
                kept, new = order[:, hidden:].sort(dim=1)[0], order[:, remain:hidden].sort(dim=1)[0]
                scale = 1 + (guidance - 1) * (self.tokens - max(remain, 1)) / self.tokens if guidance_schedule == "linear" else guidance
                tokens = self.fill_in(net, tokens, y, kept, new, scale, process, noise, temperature)
            if on_step:
                on_step(step + 1, steps)
        return net.unpatchify(tokens)

    def fill_in(self, net, tokens, y, kept, new, scale, process, noise, temperature):
        """One round: condition on the tokens at `kept`, draw those at `new` by the DiffLoss network's own diffusion."""
        B, n, C = len(tokens), new.shape[1], self.token_dim
        double = lambda v: torch.cat([v, v]) if scale != 1 else v
        labels = torch.cat([y, torch.full_like(y, self.classes)]) if scale != 1 else y
        z = net.decode(net.encode(double(tokens), labels, double(kept)), double(kept))
        z = gather_tokens(z, double(new)).flatten(0, 1)  # (B n, D), guided: the null label's below

        def predict(x, t):
            # `guide` calls back with x, t doubled; z already holds both labels' conditions
            return guide(lambda x, t, _: net.diffloss.net(x, t, z), x, t, t, 0, scale, C)

        draw = lambda: noise.normal(n, C).flatten(0, 1)
        new_tokens = process.sample_loop(predict, draw(), draw, temperature=temperature).view(B, n, C)
        return tokens.scatter(1, new[..., None].expand(-1, -1, C), new_tokens)


def mar_schedule(tokens: int, steps: int) -> list:
    """Hidden tokens at the start of each round, then 0: [tokens, ..., 0]. Cosine, at least one token a round while any is left."""
    schedule = [tokens]
    for step in range(steps - 1):
        remain = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        schedule.append(max(1, min(schedule[-1] - 1, remain)))
    return schedule + [0]


class InterpolantObjective:
    """SiT: x_t = t x_1 + (1 - t) x_0 from noise x_0 to data x_1; the network predicts the velocity x_1 - x_0."""

    samplers = ("sde-euler", "sde-heun", "ode-euler", "ode-heun", "ode-dopri5")
    defaults = dict(sampler="sde-euler", steps=250, guidance=1.5, guidance_channels=3, diffusion_form="sigma", last_step="mean", last_step_size=0.04)
    beta_rep, epochs = 2e-4, 100  # table 6

    def __init__(self, net):
        self.shape, self.classes = (net.channels, net.input_size, net.input_size), net.classes

    def draw(self, x, y, noise):
        """As DiffusionObjective.draw, with t uniform on [0, 1)."""
        t, eps = noise.uniform(), noise.normal(*x.shape[1:])
        s = t.view(-1, 1, 1, 1)
        return dict(x_t=s * x + (1 - s) * eps, t=t, velocity=x - eps, y=drop_labels(y, noise, self.classes))

    def predict(self, net, batch):
        return net(batch["x_t"], batch["t"], batch["y"])

    def loss(self, out, batch):
        return flat_mean((out.float() - batch["velocity"]) ** 2)

    def kd(self, out, out_teacher, batch):
        return flat_mean((out.float() - out_teacher.float()) ** 2)

    def sample(self, net, y, noise, sampler, steps, guidance, guidance_channels, diffusion_form, last_step, last_step_size, on_step=None):
        """Labels y (B,) -> latents (B, C, H, W). `steps` counts grid points: 20 are 19 steps (and, for the SDE, the last one)."""
        if steps < 2:
            fail(f"--steps {steps}: the grid needs at least 2 points, its two ends")
        velocity = lambda x, t: guide(net, x, t, y, self.classes, guidance, guidance_channels).float()
        draw = lambda: noise.normal(*self.shape)
        kind, method = sampler.split("-")
        if kind == "ode":
            return integrate_ode(velocity, draw(), steps, method, on_step)
        return integrate_sde(velocity, draw(), steps, draw, method, diffusion_form, last_step, last_step_size, on_step)


DIFFUSION_FORMS = {  # SiT table 3 and its release: w(t) of the reverse SDE
    "sigma": lambda t: 1 - t,
    "SBDM": lambda t: (1 - t) ** 2 / t + (1 - t),
    "constant": lambda t: torch.ones_like(t),
    "linear": lambda t: 1 - t,
    "decreasing": lambda t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t: torch.sin(math.pi * t) ** 2,
}


def score_of(velocity, x, t):
    """Score from velocity on the linear path: (t v - x) / ((1 - t)^2 + t (1 - t))."""
    return (t * velocity - x) / ((1 - t) ** 2 + t * (1 - t))


def integrate_sde(velocity, x, steps, draw, method="euler", form="sigma", last_step="mean", last_step_size=0.04, on_step=None):
    """Reverse SDE from t = 0 (noise) to 1: dx = (v + w score) dt + sqrt(2 w) dW, Euler-Maruyama or Heun.

    steps grid points end at 1 - last_step_size; the last step, without noise, does the rest: "mean" follows the SDE's
    drift, "euler" the velocity, "tweedie" the posterior mean; "none" has no last step. One network call gives both v and
    the score (the release calls it twice). SBDM is infinite at t = 0 and starts at 1e-3.
    """
    if last_step == "none":
        last_step_size = 1e-3 if method == "heun" else 0.0  # Heun looks ahead to the last grid point, where the score is infinite
    elif not 0 < last_step_size < 1:
        fail(f"--last-step-size {last_step_size} must lie between 0 and 1")
    weight = DIFFUSION_FORMS[form]
    grid = torch.linspace(1e-3 if form == "SBDM" else 0.0, 1 - last_step_size, steps, device=x.device)
    dt = grid[1] - grid[0]
    column = lambda t: t.expand(len(x)).view(-1, *[1] * (x.ndim - 1))

    def drift(x, t):
        v = velocity(x, t.expand(len(x)))
        return v + weight(column(t)) * score_of(v, x, column(t))

    for i, t in enumerate(grid[:-1]):
        noise = (2 * weight(column(t))).sqrt() * draw() * dt.sqrt()
        if method == "heun":
            x = x + noise
            first = drift(x, t)
            x = x + 0.5 * dt * (first + drift(x + dt * first, t + dt))
        else:
            x = x + drift(x, t) * dt + noise
        if on_step:
            on_step(i + 1, steps)
    t = grid[-1]
    if last_step == "none":
        return x
    if last_step == "mean":
        return x + drift(x, t) * last_step_size
    v = velocity(x, t.expand(len(x)))
    if last_step == "euler":
        return x + v * last_step_size
    return x / t + (1 - t) ** 2 / t * score_of(v, x, column(t))  # tweedie


# Dormand & Prince 1980; the last row is the difference to the embedded fourth-order solution, then the midpoint's weights.
DOPRI5_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
DOPRI5_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI5_ERROR = (35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720, -2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60)
DOPRI5_MIDDLE = (6025192743 / 30085553152 / 2, 0, 51252292925 / 65400821598 / 2, -2691868925 / 45128329728 / 2, 187940372067 / 1594534317056 / 2, -1776094331 / 19743644256 / 2, 11237099 / 235043384 / 2)


def integrate_ode(velocity, x, steps, method="dopri5", on_step=None, atol=1e-6, rtol=1e-3, end=1.0):
    """dx/dt = velocity(x, t) from t = 0 to `end`: Euler or Heun on `steps` grid points, or adaptive dopri5."""
    call = lambda x, t: velocity(x, torch.full((len(x),), float(t), device=x.device))
    if method == "dopri5":
        return dopri5(call, x, atol, rtol, end, on_step)
    grid = np.linspace(0, end, steps, dtype=np.float32)
    for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
        first = call(x, t)
        slope = (first + call(x + float(t_next - t) * first, t_next)) / 2 if method == "heun" else first
        x = x + float(t_next - t) * slope
        if on_step:
            on_step(i + 1, steps - 1)
    return x


def dopri5(call, x, atol, rtol, end, on_step=None):
    """Adaptive Runge-Kutta 5(4) with torchdiffeq's step control: starting step, error norm over the whole batch, dense output.

    The last step may reach past `end`; a quartic through both ends and the middle then gives x(end). Since the step
    is shared, an image depends on its batch companions, though only to within the tolerances.
    """
    size = lambda v: float(v.square().mean().sqrt())
    combine = lambda weights, ks: sum(w * k for w, k in zip(weights, ks) if w)
    t, slope = 0.0, call(x, 0.0)
    tolerance = atol + rtol * x.abs()
    d0, d1 = size(x / tolerance), size(slope / tolerance)
    trial = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    d2 = size((call(x + trial * slope, trial) - slope) / tolerance) / trial
    dt = min(100 * trial, max(1e-6, trial * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / 5))
    while True:
        ks = [slope]
        for time_share, weights in zip(DOPRI5_TIMES, DOPRI5_STAGES):
            x_new = x + dt * combine(weights, ks)
            ks.append(call(x_new, t + time_share * dt))
        error = size(dt * combine(DOPRI5_ERROR, ks) / (atol + rtol * torch.maximum(x.abs(), x_new.abs())))
        factor = 10.0 if error == 0 else min(10.0, max(0.9 / error**0.2, 1.0 if error < 1 else 0.2))
        if error <= 1 and t + dt >= end:
            break
        if error <= 1:
            x, slope, t = x_new, ks[-1], t + dt
            if on_step:
                on_step(int(1000 * t), 1000)
        if dt < 1e-9 or error != error:
            fail("dopri5 cannot reach its tolerance: the network's output is not finite; use --sampler ode-heun to see where")
        dt *= factor
    middle = x + dt * combine(DOPRI5_MIDDLE, ks)
    a = 2 * dt * (ks[-1] - slope) - 8 * (x_new + x) + 16 * middle
    b = dt * (5 * slope - 3 * ks[-1]) + 18 * x + 14 * x_new - 32 * middle
    c = dt * (ks[-1] - 4 * slope) - 11 * x - 5 * x_new + 16 * middle
    s = (end - t) / dt
    return x + s * (dt * slope + s * (c + s * (b + s * a)))


# ---------------------------------------------------------------------------------------------------------------------
# The registry: model names, their shapes, and where their official weights are.

DIT_SIZES = {
    "xl": dict(width=1152, depth=28, heads=16),
    "l": dict(width=1024, depth=24, heads=16),
    "b": dict(width=768, depth=12, heads=12),
    "s": dict(width=384, depth=12, heads=6),
    "tiny": dict(width=96, depth=12, heads=3, input_size=8, classes=10),  # for the bundled digits
    "d19": dict(width=1152, depth=19, heads=16),  # cut from xl
    "d14": dict(width=1152, depth=14, heads=16),
    "d7": dict(width=1152, depth=7, heads=16),
}
MODELS = {f"dit-{size}": dict(family=DiT, **shape) for size, shape in DIT_SIZES.items()}
MODELS |= {f"sit-{size}": dict(family=SiT, **shape) for size, shape in DIT_SIZES.items()}
MODELS |= {
    "dit-xl-512": dict(family=DiT, **DIT_SIZES["xl"], input_size=64),
    "mar-huge": dict(family=MAR, width=1280, depth=40, heads=16, loss_width=1536, loss_depth=12),
    "mar-large": dict(family=MAR, width=1024, depth=32, heads=16, loss_width=1280, loss_depth=8),
    "mar-base": dict(family=MAR, width=768, depth=24, heads=12, loss_width=1024, loss_depth=6),
    "mar-d16": dict(family=MAR, width=1024, depth=16, heads=16, loss_width=1280, loss_depth=8),  # cut from large
    "mar-tiny": dict(family=MAR, width=96, depth=12, heads=3, loss_width=256, loss_depth=2, input_size=8, classes=10, channels=4, patch=2, buffer=4, dropout=0.0),
}
# Instead of the objective's defaults. mar-tiny draws tokens in strides of 40, from t = 960 on: at t = 999 of the cosine schedule the
# predicted x_0 holds the network's error times 20,000. A few thousand steps of training do not make that small: samples would diverge.
SMALL_SAMPLING = {
    "dit-tiny": dict(steps=64, guidance_channels=4), "sit-tiny": dict(steps=64, guidance_channels=4), "mar-tiny": dict(steps=8, token_steps="ddim25"),
}

WEIGHTS = {  # name: (file under weights/, URL, bytes or None, sha256 or None)
    "dit-xl": ("DiT-XL-2-256x256.pt", "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt", None, None),
    "dit-xl-512": ("DiT-XL-2-512x512.pt", "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt", None, None),
    "dit-d14": ("TinyDiT-D14-MaskedKD-500K.pt", "https://github.com/VainF/TinyFusion/releases/download/v1.0.0/TinyDiT-D14-MaskedKD-500K.pt", None, None),
    "sit-xl": ("SiT-XL-2-256.pt", "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1", None, None),
    "mar-base": ("mar-base.pth", "https://www.dropbox.com/scl/fi/f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1", None, None),
    "mar-large": ("mar-large.pth", "https://www.dropbox.com/scl/fi/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1", None, None),
    "mar-huge": ("mar-huge.pth", "https://www.dropbox.com/scl/fi/1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1", None, None),
    "vae-sd-ema": ("sd-vae-ft-ema.safetensors", "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors", 334643276, None),
    "vae-sd-mse": ("sd-vae-ft-mse.safetensors", "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.safetensors", 334643276, None),
    "vae-kl16": ("kl16.ckpt", "https://www.dropbox.com/scl/fi/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1", None, None),
}


def build_model(name: str, depth=None, **overrides) -> nn.Module:
    """A network with fresh weights. depth: another number of blocks (MAR: [encoder, decoder], or their even sum)."""
    if name not in MODELS:
        fail(f"no model is called {name!r}; there are {', '.join(MODELS)}")
    shape = dict(MODELS[name])
    family = shape.pop("family")
    return family(**{**shape, **overrides, "depth": depth or shape["depth"]})


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints. Ours: a dict of `model`, `ema` (state dicts), `config`, `step` and what resuming needs.


def load_model(name: str = None, ckpt: str = None, device="cpu", weights: str = "ema"):
    """-> (network in eval mode, config). From `ckpt` (a path, a URL, any official format), else the registry's weights.

    config: name, depth (a list, one entry per block list), overrides of the registry's shape; for a pruned network also
    kept (layer indices), scheme, parent. The weights are memory-mapped and assigned: loading copies none of them.
    """
    path = locate(ckpt) if ckpt else locate_weights(name)
    state, config = read_state(path, weights)
    if config is None:
        guess = guess_model(state)
        if not name and (guess is None or guess.startswith("dit-")):  # DiT and SiT share all keys and shapes
            fail(f"{path} does not say which model it holds{f', {guess} or its SiT twin' if guess else ''}; add --model NAME")
        config = dict(name=name or guess)
    elif name and config["name"] != name and ckpt:
        fail(f"{path} holds {config['name']}, not {name}; give --model {config['name']} or another --ckpt")
    with torch.device("meta"):
        net = build_model(config["name"], config.get("depth"), **config.get("overrides", {}))
    load_state(net, state, path)
    return net.to(device).eval(), {**config, "depth": net.depths()}


def load_state(net: nn.Module, state: dict, source):
    """Puts `state` into `net`, all keys and shapes equal, as float32; fails naming the first differences."""
    wanted = net.state_dict()
    missing, unexpected = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
    misshaped = [f"{k} {tuple(state[k].shape)} instead of {tuple(wanted[k].shape)}" for k in wanted if k in state and state[k].shape != wanted[k].shape]
    problems = [f"{what} {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" for what, keys in
                (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)) if keys]
    if problems:
        guess = guess_model(state) or ("a VAE" if "decoder.conv_in.weight" in state else None)
        fail(f"{source} does not fit the model asked for ({'; '.join(problems)})" + (f"; it looks like {guess}" if guess else ""))
    net.load_state_dict({k: v if v.dtype == torch.float32 else v.float() for k, v in state.items()}, assign=True)


def read_state(path, prefer: str = "ema"):
    """A weights file -> (state dict on the CPU, our config or None).

    Reads our checkpoints, `.safetensors`, and torch files nested under ema, model, model_ema or state_dict, or plain,
    with or without DDP's "module." prefix. prefer: "ema" or "model", where a file has both. Never runs pickled code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, config = read_safetensors(path)
    else:
        saved = read_torch(path)
        config = saved.get("config") if isinstance(saved.get("config"), dict) and "name" in saved["config"] else None
        order = ("ema", "model_ema", "model", "state_dict") if prefer == "ema" else ("model", "state_dict", "ema", "model_ema")
        state = next((saved[k] for k in order if isinstance(saved.get(k), dict) and saved[k]), saved)
    state = {k.removeprefix("module."): v.detach() for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not state:
        fail(f"{path} holds no weights")
    return state, config


# What releases store beside their weights: arguments, and numbers of numpy, whose maker has another name in numpy 1 than in 2.
MAKE_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [argparse.Namespace, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType,
            (MAKE_SCALAR, "numpy.core.multiarray.scalar"), (MAKE_SCALAR, "numpy._core.multiarray.scalar")]


def read_torch(path) -> dict:
    """torch.load that runs no code (weights_only), maps the file instead of reading it, and fails in one sentence."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files from before torch 1.6 cannot be mapped
                saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} does not exist")
    except pickle.UnpicklingError:
        fail(f"{path} is not a plain weights file (it would run code, or is damaged); nothing was loaded")
    except (OSError, EOFError, RuntimeError, ValueError) as e:
        fail(f"{path} cannot be read as a checkpoint: {(str(e) or type(e).__name__).splitlines()[0][:100]}")
    return saved if isinstance(saved, dict) else fail(f"{path} holds a {type(saved).__name__}, not a checkpoint")


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
                     "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """8 bytes of header length, a JSON header, raw little-endian bytes. The tensors are views of the mapped file."""
    if not path.exists():
        fail(f"{path} does not exist")
    try:
        raw = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
        size = struct.unpack("<Q", raw[:8].numpy().tobytes())[0]
        header = json.loads(raw[8 : 8 + size].numpy().tobytes())
        metadata, data = header.pop("__metadata__", {}), raw[8 + size :]
        state = {}
        for k, v in header.items():
            start, end = v["data_offsets"]
            piece, dtype = data[start:end], SAFETENSORS_TYPES[v["dtype"]]
            aligned = piece if piece.data_ptr() % dtype.itemsize == 0 else piece.clone()
            state[k] = aligned.view(dtype).view(v["shape"])
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as e:
        fail(f"{path} is not a complete .safetensors file ({str(e).splitlines()[0][:80]})")
    try:
        config = json.loads(metadata["config"])
        return state, config if isinstance(config, dict) and "name" in config else None
    except (KeyError, ValueError):  # other people's files may hold another `config`, or none
        return state, None


def write_safetensors(path, state: dict, config: dict):
    """Weights, and our config as metadata, that any safetensors reader opens."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, offset = {"__metadata__": {"config": json.dumps(config)}}, 0
    for k, v in state.items():
        header[k] = dict(dtype=names[v.dtype], shape=list(v.shape), data_offsets=[offset, offset + v.numel() * v.itemsize])
        offset += v.numel() * v.itemsize
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary):
        with open(temporary, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for v in state.values():
                f.write(v.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    write_whole(path, write)


def write_whole(path, write):
    """write(temporary) then rename: a file is there whole or not at all. Fails in one sentence."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())  # a power cut after the rename must not leave an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports an unwritable folder as a RuntimeError
        fail(f"cannot write {path}: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}; choose another --out")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_checkpoint(path, **contents):
    write_whole(path, lambda temporary: torch.save(contents, temporary))


def guess_model(state: dict):
    """The registry name whose shape these weights have, or None."""
    depth = lambda prefix: len({k.split(".")[1] for k in state if k.startswith(prefix)})
    for name, shape in MODELS.items():
        if shape["family"] is MAR:
            same = "z_proj.weight" in state and len(state["z_proj.weight"]) == shape["width"]
            same = same and depth("encoder_blocks.") + depth("decoder_blocks.") == shape["depth"]
        else:
            same = "x_embedder.proj.weight" in state and len(state["x_embedder.proj.weight"]) == shape["width"]
            same = same and depth("blocks.") == shape["depth"] and "pos_embed" in state and state["pos_embed"].shape[1] == (shape.get("input_size", 32) // 2) ** 2
        if same:
            return name
    return None


def locate_weights(name: str) -> Path:
    """The bundled or downloaded weights of a registry model."""
    if name is None:
        fail("give a model: --model NAME, or --ckpt FILE")
    bundled = ROOT / "weights" / f"{name}.pt"
    if bundled.exists():
        return bundled
    if name not in WEIGHTS or name not in MODELS:
        known = [n for n in WEIGHTS if n in MODELS]
        fail(f"no weights are known for {name!r}; give --ckpt FILE (weights exist for {', '.join(known)} and are bundled for dit-tiny, sit-tiny and mar-tiny)")
    return fetch(name)


def locate(path_or_url: str) -> Path:
    """A path as it is; a URL downloaded to weights/."""
    if re.match(r"https?://", str(path_or_url)):
        tag = hashlib.sha256(path_or_url.encode()).hexdigest()[:8]  # many releases call their file checkpoint-last.pth
        return download(path_or_url, ROOT / "weights" / f"{tag}-{Path(path_or_url.split('?')[0]).name}")
    if not Path(path_or_url).exists():
        fail(f"{path_or_url} does not exist")
    return Path(path_or_url)


def fetch(name: str) -> Path:
    """The registry's file for `name`, downloaded to weights/ the first time."""
    file, url, size, sha256 = WEIGHTS[name]
    return download(url, ROOT / "weights" / file, size, sha256)


def download(url: str, path: Path, size: int = None, sha256: str = None, tries: int = 5) -> Path:
    """Fetches url to path once: rank 0 of each machine loads, the others wait. A broken transfer continues where it broke."""
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        part = path.with_name(f"{path.name}.{socket.gethostname()}.part")  # machines may share the folder
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            f = open(part, "ab")
        except OSError as e:
            fail(f"cannot write {part} ({e.strerror}); fetch {url} by other means and put it at {path}")
        with f:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(f, fcntl.LOCK_EX)  # another program on this machine may want the same file
            if path.exists():
                part.unlink(missing_ok=True)
                return path
            for attempt in range(tries):
                try:
                    transfer(url, f, path.name)
                    break
                except (OSError, http.client.HTTPException) as e:
                    if attempt == tries - 1 or isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 416:
                        fail(f"cannot download {url} ({e}); fetch it by other means and put it at {path}")
                    time.sleep(min(2**attempt, 10) * 0.5)
            if size and part.stat().st_size != size:
                fail(f"{part} has {part.stat().st_size} bytes instead of {size}; delete it and start again")
            if sha256:
                with open(part, "rb") as whole:
                    found = hashlib.sha256()
                    while piece := whole.read(2**24):
                        found.update(piece)
                if found.hexdigest() != sha256:
                    fail(f"{part} has SHA-256 {found.hexdigest()[:12]}... instead of {sha256[:12]}...; delete it and start again")
            os.replace(part, path)
    while not path.exists():
        time.sleep(1)
    return path


def transfer(url: str, f, name: str):
    """Appends to the open file f what it lacks of the file at url; raises OSError when the connection breaks."""
    have = f.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing lacks, or these are not this file's bytes
            if e.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            f.truncate(0)
        raise
    with response:
        if have and response.status != 206:  # the server starts over
            have = f.truncate(0)
        total = have + int(response.headers.get("Content-Length") or 0)
        progress = Progress(f"download {name}", max(total // 2**20, 1), "MiB", have // 2**20)
        while chunk := response.read(2**20):
            f.write(chunk)
            have += len(chunk)
            progress.update(have // 2**20)
        f.flush()
        if have < total:
            raise OSError(f"the connection broke at {have} of {total} bytes")


# ---------------------------------------------------------------------------------------------------------------------
# The run: errors, ranks, progress, randomness. Every stage imports these by name.


def fail(message: str):
    """Ends the program over a mistake that the user can mend: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def start_ranks(device: str = "auto") -> torch.device:
    """Joins the process group when torchrun started us (nccl on CUDA, gloo on CPU) and returns this rank's device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device {device} asks for a GPU but torch sees none; use --device cpu")
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except RuntimeError:
        fail(f"--device {device} is no device of this machine; use cpu, cuda or cuda:N")
    if "RANK" in os.environ and not dist.is_initialized():
        # a rank may wait long for another that writes a checkpoint, downloads weights, or has a slower GPU
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    return device


def end_ranks():
    """Waits for the other ranks and leaves the group: a rank that ends while others still talk to it can crash on its way out."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Progress:
    """One line with rate and ETA, on rank 0's stderr: rewritten in place on a terminal, every 10 s in a log file."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit, self.first = what, total, unit, done
        self.start = self.last = time.time()
        self.tty = sys.stderr.isatty()

    def update(self, done: int, note: str = ""):
        """Prints the line if it is time, and always at the end. Cheap enough for every step."""
        now = time.time()
        ended = done >= self.total
        if rank() != 0 or (not ended and now - self.last < (0.2 if self.tty else 10)):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        eta = (self.total - done) / max(rate, 1e-9)
        line = f"{self.what} {done}/{self.total} {self.unit}  {rate:.1f} {self.unit}/s  ETA {clock(eta)}  {note}"
        print(("\r\033[K" if self.tty else "") + line, end="" if self.tty and not ended else "\n", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """125 -> '2:05', 7325 -> '2:02:05'."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class RowNoise:
    """Random numbers for rows [start, stop) of a larger whole, the same whoever computes them.

    The whole is cut into blocks of `block` rows; each block has a generator of its own, seeded with (*key, block index),
    and draws for all of its rows, of which we keep ours. In training the block is the global batch and the key is
    (seed, step); in sampling it is 16 images and the key is (seed,). So neither a resume, nor the number of ranks,
    nor the batch size of sampling changes what row i draws. (CPU and CUDA generators differ from each other.)
    """

    def __init__(self, key: tuple, start: int, stop: int, block: int, device="cpu"):
        first, last = start // block, -(-stop // block)
        self.block, self.rows, self.device = block, slice(start - first * block, stop - first * block), device
        self.generators = [torch.Generator(device).manual_seed(mix(*key, b)) for b in range(first, last)]
        self.host = np.random.default_rng(mix(*key))  # for the few draws that all rows share and Python needs to know

    def _draw(self, function, shape):
        return torch.cat([function((self.block, *shape), generator=g, device=self.device) for g in self.generators])[self.rows]

    def normal(self, *shape) -> torch.Tensor:
        """Standard normal, (rows, *shape)."""
        return self._draw(torch.randn, shape)

    def uniform(self, *shape) -> torch.Tensor:
        """Uniform on [0, 1), (rows, *shape)."""
        return self._draw(torch.rand, shape)

    def gumbel(self, *shape) -> torch.Tensor:
        """Gumbel(0, 1) = -log of an exponential draw, (rows, *shape)."""
        return -(-torch.log1p(-self.uniform(*shape))).clamp_min(1e-20).log()


def mix(*key: int) -> int:
    """A tuple of whole numbers -> one well-mixed 63-bit seed (neighbouring steps get unrelated streams)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
