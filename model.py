"""The networks (DiT, SiT, MAR), what they are trained on, the table of models, and what every stage needs.

    net = build_model("dit-xl", depth=14)          # fresh weights; keys are those of the official releases
    net, config = load_model("dit-xl")             # the official weights (downloaded once); or ckpt=FILE
    objective = net.objective()                    # what the families differ in
    batch = objective.make_batch(x, y, rng)        # all the randomness of a training step
    out = objective.predict(net, batch)            # deterministic
    loss = objective.loss(out, batch)              # (B,)

Read: layers; DiT and SiT; MAR; the Gaussian process; the training objectives; the table of models. Skip what
follows it at first: checkpoints, downloads, ranks, progress, seeded random numbers.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------
# Layers that the families share. B: samples, T: tokens, D: width, C: latent channels.


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D); names as in timm, which all three releases use."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)  # queries, keys, values
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)."""
        B, T, D = x.shape
        qkv = self.qkv(x)  # (B, T, 3D)
        qkv = qkv.view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = x.transpose(1, 2).reshape(B, T, D)  # the heads side by side again
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: tanh-approximated in DiT and SiT, exact in MAR."""

    def __init__(self, width, hidden, approximate, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class TimestepEmbedder(nn.Module):
    """Times (N,), any real numbers -> (N, D): 256 cosines and sines, then an MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        exponents = torch.arange(128, dtype=torch.float32, device=t.device) / 128
        frequencies = torch.exp(-math.log(10000) * exponents)
        angles = t[:, None].float() * frequencies  # (N, 128), in float32 also under autocast
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))  # (N, D)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def sincos_table(width, grid):
    """Fixed 2-D position table (1, grid * grid, width): half of the channels for the column, half for the row."""
    exponents = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
    frequencies = 1 / 10000**exponents
    position = torch.arange(grid * grid)  # row by row
    column = (position % grid).double()
    row = (position // grid).double()
    column = torch.outer(column, frequencies)  # (T, width / 4)
    row = torch.outer(row, frequencies)
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)  # (T, width)
    return table.float()[None]


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def init_adaln(time_mlp, blocks, final_layer):
    """adaLN-Zero: at the start every block is the identity, and the network's output is 0."""
    nn.init.normal_(time_mlp[0].weight, std=0.02)
    nn.init.normal_(time_mlp[2].weight, std=0.02)
    zeroed = [block.adaLN_modulation[1] for block in (*blocks, final_layer)]
    for linear in (final_layer.linear, *zeroed):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


class Prunable:
    """What prune.py and distill.py ask of a network (`check_family` in prune.py checks it).

    block_lists: the names of its nn.ModuleLists of prunable layers, in order. A layer is addressed by its index over
    all of them: MAR-Large's 0-15 are the encoder's, 16-31 the decoder's. It maps (B, T, D) to (B, T, D); its other
    arguments are tensors of B rows. Where it is removed, x passes on unchanged, for all that reads its output.

    channels, input_size, classes: latents are (B, channels, input_size, input_size), labels 0 to classes - 1, and
    `classes` itself means no label. objective(): see the training objectives.

    The network is made by keyword arguments. shape_of(state, known) reads them from its weights; known: the table's.
    It is made without memory and then takes the weights of a file: all that it needs must be in its state dict. `kept`
    is set after that. For --granularity sublayer, blocks have attn, mlp, norm1 and norm2 as MarBlock has."""

    kept = None  # of a pruned network, the original index of each layer: for what depends on it, like long skips

    def layers(self):
        """All prunable layers, in order."""
        return [block for name in self.block_lists for block in getattr(self, name)]

    def depths(self):
        """The number of layers in each list."""
        return [len(getattr(self, name)) for name in self.block_lists]

    def original_indices(self):
        """For each layer its index in the network before any cut."""
        return self.kept or list(range(len(self.layers())))

    def replace_layers(self, layers):
        """Puts these layers, as many as there are, in the places of the present ones; None leaves one out."""
        remaining = iter(layers)
        for name in self.block_lists:
            new = [next(remaining) for _ in getattr(self, name)]
            setattr(self, name, nn.ModuleList(layer for layer in new if layer is not None))

    def keep_layers(self, kept):
        """Removes all layers but those with these indices, in place. IndexError if there is no such layer."""
        layers = self.layers()
        original = self.original_indices()
        for i in kept:
            if not 0 <= i < len(layers):
                raise IndexError(f"there is no layer {i}: the network has layers 0 to {len(layers) - 1}")
        self.replace_layers([layer if i in kept else None for i, layer in enumerate(layers)])
        self.kept = [original[i] for i in sorted(kept)]


# ---------------------------------------------------------------------------------------------------------------
# DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024): the same network.


