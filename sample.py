"""Draws images from a network: a PNG grid to look at, and an ADM-style .npz to measure with fid.py.

    python sample.py                                                      # digits from out/distill/student.pt
    torchrun --nproc_per_node=8 sample.py --ckpt out/distill/student.pt --num-images 50000 --guidance 1.5
    python sample.py --ckpt out/distill/student.pt --export shallow.safetensors

Image i has class i modulo the number of classes. Its noise comes from block i // 16 of the seed's stream, so the same
seed starts image i from the same noise on any number of ranks and in any batch size; the pixels then agree up to
rounding. The averaged (EMA) weights are used. Writes to --out: samples.npz (arr_0 uint8 (N, H, W, 3), arr_1 labels),
samples.json (model, depth, parameters, settings, images/s) and grid.png, one row a class.
"""
import argparse
import atexit
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from extract_latents import decode_images, load_vae
from model import (SMALL_SAMPLING, Progress, RowNoise, barrier, end_ranks, fail, load_model, rank, save_checkpoint, start_ranks,
                   world_size, write_safetensors, write_whole)

BLOCK = 16  # images that share a noise generator


def sampling_options(args, objective, name: str) -> dict:
    """The objective's defaults, those of the small model, then what the command line says; fails on a flag that is not the family's."""
    given = dict(sampler=args.sampler, steps=args.steps, guidance=args.guidance, guidance_channels=args.guidance_channels,
                 guidance_schedule=args.guidance_schedule, diffusion_form=args.diffusion_form, last_step=args.last_step,
                 last_step_size=args.last_step_size, temperature=args.temperature, token_steps=args.token_steps)
    given = {k: v for k, v in given.items() if v is not None}
    foreign = [k for k in given if k not in objective.defaults]
    if foreign:
        fail(f"--{foreign[0].replace('_', '-')} does not apply to {name}; its flags are {', '.join('--' + k.replace('_', '-') for k in objective.defaults)}")
    options = objective.defaults | SMALL_SAMPLING.get(name, {}) | given
    if options["sampler"] not in objective.samplers:
        fail(f"--sampler {options['sampler']} does not apply to {name}; choose one of {', '.join(objective.samplers)}")
    if options["steps"] < 1:
        fail(f"--steps {options['steps']}: sampling takes at least one step")
    return options


@torch.inference_mode()
def sample_images(net, vae, labels, start: int, options: dict, seed: int, device, autocast, on_step=None) -> np.ndarray:
    """Images start, start + 1, ... of the seed's stream, of classes labels (B,) -> uint8 (B, H, W, 3)."""
    noise = RowNoise((seed,), start, start + len(labels), BLOCK, device)
    with autocast:
        z = net.objective().sample(net, torch.as_tensor(labels, device=device), noise, **options, on_step=on_step)
    return decode_images(vae, z.float())


def grid_of(images, labels, rows: int = 10, columns: int = 10) -> Image.Image:
    """One row a class (the first `rows` classes), white lines between."""
    classes = list(dict.fromkeys(labels.tolist()))[:rows]
    columns = max(1, min(columns, max(int((labels == c).sum()) for c in classes)))
    H, W = images.shape[1:3]
    canvas = np.full((len(classes) * (H + 2) + 2, columns * (W + 2) + 2, 3), 255, np.uint8)
    for r, c in enumerate(sorted(classes)):
        for j, image in enumerate(images[np.flatnonzero(labels == c)[:columns]]):
            canvas[2 + r * (H + 2) :, 2 + j * (W + 2) :][:H, :W] = image
    zoom = max(1, 64 // H)
    return Image.fromarray(canvas).resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.NEAREST)


def export(args, net, config):
    """--export: the weights alone, for other people's code (.safetensors) or for this one's weights/ folder (.pt)."""
    dtype = getattr(torch, args.dtype)
    state, path = {k: v.to(dtype) for k, v in net.state_dict().items()}, Path(args.export)
    if path.suffix == ".safetensors":
        write_safetensors(path, state, config)
    elif path.suffix in (".pt", ".pth"):
        save_checkpoint(path, model=state, ema=state, config=config, step=0)  # the DiT release's scripts look for `ema`; it is stored once
    else:
        fail(f"--export {path}: the name must end in .safetensors or .pt")
    print(f"wrote {path}: {sum(v.numel() for v in state.values()) / 1e6:.2f} M numbers as {args.dtype}")


