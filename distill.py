"""Trains the shallow network: masked knowledge distillation from the deep one, or any simpler way, to compare.

    python distill.py                                                  # digits: out/prune/shallow.pt taught by dit-tiny
    torchrun --nproc_per_node=8 distill.py --student out/prune/shallow.pt --teacher dit-xl --latents out/latents
    python distill.py --mode finetune                                  # the same without a teacher

The loss is eq. 8 of the paper, L = a_KD L_KD + a_Diff L_Diff + b L_Rep:

    L_Diff   the family's own training loss                            (model.py: objective.loss)
    L_KD     the student's output should be the teacher's              (model.py: objective.kd)
    L_Rep    its hidden states too, except for massive activations     (here: masked_representation_loss)

Modes (table 5): masked-kd has all three; rep-kd has L_Rep without the mask; logits-kd leaves L_Rep out; finetune has
L_Diff alone; scratch too, from fresh weights. Teacher and student get the same drawn batch: the same noise, times and
dropped labels. Writes to --out: student.pt (raw and averaged weights), log.jsonl, loss.png, step-*.pt to resume from.

Read top to bottom: which layers are matched, the masked loss, the loop (`recover`). Run, adamw and ema_update, the
machinery of a training run, are at the end of prune.py.
"""
import copy
import math

import torch

from extract_latents import Batches, Latents, check_fit
from model import (MODELS, Parser, UserError, build_model, load_model, locate, make_seed, rank, read_state, real, run_main,
                   save_checkpoint, start_ranks, whole)
from prune import (Run, adamw, add_training_arguments, draw_losses, ema_update, fill_defaults, join_layers,
                   split_layers)

# ---------------------------------------------------------------------------------------------------------------------
# Hidden states: which layers are matched, and the masked loss between them.

