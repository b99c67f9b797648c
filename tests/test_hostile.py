"""Hostile and clumsy input: nothing of the user's is lost, nothing of a stranger's is run."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint_file, flags, prepared, run, snapshot
from PIL import Image
from safetensors.torch import load_file, save_file
from test_resume import finished, interrupt, start, wait_for  # noqa: F401 - a fixture

import quest_7_2 as quest


@pytest.fixture(autouse=True)
def unlocked():
    yield
    while quest.LOCKS:
        os.close(quest.LOCKS.pop())


@pytest.fixture
def refused(capsys):
    """`refused(config)`: the message of a command that is answered with 2 before the imports."""

    def begin(wanted) -> str:
        while quest.LOCKS:
            os.close(quest.LOCKS.pop())
        with pytest.raises(SystemExit) as stop:
            quest.begin(flags(wanted))
        assert stop.value.code == 2
        return capsys.readouterr().err

    return begin


def unfinished(wanted, interrupt) -> None:  # noqa: F811
    interrupt(3)
    assert quest.run(wanted) == 130
    interrupt(None)


# --- what the user has ---


@pytest.mark.parametrize("name", ["previews", "checkpoint", ".partial", "sub"])
@pytest.mark.parametrize("what", ["dataset", "model"])
def test_nothing_to_read_lies_in_the_output_folder(what, name, config, palette, model, refused):
    inner = Path(config().output_dir) / name
    shutil.copytree(palette if what == "dataset" else model, inner)
    before = snapshot(inner)
    key = "dataset_dir" if what == "dataset" else "model_id"
    assert f" and {what} {inner} must not lie in each other" in refused(config(**{key: str(inner)}))
    outer = config(output_dir=str(Path(getattr(config(), key)) / "unet"))
    assert "must not lie in each other" in refused(outer)
    assert snapshot(inner) == before


USERS = ["README.md", "loss.png", "loss.csv", "preview.png", "result.json"]
USERS += ["adapter_model.safetensors", "previews/mine.png", "checkpoint/checkpoint.txt"]


@pytest.mark.parametrize("name", USERS)
def test_the_users_own_files_are_refused_not_replaced(name, config, refused):
    wanted = config()
    file = Path(wanted.output_dir) / name
    file.parent.mkdir(parents=True)
    file.write_text('{"success": true, "mine": 1}')
    before = snapshot(Path(wanted.output_dir))
    assert f"no run left: {name.split('/')[0]}" in refused(wanted)
    assert quest.run(wanted) == 2
    assert snapshot(Path(wanted.output_dir)) == before


def test_only_our_files_leave_our_folders(config, interrupt):  # noqa: F811
    wanted = config(preview_images=1, preview_every_epochs=1)
    unfinished(wanted, interrupt)
    theirs = ["previews/mine.png", "checkpoint/mine.txt", "checkpoint/previews/mine.png"]
    for name in theirs:
        (Path(wanted.output_dir) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(wanted.output_dir) / name).write_text("mine")
    assert quest.run(replace(wanted, resume=True)) == 0
    assert quest.run(config()) == 0  # a second run, without pictures in between
    folder = Path(wanted.output_dir)
    assert all((folder / name).read_text() == "mine" for name in theirs)
    assert sorted(os.listdir(folder / "previews")) == ["mine.png"]
    assert not checkpoint_file(wanted).exists()


@pytest.mark.parametrize("name", ["README.md", "loss.csv", "preview.png", "adapter_config.json"])
def test_a_folder_or_link_under_our_names_is_said_at_the_start(name, config, refused, tmp_path):
    wanted = config()
    folder = Path(wanted.output_dir)
    folder.mkdir()
    quest.write_result(wanted.output_dir, True, 3, 0.5)  # a run of ours was here
    (folder / name).mkdir()
    assert f"left: {name}" in refused(wanted)
    (folder / name).rmdir()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"left: {name}" in refused(wanted)
    (folder / name).unlink()
    (folder / "previews").symlink_to(tmp_path)
    assert "left: previews" in refused(wanted)
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "nowhere")
    assert "cannot be written" in refused(wanted)


def test_only_a_result_of_ours_is_disowned(config, tmp_path):
    wanted = config(dataset_dir="no/such/folder")
    folder = Path(wanted.output_dir)
    folder.mkdir()
    for text in ['{"success": true}', '{"success": 1, "outputDir": "", "epochsCompleted": 0}']:
        (folder / "result.json").write_text(text)
        assert run(*flags(wanted)).returncode == 2
        assert (folder / "result.json").read_text() == text
    (tmp_path / "artist_seal").mkdir()
    quest.write_result(str(tmp_path / "artist_seal"), True)
    before = snapshot(tmp_path / "artist_seal")
    assert run("--config", "nosuch.json", cwd=tmp_path).returncode == 2
    assert snapshot(tmp_path / "artist_seal") == before


def test_an_interrupted_run_is_not_overwritten(config, interrupt, refused):  # noqa: F811
    wanted = config(num_train_epochs=4)
    unfinished(wanted, interrupt)
    before = snapshot(Path(wanted.output_dir) / "checkpoint")
    message = refused(wanted)
    assert "--resume" in message and str(checkpoint_file(wanted).parent) in message
    assert quest.run(wanted) == 2
    assert snapshot(Path(wanted.output_dir) / "checkpoint") == before
    shutil.rmtree(checkpoint_file(wanted).parent)
    assert quest.run(wanted) == 0


def test_leavings_of_another_run_do_not_show(config, interrupt):  # noqa: F811
    first = config(num_train_epochs=4, preview_images=1, preview_every_epochs=1)
    interrupt(7)
    assert quest.run(first) == 130
    interrupt(None)
    checkpoint_file(first).unlink()
    second = config()
    assert quest.run(second) == 0
    assert not (Path(second.output_dir) / "previews").exists()
    assert len((Path(second.output_dir) / "loss.csv").read_text().splitlines()) == 1 + 4


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_is_a_signal(signum, config):
    wanted = config(num_train_epochs=3000, checkpointing_steps=1_000_000)
    process = start(wanted)
    wait_for(Path(wanted.output_dir) / "result.json", process)
    process.send_signal(signum)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum, message
    assert checkpoint_file(wanted).exists() and "Traceback" not in message


def test_nohup_means_what_it_says(config):
    """A signal that was ignored when the command started stays so."""
    wanted = config(num_train_epochs=3000, checkpointing_steps=1_000_000)
    process = start(wanted, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(Path(wanted.output_dir) / "result.json", process)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_two_runs_lock_what_they_write(config, tmp_path):
    """Whatever HOME and TMPDIR are, and whatever lies in a shared temporary folder."""
    wanted = config(num_train_epochs=3000)
    first = start(wanted)
    wait_for(Path(wanted.output_dir) / "result.json", first)
    second = run(*flags(wanted), env={"HOME": str(tmp_path), "TMPDIR": str(tmp_path)})
    assert second.returncode == 2 and "in use by another run" in second.stderr
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode == 130
    assert not [p for p in Path(wanted.output_dir).iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("stream", ["closed", "full", "ascii"])
def test_printing_never_decides_a_run(stream, config, tmp_path):
    wanted = config(output_dir=str(tmp_path / "печать"), num_train_epochs=1)
    words = [sys.executable, str(ROOT / "quest_7_2.py"), *flags(wanted)]
    env = os.environ | ({"PYTHONIOENCODING": "ascii:strict"} if stream == "ascii" else {})
    if stream == "full":
        with open("/dev/full", "w") as full:
            code = subprocess.run(words, stdout=full, stderr=full, check=False, env=env).returncode
    else:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        if stream == "closed":
            process.stdout.close()
            process.stderr.close()
        code = process.wait(timeout=100)
    assert code == 0
    assert json.loads((tmp_path / "печать" / "result.json").read_text())["success"] is True


def test_an_interruption_whose_message_nobody_hears(config):
    wanted = config(num_train_epochs=3000, checkpointing_steps=1_000_000)
    process = start(wanted)
    wait_for(Path(wanted.output_dir) / "result.json", process)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert checkpoint_file(wanted).exists()
    assert json.loads((Path(wanted.output_dir) / "result.json").read_text())["success"] is False


# --- what a stranger made ---


def test_an_eps_named_png_starts_nothing(config, palette, tmp_path, capsys, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("gs", "gswin64c"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    Image.new("RGB", (9, 9)).save(tmp_path / "holiday.eps")
    shutil.copy(tmp_path / "holiday.eps", palette / "holiday.png")
    assert quest.run(config()) == 2
    message = capsys.readouterr().err
    assert "holiday.png" in message and "is not the picture that its name says" in message
    assert "BytesIO" not in message and not (tmp_path / "started").exists()


def test_a_models_config_fetches_and_runs_nothing(config, model, tmp_path, monkeypatch):
    base = shutil.copytree(model, tmp_path / "base")
    (base / "text_encoder" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file = base / "text_encoder" / "config.json"
    odd = {
        "attn_implementation": "kernels-community/flash-attn",
        "auto_map": {"AutoModel": "evil.A"},
    }
    odd["_attn_implementation"] = odd["attn_implementation"]
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    asked = []
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "http_get", lambda *args, **kw: asked.append(args))
    one = prepared(config()).prompt_embeds
    other = prepared(config(model_id=str(base))).prompt_embeds
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not asked and not (tmp_path / "ran").exists()


def test_too_many_pixels_are_refused_with_the_limit(config, palette, capsys):
    Image.new("1", (13_300, 13_300)).save(palette / "large.png")
    assert quest.run(config()) == 2
    message = capsys.readouterr().err
    assert "large.png" in message and "exceeds limit of 100000000 pixels" in message


def test_no_terminal_escapes_are_printed(config, interrupt, capsys):  # noqa: F811
    wanted = config(num_train_epochs=4)
    unfinished(wanted, interrupt)
    state = torch.load(checkpoint_file(wanted), weights_only=True)
    state["identity"]["--rank"] = "\x1b[2J\x9b31m4"
    torch.save(state, checkpoint_file(wanted))
    assert quest.run(replace(wanted, resume=True)) == 2
    message = capsys.readouterr().err
    assert "--rank" in message and "\x1b" not in message and "\x9b" not in message


@pytest.mark.parametrize("name", ["x.png", "metadata.csv", "1.txt"])
def test_pipes_do_not_hang(name, config, palette, capsys):
    os.mkfifo(palette / name)
    assert quest.run(config()) == 2
    assert name in (message := capsys.readouterr().err) and "not an ordinary file" in message


def test_a_pipe_for_json_does_not_hang(config, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "not an ordinary file" in run("--config", path).stderr
    Path(config().output_dir).mkdir()
    os.mkfifo(Path(config().output_dir) / "result.json")
    assert "left: result.json" in run(*flags(config())).stderr


# --- what would train wrongly ---


def test_another_base_model_is_noticed_by_any_name(config, model, tmp_path, interrupt, capsys):  # noqa: F811
    base = shutil.copytree(model, tmp_path / "base")
    wanted = config(model_id=str(base), num_train_epochs=4)
    unfinished(wanted, interrupt)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({key: w + 0.01 for key, w in weights.items()}, file, {"format": "pt"})
    capsys.readouterr()
    assert quest.run(replace(wanted, resume=True)) == 2
    message = capsys.readouterr().err
    assert "the base model's files" in message and str(base) not in message
    link = tmp_path / "link"
    link.symlink_to(model)
    assert quest.run(replace(wanted, resume=True, model_id=str(link))) == 0


def test_32_bits_a_channel_are_refused_by_name(config, palette, capsys):
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.float32)).save(palette / "float.tif")
    Image.fromarray((ramp * 255).astype(np.int32)).save(palette / "int.tif")
    assert quest.run(config()) == 2
    message = capsys.readouterr().err
    for name in ("float.tif", "int.tif"):
        assert f"{name}': has 32 bits a channel" in message


def test_captions_as_they_come(config, palette, capsys):
    (palette / "0.TXT").write_text("\ufeffa red circle", encoding="utf-8")
    (palette / "Metadata.csv").write_text("\ufefffile_name,text\n1.png,a blue square\n")
    _, captions, _ = quest.load_pictures(config())
    assert captions == ["a red circle", "a blue square", config().train_prompt]
    (palette / "Metadata.csv").unlink()
    for text in (5, ["a"]):
        line = json.dumps({"file_name": "1.png", "text": text})
        (palette / "metadata.jsonl").write_text(line)
        assert quest.run(config()) == 2
        assert "the caption of '1.png' is no text" in capsys.readouterr().err


def test_messages_reach_any_stream():
    """A notebook's has no reconfigure; and where an error names no file, the folder is named."""
    stream = io.StringIO()
    quest.say("red \x1b[31m", stream)
    assert stream.getvalue() == "red \\x1b[31m\n"
    assert quest.told_of(OSError(28, "No space left"), "my_seal") == "my_seal: No space left"


