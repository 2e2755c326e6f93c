"""What may be opened and replaced, what is meant by a folder, and temporary files that no process holds any more."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import shira
from conftest import all_bits, mlp, random_adapter, same_bits
from shira import AdapterError, CheckpointError, FormatError, Switcher
from shira.files.paths import sweep, temporary_file, temporary_folder
from shira.files.tensorfiles import write_whole
from shira.switching.sources import SETTLED

PLACE = "adapter.safetensors"


def test_a_fifo_or_a_device_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "fifo.safetensors")
    model = mlp()
    for path, kind in ((tmp_path / "fifo.safetensors", "FIFO"), (tmp_path / "link", "FIFO"), ("/dev/zero", "device")):
        for use in (shira.load, lambda p: Switcher(model).add("x", p), lambda p: shira.fuse({p: 1.0}), shira.compare):
            with pytest.raises(FormatError, match=f"is a {kind}; expected a regular file"):
                use(path)
    with pytest.raises(CheckpointError, match="FIFO"):
        shira.extract(tmp_path / "fifo.safetensors", tmp_path / "fifo.safetensors")
    with pytest.raises(shira.DataError, match="FIFO"):
        shira.runs.recipes.load_recipe(tmp_path / "fifo.safetensors", {})


def test_saving_replaces_regular_files_only(tmp_path):
    adapter = random_adapter(mlp(), 1)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "loop", "/dev/null"):
        before = os.lstat(tmp_path / name)
        with pytest.raises(OSError, match="nothing was written there"):
            adapter.save(tmp_path / name)
        with pytest.raises(OSError, match="nothing was written there"):
            write_whole(tmp_path / name, b"")
        assert os.path.samestat(before, os.lstat(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["fifo", "loop"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_is_followed_and_stays(tmp_path, exists):
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "blob", tmp_path / PLACE
    if exists:
        target.write_bytes(b"old")
    link.symlink_to("store/blob")
    random_adapter(mlp(), 1).save(link)
    assert link.is_symlink() and shira.load(target).nnz == shira.load(link).nnz
    assert os.listdir(tmp_path / "store") == ["blob"]


def test_saving_to_a_folder_says_what_to_name(tmp_path):
    with pytest.raises(AdapterError, match=rf"is a folder; name a file in it, as in adapter.save\('{tmp_path}/{PLACE}'\)"):
        random_adapter(mlp(), 1).save(tmp_path)
    assert os.listdir(tmp_path) == []


def readers(model):
    return (
        shira.load,
        shira.compare,
        lambda path: Switcher(model).add("x", path),
        lambda path: shira.fuse({path: 1.0}, model),
        lambda path: shira.attach(model, avoid=path),
    )


def test_a_folder_is_read_if_it_is_clear_which_file_in_it_is_meant(tmp_path):
    model = mlp()
    adapter = random_adapter(model, 1, kind="delta")

    def refused(words):
        for read in readers(model):
            with pytest.raises(FormatError, match=words):
                read(tmp_path)

    def accepted():
        for number in range(len(readers(model))):
            found = readers(mlp())[number](tmp_path)  # a model of its own, since a model has one owner
            if isinstance(found, shira.Adapter):
                assert found.nnz == adapter.nnz

    (tmp_path / "empty").mkdir()
    refused("is a folder; pass an adapter's .safetensors file; there is none in it")
    for name in ("poet", "coder"):
        (tmp_path / name).mkdir()
        adapter.save(tmp_path / name / "a.safetensors")
    refused(f"is a folder; pass one of the adapters in it: '{tmp_path}/coder', '{tmp_path}/poet'$")
    write_whole(tmp_path / "model.safetensors", b"no adapter")
    os.mkfifo(tmp_path / "fifo.safetensors")
    adapter.save(tmp_path / "any")
    accepted()
    (tmp_path / "any").unlink()
    adapter.save(tmp_path / "poet.safetensors")
    accepted()
    adapter.save(tmp_path / "coder.safetensors")
    refused(f"pass one of the files in it, as '{tmp_path}/coder.safetensors'")
    adapter.save(tmp_path / PLACE)
    accepted()


def test_what_peft_saved_is_named_and_how_to_convert_it(tmp_path):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    alone = tmp_path / "alone" / "x.safetensors"  # without its configuration
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    for path in (tmp_path, file, alone):
        for read in readers(mlp()):
            with pytest.raises(FormatError, match="adapter of PEFT, which has to be converted: `shira convert"):
                read(path)


@pytest.mark.parametrize(
    ("name", "beside", "is_peft"),
    [("adapter_model.safetensors", None, True), ("x.safetensors", "adapter_config.json", True), ("x.safetensors", None, False)],
)
def test_a_file_of_peft_is_known_by_its_name_or_its_configuration(tmp_path, name, beside, is_peft):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / name)
    if beside:
        (tmp_path / beside).write_text("{}")
    meant = "adapter of PEFT" if is_peft else "expected 'shira'; pass an adapter's .safetensors file$"
    with pytest.raises(FormatError, match=meant):
        shira.load(tmp_path / name)


def of_another_base(adapter):
    prints = dict.fromkeys(adapter.fingerprints, f"xxh3:{0:032x}")
    return shira.Adapter(adapter.tensors, adapter.metadata | {"fingerprints": prints})


@pytest.fixture
def registered(tmp_path):
    """A switcher with a file that has made room for another, and what its model holds on the base."""
    model = mlp()
    path = tmp_path / "poet.safetensors"
    random_adapter(model, 1).save(path)
    time.sleep(2e-9 * SETTLED)
    switcher = Switcher(model, ready=1)
    switcher.add("poet", path)
    switcher.add("other", random_adapter(model, 2))
    return switcher, path, model, all_bits(model)


def test_a_file_of_the_same_size_and_time_for_another_base_is_refused(registered):
    switcher, path, model, base = registered
    status = path.stat()
    beside = path.with_name("beside")
    of_another_base(shira.load(path)).save(beside)
    assert beside.stat().st_size == status.st_size
    path.write_bytes(beside.read_bytes())  # in place: the same inode
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(shira.BaseMismatch):
        switcher.use("poet")
    assert same_bits(base, all_bits(model))


def test_a_file_that_lends_its_positions_is_looked_at_as_well(registered):
    switcher, path, model, _ = registered
    adapter = shira.load(path)
    adapter.save(path.with_name("heir.safetensors"), like=path)
    time.sleep(2e-9 * SETTLED)
    source = shira.switching.sources.AdapterSource(path.with_name("heir.safetensors"))
    assert source.read({})[1]
    source.note_checked()
    assert not source.read({})[1]
    os.utime(path)
    assert source.read({})[1]


def test_an_unchanged_file_is_not_compared_with_the_base_again(registered, monkeypatch):
    switcher, path, _, _ = registered
    compared = []
    monkeypatch.setattr(shira.switching.model_state, "check_base", lambda label, *_: compared.append(label))
    switcher.use("poet")
    switcher.use("other")
    switcher.use("poet")
    assert str(path) not in compared
    os.utime(path)
    switcher.use("other")
    switcher.use("poet")
    assert compared == [str(path)]


def test_what_killed_processes_left_goes_away_and_nothing_else(tmp_path):
    """One process is killed while it holds a file and a folder; another one lives."""
    code = """
        import sys, time
        from pathlib import Path
        from shira.files.paths import temporary_file, temporary_folder
        with temporary_file(Path(sys.argv[1])) as (path, file), temporary_folder(Path(sys.argv[1])) as folder:
            file.write(b"x" * 1000)
            file.flush()
            (folder / "model.safetensors").write_bytes(b"x" * 1000)
            print(path.name, folder.name, flush=True)
            time.sleep(100)
    """

    def start():
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().split()

    (dead, left), (alive, held) = start(), start()
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        theirs = {".shira-0123456789abcdef", ".shira-0123456789abcdef.tmp.txt", ".poet.safetensors.0123.tmp", "spam.tmp"}
        for name in theirs:
            (tmp_path / name).write_bytes(b"not ours")
        (tmp_path / ".shira-0123456789abcdef.tmp").symlink_to("spam.tmp")
        assert set(left) < set(os.listdir(tmp_path))
        random_adapter(mlp(), 1).save(tmp_path / "a.safetensors")
        kept = theirs | {".shira-0123456789abcdef.tmp", "a.safetensors"}
        assert set(os.listdir(tmp_path)) == kept | set(held)
    finally:
        for process in (dead, alive):
            process.kill()
            process.wait()
            process.stdout.close()
    sweep(tmp_path)
    assert set(os.listdir(tmp_path)) == kept


def test_a_killed_merge_leaves_nothing_that_stays(tmp_path, tiny_llama):
    base = tmp_path / "base"
    tiny_llama.save_pretrained(base)
    random_adapter(tiny_llama, 1).save(tmp_path / "poet.safetensors")
    code = """
        import os, sys, signal, shira
        kill = lambda share: os.kill(os.getpid(), signal.SIGKILL)
        shira.merge(*sys.argv[1:], on_progress=kill)
    """
    paths = [str(tmp_path / name) for name in ("base", "poet.safetensors", "out")]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *paths])
    assert done.returncode == -signal.SIGKILL
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    shira.merge(base, tmp_path / "poet.safetensors", tmp_path / "out")
    assert set(os.listdir(tmp_path)) == {"base", "poet.safetensors", "out"}


def test_temporary_files_go_away_also_when_work_fails_or_they_were_renamed(tmp_path):
    with pytest.raises(ZeroDivisionError), temporary_file(tmp_path), temporary_folder(tmp_path) as folder:
        (folder / "x").mkdir()
        _ = 1 / 0
    assert os.listdir(tmp_path) == []
    with temporary_folder(tmp_path) as folder:
        (folder / "x").mkdir()
        os.replace(folder, tmp_path / "kept")
    assert os.listdir(tmp_path) == ["kept"] and os.listdir(tmp_path / "kept") == ["x"]


def test_a_file_swept_away_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    flock, struck = shira.files.paths.fcntl.flock, []

    def late(descriptor, operation):
        if not struck:
            struck.append(True)
            sweep(tmp_path)
        flock(descriptor, operation)

    for make in (temporary_file, temporary_folder):
        struck.clear()
        monkeypatch.setattr(shira.files.paths.fcntl, "flock", late)
        with make(tmp_path) as made:
            monkeypatch.setattr(shira.files.paths.fcntl, "flock", flock)
            sweep(tmp_path)
            assert struck and [path.name for path in tmp_path.iterdir()] == [(made if isinstance(made, Path) else made[0]).name]
        assert os.listdir(tmp_path) == []


def of_gpt2(folder, transformers):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    torch.manual_seed(0)
    transformers.GPT2Model(config).save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


def test_merging_into_a_checkpoint_with_other_prefixes(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = of_gpt2(tmp_path / "base", transformers)
    adapter = random_adapter(model, 1, density=0.05)
    adapter.save(tmp_path / "poet.safetensors")
    strengths = {str(tmp_path / "poet.safetensors"): {"*": 0.5, "transformer.h.1.*": 1.0}}  # patterns of the adapter's names
    shira.merge(tmp_path / "base", strengths, tmp_path / "out")
    switcher = Switcher(model)
    (label,) = strengths
    switcher.add(label, tmp_path / "poet.safetensors")
    switcher.use(strengths)
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert same_bits(all_bits(model), all_bits(merged))


def test_a_checkpoint_whose_names_cannot_be_mapped_says_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = of_gpt2(tmp_path / "base", transformers)
    tensors = random_adapter(model, 1).tensors
    mixed = {f"{number % 2}.{name}": tensor for number, (name, tensor) in enumerate(tensors.items())}
    with pytest.raises(shira.BaseMismatch, match="names its tensors otherwise .* no one prefix maps all.*save_pretrained"):
        shira.merge(tmp_path / "base", shira.Adapter(mixed), tmp_path / "out")
    weights = {f"{side}.{n}.weight": torch.randn(4, 4) for side in "ab" for n in range(2)}
    write_whole(tmp_path / "both.safetensors", safetensors.torch.save(weights))
    delta = shira.SparseTensor((4, 4), torch.tensor([0]), torch.ones(1), "delta")
    with pytest.raises(shira.BaseMismatch, match="several prefixes map all"):
        shira.merge(tmp_path / "both.safetensors", shira.Adapter({"m.0.weight": delta}), tmp_path / "out")
    other = shira.SparseTensor((4, 5), torch.tensor([0]), torch.ones(1), "delta")
    with pytest.raises(shira.BaseMismatch, match="does not belong to this model"):
        shira.merge(tmp_path / "both.safetensors", shira.Adapter({"m.0.weight": other}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_changes_meanwhile_is_refused(tmp_path):
    path = tmp_path / "base.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(4)}, path)
    checkpoint = shira.checkpoints.sources.Checkpoint(path)
    assert checkpoint["w"].tolist() == [0.0] * 4
    safetensors.torch.save_file({"w": torch.ones(4)}, tmp_path / "other")
    os.replace(tmp_path / "other", path)
    for read in (lambda: checkpoint["w"], lambda: list(checkpoint.pieces("w", 2))):
        with pytest.raises(CheckpointError, match="has changed since"):
            read()
