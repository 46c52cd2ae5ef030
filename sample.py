"""Draws images from a network: a PNG grid to look at, and an ADM-style .npz to measure with fid.py.

    python sample.py                                                      # digits from out/distill/student.pt
    torchrun --nproc_per_node=8 sample.py --ckpt out/distill/student.pt --num-images 50000 --guidance 1.5
    python sample.py --ckpt out/distill/student.pt --export shallow.safetensors

Image i has class i modulo the number of classes, and noise from block i // 16 of the seed's stream: it is the same, up
to rounding, on any number of ranks and in any batch size. Writes to --out, which all ranks must see: samples.npz (arr_0
uint8 (N, H, W, 3), arr_1 labels (N,)), samples.json (model, depth, settings, images/s) and grid.png, one row per class.
Read: the Gaussian process (ddpm, ddim); the interpolant (sde-*, ode-*); masked tokens (mar); files, flags, the run.
"""
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.integrate import solve_ivp

from extract_latents import VAES, decode_images, load_vae
from model import (
    MODELS, SAFETENSORS_TYPES, GaussianDiffusion, Parser, Progress, RowGenerator, UserError, autocast, barrier,
    choose_dtype, cast_frozen, gather_tokens, load_model, rank, real, run_main, save_checkpoint, start_ranks, whole,
    world_size, atomic_write)

BLOCK = 16  # images that share a noise generator
PART = ".samples-{}.tmp"  # a rank's images, in a file of its own: machines that write into one file can lose parts
STUDENT = "out/distill/student.pt"
SILENT = lambda step, steps: None

# ---------------------------------------------------------------------------------------------------------------------
# Samplers: labels y (B,) and a RowGenerator of B rows -> latents (B, C, H, W). A model's own settings are in its row of
# MODELS. First the Gaussian process, backwards: x (N, C, ...), the network's answer out (N, 2C, ...), t (N,).

def guide(predict, x, t, y, null, scale, channels):
    """Classifier-free guidance: the prediction at y, its first `channels` pushed away from the prediction at `null`.
    DiT and SiT guide 3 of 4 latent channels, as their releases do; the fourth, and the variances, stay as predicted."""
    if scale == 1:
        return predict(x, t, y).float()  # the sampler's arithmetic is float32
    out = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
    cond, uncond = out.float().chunk(2)
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)

def ancestral_step(process, out, x, t, noise, temperature=1.0):
    """x_t -> x_{t-1} as in DDPM (Ho et al. 2020), algorithm 2; the step to x_0 (t = 0) adds no noise."""
    mean, log_variance, _ = process.p_mean_variance(out, x, t)
    return mean + (t > 0).view(-1, *[1] * (x.ndim - 1)) * (0.5 * log_variance).exp() * noise * temperature

def ddim_step(process, out, x, t):
    """x_t -> x_{t-1} as in DDIM (Song et al. 2021), eq. 12 with sigma = 0: deterministic."""
    _, _, x_0 = process.p_mean_variance(out, x, t)
    eps = (process.at("sqrt_recip_alphas_cumprod", t, x) * x - x_0) / process.at("sqrt_recipm1_alphas_cumprod", t, x)
    previous = process.at("alphas_cumprod_prev", t, x)
    return x_0 * previous.sqrt() + (1 - previous).sqrt() * eps

def sample_loop(process, predict, x, draw, sampler="ddpm", temperature=1.0, on_step=SILENT):
    """From x at the last step down to x_0. predict(x, t of training) -> (N, 2C, ...); draw() -> noise like x."""
    for i in reversed(range(process.steps)):
        t = torch.full((len(x),), i, device=x.device)
        out = predict(x, torch.full_like(t, process.timestep_map[i]))
        x = (ddim_step(process, out, x, t) if sampler == "ddim"
             else ancestral_step(process, out, x, t, draw(), temperature))
        on_step(process.steps - i, process.steps)
    return x

def sample_gaussian(net, y, noise, sampler, steps, guidance, guidance_channels, on_step=SILENT):
    """ddpm, ddim. steps: 250 evenly spread ones of the 1000, or "ddim50", every 20th. Guidance 1 is none."""
    draw = lambda: noise.normal(net.channels, net.input_size, net.input_size)
    predict = lambda x, t: guide(net, x, t, y, net.classes, guidance, guidance_channels)
    return sample_loop(GaussianDiffusion("linear", str(steps)), predict, draw(), draw, sampler, on_step=on_step)

