"""Draws images from a network: a PNG grid to look at, and an .npz file to measure with fid.py.

    python sample.py                                                      # digits from out/distill/student.pt
    torchrun --nproc_per_node=8 sample.py --model dit-xl --num-images 50000 --out out/xl
    python sample.py --ckpt out/distill/student.pt --export student.safetensors
    python sample.py --model dit-xl --classes 207 360 --guidance 4        # golden retrievers and otters

In a notebook:

    net, config = load_model("dit-tiny")
    images = sample_images(net, [3, 1, 4], seed=0)     # uint8 (3, 32, 32, 3), with the model's own sampler

Image i has class i modulo the number of classes, and its noise comes from block i // 16 of the seed's stream. So it is
the same image, up to rounding, on any number of ranks and in any batch size. The folder --out, which all ranks must
see, receives samples.npz (arr_0: uint8 (N, H, W, 3), arr_1: labels (N,)), samples.json (settings, images/s), grid.png.

By default --sampler, --steps, --guidance, --temperature and --token-steps are the model's own (model.py: MODELS).
"""
# Read: guidance; the Gaussian process (DDPM, DDIM); the interpolant (SiT's SDE and ODE); masked tokens (MAR); the run.

import argparse
import functools
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.integrate import solve_ivp

from extract_latents import VAES, decode_images, load_vae
from model import (
    MODELS, GaussianDiffusion, Progress, RowGenerator, UserError, at, autocast, barrier, cast_frozen,
    choose_dtype, device_of, gather_tokens, load_model, rank, run_main, save_checkpoint, start_ranks, world_size,
    write_safetensors)

PART = ".samples-{}.tmp"  # the images of one rank
STUDENT = "out/distill/student.pt"  # what distill.py writes, and what is drawn from by default


# ---------------------------------------------------------------------------------------------------------------------
# Guidance, which all samplers use. N: samples, C: channels of x. x is (N, C, ...), a time t is (N,).


def guide(out, scale, channels):
    """Classifier-free guidance (Ho & Salimans 2022): away from the prediction without a label.

    out (2N, ...): the network's outputs with the labels, then those without. Only the first `channels` channels are
    guided. DiT and SiT guide 3 of 4 latent channels, as their releases do. The fourth, and the variances, stay as
    predicted with the label."""
    cond, uncond = out.float().chunk(2)  # samplers compute in float32, whatever the network does
    mixed = uncond + scale * (cond - uncond)  # a scale of 1 gives `cond`, of 0 `uncond`
    return torch.cat([mixed[:, :channels], cond[:, channels:]], dim=1)


def labels_for_guidance(y, classes, scale):
    """Labels y (B,) -> (2B,): the labels, then as many times `classes`, the index that stands for no label."""
    if scale == 1:  # no guidance: (B,)
        return y
    return torch.cat([y, torch.full_like(y, classes)])


def guided(net, condition, scale, channels):
    """net(x, t, condition) with guidance, as a function of x and t alone.

    condition: labels, or MAR's conditions z. With guidance it has 2N rows, of which the second half has no label."""
    def predict(x, t):
        if scale == 1:
            return net(x, t, condition).float()
        # One call for both halves, which have the same x.
        out = net(torch.cat([x, x]), torch.cat([t, t]), condition)
        return guide(out, scale, channels)

    return predict


# ---------------------------------------------------------------------------------------------------------------------
# The Gaussian process of model.py, backwards: x_0 is data, x_t has more noise the larger t is. The network's output
# `out` is (N, 2C, ...): the predicted noise, and a number between the bounds of the variance.


def ancestral_step(process, out, x, t, eps, temperature=1.0):
    """x_t -> x_{t-1} as in DDPM (Ho et al. 2020), algorithm 2. temperature: scale of the noise."""
    mean, log_variance, _ = process.p_mean_variance(out, x, t)
    std = (0.5 * log_variance).exp()
    last = (t == 0).view(-1, *[1] * (x.ndim - 1))  # (N, 1, ...)
    # The step to x_0 adds no noise.
    return torch.where(last, mean, mean + std * eps * temperature)


