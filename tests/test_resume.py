"""Nothing is lost: interruptions, faults and what is left after them."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, checkpoint_file, flags, run, snapshot
from PIL import Image

import quest_7_2 as quest

SEAL = ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]


def result_of(wanted) -> dict:
    return json.loads((Path(wanted.output_dir) / "result.json").read_text())


def finished(wanted) -> dict[str, bytes]:
    """What a run that is done leaves, which must be the same after any number of interruptions."""
    assert result_of(wanted)["success"] is True
    folder = Path(wanted.output_dir)
    assert not (folder / "checkpoint").exists()
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    return {name: (folder / name).read_bytes() for name in [*SEAL, "result.json"]}


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(n)`: SIGINT arrives during the n-th batch from now; counts all batches."""
    compute_loss, count = quest.compute_loss, {"batches": 0, "at": None}

    def counting(*args):
        count["batches"] += 1
        if count["batches"] == count["at"]:
            quest.Stop.on_signal(signal.SIGINT, None)
        return compute_loss(*args)

    def arrange(n):
        quest.Stop.signum, quest.Stop.deferred = 0, False
        count["at"] = None if n is None else count["batches"] + n
        return count

    monkeypatch.setattr(quest, "compute_loss", counting)
    yield arrange
    quest.Stop.signum, quest.Stop.deferred = 0, False


# --- resumed = uninterrupted ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_batch_size": 2, "gradient_accumulation_steps": 1, "lora_dropout": 0.3},
        {"gradient_accumulation_steps": 3, "max_train_steps": 5, "num_train_epochs": 9},
        {"mixed_precision": "fp16", "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "max_grad_norm": 0.1, "checkpointing_steps": 2},
    ],
)
def test_resumed_is_uninterrupted(options, config, interrupt, monkeypatch):
    wanted = config(**{"num_train_epochs": 4} | options)
    count = interrupt(None)
    assert quest.run(wanted) == 0
    whole, batches = finished(wanted), count["batches"]
    shutil.rmtree(wanted.output_dir)

    again, stops = replace(wanted, resume=True), 0
    count["batches"] = 0
    while True:
        interrupt([1, 2, 3][stops % 3])
        torch.manual_seed(random.randrange(2**32))  # what a new process would find
        code = quest.run(again)
        if code == 0:
            break
        assert code == 130
        assert result_of(wanted)["success"] is False
        stops += 1
    assert stops >= 3
    assert finished(wanted) == whole
    assert count["batches"] == batches  # nothing was done twice


def test_a_signal_while_losses_are_looked_at_loses_nothing(config, interrupt, monkeypatch):
    """It comes after what is due has been decided: no exit without a checkpoint."""
    wanted, looks = config(num_train_epochs=4), []

    def look(device):
        looks.append(1)
        if len(looks) == 2:
            quest.Stop.on_signal(signal.SIGTERM, None)
        return 0.0

    monkeypatch.setattr(quest, "peak_memory", look)
    assert quest.run(wanted) == 143
    saved = torch.load(checkpoint_file(wanted), weights_only=True)
    assert len(saved["rows"]) == 5  # two epochs of two updates, and the one in hand


def test_what_was_published_already_is_published_again(config, monkeypatch):
    """The disk is full at the very last write: --resume has nothing left to train."""
    wanted = config(preview_images=1, preview_every_epochs=1)
    assert quest.run(wanted) == 0
    names = set(snapshot(Path(wanted.output_dir)))
    shutil.rmtree(wanted.output_dir)
    write_result = quest.write_result

    def full(output_dir, success, *rest):
        if success:
            raise OSError(28, "No space left on device")
        write_result(output_dir, success, *rest)

    monkeypatch.setattr(quest, "write_result", full)
    assert quest.run(wanted) == 1
    monkeypatch.setattr(quest, "write_result", write_result)
    assert quest.run(replace(wanted, resume=True)) == 0
    assert "previews/epoch-0002.png" in names
    assert set(snapshot(Path(wanted.output_dir))) == names


def test_a_lost_update_is_done_again_the_same(config, interrupt, monkeypatch):
    """A crash between two checkpoints: the updates since the last one are repeated exactly."""
    wanted = config(checkpointing_steps=3, num_train_epochs=4)
    assert quest.run(wanted) == 0
    whole = finished(wanted)
    compute_loss, calls = quest.compute_loss, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 8:
            raise SystemExit(1)  # leaves the loop without a checkpoint, as kill -9 does
        return compute_loss(*args)

    monkeypatch.setattr(quest, "compute_loss", dying)
    assert quest.run(wanted) == 1
    assert quest.run(replace(wanted, resume=True)) == 0
    assert finished(wanted) == whole


