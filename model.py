"""The networks (DiT, SiT, MAR), the noise processes they are trained on, the table of models, and what every run needs.

    python model.py                                # lists the models, and which weights are on this disk

    net = build_model("dit-xl", depth=14)          # fresh weights; state-dict keys are those of the official releases
    net, config = load_model("dit-xl")             # the official weights (downloaded once); or ckpt=FILE
    objective = net.objective()                    # what the families differ in
    batch = objective.make_batch(x, y, noise)            # all the randomness of a training step, for teacher and student
    out = objective.predict(net, batch)            # deterministic
    loss = objective.loss(out, batch)              # (B,)

Read: layers; DiT and SiT; MAR; the Gaussian process; the training objectives; the table of models. At first, skip what
follows it: checkpoints and the plumbing (errors, ranks, progress, seeded noise).
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
import socket
import sys
import time
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
# Layers that the families share. B: samples, T: tokens, D: width.

class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D); names as in timm, which all three releases use."""
    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} is not a multiple of {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
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
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act, self.drop = nn.GELU(approximate=approximate), nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

class TimestepEmbedder(nn.Module):
    """Time (N,), any real number -> (N, D): 256 cosines and sines, then an MLP. The embedding stays in float32."""
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))

def modulate(x, shift, scale):
    return x * (1 + scale) + shift

def sincos_table(width: int, grid: int) -> torch.Tensor:
    """Fixed 2-D position table (1, grid * grid, width): half of the channels for the column, half for the row."""
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    position = torch.arange(grid * grid)
    column, row = (torch.outer(p.double(), omega) for p in (position % grid, position // grid))  # (T, width / 4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()[None]

def init_linear(module: nn.Module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

def init_adaln(time_mlp, blocks, final_layer):
    """adaLN-Zero: at the start every block is the identity, and the network's output is 0."""
    for linear in (time_mlp[0], time_mlp[2]):
        nn.init.normal_(linear.weight, std=0.02)
    for linear in (final_layer.linear, *(block.adaLN_modulation[1] for block in (*blocks, final_layer))):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)

HALVES = ("attn", "mlp")  # what a block consists of

class Prunable:
    """What prune.py and distill.py ask of a network. `block_lists` names its lists of prunable layers, in order. A
    layer is addressed by its index in all of them: MAR-Large's 0-15 are the encoder's, 16-31 the decoder's. It maps
    (B, T, D) to (B, T, D); its other arguments have B rows too. `new_block(halves)` makes one."""
    checkpointing = False  # recompute each block in the backward pass: less memory, a third more work
    def layers(self) -> list:  # all prunable layers, in order
        return [block for name in self.block_lists for block in getattr(self, name)]

    def depths(self) -> list:  # the number of layers in each list
        return [len(getattr(self, name)) for name in self.block_lists]

    def replace_layers(self, layers: list):  # with as many new ones, of which None leaves a layer out
        layers = iter(layers)
        for name in self.block_lists:
            chosen = [next(layers) for _ in getattr(self, name)]
            setattr(self, name, nn.ModuleList(layer for layer in chosen if layer is not None))

    def keep_layers(self, kept: list):  # cuts the network down, in place, to the layers with these indices
        self.replace_layers([layer if i in set(kept) else None for i, layer in enumerate(self.layers())])

    def run_block(self, block, *args):
        again = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(block, *args, use_reentrant=False) if again else block(*args)

def block_plan(depth, lists: int) -> list:
    """Which halves each block of each list holds. depth: 14, [7, 7], or such a plan already."""
    if isinstance(depth, int):
        depth = [depth * (i + 1) // lists - depth * i // lists for i in range(lists)]
    return [[HALVES] * blocks if isinstance(blocks, int) else blocks for blocks in depth]

# ---------------------------------------------------------------------------------------------------------------------
# DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024): the same network.

class DiTBlock(nn.Module):
    """A transformer block whose LayerNorms are shifted, scaled and gated by the condition c (adaLN-Zero). With both
    halves it is the release's block, with one only its attention or only its MLP."""
    def __init__(self, width: int, heads: int, halves=HALVES):
        super().__init__()
        self.halves = tuple(halves)
        if "attn" in halves:
            self.norm1, self.attn = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6), Attention(width, heads)
        if "mlp" in halves:
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(width, 4 * width, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width * len(halves)))

    def forward(self, x, c):  # x (B, T, D), c (B, D)
        modulation = self.adaLN_modulation(c)[:, None].chunk(3 * len(self.halves), dim=2)  # 6 (or 3) x (B, 1, D)
        if "attn" in self.halves:
            shift, scale, gate = modulation[:3]
            x = x + gate * self.attn(modulate(self.norm1(x), shift, scale))
        if "mlp" in self.halves:
            shift, scale, gate = modulation[-3:]
            x = x + gate * self.mlp(modulate(self.norm2(x), shift, scale))
        return x

class FinalLayer(nn.Module):
    """Features (..., D), modulated by a condition that broadcasts with them, -> outputs (..., out)."""
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6), nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

