"""Every test, in the pipeline's order. `pytest test_all.py` takes minutes; SLOW=1 adds the full-size networks (12 GB).

Reference values (data/test_goldens.npz) were computed with the official DiT, SiT, MAR, TinyFusion, VAE and FID code on
weights that `fill` reproduces from the tensors' names. A test states a fact, not that a function returns.
"""
import argparse
import copy
import http.server
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
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
GOLDENS = np.load(ROOT / "data/test_goldens.npz")
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="SLOW=1 runs the full-size networks")
torch.set_num_threads(1)
sys.path.append(str(ROOT / "reproduce"))


def golden(case):
    """The arrays of a reference case: in.* are inputs, out.* what the official code made of them."""
    names = [name for name in GOLDENS if name.startswith(case + "/")]
    return {name.removeprefix(case + "/"): torch.from_numpy(GOLDENS[name]) for name in names}


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
    got, want = torch.atleast_1d(torch.as_tensor(got), torch.as_tensor(want))
    assert got.shape == want.shape
    for row, wanted in zip(got, want):
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
    """A latent folder of 96 random images, 10 classes, with mirror images, in the format of extract_latents.py."""
    folder = tmp_path_factory.mktemp("latents")
    moments = np.random.default_rng(0).standard_normal((96, 2, 8, 8, 8)).astype(np.float16)
    moments[:, :, 4:] = 0.1 * np.abs(moments[:, :, 4:])  # the standard deviations
    np.save(folder / "moments.npy", moments)
    np.save(folder / "labels.npy", np.arange(96) % 10)
    meta = dict(complete=True, shape=[4, 8, 8], scale=0.9, classes=list("0123456789"))
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
    stage.main(list(map(str, flags)))


def launch(*command, ranks=0):
    """A stage as a process of its own, under torchrun if ranks are given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *torchrun, *map(str, command)]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


# A stage that is killed before its third checkpoint or shard has its name.
KILLED = """
import os, signal, sys
sys.path.insert(0, "{root}")
import torch
import model, {stage}

torch.set_num_threads(1)
model.MODELS["mar-tiny"]["shape"]["dropout"] = 0.1
replace = os.replace

