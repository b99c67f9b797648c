"""The options of the field, each against a value worked out by hand."""

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import prepared, read_csv, run, transformed
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_resume import finished, interrupt  # noqa: F401 - a fixture
from test_seal import base_unet, merge_by_kohya_rule, output
from test_training import train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import quest_7_2 as quest

# --- captions ---


def captions(config) -> dict[str, str]:
    _, texts, digests = quest.load_pictures(config)
    return dict(zip(digests, texts, strict=True))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_captions_from_metadata(kind, config, palette):
    shutil.copytree(palette, palette / "sub")
    rows = [("1.png", 'a "circle",\nна холсте'), ("sub/0.png", "007"), ("2.png", "  ")]
    table = pandas.DataFrame(rows, columns=["file_name", "text"])
    file = palette / f"metadata.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({"file_name": n, "text": t}) for n, t in rows]
        file.write_text("\n".join(lines))
    elif kind == "csv":
        table.to_csv(file, index=False)
    else:
        table.to_parquet(file)
    (palette / "2.txt").write_text("not read: the metadata speak of it")
    (palette / "0.txt").write_text("\n from a text file \n", encoding="utf-8")
    default = config().train_prompt
    assert captions(config()) == {
        "0.png": "from a text file",
        "1.png": 'a "circle",\nна холсте',
        "2.png": default,
        "sub/0.png": "007",
        "sub/1.png": default,
        "sub/2.png": default,
    }


def test_metadata_in_a_subfolder_speaks_of_its_own(config, palette):
    shutil.copytree(palette, palette / "sub")
    (palette / "sub" / "metadata.csv").write_text("file_name,text\n1.png,inner\n")
    told = captions(config())
    assert told["sub/1.png"] == "inner" and told["1.png"] == config().train_prompt


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", "file_name,text\nno.png,a\nnot.png,b\n", "'no.png' in metadata.csv, 'not"),
        ("metadata.csv", "file_name,caption\n0.png,a\n", "'text'; it needs the columns"),
        ("metadata.jsonl", "{broken", "metadata.jsonl: "),
        ("metadata.parquet", "no parquet", "metadata.parquet: "),
        ("1.txt", b"\xff\xfe\xff", "1.txt: "),
    ],
)
def test_bad_captions_are_refused(name, content, message, config, palette, capsys):
    content = content if isinstance(content, bytes) else content.encode()
    (palette / name).write_bytes(content)
    wanted = config()
    assert quest.run(wanted) == 2
    assert message in capsys.readouterr().err
    assert not Path(wanted.output_dir).exists()


def test_the_right_caption_goes_with_the_right_picture(config, palette, model):
    """Each sample's latents come from the picture whose caption's embedding it carries."""
    texts = {"0": "a red circle", "1": "a blue square", "2": "a red circle"}
    for name, text in texts.items():
        (palette / f"{name}.txt").write_text(text)
    run_ = prepared(config(train_prompt="unused"))
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    embeds = {}
    for text in set(texts.values()):
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            embeds[text] = text_encoder(ids)[0][0]
    # A posterior without deviation: the latents are the picture's mean itself.
    moments = run_.moments.clone()
    moments[:, :, 1] = 0
    run_ = replace(run_, moments=moments)
    for position in range(60):
        drawn = run_.draw(position)
        same = (moments[:, :, 0].float() == drawn["latents"]).flatten(2).all(2).any(1)
        assert same.sum() == 1
        nearest = same.nonzero().item()
        torch.testing.assert_close(drawn["prompt_embeds"], embeds[texts[str(nearest)]])


def test_captions_count_in_resume(config, palette, interrupt, capsys):  # noqa: F811
    (palette / "0.txt").write_text("a red circle")
    wanted = config(num_train_epochs=4, train_batch_size=2)
    assert quest.run(wanted) == 0
    whole = finished(wanted)
    interrupt(3)
    assert quest.run(wanted) == 130
    interrupt(None)
    (palette / "0.txt").write_text("a blue circle")
    assert quest.run(replace(wanted, resume=True)) == 2
    assert "picture '0.png'" in capsys.readouterr().err
    (palette / "0.txt").write_text("a red circle")
    assert quest.run(replace(wanted, resume=True)) == 0
    assert finished(wanted) == whole