class DiT(nn.Module, Prunable):
    """Noised latents x (B, C, H, W), times t (B,), labels y (B,) -> (B, 2C, H, W): noise prediction and variance."""
    block_lists = ("blocks",)
    def __init__(self, *, width, depth, heads, input_size=32, classes=1000, channels=4, patch=2):
        super().__init__()
        self.input_size, self.channels, self.classes, self.patch = input_size, channels, classes, patch
        self.new_block = functools.partial(DiTBlock, width, heads)
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(channels, width, patch, patch)))  # the releases' names
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(classes + 1, width)))  # the last: no label
        self.register_buffer("pos_embed", sincos_table(width, input_size // patch))
        self.blocks = nn.ModuleList(self.new_block(halves) for halves in block_plan(depth, 1)[0])
        self.final_layer = FinalLayer(width, patch * patch * 2 * channels)
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        init_adaln(self.t_embedder.mlp, self.blocks, self.final_layer)

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed  # patches, row by row: (B, T, D)
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)  # (B, D)
        for block in self.blocks:
            x = self.run_block(block, x, c)
        B, grid, p = len(x), self.input_size // self.patch, self.patch
        x = self.final_layer(x, c[:, None]).view(B, grid, grid, p, p, -1)  # (B, T, patch * patch * 2C) before the view
        return torch.einsum("bhwpqc->bchpwq", x).reshape(B, -1, grid * p, grid * p)

    def objective(self):
        return DiffusionObjective(self)

class SiT(DiT):
    """DiT's network with time from 0 (noise) to 1 (data). Output: the velocity (B, C, H, W). The release's checkpoint
    has the learned-sigma head, and its forward pass drops that second half: so does ours."""
    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, : self.channels]

    def objective(self):
        return InterpolantObjective(self)

# ---------------------------------------------------------------------------------------------------------------------
# MAR (Li et al. 2024): a masked autoencoder over tokens, and a small diffusion network that draws each token.

