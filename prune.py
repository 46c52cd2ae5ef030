"""Decides which layers of a diffusion transformer to keep, and cuts the others out. The weights are recovered by distill.py.

    python prune.py                                                       # digits: dit-tiny, 12 layers -> 6
    torchrun --nproc_per_node=8 prune.py --model dit-xl --scheme 1:2 --latents out/latents
    python prune.py --criterion indices --layers 0,2,4,6,8,10             # a choice of your own

A network that loses little when a layer is removed need not be one that recovers well afterwards. TinyFusion therefore
asks for recoverability (eq. 3): it looks for the mask m under which a fine-tuned network, weights W + dW, has the least loss,

    min over p(m) and dW of  E_x,m  loss(x, W + dW, m)

and optimises both at once. The L layers are cut into groups of M neighbours, each of which keeps N. A group has C(M, N)
candidate masks with one logit each; every sample of the batch draws a candidate by Gumbel-softmax, so its logit gets a
gradient; and a cheap dW (LoRA) stands for the fine-tuning to come. In the end each group keeps its likeliest candidate,
dW is thrown away, and the kept layers leave with their original weights.

Writes to --out: shallow.pt, decision.png (the search over time), log.jsonl, and step-*.pt to resume from.

A new pruning idea is one function and one line in CRITERIA, near the end of this file.
"""
import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

from distill import Batches, Run, adamw, add_training_arguments, check_fit, ema_update, fill_defaults, prepare, train
from extract_latents import Latents
from model import barrier, end_ranks, fail, load_model, mix, rank, save_checkpoint, start_ranks

# ---------------------------------------------------------------------------------------------------------------------
# Groups and their candidate masks.


