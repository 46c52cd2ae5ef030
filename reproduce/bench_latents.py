"""Samples a second from one memory-mapped file (ours) and from one .npy file an image (the authors' release).

    python reproduce/bench_latents.py                     # 20,000 latents of 4x32x32, 1.3 GB in a temporary folder
    python reproduce/bench_latents.py --count 100000 --folder /scratch

Both are read in random order in batches of 256. Ours are the moments of the image or of its mirror image (32 KiB a sample,
twice the authors' 16 KiB), from which training draws a fresh posterior sample on the device: the last line times that too.
The files were just written, so both come from memory as far as it holds them; from a disk the gap is wider.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extract_latents import Latents, epoch_order
from model import RowNoise

BATCH, C, SIDE = 256, 4, 32


class OneFileAnImage(torch.utils.data.Dataset):
    def __init__(self, folder, count):
        self.folder, self.count = folder, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return torch.from_numpy(np.load(self.folder / f"features/{i}.npy")), torch.from_numpy(np.load(self.folder / f"labels/{i}.npy"))


def rate(batches) -> float:
    """Samples a second, from the second batch on."""
    next(batches)
    start, count = time.time(), 0
    for x, _ in batches:
        count += len(x)
    return count / (time.time() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the files are made, and deleted afterwards")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes tried for one file an image")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder, rng = Path(folder), np.random.default_rng(0)
        for name in "features", "labels":
            (folder / name).mkdir()
        moments = np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (args.count, 2, 2 * C, SIDE, SIDE))
        for i in range(args.count):
            moments[i] = rng.standard_normal(moments.shape[1:], np.float32)
            np.save(folder / f"features/{i}.npy", rng.standard_normal((C, SIDE, SIDE), np.float32))
            np.save(folder / f"labels/{i}.npy", np.array([i % 1000]))
        moments.flush()
        np.save(folder / "labels.npy", np.arange(args.count) % 1000)
        (folder / "meta.json").write_text(json.dumps(dict(
            shape=[C, SIDE, SIDE], scale=0.18215, classes=[str(i) for i in range(1000)], count=args.count, flips=2, complete=True)))

        latents, order = Latents(folder), epoch_order(args.count, 0, 0)
        rows = [order[k : k + BATCH] for k in range(0, args.count - BATCH + 1, BATCH)]
        ours = rate((latents.read(2 * r), None) for r in rows)
        print(f"one memory-mapped file          {ours:9,.0f} samples/s")
        for workers in args.workers:
            loader = torch.utils.data.DataLoader(OneFileAnImage(folder, args.count), BATCH, shuffle=True, num_workers=workers, drop_last=True)
            theirs = rate(iter(loader))
            print(f"one file an image, {workers} processes  {theirs:9,.0f} samples/s: {ours / theirs:.1f} times slower")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        drawn = rate(latents.batch(r, RowNoise((0, k), 0, BATCH, BATCH, device), device) for k, r in enumerate(rows))
        print(f"ours with the draw on the {device:5} {drawn:9,.0f} samples/s")


if __name__ == "__main__":
    main()
