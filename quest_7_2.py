"""Train a LoRA "seal" that carries the style of a folder of pictures, on Stable Diffusion.

    python quest_7_2.py --dataset-dir my_paintings --output-dir my_seal

One script, told from top to bottom: the command, the pictures, the model's parts, the draws and
the loss, the seal, and the run that puts them together. README.md tells what the options are for.
"""

import argparse
import csv
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, field, fields
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import get_args

from filelock import FileLock, Timeout

# ---------------------------------------------------------------------------------------------
# The command: arguments, JSON and folders, answered in a fraction of a second
# ---------------------------------------------------------------------------------------------


class Trouble(Exception):
    """What stops a run: one message for the user, and the exit code (2: refused, 1: failed)."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def one_of(*names: str) -> tuple:
    return f"one of {', '.join(names)}", lambda name: name in names


# Limits: how "must be …" goes on, and the test of it on a value of the right type.
ANY = ("", lambda value: True)
TEXT = ("text", lambda text: text == text.encode("utf-8", "ignore").decode())
PATH = ("a path", lambda text: text.strip() and "\0" not in text)
NATURAL = ("at least 0", lambda n: 0 <= n < 2**63)
POSITIVE = ("at least 1", lambda n: 1 <= n < 2**63)
ABOVE_0 = ("finite and above 0", lambda x: 0 < x < math.inf)
FROM_0 = ("finite and at least 0", lambda x: 0 <= x < math.inf)
SHARE = ("at least 0 and below 1", lambda p: 0 <= p < 1)
# Pillow would fill all memory, and be killed for it, long before a larger picture is made.
TIMES_8 = ("a positive multiple of 8, at most 16384", lambda n: 0 < n <= 16384 and n % 8 == 0)
PRECISION = one_of("fp16", "bf16", "no")
RESIZE = one_of("squash", "crop")
# diffusers has piecewise_constant too, which needs rules that no flag gives.
SCHEDULE = one_of(
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
)
# PEFT's others change the base model's weights, of which no program that loads the seal knows.
INIT = one_of("gaussian", "orthogonal")
KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def option(default, limit: tuple, help: str) -> Field:
    return field(default=default, metadata={"limit": limit, "help": help})


@dataclass(frozen=True)
class Config:
    """Every option: name, type, default, limit, meaning. Flags, JSON keys and --help follow."""

    dataset_dir: str = option("../Quest_1/generated_palette", PATH, "folder of pictures to learn")
    output_dir: str = option("artist_seal", PATH, "folder for the seal")
    model_id: str = option("CompVis/stable-diffusion-v1-4", PATH, "hub id or diffusers folder")
    resolution: int = option(256, TIMES_8, "side of the training pictures in pixels")
    train_batch_size: int = option(1, POSITIVE, "pictures in a batch")
    gradient_accumulation_steps: int = option(4, POSITIVE, "batches in an update")
    learning_rate: float = option(1e-4, ABOVE_0, "of AdamW")
    num_train_epochs: int = option(100, POSITIVE, "times through the folder")
    train_prompt: str = option("a painting in the style of artist_seal", TEXT, "calls up the style")
    rank: int = option(16, POSITIVE, "of the LoRA matrices")
    lora_alpha: float = option(32.0, ABOVE_0, "the seal's strength is alpha / rank")
    lora_dropout: float = option(0.05, SHARE, "share of LoRA inputs left out in training")
    use_dora: bool = option(False, ANY, "DoRA; a seal for PEFT alone")
    use_rslora: bool = option(False, ANY, "strength alpha / sqrt(rank)")
    init_lora_weights: str | None = option(None, INIT, "first LoRA weights (default: PEFT's)")
    seed: int = option(0, NATURAL, "same command, same machine, same bytes")
    mixed_precision: str | None = option(None, PRECISION, "default: fp16 on CUDA, no elsewhere")
    gradient_checkpointing: bool = option(False, ANY, "less memory, slower")
    fp8_base: bool = option(False, ANY, "frozen weights in 8 bits: half the memory for them")
    lr_scheduler: str = option("constant", SCHEDULE, "course of the learning rate")
    lr_warmup_steps: int = option(0, NATURAL, "updates in which the learning rate rises from 0")
    max_grad_norm: float = option(1.0, ABOVE_0, "gradients are clipped to this norm")
    snr_gamma: float | None = option(None, ABOVE_0, "min-SNR loss weights; 5 is usual")
    noise_offset: float = option(0.0, FROM_0, "noise per channel: darker and lighter pictures")
    resize_mode: str = option("squash", RESIZE, "what becomes of pictures that are not square")
    max_train_steps: int | None = option(None, POSITIVE, "stop after this many updates")
    checkpointing_steps: int = option(500, POSITIVE, "updates from one checkpoint to the next")
    resume: bool = option(False, ANY, "go on from the checkpoint in the output folder")
    preview_images: int = option(4, NATURAL, "before/after pictures made at the end; 0 = none")
    preview_prompt: str | None = option(None, TEXT, "what they show (default: the train prompt)")
    preview_every_epochs: int = option(0, NATURAL, "pictures in between, too; 0 = none")
    variant: str | None = option(None, PATH, "weight variant of the model, such as fp16")

    def __post_init__(self):
        for option in fields(self):
            value, kind = getattr(self, option.name), kind_of(option)
            # A whole number will do for a float; `true` is no number, though Python says so.
            if kind is float and type(value) is int and abs(value) < 2**1000:
                object.__setattr__(self, option.name, value := float(value))
            limit, valid = option.metadata["limit"]
            if value is None and NoneType in get_args(option.type):
                continue
            if type(value) is not kind or not valid(value):
                needed = limit if type(value) is kind else KINDS[kind]
                raise Trouble(f"{name_of(option)} must be {needed}, not {shown(value)}", 2)
        if self.init_lora_weights == "orthogonal" and self.rank % 2:
            raise Trouble("--init-lora-weights orthogonal needs an even --rank", 2)
        if self.use_dora and self.fp8_base:
            raise Trouble("--use-dora needs the weights at hand that --fp8-base narrows", 2)


# What --resume may change: where things lie, how long it goes on, and what leaves the arithmetic
# alone. (The pictures themselves are compared, not their folder's name.)
FREE_TO_CHANGE = {"dataset_dir", "output_dir", "num_train_epochs", "max_train_steps"}
FREE_TO_CHANGE |= {"checkpointing_steps", "resume", "gradient_checkpointing", "preview_images"}
FREE_TO_CHANGE |= {"preview_prompt", "preview_every_epochs"}


def kind_of(option: Field) -> type:
    """int, float, str or bool, whether or not None may stand in its place."""
    return (get_args(option.type) or (option.type,))[0]


def flag_of(option: Field) -> str:
    return "--" + option.name.replace("_", "-")


def key_of(option: Field) -> str:
    first, *rest = option.name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def name_of(option: Field) -> str:
    return f"{flag_of(option)} ({key_of(option)})"


def shown(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_arguments(argv: list[str]) -> dict:
    """The flags given, as {field name: value}, `config` among them. Raises Trouble."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("quest_7_2.py", description=about, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="JSON object of options in camelCase")
    for option in fields(Config):
        kind, (limit, _) = kind_of(option), option.metadata["limit"]
        help = "; ".join(filter(None, [option.metadata["help"], limit if limit != PATH[0] else ""]))
        if option.default is not None:
            help += f" (default: {option.default})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"metavar": "X"}
        # No defaults here: what the user did not say must not hide what the JSON file says.
        parser.add_argument(flag_of(option), help=help, default=argparse.SUPPRESS, **how)

    def refuse(message: str):
        raise Trouble(f"{message}; --help lists the options", 2)

    parser.error = refuse
    given = vars(parser.parse_args(argv))
    for option in fields(Config):
        # A text that is no number is left as it is, for Config to refuse.
        if kind_of(option) in (int, float) and option.name in given:
            with suppress(ValueError):
                given[option.name] = kind_of(option)(given[option.name])
    return given