def parse_arguments():
    """The command line; a sampling option that is None takes the family's default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="NAME", help="a registry model with its own weights, like dit-xl")
    add("--ckpt", metavar="FILE|URL", help="a checkpoint (default without --model: out/distill/student.pt)")
    add("--num-images", "--num", dest="num", type=int, default=1000, metavar="N", help="how many (default: %(default)s; FID-50K needs 50000). Under torchrun write it out: it would take --num for a flag of its own")
    add("--classes", metavar="I,J,...", help="only these class indices (default: all in turn)")
    add("--steps", type=int, metavar="N", help="sampling steps (default: 250, MAR 64 rounds; digits 64, mar-tiny 8)")
    add("--sampler", help="DiT: ddpm (default), ddim; SiT: sde-euler (default), sde-heun, ode-euler, ode-heun, ode-dopri5; MAR: mar")
    add("--guidance", type=float, metavar="SCALE", help="classifier-free guidance scale, 1 is none (default: 1.5, MAR 3)")
    add("--guidance-channels", type=int, metavar="C", help="DiT, SiT: latent channels that are guided (default: 3 of 4, as in the releases)")
    add("--guidance-schedule", choices=["linear", "constant"], help="MAR: over the rounds (default: linear)")
    add("--diffusion-form", choices=["sigma", "SBDM", "constant", "linear", "decreasing", "increasing-decreasing"], help="SiT SDE: how much noise when (default: sigma)")
    add("--last-step", choices=["mean", "tweedie", "euler", "none"], help="SiT SDE: the last step (default: mean)")
    add("--last-step-size", type=float, metavar="T", help="SiT SDE: its length in time (default: 0.04)")
    add("--temperature", type=float, metavar="T", help="MAR: scale of the token sampler's noise (default: 1)")
    add("--token-steps", metavar="N|ddimN", help="MAR: diffusion steps a token, N evenly spread ones or N of a fixed stride (default: 100; mar-tiny ddim25)")
    add("--vae", help="which decoder (default: the model's own; digits, sd-ema, sd-mse, kl16)")
    add("--vae-ckpt", metavar="FILE", help="its weights, instead of the registry's")
    add("--out", default="out/sample", metavar="DIR", help="default: %(default)s")
    add("--batch-size", type=int, default=256, metavar="N", help="images at a time on each rank (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of sampling, or of --export (default: %(default)s)")
    add("--export", metavar="FILE", help="write the weights to a .safetensors or .pt file and stop")
    return parser.parse_args()


def main():
    """Load, sample this rank's batches, and on rank 0 write .npz, .json and grid."""
    args = parse_arguments()
    device = start_ranks(args.device)
    if args.num < 1 or args.batch_size < 1 or args.seed < 0:
        fail("--num-images and --batch-size must be at least 1, --seed at least 0")
    ckpt = args.ckpt or (None if args.model else "out/distill/student.pt")
    net, config = load_model(args.model, ckpt, device)
    if args.export:
        return export(args, net, config)
    options = sampling_options(args, net.objective(), config["name"])
    try:
        classes = np.array([int(c) for c in args.classes.split(",")]) if args.classes else np.arange(net.classes)
    except ValueError:
        fail(f"--classes {args.classes} is not a list of class indices like 207,360")
    if classes.min() < 0 or classes.max() >= net.classes:
        fail(f"--classes {args.classes}: the network knows classes 0 to {net.classes - 1}")
    labels = classes[np.arange(args.num) % len(classes)]
    vae_name = args.vae or ("digits" if net.classes == 10 else "kl16" if net.channels == 16 else "sd-ema")
    vae = load_vae(vae_name, args.vae_ckpt, device, getattr(torch, args.dtype))
    if vae.config["latent"] != net.channels:
        fail(f"--vae {vae_name} decodes {vae.config['latent']} channels, {config['name']} makes {net.channels}")
    torch.backends.cuda.matmul.allow_tf32 = True  # as the DiT release samples; no effect on the CPU
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")

    out = Path(args.out)
    size = net.input_size * vae.factor
    scratch = out / ".samples.tmp"  # the ranks' common picture store, on disk since 50,000 images are 10 GB
    if rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(scratch, "w+", np.uint8, (args.num, size, size, 3)).flush()
        except OSError as e:
            fail(f"cannot write to {out}: {e.strerror}; choose another --out")
        atexit.register(lambda: scratch.unlink(missing_ok=True))
    barrier()
    images = np.lib.format.open_memmap(scratch, "r+")
    progress = Progress("sample", args.num * options["steps"] // world_size(), "image steps")
    started, done = time.time(), 0
    first, last = (args.num * r // world_size() for r in (rank(), rank() + 1))  # equal shares: nobody waits long for the others
    for start in range(first, last, args.batch_size):
        stop = min(start + args.batch_size, last)
        on_step = lambda step, total: progress.update(done + (stop - start) * step * options["steps"] // total)
        images[start:stop] = sample_images(net, vae, labels[start:stop], start, options, args.seed, device, autocast, on_step)
        done += (stop - start) * options["steps"]
    images.flush()
    barrier()
    if rank() != 0:
        return
    seconds = time.time() - started
    facts = dict(model=config["name"], depth=sum(net.depths()), parameters=sum(p.numel() for p in net.parameters()),
                 images_per_s=round(args.num / seconds, 2), ranks=world_size(), device=device.type, num=args.num, seed=args.seed, **options)
    write_whole(out / "samples.npz", lambda temporary: save_npz(temporary, images, labels))
    (out / "samples.json").write_text(json.dumps(facts) + "\n")
    shown = min(args.num, 4096)
    grid_of(np.asarray(images[:shown]), labels[:shown]).save(out / "grid.png")
    print(f"{args.num} images in {seconds:.0f} s ({facts['images_per_s']} images/s) from {config['name']} of depth {facts['depth']}; wrote {out}/samples.npz and grid.png")


def save_npz(path, images, labels):
    """Uncompressed, so that fid.py can map it; through an open file, since np.savez would append .npz to a temporary name."""
    with open(path, "wb") as f:
        np.savez(f, arr_0=images, arr_1=labels.astype(np.int64))


if __name__ == "__main__":
    main()
    end_ranks()