def matched_layers(scheme, student: list, teacher: list) -> list:
    """Pairs (student layer, teacher layer) whose hidden states are compared, as in the release.
    scheme: the N:M groups by which the student was cut, or None; student, teacher: the layers in each list of blocks.
    In a uniform scheme, a student layer that closes a share of its group is matched to the teacher layer that closes
    the same share: at 1:2 and at 2:4, student i and teacher 2i + 1. In a mixed list, only the ends of groups are
    matched. Where the scheme does not say (another teacher than the parent, or no scheme), it is by share of depth."""
    scheme = [tuple(group) for group in scheme or []]
    if [sum(side) for side in zip(*scheme)] == [sum(student), sum(teacher)]:
        shares = lambda n, m: [(j, j * m // n) for j in range(1, n + 1) if j * m % n == 0]
        if len(set(scheme)) > 1:
            shares = lambda n, m: [(n, m)]
    else:
        scheme = list(zip(student, teacher))
        shares = lambda n, m: [(j, max(1, round(j * m / n))) for j in range(1, n + 1)]
    pairs, i, k = [], 0, 0
    for n, m in scheme:
        pairs += [(i + a - 1, k + b - 1) for a, b in shares(n, m)]
        i, k = i + n, k + m
    return pairs

class HiddenStates:
    """Keeps the output (B, T, D) of chosen layers at each forward pass of `net`."""

    def __init__(self, net, layers: list):
        self.states, self.chosen, blocks = {}, layers, net.layers()
        for i in layers:
            blocks[i].register_forward_hook(lambda module, inputs, output, i=i: self.states.__setitem__(i, output))

    def take(self) -> list:
        """The latest outputs, which are then forgotten here: nothing outlives its step."""
        return [self.states.pop(i) for i in self.chosen]

def suppress_massive(h, k: float = 2.0):
    """Zeroes the elements of h (B, T, D) that lie k or more standard deviations from their sample's mean.
    A few activations of a transformer are 15 to 40 standard deviations large (the paper's figure 8): they alone would
    make the loss."""
    h = h.float()
    with torch.no_grad():
        variance, mean = torch.var_mean(h, dim=(1, 2), keepdim=True)
        small = (h - mean).abs_() < k * variance.sqrt()
    return torch.where(small, h, 0.0)

def masked_representation_loss(student: list, teacher: list, k: float = 2.0):
    """L_Rep: lists of hidden states (B, T, D) -> (B,). Each side masks its own activations; k = inf: no mask."""
    mask = (lambda h: h.float()) if k == math.inf else (lambda h: suppress_massive(h, k))
    losses = [(mask(s) - mask(t)).square().flatten(1).mean(1) for s, t in zip(student, teacher)]
    return torch.stack(losses).mean(0)

# ---------------------------------------------------------------------------------------------------------------------
# The recovery.

ALPHA_KD = 0.9  # table 6; L_Diff gets the rest

def recover(net, average, teacher, objective, batches, pairs: list, run, config: dict):
    """Trains net in place, and `average`, the moving average of its weights (EMA), with the loss of eq. 8.
    teacher None: fine-tuning. pairs: of matched layers; none: no L_Rep."""
    args = run.args
    values, averages = list(net.parameters()), list(average.parameters())
    optimizer = adamw(dict(params=values, lr=args.lr))
    run.track(optimizer, model=net, ema=average, config=config)
    run.prepare(net)
    masked_loss = torch.compile(masked_representation_loss) if args.compile else masked_representation_loss
    sigma = args.mask_sigma if args.mode == "masked-kd" else math.inf
    if pairs:
        of_student, of_teacher = (HiddenStates(n, list(side)) for n, side in zip((net, teacher), zip(*pairs)))

    for step in run:
        optimizer.param_groups[0]["lr"] = args.lr * lr_factor(step, args.steps, args.warmup, args.lr_end)
        beta = args.beta * (1 - step / args.steps)
        for part, (x, y, noise) in enumerate(batches(step)):  # all parts of the batch that are this rank's
            torch.manual_seed(make_seed(args.seed, step, rank(), part))  # of MAR's dropout
            batch = objective.make_batch(x, y, noise)
            with run.autocast():
                out = objective.predict(net, batch)
                loss = objective.loss(out, batch)  # (b,)
                parts = dict(diffusion=loss)
                if teacher:
                    with torch.no_grad():
                        out_teacher = objective.predict(teacher, batch)
                    parts["kd"] = objective.kd(out, out_teacher, batch)
                    loss = ALPHA_KD * parts["kd"] + (1 - ALPHA_KD) * loss
                if pairs:
                    parts["rep"] = masked_loss(of_student.take(), of_teacher.take(), sigma)
                    loss = loss + beta * parts["rep"]
            run.backward(loss=loss, **parts)
        run.update(optimizer)
        ema_update(averages, values, args.ema, step)

def lr_factor(step: int, steps: int, warmup: int, end: float) -> float:
    """Factor of the learning rate: from 1 to `end` on a cosine, after a linear warm-up."""
    return min(1.0, (step + 1) / max(warmup, 1)) * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * step / steps)))

# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def parse_arguments():
    """The command line; what is None follows the model's recipe (model.py)."""
    parser = Parser(__doc__.split("\n\nRead top")[0])
    add = parser.add_argument_group("who learns from whom").add_argument
    add("--mode", choices=["masked-kd", "rep-kd", "logits-kd", "finetune", "scratch"], default="masked-kd",
        help="what the student learns from (default: %(default)s)")
    add("--student", default="out/prune/shallow.pt", metavar="FILE|URL", help="a cut network of prune.py, or any "
        "weights (default: %(default)s); unused in mode scratch")
    add("--weights", choices=["ema", "model"], default="ema", help="of a file with both: the averaged or the raw "
        "weights (default: %(default)s)")
    add("--model", metavar="NAME", help="what --student holds, if the file does not say; in mode scratch, which "
        "network (default there: dit-tiny)")
    add("--depth", type=whole(1), metavar="N", help="mode scratch: another number of blocks than the model's")
    add("--teacher", metavar="NAME|FILE", help="default: the network that the student was cut from")
    add("--mask-sigma", type=real(0, open_low=True), default=2.0, metavar="K", help="mode masked-kd: L_Rep leaves out "
        "activations K standard deviations from the mean (default: %(default)s)")
    add("--out", default="out/distill", metavar="DIR", help="default: %(default)s")
    add = parser.add_argument_group("recipe (None: the model's, see model.py)").add_argument
    add("--lr", type=real(0, open_low=True), help="learning rate (ImageNet 2e-4, digits 1e-3)")
    add("--lr-end", type=real(0, 1), default=0.5, metavar="SHARE", help="of --lr at the end of its cosine (default: "
        "%(default)s)")
    add("--warmup", type=whole(0), default=0, metavar="STEPS", help="linear warm-up of --lr (default: %(default)s)")
    add("--beta", type=real(0), help="weight of L_Rep at the start, falling to 0 (1e-2, SiT 2e-4)")
    add("--ema", type=real(0, 1), metavar="DECAY", help="of the averaged weights (ImageNet 0.9999, digits 0.999)")
    add_training_arguments(parser)
    args = parser.parse_args()
    if args.depth and args.mode != "scratch":
        raise UserError("--depth is for --mode scratch: the depth of a student is read from its file; leave it out")
    return args

