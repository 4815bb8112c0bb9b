"""A GGUF file: its fields and tensors, with errors a user can act on.

Wraps the `gguf` package, which reports a damaged file through whatever exception its parsing hits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from trace_file import CaptureError

_REQUIRED = object()


class GgufFile:
    """Read access to one GGUF file; tensors are memory-mapped and dequantised on request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CaptureError(f"cannot read {path}: no such file")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
            raise CaptureError(f"{path} is not a readable GGUF file ({error})") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a metadata field: a number, a string, or a list of them."""
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is _REQUIRED:
            raise CaptureError(f"{self.path} lacks the GGUF field {key}")
        return default

    def tensor_names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, slowest axis first (GGUF itself lists the fastest first)."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def tensor(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A tensor, or chosen rows of it, as fp32."""
        tensor = self._tensors[name]
        try:
            # Quantised rows are independent byte strings, so rows can be chosen before decoding.
            values = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        except NotImplementedError as error:
            raise CaptureError(
                f"{self.path}: tensor {name} has type {tensor.tensor_type.name}, "
                "which the gguf package cannot dequantise"
            ) from error
        return values.astype(np.float32, copy=False)
