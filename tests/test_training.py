"""What is trained: the cached, keyed loop against a plain one, and the rules of an update."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import world
from conftest import Prepared, epoch_order, prepared, transformed
from diffusers import AutoencoderKL, DDPMScheduler
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

import quest_7_2 as quest

PROMPT = "a red circle"


@pytest.fixture
def cache(config) -> Prepared:
    return prepared(config(train_prompt=PROMPT, seed=5, lora_dropout=0.0))


def train(wanted) -> dict[str, torch.Tensor]:
    """The adapter that a run leaves."""
    assert quest.run(wanted) == 0
    return load_file(Path(wanted.output_dir) / "adapter_model.safetensors")


# --- the draws and the loss, against a loop without cache ---


@torch.no_grad()
def plain_latents(palette, model, picture, flip, generator):
    """One sample of the posterior of one picture, as the textbook loop takes it."""
    image = Image.open(palette / f"{picture}.png").convert("RGB")
    pixels = transforms.functional.to_tensor(image.resize((64, 64))) * 2 - 1
    pixels = pixels.flip(-1) if flip else pixels
    posterior = AutoencoderKL.from_pretrained(model / "vae").encode(pixels[None]).latent_dist
    return posterior.sample(generator) * 0.3


@torch.no_grad()
def plain_prompt_embeds(model):
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    prompt_ids = tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt")
    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    return text_encoder(prompt_ids.input_ids).last_hidden_state


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_cached_loss_is_the_plain_loss(prediction_type, cache, model, palette):
    unet = cache.unet()
    for parameter in unet.parameters():
        if parameter.requires_grad:  # LoRA's B starts at zero: give A a gradient too
            torch.nn.init.normal_(parameter, std=0.1)
    noise_scheduler = DDPMScheduler.from_pretrained(
        model / "scheduler", prediction_type=prediction_type
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    lora = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    flips = set()
    for position in range(7):
        batch = cache.batch(position)
        (loss,) = quest.compute_loss(unet, noise_scheduler, batch)
        gradients = torch.autograd.grad(loss, lora)

        epoch, index = divmod(position, 3)
        picture = epoch_order(5, epoch, 3)[index]
        generator = torch.Generator().manual_seed(quest.stream_seed(5, quest.SAMPLE, position))
        flip = bool(torch.randint(2, (), generator=generator))
        flips.add(flip)
        latents = plain_latents(palette, model, picture, flip, generator)
        # diffusers draws (1, 4, 8, 8), draw() draws (4, 8, 8): the same numbers.
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (), generator=generator)[None]
        a = alphas_cumprod[timesteps].float().sqrt()
        b = (1 - alphas_cumprod[timesteps]).float().sqrt()
        target = {
            "epsilon": noise,
            "v_prediction": a * noise - b * latents,
            "sample": latents,
        }[prediction_type]
        model_pred = unet(a * latents + b * noise, timesteps, plain_prompt_embeds(model)).sample
        plain_loss = ((model_pred - target) ** 2).mean()
        # The cache keeps float16: 11 bits.
        torch.testing.assert_close(loss, plain_loss, rtol=5e-4, atol=1e-5)
        for ours, plain in zip(gradients, torch.autograd.grad(plain_loss, lora), strict=True):
            assert (ours - plain).norm() <= 2e-3 * plain.norm() + 1e-6
    assert flips == {True, False}


def test_mirror_images_are_encoded_not_mirrored(cache, model, palette):
    means = cache.moments[:, :, 0].float()
    for picture in range(3):
        image = Image.open(palette / f"{picture}.png").convert("RGB")
        pixels = transforms.functional.to_tensor(image.resize((64, 64))) * 2 - 1
        vae = AutoencoderKL.from_pretrained(model / "vae")
        with torch.no_grad():
            mirrored = vae.encode(pixels.flip(-1)[None]).latent_dist.mean[0] * 0.3
        torch.testing.assert_close(means[picture, 1], mirrored, rtol=2e-3, atol=2e-3)
    assert (means[:, 1] - means[:, 0].flip(-1)).abs().max() > 0.01


def test_every_draw_is_fresh_and_keyed(cache):
    """Over many positions: flips and timesteps even, posterior samples of the right spread."""
    draws = [cache.draw(position) for position in range(1500)]
    again = cache.draw(700)
    assert all(torch.equal(again[key], draws[700][key]) for key in again)
    other = replace(cache, config=replace(cache.config, seed=6))
    assert not torch.equal(other.draw(700)["noise"], again["noise"])
    timesteps = torch.stack([d["timesteps"] for d in draws]).float()
    assert timesteps.min() < 20 and timesteps.max() > 979
    assert abs(timesteps.mean() - 499.5) < 4 * 288.7 / math.sqrt(1500)
    noise = torch.stack([d["noise"] for d in draws])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    # Which picture and orientation a sample came from shows in its distance to the means.
    moments = cache.moments.float()
    counts = torch.zeros(3, 2)
    samples = {}
    for i, drawn in enumerate(draws):
        picture = epoch_order(5, i // 3, 3)[i % 3]
        distance = ((drawn["latents"] - moments[picture, :, 0]) / moments[picture, :, 1]).square()
        flip = int(distance.mean((1, 2, 3)).argmin())
        counts[picture, flip] += 1
        samples.setdefault((picture, flip), []).append(drawn["latents"])
    assert counts.sum(1).tolist() == [500, 500, 500]
    assert (counts - 250).abs().max() < 4 * math.sqrt(500) / 2
    for (picture, flip), latents in samples.items():
        mean, std = moments[picture, flip]
        spread = (torch.stack(latents).std(0) / std).mean()
        assert abs(spread - 1) < 0.02
        assert ((torch.stack(latents).mean(0) - mean) / std).abs().mean() < 0.1


def test_epochs_are_shuffled_whole(cache):
    orders = [epoch_order(3, epoch, 50) for epoch in range(20)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 20
    assert epoch_order(3, 0, 50) == orders[0]
    assert epoch_order(4, 0, 50) != orders[0]


def test_transforms_reach_minus_one_and_one(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    image.save(tmp_path / "half.png")
    ((picture, mirror),) = transformed(tmp_path / "half.png", resolution=8)
    assert picture.shape == (3, 8, 8) and picture.dtype == torch.float32
    assert picture[:, :, 0].eq(-1).all() and picture[:, :, -1].eq(1).all()
    assert torch.equal(mirror, picture.flip(-1))


# --- the update ---


@pytest.mark.parametrize(
    "pictures, batch_size, accumulation, weights",
    [
        (1, 1, 4, [[1]]),
        (8, 1, 4, [[1 / 4] * 4] * 2),
        (5, 2, 2, [[1 / 4] * 4, [1]]),
        (7, 2, 2, [[1 / 4] * 4, [1 / 4, 1 / 4, 1 / 2]]),
        (3, 8, 1, [[1 / 3] * 3]),
        (7, 1, 3, [[1 / 3] * 3, [1 / 3] * 3, [1]]),
    ],
)
def test_no_picture_is_dropped(pictures, batch_size, accumulation, weights):
    """Each sample weighs 1 / (batches in the update × size of its batch)."""
    plan = quest.plan_epoch(pictures, batch_size, accumulation)
    assert [[weight for _, weight in update] for update in plan] == weights
    assert [place for update in plan for place, _ in update] == list(range(pictures))


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 9])
def test_an_update_in_pieces_is_its_batches_one_by_one(pieces, config, palette, monkeypatch):
    """Batches of 2, 2 and 1 pictures, written out, against the update cut into any pieces."""
    for i in (3, 4):
        world.draw(world.THINGS[i], random.Random(i)).save(palette / f"{i}.png")
    found, step = [], torch.optim.AdamW.step

    def spy(optimizer, *args, **options):
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        found.append(torch.cat(grads).clone())
        return step(optimizer, *args, **options)

    monkeypatch.setattr(quest.AdamW, "step", spy)
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    options |= {"lora_dropout": 0.0, "max_grad_norm": 1e9, "micro_batch_size": pieces}
    wanted = config(**options, max_train_steps=1)
    train(wanted)
    train(replace(wanted, max_train_steps=None))  # and the uneven end, from where the first led
    cache = prepared(wanted)
    unet = cache.unet().train()
    lora = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(lora, lr=wanted.learning_rate)
    for number, batches in enumerate([[(0, 1), (2, 3)], [(4,)]]):
        optimizer.zero_grad()
        for batch in batches:
            losses = quest.compute_loss(unet, cache.noise_scheduler, cache.batch(*batch))
            (losses.mean() / len(batches)).backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in lora])
        assert (found[1 + number] - expected).norm() < 1e-4 * expected.norm()
        optimizer.step()
    assert torch.equal(found[0], found[1])


def test_accumulation_is_a_larger_batch(config, tmp_path):
    """2 batches of 1 and 1 batch of 2 see the same draws and make the same updates."""
    common = {"lora_dropout": 0.0, "learning_rate": 1e-3}
    one = train(config(train_batch_size=1, gradient_accumulation_steps=2, **common))
    other = config(train_batch_size=2, gradient_accumulation_steps=1, **common)
    two = train(other)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-5)
    three = train(config(train_batch_size=1, gradient_accumulation_steps=1, **common))
    assert any((one[key] - three[key]).abs().max() > 1e-3 for key in one)


def test_an_update_follows_the_mean_of_its_gradients(config, model, monkeypatch):
    """3 pictures, accumulation 2: the second update holds one batch and must use all of it."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        norms.append(clip(parameters, math.inf).item())
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    wanted = config(learning_rate=1e-12, lora_dropout=0.0, num_train_epochs=1)
    quest.run(wanted)
    cache = prepared(wanted)
    unet = cache.unet()
    noise_scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    lora = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    gradients = []
    for position in range(3):
        batch = cache.batch(position)
        (loss,) = quest.compute_loss(unet, noise_scheduler, batch)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora)]))
    expected = [((gradients[0] + gradients[1]) / 2).norm(), gradients[2].norm()]
    assert norms == pytest.approx([x.item() for x in expected], rel=1e-3)


