"""Keys, values and queries of a Hugging Face model, taken where attention receives them.

transformers lets a program register an attention function by name (AttentionInterface). Every layer
of a decoder calls it with

    query [1, Hq, n, D], key [1, Hkv, past + n, D], value [1, Hkv, past + n, D]

after biases, query/key norms and RoPE, before key/value heads are repeated. The function registered
here keeps what the layer sees and hands on to transformers' own `sdpa`, so one hook serves all
families.

The text runs in chunks through the model's own cache. Of each chunk only its n new rows are kept,
hence a cache that forgets old rows (sliding windows) loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trace_file import CaptureError, LayerTrace, TraceInfo

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # config.model_type

_HOOK_NAME = "sikv_capture"


@dataclass
class _LayerRecord:
    """Rows of one layer seen so far: a tensor [heads, n, D] per chunk, in the model's own type."""

    k: list[torch.Tensor] = field(default_factory=list)
    v: list[torch.Tensor] = field(default_factory=list)
    q: list[torch.Tensor] = field(default_factory=list)


def check_family(model_type: str) -> None:
    """Refuse a model whose attention this hook has not been tested with."""
    if model_type not in FAMILIES:
        raise CaptureError(
            f'model type "{model_type}" is not supported (supported: {", ".join(FAMILIES)})'
        )


def trace_info(config: Any, model: str, text: str, license: str, tokenizer: str) -> TraceInfo:
    """Root attributes for a model with this transformers configuration."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return TraceInfo(
        model=model,
        num_layers=config.num_hidden_layers,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rope_layout="half",
        rope_applied=True,
        text=text,
        license=license,
        tokenizer=tokenizer,
    )


@torch.inference_mode()
def capture_layers(
    model: PreTrainedModel,
    tokens: np.ndarray,
    layers: list[int],
    first_query_position: int,
    with_w_o: bool,
    chunk: int,
    on_chunk: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, LayerTrace]]:
    """Run the model over tokens [T], then yield (layer, fp32 arrays) for each of `layers`.

    The model keeps the hook as its attention implementation, which does not change its results.
    """
    records = {layer: _LayerRecord() for layer in layers}

    def hook(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        record = records.get(module.layer_idx)
        if record is not None:
            n = query.shape[2]
            skip = max(0, first_query_position - position)
            # clone: a slice that stays on the CPU would keep the whole growing cache alive.
            record.k.append(key[0, :, -n:].cpu().clone())
            record.v.append(value[0, :, -n:].cpu().clone())
            record.q.append(query[0, :, skip:].cpu().clone())
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(_HOOK_NAME, hook)
    AttentionMaskInterface.register(_HOOK_NAME, sdpa_mask)
    model.set_attn_implementation(_HOOK_NAME)
    model.eval()
    cache = DynamicCache(config=model.config)
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(model.device)
    for position in range(0, len(tokens), chunk):  # the hook reads `position`
        # The base model stops before the vocabulary, whose logits nobody reads here.
        model.base_model(ids[:, position : position + chunk], past_key_values=cache, use_cache=True)
        on_chunk()
    del cache

    for layer in layers:
        record = records.pop(layer)
        output = model.base_model.layers[layer].self_attn.o_proj.weight
        yield (
            layer,
            LayerTrace(
                k=_rows_first(record.k),
                v=_rows_first(record.v),
                q=_rows_first(record.q),
                first_query_position=first_query_position,
                w_o=output.float().cpu().numpy().T if with_w_o else None,
            ),
        )


def _rows_first(chunks: list[torch.Tensor]) -> np.ndarray:
    """Chunks [heads, n, D] -> [sum of n, heads, D] fp32."""
    return torch.cat(chunks, dim=1).transpose(0, 1).float().numpy()
