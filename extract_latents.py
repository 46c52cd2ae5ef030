"""Images -> latents on disk: what the diffusion transformers are trained on.

    python extract_latents.py                                                 # the bundled digits -> out/latents
    python extract_latents.py --data photos --vae sd-ema --out out/photos     # a folder of class folders
    torchrun --nproc_per_node=8 extract_latents.py --data imagenet/train --vae kl16 --out out/latents-kl16

A diffusion transformer does not work on pixels. An autoencoder (VAE), trained beforehand and never changed, turns
an image of 256 x 256 x 3 values into a latent of 32 x 32 x 4, and a generated latent back into an image. Since it
never changes, each image is encoded once, here, and not again in every epoch.

For each latent value the encoder gives a Gaussian, the posterior: a mean and a standard deviation. We store these
moments rather than a sample, so that each epoch draws fresh latents from them; of the mirror image, too. A folder of
latents holds

    moments.npy   (N, flips, 2C, H, W) float16: C means, then C standard deviations, unscaled; flips is 1 or 2
    labels.npy    (N,) int64, -1 where the image could not be read (`Latents` leaves such rows out)
    meta.json     VAE, scale, image size, class names, count; "complete" is false until the other two are there

The same command starts and continues: a run that was killed goes on, on any number of ranks, and ends in the same
bytes. An image that cannot be read is named in a warning and in meta.json, and left out.
"""
import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from model import (ROOT, Progress, RowGenerator, UserError, atomic_write, autocast, barrier, choose_dtype, fetch,
                   load_state, make_seed, rank, read_state, reading, run_main, save_checkpoint,
                   start_ranks, world_size)

DIGITS = ROOT / "data" / "mnist_train10k.npz"

# ---------------------------------------------------------------------------------------------------------------
# The VAE, that of latent diffusion (Rombach et al., arXiv 2112.10752). Its encoder halves the image from level to
# level and ends in the moments of the posterior; its decoder is the same backwards. Weights are named as in
# diffusers' AutoencoderKL. A network is bound to the VAE whose latents it was trained on.

SD = dict(
    channels=[128, 256, 512, 512],  # at each level of the encoder, from the image inwards
    layers=2,  # residual blocks at each level; the decoder has one more
    latent=4,  # C, channels of a latent
    groups=32,  # of GroupNorm
    image_channels=3,
    scale=0.18215,  # what latents are multiplied by for a standard deviation of about 1 (Rombach et al., D.1)
    # Defaults of the extraction:
    image_size=256,
    flip=True,  # encode mirror images, too
    batch_size=32,  # images encoded together
    shard=256,  # images in a file
)
# MAR's has one level more, 16 channels, and attention at the encoder's last level.
KL16 = dict(SD, channels=[128, 128, 256, 256, 512], latent=16, encoder_attention=True, scale=0.2325)
STABILITY = "https://huggingface.co/stabilityai/sd-vae-ft-{}/resolve/main/diffusion_pytorch_model.safetensors"
KL16_URL = "https://www.dropbox.com/scl/fi/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1"
VAES = {
    "digits": dict(  # made by reproduce/train_vae.py; the file of its weights says the scale
        channels=[16, 32, 32],
        layers=1,
        latent=4,
        groups=8,
        image_channels=1,
        scale=None,
        image_size=32,
        flip=False,
        batch_size=250,
        shard=250,
        weights=("vae-digits.pt", None),  # bundled: no address
    ),
    # DiT and SiT are trained with sd-ema; sd-mse decodes its latents, too, to slightly smoother images.
    "sd-ema": dict(SD, weights=("sd-vae-ft-ema.safetensors", STABILITY.format("ema"))),
    "sd-mse": dict(SD, weights=("sd-vae-ft-mse.safetensors", STABILITY.format("mse"))),
    "kl16": dict(KL16, weights=("kl16.ckpt", KL16_URL)),
}


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def group_norm(groups, c):
    return nn.GroupNorm(groups, c, eps=1e-6)


