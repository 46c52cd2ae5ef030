"""Decides which layers of a diffusion transformer to keep, and removes the others. distill.py recovers the weights.

    python prune.py                                                       # digits: dit-tiny, 12 layers -> 6
    torchrun --nproc_per_node=8 prune.py --model dit-xl --scheme 1:2      # on ImageNet's latents
    python prune.py --criterion indices --layers 0,2,4,6,8,10             # a choice of your own
    python prune.py --ckpt out/distill/student.pt --out out/d7            # prunes a student again

A layer is a whole transformer block, attention and MLP. The cut that costs least at once need not be the one that
recovers best. TinyFusion (the paper) therefore asks for recoverability (eq. 2): it looks for the mask m under which a
fine-tuned network, weights W + dW, has the least loss. It learns a distribution p(m) and dW together (eq. 6),

    min over p(m) and dW of  E_x,m  loss(x, W + dW, m).

The L layers are divided into groups of M neighbours, each of which keeps N (eq. 3). A group has C(M, N) candidate masks
with one logit each. Every sample of the batch draws a candidate by Gumbel-softmax, through which the logits get
gradients. A cheap dW (LoRA) stands for the fine-tuning to come. In the end each group keeps its likeliest candidate,
dW is thrown away, and the kept layers are saved with their original weights.

Other criteria, to compare: bi, flux-lite and sensitivity score single layers; lowest-loss tries whole cuts; shortlist
recovers 24 likely cuts for a moment; oracle spreads the kept layers evenly and ignores the groups; random draws a cut;
indices takes --layers.

Writes to --out: shallow.pt, decision.png (the search over time), log.jsonl, and step-*.pt to resume from.

Read top to bottom; the search with its whole loop is `search`. A new pruning idea is one function and one line in
CRITERIA. At first, skip what follows `main`: what distill.py uses too.
"""
import argparse
import collections
import contextlib
import copy
import itertools
import json
import math
import re
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
    MODELS, Progress, RowGenerator, UserError, autocast, barrier, cast_frozen, choose_dtype, load_model,
    make_seed, network_of, rank, read_torch, remove_half, run_main, save_checkpoint, start_ranks, world_size)

# ---------------------------------------------------------------------------------------------------------------------
# Groups and their candidate masks.


