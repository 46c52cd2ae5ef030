"""Every test, in the pipeline's order. `pytest test_all.py` takes some minutes; SLOW=1 adds the full-size networks (12 GB).

Reference values (data/test_goldens.npz) were computed with the official DiT, SiT, MAR, TinyFusion, VAE and FID code on weights
that `fill` reproduces from the tensors' names. A test states a fact about the method, not that a function returns.
"""
import argparse
import copy
import fcntl
import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.linalg import sqrtm

import distill
import extract_latents
import fid
import model
import prune
import sample
from extract_latents import (DIGITS, DIGITS_VAE, KL16, SD, VAES, AutoencoderKL, Latents, center_crop, decode_images, epoch_order, load_vae, psnr, read_npz, rename_vae_keys, to_pixels, train_vae)
from model import RowNoise, build_model, load_state

ROOT = Path(__file__).resolve().parent
CLASSIFIER = ROOT / "weights/digits-classifier.pt"
GOLDENS = np.load(ROOT / "data/test_goldens.npz")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs the full-size networks")
torch.set_num_threads(1)


def golden(case: str) -> dict:
    """The arrays of a reference case: in.* are inputs, out.* what the official code made of them."""
    return {k.split("/", 1)[1]: torch.from_numpy(GOLDENS[k]) for k in GOLDENS.files if k.startswith(case + "/")}


def stored(key: str) -> np.ndarray:
    """One array of the reference file."""
    return GOLDENS[key]


def fill(net, prefix=""):
    """Deterministic weights, from each tensor's name and shape alone."""
    for name, p in net.state_dict().items():
        if name == "pos_embed":
            continue
        v = np.random.RandomState(zlib.crc32((prefix + name).encode()) & 0xFFFFFFFF).standard_normal(tuple(p.shape))
        if name.endswith(("embedding_table.weight", "class_emb.weight", "mask_token", "fake_latent")) or "pos_embed" in name:
            v *= 0.3
        elif v.ndim >= 2:
            v *= 0.7 / np.sqrt(v.size / v.shape[0])
        else:
            v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
        p.copy_(torch.from_numpy(v.astype(np.float32)))
    return net.eval()


def near(got, want, tolerance=1e-5):
    """max |got - want| <= tolerance * max |want|, row by row, since rows can differ in scale."""
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    rows = (lambda v: v.flatten(1).abs().max(1)[0] if v.ndim > 1 else v.abs())
    error = (rows(got - want) / rows(want).clamp_min(1e-8)).max().item()
    assert error <= tolerance, f"relative error {error:.2e}"


class Injected:
    """A stand-in for RowNoise: draw k of the golden run, its first n rows (we do not carry the null half's noise)."""

    def __init__(self, shape, n, first=1000):
        self.shape, self.n, self.k = shape, n, first

    def __call__(self):
        v = np.random.RandomState(self.k).standard_normal(self.shape).astype(np.float32)
        self.k += 1
        return torch.from_numpy(v)[: self.n]


DIT_GOLDEN = dict(width=64, heads=4, input_size=8, classes=10)
MAR_GOLDEN = dict(width=32, depth=4, heads=4, loss_width=32, loss_depth=2, input_size=4, classes=10, channels=4, buffer=4)
FAMILIES = {  # the same tests run on all three: name -> a small shape of it
    "dit-tiny": dict(width=32, heads=2),
    "sit-tiny": dict(width=32, heads=2),
    "mar-tiny": dict(width=32, heads=2, loss_width=32, loss_depth=1, dropout=0.1),
}
family = pytest.mark.parametrize("name", FAMILIES)


def small(name, depth=4):
    with torch.no_grad():
        return fill(build_model(name, depth, **FAMILIES[name]))


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A latent folder of 96 random images, 10 classes, in the format of extract_latents.py."""
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((96, 1, 8, 8, 8)).astype(np.float16)
    moments[:, :, 4:] = 0.1 * np.abs(moments[:, :, 4:])
    np.save(folder / "moments.npy", moments)
    np.save(folder / "labels.npy", np.arange(96) % 10)
    meta = dict(complete=True, shape=[4, 8, 8], scale=1.0, classes=[str(i) for i in range(10)], count=96, flips=1, vae="digits")
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """A small teacher checkpoint of each family."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, shape in FAMILIES.items():
        net = small(name)
        model.save_checkpoint(folder / f"{name}.pt", model=net.state_dict(), config=dict(name=name, depth=net.depths(), overrides=shape), step=0)
    return folder


def run(module, *flags):
    """A stage's main() in this process."""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, flags)]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        module.main()
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)


def launch(*command, ranks=0, cwd=None, **environment):
    """A stage as a process of its own, under torchrun if ranks are given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *torchrun, *map(str, command)], capture_output=True, text=True, timeout=240, env=environment, cwd=cwd)


def user_error(capsys, module, *flags) -> str:
    """The one sentence with which a stage refuses; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(module, *flags)
    lines = capsys.readouterr().err.strip().split("\n")
    assert stopped.value.code == 2 and lines[-1].startswith("error: ") and all(" steps/s " in line for line in lines[:-1]), lines
    return lines[-1]


def give_mask(layer, mask, on):
    """Sets a MaskedLayer's mask as LayerMasks.draw does."""
    order = (~on).to(torch.uint8).argsort(stable=True)
    layer.set_mask(mask, int(on.sum()), order, order.argsort())


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def weights_of(path, which="model"):
    return torch.load(path, weights_only=True)[which]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------------------
# model.py: networks.


@torch.no_grad()
def test_dit_forward_and_guidance():
    g, net = golden("dit_small_forward"), fill(build_model("dit-tiny", 4, **DIT_GOLDEN))
    hidden = distill.HiddenStates(net, range(4)).states
    near(net(g["in.x"], g["in.t"], g["in.y"]), g["out.output"])
    for i in range(4):
        near(hidden[i], g[f"out.block_0{i}"])
    near(net.pos_embed, g["out.pos_embed"])
    near(net.t_embedder(g["in.t"]), g["out.t_emb"], 7e-5)
    guided = model.guide(net, g["in.x_cfg"][:2], g["in.t_cfg"][:2], g["in.y_cfg"][:2], null=10, scale=1.5, channels=3)
    near(guided, g["out.output_cfg"][:2])


@torch.no_grad()
def test_sit_forward_and_guidance():
    g, net = golden("sit_small_forward"), fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    near(net(g["in.x"], g["in.t"], g["in.y"]), g["out.output"])
    n = len(g["in.x_cfg"]) // 2
    guided = model.guide(net, g["in.x_cfg"][:n], g["in.t_cfg"][:n], g["in.y_cfg"][:n], null=10, scale=1.5, channels=3)
    near(guided, g["out.output_cfg"][:n])


@torch.no_grad()
def test_mar_forward():
    g, net = golden("mar_small_forward"), fill(build_model("mar-tiny", **MAR_GOLDEN, patch=1))
    hidden = distill.HiddenStates(net, range(4)).states
    mask = g["in.mask"].bool()
    kept = torch.stack([(~m).nonzero()[:, 0] for m in mask])
    tokens = net.patchify(g["in.latents"])
    near(tokens, g["out.tokens"])
    encoded = net.encode(tokens, g["in.y"], kept)
    near(encoded, g["out.encoder"])
    z = net.decode(encoded, kept)
    near(z, g["out.z"])
    for i, k in enumerate(("enc_block_0", "enc_block_1", "dec_block_0", "dec_block_1")):
        near(hidden[i], g[f"out.{k}"])
    near(net.encode(tokens, torch.tensor([10, 10]), kept), g["out.encoder_uncond"])
    near(net.unpatchify(tokens), g["out.unpatchified"])
    head = net.diffloss.net
    near(head(g["in.x_net"], g["in.t"], z.flatten(0, 1)), g["out.net_output"])
    half = len(g["in.x_net"]) // 2
    zs = z.flatten(0, 1)
    guided = model.guide(lambda x, t, _: head(x, t, zs), g["in.x_net"][:half], g["in.t"][:half], g["in.t"][:half], 0, 1.7, 4)
    near(guided, g["out.net_output_cfg"][:half], 2e-5)


@pytest.mark.parametrize("name, case, overrides", [
    ("dit-xl", "DiT-XL-2-256", {}), ("dit-l", "DiT-L-2-256", {}), ("dit-b", "DiT-B-2-256", {}), ("dit-s", "DiT-S-2-256", {}),
    ("dit-xl-512", "DiT-XL-2-512", {}), ("dit-d19", "DiT-D19-2-256", {}), ("dit-d14", "DiT-D14-2-256", {}), ("dit-d7", "DiT-D7-2-256", {}),
    ("sit-xl", "SiT-XL-2-256", {}), ("mar-base", "mar_base", {}), ("mar-large", "mar_large", {}), ("mar-huge", "mar_huge", {})])
def test_keys_and_shapes_are_the_official_ones(name, case, overrides):
    manifest = json.loads(bytes(GOLDENS[f"manifests/{case}"]))
    with torch.device("meta"):
        net = build_model(name, **overrides)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == manifest
    assert model.guess_model(net.state_dict()) in (name, name.replace("sit", "dit"))


@slow
@torch.no_grad()
@pytest.mark.parametrize("name, case", [("dit-xl", "dit_xl2_forward"), ("sit-xl", "sit_xl2_forward")])
def test_full_size_dit_and_sit(name, case):
    g, net = golden(case), fill(build_model(name))
    hidden = distill.HiddenStates(net, [0, 13, 27]).states
    near(net(g["in.x"], g["in.t"], g["in.y"]), g["out.output"])
    for i in (0, 13, 27):
        near(hidden[i][:, ::16, ::64], g[f"out.block_{i:02}_slice"])


@slow
@torch.no_grad()
def test_full_size_mar():
    g, net = golden("mar_large_forward"), fill(build_model("mar-large"))
    kept = (g["in.mask"][0] == 0).nonzero()[:, 0][None]
    encoded = net.encode(net.patchify(g["in.latents"]), g["in.y"], kept)
    near(encoded[:, ::8, ::16], g["out.encoder_slice"])
    z = net.decode(encoded, kept)
    near(z[:, ::16, ::16], g["out.z_slice"])
    near(net.diffloss.net(g["in.x_net"], g["in.t_net"], z[0, g["in.rows"]]), g["out.net_output"], 2e-5)


@family
def test_checkpointing_changes_no_gradient(name):
    net, gradients = small(name), []
    x, y = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    batch = net.objective().draw(x, y, RowNoise((0,), 0, 4, 4))
    for net.checkpointing in (False, True):
        net.zero_grad()
        net.objective().loss(net.objective().predict(net, batch), batch).sum().backward()
        gradients.append({k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None})
    assert same_weights(*gradients)


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the Gaussian process and the interpolant.


def test_schedules_and_respacing():
    g = golden("gaussian_schedules")
    for schedule in ("linear", "cosine"):
        tables = model.GaussianDiffusion(schedule).tables
        for k in tables:
            if f"out.{schedule}_{k}" in g:
                near(tables[k][g["in.indices"]], g[f"out.{schedule}_{k}"], 1e-10)
    for spacing in ("250", "64", "ddim50"):
        process = model.GaussianDiffusion("linear", spacing)
        assert process.timestep_map == g[f"out.timesteps_{spacing}"].tolist()
        near(process.tables["betas"], g[f"out.respaced_betas_{spacing}"], 1e-10)


def test_training_loss_of_dit():
    g, process = golden("gaussian_training_losses"), model.GaussianDiffusion()
    x_t = process.q_sample(g["in.x_start"], g["in.t"], g["in.noise"])
    near(x_t, g["out.x_t"])
    near(process.variance_bound(g["in.model_output"], g["in.x_start"], x_t, g["in.t"]), g["out.vb"])
    near(process.loss(g["in.model_output"], g["in.x_start"], x_t, g["in.t"], g["in.noise"]), g["out.loss"])


def test_the_variance_loss_gives_the_mean_no_gradient():
    out = torch.randn(4, 8, 8, 8, requires_grad=True)
    process, x = model.GaussianDiffusion(), torch.randn(4, 4, 8, 8)
    process.variance_bound(out, x, x, torch.tensor([0, 1, 500, 999])).sum().backward()
    assert (out.grad[:, :4] == 0).all() and (out.grad[:, 4:] != 0).any()


