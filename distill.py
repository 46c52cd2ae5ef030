"""Trains the shallow network: masked knowledge distillation from the deep one, or any simpler way, to compare.

    python distill.py                                     # out/prune/shallow.pt, taught by what it was cut from
    torchrun --nproc_per_node=8 distill.py                # the same on 8 GPUs
    python distill.py --mode finetune                     # the same without a teacher
    python distill.py --mode scratch --model dit-tiny     # trains a teacher

The loss is eq. 8 of the paper, L = 0.9 L_KD + 0.1 L_Diff + b L_Rep:

    L_Diff   the network's own training loss                           (model.py: objective.loss)
    L_KD     the student's output should match the teacher's           (model.py: objective.kd)
    L_Rep    its hidden states too, except for massive activations     (here: masked_mse)

The terms differ in scale. The line "loss at the start" says what share of the first loss each has. There and in
log.jsonl they are called diffusion, kd and rep, and log.jsonl has them without their weights.

Modes (table 5): masked-kd has all three; rep-kd has L_Rep without the mask; logits-kd leaves L_Rep out; finetune has
L_Diff alone; scratch too, from fresh weights. Teacher and student get the same batch: the same noise, times and
dropped labels. Writes to --out: student.pt (raw and averaged weights), log.jsonl, step-*.pt to resume from.

Read top to bottom: which layers are matched, the masked loss, the recovery with its whole loop (`recover`).
"""
import argparse
import collections
import copy
import math

import torch

from extract_latents import Batches, Latents, check_fit
from model import (
    MODELS, Progress, UserError, autocast, build_model, cast_frozen, load_model, make_seed, rank, read_state, run_main,
    save_checkpoint, world_size)
from prune import (
    adamw, add_training_arguments, calibration_batches, check_family, clip_and_step, ema_update, fill_recipe, log,
    resume, save, say, split_layers, start_run, sum_gradients_over_ranks, sum_over_ranks)

# ---------------------------------------------------------------------------------------------------------------------
# Hidden states: which layers are matched, and the masked loss between them.


def matched_layers(scheme, student, teacher):
    """Pairs (student layer, teacher layer) whose hidden states are compared, as in the authors' released code.

    scheme: the N:M groups by which the student was cut, or None; student, teacher: the layers in each list of blocks.
    After j of a group's N layers the student should be where the teacher is after j M / N of its M layers. If all
    groups are alike, every j with a whole j M / N is matched: at 1:2 and 2:4, student i and teacher 2i + 1. In a mixed
    list only the last layers of the groups are. Where the scheme does not fit the two depths (another teacher, or no
    scheme), each list is one group, and j M / N is rounded."""
    scheme = [tuple(group) for group in scheme or []]
    kept = sum(n for n, _ in scheme)
    depth = sum(m for _, m in scheme)
    fits = kept == sum(student) and depth == sum(teacher)
    if not fits:
        scheme = list(zip(student, teacher))
    uniform = len(set(scheme)) == 1
    pairs = []
    i, k = 0, 0  # the first student layer and the first teacher layer of the group
    for n, m in scheme:
        for j in range(1, n + 1):
            place = j * m / n
            if not fits:
                pairs.append((i + j - 1, k + max(1, round(place)) - 1))
            elif j == n or (uniform and place.is_integer()):
                pairs.append((i + j - 1, k + int(place) - 1))
        i += n
        k += m
    return pairs


class HiddenStates:
    """Keeps the output (B, T, D) of chosen layers at each forward pass of `net`."""

    def __init__(self, net, layers):
        self.states = {}  # block -> output
        blocks = net.layers()
        self.blocks = [blocks[i] for i in layers]
        for block in self.blocks:
            block.register_forward_hook(self.keep)

    def keep(self, block, inputs, output):
        self.states[block] = output

    def take(self):
        """The latest outputs, which are then forgotten here: nothing outlives its step."""
        return [self.states.pop(block) for block in self.blocks]


def suppress_massive(h, k=2.0):
    """Zeroes the elements of h (B, T, D) that lie k or more standard deviations from their sample's mean.

    A few activations of a transformer lie 15 to 40 standard deviations out (the paper's figure 8). They would dominate
    the loss."""
    h = h.float()
    with torch.no_grad():  # which elements count is not learned
        variance, mean = torch.var_mean(h, dim=(1, 2), keepdim=True)  # (B, 1, 1)
        small = (h - mean).abs_() < k * variance.sqrt()
    return torch.where(small, h, 0.0)


def masked_mse(student, teacher, args):
    """Hidden states (B, T, D) of two matched layers -> (B,). Each side masks its own activations, as in the release."""
    sigma = args.mask_sigma
    return plain_mse(suppress_massive(student, sigma), suppress_massive(teacher, sigma), args)


def plain_mse(student, teacher, args):
    difference = student.float() - teacher.float()
    return difference.square().flatten(1).mean(1)  # over all elements, the zeroed ones too


