"""One .safetensors file in the original layout as the base model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import flags, run
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_resume import SEAL, interrupt  # noqa: F401 - a fixture
from transformers import CLIPTextConfig, CLIPTextModel

import quest_7_2 as quest

HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # whose configurations go with SD 1.x

# diffusers' names of parts of a layer, and the original's.
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
EDGES = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_name(name: str, layers: int, attentive: set[str]) -> str:
    """The original's name of a UNet weight, as CompVis' openaimodel.py counts its blocks."""
    stem, kind = name.rsplit(".", 1)
    if stem in EDGES:
        return f"{EDGES[stem]}.{kind}"
    words = name.split(".")
    if words[0] == "mid_block":
        number = 1 if words[1] == "attentions" else 2 * int(words[2])
        head, rest = f"middle_block.{number}", words[3:]
    else:
        where, block, what, layer = words[0], int(words[1]), words[2], int(words[3])
        rest = words[4:]
        if what == "downsamplers":
            head, rest = f"input_blocks.{(layers + 1) * (block + 1)}.0.op", rest[1:]
        elif what == "upsamplers":
            place = 2 if f"up_blocks.{block}" in attentive else 1
            head = f"output_blocks.{(layers + 1) * block + layers}.{place}"
        else:
            side = "input" if where == "down_blocks" else "output"
            number = (layers + 1) * block + layer + (side == "input")
            head = f"{side}_blocks.{number}.{int(what == 'attentions')}"
    if rest[0] in RESNET and "attentions" not in name:
        rest = [RESNET[rest[0]], *rest[1:]]
    return ".".join([head, *rest])


def vae_name(name: str, blocks: int) -> str:
    """The original's name of a VAE weight; its decoder counts its levels from below."""
    words = name.split(".")
    if len(words) > 2 and words[1] == "mid_block":
        if words[2] == "resnets":
            words = [words[0], "mid", f"block_{int(words[3]) + 1}", *words[4:]]
        else:
            part = ".".join(words[4:-1])
            words = [words[0], "mid", "attn_1", VAE_ATTENTION[part], words[-1]]
    elif len(words) > 2 and words[1] in ("down_blocks", "up_blocks"):
        way = words[1].removesuffix("_blocks")
        level = int(words[2]) if way == "down" else blocks - 1 - int(words[2])
        if words[3] == "resnets":
            words = [words[0], way, str(level), "block", *words[4:]]
        else:
            words = [words[0], way, str(level), f"{way}sample", *words[5:]]
    words = ["nin_shortcut" if w == "conv_shortcut" else w for w in words]
    return ".".join("norm_out" if w == "conv_norm_out" else w for w in words)


OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def open_clip(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP text encoder's weights as open_clip, and so Stable Diffusion 2.x, names them: query, key
    and value in one, and of the projection that is not used the width alone is of interest."""
    renamed = {"text_projection": torch.zeros(1024, 1024)}
    for name, weight in text.items():
        if "self_attn.q_proj" in name:
            parts = [text[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            kind = name.split(".")[-1]
            name = name.replace(f"self_attn.q_proj.{kind}", f"attn.in_proj_{kind}")
            weight = torch.cat(parts)
        elif "k_proj" in name or "v_proj" in name:
            continue
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        is_position = name == "embeddings.position_embedding.weight"
        renamed["positional_embedding" if is_position else name] = weight
    return renamed


def original_layout(model: Path, dtype=None, ema: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a folder in diffusers' layout under the original's names."""
    tensors = {}
    layers = json.loads((model / "unet" / "config.json").read_text())["layers_per_block"]
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    attentive = {".".join(n.split(".")[:2]) for n in weights if "attentions" in n}
    for name, weight in weights.items():
        tensors[f"model.diffusion_model.{unet_name(name, layers, attentive)}"] = weight
    for name, weight in load_file(model / "vae" / "diffusion_pytorch_model.safetensors").items():
        original = vae_name(name, 4)
        is_conv = "attn_1" in original and weight.ndim == 2
        tensors[f"first_stage_model.{original}"] = weight[..., None, None] if is_conv else weight
    text = load_file(model / "text_encoder" / "model.safetensors")
    text = {name.removeprefix("text_model."): weight for name, weight in text.items()}
    if json.loads((model / "text_encoder" / "config.json").read_text())["hidden_size"] == 1024:
        tensors |= {f"cond_stage_model.model.{k}": w for k, w in open_clip(text).items()}
    else:
        prefix = "cond_stage_model.transformer.text_model."
        tensors |= {f"{prefix}{name}": weight for name, weight in text.items()}
    if ema:
        names = [name for name in tensors if name.startswith("model.diffusion_model.")]
        for name in names:
            flat = name.removeprefix("model.").replace(".", "")
            tensors[f"model_ema.{flat}"] = torch.zeros_like(tensors[name])
    return {name: t.to(dtype or t.dtype).contiguous() for name, t in tensors.items()}


def keep_in_cache(cache: Path, hub_id: str, model: Path) -> None:
    """A hub cache made by hand, with the configurations of a model under a name on the hub."""
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)


@pytest.fixture
def hub_cache(model, tmp_path, monkeypatch) -> Path:
    """A hub cache with the configurations of `HUB_ID`: those of the small model."""
    keep_in_cache(tmp_path / "hub", HUB_ID, model)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def seal_of(wanted) -> dict[str, bytes]:
    assert quest.run(wanted) == 0
    return {name: (Path(wanted.output_dir) / name).read_bytes() for name in SEAL}


