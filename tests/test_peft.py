"""PEFT's checkpoints as adapters, and adapters as PEFT's checkpoints: the same logits in a PEFT model and in ours."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import shira
from conftest import all_bits, bits, llama_batches, mlp, random_adapter, same_bits
from interrupting import interrupted
from shira import AdapterError, BaseMismatch, DataError, MaskError, Switcher
from shira.checkpoints.extraction import summary
from shira.integrations.peft import load, save
from shira.integrations.peft_masks import mask_fn
from shira.integrations.peft_merging import convert

peft = pytest.importorskip("peft")

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj", "gate_proj"]
INPUT = {"input_ids": torch.arange(1, 19).view(2, 9)}
DTYPES = [torch.float32, torch.bfloat16]


def edited(folder, change, config=None):
    """A folder of PEFT with other tensors, or other fields in its configuration."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | (config or {})))
    return folder


def tune(model, config, folder, seed=0):
    """A PEFT model with random adapter weights, saved."""
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    return tuned.eval()


@torch.no_grad()
def logits(model):
    return model(**INPUT).logits


def of_peft(model, folder):
    return logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder))


def of_ours(model, adapter):
    ours = copy.deepcopy(model)
    switcher = Switcher(ours)
    switcher.add("x", adapter)
    switcher.use({"x": 1.0})
    found = logits(ours)
    switcher.use(None)
    assert same_bits(all_bits(ours), all_bits(model))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shira_of_peft_gives_the_same_logits_here(tiny_llama, tmp_path, dtype):
    model = tiny_llama.to(dtype)
    tune(model, peft.ShiraConfig(r=2, target_modules=TARGETS, random_seed=3), tmp_path / "poet")
    adapter = load(tmp_path / "poet", model)
    assert len(adapter.tensors) == 8 and all(tensor.kind == "delta" for tensor in adapter.tensors.values())
    assert adapter.name == "poet" and adapter.nnz == sum(2 * sum(tensor.shape) for tensor in adapter.tensors.values())
    expected = of_peft(model, tmp_path / "poet")
    assert torch.equal(bits(of_ours(model, adapter)), bits(expected)) and not torch.equal(expected, logits(model))
    adapter.save(tmp_path / "poet.safetensors")
    assert torch.equal(of_ours(model, tmp_path / "poet.safetensors"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["delta", "overwrite"])
def test_our_adapter_gives_the_same_logits_in_peft(tiny_llama, tmp_path, dtype, kind):
    model = tiny_llama.to(dtype)
    whole = random_adapter(model, 1, 0.05, kind)
    ends = tuple(f"{target}.weight" for target in TARGETS)
    adapter = shira.Adapter({name: each for name, each in whole.tensors.items() if name.endswith(ends)}, whole.metadata)
    lost = save(adapter, tmp_path / "poet", model)
    if kind == "delta" or dtype == torch.bfloat16:
        assert lost == 0
        assert torch.equal(bits(of_peft(model, tmp_path / "poet")), bits(of_ours(model, adapter)))
    else:
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "poet").merge_and_unload().state_dict()
        wrong = 0
        for name, each in adapter.tensors.items():
            wrong += int((merged[name].view(-1)[each.indices] != each.values).sum())
        assert 0 <= wrong == lost < adapter.nnz / 20
        torch.testing.assert_close(of_peft(model, tmp_path / "poet"), of_ours(model, adapter))
    again = load(tmp_path / "poet", model)
    assert {name: each.indices.tolist() for name, each in again.tensors.items()} == {
        name: each.indices.tolist() for name, each in adapter.tensors.items()
    }
    if kind == "delta":
        assert all(torch.equal(each.values, adapter.tensors[name].values.float()) for name, each in again.tensors.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
def test_super_tuning_with_and_without_positions(tiny_llama, tmp_path, dtype, positions):
    model = tiny_llama.to(dtype)
    config = peft.SupertuningConfig(target_modules=TARGETS, sparsity=0.9, save_precomputed_indices=positions, select_top=False)
    tune(model, config, tmp_path / "x")
    adapter = load(tmp_path / "x" / "adapter_model.safetensors", model)
    assert torch.equal(of_ours(model, adapter), of_peft(model, tmp_path / "x"))


def test_modules_that_peft_saved_whole_are_overwritten_whole_and_go_back(tiny_llama, tmp_path):
    tune(tiny_llama, peft.ShiraConfig(r=1, target_modules=["q_proj"], modules_to_save=["norm"]), tmp_path / "x")
    adapter = load(tmp_path / "x", tiny_llama)
    norm = adapter.tensors["model.norm.weight"]
    assert norm.kind == "overwrite" and norm.nnz == norm.numel
    expected = of_peft(tiny_llama, tmp_path / "x")
    assert torch.equal(of_ours(tiny_llama, adapter), expected)
    assert save(adapter, tmp_path / "back") == 0
    assert torch.equal(of_peft(tiny_llama, tmp_path / "back"), expected)


METHODS = {
    "lora": peft.LoraConfig(r=3, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=3, target_modules=TARGETS, use_rslora=True),
    "dora": peft.LoraConfig(r=3, target_modules=TARGETS, use_dora=True),
    "lokr": peft.LoKrConfig(r=3, target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=3, target_modules=TARGETS),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=3, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "shira": peft.ShiraConfig(r=2, target_modules=TARGETS),
    "whole": peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["norm"], bias="all"),
    "tokens": peft.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[1, 5]),
}


