"""One of several processes: trains a tiny model as told, and writes down what came out. Run by launchers from the tests.

torchrun --standalone --nproc-per-node 2 tests/distributed_run.py ddp+variants+fsdp+zero3+other-positions+dies FOLDER
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/distributed_run.py accelerate FOLDER
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
from conftest import all_bits, mlp, mlp_batches, mlp_loss, same_bits
from families import family, family_batch
from shira.weights.distributed import full

VARIANTS = {"direction": {"decompose": True}, "factors": {"decompose": 2}, "beside": {"low_rank": 2}}
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


def attach(model, mask="wm", *, targets=TARGETS, **variant):
    calibration = [family_batch("llama", seed) for seed in (7, 8)]
    return shira.attach(model, mask=mask, density=0.2, targets=targets, calibration=calibration, **variant)


def attach_variant(model, name):
    return attach(model, targets=TARGETS[:3], **VARIANTS[name])


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(model):
    """Every weight of the model's own, gathered."""
    weights = {name: parameter for name, parameter in model.named_parameters() if "shira" not in name}
    return {name: full(parameter).clone() for name, parameter in weights.items()}


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
    refused("attach to the model first, then wrap it", attach, nn.parallel.DistributedDataParallel(model))


def run_without_buffers(folder, rank, ranks):
    """A model without buffers, in DDP: while it trains, and afterwards."""
    model = mlp()
    with shira.attach(model, density=0.2) as tuner:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for inputs, labels in mlp_batches(size=8):
            optimizer.zero_grad()
            mlp_loss(wrapped, (inputs.chunk(ranks)[rank], labels.chunk(ranks)[rank])).backward()
            optimizer.step()
        if rank == 0:
            tuner.adapter("trained").save(folder / "without-buffers.safetensors")
    inputs, _ = mlp_batches()[0]
    assert all(torch.equal(wrapped(inputs), mlp()(inputs)) for _ in range(2))


def run_variants(folder, rank, ranks):
    for name in VARIANTS:
        model = family("llama").train()
        with attach_variant(model, name) as tuner:
            train(model, nn.parallel.DistributedDataParallel(model), tuner, rank, ranks)
            if rank == 0:
                tuner.adapter("trained").save(folder / f"{name}.safetensors")


def run_fsdp(folder, rank, ranks):
    train_sharded(folder, rank, ranks, shard, "fsdp")


def run_zero3(folder, rank, ranks):
    """ZeRO-3: with every weight gathered when it is needed, with small ones gathered for good, and with all of them."""
    for most in (0, 100, 100_000):
        train_sharded(folder, rank, ranks, lambda model, most=most: partition(model, most).module, f"zero3-{most}")
    import deepspeed

    model = family("llama").train()
    deepspeed.zero.Init(module=model)
    with attach(model) as tuner:
        partition(model)
        train(model, model, tuner, rank, ranks)
        if rank == 0:
            tuner.adapter("trained").save(folder / "zero3-early.safetensors")


def run_zero3_refused(folder, rank, ranks):
    model = family("llama").train()
    adapter = attach(family("llama")).adapter()
    engine = partition(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    refused("attach to engine.module", attach, engine)
    refused("give a whole one", shira.fuse, {"trained": (adapter, 1.0)}, base=model)
    refused("sharded in this model", shira.extract, family("llama"), model)
    refused("needs whole weights", shira.attach, model, method="hook")
    refused("needs whole weights", shira.attach, model, low_rank=2)
    with attach(model):
        refused("a tuner is attached already", attach, model)
    with mock.patch.object(weight, "ds_process_group", [dist.new_group([one]) for one in range(ranks)][rank]):
        refused("'model.layers.0.self_attn.q_proj.weight' is partitioned over 1 of 2 processes", attach, model)
    with mock.patch.object(weight, "ds_secondary_tensor", weight.ds_tensor):
        refused("zero_hpz_partition_size", attach, model)
    late = family("llama").train()
    attach(late)
    partition(late)
    refused("was replaced after attach", late, **family_batch("llama"))


def partition(model, most_gathered=0):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": most_gathered}
    engine, *_ = deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero})
    return engine


def refused(message, function, *inputs, **options):
    try:
        function(*inputs, **options)
    except shira.ShiraError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def train_sharded(folder, rank, ranks, shard, label):
    for mask in ("wm", "snip"):
        model = shard(family("llama").train())
        before = whole(model)
        with attach(model, mask, lr_scale="auto") as tuner:
            scales: list[float | None] = [None] * ranks
            dist.all_gather_object(scales, tuner.lr_scale)
            assert set(scales) == {attach(family("llama"), mask, lr_scale="auto").lr_scale}, scales
        with attach(model, mask) as tuner:
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as send:
                train(model, model, tuner, rank, ranks)
            sent = [call.args[0].nbytes for call in send.call_args_list]
            assert sent == STEPS * [4 * (tuner.nnz + len(tuner.parameters()))], sent  # and a mark a tensor
            adapter = tuner.adapter("trained")
            if rank == 0:
                adapter.save(folder / f"{label}-{mask}.safetensors")
            trained = whole(model)
            model.eval()
            with torch.no_grad():
                logits = model(**family_batch("llama")).logits
                kept = [values.clone() for values in tuner.parameters()]
                for values in tuner.parameters():  # of what the last forward pass gathered, nothing is left
                    values.zero_()
                assert not torch.allclose(model(**family_batch("llama")).logits, logits)
                for values, before_zeros in zip(tuner.parameters(), kept, strict=True):
                    values.copy_(before_zeros)
                assert torch.equal(model(**family_batch("llama")).logits, logits)
            refused("sharded", tuner.refresh, torch.optim.AdamW(tuner.parameters()))
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
    refused("does not belong to this model", switcher.add, "wrong", wrong)


