"""Draws images from a network: a PNG grid to look at, and an ADM-style .npz to measure with fid.py.

    python sample.py                                                      # digits from out/distill/student.pt
    torchrun --nproc_per_node=8 sample.py --ckpt out/distill/student.pt --num-images 50000 --guidance 1.5
    python sample.py --ckpt out/distill/student.pt --export shallow.safetensors

Image i has class i modulo the number of classes. Its noise comes from block i // 16 of the seed's stream, so the same
seed starts image i from the same noise on any number of ranks and in any batch size; the pixels then agree up to
rounding. Writes to --out: samples.npz (arr_0 uint8 (N, H, W, 3), arr_1 labels (N,)), samples.json (model, depth,
parameters, settings, images/s) and grid.png, one row per class. Every rank of every machine must see --out.

Read top to bottom: guidance; the Gaussian process (ddpm, ddim); the interpolant (sde-*, ode-*); masked tokens (mar);
the dict of samplers; images and files; the command line.
"""
import argparse
import json
import math
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.integrate import solve_ivp

from extract_latents import VAES, decode_images, load_vae
from model import (MODELS, GaussianDiffusion, Parser, Progress, RowNoise, UserError, autocast, barrier, choose_dtype,
                   freeze_linear, gather_tokens, load_model, rank, real, run_main, save_checkpoint, start_ranks, whole,
                   world_size, write_safetensors, write_whole)

BLOCK = 16  # images that share a noise generator
STUDENT = "out/distill/student.pt"

# ---------------------------------------------------------------------------------------------------------------------
# A sampler turns labels y (B,) and noise (a RowNoise of B rows) into latents (B, C, H, W), by calling the network with
# times and noised latents. Its settings are what the command line offers; the model's own are in its registry row.


def guide(predict, x, t, y, null, scale, channels):
    """Classifier-free guidance: the prediction at y, its first `channels` pushed away from the prediction at `null`.

    DiT and SiT guide 3 of 4 latent channels, as their releases do; the fourth, and the variances, stay as predicted
    at y. Whatever type the network computes in, the arithmetic from here on is float32.
    """
    if scale == 1:
        return predict(x, t, y).float()
    out = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)])).float()
    cond, uncond = out.chunk(2)
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The Gaussian process, backwards. out (N, 2C, ...) is the network's answer at x (N, C, ...), t (N,) counts the steps
# of the process, which may be fewer than the 1000 it was trained with.


def ancestral_step(process, out, x, t, noise, temperature=1.0):
    """x_t -> x_{t-1} (Ho et al. 2020, algorithm 2); the step to x_0 (t = 0) adds no noise."""
    mean, log_variance, _ = process.p_mean_variance(out, x, t)
    return mean + (t > 0).view(-1, *[1] * (x.ndim - 1)) * (0.5 * log_variance).exp() * noise * temperature


def ddim_step(process, out, x, t):
    """DDIM (Song et al. 2021), eq. 12 with sigma = 0: deterministic."""
    _, _, x_start = process.p_mean_variance(out, x, t)
    eps = process.at("sqrt_recip_alphas_cumprod", t, x) * x - x_start
    eps = eps / process.at("sqrt_recipm1_alphas_cumprod", t, x)
    previous = process.at("alphas_cumprod_prev", t, x)
    return x_start * previous.sqrt() + (1 - previous).sqrt() * eps


def sample_loop(process, predict, x, draw, sampler="ddpm", temperature=1.0, on_step=None):
    """From x at the last step down to x_0. predict(x, t_model) -> (N, 2C, ...); draw() -> noise like x."""
    for i in reversed(range(process.steps)):
        t = torch.full((len(x),), i, device=x.device)
        out = predict(x, torch.full((len(x),), process.timestep_map[i], device=x.device))
        x = ddim_step(process, out, x, t) if sampler == "ddim" else ancestral_step(process, out, x, t, draw(), temperature)
        if on_step:
            on_step(process.steps - i, process.steps)
    return x


