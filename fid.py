"""Measure generated images against real ones: FID, sFID, Inception Score, precision and recall.

    images -> feature network -> mean and covariance -> Frechet distance

Definitions are those of ADM's evaluator (Dhariwal & Nichol 2021, arXiv 2105.05233), which is behind the tables of most
diffusion papers, without TensorFlow. Two feature networks: `inception`, which defines FID, for natural images, and
`digits`, a small bundled classifier, for MNIST. This file needs no other of the project: use it on anyone's samples.

    python fid.py                                                            # out/sample against the digits
    torchrun --nproc_per_node=8 fid.py out/xl/samples.npz --ref imagenet256  # the columns of a paper's table
    python fid.py my_pictures/ --ref their_pictures/ --features inception    # two folders of images
"""
import argparse
import contextlib
import datetime
import hashlib
import json
import os
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.linalg.lapack import dpstrf

ROOT = Path(__file__).resolve().parent
PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS = {  # feature network -> its file, and where that is fetched from if it is not bundled
    "inception": (ROOT / "weights" / INCEPTION, f"{PYTORCH_FID}/{INCEPTION}"),
    "digits": (ROOT / "weights/digits-classifier.pt", None)}
REFS = {  # the same for reference sets: 10,000 digits; ADM's statistics of ImageNet and 10,000 of its images
    "digits": (ROOT / "data/mnist_train10k.npz", None),
    "imagenet256": (ROOT / "weights/VIRTUAL_imagenet256_labeled.npz", f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz"),
    "imagenet512": (ROOT / "weights/VIRTUAL_imagenet512.npz", f"{ADM}/512/VIRTUAL_imagenet512.npz")}
SPLIT = 5000  # images per split of the Inception Score, as in ADM

# ---------------------------------------------------------------------------------------------------------------------
# Metrics.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the distance of two Gaussians (FID: Heusel et al. 2017, arXiv
    1706.08500; sFID is the same on spatial features: Nash et al. 2021, arXiv 2103.03841). mu (D,), sigma (D, D)."""
    # With S = R R^T, the eigenvalues of S1 S2 that are not 0 are those of the symmetric (R1^T R2)(R1^T R2)^T. A pivoted
    # Cholesky stops at the rank of S, so fewer images than features add no zero eigenvalues, whose square roots would
    # blow round-off of 1e-16 up to 1e-8. It is also ten times as fast as a matrix square root.
    product = root(sigma1).T @ root(sigma2)  # (rank 1, rank 2)
    product = product if len(product) <= product.shape[1] else product.T
    eigenvalues = torch.linalg.eigvalsh(torch.from_numpy(product @ product.T)).clamp(min=0)
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * eigenvalues.sqrt().sum().item()
    return max(float(distance), 0.0)

def root(sigma):
    """R (D, rank) with R R^T = sigma, symmetric and positive semi-definite: LAPACK's Cholesky with pivoting."""
    factor, pivots, rank, _ = dpstrf(np.asarray(sigma, np.float64), lower=1)
    out = np.empty((len(sigma), rank))
    out[pivots - 1] = np.tril(factor)[:, :rank]
    return out

def inception_score(sums):
    """exp of the mean KL(p(y|x) || p(y)) over the images of a split (Salimans et al. 2016, arXiv 1606.03498), then the
    mean over splits, a short last one counting as much, as in ADM. `sums` are those of split_sums."""
    count = sums[:, -1]
    marginal = sums[:, :-2] / count[:, None]  # p(y), (splits, classes)
    return (sums[:, -2] / count - torch.special.xlogy(marginal, marginal).sum(1)).exp().mean().item()

def split_sums(probs, first, sums, split):
    """Adds images `first`, first + 1, ... to the sums (splits, classes + 2) of p, of p log p, and of 1. They are enough
    for the score, in any order and over any number of ranks, so no probability (B, classes) has to be kept."""
    p = probs.double()
    rows = (first + torch.arange(len(p), device=p.device)) // split
    plogp = torch.special.xlogy(p, p).sum(1, keepdim=True)  # 0 log 0 = 0, where ADM's p * log(p) is NaN
    sums.index_add_(0, rows, torch.cat([p, plogp, torch.ones_like(plogp)], 1))

