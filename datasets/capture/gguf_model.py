"""A Llama-type model in a GGUF file: its sizes, and its tensors by their names in a model file.

For the architecture `llama` GGUF stores the rows of Wq and Wk (and their biases) permuted for
interleaved rotation: row 2i + s of a head there is row i + s * D/2 in half-rotation order (i < D/2,
s in {0, 1}). Source: `permute` in llama.cpp's converter for Hugging Face models. Loading undoes it,
so keys and queries come out in the channel order of the original weights. Qwen2 and Qwen3 are
stored as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gguf_file import GgufFile
from model_file import (
    ModelInfo,
    WeightSource,
    check_sizes,
    normal_rope_scaling,
    optional_shapes,
    required_shapes,
)
from trace_file import CaptureError

# GGUF calls Llama 1-3, Mistral 7B, SmolLM and others alike "llama".
ARCHITECTURES = ("llama", "qwen2", "qwen3")
FACTORS = "rope_freqs.weight"

_GLOBAL_NAMES = {
    "embedding": "token_embd.weight",
    "output": "output.weight",
    "norm": "output_norm.weight",
}
_LAYER_NAMES = {
    "attention_norm": "attn_norm.weight",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "wo": "attn_output.weight",
    "bq": "attn_q.bias",
    "bk": "attn_k.bias",
    "bv": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "w_gate": "ffn_gate.weight",
    "w_up": "ffn_up.weight",
    "w_down": "ffn_down.weight",
}


class GgufModel(WeightSource):
    """Weights of the model, dequantised as they are asked for."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.info = _read_info(file)
        self._permuted = self.info.architecture == "llama"
        self._shapes = self._check_tensors()

    def names(self) -> set[str]:
        """Names of the tensors there are."""
        return set(self._shapes)

    def tensor(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A tensor, or chosen rows of it, as fp32."""
        if self._permuted and name.rpartition("/")[2] in ("wq", "wk", "bq", "bk"):
            stored = self._file.tensor(_gguf_name(name))
            return half_rotation_order(stored, self.info.head_dim)[rows]
        return self._file.tensor(_gguf_name(name), rows)

    def _check_tensors(self) -> dict[str, tuple[int, ...]]:
        """Refuse a file whose tensors are not exactly those the forward pass uses.

        A tensor left over (an expert, another bias) means a model that this forward pass gets
        wrong.
        """
        path = self._file.path
        there = self._file.tensor_names()
        optional = {
            name: shape
            for name, shape in optional_shapes(self.info).items()
            if _gguf_name(name) in there
        }
        shapes = required_shapes(self.info) | optional
        for name, shape in shapes.items():
            gguf_name = _gguf_name(name)
            if gguf_name not in there:
                raise CaptureError(f"{path} lacks the tensor {gguf_name}")
            if self._file.shape(gguf_name) != shape:
                raise CaptureError(
                    f"{path}: tensor {gguf_name} has shape {self._file.shape(gguf_name)}, "
                    f"expected {shape}"
                )
        unknown = sorted(there - {_gguf_name(name) for name in shapes} - {FACTORS})
        if unknown:
            raise CaptureError(
                f"{path}: tensor {unknown[0]} is not part of a plain {self.info.architecture} model"
            )
        return shapes


def half_rotation_order(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo GGUF's row permutation of Wq or Wk [H * D, in], or of a bias [H * D]."""
    heads = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    _, layer, part = name.split("/")
    return f"blk.{layer}.{_LAYER_NAMES[part]}"


def _read_info(file: GgufFile) -> ModelInfo:
    architecture = file.field("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CaptureError(
            f'{file.path} holds a model of architecture "{architecture}"; '
            f"supported are {', '.join(ARCHITECTURES)}"
        )

    def field(key: str, *default: Any) -> Any:
        return file.field(f"{architecture}.{key}", *default)

    hidden_size = int(field("embedding_length"))
    num_query_heads = field("attention.head_count")
    num_kv_heads = field("attention.head_count_kv", num_query_heads)
    if not isinstance(num_query_heads, int) or not isinstance(num_kv_heads, int):
        raise CaptureError(f"{file.path}: head counts that vary by layer are not supported")
    head_dim = int(field("attention.key_length", hidden_size // max(1, num_query_heads)))
    rotated = int(field("rope.dimension_count", head_dim))
    if rotated != head_dim:
        raise CaptureError(
            f"{file.path}: {rotated} of {head_dim} channels are rotated, only all is supported"
        )
    names = file.tensor_names()
    if "token_embd.weight" not in names:
        raise CaptureError(f"{file.path} lacks the tensor token_embd.weight")
    info = ModelInfo(
        architecture=architecture,
        name=file.field("general.name", file.path.stem),
        source=file.path.name,
        license=file.field("general.license", "unknown"),
        num_layers=int(field("block_count")),
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=int(field("feed_forward_length")),
        vocab_size=file.shape("token_embd.weight")[0],
        max_positions=int(field("context_length")),
        rope_theta=float(field("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(file, architecture, head_dim),
        rms_norm_eps=float(field("attention.layer_norm_rms_epsilon")),
        tie_embeddings=int("output.weight" not in names),
    )
    check_sizes(info, file.path)
    return info


def _rope_scaling(file: GgufFile, architecture: str, head_dim: int) -> str:
    """The scaling rule as in a Hugging Face configuration."""
    kind = file.field(f"{architecture}.rope.scaling.type", "none")
    if FACTORS in file.tensor_names():
        if file.shape(FACTORS) != (head_dim // 2,) or kind != "none":
            raise CaptureError(
                f"{file.path}: rotation factors of shape {file.shape(FACTORS)} and scaling "
                f'"{kind}" are not supported together with head dimension {head_dim}'
            )
        factors = [float(factor) for factor in file.tensor(FACTORS)]
        return normal_rope_scaling({"rope_type": "factors", "factors": factors}, file.path)
    if kind == "none":
        return ""
    scaling = {"rope_type": kind}
    for key, name in (
        ("factor", "factor"),
        ("original_context_length", "original_max_position_embeddings"),
        ("attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        value = file.field(f"{architecture}.rope.scaling.{key}", None)
        if value is not None:
            scaling[name] = value
    if kind == "yarn" and "original_max_position_embeddings" not in scaling:
        raise CaptureError(
            f"{file.path} lacks the GGUF field {architecture}.rope.scaling.original_context_length"
        )
    return normal_rope_scaling(scaling, file.path)