class MarBlock(nn.Module):
    """The plain pre-norm ViT block, with dropout; or, with one of the halves, its attention or its MLP alone."""
    def __init__(self, width: int, heads: int, dropout: float, halves=HALVES):
        super().__init__()
        self.halves = tuple(halves)
        if "attn" in halves:
            self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads, dropout)
        if "mlp" in halves:
            self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, 4 * width, "none", dropout)

    def forward(self, x):  # (B, T, D)
        if "attn" in self.halves:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x)) if "mlp" in self.halves else x

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
    """Noised tokens x (N, C), times t (N,), conditions z (N, D) -> (N, 2C): noise prediction and variance."""
    def __init__(self, channels: int, condition: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed, self.input_proj = nn.Linear(condition, width), nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self.apply(init_linear)
        init_adaln(self.time_embed.mlp, self.res_blocks, self.final_layer)

    def forward(self, x, t, z):
        x, c = self.input_proj(x), self.time_embed(t) + self.cond_embed(z)
        for block in self.res_blocks:
            x = block(x, c)
        return self.final_layer(x, c)

class MAR(nn.Module, Prunable):
    """Tokens that are known -> encoder -> decoder -> a condition z for every token -> DiffLoss network. `known` (B, K)
    and `hidden` (B, M) are token indices in ascending order. K and M are equal for all rows, so tokens are gathered and
    scattered without the host waiting for the device."""
    block_lists = ("encoder_blocks", "decoder_blocks")
    def __init__(self, *, width, depth, heads, loss_width, loss_depth, input_size=16, classes=1000, channels=16,
                 patch=1, buffer=64, dropout=0.1):
        super().__init__()
        self.input_size, self.channels, self.classes, self.patch = input_size, channels, classes, patch
        self.tokens, self.token_dim, self.buffer = (input_size // patch) ** 2, channels * patch * patch, buffer
        self.new_block = functools.partial(MarBlock, width, heads, dropout)
        encoder, decoder = block_plan(depth, 2)
        self.class_emb = nn.Embedding(classes, width)
        self.fake_latent = nn.Parameter(0.02 * torch.randn(1, width))
        self.z_proj, self.z_proj_ln = nn.Linear(self.token_dim, width), nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, buffer + self.tokens, width))
        self.encoder_blocks = nn.ModuleList(self.new_block(halves) for halves in encoder)
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, buffer + self.tokens, width))
        self.decoder_blocks = nn.ModuleList(self.new_block(halves) for halves in decoder)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, self.tokens, width))
        self.apply(init_linear)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.diffloss = nn.ModuleDict(dict(net=TokenDenoiser(self.token_dim, width, loss_width, loss_depth)))

    def patchify(self, x):  # (B, C, H, W) -> (B, T, C * patch * patch)
        (B, C, H, W), p = x.shape, self.patch
        return x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, self.tokens, self.token_dim)

    def unpatchify(self, tokens):  # the inverse
        B, p, grid = len(tokens), self.patch, self.input_size // self.patch
        x = tokens.view(B, grid, grid, self.channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(B, self.channels, grid * p, grid * p)

    def encode(self, tokens, y, known):
        """tokens (B, T, C), of which only those at `known` are read -> (B, buffer + K, D), buffer tokens first."""
        x = self.z_proj(gather_tokens(tokens, known))  # (B, K, D)
        label = self.class_emb(y.clamp(max=self.classes - 1))  # (B, D); that of the null label is a learned fake class
        label = torch.where((y == self.classes)[:, None], self.fake_latent.to(label.dtype), label)
        position = self.encoder_pos_embed_learned.expand(len(x), -1, -1)
        position = torch.cat([position[:, : self.buffer], gather_tokens(position[:, self.buffer :], known)], dim=1)
        label = label.to(x.dtype)[:, None].expand(-1, self.buffer, -1)
        x = self.z_proj_ln(torch.cat([label, x], dim=1) + position)
        for block in self.encoder_blocks:
            x = self.run_block(block, x)
        return self.encoder_norm(x)

    def decode(self, x, known):
        """Encoder output -> conditions z (B, T, D) for all tokens, known and hidden."""
        x = self.decoder_embed(x)
        full = self.mask_token.to(x.dtype).expand(len(x), self.tokens, -1)
        full = full.scatter(1, known[..., None].expand(-1, -1, x.shape[2]), x[:, self.buffer :])
        x = torch.cat([x[:, : self.buffer], full], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        return self.decoder_norm(x)[:, self.buffer :] + self.diffusion_pos_embed_learned

    def forward(self, tokens, y, known, hidden, x_t, t):
        """Noised hidden tokens x_t (B, R, M, C) at times t (B, R, M), R repeats -> (B, R, M, 2C)."""
        z = gather_tokens(self.decode(self.encode(tokens, y, known), known), hidden)  # (B, M, D)
        z = z[:, None].expand(-1, x_t.shape[1], -1, -1).flatten(0, 2)
        return self.diffloss.net(x_t.flatten(0, 2), t.flatten(), z).view(*x_t.shape[:3], -1)

    def objective(self):
        return MaskedTokenObjective(self)

def gather_tokens(x, index):  # x (B, T, D), index (B, K) -> (B, K, D)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

# ---------------------------------------------------------------------------------------------------------------------
# The Gaussian process of DiT and MAR.

class GaussianDiffusion:
    """IDDPM (Nichol & Dhariwal 2021) with noise prediction and learned-range variance, as in the DiT and MAR releases.
    schedule: "linear" or "cosine", 1000 training steps. respacing: see `respace`; a sampler visits only those steps.
    x is (N, C, ...), a network's output (N, 2C, ...), t (N,) indices into the steps that are left."""
    # Every coefficient, from abar_t (the product of 1 - beta up to t) and the one before it, `previous`.
    FORMULAS = dict(
        alphas_cumprod_prev=lambda abar, previous: previous,
        log_betas=lambda abar, previous: (1 - abar / previous).log(),
        sqrt_alphas_cumprod=lambda abar, previous: abar.sqrt(),
        sqrt_one_minus_alphas_cumprod=lambda abar, previous: (1 - abar).sqrt(),
        sqrt_recip_alphas_cumprod=lambda abar, previous: (1 / abar).sqrt(),
        sqrt_recipm1_alphas_cumprod=lambda abar, previous: (1 / abar - 1).sqrt(),
        log_posterior_variance=lambda abar, previous: ((1 - abar / previous) * (1 - previous) / (1 - abar)).log(),
        posterior_mean_coef1=lambda abar, previous: (1 - abar / previous) * previous.sqrt() / (1 - abar),
        posterior_mean_coef2=lambda abar, previous: (1 - previous) * (abar / previous).sqrt() / (1 - abar))

    def __init__(self, schedule: str = "linear", respacing: str = ""):
        if schedule == "linear":
            betas = np.linspace(1e-4, 0.02, 1000)
        else:
            alpha_bar = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = [min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)]
        self.timestep_map = respace(respacing)
        abar = np.cumprod(1 - np.asarray(betas))[self.timestep_map]
        self.steps, self.table = len(abar), torch.from_numpy(np.stack([abar, np.append(1.0, abar[:-1])]))  # (2, steps)

    def at(self, name, t, like):  # a coefficient at t (N,), in float64 -> float32 (N, 1, ...), to multiply with `like`
        self.table = self.table.to(t.device)
        return self.FORMULAS[name](*self.table[:, t]).float().view(-1, *[1] * (like.ndim - 1))

    def posterior_log_variance(self, t, like):  # -infinity at t = 0, where the release takes that of t = 1
        return self.at("log_posterior_variance", t.clamp(min=1), like)

    def q_sample(self, x_start, t, noise):  # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise
        mean = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        return mean + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean(self, x_start, x_t, t):
        return self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t

    def p_mean_variance(self, out, x_t, t):
        """-> mean and log variance of p(x_{t-1} | x_t), and the predicted x_0. The network interpolates the log
        variance between its bounds, the posterior's and beta (IDDPM, eq. 15)."""
        eps, v = out.chunk(2, dim=1)
        low, high = self.posterior_log_variance(t, x_t), self.at("log_betas", t, x_t)
        log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low
        scale_x, scale_eps = (self.at(f"sqrt_{k}_alphas_cumprod", t, x_t) for k in ("recip", "recipm1"))
        x_start = scale_x * x_t - scale_eps * eps
        return self.q_posterior_mean(x_start, x_t, t), log_variance, x_start

    def variance_bound(self, out, x_start, x_t, t, target=None):
        """The learned variances' loss, bits per dimension, (N,): KL(target || ours) for t > 0, likelihood of x_0 at 0.
        target: (mean, log variance) of a teacher; without one, the true posterior. The means get no gradient."""
        eps, v = out.chunk(2, dim=1)
        mean, log_variance, _ = self.p_mean_variance(torch.cat([eps.detach(), v], dim=1), x_t, t)
        true, log_true = target or (self.q_posterior_mean(x_start, x_t, t), self.posterior_log_variance(t, x_t))
        kl = 0.5 * (-1 + log_variance - log_true + (log_true - log_variance).exp()
                    + (true - mean) ** 2 * (-log_variance).exp())
        nll = -discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
        return torch.where(t == 0, flat_mean(nll), flat_mean(kl)) / math.log(2)

    def loss(self, out, x_start, x_t, t, noise):  # MSE on the noise + the bound on the variances, (N,)
        out = out.float()
        return flat_mean((out.chunk(2, dim=1)[0] - noise) ** 2) + self.variance_bound(out, x_start, x_t, t)

    def kd(self, out, out_teacher, x_start, x_t, t):  # MSE of the noise predictions + KL(teacher || student), (N,)
        out, out_teacher = out.float(), out_teacher.float()
        mse = flat_mean((out.chunk(2, dim=1)[0] - out_teacher.chunk(2, dim=1)[0]) ** 2)
        return mse + self.variance_bound(out, x_start, x_t, t, target=self.p_mean_variance(out_teacher, x_t, t)[:2])

def respace(respacing: str, total: int = 1000) -> list:
    """The training timesteps a sampler visits: "250" evenly spread ones, both ends included; "ddim50": every 20th."""
    match = re.fullmatch(r"(ddim)?([0-9]{1,6})", respacing or str(total))
    if match and match[1]:
        for stride in range(1, total):
            if len(range(0, total, stride)) == int(match[2]):
                return list(range(0, total, stride))
    elif match and 2 <= int(match[2]) <= total:
        stride = (total - 1) / (int(match[2]) - 1)
        return [round(i * stride) for i in range(int(match[2]))]
    raise UserError(f"no stride takes {respacing!r} of {total} steps; give 2 to {total}, or ddimN, N like 25 or 50")

def discretized_log_likelihood(x, mean, log_scale):
    """Log probability of x under a Gaussian integrated over bins of width 2/255, the outermost reaching to infinity."""
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))  # as the releases do
    inverse = (-log_scale).exp()
    upper, lower = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    log = lambda p: p.clamp(min=1e-12).log()
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))

