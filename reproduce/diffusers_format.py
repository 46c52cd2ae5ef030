"""Converts a DiT to and from the format of Hugging Face's diffusers.

    python reproduce/diffusers_format.py --read diffusion_pytorch_model.safetensors --model dit-xl --out dit-hf.pt
    python reproduce/diffusers_format.py --write out/distill/student.pt --out out/student-diffusers

--read takes the file in the folder transformer of facebook/DiT-XL-2-256 or, with --model dit-xl-512, of
facebook/DiT-XL-2-512; one that ends in .bin, too. What it writes is a --ckpt or --teacher for every stage.

--write takes a DiT of any depth. It writes a folder, from which diffusers draws images:

    from diffusers import AutoencoderKL, DiTPipeline
    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema")
    pipe = DiTPipeline.from_pretrained("out/student-diffusers", vae=vae)
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    images = pipe([207, 360], guidance_scale=1.5, num_inference_steps=50).images

The loop is there because diffusers embeds times with the frequencies 10000^(-i / 127), and DiT with 10000^(-i / 128).
Without it, outputs are off by some percent, those of facebook's own files too. With it, the same noise becomes the same
image as in sample_images(..., sampler="ddim", steps="ddim50", guidance_channels=4): diffusers guides all four channels.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import (
    DiT, UserError, atomic_write, build_model, count_blocks, load_model, read_state, reading, run_main, save_checkpoint,
    write_safetensors)

NAMES = {  # parts of a weight's name: in the DiT release, whose names are ours, and in diffusers
    "x_embedder": "pos_embed",
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder": "class_embedder",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
    "blocks": "transformer_blocks",
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def weights_in_diffusers(net):
    """A DiT's weights under their names in diffusers. They share the network's memory: to change them changes it."""
    weights = {}
    for name, value in net.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if "qkv" in name:  # three layers in diffusers
            for part, rows in zip("qkv", value.chunk(3)):
                weights[name.replace("attn.qkv", f"attn1.to_{part}")] = rows
        elif "embedder" in name:  # of time or label: in diffusers, every block has a copy
            for i in range(len(net.blocks)):
                weights[f"transformer_blocks.{i}.norm1.emb.{name}"] = value
        elif name != "pos_embed":  # diffusers computes it
            weights[name] = value
    return weights


def read_transformer(path, model):
    """-> the network. model: the entry of the table that says its shape, except for the depth."""
    theirs, _ = read_state(path)
    with reading(path):
        net = build_model(model, count_blocks(theirs, "transformer_blocks"))
        weights = weights_in_diffusers(net)
        for name, value in weights.items():
            value.copy_(theirs[name])
        for name, value in weights.items():
            if not torch.equal(value, theirs[name].float()):
                raise UserError(f"{path}: blocks differ in {name}, of which DiT has one for all; give another file")
    return net


def write_pipeline(folder, net, config):
    """Writes what DiTPipeline.from_pretrained(folder, vae=...) reads."""
    if type(net) is not DiT or net.classes > 1000 or config.get("granularity") == "sublayer":
        raise UserError("diffusers draws from a DiT of whole blocks and at most 1000 classes; give a file with one")
    # DiTPipeline's "no label" is 1000, whatever the number of classes: all rows after the last class become that row.
    rows = torch.arange(1001).clamp(max=net.classes)
    table = net.y_embedder.embedding_table
    table.weight.data = table.weight.data[rows]
    write_safetensors(folder / "transformer/diffusion_pytorch_model.safetensors", weights_in_diffusers(net), config)
    heads = net.blocks[0].attn.heads
    write_json(
        folder / "transformer/config.json",
        _class_name="DiTTransformer2DModel",
        num_layers=len(net.blocks),
        num_attention_heads=heads,
        attention_head_dim=table.embedding_dim // heads,
        in_channels=net.channels,
        out_channels=2 * net.channels,
        sample_size=net.input_size,
        patch_size=net.patch,
        norm_eps=1e-6,  # diffusers' default is 1e-5
    )
    # Its other defaults are DiT's: 1000 steps, betas from 0.0001 to 0.02.
    write_json(folder / "scheduler/scheduler_config.json", _class_name="DDIMScheduler", clip_sample=False)
    write_json(
        folder / "model_index.json",
        _class_name="DiTPipeline",
        transformer=["diffusers", "DiTTransformer2DModel"],
        scheduler=["diffusers", "DDIMScheduler"],
        id2label=config.get("classes", {}),  # names for pipe.get_label_ids
    )


def write_json(path, **contents):
    text = json.dumps(contents, indent=2)
    atomic_write(path, lambda temporary: temporary.write_text(text))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--read", help="weights of diffusers' transformer")
    either.add_argument("--write", help="checkpoint of a DiT in our format")
    parser.add_argument("--out", type=Path, required=True, help="a file for --read, a folder for --write")
    parser.add_argument("--model", help="the entry of the table of models: needed with --read, and if the file of "
                        "--write does not say it")
    args = parser.parse_args(argv)
    if args.read:
        net = read_transformer(args.read, args.model)
        save_checkpoint(args.out, model=net.state_dict(), config=dict(name=net.name))
    else:
        net, config = load_model(args.model, args.write)
        write_pipeline(args.out, net, config)
    print("wrote", args.out)


if __name__ == "__main__":
    run_main(main)