def ddim_step(process, out, x, t):
    """x_t -> x_{t-1} as in DDIM (Song et al. 2021), eq. 12 with sigma = 0: deterministic."""
    _, _, x_start = process.p_mean_variance(out, x, t)
    # The noise that leads from this x_0 to x_t: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, solved for eps.
    recip = at(process.sqrt_recip_alphas_cumprod, t, x)
    recipm1 = at(process.sqrt_recipm1_alphas_cumprod, t, x)
    eps = (recip * x - x_start) / recipm1
    # The same x_0 and the same noise, mixed as at the time before.
    previous = at(process.alphas_cumprod_prev, t, x)
    return x_start * previous.sqrt() + (1 - previous).sqrt() * eps


def sample_loop(process, predict, draw_eps, sampler="ddpm", temperature=1.0):
    """From noise at the last step to x_0. predict(x, t) -> out; draw_eps() -> noise of x's shape."""
    x = draw_eps()
    for i in reversed(range(process.steps)):
        t = torch.full((len(x),), i, device=x.device)
        # The network knows the 1000 steps of training, of which the sampler visits some.
        out = predict(x, torch.full_like(t, process.timestep_map[i]))
        if sampler == "ddim":
            x = ddim_step(process, out, x, t)
        else:
            x = ancestral_step(process, out, x, t, draw_eps(), temperature)
    return x


def sample_gaussian(net, y, rng, sampler, steps, guidance, guidance_channels):
    """ddpm and ddim: labels y (B,) -> latents (B, C, H, W). rng: a RowGenerator of B rows.

    steps: 250 are spread evenly over the 1000 of training; "ddim50" is every 20th, as in the DDIM paper."""
    process = GaussianDiffusion("linear", str(steps), y.device)
    labels = labels_for_guidance(y, net.classes, guidance)
    predict = guided(net, labels, guidance, guidance_channels)

    def draw_eps():
        return rng.normal(net.channels, net.input_size, net.input_size)

    return sample_loop(process, predict, draw_eps, sampler)


# ---------------------------------------------------------------------------------------------------------------------
# The interpolant x_t = t x_1 + (1 - t) x_0 from noise x_0 to data x_1 (SiT, Ma et al. 2024). Its samplers follow an SDE
# or an ODE along the velocity(x, t) that the network predicts, from t = 0 to 1. Here x_0 is the noise.

DIFFUSION_FORMS = {  # w(t) of the reverse SDE: SiT, table 3, and its release
    "sigma": lambda t: 1 - t,
    "SBDM": lambda t: (1 - t) ** 2 / t + (1 - t),
    "constant": lambda t: torch.ones_like(t),
    "linear": lambda t: 1 - t,
    "decreasing": lambda t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t: torch.sin(math.pi * t) ** 2,
}


def score_of(velocity, x, t):
    """The score, the gradient of log p_t(x), from the velocity v = E[x_1 - x_0 | x_t = x]."""
    # x - t v is the expected noise x_0, and the score is -x_0 / (1 - t). The denominator below is 1 - t too: it is
    # written as in the release, to round as there.
    return (t * velocity - x) / ((1 - t) ** 2 + t * (1 - t))


