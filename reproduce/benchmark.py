"""How fast this machine runs the stages: each line compares things that were timed in turn, within one run.

    python reproduce/benchmark.py                    # under 10 minutes on 2 CPU cores; writes out/benchmark.json
    python reproduce/benchmark.py --only latents     # one part

Times are medians over rounds in which everything that a part compares has one turn each, so a busy machine slows all
of it. The network is a DiT of width 384 and depth 12 on 256 tokens, with random weights (on a GPU: --model dit-xl).
bfloat16 is measured where it is native (--bf16: anyway). On CUDA the device is waited for, and peak memory is shown.
"""
import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import distill
import fid
import prune
import sample
from extract_latents import SD, AutoencoderKL, Batches, Latents, encode_pixels, epoch_order
from model import RowGenerator, autocast, build_model, choose_dtype, cast_frozen, start_ranks
from sample import SAMPLERS

# ---------------------------------------------------------------------------------------------------------------------
# Timing.

class Timer:
    """One device; `args` of the command line; `rows`, the results."""

    def __init__(self, args):
        self.args, self.device, self.rows = args, torch.device(args.device), []
        self.bf16 = args.bf16 or choose_dtype("auto", self.device) == torch.bfloat16
        self.dtypes = (torch.float32, torch.bfloat16)[: 1 + self.bf16]

    def once(self, function) -> float:
        """Seconds of one call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def medians(self, functions: dict, rounds=None) -> dict:
        """{name: seconds}, after one call of each to warm up. On CUDA also keeps each one's peak memory."""
        self.peak = {}
        for name, function in functions.items():
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            function()
            if self.device.type == "cuda":
                self.peak[name] = torch.cuda.max_memory_allocated() / 2**30
        times = {name: [] for name in functions}
        for _ in range(rounds or self.args.rounds):
            for name, function in functions.items():
                times[name].append(self.once(function))
        return {name: statistics.median(values) for name, values in times.items()}

    def row(self, what, value, unit, beside="", ratio=None, note=""):
        """ratio: how many times as fast as what stands beside it."""
        memory = getattr(self, "peak", {}).get(what)
        note = "; ".join(filter(None, [note, memory and f"peak {memory:.2f} GiB"]))
        facts = dict(part=self.part, what=what, value=value, unit=unit, beside=beside, ratio=ratio, note=note)
        self.rows.append(facts)
        times = "" if ratio is None else f"{ratio:.2f} x"
        print(f"| {self.part} | {what} | {value:,.4g} {unit} | {times} | {beside} | {note} |", flush=True)

    def compare(self, times: dict, first=None, note=None):
        """A row for each of medians' results, as multiples of the speed of the first."""
        first = first or next(iter(times))
        for what, seconds in times.items():
            beside, ratio = ("", None) if what == first else (first, times[first] / seconds)
            self.row(what, 1000 * seconds, "ms", beside, ratio, (note or {}).get(what, ""))

def network(timer, depth=None, model=None):
    """Random weights, none of them zero: a fresh DiT's blocks are the identity."""
    torch.manual_seed(0)
    net = build_model(model or timer.args.model, depth)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return net.to(timer.device).eval()

class Stepwise(prune.Run):
    """A run of a stage's own loop, in a thread of its own, that makes a step when it is called."""

    def __init__(self, stage, flags: str, body, timer):
        flags += f" --out {tempfile.mkdtemp(dir=timer.folder)} --steps 1000000 --log-every 1000000"
        flags += f" --batch-size {timer.args.batch_size} --device {timer.device}"
        sys.argv = [f"{stage.__name__}.py", *flags.split()]
        args = stage.parse_arguments()
        recipe = dict(save_every=10**9, lr=1e-4, beta=1e-2, ema=0.999)
        prune.fill_defaults(args, {k: v for k, v in recipe.items() if hasattr(args, k)}, 1)
        super().__init__(args, timer.device)
        self.go, self.done, self.problem = threading.Semaphore(0), threading.Semaphore(0), None
        self.thread = threading.Thread(target=self.work, args=(body,), daemon=True)

    def work(self, body):
        try:
            body(self)
        except BaseException as problem:
            self.problem = problem
            self.done.release()

    def __iter__(self):
        for step in range(self.args.steps):
            self.go.acquire()
            yield step
            self.done.release()

    def __call__(self):
        if not self.thread.is_alive():
            self.thread.start()
        self.go.release()
        self.done.acquire()
        if self.problem:
            raise self.problem

