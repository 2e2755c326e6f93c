"""One of several processes: trains a tiny model as told, and writes down what came out. Run by torchrun from the tests.

torchrun --standalone --nproc-per-node 2 tests/distributed_run.py ddp|fsdp|accelerate|other-positions|dies FOLDER
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import shira
from conftest import all_bits, same_bits
from families import family, family_batch

TARGETS = ["q_proj", "o_proj", "down_proj", "embed_tokens", "norm"]
STEPS = 4


def train(model, forward, tuner, rank, ranks):
    """Each process takes its rows of every batch; the mean of their losses is the loss of the whole."""
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = {key: value.chunk(ranks)[rank] for key, value in family_batch("llama", step, size=4).items()}
        forward(**batch).loss.backward()
        optimizer.step()


def attach(model, mask="wm"):
    shira.selection.LEAST_MEMORY = 0  # gradients of several batches are summed in groups of weights
    calibration = [family_batch("llama", seed) for seed in (7, 8)]
    return shira.attach(model, mask=mask, density=0.2, targets=TARGETS, calibration=calibration)


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(model):
    """Every weight of the model's own, gathered."""
    weights = {name: parameter for name, parameter in model.named_parameters() if "shira" not in name}
    return {name: parameter.full_tensor().detach().clone() for name, parameter in weights.items()}


def run_ddp(folder, rank, ranks):
    model = family("llama").train()
    before = all_bits(model)
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    with attach(model) as tuner:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(None, count)
        train(model, wrapped, tuner, rank, ranks)
        if rank == 0:
            tuner.adapter("trained").save(folder / "ddp.safetensors")
        assert sum(sent) == STEPS * 4 * tuner.nnz, sent  # the sparse gradients and nothing else
        del wrapped
    assert same_bits(before, all_bits(model))
    try:
        attach(nn.parallel.DistributedDataParallel(model))
    except shira.TuningError as error:
        assert "attach to the model first, then wrap it" in str(error)
    else:
        raise AssertionError("a wrapped model was not refused")


def run_fsdp(folder, rank, ranks):
    for mask in ("wm", "snip"):
        model = shard(family("llama").train())
        before = whole(model)
        with attach(model, mask) as tuner:
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as send:
                train(model, model, tuner, rank, ranks)
            sent = [call.args[0].nbytes for call in send.call_args_list]
            assert sent == STEPS * [4 * (tuner.nnz + len(tuner.parameters()))], sent  # and a mark a tensor
            adapter = tuner.adapter("trained")
            if rank == 0:
                adapter.save(folder / f"fsdp-{mask}.safetensors")
            trained = whole(model)
            model.eval()
            with torch.no_grad():
                logits = model(**family_batch("llama")).logits
            try:
                tuner.refresh(torch.optim.AdamW(tuner.parameters()))
            except shira.TuningError as error:
                assert "sharded" in str(error)
            else:
                raise AssertionError("a refresh was not refused")
        after = whole(model)
        assert all(torch.equal(before[name], after[name]) for name in after)  # bit for bit: no NaN here
        assert len(after) == len(dict(model.named_parameters()))
        switch(folder, model, adapter, logits, trained, before)


def switch(folder, model, adapter, logits, trained, before):
    """The adapter on a sharded model: the same weights, the base again, sums too."""
    dist.barrier()
    switcher = shira.Switcher(model)
    switcher.add("trained", adapter)
    batch = family_batch("llama")
    with torch.no_grad():
        base = model(**batch).logits
        for selection in ("trained", {"trained": 0.5}, None, "trained"):
            switcher.use(selection)
            now = whole(model)
            if selection == "trained":
                assert all(torch.equal(trained[name], now[name]) for name in now)
                torch.testing.assert_close(model(**batch).logits, logits)
            elif selection is None:
                assert all(torch.equal(before[name], now[name]) for name in now)
                assert torch.equal(model(**batch).logits, base)
            else:
                plain = family("llama")
                alone = shira.Switcher(plain)
                alone.add("trained", adapter)
                alone.use(selection)
                expected = dict(plain.named_parameters())
                assert all(torch.equal(expected[name], now[name]) for name in now)
    switcher.use(None)
    wrong = shira.Adapter(adapter.tensors, {**adapter.metadata, "fingerprints": dict.fromkeys(adapter.tensors, "0" * 64)})
    try:
        switcher.add("wrong", wrong)
    except shira.BaseMismatch:
        pass
    else:
        raise AssertionError("an adapter of another base was not refused")


def run_accelerate(folder, rank, ranks):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = family("llama").train()
    with attach(model) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        forward, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(forward, nn.parallel.DistributedDataParallel)
        for step in range(STEPS):
            optimizer.zero_grad()
            batch = {key: value.chunk(ranks)[rank] for key, value in family_batch("llama", step, size=4).items()}
            accelerator.backward(forward(**batch).loss)
            accelerator.clip_grad_norm_(tuner.parameters(), 1e9)
            optimizer.step()
        if accelerator.is_main_process:
            tuner.adapter("trained").save(folder / "accelerate.safetensors")


def run_sharded_too_late(folder, rank, ranks):
    model = family("llama").train()
    with attach(model):
        try:
            shard(model)(**family_batch("llama"))
        except shira.TuningError as error:
            message = str(error)
        (folder / f"message-{rank}.json").write_text(json.dumps(message))
        os._exit(0)  # what was torn apart cannot be detached


def run_other_positions(folder, rank, ranks):
    model = family("llama").train()
    with shira.attach(model, mask="rand", density=0.2, targets=TARGETS, seed=rank):
        wrapped = nn.parallel.DistributedDataParallel(model)
        try:
            wrapped(**family_batch("llama"))
        except shira.TuningError as error:
            message = str(error)
        else:
            message = ""
    (folder / f"message-{rank}.json").write_text(json.dumps(message))


def run_dies(folder, rank, ranks):
    """The second process dies between two checkpoints."""
    model = shard(family("llama").train())
    with attach(model) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for step in range(100):
            if rank == 1 and step == 3:
                os._exit(17)
            optimizer.zero_grad()
            model(**family_batch("llama", step)).loss.backward()
            optimizer.step()
            adapter = tuner.adapter("trained", training={"step": step})
            if rank == 0:
                adapter.save(folder / "checkpoint.safetensors")


def main():
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    globals()["run_" + what.replace("-", "_")](folder, rank, ranks)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