# ---------------------------------------------------------------------------------------------------------------------
# The interpolant x_t = t x_1 + (1 - t) x_0 from noise x_0 to data x_1: an SDE or an ODE along the predicted velocity.

DIFFUSION_FORMS = {  # SiT (Ma et al. 2024), table 3 and its release: w(t) of the reverse SDE
    "sigma": lambda t: 1 - t,
    "SBDM": lambda t: (1 - t) ** 2 / t + (1 - t),
    "constant": lambda t: torch.ones_like(t),
    "linear": lambda t: 1 - t,
    "decreasing": lambda t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t: torch.sin(math.pi * t) ** 2,
}

def score_of(velocity, x, t):  # on this path
    return (t * velocity - x) / ((1 - t) ** 2 + t * (1 - t))

def integrate_sde(velocity, x, steps, draw, method="euler", diffusion_form="sigma", last_step="mean",
                  last_step_size=0.04, on_step=SILENT):
    """Reverse SDE from t = 0 (noise) to 1: dx = (v + w score) dt + sqrt(2 w) dW, Euler-Maruyama or Heun.
    steps grid points end at 1 - last_step_size; the last step, without noise, does the rest: "mean" follows the SDE's
    drift, "euler" the velocity, "tweedie" the posterior mean; "none" has no last step. One network call gives both v
    and the score (the release calls it twice). SBDM is infinite at t = 0 and starts at 1e-3."""
    if last_step == "none":  # Heun looks ahead to the last grid point, where the score is infinite
        last_step_size = 1e-3 if method == "heun" else 0.0
    weight = DIFFUSION_FORMS[diffusion_form]
    grid = torch.linspace(1e-3 if diffusion_form == "SBDM" else 0.0, 1 - last_step_size, steps, device=x.device)
    dt = grid[1] - grid[0]

    def drift(x, t):
        v = velocity(x, t.expand(len(x)))
        return v + weight(t) * score_of(v, x, t)

    for i, t in enumerate(grid[:-1]):
        noise = (2 * weight(t)).sqrt() * draw() * dt.sqrt()
        if method == "heun":
            x = x + noise
            first = drift(x, t)
            x = x + 0.5 * dt * (first + drift(x + dt * first, t + dt))
        else:
            x = x + drift(x, t) * dt + noise
        on_step(i + 1, steps - 1)
    if last_step == "none":
        return x
    t, v = grid[-1], velocity(x, grid[-1].expand(len(x)))
    score = score_of(v, x, t)
    if last_step == "tweedie":
        return x / t + (1 - t) ** 2 / t * score
    return x + (v + weight(t) * score if last_step == "mean" else v) * last_step_size

def integrate_ode(velocity, x, steps, method, on_step=SILENT, atol=1e-6, rtol=1e-3):
    """dx/dt = velocity(x, t) from t = 0 to 1: Euler or Heun on `steps` grid points, or dopri5 in steps of its own.
    dopri5 is scipy's RK45: the pair of Dormand & Prince, as in the release. It holds the state on the host: from a GPU
    it travels at each call. A batch shares its steps: an image depends on its companions, to within the tolerances."""
    call = lambda x, t: velocity(x, torch.full((len(x),), float(t), device=x.device))

    def slope(t, state):
        on_step(int(999 * t), 1000)
        v = call(torch.from_numpy(state).to(x).view_as(x), t)
        if not v.isfinite().all():
            raise UserError(f"the network's output at t = {t:.3f} is not finite; take weights from before it diverged")
        return v.flatten().cpu().numpy()

    if method == "dopri5":
        states = solve_ivp(slope, (0, 1), x.double().flatten().cpu().numpy(), method="RK45", atol=atol, rtol=rtol).y
        on_step(1000, 1000)
        return torch.from_numpy(states[:, -1]).to(x).view_as(x)
    grid = np.linspace(0, 1, steps, dtype=np.float32)
    for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
        dt, first = float(t_next - t), call(x, t)
        x = x + dt * ((first + call(x + dt * first, t_next)) / 2 if method == "heun" else first)
        on_step(i + 1, steps - 1)
    return x

def sample_interpolant(net, y, noise, sampler, steps, guidance, guidance_channels, on_step=SILENT, **sde):
    """sde-euler, sde-heun, ode-euler, ode-heun, ode-dopri5. steps: grid points; of 20, 19 steps and the SDE's last."""
    if steps < 2:
        raise UserError(f"--steps {steps}: the grid needs its two ends; give 2 or more")
    draw = lambda: noise.normal(net.channels, net.input_size, net.input_size)
    velocity = lambda x, t: guide(net, x, t, y, net.classes, guidance, guidance_channels)
    kind, method = sampler.split("-")
    if kind == "sde":
        return integrate_sde(velocity, draw(), steps, draw, method, **sde, on_step=on_step)
    return integrate_ode(velocity, draw(), steps, method, on_step)