@pytest.mark.parametrize("ema", [False, True])
def test_the_seal_of_a_file_is_that_of_its_folder(ema, config, model, hub_cache, tmp_path):
    """Byte for byte, and through the command as a user runs it, offline. (In float32 on a CPU the
    weights are used where they lie in the file: how they are aligned there must not show.)"""
    file = tmp_path / "private name" / "model.safetensors"
    file.parent.mkdir()
    weights = original_layout(model, ema=ema)
    if ema:  # what else may lie in such a file: nothing that is meant for a part of the model
        weights["vae.quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
    save_file(weights, file)
    options = {"lora_dropout": 0.2, "preview_images": 1}
    one = config(output_dir=str(tmp_path / "one"), **options)
    assert quest.run(one) == 0
    wanted = config(output_dir=str(tmp_path / "two"), model_id=str(file), **options)
    done = run(*flags(wanted))
    assert done.returncode == 0, done.stderr
    for name in SEAL:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for path in (tmp_path / "two").iterdir():
        assert path.name == "result.json" or b"private name" not in path.read_bytes()
    assert "path/to/the/base/model" in (tmp_path / "two" / "README.md").read_text()


def test_a_half_precision_file(config, model, hub_cache, tmp_path):
    file, half = tmp_path / "model.safetensors", tmp_path / "half"
    save_file(original_layout(model, torch.float16), file)
    shutil.copytree(model, half)
    for weights in half.glob("*/*.safetensors"):
        narrow = {key: t.half() for key, t in load_file(weights).items()}
        save_file(narrow, weights, {"format": "pt"})
    for precision in ("no", "fp16", "bf16"):
        options = {"mixed_precision": precision}
        of_folder = seal_of(config(model_id=str(half), **options))
        assert seal_of(config(model_id=str(file), **options)) == of_folder


def test_a_file_of_stable_diffusion_2(config, model, hub_cache, tmp_path):
    """Its text encoder is open_clip's, 1,024 wide; its configurations say v-prediction."""
    base = shutil.copytree(model, tmp_path / "base")
    options = json.loads((model / "text_encoder" / "config.json").read_text())
    options |= {"hidden_size": 1024, "projection_dim": 1024, "num_attention_heads": 16}
    CLIPTextModel(CLIPTextConfig(**options)).save_pretrained(base / "text_encoder")
    unet = dict(UNet2DConditionModel.load_config(model / "unet"))
    unet |= {"cross_attention_dim": 1024, "layers_per_block": 2}
    UNet2DConditionModel.from_config(unet).save_pretrained(base / "unet")
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler", prediction_type="v_prediction")
    scheduler.save_pretrained(base / "scheduler")
    keep_in_cache(hub_cache, "stabilityai/stable-diffusion-2-1", base)
    save_file(original_layout(base), tmp_path / "model.safetensors")
    of_file = seal_of(config(model_id=str(tmp_path / "model.safetensors")))
    assert of_file == seal_of(config(model_id=str(base)))
    header = of_file["pytorch_lora_weights.safetensors"][:2000]
    assert b"stable-diffusion-v2-768-v/lora" in header


def test_another_file_is_noticed_by_resume(config, model, hub_cache, tmp_path, interrupt, capsys):  # noqa: F811
    file = tmp_path / "model.safetensors"
    tensors = original_layout(model)
    save_file(tensors, file)
    wanted = config(model_id=str(file), num_train_epochs=4)
    interrupt(3)
    assert quest.run(wanted) == 130
    interrupt(None)
    save_file({key: tensor + 0.01 for key, tensor in tensors.items()}, file)
    assert quest.run(replace(wanted, resume=True)) == 2
    message = capsys.readouterr().err
    assert "the base model's files" in message
    save_file(tensors, file)
    assert quest.run(replace(wanted, resume=True)) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (("model.diffusion_model.input_blocks.0.0.weight", (8, 9, 3, 3)), "is inpainting;"),
        (
            ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", (1,)),
            "is xl_base",
        ),
        (("double_blocks.0.img_attn.proj.weight", (1,)), "no whole checkpoint"),
    ],
)
def test_other_files_are_refused_by_their_header(
    change, message, config, model, hub_cache, tmp_path, capsys
):
    file, (name, shape) = tmp_path / "model.safetensors", change
    tensors = {} if "double" in name else original_layout(model)
    save_file(tensors | {name: torch.zeros(shape)}, file)
    assert quest.run(config(model_id=str(file))) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_unread(suffix, config, tmp_path, capsys):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    assert quest.run(config(model_id=str(file))) == 1
    assert "pickled ones can run code" in capsys.readouterr().err
    assert not Path("unpickled").exists()


def test_a_damaged_file_and_one_with_weights_missing(config, model, hub_cache, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no safetensors")
    assert quest.run(config(model_id=str(file))) == 1
    assert f"model {file} cannot be read" in capsys.readouterr().err
    tensors = original_layout(model)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, file)
    assert quest.run(config(model_id=str(file))) == 1
    assert "the model's unet" in capsys.readouterr().err


def test_without_the_configurations_it_says_what_to_fetch(config, model, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    save_file(original_layout(model), file)
    assert quest.run(config(model_id=str(file))) == 1
    message = capsys.readouterr().err
    assert f"hf download {HUB_ID} --include '*.json' '*/merges.txt'" in message
    assert quest.run(config(model_id=str(file), variant="fp16")) == 2
    assert "--variant is for" in capsys.readouterr().err
