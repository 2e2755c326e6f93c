"""shira eval: the loss of texts, its change and its interval, tables and predictions."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import shira
from conftest import letter_tokenizer, mlp
from interrupting import interrupted
from shira.data.batches import row_losses
from shira.data.tasks import Example
from shira.integrations import transformers as hf
from shira.runs.significance import paired_change
from shira.weights.modes import evaluating
from test_try import QUESTIONS, TEXTS, home, live, plainly  # noqa: F401


def test_eval_of_texts_is_the_loss_of_training(run, live):  # noqa: F811
    """Against Transformers' own loss, one row at a time, with and without the adapters."""
    model, tokenizer, switcher = live
    line = "eval model --data texts.jsonl --data questions.jsonl --max-length 20 -a poet.safetensors -a coder=0.5"
    code, out, err = run(f"{line} --predictions out.jsonl --batch-size 2 --json")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert [(row["active"], row["data"], row["examples"]) for row in results] == [
        (label, f"{data}.jsonl", count)
        for label in ("base", "poet.safetensors + coder=0.5")
        for data, count in (("texts", 4), ("questions", 9))
    ]
    examples = list(shira.data.reading.read_examples("texts.jsonl"))
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(lines) == 4 + 9
    for state, row, selection in (("base", results[0], {}), ("adapted", results[2], {"poet": 1.0, "coder": 0.5})):
        switcher.use(selection)
        total = tokens = 0
        for example, told in zip(examples, lines, strict=False):
            loss = count = 0
            for encoded in hf.encode(tokenizer, [example], 20):
                ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
                number = int((labels[:, 1:] != -100).sum())
                with torch.no_grad():
                    loss += float(model(input_ids=ids, labels=labels).loss) * number
                count += number
            assert told[state] == {"loss": pytest.approx(loss / count, rel=1e-4), "tokens": count}
            total, tokens = total + loss, tokens + count
        assert row["loss"] == pytest.approx(total / tokens, rel=1e-4) and row["tokens"] == tokens
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert results[2]["change"] == pytest.approx(results[2]["loss"] - results[0]["loss"]) and results[2]["change_95"] > 0
    assert lines[0]["base"]["tokens"] == 49 - 3  # in three rows, whose first tokens are not predicted
    assert [line["prompt"] for line in lines[:3]] == ["", "ab", []] and lines[1]["expected"] == "cab"
    assert lines[2]["expected"] == TEXTS[2]["messages"]
    right = [line["adapted"]["correct"] for line in lines[4:]]
    assert sum(right) / 9 == results[3]["accuracy"] and {"p", "interval"} < results[3].keys()
    assert all(line["adapted"]["correct"] == (line["adapted"]["predicted"] == line["expected"]) for line in lines[4:])


def test_eval_prints_a_table_of_each_kind(run, home):  # noqa: F811
    code, out, err = run("eval model --data texts.jsonl --data questions.jsonl -a poet.safetensors --max-length 3 --limit 4")
    assert code == 0, err
    assert re.search(r"accuracy, %\s.*\n.*\n.*active.*questions.jsonl \(4\)", out)
    assert "mean loss of a token, nats" in out and re.search(r"base +│ [\d.]+ \(perplexity [\d.]+\) ", out)
    assert re.search(r"poet.safetensors │ [\d.]+ \(perplexity [\d.e+]+\) +│\n│ +│ change [+-][\d.]+ ± [\d.]+ ", out)
    assert "texts.jsonl: 3 examples lost their beginning (--max-length)" in out
    assert re.search(r"^reading texts.jsonl: 4 examples in [\d.]+ s$", err, re.MULTILINE) and "base: texts.jsonl: " in err


def test_what_has_no_number_is_null_in_json(run, home):  # noqa: F811
    """One example has no interval, and an example without a token that counts has no loss."""
    Path("one.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n{"text": ""}\n')
    code, out, err = run("eval model --data one.jsonl -a coder --predictions out.jsonl --json")
    assert code == 0, err
    (_, adapted) = json.loads(out, parse_constant=pytest.fail)["results"]
    assert adapted["change_95"] is None and adapted["tokens"] == 2 and adapted["change"] != 0
    lines = [json.loads(line, parse_constant=pytest.fail) for line in Path("out.jsonl").read_text().splitlines()]
    assert lines[1]["base"] == lines[1]["adapted"] == {"loss": None, "tokens": 0}
    out = run("eval model --data one.jsonl -a coder")[1]
    assert "one.jsonl: 1 examples have no token that counts: left out" in out and "±" not in out and "change " in out


def test_the_change_of_a_loss_has_the_usual_interval_where_examples_are_alike():
    """With one token each: the mean of the differences, 1.96 standard errors wide."""
    generator = torch.Generator().manual_seed(0)
    ours, others = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    change, half = paired_change(*([(float(x), 1) for x in each] for each in (ours, others)))
    assert change == pytest.approx(float((ours - others).mean()))
    assert half == pytest.approx(1.96 * float((ours - others).std()) / 50**0.5)
    assert math.isnan(paired_change([(1.0, 2)], [(0.0, 2)])[1])


def test_losses_of_rows_do_not_depend_on_the_batch(tiny_llama):
    rows = hf.encode(letter_tokenizer(), [Example("ab" * n, "c" * (9 - n)) for n in range(1, 8)])
    one_by_one = row_losses(tiny_llama, rows, 1)
    for (loss, count), (other, same) in zip(row_losses(tiny_llama, rows, 4), one_by_one, strict=True):
        assert count == same and loss == pytest.approx(other, rel=1e-4)
    tiny_llama.train()
    assert hf.mean_loss(tiny_llama, rows, 3) == pytest.approx(sum(x for x, _ in one_by_one) / sum(n for _, n in one_by_one))
    assert tiny_llama.training


def test_a_measurement_leaves_each_module_in_its_own_mode(tiny_llama):
    """A user may keep one module in evaluation mode while the others train, and the other way round."""
    rows = hf.encode(letter_tokenizer(), [Example("ab", "c")])
    layers = tiny_llama.model.layers
    tiny_llama.train()
    layers[0].eval()
    layers[1].mlp.eval()
    tiny_llama.training = False
    modes = [module.training for module in tiny_llama.modules()]
    inside = []
    hook = layers[1].register_forward_pre_hook(lambda *_: inside.append(any(m.training for m in tiny_llama.modules())))
    row_losses(tiny_llama, rows, 1)
    hf.check_packing(tiny_llama)
    hook.remove()
    assert inside == [False, False] and [module.training for module in tiny_llama.modules()] == modes
    tiny_llama.register_forward_pre_hook(lambda *_: 1 / 0)
    for measured in (lambda: row_losses(tiny_llama, rows, 1), lambda: hf.check_packing(tiny_llama)):
        with pytest.raises(ZeroDivisionError):
            measured()
        assert [module.training for module in tiny_llama.modules()] == modes


def test_an_interrupt_at_any_line_leaves_each_module_in_its_own_mode():
    model = mlp().train()
    model[0].eval()
    modes = [module.training for module in model.modules()]
    line, struck = 1, True
    while struck:
        with interrupted(line) as left, evaluating(model):
            assert not any(module.training for module in model.modules())
        struck = not left
        assert [module.training for module in model.modules()] == modes, f"line {line}"
        line += 1
    assert line > 10
