"""Train a LoRA "seal" that carries the style of a folder of pictures, on Stable Diffusion.

    python quest_7_2.py --dataset-dir my_paintings --output-dir my_seal

Two halves: tools, each of which can be read and tested by itself, and at the end `main`, the run
from the pictures to the seal told in one piece. README.md tells what the options are for.
"""

import signal
import sys

# Until there is more to say of an interruption, a few lines below. (nohup and & ignore some.)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import Field, asdict, dataclass, field, fields
from functools import partial
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

# ==== The command: arguments, JSON and folders, answered in a fraction of a second ===========


class Trouble(Exception):
    """What stops a run, as one message for the user."""

    exit_code = 1


class Refused(Trouble):
    """Trouble with what was given: arguments, folders, pictures."""

    exit_code = 2


def say(message, stream=None) -> None:
    """A line on stderr, or on another stream. It never fails, and sends a terminal no control
    characters, which a stranger's file may hold in a name."""
    stream = stream or sys.stderr
    line = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(message))
    try:
        with suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="backslashreplace")
        print(line, file=stream, flush=True)
    except (OSError, ValueError):  # closed, or full: what is left in its buffer must not matter
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def told_of(error: BaseException, where: str = "here") -> str:
    """What stopped a run, for the user: one line, or a short list."""
    if isinstance(error, Trouble):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or where}: {reason_of(error)}"
    # CUDA has a class for it; on the CPU only the message tells.
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if known or "can't allocate memory" in str(error):
        flags = "--gradient-checkpointing, --fp8-base, --micro-batch-size 1"
        return f"out of memory; what lowers it: {flags}, a smaller --resolution or --rank"
    return f"failed with {type(error).__name__}: {reason_of(error)}"


def reason_of(error: BaseException) -> str:
    """In one line and without the path, which the message around it names."""
    told = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return told.splitlines()[0]


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


# Limits: a value's type, how "must be …" goes on, and the test of it on a value of that type.
SWITCH = (bool, "", lambda value: True)
TEXT = (str, "text", lambda text: text == text.encode("utf-8", "ignore").decode())
PATH = (str, "a path", lambda text: text.strip() and "\0" not in text and TEXT[2](text))
NATURAL = (int, "at least 0", lambda n: 0 <= n < 2**63)
POSITIVE = (int, "at least 1 and below 2^31", lambda n: 1 <= n < 2**31)
ABOVE_0 = (float, "finite and above 0", lambda x: 0 < x < math.inf)
FROM_0 = (float, "finite and at least 0", lambda x: 0 <= x < math.inf)
SHARE = (float, "at least 0 and below 1", lambda p: 0 <= p < 1)
# Pillow would fill all memory, and be killed for it, long before a larger picture is made.
TIMES_8 = (int, "a positive multiple of 8, at most 16384", lambda n: 0 < n <= 2**14 and n % 8 == 0)


def one_of(names: str) -> tuple:
    return str, f"one of {names}", names.split(", ").__contains__


PRECISION = one_of("fp16, bf16, no")
# diffusers has piecewise_constant too, which needs rules that no flag gives.
SCHEDULES = "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial"
# PEFT's others change the base model's weights, of which no program that loads the seal knows.
INIT = one_of("gaussian, orthogonal")
KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def option(default, limit: tuple, help: str) -> Field:
    return field(default=default, metadata={"limit": limit, "help": help})


@dataclass(frozen=True)
class Config:
    """Every option: name, type, default, limit, meaning. Flags, JSON keys and --help follow."""

    dataset_dir: str = option("../Quest_1/generated_palette", PATH, "folder of pictures to learn")
    output_dir: str = option("artist_seal", PATH, "folder for the seal")
    model_id: str = option("CompVis/stable-diffusion-v1-4", PATH, "hub id, folder or .safetensors")
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
    use_dora: bool = option(False, SWITCH, "DoRA; a seal for PEFT alone")
    use_rslora: bool = option(False, SWITCH, "strength alpha / sqrt(rank)")
    init_lora_weights: str | None = option(None, INIT, "first LoRA weights (default: PEFT's)")
    micro_batch_size: int | None = option(None, POSITIVE, "samples at once (default: a batch)")
    seed: int = option(0, NATURAL, "same command, same machine, same bytes")
    mixed_precision: str | None = option(None, PRECISION, "default: fp16 on CUDA, no elsewhere")
    gradient_checkpointing: bool = option(False, SWITCH, "less memory, slower")
    fp8_base: bool = option(False, SWITCH, "frozen weights in 8 bits: half the memory for them")
    lr_scheduler: str = option("constant", one_of(SCHEDULES), "course of the learning rate")
    lr_warmup_steps: int = option(0, NATURAL, "updates in which the learning rate rises from 0")
    max_grad_norm: float = option(1.0, ABOVE_0, "gradients are clipped to this norm")
    snr_gamma: float | None = option(None, ABOVE_0, "min-SNR loss weights; 5 is usual")
    noise_offset: float = option(0.0, FROM_0, "noise per channel: darker and lighter pictures")
    resize_mode: str = option("squash", one_of("squash, crop"), "of pictures that are not square")
    max_train_steps: int | None = option(None, POSITIVE, "stop after this many updates")
    checkpointing_steps: int = option(500, POSITIVE, "updates from one checkpoint to the next")
    resume: bool = option(False, SWITCH, "go on from the checkpoint in the output folder")
    preview_images: int = option(4, NATURAL, "before/after pictures made at the end; 0 = none")
    preview_prompt: str | None = option(None, TEXT, "what they show (default: the train prompt)")
    preview_every_epochs: int = option(0, NATURAL, "pictures in between, too; 0 = none")
    variant: str | None = option(None, PATH, "weight variant of the model, such as fp16")

    def __post_init__(self):
        for option in fields(self):
            value, (kind, limit, is_valid) = getattr(self, option.name), option.metadata["limit"]
            # A flag's text, or a whole number for a float; `true` is no number, though Python says
            # so. A text that is no number stays one, to be refused.
            if kind in (int, float) and type(value) in (int, str):
                with suppress(ValueError, OverflowError):
                    object.__setattr__(self, option.name, value := kind(value))
            is_absent = value is None and option.default is None
            if not is_absent and (type(value) is not kind or not is_valid(value)):
                name = f"{flag_of(option.name)} ({key_of(option.name)})"
                needed = limit if type(value) is kind else KINDS[kind]
                found = json.dumps(value, ensure_ascii=False)
                raise Refused(f"{name} must be {needed}, not {found:.60}")
        if self.init_lora_weights == "orthogonal" and self.rank % 2:
            raise Refused("--init-lora-weights orthogonal needs an even --rank")
        if self.use_dora and self.fp8_base:
            raise Refused("--use-dora needs the weights at hand that --fp8-base narrows")


# What --resume may change: where things lie (what lies there is compared), how long the run goes
# on, and what leaves the arithmetic alone.
FREE_TO_CHANGE = {"dataset_dir", "output_dir", "model_id", "num_train_epochs", "max_train_steps"}
FREE_TO_CHANGE |= {"resume", "checkpointing_steps", "gradient_checkpointing", "preview_images"}
FREE_TO_CHANGE |= {"preview_prompt", "preview_every_epochs"}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def key_of(name: str) -> str:
    return re.sub("_(.)", lambda match: match[1].upper(), name)