def replace_or_die(source, target):
    if target.name in ("step-00000003.pt", "00000500.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
{stage}.main()
"""


def launch_killed(stage, *flags):
    killed = launch("-c", KILLED.format(stage=stage, root=ROOT), *flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def user_error(stage, *flags):
    """The one sentence with which a stage ends."""
    with pytest.raises(UserError) as raised:
        run(stage, *flags)
    return str(raised.value)


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def weights_of(path, which="model"):
    return torch.load(path, weights_only=True)[which]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------------
# model.py: networks.


def near_goldens(g, tolerance=1e-5, **outputs):
    for name, got in outputs.items():
        near(got, g[f"out.{name}"], tolerance)


def layer_outputs(net) -> list:
    """The outputs of all layers, once the network has run."""
    outputs = []
    for layer in net.layers():
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    return outputs


def some_batch(net, seed=0):
    """A training batch of 8 random latents that fit the network."""
    rng = RowGenerator((seed,), 0, 8, 8)
    x = rng.normal(net.channels, net.input_size, net.input_size)
    return net.objective().make_batch(x, torch.arange(8) % net.classes, rng)


def answer(net, batch):
    return net.objective().predict(net, batch)


@torch.no_grad()
@pytest.mark.parametrize("name, case, shape", [
    ("dit-tiny", "dit_small_forward", dict(DIT_GOLDEN, depth=4)),
    ("sit-tiny", "sit_small_forward", dict(DIT_GOLDEN, depth=4)),
    pytest.param("dit-xl", "dit_xl2_forward", {}, marks=slow),
    pytest.param("sit-xl", "sit_xl2_forward", {}, marks=slow),
])
def test_forward_of_dit_and_sit(name, case, shape):
    g = golden(case)
    net = fill(build_model(name, **shape))
    outputs = layer_outputs(net)
    near_goldens(g, output=net(g["in.x"], g["in.t"], g["in.y"]))
    for i, output in enumerate(outputs):  # stored of some blocks; of the full-size networks only some values
        block = f"out.block_{i:02}"
        if block in g:
            near(output, g[block])
        if f"{block}_slice" in g:
            near(output[:, ::16, ::64], g[f"{block}_slice"])
    if "out.output_cfg" in g:
        predict = sample.guided(net, g["in.y_cfg"], scale=1.5, channels=3)
        near(predict(g["in.x_cfg"][:2], g["in.t_cfg"][:2]), g["out.output_cfg"][:2])


def places(mask):
    """Where a mask (B, T) is true, the same number of times in each row: (B, K)."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


@torch.no_grad()
@pytest.mark.parametrize("name, case, shape", [
    ("mar-tiny", "mar_small_forward", dict(MAR_GOLDEN, patch=1)),
    pytest.param("mar-large", "mar_large_forward", {}, marks=slow),
])
def test_forward_of_mar(name, case, shape):
    g = golden(case)
    net = fill(build_model(name, **shape))
    outputs = layer_outputs(net)
    known = places(g["in.mask"] == 0)
    tokens = net.patchify(g["in.latents"])
    encoder = net.encode(tokens, g["in.y"], known)
    z = net.decode(encoder, known)
    if name == "mar-large":  # stored are some values
        near_goldens(g, encoder_slice=encoder[:, ::8, ::16], z_slice=z[:, ::16, ::16])
        near_goldens(g, 2e-5, net_output=net.diffloss.net(g["in.x_net"], g["in.t_net"], z[0, g["in.rows"]]))
        return
    net_output = net.diffloss.net(g["in.x_net"], g["in.t"], z.flatten(0, 1))
    near_goldens(g, tokens=tokens, unpatchified=net.unpatchify(tokens), encoder=encoder, z=z, net_output=net_output)
    near_goldens(g, enc_block_0=outputs[0], enc_block_1=outputs[1], dec_block_0=outputs[2], dec_block_1=outputs[3])
    near_goldens(g, encoder_uncond=net.encode(tokens, torch.tensor([10, 10]), known))  # 10: no label


@pytest.mark.parametrize("name, case, depth", [
    ("dit-xl", "DiT-XL-2-256", None),
    ("dit-l", "DiT-L-2-256", None),
    ("dit-b", "DiT-B-2-256", None),
    ("dit-s", "DiT-S-2-256", None),
    ("dit-xl-512", "DiT-XL-2-512", None),
    ("dit-xl", "DiT-D19-2-256", 19),
    ("dit-d14", "DiT-D14-2-256", None),
    ("dit-d14", "DiT-D7-2-256", 7),
    ("sit-xl", "SiT-XL-2-256", None),
    ("mar-base", "mar_base", None),
    ("mar-large", "mar_large", None),
    ("mar-huge", "mar_huge", None),
])
def test_keys_and_shapes_are_the_official_ones(name, case, depth):
    with torch.device("meta"):
        net = build_model(name, depth)
    shapes = {key: list(v.shape) for key, v in net.state_dict().items()}
    assert shapes == json.loads(bytes(GOLDENS[f"manifests/{case}"]))


@torch.no_grad()
def test_adaln_zero_is_the_identity_at_the_start():
    for name in FAMILIES:
        net = build_model(name)
        outputs = layer_outputs(net)
        assert answer(net, some_batch(net)).abs().max() == 0
        if name != "mar-tiny":  # whose adaLN is in the token denoiser alone
            assert torch.equal(outputs[0], outputs[-1])


def test_a_token_of_mar_is_a_patch_of_all_channels():
    x = torch.randn(2, 4, 8, 8)
    net = build_model("mar-tiny")
    tokens = net.patchify(x)
    assert torch.equal(tokens[:, 1], x[:, :, 0:2, 2:4].flatten(1))
    assert torch.equal(net.unpatchify(tokens), x)


@family
def test_a_layer_remembers_its_index_in_the_first_network(name):
    net = small(name)
    layers = net.layers()
    for unknown in (-1, 4):
        with pytest.raises(IndexError, match="layers 0 to 3"):
            net.keep_layers([0, unknown])
    net.keep_layers([1, 2, 3])
    net.keep_layers([2, 0])
    assert net.layers() == [layers[1], layers[3]]
    assert net.depths() == ([1, 1] if name == "mar-tiny" else [2])
    assert net.original_indices() == [1, 3]


@family
@torch.no_grad()
def test_what_is_frozen_is_cast_once_which_changes_no_bit(name):
    net = small(name)
    frozen = small(name).requires_grad_(False)
    frozen.layers()[1].requires_grad_(True)
    model.cast_frozen(frozen, torch.bfloat16)
    assert [layer.mlp.fc1.weight.dtype for layer in frozen.layers()[:2]] == [torch.bfloat16, torch.float32]
    with model.autocast("cpu", torch.bfloat16):
        batch = some_batch(net)
        assert torch.equal(answer(net, batch), answer(frozen, batch))


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the Gaussian process.


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules(schedule):
    g = golden("gaussian_schedules")
    process = model.GaussianDiffusion(schedule)
    tables = vars(process) | dict(
        betas=process.log_betas.exp(),
        alphas_cumprod=process.sqrt_alphas_cumprod**2,
        posterior_log_variance_clipped=process.posterior_log_variance,
    )
    for key, table in tables.items():
        if f"out.{schedule}_{key}" in g:
            near(table[g["in.indices"]], g[f"out.{schedule}_{key}"], 1e-10)


@pytest.mark.parametrize("respacing", ["250", "64", "ddim50"])
def test_respacing(respacing):
    g = golden("gaussian_schedules")
    process = model.GaussianDiffusion("linear", respacing)
    assert process.timestep_map == g[f"out.timesteps_{respacing}"].tolist()
    near(process.log_betas.exp(), g[f"out.respaced_betas_{respacing}"], 1e-10)
    assert model.respace("ddim30")[1] == 34
    for impossible in ("1001", "ddim600"):
        with pytest.raises(UserError, match="give 2 to 1000"):
            model.respace(impossible)


@pytest.mark.parametrize("case, schedule, respacing, temperature, sampled", [
    ("gaussian_p_mean_variance", "linear", "250", 1.0, "out.p_sample"),
    ("mar_head_psample", "cosine", "100", 0.9, "out.sample"),
])
def test_a_sampling_step(case, schedule, respacing, temperature, sampled):
    g = golden(case)
    out = g["in.model_output"]
    x = g["in.x"]
    t = g["in.t"]
    process = model.GaussianDiffusion(schedule, respacing)
    mean, log_variance, x_start = process.p_mean_variance(out, x, t)
    near_goldens(g, mean=mean, log_variance=log_variance, pred_xstart=x_start)
    eps = golden_noise(1000, *x.shape).float()
    near(sample.ancestral_step(process, out, x, t, eps, temperature), g[sampled])


# ---------------------------------------------------------------------------------------------------------------------
# model.py: training objectives.


def test_training_loss_of_dit():
    g = golden("gaussian_training_losses")
    process = model.GaussianDiffusion()
    out = g["in.model_output"].requires_grad_()
    x_t = process.q_sample(g["in.x_start"], g["in.t"], g["in.noise"])
    loss = process.loss(out, g["in.x_start"], x_t, g["in.t"], g["in.noise"])
    bound = process.variance_bound(out, g["in.x_start"], x_t, g["in.t"])
    near_goldens(g, x_t=x_t, loss=loss, vb=bound)
    bound.sum().backward()
    of_mean, of_variance = out.grad.chunk(2, dim=1)
    assert of_mean.abs().max() == 0 < of_variance.abs().max()


@torch.no_grad()
def test_training_loss_of_sit():
    g = golden("sit_transport_loss")
    net = fill(build_model("sit-tiny", 4, **DIT_GOLDEN))
    batch = dict(x_t=g["out.xt"], t=g["in.t"], velocity=g["out.ut"], y=g["in.y"])
    out = net.objective().predict(net, batch)
    t = g["in.t"].view(4, 1, 1, 1).clamp(max=0.99)
    score = sample.score_of(out, g["out.xt"], t)
    near_goldens(g, pred=out, loss=net.objective().loss(out, batch), score=score)


@torch.no_grad()
def test_training_loss_of_mar():
    g = golden("mar_small_forward")
    net = fill(build_model("mar-tiny", **MAR_GOLDEN, patch=1))
    mask = g["in.mask"].repeat(2, 1)  # the release repeats a batch to use it at two times
    hidden = places(mask == 1)
    tokens = net.patchify(g["in.latents"]).repeat(2, 1, 1)
    x_start = gather_tokens(tokens, hidden)[:, None]  # (B, 1, M, C)
    eps = gather_tokens(g["in.noise_mul2"].view(4, 16, 4), hidden)[:, None]
    t = g["in.t_mul2"].view(4, 16).gather(1, hidden)[:, None]
    x_t = noised_tokens(x_start, t, eps)
    batch = dict(tokens=tokens, y=g["in.y"].repeat(2), known=places(mask == 0), hidden=hidden,
                 x_start=x_start, x_t=x_t, t=t, eps=eps)
    loss = net.objective().loss(net.objective().predict(net, batch), batch)
    near_goldens(g, forward_loss_mul2=loss.mean())


def noised_tokens(x_start, t, eps):
    process = model.GaussianDiffusion("cosine")
    return process.q_sample(x_start.flatten(0, 2), t.flatten(), eps.flatten(0, 2)).view_as(eps)


def test_x_t_is_what_the_process_makes_of_data_and_noise():
    batch = some_batch(build_model("dit-tiny"))
    assert torch.equal(batch["x_t"], model.GaussianDiffusion().q_sample(batch["x_start"], batch["t"], batch["eps"]))

    batch = some_batch(build_model("sit-tiny"))
    x = RowGenerator((0,), 0, 8, 8).normal(4, 8, 8)
    near(batch["x_t"] + (1 - batch["t"].view(8, 1, 1, 1)) * batch["velocity"], x)  # t = 1 is data

    batch = some_batch(build_model("mar-tiny"))
    x_start = gather_tokens(batch["tokens"], batch["hidden"])
    assert torch.equal(batch["x_start"][:, 3], x_start)  # each token at four times
    assert torch.equal(batch["x_t"], noised_tokens(batch["x_start"], batch["t"], batch["eps"]))


@family
def test_times_are_uniform_and_a_tenth_of_the_labels_is_dropped(name):
    rng = RowGenerator((3,), 0, 4096, 4096)
    batch = build_model(name).objective().make_batch(torch.zeros(4096, 4, 8, 8), torch.arange(4096), rng)
    t = batch["t"] / (1 if name == "sit-tiny" else 999)
    assert 0 <= t.min() < 0.01 < 0.99 < t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.02
    dropped = batch["y"] == 10
    assert abs(dropped.float().mean() - 0.1) < 0.015


def test_mar_hides_70_to_100_percent_of_the_tokens():
    """A normal distribution around 100 %, of standard deviation 25 %, truncated: 86.7 % on average."""
    net = build_model("mar-tiny", input_size=32)
    shares = []
    for seed in range(300):
        batch = some_batch(net, seed)
        tokens = torch.cat([batch["known"], batch["hidden"]], dim=1)
        assert torch.equal(tokens.sort(dim=1)[0], torch.arange(256).expand(8, -1))
        shares.append(batch["hidden"].shape[1] / 256)
    assert not torch.equal(*batch["hidden"][:2])  # each row has an order of its own
    assert min(shares) >= 0.7
    assert abs(np.mean(shares) - 0.867) < 0.015


# ---------------------------------------------------------------------------------------------------------------------
# model.py: checkpoints.


@pytest.mark.parametrize("nesting", ["ema", "model", "model_ema", "state_dict"])
def test_official_formats(nesting, tmp_path):
    """Weights under any of these names, from DDP, beside arguments, and with options that we had once."""
    state = small("dit-tiny").state_dict()
    parameters = {f"module.{key}": torch.nn.Parameter(v) for key, v in state.items()}
    config = dict(name="dit-tiny", overrides=dict(width=36))
    args = argparse.Namespace(lr=1)
    torch.save({nesting: parameters, "args": args, "config": config}, tmp_path / "w.pth")
    net, found = model.load_model(ckpt=tmp_path / "w.pth")
    assert same_weights(net.state_dict(), state)
    assert found == dict(config, depth=[4])
    assert not net.training


def test_safetensors(tmp_path):
    """Header length, JSON header, values: also at odd addresses, as other people's files have them."""
    path = tmp_path / "w.safetensors"
    header = b'{"w": {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]}}'
    state = dict(w=torch.randn(3, 1))
    path.write_bytes(len(header).to_bytes(8, "little") + header + state["w"].numpy().tobytes())
    assert same_weights(model.read_state(path)[0], state)
    model.write_safetensors(path, state, dict(name="dit-tiny"))
    found, config = model.read_state(path)
    assert same_weights(found, state)
    assert config == dict(name="dit-tiny")


@torch.no_grad()
@pytest.mark.parametrize("name, shape", [
    ("dit-tiny", dict(depth=3)),
    ("sit-tiny", dict(depth=1)),
    ("mar-tiny", dict(depth=[0, 3], loss_width=24, loss_depth=3, buffer=5)),
])
def test_a_network_s_shape_is_read_from_its_file(name, shape, tmp_path, monkeypatch):
    """Other people's networks fit; an entry says heads and, for MAR, the patch."""
    entry = model.MODELS[name]
    monkeypatch.setitem(model.MODELS, "own", entry | dict(shape=entry["shape"] | dict(heads=4, patch=4)))
    net = fill(build_model("own", width=32, input_size=16, channels=6, classes=7, **shape))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    loaded, _ = model.load_model("own", tmp_path / "w.pt")
    assert loaded.classes == 7
    batch = some_batch(net)
    assert torch.equal(answer(net, batch), answer(loaded, batch))


@pytest.mark.parametrize("damage", ["missing key", "wrong shape", "truncated", "empty", "not a checkpoint"])
def test_a_damaged_file_is_one_sentence(damage, tmp_path):
    path = tmp_path / "w.safetensors"
    state = small("dit-tiny").state_dict()
    if damage == "missing key":
        del state["final_layer.linear.bias"]
    if damage == "wrong shape":
        state["final_layer.linear.bias"] = torch.zeros(3)
    model.write_safetensors(path, state, {})
    if damage == "truncated":
        os.truncate(path, 100_000)
    if damage == "empty":
        path = tmp_path / "w.pt"
        path.touch()
    if damage == "not a checkpoint":
        path = Path(__file__)
    with pytest.raises(UserError, match=f"^{path} cannot be read.*give another file$"):
        model.load_model("dit-tiny", path)


@pytest.mark.parametrize("config, name, words", [
    (dict(name="sit-tiny"), "dit-tiny", "holds sit-tiny, not dit-tiny"),
    (dict(name="stable-diffusion"), None, "'stable-diffusion', which is not in the table of models; add --model"),
    ("sd_v1", None, "does not say what it holds; add --model"),
    ({}, "dit-huge", "no model is called 'dit-huge'; there are dit-xl,"),
    ({}, "mar-tiny", "w.pt cannot be read"),
])
def test_a_file_of_another_model(config, name, words, tmp_path):
    model.save_checkpoint(tmp_path / "w.pt", model=small("sit-tiny").state_dict(), config=config)
    with pytest.raises(UserError, match=words):
        model.load_model(name, tmp_path / "w.pt")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickled_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=dict(w=torch.ones(2)), x=Bomb()), "w.pt")
    with pytest.raises(UserError, match="w.pt cannot be read"):
        model.read_state("w.pt")
    assert os.listdir() == ["w.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# model.py: downloads, how a run ends, random numbers.


@pytest.fixture
def server():
    """Serves 100 bytes; of /broken, only the first half arrives; /missing is not there."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if self.path == "/missing" else 200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(bytes(50 if self.path == "/broken" else 100))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("module, fetch", [(model, lambda url: model.fetch(Path(url).name, url)), (fid, fid.fetch)])
def test_a_download_is_whole_or_absent_and_made_once(module, fetch, server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for page, words in (("broken", "50 out of 100 bytes"), ("missing", "404")):
        with pytest.raises(module.UserError, match=f"cannot download {server}/{page} .*{words}.*{tmp_path}"):
            fetch(f"{server}/{page}")
        assert os.listdir(tmp_path / "weights") == []
    path = fetch(f"{server}/w.pt")
    assert path.read_bytes() == bytes(100)
    path.write_bytes(b"mine")
    assert fetch(f"{server}/w.pt").read_bytes() == b"mine"


def test_one_rank_of_a_machine_downloads(server, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "ROOT", tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not model.fetch("w.pt", f"{server}/w").exists()


def test_a_user_s_mistake_is_one_sentence_and_exit_code_2(capsys):
    def mistaken():
        raise UserError("this is\nwrong; do that")

    with pytest.raises(SystemExit) as ended:
        model.run_main(mistaken)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: this is wrong; do that\n"


def test_auto_takes_no_emulated_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert model.choose_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("draw, mean, std", [("normal", 0, 1), ("uniform", 0.5, 0.289), ("gumbel", 0.577, 1.283)])
def test_a_row_s_random_numbers_do_not_depend_on_who_draws_them(draw, mean, std):
    def rows(key, start, stop):
        rng = RowGenerator(key, start, stop, block=16)
        return getattr(rng, draw)(3)

    whole = rows((7, 1), 0, 5000)
    assert abs(whole.mean() - mean) < 0.04
    assert abs(whole.std() - std) < 0.04
    assert torch.equal(rows((7, 1), 20, 37), whole[20:37])
    assert not torch.equal(rows((7, 2), 0, 5000), whole)


def test_seeds_never_change():
    assert make_seed(0, 1) == 2918264622725855778


# ---------------------------------------------------------------------------------------------------------------------
# sample.py: the samplers, against those of the releases.


class GoldenNoise:
    """In place of a RowGenerator of two rows: what the official samplers drew, from a new seed each time."""

    def __init__(self, *seeds, orders=None):
        self.seeds = itertools.chain(seeds, itertools.count(1000))
        self.orders = orders

    def normal(self, *shape):
        return golden_noise(next(self.seeds), 2, *shape).float()

    def uniform(self, tokens):
        return self.orders.argsort(dim=1).float()


@torch.no_grad()
@pytest.mark.parametrize("case, sampler, settings", [
    ("dit_loop_ancestral", "ddpm", {}),
    ("dit_loop_ddim", "ddim", dict(steps="ddim50")),
    ("dit_loop_ddim_plain", "ddim", dict(steps=50)),
    ("sit_ode_euler", "ode-euler", {}),
    ("sit_ode_heun2", "ode-heun", {}),
    ("sit_ode_dopri5", "ode-dopri5", {}),
    ("sit_sde_euler", "sde-euler", {}),
    ("sit_sde_heun", "sde-heun", {}),
    ("sit_sde_euler_linear_tweedie", "sde-euler", dict(diffusion_form="linear", last_step="tweedie")),
    ("sit_sde_euler_decreasing_euler", "sde-euler", dict(diffusion_form="decreasing", last_step="euler")),
    ("sit_sde_euler_sigma_none", "sde-euler", dict(last_step="none")),
])
def test_samplers_of_dit_and_sit(case, sampler, settings):
    g = golden(case)
    net = fill(build_model(f"{case[:3]}-tiny", 4, **DIT_GOLDEN))
    settings = dict(steps=20, guidance=1.5, guidance_channels=3) | settings
    rng = GoldenNoise(503 if "sit" in case else 221)
    x = sample.SAMPLERS[sampler](net, g["in.y"][:2], rng, sampler, **settings)
    near(x, g["out.final"], 5e-4 if "dopri5" in case else 1e-5)  # it places steps of its own


def test_rounds_of_mar():
    g = golden("mar_mask_schedule")
    for rounds in (8, 64):
        assert sample.mar_schedule(256, rounds)[:-1] == g[f"out.masked_at_start_{rounds}"].tolist()
    assert sample.mar_schedule(3, 64) == [3, 2, 1, 0]  # more rounds than tokens


@torch.no_grad()
@pytest.mark.parametrize("case, token_steps, guidance, schedule", [
    ("mar_sample_cfg", "8", 2.0, "linear"),
    ("mar_sample_cfg_strided", "ddim8", 2.0, "linear"),
    ("mar_sample_cfgconst_strided", "ddim8", 2.0, "constant"),
    ("mar_sample_nocfg_strided", "ddim8", 1.0, "linear"),
])
def test_sampler_of_mar(case, token_steps, guidance, schedule):
    g = golden(case)
    net = fill(build_model("mar-tiny", **MAR_GOLDEN, patch=1))
    seeds = []  # of round k: its noise, and that of its 8 steps
    for k in range(4):
        seeds += [2000 + k, *range(1000 + 8 * k, 1008 + 8 * k)]
    rng = GoldenNoise(*seeds, orders=g["in.orders"])
    x = sample.SAMPLERS["mar"](net, g["in.y"], rng, "mar", 4, guidance, schedule, 1.0, token_steps)
    near(x, g["out.latents"])


@pytest.mark.parametrize("form", sample.DIFFUSION_FORMS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_every_diffusion_form_samples_the_data(form, method):
    """Data N(2, 0.5^2): its exact velocity is known, and every reverse SDE must end in that distribution."""
    def velocity(x, t):
        t = t.view(-1, 1)
        variance = (0.5 * t) ** 2 + (1 - t) ** 2
        return 2 + (0.25 * t - (1 - t)) / variance * (x - 2 * t)

    def draw_eps():
        return torch.randn(4000, 1)

    torch.manual_seed(0)
    x = sample.integrate_sde(velocity, draw_eps(), 500, draw_eps, method, form, last_step_size=0.01)
    assert abs(x.mean() - 2) < 0.04 and abs(x.std() - 0.5) < 0.04


def test_dopri5_reaches_its_tolerance():
    """dx/dt = -3x + t has a closed form."""
    x0 = torch.linspace(-2, 2, 8)[:, None]
    x = sample.integrate_ode(lambda x, t: -3 * x + t.view(-1, 1), x0, 2, "dopri5", atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x, (x0 + 1 / 9) * np.exp(-3) + 1 / 3 - 1 / 9, atol=1e-4, rtol=1e-4)


def test_dopri5_of_a_network_that_diverged_is_one_sentence():
    with pytest.raises(UserError, match="t = 0.000 is not finite"):
        sample.integrate_ode(lambda x, t: x * np.nan, torch.ones(2, 1), 2, "dopri5")


# ---------------------------------------------------------------------------------------------------------------
# extract_latents.py


def manifest_vae(name):
    """The names of an official file's weights, with tensors of their shapes."""
    state = {}
    for line in GOLDENS[f"manifest/{name}"]:
        key, shape = line.decode().split()
        state[key] = torch.empty([int(side) for side in shape.split(",")])
    return state


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """60 digits as an .npz, which are encoded in shards of 20."""
    monkeypatch.setitem(VAES["digits"], "shard", 20)
    return write_digits(tmp_path / "digits.npz", 0, 60)


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
    difference = center_crop(image, 64).astype(int) - GOLDENS[f"center_crop/out.{width}x{height}_to_64"]
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
    order = ("n00000007/10.png", "n00000007/9.PNG", "n00000007/sub/0.png", "n00000008/x.png", "n00000010/y.png",
             "n00000010/z.png")  # ImageFolder's
    for k, name in enumerate(order):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[k]).save(data / name)
    os.truncate(data / "n00000010/y.png", 120)
    (data / "n00000007/9.PNG").write_text("a page of HTML")
    (data / "n00000010/notes.txt").write_text("not an image")
    (data / "n00000010/._z.png").write_text("of macOS")
    (data / ".cache").mkdir()
    return data


