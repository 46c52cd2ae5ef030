"""Every test, in the pipeline's order. `pytest test_all.py` takes minutes; SLOW=1 adds the full-size networks (12 GB).

Reference values (data/test_goldens.npz) were computed with the official DiT, SiT, MAR, TinyFusion, VAE and FID code on
weights that `fill` reproduces from the tensors' names. A test states a fact, not that a function returns.
"""
import argparse
import copy
import functools
import gc
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
import socket
import subprocess
import sys
import threading
import time
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
from extract_latents import (DIGITS, KL16, SD, VAES, AutoencoderKL, Batches, Latents, center_crop, decode_images,
                             epoch_order, load_vae, read_npz, rename_vae_keys, to_pixels)
from model import RowGenerator, UserError, build_model, load_state, make_seed

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
        tables = ("embedding_table.weight", "class_emb.weight", "mask_token", "fake_latent")
        if name.endswith(tables) or "pos_embed" in name:
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
    """A stand-in for RowGenerator: draw k of the golden run, its first n rows (we do not carry the null half's noise)."""

    def __init__(self, shape, n, first=1000):
        self.shape, self.n, self.k = shape, n, first

    def __call__(self):
        v = np.random.RandomState(self.k).standard_normal(self.shape).astype(np.float32)
        self.k += 1
        return torch.from_numpy(v)[: self.n]


DIT_GOLDEN = dict(width=64, heads=4, input_size=8, classes=10)
MAR_GOLDEN = dict(width=32, depth=4, heads=4, loss_width=32, loss_depth=2, input_size=4, classes=10, channels=4,
                  buffer=4)
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
    meta = dict(complete=True, shape=[4, 8, 8], scale=1.0, classes=[str(i) for i in range(10)], count=96, flips=1,
                vae="digits")
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """A small teacher checkpoint of each family."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, shape in FAMILIES.items():
        net = small(name)
        config = dict(name=name, depth=net.depths(), overrides=shape)
        model.save_checkpoint(folder / f"{name}.pt", model=net.state_dict(), config=config, step=0)
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
    return subprocess.run([sys.executable, *torchrun, *map(str, command)], capture_output=True, text=True, timeout=240,
                          env=environment, cwd=cwd)


def user_error(module, *flags) -> str:
    """The one sentence with which a stage refuses."""
    with pytest.raises(UserError) as refused:
        run(module, *flags)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def give_mask(layer, mask, on):
    """Sets a MaskedLayer's mask as LayerMasks.draw does."""
    order = (~on).to(torch.uint8).argsort(stable=True)
    layer.set_mask(mask, int(on.sum()), order, order.argsort())


def script(name):
    """A module of reproduce/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "reproduce" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    guided = sample.guide(net, g["in.x_cfg"][:2], g["in.t_cfg"][:2], g["in.y_cfg"][:2], null=10, scale=1.5, channels=3)
    near(guided, g["out.output_cfg"][:2])


@torch.no_grad()
def test_sit_forward_and_guidance():
    g, net = golden("sit_small_forward"), fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    near(net(g["in.x"], g["in.t"], g["in.y"]), g["out.output"])
    n = len(g["in.x_cfg"]) // 2
    guided = sample.guide(net, g["in.x_cfg"][:n], g["in.t_cfg"][:n], g["in.y_cfg"][:n], null=10, scale=1.5, channels=3)
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
    x, t = g["in.x_net"][:half], g["in.t"][:half]
    guided = sample.guide(lambda x, t, _: head(x, t, zs), x, t, t, 0, 1.7, 4)
    near(guided, g["out.net_output_cfg"][:half], 2e-5)


@pytest.mark.parametrize("name, case, depth", [
    ("dit-xl", "DiT-XL-2-256", None), ("dit-l", "DiT-L-2-256", None), ("dit-b", "DiT-B-2-256", None),
    ("dit-s", "DiT-S-2-256", None), ("dit-xl-512", "DiT-XL-2-512", None), ("dit-xl", "DiT-D19-2-256", 19),
    ("dit-d14", "DiT-D14-2-256", None), ("dit-xl", "DiT-D14-2-256", 14), ("dit-d14", "DiT-D7-2-256", 7),
    ("sit-xl", "SiT-XL-2-256", None), ("mar-base", "mar_base", None), ("mar-large", "mar_large", None),
    ("mar-huge", "mar_huge", None)])
def test_keys_and_shapes_are_the_official_ones(name, case, depth):
    manifest = json.loads(bytes(GOLDENS[f"manifests/{case}"]))
    with torch.device("meta"):
        net = build_model(name, depth)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == manifest


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
    batch = net.objective().make_batch(x, y, RowGenerator((0,), 0, 4, 4))
    for net.checkpointing in (False, True):
        net.zero_grad()
        net.objective().loss(net.objective().predict(net, batch), batch).sum().backward()
        gradients.append({k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None})
    assert same_weights(*gradients)


@slow
def test_compiling_changes_no_gradient():
    """torch 2.13 compiles a wrong backward pass of transposed tokens, as the patch embedding's are."""
    net, gradients = small("dit-tiny"), []
    x, y = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    batch = net.objective().make_batch(x, y, RowGenerator((0,), 0, 4, 4))
    for _ in range(2):
        net.zero_grad()
        net.objective().loss(net.objective().predict(net, batch), batch).sum().backward()
        gradients.append({k: p.grad for k, p in net.named_parameters()})
        for block in net.layers():
            block.forward = prune.compiled(block.forward)
    errors = {k: ((gradients[1][k] - g).norm() / g.norm()).item() for k, g in gradients[0].items()}
    assert max(errors.values()) < 1e-4, errors


PLANS = {  # whole blocks and halves, in each family's lists of blocks
    "dit-tiny": [[("attn", "mlp"), ("attn",), ("mlp",), ("attn", "mlp")]],
    "sit-tiny": [[("mlp",), ("attn", "mlp"), ("attn",)]],
    "mar-tiny": [[("attn",), ("attn", "mlp")], [("mlp",)]],
}


@family
@torch.no_grad()
def test_a_block_is_its_attention_then_its_mlp(name):
    """Two halves with the weights of a whole block compute what it does; a whole block has the official keys."""
    whole = small(name).layers()[0]
    halves = [small(name).new_block(("attn",)), small(name).new_block(("mlp",))]
    for half, (first, *others), share in zip(halves, (("norm1", "attn"), ("norm2", "mlp")), (0, 1)):
        state = {k: v for k, v in whole.state_dict().items() if k.startswith((first, *others))}
        for k, v in whole.state_dict().items():
            if k.startswith("adaLN"):
                state[k] = v.chunk(2)[share]
        half.load_state_dict(state)
        half.eval()
    x, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    condition = () if name == "mar-tiny" else (c,)
    torch.testing.assert_close(halves[1](halves[0](x, *condition), *condition), whole(x, *condition))


@family
@torch.no_grad()
def test_each_tensor_has_its_type_in_bfloat16(name):
    """What needs no gradient is cast once, and the output is that of autocast alone, bit by bit; losses are float32."""
    assert model.choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    net, frozen = small(name), small(name).requires_grad_(False)
    trained = frozen.layers()[1].requires_grad_(True)
    model.cast_frozen(frozen, torch.bfloat16)
    for key, module in frozen.named_modules():
        matrix = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        cast = matrix and not any(module is m for m in trained.modules())
        for p in module.parameters(recurse=False):
            assert p.dtype == (torch.bfloat16 if cast else torch.float32), key
    seen = []
    for module in frozen.modules():
        if isinstance(module, model.TimestepEmbedder):
            module.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    objective = frozen.objective()
    batch = objective.make_batch(torch.randn(4, 4, 8, 8), torch.arange(4), RowGenerator((0,), 0, 4, 4))
    with model.autocast(torch.device("cpu"), torch.bfloat16):
        out, reference = objective.predict(frozen, batch), objective.predict(net, batch)
    assert torch.equal(out, reference) and out.dtype == torch.bfloat16 and set(seen) == {torch.float32}
    assert {objective.loss(out, batch).dtype, objective.kd(out, reference, batch).dtype} == {torch.float32}
    assert objective.loss(out, batch).shape == objective.kd(out, reference, batch).shape == (4,)


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the Gaussian process and the interpolant.


def test_schedules_and_respacing():
    g = golden("gaussian_schedules")
    for schedule in ("linear", "cosine"):
        process = model.GaussianDiffusion(schedule)
        tables = {k: formula(*process.table) for k, formula in process.FORMULAS.items()}
        tables.update(alphas_cumprod=process.table[0], betas=tables["log_betas"].exp(),
                      posterior_variance=tables["log_posterior_variance"].exp())
        for k in {k.removeprefix(f"out.{schedule}_") for k in g if k.startswith(f"out.{schedule}")} & set(tables):
            near(tables[k][g["in.indices"]], g[f"out.{schedule}_{k}"], 1e-10)
        like = torch.empty(len(g["in.indices"]), 4, 8, 8)  # read at those times, ready to multiply with
        got = process.posterior_log_variance(g["in.indices"], like)
        near(got[:, 0, 0, 0], g[f"out.{schedule}_posterior_log_variance_clipped"].float())
    for spacing in ("250", "64", "ddim50"):
        process = model.GaussianDiffusion("linear", spacing)
        assert process.timestep_map == g[f"out.timesteps_{spacing}"].tolist()
        near(process.FORMULAS["log_betas"](*process.table).exp(), g[f"out.respaced_betas_{spacing}"], 1e-10)
    assert model.respace("") == model.respace("1000") == list(range(1000))


@pytest.mark.parametrize("respacing", [
    "0", "1", "1001", "ddim0", "ddim1", "ddim1001", "ddim600", "-3", "2.5", "x", "9" * 99])
def test_impossible_respacings_are_one_sentence(respacing):
    with pytest.raises(UserError, match="give 2 to 1000"):
        model.GaussianDiffusion("linear", respacing)


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
    near(sample.ancestral_step(process, out, x, t, noise), g["out.p_sample"])
    near(sample.ddim_step(process, out, x, t), g["out.ddim_eta0"])
    head = golden("mar_head_psample")
    process, noise = model.GaussianDiffusion("cosine", "100"), Injected(head["in.x"].shape, 4)()
    got = sample.ancestral_step(process, head["in.model_output"], head["in.x"], head["in.t"], noise, temperature=0.9)
    near(got, head["out.sample"])
    assert process.timestep_map == head["out.timestep_map"].tolist()


@torch.no_grad()
@pytest.mark.parametrize("case, sampler, spacing", [
    ("dit_loop_ddim", "ddim", "ddim50"), ("dit_loop_ddim_plain", "ddim", 50), ("dit_loop_ancestral", "ddpm", 20)])
def test_dit_sampling_loop(case, sampler, spacing):
    g, net = golden(case), fill(build_model("dit-tiny", 4, **DIT_GOLDEN))
    draw, first = Injected((4, 4, 8, 8), 2), [g["in.z"]]
    noise = argparse.Namespace(normal=lambda *shape: first.pop() if first else draw())
    near(sample.SAMPLERS[sampler](net, g["in.y"][:2], noise, sampler, spacing, 1.5, 3), g["out.final"])


@torch.no_grad()
def test_sit_loss_and_score():
    g, net = golden("sit_transport_loss"), fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    s = g["in.t"].view(-1, 1, 1, 1)
    batch = dict(x_t=s * g["in.x1"] + (1 - s) * g["in.x0"], t=g["in.t"], velocity=g["in.x1"] - g["in.x0"], y=g["in.y"])
    objective = net.objective()
    near(objective.loss(objective.predict(net, batch), batch), g["out.loss"])
    near(sample.score_of(g["out.pred"], g["out.xt"], s.clamp(max=0.99)), g["out.score"])


@pytest.mark.parametrize("name", ["dit-tiny", "sit-tiny"])
def test_draw_mixes_data_and_noise_as_the_process_says(name):
    net = small(name)
    x, y = torch.randn(64, 4, 8, 8), torch.arange(64) % 10
    batch = net.objective().make_batch(x, y, RowGenerator((3,), 0, 64, 64))
    if name == "sit-tiny":  # t = 0 is noise, t = 1 data
        eps = x - batch["velocity"]
        t = batch["t"].view(-1, 1, 1, 1)
        torch.testing.assert_close(batch["x_t"], t * x + (1 - t) * eps)
    else:
        torch.testing.assert_close(batch["x_t"], model.GaussianDiffusion().q_sample(x, batch["t"], batch["eps"]))
    assert 0 < (batch["y"] == 10).float().mean() < 0.3 and ((batch["y"] == y) | (batch["y"] == 10)).all()


@torch.no_grad()
@pytest.mark.parametrize("method, case, tolerance", [
    ("euler", "euler", 1e-5), ("heun", "heun2", 1e-5), ("dopri5", "dopri5", 5e-4)])
def test_sit_ode(method, case, tolerance):
    """The golden dopri5 is 1.1e-4 from the exact solution, at its tolerance of 1e-3: so near must scipy's RK45 come."""
    g, net = golden(f"sit_ode_{case}"), fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    times = []

    def both_halves(x, t):  # the release carries the null half along, and its dopri5 measures both halves' error
        times.append(t[0].item())
        guided = sample.guide(net, x[:2], t[:2], g["in.y"][:2], 10, 1.5, 3)
        uncond = net(x[:2], t[2:], g["in.y"][2:])
        return torch.cat([guided, torch.cat([guided[:, :3], uncond[:, 3:]], dim=1)])

    x = sample.integrate_ode(both_halves, torch.cat([g["in.z"], g["in.z"]]), 20, method)
    near(x[:2], g["out.final"], tolerance)
    near(x[2:], g["out.final_null_half"], max(tolerance, 2e-5))
    assert len(times) == dict(euler=19, heun=38, dopri5=20)[method]


@torch.no_grad()
@pytest.mark.parametrize("case, method, form, last", [
    ("sit_sde_euler", "euler", "sigma", "mean"), ("sit_sde_heun", "heun", "sigma", "mean"),
    ("sit_sde_euler_linear_tweedie", "euler", "linear", "tweedie"),
    ("sit_sde_euler_decreasing_euler", "euler", "decreasing", "euler"),
    ("sit_sde_euler_sigma_none", "euler", "sigma", "none")])
def test_sit_sde(case, method, form, last):
    g, net = golden(case), fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    times = []

    def velocity(x, t):
        times.append(t[0].item())
        return sample.guide(net, x, t, g["in.y"][:2], 10, 1.5, 3)

    near(sample.integrate_sde(velocity, g["in.z"], 20, Injected((4, 4, 8, 8), 2), method, form, last), g["out.final"])
    assert len(times) == 19 * (2 if method == "heun" else 1) + (last != "none")  # half of the release's calls


