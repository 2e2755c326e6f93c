"""LoRA files for Diffusers' pipelines become sparse adapters, on tiny random pipelines."""

import json

import pytest

pytest.importorskip("diffusers")

import torch
from safetensors.torch import load_file, save_file

import shira
from conftest import all_bits, same_bits
from pipelines import pipe_adapter, sd3, sdxl, stable_diffusion
from shira import AdapterError, DataError, FormatError, MaskError
from shira.integrations.diffusers import PipelineAdapters
from shira.integrations.diffusers_loras import convert
from shira.integrations.diffusers_sampling import modules_of, sample

peft = pytest.importorskip("peft")

FILE = "pytorch_lora_weights.safetensors"


def lora(folder, make=stable_diffusion, text=True):
    """A random LoRA that Diffusers saves in a folder; and the picture of the pipeline with it fused."""
    pipe = make()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "conv1", "q_proj"], init_lora_weights=False)
    parts = (
        {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        if make is stable_diffusion
        else {"transformer": pipe.transformer}
    )
    layers = {}
    for name, part in parts.items() if text else [next(iter(parts.items()))]:
        part.add_adapter(config, "made")
        layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(part, adapter_name="made")
        layers[f"{name}_lora_adapter_metadata"] = part.peft_config["made"].to_dict()
    pipe.save_lora_weights(folder, **layers)
    pipe = make()
    pipe.load_lora_weights(folder)
    pipe.fuse_lora(components=list(pipe.get_list_adapters()))
    pipe.unload_lora_weights()
    return drawn(pipe)


def drawn(pipe):
    return sample(pipe, "red", 0, steps=2).tobytes()


def inner(name, prefix):
    return name if prefix == "unet" or name.startswith("text_model.") else f"text_model.{name}"


@pytest.mark.parametrize(("make", "prefixes"), [(stable_diffusion, ["te"]), (sdxl, ["te1", "te2"])])
def test_a_lora_of_kohya_becomes_what_it_adds(tmp_path, make, prefixes):
    """Names as in most files that people share: lora_unet_down_blocks_0_…, lora_te_text_model_…; with alpha."""
    pipe = make()
    components = dict(zip(["unet", "text_encoder", "text_encoder_2"], ["unet", *prefixes], strict=False))
    file, added = {}, {}
    torch.manual_seed(1)
    for component, prefix in components.items():
        for name, module in getattr(pipe, component).named_modules():
            if any(part in f"{name}." for part in (".to_q.", ".to_out.0.", ".proj_in.", ".q_proj.", ".out_proj.", ".fc1.")):
                weight, key = module.weight, f"lora_{prefix}_{inner(name, prefix)}".replace(".", "_")
                down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, *[1] * (weight.ndim - 2))
                file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
                added[f"{component}.{name}.weight"] = (0.5 * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    save_file(file, tmp_path / "kohya.safetensors")
    adapter = convert(tmp_path / "kohya.safetensors", pipe, density=1.0)
    assert adapter.tensors.keys() == added.keys() and len({name.partition(".")[0] for name in added}) == len(components)
    for name, tensor in adapter.tensors.items():
        assert torch.allclose(tensor.values, added[name].flatten()[tensor.indices.long()], atol=1e-5), name


@pytest.mark.parametrize("make", [stable_diffusion, sd3])
def test_all_entries_of_a_lora_draw_its_picture_and_the_pipeline_is_the_base(tmp_path, make):
    fused, pipe = lora(tmp_path, make), make()
    plain, before = drawn(pipe), all_bits(modules_of(pipe))
    adapter = convert(tmp_path / FILE, pipe, density=1.0, name="style")
    assert same_bits(before, all_bits(modules_of(pipe))) and drawn(pipe) == plain
    assert {name.partition(".")[0] for name in adapter.tensors} == (
        {"unet", "text_encoder"} if make is stable_diffusion else {"transformer"}
    )
    adapters = PipelineAdapters(pipe)
    adapters.load(adapter)
    adapters.set("style")
    assert max(abs(one - other) for one, other in zip(drawn(pipe), fused, strict=True)) <= 1 and fused != plain
    adapters.disable()
    assert same_bits(before, all_bits(modules_of(pipe)))


def test_the_command_keeps_the_largest_entries(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    lora("lora", text=False)
    stable_diffusion().save_pretrained("pipeline")
    code, out, err = run("convert lora --base pipeline --keep 0.9 -o style.safetensors")
    assert code == 0 and "90." in out and "No LoRA keys" not in err, err
    adapter = shira.load("style.safetensors")
    assert adapter.name == "lora" and adapter.metadata["base"] == {"id": "pipeline", "dtype": "float32"}
    held = {name: tensor for name, tensor in stable_diffusion().unet.state_dict().items() if f"unet.{name}" in adapter.tensors}
    assert 0 < adapter.nnz < sum(tensor.numel() for tensor in held.values())
    assert PipelineAdapters(stable_diffusion()).load("style.safetensors") == "lora"
    for line, words in {
        "convert lora -o other.safetensors": "lora is a LoRA for a Diffusers pipeline: give the pipeline, --base",
        "convert lora --base pipeline -o other.safetensors": "say how many to take, by --density 0.01",
        f"inspect lora/{FILE}": "it is a LoRA for a Diffusers pipeline, which has to be converted: `shira convert lora/pytorch",
        "inspect lora": "which has to be converted: `shira convert lora --base PIPELINE --keep 0.9 -o adapter.safetensors`",
    }.items():
        code, _, err = run(line)
        assert code == 1 and words in " ".join(err.split()) and "loading" not in err, err


def test_what_cannot_be_converted_changes_nothing(tmp_path):
    lora(tmp_path, text=False)
    pipe = stable_diffusion()
    before = all_bits(modules_of(pipe))
    broken = load_file(tmp_path / FILE)
    save_file({name: torch.cat([value, value]) for name, value in broken.items()}, tmp_path / "wide.safetensors")
    save_file({"x.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    text = {
        "text_encoder.elsewhere.q_proj.lora_A.weight": torch.ones(2, 4),
        "text_encoder.elsewhere.q_proj.lora_B.weight": torch.ones(4, 2),
    }
    save_file(text, tmp_path / "elsewhere.safetensors")  # an IndexError in Diffusers
    (tmp_path / "text.safetensors").write_text(json.dumps({"no": "LoRA"}))
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in broken.items()}, tmp_path / "float8.safetensors")
    with pytest.raises(DataError, match="dtype 'F8_E4M3' is unknown here; save it in bfloat16 or float32"):
        convert(tmp_path / "float8.safetensors", pipe, keep=0.5)
    for given, error in {
        tmp_path / "none.safetensors": DataError,
        tmp_path / "wide.safetensors": DataError,
        tmp_path / "other.safetensors": DataError,
        tmp_path / "elsewhere.safetensors": DataError,
        tmp_path / "text.safetensors": DataError,
        5: FormatError,
    }.items():
        with pytest.raises(error):
            convert(given, pipe, keep=0.5)
        assert same_bits(before, all_bits(modules_of(pipe))) and not any(pipe.get_list_adapters().values())
    with pytest.raises(MaskError, match="density"):
        convert(tmp_path, pipe)
    with pytest.raises(AdapterError, match="scope"):
        convert(tmp_path, pipe, keep=0.5, scope="all")
    adapters = PipelineAdapters(pipe)
    adapters.load(pipe_adapter(pipe, 1), "one")
    adapters.set("one")
    with pytest.raises(DataError, match="PipelineAdapters has 'one' active"):
        convert(tmp_path, pipe, keep=0.5)
    adapters.disable()
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(DataError, match="holds a LoRA already"):
        convert(tmp_path, pipe, keep=0.5)
    pipe.unload_lora_weights()
    assert same_bits(before, all_bits(modules_of(pipe)))


def test_a_compiled_or_an_offloaded_pipeline_is_refused_as_it_is(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    lora(tmp_path, text=False)
    pipe = stable_diffusion()
    plain, before = pipe.unet, all_bits(modules_of(pipe))
    block = plain.mid_block
    pipe.unet = torch.compile(plain, backend="eager")
    with pytest.raises(DataError, match="pipe.unet is compiled"):
        convert(tmp_path, pipe, keep=0.5)
    pipe.unet = plain
    plain.mid_block = torch.compile(block, backend="eager")
    with pytest.raises(DataError, match="pipe.unet.mid_block is compiled"):
        convert(tmp_path, pipe, keep=0.5)
    plain.mid_block = block
    accelerate.cpu_offload(plain, "cpu")  # enable_sequential_cpu_offload, without an accelerator
    with pytest.raises(DataError, match=r"'unet.conv_in.weight' has no data here.*remove_all_hooks\(\)"):
        convert(tmp_path, pipe, keep=0.5)
    accelerate.hooks.remove_hook_from_module(plain, recurse=True)
    assert same_bits(before, all_bits(modules_of(pipe))) and not any(pipe.get_list_adapters().values())
    assert convert(tmp_path, pipe, keep=0.5).nnz


def test_a_file_of_two_kinds_of_names_is_answered_with_how_to_rename_it(tmp_path):
    """So Diffusers' own scripts save a LoRA of attention and convolutions, of which Diffusers then reads a part."""
    lora(tmp_path, text=False)
    tensors, pipe = load_file(tmp_path / FILE), stable_diffusion()
    older = {"lora_A": "lora.down", "lora_B": "lora.up"}
    for name in [name for name in tensors if ".attn1." in name or ".attn2." in name]:
        kind = name.split(".")[-2]
        tensors[name.replace(kind, older[kind])] = tensors.pop(name)
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(DataError, match=r"here are two: rename .lora.down. to .lora_A., and .lora.up. to .lora_B."):
        convert(tmp_path / "mixed.safetensors", pipe, density=1.0)
    names = {name: name.replace("lora.down", "lora_A").replace("lora.up", "lora_B") for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, tmp_path / "renamed.safetensors")
    assert len(convert(tmp_path / "renamed.safetensors", pipe, density=1.0).tensors) == len(tensors) / 2