def test_extract_folder_order_and_unreadable_images(tmp_path, photos, capsys):
    extract(photos, tmp_path / "out")
    printed = capsys.readouterr()
    assert "latents of 4 images of 3 classes" in printed.out
    assert ".cache is no class" in printed.err and "--class-list" in printed.err
    latents = Latents(tmp_path / "out")
    for problem, name in zip(latents.meta["skipped"], ("9.PNG", "y.png"), strict=True):
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
        (photos / f"n00000007/bad{k}.png").write_text("")
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
    flags = ["--data", write_digits(tmp_path / "d.npz", 0, 1600), "--device", "cpu", "--out"]
    whole = tmp_path / "whole"
    out = tmp_path / "killed"
    run(extract_latents, *flags, whole)
    launch_killed("extract_latents", *flags, out)
    with pytest.raises(UserError, match="not complete"):
        Latents(out)
    assert launch(extract_latents.__file__, *flags, out, ranks=3).returncode == 0
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
        assert f"holds latents with {word} " in error and "--resume never" in error
    images, labels, _ = read_npz(digits)
    np.savez(digits, arr_0=images, arr_1=labels[::-1])  # the same images with other labels
    assert "holds latents with data " in extract_error(digits, out)
    extract(digits, out, "--resume", "never")
    assert Latents(out).labels.tolist() == labels[::-1].tolist()


# Reading