# ---------------------------------------------------------------------------------------------------------------------
# Masked tokens (MAR, Li et al. 2024): each round fills in some, by a small diffusion for each token.

def mar_schedule(tokens: int, rounds: int) -> list:
    """Hidden tokens at the start of each round, then 0. Cosine, at least one token per round while any is left."""
    schedule = [tokens]
    for step in range(1, rounds):
        remain = math.floor(tokens * math.cos(math.pi / 2 * step / rounds))
        schedule.append(max(1, min(schedule[-1] - 1, remain)))
    return schedule + [0]

def sample_tokens(net, y, noise, sampler, steps, guidance, guidance_schedule, temperature, token_steps, on_step=SILENT):
    """mar. steps: rounds; token_steps: diffusion steps per token. The linear schedule guides the last round most."""
    order = noise.uniform(net.tokens).argsort(dim=1)  # (B, T): each row fills in its tokens in an order of its own
    process = GaussianDiffusion("cosine", str(token_steps))
    tokens = torch.zeros(len(y), net.tokens, net.token_dim, device=y.device)
    schedule = mar_schedule(net.tokens, steps)
    for step, (hidden, remain) in enumerate(zip(schedule, schedule[1:])):
        if hidden > remain:
            known, new = order[:, hidden:].sort(dim=1)[0], order[:, remain:hidden].sort(dim=1)[0]
            share = (net.tokens - max(remain, 1)) / net.tokens if guidance_schedule == "linear" else 1
            tokens = fill_in(net, tokens, y, known, new, 1 + (guidance - 1) * share, process, noise, temperature)
        on_step(step + 1, steps)
    return net.unpatchify(tokens)

def fill_in(net, tokens, y, known, new, scale, process, noise, temperature):
    """One round: from the tokens at `known` (B, K), those at `new` (B, n), by the DiffLoss network's own diffusion."""
    B, n, C = len(tokens), new.shape[1], net.token_dim
    double = lambda v: torch.cat([v, v]) if scale != 1 else v
    labels = torch.cat([y, torch.full_like(y, net.classes)]) if scale != 1 else y
    z = net.decode(net.encode(double(tokens), labels, double(known)), double(known))  # (2B, T, D)
    z = gather_tokens(z, double(new)).flatten(0, 1)  # (2B n, D): `guide` doubles x and t, z has both labels' halves
    predict = lambda x, t: guide(lambda x, t, _: net.diffloss.net(x, t, z), x, t, t, 0, scale, C)  # -> (B n, 2C)
    draw = lambda: noise.normal(n, C).flatten(0, 1)
    new_tokens = sample_loop(process, predict, draw(), draw, temperature=temperature).view(B, n, C)
    return tokens.scatter(1, new[..., None].expand(-1, -1, C), new_tokens)

SAMPLERS = dict(ddpm=sample_gaussian, ddim=sample_gaussian, mar=sample_tokens)
SAMPLERS |= dict.fromkeys(["sde-euler", "sde-heun", "ode-euler", "ode-heun", "ode-dopri5"], sample_interpolant)

# ---------------------------------------------------------------------------------------------------------------------
# The run: images and files, flags, and what happens in order.

@torch.inference_mode()
def sample_images(net, vae, labels, start, settings, seed, device, dtype, on_step=SILENT) -> np.ndarray:
    """Images start, start + 1, ... of the seed's stream, of classes labels (B,) -> uint8 (B, H, W, 3)."""
    noise, y = RowGenerator((seed,), start, start + len(labels), BLOCK, device), torch.as_tensor(labels, device=device)
    with autocast(device, dtype):
        z = SAMPLERS[settings["sampler"]](net, y, noise, **settings, on_step=on_step)
    return decode_images(vae, z)

