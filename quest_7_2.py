"""Train a LoRA "seal" that carries the style of a folder of pictures, on Stable Diffusion.

    python quest_7_2.py --dataset-dir my_paintings --output-dir my_seal

Two halves: tools, each of which can be read and tested by itself, and at the end `main`, the run
from the pictures to the seal told in one piece. README.md tells what the options are for.
"""

import signal
import sys

if __name__ == "__main__":  # until there is more to say of an interruption, a few lines below
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import codecs
import csv
import errno
import glob
import hashlib
import json
import math
import os
import re
import tempfile
import textwrap
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import Field, dataclass, field, fields
from functools import lru_cache, partial, wraps
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import NoneType
from typing import NamedTuple, get_args

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

# ==== The command: arguments, JSON and folders, answered in a fraction of a second ===========


class Trouble(Exception):
    """What stops a run: one message for the user, and the exit code (2: refused, 1: failed)."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def say(message, stream=None) -> None:
    """A line on stderr, or on another stream. It never fails, and sends a terminal no control
    characters, which a stranger's file may hold in a name."""
    stream = stream or sys.stderr
    line = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(message))
    try:
        line = line.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding)
        print(line, file=stream, flush=True)
    except (OSError, ValueError):  # closed, or full: what is left in its buffer must not matter
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Stop:
    """SIGINT, SIGTERM and SIGHUP: at once, or, while training, when the update in hand is done."""

    deferred = False  # set while training
    signum = 0  # the signal that came

    @staticmethod
    def on_signal(signum: int, frame) -> None:
        at_once, Stop.signum = Stop.signum or not Stop.deferred, signum
        if at_once:
            sys.exit(128 + signum)
        with suppress(OSError):  # not through a buffer that may be in the middle of a line
            os.write(2, b"stopping after this update; once more stops at once\n")


# Limits: how "must be …" goes on, and the test of it on a value of the right type.
ANY = ("", lambda value: True)
TEXT = ("text", lambda text: text == text.encode("utf-8", "ignore").decode())
PATH = ("a path", lambda text: text.strip() and "\0" not in text and TEXT[1](text))
NATURAL = ("at least 0", lambda n: 0 <= n < 2**63)
POSITIVE = ("at least 1 and below 2^31", lambda n: 1 <= n < 2**31)
ABOVE_0 = ("finite and above 0", lambda x: 0 < x < math.inf)
FROM_0 = ("finite and at least 0", lambda x: 0 <= x < math.inf)
SHARE = ("at least 0 and below 1", lambda p: 0 <= p < 1)
# Pillow would fill all memory, and be killed for it, long before a larger picture is made.
TIMES_8 = ("a positive multiple of 8, at most 16384", lambda n: 0 < n <= 16384 and n % 8 == 0)


def one_of(*names: str) -> tuple:
    return f"one of {', '.join(names)}", lambda name: name in names


PRECISION = one_of("fp16", "bf16", "no")
RESIZE = one_of("squash", "crop")
# diffusers has piecewise_constant too, which needs rules that no flag gives.
SCHEDULES = "constant constant_with_warmup linear cosine cosine_with_restarts polynomial"
SCHEDULE = one_of(*SCHEDULES.split())
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
    model_id: str = option(
        "CompVis/stable-diffusion-v1-4", PATH, "hub id, diffusers folder or .safetensors"
    )
    resolution: int = option(256, TIMES_8, "side of the training pictures in pixels")
    train_batch_size: int = option(1, POSITIVE, "pictures in a batch")
    gradient_accumulation_steps: int = option(4, POSITIVE, "batches in an update")
    learning_rate: float = option(1e-4, ABOVE_0, "of AdamW")
    num_train_epochs: int = option(100, POSITIVE, "times through the folder")
    train_prompt: str = option("a painting in the style of artist_seal", TEXT, "calls up the style")
    rank: int = option(16, POSITIVE, "of the LoRA matrices")
    lora_alpha: float = option(32.0, ABOVE_0, "the seal's strength is alpha / rank")
    lora_dropout: float = option(0.05, SHARE, "share of LoRA inputs left out in training")
    caption_dropout: float = option(0.0, SHARE, "share of samples trained on the empty prompt")
    use_dora: bool = option(False, ANY, "DoRA; a seal for PEFT alone")
    use_rslora: bool = option(False, ANY, "strength alpha / sqrt(rank)")
    init_lora_weights: str | None = option(None, INIT, "first LoRA weights (default: PEFT's)")
    micro_batch_size: int | None = option(None, POSITIVE, "samples at once (default: a batch)")
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


# What --resume may change: where things lie (the pictures themselves are compared), how long it
# goes on, and what leaves the arithmetic alone.
FREE_TO_CHANGE = {"dataset_dir", "output_dir", "num_train_epochs", "max_train_steps", "resume"}
FREE_TO_CHANGE |= {"checkpointing_steps", "gradient_checkpointing", "preview_images"}
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


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def json_to_flags(text: str) -> list[str]:
    """The flags that a JSON object of options stands for. Raises ValueError for any other text, and
    Trouble (exit code 2) for a value that no flag could have."""
    options = {key_of(option): option for option in fields(Config)}
    # A number stays as it is written, for the flag to judge.
    as_written = {"parse_int": str, "parse_float": str, "parse_constant": str}
    given = json.loads(text, object_pairs_hook=tuple, **as_written)
    if not isinstance(given, tuple):
        raise ValueError("must hold one JSON object")  # noqa: TRY004 - as json's own errors
    for key, count in Counter(key for key, _ in given).items():
        if key not in options:
            raise ValueError(f"unknown key {shown(key)}")
        if count > 1:
            raise ValueError(f"{key} stands there twice")
    flags = []
    for key, value in given:
        option, is_switch = options[key], kind_of(options[key]) is bool
        if value is None:  # not given
            continue
        if isinstance(value, list | tuple) or isinstance(value, bool) is not is_switch:
            needed = KINDS[kind_of(option)]
            raise Trouble(f"{name_of(option)} must be {needed}, not {shown(value)}", 2)
        if is_switch:
            flags.append(flag_of(option) if value else flag_of(option).replace("--", "--no-", 1))
        else:
            flags.append(f"{flag_of(option)}={value}")
    return flags