def test_a_folder_of_one_picture_trains(config, palette):
    for extra in ["1.png", "2.png"]:
        (palette / extra).unlink()
    adapter = train(config(gradient_accumulation_steps=4))
    assert any(adapter[key].abs().max() > 0.01 for key in adapter if "lora_B" in key)


def test_clipping_clips(config):
    """Adam forgets a gradient's size after one update but not between two of unlike size, and its
    epsilon (1e-8) does not forget at all: clipped to 1e-10, an update moves next to nothing."""
    clipped = train(config(max_grad_norm=1e-10, num_train_epochs=1, gradient_accumulation_steps=4))
    free = train(config(max_grad_norm=1e9, num_train_epochs=1, gradient_accumulation_steps=4))
    moved = {k: v.abs().max().item() for k, v in clipped.items() if "lora_B" in k}
    assert max(moved.values()) < 1e-3
    assert max(free[k].abs().max().item() for k in moved) > 5e-3


def test_max_train_steps_ends_in_mid_epoch(config, capsys):
    wanted = config(max_train_steps=3, num_train_epochs=5)
    train(wanted)
    result = quest.json.loads((Path(wanted.output_dir) / "result.json").read_text())
    assert result["epochsCompleted"] == 1
    wanted = config(max_train_steps=1)
    train(wanted)
    result = quest.json.loads((Path(wanted.output_dir) / "result.json").read_text())
    assert result["epochsCompleted"] == 0 and "finalLoss" not in result