def precision_recall(real, fake, k=3, device="cpu"):
    """Precision: the share of fake inside the manifold of real; recall: of real inside that of fake. A point is inside
    if it is no farther from a point of the set than that point's k-th nearest neighbour in the set (Kynkaanniemi et al.
    2019, arXiv 1904.06991, eq. 1 and 2)."""
    # In float64, where the evaluator behind published tables used float16: near-ties do not depend on the block size.
    real, fake = (torch.as_tensor(x).to(device, torch.float64) for x in (real, fake))  # (N, D), (M, D)
    real_radii, fake_radii = knn_radii(real, k), knn_radii(fake, k)  # (N,), (M,)
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
        distances = torch.addmm(norms[None], a[rows], b.T, alpha=-2)  # |b|^2 - 2 ab, (size, len(b))
        yield rows, distances.add_(a[rows].square().sum(1, keepdim=True)).clamp_(min=0)

# ---------------------------------------------------------------------------------------------------------------------
# Feature networks. Each takes uint8 images (B, H, W, 1 or 3) and returns features (B, D) for FID, spatial features
# (B, S) for sFID (S may be 0), and class probabilities (B, C) for the Inception Score; `dims` is (D, S, C).

class DigitNet(nn.Module):
    """A small CNN on grey 32x32 digits, 64 features before its last layer."""
    dims = 64, 0, 10

    def __init__(self):
        super().__init__()
        layers = []
        for cin, cout, stride in [(1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 2)]:  # 32 -> 16 -> 8 -> 4
            layers += [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def preprocess(self, images):
        """uint8 (B, H, W, C) -> float (B, 1, 32, 32) in [0, 1]: the mean of the colours; 28 pixels become 32 by
        two black ones on each side, as for the autoencoder whose samples are measured."""
        x = images.float().mean(3).unsqueeze(1) / 255
        x = F.pad(x, (2, 2, 2, 2)) if x.shape[2:] == (28, 28) else x
        if x.shape[2:] != (32, 32):
            raise UserError(f"digits are 28x28 or 32x32 pixels, not {tuple(x.shape[2:])}: pass --features inception")
        return x

    def forward(self, images):
        features = self.body(self.preprocess(images))  # (B, 64)
        return features, features[:, :0], self.head(features).softmax(1)

class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU; `fold` makes it a convolution with bias and a ReLU."""
    def __init__(self, cin, cout, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding if stride == 1 else "valid", bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        # bn(conv(x)) = gain * conv(x) + (bias - gain * mean), gain = weight / sqrt(var + eps); rounded once.
        gain = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        self.conv.weight.data = (self.conv.weight.double() * gain[:, None, None, None]).float()
        self.conv.bias = nn.Parameter((self.bn.bias.double() - gain * self.bn.running_mean.double()).float())
        self.bn = nn.Identity()

POOLS = {"average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),  # padding is not counted
         "max": lambda x: F.max_pool2d(x, 3, 1, 1),  # in the last block only: a quirk of the graph, which FID keeps
         "stride": lambda x: F.max_pool2d(x, 3, 2)}  # about halves the side

class Mixed(nn.Module):
    """Branches side by side, concatenated. Their convolutions, NAME=(cout, kernel[, stride]), come in order: _2 follows
    _1 and so on, _2b reads what _2a does, branch_pool pools first. With stride 2 the pool alone is a branch."""
    def __init__(self, cin, pool="average", **convs):
        super().__init__()
        self.pool, self.source, last = pool, {}, None  # source: name -> the convolution that it follows, or None
        for name, (cout, *args) in convs.items():
            step = name.split("_")[-1]
            source = None if step[0] not in "2345" else self.source[last] if step[1:] == "b" else last
            self.add_module(name, ConvBN(convs[source][0] if source else cin, cout, *args))
            self.source[name], last = source, name

    def forward(self, x):  # (B, c, H, W) -> (B, c', H', W')
        pooled, outs = POOLS[self.pool](x), {None: x}
        for name, source in self.source.items():
            outs[name] = getattr(self, name)(pooled if name == "branch_pool" else outs[source])
        ends = [out for name, out in outs.items() if name not in self.source.values()]
        return torch.cat(ends + [pooled] * (self.pool == "stride"), 1)

def mixed_a(cin, pool):
    return Mixed(cin, branch1x1=(64, 1), branch5x5_1=(48, 1), branch5x5_2=(64, 5),
                 branch3x3dbl_1=(64, 1), branch3x3dbl_2=(96, 3), branch3x3dbl_3=(96, 3), branch_pool=(pool, 1))

def mixed_c(width):
    return Mixed(768, branch1x1=(192, 1), branch7x7_1=(width, 1), branch7x7_2=(width, (1, 7)),
                 branch7x7_3=(192, (7, 1)), branch7x7dbl_1=(width, 1), branch7x7dbl_2=(width, (7, 1)),
                 branch7x7dbl_3=(width, (1, 7)), branch7x7dbl_4=(width, (7, 1)), branch7x7dbl_5=(192, (1, 7)),
                 branch_pool=(192, 1))

def mixed_e(cin, pool):
    return Mixed(cin, pool, branch1x1=(320, 1),
                 branch3x3_1=(384, 1), branch3x3_2a=(384, (1, 3)), branch3x3_2b=(384, (3, 1)),
                 branch3x3dbl_1=(448, 1), branch3x3dbl_2=(384, 3), branch3x3dbl_3a=(384, (1, 3)),
                 branch3x3dbl_3b=(384, (3, 1)), branch_pool=(192, 1))

class Inception(nn.Module):
    """Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) as in TensorFlow's graph of 2015-12-05, which defines FID;
    names as in the public PyTorch weights."""
    dims = 2048, 17 * 17 * 7, 1008

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)  # 299 -> 149
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)  # 147, then pooled to 73
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding="valid")  # 71, then pooled to 35
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, "stride", branch3x3=(384, 3, 2),  # 35 -> 17
                              branch3x3dbl_1=(64, 1), branch3x3dbl_2=(96, 3), branch3x3dbl_3=(96, 3, 2))
        self.Mixed_6b = mixed_c(128)
        self.Mixed_6c = mixed_c(160)
        self.Mixed_6d = mixed_c(160)
        self.Mixed_6e = mixed_c(192)
        self.Mixed_7a = Mixed(768, "stride", branch3x3_1=(192, 1), branch3x3_2=(320, 3, 2),  # 17 -> 8
                              branch7x7x3_1=(192, 1), branch7x7x3_2=(192, (1, 7)), branch7x7x3_3=(192, (7, 1)),
                              branch7x7x3_4=(192, 3, 2))
        self.Mixed_7b = mixed_e(1280, "average")
        self.Mixed_7c = mixed_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def fold(self):
        """Folds every batch norm into its convolution and goes channels-last: the same features, 1.65 times as fast."""
        for module in self.modules():
            if isinstance(module, ConvBN):
                module.fold()
        return self.to(memory_format=torch.channels_last)

    def preprocess(self, images):
        """uint8 (B, H, W, C) -> float (B, 3, 299, 299) in [-1, 1)."""
        x = images.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)  # grey becomes three equal channels
        return (tf1_resize(x, 299) - 128) / 128

    def forward(self, images):
        x = self.preprocess(images)  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # 7 channels of Mixed_6d's 1x1 branch, (B, 17 * 17 * 7)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        features = x.mean((2, 3))  # (B, 2048), pool3
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

def load_inception(path=None):  # folded; the public weights unless another file is given
    return load_weights(Inception(), path or fetch(*WEIGHTS["inception"])).fold()

def load_digits(path=None):  # the bundled weights unless another file is given
    return load_weights(DigitNet(), path or fetch(*WEIGHTS["digits"]))

NETWORKS = {"inception": (Inception, load_inception), "digits": (DigitNet, load_digits)}

def load_weights(net, path):
    """net with the state dict in `path`, in eval mode."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give another --ckpt, or none for the standard ones")
    try:
        counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
        net.load_state_dict(counters | torch.load(path, map_location="cpu", weights_only=True))  # float16 or float32
    except Exception as error:  # a file of any bytes
        raise UserError(f"{path} holds no weights of {type(net).__name__}: give another --ckpt, or none") from error
    return net.eval()

