"""Images -> latents on disk: what the diffusion transformers are trained on, encoded once instead of at every step.

    python extract_latents.py                                             # the bundled digits -> out/latents
    torchrun --nproc_per_node=8 extract_latents.py --data imagenet/train --vae sd-ema
    python extract_latents.py --train-vae                                 # how weights/vae-digits.pt was made

An image, centre-cropped as in ADM, goes through the encoder of a KL autoencoder (VAE), which gives a Gaussian: a mean
and a standard deviation for each latent value. These moments are stored, of the image and of its mirror image, rather
than a sample, so that each epoch draws fresh latents. A directory of latents holds

    moments.npy   (N, flips, 2C, H, W) float16: C means, then C standard deviations, unscaled; flips is 1 or 2
    labels.npy    (N,) int64, -1 where the image could not be read (`Latents` leaves such rows out)
    meta.json     VAE, scale, image size, class names, count; "complete" is false until the last row is there

Every rank encodes chunks of its own and writes them at their place. The chunk, not the rank, decides which images are
encoded together, and a chunk is marked as done only after its rows are on disk: so a run that was killed continues,
on any number of ranks, and ends in the same bytes. The same command starts and continues; --resume never starts anew.
Exit code 3: some images could not be read.

Read top to bottom: the VAE; training the small one; images; writing latents; reading them.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from model import (Progress, clock, end_ranks, fail, fetch, guess_model, load_state, locate, mix, rank, read_state, save_checkpoint, start_ranks,
                   world_size, write_whole)

ROOT = Path(__file__).resolve().parent
DIGITS = ROOT / "data" / "mnist_train10k.npz"
DIGITS_VAE = ROOT / "weights" / "vae-digits.pt"

# ---------------------------------------------------------------------------------------------------------------------
# The VAE. State-dict keys are those of diffusers' AutoencoderKL.

SD = dict(channels=[128, 256, 512, 512], layers=2, latent=4, groups=32, image_channels=3, image_size=256, scale=0.18215)
KL16 = SD | dict(channels=[128, 128, 256, 256, 512], latent=16, encoder_attention=True, scale=0.2325)
VAES = {
    "digits": dict(channels=[16, 32, 32], layers=1, latent=4, groups=8, image_channels=1, image_size=32, scale=1.0),
    "sd-ema": SD,
    "sd-mse": SD,
    "kl16": KL16,
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
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


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
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


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
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] <-> latents; `config` is a line of VAES. `dtype` is what it computes in (autocast); float32 in and out."""

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
        """How many pixels a side one latent value stands for."""
        return 2 ** (len(self.config["channels"]) - 1)

    def autocast(self, x):
        return torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, x):
        """-> mean, std, each (B, C, H, W): the posterior's moments, unscaled."""
        with self.autocast(x):
            moments = self.quant_conv(self.encoder(x))
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(-30, 20)).exp()

    def decode(self, z):
        """Unscaled latents -> images, not clamped."""
        with self.autocast(z):
            return self.decoder(self.post_quant_conv(z)).float()