def read_json(source: str) -> dict:
    """A JSON object's options, or its file's, by their names in Config, which judges their values;
    null means not given. Raises Refused."""
    is_text = source.lstrip().startswith("{")
    where = "--config" if is_text else f"--config {source}"
    try:
        values = json.loads(source if is_text else read_ordinary(Path(source)))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{where}: {reason_of(error)}") from None
    names = {key_of(option.name): option.name for option in fields(Config)}
    if not isinstance(values, dict):
        raise Refused(f"{where} must hold one JSON object")
    if unknown := [key for key in values if key not in names]:
        raise Refused(f"{where}: unknown key {json.dumps(unknown[0])[:60]}")
    return {names[key]: value for key, value in values.items() if value is not None}


def read_config(argv: list[str]) -> Config:
    """Defaults < the JSON < flags. Raises Refused for what is not valid."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("quest_7_2.py", description=about, allow_abbrev=False)
    parser.add_argument("--config", metavar="X", help="JSON of options in camelCase, or its file")
    for option in fields(Config):
        kind, limit, _ = option.metadata["limit"]
        help = "; ".join(filter(None, [option.metadata["help"], limit]))
        help += "" if option.default is None else f" (default: {option.default})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"metavar": "X"}
        parser.add_argument(flag_of(option.name), help=help, default=argparse.SUPPRESS, **how)

    def refuse(message: str):
        raise Refused(f"{message}; --help lists the options")

    parser.error = refuse
    given = vars(parser.parse_args(argv))
    source = given.pop("config")
    return Config(**(read_json(source) if source is not None else {}) | given)


# What Pillow reads well of imagefolder's own list; what it does not; what may hold captions.
SUFFIXES = ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .tga .ppm"
OTHER_SUFFIXES = ".heic .heif .avif .jxl .jp2 .svg .eps .psd .raw .dng"
CAPTION_SUFFIXES = ".txt .jsonl .csv .parquet"


def list_files(folder: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Pictures and caption files in a folder and its subfolders, by name, and what looks as if it
    were meant and is not read, each with the reason. What is hidden is passed over."""
    files, left_out = [], {}
    walk = os.walk(folder, onerror=lambda error: left_out.update({error.filename: error.strerror}))
    for root, folders, names in walk:
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = filter(os.path.islink, (os.path.join(root, name) for name in folders))
        left_out |= dict.fromkeys(links, "a linked folder")
        files += [Path(root, name) for name in names if not name.startswith(".")]
    pictures, caption_files, others = (
        sorted(path for path in files if path.suffix.lower() in suffixes.split())
        for suffixes in (SUFFIXES, CAPTION_SUFFIXES, OTHER_SUFFIXES)
    )
    left_out |= dict.fromkeys(others, "a kind that is not read")
    told = [f"{os.path.relpath(path, folder)} ({why})" for path, why in left_out.items()]
    return pictures, caption_files, told


def read_ordinary(path: Path) -> bytes:
    """A file's bytes. Raises OSError also for a pipe or a device, which might never end."""
    if path.exists() and not path.is_file():
        raise OSError(0, "is not an ordinary file", str(path))
    return path.read_bytes()


def read_object(path: Path) -> dict:
    """The object in a JSON file; an empty one if it is no such file."""
    with suppress(OSError, ValueError, RecursionError, TypeError):
        return dict(**json.loads(read_ordinary(path)))
    return {}


# What a run leaves in the output folder besides result.json. It first makes all of it in
# checkpoint/, beside the checkpoint, and replaces nothing else.
OUTPUTS = ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
OUTPUTS += ["README.md", "preview.png", "previews/epoch-*.png", "loss.png", "loss.csv"]
CHECKPOINT = "checkpoint/checkpoint.pt"


def check_folders(config: Config) -> None:
    """Raises Refused for a dataset that is not there, and for an output folder that cannot be
    written, lies in the dataset or the model (or the other way round), or holds what no run of ours
    left under the names that this one will write."""
    dataset_dir, output_dir = Path(config.dataset_dir), Path(config.output_dir).absolute()
    if not dataset_dir.is_dir():
        what = "is a file, not a folder" if dataset_dir.exists() else "does not exist"
        raise Refused(f"dataset folder {dataset_dir} {what}; name one with --dataset-dir")
    os.scandir(dataset_dir).close()  # raises OSError for one that cannot be read
    if not list_files(dataset_dir)[0]:
        raise Refused(f"dataset folder {dataset_dir} has no pictures ({SUFFIXES})")
    ours = Path(os.path.realpath(output_dir))
    for what, path in [("dataset", dataset_dir), ("model", Path(config.model_id))]:
        theirs = Path(os.path.realpath(path))
        if path.exists() and (ours.is_relative_to(theirs) or theirs.is_relative_to(ours)):
            raise Refused(
                f"output folder {output_dir} and {what} {path} must not lie in each other"
            )

    is_interrupted = (output_dir / CHECKPOINT).is_file()
    is_known, strange = is_interrupted or has_result(output_dir), []
    for name in dict.fromkeys(
        Path(name).parts[0] for name in [*OUTPUTS, CHECKPOINT, "result.json"]
    ):
        path = output_dir / name
        is_right = path.is_dir() if name in ("previews", "checkpoint") else path.is_file()
        if os.path.lexists(path) and not (is_known and is_right and not path.is_symlink()):
            strange.append(name)
    if strange:
        raise Refused(f"output folder {output_dir} holds what no run left: {', '.join(strange)}")
    if is_interrupted and not config.resume:
        ways = f"go on from it with --resume, or delete {output_dir / 'checkpoint'}"
        raise Refused(f"output folder {output_dir} holds an interrupted run's work: {ways}")
    existing = next(path for path in [output_dir, *output_dir.parents] if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=existing).close()  # asking for permissions is not enough
    except OSError as error:
        raise Refused(f"output folder {output_dir} cannot be written: {error.strerror}") from None


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


def has_result(output_dir: Path) -> bool:
    """Whether a run of ours left its `result.json`: nothing else of that name has just its form."""
    found = read_object(output_dir / "result.json")
    is_ours = found.keys() - {"finalLoss"} == {"success", "outputDir", "epochsCompleted"}
    return is_ours and isinstance(found["success"], bool)


LOCKS = []  # file descriptors; the system frees what they lock however we end


def lock(folder: Path) -> None:
    """Lock the output folder, once it is there, for this process. Raises Refused if another run has
    it. (Windows has no such lock.)"""
    if fcntl and folder.is_dir() and not LOCKS:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise Refused(f"output folder {folder} is in use by another run") from None
        LOCKS.append(descriptor)


def begin(argv: list[str]) -> Config:
    """Judge the command and take the output folder, or say what is wrong and exit with 2.

    A command line that cannot be understood touches nothing; one that can turns an older
    `result.json` to false before anything else is judged: however this run ends, it stays honest.
    """
    try:
        config = read_config(argv)
        tempfile.gettempdir()  # torch's import wants it too
        lock(Path(config.output_dir))
        if has_result(Path(config.output_dir)):
            write_result(config.output_dir, success=False)
        check_folders(config)
        return config
    except (Trouble, OSError) as error:
        say(told_of(error))
        sys.exit(2)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows lacks one
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, Stop.on_signal)
    # A typing mistake is answered here; the imports below take eight seconds.
    config = begin(sys.argv[1:])

# Or a matrix product's last bits depend on where in memory a weight lies.
os.environ.setdefault("MKL_CBWR", "AUTO")

import datasets
import diffusers
import numpy as np
import pandas
import peft
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import ModelCardData, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch.optim import AdamW
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.utils import make_grid
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

# ==== The pictures ===========================================================================

# Pillow's own decoders of these: of others, some start a program, as Ghostscript for PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "TGA", "PPM")
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses what has more than twice as many
THREADS = min(8, os.cpu_count() or 1)
ONE_AT_A_TIME = threading.Lock()  # held for large pictures, which take up to 15 bytes a pixel