def flat_mean(x):  # (N, ...) -> (N,)
    return x.flatten(1).mean(1)

# ---------------------------------------------------------------------------------------------------------------------
# Training objectives. draw: the randomness of one training step; predict: the network's answer; loss, kd: per sample.

def drop_labels(y, rng, classes, probability=0.1):
    """Replaces a tenth of the labels by the null label, so that one network learns both sides of guidance."""
    return torch.where(rng.uniform() < probability, classes, y)

class DiffusionObjective:
    """DiT: noise prediction at a uniform timestep, learned variances."""
    schedule, inputs = "linear", ("x_t", "t", "y")
    def __init__(self, net):
        self.net, self.diffusion = net, GaussianDiffusion(self.schedule)

    def make_batch(self, x, y, rng):
        """Latents x (B, C, H, W), labels y (B,), rng: RowGenerator -> a batch: dict of tensors with B rows."""
        t, eps = (rng.uniform() * self.diffusion.steps).long(), rng.normal(*x.shape[1:])
        x_t = self.diffusion.q_sample(x, t, eps)
        return dict(x_start=x, x_t=x_t, t=t, eps=eps, y=drop_labels(y, rng, self.net.classes))

    def predict(self, net, batch):
        return net(*(batch[k] for k in self.inputs))

    def loss(self, out, batch):
        return self.per_sample(self.diffusion.loss, out, *(batch[k] for k in ("x_start", "x_t", "t", "eps")))

    def kd(self, out, out_teacher, batch):
        return self.per_sample(self.diffusion.kd, out, out_teacher, *(batch[k] for k in ("x_start", "x_t", "t")))

    def per_sample(self, function, *values):
        return function(*values)

class InterpolantObjective(DiffusionObjective):
    """SiT: x_t = t x_1 + (1 - t) x_0 from noise x_0 to data x_1; the network predicts the velocity x_1 - x_0."""
    def make_batch(self, x, y, rng):  # t is uniform on [0, 1)
        t, eps = rng.uniform(), rng.normal(*x.shape[1:])
        s = t.view(-1, 1, 1, 1)
        return dict(x_t=s * x + (1 - s) * eps, t=t, velocity=x - eps, y=drop_labels(y, rng, self.net.classes))

    def loss(self, out, batch):
        return flat_mean((out.float() - batch["velocity"]) ** 2)

    def kd(self, out, out_teacher, batch):
        return flat_mean((out.float() - out_teacher.float()) ** 2)

class MaskedTokenObjective(DiffusionObjective):
    """MAR: hide 70 to 100 % of the tokens, predict the noise on each hidden one from what the rest says (DiffLoss)."""
    schedule, inputs = "cosine", ("tokens", "y", "known", "hidden", "x_t", "t")
    repeats = 4  # diffusion_batch_mul: timesteps per token, since the small network is cheap beside the encoder
    mask_ratio = scipy.stats.truncnorm(-0.3 / 0.25, 0, loc=1.0, scale=0.25)
    def make_batch(self, x, y, rng):
        """All rows hide the same number of tokens, each in a random order of its own."""
        tokens = self.net.patchify(x)  # (B, T, C)
        count = math.ceil(tokens.shape[1] * self.mask_ratio.ppf(rng.shared.random()))
        order = rng.uniform(tokens.shape[1]).argsort(dim=1)
        hidden, known = order[:, :count].sort(dim=1)[0], order[:, count:].sort(dim=1)[0]
        x_start = gather_tokens(tokens, hidden)[:, None].expand(-1, self.repeats, -1, -1)  # (B, R, M, C)
        t = (rng.uniform(self.repeats, count) * self.diffusion.steps).long()
        eps = rng.normal(*x_start.shape[1:])
        x_t = self.diffusion.q_sample(x_start.flatten(0, 2), t.flatten(), eps.flatten(0, 2)).view_as(eps)
        y = drop_labels(y, rng, self.net.classes)
        return dict(tokens=tokens, y=y, known=known, hidden=hidden, x_start=x_start, x_t=x_t, t=t, eps=eps)

    def per_sample(self, function, *values):
        """Each token is a sample of the process; values (B, R, M, ...) -> the mean of each image's tokens, (B,)."""
        return function(*(v.flatten(0, 2) for v in values)).view(len(values[0]), -1).mean(1)