class DiTBlock(nn.Module):
    """A transformer block whose LayerNorms are shifted, scaled and gated by the condition c (adaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, "tanh")
        # shift, scale and gate of the attention, then of the MLP
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """x (B, T, D), c (B, D) -> (B, T, D). `attn` or `mlp` is None in half a block (see `remove_half`)."""
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 6D); in half a block (B, 1, 3D)
        modulation = modulation.split(x.shape[2], dim=2)
        if self.attn is not None:
            shift, scale, gate = modulation[:3]
            x = x + gate * self.attn(modulate(self.norm1(x), shift, scale))
        if self.mlp is not None:
            shift, scale, gate = modulation[-3:]
            x = x + gate * self.mlp(modulate(self.norm2(x), shift, scale))
        return x


class FinalLayer(nn.Module):
    """Features (..., D), modulated by a condition that broadcasts with them -> outputs (..., out)."""

    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module, Prunable):
    """Noised latents x (B, C, H, W), times t (B,), labels y (B,) -> (B, 2C, H, W): predicted noise, variance."""

    block_lists = ("blocks",)

    def __init__(self, *, width, depth, heads, input_size=32, classes=1000, channels=4, patch=2):
        super().__init__()
        self.input_size = input_size
        self.channels = channels
        self.classes = classes
        self.patch = patch
        # The releases' names: x_embedder.proj, y_embedder.embedding_table.
        to_tokens = nn.Conv2d(channels, width, patch, patch)
        self.x_embedder = nn.ModuleDict(dict(proj=to_tokens))
        self.t_embedder = TimestepEmbedder(width)
        labels = nn.Embedding(classes + 1, width)  # the last label means "no label"
        self.y_embedder = nn.ModuleDict(dict(embedding_table=labels))
        # In the state dict, as the release's is, though it is never trained.
        self.register_buffer("pos_embed", sincos_table(width, input_size // patch))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * 2 * channels)  # noise and variance of each pixel

        self.apply(init_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        init_adaln(self.t_embedder.mlp, self.blocks, self.final_layer)

    @staticmethod
    def shape_of(state, known):
        """The shape of the network that these weights belong to. known: what they cannot say, the heads."""
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        grid = math.isqrt(state["pos_embed"].shape[1])
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        depth = count_blocks(state, "blocks")
        return dict(width=width, depth=depth, heads=known["heads"], input_size=grid * patch, classes=classes,
                    channels=channels, patch=patch)

    def forward(self, x, t, y):
        """(B, C, H, W), (B,), (B,) -> (B, 2C, H, W): predicted noise and variance, channel by channel."""
        x = self.x_embedder.proj(x)  # (B, D, H / patch, W / patch)
        x = x.flatten(2).transpose(1, 2)  # a token for each patch, row by row: (B, T, D)
        x = x + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c[:, None])  # (B, T, patch * patch * 2C)
        return self.unpatchify(x)

    def unpatchify(self, x):
        """(B, T, patch * patch * 2C) -> (B, 2C, H, W)."""
        B = len(x)
        p = self.patch
        grid = self.input_size // p
        x = x.view(B, grid, grid, p, p, 2 * self.channels)
        x = torch.einsum("bhwpqc->bchpwq", x)  # (B, 2C, grid, p, grid, p)
        return x.reshape(B, 2 * self.channels, grid * p, grid * p)

    def objective(self):
        return NoiseObjective(self)


class SiT(DiT):
    """DiT's network with time from 0 (noise) to 1 (data). Output: the velocity (B, C, H, W). The release's
    checkpoints have the head for variances too, and its forward pass drops that second half: so does ours."""

    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, : self.channels]

    def objective(self):
        return VelocityObjective(self)


def count_blocks(state, name):
    """The number of blocks in a list, from the names of the weights: "blocks.11.attn.qkv.weight" is of the 12th."""
    prefix = f"{name}."
    keys = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    return 1 + max((int(key.split(".")[0]) for key in keys), default=-1)


# Half a block: with --granularity sublayer an attention and an MLP are layers of their own.
HALVES = dict(attn="norm1", mlp="norm2")  # each with the LayerNorm before it


def remove_half(block, half):
    """Takes the attention ("attn") or the MLP ("mlp") out of a DiTBlock or MarBlock, in place."""
    setattr(block, half, None)
    setattr(block, HALVES[half], None)
    if hasattr(block, "adaLN_modulation"):  # its first 3D rows modulate the attention, the others the MLP
        linear = block.adaLN_modulation[1]
        other = 1 if half == "attn" else 0
        weight = linear.weight.data.chunk(2)[other]
        bias = linear.bias.data.chunk(2)[other]
        linear.weight = nn.Parameter(weight.clone())
        linear.bias = nn.Parameter(bias.clone())
        linear.out_features = len(bias)


# ---------------------------------------------------------------------------------------------------------------
# MAR (Li et al. 2024): a masked autoencoder over tokens, and a small diffusion network that draws each token.


class MarBlock(nn.Module):
    """The plain pre-norm ViT block, with dropout."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, "none", dropout)

    def forward(self, x):  # (B, T, D)
        if self.attn is not None:
            x = x + self.attn(self.norm1(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm2(x))
        return x


class ResBlock(nn.Module):
    """The token denoiser's block: an MLP with adaLN, on single tokens (N, D)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)  # each (N, D)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class TokenDenoiser(nn.Module):
    """Noised tokens x (N, C), times t (N,), conditions z (N, D) -> (N, 2C): predicted noise, variance."""

    def __init__(self, channels, condition, width, depth):
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)  # z is the condition: what the transformer says of the token
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self.apply(init_linear)
        init_adaln(self.time_embed.mlp, self.res_blocks, self.final_layer)

    def forward(self, x, t, z):
        x = self.input_proj(x)
        c = self.time_embed(t) + self.cond_embed(z)
        for block in self.res_blocks:
            x = block(x, c)
        return self.final_layer(x, c)


class MAR(nn.Module, Prunable):
    """Known tokens -> encoder -> decoder -> a condition z for every token -> the token denoiser.

    `known` (B, K) and `hidden` (B, M) are token indices in ascending order. K and M are equal for all rows, so
    tokens are gathered and scattered without the host waiting for the device. depth: of encoder and decoder
    together, half each, or a list of the two."""

    block_lists = ("encoder_blocks", "decoder_blocks")

    def __init__(self, *, width, depth, heads, loss_width, loss_depth, input_size=16, classes=1000, channels=16,
                 patch=1, buffer=64, dropout=0.1):
        super().__init__()
        self.input_size = input_size
        self.channels = channels
        self.classes = classes
        self.patch = patch
        self.tokens = (input_size // patch) ** 2
        self.token_dim = channels * patch * patch
        self.buffer = buffer  # so many copies of the label go before the image's tokens
        encoder, decoder = depth if isinstance(depth, list) else (depth // 2, depth - depth // 2)

        # The encoder: it sees the label and the known tokens.
        self.class_emb = nn.Embedding(classes, width)
        self.fake_latent = nn.Parameter(0.02 * torch.randn(1, width))
        self.z_proj = nn.Linear(self.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = learned(buffer + self.tokens, width)
        self.encoder_blocks = nn.ModuleList(MarBlock(width, heads, dropout) for _ in range(encoder))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        # The decoder: it sees the encoder's output, and mask tokens in the places of the hidden tokens.
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = learned(1, width)
        self.decoder_pos_embed_learned = learned(buffer + self.tokens, width)
        self.decoder_blocks = nn.ModuleList(MarBlock(width, heads, dropout) for _ in range(decoder))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = learned(self.tokens, width)
        self.apply(init_linear)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        # The token denoiser: from the decoder's output it draws each hidden token.
        denoiser = TokenDenoiser(self.token_dim, width, loss_width, loss_depth)
        self.diffloss = nn.ModuleDict(dict(net=denoiser))  # the release's name

    @staticmethod
    def shape_of(state, known):
        """The shape of the network that these weights belong to. known: what they cannot say, the heads, the
        dropout, and how the values of a token divide into channels and patch."""
        patch = known.get("patch", 1)
        tokens = state["diffusion_pos_embed_learned"].shape[1]
        token_dim = state["z_proj.weight"].shape[1]
        return known | dict(
            width=state["mask_token"].shape[2],
            depth=[count_blocks(state, "encoder_blocks"), count_blocks(state, "decoder_blocks")],
            loss_width=len(state["diffloss.net.input_proj.weight"]),
            loss_depth=count_blocks(state, "diffloss.net.res_blocks"),
            input_size=math.isqrt(tokens) * patch,
            classes=len(state["class_emb.weight"]),
            channels=token_dim // patch**2,
            buffer=state["encoder_pos_embed_learned"].shape[1] - tokens)

    def patchify(self, x):
        """(B, C, H, W) -> (B, T, C * patch * patch)."""
        B, C, H, W = x.shape
        p = self.patch
        x = x.view(B, C, H // p, p, W // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5)  # (B, H / p, W / p, C, p, p)
        return x.reshape(B, self.tokens, self.token_dim)

    def unpatchify(self, tokens):
        """The inverse of patchify."""
        B = len(tokens)
        p = self.patch
        grid = self.input_size // p
        x = tokens.view(B, grid, grid, self.channels, p, p)
        x = x.permute(0, 3, 1, 4, 2, 5)  # (B, C, grid, p, grid, p)
        return x.reshape(B, self.channels, grid * p, grid * p)

    def encode(self, tokens, y, known):
        """tokens (B, T, C), of which only those at `known` are read -> (B, buffer + K, D), buffer tokens first."""
        x = self.z_proj(gather_tokens(tokens, known))  # (B, K, D)
        label = self.class_emb(y.clamp(max=self.classes - 1))  # (B, D)
        no_label = (y == self.classes)[:, None]
        label = torch.where(no_label, self.fake_latent.to(label.dtype), label).to(x.dtype)  # a learned "no label"
        label = label[:, None].expand(-1, self.buffer, -1)  # (B, buffer, D)
        x = torch.cat([label, x], dim=1)  # (B, buffer + K, D)
        position = self.encoder_pos_embed_learned.expand(len(x), -1, -1)
        of_known = gather_tokens(position[:, self.buffer :], known)  # (B, K, D)
        x = x + torch.cat([position[:, : self.buffer], of_known], dim=1)
        x = self.z_proj_ln(x)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, known):
        """The encoder's output -> conditions z (B, T, D) for all tokens, known and hidden."""
        x = self.decoder_embed(x)  # (B, buffer + K, D)
        everywhere = self.mask_token.to(x.dtype).expand(len(x), self.tokens, -1)
        index = known[..., None].expand(-1, -1, x.shape[2])
        tokens = everywhere.scatter(1, index, x[:, self.buffer :])  # (B, T, D)
        x = torch.cat([x[:, : self.buffer], tokens], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer :] + self.diffusion_pos_embed_learned

    def forward(self, tokens, y, known, hidden, x_t, t):
        """Noised hidden tokens x_t (B, R, M, C) at times t (B, R, M), R times each -> (B, R, M, 2C)."""
        z = self.decode(self.encode(tokens, y, known), known)
        z = gather_tokens(z, hidden)  # (B, M, D)
        repeats = x_t.shape[1]
        z = z[:, None].expand(-1, repeats, -1, -1)  # (B, R, M, D)
        out = self.diffloss.net(per_token(x_t), per_token(t), per_token(z))  # (B R M, 2C)
        return out.view(*x_t.shape[:3], -1)

    def objective(self):
        return MaskedTokenObjective(self)


def learned(tokens, width):
    """Learned tokens (1, tokens, width)."""
    return nn.Parameter(0.02 * torch.randn(1, tokens, width))


def gather_tokens(x, index):
    """x (B, T, D), index (B, K) -> (B, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


# ---------------------------------------------------------------------------------------------------------------
# The Gaussian process of DiT and MAR.


class GaussianDiffusion:
    """IDDPM (Nichol & Dhariwal 2021) with noise prediction and learned-range variance, as in both releases.

    schedule: "linear" (DiT) or "cosine" (MAR), 1000 training steps. respacing: see `respace`; a sampler visits only
    those steps. x is (N, C, ...), a network's output (N, 2C, ...), t (N,) indices into the steps that are left."""

    def __init__(self, schedule="linear", respacing="", device="cpu"):
        betas = np.linspace(1e-4, 0.02, 1000) if schedule == "linear" else cosine_betas()
        self.timestep_map = respace(respacing)
        self.steps = len(self.timestep_map)
        abar = np.cumprod(1 - betas)[self.timestep_map]  # abar_t, the product of 1 - beta up to t

        # The coefficients, one for each step, in float64. After respacing, a beta spans several training steps.
        abar = torch.from_numpy(abar).to(device)
        previous = F.pad(abar[:-1], (1, 0), value=1.0)  # abar of the step before; 1 before the first
        betas = 1 - abar / previous
        self.alphas_cumprod_prev = previous
        self.log_betas = betas.log()  # the upper bound of the log variance
        # Of x_t, given x_0 and the noise; and of x_0, given x_t and the noise.
        self.sqrt_alphas_cumprod = abar.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - abar).sqrt()
        self.sqrt_recip_alphas_cumprod = (1 / abar).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / abar - 1).sqrt()
        # Of the posterior q(x_{t-1} | x_t, x_0). Its variance is 0 at t = 0: the release takes that of t = 1.
        variance = betas * (1 - previous) / (1 - abar)
        variance[0] = variance[1]
        self.posterior_log_variance = variance.log()  # the lower bound of the log variance
        self.posterior_mean_coef1 = betas * previous.sqrt() / (1 - abar)
        self.posterior_mean_coef2 = (1 - previous) * (abar / previous).sqrt() / (1 - abar)

    def q_sample(self, x_start, t, eps):
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps."""
        of_x = at(self.sqrt_alphas_cumprod, t, x_start)
        of_eps = at(self.sqrt_one_minus_alphas_cumprod, t, x_start)
        return of_x * x_start + of_eps * eps

    def q_posterior_mean(self, x_start, x_t, t):
        of_x_start = at(self.posterior_mean_coef1, t, x_t)
        of_x_t = at(self.posterior_mean_coef2, t, x_t)
        return of_x_start * x_start + of_x_t * x_t

    def p_mean_variance(self, out, x_t, t):
        """-> mean and log variance of p(x_{t-1} | x_t), and the predicted x_0. The network interpolates the log
        variance between its bounds, the posterior's and beta (IDDPM, eq. 15)."""
        eps, v = out.chunk(2, dim=1)
        low = at(self.posterior_log_variance, t, x_t)
        high = at(self.log_betas, t, x_t)
        log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low  # v = -1: low, v = 1: high
        # x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, solved for x_0
        of_x = at(self.sqrt_recip_alphas_cumprod, t, x_t)
        of_eps = at(self.sqrt_recipm1_alphas_cumprod, t, x_t)
        x_start = of_x * x_t - of_eps * eps
        mean = self.q_posterior_mean(x_start, x_t, t)
        return mean, log_variance, x_start

    def variance_bound(self, out, x_start, x_t, t, target=None):
        """The loss of the learned variances, in bits per dimension, (N,): KL(target || ours) for t > 0, the
        likelihood of x_0 at t = 0. target: a teacher's (mean, log variance); without one, the true posterior's."""
        eps, v = out.chunk(2, dim=1)
        out = torch.cat([eps.detach(), v], dim=1)  # the means get no gradient from here: they have the MSE on the noise
        mean, log_variance, _ = self.p_mean_variance(out, x_t, t)
        if target is None:
            true_mean = self.q_posterior_mean(x_start, x_t, t)
            true_log_variance = at(self.posterior_log_variance, t, x_t)
        else:
            true_mean, true_log_variance = target
        kl = -1 + log_variance - true_log_variance  # of two Gaussians, twice
        kl = kl + (true_log_variance - log_variance).exp()
        kl = kl + (true_mean - mean) ** 2 * (-log_variance).exp()
        nll = -discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, flat_mean(nll), flat_mean(0.5 * kl))
        return bound / math.log(2)  # from nats to bits

    def loss(self, out, x_start, x_t, t, eps):
        """MSE on the noise, and the bound on the variances, (N,)."""
        out = out.float()
        predicted, _ = out.chunk(2, dim=1)
        mse = flat_mean((predicted - eps) ** 2)
        return mse + self.variance_bound(out, x_start, x_t, t)

    def kd(self, out, out_teacher, x_start, x_t, t):
        """MSE of student's and teacher's noise predictions, and KL(teacher || student), (N,)."""
        out = out.float()
        out_teacher = out_teacher.float()
        eps, _ = out.chunk(2, dim=1)  # without the variances
        eps_teacher, _ = out_teacher.chunk(2, dim=1)
        mse = flat_mean((eps - eps_teacher) ** 2)
        mean, log_variance, _ = self.p_mean_variance(out_teacher, x_t, t)
        return mse + self.variance_bound(out, x_start, x_t, t, target=(mean, log_variance))


