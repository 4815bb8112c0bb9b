"""Safetensors: the tensors of one file, or of a folder of shards, memory-mapped, decoded to fp32.

    [8 bytes, little endian: n] [n bytes: JSON, name -> {dtype, shape, data_offsets}] [data]

data_offsets [begin, end) count from the start of the data. Read here, not by the safetensors
package, because numpy has no bfloat16.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from trace_file import CaptureError

_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class SafetensorsFolder:
    """Read access to model.safetensors, or to the shards that an index file names."""

    def __init__(self, folder: Path) -> None:
        index = folder / _INDEX
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        else:
            shards = [_SINGLE]
        self._tensors: dict[str, tuple[Path, np.memmap, dict[str, Any]]] = {}
        for shard in shards:
            path = folder / shard
            data, header = _open(path)
            for name, entry in header.items():
                if name != "__metadata__":
                    _check_entry(path, name, entry, len(data))
                    self._tensors[name] = (path, data, entry)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name][2]["shape"])

    def tensor(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A tensor, or chosen rows of it, as fp32."""
        path, data, entry = self._tensors[name]
        if entry["dtype"] not in _TYPES:
            raise CaptureError(
                f"{path}: tensor {name} has type {entry['dtype']}, "
                f"supported are {', '.join(_TYPES)} (quantised checkpoints are not)"
            )
        begin, end = entry["data_offsets"]
        stored = data[begin:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])[rows]
        if entry["dtype"] == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return np.array(stored, dtype=np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CaptureError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CaptureError(f"{path} does not hold a JSON object")
    return value


def _open(path: Path) -> tuple[np.memmap, dict[str, Any]]:
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise CaptureError(f"{path} is not a safetensors file") from error
    length = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 + length:
        raise CaptureError(f"{path} is not a safetensors file, or its end is missing")
    try:
        header = json.loads(content[8 : 8 + length].tobytes())
    except ValueError as error:
        raise CaptureError(f"{path} is not a safetensors file") from error
    return content[8 + length :], header


def _check_entry(path: Path, name: str, entry: dict[str, Any], num_bytes: int) -> None:
    begin, end = entry["data_offsets"]
    if end > num_bytes:
        raise CaptureError(f"{path}: tensor {name} ends behind the end of the file")
    if entry["dtype"] in _TYPES:
        size = math.prod(entry["shape"]) * np.dtype(_TYPES[entry["dtype"]]).itemsize
        if end - begin != size:
            raise CaptureError(f"{path}: tensor {name} has {end - begin} bytes, expected {size}")
