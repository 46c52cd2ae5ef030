"""Trains the shallow network: masked knowledge distillation from the deep one (default), or any simpler way, for comparison.

    python distill.py                                                  # digits: out/prune/shallow.pt taught by dit-tiny
    torchrun --nproc_per_node=8 distill.py --student out/prune/shallow.pt --teacher dit-xl --latents out/latents
    python distill.py --mode scratch --model dit-tiny --steps 9000     # how the bundled teachers were made

The loss is eq. 8 of the paper, L = a_KD L_KD + a_Diff L_Diff + b L_Rep:

    L_Diff   the family's own training loss                            (model.py: objective.loss)
    L_KD     the student's output should be the teacher's              (model.py: objective.kd)
    L_Rep    its hidden states too, except for massive activations     (here: masked_representation_loss)

Modes: masked-kd (all three), kd (L_Rep without the mask), output-kd (no L_Rep), finetune (L_Diff alone), scratch (L_Diff
alone, from fresh weights). Writes to --out: student.pt, log.jsonl, loss.png, and step-*.pt to resume from.

The training loop (`train`) is the one that prune.py uses too. What step k draws depends on (seed, k) alone, so a run
that was killed and resumed, or that goes on with another number of ranks, repeats the same draws.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from extract_latents import Latents, epoch_order, on_rank_0
from model import (MODELS, Progress, RowNoise, barrier, build_model, end_ranks, fail, load_model, load_state, locate, mix, rank, read_state, read_torch,
                   save_checkpoint, start_ranks, world_size, write_whole)

# ---------------------------------------------------------------------------------------------------------------------
# Data: which rows, and which randomness, belong to step k.


class Batches:
    """batches(step, micro) -> latents x (b, C, H, W), labels y (b,), noise: this rank's part of the global batch of `step`.

    The global batch is cut into world_size * accumulate parts, equal to within one row. Rows and noise follow from (seed, step)
    and the place in the global batch, so they are the same for any number of ranks and any accumulation.
    """

    def __init__(self, latents, batch_size, accumulate, seed, device):
        self.parts = world_size() * accumulate
        if batch_size < self.parts:
            fail(f"--batch-size {batch_size} is too small for {world_size()} ranks x {accumulate} accumulation steps")
        if batch_size > len(latents):
            fail(f"--batch-size {batch_size} is larger than the data set of {len(latents)} images")
        self.latents, self.batch_size, self.accumulate, self.seed, self.device = latents, batch_size, accumulate, seed, device
        self.steps_per_epoch = len(latents) // batch_size
        self.epoch, self.order = None, None

    def __call__(self, step: int, micro: int = 0):
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(len(self.latents), self.seed, epoch)
        part = rank() * self.accumulate + micro
        start, stop = (self.batch_size * p // self.parts for p in (part, part + 1))
        rows = self.order[index * self.batch_size :][start:stop]
        noise = RowNoise((self.seed, step), start, stop, self.batch_size, self.device)
        x, y = self.latents.batch(rows, noise, self.device)
        return x, y, noise


def check_fit(net, latents, directory):
    """Latents of another autoencoder, or of more classes, than the network was made for end the program."""
    shape = (net.channels, net.input_size, net.input_size)
    if tuple(latents.shape) != shape:
        fail(f"{directory} holds latents of shape {tuple(latents.shape)}, the network takes {shape}; extract with its own --vae")
    if latents.classes > net.classes:
        fail(f"{directory} has {latents.classes} classes, the network knows {net.classes}")


# ---------------------------------------------------------------------------------------------------------------------
# The loop that prune.py and distill.py share.


def add_training_arguments(parser):
    """The flags that prune.py and distill.py share. None: the default follows the data (digits or ImageNet)."""
    parser.add_argument("--latents", default="out/latents", metavar="DIR", help="folder written by extract_latents.py (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="global batch, shared out over ranks and accumulation steps")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps of the whole run")
    parser.add_argument("--epochs", type=float, metavar="N", help="the same in passes over the data")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="split each rank's batch in N, to save memory (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the forward pass; auto: bfloat16 on CUDA, float32 on CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile every block (slow first step, faster after)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass: less memory, a third more work")
    parser.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="between lines of log.jsonl (default: %(default)s)")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="between step-*.pt checkpoints")
    parser.add_argument("--keep", type=int, default=2, metavar="K", help="newest step-*.pt to keep (default: %(default)s)")
    parser.add_argument("--resume", metavar="auto|never|FILE", help="continue: auto takes the newest step-*.pt of --out, if there is one; never starts anew over an unfinished run")


def fill_defaults(args, recipe: dict, steps_per_epoch):
    """Puts the recipe's values where the user gave none, and turns epochs into steps."""
    for key, least in dict(batch_size=1, accumulate=1, log_every=1, save_every=1, keep=1, lora_rank=1, seed=0, steps=1).items():
        if getattr(args, key, None) is not None and getattr(args, key) < least:
            fail(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least {least}")
    if args.epochs is not None and (args.epochs <= 0 or args.steps is not None):
        fail("give --steps or a positive --epochs, not both")
    length_given = args.steps is not None or args.epochs is not None
    for key, value in recipe.items():
        if getattr(args, key) is None and not (length_given and key in ("steps", "epochs")):
            setattr(args, key, value)
    if args.steps is None:
        args.steps = max(1, round(args.epochs * steps_per_epoch(args.batch_size)))


def average_gradients(parameters: list, bucket: int = 2**25):
    """Sums the ranks' gradients, in buckets of about 2^25 numbers: data parallelism in ten lines.

    Each rank's loss is already divided by the global batch, so the sum is the gradient of the global mean.
    """
    if world_size() == 1:
        return
    pending = []
    for i, p in enumerate(parameters):
        pending.append(p.grad)
        if sum(g.numel() for g in pending) >= bucket or i == len(parameters) - 1:
            flat = torch.cat([g.flatten() for g in pending])
            dist.all_reduce(flat)
            for g, piece in zip(pending, flat.split([g.numel() for g in pending])):
                g.copy_(piece.view_as(g))
            pending = []


FIXED = ("steps", "batch_size", "seed", "mode", "student", "teacher", "model", "ckpt", "depth", "lr", "lr_end", "warmup",
         "beta", "ema", "criterion", "scheme", "delta_w", "lora_rank")  # what a resumed run may not change


class Run:
    """A training run's folder, step counter, log, checkpoints, and its reaction to signals and to a diverging loss."""

    def __init__(self, args, device):
        self.args, self.device, self.out, self.step = args, device, Path(args.out), 0
        self.fixed = {k: v for k, v in vars(args).items() if k in FIXED}
        dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(args.dtype) or getattr(torch, args.dtype)
        self.autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.stop = False
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self.ask_to_stop)
        self.bad = torch.zeros((), device=device)  # steps in a row whose gradient was not finite
        self.sums, self.count = {}, 0
        self.saved = self.find_checkpoint()
        barrier()  # all have read what rank 0 may now delete
        if rank() == 0:
            self.open_log()
        barrier()

    def ask_to_stop(self, *_):
        self.stop = True

    def find_checkpoint(self):
        """The checkpoint that --resume asks for, or None. Rank 0 looks, so that all ranks take the same one.

        torchrun --max-restarts N means `auto`. (Its count of restarts is no guide: it stays as it is when a node joins.)
        """
        wish = self.args.resume
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            if wish not in (None, "auto"):
                fail(f"with --resume {wish}, each of torchrun's --max-restarts would start from there again; use --resume auto, or another --out")
            wish = "auto"
        if wish == "never":
            return None
        path = on_rank_0(self.newest) if wish in ("auto", None) else Path(wish)
        if path is None:
            return None
        saved = read_torch(path)
        if wish is None:
            if saved["step"] < (saved.get("args") or {}).get("steps", 0):
                fail(f"{self.out} holds a run that stopped at step {saved['step']} of {saved['args']['steps']}; add --resume auto to go on, or --resume never to start anew")
            return None
        then, now = saved.get("args") or {}, self.fixed
        changed = [k for k in now if now[k] != then.get(k)]
        if changed:
            k = changed[0]
            fail(f"{path} belongs to a run with --{k.replace('_', '-')} {then.get(k)}, not {now[k]}; repeat its flags, choose another --out, or start anew with --resume never")
        self.step = saved["step"]
        return saved

    def newest(self):
        """The newest step-*.pt that can be read; None if there is none at all."""
        paths = sorted(self.out.glob("step-[0-9]*.pt"), reverse=True)
        for path in paths:
            try:
                read_torch(path)
                return path
            except SystemExit:  # read_torch has said why
                print(f"{path} is passed over", file=sys.stderr)
        if paths:
            fail(f"no step-*.pt in {self.out} can be read; mend that, or choose another --out")

    def open_log(self):
        """A fresh run starts its folder anew; a resumed one drops the log lines that it will write again."""
        log = self.out / "log.jsonl"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lines = log.read_text().splitlines() if self.saved and log.exists() else []
        except OSError as e:
            fail(f"cannot write to {self.out}: {e.strerror}; choose another --out")
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]  # a kill may tear the last one
        write_whole(log, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))
        for old in self.out.glob("step-[0-9]*.pt"):
            if int(old.stem[5:]) > self.step:
                old.unlink()

    def log(self, step, extra):
        """Averages over steps and ranks since the last line. The one place that waits for the device."""
        names = list(self.sums)
        values = torch.stack([self.sums[k] for k in names]) / self.count
        if world_size() > 1:
            dist.all_reduce(values)
        line = dict(step=step, **dict(zip(names, values.tolist())), **extra)
        self.sums, self.count = {}, 0
        if rank() == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        if self.bad.item() >= 20:
            fail(f"the gradient was not finite for {int(self.bad.item())} steps in a row, up to step {step}; lower --lr or use --dtype float32")
        return line

    def agree_to_stop(self, step) -> bool:
        """Whether any rank was asked to stop. Ranks compare notes every tenth step, since that waits for the device."""
        if world_size() == 1:
            return self.stop
        if step % 10:
            return False
        flag = torch.tensor(float(self.stop), device=self.device)
        dist.all_reduce(flag)
        return flag.item() > 0

    def save(self, step, contents):
        """Rank 0 writes step-*.pt and deletes the oldest beyond --keep."""
        if rank() == 0:
            save_checkpoint(self.out / f"step-{step:08}.pt", **contents, step=step, args=self.fixed)
            for old in sorted(self.out.glob("step-[0-9]*.pt"))[: -self.args.keep]:
                old.unlink()
        barrier()