def test_one_sampling_step():
    g, process = golden("gaussian_p_mean_variance"), model.GaussianDiffusion("linear", "250")
    out, x, t, noise = g["in.model_output"], g["in.x"], g["in.t"], Injected((4, 4, 8, 8), 4)()
    for k, v in zip(("mean", "log_variance", "pred_xstart"), process.p_mean_variance(out, x, t)):
        near(v, g[f"out.{k}"])
    near(process.p_mean_variance(out, x, t, clip=True)[0], g["out.clip_mean"])
    near(process.ancestral_step(out, x, t, noise), g["out.p_sample"])
    near(process.ddim_step(out, x, t), g["out.ddim_eta0"])
    near(process.ddim_step(out, x, t, noise, eta=1.0), g["out.ddim_eta1"])
    head = golden("mar_head_psample")
    process = model.GaussianDiffusion("cosine", "100")
    noise = Injected(head["in.x"].shape, 4)()
    near(process.ancestral_step(head["in.model_output"], head["in.x"], head["in.t"], noise, temperature=0.9), head["out.sample"])
    assert process.timestep_map == head["out.timestep_map"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("case, sampler, spacing", [
    ("dit_loop_ddim", "ddim", "ddim50"), ("dit_loop_ddim_plain", "ddim", "50"), ("dit_loop_ancestral", "ddpm", "20")])
def test_dit_sampling_loop(case, sampler, spacing):
    g, net = golden(case), fill(build_model("dit-tiny", 4, **DIT_GOLDEN))
    predict = lambda x, t: model.guide(net, x, t, g["in.y"][:2], 10, 1.5, 3)
    process = model.GaussianDiffusion("linear", spacing)
    near(process.sample_loop(predict, g["in.z"], Injected((4, 4, 8, 8), 2), sampler), g["out.final"])


@torch.no_grad()
def test_sit_loss_and_score():
    g, net = golden("sit_transport_loss"), fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    s = g["in.t"].view(-1, 1, 1, 1)
    batch = dict(x_t=s * g["in.x1"] + (1 - s) * g["in.x0"], t=g["in.t"], velocity=g["in.x1"] - g["in.x0"], y=g["in.y"])
    objective = net.objective()
    near(objective.loss(objective.predict(net, batch), batch), g["out.loss"])
    near(model.score_of(g["out.pred"], g["out.xt"], s.clamp(max=0.99)), g["out.score"])


@pytest.mark.parametrize("name", ["dit-tiny", "sit-tiny"])
def test_draw_mixes_data_and_noise_as_the_process_says(name):
    net = small(name)
    x, y = torch.randn(64, 4, 8, 8), torch.arange(64) % 10
    batch = net.objective().draw(x, y, RowNoise((3,), 0, 64, 64))
    if name == "sit-tiny":  # t = 0 is noise, t = 1 data
        eps = x - batch["velocity"]
        torch.testing.assert_close(batch["x_t"], batch["t"].view(-1, 1, 1, 1) * x + (1 - batch["t"]).view(-1, 1, 1, 1) * eps)
    else:
        torch.testing.assert_close(batch["x_t"], model.GaussianDiffusion().q_sample(x, batch["t"], batch["noise"]))
    assert 0 < (batch["y"] == 10).float().mean() < 0.3 and ((batch["y"] == y) | (batch["y"] == 10)).all()


@torch.no_grad()
@pytest.mark.parametrize("method, case", [("euler", "euler"), ("heun", "heun2"), ("dopri5", "dopri5")])
def test_sit_ode(method, case):
    g, net = golden(f"sit_ode_{case}"), fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    y = g["in.y"][:2]
    calls = []

    def both_halves(x, t):  # the release carries the null half along, and its dopri5 measures both halves' error
        calls.append(t[0].item())
        guided = model.guide(net, x[:2], t[:2], y, 10, 1.5, 3)
        uncond = net(x[:2], t[2:], g["in.y"][2:])
        return torch.cat([guided, torch.cat([guided[:, :3], uncond[:, 3:]], dim=1)])

    x = model.integrate_ode(both_halves, torch.cat([g["in.z"], g["in.z"]]), 20, method)
    near(x[:2], g["out.final"])
    near(x[2:], g["out.final_null_half"], 2e-5)
    assert len(calls) == dict(euler=19, heun=38, dopri5=20)[method]


@torch.no_grad()
@pytest.mark.parametrize("case, method, form, last", [
    ("sit_sde_euler", "euler", "sigma", "mean"), ("sit_sde_heun", "heun", "sigma", "mean"), ("sit_sde_euler_linear_tweedie", "euler", "linear", "tweedie"),
    ("sit_sde_euler_decreasing_euler", "euler", "decreasing", "euler"), ("sit_sde_euler_sigma_none", "euler", "sigma", "none")])
def test_sit_sde(case, method, form, last):
    g, net = golden(case), fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    calls = []

    def velocity(x, t):
        calls.append(t)
        return model.guide(net, x, t, g["in.y"][:2], 10, 1.5, 3)

    near(model.integrate_sde(velocity, g["in.z"], 20, Injected((4, 4, 8, 8), 2), method, form, last), g["out.final"])
    assert len(calls) == 19 * (2 if method == "heun" else 1) + (last != "none")  # half of the release's calls


@pytest.mark.parametrize("form", model.DIFFUSION_FORMS)
@pytest.mark.parametrize("sampler", ["sde-euler", "sde-heun"])
def test_every_diffusion_form_samples_the_data(form, sampler):
    """Data N(2, 0.5^2): its exact velocity is known, and every reverse SDE must end in that distribution."""
    def velocity(x, t):
        t = t.view(-1, 1)
        variance = (0.5 * t) ** 2 + (1 - t) ** 2
        return 2 + (0.25 * t - (1 - t)) / variance * (x - 2 * t)

    torch.manual_seed(0)
    x = model.integrate_sde(velocity, torch.randn(4000, 1), 500, lambda: torch.randn(4000, 1), sampler.split("-")[1], form, last_step_size=0.01)
    assert abs(x.mean() - 2) < 0.04 and abs(x.std() - 0.5) < 0.04


def test_dopri5_reaches_its_tolerance():
    """dx/dt = -3x + t has a closed form."""
    exact = lambda t, x0: (x0 + 1 / 9) * np.exp(-3 * t) + t / 3 - 1 / 9
    x0 = torch.linspace(-2, 2, 8)[:, None]
    x = model.integrate_ode(lambda x, t: -3 * x + t.view(-1, 1), x0, 2, "dopri5", atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x, exact(1.0, x0), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_mar_loss():
    g, net = golden("mar_small_forward"), fill(build_model("mar-tiny", **MAR_GOLDEN, patch=1))
    mask, objective = g["in.mask"].bool(), net.objective()
    kept = torch.stack([(~m).nonzero()[:, 0] for m in mask])
    masked = torch.stack([m.nonzero()[:, 0] for m in mask])
    tokens = net.patchify(g["in.latents"])
    pick = lambda v: torch.stack([v[:, b][:, masked[b]] for b in range(2)])  # (R, B, T, ...) -> (B, R, M, ...)
    t, noise = pick(g["in.t_mul2"].view(2, 2, 16)), pick(g["in.noise_mul2"].view(2, 2, 16, 4))
    x_start = model.gather_tokens(tokens, masked)[:, None].expand(-1, 2, -1, -1)
    x_t = objective.diffusion.q_sample(x_start.flatten(0, 2), t.flatten(), noise.flatten(0, 2)).view_as(noise)
    batch = dict(tokens=tokens, y=g["in.y"], kept=kept, masked=masked, x_start=x_start, x_t=x_t, t=t, noise=noise)
    near(objective.loss(objective.predict(net, batch), batch).mean(), g["out.forward_loss_mul2"], 1e-3)


def test_mar_schedule():
    g = golden("mar_mask_schedule")
    for steps in (8, 64):
        assert model.mar_schedule(256, steps)[:-1] == g[f"out.masked_at_start_{steps}"].tolist()
    assert model.mar_schedule(16, 64)[-2:] == [1, 0]  # more rounds than tokens


@torch.no_grad()
@pytest.mark.parametrize("case, spacing, guidance, schedule", [
    ("mar_sample_cfg", "8", 2.0, "linear"), ("mar_sample_cfg_strided", "ddim8", 2.0, "linear"),
    ("mar_sample_cfgconst_strided", "ddim8", 2.0, "constant"), ("mar_sample_nocfg_strided", "ddim8", 1.0, "linear")])
def test_mar_sampling(case, spacing, guidance, schedule):
    g, net = golden(case), fill(build_model("mar-tiny", **MAR_GOLDEN, patch=1))

    class Noise:  # a round's initial tokens are draw 2000 + round, the denoising steps count on from 1000
        rounds, steps, left = 2000, 1000, 0

        def uniform(self, tokens):
            return g["in.orders"].argsort(dim=1).float()

        def normal(self, n, channels):
            if self.left == 0:
                self.left, self.rounds = 8, self.rounds + 1
                draw = Injected((2 * n, channels), 2 * n, self.rounds - 1)()
            else:
                self.left, self.steps = self.left - 1, self.steps + 1
                draw = Injected(((4 if guidance != 1 else 2) * n, channels), 2 * n, self.steps - 1)()
            return draw.view(2, n, channels)

    got = net.objective().sample(net, g["in.y"], Noise(), "mar", 4, guidance, schedule, 1.0, spacing)
    near(got, g["out.latents"])


def test_mar_draw_hides_and_keeps_disjoint_tokens():
    net = small("mar-tiny")
    x, y = torch.randn(32, 4, 8, 8), torch.arange(32) % 10
    counts = []
    for step in range(60):
        batch = net.objective().draw(x, y, RowNoise((0, step), 0, 32, 32))
        both = torch.cat([batch["kept"], batch["masked"]], dim=1).sort(dim=1)[0]
        assert (both == torch.arange(16)).all()
        counts.append(batch["masked"].shape[1])
    assert min(counts) >= 12 and max(counts) == 16 and 13 < np.mean(counts) < 15.6  # truncated normal on [0.7, 1], 16 tokens


def test_row_noise_does_not_depend_on_who_draws():
    whole = RowNoise((7,), 0, 50, 16)
    part = RowNoise((7,), 20, 37, 16)
    for draw in ("normal", "uniform", "gumbel"):
        assert torch.equal(getattr(whole, draw)(3)[20:37], getattr(part, draw)(3))
    assert not torch.equal(RowNoise((7, 0), 0, 8, 8).normal(3), RowNoise((7, 1), 0, 8, 8).normal(3))


# ---------------------------------------------------------------------------------------------------------------------
# model.py: checkpoints and downloads.


@pytest.mark.parametrize("nesting", ["", "ema", "model", "model_ema", "state_dict"])
def test_official_nestings_load(tmp_path, nesting):
    state = small("dit-tiny", 12).state_dict()
    nested = {nesting: {f"module.{k}": v for k, v in state.items()}, "epoch": 3} if nesting else state
    path = tmp_path / f"official{nesting}.pth"
    torch.save(nested, path)
    found, config = model.read_state(path)
    assert config is None and same_weights(found, state)


def test_ema_is_preferred_unless_asked(tmp_path):
    model.save_checkpoint(tmp_path / "c.pt", model={"w": torch.zeros(1)}, ema={"w": torch.ones(1)}, config=dict(name="x"))
    assert model.read_state(tmp_path / "c.pt")[0]["w"] == 1
    assert model.read_state(tmp_path / "c.pt", "model")[0]["w"] == 0


def test_arguments_beside_the_weights_are_read_but_code_is_not(tmp_path, capsys):
    torch.save(dict(model={"w": torch.ones(2)}, args=argparse.Namespace(lr=1.0)), tmp_path / "mar.pth")
    assert model.read_state(tmp_path / "mar.pth")[0]["w"].sum() == 2

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    torch.save(dict(model={"w": torch.ones(2)}, x=Bomb()), tmp_path / "bomb.pt")
    with pytest.raises(SystemExit):
        model.read_state(tmp_path / "bomb.pt")
    assert "nothing was loaded" in capsys.readouterr().err and not (tmp_path / "exploded").exists()


def test_what_other_people_store_beside_their_weights(tmp_path):
    """numpy scalars and Parameters in a torch file; a `config` that is not ours, and masks, in .safetensors."""
    torch.save(dict(ema={"w": torch.nn.Parameter(torch.ones(2))}, loss=np.float64(0.1), best=np.float32(0.2), n=np.int64(3)), tmp_path / "a.pt")
    state, config = model.read_state(tmp_path / "a.pt")
    assert config is None and not state["w"].requires_grad and not isinstance(state["w"], torch.nn.Parameter)
    for other in ("sd_v1", '{"model_type": "vae"}', "{'a': 1}"):
        header = json.dumps({"__metadata__": {"config": other}, "m": dict(dtype="BOOL", shape=[3], data_offsets=[0, 3])}).encode()
        (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1\0\1")
        state, config = model.read_state(tmp_path / "b.safetensors")
        assert config is None and state["m"].tolist() == [True, False, True]


def test_safetensors_round_trip(tmp_path):
    state = {"a.weight": torch.randn(3, 5), "b": torch.randn(7).half(), "c": torch.randn(2, 2).bfloat16(), "n": torch.arange(3)}
    model.write_safetensors(tmp_path / "w.safetensors", state, dict(name="dit-tiny"))
    found, config = model.read_state(tmp_path / "w.safetensors")
    assert same_weights(found, state) and config == dict(name="dit-tiny")
    raw = (tmp_path / "w.safetensors").read_bytes()  # the format itself: length, JSON, data at the stated place
    size = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + size])["a.weight"]["data_offsets"]
    assert np.array_equal(np.frombuffer(raw[8 + size :][start:end], np.float32).reshape(3, 5), state["a.weight"].numpy())


def test_a_checkpoint_of_another_model_is_named(tmp_path, capsys):
    torch.save(small("sit-tiny", 6).state_dict(), tmp_path / "w.pt")
    with pytest.raises(SystemExit):
        model.load_model("dit-xl", tmp_path / "w.pt")
    message = capsys.readouterr().err
    assert "missing blocks.6" in message and "misshaped pos_embed" in message and "\n" not in message.strip()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:5000])
    with pytest.raises(SystemExit):
        model.load_model("dit-tiny", tmp_path / "cut.pt")


def test_weights_of_a_shape_that_two_models_share_need_a_name(tmp_path, capsys):
    """DiT and SiT have the same keys: reading one as the other would draw garbage without a word."""
    torch.save(small("sit-tiny", 12).state_dict(), tmp_path / "w.pt")
    with pytest.raises(SystemExit):
        model.load_model(ckpt=tmp_path / "w.pt")
    assert "add --model" in capsys.readouterr().err