@pytest.mark.parametrize("form", sample.DIFFUSION_FORMS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_every_diffusion_form_samples_the_data(form, method):
    """Data N(2, 0.5^2): its exact velocity is known, and every reverse SDE must end in that distribution."""
    def velocity(x, t):
        t = t.view(-1, 1)
        variance = (0.5 * t) ** 2 + (1 - t) ** 2
        return 2 + (0.25 * t - (1 - t)) / variance * (x - 2 * t)

    torch.manual_seed(0)
    draw = lambda: torch.randn(4000, 1)
    x = sample.integrate_sde(velocity, draw(), 500, draw, method, form, last_step_size=0.01)
    assert abs(x.mean() - 2) < 0.04 and abs(x.std() - 0.5) < 0.04


def test_dopri5_reaches_its_tolerance():
    """dx/dt = -3x + t has a closed form."""
    x0 = torch.linspace(-2, 2, 8)[:, None]
    x = sample.integrate_ode(lambda x, t: -3 * x + t.view(-1, 1), x0, 2, "dopri5", atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x, (x0 + 1 / 9) * np.exp(-3) + 1 / 3 - 1 / 9, atol=1e-4, rtol=1e-4)


def test_dopri5_of_a_network_that_diverged_is_one_sentence():
    with pytest.raises(model.UserError, match="t = 0.000 is not finite"):
        sample.integrate_ode(lambda x, t: x * np.nan, torch.ones(2, 1), 2, "dopri5")


@torch.no_grad()
def test_mar_loss():
    g, net = golden("mar_small_forward"), fill(build_model("mar-tiny", **MAR_GOLDEN, patch=1))
    mask, objective = g["in.mask"].bool(), net.objective()
    known, hidden = (torch.stack([m.nonzero()[:, 0] for m in chosen]) for chosen in (~mask, mask))
    tokens = net.patchify(g["in.latents"])
    pick = lambda v: torch.stack([v[:, b][:, hidden[b]] for b in range(2)])  # (R, B, T, ...) -> (B, R, M, ...)
    t, eps = pick(g["in.t_mul2"].view(2, 2, 16)), pick(g["in.noise_mul2"].view(2, 2, 16, 4))
    x_start = model.gather_tokens(tokens, hidden)[:, None].expand(-1, 2, -1, -1)
    x_t = objective.diffusion.q_sample(x_start.flatten(0, 2), t.flatten(), eps.flatten(0, 2)).view_as(eps)
    batch = dict(tokens=tokens, y=g["in.y"], known=known, hidden=hidden, x_start=x_start, x_t=x_t, t=t, eps=eps)
    near(objective.loss(objective.predict(net, batch), batch).mean(), g["out.forward_loss_mul2"], 1e-3)


def test_mar_schedule():
    g = golden("mar_mask_schedule")
    for steps in (8, 64):
        assert sample.mar_schedule(256, steps)[:-1] == g[f"out.masked_at_start_{steps}"].tolist()
    assert sample.mar_schedule(16, 64)[-2:] == [1, 0]  # more rounds than tokens


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

    got = sample.SAMPLERS["mar"](net, g["in.y"], Noise(), "mar", 4, guidance, schedule, 1.0, spacing)
    near(got, g["out.latents"])



def test_mar_draw_hides_and_keeps_disjoint_tokens():
    net = small("mar-tiny")
    x, y = torch.randn(32, 4, 8, 8), torch.arange(32) % 10
    counts = []
    for step in range(60):
        batch = net.objective().make_batch(x, y, RowGenerator((0, step), 0, 32, 32))
        both = torch.cat([batch["known"], batch["hidden"]], dim=1).sort(dim=1)[0]
        assert (both == torch.arange(16)).all()
        counts.append(batch["hidden"].shape[1])
    assert min(counts) >= 12 and max(counts) == 16 and 13 < np.mean(counts) < 15.6  # normal on [0.7, 1], 16 tokens


def test_row_noise_does_not_depend_on_who_draws():
    whole = RowGenerator((7,), 0, 50, 16)
    part = RowGenerator((7,), 20, 37, 16)
    for draw in ("normal", "uniform", "gumbel"):
        assert torch.equal(getattr(whole, draw)(3)[20:37], getattr(part, draw)(3))
    assert torch.equal(whole.gumbel(3, lists=(2,))[:, 20:37], part.gumbel(3, lists=(2,)))
    assert not torch.equal(RowGenerator((7, 0), 0, 8, 8).normal(3), RowGenerator((7, 1), 0, 8, 8).normal(3))


# ---------------------------------------------------------------------------------------------------------------------
# model.py: checkpoints and downloads.


def write_safetensors(path, header, data=b"", length=None):
    """The format, or near it: the header's length, a JSON header (or any bytes), data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("nesting", ["", "ema", "model", "model_ema", "state_dict"])
def test_official_nestings_load(tmp_path, nesting):
    state = small("dit-tiny", 12).state_dict()
    nested = {nesting: {f"module.{k}": v for k, v in state.items()}, "epoch": 3} if nesting else state
    path = tmp_path / f"official{nesting}.pth"
    torch.save(nested, path)
    found, config = model.read_state(path)
    assert config is None and same_weights(found, state)


def test_ema_is_preferred_unless_asked(tmp_path):
    contents = dict(model={"w": torch.zeros(1)}, ema={"w": torch.ones(1)}, config=dict(name="x"))
    model.save_checkpoint(tmp_path / "c.pt", **contents)
    assert model.read_state(tmp_path / "c.pt")[0]["w"] == 1
    assert model.read_state(tmp_path / "c.pt", "model")[0]["w"] == 0


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_arguments_beside_the_weights_are_read_but_code_is_not(tmp_path):
    torch.save(dict(model={"w": torch.ones(2)}, args=argparse.Namespace(lr=1.0)), tmp_path / "mar.pth")
    assert model.read_state(tmp_path / "mar.pth")[0]["w"].sum() == 2
    torch.save(dict(model={"w": torch.ones(2)}, x=Bomb(tmp_path / "exploded")), tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="bomb.pt cannot be read"):
        model.read_state(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_what_other_people_store_beside_their_weights(tmp_path):
    """numpy scalars and Parameters in a torch file; a `config` that is not ours, and masks, in .safetensors."""
    scalars = dict(loss=np.float64(0.1), best=np.float32(0.2), n=np.int64(3))
    torch.save(dict(ema={"w": torch.nn.Parameter(torch.ones(2))}, **scalars), tmp_path / "a.pt")
    state, config = model.read_state(tmp_path / "a.pt")
    assert config is None and not state["w"].requires_grad and not isinstance(state["w"], torch.nn.Parameter)
    for other in ("sd_v1", '{"model_type": "vae"}', "{'a': 1}"):
        mask = dict(dtype="BOOL", shape=[3], data_offsets=[0, 3])
        write_safetensors(tmp_path / "b.safetensors", {"__metadata__": {"config": other}, "m": mask}, b"\1\0\1")
        state, config = model.read_state(tmp_path / "b.safetensors")
        assert config is None and state["m"].tolist() == [True, False, True]


def test_safetensors_of_any_alignment_and_type(tmp_path):
    state = {"a": torch.randn(3, 5), "b": torch.randn(7).half(), "c": torch.randn(2).bfloat16(), "n": torch.arange(3)}
    names, header, data = {v: k for k, v in model.SAFETENSORS_TYPES.items()}, {}, b"?"  # a byte that no tensor owns
    header["__metadata__"] = dict(config=json.dumps(dict(name="dit-tiny")))
    for k, v in state.items():
        raw = v.view(-1).view(torch.uint8).numpy().tobytes()
        header[k] = dict(dtype=names[v.dtype], shape=list(v.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    found, config = model.read_state(write_safetensors(tmp_path / "w.safetensors", header, data))
    assert same_weights(found, state) and config == dict(name="dit-tiny")


@family
@torch.no_grad()
def test_weights_without_config_load_at_any_depth(name, tmp_path):
    """What the releases publish says neither model nor depth: --model names it, and the depth is in its keys."""
    batch = None
    for depth in ([1, 3], [4, 0], [7, 7]) if name == "mar-tiny" else ([1], [5], [12]):
        net = build_model(name, depth).eval()
        torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "w.pt")
        loaded, config = model.load_model(name, tmp_path / "w.pt")
        assert config == dict(name=name, depth=depth) and loaded.depths() == depth and not loaded.training
        assert same_weights(loaded.state_dict(), net.state_dict())
        with pytest.raises(UserError, match="add --model"):
            model.load_model(ckpt=tmp_path / "w.pt")
        batch = batch or net.objective().make_batch(torch.randn(2, 4, 8, 8), torch.arange(2), RowGenerator((0,), 0, 2, 2))
        assert torch.equal(net.objective().predict(net, batch), net.objective().predict(loaded, batch))


@family
@torch.no_grad()
def test_halves_of_blocks_load_from_their_keys(name, tmp_path):
    net = small(name, PLANS[name])
    model.save_checkpoint(tmp_path / "w.pt", model=net.state_dict(), config=dict(name=name, overrides=FAMILIES[name]))
    loaded, config = model.load_model(ckpt=tmp_path / "w.pt")
    assert [block.halves for block in loaded.layers()] == [halves for blocks in PLANS[name] for halves in blocks]
    assert config["depth"] == [len(blocks) for blocks in PLANS[name]]
    batch = net.objective().make_batch(torch.randn(2, 4, 8, 8), torch.arange(2), RowGenerator((0,), 0, 2, 2))
    assert torch.equal(net.objective().predict(net, batch), net.objective().predict(loaded, batch))
    official = small(name).layers()[0].state_dict().keys()
    for block in loaded.layers():
        assert (block.state_dict().keys() == official) == (len(block.halves) == 2)
        assert block.state_dict().keys() <= official


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    torch.save(small("sit-tiny", 6).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt does not fit .* differ, .*'pos_embed'.*\(1, 16, 32\) in the file"):
        model.load_model("dit-xl", tmp_path / "w.pt")
    with pytest.raises(UserError, match="tensors differ, .* missing in the file"):
        model.load_model("mar-tiny", tmp_path / "w.pt")
    model.save_checkpoint(tmp_path / "c.pt", model=small("sit-tiny").state_dict(), config=dict(name="sit-tiny"))
    with pytest.raises(UserError, match="holds sit-tiny, not dit-tiny"):
        model.load_model("dit-tiny", tmp_path / "c.pt")
    with pytest.raises(UserError, match="no model is called 'dit-huge'; there are dit-xl,"):
        model.load_model("dit-huge", tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"shallow\.pt does not exist; prune\.py writes it"):
        model.load_model(ckpt=tmp_path / "shallow.pt")
    with pytest.raises(UserError, match=r"dit-s\.pt does not exist"):  # no weights are published
        model.load_model("dit-s")


def test_the_table_is_printed(capsys):
    model.run_main(model.list_models)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(model.MODELS)
    words = {line.split()[0]: line for line in lines}
    assert "28 layers" in words["dit-xl"] and "674.8 M" in words["dit-xl"] and "https://" in words["dit-xl"]
    assert words["dit-tiny"].endswith("weights/dit-tiny.pt: bundled, on this disk")
    assert words["dit-b"].endswith("none known")


# ---------------------------------------------------------------------------------------------------------------------
# model.py: files of any bytes.

WEIGHTS = {}  # of a small dit-tiny, once


def good_weights():
    WEIGHTS.update(WEIGHTS or small("dit-tiny", 2).state_dict())
    return dict(WEIGHTS)


def with_config(**config):
    return dict(model=good_weights(), config=dict(name="dit-tiny", overrides=FAMILIES["dit-tiny"]) | config)


def with_overrides(**overrides):
    return with_config(overrides=FAMILIES["dit-tiny"] | overrides)


def with_tensor(key, tensor):
    return dict(model=good_weights() | {key: tensor}, config=with_config()["config"])


def one_tensor(**changes):
    """A .safetensors header."""
    return {"w": dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | changes}


BYTES = {  # name of a file -> its bytes
    "empty.pt": b"", "one.pt": b"\0", "word.pt": b"hello", "text.pt": b"to be or not to be\n" * 999,
    "zip.pt": b"PK\3\4",
    "noise.pt": np.random.default_rng(0).bytes(9999), "pickle.pt": b"\x80\x02}q\0.",
    "old.pt": b"\x80\x02\x8a\nl\xfc\x9cF\xf9",
    "html.pth": b"<!DOCTYPE html><html>404</html>", "png.pt": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "empty.safetensors": b"", "short.safetensors": b"\x08\0\0", "text.safetensors": b"hello, hello, hello",
    "noise.safetensors": np.random.default_rng(1).bytes(9999), "zeros.safetensors": bytes(999),
}
OBJECTS = {  # name -> what torch.save is given
    "number": lambda: 5, "string": lambda: "weights", "tensor": lambda: torch.ones(3), "list": lambda: [torch.ones(3)],
    "none": lambda: None, "nothing": dict, "empty ema": lambda: dict(ema={}, config=dict(name="dit-tiny")),
    "numbers": lambda: dict(model={"w": 1.0}), "nested": lambda: dict(model=dict(model=dict(model={}))),
    "ema is a tensor": lambda: dict(ema=torch.ones(3)), "ema is a list": lambda: dict(ema=[1, 2]),
    "keys are numbers": lambda: dict(model={1: torch.ones(2), 2: torch.ones(2)}),
    "keys are tuples": lambda: {("a", "b"): torch.ones(2)},
    "keys are mixed": lambda: good_weights() | {7: torch.ones(2)},
    "meta": lambda: {k: v.to("meta") for k, v in good_weights().items()},
    "config is a list": lambda: dict(model=good_weights(), config=["dit-tiny"]),
    "config is a word": lambda: dict(model=good_weights(), config="dit-tiny"),
    "config is nobody's": lambda: with_config(name="stable-diffusion"), "name is a number": lambda: with_config(name=5),
    "name is a list": lambda: with_config(name=["dit-tiny"]), "another family": lambda: with_config(name="mar-tiny"),
    "overrides are a word": lambda: with_config(overrides="wide"),
    "overrides are a list": lambda: with_config(overrides=[1]),
    "overrides are none": lambda: with_config(overrides=None),
    "overrides of numbers": lambda: with_config(overrides={5: 5}),
    "unknown override": lambda: with_overrides(size=3), "width is a word": lambda: with_overrides(width="32"),
    "width is huge": lambda: with_overrides(width=10**9), "width is endless": lambda: with_overrides(width=10**30),
    "width is negative": lambda: with_overrides(width=-32), "width is nothing": lambda: with_overrides(width=0),
    "width is a float": lambda: with_overrides(width=32.0), "width is nan": lambda: with_overrides(width=float("nan")),
    "width is none": lambda: with_overrides(width=None),
    "width is a tensor": lambda: with_overrides(width=torch.ones(2)),
    "no heads": lambda: with_overrides(heads=0), "three heads": lambda: with_overrides(heads=3),
    "many heads": lambda: with_overrides(heads=10**9), "half a head": lambda: with_overrides(heads=0.5),
    "depth twice": lambda: with_overrides(depth=2), "no patch": lambda: with_overrides(patch=0),
    "huge images": lambda: with_overrides(input_size=10**6), "all classes": lambda: with_overrides(classes=10**12),
    "other classes": lambda: with_overrides(classes=12),
    "endless denoiser": lambda: with_config(name="mar-tiny", overrides=dict(loss_depth=10**9)),
    "kept is a word": lambda: with_config(kept="0,1"), "scheme is a number": lambda: with_config(scheme=2),
    "granularity is a list": lambda: with_config(granularity=["block"]),
    "parent is a list": lambda: with_config(parent=[1]),
    "shape": lambda: with_tensor("final_layer.linear.bias", torch.zeros(31)),
    "0-dim": lambda: with_tensor("final_layer.linear.bias", torch.zeros(())),
    "whole numbers": lambda: with_tensor("final_layer.linear.bias", torch.zeros(32, dtype=torch.long)),
    "complex": lambda: with_tensor("final_layer.linear.bias", torch.zeros(32, dtype=torch.complex64)),
    "sparse": lambda: with_tensor("final_layer.linear.bias", torch.zeros(32).to_sparse()),
    "an array": lambda: with_tensor("final_layer.linear.bias", "an array"),
    "one more": lambda: with_tensor("blocks.0.extra", torch.zeros(3)),
    "a hole": lambda: with_tensor("blocks.9999999999999999999999.attn.qkv.bias", torch.zeros(96)),
}
HEADERS = {  # name -> arguments of write_safetensors
    "length": ({}, b"", 2**60), "longest": ({}, b"", 2**64 - 1), "list": ([1, 2], b""), "number": (b"5", b""),
    "no json": (b"{'w': 1}", b""), "no weights": ({}, b""), "only metadata": ({"__metadata__": {"config": "{}"}}, b""),
    "metadata": ({"__metadata__": "x"} | one_tensor(), bytes(8)), "not utf-8": (b'{"\xff\xfe": 1}', b""),
    "deep": (b"[" * 10**5, b""), "entry": ({"w": 5}, b""),
    "no type": ({"w": dict(shape=[1], data_offsets=[0, 4])}, bytes(4)),
    "type": (one_tensor(dtype="F12"), bytes(8)), "before": (one_tensor(data_offsets=[-8, 0]), bytes(8)),
    "negative": (one_tensor(data_offsets=[-8, 8]), bytes(8)), "behind": (one_tensor(data_offsets=[4, 12]), bytes(8)),
    "backwards": (one_tensor(data_offsets=[8, 0]), bytes(8)), "far": (one_tensor(data_offsets=[0, 2**70]), bytes(8)),
    "three": (one_tensor(data_offsets=[0, 4, 8]), bytes(8)), "words": (one_tensor(data_offsets=["0", "8"]), bytes(8)),
    "shape": (one_tensor(shape=[3]), bytes(8)), "huge": (one_tensor(shape=[2**40, 2**40]), bytes(8)),
    "negative shape": (one_tensor(shape=[-2]), bytes(8)), "half": (one_tensor(data_offsets=[0, 7]), bytes(8)),
}


def refused(path, *name):
    """The one sentence about a file, which takes neither long nor much memory."""
    import resource  # not on Windows
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    with pytest.raises(UserError) as refusal:
        model.load_model(*name, ckpt=path)
    message = str(refusal.value)
    assert path.name in message and ";" in message and "\n" not in message and len(message) < 600, message
    assert time.time() - start < 10 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20  # KiB
    return message


@pytest.mark.parametrize("file", BYTES)
def test_any_bytes_are_one_sentence(file, tmp_path):
    (tmp_path / file).write_bytes(BYTES[file])
    refused(tmp_path / file)
    refused(tmp_path / file, "dit-tiny")


@pytest.mark.parametrize("case", OBJECTS)
def test_any_objects_are_one_sentence(case, tmp_path):
    torch.save(OBJECTS[case](), tmp_path / "w.pt")
    refused(tmp_path / "w.pt")


@pytest.mark.parametrize("case", HEADERS)
def test_any_header_is_one_sentence(case, tmp_path):
    path = write_safetensors(tmp_path / "w.safetensors", *HEADERS[case])
    assert "holds no weights" in refused(path, "dit-tiny") or case not in ("no weights", "only metadata")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_files_are_one_sentence(suffix, tmp_path):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    (torch.save if suffix == "pt" else save_safetensors)(with_config(), whole)
    model.load_model(ckpt=whole)
    data = whole.read_bytes()
    for size in (1, 7, 8, 9, 30, 100, 999, *range(2000, len(data), len(data) // 9), len(data) - 30, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path)


def save_safetensors(contents, path):
    net = argparse.Namespace(state_dict=lambda: contents["model"])
    sample.export(path, net, contents["config"], torch.float32)


def test_other_kinds_of_files_are_one_sentence(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    shutil.move(tmp_path / "samples.npz", tmp_path / "npz.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]q\0.")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    torch.save(with_config(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    for path in tmp_path.iterdir():
        refused(path)
    refused(tmp_path / "none.pt")
    refused(tmp_path / "none.safetensors")


@pytest.mark.parametrize("config", [
    dict(depth="deep"), dict(depth=10**9), dict(depth=None), dict(step=[1]), dict(kept=[0])])
def test_what_no_one_asks_the_config_for_does_no_harm(config, tmp_path):
    """The depth is read from the keys."""
    torch.save(with_config(**config), tmp_path / "w.pt")
    net, found = model.load_model(ckpt=tmp_path / "w.pt")
    assert found["depth"] == net.depths() == [2] and found["name"] == "dit-tiny"


def test_a_damaged_byte_harms_nobody(tmp_path):
    """Somewhere in a file: weights that differ, or one sentence."""
    rng, path = np.random.default_rng(0), tmp_path / "w.pt"
    torch.save(with_config(), path)
    good, outcomes = bytearray(path.read_bytes()), set()
    for i in range(30):
        data = good.copy()
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data)) if i % 2 else rng.integers(3000) - 1500] = rng.integers(256)
        path.write_bytes(data)
        try:
            model.load_model(ckpt=path)
            outcomes.add("weights")
        except UserError as e:
            assert "w.pt" in str(e) and "\n" not in str(e)
            outcomes.add("sentence")
    assert outcomes == {"weights", "sentence"}


# ---------------------------------------------------------------------------------------------------------------------
# model.py: what is written and fetched.


def test_files_of_one_name_behind_two_urls_stay_apart(monkeypatch):
    asked = []
    monkeypatch.setattr(model, "download", lambda url, path: asked.append(path))
    model.locate("https://a/one/checkpoint-last.pth")
    model.locate("https://a/two/checkpoint-last.pth?rlkey=1")
    assert asked[0] != asked[1] and asked[0].suffix == asked[1].suffix == ".pth"
    assert model.locate("weights/dit-tiny.pt") == Path("weights/dit-tiny.pt") and len(asked) == 2


def test_nothing_half_written_is_left(tmp_path):
    def broken(temporary):
        Path(temporary).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; choose another --out"):
        model.atomic_write(tmp_path / "x.pt", broken)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        model.save_checkpoint(tmp_path / "file" / "x.pt", step=1)
    model.save_checkpoint(tmp_path / "new" / "folder" / "x.pt", step=1)
    assert model.read_torch(tmp_path / "new" / "folder" / "x.pt") == dict(step=1)


@pytest.fixture
def server():
    """Serves 3 MiB; the first two connections break; honours Range unless told not to."""
    data, state = np.random.default_rng(0).bytes(3 * 2**20), dict(requests=[], breaks=2, ranges=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
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


def only_file(path):
    """The bytes of a file that has its folder for itself."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


def test_download_continues_where_it_broke(server, tmp_path):
    url, data, state = server
    model.download(f"{url}/w", tmp_path / "new" / "w.pt")
    assert only_file(tmp_path / "new" / "w.pt") == data
    assert state["requests"] == [None, f"bytes={2**20}-", f"bytes={2 * 2**20}-"]
    model.download("http://127.0.0.1:9/never", tmp_path / "new" / "w.pt")  # there already: no connection


@pytest.mark.parametrize("stale", [None, 1, 2**20, 4 * 2**20])
def test_download_from_a_server_without_ranges(stale, server, tmp_path):
    """It starts over, also where another file's rest is shorter or longer."""
    url, data, state = server
    state.update(ranges=False, breaks=1)
    if stale:
        (tmp_path / f"w.pt.{socket.gethostname()}.part").write_bytes(b"?" * stale)
    model.download(f"{url}/w", tmp_path / "w.pt")
    assert only_file(tmp_path / "w.pt") == data


@pytest.mark.parametrize("stale", [0, 100])
def test_a_part_that_is_as_long_as_the_file_is_fetched_anew(stale, server, tmp_path):
    url, data, state = server
    state["breaks"] = 0
    (tmp_path / f"w.pt.{socket.gethostname()}.part").write_bytes(data + bytes(stale))
    model.download(f"{url}/w", tmp_path / "w.pt")
    assert only_file(tmp_path / "w.pt") == data and len(state["requests"]) == 2


def test_two_programs_may_want_the_same_file(server, tmp_path):
    url, data, state = server
    both = [threading.Thread(target=model.download, args=(f"{url}/w", tmp_path / "w.pt")) for _ in range(2)]
    [t.start() for t in both]
    [t.join() for t in both]
    assert only_file(tmp_path / "w.pt") == data


def test_download_refuses_what_is_wrong(server, tmp_path):
    url, data, state = server
    wrong = ((f"{url}/missing", "404"), ("http://127.0.0.1:9/w", "refused"), ("http://[half/w", "IPv6"))
    for address, words in wrong:
        with pytest.raises(UserError, match=f"cannot download .*{words}.* put it at {tmp_path}/x.pt"):
            model.download(address, tmp_path / "x.pt", tries=1)
    with pytest.raises(UserError, match="broke at 1048576 of 3145728 bytes"):
        model.download(f"{url}/w", tmp_path / "x.pt", tries=1)
    assert not (tmp_path / "x.pt").exists()


def test_ranks_meet_whatever_is_on_their_disks(server, tmp_path):
    """Two machines, of which one has the file: none waits for ever, and a mistake of rank 0 is everybody's."""
    url, data, state = server
    state["breaks"] = 0
    (tmp_path / "machine1" / "weights").mkdir(parents=True)
    (tmp_path / "machine1" / "weights" / "w.pt").write_bytes(b"here")
    (tmp_path / "run.py").write_text(f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import model

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # at once, also where torchrun does not buffer

def main():
    assert model.start_ranks("cpu").type == "cpu" and model.world_size() == 2
    model.ROOT, os.environ["LOCAL_RANK"] = Path({str(tmp_path)!r}) / f"machine{{model.rank()}}", "0"
    say("size", model.fetch("w.pt", "{url}/w").stat().st_size)
    say("told", model.on_rank_0(lambda: f"by {{model.rank()}}"))
    try:
        model.on_rank_0(lambda: model.load_model("nobody"))
    except model.UserError as e:
        say("all", e)

model.run_main(main)
""")
    done = launch(tmp_path / "run.py", ranks=2)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 6 and lines[0] == lines[1] and lines[0].startswith("all no model is called 'nobody'")
    assert lines[2:] == [f"size {len(data)}", "size 4", "told by 0", "told by 0"]


# ---------------------------------------------------------------------------------------------------------------------
# model.py: how a run ends, flags, devices.


def test_a_mistake_is_one_sentence_and_exit_code_2(capsys):
    def mistaken():
        raise UserError("this is\nwrong; do that")

    with pytest.raises(SystemExit) as end:
        model.run_main(mistaken)
    captured = capsys.readouterr()
    assert (end.value.code, captured.err, captured.out) == (2, "error: this is wrong; do that\n", "")

    def stopped():
        raise model.Stopped("stopped at step 3; continue with --resume auto")

    model.run_main(stopped)  # returns: exit code 0
    assert capsys.readouterr().out == "stopped at step 3; continue with --resume auto\n"
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        model.run_main(lambda: 1 / 0)


def test_a_rank_that_fails_does_not_wait_for_the_others(tmp_path):
    (tmp_path / "run.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import model

def main():
    model.start_ranks("cpu")
    if model.rank() == 1:
        raise model.UserError("this is wrong; do that")
    model.barrier()

model.run_main(main)
""")
    start, done = time.time(), launch(tmp_path / "run.py", ranks=2)
    assert done.returncode == 1 and time.time() - start < 100  # torchrun's own code
    assert done.stderr.count("error: this is wrong; do that\n") == 1


@pytest.mark.parametrize("flags, words", [
    (["--steps", "x"], "argument --steps: 'x' is not a whole number of at least 1; see"),
    (["--steps", "1", "--no"], "unrecognized"),
    (["--steps"], "expected one argument"), (["--lr", "nan"], "'nan' is not a number above 0"), ([], "required")])
def test_mistaken_flags_are_one_sentence(flags, words):
    parser = model.Parser("What it does.\n\n    as it is written")
    parser.add_argument("--steps", type=model.whole(1), required=True)
    parser.add_argument("--lr", type=model.real(0, open_low=True))
    with pytest.raises(UserError) as refusal:
        parser.parse_args(flags)
    assert words in str(refusal.value) and "--help" in str(refusal.value) and "\n" not in str(refusal.value)
    assert "\n\n    as it is written" in parser.format_help()
    assert vars(parser.parse_args(["--steps", "3", "--lr", "1e-3"])) == dict(steps=3, lr=1e-3)


@pytest.mark.parametrize("kind, good, bad", [
    (model.whole(), ["0", "7", "9" * 50], ["-1", "1.5", "1e3", "x", "", "nan", "inf", "0x10", "9" * 9999]),
    (model.whole(1, 3), ["1", "3"], ["0", "4", "-1"]),
    (model.real(0), ["0", "1e-9", "3", "1e300", "-0"], ["-1", "-1e-9", "nan", "inf", "-inf", "1e400", "x", ""]),
    (model.real(0, open_low=True), ["1e-300"], ["0", "-0", "1e-400", "nan", "inf"]),
    (model.real(0, 1), ["0", "1", "0.5"], ["1.0001", "-0.1", "2", "nan"])])
def test_flags_that_are_numbers(kind, good, bad):
    for text in good:
        assert float(kind(text)) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a .*number"):
            kind(text)


@pytest.mark.parametrize("device", ["tpu", "meta", "mps", "cuda:x", "cuda:-1", "cuda:99", "cpu:3", "", "cuda 0"])
def test_devices_that_are_not_here(device):
    with pytest.raises(UserError, match=f"--device {device} is not on this machine; use auto, cpu, cuda or cuda:N"):
        model.start_ranks(device)
    assert model.start_ranks("cpu") == torch.device("cpu")
    assert model.start_ranks("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_progress_is_a_line_of_rank_0(capsys):
    progress = model.Progress("draw", 100, "images", 40)
    progress.start -= 15
    progress.update(50)  # too early for a log file
    assert capsys.readouterr().err == ""
    progress.last -= 15
    progress.update(70, "loss 1.0")
    assert capsys.readouterr().err == "draw 70/100 images  2.0 images/s  ETA 0:00:15  loss 1.0\n"
    progress.update(100)
    assert "100/100" in capsys.readouterr().err
    progress = model.Progress("wait", 10**9, "steps")
    progress.last -= 15
    progress.update(0)  # no rate yet
    assert "0/1000000000 steps  0.0 steps/s" in capsys.readouterr().err


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


@pytest.fixture
def extract(monkeypatch):
    """The command in this process, with shards of 20 digits; -> exit code."""
    monkeypatch.setitem(VAES["digits"], "shard", 20)
    monkeypatch.setitem(VAES["digits"], "batch_size", 8)

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["extract_latents.py", "--device", "cpu", *map(str, argv)])
        try:
            model.run_main(extract_latents.main)
        except SystemExit as e:
            return e.code
        return 0

    return command


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


def test_vae_upsampling_is_a_convolution_of_doubled_pixels():
    """Values and gradients; odd sizes."""
    level = extract_latents.Upsample(6)
    x = torch.randn(2, 6, 5, 3, requires_grad=True)
    want = level.conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    got = level(x)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    out = torch.randn_like(want)
    parameters = [x, level.conv.weight, level.conv.bias]
    for a, b in zip(torch.autograd.grad(got, parameters, out), torch.autograd.grad(want, parameters, out)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_vae_residual_block_has_the_gradient_of_its_formula():
    """SiLU and the sum work in place."""
    block, x = extract_latents.ResnetBlock(4, 8, 2), torch.randn(2, 4, 5, 5, requires_grad=True)
    silu = torch.nn.functional.silu
    want = block.conv2(silu(block.norm2(block.conv1(silu(block.norm1(x)))))) + block.conv_shortcut(x)
    got, out, weights = block(x), torch.randn_like(want), [x, *block.parameters()]
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, weights, out), torch.autograd.grad(want, weights, out)):
        torch.testing.assert_close(a, b)


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
    attention = "encoder.mid_block.attentions.0"
    new = rename_vae_keys({f"{attention}.query.weight": torch.eye(3)[..., None, None],
                           f"{attention}.proj_attn.bias": torch.ones(3)})
    assert torch.equal(new[f"{attention}.to_q.weight"], torch.eye(3))
    assert list(new) == [f"{attention}.to_q.weight", f"{attention}.to_out.0.bias"]