def at(table, t, like):
    """The coefficients of steps t (N,), as float32 (N, 1, ...), to multiply with `like` (N, ...)."""
    ones = [1] * (like.ndim - 1)
    return table[t].float().view(-1, *ones)


def cosine_betas(steps=1000):
    """IDDPM, eq. 17: abar(t) is a squared cosine; no beta is above 0.999."""
    times = [i / steps for i in range(steps + 1)]
    abar = [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in times]
    betas = [1 - after / before for before, after in zip(abar, abar[1:])]
    return np.minimum(betas, 0.999)


def respace(respacing, total=1000):
    """The training steps that a sampler visits: "250" evenly spread ones, both ends included; "ddim50": every 20th."""
    text = respacing or str(total)
    strided = text.startswith("ddim")
    count = text.removeprefix("ddim")
    count = int(count) if count.isdecimal() else 0
    if strided and count:
        steps = list(range(0, total, math.ceil(total / count)))
        if len(steps) == count:
            return steps
    elif 2 <= count <= total:
        stride = (total - 1) / (count - 1)
        return [round(i * stride) for i in range(count)]
    raise UserError(f"no stride takes {text!r} of {total} steps; give 2 to {total}, or ddimN with N like 25 or 50")


def discretized_log_likelihood(x, mean, log_scale):
    """Log probability of x under a Gaussian that is integrated over bins of width 2/255, as in the releases; the
    outermost bins reach to infinity."""
    inverse = (-log_scale).exp()  # 1 / std
    upper = approximate_cdf(inverse * (x - mean + 1 / 255))
    lower = approximate_cdf(inverse * (x - mean - 1 / 255))
    inside = safe_log(upper - lower)  # the probability of the bin around x
    at_the_right = torch.where(x > 0.999, safe_log(1 - lower), inside)
    return torch.where(x < -0.999, safe_log(upper), at_the_right)


