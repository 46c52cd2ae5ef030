"""Every test, in the pipeline's order. `pytest test_all.py` takes minutes; SLOW=1 adds the full-size networks (12 GB).

Reference values (data/test_goldens.npz) were computed with the official DiT, SiT, MAR, TinyFusion, VAE and FID code on
weights that `fill` reproduces from the tensors' names. A test states a fact, not that a function returns.
"""
import argparse
import copy
import hashlib
import http.server
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

import distill
import extract_latents
import fid
import model
import prune
import sample
from extract_latents import (
    DIGITS, KL16, SD, VAES, AutoencoderKL, Batches, Latents, center_crop, decode_images, epoch_order, load_vae,
    read_npz, rename_vae_keys, to_pixels)
from model import RowGenerator, UserError, build_model, gather_tokens, make_seed

ROOT = Path(__file__).resolve().parent
CLASSIFIER = ROOT / "weights/digits-classifier.pt"
GOLDENS = np.load(ROOT / "data/test_goldens.npz")
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="SLOW=1 runs the full-size networks")
torch.set_num_threads(1)


def golden(case):
    """The arrays of a reference case: in.* are inputs, out.* what the official code made of them."""
    names = [name for name in GOLDENS if name.startswith(f"{case}/")]
    return {name.removeprefix(f"{case}/"): torch.from_numpy(GOLDENS[name]) for name in names}


def stored(key):
    """One array of the reference file."""
    return GOLDENS[key]


def golden_noise(seed, *shape):
    """Random numbers of the reference runs."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


@torch.no_grad()
def fill(net):
    """Deterministic weights, from each tensor's name and shape alone."""
    tables = ("embedding_table.weight", "class_emb.weight", "mask_token", "fake_latent", "pos_embed_learned")
    for name, p in net.state_dict().items():
        if name == "pos_embed":
            continue
        v = golden_noise(zlib.crc32(name.encode()), *p.shape)
        if name.endswith(tables):
            v *= 0.3
        elif v.ndim >= 2:
            v *= 0.7 / np.sqrt(v.numel() / len(v))
        elif name.endswith("weight"):
            v = 1 + 0.1 * v
        else:
            v *= 0.1
        p.copy_(v)
    return net.eval()


def near(got, want, tolerance=1e-5):
    """max |got - want| <= tolerance * max |want| in each row, since rows can differ in scale."""
    got = torch.as_tensor(got)
    want = torch.as_tensor(want)
    assert got.shape == want.shape
    for row, wanted in zip(*torch.atleast_1d(got, want)):
        assert (row - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-8)


DIT_GOLDEN = dict(width=64, heads=4)
MAR_GOLDEN = dict(width=32, depth=4, heads=4, loss_width=32, loss_depth=2, input_size=4)
FAMILIES = {  # the same tests run on all three: name -> a small shape of it, with the table's heads
    "dit-tiny": dict(width=36),
    "sit-tiny": dict(width=36),
    "mar-tiny": dict(width=36, loss_width=32, loss_depth=1, dropout=0.1),
}
family = pytest.mark.parametrize("name", FAMILIES)


def small(name, depth=4):
    return fill(build_model(name, depth, **FAMILIES[name]))


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A latent folder of 96 random images, 10 classes, in the format of extract_latents.py."""
    folder = tmp_path_factory.mktemp("latents")
    moments = np.random.default_rng(0).standard_normal((96, 1, 8, 8, 8)).astype(np.float16)
    moments[:, :, 4:] = 0.1 * np.abs(moments[:, :, 4:])  # the standard deviations
    np.save(folder / "moments.npy", moments)
    np.save(folder / "labels.npy", np.arange(96) % 10)
    meta = dict(complete=True, shape=[4, 8, 8], scale=1.0, classes=list("0123456789"))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """A small teacher checkpoint of each family."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in FAMILIES:
        state = small(name).state_dict()
        model.save_checkpoint(folder / f"{name}.pt", model=state, config=dict(name=name))
    return folder


def run(stage, *flags):
    """A stage's main() in this process."""
    stage.main([str(flag) for flag in flags])


