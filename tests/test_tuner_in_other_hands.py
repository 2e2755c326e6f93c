"""A model in training in the hands of other code: pickled, compiled, hooked, saved, in inference mode."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, llama_batches, mlp, mlp_batches, mlp_loss, same_bits
from families import family, family_batch
from shira import TargetError, TuningError
from shira.training.untrained import NotTrained
from test_tuner_changes import VARIANTS, own_names, train


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed_from_others():
    from torch.nn import utils
    from torch.nn.utils import parametrizations

    for wrap in (utils.weight_norm, utils.spectral_norm):
        model = nn.Sequential(wrap(nn.Linear(5, 5)), nn.Linear(5, 5))
        with pytest.raises(TargetError, match=r"'0.weight_.*' belongs to a Linear under torch.nn.utils"):
            shira.attach(model)
        shira.attach(model, exclude="0").detach()
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 5)), nn.Linear(5, 5))
    for targets in ("all-linear", ["0"], r"\d"):
        with pytest.raises(TargetError, match=r"'0.weight' is parametrized.*'0.parametrizations.weight.original1'"):
            shira.attach(model, targets=targets)
    with shira.attach(model, targets=["0.parametrizations.weight.original1"], density=0.5) as tuner:
        model(torch.ones(2, 5)).square().sum().backward()
        assert bool(tuner.parameters()[0].grad.any())


def test_inference_mode():
    with torch.inference_mode():
        frozen = nn.Linear(4, 4)
    with pytest.raises(TargetError, match="made under torch.inference_mode"):
        shira.attach(frozen)
    model = mlp()
    with torch.inference_mode():
        tuner = shira.attach(model, density=0.3)
    train(model, tuner)
    with torch.inference_mode():
        tuner.detach()
    assert same_bits(all_bits(model), all_bits(mlp()))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_pickled_model_in_training_computes_the_same_and_is_nobodys(options):
    model = mlp()
    file = io.BytesIO()
    with shira.attach(model, density=0.3, **options) as tuner:
        train(model, tuner)
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        batch = mlp_batches(1)[0]
        assert torch.equal(loaded(batch[0]), model(batch[0]))
        mlp_loss(loaded, batch).backward()
        with pytest.raises(TuningError, match="a copy of one in training"):
            shira.attach(loaded)
        for leave in (loaded.shira_tuner.detach, loaded.shira_tuner.release):
            with pytest.raises(TuningError, match=r"this tuner is of a copy.*adapter\(\) on a base"):
                leave()
        told = loaded.shira_tuner.adapter("x")
        assert told.tensors.keys() == tuner.adapter("x").tensors.keys()
    assert same_bits(all_bits(model), all_bits(mlp()))


@pytest.mark.parametrize("taken", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"])
@pytest.mark.parametrize("options", [{}, {"decompose": 2}, {"low_rank": 2}], ids=str)
def test_a_copy_knows_a_step_that_was_made_by_hand_just_before(options, taken):
    model, batch = mlp(), mlp_batches(1)[0]
    with shira.attach(model, density=0.3, **options) as tuner:
        train(model, tuner)
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter -= 0.1 * torch.ones_like(parameter)
        copied = taken(model)
        assert torch.equal(copied(batch[0]), model(batch[0]))
        mlp_loss(copied, batch).backward()
        assert copied.shira_tuner.adapter().tensors.keys() == tuner.adapter().tensors.keys()
        with torch.no_grad():
            copied[0].weight.normal_()
        with pytest.raises(TuningError, match="'0.weight' was written to"):
            copied(batch[0])


@pytest.mark.parametrize("taken", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"])
@pytest.mark.parametrize("options", [{}, {"decompose": 2}, {"low_rank": 2}, {"lr_scale": 8}], ids=str)
def test_a_copy_knows_a_cast_that_was_made_just_before(options, taken):
    model, inputs = mlp(torch.bfloat16), torch.ones(3, 13, dtype=torch.float16)
    with shira.attach(model, density=0.3, **options) as tuner:
        train(model, tuner)
        copied = taken(model.half())
        assert torch.equal(copied(inputs), model(inputs))
        copied(inputs).sum().backward()
        assert copied.shira_tuner.adapter().tensors.keys() == tuner.adapter().tensors.keys()
    assert same_bits(all_bits(model), all_bits(mlp(torch.bfloat16).half()))


PARTS_OPTIONS = [{}, {"method": "hook"}, {"decompose": 2}, {"low_rank": 2}, {"mask": "struct"}]


@pytest.mark.parametrize("options", PARTS_OPTIONS, ids=str)
def test_weights_that_are_parts_of_one_tensor_train_as_others_do(options):
    def model(parted):
        torch.manual_seed(0)
        made = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.LayerNorm(6))
        states = made.state_dict()
        flat = torch.cat([tensor.flatten() for tensor in states.values()])
        parts = flat.split([tensor.numel() for tensor in states.values()])
        state = {name: part.view_as(states[name]) for name, part in zip(states, parts, strict=True)}
        made.load_state_dict(state if parted else {name: part.clone() for name, part in state.items()}, assign=True)
        return made

    results, inputs = [], torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for parted in (False, True):
        trained = model(parted)
        with shira.attach(trained, density=0.4, **options) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)

            def step(model=trained, optimizer=optimizer):
                optimizer.zero_grad()
                model(inputs.to(model[0].weight.dtype)).square().sum().backward()

            for _ in range(3):
                step()
                optimizer.step()
            if not options:
                tuner.refresh(optimizer)
            if "method" not in options:  # masters are changed without an optimizer: they are written in the forward pass
                with torch.no_grad():
                    for parameter in tuner.parameters():
                        parameter *= 1.5
                step()
                trained.double()
                step()
            results.append(tuner.adapter())
        expected = model(parted)
        assert same_bits(all_bits(trained), all_bits(expected.double() if "method" not in options else expected))
    for name, tensor in results[0].tensors.items():
        assert torch.equal(tensor.values, results[1].tensors[name].values)


def test_another_librarys_hooks_put_on_and_taken_off():
    hooks = pytest.importorskip("accelerate.hooks")
    model = mlp()
    tuner = shira.attach(model, density=0.3)
    hooks.add_hook_to_module(model[0], hooks.ModelHook())
    train(model, tuner)
    outputs = model(torch.ones(1, 13))
    adapter = tuner.adapter()
    tuner.detach()
    assert same_bits(all_bits(model), all_bits(mlp()))
    assert torch.equal(model(torch.ones(1, 13)), mlp()(torch.ones(1, 13))) and not torch.equal(
        model(torch.ones(1, 13)), outputs
    )
    hooks.remove_hook_from_module(model[0])
    with shira.attach(model, density=0.3) as tuner:  # the forward that was put back passes through, and is replaced
        train(model, tuner)
        again = tuner.adapter()
    assert all(torch.equal(adapter.tensors[name].values, again.tensors[name].values) for name in adapter.tensors)
    assert all("forward" not in vars(module) for module in model)
    hooks.add_hook_to_module(model[0], hooks.ModelHook())
    tuner = shira.attach(model, density=0.3)
    hooks.remove_hook_from_module(model[0])
    with pytest.warns(NotTrained, match="'0.weight'; their modules were given another forward"):
        train(model, tuner)
        tuner.adapter()
    tuner.detach()


def test_a_model_that_was_compiled_and_has_run_trains_in_its_wrapper():
    torch.compiler.reset()
    plain, model = family("llama").train(), family("llama").train()
    compiled = torch.compile(model, backend="eager")
    adapters = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(**family_batch("llama"))
        for each, forward in ((plain, plain), (compiled, compiled)):
            with shira.attach(each, density=0.1) as tuner:
                optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
                for seed in range(2):
                    optimizer.zero_grad()
                    forward(**family_batch("llama", seed)).loss.backward()
                    optimizer.step()
                adapters.append(tuner.adapter())
        assert torch.equal(compiled(**family_batch("llama")).logits, family("llama").train()(**family_batch("llama")).logits)
    torch.compiler.reset()
    assert adapters[0].tensors.keys() == adapters[1].tensors.keys()
    for name, tensor in adapters[0].tensors.items():
        torch.testing.assert_close(tensor.values, adapters[1].tensors[name].values)


def test_save_pretrained_has_the_weights_of_now_and_no_more(tiny_llama, tmp_path):
    from safetensors.torch import load_file

    ignored = tiny_llama._keys_to_ignore_on_save
    with shira.attach(tiny_llama, density=0.1) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        tiny_llama(**llama_batches(1)[0]).loss.backward()
        optimizer.step()
        with torch.no_grad():
            tuner.parameters()[0].add_(1)
        tiny_llama.save_pretrained(tmp_path)
        saved, adapter = load_file(tmp_path / "model.safetensors"), tuner.adapter()
    assert not [name for name in saved if "shira" in name]
    for name, tensor in adapter.tensors.items():
        assert torch.equal(saved[name].view(-1)[tensor.indices.long()], tensor.values)
    assert not own_names(tiny_llama) and tiny_llama._keys_to_ignore_on_save == ignored


@pytest.mark.parametrize("mistake", ["a gradient from before", "requires_grad"])
def test_a_step_that_would_change_the_base_is_refused(mistake):
    model = mlp()
    before = all_bits(model)
    if mistake == "a gradient from before":
        mlp_loss(model, mlp_batches(1)[0]).backward()
    tuner = shira.attach(model, density=0.2)
    if mistake == "requires_grad":
        model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    words = {"a gradient from before": "has a gradient from before attach.*call zero_grad", "requires_grad": "turn it off"}
    mlp_loss(model, mlp_batches(1)[0]).backward()
    with pytest.raises(TuningError, match=f"this step of AdamW would change the base.*{words[mistake]}|{words[mistake]}"):
        optimizer.step()
    model.requires_grad_(False)
    for parameter in tuner.parameters():
        parameter.requires_grad_(True)
    optimizer.zero_grad()
    mlp_loss(model, mlp_batches(1)[0]).backward()
    optimizer.step()
    added = nn.Linear(1, 1)  # what others add after attach() is theirs
    model.register_module("added", added)
    torch.optim.AdamW(added.parameters(), lr=0.1).step()
    del model.added
    tuner.detach()
    assert same_bits(before, all_bits(model))


def test_a_run_that_trains_nothing_says_so():
    model = mlp()
    shira.attach(model, density=0.2).detach()
    with shira.attach(model, density=0.2) as tuner:
        old = torch.optim.AdamW(tuner.parameters(), lr=0.1)
    tuner = shira.attach(model, density=0.2)  # the cell of a notebook is run again, and that of the optimizer is not
    for batch in mlp_batches(2):
        mlp_loss(model, batch).backward()
        old.step()
    with pytest.warns(NotTrained, match="nothing trained: there were gradients, and 2 steps of optimizers, but none"):
        tuner.detach()
    head = nn.Linear(4, 1)
    tuner = shira.attach(model, density=0.2)
    optimizer = torch.optim.AdamW([*tuner.parameters(), *head.parameters()], lr=0.1)
    with torch.no_grad():
        features = model(torch.ones(2, model[0].in_features))
    head(features[:, :4]).sum().backward()
    optimizer.step()
    with pytest.warns(NotTrained, match="targets got no gradient.*they ran without gradients only"):
        tuner.detach()


def test_a_forward_pass_without_gradients_does_not_look_at_them(monkeypatch):
    """Another thread may train meanwhile. To read `.grad` while it is written crashes the process."""
    from shira.training.masters import Masters

    model = mlp()
    with shira.attach(model, density=0.2) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1, fused=True)
        mlp_loss(model, mlp_batches(1)[0]).backward()
        optimizer.step()
        for parameter in tuner.parameters():
            parameter.detach().add_(0.1)
        monkeypatch.setattr(Masters, "has_gradient", None)
        with torch.no_grad():
            mlp_loss(model, mlp_batches(1)[0])
        monkeypatch.undo()


def test_entries_that_are_not_finite_are_refused_at_once():
    model = mlp()
    with torch.no_grad():
        model[0].weight[1, 2] = float("inf")
    with pytest.raises(TuningError, match=r"'0.weight': 1 of the \d+ entries that the mask has chosen are infinite or NaN"):
        shira.attach(model, density=0.2)
    shira.attach(model, density=0.2, exclude=["0"]).detach()


def test_names_that_begin_like_a_tuners():
    model = nn.Sequential()
    model.add_module("shira_head", nn.Linear(3, 3))
    model.register_buffer("shira_scale", torch.ones(1))
    model.forward = model.shira_head.forward
    with shira.attach(model, density=0.5) as tuner:
        assert tuner.nnz == 4
    assert float(model.shira_scale) == 1


def test_a_backward_pass_belongs_outside_of_a_reference_as_its_forward_pass_does():
    """Inside, the weights hold the base: gradients of earlier layers would be wrong in silence."""
    model = mlp()
    batch = mlp_batches(1)[0]
    with shira.attach(model, density=0.3) as tuner:
        train(model, tuner)
        tuner.model.zero_grad()
        mlp_loss(model, batch).backward()
        expected = [parameter.grad.clone() for parameter in tuner.parameters()]
        tuner.model.zero_grad()
        loss = mlp_loss(model, batch)
        with tuner.reference(), pytest.raises(TuningError, match=r"inside reference\(\) reached '2.weight'"):
            loss.backward(retain_graph=True)
        tuner.model.zero_grad()
        loss.backward()
        assert all(torch.equal(one, parameter.grad) for one, parameter in zip(expected, tuner.parameters(), strict=True))


def test_torch_evaluates_an_encoder_layer_with_what_was_trained():
    """Torch's fast path reads the weights and calls none of the modules that hold them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model, inputs = nn.TransformerEncoder(layer, 2), torch.randn(2, 6, 16)
    model.eval()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad(), shira.attach(model, density=0.2) as tuner:
        for number in range(2):  # an average of the weights, for example
            for parameter in tuner.parameters():
                parameter.copy_(parameter * 0.5 - number)
            found = model(inputs)
            model.state_dict()  # writes what was trained
            assert torch.equal(found, model(inputs))
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


def test_torch_makes_no_nested_tensors_for_encoder_layers_that_train():
    """Only its fast path could go on with them."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2).eval()
    inputs, mask = torch.randn(2, 6, 16), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    expected = model.train()(inputs, src_key_padding_mask=mask).detach()
    model.eval()
    with shira.attach(model, density=0.2) as tuner:
        found = model(inputs, src_key_padding_mask=mask)
        torch.testing.assert_close(found[~mask], expected[~mask], atol=1e-5, rtol=1e-4)
        found[~mask].square().mean().backward()
        assert all(parameter.grad is not None for parameter in tuner.parameters())
    assert model.use_nested_tensor


def test_a_cast_to_float8_is_refused_until_it_is_undone():
    model = mlp()
    tuner = shira.attach(model, density=0.2)
    model.to(torch.float8_e4m3fn)
    for act in (tuner.adapter, tuner.detach):
        with pytest.raises(
            TuningError, match="'0.weight' was replaced by torch.float8_e4m3fn, or cast to it.*cast the model back"
        ):
            act()
    model.float()
    tuner.detach()
