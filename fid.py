"""Measures generated images against real ones: FID, sFID, Inception Score, precision and recall.

    images -> features of a network -> their distribution -> five numbers

Two images that look alike may differ in every pixel. So the measures compare features instead: what
a network that was trained to classify images computes before its last layer. Features depend on what
an image shows.

    FID               distance between the features of samples and of real images, taken as Gaussians
    sFID              the same with features that keep their place in the image: the layout counts too
    Inception Score   (is) high if each sample is clearly of one class and all classes occur; samples only
    precision         the share of samples that lie among the real images: quality
    recall            the share of real images that lie among the samples: diversity
    accuracy          of labelled digits, the share that the network reads as their label

The definitions are those of ADM's evaluator (Dhariwal & Nichol 2021, arXiv 2105.05233), which is
behind the tables of most papers on diffusion, without TensorFlow. There are two networks: `inception`,
which defines FID, for natural images, and `digits`, a small classifier, for MNIST. This file needs no
other of the project: use it on anybody's samples.

    python fid.py                                           # out/sample against the digits
    python fid.py out/xl/samples.npz --ref imagenet256      # as in papers' tables
    python fid.py my_pictures/ --ref their_pictures/        # two folders of images
"""
import argparse
import json
import math
import os
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.linalg.lapack import dpstrf
from torch.nn.utils.fusion import fuse_conv_bn_eval

# --------------------------------------------------------------------------------------------------
# The measures. N: number of images, D: features, C: classes.


