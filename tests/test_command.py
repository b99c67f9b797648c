"""The command as a user meets it: options, JSON, bad input, exit codes, the output folder."""

import fcntl
import json
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import flags, run, snapshot
from PIL import Image

import quest_7_2 as quest

INPUT_DATA = {
    "datasetDir": "../Quest_1/generated_palette",
    "outputDir": "artist_seal",
    "modelId": "CompVis/stable-diffusion-v1-4",
    "resolution": 256,
    "trainBatchSize": 1,
    "gradientAccumulationSteps": 4,
    "learningRate": 1e-4,
    "numTrainEpochs": 100,
}


def refused(*words, cwd=None) -> str:
    """stderr of a command that must be refused in well under the time of the heavy imports."""
    started = time.monotonic()
    done = run(*words, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - started < 4
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


# --- the two acceptance scenarios ---


def test_a_good_palette_leaves_a_seal(config):
    wanted = config(preview_images=2)
    done = run(*flags(wanted))
    assert done.returncode == 0, done.stderr
    assert "epoch 1/2: loss" in done.stderr
    assert "Traceback" not in done.stderr
    left = set(os.listdir(wanted.output_dir))
    assert left >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "result.json",
        "README.md",
        "preview.png",
        "loss.png",
        "loss.csv",
    }
    assert not any(name.startswith(".") for name in left)
    result = json.loads((Path(wanted.output_dir) / "result.json").read_text())
    assert set(result) == {"success", "outputDir", "epochsCompleted", "finalLoss"}
    assert result["success"] is True
    assert result["outputDir"] == wanted.output_dir
    assert result["epochsCompleted"] == 2
    assert f"epoch 2/2: loss {result['finalLoss']:.4f}" in done.stderr


def test_a_missing_dataset_leaves_nothing(tmp_path):
    message = refused(
        "--dataset-dir", "no/such/folder", "--output-dir", tmp_path / "seal", cwd=tmp_path
    )
    assert "dataset folder no/such/folder does not exist" in message
    assert os.listdir(tmp_path) == []


# --- options ---


def test_the_defaults_are_the_contract():
    defaults = {quest.key_of(o.name): o.default for o in fields(quest.Config)}
    assert {key: defaults[key] for key in INPUT_DATA} == INPUT_DATA
    assert defaults["trainPrompt"] == "a painting in the style of artist_seal"
    assert (defaults["rank"], defaults["loraAlpha"], defaults["loraDropout"]) == (16, 32.0, 0.05)
    assert defaults["maxGradNorm"] == 1.0


def test_only_what_has_no_default_may_be_none():
    assert quest.Config(snr_gamma=None).snr_gamma is None
    with pytest.raises(quest.Refused, match="--rank .* must be a whole number, not null"):
        quest.Config(rank=None)


def test_flags_win_over_json_and_json_over_defaults(tmp_path):
    file = tmp_path / "input.json"
    file.write_text('{"datasetDir": "a", "resolution": 512, "learningRate": 1, "variant": null}')
    read = quest.read_config(["--config", str(file), "--resolution", "128", "--seed", "7"])
    assert (read.dataset_dir, read.resolution, read.learning_rate) == ("a", 128, 1.0)
    assert (read.seed, read.rank, read.variant) == (7, 16, None)


@pytest.mark.parametrize("how", ["a file", "the object itself"])
def test_json_alone_trains(how, config, tmp_path):
    wanted = config(num_train_epochs=1, train_prompt="--a prompt = {odd}")
    text = json.dumps({quest.key_of(o.name): getattr(wanted, o.name) for o in fields(wanted)})
    (tmp_path / "input.json").write_text(text)
    done = run("--config", tmp_path / "input.json" if how == "a file" else text)
    assert done.returncode == 0, done.stderr
    assert json.loads((Path(wanted.output_dir) / "result.json").read_text())["epochsCompleted"] == 1
    assert wanted.train_prompt in (Path(wanted.output_dir) / "README.md").read_text()


