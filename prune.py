"""Decides which layers of a diffusion transformer to keep, and cuts the others out. distill.py recovers the weights.

    python prune.py                                                       # digits: dit-tiny, 12 layers -> 6
    torchrun --nproc_per_node=8 prune.py --model dit-xl --scheme 1:2 --latents out/latents
    python prune.py --criterion indices --layers 0,2,4,6,8,10             # a choice of your own

A layer is a whole transformer block, attention and MLP. A network that loses little when a layer is removed need not be
one that recovers well afterwards. TinyFusion therefore asks for recoverability (eq. 2): it looks for the mask m under
which a fine-tuned network, weights W + dW, has the least loss. It learns a distribution p(m) and dW together (eq. 6),

    min over p(m) and dW of  E_x,m  loss(x, W + dW, m).

The L layers are cut into groups of M neighbours, each of which keeps N (eq. 3). A group has C(M, N) candidate masks
with one logit each; every sample of the batch draws a candidate by Gumbel-softmax, so its logit gets a gradient; and a
cheap dW (LoRA) stands for the fine-tuning to come. In the end each group keeps its likeliest candidate, dW is thrown
away, and the kept layers leave with their original weights.

Writes to --out: shallow.pt, decision.png (the search over time), loss.png, log.jsonl, and step-*.pt to resume from.

Read top to bottom; the search is `learned`. A new pruning idea is one function and one line in CRITERIA. At first, skip
what follows `main`: the machinery of a training run, which distill.py uses too.
"""
import contextlib
import itertools
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
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from extract_latents import Batches, Latents, check_fit
from model import (
    HALVES, MODELS, Parser, Progress, Stopped, UserError, autocast, barrier, choose_dtype, cast_frozen, load_model,
    make_seed, on_rank_0, rank, read_torch, reading, real, run_main, save_checkpoint, start_ranks, whole, world_size,
    atomic_write)

# ---------------------------------------------------------------------------------------------------------------------
# Groups and their candidate masks.

def parse_scheme(text: str, depths: list) -> list:
    """ "2:4", or a list "3:4,3:4,2:4", -> [(N, M), ...] over all layers. A group lies in one list of layers."""
    try:
        scheme = [tuple(int(v) for v in part.split(":")) for part in text.split(",")]
        valid = all(len(g) == 2 and 0 < g[0] <= g[1] for g in scheme)
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"--scheme {text!r} is not N:M with 1 <= N <= M, or a list like 3:4,2:4,3:4; give one like 1:2")
    layers = " + ".join(map(str, depths))
    if len(scheme) == 1:
        m = scheme[0][1]
        if any(depth % m for depth in depths):
            raise UserError(f"--scheme {text}: groups of {m} do not divide {layers} layers; take another M, or a list")
        return scheme * (sum(depths) // m)
    ends = set(itertools.accumulate(m for _, m in scheme))
    if not set(itertools.accumulate(depths)) <= ends or max(ends) != sum(depths):
        raise UserError(f"--scheme {text}: the groups cover {max(ends)} layers and must fill {layers}; change it")
    return scheme

def candidate_masks(n: int, m: int) -> torch.Tensor:
    """All ways to keep n of m layers, lexicographic by kept layers: (C(m, n), m) of 0 and 1."""
    if math.comb(m, n) > 100_000:
        raise UserError(f"a {n}:{m} group has {math.comb(m, n):,} candidate masks; cut the network into smaller groups")
    kept = torch.tensor(list(itertools.combinations(range(m), n)))
    return torch.zeros(len(kept), m).scatter(1, kept, 1.0)

# ---------------------------------------------------------------------------------------------------------------------
# The Gumbel draw.

def draw_masks(logits, candidates, gumbel, tau, scaling=100.0):
    """One candidate per sample (eq. 4 and 5): logits (..., K), candidates (..., K, M), Gumbel noise (..., B, K)
    -> masks (..., B, M), choice (..., B); the leading dimensions are groups.

    The masks are 0 or 1; their gradient is that of the softmax (straight-through). `scaling` is what makes a learning
    rate of 1e-3 move the logits from exploration to a decision within an epoch."""
    soft = F.softmax((logits.unsqueeze(-2) * scaling + gumbel) / tau, dim=-1)  # (..., B, K)
    choice = soft.argmax(dim=-1)
    hard = F.one_hot(choice, logits.shape[-1]).to(soft.dtype)
    return (hard - soft.detach() + soft) @ candidates, choice

class LayerMasks(nn.Module):
    """The distribution over masks: a logit for each candidate of each group (G, K), and the logits' moving average.
    Groups of unlike size are padded to the largest: to K candidates, which `padding` keeps from being drawn, and to M
    places, of which `places` names those that are layers."""

    def __init__(self, scheme: list, device):
        super().__init__()
        masks = [candidate_masks(n, m) for n, m in scheme]
        G, K, M = len(scheme), max(len(c) for c in masks), max(m for _, m in scheme)
        candidates, padding = torch.zeros(G, K, M), torch.full((G, K), -math.inf)
        for g, c in enumerate(masks):
            candidates[g, : len(c), : c.shape[1]], padding[g, : len(c)] = c, 0.0
        places = torch.tensor([g * M + i for g, (_, m) in enumerate(scheme) for i in range(m)])
        self.candidates, self.padding, self.places = (v.to(device) for v in (candidates, padding, places))
        self.logits = nn.Parameter(torch.full((G, K), 0.02, device=device))
        self.average = nn.Parameter(self.logits.detach().clone(), requires_grad=False)

    def draw(self, layers: list, noise, tau: float):
        """Gives every MaskedLayer its masks for this batch."""
        G, K = self.logits.shape
        gumbel = noise.gumbel(K, lists=(G,))  # (G, B, K)
        masks, _ = draw_masks(self.logits + self.padding, self.candidates, gumbel, tau)  # (G, B, M)
        masks = masks.transpose(0, 1).flatten(1).index_select(1, self.places)  # (B, L)
        off = (masks.detach() < 0.5).to(torch.uint8)
        order = off.argsort(dim=0, stable=True)  # a column: first the samples that use the layer, then the others
        inverse = order.argsort(dim=0)
        counts = (len(off) - off.sum(dim=0)).tolist()  # the host waits for the device, once per batch
        for i, layer in enumerate(layers):
            layer.set_mask(masks[:, i], counts[i], order[:, i], inverse[:, i])

    def decide(self):
        """-> the kept layers, and for every layer the probability that it is kept, by the averaged logits."""
        probability = F.softmax(100.0 * self.average + self.padding, dim=1)  # (G, K)
        likeliest = F.one_hot(probability.argmax(dim=1), probability.shape[1]).to(probability.dtype)
        best, confidence = ((p[:, None] @ self.candidates).flatten()[self.places] for p in (likeliest, probability))
        return [i for i, m in enumerate(best.tolist()) if m > 0.5], confidence.tolist()

# ---------------------------------------------------------------------------------------------------------------------
# The masked layer: first the formula, then what runs.

class DenseMaskedLayer(nn.Module):
    """m * block(x) + (1 - m) * x (eq. 1), with a mask m (B,) of its own for each sample. Tests and benchmark only."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def set_mask(self, mask, count: int, order, inverse):
        """mask: (B,) straight-through values; order: the samples, first the `count` whose mask is 1; its inverse."""
        self.mask, self.count, self.order, self.inverse = mask, count, order, inverse

    def forward(self, x, *conditions):
        """x (B, T, D) and conditions of B rows, as the block takes them -> (B, T, D)."""
        m = self.mask.view(-1, 1, 1)
        return m * self.block(x, *conditions) + (1 - m) * x

class MaskedLayer(DenseMaskedLayer):
    """The same output and gradients for less work.
    Where m is 0 the gradient of the block's weights is exactly zero, and block(x) is needed only for the gradient of m:
    those samples go through the block without autograd, a third less work at 1:2."""

    def forward(self, x, *conditions):
        on, off = self.order[: self.count], self.order[self.count :]
        outputs = []
        if len(on):
            outputs.append(self.block(*(v.index_select(0, on) for v in (x, *conditions))))
        if len(off):
            with torch.no_grad():
                outputs.append(self.block(*(v.index_select(0, off) for v in (x, *conditions))))
        out = torch.cat(outputs).index_select(0, self.inverse)  # back in the batch's order
        m = self.mask.view(-1, 1, 1)
        return m * out + (1 - m) * x

# ---------------------------------------------------------------------------------------------------------------------
# The weight update dW.

class LoRALinear(nn.Module):
    """A frozen Linear plus alpha / r * B A x (eq. 7; Hu et al. 2022). B starts at zero, so dW does."""

    def __init__(self, linear: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.linear, self.scale = linear, alpha / r
        self.lora_a = nn.Parameter(torch.empty(r, linear.in_features, device=linear.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, r, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

def add_delta_w(net, kind: str, r: int) -> list:
    """Makes dW trainable, all else frozen: "lora" on every Linear, "full" for all weights, "frozen" for none.

    -> its parameters."""
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
    No teacher takes part: the loss is the family's own. The network stays in eval mode: MAR's dropout (the paper says
    nothing of it) would add noise to the comparison of the masks."""
    torch.manual_seed(make_seed(run.args.seed, 2))  # LoRA's A
    delta = add_delta_w(net, run.args.delta_w, run.args.lora_rank)
    run.prepare(net)
    layers = [MaskedLayer(block) for block in net.layers()]
    net.replace_layers(layers)
    masks = LayerMasks(scheme, run.device)
    optimizer = adamw(dict(params=[masks.logits], lr=1e-3), dict(params=delta, lr=1e-4))
    run.track(optimizer, masks=masks, delta=nn.ParameterList(delta))

    for step in run:
        tau = 4 + (0.1 - 4) * step / run.args.steps  # from exploring to deciding
        for x, y, noise in batches(step):  # all parts of the batch that are this rank's
            batch = objective.make_batch(x, y, noise)
            masks.draw(layers, noise, tau)
            with run.autocast():
                loss = objective.loss(objective.predict(net, batch), batch)  # (b,)
            run.backward(loss=loss)
        run.update(optimizer)
        ema_update([masks.average], [masks.logits], 0.999, step)
        if run.logs(step):
            kept, confidence = masks.decide()
            run.say("keep " + " ".join(f"{i}({100 * confidence[i]:.0f}%)" for i in kept))
            run.note(kept=kept, confidence=[round(c, 4) for c in confidence])
    return masks.decide()[0]

# ---------------------------------------------------------------------------------------------------------------------
# The loss after a cut, and other papers' criteria: (net, objective, batches, scheme, run) -> the layers to keep.

def calibration(objective, batches) -> list:
    """This rank's share of 256 fixed draws, in a few batches: the same for every cut, criterion and seed."""
    count = min(256, len(batches.latents))
    fixed = Batches(batches.latents, count, max(1, count // 32 // world_size()), seed=2025, device=batches.device)
    return [objective.make_batch(x, y, noise) for x, y, noise in fixed(0)]

@contextlib.contextmanager
def keeping(net, kept: list):
    """In here the network has only these layers."""
    lists = [getattr(net, name) for name in net.block_lists]
    net.keep_layers(kept)
    yield
    for name, blocks in zip(net.block_lists, lists):
        setattr(net, name, blocks)

@torch.no_grad()
def calibration_loss(net, objective, draws: list, run) -> float:
    """The mean training loss over fixed draws; of a cut network, table 3's calibration loss."""
    with run.autocast():
        losses = torch.cat([objective.loss(objective.predict(net, batch), batch) for batch in draws]).double()
    total, count = sum_over_ranks(torch.stack([losses.sum(), torch.ones_like(losses).sum()])).tolist()
    return total / count

@torch.no_grad()
def mean_scores(net, objective, batches, run, measure) -> list:
    """The mean over the fixed draws of measure(input, output) (B,), for every layer; input and output are (B, T, D)."""
    layers, draws = net.layers(), calibration(objective, batches)
    sums = torch.zeros(len(layers), dtype=torch.float64, device=run.device)

    def add(layer, inputs, out):
        sums[layers.index(layer)] += measure(inputs[0].float(), out.float()).sum()

    hooks = [layer.register_forward_hook(add) for layer in layers]
    calibration_loss(net, objective, draws, run)
    for hook in hooks:
        hook.remove()
    return (sum_over_ranks(sums) / min(256, len(batches.latents))).tolist()

def keep_best(scores: list, scheme: list, run) -> list:
    """The N layers of each group that score highest."""
    run.say("scores " + " ".join(f"{i}({score:.4g})" for i, score in enumerate(scores)))
    run.write(step=0, scores=scores)
    best = np.argsort(scores)[::-1].tolist()  # first the layers without which the loss is not even a number
    kept = [[i for i in best if first <= i < first + m][:n] for first, n, m in groups_of(scheme)]
    return sorted(itertools.chain(*kept))

def block_influence(net, objective, batches, scheme, run) -> list:
    """ShortGPT (Men et al. 2024): a layer matters as much as it turns the hidden state, 1 - cos(input, output)."""
    turn = lambda x, out: 1 - F.cosine_similarity(x, out, dim=-1).mean(1)
    return keep_best(mean_scores(net, objective, batches, run, turn), scheme, run)

def flux_lite(net, objective, batches, scheme, run) -> list:
    """Flux.1 Lite (Verdu & Martin 2024): a layer matters as much as it changes the hidden state, MSE(input, output)."""
    change = lambda x, out: (out - x).square().mean(dim=(1, 2))
    return keep_best(mean_scores(net, objective, batches, run, change), scheme, run)

def sensitivity(net, objective, batches, scheme, run) -> list:
    """A layer matters as much as the loss rises when it alone is left out."""
    draws, depth = calibration(objective, batches), sum(net.depths())
    progress, scores = Progress("sensitivity", depth, "layers"), []
    whole_loss = calibration_loss(net, objective, draws, run)
    for i in range(depth):
        with keeping(net, [j for j in range(depth) if j != i]):
            scores.append(calibration_loss(net, objective, draws, run) - whole_loss)
        progress.update(i + 1)
    return keep_best(scores, scheme, run)

def oracle(net, objective, batches, scheme, run) -> list:
    """BK-SDM (Kim et al. 2023): in each list of layers keep the first, the last, and evenly spread ones between.
    It spreads N over a whole list, whatever the groups: at 1:2 that is one of each pair all the same."""
    kept, first = [], 0
    for depth in net.depths():
        count = sum(n for start, n, _ in groups_of(scheme) if first <= start < first + depth)
        kept += [first + round(v) for v in np.linspace(0, depth - 1, count)]
        first += depth
    return kept

@torch.no_grad()
def probe(net, objective, batches, scheme, run) -> list:
    """PPCL (Ma et al. 2025, arXiv 2511.16156): each group loses the span of layers that a linear map replaces best.
    A least-squares map A from the span's input x to its output y leaves the share |y - A x|^2 / |y|^2 unexplained."""
    spans = [(a, a + m - n - 1) for first, n, m in groups_of(scheme) if n < m for a in range(first, first + n + 1)]
    if not spans:
        return list(range(sum(net.depths())))
    states = {}
    hooks = [layer.register_forward_hook(lambda layer, inputs, out, i=i: states.update({i: (inputs[0], out)}))
             for i, layer in enumerate(net.layers())]
    sums = None
    for batch in calibration(objective, batches):
        with run.autocast():
            objective.predict(net, batch)
        pairs = [[h.flatten(0, 1).double() for h in (states[a][0], states[b][1])] for a, b in spans]  # (B T, D)
        part = torch.stack([torch.stack([x.T @ x, x.T @ y, y.T @ y]) for x, y in pairs])  # (spans, 3, D, D)
        sums = part if sums is None else sums + part
    for hook in hooks:
        hook.remove()
    xx, xy, yy = sum_over_ranks(sums).unbind(1)
    ridge = 1e-6 * xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(xx.shape[1], device=xx.device)
    explained = (torch.linalg.solve(xx + ridge, xy) * xy).sum((1, 2)) / yy.diagonal(dim1=1, dim2=2).sum(1)
    unexplained = (1 - explained).tolist()
    run.say("unexplained " + " ".join(f"{a}-{b}({u:.4f})" for (a, b), u in zip(spans, unexplained)))
    run.write(step=0, spans=spans, unexplained=unexplained)
    lost = set()
    for first, n, m in groups_of(scheme):
        own = [(u, span) for u, span in zip(unexplained, spans) if first <= span[0] < first + m]
        if own:
            a, b = min(own)[1]
            lost |= set(range(a, b + 1))
    return [i for i in range(sum(net.depths())) if i not in lost]

def lowest_loss(net, objective, batches, scheme, run) -> list:
    """The paper's table 3: of all cuts, or of --candidates random ones, the one with the least loss right after it."""
    total, rng = math.prod(math.comb(m, n) for n, m in scheme), np.random.default_rng(make_seed(run.args.seed, 4))
    if total <= run.args.candidates:
        choices = [itertools.combinations(range(first, first + m), n) for first, n, m in groups_of(scheme)]
        cuts = [list(itertools.chain(*parts)) for parts in itertools.product(*choices)]
    else:
        cuts = [random_cut(scheme, rng) for _ in range(run.args.candidates)]
    draws, losses, progress = calibration(objective, batches), [], Progress("lowest-loss", len(cuts), "cuts")
    for kept in cuts:
        with keeping(net, kept):
            losses.append(calibration_loss(net, objective, draws, run))
        progress.update(len(losses))
    order = np.argsort(losses, kind="stable")  # what is not a number goes last
    for what, i in (("lowest", order[0]), ("median", order[len(order) // 2]), ("highest", order[-1])):
        run.say(f"{what} of {len(cuts):,} of {total:,} cuts: {losses[i]:.4f}, layers {' '.join(map(str, cuts[i]))}")
    run.write(step=0, cuts=cuts, losses=losses)
    return cuts[order[0]]

def random_cut(scheme: list, rng) -> list:
    return [int(first + i) for first, n, m in groups_of(scheme) for i in sorted(rng.choice(m, n, replace=False))]

def random_layers(net, objective, batches, scheme, run) -> list:
    """N of each group at random: the baseline that every criterion has to beat."""
    return random_cut(scheme, np.random.default_rng(make_seed(run.args.seed, 3)))

def indices(net, objective, batches, scheme, run) -> list:
    """The layers named by --layers."""
    kept, depth = sorted(set(run.args.layers)), sum(net.depths())
    if kept[0] < 0 or kept[-1] >= depth:
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        raise UserError(f"--layers names layer {wrong}, and there are layers 0 to {depth - 1}; change it")
    for (first, n, m), count in zip(groups_of(scheme), kept_of_groups(kept, scheme)):
        if count != n:
            raise UserError(f"--layers keeps {count} of layers {first} to {first + m - 1}, where --scheme says {n} of "
                            f"{m}; change one of the two")
    return kept

def groups_of(scheme: list):
    """The first layer, N and M of each group."""
    first = 0
    for n, m in scheme:
        yield first, n, m
        first += m

def kept_of_groups(kept: list, scheme: list) -> list:
    return [sum(first <= i < first + m for i in kept) for first, _, m in groups_of(scheme)]

CRITERIA = {"learned": learned, "bi": block_influence, "flux-lite": flux_lite, "sensitivity": sensitivity,
            "oracle": oracle, "probe": probe, "lowest-loss": lowest_loss, "random": random_layers, "indices": indices}
NEED_NO_LATENTS = ("oracle", "random", "indices")

# ---------------------------------------------------------------------------------------------------------------------
# The cut. With --granularity sublayer a layer is half a block, an attention or an MLP.

def split_layers(net):
    """From now on the network's layers are halves of blocks. Weights and output stay the same."""
    for name in net.block_lists:
        states = []
        for block in getattr(net, name):
            state = block.state_dict()
            states += [half_state(state, half) for half in HALVES] if len(block.halves) == 2 else [state]
        set_blocks(net, name, states)

def join_layers(net):
    """An attention half with an MLP half right behind it becomes a block again, under the official keys."""
    for name in net.block_lists:
        states, previous = [], None
        for block in getattr(net, name):
            state = block.state_dict()
            if (previous, block.halves) == (("attn",), ("mlp",)):
                attn, previous = states.pop(), HALVES
                state = attn | state | {k: torch.cat([attn[k], state[k]]) for k in attn if k in state}  # the modulation
            else:
                previous = block.halves
            states.append(state)
        set_blocks(net, name, states)

def half_state(state: dict, half: str) -> dict:
    """A block's weights -> those of its half. The modulation's first rows are the attention's, the others the MLP's."""
    norm = {"attn": "norm1", "mlp": "norm2"}[half]
    own = {k: v for k, v in state.items() if k.split(".")[0] in (half, norm)}
    return own | {k: v.chunk(2)[HALVES.index(half)].clone() for k, v in state.items() if k.startswith("adaLN")}

def set_blocks(net, name: str, states: list):
    """Fills a list of the network with blocks that hold the given weights."""
    with torch.device("meta"):
        halves = [tuple(half for half in HALVES if any(k.startswith(half) for k in state)) for state in states]
        blocks = nn.ModuleList(net.new_block(h) for h in halves)
    for block, state in zip(blocks, states):
        block.load_state_dict(state, assign=True)
    setattr(net, name, blocks.train(net.training))

def cut(args, scheme: list, kept: list, device):
    """-> the original network, read anew, with only the kept layers; its config."""
    net, config = load_model(args.model, args.ckpt, device)
    if args.granularity == "sublayer":
        split_layers(net)
    net.keep_layers(kept)
    join_layers(net)
    facts = dict(depth=net.depths(), kept=kept, scheme=[list(g) for g in scheme], granularity=args.granularity)
    own = {k: config[k] for k in ("name", "overrides") if k in config}  # not how a student to be cut again was made
    return net, own | facts | dict(parent=args.ckpt or config["name"], criterion=args.criterion)

def logged(out: Path, key: str) -> list:
    """The lines of log.jsonl that hold `key`."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]

def draw_decision(out: Path, scheme: list):
    """decision.png from log.jsonl: a row per layer, time to the right; a kept layer is as dark as it is certain."""
    lines = logged(out, "kept")
    if not lines:
        return (out / "decision.png").unlink(missing_ok=True)  # an earlier search's
    depth, cell, left, top = sum(m for _, m in scheme), 22, 80, 34
    width = max(6, min(28, 840 // len(lines)))
    W, H = max(left + width * len(lines) + 100, 680), top + cell * depth + 46
    image = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(14)
    draw.text((left, 10), "layers that the search keeps, over its steps; as dark as a layer is certain to stay",
              fill="black")
    colours = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189)]
    group_of = [g for g, (_, m) in enumerate(scheme) for _ in range(m)]
    for i in range(depth):
        y, colour = top + cell * i, colours[group_of[i] % 4]
        if i and group_of[i] != group_of[i - 1]:
            draw.line([(left - 70, y), (W - 20, y)], fill="#bbbbbb")
        draw.text((left - 8, y + cell / 2), f"layer {i}", fill="black", anchor="rm")
        for j, line in enumerate(lines):
            if i in line["kept"]:
                shade = tuple(round(255 - (255 - c) * line["confidence"][i]) for c in colour)
                draw.rectangle([left + width * j + 1, y + 3, left + width * (j + 1) - 1, y + cell - 3], fill=shade)
        if i in lines[-1]["kept"]:
            place = (left + width * len(lines) + 8, y + cell / 2)
            draw.text(place, f"keep {100 * lines[-1]['confidence'][i]:.0f} %", fill="black", anchor="lm")
    for j in {0, len(lines) - 1}:
        draw.text((left + width * (j + 0.5), H - 36), str(lines[j]["step"]), fill="black", anchor="ma")
    draw.text((left + width * len(lines) / 2, H - 18), "step", fill="black", anchor="ma")
    image.save(out / "decision.png")

def parse_arguments():
    """The command line; what is None follows the model's recipe (model.py)."""
    parser = Parser(__doc__.split("\n\nRead top")[0])
    add = parser.add_argument_group("what to cut, and how to choose").add_argument
    add("--model", metavar="NAME", help="the network to prune (default: dit-tiny, or what --ckpt holds)")
    add("--ckpt", metavar="FILE|URL", help="its weights, instead of the official ones; or a student, to prune again")
    add("--scheme", default="1:2", help="keep N of each M neighbouring layers; or a list, 3:4,2:4,... that "
        "covers all layers (default: %(default)s)")
    add("--granularity", choices=["block", "sublayer"], default="block", help="what a layer is: a whole block, or its "
        "attention and its MLP each, twice as many (default: %(default)s)")
    add("--criterion", choices=CRITERIA, default="learned", help="how to choose (default: %(default)s)")
    add("--layers", type=layer_list, metavar="I,J,...", help="criterion indices: the layers to keep, from 0")
    add("--candidates", type=whole(1), default=1000, metavar="N", help="criterion lowest-loss: all cuts if they are "
        "so few, else so many random ones (default: %(default)s)")
    add("--delta-w", choices=["lora", "full", "frozen"], default="lora", help="criterion learned: what is trained with "
        "the masks (default: %(default)s)")
    add("--lora-rank", type=whole(1), default=8, metavar="R", help="LoRA's rank; alpha is 2 R (default: %(default)s)")
    add("--out", default="out/prune", metavar="DIR", help="default: %(default)s")
    add_training_arguments(parser)
    args = parser.parse_args()
    if (args.layers is None) == (args.criterion == "indices"):
        raise UserError("--layers I,J,... and --criterion indices go together; give both or neither")
    return args

def layer_list(text: str) -> list:
    return [int(v) for v in text.split(",")]

def main():
    """Search, cut, measure the loss after the cut, draw."""
    args = parse_arguments()
    device = start_ranks(args.device)
    if not args.model and not args.ckpt:
        args.model = "dit-tiny"
    net, config = load_model(args.model, args.ckpt, device)
    if args.granularity == "sublayer":
        split_layers(net)
    scheme, batches = parse_scheme(args.scheme, net.depths()), None
    if args.criterion not in NEED_NO_LATENTS or (Path(args.latents) / "meta.json").exists():
        latents = Latents(args.latents)
        check_fit(net, latents, args.latents)
        fill_defaults(args, MODELS[config["name"]]["recipe"]["prune"], len(latents))
        batches = Batches(latents, args.batch_size, args.accumulate, args.seed, device)
    run, objective = Run(args, device), net.objective()
    run.say(f"{args.criterion}: {config['name']}, {sum(net.depths())} layers, on {device} in {run.dtype_name}")
    kept = CRITERIA[args.criterion](net, objective, batches, scheme, run)
    if kept_of_groups(kept, scheme) != [n for n, _ in scheme]:  # the oracle's groups are the lists, and L_Rep asks
        lists = [(0, depth) for depth in net.depths()]
        scheme = [(n, depth) for n, (_, depth) in zip(kept_of_groups(kept, lists), lists)]
    shallow, config = cut(args, scheme, kept, device)
    loss = calibration_loss(shallow, objective, calibration(objective, batches), run) if batches else None
    run.write(step=args.steps or 0, cut=kept, calibration_loss=loss)
    if rank() == 0:
        state = shallow.state_dict()  # also as `ema`, which the DiT release's scripts look for; it is stored once
        config |= dict(calibration_loss=loss)
        save_checkpoint(run.out / "shallow.pt", model=state, ema=state, config=config, step=0)
        draw_decision(run.out, scheme)
        draw_losses(run.out)
    size = sum(p.numel() for p in shallow.parameters()) / 1e6
    loss = "not measured (no latents)" if loss is None else f"{loss:.4f}"
    run.say(f"keep layers {' '.join(map(str, kept))} of {sum(m for _, m in scheme)}; {size:.2f} M parameters; "
            f"loss after the cut {loss}; wrote {run.out}/shallow.pt")

# ---------------------------------------------------------------------------------------------------------------------
# The machinery of a training run, which distill.py uses too: flags; resuming, logging, stopping; all ranks' gradients.

def add_training_arguments(parser):
    """The flags that prune.py and distill.py share."""
    add = parser.add_argument_group("training").add_argument
    add("--latents", default="out/latents", metavar="DIR", help="written by extract_latents.py (default: %(default)s)")
    add("--batch-size", type=whole(1), metavar="N", help="global batch, shared out over ranks (default: the recipe's)")
    add("--steps", type=whole(1), metavar="N", help="optimiser steps of the whole run (default: the recipe's)")
    add("--epochs", type=real(0, 1e6, open_low=True), metavar="N", help="the same in passes over the data")
    add("--seed", type=whole(0), default=0, help="of everything drawn (default: %(default)s)")
    add("--resume", metavar="auto|never|FILE", help="auto goes on from the newest step-*.pt of --out, if there is one; "
        "never starts anew over an unfinished run")
    add("--save-every", type=whole(1), metavar="STEPS", help="between step-*.pt checkpoints (default: the recipe's)")
    add("--keep", type=whole(1), default=2, metavar="K", help="newest step-*.pt to keep (default: %(default)s)")
    add("--log-every", type=whole(1), default=20, metavar="STEPS", help="between log lines (default: %(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the forward pass; auto: bfloat16 "
        "where the hardware has it")
    add("--accumulate", type=whole(1), default=1, metavar="N", help="split each rank's batch in N, to save memory "
        "(default: %(default)s)")
    add("--checkpointing", action="store_true", help="recompute blocks in the backward pass: less memory, more work")
    add("--compile", action="store_true", help="torch.compile every block: slow first steps, faster ones after")

def fill_defaults(args, recipe: dict, images: int):
    """Puts the recipe's values where the user gave none, and turns epochs into steps."""
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs say the same; give one of them")
    own_length = args.steps or args.epochs
    for key, value in recipe.items():
        if getattr(args, key) is None and not (own_length and key in ("steps", "epochs")):
            setattr(args, key, value)
    args.steps = args.steps or max(1, round(args.epochs * images / args.batch_size))

FREE = ("out", "latents", "epochs", "resume", "save_every", "keep", "log_every", "device", "dtype", "accumulate",
        "checkpointing", "compile")  # the flags that a resumed run may change

class Run:
    """A training run: `for step in run` resumes, logs, saves, and stops on a signal. See `learned` for its use."""

    def __init__(self, args, device):
        self.args, self.device, self.out, self.step = args, device, Path(args.out), 0
        self.fixed = {k: v for k, v in vars(args).items() if k not in FREE}
        self.dtype = choose_dtype(args.dtype, device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.stop, self.sums, self.count, self.notes = False, {}, 0, {}
        self.saved = self.find_checkpoint()
        barrier()  # all have read what rank 0 may now delete
        if rank() == 0:
            self.open_log()
        barrier()

    def prepare(self, net):
        """Applies --dtype (to weights that are not trained), --checkpointing and --compile to a network."""
        cast_frozen(net, self.dtype)
        net.checkpointing = self.args.checkpointing
        for block in net.layers() if self.args.compile else []:
            block.forward = compiled(block.forward)

    def track(self, optimizer, **contents):
        """Names what a checkpoint must hold, things with a state_dict or plain values, and loads it when resuming."""
        self.contents = contents | dict(optimizer=optimizer)
        for name, value in self.contents.items():
            if self.saved and hasattr(value, "load_state_dict"):
                value.load_state_dict(self.saved[name])
        self.saved = None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients = Gradients(self.parameters, self.args.accumulate)
        self.bad = torch.zeros((), device=self.device)  # steps in a row whose gradient was not finite

    def autocast(self):
        return autocast(self.device, self.dtype)

    def backward(self, loss, **parts):
        """Adds the gradient of this part's share of the global mean of loss (b,). The `parts` (b,) are only logged."""
        self.gradients.next_part()
        (loss.sum() / self.args.batch_size).backward()
        for name, value in dict(loss=loss, **parts).items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float().sum() / self.args.batch_size

    def update(self, optimizer):
        """Sums the gradients over ranks, clips their norm to 1, and makes a step; the host waits for nothing here.
        A gradient that is not finite leaves weights and moments as they are (AdamW's found_inf)."""
        self.gradients.finish()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        self.bad = (self.bad + 1) * optimizer.found_inf
        optimizer.step()
        self.gradients.zero()
        self.sums["grad_norm"] = self.sums.get("grad_norm", 0) + norm / world_size()
        self.notes["lr"] = optimizer.param_groups[0]["lr"]

    def __iter__(self):
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.ask_to_stop)
        args, first, started = self.args, self.step, time.time()
        progress = Progress(self.out.name, args.steps, "steps", first)
        for step in range(first, args.steps):
            yield step
            self.count += 1
            done = step + 1
            if self.logs(step):
                rate = (done - first) * args.batch_size / (time.time() - started)
                line = self.write_averages(step=done, images_per_s=round(rate, 1))
                progress.update(done, f"loss {line['loss']:.4f}")
            stopping = self.agree_to_stop(done) and done < args.steps
            if stopping or done % args.save_every == 0 or done == args.steps:
                self.save(done)
            if stopping:
                raise Stopped(f"stopped by a signal at step {done} of {args.steps}; continue with --resume auto")

    def logs(self, step) -> bool:
        """Whether this step ends with a log line."""
        return (step + 1) % self.args.log_every == 0 or step + 1 == self.args.steps

    def note(self, **facts):
        """Adds to the next log line."""
        self.notes |= facts

    def say(self, text: str):
        if rank() == 0:
            print(text, flush=True)

    def write(self, **line):
        """Appends a line to log.jsonl."""
        if rank() == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def write_averages(self, step, **facts) -> dict:
        """Logs the averages over steps and ranks since the last line. The one place that waits for the device."""
        values = sum_over_ranks(torch.stack(list(self.sums.values())) / self.count).tolist()
        line = dict(step=step) | dict(zip(self.sums, values)) | facts | self.notes
        self.sums, self.count, self.notes = {}, 0, {}
        self.write(**line)
        if self.bad.item() >= 20:
            raise UserError(f"the gradient was not finite for {int(self.bad.item())} steps up to step {step}; lower "
                            "--lr or use --dtype float32")
        return line

    def ask_to_stop(self, *_):
        self.stop = True

    def agree_to_stop(self, step) -> bool:
        """Whether any rank was asked to stop. Ranks compare notes every tenth step, since that waits for the device."""
        if world_size() == 1:
            return self.stop
        return step % 10 == 0 and sum_over_ranks(torch.tensor(float(self.stop), device=self.device)).item() > 0

    def save(self, step):
        """Rank 0 writes step-*.pt and deletes the oldest beyond --keep."""
        if rank() == 0:
            contents = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in self.contents.items()}
            save_checkpoint(self.out / f"step-{step:08}.pt", **contents, step=step, args=self.fixed)
            for old in sorted(self.out.glob("step-[0-9]*.pt"))[: -self.args.keep]:
                old.unlink()
        barrier()

    def find_checkpoint(self):
        """The checkpoint that --resume asks for, or None. Rank 0 looks, so that all ranks take the same one.
        torchrun --max-restarts N means `auto`. (Its count of restarts is no guide: it stays when a node joins.)"""
        wish = self.args.resume
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            if wish not in (None, "auto"):
                raise UserError(f"with --resume {wish}, each of torchrun's restarts would start from there again; use "
                                "--resume auto, or another --out")
            wish = "auto"
        path = None if wish == "never" else on_rank_0(self.newest) if wish in ("auto", None) else Path(wish)
        if path is None:
            return None
        with reading(path):
            saved = read_torch(path)
            then, step = dict(saved["args"]), int(saved["step"])
        if wish is None:
            if step < then["steps"]:
                raise UserError(f"{self.out} holds a run that stopped at step {step} of {then['steps']}; "
                                "add --resume auto to go on, or --resume never to start anew")
            return None
        for k, now in self.fixed.items():
            if now != then.get(k):
                raise UserError(f"{path} belongs to a run with --{k.replace('_', '-')} {then.get(k)}, not {now}; "
                                "repeat its flags, choose another --out, or start anew with --resume never")
        self.step = step
        return saved

    def newest(self):
        """The newest step-*.pt that can be read; None if there is none at all."""
        paths = sorted(self.out.glob("step-[0-9]*.pt"), reverse=True)
        for path in paths:
            try:
                read_torch(path)
                return path
            except UserError as e:
                print(f"passed over: {e}", file=sys.stderr)
        if paths:
            raise UserError(f"no step-*.pt in {self.out} can be read; restore one, or choose another --out")

    def open_log(self):
        """A fresh run starts its folder anew; a resumed one drops the log lines that it will write again."""
        log = self.out / "log.jsonl"
        lines = log.read_text().splitlines() if self.saved and log.exists() else []
        lines = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may tear one
        lines = [json.dumps(line) + "\n" for line in lines if line["step"] <= self.step and "cut" not in line]
        atomic_write(log, lambda temporary: temporary.write_text("".join(lines)))
        for old in self.out.glob("step-[0-9]*.pt"):
            if int(old.stem[5:]) > self.step:
                old.unlink()

def compiled(forward):
    """torch.compile of a block. Its input is made contiguous first: of the patch embedding's transposed tokens, torch
    2.13's compiled backward pass on the CPU gives wrong gradients."""
    fast = torch.compile(forward)
    return lambda x, *conditions: fast(x.contiguous(), *conditions)

class Gradients:
    """The gradients of all parameters, summed over ranks while the backward pass still runs.
    Each rank's loss is divided by the global batch, so the sum is the gradient of the global mean. Gradients are views
    of buckets of about 2^25 numbers, the last parameters first, since the backward pass reaches those first. A bucket
    leaves when it is complete and all before it have left: in the same order on every rank, also where a rank has no
    gradient for a layer that its samples skip. (torch's DDP would search the graph for those at every step.)"""

    def __init__(self, parameters: list, parts: int, size: int = 2**25):
        self.parts, self.part, groups, room = parts, 0, [], 0
        for p in reversed(parameters):
            if room <= 0:
                groups, room = groups + [[]], size
            groups[-1].append(p)
            room -= p.numel()
        self.sizes, self.buckets = [len(group) for group in groups], []
        for i, group in enumerate(groups):
            self.buckets.append(torch.zeros(sum(p.numel() for p in group), device=group[0].device))
            for p, piece in zip(group, self.buckets[-1].split([p.numel() for p in group])):
                p.grad = piece.view_as(p)
                if world_size() > 1:
                    p.register_post_accumulate_grad_hook(lambda p, i=i: self.arrived(i))
        self.missing, self.sent = list(self.sizes), []

    def next_part(self):
        self.part += 1

    def arrived(self, i: int):
        """A gradient of bucket i is there; it is complete in the last part of an accumulated batch."""
        if self.part == self.parts:
            self.missing[i] -= 1
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self.send()

    def send(self):
        self.sent.append(dist.all_reduce(self.buckets[len(self.sent)], async_op=True))

    def finish(self):
        """Sends what is left, and waits for all."""
        while world_size() > 1 and len(self.sent) < len(self.buckets):
            self.send()
        for work in self.sent:
            work.wait()
        self.missing, self.sent, self.part = list(self.sizes), [], 0

    def zero(self):
        torch._foreach_zero_(self.buckets)

def sum_over_ranks(value):
    """The sum of the ranks' tensors."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value

def adamw(*groups):
    """AdamW without decay; groups: dicts of params and lr. Fused: one kernel, which can skip a step (found_inf)."""
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0, fused=True)

@torch.no_grad()
def ema_update(averages: list, values: list, decay: float, step: int):
    """averages <- decay * averages + (1 - decay) * values, decay warmed up as (1 + step) / (10 + step)."""
    torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + step) / (10 + step)))

def draw_losses(out: Path):
    """loss.png from log.jsonl: each logged loss over the steps, on a logarithmic axis."""
    lines = logged(out, "loss")
    if not lines:
        return (out / "loss.png").unlink(missing_ok=True)  # an earlier run's
    colours = dict(loss="#222222", diffusion="#1f77b4", kd="#d62728", rep="#2ca02c")
    names = [k for k in colours if k in lines[-1]]
    values = np.array([[line[k] for k in names] for line in lines], float)
    values = np.where(np.isfinite(values), values, 1.0).clip(1e-12)
    W, H, left, right, top, bottom, last = 900, 480, 80, 20, 40, 50, lines[-1]["step"]
    low, high = np.log(values.min()) - 0.07, np.log(values.max()) + 0.07
    x_of = lambda step: left + (W - left - right) * step / last
    y_of = lambda v: top + (H - top - bottom) * (high - np.log(v)) / (high - low)
    image = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(14)
    for v in np.geomspace(values.min(), values.max(), 6):
        draw.line([(left, y_of(v)), (W - right, y_of(v))], fill="#dddddd")
        draw.text((left - 8, y_of(v)), f"{v:.3g}", fill="black", anchor="rm")
    for step in np.linspace(0, last, 5):
        draw.text((x_of(step), H - bottom + 8), f"{step:.0f}", fill="black", anchor="ma")
    draw.text((W / 2, H - 18), "step", fill="black", anchor="ma")
    for j, name in enumerate(names):
        points = [(x_of(line["step"]), y_of(v)) for line, v in zip(lines, values[:, j])]
        draw.line(points if len(points) > 1 else points * 2, fill=colours[name], width=2)
        draw.line([(left + 150 * j, 20), (left + 150 * j + 20, 20)], fill=colours[name], width=3)
        draw.text((left + 150 * j + 26, 20), f"{name} {values[-1, j]:.4g}", fill=colours[name], anchor="lm")
    image.save(out / "loss.png")

if __name__ == "__main__":
    run_main(main)