def approximate_cdf(z):
    """Of the standard normal distribution, the tanh approximation."""
    cubic = z + 0.044715 * z**3
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic))


def safe_log(p):
    return p.clamp(min=1e-12).log()


def flat_mean(x):
    """(N, ...) -> (N,)."""
    return x.flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------
# Training objectives. make_batch draws all the randomness of one training step, so that teacher and student can be
# asked about the same batch; predict is the network's answer; loss and kd (against a teacher's answer) are (B,).


def drop_labels(y, rng, classes, probability=0.1):
    """Replaces a tenth of the labels by the null label, so that one network learns both sides of guidance."""
    return torch.where(rng.uniform() < probability, classes, y)


class NoiseObjective:
    """DiT: predict the noise at a uniform timestep, and the variances."""

    def __init__(self, net):
        self.classes = net.classes
        self.diffusion = GaussianDiffusion("linear", device=device_of(net))

    def make_batch(self, x, y, rng):
        """Latents x (B, C, H, W), labels y (B,), RowGenerator -> a dict of tensors with B rows."""
        t = (rng.uniform() * self.diffusion.steps).long()  # (B,), 0 to 999
        eps = rng.normal(*x.shape[1:])
        x_t = self.diffusion.q_sample(x, t, eps)  # x with noise
        return dict(x_start=x, x_t=x_t, t=t, eps=eps, y=drop_labels(y, rng, self.classes))

    def predict(self, net, batch):
        return net(batch["x_t"], batch["t"], batch["y"])

    def loss(self, out, batch):
        return self.diffusion.loss(out, batch["x_start"], batch["x_t"], batch["t"], batch["eps"])

    def kd(self, out, out_teacher, batch):
        return self.diffusion.kd(out, out_teacher, batch["x_start"], batch["x_t"], batch["t"])


