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

Ranks encode shards, some hundred images each, to files of their own. When all are there, rank 0 joins them: for a
moment that takes twice the room. Which images are encoded together depends on the shard and not on the rank, so a run
that was killed continues with the shards that are missing, on any number of ranks, and ends in the same bytes. The
same command starts and continues.

Images that cannot be read are left out: a warning names them, meta.json lists them, and the exit code is 0, since
trying again (torchrun --max-restarts) would not help. With --strict the first of them ends the run with exit code 2.

Read top to bottom: the VAE; images; writing latents; reading them, in the order of training.
"""
import argparse
import concurrent.futures
import functools
import hashlib
import json
import math
import mmap
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from model import (ROOT, Parser, Progress, RowNoise, UserError, autocast, barrier, choose_dtype, fetch, load_state,
                   locate, mix, on_rank_0, rank, read_state, reading, run_main, start_ranks, whole, world_size,
                   write_whole)

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


def norm_silu(norm, x):
    h = norm(x)
    return F.silu(h, inplace=not h.requires_grad)


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
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return h.add_(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class AttentionBlock(nn.Module):
    """Self-attention with one head over all H * W places."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and at the bottom only


class Upsample(nn.Module):
    """A 3x3 convolution of the image with each pixel doubled: F.conv2d(F.interpolate(x, scale_factor=2), weight).

    Of the 3 rows under the kernel 2 are the same: for even rows the last two, for odd rows the first two. Their
    weights can be added beforehand, which leaves four 2x2 convolutions, one per parity: 4/9 of the work.
    """

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):  # (B, c, H, W) -> (B, c, 2H, 2W)
        (n, c, h, w), k = x.shape, self.conv.weight
        k = torch.stack([k[:, :, 0], k[:, :, 1:].sum(2), k[:, :, :2].sum(2), k[:, :, 2]], 2)  # even rows' 2, odd rows' 2
        k = torch.stack([k[..., 0], k[..., 1:].sum(3), k[..., :2].sum(3), k[..., 2]], 3)  # the same of columns
        k, x = k.contiguous(memory_format=torch.channels_last), F.pad(x, (1, 1, 1, 1))
        out = torch.empty((n, c, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for i, j in (0, 0), (0, 1), (1, 0), (1, 1):
            view, kernel = x[:, :, i : i + h + 1, j : j + w + 1], k[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            out[:, :, i::2, j::2] = F.conv2d(view, kernel, self.conv.bias)
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention after it if asked, then down, up, or neither."""

    def __init__(self, c_in, c_out, layers, groups, attention=False, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        self.attentions = nn.ModuleList([AttentionBlock(c_out, groups) for _ in range(layers)] if attention else [])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x):
        """(B, c_in, H, W) -> (B, c_out, H, W), at half the side with `down`, twice the side with `up`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if len(self.attentions):
                x = self.attentions[i](x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([AttentionBlock(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Images (B, 3, fH, fW) -> moments (B, 2C, H, W), before quant_conv."""

    def __init__(self, channels, layers, latent, groups, image_channels, encoder_attention):
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            Level(channels[max(i - 1, 0)], c, layers, groups, attention=encoder_attention and i == last, down=i < last)
            for i, c in enumerate(channels)])
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent, 3, padding=1)

    def forward(self, x):  # (B, 3, fH, fW) -> (B, 2C, H, W), f = 2^(levels - 1)
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(norm_silu(self.conv_norm_out, self.mid_block(x)))


class Decoder(nn.Module):
    """Latents (B, C, H, W), after post_quant_conv -> images (B, 3, fH, fW)."""

    def __init__(self, channels, layers, latent, groups, image_channels):
        super().__init__()
        channels = channels[::-1]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(latent, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups)
        self.up_blocks = nn.ModuleList([
            Level(channels[max(i - 1, 0)], c, layers + 1, groups, up=i < last) for i, c in enumerate(channels)])
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], image_channels, 3, padding=1)

    def forward(self, z):  # (B, C, H, W) -> (B, 3, fH, fW)
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] <-> latents; `config` is a row of VAES. float32 in and out; computes in `dtype` (autocast)."""

    def __init__(self, config: dict, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype, self.scale = config, dtype, config["scale"]
        shape = {k: config[k] for k in ("channels", "layers", "latent", "groups", "image_channels")}
        c = config["latent"]
        self.encoder = Encoder(**shape, encoder_attention=config.get("encoder_attention", False))
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder = Decoder(**shape)

    @property
    def factor(self) -> int:
        """How many pixels per side one latent value stands for."""
        return 2 ** (len(self.config["channels"]) - 1)

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
    if name not in VAES:
        raise UserError(f"no VAE is called {name!r}; there are {', '.join(VAES)}")
    row = VAES[name]
    bundled = ROOT / "weights" / f"vae-{name}.pt"
    path = locate(ckpt) if ckpt else fetch(*row["weights"]) if row["weights"] else bundled
    state, config = read_state(path)
    config = row | (config or dict(name=name))
    if config["name"] != name:
        raise UserError(f"{path} holds {config['name']}, not the VAE {name}; give another --ckpt or another --vae")
    if config["scale"] is None:
        raise UserError(f"{path} does not hold a VAE for {name}; make one with reproduce/train_vae.py")
    with reading(path), torch.device("meta"):
        vae = AutoencoderKL(config, dtype)
        load_state(vae, rename_vae_keys(state), path)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# What the latent-diffusion code calls them -> what we do; within attention there are also the names of old diffusers.
RENAMED = (
    ("encoder.down.", "encoder.down_blocks."), (".block.", ".resnets."), (".attn.", ".attentions."),
    (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."), (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."), (".norm_out.", ".conv_norm_out."))
RENAMED_ATTENTION = (
    (".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0."),
    (".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))


def rename_vae_keys(state: dict) -> dict:
    """Weights of the latent-diffusion code or of old diffusers -> ours. Attention's 1x1 convolutions become Linear."""
    state = {k.removeprefix("first_stage_model."): v for k, v in state.items()}
    levels = 1 + max((int(k.split(".")[2]) for k in state if k.startswith("decoder.up.")), default=0)
    renamed = {}
    for key, value in state.items():
        if key.split(".")[0] not in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            continue  # the GAN loss, counters
        if key.startswith("decoder.up."):  # there the level that runs last is number 0
            _, _, i, rest = key.split(".", 3)
            key = f"decoder.up_blocks.{levels - 1 - int(i)}.{rest}"
        for old, new in RENAMED:
            key = key.replace(old, new)
        if ".attentions." in key:
            for old, new in RENAMED_ATTENTION:
                key = key.replace(old, new)
            value = value.flatten(1) if value.ndim == 4 else value
        renamed[key] = value
    return renamed


@torch.no_grad()
def encode_pixels(vae, pixels, flips) -> np.ndarray:
    """uint8 (B, c, S, S) -> moments float16 (B, flips, 2C, H, W)."""
    x = (pixels.float() / 127.5 - 1).to(memory_format=torch.channels_last)
    views = [x, x.flip(-1)][:flips]
    mean, std = vae.encode(torch.cat(views))
    moments = torch.cat([mean, std], dim=1).half()  # (flips * B, 2C, H, W)
    return moments.unflatten(0, (flips, -1)).transpose(0, 1).contiguous().cpu().numpy()


@torch.no_grad()
def decode_images(vae: AutoencoderKL, latents) -> np.ndarray:
    """Scaled latents (N, C, H, W) -> uint8 images (N, fH, fW, 3), half a megapixel at a time: about 2 GB."""
    n, _, height, width = latents.shape
    images = np.empty((n, height * vae.factor, width * vae.factor, 3), np.uint8)
    batch = max(1, 2**19 // (images.shape[1] * images.shape[2]))
    for i in range(0, n, batch):
        x = vae.decode(latents[i : i + batch] / vae.scale)
        x = (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)  # (B, fH, fW, 3 or 1)
        images[i : i + batch] = x.cpu().numpy()
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Images: a folder of class folders, or an .npz of uint8 images (arr_0) with labels (arr_1).

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def read_data(path):
    """-> images (a list of paths, or an array (N, H, W[, 3])), labels (N,), class names, a fingerprint."""
    path = Path(path)
    if path.is_dir():
        images, labels, classes = read_folder(path)
        names = "\n".join(str(image.relative_to(path)) for image in images)
        return images, labels, classes, hashlib.sha256(names.encode("utf8", "surrogateescape")).hexdigest()[:16]
    images, labels, classes = read_npz(path)
    return images, labels, classes, hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]


def read_folder(path):
    """Classes are the sub-folders in sorted order, images sorted within them: the order of torchvision's ImageFolder."""
    images, labels = [], []
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    for label, name in enumerate(classes):
        before = len(images)
        for folder, _, files in sorted(os.walk(path / name, followlinks=True)):
            images += [Path(folder, file) for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
        if len(images) == before:
            raise UserError(f"--data {path}: the class folder {name!r} holds no images ({', '.join(EXTENSIONS)}); "
                            "add some or remove it")
        labels += [label] * (len(images) - before)
    if not images:
        raise UserError(f"--data {path} holds no class folders; put the images into one sub-folder per class")
    return images, np.array(labels, np.int64), classes


def read_npz(path):
    """-> images uint8 (N, H, W) or (N, H, W, 3), labels int64 (N,), class names."""
    with reading(path), np.load(path) as data:
        if not {"arr_0", "arr_1"} <= set(data):
            raise UserError(f"{path} holds {', '.join(data)}; images are expected in arr_0 and labels in arr_1")
        images, labels = data["arr_0"], data["arr_1"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or not images.size:
        raise UserError(f"{path}: arr_0 must be uint8 images (N, H, W) or (N, H, W, 3), not {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
        raise UserError(f"{path}: arr_1 must be {len(images)} whole numbers from 0, not {labels.dtype} {labels.shape}")
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
    """A path or an array -> uint8 (channels, size, size), or, in words, why it cannot be read."""
    try:
        with Image.open(image) if isinstance(image, Path) else Image.fromarray(image) as opened:
            return to_pixels(opened, size, channels)
    except MemoryError:
        raise
    except Exception as e:  # decoders of damaged files raise all kinds; one of them must not end days of work
        return (str(e) or type(e).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Writing latents: each rank writes shards, files of some hundred images; then rank 0 joins them.

# What the bytes depend on: also the batch, since in another one sums may run in another order.
SETTINGS = ("vae", "weights", "image_size", "shape", "flips", "count", "shard", "batch_size", "dtype", "data")


def extract(args):
    """Images of --data -> a folder of latents, all ranks together."""
    device = start_ranks(args.device)
    dtype = choose_dtype(args.dtype, device)
    dtype_name = str(dtype).removeprefix("torch.")
    if rank() == 0:
        print(f"extract_latents.py: {args.vae} on {world_size()} x {device.type} in {dtype_name}", flush=True)
    vae = load_vae(args.vae, args.ckpt, device, dtype)
    row = vae.config
    size = args.image_size or row["image_size"]
    if size % vae.factor:
        raise UserError(f"--image-size must be a multiple of {vae.factor}, the pixels per side of a latent value; "
                        f"{size} is not")
    images, labels, classes, fingerprint = read_data(args.data)
    meta = dict(vae=args.vae, scale=vae.scale, image_size=size, shape=[row["latent"], *[size // vae.factor] * 2],
                flips=2 if (row["flip"] if args.flip is None else args.flip) else 1, count=len(labels),
                shard=row["shard"], batch_size=args.batch_size or row["batch_size"], dtype=dtype_name,
                weights=checksum(vae), data=fingerprint, classes=classes, complete=False)
    out = Path(args.out)
    missing = on_rank_0(lambda: missing_shards(out, meta, args.resume))
    write_shards(vae, images, labels, missing[rank() :: world_size()], meta, out, device, args)
    barrier()
    if rank() == 0:
        skipped = join_shards(out)
        print(f"{out} holds the latents of {len(labels) - len(skipped):,} images of {len(classes)} classes")
        if skipped:
            print(f"warning: {len(skipped)} images could not be read and are left out; {out / 'meta.json'} lists them",
                  file=sys.stderr)


def missing_shards(out: Path, meta: dict, resume: str) -> list:
    """Starts or continues the folder `out`; -> numbers of the shards that are still to be made."""
    file, count = out / "meta.json", meta["count"]
    if resume == "auto" and file.exists():
        with reading(file):
            old = dict(json.loads(file.read_text()))
            different = [key for key in SETTINGS if old.get(key) != meta[key]]
            if old["complete"] and not different:
                print(f"{out} is complete, nothing to encode")
                return []
        for key in different:
            raise UserError(f"{out} holds latents with another {key} ({old.get(key)} instead of {meta[key]}); "
                            "choose another --out, or start anew with --resume never")
    else:
        need = 2 * 2 * count * meta["flips"] * 2 * math.prod(meta["shape"])  # bytes of float16, twice
        free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
        if need > free:
            raise UserError(f"{out} needs {need / 1e9:.2f} GB for a moment, half of it for good, and its disk has "
                            f"{free / 1e9:.2f} GB free; choose another --out")
        for name in ("meta.json", "moments.npy", "labels.npy"):  # meta.json first: readers refuse the folder without
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "shards", ignore_errors=True)
        write_whole(file, lambda temporary: temporary.write_text(json.dumps(meta)))
    return [i for i in range(-(-count // meta["shard"])) if not shard_file(out, i).exists()]


def shard_file(out: Path, i: int) -> Path:
    return out / "shards" / f"{i:06}.npz"


def write_shards(vae, images, labels, shards: list, meta: dict, out: Path, device, args):
    """This rank's shards: images -> pixels, by threads and one shard ahead -> moments -> files."""
    rows_of = [range(i * meta["shard"], min((i + 1) * meta["shard"], meta["count"])) for i in shards]
    progress, done = Progress("extract", sum(map(len, rows_of)), "images per rank"), 0
    with concurrent.futures.ThreadPoolExecutor(args.workers) as threads:
        load = functools.partial(load_pixels, size=meta["image_size"], channels=vae.config["image_channels"])
        ahead = [[threads.submit(load, images[row]) for row in rows] for rows in rows_of[:1]]
        for k, (shard, rows) in enumerate(zip(shards, rows_of)):
            ahead += [[threads.submit(load, images[row]) for row in following] for following in rows_of[k + 1 : k + 2]]
            loaded = [future.result() for future in ahead.pop(0)]  # an array, or words if the image cannot be read
            bad = {row: f"{images[row] if isinstance(images, list) else f'image {row}'}: {words}"
                   for row, words in zip(rows, loaded) if isinstance(words, str)}
            for problem in bad.values():
                if args.strict:
                    raise UserError(f"cannot read {problem}; repair or remove it, or skip it, without --strict")
                print(f"warning: cannot read {problem}; left out", file=sys.stderr)
            if len(bad) == len(rows) > 8:
                raise UserError(f"none of {len(rows)} images in a row can be read, {bad[rows[0]]}; check the disk")
            blank = np.zeros((vae.config["image_channels"], meta["image_size"], meta["image_size"]), np.uint8)
            pixels = torch.from_numpy(np.stack([blank if isinstance(p, str) else p for p in loaded]))
            moments = np.concatenate([encode_pixels(vae, part.to(device), meta["flips"])
                                      for part in pixels.split(meta["batch_size"])])
            if not np.isfinite(moments).all():
                raise UserError(f"images {rows[0]} to {rows[-1]} give latents that are not finite in float16; "
                                "try --dtype float32 with --resume never")
            y = np.array([-1 if row in bad else labels[row] for row in rows])
            write_whole(shard_file(out, shard), lambda temporary: save_arrays(
                temporary, moments=moments, labels=y, problems=np.array(list(bad.values()), str)))
            done += len(rows)
            progress.update(done)


def save_arrays(path, **arrays):
    with open(path, "wb") as f:  # to a name, numpy would add .npz
        np.savez(f, **arrays)


def join_shards(out: Path) -> list:
    """The shards, in order -> moments.npy, labels.npy, and, last, a complete meta.json; -> what is wrong with images."""
    meta = json.loads((out / "meta.json").read_text())
    labels, problems = [], []

    def write(temporary):
        with open(temporary, "wb") as f:
            shape = meta["count"], meta["flips"], 2 * meta["shape"][0], *meta["shape"][1:]
            np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=shape))
            for i in range(-(-meta["count"] // meta["shard"])):
                with reading(shard_file(out, i)), np.load(shard_file(out, i)) as shard:
                    f.write(shard["moments"].data)
                    labels.append(shard["labels"])
                    problems.extend(shard["problems"].tolist())

    if not meta["complete"]:
        for left_by_a_kill in out.glob(".*.tmp"):
            left_by_a_kill.unlink()
        write_whole(out / "moments.npy", write)
        write_whole(out / "labels.npy", lambda temporary: np.save(open(temporary, "wb"), np.concatenate(labels)))
        meta |= dict(skipped=problems, complete=True)
        write_whole(out / "meta.json", lambda temporary: temporary.write_text(json.dumps(meta)))
    shutil.rmtree(out / "shards", ignore_errors=True)
    return meta["skipped"]


def checksum(vae) -> int:
    """Of the weights, so that a run does not continue with other ones."""
    return functools.reduce(lambda total, v: zlib.crc32(v.cpu().numpy().tobytes(), total), vae.state_dict().values(), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Reading latents, in the order of training.


class Latents:
    """A complete folder of latents. Rows are numbered without the images that could not be read."""

    def __init__(self, directory):
        directory = Path(directory)
        with reading(directory / "meta.json"):
            meta = json.loads((directory / "meta.json").read_text())
            self.meta, self.shape, self.scale = meta, tuple(meta["shape"]), meta["scale"]
            self.classes, expected = len(meta["classes"]),(meta["count"], meta["flips"], 2 * meta["shape"][0], *meta["shape"][1:])
            if not meta["complete"]:
                raise UserError(f"{directory} is not complete; run extract_latents.py again to finish it")
        with reading(directory / "moments.npy"):
            self.moments = np.load(directory / "moments.npy", mmap_mode="r")  # (N, flips, 2C, H, W)
        with reading(directory / "labels.npy"):
            labels = np.load(directory / "labels.npy")
        if (self.moments.shape, self.moments.dtype, labels.shape) != (expected, np.float16, expected[:1]):
            raise UserError(f"{directory} is damaged: {self.moments.dtype} moments {self.moments.shape} and {labels.shape} "
                            f"labels instead of float16 {expected}; start anew with extract_latents.py --resume never")
        if labels.max() >= self.classes:
            raise UserError(f"{directory} is damaged: label {labels.max()} of {self.classes} classes; "
                            "start anew with extract_latents.py --resume never")
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]

    def __len__(self):
        return len(self.rows)

    def read(self, places, out=None, pin=False):
        """Moments (B, 2C, H, W) float16; place `flips * row` is the image of that row, the next one its mirror image.

        Before the first row is copied, the system is told of all of them, and fetches them from the disk together.
        (madvise, since it is quick for rows in memory, and does not let go of Python at each row as preads would.)
        """
        moments = self.moments.reshape(-1, *self.moments.shape[2:])
        size = moments.itemsize * moments[0].size
        if hasattr(mmap, "MADV_WILLNEED"):  # Windows has none
            for page in ((self.moments.offset + places * size) // mmap.PAGESIZE).tolist():
                self.moments.base.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, size + mmap.PAGESIZE)
        if out is None:
            out = torch.empty((len(places), *moments.shape[1:]), dtype=torch.float16, pin_memory=pin)
        np.take(moments, places, axis=0, out=out.numpy(), mode="clip")  # clip: numpy's unbuffered way
        return out

    def load(self, rows, noise, out=None, pin=False):
        """-> moments (B, 2C, H, W), labels (B,) on the CPU. Of an image and its mirror image one is drawn and read."""
        flips = self.moments.shape[1]
        mirrored = noise.host.random(noise.block)[noise.rows] < 0.5 if flips == 2 else 0
        y = torch.from_numpy(self.labels[rows])
        return self.read(flips * self.rows[rows] + mirrored, out, pin), y.pin_memory() if pin else y

    def sample(self, moments, y, noise):
        """-> x (B, C, H, W) float32, drawn from the posterior on the device of the noise, and scaled; y (B,)."""
        moments, y = (v.to(noise.device, non_blocking=True) for v in (moments, y))
        mean, std = moments.float().chunk(2, dim=1)
        return noise.normal(*self.shape).mul_(std).add_(mean).mul_(self.scale), y

    def batch(self, rows, noise, device="cpu"):
        """-> x, y of some rows. noise: a RowNoise of len(rows) rows, which lie in one block, as in training."""
        return self.sample(*self.load(rows, noise, pin=torch.device(device).type == "cuda"), noise)


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that depends on (seed, epoch) alone, the same on every rank."""
    return np.random.default_rng(mix(seed, epoch)).permutation(n)


class Batches:
    """batches(step) yields this rank's parts of the global batch of `step`: latents x, labels y, noise.

    The global batch is cut into world_size * accumulate parts, equal to within one row. Rows and noise follow from
    (seed, step) and the place in the global batch, so they are the same for any number of ranks and any accumulation.
    Threads prepare the next parts ahead of the loop; what they hold follows from the same numbers.
    """

    AHEAD = 2

    def __init__(self, latents, batch_size, accumulate, seed, device):
        self.cuts = world_size() * accumulate
        if batch_size < self.cuts:
            raise UserError(f"--batch-size {batch_size} is too small for {world_size()} ranks x {accumulate} "
                            "accumulation steps; give a larger one")
        if batch_size > len(latents):
            raise UserError(f"--batch-size {batch_size} is larger than the data set of {len(latents)} images; "
                            "give a smaller one")
        self.latents, self.batch_size, self.accumulate, self.seed = latents, batch_size, accumulate, seed
        self.device = torch.device(device)
        self.steps_per_epoch = len(latents) // batch_size
        self.threads, self.parts = concurrent.futures.ThreadPoolExecutor(self.AHEAD), {}

    def __call__(self, step: int):
        for index in range(step * self.accumulate, (step + 1) * self.accumulate):
            ahead = range(index, index + 1 + self.AHEAD)
            self.parts = {i: self.parts.get(i) or self.threads.submit(self.prepare, i) for i in ahead}
            x, y, noise = self.parts.pop(index).result()
            yield *(self.latents.sample(x, y, noise) if self.device.type == "cuda" else (x, y)), noise

    def prepare(self, index):
        """Part `index` since the start of training: moments in pinned memory for CUDA, finished latents for the CPU."""
        step, micro = divmod(index, self.accumulate)
        epoch, place = divmod(step, self.steps_per_epoch)
        part = rank() * self.accumulate + micro
        start, stop = (self.batch_size * p // self.cuts for p in (part, part + 1))
        rows = epoch_order(len(self.latents), self.seed, epoch)[place * self.batch_size :][start:stop]
        noise = RowNoise((self.seed, step), start, stop, self.batch_size, self.device)
        if self.device.type == "cuda":
            return *self.latents.load(rows, noise, pin=True), noise
        return *self.latents.batch(rows, noise), noise


def check_fit(net, latents, directory):
    """Refuses latents of another VAE, or of more classes, than the network was made for."""
    shape = (net.channels, net.input_size, net.input_size)
    if latents.shape != shape:
        raise UserError(f"{directory} holds latents of shape {latents.shape}, the network takes {shape}; "
                        "extract with its own --vae")
    if latents.classes > net.classes:
        raise UserError(f"{directory} has {latents.classes} classes, the network knows {net.classes}; "
                        "give other --latents")


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def main():
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to encode, and where to")
    group.add_argument("--data", default=DIGITS, metavar="PATH",
                       help="folder of class folders, or .npz of uint8 images with labels (default: the bundled digits)")
    group.add_argument("--out", default="out/latents", metavar="DIR", help="(default: %(default)s)")
    group.add_argument("--resume", default="auto", choices=["auto", "never"],
                       help="continue what is in --out, or start anew (default: %(default)s)")
    group.add_argument("--strict", action="store_true", help="stop at an image that cannot be read")
    group = parser.add_argument_group("the VAE")
    group.add_argument("--vae", default="digits", choices=VAES, help="(default: %(default)s)")
    group.add_argument("--ckpt", metavar="FILE", help="path or URL of other weights (default: bundled or official)")
    group.add_argument("--image-size", type=whole(1), metavar="N", help="pixels per side (default: 256, digits 32)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror images, too (default: digits no)")
    group = parser.add_argument_group("how")
    group.add_argument("--batch-size", type=whole(1), metavar="N",
                       help="images that a rank encodes together (default: 32, digits 250)")
    group.add_argument("--workers", type=whole(0), metavar="N",
                       help="processes per rank that read image files (default: up to 8)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16"],
                       help="what the VAE computes in; float32, as in the releases, since latents are made once and used "
                       "in every epoch (default: %(default)s)")
    extract(parser.parse_args())


if __name__ == "__main__":
    run_main(main)