def read_config(argv: list[str]) -> Config:
    """Defaults < the JSON < flags. Raises Trouble (exit code 2) for what is not valid."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("quest_7_2.py", description=about, allow_abbrev=False)
    parser.add_argument("--config", metavar="X", help="JSON of options in camelCase, or its file")
    for option in fields(Config):
        limit, _ = option.metadata["limit"]
        help = "; ".join(filter(None, [option.metadata["help"], limit if limit != PATH[0] else ""]))
        help += "" if option.default is None else f" (default: {option.default})"
        is_switch = kind_of(option) is bool
        how = {"action": argparse.BooleanOptionalAction} if is_switch else {"metavar": "X"}
        parser.add_argument(flag_of(option), help=help, default=argparse.SUPPRESS, **how)

    def refuse(message: str):
        raise Trouble(f"{message}; --help lists the options", 2)

    parser.error = refuse
    source, words = parser.parse_args(argv).config, []
    if source is not None:
        try:
            is_text = source.lstrip().startswith("{")
            words = json_to_flags(source if is_text else read_ordinary(Path(source)).decode())
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            where = "--config" if is_text else f"--config {source}"
            raise Trouble(f"{where}: {reason}", 2) from None
    given = vars(parser.parse_args(words + argv))
    del given["config"]
    for option in fields(Config):
        # A text that is no number is left as it is, for Config to refuse.
        if kind_of(option) in (int, float) and option.name in given:
            with suppress(ValueError):
                given[option.name] = kind_of(option)(given[option.name])
    return Config(**given)


# What Pillow reads well of imagefolder's own list.
SUFFIXES = ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .tga .ppm"
OTHER_SUFFIXES = ".heic .heif .avif .jxl .jp2 .svg .eps .psd .raw .dng"


def list_files(folder: Path, suffixes: str = SUFFIXES) -> list[Path]:
    """All such files in a folder and its subfolders, by name; what is hidden is left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    shown = (path for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted(folder / path for path in shown if path.suffix.lower() in suffixes.split())


def list_left_out(folder: Path) -> list[str]:
    """What looks as if it were meant and is not read, each with the reason."""
    left_out = []

    def note(path: Path, why: str) -> None:
        left_out.append(f"{os.path.relpath(path, folder)} ({why})")

    for root, folders, files in os.walk(folder, onerror=lambda e: note(e.filename, e.strerror)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in folders if Path(root, name).is_symlink()):
            note(path, "a linked folder")
        for path in (Path(root, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in OTHER_SUFFIXES.split():
                note(path, "a kind that is not read")
    return left_out


def read_ordinary(path: Path) -> bytes:
    """A file's bytes. Raises OSError also for a pipe or a device, which might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not an ordinary file", str(path))
    return path.read_bytes()


# The names under which a run writes into the output folder. It replaces nothing else there.
CHECKPOINT = "checkpoint/checkpoint.pt"
SEAL_FILES = ["adapter_config.json", "adapter_model.safetensors"]
SEAL_FILES += ["pytorch_lora_weights.safetensors"]
LOOKS = ["preview.png", "loss.png", "loss.csv", "README.md"]
PREVIEWS = "previews/epoch-*.png"


def check_folders(config: Config) -> None:
    """Raises Trouble (exit code 2) for a dataset that is not there, and for an output folder that
    cannot be written, lies in the dataset or the model (or the other way round), or holds what no
    run of ours left under the names that this one will write."""
    dataset_dir, output_dir = Path(config.dataset_dir), Path(config.output_dir).absolute()
    if not dataset_dir.is_dir():
        what = "is a file, not a folder" if dataset_dir.exists() else "does not exist"
        raise Trouble(f"dataset folder {dataset_dir} {what}; name one with --dataset-dir", 2)
    os.scandir(dataset_dir).close()  # raises OSError for one that cannot be read
    if not list_files(dataset_dir):
        raise Trouble(f"dataset folder {dataset_dir} has no pictures ({SUFFIXES})", 2)
    ours = Path(os.path.realpath(output_dir))
    for what, path in [("dataset", dataset_dir), ("model", Path(config.model_id))]:
        theirs = Path(os.path.realpath(path))
        if path.exists() and (ours.is_relative_to(theirs) or theirs.is_relative_to(ours)):
            both = f"output folder {output_dir} must not be in the {what} folder {path}"
            raise Trouble(f"{both}, nor the other way round", 2)

    names = [*SEAL_FILES, *LOOKS, "result.json", "previews", "checkpoint"]
    found = [output_dir / name for name in names if os.path.lexists(output_dir / name)]
    is_known = read_result(output_dir) is not None or (output_dir / CHECKPOINT).is_file()
    if is_known:  # by a run of ours: then only what it cannot have left
        found = [
            path
            for path in found
            if path.is_symlink()
            or not (path.is_dir() if path.name in ("previews", "checkpoint") else path.is_file())
        ]
    if found:
        told = ", ".join(path.name for path in found)
        raise Trouble(
            f"output folder {output_dir} holds what no run of this script left: {told}", 2
        )
    if not config.resume and (output_dir / CHECKPOINT).is_file():
        ways = f"go on from it with --resume, or delete {output_dir / 'checkpoint'}"
        raise Trouble(f"output folder {output_dir} holds an interrupted run's work: {ways}", 2)
    existing = next(path for path in [output_dir, *output_dir.parents] if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=existing).close()  # asking for permissions is not enough
    except OSError as error:
        reason = error.strerror
        raise Trouble(f"output folder {output_dir} cannot be written: {reason}", 2) from None


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


def read_result(output_dir: Path) -> dict | None:
    """What a run of ours left as `result.json`; None for anything else of that name."""
    try:
        found = json.loads(read_ordinary(output_dir / "result.json"))
    except (OSError, ValueError, RecursionError):
        return None
    keys = {"success", "outputDir", "epochsCompleted"}
    is_ours = isinstance(found, dict) and found.keys() - {"finalLoss"} == keys
    return found if is_ours and isinstance(found["success"], bool) else None


def disown_older_result(output_dir: str) -> None:
    """Turn an earlier run's `result.json` to false now: however this run ends, it stays honest."""
    if read_result(Path(output_dir)):
        write_result(output_dir, success=False)


class Lock:
    """The output folder itself, locked for this process while `held`, a file descriptor, is open.

    The system frees it however we end. (Windows has no such lock.)
    """

    held = None

    @classmethod
    def take(cls, folder: Path) -> None:
        """Raises Trouble (exit code 2) if another run has it. Nothing to do before it exists."""
        if cls.held is None and fcntl and folder.is_dir():
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise Trouble(f"output folder {folder} is in use by another run", 2) from None
            cls.held = descriptor

    @classmethod
    def release(cls) -> None:
        if cls.held is not None:
            os.close(cls.held)
            cls.held = None


def begin(argv: list[str]) -> Config:
    """Judge the command and take the output folder, or say what is wrong and exit with 2.

    A command line that cannot be understood touches nothing; one that can turns an older
    `result.json` to false before anything else is judged.
    """
    try:
        config = read_config(argv)
        tempfile.gettempdir()  # torch's import wants it too
        Lock.take(Path(config.output_dir))
        disown_older_result(config.output_dir)
        check_folders(config)
        return config
    except (Trouble, OSError) as error:
        known = isinstance(error, Trouble)
        say(error if known else f"{error.filename or 'here'}: {error.strerror or error}")
        sys.exit(2)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows lacks one
            signal.signal(getattr(signal, name), Stop.on_signal)
    # A typing mistake is answered here; the imports below take eight seconds.
    config = begin(sys.argv[1:])

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
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    create_diffusers_clip_model_from_ldm,
    infer_diffusers_model_type,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.optim import AdamW
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

# ==== The pictures ===========================================================================


# Pillow's own decoders of these: of others, some start a program, as Ghostscript for PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "TGA", "PPM")
MOST_PIXELS = 100_000_000
ONE_AT_A_TIME = threading.Lock()  # held for large pictures, which take up to 15 bytes a pixel


def open_rgb(data: bytes) -> Image.Image:
    """A picture as RGB: upright by its EXIF orientation, transparency over white, 16 bits as 8.

    Raises ValueError for one that is not read, and whatever Pillow raises for one it cannot decode.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("is not the picture that its name says") from None
    pixels = math.prod(image.size)
    if pixels > MOST_PIXELS:
        raise ValueError(
            f"has {pixels / 1e6:.0f} million pixels; at most {MOST_PIXELS // 10**6} are read"
        )
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("has 32 bits a channel, of unknown range; save it with 8 or 16")
    with ONE_AT_A_TIME if pixels > 2**24 else nullcontext():
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
    crop = transforms.Compose([transforms.Resize(resolution), transforms.CenterCrop(square)])
    resize = crop if resize_mode == "crop" else transforms.Resize(square)
    normalize = transforms.Normalize([0.5], [0.5])
    pixels = []
    for image, digest in zip(examples["image"], examples["sha256"], strict=True):
        data = read_ordinary(Path(image["path"]))
        if hashlib.sha256(data).hexdigest() != digest:
            raise Trouble(f"picture {image['path']} changed after it was checked; start again")
        pixels.append(open_rgb(data))
    pixels = [normalize(transforms.functional.to_tensor(resize(image))) for image in pixels]
    return {"pixel_values": [torch.stack([p, transforms.functional.hflip(p)]) for p in pixels]}


def read_csv(data: BytesIO) -> dict[str, list[str]]:
    """The columns of a CSV file by their names. Raises ValueError for a row unlike the header: where
    a comma is not quoted, pandas would take a caption for a name."""
    rows = [row for row in csv.reader(TextIOWrapper(data, "utf-8", newline="")) if row]
    header, *rows = rows or [[]]
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            fields = f"{len(row)} fields, the header {len(header)}"
            raise ValueError(f"row {number} has {fields}; quote texts that hold commas")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def read_captions(folder: Path, paths: list[Path], train_prompt: str) -> list[str]:
    """The caption of each picture: from imagefolder's metadata file (columns file_name and text),
    else from a .txt file beside it, else the train prompt.

    Raises Trouble (exit code 2) for files that cannot be read or name pictures that are not there.
    """
    readers = {
        ".jsonl": partial(pandas.read_json, lines=True, dtype=False),
        ".csv": read_csv,
        ".parquet": pandas.read_parquet,
    }
    captions, missing = dict.fromkeys(map(str, paths)), []
    try:
        for file in list_files(folder, " ".join(readers)):
            if file.stem.lower() == "metadata":
                data = read_ordinary(file).removeprefix(codecs.BOM_UTF8)
                table = readers[file.suffix.lower()](BytesIO(data))
                for name, text in zip(table["file_name"], table["text"], strict=True):
                    path = os.path.normpath(file.parent / str(name))
                    missing += [f"{name!r} in {file.name}"] if path not in captions else []
                    if not isinstance(text, str) and (np.ndim(text) or not pandas.isna(text)):
                        raise ValueError(f"the caption of {name!r} is no text")
                    captions[path] = text
        beside = {file.with_suffix(""): file for file in list_files(folder, ".txt")}
        for path in paths:
            if captions[str(path)] is None and path.with_suffix("") in beside:
                file = beside[path.with_suffix("")]
                captions[str(path)] = read_ordinary(file).decode("utf-8-sig")
    except (OSError, ValueError, KeyError, csv.Error) as error:
        columns = "; it needs the columns file_name and text" if isinstance(error, KeyError) else ""
        reason = getattr(error, "strerror", None) or first_line(error)
        raise Trouble(f"captions {file}: {reason}{columns}", 2) from None
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
        data = read_ordinary(path)
        size = open_rgb(data).size
        return hashlib.sha256(data).hexdigest(), size, ""
    except Exception as error:  # noqa: BLE001 - decoders raise anything on bad bytes
        reason = getattr(error, "strerror", None) or first_line(error)
        return "", (0, 0), f"\n  {str(path)!r}: {reason}"


def load_pictures(config: Config) -> tuple[datasets.Dataset, list[str], dict[str, str]]:
    """The folder as a `datasets` imagefolder whose rows are `apply_transforms`' pixel values; the
    caption of each picture; and by its name in the folder a SHA-256 of both.

    Raises Trouble (exit code 2) with a list of all pictures that cannot be used.
    """
    # Normalised, as the captions' paths are: the default folder begins with "..".
    folder = Path(os.path.abspath(config.dataset_dir))
    paths = list_files(folder)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        examined = tqdm(pool.map(examine, paths), "checking pictures", len(paths), disable=None)
        digests, sizes, problems = zip(*examined, strict=True)
    if problems := [problem for problem in problems if problem]:
        told = f"{len(problems)} of {len(paths)} pictures cannot be used, mend or remove them:"
        raise Trouble(told + "".join(problems), 2)

    captions = read_captions(folder, paths, config.train_prompt)
    own = sum(caption != config.train_prompt for caption in captions)
    sizes = sorted(sizes, key=math.prod)
    extent = dict.fromkeys(f"{width}×{height}" for width, height in (sizes[0], sizes[-1]))
    count = "1 picture" if len(paths) == 1 else f"{len(paths)} pictures"
    say(f"{count}, {' to '.join(extent)} pixels, {own} with captions of their own")
    if left_out := list_left_out(folder):
        more = f" and {len(left_out) - 20} more" if len(left_out) > 20 else ""
        say(f"{count}, {len(left_out)} left out: {', '.join(left_out[:20])}{more}")

    # Named one by one: left to itself, imagefolder puts test_1.png into a "test" split, unused.
    options = {"data_files": {"train": [glob.escape(str(path)) for path in paths]}}
    options |= {"split": "train", "keep_in_memory": True, "drop_labels": True}
    with tempfile.TemporaryDirectory() as cache:  # no older listing must be taken for this one
        try:
            dataset = datasets.load_dataset("imagefolder", cache_dir=cache, **options)
        except datasets.exceptions.DatasetsError as error:
            raise Trouble(f"listing the pictures in {cache}: {error.__cause__ or error}") from None
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    dataset = dataset.add_column("sha256", list(digests))
    how = {"resolution": config.resolution, "resize_mode": config.resize_mode}
    dataset = dataset.with_transform(partial(apply_transforms, **how))
    told = {}
    for path, digest, caption in zip(paths, digests, captions, strict=True):
        both = f"{digest} {caption}".encode()
        told[str(path.relative_to(folder))] = hashlib.sha256(both).hexdigest()
    return dataset, captions, told


# ==== The model's parts, one at a time: text encoder, VAE, UNet ==============================


class Base(NamedTuple):
    """Where the base model's parts lie: a folder in diffusers' layout or, with a file in the
    original layout, that file for the weights and a folder for configurations and tokenizer."""

    folder: Path
    variant: str | None = None
    file: Path | None = None


# Of a file in the original layout: how its keys begin for each part.
PREFIXES = {
    "text_encoder": "cond_stage_model.",
    "vae": "first_stage_model.",
    "unet": "model.diffusion_model.",
}
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

    configs = []
    names = ["model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json"]
    for name in [*names, "scheduler/scheduler_config.json"]:
        configs.append({})
        with suppress(OSError, ValueError):
            configs[-1] = dict(json.loads(read_ordinary(folder / name)))
    index, unet, text, vae, scheduler = configs
    fits = not index.keys() & {"transformer", "text_encoder_2", "prior", "controlnet"}
    if unet and text:
        fits &= unet.get("in_channels", 4) == 4 and not unet.get("addition_embed_type")
        fits &= unet.get("cross_attention_dim") == text.get("hidden_size")
    if not fits:
        trained = (
            "text-to-image Stable Diffusion 1.x and 2.x, no SDXL, SD3, Flux or inpainting model"
        )
        what = index.get("_class_name", "something else")
        raise Trouble(f"model {model_id} is {what}; this script trains {trained}")
    kinds = ("epsilon", "v_prediction", "sample")
    timesteps = scheduler.get("num_train_timesteps", 1000)
    for needed, is_met in {
        "a VAE of 4 latent channels": vae.get("latent_channels", 4) == 4,
        "a VAE with a scaling_factor above 0": 0 < vae.get("scaling_factor", 0.18215) < math.inf,
        "a scheduler of noise, not of flow": "Flow" not in scheduler.get("_class_name", ""),
        f"a prediction_type of {kinds}": scheduler.get("prediction_type", "epsilon") in kinds,
        "a scheduler of 1 timestep or more": isinstance(timesteps, int) and timesteps > 0,
    }.items():
        if not is_met:
            raise Trouble(f"model {model_id} lacks {needed}: it cannot be trained like this")


def find_file(file: Path) -> Base:
    """A file in the original layout, judged by its header, with the configurations that go with it:
    from the hub once, then from the hub's cache. Raises Trouble for what is not trained."""
    if file.suffix != ".safetensors":
        why = "pickled weights are never read, they can run code"
        raise Trouble(f"model {file} is no .safetensors file: {why}")
    try:
        with safe_open(file, "pt") as header:
            shapes = {key: header.get_slice(key).get_shape() for key in header.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Trouble(f"model {file} cannot be read: {first_line(error)}") from None
    kind = infer_diffusers_model_type(
        {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    )
    if kind not in ("v1", "v2"):
        trained = "Stable Diffusion 1.x and 2.x, no SDXL, SD3, Flux or inpainting model"
        raise Trouble(f"model {file} is {kind}; this script trains text-to-image {trained}")
    for part, prefix in PREFIXES.items():
        if not any(key.startswith(prefix) for key in shapes):
            raise Trouble(f"model {file} lacks the {part} ({prefix}…): it is no whole checkpoint")
    hub_id = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    try:
        small = ["*.json", "*/merges.txt"]
        return Base(Path(snapshot_download(hub_id, allow_patterns=small)), file=file)
    except Exception as error:  # noqa: BLE001 - the hub, the network and the disk may fail
        once = f"hf download {hub_id} --include '*.json' '*/merges.txt'"
        raise Trouble(
            f"model {file} needs the tokenizer and configurations of {hub_id}, which could not be "
            f"had from the hub ({type(error).__name__}): run this once with network: {once}"
        ) from None


def find_model(model_id: str, variant: str | None) -> Base:
    """The parts of a hub id, downloaded first, of a local folder or of one file.

    The one place that may use the network. Raises Trouble for what is not there or not complete.
    """
    suffix, folder = f".{variant}" if variant else "", Path(model_id)
    if folder.is_file():
        if variant:
            raise Trouble("--variant is for hub ids and folders; a file has but one", 2)
        base = find_file(folder)
        check_family(model_id, base.folder)
        return base
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
            where = "from its page on the hub or by saving it with save_pretrained"
            missing = f"{part}/{names[0].format(suffix)}{why}"
            raise Trouble(f"model {model_id} lacks {missing}; get it with safetensors, {where}")
    return Base(folder, variant)


def fingerprint(base: Base) -> str:
    """Tells base models apart at no cost: of each file its name and size, and of its bytes sixteen
    samples of 4 KiB (a configuration, or a small file's header, is whole among them)."""
    digest = hashlib.sha256()
    weights = [base.file] if base.file else [*base.folder.glob("*/*.safetensors")]
    for path in sorted([*base.folder.glob("*/*.json"), *weights]):
        size = path.stat().st_size
        name = "" if path == base.file else path.relative_to(base.folder)
        digest.update(f"{name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(16):
                file.seek(i * max(4096, size // 16))
                digest.update(file.read(4096))
    return digest.hexdigest()


def is_out_of_memory(error: BaseException) -> bool:
    # CUDA has a class for it; on the CPU only the message tells.
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def load_part(cls, base: Base, part: str, dtype: torch.dtype | None = None, **options):
    """One of the model's parts; a network is frozen and in `dtype`. Raises Trouble where the files
    do not make a whole one."""
    is_network, missing = issubclass(cls, torch.nn.Module), []
    try:
        if not is_network:
            return cls.from_pretrained(base.folder / part)
        if base.file is None:
            options |= {"use_safetensors": True, "output_loading_info": True}
            options |= {"dtype": dtype, "variant": base.variant}
            model, info = cls.from_pretrained(base.folder / part, **options)
            missing = sorted(info["missing_keys"])
        else:
            with safe_open(base.file, "pt") as file:
                keys = [key for key in file.keys() if key.startswith(PREFIXES[part])]  # noqa: SIM118
                weights = {key: file.get_tensor(key) for key in keys}
            how = {"config": str(base.folder), "subfolder": part, "torch_dtype": dtype}
            is_clip = cls is CLIPTextModel
            load = (
                partial(create_diffusers_clip_model_from_ldm, cls)
                if is_clip
                else cls.from_single_file
            )
            model = load(weights, **how, local_files_only=True)
            missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    except Exception as error:  # what libraries raise for damaged files is anything
        if is_out_of_memory(error):
            raise
        raise Trouble(f"the model's {part} cannot be loaded: {first_line(error)}") from None
    if missing:
        raise Trouble(f"the model's {part} lacks {len(missing)} weights, {missing[0]} among them")
    return model.eval().requires_grad_(False)


def load_vae(base: Base, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    vae = load_part(AutoencoderKL, base, "vae", dtype)
    # With channels last, a CPU's bf16 convolutions take a third of the time.
    is_bf16_on_cpu = device.type == "cpu" and dtype is torch.bfloat16
    layout = torch.channels_last if is_bf16_on_cpu else torch.preserve_format
    return vae.to(device, memory_format=layout)


@torch.no_grad()
def embed_prompts(base: Base, prompts: dict[str, str], device: torch.device) -> dict:
    """The text encoder's last hidden state for each prompt: (77, width) float32, on the CPU.

    `prompts` maps each to what it belongs to, to report those that are cut at 77 tokens.
    """
    tokenizer = load_part(CLIPTokenizer, base, "tokenizer")
    # Said here, so that a stranger's configuration cannot name a kernel to fetch and run.
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    text_encoder = load_part(CLIPTextModel, base, "text_encoder", **options).to(device)
    most = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
    cut = [f"{o} ({n} tokens)" for n, o in zip(lengths, prompts.values(), strict=True) if n > most]
    if cut:
        say(f"prompts longer than {most} tokens are cut there: {', '.join(cut)}")
    padded = {"padding": "max_length", "truncation": True, "max_length": most}
    prompt_ids = tokenizer(list(prompts), return_tensors="pt", **padded).input_ids
    embeds = torch.cat([text_encoder(ids.to(device))[0].cpu() for ids in prompt_ids.split(16)])
    return dict(zip(prompts, embeds, strict=True))


@torch.no_grad()
def encode_pictures(
    base: Base, dataset: datasets.Dataset, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """What the latents are drawn from: mean and standard deviation of the VAE's posterior, times
    its scaling factor, of every picture and of its mirror image.

    (pictures, 2 orientations, 2, 4, R/8, R/8) float16 on the CPU: 32 KiB a picture at 256², good
    to 11 bits. Raises Trouble where `dtype` is too narrow for this VAE.
    """
    vae = load_vae(base, device, dtype)
    side = dataset[0]["pixel_values"].shape[-1]
    # A GPU wants large batches; a CPU is faster with tensors that stay in its cache.
    batch_size = min(16, max(1, (512 if device.type == "cuda" else 256) ** 2 // side**2))
    moments = []
    bar = tqdm(total=2 * len(dataset), desc="encoding pictures", unit="image", disable=None)
    # The next batch is read and resized while the VAE is at this one.
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(dataset.__getitem__, slice(0, batch_size))
        for start in range(0, len(dataset), batch_size):
            pixel_values = torch.stack(ahead.result()["pixel_values"], 1)  # (2, batch, 3, R, R)
            after = start + batch_size
            if after < len(dataset):
                ahead = reader.submit(dataset.__getitem__, slice(after, after + batch_size))
            for pixels in pixel_values:
                posterior = vae.encode(pixels.to(device, dtype)).latent_dist
                both = torch.stack([posterior.mean, posterior.std], 1).float()
                moments.append((both * vae.config.scaling_factor).half().cpu())
                bar.update(len(pixels))
    bar.close()
    # From (batch, 2, …) of each orientation in turn to (pictures, orientations, 2, …).
    moments = torch.stack([torch.cat(moments[0::2]), torch.cat(moments[1::2])], 1)
    if not moments.isfinite().all():
        raise Trouble(f"this model's VAE overflows in {dtype}; try another --mixed-precision")
    return moments


def widen(layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """A frozen layer's weight as the arithmetic wants it; of an 8-bit one, a new copy each time."""
    return layer.weight8.to(dtype) * layer.scale.to(dtype) if layer.is_fp8 else layer.weight


def frozen_forward(layer: torch.nn.Linear | torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """`layer.forward`, keeping nothing for the backward pass but the weight as it lies.

    Left to itself, autograd keeps what only the weight's gradient would need, a convolution's
    input, and keeps of an 8-bit weight the widened copy.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):  # cast here, so that no cast copy is kept inside
        x = x.to(torch.get_autocast_dtype(device))
    weight = widen(layer, x.dtype)
    # `pack` lives as long as the graph does, and with it whatever it refers to: ids, not tensors.
    input_id, weight_id, dtype = id(x), id(weight), x.dtype

    def pack(tensor: torch.Tensor):
        if id(tensor) == input_id:
            return ("input", tensor.shape, tensor.device)
        if layer.is_fp8 and weight_id in (id(tensor), id(tensor._base)):
            return ("weight", tensor.shape, tensor.stride())
        return tensor

    def unpack(kept) -> torch.Tensor:
        match kept:
            case "input", shape, on:
                return torch.empty(shape, dtype=dtype, device=on)  # only its shape is asked for
            case "weight", shape, stride:
                return widen(layer, dtype).as_strided(shape, stride)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        if isinstance(layer, torch.nn.Linear):
            return F.linear(x, weight, layer.bias)
        conv = {"stride": layer.stride, "padding": layer.padding}
        # oneDNN, PyTorch's convolution on the CPU, lays out the weights anew at every call. In
        # the deepest layers, few pixels and many weights, that costs more than the product itself.
        if device != "cpu" or x[:, 0].numel() > 64:
            return F.conv2d(x, weight, layer.bias, **conv)
        y = weight.flatten(1) @ F.unfold(x, weight.shape[2:], **conv)
        y = y if layer.bias is None else y + layer.bias[:, None]
        height = (x.shape[2] + 2 * layer.padding[0] - weight.shape[2]) // layer.stride[0] + 1
        return y.unflatten(2, (height, -1))


def slim_frozen_layers(unet: torch.nn.Module, fp8: bool) -> None:
    """Let frozen Linear and Conv2d layers keep nothing for the backward pass but their weights;
    with `fp8`, those as float8_e4m3fn with a float scale per output channel."""
    for layer in unet.modules():
        is_conv = isinstance(layer, torch.nn.Conv2d)
        if not (is_conv or isinstance(layer, torch.nn.Linear)) or layer.weight.requires_grad:
            continue
        layer.is_fp8 = fp8
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


def load_unet(base: Base, config: Config, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """The frozen UNet in `dtype` with float32 LoRA weights in its attention layers."""
    unet = load_part(UNet2DConditionModel, base, "unet", dtype)
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
    return unet.to(device)


# ==== Draw outside, compute inside ===========================================================
# Every random choice follows from (seed, position in the run); the loss is a function of tensors.

ORDER, SAMPLE, DROPOUT = range(3)  # independent streams of random numbers under one seed


def stream_seed(seed: int, stream: int, position: int) -> int:
    return int(np.random.SeedSequence([seed, stream, position]).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, pictures: int) -> list[int]:
    """The pictures in the order of an epoch."""
    generator = torch.Generator().manual_seed(stream_seed(seed, ORDER, epoch))
    return torch.randperm(pictures, generator=generator).tolist()


def plan_epoch(pictures: int, batch_size: int, accumulation: int) -> list[list[tuple[int, float]]]:
    """An epoch as updates, each a flat list of samples: (place in the epoch's order, weight).

    A sample weighs 1 / (batches in the update × size of its batch), so that the weighted sum of
    the samples' losses is the mean of the batches' means, however it is cut into pieces. Nothing
    is dropped: the last batch, and the last update, may be shorter.
    """
    batches = [range(i, min(i + batch_size, pictures)) for i in range(0, pictures, batch_size)]
    updates = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    return [[(i, 1 / (len(u) * len(batch))) for batch in u for i in batch] for u in updates]


def draw(
    position: int, moments: torch.Tensor, caption_embeds: list, num_timesteps: int, config: Config
) -> dict[str, torch.Tensor]:
    """All that is random in one training sample, the `position`-th of the run; keyed by that, so
    that neither batch size nor accumulation changes a draw.

    `moments` are `encode_pictures`'; `caption_embeds` holds each picture's, (77, width), and last
    the empty prompt's. Returns
    latents and noise, (4, h, w) float32; timesteps, () int64; prompt_embeds, (77, width) float32.
    """
    epoch, place = divmod(position, len(moments))
    picture = epoch_order(config.seed, epoch, len(moments))[place]
    generator = torch.Generator().manual_seed(stream_seed(config.seed, SAMPLE, position))
    flip = int(torch.randint(2, (), generator=generator))
    mean, std = moments[picture, flip].float()
    sample = {
        "latents": mean + std * torch.randn(mean.shape, generator=generator),
        "noise": torch.randn(mean.shape, generator=generator),
        "timesteps": torch.randint(num_timesteps, (), generator=generator),
        "prompt_embeds": caption_embeds[picture],
    }
    if config.noise_offset:  # crosslabs.org/blog/diffusion-with-offset-noise
        offset = torch.randn(len(mean), 1, 1, generator=generator)
        sample["noise"] += config.noise_offset * offset
    # For classifier-free guidance (arXiv 2207.12598): what the empty prompt has learned as well,
    # guidance does not multiply.
    if config.caption_dropout and torch.rand((), generator=generator) < config.caption_dropout:
        sample["prompt_embeds"] = caption_embeds[-1]
    return sample


def draw_update(plan: list, piece_size: int, sample_from: tuple, step: int) -> list[dict]:
    """The samples of an update, `step` counting from 0 through all epochs, in pieces to compute at
    once: `draw`'s tensors stacked, and `weight`, (piece,) float32.

    `sample_from` is what `draw` draws from: all its arguments but the position.
    """
    epoch, index = divmod(step, len(plan))
    first = epoch * sum(map(len, plan))
    samples = [
        draw(first + place, *sample_from) | {"weight": torch.tensor(weight)}
        for place, weight in plan[index]
    ]
    pieces = [samples[i : i + piece_size] for i in range(0, len(samples), piece_size)]
    return [default_collate(piece) for piece in pieces]


def compute_loss(
    unet, noise_scheduler: DDPMScheduler, batch: dict, snr_gamma: float | None = None
) -> torch.Tensor:
    """Mean squared error of the UNet's prediction for each sample, (n,) float32.

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
    return loss


# ==== The seal ===============================================================================


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


def save_seal(folder: Path, unet: PeftModel, config: Config, prediction_type: str) -> str:
    """Write the adapter for PEFT, and once more for everything else. Returns the seal's name, which
    no other has: clients tell seals apart by it. Nothing in it names a folder of the user's."""
    lora_config = unet.peft_config["default"]
    lora_config.target_modules = sorted(lora_config.target_modules)  # a set comes in any order
    is_local = Path(config.model_id).exists()
    lora_config.base_model_name_or_path = None if is_local else config.model_id
    lora_config.inference_mode = True
    lora_config.save_pretrained(folder)
    state_dict = {key: weight.cpu() for key, weight in get_peft_model_state_dict(unet).items()}
    packed = pack_safetensors(state_dict, {"format": "pt"})
    write_whole(folder / "adapter_model.safetensors", packed)
    words = re.sub(r"[^a-z0-9]+", "_", config.train_prompt.lower()).strip("_")[-40:].strip("_")
    name = f"{words or 'seal'}_{hashlib.sha256(packed).hexdigest()[:6]}"

    if config.use_dora:
        return name  # diffusers leaves its magnitudes out, and the UIs do not agree on their norm
    state_dict = kohya_state_dict(unet)
    alpha = next(tensor.item() for key, tensor in state_dict.items() if key.endswith(".alpha"))
    is_sd2 = unet.config.cross_attention_dim == 1024
    sd2 = "stable-diffusion-v2-" + ("768-v" if prediction_type == "v_prediction" else "512")
    family = sd2 if is_sd2 else "stable-diffusion-v1"
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.trigger_phrase": config.train_prompt,
        "modelspec.usage_hint": "put the trigger phrase into the prompt; strength 1",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sd_v2" if is_sd2 else "sd_v1",
        "ss_v2": str(is_sd2),
        "ss_output_name": name,
    }
    packed = pack_safetensors(state_dict, metadata)
    write_whole(folder / "pytorch_lora_weights.safetensors", packed)
    return name


@torch.no_grad()
def check_seal(unet: PeftModel, folder: Path, prompt_embeds: torch.Tensor) -> UNet2DConditionModel:
    """Load both files back onto the bare UNet: each must do to its output what the trained adapter
    does. `prompt_embeds` is (77, width). Raises Trouble otherwise. Returns the UNet with the seal
    as diffusers loads it (of a DoRA, as PEFT does)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator)
    noise, prompt_embeds = noise.to(unet.device), prompt_embeds[None].to(unet.device)

    def output(model) -> torch.Tensor:
        return model.eval()(noise, 1, encoder_hidden_states=prompt_embeds).sample.float()

    with unet.disable_adapter():
        base = output(unet)
    effect = output(unet) - base
    if not effect.any():
        raise Trouble(
            "training left the UNet's output as it was: too low a --learning-rate, --lora-alpha, "
            "--snr-gamma or --max-grad-norm, or a --lr-warmup-steps longer than the run"
        )
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


# ==== Something to look at: previews, the loss curve, the model card =========================

PREVIEW_STEPS = 20  # enough for DPM-Solver++ (arXiv 2211.01095)


@torch.no_grad()
def sample_latents(unet, noise_scheduler, embeds: torch.Tensor, noises: list, autocast):
    """Denoised latents without and with the adapter, (2, n, 4, h, w) float32 on the CPU.

    `embeds`, (2, 77, width), are the prompt's and the empty one's; `noises`, n of
    (1, 4, h, w), are the same for both rows. One picture at a time, which takes less memory than training.
    """
    absent = ["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"]
    parts = dict.fromkeys(absent) | {"requires_safety_checker": False}
    parts["unet"] = unet.get_base_model() if isinstance(unet, PeftModel) else unet
    parts["scheduler"] = DPMSolverMultistepScheduler.from_config(noise_scheduler.config)
    pipe = StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    prompt, empty = embeds.to(unet.device).unsqueeze(1)
    options = {"prompt_embeds": prompt, "negative_prompt_embeds": empty, "output_type": "latent"}
    options |= {"num_inference_steps": PREVIEW_STEPS, "guidance_scale": 7.5}
    layers = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
    latents, training = [], unet.training
    bar = tqdm(total=2 * len(noises), desc="drawing previews", disable=None)
    try:
        unet.eval()
        for with_seal in (False, True):
            for layer in layers:
                layer.enable_adapters(with_seal)
            for noise in noises:
                with autocast:
                    latents.append(pipe(latents=noise, **options).images.float().cpu())
                bar.update()
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        unet.train(training)
        bar.close()
    return torch.cat(latents).unflatten(0, (2, -1))


@torch.no_grad()
def write_previews(file: Path, prompt: str, sample, load_decoder) -> None:
    """A grid of pictures without and with the adapter. Trouble is a warning, not a failed run.

    `sample()` gives `sample_latents`' latents; `load_decoder()`, after it, the VAE.
    """
    try:
        latents, vae = sample(), load_decoder()
        latents = (latents / vae.config.scaling_factor).to(vae.device, vae.dtype)
        rows = [[vae.decode(x[None]).sample.float().cpu() for x in row] for row in latents]
        to_images = VaeImageProcessor().postprocess
        write_png(file, draw_grid([[to_images(x)[0] for x in row] for row in rows], prompt))
    except Exception as error:  # noqa: BLE001 - no picture is worth a run
        say(f"no {file.name}: {first_line(error)}")


def write_png(file: Path, image: Image.Image) -> None:
    image.save(data := BytesIO(), "PNG")
    write_whole(file, data.getvalue())


def draw_grid(rows: list[list[Image.Image]], prompt: str) -> Image.Image:
    """The base model's pictures above, the seal's below, a seed in each column, and the prompt over
    all. Cells are at least 160 pixels wide: small pictures are enlarged by a whole factor."""
    zoom = -(-160 // rows[0][0].width)
    side, font, gap = rows[0][0].width * zoom, ImageFont.load_default(14), 4
    left, columns = 112, len(rows[0])
    width = left + columns * (side + gap)
    lines = textwrap.wrap(prompt, max(24, (width - 16) // 8)) or ["(no prompt)"]
    top = 18 * len(lines) + 30
    grid = Image.new("RGB", (max(width, 220), top + 2 * (side + gap)), "white")
    pen = ImageDraw.Draw(grid)
    for i, line in enumerate(lines):
        pen.text((8, 14 + 18 * i), line, "black", font, "lm")
    for y, (label, row) in enumerate(zip(("base model", "with the seal"), rows, strict=True)):
        middle = top + y * (side + gap) + side / 2
        pen.text((left - 8, middle), label, "black", font, anchor="rm")
        for x, image in enumerate(row):
            at = left + x * (side + gap)
            pen.text((at + side / 2, top - 12), f"seed {x}", "black", font, "mm")
            enlarged = image.resize((side, side), Image.Resampling.NEAREST)
            grid.paste(enlarged, (at, top + y * (side + gap)))
    return grid


def draw_loss(rows: list[list]) -> Image.Image:
    """The loss of each update (dots) and its running mean (line), from `rows`."""
    steps, losses = [row[0] for row in rows], pandas.Series([row[2] for row in rows])
    smooth = losses.ewm(alpha=max(0.02, 1 / (1 + len(rows) / 20))).mean()
    # The axis holds nearly all dots; a rare high one is drawn at the top edge.
    high = float(f"{max(np.quantile(losses, 0.98), smooth.max()) * 1.15:.1g}") or 1.0
    image, font = Image.new("RGB", (800, 420), "white"), ImageFont.load_default(14)
    pen, (left, top, right, bottom) = ImageDraw.Draw(image), (70, 34, 780, 366)
    xs = np.interp(steps, (steps[0], max(steps[-1], steps[0] + 1)), (left, right))
    for x, y in zip(xs, np.interp(losses, (0, high), (bottom, top)), strict=True):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#9ecae1")
    curve = np.interp(smooth, (0, high), (bottom, top))
    pen.line([*zip(xs, curve, strict=True)], "#08519c", 3)
    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    for i in range(6):
        step, loss = steps[round(i * (len(steps) - 1) / 5)], i * high / 5
        pen.text((left - 8, bottom - i * (bottom - top) / 5), f"{loss:.3g}", "black", font, "rm")
        pen.text((xs[step - steps[0]], bottom + 14), f"{step}", "black", font, "mm")
    title = "loss (mean squared error): each update, running mean"
    pen.text((left, 16), title, "black", font, "lm")
    pen.text(((left + right) / 2, 404), "update", "black", font, "mm")
    return image


def strength(config: Config) -> str:
    root, divisor = ("√", config.rank**0.5) if config.use_rslora else ("", config.rank)
    return f"{config.lora_alpha:g}/{root}{config.rank} = {config.lora_alpha / divisor:g}"


CARD = """---
{front_matter}
---

# {name}

A LoRA for Stable Diffusion that carries the style of a folder of pictures. Put the trigger phrase
into your prompt:

{fence}text
{trigger}
{fence}

<Gallery />

{pictures}
## Use it
{dora}
diffusers:

{fence}python
import torch
from diffusers import StableDiffusionPipeline

base = {base!r}
pipe = StableDiffusionPipeline.from_pretrained(base, {options}){to}
pipe.load_lora_weights("path/to/this/folder")
image = pipe({trigger!r}).images[0]
{fence}

PEFT:

{fence}python
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel

base = {base!r}
unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", {options}){to}
unet = PeftModel.from_pretrained(unet, "path/to/this/folder")
{fence}

ComfyUI: copy `pytorch_lora_weights.safetensors` to `models/loras` and add a *Load LoRA* node at
strength 1. AUTOMATIC1111 and Forge: copy it to `models/Lora` as `{name}.safetensors` and write
`<lora:{name}:1>` into the prompt. InvokeAI: import that one file, not the folder. Strength 1 is the
strength it was trained at.

To share it: `hf upload your-name/{name} path/to/this/folder --exclude result.json` (that file holds
the output path as it was given).

## How it was trained

| | |
| --- | --- |
{facts}

The settings, as a file for `--config`:

{fence}json
{settings}
{fence}
"""
LICENSES = {
    "CompVis/stable-diffusion-v1": "creativeml-openrail-m",
    "stable-diffusion-v1-5/": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
}


def write_card(config: Config, name: str, on_gpu: bool, facts: dict, pictures: dict) -> str:
    """The seal's README.md, by the hub's conventions. No folder of the user's is named in it.

    `facts` tell how it was trained; `pictures` are the names of those beside it, by their titles.
    """
    is_local, trigger = Path(config.model_id).exists(), config.train_prompt
    preview_prompt = config.preview_prompt or trigger
    licenses = [known for of, known in LICENSES.items() if config.model_id.startswith(of)]
    front_matter = ModelCardData(
        base_model=None if is_local else config.model_id,
        license=licenses[0] if licenses and not is_local else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        inference=True,
        tags=["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers"]
        + ["diffusers-training", "lora"],
        instance_prompt=trigger,
        widget=[{"text": preview_prompt, "output": {"url": "preview.png"}}]
        if "preview.png" in pictures.values()
        else None,
    )
    private = {"dataset_dir", "output_dir", "resume"} | ({"model_id"} if is_local else set())
    told = {key_of(o): getattr(config, o.name) for o in fields(config) if o.name not in private}
    settings = json.dumps(told, indent=2, ensure_ascii=False)
    longest = max(map(len, re.findall("`+", trigger + settings)), default=0)
    card = CARD.format(
        front_matter=front_matter.to_yaml(),
        name=name,
        trigger=trigger,
        fence="`" * max(3, longest + 1),  # a prompt with backticks must not end a block
        base="path/to/the/base/model" if is_local else config.model_id,
        # Said, since a base model's files may mix float16 and float32.
        options=f"torch_dtype=torch.{'float16' if on_gpu else 'float32'}"
        + (f", variant={config.variant!r}" if config.variant else ""),
        to='.to("cuda")' if on_gpu else "",
        pictures="".join(f"![{title}]({file})\n\n" for title, file in pictures.items()),
        dora="\nThis is a DoRA: of the ways below only PEFT's works.\n" if config.use_dora else "",
        facts="\n".join(f"| {what} | {fact} |" for what, fact in facts.items()),
        settings=settings,
    )
    return str(ModelCard(card))


# ==== The record of a run, and the checkpoint it goes on from as if it had never stopped =====

# One row of loss.csv an update; what else is asked of a run's past follows from them and the plan.
COLUMNS = ["update", "epoch", "loss", "learning_rate", "gradient_norm"]
COLUMNS += ["images_per_second", "peak_memory_mib"]


def summarize(rows: list[list], plan: list) -> tuple[int, float | None]:
    """Epochs completed, and the mean loss over the pictures of the last of them."""
    epochs = len(rows) // len(plan)
    if epochs == 0:
        return 0, None
    last = rows[(epochs - 1) * len(plan) : epochs * len(plan)]
    total = sum(row[2] * len(update) for row, update in zip(last, plan, strict=True))
    return epochs, total / sum(map(len, plan))


def peak_memory(device: torch.device) -> float:
    """In MiB: of the GPU's memory, or of the process's on the CPU (0 where it does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 if resource else 0.0


def identify(config: Config, digests: dict[str, str], **resolved) -> dict[str, str]:
    """What a run that continues another must share with it, under the names to report it by.
    `resolved` holds options as this run reads them, where that is more than what was given."""
    kept = [option for option in fields(config) if option.name not in FREE_TO_CHANGE]
    values = {option.name: getattr(config, option.name) for option in kept} | resolved
    identity = {flag_of(option): shown(values[option.name]) for option in kept}
    identity["the base model's files"] = identity.pop("--model-id")
    return identity | {f"picture {name!r}": digest for name, digest in digests.items()}


def read_checkpoint(file: Path, identity: dict[str, str], total_steps: int) -> dict | None:
    """The state that `save_checkpoint` wrote; None where there is no such file.

    Raises Trouble (exit code 2) with a list of what differs from the run that wrote it.
    """
    if not file.exists():
        say(f"no checkpoint in {file.parent.parent}: starting afresh")
        return None
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        old, steps = saved["identity"], len(saved["rows"])
    except Exception as error:  # noqa: BLE001 - torch raises several kinds for a damaged file
        reason = first_line(error)
        raise Trouble(f"{file} is damaged ({reason}); delete it to start afresh") from None
    differing = ""
    for name in {**old, **identity}:
        before, now = old.get(name), identity.get(name)
        if before != now:
            differing += f"\n  {name}"
            differing += f": {before}, now {now}" if name.startswith("--") else ""
    if differing:
        needed = "--resume needs the interrupted run's options and pictures; these differ:"
        raise Trouble(needed + differing, 2)
    if steps > total_steps:
        where = f"the checkpoint is at update {steps}, this run ends at {total_steps}"
        raise Trouble(f"--resume: {where}", 2)
    return saved


def remove_unfinished(folder: Path) -> None:
    """Remove what runs write into `checkpoint/`, and the folder if nothing else is in it."""
    seal = [f"seal/{name}" for name in SEAL_FILES]
    for pattern in ["checkpoint.pt", "loss.csv", PREVIEWS, *seal, "**/.*.partial"]:
        for path in folder.glob(pattern):
            path.unlink()
    for inner in (folder / "previews", folder / "seal", folder):
        with suppress(OSError):  # not empty, or not there
            inner.rmdir()


# ==== The run ================================================================================


def answering(main):
    """Let `main` end in an exit code, and whatever stops it in one message on stderr."""

    @wraps(main)
    def answered(config: Config) -> int:
        resumable, exit_code = True, 1
        try:
            main(config)
            return 0
        except SystemExit as stop:
            exit_code = stop.code
            say("interrupted")
        except Trouble as trouble:
            say(trouble)
            resumable, exit_code = False, trouble.exit_code
        except OSError as error:
            say(f"{error.filename or config.output_dir}: {error.strerror or first_line(error)}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the user gets one line
            if is_out_of_memory(error):
                flags = "--gradient-checkpointing, --fp8-base, --micro-batch-size 1"
                say(f"out of memory; what lowers it: {flags}, a smaller --resolution or --rank")
            else:
                say(f"failed with {type(error).__name__}: {first_line(error)}")
        finally:
            Stop.deferred = False
            Lock.release()
        if resumable and (Path(config.output_dir) / CHECKPOINT).exists():
            say("the same command with --resume goes on from the checkpoint")
        return exit_code

    return answered


@answering
def main(config: Config) -> None:
    """The run, from a folder of pictures to the seal. Raises Trouble, or SystemExit on a signal."""
    output_dir = Path(config.output_dir)
    for library in (datasets, diffusers.utils, transformers.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    warnings.simplefilter("ignore")

    Lock.take(output_dir)
    check_folders(config)

    # --- Device and precision -------------------------------------------------------------------
    # Same command, same bytes: some of CUDA's kernels must be told. (Without effect on the CPU.)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.use_deterministic_algorithms(on_gpu, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    threads = f"CPU, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if on_gpu else threads
    if not on_gpu:
        say("no CUDA GPU found: training on the CPU")
    precision = config.mixed_precision or ("fp16" if on_gpu else "no")
    # Of the frozen weights, and of autocast; what is trained stays float32.
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)

    # --- Pictures, and the plan of an epoch -----------------------------------------------------
    dataset, captions, digests = load_pictures(config)
    plan = plan_epoch(len(dataset), config.train_batch_size, config.gradient_accumulation_steps)
    total_steps = config.num_train_epochs * len(plan)
    total_steps = min(total_steps, config.max_train_steps or total_steps)

    # --- What a resumed run must share with the one before it -----------------------------------
    piece_size = config.micro_batch_size or config.train_batch_size
    base = find_model(config.model_id, config.variant)
    options = {"mixed_precision": precision, "micro_batch_size": piece_size}
    options["model_id"] = fingerprint(base)  # the same, by whatever name it is called
    identity = identify(config, digests, **options)
    saved = None
    if config.resume:
        saved = read_checkpoint(output_dir / CHECKPOINT, identity, total_steps)

    # --- CLIP: every prompt's embedding, computed once ------------------------------------------
    preview_prompt = config.train_prompt if config.preview_prompt is None else config.preview_prompt
    prompts = dict(zip(captions, (f"picture {name!r}" for name in digests), strict=True))
    prompts |= {preview_prompt: "--preview-prompt", "": "", config.train_prompt: "--train-prompt"}
    prompt_embeds = embed_prompts(base, prompts, device)
    caption_embeds = [prompt_embeds[caption] for caption in [*captions, ""]]

    # --- VAE: every picture's posterior and its mirror image's, computed once -------------------
    moments = encode_pictures(base, dataset, device, dtype)

    # --- UNet and LoRA --------------------------------------------------------------------------
    noise_scheduler = load_part(DDPMScheduler, base, "scheduler")
    unet = load_unet(base, config, device, dtype)
    lora = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    weights = sum(weight.numel() for weight in lora.values())
    say(f"training {weights:,} LoRA weights at strength {strength(config)}, {total_steps} updates")
    if config.use_dora:
        say("a DoRA's seal is for PEFT alone: no pytorch_lora_weights.safetensors will be written")
    dtype_name = str(dtype).removeprefix("torch.")
    say(f"of {config.model_id} in {dtype_name} on {hardware}")

    # --- The state of the loop: what the checkpoint holds, and nothing else ---------------------
    optimizer = AdamW(lora.values(), lr=config.learning_rate, fused=True)
    schedule = config.lr_scheduler
    if schedule == "constant" and config.lr_warmup_steps:
        schedule = "constant_with_warmup"  # diffusers' "constant" would pass over it
    lr_scheduler = get_scheduler(schedule, optimizer, None, config.lr_warmup_steps, total_steps)
    # Without it, float16 gradients underflow; elsewhere it passes everything through.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    rows = []  # of loss.csv, one an update
    if saved:
        rows = saved["rows"]
        states = saved["optimizer"]["state"]
        if saved["lora"].keys() != lora.keys() or (rows and len(states) != len(lora)):
            where = output_dir / CHECKPOINT
            raise Trouble(f"{where} is damaged (weights are missing); delete it to start afresh")
        with torch.no_grad():
            for name, weight in lora.items():
                weight.copy_(saved["lora"][name])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        for _ in rows:  # the schedule is a function of the step alone
            lr_scheduler.step()

    # --- The loop -------------------------------------------------------------------------------
    steps = range(len(rows), total_steps)
    num_timesteps = noise_scheduler.config.num_train_timesteps
    sample_from = (moments, caption_embeds, num_timesteps, config)
    draw_step = partial(draw_update, plan, piece_size, sample_from)
    train_dataloader = DataLoader(steps, None, collate_fn=draw_step, pin_memory=on_gpu)
    # The same noise for every preview, for the base model's and the seal's.
    generator = torch.Generator()
    noises = [
        torch.randn(1, *moments.shape[-3:], generator=generator.manual_seed(seed))
        for seed in range(config.preview_images)
    ]
    preview_embeds = torch.stack([prompt_embeds[preview_prompt], prompt_embeds[""]])
    shared = {"noise_scheduler": noise_scheduler, "embeds": preview_embeds, "noises": noises}
    look_with = partial(sample_latents, **shared, autocast=autocast)
    unfinished = (output_dir / CHECKPOINT).parent
    output_dir.mkdir(parents=True, exist_ok=True)
    Lock.take(output_dir)
    if not saved:
        remove_unfinished(unfinished)
    write_result(config.output_dir, False, *summarize(rows, plan))
    bar = tqdm(total=total_steps, initial=steps.start, desc="training", unit="update", disable=None)
    pending = []  # of each update since the last look: summed loss, rate, gradient norm
    looked, failure = time.monotonic(), None
    # PEFT would widen every LoRA input to float32 and keep it; autocast narrows it again anyway.
    in_loop = ExitStack()
    in_loop.enter_context(disable_input_dtype_casting(unet, dtype is not torch.float32))
    Stop.deferred = True
    unet.train()
    for step, batches in zip(steps, train_dataloader, strict=True):
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        try:
            for i, batch in enumerate(batches):
                batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
                # LoRA's dropout, the one random choice inside the step, is keyed like the others.
                torch.manual_seed(stream_seed(config.seed, DROPOUT, step * 2**32 + i))
                with autocast:
                    losses = compute_loss(unet, noise_scheduler, batch, config.snr_gamma)
                scaler.scale((losses * batch["weight"]).sum()).backward()
                loss_sum += losses.detach().sum()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(lora.values(), config.max_grad_norm)
        except Exception as error:  # noqa: BLE001 - raised again below, once the work is safe
            failure = error
        else:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            rate = torch.full_like(loss_sum, lr_scheduler.get_last_lr()[0])
            pending.append(torch.stack([loss_sum, rate, norm.to(loss_sum.dtype)]))
            lr_scheduler.step()

        # Look: the CPU waits for the GPU here, at an epoch's end, every few seconds and at a
        # checkpoint, not at every update.
        done = len(rows) + len(pending)
        at_epoch_end, epoch = done % len(plan) == 0, done // len(plan)
        is_last = failure or Stop.signum or step + 1 == total_steps
        every = config.preview_every_epochs if config.preview_images else 0
        draws = every and at_epoch_end and epoch % every == 0 and not (failure or Stop.signum)
        keeps = is_last or draws or done % config.checkpointing_steps == 0
        if pending and (keeps or at_epoch_end or time.monotonic() > looked + 5):
            seconds, looked = time.monotonic() - looked, time.monotonic()
            sizes = [len(plan[i % len(plan)]) for i in range(len(rows), done)]
            speed = round(sum(sizes) / max(seconds, 1e-9), 3)
            memory = round(peak_memory(device))
            for size, (loss, *rest) in zip(sizes, torch.stack(pending).tolist(), strict=True):
                if not math.isfinite(loss):
                    # At the first update the seal does nothing yet.
                    own = "the base model's weights are damaged, or overflow in this precision"
                    why = "try a lower --learning-rate" if rows else own
                    raise Trouble(f"loss not finite at update {len(rows) + 1}; {why}")
                at = [len(rows) + 1, len(rows) // len(plan) + 1]
                rows.append([*at, loss / size, *rest, speed, memory])
            bar.update(len(pending))
            pending.clear()
            if at_epoch_end:
                told = f"loss {summarize(rows, plan)[1]:.4f}"
                bar.set_postfix_str(told)
                with bar.external_write_mode(sys.stderr):
                    say(f"epoch {epoch}/{config.num_train_epochs}: {told}")

        if keeps:
            state = {
                "identity": identity,
                "rows": rows,
                "lora": {name: weight.detach() for name, weight in lora.items()},
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
            }
            torch.save(state, packed := BytesIO())
            write_whole(output_dir / CHECKPOINT, packed.getvalue())
            table = pandas.DataFrame(rows, columns=COLUMNS).to_csv(index=False)
            write_whole(unfinished / "loss.csv", table.encode())
            write_result(config.output_dir, False, *summarize(rows, plan))
        if failure:
            raise failure
        if Stop.signum:
            sys.exit(128 + Stop.signum)
        if draws:
            Stop.deferred = False  # a signal need not wait for pictures
            file = unfinished / "previews" / f"epoch-{epoch:04}.png"
            # The UNet has the GPU: the CPU decodes.
            decoder = partial(load_vae, base, torch.device("cpu"), torch.float32)
            write_previews(file, preview_prompt, partial(look_with, unet), decoder)
            Stop.deferred, looked = True, time.monotonic()
    bar.close()
    in_loop.close()
    Stop.deferred = False

    # --- The seal, judged in a folder of its own first ------------------------------------------
    # A run that fails leaves an earlier seal untouched.
    staging = unfinished / "seal"
    staging.mkdir(parents=True, exist_ok=True)
    name = save_seal(staging, unet, config, noise_scheduler.config.prediction_type)
    with autocast:
        unet = check_seal(unet, staging, caption_embeds[0])
    for path in sorted(staging.iterdir()):
        os.replace(path, output_dir / path.name)

    # --- What there is to look at: what an earlier run left must not be taken for this one's ----
    for older in LOOKS + ["pytorch_lora_weights.safetensors"] * config.use_dora:
        (output_dir / older).unlink(missing_ok=True)
    for path in output_dir.glob(PREVIEWS):
        path.unlink()
    for path in unfinished.glob(PREVIEWS):
        write_whole(output_dir / "previews" / path.name, path.read_bytes())
    with suppress(OSError):  # only where no pictures were asked for in between
        (output_dir / "previews").rmdir()
    seconds = sum(len(plan[i % len(plan)]) / row[5] for i, row in enumerate(rows))
    pictures = {}
    if config.preview_images:
        # Two forward passes a step, each about half of what training spends on a picture.
        seen = sum(len(plan[i % len(plan)]) for i in range(len(rows)))
        minutes = 2 * PREVIEW_STEPS * config.preview_images * seconds / seen / 60
        if minutes > 1:
            say(f"drawing previews; this takes about {math.ceil(minutes)} minutes")

        def decoder():
            unet.to("cpu")  # to make room
            return load_vae(base, device, dtype)

        file = output_dir / "preview.png"
        write_previews(file, preview_prompt, partial(look_with, unet), decoder)
        if file.exists():
            pictures["Without and with the seal"] = "preview.png"
    table = pandas.DataFrame(rows, columns=COLUMNS).to_csv(index=False)
    write_whole(output_dir / "loss.csv", table.encode())
    write_png(output_dir / "loss.png", draw_loss(rows))
    pictures["Loss"] = "loss.png"
    epochs, loss = summarize(rows, plan)
    libraries = (torch, diffusers, transformers, peft, datasets)
    facts = {
        "strength": strength(config),
        "loss": "none" if loss is None else f"{loss:.4f} in the last epoch",
        "pictures": len(dataset),
        "updates": f"{len(rows)} in {epochs} epochs",
        "time": f"{seconds / 60:.1f} minutes of training",
        "peak memory": f"{peak_memory(device):.0f} MiB",
        "hardware": hardware,
        "precision": dtype_name,
        "versions": ", ".join(f"{lib.__name__} {lib.__version__}" for lib in libraries),
    }
    write_whole(
        output_dir / "README.md", write_card(config, name, on_gpu, facts, pictures).encode()
    )

    # --- The result -----------------------------------------------------------------------------
    write_result(config.output_dir, True, epochs, loss)
    remove_unfinished(unfinished)
    say(f"seal written to {config.output_dir}; its README.md tells how to load it", sys.stdout)
    say(f"such as by pipe.load_lora_weights({config.output_dir!r})", sys.stdout)


if __name__ == "__main__":
    sys.exit(main(config))