def open_rgb(data: bytes) -> Image.Image:
    """A picture as RGB: upright by its EXIF orientation, transparency over white, 16 bits as 8.

    Raises ValueError for one that is not read, and whatever Pillow raises for one it cannot decode.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("is not the picture that its name says") from None
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("has 32 bits a channel, of unknown range; save it with 8 or 16")
    with ONE_AT_A_TIME if math.prod(image.size) > 2**24 else nullcontext():
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
    crop = [transforms.Resize(resolution), transforms.CenterCrop(resolution)]
    squash = [transforms.Resize((resolution, resolution))]
    to_range = [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    transform = transforms.Compose((crop if resize_mode == "crop" else squash) + to_range)

    def load(image: dict, digest: str) -> torch.Tensor:
        data = read_ordinary(Path(image["path"]))
        if hashlib.sha256(data).hexdigest() != digest:
            raise Trouble(f"picture {image['path']} changed after it was checked; start again")
        pixels = transform(open_rgb(data))
        return torch.stack([pixels, pixels.flip(-1)])

    with ThreadPoolExecutor(THREADS) as pool:
        return {"pixel_values": list(pool.map(load, examples["image"], examples["sha256"]))}


def read_csv(data: BytesIO) -> dict[str, list[str]]:
    """The columns of a CSV file by their names. Raises ValueError for a row unlike the header:
    where a comma is not quoted, pandas would take a caption for a name."""
    rows = [row for row in csv.reader(TextIOWrapper(data, "utf-8", newline="")) if row] or [[]]
    header = rows.pop(0)
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            fields = f"{len(row)} fields, the header {len(header)}"
            raise ValueError(f"row {number} has {fields}; quote texts that hold commas")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


CAPTION_READERS = {
    ".jsonl": partial(pandas.read_json, lines=True, dtype=False),
    ".csv": read_csv,
    ".parquet": pandas.read_parquet,
}


def read_captions(files: list[Path], pictures: list[Path], train_prompt: str) -> list[str]:
    """The caption of each picture: from imagefolder's metadata file (columns file_name and text),
    else from a .txt file beside it, else the train prompt.

    Raises Refused for files that cannot be read or name pictures that are not there.
    """
    captions, texts, missing = dict.fromkeys(map(str, pictures)), {}, []
    stems = {path.with_suffix("") for path in pictures}
    try:
        for file in files:
            kind, stem = file.suffix.lower(), file.with_suffix("")
            if kind == ".txt" and stem in stems:
                texts[stem] = read_ordinary(file).decode("utf-8-sig")
            elif kind != ".txt" and stem.name.lower() == "metadata":
                data = read_ordinary(file).removeprefix(b"\xef\xbb\xbf")
                table = CAPTION_READERS[kind](BytesIO(data))
                for name, text in zip(table["file_name"], table["text"], strict=True):
                    path = os.path.normpath(file.parent / str(name))
                    missing += [f"{name!r} in {file.name}"] if path not in captions else []
                    if not isinstance(text, str) and (np.ndim(text) or not pandas.isna(text)):
                        raise ValueError(f"the caption of {name!r} is no text")
                    captions[path] = text if isinstance(text, str) else None
    except (OSError, ValueError, KeyError, csv.Error) as error:
        columns = "; it needs the columns file_name and text" if isinstance(error, KeyError) else ""
        raise Refused(f"captions {file}: {reason_of(error)}{columns}") from None
    if missing:
        raise Refused("captions for pictures that are not there: " + ", ".join(missing))
    told = [captions[str(path)] or texts.get(path.with_suffix("")) or "" for path in pictures]
    return [text.strip() or train_prompt for text in told]


def examine(path: Path) -> tuple[str, tuple[int, int], str]:
    """A picture's SHA-256, its size and, if it cannot be used, what is wrong with it."""
    try:
        if "::" in str(path):
            raise ValueError('imagefolder cannot open a path with "::" in it')
        str(path).encode()  # nor one that is no UTF-8
        data = read_ordinary(path)
        return hashlib.sha256(data).hexdigest(), open_rgb(data).size, ""
    except Exception as error:  # noqa: BLE001 - decoders raise anything on bad bytes
        return "", (0, 0), f"\n  {str(path)!r}: {reason_of(error)}"


def load_pictures(config: Config) -> tuple[datasets.Dataset, list[str], dict[str, str]]:
    """The folder as a `datasets` imagefolder whose rows are `apply_transforms`' pixel values; the
    caption of each picture; and by its name in the folder its SHA-256 and caption.

    Raises Refused with a list of all pictures that cannot be used.
    """
    # Normalised, as the captions' paths are: the default folder begins with "..".
    folder = Path(os.path.abspath(config.dataset_dir))
    paths, caption_files, left_out = list_files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        examined = tqdm(pool.map(examine, paths), "checking pictures", len(paths), disable=None)
        digests, sizes, problems = zip(*examined, strict=True)
    if problems := [problem for problem in problems if problem]:
        told = f"{len(problems)} of {len(paths)} pictures cannot be used, mend or remove them:"
        raise Refused(told + "".join(problems))

    captions = read_captions(caption_files, paths, config.train_prompt)
    own = sum(caption != config.train_prompt for caption in captions)
    extents = [f"{width}×{height}" for width, height in sorted(sizes, key=math.prod)]
    extent = " to ".join(dict.fromkeys([extents[0], extents[-1]]))
    count = "1 picture" if len(paths) == 1 else f"{len(paths)} pictures"
    say(f"{count}, {extent} pixels, {own} with captions of their own")
    if left_out:
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
    names = [str(path.relative_to(folder)) for path in paths]
    both = [f"{digest} {caption}" for digest, caption in zip(digests, captions, strict=True)]
    return dataset, captions, dict(zip(names, both, strict=True))


# ==== The model's parts, one at a time: text encoder, VAE, UNet ==============================


class Base(NamedTuple):
    """Where the base model's parts lie: a folder in diffusers' layout or, with a file in the
    original layout, that file for the weights and a folder for configurations and tokenizer."""

    folder: Path
    variant: str | None = None
    file: Path | None = None

    def path(self, part: str) -> Path:
        """Of the file that a part's folder must hold."""
        suffix = f".{self.variant}" if self.variant else ""
        path = self.folder / part / PART_FILES[part].format(suffix)
        is_new = part == "tokenizer" and not path.exists()  # as transformers 5 saves it
        return path.with_name("tokenizer.json") if is_new else path


PART_FILES = {
    "tokenizer": "vocab.json",
    "text_encoder": "model{}.safetensors",
    "vae": "diffusion_pytorch_model{}.safetensors",
    "unet": "diffusion_pytorch_model{}.safetensors",
    "scheduler": "scheduler_config.json",
}
# Of a file in the original layout: how its keys begin for each part.
PREFIXES = {"text_encoder": "cond_stage_model.", "vae": "first_stage_model."}
PREFIXES["unet"] = "model.diffusion_model."
TRAINED = "text-to-image Stable Diffusion 1.x and 2.x, no SDXL, SD3, Flux or inpainting model"


