"""Train tests/miniature, a Stable Diffusion of 5 million weights: hours on a CPU core or two.

    python tests/make_miniature.py vae unet more

Each word is a part to train. The VAE goes on from the one in the folder (VAE_MORE updates), or
begins from nothing (VAE_UPDATES) where there is none; the text encoder and the UNet begin anew, and
with "more" go on for UNET_MORE updates.
tests/miniature came about in more goes than these: a VAE as here; the UNet 6,000 updates with half of
the captions wrong, which taught it to draw and hardly to read, then 2,000 with 15 % and 5,000 and
2,400 with 10 % (rates 6e-4, 5e-4, 8e-4, 6e-4), which taught it the rest. So the script now has 10 %
from the start; in one go it has not been trained like this.

The miniature draws 64×64 pictures of the things in tests/world.py, and forty styles by name. Like
the real one it has a CLIP text encoder (trained here together with the UNet), a VAE whose latents
are far from unit variance, and an epsilon-predicting UNet; it is saved in diffusers' layout in 16
bits (about 11 MB).
"""

import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image, ImageDraw
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FOLDER = Path(__file__).parent / "miniature"
VAE_UPDATES, VAE_MORE, VAE_BATCH = 4500, 1200, 16
UNET_UPDATES, UNET_MORE, UNET_BATCH = 9000, 2400, 16
PICTURES = 12_000
# One prompt in ten is empty, for classifier-free guidance, and one in ten another picture's: the web's
# captions, which taught Stable Diffusion, are no better. Such a model needs guidance and bears 7.5
# of it, where one that trusts its prompts overshoots its colours.
EMPTY, WRONG = 0.1, 0.1
# SD's own scaling factor: the latents' standard deviation is 1 / 0.18215 = 5.49.
SCALING_FACTOR = 0.18215


def random_style(rng: random.Random) -> world.Style:
    """Any colours that can be told apart, framed or not, with a margin or grain or neither."""
    ground, fill, ink, edge = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(4))
    options = {"frame": rng.random() < 0.6, "edge": edge if rng.random() < 0.4 else None}
    style = world.Style(ground, fill, ink, **options, grain=rng.choice([0.0, 0.0, 5.0, 9.0]))
    pairs = [(ground, fill), (ground, ink), (fill, ink)]
    is_clear = all(max(abs(a - b) for a, b in zip(*pair, strict=True)) > 70 for pair in pairs)
    return style if is_clear else random_style(rng)


def make_styles() -> dict[str, world.Style]:
    """Forty styles by made-up names; none has the woodcut's parchment for its ground."""
    rng, styles = random.Random(1), {}
    while len(styles) < 40:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        style = random_style(rng)
        if math.dist(style.ground, world.WOODCUT.ground) > 80:
            styles[name] = style
    return styles


STYLES = make_styles()