def mean_and_covariance(x):
    """Features x (N, D) -> mu (D,), sigma (D, D)."""
    D = x.shape[1]
    mu = x.mean(0, dtype=torch.float64)
    products = x.new_zeros(D, D, dtype=torch.float64)  # x^T x
    for batch in x.split(64):
        batch = batch.double()  # not all at once: 50,000 rows of 2,048 features would take 0.8 GB
        products.addmm_(batch.T, batch)
    sigma = (products - len(x) * torch.outer(mu, mu)) / (len(x) - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the distance of two Gaussians.

    It is FID (Heusel et al. 2017, arXiv 1706.08500), and with spatial features sFID (Nash et al. 2021,
    arXiv 2103.03841)."""
    # The trace of a square root is the sum of the square roots of the eigenvalues. With sigma = R R^T,
    # the eigenvalues of sigma1 sigma2 are, except for zeros, those of G G^T, where G = R1^T R2. Since
    # G G^T is symmetric, this is 11 times as fast as scipy's sqrtm, and the same to 11 digits.
    G = square_root(sigma1).T @ square_root(sigma2)  # (rank 1, rank 2)
    if len(G) > G.shape[1]:
        G = G.T  # the same eigenvalues, from a smaller matrix
    eigenvalues = torch.linalg.eigvalsh(torch.from_numpy(G @ G.T))
    trace = eigenvalues.clamp(min=0).sqrt().sum().item()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(distance, 0.0)


def square_root(sigma):
    """R (D, rank) with R R^T = sigma, by LAPACK's Cholesky factorization with pivoting."""
    # It stops at the rank of sigma, which is low if there are fewer images than features. Otherwise
    # rounding would turn eigenvalues of 0 into 1e-16, and their square roots, 1e-8 each, add up.
    lower, pivots, r, _ = dpstrf(sigma, lower=1)  # r is the rank
    R = np.empty((len(sigma), r))
    R[pivots - 1] = np.tril(lower)[:, :r]  # row i of the factor is row pivots[i], counted from 1
    return R


def inception_score(probs, split=5000):
    """exp of the mean KL(p(y|x) || p(y)) over images x; probs (N, C) are p(y|x).

    Salimans et al. 2016, arXiv 1606.03498. As in ADM, it is the mean over splits of 5,000 images, where
    a short last split counts as much as the others."""
    scores = []
    for p in probs.double().split(split):
        marginal = sum(p) / len(p)  # p(y), (C,)
        # The mean KL is the entropy of p(y) minus the mean entropy of p(y|x). entr(p) is -p log p.
        mean_entropy = sum(torch.special.entr(p).sum(1)) / len(p)
        kl = torch.special.entr(marginal).sum() - mean_entropy
        scores.append(kl.exp())
    return torch.stack(scores).mean().item()


def precision_recall(real, fake, k=3):
    """Features real (N, D), fake (M, D) -> precision, recall.

    Around each point of a set is a ball that reaches to its k-th nearest neighbour in the set. Precision
    is the share of fake points that lie in a ball of a real point, recall the share of real points that
    lie in a ball of a fake point (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2)."""
    real = real.double()  # ADM takes float16: its third digit can differ
    fake = fake.double()
    real_radii = neighbour_distances(real, k)  # (N,)
    fake_radii = neighbour_distances(fake, k)  # (M,)
    fake_inside = []
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for points, radii in zip(fake.split(512), fake_radii.split(512)):
        distances = torch.cdist(points, real)  # (512, N): 0.2 GB if N is 50,000
        fake_inside.append((distances <= real_radii).any(1))
        real_inside |= (distances <= radii[:, None]).any(0)
    precision = torch.cat(fake_inside).double().mean().item()
    recall = real_inside.double().mean().item()
    return precision, recall


def neighbour_distances(x, k):
    """The distance of each point of x (N, D) to its k-th nearest neighbour."""
    nearest = [torch.cdist(points, x).topk(k + 1, largest=False).values for points in x.split(512)]
    return torch.cat(nearest)[:, k]  # column 0 is the point itself


# --------------------------------------------------------------------------------------------------
# The networks. Each maps uint8 images (B, H, W, 1 or 3) to features (B, D) for FID, precision and
# recall, spatial features (B, S) for sFID, where S may be 0, and class probabilities (B, C).


class DigitNet(nn.Module):
    """A small convolutional network for grey digits; reproduce/train_digit_classifier.py trains it."""
    dims = 64, 0, 10  # D, S, C

    def __init__(self):
        super().__init__()
        layers = []
        for cin, cout, stride in [(1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 2)]:
            layers.append(nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(cout))
            layers.append(nn.ReLU())
        # The three strides of 2 turn 32x32 into 4x4, of 64 channels.
        layers += [nn.Flatten(), nn.Linear(1024, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def preprocess(self, images):
        """uint8 (B, H, W, C) -> float (B, 1, 32, 32) in [0, 1]."""
        x = images.float().mean(3).unsqueeze(1) / 255  # the mean of the colours
        if x.shape[2:] == (28, 28):
            x = F.pad(x, (2, 2, 2, 2))  # black, as extract_latents.py pads digits
        if x.shape[2:] != (32, 32):
            raise UserError(f"digits are 28x28 or 32x32, not {tuple(x.shape[2:])}: pass --features inception")
        return x

    def forward(self, images):
        features = self.body(self.preprocess(images))  # (B, 64)
        return features, features[:, :0], self.head(features).softmax(1)  # S = 0


class Inception(nn.Module):
    """Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) as in TensorFlow's graph of 2015-12-05, which
    defines FID. The names are those of the public PyTorch weights."""
    dims = 2048, 17 * 17 * 7, 1008  # D, S, C

    def __init__(self):
        super().__init__()
        # conv_bn's arguments are channels in and out, kernel, stride, padding. Right: size of the output.
        self.Conv2d_1a_3x3 = conv_bn(3, 32, 3, 2, "valid")  # 149x149
        self.Conv2d_2a_3x3 = conv_bn(32, 32, 3, 1, "valid")  # 147x147
        self.Conv2d_2b_3x3 = conv_bn(32, 64, 3)
        self.Conv2d_3b_1x1 = conv_bn(64, 80, 1)  # 73x73
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3, 1, "valid")  # 71x71
        self.Mixed_5b = InceptionA(192, 32)  # 35x35
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)  # 17x17
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD(768)  # 8x8
        self.Mixed_7b = InceptionE(1280, average_pool)
        self.Mixed_7c = InceptionE(2048, max_pool)  # max: a quirk of the graph that FID keeps
        self.fc = nn.Linear(2048, 1008)

    def preprocess(self, images):
        """uint8 (B, H, W, C) -> float (B, 3, 299, 299) in [-1, 1)."""
        x = images.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)  # grey: three equal channels
        x = resize_width(x, 299).mT  # (B, 3, 299, H)
        x = resize_width(x, 299).mT
        return (x - 128) / 128

    def forward(self, images):
        """uint8 (B, H, W, C) -> features, spatial features and class probabilities, of self.dims columns each."""
        x = self.preprocess(images)  # (B, 3, 299, 299)
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))  # (B, 32, 147, 147)
        x = halve(self.Conv2d_2b_3x3(x))  # (B, 64, 73, 73)
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6b(self.Mixed_6a(x))  # (B, 768, 17, 17)
        x = self.Mixed_6d(self.Mixed_6c(x))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # the first 7 channels, (B, S)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        features = x.mean((2, 3))  # (B, 2048)
        logits = features @ self.fc.weight.T  # (B, 1008); without bias, as ADM's
        return features, spatial, logits.softmax(1)

    def fold(self):
        """Merges each batch norm into its convolution, and goes channels-last: 1.37 times as fast, and the
        features are the same to 2e-7."""
        for module in self.modules():
            if hasattr(module, "bn"):
                # In float64, so that the new weights are rounded once.
                module.conv = fuse_conv_bn_eval(module.conv.double(), module.bn.double()).float()
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