def test_extract_reading_is_the_formula(latents):
    """x = scale (mean + std eps), bit by bit, of the images or their mirror images."""
    data = Latents(latents)
    rows = np.random.default_rng(0).integers(0, 96, 600)
    rng = RowGenerator((3, 1), 0, 600, 600)
    mirrored = rng.shared.random(600) < 0.5
    moments = data.moments[rows, mirrored.astype(int)].astype(np.float32)
    mean, std = np.split(moments, 2, axis=1)
    want = (mean + std * rng.normal(4, 8, 8).numpy()) * np.float32(0.9)
    rng = RowGenerator((3, 1), 0, 600, 600)
    moments, y = data.read(rows, rng)
    assert np.array_equal(data.sample_posterior(moments, rng), want)
    assert np.array_equal(y, rows % 10)


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (2, 1), (3, 2), (1, 7)])
def test_batches_are_the_global_batch_for_any_ranks_and_accumulation(ranks, accumulate, latents, monkeypatch):
    """...and for steps in any order. An epoch, of 4 steps, visits each image once."""
    data = Latents(latents)
    steps = [0, 1, 1, 40, 0]
    found = [[] for _ in steps]
    monkeypatch.setattr(extract_latents, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(extract_latents, "rank", lambda: rank)
        batches = Batches(data, 20, accumulate, 5, "cpu")
        for parts, step in zip(found, steps):
            for part in range(accumulate):
                x, y, rng = batches(step, part)
                parts.append((x, y, rng.uniform()))
        batches.prepared.close()  # its threads, before the next rank's turn
    for parts, step in zip(found, steps):
        order = np.random.default_rng(make_seed(5, step // 4)).permutation(96)
        rng = RowGenerator((5, step), 0, 20, 20)
        moments, labels = data.read(order[step % 4 * 20 :][:20], rng)
        want = data.sample_posterior(moments, rng), labels, rng.uniform()  # the last: what training draws next
        for k in range(3):
            assert torch.equal(torch.cat([part[k] for part in parts]), want[k])


def test_batches_latents_must_fit_the_network(latents):
    net = dict(channels=4, input_size=8, classes=10)
    extract_latents.check_fit(argparse.Namespace(**net), Latents(latents), "folder")
    for attribute in net:
        with pytest.raises(UserError, match="folder"):
            extract_latents.check_fit(argparse.Namespace(**net | {attribute: 1}), Latents(latents), "folder")


# ---------------------------------------------------------------------------------------------------------------------
# prune.py: groups, draw, masked layer, dW.


@pytest.mark.parametrize("scheme", "half 1:2:3 1:2, 1:0 0:2 3:2 3:5 1:4 1:2,1:2 2:4,1:2,1:2,1:2,1:2,1:2".split())
def test_wrong_schemes_are_one_sentence(scheme):
    """Here for two lists of 6 layers; a group lies in one list."""
    with pytest.raises(UserError, match=f"^--scheme '?{scheme}'? .*$"):
        prune.parse_scheme(scheme, [6, 6])


def test_candidate_masks_are_complete_and_lexicographic():
    masks = prune.candidate_masks(7, 14)
    assert torch.equal(masks, masks.unique(dim=0).flip(0))
    assert len(masks) == 3432 and (masks.sum(1) == 7).all()
    with pytest.raises(UserError, match="40,116,600 candidate masks"):
        prune.candidate_masks(14, 28)


@pytest.mark.parametrize("case, groups, scheme, tau, scaling, tolerance", [
    (0, 2, (1, 2), 1.0, 1.0, 1e-5),
    (1, 1, (2, 4), 4.0, 2.0, 1e-5),
    (2, 1, (2, 4), 0.5, 100.0, 0.0065),
])
def test_draw_and_masked_network_are_the_releases(case, groups, scheme, tau, scaling, tolerance):
    g = golden(f"learnable_pruning_{case}")

    def of_groups(key):
        return torch.stack([g[f"{key}_{i}"] for i in range(groups)])

    logits = of_groups("in.gate_logits")[:, 0].requires_grad_()
    candidates = prune.candidate_masks(*scheme).expand(groups, -1, -1)
    masks, choice = prune.draw_masks(logits, candidates, of_groups("in.gumbel"), tau, scaling)
    assert torch.equal(candidates, of_groups("out.options"))
    assert torch.equal(choice, of_groups("out.chosen"))
    net = fill(build_model("dit-tiny", 4, **DIT_GOLDEN))
    blocks = net.layers()
    layers = [prune.MaskedLayer(block) for block in blocks]
    net.replace_layers(layers)
    prune.set_masks(layers, masks.transpose(0, 1).flatten(1))
    out = net(g["in.x"], g["in.t"], g["in.y"])
    near(out, g["out.output"])
    out.square().mean().backward()
    near(logits.grad, of_groups("out.gate_grad")[:, 0], tolerance)
    norms = [block.attn.qkv.weight.grad.norm() for block in blocks]
    np.testing.assert_allclose(norms, g["out.qkv_grad_norms"], rtol=2e-5, atol=1e-7)


def test_a_mixed_list_draws_and_keeps_n_of_each_group():
    """Of 4, 6 and 1 candidates; those that only fill up are never drawn, however large their logits."""
    masks = prune.GroupMasks([(3, 4), (2, 4), (4, 4)])
    with torch.no_grad():
        masks.logits[0, 4:] = 9
        masks.logits[0, 2] += 0.01  # layers 0, 2, 3: 100 times the difference is the log odds
        masks.logits[1, 5] += 0.01
    drawn = masks.sample(RowGenerator((0,), 0, 500, 500), tau=1.0).round().unique(dim=0)
    assert len(drawn) == 4 * 6 * 1  # groups draw independently of each other
    for counts in drawn.view(24, 3, 4).sum(2):
        assert counts.tolist() == [3, 2, 4]
    assert masks.decide() == [0, 2, 3, 6, 7, 8, 9, 10, 11]
    assert masks.keep_probability()[1] == pytest.approx(3 / (3 + np.e))


@family
def test_the_masked_layer_is_the_formula(name):
    """Where m is 0 it leaves autograd out: the same outputs and gradients, summed over two parts of a batch."""
    some = torch.zeros(8, 4)
    some[:, 0] = 1  # all samples pass this layer, none layer 1
    some[1::3, 2] = 1
    some[:4, 3] = 1  # all of the first part
    results = []
    for kind in (prune.DenseMaskedLayer, prune.MaskedLayer):
        net = small(name)
        blocks = net.layers()
        layers = [kind(block) for block in blocks]
        net.replace_layers(layers)
        objective = net.objective()
        batch = some_batch(net)
        masks = some.clone().requires_grad_()
        outputs = []
        for rows in (slice(0, 4), slice(4, 8)):
            part = {key: v[rows] for key, v in batch.items()}
            prune.set_masks(layers, masks[rows])
            out = objective.predict(net, part)
            objective.loss(out, part).sum().backward()
            outputs.append(out)
        gradients = [p.grad for p in (masks, *net.parameters())]
        results.append(outputs + gradients)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    for p in blocks[1].parameters():  # they have a gradient all the same
        assert (p.grad == 0).all()


def test_a_relaxed_mask_is_an_error():
    with pytest.raises(ValueError, match="use DenseMaskedLayer"):
        prune.set_masks([prune.MaskedLayer(None)], torch.tensor([[0.25]]))


def test_lora_starts_at_zero_and_adds_alpha_over_r_times_b_a():
    net = small("dit-tiny")
    batch = some_batch(net)
    before = answer(net, batch)
    delta = prune.add_delta_w(net, "lora")
    assert torch.equal(answer(net, batch), before)
    layer = net.layers()[0].attn.qkv
    with torch.no_grad():
        layer.lora_b.normal_()
        change = layer(torch.eye(36)) - layer.linear(torch.eye(36))
        near(change.T, 16 / 8 * layer.lora_b @ layer.lora_a)
    assert layer.lora_a.shape == (8, 36)
    assert len(delta) == 2 * (4 * 5 + 4)  # qkv, proj, fc1, fc2, adaLN; two of t_embedder, two of the final layer


# ---------------------------------------------------------------------------------------------------------------------
# prune.py: which layers are found.


def imitation(teacher):
    """A task whose best masks are known: to answer as `teacher` does."""
    objective = teacher.objective()

    def loss(out, batch):
        with torch.no_grad():
            target = objective.predict(teacher, batch)
        return 10 * objective.kd(out, target, batch)

    objective.loss = loss
    return objective


def silence(block, *halves):
    """Zeroes the last linear of the attention or the MLP, or of both: then it adds nothing."""
    for half in halves:
        last = block.attn.proj if half == "attn" else block.mlp.fc2
        for p in last.parameters():
            torch.nn.init.zeros_(p)


def inputs_of_criteria(latents, out, *flags):
    """What a criterion takes beside the network and its objective."""
    fixed = f"--out {out} --device cpu --dtype float32 --steps 20 --batch-size 16 --accumulate 2 --save-every 20"
    args = prune.make_parser().parse_args([*fixed.split(), *flags])
    prune.start_run(args)
    return Batches(Latents(latents), 16, 2, 0, "cpu"), [(1, 2), (1, 2)], args


@family
@pytest.mark.parametrize("flags", [
    "learned",
    "gates --delta-w frozen",
    "bi",
    "flux-lite",
    "sensitivity",
    "lowest-loss",
    "shortlist",
])
def test_planted_dead_layers_are_found(name, flags, latents, tmp_path):
    import ideas  # noqa: F401, which has the gates
    net = small(name)
    for i in (0, 3):
        silence(net.layers()[i], "attn", "mlp")
    batches, scheme, args = inputs_of_criteria(latents, tmp_path, "--criterion", *flags.split())
    find = prune.CRITERIA[args.criterion]
    assert find(copy.deepcopy(net), imitation(net), batches, scheme, args) == [1, 2]


def fixed_batch(net, latents):
    """What the calibration loss is measured on, at once: all 96 latents in the order of seed 2025."""
    data = Latents(latents)
    rng = RowGenerator((2025, 0), 0, 96, 96)
    moments, y = data.read(epoch_order(96, 2025, 0), rng)
    return net.objective().make_batch(data.sample_posterior(moments, rng), y, rng)


@torch.no_grad()
def loss_of(net, batch, kept):
    """The mean loss of a copy that has only the layers `kept`."""
    net = copy.deepcopy(net)
    net.keep_layers(kept)
    return net.objective().loss(answer(net, batch), batch).mean().item()


@family
def test_layers_are_scored_as_the_papers_say(name, latents, tmp_path):
    net = small(name)
    batch = fixed_batch(net, latents)
    without = [loss_of(net, batch, {0, 1, 2, 3} - {i}) for i in range(4)]
    all_kept = loss_of(net, batch, range(4))
    states = []
    for layer in net.layers():
        layer.register_forward_hook(lambda layer, inputs, out: states.append((inputs[0], out)))
    answer(net, batch)
    want = {
        "bi": [1 - torch.cosine_similarity(x, out, dim=-1).mean().item() for x, out in states],
        "flux-lite": [(out - x).square().mean().item() for x, out in states],
        "sensitivity": np.array(without) - all_kept,
    }
    for criterion, scores in want.items():
        prune.CRITERIA[criterion](net, net.objective(), *inputs_of_criteria(latents, tmp_path / criterion))
        line = log_of(tmp_path / criterion)[0]
        np.testing.assert_allclose(line["scores"], scores, rtol=2e-4, atol=2e-5)


def test_the_best_of_each_group_are_kept_and_nan_is_best(tmp_path):
    args = argparse.Namespace(out=tmp_path)
    assert prune.keep_best([np.nan, 9.0, 1.0, 2.0, 4.0, 3.0], [(1, 2), (3, 4)], args) == [0, 3, 4, 5]


def test_a_shortlist_holds_the_cuts_with_the_largest_products():
    rises = [3.0, 5.0, np.nan, 2.0, -1.0, 7.0, 4.0, 1.0]
    scheme = [(2, 4), (1, 4)]
    products = {}
    for first in itertools.combinations(range(4), 2):
        for last in range(4, 8):
            cut = (*first, last)
            products[cut] = np.prod([1e9 if i == 2 else max(rises[i], 1e-12) for i in cut])
    best = sorted(products, key=products.get, reverse=True)[:5]
    assert prune.most_sensitive_cuts(rises, scheme, 5) == [list(cut) for cut in best]


def test_a_shortlist_keeps_the_least_loss_after_a_short_recovery(latents, teachers, tmp_path):
    """...which is that of distill.py's logits-kd, with as many steps and a constant learning rate."""
    flags = f"--latents {latents} --device cpu --batch-size 16 --accumulate 2 --resume never".split()
    run(prune, *flags, "--ckpt", teachers / "dit-tiny.pt", "--criterion", "shortlist", "--out", tmp_path)
    tried, result = log_of(tmp_path)
    assert len(tried["cuts"]) == 4 and result["cut"] == tried["cuts"][np.argmin(tried["losses"])]
    run(prune, *flags, "--ckpt", teachers / "dit-tiny.pt", "--criterion", "indices", "--layers",
        ",".join(map(str, tried["cuts"][0])), "--out", tmp_path / "cut")
    recipe = "--mode logits-kd --steps 20 --lr 1e-3 --lr-end 1".split()
    run(distill, *flags, *recipe, "--student", tmp_path / "cut/shallow.pt", "--out", tmp_path / "student")
    student, _ = model.load_model(ckpt=tmp_path / "student/student.pt", weights="model")
    near(loss_of(student, fixed_batch(student, latents), range(2)), tried["losses"][0], 1e-4)


@pytest.mark.parametrize("candidates, cuts", [
    ("4", [[0, 2], [0, 3], [1, 2], [1, 3]]),
    ("3", [[1, 3], [1, 2], [0, 2]]),  # at random
])
def test_lowest_loss_tries_all_cuts_or_random_ones(candidates, cuts, latents, tmp_path, monkeypatch):
    losses = iter([np.nan, 3.0, 2.0, np.nan])
    monkeypatch.setattr(prune, "calibration_loss", lambda *_: next(losses))
    net = small("dit-tiny")
    inputs = inputs_of_criteria(latents, tmp_path, "--candidates", candidates)
    assert prune.lowest_loss(net, net.objective(), *inputs) == cuts[2]
    assert log_of(tmp_path)[0]["cuts"] == cuts


def test_what_a_criterion_returns_is_checked():
    scheme = [(1, 2), (2, 3)]
    for kept in (np.array([3, 2, 0]), torch.tensor([0, 2, 3])):
        assert str(prune.check_kept(kept, scheme)) == "[0, 2, 3]"
    for kept in ([0, 2, 3, 5], [-1, 0, 2, 3], [0, 2, 2], [0, 1, 2, 3], [0, 2], None):
        with pytest.raises(UserError):
            prune.check_kept(kept, scheme)


def test_keeping_restores_the_layers_after_an_exception():
    net = small("mar-tiny")
    layers = net.layers()
    with pytest.raises(KeyError), prune.keeping(net, [1, 2]):
        assert net.layers() == layers[1:3]
        raise KeyError
    assert net.layers() == layers


# ---------------------------------------------------------------------------------------------------------------------
# prune.py: the cut.


@family
@pytest.mark.parametrize("flags", ["--criterion indices --layers 2,1", "--delta-w lora", "--delta-w full"])
def test_the_cut_keeps_the_original_weights_bit_for_bit(name, flags, latents, teachers, tmp_path):
    """...whatever was trained. Its loss is measured on the same batch at any seed and batch size."""
    files = ["--ckpt", teachers / f"{name}.pt", "--latents", latents, "--out", tmp_path]
    run(prune, *files, *flags.split(), "--steps", 2, "--batch-size", 15, "--seed", 3)
    shallow, config = model.load_model(ckpt=tmp_path / "shallow.pt")
    kept = config["kept"]
    assert kept == [1, 2] or "indices" not in flags
    net = small(name)
    loss = loss_of(net, fixed_batch(net, latents), kept)
    assert config["calibration_loss"] == pytest.approx(loss, rel=1e-5)
    net.keep_layers(kept)
    assert same_weights(shallow.state_dict(), net.state_dict())


@family
def test_a_cut_in_halves_is_loaded_and_cut_again(name, teachers, tmp_path):
    """A block is its attention, then its MLP. Halves stay as they are, with a numbering of their own."""
    net = small(name)
    batch = some_batch(net)
    ckpt = teachers / f"{name}.pt"
    flags = "--criterion indices --granularity sublayer --latents none".split()
    for scheme, layers, lost in [
        ("3:4", "0,1,3,4,6,7", [(1, "attn"), (2, "mlp")]),
        ("2:3", "0,2,3,5", [(0, "mlp"), (3, "attn")]),
    ]:
        out = tmp_path / layers
        run(prune, *flags, "--scheme", scheme, "--layers", layers, "--ckpt", ckpt, "--out", out)
        ckpt = out / "shallow.pt"
        for i, half in lost:
            silence(net.layers()[i], half)
        shallow, config = model.load_model(ckpt=ckpt)
        near(answer(shallow, batch), answer(net, batch))
    assert config["layers"] == [0, 2, 3, 5]
    attention, mlp, *_ = shallow.layers()
    assert attention.mlp is attention.norm2 is mlp.attn is mlp.norm1 is None


@pytest.mark.parametrize("name, scheme, kept, lists", [
    ("dit-tiny", "3:4", [0, 2, 3], [[3, 4]]),
    ("sit-tiny", "1:2", [0, 3], [[2, 4]]),
    ("mar-tiny", "1:2", [0, 2], [[1, 2], [1, 2]]),
])
def test_oracle_spreads_layers_over_each_list_and_needs_no_latents(name, scheme, kept, lists, teachers, tmp_path):
    flags = ["--criterion", "oracle", "--latents", "none", "--scheme", scheme]
    run(prune, *flags, "--ckpt", teachers / f"{name}.pt", "--out", tmp_path)
    config = weights_of(tmp_path / "shallow.pt", "config")
    assert config["kept"] == kept and config["scheme"] == lists
    assert config["calibration_loss"] is None


@pytest.mark.parametrize("name, depth", [("dit-tiny", 1), ("mar-tiny", 2)])
def test_one_layer_in_a_list_is_enough(name, depth):
    prune.check_family(small(name, depth))


# ---------------------------------------------------------------------------------------------------------------------
# distill.py: which layers are matched, the masked loss, the recovery.

EVERY_SECOND = [(i, 2 * i + 1) for i in range(14)]
GROUP_ENDS = [(2, 3), (5, 7), (7, 11), (10, 15), (12, 19), (15, 23), (18, 27)]


@pytest.mark.parametrize("scheme, parent, teacher, pairs", [
    ("1:2", 28, 28, EVERY_SECOND),  # these four as in the release
    ("2:4", 28, 28, EVERY_SECOND),
    ("7:14", 28, 28, EVERY_SECOND),
    ("3:4,3:4,2:4,3:4,2:4,3:4,3:4", 28, 28, GROUP_ENDS),
    ("3:4", 8, 8, [(2, 3), (5, 7)]),  # no layer of four ends a third of its group
    ("1:2", 14, 28, [(i, 4 * i + 3) for i in range(7)]),  # not the parent teaches: by the share of depth
    ("1:4", 28, 14, EVERY_SECOND[:7]),
    ("3:4", 4, 8, [(0, 2), (1, 4), (2, 7)]),
])
def test_matched_layers(scheme, parent, teacher, pairs):
    groups = prune.parse_scheme(scheme, [parent])
    student = sum(n for n, _ in groups)
    assert distill.matched_layers(groups, [student], [teacher]) == pairs


def test_layers_of_two_lists_are_matched_list_by_list():
    assert distill.matched_layers([[1, 2]] * 4, [2, 2], [4, 4]) == EVERY_SECOND[:4]
    assert distill.matched_layers(None, [2, 1], [4, 4]) == [(0, 1), (1, 3), (2, 7)]


def test_the_learning_rate_falls_on_a_cosine_after_a_warm_up():
    factors = [distill.lr_factor(step, 100, 0, 0.5) for step in (0, 50, 100)]
    np.testing.assert_allclose(factors, [1.0, 0.75, 0.5])
    assert distill.lr_factor(50, 100, 102, 0) == pytest.approx(0.5 * 0.5)


def test_the_moving_average_forgets_faster_at_first():
    average = torch.nn.Linear(1, 1)
    net = torch.nn.Linear(1, 1)
    for step, decay in ((0, 1 / 10), (1, 2 / 11), (90, 0.9)):
        want = decay * average.weight + (1 - decay) * net.weight
        prune.ema_update(average, net, 0.9, step)
        near(average.weight, want)


def test_a_step_clips_the_gradient_to_norm_1_and_decays_no_weight():
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 30.0)
    optimizer = prune.adamw(dict(params=[p], lr=0.1))
    sums = dict(grad_norm=0, skipped=0, steps=0)
    prune.clip_and_step(optimizer, [p], sums)
    near(optimizer.state[p]["exp_avg"], torch.full((4,), 0.1 * 0.5))
    near(p, torch.full((4,), 1 - 0.1))
    assert sums == dict(grad_norm=60, skipped=0, steps=1)


def recovery_args(out, steps):
    recipe = "--batch-size 4 --lr 1e-3 --warmup 4 --beta 0.01 --ema 0.9"
    flags = f"{recipe} --out {out} --steps {steps} --device cpu --dtype float32 --log-every 1 --save-every 99"
    args = distill.make_parser().parse_args(flags.split())
    prune.start_run(args)
    return args


def recover(student, teacher, batch, out, steps):
    """The log of a recovery in which the batch stays the same."""
    def make_batch(x, y, rng):
        return batch

    objective = student.objective()
    objective.make_batch = make_batch
    average = copy.deepcopy(student)
    args = recovery_args(out, steps)
    distill.recover(student, average, teacher, objective, lambda *_: [None] * 3, [(0, 1), (1, 3)], args, {})
    return log_of(out)


@pytest.mark.parametrize("prefix", ["", "drop_"])
def test_the_masked_loss_and_its_gradients_are_the_releases(prefix, tmp_path):
    """Eq. 8 for a student of depth 2 and a teacher of depth 4; in the drop_ case both lose the same labels."""
    g = golden("masked_kd_loss")
    student = fill(build_model("dit-tiny", 2, **DIT_GOLDEN))
    teacher = build_model("dit-tiny", 4, **DIT_GOLDEN)
    fill(torch.nn.ModuleDict(dict(teacher=teacher)))  # by the names of the reference run,
    teacher.pos_embed = student.pos_embed  # but for the fixed table
    batch = dict(x_start=g["in.x_start"], eps=g["in.noise"], t=g["in.t"], y=g["in.y"])
    batch["x_t"] = model.GaussianDiffusion().q_sample(batch["x_start"], batch["t"], batch["eps"])
    if prefix:
        batch["y"] = torch.where(g["in.rand_values"] < 0.1, 10, batch["y"])
    norms = {}
    for name, p in student.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: norms.update({name: p.grad.norm()}))
    bias = student.final_layer.linear.bias
    before = bias.detach().clone()
    (line,) = recover(student, teacher, batch, tmp_path, steps=1)
    for ours, release in dict(kd="kd_loss", diffusion="gt", rep="feat_loss", loss="loss").items():
        near(line[ours], g[f"out.{prefix}{release}"].mean(), 5e-5)
    names = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight",
             "blocks.1.adaLN_modulation.1.weight", "y_embedder.embedding_table.weight")
    near((bias - before).abs().max(), 1e-3 / 4, 1e-2)  # Adam's first step is the learning rate
    near(torch.stack([norms[name] for name in names]), g[f"out.{prefix}grad_norms"], 2e-5)


