"""The HDF5 model file: weights, sizes and vocabulary of a Llama-type model in one file.

    /                            attributes: format = "sikv-model", version = 1, the fields of
                                 ModelInfo, and of Vocabulary bos_token, eos_token, add_bos,
                                 pre_tokenizer
    /embedding                   [vocab, hidden]         matrix
    /output                      [vocab, hidden]         matrix; absent where tie_embeddings = 1
    /norm                        [hidden]                fp32
    /layers/<l>/attention_norm   [hidden]                fp32
    /layers/<l>/wq               [Hq * D, hidden]        matrix
    /layers/<l>/wk, wv           [Hkv * D, hidden]       matrix
    /layers/<l>/wo               [hidden, Hq * D]        matrix
    /layers/<l>/bq               [Hq * D]                fp32, optional
    /layers/<l>/bk, bv           [Hkv * D]               fp32, optional
    /layers/<l>/q_norm, k_norm   [D]                     fp32, optional: RMSNorm of each head
    /layers/<l>/mlp_norm         [hidden]                fp32
    /layers/<l>/w_gate, w_up     [intermediate, hidden]  matrix
    /layers/<l>/w_down           [hidden, intermediate]  matrix
    /tokenizer/tokens            [vocab]   UTF-8 strings, bytes as the characters of byte-level BPE
    /tokenizer/merges            [merges]  UTF-8 strings "left right", by rank
    /tokenizer/types             [vocab]   int32: 1 text, 3 control, 4 user-defined, 5 unused

A matrix is [out, in], row-major, y = W x; rows of wq and wk are in half-rotation order (channel i
of a head turns with channel i + D/2). It is stored as

    fp16 | fp32    a dataset of that type
    bf16           uint16 with the attribute dtype = "bf16": the upper half of the fp32 bits
    int8           int8, and next to it <name>_scale [out] fp32: value = code * scale of its row,
                   scale = max |row| / 127

rope_scaling is "" or a JSON object as in a Hugging Face configuration: rope_type is one of linear,
llama3, yarn, or factors (this one ours: `factors`, D/2 divisors of the rotation frequencies, which
is all that a GGUF file says of Llama 3.1). A file without the group `tokenizer` has pre_tokenizer =
"": a model to be fed with token ids. Matrices are chunked and compressed (byte shuffle and gzip)
where that saves a fifth or more, as it does with bf16 and fp32, else contiguous: fp16 and int8
weights save a tenth, and would take seconds per gigabyte to read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from llama_numpy import LayerWeights, LlamaConfig
from trace_file import CHUNK_BYTES, CaptureError
from vocabulary import Vocabulary

FORMAT = "sikv-model"
VERSION = 1
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = ("fp16", "bf16", "fp32", "int8")
ROPE_TYPES = ("linear", "llama3", "yarn", "factors")

GZIP_LEVEL = 4
WORTHWHILE = 0.8  # compress a dataset if its first chunk shrinks below this share

# Name in a model file -> field of LayerWeights.
_LAYER_FIELDS = {
    "attention_norm": "attn_norm",
    "wq": "wq",
    "wk": "wk",
    "wv": "wv",
    "wo": "wo",
    "bq": "bq",
    "bk": "bk",
    "bv": "bv",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "mlp_norm": "ffn_norm",
    "w_gate": "w_gate",
    "w_up": "w_up",
    "w_down": "w_down",
}


@dataclass(frozen=True)
class ModelInfo:
    """Sizes, constants and origin: root attributes under the same names."""

    architecture: str  # one of ARCHITECTURES
    name: str
    source: str
    license: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rope_scaling: str  # JSON, or ""
    rms_norm_eps: float
    tie_embeddings: int  # 0 | 1

    def config(self) -> LlamaConfig:
        """What the forward pass in llama_numpy.py needs."""
        return LlamaConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            rms_eps=self.rms_norm_eps,
            rope_scaling=json.loads(self.rope_scaling) if self.rope_scaling else None,
        )


def required_shapes(info: ModelInfo) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that every model of these sizes has."""
    hidden, intermediate = info.hidden_size, info.intermediate_size
    q_rows = info.num_query_heads * info.head_dim
    kv_rows = info.num_kv_heads * info.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (info.vocab_size, hidden)}
    if not info.tie_embeddings:
        shapes["output"] = (info.vocab_size, hidden)
    shapes["norm"] = (hidden,)
    for layer in range(info.num_layers):
        for name, shape in {
            "attention_norm": (hidden,),
            "wq": (q_rows, hidden),
            "wk": (kv_rows, hidden),
            "wv": (kv_rows, hidden),
            "wo": (hidden, q_rows),
            "mlp_norm": (hidden,),
            "w_gate": (intermediate, hidden),
            "w_up": (intermediate, hidden),
            "w_down": (hidden, intermediate),
        }.items():
            shapes[f"layers/{layer}/{name}"] = shape
    return shapes


