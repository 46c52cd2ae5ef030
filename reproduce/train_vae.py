"""Trains the small KL autoencoder of the digits, weights/vae-digits.pt. Some minutes on two CPU cores.

    python reproduce/train_vae.py                     # overwrites weights/vae-digits.pt
    python reproduce/train_vae.py --out vae.pt        # then: python extract_latents.py --ckpt vae.pt

It learns from 9,000 digits. The scale that latents are multiplied by, for a standard deviation of 1, is measured at the
end and stored with the weights. Networks fit the VAE that they were trained with: the bundled ones fit the bundled one.
"""
import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import ROOT  # first: it makes the stages importable
from extract_latents import DIGITS, VAES, AutoencoderKL, read_npz
from model import Progress, make_seed, save_checkpoint

CONFIG = "channels layers latent groups image_channels image_size scale"


def train_vae(x, steps, seed=0, lr=2e-3, kl_weight=1e-3):
    """L1 + MSE + KL (means over all values), AdamW, one-cycle learning rate, moving average of the weights."""
    torch.manual_seed(seed)
    config = {key: VAES["digits"][key] for key in CONFIG.split()}
    vae = AutoencoderKL(dict(config, name="digits")).to(memory_format=torch.channels_last)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=ema)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    progress = Progress("train VAE", steps, "steps")
    for step in range(steps):
        rows = np.random.default_rng(make_seed(seed, step)).integers(len(x), size=64)
        target = x[torch.from_numpy(rows)]
        mean, std = vae.encode(target)
        decoded = vae.decode(mean + std * torch.randn_like(std))
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        loss = F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        progress.update(step + 1, f"loss {loss.item():.4f}")
    return average.module.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / "weights/vae-digits.pt", help="a file (default: the bundled one)")
    parser.add_argument("--steps", type=int, default=1500, help="default: %(default)s")
    args = parser.parse_args()
    images, _, _ = read_npz(DIGITS)
    x = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2))))  # 28x28 -> 32x32
    x = x[:, None].float() / 127.5 - 1  # (N, 1, 32, 32)
    vae = train_vae(x[:9000], args.steps)
    with torch.no_grad():
        posteriors = [vae.encode(part) for part in x[:9000].split(500)]
        mean = torch.cat([mean for mean, _ in posteriors])
        std = torch.cat([std for _, std in posteriors])
        latents = mean + std * torch.randn_like(std)
        vae.config["scale"] = round(1 / latents.std().item(), 5)
    state = {key: value.half() for key, value in vae.state_dict().items()}
    save_checkpoint(args.out, config=vae.config, model=state)
    print(f"scale {vae.config['scale']}; wrote {args.out}")


if __name__ == "__main__":
    main()