class ResnetBlock(nn.Module):
    """Twice GroupNorm, SiLU and a 3x3 convolution, beside a shortcut."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = group_norm(groups, c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = group_norm(groups, c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention with one head over all H * W positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = group_norm(groups, c)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x):  # (B, C, H, W) -> the same
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        h = h[:, None]  # (B, 1, HW, C): one head
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out(h)[:, 0].transpose(1, 2)  # (B, C, HW)
        return x + h.reshape(x.shape)


def downsample(c):
    """(B, c, H, W) -> (B, c, H / 2, W / 2), after zeros on the right and at the bottom only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):
    """(B, c, H, W) -> (B, c, 2H, 2W): every pixel doubled, then a convolution."""
    return nn.Sequential(OrderedDict(enlarge=nn.Upsample(scale_factor=2), conv=conv3x3(c, c)))


class Level(nn.Module):
    """Residual blocks at one resolution, the first `attentions` of them followed by attention; then down or up."""

    def __init__(self, c_in, c_out, layers, groups, attentions=0, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for i in range(layers):
            self.resnets.append(ResnetBlock(c_in if i == 0 else c_out, c_out, groups))
            self.attentions.append(AttentionBlock(c_out, groups) if i < attentions else nn.Identity())
        self.downsamplers = nn.Sequential(downsample(c_out)) if down else nn.Identity()
        self.upsamplers = nn.Sequential(upsample(c_out)) if up else nn.Identity()

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, H', W')
        for resnet, attention in zip(self.resnets, self.attentions):
            x = attention(resnet(x))
        return self.upsamplers(self.downsamplers(x))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] <-> latents; `config` is an entry of VAES. float32 in and out; computes in `dtype`."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.scale = config["scale"]
        latent = config["latent"]
        layers = config["layers"]
        groups = config["groups"]
        channels = config["channels"]
        outer = channels[0]  # at the resolution of the image
        inner = channels[-1]  # at that of the latent
        self.factor = 2 ** (len(channels) - 1)  # f, pixels per side of a latent value

        # All levels but the last halve the image.
        down_blocks = nn.Sequential()
        for c_in, c_out in zip([outer] + channels, channels[:-1]):
            down_blocks.append(Level(c_in, c_out, layers, groups, down=True))
        attentions = layers if config.get("encoder_attention") else 0
        down_blocks.append(Level(channels[-2], inner, layers, groups, attentions))
        self.encoder = nn.Sequential(OrderedDict(  # (B, 3, fH, fW) -> (B, 2C, H, W)
            conv_in=conv3x3(config["image_channels"], outer),
            down_blocks=down_blocks,
            mid_block=Level(inner, inner, 2, groups, attentions=1),
            conv_norm_out=group_norm(groups, inner),
            silu=nn.SiLU(),
            conv_out=conv3x3(inner, 2 * latent),
        ))

        # Backwards, and all levels but the last double it.
        up_blocks = nn.Sequential()
        channels = channels[::-1]
        for c_in, c_out in zip([inner] + channels, channels[:-1]):
            up_blocks.append(Level(c_in, c_out, layers + 1, groups, up=True))
        up_blocks.append(Level(channels[-2], outer, layers + 1, groups))
        self.decoder = nn.Sequential(OrderedDict(  # (B, C, H, W) -> (B, 3, fH, fW)
            conv_in=conv3x3(latent, inner),
            mid_block=Level(inner, inner, 2, groups, attentions=1),
            up_blocks=up_blocks,
            conv_norm_out=group_norm(groups, outer),
            silu=nn.SiLU(),
            conv_out=conv3x3(outer, config["image_channels"]),
        ))

        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x):
        """-> mean, std, each (B, C, H, W): the posterior N(mean, std^2), unscaled."""
        with autocast(x.device, self.dtype):
            moments = self.quant_conv(self.encoder(x))
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)  # as in the releases
        return mean, (0.5 * logvar).exp()

    def decode(self, z):
        """Unscaled latents -> images, not clamped."""
        with autocast(z.device, self.dtype):
            return self.decoder(self.post_quant_conv(z)).float()