# ---------------------------------------------------------------------------------------------------------------------
# Inputs: an ADM .npz, a folder of images, or an .npz of ready statistics.

class Images(NamedTuple):  # where images come from
    path: Path
    n: int = 0  # 0: ready statistics only
    shape: tuple = None  # (H, W, C)
    read: Callable = None  # read(lo, hi) -> uint8 (hi - lo, H, W, C)
    labels: np.ndarray = None  # (n,)
    ready: dict = {}  # mu, sigma[, mu_s, sigma_s] that the file brings along
    fingerprint: str = ""  # says whether they are still the same images, without reading them
    jpeg: bool = False

def open_images(path):
    """An .npz, a folder of images, or an .npz of statistics alone -> Images. UserError on anything else."""
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: sample.py writes samples.npz, --ref takes a path or {', '.join(REFS)}")
    try:
        return open_npz(path)
    except UserError:
        raise
    except Exception as error:  # a file of any bytes
        raise UserError(f"{path} is not a readable .npz file, perhaps truncated ({error}): write it again") from error

def open_npz(path):
    """ADM's format, mapped where it is stored uncompressed; statistics mu, sigma, mu_s, sigma_s if it has them."""
    with zipfile.ZipFile(path) as archive:
        fingerprint = str([(m.filename, m.file_size, m.CRC) for m in archive.infolist()])  # the zip knows each CRC-32
    with np.load(path, allow_pickle=False) as file:
        names = file.files
        pairs = [pair for pair in (("mu", "sigma"), ("mu_s", "sigma_s")) if {"mu", "sigma", *pair} <= set(names)]
        ready = {name: file[name] for pair in pairs for name in pair}
        labels = file["arr_1"] if "arr_1" in names else None
    for mu, sigma in pairs:
        if ready[sigma].shape != 2 * ready[mu].shape or not np.isfinite(ready[mu].sum() + ready[sigma].sum()):
            raise UserError(f"{sigma} of {path}, {ready[sigma].shape}, is no covariance of its {mu}: write it again")
    if "arr_0" not in names and not ready:
        raise UserError(f"{path} holds {names}: it must hold images (arr_0) or statistics (mu, sigma)")
    if "arr_0" not in names:
        return Images(path, ready=ready, fingerprint=fingerprint)
    array = map_array(path, "arr_0.npy")
    if array.dtype != np.uint8 or array.ndim < 3 or array.shape[3:] not in ((), (1,), (3,)) or not array[1:].size:
        raise UserError(f"arr_0 of {path}, {array.dtype} {array.shape}, must be uint8 (N, H, W, 3) or (N, H, W), N > 1")
    if labels is not None and (labels.shape != array.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(f"labels (arr_1) of {path} are {labels.dtype} {labels.shape}: give each image a whole number")
    array = array if array.ndim == 4 else array[..., None]  # grey
    return Images(path, len(array), array.shape[1:], lambda lo, hi: np.array(array[lo:hi]), labels, ready, fingerprint)

def map_array(path, member):
    """One array of an .npz, memory-mapped where it is stored uncompressed (50,000 images of 256x256 are 9.8 GB)."""
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(file, allow_pickle=False)
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        file.seek(int(np.frombuffer(file.read(4), "<u2").sum()), os.SEEK_CUR)  # over the member's name and extra field
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)  # the version of every plain array
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")

