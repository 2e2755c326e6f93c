"""Entries that train by way of a magnitude and a direction, or beside a low-rank product, against their dense definitions."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import shira
from conftest import all_bits, mlp, mlp_batches, mlp_loss, same_bits
from families import family, family_batch
from shira import TargetError, TuningError
from shira.training.checkpoint_watch import LowRankLeftOut
from shira.training.variants.factors import Factors, row_blocks

BATCHES = mlp_batches(6)


def dense_weight(entry, own):
    """The weight that is trained, in full, from its definition; `own` are leaves by the endings of their names."""
    base, mask = entry.weight.detach().clone().view(entry.matrix_shape), torch.zeros(entry.matrix_shape, dtype=torch.bool)
    mask.view(-1)[entry.indices.long()] = True

    def effective():
        direction = base.clone()
        if "" in own:
            direction = direction.masked_scatter(mask, own[""])
        if "_up" in own:
            direction = direction + own["_up"].T @ own["_down"]
        if "_magnitude" not in own:  # the hybrid
            return direction.view(entry.weight.shape)
        norms = direction.norm(dim=0 if entry.output_dim else 1, keepdim=True).detach()
        magnitude = own["_magnitude"][None] if entry.output_dim else own["_magnitude"][:, None]
        return torch.where(mask, magnitude * direction / norms, base).view(entry.weight.shape)

    return effective


def model_and_batches(name):
    if name == "mlp":
        return mlp(), BATCHES, mlp_loss, "all-linear"
    model = family(name)
    return model, [family_batch(name, seed) for seed in range(3)], lambda m, b: m(**b).loss, "all-linear"


VARIANTS = [{"decompose": True}, {"decompose": 3}, {"low_rank": 3}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
def test_gradients_and_steps_are_those_of_the_dense_definition(name, variant):
    model, batches, loss_of, targets = model_and_batches(name)
    before, twin = all_bits(model), copy.deepcopy(model)
    with shira.attach(model, mask="wm", density=0.2, targets=targets, **variant) as tuner:
        assert torch.equal(loss_of(model, batches[0]), loss_of(twin, batches[0]))  # attaching changes nothing
        leaves = {
            entry.name: {end: p.detach().clone().requires_grad_() for end, p in entry.parameters.items()}
            for entry in tuner._tuned
        }
        weights = {entry.name: dense_weight(entry, leaves[entry.name]) for entry in tuner._tuned}
        flat = [leaf for own in leaves.values() for leaf in own.values()]
        assert [p.shape for p in flat] == [p.shape for p in tuner.parameters()]
        ours = torch.optim.AdamW(tuner.parameters(), lr=0.02, weight_decay=0.1)
        theirs = torch.optim.AdamW(flat, lr=0.02, weight_decay=0.1)

        class Dense(nn.Module):
            def forward(self, *args, **kwargs):
                return functional_call(twin, {name: make() for name, make in weights.items()}, args, kwargs)

            def parameters(self, recurse=True):
                return twin.parameters()

        for batch in batches:
            for optimizer, net in ((ours, model), (theirs, Dense())):
                optimizer.zero_grad()
                loss = loss_of(net, batch)
                loss.backward()
                optimizer.loss = float(loss.detach())
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
            for parameter, leaf in zip(tuner.parameters(), flat, strict=True):
                torch.testing.assert_close(parameter.grad, leaf.grad, rtol=2e-3, atol=2e-6)
                parameter.grad.copy_(leaf.grad)  # AdamW makes much of the rounding of small gradients
            ours.step()
            theirs.step()
        for entry in tuner._tuned:
            indices = entry.indices.long()
            expected = weights[entry.name]().detach().reshape(-1)[indices]
            torch.testing.assert_close(entry.touched().values, expected, rtol=1e-4, atol=1e-6)
            assert not torch.equal(entry.touched().values, entry.touched().base)
    assert same_bits(before, all_bits(model))
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any("shira" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("decompose", [True, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_decomposed_is_a_plain_adapter_and_all_that_was_trained(decompose, dtype, tmp_path):
    model = mlp(dtype)
    before = all_bits(model)
    with shira.attach(model, mask="wm", density=0.1, decompose=decompose) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05, fused=True)  # which moves no version counter
        for batch in BATCHES:
            optimizer.zero_grad()
            mlp_loss(model, batch).backward()
            optimizer.step()
        trained, changed = mlp_loss(model, BATCHES[0]).detach(), all_bits(model)
        tuner.adapter("decomposed").save(tmp_path / "a.safetensors")
    assert same_bits(before, all_bits(model))
    adapter = shira.load(tmp_path / "a.safetensors")
    assert adapter.metadata["mask"]["decompose"] == decompose and adapter.nnz == 20
    switcher = shira.Switcher(model)
    switcher.add("a", adapter)
    switcher.use("a")
    for name, now in all_bits(model).items():
        assert torch.equal(now, changed[name])
        moved = int((now.view(dtype) != before[name].view(dtype)).sum())
        assert moved <= adapter.tensors[name].nnz if name in adapter.tensors else moved == 0
    assert torch.equal(mlp_loss(model, BATCHES[0]), trained)


peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@peft_warns
def test_a_hybrid_says_what_a_sparse_adapter_loses_and_both_its_parts_are_exact(tmp_path):
    peft = pytest.importorskip("peft")
    model = family("llama")
    batches = [family_batch("llama", seed) for seed in range(3)]
    with shira.attach(model, mask="rand", density=0.1, low_rank=2) as tuner:
        assert tuner.adapter().metadata["low_rank"] == {"rank": 2, "kept": 1.0}
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.02)
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        trained = model(**batches[0]).logits.detach()
        alone = tuner.adapter()
        inside = everything = 0.0
        for entry in tuner._tuned:
            change = entry.low_rank.up.detach().T @ entry.low_rank.down.detach()
            change.view(-1)[entry.indices.long()] += entry.values.detach() - entry.base
            inside += float(change.view(-1)[entry.indices.long()].square().sum())
            everything += float(change.square().sum())
        tuner.save_hybrid(tmp_path / "both")
    kept = alone.metadata["low_rank"]["kept"]
    assert kept == pytest.approx(inside / everything, rel=1e-4) and 0.1 < kept < 0.9
    switcher = shira.Switcher(model)
    switcher.add("sparse", tmp_path / "both" / "adapter.safetensors")
    switcher.add("alone", alone)
    switcher.use("alone")
    assert not torch.allclose(model(**batches[0]).logits, trained, atol=1e-3)
    switcher.use("sparse")
    with_lora = peft.PeftModel.from_pretrained(model, tmp_path / "both" / "lora")
    torch.testing.assert_close(with_lora(**batches[0]).logits, trained, rtol=1e-4, atol=1e-5)


@peft_warns
def test_both_parts_of_gpt2s_layers_load_as_well(tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = family("gpt2"), family_batch("gpt2")
    with shira.attach(model, mask="rand", density=0.1, low_rank=2) as tuner:
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        trained = model(**batch).logits.detach()
        tuner.save_hybrid(tmp_path)
    switcher = shira.Switcher(model)
    switcher.add("sparse", tmp_path / "adapter.safetensors")
    switcher.use("sparse")
    with_lora = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    torch.testing.assert_close(with_lora(**batch).logits, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_base_as_reference_and_a_run_taken_up_again(variant):
    model = mlp()
    base = mlp_loss(model, BATCHES[0]).detach()

    def steps(tuner, batches):
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
        for batch in batches:
            optimizer.zero_grad()
            mlp_loss(model, batch).backward()
            optimizer.step()

    with shira.attach(model, mask="wm", density=0.2, **variant) as tuner:
        steps(tuner, BATCHES[:3])
        state = tuner.state_dict()
        loss = mlp_loss(model, BATCHES[0])
        with tuner.reference():
            assert torch.equal(mlp_loss(model, BATCHES[0]), base)
        loss.backward()
        assert torch.equal(mlp_loss(model, BATCHES[0]), loss) and not torch.equal(loss, base)
        steps(tuner, BATCHES[3:])
        whole = tuner.adapter()
    with shira.attach(model, mask="wm", density=0.2, **variant) as tuner:
        tuner.load_state_dict(state)
        assert torch.equal(mlp_loss(model, BATCHES[0]), loss)
        steps(tuner, BATCHES[3:])
        for name, tensor in tuner.adapter().tensors.items():
            assert torch.equal(tensor.values, whole.tensors[name].values)
    with shira.attach(model, mask="wm", density=0.2) as tuner, pytest.raises(TuningError, match="another mask|other targets"):
        tuner.load_state_dict({key: value[:3] for key, value in state.items()})


def test_a_product_at_positions_and_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("shira.training.variants.factors.BLOCK", 30)
    factors = Factors((11, 13), 4, seed=3, device=torch.device("cpu"))
    with torch.no_grad():
        factors.up.normal_(generator=torch.Generator().manual_seed(0))
    product = (factors.up.T @ factors.down).detach()
    indices = torch.randperm(143, generator=torch.Generator().manual_seed(0))[:40].sort().values.int()
    torch.testing.assert_close(factors.at(indices), product.reshape(-1)[indices.long()])
    assert factors.squares() == pytest.approx(float(product.square().sum()))
    places = [indices[inside] for _, inside in row_blocks((11, 13), indices)]
    assert len(places) == 6 and torch.equal(torch.cat(places), indices)
    for rows, inside in row_blocks((11, 13), indices):
        assert bool((indices[inside] // 13 >= rows.start).all() and (indices[inside] // 13 < rows.stop).all())


def test_vectors_and_rows_of_zeros_decompose():
    model = mlp()
    with torch.no_grad():
        model[0].weight[3] = 0
    with shira.attach(model, mask="rand", density=0.5, targets=["0", "bias"], decompose=True) as tuner:
        mlp_loss(model, BATCHES[0]).backward()
        torch.optim.SGD(tuner.parameters(), lr=0.1).step()
        assert all(bool(entry.touched().values.isfinite().all()) for entry in tuner._tuned)
        assert len(tuner.parameters()) == 4  # values and magnitude of the matrix, values of each bias


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decompose": 0}, "decompose must be a rank"),
        ({"low_rank": True}, "low_rank must be a rank"),
        ({"decompose": True, "low_rank": 2}, "cannot be combined"),
        ({"decompose": True, "method": "hook"}, "needs method='values'"),
        ({"low_rank": 2, "targets": ["bias"]}, "'0.bias'"),
    ],
)
def test_what_cannot_be_had(options, message):
    model = mlp()
    before = all_bits(model)
    with pytest.raises((TuningError, TargetError), match=message):
        shira.attach(model, **options)
    assert same_bits(before, all_bits(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")  # torch's own, of processes and meshes
def test_sharded_weights_have_no_variants():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(mlp(), mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(TargetError, match=r"'0.weight' is sharded, and decompose needs whole weights"):
            shira.attach(model, decompose=True)
    finally:
        dist.destroy_process_group()


def test_variants_are_not_refreshed_and_plain_tuners_have_no_second_part(tmp_path):
    for variant in ({"decompose": True}, {"low_rank": 2}):
        with (
            shira.attach(mlp(), **variant) as tuner,
            pytest.raises(TuningError, match="decompose, low_rank .* cannot be refreshed"),
        ):
            tuner.refresh(torch.optim.SGD(tuner.parameters(), lr=0.1))
    with shira.attach(mlp()) as tuner, pytest.raises(TuningError, match="low_rank=8"):
        tuner.save_hybrid(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("variant", [{}, {"decompose": 2}, {"decompose": True}, {"low_rank": 2}])
def test_a_plain_loop_goes_on_from_the_models_own_state(variant):
    model = mlp()

    def step(optimizer, batch):
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        optimizer.step()

    with shira.attach(model, mask="wm", density=0.2, **variant) as tuner:
        step(torch.optim.SGD(tuner.parameters(), lr=0.5), BATCHES[0])
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        before, loss = tuner.adapter(), mlp_loss(model, BATCHES[1]).detach()
    base = all_bits(model)
    with shira.attach(model, mask="wm", density=0.2, **variant) as tuner:
        model.load_state_dict(state)
        assert torch.equal(mlp_loss(model, BATCHES[1]), loss)
        for name, tensor in tuner.adapter().tensors.items():
            assert torch.equal(tensor.values, before.tensors[name].values)
        step(torch.optim.SGD(tuner.parameters(), lr=0.5), BATCHES[1])
    assert same_bits(base, all_bits(model))


def test_what_leaves_out_the_low_rank_part_says_so(tiny_llama, tmp_path):
    tuner = shira.attach(tiny_llama, density=0.1, low_rank=2)
    with pytest.warns(LowRankLeftOut, match=r"save_pretrained writes the weights .* without the low-rank part.*save_hybrid"):
        tiny_llama.save_pretrained(tmp_path)
    with pytest.warns(LowRankLeftOut, match="release.. keeps the weights"):
        tuner.release()


def test_a_low_rank_part_beside_layers_that_are_called_by_keyword():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
            return super().forward(x) * by

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Scaled(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(input=self.one(x=x, by=2.0))

    torch.manual_seed(0)
    model, inputs = Model(), torch.randn(5, 4)
    expected = model(inputs)
    with shira.attach(model, density=0.3, low_rank=1) as tuner:
        assert torch.equal(model(inputs), expected)
        model(inputs).square().mean().backward()
        assert all(parameter.grad is not None for parameter in tuner.parameters())


def test_both_parts_replace_older_ones_together_or_not_at_all(tmp_path, monkeypatch):
    def files():
        return {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    model = mlp()
    with shira.attach(model, density=0.2, low_rank=2) as tuner:
        for wrong in (None, 3, "", "a\0b"):
            with pytest.raises(TuningError, match=r"expected the path of a file, as in tuner.save_hybrid\('both'\)"):
                tuner.save_hybrid(wrong)
        tuner.save_hybrid(tmp_path)
        before = files()
        mlp_loss(model, mlp_batches(1)[0]).backward()
        torch.optim.SGD(tuner.parameters(), lr=1.0).step()
        with monkeypatch.context() as patch:
            patch.setattr("shira.training.variants.hybrid.write_whole", full)
            with pytest.raises(OSError, match="No space left"):
                tuner.save_hybrid(tmp_path)
        assert files() == before
        tuner.save_hybrid(tmp_path)
    assert files().keys() == before.keys() and files() != before