def test_vae_load_from_a_file(tmp_path, monkeypatch):
    tiny = dict(SD, channels=[8, 8], groups=4, weights=None)
    monkeypatch.setitem(VAES, "sd-ema", tiny)
    vae = AutoencoderKL(tiny)
    torch.save(vae.state_dict(), tmp_path / "vae.bin")
    loaded = load_vae("sd-ema", tmp_path / "vae.bin")
    assert loaded.scale == 0.18215 and loaded.factor == 2 and same_weights(loaded.state_dict(), vae.state_dict())
    x = torch.randn(1, 3, 8, 8)
    bf16 = load_vae("sd-ema", tmp_path / "vae.bin", dtype=torch.bfloat16)
    assert bf16.encode(x)[0].dtype == torch.float32
    assert 0 < (bf16.encode(x)[0] - loaded.encode(x)[0]).abs().max() < 0.1
    (tmp_path / "junk.pt").write_bytes(b"hello")
    torch.save({"decoder.up.x": torch.ones(1)}, tmp_path / "odd.pt")
    digits = ROOT / "weights/vae-digits.pt"
    for name, ckpt, words in (("kl16", "vae.bin", "does not fit"), ("sd-ema", digits, "does not hold the VAE sd-ema"),
                              ("digits", "vae.bin", "does not hold the VAE digits"), ("sd-ema", "none.pt", "not exist"),
                              ("sd-ema", "junk.pt", "cannot be read"), ("sd-ema", "odd.pt", "odd.pt")):
        with pytest.raises(UserError, match=words):
            load_vae(name, tmp_path / ckpt)


def test_vae_bundled_reconstructs_digits():
    vae = load_vae()
    images, _, _ = read_npz(DIGITS)
    x = torch.from_numpy(np.pad(images[9000:], ((0, 0), (2, 2), (2, 2)))).float()[:, None] / 127.5 - 1
    assert script("train_vae").psnr(vae, x)[0] >= 28
    mean, std = vae.encode(x[:500])
    assert 0.9 < (mean + std * torch.randn_like(std)).std() * vae.scale < 1.1


def test_vae_training_learns_and_writes(tmp_path, capsys, digits60):
    script("train_vae").train_vae(digits60, tmp_path / "vae.pt", "cpu", steps=25, batch=8)
    out = capsys.readouterr().out
    scale = float(out.split("so scale ")[1].split(";")[0])
    assert load_vae(ckpt=tmp_path / "vae.pt").scale == scale
    assert float(out.split("posterior means: ")[1].split(" dB")[0]) > 8  # an all-grey answer gets 6
    assert all(v.dtype == torch.float16 for v in weights_of(tmp_path / "vae.pt").values())


def test_vae_decode_images():
    vae = load_vae()
    z = torch.randn(5, 4, 8, 8)
    images = decode_images(vae, z)
    want = torch.clamp(127.5 * vae.decode(z / vae.scale) + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    assert all(np.array_equal(images[..., c], want[..., 0]) for c in range(3))
    assert images.std() > 10
    assert decode_images(vae, z[:0]).shape == (0, 32, 32, 3)  # a rank without a share


# Images


def test_extract_center_crop_golden():
    for width, height, seed in (500, 375, 400), (300, 900, 401), (256, 256, 402):
        y, x = np.mgrid[:height, :width]
        noise = np.random.RandomState(seed).randint(0, 64, size=(height, width, 3))
        waves = [(x * 3 + y * (5 + 2 * c) + 17 * c + (x * y) // (11 + c)) % 256 for c in range(3)]
        image = Image.fromarray(np.clip((np.stack(waves, axis=-1) * 3 + noise * 4) // 4, 0, 255).astype(np.uint8))
        assert np.array_equal(center_crop(image, 64), stored(f"center_crop/out.{width}x{height}_to_64"))


def test_extract_digits_are_padded():
    digit = read_npz(DIGITS)[0][0]
    pixels = to_pixels(Image.fromarray(digit), 32, 1)
    assert pixels.shape == (1, 32, 32) and np.array_equal(pixels[0, 2:-2, 2:-2], digit)
    assert not pixels[0, :2].any() and not pixels[0, :, -2:].any()


def test_extract_images_of_other_modes_become_rgb_or_grey():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    for mode in "CMYK", "RGBA", "L", "P":
        converted = image.convert(mode)
        assert np.array_equal(to_pixels(converted, 8, 3), center_crop(converted.convert("RGB"), 8).transpose(2, 0, 1))
        assert to_pixels(converted, 8, 1).shape == (1, 8, 8)
    with pytest.raises(ValueError):
        to_pixels(Image.new("RGB", (1, 60000)), 64, 3)


def test_extract_folder_order_and_unreadable_images(tmp_path, extract, capsys):
    images, _, _ = read_npz(DIGITS)
    data = tmp_path / "data"
    for name in "b", "a10", "a9":
        (data / name / "sub").mkdir(parents=True)
    order = ("a10/1.png", "a10/2.PNG", "a10/sub/0.png", "a9/x.png", "b/y.png", "b/z.png")  # ImageFolder's
    for k, path in enumerate(order):
        Image.fromarray(images[k]).save(data / path)
    (data / "b" / "notes.txt").write_text("not an image")
    (data / "b" / "y.png").write_bytes((data / "b" / "y.png").read_bytes()[:120])  # truncated
    (data / "a10" / "2.PNG").write_text("a page of HTML")
    out = tmp_path / "out"
    assert extract("--data", data, "--out", out, "--workers", 2) == 0  # another try would not help
    printed = capsys.readouterr()
    assert "latents of 4 images of 3 classes" in printed.out
    assert "2 images could not be read" in printed.err and f"{out}/meta.json" in printed.err
    latents = Latents(out)
    assert latents.meta["classes"] == ["a10", "a9", "b"] and latents.classes == 3
    for problem, name in zip(latents.meta["skipped"], ("2.PNG", "y.png"), strict=True):
        assert f"{name}: " in problem and problem in printed.err
    assert len(latents) == 4 and latents.labels.tolist() == [0, 0, 1, 2]
    assert np.load(out / "labels.npy").tolist() == [0, -1, 0, 1, -1, 2]
    vae = load_vae()
    for row, k in enumerate((0, 2, 3, 5)):  # the rows that are left are those of the readable images
        x, y = latents.batch(np.array([row]), RowGenerator((0,), 0, 1, 1))
        pixels = torch.from_numpy(np.pad(images[k], 2))[None, None].float() / 127.5 - 1
        mean, std = (m.half().float() for m in vae.encode(pixels))
        eps = RowGenerator((0,), 0, 1, 1).normal(4, 8, 8)
        torch.testing.assert_close(x, (mean + std * eps) * vae.scale, atol=5e-3, rtol=0)
    assert extract("--data", data, "--out", out) == 0  # says it again
    assert "2 images could not be read" in capsys.readouterr().err
    assert extract("--data", data, "--out", tmp_path / "strict", "--strict") == 2
    assert "2.PNG" in capsys.readouterr().err and not (tmp_path / "strict" / "moments.npy").exists()
    (data / "empty").mkdir()
    assert extract("--data", data, "--out", tmp_path / "out2") == 2 and "'empty'" in capsys.readouterr().err
    (data / "empty").rmdir()
    for k in range(12):  # a disk that went away, rather than a few bad files
        (data / "a10" / f"bad{k}.png").write_text("")
    assert extract("--data", data, "--out", tmp_path / "gone") == 2
    assert "14 of 18 images" in capsys.readouterr().err and not (tmp_path / "gone" / "shards").exists()


# Writing


def test_extract_labels_and_mirror_images(tmp_path, monkeypatch, extract, digits60, capsys):
    out, glob = tmp_path / "out", Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: sorted(glob(path, pattern), reverse=True))  # any order
    assert extract("--data", digits60, "--out", out, "--flip", "--batch-size", 7) == 0
    assert capsys.readouterr().out.startswith("digits in float32 on cpu")
    images, labels, _ = read_npz(digits60)
    moments, vae = np.load(out / "moments.npy"), load_vae()
    assert moments.shape == (60, 2, 8, 8, 8) and moments.dtype == np.float16
    assert np.array_equal(np.load(out / "labels.npy"), labels)
    pixels = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))).float()[:, None] / 127.5 - 1
    for flip, view in enumerate((pixels, pixels.flip(-1))):
        want = torch.cat(vae.encode(view), dim=1).numpy()
        assert np.abs(moments[:, flip] - want).max() < 5e-3
    assert sorted(p.name for p in out.iterdir()) == ["labels.npy", "meta.json", "moments.npy"]
    meta = json.loads((out / "meta.json").read_text())
    assert meta["complete"] and meta["scale"] == vae.scale and meta["flips"] == 2 and meta["skipped"] == []
    assert meta["classes"] == list("0123456789")


def test_extract_killed_then_two_ranks_same_bytes(tmp_path):
    images, labels, _ = read_npz(DIGITS)
    np.savez(tmp_path / "d.npz", arr_0=images[:1600], arr_1=labels[:1600])
    common = [ROOT / "extract_latents.py", "--data", tmp_path / "d.npz", "--batch-size", 50, "--device", "cpu", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert launch(*common, whole).returncode == 0
    killed = subprocess.Popen([sys.executable, *map(str, common), str(out)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not (out / "shards/000001.npz").exists():
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    made = {shard: shard.stat().st_mtime_ns for shard in (out / "shards").glob("*.npz")}
    assert 2 <= len(made) < 7 and not (out / "moments.npy").exists()
    with pytest.raises(UserError, match="not complete"):
        Latents(out)
    (tmp_path / "keep_shards.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import extract_latents as e, model\n"
        "e.shutil.rmtree = lambda *args, **kwargs: None; model.run_main(e.main)")
    two = launch(tmp_path / "keep_shards.py", *common[1:], out, ranks=2)
    assert two.returncode == 0, two.stderr
    assert same_files(whole, out)
    assert len(list((out / "shards").glob("*.npz"))) == 7
    assert all(shard.stat().st_mtime_ns == time for shard, time in made.items())  # was not made again


def test_extract_dies_between_any_two_steps(tmp_path, monkeypatch, extract, digits60):
    """Ended by an exception at the k-th step on disk, for every k, then started again."""
    assert extract("--data", digits60, "--out", tmp_path / "whole") == 0
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
            m.setattr(os, "replace", dying(os.replace))
            m.setattr(os, "fsync", dying(os.fsync))
            m.setattr(np, "savez", dying(np.savez))
            m.setattr(shutil, "rmtree", dying(shutil.rmtree))
            m.setattr(Path, "unlink", dying(Path.unlink))  # of temporary files, which a kill leaves
            try:
                assert extract("--data", digits60, "--out", out) == 0
                break  # it did not reach step k
            except KeyboardInterrupt:
                pass
        if not (out / "meta.json").exists() or not json.loads((out / "meta.json").read_text())["complete"]:
            with pytest.raises(UserError):
                Latents(out)
        assert extract("--data", digits60, "--out", out) == 0
        assert same_files(tmp_path / "whole", out)
    assert 15 < k < 99


def test_extract_again(tmp_path, extract, capsys, digits60):
    out = tmp_path / "out"
    assert extract("--data", digits60, "--out", out) == 0
    before = (out / "moments.npy").stat().st_mtime_ns
    assert extract("--data", digits60, "--out", out) == 0
    assert (out / "moments.npy").stat().st_mtime_ns == before and "nothing to encode" in capsys.readouterr().out
    images, labels, _ = read_npz(digits60)
    np.savez(tmp_path / "others.npz", arr_0=images, arr_1=labels[::-1])  # the same images with other labels
    script("train_vae").train_vae(digits60, tmp_path / "vae.pt", "cpu", steps=1, batch=8)
    for word, *flags in (["flips", "--flip"], ["batch_size", "--batch-size", 9], ["image_size", "--image-size", 28],
                         ["dtype", "--dtype", "bfloat16"], ["weights", "--ckpt", tmp_path / "vae.pt"]):
        capsys.readouterr()
        assert extract("--data", digits60, "--out", out, *flags) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if " steps " not in line]
        assert len(error) == 1 and f"another {word}," in error[0] and "--resume never" in error[0]
    assert extract("--data", tmp_path / "others.npz", "--out", out) == 2 and "another data," in capsys.readouterr().err
    (out / "shards").mkdir()
    np.savez(out / "shards/000001.npz", moments=1)  # of a run that was killed
    assert extract("--data", tmp_path / "others.npz", "--out", out, "--resume", "never") == 0
    assert Latents(out).labels.tolist() == labels[::-1].tolist()


def test_extract_mistakes(tmp_path, monkeypatch, extract, capsys, digits60):
    out, content = tmp_path / "out", digits60.read_bytes()

    def wrong(*argv):
        capsys.readouterr()
        assert extract("--out", out, *argv) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    assert "does not exist" in wrong("--data", tmp_path / "none")
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    assert "damaged" in wrong("--data", tmp_path / "cut.npz")
    (tmp_path / "bad.npz").write_bytes(content[:3000] + b"\0" * 100 + content[3100:])
    assert "damaged" in wrong("--data", tmp_path / "bad.npz")
    images, labels = np.zeros((3, 8, 8), np.uint8), np.zeros(3, int)
    for arrays, words in (
            (dict(arr_0=images), "arr_1"), (dict(arr_0=images / 1, arr_1=labels), "float64"),
            (dict(arr_0=images, arr_1=labels[:2]), "(2,)"), (dict(arr_0=images, arr_1=labels - 1), "from 0")):
        np.savez(tmp_path / "x.npz", **arrays)
        assert words in wrong("--data", tmp_path / "x.npz")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in wrong("--data", tmp_path / "empty")
    assert "multiple of 4" in wrong("--image-size", 30)
    assert "--batch-size" in wrong("--batch-size", 0)
    assert "--dtype" in wrong("--dtype", "float16")
    torch.save(dict(ema=build_model("dit-tiny").state_dict()), tmp_path / "dit.pt")
    assert "does not fit" in wrong("--vae", "kl16", "--ckpt", tmp_path / "dit.pt")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "cannot write" in wrong("--data", digits60, "--out", tmp_path / "file" / "sub")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 60 * 1024 - 1))
    assert "no room" in wrong("--data", digits60)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 60 * 1024))
    assert extract("--data", digits60, "--out", out) == 0


