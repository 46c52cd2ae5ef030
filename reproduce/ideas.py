"""Rivals of the paper's search, each a criterion of prune.py: does any of them choose better, at no more cost?

    python reproduce/ideas.py --criterion greedy --scheme 6:12 --out out/greedy       # the flags are prune.py's

distilled    the paper's search, on the distillation loss of the uncut network instead of the diffusion loss
greedy       removes one layer after another, each time the one whose removal leaves the least loss
adapted      trains LoRA under masks drawn uniformly for 200 steps, then takes the cut of the least loss with it
halving      the eight cuts of the least loss, fine-tuned for 10 steps; the better half for 10 more; and once more

The fifth idea needs no code: --criterion learned --scheme 6:12, the paper's search free of the 1:2 grid.
"""
import copy
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prune
from model import make_seed, run_main
from prune import calibration, calibration_loss, groups_of, keeping


class Distilled:
    """An objective whose loss is the distillation loss: 0.9 of being like the uncut network, 0.1 of being right."""

    def __init__(self, objective, teacher):
        self.make_batch, self.predict, self.inner, self.teacher = objective.make_batch, objective.predict, objective, teacher

    def loss(self, out, batch):
        with torch.no_grad():
            target = self.predict(self.teacher, batch)
        return 0.9 * self.inner.kd(out, target, batch) + 0.1 * self.inner.loss(out, batch)


def distilled(net, objective, batches, scheme, run) -> list:
    """The paper's search on another loss."""
    return prune.learned(net, Distilled(objective, copy.deepcopy(net)), batches, scheme, run)


def greedy(net, objective, batches, scheme, run) -> list:
    """57 losses for 12 -> 6, where all cuts are 924; no group falls below its N."""
    draws, group = calibration(objective, batches), [g for g, (_, m) in enumerate(scheme) for _ in range(m)]
    kept = list(range(len(group)))
    while len(kept) > sum(n for n, _ in scheme):
        spare, losses = [i for i in kept if sum(group[k] == group[i] for k in kept) > scheme[group[i]][0]], {}
        for i in spare:
            with keeping(net, [k for k in kept if k != i]):
                losses[i] = calibration_loss(net, objective, draws, run)
        kept.remove(min(losses, key=losses.get))
    return kept


def losses_of(net, objective, draws, scheme, run) -> dict:
    """{kept layers: loss} of every cut that the scheme allows, the lowest first."""
    choices, losses = [itertools.combinations(range(first, first + m), n) for first, n, m in groups_of(scheme)], {}
    for parts in itertools.product(*choices):
        kept = tuple(itertools.chain(*parts))
        with keeping(net, kept):
            losses[kept] = calibration_loss(net, objective, draws, run)
    return dict(sorted(losses.items(), key=lambda item: item[1]))


def train(net, objective, batches, steps, optimizer, before=lambda noise: None):
    """A few plain steps on the objective's loss."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for x, y, noise in batches(step):
            batch = objective.make_batch(x, y, noise)
            before(noise)
            objective.loss(objective.predict(net, batch), batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def adapted(net, objective, batches, scheme, run, steps=200) -> list:
    """What the search's dW is worth without its logits: all masks are equally likely, then every cut is tried."""
    torch.manual_seed(make_seed(run.args.seed, 2))
    delta, blocks = prune.add_delta_w(net, "lora", 8), net.layers()
    masks = prune.LayerMasks(scheme, run.device).requires_grad_(False)
    layers, optimizer = [prune.MaskedLayer(block) for block in blocks], prune.adamw(dict(params=delta, lr=1e-3))
    net.replace_layers(layers)
    train(net, objective, batches, range(steps), optimizer, lambda noise: masks.draw(layers, noise, tau=1.0))
    net.replace_layers(blocks)
    return list(next(iter(losses_of(net, objective, calibration(objective, batches), scheme, run))))


def halving(net, objective, batches, scheme, run, start=8, each=10) -> list:
    """Successive halving: what costs most, fine-tuning, is spent on the cuts that may still win."""
    draws, racers = calibration(objective, batches), {}
    for kept in list(losses_of(net, objective, draws, scheme, run))[:start]:
        racer = copy.deepcopy(net)
        racer.keep_layers(kept)
        racers[kept] = racer.train().requires_grad_(True), prune.adamw(dict(params=list(racer.parameters()), lr=1e-3))
    for turn in range(start.bit_length() - 1):
        for racer, optimizer in racers.values():
            train(racer, objective, batches, range(each * turn, each * (turn + 1)), optimizer)
        losses = {kept: calibration_loss(racer, objective, draws, run) for kept, (racer, _) in racers.items()}
        racers = {kept: racers[kept] for kept in sorted(racers, key=losses.get)[: len(racers) // 2]}
    return list(next(iter(racers)))


prune.CRITERIA |= dict(distilled=distilled, greedy=greedy, adapted=adapted, halving=halving)

if __name__ == "__main__":
    run_main(prune.main)