def fixed_batches(timer, net):
    """The same latents in each step, at no cost: reading is timed by itself."""
    x = torch.randn(timer.args.batch_size, net.channels, net.input_size, net.input_size, device=timer.device)
    y = torch.arange(len(x), device=timer.device) % net.classes
    return lambda step: [(x, y, RowGenerator((0, step), 0, len(x), len(x), timer.device))]

def recovery(timer, flags: str) -> Stepwise:
    """distill.py's loop: half of the network taught by all of it."""
    def body(run):
        teacher, net, pairs = None, network(timer), []
        net.keep_layers(range(1, sum(net.depths()), 2))
        if run.args.mode == "masked-kd":
            teacher, pairs = network(timer).requires_grad_(False), [(i, 2 * i + 1) for i in range(sum(net.depths()))]
            run.prepare(teacher)
        average, batches = copy.deepcopy(net), fixed_batches(timer, net)
        distill.recover(net.train(), average, teacher, net.objective(), batches, pairs, run, {})
    return Stepwise(distill, flags, body, timer)

def search(timer, flags: str, layer=prune.MaskedLayer) -> Stepwise:
    """prune.py's loop, 1:2."""
    def body(run):
        net, prune.MaskedLayer = network(timer), layer
        scheme = [(1, 2)] * (sum(net.depths()) // 2)
        prune.learned(net, net.objective(), fixed_batches(timer, net), scheme, run)
    return Stepwise(prune, flags, body, timer)

# ---------------------------------------------------------------------------------------------------------------------
# The parts.

def peak(timer):
    """What the machine can do at best: a product of two square matrices."""
    n = 8192 if timer.device.type == "cuda" else 2048
    matrices = {str(d)[6:]: torch.randn(n, n, device=timer.device, dtype=d) for d in timer.dtypes}
    times = timer.medians({name: lambda m=m: m @ m for name, m in matrices.items()})
    timer.flops = {name: 2 * n**3 / seconds for name, seconds in times.items()}
    for name, flops in timer.flops.items():
        timer.row(f"{n} x {n} product, {name}", flops / 1e9, "GFLOP/s")

@torch.inference_mode()
def sampling(timer):
    """sample.py's steps, as it runs them; the share of the peak counts the blocks' multiply-adds."""
    if not hasattr(timer, "flops"):
        peak(timer)
    batch, ways = timer.args.batch_size // 2, {}
    settings = dict(sampler="ddpm", steps=2, guidance=1.5, guidance_channels=3)
    for dtype in timer.dtypes:
        for compiled in ("", ", compiled"):
            net = network(timer).requires_grad_(False)
            cast_frozen(net, dtype)
            if compiled:
                net = torch.compile(net, dynamic=False, options={"freezing": True})
            ways[f"guided step of {batch}, {str(dtype)[6:]}{compiled}"] = net, dtype

    def two_steps(net, dtype):
        y = torch.arange(batch, device=timer.device) % net.classes
        with autocast(timer.device, dtype):
            SAMPLERS["ddpm"](net, y, RowGenerator((0,), 0, batch, 16, timer.device), **settings)

    times = timer.medians({what: lambda way=way: two_steps(*way) for what, way in ways.items()})
    times, work = {what: seconds / 2 for what, seconds in times.items()}, 2 * 2 * batch * multiply_adds(network(timer))
    share = lambda what: work / times[what] / timer.flops[str(ways[what][1])[6:]]
    timer.compare(times, note={what: f"{share(what):.0%} of the peak" for what in times})

def multiply_adds(net) -> int:
    """Of the blocks, for one image. The modulation's weights meet one token, all others meet every one."""
    tokens = (net.input_size // net.patch) ** 2
    named = [pair for block in net.layers() for pair in block.named_parameters()]
    return sum(p.numel() * (1 if "adaLN" in name else tokens) for name, p in named)

def forward(timer, layers=1):
    """A forward pass without gradients in float32: the unit of the two parts below."""
    net, batch = network(timer).requires_grad_(False), timer.args.batch_size
    if layers != 1:
        net.keep_layers(range(1, sum(net.depths()), 2))
    x = torch.randn(batch, net.channels, net.input_size, net.input_size, device=timer.device)
    t, y = torch.full((batch,), 500, device=timer.device), torch.arange(batch, device=timer.device) % net.classes
    return torch.no_grad()(lambda: net(x, t, y))

def distillation(timer):
    """Masked KD. A step can't take less than the teacher's forward pass and three of the student's."""
    exact = {"teacher's forward pass": forward(timer), "student's forward pass": forward(timer, layers=0.5)}
    runs = {"fine-tuning step, float32": recovery(timer, "--dtype float32 --mode finetune")}
    for dtype in timer.dtypes:
        for compiled in ("", " --compile"):
            what = f"masked-KD step, {str(dtype)[6:]}{compiled.replace(' --compile', ', compiled')}"
            runs[what] = recovery(timer, f"--dtype {str(dtype)[6:]}{compiled}")
    times = timer.medians(exact | runs)
    whole, half = (times.pop(what) for what in exact)
    least = {"3 x student's forward": 3 * half, "fine-tuning step, float32": times.pop("fine-tuning step, float32")}
    timer.compare(least)
    timer.compare({"teacher's forward + 3 x student's": whole + 3 * half} | times)

def pruning(timer):
    """A search step at 1:2 can't take less than the forward pass of all layers and the backward pass of half of them.

    A backward pass costs as much as a forward pass with LoRA, where weights need no gradient, and twice that with full.
    """
    runs = {}
    for delta in ("lora", "full"):
        runs[f"{delta}, the formula"] = search(timer, f"--dtype float32 --delta-w {delta}", prune.DenseMaskedLayer)
        runs[f"{delta}, float32"] = search(timer, f"--dtype float32 --delta-w {delta}")
        if timer.bf16:
            runs[f"{delta}, bfloat16"] = search(timer, f"--dtype bfloat16 --delta-w {delta}")
            runs[f"{delta}, bfloat16, compiled"] = search(timer, f"--dtype bfloat16 --delta-w {delta} --compile")
    times = timer.medians(dict(unit=forward(timer)) | runs)
    unit = times.pop("unit")
    for delta, passes in (("lora", 1.5), ("full", 2.0)):
        own = {what: s for what, s in times.items() if what.startswith(delta)}
        timer.compare({f"{delta}, {passes} forward passes": passes * unit} | own, first=f"{delta}, the formula")

def flags(timer):
    """What the training flags are worth: the time of a fine-tuning step, and what is kept for the backward pass."""
    ways = {"plain": "", "--checkpointing": "--checkpointing", "--compile": "--compile"}
    ways = {way: f"{flag} --dtype float32" for way, flag in ways.items()}
    ways |= {"--dtype bfloat16": "--dtype bfloat16"} if timer.bf16 else {}
    times = timer.medians({way: recovery(timer, f"--mode finetune {flag}") for way, flag in ways.items()})
    timer.compare(times, note={way: f"keeps {kept(timer, way):,.0f} MiB" for way in ways})

def kept(timer, way) -> float:
    """MiB that autograd keeps of a forward pass of half of the network, weights left out."""
    net, found = network(timer, sum(network(timer).depths()) // 2), {}
    net.checkpointing = way == "--checkpointing"
    for block in net.layers() if way == "--compile" else []:
        block.compile()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(t):
        found.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    objective, (x, y, noise) = net.objective(), fixed_batches(timer, net)(0)[0]
    batch, dtype = objective.make_batch(x, y, noise), torch.bfloat16 if "bfloat16" in way else torch.float32
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(timer.device, dtype):
        objective.loss(objective.predict(net, batch), batch)
    return sum(size for place, size in found.items() if place not in weights) / 2**20

@torch.no_grad()
def vae(timer):
    """The SD VAE at 256 x 256, random weights: as a plain module, and as loaded (channels last)."""
    batch = 2 if timer.device.type == "cpu" else 32
    pixels = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=timer.device)
    z = torch.randn(batch, 4, 32, 32, device=timer.device)
    forms = [("contiguous, float32", torch.float32, torch.contiguous_format)]
    forms += [(str(dtype)[6:], dtype, torch.channels_last) for dtype in timer.dtypes]
    load = lambda dtype, layout: AutoencoderKL(SD, dtype).to(timer.device, memory_format=layout).eval()
    nets = {name: load(dtype, layout) for name, dtype, layout in forms}
    encode = {f"encode {batch}, {name}": lambda net=net: encode_pixels(net, pixels, 1) for name, net in nets.items()}
    decode = {f"decode {batch}, {name}": lambda net=net: net.decode(z) for name, net in nets.items()}
    for functions in (encode, decode):
        timer.compare(timer.medians(functions, rounds=3))

def latents(timer):
    """Samples a second: one file for all (ours) and one file an image (the authors' release), in random order."""
    folder, (C, side), batch = Path(timer.folder), (4, 32), 256
    count, single = timer.args.latents_mib * 2**20 // (2 * 2 * C * side * side * 2), 8192
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((64, 2, 2 * C, side, side)).astype(np.float16)
    moments = np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (count, *noise.shape[1:]))
    for i in range(0, count, 64):
        moments[i : i + 64] = noise[: count - i]
    moments.flush()
    del moments
    np.save(folder / "labels.npy", np.arange(count) % 1000)
    facts = dict(shape=[C, side, side], scale=0.18215, classes=list(map(str, range(1000))), count=count, flips=2)
    (folder / "meta.json").write_text(json.dumps(facts | dict(complete=True)))
    (folder / "single").mkdir()
    for i in range(single):
        np.save(folder / f"single/{i}.npy", noise[0, 0, :C].astype(np.float32))
    os.sync()

    def cold(files):
        """Lets go of the files' pages in memory, so that the next reads come from the disk."""
        for file in files:
            with open(file, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def rate(make, prepare=None):
        """Samples a second, from the second batch on, over up to 12,000 samples; the best of 2 runs."""
        rates = []
        for _ in range(2):
            if prepare:
                prepare()
            steps = iter(make())
            next(steps)
            start, done = time.perf_counter(), 0
            for x in steps:
                done += len(x)
            rates.append(done / (time.perf_counter() - start))
        return max(rates)

    used = min(count // batch, 48)
    order = [epoch_order(count, 0, 0)[k * batch : (k + 1) * batch] for k in range(used)]
    read = lambda: (lambda held: (held.read(2 * rows) for rows in order))(Latents(folder))
    files = [folder / f"single/{i}.npy" for i in rng.permutation(single)]
    each = lambda: (np.stack([np.load(file) for file in files[k : k + batch]]) for k in range(0, single, batch))

    def drawn():
        batches = Batches(Latents(folder), batch, 1, 0, timer.device)
        return (x for step in range(used) for x, _, _ in batches(step))

    for state in ("memory", "a cold disk"):
        drop = (lambda files: lambda: cold(files)) if "cold" in state else lambda files: None
        beside = f"one .npy file an image, from {state}"
        theirs = rate(each, drop(files))
        timer.row(beside, theirs, "samples/s")
        for what, make in (("one file, moments read", read), ("one file, training's batches, posterior drawn", drawn)):
            ours = rate(make, drop([folder / "moments.npy"]))
            timer.row(f"{what}, from {state}", ours, "samples/s", beside, ours / theirs)

@torch.no_grad()
def inception(timer):
    """fid.py's feature network: as it was published; batch norm folded into the convolutions, and channels last."""
    torch.manual_seed(0)
    plain = fid.Inception().eval()
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=(2 / max(p[0].numel(), 8)) ** 0.5 if p.ndim > 1 else 0.1)
    folded = copy.deepcopy(plain).fold().to(timer.device)
    plain, batch = plain.to(timer.device), 8 if timer.device.type == "cpu" else 64
    images = torch.randint(0, 256, (batch, 256, 256, 3), dtype=torch.uint8, device=timer.device)
    a, b = plain(images)[0], folded(images)[0]
    error = ((a - b).abs().max() / a.abs().max()).item()
    times = timer.medians({"as published": lambda: plain(images), "folded": lambda: folded(images)})
    times = {f"{what}, {batch} images": seconds for what, seconds in times.items()}
    timer.compare(times, note={f"folded, {batch} images": f"features differ by {error:.1e} of the largest"})

def frechet(timer):
    """The distance of two Gaussians of 2,048 features."""
    rng = np.random.default_rng(0)
    sets = [scale * rng.standard_normal((5000, 2048)) for scale in (1, 1.2)]
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in sets)
    root = lambda: np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    ways = {"scipy's sqrtm": root, "by eigenvalues": lambda: fid.frechet_distance(m1, s1, m2, s2)}
    values, times = {}, {}
    for what, way in ways.items():
        times[what] = timer.once(lambda: values.update({what: way()}))
    timer.compare(times, note={what: f"distance {value:.8f}" for what, value in values.items()})

def agreement(timer):
    """Do images in bfloat16 agree with float32's? The Fréchet distance of 1,000 digits of the same noise, on the digit
    classifier's features, beside that of another seed's. Only where bfloat16 is native, or with --bf16."""
    ways = {"float32": "", "bfloat16": "--dtype bfloat16", "float32, another seed": "--seed 1"} if timer.bf16 else {}
    base = f"--model dit-tiny --num-images 1000 --sampler ddim --steps 20 --device {timer.device} --out"
    for what, flags in ways.items():
        sys.argv = ["sample.py", *base.split(), f"{timer.folder}/{what}", *flags.split()]
        with contextlib.redirect_stdout(io.StringIO()):
            sample.main()
    for what in list(ways)[1:]:
        pair = (f"{timer.folder}/{name}/samples.npz" for name in (what, "float32"))
        timer.row(what, fid.evaluate(*pair, cache=False, pr=False)["fid"], "from float32's images")

PARTS = dict(peak=peak, sampling=sampling, distillation=distillation, pruning=pruning, flags=flags, vae=vae,
             latents=latents, inception=inception, frechet=frechet, agreement=agreement)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", metavar="PART", choices=PARTS, help=", ".join(PARTS))
    add("--model", default="dit-s", help="default: %(default)s")
    add("--batch-size", type=int, default=16, help="of a step; guided: half as many images (default: %(default)s)")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--latents-mib", type=int, default=1024, help="size of the file that is read (default: %(default)s)")
    add("--folder", help="on the disk that is measured (default: the system's temporary one)")
    add("--bf16", action="store_true", help="measure bfloat16 even where it is emulated")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=ROOT / "out/benchmark.json", help="default: out/benchmark.json")
    args = parser.parse_args()
    timer, started = Timer(args), time.time()
    start_ranks(args.device)  # as every stage does
    machine = torch.cuda.get_device_name() if timer.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {args.model}, batches of {args.batch_size}\n")
    print("| part | what | takes | speed | beside | |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as timer.folder:
        for timer.part, function in PARTS.items():
            if args.only in (None, timer.part):
                function(timer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seconds = round(time.time() - started)
    facts = dict(machine=machine, torch=torch.__version__, seconds=seconds, rows=timer.rows)
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\n{seconds} s; wrote {args.out}")

if __name__ == "__main__":
    main()
