"""A Llama-type model in a Hugging Face folder: config.json, safetensors, tokenizer.json.

Matrices there are [out, in] with rows of Wq and Wk in half-rotation order, as in a model file, so
only names differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from model_file import (
    ARCHITECTURES,
    ModelInfo,
    WeightSource,
    check_sizes,
    normal_rope_scaling,
    optional_shapes,
    required_shapes,
)
from safetensors_file import SafetensorsFolder, read_json
from trace_file import CaptureError
from vocabulary import (
    CONTROL,
    LLAMA3_WORDS,
    NORMAL,
    QWEN2_WORDS,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)

_GLOBAL_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "output": "lm_head.weight",
    "norm": "model.norm.weight",
}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
}


class HfModel(WeightSource):
    """Weights of the model, read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._path = folder
        config = read_json(folder / "config.json")
        self._file = SafetensorsFolder(folder)
        self.info = _read_info(folder, config, self._file)
        self._shapes = self._check_tensors()

    def names(self) -> set[str]:
        """Names of the tensors there are."""
        return set(self._shapes)

    def tensor(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A tensor, or chosen rows of it, as fp32."""
        return self._file.tensor(_hf_name(name), rows)

    def _check_tensors(self) -> dict[str, tuple[int, ...]]:
        """Refuse a model with a tensor too few, too many, or of another shape."""
        there = self._file.names()
        optional = {
            name: shape
            for name, shape in optional_shapes(self.info).items()
            if _hf_name(name) in there
        }
        shapes = required_shapes(self.info) | optional
        for name, shape in shapes.items():
            hf_name = _hf_name(name)
            if hf_name not in there:
                raise CaptureError(f"{self._path} lacks the tensor {hf_name}")
            if self._file.shape(hf_name) != shape:
                raise CaptureError(
                    f"{self._path}: tensor {hf_name} has shape {self._file.shape(hf_name)}, "
                    f"expected {shape}"
                )
        known = {_hf_name(name) for name in shapes}
        if self.info.tie_embeddings:
            known.add(_GLOBAL_NAMES["output"])  # some files hold the embedding twice
        # Tables of old checkpoints, computed from the configuration today.
        unknown = sorted(n for n in there - known if not n.endswith("rotary_emb.inv_freq"))
        if unknown:
            raise CaptureError(
                f"{self._path}: tensor {unknown[0]} is not part of a plain "
                f"{self.info.architecture} model"
            )
        return shapes


def _hf_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    _, layer, part = name.split("/")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}"


def _read_info(folder: Path, config: dict[str, Any], weights: SafetensorsFolder) -> ModelInfo:
    path = folder / "config.json"
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise CaptureError(
            f'{path} describes a model of type "{architecture}"; '
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config"):
        raise CaptureError(f"{path}: quantised checkpoints are not supported")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CaptureError(f'{path}: activation "{activation}" is not supported, only "silu"')

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int):
            raise CaptureError(f"{path} lacks a number for {key}")
        return value

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    head_dim_default = 128 if architecture == "qwen3" else hidden // max(1, heads)
    # transformers 5 keeps theta and scaling together as rope_parameters.
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta")) or 10000.0
    max_positions = size("max_position_embeddings")
    window = config.get("sliding_window")
    if window and (architecture == "mistral" or config.get("use_sliding_window")):
        # Within its first window such a model attends to everything.
        max_positions = min(max_positions, int(window))
    tied = (
        config.get("tie_word_embeddings", False) or _GLOBAL_NAMES["output"] not in weights.names()
    )
    info = ModelInfo(
        architecture=architecture,
        name=folder.resolve().name,
        source=folder.resolve().name,
        license=_license(folder),
        num_layers=size("num_hidden_layers"),
        num_query_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", head_dim_default),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        vocab_size=size("vocab_size"),
        max_positions=max_positions,
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(path, rope or config.get("rope_scaling"), max_positions),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=int(tied),
    )
    check_sizes(info, path)
    return info


def _rope_scaling(path: Path, scaling: dict[str, Any] | None, max_positions: int) -> str:
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    needed = {
        "linear": ("factor",),
        "yarn": ("factor",),
        "llama3": (
            *("factor", "low_freq_factor"),
            *("high_freq_factor", "original_max_position_embeddings"),
        ),
    }
    for key in needed.get(kind, ()):
        if not isinstance(scaling.get(key), int | float):
            raise CaptureError(f"{path}: RoPE scaling of type {kind} lacks a number for {key}")
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", max_positions)
    return normal_rope_scaling(scaling, path)


def _license(folder: Path) -> str:
    """The licence named in the front matter of README.md, where there is one."""
    readme = folder / "README.md"
    if readme.is_file():
        lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0] == "---":
            for line in lines[1:]:
                if line == "---":
                    break
                if line.startswith("license:"):
                    return line.partition(":")[2].strip()
    return "unknown"


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Tokens, merges and special tokens from tokenizer.json, with rows of the embedding beyond them
    filled in as unused tokens."""
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    model = tokenizer.get("model", {})
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or "merges" not in model:
        raise CaptureError(f"{path}: only byte-level BPE is supported (see --no-tokenizer)")

    tokens = [f"[UNUSED{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    entries = [(token, index, NORMAL) for token, index in model["vocab"].items()]
    entries += [
        (added["content"], added["id"], CONTROL if added.get("special") else USER_DEFINED)
        for added in tokenizer.get("added_tokens", [])
    ]
    for token, index, kind in entries:
        if index >= vocab_size:
            raise CaptureError(
                f'{path}: token {index} ("{token}") has no row in the embedding of {vocab_size}'
            )
        tokens[index], types[index] = token, kind

    bos, eos, add_bos = _special_tokens(folder, tokenizer, {t: i for i, t in enumerate(tokens)})
    return Vocabulary(
        tokens=tokens,
        merges=[m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        types=types,
        pre_tokenizer=_pre_tokenizer(path, tokenizer.get("pre_tokenizer")),
        bos_token=bos,
        eos_token=eos,
        add_bos=add_bos,
    )


def _pre_tokenizer(path: Path, rule: dict[str, Any] | None) -> str:
    """Our name of a pre-tokenizer that tokenizer.json spells out."""
    steps = rule.get("pretokenizers", [rule]) if rule else []
    kinds = [step.get("type") for step in steps]
    if steps and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        own_words = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own_words and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_words:
            words = steps[0].get("pattern", {}).get("Regex")
            if words == LLAMA3_WORDS:
                return "llama-bpe"
            if words == QWEN2_WORDS:
                return "qwen2"
    raise CaptureError(
        f"{path}: its pre-tokenizer is none of gpt-2, llama-bpe, qwen2, smollm (see --no-tokenizer)"
    )


def _special_tokens(
    folder: Path, tokenizer: dict[str, Any], ids: dict[str, int]
) -> tuple[int, int, bool]:
    """bos_token, eos_token (-1: none), add_bos."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    config = read_json(folder / "config.json")

    def token(name: str) -> int:
        content = settings.get(f"{name}_token")
        if isinstance(content, dict):
            content = content.get("content")
        if content is not None:
            return ids.get(content, -1)
        number = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        return number if isinstance(number, int) else -1

    bos = token("bos")
    return bos, token("eos"), bos >= 0 and _adds_bos(tokenizer.get("post_processor"), settings)


def _adds_bos(processor: dict[str, Any] | None, settings: dict[str, Any]) -> bool:
    """Whether the tokenizer starts a text with a special token by itself."""
    for step in (processor or {}).get("processors", [processor or {}]):
        if step.get("type") == "TemplateProcessing":
            return "SpecialToken" in step["single"][0]
    return bool(settings.get("add_bos_token", False))