def test_without_a_checkpoint_it_starts_afresh_and_says_so(config, capsys):
    wanted = config()
    assert quest.run(wanted) == 0
    whole = finished(wanted)
    assert quest.run(replace(wanted, resume=True)) == 0
    assert "no checkpoint in" in capsys.readouterr().err
    assert finished(wanted) == whole


def test_training_on_for_longer(config, interrupt):
    longer = config(num_train_epochs=5)
    assert quest.run(longer) == 0
    whole = finished(longer)
    shutil.rmtree(longer.output_dir)
    interrupt(4)
    assert quest.run(config(num_train_epochs=3)) == 130
    interrupt(None)
    assert quest.run(replace(longer, resume=True, gradient_checkpointing=True)) == 0
    assert finished(longer)["result.json"] == whole["result.json"]


def test_another_run_is_refused_with_a_list(config, interrupt, palette, capsys):
    wanted = config(num_train_epochs=4)
    interrupt(9)
    assert quest.run(wanted) == 130
    interrupt(None)
    before = snapshot(Path(wanted.output_dir))
    assert quest.run(config(resume=True, learning_rate=0.5, rank=2, num_train_epochs=4)) == 2
    message = capsys.readouterr().err
    assert "--learning-rate: 0.01, now 0.5" in message and "--rank: 4, now 2" in message
    assert "--seed" not in message and "picture '" not in message
    (palette / "0.png").rename(palette / "new.png")
    shutil.copy(palette / "2.png", palette / "1.png")
    assert quest.run(replace(wanted, resume=True)) == 2
    message = capsys.readouterr().err
    assert all(f"picture '{name}.png'" in message for name in ["0", "new", "1"])
    assert "'2.png'" not in message and "--rank" not in message
    (palette / "new.png").rename(palette / "0.png")
    assert snapshot(Path(wanted.output_dir)) == before
    assert quest.run(replace(wanted, resume=True, max_train_steps=1)) == 2
    assert "picture '1.png'" in capsys.readouterr().err


def test_a_shorter_run_than_the_checkpoint_is_refused(config, interrupt, capsys):
    interrupt(9)
    assert quest.run(config(num_train_epochs=4)) == 130
    assert quest.run(config(resume=True, num_train_epochs=1)) == 2
    assert "the checkpoint is at update 6, this run ends at 2" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"\x80\x04cos\nsystem\n", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_checkpoint_is_named(damage, config, capsys):
    wanted = config(resume=True)
    file = checkpoint_file(wanted)
    file.parent.mkdir(parents=True)
    file.write_bytes(damage)
    assert quest.run(wanted) == 1
    assert f"{file} is damaged" in capsys.readouterr().err
    assert file.read_bytes() == damage


# --- signals and kill -9, on the command ---


def start(wanted, *words, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "quest_7_2.py"), *flags(wanted), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_for(path: Path, process) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training(signum, code, config):
    wanted = config(num_train_epochs=3000, checkpointing_steps=5)
    process = start(wanted)
    wait_for(checkpoint_file(wanted), process)
    sent = time.monotonic()
    process.send_signal(signum)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == code, message
    assert time.monotonic() - sent < 15
    assert "--resume goes on" in message and "Traceback" not in message
    result = result_of(wanted)
    assert result["success"] is False and result["epochsCompleted"] > 0
    assert sorted(os.listdir(wanted.output_dir)) == ["checkpoint", "result.json"]
    kept = os.listdir(checkpoint_file(wanted).parent)
    assert sorted(kept) == ["checkpoint.pt", "loss.csv"]


def test_a_second_signal_stops_at_once(config, interrupt, monkeypatch):
    wanted = config()
    compute_loss = quest.compute_loss

    def twice(*args):
        quest.Stop.on_signal(signal.SIGINT, None)
        quest.Stop.on_signal(signal.SIGINT, None)
        return compute_loss(*args)

    monkeypatch.setattr(quest, "compute_loss", twice)
    assert quest.run(wanted) == 130
    assert os.listdir(wanted.output_dir) == ["result.json"]


