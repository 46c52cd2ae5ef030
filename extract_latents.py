"""Images -> latents on disk: what the diffusion transformers are trained on, encoded once instead of at every step.

    python extract_latents.py                                                 # the bundled digits -> out/latents
    python extract_latents.py --data photos --vae sd-ema --out out/photos     # a folder of class folders
    torchrun --nproc_per_node=8 extract_latents.py --data imagenet/train --vae kl16 --out out/latents-kl16

An image, centre-cropped as in ADM, goes through the encoder of a KL autoencoder (VAE), which gives a Gaussian: a mean
and a standard deviation for each latent value. These moments are stored, of the image and of its mirror image, rather
than a sample, so that each epoch draws fresh latents. A folder of latents holds

    moments.npy   (N, flips, 2C, H, W) float16: C means, then C standard deviations, unscaled; flips is 1 or 2
    labels.npy    (N,) int64, -1 where the image could not be read (`Latents` leaves such rows out)
    meta.json     VAE, scale, image size, class names, count; "complete" is false until the other two are there

Ranks encode shards, some hundred images each, into files of their own, which rank 0 joins at the end (for that moment
they take twice the room). The shard, not the rank, decides which images are encoded together: so a run that was
killed continues with the shards that are missing, on any number of ranks, and ends in the same bytes. The same command
starts and continues. An image that cannot be read is named in a warning and in meta.json and left out; the exit code
is 0 all the same, as another try (torchrun --max-restarts) would not help. With --strict it is 2, and the run ends.
"""
import argparse
import concurrent.futures
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
import time
import zlib
from collections import OrderedDict
from itertools import repeat, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from model import (ROOT, Parser, Progress, RowGenerator, UserError, autocast, barrier, choose_dtype, fetch, load_state,
                   locate, make_seed, on_rank_0, rank, read_state, reading, run_main, start_ranks, whole, world_size,
                   atomic_write)

DIGITS = ROOT / "data" / "mnist_train10k.npz"

# ---------------------------------------------------------------------------------------------------------------------
# The VAE. Names of the weights are those of diffusers' AutoencoderKL.

# scale: what latents are multiplied by for a standard deviation of about 1 (Rombach et al., arXiv 2112.10752, D.1).
# flip, batch_size (images encoded together) and shard (images per file) are defaults of the extraction.
SD = dict(channels=[128, 256, 512, 512], layers=2, latent=4, groups=32, image_channels=3, image_size=256, scale=0.18215,
          flip=True, batch_size=32, shard=256)
KL16 = SD | dict(channels=[128, 128, 256, 256, 512], latent=16, encoder_attention=True, scale=0.2325)
STABILITY = "https://huggingface.co/stabilityai/sd-vae-ft-{}/resolve/main/diffusion_pytorch_model.safetensors"
VAES = {
    # The digits' own (reproduce/train_vae.py): its file, weights/vae-digits.pt, says the scale.
    "digits": dict(channels=[16, 32, 32], layers=1, latent=4, groups=8, image_channels=1, image_size=32, scale=None,
                   flip=False, batch_size=250, shard=250, weights=None),
    "sd-ema": SD | dict(weights=("sd-vae-ft-ema.safetensors", STABILITY.format("ema"))),
    "sd-mse": SD | dict(weights=("sd-vae-ft-mse.safetensors", STABILITY.format("mse"))),
    "kl16": KL16 | dict(weights=("kl16.ckpt", "https://www.dropbox.com/scl/fi/hhmuvaiacrarfg28qxhwz/kl16.ckpt"
                                              "?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1")),
}

class ResnetBlock(nn.Module):
    """Two 3x3 convolutions after GroupNorm and SiLU, around a shortcut."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x), inplace=True))  # new memory was a tenth of the encoder's time
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)

class AttentionBlock(nn.Module):
    """Self-attention with one head over all H * W places."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h)[:, 0].transpose(1, 2).reshape(x.shape)

class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and at the bottom only

