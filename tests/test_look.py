"""What there is to look at: previews, the loss curve, the model card, the console's story."""

import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import flags, read_csv, run
from huggingface_hub import ModelCard
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import safe_open
from test_resume import SEAL, interrupt  # noqa: F401 - a fixture

import quest_7_2 as quest


def seal_bytes(wanted) -> dict[str, bytes]:
    return {name: (Path(wanted.output_dir) / name).read_bytes() for name in SEAL}


def cells(file: Path, columns: int, side: int = 64) -> np.ndarray:
    """The pictures in a grid: (2, columns, side, side, 3). Enlarged ones must be so without
    smoothing, by a whole factor that makes them 160 pixels wide or more."""
    zoom = -(-160 // side)
    grid, cell = np.asarray(Image.open(file).convert("RGB")), zoom * side
    left, top = 116, grid.shape[0] - 2 * (cell + 4)
    grid = grid[top:, left : left + columns * (cell + 4)]
    grid = grid.reshape(2, cell + 4, columns, cell + 4, 3).transpose(0, 2, 1, 3, 4)[
        :, :, :cell, :cell
    ]
    small = grid[:, :, ::zoom, ::zoom]
    assert (small.repeat(zoom, 2).repeat(zoom, 3) == grid).all() and cell >= 160
    return small


# --- previews ---


def test_the_preview_shows_base_and_seal(config, model):
    wanted = config(preview_images=3, num_train_epochs=10, preview_prompt="a red circle")
    assert quest.run(wanted) == 0
    base, seal = cells(Path(wanted.output_dir) / "preview.png", 3).astype(int)
    assert (np.abs(base - seal).mean((1, 2, 3)) > 1).all()
    assert np.abs(base[0] - base[1]).mean() > 1  # another seed, another picture

    # The same pictures from the files, through diffusers' own pipeline.
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def picture(seed):
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        options = {"num_inference_steps": 20, "guidance_scale": 7.5, "latents": latents}
        return np.asarray(pipe("a red circle", **options).images[0]).astype(int)

    assert np.abs(picture(1) - base[1]).max() <= 2
    pipe.load_lora_weights(wanted.output_dir)
    assert np.abs(picture(1) - seal[1]).max() <= 2


def test_previews_do_not_touch_the_training(config, interrupt):  # noqa: F811
    options = {"num_train_epochs": 4, "lora_dropout": 0.3, "gradient_checkpointing": True}
    plain = config(**options)
    assert quest.run(plain) == 0
    without = seal_bytes(plain)
    assert not (Path(plain.output_dir) / "previews").exists()
    wanted = config(preview_images=1, preview_every_epochs=2, **options)
    assert quest.run(wanted) == 0
    assert seal_bytes(wanted) == without
    previews = Path(wanted.output_dir) / "previews"
    assert sorted(p.name for p in previews.iterdir()) == ["epoch-0002.png", "epoch-0004.png"]
    # The last one in between is drawn from the same weights as the one at the end.
    last = cells(previews / "epoch-0004.png", 1).astype(int)
    end = cells(Path(wanted.output_dir) / "preview.png", 1).astype(int)
    assert np.abs(last - end).max() <= 2
    # Interrupted and resumed: the pictures of both parts are there.
    interrupt(8)
    assert quest.run(wanted) == 130
    interrupt(None)
    assert quest.run(replace(wanted, resume=True)) == 0
    assert sorted(p.name for p in previews.iterdir()) == ["epoch-0002.png", "epoch-0004.png"]
    assert seal_bytes(wanted) == without


def test_older_pictures_do_not_stay(config):
    assert quest.run(config(preview_images=1, preview_every_epochs=1)) == 0
    wanted = config()
    (Path(wanted.output_dir) / "mine.txt").write_text("the user's")
    assert quest.run(wanted) == 0
    left = {path.name for path in Path(wanted.output_dir).iterdir()}
    assert left == {*SEAL, "result.json", "loss.csv", "loss.png", "README.md", "mine.txt"}
    assert "preview.png" not in (Path(wanted.output_dir) / "README.md").read_text()


def test_trouble_in_drawing_is_a_warning(config, monkeypatch, capsys):
    def broken(rows, prompt):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(quest, "draw_grid", broken)
    wanted = config(preview_images=1, preview_every_epochs=1)
    assert quest.run(wanted) == 0
    message = capsys.readouterr().err
    assert "no preview.png: CUDA out of memory" in message
    assert "no epoch-0001.png" in message
    assert quest.json.loads((Path(wanted.output_dir) / "result.json").read_text())["success"]


# --- the loss ---


def test_loss_csv(config):
    wanted = config(learning_rate=2e-3)
    assert quest.run(wanted) == 0
    rows = read_csv(wanted)
    assert [(row["update"], row["epoch"]) for row in rows] == [
        ("1", "1"), ("2", "1"), ("3", "2"), ("4", "2")
    ]  # fmt: skip
    assert all(float(row["learning_rate"]) == 2e-3 for row in rows)
    assert all(float(row["gradient_norm"]) > 0 for row in rows)
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert all(100 < float(row["peak_memory_mib"]) < 10_000 for row in rows)
    # An epoch is an update of two pictures and one of one.
    result = quest.json.loads((Path(wanted.output_dir) / "result.json").read_text())
    mean = (2 * float(rows[2]["loss"]) + float(rows[3]["loss"])) / 3
    assert result["finalLoss"] == pytest.approx(mean, rel=1e-12)


def test_loss_csv_is_exact_across_resume(config, interrupt):  # noqa: F811
    measured = ("images_per_second", "peak_memory_mib")
    wanted = config(num_train_epochs=4, checkpointing_steps=3)
    assert quest.run(wanted) == 0
    whole = read_csv(wanted)
    interrupt(5)
    assert quest.run(wanted) == 130
    interrupt(None)
    assert quest.run(replace(wanted, resume=True)) == 0
    again = read_csv(wanted)
    assert len(again) == len(whole) == 8
    for one, other in zip(whole, again, strict=True):
        assert {k: v for k, v in one.items() if k not in measured} == {
            k: v for k, v in other.items() if k not in measured
        }


def test_loss_png_shows_the_numbers():
    """A curve that falls from 1 to 0.2: its line is high at the left and low at the right."""
    rows = [[i, 1, 0.2 + 0.8 * np.exp(-i / 50), 1e-4, 1.0, 9.0, 99] for i in range(1, 301)]
    image = np.asarray(quest.draw_loss(rows)).astype(int)
    line = (image == np.array([8, 81, 156])).all(2)
    columns = np.flatnonzero(line.any(0))
    heights = [np.flatnonzero(line[:, x]).mean() for x in (columns[0], columns[-1])]
    assert heights[0] < 120 and heights[1] > 270
    assert quest.draw_loss(rows[:1])  # a run of one update has a picture too


# --- the model card ---


def test_the_card(config, model, palette):
    wanted = config(preview_images=1, train_prompt='a "red" circle: it\'s')
    assert quest.run(wanted) == 0
    folder = Path(wanted.output_dir)
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert {"lora", "stable-diffusion", "text-to-image"} <= set(card.data.tags)
    assert card.data.instance_prompt == wanted.train_prompt
    assert card.data.widget[0]["output"]["url"] == "preview.png"
    assert card.data.base_model is None  # a folder of the user's
    assert "8/4 = 2" in text and "4 in 2 epochs" in text
    for option in fields(wanted):
        named = f'"{quest.key_of(option.name)}": ' in text
        assert named is (option.name not in {"dataset_dir", "output_dir", "model_id", "resume"})
    settings = re.search(r"```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]
    (folder / "settings.json").write_text(settings)
    again = quest.read_config(["--config", str(folder / "settings.json")])
    private = {name: getattr(wanted, name) for name in ("dataset_dir", "output_dir", "model_id")}
    assert replace(again, **private) == wanted
    for secret in [str(palette), str(model), str(folder)]:
        assert secret not in text
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / image).exists()
    for word in ["ComfyUI", "AUTOMATIC1111", "PEFT", "torch 2"]:
        assert word in text


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_card_names_a_model_of_the_hub(on_gpu, config, tmp_path):
    wanted = config(model_id="CompVis/stable-diffusion-v1-4", variant="fp16")
    quest.write_card(tmp_path / "README.md", "a_name", wanted, on_gpu, {"strength": "2"})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "CompVis/stable-diffusion-v1-4"
    assert card.data.license == "creativeml-openrail-m" and card.data.inference is True
    assert {"lora", "stable-diffusion-diffusers", "diffusers"} <= set(card.data.tags)
    assert '"modelId"' in card.content and "<Gallery />" in card.content
    how = (
        "torch.float16, variant='fp16').to(\"cuda\")"
        if on_gpu
        else "torch.float32, variant='fp16')"
    )
    assert how in card.content
    for told in ("`<lora:a_name:1>`", "InvokeAI: import that one file", "--exclude result.json"):
        assert told in card.content


def snippets(text: str) -> list[str]:
    """The python blocks of a page, whatever the length of their fences."""
    return [
        code for _, code in re.findall(r"^(`{3,})python\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("kind", ["float32", "float16", "variant", "dora"])
def test_the_snippets_in_the_card_run_as_printed(kind, config, model, tmp_path, monkeypatch):
    """On a base model kept in float16 too, whose parts load in dtypes that do not go together."""
    options, base = {}, tmp_path / "path/to/the/base/model"
    base.parent.mkdir(parents=True)
    if kind in ("float32", "dora"):
        shutil.copytree(model, base)
    else:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16)
        options = {"variant": "fp16"} if kind == "variant" else {}
        pipe.save_pretrained(base, **options)
    prompt = "a ```circle``` in `ticks`, 'quotes' and \"quotes\""
    wanted = config(model_id=str(base), train_prompt=prompt, use_dora=kind == "dora", **options)
    assert quest.run(wanted) == 0
    (tmp_path / "path/to/this").mkdir()
    (tmp_path / "path/to/this/folder").symlink_to(wanted.output_dir)
    text = (Path(wanted.output_dir) / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    (snippet,) = snippets(text)
    names = {}
    exec(snippet, names)  # noqa: S102 - that is the test
    layers = [m for m in names["pipe"].unet.modules() if isinstance(m, LoraLayer)]
    assert layers and all(layer.merged is False for layer in layers) and names["image"]
    if kind != "dora":
        (other,) = re.findall(r"`(PeftModel\.from_pretrained.*?)`", text)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
        again = eval(other, {"PeftModel": quest.PeftModel, "pipe": pipe})
        assert again.peft_config["default"].r == 4


def test_every_seal_has_a_name_of_its_own(config, tmp_path):
    names = set()
    for seed in (0, 1):
        wanted = config(seed=seed, output_dir=str(tmp_path / f"private{seed}"))
        assert quest.run(wanted) == 0
        file = Path(wanted.output_dir) / "pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as seal:
            metadata = seal.metadata()
        name = metadata["ss_output_name"]
        assert metadata["modelspec.title"] == name and "private" not in name
        assert name.startswith("a_painting_in_the_style_of_artist_seal_")
        text = (Path(wanted.output_dir) / "README.md").read_text()
        assert f"# {name}" in text and f"`<lora:{name}:1>`" in text
        names.add(name)
    assert len(names) == 2


@pytest.mark.parametrize("side", [64, 256, 512])
@pytest.mark.parametrize("count", [1, 4])
def test_previews_can_be_seen(side, count, tmp_path):
    red, blue = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])[..., None, None].expand(
        2, 3, side, side
    )
    rows = torch.stack([red] * count + [blue] * count)
    image = quest.draw_grid(rows, "a painting of a circle in the style of artist_seal")
    image.save(tmp_path / "grid.png")
    base, seal = cells(tmp_path / "grid.png", count, side)
    assert (base == (255, 0, 0)).all() and (seal == (0, 0, 255)).all()
    head = np.asarray(image)[:20]
    assert (head == 0).all(2).any()  # the prompt stands above
    longer = quest.draw_grid(rows, "a painting of a circle " * 30)
    assert longer.height > image.height and longer.width == image.width


# --- the console ---


def test_the_console_tells_the_story(config):
    wanted = config(num_train_epochs=1)
    done = run(*flags(wanted))
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert "3 pictures, 64×64 pixels" in lines[1]
    assert "2,752 LoRA weights at strength 8/4 = 2, 2 updates" in done.stderr
    assert "in float32 on CPU" in done.stderr
    assert wanted.train_prompt not in done.stderr
    assert len(lines) <= 6 and "\r" not in done.stderr  # no bars where nobody looks
    assert wanted.output_dir in done.stdout and "load_lora_weights" in done.stdout