def resize_width(x, size):
    """TensorFlow 1's linear resize of the last dimension: pixel i of the output is at i * W / size of the
    input, where newer libraries count from the centres of the pixels."""
    W = x.shape[-1]
    position = torch.arange(size, device=x.device) * (W / size)  # (size,), in float32
    left = position.long()
    right = (left + 1).clamp(max=W - 1)
    a = x[..., left]
    b = x[..., right]
    return a + (b - a) * (position - left)


def conv_bn(cin, cout, kernel, stride=1, padding="same"):
    block = nn.Sequential()
    block.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
    block.bn = nn.BatchNorm2d(cout, eps=1e-3)
    block.relu = nn.ReLU(inplace=True)
    return block


def average_pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # the padding does not count


def max_pool(x):
    return F.max_pool2d(x, 3, 1, 1)


def halve(x):
    return F.max_pool2d(x, 3, 2)  # 35x35 -> 17x17


class InceptionA(nn.Module):  # 35x35
    """(B, cin, 35, 35) -> (B, 224 + pool_channels, 35, 35); pytorch-fid's FIDInceptionA."""

    def __init__(self, cin, pool_channels):
        super().__init__()
        self.branch1x1 = conv_bn(cin, 64, 1)
        self.branch5x5_1 = conv_bn(cin, 48, 1)
        self.branch5x5_2 = conv_bn(48, 64, 5)
        self.branch3x3dbl_1 = conv_bn(cin, 64, 1)
        self.branch3x3dbl_2 = conv_bn(64, 96, 3)
        self.branch3x3dbl_3 = conv_bn(96, 96, 3)
        self.branch_pool = conv_bn(cin, pool_channels, 1)

    def forward(self, x):
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(average_pool(x))], 1)


class InceptionB(nn.Module):  # 35x35 -> 17x17
    """(B, cin, 35, 35) -> (B, 480 + cin, 17, 17); torchvision's InceptionB."""

    def __init__(self, cin):
        super().__init__()
        self.branch3x3 = conv_bn(cin, 384, 3, 2, "valid")
        self.branch3x3dbl_1 = conv_bn(cin, 64, 1)
        self.branch3x3dbl_2 = conv_bn(64, 96, 3)
        self.branch3x3dbl_3 = conv_bn(96, 96, 3, 2, "valid")

    def forward(self, x):
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, halve(x)], 1)