def test_final_loss_is_the_mean_over_the_last_epoch(config, model):
    """With nothing learned (a tiny learning rate) it can be worked out sample by sample."""
    wanted = config(learning_rate=1e-12, lora_dropout=0.0, train_batch_size=2)
    quest.run(wanted)
    result = quest.json.loads((Path(wanted.output_dir) / "result.json").read_text())
    assert result["epochsCompleted"] == 2  # success or not: is the last bit of an output learned?
    cache = prepared(wanted)
    unet = cache.unet()
    noise_scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    losses = []
    for position in range(3, 6):
        batch = cache.batch(position)
        with torch.no_grad():
            losses.append(quest.compute_loss(unet, noise_scheduler, batch).item())
    assert result["finalLoss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_lora_is_float32_and_the_base_is_frozen(precision, config, model, monkeypatch):
    seen = {}
    load_unet = quest.load_unet

    def keep(*args):
        unet = seen["unet"] = load_unet(*args)
        seen["before"] = {name: p.clone() for name, p in unet.named_parameters()}
        seen["layers"] = [m for m in unet.modules() if isinstance(m, LoraLayer)]
        return unet

    step = torch.optim.AdamW.step

    def spy(optimizer, *args, **kwargs):
        for group in optimizer.param_groups:
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in group["params"])
        out = step(optimizer, *args, **kwargs)
        for state in optimizer.state.values():
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        return out

    monkeypatch.setattr(quest, "load_unet", keep)
    monkeypatch.setattr(quest.AdamW, "step", spy)
    adapter = train(config(mixed_precision=precision))
    assert all(weight.dtype == torch.float32 for weight in adapter.values())
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    targets = {"to_q", "to_k", "to_v", "to_out.0"}
    adapted = {n.split(".lora_")[0] for n, p in seen["before"].items() if p.requires_grad}
    assert {name.split("attn")[1][2:] for name in adapted} == targets
    bare = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): value
        for name, value in seen["before"].items()
        if "lora_" not in name
    }
    after = dict(seen["unet"].get_base_model().named_parameters())
    compared = 0
    for name, value in bare.items():
        assert value.dtype == dtype
        found = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        found = after[name.replace(".bias", ".base_layer.bias")] if found is None else found
        assert torch.equal(found, value)
        compared += 1
    assert compared == len(bare) > 50


