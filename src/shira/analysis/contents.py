"""What an adapter's file holds, as values that JSON can hold."""

from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..files.suggestions import adapter_in
from ..sparse.tensor import dtype_name

__all__ = ["describe"]


def describe(adapter: Adapter, file: Path) -> dict[str, Any]:
    """The adapter as a whole, what its metadata say, and each of its tensors. file: where it was read from."""
    tensors = {
        name: {
            "shape": list(tensor.shape),
            "nnz": tensor.nnz,
            "density": tensor.nnz / max(1, tensor.numel),
            "kind": tensor.kind,
            "dtype": dtype_name(tensor.values.dtype),
            "fingerprint": adapter.fingerprints.get(name),
        }
        for name, tensor in adapter.tensors.items()
    }
    known = adapter.metadata
    return {
        "file": str(file),
        "name": adapter.name,
        "nnz": adapter.nnz,
        "density": adapter.density,
        "bytes": sum(each.stat().st_size for each in _files_of(file)),
        "kinds": sorted({t.kind for t in adapter.tensors.values()}),
        "dtypes": sorted({str(entry["dtype"]) for entry in tensors.values()}),
        **{key: known.get(key) for key in ("mask", "base", "training", "license", "fused")},
        "fingerprint": adapter.fingerprint,
        "tensors": tensors,
    }


def _files_of(path: Path) -> list[Path]:
    """The files of an adapter: one, also if its folder is given, or those of a weight patch."""
    found = adapter_in(path)
    return sorted(found.glob("*.safetensors")) if found.is_dir() else [found]