def open_folder(path):
    """A folder of images of one size, in sorted order, read as they are needed."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    if len(files) < 2:
        raise UserError(f"{path} holds {len(files)} images: a covariance needs at least 2")

    def load(file, shape=None):
        try:
            image = np.asarray(Image.open(file).convert("RGB"))
        except Exception as error:  # a file of any bytes
            raise UserError(f"{file} is not a readable image ({error}): remove it") from error
        if shape and image.shape != shape:
            raise UserError(f"{file} is {image.shape} but {files[0]} is {shape}: crop all images to one size first")
        return image

    shape = load(files[0]).shape
    facts = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return Images(path, len(files), shape, lambda lo, hi: np.stack([load(f, shape) for f in files[lo:hi]]),
                  fingerprint=str(facts), jpeg=any(f.suffix.lower() in (".jpg", ".jpeg") for f in files))

# ---------------------------------------------------------------------------------------------------------------------
# Statistics: one pass over the images, shared among the ranks; sums in float64, so order and batch size do not show.

class Moments:  # streaming mean and covariance
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

@torch.no_grad()
def compute_statistics(images, net, batch_size, device, keep):
    """Everything the metrics need of one set; `keep` also the features themselves, for precision and recall.
    Rank r takes the r-th run of images; rank 0 returns the result, the others None."""
    rank, world = ranks()
    dim, spatial_dim, classes = net.dims
    lo, hi = rank * images.n // world, (rank + 1) * images.n // world
    pool, spatial = Moments(dim, device), Moments(spatial_dim, device)
    sums = torch.zeros(-(-images.n // SPLIT), classes + 2, dtype=torch.float64, device=device)
    right = torch.zeros(1, dtype=torch.float64, device=device)
    kept = torch.zeros(images.n if keep else 0, dim, device=device)  # other ranks' rows stay 0, so a sum joins them
    labels = None if images.labels is None else torch.from_numpy(images.labels.astype(np.int64)).to(device)
    batches = [(start, min(start + batch_size, hi)) for start in range(lo, hi, batch_size)]
    for start, stop in progress(batches, images.path.name, images.n):
        features, spatials, probs = net(torch.from_numpy(images.read(start, stop)).to(device))
        pool.add(features)
        spatial.add(spatials)
        split_sums(probs, start, sums, SPLIT)
        if labels is not None:
            right += (probs.argmax(1) == labels[start:stop]).sum()
        if keep:
            kept[start:stop] = features
    for total in (pool.total, pool.outer, spatial.total, spatial.outer, sums, right, kept):
        if world > 1 and total.numel():
            dist.reduce(total, 0)
    if rank:
        return None
    stats = {"n": images.n, "is": inception_score(sums)}
    stats["mu"], stats["sigma"] = pool.result(images.n)
    if spatial_dim:
        stats["mu_s"], stats["sigma_s"] = spatial.result(images.n)
    if labels is not None:
        stats["accuracy"] = right.item() / images.n
    if keep:
        stats["features"] = kept.cpu().numpy()
    return stats

def statistics(images, net, key, features, batch_size, device, keep, cache):
    """compute_statistics, or what it left next to the input last time: NAME.fid-FEATURES.npz, itself a valid --ref.
    Its key names what the numbers depend on: the images and the network's weights."""
    path, stats = images.path.with_name(f"{images.path.name}.fid-{features}.npz"), None
    key = hashlib.sha256(f"2 {images.fingerprint} {key}".encode()).hexdigest()
    if cache and ranks()[0] == 0:
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:  # none, not ours, half a file
            if str(file["key"]) == key and (not keep or "features" in file.files):
                stats = {k: file[k] if file[k].ndim else file[k].item() for k in file.files if k != "key"}
    hit = torch.tensor([stats is not None], dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.broadcast(hit, 0)
    if not hit.item():
        stats = compute_statistics(images, net, batch_size, device, keep)
        if cache and stats:
            with contextlib.suppress(OSError):  # a read-only folder: compute again next time
                atomic_write(path, lambda file: np.savez(file, key=key, **stats))
    return stats

# ---------------------------------------------------------------------------------------------------------------------
# Putting it together.

def evaluate(samples, ref="digits", features=None, ckpt=None, batch_size=None, device="cpu", cache=True, pr=True):
    """Compare two sets, each a path; `ref` may be a name of REFS. Returns a dict: fid, and where they apply sfid, is,
    precision, recall, accuracy (the share of labelled digits that are read as their label), num_samples, num_ref,
    warnings. Ranks other than 0 get None. batch_size counts the images of all ranks together; default 64 per rank."""
    rank, world = ranks()
    ref = fetch(*REFS[ref]) if ref in REFS else ref
    samples, ref, features = together(lambda: open_pair(samples, ref, features))
    network, load = NETWORKS[features]
    pr = pr and samples.n > 0 and ref.n > 0
    needed = samples.n > 0, pr or not ref.ready  # whose images go through the network
    if any(needed):
        ckpt = ckpt or fetch(*WEIGHTS[features])
        net = together(lambda: load(ckpt)).to(device)
        key = hashlib.sha256(Path(ckpt).read_bytes()).hexdigest()
    warnings = comparability(samples, ref, features, network.dims[0])
    for line in warnings if rank == 0 else []:
        print(f"warning: {line}", file=sys.stderr)
    per_rank = -(-batch_size // world) if batch_size else 64
    found = [statistics(images, net, key, features, per_rank, device, pr, cache) if through else {}
             for images, through in zip((samples, ref), needed)]
    if rank:
        return None
    fake, real = found[0] | samples.ready, found[1] | ref.ready  # what a file brings wins, as in ADM's evaluator
    result = {"features": features, "num_samples": samples.n, "num_ref": ref.n}
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if mu in fake and mu in real:
            result[name] = frechet_distance(fake[mu], fake[sigma], real[mu], real[sigma])
    if pr:
        result["precision"], result["recall"] = precision_recall(real["features"], fake["features"], device=device)
    own = ("is", "accuracy") if features == "digits" else ("is",)
    return {**result, **{k: fake[k] for k in own if k in fake}, "warnings": warnings}

def open_pair(samples, ref, features):
    """Both sets and the network for them: Inception for its own statistics and for images of more than 64 pixels."""
    pair = open_images(samples), open_images(ref)
    natural = any(len(x.ready.get("mu", ())) == 2048 or x.n and max(x.shape[:2]) > 64 for x in pair)
    features = features or ("inception" if natural else "digits")
    dims = NETWORKS[features][0].dims
    for x in pair:
        found = tuple(len(x.ready[mu]) for mu in ("mu", "mu_s") if mu in x.ready)
        if found != dims[:len(found)]:
            raise UserError(f"{x.path} is of {found[0]} features, not {dims[0]}: pass another --features or --ref")
        if x.n and features == "digits":  # a wrong size is best told before the work starts
            DigitNet().preprocess(torch.zeros(1, *x.shape))
    return *pair, features

def comparability(samples, ref, features, dim):
    """What makes these numbers differ from published ones, a sentence each."""
    lines, n = [], samples.n
    if features == "inception" and 0 < n < 50000:
        lines.append(f"{n} samples: FID falls as samples are added, so compare with FID of {n}, not with FID-50K")
    if 0 < n <= dim:
        lines.append(f"{n} samples are no more than the {dim} features: the covariance is singular, FID far too high")
    if features == "inception" and n and ref.n and samples.shape[:2] != ref.shape[:2]:
        lines.append(f"samples are {samples.shape[:2]}, the reference {ref.shape[:2]}: resizing blurs one of them more")
    return lines + [f"{x.path} holds JPEG files: their artefacts change FID" for x in (samples, ref) if x.jpeg]

ROWS = {"fid": ("FID", "lower"), "sfid": ("sFID", "lower"), "is": ("Inception Score", "higher"),
        "precision": ("Precision", "higher"), "recall": ("Recall", "higher"), "accuracy": ("Label accuracy", "higher")}

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is compared").add_argument
    add("samples", nargs="?", default="out/sample/samples.npz", metavar="SAMPLES",
        help=".npz with arr_0 uint8 (N, H, W[, 3]) and labels arr_1 if any, a folder of images of one size, or .npz of "
             "mu, sigma[, mu_s, sigma_s] (default: %(default)s)")
    add("--ref", default="digits", metavar="NAME|PATH",
        help=f"{', '.join(REFS)} (ImageNet's are downloaded once), or a path as above (default: %(default)s)")
    add = parser.add_argument_group("how it is measured").add_argument
    add("--features", choices=NETWORKS, help="feature network (default: inception above 64 pixels, else digits)")
    add("--ckpt", metavar="FILE", help="its weights (default: the standard ones, Inception's downloaded once)")
    add("--no-pr", action="store_true", help="no precision and recall: keeps no features, so any number of images fits")
    add("--no-cache", action="store_true", help="neither read nor write NAME.fid-FEATURES.npz next to the inputs")
    add("--json", nargs="?", const="-", metavar="FILE",
        help="also write the numbers to FILE; without FILE, one line of JSON on stdout instead of the table")
    add = parser.add_argument_group("on which machine").add_argument
    add("--batch-size", type=whole, metavar="N", help="images per step, all ranks together (default: 64 per rank)")
    add("--device", default="auto", help="auto (cuda where there is one), cpu, cuda or cuda:N (default: %(default)s)")
    args = parser.parse_args()
    result = evaluate(args.samples, args.ref, args.features, args.ckpt, args.batch_size, setup(args.device),
                      cache=not args.no_cache, pr=not args.no_pr)
    if result is None:  # a rank other than 0
        return
    line = json.dumps({"samples": str(args.samples), "ref": str(args.ref), **result})
    if args.json == "-":
        return print(line)
    counts = [f"{n} images" if n else "ready statistics" for n in (result["num_samples"], result["num_ref"])]
    print(f"{args.samples} ({counts[0]}) against {args.ref} ({counts[1]}), {result['features']} features")
    for name, (title, better) in ROWS.items():
        if name in result:
            print(f"  {title:<16}{result[name]:>12.4f}   {better} is better")
    if args.json:
        try:
            atomic_write(args.json, lambda file: file.write((line + "\n").encode()))
        except OSError as error:
            raise UserError(f"cannot write {args.json} ({error.strerror}): give another --json FILE") from error

# ---------------------------------------------------------------------------------------------------------------------
# Machinery, the same as the other stages'; they keep theirs in model.py.

class UserError(Exception):
    """A mistake that the user can fix, in one sentence that ends with what to do."""
class Parser(argparse.ArgumentParser):  # whose mistakes are one sentence, like all others

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")

def whole(text):  # a type for argparse
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)

def ranks():  # this process's rank, and how many there are
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def setup(device="auto"):
    """The device of this process, which joins the others if torchrun started it: nccl on CUDA, gloo on CPU."""
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = device if device != "auto" else "cuda" if len(devices) > 1 else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    if name not in devices:
        raise UserError(f"--device {device} means {name}, but this machine has {', '.join(devices)}: pass one of them")
    device, cuda = torch.device(name), name != "cpu"
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # TF32 would round to three digits
    if "RANK" in os.environ:  # nccl is told the device, since it would guess one from the rank
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2),
                                device_id=device if cuda else None)
    return device

