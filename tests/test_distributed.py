"""Two processes on this machine train what one does, send the sparse gradients alone, and switch sharded models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import shira
from conftest import letter_tokenizer, mlp, mlp_batches, mlp_loss, random_adapter
from distributed_run import VARIANTS, attach, attach_variant, train
from families import family
from shira.weights.distributed import Piece

HERE = Path(__file__).parent


def run_two(what, folder):
    """Two processes over the loopback; returns (exit code, what they printed)."""
    return torchrun(2, HERE / "distributed_run.py", what, folder)


def torchrun(processes, *line):
    return launch("torch.distributed.run", "--standalone", "--nproc-per-node", processes, *line)


def accelerate_launch(what, folder):
    """Two processes on the CPU, in Accelerate's way; without MPI it has no other."""
    options = ["--multi_gpu", "--num_processes", 2, "--main_process_port", 0]
    return launch("accelerate.commands.launch", *options, HERE / "distributed_run.py", what, folder, ACCELERATE_USE_CPU="true")


def launch(module, *line, **more):
    source = Path(shira.__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{source}:{HERE}"} | more
    command = [sys.executable, "-m", module, *line]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*map(str, command)], env=environment, **output, timeout=300)
    return done.returncode, done.stdout


def trained_alone(mask="wm", variant=None):
    model = family("llama").train()
    with attach_variant(model, variant) if variant else attach(model, mask) as tuner:
        train(model, model, tuner, 0, 1)
        return tuner.adapter("trained")


def mlp_trained_alone():
    model = mlp()
    with shira.attach(model, density=0.2) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for batch in mlp_batches(size=8):
            optimizer.zero_grad()
            mlp_loss(model, batch).backward()
            optimizer.step()
        return tuner.adapter("trained")