def load_student(args, device):
    """-> network, its config."""
    if args.mode != "scratch":
        return load_model(args.model, args.student, device, args.weights)
    torch.manual_seed(make_seed(args.seed, 1))
    net = build_model(args.model or "dit-tiny", args.depth).to(device)
    return net, dict(name=args.model or "dit-tiny", depth=net.depths())

def load_teacher(args, net, config, device):
    """The frozen teacher, or None in the modes that have none."""
    if args.mode in ("finetune", "scratch"):
        return None
    source = args.teacher or config.get("parent")
    if not source:
        raise UserError("the student does not say what it was cut from; add --teacher NAME|FILE, or --mode finetune")
    if source in MODELS:
        teacher, _ = load_model(source, device=device)
    else:  # a file of ours names its model; an official one holds the student's, at any depth
        says = read_state(locate(source))[1]
        teacher, _ = load_model(None if says else config["name"], source, device)
    kind = lambda n: (type(n), n.channels, n.classes, n.input_size)
    if kind(teacher) != kind(net):
        raise UserError(f"{source} is another kind of network than the student; give one of {config['name']}'s kind")
    return teacher

def main():
    """Load student and teacher, train, write student.pt and loss.png."""
    args = parse_arguments()
    device = start_ranks(args.device)
    net, config = load_student(args, device)
    latents = Latents(args.latents)
    check_fit(net, latents, args.latents)
    fill_defaults(args, MODELS[config["name"]]["recipe"]["distill"], len(latents))
    batches = Batches(latents, args.batch_size, args.accumulate, args.seed, device)
    teacher = load_teacher(args, net, config, device)
    halves = config.get("granularity") == "sublayer"
    for network in (net, teacher) if halves else ():
        if network:
            split_layers(network)
    pairs, run = [], Run(args, device)
    if args.mode in ("masked-kd", "rep-kd"):
        pairs = matched_layers(config.get("scheme"), net.depths(), teacher.depths())
        widths = [next(n.layers()[0].parameters()).shape[-1] for n in (net, teacher)]
        if widths[0] != widths[1]:
            raise UserError(f"hidden states of width {widths[0]} and {widths[1]} do not compare; use --mode logits-kd")
    if teacher:
        run.prepare(teacher.requires_grad_(False))
    size = sum(p.numel() for p in net.parameters()) / 1e6
    run.say(f"{args.mode}: {config['name']}, {sum(net.depths())} layers, {size:.2f} M parameters, {args.steps} steps "
            f"of {args.batch_size}, on {device} in {run.dtype_name}")
    config, average = config | dict(mode=args.mode), copy.deepcopy(net).eval()
    recover(net.train(), average, teacher, net.objective(), batches, pairs, run, config)
    if rank() == 0:
        for network in (net, average):
            join_layers(network)
        weights = dict(model=net.state_dict(), ema=average.state_dict())
        save_checkpoint(run.out / "student.pt", **weights, config=config | dict(depth=net.depths()), step=args.steps)
        draw_losses(run.out)
    run.say(f"wrote {run.out}/student.pt and loss.png")

if __name__ == "__main__":
    run_main(main)