def integrate_sde(velocity, x, steps, draw_eps, method="euler", diffusion_form="sigma", last_step="mean",
                  last_step_size=0.04):
    """The reverse SDE dx = (v + w score) dt + sqrt(2 w) dW from t = 0 (noise) to 1, by Euler-Maruyama or Heun.

    `steps` grid points end at 1 - last_step_size. The last step has no noise and does the rest: "mean" follows the
    SDE's drift, "euler" the velocity, "tweedie" takes the posterior mean; "none" leaves it out."""
    weight = DIFFUSION_FORMS[diffusion_form]
    start = 1e-3 if diffusion_form == "SBDM" else 0.0  # w of SBDM is infinite at 0
    if last_step == "none":
        # Heun looks ahead to the last grid point, and at t = 1 the score is infinite.
        last_step_size = 1e-3 if method == "heun" else 0.0
    grid = torch.linspace(start, 1 - last_step_size, steps, device=x.device)
    dt = grid[1] - grid[0]

    def drift(x, t):
        v = velocity(x, t.expand(len(x)))  # one call gives v and the score; the release calls the network twice
        return v + weight(t) * score_of(v, x, t)

    for t in grid[:-1]:
        noise = (2 * weight(t)).sqrt() * draw_eps() * dt.sqrt()  # the variance of dW is dt
        if method == "heun":
            # The noise first, then the mean of two slopes: here, and where an Euler step would lead.
            x = x + noise
            slope = drift(x, t)
            slope_ahead = drift(x + dt * slope, t + dt)
            x = x + 0.5 * dt * (slope + slope_ahead)
        else:
            x = x + drift(x, t) * dt + noise

    t = grid[-1]  # 1 - last_step_size
    if last_step == "none":
        return x
    if last_step == "mean":
        return x + drift(x, t) * last_step_size
    v = velocity(x, t.expand(len(x)))
    if last_step == "euler":
        return x + v * last_step_size
    return x / t + (1 - t) ** 2 / t * score_of(v, x, t)  # Tweedie's formula: E[x_1 | x_t]


def integrate_ode(velocity, x, steps, method, atol=1e-6, rtol=1e-3):
    """dx/dt = velocity(x, t) from t = 0 to 1: Euler or Heun on `steps` grid points, or dopri5, which places its own."""
    if method == "dopri5":
        return integrate_dopri5(velocity, x, atol, rtol)
    # Rounded from float64, so that the points are the same on all devices.
    grid = torch.linspace(0, 1, steps, dtype=torch.float64).float().to(x.device)
    for t, t_next in zip(grid, grid[1:]):
        dt = t_next - t
        slope = velocity(x, t.expand(len(x)))
        if method == "heun":
            slope_ahead = velocity(x + dt * slope, t_next.expand(len(x)))
            slope = (slope + slope_ahead) / 2
        x = x + dt * slope
    return x


def integrate_dopri5(velocity, x, atol, rtol):
    """The pair of Dormand & Prince with step-size control: scipy's RK45, where the release takes torchdiffeq's.

    The two place their steps differently, and so differ: on the reference case ours ends 3.4e-5 from the exact
    solution, the release's 3.5e-4. All images of a batch share their steps, so an image depends on the others in
    its batch, to within the tolerances. scipy holds the state on the CPU: from a GPU it travels at each call."""
    def slope(t, state):  # scipy's state: float64, all values in a row
        x_t = torch.from_numpy(state).to(x).view_as(x)
        v = velocity(x_t, torch.full((len(x),), t, device=x.device))
        if not v.isfinite().all():  # scipy would answer with ever smaller steps
            raise UserError(f"the network's output at t = {t:.3f} is not finite; take weights from before it diverged")
        return v.flatten().cpu().numpy()

    start = x.double().flatten().cpu().numpy()
    states = solve_ivp(slope, (0, 1), start, method="RK45", atol=atol, rtol=rtol).y  # (values, times)
    return torch.from_numpy(states[:, -1]).to(x).view_as(x)