def run_accelerate(folder):
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = family("llama").train()
    with attach(model) as tuner:
        forward, optimizer = accelerator.prepare(model, torch.optim.AdamW(tuner.parameters(), lr=1e-2))
        assert isinstance(forward, nn.parallel.DistributedDataParallel)
        train_with(accelerator, forward, tuner, optimizer)
        if accelerator.is_main_process:
            tuner.adapter("trained").save(folder / "accelerate.safetensors")


def run_accelerate_fsdp(folder):
    """FSDP2 as Accelerate shards a model, and with a model that is sharded already."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state()  # that of an earlier run

    def fully_shard_by(policy, **names):
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy, **names)
        accelerator = accelerate.Accelerator(fsdp_plugin=plugin)
        # on the CPU Accelerate takes DDP whatever it is told; this makes it go the way it goes on GPUs
        accelerate.PartialState().distributed_type = accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        return accelerator

    accelerator = fully_shard_by("transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
    model = family("llama").train()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    before = whole(model)
    with attach(model) as tuner:
        optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(tuner.parameters(), lr=1e-2))
        train_with(accelerator, model, tuner, optimizer)
        adapters = [tuner.adapter("trained")]
    after = whole(model)
    assert all(torch.equal(before[name], after[name]) for name in before)

    accelerator = fully_shard_by("no_wrap")
    model = shard(family("llama").train())
    with attach(model) as tuner:
        forward, optimizer = accelerator.prepare(model, torch.optim.AdamW(tuner.parameters(), lr=1e-2))
        assert forward is model
        train_with(accelerator, model, tuner, optimizer)
        adapters.append(tuner.adapter("trained"))
    if accelerator.is_main_process:
        for number, adapter in enumerate(adapters):
            adapter.save(folder / f"accelerate-fsdp-{number}.safetensors")

    model = family("llama").train()
    tuner = attach(model)
    accelerator.prepare(model, torch.optim.AdamW(tuner.parameters()))
    refused("was replaced after attach", model, **family_batch("llama"))


def train_with(accelerator, forward, tuner, optimizer):
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = {key: value.chunk(ranks)[rank] for key, value in family_batch("llama", step, size=4).items()}
        accelerator.backward(forward(**batch).loss)
        accelerator.clip_grad_norm_(tuner.parameters(), 1e9)
        optimizer.step()


def run_sharded_too_late(folder, rank, ranks):
    model = family("llama").train()
    with attach(model):
        try:
            shard(model)(**family_batch("llama"))
        except shira.TuningError as error:
            message = str(error)
        (folder / f"sharded-too-late-{rank}.json").write_text(json.dumps(message))
        os._exit(0)  # what was torn apart cannot be detached


def run_other_positions(folder, rank, ranks):
    """Chosen by other seeds, which is said at each pass; then by a refresh on other batches."""
    errors = []

    def refused(wrapped):
        try:
            wrapped(**family_batch("llama"))
        except shira.TuningError as error:
            errors.append(str(error))

    model = family("llama").train()
    with shira.attach(model, mask="rand", density=0.2, targets=TARGETS, seed=rank):
        wrapped = nn.parallel.DistributedDataParallel(model)
        refused(wrapped)
        refused(wrapped)
    model = family("llama").train()
    with shira.attach(model, mask="snip", density=0.2, targets=TARGETS, calibration=[family_batch("llama")]) as tuner:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        wrapped(**family_batch("llama")).loss.backward()
        optimizer.step()
        tuner.refresh(optimizer, calibration=[family_batch("llama", rank)])
        refused(wrapped)
    (folder / f"other-positions-{rank}.json").write_text(json.dumps(errors))


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
            dist.barrier()  # the launcher ends the first process as soon as it sees the death of the second


def main():
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    shira.masks.selector.LEAST_MEMORY = 0  # gradients of several batches are summed in groups of weights
    runs = [globals()["run_" + one.replace("-", "_")] for one in what.split("+")]
    if what.startswith("accelerate"):
        for run in runs:
            run(folder)
        assert (dist.get_backend(), dist.get_world_size()) == ("gloo", 2)
    else:
        dist.init_process_group("gloo")
        for run in runs:
            run(folder, dist.get_rank(), dist.get_world_size())
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    if what.startswith("zero3"):
        os._exit(0)  # with DeepSpeed's collectives for the CPU, Python's own exit aborts now and then


if __name__ == "__main__":
    main()
