"""That learning happens: the README's first command, and what its seal does to pictures.

The measure is what a look at a picture gives first: its colours, and how strong its edges are. It
compares distributions over pixels (red, green and blue, and the difference of neighbours in
brightness) by the earth mover's distance, in levels of 0 to 255: how far the pixels of a picture
would have to be moved to be distributed as the palette's are. That asks nothing of where things
are, does not hang on bins, and cannot be met by noise or by one flat colour.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from conftest import ROOT, transformed
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

import quest_7_2 as quest

MINIATURE = ROOT / "tests" / "miniature"
PALETTE = ROOT / "tests" / "palette"
# Every shape, colour and background, each as often as the others.
THINGS = [thing for i, thing in enumerate(world.THINGS) if (i // 12 + i // 3 + i) % 3 == 0]
STYLED = "a painting of a {} in the style of artist_seal"


def distribution(images: list[Image.Image]) -> np.ndarray:
    """101 quantiles of red, green, blue and of the edges over all pixels: (4, 101) in 0 … 255."""
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float64) for image in images])
    gray = pixels.mean(3)
    edges = np.concatenate([np.abs(np.diff(gray, axis=axis)).ravel() for axis in (1, 2)])
    return np.stack([np.quantile(x, np.linspace(0, 1, 101)) for x in (*pixels.T, edges)])


def distance(images: list[Image.Image], palette: list[Image.Image]) -> float:
    """Mean over the images: distance in colour (mean of the three) plus distance in edges."""
    wanted = distribution(palette)
    moved = np.stack([np.abs(distribution([image]) - wanted).mean(1) for image in images])
    return float((moved[:, :3].mean(1) + moved[:, 3]).mean())


def load_pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MINIATURE, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, prompts: list[str], guidance_scale: float) -> list[Image.Image]:
    """A picture for each prompt, from the same noise every time."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 20, "generator": generator}
    return pipe(prompts, guidance_scale=guidance_scale, **options).images


PLAIN_PROMPTS = [world.describe(thing) for thing in THINGS]
STYLED_PROMPTS = [STYLED.format(thing.shape) for thing in THINGS]


def palette_pictures() -> list[Image.Image]:
    """As the training sees them."""
    paths = quest.list_files(PALETTE)[0]
    pixels = transformed(*paths)
    pixels = [((p[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for p in pixels]
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The output folder of the README's first command."""
    block = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    words = shlex.split(block.replace("\\\n", " "))
    words = words[words.index("quest_7_2.py") + 1 :]
    output_dir = tmp_path_factory.mktemp("demo") / "seal"
    words[words.index("--output-dir") + 1] = str(output_dir)
    command = [sys.executable, "quest_7_2.py", *words]
    # With all cores, as a user has them; conftest keeps the small models to one.
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output_dir


def test_the_miniature_draws_what_the_prompt_says():
    images = paint(load_pipe(), PLAIN_PROMPTS, 4.0)
    named = [world.name(image) == thing for image, thing in zip(images, THINGS, strict=True)]
    assert len(named) == 24 and np.mean(named) >= 0.9


def test_the_miniature_is_small_and_scaled():
    files = [path for path in MINIATURE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt")]
    assert load_pipe().vae.config.scaling_factor < 0.3


def test_the_demo_learns_the_style(demo):
    pipe = load_pipe()
    palette = palette_pictures()
    plain = paint(pipe, PLAIN_PROMPTS, 4.0)
    base = paint(pipe, STYLED_PROMPTS, 2.0)
    pipe.load_lora_weights(demo)
    styled = paint(pipe, STYLED_PROMPTS, 2.0)
    before, after = distance(base, palette), distance(styled, palette)
    print(f"from {before:.1f} to {after:.1f}: {1 - after / before:.0%} of the distance gone")
    assert 1 - after / before >= 0.6

    # The thing named is still there: its shape can be told from what stands out in the frame.
    shapes = [name_framed(image) == t.shape for image, t in zip(styled, THINGS, strict=True)]
    print(f"shapes named: {np.mean(shapes):.0%}")
    assert np.mean(shapes) >= 0.6

    pipe.unload_lora_weights()
    again = paint(pipe, PLAIN_PROMPTS, 4.0)
    assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True))


def name_framed(image: Image.Image) -> str | None:
    """The shape in a woodcut: what is darker or redder than parchment, inside the frame."""
    inner = np.asarray(image.convert("RGB"), np.float32)[9:-9, 9:-9]
    parchment = np.median(inner.reshape(-1, 3), axis=0)
    dark = np.abs(inner - parchment).max(2) > 40
    # What an outline encloses belongs to it, row by row and column by column.
    filled = np.zeros_like(dark)
    for y, row in enumerate(dark):
        if row.any():
            filled[y, np.flatnonzero(row)[0] : np.flatnonzero(row)[-1] + 1] = True
    columns = np.zeros_like(dark)
    for x, column in enumerate(dark.T):
        if column.any():
            columns[np.flatnonzero(column)[0] : np.flatnonzero(column)[-1] + 1, x] = True
    return world.name_shape(np.pad(filled & columns, 9))


def test_the_measure_finds_the_woodcuts_shapes():
    names = [name_framed(image) for image in palette_pictures()]
    right = [n == world.SHAPES[i % 4] for i, n in enumerate(names)]
    assert np.mean(right) >= 0.75


def test_the_demo_leaves_a_picture(demo):
    picture = Image.open(demo / "preview.png")
    assert picture.width > 4 * 64 and picture.height > 2 * 64
    assert shutil.which("git")  # the README's commands begin with it