def sample_interpolant(net, y, rng, sampler, steps, guidance, guidance_channels, **sde):
    """sde-euler, sde-heun, ode-euler, ode-heun, ode-dopri5: labels y (B,) -> latents (B, C, H, W).

    steps: grid points, both ends included. sde: the last arguments of integrate_sde, which an ODE ignores."""
    if not isinstance(steps, int) or steps < 2:
        raise UserError(f"--steps {steps} is no number of grid points; give 2 or more")
    labels = labels_for_guidance(y, net.classes, guidance)
    velocity = guided(net, labels, guidance, guidance_channels)

    def draw_eps():
        return rng.normal(net.channels, net.input_size, net.input_size)

    kind, method = sampler.split("-")
    if kind == "sde":
        return integrate_sde(velocity, draw_eps(), steps, draw_eps, method, **sde)
    return integrate_ode(velocity, draw_eps(), steps, method)


# ---------------------------------------------------------------------------------------------------------------------
# Masked tokens (MAR, Li et al. 2024): each round fills in some of the hidden tokens, by a small diffusion for each.
# B: images, T: tokens of an image, K: known ones, n: new ones in this round, C: values of a token.


def mar_schedule(tokens, rounds):
    """How many tokens are hidden when each round starts, then 0: a cosine, and at least one token a round.

    With more rounds than tokens, those that are left over have nothing to do and are not in the schedule."""
    schedule = [tokens]  # the first round sees nothing but the label
    for step in range(1, rounds):
        remain = math.floor(tokens * math.cos(math.pi / 2 * step / rounds))
        remain = min(remain, schedule[-1] - 1)
        if schedule[-1] > 1:
            schedule.append(max(remain, 1))
    return schedule + [0]


def sample_tokens(net, y, rng, sampler, steps, guidance, guidance_schedule, temperature, token_steps):
    """mar: labels y (B,) -> latents (B, C, H, W). steps: rounds; token_steps: diffusion steps per token."""
    process = GaussianDiffusion("cosine", str(token_steps), y.device)
    order = rng.uniform(net.tokens).argsort(dim=1)  # (B, T): each image fills in its tokens in an order of its own
    tokens = torch.zeros(len(y), net.tokens, net.token_dim, device=y.device)
    schedule = mar_schedule(net.tokens, steps)
    # A round starts with `hidden` tokens of each image hidden, and leaves `remain` of them.
    for hidden, remain in zip(schedule, schedule[1:]):
        n = hidden - remain
        known = order[:, hidden:].sort(dim=1).values  # (B, K)
        new = order[:, remain:hidden].sort(dim=1).values  # (B, n)

        # The guidance grows with the share of tokens that are known after this round, or is "constant".
        scale = guidance
        if guidance_schedule == "linear":
            scale = 1 + (guidance - 1) * (net.tokens - max(remain, 1)) / net.tokens

        # The transformer makes a condition z for each token. With guidance it makes two, with the label and without.
        labels = labels_for_guidance(y, net.classes, scale)
        copies = 1 if scale == 1 else 2
        known = known.repeat(copies, 1)
        encoded = net.encode(tokens.repeat(copies, 1, 1), labels, known)
        z = net.decode(encoded, known)  # (copies B, T, D)
        z = gather_tokens(z, new.repeat(copies, 1)).flatten(0, 1)  # (copies B n, D)
        predict = guided(net.diffloss.net, z, scale, net.token_dim)

        def draw_eps():
            return rng.normal(n, net.token_dim).flatten(0, 1)  # (B n, C)

        # To the small diffusion each new token is a sample.
        x = sample_loop(process, predict, draw_eps, temperature=temperature).view(len(y), n, -1)
        tokens = tokens.scatter(1, new[..., None].expand_as(x), x)
    return net.unpatchify(tokens)


# A sampler is a function (net, y, rng, **settings) -> latents. A model's own settings stand in its entry of MODELS.
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
# The run: from labels to images, files, flags, and what happens in order.

load_vae_once = functools.cache(load_vae)  # the same VAE for the same arguments