@pytest.mark.parametrize("method", METHODS)
def test_all_of_what_peft_merges_has_its_logits(tiny_llama, tmp_path, method):
    tuned = tune(tiny_llama, METHODS[method], tmp_path / "x")
    before = all_bits(tiny_llama)
    adapter = convert(tmp_path / "x", tiny_llama, density=1.0)
    assert same_bits(before, all_bits(tiny_llama)) and not hasattr(tiny_llama, "peft_config")
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())
    assert summary(adapter)["kept"] == 1
    torch.testing.assert_close(of_ours(tiny_llama, adapter), logits(tuned), rtol=1e-4, atol=1e-5)
    assert ("model.norm.weight" in adapter.tensors) == (method == "whole")


def test_layers_that_peft_has_added_are_refused(tiny_llama, tmp_path):
    tune(tiny_llama, peft.LoraConfig(r=2, target_modules=TARGETS, layer_replication=[[0, 2], [1, 2]]), tmp_path / "x")
    config = str(tiny_llama.config)
    with pytest.raises(DataError, match=r"layer_replication=\[\[0, 2\], \[1, 2\]\]: its model has more layers than the base"):
        convert(tmp_path / "x", tiny_llama, density=1.0)
    assert str(tiny_llama.config) == config


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:.*tie")
def test_one_of_two_tied_weights_is_refused_until_they_are_apart(tiny_llama, tmp_path, trained):
    """PEFT gives a module that it saves whole a weight of its own, so the other one keeps the base's."""
    model = tiny_llama
    model.lm_head.weight = model.model.embed_tokens.weight
    for folder, kind in (("shira", peft.ShiraConfig), ("lora", peft.LoraConfig)):
        tune(model, kind(r=1, target_modules=["q_proj"], modules_to_save=[trained]), tmp_path / folder)
    calls = [
        lambda: load(tmp_path / "shira", model),
        lambda: Switcher(model).add("x", tmp_path / "shira"),
        lambda: convert(tmp_path / "lora", model, density=1.0),
    ]
    before = all_bits(model)
    for call in calls:
        with pytest.raises(
            BaseMismatch, match=rf"PEFT trained '.*{trained}.weight' alone, .* is one tied tensor with"
        ) as error:
            call()
        assert same_bits(before, all_bits(model))
    exec(str(error.value).rpartition("as PEFT did: ")[2], {"model": model, "torch": torch})
    for folder, read in (("shira", load), ("lora", lambda *where: convert(*where, density=1.0))):
        adapter = read(tmp_path / folder, model)
        torch.testing.assert_close(of_ours(model, adapter), of_peft(model, tmp_path / folder), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_kept_share_is_reached_with_few_entries_and_reported(tiny_llama, tmp_path, dtype, scope):
    model = tiny_llama.to(dtype)
    tuned = tune(model, METHODS["dora"], tmp_path / "x")
    adapter = convert(tmp_path / "x", model, keep=0.9, scope=scope)
    exact = {}
    for path, layer in tuned.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.base_layer.weight.data = layer.base_layer.weight.data.float()
            old = layer.base_layer.weight.detach().clone()
            layer.merge()
            exact[f"{path}.weight"] = layer.base_layer.weight.detach() - old
    assert exact.keys() == adapter.tensors.keys()
    squares = {name: exact[name].double().square().view(-1) for name in exact}
    held = {name: float(squares[name][each.indices.long()].sum()) for name, each in adapter.tensors.items()}
    whole = float(sum(each.sum() for each in squares.values()))
    assert summary(adapter)["kept"] == pytest.approx((sum(held.values()) / whole) ** 0.5)
    groups = [list(squares)] if scope == "model" else [[name] for name in squares]
    for group in groups:
        largest = torch.cat([squares[name] for name in group]).sort(descending=True).values.cumsum(0)
        fewest = int((largest < 0.9**2 * largest[-1]).sum()) + 1
        taken = sum(adapter.tensors[name].nnz for name in group)
        assert sum(held[name] for name in group) >= 0.9**2 * float(largest[-1])
        assert fewest <= taken <= 1.02 * fewest + 1


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()


def test_a_lora_of_gpt2_whose_weights_are_transposed(tmp_path):
    model = gpt2()
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="lora_only")
    tuned = tune(model, config, tmp_path / "x")
    adapter = convert(tmp_path / "x", model, density=1.0)
    assert adapter.tensors["transformer.h.0.attn.c_attn.weight"].shape == (24, 72)
    assert adapter.tensors["transformer.h.0.attn.c_attn.bias"].kind == "overwrite"
    torch.testing.assert_close(of_ours(model, adapter), logits(tuned), rtol=1e-4, atol=1e-5)
    delta = {name: each for name, each in adapter.tensors.items() if name.endswith("c_attn.weight")}
    few = {name: shira.SparseTensor(each.shape, each.indices[:5], each.values[:5], "delta") for name, each in delta.items()}
    with pytest.raises(AdapterError, match="of a Conv1D; PEFT's SHiRA adapts nn.Linear alone"):
        save(shira.Adapter(few), tmp_path / "y", model)
    assert not (tmp_path / "y").exists()


