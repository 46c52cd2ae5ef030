"""Trains the classifier of digits whose features fid.py compares: 12 epochs, about 3 minutes on one CPU core.

    python reproduce/train_digit_classifier.py --out out/digits-classifier.pt
    python fid.py --ckpt out/digits-classifier.pt       # distances are only comparable under the same weights

It learns from the first 9,000 of the bundled digits and is tested on the last 1,000 (99.10 % for the bundled weights).
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F

import engine  # noqa: F401  first: it makes the stages importable
from extract_latents import DIGITS, read_npz
from fid import DigitNet
from model import Progress, atomic_write


def distort(x):
    """Rotates, scales and shifts each image (B, 1, 32, 32) at random: 9,000 digits then suffice."""
    angle = (torch.rand(len(x)) * 2 - 1) * np.deg2rad(12)
    size = 1 + (torch.rand(len(x)) * 2 - 1) * 0.12
    dx, dy = (torch.rand(2, len(x)) * 2 - 1) * 2 / 16
    cos = angle.cos() * size
    sin = angle.sin() * size
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def train_digits(x, y, epochs=12, batch=128):
    """x (N, 1, 32, 32), y (N,) -> a DigitNet with weights that are rounded to float16."""
    torch.manual_seed(0)
    net = DigitNet()
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.15)
    progress = Progress("train", epochs, "epochs")
    for epoch in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            features = net.body(distort(x[rows]))
            logits = net.head(F.dropout(features, 0.3))  # dropout spreads the digit over all 64 features
            loss = F.cross_entropy(logits, y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.update(epoch + 1, f"loss {loss.item():.4f}")
    return net.half().float().eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the file to write")
    args = parser.parse_args()
    images, labels, _ = read_npz(DIGITS)
    x = DigitNet().preprocess(torch.from_numpy(images[..., None]))  # (N, 1, 32, 32)
    y = torch.from_numpy(labels)
    net = train_digits(x[:9000], y[:9000])
    with torch.no_grad():
        right = (net.head(net.body(x[9000:])).argmax(1) == y[9000:]).float().mean().item()
    state = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    atomic_write(args.out, lambda temporary: torch.save(state, temporary))
    print(f"{right:.2%} of the 1,000 held-out digits are right; wrote {args.out}")


if __name__ == "__main__":
    main()