# ---------------------------------------------------------------------------------------------------------------------
# The table of models. One row says all that a stage has to know of a model:
#   family, shape   what `build_model` builds
#   vae             whose latents it works on (extract_latents.py: VAES)
#   recipe          prune.py's and distill.py's defaults: those of the paper (table 6) and its release
#   sampling        sample.py's defaults: the sampler, and all the settings that the family's samplers have
#   weights         the official file and its address; None: weights/NAME.pt, where that is bundled

XL, L = dict(width=1152, depth=28, heads=16), dict(width=1024, depth=24, heads=16)
B, S = dict(width=768, depth=12, heads=12), dict(width=384, depth=12, heads=6)
TINY = dict(width=96, depth=12, heads=3, input_size=8, classes=10)  # for the bundled digits
MAR_H = dict(width=1280, depth=40, heads=16, loss_width=1536, loss_depth=12)
MAR_L = dict(width=1024, depth=32, heads=16, loss_width=1280, loss_depth=8)
MAR_B = dict(width=768, depth=24, heads=12, loss_width=1024, loss_depth=6)
MAR_TINY = TINY | dict(loss_width=256, loss_depth=2, channels=4, patch=2, buffer=4, dropout=0.0)

def recipe(beta: float, epochs: int) -> dict:
    return dict(prune=dict(batch_size=128, epochs=1, save_every=1000),
                distill=dict(batch_size=256, epochs=epochs, lr=2e-4, ema=0.9999, beta=beta, save_every=5000))

def recipe_tiny(beta: float) -> dict:
    return dict(prune=dict(batch_size=64, steps=250, save_every=100),
                distill=dict(batch_size=64, steps=800, lr=1e-3, ema=0.999, beta=beta, save_every=250))

DDPM = dict(sampler="ddpm", steps=250, guidance=1.5, guidance_channels=3)  # 3 channels of 4: as in the releases
SDE = DDPM | dict(sampler="sde-euler", diffusion_form="sigma", last_step="mean", last_step_size=0.04)
SHORT = dict(steps=64, guidance_channels=4)
# The guidance is that of MAR's published numbers, which take 256 rounds (--steps 256).
ROUNDS = dict(sampler="mar", steps=64, guidance=3.0, guidance_schedule="linear", temperature=1.0, token_steps=100)

DIT_URL, MAR_URL = "https://dl.fbaipublicfiles.com/DiT/models/{}", "https://www.dropbox.com/scl/fi/"
TINYDIT_URL = "https://github.com/VainF/TinyFusion/releases/download/v1.0.0/{}"
SIT_URL = "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/{}?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1"

def row(family, shape, vae, recipe, sampling, file=None, url="") -> dict:
    weights = file and (file, url.format(file))
    return dict(family=family, shape=shape, vae=vae, recipe=recipe, sampling=sampling, weights=weights)

DIT_ROW, SIT_ROW = ("sd-ema", recipe(1e-2, 100), DDPM), ("sd-ema", recipe(2e-4, 100), SDE)
MAR_ROW = ("kl16", recipe(1e-2, 40))
MODELS = {
    "dit-xl": row(DiT, XL, *DIT_ROW, "DiT-XL-2-256x256.pt", DIT_URL),
    "dit-xl-512": row(DiT, XL | dict(input_size=64), *DIT_ROW, "DiT-XL-2-512x512.pt", DIT_URL),
    "dit-l": row(DiT, L, *DIT_ROW),
    "dit-b": row(DiT, B, *DIT_ROW),
    "dit-s": row(DiT, S, *DIT_ROW),
    "dit-d14": row(DiT, XL | dict(depth=14), *DIT_ROW, "TinyDiT-D14-MaskedKD-500K.pt", TINYDIT_URL),  # cut from dit-xl
    "dit-tiny": row(DiT, TINY, "digits", recipe_tiny(1e-2), DDPM | SHORT),
    "sit-xl": row(SiT, XL, *SIT_ROW, "SiT-XL-2-256.pt", SIT_URL),
    "sit-l": row(SiT, L, *SIT_ROW),
    "sit-b": row(SiT, B, *SIT_ROW),
    "sit-s": row(SiT, S, *SIT_ROW),
    "sit-tiny": row(SiT, TINY, "digits", recipe_tiny(2e-4), SDE | SHORT),
    "mar-huge": row(MAR, MAR_H, *MAR_ROW, ROUNDS | dict(guidance=3.2), "mar-huge.pth",
                    MAR_URL + "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1"),
    "mar-large": row(MAR, MAR_L, *MAR_ROW, ROUNDS, "mar-large.pth",
                     MAR_URL + "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1"),
    "mar-base": row(MAR, MAR_B, *MAR_ROW, ROUNDS | dict(guidance=2.9), "mar-base.pth",
                    MAR_URL + "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1"),
    # Tokens are drawn in strides of 40, from t = 960 on: at t = 999 of the cosine schedule the predicted x_0 holds the
    # network's error times 20,000. A few thousand steps of training do not make that small: samples would diverge.
    "mar-tiny": row(MAR, MAR_TINY, "digits", recipe_tiny(1e-2), ROUNDS | dict(steps=8, token_steps="ddim25")),
}

