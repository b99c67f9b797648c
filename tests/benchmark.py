"""What a step costs, counted and timed, ours beside diffusers' own script where that is given.

    python tests/benchmark.py                       everything that needs no peer
    python tests/benchmark.py time --peer train_text_to_image_lora.py
    python tests/benchmark.py operations saved fp8 growth

Stable Diffusion 1.4's exact architecture with random weights is made in a temporary folder
(4 GB). It runs on CUDA where there is one, else on the CPU, and prints one table.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import pandas
import torch
import world
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from test_memory import saved_for_backward
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import quest_7_2 as quest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = "fp16" if DEVICE.type == "cuda" else "bf16"  # what the device is fast in


def row(what: str, ours, peer="") -> None:
    print(f"| {what} | {ours} | {peer} |", flush=True)


def make_sd14(folder: Path) -> None:
    """Stable Diffusion 1.4's parts with random weights, float32."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer().train_new_from_iterator(map(world.describe, world.THINGS), 600)
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768,
        num_hidden_layers=12, num_attention_heads=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512,
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    parts = (vae, CLIPTextModel(text), tokenizer, unet, scheduler)
    options = {"safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(*parts, **options, requires_safety_checker=False)
    pipe.save_pretrained(folder)


def make_pictures(folder: Path, count: int, side: int, captions: bool = False) -> Path:
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(count):
        picture = world.draw(rng.choice(world.THINGS), rng).resize((side, side))
        picture.save(folder / f"{i:05}.png", compress_level=1)
    if captions:
        lines = [
            {"file_name": f"{i:05}.png", "text": quest.Config.train_prompt} for i in range(count)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@dataclass(frozen=True)
class Bench:
    """A UNet's inputs with random latents in place of encoded pictures."""

    config: quest.Config
    folder: Path
    dtype: torch.dtype
    side: int

    def unet(self):
        return quest.load_unet(quest.Base(self.folder), self.config, DEVICE, self.dtype)

    def loss(self, unet) -> torch.Tensor:
        width = UNet2DConditionModel.load_config(self.folder / "unet")["cross_attention_dim"]
        generator = torch.Generator().manual_seed(0)
        moments = torch.randn(4, 2, 2, 4, self.side, self.side, generator=generator).half().abs()
        embeds = torch.randn(77, width, generator=generator)
        plan = quest.plan_epoch(4, 1, 1)
        (piece,) = quest.draw_update(0, plan, moments, [embeds] * 5, 1000, self.config)
        batch = {name: value.to(DEVICE) for name, value in piece.items()}
        scheduler = quest.DDPMScheduler.from_pretrained(self.folder / "scheduler")
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype is not torch.float32):
            return quest.compute_loss(unet, scheduler, batch).mean()


def operations(sd14: Path, args) -> None:
    for side in (32, 64):
        run = Bench(quest.Config(), sd14, torch.float32, side)
        unet = run.unet().train()
        with FlopCounterMode(display=False) as step:
            run.loss(unet).backward()
        del unet
        plain = UNet2DConditionModel.from_pretrained(sd14 / "unet").to(DEVICE)
        plain.requires_grad_(False)
        latents = torch.randn(1, 4, side, side, device=DEVICE, requires_grad=True)
        embeds = torch.randn(1, 77, 768, device=DEVICE)
        with FlopCounterMode(display=False) as own:
            plain(latents, 500, encoder_hidden_states=embeds).sample.sum().backward()
        step, own = (counter.get_total_flops() / 1e9 for counter in (step, own))
        row(f"operations of a micro-step, {side * 8}² (a plain UNet's own: {own:.0f})",
            f"{step:.0f} GFLOP")  # fmt: skip


def saved(sd14: Path, args) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[HALF]
    for side in (32, 64):
        for checkpointing in (False, True):
            config = quest.Config(gradient_checkpointing=checkpointing)
            run = Bench(config, sd14, dtype, side)
            unet = run.unet().train()
            total = saved_for_backward(unet, partial(run.loss, unet))
            how = ", gradient checkpointing" if checkpointing else ""
            row(f"saved for backward, {side * 8}², {HALF}{how}", f"{total / 2**20:.1f} MiB")


def fp8(sd14: Path, args) -> None:
    for name, folder, side in [
        ("SD 1.4, random", sd14, 32),
        ("miniature", ROOT / "tests/miniature", 16),
    ]:
        found = []
        for narrow in (False, True):
            config = quest.Config(fp8_base=narrow, lora_dropout=0.0)
            run = Bench(config, folder, torch.float32, side)
            unet = run.unet().eval()
            torch.manual_seed(1)
            lora = [p for p in unet.parameters() if p.requires_grad]
            for parameter in lora:
                torch.nn.init.normal_(parameter, std=0.02)
            outputs = []
            hook = unet.get_base_model().register_forward_hook(
                lambda module, inputs, output, outputs=outputs: outputs.append(output[0].detach())
            )
            gradients = torch.autograd.grad(run.loss(unet), lora)
            hook.remove()
            found.append((outputs[0], torch.cat([g.flatten() for g in gradients])))
        errors = [(a - b).norm() / b.norm() for a, b in zip(found[1], found[0], strict=True)]
        row(f"--fp8-base, relative error of output, of LoRA gradients ({name})",
            f"{errors[0]:.1%}, {errors[1]:.1%}")  # fmt: skip
    losses = []
    for words in ([], ["--fp8-base"]):
        with tempfile.TemporaryDirectory() as temporary:
            words = [*words, "--dataset-dir", ROOT / "tests/palette", "--resolution", 64]
            words += ["--model-id", ROOT / "tests/miniature", "--train-batch-size", 12]
            words += ["--learning-rate", 2e-3, "--num-train-epochs", 100, "--preview-images", 0]
            losses.append(ours(words, Path(temporary) / "seal")["losses"])
    last = [sum(run[-20:]) / 20 for run in losses]
    row("mean loss of the last 20 of 100 updates, miniature: without, with --fp8-base",
        f"{last[0]:.4f}, {last[1]:.4f}")  # fmt: skip


# Runs a script, prints when each update was done, in seconds from the start of the process, and
# ends it after so many updates.
WATCHED = """
import sys, time
began = time.time()
import os, re, runpy, torch
made, last, updates = torch.optim.AdamW.__init__, int(sys.argv.pop(1)), 0
def report():
    if torch.cuda.is_available():
        print("GPU", torch.cuda.max_memory_allocated())
    # getrusage's peak would not be below the benchmark's own.
    print("PEAK", re.search("VmHWM:(.*) kB", open("/proc/self/status").read())[1], flush=True)
def done(*_):
    global updates
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print("UPDATE", time.time() - began)
    updates += 1
    if updates == last:
        report()
        os._exit(0)
def init(self, *args, **options):
    made(self, *args, **options)
    self.register_step_post_hook(done)
torch.optim.AdamW.__init__ = init
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    report()
"""


def measure(command: list, updates: int = 0) -> dict:
    """A script's run, ended after so many updates (0: never): seconds in all, seconds to each
    update, peak MiB of the host and the GPU."""
    started = time.monotonic()
    command = [sys.executable, "-c", WATCHED, updates, *command]
    command = list(map(str, command))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    gpu = re.search(r"GPU (\d+)", done.stdout)
    return {
        "seconds": time.monotonic() - started,
        "updates": [float(at) for at in re.findall(r"UPDATE (\S+)", done.stdout)],
        "peak": int(re.search(r"PEAK\s+(\d+)", done.stdout)[1]) / 1024,
        "gpu": int(gpu[1]) / 2**20 if gpu else None,
    }


def ours(words: list, output_dir: Path, updates: int = 0) -> dict:
    found = measure([ROOT / "quest_7_2.py", *words, "--output-dir", output_dir], updates)
    log = output_dir / "loss.csv"  # only where the run came to its end
    rows = pandas.read_csv(log).to_dict("list") if log.exists() else {}
    return found | {"losses": rows.get("loss"), "speed": rows.get("images_per_second")}


def micro(sd14: Path, args) -> None:
    """Seconds an update and peak memory for 1, 2 and 4 samples at once, in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        pictures = make_pictures(Path(temporary) / "pictures", 4, 512)
        for name in args.precisions:
            found = {1: [], 2: [], 4: []}
            for size in [1, 2, 4] * args.rounds:
                words = ["--dataset-dir", pictures, "--model-id", sd14, "--preview-images", 0]
                words += ["--resolution", args.resolution, "--mixed-precision", name]
                words += ["--micro-batch-size", size]
                found[size].append(ours(words, Path(temporary) / "seal", args.updates))
            for size, runs in found.items():
                seconds = np.median(np.concatenate([np.diff(run["updates"]) for run in runs]))
                peak = np.median([run["gpu"] or run["peak"] for run in runs])
                row(f"{name}, {args.resolution}²: an update of 4 samples, {size} at once",
                    f"{seconds:.2f} s, {peak:.0f} MiB")  # fmt: skip


def time_steps(sd14: Path, args) -> None:
    """Ours and the peer in turn, `args.rounds` times; medians over all rounds."""
    accumulation = 4
    with tempfile.TemporaryDirectory() as temporary:
        pictures = make_pictures(Path(temporary) / "pictures", 8, 512, captions=True)
        runs = {}
        for name in args.precisions * args.rounds:
            size = ["--resolution", args.resolution]
            words = ["--dataset-dir", pictures, "--model-id", sd14, "--preview-images", 0]
            words += [*size, "--mixed-precision", name]
            found = ours(words, Path(temporary) / "seal", args.updates)
            runs.setdefault((name, "ours"), []).append(found)
            if args.peer:
                peer = ["--pretrained_model_name_or_path", sd14, "--train_data_dir", pictures]
                peer += ["--random_flip", "--rank", 16, "--train_batch_size", 1, *size]
                peer += ["--gradient_accumulation_steps", accumulation, "--report_to"]
                peer += [args.report_to, "--mixed_precision", name]
                peer += ["--output_dir", Path(temporary) / "peer"]
                found = measure([args.peer, *peer], args.updates)
                runs.setdefault((name, "peer"), []).append(found)
        whose = ("ours", "peer") if args.peer else ("ours",)
        for name in args.precisions:
            for what, unit, digits, value in [
                (
                    "seconds a micro-step",
                    "s",
                    3,
                    lambda run: np.diff(run["updates"]) / accumulation,
                ),
                ("from the command to update 1", "s", 1, lambda run: run["updates"][:1]),
                ("peak host memory", "MiB", 0, lambda run: [run["peak"]]),
                ("peak GPU memory", "MiB", 0, lambda run: [run["gpu"]]),
            ]:
                found = {who: np.concatenate([value(r) for r in runs[name, who]]) for who in whose}
                if found["ours"][0] is None:
                    continue
                cells = [f"{np.median(each):.{digits}f} {unit}" for each in found.values()]
                row(f"{name}, {args.resolution}²: {what}", *cells)


# Checks and encodes a whole folder with the miniature; prints the seconds of both and the bytes
# of memory held at the end.
CACHED = """
import gc, sys, time
import psutil, torch
import quest_7_2 as quest
folder, model, side = sys.argv[1:]
started = time.monotonic()
config = quest.Config(dataset_dir=folder, model_id=model, resolution=int(side))
dataset, captions, digests = quest.load_pictures(config)
checked = time.monotonic()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
moments = quest.encode_pictures(quest.Base(quest.Path(model)), dataset, device, torch.float32)
encoded = time.monotonic()
gc.collect()
print(checked - started, encoded - checked, psutil.Process().memory_info().rss)
"""


def cache(pictures: Path, side: int) -> tuple[float, float, float]:
    command = [sys.executable, "-c", CACHED, pictures, ROOT / "tests/miniature", str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    checking, encoding, held = map(float, done.stdout.split())
    return checking, encoding, held


def growth(sd14: Path, args) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        counts = (1000, 3000)
        # The miniature's VAE makes 32² latents of 128² pixels, as Stable Diffusion's does of 256².
        held = [
            cache(make_pictures(Path(temporary) / str(count), count, 256), 128)[-1]
            for count in counts
        ]
        each = (held[1] - held[0]) / (counts[1] - counts[0]) / 1000
        row("host memory of another picture with 32² latents, once cached", f"{each:.1f} KB")
    for count in (10, 1000, 10_000):
        with tempfile.TemporaryDirectory() as temporary:
            pictures = make_pictures(Path(temporary) / "pictures", count, 64)
            checking, encoding, held = cache(pictures, 64)
            words = ["--dataset-dir", pictures, "--model-id", ROOT / "tests/miniature"]
            words += ["--resolution", 64, "--max-train-steps", 50, "--preview-images", 0]
            found = ours(words, Path(temporary) / "seal")
        row(f"{count} pictures of 64²: checking, encoding all",
            f"{checking:.1f} s, {encoding:.1f} s, then {held / 2**20:.0f} MiB")  # fmt: skip
        row(f"{count} pictures: a run of 50 updates",
            f"{found['seconds']:.0f} s, {found['speed'][-1]:.1f} pictures/s in training")  # fmt: skip


def main() -> None:
    sections = {
        "operations": operations, "saved": saved, "fp8": fp8, "time": time_steps, "micro": micro, "growth": growth
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=list(sections), help=", ".join(sections))
    parser.add_argument("--peer", help="diffusers' train_text_to_image_lora.py")
    parser.add_argument("--report-to", default="tensorboard", help="the peer's --report_to")
    parser.add_argument("--model", type=Path, help="SD 1.4's architecture, if made before")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--updates", type=int, default=4, help="in each timed run")
    parser.add_argument("--rounds", type=int, default=3, help="of timed runs")
    parser.add_argument("--precisions", nargs="*", default=["no", HALF])
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or "CPU"
    print(
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print("| what | ours | diffusers' script |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        sd14 = args.model or Path(temporary) / "sd14"
        if not sd14.exists():
            make_sd14(sd14)
        for section in args.sections:
            sections[section](sd14, args)


if __name__ == "__main__":
    main()