def check_family(model_id: str, folder: Path) -> None:
    """Raises Trouble for a model that is not Stable Diffusion 1.x or 2.x, text to image."""
    text, vae, unet = (read_object(folder / part / "config.json") for part in PREFIXES)
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json")
    index = read_object(folder / "model_index.json")
    fits = not index.keys() & {"transformer", "text_encoder_2", "prior", "controlnet"}
    if unet and text:
        fits &= unet.get("in_channels", 4) == 4 and not unet.get("addition_embed_type")
        fits &= unet.get("cross_attention_dim") == text.get("hidden_size")
    if not fits:
        what = index.get("_class_name", "something else")
        raise Trouble(f"model {model_id} is {what}; this script trains {TRAINED}")
    kinds = ("epsilon", "v_prediction", "sample")
    scale, timesteps = vae.get("scaling_factor", 1), scheduler.get("num_train_timesteps", 1000)
    for needed, is_met in {
        "a VAE of 4 latent channels": vae.get("latent_channels", 4) == 4,
        "a VAE with a scaling_factor above 0": 0 < (scale or 0) < math.inf,
        "a scheduler of noise, not of flow": "Flow" not in scheduler.get("_class_name", ""),
        f"a prediction_type of {kinds}": scheduler.get("prediction_type", "epsilon") in kinds,
        "a scheduler of 1 timestep or more": isinstance(timesteps, int) and timesteps > 0,
    }.items():
        if not is_met:
            raise Trouble(f"model {model_id} lacks {needed}: it cannot be trained like this")


