"""Trains the classifier of digits whose features fid.py compares: 12 epochs, about 3 minutes on one CPU core.

    python reproduce/train_digit_classifier.py --out out/digits-classifier.pt
    python fid.py --ckpt out/digits-classifier.pt       # distances are only comparable under the same weights

It learns from the first 9,000 of the bundled digits and is tested on the last 1,000 (99.10 % for the bundled weights).
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fid import REFS, DigitNet, open_images, atomic_write


def distort(x, degrees=12, scale=0.12, shift=2 / 16):
    """Rotates, scales and shifts each image (B, 1, 32, 32) at random: 9,000 digits then suffice."""
    angle = (torch.rand(len(x)) * 2 - 1) * np.deg2rad(degrees)
    size = 1 + (torch.rand(len(x)) * 2 - 1) * scale
    dx, dy = (torch.rand(2, len(x)) * 2 - 1) * shift
    theta = torch.stack([angle.cos() * size, -angle.sin() * size, dx,
                         angle.sin() * size, angle.cos() * size, dy], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def train_digits(data, out, seed=0, epochs=12, batch=128):
    images = open_images(data)
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
    atomic_write(out, lambda file: torch.save(state, file))
    print(f"{100 * right:.2f} % of the {held} held-out digits are right; wrote {out}")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/digits-classifier.pt", help="where the weights go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    args = parser.parse_args()
    train_digits(REFS["digits"][0], args.out, args.seed, args.epochs)