def test_the_weight_of_hidden_states_follows_their_size(latents):
    """b times their mean square is the paper's: 0.01 x 12.5^2 for DiT-XL. The paper's networks have the paper's b."""
    teacher = small("dit-tiny")
    teacher.x_embedder.proj.weight.data *= 9
    batches = Batches(Latents(latents), 4, 1, 0, "cpu")
    states = distill.HiddenStates(teacher, [1, 3])
    outputs = layer_outputs(teacher)
    args = recovery_args(latents / "unused", 1)
    beta = distill.default_beta(teacher, states, teacher.objective(), batches, args)
    mean_square = torch.stack(outputs[1::4] + outputs[3::4]).square().mean()
    near(beta * mean_square, 0.01 * 12.5**2, 0.05)  # two digits
    betas = [model.MODELS[name]["distill"].get("beta") for name in ("dit-xl", "sit-xl", "mar-large", "dit-s")]
    assert betas == [1e-2, 2e-4, 1e-2, None]


@family
def test_recovery_lowers_the_loss(name, tmp_path):
    teacher = small(name)
    student = small(name)
    student.keep_layers([0, 2])
    lines = recover(student, teacher, some_batch(teacher), tmp_path, steps=20)
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]


def shallow_of(name, teachers, flags="--layers 0,2"):
    """The teacher of `name`, cut; made once."""
    folder = teachers / f"{name} {flags}"
    if not folder.exists():
        flags = f"--criterion indices --latents none {flags}"
        run(prune, *flags.split(), "--ckpt", teachers / f"{name}.pt", "--out", folder)
    return folder / "shallow.pt"


def short_run(stage, name, latents, teachers, out):
    """Flags of a run of 4 steps that logs and saves each."""
    flags = "--batch-size 16 --steps 4 --log-every 1 --save-every 1".split()
    flags += ["--latents", latents, "--out", out]
    if stage == "prune":
        return [*flags, "--ckpt", teachers / f"{name}.pt"]
    return [*flags, "--ema", 0.5, "--student", shallow_of(name, teachers)]


@pytest.mark.parametrize("mode, parts", [
    ("masked-kd", {"kd", "rep"}),
    ("rep-kd", {"kd", "rep"}),
    ("logits-kd", {"kd"}),
    ("finetune", set()),
    ("scratch", set()),
])
def test_modes_differ_in_what_they_add(mode, parts, latents, teachers, tmp_path, monkeypatch, capsys):
    """Teacher and student see the same batch; b falls to 0; the narrowest mask leaves nothing of L_Rep. The share of
    each term in the first loss is printed."""
    seen = []
    predict = model.NoiseObjective.predict

    def watched_predict(self, net, batch):
        seen.append((net.training, batch))
        return predict(self, net, batch)

    monkeypatch.setattr(model.NoiseObjective, "predict", watched_predict)
    flags = ["--mode", mode, "--mask-sigma", 0, "--beta", 0.01]
    run(distill, *short_run("distill", "dit-tiny", latents, teachers, tmp_path), *flags)
    del seen[:-8]  # what was checked before step 0
    first = log_of(tmp_path)[0]
    weights = dict(kd=0.9, diffusion=0.1, rep=0.01) if parts else dict(diffusion=1)
    printed = capsys.readouterr().out
    for term in parts | {"diffusion"}:
        share = 100 * weights[term] * first[term] / first["loss"]
        assert f"{weights[term]} x {term} {share:.0f} %" in printed
    for step, line in enumerate(log_of(tmp_path)):
        assert parts == {"kd", "rep"} & line.keys()
        loss = line["diffusion"]
        if "kd" in parts:
            loss = 0.9 * line["kd"] + 0.1 * loss + 0.01 * (1 - step / 4) * line.get("rep", 0)
            (student_trains, batch), (teacher_trains, other) = seen[2 * step : 2 * step + 2]
            assert batch is other and student_trains and not teacher_trains
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert (line.get("rep") == 0) == (mode == "masked-kd")
    assert weights_of(tmp_path / "student.pt", "config")["depth"] == [12 if mode == "scratch" else 2]