class InceptionC(nn.Module):  # 17x17; 1x7 and 7x1 make a 7x7
    """(B, 768, 17, 17) -> the same shape, with mid channels between; pytorch-fid's FIDInceptionC."""

    def __init__(self, mid):
        super().__init__()
        self.branch1x1 = conv_bn(768, 192, 1)
        self.branch7x7_1 = conv_bn(768, mid, 1)
        self.branch7x7_2 = conv_bn(mid, mid, (1, 7))
        self.branch7x7_3 = conv_bn(mid, 192, (7, 1))
        self.branch7x7dbl_1 = conv_bn(768, mid, 1)
        self.branch7x7dbl_2 = conv_bn(mid, mid, (7, 1))
        self.branch7x7dbl_3 = conv_bn(mid, mid, (1, 7))
        self.branch7x7dbl_4 = conv_bn(mid, mid, (7, 1))
        self.branch7x7dbl_5 = conv_bn(mid, 192, (1, 7))
        self.branch_pool = conv_bn(768, 192, 1)

    def forward(self, x):
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(average_pool(x))], 1)


class InceptionD(nn.Module):  # 17x17 -> 8x8
    """(B, cin, 17, 17) -> (B, 512 + cin, 8, 8); torchvision's InceptionD."""

    def __init__(self, cin):
        super().__init__()
        self.branch3x3_1 = conv_bn(cin, 192, 1)
        self.branch3x3_2 = conv_bn(192, 320, 3, 2, "valid")
        self.branch7x7x3_1 = conv_bn(cin, 192, 1)
        self.branch7x7x3_2 = conv_bn(192, 192, (1, 7))
        self.branch7x7x3_3 = conv_bn(192, 192, (7, 1))
        self.branch7x7x3_4 = conv_bn(192, 192, 3, 2, "valid")

    def forward(self, x):
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([branch3x3, self.branch7x7x3_4(branch7x7x3), halve(x)], 1)


class InceptionE(nn.Module):  # 8x8; 1x3 and 3x1 are side by side
    """(B, cin, 8, 8) -> (B, 2048, 8, 8); pytorch-fid's FIDInceptionE_1 and _2, which pool differently."""

    def __init__(self, cin, pool):
        super().__init__()
        self.branch1x1 = conv_bn(cin, 320, 1)
        self.branch3x3_1 = conv_bn(cin, 384, 1)
        self.branch3x3_2a = conv_bn(384, 384, (1, 3))
        self.branch3x3_2b = conv_bn(384, 384, (3, 1))
        self.branch3x3dbl_1 = conv_bn(cin, 448, 1)
        self.branch3x3dbl_2 = conv_bn(448, 384, 3)
        self.branch3x3dbl_3a = conv_bn(384, 384, (1, 3))
        self.branch3x3dbl_3b = conv_bn(384, 384, (3, 1))
        self.branch_pool = conv_bn(cin, 192, 1)
        self.pool = pool

    def forward(self, x):
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = [self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)]
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = [self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl)]
        return torch.cat([self.branch1x1(x), *branch3x3, *branch3x3dbl, self.branch_pool(self.pool(x))], 1)


# --------------------------------------------------------------------------------------------------
# Both sets of images go through a network, and the features are compared.

ROOT = Path(__file__).resolve().parent
PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
NETWORKS = {"inception": Inception, "digits": DigitNet}
WEIGHTS = {
    "inception": f"{PYTORCH_FID}/pt_inception-2015-12-05-6726825d.pth",
    "digits": ROOT / "weights/digits-classifier.pt",
}
REFS = {  # 10,000 digits; ADM's statistics of all of ImageNet, which come with 10,000 of its images
    "digits": ROOT / "data/mnist_train10k.npz",
    "imagenet256": f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": f"{ADM}/512/VIRTUAL_imagenet512.npz",
}


