"""Whatever is done to a switcher, the base comes back to the bit."""

import contextlib
import re
import signal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import AdapterError, BaseMismatch, SparseTensor, Switcher, SwitchError, kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference_fusion(base, adapters, strengths):
    """base + Σ α · (value − base), dense and in float32, entry by entry as the promise says."""
    result = {}
    for name, weight in base.items():
        total, touched, alone = torch.zeros(weight.numel()), torch.zeros(weight.numel()), weight.view(-1).clone()
        for adapter_name in sorted(strengths):
            tensor = adapters[adapter_name].tensors.get(name)
            if tensor is None or strengths[adapter_name] == 0:
                continue
            where, value = tensor.indices.long(), tensor.values.float()
            change = value if tensor.kind == "delta" else value - weight.view(-1)[where].float()
            total[where] += strengths[adapter_name] * change
            touched[where] += 1
            exact = strengths[adapter_name] == 1 and tensor.kind == "overwrite"
            alone[where] = tensor.values if exact else (weight.float().view(-1) + total).to(weight.dtype)[where]
        summed = torch.where(touched > 1, (weight.float().view(-1) + total).to(weight.dtype), alone)
        result[name] = bits(torch.where(touched > 0, summed, weight.view(-1)))
    return result


class SwitcherMachine(RuleBasedStateMachine):
    """Any sequence of add, use, fuse, remove and failure, against the dense reference after every step."""

    @initialize(dtype=st.sampled_from(DTYPES))
    def start(self, dtype):
        self.model = mlp(dtype)
        with torch.no_grad():
            self.model[0].weight.view(-1)[:4] = torch.tensor([-0.0, 0.0, -0.0, 1.0]).to(dtype)
            self.model[2].weight.view(-1)[0] = float("nan")  # a base may hold anything
        self.base = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.base_bits = all_bits(self.model)
        self.storage = [p.data_ptr() for p in self.model.parameters()]
        self.switcher = Switcher(self.model)
        self.adapters = {}

    @rule(
        name=st.sampled_from("abcd"),
        seed=st.integers(0, 99),
        density=st.sampled_from([0.02, 0.3, 1.0]),
        kind=st.sampled_from(["overwrite", "delta"]),
    )
    def add(self, name, seed, density, kind):
        made = random_adapter(self._pristine(), seed, density, kind)
        for tensor_name, tensor in list(made.tensors.items()):  # a NaN in the base stays out of the sums
            keep = ~self.base[tensor_name].view(-1)[tensor.indices.long()].isnan()
            made.tensors[tensor_name] = SparseTensor(tensor.shape, tensor.indices[keep], tensor.values[keep], kind)
            made.metadata["fingerprints"][tensor_name] = shira.sparse.tensor.fingerprint(
                self.base[tensor_name].view(-1)[made.tensors[tensor_name].indices.long()]
            )
        if name in self.adapters:
            with pytest.raises(SwitchError, match="already"):
                self.switcher.add(name, made)
        else:
            self.switcher.add(name, made)
            self.adapters[name] = made

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def use(self, data):
        names = st.sampled_from(sorted(self.adapters))
        strengths = data.draw(st.dictionaries(names, st.sampled_from([1.0, 0.5, -1.0, 2.0, 0.0, 1])))
        changes = self.switcher.changes(strengths)
        self.live_weights_are_what_was_promised()
        self.switcher.use(strengths)
        self.check_changes(changes)
        assert self.switcher.active == {k: v for k, v in strengths.items() if v}

    def check_changes(self, changes):
        """They are exactly what is in the weights now, minus the base."""
        for name, weight in self.model.named_parameters():
            expected = weight.detach().float() - self.base[name].float()
            if name in changes:
                assert changes[name].kind == "delta"
                where = changes[name].indices.long()
                assert torch.equal(changes[name].values, expected.view(-1)[where])
                expected.view(-1)[where] = 0
            assert not expected.nan_to_num().any()

    @rule()
    def use_an_unknown(self):
        before, active = all_bits(self.model), self.switcher.active
        with pytest.raises(SwitchError, match="no adapter"):
            self.switcher.use({**dict.fromkeys(self.adapters, 0.5), "zzz": 1.0})
        with pytest.raises(SwitchError, match="no adapter"):
            self.switcher.changes("zzz")
        assert same_bits(before, all_bits(self.model))
        assert self.switcher.active == active

    @rule(name=st.sampled_from("abcd"))
    def remove(self, name):
        if name in self.switcher.active or name not in self.adapters:
            with pytest.raises(SwitchError, match=r"is active|no adapter"):
                self.switcher.remove(name)
        else:
            self.switcher.remove(name)
            del self.adapters[name]

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), after=st.integers(0, 3))
    def fail_half_way(self, data, after):
        """The kernel breaks after some writes: the base is active, or what was before if nothing had been written yet."""
        names = data.draw(st.sets(st.sampled_from(sorted(self.adapters)), min_size=1))
        before, wanted = self.switcher.active, dict.fromkeys(names, 1.0)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RuntimeError):
            left = break_after(patch, after)
            self.switcher.use(wanted)
        broke = left[0] < 0
        assert broke or after > 0 or before == wanted
        assert self.switcher.active in ([{}, before] if broke else [wanted])

    @rule(name=st.sampled_from("abcd"))
    def borrow(self, name):
        before, state = self.switcher.active, all_bits(self.model)
        with contextlib.suppress(SwitchError, RuntimeError), self.switcher.using(name):
            raise RuntimeError("inside")
        assert self.switcher.active == before
        assert same_bits(state, all_bits(self.model))

    @invariant()
    def live_weights_are_what_was_promised(self):
        expected = reference_fusion(self.base, self.adapters, self.switcher.active)
        assert same_bits(expected, all_bits(self.model))
        assert self.storage == [p.data_ptr() for p in self.model.parameters()]

    def teardown(self):
        if hasattr(self, "switcher"):
            self.switcher.use(None)
            assert same_bits(self.base_bits, all_bits(self.model))

    def _pristine(self):
        model = mlp(self.model[0].weight.dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.base[name])
        return model


SwitcherMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=12, deadline=None)
TestSwitcher = SwitcherMachine.TestCase


def break_after(patch, writes):
    """Let the kernel raise once, in the middle of a tensor; then it works again, as after a passing fault.

    Returns a list of the number of writes until then, which is negative once the kernel has raised.
    """
    torch_ops = kernels.torch_ops
    real, left = torch_ops.overwrite_, [writes]

    def faulty(weight, indices, values):
        left[0] -= 1
        if left[0] == -1:
            weight.detach().view(-1)[indices[: len(indices) // 2].long()] = values[: len(indices) // 2]
            raise RuntimeError("the kernel broke")
        real(weight, indices, values)

    patch.setattr(torch_ops, "overwrite_", faulty)
    patch.setattr(kernels.native, "available", lambda *tensors: False)
    return left


@pytest.mark.parametrize("writes", range(4))  # two tensors restored, two overwritten
def test_a_failure_at_any_write_leaves_the_base(monkeypatch, writes):
    model = mlp()
    before = all_bits(model)
    switcher = Switcher(model)
    for name, seed in (("a", 1), ("b", 2)):
        switcher.add(name, random_adapter(model, seed))
    switcher.use("a")
    break_after(monkeypatch, writes)
    with pytest.raises(RuntimeError, match="the kernel broke"):
        switcher.use("b")
    assert switcher.active == {}
    assert same_bits(before, all_bits(model))
    switcher.use("b")
    switcher.use(None)
    assert same_bits(before, all_bits(model))


def test_switching_from_a_file(tmp_path):
    model = mlp(torch.bfloat16)
    adapter = random_adapter(model, 1)
    adapter.save(tmp_path / "poet.safetensors")
    switcher = Switcher(model)
    switcher.add("poet", tmp_path / "poet.safetensors")
    switcher.use("poet")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(bits(model.get_parameter(name).view(-1)[tensor.indices.long()]), bits(tensor.values))
    assert (switcher.active, switcher.names) == ({"poet": 1.0}, ["poet"])


def test_add_while_another_is_active_checks_against_the_base():
    model = mlp()
    one, other = random_adapter(model, 1), random_adapter(model, 2)
    switcher = Switcher(model)
    switcher.add("one", one)
    switcher.use("one")
    switcher.add("other", other)
    with pytest.raises(BaseMismatch):
        switcher.add("wrong", random_adapter(model, 3))  # fingerprints of the live weights, which are not the base


def test_an_adapter_of_another_base_is_refused_and_nothing_written(tmp_path):
    random_adapter(mlp(seed=1), 1).save(tmp_path / "poet.safetensors")
    model = mlp(seed=2)
    before = all_bits(model)
    switcher = Switcher(model)
    with pytest.raises(BaseMismatch, match=r"poet.safetensors does not belong.*'0.weight' have fingerprint xxh3:[0-9a-f]{32}"):
        switcher.add("poet", tmp_path / "poet.safetensors")
    assert switcher.names == []
    assert same_bits(before, all_bits(model))


def test_a_bfloat16_adapter_serves_the_same_checkpoint_in_float32():
    """The fingerprint is of values: a bfloat16 checkpoint loaded in float32 is the same base."""
    model = mlp(torch.bfloat16)
    adapter = random_adapter(model, 1)
    wide = mlp(torch.bfloat16).float()
    switcher = Switcher(wide)
    switcher.add("a", adapter)
    switcher.use("a")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(wide.get_parameter(name).view(-1)[tensor.indices.long()], tensor.values.float())


def adapter_with(**tensors):
    return shira.Adapter({name.replace("_", "."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (
            adapter_with(**{"9_weight": SparseTensor((5, 11), torch.tensor([0]), torch.ones(1))}),
            r"no tensor '9.weight'; did you mean",
        ),
        (
            adapter_with(**{"0_weight": SparseTensor((13, 11), torch.tensor([0]), torch.ones(1))}),
            r"'0.weight' has shape \[11, 13\].*\[13, 11\]",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(adapter, words):
    switcher = Switcher(mlp())
    with pytest.raises(BaseMismatch, match=words):
        switcher.add("x", adapter)
    assert switcher.names == []


def test_a_wrapped_model_is_answered_with_the_one_inside():
    adapter = random_adapter(mlp(), 1)
    for wrapped in (nn.DataParallel(mlp()), torch.optim.swa_utils.AveragedModel(mlp())):
        with pytest.raises(BaseMismatch, match=r"'0.weight'; it is in a wrapper, .* give the model inside, model.module"):
            Switcher(wrapped).add("a", adapter)
        with pytest.raises(BaseMismatch, match="model.module"):
            shira.fuse({"a": (adapter, 0.5)}, base=wrapped)


def test_values_that_the_models_dtype_does_not_hold_are_refused():
    model = mlp(torch.float16)
    big = adapter_with(**{"0_weight": SparseTensor((11, 13), torch.tensor([0]), torch.tensor([1e6]))})
    with pytest.raises(BaseMismatch, match=r"'0.weight' is torch.float16"):
        Switcher(model).add("x", big)
    fits = adapter_with(**{"0_weight": SparseTensor((11, 13), torch.tensor([0]), torch.tensor([6e4]))})
    before = all_bits(model)
    switcher = Switcher(model)
    switcher.add("x", fits)
    with pytest.raises(AdapterError, match="overflow"):
        switcher.use({"x": 2.0})
    assert same_bits(before, all_bits(model))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", True, None])
def test_a_strength_must_be_a_finite_number(strength):
    model = mlp()
    switcher = Switcher(model)
    switcher.add("a", random_adapter(model, 1))
    with pytest.raises(AdapterError, match="'a' must be a finite number"):
        switcher.use({"a": strength})
    assert switcher.active == {}


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_name_must_be_a_string(name):
    with pytest.raises(SwitchError, match="a name must be"):
        Switcher(mlp()).add(name, shira.Adapter({}))


def test_a_strength_and_a_second_adapter_belong_in_one_mapping():
    model = mlp()
    switcher = Switcher(model)
    for number, name in enumerate("ab"):
        switcher.add(name, random_adapter(model, number))
    for call, error, words in (
        (lambda: switcher.use("a", 0.5), SwitchError, "a strength belongs to its name: use({'a': 0.5})"),
        (lambda: switcher.use("a", strength=0.5), SwitchError, "a strength belongs to its name: use({'a': 0.5})"),
        (lambda: switcher.prefetch("a", "b"), SwitchError, "several adapters are one mapping: use({'a': 1.0, 'b': 1.0})"),
        (lambda: switcher.use("a", "c"), AdapterError, "unknown fusion method 'c'; "),
        (lambda: switcher.use({"a": 1.0}, strength=0.5), AdapterError, "fusion method 'sum' has no option 'strength'"),
    ):
        with pytest.raises(error, match=re.escape(words)):
            call()
    assert switcher.active == {}


def test_unknown_names_get_a_suggestion():
    model = mlp()
    switcher = Switcher(model)
    switcher.add("poet", random_adapter(model, 1))
    with pytest.raises(SwitchError, match="did you mean 'poet'"):
        switcher.use("peot")


def tied_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_are_written_once():
    model = tied_model()
    before = all_bits(model)
    part = SparseTensor((6, 6), torch.tensor([2, 30]), torch.tensor([5.0, 6.0]))
    switcher = Switcher(model)
    switcher.add("both", adapter_with(**{"0_weight": part, "1_weight": part}))
    switcher.add("second name", adapter_with(**{"1_weight": part}))
    for strengths in ({"both": 2.0}, {"second name": 2.0}):
        switcher.use(strengths)
        base = before["0.weight"].view(torch.float32)[[2, 30]]
        torch.testing.assert_close(model[1].weight.detach().view(-1)[[2, 30]], base + 2 * (part.values - base))
    switcher.use(None)
    assert same_bits(before, all_bits(model))
    other = SparseTensor((6, 6), torch.tensor([2, 30]), torch.tensor([5.0, -6.0]))
    with pytest.raises(BaseMismatch, match="one tied tensor"):
        switcher.add("torn", adapter_with(**{"0_weight": part, "1_weight": other}))


def test_an_llm_with_tied_embeddings(tiny_llama):
    before = all_bits(tiny_llama)
    adapter = random_adapter(tiny_llama, 3, density=0.05)
    assert "model.embed_tokens.weight" in adapter.tensors
    switcher = Switcher(tiny_llama)
    switcher.add("a", adapter)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        base = tiny_llama(ids).logits
        with switcher.using("a"):
            assert not torch.equal(base, tiny_llama(ids).logits)
        assert torch.equal(base, tiny_llama(ids).logits)
    assert same_bits(before, all_bits(tiny_llama))


def test_an_interrupt_at_any_moment_leaves_what_is_active_exact():
    """A real signal, while switching with the native kernel: the state is the one before, the one asked for, or the base."""
    model = mlp()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = {name: random_adapter(model, seed) for name, seed in (("a", 1), ("b", 2))}
    adapters["c"] = shira.Adapter({n: SparseTensor(t.shape, t.indices, t.values + 1) for n, t in adapters["a"].tensors.items()})
    switcher = Switcher(model)
    for name, adapter in adapters.items():
        switcher.add(name, adapter)

    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for number in range(600):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + (number % 100) * 3e-6)
                switcher.use("abc"[number % 3])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
            assert same_bits(reference_fusion(base, adapters, switcher.active), all_bits(model))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 50
    switcher.use(None)
    assert same_bits({name: bits(tensor) for name, tensor in base.items()}, all_bits(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_selection_has_the_same_bits_however_the_base_is_found(monkeypatch, dtype):
    """While another one is active: by copies of the windows that the kernel passes, or by looking the base up."""
    found = []
    for copied in (0, 2**60):
        monkeypatch.setattr("shira.switching.preparing.COPIED", copied)
        model = mlp(dtype)
        switcher = Switcher(model)
        for seed, name in enumerate("abc"):
            switcher.add(name, random_adapter(model, seed, 0.3, "delta" if name == "c" else "overwrite"))
        for selection in ("a", {"b": 0.5}, {"a": 0.7, "b": 1.0}, {"b": 1.0, "c": -0.5}, {"a": 0.2, "b": 0.3, "c": 0.4}):
            switcher.use(selection)
            found.append(all_bits(model))
        switcher.use(None)
        assert same_bits(all_bits(mlp(dtype)), all_bits(model))
    half = len(found) // 2
    assert all(same_bits(one, other) for one, other in zip(found[:half], found[half:], strict=True))