def parse_scheme(text: str, depths: list) -> list:
    """ "2:4", or a list "3:4,3:4,2:4", -> [(N, M), ...] over all layers. No group straddles two of the network's lists."""
    try:
        scheme = [tuple(int(v) for v in part.split(":")) for part in text.split(",")]
        valid = all(len(g) == 2 and 0 < g[0] <= g[1] for g in scheme)
    except ValueError:
        valid = False
    if not valid:
        fail(f"--scheme {text!r} is not N:M with 1 <= N <= M, or a list of such, like 1:2 or 3:4,2:4,3:4")
    if len(scheme) == 1:
        m = scheme[0][1]
        if any(depth % m for depth in depths):
            fail(f"--scheme {text}: groups of {m} do not divide {' + '.join(map(str, depths))} layers; choose another M, or list the groups")
        return scheme * (sum(depths) // m)
    ends = set(itertools.accumulate(m for _, m in scheme))
    if not set(itertools.accumulate(depths)) <= ends or max(ends) != sum(depths):
        fail(f"--scheme {text}: the groups cover {max(ends)} layers and must fill {' + '.join(map(str, depths))} exactly")
    return scheme


def candidate_masks(n: int, m: int) -> torch.Tensor:
    """All ways to keep n of m layers, lexicographic by kept layers: (C(m, n), m) of 0 and 1."""
    if math.comb(m, n) > 100_000:
        fail(f"a {n}:{m} group has {math.comb(m, n):,} candidate masks; cut the network into smaller groups")
    kept = torch.tensor(list(itertools.combinations(range(m), n)))
    return torch.zeros(len(kept), m).scatter(1, kept, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The Gumbel draw.


def draw_masks(logits, candidates, gumbel, tau, scaling=100.0):
    """One candidate per sample: logits (K,), candidates (K, M), gumbel noise (B, K) -> masks (B, M), choice (B,).

    The masks are 0 or 1; their gradient is that of the softmax (straight-through). scaling is what makes a learning
    rate of 1e-3 move the logits from exploration to a decision within an epoch.
    """
    soft = F.softmax((logits * scaling + gumbel) / tau, dim=-1)  # (B, K)
    choice = soft.argmax(dim=-1)
    hard = F.one_hot(choice, len(logits)).to(soft.dtype)
    return (hard - soft.detach() + soft) @ candidates, choice


class LayerMasks(nn.Module):
    """The distribution over masks: per group, a logit for each candidate, and the logits' moving average."""

    def __init__(self, scheme: list, device):
        super().__init__()
        self.on_host = [candidate_masks(n, m) for n, m in scheme]
        self.candidates = [c.to(device) for c in self.on_host]
        self.logits = nn.ParameterList(nn.Parameter(torch.full((len(c),), 0.02, device=device)) for c in self.candidates)
        self.average = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.logits)

    def draw(self, layers: list, noise, tau: float):
        """Gives every MaskedLayer its masks for this batch. One small device-to-host copy tells which samples use which."""
        drawn = [draw_masks(l, c, noise.gumbel(len(l)), tau) for l, c in zip(self.logits, self.candidates)]
        masks = torch.cat([mask for mask, _ in drawn], dim=1)  # (B, L)
        chosen = torch.stack([choice for _, choice in drawn], dim=1).cpu()  # (B, groups)
        on = torch.cat([c[chosen[:, g]] for g, c in enumerate(self.on_host)], dim=1) > 0  # (B, L)
        order = (~on).to(torch.uint8).argsort(dim=0, stable=True)  # a column: first the samples that use the layer
        orders = torch.stack([order, order.argsort(dim=0)])  # (2, B, L), back to the device in one copy
        orders = (orders.pin_memory() if masks.is_cuda else orders).to(masks.device, non_blocking=True)
        for i, (layer, count) in enumerate(zip(layers, on.sum(dim=0).tolist())):
            layer.set_mask(masks[:, i], count, *orders[:, :, i])

    def decide(self):
        """-> the kept layers, and for every layer the probability that it is kept, by the averaged logits."""
        kept, confidence, first = [], [], 0
        for logits, candidates in zip(self.average, self.candidates):
            best = candidates[logits.argmax()]
            kept += [first + i for i in best.nonzero()[:, 0].tolist()]
            confidence += (F.softmax(100.0 * logits, dim=0) @ candidates).tolist()
            first += candidates.shape[1]
        return kept, confidence


# ---------------------------------------------------------------------------------------------------------------------
# The masked layer.


class MaskedLayer(nn.Module):
    """m * block(x) + (1 - m) * x, with a mask m (B,) of its own for each sample.

    Where m is 0 the block's gradient is exactly zero, and only block(x)'s value is needed, for the gradient of m. So
    those samples go through the block without autograd: same output, same gradients, a third less work at 1:2.
    """

    def __init__(self, block):
        super().__init__()
        self.block = block

    def set_mask(self, mask, count: int, order, inverse):
        """mask: (B,) straight-through values; order: (B,) the samples, first the `count` whose mask is 1; inverse: its inverse."""
        self.mask, self.count, self.order, self.inverse = mask, count, order, inverse

    def forward(self, x, *conditions):
        """x (B, T, D) and conditions of B rows, as the block takes them -> (B, T, D)."""
        on, off = ([v.index_select(0, rows) for v in (x, *conditions)] for rows in (self.order[: self.count], self.order[self.count :]))
        outputs = [self.block(*on)] if self.count else []
        if self.count < len(x):
            with torch.no_grad():
                outputs.append(self.block(*off))
        out = torch.cat(outputs).index_select(0, self.inverse)
        m = self.mask.view(-1, *[1] * (x.ndim - 1))
        return m * out + (1 - m) * x


# ---------------------------------------------------------------------------------------------------------------------
# The weight update dW.


class LoRALinear(nn.Module):
    """A frozen Linear plus alpha / r * B A x (Hu et al. 2022). B starts at zero, so dW does."""

    def __init__(self, linear: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.linear, self.scale = linear, alpha / r
        self.lora_a = nn.Parameter(torch.empty(r, linear.in_features, device=linear.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, r, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def add_delta_w(net, kind: str, r: int) -> list:
    """Makes dW trainable, all else frozen: "lora" on every Linear, "full" for all weights, "frozen" for none. -> its parameters."""
    net.requires_grad_(kind == "full")
    if kind == "lora":
        for module in list(net.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, LoRALinear(child, r, alpha=2 * r))
    return [p for p in net.parameters() if p.requires_grad]


# ---------------------------------------------------------------------------------------------------------------------
# The search.


def learned(net, objective, batches, scheme, run) -> list:
    """TinyFusion's criterion: logits (lr 1e-3) and dW (lr 1e-4) trained together, tau from 4 to 0.1, as in its release.

    The network stays in eval mode: MAR's dropout (the paper says nothing of it) would add noise to the comparison of the masks.
    """
    args = run.args
    torch.manual_seed(mix(args.seed, 2))
    delta = add_delta_w(net, args.delta_w, args.lora_rank)
    masks = LayerMasks(scheme, run.device)
    prepare(net, args)
    layers = [MaskedLayer(block) for block in net.layers()]
    net.replace_layers(layers)
    logits, averages = list(masks.logits), list(masks.average)
    optimizer = adamw([dict(params=logits, lr=1e-3)] + ([dict(params=delta, lr=1e-4)] if delta else []))
    if run.saved:
        masks.load_state_dict(run.saved["masks"])
        with torch.no_grad():
            for p, saved in zip(delta, run.saved["delta"]):
                p.copy_(saved)
        optimizer.load_state_dict(run.saved["optimizer"])

    def losses(x, y, noise, step):
        batch = objective.draw(x, y, noise)
        masks.draw(layers, noise, tau=4 + (0.1 - 4) * step / args.steps)
        return dict(loss=objective.loss(objective.predict(net, batch), batch))

    def note():
        kept, confidence = masks.decide()
        if rank() == 0:
            print("keep " + " ".join(f"{i}({100 * confidence[i]:.0f}%)" for i in kept), flush=True)
        return dict(kept=kept, confidence=[round(c, 4) for c in confidence])

    train(run, batches, optimizer, losses, note=note, after_step=lambda step: ema_update(averages, logits, 0.999, step),
          contents=lambda: dict(masks=masks.state_dict(), delta=[p.detach() for p in delta], optimizer=optimizer.state_dict()))
    return masks.decide()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Other criteria: (network, objective, batches, scheme, run) -> indices of the layers to keep.


def random(net, objective, batches, scheme, run) -> list:
    """N of each group by lot: the baseline that every criterion has to beat."""
    rng, first = np.random.default_rng(mix(run.args.seed, 3)), np.cumsum([0] + [m for _, m in scheme])
    return [int(f + i) for f, (n, m) in zip(first, scheme) for i in sorted(rng.choice(m, n, replace=False))]


def indices(net, objective, batches, scheme, run) -> list:
    """The layers named by --layers."""
    try:
        kept = sorted({int(v) for v in (run.args.layers or "").split(",")})
    except ValueError:
        fail("--criterion indices needs --layers with whole numbers, like --layers 0,2,4,6")
    first = 0
    for n, m in scheme:
        count = sum(first <= i < first + m for i in kept)
        if count != n:
            fail(f"--layers keeps {count} of layers {first} to {first + m - 1}, where --scheme says {n} of {m}; change one of the two")
        first += m
    return kept if kept[-1] < first and kept[0] >= 0 else fail(f"--layers names layer {kept[-1]}, and the last one is {first - 1}")


CRITERIA = dict(learned=learned, random=random, indices=indices)

# ---------------------------------------------------------------------------------------------------------------------
# The cut and the picture.


def cut(args, scheme, kept):
    """Writes shallow.pt: the original network, read anew, with only the kept layers."""
    net, config = load_model(args.model, args.ckpt)
    net.keep_layers(kept)
    config |= dict(depth=net.depths(), kept=kept, scheme=[list(g) for g in scheme], parent=args.ckpt or config["name"], criterion=args.criterion)
    state = net.state_dict()
    save_checkpoint(Path(args.out) / "shallow.pt", model=state, ema=state, config=config, step=0)  # `ema` for the DiT release's scripts; stored once
    return net


def draw_decision(out: Path, scheme: list):
    """decision.png from log.jsonl: a row for each layer, time to the right; a kept layer is as dark as it is certain."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "kept" in line]
    if not lines:
        return (out / "decision.png").unlink(missing_ok=True)  # an earlier search's
    depth, cell, left, top = sum(m for _, m in scheme), 22, 70, 34
    width = max(6, min(28, 840 // len(lines)))
    W, H = left + width * len(lines) + 90, top + cell * depth + 46
    image = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(image)
    draw.text((left, 10), "kept layers over the search; opacity = probability of being kept", fill="black")
    colours = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189)]
    group_of = [g for g, (_, m) in enumerate(scheme) for _ in range(m)]
    for i in range(depth):
        y, colour = top + cell * i, colours[group_of[i] % 4]
        if i and group_of[i] != group_of[i - 1]:
            draw.line([(left - 60, y), (W - 20, y)], fill="#bbbbbb")
        draw.text((left - 8, y + cell / 2), f"layer {i}", fill="black", anchor="rm")
        for j, line in enumerate(lines):
            if i in line["kept"]:
                share = line["confidence"][i]
                shade = tuple(round(255 - (255 - c) * share) for c in colour)
                draw.rectangle([left + width * j + 1, y + 3, left + width * (j + 1) - 1, y + cell - 3], fill=shade)
        if i in lines[-1]["kept"]:
            draw.text((left + width * len(lines) + 8, y + cell / 2), f"keep {100 * lines[-1]['confidence'][i]:.0f} %", fill="black", anchor="lm")
    for j in (0, len(lines) - 1):
        draw.text((left + width * (j + 0.5), H - 36), str(lines[j]["step"]), fill="black", anchor="ma")
    draw.text((left + width * len(lines) / 2, H - 18), "step", fill="black", anchor="ma")
    image.save(out / "decision.png")


def parse_arguments():
    """The command line; what is None follows the data (digits or ImageNet), see `main`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="the network to prune (default: dit-tiny, or what --ckpt holds)")
    parser.add_argument("--ckpt", metavar="FILE|URL", help="its weights, instead of the registry's; also a distilled student, to prune once more")
    parser.add_argument("--scheme", default="1:2", help="keep N of each M neighbouring layers; or a list, 3:4,2:4,... (default: %(default)s)")
    parser.add_argument("--criterion", choices=CRITERIA, default="learned", help="how to choose (default: %(default)s)")
    parser.add_argument("--layers", metavar="I,J,...", help="criterion indices: the layers to keep, from 0")
    parser.add_argument("--delta-w", choices=["lora", "full", "frozen"], default="lora", help="what is co-trained with the masks (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=8, metavar="R", help="rank of LoRA, whose alpha is 2 R (default: %(default)s)")
    parser.add_argument("--out", default="out/prune", metavar="DIR", help="default: %(default)s")
    add_training_arguments(parser)
    return parser.parse_args()


def main():
    """Search, decide, cut, draw."""
    args = parse_arguments()
    device = start_ranks(args.device)
    if args.layers and args.criterion != "indices":
        fail("--layers names the layers of --criterion indices; add that")
    if not args.model and not args.ckpt:
        args.model = "dit-tiny"
    net, config = load_model(args.model, args.ckpt, device)
    scheme = parse_scheme(args.scheme, net.depths())
    latents = Latents(args.latents)
    check_fit(net, latents, args.latents)
    small = config["name"].endswith("tiny")
    recipe = dict(batch_size=64, steps=250, save_every=100) if small else dict(batch_size=128, epochs=1, save_every=1000)
    fill_defaults(args, recipe, lambda batch: len(latents) / batch)
    batches = Batches(latents, args.batch_size, args.accumulate, args.seed, device)
    run = Run(args, device)
    kept = CRITERIA[args.criterion](net, net.objective(), batches, scheme, run)
    if rank() == 0:
        shallow = cut(args, scheme, kept)
        draw_decision(run.out, scheme)
        count = lambda n: sum(p.numel() for p in n.parameters()) / 1e6
        print(f"{args.criterion}: keep layers {' '.join(map(str, kept))} of {sum(config['depth'])}; {count(shallow):.2f} M parameters; wrote {run.out}/shallow.pt")
    barrier()


if __name__ == "__main__":
    main()
    end_ranks()