def test_extract_disk_full_midway(tmp_path, monkeypatch, extract, capsys, digits60):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert extract("--data", digits60, "--out", whole) == 0
    for step in "savez", "save":  # while shards are written, while they are joined
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")
        with monkeypatch.context() as m:
            m.setattr(np, step, full)
            assert extract("--data", digits60, "--out", out) == 2 and "No space left" in capsys.readouterr().err
    assert extract("--data", digits60, "--out", out) == 0
    assert same_files(whole, out)


# Reading


def write_latents(directory, n=12, flips=2, labels=None, **changes):
    """Random latents (4, 2, 2) of 3 classes, in the format of extract_latents.py."""
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
        assert len(latents) == 12 and latents.shape == (4, 2, 2) and latents.classes == 3
        for rows in np.array([7, 2, 11, 0, 7]), np.arange(600) % 12:
            n = len(rows)
            x, y = latents.batch(rows, RowGenerator((3, 1), 0, n, n))
            noise = RowGenerator((3, 1), 0, n, n)
            eps = noise.normal(4, 2, 2).numpy()
            mirrored = (noise.shared.random(n) < 0.5).astype(int) * (flips - 1)
            want = (moments[rows, mirrored, :4] + moments[rows, mirrored, 4:] * eps) * np.float32(0.5)
            assert np.array_equal(x.numpy(), want)  # bit by bit
            assert x.dtype == torch.float32 and y.tolist() == (rows % 3).tolist() and y.dtype == torch.int64
        assert flips == 1 or 200 < mirrored.sum() < 400
        parts = [latents.batch(rows[a:b], RowGenerator((3, 1), a, b, 600))[0] for a, b in ((0, 200), (200, 600))]
        assert torch.equal(torch.cat(parts), x)  # two ranks


def test_extract_reads_every_place_of_large_rows(tmp_path, monkeypatch):
    """Rows that begin and end within pages, the first and the last among them."""
    directory = tmp_path / "latents"
    write_latents(directory, shape=[4, 7, 9])
    moments = np.arange(12 * 2 * 8 * 7 * 9, dtype=np.float16).reshape(12, 2, 8, 7, 9)
    np.save(directory / "moments.npy", moments)
    places, latents = np.random.default_rng(0).permutation(24), Latents(directory)
    for tick in 1, 0, 1:  # seconds a read: from a disk, from memory, from a disk
        monkeypatch.setattr(time, "perf_counter", itertools.count(0, tick).__next__)
        assert np.array_equal(latents.read(places).numpy(), moments.reshape(24, 8, 7, 9)[places])
        assert latents.from_disk == bool(tick)


def test_extract_readers_refuse(tmp_path):
    directory = tmp_path / "latents"

    def refused():
        with pytest.raises(UserError) as error:
            Latents(directory)
        assert "\n" not in str(error.value) and str(directory) in str(error.value)
        return str(error.value)

    assert "extract_latents.py writes it" in refused()
    write_latents(directory, complete=False)
    assert "not complete" in refused()
    for name, content in (("meta.json", b"{"), ("meta.json", b"{}"), ("meta.json", b"[]"), ("moments.npy", b""),
                          ("moments.npy", None), ("labels.npy", None), ("labels.npy", b"\x93NUMPY")):
        write_latents(directory)
        path = directory / name
        path.write_bytes(path.read_bytes()[:-10] if content is None else content)
        assert "damaged" in refused() and name in refused()
    write_latents(directory)
    (directory / "labels.npy").unlink()
    assert "labels.npy" in refused()


def test_extract_epoch_order():
    order = epoch_order(100, 1, 2)
    assert np.array_equal(order, np.random.default_rng(make_seed(1, 2)).permutation(100))
    assert not np.array_equal(epoch_order(100, 1, 0), range(100))
    assert not np.array_equal(order, epoch_order(100, 1, 3)) and not np.array_equal(order, epoch_order(100, 2, 2))


def test_batches_are_the_global_batch_for_any_ranks_and_accumulation(tmp_path, monkeypatch):
    write_latents(tmp_path / "latents", n=50)
    latents = Latents(tmp_path / "latents")
    for step in 0, 1, 2, 3, 7, 40:  # 2 steps an epoch
        noise = RowGenerator((5, step), 0, 20, 20)
        rows = np.random.default_rng(make_seed(5, step // 2)).permutation(50)[step % 2 * 20 :][:20]
        want, labels = latents.batch(rows, noise)
        for ranks, accumulate in (1, 1), (2, 1), (3, 2), (1, 7):
            parts = []
            for r in range(ranks):
                monkeypatch.setattr(extract_latents, "rank", lambda: r)
                monkeypatch.setattr(extract_latents, "world_size", lambda: ranks)
                batches = Batches(latents, 20, accumulate, 5, "cpu")
                parts += list(batches(step))
                assert len(parts) == (r + 1) * accumulate and batches.steps_per_epoch == 2
                batches.threads.shutdown()  # before another rank's turn
            x, y, noises = zip(*parts)
            assert torch.equal(torch.cat(x), want) and torch.equal(torch.cat(y), labels)
            assert max(map(len, x)) - min(map(len, x)) <= 1
            again = RowGenerator((5, step), 0, 20, 20)
            again.normal(4, 2, 2)  # what the latents took; then the rest of the step
            assert torch.equal(torch.cat([n.uniform(2) for n in noises]), again.uniform(2))
    for size in 5, 51:
        with pytest.raises(UserError, match=f"--batch-size {size}"):
            Batches(latents, size, 7, 5, "cpu")


def test_batches_prefetching_changes_nothing(tmp_path, monkeypatch):
    """Steps in order, a resume, a step again, a jump back, a loop that ends early: as if each were the first."""
    write_latents(tmp_path / "latents", n=50)
    latents = Latents(tmp_path / "latents")

    def fresh(step, accumulate=3):
        batches = Batches(latents, 20, accumulate, 5, "cpu")
        return [(x.clone(), y, noise.normal(3)) for x, y, noise in batches(step)]

    wants = {step: fresh(step) for step in range(8)}
    read, seen = Latents.read, []

    def slow(self, places):
        seen.append(threading.get_ident())
        time.sleep(0.002 * (len(seen) % 3))  # parts are finished in another order
        return read(self, places)

    monkeypatch.setattr(Latents, "read", slow)
    batches = Batches(latents, 20, 3, 5, "cpu")
    for step in (0, 1, 2, 3, 4, 4, 7, 0, 1, 6):
        for k, (x, y, noise) in enumerate(batches(step)):
            want = wants[step][k]
            assert torch.equal(x, want[0]) and torch.equal(y, want[1]) and torch.equal(noise.normal(3), want[2])
            if step == 3 and k == 1:
                break
    assert threading.get_ident() not in seen  # the loop waits for others to read
    batches.threads.shutdown()
    del seen[:]
    batches = Batches(latents, 20, 3, 5, "cpu")
    next(batches(2))
    batches.threads.shutdown()
    assert len(seen) == 1 + Batches.AHEAD


def test_batches_leave_no_open_file_and_no_thread(tmp_path):
    write_latents(tmp_path / "latents")
    gc.collect()
    fds, threads = Path("/proc/self/fd"), threading.active_count()
    files = len(list(fds.iterdir())) if fds.exists() else 0
    for _ in range(3):
        batches = Batches(Latents(tmp_path / "latents"), 6, 2, 0, "cpu")
        assert len(list(batches(1))) == 2 and threading.active_count() > threads
        del batches
        gc.collect()
    for _ in range(100):
        if threading.active_count() <= threads:
            break
        time.sleep(0.02)
    gc.collect()
    assert threading.active_count() <= threads and (not fds.exists() or len(list(fds.iterdir())) <= files)


def test_batches_say_what_failed_in_a_thread(tmp_path, monkeypatch):
    write_latents(tmp_path / "latents")
    batches = Batches(Latents(tmp_path / "latents"), 6, 1, 0, "cpu")

    def broken(self, places):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Latents, "read", broken)
    with pytest.raises(OSError, match="Input/output"):
        next(batches(0))


def test_batches_latents_must_fit_the_network(tmp_path):
    write_latents(tmp_path / "latents")
    latents, net = Latents(tmp_path / "latents"), argparse.Namespace(channels=4, input_size=2, classes=3)
    extract_latents.check_fit(net, latents, "folder")
    for change in dict(channels=16), dict(input_size=4), dict(classes=2):
        with pytest.raises(UserError, match="folder"):
            extract_latents.check_fit(argparse.Namespace(**vars(net) | change), latents, "folder")


# ---------------------------------------------------------------------------------------------------------------------
# prune.py: groups, draw, masked layer, dW.


def test_schemes():
    assert prune.parse_scheme("1:2", [12]) == [(1, 2)] * 6
    assert prune.parse_scheme("2:4", [16, 16]) == [(2, 4)] * 8
    mixed = prune.parse_scheme("3:4,3:4,2:4,3:4,2:4,3:4,3:4", [28])
    assert sum(n for n, _ in mixed) == 19 and sum(m for _, m in mixed) == 28
    assert len(prune.candidate_masks(7, 14)) == 3432
    assert prune.candidate_masks(2, 3).tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("scheme, depths, words", [
    ("3:5", [12], "do not divide"), ("1:4", [6, 6], "do not divide"), ("0:2", [12], "not N:M"),
    ("3:2", [12], "not N:M"), ("half", [12], "not N:M"), ("1:2:3", [12], "not N:M"), ("1:2,", [4], "not N:M"),
    ("1:2,1:2", [12], "fill 12"),
    ("1:4,1:4,1:4", [6, 6], "fill 6 + 6")])
def test_bad_schemes_are_refused(scheme, depths, words):
    with pytest.raises(UserError, match=words.replace("+", r"\+")):
        prune.parse_scheme(scheme, depths)


def test_a_group_with_too_many_candidates_is_refused_at_once():
    with pytest.raises(UserError, match="40,116,600 candidate masks"):
        prune.LayerMasks([(14, 28)], "cpu")


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
    norms = [0.0 if b.attn.qkv.weight.grad is None else b.attn.qkv.weight.grad.norm().item() for b in blocks]
    np.testing.assert_allclose(norms, g["out.qkv_grad_norms"], rtol=2e-5, atol=1e-7)


UNLIKE = [(1, 2), (2, 4), (3, 4), (2, 2), (1, 3)]


def test_groups_of_unlike_size_are_drawn_at_once():
    """The padded draw is each group's own draw: the same masks, the same gradients, and only real candidates."""
    masks, B, tau = prune.LayerMasks(UNLIKE, "cpu"), 64, 1.5
    with torch.no_grad():
        masks.logits += 0.01 * torch.randn(masks.logits.shape, generator=torch.Generator().manual_seed(0))
    layers = [prune.DenseMaskedLayer(None) for _ in range(sum(m for _, m in UNLIKE))]
    masks.draw(layers, RowGenerator((7,), 0, B, B), tau)
    drawn = torch.stack([layer.mask for layer in layers], 1)  # (B, L)
    weight = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(1))
    (drawn * weight).sum().backward()
    gumbel, first = RowGenerator((7,), 0, B, B).gumbel(6, lists=(len(UNLIKE),)), 0
    for g, (n, m) in enumerate(UNLIKE):
        candidates = prune.candidate_masks(n, m)
        K = len(candidates)
        logits = masks.logits[g, :K].detach().clone().requires_grad_()
        alone, choice = prune.draw_masks(logits, candidates, gumbel[g, :, :K], tau)
        (alone * weight[:, first : first + m]).sum().backward()
        assert torch.equal(drawn[:, first : first + m].round(), candidates[choice])  # n of m for each sample
        torch.testing.assert_close(drawn[:, first : first + m], alone)
        torch.testing.assert_close(masks.logits.grad[g, :K], logits.grad, rtol=1e-4, atol=1e-5)
        assert (masks.logits.grad[g, K:] == 0).all() and (logits.grad.abs().max() > 0.01 or K == 1)
        first += m
    for i, layer in enumerate(layers):
        on = drawn[:, i] > 0.5
        assert torch.equal(on[layer.order], torch.arange(B) < layer.count)  # first those that use the layer
        assert torch.equal(layer.order[layer.inverse], torch.arange(B))


def test_the_decision_is_each_groups_likeliest_candidate():
    """...by the averaged logits, of which 100 times the difference is the log odds."""
    masks = prune.LayerMasks(UNLIKE, "cpu")
    with torch.no_grad():
        masks.average += 0.02 * torch.randn(masks.average.shape, generator=torch.Generator().manual_seed(3))
        masks.logits.normal_()  # the decision is not theirs
    kept, confidence = masks.decide()
    want, sure, first = [], [], 0
    for average, (n, m) in zip(masks.average.numpy(), UNLIKE):
        candidates = list(itertools.combinations(range(m), n))
        odds = np.exp(100 * average[: len(candidates)].astype(float))
        want += [first + i for i in candidates[odds.argmax()]]
        sure += [sum(p for p, c in zip(odds / odds.sum(), candidates) if i in c) for i in range(m)]
        first += m
    assert kept == want
    np.testing.assert_allclose(confidence, sure, rtol=1e-4)


@family
@pytest.mark.parametrize("delta_w", ["lora", "full"])
def test_skipping_the_backward_pass_changes_no_gradient(name, delta_w):
    """MaskedLayer against the dense formula: loss, and the gradients of logits and dW; also where all or no samples
    use a layer."""
    results = []
    x, y = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    for kind in (prune.MaskedLayer, prune.DenseMaskedLayer):
        net = small(name)
        torch.manual_seed(0)
        delta = prune.add_delta_w(net, delta_w, 4)
        for p in delta:
            torch.nn.init.normal_(p, std=0.05) if delta_w == "lora" else None
        masks = prune.LayerMasks([(1, 2), (1, 2)], "cpu")
        with torch.no_grad():
            masks.logits[0, 1] += 0.5  # layer 1 always, layer 0 never
        layers = [kind(block) for block in net.layers()]
        net.replace_layers(layers)
        noise = RowGenerator((5,), 0, 8, 8)
        batch = net.objective().make_batch(x, y, noise)
        masks.draw(layers, noise, tau=1.0)
        loss = net.objective().loss(net.objective().predict(net, batch), batch).mean()
        loss.backward()
        counts = [layer.count for layer in layers]
        assert counts[:2] == [0, 8] and 0 < counts[2] < 8 and sum(counts) == 16
        results.append([loss] + [torch.zeros_like(p) if p.grad is None else p.grad for p in [masks.logits, *delta]])
    for ours, dense in zip(*results):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-6)