def test_names_of_a_bare_model_and_of_a_wrapped_one_are_found(tiny_llama, tmp_path):
    tuned = peft.get_peft_model(
        copy.deepcopy(tiny_llama).model, peft.ShiraConfig(r=2, target_modules=TARGETS, init_weights=False)
    )
    tuned.save_pretrained(tmp_path / "bare")
    assert {name.split(".")[0] for name in load(tmp_path / "bare", tiny_llama).tensors} == {"model"}
    assert {name.split(".")[0] for name in load(tmp_path / "bare", tiny_llama.model).tensors} == {"layers"}
    wrapped = peft.get_peft_model(
        nn.ModuleDict({"module": copy.deepcopy(tiny_llama)}), peft.ShiraConfig(r=2, target_modules=TARGETS)
    )
    wrapped.save_pretrained(tmp_path / "wrapped")
    assert load(tmp_path / "wrapped", tiny_llama).tensors.keys() == load(tmp_path / "bare", tiny_llama).tensors.keys()
    with pytest.raises(BaseMismatch, match="does not belong to this model: it has no tensor"):
        load(tmp_path / "wrapped", mlp())


def test_a_base_on_the_disk_is_the_one_in_the_configuration(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    model = type(tiny_llama).from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.ShiraConfig(r=1, target_modules=TARGETS, init_weights=False)).save_pretrained(
        tmp_path / "x"
    )
    adapter = load(tmp_path / "x")
    assert adapter.metadata["base"] == {"id": "base", "dtype": "float32"}
    assert adapter.fingerprints == load(tmp_path / "x", tiny_llama).fingerprints
    edited(tmp_path / "x", lambda t: None, {"base_model_name_or_path": "/nowhere/models/their-base"})  # of another machine
    assert load(tmp_path / "x", tiny_llama).metadata["base"]["id"] == "their-base"
    assert load(tmp_path / "x", tmp_path / "base").metadata["base"]["id"] == "base"
    edited(tmp_path / "x", lambda t: None, {"base_model_name_or_path": str(tmp_path / "base")})
    lora = peft.LoraConfig(r=1, target_modules=TARGETS, task_type="CAUSAL_LM")
    tune(type(tiny_llama).from_pretrained(tmp_path / "base"), lora, tmp_path / "lora")
    assert convert(tmp_path / "lora", density=0.1).metadata["base"]["id"] == "base"