def read_json(path: str) -> dict:
    """The object in a JSON file. Raises Trouble (exit code 2) for anything else."""

    def unique(pairs):
        keys = [key for key, _ in pairs]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))} stands there twice")
        return dict(pairs)

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise Trouble(f"--config {path}: {reason}", 2) from None
    if not isinstance(values, dict):
        raise Trouble(f"--config {path}: must hold one JSON object", 2)
    return values


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_config(argv: list[str]) -> Config:
    """Defaults < the JSON file < flags. Raises Trouble (exit code 2) for what is not valid."""
    given = parse_arguments(argv)
    path = given.pop("config", None)
    values = {} if path is None else read_json(path)
    known = {key_of(option): option.name for option in fields(Config)}
    if unknown := sorted(values.keys() - known.keys()):
        raise Trouble(f"--config {path}: unknown key {', '.join(map(shown, unknown))}", 2)
    return Config(**{known[key]: value for key, value in values.items()} | given)


# What Pillow reads well of imagefolder's own list.
SUFFIXES = ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .tga .ppm"


def list_files(folder: Path, suffixes: str = SUFFIXES) -> list[Path]:
    """All such files in a folder and its subfolders, by name; what is hidden is left out."""

    def is_hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes.split())
    return sorted(path for path in found if not path.is_dir() and not is_hidden(path))