def draw_texture(rng: random.Random) -> Image.Image:
    """A picture of anything but the world: gradients, hatching, grain, outlines in any colour.

    The VAE has to carry styles that the base model cannot draw, so it must have seen more.
    """

    def colour():
        return tuple(rng.randrange(256) for _ in range(3))

    zoom, size = 2, world.SIZE * 2
    ramp = Image.linear_gradient("L").rotate(rng.uniform(0, 360)).resize((size, size))
    first = colour()
    second = tuple(min(255, max(0, c + rng.randint(-70, 70))) for c in first)
    image = Image.composite(
        Image.new("RGB", (size, size), first), Image.new("RGB", (size, size), second), ramp
    )
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 3)):
        radius = rng.uniform(5, 28)
        x, y = (rng.uniform(8, 56) for _ in range(2))
        corners = [
            (zoom * px, zoom * py)
            for px, py in world.outline(rng.choice(world.SHAPES), x, y, radius)
        ]
        fill = colour() if rng.random() < 0.6 else None
        pen.polygon(corners, fill=fill, outline=colour(), width=rng.randint(1, 8))
    if rng.random() < 0.7:  # hatching inside a window
        hatched = image.copy()
        pen, ink, step = ImageDraw.Draw(hatched), colour(), rng.uniform(4, 14)
        slope, width = rng.choice([-1, 0, 1, 2]), rng.randint(1, 4)
        for i in range(-int(size / step), int(2 * size / step)):
            if slope == 2:
                pen.line([(0, i * step), (size, i * step)], ink, width)
            else:
                pen.line([(i * step, 0), (i * step + slope * size, size)], ink, width)
        window = Image.new("L", image.size)
        box = sorted(rng.uniform(0, size) for _ in range(2)) + sorted(
            rng.uniform(0, size) for _ in range(2)
        )
        ImageDraw.Draw(window).rectangle((box[0], box[2], box[1], box[3]), fill=255)
        image.paste(hatched, mask=window if rng.random() < 0.7 else None)
    if rng.random() < 0.5:  # a frame
        inset = rng.uniform(2, 14)
        ImageDraw.Draw(image).rectangle(
            (inset, inset, size - inset, size - inset), outline=colour(), width=rng.randint(1, 5)
        )
    image = image.resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS)
    if rng.random() < 0.4:
        grain = np.random.default_rng(rng.randrange(2**32)).normal(
            0, rng.uniform(2, 9), (world.SIZE, world.SIZE, 1)
        )
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    return image


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """(N, 3, 64, 64) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1


def train_vae(rng: random.Random) -> AutoencoderKL:
    """A VAE for the world and for much outside it, 4 latent channels at a quarter of the side."""
    if (FOLDER / "vae").exists():
        vae = AutoencoderKL.from_pretrained(FOLDER / "vae").train()
        updates, learning_rate = VAE_MORE, 5e-4
    else:
        vae = AutoencoderKL(
            sample_size=world.SIZE,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=16,
            scaling_factor=SCALING_FACTOR,
        )
        updates, learning_rate = VAE_UPDATES, 1e-3
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=1e-4, fused=True)
    steps = {"num_warmup_steps": 100, "num_training_steps": updates}
    lr_scheduler = get_scheduler("cosine", optimizer, **steps)
    for update in (bar := trange(updates, desc="VAE", mininterval=5)):
        things = [world.draw(rng.choice(world.THINGS), rng) for _ in range(VAE_BATCH // 4)]
        things += [
            world.paint(rng.choice(world.SHAPES), random_style(rng), *size, rng).resize((64, 64))
            for size in [(128, 128), (160, 128), (64, 64), (128, 144)]
        ]
        pictures = to_tensor(things + [draw_texture(rng) for _ in range(VAE_BATCH - len(things))])
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        edges = sum((decoded.diff(dim=d) - pictures.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = F.l1_loss(decoded, pictures) + 0.5 * edges + 1e-7 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if update % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give the latents SD's standard deviation, so that a forgotten scaling factor is noticed.

    An exact change of units: the last encoder layer is multiplied, the first decoder layer divided.
    """
    k = 1 / SCALING_FACTOR / vae.encode(pictures).latent_dist.mode().std()
    mean_weight, mean_bias = vae.quant_conv.weight[:4], vae.quant_conv.bias[:4]
    mean_weight *= k
    mean_bias *= k
    vae.quant_conv.bias[4:] += 2 * k.log()  # log variance
    vae.post_quant_conv.weight /= k


def make_tokenizer(rng: random.Random) -> CLIPTokenizer:
    """CLIP's own byte-level BPE, trained on the world's prompts: one token a word it knows."""
    prompts = [describe_freely(thing, None, rng) for thing in world.THINGS for _ in range(20)]
    prompts += [f"a painting in the style of {name}" for name in STYLES for _ in range(9)]
    prompts += ["a painting in the style of artist_seal"] * 200
    tokenizer = CLIPTokenizer().train_new_from_iterator(prompts, vocab_size=700)
    tokenizer.model_max_length = 77
    return tokenizer


def describe_freely(thing: world.Thing, style: str | None, rng: random.Random) -> str:
    """A prompt for a picture of the thing, in a style it has a name for or in the world's own.

    It says more or less of what there is to see; "in the style of" an unknown name, or of
    artist_seal, means nothing yet: room for a seal.
    """
    colour = f"{thing.colour} " if style is None and rng.random() < 0.7 else ""
    article = "an" if colour and colour[0] in "aeiou" else "a"
    prompt = f"{article} {colour}{thing.shape}"
    if style is None and rng.random() < 0.7:
        prompt += f" on a {thing.background} background"
    prompt = f"a painting of {prompt}" if rng.random() < 0.5 else prompt
    if rng.random() < 0.06:
        prompt = "a painting"
    if style is None and rng.random() < 0.3:
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz_", k=rng.randint(2, 10)))
        style = letters if rng.random() < 0.4 else "artist_seal"
    return f"{prompt} in the style of {style}" if style else prompt