def sample_gaussian(net, y, noise, sampler, steps, guidance, guidance_channels, on_step=None):
    """ddpm, ddim. steps: 250 evenly spread timesteps of the 1000, "ddim50" every 20th. Guidance 1 is none."""
    draw = lambda: noise.normal(net.channels, net.input_size, net.input_size)
    predict = lambda x, t: guide(net, x, t, y, net.classes, guidance, guidance_channels)
    return sample_loop(GaussianDiffusion("linear", str(steps)), predict, draw(), draw, sampler, on_step=on_step)


# ---------------------------------------------------------------------------------------------------------------------
# The interpolant x_t = t x_1 + (1 - t) x_0 from noise x_0 to data x_1: an ODE or an SDE along the predicted velocity.

DIFFUSION_FORMS = {  # SiT (Ma et al. 2024), table 3 and its release: w(t) of the reverse SDE
    "sigma": lambda t: 1 - t,
    "SBDM": lambda t: (1 - t) ** 2 / t + (1 - t),
    "constant": lambda t: torch.ones_like(t),
    "linear": lambda t: 1 - t,
    "decreasing": lambda t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t: torch.sin(math.pi * t) ** 2,
}


def score_of(velocity, x, t):
    """Score from velocity on the linear path: (t v - x) / ((1 - t)^2 + t (1 - t))."""
    return (t * velocity - x) / ((1 - t) ** 2 + t * (1 - t))


def integrate_sde(velocity, x, steps, draw, method="euler", form="sigma", last_step="mean", last_step_size=0.04,
                  on_step=None):
    """Reverse SDE from t = 0 (noise) to 1: dx = (v + w score) dt + sqrt(2 w) dW, Euler-Maruyama or Heun.

    steps grid points end at 1 - last_step_size; the last step, without noise, does the rest: "mean" follows the SDE's
    drift, "euler" the velocity, "tweedie" the posterior mean; "none" has no last step. One network call gives both v
    and the score (the release calls it twice). SBDM is infinite at t = 0 and starts at 1e-3.
    """
    if last_step == "none":  # Heun looks ahead to the last grid point, where the score is infinite
        last_step_size = 1e-3 if method == "heun" else 0.0
    weight = DIFFUSION_FORMS[form]
    grid = torch.linspace(1e-3 if form == "SBDM" else 0.0, 1 - last_step_size, steps, device=x.device)
    dt = grid[1] - grid[0]
    column = lambda t: t.expand(len(x)).view(-1, *[1] * (x.ndim - 1))  # () -> (B, 1, ...)

    def drift(x, t):
        v = velocity(x, t.expand(len(x)))
        return v + weight(column(t)) * score_of(v, x, column(t))

    for i, t in enumerate(grid[:-1]):
        noise = (2 * weight(column(t))).sqrt() * draw() * dt.sqrt()
        if method == "heun":
            x = x + noise
            first = drift(x, t)
            x = x + 0.5 * dt * (first + drift(x + dt * first, t + dt))
        else:
            x = x + drift(x, t) * dt + noise
        if on_step:
            on_step(i + 1, steps)
    t = grid[-1]
    if last_step == "none":
        return x
    if last_step == "mean":
        return x + drift(x, t) * last_step_size
    v = velocity(x, t.expand(len(x)))
    if last_step == "euler":
        return x + v * last_step_size
    return x / t + (1 - t) ** 2 / t * score_of(v, x, column(t))  # tweedie


def integrate_ode(velocity, x, steps, method="dopri5", on_step=None, atol=1e-6, rtol=1e-3):
    """dx/dt = velocity(x, t) from t = 0 to 1: Euler or Heun on `steps` grid points, or adaptive dopri5."""
    call = lambda x, t: velocity(x, torch.full((len(x),), float(t), device=x.device))
    if method == "dopri5":
        return dopri5(call, x, atol, rtol, on_step)
    grid = np.linspace(0, 1, steps, dtype=np.float32)
    for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
        first = call(x, t)
        slope = (first + call(x + float(t_next - t) * first, t_next)) / 2 if method == "heun" else first
        x = x + float(t_next - t) * slope
        if on_step:
            on_step(i + 1, steps - 1)
    return x


