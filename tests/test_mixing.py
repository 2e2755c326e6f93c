"""Selections that share a step write what each writes alone; what cannot share a step takes turns."""

import asyncio

import pytest
import torch
from torch import nn

import shira
from conftest import random_adapter
from families import family
from serving import SELECTIONS, Served, prompts, tiny_llama, written

pytest.importorskip("fastapi")
from shira.errors import ShiraError  # noqa: E402
from shira.serving.mixing import MIXED, Mixing  # noqa: E402
from shira.serving.problems import EngineError  # noqa: E402
from shira.serving.resident import Resident  # noqa: E402
from shira.serving.sampling import NotFinite, Sampling  # noqa: E402
from shira.serving.selections import AdapterReplaced  # noqa: E402
from shira.serving.turns import Turns  # noqa: E402

GREEDY = Sampling(0, temperature=0)


def of_layers(model, seed, endings=("_proj.weight",)):
    """A random adapter of the linear layers."""
    whole = random_adapter(model, seed)
    return shira.Adapter({name: tensor for name, tensor in whole.tensors.items() if name.endswith(tuple(endings))})


@pytest.fixture
def served(tmp_path):
    return Served(tmp_path, made=of_layers, mix=4, max_running=16)


def asked(count, tokens=8):
    texts = list(SELECTIONS)
    return [(texts[number % len(texts)], prompt, tokens) for number, prompt in enumerate(prompts(count))]


def answers(served, cases):
    async def work():
        for text in SELECTIONS:
            await served.engine.prefetch(served.key(text))
        jobs = [served.engine.submit(prompt, served.key(text), GREEDY, tokens) for text, prompt, tokens in cases]
        return await asyncio.gather(*map(written, jobs), return_exceptions=True), await served.engine.tiers()

    return served.run(work)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_tokens": 16, "turns": Turns(quantum=2)},  # prompts in several steps
        {"cache_tokens": 96},  # room for two requests: others are interrupted
        {"held": 1},  # the others take turns
    ],
    ids=["plain", "short steps", "small cache", "few held"],
)
def test_selections_that_share_steps_write_what_each_writes_alone(tmp_path, options):
    served = Served(tmp_path, made=of_layers, mix=4, max_running=16, **options)
    cases = asked(12)
    expected = [served.single(*case) for case in cases]
    found, tiers = answers(served, cases)
    assert found == expected
    assert tiers["mixed_steps"] > 0 and set(tiers["sharing"]) <= {served.key(text) for text in SELECTIONS}


def test_without_it_no_step_is_shared(tmp_path):
    served = Served(tmp_path, made=of_layers)
    assert answers(served, asked(4))[1]["mixed_steps"] == 0


def test_a_selection_with_many_requests_has_turns_of_its_own(served):
    prompt = prompts(1)[0]
    cases = [("a", prompt, 8)] * 5 + [("b", prompt, 8), ("base", prompt, 8)]
    expected = [served.single(*case) for case in cases]
    seen, begin = [], served.mixing.begin
    served.mixing.begin = lambda rows: (seen.append(list(rows)), begin(rows))
    found, _ = answers(served, cases)
    assert found == expected
    shared = {key for rows in seen for key, _ in rows}
    assert shared == {served.key("b"), served.key("base")}


def test_what_changes_other_tensors_takes_turns(tmp_path):
    """An adapter of embeddings and norms has nothing to do with linear layers."""
    served = Served(tmp_path, made=lambda model, seed: of_layers(model, seed) if seed else random_adapter(model, seed), mix=4)
    cases = asked(8)
    expected = [served.single(*case) for case in cases]
    found, tiers = answers(served, cases)
    assert found == expected
    assert tiers["sharing"] == [served.key("b")]


def test_a_layer_whose_weight_alone_is_used_has_no_hook(tmp_path):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * nn.functional.linear(x, mlp.up_proj.weight))
    served = Served(tmp_path, model=model, made=of_layers, mix=4)
    assert mlp.gate_proj._forward_hooks and not mlp.up_proj._forward_hooks
    cases = asked(8)
    expected = [served.single(*case) for case in cases]
    found, tiers = answers(served, cases)
    assert found == expected and tiers["sharing"] == [] and tiers["mixed_steps"] == 0


