"""The Transformers engine: many selections at once write what each writes alone, whatever goes wrong beside them."""

import asyncio
import threading
import time

import pytest
import torch

from conftest import random_adapter
from families import family
from serving import SELECTIONS, Served, prompts, tiny_llama, written
from shira.errors import ShiraError

pytest.importorskip("fastapi")
from shira.serving.sampling import Sampling  # noqa: E402
from shira.serving.transformers_engine import EngineError, EngineStopped, RequestTooLong  # noqa: E402
from shira.serving.turns import Turns  # noqa: E402

GREEDY = Sampling(0, temperature=0)


@pytest.fixture
def served(tmp_path):
    return Served(tmp_path, max_running=8, step_tokens=64)


def cases(count=16, tokens=10):
    texts = list(SELECTIONS)
    return [(texts[number % len(texts)], prompt, tokens) for number, prompt in enumerate(prompts(count))]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What single runs write for `cases()`."""
    served = Served(tmp_path_factory.mktemp("single"))
    return [served.single(*case) for case in cases()]


def answers(served, asked, sampling=GREEDY):
    async def work():
        jobs = [served.engine.submit(prompt, served.key(text), sampling, tokens) for text, prompt, tokens in asked]
        return await asyncio.gather(*map(written, jobs))

    return served.run(work)


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 8},
        {"max_running": 3, "step_tokens": 16, "turns": Turns(quantum=2)},  # prompts in several steps, and more turns
        {"max_running": 8, "cache_tokens": 96},  # room for two requests
        {"max_running": 4, "step_tokens": 8, "cache_tokens": 48, "turns": Turns(quantum=1)},  # a prompt is often interrupted
    ],
    ids=["plain", "short turns", "small cache", "smallest cache"],
)
def test_interleaved_selections_write_what_each_writes_alone(tmp_path, expected, options):
    served = Served(tmp_path, **options)
    assert answers(served, cases()) == expected
    assert bool(served.engine._scheduler.interrupted) == ("cache_tokens" in options)
    assert not served.engine._scheduler.active_requests and not served.engine._jobs


def test_the_selections_differ(served):
    assert len({tuple(served.single(text, [5, 6, 7], 8)) for text in SELECTIONS}) == len(SELECTIONS)


def test_a_token_that_ends_an_answer(tmp_path):
    served = Served(tmp_path)
    prompt = prompts(1)[0]
    end = served.single("a", prompt, 8)[5]
    served.engine.ends = frozenset([end])
    expected = served.single("a", prompt, 30, eos_token_id=end)

    async def work():
        updates = [update async for update in served.engine.submit(prompt, served.key("a"), GREEDY)]
        ignoring = await written(served.engine.submit(prompt, served.key("a"), GREEDY, 20, ignore_ends=True))
        return updates, ignoring

    updates, ignoring = served.run(work)
    assert [token for update in updates for token in update.tokens] == expected and updates[-1].finish == "stop"
    assert len(ignoring) == 20


def test_a_seed_decides_an_answer_alone_and_under_load(tmp_path):
    sampling = Sampling(7, temperature=0.9, top_p=0.95, top_k=40)
    served = Served(tmp_path, max_running=8)
    prompt = prompts(1)[0]
    (alone,) = answers(served, [("a", prompt, 20)], sampling)
    crowded = Served(tmp_path, model=served.model, max_running=3, cache_tokens=112, turns=Turns(quantum=2))

    async def work():
        others = [crowded.engine.submit(p, crowded.key(text), Sampling(n), 20) for n, (text, p, _) in enumerate(cases(8))]
        job = crowded.engine.submit(prompt, crowded.key("a"), sampling, 20)
        other_seed = crowded.engine.submit(prompt, crowded.key("a"), Sampling(8, temperature=0.9), 20)
        found, other, *_ = await asyncio.gather(*map(written, [job, other_seed, *others]))
        return found, other

    found, other = crowded.run(work)
    assert found == alone != other


def test_tokens_are_drawn_from_the_distribution(served):
    """The share of each first token, over many seeds, is its probability at this temperature."""
    prompt, count = [5, 6, 7], 600
    scores = served.model(torch.tensor([prompt])).logits[0, -1] / 0.3
    expected = scores.softmax(-1).detach()

    async def work():
        jobs = [served.engine.submit(prompt, "", Sampling(seed, temperature=0.3), 1) for seed in range(count)]
        return await asyncio.gather(*map(written, jobs))

    found = torch.bincount(torch.tensor(served.run(work)).view(-1), minlength=97) / count
    assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5  # four standard deviations at most


def test_logprobs_are_those_of_a_plain_forward_pass(served):
    prompt = prompts(1)[0]

    async def work():
        job = served.engine.submit(prompt, served.key("b"), Sampling(1, temperature=0.7, top_k=5, logprobs=3), 10)
        return [update async for update in job]

    updates = served.run(work)
    tokens = [token for update in updates for token in update.tokens]
    entries = [entry for update in updates for entry in update.logprobs]
    with served.oracle.using("b"), torch.no_grad():
        plain = served.model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    assert [entry.token for entry in entries] == tokens
    for place, entry in enumerate(entries, start=len(prompt) - 1):
        assert entry.logprob == pytest.approx(float(plain[place, entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == plain[place].topk(3).indices.tolist()


def test_penalties_and_biases(served):
    prompt = prompts(1)[0]
    expected = served.single("a", prompt, 12, repetition_penalty=1.5)
    banned = served.single("a", prompt, 1)[0]

    async def work():
        submit, key = served.engine.submit, served.key("a")
        penalized = submit(prompt, key, Sampling(0, temperature=0, repetition_penalty=1.5), 12)
        biased = submit(prompt, key, Sampling(0, temperature=0, logit_bias={banned: -100.0}), 12)
        varied = submit(prompt, key, Sampling(0, temperature=0, frequency_penalty=2.0, presence_penalty=2.0), 40)
        plain = submit(prompt, key, GREEDY, 40)
        return await asyncio.gather(*map(written, [penalized, biased, varied, plain]))

    penalized, biased, varied, plain = served.run(work)
    assert penalized == expected
    assert banned not in biased
    assert len(set(varied)) > len(set(plain))


def test_a_job_that_is_left_frees_its_blocks(served):
    async def work():
        job = served.engine.submit([5] * 20, served.key("a"), GREEDY, 60)
        async for _ in job:
            break
        job.cancel()
        kept = await written(served.engine.submit([5] * 20, served.key("b"), GREEDY, 20))
        while served.engine._scheduler.has_pending_requests():
            await asyncio.sleep(0.01)
        return kept, served.engine._scheduler.cache.compute_free_capacity()

    kept, free = served.run(work)
    assert kept == served.single("b", [5] * 20, 20)
    assert free == 1.0


@pytest.mark.parametrize(("prompt", "tokens"), [(0, 5), (96, None), (90, 7)])
def test_too_long_for_the_model(served, prompt, tokens):
    with pytest.raises(RequestTooLong, match="both together may be 96|less than the 96"):
        served.engine.room(prompt, tokens)
    assert served.engine.room(90, None) == served.engine.room(90, 6) == 6


def test_too_long_for_the_cache(tmp_path):
    assert Served(tmp_path, cache_tokens=48).engine.longest == 48


def test_more_tokens_than_the_model_has_positions_for(tmp_path):
    with pytest.raises(EngineError, match="at most the 96 tokens .*found 97; give a smaller --max-model-len"):
        Served(tmp_path, longest=97)
    assert Served(tmp_path, longest=96).engine.longest == 96


def test_an_exception_inside_a_switch_fails_that_selection_alone(served, monkeypatch):
    usual, broken = served.resident.use, served.key("a")

    def use(key):
        if key == broken:
            served.resident._switcher.use({name: 2.0 for name in served.resident._switcher.names} or None)  # half way
            raise RuntimeError("the memory failed")
        return usual(key)

    served.engine._resident.use(served.key("b"))
    monkeypatch.setattr(served.resident, "use", use)

    async def work():
        jobs = [served.engine.submit(prompt, served.key(text), GREEDY, tokens) for text, prompt, tokens in cases(8)]
        return await asyncio.gather(*map(written, jobs), return_exceptions=True)

    found = served.run(work)
    for (text, prompt, tokens), answer in zip(cases(8), found, strict=True):
        if text == "a":
            assert isinstance(answer, EngineError) and "a step of the engine failed (RuntimeError)" in str(answer)
        else:
            assert answer == served.single(text, prompt, tokens)


def test_a_file_that_is_replaced_while_its_request_waits(served, tmp_path):
    async def work():
        key = served.key("a")
        random_adapter(served.model, 9).save(tmp_path / "a.safetensors")
        late = await asyncio.gather(written(served.engine.submit([5, 6], key, GREEDY, 5)), return_exceptions=True)
        served.catalogue.load("a")
        return late[0], await written(served.engine.submit([5, 6], served.key("a"), GREEDY, 5))

    late, new = served.run(work)
    assert isinstance(late, ShiraError) and "was replaced after the request came" in str(late)
    served.oracle.add("new", tmp_path / "a.safetensors")
    with served.oracle.using("new"):
        assert new == served.model.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)[0, 2:].tolist()


def test_a_thread_that_dies_fails_all_requests_at_once(served, monkeypatch, caplog):
    def dies(*_):
        raise MemoryError("no more")

    async def work():
        job = served.engine.submit([5, 6], "", GREEDY, 90)
        async for _ in job:
            break
        monkeypatch.setattr(served.engine._scheduler, "schedule_batch", dies)
        with pytest.raises(EngineStopped, match="no more"):
            await written(job)
        while served.engine.is_alive():
            await asyncio.sleep(0.01)
        with pytest.raises(EngineStopped, match="must be started again: no more"):
            served.engine.submit([5, 6], "", GREEDY, 5)

    served.run(work)


def test_stop_finishes_what_runs_and_refuses_the_rest(served):
    async def work():
        job = asyncio.create_task(written(served.engine.submit([5, 6], served.key("a"), GREEDY, 30)))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(served.engine.stop(30))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped, match="stopping"):
            served.engine.submit([5, 6], "", GREEDY, 5)
        await stopping
        return await job

    assert served.run(work) == served.single("a", [5, 6], 30)


def test_stop_ends_what_takes_longer(served):
    async def work():
        job = served.engine.submit([5, 6], served.key("a"), GREEDY, 90)
        async for _ in job:
            break
        await served.engine.stop(0)
        with pytest.raises(EngineStopped, match="stopping"):
            await written(job)

    served.run(work)
    assert not [thread for thread in threading.enumerate() if thread.name == "shira generation"]


def test_two_that_stop_the_engine_do_not_meet(served, monkeypatch):
    """The server and its application both do. Transformers' manager forgets its thread between two steps of a join."""
    manager, inside, most = served.engine._manager, [], []
    usual = manager.join

    def join(*given):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)
        usual(*given)
        inside.pop()

    monkeypatch.setattr(manager, "join", join)

    async def work():
        await asyncio.gather(served.engine.stop(0), served.engine.stop(0))

    served.run(work)
    assert most == [1]