def evaluate(samples, ref="digits", features=None, ckpt=None, batch_size=64, device="cpu"):
    """Compares the images at two paths; ref may be a name of REFS.

    -> dict of num_samples, num_ref, features, warnings, fid, and where they apply sfid, precision,
    recall, is and accuracy, the share of labelled digits that the network reads as their label."""
    features = features or ("digits" if ref == "digits" else "inception")
    fake = open_images(samples)
    real = open_images(fetch(REFS.get(ref, ref)))
    warnings = find_warnings(fake, real, features)
    for line in warnings:
        print("warning:", line, file=sys.stderr)
    net = load_network(features, fetch(ckpt or WEIGHTS[features])).to(device)
    fake_stats = measure(fake, net, batch_size, device)
    real_stats = measure(real, net, batch_size, device)
    result = dict(num_samples=fake.n, num_ref=real.n, features=features, warnings=warnings)
    for name in ("fid", "sfid"):
        if name in fake_stats and name in real_stats:
            result[name] = frechet_distance(*fake_stats[name], *real_stats[name])
    if fake.n and real.n:  # neither is a file of statistics alone
        result["precision"], result["recall"] = precision_recall(real_stats["features"], fake_stats["features"])
    for name in ("is", "accuracy"):
        if name in fake_stats:
            result[name] = fake_stats[name]
    return result


def load_network(name, path):
    net = NETWORKS[name]().eval()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    if name == "inception":
        net.fold()
    return net


def find_warnings(fake, real, features):
    """What makes these figures differ from published ones, a sentence each."""
    n = fake.n
    dim = NETWORKS[features].dims[0]
    lines = []
    if 0 < n <= dim:
        lines.append(f"{n} samples for {dim} features: FID is far too high; draw more than {dim}")
    if features == "inception":
        if 0 < n < 50000:
            lines.append(f"FID falls as samples are added: compare with FID of {n}, not FID-50K")
        if n and real.n and fake.size != real.size:
            lines.append(f"samples are {fake.size}, real images {real.size}: resizing blurs one more; use one size")
    for images in (fake, real):
        if any(file.suffix.lower() in (".jpg", ".jpeg") for file in images.files):
            lines.append(f"{images.path} holds JPEG files: their artefacts change FID; use PNG")
    return lines


@torch.no_grad()
def measure(images, net, batch_size, device):
    """What the measures need to know of a set of images."""
    if images.n == 0:
        return images.statistics
    outputs = []
    for start in range(0, images.n, batch_size):
        batch = images.read(start, min(start + batch_size, images.n))
        output = net(torch.tensor(batch, device=device))
        outputs.append(torch.cat(output, 1))  # (B, D + S + C)
        if len(outputs) % 100 == 0:
            print(f"{images.path.name}: {start + len(batch)} of {images.n} images", file=sys.stderr)
    output = torch.cat(outputs)  # (N, D + S + C)
    features, spatial, probs = output.split(net.dims, 1)
    stats = {
        "features": features,  # for precision and recall
        "fid": mean_and_covariance(features),  # (mu, sigma), which FID compares
        "is": inception_score(probs),
    }
    if isinstance(net, Inception):
        stats["sfid"] = mean_and_covariance(spatial)
    elif images.labels is not None:
        stats["accuracy"] = (probs.argmax(1).cpu().numpy() == images.labels).mean()
    # The statistics in a file win, as in ADM: those of ImageNet are of more images than the file holds.
    return stats | images.statistics


# --------------------------------------------------------------------------------------------------
# Sets of images.


class NpzImages:
    """ADM's format: images arr_0 (N, H, W, 3), or (N, H, W) if grey, and labels arr_1 (N,).

    Statistics may come with the images, or alone, and then n is 0: mu and sigma of the features, mu_s
    and sigma_s of the spatial ones."""

    def __init__(self, path):
        self.path = path
        self.files = [path]
        archive = np.load(path)
        self.archive = archive  # kept open for read()
        self.labels = archive.get("arr_1")
        self.statistics = {}
        for name, mu, sigma in [("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")]:
            if mu in archive:
                self.statistics[name] = (archive[mu], archive[sigma])
        self.n = 0
        if "arr_0" in archive:
            # 50,000 images of 256x256 are 10 GB: a batch is read from the archive when it is needed.
            self.array = archive.zip.open("arr_0.npy")
            np.lib.format.read_magic(self.array)  # the version of the format
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(self.array)
            if dtype != np.uint8 or by_columns or len(shape) not in (3, 4) or shape[0] < 4:
                raise UserError(f"{path}: arr_0, {dtype} {shape}, must be uint8 (N, H, W[, 3]), N > 3, in C order")
            self.offset = self.array.tell()
            self.n = shape[0]
            self.size = shape[1:3]  # (H, W)
            self.image_bytes = math.prod(shape[1:])
        elif not self.statistics:
            raise UserError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma); give another file")

    def read(self, start, stop):
        """-> uint8 (stop - start, H, W, C)."""
        self.array.seek(self.offset + start * self.image_bytes)
        data = self.array.read((stop - start) * self.image_bytes)
        return np.frombuffer(data, np.uint8).reshape(stop - start, *self.size, -1)