# A loss on hidden states of your own is a function and a line here; its name becomes a --mode.
HIDDEN_LOSSES = {"masked-kd": masked_mse, "rep-kd": plain_mse}


# ---------------------------------------------------------------------------------------------------------------------
# The weights of the three losses.

ALPHA_KD = 0.9  # table 6
ALPHA_DIFF = 1 - ALPHA_KD
PAPER_SCALE = 0.01 * 12.5**2  # b of table 6 x the mean square of DiT-XL's hidden states (figure 8: a std of 12.5)


@torch.no_grad()
def default_beta(teacher, teacher_states, objective, batches, args):
    """The weight b of L_Rep for which b times the mean square of the teacher's hidden states is the paper's.

    L_Rep grows with the square of the hidden states, which are of very different size in different networks. With
    b = 0.01 it would be nearly all of one network's loss, and 1 % of another's."""
    squares = []
    for batch in calibration_batches(objective, batches):
        with autocast(args.device, args.dtype):
            objective.predict(teacher, batch)
        squares += [state.float().square().mean() for state in teacher_states.take()]
    mean_square = sum_over_ranks(torch.stack(squares).mean()).item() / world_size()
    return float(f"{PAPER_SCALE / mean_square:.2g}")  # rounded, so that it does not depend on the number of ranks


def say_shares(losses, weights):
    """Prints what share of the loss each term has, in rank 0's rows of the batch."""
    terms = {name: weights[name] * value.detach().sum().item() for name, value in losses.items()}
    shares = []
    for name, term in terms.items():
        shares.append(f"{weights[name]:.2g} x {name} {100 * term / sum(terms.values()):.0f} %")
    say("loss at the start: " + ", ".join(shares))


# ---------------------------------------------------------------------------------------------------------------------
# The recovery.


def recover(net, average, teacher, objective, batches, pairs, args, config):
    """Trains net in place, and `average`, the moving average of its weights (EMA), with the loss of eq. 8.

    teacher None: fine-tuning. pairs: of matched layers; empty: no L_Rep. config is stored in the checkpoints."""
    parameters = list(net.parameters())
    optimizer = adamw(dict(params=parameters, lr=args.lr))
    wait_for_gradients = sum_gradients_over_ranks(parameters, args.accumulate)
    state = dict(model=net, ema=average, optimizer=optimizer)  # what a checkpoint holds
    step = resume(args, state)  # 0, or where a killed run left off
    if pairs:
        student_states = HiddenStates(net, [s for s, _ in pairs])
        teacher_states = HiddenStates(teacher, [t for _, t in pairs])
        hidden_loss = HIDDEN_LOSSES[args.mode]
        beta = args.beta
        if beta is None:
            beta = default_beta(teacher, teacher_states, objective, batches, args)
    progress = Progress("distill", args.steps, "steps", step)
    sums = collections.defaultdict(float)  # of what is logged, since the last log line

    while step < args.steps:
        lr = args.lr * lr_factor(step, args.steps, args.warmup, args.lr_end)
        optimizer.param_groups[0]["lr"] = lr
        weights = dict(diffusion=1.0)
        if teacher:
            weights = dict(kd=ALPHA_KD, diffusion=ALPHA_DIFF)
        if pairs:
            weights["rep"] = beta * (1 - step / args.steps)  # b falls to 0
        for part in range(args.accumulate):
            x, y, rng = batches(step, part)  # this rank's rows of the global batch
            torch.manual_seed(make_seed(args.seed, step, rank(), part))  # of MAR's dropout
            batch = objective.make_batch(x, y, rng)
            with autocast(args.device, args.dtype):
                out = objective.predict(net, batch)
                losses = dict(diffusion=objective.loss(out, batch))  # each loss is (B,)
                if teacher:
                    with torch.no_grad():
                        out_teacher = objective.predict(teacher, batch)  # the same noise, times and dropped labels
                    losses["kd"] = objective.kd(out, out_teacher, batch)
                if pairs:
                    states = zip(student_states.take(), teacher_states.take())
                    of_pairs = [hidden_loss(s, t, args) for s, t in states]
                    losses["rep"] = torch.stack(of_pairs).mean(0)
                loss = sum(weights[name] * losses[name] for name in weights)  # (B,)
            if step == 0 and part == 0:
                say_shares(losses, weights)
            loss = loss.sum() / args.batch_size
            loss.backward()  # each gradient is summed over ranks as soon as it is there
            sums["loss"] += loss.detach()
            for name, value in losses.items():  # each is logged without its weight
                sums[name] += value.detach().sum() / args.batch_size
        wait_for_gradients()
        clip_and_step(optimizer, parameters, sums)
        ema_update(average, net, args.ema, step)
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            log(args, step, sums, progress, lr=lr)
        if step % args.save_every == 0 or step == args.steps:
            save(args, step, state, config=config)