def test_lora_starts_as_no_change_and_moves_only_itself(teachers):
    net, _ = model.load_model(ckpt=teachers / "dit-tiny.pt")
    batch = net.objective().make_batch(torch.randn(4, 4, 8, 8), torch.arange(4), RowGenerator((0,), 0, 4, 4))
    before = net.objective().predict(net, batch)
    delta = prune.add_delta_w(net, "lora", 8)
    assert torch.equal(net.objective().predict(net, batch), before)
    layers = [m for m in net.modules() if isinstance(m, prune.LoRALinear)]
    linears, (layer, x) = len(layers), (layers[0], torch.randn(5, layers[0].linear.in_features))
    with torch.no_grad():
        delta[1].fill_(0.01)
        layer.lora_b.normal_()
        weight = layer.linear.weight + 16 / 8 * layer.lora_b @ layer.lora_a  # alpha is 2 r
        want = torch.nn.functional.linear(x, weight, layer.linear.bias)
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)
    assert not torch.equal(net.objective().predict(net, batch), before)
    assert linears == 4 * 5 + 4 and len(delta) == 2 * linears  # qkv, proj, fc1, fc2, adaLN; 2 of t_embedder, 2 final
    assert prune.add_delta_w(net, "frozen", 8) == []


class Imitation:
    """An objective whose only task is to imitate `teacher`: its optimum under a mask is known."""

    def __init__(self, teacher):
        self.teacher, self.inner = teacher, teacher.objective()
        self.draw, self.predict = self.inner.make_batch, self.inner.predict

    def loss(self, out, batch):
        with torch.no_grad():
            target = self.predict(self.teacher, batch)
        return 10 * self.inner.kd(out, target, batch)


def silence(net, half, i):
    """Zeroes the last linear of a half of block i: its residual branch then adds nothing."""
    last = net.layers()[i].attn.proj if half == "attn" else net.layers()[i].mlp.fc2
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()


@family
@pytest.mark.parametrize("granularity, scheme, dead", [
    ("block", [(1, 2), (1, 2), (2, 4)], [0, 3, 5, 6]), ("sublayer", [(1, 2)] * 4, [1, 2, 5, 6])])
def test_planted_dead_layers_are_dropped(name, granularity, scheme, dead, latents, tmp_path):
    """Layers whose residual branches are zeroed change nothing: the search keeps the others."""
    halves = granularity == "sublayer"
    net = small(name, 4 if halves else 8)
    for i in dead:
        for half in (("attn", "mlp")[i % 2],) if halves else ("attn", "mlp"):
            silence(net, half, i // 2 if halves else i)
    if halves:
        prune.split_layers(net)
    device, args = torch.device("cpu"), argparse.Namespace(
        out=tmp_path, resume=None, dtype="float32", steps=40, batch_size=16, seed=0, accumulate=1, keep=1, log_every=40,
        save_every=40, delta_w="lora", lora_rank=4, compile=False, checkpointing=False)
    batches = extract_latents.Batches(extract_latents.Latents(latents), 16, 1, 0, device)
    kept = prune.learned(copy.deepcopy(net), Imitation(net), batches, scheme, prune.Run(args, device))
    assert kept == [i for i in range(8) if i not in dead]


# ---------------------------------------------------------------------------------------------------------------------
# prune.py: the cut.


def cut_flags(name, latents, teachers, out):
    return ["--ckpt", teachers / f"{name}.pt", "--latents", latents, "--out", out]


@family
def test_halves_of_blocks_change_nothing_and_join_to_the_official_keys(name):
    net, whole = small(name), small(name)
    prune.split_layers(net)
    assert net.depths() == [2 * d for d in whole.depths()]
    assert [layer.halves for layer in net.layers()] == [("attn",), ("mlp",)] * 4
    size = lambda n: sum(p.numel() for p in n.parameters())
    assert size(net) == size(whole)
    batch = net.objective().make_batch(torch.randn(6, 4, 8, 8), torch.arange(6), RowGenerator((0,), 0, 6, 6))
    with torch.no_grad():
        outputs = [net.objective().predict(n, batch) for n in (net, whole)]
    near(*outputs)
    prune.join_layers(net)
    assert same_weights(net.state_dict(), whole.state_dict()) and list(net.state_dict()) == list(whole.state_dict())


@family
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_the_cut_is_exact(name, granularity, latents, teachers, tmp_path):
    """The shallow weights are the teacher's, bit for bit, and compute what the masked teacher computes."""
    kept, scheme = ([1, 2], "1:2") if granularity == "block" else ([0, 1, 3, 4, 6, 7], "3:4")
    run(prune, *cut_flags(name, latents, teachers, tmp_path), "--criterion", "indices", "--scheme", scheme,
        "--layers", ",".join(map(str, kept)), "--granularity", granularity)
    net, _ = model.load_model(ckpt=teachers / f"{name}.pt")
    shallow, config = model.load_model(ckpt=tmp_path / "shallow.pt")
    assert (config["kept"], config["granularity"]) == (kept, granularity)
    assert config["parent"] == str(teachers / f"{name}.pt")
    outside = lambda n: {k: v for k, v in n.state_dict().items() if "blocks." not in k or "res_blocks" in k}
    assert same_weights(outside(shallow), outside(net))
    got, blocks = [layer.state_dict() for layer in shallow.layers()], [layer.state_dict() for layer in net.layers()]
    if granularity == "block":
        assert all(same_weights(a, blocks[i]) for a, i in zip(got, kept)) and sum(config["depth"]) == len(got) == 2
        masks = [float(i in kept) for i in range(4)]
    else:  # whole, MLP, attention, whole
        assert [layer.halves for layer in shallow.layers()] == [("attn", "mlp"), ("mlp",), ("attn",), ("attn", "mlp")]
        assert same_weights(got[0], blocks[0]) and same_weights(got[3], blocks[3])
        for half, a, b in (("mlp", got[1], blocks[1]), ("attn", got[2], blocks[2])):
            assert a and all(torch.equal(v, b[k] if k.split(".")[0] in b or not k.startswith("adaLN") else
                                         b[k].chunk(2)[half == "mlp"]) for k, v in a.items())
        for i, half in ((1, "attn"), (2, "mlp")):  # the same as the whole network without these two branches
            silence(net, half, i)
        masks = [1.0] * 4
    layers = [prune.MaskedLayer(block) for block in net.layers()]
    net.replace_layers(layers)
    for layer, mask in zip(layers, masks):
        give_mask(layer, torch.full((6,), mask), torch.full((6,), mask) > 0)
    batch = shallow.objective().make_batch(torch.randn(6, 4, 8, 8), torch.arange(6), RowGenerator((0,), 0, 6, 6))
    with torch.no_grad():
        outputs = [shallow.objective().predict(n, batch) for n in (shallow, net)]
    near(*outputs, 0 if granularity == "block" else 1e-5)


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("delta_w", ["lora", "full"])
def test_the_weight_update_leaves_no_trace(delta_w, granularity, latents, teachers, tmp_path):
    """After a search that trained dW, the cut is the one that --criterion indices makes, and the file is no larger."""
    flags = [*cut_flags("dit-tiny", latents, teachers, tmp_path / "a"), "--granularity", granularity]
    run(prune, *flags, "--delta-w", delta_w, "--steps", 3, "--batch-size", 16)
    kept = weights_of(tmp_path / "a/shallow.pt", "config")["kept"]
    run(prune, *flags, "--criterion", "indices", "--layers", ",".join(map(str, kept)), "--out", tmp_path / "b")
    a, b = (torch.load(tmp_path / k / "shallow.pt", weights_only=True) for k in "ab")
    assert same_weights(a["model"], b["model"]) and same_weights(a["ema"], a["model"])
    assert a["config"]["calibration_loss"] == b["config"]["calibration_loss"]
    stored = sum(v.untyped_storage().nbytes() for v in a["model"].values())
    assert stored == sum(v.nbytes for v in a["model"].values())


def test_the_picture_shows_the_log(tmp_path):
    """decision.png: a kept layer's cell is as dark as its confidence, a dropped layer's is white."""
    lines = [dict(step=1, kept=[0, 3], confidence=[0.5, 0.5, 0.1, 0.9]),
             dict(step=2, kept=[1, 3], confidence=[0.0, 1.0, 0.0, 1.0])]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prune.draw_decision(tmp_path, [(1, 2), (1, 2)])
    image = np.asarray(Image.open(tmp_path / "decision.png")).astype(int)
    cell = lambda step, layer: image[34 + 22 * layer + 11, 70 + 28 * step + 14].sum()
    assert cell(0, 1) == cell(0, 2) == cell(1, 0) == cell(1, 2) == 765
    assert cell(1, 1) < cell(0, 0) < 765 and cell(1, 3) < cell(0, 3) < 765


# ---------------------------------------------------------------------------------------------------------------------
# prune.py: the loss after the cut, and other papers' criteria, against an independent computation.


def fixed_batch(net, latents):
    """The fixed draws of the calibration loss, at once and by hand: all 96 latents in the order of seed 2025."""
    data, noise = extract_latents.Latents(latents), RowGenerator((2025, 0), 0, 96, 96)
    x, y = data.batch(epoch_order(96, 2025, 0), noise, "cpu")
    return net.objective().make_batch(x, y, noise)


@torch.no_grad()
def loss_of(net, batch, kept):
    """The mean loss of a copy that has only the layers `kept`, cut here by hand."""
    net, first = copy.deepcopy(net), 0
    for name in net.block_lists:
        blocks = getattr(net, name)
        setattr(net, name, torch.nn.ModuleList(b for i, b in enumerate(blocks, first) if i in kept))
        first += len(blocks)
    return net.objective().loss(net.objective().predict(net, batch), batch).double().mean().item()


@torch.no_grad()
def states_of(net, batch):
    """The input and the output of every layer, (B, T, D) in float64, from hooks."""
    states = [None] * len(net.layers())
    for i, layer in enumerate(net.layers()):
        keep = lambda m, x, out, i=i: states.__setitem__(i, (x[0].double().numpy(), out.double().numpy()))
        layer.register_forward_hook(keep)
    net.objective().predict(net, batch)
    return states


def turned(x, out):  # ShortGPT, eq. 1
    cosine = (x * out).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(out, axis=-1)
    return 1 - cosine.mean()


def scores_of(net, latents, criterion):
    batch = fixed_batch(net, latents)
    if criterion == "sensitivity":
        return [loss_of(net, batch, set(range(4)) - {i}) - loss_of(net, batch, range(4)) for i in range(4)]
    measure = dict(bi=turned, **{"flux-lite": lambda x, out: ((out - x) ** 2).mean()})[criterion]
    return [measure(x, out) for x, out in states_of(net, batch)]


def prune_with(criterion, name, latents, teachers, out, *flags):
    """-> what a criterion kept, and its line of the log."""
    run(prune, *cut_flags(name, latents, teachers, out), "--criterion", criterion, *flags)
    return weights_of(out / "shallow.pt", "config")["kept"], log_of(out)[0]


@family
@pytest.mark.parametrize("criterion", ["bi", "flux-lite", "sensitivity"])
def test_layers_are_scored_as_the_papers_say(criterion, name, latents, teachers, tmp_path):
    """...and in each group the N best are kept, the whole network as one group included."""
    want = scores_of(small(name), latents, criterion)
    for scheme in ("1:2",) if name == "mar-tiny" else ("1:2", "2:4", "3:4"):
        n, m = map(int, scheme.split(":"))
        kept, line = prune_with(criterion, name, latents, teachers, tmp_path, "--scheme", scheme)
        np.testing.assert_allclose(line["scores"], want, rtol=2e-4, atol=2e-6)
        best = [sorted(range(a, a + m), key=want.__getitem__)[m - n:] for a in range(0, 4, m)]
        assert kept == sorted(itertools.chain(*best))


@family
def test_a_layer_that_changes_nothing_has_no_score(name, latents, tmp_path):
    net = small(name)
    for half in ("attn", "mlp"):
        silence(net, half, 2)
    config = dict(name=name, overrides=FAMILIES[name])
    model.save_checkpoint(tmp_path / f"{name}.pt", model=net.state_dict(), config=config)
    for criterion in ("bi", "flux-lite", "sensitivity"):
        kept, line = prune_with(criterion, name, latents, tmp_path, tmp_path / "out")
        assert line["scores"][2] == pytest.approx(0, abs=1e-6)
        assert criterion == "sensitivity" or kept[1] == 3 and min(line["scores"][i] for i in (0, 1, 3)) > 1e-4


@pytest.mark.parametrize("name, scheme", [
    ("dit-tiny", "1:2"), ("dit-tiny", "2:4"), ("mar-tiny", "1:2"), ("dit-tiny", "4:4")])
def test_probe_loses_the_span_that_a_linear_map_replaces_best(name, scheme, latents, teachers, tmp_path):
    n, m = map(int, scheme.split(":"))
    kept, line = prune_with("probe", name, latents, teachers, tmp_path, "--scheme", scheme)
    if n == m:
        return np.testing.assert_equal(kept, [0, 1, 2, 3])
    states, want, unexplained = states_of(small(name), fixed_batch(small(name), latents)), set(range(4)), {}
    for first in range(0, 4, m):
        for a in range(first, first + n + 1):
            b = a + m - n - 1
            x, y = (v.reshape(-1, v.shape[-1]) for v in (states[a][0], states[b][1]))
            unexplained[a, b] = ((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum() / (y**2).sum()
        a, b = min((span for span in unexplained if first <= span[0] < first + m), key=unexplained.get)
        want -= set(range(a, b + 1))
    assert [tuple(span) for span in line["spans"]] == list(unexplained) and kept == sorted(want)
    np.testing.assert_allclose(line["unexplained"], list(unexplained.values()), rtol=0.01)  # ours has a ridge


def test_lowest_loss_tries_every_cut_or_random_ones(latents, teachers, tmp_path):
    net = small("dit-tiny")
    batch = fixed_batch(net, latents)
    for scheme, cuts in (("1:2", [[0, 2], [0, 3], [1, 2], [1, 3]]),
                         ("2:4", [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])):
        kept, line = prune_with("lowest-loss", "dit-tiny", latents, teachers, tmp_path, "--scheme", scheme)
        want = [loss_of(net, batch, cut) for cut in cuts]
        assert line["cuts"] == cuts and kept == cuts[np.argmin(want)]
        np.testing.assert_allclose(line["losses"], want, rtol=1e-5)
    some = ["--scheme", "2:4", "--candidates", 3, "--seed", 1]
    kept, line = prune_with("lowest-loss", "dit-tiny", latents, teachers, tmp_path, *some)
    assert len(line["cuts"]) == 3 and kept == line["cuts"][np.argmin(line["losses"])]
    np.testing.assert_allclose(line["losses"], [want[cuts.index(cut)] for cut in line["cuts"]], rtol=1e-5)


def test_a_cut_whose_loss_is_not_a_number_is_never_the_lowest(latents, teachers, tmp_path, monkeypatch):
    losses = iter([float("nan"), 3.0, float("nan"), 2.0, 5.0])
    monkeypatch.setattr(prune, "calibration_loss", lambda *_: next(losses))
    kept, _ = prune_with("lowest-loss", "dit-tiny", latents, teachers, tmp_path)
    assert kept == [1, 3]


def test_oracle_keeps_the_ends_of_every_list_and_spreads_the_rest():
    kept = lambda depths, scheme: prune.oracle(argparse.Namespace(depths=lambda: depths), None, None, scheme, None)
    assert kept([12], [(1, 2)] * 6) == [0, 2, 4, 7, 9, 11]
    assert kept([28], [(14, 28)]) == [round(27 / 13 * i) for i in range(14)]
    assert kept([8, 6], [(1, 2)] * 4 + [(2, 3)] * 2) == [0, 2, 5, 7, 8, 10, 11, 13]
    assert kept([4], [(1, 4)]) == [0]


@pytest.mark.parametrize("given, written", [("1:2", [[1, 2], [1, 2]]), ("2:2,1:2", [[3, 4]])])
def test_an_oracle_that_leaves_the_groups_writes_its_own(given, written, teachers, tmp_path):
    """L_Rep matches layers by the groups that the file names."""
    kept, _ = prune_with("oracle", "dit-tiny", "none", teachers, tmp_path, "--scheme", given)
    assert weights_of(tmp_path / "shallow.pt", "config")["scheme"] == written
    assert len(kept) == sum(n for n, _ in written)


def test_random_keeps_n_of_each_group_and_follows_the_seed(teachers, tmp_path):
    kept = [prune_with("random", "dit-tiny", "none", teachers, tmp_path, "--scheme", "2:4", "--seed", seed)[0]
            for seed in (0, 0, 1, 2)]
    assert kept[0] == kept[1] and len(set(map(tuple, kept))) > 1 and all(len(k) == 2 for k in kept)
    many = [prune.random_cut([(1, 2), (2, 3)], np.random.default_rng(seed)) for seed in range(200)]
    assert set(map(tuple, many)) == {(a, *b) for a in (0, 1) for b in itertools.combinations((2, 3, 4), 2)}


@pytest.mark.parametrize("criterion, kept", [("random", None), ("oracle", [0, 3]), ("indices", [0, 3])])
def test_criteria_that_look_at_no_data_need_no_latents(criterion, kept, teachers, tmp_path, capsys):
    flags = ["--layers", "3,0"] if criterion == "indices" else []
    got, line = prune_with(criterion, "dit-tiny", tmp_path / "none", teachers, tmp_path, *flags)
    assert got == (kept or got) and line["calibration_loss"] is None and "not measured" in capsys.readouterr().out
    flags = cut_flags("dit-tiny", tmp_path / "none", teachers, tmp_path)
    assert "extract_latents.py" in user_error(prune, *flags, "--criterion", "bi")


@family
def test_the_loss_after_the_cut_is_measured_on_fixed_draws(name, latents, teachers, tmp_path, capsys):
    """The same, whatever the seed and the batch size; printed, in the log, and in the cut network's config."""
    net = small(name)
    want = loss_of(net, fixed_batch(net, latents), [1, 2])
    for flags in ([], ["--seed", 5, "--batch-size", 7, "--accumulate", 3]):
        prune_with("indices", name, latents, teachers, tmp_path, "--layers", "1,2", *flags)
        config, said = weights_of(tmp_path / "shallow.pt", "config"), capsys.readouterr().out
        assert config["calibration_loss"] == log_of(tmp_path)[-1]["calibration_loss"] == pytest.approx(want, rel=1e-5)
        assert f"loss after the cut {want:.4f}" in said and log_of(tmp_path)[-1]["cut"] == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# distill.py: what is matched, the masked loss, the learning rate, the average.


def test_matched_layers_are_the_releases():
    """D14 of 28 at 1:2, 2:4 and 7:14: i <- 2i + 1 for all; D19: the ends of its groups, 7 pairs."""
    uniform = [(i, 2 * i + 1) for i in range(14)]
    for scheme in ([[1, 2]] * 14, [[2, 4]] * 7, [[7, 14]] * 2):
        assert distill.matched_layers(scheme, [14], [28]) == uniform
    d19 = [[3, 4], [3, 4], [2, 4], [3, 4], [2, 4], [3, 4], [3, 4]]
    assert distill.matched_layers(d19, [19], [28]) == list(zip((2, 5, 7, 10, 12, 15, 18), (3, 7, 11, 15, 19, 23, 27)))
    assert distill.matched_layers([[3, 4]] * 2, [6], [8]) == [(2, 3), (5, 7)]  # no layer of four closes a third


def test_where_the_scheme_does_not_say_layers_match_by_share_of_depth():
    fourths, uniform = [(i, 4 * i + 3) for i in range(7)], [(i, 2 * i + 1) for i in range(14)]
    assert distill.matched_layers([[1, 4]] * 7, [7], [28]) == fourths  # the parent
    assert distill.matched_layers([[1, 2]] * 7, [7], [28]) == fourths  # cut of D14, taught by D28
    assert distill.matched_layers([[1, 4]] * 7, [7], [14]) == uniform[:7]  # cut of D28, taught by D14
    assert distill.matched_layers(None, [14], [28]) == uniform
    assert distill.matched_layers(None, [4], [4]) == [(i, i) for i in range(4)]
    mar = [(i, 2 * i + 1) for i in range(16)]  # MAR's two lists: the encoder's layers, then the decoder's
    assert distill.matched_layers([[1, 2]] * 16, [8, 8], [16, 16]) == mar
    assert distill.matched_layers(None, [8, 8], [16, 16]) == mar
    assert distill.matched_layers(None, [2, 1], [4, 4]) == [(0, 1), (1, 3), (2, 7)]


class OneBatch:
    """Stands in for prune.Run and Batches: hands `recover` the golden batch at the given steps, and trains nothing."""

    def __init__(self, steps, **changes):
        recipe = dict(seed=0, mode="masked-kd", beta=0.01, steps=10, lr=2e-4, warmup=0, lr_end=0.5, ema=0.9)
        self.args = argparse.Namespace(**recipe | dict(mask_sigma=2.0, compile=False) | changes)
        self.steps, self.parts = steps, []
        self.autocast = lambda: torch.autocast("cpu", enabled=False)
        self.track = self.prepare = self.update = lambda *_, **__: None

    def __iter__(self):
        return iter(self.steps)

    def __call__(self, step):
        yield None, None, None

    def backward(self, **parts):
        self.parts.append({k: v.detach() for k, v in parts.items()})
        parts["loss"].mean().backward()


def golden_recovery(prefix="", steps=(0,), **changes):
    """Eq. 8 on a student of depth 2 and a teacher of depth 4; in the drop_ case both lose the same labels."""
    g = golden("masked_kd_loss")
    with torch.no_grad():
        student = fill(build_model("dit-tiny", 2, **DIT_GOLDEN)).train()
        teacher = fill(build_model("dit-tiny", 4, **DIT_GOLDEN), "teacher.")
    objective, y = student.objective(), torch.where(g["in.rand_values"] < 0.1, 10, g["in.y"]) if prefix else g["in.y"]
    x_t = objective.diffusion.q_sample(g["in.x_start"], g["in.t"], g["in.noise"])
    batch = dict(x_start=g["in.x_start"], t=g["in.t"], eps=g["in.noise"], y=y, x_t=x_t)
    objective.make_batch = lambda *_: batch
    run = OneBatch(steps, **changes)
    pairs = distill.matched_layers([[1, 2], [1, 2]], [2], [4])
    distill.recover(student, copy.deepcopy(student), teacher.requires_grad_(False), objective, run, pairs, run, {})
    return g, student, run.parts


@pytest.mark.parametrize("prefix", ["", "drop_"])
def test_masked_kd_loss_and_gradients(prefix):
    g, student, (parts,) = golden_recovery(prefix)
    near(parts["kd"], g[f"out.{prefix}kd_loss"], 5e-5)
    near(parts["diffusion"], g[f"out.{prefix}gt"], 5e-5)
    near(parts["rep"], g[f"out.{prefix}feat_loss"])
    near(parts["loss"], g[f"out.{prefix}loss"], 5e-5)
    parameters = dict(student.named_parameters())
    names = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight",
             "blocks.1.adaLN_modulation.1.weight", "y_embedder.embedding_table.weight")
    near(torch.stack([parameters[k].grad.norm() for k in names]), g[f"out.{prefix}grad_norms"], 2e-5)


def test_beta_falls_to_zero_and_the_other_weights_stay():
    _, _, parts = golden_recovery(steps=(0, 5, 9))
    for line, beta in zip(parts, (0.01, 0.005, 0.001)):
        near(line["loss"], 0.9 * line["kd"] + 0.1 * line["diffusion"] + beta * line["rep"])


def test_the_mask_leaves_out_what_lies_sigma_standard_deviations_from_its_samples_mean():
    h = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 4.0, -9.0]).view(3, 1, 1)
    h[0, 0, 0], h[1, 2, 3] = 80.0, -400.0
    for k in (0.1, 2.0, 4.0):
        want = np.stack([np.where(np.abs(v - v.mean()) < k * v.std(ddof=1), v, 0) for v in h.double().numpy()])
        np.testing.assert_allclose(distill.suppress_massive(h, k), want, rtol=1e-6)
    assert distill.suppress_massive(h)[0, 0, 0] == 0 == distill.suppress_massive(h)[1, 2, 3]
    other = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    for k, mask in ((2.0, distill.suppress_massive), (np.inf, lambda v: v)):
        want = sum(((mask(a) - mask(b)) ** 2).mean((1, 2)) for a, b in ((h, other), (other, h * 2))) / 2
        torch.testing.assert_close(distill.masked_representation_loss([h, other], [other, h * 2], k), want)