def parse_scheme(text, depths):
    """ "2:4", or a list "3:4,3:4,2:4", -> [(N, M), ...], one entry for each group of M neighbours. M is the same for
    all groups, and a group lies in one of the network's lists of blocks. depths: the number of layers in each."""
    scheme = []
    for group in text.split(","):
        if not re.fullmatch("[0-9]+:[1-9][0-9]*", group):
            raise UserError(f"--scheme {text!r} is not understood; give N:M, like 1:2, or a list, like 3:4,2:4")
        n, size = group.split(":")
        scheme.append((int(n), int(size)))
    m = scheme[0][1]
    if len(scheme) == 1:  # 1:2 is short for 1:2,1:2,...
        scheme = scheme * (sum(depths) // m)
    sizes_fit = all(size == m and 1 <= n <= m for n, size in scheme)
    if not sizes_fit or any(depth % m for depth in depths) or m * len(scheme) != sum(depths):
        layers = " + ".join(map(str, depths))
        raise UserError(f"--scheme {text} does not fit; fill {layers} layers with groups N:M of one size M, and N from "
                        "1 to M")
    return scheme


def groups_of(scheme):
    """The first layer, N and M of each group."""
    first = 0
    for n, m in scheme:
        yield first, n, m
        first += m


def candidate_masks(n, m):
    """All ways to keep n of m layers, lexicographic by kept layers: (C(m, n), m) of 0 and 1."""
    count = math.comb(m, n)  # 6 for 2:4, and 3,432 for 7:14
    if count > 100_000:
        raise UserError(f"a {n}:{m} group has {count:,} candidate masks; give --scheme smaller groups")
    kept = torch.tensor(list(itertools.combinations(range(m), n)))  # (C(m, n), n)
    masks = torch.zeros(count, m)
    return masks.scatter(1, kept, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The draw.

LOGIT_SCALE = 100.0  # makes a learning rate of 1e-3 move the logits from exploring to a decision within an epoch


def draw_masks(logits, candidates, gumbel, tau, scaling=LOGIT_SCALE):
    """One candidate for each sample (eq. 4 and 5): logits (..., K), candidates (..., K, M), Gumbel noise (..., B, K)
    -> masks (..., B, M), choice (..., B); the leading dimensions are groups.

    The masks are 0 or 1; their gradient is that of the softmax (straight-through). tau shapes only this softmax: it is
    nearly flat at tau = 4 and nearly one-hot at 0.1. Which candidate is drawn, the one with the largest score, does
    not depend on tau. Exploring ends because the scaled logits grow apart."""
    scores = logits.unsqueeze(-2) * scaling + gumbel  # (..., B, K)
    soft = F.softmax(scores / tau, dim=-1)
    choice = soft.argmax(dim=-1)  # (..., B)
    hard = F.one_hot(choice, logits.shape[-1]).to(soft.dtype)
    straight_through = hard - soft.detach() + soft  # the value of hard, the gradient of soft
    return straight_through @ candidates, choice


class GroupMasks(nn.Module):
    """TinyFusion's distribution over masks: in each of the G groups, a logit for each of up to K candidates.

    Another distribution that `search` can learn is another nn.Module with these three methods, and penalty() if there
    is something to add to the loss."""

    def __init__(self, scheme, device="cpu"):
        super().__init__()
        of_groups = [candidate_masks(n, m) for n, m in scheme]  # each (C(M, N), M)
        G = len(scheme)
        K = max(len(candidates) for candidates in of_groups)
        M = scheme[0][1]
        # In a list like 3:4,2:4 some groups have fewer candidates. Those that only fill up are never drawn.
        candidates = torch.zeros(G, K, M)
        padding = torch.full((G, K), -math.inf)
        for g, own in enumerate(of_groups):
            candidates[g, : len(own)] = own
            padding[g, : len(own)] = 0.0
        self.register_buffer("candidates", candidates.to(device))
        self.register_buffer("padding", padding.to(device))
        # Equal logits: at the start all candidates are equally likely.
        self.logits = nn.Parameter(torch.full((G, K), 0.02, device=device))

    def sample(self, rng, tau):
        """Masks (B, L) of 0 and 1, one for each row of the RowGenerator, with a gradient for the logits."""
        G, K = self.logits.shape
        gumbel = torch.stack([rng.gumbel(K) for _ in range(G)])  # (G, B, K)
        masks, _ = draw_masks(self.logits + self.padding, self.candidates, gumbel, tau)  # (G, B, M)
        return masks.transpose(0, 1).flatten(1)  # the groups side by side: (B, L)

    def decide(self):
        """The layers to keep: the likeliest candidate of each group."""
        best = (self.logits + self.padding).argmax(dim=1)  # (G,) candidates
        groups = torch.arange(len(best), device=best.device)
        mask = self.candidates[groups, best].flatten()  # (L,)
        return mask.nonzero().flatten().tolist()

    def keep_probability(self):
        """For each layer, the probability that it is kept."""
        probability = F.softmax(self.logits * LOGIT_SCALE + self.padding, dim=1)  # (G, K)
        # A layer is kept by some of its group's candidates: the sum of their probabilities.
        return (probability[:, None] @ self.candidates).flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The masked layer: first as a formula, then as it runs.


class DenseMaskedLayer(nn.Module):
    """m * block(x) + (1 - m) * x (eq. 1), with a mask m of its own for each sample. Right for any m."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *conditions):
        """x (B, T, D), conditions of B rows, as the block takes them -> (B, T, D)."""
        m = self.mask.view(-1, 1, 1)  # (B,) -> (B, 1, 1)
        return m * self.block(x, *conditions) + (1 - m) * x


class MaskedLayer(DenseMaskedLayer):
    """The same output and gradients for less work, where every m is 0 or 1.

    Where m is 0 no gradient flows back through the block, neither to its weights nor to its input: block(x) is needed
    only as a number, for the gradient of m. Those samples go through the block without autograd. At 1:2 this saves a
    third of a step with --delta-w full, a quarter with LoRA."""

    def forward(self, x, *conditions):
        """As DenseMaskedLayer, with the rows that `set_masks` put into self.on and self.off."""
        out = torch.empty_like(x)  # block(x), put together from two parts
        # The samples that skip the layer. There may be none, and a block need not take an empty batch.
        if len(self.off):
            with torch.no_grad():
                out[self.off] = self.block(*rows(self.off, x, *conditions)).to(x.dtype)
        # The samples that use it.
        out[self.on] = self.block(*rows(self.on, x, *conditions)).to(x.dtype)
        m = self.mask.view(-1, 1, 1)
        return m * out + (1 - m) * x


def rows(index, *values):
    return [v.index_select(0, index) for v in values]


def set_masks(layers, masks):
    """Gives each of the L masked layers its masks (B,) of this batch, and the indices of the samples that use the layer
    (on) and skip it (off). masks: (B, L), on the device of the network."""
    values = masks.detach().cpu()  # the host waits for the device here, once in a batch
    if (values - values.round()).abs().max() > 1e-3:  # straight-through may miss 1 by a rounding error
        raise ValueError("a MaskedLayer takes masks of 0 and 1; for others use DenseMaskedLayer")
    for i, layer in enumerate(layers):
        on = (values[:, i] > 0.5).nonzero().flatten()
        off = (values[:, i] < 0.5).nonzero().flatten()
        if len(on) == 0:
            # One sample takes part in autograd all the same. With m = 0 its gradient is zero, but it is there:
            # ranks that sum their gradients must have gradients for the same weights.
            on = off[:1]
            off = off[1:]
        layer.mask = masks[:, i]
        layer.on = on.to(masks.device, non_blocking=True)
        layer.off = off.to(masks.device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# The weight update dW.


class LoRALinear(nn.Module):
    """A frozen Linear plus alpha / r * B A x (eq. 7; Hu et al. 2022). B starts at zero, so dW does."""

    def __init__(self, linear, r, alpha):
        super().__init__()
        self.linear = linear  # W
        self.scale = alpha / r
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(r, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        update = F.linear(F.linear(x, self.lora_a), self.lora_b)  # from D_in to r to D_out
        return self.linear(x) + update * self.scale


def add_delta_w(net, kind, r=8):
    """Makes dW trainable, all else frozen: "lora" on every Linear, "full" for all weights, "frozen" for none.

    -> its parameters."""
    net.requires_grad_(kind == "full")
    if kind == "lora":
        for module in list(net.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):  # of attention, MLP, modulation, embeddings and head
                    setattr(module, name, LoRALinear(child, r, alpha=2 * r))
    return [p for p in net.parameters() if p.requires_grad]


# ---------------------------------------------------------------------------------------------------------------------
# The search.


def learned(net, objective, batches, scheme, args):
    """TinyFusion's criterion."""
    return search(net, objective, batches, GroupMasks(scheme, args.device), args)


def search(net, objective, batches, masks, args):
    """Learns the distribution `masks` (lr 1e-3) and dW (lr 1e-4) together, as in the authors' released code.

    -> the layers to keep. The loss is the network's own training loss: no teacher takes part. The network stays in eval
    mode: MAR's dropout (the paper says nothing of it) would add noise to the comparison of the masks."""
    torch.manual_seed(make_seed(args.seed, 2))  # LoRA's A
    delta = add_delta_w(net, args.delta_w)
    cast_frozen(net, args.dtype)
    layers = [MaskedLayer(block) for block in net.layers()]
    net.replace_layers(layers)  # from now on net(x, ...) is the masked network
    average = copy.deepcopy(masks).requires_grad_(False)  # the moving average of the logits, which decides

    optimizer = adamw(dict(params=list(masks.parameters()), lr=1e-3), dict(params=delta, lr=1e-4))
    parameters = [*masks.parameters(), *delta]
    wait_for_gradients = sum_gradients_over_ranks(parameters, args.accumulate)
    state = dict(masks=masks, average=average, delta=nn.ParameterList(delta), optimizer=optimizer)
    step = resume(args, state)  # 0, or where a killed run left off
    progress = Progress("prune", args.steps, "steps", step)
    sums = collections.defaultdict(float)  # of what is logged, since the last log line

    while step < args.steps:
        tau = 4 + (0.1 - 4) * step / args.steps  # the softmax behind the gradient: from flat to one-hot
        for part in range(args.accumulate):
            x, y, rng = batches(step, part)  # this rank's rows of the global batch
            batch = objective.make_batch(x, y, rng)
            set_masks(layers, masks.sample(rng, tau))
            with autocast(args.device, args.dtype):
                out = objective.predict(net, batch)
                loss = objective.loss(out, batch).sum() / args.batch_size
            sums["loss"] += loss.detach()
            if hasattr(masks, "penalty"):  # a share of it in each part and on each rank
                penalty = masks.penalty() / (args.accumulate * world_size())
                sums["penalty"] += penalty.detach()
                loss = loss + penalty
            loss.backward()  # each gradient is summed over ranks as soon as it is there
        wait_for_gradients()
        clip_and_step(optimizer, parameters, sums)  # moves logits and dW together
        ema_update(average, masks, 0.999, step)
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            kept = average.decide()
            confidence = [round(p, 4) for p in average.keep_probability()]
            log(args, step, sums, progress, kept=kept, confidence=confidence)
            say("keep " + " ".join(f"{i}({100 * confidence[i]:.0f}%)" for i in kept))
        if step % args.save_every == 0 or step == args.steps:
            save(args, step, state)
    return average.decide()


# ---------------------------------------------------------------------------------------------------------------------
# The loss after a cut, and other papers' criteria: (net, objective, batches, scheme, args) -> the layers to keep.


def calibration_batches(objective, batches):
    """This rank's share of 256 fixed samples, times and noises: the same for every cut, criterion and seed."""
    count = min(256, len(batches.latents))
    # About 32 samples at a time, whatever the batch size of the training.
    parts = max(1, count // 32 // world_size())
    fixed = Batches(batches.latents, count, parts, seed=2025, device=batches.device)
    return [objective.make_batch(*fixed(0, part)) for part in range(parts)]


@torch.no_grad()
def calibration_loss(net, objective, fixed, dtype=torch.float32):
    """The mean training loss over fixed batches; of a cut network, table 3's calibration loss."""
    losses = []
    for batch in fixed:
        device = next(iter(batch.values())).device
        with autocast(device, dtype):
            losses.append(objective.loss(objective.predict(net, batch), batch))
    losses = torch.cat(losses).double()  # one for each sample of this rank
    total = torch.stack([losses.sum(), losses.new_tensor(len(losses))])
    loss, count = sum_over_ranks(total).tolist()
    return loss / count


@contextlib.contextmanager
def keeping(net, kept):
    """Inside the `with`, the network has only these layers."""
    lists = {name: getattr(net, name) for name in net.block_lists}
    before = net.kept
    net.keep_layers(kept)
    try:
        yield
    finally:
        net.kept = before
        for name, blocks in lists.items():
            setattr(net, name, blocks)


@torch.no_grad()
def mean_scores(net, objective, batches, args, measure):
    """For every layer the mean of measure(input, output) (B,) over fixed batches; input and output are (B, T, D)."""
    layers = net.layers()
    sums = torch.zeros(len(layers), dtype=torch.float64, device=args.device)

    def add(layer, inputs, out):
        hidden = inputs[0].float()
        sums[layers.index(layer)] += measure(hidden, out.float()).sum()

    hooks = [layer.register_forward_hook(add) for layer in layers]
    # Only for its forward passes, which call the hooks.
    calibration_loss(net, objective, calibration_batches(objective, batches), args.dtype)
    for hook in hooks:
        hook.remove()
    return (sum_over_ranks(sums) / min(256, len(batches.latents))).tolist()


def keep_best(scores, scheme, args):
    """The N layers of each group that score highest. A score that is not a number counts as the highest: without that
    layer the loss is not even a number."""
    say("scores " + " ".join(f"{i}({score:.4g})" for i, score in enumerate(scores)))
    append_log(args, step=0, scores=scores)
    best_first = np.argsort(scores)[::-1].tolist()  # numpy sorts NaN last, so here it is first
    kept = []  # in order: group by group
    for first, n, m in groups_of(scheme):
        group = [i for i in best_first if first <= i < first + m]
        kept += sorted(group[:n])
    return kept


def block_influence(net, objective, batches, scheme, args):
    """ShortGPT (Men et al. 2024): a layer's score is how far it turns the hidden state, 1 - cos(input, output)."""

    def turn(x, out):
        return 1 - F.cosine_similarity(x, out, dim=-1).mean(1)

    return keep_best(mean_scores(net, objective, batches, args, turn), scheme, args)


def flux_lite(net, objective, batches, scheme, args):
    """Flux.1 Lite (Verdu & Martin 2024): a layer's score is how much it changes the state, MSE(input, output)."""

    def change(x, out):
        return (out - x).square().mean(dim=(1, 2))

    return keep_best(mean_scores(net, objective, batches, args, change), scheme, args)


def losses_of_cuts(net, objective, fixed, cuts, dtype=torch.float32):
    """The loss over fixed batches right after each cut, a list of the layers to keep."""
    progress = Progress("loss after a cut", len(cuts), "cuts")
    losses = []
    for kept in cuts:
        with keeping(net, kept):
            losses.append(calibration_loss(net, objective, fixed, dtype))
        progress.update(len(losses))
    return losses


def leave_one_out(net, objective, fixed, dtype=torch.float32):
    """For every layer, how much the loss over fixed batches rises when this layer alone is left out."""
    layers = list(range(sum(net.depths())))
    cuts = [layers]
    for i in layers:
        cuts.append(layers[:i] + layers[i + 1 :])
    all_kept, *without_one = losses_of_cuts(net, objective, fixed, cuts, dtype)
    return [loss - all_kept for loss in without_one]


def sensitivity(net, objective, batches, scheme, args):
    """A layer's score is how much the loss rises when this layer alone is left out."""
    rises = leave_one_out(net, objective, calibration_batches(objective, batches), args.dtype)
    return keep_best(rises, scheme, args)


def oracle(net, objective, batches, scheme, args):
    """BK-SDM (Kim et al. 2023): in each list of layers keep the first, the last, and evenly spread ones between.
    It knows no groups: `main` gives it each list of layers as one group."""
    kept = []
    for first, n, m in groups_of(scheme):
        kept += [first + round(v) for v in np.linspace(0, m - 1, n)]
    return kept


def lowest_loss(net, objective, batches, scheme, args):
    """The paper's table 3: of all cuts, or of --candidates random ones, the one with the least loss right after it."""
    total = math.prod(math.comb(m, n) for n, m in scheme)
    if total <= args.candidates:
        # All ways to keep n layers of each group, and then all combinations of these ways.
        of_groups = [itertools.combinations(range(first, first + m), n) for first, n, m in groups_of(scheme)]
        cuts = [list(itertools.chain(*choice)) for choice in itertools.product(*of_groups)]
    else:
        rng = np.random.default_rng(make_seed(args.seed, 4))
        cuts = [random_cut(scheme, rng) for _ in range(args.candidates)]  # some may be alike
    losses = losses_of_cuts(net, objective, calibration_batches(objective, batches), cuts, args.dtype)
    append_log(args, step=0, cuts=cuts, losses=losses)
    say(f"losses of {len(cuts):,} of {total:,} cuts: {min(losses):.4f} to {max(losses):.4f}")
    return cuts[np.nanargmin(losses)]  # a loss may be NaN


def random_cut(scheme, rng):
    kept = []
    for first, n, m in groups_of(scheme):
        chosen = sorted(rng.choice(m, n, replace=False))
        kept += [int(first + i) for i in chosen]
    return kept


def shortlist(net, objective, batches, scheme, args, count=24, steps=20):
    """Ours, not the paper's: recovers some likely cuts for a moment, and keeps the one that has the least loss then.

    Right after a cut, the loss says little about how well the cut will recover. After 20 steps it says a lot. The cuts
    are those with the largest product of sensitivities. docs/evidence.md compares it with the search."""
    fixed = calibration_batches(objective, batches)
    rises = leave_one_out(net, objective, fixed, args.dtype)
    cuts = most_sensitive_cuts(rises, scheme, count)
    progress = Progress("short recoveries", len(cuts), "cuts")
    losses = []
    for kept in cuts:
        student = copy.deepcopy(net)  # with all layers, for a moment
        student.keep_layers(kept)
        recover_briefly(student, net, objective, batches, args, steps)
        losses.append(calibration_loss(student, objective, fixed, args.dtype))
        progress.update(len(losses))
    append_log(args, step=0, cuts=cuts, losses=losses)
    return cuts[np.nanargmin(losses)]


def most_sensitive_cuts(rises, scheme, count):
    """The cuts whose layers have the largest product of rises of the loss, the largest first."""
    # A layer without which the loss is not a number counts most; one that does not help, hardly at all.
    scores = np.log(np.clip(np.nan_to_num(rises, nan=1e9), 1e-12, None))
    cuts = [[]]
    for first, n, m in groups_of(scheme):
        longer = []
        for mask in candidate_masks(n, m):
            kept = (first + mask.nonzero().flatten()).tolist()
            longer += [beginning + kept for beginning in cuts]
        longer.sort(key=lambda cut: scores[cut].sum(), reverse=True)
        cuts = longer[:count]  # only the best beginnings can lead to the best cuts
    return cuts


def recover_briefly(student, teacher, objective, batches, args, steps):
    """A few steps of distillation on outputs alone: 0.9 L_KD + 0.1 L_Diff, as with distill.py --mode logits-kd."""
    parameters = list(student.parameters())
    optimizer = adamw(dict(params=parameters, lr=MODELS[student.name]["distill"]["lr"]))
    wait_for_gradients = sum_gradients_over_ranks(parameters, args.accumulate)
    for step in range(steps):
        for part in range(args.accumulate):
            x, y, rng = batches(step, part)
            batch = objective.make_batch(x, y, rng)
            with autocast(args.device, args.dtype):
                out = objective.predict(student, batch)
                with torch.no_grad():  # the teacher is the uncut network
                    out_teacher = objective.predict(teacher, batch)
                loss = 0.9 * objective.kd(out, out_teacher, batch) + 0.1 * objective.loss(out, batch)
                loss = loss.sum() / args.batch_size
            loss.backward()
        wait_for_gradients()
        clip_and_step(optimizer, parameters, collections.Counter())


def random_layers(net, objective, batches, scheme, args):
    """N of each group at random: the baseline that every criterion has to beat."""
    return random_cut(scheme, np.random.default_rng(make_seed(args.seed, 3)))


def indices(net, objective, batches, scheme, args):
    """The layers named by --layers."""
    return sorted(args.layers)


CRITERIA = {
    "learned": learned,
    "bi": block_influence,
    "flux-lite": flux_lite,
    "sensitivity": sensitivity,
    "oracle": oracle,
    "lowest-loss": lowest_loss,
    "shortlist": shortlist,
    "random": random_layers,
    "indices": indices,
}
# These choose without data. Without latents the loss after the cut is not measured.
NEED_NO_LATENTS = ("oracle", "random", "indices")


def check_kept(kept, scheme):
    """What a criterion returned, as sorted ints: N different layers of each group, or a UserError."""
    try:
        kept = sorted(int(i) for i in kept)
    except TypeError as e:
        raise UserError(f"a criterion must return the indices of the layers to keep, not {kept!r}") from e
    depth = sum(m for _, m in scheme)
    outside = [i for i in kept if not 0 <= i < depth]
    if outside or len(set(kept)) < len(kept):
        raise UserError(f"the layers to keep, {kept}, must be distinct and from 0 to {depth - 1}; change --layers or "
                        "the criterion")
    for first, n, m in groups_of(scheme):
        count = sum(first <= i < first + m for i in kept)
        if count != n:
            raise UserError(f"{count} of the layers {first} to {first + m - 1} are to be kept, and --scheme says {n} "
                            f"of {m}; change one of the two")
    return kept


@torch.no_grad()
def check_family(net):
    """Checks, before a long run relies on it, that a network does what `Prunable` asks (model.py): masking a layer
    gives the same output as cutting it, and so does a saved network that is loaded. No weight is copied."""
    device = next(net.parameters()).device
    layers = net.layers()
    left_out = []  # the second layer of each list
    first = 0
    for depth in net.depths():
        if depth > 1:
            left_out.append(first + 1)
        first += depth
    others = [i for i in range(len(layers)) if i not in left_out]
    try:
        objective = net.objective()
        rng = RowGenerator((0,), 0, 2, 2, device)
        x = rng.normal(net.channels, net.input_size, net.input_size)
        batch = objective.make_batch(x, torch.zeros(2, dtype=torch.long, device=device), rng)

        masks = torch.ones(2, len(layers), device=device)
        masks[:, left_out] = 0
        masked = [MaskedLayer(block) for block in layers]
        net.replace_layers(masked)
        set_masks(masked, masks)
        expected = objective.predict(net, batch)
        net.replace_layers(layers)
        with keeping(net, others):
            cut = objective.predict(net, batch)
            loaded_net = network_of(net.name, net.state_dict(), net.kept)
        loaded = objective.predict(loaded_net, batch)
    except Exception as e:
        raise UserError(f"{type(net).__name__} fails the check of what `Prunable` in model.py asks for ({e!r})") from e
    for what, out in (("cut", cut), ("saved and loaded", loaded)):
        if not torch.allclose(out, expected, rtol=1e-3, atol=1e-4):
            raise UserError(f"{type(net).__name__} without layers {left_out} gives another output when it is {what} "
                            "than when they are masked; let it use the layers' original_indices()")


# ---------------------------------------------------------------------------------------------------------------------
# The cut. With --granularity sublayer a layer is half a block, an attention or an MLP.


def prune_layers(args, scheme, kept):
    """-> the original network, read anew, with only the kept layers; its config."""
    net, old = load_model(args.model, args.ckpt, args.device)  # the search has changed the weights of its network
    if args.granularity == "sublayer":
        split_layers(net)
    net.keep_layers(kept)
    config = dict(
        name=old["name"], depth=net.depths(), kept=kept, layers=net.kept, scheme=[list(group) for group in scheme],
        granularity=args.granularity, parent=args.ckpt or old["name"], criterion=args.criterion)
    return net, config


def split_layers(net):
    """From now on the network's layers are halves of blocks: an attention, then its MLP. The output stays the same.
    They stay halves in files, too: `network_of` (model.py) sees from the weights what a block has."""
    for name in net.block_lists:
        layers = []
        for block in getattr(net, name):
            if block.attn is None or block.mlp is None:
                layers.append(block)  # a student's, which is a half already
            else:
                attention = copy.deepcopy(block)  # loses its MLP, the original its attention
                remove_half(attention, "mlp")
                remove_half(block, "attn")
                layers += [attention, block]
        setattr(net, name, nn.ModuleList(layers))
    net.kept = None  # halves have another numbering


# ---------------------------------------------------------------------------------------------------------------------
# The picture.


def draw_decision(out):
    """decision.png from log.jsonl: a row for each layer, time to the right; the darker, the likelier to be kept."""
    lines = [line for line in read_log(out) if "kept" in line]
    if not lines:
        return
    probability = np.array([line["confidence"] for line in lines]).T  # (layers, lines)
    shades = Image.fromarray((255 * (1 - probability)).astype(np.uint8))
    row = 22  # pixels
    width = 600
    height = row * len(probability)
    left = 80  # of the picture's corner
    top = 34
    image = Image.new("L", (width + 190, height + 80), "white")
    image.paste(shades.resize((width, height), Image.NEAREST), (left, top))
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(14)
    draw.text((left, 10), "which layers the search keeps; darker: more likely to be kept")
    for i, p in enumerate(probability[:, -1]):
        y = top + row * i
        draw.line([(left, y), (left + width, y)], fill="white", width=4)
        draw.text((left - 8, y + 11), f"layer {i}", anchor="rm")
        if i in lines[-1]["kept"]:
            draw.text((left + width + 8, y + 11), f"keep {100 * p:.0f} %", anchor="lm")
    draw.text((left, top + height + 8), f"step {lines[0]['step']}")
    draw.text((left + width, top + height + 8), f"step {lines[-1]['step']}", anchor="ra")
    image.save(out / "decision.png")


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def layer_list(text):
    return [int(v) for v in text.split(",")]


def make_parser():
    """The flags. A flag left at None takes the value of the model's recipe (model.py)."""
    description = __doc__.split("\n\nRead top")[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to cut, and how to choose").add_argument
    add("--model", help=f"one of {', '.join(MODELS)} (default: dit-tiny, or what --ckpt holds)")
    add("--ckpt", help="its weights, instead of the official or bundled ones; or a student, to prune again")
    add("--scheme", default="1:2", help="keep N of each M neighbouring layers; or a list, 3:4,2:4,... with one entry "
        "for each group (default: %(default)s)")
    add("--granularity", choices=["block", "sublayer"], default="block", help="what a layer is: a whole block, or its "
        "attention and its MLP each, twice as many (default: %(default)s)")
    add("--criterion", choices=CRITERIA, default="learned", help="how to choose (default: %(default)s)")
    add("--layers", type=layer_list, help="criterion indices: the layers to keep, from 0; --scheme 6:12 "
        "allows any 6 of 12")
    add("--candidates", type=int, default=1000, help="criterion lowest-loss: how many random cuts to try, or "
        "all if there are no more (default: %(default)s)")
    add("--delta-w", choices=["lora", "full", "frozen"], default="lora", help="criterion learned: what is trained with "
        "the masks (default: %(default)s)")
    add("--out", default="out/prune", help="a folder (default: %(default)s)")
    add_training_arguments(parser)
    return parser


def main(argv=None, parser=None):
    """Search, cut, measure the loss after the cut, draw. parser: make_parser() with flags of your own criterion."""
    parser = parser or make_parser()
    args = parser.parse_args(argv)
    if (args.layers is not None) != (args.criterion == "indices"):
        raise UserError("--layers I,J,... and --criterion indices go together; give both or neither")
    if not args.model and not args.ckpt:
        args.model = "dit-tiny"
    start_run(args)
    net, config = load_model(args.model, args.ckpt, args.device)
    if args.granularity == "sublayer":
        split_layers(net)
    scheme = parse_scheme(args.scheme, net.depths())
    if args.criterion == "oracle":  # it ignores groups
        scheme = oracle_scheme(scheme, net.depths())
    check_family(net)
    objective = net.objective()
    batches = None  # without latents
    if args.criterion not in NEED_NO_LATENTS or Path(args.latents, "meta.json").exists():
        latents = Latents(args.latents)
        check_fit(net, latents, args.latents)
        fill_recipe(args, MODELS[config["name"]]["prune"], len(latents))
        batches = Batches(latents, args.batch_size, args.accumulate, args.seed, args.device)
    resume(args, {})  # an error if --out holds a search with other flags
    say(f"{args.criterion}: {config['name']}, {sum(net.depths())} layers, on {args.device} in {args.dtype}")

    kept = CRITERIA[args.criterion](net, objective, batches, scheme, args)
    kept = check_kept(kept, scheme)  # a criterion may be your own
    shallow, config = prune_layers(args, scheme, kept)
    loss = None
    if batches:
        loss = calibration_loss(shallow, objective, calibration_batches(objective, batches), args.dtype)
    append_log(args, step=args.steps or 0, cut=kept, calibration_loss=loss)
    if rank() == 0:
        # The DiT release's scripts look for `ema`. torch stores the same tensors once.
        weights = shallow.state_dict()
        config["calibration_loss"] = loss
        if batches:
            config |= latents.facts()
        save_checkpoint(args.out / "shallow.pt", model=weights, ema=weights, config=config, step=0)
        draw_decision(args.out)
    size = sum(p.numel() for p in shallow.parameters()) / 1e6
    measured = "not measured (no latents)" if loss is None else f"{loss:.4f}"
    say(f"keep layers {' '.join(map(str, kept))} of {sum(net.depths())}; {size:.2f} M parameters; "
        f"loss after the cut {measured}; wrote {args.out}/shallow.pt")


def oracle_scheme(scheme, depths):
    """The same number of layers, with each list of layers as one group."""
    lists = []
    first = 0
    for depth in depths:
        n = sum(n for start, n, _ in groups_of(scheme) if first <= start < first + depth)
        lists.append((n, depth))
        first += depth
    return lists


# ---------------------------------------------------------------------------------------------------------------------
# What both training stages use: flags; resume, save, log; summing gradients; a step; moving averages.


def add_training_arguments(parser):
    """The flags that prune.py and distill.py share."""
    add = parser.add_argument_group("training").add_argument
    add("--latents", default="out/latents", help="folder that extract_latents.py wrote (default: %(default)s)")
    add("--batch-size", type=int, help="global batch, shared out over ranks (default: the model's, see model.py)")
    add("--steps", type=int, help="optimiser steps of the whole run (default: the model's)")
    add("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    add("--resume", choices=["auto", "never"], default="auto", help="auto goes on from the newest step-*.pt of --out, "
        "if there is one; never starts anew (default: %(default)s)")
    add("--save-every", type=int, help="steps between step-*.pt checkpoints (default: the model's)")
    add("--keep", type=int, default=2, help="how many of the newest step-*.pt to keep (default: %(default)s)")
    add("--log-every", type=int, default=20, help="steps between log lines (default: %(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the forward pass; auto: bfloat16 "
        "where the hardware has it (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="parts that each rank's batch is computed in, to save memory "
        "(default: %(default)s)")


# Flags that a resumed run may change. All others are stored in its checkpoints and compared.
FREE = ("out", "latents", "resume", "save_every", "keep", "log_every", "device", "dtype", "accumulate")


def start_run(args):
    """Turns --device, --dtype and --out into what they name. For a run that starts anew, removes the checkpoints, log
    and pictures of an earlier one from --out."""
    args.device = start_ranks(args.device)
    args.dtype = choose_dtype(args.dtype, args.device)
    args.out = Path(args.out)
    if rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in args.out.glob(".*.tmp"):
            left_by_a_kill.unlink()
        if args.resume == "never" or not checkpoints(args.out):  # nothing to go on from
            for old in [*checkpoints(args.out), *args.out.glob("log.jsonl"), *args.out.glob("*.png")]:
                old.unlink()
    barrier()  # no rank looks for checkpoints before this


def fill_recipe(args, recipe, images):
    """Puts the recipe's values where the user gave none; and turns its epochs into steps."""
    for key, value in recipe.items():
        if key != "epochs" and getattr(args, key) is None:
            setattr(args, key, value)
    if args.steps is None:
        args.steps = max(1, round(recipe["epochs"] * images / args.batch_size))


def checkpoints(out):
    return sorted(out.glob("step-[0-9]*.pt"))


def compared_flags(args):
    return {key: value for key, value in vars(args).items() if key not in FREE}


def resume(args, state):
    """Loads the newest checkpoint of --out, if there is one, into the objects of `state`; -> its step, else 0."""
    found = checkpoints(args.out)
    if not found:
        return 0
    saved = read_torch(found[-1])  # the newest; it is whole, since files are renamed when they are complete
    for key, now in compared_flags(args).items():
        before = saved["args"].get(key)
        if now != before:
            raise UserError(f"{found[-1]} belongs to a run with --{key.replace('_', '-')} {before}, not {now}; repeat "
                            "its flags, choose another --out, or start anew with --resume never")
    for name, value in state.items():
        value.load_state_dict(saved[name])
    return saved["step"]


def save(args, step, state, **more):
    """Rank 0 writes step-*.pt, and keeps the newest ones."""
    if rank() == 0:
        contents = {name: value.state_dict() for name, value in state.items()}
        path = args.out / f"step-{step:08}.pt"
        save_checkpoint(path, **contents, **more, step=step, args=compared_flags(args))
        newest_first = checkpoints(args.out)[::-1]
        for old in newest_first[args.keep :]:
            old.unlink()
    barrier()


def log(args, step, sums, progress, **facts):
    """Logs the mean of `sums` per step, and empties it. Each rank has summed its share. The host waits for the device
    here."""
    steps = sums.pop("steps")  # since the last log line
    values = torch.tensor([float(value) for value in sums.values()], device=args.device) / steps
    averages = dict(zip(sums, sum_over_ranks(values).tolist()))
    sums.clear()
    rate = (step - progress.first) * args.batch_size / (time.time() - progress.start)
    append_log(args, step=step, **averages, images_per_s=round(rate, 1), **facts)
    progress.update(step, f"loss {averages['loss']:.4f}")
    if averages["skipped"] > 0.99:
        raise UserError(f"in the {steps:.0f} steps up to step {step} the gradient was never finite; use --dtype "
                        "float32, or a lower --lr in distill.py")


def append_log(args, **line):
    if rank() == 0:
        with open(args.out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")


def read_log(out):
    """The lines of log.jsonl, with those of one step merged: `main` adds to the last step, and a run that was killed
    wrote some steps twice."""
    lines = {}
    for text in (out / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.setdefault(line["step"], {}).update(line)
    return [lines[step] for step in sorted(lines)]


def say(text):
    if rank() == 0:
        print(text, flush=True)


def sum_over_ranks(value):
    """The sum of the ranks' tensors, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def sum_gradients_over_ranks(parameters, accumulate):
    """From now on each gradient is summed over ranks as soon as the backward pass has it, in the last part of an
    accumulated batch; -> a function that waits for all sums. As the loss is divided by the global batch, a sum is the
    gradient of the global mean. All ranks must have gradients for the same parameters, which come in the same order."""
    pending = []
    arrivals = collections.Counter()  # by id: nothing here keeps a parameter alive

    def arrived(parameter):
        arrivals[id(parameter)] += 1  # its gradient is complete in the last part
        if arrivals[id(parameter)] % accumulate == 0:
            pending.append(dist.all_reduce(parameter.grad, async_op=True))

    if world_size() > 1:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    def wait():
        for work in pending:
            work.wait()
        pending.clear()

    return wait


def adamw(*groups):
    """AdamW without weight decay; groups: dicts of params and lr. Fused: one kernel, which can skip a step."""
    groups = [group for group in groups if group["params"]]  # with --delta-w frozen there is no dW
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def clip_and_step(optimizer, parameters, sums):
    """Clips the gradient's norm to 1 and takes a step, or skips it if the gradient is not finite."""
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)  # the same on all ranks
    skipped = (~norm.isfinite()).float()
    optimizer.found_inf = skipped  # fused AdamW reads it on the device: the host need not wait to know
    optimizer.step()
    optimizer.zero_grad()
    sums["grad_norm"] += norm / world_size()  # this rank's share: `log` sums over ranks
    sums["skipped"] += skipped / world_size()
    sums["steps"] += 1


@torch.no_grad()
def ema_update(average, net, decay, step):
    """average <- decay * average + (1 - decay) * net, for all parameters."""
    decay = min(decay, (1 + step) / (10 + step))  # at first the average forgets faster
    weight = 1 - decay
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), weight)


if __name__ == "__main__":
    run_main(main)