def test_the_json_itself_is_judged(tmp_path):
    read = quest.read_config(["--config", ' {"seed": "7", "useDora": true, "variant": null}'])
    assert (read.seed, read.use_dora, read.variant) == (7, True, None)
    assert not quest.read_config(["--config", '{"useDora": true}', "--no-use-dora"]).use_dora
    for text, message in [
        ('{"seed": -1}', "--seed (seed) must be at least 0, not -1"),
        ("{", "--config: Expecting property name"),
        ('{"sed": 1}', '--config: unknown key "sed"'),
    ]:
        assert message in refused("--config", text, cwd=tmp_path)
    many = json.dumps({f"key{i}": 1 for i in range(60_000)})  # not in quadratic time
    (tmp_path / "many.json").write_text(many)
    assert "unknown key" in refused("--config", tmp_path / "many.json", cwd=tmp_path)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--resolution", "100"], "--resolution (resolution) must be a positive multiple of 8"),
        (["--resolution", "99999992"], "at most 16384"),
        (["--resolution", "0"], "at most 16384, not 0"),
        (["--resolution", "256.0"], 'must be a whole number, not "256.0"'),
        (["--train-batch-size", "0"], "--train-batch-size (trainBatchSize) must be at least 1"),
        (["--gradient-accumulation-steps", "x"], 'must be a whole number, not "x"'),
        (["--num-train-epochs", "-3"], "must be at least 1 and below 2^31, not -3"),
        (["--learning-rate", "0"], "--learning-rate (learningRate) must be finite and above 0"),
        (["--learning-rate", "nan"], "must be finite and above 0"),
        (["--learning-rate", "inf"], "must be finite and above 0"),
        (["--lora-dropout", "1"], "at least 0 and below 1"),
        (["--seed", "-1"], "--seed (seed) must be at least 0"),
        (["--mixed-precision", "fp8"], "must be one of fp16, bf16, no"),
        (["--output-dir", ""], "--output-dir (outputDir) must be a path"),
        (["--max-train-steps", "9" * 5000], "must be a whole number"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--resol", "64"], "unrecognized arguments"),
        (["--hf-token", "secret"], "unrecognized arguments"),
        (["--config", "none.json"], "--config none.json: No such file"),
    ],
)
def test_bad_flags_are_refused_by_name(words, message, tmp_path):
    assert message in refused(*words, cwd=tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"resolutoin": 64}', 'unknown key "resolutoin"'),
        ('{"resolution": "63"}', "must be a positive multiple of 8, at most 16384, not 63"),
        ('{"resolution": 64.0}', "must be a whole number, not 64.0"),
        ('{"resolution": true}', "must be a whole number, not true"),
        ('{"learningRate": true}', "must be a number, not true"),
        ('{"learningRate": NaN}', "must be finite and above 0, not NaN"),
        ('{"learningRate": 1' + "0" * 400 + "}", "must be a number, not 1000"),
        ('{"learningRate": 1e999}', "must be finite and above 0, not Infinity"),
        ('{"gradientCheckpointing": 1}', "must be true or false, not 1"),
        ('{"datasetDir": {"a": 1}}', "must be a string, not"),
        ('{"trainPrompt": true}', "must be a string, not true"),
        ('{"trainPrompt": 5}', "must be a string, not 5"),
        ('{"datasetDir": ["a"]}', 'must be a string, not ["a"]'),
        ('{"datasetDir": "a\\u0000b"}', "must be a path"),
        ("[1]", "must hold one JSON object"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_bad_json_is_refused_by_name(text, message, tmp_path):
    (tmp_path / "input.json").write_text(text)
    assert message in refused("--config", "input.json", cwd=tmp_path)
    assert os.listdir(tmp_path) == ["input.json"]


def test_json_that_is_no_utf8_is_refused(tmp_path):
    (tmp_path / "input.json").write_bytes(b'{"datasetDir": "\xff"}')
    assert "input.json" in refused("--config", "input.json", cwd=tmp_path)


# --- folders ---


def test_folders_are_judged(palette, tmp_path):
    empty = tmp_path / "empty"
    (empty / ".hidden").mkdir(parents=True)
    shutil.copy(palette / "0.png", empty / ".hidden" / "0.png")
    (empty / "notes.txt").write_text("no picture")
    (empty / "folder.png").mkdir()
    file = palette / "0.png"
    before = snapshot(tmp_path)
    for dataset_dir, output_dir, message in [
        (file, "seal", f"dataset folder {file} is a file, not a folder"),
        (empty, "seal", f"dataset folder {empty} has no pictures"),
        (palette, palette, "must not lie in each other"),
        (palette, palette / "seal", "must not lie in each other"),
        (palette, tmp_path / "palette/../palette/x", "must not lie in each other"),
        (palette, tmp_path / "empty/notes.txt", "cannot be written"),
        (palette, tmp_path / "empty/notes.txt/seal", "cannot be written"),
        (palette, "/proc/seal", "cannot be written"),
    ]:
        words = ["--dataset-dir", dataset_dir, "--output-dir", output_dir]
        assert message in refused(*words, cwd=tmp_path)
    assert snapshot(tmp_path) == before


def test_a_folder_in_use_is_left_alone(config, capsys):
    wanted = config()
    output_dir = Path(wanted.output_dir)
    output_dir.mkdir()
    quest.write_result(wanted.output_dir, True, 3, 0.5)
    before = snapshot(output_dir)
    quest.lock(output_dir)
    assert "is in use by another run" in refused(*flags(wanted))
    assert "multiple of 8" in refused(*flags(wanted), "--resolution", 7)
    assert snapshot(output_dir) == before
    os.close(quest.LOCKS.pop())
    # The other run may have made the folder while this one was importing.
    other = os.open(output_dir, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert quest.run(wanted) == 2
    message = capsys.readouterr().err
    assert "is in use by another run" in message and "pictures" not in message
    os.close(other)


def test_a_refused_run_disowns_an_older_result(config, tmp_path):
    """Once the arguments are understood; a command line that is not touches nothing."""
    wanted = config()
    output_dir = Path(wanted.output_dir)
    output_dir.mkdir()
    (output_dir / "adapter_model.safetensors").write_bytes(b"an earlier seal")
    quest.write_result(wanted.output_dir, True, 3, 0.5)
    before = snapshot(output_dir)
    for words in [
        [*flags(wanted), "--resolution", "7"],
        [*flags(wanted), "--no-such-flag"],
        ["--config", json.dumps({"outputDir": wanted.output_dir, "resolution": 1})],
        [*flags(wanted), "--config", "none.json"],
    ]:
        refused(*words)
        assert snapshot(output_dir) == before
    refused(*flags(wanted), "--dataset-dir", "no/such/folder")
    false = {"success": False, "outputDir": wanted.output_dir, "epochsCompleted": 0}
    assert json.loads((output_dir / "result.json").read_text()) == false
    assert set(os.listdir(output_dir)) == {"adapter_model.safetensors", "result.json"}
    # A file of the same name that no run wrote is not ours to change.
    (output_dir / "result.json").write_text("[1, 2]")
    refused(*flags(wanted), "--dataset-dir", "no/such/folder")
    assert (output_dir / "result.json").read_text() == "[1, 2]"


def test_a_path_with_dots_and_captions(config, palette, monkeypatch):
    """The default folder begins with "..": its captions' paths and its pictures' are the same."""
    (palette / "metadata.csv").write_text("file_name,text\n0.png,a circle\n")
    (palette.parent / "work").mkdir()
    monkeypatch.chdir(palette.parent / "work")
    _, captions, names = quest.load_pictures(config(dataset_dir="../palette"))
    assert captions == ["a circle", *[config().train_prompt] * 2]
    assert list(names) == ["0.png", "1.png", "2.png"]


# --- pictures ---


def test_all_bad_pictures_are_listed_at_once(config, palette, tmp_path):
    whole = (palette / "0.png").read_bytes()
    Image.new("RGB", (300, 300), "red").save(palette / "cut.jpg")
    jpeg = (palette / "cut.jpg").read_bytes()
    (palette / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (palette / "cut.png").write_bytes(whole[: len(whole) // 2])
    (palette / "empty.png").write_bytes(b"")
    (palette / "text.webp").write_text("no picture")
    (palette / "a::b.png").write_bytes(whole)
    (palette / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    # A PNG that announces 20,000 × 20,000 pixels.
    Image.new("1", (20_000, 20_000)).save(palette / "bomb.png")
    before = snapshot(tmp_path)
    done = run(*flags(config()))
    assert done.returncode == 2
    assert "7 of 10 pictures cannot be used" in done.stderr
    for name in ["cut.jpg", "cut.png", "empty.png", "text.webp", "a::b.png", "dangling.png"]:
        assert f"{str(palette / name)!r}: " in done.stderr
    assert "bomb" in done.stderr
    assert str(palette / "0.png") not in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    rgb = Image.new("RGB", (6, 4), (200, 100, 50))

    def opened(image, name, **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        found = quest.open_rgb((tmp_path / name).read_bytes())
        assert found.mode == "RGB"
        return np.asarray(found)

    assert (opened(rgb.convert("L"), "gray.png") == np.asarray(rgb.convert("L"))[..., None]).all()
    assert np.abs(opened(rgb.quantize(4), "palette.png") - np.asarray(rgb)).max() <= 8
    assert (
        np.abs(opened(rgb.convert("CMYK"), "cmyk.tif").astype(int) - rgb.getpixel((0, 0))).max() < 4
    )
    # 16 bits: 0 is black, 65535 is white, the middle is grey.
    wide = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    assert opened(wide, "wide.png")[0, :, 0].tolist() == [0, 128, 255]
    assert opened(wide, "wide.tif")[0, :, 1].tolist() == [0, 128, 255]
    # Transparency lies over white, half of it half.
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    assert opened(clear, "clear.png")[0].tolist() == [[255] * 3, [127] * 3]
    one = Image.new("P", (1, 1), 0)
    one.putpalette([0, 0, 0])
    assert opened(one, "clear.gif", transparency=0)[0].tolist() == [[255] * 3]
    # EXIF orientation 6: the camera was turned; the stored picture's left becomes the top.
    turned = Image.new("RGB", (2, 1), "black")
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert opened(turned, "turned.png", exif=exif)[:, 0, 0].tolist() == [255, 0]
    turned.save(tmp_path / "broken.png", exif=b"Exif\0\0MM\0*garbage that is no directory")
    assert quest.open_rgb((tmp_path / "broken.png").read_bytes()).size == (2, 1)


def test_names_are_no_trap(config, palette):
    """Names that mean something to imagefolder (splits) or to glob must all be trained on."""
    for name in ["test_1.png", "val [1].png", "st*r?.png", "два\nслова.PNG", "100%.png"]:
        shutil.copy(palette / "0.png", palette / name)
    (palette / "test").mkdir()
    shutil.copy(palette / "0.png", palette / "test" / "sub folder.png")
    dataset = quest.load_pictures(config())[0]
    assert len(dataset) == 9
    assert dataset[8]["pixel_values"].shape == (2, 3, 64, 64)


# --- the model ---


@pytest.mark.parametrize(
    "remove, message",
    [
        ("unet/diffusion_pytorch_model.safetensors", "lacks unet/diffusion_pytorch_model.safeten"),
        ("vae", "lacks vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", "lacks text_encoder/model.safetensors"),
        ("tokenizer", "lacks tokenizer/tokenizer.json"),
        ("scheduler", "lacks scheduler/scheduler_config.json"),
        ("unet/config.json", "the model's unet cannot be loaded"),
    ],
)
def test_a_model_with_parts_missing(remove, message, config, model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    if (broken / remove).is_dir():
        shutil.rmtree(broken / remove)
    else:
        (broken / remove).unlink()
    wanted = config(model_id=str(broken))
    assert quest.run(wanted) == 1
    assert message in capsys.readouterr().err
    assert not Path(wanted.output_dir).exists()


def test_pickled_weights_are_never_read(config, model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    # Unpickling this would leave a file behind.
    weights.with_suffix(".bin").write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    weights.unlink()
    assert quest.run(config(model_id=str(broken))) == 1
    assert "pickled weights are never read" in capsys.readouterr().err
    assert not Path("unpickled").exists()


def test_damaged_weights_are_named(config, model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert quest.run(config(model_id=str(broken))) == 1
    assert "the model's vae cannot be loaded" in capsys.readouterr().err


def test_a_model_that_is_nowhere(config, capsys):
    wanted = config(model_id="nobody/no-such-model")
    assert quest.run(wanted) == 1
    message = capsys.readouterr().err
    assert "nobody/no-such-model" in message and "HF_TOKEN" in message
    assert not Path(wanted.output_dir).exists()


# --- failures while training ---


def test_a_loss_that_is_not_finite_keeps_the_earlier_seal(config, capsys):
    wanted = config()
    assert quest.run(wanted) == 0
    before = snapshot(Path(wanted.output_dir))
    assert quest.run(config(learning_rate=1e30)) == 1
    assert "loss not finite at update" in capsys.readouterr().err
    after = snapshot(Path(wanted.output_dir))
    result = json.loads(after.pop("result.json"))
    assert result["success"] is False
    before.pop("result.json")
    assert {name: after[name] for name in before} == before
    assert after.keys() == before.keys()


def test_out_of_memory_names_the_flags(config, capsys):
    assert quest.run(config(rank=2**31 - 1)) == 1
    message = capsys.readouterr().err
    assert "out of memory" in message and "a smaller --resolution or --rank" in message
    assert "--gradient-checkpointing" in message