def test_a_massive_activation_gets_no_gradient():
    h = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    h[0, 0, 0] = 100.0
    h.requires_grad_()
    distill.masked_representation_loss([h], [torch.zeros(2, 4, 8)]).sum().backward()
    masked = distill.suppress_massive(h.detach()) == 0
    assert masked[0, 0, 0] and (h.grad[masked] == 0).all() and (h.grad[~masked] != 0).all()


def test_mask_sigma_and_rep_kd_change_only_the_representation_loss():
    rep = {}
    for changes in (dict(mask_sigma=0.1), dict(mask_sigma=2.0), dict(mask_sigma=4.0), dict(mode="rep-kd")):
        _, _, (parts,) = golden_recovery(**changes)
        rep[str(changes)] = parts.pop("rep")
        near(parts["kd"], golden("masked_kd_loss")["out.kd_loss"], 5e-5)
        near(parts["diffusion"], golden("masked_kd_loss")["out.gt"], 5e-5)
    narrow, usual, wide, none = rep.values()
    assert (narrow < usual).all() and (usual < wide).all() and (wide <= none).all()


def test_the_learning_rate_halves_on_a_cosine():
    factors = [distill.lr_factor(step, 100, 0, 0.5) for step in (0, 50, 100)]
    np.testing.assert_allclose(factors, [1.0, 0.75, 0.5])
    assert distill.lr_factor(4, 100, 10, 0.5) == pytest.approx(0.5 * (0.75 + 0.25 * np.cos(np.pi * 0.04)))
    assert distill.lr_factor(50, 100, 0, 0.1) == pytest.approx(0.55) and distill.lr_factor(100, 100, 0, 0) == 0