def test_gradient_checkpointing_changes_nothing(config, monkeypatch):
    plain = train(config(lora_dropout=0.1))
    used = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def spy(*args, **kwargs):
        used.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", spy)
    saved = train(config(lora_dropout=0.1, gradient_checkpointing=True))
    assert used
    for key in plain:
        torch.testing.assert_close(plain[key], saved[key], rtol=1e-4, atol=1e-6)


def test_dropout_is_drawn_and_keyed(config):
    dry = train(config(lora_dropout=0.0))
    wet = train(config(lora_dropout=0.5))
    torch.manual_seed(1234)  # what came before must not matter
    again = train(config(lora_dropout=0.5))
    assert all(torch.equal(wet[key], again[key]) for key in wet)
    assert any(not torch.equal(dry[key], wet[key]) for key in dry)


def test_the_seed_decides_every_byte(config, tmp_path):
    one, two, other = (config(output_dir=str(tmp_path / name)) for name in "abc")
    other = config(output_dir=str(tmp_path / "c"), seed=1)
    from conftest import flags, run, snapshot

    for i, wanted in enumerate([one, two, other]):
        # Another hash seed: no set or dict order may show.
        done = run(*flags(wanted), env={"PYTHONHASHSEED": str(i)})
        assert done.returncode == 0, done.stderr
    first, second, third = (snapshot(Path(c.output_dir)) for c in (one, two, other))
    for files in (first, second, third):
        for name in ("result.json", "README.md", "loss.csv"):  # these hold the name, the speed
            files.pop(name)
    assert first == second
    assert first["adapter_model.safetensors"] != third["adapter_model.safetensors"]


def test_prompts_are_used(config):
    red = train(config(train_prompt="a red circle"))
    blue = train(config(train_prompt="a blue square"))
    assert any(not torch.equal(red[key], blue[key]) for key in red)


def test_parts_are_never_in_memory_together(config, monkeypatch):
    import gc
    import weakref

    alive, most = weakref.WeakSet(), 0
    load_part = quest.load_part

    def watch(*args, **kwargs):
        nonlocal most
        gc.collect()
        part = load_part(*args, **kwargs)
        if isinstance(part, torch.nn.Module):
            alive.add(part)
        most = max(most, len(alive))
        return part

    monkeypatch.setattr(quest, "load_part", watch)
    train(config())
    assert most == 1


def test_world_pictures_can_be_named():
    rng = random.Random(0)
    assert all(world.name(world.draw(thing, rng)) == thing for thing in world.THINGS)
