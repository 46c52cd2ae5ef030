"""How weights/vae-digits.pt was made: a small KL autoencoder for the bundled digits. Some minutes on two CPU cores.

    python reproduce/train_vae.py                     # -> weights/vae-digits.pt
    python reproduce/train_vae.py --out vae.pt        # then: python extract_latents.py --ckpt vae.pt

Learns from 9,000 digits and prints its PSNR on the other 1,000. The scale that latents are multiplied by, for a
standard deviation of 1, is measured at the end and stored with the weights. Networks fit the VAE that they were trained
with: the bundled ones fit the bundled one.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extract_latents import DIGITS, VAES, AutoencoderKL, read_npz  # noqa: E402
from model import ROOT, Parser, Progress, UserError, make_seed, run_main, save_checkpoint, start_ranks, whole  # noqa: E402

def train_vae(data, out, device, seed=0, steps=1500, batch=64, kl_weight=1e-3, lr=2e-3):
    """L1 + MSE + kl_weight * KL (means over all values), AdamW, one-cycle learning rate, average of the weights."""
    images, _, _ = read_npz(data)
    if images.shape[1:] != (28, 28):
        raise UserError(f"{data} holds images {images.shape[1:]}; give --data with grey digits of 28x28 pixels")
    x = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))).to(device)[:, None]
    x = x.float() / 127.5 - 1  # (N, 1, 32, 32)
    train, held_out = x[: len(x) * 9 // 10], x[len(x) * 9 // 10 :]
    torch.manual_seed(seed)
    shape = ("channels", "layers", "latent", "groups", "image_channels", "image_size", "scale")
    vae = AutoencoderKL(dict(name="digits") | {key: VAES["digits"][key] for key in shape})
    vae = vae.to(device, memory_format=torch.channels_last)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=ema)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    progress = Progress(f"train VAE ({sum(p.numel() for p in vae.parameters()):,} parameters)", steps, "steps")
    for step in range(steps):
        rows = np.random.default_rng(make_seed(seed, step)).integers(len(train), size=batch)
        target = train[torch.from_numpy(rows).to(device)]
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
    vae = average.module.eval()
    with torch.no_grad():
        mean, std = (torch.cat(moments) for moments in zip(*(vae.encode(part) for part in train.split(500))))
        sample = mean + std * torch.randn_like(std)
    vae.config["scale"] = scale = round(1 / sample.std().item(), 5)
    per_channel = [round(s, 3) for s in sample.std((0, 2, 3)).tolist()]
    print(f"latents: std {sample.std().item():.4f}, so scale {scale}; per channel {per_channel}, "
          f"posterior std {std.mean().item():.4f}")
    for what, noise in (("means", 0), ("samples", 1)):
        full, inside = psnr(vae, held_out, noise)
        print(f"held-out PSNR on {len(held_out)} digits, from posterior {what}: {full:.2f} dB, "
              f"{inside:.2f} dB without the padding")
    save_checkpoint(out, config=vae.config, model={k: v.half().cpu() for k, v in vae.state_dict().items()})

@torch.no_grad()
def psnr(vae, x, noise=0) -> tuple:
    """Of the reconstructions of x (N, 1, 32, 32), over all images at once; the same over the inner 28x28 pixels."""
    errors = []
    for part in x.split(250):
        mean, std = vae.encode(part)
        y = vae.decode(mean + noise * std * torch.randn_like(std)).clamp(-1, 1)
        errors.append(((y - part) / 2) ** 2)
    errors = torch.cat(errors)
    return tuple(-10 * e.mean().log10().item() for e in (errors, errors[..., 2:-2, 2:-2]))

def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", default=DIGITS, metavar="FILE", help=".npz of digits (default: the bundled ones)")
    parser.add_argument("--out", default=ROOT / "weights/vae-digits.pt", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--steps", type=whole(1), default=1500, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), default=0, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    args = parser.parse_args()
    train_vae(args.data, args.out, start_ranks(args.device), args.seed, args.steps)

if __name__ == "__main__":
    run_main(main)