def load_vae(name: str = "digits", ckpt=None, device="cpu", dtype=torch.float32) -> AutoencoderKL:
    """A frozen VAE. The weights are ckpt's (a path or URL, in diffusers or latent-diffusion format), else the registry's."""
    if name not in VAES:
        fail(f"no VAE is called {name!r}; there are {', '.join(VAES)}")
    path = locate(ckpt) if ckpt else DIGITS_VAE if name == "digits" else fetch(f"vae-{name}")
    state, config = read_state(path)
    other = config["name"] if config else guess_model(state)
    if other not in (None, name):
        fail(f"{path} holds {other}, not the VAE {name}; give another file{f', or --vae {other}' if other in VAES else ''}")
    if name == "digits" and config is None:
        fail(f"{path} does not hold a VAE for digits; train one with --train-vae")
    with torch.device("meta"):
        vae = AutoencoderKL(config or VAES[name], dtype)
    load_state(vae, rename_vae_keys(state), path)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def rename_vae_keys(state: dict) -> dict:
    """The keys of the latent-diffusion code and of old diffusers -> ours. 1x1 convolutions of attention become Linear."""
    state = {k.removeprefix("first_stage_model."): v for k, v in state.items()}
    levels = 1 + max((int(k.split(".")[2]) for k in state if k.startswith("decoder.up.")), default=0)
    renamed = {}
    for key, value in state.items():
        k = key
        if key.startswith("decoder.up."):  # there the level that runs last is number 0
            _, _, i, rest = key.split(".", 3)
            k = f"decoder.up_blocks.{levels - 1 - int(i)}.{rest}"
        for old, new in (
                ("encoder.down.", "encoder.down_blocks."), (".block.", ".resnets."), (".attn.", ".attentions."),
                (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
                (".mid.attn_1.", ".mid_block.attentions.0."), (".downsample.", ".downsamplers.0."),
                (".upsample.", ".upsamplers.0."), (".nin_shortcut.", ".conv_shortcut."), (".norm_out.", ".conv_norm_out.")):
            k = k.replace(old, new)
        if ".attentions." in k:
            for old, new in ((".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
                             (".proj_out.", ".to_out.0."), (".query.", ".to_q."), (".key.", ".to_k."),
                             (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
                k = k.replace(old, new)
            value = value.flatten(1) if value.ndim == 4 else value
        if k.split(".")[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv"):  # not the GAN loss or the EMA counters
            renamed[k] = value
    return renamed


@torch.no_grad()
def decode_images(vae: AutoencoderKL, latents) -> np.ndarray:
    """Scaled latents (N, C, H, W) -> uint8 images (N, fH, fW, 3), in batches of half a megapixel: about 2 GB at full size."""
    batch = max(1, 2**19 // (latents.shape[2] * latents.shape[3] * vae.factor**2))
    images = []
    for z in latents.split(batch):
        x = vae.decode(z / vae.scale)
        x = (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        images.append(x.expand(-1, -1, -1, 3).cpu().numpy())
    return np.concatenate(images) if images else np.zeros((0, latents.shape[2] * vae.factor, latents.shape[3] * vae.factor, 3), np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Training the VAE of the digits: 9,000 to learn from, 1,000 held out.


def train_vae(args, steps=1500, batch=64, kl_weight=1e-3, lr=2e-3):
    """L1 + MSE + kl_weight * KL (each a mean over its values), AdamW, one-cycle learning rate, average of the weights."""
    device = start_ranks(args.device)
    images, _, _ = read_npz(args.data or DIGITS)
    if images.shape[1:] != (28, 28):
        fail(f"--train-vae trains on grey digits of 28x28 pixels, and these images have shape {images.shape[1:]}")
    x = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))).to(device)[:, None]
    x = x.float() / 127.5 - 1  # (N, 1, 32, 32)
    train, held_out = x[: len(x) * 9 // 10], x[len(x) * 9 // 10 :]
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(dict(name="digits", **VAES["digits"])).to(device, memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    progress = Progress(f"train VAE ({sum(p.numel() for p in vae.parameters()):,} parameters)", steps, "steps")
    for step in range(steps):
        rows = np.random.default_rng(mix(args.seed, step)).integers(len(train), size=batch)
        target = train[torch.from_numpy(rows).to(device)]
        mean, std = vae.encode(target)
        out = vae.decode(mean + std * torch.randn_like(std))
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        loss = F.l1_loss(out, target) + F.mse_loss(out, target) + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        progress.update(step + 1, f"loss {loss.item():.4f}")
    vae = average.module.eval()
    with torch.no_grad():
        mean, std = (torch.cat(m) for m in zip(*(vae.encode(b) for b in train.split(500))))
        sample = mean + std * torch.randn_like(std)
    scale = round(1 / sample.std().item(), 5)
    print(f"latents: std {sample.std().item():.4f}, so scale {scale}; per channel {[round(s, 3) for s in sample.std((0, 2, 3)).tolist()]}, posterior std {std.mean().item():.4f}")
    for what, noise in (("means", 0), ("samples", 1)):
        whole, inside = psnr(vae, held_out, noise)
        print(f"held-out PSNR on {len(held_out)} digits, from posterior {what}: {whole:.2f} dB, {inside:.2f} dB without the padding")
    vae.config["scale"] = scale
    save_checkpoint(args.out or DIGITS_VAE, config=vae.config, model={k: v.half().cpu() for k, v in vae.state_dict().items()})


@torch.no_grad()
def psnr(vae, x, noise=0) -> tuple:
    """Of the reconstructions of x (N, 1, 32, 32), the error taken over all images; the same over the inner 28x28 pixels."""
    errors = []
    for part in x.split(250):
        mean, std = vae.encode(part)
        y = vae.decode(mean + noise * std * torch.randn_like(std)).clamp(-1, 1)
        errors.append(((y - part) / 2) ** 2)
    errors = torch.cat(errors)
    return tuple(-10 * e.mean().log10().item() for e in (errors, errors[..., 2:-2, 2:-2]))


# ---------------------------------------------------------------------------------------------------------------------
# Images: a folder of class folders, or an .npz of uint8 images (arr_0) with labels (arr_1).

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def read_data(path):
    """-> images (a list of paths, or an array (N, H, W) or (N, H, W, 3)), labels (N,), class names, a fingerprint."""
    path = Path(path)
    if not path.exists():
        fail(f"--data {path} does not exist")
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
            fail(f"--data {path}: the class folder {name!r} holds no images ({', '.join(EXTENSIONS)})")
        labels += [label] * (len(images) - before)
    if not images:
        fail(f"--data {path} holds no class folders; put the images in one sub-folder a class")
    return images, np.array(labels, np.int64), classes


def read_npz(path):
    """-> images uint8 (N, H, W) or (N, H, W, 3), labels int64 (N,), class names; fails in one sentence on anything else."""
    try:
        with np.load(path) as data:
            images, labels = data["arr_0"], data["arr_1"]
    except KeyError as e:
        fail(f"{path} lacks {str(e).split()[0].strip(chr(34))}; images are expected in arr_0 and labels in arr_1")
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
        fail(f"{path} is not a complete .npz file ({str(e).splitlines()[0][:80] if str(e) else type(e).__name__})")
    if images.dtype != np.uint8 or not (images.ndim == 3 or images.ndim == 4 and images.shape[3] == 3) or not images.size:
        fail(f"{path}: arr_0 must be uint8 images (N, H, W) or (N, H, W, 3), not {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
        fail(f"{path}: arr_1 must be {len(images)} whole numbers from 0, one an image, not {labels.dtype} {labels.shape}")
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


TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


def upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says. (ImageOps.exif_transpose writes the EXIF anew, and fails where another of its fields is odd.)"""
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # damaged EXIF is no reason to lose the image
        turn = None
    return image.transpose(Image.Transpose[turn]) if turn else image


def to_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any image -> uint8 (channels, size, size): upright, 8-bit, grey or RGB. Transparency is dropped, as in ADM."""
    image = upright(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have no known range (mode {image.mode})")
    if image.mode == "P":  # through RGBA, for palettes with transparent entries
        image = image.convert("RGBA")
    image = image.convert("L" if channels == 1 else "RGB")
    if channels == 1 and image.size == (28, 28) and size == 32:
        image = ImageOps.expand(image, 2)  # a digit: two black pixels all around rather than a blurry enlargement
    pixels = center_crop(image, size).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1)


class Chunks(torch.utils.data.Dataset):
    """chunks[i] -> i, pixels (B, c, S, S) uint8, labels (B,) with -1 for unreadable images, what was wrong with those."""

    def __init__(self, images, labels, chunk, size, channels):
        self.images, self.labels, self.chunk, self.size, self.channels = images, labels, chunk, size, channels

    def __getitem__(self, i):
        rows = range(i * self.chunk, min((i + 1) * self.chunk, len(self.labels)))
        pixels = np.zeros((len(rows), self.channels, self.size, self.size), np.uint8)
        labels, problems = self.labels[rows.start : rows.stop].copy(), []
        for k, row in enumerate(rows):
            try:
                if isinstance(self.images, list):
                    with Image.open(self.images[row]) as image:
                        pixels[k] = to_pixels(image, self.size, self.channels)
                else:
                    pixels[k] = to_pixels(Image.fromarray(self.images[row]), self.size, self.channels)
            except MemoryError:
                raise
            except Exception as e:  # decoders of damaged files raise all kinds; one of them must not end days of work
                labels[k] = -1
                problems.append(f"{self.name(row)}: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
        return i, torch.from_numpy(pixels), labels, problems

    def name(self, row):
        return str(self.images[row]) if isinstance(self.images, list) else f"image {row}"


# ---------------------------------------------------------------------------------------------------------------------
# Writing latents. While rows lack, the files are called moments.part, labels.part and done.part (one byte a chunk).

SETTINGS = ("vae", "weights", "image_size", "shape", "flips", "count", "chunk", "dtype", "data")  # what the bytes depend on


def extract(args):
    """Images of --data -> a directory of latents, all ranks together. Exit code 3 if some could not be read."""
    device = start_ranks(args.device)
    vae = load_vae(args.vae, args.ckpt, device, getattr(torch, args.dtype))
    size, channels = args.image_size or vae.config["image_size"], vae.config["image_channels"]
    if size % vae.factor:
        fail(f"--image-size {size} is not a multiple of {vae.factor}, the pixels a side of one latent value of {args.vae}")
    images, labels, classes, fingerprint = read_data(args.data or DIGITS)
    flip = args.vae != "digits" if args.flip is None else args.flip
    side = size // vae.factor
    meta = dict(vae=args.vae, weights=crc(vae), scale=vae.scale, image_size=size, shape=[vae.config["latent"], side, side],
                flips=1 + flip, count=len(labels), chunk=args.batch_size or (250 if args.vae == "digits" else 32),
                dtype=args.dtype, data=fingerprint, classes=classes, complete=False)
    out = Path(args.out or "out/latents")
    with contextlib.ExitStack() as closing:
        todo = on_rank_0(lambda: prepare(out, meta, args.resume, closing))
        if len(todo):
            encode_chunks(vae, Chunks(images, labels, meta["chunk"], size, channels), todo, out, meta, args, device)
        if rank() != 0:
            return
        skipped = finish(out, images)
    print(f"{out} holds the latents of {meta['count'] - len(skipped):,} images of {len(classes)} classes")
    if skipped:
        print(f"warning: {len(skipped)} images could not be read and are left out (listed in {out}/meta.json)", file=sys.stderr)
        raise SystemExit(3)


def prepare(out, meta, resume, closing):
    """Finds or makes the files in `out`, which is locked until `closing` closes; -> the chunks to encode."""
    chunks = -(-meta["count"] // meta["chunk"])
    shape = (meta["count"], meta["flips"], 2 * meta["shape"][0], *meta["shape"][1:])
    total = 2 * int(np.prod(shape, dtype=np.int64)) + 8 * meta["count"]
    try:
        if out.exists():
            lock(out, closing)
        old = json.loads((out / "meta.json").read_text()) if resume == "auto" and (out / "meta.json").exists() else None
        if old is not None:
            for key in SETTINGS:
                if old.get(key) != meta[key]:
                    fail(f"{out} holds latents made with another {key} ({old.get(key)} instead of {meta[key]}); choose another --out, or start anew with --resume never")
            if old["complete"]:
                print(f"{out} is complete, nothing to encode")
                return []
            done = np.fromfile(out / "done.part", np.uint8) if (out / "done.part").exists() else []
            if len(done) != chunks:
                fail(f"{out} has lost its record of what is done; start anew with --resume never")
            print(f"{out}: {done.sum()} of {chunks} chunks are done, going on")
        # what is there already, to be filled in or replaced, counts as free (the files have holes where nothing was written)
        ours = sum(512 * f.stat().st_blocks for f in out.glob("*") if f.suffix in (".npy", ".part"))
        free = ours + shutil.disk_usage(next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())).free
        print(f"{meta['count']:,} images of {len(meta['classes'])} classes -> moments {shape}, {size_of(total)} on disk, {size_of(free)} free")
        if total > free:
            fail(f"{out} needs {size_of(total)} and its disk has {size_of(free)} free; choose another --out")
        if old is not None:
            return np.flatnonzero(done == 0)
        if not out.exists():
            out.mkdir(parents=True)
            lock(out, closing)
        (out / "meta.json").unlink(missing_ok=True)
        for name in ("moments", "labels"):
            (out / f"{name}.npy").unlink(missing_ok=True)
        np.lib.format.open_memmap(out / "moments.part", "w+", np.float16, shape)
        np.lib.format.open_memmap(out / "labels.part", "w+", np.int64, shape[:1])
        np.zeros(chunks, np.uint8).tofile(out / "done.part")
    except (OSError, ValueError, KeyError) as e:
        fail(f"cannot write latents to {out}: {getattr(e, 'strerror', None) or e}; choose another --out")
    write_whole(out / "meta.json", lambda temporary: temporary.write_text(json.dumps(meta)))
    return np.arange(chunks)


def lock(out, closing):
    """One run at a time writes to `out`. A killed run's loader processes hold its lock for some seconds more."""
    folder = os.open(out, os.O_RDONLY)
    closing.callback(os.close, folder)
    for _ in range(30):
        try:
            return fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(1)
    fail(f"another run is writing to {out}; wait for it, or choose another --out")


def encode_chunks(vae, dataset, todo, out, meta, args, device):
    """This rank's share of the chunks `todo`: pixels -> moments -> their rows of the files."""
    mine = todo[rank() :: world_size()].tolist()
    if not mine and rank() != 0:
        return
    workers = args.workers
    if workers is None:  # an .npz is in memory already; image files need decoding
        workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if isinstance(dataset.images, list) else 0
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=mine, num_workers=workers, pin_memory=device.type == "cuda")
    files = {name: os.open(out / f"{name}.part", os.O_RDWR) for name in ("moments", "labels", "done")}
    starts = {name: np.load(out / f"{name}.part", mmap_mode="r").offset for name in ("moments", "labels")}
    row_bytes = 2 * meta["flips"] * 2 * int(np.prod(meta["shape"]))
    count = meta["count"]
    rows_done = lambda: min(int((np.fromfile(out / "done.part", np.uint8) > 0).sum()) * meta["chunk"], count)
    start, first = time.time(), rows_done()
    progress = Progress("extract", count, "images", first)

    for i, pixels, labels, problems in loader:
        for problem in problems:
            if args.strict:
                fail(f"cannot read {problem}; mend or remove it, then start again (without --strict it is left out)")
            print(f"warning: cannot read {problem}; left out", file=sys.stderr)
        if len(problems) == len(labels) >= 8:
            fail(f"none of {len(labels)} images in a row can be read, the first is {problems[0]}; is the disk all right?")
        moments = encode_pixels(vae, pixels.to(device, non_blocking=True), meta["flips"])
        if not np.isfinite(moments).all():
            fail(f"the VAE's output for the images from {dataset.name(i * meta['chunk'])} on is not finite in {meta['dtype']} or beyond float16; try --dtype float32 with --resume never, and mind the images' values")
        row = i * meta["chunk"]
        try:
            write_at(files["moments"], moments.tobytes(), starts["moments"] + row * row_bytes)
            write_at(files["labels"], np.asarray(labels, np.int64).tobytes(), starts["labels"] + row * 8)
            os.fsync(files["moments"])
            os.fsync(files["labels"])
            write_at(files["done"], b"\1", i)  # only now: what is marked as done is on disk
        except OSError as e:
            fail(f"cannot write to {out}: {e.strerror}; make room and start again, what is done is kept")
        if rank() == 0:
            done = rows_done()
            progress.update(done, f"{(done - first) / (time.time() - start) / world_size():.1f} images/s a rank")
    for file in files.values():
        os.close(file)
    if rank() == 0:
        while rows_done() < count:  # wait for the others (a barrier would time out on a slow one)
            time.sleep(0.2)
        print(f"encoded {count - first:,} images in {clock(time.time() - start)}, {(count - first) / (time.time() - start):.1f} images/s")


@torch.no_grad()
def encode_pixels(vae, pixels, flips) -> np.ndarray:
    """uint8 (B, c, S, S) -> moments float16 (B, flips, 2C, H, W)."""
    x = (pixels.float() / 127.5 - 1).to(memory_format=torch.channels_last)
    views = [x, x.flip(-1)][:flips]
    mean, std = vae.encode(torch.cat(views))
    moments = torch.cat([mean, std], dim=1).half()  # (flips * B, 2C, H, W)
    return moments.unflatten(0, (flips, -1)).transpose(0, 1).contiguous().cpu().numpy()


def finish(out, images) -> list:
    """Gives the complete files their names; -> the images that were left out."""
    for name in ("moments", "labels"):
        if (out / f"{name}.part").exists():
            os.replace(out / f"{name}.part", out / f"{name}.npy")
    meta = json.loads((out / "meta.json").read_text())
    if not meta["complete"]:
        lost = np.flatnonzero(np.load(out / "labels.npy") < 0).tolist()
        skipped = [dict(row=row, name=str(images[row]) if isinstance(images, list) else f"image {row}") for row in lost]
        meta |= dict(complete=True, skipped=skipped)
        write_whole(out / "meta.json", lambda temporary: temporary.write_text(json.dumps(meta)))
    (out / "done.part").unlink(missing_ok=True)
    return meta["skipped"]


def on_rank_0(function):
    """function() of rank 0, on all ranks. Where it fails, all end; rank 0 has said why."""
    result = [None, False]
    if rank() == 0:
        try:
            result = [function(), True]
        except SystemExit:
            pass
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if not result[1]:
        raise SystemExit(2)
    return result[0]


def write_at(file, data: bytes, offset: int):
    if os.pwrite(file, data, offset) != len(data):
        raise OSError(28, "no space left on device")


def crc(vae) -> int:
    """A checksum of the weights, so that a run does not continue with other ones."""
    total = 0
    for v in vae.state_dict().values():
        total = zlib.crc32(v.cpu().contiguous().numpy().tobytes(), total)
    return total


def size_of(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# Reading latents.


class Latents:
    """A complete directory of latents. Rows are numbered without the images that could not be read."""

    def __init__(self, directory):
        directory = Path(directory)
        try:
            self.meta = json.loads((directory / "meta.json").read_text())
            if not self.meta["complete"]:
                fail(f"{directory} is not complete; run extract_latents.py again to finish it")
            self.moments = np.load(directory / "moments.npy", mmap_mode="r")  # (N, flips, 2C, H, W)
            labels = np.load(directory / "labels.npy")
            self.shape, self.scale, self.classes = tuple(self.meta["shape"]), self.meta["scale"], len(self.meta["classes"])
            expected = (self.meta["count"], self.meta["flips"], 2 * self.shape[0], *self.shape[1:])
        except FileNotFoundError as e:
            fail(f"{directory} holds no latents ({Path(e.filename).name} is missing); make them with extract_latents.py")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
            fail(f"{directory} is damaged ({str(e).splitlines()[0][:80]}); make it again with extract_latents.py --resume never")
        if self.moments.shape != expected or self.moments.dtype != np.float16 or labels.shape != expected[:1] or labels.dtype != np.int64:
            fail(f"{directory} is damaged: moments {self.moments.dtype} {self.moments.shape} with {labels.shape} labels instead of float16 {expected}; make it again with extract_latents.py --resume never")
        if labels.max() >= self.classes:
            fail(f"{directory} is damaged: label {labels.max()} among {self.classes} classes; make it again with extract_latents.py --resume never")
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, noise, device):
        """-> x (B, C, H, W) float32, drawn from the posterior and scaled; y (B,). noise: a RowNoise of len(rows) rows.

        The posterior's noise is drawn on the device. Which images are mirrored is drawn here, so that one of the two is read;
        the rows of `noise` lie in one block, as in training.
        """
        device, flips = torch.device(device), self.moments.shape[1]
        mirrored = noise.host.random(noise.block)[noise.rows] < 0.5 if flips == 2 else 0
        moments = self.read(flips * self.rows[rows] + mirrored, device.type == "cuda").to(device, non_blocking=True)
        mean, std = moments.float().chunk(2, dim=1)
        x = noise.normal(*self.shape).mul_(std).add_(mean).mul_(self.scale)
        return x, torch.from_numpy(self.labels[rows]).to(device)

    def read(self, places, pin=False):
        """Moments (B, 2C, H, W) float16; place `flips * row` is the image of that row, the next one its mirror image."""
        out = torch.empty((len(places), *self.moments.shape[2:]), dtype=torch.float16, pin_memory=pin)
        np.take(self.moments.reshape(-1, *self.moments.shape[2:]), places, axis=0, out=out.numpy(), mode="clip")  # clip: numpy's unbuffered way
        return out


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that depends on (seed, epoch) alone, the same on every rank."""
    return np.random.default_rng(mix(seed, epoch)).permutation(n)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    """The command line: extraction, or --train-vae."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="folder of class folders, or .npz of uint8 images with labels (default: the bundled digits)")
    parser.add_argument("--vae", default="digits", choices=VAES)
    parser.add_argument("--ckpt", metavar="FILE", help="weights of the VAE, a path or URL, instead of the bundled or official ones")
    parser.add_argument("--out", metavar="PATH", help="(default: out/latents; with --train-vae: weights/vae-digits.pt)")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: 256, digits 32)")
    parser.add_argument("--batch-size", type=int, help="images that one rank encodes together (default: 32, digits 250)")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror images too (default: yes, digits no)")
    parser.add_argument("--workers", type=int, help="processes a rank that decode images (default: up to 8)")
    parser.add_argument("--strict", action="store_true", help="stop at an unreadable image")
    parser.add_argument("--resume", default="auto", choices=["auto", "never"], help="continue what is in --out, or start anew")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="what the VAE computes in")
    parser.add_argument("--seed", type=int, default=0, help="of --train-vae; extraction draws nothing")
    parser.add_argument("--train-vae", action="store_true", help="train the small VAE on digits instead")
    args = parser.parse_args()
    for option, least in (("batch_size", 1), ("image_size", 1), ("workers", 0)):
        if getattr(args, option) is not None and getattr(args, option) < least:
            fail(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least {least}")
    train_vae(args) if args.train_vae else extract(args)


if __name__ == "__main__":
    main()
    end_ranks()