@pytest.mark.parametrize("delay", [0.3, 1.0, 2.0, 3.5, 5.0])
def test_a_signal_while_loading(delay, config):
    """During imports, the check of the pictures, or loading: the code, no traceback, no files."""
    wanted = config(num_train_epochs=3000)
    process = start(wanted)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130, message
    assert "Traceback" not in message


def test_kill_nine_at_any_moment(config):
    """20 kills over the whole run, half of them among checkpoints; then resumed to equality."""
    wanted = config(num_train_epochs=12, checkpointing_steps=1, resume=True, lora_dropout=0.2)
    assert run(*flags(wanted)).returncode == 0
    whole = finished(wanted)
    shutil.rmtree(wanted.output_dir)
    rng, mid_write, kills, completions = random.Random(0), 0, 0, 0
    while kills < 20:
        process = start(wanted)
        if kills % 2:
            time.sleep(rng.uniform(0, 7))
        else:
            # Until the checkpoint changes, then into one of the next writes.
            file = checkpoint_file(wanted)
            before = file.stat().st_mtime_ns if file.exists() else 0
            while process.poll() is None:
                if file.exists() and file.stat().st_mtime_ns != before:
                    break
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        kills += 1
        partial = [p for p in Path(wanted.output_dir).rglob("*") if "partial" in p.name]
        mid_write += bool(partial)
        if Path(wanted.output_dir, "result.json").exists() and result_of(wanted)["success"]:
            completions += 1
            assert finished(wanted) == whole
            shutil.rmtree(wanted.output_dir)
    print(f"{kills} kills, {mid_write} in the middle of a write, {completions} after the end")
    done = run(*flags(wanted))
    assert done.returncode == 0, done.stderr
    assert finished(wanted) == whole


# --- faults ---


@pytest.mark.parametrize("limit", [500, 30_000, 1_000_000])
def test_a_full_disk(limit, config):
    """No file may grow past the limit: the earlier seal survives, the message names the file."""
    wanted = config(seed=1)
    assert quest.run(wanted) == 0
    before = finished(wanted)
    changed = config(seed=2, checkpointing_steps=1)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(changed, preexec_fn=full)
    message = process.communicate(timeout=100)[1]
    assert "Traceback" not in message
    after = {name: (Path(wanted.output_dir) / name).read_bytes() for name in SEAL}
    if limit == 1_000_000:
        assert process.returncode == 0
        assert finished(wanted) != before
        return
    assert process.returncode == 1, message
    assert "File too large" in message
    assert limit < 1000 or str(checkpoint_file(wanted)) in message
    assert result_of(wanted)["success"] is False
    assert after == {name: before[name] for name in SEAL}
    assert not [p for p in Path(wanted.output_dir).rglob("*") if "partial" in p.name]


def test_a_disk_that_is_full_at_any_write(config, monkeypatch, capsys):
    """Each write of a run in turn finds the disk full; what was there stays, --resume goes on."""
    earlier = config(seed=1)
    wanted = config(seed=2, checkpointing_steps=1)
    assert quest.run(wanted) == 0
    whole = finished(wanted)
    fsync, writes, faults = os.fsync, {"left": 0}, 0

    def full(descriptor):
        writes["left"] -= 1
        if writes["left"] == 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    while True:
        writes["left"] = -1
        shutil.rmtree(wanted.output_dir)
        assert quest.run(earlier) == 0
        before = finished(earlier)
        quest.write_result(wanted.output_dir, success=False)  # as the command does at its start
        capsys.readouterr()
        writes["left"] = faults + 1
        if quest.run(wanted) == 0:
            break
        faults += 1
        message = capsys.readouterr().err
        assert f"{wanted.output_dir}/" in message and "No space left on device" in message
        left = {name: (Path(wanted.output_dir) / name).read_bytes() for name in SEAL}
        # Only result.json is written after the new seal is in its place.
        is_late = faults > 2 and "/result.json: " in message
        seals = [before] + [whole] * is_late
        assert left in [{name: seal[name] for name in SEAL} for seal in seals]
        assert result_of(wanted)["success"] is False
        assert not [p for p in Path(wanted.output_dir).rglob("*") if "partial" in p.name]
        writes["left"] = -1
        assert quest.run(replace(wanted, resume=True)) == 0
        assert finished(wanted) == whole
    # The first result.json; with each of four updates the checkpoint, loss.csv and result.json; the
    # two adapter files; loss.csv, curve, card and the last result.json.
    # At the start; at each of four updates; the seal twice; six files to publish; at the end.
    assert faults == 1 + 4 * 3 + 2 + 6 + 1