def same_adapter(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    assert one.fingerprints == other.fingerprints
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.indices, other.tensors[name].indices)
        torch.testing.assert_close(tensor.values, other.tensors[name].values, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    """Whole models under DDP, their variants, sharded models, which switch as well; then two mistakes, each an error before the
    first step. In one launch: to start two processes takes longer than what they do."""
    code, printed = run_two("ddp+without-buffers+variants+fsdp+other-positions+sharded-too-late", tmp_path)
    assert code == 0, printed
    same_adapter(shira.load(tmp_path / "ddp.safetensors"), trained_alone())
    same_adapter(shira.load(tmp_path / "without-buffers.safetensors"), mlp_trained_alone())
    for variant in VARIANTS:
        same_adapter(shira.load(tmp_path / f"{variant}.safetensors"), trained_alone(variant=variant))
    for mask in ("wm", "snip"):
        same_adapter(shira.load(tmp_path / f"fsdp-{mask}.safetensors"), trained_alone(mask))
    for rank in (0, 1):
        errors = json.loads((tmp_path / f"other-positions-{rank}.json").read_text())
        assert len(errors) == 3 and all("process 1 chose other positions to train than the first" in each for each in errors)
    assert "was replaced after attach" in json.loads((tmp_path / "sharded-too-late-1.json").read_text())


@pytest.mark.slow
def test_accelerate_trains_what_one_process_does(tmp_path):
    """Whole models, then models that are sharded before attach."""
    code, printed = accelerate_launch("accelerate+accelerate-fsdp", tmp_path)
    assert code == 0, printed
    for name in ("accelerate", "accelerate-fsdp-0", "accelerate-fsdp-1"):
        same_adapter(shira.load(tmp_path / f"{name}.safetensors"), trained_alone())


@pytest.mark.slow
def test_the_command_trains_on_two_processes_what_it_does_on_one(tmp_path, tiny_llama, run):
    tiny_llama.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = []
    for processes in (1, 2):
        out = tmp_path / f"on-{processes}.safetensors"
        line = ["train", tmp_path / "model", "--data", tmp_path / "sums.jsonl", "--steps", 3, "--density", 0.05, "-o", out]
        line += ["--batch-size", 8 // processes]
        if processes == 1:
            code, printed, _ = run(" ".join(map(str, line)))
        else:
            code, printed = torchrun(processes, "-m", "shira.cli", *line)
        assert code == 0, printed
        assert printed.count("the recipe is") == 1
        trained.append(shira.load(out))
    same_adapter(*trained)
    assert trained[0].metadata["training"] == trained[1].metadata["training"]


@pytest.mark.slow
def test_a_process_that_dies_leaves_the_last_checkpoint_whole(tmp_path):
    code, printed = run_two("dies", tmp_path)
    assert code != 0 and "exitcode  : 17" in printed
    assert shira.load(tmp_path / "checkpoint.safetensors").metadata["training"] == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize(("start", "stop", "expected"), [(0, 4, [0, 3]), (4, 8, []), (8, 20, [8, 9, 19]), (20, 20, [])])
def test_a_piece_knows_its_positions(start, stop, expected):
    indices = torch.tensor([0, 3, 8, 9, 19], dtype=torch.int32)
    assert indices[Piece(torch.empty(0), start, stop).span(indices)].tolist() == expected


def test_wrappers_that_must_be_told_are_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(shira.TuningError, match="attach to the model first"):
        shira.attach(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(shira.TuningError, match="fully_shard"):
        shira.attach(FullyShardedDataParallel())


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from shira.integrations.trainer import PROCESSES, ShiraCallback
    from trainers import llama, trainer_of

    model = llama()
    with shira.attach(model, mask="rand", density=0.05) as tuner:
        trainer_of(model, tmp_path, [ShiraCallback(tuner)], max_steps=2).train()
    masters = tmp_path / "checkpoint-2" / "model.safetensors"
    state = load_file(masters)
    assert state[PROCESSES].tolist() == [1]
    save_file(state | {PROCESSES: torch.tensor([2])}, masters, {"format": "pt"})
    with shira.attach(model, mask="rand", density=0.05) as tuner:
        start = [values.detach().clone() for values in tuner.parameters()]
        with pytest.raises(shira.TuningError, match="of 2 processes and would go on with 1"):
            trainer_of(model, tmp_path, [ShiraCallback(tuner)]).train(resume_from_checkpoint=True)
        assert all(torch.equal(one, now) for one, now in zip(start, tuner.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")  # torch's own, of processes and meshes
def test_a_sharded_model_is_cast_as_any_other_but_not_under_a_tuner_which_would_lose_its_base():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    def here(model):
        return {name: tensor.to_local().detach().clone() for name, tensor in model.named_parameters()}

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for cast in (lambda model: model.half(), lambda model: model.bfloat16().float()):
            model, expected = fully_shard(mlp(), mesh=mesh), here(cast(fully_shard(mlp(), mesh=mesh)))
            switcher = shira.Switcher(model)
            switcher.add("a", random_adapter(mlp(), 1))
            switcher.use("a")
            cast(model)
            switcher.use(None)
            assert all(torch.equal(each, expected[name]) for name, each in here(model).items())
        model = fully_shard(mlp(), mesh=mesh)
        before = here(model)
        tuner = shira.attach(model, density=0.2)
        tuner.detach()
        tuner.model.double()  # while the tuner lives, which nothing hinders
        assert all(torch.equal(each, before[name].double()) for name, each in here(tuner.model).items())
        tuner = shira.attach(fully_shard(mlp(), mesh=mesh), density=0.2, targets=["2"])
        with pytest.raises(RuntimeError, match="Couldn't swap .*weight"):
            tuner.model.half()
        assert all(tensor.dtype == torch.float32 for tensor in tuner.model.parameters())  # also in layers before the target's
        with torch.no_grad():
            tuner.parameters()[0].add_(1)
        tuner.model(torch.ones(2, 13))
        tuner.detach()
        assert all(torch.equal(each, before[name]) for name, each in here(tuner.model).items())
    finally:
        dist.destroy_process_group()
