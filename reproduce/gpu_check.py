"""The part of gpu_check.sh that runs the stages: does a GPU, or several, give what is expected, how fast, in how much memory?

    python reproduce/gpu_check.py --device cuda --model dit-xl --out out/gpu-check
    python reproduce/gpu_check.py STAGE FLAGS      # how it calls itself: one stage, and a line of JSON with its peak memory
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
        self.ways = {f"1 {args.device}": (1, [])}
        if self.all > 1:
            self.ways[f"{self.all} {args.device}"] = (self.all, [])

    def run(self, name: str, stage: str, *flags, ranks=1):
        """-> facts of a stage: seconds, peak memory in GiB; None, with a row that says why, if it failed."""
        here = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        started, log = time.time(), self.out / f"{name.replace(' ', '-')}.log"
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
    """Each stage, small: on one GPU, on all, in bfloat16 and compiled; compared with the first."""
    out, first, steps = check.out, None, 20
    ways = {"1 rank": (1, []), f"{check.all} ranks": (check.all, []), "1 rank, bfloat16": (1, ["--dtype", "bfloat16"]),
            "1 rank, compiled": (1, ["--compile"])}
    for way, (ranks, flags) in ways.items():
        folder = out / way.replace(" ", "-").replace(",", "")
        latents, common = folder / "latents", ["--resume", "never"]
        dtype = flags if "--dtype" in flags else []
        done = [check.run(f"extract, {way}", "extract_latents", "--out", latents, *common, *dtype, ranks=ranks)]
        common += ["--steps", steps, "--log-every", steps // 2, "--latents", latents]
        float32 = ["--dtype", "float32"] if "--dtype" not in flags else []
        done += [check.run(f"prune, {way}", "prune", "--out", folder / "prune", *common, *flags, *float32, ranks=ranks)]
        done += [check.run(f"distill, {way}", "distill", "--student", folder / "prune/shallow.pt", "--out", folder / "distill", *common,
                           *flags, *float32, ranks=ranks)]
        done += [check.run(f"sample, {way}", "sample", "--model", "dit-tiny", "--num-images", 200, "--out", folder / "sample", *flags,
                           ranks=ranks)]
        done += [check.run(f"fid, {way}", "fid", folder / "sample/samples.npz", "--no-pr", "--json", folder / "fid.json", ranks=ranks)]
        if None in done:
            continue
        found = dict(latents=np.load(latents / "moments.npy").astype(np.float32), loss=log_of(folder / "distill")[-1]["loss"],
                     search=log_of(folder / "prune")[-1]["loss"], kept=log_of(folder / "prune")[-1]["kept"],
                     images=np.load(folder / "sample/samples.npz")["arr_0"].astype(np.float32), fid=json.loads((folder / "fid.json").read_text())["fid"])
        first = first or found
        difference = lambda k: f"{np.abs(found[k] - first[k]).max():.2g}"
        check.row(f"digits, {way}", f"search loss {found['search']:.6f}, keeps {' '.join(map(str, found['kept']))}, recovery loss {found['loss']:.6f}, "
                  f"FID {found['fid']:.4f}; from the first: latents differ by up to {difference('latents')}, grey values by {difference('images')}, "
                  f"{np.abs(found['images'] - first['images']).mean():.2g} on average; {sum(d['seconds'] for d in done):.0f} s")

def full_size(check, name: str):
    """Images/s and memory of a model's steps, on random weights, latents and images."""
    small = name.endswith("-tiny")
    out, batch, steps = check.out, 8 if small else 32, 12
    torch.manual_seed(0)
    net = build_model(name, 4 if small else None)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    torch.save(net.state_dict(), out / "random.pt")
    count, channels, side = 2048, net.channels, net.input_size
    latents = out / "latents-random"
    latents.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(latents / "moments.npy", np.concatenate([rng.standard_normal((count, 1, channels, side, side)), np.full((count, 1, channels, side, side), 0.1)], 2)
            .astype(np.float16))
    np.save(latents / "labels.npy", np.arange(count) % net.classes)
    facts = dict(shape=[channels, side, side], scale=1.0, classes=[str(i) for i in range(net.classes)], count=count, flips=1, complete=True)
    (latents / "meta.json").write_text(json.dumps(facts))
    size = 32 if small else 256
    images, vae = 8 if small else 256, [] if small else ["--vae", MODELS[name]["vae"], "--ckpt", out / "vae.pt"]
    if not small:
        torch.save(AutoencoderKL(SD).state_dict(), out / "vae.pt")
    np.savez(out / "images.npz", arr_0=rng.integers(0, 256, (images, size, size, 3), np.uint8), arr_1=np.arange(images) % net.classes)
    check.run("cut", "prune", "--model", name, "--ckpt", out / "random.pt", "--criterion", "oracle", "--latents", "none", "--out", out / "cut", "--resume", "never")
    source, student = ["--model", name, "--ckpt", out / "random.pt"], ["--student", out / "cut/shallow.pt"]
    training = ["--latents", latents, "--steps", steps, "--log-every", steps // 3, "--save-every", steps, "--resume", "never"]
    ways = {"float32": (1, ["--dtype", "float32"]), "bfloat16": (1, ["--dtype", "bfloat16"]),
            "bfloat16, compiled": (1, ["--dtype", "bfloat16", "--compile"]),
            f"bfloat16, {check.all} ranks": (check.all, ["--dtype", "bfloat16"])}
    for way, (ranks, flags) in ways.items():
        for what, stage, own in (("prune, LoRA", "prune", source), ("prune, full dW", "prune", [*source, "--delta-w", "full"]), ("distill, masked KD", "distill", student)):
            title = f"{name}, {what}, {way}"
            facts = check.run(title, stage, *own, *training, "--batch-size", batch * ranks, "--out", out / "train", *flags, ranks=ranks)
            if facts:
                speed = speed_of(out / "train", batch * ranks)
                check.row(title, f"{speed:.1f} images/s, batch {batch} per rank, peak {facts['peak']:.1f} GiB")
        if "--compile" not in flags:
            title = f"{name}, extract, {way}"
            facts = check.run(title, "extract_latents", "--data", out / "images.npz", "--out", out / "extracted", "--resume", "never", *vae, *flags, ranks=ranks)
            facts and check.row(title, f"{images} images in {facts['seconds']:.0f} s with the start, peak {facts['peak']:.1f} GiB")
        title, images_drawn = f"{name}, sample, {way}", batch * ranks
        decoder = ["--vae-ckpt", out / "vae.pt"] if not small else []
        facts = check.run(title, "sample", *source, "--num-images", 2 * images_drawn, "--batch-size", batch, "--steps", 10, "--out", out / "drawn", *decoder, *flags, ranks=ranks)
        if facts:
            speed = json.loads((out / "drawn/samples.json").read_text())["images_per_s"]
            check.row(title, f"{10 * speed:.1f} image steps/s with decoding, batch {batch} per rank, peak {facts['peak']:.1f} GiB")

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