class VelocityObjective:
    """SiT: x_t = t x_1 + (1 - t) x_0 from noise x_0 to data x_1; predict the velocity x_1 - x_0."""

    def __init__(self, net):
        self.classes = net.classes

    def make_batch(self, x, y, rng):
        """Latents x (B, C, H, W), labels y (B,), RowGenerator -> a dict of tensors with B rows."""
        t = rng.uniform()  # (B,), on [0, 1)
        eps = rng.normal(*x.shape[1:])
        s = t.view(-1, 1, 1, 1)  # to multiply with images
        x_t = s * x + (1 - s) * eps
        return dict(x_t=x_t, t=t, velocity=x - eps, y=drop_labels(y, rng, self.classes))

    def predict(self, net, batch):
        return net(batch["x_t"], batch["t"], batch["y"])

    def loss(self, out, batch):
        return flat_mean((out.float() - batch["velocity"]) ** 2)

    def kd(self, out, out_teacher, batch):
        return flat_mean((out.float() - out_teacher.float()) ** 2)


class MaskedTokenObjective:
    """MAR: hide 70 to 100 % of the tokens, and predict the noise on each hidden one from what the others say."""

    repeats = 4  # times for each token and step (diffusion_batch_mul), since the denoiser is cheap beside the encoder
    mask_ratio = scipy.stats.truncnorm(-0.3 / 0.25, 0, loc=1.0, scale=0.25)

    def __init__(self, net):
        self.classes = net.classes
        self.patchify = net.patchify
        self.diffusion = GaussianDiffusion("cosine", device=device_of(net))

    def make_batch(self, x, y, rng):
        """Latents x (B, C, H, W), labels y (B,), RowGenerator -> a dict of tensors with B rows. All rows hide the
        same number of tokens, each row in a random order of its own."""
        tokens = self.patchify(x)  # (B, T, C)
        T = tokens.shape[1]
        count = math.ceil(T * self.mask_ratio.ppf(rng.shared.random()))
        order = rng.uniform(T).argsort(dim=1)  # (B, T): a random permutation in each row
        hidden = order[:, :count].sort(dim=1)[0]  # (B, M)
        known = order[:, count:].sort(dim=1)[0]  # (B, K)
        x_start = gather_tokens(tokens, hidden)  # (B, M, C)
        x_start = x_start[:, None].expand(-1, self.repeats, -1, -1)  # (B, R, M, C)
        t = (rng.uniform(self.repeats, count) * self.diffusion.steps).long()  # (B, R, M)
        eps = rng.normal(*x_start.shape[1:])
        x_t = self.diffusion.q_sample(per_token(x_start), per_token(t), per_token(eps)).view_as(eps)
        y = drop_labels(y, rng, self.classes)
        return dict(tokens=tokens, y=y, known=known, hidden=hidden, x_start=x_start, x_t=x_t, t=t, eps=eps)

    def predict(self, net, batch):
        return net(batch["tokens"], batch["y"], batch["known"], batch["hidden"], batch["x_t"], batch["t"])

    def loss(self, out, batch):
        loss = self.diffusion.loss(per_token(out), *self.noised(batch), per_token(batch["eps"]))  # (B R M,)
        return loss.view(len(out), -1).mean(1)

    def kd(self, out, out_teacher, batch):
        loss = self.diffusion.kd(per_token(out), per_token(out_teacher), *self.noised(batch))
        return loss.view(len(out), -1).mean(1)

    def noised(self, batch):
        return per_token(batch["x_start"]), per_token(batch["x_t"]), per_token(batch["t"])


def per_token(v):
    """(B, R, M, ...) -> (B R M, ...): to the process of MAR, each token is a sample."""
    return v.flatten(0, 2)


def device_of(net):
    return next(net.parameters()).device