def test_no_caption_is_printed(config, palette, capsys):
    """An unquoted comma, a line too long, an empty file: the row is named, not what it says."""
    for text, message in [
        (
            "file_name,text\n0.png,a plain one\n1.png,my secret, with a comma\n",
            "row 2 has 3 fields",
        ),
        ("file_name,text\n0.png,my secret, everywhere\n", "row 1 has 3 fields"),
        ("my secret\n", "it needs the columns file_name and text"),
        ("", "metadata.csv"),
    ]:
        (palette / "metadata.csv").write_text(text)
        assert quest.run(config()) == 2
        told = capsys.readouterr().err
        assert message in told and "secret" not in told and "Traceback" not in told


def test_what_is_left_out_is_said(config, palette, capsys):
    for name in ("a.heic", "b.avif", ".hidden.heic"):
        (palette / name).write_bytes(b"")
    (palette / "linked").symlink_to(palette)
    for name in ("1.png", "2.png"):
        (palette / name).unlink()
    quest.load_pictures(config())
    message = capsys.readouterr().err
    assert "1 picture, 64×64 pixels" in message and "1 picture, 3 left out: " in message
    for told in ("a.heic (a kind", "b.avif (a kind", "linked (a linked folder)"):
        assert told in message
    assert ".hidden" not in message


