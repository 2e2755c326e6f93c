"""`serving_answers.py` for seconds: no request gets another's answer, while files change and clients leave."""

import pytest

from serving_answers import run, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--kv-tokens", "768", "--quantum", "3", "--ready", "4")], ids=["plenty", "scarce"])
def test_every_answer_under_load_is_that_of_a_single_run(tmp_path, options):
    model = tiny_model(tmp_path / "model")
    found, distinct, selections, _, log = run(
        model, tmp_path, adapters=12, sets=4, prompts=2, total=250, clients=32, options=options
    )
    assert found.answers >= 250 and not found.wrong
    assert min(distinct) > selections // 2  # so another selection's answer would be seen
    assert found.statuses[200] == found.answers
    assert {"nonsense 400", "unknown 400", "unknown 404", "changing 200"} <= found.statuses.keys()
    assert all(str(status).split()[-1] in ("200", "400", "404", "409", "422") for status in found.statuses)
    assert "Traceback" not in log
