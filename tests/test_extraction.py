import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import AdapterError, CheckpointError, MaskError, Switcher, TargetError
from shira.checkpoints import differences
from shira.checkpoints.extraction import extract_to, summary
from shira.checkpoints.sources import Checkpoint
from shira.sparse.tensor import fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def two_checkpoints(dtype=torch.float32, seed=0, changed=0.4):
    """Tensors of odd shapes, and a fine-tune with many equal differences, signs of zero and a tensor that stays."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (13, 11), "a.bias": (13,), "b.weight": (7, 3, 5), "c.weight": (1, 1), "scale": (), "empty": (0, 4)}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    base["same.weight"] = torch.randn(6, 6, generator=generator).to(dtype)
    base["a.weight"].view(-1)[:20:3] = 0.0
    tuned = {}
    for name, tensor in base.items():
        steps = torch.randint(-3, 4, tensor.shape, generator=generator) * 0.25
        moved = torch.where(torch.rand(tensor.shape, generator=generator) < changed, tensor.float() + steps, tensor.float())
        tuned[name] = moved.to(dtype)
    tuned["a.weight"].view(-1)[:20:6] = -0.0
    tuned["same.weight"] = base["same.weight"].clone()
    return base, tuned


def differing(base, tuned):
    width = base.element_size()
    return (bits(base).view(-1, width) != bits(tuned).view(-1, width)).any(1)


def obvious(base, tuned, density, scope):
    """name -> positions: all sorted, by |ΔW| in float32, then by tensor and position."""
    rows = []
    for name in sorted(base):
        wide = torch.promote_types(base[name].dtype, torch.float32)
        change = (tuned[name].to(wide) - base[name].to(wide)).float().abs().view(-1)
        mask = differing(base[name], tuned[name])
        rows += [(-float(change[at]), name, at) for at in mask.nonzero().view(-1).tolist()]
    adapted = {name for _, name, _ in rows}
    kept = []
    for group in [adapted] if scope == "model" else [{name} for name in adapted]:
        k = max(1, round(density * sum(base[name].numel() for name in group)))
        kept += sorted(row for row in rows if row[1] in group)[:k]
    return {name: sorted(at for _, n, at in kept if n == name) for name in {name for _, name, _ in kept}}


@given(
    seed=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.001, 0.02, 0.1, 0.3, 0.5, 1.0]),
    scope=st.sampled_from(["tensor", "model"]),
    chunk=st.sampled_from([5, 64, 2**16]),
)
@settings(max_examples=40)
def test_it_takes_what_sorting_would_take(seed, dtype, density, scope, chunk):
    base, tuned = two_checkpoints(dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "CHUNK", chunk)
        adapter = shira.extract(base, tuned, density=density, scope=scope)
    wanted = obvious(base, tuned, density, scope)
    assert {name: tensor.indices.tolist() for name, tensor in adapter.tensors.items()} == wanted
    for name, tensor in adapter.tensors.items():
        where = tensor.indices.long()
        assert torch.equal(bits(tensor.values), bits(tuned[name].reshape(-1)[where]))
        assert adapter.fingerprints[name] == fingerprint(base[name].reshape(-1)[where])
    change = {name: tuned[name].double() - base[name].double() for name in base}
    whole = sum(float(c.square().sum()) for c in change.values())
    kept = sum(float(change[name].view(-1)[torch.tensor(where)].square().sum()) for name, where in wanted.items())
    facts = summary(adapter)
    assert facts["kept"] == pytest.approx((kept / whole) ** 0.5, rel=1e-5)
    assert facts["norm"] == pytest.approx(whole**0.5, rel=1e-5)
    assert facts["changed"] == sum(int(differing(base[name], tuned[name]).sum()) for name in base)
    curve = dict(map(tuple, facts["curve"]))
    assert density not in curve or curve[density] == pytest.approx(facts["kept"], abs=0.005)
    assert facts["suggested_density"] == min(d for d, share in curve.items() if share >= 0.9)
    assert "same.weight" not in facts["tensors"]


def test_the_level_is_found_where_numbers_are_many_and_equal_ones_too():
    """More than a chunk, a normal distribution and a million ties, against torch's own sort."""
    generator = torch.Generator().manual_seed(0)
    base = {"normal": torch.zeros(1000, 701), "ties": torch.zeros(1000, 701)}
    tuned = {
        "normal": torch.randn(1000, 701, generator=generator),
        "ties": torch.randint(0, 3, (1000, 701), generator=generator) * 1e-3,
    }
    adapter = shira.extract(base, tuned, density=0.03)
    for name, tensor in tuned.items():
        order = tensor.view(-1).abs().sort(descending=True, stable=True).indices[: round(0.03 * tensor.numel())]
        assert torch.equal(adapter.tensors[name].indices.long(), order.sort().values)
    both = shira.extract(base, tuned, density=0.5, scope="model")
    assert both.tensors["normal"].nnz + both.tensors["ties"].nnz == round(0.5 * 2 * 701_000)
    facts = summary(shira.extract(base, {"normal": tuned["normal"], "ties": base["ties"]}, density=0.1))
    for density, share in facts["curve"]:  # of a normal distribution
        assert share == pytest.approx(tail_share(tuned["normal"], density), abs=0.002)


