"""Rivals of the paper's search, each a criterion of prune.py: does any of them choose better, at no more cost?

    python reproduce/ideas.py --criterion greedy --scheme 6:12 --out out/greedy       # the flags are prune.py's

distilled    the paper's search, on the distillation loss of the uncut network instead of the diffusion loss
greedy       removes one layer after another, each time the one whose removal leaves the least loss
adapted      trains LoRA under masks drawn uniformly for 200 steps, then takes the cut of the least loss with it
halving      the eight cuts of the least loss, fine-tuned for 10 steps; the better half for 10 more; the better of the last two

The fifth idea needs no code: --criterion learned --scheme 6:12, the paper's search free of the 1:2 grid.
"""
import copy
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prune
from model import mix


DRAWS = 8  # batches of 64 that measure a loss, of a seed of their own


def measuring(batches, objective) -> list:
    """Fixed draws, the same for all cuts."""
    own = copy.copy(batches)
    own.seed, own.epoch = 1000, None
    return [objective.draw(*part) for step in range(DRAWS) for part in own(step)]


@torch.inference_mode()
def loss_of(net, objective, drawn, kept) -> float:
    """The mean loss over `drawn` of the network with only the layers `kept`."""
    shallow = copy.deepcopy(net).eval()
    shallow.keep_layers(kept)
    return sum(objective.loss(objective.predict(shallow, batch), batch).mean().item() for batch in drawn) / len(drawn)


def all_cuts(scheme) -> list:
    """Every set of layers that the scheme allows, as sorted tuples."""
    starts = [0, *itertools.accumulate(m for _, m in scheme)]
    parts = [itertools.combinations(range(first, first + m), n) for first, (n, m) in zip(starts, scheme)]
    return [sum(cut, ()) for cut in itertools.product(*parts)]


class Distilled:
    """An objective whose loss is the distillation loss: the output should be the uncut network's (0.9), and right (0.1)."""

    def __init__(self, objective, teacher):
        self.draw, self.predict, self.inner, self.teacher = objective.draw, objective.predict, objective, teacher

    def loss(self, out, batch):
        with torch.no_grad():
            target = self.predict(self.teacher, batch)
        return 0.9 * self.inner.kd(out, target, batch) + 0.1 * self.inner.loss(out, batch)


def distilled(net, objective, batches, scheme, run) -> list:
    """The paper's search on another loss."""
    return prune.learned(net, Distilled(objective, copy.deepcopy(net)), batches, scheme, run)


def greedy(net, objective, batches, scheme, run) -> list:
    """57 losses for 12 -> 6, where all cuts are 924; no group falls below its N."""
    drawn, group = measuring(batches, objective), [g for g, (_, m) in enumerate(scheme) for _ in range(m)]
    kept = list(range(len(group)))
    while len(kept) > sum(n for n, _ in scheme):
        spare = [i for i in kept if sum(group[k] == group[i] for k in kept) > scheme[group[i]][0]]
        losses = {i: loss_of(net, objective, drawn, [k for k in kept if k != i]) for i in spare}
        kept.remove(min(losses, key=losses.get))
    return kept


def train(net, objective, batches, steps, optimizer, before=lambda noise: None):
    """A few plain steps of the objective's loss."""
    for step in steps:
        for x, y, noise in batches(step):
            batch = objective.draw(x, y, noise)
            before(noise)
            objective.loss(objective.predict(net, batch), batch).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def adapted(net, objective, batches, scheme, run, steps=200) -> list:
    """What the search's dW is worth without its logits: all masks equally likely, then every cut of the scheme is tried."""
    torch.manual_seed(mix(run.args.seed, 2))
    delta, blocks = prune.add_delta_w(net, "lora", 8), net.layers()
    masks = prune.LayerMasks(scheme, run.device).requires_grad_(False)
    layers = [prune.MaskedLayer(block) for block in blocks]
    net.replace_layers(layers)
    train(net, objective, batches, range(steps), prune.adamw([dict(params=delta, lr=1e-3)]), lambda noise: masks.draw(layers, noise, tau=1.0))
    net.replace_layers(blocks)
    drawn = measuring(batches, objective)[: DRAWS // 2]
    losses = {kept: loss_of(net, objective, drawn, kept) for kept in all_cuts(scheme)}
    return list(min(losses, key=losses.get))


def halving(net, objective, batches, scheme, run, start=8, each=10) -> list:
    """Successive halving: what costs most, fine-tuning, is spent on the cuts that still may win."""
    drawn = measuring(batches, objective)
    losses = {kept: loss_of(net, objective, drawn, kept) for kept in all_cuts(scheme)}
    racers = {}
    for kept in sorted(losses, key=losses.get)[:start]:
        racer = copy.deepcopy(net)
        racer.keep_layers(kept)
        racers[kept] = racer.train().requires_grad_(True), prune.adamw([dict(params=list(racer.parameters()), lr=1e-3)])
    for turn in range(start.bit_length() - 1):
        for racer, optimizer in racers.values():
            train(racer, objective, batches, range(each * turn, each * turn + each), optimizer)
        losses = {kept: loss_of(racer, objective, drawn[: DRAWS // 2], range(len(kept))) for kept, (racer, _) in racers.items()}
        racers = {kept: racers[kept] for kept in sorted(racers, key=losses.get)[: len(racers) // 2]}
    return list(next(iter(racers)))


prune.CRITERIA |= dict(distilled=distilled, greedy=greedy, adapted=adapted, halving=halving)

if __name__ == "__main__":
    prune.main()