def load_vae(name="digits", ckpt=None, device="cpu", dtype=torch.float32):
    """A frozen VAE with the weights of `ckpt` (an official file, or train_vae.py's), else of the table."""
    entry = VAES[name]
    path = ckpt or fetch(*entry["weights"])
    state, config = read_state(path)
    config = dict(entry, name=name) | config  # only our own files (reproduce/train_vae.py) have one
    if config["name"] != name or config["scale"] is None:
        raise UserError(f"{path} does not hold the VAE {name}; give other weights, or another --vae")
    with torch.device("meta"):  # fresh weights would be thrown away
        vae = AutoencoderKL(config, dtype)
    with reading(path):
        load_state(vae, rename_vae_keys(state, len(config["channels"])))
    vae = vae.to(device, memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    return vae.eval().requires_grad_(False)


# The same weights go by three dialects of names: today's diffusers', which are ours; old diffusers', which differ in
# the attention; and those of the latent-diffusion code, which kl16 has.
RENAMED = {
    "encoder.down.": "encoder.down_blocks.",
    ".block.": ".resnets.",
    ".attn.": ".attentions.",
    ".mid.block_1.": ".mid_block.resnets.0.",
    ".mid.block_2.": ".mid_block.resnets.1.",
    ".mid.attn_1.": ".mid_block.attentions.0.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".nin_shortcut.": ".conv_shortcut.",
    ".norm_out.": ".conv_norm_out.",
    # In the attention:
    ".norm.": ".group_norm.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_out.": ".to_out.0.",
    ".proj_attn.": ".to_out.0.",
}


def rename_vae_keys(state, levels):
    """Weights in any of the three dialects -> ours. levels: of the decoder."""
    renamed = {}
    for key, value in state.items():
        if not key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            continue  # the discriminator that it was trained with
        for i in range(levels):  # latent-diffusion counts the decoder's levels from the image inwards
            key = key.replace(f"decoder.up.{i}.", f"decoder.up_blocks.{levels - 1 - i}.")
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        if ".attentions." in key and value.ndim == 4:
            value = value.flatten(1)  # a 1x1 convolution, which is our Linear
        renamed[key] = value
    return renamed


@torch.no_grad()
def encode_pixels(vae, pixels, flips):
    """uint8 (B, c, S, S) -> moments float16 (B, flips, 2C, H, W) on the CPU."""
    device = next(vae.parameters()).device
    x = pixels.to(device).float() / 127.5 - 1
    if flips == 2:
        x = torch.cat([x, x.flip(-1)])  # (2B, c, S, S): the images, then their mirror images
    mean, std = vae.encode(x)
    moments = torch.cat([mean, std], dim=1).half()  # (flips * B, 2C, H, W)
    moments = moments.unflatten(0, (flips, -1))  # (flips, B, 2C, H, W)
    return moments.transpose(0, 1).contiguous().cpu()


def measure_scale(moments):
    """1 / the standard deviation of latents with these moments: the variance of the means, and the mean variance."""
    mean, std = moments.float().chunk(2, dim=2)
    variance = mean.var() + std.square().mean()
    return variance.rsqrt().item()


@torch.no_grad()
def decode_images(vae, latents):
    """Scaled latents (N, C, H, W) -> uint8 images (N, fH, fW, 3)."""
    pixels = latents.shape[2:].numel() * vae.factor**2  # of an image
    at_once = max(1, 2**19 // pixels)  # half a megapixel takes about 2 GB
    x = torch.cat([vae.decode(z / vae.scale) for z in latents.split(at_once)])
    x = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
    x = x.permute(0, 2, 3, 1)  # (N, fH, fW, 3), or 1 for grey images
    return x.expand(-1, -1, -1, 3).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# Images: a folder of class folders, or an .npz of uint8 images (arr_0) with labels (arr_1).

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def read_data(path, class_list=None):
    """-> images (a list of paths, or an array), labels (N,), class names, and a fingerprint of them."""
    if os.path.isdir(path):
        images, labels, classes = read_folder(path, class_list)
        names = [os.path.relpath(image, path) for image in images]  # stand for the images: reading all would take hours
        content = os.fsencode("\n".join(names))
    else:
        images, labels, classes = read_npz(path)
        content = images.tobytes()
    fingerprint = hashlib.sha256(content + labels.tobytes()).hexdigest()[:16]
    return images, labels, classes, fingerprint


def read_folder(path, class_list=None):
    """Classes are the sub-folders, sorted; images are sorted within them: the order of torchvision's ImageFolder.

    class_list: a file with one class per line, in the order of the labels; a line begins with the folder's name."""
    images = []
    labels = []
    classes = []
    if class_list:
        with reading(class_list):
            lines = Path(class_list).read_text().splitlines()
        classes = [line.split()[0] for line in lines if line.strip()]
    for folder in sorted(Path(path).iterdir()):
        if not folder.is_dir():
            continue
        if folder.name.startswith("."):
            print(f"warning: {folder} is no class, since its name begins with a dot", file=sys.stderr)
            continue
        for directory, _, files in sorted(os.walk(folder, followlinks=True)):
            for file in sorted(files):
                if file.lower().endswith(EXTENSIONS) and not file.startswith("."):  # macOS adds files like ._x.jpg
                    images.append(Path(directory, file))
        count = len(images) - len(labels)
        if not count:
            raise UserError(f"{folder} holds no {', '.join(EXTENSIONS)}; remove it, or put the class's images there")
        if not class_list:
            classes.append(folder.name)
        if folder.name not in classes:
            raise UserError(f"{folder} is not in {class_list}; add its class there, or remove the folder")
        labels += [classes.index(folder.name)] * count
    if not images:
        raise UserError(f"{path} holds no class folders; put the images into one sub-folder per class")
    if not class_list and len(classes) != 1000 and all(re.fullmatch("n[0-9]{8}", name) for name in classes):
        print(f"warning: {path} seems to hold {len(classes)} of ImageNet's 1000 classes, which get the labels 0 to "
              f"{len(classes) - 1}; give --class-list if the model knows them by ImageNet's numbers", file=sys.stderr)
    return images, np.array(labels), classes


def read_npz(path):
    """-> images uint8 (N, H, W) or (N, H, W, 3), labels int64 (N,), class names."""
    with reading(path), np.load(path) as data:
        images = data["arr_0"]
        labels = data["arr_1"]
    if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or len(labels) != len(images):
        raise UserError(f"{path} must hold uint8 images (N, H, W[, 3]) in arr_0 and their labels (N,) in arr_1, "
                        f"not {images.dtype} {images.shape} and {labels.dtype} {labels.shape}")
    classes = [str(i) for i in range(labels.max() + 1)]
    return images, labels.astype(np.int64), classes


def center_crop(image, size):
    """ADM's crop, as in the releases -> (size, size) or (size, size, 3)."""
    # Bicubic resampling looks at few pixels: a much larger image is first halved by averaging.
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)  # the short side becomes `size`
    height = round(image.height * scale)
    pixels = np.asarray(image.resize((width, height), Image.BICUBIC))
    top = (height - size) // 2
    left = (width - size) // 2
    return pixels[top : top + size, left : left + size]


def to_pixels(image, size, channels):
    """Any image -> uint8 (channels, size, size), converted to RGB or grey and cropped."""
    image = image.convert("L" if channels == 1 else "RGB")
    if channels == 1 and image.size == (28, 28) and size == 32:
        image = ImageOps.expand(image, 2)  # a digit: two black pixels all around, rather than blurred
    pixels = center_crop(image, size).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1)