def row_of(name: str) -> dict:
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]

def build_model(name: str, depth=None, **overrides) -> nn.Module:
    """A network with fresh weights. depth: another number of blocks, or a plan (see `block_plan`)."""
    shape = row_of(name)["shape"] | overrides
    return row_of(name)["family"](**shape | dict(depth=shape["depth"] if depth is None else depth))

def weights_of(name: str) -> tuple:  # the file in weights/, and the address it is from, or None if it is bundled
    return row_of(name)["weights"] or (f"{name}.pt", None)

def list_models():
    """Prints the table: name, layers, parameters, where the weights are from, and which are on this disk."""
    for name in MODELS:
        with torch.device("meta"):
            net = build_model(name)
        size, (file, url) = sum(p.numel() for p in net.parameters()) / 1e6, weights_of(name)
        here = (ROOT / "weights" / file).exists()
        source = (f"from {url.split('?')[0]}" if url else "bundled" if here else "none known") + ", on this disk" * here
        print(f"{name:<10} {sum(net.depths()):>2} layers {size:>6.1f} M parameters   weights/{file}: {source}")

# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, to be skipped at first. Checkpoints: a dict of `model`, `ema` (weights), `config`, `step`, and what resuming
# needs. Official files have no config: --model says what they hold, and the depth is read from the keys.

def load_model(name: str = None, ckpt: str = None, device="cpu", weights: str = "ema"):
    """-> (network in eval mode, config). From `ckpt` (a path, a URL, any official format), else the table's weights.
    weights: "ema" or "model", where a file has both. config: name, depth (one entry per block list), overrides of the
    table's shape; of a pruned network also kept (layer indices), scheme, granularity, parent. No weight is copied."""
    path = locate(ckpt) if ckpt else fetch(*weights_of(name))
    state, config = read_state(path, weights)
    if not config or config["name"] not in MODELS:  # official, or other people's, who have a `config` too
        if name is None:
            raise UserError(f"{path} does not say which model it holds; add --model NAME")
        config = dict(name=name)
    if name not in (None, config["name"]):
        raise UserError(f"{path} holds {config['name']}, not {name}; give --model {config['name']} or another --ckpt")
    with reading(path), torch.device("meta"):
        plan = [plan_of(state, blocks) for blocks in row_of(config["name"])["family"].block_lists]
        net = build_model(config["name"], plan, **checked_overrides(config, state))
        load_state(net, state, path)
    return net.to(device).eval(), {**config, "depth": net.depths()}

def plan_of(state: dict, blocks: str) -> list:
    """From the names of the weights: which halves each block of a list holds, see `block_plan`."""
    names = (re.match(rf"{blocks}\.(\d+)\.(attn|mlp)\.", key) for key in state)
    found = sorted({(int(m[1]), m[2]) for m in names if m})
    return [tuple(half for _, half in block) for _, block in itertools.groupby(found, lambda pair: pair[0])]

def checked_overrides(config: dict, state: dict) -> dict:
    """A config may hold anything, also a width of 10^9: no number may be above the longest side of the weights."""
    kinds = dict(overrides=dict, kept=list, scheme=list, granularity=str, parent=str)
    valid = all(isinstance(config.get(k, kind()), kind) for k, kind in kinds.items())
    overrides, longest = config.get("overrides", {}), max(side for v in state.values() for side in (1, *v.shape))
    if not valid or any(not 0 <= v <= longest or k != "dropout" and type(v) is not int for k, v in overrides.items()):
        raise ValueError(f"its config {config}")
    return overrides

def load_state(net: nn.Module, state: dict, source):
    """Puts `state` into `net`, all keys and shapes equal, as float32; UserError that names the first difference."""
    looks = lambda tensors: {k: tuple(v.shape) if v.is_floating_point() else v.dtype for k, v in tensors.items()}
    wanted, found = looks(net.state_dict()), looks(state)
    wrong = [k for k in wanted | found if wanted.get(k) != found.get(k)]
    if wrong:
        pair = f"{found.get(wrong[0], 'missing')} in the file, {wanted.get(wrong[0], 'none')} in the model"
        raise UserError(f"{source} does not fit the model asked for, {len(wrong)} tensors differ, the first "
                        f"{wrong[0][:80]!r}: {pair}; give another file or another --model")
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, assign=True)

# What releases store beside their weights: arguments, and numbers of numpy, whose maker has two names.
MAKE_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [argparse.Namespace, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType,
            (MAKE_SCALAR, "numpy.core.multiarray.scalar"), (MAKE_SCALAR, "numpy._core.multiarray.scalar")]

def read_torch(path) -> dict:
    """torch.load that runs no code (weights_only) and maps the file instead of reading it."""
    with reading(path), torch.serialization.safe_globals(HARMLESS):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))