def join_parts(out: Path, labels, size: int):
    """Rank 0: all ranks' images -> samples.npz, uncompressed, and grid.png. Mapped: 50,000 of 256x256 are 10 GB."""
    parts = [part for r in range(world_size()) if (part := out / PART.format(r)).exists()]
    with open(parts[0], "ab") as f:
        for part in parts[1:]:
            with open(part, "rb") as more:
                shutil.copyfileobj(more, f, 2**24)
    images = np.memmap(parts[0], np.uint8, "r").reshape(-1, size, size, 3)
    if len(images) != len(labels):
        raise UserError(f"{out} holds {len(images)} of {len(labels)} images; give an --out that all ranks see")

    def write(temporary):
        with open(temporary, "wb") as f:
            np.savez(f, arr_0=images, arr_1=labels)

    atomic_write(out / "samples.npz", write)
    grid_of(images, labels).save(out / "grid.png")
    for part in out.glob(PART.format("*")):
        part.unlink()

def grid_of(images, labels, rows: int = 10, columns: int = 10) -> Image.Image:
    """One row per class (the first `rows` classes), white lines between."""
    classes = sorted(list(dict.fromkeys(labels.tolist()))[:rows])
    members = [np.flatnonzero(labels == c)[:columns] for c in classes]
    H, W = images.shape[1:3]
    canvas = np.full((len(classes) * (H + 2) + 2, max(map(len, members)) * (W + 2) + 2, 3), 255, np.uint8)
    for r, row in enumerate(members):
        for j, i in enumerate(row):
            canvas[2 + r * (H + 2) :, 2 + j * (W + 2) :][:H, :W] = images[i]
    return Image.fromarray(np.kron(canvas, np.ones((max(1, 64 // H), max(1, 64 // H), 1), np.uint8)))  # small: zoomed

def export(path: Path, net, config: dict, dtype):
    """The weights alone: .safetensors (8 bytes of header length, a JSON header, raw bytes), else our own format."""
    state = {k: v.to("cpu", dtype).contiguous() for k, v in net.state_dict().items()}
    if path.suffix != ".safetensors":  # the DiT release's scripts look for `ema`; it is stored once
        return save_checkpoint(path, model=state, ema=state, config=config, step=0)
    code = next(k for k, v in SAFETENSORS_TYPES.items() if v == dtype)
    header, end = {"__metadata__": {"config": json.dumps(config)}}, 0
    for k, v in state.items():
        header[k] = dict(dtype=code, shape=list(v.shape), data_offsets=[end, end := end + v.nbytes])
    text = json.dumps(header).encode()
    text = text.ljust(8 * -(-len(text) // 8))
    raw = [v.flatten().view(torch.uint8).numpy() for v in state.values()]
    atomic_write(path, lambda temporary: temporary.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *raw])))

def parse_arguments():
    parser = Parser(__doc__)
    spacing = lambda text: text if text[:4] == "ddim" and text[4:].isdecimal() else whole(1)(text)  # see `respace`
    class_list = lambda text: [whole(0)(part) for part in text.split(",")]
    add = parser.add_argument_group("what").add_argument
    add("--model", metavar="NAME", help="a model with weights of its own, like dit-xl; or which one --ckpt holds")
    add("--ckpt", metavar="FILE|URL", help=f"a checkpoint (default without --model: {STUDENT})")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or raw, if it has both (default: ema)")
    add("--num-images", type=whole(1), default=1000, metavar="N", help="FID-50K needs 50000 (default: 1000)")
    add("--classes", type=class_list, metavar="I,J,...", help="only these (default: all, in turn)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the noise (default: 0)")
    add = parser.add_argument_group("sampling (default: the model's own settings)").add_argument
    add("--sampler", choices=SAMPLERS, metavar="NAME", help=", ".join(SAMPLERS))
    add("--steps", type=spacing, metavar="N|ddimN", help="steps, rounds of mar; ddpm, ddim: ddimN has a fixed stride")
    add("--guidance", type=real(0), metavar="SCALE", help="classifier-free guidance; 1 is none")
    add("--guidance-channels", type=whole(1), metavar="C", help="all but mar: latent channels that are guided")
    add("--guidance-schedule", choices=["linear", "constant"], help="mar: over the rounds")
    add("--diffusion-form", choices=DIFFUSION_FORMS, help="sde: how much noise when")
    add("--last-step", choices=["mean", "tweedie", "euler", "none"], help="sde: the step without noise")
    add("--last-step-size", type=real(0, 0.99, open_low=True), metavar="T", help="sde: its length in time")
    add("--temperature", type=real(0), metavar="T", help="mar: scale of the noise")
    add("--token-steps", type=spacing, metavar="N|ddimN", help="mar: diffusion steps per token")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("out/sample"), metavar="DIR", help="default: out/sample")
    add("--vae", choices=VAES, help="the decoder (default: the model's own)")
    add("--vae-ckpt", metavar="FILE|URL", help="its weights (default: the table's)")
    add("--export", type=Path, metavar="FILE", help="write the weights to a .safetensors or .pt file, and stop")
    add("--export-dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: float32")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=whole(1), default=256, metavar="N", help="images at a time per rank (default: 256)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    add("--dtype", choices=["float32", "bfloat16", "auto"], default="float32", help="default: float32, exact")
    add("--compile", action="store_true", help="compile the network first: a minute or two, for faster steps")
    return parser.parse_args()

def settings_of(args, net, name: str) -> dict:
    """The model's own settings with those of the command line. Refuses what does not apply to this model."""
    own = MODELS[name]["sampling"]
    given = {k: v for k, v in vars(args).items() if v is not None and any(k in m["sampling"] for m in MODELS.values())}
    settings = own | given
    samplers = [k for k, function in SAMPLERS.items() if function is SAMPLERS[own["sampler"]]]
    takes = f"{name} takes {', '.join(f'--{k}' for k in own)}; samplers {', '.join(samplers)}".replace("_", "-")
    for k, v in given.items():
        strided = k == "steps" and isinstance(v, str) and "ddim" not in samplers
        if k not in own or (k == "sampler" and v not in samplers) or strided:
            raise UserError(f"--{k.replace('_', '-')} {v} does not apply: {takes}")
    if settings.get("guidance_channels", 1) > net.channels:
        raise UserError(f"--guidance-channels {args.guidance_channels}: {name} has {net.channels}; give no more")
    if args.compile and settings["sampler"] == "mar":
        raise UserError("--compile does not apply to mar, whose rounds differ in shape; leave it out")
    return settings

def main():
    """Load, sample this rank's share of the images, and on rank 0 join the shares."""
    args = parse_arguments()
    device = start_ranks(args.device)
    dtype = choose_dtype(args.dtype, device)
    net, config = load_model(args.model, args.ckpt or (None if args.model else STUDENT), device, args.weights)
    if args.export:
        return rank() == 0 and export(args.export, net, config, getattr(torch, args.export_dtype))
    name, settings = config["name"], settings_of(args, net, config["name"])
    classes = np.array(args.classes or range(net.classes))
    if classes.max() >= net.classes:
        raise UserError(f"--classes {classes.max()}: {name} has classes 0 to {net.classes - 1}; give some of them")
    vae = load_vae(args.vae or MODELS[name]["vae"], args.vae_ckpt, device, dtype)
    if vae.config["latent"] != net.channels:
        raise UserError(f"--vae {args.vae} has {vae.config['latent']} channels, {name} {net.channels}; leave it out")
    facts = dict(device=device.type, dtype=str(dtype)[6:], model=name, depth=sum(net.depths()),
                 parameters=sum(p.numel() for p in net.parameters()), num=args.num_images, seed=args.seed,
                 ranks=world_size(), **settings)
    if rank() == 0:
        print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
    torch.backends.cuda.matmul.allow_tf32 = True  # as the DiT release samples; no effect on the CPU
    cast_frozen(net.requires_grad_(False), dtype)
    if args.compile:
        torch._inductor.config.freezing = True  # the weights are constants, laid out for the kernels that read them
        net = torch.compile(net, dynamic=False)

    part, started, total = args.out / PART.format(rank()), time.time(), args.num_images
    atomic_write(part, Path.touch)  # a folder that cannot be written is noticed before the work
    first, last = (total * r // world_size() for r in (rank(), rank() + 1))  # equal shares: nobody waits long
    batch = min(args.batch_size, -(-total // world_size()))
    labels = classes[np.arange(total + batch) % len(classes)]
    progress = Progress("sample", last - first, "images")
    with open(part, "wb") as f:
        for start in range(first, last, batch):
            n = min(batch, last - start)
            y = labels[start : start + (batch if args.compile else n)]  # any other shape would be compiled anew
            on_step = lambda step, of: progress.update(round(start - first + n * step / of, 1))
            images = sample_images(net, vae, y, start, settings, args.seed, device, dtype, on_step)
            f.write(images[:n].tobytes())
    barrier()  # all ranks have closed their files: any machine can read them now
    if rank() == 0:
        join_parts(args.out, labels[:total], net.input_size * vae.factor)
        facts["images_per_s"] = round(total / (time.time() - started), 2)
        (args.out / "samples.json").write_text(json.dumps(facts) + "\n")
        print(f"{total} images, {facts['images_per_s']} images/s; wrote {args.out}/samples.npz and grid.png")

if __name__ == "__main__":
    run_main(main)