def test_scores_that_are_not_finite(served):
    async def work():
        broken = served.model.lm_head.register_forward_hook(lambda module, args, output: output * float("nan"))
        found = await asyncio.gather(written(served.engine.submit([5, 6], "", GREEDY, 3)), return_exceptions=True)
        broken.remove()
        return found[0], await written(served.engine.submit([5, 6], "", GREEDY, 3))

    error, after = served.run(work)
    assert "not finite" in str(error)
    assert after == served.single("base", [5, 6], 3)


def test_the_next_selections_are_read_ahead(served):
    asked = cases(16, tokens=20)
    answers(served, asked)
    tiers = served.resident.tiers()
    assert tiers["switches"] >= 3 and tiers["hits"] >= 1


def test_half_precision(tmp_path):
    """Nearly equal scores may change their order, so the log-probabilities are compared, to what bfloat16 can tell apart."""
    served = Served(tmp_path, model=tiny_llama().to(torch.bfloat16), max_running=8)
    asked = cases(8)

    async def work():
        sampling = Sampling(0, temperature=0, logprobs=0)
        jobs = [served.engine.submit(prompt, served.key(text), sampling, tokens) for text, prompt, tokens in asked]
        return await asyncio.gather(*map(entries, jobs))

    async def entries(job):
        return [entry async for update in job for entry in update.logprobs]

    for (text, prompt, tokens), found in zip(asked, served.run(work), strict=True):
        chosen = [entry.token for entry in found]
        with served.oracle.using(SELECTIONS[text]), torch.no_grad():
            plain = served.model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        assert len(found) == tokens
        for row, entry in zip(plain, found, strict=True):
            assert abs(entry.logprob - float(row[entry.token])) < 0.1 and float(row.max()) - entry.logprob < 0.1


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_models_of_other_families(tmp_path, name):
    served = Served(tmp_path, model=family(name))
    asked = [(text, [token % 31 for token in prompt], tokens) for text, prompt, tokens in cases(8, 6)]
    assert answers(served, asked) == [served.single(*case) for case in asked]


def test_a_model_that_continuous_batching_does_not_serve(tmp_path, monkeypatch):
    from shira.serving import self_check

    usual = self_check.plain_logprobs

    def shifted(model):
        return [(tokens, [logprobs + 0.1 for logprobs in each]) for tokens, each in usual(model)]

    monkeypatch.setattr(self_check, "plain_logprobs", shifted)
    with pytest.raises(EngineError, match="cannot serve LlamaForCausalLM: .* differ by 0.1 from those of a plain forward pass"):
        Served(tmp_path)