def test_long_captions_are_named_by_their_tokens(config, palette, capsys):
    (palette / "0.txt").write_text("red " * 75)  # 75 words, start and end: just 77
    (palette / "1.txt").write_text("red " * 80)
    assert quest.run(config()) == 0
    message = capsys.readouterr().err
    assert "longer than 77 tokens" in message and "picture '1.png' (82 tokens)" in message
    assert "0.png" not in message and "red red" not in message


# --- loss ---


class Guess(torch.nn.Module):
    """Predicts zero, so that the loss is the target's own mean square."""

    def forward(self, sample, timesteps, encoder_hidden_states):
        return type("Output", (), {"sample": torch.zeros_like(sample)})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction_type):
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )  # fmt: skip
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas)
    generator = torch.Generator().manual_seed(0)
    for timestep in [0, 50, 200, 500, 999]:
        batch = {
            "latents": torch.randn(1, 4, 8, 8, generator=generator),
            "noise": torch.randn(1, 4, 8, 8, generator=generator),
            "timesteps": torch.tensor([timestep]),
            "prompt_embeds": None,
        }
        snr = alphas_cumprod[timestep] / (1 - alphas_cumprod[timestep])
        least = min(snr, 5)
        weight = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}
        plain = quest.compute_loss(Guess(), scheduler, batch).item()
        weighted = quest.compute_loss(Guess(), scheduler, batch, snr_gamma=5.0).item()
        assert weighted == pytest.approx(plain * weight[prediction_type], rel=1e-4)


def test_zero_terminal_snr():
    """At SNR 0 the picture is pure noise: weight 0 for velocity, 1 for noise, no NaN."""
    batch = {
        "latents": torch.ones(1, 4, 8, 8),
        "noise": torch.randn(1, 4, 8, 8),
        "timesteps": torch.tensor([999]),
        "prompt_embeds": None,
    }
    for prediction_type, expected in [("v_prediction", 0.0), ("epsilon", 1.0)]:
        scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        plain = quest.compute_loss(Guess(), scheduler, batch).item()
        assert plain > 0.5
        weighted = quest.compute_loss(Guess(), scheduler, batch, snr_gamma=5.0).item()
        assert weighted == pytest.approx(expected * plain)