def lr_factor(step, steps, warmup, end):
    """Factor of the learning rate: a cosine from 1 to `end` over the whole run, times a linear warm-up."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))  # from 1 to 0
    return rise * (end + (1 - end) * cosine)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def make_parser():
    """The flags. A flag left at None takes the value of the model's recipe (model.py)."""
    description = __doc__.split("\n\nRead top")[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("who learns from whom").add_argument
    add("--mode", choices=[*HIDDEN_LOSSES, "logits-kd", "finetune", "scratch"], default="masked-kd",
        help="what the student learns from (default: %(default)s)")
    add("--student", default="out/prune/shallow.pt", help="a cut network of prune.py, or any "
        "weights (default: %(default)s); unused in mode scratch")
    add("--model", help="what --student holds, if the file does not say; in mode scratch, which "
        "network (default there: dit-tiny)")
    add("--teacher", help="default: the network that the student was cut from")
    add("--mask-sigma", type=float, default=2.0, help="mode masked-kd: L_Rep ignores activations this "
        "many standard deviations or more from the mean (default: %(default)s)")
    add("--out", default="out/distill", help="a folder (default: %(default)s)")
    add = parser.add_argument_group("recipe (default: the model's, see model.py)").add_argument
    add("--lr", type=float, help="learning rate (ImageNet 2e-4, digits 1e-3)")
    add("--lr-end", type=float, default=0.5, help="final learning rate, as a fraction of --lr "
        "(default: %(default)s)")
    add("--warmup", type=int, default=0, help="steps of linear warm-up of --lr (default: %(default)s)")
    add("--beta", type=float, help="weight of L_Rep at the start, falling to 0 (the paper's networks: 1e-2, "
        "SiT-XL 2e-4; others: 1.56 / the mean square of the teacher's hidden states)")
    add("--ema", type=float, help="decay of the averaged weights, EMA (ImageNet 0.9999, digits 0.999)")
    add_training_arguments(parser)
    return parser


def load_student(args):
    """-> network, its config."""
    if args.mode != "scratch":
        return load_model(args.model, args.student, args.device)
    name = args.model or "dit-tiny"
    torch.manual_seed(make_seed(args.seed, 1))  # of the fresh weights
    net = build_model(name).to(args.device)
    return net, dict(name=name, depth=net.depths())


def load_teacher(args, net, config):
    """The frozen teacher, or None in the modes that have none."""
    if args.mode in ("finetune", "scratch"):
        return None
    source = args.teacher or config.get("parent")
    if not source:
        raise UserError("the student does not say what it was cut from; add --teacher NAME|FILE, or --mode finetune")
    if source in MODELS:
        teacher, _ = load_model(source, device=args.device)
    else:  # a file of ours names its model; an official one holds the student's, at any depth
        _, named = read_state(source)
        teacher, _ = load_model(named.get("name", config["name"]), source, args.device)
    for what in ("channels", "classes", "input_size"):
        if getattr(teacher, what) != getattr(net, what):
            raise UserError(f"the teacher has {what} {getattr(teacher, what)}, the student {getattr(net, what)}; give "
                            "another --teacher")
    return teacher.requires_grad_(False)


def main(argv=None, parser=None):
    """Load student and teacher, train, write student.pt. parser: make_parser() with flags of your own."""
    parser = parser or make_parser()
    args = parser.parse_args(argv)
    start_run(args)
    net, config = load_student(args)
    latents = Latents(args.latents)
    check_fit(net, latents, args.latents)
    fill_recipe(args, MODELS[config["name"]]["distill"], len(latents))
    batches = Batches(latents, args.batch_size, args.accumulate, args.seed, args.device)
    teacher = load_teacher(args, net, config)
    check_family(net)
    sublayers = config.get("granularity") == "sublayer"
    if sublayers:
        split_layers(net)
    if sublayers and teacher:
        split_layers(teacher)
    pairs = []
    if args.mode in HIDDEN_LOSSES:
        pairs = matched_layers(config.get("scheme"), net.depths(), teacher.depths())
    if teacher:
        cast_frozen(teacher, args.dtype)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    say(f"{args.mode}: {config['name']}, {sum(net.depths())} layers, {size:.2f} M parameters, {args.steps} steps of "
        f"{args.batch_size} images, on {args.device} in {args.dtype}")

    config = config | latents.facts() | dict(mode=args.mode)
    average = copy.deepcopy(net).eval()  # before HiddenStates hooks into the network
    recover(net.train(), average, teacher, net.objective(), batches, pairs, args, config)
    if rank() == 0:
        config["depth"] = net.depths()
        weights = dict(model=net.state_dict(), ema=average.state_dict())
        save_checkpoint(args.out / "student.pt", **weights, config=config, step=args.steps)
    say(f"wrote {args.out}/student.pt")


if __name__ == "__main__":
    run_main(main)