def test_ema_is_the_formula_with_warm_up():
    average, want = [torch.tensor([1.0])], 1.0
    for step, value in enumerate((2.0, 5.0, -1.0)):
        prune.ema_update(average, [torch.tensor([value], requires_grad=True)], 0.15, step)
        decay = min(0.15, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * value
    assert average[0].item() == pytest.approx(want)


def stage_flags(stage, name, latents, teachers, out, **changes):
    """A short run of prune or distill: 6 steps of 16."""
    flags = {"--latents": latents, "--out": out, "--steps": 6, "--batch-size": 16}
    flags |= {"--log-every": 1, "--save-every": 1, "--keep": 9}
    if stage == "prune":
        flags |= {"--ckpt": teachers / f"{name}.pt", "--scheme": "1:2"}
    else:
        flags |= {"--student": shallow_of(name, latents, teachers), "--teacher": teachers / f"{name}.pt", "--ema": 0.9}
    flags |= {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
    return [v for pair in flags.items() if pair[1] is not None for v in pair]


def shallow_of(name, latents, teachers, granularity="block"):
    """The teacher of `name` cut to half its depth, made once."""
    path = teachers / f"shallow-{name}-{granularity}" / "shallow.pt"
    if not path.exists():
        run(prune, *cut_flags(name, latents, teachers, path.parent), "--criterion", "indices", "--layers",
            "0,2" if granularity == "block" else "0,3,4,7", "--granularity", granularity)
    return path


@pytest.mark.parametrize("mode", ["masked-kd", "rep-kd", "logits-kd", "finetune", "scratch"])
def test_modes_differ_in_what_they_add(mode, latents, teachers, tmp_path):
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path, steps=2, mode=mode)
    if mode == "scratch":
        flags += ["--model", "dit-tiny", "--depth", 1]
    run(distill, *flags)
    line, config = log_of(tmp_path)[0], weights_of(tmp_path / "student.pt", "config")
    parts = {"masked-kd": {"kd", "diffusion", "rep"}, "rep-kd": {"kd", "diffusion", "rep"},
             "logits-kd": {"kd", "diffusion"}}.get(mode, {"diffusion"})
    assert parts == {"kd", "diffusion", "rep"} & line.keys() and config["mode"] == mode
    want = line["diffusion"]
    if "kd" in parts:
        want = 0.9 * line["kd"] + 0.1 * want + 0.01 * line.get("rep", 0)
    assert line["loss"] == pytest.approx(want, rel=1e-5)
    assert config["depth"] == [1 if mode == "scratch" else 2]


# ---------------------------------------------------------------------------------------------------------------------
# distill.py: every file has a way in.


@family
def test_files_without_config_are_students_and_teachers_at_any_depth(name, latents, tmp_path):
    """As official files are: plain weights, or under ema and model; the depth is read from them."""
    nets = {depth: build_model(name, depth) for depth in (2, 4)}
    torch.save(nets[2].state_dict(), tmp_path / "two.pt")
    torch.save(dict(ema=nets[4].state_dict(), model={}, opt={}), tmp_path / "four.pt")
    flags = ["--latents", latents, "--steps", 1, "--batch-size", 8, "--out", tmp_path / "out"]
    run(distill, *flags, "--model", name, "--student", tmp_path / "two.pt", "--teacher", tmp_path / "four.pt")
    assert same_shapes(model.load_model(ckpt=tmp_path / "out/student.pt")[0], nets[2])
    run(distill, *flags, "--model", name, "--student", tmp_path / "four.pt", "--mode", "finetune")
    assert same_shapes(model.load_model(ckpt=tmp_path / "out/student.pt")[0], nets[4])
    run(prune, *flags, "--model", name, "--ckpt", tmp_path / "four.pt", "--criterion", "random")
    assert weights_of(tmp_path / "out/shallow.pt", "config")["name"] == name
    run(distill, *flags, "--student", tmp_path / "out/shallow.pt")  # its parent is a file without config
    assert "add --model" in user_error(distill, *flags, "--student", tmp_path / "two.pt")
    assert "add --teacher" in user_error(distill, *flags, "--student", tmp_path / "two.pt", "--model", name)


def same_shapes(a, b):
    return {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


def test_table_7_a_teacher_need_not_be_the_parent(latents, tmp_path, monkeypatch):
    """A student of depth 1 cut from a deep network (4) or from a shallower one (2), taught by either."""
    for depth in (4, 2):
        torch.save(build_model("dit-tiny", depth).state_dict(), tmp_path / f"{depth}.pt")
        run(prune, "--model", "dit-tiny", "--ckpt", tmp_path / f"{depth}.pt", "--criterion", "indices", "--layers", 0,
            "--scheme", f"1:{depth}", "--out", tmp_path / f"of-{depth}", "--latents", latents)
    seen, honest = [], distill.matched_layers
    monkeypatch.setattr(distill, "matched_layers", lambda *sides: seen.append(honest(*sides)) or seen[-1])
    for teacher, parent in itertools.product((4, 2), (4, 2)):
        run(distill, "--student", tmp_path / f"of-{parent}/shallow.pt", "--teacher", tmp_path / f"{teacher}.pt",
            "--steps", 1, "--batch-size", 8, "--log-every", 1, "--latents", latents, "--out", tmp_path / "out")
        assert {"kd", "rep"} <= log_of(tmp_path / "out")[0].keys()
    assert seen == [[(0, 3)], [(0, 3)], [(0, 1)], [(0, 1)]]


def test_a_student_starts_from_the_averaged_weights_unless_asked(latents, teachers, tmp_path):
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path / "a", lr=0.01)
    run(distill, *flags)
    given = tmp_path / "a/student.pt"
    assert not same_weights(weights_of(given, "ema"), weights_of(given, "model"))
    for wanted, extra in (("ema", []), ("ema", ["--weights", "ema"]), ("model", ["--weights", "model"])):
        run(distill, *flags, "--student", given, "--lr", 1e-30, "--out", tmp_path / "b", *extra)
        assert same_weights(weights_of(tmp_path / "b/student.pt", "model"), weights_of(given, wanted))


@family
def test_a_student_of_halves_learns_saves_and_loads(name, latents, teachers, tmp_path):
    """In memory its layers are halves, in the file they are blocks where whole; it comes back as it was."""
    student = shallow_of(name, latents, teachers, "sublayer")
    run(distill, *stage_flags("distill", name, latents, teachers, tmp_path, student=student))
    before, config = model.load_model(ckpt=student)
    after, config = model.load_model(ckpt=tmp_path / "student.pt", weights="model")
    assert [b.halves for b in after.layers()] == [b.halves for b in before.layers()] and same_shapes(before, after)
    assert list(weights_of(tmp_path / "student.pt")) == list(before.state_dict())
    split, _ = model.load_model(ckpt=tmp_path / "step-00000006.pt", weights="model")  # not joined yet
    assert len(split.layers()) == 4
    batch = after.objective().make_batch(torch.randn(6, 4, 8, 8), torch.arange(6), RowGenerator((0,), 0, 6, 6))
    with torch.no_grad():
        near(*[after.objective().predict(n, batch) for n in (after, split)])
    settings = model.MODELS[name]["sampling"] | dict(steps=3)
    draw = lambda net: sample.SAMPLERS[settings["sampler"]](net, torch.arange(4), RowGenerator((0,), 0, 4, 16), **settings)
    with torch.inference_mode():
        near(draw(after), draw(split), 1e-3)
    assert len(log_of(tmp_path)) == 6 and not same_weights(before.state_dict(), after.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Runs of prune.py and distill.py: resuming, ranks, signals, mistakes.


STAGES = dict(prune=(prune, "shallow.pt"), distill=(distill, "student.pt"))
HALVES = {"granularity": "sublayer", "scheme": "2:4"}


def flat(tree, prefix=""):
    """A nested checkpoint as one dict of leaves."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


def same_checkpoints(a, b):
    a, b = (flat(torch.load(path, weights_only=True)) for path in (a, b))
    assert a.keys() == b.keys()
    same = lambda v, w: torch.equal(v, w) if isinstance(v, torch.Tensor) else v == w
    assert [k for k, v in a.items() if not same(v, b[k])] == []


def forget_after(step, out, last=6):
    """What a kill right after `step` leaves of a run."""
    for later in range(step + 1, last + 1):
        (out / f"step-{later:08}.pt").unlink()
    for name in ("shallow.pt", "student.pt"):
        (out / name).unlink(missing_ok=True)


@pytest.mark.parametrize("stage, name, changes", [
    *[(stage, name, {}) for stage in STAGES for name in FAMILIES], ("prune", "dit-tiny", {"delta_w": "full"}),
    ("prune", "mar-tiny", HALVES), ("distill", "dit-tiny", {"student": "sublayer"})])
def test_a_killed_run_resumes_to_the_same_bits(stage, name, changes, latents, teachers, tmp_path):
    """Resumed from step 1 or 4, the last checkpoint is the uninterrupted run's: weights, averages, optimizer, log."""
    module, result = STAGES[stage]
    if changes == {"student": "sublayer"}:
        changes = {"student": shallow_of(name, latents, teachers, "sublayer")}
    run(module, *stage_flags(stage, name, latents, teachers, tmp_path / "whole", **changes))
    for killed_at in (1, 4):
        out = tmp_path / f"killed{killed_at}"
        shutil.copytree(tmp_path / "whole", out)
        forget_after(killed_at, out)
        run(module, *stage_flags(stage, name, latents, teachers, out, **changes), "--resume", "auto")
        same_checkpoints(out / "step-00000006.pt", tmp_path / "whole/step-00000006.pt")
        same_checkpoints(out / result, tmp_path / "whole" / result)
        facts = lambda folder: [{k: v for k, v in line.items() if k != "images_per_s"} for line in log_of(folder)]
        assert facts(out) == facts(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(latents, teachers, tmp_path):
    for stage, (module, result) in STAGES.items():
        flags = stage_flags(stage, "dit-tiny", latents, teachers, tmp_path / stage)
        run(module, *flags)
        log, want = log_of(tmp_path / stage), weights_of(tmp_path / stage / result)
        run(module, *flags, "--resume", "auto")
        assert log_of(tmp_path / stage) == log and same_weights(weights_of(tmp_path / stage / result), want)


RANKS = """
import importlib, json, os, shutil, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import model, prune
torch.set_num_threads(1)

def stages(jobs):
    for stage, flags in jobs:
        sys.argv = [stage, *map(str, flags)]
        importlib.import_module(stage).main()

def gradients(out):
    '''A network of six layers in buckets of one or two; layer 2 has no gradient on rank 1, nor on rank 0 in part 2.'''
    model.start_ranks("cpu")
    torch.manual_seed(0)
    layers, data = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6)), torch.randn(2, 2, 3, 4)  # rank, part
    parameters, seen = list(layers.parameters()), []

    def loss(rank, part):
        x = data[rank, part]
        for i, layer in enumerate(layers):
            x = torch.tanh(layer(x)) if i != 2 or (rank, part) == (0, 0) else x
        return x.square().sum()

    want = torch.autograd.grad(sum(loss(r, p) for r in (0, 1) for p in (0, 1)), parameters)
    sums = prune.Gradients(parameters, parts=2, size=20)
    layers[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(len(sums.sent)))
    errors = []
    for _ in range(2):
        for part in (0, 1):
            sums.next_part()
            loss(model.rank(), part).backward()
        sums.finish()
        errors.append(max((p.grad - w).abs().max().item() for p, w in zip(parameters, want)))
        sums.zero()
    zero = max(p.grad.abs().max().item() for p in parameters)
    facts = dict(seen=seen, buckets=len(sums.buckets), errors=errors, zero=zero)
    Path(out, f"gradients{model.rank()}.json").write_text(json.dumps(facts))

def kill_and_resume(jobs):
    '''Runs them, forgets what came after step 3, and resumes, with the same ranks.'''
    for stage, flags in jobs:
        stages([(stage, flags)])
        out = Path(flags[flags.index("--out") + 1])
        again = out.with_name(out.name + "-again")
        if model.rank() == 0:
            shutil.copytree(out, again)
            for step in (4, 5, 6):
                (again / f"step-{step:08}.pt").unlink()
        model.barrier()
        stages([(stage, [*flags, "--out", str(again), "--resume", "auto"])])

model.run_main(lambda: [globals()[task](argument) for task, argument in json.loads(sys.argv[2])])
"""


def with_ranks(count, folder, *tasks):
    """Runs tasks of RANKS in one launch of torchrun."""
    (folder / "ranks.py").write_text(RANKS)
    done = launch(folder / "ranks.py", ROOT, json.dumps(tasks, default=str), ranks=count)
    assert done.returncode == 0, done.stderr
    return done


def test_two_ranks_follow_one(latents, teachers, tmp_path):
    """Two ranks with half of the batch each, and one rank in three parts (5 + 5 + 6 rows): the same losses to float
    tolerance. Every stage and family, halves of blocks, and every criterion that looks at data, in one launch.

    MAR's dropout, the one thing seeded per rank, is off.
    """
    without_dropout = tmp_path / "teachers"
    without_dropout.mkdir()
    for name in FAMILIES:
        net, config = model.load_model(ckpt=teachers / f"{name}.pt")
        config["overrides"] = {k: v for k, v in config["overrides"].items() if k != "dropout"}
        model.save_checkpoint(without_dropout / f"{name}.pt", model=net.state_dict(), config=config, step=0)
    student = shallow_of("dit-tiny", latents, without_dropout, "sublayer")
    jobs = [(stage, name, {}) for stage in STAGES for name in FAMILIES]
    jobs += [("prune", "dit-tiny", HALVES), ("distill", "dit-tiny", dict(student=student))]
    criteria = ("bi", "flux-lite", "sensitivity", "probe", "lowest-loss")
    jobs += [("prune", "dit-tiny", dict(criterion=criterion)) for criterion in criteria]
    folder = lambda ranks, i: tmp_path / f"{ranks}/{i}"
    flags = lambda i, ranks: stage_flags(*jobs[i][:2], latents, without_dropout, folder(ranks, i), **jobs[i][2])
    for i, (stage, *_) in enumerate(jobs):
        run(STAGES[stage][0], *flags(i, "one"))
        run(STAGES[stage][0], *flags(i, "thirds"), "--accumulate", 3)
    stages = [(stage, flags(i, "two")) for i, (stage, *_) in enumerate(jobs)]
    with_ranks(2, tmp_path, ("stages", stages), ("gradients", tmp_path))
    numbers = {"loss", "grad_norm", "kd", "rep", "diffusion", "scores", "unexplained", "losses", "calibration_loss"}
    for i, job in enumerate(jobs):
        one, thirds, two = (log_of(folder(k, i)) for k in ("one", "thirds", "two"))
        assert len(one) == len(thirds) == len(two) > 1
        for line, *others in zip(one, thirds, two):
            for key in numbers & line.keys():
                for other in others:
                    np.testing.assert_allclose(other[key], line[key], rtol=4e-4, atol=1e-6, err_msg=f"{job}, {key}")
    for r in (0, 1):  # gradients
        facts = json.loads((tmp_path / f"gradients{r}.json").read_text())
        assert max(facts["errors"]) < 1e-5 and facts["zero"] == 0
        first, last = facts["seen"][::2], facts["seen"][1::2]  # what has left when the last gradient of a part arrives
        assert first == [0, 0] and 0 < min(last) and max(last) < facts["buckets"] == 6, facts


def torchrun(agent_flags, flags, nodes=1, **environment):
    """-> a function that starts distill.py under a torchrun agent of its own on loopback, as on one more machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    rendezvous = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *agent_flags, distill.__file__]
    return lambda: subprocess.Popen([*command, *map(str, flags)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                    text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def wait_for_lines(out, count, agent):
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < count:
        time.sleep(0.05)
        assert agent.poll() is None, agent.communicate()


def follows_one_rank(out, flags):
    """The log of the run in `out` is that of one undisturbed rank: each step once, the same losses."""
    run(distill, *flags, "--out", out / "undisturbed")
    got, want = log_of(out), log_of(out / "undisturbed")
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for line, other in zip(got, want):
        assert line["loss"] == pytest.approx(other["loss"], rel=5e-3)


def test_a_signal_saves_and_ends_in_good_order(latents, teachers, tmp_path, monkeypatch, capsys):
    """Pre-emption: exit code 0, and the run goes on to the same bits."""
    flags = stage_flags("distill", "mar-tiny", latents, teachers, tmp_path / "whole", save_every=100)
    run(distill, *flags)
    honest, flags = prune.Run.write, [*flags, "--out", tmp_path / "stopped"]
    write = lambda self, **line: honest(self, **line) or line["step"] == 3 and os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(prune.Run, "write", write)
    model.run_main(lambda: run(distill, *flags))
    monkeypatch.undo()
    assert "stopped by a signal at step 3 of 6; continue with --resume auto" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "stopped").glob("*.pt")] == ["step-00000003.pt"]
    run(distill, *flags, "--resume", "auto")
    same_checkpoints(tmp_path / "stopped/student.pt", tmp_path / "whole/student.pt")


def test_torchrun_passes_a_signal_on_and_three_ranks_take_over(latents, teachers, tmp_path):
    """SIGUSR1 to the agent of two ranks. The three that go on do not divide the batch of 40, and follow one rank.

    In the same launch, three ranks that are stopped and resumed end in the bits of three that are not.
    """
    out, steps = tmp_path / "stopped", 60
    flags = stage_flags("distill", "dit-tiny", latents, teachers, out, steps=steps, save_every=1000, batch_size=40)
    agent = torchrun(["--nproc_per_node=2", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"], flags)()
    wait_for_lines(out, 5, agent)
    agent.send_signal(signal.SIGUSR1)
    agent.communicate(timeout=100)
    step = weights_of(max(out.glob("step-*.pt")), "step")
    assert 5 <= step < steps and step % 10 == 0 and not (out / "student.pt").exists()
    jobs = [(stage, stage_flags(stage, name, latents, teachers, tmp_path / stage))
            for stage, name in (("prune", "dit-tiny"), ("distill", "mar-tiny"))]
    with_ranks(3, tmp_path, ("stages", [("distill", [*flags, "--resume", "auto"])]), ("kill_and_resume", jobs))
    follows_one_rank(out, flags)
    for stage in STAGES:
        same_checkpoints(tmp_path / stage / "step-00000006.pt", tmp_path / f"{stage}-again/step-00000006.pt")
        losses = lambda folder: [line.get("loss") for line in log_of(folder)]
        assert losses(tmp_path / stage) == losses(tmp_path / f"{stage}-again")


def test_a_criterion_without_a_loop_ends_at_a_signal(latents, teachers, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    look = lambda *given: [0, 2] if signal.getsignal(signal.SIGTERM) == handler else []
    monkeypatch.setitem(prune.CRITERIA, "random", look)
    assert prune_with("random", "dit-tiny", latents, teachers, tmp_path)[0] == [0, 2]


def test_steps_that_are_not_finite_are_skipped_and_twenty_in_a_row_stop_the_run(
        latents, teachers, tmp_path, monkeypatch):
    honest = model.DiffusionObjective.loss
    poison = lambda steps: lambda self, out, batch: honest(self, out, batch) * (float("nan") if next(steps) else 1.0)
    for stage, (module, _) in STAGES.items():
        out, flags = tmp_path / stage, stage_flags(stage, "dit-tiny", latents, teachers, tmp_path / stage)
        steps = itertools.chain([0, 0, 1], itertools.repeat(0))
        monkeypatch.setattr(model.DiffusionObjective, "loss", poison(steps))
        run(module, *flags)
        states = [torch.load(out / f"step-0000000{k}.pt", weights_only=True) for k in (2, 3, 4)]
        trained = [flat(state["model" if stage == "distill" else "masks"]) for state in states]
        trained = [{k: v for k, v in t.items() if k != "/average"} for t in trained]
        assert same_weights(trained[0], trained[1]) and not same_weights(trained[1], trained[2])
        same_moments = lambda a, b: same_weights(flat(a["optimizer"]["state"]), flat(b["optimizer"]["state"]))
        assert same_moments(states[0], states[1]) and not same_moments(states[1], states[2])
        assert all(v.isfinite().all() for v in trained[2].values())
    monkeypatch.setattr(model.DiffusionObjective, "loss", poison(iter([1] * 19 + [0] + [1] * 100)))
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path / "long", steps=60)
    assert "not finite for 20 steps up to step 40" in user_error(distill, *flags)


def test_resuming_from_an_earlier_checkpoint_leaves_the_later_branch(latents, teachers, tmp_path):
    """...and a log line torn by a kill does not stop it."""
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    run(distill, *flags)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 7, "lo')
    run(distill, *flags, "--keep", 2, "--resume", tmp_path / "step-00000002.pt")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005.pt", "step-00000006.pt"]
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 7))


def test_only_the_newest_checkpoints_are_kept_and_a_new_run_starts_clean(latents, teachers, tmp_path):
    flags = [*stage_flags("distill", "dit-tiny", latents, teachers, tmp_path), "--keep", 2]
    run(distill, *flags)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005.pt", "step-00000006.pt"]
    run(distill, *flags, "--steps", 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001.pt", "step-00000002.pt"]
    assert len(log_of(tmp_path)) == 2


def test_an_unfinished_run_is_not_overwritten_by_accident(latents, teachers, tmp_path):
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    run(distill, *flags)
    forget_after(5, tmp_path)
    other_stage = [*cut_flags("dit-tiny", latents, teachers, tmp_path), "--criterion", "random"]
    for error in (user_error(distill, *flags), user_error(prune, *other_stage)):
        assert "--resume auto to go on, or --resume never" in error
    assert len(list(tmp_path.glob("step-*.pt"))) == 5 and len(log_of(tmp_path)) == 6
    run(distill, *flags, "--resume", "never", "--steps", 2)
    assert len(log_of(tmp_path)) == 2


def test_a_damaged_newest_checkpoint_is_passed_over(latents, teachers, tmp_path, capsys):
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    run(distill, *flags)
    want = weights_of(tmp_path / "step-00000006.pt")
    for step, content in (6, b""), (5, b"PK torn"):
        (tmp_path / f"step-0000000{step}.pt").write_bytes(content)
    run(distill, *flags, "--resume", "auto")
    assert f"passed over: {tmp_path / 'step-00000005.pt'}" in capsys.readouterr().err
    assert same_weights(weights_of(tmp_path / "step-00000006.pt"), want)
    for path in tmp_path.glob("step-*.pt"):
        path.write_bytes(b"")
    assert "can be read" in user_error(distill, *flags, "--resume", "auto") and list(tmp_path.glob("step-*.pt"))


FIXED = {"distill": {"--lr": 1e-4, "--mode": "finetune", "--steps": 9, "--batch-size": 8, "--seed": 1, "--ema": 0.5,
                     "--beta": 0, "--lr-end": 0.1, "--warmup": 3, "--mask-sigma": 4, "--weights": "model",
                     "--teacher": "dit-tiny"},
         "prune": {"--scheme": "2:4", "--delta-w": "full", "--lora-rank": 4, "--criterion": "bi", "--candidates": 9,
                   "--granularity": "sublayer"}}


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_may_change_a_short_list_of_flags(stage, latents, teachers, tmp_path, monkeypatch):
    """...so that a new flag is fixed unless someone decides otherwise."""
    module, flags = STAGES[stage][0], stage_flags(stage, "dit-tiny", latents, teachers, tmp_path / "a")
    run(module, *flags)
    if stage == "distill":
        monkeypatch.setattr(distill, "load_teacher", lambda *_: None)  # what is refused comes before it is used
        monkeypatch.setattr(distill, "matched_layers", lambda *_: [])
        monkeypatch.setattr(torch.nn.Module, "depths", lambda self: [2], raising=False)
    for flag, value in FIXED[stage].items():
        assert "belongs to a run with " + flag in user_error(module, *flags, flag, value, "--resume", "auto")
    monkeypatch.undo()
    forget_after(4, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.copytree(latents, tmp_path / "latents")
    run(module, *flags, "--resume", "auto", "--out", tmp_path / "b", "--latents", tmp_path / "latents", "--keep", 1,
        "--save-every", 3, "--log-every", 2, "--accumulate", 2, "--checkpointing", "--dtype", "bfloat16")
    assert [p.name for p in (tmp_path / "b").glob("step-*")] == ["step-00000006.pt"]


MISTAKES = """
distill --lr -1 | --lr: '-1' is not a number above 0
distill --lr nan | --lr
distill --lr inf | --lr
distill --lr 0 | --lr
distill --beta -1 | --beta
distill --beta nan | --beta
distill --ema 2 | --ema
distill --ema -0.1 | --ema
distill --warmup -5 | --warmup
distill --lr-end -1 | --lr-end
distill --lr-end 2 | --lr-end
distill --mask-sigma 0 | --mask-sigma
distill --epochs nan | --epochs
distill --epochs inf | --epochs
distill --epochs -1 | --epochs
distill --epochs 1e308 | --epochs
distill --epochs 2 | say the same
distill --steps 0 | --steps
distill --seed -1 | --seed
distill --batch-size 512 | --batch-size
distill --batch-size 0 | --batch-size
distill --batch-size 1 --accumulate 2 | --batch-size
distill --student {files}/junk | cannot be read
distill --teacher {files}/junk | cannot be read
distill --teacher dit-huge | dit-huge does not exist
distill --teacher {teachers}/sit-tiny.pt | another kind
distill --student none.pt | does not exist
distill --student {teachers} | cannot be read
distill --depth 3 | --mode scratch
distill --mode kd | invalid choice
distill --model dit-huge --mode scratch | no model is called
distill --model dit-s --mode scratch | latents
distill --model sit-tiny | holds dit-tiny
distill --resume {files}/junk | cannot be read
distill --resume {teachers}/dit-tiny.pt | cannot be read
distill --resume {files}/release | cannot be read
distill --resume none.pt | does not exist
distill --latents {files}/junks | junks
distill --out {files}/junk | cannot write
distill --keep 0 | --keep
distill --nonsense | unrecognized arguments
distill --device quantum | --device quantum
prune --ckpt {files}/junk | cannot be read
prune --scheme junk | not N:M
prune --scheme 3:5 | do not divide
prune --layers 0,1 | go together
prune --criterion indices | go together
prune --layers x --criterion indices | layers
prune --layers=-1,2 --criterion indices | names layer -1
prune --layers 0,4 --criterion indices | names layer 4
prune --layers 0,1,2 --scheme 2:4 --criterion indices | keeps 3 of layers 0 to 3
prune --candidates 0 | --candidates
prune --lora-rank 0 | --lora-rank
prune --steps 1.5 | --steps
prune --model dit-huge | dit-huge
prune --ckpt {files}/plain | add --model
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().split("\n"))
def test_mistakes_get_one_sentence(mistake, latents, teachers, tmp_path):
    (tmp_path / "junk").write_text("hello")
    torch.save(small("dit-tiny").state_dict(), tmp_path / "plain")
    torch.save(dict(args=argparse.Namespace(lr=1), step=1), tmp_path / "release")  # as others save
    command, words = mistake.format(files=tmp_path, teachers=teachers).split(" | ")
    stage, *flags = command.split()
    own = stage_flags(stage, "dit-tiny", latents, teachers, tmp_path / "out", steps=None if "1e308" in flags else 6)
    assert words in user_error(STAGES[stage][0], *own, *flags)


def test_a_mistake_ends_with_exit_code_2(tmp_path):
    done = launch(distill.__file__, "--student", tmp_path / "none.pt", "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}/none.pt does not exist; ")
    assert done.stderr.count("\n") == 1


def test_each_tensor_has_its_type_under_bfloat16(latents, teachers, tmp_path, monkeypatch):
    """What is frozen and multiplied lies in bfloat16; what is trained, drawn, averaged or compared is float32."""
    seen = {}

    def watch(owner, name, key, of_input=False):
        honest = getattr(owner, name)

        def watched(*given, **named):
            result = honest(*given, **named)
            seen.setdefault(key, set()).add((given[1] if of_input else result).dtype)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(model.DiffusionObjective, "loss", "loss")
    watch(model.DiffusionObjective, "kd", "kd")
    watch(distill, "masked_representation_loss", "rep")
    watch(distill, "suppress_massive", "masked states")
    watch(torch.nn.functional, "softmax", "draw")
    watch(model.Mlp, "forward", "activation")
    watch(torch.nn.Sequential, "forward", "time", of_input=True)  # also the conditions of adaLN
    honest = prune.Run.track

    def track(self, optimizer, **contents):
        self.watched = contents | dict(optimizer=optimizer)
        watched.append(self)
        honest(self, optimizer, **contents)

    nets, watched = [], []
    prepare = prune.Run.prepare
    monkeypatch.setattr(prune.Run, "track", track)
    monkeypatch.setattr(prune.Run, "prepare", lambda self, net: nets.append(net) or prepare(self, net))
    for stage, (module, _) in STAGES.items():
        run(module, *stage_flags(stage, "dit-tiny", latents, teachers, tmp_path / stage, steps=2, dtype="bfloat16"))
    search, teacher, student = nets
    half, full = {torch.bfloat16}, {torch.float32}
    linear = lambda net: [m for m in net.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    frozen = lambda net: {p.dtype for m in linear(net) for p in m.parameters()}
    assert frozen(search) == frozen(teacher) == half and frozen(student) == full
    assert {p.dtype for p in search.parameters() if p.requires_grad} == full
    assert teacher.y_embedder.embedding_table.weight.dtype == teacher.pos_embed.dtype == torch.float32
    assert seen.pop("activation") == half and full <= seen.pop("time")
    assert seen == dict.fromkeys(["loss", "kd", "rep", "masked states", "draw"], full)
    masks, average = watched[0].watched["masks"], watched[1].watched["ema"]
    assert masks.average.dtype == torch.float32 and {p.dtype for p in average.parameters()} == full
    for each in watched:
        assert {v.dtype for state in each.watched["optimizer"].state.values() for v in state.values()} == full
    for path in (tmp_path / "prune/shallow.pt", tmp_path / "distill/student.pt"):
        saved = flat(torch.load(path, weights_only=True)).values()
        assert {v.dtype for v in saved if isinstance(v, torch.Tensor)} == full


@family
def test_recomputing_blocks_changes_no_loss(name, latents, teachers, tmp_path):
    """--checkpointing, in both stages, dropout included."""
    for stage, (module, result) in STAGES.items():
        flags = stage_flags(stage, name, latents, teachers, tmp_path / stage, steps=2)
        run(module, *flags)
        want, log = weights_of(tmp_path / stage / result), log_of(tmp_path / stage)
        run(module, *flags, "--checkpointing")
        assert same_weights(weights_of(tmp_path / stage / result), want)
        assert [line.get("loss") for line in log] == [line.get("loss") for line in log_of(tmp_path / stage)]


@slow
def test_two_machines_follow_one(latents, teachers, tmp_path):
    """Two torchrun agents (nnodes=2) on loopback: the losses of one rank, to float tolerance."""
    run(distill, *stage_flags("distill", "dit-tiny", latents, teachers, tmp_path / "one"))
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path / "two")
    start = torchrun(["--nproc_per_node=1"], flags, nodes=2)
    agents = [start(), start()]
    errors = [agent.communicate(timeout=200)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    for line, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-4)


def test_torchruns_restart_resumes_by_itself(latents, teachers, tmp_path, monkeypatch):
    """torchrun --max-restarts starts the same command again: no --resume is needed, also after a node has joined, when
    the count of restarts stays 0."""
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path)
    run(distill, *flags)
    want, lines = weights_of(tmp_path / "student.pt", "ema"), log_of(tmp_path)
    forget_after(3, tmp_path)
    started = (tmp_path / "step-00000003.pt").stat().st_mtime_ns
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    run(distill, *flags)
    assert "would start from there again" in user_error(distill, *flags, "--resume", "never")
    assert (tmp_path / "step-00000003.pt").stat().st_mtime_ns == started  # not written again
    assert same_weights(weights_of(tmp_path / "student.pt", "ema"), want) and len(log_of(tmp_path)) == len(lines)


def tried_twice(test):
    """A machine that is busy may let a real torchrun run out of its time: such a test may fail once."""

    @functools.wraps(test)
    def both(*, tmp_path, **fixtures):
        try:
            test(tmp_path=tmp_path / "first", **fixtures)
        except Exception:
            test(tmp_path=tmp_path / "second", **fixtures)

    return both


@slow
@tried_twice
def test_a_rank_shot_at_random_costs_nothing_but_time(latents, teachers, tmp_path):
    """torchrun --max-restarts with two ranks, of which one is killed at a random moment, twice."""
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path, steps=200)
    agent = torchrun(["--nproc_per_node=2", "--max-restarts=3"], flags)()
    rng = np.random.default_rng()
    for lines in (10, 90):
        wait_for_lines(tmp_path, lines, agent)
        time.sleep(rng.uniform(0, 0.3))
        ranks = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(rng.choice(ranks)), signal.SIGKILL)
    error = agent.communicate(timeout=200)[1]
    assert agent.returncode == 0, error
    assert error.count("exitcode: -9") >= 1 or "SIGKILL" in error or "signal 9" in error.lower(), error[-2000:]
    follows_one_rank(tmp_path, flags)