class Upsample(nn.Module):
    """A 3x3 convolution of the image with every pixel doubled, conv(F.interpolate(x, scale_factor=2)); 4/9 of the work.
    Two of a kernel's three rows see the same pixels: the last two where the output's row is even, the first two where
    it is odd. Their weights are added beforehand, which leaves one 2x2 convolution per parity."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):  # (B, c, H, W) -> (B, c, 2H, 2W)
        (n, c, h, w), k = x.shape, self.conv.weight
        for dim in (2, 3):  # (c, c, 3, 3) -> (c, c, 4, 4): two for even rows and columns, two for odd ones
            first, middle, last = k.unbind(dim)
            k = torch.stack([first, middle + last, first + middle, last], dim)
        k, x = k.contiguous(memory_format=torch.channels_last), F.pad(x, (1, 1, 1, 1))
        out = torch.empty((n, c, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for i, j in (0, 0), (0, 1), (1, 0), (1, 1):
            kernel = k[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            out[:, :, i::2, j::2] = F.conv2d(x[:, :, i : i + h + 1, j : j + w + 1], kernel, self.conv.bias)
        return out

class Level(nn.Module):
    """Residual blocks at one resolution, the first `attentions` of them before attention; then down, up or neither."""

    def __init__(self, c_in, c_out, layers, groups, attentions=0, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        self.attentions = nn.ModuleList([AttentionBlock(c_out, groups) for _ in range(attentions)])
        self.downsamplers = nn.Sequential(*[Downsample(c_out)] * down)
        self.upsamplers = nn.Sequential(*[Upsample(c_out)] * up)

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, H, W), at half the side with `down`, twice the side with `up`
        for resnet, attention in zip_longest(self.resnets, self.attentions, fillvalue=nn.Identity()):
            x = attention(resnet(x))
        return self.upsamplers(self.downsamplers(x))

def encoder(channels, layers, latent, groups, image_channels, encoder_attention=False, **_):
    """Images (B, 3, fH, fW) -> moments (B, 2C, H, W), before quant_conv; f = 2^(levels - 1)."""
    last = len(channels) - 1
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(image_channels, channels[0], 3, padding=1),
        down_blocks=nn.Sequential(*[
            Level(channels[max(i - 1, 0)], c, layers, groups, layers * (encoder_attention and i == last), down=i < last)
            for i, c in enumerate(channels)]),
        mid_block=Level(channels[-1], channels[-1], 2, groups, attentions=1),
        conv_norm_out=nn.GroupNorm(groups, channels[-1], eps=1e-6),
        silu=nn.SiLU(inplace=True),
        conv_out=nn.Conv2d(channels[-1], 2 * latent, 3, padding=1)))

def decoder(channels, layers, latent, groups, image_channels, **_):
    """Latents (B, C, H, W), after post_quant_conv -> images (B, 3, fH, fW)."""
    channels, last = channels[::-1], len(channels) - 1
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(latent, channels[0], 3, padding=1),
        mid_block=Level(channels[0], channels[0], 2, groups, attentions=1),
        up_blocks=nn.Sequential(*[
            Level(channels[max(i - 1, 0)], c, layers + 1, groups, up=i < last) for i, c in enumerate(channels)]),
        conv_norm_out=nn.GroupNorm(groups, channels[-1], eps=1e-6),
        silu=nn.SiLU(inplace=True),
        conv_out=nn.Conv2d(channels[-1], image_channels, 3, padding=1)))

class AutoencoderKL(nn.Module):
    """Images in [-1, 1] <-> latents; `config` is a row of VAES. float32 in and out; computes in `dtype` (autocast)."""

    def __init__(self, config: dict, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype, self.scale = config, dtype, config["scale"]
        self.factor = 2 ** (len(config["channels"]) - 1)  # pixels per side of a latent value
        c = config["latent"]
        self.encoder, self.decoder = encoder(**config), decoder(**config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def encode(self, x):
        """-> mean, std, each (B, C, H, W): the posterior's moments, unscaled."""
        with autocast(x.device, self.dtype):
            moments = self.quant_conv(self.encoder(x))
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(-30, 20)).exp()

    def decode(self, z):
        """Unscaled latents -> images, not clamped."""
        with autocast(z.device, self.dtype):
            return self.decoder(self.post_quant_conv(z)).float()

