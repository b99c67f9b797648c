"""What the tests share: a Stable Diffusion of a few thousand weights, pictures, the command."""

import csv
import hashlib
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# The models here are tiny: a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
import world
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import quest_7_2 as quest

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A Stable Diffusion in diffusers layout with random weights: 8 pixels to a latent."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer().train_new_from_iterator(map(world.describe, world.THINGS), 600)
    tokenizer.model_max_length = 77
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    noise_scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    folder = tmp_path_factory.mktemp("model")
    StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def palette(tmp_path) -> Path:
    """Three pictures."""
    folder = tmp_path / "palette"
    folder.mkdir()
    for i, thing in enumerate(world.THINGS[:3]):
        world.draw(thing, random.Random(i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(model, palette, tmp_path):
    """`config(**changes)`: a Config for a short run on the small model."""

    def make(**changes):
        options = {
            "dataset_dir": str(palette),
            "output_dir": str(tmp_path / "seal"),
            "model_id": str(model),
            "resolution": 64,
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "rank": 4,
            "lora_alpha": 8.0,
            "preview_images": 0,
        }
        return quest.Config(**options | changes)

    return make


@dataclass(frozen=True)
class Prepared:
    """What the run computes before its loop, for tests of what comes after it."""

    config: quest.Config
    base: quest.Base
    dtype: torch.dtype
    noise_scheduler: DDPMScheduler
    prompt_embeds: dict[str, torch.Tensor]
    caption_embeds: list[torch.Tensor]
    moments: torch.Tensor

    def draw(self, position: int) -> dict[str, torch.Tensor]:
        """The sample at a position of the run, batches of one."""
        plan = quest.plan_epoch(len(self.moments), 1, 1)
        timesteps = self.noise_scheduler.config.num_train_timesteps
        draw_from = (self.moments, self.caption_embeds, timesteps, self.config)
        (piece,) = quest.draw_update(position, plan, *draw_from)
        return {name: value[0] for name, value in piece.items()}

    def batch(self, *positions: int) -> dict[str, torch.Tensor]:
        return torch.utils.data.default_collate([self.draw(position) for position in positions])

    def unet(self):
        return quest.load_unet(self.base, self.config, CPU, self.dtype)


def prepared(wanted, dtype=torch.float32) -> Prepared:
    dataset, captions, _ = quest.load_pictures(wanted)
    base = quest.find_model(wanted.model_id, wanted.variant)
    prompts = dict.fromkeys([*captions, "", wanted.train_prompt], "")
    prompt_embeds = quest.embed_prompts(base, prompts, CPU)
    return Prepared(
        config=wanted,
        base=base,
        dtype=dtype,
        noise_scheduler=DDPMScheduler.from_pretrained(base.folder / "scheduler"),
        prompt_embeds=prompt_embeds,
        caption_embeds=[prompt_embeds[caption] for caption in [*captions, ""]],
        moments=quest.encode_pictures(base, dataset, CPU, dtype),
    )


def epoch_order(seed: int, epoch: int, pictures: int) -> list[int]:
    """The pictures of an epoch as they are drawn, told by their captions."""
    config = quest.Config(seed=seed, train_batch_size=pictures)
    plan = quest.plan_epoch(pictures, pictures, 1)
    draw_from = (torch.zeros(pictures, 2, 2, 1, 1, 1), [*torch.arange(pictures + 1)], 1000, config)
    (piece,) = quest.draw_update(epoch, plan, *draw_from)
    return piece["prompt_embeds"].tolist()


def transformed(*paths: Path, resolution: int = 64, resize_mode: str = "squash") -> list:
    """Each picture and its mirror image as the training sees them: (2, 3, R, R) in [-1, 1]."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    rows = {"image": [{"path": str(path)} for path in paths], "sha256": digests}
    return quest.apply_transforms(rows, resolution, resize_mode)["pixel_values"]


def checkpoint_file(wanted) -> Path:
    return Path(wanted.output_dir) / quest.CHECKPOINT


def read_csv(wanted) -> list[dict]:
    with open(Path(wanted.output_dir) / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def flags(config) -> list[str]:
    """A Config as the command's flags."""
    words = []
    for option in quest.fields(quest.Config):
        value = getattr(config, option.name)
        if isinstance(value, bool):
            words += [quest.flag_of(option.name)] if value else []
        elif value is not None:
            words += [quest.flag_of(option.name), str(value)]
    return words


def run(*words, cwd=None, env=None) -> subprocess.CompletedProcess:
    """The command as a user runs it."""
    command = [sys.executable, str(ROOT / "quest_7_2.py"), *map(str, words)]
    env = os.environ | (env or {})
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300, check=False
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }
