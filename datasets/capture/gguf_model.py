"""A Llama-type model in a GGUF file as a LlamaModel of llama_numpy.py.

GGUF stores the rows of Wq and Wk permuted for interleaved rotation: row 2i + s of a head there is
row i + s * D/2 in half-rotation order (i < D/2, s in {0, 1}). Source: `permute` in llama.cpp's
converter for Hugging Face models. Loading undoes it, so keys and queries come out in the channel
order of the original weights.
"""

from __future__ import annotations

import numpy as np

from gguf_file import GgufFile
from llama_numpy import LayerWeights, LlamaConfig
from trace_file import CaptureError

ARCHITECTURE = "llama"  # what GGUF calls Llama 1-3, Mistral 7B, SmolLM and others alike


class GgufModel:
    """Weights of the model, dequantised layer by layer as they are asked for."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.config = _read_config(file)
        self.context_length = int(file.field("llama.context_length"))
        self._check_tensors()

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """[T] int32 -> [T, hidden]."""
        return self._file.tensor("token_embd.weight", tokens)

    def layer(self, index: int) -> LayerWeights:
        """Weights of one layer."""

        def tensor(name: str) -> np.ndarray:
            return self._file.tensor(f"blk.{index}.{name}.weight")

        return LayerWeights(
            attn_norm=tensor("attn_norm"),
            wq=half_rotation_order(tensor("attn_q"), self.config.head_dim),
            wk=half_rotation_order(tensor("attn_k"), self.config.head_dim),
            wv=tensor("attn_v"),
            wo=tensor("attn_output"),
            ffn_norm=tensor("ffn_norm"),
            w_gate=tensor("ffn_gate"),
            w_up=tensor("ffn_up"),
            w_down=tensor("ffn_down"),
        )

    def final_norm(self) -> np.ndarray:
        """[hidden]."""
        return self._file.tensor("output_norm.weight")

    def unembedding(self) -> np.ndarray:
        """[vocabulary, hidden]; the embedding where the model ties the two."""
        tied = "output.weight" not in self._file.tensor_names()
        return self._file.tensor("token_embd.weight" if tied else "output.weight")

    def _check_tensors(self) -> None:
        """Refuse a file whose tensors are not exactly those the forward pass uses.

        A tensor left over (a bias, an expert) means a model that this forward pass gets wrong.
        """
        names = self._file.tensor_names()
        expected = _tensor_shapes(self._file, self.config)
        for name, shape in expected.items():
            if name not in names:
                raise CaptureError(f"{self._file.path} lacks the tensor {name}")
            if self._file.shape(name) != shape:
                raise CaptureError(
                    f"{self._file.path}: tensor {name} has shape {self._file.shape(name)}, "
                    f"expected {shape}"
                )
        unknown = sorted(names - set(expected))
        if unknown:
            raise CaptureError(
                f"{self._file.path}: tensor {unknown[0]} is not part of a plain Llama model"
            )


def half_rotation_order(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo GGUF's row permutation of Wq or Wk [H * D, in]."""
    heads = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def _read_config(file: GgufFile) -> LlamaConfig:
    architecture = file.field("general.architecture")
    if architecture != ARCHITECTURE:
        raise CaptureError(
            f'{file.path} holds a model of architecture "{architecture}"; '
            f'only "{ARCHITECTURE}" is supported'
        )
    hidden_size = int(file.field("llama.embedding_length"))
    num_query_heads = file.field("llama.attention.head_count")
    num_kv_heads = file.field("llama.attention.head_count_kv", num_query_heads)
    if not isinstance(num_query_heads, int) or not isinstance(num_kv_heads, int):
        raise CaptureError(f"{file.path}: head counts that vary by layer are not supported")
    head_dim = int(file.field("llama.attention.key_length", hidden_size // num_query_heads))
    rotated = int(file.field("llama.rope.dimension_count", head_dim))
    if rotated != head_dim:
        raise CaptureError(
            f"{file.path}: {rotated} of {head_dim} channels are rotated, only all is supported"
        )
    scaling = file.field("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise CaptureError(f'{file.path}: RoPE scaling of type "{scaling}" is not supported')
    factors = "rope_freqs.weight"
    return LlamaConfig(
        num_layers=int(file.field("llama.block_count")),
        hidden_size=hidden_size,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=float(file.field("llama.rope.freq_base", 10000.0)),
        rms_eps=float(file.field("llama.attention.layer_norm_rms_epsilon")),
        rope_factors=file.tensor(factors) if factors in file.tensor_names() else None,
    )


def _tensor_shapes(file: GgufFile, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model must have, and may have no other, with its shape."""
    hidden = config.hidden_size
    ffn = int(file.field("llama.feed_forward_length"))
    q_rows = config.num_query_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    names = file.tensor_names()
    vocabulary = file.shape("token_embd.weight")[0] if "token_embd.weight" in names else 0

    shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    if "output.weight" in names:
        shapes["output.weight"] = (vocabulary, hidden)
    if "rope_freqs.weight" in names:
        shapes["rope_freqs.weight"] = (config.head_dim // 2,)
    for index in range(config.num_layers):
        layer = {
            "attn_norm": (hidden,),
            "attn_q": (q_rows, hidden),
            "attn_k": (kv_rows, hidden),
            "attn_v": (kv_rows, hidden),
            "attn_output": (hidden, q_rows),
            "ffn_norm": (hidden,),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }
        shapes.update({f"blk.{index}.{name}.weight": shape for name, shape in layer.items()})
    return shapes
