"""The cost of an adapter beside a quantized base, and the loss when the adapter is merged and quantized again.

python -m experiments.quantized layers                 time and memory of one layer, in inference and in training
python -m experiments.quantized rounding nf4           accuracy beside the base, merged, and quantized again
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import shira
from shira.data.models import SMOLLM2
from shira.data.tasks import TASKS
from shira.integrations import transformers as hf
from shira.runs.evaluation import accuracy
from shira.runs.recipes import Recipe, train_adapter
from shira.weights.quantized import dense

TOKENS = (1, 16, 512)
SHAPES = ((1536, 576), (4096, 4096))
RANK = 8  # of the LoRA in the comparison


def quantize(model: nn.Module, way: str) -> nn.Module:
    """Quantize every linear layer except lm_head, in place. way: "int8" (torchao), or a quant_type of bitsandbytes, "nf4"."""
    if way == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
        return model
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.float32, quant_type=way
            )
            four.load_state_dict(module.state_dict())
            model.set_submodule(name, four.to("cpu"))
    return model


def milliseconds(works: Mapping[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """The best time of each work over alternating rounds. The best, because other work on the machine only adds time."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for title, work in works.items():
            start = time.perf_counter()
            work()
            best[title] = min(best[title], 1e3 * (time.perf_counter() - start))
    return {title: round(value, 3) for title, value in best.items()}


def layers() -> None:
    """Print a JSON line for each shape, library and number of tokens: ms of the layer alone, with deltas, and with a LoRA."""
    for out, inner in SHAPES:
        for way in ("int8", "nf4"):
            torch.manual_seed(0)
            model = quantize(nn.Sequential(nn.Linear(inner, out, bias=False)), way)
            head = {"layer": [out, inner], "way": way}
            with shira.attach(model, mask="wm", density=0.01, targets=["0"]) as tuner:
                values = tuner.parameters()[0]
                layout = tuner._tuned[0].layout  # type: ignore[attr-defined]
                transposed, order = layout.by_columns
                rows = [each for positions in (layout.by_rows, transposed) for each in (positions.starts, positions.columns)]
                own = [layout.indices, *rows, order, values]
                print(json.dumps(head | {"entries": tuner.nnz, "bytes": sum(t.nbytes for t in own)}))
                for tokens in TOKENS:
                    print(json.dumps(head | {"tokens": tokens} | timed(model, torch.randn(tokens, inner))), flush=True)


def timed(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Milliseconds of a forward pass, and of forward and backward, for a model of one layer with a tuner attached."""
    layer: Any = model[0]  # type: ignore[index]
    down, up = nn.Parameter(torch.randn(RANK, layer.in_features)), nn.Parameter(torch.randn(layer.out_features, RANK))
    x.requires_grad_()

    def bare() -> Tensor:
        output: Tensor = type(layer).forward(layer, x)  # without the tuner's forward
        return output

    def lora() -> Tensor:
        return bare() + linear(linear(x, down), up)

    forwards = {"bare": bare, "shira": lambda: model(x), "lora": lora}
    with torch.no_grad():
        times = milliseconds(forwards)
    training = {f"{title}_training": partial(_forward_and_backward, forward) for title, forward in forwards.items()}
    return times | milliseconds(training)


def _forward_and_backward(forward: Callable[[], Tensor]) -> None:
    forward().sum().backward()


def rounding(way: str, task: str, steps: int, rate: float) -> None:
    """Print as JSON: accuracy of the bases, and with the adapter beside, merged and quantized again; also rounding losses."""
    tokenizer = hf.load_tokenizer(SMOLLM2)
    plain = hf.load_model(SMOLLM2, "float32")
    model = quantize(copy.deepcopy(plain), way)
    test = TASKS[task].test()[:150]
    result: dict[str, Any] = {"way": way, "task": task, "steps": steps, "rate": rate}
    result["plain base"], result["quantized base"] = (accuracy(net, tokenizer, test) for net in (plain, model))
    recipe = Recipe(model=SMOLLM2, data=task, mask="wm", density=0.01, steps=steps, lr=rate, limit=16 * steps)
    adapter = train_adapter(recipe, model, tokenizer)
    switcher = shira.Switcher(model)
    switcher.add("trained", adapter)
    switcher.use("trained")
    result["beside"] = accuracy(model, tokenizer, test)
    switcher.use(None)
    weights = dict(model.named_parameters())
    result["entries"] = adapter.nnz
    result["median change"] = float(torch.cat([t.values.abs() for t in adapter.tensors.values()]).median())

    merged = copy.deepcopy(plain).to(torch.bfloat16)
    stayed = 0
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            flat, where = merged.get_parameter(name).view(-1), tensor.indices.long()
            old = flat[where].clone()
            flat[where] = (old.float() + tensor.values).to(torch.bfloat16)
            stayed += int((flat[where] == old).sum())
    result["rounded away in bfloat16"] = stayed / adapter.nnz
    result["merged into the plain base"] = accuracy(merged.float(), tokenizer, test)

    summed = copy.deepcopy(plain)
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            summed.get_parameter(name).view(-1)[tensor.indices.long()] += tensor.values
    again = quantize(summed, way)
    moved = kept = elsewhere = total = 0.0
    for name, weight in again.named_parameters():
        if name in adapter.tensors:
            tensor, where = adapter.tensors[name], adapter.tensors[name].indices.long()
            change = (dense(weight) - dense(weights[name])).view(-1)
            at = change[where]
            moved += float((at != 0).sum())
            wanted = tensor.values
            kept += float((at * wanted).sum())
            total += float(wanted.square().sum())
            elsewhere += float(change.square().sum() - at.square().sum())
    result["entries that move"] = moved / adapter.nnz
    result["change along the adapter's"] = kept / total  # 1 if the whole change is there
    result["change elsewhere"] = elsewhere / total  # a block's scale changes with its largest entry
    result["quantized again"] = accuracy(again, tokenizer, test)
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("layers")
    of_rounding = commands.add_parser("rounding")
    of_rounding.add_argument("way", choices=["int8", "nf4"])
    of_rounding.add_argument("--task", default="questions")
    of_rounding.add_argument("--steps", type=int, default=25)
    of_rounding.add_argument("--rate", type=float, default=2e-3)
    given = parser.parse_args()
    if given.command == "layers":
        layers()
    else:
        rounding(given.way, given.task, given.steps, given.rate)


if __name__ == "__main__":
    main()
