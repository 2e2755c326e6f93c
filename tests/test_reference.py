"""The base of a model in training, by switching the adapter off; and the state of a run without a trainer."""

import pytest
import torch

import shira
from conftest import all_bits, bits, llama_batches, mlp, mlp_batches, mlp_loss, same_bits
from shira import TuningError
from shira.integrations.trainer import ReferenceModel


def weights(model):
    return {name: kept for name, kept in all_bits(model).items() if not name.endswith("shira_values")}


def step(model, optimizer, batch):
    optimizer.zero_grad()
    mlp_loss(model, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written", [False, True], ids=["before the next forward", "after it"])
def test_inside_it_is_the_base_and_afterwards_what_it_was(dtype, written):
    model = mlp(dtype)
    base = all_bits(model)
    with shira.attach(model, density=0.2) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, fused=True)
        for batch in mlp_batches(3):
            step(model, optimizer, batch)
        if written:
            model(torch.ones(1, 13, dtype=dtype))
        before, masters = weights(model), [bits(values) for values in tuner.parameters()]
        with tuner.reference():
            assert same_bits(base, weights(model))
            model(torch.ones(1, 13, dtype=dtype))
            assert same_bits(base, weights(model))
        assert same_bits(before, weights(model))
        assert all(torch.equal(one, bits(now)) for one, now in zip(masters, tuner.parameters(), strict=True))
        adapter = tuner.adapter()
        model(torch.ones(1, 13, dtype=dtype))
        for name, tensor in adapter.tensors.items():
            assert torch.equal(bits(model.get_parameter(name).view(-1)[tensor.indices.long()]), bits(tensor.values))
    assert same_bits(base, all_bits(model))


def test_a_reference_between_forward_and_backward_changes_no_gradient():
    batch = mlp_batches(1)[0]
    found = []
    for refer in (False, True):
        model = mlp()
        with shira.attach(model, density=0.2) as tuner:
            optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
            step(model, optimizer, batch)
            optimizer.zero_grad()
            loss = mlp_loss(model, batch)
            if refer:
                with tuner.reference(), torch.no_grad():
                    assert mlp_loss(model, batch) == mlp_loss(mlp(), batch) != loss
            loss.backward()
            found.append(torch.cat([values.grad for values in tuner.parameters()]))
    assert torch.equal(bits(found[0]), bits(found[1]))


def test_entries_of_a_mask_that_has_moved_are_the_bases_too(tiny_llama):
    base = all_bits(tiny_llama)
    with shira.attach(tiny_llama, density=0.05) as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0)
        for batch in llama_batches(3):
            optimizer.zero_grad()
            tiny_llama(**batch).loss.backward()
            optimizer.step()
        assert tuner.refresh(optimizer, cap=2.0) > 0
        before = weights(tiny_llama)
        with tuner.reference():
            assert same_bits(base, weights(tiny_llama))
        assert same_bits(before, weights(tiny_llama)) and not same_bits(before, base)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_inside_reaches_the_weights_afterwards(fused):
    model = mlp()
    with shira.attach(model, density=0.2) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, fused=fused)
        mlp_loss(model, mlp_batches(1)[0]).backward()
        with tuner.reference():
            optimizer.step()
        model(torch.ones(1, 13))
        for name, tensor in tuner.adapter().tensors.items():
            assert torch.equal(bits(model.get_parameter(name).view(-1)[tensor.indices.long()]), bits(tensor.values))


def test_an_error_inside_and_a_detach_inside():
    model = mlp()
    base = all_bits(model)
    tuner = shira.attach(model, density=0.2)
    step(model, torch.optim.SGD(tuner.parameters(), lr=0.1), mlp_batches(1)[0])
    model(torch.ones(1, 13))
    before = weights(model)
    with pytest.raises(RuntimeError, match="stop"), tuner.reference():
        raise RuntimeError("stop")
    assert same_bits(before, weights(model))
    with tuner.reference():
        tuner.detach()
    assert same_bits(base, all_bits(model))


def test_where_there_is_no_reference():
    model = mlp()
    with shira.attach(model, density=0.2, method="hook") as tuner, pytest.raises(TuningError, match="method='values'"):
        tuner.reference().__enter__()
    with shira.attach(model, density=0.2) as tuner, tuner.reference():
        for wish in (lambda: tuner.reference().__enter__(), lambda: tuner.refresh(None), tuner.state_dict):
            with pytest.raises(TuningError, match="not inside its reference"):
                wish()
    with pytest.raises(TuningError, match="only an attached tuner"):
        tuner.reference().__enter__()


def test_the_reference_model_is_the_model_itself(tiny_llama):
    batch = llama_batches(1)[0]
    tiny_llama.config.attention_dropout = 0.5
    with torch.no_grad():
        expected = tiny_llama(**batch).logits
    with shira.attach(tiny_llama, density=0.05) as tuner:
        reference = ReferenceModel(tuner)
        with torch.no_grad():
            for values in tuner.parameters():
                values.mul_(2)
        tiny_llama.train()
        with torch.no_grad():
            assert torch.equal(bits(reference(**batch).logits), bits(expected))
            assert not torch.equal(tiny_llama.eval()(**batch).logits, expected)
        assert {p.data_ptr() for p in reference.parameters()} == {p.data_ptr() for p in tiny_llama.parameters()}
        assert reference.config is tiny_llama.config and reference.base_model is tiny_llama.base_model
        with pytest.raises(AttributeError, match="nothing_of_the_sort"):
            reference.nothing_of_the_sort  # noqa: B018


def test_the_state_of_a_run_goes_on_in_any_loop():
    found = []
    for stops in (False, True):
        model = mlp()
        tuner = shira.attach(model, density=0.2)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for number, batch in enumerate(mlp_batches(6)):
            if stops and number == 3:
                state, moments = tuner.state_dict(), optimizer.state_dict()
                tuner.detach()
                model = mlp()
                tuner = shira.attach(model, density=0.2)
                optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
                tuner.load_state_dict(state)
                optimizer.load_state_dict(moments)
            step(model, optimizer, batch)
        found.append(torch.cat([values.detach() for values in tuner.parameters()]))
    assert torch.equal(bits(found[0]), bits(found[1]))