def launch(*command, ranks=0):
    """A stage as a process of its own, under torchrun if ranks are given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *torchrun, *map(str, command)]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def user_error(stage, *flags):
    """The one sentence with which a stage ends."""
    with pytest.raises(UserError) as raised:
        run(stage, *flags)
    return str(raised.value)


def script(name):
    """A module of reproduce/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "reproduce" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def weights_of(path, which="model"):
    return torch.load(path, weights_only=True)[which]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------
# extract_latents.py


def manifest_vae(name):
    """The names of an official file's weights, with tensors of their shapes."""
    state = {}
    for line in stored(f"manifest/{name}"):
        key, shape = line.decode().split()
        state[key] = torch.empty([int(side) for side in shape.split(",")])
    return state


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """60 digits as an .npz, which are encoded in shards of 20."""
    monkeypatch.setitem(VAES["digits"], "shard", 20)
    images, labels, _ = read_npz(DIGITS)
    np.savez(tmp_path / "digits.npz", arr_0=images[:60], arr_1=labels[:60])
    return tmp_path / "digits.npz"


def extract(data, out, *flags):
    run(extract_latents, "--device", "cpu", "--data", data, "--out", out, *flags)


def extract_error(*arguments):
    with pytest.raises(UserError) as raised:
        extract(*arguments)
    return str(raised.value)


def padded(images):
    """Digits as the VAE sees them."""
    x = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2))))
    return x[:, None].float() / 127.5 - 1


def files_of(folder):
    return [(folder / name).read_bytes() for name in ("moments.npy", "labels.npy", "meta.json")]


# The VAE


@pytest.mark.parametrize("case, config, manifest", [
    ("vae_sd_64", SD, "vae_sd_diffusers_current"),
    ("vae_kl16_64", KL16, "vae_kl16_mar"),
])
@torch.no_grad()
def test_vae_golden(case, config, manifest):
    state = manifest_vae(manifest)
    fill(argparse.Namespace(state_dict=lambda: state, eval=dict))
    vae = AutoencoderKL(config)
    vae.load_state_dict(rename_vae_keys(state, len(config["channels"])))
    reference = golden(case)
    mean, std = vae.encode(reference["in.image_u8"].float() / 127.5 - 1)
    near(mean, reference["out.mean"], 2e-5)
    near(2 * std.log(), reference["out.logvar"], 2e-5)
    near(vae.decode(reference["in.latent"]), reference["out.decoded"], 2e-5)


def test_vae_dialects_of_names():
    with torch.device("meta"):
        ours = AutoencoderKL(SD).state_dict()
    for dialect in "current", "old_attention_linear", "old_attention_conv1x1":
        renamed = rename_vae_keys(manifest_vae(f"vae_sd_diffusers_{dialect}"), 4)
        assert {key: v.shape for key, v in renamed.items()} == {key: v.shape for key, v in ours.items()}
    attention = "encoder.mid_block.attentions.0."
    for old, new in dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items():
        assert list(rename_vae_keys({f"{attention}{old}.bias": torch.ones(3)}, 4)) == [f"{attention}{new}.bias"]


def test_vae_files(tmp_path, monkeypatch):
    tiny = dict(SD, channels=[8, 8], groups=4)
    monkeypatch.setitem(VAES, "sd-ema", tiny)
    vae = AutoencoderKL(tiny)
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    assert same_weights(load_vae("sd-ema", tmp_path / "vae.pt").state_dict(), vae.state_dict())
    for name, ckpt in ("kl16", tmp_path / "vae.pt"), ("sd-ema", ROOT / "weights/vae-digits.pt"):
        with pytest.raises(UserError):
            load_vae(name, ckpt)


def test_vae_bundled_reconstructs_digits():
    vae = load_vae()
    x = padded(read_npz(DIGITS)[0][9000:])  # it learned from the others
    mean, std = vae.encode(x)
    error = (vae.decode(mean).clamp(-1, 1) - x).square().mean() / 4
    assert -10 * error.log10() >= 28  # PSNR
    assert 0.9 < (mean + std * torch.randn_like(std)).std() * vae.scale < 1.1