# ---------------------------------------------------------------------------------------------------------------
# The table of models. An entry says what a weights file cannot:
#   family, shape    what `build_model` builds; for a file only the heads (and MAR's patch and dropout) are taken
#   vae              whose latents the model works on (extract_latents.py: VAES)
#   prune, distill   the defaults of these stages: those of the paper (table 6) and its release
#   sampling         the default sampler with its settings (sample.py)
#   weights          the official file and its address; without: weights/NAME.pt, where that is bundled

DIT_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
TINYDIT_URL = "https://github.com/VainF/TinyFusion/releases/download/v1.0.0/"
SIT_URL = ("https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
           "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1")
MAR_URL = "https://www.dropbox.com/scl/fi/"
MAR_HUGE_URL = MAR_URL + "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1"
MAR_LARGE_URL = MAR_URL + "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1"
MAR_BASE_URL = MAR_URL + "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1"

# ImageNet: epochs; the digits: steps.
PRUNE = dict(batch_size=128, epochs=1, save_every=1000)
# beta: table 6, for the networks of the paper; for others see `default_beta` in distill.py.
DISTILL = dict(batch_size=256, epochs=100, lr=2e-4, ema=0.9999, save_every=5000)
PRUNE_TINY = dict(batch_size=64, steps=250, save_every=100)
DISTILL_TINY = dict(batch_size=64, steps=800, lr=1e-3, ema=0.999, save_every=250)

# Guidance of 3 channels of 4: as in the releases. That of MAR belongs to its published numbers, with 256 rounds.
DDPM = dict(sampler="ddpm", steps=250, guidance=1.5, guidance_channels=3)
SDE = dict(DDPM, sampler="sde-euler", diffusion_form="sigma", last_step="mean", last_step_size=0.04)
ROUNDS = dict(sampler="mar", steps=64, guidance=3.0, guidance_schedule="linear", temperature=1.0, token_steps=100)

DIT_MODEL = dict(family=DiT, vae="sd-ema", prune=PRUNE, distill=DISTILL, sampling=DDPM)
SIT_MODEL = dict(family=SiT, vae="sd-ema", prune=PRUNE, distill=DISTILL, sampling=SDE)
MAR_MODEL = dict(family=MAR, vae="kl16", prune=PRUNE, distill=dict(DISTILL, epochs=40, beta=1e-2),
                 sampling=ROUNDS)

SHAPE_XL = dict(width=1152, depth=28, heads=16)
SHAPE_L = dict(width=1024, depth=24, heads=16)
SHAPE_B = dict(width=768, depth=12, heads=12)
SHAPE_S = dict(width=384, depth=12, heads=6)
SHAPE_TINY = dict(width=96, depth=12, heads=3, input_size=8, classes=10)

DIT_XL = dict(DIT_MODEL, shape=SHAPE_XL, distill=dict(DISTILL, beta=1e-2))
SIT_XL = dict(SIT_MODEL, shape=SHAPE_XL, distill=dict(DISTILL, beta=2e-4))

MODELS = {
    "dit-xl": dict(DIT_XL, weights=("DiT-XL-2-256x256.pt", DIT_URL + "DiT-XL-2-256x256.pt")),
    "dit-xl-512": dict(
        DIT_XL,
        shape=dict(SHAPE_XL, input_size=64),
        weights=("DiT-XL-2-512x512.pt", DIT_URL + "DiT-XL-2-512x512.pt"),
    ),
    "dit-l": dict(DIT_MODEL, shape=SHAPE_L),
    "dit-b": dict(DIT_MODEL, shape=SHAPE_B),
    "dit-s": dict(DIT_MODEL, shape=SHAPE_S),
    "dit-d14": dict(  # the paper's, cut from dit-xl
        DIT_XL,
        shape=dict(SHAPE_XL, depth=14),
        weights=("TinyDiT-D14-MaskedKD-500K.pt", TINYDIT_URL + "TinyDiT-D14-MaskedKD-500K.pt"),
    ),
    "sit-xl": dict(SIT_XL, weights=("SiT-XL-2-256.pt", SIT_URL)),
    "sit-l": dict(SIT_MODEL, shape=SHAPE_L),
    "sit-b": dict(SIT_MODEL, shape=SHAPE_B),
    "sit-s": dict(SIT_MODEL, shape=SHAPE_S),
    "mar-huge": dict(
        MAR_MODEL,
        shape=dict(width=1280, depth=40, heads=16, loss_width=1536, loss_depth=12),
        sampling=dict(ROUNDS, guidance=3.2),
        weights=("mar-huge.pth", MAR_HUGE_URL),
    ),
    "mar-large": dict(
        MAR_MODEL,
        shape=dict(width=1024, depth=32, heads=16, loss_width=1280, loss_depth=8),
        weights=("mar-large.pth", MAR_LARGE_URL),
    ),
    "mar-base": dict(
        MAR_MODEL,
        shape=dict(width=768, depth=24, heads=12, loss_width=1024, loss_depth=6),
        sampling=dict(ROUNDS, guidance=2.9),
        weights=("mar-base.pth", MAR_BASE_URL),
    ),
    # The digits.
    "dit-tiny": dict(
        family=DiT,
        shape=SHAPE_TINY,
        vae="digits",
        prune=PRUNE_TINY,
        distill=DISTILL_TINY,
        sampling=dict(DDPM, steps=64, guidance_channels=4),
    ),
    "sit-tiny": dict(
        family=SiT,
        shape=SHAPE_TINY,
        vae="digits",
        prune=PRUNE_TINY,
        distill=DISTILL_TINY,
        sampling=dict(SDE, steps=64, guidance_channels=4),
    ),
    # Tokens are drawn in strides of 40, from t = 960 on: at t = 999 of the cosine schedule the predicted x_0 holds
    # the network's error times 20,000. A few thousand steps of training do not make that small: samples diverge.
    "mar-tiny": dict(
        family=MAR,
        shape=dict(SHAPE_TINY, loss_width=256, loss_depth=2, channels=4, patch=2, buffer=4, dropout=0.0),
        vae="digits",
        prune=PRUNE_TINY,
        distill=DISTILL_TINY,
        sampling=dict(ROUNDS, steps=8, token_steps="ddim25"),
    ),
}