@pytest.mark.parametrize("lost", ["lora", "optimizer"])
def test_a_checkpoint_without_its_tensors_is_damaged(lost, config, interrupt, capsys):  # noqa: F811
    wanted = config(num_train_epochs=4)
    unfinished(wanted, interrupt)
    state = torch.load(checkpoint_file(wanted), weights_only=True)
    if lost == "lora":
        state["lora"].popitem()
    else:
        state["optimizer"]["state"] = {}
    torch.save(state, checkpoint_file(wanted))
    assert quest.run(replace(wanted, resume=True)) == 1
    assert "is damaged (no weights)" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["exchanged", "removed"])
def test_a_picture_that_changes_in_mid_run(change, config, palette, capsys, monkeypatch):
    embed_prompts = quest.embed_prompts

    def meanwhile(*args):
        (palette / "1.png").unlink()
        if change == "exchanged":
            shutil.copy(palette / "0.png", palette / "1.png")
        return embed_prompts(*args)

    monkeypatch.setattr(quest, "embed_prompts", meanwhile)
    assert quest.run(config()) == 1
    message = capsys.readouterr().err
    assert str(palette / "1.png") in message and "Worker" not in message


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "of noise, not of flow"),
        ("scheduler", {"prediction_type": "flow"}, "a prediction_type of"),
        ("scheduler", {"prediction_type": None}, "a prediction_type of"),
        ("scheduler", {"num_train_timesteps": 0}, "1 timestep or more"),
        ("vae", {"scaling_factor": 0}, "a scaling_factor above 0"),
        ("vae", {"latent_channels": 8}, "a VAE of 4 latent channels"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_by_name(
    part, change, message, config, model, tmp_path, capsys, monkeypatch
):
    base = shutil.copytree(model, tmp_path / "base")
    file = base / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr(quest, "embed_prompts", None)  # not that far
    assert quest.run(config(model_id=str(base))) == 1
    assert message in capsys.readouterr().err


# --- words ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_alpha": 1e-30}, "too low a --learning-rate, --lora-alpha"),
        ({"snr_gamma": 1e-30}, "--snr-gamma"),
        ({"lr_warmup_steps": 10**15}, "--lr-warmup-steps longer than the run"),
    ],
)
def test_a_run_that_learns_nothing_names_what_may_be_why(options, message, config, capsys):
    assert quest.run(config(**options)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("part", ["tokenizer", "scheduler"])
def test_a_corrupt_part_is_named(part, config, model, tmp_path, capsys):
    base = shutil.copytree(model, tmp_path / "base")
    for file in (base / part).iterdir():
        file.write_text("{broken")
    assert quest.run(config(model_id=str(base))) == 1
    assert f"the model's {part} cannot be loaded" in capsys.readouterr().err


def test_nan_weights_are_the_models(config, model, tmp_path, capsys):
    base = shutil.copytree(model, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    assert quest.run(config(model_id=str(base))) == 1
    assert "at update 1; the base model's weights are damaged" in capsys.readouterr().err


def test_paths_that_no_system_takes(config, palette, tmp_path, refused):
    assert "File name too long" in refused(config(output_dir="x" * 300))
    assert "File name too long" in refused(config(dataset_dir="x" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be written" in refused(config(output_dir=str(tmp_path / "loop")))
    done = run("--output-dir", b"seal\xff".decode(errors="surrogateescape"))
    assert done.returncode == 2 and "must be a path" in done.stderr
    with pytest.raises(quest.Trouble, match="at least 1 and below"):
        config(num_train_epochs=2**63 - 1)


def test_no_place_to_work_in(config, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    words = [sys.executable, str(ROOT / "quest_7_2.py"), *flags(config())]
    script = 'rmdir "$0"; exec "$@"'
    words = ["sh", "-c", script, str(gone), *words, "--output-dir", "s"]
    done = subprocess.run(words, cwd=gone, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    code = "import tempfile, sys; sys.argv.pop(0); tempfile._candidate_tempdir_list = list"
    code += "; tempfile._get_default_tempdir = lambda *a: open('/no/temporary/folder')"
    code += "; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *words[5:]], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 2 and "/no/temporary/folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("delay", [0.25, 0.4])
def test_ctrl_c_in_the_first_moments(delay, config):
    """(Before that, Python itself is starting and compiling the file, and it is Python's to say.)"""
    process = start(config())
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT)
    assert "quest_7_2.py" not in message and not Path(config().output_dir).exists()


def test_a_resumed_run_ends_as_a_whole_one(config, model, interrupt, tmp_path):  # noqa: F811
    """The same model by another path, the pictures in another place."""
    wanted = config(num_train_epochs=3)
    assert quest.run(wanted) == 0
    whole = finished(wanted)
    shutil.rmtree(wanted.output_dir)
    unfinished(wanted, interrupt)
    moved = shutil.copytree(model, tmp_path / "moved")
    assert quest.run(replace(wanted, resume=True, model_id=os.path.relpath(moved))) == 0
    assert finished(wanted) == whole