def dopri5(call, x, atol, rtol, on_step=None):
    """Adaptive Runge-Kutta 5(4) of Dormand & Prince 1980: scipy's RK45, the pair that the release's torchdiffeq uses.

    scipy holds the state in float64 on the host, so on a GPU it travels there and back at each call. One step size
    serves the whole batch: an image depends on its batch companions, to within the tolerances.
    """

    def slope(t, state):
        out = call(torch.as_tensor(state, dtype=torch.float32, device=x.device).view_as(x), t)
        if not out.isfinite().all():
            raise UserError(f"the network's output is not finite at t = {t:.3f}; use weights from before training diverged")
        if on_step:
            on_step(int(1000 * t), 1000)
        return out.double().flatten().cpu().numpy()

    end = solve_ivp(slope, (0, 1), x.double().flatten().cpu().numpy(), method="RK45", atol=atol, rtol=rtol).y[:, -1]
    return torch.as_tensor(end, dtype=torch.float32, device=x.device).view_as(x)


def sample_interpolant(net, y, noise, sampler, steps, guidance, guidance_channels, diffusion_form, last_step,
                       last_step_size, on_step=None):
    """sde-euler, sde-heun, ode-euler, ode-heun, ode-dopri5. steps: grid points; 20 are 19 steps and the SDE's last one."""
    check_number(steps, 2)
    draw = lambda: noise.normal(net.channels, net.input_size, net.input_size)
    velocity = lambda x, t: guide(net, x, t, y, net.classes, guidance, guidance_channels)
    kind, method = sampler.split("-")
    if kind == "ode":
        return integrate_ode(velocity, draw(), steps, method, on_step)
    return integrate_sde(velocity, draw(), steps, draw, method, diffusion_form, last_step, last_step_size, on_step)


def check_number(steps, least):
    if not isinstance(steps, int) or steps < least:
        raise UserError(f"--steps {steps}: this sampler takes a whole number, {least} or more")


# ---------------------------------------------------------------------------------------------------------------------
# Masked tokens (MAR, Li et al. 2024): fill in more tokens each round, each by a small diffusion of its own.


def mar_schedule(tokens: int, rounds: int) -> list:
    """Hidden tokens at the start of each round, then 0. Cosine, at least one token per round while any is left."""
    schedule = [tokens]
    for step in range(rounds - 1):
        remain = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / rounds))
        schedule.append(max(1, min(schedule[-1] - 1, remain)))
    return schedule + [0]


def sample_tokens(net, y, noise, sampler, steps, guidance, guidance_schedule, temperature, token_steps, on_step=None):
    """mar. steps: rounds; token_steps: diffusion steps per token. A linear schedule guides late rounds most."""
    check_number(steps, 1)
    order = noise.uniform(net.tokens).argsort(dim=1)  # (B, T): each row hides its tokens in an order of its own
    process = GaussianDiffusion("cosine", str(token_steps))
    tokens = torch.zeros(len(y), net.tokens, net.token_dim, device=y.device)
    schedule = mar_schedule(net.tokens, steps)
    for step, (hidden, remain) in enumerate(zip(schedule, schedule[1:])):
        if hidden > remain:
            kept, new = order[:, hidden:].sort(dim=1)[0], order[:, remain:hidden].sort(dim=1)[0]
            done = (net.tokens - max(remain, 1)) / net.tokens if guidance_schedule == "linear" else 1
            scale = 1 + (guidance - 1) * done
            tokens = fill_in(net, tokens, y, kept, new, scale, process, noise, temperature)
        if on_step:
            on_step(step + 1, steps)
    return net.unpatchify(tokens)