def test_a_base_with_zero_terminal_snr_trains(config, model, tmp_path):
    base = shutil.copytree(model, tmp_path / "base")
    scheduler = DDPMScheduler.from_pretrained(
        base / "scheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    scheduler.save_pretrained(base / "scheduler")
    assert quest.run(config(model_id=str(base), snr_gamma=5.0, preview_images=1)) == 0


def test_noise_offset(config):
    """noise + 0.5 × one number for each channel: the channels' means spread by 0.5."""
    run_ = prepared(config())
    offset = replace(run_, config=config(noise_offset=0.5))
    means = []
    for position in range(300):
        plain, moved = run_.draw(position), offset.draw(position)
        assert all(torch.equal(plain[k], moved[k]) for k in plain if k != "noise")
        difference = moved["noise"] - plain["noise"]
        assert difference.flatten(1).std(1).max() < 1e-5  # one number a channel
        means.append(difference.mean((1, 2)))
    assert torch.cat(means).std().item() == pytest.approx(0.5, rel=0.1)


def test_caption_dropout(config, palette):
    """A share of the samples carries the empty prompt; nothing else about them changes."""
    (palette / "0.txt").write_text("a red circle")
    plain, dropping = prepared(config()), prepared(config(caption_dropout=0.3))
    empty, dropped = dropping.prompt_embeds[""], 0
    for position in range(600):
        one, other = plain.draw(position), dropping.draw(position)
        assert all(torch.equal(one[key], other[key]) for key in one if key != "prompt_embeds")
        is_empty = torch.equal(other["prompt_embeds"], empty)
        assert is_empty or torch.equal(one["prompt_embeds"], other["prompt_embeds"])
        dropped += is_empty
    assert dropped / 600 == pytest.approx(0.3, abs=0.06)
    assert not any(torch.equal(plain.draw(i)["prompt_embeds"], empty) for i in range(50))


# --- schedule ---


@pytest.mark.parametrize(
    "name, warmup, factor",
    [
        ("constant", 0, lambda step: 1),
        ("constant", 4, lambda step: min(1, step / 4)),
        ("constant_with_warmup", 4, lambda step: min(1, step / 4)),
        ("linear", 2, lambda step: step / 2 if step < 2 else (12 - step) / 10),
        ("cosine", 0, lambda step: 0.5 * (1 + math.cos(math.pi * step / 12))),
        ("cosine_with_restarts", 0, lambda step: 0.5 * (1 + math.cos(math.pi * step / 12))),
        ("polynomial", 0, lambda step: (1 - 1e-5) * (1 - step / 12) + 1e-5),
    ],
)
def test_schedules(name, warmup, factor, config, interrupt):  # noqa: F811
    wanted = config(num_train_epochs=6, lr_scheduler=name, lr_warmup_steps=warmup)
    assert quest.run(wanted) == 0
    rates = [float(row["learning_rate"]) for row in read_csv(wanted)]
    assert rates == pytest.approx([1e-2 * factor(step) for step in range(12)], rel=1e-5)
    whole = finished(wanted)
    interrupt(7)
    assert quest.run(wanted) == 130
    interrupt(None)
    assert quest.run(replace(wanted, resume=True)) == 0
    assert finished(wanted) == whole
    assert [float(row["learning_rate"]) for row in read_csv(wanted)] == rates


# --- LoRA ---


def test_rslora_has_its_strength_everywhere(config, model):
    """alpha / √rank = 8 / 2 = 4: the file's alpha is 4 × 4 = 16."""
    wanted = config(use_rslora=True)
    assert quest.run(wanted) == 0
    seal = Path(wanted.output_dir)
    tensors = load_file(seal / "pytorch_lora_weights.safetensors")
    assert all(t.item() == 16 for key, t in tensors.items() if key.endswith(".alpha"))
    base = output(base_unet(model))
    effect = output(PeftModel.from_pretrained(base_unet(model), seal).eval()) - base
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(seal)
    merged = base_unet(model)
    merge_by_kohya_rule(merged, seal / "pytorch_lora_weights.safetensors")
    for unet in (pipe.unet, merged):
        assert (output(unet) - base - effect).norm() < 1e-3 * effect.norm()
    assert "8/√4 = 4" in (seal / "README.md").read_text()


def test_dora_is_for_peft_alone(config, model, capsys):
    """The output is W' = m (W + 2BA) / ‖W + 2BA‖, rows of the weight normed."""
    assert quest.run(config()) == 0  # an earlier seal, whose file must not stay
    assert "load_lora_weights" in capsys.readouterr().out
    wanted = config(use_dora=True, preview_images=1)
    assert quest.run(wanted) == 0
    seal = Path(wanted.output_dir)
    assert not (seal / "pytorch_lora_weights.safetensors").exists()
    assert "No program below loads a DoRA" in (seal / "README.md").read_text()
    told = capsys.readouterr()
    assert "DoRA" in told.err and told.out.splitlines()[-1].startswith("seal written")
    tensors = load_file(seal / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    loaded = PeftModel.from_pretrained(base_unet(model), seal).eval()
    by_hand = base_unet(model)
    for name, module in by_hand.named_modules():
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" in tensors:
            a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            magnitude = tensors[f"{key}.lora_magnitude_vector"]
            weight = module.weight.data + 2 * b @ a
            module.weight.data = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    effect = output(loaded) - output(base_unet(model))
    assert effect.norm() > 0
    assert (output(by_hand) - output(loaded)).norm() < 1e-3 * effect.norm()


def test_init_lora_weights(config):
    first = {}
    for name in [None, "gaussian", "orthogonal"]:
        unet = prepared(config(init_lora_weights=name, rank=8)).unet()
        a = next(p for n, p in unet.named_parameters() if "lora_A" in n)
        first[name] = a.detach().clone()
    assert first["gaussian"].std().item() == pytest.approx(1 / 8, rel=0.3)
    assert not torch.equal(first[None], first["orthogonal"])
    train(config(init_lora_weights="orthogonal"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--init-lora-weights", "pissa"], "must be one of gaussian, orthogonal"),
        (["--init-lora-weights", "orthogonal", "--rank", "3"], "needs an even --rank"),
        (["--lr-scheduler", "piecewise_constant"], "must be one of constant, "),
        (["--snr-gamma", "0"], "must be finite and above 0"),
        (["--noise-offset", "-0.1"], "must be finite and at least 0"),
        (["--resize-mode", "pad"], "must be one of squash, crop"),
    ],
)
def test_bad_options_are_refused(words, message, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


# --- pictures ---


def test_crop_and_squash(tmp_path):
    """A picture of three squares, black, grey, white: squashed all are there, cropped the grey."""
    wide = Image.new("RGB", (60, 20), (0, 0, 0))
    wide.paste((128, 128, 128), (20, 0, 40, 20))
    wide.paste((255, 255, 255), (40, 0, 60, 20))
    for image, axis in [(wide, 1), (wide.rotate(-90, expand=True), 0)]:
        image.save(tmp_path / "wide.png")
        wide_png = tmp_path / "wide.png"
        ((crop, _),) = transformed(wide_png, resolution=16, resize_mode="crop")
        ((squash, _),) = transformed(wide_png, resolution=16)
        assert crop.shape == squash.shape == (3, 16, 16)
        assert crop.sub(128 / 127.5 - 1).abs().max() < 0.2
        line = squash[0].mean(1 - axis)
        assert line[0] == -1 and line[-1] == 1 and abs(line[8]) < 0.1


# --- base models ---


def test_stable_diffusion_2_layouts(config, model, tmp_path):
    """Another text width, velocity prediction, heads by number: as Stable Diffusion 2.1 has them."""
    base = shutil.copytree(model, tmp_path / "sd2")
    torch.manual_seed(0)
    text = CLIPTextConfig.from_pretrained(base / "text_encoder")
    text.hidden_size, text.intermediate_size, text.num_attention_heads = 1024, 64, 16
    CLIPTextModel(text).save_pretrained(base / "text_encoder")
    unet = dict(UNet2DConditionModel.load_config(base / "unet"))
    unet |= {"cross_attention_dim": 1024, "attention_head_dim": [2, 4]}
    unet |= {"use_linear_projection": True}
    UNet2DConditionModel.from_config(unet).save_pretrained(base / "unet")
    scheduler = DDPMScheduler.from_pretrained(base / "scheduler", prediction_type="v_prediction")
    scheduler.save_pretrained(base / "scheduler")
    wanted = config(model_id=str(base), preview_images=1)
    assert quest.run(wanted) == 0
    with safe_open(Path(wanted.output_dir) / "pytorch_lora_weights.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["ss_base_model_version"] == "sd_v2" and metadata["ss_v2"] == "True"
    assert metadata["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    "name, index, unet",
    [
        ("StableDiffusionXLPipeline", {"text_encoder_2": ["transformers", "CLIP"]}, {}),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "SD3"]}, None),
        ("FluxPipeline", {"transformer": ["diffusers", "Flux"]}, None),
        ("StableDiffusionInpaintPipeline", {}, {"in_channels": 9}),
        ("Nameless", {}, {"cross_attention_dim": 2048}),
        ("StableDiffusionXLPipeline", {}, {"addition_embed_type": "text_time"}),
    ],
)
def test_other_families_are_refused(name, index, unet, config, model, tmp_path, capsys):
    base = shutil.copytree(model, tmp_path / "other")
    (base / "model_index.json").write_text(json.dumps({"_class_name": name} | index))
    if unet is None:
        shutil.rmtree(base / "unet")
    else:
        found = json.loads((base / "unet" / "config.json").read_text())
        (base / "unet" / "config.json").write_text(json.dumps(found | unet))
    assert quest.run(config(model_id=str(base))) == 1
    message = capsys.readouterr().err
    assert f"is {name}; this script trains text-to-image Stable Diffusion 1.x and 2.x" in message


def test_a_fine_tune_without_an_index_trains(config, model, tmp_path):
    base = shutil.copytree(model, tmp_path / "fine")
    (base / "model_index.json").unlink()
    AutoencoderKL.from_pretrained(base / "vae").save_pretrained(base / "vae")
    train(config(model_id=str(base)))


def test_every_option_is_one_line():
    code = Path(quest.__file__).read_text()
    for option in fields(quest.Config):
        lines = [x for x in code.splitlines() if x.startswith(f"    {option.name}: ")]
        assert any("option(" in x and len(x) <= 100 for x in lines), option.name