def test_an_output_folder_removed_in_training(config, monkeypatch):
    wanted = config(checkpointing_steps=1)
    compute_loss, calls = quest.compute_loss, []

    def removing(*args):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(wanted.output_dir)
        return compute_loss(*args)

    monkeypatch.setattr(quest, "compute_loss", removing)
    assert quest.run(wanted) == 0
    removed = finished(wanted)
    monkeypatch.undo()
    assert quest.run(wanted) == 0
    assert finished(wanted) == removed


def test_an_output_folder_turned_into_a_file(config, monkeypatch, capsys):
    wanted = config(checkpointing_steps=1)
    compute_loss = quest.compute_loss

    def spoiling(*args):
        if Path(wanted.output_dir).is_dir():
            shutil.rmtree(wanted.output_dir)
            Path(wanted.output_dir).write_text("in the way")
        return compute_loss(*args)

    monkeypatch.setattr(quest, "compute_loss", spoiling)
    assert quest.run(wanted) == 1
    assert wanted.output_dir in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(5, "I/O")])
def test_a_failing_update_keeps_the_work_so_far(error, config, monkeypatch, capsys):
    wanted = config(num_train_epochs=4)
    assert quest.run(wanted) == 0
    whole = finished(wanted)
    shutil.rmtree(wanted.output_dir)
    compute_loss, calls = quest.compute_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 8:
            raise error
        return compute_loss(*args)

    monkeypatch.setattr(quest, "compute_loss", failing)
    assert quest.run(wanted) == 1
    message = capsys.readouterr().err
    assert "--resume goes on" in message
    if isinstance(error, torch.OutOfMemoryError):
        assert "out of memory; what lowers it: --gradient-checkpointing" in message
    assert result_of(wanted)["epochsCompleted"] == 2
    assert quest.run(replace(wanted, resume=True)) == 0
    assert finished(wanted) == whole
    assert len(calls) == 8 + 12 - 6  # the failed update was done again, nothing else


def test_a_loss_that_is_not_finite_names_the_update(config, capsys, monkeypatch):
    compute_loss, calls = quest.compute_loss, []

    def spoiling(*args):
        calls.append(1)
        loss = compute_loss(*args)
        return loss * float("nan") if len(calls) == 5 else loss

    monkeypatch.setattr(quest, "compute_loss", spoiling)
    wanted = config(checkpointing_steps=2, num_train_epochs=4)
    assert quest.run(wanted) == 1
    message = capsys.readouterr().err
    assert "loss not finite at update 3;" in message
    saved = torch.load(checkpoint_file(wanted), weights_only=True)
    assert len(saved["rows"]) == 2
    assert all(tensor.isfinite().all() for tensor in saved["lora"].values())


def test_an_overflow_that_the_scaler_handles_is_no_failure(config, monkeypatch):
    """fp16 gradients that overflow skip their update and lower the scale."""
    scales, scaler = [], torch.amp.GradScaler

    def eager(*args, **options):
        made = scaler(*args, **options, init_scale=2.0**40)
        scales.append(made)
        return made

    monkeypatch.setattr(torch.amp, "GradScaler", eager)
    assert quest.run(config(mixed_precision="fp16", num_train_epochs=30)) == 0
    assert 0 < scales[0].get_scale() < 2.0**40


# --- input that is odd but good, or bad in an unusual way ---


def test_odd_pictures_train(config, palette):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "green", "blue")]
    frames[0].save(palette / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(palette / "moving.webp", save_all=True, append_images=frames[1:])
    Image.new("L", (1, 1)).save(palette / "one.png")
    Image.new("RGB", (20_000, 20), "blue").save(palette / "long.png")
    (palette / ".hidden.png").write_text("never looked at")
    (palette / "notes.txt").write_text("no picture")
    (palette / "linked.png").symlink_to(palette / "0.png")
    (palette / "loop").symlink_to(palette)
    shutil.copy(palette / "0.png", palette / "имя с пробелом\nи строкой.png")
    dataset, _, digests = quest.load_pictures(config())
    assert len(dataset) == len(digests) == 9
    assert quest.run(config(num_train_epochs=1)) == 0


def test_two_runs_at_once(config):
    wanted = config(num_train_epochs=3000)
    first = start(wanted)
    wait_for(Path(wanted.output_dir), first)
    second = run(*flags(wanted))
    assert second.returncode == 2 and "in use by another run" in second.stderr
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode == 130
