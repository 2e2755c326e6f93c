"""Every public call of README.md and docs/, with the types that a user's file has. mypy reads it strictly; nothing runs it.

`make lint` checks it with the package (pyproject.toml, [tool.mypy]). test_package.py finds calls of the docs that are not here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shira
from shira.integrations.diffusers import PipelineAdapters
from shira.integrations.trainer import ReferenceModel, ShiraCallback
from shira.switching.on_inputs import fuse_on_inputs


def adapters(adapter: shira.Adapter, path: Path) -> dict[str, shira.SparseTensor]:
    for loaded in (shira.load("poet.safetensors"), shira.load(path)):
        loaded.save("copy.safetensors")
        loaded.save(path, like="poet.safetensors")
    name: str = adapter.name
    sizes: tuple[int, float, int] = (adapter.nnz, adapter.density, adapter.nbytes)
    fingerprint: str | None = adapter.fingerprint
    print(name, sizes, fingerprint, adapter.metadata["mask"])
    made = shira.SparseTensor((2, 3), torch.tensor([1]), torch.tensor([0.5]), "delta")
    return shira.Adapter({"w": made, **adapter.tensors}, {"name": "mine"}).tensors


def training(model: nn.Module, batches: list[dict[str, Tensor]], first: shira.Adapter) -> shira.Adapter:
    with shira.attach(model, mask="snip", density=0.01, calibration=batches) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
        moved: int = tuner.refresh(optimizer, calibration=batches, cap=1.5)
        tuner.stay_near(batches, reach=0.01)
        with tuner.reference(), torch.no_grad():
            model(**batches[0])
        tuner.adapter("spam", training={"steps": moved}, license="MIT").save("spam.safetensors")
    shira.attach(model)
    shira.attach(model, mask="wm", rank=8, targets=["q_proj", "v_proj"], exclude="mlp", layers=range(4, 12))
    shira.attach(model, mask="block:by=snip,size=8", total=600, scope="model", floor=0.25, calibration=iter(batches))
    shira.attach(model, density=0.01, overrides={"down_proj": 0.02, "layers.0.self_attn.*": {"rank": 1}})
    shira.attach(model, mask=lambda weight, k: weight.flatten().abs().topk(k, largest=False).indices, layers=3)
    tuner = shira.attach(model, density=0.01, avoid=[first, "second.safetensors"], decompose=8, seed=1)
    state: dict[str, Tensor] = tuner.state_dict()
    tuner.load_state_dict(state)
    attached: bool = tuner.attached
    print(attached, tuner.nnz, tuner)
    tuner.save_hybrid("both")
    tuner.detach()
    tuner.release()
    return tuner.adapter()


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def trainers(model: nn.Module, batches: list[Any]) -> tuple[ShiraCallback, ReferenceModel]:
    tuner: shira.Tuner = shira.attach(model, mask="fisher", calibration=batches, loss_fn=own_loss)
    return ShiraCallback(tuner, name="poet", license="MIT"), ReferenceModel(tuner)


def switching(model: nn.Module, adapter: shira.Adapter, path: Path) -> Iterator[dict[str, Any]]:
    switcher = shira.Switcher(model, ready=4, host=2)
    inputs: dict[str, list[dict[str, Tensor]]] = {"poet": [{"input_ids": torch.zeros(1, 2)}], "coder": []}
    both: shira.Adapter = fuse_on_inputs(switcher, inputs, memory=2)
    both.save(path)
    switcher.add("poet", "poet.safetensors")
    switcher.add("coder", path)
    switcher.add("mine", adapter)
    switcher.use("poet")
    switcher.use({"poet": 1.0, "coder": 0.5})
    switcher.use({"toxic": -1})
    switcher.use({"poet": {"*": 1.0, "*.mlp.*": 0.5}, "coder": 1.0}, method="ties", density=0.5)
    switcher.prefetch("coder")
    switcher.pin("coder")
    switcher.unpin("coder")
    values: torch.Tensor = switcher.base_values("model.embed_tokens.weight", torch.arange(3))
    changes: dict[str, shira.SparseTensor] = switcher.changes({"poet": 0.5})
    with switcher.using({"coder": 1.0}):
        yield switcher.method
    names: list[str] = switcher.names
    print(names, switcher.active, switcher, switcher.ready, values, changes)
    switcher.use(None)
    switcher.remove("poet")
    switcher.release()


def many(model: nn.Module, one: shira.Adapter, path: Path) -> list[str]:
    both: shira.Adapter = shira.fuse({"a.safetensors": 1.0}, base=model)
    shira.fuse({"a.safetensors": 1.0, "b.safetensors": 0.5}, base=model, method="ties", density=0.5)
    shira.fuse({"a.safetensors": {"*": 0.0, "*.self_attn.*": 1.0}}, base=dict(model.named_parameters()))
    shira.fuse({path: 1.0}, base=model)
    shira.fuse({"one": (one, 1.0), "both": (both, 0.5)})
    strengths = {"a.safetensors": 1.0}
    shira.fuse(strengths, model)
    found = shira.compare("spam.safetensors", path, one, base=model)
    awor: float = found.total.pairs[0].awor
    rank: float | None = found.tensors["w"].changes["spam"].effective_rank
    print(awor, rank, found.as_dict(), found.total.pair("spam", "poet").cosine)
    shira.extract("base", "tuned", density=0.05)
    shira.extract(model, path, keep=0.9, scope="model", targets="attention").save(path)
    stayed: int = shira.merge("base", {"a.safetensors": 1.0, "b.safetensors": 0.5}, "merged")
    shira.merge(path, one, path)
    shira.merge(path, {path: 1.0}, path)
    shira.merge("base", "a.safetensors", "merged")
    return [f"{info.name} {info.needs}" for info in shira.masks.available()][:stayed]


def pipelines(pipe: Any) -> None:
    adapters = PipelineAdapters(pipe)
    adapters.load("bluefire.safetensors")
    adapters.set("bluefire")
    adapters.set(["bluefire", "paintings"], [1.0, 0.5])
    adapters.set(["bluefire", "paintings"], method="ties", density=0.5)
    adapters.set("bluefire", {"unet": {"down": 0.9, "mid": 1, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.0]}}})
    adapters.enable()
    adapters.fuse()
    adapters.unfuse()
    adapters.by_step(lambda step, steps: {"bluefire": step / steps})
    adapters.in_turn(["bluefire", "paintings"])
    adapters.disable()


def errors(model: nn.Module) -> str:
    try:
        shira.load("none.safetensors")
    except (shira.FormatError, shira.BaseMismatch) as error:
        return str(error)
    except shira.ShiraError as error:
        return f"{type(error).__name__}, shira {shira.__version__}, {model}"
    return ""
