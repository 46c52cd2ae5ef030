"""Measure generated images against real ones: FID, sFID, Inception Score, precision and recall.

    images -> feature network -> mean and covariance -> Frechet distance

Definitions are those of ADM's evaluator, the one behind the tables of most diffusion papers, without TensorFlow.
Two feature networks: `inception` (the 2015-12-05 graph; for natural images) and `digits` (a small classifier bundled
here; for MNIST). This file needs no other file of the project, so it may be used on anyone's samples:

    python fid.py                                                    # out/sample/samples.npz against the bundled digits
    torchrun --nproc_per_node=8 fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py --train-digits                                     # train the digit classifier again
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.linalg.lapack import dpstrf

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS = {"inception": "weights/pt_inception-2015-12-05-6726825d.pth", "digits": "weights/digits-classifier.pt"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class UserError(Exception):
    """A mistake the user can mend: printed as one sentence, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Feature networks. Each takes uint8 images (B, H, W, 1 or 3) and returns features (B, D), spatial features (B, S)
# or None, and class probabilities (B, C).


class DigitNet(nn.Module):
    """A small CNN on grey 32x32 digits, 64 features before its last layer."""

    dims = 64, 0, 10  # features, spatial features, classes

    def __init__(self):
        super().__init__()
        layers, cin = [], 1
        for cout, stride in [(16, 1), (32, 2), (32, 1), (64, 2), (64, 2)]:  # 32 -> 32 -> 16 -> 16 -> 8 -> 4
            layers += [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
            cin = cout
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def preprocess(self, images):
        """uint8 (B, H, W, C) -> float (B, 1, 32, 32) in [0, 1]."""
        # Samples are 32x32 RGB, MNIST is 28x28 grey: colour becomes grey by the mean of its channels, and 28 pixels
        # become 32 by two black ones on each side, just as the digits were padded for the autoencoder.
        x = images.float().mean(3).unsqueeze(1) / 255
        if x.shape[2:] == (28, 28):
            x = F.pad(x, (2, 2, 2, 2))
        if x.shape[2:] != (32, 32):
            raise UserError(f"the digits network takes 28x28 or 32x32 images, not {x.shape[3]}x{x.shape[2]}: "
                            "pass --features inception")
        return x

    def forward(self, images):
        features = self.body(self.preprocess(images))  # (B, 64)
        return features, None, self.head(features).softmax(1)


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU; `fold` makes it a convolution with bias and a ReLU."""

    def __init__(self, cin, cout, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:  # strided convolutions are not padded, the others keep the size
            padding = 0 if stride == 2 else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        # bn(conv(x)) = gain * conv(x) + (bias - gain * mean), gain = weight / sqrt(var + eps); rounded once.
        gain = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        bias = self.bn.bias.double() - gain * self.bn.running_mean.double()
        self.conv.weight.data = (self.conv.weight.double() * gain[:, None, None, None]).float()
        self.conv.bias = nn.Parameter(bias.float())
        self.bn = nn.Identity()


class Mixed(nn.Module):
    """Branches side by side, concatenated. A branch is a chain of ConvBN (cout, kernel[, stride]) called NAME_1,
    NAME_2, ..., or NAME where it is alone; a list at the end of a chain means that its members (_2a, _2b) read the same
    input. `branch_pool` pools first; a block with stride 2 max-pools without a convolution."""

    def __init__(self, cin, branches, pool="average"):
        super().__init__()
        self.pool, self.chains = pool, []
        for name, chain in branches.items():
            width, chains = cin, []
            for i, step in enumerate(chain, 1):
                parallel = isinstance(step, list)
                label = name if len(chain) == 1 else f"{name}_{i}"
                chains.append([label + tag for tag in "ab"] if parallel else [label])
                for conv, args in zip(chains[-1], step if parallel else [step]):
                    self.add_module(conv, ConvBN(width, *args))
                width = step[0] if not parallel else None
            self.chains.append((name, chains))

    def forward(self, x):
        """(B, c, H, W) -> the branches' outputs side by side, (B, c', H', W'); a strided pool about halves the side."""
        # Average pools do not count their padding; the last block of the graph max-pools instead (a quirk FID keeps).
        pooled = {"average": lambda: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
                  "max": lambda: F.max_pool2d(x, 3, 1, 1), "stride": lambda: F.max_pool2d(x, 3, 2)}[self.pool]()
        outs = []
        for name, chain in self.chains:
            y = pooled if name == "branch_pool" else x
            for names in chain[:-1]:
                y = getattr(self, names[0])(y)
            outs += [getattr(self, last)(y) for last in chain[-1]]
        return torch.cat(outs + [pooled] * (self.pool == "stride"), 1)


def mixed_a(cin, pool):
    return Mixed(cin, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                       "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool, 1)]})


def mixed_c(width):
    row, column = (1, 7), (7, 1)
    return Mixed(768, {"branch1x1": [(192, 1)], "branch7x7": [(width, 1), (width, row), (192, column)],
                       "branch7x7dbl": [(width, 1), (width, column), (width, row), (width, column), (192, row)],
                       "branch_pool": [(192, 1)]})


def mixed_e(cin, pool):
    both = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(cin, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), both],
                       "branch3x3dbl": [(448, 1), (384, 3), both], "branch_pool": [(192, 1)]}, pool)


class Inception(nn.Module):
    """Inception v3 of the TensorFlow graph of 2015-12-05, which defines FID; names as in the public PyTorch weights."""

    dims = 2048, 17 * 17 * 7, 1008

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)  # 299 -> 149
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)  # 147, then pooled to 73
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)  # 71, then pooled to 35
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3, 2)],  # 35 -> 17
                                    "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, "stride")
        self.Mixed_6b = mixed_c(128)
        self.Mixed_6c = mixed_c(160)
        self.Mixed_6d = mixed_c(160)
        self.Mixed_6e = mixed_c(192)
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3, 2)],  # 17 -> 8
                                    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]}, "stride")
        self.Mixed_7b = mixed_e(1280, "average")
        self.Mixed_7c = mixed_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        self.layout = torch.contiguous_format

    def fold(self):
        """Fold every batch norm into its convolution, and go channels-last: same features, faster (--benchmark)."""
        for module in self.modules():
            if isinstance(module, ConvBN):
                module.fold()
        self.layout = torch.channels_last
        return self.to(memory_format=self.layout)

    def preprocess(self, images):
        """uint8 (B, H, W, C) -> float (B, 3, 299, 299) in [-1, 1)."""
        x = images.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)  # grey becomes three equal channels
        return (tf1_resize(x, 299) - 128) / 128

    def forward(self, images):
        """uint8 images (B, H, W, 1 or 3) -> features (B, 2048) for FID, (B, 2023) for sFID, class probabilities (B, 1008) for the Inception Score."""
        x = self.preprocess(images).contiguous(memory_format=self.layout)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # sFID: 7 channels of Mixed_6d's 1x1 branch, (h, w, c)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        features = x.mean((2, 3))  # pool3
        logits = features @ self.fc.weight.T  # TensorFlow's evaluators leave the bias out of the Inception Score
        return features, spatial, logits.softmax(1)


def tf1_resize(x, size):
    """TensorFlow 1's bilinear resize: pixel i of the output lies at i * in / out of the input, without half pixels."""
    for dim in (3, 2):  # along x, then y
        n = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * float(np.float32(n) / np.float32(size))
        low = at.long()
        high = (low + 1).clamp(max=n - 1)
        weight = (at - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * weight
    return x


def load_inception(path=WEIGHTS["inception"]):
    """The FID network, folded: net(uint8 (B, H, W, C)) -> pool3 (B, 2048), spatial (B, 2023), probabilities."""
    if str(path) == WEIGHTS["inception"] and not Path(path).is_file():
        download(INCEPTION_URL, path)
    net = Inception().eval()
    load_weights(net, path, f"download {INCEPTION_URL} and put it there, or name it with --weights")
    return net.fold()


def download(url, path):
    """Fetch a file, once a machine. Without a network this does nothing, and load_weights says what to do by hand."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            with urllib.request.urlopen(url, timeout=20) as response:
                print(f"downloading {url} ({int(response.headers['Content-Length']) >> 20} MiB)", file=sys.stderr)
                save_atomically(path, lambda file: shutil.copyfileobj(response, file))
        except OSError:
            pass
    if dist.is_initialized():
        dist.barrier()


def load_digits(path=WEIGHTS["digits"]):
    """The bundled classifier: net(uint8 (B, H, W, C)) -> features (B, 64), None, probabilities (B, 10)."""
    net = DigitNet().eval()
    load_weights(net, path, "make it with `python fid.py --train-digits`")
    return net


def load_weights(net, path, hint):
    """Puts the state dict in `path` into net; UserError ending with `hint` if it is missing, damaged or another network's."""
    if not Path(path).is_file():
        raise UserError(f"no weights at {path}: {hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing, unexpected = net.load_state_dict(state, strict=False)  # copies float16 into float32
    except Exception as error:
        raise UserError(f"{path} does not hold the weights of {type(net).__name__}: {hint}") from error
    wrong = unexpected + [k for k in missing if not k.endswith("num_batches_tracked")]  # the public file has none
    if wrong:
        raise UserError(f"{path} does not hold the weights of {type(net).__name__}, see {wrong[0]}: {hint}")


def train_digits(data, out, seed, epochs=12, batch=128):
    """Train the classifier on the first 9,000 digits, test it on the last 1,000: a minute or two on two CPU cores."""
    images = open_images(data)
    if images.labels is None:
        raise UserError(f"{data} has no labels (arr_1), so no classifier can be trained on it")
    torch.manual_seed(seed)
    net = DigitNet()
    x = net.preprocess(torch.from_numpy(images.read(0, images.n)))  # (N, 1, 32, 32)
    y = torch.from_numpy(images.labels.astype(np.int64))
    held = images.n // 10
    train_x, train_y, test_x, test_y = x[:-held], y[:-held], x[-held:], y[-held:]
    steps = epochs * (len(train_x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.15)
    clock = time.time()
    for epoch in range(epochs):
        for rows in torch.randperm(len(train_x))[: len(train_x) // batch * batch].split(batch):
            features = net.body(distort(train_x[rows]))
            logits = net.head(F.dropout(features, 0.3))  # dropout spreads the digit over all 64 features
            loss = F.cross_entropy(logits, train_y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}  {time.time() - clock:.0f} s", file=sys.stderr)
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)  # test what is saved: the rounded weights
    with torch.no_grad():
        right = (net.eval().head(net.body(test_x)).argmax(1) == test_y).float().mean().item()
    save_atomically(out, lambda file: torch.save(state, file))
    print(f"{100 * right:.2f} % of the {held} held-out digits are right; wrote {out}")
    return right


def distort(x, degrees=12, scale=0.12, shift=2 / 16):
    """Rotate, scale and shift each image at random: 9,000 digits then suffice."""
    angle = (torch.rand(len(x)) * 2 - 1) * np.deg2rad(degrees)
    size = 1 + (torch.rand(len(x)) * 2 - 1) * scale
    dx, dy = (torch.rand(2, len(x)) * 2 - 1) * shift
    theta = torch.stack([angle.cos() * size, -angle.sin() * size, dx,
                         angle.sin() * size, angle.cos() * size, dy], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def save_atomically(path, write):
    """Write to a temporary name, then rename: nobody ever reads half a file."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as file:
            write(file)
        os.replace(temp, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if path.parent.is_dir():
            temp.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs: an ADM .npz, a folder of images, or a .npz of ready statistics.


class Images(NamedTuple):
    """Where images come from."""

    path: Path
    n: int = 0  # 0: ready statistics only
    shape: tuple = None  # (H, W, C)
    read: Callable = None  # read(lo, hi) -> uint8 (hi - lo, H, W, C)
    labels: np.ndarray = None
    ready: dict = {}  # mu, sigma[, mu_s, sigma_s] that the file brings along
    fingerprint: str = ""
    jpeg: bool = False


def open_images(path):
    """An .npz, a folder of images, or an .npz of statistics alone -> Images. UserError on anything else."""
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        raise UserError(f"no file or folder at {path}")
    try:
        return open_npz(path)
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable .npz file, perhaps a truncated one ({error})") from error


def open_npz(path):
    """ADM's format, mapped where it is stored uncompressed; statistics mu, sigma, mu_s, sigma_s if it has them."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    # The zip's own CRC-32 of each array: says what the file holds without reading it.
    fingerprint = str([(m.filename, m.file_size, m.CRC) for m in members])
    with np.load(path, allow_pickle=False) as file:
        names = file.files
        pairs = [pair for pair in (("mu", "sigma"), ("mu_s", "sigma_s")) if set(pair) <= set(names)]
        ready = {k: file[k] for pair in pairs for k in pair}
        labels = file["arr_1"] if "arr_1" in names else None
    for name, sigma in ((name, ready[name]) for name in ready if name.startswith("sigma")):
        if sigma.shape != 2 * ready[name.replace("sigma", "mu")].shape[:1] or not np.isfinite(sigma).all():
            raise UserError(f"{name} of {path}, of shape {sigma.shape}, is not the covariance that belongs to its mu")
    if "arr_0" not in names:
        if "mu" not in ready:
            raise UserError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma), only {names}")
        return Images(path, ready=ready, fingerprint=fingerprint)
    array = map_array(path, "arr_0.npy")
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise UserError(f"arr_0 of {path} is {array.dtype} {array.shape}: it must be uint8 (N, H, W, 3) or (N, H, W)")
    if len(array) < 2:
        raise UserError(f"{path} holds {len(array)} images: a covariance needs at least 2")
    if labels is not None and labels.shape != array.shape[:1]:
        raise UserError(f"{path} holds {len(array)} images but labels (arr_1) of shape {labels.shape}")
    if array.ndim == 3:
        array = array[..., None]  # grey
    read = lambda lo, hi: np.array(array[lo:hi])
    return Images(path, len(array), array.shape[1:], read, labels, ready, fingerprint)


def map_array(path, member):
    """One array of an .npz, memory-mapped where it is stored uncompressed (50,000 images of 256x256 are 9.8 GB)."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        file.seek(int(np.frombuffer(file.read(4), "<u2").sum()), os.SEEK_CUR)  # over the member's name and extra field
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{member} holds Python objects")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def open_folder(path):
    """A folder of images of one size, in sorted order, read as they are needed."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise UserError(f"{path} holds {len(files)} images: a covariance needs at least 2 ({' '.join(IMAGE_SUFFIXES)})")

    def load(file):
        try:
            return np.asarray(Image.open(file).convert("RGB"))
        except OSError as error:
            raise UserError(f"{file} is not a readable image ({error})") from error

    shape = load(files[0]).shape

    def read(lo, hi):
        images = [load(f) for f in files[lo:hi]]
        for file, image in zip(files[lo:hi], images):
            if image.shape != shape:
                raise UserError(f"{file} is {image.shape[1]}x{image.shape[0]} but {files[0]} is {shape[1]}x{shape[0]}: "
                                "crop all images to one size first")
        return np.stack(images)

    fingerprint = hashlib.sha256(str([(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns)
                                      for f in files]).encode()).hexdigest()
    jpeg = any(f.suffix.lower() in (".jpg", ".jpeg") for f in files)
    return Images(path, len(files), shape, read, fingerprint=fingerprint, jpeg=jpeg)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics: one pass over the images, sharded over ranks; sums in float64, so order and batch size do not show.

SPLIT = 5000  # images a split of the Inception Score, as in ADM


class Moments:
    """Streaming mean and covariance."""

    def __init__(self, dim, device):
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, x):  # (B, D)
        x = x.double()
        self.total += x.sum(0)
        self.outer.addmm_(x.T, x)

    def result(self, n):
        mean = self.total / n
        return mean.cpu().numpy(), ((self.outer - n * torch.outer(mean, mean)) / (n - 1)).cpu().numpy()


def split_sums(probs, first, sums, split):
    """Add images `first`, first + 1, ... to the sums of the Inception Score: a row a split, holding the sum of p,
    of p log p, and of 1. They make the score without keeping a probability, in any order, over any number of ranks."""
    p = probs.double()
    rows = (first + torch.arange(len(p), device=p.device)) // split
    plogp = torch.special.xlogy(p, p).sum(1, keepdim=True)  # 0 log 0 = 0, where ADM's p * log(p) is NaN
    sums.index_add_(0, rows, torch.cat([p, plogp, torch.ones_like(plogp)], 1))


def inception_score(sums):
    """exp of the mean KL(p(y|x) || p(y)) of a split; then the mean over splits, a short last one counting as much."""
    count = sums[:, -1]
    marginal = sums[:, :-2] / count[:, None]
    return (sums[:, -2] / count - torch.special.xlogy(marginal, marginal).sum(1)).exp().mean().item()


@torch.no_grad()
def compute_statistics(images, net, batch_size, device, keep):
    """Everything the metrics need of one set; `keep` also the features themselves, for precision and recall.
    Rank r takes the r-th run of images; rank 0 returns the result, the others None."""
    rank, world = ranks()
    dim, spatial_dim, classes = net.dims
    share = -(-images.n // world)
    lo, hi = min(rank * share, images.n), min((rank + 1) * share, images.n)
    pool, spatial = Moments(dim, device), Moments(spatial_dim, device)
    sums = torch.zeros(-(-images.n // SPLIT), classes + 2, dtype=torch.float64, device=device)
    right = torch.zeros(1, dtype=torch.float64, device=device)
    kept = torch.zeros(share if keep else 0, dim, device=device)
    batches = [(start, min(start + batch_size, hi)) for start in range(lo, hi, batch_size)]
    for start, stop in progress(batches, images.path.name, images.n):
        features, spatials, probs = net(torch.from_numpy(images.read(start, stop)).to(device))
        pool.add(features)
        if spatials is not None:
            spatial.add(spatials)
        split_sums(probs, start, sums, SPLIT)
        if images.labels is not None:
            labels = torch.from_numpy(images.labels[start:stop].astype(np.int64)).to(device)
            right += (probs.argmax(1) == labels).sum()
        if keep:
            kept[start - lo:stop - lo] = features
    if world > 1:
        for total in (pool.total, pool.outer, spatial.total, spatial.outer, sums, right):
            if total.numel():
                dist.all_reduce(total)
        parts = [torch.empty_like(kept) for _ in range(world)] if rank == 0 else None
        dist.gather(kept, parts)
        kept = torch.cat(parts) if rank == 0 else None
    if rank:
        return None
    stats = {"n": images.n, "is": inception_score(sums)}
    stats["mu"], stats["sigma"] = pool.result(images.n)
    if spatial_dim:
        stats["mu_s"], stats["sigma_s"] = spatial.result(images.n)
    if images.labels is not None:
        stats["accuracy"] = right.item() / images.n
    if keep:
        stats["features"] = kept[: images.n].cpu().numpy()
    return stats


def statistics(images, net, key, features, batch_size, device, keep, cache):
    """compute_statistics, or what it left next to the input last time: NAME.fid-FEATURES.npz, itself a valid --ref.
    The key names all that the numbers depend on: the images, the network's weights, the features kept or not."""
    rank, world = ranks()
    path = images.path.with_name(f"{images.path.name}.fid-{features}.npz")
    keys = [hashlib.sha256(f"1 {images.fingerprint} {key} {k}".encode()).hexdigest() for k in (True, False)]
    stats = read_cache(path, keys[:1] if keep else keys) if cache and rank == 0 else None
    hit = torch.tensor([stats is not None], dtype=torch.int32, device=device)
    if world > 1:
        dist.broadcast(hit, 0)
    if hit.item():
        return stats
    stats = compute_statistics(images, net, batch_size, device, keep)
    if cache and rank == 0:
        try:
            save_atomically(path, lambda file: np.savez(file, key=keys[0 if keep else 1], **stats))
        except UserError:
            pass  # a read-only folder: compute again next time
    return stats


def read_cache(path, keys):
    """The arrays of an earlier run if everything that they depend on is the same, else None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) in keys:
                return {k: file[k] if file[k].ndim else file[k].item() for k in file.files if k != "key"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # none, or not ours, or half a file: as good as none
    return None


def progress(steps, what, total):
    """Yield the steps of a list; every few seconds rank 0 says how far they are, how fast, and how long is left."""
    clock = shown = time.time()
    for done, step in enumerate(steps, 1):
        yield step
        if ranks()[0] == 0 and done < len(steps) and time.time() - shown > 5:
            shown, part = time.time(), done / len(steps)
            speed = part * total / (shown - clock)
            left = (1 - part) * total / speed / 60
            print(f"{what}: {100 * part:.0f} %, {speed:.1f} images/s, {left:.1f} min left", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics.


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))."""
    # With S = R R^T, the eigenvalues of S1 S2 that are not 0 are those of the symmetric (R1^T R2)(R1^T R2)^T. A pivoted
    # Cholesky stops at the rank of S, so fewer images than features add no zero eigenvalues, whose square roots would
    # blow round-off of 1e-16 up to 1e-8.
    product = root(sigma1).T @ root(sigma2)  # (rank 1, rank 2)
    product = product if len(product) <= product.shape[1] else product.T
    eigenvalues = torch.linalg.eigvalsh(torch.from_numpy(product @ product.T)).clamp(min=0)
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * eigenvalues.sqrt().sum().item()
    return max(float(distance), 0.0)


def root(sigma):
    """R (D, rank) with R R^T = sigma, symmetric and positive semi-definite."""
    factor, pivots, rank, _ = dpstrf(np.asarray(sigma, np.float64), lower=1)
    out = np.empty((len(sigma), rank))
    out[pivots - 1] = np.tril(factor)[:, :rank]
    return out


def precision_recall(real, fake, k=3, device="cpu"):
    """Precision: the share of fake inside the manifold of real; recall: of real inside that of fake. A point
    is inside a set if it is no farther from one of its points than that point's k-th nearest neighbour in the set."""
    # In float64, where the evaluator behind published tables used float16: near-ties do not hang on the block size.
    real, fake = (torch.as_tensor(x).to(device, torch.float64) for x in (real, fake))  # (N, D), (M, D)
    real_radii, fake_radii = knn_radii(real, k), knn_radii(fake, k)
    real_inside, fake_inside = torch.zeros(len(real), dtype=torch.bool, device=device), []
    for rows, distances in blocks(fake, real):
        fake_inside.append((distances <= real_radii).any(1))
        real_inside |= (distances <= fake_radii[rows, None]).any(0)
    return torch.cat(fake_inside).double().mean().item(), real_inside.double().mean().item()


def knn_radii(x, k=3):
    """Squared distance of each point to its k-th nearest neighbour (its own first is itself: hence k + 1)."""
    if len(x) <= k:
        raise UserError(f"precision and recall need more than {k} images in each set, not {len(x)}: pass --no-pr")
    return torch.cat([distances.topk(k + 1, largest=False).values[:, -1] for _, distances in blocks(x, x)])


def blocks(a, b, size=512):
    """(rows, squared distances of those rows of a to all of b): 50,000 columns of a block take 0.2 GB."""
    norms = b.square().sum(1)
    for rows in progress(torch.arange(len(a), device=a.device).split(size), "nearest neighbours", len(a)):
        distances = torch.addmm(norms[None], a[rows], b.T, alpha=-2)  # (size, len(b))
        yield rows, distances.add_(a[rows].square().sum(1, keepdim=True)).clamp_(min=0)


# ---------------------------------------------------------------------------------------------------------------------
# Putting it together.


def ranks():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def setup(device):
    """The device of this process, which joins the others if torchrun started it: nccl on CUDA, gloo on CPU."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is neither cpu nor cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this machine has no CUDA device: pass --device cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.allow_tf32 = False  # TF32 would round to three digits
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


def evaluate(samples, ref, features=None, weights=None, batch_size=None, device="cpu", cache=True, pr=True):
    """Compare two sets, each a path. Returns a dict: fid, and where they apply sfid, is, precision, recall, accuracy
    (the share of labelled digits that are read as their label), num_samples, num_ref, warnings. Ranks other than 0 get
    None. batch_size counts the images of all ranks together; 64 a rank by default."""
    rank, world = ranks()
    both = [open_images(samples), open_images(ref)]
    if features is None:  # Inception for its own statistics and for images of more than 64 pixels, digits otherwise
        inception = any(x.ready and len(x.ready["mu"]) == 2048 or x.n and max(x.shape[:2]) > 64 for x in both)
        features = "inception" if inception else "digits"
    weights = weights or WEIGHTS[features]
    network, load = {"inception": (Inception, load_inception), "digits": (DigitNet, load_digits)}[features]
    for i, images in enumerate(both):
        if images.ready and len(images.ready["mu"]) != network.dims[0]:
            if not images.n:
                raise UserError(f"{images.path} holds statistics of {len(images.ready['mu'])} features, {features} has "
                                f"{network.dims[0]}: pass another --features or --ref")
            both[i] = images._replace(ready={})  # another network's: its images will do
        if images.n and features == "digits":  # a wrong size is best told before the work starts
            DigitNet().preprocess(torch.zeros(1, *images.shape))
    samples, ref = both
    pr = pr and samples.n > 0 and ref.n > 0
    net = key = None
    if samples.n or pr or not ref.ready:
        net = load(weights).to(device)
        key = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    warnings = comparability(samples, ref, features, network.dims[0])
    for line in warnings if rank == 0 else []:
        print(f"warning: {line}", file=sys.stderr)
    per_rank = -(-batch_size // world) if batch_size else 64
    sets = []
    for images, needed in ((samples, samples.n > 0), (ref, pr or not ref.ready)):
        stats = statistics(images, net, key, features, per_rank, device, pr, cache) if needed else {}
        sets.append({**(stats or {}), **images.ready})  # statistics that a file brings win, as in ADM's evaluator
    if rank:
        return None
    fake, real = sets
    result = {"features": features, "num_samples": samples.n, "num_ref": ref.n,
              "fid": frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])}
    if "mu_s" in fake and "mu_s" in real:
        result["sfid"] = frechet_distance(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
    if "is" in fake:
        result["is"] = fake["is"]
    if pr:
        result["precision"], result["recall"] = precision_recall(real["features"], fake["features"], device=device)
    if "accuracy" in fake and features == "digits":
        result["accuracy"] = fake["accuracy"]
    return {**result, "warnings": warnings}


def comparability(samples, ref, features, dim):
    """What makes these numbers differ from published ones, a sentence each."""
    lines, n = [], samples.n
    if features == "inception" and 0 < n < 50000:
        lines.append(f"{n} samples: FID falls as samples are added, so compare with FID of {n}, not with FID-50K")
    if 0 < n <= dim:
        lines.append(f"{n} samples are no more than the {dim} features: the covariance is singular, FID far too high")
    if features == "inception" and n and ref.n and samples.shape[:2] != ref.shape[:2]:
        sizes = [f"{x.shape[1]}x{x.shape[0]}" for x in (samples, ref)]
        lines.append(f"samples are {sizes[0]} but the reference is {sizes[1]}: resizing blurs one more than the other")
    return lines + [f"{x.path} holds JPEG files: their artefacts change FID" for x in (samples, ref) if x.jpeg]


def benchmark(weights, device):
    """Two speed-ups in one run: batch norm folded and channels-last, and the Frechet distance without sqrtm."""
    from scipy.linalg import sqrtm

    torch.manual_seed(0)
    batch, plain, folded = 16, Inception().eval(), Inception().eval()
    if Path(weights).is_file():
        load_weights(plain, weights, "pass another --weights")
    else:  # random weights will do
        for name, x in plain.state_dict().items():
            if x.ndim > 1:
                x.normal_(0, (2 / x[0].numel()) ** 0.5)
            elif x.is_floating_point():
                x.uniform_(0.8, 1.2) if name.endswith(("weight", "running_var")) else x.normal_(0, 0.1)
    folded.load_state_dict(plain.state_dict())
    nets = {"unfolded": plain.to(device), "folded, channels-last": folded.fold().to(device)}
    images = torch.randint(0, 256, (batch, 256, 256, 3), dtype=torch.uint8, device=device)
    best, features = dict.fromkeys(nets, float("inf")), {}
    with torch.no_grad():
        for _ in range(4):
            for name, net in nets.items():
                clock = time.perf_counter()
                features[name] = net(images)[0].cpu()  # the copy waits for the GPU
                best[name] = min(best[name], time.perf_counter() - clock)
    (slow, fast), (a, b) = best.values(), features.values()
    for name, seconds in best.items():
        print(f"Inception {name}: {1000 * seconds / batch:.1f} ms an image")
    error = (a - b).abs().max() / a.abs().max()
    print(f"  {slow / fast:.2f} times faster; features differ by {error:.1e} of the largest")

    scales = [torch.logspace(0, -e, 2048, dtype=torch.float64) for e in (1, 2)]
    sets = [torch.randn(3000, 2048, dtype=torch.float64) * scale for scale in scales]
    (mu1, s1), (mu2, s2) = ((x.mean(0).numpy(), torch.cov(x.T).numpy()) for x in sets)
    clock = time.perf_counter()
    ours = frechet_distance(mu1, s1, mu2, s2)
    fast = time.perf_counter() - clock
    clock = time.perf_counter()
    theirs = np.square(mu1 - mu2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2)).real
    slow = time.perf_counter() - clock
    print(f"Frechet distance of 2048 features: {fast:.1f} s by eigenvalues, {slow:.1f} s by scipy's sqrtm\n"
          f"  {slow / fast:.1f} times faster; {ours:.8f} and {theirs:.8f}")


ROWS = {"fid": ("FID", "lower is better"), "sfid": ("sFID", "lower is better"),
        "is": ("Inception Score", "higher is better"), "precision": ("Precision", "0 to 1, higher is better"),
        "recall": ("Recall", "0 to 1, higher is better"), "accuracy": ("Label accuracy", "0 to 1, higher is better")}


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples", nargs="?", default="out/sample/samples.npz", metavar="SAMPLES",
        help=".npz with arr_0 uint8 (N, H, W, 3) or (N, H, W), and labels arr_1 if any; a folder of images of one "
             "size; or .npz of statistics mu, sigma[, mu_s, sigma_s] (default %(default)s)")
    add("--ref", default="data/mnist_train10k.npz", help="what to compare with, same formats (default %(default)s)")
    add("--features", choices=list(WEIGHTS),
        help="feature network (default: inception if images are over 64 pixels or an input holds its statistics, "
             "else digits)")
    add("--weights", metavar="FILE",
        help=f"its weights (default {WEIGHTS['inception']}, fetched when absent, or {WEIGHTS['digits']})")
    add("--json", nargs="?", const="-", metavar="FILE",
        help="also write the numbers to FILE; without FILE, one line of JSON on stdout instead of the table")
    add("--no-pr", action="store_true", help="no precision and recall: keeps no features, so any number of images fits")
    add("--no-cache", action="store_true", help="neither read nor write NAME.fid-FEATURES.npz next to the inputs")
    add("--batch-size", type=int, metavar="N", help="images a step, all ranks together (default 64 a rank)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (here %(default)s)")
    add("--train-digits", action="store_true", help="train the digit classifier on --ref, write it to --weights")
    add("--seed", type=int, default=0, help="of --train-digits (default %(default)s)")
    add("--benchmark", action="store_true", help="time the folded Inception and the Frechet distance")
    return parser.parse_args()


def run(args):
    """One mode: benchmark, training of the digit classifier, or measuring."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1")
    if args.benchmark:
        setup(args.device)
        return benchmark(args.weights or WEIGHTS["inception"], args.device)
    if args.train_digits:
        if int(os.environ.get("RANK", 0)) == 0:  # too small to share
            train_digits(args.ref, args.weights or WEIGHTS["digits"], args.seed)
        return
    setup(args.device)
    result = evaluate(args.samples, args.ref, args.features, args.weights, args.batch_size, args.device,
                      not args.no_cache, not args.no_pr)
    if result is None:
        return
    line = json.dumps({"samples": str(args.samples), "ref": str(args.ref), **result})
    if args.json == "-":
        print(line)
        return
    if args.json:
        save_atomically(args.json, lambda file: file.write((line + "\n").encode()))
    print(f"{args.samples} against {args.ref}: {result['num_samples']} and {result['num_ref']} images, "
          f"{result['features']} features")
    for name, (title, meaning) in ROWS.items():
        if name in result:
            print(f"  {title:<16}{result[name]:>12.4f}   {meaning}")


def main():
    """`run`, with mistakes of the user's told in one sentence and exit code 2."""
    args = parse_args()
    try:
        run(args)
    except UserError as error:
        # All ranks find the same mistake: rank 0 says it first, and torchrun then stops the others.
        time.sleep(2 if int(os.environ.get("RANK", 0)) else 0)
        print(f"fid.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