def test_vae_decode_images():
    vae = load_vae()
    z = torch.randn(5, 4, 8, 8)
    want = (127.5 * vae.decode(z / vae.scale) + 128).clamp(0, 255).to(torch.uint8)
    images = torch.from_numpy(decode_images(vae, z))  # (5, 32, 32, 3)
    assert torch.equal(images, want.permute(0, 2, 3, 1).repeat(1, 1, 1, 3))


# Images


@pytest.mark.parametrize("width, height, seed", [(500, 375, 400), (300, 900, 401), (256, 256, 402)])
def test_extract_center_crop_golden(width, height, seed):
    y, x = np.mgrid[:height, :width]
    noise = np.random.RandomState(seed).randint(0, 64, size=(height, width, 3))
    waves = [(x * 3 + y * (5 + 2 * c) + 17 * c + (x * y) // (11 + c)) % 256 for c in range(3)]
    image = Image.fromarray(np.clip((np.stack(waves, axis=-1) * 3 + noise * 4) // 4, 0, 255).astype(np.uint8))
    difference = center_crop(image, 64).astype(int) - stored(f"center_crop/out.{width}x{height}_to_64")
    assert np.abs(difference).max() <= 2  # 0 with Pillow 13, 2 with those before


def test_extract_any_image_becomes_rgb_or_grey():
    digit = read_npz(DIGITS)[0][0]
    assert np.array_equal(to_pixels(Image.fromarray(digit), 32, 1)[0], np.pad(digit, 2))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    for mode in "CMYK", "RGBA", "L", "P":
        converted = image.convert(mode)
        assert np.array_equal(to_pixels(converted, 8, 3)[0], center_crop(converted.convert("RGB"), 8)[..., 0])
        assert np.array_equal(to_pixels(converted, 8, 1)[0], center_crop(converted.convert("L"), 8))


@pytest.fixture
def photos(tmp_path):
    """A folder of three classes, with two files that are damaged, and with what systems leave in folders."""
    data = tmp_path / "data"
    images, _, _ = read_npz(DIGITS)
    order = ("a10/1.png", "a10/2.PNG", "a10/sub/0.png", "a9/x.png", "b/y.png", "b/z.png")  # ImageFolder's
    for k, name in enumerate(order):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[k]).save(data / name)
    os.truncate(data / "b" / "y.png", 120)
    (data / "a10" / "2.PNG").write_text("a page of HTML")
    (data / "b" / "notes.txt").write_text("not an image")
    (data / "b" / "._z.png").write_text("of macOS")
    (data / ".cache").mkdir()
    return data


def test_extract_folder_order_and_unreadable_images(tmp_path, photos, capsys):
    extract(photos, tmp_path / "out")
    printed = capsys.readouterr()
    assert "latents of 4 images of 3 classes" in printed.out and ".cache" in printed.err
    latents = Latents(tmp_path / "out")
    assert latents.meta["classes"] == ["a10", "a9", "b"]
    for problem, name in zip(latents.meta["skipped"], ("2.PNG", "y.png"), strict=True):
        assert f"{name}: " in problem and problem in printed.err
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0, -1, 0, 1, -1, 2]
    assert latents.labels.tolist() == [0, 0, 1, 2]
    moments, _ = latents.read(np.arange(4), None)  # of the images that can be read
    want = torch.cat(load_vae().encode(padded(read_npz(DIGITS)[0][[0, 2, 3, 5]])), dim=1)
    torch.testing.assert_close(moments.float(), want, atol=5e-3, rtol=0)


def test_extract_folder_mistakes(tmp_path, photos):
    (photos / "empty").mkdir()
    assert "empty holds no .jpg" in extract_error(photos, tmp_path / "out")
    assert "no class folders" in extract_error(photos / "empty", tmp_path / "out")
    (photos / "empty").rmdir()
    for k in range(12):  # as if the disk went away, rather than a few bad files
        (photos / "a10" / f"bad{k}.png").write_text("")
    assert "14 of 18 images" in extract_error(photos, tmp_path / "out")
    assert not list(tmp_path.glob("out/shards/*"))


def test_extract_npz_mistakes(tmp_path, digits):
    images = np.zeros((3, 8, 8))
    for arrays in dict(arr_0=images), dict(arr_0=images, arr_1=[0] * 3):
        np.savez(digits, **arrays)
        assert "arr_1" in extract_error(digits, tmp_path / "out")


# Writing


def test_extract_moments_and_mirror_images(tmp_path, digits):
    out = tmp_path / "out"
    extract(digits, out, "--flip", "--batch-size", 7)
    images, labels, _ = read_npz(digits)
    x = padded(images)
    vae = load_vae()
    views = [torch.cat(vae.encode(view), dim=1) for view in (x, x.flip(-1))]
    latents = Latents(out)
    want = torch.stack(views, dim=1).numpy()
    assert latents.moments.dtype == np.float16 and np.abs(latents.moments - want).max() < 5e-3
    assert np.array_equal(latents.labels, labels)
    facts = dict(complete=True, scale=vae.scale, flips=2, skipped=[], shape=[4, 8, 8], classes=list("0123456789"))
    assert latents.meta | facts == latents.meta


def test_extract_killed_then_three_ranks_same_bytes(tmp_path):
    images, labels, _ = read_npz(DIGITS)
    np.savez(tmp_path / "d.npz", arr_0=images[:1600], arr_1=labels[:1600])
    command = [ROOT / "extract_latents.py", "--data", tmp_path / "d.npz", "--device", "cpu", "--out"]
    whole = tmp_path / "whole"
    out = tmp_path / "killed"
    assert launch(*command, whole).returncode == 0
    with subprocess.Popen([sys.executable, *map(str, command), out]) as killed:
        while killed.poll() is None and len(list(out.glob("shards/*.pt"))) < 2:
            time.sleep(0.01)
        killed.kill()
    with pytest.raises(UserError, match="not complete"):
        Latents(out)
    assert launch(*command, out, ranks=3).returncode == 0
    assert files_of(whole) == files_of(out)


def test_extract_dies_between_any_two_steps(tmp_path, monkeypatch, digits):
    """Ended by an exception at the k-th step on disk, for every k, then started again."""
    extract(digits, tmp_path / "whole")
    calls = []

    def dying(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == k:
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        return call

    save = torch.save
    for place, name in (os, "replace"), (torch, "save"), (np.lib.format, "write_array_header_1_0"), (shutil, "rmtree"):
        monkeypatch.setattr(place, name, dying(getattr(place, name)))
    for k in range(1, 15):
        calls.clear()
        out = tmp_path / f"out{k}"
        with pytest.raises(KeyboardInterrupt):
            extract(digits, out)
        if k < 14:
            with pytest.raises(UserError):
                Latents(out)
        extract(digits, out)
        assert files_of(tmp_path / "whole") == files_of(out)
        assert calls.count(save) <= 4  # of 3 shards: those that were whole are not made again


def test_extract_again(tmp_path, digits, capsys):
    out = tmp_path / "out"
    extract(digits, out)
    extract(digits, out)
    assert "nothing to encode" in capsys.readouterr().out
    other = torch.load(ROOT / "weights/vae-digits.pt")
    other["model"]["quant_conv.bias"] += 1
    torch.save(other, tmp_path / "vae.pt")
    cases = dict(flips=["--flip"], batch_size=["--batch-size", 9], weights=["--ckpt", tmp_path / "vae.pt"])
    for word, flags in cases.items():
        error = extract_error(digits, out, *flags)
        assert f"another {word}," in error and "--resume never" in error
    images, labels, _ = read_npz(digits)
    np.savez(digits, arr_0=images, arr_1=labels[::-1])  # the same images with other labels
    assert "another data," in extract_error(digits, out)
    extract(digits, out, "--resume", "never")
    assert Latents(out).labels.tolist() == labels[::-1].tolist()


# Reading


def write_latents(folder, flips=2, **changes):
    """Random latents (4, 7, 9), whose rows do not fill pages of memory; image i has label i."""
    moments = np.random.default_rng(0).standard_normal((50, flips, 8, 7, 9))
    np.save(folder / "moments.npy", moments.astype(np.float16))
    np.save(folder / "labels.npy", np.arange(50))
    meta = dict(shape=[4, 7, 9], scale=0.5, classes=list("abc"), count=50, flips=flips, complete=True)
    (folder / "meta.json").write_text(json.dumps(meta | changes))
    return Latents(folder)


@pytest.mark.parametrize("flips", [1, 2])
def test_extract_reading_is_the_formula(tmp_path, flips):
    """x = scale (mean + std eps), bit by bit, of the images or their mirror images."""
    latents = write_latents(tmp_path, flips)
    rows = np.random.default_rng(0).integers(0, 50, 600)
    rng = RowGenerator((3, 1), 0, 600, 600)
    mirrored = (rng.shared.random(600) < 0.5) & (flips == 2)
    moments = latents.moments[rows, mirrored.astype(int)].astype(np.float32)
    mean, std = np.split(moments, 2, axis=1)
    want = (mean + std * rng.normal(4, 7, 9).numpy()) * np.float32(0.5)
    rng = RowGenerator((3, 1), 0, 600, 600)
    moments, y = latents.read(rows, rng)
    assert np.array_equal(latents.sample_posterior(moments, rng), want)
    assert np.array_equal(y, rows)


def test_extract_reading_mistakes(tmp_path):
    with pytest.raises(UserError, match="extract_latents.py writes it"):
        Latents(tmp_path)
    with pytest.raises(UserError, match="not complete"):
        write_latents(tmp_path, complete=False)


def test_batches_visit_each_image_once_in_an_epoch(tmp_path):
    latents = write_latents(tmp_path)
    with pytest.raises(UserError, match="--batch-size 51"):
        Batches(latents, 51, 1, 5, "cpu")
    batches = Batches(latents, 10, 1, 5, "cpu")
    for epoch in range(2):
        labels = torch.cat([batches(5 * epoch + step, 0)[1] for step in range(5)]).tolist()
        assert labels == np.random.default_rng(make_seed(5, epoch)).permutation(50).tolist()


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (2, 1), (3, 2), (1, 7)])
def test_batches_are_the_global_batch_for_any_ranks_and_accumulation(tmp_path, monkeypatch, ranks, accumulate):
    latents = write_latents(tmp_path)
    monkeypatch.setattr(extract_latents, "world_size", lambda: ranks)
    for step in 0, 1, 40:  # 2 steps an epoch
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(extract_latents, "rank", lambda: rank)
            batches = Batches(latents, 20, accumulate, 5, "cpu")
            for part in range(accumulate):
                x, y, rng = batches(step, part)
                parts.append((x, y, rng.uniform()))
            batches.prepared.close()  # its threads, before the next rank's turn
        rng = RowGenerator((5, step), 0, 20, 20)
        moments, labels = latents.read(epoch_order(50, 5, step // 2)[step % 2 * 20 :][:20], rng)
        want = latents.sample_posterior(moments, rng), labels, rng.uniform()  # the last: what training draws next
        for k in range(3):
            assert torch.equal(torch.cat([part[k] for part in parts]), want[k])


def test_batches_prefetching_changes_nothing(tmp_path):
    """Parts in order, a step again, a jump ahead, a jump back; threads that finish in another order."""
    latents = write_latents(tmp_path)
    batches = Batches(latents, 20, 2, 5, "cpu")
    for call in (0, 0), (0, 1), (1, 0), (1, 0), (1, 1), (7, 0), (7, 1), (0, 0):
        assert torch.equal(batches(*call)[0], Batches(latents, 20, 2, 5, "cpu")(*call)[0])

    def slow(i):
        time.sleep(0.01 * (i % 3))
        return i

    assert list(extract_latents.prefetch(slow, range(9), ahead=3)) == list(range(9))


def test_batches_latents_must_fit_the_network(tmp_path):
    latents = write_latents(tmp_path, shape=[4, 2, 2])
    net = argparse.Namespace(channels=4, input_size=2, classes=3)
    extract_latents.check_fit(net, latents, "folder")
    for attribute in "channels", "input_size", "classes":
        with pytest.raises(UserError, match="folder"):
            extract_latents.check_fit(argparse.Namespace(**vars(net) | {attribute: 1}), latents, "folder")