def tail_share(change, density):
    squares = change.view(-1).double().square().sort(descending=True).values
    return float((squares[: max(1, round(density * len(squares)))].sum() / squares.sum()) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_adapter_makes_the_tuned_model(dtype):
    model = mlp(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = random_adapter(model, 1, density=0.09)
    switcher = Switcher(model)
    switcher.add("tuned", adapter)
    switcher.use("tuned")
    tuned = all_bits(model)
    exact = shira.extract(base, model)
    deltas = shira.extract(base, model, kind="delta")
    switcher.use(None)
    for name, tensor in exact.tensors.items():
        assert torch.equal(tensor.indices, adapter.tensors[name].indices)
        assert torch.equal(bits(tensor.values), bits(adapter.tensors[name].values))
    assert exact.fingerprint == adapter.fingerprint
    assert summary(exact)["kept"] == 1.0
    assert {t.values.dtype for t in deltas.tensors.values()} == {torch.promote_types(dtype, torch.float32)}
    switcher.add("exact", exact)
    switcher.use("exact")
    assert same_bits(all_bits(model), tuned)
    if dtype in (torch.bfloat16, torch.float16):  # the difference fits float32, or nearly, and is rounded to the tuned value
        switcher.add("deltas", deltas)
        switcher.use("deltas")
        assert same_bits(all_bits(model), tuned)


def test_a_dense_fine_tune_needs_a_density():
    base, tuned = two_checkpoints(changed=0.9)
    with pytest.raises(CheckpointError, match=r"entries differ \(65.6%\), an exact .* holds at most 10%.* 0.05 keeps \d+%"):
        shira.extract(base, tuned)
    narrow = {name: tuned[name] if name == "a.bias" else tensor for name, tensor in base.items()}
    assert set(shira.extract(base, narrow).tensors) == {"a.bias"}  # dense in one small tensor is sparse in the whole


def test_targets_and_what_they_leave_out():
    base, tuned = two_checkpoints()
    for targets in (["weight"], r".*\.weight", r"[abc]"):
        chosen = {"a.weight", "b.weight", "c.weight"} | ({"a.bias"} if targets == "[abc]" else set())
        adapter = shira.extract(base, tuned, density=1.0, targets=targets)
        facts = summary(adapter)
        assert set(adapter.tensors) == chosen & set(facts["tensors"])
        assert set(facts["left_out"]) == set(facts["tensors"]) - chosen
        lost = sum(entry["norm"] ** 2 for name, entry in facts["tensors"].items() if name not in chosen)
        assert facts["kept"] == pytest.approx((1 - lost / facts["norm"] ** 2) ** 0.5)
    assert set(shira.extract(base, tuned, density=0.1, targets=["a"]).tensors) == {"a.weight", "a.bias"}
    for targets, message in (
        (["a", "bb"], "target 'bb' matches no tensor; did you mean 'b'"),
        ([], "target '' matches no tensor"),
        ("attention", "match no tensor"),
        ("(", "not a regular expression"),
        ("all-linear", "does not say which tensors are linear"),
    ):
        with pytest.raises(TargetError, match=message):
            shira.extract(base, tuned, density=0.1, targets=targets)


def test_checkpoints_that_do_not_match():
    base, tuned = two_checkpoints()
    cases = [
        ({k: v for k, v in tuned.items() if k != "a.bias"}, "'a.bias' is in the base only"),
        (tuned | {"d": torch.ones(3)}, "'d' is in the tuned checkpoint only"),
        (tuned | {"a.bias": torch.ones(14)}, r"'a.bias' is float32 \[13\] in the base, float32 \[14\] in the tuned"),
        ({k: v.bfloat16() for k, v in tuned.items()}, r"bfloat16 \[13\] in the tuned checkpoint; .* and 4 more. Give a base"),
        (tuned | {"a.bias": torch.ones(13, device="meta")}, "'a.bias' has no data"),
        (tuned | {"a.bias": torch.full((13,), float("nan"))}, "'a.bias' goes from .* to nan at position 0"),
        (tuned | {"a.bias": base["a.bias"] + float("inf")}, "'a.bias' goes from .* to inf"),
        (base, "tuned differs nowhere from base"),
    ]
    for other, message in cases:
        with pytest.raises(CheckpointError, match=message):
            shira.extract(base, other, density=0.1)
    without = {k: v for k, v in tuned.items() if k != "a.bias"} | {"a.weight": torch.ones(2)}
    adapter = shira.extract(base, without, density=0.1, targets=["b"])
    assert summary(adapter)["not_compared"] == ["a.bias", "a.weight"]
    whole = {"steps": torch.tensor([1, 2])}
    assert shira.extract(base | whole, tuned | whole, density=0.1).nnz
    with pytest.raises(CheckpointError, match="'steps' differs and is int64"):
        shira.extract(base | whole, tuned | {"steps": torch.tensor([1, 3])}, density=0.1)
    aside = shira.extract(base | whole, tuned | {"steps": torch.tensor([1, 3])}, density=0.1, targets=["a"])
    assert summary(aside)["not_compared"] == ["steps"]
    holes = {"a.bias": torch.full((13,), float("nan"))}  # the same on both sides is no difference
    assert shira.extract(base | holes, tuned | holes, density=0.1).nnz


def test_settings_that_cannot_be():
    base, tuned = two_checkpoints()
    for density in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(MaskError, match="density must be above 0 and at most 1"):
            shira.extract(base, tuned, density=density)
    with pytest.raises(MaskError, match="keep must be above 0 and at most 1, found 90 .*; 90 % is 0.9"):
        shira.extract(base, tuned, keep=90)
    with pytest.raises(AdapterError, match="unknown scope 'global'"):
        shira.extract(base, tuned, density=0.1, scope="global")
    with pytest.raises(AdapterError, match="unknown kind 'deltas'; did you mean 'delta'"):
        shira.extract(base, tuned, density=0.1, kind="deltas")
    with pytest.raises(AdapterError, match="not made by shira.extract"):
        summary(shira.Adapter({}))


def test_tied_tensors_that_one_checkpoint_holds_once():
    base, tuned = two_checkpoints()
    plain = shira.extract(base, tuned, density=0.1)
    head = {"head.weight": base["a.weight"].clone()}, {"head.weight": tuned["a.weight"].clone()}
    assert set(shira.extract(base, tuned | head[1], density=0.1).tensors) == set(plain.tensors)
    twice = shira.extract(base | head[0], tuned, density=0.1)
    assert torch.equal(twice.tensors["head.weight"].indices, twice.tensors["a.weight"].indices)
    assert torch.equal(bits(twice.tensors["head.weight"].values), bits(twice.tensors["a.weight"].values))


def test_a_compiled_model_has_the_names_of_the_model_itself():
    base, tuned = (torch.compile(mlp(seed=seed), backend="eager") for seed in (0, 1))
    found = shira.extract(base, tuned, density=0.1)
    assert found.tensors.keys() == shira.extract(mlp(), mlp(seed=1), density=0.1).tensors.keys()


def test_progress_ends_at_one():
    base, tuned = two_checkpoints()
    for options in ({"density": 0.1}, {"density": 0.1, "scope": "model"}, {"density": 1.0, "targets": ["a"]}):
        seen = []
        shira.extract(base, tuned, on_progress=seen.append, **options)
        assert seen == sorted(seen) and seen[-1] == 1.0


def test_folders_shards_and_files(tmp_path, tiny_llama):
    tiny_llama.to(torch.bfloat16)
    tiny_llama.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    before = {name: parameter.clone() for name, parameter in tiny_llama.state_dict().items()}
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter += 0.01 * torch.randn(parameter.shape).to(parameter.dtype)
    tiny_llama.save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    adapters = [
        shira.extract(tmp_path / "base", tmp_path / "tuned", density=0.05, license="MIT"),
        shira.extract(str(tmp_path / "base"), tmp_path / "tuned" / "model.safetensors", density=0.05, name="tuned"),
        shira.extract(before, tiny_llama, density=0.05),  # which name the tied head twice
    ]
    one, two, three = adapters
    assert one.metadata["base"] == {"id": "base", "dtype": "bfloat16"}
    assert (one.name, one.metadata["license"], two.metadata["extraction"]["tuned"]) == ("tuned", "MIT", "model.safetensors")
    assert set(three.tensors) - set(one.tensors) == {"lm_head.weight"}
    for name, tensor in one.tensors.items():
        for other in (two, three):
            assert torch.equal(tensor.indices, other.tensors[name].indices)
            assert torch.equal(bits(tensor.values), bits(other.tensors[name].values))
    one.save(tmp_path / "one.safetensors")
    assert summary(shira.load(tmp_path / "one.safetensors")) == json.loads(json.dumps(summary(one)))
    switcher = Switcher(tiny_llama)
    with torch.no_grad():
        for name, parameter in tiny_llama.named_parameters():
            parameter.copy_(before[name])
    for number, adapter in enumerate(adapters):
        switcher.add(str(number), adapter)


def test_files_with_odd_offsets_and_strange_dtypes(tmp_path):
    tensors = {
        "byte": torch.tensor([1], dtype=torch.uint8),
        "w": torch.randn(5, 3),
        "f8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    for name, change in (("base", 0.0), ("tuned", 1.0)):
        save_file(tensors | {"w": tensors["w"] + change}, tmp_path / f"{name}.safetensors")
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        odd = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
        (tmp_path / f"{name}.safetensors").write_bytes(odd)
    adapter = shira.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", density=1.0)
    assert torch.equal(adapter.tensors["w"].values, (tensors["w"] + 1).view(-1))
    save_file(tensors | {"f8": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "tuned.safetensors")
    with pytest.raises(CheckpointError, match="'f8' differs and is uint8"):
        shira.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", density=1.0)


@pytest.mark.parametrize("options", [{"density": 0.1}, {"density": 0.3, "scope": "model"}, {"density": 1.0, "kind": "delta"}])
def test_a_file_written_as_entries_are_found_is_the_one_that_is_saved(tmp_path, options):
    base, tuned = two_checkpoints(torch.bfloat16)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    sides = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    adapter = shira.extract(*sides, license="MIT", **options)
    adapter.save(tmp_path / "saved.safetensors")
    extract_to(tmp_path / "written.safetensors", *sides, license="MIT", **options)
    saved = (tmp_path / "saved.safetensors").read_bytes()
    assert (tmp_path / "written.safetensors").read_bytes() == saved
    tensors = dict(reversed(adapter.tensors.items()))
    shira.Adapter(tensors, adapter.metadata).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved  # a digest of a file says whether two adapters are equal
    ((_, entries),) = Checkpoint(tmp_path / "saved.safetensors").shards.items()
    # others map files, and need what lies in them aligned
    assert all(entry.begin % entry.form.dtype.itemsize == 0 for entry in entries.values())


def test_extracting_to_a_file_that_fails_leaves_what_was_there(tmp_path):
    base, tuned = two_checkpoints()
    tuned["scale"] = torch.tensor(float("nan"))  # the last that is looked at
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="'scale' goes from"):
        extract_to(path, base, tuned, density=0.1)
    with pytest.raises(AdapterError, match="is a folder; name a file in it"):
        extract_to(tmp_path, base, tuned, density=0.1)
    with pytest.raises(TypeError, match="dens"):
        extract_to(path, base, tuned, dens=0.1)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_not_overwritten_by_what_is_extracted_from_it(tmp_path):
    base, tuned = two_checkpoints()
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        content = (tmp_path / name / "model.safetensors").read_bytes()
        with pytest.raises(CheckpointError, match=f"is a file of {name}, which is read"):
            extract_to(tmp_path / name / "model.safetensors", tmp_path / name, tmp_path / name, density=0.1)
        assert (tmp_path / name / "model.safetensors").read_bytes() == content
    with pytest.raises(CheckpointError, match="is a file of tuned, which is read"):
        extract_to(tmp_path / "tuned" / "model.safetensors", tmp_path / "base", tmp_path / "tuned", density=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 1.0])
def test_a_share_to_keep_is_reached_and_hardly_exceeded(dtype, scope, keep):
    base, tuned = two_checkpoints(dtype)
    adapter = shira.extract(base, tuned, keep=keep, scope=scope)
    facts = summary(adapter)
    groups = [facts] if scope == "model" else facts["tensors"].values()
    assert all(group["kept"] >= keep - 1e-9 for group in groups)
    if scope == "model" and keep < 1:  # one entry less, and the share is missed, or would be in bins
        entries = sum(each["entries"] for each in facts["tensors"].values())
        with_less = shira.extract(base, tuned, density=(adapter.nnz - 1) / entries, scope="model")
        assert with_less.nnz == adapter.nnz - 1 and summary(with_less)["kept"] < keep * 1.004
    assert adapter.metadata["mask"] == {"name": "extracted", "keep": keep, "scope": scope}


def test_a_share_to_keep_is_checked():
    base, tuned = two_checkpoints()
    for options, words in (({"keep": 0}, "keep must be above 0"), ({"keep": 0.5, "density": 0.5}, "give one of them")):
        with pytest.raises(MaskError, match=words):
            shira.extract(base, tuned, **options)
