import json

import pytest
import torch
from torch import nn

from families import family
from shira import TargetError
from shira.runs.options import parse_layers, parse_targets
from shira.training.trainable import check_trainable
from shira.weights.targets import resolve


def names(model, targets):
    return [target.name for target in resolve(model, targets)]


def test_lists_match_whole_names_or_suffixes_as_in_peft(tiny_llama):
    assert names(tiny_llama, ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    assert names(tiny_llama, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj.weight"]
    assert names(tiny_llama, ["1.mlp.up_proj", "1.self_attn.q_proj"]) == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]


def test_keywords(tiny_llama):
    assert len(names(tiny_llama, "all-linear")) == 14
    assert "lm_head.weight" not in names(tiny_llama, "all-linear")
    assert all(".self_attn." in name for name in names(tiny_llama, "attention"))
    assert len(names(tiny_llama, "attention")) == 8
    assert len(names(tiny_llama, "mlp")) == 6


def test_a_string_is_a_regular_expression_on_the_whole_name(tiny_llama):
    assert names(tiny_llama, r".*\.0\..*up_proj") == ["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(TargetError, match="did you mean 'q_proj'"):
        resolve(tiny_llama, "q_prj")


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_prj"], r"'q_prj' matches no layer; did you mean 'q_proj'"),
        (["q_proj", "zzz"], r"'zzz' matches no layer; known: 'embed_tokens', 'q_proj'"),
        (["proj"], r"'proj' matches no layer"),  # a suffix starts after a dot
        (["act_fn"], r"'act_fn' is a SiLU(Activation)? without weights of its own; leave it out"),
        (["self_attn"], r"'self_attn' is a LlamaAttention without weights of its own; name what is in it: q_proj, k_proj"),
        ("q_proj", r"targets 'q_proj' is a text; names of layers stand in a list: \['q_proj'\]"),
        ("q_proj, v_proj", r"a text; names of layers stand in a list: \['q_proj', 'v_proj'\]"),
        ([], r"empty"),
        ("(", r"not a regular expression"),
    ],
)
def test_what_cannot_be_a_target(tiny_llama, targets, words):
    with pytest.raises(TargetError, match=words):
        resolve(tiny_llama, targets)


def test_keywords_that_match_nothing():
    with pytest.raises(TargetError, match="'attention' match no linear layer"):
        resolve(nn.Sequential(nn.Linear(2, 2)), "attention")


def test_tied_linears_are_one_target():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    (target,) = resolve(model, "all-linear")
    assert target.modules == (model[0], model[1])
    assert target.name == "0.weight"


def test_weights_without_plain_data_are_refused():
    with pytest.raises(TargetError, match=r"'0.weight'.*meta"):
        check_trainable(resolve(nn.Sequential(nn.Linear(3, 3, device="meta")), "all-linear"))
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 6)[:, ::2])
    with pytest.raises(TargetError, match="not contiguous"):
        check_trainable(resolve(model, "all-linear"))
    model[0].weight = nn.Parameter(torch.randn(4, 3).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TargetError, match=r"'0.weight' must be .* float64; found torch.float8_e4m3fn on cpu"):
        check_trainable(resolve(model, "all-linear"))


def test_exclusion_by_any_part_of_a_name(tiny_llama):
    assert names(tiny_llama, "attention") and not [n for n in kept(tiny_llama, exclude="self_attn") if "self_attn" in n]
    assert len(kept(tiny_llama, exclude=["layers.0", "down_proj"])) == 6
    assert not [n for n in kept(tiny_llama, exclude="layers.1") if "layers.1." in n]
    with pytest.raises(TargetError, match="exclude 'q_prj' matches nothing; did you mean 'q_proj'"):
        kept(tiny_llama, exclude="q_prj")
    with pytest.raises(TargetError, match=r"leaves none of 14 targets"):
        kept(tiny_llama, exclude=["self_attn", "mlp"])


def kept(model, **options):
    return [target.name for target in resolve(model, "all-linear", **options)]