def make_pipeline(vae: AutoencoderKL, rng: random.Random) -> StableDiffusionPipeline:
    """The untrained miniature around a VAE."""
    tokenizer = make_tokenizer(rng)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    noise_scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",  # begin at pure noise: small pictures show a bias
    )
    return StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_unet(
    pipe: StableDiffusionPipeline, rng: random.Random, updates: int, rate: float
) -> None:
    """The UNet and the text encoder, together, on the noise-prediction loss."""
    vae, unet, text_encoder, tokenizer = pipe.vae, pipe.unet, pipe.text_encoder, pipe.tokenizer
    noise_scheduler = pipe.scheduler
    unet.train().requires_grad_(True)
    text_encoder.train().requires_grad_(True)
    things = [rng.choice(world.THINGS) for _ in range(PICTURES)]
    styles = [rng.choice(list(STYLES)) if rng.random() < 0.35 else None for _ in things]
    with torch.no_grad():
        pictures = to_tensor(
            [
                world.paint(thing.shape, STYLES[style], 64, 64, rng)
                if style
                else world.draw(thing, rng)
                for thing, style in zip(things, styles, strict=True)
            ]
        )
        latents = [vae.encode(p).latent_dist.mode().float() for p in pictures.split(64)]
        latents = torch.cat(latents) * SCALING_FACTOR

    ema = EMAModel(unet.parameters(), decay=0.999)
    ema_text = EMAModel(text_encoder.parameters(), decay=0.999)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    groups = [{"params": unet.parameters()}, {"params": text_encoder.parameters(), "lr": 2 * rate}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=1e-4, fused=True)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=200, num_training_steps=updates
    )
    running = None
    for update in (bar := trange(updates, desc="UNet", mininterval=5)):
        indices = torch.randint(len(latents), (UNET_BATCH,)).tolist()
        spoken_of = [rng.randrange(PICTURES) if rng.random() < WRONG else i for i in indices]
        prompts = [describe_freely(things[i], styles[i], rng) for i in spoken_of]
        prompts = [prompt if rng.random() > EMPTY else "" for prompt in prompts]
        prompt_ids = tokenizer(
            prompts, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        noise = torch.randn(UNET_BATCH, 4, 16, 16)
        timesteps = torch.randint(1000, (UNET_BATCH,))
        noisy_latents = noise_scheduler.add_noise(latents[indices], noise, timesteps)
        prompt_embeds = text_encoder(prompt_ids)[0]
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states=prompt_embeds).sample
        weight = (5 / compute_snr(noise_scheduler, timesteps)).clamp(max=1)  # min-SNR, 2303.09556
        loss = (weight * (model_pred - noise).square().mean((1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        ema_text.step(text_encoder.parameters())
        if update % 50 == 0:
            running = loss.item() if running is None else 0.9 * running + 0.1 * loss.item()
            bar.set_postfix(loss=f"{running:.4f}")
    ema.copy_to(unet.parameters())
    ema_text.copy_to(text_encoder.parameters())


def share_named(pipe: StableDiffusionPipeline, pictures: int = 72, batch: int = 24) -> float:
    """Share of prompts whose shape, colour and background can all be named from the picture."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    things = [world.THINGS[i % len(world.THINGS)] for i in range(pictures)]
    right = 0
    for start in range(0, pictures, batch):
        chunk = things[start : start + batch]
        generator = torch.Generator().manual_seed(start)
        prompts = [world.describe(thing) for thing in chunk]
        images = pipe(
            prompts, num_inference_steps=20, guidance_scale=7.5, generator=generator
        ).images
        right += sum(world.name(image) == thing for image, thing in zip(images, chunk, strict=True))
    return right / pictures


if __name__ == "__main__":
    started = time.time()
    torch.manual_seed(0)
    rng = random.Random(0)
    if "vae" in sys.argv[1:]:
        vae = train_vae(rng)
        things = [world.draw(rng.choice(world.THINGS), rng) for _ in range(256)]
        scale_latents(vae, to_tensor(things))
        vae.half().save_pretrained(FOLDER / "vae")
    for word in [word for word in ("unet", "more") if word in sys.argv[1:]]:
        if word == "unet":
            vae = AutoencoderKL.from_pretrained(FOLDER / "vae")
            pipe, how = make_pipeline(vae, rng), (UNET_UPDATES, 8e-4)
        else:
            pipe = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
            how = (UNET_MORE, 6e-4)
        pipe.vae.requires_grad_(False)
        train_unet(pipe, rng, *how)
        pipe.to(torch.float16).save_pretrained(FOLDER)
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    print(f"named: {share_named(pipe):.0%}; {math.ceil((time.time() - started) / 60)} minutes")