@family
def test_a_student_of_halves_comes_back_under_its_keys(name, latents, teachers, tmp_path):
    """It has all of them, and so it starts with the teacher's hidden states and outputs."""
    student = shallow_of(name, teachers, "--granularity sublayer --scheme 2:2 --layers 0,1,2,3,4,5,6,7")
    run(distill, *short_run("distill", name, latents, teachers, tmp_path), "--student", student)
    before = weights_of(student)
    after = weights_of(tmp_path / "student.pt", "ema")
    assert {key: v.shape for key, v in before.items()} == {key: v.shape for key, v in after.items()}
    first = log_of(tmp_path)[0]
    assert first["rep"] == 0
    assert abs(first["kd"]) < 0.005  # at t = 0 it is a likelihood
    assert not same_weights(before, after)


# ---------------------------------------------------------------------------------------------------------------------
# Runs of prune.py and distill.py: killed, repeated, on two ranks; mistakes.

STAGES = dict(prune=(prune, "shallow.pt"), distill=(distill, "student.pt"))


def leaves(tree, name=""):
    """-> {name: tensor or value} of a nested checkpoint."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {name: tree}
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{name}/{key}")
    return found


def assert_same_checkpoints(path, other):
    a = leaves(torch.load(path, weights_only=True))
    b = leaves(torch.load(other, weights_only=True))
    assert a.keys() == b.keys()
    different = [key for key, value in a.items() if not np.array_equal(value, b[key])]
    assert different == []


@pytest.mark.parametrize("stage, name, flags", [
    ("prune", "dit-tiny", "--granularity sublayer --accumulate 2"),
    ("distill", "mar-tiny", "--warmup 3"),
])
def test_a_killed_run_ends_in_the_same_bits(stage, name, flags, latents, teachers, tmp_path, monkeypatch):
    monkeypatch.setitem(model.MODELS["mar-tiny"]["shape"], "dropout", 0.1)
    module, result = STAGES[stage]
    flags = [*short_run(stage, name, latents, teachers, tmp_path / "whole"), *flags.split()]
    run(module, *flags)
    flags += ["--out", tmp_path / "killed"]
    launch_killed(stage, *flags)
    run(module, *flags)
    assert_same_checkpoints(tmp_path / "killed" / result, tmp_path / "whole" / result)
    assert_same_checkpoints(tmp_path / "killed/step-00000004.pt", tmp_path / "whole/step-00000004.pt")
    assert not list(tmp_path.glob("killed/.*.tmp"))
    assert [line["step"] for line in log_of(tmp_path / "killed")].count(3) == 2
    log = prune.read_log(tmp_path / "killed")
    for line, whole in zip(log, prune.read_log(tmp_path / "whole"), strict=True):
        assert line | dict(images_per_s=0) == whole | dict(images_per_s=0)


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_command_trains_nothing_again(stage, latents, teachers, tmp_path):
    """...also with other flags of a short list. All others are a mistake; --resume never starts anew."""
    module, result = STAGES[stage]
    flags = short_run(stage, "dit-tiny", latents, teachers, tmp_path)
    run(module, *flags)
    checkpoints = {path: path.stat().st_mtime_ns for path in prune.checkpoints(tmp_path)}
    assert [path.name for path in checkpoints] == ["step-00000003.pt", "step-00000004.pt"]
    log = prune.read_log(tmp_path)
    shutil.move(tmp_path / result, tmp_path / "first")
    run(module, *flags, "--log-every", 3, "--save-every", 3, "--accumulate", 2)
    assert_same_checkpoints(tmp_path / result, tmp_path / "first")
    assert checkpoints == {path: path.stat().st_mtime_ns for path in prune.checkpoints(tmp_path)}
    assert log == prune.read_log(tmp_path)
    other = dict(prune="--criterion=bi", distill="--mode=rep-kd")
    for flag in ("--seed=9", "--steps=9", "--batch-size=9", other[stage]):
        assert f"belongs to a run with {flag.split('=')[0]} " in user_error(module, *flags, flag)
    run(module, *flags, "--resume", "never", "--steps", 1)
    assert [path.name for path in prune.checkpoints(tmp_path)] == ["step-00000001.pt"]
    assert len(prune.read_log(tmp_path)) == 1


# Runs stages one after another. Rank 1 dies once, when it has ended a step of the last.
RANKS = """
import importlib, json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import distill, model

torch.set_num_threads(1)
died = Path(sys.argv[2], "died")
save = distill.save

def save_or_die(args, *contents, **more):
    save(args, *contents, **more)
    if model.rank() == 1 and args.out.name == "8" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)

def main():
    for stage, *flags in json.loads(sys.argv[3]):
        importlib.import_module(stage).main(flags)

distill.save = save_or_die
model.run_main(main)
"""


def test_two_ranks_train_as_one_and_torchrun_restarts_them(latents, teachers, tmp_path, monkeypatch):
    """...and one rank with four parts. In a batch of 4 each part has one sample, which skips half of the layers; a
    batch of 7 has no equal parts."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else the old rank's address may be met again

    def commands(folder, accumulate):
        cases = ("prune --batch-size 4", "prune --criterion bi", "distill --batch-size 7")
        for i, (case, name) in enumerate(itertools.product(cases, FAMILIES)):
            stage, *flags = f"{case} --steps 2 --accumulate {accumulate}".split()
            common = short_run(stage, name, latents, teachers, tmp_path / folder / str(i))
            yield stage, *map(str, common), *flags

    for stage, *flags in (*commands("one", 1), *commands("parts", 4)):
        run(STAGES[stage][0], *flags)
    two = json.dumps(list(commands("two", 2)))
    (tmp_path / "ranks.py").write_text(RANKS)
    done = launch("--max-restarts=1", tmp_path / "ranks.py", ROOT, tmp_path, two, ranks=2)
    assert done.returncode == 0 and (tmp_path / "died").exists(), done.stderr
    for i, folder in itertools.product(range(9), ("parts", "two")):
        log = prune.read_log(tmp_path / folder / str(i))
        one = prune.read_log(tmp_path / "one" / str(i))
        for line, want in zip(log, one, strict=True):
            for key in {"loss", "grad_norm", "kd", "rep", "scores", "calibration_loss"} & want.keys():
                assert line[key] == pytest.approx(want[key], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_skipped(stage, latents, teachers, tmp_path, monkeypatch):
    """A run that has only such ends with a sentence."""
    module, _ = STAGES[stage]
    loss = model.NoiseObjective.loss
    factors = iter([np.nan, np.inf, 1, 1])
    monkeypatch.setattr(model.NoiseObjective, "loss", lambda *given: loss(*given) * next(factors, 1))
    flags = [*short_run(stage, "dit-tiny", latents, teachers, tmp_path), "--log-every", 4]
    run(module, *flags)
    assert prune.read_log(tmp_path)[-1]["skipped"] == 0.5
    saved = leaves(torch.load(tmp_path / "step-00000004.pt", weights_only=True))
    assert all(value.isfinite().all() for value in saved.values() if torch.is_tensor(value))
    monkeypatch.setattr(model.NoiseObjective, "loss", lambda *given: loss(*given) * np.nan)
    assert "never finite" in user_error(module, *flags, "--resume", "never")


MISTAKES = """
prune --scheme 3:5 | fill 4 layers
prune --layers 0,1 | go together
prune --criterion indices --layers 0,1 | 2 of the layers 0 to 1
prune --batch-size 97 | at most 96
prune --batch-size 1 --accumulate 2 | at least 2
prune --latents nowhere | run extract_latents.py first
distill --student {0}/shallow.pt | {0}/shallow.pt does not exist; run prune.py first
distill --student {0}/junk | cannot be read
distill --student {0}/plain | add --model
distill --student {0}/plain --model dit-tiny | add --teacher
distill --teacher {0}/other | the teacher has classes 5, the student 10
sample | out/distill/student.pt does not exist; run distill.py first
sample --model dit-tiny --temperature 0.9 | --temperature does not apply to dit-tiny
sample --model dit-tiny --sampler ode-heun | give ddpm or another of its family
sample --model sit-tiny --steps 1 | give 2 or more
sample --model dit-tiny --classes 3 10 | give numbers up to 9
sample --model dit-tiny --export weights.bin | ends in .safetensors or .pt
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().split("\n"))
def test_mistakes_get_one_sentence(mistake, latents, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").write_text("hello")
    torch.save(small("dit-tiny").state_dict(), tmp_path / "plain")
    torch.save(build_model("dit-tiny", classes=5).state_dict(), tmp_path / "other")
    command, words = mistake.format(tmp_path).split(" | ")
    stage, *flags = command.split()
    if stage in STAGES:
        flags = [*short_run(stage, "dit-tiny", latents, teachers, tmp_path / "out"), *flags]
    error = user_error(MODULES[stage], *flags)
    assert words in error and "\n" not in error


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def same_images(a, b):
    """Equal up to rounding."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


@family
def test_image_i_is_the_same_in_any_batch_and_in_a_notebook(name, teachers, tmp_path):
    flags = ["--ckpt", teachers / f"{name}.pt", "--num-images", 37, "--steps", 4]
    run(sample, *flags, "--out", tmp_path)
    whole = np.load(tmp_path / "samples.npz")
    images = whole["arr_0"]
    labels = whole["arr_1"]
    assert images.shape == (37, 32, 32, 3) and images.std() > 5
    assert labels.tolist() == [i % 10 for i in range(37)]
    net, _ = model.load_model(ckpt=teachers / f"{name}.pt")

    def drawn(**settings):
        return sample.sample_images(net, labels[20:], first=20, steps=4, **settings)

    assert same_images(images[20:], drawn())
    assert not same_images(images[20:], drawn(seed=1))
    if name == "mar-tiny":
        assert not same_images(images[20:], drawn(temperature=0.5))


@pytest.mark.parametrize("name, samplers", [
    ("dit-tiny", ["ddpm", "ddim"]),
    ("sit-tiny", ["sde-euler", "sde-heun", "ode-euler", "ode-heun", "ode-dopri5"]),
    ("mar-tiny", ["mar"]),
])
@torch.inference_mode()
def test_guidance_one_is_the_conditional_network_and_more_is_not(name, samplers):
    net = small(name)
    for sampler in samplers:
        latents = []
        for scale in (1.0, 1.0 + 1e-7, 3.0):
            settings = model.MODELS[name]["sampling"] | dict(sampler=sampler, steps=4, guidance=scale)
            rng = RowGenerator((0,), 0, 4, 16)
            latents.append(sample.SAMPLERS[sampler](net, torch.arange(4), rng, **settings))
        torch.testing.assert_close(latents[0], latents[1], rtol=1e-3, atol=1e-3)
        assert 0.01 < (latents[2] - latents[0]).abs().max() < 1000


def test_samplers_take_the_settings_of_each_model():
    for entry in model.MODELS.values():
        takes = inspect.signature(sample.SAMPLERS[entry["sampling"]["sampler"]]).parameters.keys()
        if "sde" in takes:
            takes |= inspect.signature(sample.integrate_sde).parameters.keys()
        assert entry["sampling"].keys() <= takes


def test_ranks_join_their_images_to_those_of_a_single_run(teachers, tmp_path):
    flags = ["--ckpt", teachers / "dit-tiny.pt", "--num-images", 37, "--steps", 4, "--out"]
    run(sample, *flags, tmp_path / "single")
    out = tmp_path / "ranks"
    out.mkdir()
    (out / ".samples-7.tmp").write_bytes(b"of a run that was killed")
    done = launch(sample.__file__, *flags, out, "--batch-size", 5, ranks=3)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"grid.png", "samples.json", "samples.npz"}
    single = np.load(tmp_path / "single/samples.npz")
    joined = np.load(out / "samples.npz")
    assert (single["arr_1"] == joined["arr_1"]).all() and same_images(single["arr_0"], joined["arr_0"])
    with zipfile.ZipFile(out / "samples.npz") as archive:  # fid.py maps it
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def test_samplers_compute_in_float32_under_bfloat16(teachers, monkeypatch):
    net, _ = model.load_model(ckpt=teachers / "dit-tiny.pt")
    model.cast_frozen(net.requires_grad_(False), torch.bfloat16)
    step = sample.ancestral_step
    types = set()

    def watched_step(process, out, x, *others):
        types.update((out.dtype, x.dtype))
        return step(process, out, x, *others)

    monkeypatch.setattr(sample, "ancestral_step", watched_step)
    sample.sample_images(net, [0, 1, 2, 3], dtype=torch.bfloat16, steps=3)
    assert types == {torch.float32}