def test_files_of_one_name_behind_two_urls_stay_apart(monkeypatch):
    asked = []
    monkeypatch.setattr(model, "download", lambda url, path: asked.append(path))
    model.locate("https://a/one/checkpoint-last.pth")
    model.locate("https://a/two/checkpoint-last.pth")
    assert asked[0] != asked[1] and asked[0].suffix == ".pth"


def test_nothing_half_written_is_left(tmp_path, capsys):
    def broken(temporary):
        Path(temporary).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit):
        model.write_whole(tmp_path / "x.pt", broken)
    assert list(tmp_path.iterdir()) == [] and "No space left" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path):
    """Serves 3 MiB; the first two connections break; honours Range unless told not to."""
    data, state = np.random.default_rng(0).bytes(3 * 2**20), dict(requests=[], breaks=2, ranges=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wish = self.headers.get("Range")
            state["requests"].append(wish)
            if self.path == "/missing":
                return self.send_error(404)
            start = int(wish[6:-1]) if wish and state["ranges"] else 0
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                return self.end_headers()
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if state["breaks"]:
                state["breaks"] -= 1
                self.wfile.write(data[start : start + 2**20])
                return self.connection.close()
            self.wfile.write(data[start:])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", data, state
    httpd.shutdown()


def test_download_continues_where_it_broke(server, tmp_path):
    url, data, state = server
    path = model.download(f"{url}/w", tmp_path / "w.pt", len(data), hashlib.sha256(data).hexdigest())
    assert path.read_bytes() == data and [p.name for p in tmp_path.iterdir()] == ["w.pt"]
    assert state["requests"] == [None, f"bytes={2**20}-", f"bytes={2 * 2**20}-"]
    model.download("http://127.0.0.1:9/never", path)  # there already: no connection


def test_download_from_a_server_without_ranges(server, tmp_path):
    url, data, state = server
    state.update(ranges=False, breaks=1)
    assert model.download(f"{url}/w", tmp_path / "w.pt").read_bytes() == data


@pytest.mark.parametrize("stale, requests", [(0, 1), (100, 2)])
def test_a_part_that_is_complete_is_taken_and_one_that_is_too_long_is_not(stale, requests, server, tmp_path):
    url, data, state = server
    state["breaks"] = 0
    (tmp_path / f"w.pt.{socket.gethostname()}.part").write_bytes(data + bytes(stale))
    assert model.download(f"{url}/w", tmp_path / "w.pt").read_bytes() == data
    assert len(state["requests"]) == requests and [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_two_programs_may_want_the_same_file(server, tmp_path):
    url, data, state = server
    both = [threading.Thread(target=model.download, args=(f"{url}/w", tmp_path / "w.pt")) for _ in range(2)]
    [t.start() for t in both]
    [t.join() for t in both]
    assert (tmp_path / "w.pt").read_bytes() == data and [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_download_refuses_what_is_wrong(server, tmp_path, capsys):
    url, data, state = server
    state["breaks"] = 0
    for path, size, sha256, words in (("/missing", None, None, "put it at"), ("/w", len(data) + 1, None, "instead of"), ("/w", None, "0" * 64, "SHA-256")):
        with pytest.raises(SystemExit):
            model.download(url + path, tmp_path / "x.pt", size, sha256)
        assert words in capsys.readouterr().err and not (tmp_path / "x.pt").exists()
        for part in tmp_path.glob("*.part"):
            part.unlink()
    with pytest.raises(SystemExit):  # offline
        model.download("http://127.0.0.1:9/w", tmp_path / "x.pt", tries=1)
    assert str(tmp_path / "x.pt") in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# extract_latents.py


def manifest_vae(name):
    lines = (line.decode().split() for line in stored(f"manifest/{name}"))
    return {key: tuple(map(int, shape.split(","))) for key, shape in lines}


def fill_vae(name, shape):
    """The goldens' weights: a function of each tensor's name."""
    v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) >= 2:
        v *= 0.7 / np.sqrt(v.size / shape[0])
    else:
        v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    return torch.from_numpy(v.astype(np.float32))


def run_extract(monkeypatch, *argv):
    """The command in this process; -> exit code."""
    monkeypatch.setattr(sys, "argv", ["extract_latents.py", "--device", "cpu", *map(str, argv)])
    try:
        extract_latents.main()
    except SystemExit as e:
        return e.code
    return 0


def fails(capsys, monkeypatch, *argv):
    """The one sentence with which the command ends."""
    capsys.readouterr()
    assert run_extract(monkeypatch, *argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def digits60(tmp_path):
    """60 digits and their labels as an .npz."""
    images, labels, _ = read_npz(DIGITS)
    np.savez(tmp_path / "digits60.npz", arr_0=images[:60], arr_1=labels[:60])
    return tmp_path / "digits60.npz"


def same_files(a, b):
    return all((a / f).read_bytes() == (b / f).read_bytes() for f in ("moments.npy", "labels.npy", "meta.json"))


# The VAE


@pytest.mark.parametrize("case, config, manifest", [
    ("vae_sd_64", SD, "vae_sd_diffusers_current"), ("vae_kl16_64", KL16, "vae_kl16_mar")])
def test_vae_golden(case, config, manifest):
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    load_state(vae, rename_vae_keys({k: fill_vae(k, s) for k, s in manifest_vae(manifest).items()}), "goldens")
    x = torch.from_numpy(stored(f"{case}/in.image_u8")).float() / 127.5 - 1
    with torch.no_grad():
        mean, std = vae.encode(x)
        decoded = vae.decode(torch.from_numpy(stored(f"{case}/in.latent")))
    for name, got in ("mean", mean), ("logvar", 2 * std.log()), ("decoded", decoded):
        want = stored(f"{case}/out.{name}")
        assert np.abs(got.numpy() - want).max() <= 2e-5 * np.abs(want).max(), name


def test_vae_keys_equal_the_manifests():
    with torch.device("meta"):
        sd, kl16 = AutoencoderKL(SD).state_dict(), AutoencoderKL(KL16).state_dict()
        shapes = {k: tuple(v.shape) for k, v in sd.items()}
        assert shapes == manifest_vae("vae_sd_diffusers_current")
        for old in "vae_sd_diffusers_old_attention_linear", "vae_sd_diffusers_old_attention_conv1x1":
            state = rename_vae_keys({k: torch.empty(s) for k, s in manifest_vae(old).items()})
            assert {k: tuple(v.shape) for k, v in state.items()} == shapes
        state = rename_vae_keys({k: torch.empty(s) for k, s in manifest_vae("vae_kl16_mar").items()})
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in kl16.items()}


def test_vae_old_attention_names_go_to_their_places():
    old = {"encoder.mid_block.attentions.0.query.weight": torch.eye(3)[..., None, None], "encoder.mid_block.attentions.0.proj_attn.bias": torch.ones(3)}
    new = rename_vae_keys(old)
    assert torch.equal(new["encoder.mid_block.attentions.0.to_q.weight"], torch.eye(3))
    assert list(new) == ["encoder.mid_block.attentions.0.to_q.weight", "encoder.mid_block.attentions.0.to_out.0.bias"]


def test_vae_load_from_a_file(tmp_path, monkeypatch, capsys):
    tiny = dict(SD, channels=[8, 8], groups=4)
    monkeypatch.setitem(VAES, "sd-ema", tiny)
    vae = AutoencoderKL(tiny)
    torch.save(vae.state_dict(), tmp_path / "vae.bin")
    loaded = load_vae("sd-ema", tmp_path / "vae.bin")
    assert loaded.scale == 0.18215 and loaded.factor == 2 and all(torch.equal(v, loaded.state_dict()[k]) for k, v in vae.state_dict().items())
    x = torch.randn(1, 3, 8, 8)
    bf16 = load_vae("sd-ema", tmp_path / "vae.bin", dtype=torch.bfloat16)
    assert bf16.encode(x)[0].dtype == torch.float32
    assert 0 < (bf16.encode(x)[0] - loaded.encode(x)[0]).abs().max() < 0.1
    for name, ckpt, words in (("kl16", tmp_path / "vae.bin", "does not fit"), ("sd-ema", DIGITS_VAE, "--vae digits"),
                              ("digits", tmp_path / "vae.bin", "--train-vae"), ("sd-ema", tmp_path / "none.pt", "does not exist")):
        with pytest.raises(SystemExit):
            load_vae(name, ckpt)
        assert words in capsys.readouterr().err


def test_vae_bundled_reconstructs_digits():
    vae = load_vae()
    images, _, _ = read_npz(DIGITS)
    x = torch.from_numpy(np.pad(images[9000:], ((0, 0), (2, 2), (2, 2)))).float()[:, None] / 127.5 - 1
    assert psnr(vae, x)[0] >= 28
    mean, std = vae.encode(x[:500])
    assert 0.9 < (mean + std * torch.randn_like(std)).std() * vae.scale < 1.1
    assert DIGITS_VAE.stat().st_size <= 1.5e6


def test_vae_training_learns_and_writes(tmp_path, capsys, digits60):
    args = argparse.Namespace(device="cpu", data=digits60, out=tmp_path / "vae.pt", seed=0)
    train_vae(args, steps=25, batch=8)
    out = capsys.readouterr().out
    scale = float(out.split("so scale ")[1].split(";")[0])
    assert load_vae(ckpt=tmp_path / "vae.pt").scale == scale
    assert float(out.split("posterior means: ")[1].split(" dB")[0]) > 8  # an all-grey answer gets 6
    weights = torch.load(tmp_path / "vae.pt", weights_only=True)["model"]
    assert all(v.dtype == torch.float16 for v in weights.values())


def test_vae_decode_images():
    vae = load_vae()
    z = torch.randn(5, 4, 8, 8)
    images = decode_images(vae, z)
    want = torch.clamp(127.5 * vae.decode(z / vae.scale) + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    assert all(np.array_equal(images[..., c], want[..., 0]) for c in range(3))
    assert images.std() > 10


# Images


def test_extract_center_crop_golden():
    for width, height, seed in (500, 375, 400), (300, 900, 401), (256, 256, 402):
        y, x = np.mgrid[:height, :width]
        noise = np.random.RandomState(seed).randint(0, 64, size=(height, width, 3))
        waves = np.stack([(x * 3 + y * (5 + 2 * c) + 17 * c + (x * y) // (11 + c)) % 256 for c in range(3)], axis=-1)
        image = Image.fromarray(np.clip((waves * 3 + noise * 4) // 4, 0, 255).astype(np.uint8))
        assert np.array_equal(center_crop(image, 64), stored(f"center_crop/out.{width}x{height}_to_64"))


def test_extract_digits_are_padded():
    digit = read_npz(DIGITS)[0][0]
    pixels = to_pixels(Image.fromarray(digit), 32, 1)
    assert pixels.shape == (1, 32, 32) and np.array_equal(pixels[0, 2:-2, 2:-2], digit)
    assert not pixels[0, :2].any() and not pixels[0, :, -2:].any()


def test_extract_modes_of_images(tmp_path):
    rgb = np.zeros((40, 40, 3), np.uint8)
    rgb[:20] = 200, 100, 50  # the upper half
    image = Image.fromarray(rgb)
    alpha = image.convert("RGBA")
    alpha.putalpha(0)
    exif = image.getexif()
    exif[0x0112] = 3  # shown upside down
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.quantize(4).save(tmp_path / "palette.png", transparency=b"\0\xff")
    alpha.save(tmp_path / "rgba.png")
    image.rotate(180).save(tmp_path / "exif.jpg", quality=95, exif=exif)
    for name in "cmyk.jpg", "palette.png", "rgba.png", "exif.jpg":
        with Image.open(tmp_path / name) as opened:
            pixels = to_pixels(opened, 8, 3)
        assert pixels.shape == (3, 8, 8) and np.abs(pixels[:, 1, 4].astype(int) - [200, 100, 50]).max() < 12 and pixels[:, 7].max() < 12, name
    grey = Image.fromarray(np.full((16, 16), 256 * 77, np.uint16))
    assert (to_pixels(grey, 8, 3) == 77).all() and (to_pixels(grey, 8, 1) == 77).all()
    assert to_pixels(image.convert("L"), 8, 3).shape == (3, 8, 8)
    assert to_pixels(Image.new("RGB", (1, 30)), 8, 3).shape == (3, 8, 8)
    for bad in Image.new("F", (9, 9)), Image.new("RGB", (1, 60000)):
        with pytest.raises(ValueError):
            to_pixels(bad, 64, 3)


def test_extract_turns_images_upright(tmp_path):
    """All eight orientations, as Pillow itself turns them; an EXIF field that Pillow cannot write again does not matter."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    for orientation in range(1, 9):
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / "turned.png", exif=exif)
        with Image.open(tmp_path / "turned.png") as opened:
            want = np.asarray(ImageOps.exif_transpose(opened))
            assert np.array_equal(np.asarray(extract_latents.upright(opened)), want), orientation
    odd = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + bytes.fromhex("00010200020000006162000012010300010000000600000000000000")  # width as text
    image.save(tmp_path / "odd.jpg", exif=odd)
    with Image.open(tmp_path / "odd.jpg") as opened:
        assert extract_latents.upright(opened).size == (20, 30)
        with pytest.raises(Exception):
            ImageOps.exif_transpose(opened)


def test_extract_folder_order_and_unreadable_images(tmp_path, monkeypatch, capsys):
    images, labels, _ = read_npz(DIGITS)
    data, order = tmp_path / "data", []
    for name in "b", "a10", "a9":
        (data / name / "sub").mkdir(parents=True)
    for k, path in enumerate(("a10/1.png", "a10/2.PNG", "a10/sub/0.png", "a9/x.png", "b/y.png", "b/z.png")):  # ImageFolder's order
        Image.fromarray(images[k]).save(data / path)
        order.append(path)
    (data / "b" / "notes.txt").write_text("not an image")
    (data / "b" / "y.png").write_bytes((data / "b" / "y.png").read_bytes()[:120])  # truncated
    (data / "a10" / "2.PNG").write_text("a page of HTML")
    out = tmp_path / "out"
    assert run_extract(monkeypatch, "--data", data, "--out", out, "--workers", 1, "--batch-size", 2) == 3
    latents = Latents(out)
    assert latents.meta["classes"] == ["a10", "a9", "b"] and latents.classes == 3
    assert [Path(s["name"]).name for s in latents.meta["skipped"]] == ["2.PNG", "y.png"] and "2.PNG" in capsys.readouterr().err
    assert len(latents) == 4 and latents.labels.tolist() == [0, 0, 1, 2]
    assert np.load(out / "labels.npy").tolist() == [0, -1, 0, 1, -1, 2]
    vae = load_vae()
    for row, k in enumerate((0, 2, 3, 5)):  # the rows that are left are those of the readable images
        x, y = latents.batch(np.array([row]), RowNoise((0,), 0, 1, 1), "cpu")
        pixels = torch.from_numpy(np.pad(images[k], 2))[None, None].float() / 127.5 - 1
        mean, std = (m.half().float() for m in vae.encode(pixels))
        torch.testing.assert_close(x, (mean + std * RowNoise((0,), 0, 1, 1).normal(4, 8, 8)) * vae.scale, atol=5e-3, rtol=0)
    (data / "empty").mkdir()
    assert "'empty'" in fails(capsys, monkeypatch, "--data", data, "--out", tmp_path / "out2")
    (data / "empty").rmdir()
    assert run_extract(monkeypatch, "--data", data, "--out", tmp_path / "strict", "--strict", "--workers", 0) == 2
    assert "2.PNG" in capsys.readouterr().err and not (tmp_path / "strict" / "moments.npy").exists()
    for k in range(8):  # a disk that went away, rather than eight bad files
        (data / "a10" / f"bad{k}.png").write_text("")
    for name in "1.png", "sub/0.png":
        (data / "a10" / name).unlink()
    (data / "a10" / "2.PNG").unlink()
    assert run_extract(monkeypatch, "--data", data, "--out", tmp_path / "gone", "--batch-size", 8, "--workers", 0) == 2
    assert "in a row" in capsys.readouterr().err


# Writing


def test_extract_labels_and_mirror_images(tmp_path, monkeypatch, digits60):
    out = tmp_path / "out"
    assert run_extract(monkeypatch, "--data", digits60, "--out", out, "--flip", "--batch-size", 7) == 0
    images, labels, _ = read_npz(digits60)
    moments, vae = np.load(out / "moments.npy"), load_vae()
    assert moments.shape == (60, 2, 8, 8, 8) and moments.dtype == np.float16 and np.array_equal(np.load(out / "labels.npy"), labels)
    pixels = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))).float()[:, None] / 127.5 - 1
    for flip, view in enumerate((pixels, pixels.flip(-1))):
        want = torch.cat(vae.encode(view), dim=1).numpy()
        assert np.abs(moments[:, flip] - want).max() < 5e-3
    assert sorted(p.name for p in out.iterdir()) == ["labels.npy", "meta.json", "moments.npy"]
    meta = json.loads((out / "meta.json").read_text())
    assert meta["complete"] and meta["scale"] == vae.scale and meta["flips"] == 2 and meta["classes"] == list("0123456789")


def test_extract_killed_then_two_ranks_same_bytes(tmp_path, monkeypatch, capsys):
    images, labels, _ = read_npz(DIGITS)
    np.savez(tmp_path / "d.npz", arr_0=images[:600], arr_1=labels[:600])
    common = ["--data", str(tmp_path / "d.npz"), "--batch-size", "10"]
    assert run_extract(monkeypatch, *common, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    command = [str(ROOT / "extract_latents.py"), *common, "--device", "cpu", "--out", str(out)]
    run = subprocess.Popen([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while run.poll() is None and not ((out / "done.part").exists() and np.fromfile(out / "done.part", np.uint8).sum() > 2):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = int(np.fromfile(out / "done.part", np.uint8).sum())
    assert 2 < done < 60 and not (out / "moments.npy").exists()
    with pytest.raises(SystemExit):
        Latents(out)
    (out / "done.part").rename(tmp_path / "done.part")
    assert "--resume never" in fails(capsys, monkeypatch, *common, "--out", out)
    (tmp_path / "done.part").rename(out / "done.part")
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *command], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert f"{done} of 60 chunks are done" in two.stdout
    assert same_files(tmp_path / "whole", out)


def test_extract_dies_between_any_two_steps(tmp_path, monkeypatch, digits60):
    """Ended by an exception at the k-th write or rename, for every k, then started again."""
    common = ["--data", digits60, "--batch-size", 30]
    assert run_extract(monkeypatch, *common, "--out", tmp_path / "whole") == 0
    for k in range(100):
        out, count = tmp_path / f"out{k}", [0]

        def dying(function):
            def call(*args, **kwargs):
                count[0] += 1
                if count[0] == k + 1:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)
            return call

        with monkeypatch.context() as m:
            m.setattr(os, "pwrite", dying(os.pwrite))
            m.setattr(os, "replace", dying(os.replace))
            m.setattr(os, "fsync", dying(os.fsync))
            m.setattr(np.lib.format, "open_memmap", dying(np.lib.format.open_memmap))
            try:
                assert run_extract(monkeypatch, *common, "--out", out) == 0
                break  # it did not reach step k
            except KeyboardInterrupt:
                pass
        if not (out / "meta.json").exists() or not json.loads((out / "meta.json").read_text())["complete"]:
            with pytest.raises(SystemExit):
                Latents(out)
        assert run_extract(monkeypatch, *common, "--out", out) == 0
        assert same_files(tmp_path / "whole", out)
    assert 10 < k < 99


def test_extract_again(tmp_path, monkeypatch, capsys, digits60):
    out = tmp_path / "out"
    assert run_extract(monkeypatch, "--data", digits60, "--out", out) == 0
    before = (out / "moments.npy").stat().st_mtime_ns
    assert run_extract(monkeypatch, "--data", digits60, "--out", out) == 0
    assert (out / "moments.npy").stat().st_mtime_ns == before and "nothing to encode" in capsys.readouterr().out
    assert "flips" in fails(capsys, monkeypatch, "--data", digits60, "--out", out, "--flip")
    images, labels, _ = read_npz(digits60)
    np.savez(digits60, arr_0=images, arr_1=labels[::-1])  # the same images with other labels
    assert "data" in fails(capsys, monkeypatch, "--data", digits60, "--out", out)
    assert run_extract(monkeypatch, "--data", digits60, "--out", out, "--resume", "never") == 0
    assert Latents(out).labels.tolist() == labels[::-1].tolist()


def test_extract_mistakes(tmp_path, monkeypatch, capsys, digits60):
    out, whole = tmp_path / "out", digits60.read_bytes()
    wrong = lambda *argv: fails(capsys, monkeypatch, "--out", out, *argv)
    assert "does not exist" in wrong("--data", tmp_path / "none")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "not a complete .npz" in wrong("--data", tmp_path / "cut.npz")
    (tmp_path / "bad.npz").write_bytes(whole[:3000] + b"\0" * 100 + whole[3100:])
    assert "not a complete .npz" in wrong("--data", tmp_path / "bad.npz")
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8), np.uint8))
    assert "arr_1" in wrong("--data", tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8), np.float32), arr_1=np.zeros(3, int))
    assert "float32" in wrong("--data", tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8), np.uint8), arr_1=np.zeros(2, int))
    assert "arr_1" in wrong("--data", tmp_path / "x.npz")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in wrong("--data", tmp_path / "empty")
    assert "--image-size 30" in wrong("--image-size", 30)
    assert "--batch-size" in wrong("--batch-size", 0)
    assert "or --vae digits" in wrong("--vae", "kl16", "--ckpt", DIGITS_VAE)
    torch.save(dict(ema=build_model("dit-tiny").state_dict()), tmp_path / "dit.pt")
    assert "holds dit-tiny" in wrong("--vae", "kl16", "--ckpt", tmp_path / "dit.pt")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails(capsys, monkeypatch, "--data", digits60, "--out", tmp_path / "file" / "sub")
    usage = extract_latents.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(extract_latents.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "free" in wrong("--data", digits60) and not out.exists()


def test_extract_one_run_at_a_time(tmp_path, monkeypatch, capsys, digits60):
    out = tmp_path / "out"
    assert run_extract(monkeypatch, "--data", digits60, "--out", out) == 0
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert "another run" in fails(capsys, monkeypatch, "--data", digits60, "--out", out)
    os.close(folder)
    assert run_extract(monkeypatch, "--data", digits60, "--out", out) == 0


def test_extract_counts_what_it_will_replace_as_free(tmp_path, monkeypatch, capsys, digits60):
    out = tmp_path / "out"
    assert run_extract(monkeypatch, "--data", digits60, "--out", out) == 0
    usage = extract_latents.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(extract_latents.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run_extract(monkeypatch, "--data", digits60, "--out", out, "--resume", "never") == 0


def test_extract_refuses_latents_that_are_not_finite(tmp_path, monkeypatch, capsys, digits60):
    encode = extract_latents.encode_pixels
    monkeypatch.setattr(extract_latents, "encode_pixels", lambda *args: encode(*args) * np.float16("inf"))
    assert "not finite" in fails(capsys, monkeypatch, "--data", digits60, "--out", tmp_path / "out")


def test_extract_disk_full_midway(tmp_path, monkeypatch, capsys, digits60):
    whole, out, pwrite = tmp_path / "whole", tmp_path / "out", os.pwrite
    assert run_extract(monkeypatch, "--data", digits60, "--batch-size", 20, "--out", whole) == 0
    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:100], offset))  # what a full disk does
        assert "no space left" in fails(capsys, monkeypatch, "--data", digits60, "--batch-size", 20, "--out", out)
    assert run_extract(monkeypatch, "--data", digits60, "--batch-size", 20, "--out", out) == 0
    assert same_files(whole, out)


# Reading


def write_latents(directory, n=12, flips=2, labels=None, **changes):
    rng = np.random.default_rng(0)
    directory.mkdir(exist_ok=True)
    moments = rng.standard_normal((n, flips, 8, 2, 2)).astype(np.float16)
    moments[:, :, 4:] = np.abs(moments[:, :, 4:])
    np.save(directory / "moments.npy", moments)
    np.save(directory / "labels.npy", np.arange(n) % 3 if labels is None else labels)
    meta = dict(shape=[4, 2, 2], scale=0.5, classes=["a", "b", "c"], count=n, flips=flips, complete=True) | changes
    (directory / "meta.json").write_text(json.dumps(meta))
    return moments


def test_extract_reading_is_the_formula(tmp_path):
    for flips in 1, 2:
        moments = write_latents(tmp_path / "latents", flips=flips).astype(np.float32)
        latents = Latents(tmp_path / "latents")
        rows = np.array([7, 2, 11, 0, 7])
        x, y = latents.batch(rows, RowNoise((3, 1), 0, 5, 5), "cpu")
        noise = RowNoise((3, 1), 0, 5, 5)
        eps = noise.normal(4, 2, 2).numpy()
        flip = (noise.host.random(5) < 0.5).astype(int) if flips == 2 else np.zeros(5, int)
        want = (moments[rows, flip, :4] + moments[rows, flip, 4:] * eps) * 0.5
        np.testing.assert_allclose(x.numpy(), want, rtol=1e-5, atol=1e-6)
        assert x.dtype == torch.float32 and y.tolist() == [1, 2, 2, 0, 1] and y.dtype == torch.int64
        assert len(latents) == 12 and latents.shape == (4, 2, 2) and latents.classes == 3
        many = np.arange(600) % 12
        x600, _ = latents.batch(many, RowNoise((4,), 0, 600, 600), "cpu")
        noise = RowNoise((4,), 0, 600, 600)
        eps, flip = noise.normal(4, 2, 2).numpy(), (noise.host.random(600) < 0.5).astype(int) * (flips - 1)
        np.testing.assert_allclose(x600.numpy(), (moments[many, flip, :4] + moments[many, flip, 4:] * eps) * 0.5, rtol=1e-5, atol=1e-6)
        half = torch.cat([latents.batch(rows[a:b], RowNoise((3, 1), a, b, 5), "cpu")[0] for a, b in ((0, 2), (2, 5))])
        assert torch.equal(half, x)  # two ranks
        assert flips == 1 or 200 < flip.sum() < 400


def test_extract_readers_refuse(tmp_path, capsys):
    directory = tmp_path / "latents"

    def refused():
        with pytest.raises(SystemExit) as e:
            Latents(directory)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1
        return err

    assert "holds no latents" in refused()
    write_latents(directory, complete=False)
    assert "not complete" in refused()
    write_latents(directory, count=13)
    assert "damaged" in refused()
    write_latents(directory, labels=np.arange(11) % 3)
    assert "damaged" in refused()
    write_latents(directory, labels=np.arange(12))
    assert "label 11" in refused()
    write_latents(directory)
    (directory / "moments.npy").write_bytes((directory / "moments.npy").read_bytes()[:-10])
    assert "damaged" in refused()
    write_latents(directory)
    (directory / "meta.json").write_text("{")
    assert "damaged" in refused()
    (directory / "meta.json").write_text("{}")
    assert "damaged" in refused()
    (directory / "meta.json").write_text("[]")
    assert "damaged" in refused()
    write_latents(directory)
    (directory / "moments.npy").write_bytes(b"")
    assert "damaged" in refused()
    write_latents(directory)
    (directory / "labels.npy").unlink()
    assert "labels.npy" in refused()


def test_extract_epoch_order():
    order = epoch_order(100, 1, 2)
    assert sorted(order) == list(range(100)) and np.array_equal(order, epoch_order(100, 1, 2))
    assert not np.array_equal(epoch_order(100, 1, 0), range(100))
    assert not np.array_equal(order, epoch_order(100, 1, 3)) and not np.array_equal(order, epoch_order(100, 2, 2))


# ---------------------------------------------------------------------------------------------------------------------
# prune.py


def test_schemes():
    assert prune.parse_scheme("1:2", [12]) == [(1, 2)] * 6
    assert prune.parse_scheme("2:4", [16, 16]) == [(2, 4)] * 8
    mixed = prune.parse_scheme("3:4,3:4,2:4,3:4,2:4,3:4,3:4", [28])
    assert sum(n for n, _ in mixed) == 19 and sum(m for _, m in mixed) == 28
    assert len(prune.candidate_masks(7, 14)) == 3432
    assert prune.candidate_masks(2, 3).tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("scheme, depths, words", [
    ("3:5", [12], "do not divide"), ("1:4", [6, 6], "do not divide"), ("0:2", [12], "not N:M"), ("3:2", [12], "not N:M"),
    ("half", [12], "not N:M"), ("1:2,1:2", [12], "fill 12"), ("1:4,1:4,1:4", [6, 6], "fill 6 + 6")])
def test_bad_schemes_are_refused(scheme, depths, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        prune.parse_scheme(scheme, depths)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("case, scheme, tau, scaling", [
    (0, [(1, 2), (1, 2)], 1.0, 1.0), (1, [(2, 4)], 4.0, 2.0), (2, [(2, 4)], 0.5, 100.0)])
def test_gumbel_masks_and_their_gradients(case, scheme, tau, scaling):
    g, net = golden(f"learnable_pruning_{case}"), None
    with torch.no_grad():
        net = fill(build_model("dit-tiny", 4, **DIT_GOLDEN))
    blocks = net.layers()
    layers = [prune.MaskedLayer(block) for block in blocks]
    net.replace_layers(layers)
    logits = [g[f"in.gate_logits_{i}"][0].requires_grad_() for i in range(len(scheme))]
    masks, on = [], []
    for i, (n, m) in enumerate(scheme):
        candidates = prune.candidate_masks(n, m)
        assert torch.equal(candidates, g[f"out.options_{i}"])
        mask, choice = prune.draw_masks(logits[i], candidates, g[f"in.gumbel_{i}"], tau, scaling)
        assert torch.equal(choice, g[f"out.chosen_{i}"])
        near(mask, g[f"out.mask_{i}"])
        masks.append(mask)
        on.append(candidates[choice] > 0)
    for layer, mask, where in zip(layers, torch.cat(masks, 1).T, torch.cat(on, 1).T):
        give_mask(layer, mask, where)
    out = net(g["in.x"], g["in.t"], g["in.y"])
    near(out, g["out.output"])
    out.square().mean().backward()
    for i, l in enumerate(logits):
        near(l.grad[None], g[f"out.gate_grad_{i}"], 0.0065 if case == 2 else 1e-5)
    norms = [0.0 if block.attn.qkv.weight.grad is None else block.attn.qkv.weight.grad.norm().item() for block in blocks]
    np.testing.assert_allclose(norms, g["out.qkv_grad_norms"], rtol=2e-5, atol=1e-7)


@family
@pytest.mark.parametrize("delta_w", ["lora", "full"])
def test_skipping_the_backward_pass_changes_no_gradient(name, delta_w):
    """MaskedLayer against the dense formula: loss, and the gradients of logits and dW."""
    class Dense(prune.MaskedLayer):
        def forward(self, x, *conditions):
            m = self.mask.view(-1, 1, 1)
            return m * self.block(x, *conditions) + (1 - m) * x

    results = []
    x, y = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    for kind in (prune.MaskedLayer, Dense):
        net = small(name)
        torch.manual_seed(0)
        delta = prune.add_delta_w(net, delta_w, 4)
        for p in delta:
            torch.nn.init.normal_(p, std=0.05) if delta_w == "lora" else None
        masks = prune.LayerMasks([(1, 2), (1, 2)], "cpu")
        layers = [kind(block) for block in net.layers()]
        net.replace_layers(layers)
        noise = RowNoise((5,), 0, 8, 8)
        batch = net.objective().draw(x, y, noise)
        masks.draw(layers, noise, tau=1.0)
        loss = net.objective().loss(net.objective().predict(net, batch), batch).mean()
        loss.backward()
        assert 0 < sum(layer.count for layer in layers) < 32
        results.append([loss] + [p.grad if p.grad is not None else torch.zeros_like(p) for p in [*masks.logits, *delta]])
    for ours, dense in zip(*results):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-6)


class Imitation:
    """An objective whose only task is to imitate `teacher`: its optimum under a mask is known."""

    def __init__(self, teacher):
        self.teacher, self.inner = teacher, teacher.objective()
        self.draw, self.predict = self.inner.draw, self.inner.predict

    def loss(self, out, batch):
        with torch.no_grad():
            target = self.predict(self.teacher, batch)
        return 10 * self.inner.kd(out, target, batch)


@family
@pytest.mark.parametrize("scheme, dead", [([(1, 2)] * 4, [0, 3, 4, 7]), ([(2, 4)] * 2, [1, 2, 4, 7])])
def test_planted_dead_layers_are_dropped(name, scheme, dead, latents, tmp_path):
    """Layers whose residual branches are zeroed change nothing: from three seeds, the search keeps the others."""
    net = small(name, 8)
    with torch.no_grad():
        for i in dead:
            block = net.layers()[i]
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
    for seed in range(3):
        args = argparse.Namespace(out=tmp_path, resume=None, dtype="float32", steps=40, batch_size=16, seed=seed, accumulate=1, keep=1, save_every=40,
                                  log_every=40, delta_w="lora", lora_rank=4, compile=False, checkpointing=False)
        batches = distill.Batches(extract_latents.Latents(latents), 16, 1, seed, torch.device("cpu"))
        kept = prune.learned(copy.deepcopy(net), Imitation(net), batches, scheme, distill.Run(args, torch.device("cpu")))
        assert kept == [i for i in range(8) if i not in dead], f"seed {seed}"


@family
def test_the_cut_is_exact(name, latents, teachers, tmp_path):
    """The shallow weights are the teacher's, bit for bit, and compute what the masked teacher computes."""
    ckpt = teachers / f"{name}.pt"
    run(prune, "--ckpt", ckpt, "--criterion", "indices", "--layers", "1,2", "--latents", latents, "--out", tmp_path)
    net, _ = model.load_model(ckpt=ckpt)
    shallow, config = model.load_model(ckpt=tmp_path / "shallow.pt")
    assert config["kept"] == [1, 2] and config["scheme"] == [[1, 2], [1, 2]] and sum(config["depth"]) == 2
    assert same_weights(shallow.layers()[0].state_dict(), net.layers()[1].state_dict())
    assert same_weights(shallow.layers()[1].state_dict(), net.layers()[2].state_dict())
    outside = lambda n: {k: v for k, v in n.state_dict().items() if "blocks." not in k or "res_blocks" in k}
    assert same_weights(outside(shallow), outside(net))
    layers = [prune.MaskedLayer(block) for block in net.layers()]
    net.replace_layers(layers)
    for i, layer in enumerate(layers):
        keep = torch.full((6,), float(i in (1, 2)))
        give_mask(layer, keep, keep > 0)
    batch = shallow.objective().draw(torch.randn(6, 4, 8, 8), torch.arange(6), RowNoise((0,), 0, 6, 6))
    with torch.no_grad():
        torch.testing.assert_close(shallow.objective().predict(net, batch), shallow.objective().predict(shallow, batch), rtol=0, atol=0)


def test_random_criterion_keeps_n_of_each_group_and_follows_the_seed(latents, teachers, tmp_path):
    kept = []
    for seed in (0, 0, 1, 2):
        run(prune, "--ckpt", teachers / "dit-tiny.pt", "--criterion", "random", "--scheme", "2:4", "--seed", seed, "--latents", latents, "--out", tmp_path)
        kept.append(weights_of(tmp_path / "shallow.pt", "config")["kept"])
    assert kept[0] == kept[1] and len(set(map(tuple, kept))) > 1 and all(len(k) == 2 for k in kept)


def test_lora_starts_as_no_change_and_moves_only_itself(latents, teachers):
    net, _ = model.load_model(ckpt=teachers / "dit-tiny.pt")
    batch = net.objective().draw(torch.randn(4, 4, 8, 8), torch.arange(4), RowNoise((0,), 0, 4, 4))
    before = net.objective().predict(net, batch)
    delta = prune.add_delta_w(net, "lora", 8)
    assert torch.equal(net.objective().predict(net, batch), before)
    layers = [m for m in net.modules() if isinstance(m, prune.LoRALinear)]
    linears, (layer, x) = len(layers), (layers[0], torch.randn(5, layers[0].linear.in_features))
    with torch.no_grad():
        delta[1].fill_(0.01)
        layer.lora_b.normal_()
        weight = layer.linear.weight + 16 / 8 * layer.lora_b @ layer.lora_a  # alpha is 2 r
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.linear.bias), atol=1e-4, rtol=1e-4)
    assert not torch.equal(net.objective().predict(net, batch), before)
    assert linears == 4 * 5 + 4 and len(delta) == 2 * linears  # qkv, proj, fc1, fc2, adaLN a block; two of t_embedder, two of the final layer
    assert prune.add_delta_w(net, "frozen", 8) == []


def test_the_picture_shows_the_log(latents, teachers, tmp_path):
    """decision.png: a kept layer's cell is as dark as its confidence, a dropped layer's is white."""
    lines = [dict(step=1, kept=[0, 3], confidence=[0.5, 0.5, 0.1, 0.9]), dict(step=2, kept=[1, 3], confidence=[0.0, 1.0, 0.0, 1.0])]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prune.draw_decision(tmp_path, [(1, 2), (1, 2)])
    image = np.asarray(Image.open(tmp_path / "decision.png")).astype(int)
    cell = lambda step, layer: image[34 + 22 * layer + 11, 70 + 28 * step + 14].sum()
    assert cell(0, 1) == cell(0, 2) == cell(1, 0) == cell(1, 2) == 765
    assert cell(1, 1) < cell(0, 0) < 765 and cell(1, 3) < cell(0, 3) < 765


# ---------------------------------------------------------------------------------------------------------------------
# distill.py


@pytest.mark.parametrize("prefix", ["", "drop_"])
def test_masked_kd_loss_and_gradients(prefix):
    """Eq. 8 on a student of depth 2 and a teacher of depth 4; in the drop_ case both lose the same labels."""
    g = golden("masked_kd_loss")
    with torch.no_grad():
        student, teacher = fill(build_model("dit-tiny", 2, **DIT_GOLDEN)).train(), fill(build_model("dit-tiny", 4, **DIT_GOLDEN), "teacher.")
    objective = student.objective()
    y = torch.where(g["in.rand_values"] < 0.1, 10, g["in.y"]) if prefix else g["in.y"]
    batch = dict(x_start=g["in.x_start"], t=g["in.t"], noise=g["in.noise"], y=y, x_t=objective.diffusion.q_sample(g["in.x_start"], g["in.t"], g["in.noise"]))
    objective.draw = lambda *_: batch
    pairs = distill.matched_layers(dict(scheme=[[1, 2], [1, 2]]), [2])
    losses = distill.make_losses(student, teacher.requires_grad_(False), objective, pairs, argparse.Namespace(mode="masked-kd", beta=0.01, steps=10))
    parts = losses(None, None, None, step=0)
    near(parts["kd"], g[f"out.{prefix}kd_loss"], 5e-5)
    near(parts["diffusion"], g[f"out.{prefix}gt"], 5e-5)
    near(parts["rep"], g[f"out.{prefix}feat_loss"])
    near(parts["loss"], g[f"out.{prefix}loss"], 5e-5)
    parts["loss"].mean().backward()
    parameters = dict(student.named_parameters())
    names = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight", "blocks.1.adaLN_modulation.1.weight", "y_embedder.embedding_table.weight")
    near(torch.stack([parameters[k].grad.norm() for k in names]), g[f"out.{prefix}grad_norms"], 2e-5)
    near(losses(None, None, None, step=5)["loss"], 0.9 * parts["kd"].detach() + 0.1 * parts["diffusion"].detach() + 0.005 * parts["rep"].detach())


def test_matched_layers_close_the_same_share():
    matched = lambda scheme: distill.matched_layers(dict(scheme=scheme), [sum(n for n, _ in scheme)])
    assert matched([(1, 2)] * 3) == [(0, 1), (1, 3), (2, 5)]
    assert matched([(2, 4)] * 2) == [(0, 1), (1, 3), (2, 5), (3, 7)]
    assert matched([(3, 4), (2, 4), (7, 14)])[:3] == [(2, 3), (3, 5), (4, 7)]


def test_the_learning_rate_halves_on_a_cosine():
    factors = [distill.halving(step, 100, 0, 0.5) for step in (0, 50, 100)]
    np.testing.assert_allclose(factors, [1.0, 0.75, 0.5])
    assert distill.halving(4, 100, 10, 0.5) == pytest.approx(0.5 * (0.75 + 0.25 * np.cos(np.pi * 0.04)))


def test_ema_is_the_formula_with_warm_up():
    average, want = [torch.tensor([1.0])], 1.0
    for step, value in enumerate((2.0, 5.0, -1.0)):
        distill.ema_update(average, [torch.tensor([value], requires_grad=True)], 0.15, step)
        decay = min(0.15, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * value
    assert average[0].item() == pytest.approx(want)


def stage_flags(stage, name, latents, teachers, out):
    """A short run of prune or distill: 6 steps of 16."""
    flags = ["--latents", latents, "--out", out, "--steps", 6, "--batch-size", 16, "--log-every", 1, "--save-every", 1, "--keep", 9]
    if stage == "prune":
        return [*flags, "--ckpt", teachers / f"{name}.pt", "--scheme", "1:2"]
    return [*flags, "--student", shallow_of(name, latents, teachers), "--teacher", teachers / f"{name}.pt", "--ema", 0.9]


def shallow_of(name, latents, teachers):
    """The teacher of `name` cut to half its depth, made once."""
    path = teachers / f"shallow-{name}" / "shallow.pt"
    if not path.exists():
        run(prune, "--ckpt", teachers / f"{name}.pt", "--criterion", "indices", "--layers", "0,2", "--latents", latents, "--out", path.parent)
    return path


STAGES = dict(prune=(prune, "shallow.pt"), distill=(distill, "student.pt"))


@family
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_to_the_same_bits(stage, name, latents, teachers, tmp_path):
    """Resumed from step 1, 3 or 5, the last checkpoint is the uninterrupted run's: weights, averages, optimizer, log."""
    module = STAGES[stage][0]
    run(module, *stage_flags(stage, name, latents, teachers, tmp_path / "whole"))
    want, log = torch.load(tmp_path / "whole/step-00000006.pt", weights_only=True), log_of(tmp_path / "whole")
    for killed_at in (1, 3, 5):
        out = tmp_path / f"killed{killed_at}"
        shutil.copytree(tmp_path / "whole", out)
        for later in range(killed_at + 1, 7):
            (out / f"step-{later:08}.pt").unlink()
        run(module, *stage_flags(stage, name, latents, teachers, out), "--resume", "auto")
        got = torch.load(out / "step-00000006.pt", weights_only=True)
        assert flat(got).keys() == flat(want).keys()
        assert all(torch.equal(a, flat(want)[k]) if isinstance(a, torch.Tensor) else a == flat(want)[k] for k, a in flat(got).items())
        assert [line["loss"] for line in log_of(out)] == [line["loss"] for line in log]


def flat(tree, prefix=""):
    """A nested checkpoint as one dict of leaves."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


def test_two_ranks_follow_one(latents, teachers, tmp_path):
    """Two ranks with half of the batch each, and one rank in three accumulation steps (5 + 5 + 6 rows): the same losses to float tolerance.

    Every stage and family, in one launch of two ranks. MAR's dropout, the one thing seeded per rank, is off.
    """
    without_dropout = tmp_path / "teachers"
    without_dropout.mkdir()
    for name in FAMILIES:
        net, config = model.load_model(ckpt=teachers / f"{name}.pt")
        config["overrides"] = {k: v for k, v in config["overrides"].items() if k != "dropout"}
        model.save_checkpoint(without_dropout / f"{name}.pt", model=net.state_dict(), config=config, step=0)
    flags = lambda stage, name, ranks: [str(f) for f in stage_flags(stage, name, latents, without_dropout, tmp_path / ranks / f"{stage}-{name}")]
    jobs = [(stage, name) for stage in STAGES for name in FAMILIES]
    for stage, name in jobs:
        run(STAGES[stage][0], *flags(stage, name, "one"))
        run(STAGES[stage][0], *flags(stage, name, "thirds"), "--accumulate", 3)
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
for stage, flags in json.loads(sys.argv[1]):
    sys.argv = [stage, *flags]
    importlib.import_module(stage).main()
importlib.import_module("model").end_ranks()
""")
    done = launch(driver, json.dumps([(stage, flags(stage, name, "two")) for stage, name in jobs]), ranks=2)
    assert done.returncode == 0, done.stderr
    for stage, name in jobs:
        one, thirds, two = (log_of(tmp_path / k / f"{stage}-{name}") for k in ("one", "thirds", "two"))
        for line, other, third in zip(one, thirds, two):
            for key in ("loss", "grad_norm"):
                assert line[key] == pytest.approx(other[key], rel=4e-4) == pytest.approx(third[key], rel=4e-4), (stage, name, key)


def stop_and_take_over(start, sent, ranks, latents, teachers, out):
    """start(flags) -> a process, which gets the signal `sent`; `ranks` ranks continue and follow the losses of one rank that was left alone."""
    flags = stage_flags("distill", "dit-tiny", latents, teachers, out / "stopped")
    flags[flags.index("--steps") + 1], flags[flags.index("--save-every") + 1] = 200, 1000
    process = start(flags)
    while not (out / "stopped/log.jsonl").exists() or len(log_of(out / "stopped")) < 5:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(sent)
    said, _ = process.communicate(timeout=100)
    step = torch.load(max((out / "stopped").glob("step-*.pt")), weights_only=True)["step"]
    assert 5 <= step < 200 and not (out / "stopped/student.pt").exists()
    done = launch(distill.__file__, *flags, "--resume", "auto", ranks=ranks)
    assert done.returncode == 0, done.stderr
    run(distill, *flags, "--out", out / "whole")
    got, want = log_of(out / "stopped"), log_of(out / "whole")
    assert [line["step"] for line in got] == list(range(1, 201))
    for line, other in zip(got, want):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    return process.returncode, said


def test_a_signal_saves_and_two_ranks_take_over(latents, teachers, tmp_path):
    """Pre-emption: a signal saves and exits with 0."""
    alone = lambda flags: subprocess.Popen([sys.executable, distill.__file__, *map(str, flags)], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    code, said = stop_and_take_over(alone, signal.SIGTERM, 2, latents, teachers, tmp_path)
    assert code == 0 and "continue with --resume auto" in said


def test_torchrun_passes_a_signal_on_and_three_ranks_take_over(latents, teachers, tmp_path):
    """SIGUSR1 to the agent of two ranks; the three that go on do not divide the batch of 16."""
    agent = lambda flags: torchrun(["--nproc_per_node=2", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"], flags, script=distill.__file__)[0]
    stop_and_take_over(agent, signal.SIGUSR1, 3, latents, teachers, tmp_path)


def test_a_step_that_is_not_finite_is_skipped_and_twenty_in_a_row_stop_the_run(latents, teachers, tmp_path, capsys, monkeypatch):
    honest = model.DiffusionObjective.loss
    poison = lambda steps: lambda self, out, batch: honest(self, out, batch) * (float("nan") if next(steps) else 1.0)
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    monkeypatch.setattr(model.DiffusionObjective, "loss", poison(iter([0, 0, 1, 0, 0, 0])))
    run(distill, *flags)
    states = [torch.load(tmp_path / f"step-0000000{k}.pt", weights_only=True) for k in (2, 3, 4)]
    assert same_weights(states[0]["model"], states[1]["model"]) and not same_weights(states[1]["model"], states[2]["model"])
    assert all(v.isfinite().all() for v in states[2]["model"].values())
    monkeypatch.setattr(model.DiffusionObjective, "loss", poison(iter([1] * 100)))
    flags[flags.index("--steps") + 1] = 50
    assert "not finite for 20 steps in a row" in user_error(capsys, distill, *flags)


@pytest.mark.parametrize("mode", ["masked-kd", "kd", "output-kd", "finetune"])
def test_modes_differ_in_what_they_add(mode, latents, teachers, tmp_path):
    run(distill, *stage_flags("distill", "dit-tiny", latents, teachers, tmp_path), "--mode", mode)
    line = log_of(tmp_path)[0]
    parts = {"masked-kd": {"kd", "diffusion", "rep"}, "kd": {"kd", "diffusion", "rep"}, "output-kd": {"kd", "diffusion"}, "finetune": set()}[mode]
    assert parts == {"kd", "diffusion", "rep"} & line.keys()
    if parts:
        assert line["loss"] == pytest.approx(0.9 * line["kd"] + 0.1 * line["diffusion"] + 0.01 * line.get("rep", 0), rel=1e-5)


def test_resuming_from_an_earlier_checkpoint_leaves_the_later_branch(latents, teachers, tmp_path):
    """...and a log line torn by a kill does not stop it."""
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    run(distill, *flags)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 7, "lo')
    flags[flags.index("--keep") + 1] = 2
    run(distill, *flags, "--resume", tmp_path / "step-00000002.pt")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005.pt", "step-00000006.pt"]
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 7))


def test_only_the_newest_checkpoints_are_kept_and_a_new_run_starts_clean(latents, teachers, tmp_path):
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    flags[flags.index("--keep") + 1] = 2
    run(distill, *flags)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005.pt", "step-00000006.pt"]
    flags[flags.index("--steps") + 1] = 2
    run(distill, *flags)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001.pt", "step-00000002.pt"] and len(log_of(tmp_path)) == 2


def test_an_unfinished_run_is_not_overwritten_by_accident(latents, teachers, tmp_path, capsys):
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    run(distill, *flags)
    (tmp_path / "step-00000006.pt").unlink()
    assert "--resume auto to go on, or --resume never" in user_error(capsys, distill, *flags)
    assert len(list(tmp_path.glob("step-*.pt"))) == 5
    run(distill, *flags, "--resume", "never")
    assert len(log_of(tmp_path)) == 6


def test_a_damaged_newest_checkpoint_is_passed_over(latents, teachers, tmp_path, capsys):
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    run(distill, *flags)
    want = torch.load(tmp_path / "step-00000006.pt", weights_only=True)
    for step, content in (6, b""), (5, b"PK torn"):
        (tmp_path / f"step-0000000{step}.pt").write_bytes(content)
    run(distill, *flags, "--resume", "auto")
    assert "step-00000005.pt is passed over" in capsys.readouterr().err
    assert same_weights(torch.load(tmp_path / "step-00000006.pt", weights_only=True)["model"], want["model"])
    for path in tmp_path.glob("step-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit):
        run(distill, *flags, "--resume", "auto")
    assert "can be read" in capsys.readouterr().err and list(tmp_path.glob("step-*.pt"))


def test_mistakes_get_one_sentence(latents, teachers, tmp_path, capsys):
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    without = lambda flag, *value: [*flags[: flags.index(flag)], *([flag, *value] if value else []), *flags[flags.index(flag) + 2 :]]
    assert "does not exist" in user_error(capsys, distill, *without("--student", tmp_path / "none.pt"))
    assert "holds no latents" in user_error(capsys, distill, *without("--latents", tmp_path / "none"))
    assert "too small for" in user_error(capsys, distill, *without("--batch-size", 1), "--accumulate", 2)
    assert "larger than the data set" in user_error(capsys, distill, *without("--batch-size", 512))
    assert "no model is called" in user_error(capsys, distill, *without("--student"), "--mode", "scratch", "--model", "dit-huge")
    (tmp_path / "file").write_text("")
    assert "cannot write" in user_error(capsys, distill, *without("--out", tmp_path / "file"))
    run(distill, *flags)
    for other in (without("--steps", 9), [*flags, "--lr", 1e-4], [*flags, "--mode", "finetune"]):
        assert "belongs to a run with" in user_error(capsys, distill, *other, "--resume", "auto")
    assert "at least 1" in user_error(capsys, distill, *without("--batch-size", 0))
    assert "another kind" in user_error(capsys, distill, *without("--teacher", teachers / "sit-tiny.pt"))
    assert "add that" in user_error(capsys, prune, "--ckpt", teachers / "dit-tiny.pt", "--layers", "0,1", "--latents", latents, "--out", tmp_path)
    assert "do not divide" in user_error(capsys, prune, "--ckpt", teachers / "dit-tiny.pt", "--scheme", "3:5", "--latents", latents, "--out", tmp_path)
    assert "keeps 3 of layers" in user_error(capsys, prune, "--ckpt", teachers / "dit-tiny.pt", "--scheme", "2:4", "--criterion", "indices", "--layers", "0,1,2", "--latents", latents, "--out", tmp_path)
    assert "the network takes" in user_error(capsys, distill, *without("--student"), "--mode", "scratch", "--model", "dit-s")


def torchrun(*flags, script, agents=1):
    """Starts `agents` torchrun processes on loopback, as on as many machines."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    rendezvous = [f"--nnodes={agents}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *map(str, flags[0]), script, *map(str, flags[1])]
    return [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(agents)]


def test_two_machines_follow_one(latents, teachers, tmp_path):
    """Two torchrun agents (nnodes=2) on loopback: the losses of one rank, to float tolerance."""
    run(distill, *stage_flags("distill", "dit-tiny", latents, teachers, tmp_path / "one"))
    agents = torchrun(["--nproc_per_node=1"], stage_flags("distill", "dit-tiny", latents, teachers, tmp_path / "two"), script=distill.__file__, agents=2)
    errors = [agent.communicate(timeout=200)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    for line, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-4)


def test_torchruns_restart_resumes_by_itself(latents, teachers, tmp_path, capsys, monkeypatch):
    """torchrun --max-restarts starts the same command again, after a node has joined with the count of restarts at 0: no --resume is needed."""
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    run(distill, *flags)
    want, lines = weights_of(tmp_path / "student.pt", "ema"), log_of(tmp_path)
    for later in (4, 5, 6):
        (tmp_path / f"step-0000000{later}.pt").unlink()
    started = (tmp_path / "step-00000003.pt").stat().st_mtime_ns
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    run(distill, *flags)
    assert "would start from there again" in user_error(capsys, distill, *flags, "--resume", "never")
    assert (tmp_path / "step-00000003.pt").stat().st_mtime_ns == started  # not written again
    assert same_weights(weights_of(tmp_path / "student.pt", "ema"), want) and len(log_of(tmp_path)) == len(lines)


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


SHORT = {"dit-tiny": ["--steps", 6], "sit-tiny": ["--steps", 6], "mar-tiny": ["--steps", 3, "--token-steps", 4]}


@family
def test_image_i_is_the_same_in_any_batch_and_on_any_number_of_ranks(name, teachers, tmp_path):
    flags = ["--ckpt", teachers / f"{name}.pt", "--num-images", 37, *SHORT[name]]
    run(sample, *flags, "--out", tmp_path / "whole")
    run(sample, *flags, "--out", tmp_path / "parts", "--batch-size", 11)
    done = launch(sample.__file__, *flags, "--out", tmp_path / "ranks", "--batch-size", 5, ranks=2)
    assert done.returncode == 0, done.stderr
    whole, *others = [np.load(tmp_path / k / "samples.npz") for k in ("whole", "parts", "ranks")]
    assert whole["arr_0"].shape == (37, 32, 32, 3) and whole["arr_1"].tolist() == [i % 10 for i in range(37)]
    assert whole["arr_0"].std() > 5
    for other in others:
        assert np.abs(whole["arr_0"].astype(int) - other["arr_0"]).max() <= 1


@pytest.mark.parametrize("name, sampler", [(n, s) for n, c in (("dit-tiny", model.DiffusionObjective), ("sit-tiny", model.InterpolantObjective)) for s in c.samplers])
def test_guidance_one_is_the_conditional_network_and_more_is_not(name, sampler, teachers):
    net, _ = model.load_model(ckpt=teachers / f"{name}.pt")
    options = net.objective().defaults | dict(steps=4, sampler=sampler)
    draw = lambda scale: net.objective().sample(net, torch.arange(4), RowNoise((0,), 0, 4, 16), **options | dict(guidance=scale))
    with torch.inference_mode():
        assert torch.isfinite(draw(1.0)).all() and not torch.allclose(draw(1.0), draw(3.0), atol=1e-3)
        torch.testing.assert_close(draw(1.0), draw(1.0 + 1e-7), rtol=1e-3, atol=1e-3)


def test_export_loads_as_an_official_file(teachers, tmp_path):
    run(sample, "--ckpt", teachers / "dit-tiny.pt", "--export", tmp_path / "w.safetensors")
    net, _ = model.load_model(ckpt=teachers / "dit-tiny.pt")
    assert same_weights(model.read_state(tmp_path / "w.safetensors")[0], net.state_dict())
    assert same_weights(model.load_model(ckpt=tmp_path / "w.safetensors")[0].state_dict(), net.state_dict())


def test_the_grid_has_a_row_a_class():
    images = np.stack([np.full((32, 32, 3), 10 * (i % 3), np.uint8) for i in range(9)])
    grid = np.asarray(sample.grid_of(images, np.arange(9) % 3))
    assert grid.shape[0] == 2 * (3 * 34 + 2) and [grid[2 * (2 + 34 * r) + 20, 30, 0] for r in range(3)] == [0, 10, 20]


def test_sampling_mistakes_get_one_sentence(teachers, tmp_path, capsys):
    flags = ["--ckpt", teachers / "dit-tiny.pt", "--out", tmp_path, "--num-images", 2]
    assert "does not apply" in user_error(capsys, sample, *flags, "--temperature", 0.9)
    assert "does not apply" in user_error(capsys, sample, *flags, "--sampler", "ode-heun")
    assert "2 to 1000" in user_error(capsys, sample, *flags, "--steps", 1)
    assert "classes 0 to 9" in user_error(capsys, sample, *flags, "--classes", "3,11")
    assert "50 or ddim50" in user_error(capsys, sample, "--ckpt", teachers / "mar-tiny.pt", "--out", tmp_path, "--num-images", 2, "--token-steps", "ten")
    assert "holds dit-tiny" in user_error(capsys, sample, *flags, "--model", "sit-tiny")
    assert ".safetensors or .pt" in user_error(capsys, sample, *flags, "--export", tmp_path / "w.bin")


@pytest.mark.parametrize("name", ["dit-tiny", "sit-tiny", "mar-tiny"])
def test_bundled_weights_draw_the_digit_asked_for(name, tmp_path):
    """50 samples in 32 steps, judged by the digit classifier; the README measures 1,000."""
    run(sample, "--model", name, "--num-images", 50, "--steps", 32, "--out", tmp_path)
    assert fid.evaluate(tmp_path / "samples.npz", ROOT / "data/mnist_train10k.npz", features="digits")["accuracy"] >= 0.9


# ---------------------------------------------------------------------------------------------------------------------
# fid.py


def inception_fill(name, shape, gain=1.5):
    """Deterministic weights: from the name alone."""
    v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) >= 2:
        v *= gain / np.sqrt(v.size / shape[0])
    elif name.endswith("running_var"):
        v = 1 + 0.2 * abs(v)
    else:
        v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    return torch.from_numpy(v.astype(np.float32))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    shapes = {k: tuple(v.shape) for k, v in fid.Inception().state_dict().items() if "num_batches" not in k}
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({k: inception_fill(k, s) for k, s in shapes.items()}, path)
    return path


def inception_image(seed, size, cell, n=2):
    r = np.random.RandomState(seed)
    low = r.randint(0, 224, size=(n, 3, -(-size // cell), -(-size // cell)))
    noise = r.randint(0, 32, size=(n, 3, size, size))
    image = low.repeat(cell, 2).repeat(cell, 3)[:, :, :size, :size] + noise
    return image.astype(np.uint8).transpose(0, 2, 3, 1).copy()  # (N, H, W, 3)


def digits_file(path, lo, hi, noise=0, compress=False, arr_1=True):
    """Digits lo to hi as samples: 32x32 RGB."""
    with np.load(DIGITS) as file:
        x, y = file["arr_0"][lo:hi], file["arr_1"][lo:hi]
    x = np.pad(x, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, 3)
    x = np.clip(x + np.random.RandomState(0).randn(*x.shape) * noise, 0, 255).astype(np.uint8)
    (np.savez_compressed if compress else np.savez)(path, arr_0=x, **({"arr_1": y} if arr_1 else {}))
    return path


def evaluate_digits(samples, ref, **kwargs):
    return fid.evaluate(samples, ref, "digits", CLASSIFIER, **{"cache": False, **kwargs})


def run_fid(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, argv)])
    fid.main()


def on_two_machines(folder, code):
    """Runs code, with rank and folder, in two processes, each its machine's first: [(exit code, stderr), ...]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        master = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE="2", LOCAL_RANK="0")
    started = []
    for rank in (0, 1):
        program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fid; from pathlib import Path\n"
                   f"rank, folder = {rank}, Path({str(folder)!r})\nfid.run_main(lambda: {code})")
        started.append(subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, **master, "RANK": str(rank), "OMP_NUM_THREADS": "1"}))
    try:
        return [(p.returncode, error) for p, (_, error) in [(p, p.communicate(timeout=100)) for p in started]]
    finally:
        for p in started:  # whoever waits for ever
            p.kill()


def test_fid_inception_manifest():
    shapes = sorted((k, list(v.shape)) for k, v in fid.Inception().state_dict().items())
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    assert digest == "98efe1f44183bf67247de946366958822c514b904f110b4f1381639ff56d9203"


def test_fid_resize_is_tensorflow_1():
    x = fid.Inception().preprocess(torch.from_numpy(inception_image(202, 64, 8))).numpy()
    assert np.array_equal(x[:, :, 145:153, 145:153], stored("inception_amp_64/resized_crop"))
    assert np.array_equal(x[:, :, 0], stored("inception_amp_64/resized_row0"))
    assert np.array_equal(x[..., 298], stored("inception_amp_64/resized_last_col"))
    same = torch.randn(1, 3, 299, 299)
    assert torch.equal(fid.tf1_resize(same, 299), same)


@pytest.mark.parametrize("folded", [False, True])
def test_fid_inception_goldens(inception_file, folded):
    if folded:
        net = fid.load_inception(inception_file)
    else:
        net = fid.Inception().eval()
        fid.load_weights(net, inception_file)
    with torch.no_grad():
        for case, seed, size, cell in (("inception_amp_64", 202, 64, 8), ("inception_amp_299", 203, 299, 23)):
            outs = net(torch.from_numpy(inception_image(seed, size, cell)))
            for name, got in zip(("pool3", "spatial_nhwc", "softmax_unbiased"), outs):
                if (case, name) != ("inception_amp_299", "softmax_unbiased"):
                    ref = stored(f"{case}/{name}")
                    assert np.abs(got.numpy() - ref).max() <= 1e-5 * np.abs(ref).max(), (case, name)


def moments(x, batch=64):
    sums = fid.Moments(x.shape[1], "cpu")
    for part in torch.from_numpy(x).split(batch):
        sums.add(part)
    return sums.result(len(x))


def test_fid_frechet_goldens():
    real, fake = stored("metrics_fid/real"), stored("metrics_fid/fake")
    cases = [(real, fake), (real, fake[:370]), (real[:40], fake[:40]), (real, fake[:40]), (real, real),
             (real[:40], real[:40])]
    for (a, b), exact in zip(cases, stored("metrics_fid/exact_values")):
        got = fid.frechet_distance(*moments(a), *moments(b))
        assert got >= 0 and got == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_fid_moments_equal_numpy():
    x = stored("metrics_fid/real")
    for batch in (1, 64, 500):
        mean, covariance = moments(x, batch)
        np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12)


def test_fid_frechet_closed_form_and_sqrtm():
    r = np.random.RandomState(0)
    a, b = r.randn(500, 96), r.randn(500, 96) * np.logspace(0, -3, 96)
    s1, s2, shift = np.cov(a.T), np.cov(b.T), r.randn(96)
    assert fid.frechet_distance(shift, s1, 0 * shift, s1) == pytest.approx(np.square(shift).sum(), rel=1e-10)  # shifted
    assert fid.frechet_distance(shift, 4 * s1, shift, s1) == pytest.approx(np.trace(s1), rel=1e-10)  # (2 - 1)^2 tr S
    assert fid.frechet_distance(shift, s1, shift, s2) == pytest.approx(
        np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2)).real, rel=1e-9)


def score(probs, split, batch):
    sums = torch.zeros(-(-len(probs) // split), probs.shape[1] + 2, dtype=torch.float64)
    for start in range(0, len(probs), batch):
        fid.split_sums(torch.from_numpy(probs[start:start + batch]), start, sums, split)
    return fid.inception_score(sums)


def test_fid_inception_score_goldens():
    probs = stored("metrics_inception_score/softmax")
    for split, ref in ((5000, 2.5475449562072754), (50, 2.4891252517700195), (150, 2.5245985984802246)):
        for batch in (7, 500):
            assert score(probs, split, batch) == pytest.approx(ref, rel=1e-6)
    p = stored("metrics_inception_score/softmax_with_zero").astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(p > 0, p * (np.log(p) - np.log(p.mean(0))), 0).sum(1)
    assert score(p, 5000, 20) == pytest.approx(np.exp(kl.mean()), rel=1e-12)


def test_fid_precision_recall_goldens(monkeypatch):
    real = stored("metrics_precision_recall/real")
    cases = (("fake", 0.8733333333333333, 0.47), ("fake_170", 0.9764705882352941, 0.23333333333333334),
             ("fake_copies", 0.89, 0.57))
    blocks = fid.blocks
    for size in (512, 48):
        monkeypatch.setattr(fid, "blocks", lambda a, b: blocks(a, b, size))
        for name, precision, recall in cases:
            got = fid.precision_recall(real, stored(f"metrics_precision_recall/{name}"))
            assert got == pytest.approx((precision, recall))
    radii = fid.knn_radii(torch.from_numpy(stored("metrics_precision_recall/fake_170")).double()).numpy()
    ref = stored("metrics_precision_recall/pr_300_170__numpy_float64__radii_fake")[:, 0]
    np.testing.assert_allclose(radii, ref, rtol=1e-6)


def test_fid_digit_classifier_on_held_out_digits():
    assert CLASSIFIER.stat().st_size <= 500_000
    net = fid.load_digits(CLASSIFIER)
    with np.load(DIGITS) as file, torch.no_grad():
        x, y = torch.from_numpy(file["arr_0"][-1000:, ..., None]), torch.from_numpy(file["arr_1"][-1000:])
        features, _, probs = net(x)
        assert (probs.argmax(1) == y).float().mean() >= 0.985
        assert features.shape == (1000, 64) and torch.linalg.matrix_rank(torch.cov(features.double().T)) == 64
        padded = torch.nn.functional.pad(x, (0, 0, 2, 2, 2, 2)).expand(-1, -1, -1, 3)  # as sampled: 32x32 RGB
        assert torch.allclose(net(padded)[0], features, atol=1e-5)


def test_fid_train_digits_writes_what_load_digits_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "reproduce")
    import train_digit_classifier

    data = digits_file(tmp_path / "few.npz", 0, 600)
    right = train_digit_classifier.train_digits(data, tmp_path / "out/net.pt", epochs=1)
    assert 0 <= right <= 1 and "of the 60 held-out digits" in capsys.readouterr().out
    assert fid.load_digits(tmp_path / "out/net.pt").head.weight.shape == (10, 64)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["net.pt"]


def test_fid_of_a_set_with_itself(tmp_path):
    a = digits_file(tmp_path / "a.npz", 0, 200)
    result = evaluate_digits(a, a)
    assert result["fid"] == pytest.approx(0, abs=1e-9) and (result["precision"], result["recall"]) == (1, 1)
    assert result["accuracy"] > 0.95 and 1 < result["is"] <= 10 and "sfid" not in result


def test_fid_does_not_depend_on_batch_size_or_ranks(tmp_path, monkeypatch):
    a, b = digits_file(tmp_path / "a.npz", 0, 201, noise=30), digits_file(tmp_path / "b.npz", 300, 601, compress=True)
    monkeypatch.setattr(fid, "SPLIT", 60)  # so that splits of the Inception Score straddle batches and ranks
    results = [evaluate_digits(a, b, batch_size=size) for size in (1, 64, 500)]
    (tmp_path / "run.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                     "import fid; fid.SPLIT = 60; fid.run_main(fid.main)")
    done = launch(tmp_path / "run.py", a, "--ref", b, "--no-cache", "--json", "--device", "cpu", ranks=2)
    assert done.returncode == 0, done.stderr
    results.append(json.loads(done.stdout))
    for other in results[1:]:
        for name in ("fid", "is", "precision", "recall", "accuracy"):
            assert other[name] == pytest.approx(results[0][name], rel=1e-6), name


def test_fid_reads_mapped_compressed_and_folders_alike(tmp_path):
    a = digits_file(tmp_path / "a.npz", 0, 100)
    mapped = fid.open_images(a)
    assert isinstance(fid.map_array(a, "arr_0.npy"), np.memmap)
    packed = fid.open_images(digits_file(tmp_path / "packed.npz", 0, 100, compress=True))
    with np.load(a) as file:
        images = file["arr_0"]
    for kind in ("png", "jpg"):
        (tmp_path / kind).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / kind / f"{i:03d}.{kind}")
    folder = fid.open_images(tmp_path / "png")
    for source in (mapped, packed, folder):
        assert np.array_equal(source.read(3, 50), images[3:50]) and (source.n, source.shape) == (100, (32, 32, 3))
    assert evaluate_digits(folder.path, a)["fid"] == pytest.approx(0, abs=1e-9)
    assert any("JPEG" in line for line in evaluate_digits(tmp_path / "jpg", a)["warnings"])


def test_fid_cache(tmp_path, monkeypatch):
    a, b = digits_file(tmp_path / "a.npz", 0, 100, noise=9), digits_file(tmp_path / "b.npz", 100, 250)
    plain = evaluate_digits(a, b)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    assert evaluate_digits(a, b, cache=True) == plain
    compute, calls = fid.compute_statistics, []
    count = lambda images, *rest: calls.append(images.path.name) or compute(images, *rest)
    monkeypatch.setattr(fid, "compute_statistics", count)
    assert evaluate_digits(a, b, cache=True) == plain and calls == []
    alone = evaluate_digits(a, tmp_path / "b.npz.fid-digits.npz", cache=True)  # a cache is a reference of its own
    assert alone["fid"] == plain["fid"] and "precision" not in alone and calls == []
    digits_file(a, 1, 101, noise=9)  # other images, same shape and size of file
    assert evaluate_digits(a, b, cache=True)["fid"] != plain["fid"] and calls == ["a.npz"]
    (tmp_path / "b.npz.fid-digits.npz").write_bytes(b"half a file")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert evaluate_digits(a, b, cache=True)["fid"] > 0 and calls == ["a.npz", "b.npz"]  # nowhere to write: no cache


def test_fid_with_inception_and_a_reference_like_adms(tmp_path, inception_file):
    images = inception_image(5, 72, 12, n=6)
    np.savez(tmp_path / "a.npz", arr_0=images)
    np.savez(tmp_path / "b.npz", arr_0=images[:5] // 2)
    first = fid.evaluate(tmp_path / "a.npz", tmp_path / "b.npz", ckpt=inception_file, batch_size=4)  # 72 px: Inception
    assert first["features"] == "inception" and first["fid"] > 0 and first["sfid"] > 0 and first["is"] >= 1
    assert any("FID-50K" in line for line in first["warnings"])
    with np.load(tmp_path / "a.npz.fid-inception.npz") as file:
        ready = {k: file[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "virtual.npz", arr_0=images[:5] // 2, **ready)  # its statistics win over those of its images
    second = fid.evaluate(tmp_path / "a.npz", tmp_path / "virtual.npz", ckpt=inception_file)
    assert second["fid"] == pytest.approx(0, abs=1e-6) and second["sfid"] == pytest.approx(0, abs=1e-6)
    assert (second["precision"], second["recall"]) == (first["precision"], first["recall"])
    np.savez(tmp_path / "small.npz", arr_0=images[:, ::2, ::2], mu=ready["mu"], sigma=ready["sigma"])
    third = fid.evaluate(tmp_path / "a.npz", tmp_path / "small.npz", ckpt=inception_file, pr=False, cache=False)
    assert any("(72, 72), the reference (36, 36)" in line for line in third["warnings"]) and "sfid" not in third


def test_fid_command_line(tmp_path, monkeypatch, capsys):
    a, b = digits_file(tmp_path / "a.npz", 0, 100), digits_file(tmp_path / "b.npz", 100, 250, arr_1=False)
    common = (a, "--ref", b, "--ckpt", CLASSIFIER, "--no-cache", "--device", "cpu")
    monkeypatch.chdir(tmp_path)  # the bundled files are found from anywhere
    run_fid(monkeypatch, *common, "--json")
    result = json.loads(capsys.readouterr().out)
    assert {"fid", "is", "precision", "recall", "accuracy"} <= set(result) and result["num_samples"] == 100
    run_fid(monkeypatch, a, "--no-pr", "--json", tmp_path / "named.json", "--no-cache")
    named = json.loads((tmp_path / "named.json").read_text())
    assert named["num_ref"] == 10000 and named["ref"] == "digits" and "10000 images" in capsys.readouterr().out
    run_fid(monkeypatch, *common, "--json", tmp_path / "out.json", "--no-pr")
    table = capsys.readouterr().out
    assert f"{result['fid']:.4f}" in table and "Precision" not in table
    assert json.loads((tmp_path / "out.json").read_text())["fid"] == result["fid"]


def zeros(*shape):
    return np.zeros(shape, np.uint8)


BAD = {  # name -> its arrays (none: see bad_inputs), and a part of the sentence
    "dtype.npz": ({"arr_0": np.zeros((5, 32, 32, 3), np.float32)}, "must be uint8"),
    "channels.npz": ({"arr_0": zeros(5, 32, 32, 4)}, "must be uint8"),
    "one.npz": ({"arr_0": zeros(1, 32, 32, 3)}, "must be uint8"),
    "objects.npz": ({"arr_0": np.array([{}], dtype=object)}, "must be uint8"),
    "none.npz": ({"x": zeros(3)}, "it must hold images"),
    "labels.npz": ({"arr_0": zeros(5, 32, 32, 3), "arr_1": zeros(4)}, "labels"),
    "words.npz": ({"arr_0": zeros(5, 32, 32, 3), "arr_1": np.array(list("abcde"))}, "whole number"),
    "size.npz": ({"arr_0": zeros(5, 40, 40, 3)}, "28x28 or 32x32"),
    "three.npz": ({"arr_0": zeros(3, 32, 32)}, "more than 3"),
    "statistics.npz": ({"mu": np.zeros(7), "sigma": np.eye(7)}, "7 features"),
    "covariance.npz": ({"mu": np.zeros(64), "sigma": np.eye(7)}, "covariance"),
    "nan.npz": ({"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "covariance"),
    "truncated.npz": (None, "truncated"), "junk.npz": (None, "not a readable .npz"), "empty": (None, "holds 0 images"),
    "broken": (None, "not a readable image"), "missing.npz": (None, "sample.py writes")}


def bad_inputs(folder):
    for name, (arrays, _) in BAD.items():
        if arrays:
            np.savez(folder / name, **arrays)
    good = digits_file(folder / "good.npz", 0, 20).read_bytes()
    (folder / "truncated.npz").write_bytes(good[:len(good) // 2])
    (folder / "junk.npz").write_bytes(b"not a zip")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "broken/a.png")
    (folder / "broken/b.png").write_bytes(b"not a png")


@pytest.mark.parametrize("role", ["samples", "ref"])
def test_fid_bad_input_is_one_sentence(tmp_path, monkeypatch, role):
    bad_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, (_, part) in BAD.items():
        paths = [tmp_path / name, tmp_path / "good.npz"]
        samples, ref = paths if role == "samples" else paths[::-1]
        with pytest.raises(fid.UserError) as error:
            run_fid(monkeypatch, samples, "--ref", ref, "--no-cache", "--device", "cpu")
        assert part in str(error.value) and "\n" not in str(error.value), (name, error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_fid_bad_options_are_one_sentence(tmp_path, monkeypatch, capsys):
    a = digits_file(tmp_path / "a.npz", 0, 20)
    for part, *options in (("at least 1", "--batch-size", 0), ("holds no weights", "--ckpt", a),
                           ("pt does not exist", "--ckpt", tmp_path / "no.pt"),
                           ("but this machine has", "--device", "tpu"),
                           ("but this machine has", "--device", "cuda:77"), ("invalid choice", "--features", "vgg"),
                           ("pth does not exist", "--features", "inception", "--ckpt", tmp_path / "no.pth"),
                           ("unrecognized", "--weights", "x"), ("cannot write", "--json", a / "out.json")):
        with pytest.raises(SystemExit) as stop:
            fid.run_main(lambda: run_fid(monkeypatch, a, "--ref", a, "--no-cache", "--device", "cpu", *options))
        errors = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
        assert stop.value.code == 2 and len(errors) == 1, (options, errors)
        assert errors[0].startswith("error: ") and part in errors[0], (options, errors)


class Shop(http.server.BaseHTTPRequestHandler):
    """Serves /whole, 2 MiB and a bit, and /broken, which says so too but ends after half of it."""

    def do_GET(self):
        body = bytes(range(256)) * 8200
        self.send_response(200 if self.path in ("/whole", "/broken") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.asked.append(self.path)
        self.wfile.write(body if self.path == "/whole" else body[: len(body) // 2])

    def log_message(self, *args):
        pass


@pytest.fixture
def shop():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_fid_download_is_whole_or_absent(tmp_path, shop):
    path = tmp_path / "weights/file.pth"
    for name in ("broken", "missing"):
        with pytest.raises(fid.UserError, match=f"cannot download .*/{name} .* by hand and put it at .*file.pth"):
            fid.fetch(path, f"{shop.url}/{name}")
        assert list(path.parent.iterdir()) == []
    for _ in range(2):
        assert fid.fetch(path, f"{shop.url}/whole").read_bytes() == bytes(range(256)) * 8200
    assert shop.asked.count("/whole") == 1 and [f.name for f in path.parent.iterdir()] == ["file.pth"]


def test_fid_ranks_meet_whatever_is_on_their_disks(tmp_path, shop):
    """One machine has the weights, the other has not: it downloads them, or both stop."""
    (tmp_path / "0").mkdir()
    shutil.copy(CLASSIFIER, tmp_path / "0/w.pt")
    fetch = "[fid.setup('cpu'), fid.fetch(folder / str(rank) / 'w.pt', '{}')]"
    assert [code for code, _ in on_two_machines(tmp_path, fetch.format(shop.url + "/whole"))] == [0, 0]
    assert shop.asked == ["/whole"] and (tmp_path / "1/w.pt").stat().st_size == 256 * 8200
    (tmp_path / "1/w.pt").unlink()
    for code, err in on_two_machines(tmp_path, fetch.format(shop.url + "/broken")):
        assert code == 2 and err.count("error: cannot download") == 1


def test_fid_a_set_that_one_machine_lacks_stops_all_ranks(tmp_path):
    (tmp_path / "0").mkdir()
    digits_file(tmp_path / "0/a.npz", 0, 20)
    evaluate = "fid.evaluate(folder / str(rank) / 'a.npz', device=fid.setup('cpu'), cache=False)"
    for code, err in on_two_machines(tmp_path, evaluate):
        assert code == 2 and err.startswith("error: ") and "1/a.npz does not exist" in err


def test_fid_leaves_the_group_only_after_success(monkeypatch, capsys):
    """The others may sit in a collective, where nccl would let a failing rank wait for them before it says why."""
    calls = []
    monkeypatch.setattr(fid.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(fid.dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(fid.dist, "destroy_process_group", lambda: calls.append("leave"))

    def fail(error):
        raise error

    with pytest.raises(ZeroDivisionError):
        fid.run_main(lambda: fail(ZeroDivisionError()))
    with pytest.raises(SystemExit) as stop:
        fid.run_main(lambda: fail(fid.UserError("do\nthis")))
    assert stop.value.code == 2 and capsys.readouterr().err == "error: do this\n" and calls == []
    fid.run_main(lambda: None)
    assert calls == ["barrier", "leave"]