def train(run: Run, batches: Batches, optimizer, losses, contents, lr_factor=lambda step: 1.0, after_step=lambda step: None, note=lambda: {}):
    """Runs to args.steps, or until a signal: then it saves, says so, and ends the program.

    losses(x, y, noise, step) -> dict of per-sample tensors (b,); "loss" is minimised, the others are only logged.
    contents() -> what a checkpoint must hold beside the step. after_step(step) follows each update. note() is logged.
    The gradient is clipped to norm 1; a step whose gradient is not finite leaves weights and moments alone (AdamW's found_inf).
    """
    args, parameters = run.args, [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    base = [group["initial_lr"] for group in optimizer.param_groups]
    progress = Progress(run.out.name, args.steps, "steps", run.step)
    started, first = time.time(), run.step
    for step in range(run.step, args.steps):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * lr_factor(step)
        for micro in range(args.accumulate):
            torch.manual_seed(mix(args.seed, step, rank(), micro))  # network dropout, which only MAR has
            x, y, noise = batches(step, micro)
            with run.autocast():
                parts = losses(x, y, noise, step)
            (parts["loss"].sum() / args.batch_size).backward()
            for k, v in parts.items():
                run.sums[k] = run.sums.get(k, 0) + v.detach().float().sum() / args.batch_size
        average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        run.bad = (run.bad + 1) * optimizer.found_inf
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        after_step(step)
        run.sums["grad_norm"] = run.sums.get("grad_norm", 0) + norm / world_size()
        run.count += 1
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            rate = (done - first) * args.batch_size / (time.time() - started)
            line = run.log(done, dict(lr=optimizer.param_groups[0]["lr"], images_per_s=round(rate, 1), **note()))
            progress.update(done, f"loss {line['loss']:.4f}")
        stopping = run.agree_to_stop(done) and done < args.steps
        if stopping or done % args.save_every == 0 or done == args.steps:
            run.save(done, contents())
        if stopping:
            if rank() == 0:
                print(f"stopped by a signal at step {done} of {args.steps}; continue with --resume auto")
            end_ranks()
            raise SystemExit(0)


def adamw(groups: list):
    """AdamW without decay. groups: dicts of params and lr. Fused: one kernel, and it can skip a step that is not finite."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@torch.no_grad()
def ema_update(averages: list, values: list, decay: float, step: int):
    """averages <- decay * averages + (1 - decay) * values, decay warmed up as (1 + step) / (10 + step)."""
    torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + step) / (10 + step)))


def prepare(net, args):
    """Applies --compile and --checkpointing."""
    net.checkpointing = args.checkpointing
    if args.compile:
        for block in net.layers():
            block.compile()


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states: which layers are matched, and the masked loss between them.


def matched_layers(config: dict, depths: list) -> list:
    """Pairs (student layer, teacher layer) to match, from the config of a pruned network.

    A student layer that closes a share of its N:M group is matched to the teacher layer that closes the same share:
    1:2 gives (0, 1), (1, 3), ...; 2:4 gives (0, 1), (1, 3), ...; in 3:4 only the last of the three has a partner.
    """
    scheme = config.get("scheme")
    if not scheme or sum(n for n, _ in scheme) != sum(depths):
        fail("the student does not say from which N:M groups it was cut, so hidden states cannot be matched; use --mode output-kd")
    pairs, student, teacher = [], 0, 0
    for n, m in scheme:
        pairs += [(student + j - 1, teacher + j * m // n - 1) for j in range(1, n + 1) if j * m % n == 0]
        student, teacher = student + n, teacher + m
    return pairs


class HiddenStates:
    """Keeps the output (B, T, D) of chosen layers at each forward pass of `net`."""

    def __init__(self, net, layers: list):
        self.states = {}
        blocks = net.layers()
        for i in layers:
            blocks[i].register_forward_hook(lambda module, inputs, output, i=i: self.states.__setitem__(i, output))


def suppress_massive(h, k: float = 2.0):
    """Zeroes the elements of h (B, T, D) that lie k or more standard deviations from their sample's mean."""
    h = h.float()
    variance, mean = torch.var_mean(h, dim=(1, 2), keepdim=True)
    return torch.where((h - mean).abs() < k * variance.sqrt(), h, 0.0)


def masked_representation_loss(student: list, teacher: list, k: float = 2.0):
    """L_Rep: lists of hidden states (B, T, D) -> (B,). Each side masks its own massive activations. k = inf: no mask."""
    pairs = [(suppress_massive(s, k), suppress_massive(t, k)) for s, t in zip(student, teacher)]
    return torch.stack([(s - t).square().flatten(1).mean(1) for s, t in pairs]).mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# Distillation.

ALPHA_KD = 0.9  # table 6; L_Diff gets the rest


def make_losses(net, teacher, objective, pairs, args):
    """The loss of the chosen mode: a function for `train`."""
    hidden = [HiddenStates(net, [s for s, _ in pairs]), HiddenStates(teacher, [t for _, t in pairs])] if pairs else None
    k = 2.0 if args.mode == "masked-kd" else math.inf

    def losses(x, y, noise, step):
        """-> dict of (b,) tensors: the loss, and its parts for the log."""
        batch = objective.draw(x, y, noise)
        out = objective.predict(net, batch)
        diffusion = objective.loss(out, batch)
        if teacher is None:
            return dict(loss=diffusion)
        with torch.no_grad():
            out_teacher = objective.predict(teacher, batch)
        kd = objective.kd(out, out_teacher, batch)
        loss = ALPHA_KD * kd + (1 - ALPHA_KD) * diffusion  # eq. 8
        if not pairs:
            return dict(loss=loss, kd=kd, diffusion=diffusion)
        beta = args.beta * (1 - step / args.steps)
        rep = masked_representation_loss([hidden[0].states[s] for s, _ in pairs], [hidden[1].states[t] for _, t in pairs], k)
        return dict(loss=loss + beta * rep, kd=kd, diffusion=diffusion, rep=rep)

    return losses


def halving(step: int, steps: int, warmup: int, end: float) -> float:
    """Factor of the learning rate: from 1 to `end` (one half) on a cosine, after a linear warm-up."""
    return min(1.0, (step + 1) / max(warmup, 1)) * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def plot_loss(out: Path):
    """Draws log.jsonl as loss.png: each logged loss over the steps, logarithmic."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    names = [k for k in ("loss", "diffusion", "kd", "rep") if k in lines[-1]]
    colours = dict(loss="#222222", diffusion="#1f77b4", kd="#d62728", rep="#2ca02c")
    W, H, left, right, top, bottom = 900, 480, 80, 20, 40, 50
    image = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(image)
    values = np.array([[max(line[k], 1e-12) for k in names] for line in lines], float)
    values = np.where(np.isfinite(values), values, 1.0)
    low, high = np.log10(values.min()) - 0.03, np.log10(values.max()) + 0.03
    xs = [left + (W - left - right) * line["step"] / lines[-1]["step"] for line in lines]
    y_of = lambda v: top + (H - top - bottom) * (high - np.log10(v)) / (high - low)
    ticks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in ((1, 2, 5) if high - low < 2 else (1,))]
    if sum(low <= math.log10(v) <= high for v in ticks) < 2:
        ticks = np.linspace(10**low, 10**high, 5)
    for v in ticks:
        if low <= math.log10(v) <= high:
            draw.line([(left, y_of(v)), (W - right, y_of(v))], fill="#dddddd")
            draw.text((left - 8, y_of(v)), f"{v:.3g}", fill="black", anchor="rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        draw.text((left + (W - left - right) * share, H - bottom + 8), f"{share * lines[-1]['step']:.0f}", fill="black", anchor="ma")
    draw.text((W / 2, H - 18), "step", fill="black", anchor="ma")
    for j, name in enumerate(names):
        points = list(zip(xs, [y_of(v) for v in values[:, j]]))
        draw.line(points if len(points) > 1 else points * 2, fill=colours[name], width=2)
        draw.line([(left + 150 * j, 20), (left + 150 * j + 20, 20)], fill=colours[name], width=3)
        draw.text((left + 150 * j + 26, 20), f"{name} {values[-1, j]:.4g}", fill=colours[name], anchor="lm")
    image.save(out / "loss.png")


def parse_arguments():
    """The command line; what is None follows the data (digits or ImageNet), see `main`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["masked-kd", "kd", "output-kd", "finetune", "scratch"], default="masked-kd", help="what the student learns from (default: %(default)s)")
    parser.add_argument("--student", default="out/prune/shallow.pt", metavar="FILE", help="written by prune.py (default: %(default)s); unused in mode scratch")
    parser.add_argument("--teacher", metavar="NAME|FILE|none", help="default: the network that the student was cut from")
    parser.add_argument("--model", metavar="NAME", help="mode scratch: which network (default: dit-tiny)")
    parser.add_argument("--depth", type=int, metavar="N", help="mode scratch: with another number of blocks")
    parser.add_argument("--out", default="out/distill", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--lr", type=float, help="learning rate (default: 2e-4; digits 1e-3)")
    parser.add_argument("--lr-end", type=float, default=0.5, metavar="SHARE", help="of --lr that is left at the end (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=0, metavar="STEPS", help="linear warm-up of the learning rate (default: %(default)s)")
    parser.add_argument("--beta", type=float, help="weight of L_Rep at the start, gliding to 0 (default: 1e-2; SiT 2e-4)")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="of the averaged weights (default: 0.9999; digits 0.999)")
    add_training_arguments(parser)
    return parser.parse_args()


def load_student(args, device):
    """-> network in training mode, its config."""
    if args.mode != "scratch":
        net, config = load_model(ckpt=args.student, device=device, weights="model")
        return net.train(), config
    torch.manual_seed(mix(args.seed, 1))
    net = build_model(args.model or "dit-tiny", args.depth).to(device)
    return net.train(), dict(name=args.model or "dit-tiny", depth=net.depths())


def load_teacher(args, config, device):
    """The frozen teacher, or None in the modes that have none."""
    if args.mode in ("finetune", "scratch") or args.teacher == "none":
        return None
    source = args.teacher or config.get("parent") or fail("the student does not say what it was cut from; add --teacher NAME|FILE")
    if source in MODELS:
        net, _ = load_model(source, device=device)
    else:  # a file of ours names its model; an official one has the student's
        net, _ = load_model(config["name"] if read_state(locate(source))[1] is None else None, source, device)
    prepare(net, args)
    return net.requires_grad_(False)


def main():
    """Load student and teacher, resume if asked, train, write student.pt and loss.png."""
    args = parse_arguments()
    if args.mode != "scratch" and (args.model or args.depth):
        fail("--model and --depth say what --mode scratch starts from; in the other modes give --student FILE")
    device = start_ranks(args.device)
    net, config = load_student(args, device)
    objective = net.objective()
    latents = Latents(args.latents)
    check_fit(net, latents, args.latents)
    small = config["name"].endswith("tiny")
    recipe = dict(batch_size=64, lr=1e-3, ema=0.999, save_every=250, steps=800) if small else dict(batch_size=256, lr=2e-4, ema=0.9999, save_every=5000, epochs=objective.epochs)
    fill_defaults(args, recipe | dict(beta=objective.beta_rep), lambda batch: len(latents) / batch)
    batches = Batches(latents, args.batch_size, args.accumulate, args.seed, device)
    teacher = load_teacher(args, config, device)
    if teacher is None and args.mode in ("masked-kd", "kd", "output-kd"):
        args.mode = "finetune"
    pairs = matched_layers(config, net.depths()) if args.mode in ("masked-kd", "kd") else []
    if teacher and (type(teacher), teacher.channels, teacher.classes, teacher.input_size) != (type(net), net.channels, net.classes, net.input_size):
        fail(f"the teacher is another kind of network than the student; give one of the family and image size of {config['name']}")
    if pairs and sum(teacher.depths()) != pairs[-1][1] + 1:
        fail(f"the teacher has {sum(teacher.depths())} layers, the student was cut from {pairs[-1][1] + 1}; give its own --teacher, or --mode output-kd")

    run = Run(args, device)
    ema = copy.deepcopy(net).eval()
    optimizer = adamw([dict(params=list(net.parameters()), lr=args.lr)])
    if run.saved:
        load_state(net, run.saved["model"], "the checkpoint")
        load_state(ema, run.saved["ema"], "the checkpoint")
        optimizer = adamw([dict(params=list(net.to(device).parameters()), lr=args.lr)])
        ema.to(device)
        optimizer.load_state_dict(run.saved["optimizer"])
    prepare(net, args)
    values, averages = list(net.parameters()), list(ema.parameters())
    config = config | dict(mode=args.mode)
    weights = lambda: dict(model=net.state_dict(), ema=ema.state_dict(), config=config)
    if rank() == 0:
        size = sum(p.numel() for p in values)
        print(f"{args.mode}: {config['name']} of depth {config['depth']}, {size / 1e6:.2f} M parameters, {args.steps} steps of {args.batch_size} on {device}")
    train(run, batches, optimizer, make_losses(net, teacher, objective, pairs, args),
          contents=lambda: weights() | dict(optimizer=optimizer.state_dict()),
          lr_factor=lambda step: halving(step, args.steps, args.warmup, args.lr_end),
          after_step=lambda step: ema_update(averages, values, args.ema, step))
    if rank() == 0:
        save_checkpoint(run.out / "student.pt", **weights(), step=args.steps)
        plot_loss(run.out)
        print(f"wrote {run.out}/student.pt and loss.png")


if __name__ == "__main__":
    main()
    end_ranks()