def optional_shapes(info: ModelInfo) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model may have."""
    q_rows = info.num_query_heads * info.head_dim
    kv_rows = info.num_kv_heads * info.head_dim
    layer_shapes = {
        "bq": (q_rows,),
        "bk": (kv_rows,),
        "bv": (kv_rows,),
        "q_norm": (info.head_dim,),
        "k_norm": (info.head_dim,),
    }
    return {
        f"layers/{layer}/{name}": shape
        for layer in range(info.num_layers)
        for name, shape in layer_shapes.items()
    }


class WeightSource:
    """A model whose tensors can be asked for by their names in a model file.

    A subclass sets `info` and provides `names` and `tensor`; it is then a LlamaModel too.
    """

    info: ModelInfo

    def names(self) -> set[str]:
        """Names of the tensors there are."""
        raise NotImplementedError

    def tensor(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A tensor, or chosen rows of it, as fp32."""
        raise NotImplementedError

    @property
    def config(self) -> LlamaConfig:
        """Sizes and constants of the forward pass."""
        return self.info.config()

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """[T] int32 -> [T, hidden]."""
        return self.tensor("embedding", tokens)

    def layer(self, index: int) -> LayerWeights:
        """Weights of one layer."""
        names = self.names()
        return LayerWeights(
            **{
                field: self.tensor(f"layers/{index}/{name}")
                for name, field in _LAYER_FIELDS.items()
                if f"layers/{index}/{name}" in names
            }
        )

    def final_norm(self) -> np.ndarray:
        """[hidden]."""
        return self.tensor("norm")

    def unembedding(self) -> np.ndarray:
        """[vocab, hidden]; the embedding where the model ties the two."""
        return self.tensor("embedding" if self.info.tie_embeddings else "output")


def check_sizes(info: ModelInfo, path: Path) -> None:
    """Refuse sizes that no model can have, so that no later step meets them."""
    for field in fields(ModelInfo):
        value = getattr(info, field.name)
        if field.type == "int" and field.name != "tie_embeddings" and value < 1:
            raise CaptureError(f"{path}: {field.name} is {value}, it must be at least 1")
    if info.num_query_heads % info.num_kv_heads:
        raise CaptureError(
            f"{path}: {info.num_query_heads} query heads cannot share {info.num_kv_heads} "
            "key/value heads evenly"
        )
    if info.head_dim % 2:
        raise CaptureError(f"{path}: head_dim is {info.head_dim}, rotation needs an even number")
    for name in ("rope_theta", "rms_norm_eps"):
        if not 0 < getattr(info, name) < float("inf"):
            raise CaptureError(f"{path}: {name} is {getattr(info, name)}, it must be positive")


def normal_rope_scaling(scaling: Mapping[str, Any] | None, path: Path) -> str:
    """The attribute rope_scaling for a `rope_scaling` (or `rope_parameters`) of a configuration."""
    if not scaling:
        return ""
    values = {key: value for key, value in scaling.items() if value is not None}
    values.pop("rope_theta", None)
    legacy_type = values.pop("type", "default")
    rope_type = values.setdefault("rope_type", legacy_type)
    if rope_type == "default":
        return ""
    if rope_type not in ROPE_TYPES:
        raise CaptureError(
            f'{path}: RoPE scaling of type "{rope_type}" is not supported '
            f"(known: {', '.join(ROPE_TYPES)})"
        )
    return json.dumps(values, sort_keys=True)