def check_folders(config: Config) -> None:
    """Raises Trouble (exit code 2) for a dataset that is not there, or an unwritable output."""
    dataset_dir, output_dir = Path(config.dataset_dir), Path(config.output_dir).absolute()
    try:
        if not dataset_dir.is_dir():
            what = "is a file, not a folder" if dataset_dir.exists() else "does not exist"
            raise Trouble(f"dataset folder {dataset_dir} {what}; name one with --dataset-dir", 2)
        if not list_files(dataset_dir):
            raise Trouble(f"dataset folder {dataset_dir} has no pictures ({SUFFIXES})", 2)
        if output_dir.resolve().is_relative_to(dataset_dir.resolve()):
            raise Trouble(f"output folder {output_dir} must not be in the dataset folder", 2)
    except OSError as error:
        raise Trouble(f"{error.filename}: {error.strerror}", 2) from None
    existing = next(path for path in [output_dir, *output_dir.parents] if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()  # asking for permissions is not enough
    except OSError as error:
        raise Trouble(
            f"output folder {output_dir} cannot be written: {error.strerror}", 2
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, also when the power fails."""
    partial_path = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial_path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            partial_path.unlink(missing_ok=True)


def write_result(output_dir: str, success: bool, epochs: int = 0, loss: float | None = None):
    """`result.json`; `loss` is the mean over the last completed epoch, None if there is none."""
    result = {"success": success, "outputDir": output_dir, "epochsCompleted": epochs}
    result |= {} if loss is None else {"finalLoss": loss}
    write_whole(Path(output_dir) / "result.json", (json.dumps(result) + "\n").encode())


def disown_older_result(output_dir: str) -> None:
    """Turn an earlier run's `result.json` to false now: however this run ends, it stays honest."""
    try:
        older = json.loads((Path(output_dir) / "result.json").read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(older, dict) and "success" in older:
        write_result(output_dir, success=False)


def lock_output_dir(output_dir: str) -> FileLock:
    """Keep the folder for this process while the lock lives. Raises Trouble if a run has it."""
    # It lies outside: a refused run leaves nothing behind. The system frees it, however we end.
    identity = f"{os.path.expanduser('~')}:{Path(output_dir).resolve()}"
    name = f"quest_7_2-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:24]}.lock"
    lock = FileLock(Path(tempfile.gettempdir()) / name, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise Trouble(f"output folder {output_dir} is in use by another run", 2) from None
    return lock


def named_output_dir(argv: list[str]) -> str:
    """The output folder meant by arguments that were refused, as far as they are understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--output-dir")
    named = None
    with suppress(argparse.ArgumentError, Trouble):
        given, _ = parser.parse_known_args(argv)
        named = given.output_dir
        if named is None and given.config is not None:
            named = read_json(given.config).get("outputDir")
    return named if isinstance(named, str) else Config.output_dir


def begin(argv: list[str]) -> tuple[Config, FileLock]:
    """Judge the command and take the output folder, or say what is wrong and exit with 2."""
    try:
        config = read_config(argv)
        check_folders(config)
        lock = lock_output_dir(config.output_dir)
        try:
            disown_older_result(config.output_dir)
        except OSError as error:
            raise Trouble(f"{error.filename}: {error.strerror}", 2) from None
        return config, lock
    except Trouble as trouble:
        output_dir = named_output_dir(argv)
        with suppress(Trouble, OSError, ValueError):
            lock = lock_output_dir(output_dir)
            disown_older_result(output_dir)
        say(trouble)
        sys.exit(trouble.exit_code)


def say(message) -> None:
    print(f"quest_7_2.py: {message}", file=sys.stderr)


class Stop:
    """SIGINT and SIGTERM: at once, or, while training, when the update in hand is done."""

    deferred = False  # set while training
    signum = 0  # the signal that came

    @staticmethod
    def on_signal(signum: int, frame) -> None:
        at_once = Stop.signum or not Stop.deferred
        Stop.signum = signum
        if at_once:
            sys.exit(128 + signum)
        say("stopping after this update; once more stops at once")


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, Stop.on_signal)
    # A typing mistake is answered here; the imports below take eight seconds.
    config, lock = begin(sys.argv[1:])

import datasets
import diffusers
import numpy as np
import pandas
import peft
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.optim import AdamW
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

# ---------------------------------------------------------------------------------------------
# The pictures
# ---------------------------------------------------------------------------------------------


def open_rgb(path) -> Image.Image:
    """A picture as RGB: upright by its EXIF orientation, transparency over white, 16 bits as 8.

    Raises whatever Pillow raises for a file it cannot decode.
    """
    with Image.open(path) as image:
        image.load()
        # A broken EXIF block says nothing about the pixels: they stay as they lie.
        with suppress(Exception):
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def apply_transforms(examples: dict, resolution: int, resize_mode: str) -> dict:
    """Each picture and its mirror image: `pixel_values`, (2, 3, R, R) float32 in [-1, 1].

    Both, because mirroring an image's latents is not the same as encoding its mirror image.
    """
    square = (resolution, resolution)
    squash = transforms.Resize(square)
    crop = transforms.Compose([transforms.Resize(resolution), transforms.CenterCrop(square)])
    resize = {"squash": squash, "crop": crop}[resize_mode]
    normalize = transforms.Normalize([0.5], [0.5])
    pixels = [open_rgb(image["path"]) for image in examples["image"]]
    pixels = [normalize(transforms.functional.to_tensor(resize(image))) for image in pixels]
    return {"pixel_values": [torch.stack([p, transforms.functional.hflip(p)]) for p in pixels]}


def read_captions(folder: Path, paths: list[Path], train_prompt: str) -> list[str]:
    """The caption of each picture: from imagefolder's metadata file (columns file_name and text),
    else from a .txt file beside it, else the train prompt.

    Raises Trouble (exit code 2) for files that cannot be read or name pictures that are not there.
    """
    readers = {
        ".jsonl": partial(pandas.read_json, lines=True, dtype=False),
        ".csv": partial(pandas.read_csv, dtype=str, keep_default_na=False),
        ".parquet": pandas.read_parquet,
    }
    captions, missing = dict.fromkeys(map(str, paths)), []
    try:
        for file in list_files(folder, " ".join(readers)):
            if file.stem == "metadata":
                table = readers[file.suffix](file)
                for name, text in zip(table["file_name"], table["text"], strict=True):
                    path = os.path.normpath(file.parent / str(name))
                    missing += [f"{name!r} in {file.name}"] if path not in captions else []
                    captions[path] = text
        for path in paths:
            file = path.with_suffix(".txt")
            if captions[str(path)] is None and file.is_file():
                captions[str(path)] = file.read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        columns = "; it needs the columns file_name and text" if isinstance(error, KeyError) else ""
        raise Trouble(f"captions {file}: {first_line(error)}{columns}", 2) from None
    if missing:
        raise Trouble("captions for pictures that are not there: " + ", ".join(missing), 2)
    told = [captions[str(path)] for path in paths]
    return [t.strip() if isinstance(t, str) and t.strip() else train_prompt for t in told]


def examine(path: Path) -> tuple[str, tuple[int, int], str]:
    """A picture's SHA-256, its size and, if it cannot be used, what is wrong with it."""
    try:
        if "::" in str(path):
            raise ValueError('imagefolder cannot open a path with "::" in it')
        str(path).encode()
        data = path.read_bytes()
        size = open_rgb(BytesIO(data)).size
        return hashlib.sha256(data).hexdigest(), size, ""
    except Exception as error:  # noqa: BLE001 - decoders raise anything on bad bytes
        return "", (0, 0), f"\n  {str(path)!r}: {first_line(error)}"


def load_pictures(config: Config) -> tuple[datasets.Dataset, list[str], dict[str, str]]:
    """The folder as a `datasets` imagefolder whose rows are `apply_transforms`' pixel values; the
    caption of each picture; and by its name in the folder a SHA-256 of both.

    Raises Trouble (exit code 2) with a list of all pictures that cannot be used.
    """
    folder = Path(config.dataset_dir).absolute()
    paths = list_files(folder)

    pool = ThreadPoolExecutor()
    try:
        examined = tqdm(pool.map(examine, paths), "checking pictures", len(paths), disable=None)
        digests, sizes, problems = zip(*examined, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
    if problems := [problem for problem in problems if problem]:
        count = f"{len(problems)} of {len(paths)} pictures cannot be used, mend or remove them:"
        raise Trouble(count + "".join(problems), 2)

    captions = read_captions(folder, paths, config.train_prompt)
    own = sum(caption != config.train_prompt for caption in captions)
    sizes = sorted(sizes, key=math.prod)
    extent = dict.fromkeys(f"{width}×{height}" for width, height in (sizes[0], sizes[-1]))
    say(f"{len(paths)} pictures, {' to '.join(extent)} pixels, {own} with captions of their own")

    # Named one by one: left to itself, imagefolder puts test_1.png into a "test" split, unused.
    data_files = {"train": [glob.escape(str(path)) for path in paths]}
    with tempfile.TemporaryDirectory() as cache:  # no older listing must be taken for this one
        options = {"cache_dir": cache, "keep_in_memory": True, "drop_labels": True}
        try:
            dataset = datasets.load_dataset(
                "imagefolder", data_files=data_files, split="train", **options
            )
        except datasets.exceptions.DatasetsError as error:
            raise Trouble(f"listing the pictures in {cache}: {error.__cause__ or error}") from None
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    how = {"resolution": config.resolution, "resize_mode": config.resize_mode}
    dataset = dataset.with_transform(partial(apply_transforms, **how))
    names = [str(path.relative_to(folder)) for path in paths]
    both = [f"{digest} {text}".encode() for digest, text in zip(digests, captions, strict=True)]
    digests = [hashlib.sha256(each).hexdigest() for each in both]
    return dataset, captions, dict(zip(names, digests, strict=True))


# ---------------------------------------------------------------------------------------------
# The model's parts, one at a time: text encoder, VAE, UNet
# ---------------------------------------------------------------------------------------------

# What a part's folder must hold, one of; {} stands for a variant such as ".fp16".
PART_FILES = {
    "tokenizer": ["tokenizer.json", "vocab.json"],
    "text_encoder": ["model{}.safetensors", "model{}-00001-of-*.safetensors"],
    "vae": ["diffusion_pytorch_model{}.safetensors"],
    "unet": [f"diffusion_pytorch_model{{}}{shard}.safetensors" for shard in ("", "-00001-of-*")],
    "scheduler": ["scheduler_config.json"],
}


def check_family(model_id: str, folder: Path) -> None:
    """Raises Trouble for a model that is not Stable Diffusion 1.x or 2.x, text to image."""

    def read(name: str) -> dict:
        with suppress(OSError, ValueError):
            return json.loads((folder / name).read_text(encoding="utf-8"))
        return {}

    index, unet, text = (
        read(f"{p}.json") for p in ("model_index", "unet/config", "text_encoder/config")
    )
    fits = not index.keys() & {"transformer", "text_encoder_2", "prior", "controlnet"}
    if unet and text:
        fits &= unet.get("in_channels", 4) == 4 and not unet.get("addition_embed_type")
        fits &= unet.get("cross_attention_dim") == text.get("hidden_size")
    if not fits:
        what = index.get("_class_name", "something else")
        raise Trouble(
            f"model {model_id} is {what}; this script trains text-to-image Stable Diffusion 1.x and "
            "2.x, no SDXL, SD3, Flux or inpainting model"
        )


def find_model(model_id: str, variant: str | None) -> Path:
    """A local folder in diffusers layout, downloaded first if `model_id` is not one.

    The one place that may use the network. Raises Trouble for what is not there or not complete.
    """
    suffix = f".{variant}" if variant else ""
    folder = Path(model_id)
    if folder.is_file():
        raise Trouble(
            f"model {model_id} is a single file, without the tokenizer and configurations it needs: "
            "convert it once, with network, by diffusers' StableDiffusionPipeline.from_single_file("
            "…).save_pretrained(folder), and give --model-id that folder"
        )
    if not folder.is_dir():
        names = {name.format(suffix) for part in PART_FILES.values() for name in part}
        wanted = ["*.json", "*/merges.txt", *(f"*/{name.replace('00001', '*')}" for name in names)]
        try:
            # The small files first: what is no Stable Diffusion 1 or 2 is not worth a download.
            check_family(model_id, Path(snapshot_download(model_id, allow_patterns="*.json")))
            folder = Path(snapshot_download(model_id, allow_patterns=wanted))
        except Trouble:
            raise
        except Exception as error:  # noqa: BLE001 - the hub, the network and the disk may fail
            raise Trouble(
                f"model {model_id} is no folder here and could not be had from the hub "
                f"({type(error).__name__}): check the name and the network, set HF_TOKEN if it "
                "wants a login, or give --model-id a folder in diffusers layout"
            ) from None
    check_family(model_id, folder)
    for part, names in PART_FILES.items():
        if not any(any((folder / part).glob(name.format(suffix))) for name in names):
            pickled = [*(folder / part).glob("*.bin"), *(folder / part).glob("*.ckpt")]
            why = " (pickled weights are never read: they can run code)" if pickled else ""
            missing = f"{part}/{names[0].format(suffix)}"
            raise Trouble(
                f"model {model_id} lacks {missing}{why}; get it with safetensors weights in "
                "diffusers layout, from its page on the hub or by saving it with save_pretrained"
            )
    return folder


def load_part(cls, folder: Path, part: str, **options):
    """One of the model's parts, frozen. Raises Trouble where the files do not make a whole one."""
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        model, info = cls.from_pretrained(folder / part, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise Trouble(f"the model's {part} cannot be loaded: {first_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise Trouble(f"the model's {part} lacks {len(missing)} weights, {missing[0]} among them")
    return model.eval().requires_grad_(False)


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype, variant) -> AutoencoderKL:
    vae = load_part(AutoencoderKL, folder, "vae", dtype=dtype, variant=variant)
    # With channels last, a CPU's bf16 convolutions take a third of the time.
    is_bf16_on_cpu = device.type == "cpu" and dtype is torch.bfloat16
    layout = torch.channels_last if is_bf16_on_cpu else torch.preserve_format
    return vae.to(device, memory_format=layout)


@torch.no_grad()
def embed_prompts(
    folder: Path, prompts: dict[str, str], device: torch.device, variant: str | None
) -> torch.Tensor:
    """The text encoder's last hidden state: (prompts, 77, width) float32, on the CPU.

    `prompts` maps each to what it belongs to, to report those that are cut at 77 tokens.
    """
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    options = {"dtype": torch.float32, "variant": variant}
    text_encoder = load_part(CLIPTextModel, folder, "text_encoder", **options).to(device)
    most = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
    cut = [f"{o} ({n} tokens)" for n, o in zip(lengths, prompts.values(), strict=True) if n > most]
    if cut:
        say(f"prompts longer than {most} tokens are cut there: {', '.join(cut)}")
    padded = {"padding": "max_length", "truncation": True, "max_length": most}
    prompt_ids = tokenizer(list(prompts), return_tensors="pt", **padded).input_ids
    return torch.cat([text_encoder(ids.to(device))[0].cpu() for ids in prompt_ids.split(16)])


def ignore_interrupts(worker: int) -> None:
    """In a worker: Ctrl-C reaches it too, but ending it is for the main process to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@torch.no_grad()
def encode_pictures(
    folder: Path,
    dataset: datasets.Dataset,
    drawn: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None,
) -> torch.Tensor:
    """What the latents are drawn from: mean and standard deviation of the VAE's posterior, times
    its scaling factor, of every picture and of its mirror image.

    (pictures, 2 orientations, 2, 4, R/8, R/8) float16 on the CPU: 32 KiB a picture at 256², good
    to 11 bits. Batches without an image that is `drawn`, (pictures, 2 orientations) bool, are left
    out and hold NaN. Raises Trouble where `dtype` is too narrow for this VAE.
    """
    vae = load_vae(folder, device, dtype, variant)
    side = dataset[0]["pixel_values"].shape[-1]
    # A GPU wants large batches; a CPU is faster with tensors that stay in its cache. The batches
    # are the same whatever is drawn: a batch of another size can give other last bits.
    batch_size = min(16, max(1, (512 if device.type == "cuda" else 256) ** 2 // side**2))
    batches = [range(len(dataset))[i : i + batch_size] for i in range(0, len(dataset), batch_size)]
    batches = [batch for batch in batches if drawn[batch].any()]
    # Pictures are read and resized by workers while the VAE is at the ones before.
    workers = min(4, os.cpu_count() or 1) if len(batches) * batch_size > 32 else 0
    options = {"num_workers": workers, "worker_init_fn": ignore_interrupts}
    pictures = DataLoader(dataset, batch_sampler=batches, **options)
    width = side // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (len(dataset), 2, 2, vae.config.latent_channels, width, width)
    moments = torch.full(shape, math.nan, dtype=torch.float16)
    bar = tqdm(total=int(drawn.sum()), desc="encoding pictures", unit="image", disable=None)
    for batch, examples in zip(batches, pictures, strict=True):
        for flip in drawn[batch].any(0).nonzero().flatten().tolist():
            pixel_values = examples["pixel_values"][:, flip].to(device, dtype)
            posterior = vae.encode(pixel_values).latent_dist
            both = torch.stack([posterior.mean, posterior.std], 1).float()
            moments[batch, flip] = (both * vae.config.scaling_factor).half().cpu()
            bar.update(int(drawn[batch, flip].sum()))
    bar.close()
    if not moments[drawn].isfinite().all():
        raise Trouble(f"this model's VAE overflows in {dtype}; try another --mixed-precision")
    return moments


@dataclass(frozen=True)
class Run:
    """What stands before the loop begins and never changes in it."""

    config: Config
    folder: Path  # of the base model
    device: torch.device
    dtype: torch.dtype  # of the frozen weights, and of autocast
    noise_scheduler: DDPMScheduler
    prompt_embeds: torch.Tensor  # (distinct prompts, 77, width) float32
    prompt_of: list[int]  # each picture's row in prompt_embeds
    preview_embeds: torch.Tensor  # (2, 77, width) float32: the previews' prompt, and no prompt
    moments: torch.Tensor  # as `encode_pictures` returns them

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, self.dtype is not torch.float32)


def prepare(
    config: Config,
    dataset: datasets.Dataset,
    captions: list[str],
    names: Iterable[str],
    drawn: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Run:
    """Compute once what never changes. Each part leaves memory before the next one comes.

    `captions` and `names` belong to the pictures of `dataset`, in its order; `drawn` is as
    `find_drawn` returns it.
    """
    folder = find_model(config.model_id, config.variant)
    preview_prompt = config.train_prompt if config.preview_prompt is None else config.preview_prompt
    labels = [f"picture {name!r}" for name in names]
    prompts = dict(zip(captions, labels, strict=True))
    prompts |= {preview_prompt: "--preview-prompt", "": "", config.train_prompt: "--train-prompt"}
    row = {prompt: i for i, prompt in enumerate(prompts)}
    prompt_embeds = embed_prompts(folder, prompts, device, config.variant)
    return Run(
        config=config,
        folder=folder,
        device=device,
        dtype=dtype,
        noise_scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
        prompt_embeds=prompt_embeds,
        prompt_of=[row[caption] for caption in captions],
        preview_embeds=prompt_embeds[[row[preview_prompt], row[""]]],
        moments=encode_pictures(folder, dataset, drawn, device, dtype, config.variant),
    )


class Frozen(torch.autograd.Function):
    """x → Linear or Conv2d of x by a weight that is never trained.

    Left to itself, autograd keeps what only the weight's gradient would need, a convolution's
    input, and keeps of an 8-bit weight the widened copy. Here it keeps the weight as it lies.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias, conv):
        ctx.save_for_backward(weight, scale)
        ctx.conv, ctx.shape = conv, x.shape
        if scale is not None:
            device = x.device.type
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
            weight = weight.to(dtype) * scale.to(dtype)
        if conv is None:
            return F.linear(x, weight, bias)
        if not wants_matmul(x):
            return F.conv2d(x, weight, bias, **conv)
        y = weight.flatten(1) @ F.unfold(x, weight.shape[2:], **conv)
        y = y if bias is None else y + bias[:, None]
        height = (x.shape[2] + 2 * conv["padding"][0] - weight.shape[2]) // conv["stride"][0] + 1
        return y.unflatten(2, (height, -1))

    @staticmethod
    def backward(ctx, grad):
        (weight, scale), conv = ctx.saved_tensors, ctx.conv
        if scale is not None:
            weight = weight.to(grad.dtype) * scale.to(grad.dtype)
        if conv is None:
            grad = grad @ weight
        elif not wants_matmul(grad):
            grad = torch.nn.grad.conv2d_input(ctx.shape, weight, grad, **conv)
        else:
            columns = (grad.flatten(2).mT @ weight.flatten(1)).mT
            grad = F.fold(columns, ctx.shape[2:], weight.shape[2:], **conv)
        return grad, None, None, None, None


def wants_matmul(pixels: torch.Tensor) -> bool:
    """Whether a convolution of (n, channels, h, w) is better written out as a matrix product.

    oneDNN, PyTorch's convolution on the CPU, lays out the weights anew at every call. In the
    deepest layers, few pixels and many weights, that costs two to five times the product itself.
    """
    return pixels.device.type == "cpu" and pixels[:, 0].numel() <= 64


def frozen_forward(layer: torch.nn.Linear | torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    is_conv = isinstance(layer, torch.nn.Conv2d)
    conv = {"stride": layer.stride, "padding": layer.padding} if is_conv else None
    narrow = hasattr(layer, "weight8")
    weight, scale = (layer.weight8, layer.scale) if narrow else (layer.weight, None)
    return Frozen.apply(x, weight, scale, layer.bias, conv)


def slim_frozen_layers(unet: torch.nn.Module, fp8: bool) -> None:
    """Let frozen Linear and Conv2d layers keep nothing for the backward pass but their weights;
    with `fp8`, those as float8_e4m3fn with a float scale per output channel."""
    for layer in unet.modules():
        is_conv = isinstance(layer, torch.nn.Conv2d)
        if not (is_conv or isinstance(layer, torch.nn.Linear)) or layer.weight.requires_grad:
            continue
        if fp8:
            weight = layer.weight.detach()
            largest = weight.float().flatten(1).abs().amax(1).clamp(min=1e-6)
            scale = largest / torch.finfo(torch.float8_e4m3fn).max
            scale = scale.view(-1, *[1] * (weight.ndim - 1))
            layer.weight8 = torch.nn.Buffer((weight.float() / scale).to(torch.float8_e4m3fn))
            layer.scale = torch.nn.Buffer(scale)
            # PEFT and diffusers ask a layer's weight for its device and dtype.
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        if is_conv or fp8:  # PyTorch's own Linear keeps no input for a frozen weight
            layer.forward = partial(frozen_forward, layer)


def load_unet(run: Run) -> PeftModel:
    """The frozen UNet in `run.dtype` with float32 LoRA weights in its attention layers."""
    config, options = run.config, {"dtype": run.dtype, "variant": run.config.variant}
    unet = load_part(UNet2DConditionModel, run.folder, "unet", **options)
    lora_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        bias="none",
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights or True,
    )
    # Made on the CPU, so that the first weights are the same on every device.
    torch.manual_seed(config.seed)
    unet = get_peft_model(unet, lora_config)
    slim_frozen_layers(unet, config.fp8_base)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(run.device)


# ---------------------------------------------------------------------------------------------
# Draw outside, compute inside: every random choice follows from (seed, position in the run), and
# the loss is a function of what was drawn
# ---------------------------------------------------------------------------------------------

ORDER, SAMPLE, DROPOUT = range(3)  # independent streams of random numbers under one seed


def stream_seed(seed: int, stream: int, position: int) -> int:
    return int(np.random.SeedSequence([seed, stream, position]).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, pictures: int) -> list[int]:
    """The pictures in the order of an epoch."""
    generator = torch.Generator().manual_seed(stream_seed(seed, ORDER, epoch))
    return torch.randperm(pictures, generator=generator).tolist()


def draw_picture(seed: int, pictures: int, position: int) -> tuple[int, int, torch.Generator]:
    """The picture at a position of the run, its orientation (1: mirrored), and the generator of
    all else that is random in this sample. Keyed by the sample, so that neither batch size nor
    accumulation changes a draw."""
    epoch, index = divmod(position, pictures)
    picture = epoch_order(seed, epoch, pictures)[index]
    generator = torch.Generator().manual_seed(stream_seed(seed, SAMPLE, position))
    return picture, int(torch.randint(2, (), generator=generator)), generator


def find_drawn(seed: int, pictures: int, samples: range) -> torch.Tensor:
    """Which images these samples of the run are drawn from: (pictures, 2 orientations) bool."""
    if len(samples) >= 8 * pictures:  # no need to look: nearly all
        return torch.ones(pictures, 2, dtype=torch.bool)
    drawn = torch.zeros(pictures, 2, dtype=torch.bool)
    for position in samples:
        picture, flip, _ = draw_picture(seed, pictures, position)
        drawn[picture, flip] = True
    return drawn


def draw(run: Run, position: int) -> dict[str, torch.Tensor]:
    """All that is random in one training sample, the `position`-th of the run.

    Returns latents and noise, (4, h, w) float32; timesteps, () int64; prompt_embeds, (77, width)
    float32.
    """
    picture, flip, generator = draw_picture(run.config.seed, len(run.moments), position)
    mean, std = run.moments[picture, flip].float()
    schedule = run.noise_scheduler.config.num_train_timesteps
    drawn = {
        "latents": mean + std * torch.randn(mean.shape, generator=generator),
        "noise": torch.randn(mean.shape, generator=generator),
        "timesteps": torch.randint(schedule, (), generator=generator),
        "prompt_embeds": run.prompt_embeds[run.prompt_of[picture]],
    }
    if run.config.noise_offset:  # crosslabs.org/blog/diffusion-with-offset-noise
        offset = torch.randn(len(mean), 1, 1, generator=generator)
        drawn["noise"] += run.config.noise_offset * offset
    return drawn


def plan_epoch(pictures: int, batch_size: int, accumulation: int) -> list[list[range]]:
    """An epoch as updates, each a list of batches, each a range of places in the epoch's order.

    Nothing is dropped: the last batch, and the last update's list, may be shorter.
    """
    batches = [range(i, min(i + batch_size, pictures)) for i in range(0, pictures, batch_size)]
    return [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]


def first_sample(plan: list[list[range]], step: int) -> int:
    """The position in the run of an update's first sample."""
    epoch, update = divmod(step, len(plan))
    return epoch * plan[-1][-1].stop + plan[update][0].start


def draw_update(run: Run, plan: list[list[range]], step: int) -> list[dict[str, torch.Tensor]]:
    """The batches of an update, `step` counting from 0 through all epochs."""
    epoch, update = divmod(step, len(plan))
    first = epoch * len(run.moments)
    return [default_collate([draw(run, first + i) for i in batch]) for batch in plan[update]]


def compute_loss(
    unet, noise_scheduler: DDPMScheduler, batch: dict, snr_gamma: float | None = None
) -> torch.Tensor:
    """Mean squared error of the UNet's prediction, () float32, for a batch of what `draw` draws.

    The target is the noise (arXiv 2006.11239), the velocity (2202.00512) or the sample, as the base
    model has it. With `snr_gamma`, min-SNR weights (2303.09556).
    """
    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states=batch["prompt_embeds"]).sample
    prediction_type = noise_scheduler.config.prediction_type
    match prediction_type:
        case "epsilon":
            target = noise
        case "v_prediction":
            target = noise_scheduler.get_velocity(latents, noise, timesteps)
        case "sample":
            target = latents
    loss = F.mse_loss(model_pred.float(), target, reduction="none").mean((1, 2, 3))
    if snr_gamma is not None:
        # min(SNR, γ) weights the error of x0; SNR or SNR + 1 of it is that of noise or velocity.
        # (γ / SNR is infinite where the SNR is zero: its minimum with 1 still is 1.)
        snr = compute_snr(noise_scheduler, timesteps)
        weight = {
            "epsilon": (snr_gamma / snr).clamp(max=1),
            "v_prediction": snr.clamp(max=snr_gamma) / (snr + 1),
            "sample": snr.clamp(max=snr_gamma),
        }[prediction_type]
        loss = loss * weight
    return loss.mean()


# ---------------------------------------------------------------------------------------------
# The seal
# ---------------------------------------------------------------------------------------------


def pack_safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose metadata stand in the order given.

    The library writes them in an order that varies from run to run: same seed, other bytes.
    """
    packed = save(tensors)
    data = 8 + int.from_bytes(packed[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(packed[8:data])).encode()
    header += b" " * (-len(header) % 8)  # the format wants the data aligned
    return len(header).to_bytes(8, "little") + header + packed[data:]


def kohya_state_dict(unet: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter under the key names that every client reads, with `.alpha` on each module.

    alpha is the layer's own scaling × r: clients get the strength back as alpha / r.
    """
    state_dict = {}
    for name, layer in unet.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            key = "lora_unet_" + name.replace(".", "_")
            state_dict[f"{key}.lora_down.weight"] = layer.lora_A["default"].weight
            state_dict[f"{key}.lora_up.weight"] = layer.lora_B["default"].weight
            alpha = layer.scaling["default"] * layer.r["default"]
            state_dict[f"{key}.alpha"] = torch.tensor(alpha)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}


def save_seal(run: Run, unet: PeftModel, folder: Path) -> None:
    """Write the adapter for PEFT, and once more for everything else. Nothing in it names a folder
    of the user's."""
    config, lora_config = run.config, unet.peft_config["default"]
    lora_config.target_modules = sorted(lora_config.target_modules)  # a set comes in any order
    is_local = Path(config.model_id).is_dir()
    lora_config.base_model_name_or_path = None if is_local else config.model_id
    lora_config.inference_mode = True
    folder.mkdir()
    lora_config.save_pretrained(folder)
    state_dict = {key: weight.cpu() for key, weight in get_peft_model_state_dict(unet).items()}
    packed = pack_safetensors(state_dict, {"format": "pt"})
    write_whole(folder / "adapter_model.safetensors", packed)

    if config.use_dora:
        return  # diffusers leaves its magnitudes out, and the UIs do not agree on their norm
    prediction_type = run.noise_scheduler.config.prediction_type
    state_dict = kohya_state_dict(unet)
    alpha = next(tensor.item() for key, tensor in state_dict.items() if key.endswith(".alpha"))
    is_sd2 = unet.config.cross_attention_dim == 1024
    sd2 = "stable-diffusion-v2-" + ("768-v" if prediction_type == "v_prediction" else "512")
    family = sd2 if is_sd2 else "stable-diffusion-v1"
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "artist_seal",
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.trigger_phrase": config.train_prompt,
        "modelspec.usage_hint": "put the trigger phrase into the prompt; strength 1",
        "modelspec.prediction_type": prediction_type,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sd_v2" if is_sd2 else "sd_v1",
        "ss_v2": str(is_sd2),
        "ss_output_name": "artist_seal",
    }
    packed = pack_safetensors(state_dict, metadata)
    write_whole(folder / "pytorch_lora_weights.safetensors", packed)


@torch.no_grad()
def check_seal(unet: PeftModel, folder: Path, prompt_embeds: torch.Tensor) -> UNet2DConditionModel:
    """Load both files back onto the bare UNet: each must do to its output what the trained adapter
    does. Raises Trouble otherwise. Returns the UNet with the seal as diffusers loads it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator)
    noise, prompt_embeds = noise.to(unet.device), prompt_embeds[:1].to(unet.device)

    def output(model) -> torch.Tensor:
        return model.eval()(noise, 1, encoder_hidden_states=prompt_embeds).sample.float()

    with unet.disable_adapter():
        base = output(unet)
    effect = output(unet) - base
    if not effect.any():
        raise Trouble("training left the UNet's output as it was; raise --learning-rate")
    found = {}
    with_peft = PeftModel.from_pretrained(unet.unload(), folder)
    found["adapter_model.safetensors"] = output(with_peft)
    if (folder / "pytorch_lora_weights.safetensors").exists():
        unet, pipeline = with_peft.unload(), StableDiffusionPipeline
        pipeline.load_lora_into_unet(*pipeline.lora_state_dict(folder), unet)
        found["pytorch_lora_weights.safetensors"] = output(unet)
    else:
        unet = with_peft.get_base_model()
    for name, loaded in found.items():
        if (loaded - base - effect).norm() > 0.05 * effect.norm():
            raise Trouble(f"{name}, loaded back, does not do what was trained")
    return unet


# ---------------------------------------------------------------------------------------------
# Something to look at: previews, the loss curve, the model card
# ---------------------------------------------------------------------------------------------


PREVIEW_STEPS = 20  # enough for DPM-Solver++ (arXiv 2211.01095)


@torch.no_grad()
def sample_latents(run: Run, unet) -> torch.Tensor:
    """Denoised latents without and with the adapter, (2, preview_images, 4, h, w) on the CPU.

    The same noise in both rows; one picture at a time, which takes less memory than training.
    """
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet.get_base_model() if isinstance(unet, PeftModel) else unet,
        scheduler=DPMSolverMultistepScheduler.from_config(run.noise_scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    prompt, empty = run.preview_embeds.to(run.device).unsqueeze(1)
    options = {"prompt_embeds": prompt, "negative_prompt_embeds": empty, "output_type": "latent"}
    options |= {"num_inference_steps": PREVIEW_STEPS, "guidance_scale": 7.5}
    layers = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
    seeds, latents, training = range(run.config.preview_images), [], unet.training
    bar = tqdm(total=2 * len(seeds), desc="drawing previews", disable=None)
    try:
        unet.eval()
        for with_seal in (False, True):
            for layer in layers:
                layer.enable_adapters(with_seal)
            for seed in seeds:
                generator = torch.Generator().manual_seed(seed)
                noise = torch.randn(1, *run.moments.shape[-3:], generator=generator)
                with run.autocast():
                    latents.append(pipe(latents=noise, **options).images.float().cpu())
                bar.update()
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        unet.train(training)
        bar.close()
    return torch.cat(latents).unflatten(0, (2, -1))


@torch.no_grad()
def write_previews(run: Run, unet, file: Path, last: bool = False) -> None:
    """A grid of pictures without and with the adapter. Trouble is a warning, not a failed run.

    The `last` time the UNet leaves the GPU to make room for the decoder; before, the CPU decodes.
    """
    try:
        latents = sample_latents(run, unet)
        device, dtype = (run.device, run.dtype) if last else (torch.device("cpu"), torch.float32)
        if last:
            unet.to("cpu")
        vae = load_vae(run.folder, device, dtype, run.config.variant)
        latents = (latents / vae.config.scaling_factor).to(device, dtype)
        decoded = [[vae.decode(x[None]).sample.float().cpu() for x in row] for row in latents]
        to_images = VaeImageProcessor().postprocess
        write_whole(file, draw_grid([[to_images(x)[0] for x in row] for row in decoded]))
    except Exception as error:  # noqa: BLE001 - no picture is worth a run
        say(f"no {file.name}: {first_line(error)}")


def png(image: Image.Image) -> bytes:
    image.save(data := BytesIO(), "PNG")
    return data.getvalue()


def draw_grid(rows: list[list[Image.Image]]) -> bytes:
    """A labelled PNG: the base model's pictures above, the seal's below, a seed in each column."""
    side, font = rows[0][0].width, ImageFont.load_default(14)
    left, top, gap = 104, 24, 4
    grid = Image.new("RGB", (left + len(rows[0]) * (side + gap), top + 2 * (side + gap)), "white")
    pen = ImageDraw.Draw(grid)
    for y, (label, row) in enumerate(zip(("base model", "with the seal"), rows, strict=True)):
        middle = top + y * (side + gap) + side / 2
        pen.text((left - 8, middle), label, "black", font, anchor="rm")
        for x, image in enumerate(row):
            pen.text((left + x * (side + gap) + side / 2, 12), f"seed {x}", "black", font, "mm")
            grid.paste(image, (left + x * (side + gap), top + y * (side + gap)))
    return png(grid)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, eight at most."""
    unit = 10 ** math.floor(math.log10(high))
    step = next(unit * part for part in (0.1, 0.2, 0.5, 1, 2) if high <= 8 * unit * part)
    return [round(i * step, 12) for i in range(math.ceil(low / step), int(high / step) + 1)]


def draw_loss(rows: list[list[str]]) -> bytes:
    """A PNG of the loss of each update (dots) and its running mean (line) from loss.csv's rows."""
    steps, losses = [int(row[0]) for row in rows], [float(row[2]) for row in rows]
    smooth, total, norm, decay = [], 0.0, 0.0, min(0.98, 1 - 1 / (1 + len(rows) / 20))
    for loss in losses:
        total, norm = decay * total + loss, decay * norm + 1
        smooth.append(total / norm)
    # The axis holds nearly all dots; a rare high one is drawn at the top edge.
    high = sorted(losses)[int(0.98 * (len(losses) - 1))] * 1.15
    image, font = Image.new("RGB", (800, 420), "white"), ImageFont.load_default(14)
    pen, (left, top, right, bottom) = ImageDraw.Draw(image), (70, 34, 780, 366)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * (step - steps[0]) / max(1, steps[-1] - steps[0])
        return x, max(top, bottom - (bottom - top) * loss / high)

    for loss in ticks(0, high):
        _, y = place(steps[0], loss)
        pen.line([(left, y), (right, y)], "#dddddd")
        pen.text((left - 8, y), f"{loss:g}", "black", font, "rm")
    for step in filter(float.is_integer, map(float, ticks(steps[0], steps[-1]))):
        pen.text((place(step, 0)[0], bottom + 14), f"{step:g}", "black", font, "mm")
    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    for x, y in map(place, steps, losses):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#9ecae1")
    pen.line([*map(place, steps, smooth)], "#08519c", 3)
    pen.text(
        (left, 16), "loss (mean squared error): each update, running mean", "black", font, "lm"
    )
    pen.text(((left + right) / 2, 404), "update", "black", font, "mm")
    return png(image)


def strength(config: Config) -> str:
    root, divisor = ("√", config.rank**0.5) if config.use_rslora else ("", config.rank)
    return f"{config.lora_alpha:g}/{root}{config.rank} = {config.lora_alpha / divisor:g}"


def write_card(run: Run, progress: dict) -> str:
    """The seal's README.md, by the hub's conventions. No folder of the user's is named in it."""
    config, is_local = run.config, Path(run.config.model_id).is_dir()
    base = "path/to/the/base/model" if is_local else config.model_id
    dora = "\nThis is a DoRA: of the ways below only PEFT's works.\n" if config.use_dora else ""
    trigger, preview_prompt = config.train_prompt, config.preview_prompt or config.train_prompt
    has_preview = (Path(config.output_dir) / "preview.png").exists()
    widget = [{"text": preview_prompt, "output": {"url": "preview.png"}}] if has_preview else None
    front_matter = ModelCardData(
        base_model=None if is_local else base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "stable-diffusion", "text-to-image", "diffusers-training"],
        instance_prompt=config.train_prompt,
        widget=widget,
    )
    private = {"dataset_dir", "output_dir", "resume"} | ({"model_id"} if is_local else set())
    told = {key_of(o): getattr(config, o.name) for o in fields(config) if o.name not in private}
    settings = json.dumps(told, indent=2, ensure_ascii=False)
    libraries = (torch, diffusers, transformers, peft, datasets)
    facts = {
        "strength": strength(config),
        "loss": "none" if progress["loss"] is None else f"{progress['loss']:.4f} in the last epoch",
        "pictures": len(run.moments),
        "updates": f"{progress['step']} in {progress['epochs']} epochs",
        "time": f"{progress['seconds'] / 60:.1f} minutes of training",
        "peak memory": f"{peak_memory(run.device):.0f} MiB",
        "hardware": device_name(run.device),
        "precision": str(run.dtype).removeprefix("torch."),
        "versions": ", ".join(f"{lib.__name__} {lib.__version__}" for lib in libraries),
    }
    facts = "".join(f"\n| {name} | {fact} |" for name, fact in facts.items())
    previews = "![Without and with the seal](preview.png)\n" if has_preview else ""
    curve = "![Loss](loss.png)" if (Path(config.output_dir) / "loss.png").exists() else ""
    return str(
        ModelCard(
            f"""---
{front_matter.to_yaml()}
---

# An artist's seal

A LoRA for Stable Diffusion that carries the style of a folder of pictures. Put the trigger phrase
into your prompt:

> {trigger}

{previews}
{curve}

## Use it
{dora}
diffusers:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({base!r})
pipe.load_lora_weights("path/to/this/folder")
image = pipe({trigger!r}).images[0]
```

PEFT:

```python
from diffusers import UNet2DConditionModel
from peft import PeftModel

unet = UNet2DConditionModel.from_pretrained({base!r}, subfolder="unet")
unet = PeftModel.from_pretrained(unet, "path/to/this/folder")
```

ComfyUI: copy `pytorch_lora_weights.safetensors` to `models/loras` and add a *Load LoRA* node at
strength 1. AUTOMATIC1111 and Forge: copy it to `models/Lora` as `artist_seal.safetensors` and write
`<lora:artist_seal:1>` into the prompt. Strength 1 is the strength it was trained at.

## How it was trained

| | |
| --- | --- |{facts}

The settings, as a file for `--config`:

```json
{settings}
```
"""
        )
    )


# ---------------------------------------------------------------------------------------------
# The checkpoint: all that a run needs to go on as if it had never stopped
# ---------------------------------------------------------------------------------------------


def identify(config: Config, precision: str, digests: dict[str, str]) -> dict[str, str]:
    """What a run that continues another must share with it, under the names to report it by."""
    kept = [option for option in fields(config) if option.name not in FREE_TO_CHANGE]
    identity = {flag_of(option): shown(getattr(config, option.name)) for option in kept}
    pictures = {f"picture {name!r}": digest for name, digest in digests.items()}
    return identity | {"--mixed-precision": precision} | pictures


def checkpoint_file(config: Config) -> Path:
    return Path(config.output_dir) / "checkpoint" / "checkpoint.safetensors"


def save_checkpoint(file: Path, parameters: dict, optimizer: AdamW, state: dict) -> None:
    """One file, so that it is replaced whole: tensors, and `state` as JSON in the header."""
    tensors = {f"lora.{name}": parameter for name, parameter in parameters.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": tensor for key, tensor in moments.items()}
    tensors = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    write_whole(file, pack_safetensors(tensors, {"state": json.dumps(state)}))


def read_checkpoint(config: Config, state: dict, total_steps: int) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint in the output folder; `state` takes on its state. Without a
    checkpoint, nothing.

    Raises Trouble (exit code 2) with a list of what differs from the run that wrote it.
    """
    file = checkpoint_file(config)
    if not file.exists():
        say(f"no checkpoint in {config.output_dir}: starting afresh")
        return {}
    try:
        with safe_open(file, "pt") as saved:
            before = json.loads(saved.metadata()["state"])
            tensors = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        raise Trouble(f"{file} is damaged ({first_line(error)}); train without --resume") from None
    old, new = before["identity"], state["identity"]
    differing = [
        f"\n  {name}"
        + ("" if name.startswith("picture") else f": {old.get(name)}, now {new.get(name)}")
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise Trouble(
            "--resume needs the interrupted run's options and pictures; these differ:"
            + "".join(differing),
            2,
        )
    if before["progress"]["step"] > total_steps:
        at = f"update {before['progress']['step']}"
        raise Trouble(f"--resume: the checkpoint is at {at}, this run ends at {total_steps}", 2)
    state["progress"].update(before["progress"])
    state["scaler"] = before["scaler"]
    return tensors


def restore(saved: dict[str, torch.Tensor], parameters: dict, optimizer: AdamW) -> None:
    """Put a checkpoint's tensors back where `save_checkpoint` took them from."""
    moments = {}
    for key, tensor in saved.items():
        kind, name = key.split(".", 1)
        if kind == "lora":
            parameters[name].data.copy_(tensor)
        else:
            index, name = name.split(".")
            moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


LOG_COLUMNS = "update epoch loss learning_rate gradient_norm images_per_second peak_memory_mib"


def device_name(device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> float:
    """In MiB: of the GPU's memory, or of the process's on the CPU (0 where it does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(ImportError):  # Windows has no such module
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return 0.0


def read_log(file: Path, step: int) -> list[list[str]]:
    """loss.csv's rows up to an update; none where there is no such file."""
    with suppress(OSError), open(file, newline="", encoding="utf-8") as lines:
        return [row for row in list(csv.reader(lines))[1:] if len(row) == 7 and int(row[0]) <= step]
    return []


def append_log(file: Path, rows: list[list]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerows(([] if lines.tell() else [LOG_COLUMNS.split()]) + rows)


@contextmanager
def kept_on_failure(keep):
    """Call `keep` if an error ends the block, unless it is Trouble: that spoils what it would keep."""
    try:
        yield
    except Trouble:
        raise
    except Exception:
        with suppress(Exception):
            keep()
        raise


def make_lr_scheduler(config: Config, optimizer: AdamW, total_steps: int):
    name, warmup = config.lr_scheduler, config.lr_warmup_steps
    if name == "constant" and warmup:
        name = "constant_with_warmup"  # diffusers' "constant" would pass over it
    steps = {"num_warmup_steps": warmup, "num_training_steps": total_steps}
    return get_scheduler(name, optimizer, **steps)


def account(progress: dict, plan: list, values: list) -> list[list]:
    """Add updates to `progress`; return the first columns of their rows in loss.csv.

    `values` holds of each its loss summed over its pictures, learning rate and gradient norm.
    Raises Trouble for a loss that is not finite.
    """
    rows = []
    for summed, rate, norm in values:
        pictures = sum(map(len, plan[progress["step"] % len(plan)]))
        progress["step"] += 1
        if not math.isfinite(summed):
            where = f"update {progress['step']}"
            raise Trouble(f"loss not finite at {where}; try a lower --learning-rate")
        rows.append([progress["step"], progress["epochs"] + 1, summed / pictures, rate, norm])
        progress["epoch_loss"] += summed
        progress["images"] += pictures
        if progress["step"] % len(plan) == 0:
            progress["epochs"] += 1
            in_epoch = sum(len(batch) for update in plan for batch in update)
            progress["loss"], progress["epoch_loss"] = progress["epoch_loss"] / in_epoch, 0.0
    return rows


def fit(run: Run, unet: PeftModel, plan: list, total_steps: int, saved: dict, state: dict) -> None:
    """Train the adapter in `unet`, from where `state["progress"]` stands to `total_steps`.

    `plan` is `plan_epoch`'s; `saved` holds a checkpoint's tensors, or nothing. Raises SystemExit
    after a signal, Trouble for a loss that is not finite.
    """
    config, device, progress = run.config, run.device, state["progress"]
    lora_parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    optimizer = AdamW(lora_parameters.values(), lr=config.learning_rate, fused=True)
    # Without it, float16 gradients underflow; elsewhere it passes everything through.
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype is torch.float16)
    lr_scheduler = make_lr_scheduler(config, optimizer, total_steps)
    if saved:
        restore(saved, lora_parameters, optimizer)
        scaler.load_state_dict(state["scaler"])
    for _ in range(progress["step"]):  # a function of the step alone, so this is all its state
        lr_scheduler.step()

    # One item an update: its batches.
    steps = range(progress["step"], total_steps)
    pin_memory = device.type == "cuda"
    draw_step = partial(draw_update, run, plan)
    train_dataloader = DataLoader(steps, None, collate_fn=draw_step, pin_memory=pin_memory)
    bar = tqdm(total=total_steps, initial=steps.start, desc="training", unit="update", disable=None)

    def backward(batch: dict[str, torch.Tensor], share: float) -> torch.Tensor:
        """Add the share of the batch's gradient; return its loss, () float32, on the device."""
        with run.autocast():
            loss = compute_loss(unet, run.noise_scheduler, batch, config.snr_gamma)
        scaler.scale(loss * share).backward()
        return loss.detach()

    every, log_file = config.preview_every_epochs, checkpoint_file(config).with_name("loss.csv")
    rows = read_log(log_file, progress["step"]) if saved else []
    log_file.unlink(missing_ok=True)
    append_log(log_file, rows)
    # Of each update since the last look: loss summed over its pictures, rate, gradient norm.
    pending, looked = [], time.monotonic()

    def look() -> None:
        """Bring `progress` and loss.csv up to date. The CPU waits for the GPU here, which it does
        at the end of an epoch, every few seconds and at a checkpoint, not at every update."""
        nonlocal looked
        values = torch.stack(pending).tolist() if pending else []
        pending.clear()
        seconds, looked = time.monotonic() - looked, time.monotonic()
        seen, epochs = progress["images"], progress["epochs"]
        rows = account(progress, plan, values)
        progress["seconds"] += seconds
        speed = round((progress["images"] - seen) / max(seconds, 1e-9), 3)
        memory = round(peak_memory(device))
        append_log(log_file, [[*row, speed, memory] for row in rows])
        bar.update(len(rows))
        if progress["epochs"] > epochs:  # one at most: there is a look at each epoch's end
            loss = f"loss {progress['loss']:.4f}"
            bar.set_postfix_str(loss)
            tqdm.write(f"epoch {epochs + 1}/{config.num_train_epochs}: {loss}", sys.stderr)

    def keep() -> None:
        look()
        now = state | {"scaler": scaler.state_dict()}
        save_checkpoint(checkpoint_file(config), lora_parameters, optimizer, now)

    Stop.deferred = True
    # PEFT would widen every LoRA input to float32 and keep it; autocast narrows it again anyway.
    without_casts = disable_input_dtype_casting(unet, run.dtype is not torch.float32)
    unet.train()
    with without_casts, kept_on_failure(keep):
        for step, batches in zip(steps, train_dataloader, strict=True):
            summed = torch.zeros((), dtype=torch.float64, device=device)
            for i, batch in enumerate(batches):
                batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
                torch.manual_seed(stream_seed(config.seed, DROPOUT, step * 2**32 + i))
                summed += backward(batch, 1 / len(batches)) * len(batch["timesteps"])
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(lora_parameters.values(), config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            rate = torch.full_like(summed, lr_scheduler.get_last_lr()[0])
            lr_scheduler.step()
            pending.append(torch.stack([summed, rate, norm.to(summed.dtype)]))

            if Stop.signum:
                break
            epoch, rest = divmod(step + 1, len(plan))
            if (step + 1) % config.checkpointing_steps == 0:
                keep()
            elif rest == 0 or time.monotonic() > looked + 5:
                look()
            if rest == 0 and config.preview_images and every and epoch % every == 0:
                keep()
                Stop.deferred = False  # a signal need not wait for pictures
                write_previews(run, unet, log_file.parent / "previews" / f"epoch-{epoch:04}.png")
                Stop.deferred, looked = True, time.monotonic()
        keep()
    bar.close()
    Stop.deferred = False
    if Stop.signum:
        sys.exit(128 + Stop.signum)


def publish(run: Run, unet: PeftModel, progress: dict) -> None:
    """Put the seal into the output folder, and beside it what there is to look at."""
    config, output_dir = run.config, Path(run.config.output_dir)
    # Judged in a folder of its own first: a run that fails leaves an earlier seal untouched.
    staging, unfinished = output_dir / ".partial", checkpoint_file(config).parent
    shutil.rmtree(staging, ignore_errors=True)
    try:
        save_seal(run, unet, staging)
        with run.autocast():
            unet = check_seal(unet, staging, run.prompt_embeds)
        for path in sorted(staging.iterdir()):
            os.replace(path, output_dir / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

    # The seal is safe. What an earlier run left beside it must not be taken for this one's.
    older = ["preview.png", "loss.png", "loss.csv", "README.md"]
    for name in older + ["pytorch_lora_weights.safetensors"] * config.use_dora:
        (output_dir / name).unlink(missing_ok=True)
    shutil.rmtree(output_dir / "previews", ignore_errors=True)
    if (unfinished / "previews").exists():
        shutil.copytree(unfinished / "previews", output_dir / "previews")
    if config.preview_images:
        # Two forward passes a step, each about half of what training spends on a picture.
        passes = 2 * PREVIEW_STEPS * 2 * config.preview_images
        minutes = passes * progress["seconds"] / max(1, progress["images"]) / 2 / 60
        if minutes > 1:
            say(f"drawing previews; this takes about {math.ceil(minutes)} minutes")
        write_previews(run, unet, output_dir / "preview.png", last=True)
    log = read_log(unfinished / "loss.csv", progress["step"])
    append_log(output_dir / "loss.csv", log)
    if log:  # none are left if someone took the unfinished run's loss.csv away
        write_whole(output_dir / "loss.png", draw_loss(log))
    write_whole(output_dir / "README.md", write_card(run, progress).encode())


def train(config: Config, progress: dict) -> None:
    """The whole run. `progress` is kept up to date, for the record of a run that fails."""
    # Same command, same bytes: some of CUDA's kernels must be told. (Without effect on the CPU.)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cpu":
        say("no CUDA GPU found: training on the CPU")
    precision = config.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[precision]

    dataset, captions, digests = load_pictures(config)
    # A step is one update: so many batches, the mean of whose gradients it follows.
    plan = plan_epoch(len(dataset), config.train_batch_size, config.gradient_accumulation_steps)
    total_steps = config.num_train_epochs * len(plan)
    total_steps = min(total_steps, config.max_train_steps or total_steps)
    state = {"identity": identify(config, precision, digests), "progress": progress}
    saved = read_checkpoint(config, state, total_steps) if config.resume else {}

    samples = range(first_sample(plan, progress["step"]), first_sample(plan, total_steps))
    drawn = find_drawn(config.seed, len(dataset), samples)
    run = prepare(config, dataset, captions, digests, drawn, device, dtype)
    unet = load_unet(run)
    weights = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    say(f"training {weights:,} LoRA weights at strength {strength(config)}, {total_steps} updates")
    if config.use_dora:
        say("a DoRA's seal is for PEFT alone: no pytorch_lora_weights.safetensors will be written")
    say(f"of {config.model_id} in {str(dtype).removeprefix('torch.')} on {device_name(device)}")
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    progress["began"] = True
    fit(run, unet, plan, total_steps, saved, state)
    publish(run, unet, progress)


def is_out_of_memory(error: BaseException) -> bool:
    # CUDA has a class for it; on the CPU only the message tells.
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def advise_on_memory(config: Config) -> str:
    """The flags that would lower this command's memory."""
    flags = {
        "--gradient-checkpointing": not config.gradient_checkpointing,
        "--fp8-base": not config.fp8_base and not config.use_dora,
        "--mixed-precision fp16": config.mixed_precision == "no",
        "a smaller --train-batch-size": config.train_batch_size > 1,
        "a smaller --resolution": config.resolution > 64,
        "a smaller --rank": config.rank > 4,
    }
    return ", ".join(flag for flag, helps in flags.items() if helps)


def main(config: Config) -> int:
    """Train, record the outcome in result.json, and return the exit code."""
    for library in (datasets, diffusers.utils, transformers.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    progress = {"began": False, "step": 0, "epochs": 0, "loss": None, "epoch_loss": 0.0}
    progress |= {"seconds": 0.0, "images": 0}
    resumable, exit_code = True, 1
    try:
        train(config, progress)
        write_result(config.output_dir, True, progress["epochs"], progress["loss"])
        shutil.rmtree(checkpoint_file(config).parent, ignore_errors=True)
        print(f"seal written to {config.output_dir}; its README.md tells how to load it, such as")
        print(f"    pipe.load_lora_weights({config.output_dir!r})")
        return 0
    except SystemExit as stop:
        exit_code = stop.code
        say(f"interrupted after {progress['step']} updates")
    except Trouble as trouble:
        say(trouble)
        resumable, exit_code = False, trouble.exit_code
    except OSError as error:
        say(f"{error.filename or config.output_dir}: {error.strerror or first_line(error)}")
    except Exception as error:  # noqa: BLE001 - whatever it is, the user gets one line
        if is_out_of_memory(error):
            say(f"out of memory; what lowers it: {advise_on_memory(config)}")
        else:
            say(f"failed with {type(error).__name__}: {first_line(error)}")
    if progress["began"]:
        with suppress(OSError):
            write_result(config.output_dir, False, progress["epochs"], progress["loss"])
        if resumable and checkpoint_file(config).exists():
            say("the same command with --resume goes on from the checkpoint")
    return exit_code


if __name__ == "__main__":
    sys.exit(main(config))