def download(hub_id: str, patterns: list[str], what: str, otherwise: str) -> Path:
    """A hub repository's files, or from the hub's cache: the one place that may use the network.
    Raises Trouble that says `what` is missing and what to do `otherwise`."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - the hub, the network and the disk may fail
        could_not = f"could not be had from the hub ({type(error).__name__})"
        raise Trouble(f"{what} {could_not}: {otherwise}") from None


def find_file(file: Path) -> Base:
    """A file in the original layout, judged by its header, with the configurations that go with it,
    from the hub once. Raises Trouble for what is not trained."""
    if file.suffix != ".safetensors":
        raise Trouble(f"model {file} is no .safetensors file: pickled ones can run code")
    try:
        with safe_open(file, "pt") as header:
            shapes = {key: header.get_slice(key).get_shape() for key in header.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Trouble(f"model {file} cannot be read: {reason_of(error)}") from None
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    kind = single_file_utils.infer_diffusers_model_type(empty)
    if kind not in ("v1", "v2"):
        raise Trouble(f"model {file} is {kind}; this script trains {TRAINED}")
    for part, prefix in PREFIXES.items():
        if not any(key.startswith(prefix) for key in shapes):
            raise Trouble(f"model {file} lacks the {part} ({prefix}…): it is no whole checkpoint")
    (hub_id,) = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind].values()
    needs = f"model {file} needs the tokenizer and configurations of {hub_id}, which"
    once = f"run this once with network: hf download {hub_id} --include '*.json' '*/merges.txt'"
    return Base(download(hub_id, ["*.json", "*/merges.txt"], needs, once), file=file)


def find_model(model_id: str, variant: str | None) -> Base:
    """The parts of a hub id, downloaded first, of a local folder or of one file. Raises Trouble for
    what is not there, not complete or not trained here."""
    base = Base(Path(model_id), variant)
    if base.folder.is_file():
        if variant:
            raise Refused("--variant is for hub ids and folders; a file has but one")
        base = find_file(base.folder)
    elif not base.folder.is_dir():
        weights = [f"{part}/{base.path(part).name}" for part in PREFIXES]
        wanted = ["*.json", "*/merges.txt", *weights]
        what = f"model {model_id} is no folder here and"
        otherwise = "check the name and the network, set HF_TOKEN if it wants a login, or give "
        otherwise += "--model-id a folder in diffusers layout"
        # The small files first: what is no Stable Diffusion 1 or 2 is not worth a download.
        check_family(model_id, download(model_id, ["*.json"], what, otherwise))
        base = base._replace(folder=download(model_id, wanted, what, otherwise))
    check_family(model_id, base.folder)
    for part in PART_FILES:
        path = base.path(part)
        if not path.exists() and not (base.file and part in PREFIXES):
            pickled = [*path.parent.glob("*.bin"), *path.parent.glob("*.ckpt")]
            why = " (pickled weights are never read: they can run code)" if pickled else ""
            where = "from its page on the hub or by saving it with save_pretrained"
            missing = f"{part}/{path.name}{why}"
            raise Trouble(f"model {model_id} lacks {missing}; get it with safetensors, {where}")
    return base


def fingerprint(base: Base) -> str:
    """Tells base models apart at no cost: of each file its name and size, and of its bytes sixteen
    samples of 4 KiB (a configuration, or a small file's header, is whole among them)."""
    files = {part: base.path(part) for part in PART_FILES}
    files |= {f"{part} config": base.folder / part / "config.json" for part in PREFIXES}
    files |= {"file": base.file} if base.file else {}
    digest = hashlib.sha256()
    for name, path in files.items():
        if path.exists():
            size = path.stat().st_size
            digest.update(f"{name} {size}".encode())
            with open(path, "rb") as file:
                for i in range(16):
                    file.seek(i * max(4096, size // 16))
                    digest.update(file.read(4096))
    return digest.hexdigest()


def load_part(cls, base: Base, part: str, dtype: torch.dtype | None = None, **options):
    """One of the model's parts; a network is frozen and in `dtype`. Raises Trouble where the files
    do not make a whole one."""
    try:
        if dtype is None:
            return cls.from_pretrained(base.folder / part)
        if base.file:
            load_clip = partial(single_file_utils.create_diffusers_clip_model_from_ldm, cls)
            load = load_clip if cls is CLIPTextModel else cls.from_single_file
            options = {"subfolder": part, "torch_dtype": dtype, "local_files_only": True}
            weights = load_file(base.file)  # mapped, not read
            weights = {key: weights[key] for key in weights if key.startswith(PREFIXES[part])}
            model = load(weights, config=str(base.folder), **options)
            missing = [name for name, weight in model.named_parameters() if weight.is_meta]
        else:
            options |= {"dtype": dtype, "variant": base.variant}
            options |= {"use_safetensors": True, "output_loading_info": True}
            model, info = cls.from_pretrained(base.folder / part, **options)
            missing = sorted(info["missing_keys"])
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - what libraries raise for damaged files is anything
        raise Trouble(f"the model's {part} cannot be loaded: {reason_of(error)}") from None
    if missing:
        raise Trouble(f"the model's {part} lacks {len(missing)} weights, {missing[0]} among them")
    return model.eval().requires_grad_(False)


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
    vae = load_part(AutoencoderKL, base, "vae", dtype).to(device)
    if device.type == "cpu" and dtype is torch.bfloat16:
        vae.to(memory_format=torch.channels_last)  # a third of the time
    side = dataset[0]["pixel_values"].shape[-1]
    # A GPU wants large batches; a CPU is faster with tensors that stay in its cache.
    batch_size = min(16, max(1, (512 if device.type == "cuda" else 256) ** 2 // side**2))
    moments, read = [], 4 * batch_size  # pictures, by several threads
    bar = tqdm(total=2 * len(dataset), desc="encoding pictures", unit="image", disable=None)
    for start in range(0, len(dataset), read):
        pixel_values = torch.cat(dataset[start : start + read]["pixel_values"])
        for pixels in pixel_values.split(batch_size):
            posterior = vae.encode(pixels.to(device, dtype)).latent_dist
            both = torch.stack([posterior.mean, posterior.std], 1).float()
            moments.append((both * vae.config.scaling_factor).half().cpu())
            bar.update(len(pixels))
    bar.close()
    moments = torch.cat(moments).unflatten(0, (-1, 2))
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
        """The tensor, or how to make it again."""
        shape, stride = tensor.shape, tensor.stride()
        if id(tensor) == input_id:  # only its shape will be asked for
            return partial(torch.empty, shape, dtype=dtype, device=tensor.device)
        if layer.is_fp8 and weight_id in (id(tensor), id(tensor._base)):
            return lambda: widen(layer, dtype).as_strided(shape, stride)
        return tensor

    unpack = lambda kept: kept() if callable(kept) else kept
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
            largest = weight.float().abs().amax([*range(1, weight.ndim)], True).clamp(min=1e-6)
            scale = largest / torch.finfo(torch.float8_e4m3fn).max
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


def plan_epoch(pictures: int, batch_size: int, accumulation: int) -> list[list[tuple[int, float]]]:
    """An epoch as updates, each a flat list of samples: (place in the epoch's order, weight).

    A sample weighs 1 / (batches in the update × size of its batch), so that the weighted sum of
    the samples' losses is the mean of the batches' means, however it is cut into pieces. Nothing
    is dropped: the last batch, and the last update, may be shorter.
    """
    batches = [range(i, min(i + batch_size, pictures)) for i in range(0, pictures, batch_size)]
    updates = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    return [[(i, 1 / (len(u) * len(batch))) for batch in u for i in batch] for u in updates]


def draw_update(
    step: int, plan: list, moments: torch.Tensor, embeds: list, num_timesteps: int, config: Config
) -> list[dict]:
    """All that is random in an update, `step` counting from 0 through all epochs: its samples,
    stacked in pieces to compute at once.

    `moments` are `encode_pictures`'; `embeds` holds each picture's, (77, width), and last
    the empty prompt's. Returns for each piece latents and noise, (n, 4, h, w), prompt_embeds,
    (n, 77, width), and weight, (n,), float32; timesteps, (n,) int64.
    """
    epoch, index = divmod(step, len(plan))
    generator = torch.Generator().manual_seed(stream_seed(config.seed, ORDER, epoch))
    order = torch.randperm(len(moments), generator=generator)
    samples = []
    for place, weight in plan[index]:
        # Keyed by its position in the run: neither batch size nor accumulation changes a draw.
        position, picture = epoch * len(moments) + place, int(order[place])
        generator.manual_seed(stream_seed(config.seed, SAMPLE, position))
        flip = int(torch.randint(2, (), generator=generator))
        mean, std = moments[picture, flip].float()
        sample = {
            "latents": mean + std * torch.randn(mean.shape, generator=generator),
            "noise": torch.randn(mean.shape, generator=generator),
            "timesteps": torch.randint(num_timesteps, (), generator=generator),
            "prompt_embeds": embeds[picture],
            "weight": torch.tensor(weight),
        }
        if config.noise_offset:  # crosslabs.org/blog/diffusion-with-offset-noise
            offset = torch.randn(len(mean), 1, 1, generator=generator)
            sample["noise"] += config.noise_offset * offset
        # For classifier-free guidance (arXiv 2207.12598): what the empty prompt has learned as
        # well, guidance does not multiply.
        if config.caption_dropout and torch.rand((), generator=generator) < config.caption_dropout:
            sample["prompt_embeds"] = embeds[-1]
        samples.append(sample)
    size = config.micro_batch_size or config.train_batch_size
    return [default_collate(samples[i : i + size]) for i in range(0, len(samples), size)]


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
    target = {"epsilon": noise, "sample": latents}.get(prediction_type)
    if prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    loss = F.mse_loss(model_pred.float(), target, reduction="none").mean((1, 2, 3))
    if snr_gamma is None:
        return loss
    # min(SNR, γ) weights the error of x0; SNR or SNR + 1 of it is that of noise or velocity. (Where
    # the SNR is zero, noise weighs 1, as it does just above.)
    snr = compute_snr(noise_scheduler, timesteps)
    part = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    return loss * (snr.clamp(max=snr_gamma) / part).nan_to_num(1)


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


def save_seal(folder: Path, unet: PeftModel, config: Config, prediction_type: str) -> str:
    """Write the adapter for PEFT, and once more for everything else. Returns the seal's name, which
    no other has: clients tell seals apart by it. Nothing in it names a folder of the user's."""
    lora_config = unet.peft_config["default"]
    lora_config.target_modules = sorted(lora_config.target_modules)  # a set comes in any order
    is_local = Path(config.model_id).exists()
    lora_config.base_model_name_or_path = None if is_local else config.model_id
    lora_config.inference_mode = True
    lora_config.save_pretrained(folder)
    # Or PEFT would ask the hub whether the base model has a vocabulary.
    state_dict = get_peft_model_state_dict(unet, save_embedding_layers=False)
    state_dict = {key: weight.cpu() for key, weight in state_dict.items()}
    packed = pack_safetensors(state_dict, {"format": "pt"})
    write_whole(folder / "adapter_model.safetensors", packed)
    words = re.sub(r"[^a-z0-9]+", "_", config.train_prompt.lower()).strip("_")[-40:].strip("_")
    name = f"{words or 'seal'}_{hashlib.sha256(packed).hexdigest()[:6]}"
    if config.use_dora:
        return name  # diffusers leaves its magnitudes out, and the UIs do not agree on their norm

    # Under the key names that every client reads, with an alpha that gives them the strength as
    # alpha / rank. (diffusers writes the rank for it: half the strength of our default.)
    renamed = {key.replace("base_model.model", "unet"): w for key, w in state_dict.items()}
    state_dict = convert_state_dict_to_kohya(renamed)
    alpha = config.lora_alpha * (config.rank**0.5 if config.use_rslora else 1)
    state_dict |= {key: torch.tensor(alpha) for key in state_dict if key.endswith(".alpha")}
    is_v, is_sd2 = prediction_type == "v_prediction", unet.config.cross_attention_dim == 1024
    family = ("v2-768-v" if is_v else "v2-512") if is_sd2 else "v1"
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{family}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.trigger_phrase": config.train_prompt,
        "modelspec.usage_hint": "put the trigger phrase into the prompt; strength 1",
        "modelspec.prediction_type": "v" if is_v else prediction_type,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sd_v2" if is_sd2 else "sd_v1",
        "ss_v2": str(is_sd2),
        "ss_output_name": name,
    }
    write_whole(folder / "pytorch_lora_weights.safetensors", pack_safetensors(state_dict, metadata))
    return name


@torch.no_grad()
def check_seal(unet: PeftModel, folder: Path, prompt_embeds: torch.Tensor) -> PeftModel:
    """Load both files back onto the bare UNet: each must do to its output what the trained adapter
    does. `prompt_embeds` is (77, width). Raises Trouble otherwise. Returns the UNet with the seal
    as PEFT loads it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator).to(unet.device)
    prompt_embeds = prompt_embeds[None].to(unet.device)

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
    unet, found = unet.unload(), {}
    if (folder / "pytorch_lora_weights.safetensors").exists():  # a DoRA has none
        pipeline = diffusers.StableDiffusionPipeline
        pipeline.load_lora_into_unet(*pipeline.lora_state_dict(folder), unet)
        found["pytorch_lora_weights.safetensors"] = output(unet)
        unet.unload_lora()
    unet = PeftModel.from_pretrained(unet, folder)
    found["adapter_model.safetensors"] = output(unet)
    for name, loaded in found.items():
        if not (loaded - base - effect).norm() <= 0.05 * effect.norm():  # NaN neither
            raise Trouble(f"{name}, loaded back, does not do what was trained")
    return unet


# ==== Something to look at: previews, the loss curve, the model card =========================


@torch.no_grad()
def write_previews(
    file: Path, prompt: str, unet: PeftModel, vae_from: tuple, embeds, noises, scheduler, autocast
) -> None:
    """A grid of pictures without and with the adapter. Trouble is a warning, not a failed run.

    `embeds`, (2, 77, width), are the prompt's and the empty one's; each of `noises`, (1, 4, h, w),
    is the same for both rows. `vae_from` is the base, the device and the dtype of the VAE. One
    picture is drawn at a time, which takes less memory than training. Leaves the UNet in eval mode.
    """
    absent = ["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"]
    parts = dict.fromkeys(absent) | {"unet": unet.eval().get_base_model()}
    # 20 steps are enough for DPM-Solver++ (arXiv 2211.01095).
    parts["scheduler"] = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    prompt_embeds, empty = embeds.to(unet.device).unsqueeze(1)
    options = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": empty}
    options |= {"num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "latent"}
    latents = []
    try:
        pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(desc="drawing a preview", leave=False, disable=None)
        for adapter in (unet.disable_adapter(), nullcontext()):
            with adapter, autocast:
                latents += [pipe(latents=x, **options).images.float().cpu() for x in noises]
        base, device, dtype = vae_from
        if device.type == "cuda":
            unet.to("cpu")  # to make room
        vae = load_part(AutoencoderKL, base, "vae", dtype).to(device)
        latents = [(x / vae.config.scaling_factor).to(device, dtype) for x in latents]
        pictures = torch.cat([vae.decode(x).sample.float().cpu() for x in latents])
        draw_grid(pictures, prompt).save(packed := BytesIO(), "PNG")
        write_whole(file, packed.getvalue())
    except Exception as error:  # noqa: BLE001 - no picture is worth a run
        say(f"no {file.name}: {reason_of(error)}")


def draw_grid(pictures: torch.Tensor, prompt: str) -> Image.Image:
    """The base model's pictures above, the seal's below, a seed in each column, and the prompt over
    all. `pictures` are (2 × columns, 3, H, W) in [-1, 1]; small ones are enlarged by a whole factor
    to 160 pixels or more."""
    columns, side, left = len(pictures) // 2, pictures.shape[-1], 112
    pixels = (pictures * 127.5 + 127.5).round().clamp(0, 255).byte()
    cells = F.interpolate(pixels, scale_factor=-(-160 // side), mode="nearest")
    cells = transforms.functional.to_pil_image(make_grid(cells, columns, 4, pad_value=255))
    lines = textwrap.wrap(prompt, (left + cells.width - 16) // 8) or ["(no prompt)"]
    top, across, down = 18 * len(lines) + 26, cells.width / columns, cells.height / 2
    image = Image.new("RGB", (left + cells.width, top + cells.height), "white")
    image.paste(cells, (left, top))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for i, line in enumerate(lines):
        pen.text((8, 14 + 18 * i), line, "black", font, "lm")
    for i, label in enumerate(("base model", "with the seal")):
        pen.text((left - 4, top + (i + 0.5) * down), label, "black", font, "rm")
    for seed in range(columns):
        pen.text((left + (seed + 0.5) * across, top - 8), f"seed {seed}", "black", font, "mm")
    return image


def draw_loss(rows: list[list]) -> Image.Image:
    """The loss of each update (dots) and its running mean (line), from `rows`."""
    steps, losses = [row[0] for row in rows], pandas.Series([row[2] for row in rows])
    smooth = losses.ewm(alpha=max(0.02, 1 / (1 + len(rows) / 20))).mean()
    # The axis holds nearly all dots; a rare high one is drawn at the top edge.
    high = float(f"{max(np.quantile(losses, 0.98), smooth.max()) * 1.15:.2g}") or 1.0
    image, font = Image.new("RGB", (800, 420), "white"), ImageFont.load_default(14)
    pen, (left, top, right, bottom) = ImageDraw.Draw(image), (70, 34, 780, 366)
    xs = np.interp(steps, (steps[0], max(steps[-1], steps[0] + 1)), (left, right))
    for x, y in zip(xs, np.interp(losses, (0, high), (bottom, top)), strict=True):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#9ecae1")
    pen.line([*zip(xs, np.interp(smooth, (0, high), (bottom, top)), strict=True)], "#08519c", 3)
    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    for i in range(6):
        step, loss = steps[round(i * (len(steps) - 1) / 5)], i * high / 5
        pen.text((left - 8, bottom - i * (bottom - top) / 5), f"{loss:.3g}", "black", font, "rm")
        pen.text((xs[step - steps[0]], bottom + 14), f"{step}", "black", font, "mm")
    pen.text((left, 16), "mean squared error: each update, running mean", "black", font, "lm")
    pen.text(((left + right) / 2, 404), "update", "black", font, "mm")
    return image


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

{fence}python
import torch
from diffusers import StableDiffusionPipeline

base = {base!r}
pipe = StableDiffusionPipeline.from_pretrained(base, {options}){to}
{load}
image = pipe({trigger!r}).images[0]
{fence}

{also}

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


def write_card(file: Path, name: str, config: Config, on_gpu: bool, facts: dict[str, str]) -> None:
    """The seal's README.md, by the hub's conventions. No folder of the user's is named in it.

    `facts` tell how it was trained. The pictures that lie beside it are shown.
    """
    trigger, is_local = config.train_prompt, Path(config.model_id).exists()
    base = None if is_local else config.model_id
    titles = {"preview.png": "Without and with the seal", "loss.png": "Loss"}
    pictures = [picture for picture in titles if (file.parent / picture).exists()]
    preview_prompt = trigger if config.preview_prompt is None else config.preview_prompt
    widget = {"text": preview_prompt, "output": {"url": "preview.png"}}
    licenses = [known for of, known in LICENSES.items() if (base or "").startswith(of)]
    tags = "stable-diffusion stable-diffusion-diffusers text-to-image diffusers diffusers-training"
    front_matter = ModelCardData(
        base_model=base,
        license=licenses[0] if licenses else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        inference=True,
        tags=[*tags.split(), "lora"],
        instance_prompt=trigger,
        widget=[widget] if "preview.png" in pictures else None,
    )
    private = {"dataset_dir", "output_dir", "resume"} | ({"model_id"} if is_local else set())
    told = {key_of(n): value for n, value in asdict(config).items() if n not in private}
    settings = json.dumps(told, indent=2, ensure_ascii=False)
    longest = max(map(len, re.findall("`+", trigger + settings)), default=0)
    load = 'pipe.load_lora_weights("path/to/this/folder")'
    with_peft = 'PeftModel.from_pretrained(pipe.unet, "path/to/this/folder")'
    also = f"With PEFT's `PeftModel`, the last line but one is `{with_peft}` instead."
    if config.use_dora:
        load, also = f"from peft import PeftModel\n\n{with_peft}", "No program below loads a DoRA."
    # Said, since a base model's files may mix float16 and float32.
    options = f"torch_dtype=torch.{'float16' if on_gpu else 'float32'}"
    card = CARD.format(
        front_matter=front_matter.to_yaml(),
        name=name,
        trigger=trigger,
        fence="`" * max(3, longest + 1),  # a prompt with backticks must not end a block
        base=base or "path/to/the/base/model",
        options=options + (f", variant={config.variant!r}" if config.variant else ""),
        to='.to("cuda")' if on_gpu else "",
        pictures="".join(f"![{titles[picture]}]({picture})\n\n" for picture in pictures),
        load=load,
        also=also,
        facts="\n".join(f"| {what} | {fact} |" for what, fact in facts.items()),
        settings=settings,
    )
    file.write_text(card, "utf-8")


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
    losses, sizes = [row[2] for row in last], [len(update) for update in plan]
    return epochs, float(np.average(losses, weights=sizes))


def peak_memory(device: torch.device) -> float:
    """In MiB: of the GPU's memory, or of the process's on the CPU (0 where it does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit if resource else 0.0


def read_checkpoint(file: Path, identity: dict[str, str], total_steps: int) -> dict | None:
    """The state that `main` saved; None where there is no such file. Raises Trouble for a damaged
    one, Refused with a list of what differs from the run that wrote it."""
    if not file.exists():
        say(f"no checkpoint in {file.parent.parent}: starting afresh")
        return None
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        old, steps = saved["identity"], len(saved["rows"])
    except Exception as error:  # noqa: BLE001 - torch raises several kinds for a damaged file
        damage = f"{file} is damaged ({reason_of(error)}); delete it to start afresh"
        raise Trouble(damage) from None
    differing = ""
    for name in {**old, **identity}:
        before, now = old.get(name, "none"), identity.get(name, "none")
        if before != now:
            change = f": {before[:60]}, now {now[:60]}" if name.startswith("--") else ""
            differing += f"\n  {name}{change}"
    if differing:
        raise Refused("--resume needs the same options and pictures; these differ:" + differing)
    if steps > total_steps:
        raise Refused(f"the checkpoint is at update {steps}, this run ends at {total_steps}")
    return saved


def publish(unfinished: Path, output_dir: Path) -> None:
    """Let what a run has made take the place of all that an earlier one left. (What it made stays
    until the result is written: --resume can do this again.)"""
    made, older = (
        {path.relative_to(folder) for pattern in OUTPUTS for path in folder.glob(pattern)}
        for folder in (unfinished, output_dir)
    )
    for name in made:  # all of it is on the disk before any of it shows
        write_whole(unfinished / "ready" / name, (unfinished / name).read_bytes())
    for name in made:
        (output_dir / name).parent.mkdir(exist_ok=True)
        os.replace(unfinished / "ready" / name, output_dir / name)
    for name in older - made:  # it must not be taken for this run's
        (output_dir / name).unlink()
    with suppress(OSError):  # not empty, or not there
        (output_dir / "previews").rmdir()


def remove_unfinished(unfinished: Path) -> None:
    """Remove what runs make in `checkpoint/`, and the folder if nothing else is in it."""
    for folder in (unfinished / "ready", unfinished):
        for pattern in [*OUTPUTS, "checkpoint.pt", "**/.*.partial"]:
            for path in folder.glob(pattern):
                path.unlink()
        for inner in (folder / "previews", folder):
            with suppress(OSError):  # not empty, or not there
                inner.rmdir()


# ==== The run ================================================================================


def main(config: Config) -> None:
    """The run, from a folder of pictures to the seal. Raises Trouble, or SystemExit on a signal."""
    output_dir = Path(config.output_dir)
    checkpoint_file = output_dir / CHECKPOINT
    unfinished = checkpoint_file.parent
    lock(output_dir)  # `begin` judged the command so; here for whoever calls main
    check_folders(config)
    for library in (datasets, diffusers.utils, transformers.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # libraries', for those who write programs with them

    # --- Device and precision -------------------------------------------------------------------
    # Same command, same bytes: some of CUDA's kernels must be told. (Without effect on the CPU.)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.use_deterministic_algorithms(on_gpu, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes nothing
    hardware = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    if not on_gpu:
        say("no CUDA GPU found: training on the CPU")
    precision = config.mixed_precision or ("fp16" if on_gpu else "no")
    # Of the frozen weights, and of autocast; what is trained stays float32.
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[precision]
    dtype_name = str(dtype).removeprefix("torch.")
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)

    # --- Pictures, and the plan of an epoch -----------------------------------------------------
    dataset, captions, pictures = load_pictures(config)
    plan = plan_epoch(len(dataset), config.train_batch_size, config.gradient_accumulation_steps)
    total_steps = min(config.num_train_epochs * len(plan), config.max_train_steps or math.inf)

    # --- The base model's files: from the hub the first time (4 GB for Stable Diffusion 1.4) ----
    base = find_model(config.model_id, config.variant)

    # --- What a resumed run must share with the one before it -----------------------------------
    piece_size = config.micro_batch_size or config.train_batch_size
    values = asdict(config) | {"mixed_precision": precision, "micro_batch_size": piece_size}
    compared = [name for name in values if name not in FREE_TO_CHANGE]
    identity = {flag_of(name): json.dumps(values[name]) for name in compared}
    identity["the base model's files"] = fingerprint(base)  # the same, by whatever name
    identity |= {f"picture {name!r}": content for name, content in pictures.items()}
    saved = read_checkpoint(checkpoint_file, identity, total_steps) if config.resume else None

    # --- CLIP: every prompt's embedding, computed once; then it leaves memory -------------------
    preview_prompt = config.train_prompt if config.preview_prompt is None else config.preview_prompt
    prompts = {text: f"picture {name!r}" for text, name in zip(captions, pictures, strict=True)}
    prompts |= {preview_prompt: "--preview-prompt", "": "", config.train_prompt: "--train-prompt"}
    prompt_embeds = embed_prompts(base, prompts, device)
    caption_embeds = [prompt_embeds[caption] for caption in [*captions, ""]]

    # --- VAE: every picture's posterior and its mirror image's, computed once; then it leaves ---
    moments = encode_pictures(base, dataset, device, dtype)

    # --- UNet and LoRA --------------------------------------------------------------------------
    noise_scheduler = load_part(DDPMScheduler, base, "scheduler")
    unet = load_unet(base, config, device, dtype)
    lora = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    weights = sum(weight.numel() for weight in lora.values())
    root, divisor = ("√", config.rank**0.5) if config.use_rslora else ("", config.rank)
    strength = f"{config.lora_alpha:g}/{root}{config.rank} = {config.lora_alpha / divisor:g}"
    kind = "DoRA weights, for PEFT alone," if config.use_dora else "LoRA weights"
    say(f"training {weights:,} {kind} at strength {strength}, {total_steps} updates")
    say(f"of {config.model_id} in {dtype_name} on {hardware}")

    # --- The state of the loop: all of it in the checkpoint (the rate follows from the step) ----
    # Fused, AdamW leaves it to the GPU whether the scaler found an overflow.
    optimizer = AdamW(lora.values(), lr=config.learning_rate, fused=True)
    # Without it, float16 gradients underflow; elsewhere it passes everything through.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    rows = []  # of loss.csv, one an update
    schedule = config.lr_scheduler
    if schedule == "constant" and config.lr_warmup_steps:
        schedule = "constant_with_warmup"  # diffusers' "constant" would pass over it
    lr_scheduler = get_scheduler(schedule, optimizer, None, config.lr_warmup_steps, total_steps)
    if saved:
        rows, states = saved["rows"], saved["optimizer"]["state"]
        if saved["lora"].keys() != lora.keys() or (rows and len(states) != len(lora)):
            raise Trouble(f"{checkpoint_file} is damaged (no weights); delete it to start afresh")
        unet.load_state_dict(saved["lora"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        for _ in rows:
            lr_scheduler.step()

    # --- What the loop draws from, and what previews do, the same in each of them ---------------
    steps = range(len(rows), total_steps)
    draw_from = {"plan": plan, "moments": moments, "embeds": caption_embeds, "config": config}
    draw_from["num_timesteps"] = noise_scheduler.config.num_train_timesteps
    draw_step = partial(draw_update, **draw_from)
    # One update an item, drawn while the GPU is still at the one before.
    train_dataloader = DataLoader(steps, None, collate_fn=draw_step, pin_memory=on_gpu)
    shape = (1, *moments.shape[-3:])
    seeded = [torch.Generator().manual_seed(seed) for seed in range(config.preview_images)]
    noises = [torch.randn(shape, generator=generator) for generator in seeded]
    embeds = torch.stack([prompt_embeds[preview_prompt], prompt_embeds[""]])
    preview = {"prompt": preview_prompt, "embeds": embeds, "noises": noises}
    preview |= {"scheduler": noise_scheduler, "autocast": autocast}
    every = config.preview_every_epochs if noises else 0

    # --- From here on the output folder is written, and a signal waits for the update in hand ---
    Stop.deferred = True
    output_dir.mkdir(parents=True, exist_ok=True)
    lock(output_dir)
    if not saved:  # what a run left that was killed before its first checkpoint
        remove_unfinished(unfinished)
    write_result(config.output_dir, False, *summarize(rows, plan))

    # --- The loop -------------------------------------------------------------------------------
    pending = []  # of each update since the last look: summed loss, learning rate, gradient norm
    looked, failure = time.monotonic(), None
    bar = tqdm(total=total_steps, initial=steps.start, desc="training", unit="update", disable=None)
    in_loop = ExitStack()  # a `with` would indent all of the loop
    # PEFT would widen every LoRA input to float32 and keep it; autocast narrows it again anyway.
    in_loop.enter_context(disable_input_dtype_casting(unet, dtype is not torch.float32))
    unet.train()
    for step, pieces in zip(steps, train_dataloader, strict=True):
        # One update: forward and backward of each piece of its samples, then AdamW.
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        try:
            for i, piece in enumerate(pieces):
                piece = {key: value.to(device, non_blocking=True) for key, value in piece.items()}
                # LoRA's dropout, the one random choice inside the step, is keyed like the others.
                torch.manual_seed(stream_seed(config.seed, DROPOUT, step * 2**32 + i))
                with autocast:
                    losses = compute_loss(unet, noise_scheduler, piece, config.snr_gamma)
                scaler.scale((losses * piece["weight"]).sum()).backward()
                loss_sum += losses.detach().sum()  # told without weights: each picture counts alike
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(lora.values(), config.max_grad_norm)
        except Exception as error:  # noqa: BLE001 - raised again below, once the work is safe
            failure = error
        else:
            scaler.step(optimizer)  # does nothing where float16 overflowed
            scaler.update()
            optimizer.zero_grad()
            pending.append((loss_sum, lr_scheduler.get_last_lr()[0], norm))
            lr_scheduler.step()

        # What is due? The CPU runs ahead of the GPU, and waits for it where it looks at losses: at
        # an epoch's end, every few seconds and at a checkpoint, not at every update.
        done = len(rows) + len(pending)
        at_epoch_end, epoch = done % len(plan) == 0, done // len(plan)
        stopping = bool(failure or Stop.signum)
        draws = every and at_epoch_end and epoch % every == 0 and not stopping
        keeps = stopping or draws or done == total_steps or done % config.checkpointing_steps == 0
        if pending and (keeps or at_epoch_end or time.monotonic() > looked + 5):
            sizes = [len(plan[i % len(plan)]) for i in range(len(rows), done)]
            losses, rates, norms = zip(*pending, strict=True)
            losses, norms = torch.stack(losses).tolist(), torch.stack(norms).tolist()
            seconds, looked = time.monotonic() - looked, time.monotonic()
            speed, memory = sum(sizes) / max(seconds, 1e-9), round(peak_memory(device))
            for size, loss, rate, norm in zip(sizes, losses, rates, norms, strict=True):
                if not math.isfinite(loss):
                    # At the first update the seal does nothing yet.
                    own = "the base model's weights are damaged, or overflow in this precision"
                    why = "try a lower --learning-rate" if rows else own
                    raise Trouble(f"loss not finite at update {len(rows) + 1}; {why}")
                at = [len(rows) + 1, len(rows) // len(plan) + 1]
                rows.append([*at, loss / size, rate, norm, float(f"{speed:.4g}"), memory])
            bar.update(len(pending))
            pending.clear()
            if at_epoch_end:
                told = f"loss {summarize(rows, plan)[1]:.4f}"
                bar.set_postfix_str(told)
                with bar.external_write_mode(sys.stderr):
                    say(f"epoch {epoch}/{config.num_train_epochs}: {told}")
        if keeps:
            table = pandas.DataFrame(rows, columns=COLUMNS).to_csv(index=False)
            write_whole(unfinished / "loss.csv", table.encode())
            state = {"identity": identity, "rows": rows}
            state["lora"] = {name: weight.detach() for name, weight in lora.items()}
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            torch.save(state, packed := BytesIO())
            write_whole(checkpoint_file, packed.getvalue())
            write_result(config.output_dir, False, *summarize(rows, plan))
            looked = time.monotonic()
        if stopping:
            break
        if draws and not Stop.signum:
            Stop.deferred = False  # a signal need not wait for pictures
            file = unfinished / "previews" / f"epoch-{epoch:04}.png"
            # The UNet has the GPU: the CPU decodes.
            vae_from = (base, torch.device("cpu"), torch.float32)
            write_previews(file, unet=unet, vae_from=vae_from, **preview)
            unet.train()
            Stop.deferred, looked = True, time.monotonic()
    bar.close()
    in_loop.close()
    Stop.deferred = False
    if failure:
        raise failure
    if Stop.signum:
        sys.exit(128 + Stop.signum)

    # --- The seal, and what there is to look at -------------------------------------------------
    name = save_seal(unfinished, unet, config, noise_scheduler.config.prediction_type)
    with autocast:
        unet = check_seal(unet, unfinished, caption_embeds[0])
    if noises:
        file = unfinished / "preview.png"
        vae_from = (base, device, dtype if on_gpu else torch.float32)
        write_previews(file, unet=unet, vae_from=vae_from, **preview)
    draw_loss(rows).save(unfinished / "loss.png")
    epochs, loss = summarize(rows, plan)
    seconds = sum(len(plan[i % len(plan)]) / row[5] for i, row in enumerate(rows))
    libraries = (torch, diffusers, transformers, peft, datasets)
    facts = {
        "strength": strength,
        "loss": "none" if loss is None else f"{loss:.4f} in the last epoch",
        "pictures": len(dataset),
        "updates": f"{len(rows)} in {epochs} epochs",
        "time": f"{seconds / 60:.1f} minutes of training",
        "peak memory": f"{peak_memory(device):.0f} MiB",
        "hardware": hardware,
        "precision": dtype_name,
        "versions": ", ".join(f"{lib.__name__} {lib.__version__}" for lib in libraries),
    }
    write_card(unfinished / "README.md", name, config, on_gpu, facts)

    # --- The result -----------------------------------------------------------------------------
    publish(unfinished, output_dir)
    write_result(config.output_dir, True, epochs, loss)
    remove_unfinished(unfinished)
    how = "PeftModel alone" if config.use_dora else f"pipe.load_lora_weights({config.output_dir!r})"
    say(f"seal written to {config.output_dir}; load it by {how}; see its README.md", sys.stdout)


def run(config: Config) -> int:
    """`main`, which ends in an exit code and, whatever stops it, one message on stderr."""
    try:
        main(config)
        return 0
    except SystemExit as stop:
        say("interrupted")
        error, exit_code = stop, stop.code
    except Exception as caught:  # noqa: BLE001 - whatever it is, the user gets one line
        error, exit_code = caught, getattr(caught, "exit_code", 1)
        say(told_of(error, config.output_dir))
    finally:
        Stop.deferred = False
        while LOCKS:
            os.close(LOCKS.pop())
    if not isinstance(error, Trouble) and (Path(config.output_dir) / CHECKPOINT).exists():
        say("the same command with --resume goes on from the checkpoint")
    return exit_code


if __name__ == "__main__":
    sys.exit(run(config))
