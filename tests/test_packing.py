"""Several examples in a row: nothing of one is seen from another, and training is the same; what a training run reports."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import letter_tokenizer
from shira import DataError, MissingExtra
from shira.data.batches import collate
from shira.data.tasks import Example
from shira.data.tokens import IGNORED, Rows, encode, pack
from shira.integrations import transformers as hf
from shira.integrations import transformers_training as training
from shira.runs.recipes import Recipe, train_adapter

EXAMPLES = [Example("ab", "cde"), Example("", "fghij"), Example("k", "l"), Example("mnopqr", "s"), Example("t", "uvw")]


def models(attention="sdpa"):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "attn_implementation": attention}
    small = GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention)
    dense = LlamaForCausalLM(LlamaConfig(**sizes)), GPT2LMHeadModel(small)
    return [*dense, MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=1))]


@given(st.lists(st.integers(2, 9), min_size=1, max_size=30), st.integers(9, 20))
def test_packing_loses_nothing_and_fills_rows(sizes, length):
    tokens = torch.arange(sum(sizes))
    rows = Rows(
        encode(letter_tokenizer(), [Example("", "a" * (sum(sizes) + 9))], 500).tokens[: sum(sizes)],
        torch.tensor(sizes).cumsum(0).tolist(),
        range(len(sizes)),
    )
    rows.tokens = rows.tokens.copy()
    rows.tokens["id"] = tokens
    packed = pack(rows, length)
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= length
        starts = [n for n, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == IGNORED and IGNORED not in row["labels"][start + 1 : end]
            found.append(row["input_ids"][start:end])
    assert sorted(found) == [row["input_ids"] for row in rows]
    assert [len(row["input_ids"]) for row in packed] == packed.lengths.tolist()
    assert sum(sorted(packed.lengths.tolist())[:2]) > length or len(packed) == 1  # no two rows would fit into one


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["llama", "gpt2", "mixtral"])
def test_packed_losses_and_gradients_are_those_of_single_examples(kind, attention):
    model = models(attention)[kind].eval()
    rows = encode(letter_tokenizer(), EXAMPLES)
    packed = pack(rows, 12)
    assert len(packed) < len(rows)
    hf.check_packing(model)
    assert hf.mean_loss(model, packed, 2) == pytest.approx(hf.mean_loss(model, rows, 1), rel=1e-5)
    count = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    gradients = []
    for chosen in (rows, packed):
        model.zero_grad()
        for size in (1,) if chosen is rows else (len(packed),):
            for start in range(0, len(chosen), size):
                batch = collate(chosen[start : start + size], model)
                model(**batch, num_items_in_batch=count).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_model_that_mixes_examples_is_refused(tiny_llama):
    training = tiny_llama.train().training
    tiny_llama.set_attn_implementation("eager")
    hf.check_packing(tiny_llama)
    forward = tiny_llama.forward

    def mixes(input_ids=None, position_ids=None, logits_to_keep=0, use_cache=None, **_):
        return forward(input_ids=input_ids, logits_to_keep=logits_to_keep)

    tiny_llama.forward = mixes
    with pytest.raises(DataError, match="LlamaForCausalLM mixes the examples of a packed row; train it without packing"):
        hf.check_packing(tiny_llama)
    assert tiny_llama.training == training


def test_training_on_packed_rows_is_training_on_the_examples(tiny_llama, tmp_path):
    """All examples in every step, so that both see the same: equal losses, and equal adapters but for rounding."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in EXAMPLES))
    losses, adapters = {}, {}
    for packed in (False, True):
        recipe = Recipe(data=str(tmp_path / "a.jsonl"), density=0.1, steps=5, lr=1e-2, pack=packed, max_length=13)
        seen = losses[packed] = []
        adapters[packed] = train_adapter(
            recipe, tiny_llama, letter_tokenizer(), on_step=lambda step, loss, speed, seen=seen: seen.append((loss, speed))
        )
    assert adapters[True].metadata["training"]["examples"] < adapters[False].metadata["training"]["examples"] == 5
    assert all(speed > 0 for _, speed in losses[True])
    assert [loss for loss, _ in losses[True]] == pytest.approx([loss for loss, _ in losses[False]], rel=1e-4)
    for name, tensor in adapters[False].tensors.items():
        torch.testing.assert_close(adapters[True].tensors[name].values, tensor.values, rtol=1e-3, atol=2e-4)


def test_what_is_held_out_is_measured_before_and_after(tiny_llama, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "abcabc" * (1 + n % 3)}) for n in range(30)))
    recipe = Recipe(data=str(tmp_path / "a.jsonl"), density=0.2, steps=8, lr=3e-2, eval_share=0.3)
    seen = []
    adapter = train_adapter(recipe, tiny_llama, letter_tokenizer(), on_evaluation=lambda *done: seen.append(done))
    summary = adapter.metadata["training"]
    held_out = summary["held_out"]
    assert summary["examples"] + held_out["rows"] == 30 and 3 <= held_out["rows"] <= 15
    assert seen[-1] == (held_out["rows"], held_out["rows"])
    assert held_out["loss"] < held_out["loss_before"]
    apart = Recipe(data=str(tmp_path / "a.jsonl"), density=0.2, steps=8, lr=3e-2, eval_data=str(tmp_path / "a.jsonl"))
    whole = train_adapter(apart, tiny_llama, letter_tokenizer())
    assert whole.metadata["training"]["held_out"]["rows"] == whole.metadata["training"]["examples"] == 30
    switcher = shira.Switcher(tiny_llama)
    switcher.add("a", whole)
    switcher.use("a")
    rows = encode(letter_tokenizer(), [Example("", "abcabc" * (1 + n % 3)) for n in range(30)])
    assert hf.mean_loss(tiny_llama, rows, 7) == pytest.approx(whole.metadata["training"]["held_out"]["loss"], abs=1e-3)


def test_reports(tiny_llama, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "a.jsonl").write_text('{"text": "abcabc"}\n' * 4)
    runs = tmp_path / "runs"
    recipe = Recipe(data=str(tmp_path / "a.jsonl"), density=0.2, steps=3, report_to="tensorboard", log_folder=str(runs))
    (tmp_path / "b.jsonl").write_text('{"text": "bcbc"}\n')
    losses = []
    train_adapter(
        Recipe(**(vars(recipe) | {"eval_data": str(tmp_path / "b.jsonl")})),
        tiny_llama,
        letter_tokenizer(),
        on_step=lambda step, loss, speed: losses.append(loss),
    )
    (folder,) = runs.iterdir()
    assert re.fullmatch(r"a-\d{8}-\d{6}", folder.name)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-3)
    assert [event.step for event in events.Scalars("eval/loss")] == [3]
    monkeypatch.setattr(hf.library().integrations.integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(MissingExtra, match="reporting to 'wandb' needs a package that is not installed: pip install wandb"):
        training.reporters("tensorboard, wandb")
    with pytest.raises(DataError, match="cannot report to 'wandbb'; did you mean 'wandb'"):
        training.reporters("wandbb")
    assert training.reporters("none") == training.reporters("") == []