def test_a_file_that_is_gone_fails_its_own_requests_only(tmp_path):
    served = Served(tmp_path, made=of_layers, mix=4)
    cases = asked(8)
    expected = [served.single(*case) for case in cases]
    key = served.key("a")
    (tmp_path / "a.safetensors").unlink()

    async def work():
        jobs = [
            served.engine.submit(prompt, key if text == "a" else served.key(text), GREEDY, tokens)
            for text, prompt, tokens in cases
            if text != "a:0.5+b"
        ]
        return await asyncio.gather(*map(written, jobs), return_exceptions=True)

    rest = [(case, answer) for case, answer in zip(cases, expected, strict=True) if case[0] != "a:0.5+b"]
    for ((text, _, _), answer), found in zip(rest, served.run(work), strict=True):
        assert isinstance(found, AdapterReplaced) if text == "a" else found == answer


def linear_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12), nn.Linear(12, 8)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_gets_its_own_selection(tmp_path, dtype):
    model = linear_model(dtype)
    for seed, name in enumerate("ab"):
        of_layers(model, seed, [".weight"]).save(tmp_path / f"{name}.safetensors")
    resident = Resident(model, tmp_path)
    mixing = Mixing(model, resident, 4, 8)
    keys = [keys_of(tmp_path)[text] for text in ("", "a", "a", "b")]
    rows = torch.randn(7, 12).to(dtype)
    model(rows)
    assert mixing.keep_fitting() == 3
    assert all(map(mixing.read, keys[1:])) and mixing.share(dict.fromkeys(keys, 1)) == (["", keys[1], keys[3]], [])
    mixing.begin([("", 2), (keys[1], 1), (keys[2], 3), (keys[3], 1)])
    found = model(rows)
    mixing.begin([])
    for part, key in ((slice(0, 2), ""), (slice(2, 6), keys[1]), (slice(6, 7), keys[3])):
        resident.use(key)
        torch.testing.assert_close(found[part], model(rows)[part], rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
        resident.use("")
    assert torch.equal(found[:2], model(rows)[:2])
    mixing.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def keys_of(folder):
    from shira.serving.catalogue import Catalogue

    catalogue = Catalogue(folder, ["base"])
    for name in "ab":
        catalogue.load(name)
    return {"": "", **{name: catalogue.resolve(name).key for name in "ab"}}


def two_adapters(folder):
    """A model, a mixing of it with room for two selections of up to two requests, and the keys of two adapters."""
    model = linear_model()
    for seed, name in enumerate("ab"):
        of_layers(model, seed, [".weight"]).save(folder / f"{name}.safetensors")
    mixing = Mixing(model, Resident(model, folder), most=2, held=2)
    model(torch.randn(3, 12))
    mixing.keep_fitting()
    return mixing, keys_of(folder)


def test_who_shares_and_who_waits(tmp_path):
    mixing, keys = two_adapters(tmp_path)
    wanted = []
    mixing.wanted = wanted.append
    assert mixing.share({keys["a"]: 1, keys["b"]: 2, "": 1}) == ([], [keys["a"], keys["b"]])
    assert mixing.share({keys["a"]: 1, "": 1}) == ([], [keys["a"]])
    assert wanted == [keys["a"], keys["b"]]  # each is asked for once
    assert mixing.read(keys["a"])
    assert mixing.share({keys["a"]: 1, keys["b"]: 2, "": 1}) == ([keys["a"], ""], [keys["b"]])
    assert mixing.share({keys["a"]: 3, "": 1}) == ([], [])
    gone = '[["gone","0000000000000000",1.0]]'
    with pytest.raises(ShiraError):
        mixing.read(gone)
    assert mixing.share({gone: 1, keys["a"]: 1, "": 1}) == ([keys["a"], ""], [])  # its own turn raises the error
    assert mixing.read(keys["b"]) and mixing.held == [keys["a"], keys["b"]]  # the one that failed takes no room
    assert mixing.share({keys["b"]: 1, "": 1, MIXED: 9})[0] == [keys["b"], ""]


def test_no_more_than_so_many_are_held(tmp_path):
    mixing, keys = two_adapters(tmp_path)
    strengths = [keys["a"].replace("1.0", f"0.{number}") for number in range(1, 9)]
    mixing.share(dict.fromkeys(strengths, 1))
    assert [mixing.read(key) for key in strengths] == [True, True] + [False] * 6  # all are present, so none makes room
    assert mixing.held == strengths[:2]
    mixing.share({strengths[1]: 1, keys["b"]: 1})
    assert mixing.read(keys["b"]) and mixing.held == [strengths[1], keys["b"]]


def test_what_is_held_is_not_read_again(tmp_path, monkeypatch):
    """So an error in a second reading cannot take away what the next step needs."""
    mixing, keys = two_adapters(tmp_path)
    assert mixing.read(keys["a"]) and mixing.read(keys["b"])
    monkeypatch.setattr(mixing._resident, "changes", lambda key: pytest.fail("it was read again"))
    assert mixing.read(keys["a"])
    mixing.share({keys["a"]: 1, keys["b"]: 1})
    with pytest.raises(KeyError):  # not the base in silence
        mixing.begin([(keys["a"], 1), ("unknown", 1)])


def test_after_a_step_that_failed_all_take_turns_until_they_succeed(tmp_path):
    mixing, keys = two_adapters(tmp_path)
    sizes = {keys["a"]: 1, keys["b"]: 1, "": 1}
    assert all(mixing.read(keys[name]) for name in "ab") and len(mixing.share(sizes)[0]) == 3
    mixing.begin([("", 1), (keys["a"], 1), (keys["b"], 1)])
    mixing.step_failed()
    assert mixing.share(sizes) == ([], [])
    for key in (keys["a"], ""):
        mixing.step_succeeded(key)
    assert mixing.share(sizes) == ([keys["a"], ""], [])


def test_scores_that_are_not_finite_end_the_request_of_their_own_selection(tmp_path):
    """They would reach all rows of the step, through the mask of its attention."""
    served = Served(tmp_path, made=of_layers, mix=4, max_running=16)
    cases = [case for case in asked(8, 12) if case[0] != "a:0.5+b"]
    expected = [served.single(*case) for case in cases]

    async def work():
        bad = served.catalogue.resolve("a:1e30").key
        for key in (served.key("a"), served.key("b"), bad):
            await served.engine.prefetch(key)
        jobs = [served.engine.submit(prompt, served.key(text), GREEDY, tokens) for text, prompt, tokens in cases]
        await asyncio.sleep(0.02)
        jobs.append(served.engine.submit(prompts(1)[0], bad, GREEDY, 12))
        return await asyncio.gather(*map(written, jobs), return_exceptions=True)

    *found, failed = served.run(work)
    assert found == expected and isinstance(failed, NotFinite)
    assert served.engine._scheduler.interrupted > 0


def test_a_layer_that_sees_other_rows_than_the_tokens_takes_no_part(tmp_path):
    """A layer that is applied to each head, and one whose input has a name."""
    model = tiny_llama()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    heads, width = 4, attention.q_proj.weight.shape[0] // 4
    attention.per_head = nn.Linear(width, width, bias=False)
    plain = attention.o_proj.forward

    def by_heads(x):
        return plain(attention.per_head(x.view(*x.shape[:-1], heads, width)).view(x.shape))

    attention.o_proj.forward = by_heads
    mlp.forward = lambda x: mlp.down_proj(input=nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    served = Served(tmp_path, model=model, made=lambda model, seed: of_layers(model, seed, ("q_proj.weight",)), mix=4)
    assert not attention.per_head._forward_hooks and not mlp.down_proj._forward_hooks and mlp.up_proj._forward_hooks
    expected = [served.single(*case) for case in asked(8)]
    found, tiers = answers(served, asked(8))
    assert found == expected and tiers["mixed_steps"] > 0


def test_weights_in_one_memory_and_models_without_linear_layers(tmp_path):
    model = linear_model()
    model.add_module("twin", nn.Linear(12, 20))
    model.twin.weight = nn.Parameter(model[0].weight.data)
    mixing = Mixing(model, Resident(model, tmp_path), 4, 8)
    assert not model[0]._forward_hooks and not model.twin._forward_hooks and model[2]._forward_hooks
    mixing.close()
    with pytest.raises(EngineError, match="GPT2LMHeadModel has no layer that selections can share; leave out --mix"):
        Served(tmp_path, model=family("gpt2"), made=random_adapter, mix=4)
