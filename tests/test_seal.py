"""The saved files, each loaded as its readers load it, with the same effect on the UNet."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import prepared
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from peft.utils import save_and_load
from safetensors import safe_open
from safetensors.torch import load_file

import quest_7_2 as quest


@pytest.fixture
def seal(config) -> Path:
    wanted = config()
    assert quest.run(wanted) == 0
    return Path(wanted.output_dir)


def base_unet(model) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model / "unet").eval()


@torch.no_grad()
def output(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    embeds = torch.randn(2, 77, 16, generator=generator)
    return unet(sample, 500, encoder_hidden_states=embeds).sample


def merge_by_kohya_rule(unet, file: Path) -> None:
    """weight += up @ down × alpha / rank, keys matched as the UIs match them."""
    tensors = load_file(file)
    modules = {"lora_unet_" + n.replace(".", "_"): m for n, m in unet.named_modules()}
    stems = {key.split(".")[0] for key in tensors}
    assert len(tensors) == 3 * len(stems)
    for stem in stems:
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        scale = tensors[f"{stem}.alpha"].item() / down.shape[0]
        modules[stem].weight.data += scale * up @ down


def test_every_reader_gets_the_same_effect(seal, model):
    base = output(base_unet(model))
    with_peft = output(PeftModel.from_pretrained(base_unet(model), seal).eval())
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(seal)
    with_diffusers = output(pipe.unet)
    merged = base_unet(model)
    merge_by_kohya_rule(merged, seal / "pytorch_lora_weights.safetensors")
    effect = with_peft - base
    assert effect.norm() > 0.01 * base.norm()
    assert (with_diffusers - with_peft).norm() < 1e-4 * effect.norm()
    assert (output(merged) - with_peft).norm() < 1e-3 * effect.norm()
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.unet), base)


def test_the_file_for_the_uis(seal):
    with safe_open(seal / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    alphas = [t for key, t in tensors.items() if key.endswith(".alpha")]
    assert len(alphas) == len(tensors) // 3 == 32
    assert all(t.shape == () and t.dtype == torch.float32 and t == 8.0 for t in alphas)
    assert any("_to_out_0." in key for key in tensors)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8.0")
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_v2"] == "False"
    assert "lora_adapter_metadata" not in metadata


def test_nothing_of_the_users_folders_is_in_the_seal(seal, palette, model):
    for path in seal.iterdir():
        if path.name != "result.json":
            content = path.read_bytes()
            for secret in [str(palette), str(model), palette.name.encode().hex()]:
                assert secret.encode() not in content, path.name


def test_the_peft_config(seal):
    saved = json.loads((seal / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (4, 8.0, 0.05)
    assert saved["target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    assert saved["bias"] == "none"


def test_a_seal_that_does_not_load_is_no_success(config, capsys, monkeypatch):
    """A file that has lost half its strength, or all of it, is found before it is published."""
    pack = quest.pack_safetensors
    for factor in [0.5, 0.0]:

        def broken(tensors, metadata, factor=factor):
            scaled = {k: t * factor if "alpha" in k else t for k, t in tensors.items()}
            return pack(scaled, metadata)

        monkeypatch.setattr(quest, "pack_safetensors", broken)
        wanted = config()
        assert quest.run(wanted) == 1
        assert "does not do what was trained" in capsys.readouterr().err
        assert {p.name for p in Path(wanted.output_dir).iterdir()} == {"result.json", "checkpoint"}
        shutil.rmtree(wanted.output_dir)


def test_a_seal_of_nan_is_no_success(config, tmp_path):
    """As the last update may leave it, when the loss before it was fine."""
    wanted = config()
    cache, unet = prepared(wanted), prepared(wanted).unet()
    lora = [weight for weight in unet.parameters() if weight.requires_grad]
    lora[0].data.fill_(math.nan)
    quest.save_seal(tmp_path, unet, wanted, "epsilon")
    with pytest.raises(quest.Trouble, match="does not do what was trained"):
        quest.check_seal(unet, tmp_path, cache.caption_embeds[0])


def test_saving_asks_the_hub_nothing(config, tmp_path, monkeypatch):
    """PEFT would, of a base model that has a hub id."""
    asked = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *a: asked.append(a))
    wanted = config()
    unet = prepared(wanted).unet()
    quest.save_seal(tmp_path, unet, replace(wanted, model_id="someone/a-model"), "epsilon")
    assert "someone/a-model" in (tmp_path / "adapter_config.json").read_text() and not asked


def test_importing_does_not_run():
    command = [sys.executable, "-c", "import quest_7_2"]
    subprocess.run(command, cwd=Path(quest.__file__).parent, timeout=100, check=True)