@torch.inference_mode()
def sample_images(net, labels, seed=0, first=0, vae=None, dtype=torch.float32, **settings):
    """Images first, first + 1, ... of the seed's stream, of classes labels (B,), in one batch -> uint8 (B, H, W, 3).

    settings: the sampler's arguments, where they differ from the model's own; like steps=50, guidance=4.0."""
    entry = MODELS[net.name]
    settings = entry["sampling"] | settings
    device = device_of(net)
    y = torch.as_tensor(labels, device=device)
    rng = RowGenerator((seed,), first, first + len(y), 16, device)  # 16 images share a generator of noise
    with autocast(device, dtype):
        z = SAMPLERS[settings["sampler"]](net, y, rng, **settings)
    if vae is None:
        vae = load_vae_once(entry["vae"], None, device)
    return decode_images(vae, z)


def join_parts(out, labels, size):
    """Rank 0: the files of all ranks -> samples.npz and grid.png.

    50,000 images of 256x256 are 10 GB, so they are mapped and never in memory at once."""
    paths = [out / PART.format(r) for r in range(world_size())]
    with open(paths[0], "ab") as joined:
        for path in paths[1:]:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, joined)
    images = np.memmap(paths[0], np.uint8, "r", shape=(len(labels), size, size, 3))
    # A samples.npz is whole, or not there.
    temporary = out / ".samples.npz"
    np.savez(temporary, arr_0=images, arr_1=labels)  # not compressed, so that fid.py can map it
    temporary.replace(out / "samples.npz")
    make_grid(images, labels).save(out / "grid.png")
    for path in out.glob(PART.format("*")):
        path.unlink()