def load_vae(name: str = "digits", ckpt=None, device="cpu", dtype=torch.float32) -> AutoencoderKL:
    """A frozen VAE with the weights of `ckpt` (path or URL; diffusers or latent-diffusion keys), else of the table."""
    row = VAES[name]
    bundled = ROOT / "weights" / f"vae-{name}.pt"
    path = locate(ckpt) if ckpt else fetch(*row["weights"]) if row["weights"] else bundled
    state, config = read_state(path)
    config = row | (config or dict(name=name))
    if config["name"] != name or config["scale"] is None:
        raise UserError(f"{path} does not hold the VAE {name}; give another --ckpt, or another --vae")
    with reading(path), torch.device("meta"):
        vae = AutoencoderKL(config, dtype)
        load_state(vae, rename_vae_keys(state), path)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

# What the latent-diffusion code calls them -> what we do; within attention there are old diffusers' names, too.
RENAMED = (
    ("encoder.down.", "encoder.down_blocks."), (".block.", ".resnets."), (".attn.", ".attentions."),
    (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."), (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."), (".nin_shortcut.", ".conv_shortcut."), (".norm_out.", ".conv_norm_out."))
IN_ATTENTION = ((".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
                (".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."),
                (".proj_out.", ".to_out.0."), (".proj_attn.", ".to_out.0."))

def rename_vae_keys(state: dict) -> dict:
    """Weights of the latent-diffusion code or of old diffusers -> ours. Attention's 1x1 convolutions become Linear."""
    top = max((int(k.split("decoder.up.")[1].split(".")[0]) for k in state if "decoder.up." in k), default=0)
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("first_stage_model.")
        if key.split(".")[0] not in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            continue  # the GAN loss, counters
        # there the level that runs last is number 0
        key = re.sub(r"decoder\.up\.(\d+)", lambda level: f"decoder.up_blocks.{top - int(level[1])}", key)
        for old, new in RENAMED:
            key = key.replace(old, new)
        if ".attentions." in key:
            for old, new in IN_ATTENTION:
                key = key.replace(old, new)
            value = value.flatten(1) if value.ndim == 4 else value
        renamed[key] = value
    return renamed

@torch.no_grad()
def encode_pixels(vae, pixels, flips) -> np.ndarray:
    """uint8 (B, c, S, S) -> moments float16 (B, flips, 2C, H, W)."""
    x = (pixels.float() / 127.5 - 1).to(memory_format=torch.channels_last)
    mean, std = vae.encode(torch.cat([x, x.flip(-1)][:flips]))
    moments = torch.cat([mean, std], dim=1).half()  # (flips * B, 2C, H, W)
    return moments.unflatten(0, (flips, -1)).transpose(0, 1).contiguous().cpu().numpy()

@torch.no_grad()
def decode_images(vae: AutoencoderKL, latents) -> np.ndarray:
    """Scaled latents (N, C, H, W) -> uint8 images (N, fH, fW, 3). Decodes half a megapixel at a time: about 2 GB."""
    at_once = max(1, 2**19 // (latents.shape[2] * latents.shape[3] * vae.factor**2))
    x = torch.cat([vae.decode(z / vae.scale) for z in latents.split(at_once)])
    x = (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return x.expand(-1, -1, -1, 3).cpu().numpy()

# ---------------------------------------------------------------------------------------------------------------------
# Images: a folder of class folders, or an .npz of uint8 images (arr_0) with labels (arr_1).

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's

def read_data(path):
    """-> images (a list of paths, or an array (N, H, W[, 3])), labels (N,), class names, a fingerprint."""
    images, labels, classes = read_folder(path) if os.path.isdir(path) else read_npz(path)
    identity = "\n".join(os.path.relpath(image, path) for image in images) if os.path.isdir(path) else images.tobytes()
    identity = identity if isinstance(identity, bytes) else identity.encode("utf8", "surrogateescape")
    return images, labels, classes, hashlib.sha256(identity + labels.tobytes()).hexdigest()[:16]

def read_folder(path):
    """Classes are the sub-folders, sorted; images are sorted within them: the order of torchvision's ImageFolder."""
    images, labels = [], []
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    for label, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(Path(path, name), followlinks=True)):
            images += [Path(folder, file) for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
        if len(images) == len(labels):
            raise UserError(f"--data {path}: class folder {name!r} holds no {', '.join(EXTENSIONS)}; remove it")
        labels += [label] * (len(images) - len(labels))
    if not images:
        raise UserError(f"--data {path} holds no class folders; put the images into one sub-folder per class")
    return images, np.array(labels, np.int64), classes

def read_npz(path):
    """-> images uint8 (N, H, W) or (N, H, W, 3), labels int64 (N,), class names."""
    with reading(path), np.load(path) as data:
        images, labels = data["arr_0"], data["arr_1"]
    if (images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or not images.size
            or labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0):
        raise UserError(f"{path} must hold uint8 images (N, H, W[, 3]) in arr_0 and their labels from 0 in arr_1, "
                        f"not {images.dtype} {images.shape} and {labels.dtype} {labels.shape}")
    return images, labels.astype(np.int64), [str(i) for i in range(int(labels.max()) + 1)]

def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's: halve by box filter while twice too large, bicubic to the short side, cut the centre. (size, size[, 3])"""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too narrow to crop")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]

def to_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any image -> uint8 (channels, size, size), converted to RGB or grey and cropped, as in the releases."""
    image = image.convert("L" if channels == 1 else "RGB")
    if channels == 1 and image.size == (28, 28) and size == 32:
        image = ImageOps.expand(image, 2)  # a digit: two black pixels all around rather than a blurry enlargement
    return center_crop(image, size).reshape(size, size, channels).transpose(2, 0, 1)

def load_pixels(image, size: int, channels: int):
    """A path or an array -> uint8 (channels, size, size), None; or zeros, and in words why it cannot be read."""
    try:
        with Image.open(image) if isinstance(image, Path) else Image.fromarray(image) as opened:
            return to_pixels(opened, size, channels), None
    except Exception as e:  # decoders of damaged files raise all kinds; one of them must not end days of work
        return np.zeros((channels, size, size), np.uint8), (str(e) or type(e).__name__).splitlines()[0]

# ---------------------------------------------------------------------------------------------------------------------
# Writing latents: each rank writes shards, files of some hundred images; then rank 0 joins them.

def extract(args):
    """Images of --data -> a folder of latents, all ranks together."""
    device, out = start_ranks(args.device), Path(args.out)
    dtype = choose_dtype(args.dtype, device)
    if rank() == 0:
        print(f"{args.vae} in {str(dtype)[6:]} on {device}, ranks: {world_size()}", flush=True)  # "torch.float32"[6:]
    vae = load_vae(args.vae, args.ckpt, device, dtype)
    row, size = vae.config, args.image_size or vae.config["image_size"]
    if size % vae.factor:
        raise UserError(f"--image-size {size} does not fit {args.vae}; give a multiple of {vae.factor}")
    images, labels, classes, fingerprint = read_data(args.data)
    weights = functools.reduce(lambda crc, v: zlib.crc32(v.cpu().numpy().tobytes(), crc), vae.state_dict().values(), 0)
    meta = dict(  # what the bytes depend on: the batch, too, as in another one sums may run in another order
        vae=args.vae, weights=weights, scale=vae.scale, image_size=size, dtype=str(dtype)[6:], data=fingerprint,
        shape=[row["latent"], size // vae.factor, size // vae.factor], count=len(labels), classes=classes,
        flips=1 + (row["flip"] if args.flip is None else args.flip), shard=row["shard"],
        batch_size=args.batch_size or row["batch_size"])
    missing = on_rank_0(lambda: missing_shards(out, meta, args.resume))
    if missing is not None:
        write_shards(vae, images, labels, missing[rank() :: world_size()], out, meta, args)
        barrier()
        on_rank_0(lambda: join_shards(out, meta))
    if rank() == 0:
        skipped = json.loads((out / "meta.json").read_text())["skipped"]
        print(f"{out} holds the latents of {len(labels) - len(skipped):,} images of {len(classes)} classes")
        if skipped:
            print(f"warning: {len(skipped)} images could not be read; {out}/meta.json names them", file=sys.stderr)

def missing_shards(out: Path, meta: dict, resume: str):
    """Starts or continues the folder `out`; -> numbers of the shards that are still to be made, None if complete."""
    file = out / "meta.json"
    if resume == "auto" and file.exists():
        with reading(file):
            old = dict(json.loads(file.read_text()))
        for key in meta:
            if old.get(key) != meta[key]:
                raise UserError(f"{out} holds latents with another {key}, {old.get(key)} instead of {meta[key]}; "
                                "choose another --out, or start anew with --resume never")
        if old["complete"]:
            return print("nothing to encode: it is all there")
    else:
        shutil.rmtree(out / "shards", ignore_errors=True)
        atomic_write(file, lambda path: path.write_text(json.dumps(meta | dict(complete=False))))
    missing = [i for i in range(-(-meta["count"] // meta["shard"])) if not (out / f"shards/{i:06}.npz").exists()]
    need = (len(missing) * meta["shard"] + meta["count"]) * meta["flips"] * 4 * math.prod(meta["shape"])  # bytes
    if need > shutil.disk_usage(out).free:
        raise UserError(f"the disk of {out} has no room for {need / 1e9:.1f} GB of shards and moments.npy; make room")
    return missing

def write_shards(vae, images, labels, shards: list, out: Path, meta: dict, args):
    """This rank's shards: images -> pixels, by threads, one shard ahead -> moments -> shards/000007.npz."""
    size, channels, device = meta["image_size"], vae.config["image_channels"], next(vae.parameters()).device
    rows_of = [range(i * meta["shard"], min((i + 1) * meta["shard"], meta["count"])) for i in shards]
    progress = Progress("extract", sum(map(len, rows_of)), "images")
    with concurrent.futures.ThreadPoolExecutor(args.workers if isinstance(images, list) else 1) as threads:
        load = lambda rows: threads.map(load_pixels, [images[row] for row in rows], repeat(size), repeat(channels))
        loading = [load(rows) for rows in rows_of[:1]]
        for k, rows in enumerate(rows_of):
            loading += [load(following) for following in rows_of[k + 1 : k + 2]]
            pixels, words = zip(*loading.pop(0))
            y = np.array([-1 if problem else labels[row] for row, problem in zip(rows, words)])
            problems = [f"{images[row] if isinstance(images, list) else f'image {row}'}: {problem}"
                        for row, problem in zip(rows, words) if problem]
            for problem in problems:
                print(f"warning: cannot read {problem}", file=sys.stderr)
            if problems and (args.strict or len(problems) > max(8, len(rows) // 2)):
                raise UserError(f"{len(problems)} of {len(rows)} images cannot be read; repair or remove them")
            batches = torch.from_numpy(np.stack(pixels)).split(meta["batch_size"])
            moments = np.concatenate([encode_pixels(vae, batch.to(device), meta["flips"]) for batch in batches])
            contents = dict(moments=moments, labels=y, problems=np.array(problems, str))
            atomic_write(out / f"shards/{shards[k]:06}.npz", lambda path: save(np.savez, path, **contents))
            progress.update(sum(map(len, rows_of[: k + 1])))

def save(function, path, *arrays, **named_arrays):
    with open(path, "wb") as f:  # to a name, numpy would add .npy or .npz
        function(f, *arrays, **named_arrays)

def join_shards(out: Path, meta: dict):
    """The shards, in order -> moments.npy, labels.npy and, last, a meta.json that says complete."""
    shape, labels, problems = (meta["count"], meta["flips"], 2 * meta["shape"][0], *meta["shape"][1:]), [], []

    def write_moments(f):
        np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=shape))
        for file in sorted((out / "shards").glob("[0-9]*.npz")):
            with reading(file), np.load(file) as shard:
                f.write(shard["moments"].data)
                labels.append(shard["labels"])
                problems.extend(shard["problems"].tolist())

    atomic_write(out / "moments.npy", lambda path: save(write_moments, path))
    atomic_write(out / "labels.npy", lambda path: save(np.save, path, np.concatenate(labels)))
    meta = meta | dict(skipped=problems, complete=True)
    atomic_write(out / "meta.json", lambda path: path.write_text(json.dumps(meta)))
    shutil.rmtree(out / "shards")
    for left_by_a_kill in out.glob(".*.tmp"):
        left_by_a_kill.unlink()

# ---------------------------------------------------------------------------------------------------------------------
# Reading latents, in the order of training.

class Latents:
    """A complete folder of latents. Rows are numbered without the images that could not be read."""

    def __init__(self, directory):
        directory, self.from_disk = Path(directory), True
        with reading(directory / "meta.json"):
            self.meta = json.loads((directory / "meta.json").read_text())
            self.shape, self.scale = tuple(self.meta["shape"]), self.meta["scale"]
            self.classes = len(self.meta["classes"])
            if not self.meta["complete"]:
                raise UserError(f"{directory} is not complete; run extract_latents.py again to finish it")
        with reading(directory / "moments.npy"):
            self.moments = np.load(directory / "moments.npy", mmap_mode="r")  # (N, flips, 2C, H, W)
        with reading(directory / "labels.npy"):
            labels = np.load(directory / "labels.npy")
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]

    def __len__(self):
        return len(self.rows)

    def read(self, places):
        """Moments (B, 2C, H, W) float16; place `flips * row` is the image of that row, the next one its mirror image.
        If the last read took longer than from memory, the system hears of all rows before the first is copied, and
        fetches them from the disk together. (madvise, since at a read per row other threads would take Python away.)"""
        moments, start = self.moments.reshape(-1, *self.moments.shape[2:]), time.perf_counter()
        size, page = moments[0].size * moments.itemsize, mmap.PAGESIZE
        if self.from_disk and hasattr(mmap, "MADV_WILLNEED"):  # Windows has none
            for first in ((self.moments.offset + places * size) // page * page).tolist():
                self.moments.base.madvise(mmap.MADV_WILLNEED, first, size + page)
        out = torch.empty((len(places), *moments.shape[1:]), dtype=torch.float16)
        np.take(moments, places, axis=0, out=out.numpy(), mode="clip")  # clip: numpy's unbuffered way
        self.from_disk = time.perf_counter() - start > 5e-6 * len(places)
        return out

    def load(self, rows, noise, pin=False):
        """-> moments (B, 2C, H, W), of the image or its mirror image, labels (B,). noise: RowGenerator in one block."""
        flips, y = self.moments.shape[1], torch.from_numpy(self.labels[rows])
        mirrored = noise.shared.random(noise.block)[noise.rows] < 0.5 if flips == 2 else 0
        moments = self.read(flips * self.rows[rows] + mirrored)
        return (moments.pin_memory(), y.pin_memory()) if pin else (moments, y)

    def sample_posterior(self, moments, y, noise):
        """-> x (B, C, H, W) float32, from the posterior and scaled; y (B,). On the device of the noise."""
        mean, std = moments.to(noise.device, non_blocking=True).float().chunk(2, dim=1)
        return noise.normal(*self.shape).mul_(std).add_(mean).mul_(self.scale), y.to(noise.device, non_blocking=True)

    def batch(self, rows, noise, device="cpu"):
        return self.sample_posterior(*self.load(rows, noise, torch.device(device).type == "cuda"), noise)

@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that depends on (seed, epoch) alone, the same on every rank."""
    return np.random.default_rng(make_seed(seed, epoch)).permutation(n)

class Batches:
    """batches(step) yields this rank's parts of the global batch of `step`: latents x, labels y, noise.
    The global batch is cut into world_size * accumulate parts, equal to within one row. Rows and noise follow from
    (seed, step) and the place in the global batch, so they are the same for any ranks and any accumulation."""

    AHEAD = 2  # parts that threads prepare during the loop

    def __init__(self, latents, batch_size, accumulate, seed, device):
        self.cuts = world_size() * accumulate
        if not self.cuts <= batch_size <= len(latents):
            raise UserError(f"--batch-size {batch_size} is impossible; give at least {self.cuts} (ranks x accumulate) "
                            f"and at most {len(latents)} (images)")
        self.latents, self.batch_size, self.accumulate, self.seed = latents, batch_size, accumulate, seed
        self.device, self.steps_per_epoch = torch.device(device), len(latents) // batch_size
        self.threads, self.coming = concurrent.futures.ThreadPoolExecutor(self.AHEAD), {}

    def __call__(self, step: int):
        for i in range(step * self.accumulate, (step + 1) * self.accumulate):  # parts since the start of training
            ahead = range(i, i + 1 + self.AHEAD)
            self.coming = {j: self.coming.get(j) or self.threads.submit(self.prepare, j) for j in ahead}
            x, y, noise = self.coming.pop(i).result()
            yield *(self.latents.sample_posterior(x, y, noise) if self.device.type == "cuda" else (x, y)), noise

    def prepare(self, i: int):
        """Part i: for CUDA its moments, in pinned memory; for the CPU the latents drawn from them."""
        step, micro = divmod(i, self.accumulate)
        epoch, place = divmod(step, self.steps_per_epoch)
        part = rank() * self.accumulate + micro
        start, stop = (self.batch_size * p // self.cuts for p in (part, part + 1))
        rows = epoch_order(len(self.latents), self.seed, epoch)[place * self.batch_size :][start:stop]
        noise = RowGenerator((self.seed, step), start, stop, self.batch_size, self.device)
        on_cuda = self.device.type == "cuda"
        return *(self.latents.load(rows, noise, pin=True) if on_cuda else self.latents.batch(rows, noise)), noise

def check_fit(net, latents, directory):
    """Refuses latents of another VAE, or of more classes, than the network was made for."""
    shape = (net.channels, net.input_size, net.input_size)
    if latents.shape != shape or latents.classes > net.classes:
        raise UserError(f"{directory} holds latents {latents.shape} of {latents.classes} classes, the network takes "
                        f"{shape} of at most {net.classes}; extract with the VAE of the network")

def main():
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to encode, and where to").add_argument
    add("--data", default=DIGITS, metavar="PATH", help="folder of class folders, or .npz (default: the bundled digits)")
    add("--out", default="out/latents", metavar="DIR", help="(default: %(default)s)")
    add("--resume", default="auto", choices=["auto", "never"], help="continue or start anew (default: %(default)s)")
    add("--strict", action="store_true", help="stop at an image that cannot be read")
    add = parser.add_argument_group("the VAE").add_argument
    add("--vae", default="digits", choices=VAES, help="(default: %(default)s)")
    add("--ckpt", metavar="FILE", help="path or URL of other weights (default: the bundled or official ones)")
    add("--image-size", type=whole(1), metavar="N", help="pixels per side (default: 256, digits 32)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror images, too (default: yes, digits no)")
    add("--dtype", default="float32", choices=["auto", "float32", "bfloat16"],
        help="of the forward pass (default: %(default)s, exact, since latents are made once and used in every epoch)")
    add = parser.add_argument_group("speed").add_argument
    add("--batch-size", type=whole(1), metavar="N", help="of images, per rank (default: 32, digits 250)")
    add("--workers", type=whole(1), default=8, metavar="N", help="threads that open images, per rank (default: 8)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    extract(parser.parse_args())

if __name__ == "__main__":
    run_main(main)