@slow
@tried_twice
def test_a_machine_that_joins_makes_the_run_wider(latents, teachers, tmp_path):
    """torchrun --nnodes=1:2: the second agent comes when the first has trained for a while; both go on together.

    The variable: agents that share their store give its address at their first start alone, and a new one waits for it.
    """
    flags = stage_flags("distill", "dit-tiny", latents, teachers, tmp_path, steps=300)
    agent_flags = ["--nproc_per_node=1", "--max-restarts=3", "--rdzv-conf=last_call_timeout=1"]
    start = torchrun(agent_flags, flags, nodes="1:2", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    first = start()
    wait_for_lines(tmp_path, 20, first)
    second = start()
    errors = [agent.communicate(timeout=200)[1] for agent in (first, second)]
    assert [agent.returncode for agent in (first, second)] == [0, 0], errors
    follows_one_rank(tmp_path, flags)


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


SHORT = {"dit-tiny": ["--steps", 6], "sit-tiny": ["--steps", 6], "mar-tiny": ["--steps", 3, "--token-steps", 4]}


@family
def test_image_i_is_the_same_in_any_batch(name, teachers, tmp_path):
    flags = ["--ckpt", teachers / f"{name}.pt", "--num-images", 37, *SHORT[name]]
    run(sample, *flags, "--out", tmp_path / "whole")
    run(sample, *flags, "--out", tmp_path / "parts", "--batch-size", 11)
    whole, parts = [np.load(tmp_path / k / "samples.npz") for k in ("whole", "parts")]
    assert whole["arr_0"].shape == (37, 32, 32, 3) and whole["arr_1"].tolist() == [i % 10 for i in range(37)]
    assert whole["arr_0"].std() > 5 and np.abs(whole["arr_0"].astype(int) - parts["arr_0"]).max() <= 1


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_guidance_one_is_the_conditional_network_and_more_is_not(sampler, teachers):
    name = next(n for n in FAMILIES if sampler.startswith(dict(dit="d", sit=("sde", "ode"), mar="mar")[n[:3]]))
    net, _ = model.load_model(ckpt=teachers / f"{name}.pt")
    own = model.MODELS[name]["sampling"] | dict(sampler=sampler, steps=4)
    draw = lambda scale: sample.SAMPLERS[sampler](
        net, torch.arange(4), RowGenerator((0,), 0, 4, 16), **own | dict(guidance=scale))
    with torch.inference_mode():
        assert torch.isfinite(draw(1.0)).all() and not torch.allclose(draw(1.0), draw(3.0), atol=1e-3)
        torch.testing.assert_close(draw(1.0), draw(1.0 + 1e-7), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", model.MODELS)
def test_a_model_s_own_settings_are_what_its_sampler_takes(name):
    own = model.MODELS[name]["sampling"]
    takes = inspect.signature(sample.SAMPLERS[own["sampler"]]).parameters.keys()
    takes |= inspect.signature(sample.integrate_sde).parameters.keys() if "sde" in takes else set()
    assert own.keys() <= takes


def test_sampling_takes_the_weights_asked_for(tmp_path):
    nets = {k: small("dit-tiny") for k in ("ema", "model")}
    nets["model"].final_layer.linear.bias.data += 1
    config = dict(name="dit-tiny", overrides=FAMILIES["dit-tiny"])
    both = {k: net.state_dict() for k, net in nets.items()}
    model.save_checkpoint(tmp_path / "both.pt", **both, config=config)
    torch.save(both, tmp_path / "bare.pt")  # no config: --model says what it is
    for k, net in nets.items():
        run(sample, "--ckpt", tmp_path / "both.pt", "--weights", k, "--export", tmp_path / f"{k}.pt")
        assert same_weights(weights_of(tmp_path / f"{k}.pt"), net.state_dict())
    run(sample, "--ckpt", tmp_path / "both.pt", "--export", tmp_path / "default.pt")
    assert same_weights(weights_of(tmp_path / "default.pt"), nets["ema"].state_dict())


def test_each_rank_writes_a_file_of_its_own_and_the_joined_ones_are_the_single_run(teachers, tmp_path, monkeypatch):
    flags = ["--ckpt", teachers / "dit-tiny.pt", "--num-images", 37, "--steps", 4, "--batch-size", 10, "--out"]
    run(sample, *flags, tmp_path / "single")
    done = launch(sample.__file__, *flags, tmp_path / "torchrun", ranks=2)
    assert done.returncode == 0, done.stderr
    out, found = tmp_path / "ranks", {}
    monkeypatch.setattr(sample, "world_size", lambda: 3)
    for r in (2, 1, 0):  # one after the other: what a rank leaves on a disk that others see
        monkeypatch.setattr(sample, "rank", lambda r=r: r)
        run(sample, *flags, out)
        before, found = found, {p.name: p.read_bytes() for p in out.glob("*")}
        assert r == 0 or found.keys() - before == {f".samples-{r}.tmp"} and before.items() <= found.items()
    assert found.keys() == {"grid.png", "samples.json", "samples.npz"}
    single, *others = [np.load(tmp_path / k / "samples.npz") for k in ("single", "torchrun", "ranks")]
    for other in others:
        assert (single["arr_1"] == other["arr_1"]).all()
        assert np.abs(single["arr_0"].astype(int) - other["arr_0"]).max() <= 1
    (out / ".samples-1.tmp").write_bytes(b"")  # as if rank 1 had written to a folder that rank 0 does not see
    assert "holds 12 of 37 images" in user_error(sample, *flags, out)


def test_samples_are_joined_as_numpy_would(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    (tmp_path / ".samples-0.tmp").write_bytes(images.tobytes())
    sample.join_parts(tmp_path, np.arange(5), 16)
    with np.load(tmp_path / "samples.npz") as saved:
        assert (saved["arr_0"] == images).all() and saved["arr_1"].tolist() == [0, 1, 2, 3, 4]
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


@slow
def test_compiled_images_are_the_eager_ones(teachers, tmp_path, monkeypatch):
    """11 images in batches of 4: the last is filled up and not compiled anew."""
    shapes, images = set(), []
    draw = sample.sample_images
    monkeypatch.setattr(sample, "sample_images", lambda net, vae, y, *a: (shapes.add(len(y)), draw(net, vae, y, *a))[1])
    for flags in ([], ["--compile"]):
        shapes.clear()
        run(sample, "--ckpt", teachers / "dit-tiny.pt", "--num-images", 11, "--steps", 4, "--batch-size", 4,
            "--out", tmp_path, *flags)
        images.append(np.load(tmp_path / "samples.npz")["arr_0"].astype(int))
    assert shapes == {4} and images[1].shape == (11, 32, 32, 3) and np.abs(images[0] - images[1]).max() <= 1


def test_bfloat16_weights_are_cast_once_and_samplers_stay_in_float32(teachers, monkeypatch):
    net, _ = model.load_model(ckpt=teachers / "dit-tiny.pt")
    model.cast_frozen(net.requires_grad_(False), torch.bfloat16)
    assert net.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16 and net.pos_embed.dtype == torch.float32
    types, step = [], sample.ancestral_step
    monkeypatch.setattr(sample, "ancestral_step", lambda process, out, x, *a, **k: (
        types.append((out.dtype, x.dtype)), step(process, out, x, *a, **k))[1])
    vae = load_vae("digits")
    settings = model.MODELS["dit-tiny"]["sampling"] | dict(steps=3)
    images = [sample.sample_images(net, vae, np.arange(4), 0, settings, 0, torch.device("cpu"), torch.bfloat16)]
    assert set(types) == {(torch.float32, torch.float32)} and images[0].shape == (4, 32, 32, 3)


@pytest.mark.parametrize("suffix, dtype", [("safetensors", "float32"), ("safetensors", "bfloat16"), ("pt", "float16")])
def test_export_loads_as_an_official_file(suffix, dtype, teachers, tmp_path):
    run(sample, "--ckpt", teachers / "dit-tiny.pt", "--export", tmp_path / f"w.{suffix}", "--export-dtype", dtype)
    net, config = model.load_model(ckpt=teachers / "dit-tiny.pt")
    want = {k: v.to(getattr(torch, dtype)) for k, v in net.state_dict().items()}
    assert same_weights(model.read_state(tmp_path / f"w.{suffix}")[0], want)
    again, same = model.load_model(ckpt=tmp_path / f"w.{suffix}")
    assert same_weights(again.state_dict(), {k: v.float() for k, v in want.items()}) and same == config


def test_the_grid_has_a_row_per_class():
    images = np.stack([np.full((32, 32, 3), 10 * (i % 3), np.uint8) for i in range(9)])
    grid = np.asarray(sample.grid_of(images, np.arange(9) % 3))
    assert grid.shape[0] == 2 * (3 * 34 + 2) and [grid[2 * (2 + 34 * r) + 20, 30, 0] for r in range(3)] == [0, 10, 20]


@pytest.mark.parametrize("flags, words", [
    ("--temperature 0.9", "--temperature 0.9 does not apply: dit-tiny takes --sampler, --steps, --guidance"),
    ("--sampler ode-heun", "samplers ddpm, ddim"),
    ("--steps 1", "2 to 1000"),
    ("--steps 0", "'0' is not a whole number of at least 1"),
    ("--steps ddim0", "give 2 to 1000"),
    ("--steps ten", "'ten' is not a whole number"),
    ("--num-images 0", "of at least 1"),
    ("--guidance nan", "'nan' is not a number of at least 0"),
    ("--guidance-channels 9", "has 4"),
    ("--classes=", "'' is not a whole number"),
    ("--classes 3,-1", "'-1' is not a whole number"),
    ("--classes 3,11", "classes 0 to 9"),
    ("--seed -1", "of at least 0"),
    ("--model sit-tiny", "holds dit-tiny"),
    ("--model mar-tiny --ckpt {mar} --token-steps ten", "'ten' is not"),
    ("--model mar-tiny --ckpt {mar} --temperature -1", "'-1' is not a number of at least 0"),
    ("--model mar-tiny --ckpt {mar} --steps ddim50", "--steps ddim50 does not apply"),
    ("--model mar-tiny --ckpt {mar} --compile", "leave it out"),
    ("--model sit-tiny --ckpt {sit} --steps 1", "2 or more"),
    ("--model sit-tiny --ckpt {sit} --last-step-size 0", "above 0"),
    ("--model nothing", "no model is called"),
    ("--ckpt out/nowhere/student.pt", "does not exist; distill.py writes it"),
    ("--vae kl16", "leave it out"),
    ("--out {mar}", "choose another --out")])
def test_sampling_mistakes_get_one_sentence(flags, words, teachers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "load_vae", lambda name, *a: argparse.Namespace(config=VAES[name], factor=4))
    flags = flags.format(mar=teachers / "mar-tiny.pt", sit=teachers / "sit-tiny.pt").split()
    ckpt = ["--ckpt", teachers / "dit-tiny.pt"] if "nothing" not in flags else []
    assert words in user_error(sample, *ckpt, "--out", tmp_path, "--num-images", 2, *flags)


@pytest.mark.parametrize("name", ["dit-tiny", "sit-tiny", "mar-tiny"])
def test_bundled_weights_draw_the_digit_asked_for(name, tmp_path):
    """50 samples in 32 steps, judged by the digit classifier; the README measures 1,000."""
    run(sample, "--model", name, "--num-images", 50, "--steps", 32, "--out", tmp_path)
    assert fid.evaluate(tmp_path / "samples.npz", "digits", features="digits")["accuracy"] >= 0.9


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


# ---------------------------------------------------------------------------------------------------------------------
# The README and the house.

README = (ROOT / "README.md").read_text()
STAGES_OF_README = dict(extract_latents=extract_latents, prune=prune, distill=distill, sample=sample, fid=fid)


def commands_of(text):
    """The stages that a text's code blocks call: (stage, flags)."""
    lines = re.findall(r"^(?:torchrun \S+|python) +(\w+)\.py *([^#\n]*)", text, re.M)
    return [(name, flags.split()) for name, flags in lines if name in STAGES_OF_README]


def test_every_command_of_the_readme_parses(monkeypatch):
    class Parsed(Exception):
        pass

    def stop(*_, **__):
        raise Parsed

    commands = commands_of(README) + [c for m in STAGES_OF_README.values() for c in commands_of(
        "\n".join(line.strip() for line in m.__doc__.splitlines()))]
    assert len(commands) > 30
    for name, flags in commands:
        module = STAGES_OF_README[name]
        monkeypatch.setattr(module, "setup" if name == "fid" else "start_ranks", stop)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        with pytest.raises(Parsed):
            module.main()


def test_what_the_readme_names_exists():
    sources = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("reproduce/*")] if path.is_file())
    for file in set(re.findall(r"(?<![\w/.-])((?:reproduce|docs|data)/[\w./-]+\w|\w+\.py)\b", README)):
        assert (ROOT / file).exists() or file == "my_idea.py", file
    torchruns = {"nproc_per_node", "nnodes", "max-restarts", "signals-to-handle", "shutdown-timeout", "log-dir"}
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", README)) - torchruns:
        assert f'"--{flag}"' in sources, flag
    for word in set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", README)):
        assert (ROOT / word).exists() or re.search(rf"\b{word.split('.')[-1]}\b", sources), word


def test_the_code_in_the_readme_is_the_code_that_runs(latents, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    lesson = "\n".join(line.strip() for line in (ROOT / "prune.py").read_text().splitlines())
    listing = next(block for block in blocks if "CRITERIA" in block)
    for block in blocks:
        if block is not listing:
            assert "\n".join(line.strip() for line in block.strip().splitlines()) in lesson, block
    monkeypatch.setattr(prune, "CRITERIA", dict(prune.CRITERIA))
    monkeypatch.setattr(sys, "argv", ["my_idea.py", *f"--criterion size --latents {latents} --out {tmp_path}".split()])
    exec(listing, {})
    config = torch.load(tmp_path / "shallow.pt", weights_only=True)["config"]
    net, _ = model.load_model("dit-tiny")
    size = [sum(p.square().sum().item() for p in layer.parameters()) for layer in net.layers()]
    assert config["kept"] == [max((i, i + 1), key=size.__getitem__) for i in range(0, 12, 2)]
    assert len(listing.splitlines()) <= 20


def test_the_tables_of_the_readme_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("report", ROOT / "reproduce/report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert README.count("<!-- report ") >= 2 and report.fill(README) == README
    assert (ROOT / "docs/results/README.md").read_text() == report.page()


def test_imports_follow_the_pipeline():
    first = ["model", "extract_latents"]
    order = dict(model=[], extract_latents=["model"], prune=first, sample=first,
                 distill=[*first, "prune"], fid=[])
    for name, allowed in order.items():
        imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M))
        assert imported & set(order) <= set(allowed), name
        assert imported - set(order) <= set(sys.stdlib_module_names) | {"torch", "numpy", "PIL", "scipy"}, name