class ModelWriter:
    """Writes a model tensor by tensor; the file appears under its name when all went well.

        with ModelWriter(path, info, vocabulary, "fp16") as writer:
            writer.add("embedding", array)

    Until the `with` block ends the data lies in `<path>.partial`, which an error removes.
    """

    def __init__(
        self, path: Path, info: ModelInfo, vocabulary: Vocabulary | None, dtype: str
    ) -> None:
        assert dtype in DTYPES
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._dtype = dtype
        self._missing = dict(required_shapes(info))
        self._optional = optional_shapes(info)
        try:
            self._file = h5py.File(self._partial, "w")
        except OSError as error:
            # h5py's own text repeats the name and adds flags; the error number says it all.
            reason = os.strerror(error.errno) if error.errno else error
            raise CaptureError(f"cannot write {self._partial}: {reason}") from error
        attributes = self._file.attrs
        attributes["format"] = FORMAT
        attributes["version"] = VERSION
        for field in fields(ModelInfo):
            attributes[field.name] = getattr(info, field.name)
        attributes["bos_token"] = vocabulary.bos_token if vocabulary else -1
        attributes["eos_token"] = vocabulary.eos_token if vocabulary else -1
        attributes["add_bos"] = int(vocabulary.add_bos) if vocabulary else 0
        attributes["pre_tokenizer"] = vocabulary.pre_tokenizer if vocabulary else ""
        if vocabulary:
            group = self._file.create_group("tokenizer")
            for name, strings in (("tokens", vocabulary.tokens), ("merges", vocabulary.merges)):
                group.create_dataset(name, data=strings, dtype=h5py.string_dtype("utf-8"))
            group.create_dataset("types", data=np.array(vocabulary.types, dtype=np.int32))

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            assert not self._missing, f"tensors not written: {sorted(self._missing)}"
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)

    def add(self, name: str, array: np.ndarray) -> None:
        """Write one tensor, fp32, under its name in the format."""
        shape = self._missing.pop(name, None) or self._optional.pop(name)
        assert array.shape == shape, f"{name}: {array.shape}, expected {shape}"
        if not np.isfinite(array).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise CaptureError(f"{name}{list(at)} is {array[at]}, not a finite number")
        if array.ndim == 1:
            self._file.create_dataset(name, data=array.astype(np.float32, copy=False))
        elif self._dtype == "int8":
            codes, scales = to_int8(array)
            self._create(name, codes)
            self._file.create_dataset(f"{name}_scale", data=scales)
        elif self._dtype == "bf16":
            self._create(name, to_bf16(array))
            self._file[name].attrs["dtype"] = "bf16"
        elif self._dtype == "fp16":
            with np.errstate(over="ignore"):
                stored = array.astype(np.float16)
            if not np.isfinite(stored).all():
                at = tuple(int(i) for i in np.argwhere(~np.isfinite(stored))[0])
                raise CaptureError(f"{name}{list(at)} is {array[at]}, too large for fp16")
            self._create(name, stored)
        else:
            self._create(name, array.astype(np.float32, copy=False))

    def _create(self, name: str, stored: np.ndarray) -> None:
        chunks = -(-stored.nbytes // CHUNK_BYTES)
        rows = -(-len(stored) // chunks)
        chunk = np.ascontiguousarray(stored[:rows])
        shuffled = chunk.view(np.uint8).reshape(chunk.size, chunk.itemsize).T.tobytes()
        compress = len(zlib.compress(shuffled, GZIP_LEVEL)) < WORTHWHILE * chunk.nbytes
        layout = {}
        if compress:
            layout["chunks"] = (rows, stored.shape[1])
            layout |= {"shuffle": True, "compression": "gzip", "compression_opts": GZIP_LEVEL}
        self._file.create_dataset(name, data=stored, **layout)


class ModelFile(WeightSource):
    """Read access to one model file; tensors are read and decoded as they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = h5py.File(path, "r")
        except FileNotFoundError as error:
            raise CaptureError(f"cannot read {path}: no such file") from error
        except OSError as error:
            raise CaptureError(f"{path} is not a readable HDF5 file ({error})") from error
        attributes = self._file.attrs
        if attributes.get("format") != FORMAT:
            raise CaptureError(f'{path} is not a model file (attribute format is not "{FORMAT}")')
        if attributes["version"] != VERSION:
            raise CaptureError(
                f"{path} has format version {attributes['version']}, only {VERSION} is supported"
            )
        # h5py returns numpy scalars; .item() turns them into the plain types declared.
        plain = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in attributes.items()
        }
        try:
            self.info = ModelInfo(**{field.name: plain[field.name] for field in fields(ModelInfo)})
        except KeyError as error:
            raise CaptureError(f"{path} lacks the root attribute {error.args[0]}") from error
        check_sizes(self.info, path)
        optional = {
            name: shape for name, shape in optional_shapes(self.info).items() if name in self._file
        }
        self._shapes = required_shapes(self.info) | optional
        for name, shape in self._shapes.items():
            if name not in self._file:
                raise CaptureError(f"{path} lacks the dataset {name}")
            if self._file[name].shape != shape:
                raise CaptureError(
                    f"{path}: {name} has shape {self._file[name].shape}, expected {shape}"
                )
        self.vocabulary = None
        if "tokenizer" in self._file:
            group = self._file["tokenizer"]
            self.vocabulary = Vocabulary(
                tokens=list(group["tokens"].asstr()[:]),
                merges=list(group["merges"].asstr()[:]),
                types=[int(kind) for kind in group["types"][:]],
                pre_tokenizer=plain["pre_tokenizer"],
                bos_token=plain["bos_token"],
                eos_token=plain["eos_token"],
                add_bos=bool(plain["add_bos"]),
            )

    def names(self) -> set[str]:
        """Names of the tensors there are."""
        return set(self._shapes)

    def tensor(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A tensor, or chosen rows of it, as fp32."""
        dataset = self._file[name]
        values = dataset[:][rows]  # h5py's own row selection wants ascending, distinct rows
        if dataset.attrs.get("dtype") == "bf16":
            return from_bf16(values)
        values = values.astype(np.float32, copy=False)
        if dataset.dtype == np.int8:
            values *= self._file[f"{name}_scale"][:][rows][:, None]
        return values


def to_bf16(array: np.ndarray) -> np.ndarray:
    """Finite fp32 -> the upper 16 bits as uint16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 upper halves -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] fp32 -> codes int8 and scales [out] fp32; a row of zeros has scale 0."""
    scales = (np.abs(matrix).max(axis=1) / np.float32(127)).astype(np.float32)
    divisors = np.where(scales > 0, scales, np.float32(1))
    codes = np.clip(np.rint(matrix / divisors[:, None]), -127, 127)
    return codes.astype(np.int8), scales
