"""LoRA files of many makers: an adapter has all that the file says, or the file is refused with the reason."""

import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import torch
from safetensors.torch import save_file

from conftest import all_bits, same_bits
from pipelines import flux, stable_diffusion
from shira import DataError
from shira.integrations.diffusers_loras import convert
from shira.integrations.diffusers_sampling import modules_of

ONE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TWO = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV, SHORTCUT = "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut"
TEXT, TEXT_OUT = "encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj"


def key_of(name):
    return ("lora_te_text_model_" if name in (TEXT, TEXT_OUT) else "lora_unet_") + name.replace(".", "_")


def kohya(pipe, layers):
    """A file's tensors with random values, and what they add: name of a layer -> (rank, alpha or None)."""
    torch.manual_seed(1)
    file, added = {}, {}
    for name, (rank, alpha) in layers.items():
        component, key = ("text_encoder" if name in (TEXT, TEXT_OUT) else "unet"), key_of(name)
        weight = getattr(pipe, component).get_submodule(name).weight
        down, up = torch.randn(rank, *weight.shape[1:]), torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        file |= {} if alpha is None else {f"{key}.alpha": torch.tensor(float(alpha))}
        scale = 1 if alpha is None else alpha / rank
        added[f"{component}.{name}.weight"] = scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return file, added