@pytest.mark.parametrize("mask", ["wm", "rand", "snip"])
def test_our_masks_train_in_peft(tiny_llama, tmp_path, mask):
    chosen = mask
    if mask == "snip":
        with pytest.raises(MaskError, match="needs calibration"):
            mask_fn(tiny_llama, mask)
        with shira.attach(tiny_llama, mask=mask, rank=2, targets=TARGETS, calibration=llama_batches()) as tuner:
            chosen = tuner.adapter()
    config = peft.ShiraConfig(r=2, target_modules=TARGETS)
    config.mask_fn = mask_fn(tiny_llama, chosen)
    with shira.attach(tiny_llama, mask=mask, rank=2, targets=TARGETS, calibration=llama_batches()) as tuner:
        expected = {name: each.indices.tolist() for name, each in tuner.adapter().tensors.items()}
    peft.get_peft_model(tiny_llama, config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, indices in expected.items():
        row, column = stored[f"base_model.model.{name.removesuffix('.weight')}.shira_indices"].long()
        width = tiny_llama.get_parameter(name.replace(".weight", ".base_layer.weight")).shape[1]
        assert (row * width + column).tolist() == indices


def test_a_mask_without_the_whole_budget_is_refused(tiny_llama):
    config = peft.ShiraConfig(r=2, target_modules=TARGETS)
    config.mask_fn = mask_fn(tiny_llama, "struct")
    with pytest.raises(MaskError, match=r"PEFT wants r · \(out \+ in\) = 96 positions of 'model.layers.0.*', found"):
        peft.get_peft_model(tiny_llama, config)


def test_convert_on_the_command_line(run, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("base")
    tune(tiny_llama, peft.ShiraConfig(r=2, target_modules=TARGETS), "sparse")
    tune(tiny_llama, peft.LoraConfig(r=2, target_modules=TARGETS), "lora")

    def refused(command, words):
        code, out, err = run(command)
        assert code == 1 and not out and words in " ".join(err.split()), err

    code, out, err = run("convert sparse --base base -o sparse.safetensors --name poet")
    assert code == 0, err
    assert "entries in 8 tensors" in out and "exactly as in PEFT" in out
    assert shira.load("sparse.safetensors").name == "poet"
    code, out, err = run("convert sparse.safetensors --to peft -o back")
    assert code == 0 and out.startswith("back: 848 entries in 8 tensors"), out + err
    first, again = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("sparse", "back"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    code, out, err = run("convert lora --base base --keep 0.9 --scope model -o lora.safetensors")
    assert code == 0, err
    assert out.endswith(f"{summary(shira.load('lora.safetensors'))['kept']:.1%} of ‖ΔW‖\n") and "90." in out

    refused(
        "convert sparse -o sparse.safetensors",
        "is there already, and would be lost; give another name, or replace it with --force",
    )
    refused("convert sparse --base base -o sparse/adapter_model.safetensors --force", "and --force replaces no others")
    refused("convert sparse -o new.safetensors", "PEFT's files hold no shapes: give the base")
    refused("convert sparse --base base --keep 0.5 -o new.safetensors", "leave out --density and --keep")
    refused("convert lora --base base -o new.safetensors", "say how many to take, by --density 0.01, or")
    refused("convert lora --density 0.1 -o new.safetensors", "give the model that it was trained on, --base, a folder")
    refused("convert lora --base base --density 2 -o new.safetensors", "density must be above 0 and at most 1, found 2.0")
    smaller = tiny_llama.config.to_dict() | {"hidden_size": 12}
    type(tiny_llama)(type(tiny_llama.config).from_dict(smaller)).save_pretrained("smaller")
    refused("convert lora --base smaller --density 0.1 -o new.safetensors", "into this base: this base has other shapes: ")
    assert len(run("convert lora --base smaller --density 0.1 -o new.safetensors")[2]) < 500
    refused("convert lora --base base --density 0.1 --scope all -o new.safetensors", "unknown scope 'all'")
    refused("convert lora --to pefft -o new.safetensors", "unknown --to 'pefft'; did you mean 'peft'?")
    refused("convert sparse.safetensors -o new.safetensors", "sparse.safetensors is an adapter of shira already")
    refused("convert sparse.safetensors --to peft -o back", "back exists; name a folder")
    refused("convert sparse.safetensors --to peft -o a.safetensors", "PEFT loads a folder")
    refused("convert sparse.safetensors --to peft --keep 0.5 -o new", "--keep is for checkpoints of PEFT")
    refused("convert sparse --to peft -o new", "--to peft takes an adapter's file")
    refused("convert nowhere -o new.safetensors", "there is no file or folder 'nowhere'")
    refused("convert sparse --base base -o no/new.safetensors", "there is no folder no; make it first")
    assert not (tmp_path / "new.safetensors").exists() and not (tmp_path / "new").exists()


def test_the_snippets_of_the_page_run(run, tiny_llama, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "peft.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("my-model")
    tune(tiny_llama, peft.ShiraConfig(r=2, target_modules=TARGETS), "my-shira")
    tune(tiny_llama, peft.LoraConfig(r=2, target_modules=TARGETS), "my-lora")
    snippets = re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL)
    assert [language for language, _ in snippets] == ["python", "bash", "python", "python"]
    names = {"model": tiny_llama, "data": llama_batches()}
    before = all_bits(tiny_llama)
    for language, snippet in snippets[:3]:
        if language == "python":
            exec(snippet, names)
            continue
        for line in snippet.splitlines():
            code, _, err = run(line.removeprefix("shira "))
            assert code == 0, err
    assert same_bits(before, all_bits(tiny_llama))
    assert names["lost"] == 0 and 0.9 <= summary(names["lora"])["kept"] < 0.92
    assert torch.equal(of_peft(tiny_llama, "back"), of_peft(tiny_llama, "my-shira"))
    exec(snippets[3][1], names)
    assert names["peft_model"](**llama_batches(1)[0]).loss.requires_grad


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that the interrupt left open
def test_an_interrupt_in_a_conversion_leaves_the_model_as_it_was(tiny_llama, tmp_path):
    model = tiny_llama.bfloat16()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], bias="all")
    tune(model, config, tmp_path / "poet")
    before, modules = all_bits(model), {name: type(module) for name, module in model.named_modules()}
    line, struck = 1, True
    while struck:
        with interrupted(line) as left:
            convert(tmp_path / "poet", model, density=0.1)
        struck = not left
        assert same_bits(all_bits(model), before), f"line {line}"
        assert {name: type(module) for name, module in model.named_modules()} == modules and "peft_config" not in vars(model)
        line += 23
    assert line > 1000


def test_a_model_with_an_adapter_in_it_is_no_base(tiny_llama, tmp_path):
    tune(tiny_llama, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "lora")
    tune(tiny_llama, peft.ShiraConfig(r=2, target_modules=["q_proj"]), tmp_path / "shira")
    switcher = Switcher(tiny_llama)
    switcher.add("x", random_adapter(tiny_llama, 1))
    switcher.use({"x": 1.0})
    active = all_bits(tiny_llama)
    with pytest.raises(DataError, match="already in use: a Switcher has 'x' active"):
        convert(tmp_path / "lora", tiny_llama, density=0.1)
    with pytest.raises(BaseMismatch, match="already in use: a Switcher has 'x' active"):
        load(tmp_path / "shira", tiny_llama)
    assert same_bits(all_bits(tiny_llama), active)
    switcher.use(None)
    assert convert(tmp_path / "lora", tiny_llama, density=0.1).nnz and load(tmp_path / "shira", tiny_llama).nnz