def model_entry(name):
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}; there are {', '.join(MODELS)}: give one of them to --model")
    return MODELS[name]


def build_model(name, depth=None, **shape):
    """A network with fresh weights. depth and shape: what differs from the table's."""
    entry = model_entry(name)
    shape = entry["shape"] | shape
    if depth is not None:
        shape["depth"] = depth
    net = entry["family"](**shape)
    net.name = name
    return net


def weights_of(name):
    """The file in weights/, and the address that it is from, or None if it is bundled."""
    return model_entry(name).get("weights", (f"{name}.pt", None))


# ---------------------------------------------------------------------------------------------------------------
# Skip the rest at first. Checkpoints: a dict of `model` and `ema` (weights), `config`, `step`, and what resuming
# needs. Official files have no config: --model says what they hold, and the shape is read from the weights.


def load_model(name=None, ckpt=None, device="cpu", weights="ema"):
    """-> (network in eval mode, config). From `ckpt` (any official format), else the table's weights.

    weights: "ema" or "model", where a file has both. config: name and depth (one number per list of blocks); of a
    pruned network also kept (layer indices), scheme, granularity, parent. No weight is copied: the file is mapped."""
    path = ckpt or fetch(*weights_of(name))
    state, config = read_state(path, weights)
    named = config.get("name")  # that of the model
    if named not in MODELS:  # an official file, or one of other people, who have a config too
        if name is None:
            holds = f"holds {named!r}, which is not in the table of models" if named else "does not say what it holds"
            raise UserError(f"{path} {holds}; add --model NAME, the entry whose family and heads it has")
        config = dict(name=name)
    elif name not in (None, named):
        raise UserError(f"{path} holds {named}, not {name}; give --model {named} or another file")
    with reading(path):
        net = network_of(config["name"], state, config.get("layers"))
    return net.to(device).eval(), {**config, "depth": net.depths()}


def network_of(name, state, kept=None):
    """The network of the table's entry `name` that holds these weights, whatever its depth and width. kept: the
    original indices of its layers."""
    entry = model_entry(name)
    with torch.device("meta"):  # fresh weights would be thrown away
        net = build_model(name, **entry["family"].shape_of(state, entry["shape"]))
    remove_missing_halves(net, state)
    net.kept = kept
    load_state(net, state)
    return net.eval()


def remove_missing_halves(net, state):
    """Leaves of a block what the weights have, its attention or its MLP, if they lack the other."""
    for name in net.block_lists:
        for i, block in enumerate(getattr(net, name)):
            for half in HALVES:
                prefix = f"{name}.{i}.{half}."
                if hasattr(block, half) and not any(key.startswith(prefix) for key in state):
                    remove_half(block, half)


def load_state(net, state):
    """Puts `state` into `net` as float32. RuntimeError names the keys or shapes that differ."""
    net.load_state_dict({key: v.float() for key, v in state.items()}, assign=True)


def read_torch(path):
    """torch.load that runs no code (weights_only) and maps the file instead of reading it."""
    harmless = [argparse.Namespace]  # the releases store their command line beside the weights
    with reading(path), torch.serialization.safe_globals(harmless):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def read_state(path, weights="ema"):
    """Anybody's weights file -> (state dict on the CPU, config). Pickled code is never run.

    Reads .safetensors, and torch files, plain or nested under ema, model, model_ema or state_dict, with or without
    DDP's "module." prefix. weights: "ema" or "model", where a file has both. config: {} where there is none."""
    with reading(path):
        if Path(path).suffix == ".safetensors":
            state, config = read_safetensors(path)
        else:
            saved = read_torch(path)
            config = saved.get("config")
            names = (weights, "ema", "model_ema", "model", "state_dict")
            nested = [saved[name] for name in names if isinstance(saved.get(name), dict)]
            state = nested[0] if nested else saved
        # Some files hold counters beside the weights.
        state = {key.removeprefix("module."): v.detach() for key, v in state.items() if isinstance(v, torch.Tensor)}
        if not state:
            raise ValueError("it holds no weights")
        return state, config if isinstance(config, dict) else {}


SAFETENSORS_TYPES = dict(F64=torch.double, F32=torch.float, F16=torch.half, BF16=torch.bfloat16, I64=torch.long)


def read_safetensors(path):
    """-> views of the mapped file, config or None. 8 bytes of header length, a JSON header, raw little-endian bytes."""
    raw = np.memmap(path, np.uint8, mode="c")  # copy on write: the file is never changed
    size = int.from_bytes(bytes(raw[:8]), "little")
    header = json.loads(bytes(raw[8 : 8 + size]))
    data = torch.from_numpy(raw)[8 + size :]
    metadata = header.pop("__metadata__", {})
    config = json.loads(metadata["config"]) if "config" in metadata else None
    state = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = SAFETENSORS_TYPES[entry["dtype"]]
        values = data[start:end]
        if values.data_ptr() % dtype.itemsize:
            values = values.clone()  # other people's headers may leave the values at odd addresses
        state[key] = values.view(dtype).view(entry["shape"])
    return state, config