def read_state(path, weights: str = "ema"):
    """A weights file of anybody -> (state dict on the CPU, our config or None). Never runs pickled code. Reads
    `.safetensors`, and torch files, plain or nested under ema, model, model_ema or state_dict, with or without DDP's
    "module." prefix. weights: "ema" or "model", where a file has both."""
    with reading(path):
        if Path(path).suffix == ".safetensors":
            state, config = read_safetensors(path)
        else:
            saved, names = read_torch(path), ["ema", "model_ema"] * (weights == "ema") + ["model", "state_dict"]
            state = next((saved[k] for k in names if isinstance(saved.get(k), dict)), saved)
            config = saved.get("config")
        usable = lambda v: isinstance(v, torch.Tensor) and v.layout == torch.strided and v.device.type == "cpu"
        state = {k.removeprefix("module."): v.detach() for k, v in state.items() if usable(v)}
        if not state:
            raise ValueError("it holds no weights")
        return state, config if isinstance(config, dict) and isinstance(config.get("name"), str) else None

SAFETENSORS_TYPES = dict(F64=torch.double, F32=torch.float, F16=torch.half, BF16=torch.bfloat16, BOOL=torch.bool,
                         I64=torch.long, I32=torch.int, I16=torch.short, I8=torch.int8, U8=torch.uint8)

def read_safetensors(path):
    """-> views of the mapped file, config or None. 8 bytes of header length, a JSON header, raw little-endian bytes."""
    raw = np.memmap(path, np.uint8, mode="c")
    size, state, config = int.from_bytes(bytes(raw[:8]), "little"), {}, None
    header = json.loads(bytes(raw[8 : 8 + min(size, 10**8)]))  # the format's own limit
    data = torch.from_numpy(raw)[8 + size :]
    with contextlib.suppress(KeyError, ValueError):
        config = json.loads(header.pop("__metadata__", {})["config"])
    for k, v in header.items():
        start, end = v["data_offsets"]
        if not 0 <= start <= end <= len(data):
            raise ValueError(f"{k} is outside")
        piece, dtype = data[start:end], SAFETENSORS_TYPES[v["dtype"]]
        aligned = piece if piece.data_ptr() % dtype.itemsize == 0 else piece.clone()
        state[k] = aligned.view(dtype).view(v["shape"])
    return state, config

@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong in here becomes one sentence about the file: its bytes may be anything."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        stage = dict(shallow="prune", student="distill", samples="sample", meta="extract_latents").get(Path(path).stem)
        raise UserError(f"{path} does not exist; {f'{stage}.py writes it' if stage else 'give another file'}") from None
    except Exception as e:
        words = " ".join(str(e).split())[:100] or type(e).__name__
        raise UserError(f"{path} cannot be read, it is damaged or of another kind ({words}); give another file") from e

def atomic_write(path, write):
    """write(temporary), then rename: a file is there whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())  # a power cut after the rename must not leave an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports an unwritable folder as a RuntimeError
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; choose another --out") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

def save_checkpoint(path, **contents):
    atomic_write(path, lambda temporary: torch.save(contents, temporary))

def locate(path_or_url: str) -> Path:  # a path as it is; a URL downloaded to weights/
    if not re.match(r"https?://", str(path_or_url)):
        return Path(path_or_url)
    tag = hashlib.sha256(path_or_url.encode()).hexdigest()[:8]  # many releases call their file checkpoint-last.pth
    return fetch(f"{tag}-{Path(path_or_url.split('?')[0]).name}", path_or_url)

def fetch(file: str, url: str) -> Path:
    """weights/FILE, downloaded the first time: one rank per machine loads, and all meet here, whatever they have."""
    if url and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        download(url, ROOT / "weights" / file)
    barrier()
    return ROOT / "weights" / file

def download(url: str, path: Path, tries: int = 5):
    """Fetches url to path, if that is not there. A broken transfer goes on where it broke, also in a later run."""
    part = path.with_name(f"{path.name}.{socket.gethostname()}.part")  # machines may share the folder
    for attempt in range(tries):
        if path.exists():
            return part.unlink(missing_ok=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=30) as response:
                have = have if response.status == 206 else 0  # else the server starts over
                total = have + int(response.headers.get("Content-Length") or 0)
                progress = Progress(f"download {path.name}", max(total // 2**20, 1), "MiB", have // 2**20)
                if not have:
                    part.touch()
                with open(part, "r+b") as f:  # neither appended nor cut: two programs may write the same bytes to it
                    f.seek(have)
                    while chunk := response.read(2**20):
                        have += f.write(chunk)
                        progress.update(have // 2**20)
            if have >= total:
                os.truncate(part, have)
                return os.replace(part, path)
            reason = f"the connection broke at {have} of {total} bytes"
        except Exception as e:
            reason, code = e, getattr(e, "code", 500)
            if code == 416:  # what is here is not the beginning of the file there
                part.unlink(missing_ok=True)
            elif code < 500:
                break
        time.sleep(0.2 * 2**attempt)
    raise UserError(f"cannot download {url} ({reason}); fetch it by other means and put it at {path}")

# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: errors, flags, ranks, dtypes, progress, seeded noise.

class UserError(Exception):
    """A mistake that the user can fix, in one sentence that ends with what to do. `run_main` prints it."""

class Stopped(Exception):
    """A signal ended the run in good order: `run_main` prints why, and the exit code is 0."""

def run_main(main):
    """A stage's main, with mistakes told in one sentence and exit code 2 (torchrun makes a 1 of it)."""
    try:
        main()
    except Stopped as e:
        print(e, flush=True)
    except UserError as e:  # without waiting for the other ranks, which may sit in a collective: torchrun ends them
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # most mistakes are found by all ranks, and rank 0 tells
        print("error:", " ".join(str(e).split()), file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()  # ranks that still talk to one that has left may crash
        dist.destroy_process_group()

class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one sentence, like all others."""
    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")

def number(kind, least=0, most=sys.float_info.max, open_low=False):
    """An argparse type: a finite number of a kind, int or float, from `least` (above it, if open_low) to `most`."""
    limits = f"{'above' if open_low else 'of at least'} {least}" + f" and at most {most}" * (most < sys.float_info.max)
    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if (least < value if open_low else least <= value) and value <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {limits}")
    return parse

whole, real = functools.partial(number, int), functools.partial(number, float)  # whole(1); real(0, open_low=True)

rank = lambda: dist.get_rank() if dist.is_initialized() else 0
world_size = lambda: dist.get_world_size() if dist.is_initialized() else 1
barrier = lambda: dist.is_initialized() and dist.barrier()

def start_ranks(device: str = "auto") -> torch.device:
    """Joins the process group when torchrun started us (nccl on CUDA, gloo on CPU) and returns this rank's device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(count, 1)}"
    name = dict(auto=own if count else "cpu", cuda=own).get(device, device)
    if name not in ("cpu", *(f"cuda:{i}" for i in range(count))):
        raise UserError(f"--device {device} is not on this machine; use auto, cpu, cuda or cuda:N")
    place = torch.device(name)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    elif sys.platform == "linux":
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD: keep what large tensors leave, as
            ctypes.CDLL(None).mallopt(option, value)  # the system would clear its pages anew for the next one
    if "RANK" in os.environ and not dist.is_initialized():
        # A rank may wait long for one that downloads, writes, or is slower. nccl would guess its device from the rank.
        backend, own = ("nccl", place) if place.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2), device_id=own)
    return place

