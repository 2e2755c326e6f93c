import pytest
import torch
from torch import nn

from shira import TargetError
from shira.targets import check_trainable, resolve


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
        (["self_attn"], r"'self_attn' is a LlamaAttention without weights of its own; name what is in it: q_proj, k_proj"),
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
    model[0].weight = nn.Parameter(torch.randn(3, 4).T)
    with pytest.raises(TargetError, match="not contiguous"):
        check_trainable(resolve(model, "all-linear"))