def together(function):
    """function() on every rank, then all meet. A mistake that one finds, such as a file that its machine does not have,
    is raised on all, so that no rank waits for one that has stopped."""
    result = mistake = None
    try:
        result = function()
    except UserError as error:
        mistake = str(error)
    mistakes = [mistake] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(mistakes, mistake)
    if any(mistakes):
        raise UserError(next(filter(None, mistakes)))
    return result

def fetch(path, url=None):
    """path, after one rank per machine has downloaded it where it was not there; all ranks meet, whatever they find."""
    together(lambda: url is None or path.exists() or int(os.environ.get("LOCAL_RANK", 0)) or download(url, path))
    return path

def download(url, path):
    """A whole file under its name, or none: a connection that breaks looks like one that ends."""
    def transfer(file):
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers["Content-Length"])
            print(f"downloading {url} ({size >> 20} MiB)", file=sys.stderr)
            for _ in progress(range(0, size, 1 << 20), path.name, size >> 20, "MiB"):
                file.write(response.read(1 << 20))
        if file.tell() != size:
            raise OSError(f"the connection broke after {file.tell()} of {size} bytes")

    try:
        atomic_write(path, transfer)
    except Exception as error:  # of the network, the server or the disk
        raise UserError(f"cannot download {url} ({error}): fetch it by hand and put it at {path}") from error

def atomic_write(path, write):
    """write(file) under a temporary name, then rename: nobody ever reads half a file."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.urandom(4).hex()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def progress(steps, what, total, unit="images"):
    """Yields the steps of a list; every few seconds rank 0 says how far they are, how fast, and how long is left."""
    start = shown = time.time()
    for done, step in enumerate(steps, 1):
        yield step
        now, part = time.time(), done / len(steps)
        if ranks()[0] == 0 and part < 1 and now - shown > 5:
            shown, speed, left = now, part * total / (now - start), round((1 / part - 1) * (now - start))
            print(f"{what} {part * total:.0f}/{total} {unit}  {speed:.1f} {unit}/s  ETA {left // 60}:{left % 60:02}",
                  file=sys.stderr, flush=True)

def run_main(main):
    """main(), or a mistake in one sentence and exit code 2. A rank that fails waits for nobody: torchrun ends all."""
    try:
        main()
    except UserError as error:
        time.sleep(2 if int(os.environ.get("RANK", 0)) else 0)  # most are found by all: rank 0 says it first
        print("error:", *str(error).split(), file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves while others still talk to it can make them crash
        dist.destroy_process_group()

if __name__ == "__main__":
    run_main(main)
