"""Ideas of one's own, in one file: another mask distribution, and another loss on hidden states.

    python reproduce/ideas.py --criterion gates --scheme 6:12 --out out/gates         # the flags are prune.py's
    python reproduce/ideas.py distill --mode cosine --out out/cosine                  # the flags are distill.py's

gates        learns a Bernoulli gate for each layer instead of the N:M groups, with a penalty on the expected depth
cosine       a loss on hidden states: only the direction of each token's state has to be the teacher's

An idea that needs no code: --criterion learned --scheme 6:12, the paper's search without local groups.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill
import prune
from model import run_main
from prune import groups_of

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


prune.CRITERIA["gates"] = gates
distill.HIDDEN_LOSSES["cosine"] = cosine

if __name__ == "__main__":
    stage = prune
    if sys.argv[1:2] == ["distill"]:
        del sys.argv[1]
        stage = distill
    parser = stage.make_parser()
    parser.description = __doc__
    run_main(lambda: stage.main(parser=parser))
