"""What the formula of docs/serving.md says, on a server whose steps take a second, and a tenth of one for each request."""

import pytest
from benchmarks.serve import break_even, by_formula, step_seconds, turns_rate


def row(setup, clients, adapters, rate, skew=0.0):
    known = {"setup": setup, "clients": clients, "adapters": adapters, "skew": skew}
    return known | {"tokens_a_second": rate, "share_of_switching": 0.1}


ROWS = [row("shira, vLLM", clients, 0, clients / (1 + clients / 10)) for clients in (64, 1, 8)]


def test_turns_take_the_steps_of_their_groups():
    seconds = step_seconds([*ROWS, row("shira, Transformers", 4, 0, 1.0)], "shira, vLLM")
    assert seconds(8) == pytest.approx(1.8) and seconds(4) == pytest.approx(1.4)
    assert turns_rate(seconds, 8, 1) == pytest.approx(8 / 1.8)
    assert turns_rate(seconds, 8, 2) == pytest.approx(8 / (2 * 1.4))
    assert turns_rate(seconds, 8, 100) == turns_rate(seconds, 8, 8) == pytest.approx(1 / 1.1)


def test_where_a_mixed_batch_overtakes():
    """r groups of 8 / r requests take r + 0.8 seconds."""
    seconds = step_seconds(ROWS, "shira, vLLM")
    assert break_even(seconds, 8, 8 / 2.8) == pytest.approx(2.0, abs=0.11)
    assert break_even(seconds, 8, 0.1) == pytest.approx(8.0)
    assert break_even(seconds, 8, 5.0) == 0


def test_the_table_has_what_was_measured_beside_it(capsys):
    ours = [row("shira, vLLM", 8, 2, 2.0), row("shira, vLLM", 8, 2, 9.0, skew=1.2)]
    by_formula([*ROWS, *ours, row("LoRA, vLLM", 8, 1, 8 / 2.95)])
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("│ shira")]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["shira, vLLM", "8", "2", "2.0", "2.6", "0.78"]
    assert "8 clients: by the formula turns write more tokens than vLLM's LoRA up to 2.1 adapters" in out