def load_pixels(images, labels, size, channels):
    """Paths or arrays -> pixels uint8 (n, channels, size, size), labels (n,), and what could not be read, and why.

    An image that could not be read is black and has the label -1."""
    pixels = np.zeros((len(images), channels, size, size), np.uint8)
    labels = labels.copy()
    skipped = []
    for i, image in enumerate(images):
        try:
            opened = Image.open(image) if isinstance(image, Path) else Image.fromarray(image)
            pixels[i] = to_pixels(opened, size, channels)
        except Exception as e:  # decoders of damaged files raise all kinds; one of them must not end days of work
            labels[i] = -1
            skipped.append(f"{image}: {e!r}")
            print(f"warning: left out, since it cannot be read: {skipped[-1]}", file=sys.stderr)
    if len(skipped) > max(8, len(images) // 2):  # a disk that went away, rather than a few bad files
        raise UserError(f"{len(skipped)} of {len(images)} images cannot be read; repair or remove them")
    return torch.from_numpy(pixels), torch.from_numpy(labels), skipped


def prefetch(function, items, ahead):
    """function(item) of each item, in order; threads compute the next `ahead` of them meanwhile."""
    # Nobody waits for the threads to end: a generator that is dropped half-way may be cleared away by any thread, also
    # by one of these, which would wait for itself.
    threads = ThreadPoolExecutor(ahead)
    waiting = []
    for item in items:
        waiting.append(threads.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


# ---------------------------------------------------------------------------------------------------------------
# Writing latents. The images are divided into shards, some hundred each. A rank encodes every world_size-th shard and
# writes it into a file of its own; rank 0 joins the files at the end (for that moment they take twice the room).
# The shard, not the rank, decides which images are encoded together: so the bytes are the same for any number of
# ranks. And files appear whole or not at all: so after a kill only the missing shards are made.


def start_folder(out, meta, resume):
    """Starts or continues the folder `out`. Its meta.json says whether it is complete."""
    file = out / "meta.json"
    for left_by_a_kill in out.glob(".*.tmp"):
        left_by_a_kill.unlink()
    if resume == "never" or not file.exists():
        # The shards go first: a kill after a new meta.json would leave it with the old shards.
        shutil.rmtree(out / "shards", ignore_errors=True)
        write_json(file, dict(meta, complete=False))
        return
    with reading(file):
        old = json.loads(file.read_text())
    for key in meta:
        if old.get(key) != meta[key]:
            raise UserError(f"{out} holds latents with {key} {old.get(key)}, not {meta[key]}; "
                            "choose another --out, or start anew with --resume never")
    if old["complete"]:
        print(f"{out} is complete: there is nothing to encode; --resume never starts anew")


def shard_file(out, first):
    return out / "shards" / f"{first:08}.pt"


def write_shards(vae, images, labels, out, meta):
    """Images -> pixels -> moments -> this rank's shards, those that are missing."""
    firsts = range(0, meta["count"], meta["shard"])[rank() :: world_size()]
    missing = [first for first in firsts if not shard_file(out, first).exists()]

    def load(first):
        rows = slice(first, first + meta["shard"])
        return load_pixels(images[rows], labels[rows], meta["image_size"], vae.config["image_channels"])

    progress = Progress("extract", len(missing), "shards")
    loaded = prefetch(load, missing, ahead=8)  # opening images takes about as long as encoding them
    for done, first in enumerate(missing, start=1):
        pixels, shard_labels, skipped = next(loaded)
        batches = pixels.split(meta["batch_size"])
        moments = torch.cat([encode_pixels(vae, batch, meta["flips"]) for batch in batches])
        save_checkpoint(shard_file(out, first), moments=moments, labels=shard_labels, skipped=skipped)
        progress.update(done)


def join_shards(out, meta):
    """The shards, in order -> moments.npy, labels.npy and, last, a meta.json that says complete."""
    firsts = range(0, meta["count"], meta["shard"])
    shards = [torch.load(shard_file(out, first), mmap=True) for first in firsts]  # on the disk until they are used
    write_npy(out / "moments.npy", [shard["moments"].numpy() for shard in shards])
    write_npy(out / "labels.npy", [shard["labels"].numpy() for shard in shards])
    skipped = [problem for shard in shards for problem in shard["skipped"]]
    write_json(out / "meta.json", dict(meta, skipped=skipped, complete=True))
    shutil.rmtree(out / "shards")
    print(f"{out} holds the latents of {meta['count'] - len(skipped):,} images of {len(meta['classes'])} classes")


def write_npy(path, arrays):
    """The arrays, joined along their first axis; together they may be larger than memory."""
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])

    def write(temporary):
        with open(temporary, "wb") as f:
            header = dict(descr=arrays[0].dtype.str, fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(f, header)
            for array in arrays:
                f.write(array)

    atomic_write(path, write)


def write_json(path, value):
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value)))