def on_rank_0(function):
    """function() of rank 0, on all ranks. A UserError there is raised on all."""
    try:
        result = [function() if rank() == 0 else None]
    except UserError as e:
        result = [e]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]

def choose_dtype(name: str, device) -> torch.dtype:
    """--dtype: auto takes bfloat16 where the hardware has it, float32 where it would be emulated, which is slow."""
    if name != "auto":
        return getattr(torch, name)
    native = torch.cpu._is_amx_tile_supported() if device.type == "cpu" else torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if native else torch.float32

def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def cast_frozen(net: nn.Module, dtype):
    """Casts the weights that are not trained to the dtype of the forward pass, once. Autocast would cast them at each
    call: it remembers the result only for those that require a gradient."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
            module.to(dtype)

class Progress:
    """One line with rate and ETA, on rank 0's stderr: rewritten in place on a terminal, every 10 s in a log file."""
    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit, self.first = what, total, unit, done
        self.start, self.last, self.tty = time.time(), time.time(), sys.stderr.isatty()

    def update(self, done: int, note: str = ""):  # prints the line if it is time, and at the end
        now, ended = time.time(), done >= self.total
        if rank() != 0 or (not ended and now - self.last < (0.2 if self.tty else 10)):
            return
        self.last, rate = now, (done - self.first) / max(now - self.start, 1e-9)
        eta = datetime.timedelta(seconds=int(min((self.total - done) / max(rate, 1e-9), 1e9)))
        line = f"{self.what} {done}/{self.total} {self.unit}  {rate:.1f} {self.unit}/s  ETA {eta}  {note}"
        start, end = ("\r\033[K" if self.tty else ""), ("" if self.tty and not ended else "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)

class RowGenerator:
    """Random numbers for rows [start, stop) of a larger whole, the same whoever computes them. The whole is cut into
    blocks of `block` rows; each has a generator, seeded with (*key, block index), that draws for all its rows, of which
    we keep ours. In training the block is the global batch and the key (seed, step); in sampling it is 16 images and
    (seed,). So no resume, number of ranks or batch size of sampling changes row i. (CPU and CUDA differ, though.)"""
    def __init__(self, key: tuple, start: int, stop: int, block: int, device="cpu"):
        first, last = start // block, -(-stop // block)
        self.block, self.rows, self.device = block, slice(start - first * block, stop - first * block), device
        self.generators = [torch.Generator(device).manual_seed(make_seed(*key, b)) for b in range(first, last)]
        self.shared = np.random.default_rng(make_seed(*key))  # for the few draws that all rows share and Python needs to know

    def _draw(self, function, shape, lists=()):  # lists: leading dimensions, before the rows
        blocks = [function((*lists, self.block, *shape), generator=g, device=self.device) for g in self.generators]
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=len(lists))
        return whole.narrow(len(lists), self.rows.start, self.rows.stop - self.rows.start)

    def normal(self, *shape) -> torch.Tensor:  # standard normal, (rows, *shape)
        return self._draw(torch.randn, shape)

    def uniform(self, *shape, lists=()) -> torch.Tensor:  # on [0, 1), (*lists, rows, *shape)
        return self._draw(torch.rand, shape, lists)

    def gumbel(self, *shape, lists=()) -> torch.Tensor:  # Gumbel(0, 1) = -log of an exponential, (*lists, rows, *shape)
        return -(-torch.log1p(-self.uniform(*shape, lists=lists))).clamp_min(1e-20).log()

def make_seed(*key: int) -> int:
    """A tuple of whole numbers -> one well-mixed 63-bit seed (neighbouring steps get unrelated streams)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))

if __name__ == "__main__":
    run_main(list_models)
