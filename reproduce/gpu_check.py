"""The part of gpu_check.sh that runs the stages: do one GPU and several give the same, how fast, in how much memory?

    python reproduce/gpu_check.py --device cuda --model dit-xl --out out/gpu-check
    python reproduce/gpu_check.py STAGE FLAGS     # how it calls itself: one stage, then its peak memory as JSON
"""
import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extract_latents import SD, AutoencoderKL
from model import MODELS, build_model, rank, run_main

def run_stage(name: str, flags: list):
    """One stage in this process; rank 0 then prints the peak memory of its GPU."""
    sys.argv = [f"{name}.py", *flags]

    def main():
        importlib.import_module(name).main()
        if rank() == 0:
            peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
            print(json.dumps(dict(peak=peak)), flush=True)

    run_main(main)

class Check:
    """Runs stages, compares what they wrote, and prints rows of a table."""

    def __init__(self, args):
        self.device, self.out, self.failed = args.device, args.out.resolve(), 0
        self.all = torch.cuda.device_count() if args.device == "cuda" else 2

    def run(self, name: str, stage: str, *flags, ranks=1):
        """-> facts of a stage: seconds, peak memory in GiB; None, with a row that says why, if it failed."""
        here = [sys.executable]
        if ranks > 1:
            here += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        started, log = time.time(), self.out / f"{name.replace(',', '').replace(' ', '-')}.log"
        with open(log, "w") as file:
            command = [*here, __file__, stage, *map(str, flags), "--device", self.device]
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
        lines = log.read_text(errors="replace").splitlines()
        if code:
            self.failed += 1
            errors = [line for line in lines if "rror" in line] or lines[-1:] or ["no output"]
            self.row(name, f"**failed**, exit code {code}: {errors[-1][:160]}")
            return None
        facts = json.loads(next(line for line in reversed(lines) if line.startswith('{"peak"')))
        return facts | dict(seconds=time.time() - started)

    def row(self, name, result):
        print(f"| {name} | {result} |", flush=True)

def log_of(folder: Path) -> list:
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]

def speed_of(folder: Path, batch: int) -> float:
    """Images/s between the first log line, before which a network is compiled, and the last."""
    lines = [(line["step"], line["step"] * batch / line["images_per_s"]) for line in log_of(folder)]
    (first, start), (last, end) = lines[0], lines[-1]
    return (last - first) * batch / max(end - start, 1e-9)