@pytest.mark.parametrize("suffix, dtype", [("safetensors", "float32"), ("safetensors", "bfloat16"), ("pt", "float16")])
def test_export_writes_the_weights_asked_for(suffix, dtype, tmp_path):
    """Averaged ones if there are any; the file loads as an official one."""
    states = {"ema": small("dit-tiny").state_dict(), "model": small("dit-tiny").state_dict()}
    states["model"]["final_layer.linear.bias"] += 1
    model.save_checkpoint(tmp_path / "both.pt", **states, config=dict(name="dit-tiny"))
    for flags, which in (([], "ema"), (["--weights", "model"], "model")):
        path = tmp_path / f"{which}.{suffix}"
        run(sample, "--ckpt", tmp_path / "both.pt", *flags, "--export", path, "--dtype", dtype)
        want = {key: v.to(getattr(torch, dtype)) for key, v in states[which].items()}
        state, _ = model.read_state(path)
        assert same_weights(state, want)
        model.load_model(ckpt=path)  # the file says what it holds


def test_a_student_draws_the_classes_it_was_trained_on(tmp_path):
    path = tmp_path / "student.safetensors"
    config = dict(name="dit-tiny", classes={3: "three", 4: "four"})
    model.write_safetensors(path, small("dit-tiny").state_dict(), config)
    for flags, classes in (([], [3, 4, 3]), (["--classes", "four", 1], [4, 1, 4])):
        run(sample, "--ckpt", path, *flags, "--num-images", 3, "--steps", 2, "--out", tmp_path)
        assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == classes


def test_the_grid_has_a_row_per_class():
    labels = np.arange(9) % 3
    images = np.zeros((9, 32, 32, 3), np.uint8) + 10 * labels[:, None, None, None].astype(np.uint8)
    grid = np.asarray(sample.make_grid(images, labels))  # doubled: 3 rows of 3 images, white lines of 2 between
    assert grid.shape == (208, 208, 3)
    assert grid[20::68, 30, 0].tolist() == [0, 10, 20] and (grid[68:72] == 255).all()


@family
def test_bundled_weights_draw_the_digit_asked_for(name, tmp_path):
    """50 samples in 32 steps, judged by the digit classifier; the README measures 1,000."""
    run(sample, "--model", name, "--num-images", 50, "--steps", 32, "--out", tmp_path)
    assert fid.evaluate(tmp_path / "samples.npz", "digits", features="digits")["accuracy"] >= 0.9


# ---------------------------------------------------------------------------------------------------------------------
# fid.py


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Weights from the tensors' names alone; as in the public file, without the counters of batch norm."""
    state = {}
    for name, value in fid.Inception().state_dict().items():
        v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(value.shape))
        if v.ndim >= 2:
            v *= 1.5 / np.sqrt(v.size / v.shape[0])
        elif name.endswith("running_var"):
            v = 1 + 0.2 * abs(v)
        else:
            v = 0.1 * v + name.endswith("weight")
        if "num_batches" not in name:
            state[name] = torch.from_numpy(v.astype(np.float32))
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(state, path)
    return path


def inception_images(seed, size, cell, n=2):
    r = np.random.RandomState(seed)
    cells = -(-size // cell)
    low = r.randint(0, 224, size=(n, 3, cells, cells))
    noise = r.randint(0, 32, size=(n, 3, size, size))
    image = low.repeat(cell, 2).repeat(cell, 3)[:, :, :size, :size] + noise
    return image.astype(np.uint8).transpose(0, 2, 3, 1).copy()  # (N, H, W, 3)


def write_digits(path, start, stop):
    file = np.load(DIGITS)
    np.savez(path, arr_0=file["arr_0"][start:stop], arr_1=file["arr_1"][start:stop])
    return path


@pytest.mark.parametrize("case, seed, size, cell", [
    ("inception_amp_64", 202, 64, 8),
    ("inception_amp_299", 203, 299, 23)])
@torch.no_grad()
def test_fid_inception_goldens(inception_file, case, seed, size, cell):
    """...resized as in TensorFlow 1."""
    net = fid.load_network("inception", inception_file)
    assert not hasattr(net.Mixed_7c.branch_pool.bn, "weight")  # folded
    images = torch.from_numpy(inception_images(seed, size, cell))
    for name, got in zip(("pool3", "spatial_nhwc", "softmax_unbiased"), net(images)):
        if f"{case}/{name}" in GOLDENS:
            want = GOLDENS[f"{case}/{name}"]
            assert np.abs(got.numpy() - want).max() <= 1e-5 * np.abs(want).max()
    if size == 64:
        x = net.preprocess(images).numpy()
        assert np.array_equal(x[:, :, 145:153, 145:153], GOLDENS[f"{case}/resized_crop"])
        assert np.array_equal(x[:, :, 0], GOLDENS[f"{case}/resized_row0"])
        assert np.array_equal(x[..., 298], GOLDENS[f"{case}/resized_last_col"])


def test_fid_frechet_goldens():
    real = torch.from_numpy(GOLDENS["metrics_fid/real"])
    fake = torch.from_numpy(GOLDENS["metrics_fid/fake"])
    few = real[:40]
    pairs = [(real, fake), (real, fake[:370]), (few, fake[:40]), (real, fake[:40]), (real, real), (few, few)]
    for (a, b), exact in zip(pairs, GOLDENS["metrics_fid/exact_values"]):
        got = fid.frechet_distance(*fid.mean_and_covariance(a), *fid.mean_and_covariance(b))
        assert got == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_fid_inception_score_goldens():
    probs = torch.from_numpy(GOLDENS["metrics_inception_score/softmax"])
    for split, want in ((5000, 2.5475449562072754), (50, 2.4891252517700195), (150, 2.5245985984802246)):
        assert fid.inception_score(probs, split) == pytest.approx(want, rel=1e-6)
    two_splits = torch.eye(10)[[*range(10)] * 500 + [0] * 7]  # 0 log 0 = 0; the short split scores 1
    assert fid.inception_score(two_splits) == pytest.approx((10 + 1) / 2)


def test_fid_precision_recall_goldens():
    def points(name):
        x = torch.from_numpy(GOLDENS[f"metrics_precision_recall/{name}"])
        return torch.cat([x, x + 100])  # the same again, far away: more points than one block takes

    for name, precision, recall in (("fake", 0.8733333333333333, 0.47),
                                    ("fake_170", 0.9764705882352941, 0.23333333333333334),
                                    ("fake_copies", 0.89, 0.57)):
        assert fid.precision_recall(points("real"), points(name)) == pytest.approx((precision, recall))
    radii = fid.neighbour_distances(points("fake_170")[:170].double(), k=3)
    squared = GOLDENS["metrics_precision_recall/pr_300_170__numpy_float64__radii_fake"][:, 0]
    np.testing.assert_allclose(radii.square(), squared, rtol=1e-6)


def test_fid_digit_classifier_on_held_out_digits():
    net = fid.load_network("digits", fid.WEIGHTS["digits"])
    digits = fid.open_images(DIGITS)
    x = torch.tensor(digits.read(9000, 10000))
    padded = torch.nn.functional.pad(x, (0, 0, 2, 2, 2, 2)).expand(-1, -1, -1, 3)  # as sampled: 32x32 RGB
    with torch.no_grad():
        features, _, probs = net(x)
        assert torch.allclose(net(padded)[0], features, atol=1e-5)
    assert (probs.argmax(1).numpy() == digits.labels[9000:]).mean() >= 0.985


def test_fid_does_not_depend_on_the_batch_size_and_is_0_of_a_set_with_itself(tmp_path):
    a = write_digits(tmp_path / "a.npz", 0, 201)
    b = write_digits(tmp_path / "b.npz", 300, 601)
    one, many = [fid.evaluate(a, b, "digits", batch_size=size) for size in (1, 500)]
    for name in ("fid", "is", "precision", "recall", "accuracy"):
        assert many[name] == pytest.approx(one[name], rel=1e-6)
    itself = fid.evaluate(a, a, "digits")
    assert itself["fid"] == pytest.approx(0, abs=1e-9)
    assert itself["precision"] == itself["recall"] == 1
    assert "sfid" not in itself


def test_fid_reads_npz_files_and_folders_alike(tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / ".trash").mkdir()
    for name in ("._0.png", ".trash/0.png"):
        (folder / name).write_bytes(b"a note of macOS")
    images = np.random.default_rng(0).integers(0, 256, (20, 30, 40, 3), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"below/{i:02}.PNG")
    np.savez(tmp_path / "stored.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    for path in (tmp_path / "stored.npz", tmp_path / "packed.npz", folder):
        source = fid.open_images(path)
        for start in (9, 0):
            assert np.array_equal(source.read(start, start + 6), images[start:start + 6])


def test_fid_holds_only_a_batch_of_a_large_file(tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((1000, 100, 100, 3), np.uint8))  # 30 MB
    tracemalloc.start()
    fid.open_images(tmp_path / "large.npz").read(0, 10)
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


def test_fid_with_inception_and_statistics_as_reference(tmp_path, inception_file):
    images = inception_images(5, 72, 12, n=5)
    (tmp_path / "fake").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"fake/{i}.jpg")
    net = fid.load_network("inception", inception_file)
    stats = fid.measure(fid.open_images(tmp_path / "fake"), net, 2, "cpu")
    mu, sigma = stats["fid"]
    mu_s, sigma_s = stats["sfid"]

    def against(**arrays):
        np.savez(tmp_path / "ref.npz", **arrays)
        return fid.evaluate(tmp_path / "fake", tmp_path / "ref.npz", ckpt=inception_file)

    small = images[:4, ::2, ::2] // 2
    first = against(arr_0=small)
    assert first["fid"] > 1 and first["sfid"] > 1
    for part in ("2048 features", "FID-50K", "(72, 72), real images (36, 36)", "JPEG"):
        assert part in str(first["warnings"])
    adm = against(arr_0=small, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)  # win over those of small
    assert adm["fid"] == pytest.approx(0, abs=1e-6) and adm["sfid"] == pytest.approx(0, abs=1e-6)
    assert (adm["precision"], adm["recall"]) == (first["precision"], first["recall"])
    alone = against(mu=mu, sigma=sigma)  # such as adm_in256_stats.npz
    assert alone["fid"] == adm["fid"] and not {"sfid", "precision", "recall"} & set(alone)


def test_fid_command_line(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path / "a.npz", 0, 50)
    monkeypatch.chdir(tmp_path)  # the bundled files are found from anywhere
    fid.main(["a.npz", "--json", "out.json", "--device", "cpu"])
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["num_samples"], result["num_ref"]) == (50, 10000)
    out, err = capsys.readouterr()
    for name in ("fid", "is", "precision", "recall", "accuracy"):
        assert re.search(rf"{name} +{result[name]:.4f}\n", out)
    assert "warning: 50 samples for 64 features" in err


@pytest.mark.parametrize("name, content, sentence", [
    ("missing.npz", None, "sample.py writes"),
    ("part.npz", b"not a zip", "only the beginning"),
    ("stats.npy", b"a dict", "as mu and sigma"),
    ("float.npz", np.zeros((5, 32, 32, 3)), "must be uint8"),
    ("columns.npz", np.zeros((5, 32, 32), np.uint8, order="F"), "must be uint8"),
    ("size.npz", np.zeros((5, 40, 40), np.uint8), "28x28 or 32x32"),
    ("sizes", (30, 31, 32, 33), "crop all"),
])
def test_fid_bad_input_is_one_sentence(tmp_path, capsys, name, content, sentence):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.savez(path, arr_0=content)
    elif content:
        path.mkdir()
        for height in content:
            Image.new("RGB", (32, height)).save(path / f"{height}.png")
    with pytest.raises(SystemExit, match="2"):
        fid.run_main(lambda: fid.evaluate(path))
    assert re.search(f"^error: .*{sentence}.*\n\\Z", capsys.readouterr().err, re.M)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's format.


def test_the_format_of_diffusers_both_ways(monkeypatch, tmp_path):
    """The reference is from diffusers 0.42.1: the weights and shape of a transformer of two blocks, inputs x, t, y, and
    its output for these (with DiT's frequencies of time)."""
    import diffusers_format

    toy = dict(family=model.DiT, shape=dict(width=12, heads=3, input_size=8, classes=10))
    monkeypatch.setitem(model.MODELS, "dit-toy", toy)
    reference = ROOT / "data/diffusers_reference.safetensors"
    theirs, config = model.read_state(reference)
    run(diffusers_format, "--read", reference, "--model", "dit-toy", "--out", tmp_path / "toy.pt")
    net, _ = model.load_model(ckpt=tmp_path / "toy.pt")
    near(net(theirs["x"], theirs["t"], theirs["y"]).detach(), theirs["out"])

    diffusers_format.write_pipeline(tmp_path, net, dict(classes={0: "cat", 1: "dog"}))
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    written, _ = model.read_state(file)
    assert len(written) == len(theirs) - 4  # all but x, t, y, out
    for name, value in written.items():
        want = theirs[name]
        if "embedding_table" in name:  # DiTPipeline's index for "no label" is 1000
            want = want[torch.arange(1001).clamp(max=10)]
        assert torch.equal(value, want.float())

    def contents(name):
        return json.loads((tmp_path / name).read_text())

    assert contents("transformer/config.json") == config
    assert not contents("scheduler/scheduler_config.json")["clip_sample"]  # True by default
    assert contents("model_index.json")["id2label"] == {"0": "cat", "1": "dog"}

    theirs["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"] += 1
    model.write_safetensors(file, theirs, config)
    with pytest.raises(UserError):  # embedders that differ
        diffusers_format.read_transformer(file, "dit-toy")


# ---------------------------------------------------------------------------------------------------------------------
# A new family: U-ViT.


def test_a_new_family_through_every_stage(latents, monkeypatch, tmp_path):
    monkeypatch.setitem(model.MODELS, "uvit-tiny", None)  # with the test, the row leaves the table
    monkeypatch.chdir(tmp_path)
    import uvit

    training = ["--latents", latents, "--steps", 2, "--batch-size", 8, "--device", "cpu"]
    run(uvit, "distill", "--mode", "scratch", "--model", "uvit-tiny", *training, "--out", "teacher")
    run(uvit, "prune", "--ckpt", "teacher/student.pt", *training)
    run(uvit, "distill", *training)
    run(uvit, "sample", "--num-images", 20, "--steps", 2)
    run(fid, "--device", "cpu")
    student, config = model.load_model(ckpt="out/distill/student.pt")
    assert student.original_indices() == config["kept"] == log_of(Path("out/prune"))[-1]["cut"]

    class ByPosition(uvit.UViT):
        def original_indices(self):  # the first block is 0 and the first with a skip is 6, whatever was cut
            return [*range(len(self.in_blocks)), *range(6, 12)]

    monkeypatch.setitem(model.MODELS["uvit-tiny"], "family", ByPosition)
    assert "another output when it is cut" in user_error(uvit, "prune", "--ckpt", "teacher/student.pt", *training)


# ---------------------------------------------------------------------------------------------------------------------
# Data, classes and ideas of one's own.


def test_a_subset_of_imagenet_keeps_its_classes_numbers(tmp_path, photos):
    classes = tmp_path / "classes.txt"
    classes.write_text("n00000001 tench\nn00000007 cock, the bird\n\nn00000008 hen\nn00000010\n")
    extract(photos, tmp_path / "out", "--class-list", classes)
    latents = Latents(tmp_path / "out")
    assert latents.labels.tolist() == [1, 1, 2, 3]
    assert latents.facts()["classes"] == {1: "n00000007", 2: "n00000008", 3: "n00000010"}
    (photos / "n00000008").rename(photos / "other")
    assert "other is not in" in extract_error(photos, tmp_path / "out", "--class-list", classes)


def test_the_scale_is_measured_and_goes_to_the_student(tmp_path):
    run(extract_latents, "--out", tmp_path / "latents", "--scale", "auto", "--device", "cpu")
    latents = Latents(tmp_path / "latents")
    rng = RowGenerator((0,), 0, 256, 256)
    x = latents.sample_posterior(torch.tensor(latents.moments[:256, 0]), rng)
    assert abs(x.std() - 1) < 0.02
    flags = f"--mode scratch --steps 1 --batch-size 4 --device cpu --latents {tmp_path}/latents --out {tmp_path}"
    run(distill, *flags.split())
    assert weights_of(tmp_path / "student.pt", "config")["scale"] == latents.scale


def test_ideas_of_ones_own(latents, tmp_path, monkeypatch):
    """Where no layer does anything, only the penalty moves the gates; their moving averages decide."""
    import ideas

    def decide(gates):
        assert not gates.logits.requires_grad
        return [0, 1, 2]

    monkeypatch.setattr(ideas.Gates, "decide", decide)
    net = small("dit-tiny")
    for layer in net.layers():
        silence(layer, "attn", "mlp")
    model.save_checkpoint(tmp_path / "w.pt", model=net.state_dict(), config=dict(name="dit-tiny"))
    flags = f"--latents {latents} --device cpu --batch-size 8 --log-every 1 --steps 2 --out {tmp_path}".split()
    gates = [*flags, *f"--criterion gates --scheme 3:4 --accumulate 2 --ckpt {tmp_path}/w.pt".split()]
    parser = prune.make_parser()
    parser.add_argument("--depth-weight", type=float, default=1.0)
    prune.main(gates, parser)
    line = log_of(tmp_path)[0]
    assert line["penalty"] == pytest.approx((3 / 4 - 0.5) ** 2)
    assert line["confidence"] == [0.5225] * 4  # sigmoid(100 x 0.9 x the learning rate)
    with pytest.raises(UserError, match="depth-weight 1.0, not 2.0"):  # a flag of one's own is compared, too
        prune.main([*gates, "--depth-weight", "2"], parser)

    h = torch.randn(2, 3, 4)
    near(ideas.cosine(h, -2 * h, None), torch.full((2,), 2.0))
    run(distill, *flags, "--student", tmp_path / "shallow.pt", "--mode", "cosine", "--out", tmp_path / "d")
    assert weights_of(tmp_path / "d/student.pt", "config")["mode"] == "cosine"


# ---------------------------------------------------------------------------------------------------------------------
# The README, docs/ and the house.

PAGES = [ROOT / "README.md", ROOT / "docs/running.md", ROOT / "docs/evidence.md"]
README = PAGES[0].read_text()
MODULES = dict(extract_latents=extract_latents, prune=prune, distill=distill, sample=sample, fid=fid)


def commands_of(text):
    """The stages that a text calls: (stage, flags)."""
    lines = re.findall(r"(?:torchrun \S+|python) +(\w+)\.py *([^#\n`;|)]*)", text)
    return [(name, flags.split()) for name, flags in lines if name in MODULES]


def test_every_command_of_the_pages_parses(monkeypatch):
    class Parsed(Exception):
        pass

    def stop(*_):
        raise Parsed

    texts = [page.read_text().replace("$m", "dit").replace("\\\n", "") for page in PAGES]
    texts += [stage.__doc__ for stage in MODULES.values()]
    commands = [command for text in texts for command in commands_of(text)]
    assert len(commands) > 30
    for name, flags in commands:
        monkeypatch.setattr(prune, "start_ranks", stop)
        first_call = "evaluate" if name == "fid" else "start_ranks"
        monkeypatch.setattr(MODULES[name], first_call, stop, raising=False)
        with pytest.raises(Parsed):
            MODULES[name].main(flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    files = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("reproduce/*")] if path.is_file()]
    sources = "\n".join(path.read_text() for path in files)
    for file in set(re.findall(r"(?<![\w/.-])((?:reproduce|docs|data)/[\w./-]+\w|\w+\.py)\b", text)):
        assert (ROOT / file).exists() or file == "my_idea.py", file
    of_others = {"help", "nproc_per_node", "nnodes", "max-restarts", "log-dir"}
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)) - of_others:
        assert f'"--{flag}"' in sources, flag
    for word in set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", text)):
        assert (ROOT / word).exists() or re.search(rf"\b{word.split('.')[-1]}\b", sources), word


def test_the_code_in_the_readme_is_the_code_that_runs(latents, tmp_path, monkeypatch):
    lesson = re.sub("\n +", "\n", (ROOT / "prune.py").read_text())
    own = []
    for block in re.findall(r"```python\n *(.*?)```", README, re.S):
        if "import" in block:
            own.append(block)
        else:
            assert re.sub("\n +", "\n", block) in lesson
    criterion, notebook = own

    monkeypatch.setattr(prune, "CRITERIA", dict(prune.CRITERIA))
    monkeypatch.setattr(sys, "argv", ["my_idea.py", *f"--criterion size --latents {latents} --out {tmp_path}".split()])
    exec(criterion, {})
    kept = weights_of(tmp_path / "shallow.pt", "config")["kept"]
    net, _ = model.load_model("dit-tiny")
    size = []
    for layer in net.layers():
        size.append(sum(p.square().sum().item() for p in layer.parameters()))
    assert kept == [max((i, i + 1), key=size.__getitem__) for i in range(0, 12, 2)]

    monkeypatch.chdir(tmp_path)
    found = {}
    exec(notebook.replace("out/latents", str(latents)), found)
    assert len(found["rises"]) == 12 and len(found["net"].layers()) == 10
    assert found["images"].shape == found["after"].shape == (10, 32, 32, 3)


def test_the_tables_of_the_pages_are_those_of_the_results():
    import report

    for page in PAGES:
        assert report.fill(page.read_text()) == page.read_text()
    assert (ROOT / "docs/results/README.md").read_text() == report.page()


def test_imports_follow_the_pipeline():
    first = ["model", "extract_latents"]
    order = dict(model=[], extract_latents=["model"], prune=first, sample=first, distill=[*first, "prune"], fid=[])
    for name, allowed in order.items():
        imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M))
        assert imported & set(order) <= set(allowed), name
        assert imported - set(order) <= set(sys.stdlib_module_names) | {"torch", "numpy", "PIL", "scipy"}, name