def test_layers_by_number(tiny_llama):
    assert kept(tiny_llama, layers=1) == [n for n in kept(tiny_llama) if ".1." in n]
    assert kept(tiny_llama, layers=range(2)) == kept(tiny_llama)
    with pytest.raises(TargetError, match=r"target 'norm' is in none of the layers \[0\]: 'model.norm.weight'"):
        resolve(tiny_llama, ["norm", "q_proj"], layers=[0])
    with pytest.raises(
        TargetError, match=r"layers=\[1, 2\] must be numbers of layers with targets; the model has them in 0 to 1"
    ):
        kept(tiny_llama, layers=[1, 2])
    with pytest.raises(TargetError, match=r"layers=\[\]"):
        kept(tiny_llama, layers=[])


def test_all_linear_means_every_linear_map_but_the_output(tiny_llama):
    assert {kind(t) for t in resolve(family("gpt2"), "all-linear")} == {"Conv1D"}
    experts = [t for t in resolve(family("mixtral"), "all-linear") if t.stacked]
    assert [(t.budget_shape, t.matrix_shape) for t in experts[:2]] == [((3, 40, 16), (120, 16)), ((3, 16, 20), (48, 20))]
    assert not any(t.name.endswith("gate.weight") for t in resolve(family("mixtral"), "all-linear"))  # the router
    assert {kind(t) for t in resolve(family("vit"), "all-linear")} == {"Linear"}
    attention = nn.ModuleDict({"self_attn": nn.MultiheadAttention(4, 2)})
    packed, out = resolve(attention, "attention")
    assert (packed.name, out.name) == ("self_attn.in_proj_weight", "self_attn.out_proj.weight")
    assert out.modules == (attention["self_attn"],)  # which never calls its output projection


def kind(target):
    return type(target.modules[0]).__name__


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_auto_is_what_peft_would_take(name):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    model = family(name)
    expected = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model.config.model_type]
    assert names(model, "auto") == names(model, expected)


def test_auto_without_attention_says_what_to_do():
    assert names(family("vit"), "auto") == names(family("vit"), ["q_proj", "v_proj"])
    with pytest.raises(TargetError, match="'auto' finds no query and value"):
        resolve(nn.Sequential(nn.Linear(2, 2)), "auto")


def test_parameters_by_name_and_modules_without_a_matrix(tiny_llama):
    assert names(tiny_llama, ["norm"]) == ["model.norm.weight"]
    assert names(tiny_llama, r"model\.norm\.weight") == ["model.norm.weight"]
    assert names(family("gpt2"), ["ln_f"]) == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert names(tiny_llama, ["lm_head"]) == ["model.embed_tokens.weight"]  # tied
    assert all(name.endswith(".bias") for name in names(family("gpt2"), ["bias"]))


def test_the_command_lists_what_would_train(run, tmp_path):
    family("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the config is enough
    code, out, _ = run(f"targets {tmp_path} --targets c_attn --layers 1 --density 0.5")
    assert code == 0 and "transformer.h.*.attn.c_attn.weight" in out and "Conv1D" in out and "384 of 768" in out
    rows = json.loads(run(f"targets {tmp_path} --targets auto --rank 2 --json")[1])
    assert rows[0] == {
        "name": "transformer.h.0.attn.c_attn.weight",
        "shape": [16, 48],
        "layer": "Conv1D",
        "entries": 768,
        "trained": 128,
    }
    assert run(f"targets {tmp_path}")[1] == run(f"targets {tmp_path} --targets all-linear")[1]  # what `shira train` would train
    code, out, error = run(f"targets {tmp_path} --layers 1-x")
    assert code == 2 and "0,2,4-7" in error
    assert run(f"targets {tmp_path} --exclude h.0 --targets attn")[0] == 1


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("auto", "auto"), ("q_proj", ["q_proj"]), ("q_proj, norm", ["q_proj", "norm"]), (r".*\.q_proj", r".*\.q_proj")],
)
def test_targets_on_the_command_line(text, meaning):
    assert parse_targets(text) == meaning


def test_the_command_lists_what_training_would_change(run, tmp_path):
    family("llama").save_pretrained(tmp_path)
    found = {row["name"].split(".")[-2] for row in json.loads(run(f"targets {tmp_path} --json")[1])}
    assert found == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}


def test_layers_on_the_command_line():
    assert parse_layers("0,2,4-6") == [0, 2, 4, 5, 6]