def digits(check):
    """Every stage on the digits: on one rank, on all, in bfloat16 and compiled; each compared with the first."""
    first, steps = None, 20
    ways = {"1 rank": (1, []), f"{check.all} ranks": (check.all, []), "1 rank, bfloat16": (1, ["--dtype", "bfloat16"]),
            "1 rank, compiled": (1, ["--compile"])}
    for way, (ranks, flags) in ways.items():
        folder, done = check.out / way.replace(",", "").replace(" ", "-"), []
        dtype = flags if "--dtype" in flags else ["--dtype", "float32"]
        train = ["--latents", folder / "latents", "--steps", steps, "--log-every", steps // 2, "--resume", "never"]
        for stage, own in dict(
                extract_latents=["--out", folder / "latents", "--resume", "never", *dtype],
                prune=["--out", folder / "prune", *train, *dtype, *flags],
                distill=["--student", folder / "prune/shallow.pt", "--out", folder / "distill", *train, *dtype, *flags],
                sample=["--model", "dit-tiny", "--num-images", 200, "--out", folder / "sample", *flags],
                fid=[folder / "sample/samples.npz", "--no-pr", "--json", folder / "fid.json"]).items():
            done.append(check.run(f"{stage}, {way}", stage, *own, ranks=ranks))
        if None in done:
            continue
        found = results_of(folder)
        first = first or found
        grey = np.abs(found["images"] - first["images"])
        latents = np.abs(found["latents"] - first["latents"]).max()
        check.row(f"digits, {way}", f"search loss {found['search']:.6f}, keeps {found['kept']}, "
                  f"recovery loss {found['recovery']:.6f}, FID {found['fid']:.4f}; beside the first, latents differ by "
                  f"up to {latents:.2g}, grey values by up to {grey.max():.0f}, by {grey.mean():.2g} on average; "
                  f"{sum(d['seconds'] for d in done):.0f} s")

def results_of(folder: Path) -> dict:
    """What the stages wrote."""
    search, recovery = log_of(folder / "prune")[-1], log_of(folder / "distill")[-1]
    return dict(latents=np.load(folder / "latents/moments.npy").astype(np.float32), search=search["loss"],
                kept=" ".join(map(str, search["kept"])), recovery=recovery["loss"],
                images=np.load(folder / "sample/samples.npz")["arr_0"].astype(np.float32),
                fid=json.loads((folder / "fid.json").read_text())["fid"])

def write_inputs(out: Path, name: str, images: int):
    """Random weights, latents and images in `out`: speed does not depend on what they hold."""
    torch.manual_seed(0)
    net, rng = build_model(name, 4 if name.endswith("-tiny") else None), np.random.default_rng(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    torch.save(net.state_dict(), out / "random.pt")
    torch.save(AutoencoderKL(SD).state_dict(), out / "vae.pt")
    size = 32 if name.endswith("-tiny") else 256
    pictures = rng.integers(0, 256, (images, size, size, 3), np.uint8)
    np.savez(out / "images.npz", arr_0=pictures, arr_1=np.arange(images) % net.classes)
    folder, shape = out / "latents-random", (net.channels, net.input_size, net.input_size)
    folder.mkdir(exist_ok=True)
    np.save(folder / "moments.npy", rng.standard_normal((2048, 1, 2 * shape[0], *shape[1:])).astype(np.float16))
    np.save(folder / "labels.npy", np.arange(2048) % net.classes)
    facts = dict(shape=shape, scale=1.0, classes=list(map(str, range(net.classes))), count=2048, flips=1, complete=True)
    (folder / "meta.json").write_text(json.dumps(facts))

def full_size(check, name: str):
    """Images/s and memory of a model's steps."""
    home, out, steps = name.endswith("-tiny"), check.out, 12
    batch, images = (8, 16) if home else (32, 256)  # per rank; of the extraction
    write_inputs(out, name, images)
    random, never = ["--model", name, "--ckpt", out / "random.pt"], ["--resume", "never"]
    check.run("cut", "prune", *random, "--criterion", "oracle", "--latents", out / "none", "--out", out / "cut", *never)
    train = ["--latents", out / "latents-random", "--steps", steps, "--log-every", steps // 3, *never]
    tasks = {"prune, LoRA": ["prune", *random], "prune, full dW": ["prune", *random, "--delta-w", "full"],
             "distill, masked KD": ["distill", "--student", out / "cut/shallow.pt"]}
    ways = {"float32": (1, ["--dtype", "float32"]), "bfloat16": (1, ["--dtype", "bfloat16"]),
            "bfloat16, compiled": (1, ["--dtype", "bfloat16", "--compile"]),
            f"bfloat16, {check.all} ranks": (check.all, ["--dtype", "bfloat16"])}
    for way, (ranks, flags) in ways.items():
        size, peak = f"batch {batch} per rank", lambda facts: f"peak {facts['peak']:.1f} GiB per rank"
        for what, task in tasks.items():
            title = f"{name}, {what}, {way}"
            own = [*train, "--batch-size", batch * ranks, "--out", out / "train", *flags]
            if facts := check.run(title, *task, *own, ranks=ranks):
                check.row(title, f"{speed_of(out / 'train', batch * ranks):.1f} images/s, {size}, {peak(facts)}")
        if "--compile" not in flags:
            title = f"{name}, extract, {way}"
            vae = [] if home else ["--vae", MODELS[name]["vae"], "--ckpt", out / "vae.pt"]
            own = ["--data", out / "images.npz", "--out", out / "extracted", *never, *vae, *flags]
            if facts := check.run(title, "extract_latents", *own, ranks=ranks):
                check.row(title, f"{images} images in {facts['seconds']:.0f} s with the start, {peak(facts)}")
        title = f"{name}, sample, {way}"
        own = [*random, "--num-images", 2 * batch * ranks, "--batch-size", batch, "--steps", 10, "--out", out / "drawn"]
        vae = [] if home else ["--vae-ckpt", out / "vae.pt"]
        if facts := check.run(title, "sample", *own, *vae, *flags, ranks=ranks):
            speed = json.loads((out / "drawn/samples.json").read_text())["images_per_s"]
            check.row(title, f"{10 * speed:.1f} image steps/s with decoding, {size}, {peak(facts)}")

def main():
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        return run_stage(sys.argv[1], sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="dit-xl", choices=MODELS)
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    check = Check(args)
    digits(check)
    full_size(check, args.model)
    check.row("failed", check.failed)

if __name__ == "__main__":
    main()
