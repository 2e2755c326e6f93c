"""torch.compile: one graph through adapted layers, the same losses as without, and switching that compiles nothing again."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import shira
from conftest import mlp, random_adapter
from families import FAMILIES, family, family_batch

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what it does itself

TARGETS = {
    "llama": ["q_proj", "up_proj", "embed_tokens", "norm"],
    "gpt2": ["c_attn", "c_fc", "wte", "ln_f"],
    "mixtral": ["q_proj", "experts", "gate"],
    "vit": ["q_proj", "fc1", "projection", "bias"],
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def columns(weight, k):
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    chosen[:, : max(1, k // weight.shape[0])] = True
    return chosen if int(chosen.sum()) <= k else torch.arange(k)


def train(model, forward, tuner, batch, steps=4):
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "mask"), [("llama", columns), *((name, "rand") for name in FAMILIES)])
def test_training_compiles_to_one_graph(name, mask):
    batch = family_batch(name)
    found = {}
    for compiled in (False, True):
        model = family(name, layers=1).train()  # each layer takes a second to compile
        if name == "mixtral":
            model.set_experts_implementation("batched_mm")  # Transformers' own way of computing with no loop over experts
        counter = CompileCounterWithBackend("aot_eager")
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        torch.manual_seed(1)
        with shira.attach(model, mask=mask, density=0.3, targets=TARGETS[name]) as tuner:
            found[compiled] = train(model, forward, tuner, batch)
            assert counter.frame_count == compiled
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    assert found[True][-1] < found[True][0]


@pytest.mark.slow
def test_inductor_trains_as_eager_does():
    model, found = mlp(), []
    x, y = torch.randn(6, 13), torch.randn(6, 5)
    for forward in (model, torch.compile(model, fullgraph=True)):
        with shira.attach(model, mask="rand", density=0.3) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
            losses = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(forward(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_switching_a_compiled_model_compiles_nothing_again():
    model = family("llama", layers=1)
    batch = family_batch("llama")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    switcher = shira.Switcher(model)
    for seed in (1, 2):
        switcher.add(f"random{seed}", random_adapter(model, seed))
    with torch.no_grad():
        base = compiled(**batch).logits
        seen = []
        for selection in ("random1", "random2", {"random1": 0.5, "random2": 1.0}, None):
            switcher.use(selection)
            logits = compiled(**batch).logits
            torch.testing.assert_close(logits, model(**batch).logits)
            seen.append(logits)
    assert counter.frame_count == 1
    assert torch.equal(seen[-1], base) and not torch.equal(seen[0], base) and not torch.equal(seen[0], seen[1])
