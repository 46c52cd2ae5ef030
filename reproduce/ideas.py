"""Ideas of one's own, in one file: criteria, a mask distribution, a loss on hidden states. Does any of them do better?

    python reproduce/ideas.py --criterion greedy --scheme 6:12 --out out/greedy       # the flags are prune.py's
    python reproduce/ideas.py distill --mode cosine --out out/cosine                  # the flags are distill.py's

greedy       removes one layer after another, each time the one whose removal leaves the least loss
shortlist    the 24 cuts that keep the most sensitive layers, each recovered for 20 steps; the least loss wins
gates        learns a Bernoulli gate for each layer instead of the N:M groups, with a penalty on the expected depth
cosine       a loss on hidden states: only the direction of each token's state has to be the teacher's

An idea that needs no code: --criterion learned --scheme 6:12, the paper's search without local groups.
"""
import collections
import copy
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill
import prune
from model import run_main
from prune import adamw, calibration_batches, calibration_loss, groups_of, losses_of_cuts

# ---------------------------------------------------------------------------------------------------------------------
# Another loss for the paper's search.


class Distilled:
    """An objective whose loss is the distillation loss: 0.9 of being like the uncut network, 0.1 of being right."""

    def __init__(self, objective, teacher):
        self.make_batch = objective.make_batch
        self.predict = objective.predict
        self.plain = objective
        self.teacher = teacher

    def loss(self, out, batch):
        with torch.no_grad():
            target = self.predict(self.teacher, batch)
        return 0.9 * self.plain.kd(out, target, batch) + 0.1 * self.plain.loss(out, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Another mask distribution, and another loss on hidden states.


class Gates(nn.Module):
    """A gate for each layer, open with probability sigmoid(100 logit). Any mask can be drawn: the penalty asks for the
    scheme's depth, and decide() keeps the likeliest N of each group."""

    def __init__(self, scheme, device, weight=1.0):
        super().__init__()
        self.scheme = scheme
        self.weight = weight
        self.depth = sum(n for n, _ in scheme)
        layers = sum(m for _, m in scheme)
        self.logits = nn.Parameter(torch.zeros(layers, device=device))

    def sample(self, rng, tau):
        u = rng.uniform(len(self.logits)).clamp(1e-6, 1 - 1e-6)
        noise = torch.log(u / (1 - u))  # logistic: the difference of two Gumbel variables
        scores = prune.LOGIT_SCALE * self.logits + noise  # (B, L)
        soft = torch.sigmoid(scores / tau)
        hard = (scores > 0).to(soft.dtype)
        return hard - soft.detach() + soft

    def penalty(self):
        expected = torch.sigmoid(prune.LOGIT_SCALE * self.logits).sum()
        return self.weight * ((expected - self.depth) / len(self.logits)) ** 2

    def keep_probability(self):
        return torch.sigmoid(prune.LOGIT_SCALE * self.logits).tolist()

    def decide(self):
        likeliest = self.logits.argsort(descending=True).tolist()
        kept = []
        for first, n, m in groups_of(self.scheme):
            group = [i for i in likeliest if first <= i < first + m]
            kept += group[:n]
        return sorted(kept)


def gates(net, objective, batches, scheme, args):
    return prune.search(net, objective, batches, Gates(scheme, args.device), args)


def cosine(student, teacher, args):
    """1 - cos, the mean over tokens: hidden states (B, T, D) of two matched layers -> (B,)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=2).mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Criteria that look at the loss of whole cuts.


def greedy(net, objective, batches, scheme, args):
    """57 losses for 12 -> 6, where all cuts are 924; no group falls below its N."""
    fixed = calibration_batches(objective, batches)
    kept = list(range(sum(m for _, m in scheme)))
    while len(kept) > sum(n for n, _ in scheme):
        cuts = []
        for first, n, m in groups_of(scheme):
            group = [i for i in kept if first <= i < first + m]
            if len(group) > n:
                for i in group:
                    cuts.append([k for k in kept if k != i])
        losses = losses_of_cuts(net, objective, fixed, cuts, args.dtype)
        kept = cuts[losses.index(min(losses))]
    return kept


def train(net, objective, batches, steps, optimizer, args):
    """A few steps on the objective's loss."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wait_for_gradients = prune.sum_gradients_over_ranks(parameters, args.accumulate)
    for step in steps:
        for part in range(args.accumulate):
            x, y, rng = batches(step, part)
            batch = objective.make_batch(x, y, rng)
            loss = objective.loss(objective.predict(net, batch), batch).sum() / args.batch_size
            loss.backward()
        wait_for_gradients()
        prune.clip_and_step(optimizer, parameters, collections.Counter())


def shortlist(net, objective, batches, scheme, args, count=24, steps=20):
    """Recovers the likeliest cuts for a moment, and keeps the one that has the least loss then.

    Right after a cut the loss says little of how well it will recover; after 20 steps it says a lot."""
    fixed = calibration_batches(objective, batches)
    rises = prune.leave_one_out(net, objective, fixed, args.dtype)
    scores = [math.log(max(rise, 1e-12)) for rise in rises]
    cuts = best_cuts(scores, scheme, count)
    objective = Distilled(objective, net)
    losses = []
    for kept in cuts:
        student = copy.deepcopy(net).train().requires_grad_(True)
        student.keep_layers(kept)
        train(student, objective, batches, range(steps), adamw(dict(params=list(student.parameters()), lr=1e-3)), args)
        losses.append(calibration_loss(student.eval(), objective.plain, fixed, args.dtype))
    prune.append_log(args, step=0, cuts=cuts, losses=losses)
    return cuts[losses.index(min(losses))]


def best_cuts(scores, scheme, count):
    """The cuts whose layers have the largest sum of scores. Group by group: of the beginnings only the best so many
    can lead to one of the best cuts."""
    cuts = [()]
    for first, n, m in groups_of(scheme):
        longer = []
        for beginning in cuts:
            longer += [beginning + kept for kept in itertools.combinations(range(first, first + m), n)]
        longer.sort(key=lambda cut: sum(scores[i] for i in cut), reverse=True)
        cuts = longer[:count]
    return cuts


prune.CRITERIA |= dict(greedy=greedy, shortlist=shortlist, gates=gates)
distill.HIDDEN_LOSSES["cosine"] = cosine

if __name__ == "__main__":
    stage = prune
    if sys.argv[1:2] == ["distill"]:
        del sys.argv[1]
        stage = distill
    parser = stage.make_parser()
    parser.description = __doc__
    run_main(lambda: stage.main(parser=parser))