# ---------------------------------------------------------------------------------------------------------------
# Reading latents, in the order of training. An epoch visits each image once, in an order that depends on (seed, epoch)
# alone; step k takes the next `batch_size` images, the global batch, and RowGenerator's random numbers for (seed, k).


class Latents:
    """A complete folder of latents. Rows are numbered without the images that could not be read."""

    def __init__(self, directory):
        directory = Path(directory)
        with reading(directory / "meta.json"):
            self.meta = json.loads((directory / "meta.json").read_text())
            if not self.meta["complete"]:
                raise UserError(f"{directory} is not complete; run extract_latents.py again to finish it")
        self.shape = tuple(self.meta["shape"])  # (C, H, W)
        self.scale = self.meta["scale"]
        self.classes = len(self.meta["classes"])
        self.file = open(directory / "moments.npy", "rb")
        self.moments = np.load(directory / "moments.npy", mmap_mode="r")  # (N, flips, 2C, H, W)
        labels = np.load(directory / "labels.npy")
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]

    def __len__(self):
        return len(self.rows)

    def facts(self):
        """What a network that is trained on these latents should know: the classes that occur, and the scale."""
        names = self.meta["classes"]
        return dict(classes={int(label): names[label] for label in np.unique(self.labels)}, scale=self.scale)

    def read(self, rows, rng):
        """-> moments (B, 2C, H, W) float16, of the images or, by chance, of their mirror images; labels (B,)."""
        flips = self.moments.shape[1]
        moments = self.moments.reshape(-1, *self.moments.shape[2:])  # (flips * N, 2C, H, W), a view
        places = flips * self.rows[rows]
        if flips == 2:  # toss a coin for each row of the global batch, and keep those of our rows
            places += rng.shared.random(rng.block)[rng.rows] < 0.5
        if hasattr(os, "posix_fadvise"):  # on Linux
            # Announce all rows before the first is copied: together a disk reads them several times as fast.
            size = moments[0].nbytes
            for place in places.tolist():
                start = self.moments.offset + place * size
                os.posix_fadvise(self.file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
        return torch.from_numpy(moments[places]), torch.from_numpy(self.labels[rows])

    def sample_posterior(self, moments, rng):
        """Moments (B, 2C, H, W) -> x (B, C, H, W) float32, a sample of the posterior, scaled; on rng's device."""
        moments = moments.to(rng.device, non_blocking=True).float()
        mean, std = moments.chunk(2, dim=1)
        eps = rng.normal(*self.shape)
        return (mean + std * eps) * self.scale


@functools.lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    """A permutation of n rows, the same on every rank."""
    return np.random.default_rng(make_seed(seed, epoch)).permutation(n)


class Batches:
    """batches(step, part) -> latents x, labels y, rng: a part of this rank's share of the global batch of `step`.

    The global batch is divided into world_size * accumulate parts, equal to within one row. Rows and random numbers
    follow from (seed, step) and the position in the global batch: ranks and accumulation do not change them. x is a
    sample that was drawn with rng; training draws with it what else these rows need."""

    def __init__(self, latents, batch_size, accumulate, seed, device):
        self.parts = world_size() * accumulate
        if not self.parts <= batch_size <= len(latents):
            raise UserError(f"--batch-size {batch_size} is impossible; give at least {self.parts} (ranks x accumulate) "
                            f"and at most {len(latents)} (images)")
        self.latents = latents
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.device = torch.device(device)
        self.next = None  # the part that self.prepared yields next

    def __call__(self, step, part):
        number = step * self.accumulate + part  # since the start of training
        if number != self.next:  # the first call, or a jump
            self.prepared = prefetch(self.prepare, itertools.count(number), ahead=2)
        self.next = number + 1
        moments, y, rng = next(self.prepared)
        x = self.latents.sample_posterior(moments, rng)
        return x, y.to(self.device, non_blocking=True), rng

    def prepare(self, number):
        """In a thread, while the network trains: moments, labels and rng of a part."""
        step, part = divmod(number, self.accumulate)
        epoch, step_of_epoch = divmod(step, len(self.latents) // self.batch_size)
        part += rank() * self.accumulate  # of all parts of the global batch
        start = self.batch_size * part // self.parts
        stop = self.batch_size * (part + 1) // self.parts
        first = self.batch_size * step_of_epoch  # where the global batch begins in the epoch
        rows = epoch_order(len(self.latents), self.seed, epoch)[first + start : first + stop]
        rng = RowGenerator((self.seed, step), start, stop, self.batch_size, self.device)
        moments, y = self.latents.read(rows, rng)
        if self.device.type == "cuda":  # from pinned memory the GPU copies while it computes
            moments = moments.pin_memory()
            y = y.pin_memory()
        return moments, y, rng


def check_fit(net, latents, directory):
    """Raises an error if the latents are another VAE's, or of more classes, than the network was made for."""
    shape = (net.channels, net.input_size, net.input_size)
    if latents.shape != shape or latents.classes > net.classes:
        raise UserError(f"{directory} holds latents {latents.shape} of {latents.classes} classes, the network takes "
                        f"{shape} of at most {net.classes}; give other --latents, or extract some with its VAE")


# ---------------------------------------------------------------------------------------------------------------
# The command: what depends on the flags, then writing.


def main(argv=None):
    """Encodes the images of --data into the folder --out, all ranks together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default=DIGITS, help="folder of class folders, or .npz (default: the bundled digits)")
    add("--out", default="out/latents", help="a folder (default: %(default)s)")
    add("--resume", default="auto", choices=["auto", "never"], help="auto goes on with what is in --out, never starts "
        "anew (default: %(default)s)")
    add("--vae", default="digits", choices=VAES, help="that of the model to be trained (default: %(default)s)")
    add("--ckpt", help="the VAE's weights (default: the bundled or official ones)")
    add("--scale", help="what latents are multiplied by: a number, or auto, 1 / their standard deviation over 256 "
        "images (default: the VAE's)")
    add("--class-list", help="a file with one class per line, in the order of the model's labels, for a folder that "
        "has some of them; the first word is the folder's name")
    add("--image-size", type=int, help="pixels per side (default: 256, digits 32)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror images, too (default: yes, digits no)")
    add("--dtype", default="float32", choices=["auto", "float32", "bfloat16"],
        help="of the forward pass (default: %(default)s, exact, since latents are made once and used in every epoch)")
    add("--batch-size", type=int, help="images encoded together (default: 32, digits 250)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    args = parser.parse_args(argv)

    device = start_ranks(args.device)
    dtype = choose_dtype(args.dtype, device)
    vae = load_vae(args.vae, args.ckpt, device, dtype)
    size = args.image_size or vae.config["image_size"]
    images, labels, classes, fingerprint = read_data(args.data, args.class_list)
    if args.scale == "auto":
        pixels, _, _ = load_pixels(images[:256], labels[:256], size, vae.config["image_channels"])
        vae.scale = measure_scale(encode_pixels(vae, pixels, flips=1))
    elif args.scale:
        vae.scale = float(args.scale)
    flip = vae.config["flip"] if args.flip is None else args.flip
    weights = [value.cpu().numpy().tobytes() for value in vae.state_dict().values()]
    meta = dict(  # all that the bytes depend on: a run with other values does not continue this one
        vae=args.vae,
        weights=zlib.crc32(b"".join(weights)),
        scale=vae.scale,
        image_size=size,
        dtype=str(dtype).removeprefix("torch."),
        data=fingerprint,
        shape=[vae.config["latent"], size // vae.factor, size // vae.factor],
        count=len(labels),
        classes=classes,
        flips=2 if flip else 1,
        shard=vae.config["shard"],
        batch_size=args.batch_size or vae.config["batch_size"],  # in another batch sums may run in another order
    )
    out = Path(args.out)
    if rank() == 0:
        start_folder(out, meta, args.resume)
    barrier()
    if json.loads((out / "meta.json").read_text())["complete"]:
        return
    write_shards(vae, images, labels, out, meta)
    barrier()
    if rank() == 0:
        join_shards(out, meta)


if __name__ == "__main__":
    run_main(main)
