"""How fast this machine runs the stages, beside the least that the arithmetic allows.

    python reproduce/benchmark.py                                                    # DiT-S at batch 16, some minutes
    python reproduce/benchmark.py --model dit-xl --batch-size 32 --dtype bfloat16    # on a GPU

The flags are distill.py's. Everything has its turn in each round, so a busy machine slows all of it; times are medians.
A backward pass costs two forward passes, or one where weights need no gradient (LoRA). At 1:2, half of a search's
layers have none.
"""
import copy
import statistics
import sys
import tempfile
import time
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

import engine  # noqa: F401  first: it makes the stages importable
import distill
import prune
from model import RowGenerator, autocast, build_model, cast_frozen
from table import markdown


class Enough(Exception):
    """A training loop has run for long enough."""


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(functions, rounds):
    """{name: function} -> {name: median seconds}. A function that returns seconds has timed itself."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            started = now()
            own = function()
            times[name].append(own if isinstance(own, float) else now() - started)
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # the first round warms up


def main():
    flags = f"--model dit-s --batch-size 16 --dtype float32 --out {tempfile.mkdtemp()}"
    flags += " --lr 1e-4 --beta 0.01 --ema 0.999 --steps 1000 --save-every 1000 --log-every 1000"
    parser = distill.make_parser()
    parser.description = __doc__
    args = parser.parse_args([*flags.split(), *sys.argv[1:]])
    prune.start_run(args)

    torch.manual_seed(0)
    net = build_model(args.model).to(args.device).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)  # a fresh DiT's blocks are the identity
    half = copy.deepcopy(net)
    half.keep_layers(range(1, sum(net.depths()), 2))
    x = torch.randn(args.batch_size, net.channels, net.input_size, net.input_size, device=args.device)
    y = torch.arange(len(x), device=args.device) % net.classes
    objective = net.objective()
    batch = objective.make_batch(x, y, RowGenerator((0, 0), 0, len(x), len(x), args.device))

    def step_of(train, network):
        """Seconds of a step of train(network, batches), the median of the last of five."""
        starts = []

        def batches(step, part):
            starts.append(now())
            if step == 5:
                raise Enough
            return x, y, RowGenerator((0, step), 0, len(x), len(x), args.device)

        try:
            train(copy.deepcopy(network), batches)
        except Enough:
            return statistics.median(b - a for a, b in zip(starts[1:], starts[2:]))

    def frozen(network):
        network = copy.deepcopy(network).requires_grad_(False)
        cast_frozen(network, args.dtype)
        return network

    def forward(network):
        with torch.no_grad(), autocast(args.device, args.dtype):
            objective.predict(network, batch)

    def search(delta_w, layer, net, batches):
        args.delta_w = delta_w
        prune.MaskedLayer = layer
        masks = prune.GroupMasks([(1, 2)] * (len(net.layers()) // 2), args.device)
        prune.search(net, objective, batches, masks, args)

    def recovery(student, batches):
        pairs = [(i, 2 * i + 1) for i in range(len(student.layers()))]
        average = copy.deepcopy(student)
        distill.recover(student, average, teacher, objective, batches, pairs, args, {})

    teacher = frozen(net)
    with FlopCounterMode(display=False) as counter:
        forward(teacher)
    print(f"forward pass of one image: {counter.get_total_flops() / 2e9 / len(x):.1f} billion multiply-adds\n")
    functions = {
        "forward pass, all layers": partial(forward, teacher),
        "forward pass, half": partial(forward, frozen(half)),
        "masked-KD step": partial(step_of, recovery, half),
    }
    layers = dict(formula=prune.DenseMaskedLayer, fast=prune.MaskedLayer)
    for delta_w in ("lora", "full"):
        for name, layer in layers.items():
            functions[f"search step, {delta_w}, {name}"] = partial(step_of, partial(search, delta_w, layer), net)
    times = in_turn(functions, rounds=3)
    whole = times["forward pass, all layers"]
    times["least of a masked-KD step"] = whole + 3 * times["forward pass, half"]
    times["least of a search step, lora"] = 1.5 * whole
    times["least of a search step, full"] = 2 * whole
    print(markdown(["what", "ms"], [[name, f"{1000 * seconds:.1f}"] for name, seconds in times.items()]))


if __name__ == "__main__":
    main()