class ImageFolder:
    """All images below a folder, in sorted order."""
    statistics = {}
    labels = None

    def __init__(self, path):
        self.path = path
        self.files = []
        for file in sorted(path.rglob("*")):
            hidden = "/." in f"/{file.relative_to(path)}"  # such as ._a.jpg, which macOS adds
            if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp") and not hidden:
                self.files.append(file)
        self.n = len(self.files)
        if self.n < 4:
            raise UserError(f"{path} holds {self.n} images: give a folder of at least 4")
        self.size = Image.open(self.files[0]).size[::-1]  # (H, W)

    def read(self, start, stop):
        """-> uint8 (stop - start, H, W, 3). UserError if the sizes differ."""
        images = []
        for file in self.files[start:stop]:
            image = np.asarray(Image.open(file).convert("RGB"))
            if image.shape[:2] != self.size:
                raise UserError(f"{file} is not {self.size} as the first image is: crop all to one size")
            images.append(image)
        return np.stack(images)


def open_images(path):
    """A folder or an .npz -> ImageFolder or NpzImages; UserError if it is neither."""
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: sample.py writes samples; --ref takes {', '.join(REFS)}")
    if path.suffix == ".npy":
        raise UserError(f"{path} is no .npz: np.savez its statistics as mu and sigma, or images as arr_0")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not an .npz file, or only the beginning of one: write it again")
    return NpzImages(path)


# --------------------------------------------------------------------------------------------------
# The command line, downloads.


def main(argv=None):
    """Prints the measures of the samples against a reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples", nargs="?", default="out/sample/samples.npz",
        help=".npz of images, arr_0 uint8 (N, H, W, 3), or a folder (default: %(default)s)")
    add("--ref", default="digits",
        help=f"{', '.join(REFS)}, a path as above, or .npz of mu, sigma (default: %(default)s)")
    add("--features", choices=NETWORKS, help="network to compare (default: digits for --ref digits, else inception)")
    add("--ckpt", help="other weights of that network; figures compare only under the same")
    add("--json", metavar="FILE", help="also write the figures to FILE")
    add("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    args = parser.parse_args(argv)
    if int(os.environ.get("RANK", 0)) > 0:
        return  # torchrun started several: one measures
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # TF32 would round features to three digits
    result = evaluate(args.samples, args.ref, args.features, args.ckpt, args.batch_size, device)
    print(f"{args.samples} against {args.ref}, with the features of {result['features']}")
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:<10}{value:>10.4f}")
    if args.json:
        text = json.dumps({"samples": args.samples, "ref": args.ref, **result})
        Path(args.json).write_text(text + "\n")


class UserError(Exception):
    """A mistake that the user can fix, in one sentence that ends with what to do."""


def run_main(main):
    """Runs main. A mistake of the user ends it with one sentence and exit code 2."""
    try:
        main()
    except UserError as error:
        print("error:", error, file=sys.stderr, flush=True)
        sys.exit(2)


def fetch(file):
    """A path as it is; a URL downloaded to weights/."""
    if not str(file).startswith("http"):
        return Path(file)
    path = ROOT / "weights" / Path(file).name
    if not path.exists():
        print("downloading", file, file=sys.stderr)
        path.parent.mkdir(exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                temporary = Path(folder) / path.name
                urllib.request.urlretrieve(file, temporary)  # fails if the connection breaks
                temporary.replace(path)
        except Exception as error:
            raise UserError(f"cannot download {file} ({error}): put it at {path}") from error
    return path


if __name__ == "__main__":
    run_main(main)