def write_safetensors(path, state, config):
    """The inverse. `config` is stored as JSON in the header's metadata."""
    codes = {dtype: code for code, dtype in SAFETENSORS_TYPES.items()}
    header = {"__metadata__": {"format": "pt", "config": json.dumps(config)}}
    end = 0
    for key, v in state.items():
        start = end
        end += v.nbytes
        header[key] = dict(dtype=codes[v.dtype], shape=list(v.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned

    def write(temporary):
        with open(temporary, "wb") as f:
            f.write(len(text).to_bytes(8, "little"))
            f.write(text)
            for v in state.values():
                f.write(v.contiguous().flatten().view(torch.uint8).numpy())

    atomic_write(path, write)


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong in here becomes one sentence about the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        stages = dict(shallow="prune", student="distill", samples="sample", meta="extract_latents")
        stage = stages.get(Path(path).stem)
        advice = f"run {stage}.py first" if stage else "give another path or name"
        raise UserError(f"{path} does not exist; {advice}") from None
    except Exception as e:  # damaged files raise all kinds
        words = " ".join(str(e).split())[:100] or type(e).__name__
        raise UserError(f"{path} cannot be read: it is damaged or of another kind ({words}); give another file") from e


def atomic_write(path, write):
    """write(temporary), then a rename: the file is there whole or not at all, also after a kill or a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())  # else a power cut after the rename could leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, **contents):
    atomic_write(path, lambda temporary: torch.save(contents, temporary))


def fetch(file, url):
    """weights/FILE, downloaded the first time: by one rank of each machine, while the others wait."""
    path = ROOT / "weights" / file
    if url and not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        download(url, path)
    barrier()
    return path


def download(url, path):
    """The file appears when it is complete. A connection that breaks is an error."""
    def show(blocks, block_size, total):
        if total > 0:  # a server need not say the length
            progress.total = total
            progress.update(blocks * block_size)

    progress = Progress(f"download {path.name}", 1, "bytes")
    try:
        atomic_write(path, lambda temporary: urllib.request.urlretrieve(url, temporary, show))
    except OSError as e:
        raise UserError(f"cannot download {url} ({e}); try again, or fetch it by other means to {path}") from e


# ---------------------------------------------------------------------------------------------------------------
# Errors, ranks, dtypes, progress, seeded random numbers.


class UserError(Exception):
    """A mistake that the user can fix, in one sentence that ends with what to do. `run_main` prints it."""


def run_main(main):
    """Runs a stage's main. A mistake of the user ends it with one sentence and exit code 2 (of torchrun: 1)."""
    try:
        main()
    except UserError as e:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # most mistakes are found by all ranks: rank 0 prints before torchrun ends them
        print("error:", " ".join(str(e).split()), file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()  # a rank that still talks to one that has left may crash
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def start_ranks(device="auto"):
    """Joins the process group if torchrun started us (nccl on CUDA, gloo on CPU); -> this rank's device."""
    if device in ("auto", "cuda"):
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        use_cuda = device == "cuda" or torch.cuda.is_available()
        device = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}" if use_cuda else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch finds no GPU here; give --device cpu")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun sets it
        timeout = datetime.timedelta(hours=2)  # a rank may wait long for one that downloads, writes, or is slower
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return device


def choose_dtype(name, device):
    """--dtype: auto takes bfloat16 where the hardware has it, float32 where it would be emulated, which is slow."""
    if name != "auto":
        return getattr(torch, name)  # "bfloat16" -> torch.bfloat16
    if device.type == "cpu":  # few processors have it
        native = torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def autocast(device, dtype):
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def cast_frozen(net, dtype):
    """Casts the weights that are not trained to the dtype of the forward pass, once: autocast would cast them again
    at each call, since it remembers a cast only for weights that need a gradient."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
            module.to(dtype)


class Progress:
    """Prints a line with rate and ETA every five seconds, on rank 0's stderr."""

    def __init__(self, what, total, unit, done=0):
        self.what = what
        self.total = total
        self.unit = unit
        self.first = done
        self.start = time.time()
        self.printed = self.start

    def update(self, done, note=""):
        """Prints the line if it is time, and at the end."""
        now = time.time()
        # Printing at every step would fill the log, and slow down short steps.
        if rank() != 0 or (done < self.total and now - self.printed < 5):
            return
        self.printed = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        eta = datetime.timedelta(seconds=round((self.total - done) / max(rate, 1e-6)))
        line = f"{self.what} {done:,}/{self.total:,} {self.unit}  {rate:,.2f} {self.unit}/s  ETA {eta}  {note}"
        print(line, file=sys.stderr, flush=True)


class RowGenerator:
    """Random numbers for rows [start, stop) of a longer list of rows: the same whoever computes them.

    The list is divided into blocks of `block` rows. Each block has a generator, seeded with (*key, block index), that
    draws for all its rows, of which we keep ours. In training the block is the global batch and the key is (seed,
    step); in sampling it is 16 images and (seed,). So neither a resume, nor the number of ranks, nor the batch size
    of sampling changes row i. (CPU and CUDA differ, though.)"""

    def __init__(self, key, start, stop, block, device="cpu"):
        first = start // block  # the blocks from first to end hold our rows
        end = math.ceil(stop / block)
        self.block = block
        self.device = device
        self.rows = slice(start - first * block, stop - first * block)
        self.generators = [torch.Generator(device).manual_seed(make_seed(*key, b)) for b in range(first, end)]
        self.shared = np.random.default_rng(make_seed(*key))  # for what all rows share and Python needs to know

    def _draw(self, function, shape):
        # A block is always drawn whole: the numbers of its rows depend on each other's order.
        blocks = [function((self.block, *shape), generator=g, device=self.device) for g in self.generators]
        return torch.cat(blocks)[self.rows]

    def normal(self, *shape):
        """Standard normal, (rows, *shape)."""
        return self._draw(torch.randn, shape)

    def uniform(self, *shape):
        """On [0, 1), (rows, *shape)."""
        return self._draw(torch.rand, shape)

    def gumbel(self, *shape):
        """Gumbel(0, 1), minus the logarithm of an exponential variable, (rows, *shape)."""
        exponential = -torch.log1p(-self.uniform(*shape))
        return -exponential.clamp_min(1e-20).log()


def make_seed(*key):
    """A tuple of whole numbers -> one well-mixed 63-bit seed (neighbouring steps get unrelated streams)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