def fill_in(net, tokens, y, kept, new, scale, process, noise, temperature):
    """One round: from the tokens at `kept` (B, K), draw those at `new` (B, n) by the DiffLoss network's diffusion."""
    B, n, C = len(tokens), new.shape[1], net.token_dim
    double = lambda v: torch.cat([v, v]) if scale != 1 else v
    labels = torch.cat([y, torch.full_like(y, net.classes)]) if scale != 1 else y
    z = net.decode(net.encode(double(tokens), labels, double(kept)), double(kept))  # (2B, T, D)
    z = gather_tokens(z, double(new)).flatten(0, 1)  # (2B n, D), the null label's in the second half

    def predict(x, t):  # (B n, C), (B n,) -> (B n, 2C)
        # `guide` calls back with x, t doubled; z already holds both labels' conditions
        return guide(lambda x, t, _: net.diffloss.net(x, t, z), x, t, t, 0, scale, C)

    draw = lambda: noise.normal(n, C).flatten(0, 1)
    new_tokens = sample_loop(process, predict, draw(), draw, temperature=temperature).view(B, n, C)
    return tokens.scatter(1, new[..., None].expand(-1, -1, C), new_tokens)


SAMPLERS = {
    "ddpm": sample_gaussian,
    "ddim": sample_gaussian,
    "sde-euler": sample_interpolant,
    "sde-heun": sample_interpolant,
    "ode-euler": sample_interpolant,
    "ode-heun": sample_interpolant,
    "ode-dopri5": sample_interpolant,
    "mar": sample_tokens,
}

# ---------------------------------------------------------------------------------------------------------------------
# Images and files.


@torch.inference_mode()
def sample_images(net, vae, labels, start: int, settings: dict, seed: int, device, dtype, on_step=None) -> np.ndarray:
    """Images start, start + 1, ... of the seed's stream, of classes labels (B,) -> uint8 (B, H, W, 3)."""
    noise = RowNoise((seed,), start, start + len(labels), BLOCK, device)
    y = torch.as_tensor(labels, device=device)
    with autocast(device, dtype):
        z = SAMPLERS[settings["sampler"]](net, y, noise, on_step=on_step, **settings)
    return decode_images(vae, z.float())