@pytest.mark.parametrize(
    "layers",
    [
        {ONE: (2, 1), TWO: (2, 7)},
        {ONE: (2, 1), TWO: (2, None)},
        {ONE: (1, 1), TWO: (4, 2), TEXT: (2, 5), TEXT_OUT: (1, 3)},
        {ONE: (2, 2), TWO: (4, 4), CONV: (1, 1)},
        {ONE: (2, 2), TWO: (2, 2), CONV: (2, 1), SHORTCUT: (2, 1)},  # LoCon with an alpha of its own for convolutions
        {ONE: (2, 0), TWO: (2, 1)},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_has_its_own_scale(tmp_path, layers, dtype):
    pipe = stable_diffusion()
    file, added = kohya(pipe, layers)
    file = {name: value.to(dtype) for name, value in file.items()}
    save_file(file, tmp_path / "lora.safetensors")
    adapter = convert(tmp_path / "lora.safetensors", pipe, density=1.0)
    added = {name: value for name, value in added.items() if value.any()}
    assert adapter.tensors.keys() == added.keys()
    for name, tensor in adapter.tensors.items():
        error = 1e-5 if dtype == torch.float32 else 0.05
        assert torch.allclose(tensor.values, added[name].flatten()[tensor.indices.long()], atol=error, rtol=error), name


def test_a_pipeline_in_bfloat16(tmp_path):
    pipe = stable_diffusion().to(torch.bfloat16)
    file, added = kohya(pipe, {ONE: (2, 1), TWO: (2, 9)})
    save_file({name: value.float() for name, value in file.items()}, tmp_path / "lora.safetensors")
    adapter = convert(tmp_path / "lora.safetensors", pipe, density=1.0)
    for name, value in added.items():
        found = torch.zeros(value.numel())
        found[adapter.tensors[name].indices.long()] = adapter.tensors[name].values
        assert float((found - value.flatten()).norm() / value.norm()) < 0.02, name


def test_layers_that_diffusers_cuts_into_several(tmp_path):
    """Flux in kohya's names: q, k and v are one layer there, and alpha goes into the factors."""
    pipe = flux()
    width = pipe.transformer.inner_dim
    torch.manual_seed(1)
    down, up = torch.randn(4, width), torch.randn(3 * width, 4)
    file = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": up,
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(3.0),
    }
    save_file(file, tmp_path / "lora.safetensors")
    adapter = convert(tmp_path / "lora.safetensors", pipe, density=1.0)
    parts = [f"transformer.transformer_blocks.0.attn.to_{each}.weight" for each in "qkv"]
    assert sorted(adapter.tensors) == sorted(parts)
    for name, added in zip(parts, (0.75 * up @ down).chunk(3), strict=True):
        tensor = adapter.tensors[name]
        assert torch.allclose(tensor.values, added.flatten()[tensor.indices.long()], atol=1e-4), name
    more = {name.replace("blocks_0", "blocks_9"): value.clone() for name, value in file.items()}
    save_file(file | more, tmp_path / "more.safetensors")
    with pytest.raises(DataError):
        convert(tmp_path / "more.safetensors", pipe, density=1.0)


def test_a_file_that_would_lose_something_is_refused(tmp_path):
    """Nothing is dropped without a word, and the pipeline is as it was."""
    pipe = stable_diffusion()
    before = all_bits(modules_of(pipe))
    plain, _ = kohya(pipe, {ONE: (2, 1)})
    unknown = {
        name.replace("down_blocks_1", f"down_blocks_{number}"): value.clone()
        for number in range(3, 13)
        for name, value in plain.items()
    }
    text, _ = kohya(pipe, {TEXT: (2, 1)})
    second = {name.replace("lora_te_", "lora_te2_"): value for name, value in text.items()}
    key = key_of(ONE)
    other = {
        "dora_scale": ({f"{key}.dora_scale": torch.ones(16, 1)}, "DoRA with dora_scale is not supported"),
        "LoHa": ({f"{key}.hada_w1_a": torch.ones(16, 2)}, "LoHa is not supported, found tensor 'lora_unet_down"),
        "LoKr": ({f"{key}.lokr_w1": torch.ones(4, 4)}, "LoKr is not supported"),
        "diff": ({f"{key}.diff": torch.ones(16, 16)}, "a full difference of weights is not supported"),
        "mid": ({f"{key}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "LoCon with lora_mid is not supported"),
        "unknown": (unknown, "1 of 11 layers of .*unknown.safetensors belong to this pipeline.*'lora_unet_down_blocks_10_"),
        "text": (second, "changes text_encoder_2, which this pipeline does not have: 'lora_te2_text_model"),
    }
    cases = {name: (plain | more, words) for name, (more, words) in other.items()}
    half = {name: value for name, value in plain.items() if "lora_up" not in name}
    cases |= {
        "all unknown": (unknown, "cannot put .* give the pipeline that it was trained on"),
        "half": (half, f"'{key}.lora_down.weight' needs '{key}.lora_up.weight', which is not there"),
        "ranks": (half | {f"{key}.lora_up.weight": torch.ones(16, 3)}, r"of one rank .* found .*\[2, 16\].*\[16, 3\]"),
        "zero": ({name: 0 * value for name, value in plain.items()}, "the LoRA changes nothing, all of its 1 layers are zero"),
        "nan": ({name: torch.nan * value for name, value in plain.items()}, "holds NaN or infinity"),
        "nothing": ({"x": torch.ones(1)}, "holds no LoRA: expected tensors such as NAME.lora_down.weight, found .*'x'"),
    }
    for name, (tensors, words) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(DataError, match=words):
            convert(tmp_path / f"{name}.safetensors", pipe, density=1.0)
        assert same_bits(before, all_bits(modules_of(pipe))), name
    pipe.text_encoder = None
    save_file(plain | text, tmp_path / "both.safetensors")
    with pytest.raises(
        DataError, match=r"both.safetensors changes text_encoder, which this pipeline does not have.*found unet"
    ):
        convert(tmp_path / "both.safetensors", pipe, density=1.0)
    save_file(plain, tmp_path / "plain.safetensors")
    with pytest.raises(DataError):
        convert(tmp_path / "plain.safetensors", flux(), density=1.0)


def test_a_file_that_is_not_whole(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    pipe = stable_diffusion()
    file, _ = kohya(pipe, {ONE: (2, 1)})
    save_file(file, "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:200])
    (tmp_path / "zero.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text(json.dumps({"no": "LoRA"}))
    for name in ("cut", "zero", "text"):
        with pytest.raises(DataError, match=f"{name}.safetensors is not a whole safetensors file"):
            convert(tmp_path / f"{name}.safetensors", pipe, density=1.0)
        code, _, err = run(f"convert {name}.safetensors --base pipeline --keep 0.9 -o out.safetensors")
        assert code == 1 and f"{name}.safetensors is not a whole safetensors file" in " ".join(err.split()), err


def test_a_folder_with_several_files(tmp_path):
    pipe = stable_diffusion()
    for name, layer in {"b": ONE, "a": CONV}.items():
        save_file(kohya(pipe, {layer: (2, 1)})[0], tmp_path / f"{name}.safetensors")
    with pytest.raises(
        DataError, match="no pytorch_lora_weights.safetensors in the folder .* 'a.safetensors', 'b.safetensors'"
    ):
        convert(tmp_path, pipe, density=1.0)
    (tmp_path / "b.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert list(convert(tmp_path, pipe, density=1.0).tensors) == [f"unet.{ONE}.weight"]