def make_grid(images, labels):
    """10 images of each of the first 10 classes, one row per class. Small images are enlarged."""
    classes = np.unique(labels)[:10]
    columns = min(10, np.bincount(labels).max())
    size = images.shape[1]
    cell = size + 2  # with white lines between
    grid = Image.new("RGB", (columns * cell + 2, len(classes) * cell + 2), "white")
    for row, c in enumerate(classes):
        for column, i in enumerate(np.flatnonzero(labels == c)[:10]):
            corner = (column * cell + 2, row * cell + 2)
            grid.paste(Image.fromarray(images[i]), corner)
    return ImageOps.scale(grid, max(1, 64 // size), Image.NEAREST)


def export(path, net, config, dtype):
    """The weights alone, for other people's code: .safetensors, or a checkpoint of ours (.pt)."""
    state = {key: v.to("cpu", dtype) for key, v in net.state_dict().items()}
    if path.suffix == ".safetensors":
        write_safetensors(path, state, config)
    elif path.suffix == ".pt":
        # The DiT release's scripts look for `ema`. torch.save stores a tensor once, also where two names have it.
        save_checkpoint(path, model=state, ema=state, config=config, step=0)
    else:
        raise UserError(f"--export {path}: give a file that ends in .safetensors or .pt")
    print(f"wrote {path}")


def parse_arguments(argv):
    """The command line. Settings that are None are the model's own."""
    def step_count(text):
        return text if text.startswith("ddim") else int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="draw from its official or bundled weights; or what --ckpt holds, where the file does not say")
    add("--ckpt", help=f"a checkpoint (default without --model: {STUDENT})")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged (ema) or raw (model) ones (default: ema)")
    add("--num-images", type=int, default=1000, help="how many; FID-50K needs 50000 (default: 1000)")
    add("--classes", nargs="+", help="only these, numbers or names, in turn (default: all that it was trained on)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--sampler", choices=SAMPLERS, help="one of the model's family")
    add("--steps", type=step_count, help="grid points of sde, ode; rounds of mar; ddpm, ddim: also ddim50, every 20th")
    add("--guidance", type=float, help="scale of the classifier-free guidance; 1 is none")
    add("--temperature", type=float, help="mar: scale of the noise")
    add("--token-steps", type=step_count, help="mar: diffusion steps per token, also ddim25")
    add("--out", type=Path, default=Path("out/sample"), help="a folder (default: out/sample)")
    add("--vae", choices=VAES, help="the decoder (default: the model's own)")
    add("--vae-ckpt", help="the VAE's weights (default: the bundled or official ones)")
    add("--export", type=Path, help="write the weights to this .safetensors or .pt file, in --dtype, and stop")
    add("--batch-size", type=int, default=256, help="images at a time per rank (default: 256)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", choices=["float32", "bfloat16", "float16", "auto"], default="float32", help="default: float32")
    return parser.parse_args(argv)


def settings_of(args, name):
    """The model's own settings, and over them those of the command line."""
    own = MODELS[name]["sampling"]
    settings = dict(own)
    for key in ("sampler", "steps", "guidance", "temperature", "token_steps"):
        value = getattr(args, key)
        if value is None:
            continue
        if key not in own:
            raise UserError(f"--{key.replace('_', '-')} does not apply to {name}; leave it out")
        settings[key] = value
    if SAMPLERS[settings["sampler"]] is not SAMPLERS[own["sampler"]]:
        raise UserError(f"--sampler {args.sampler} is not for {name}; give {own['sampler']} or another of its family")
    return settings


def choose_classes(words, config, net):
    """The classes to draw, as numbers, from numbers or names; by default all that the network was trained on."""
    names = config.get("classes", {})  # of those classes; the keys are numbers, in a .safetensors file as strings
    if not words:
        return [int(i) for i in names or range(net.classes)]
    numbers = {str(i): i for i in range(net.classes)}
    numbers |= {name: int(i) for i, name in names.items()}
    for word in words:
        if word not in numbers:
            raise UserError(f"--classes {word}: give numbers up to {net.classes - 1}, or names, if the file has them")
    return [numbers[word] for word in words]


def main(argv=None):
    """Load, sample this rank's share of the images, and on rank 0 join the shares."""
    args = parse_arguments(argv)
    if not args.model and not args.ckpt:
        args.ckpt = STUDENT
    device = start_ranks(args.device)
    dtype = choose_dtype(args.dtype, device)
    net, config = load_model(args.model, args.ckpt, device, args.weights)
    if args.export:
        if rank() == 0:
            export(args.export, net, config, dtype)
        return
    settings = settings_of(args, net.name)
    classes = choose_classes(args.classes, config, net)
    vae = load_vae(args.vae or MODELS[net.name]["vae"], args.vae_ckpt, device, dtype)
    vae.scale = config.get("scale", vae.scale)  # that of the latents it was trained on

    torch.backends.cuda.matmul.allow_tf32 = True  # as the DiT release samples
    cast_frozen(net.requires_grad_(False), dtype)

    # This rank's share goes to a file of its own: machines that write into one file can lose parts of it.
    started = time.time()
    total = args.num_images
    labels = np.resize(classes, total)  # 0, 1, ..., 9, 0, 1, ...
    first = total * rank() // world_size()
    last = total * (rank() + 1) // world_size()
    progress = Progress(f"{net.name}, {settings['sampler']}:", last - first, "images")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / PART.format(rank()), "wb") as f:
        for start in range(first, last, args.batch_size):
            stop = min(start + args.batch_size, last)
            images = sample_images(net, labels[start:stop], args.seed, start, vae, dtype, **settings)
            f.write(images.tobytes())
            progress.update(stop - first)
    barrier()  # now all files are closed, and rank 0 can read them
    if rank() == 0:
        join_parts(args.out, labels, net.input_size * vae.factor)
        facts = dict(
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            model=net.name,
            depth=sum(net.depths()),
            parameters=sum(p.numel() for p in net.parameters()),
            num=total,
            seed=args.seed,
            ranks=world_size(),
            **settings,
            images_per_s=round(total / (time.time() - started), 2),
        )
        (args.out / "samples.json").write_text(json.dumps(facts) + "\n")
        print(f"{total} images, {facts['images_per_s']} images/s; wrote {args.out}/samples.npz and grid.png")


if __name__ == "__main__":
    run_main(main)
