"""The HDF5 KV-trace format: write it, read it.

    /                              attributes: the fields of TraceInfo
    /tokens                        [T] int32
    /layers/<l>                    attribute first_query_position (the position of q's first row)
    /layers/<l>/k, v               [T, Hkv, D]   fp16 | fp32
    /layers/<l>/q                  [Nq, Hq, D]   fp16 | fp32, positions first_query_position .. T-1
    /layers/<l>/w_o                [Hq * D, hidden] fp16 | fp32, optional: out = concat(heads) @ w_o

T tokens, Hq query heads, Hkv key/value heads, D head dimension. Keys and queries are after RoPE if
the attribute rope_applied is true. A trace may hold some layers only. All datasets but `tokens` are
chunked, byte-shuffled and compressed with gzip.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

DTYPES = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}

# One chunk fits HDF5's default chunk cache of 1 MiB, so that a reader that walks the tokens in
# small steps decompresses each chunk once.
CHUNK_ROWS = 512
CHUNK_BYTES = 1 << 20


class CaptureError(Exception):
    """Something the caller can put right; the message is one sentence that names the value."""


@dataclass(frozen=True)
class TraceInfo:
    """Root attributes of a trace, in the contract's names."""

    model: str
    num_layers: int  # of the model; the trace may hold fewer
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float  # base of the rotation frequencies
    rope_layout: str  # "half": channel i turns with i + D/2; "interleaved": 2i with 2i + 1
    rope_applied: bool
    text: str  # which tokens of which text
    license: str
    tokenizer: str


@dataclass(frozen=True)
class LayerTrace:
    """The arrays of one layer."""

    k: np.ndarray  # [T, Hkv, D]
    v: np.ndarray  # [T, Hkv, D]
    q: np.ndarray  # [Nq, Hq, D]
    first_query_position: int
    w_o: np.ndarray | None = None  # [Hq * D, hidden]


@dataclass(frozen=True)
class Trace:
    """A whole trace in memory."""

    info: TraceInfo
    tokens: np.ndarray  # [T] int32
    layers: dict[int, LayerTrace]


class TraceWriter:
    """Writes a trace layer by layer; the file appears under its name when all went well.

        with TraceWriter(path, info, tokens, "fp16") as writer:
            writer.add_layer(0, layer_trace)

    Until the `with` block ends the data lies in `<path>.partial`, which an error removes.
    """

    def __init__(self, path: Path, info: TraceInfo, tokens: np.ndarray, dtype: str) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._info = info
        self._num_tokens = len(tokens)
        self._dtype = DTYPES[dtype]
        try:
            self._file = h5py.File(self._partial, "w")
        except OSError as error:
            # h5py's own text repeats the name and adds flags; the error number says it all.
            reason = os.strerror(error.errno) if error.errno else error
            raise CaptureError(f"cannot write {self._partial}: {reason}") from error
        for field in fields(TraceInfo):
            self._file.attrs[field.name] = getattr(info, field.name)
        self._file.create_dataset("tokens", data=tokens.astype(np.int32, copy=False))
        self._file.create_group("layers")

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)

    def add_layer(self, layer: int, trace: LayerTrace) -> None:
        """Write the arrays of one layer; they may be of any floating type."""
        info = self._info
        kv_shape = (self._num_tokens, info.num_kv_heads, info.head_dim)
        num_queries = self._num_tokens - trace.first_query_position
        expected = {
            "k": kv_shape,
            "v": kv_shape,
            "q": (num_queries, info.num_query_heads, info.head_dim),
        }
        group = self._file.create_group(f"layers/{layer}")
        group.attrs["first_query_position"] = trace.first_query_position
        for name, shape in expected.items():
            array = getattr(trace, name)
            assert array.shape == shape, f"layers/{layer}/{name}: {array.shape}, expected {shape}"
            self._write(group, name, array)
        if trace.w_o is not None:
            self._write(group, "w_o", trace.w_o)

    def _write(self, group: h5py.Group, name: str, array: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, dtype=self._dtype)
        finite = np.isfinite(stored)
        if not finite.all():
            at = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise CaptureError(
                f"{group.name}/{name}{list(at)} is {array[at]}, "
                f"which {self._dtype.name} cannot hold as a finite number"
            )
        row_bytes = stored[0].nbytes
        rows = min(len(stored), CHUNK_ROWS, max(1, CHUNK_BYTES // row_bytes))
        group.create_dataset(
            name,
            data=stored,
            chunks=(rows, *stored.shape[1:]),
            shuffle=True,
            compression="gzip",
            compression_opts=9,
        )


def read_trace(path: Path) -> Trace:
    """Read a trace into memory and check that it keeps the format's promises."""
    try:
        with h5py.File(path, "r") as file:
            return _read(file, path)
    except FileNotFoundError as error:
        raise CaptureError(f"cannot read {path}: no such file") from error
    except OSError as error:
        raise CaptureError(f"{path} is not a readable HDF5 file ({error})") from error


def _read(file: h5py.File, path: Path) -> Trace:
    missing = [field.name for field in fields(TraceInfo) if field.name not in file.attrs]
    if missing:
        raise CaptureError(f"{path} lacks the root attribute {missing[0]}")
    # h5py returns numpy scalars; .item() turns them into the plain types that TraceInfo declares.
    attributes = {field.name: file.attrs[field.name] for field in fields(TraceInfo)}
    info = TraceInfo(
        **{
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in attributes.items()
        }
    )
    if "tokens" not in file:
        raise CaptureError(f"{path} lacks the dataset tokens")
    tokens = file["tokens"][:]

    layers = {}
    for number in sorted(file.get("layers", {}), key=int):
        group = file["layers"][number]
        first_query = int(group.attrs.get("first_query_position", -1))
        kv_shape = (len(tokens), info.num_kv_heads, info.head_dim)
        expected = {
            "k": kv_shape,
            "v": kv_shape,
            "q": (len(tokens) - first_query, info.num_query_heads, info.head_dim),
        }
        for name, shape in expected.items():
            if name not in group:
                raise CaptureError(f"{path} lacks the dataset layers/{number}/{name}")
            if group[name].shape != shape:
                raise CaptureError(
                    f"{path}: layers/{number}/{name} has shape {group[name].shape}, "
                    f"expected {shape}"
                )
        layers[int(number)] = LayerTrace(
            k=group["k"][:],
            v=group["v"][:],
            q=group["q"][:],
            first_query_position=first_query,
            w_o=group["w_o"][:] if "w_o" in group else None,
        )
    if not layers:
        raise CaptureError(f"{path} holds no layer")
    return Trace(info, tokens, layers)
