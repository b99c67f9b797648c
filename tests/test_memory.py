"""Operations and bytes that can be counted without a GPU."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import prepared, read_csv
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from test_training import train
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import quest_7_2 as quest

SD14 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}


@pytest.mark.parametrize("side, limit", [(32, 365e9), (64, None)])
def test_operations_of_a_step_on_stable_diffusion_1(side, limit):
    """On the meta device, which computes shapes only: 860 million weights without their memory.

    The UNet's own forward and backward is what a plain UNet does when only the gradient by its
    activations is asked for; LoRA's matrices may add 2 % to that.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD14).requires_grad_(False)
        batch = {
            "latents": torch.randn(1, 4, side, side),
            "noise": torch.randn(1, 4, side, side),
            "timesteps": torch.zeros(1, dtype=torch.long),
            "prompt_embeds": torch.randn(1, 77, 768),
        }

    class Schedule:  # the real one looks its numbers up, which meta tensors have not
        config = DDPMScheduler().config

        def add_noise(self, latents, noise, timesteps):
            return latents + noise

    latents = batch["latents"].clone().requires_grad_()
    with FlopCounterMode(display=False) as own:
        sample = unet(latents, batch["timesteps"], encoder_hidden_states=batch["prompt_embeds"])[0]
        sample.sum().backward()
    config = quest.LoraConfig(
        r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    with torch.device("meta"):
        unet = get_peft_model(unet, config).train()
    with FlopCounterMode(display=False) as step:
        quest.compute_loss(unet, Schedule(), batch).sum().backward()
    own, step = own.get_total_flops(), step.get_total_flops()
    print(f"{side * 8}²: a plain UNet {own / 1e9:.1f}, a step {step / 1e9:.1f} GFLOP")
    assert step <= 1.02 * own
    if limit:
        assert step <= 1.02 * limit


def lora_on_meta(dtype: torch.dtype):
    """Stable Diffusion 1.4's UNet with LoRA, without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD14).to(dtype).requires_grad_(False)
        config = quest.LoraConfig(
            r=16, lora_dropout=0.05, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
        )
        return get_peft_model(unet, config).train()


def fake(unet, mode: FakeTensorMode, device: str) -> None:
    """Let its meta tensors pass for a device's, of which there need be none."""
    for module in unet.modules():
        for name, weight in module.named_parameters(recurse=False):
            wrapped = FakeTensor(mode, weight.data, torch.device(device))
            module._parameters[name] = torch.nn.Parameter(wrapped, weight.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = FakeTensor(mode, buffer, torch.device(device))


def kept_for_backward(forward) -> list[torch.Tensor]:
    """Every tensor kept for the backward pass: by autograd, by what the frozen layers' own hooks
    pack, and by those hooks themselves, which live as long as the graph."""
    kept, hooks = [], torch.autograd.graph.saved_tensors_hooks

    def watch(found):
        """A tensor, or a function that makes one: what it holds."""
        if isinstance(found, partial):
            inner = [*found.args, *found.keywords.values()]
        else:
            inner = [cell.cell_contents for cell in getattr(found, "__closure__", None) or ()]
        kept.extend(t for t in [found, *inner] if isinstance(t, torch.Tensor))

    def watched(pack, unpack):
        watch(pack)
        watch(unpack)

        def packing(tensor):
            packed = pack(tensor)
            watch(packed)
            return packed

        return hooks(packing, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
        with watched(lambda tensor: tensor, lambda tensor: tensor):
            forward()
    return kept


def saved_for_backward(unet, forward) -> int:
    """Bytes of all storages kept for the backward pass that are not weights."""
    weights = {t.untyped_storage()._cdata for t in [*unet.parameters(), *unet.buffers()]}
    storages = [tensor.untyped_storage() for tensor in kept_for_backward(forward)]
    found = {storage._cdata: storage.nbytes() for storage in storages}
    return sum(size for key, size in found.items() if key not in weights)


@pytest.mark.parametrize(
    "side, checkpointing, limit", [(32, False, 260e6), (32, True, 36e6), (64, True, 143e6)]
)
def test_saved_for_backward_on_stable_diffusion_1(side, checkpointing, limit):
    """In bf16 on fake tensors, which have shapes and dtypes but neither numbers nor memory."""
    unet = lora_on_meta(torch.bfloat16)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake(unet, mode, "cpu")
        quest.slim_frozen_layers(unet, fp8=False)
        batch = {
            "latents": torch.randn(1, 4, side, side),
            "noise": torch.randn(1, 4, side, side),
            "timesteps": torch.zeros(1, dtype=torch.long),
            "prompt_embeds": torch.randn(1, 77, 768),
        }

        def forward():
            casts = disable_input_dtype_casting(unet, True)
            with casts, torch.autocast("cpu", torch.bfloat16):
                return quest.compute_loss(unet, DDPMScheduler(), batch)

        kept = saved_for_backward(unet, forward)
    print(f"{side * 8}², checkpointing {checkpointing}: {kept / 1e6:.1f} MB")
    assert 1e6 < kept <= limit


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("pixels", [8, 16], ids=["as a matrix product", "as a convolution"])
@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 2, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_slim_convolution_is_the_same_convolution(fp8, pixels, kernel, stride, padding, bias):
    """Output and gradient by the input, for both ways it is computed; the input is not kept."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, kernel, stride, padding, bias=bias)
    ).requires_grad_(False)
    x = torch.randn(1 if pixels == 8 else 2, 3, pixels, pixels, requires_grad=True)
    plain, slim = layers[0], torch.nn.Sequential(layers[0])
    reference = torch.nn.Conv2d(3, 5, kernel, stride, padding, bias=bias).requires_grad_(False)
    reference.load_state_dict(plain.state_dict())
    quest.slim_frozen_layers(slim, fp8=fp8)
    if fp8:
        reference.weight.data = plain.weight8.float() * plain.scale
    grad = torch.randn(reference(x).shape)
    (wanted,) = torch.autograd.grad(reference(x), x, grad)
    (found,) = torch.autograd.grad(slim(x), x, grad)
    torch.testing.assert_close(slim(x), reference(x))
    torch.testing.assert_close(found, wanted)
    assert saved_for_backward(slim, lambda: slim(x)) == 0
    assert saved_for_backward(reference, lambda: reference(x)) == x.nbytes


def wide_weights(unet) -> int:
    tensors = [*unet.parameters(), *unet.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if not t.requires_grad)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fp8_base_trains(precision, checkpointing, config):
    options = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
    wanted = config(fp8_base=True, preview_images=1, num_train_epochs=4, **options)
    adapter = train(wanted)
    assert all(weight.dtype == torch.float32 for weight in adapter.values())
    assert any(adapter[key].abs().max() > 0.01 for key in adapter if "lora_B" in key)
    losses = [read_csv(wanted)[-1]["loss"]]
    train(config(fp8_base=False, num_train_epochs=4, **options))
    losses.append(read_csv(wanted)[-1]["loss"])
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=0.05)
    assert losses[0] != losses[1]


def test_fp8_numbers(config):
    """Each weight to 4 bits: e4m3 has three after the leading one, so 1/16 of it is lost at most."""
    run = prepared(config(lora_dropout=0.0))
    plain, narrow = run.unet().eval(), run.unet().eval()
    for unet in (plain, narrow):
        torch.manual_seed(1)
        for parameter in unet.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    quest.slim_frozen_layers(narrow, fp8=True)
    for one, other in zip(plain.modules(), narrow.modules(), strict=True):
        if hasattr(other, "weight8"):
            assert other.weight8.dtype == torch.float8_e4m3fn
            wide = other.weight8.float() * other.scale
            largest = one.weight.flatten(1).abs().amax(1).view_as(other.scale)
            assert ((wide - one.weight).abs() <= one.weight.abs() / 16 + largest / 448 / 8).all()
    adapted = [m for m in narrow.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert all(hasattr(m, "weight8") or m.weight.requires_grad for m in adapted)

    # Its gradients are those of a UNet that has the rounded weights as they are.
    rounded = run.unet().eval()
    rounded.load_state_dict(plain.state_dict())
    for one, other in zip(rounded.modules(), narrow.modules(), strict=True):
        if hasattr(other, "weight8"):
            one.weight.data = other.weight8.float() * other.scale
    batch = run.batch(0, 1)
    gradients = []
    for unet in (narrow, rounded, plain):
        loss = quest.compute_loss(unet, run.noise_scheduler, batch).mean()
        lora = [p for p in unet.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, lora)
        gradients.append(torch.cat([g.flatten() for g in found]))
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 1e-5
    assert 1e-3 < (gradients[0] - gradients[2]).norm() / gradients[2].norm() < 0.3


def test_fp8_keeps_no_wide_weight(config):
    """What is saved for the backward pass: the 8-bit weights, never a widened one."""
    run = prepared(config(fp8_base=True, lora_dropout=0.0))
    unet = run.unet()
    layers = [m for m in unet.modules() if hasattr(m, "weight8")]
    batch = run.batch(0)
    saved = kept_for_backward(lambda: quest.compute_loss(unet, run.noise_scheduler, batch))
    for layer in (layer for layer in layers if layer.weight8.ndim == 2):
        wide = layer.weight8.float() * layer.scale
        alike = [
            t for t in saved if t.shape in (wide.shape, wide.T.shape) and t.is_floating_point()
        ]
        assert not any(torch.allclose(t.float(), w) for t in alike for w in (wide, wide.T)
                       if t.shape == w.shape and t.dtype != torch.float8_e4m3fn)  # fmt: skip


def test_fp8_halves_the_resident_bytes():
    """Stable Diffusion 1.4's architecture on the meta device, against its fp16 bytes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD14).to(torch.float16).requires_grad_(False)
        before = wide_weights(unet)
        quest.slim_frozen_layers(unet, fp8=True)
    share = wide_weights(unet) / before
    print(f"{share:.3f} of fp16's {before / 2**20:.0f} MiB")
    assert share <= 0.55


def test_saved_files_of_an_fp8_run_are_plain(config):
    wanted = config(fp8_base=True)
    train(wanted)
    for name in ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"]:
        tensors = load_file(Path(wanted.output_dir) / name)
        assert all(t.dtype == torch.float32 for t in tensors.values())


def test_lora_inputs_are_not_widened(config):
    """PEFT's cast to float32 would keep every LoRA input twice as wide for the backward pass."""
    run = prepared(config(lora_dropout=0.0), torch.bfloat16)
    unet = run.unet().train()
    batch = run.batch(0)

    def saved_bytes(without_casts: bool) -> int:
        def forward():
            with torch.autocast("cpu", torch.bfloat16):
                quest.compute_loss(unet, run.noise_scheduler, batch)

        with disable_input_dtype_casting(unet, without_casts):
            return saved_for_backward(unet, forward)

    assert saved_bytes(True) < saved_bytes(False)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_run_does_not_widen_them(precision, config, monkeypatch):
    compute_loss, found = quest.compute_loss, []

    def spy(unet, *args):
        layers = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
        found.append({layer.cast_input_dtype_enabled for layer in layers})
        return compute_loss(unet, *args)

    monkeypatch.setattr(quest, "compute_loss", spy)
    train(config(mixed_precision=precision))
    assert found and all(casts == {precision == "no"} for casts in found)


@pytest.mark.parametrize(
    "dtype, checkpointing, fp8",
    [
        (torch.float16, False, False),
        (torch.float16, True, True),
        (torch.bfloat16, True, False),
        (torch.float32, False, True),
    ],
)
def test_the_loss_on_a_pretended_gpu(dtype, checkpointing, fp8, monkeypatch):
    """Forward pass and loss with every weight and input on "cuda:0": nothing is left on the CPU, no
    two dtypes disagree. (Fake tensors know devices and dtypes; there is no GPU, nor a backward.)"""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    unet = lora_on_meta(dtype)
    for name, weight in unet.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    if checkpointing:
        unet.enable_gradient_checkpointing()

    class Schedule:  # the real one copies its numbers to the device, which is not there
        config = DDPMScheduler().config

        def add_noise(self, latents, noise, timesteps):
            return latents + noise

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        quest.slim_frozen_layers(unet, fp8)
        fake(unet, mode, "cuda:0")
        shapes = {"latents": (2, 4, 32, 32), "noise": (2, 4, 32, 32), "prompt_embeds": (2, 77, 768)}
        batch = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        batch["timesteps"] = torch.zeros(2, dtype=torch.long, device="meta")
        batch = {key: FakeTensor(mode, t, torch.device("cuda:0")) for key, t in batch.items()}
        is_half = dtype is not torch.float32
        with (
            disable_input_dtype_casting(unet, is_half),
            torch.autocast("cuda", dtype, enabled=is_half),
        ):
            losses = quest.compute_loss(unet, Schedule(), batch)
    assert (losses.shape, losses.dtype, losses.device.type) == ((2,), torch.float32, "cuda")
    assert losses.requires_grad