def write_npz(path, images, labels):
    """Uncompressed, so that fid.py can map it, and image by image: 50,000 of 256x256 are 10 GB."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            shape = (len(images), *images[0].shape)
            np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=shape))
            for image in images:
                f.write(image)
        with archive.open("arr_1.npy", "w") as f:
            np.lib.format.write_array(f, labels)


def grid_of(images, labels, rows: int = 10, columns: int = 10) -> Image.Image:
    """One row per class (the first `rows` classes), white lines between."""
    classes = list(dict.fromkeys(labels.tolist()))[:rows]
    columns = max(1, min(columns, max(int((labels == c).sum()) for c in classes)))
    H, W = images[0].shape[:2]
    canvas = np.full((len(classes) * (H + 2) + 2, columns * (W + 2) + 2, 3), 255, np.uint8)
    for r, c in enumerate(sorted(classes)):
        for j, i in enumerate(np.flatnonzero(labels == c)[:columns]):
            canvas[2 + r * (H + 2) :, 2 + j * (W + 2) :][:H, :W] = images[i]
    zoom = max(1, 64 // H)
    return Image.fromarray(canvas).resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.NEAREST)


def part_of(out: Path, r: int) -> Path:
    """Where rank r writes its images: a file of its own, since machines that write into one file can lose parts of it."""
    return out / f".samples-{r}.tmp"


def join_parts(out: Path, labels, size: int):
    """Rank 0: the images of all ranks -> samples.npz and grid.png. They are mapped, never all in memory."""
    parts = [part_of(out, r) for r in range(world_size())]
    images = [image for part in parts if part.exists() and part.stat().st_size
              for image in np.asarray(np.memmap(part, np.uint8, "r")).reshape(-1, size, size, 3)]
    if len(images) != len(labels):
        raise UserError(f"{out} holds {len(images)} of {len(labels)} images; choose an --out that all ranks see")
    write_whole(out / "samples.npz", lambda temporary: write_npz(temporary, images, labels))
    grid_of(images, labels).save(out / "grid.png")
    for part in out.glob(".samples-*.tmp"):
        part.unlink()


def export(path: Path, net, config, dtype):
    """The weights alone, for other people's code (.safetensors) or for weights/ (.pt)."""
    state = {k: v.to(dtype) for k, v in net.state_dict().items()}
    if path.suffix == ".safetensors":
        write_safetensors(path, state, config)
    else:  # the DiT release's scripts look for `ema`; it is stored once
        save_checkpoint(path, model=state, ema=state, config=config, step=0)
    print(f"wrote {path}: {sum(v.numel() for v in state.values()) / 1e6:.2f} M numbers as {dtype}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def spacing(text: str):
    """An argparse type: "250" -> 250; "ddim50", every 20th of 1000 timesteps, stays a string."""
    if not re.fullmatch("(ddim)?[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps; give one like 50 or ddim50")
    return text if text.startswith("ddim") else int(text)


def class_list(text: str) -> list:
    """An argparse type: "207,360" -> [207, 360]."""
    return [whole(0)(part) for part in text.split(",")]


def parse_arguments():
    """The command line; a sampling flag that is not given takes the model's own value."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--model", metavar="NAME", help="a registry model with its own weights, like dit-xl; or what --ckpt holds")
    add("--ckpt", metavar="FILE|URL", help=f"a checkpoint (default without --model: {STUDENT})")
    add("--weights", choices=["ema", "model"], default="ema", help="the averaged weights or the raw ones (default: ema)")
    add("--num-images", type=whole(1), default=1000, metavar="N", help="FID-50K needs 50000 (default: 1000)")
    add("--classes", type=class_list, metavar="I,J,...", help="only these class indices (default: all in turn)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the noise (default: 0)")
    add = parser.add_argument_group("sampling (default: the model's own, printed in the first line)").add_argument
    add("--sampler", choices=list(SAMPLERS), metavar="NAME",
        help="DiT: ddpm, ddim; SiT: sde-euler, sde-heun, ode-euler, ode-heun, ode-dopri5; MAR: mar")
    add("--steps", type=spacing, metavar="N|ddimN", help="sampling steps, MAR: rounds; ddimN: a fixed stride (DiT)")
    add("--guidance", type=real(0), metavar="SCALE", help="classifier-free guidance, 1 is none")
    add("--guidance-channels", type=whole(1), metavar="C", help="DiT, SiT: latent channels that are guided")
    add("--guidance-schedule", choices=["linear", "constant"], help="MAR: over the rounds")
    add("--diffusion-form", choices=list(DIFFUSION_FORMS), metavar="FORM",
        help=f"SiT SDE: how much noise when: {', '.join(DIFFUSION_FORMS)}")
    add("--last-step", choices=["mean", "tweedie", "euler", "none"], help="SiT SDE: the step that adds no noise")
    add("--last-step-size", type=real(0, 0.99, open_low=True), metavar="T", help="SiT SDE: its length in time")
    add("--temperature", type=real(0), metavar="T", help="MAR: scale of the token diffusion's noise")
    add("--token-steps", type=spacing, metavar="N|ddimN", help="MAR: diffusion steps per token")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("out/sample"), metavar="DIR", help="default: out/sample")
    add("--vae", choices=list(VAES), help="the decoder (default: the model's own)")
    add("--vae-ckpt", metavar="FILE", help="its weights, instead of the registry's")
    add("--export", type=Path, metavar="FILE", help="write the weights to a .safetensors or .pt file and stop")
    add("--export-dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: float32")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=whole(1), default=256, metavar="N", help="images at a time per rank (default: 256)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N (default: auto, a GPU if there is one)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="float32",
        help="auto is bfloat16 where it is native (default: float32, exact)")
    add("--compile", action="store_true", help="compile the network first: a minute on the CPU, then faster steps")
    return parser.parse_args()


def settings_of(args, net, name: str) -> dict:
    """The model's own sampler settings, overridden by what the command line gives; refuses a flag that is not among them."""
    own = MODELS[name]["sampling"]
    every = {k for row in MODELS.values() for k in row["sampling"]}
    given = {k: v for k, v in vars(args).items() if k in every and v is not None}
    flag = lambda k: "--" + k.replace("_", "-")
    foreign = [flag(k) for k in given if k not in own]
    if foreign:
        raise UserError(f"{foreign[0]} does not apply to {name}; its flags are {', '.join(map(flag, own))}")
    settings = own | given
    samplers = [k for k, function in SAMPLERS.items() if function is SAMPLERS[own["sampler"]]]
    if settings["sampler"] not in samplers:
        raise UserError(f"--sampler {args.sampler} does not apply to {name}; choose one of {', '.join(samplers)}")
    if settings.get("guidance_channels", 1) > net.channels:
        raise UserError(f"--guidance-channels {args.guidance_channels}: {name} has {net.channels}; give 1 to {net.channels}")
    if args.compile and settings["sampler"] == "mar":
        raise UserError("--compile does not apply to mar: every round has other shapes, and would compile anew; leave it out")
    return settings


def main():
    """Load, sample this rank's share of the images, and on rank 0 join the shares."""
    args = parse_arguments()
    device = start_ranks(args.device)
    dtype = choose_dtype(args.dtype, device)
    ckpt = args.ckpt or (None if args.model else STUDENT)
    if ckpt == STUDENT and not Path(ckpt).exists():
        raise UserError(f"{ckpt} does not exist; distill.py writes it, and --model dit-tiny needs none")
    net, config = load_model(args.model, ckpt, device, args.weights)
    name, depth = config["name"], sum(net.depths())
    if args.export:
        return export(args.export, net, config, getattr(torch, args.export_dtype)) if rank() == 0 else None
    settings = settings_of(args, net, name)
    classes = np.array(args.classes if args.classes else range(net.classes))
    if classes.max() >= net.classes:
        raise UserError(f"--classes {classes.max()}: the network knows classes 0 to {net.classes - 1}")
    vae = load_vae(args.vae or MODELS[name]["vae"], args.vae_ckpt, device, dtype)
    if vae.config["latent"] != net.channels:
        raise UserError(f"--vae {args.vae} decodes {vae.config['latent']} channels, {name} makes {net.channels}; leave it out")
    if rank() == 0:
        print(f"{device.type}, {str(dtype)[6:]}, {name} of depth {depth}: {args.num_images} images, "
              + ", ".join(f"{k} {v}" for k, v in settings.items()), flush=True)
    facts = dict(model=name, depth=depth, parameters=sum(p.numel() for p in net.parameters()), ranks=world_size(),
                 device=device.type, dtype=str(dtype)[6:], num=args.num_images, seed=args.seed, **settings)
    torch.backends.cuda.matmul.allow_tf32 = True  # as the DiT release samples; no effect on the CPU
    net.requires_grad_(False)
    if dtype != torch.float32:
        freeze_linear(net, dtype)  # once, where autocast would cast the weights at each call
    if args.compile:
        torch._inductor.config.freezing = True  # weights are constants, packed for the kernels that read them
        net = torch.compile(net, dynamic=False)

    first, last = (args.num_images * r // world_size() for r in (rank(), rank() + 1))  # nobody waits long for the others
    batch = min(args.batch_size, -(-args.num_images // world_size()))
    labels = lambda start, stop: classes[np.arange(start, stop) % len(classes)]
    steps = int(str(settings["steps"]).removeprefix("ddim"))
    progress = Progress("sample", (last - first) * steps, "image steps")
    started = time.time()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(part_of(args.out, rank()), "wb") as f:
            for start in range(first, last, batch):
                n = min(batch, last - start)
                rows = batch if args.compile else n  # other shapes would compile anew: draw too many, keep n
                on_step = lambda step, total: progress.update((start - first) * steps + n * steps * step // total)
                images = sample_images(net, vae, labels(start, start + rows), start, settings, args.seed, device, dtype, on_step)
                f.write(images[:n].tobytes())
    except OSError as e:
        raise UserError(f"cannot write to {args.out}: {e.strerror}; choose another --out")
    progress.update((last - first) * steps)
    barrier()  # closed files are there for every machine
    if rank() != 0:
        return
    seconds = time.time() - started
    facts["images_per_s"] = round(args.num_images / seconds, 2)
    join_parts(args.out, labels(0, args.num_images), net.input_size * vae.factor)
    (args.out / "samples.json").write_text(json.dumps(facts) + "\n")
    print(f"{args.num_images} images in {seconds:.0f} s ({facts['images_per_s']} images/s); wrote {args.out}/samples.npz and grid.png")


if __name__ == "__main__":
    run_main(main)
