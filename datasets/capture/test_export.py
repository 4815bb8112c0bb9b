#!/usr/bin/env python3
"""Tests of the model export and of the evaluation reference: `python3 -m unittest` or pytest here.

No downloads, a few seconds. Tests whose packages are not installed are skipped by name.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import unittest
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import h5py
import numpy as np

import cli
import llama_numpy
import model_reference
import reference_eval
import reference_pipelines as rp
from export_model import main as export_model
from model_file import (
    ModelFile,
    ModelWriter,
    from_bf16,
    normal_rope_scaling,
    optional_shapes,
    required_shapes,
    to_bf16,
    to_int8,
)
from test_capture import (
    FP32_TOLERANCE,
    MISSING_FOR_GGUF,
    MISSING_FOR_TRANSFORMERS,
    CaptureTestCase,
    missing_package,
    skip_without,
)
from trace_file import CaptureError
from vocabulary import byte_alphabet, check_vocabulary, missing_bytes

MISSING_FOR_TOKENIZER = missing_package("tokenizers")

if MISSING_FOR_TOKENIZER is None:
    import make_tiny_models
    from vocabulary import PRE_TOKENIZERS
if MISSING_FOR_GGUF is None:
    import tiny_model
if MISSING_FOR_TRANSFORMERS is None:
    import torch
    import transformers

TINY = Path(__file__).resolve().parent.parent / "tiny"
TINY_NAMES = ("llama", "llama3", "qwen2", "qwen3")
TOKENS = np.random.default_rng(5).integers(0, 260, 37, dtype=np.int32)


def logits_of(model: ModelFile, tokens: np.ndarray) -> np.ndarray:
    """[T, vocab] by llama_numpy.py."""
    x = llama_numpy.forward(model, tokens, model.info.num_layers, lambda *_: None)
    normed = llama_numpy.rms_norm(x, model.info.rms_norm_eps) * model.final_norm()
    return normed @ model.unembedding().T


class NumbersTest(CaptureTestCase):
    def test_bf16_rounds_to_nearest_even(self) -> None:
        bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000000], np.uint32)
        expected = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000]
        np.testing.assert_array_equal(to_bf16(bits.view(np.float32)), expected)
        np.testing.assert_array_equal(to_bf16(from_bf16(np.arange(0x7F80, dtype=np.uint16))),
                                      np.arange(0x7F80))  # fmt: skip

    def test_int8_is_within_half_a_step(self) -> None:
        matrix = np.random.default_rng(1).standard_normal((9, 40)).astype(np.float32)
        matrix[3] = 0
        codes, scales = to_int8(matrix)
        self.assertEqual((codes.dtype, scales.dtype), (np.int8, np.float32))
        self.assertEqual(scales[3], 0)
        np.testing.assert_array_equal(np.abs(codes).max(axis=1), [127] * 3 + [0] + [127] * 5)
        step = np.abs(matrix).max(axis=1, keepdims=True) / 127
        error = np.abs(codes * scales[:, None] - matrix)
        self.assertTrue((error <= 0.5001 * step).all())


class ModelFileTest(CaptureTestCase):
    """Writing and reading, with the tiny models as material."""

    def copy(self, name: str, dtype: str, **changes) -> None:
        model = ModelFile(TINY / f"{name}.h5")
        info = replace(model.info, **changes)
        with ModelWriter(self.out, info, model.vocabulary, dtype) as writer:
            for tensor in sorted(model.names()):
                writer.add(tensor, model.tensor(tensor))

    def test_round_trip(self) -> None:
        for dtype, tolerance in (("fp32", 0), ("fp16", 0), ("bf16", 0), ("int8", 0.5 / 127)):
            for name in ("llama", "qwen2", "qwen3"):
                with self.subTest(dtype=dtype, name=name):
                    original = ModelFile(TINY / f"{name}.h5")
                    self.copy(name, dtype)
                    copy = ModelFile(self.out)
                    self.assertEqual(copy.info, original.info)
                    self.assertEqual(copy.vocabulary, original.vocabulary)
                    self.assertEqual(copy.names(), original.names())
                    for tensor in original.names():
                        self.assert_close(
                            copy.tensor(tensor), original.tensor(tensor), tolerance * 1.001
                        )
                    rows = np.array([7, 3, 3])
                    np.testing.assert_array_equal(copy.embed(rows), copy.tensor("embedding")[rows])

    def test_file_layout(self) -> None:
        """Names and types that readers in other languages rely on."""
        with h5py.File(TINY / "qwen2.h5") as file:
            attributes = dict(file.attrs)
            self.assertEqual((attributes["format"], attributes["version"]), ("sikv-model", 1))
            self.assertEqual((attributes["tie_embeddings"], attributes["add_bos"]), (0, 0))
            self.assertEqual(json.loads(attributes["rope_scaling"])["rope_type"], "yarn")
            self.assertEqual(file["layers/1/wq"].dtype, np.uint16)
            self.assertEqual(file["layers/1/wq"].attrs["dtype"], "bf16")
            self.assertEqual(file["layers/1/wq"].shape, (256, 128))
            self.assertEqual(file["layers/1/bq"].dtype, np.float32)
            self.assertEqual(file["output"].shape, (300, 128))
            self.assertEqual(file["tokenizer/types"].dtype, np.int32)
            self.assertEqual(file["tokenizer/tokens"].asstr()[0], "<|begin|>")
        with h5py.File(TINY / "llama3.h5") as file:
            self.assertNotIn("output", file)
            self.assertEqual(file["embedding"].dtype, np.int8)
            self.assertEqual(file["embedding_scale"].shape, (300,))
            self.assertEqual(file["norm"].dtype, np.float32)

    def test_values_that_do_not_fit_are_refused(self) -> None:
        model = ModelFile(TINY / "llama.h5")
        for dtype, value, sentence in (
            ("fp16", 70000.0, "layers/0/wq[5, 6] is 70000.0, too large for fp16"),
            ("bf16", np.nan, "layers/0/wq[5, 6] is nan, not a finite number"),
        ):
            tensor = model.tensor("layers/0/wq")
            tensor[5, 6] = value

            def write(dtype=dtype, tensor=tensor) -> None:
                with ModelWriter(self.out, model.info, None, dtype) as writer:
                    writer.add("layers/0/wq", tensor)

            self.assert_refused(sentence, write)

    def test_bad_files_are_refused(self) -> None:
        def damage(action) -> None:
            self.out.write_bytes((TINY / "qwen3.h5").read_bytes())
            with h5py.File(self.out, "r+") as file:
                action(file)

        def resize(file: h5py.File) -> None:
            del file["norm"]
            file["norm"] = np.zeros(3)

        for action, sentence in (
            (lambda f: f.attrs.update({"format": "x"}), "is not a model file"),
            (lambda f: f.attrs.update({"version": 2}), "has format version 2, only 1"),
            (lambda f: f.attrs.pop("head_dim"), "lacks the root attribute head_dim"),
            (lambda f: f.attrs.update({"num_kv_heads": 2}), "3 query heads cannot share 2"),
            (lambda f: f.pop("layers/1/wo"), "lacks the dataset layers/1/wo"),
            (resize, "norm has shape (3,), expected (128,)"),
        ):
            with self.subTest(sentence):
                damage(action)
                with self.assertRaises(CaptureError) as caught:
                    ModelFile(self.out)
                self.assertIn(sentence, str(caught.exception))
        self.out.write_bytes((TINY / "qwen3.h5").read_bytes()[:100000])
        with self.assertRaisesRegex(CaptureError, "is not a readable HDF5 file"):
            ModelFile(self.out)

    def test_rope_scaling_is_normalised(self) -> None:
        path = Path("config.json")
        self.assertEqual(normal_rope_scaling(None, path), "")
        self.assertEqual(normal_rope_scaling({"rope_type": "default", "rope_theta": 5}, path), "")
        self.assertEqual(
            normal_rope_scaling({"type": "linear", "factor": 2, "x": None}, path),
            '{"factor": 2, "rope_type": "linear"}',
        )
        self.assert_refused(
            '"dynamic" is not supported', normal_rope_scaling, {"type": "dynamic"}, path
        )


class TinyModelsTest(CaptureTestCase):
    def test_forward_pass_matches_the_golden_values(self) -> None:
        with h5py.File(TINY / "golden.h5") as golden:
            self.assertEqual(set(golden), set(TINY_NAMES))
            for name in TINY_NAMES:
                with self.subTest(name):
                    expected = golden[name]
                    model = ModelFile(TINY / f"{name}.h5")
                    tokens = expected["tokens"][:]
                    layers: list[llama_numpy.LayerTensors] = []
                    x = llama_numpy.forward(model, tokens, 2, lambda _, t, to=layers: to.append(t))
                    for index, layer in enumerate(layers):
                        self.assert_close(layer.q, expected["q"][index], FP32_TOLERANCE)
                        self.assert_close(layer.k, expected["k"][index], FP32_TOLERANCE)
                        self.assert_close(layer.v, expected["v"][index], FP32_TOLERANCE)
                    self.assert_close(x, expected["hidden"][2], FP32_TOLERANCE)
                    self.assert_close(
                        logits_of(model, tokens), expected["logits"][:], FP32_TOLERANCE
                    )

    @skip_without(MISSING_FOR_TOKENIZER)
    def test_the_files_are_what_the_script_makes(self) -> None:
        make_tiny_models.main(["--out", str(self.folder)])
        for path in sorted(TINY.glob("*.h5")):
            made = self.folder / path.name
            with self.subTest(path.name), h5py.File(path) as old, h5py.File(made) as new:
                self.assertEqual(dict(old.attrs), dict(new.attrs))
                self.assert_same_datasets(old, new, exact=path.name != "golden.h5")
        name = "tokenizer_golden.json"
        self.assertEqual((self.folder / name).read_bytes(), (TINY / name).read_bytes())

    def assert_same_datasets(self, old: h5py.Group, new: h5py.Group, exact: bool) -> None:
        self.assertEqual(set(old), set(new))
        for name in old:
            if isinstance(old[name], h5py.Group):
                self.assert_same_datasets(old[name], new[name], exact)
            elif exact or old[name].dtype.kind == "i":
                np.testing.assert_array_equal(old[name][:], new[name][:])
            else:  # fp64 sums, rounded to fp32: the order of the sums depends on the machine
                self.assert_close(new[name][:], old[name][:].astype(np.float64), 2e-7)

    @skip_without(MISSING_FOR_TOKENIZER)
    def test_tokens_spell_the_text(self) -> None:
        alphabet = byte_alphabet()
        byte_of = {character: byte for byte, character in enumerate(alphabet)}
        golden = json.loads((TINY / "tokenizer_golden.json").read_text(encoding="utf-8"))
        for name in PRE_TOKENIZERS:
            vocabulary = make_tiny_models.vocabulary(name)
            check_vocabulary(vocabulary, Path("tiny"))
            self.assertEqual(missing_bytes(vocabulary), [])
            for text, ids in zip(golden["texts"], golden[name], strict=True):
                spelled = bytes(byte_of[c] for i in ids for c in vocabulary.tokens[i])
                self.assertEqual(spelled.decode(), text)
        rules = [golden[name] for name in PRE_TOKENIZERS]
        self.assertTrue(all(a != b for a in rules for b in rules if a is not b))


@skip_without(MISSING_FOR_GGUF)
class GgufExportTest(CaptureTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.model = self.folder / "model.gguf"
        self.weights = tiny_model.tensors()
        self.fields = tiny_model.fields()

    def export(self, *options: str, architecture: str = "llama") -> ModelFile:
        fields = {
            key.replace("llama.", f"{architecture}."): value for key, value in self.fields.items()
        }
        tiny_model.write_gguf(self.model, self.weights, fields, architecture=architecture)
        arguments = ["--model", str(self.model), "--out", str(self.out), "--dtype", "fp32"]
        self.assertEqual(export_model([*arguments, *options]), 0)
        return ModelFile(self.out)

    def assert_same_logits(self, model: ModelFile) -> None:
        """Both references: on the GGUF weights in GGUF's order, and on the exported ones."""
        reference = model_reference.run(model, TOKENS)
        log_p = reference_eval.log_softmax(reference.logits)
        layers, expected = tiny_model.reference_forward(self.weights, TOKENS)
        self.assert_close(log_p, expected, FP32_TOLERANCE)
        for index, layer in enumerate(layers):
            self.assert_close(reference.q[index], layer.q, FP32_TOLERANCE)
            self.assert_close(reference.k[index], layer.k, FP32_TOLERANCE)
        self.assert_close(logits_of(model, TOKENS), reference.logits, FP32_TOLERANCE)

    def test_llama(self) -> None:
        model = self.export()
        self.assert_same_logits(model)
        self.assertEqual(
            asdict(model.info)
            | {"num_layers": 3, "max_positions": 64, "rope_scaling": "", "tie_embeddings": 1},
            asdict(model.info),
        )
        self.assertEqual((model.info.license, model.info.source), ("test-license", "model.gguf"))
        self.assertEqual(model.vocabulary.tokens, tiny_model.VOCABULARY)
        self.assertEqual(model.vocabulary.merges, tiny_model.MERGES)
        self.assertEqual((model.vocabulary.bos_token, model.vocabulary.add_bos), (260, False))

    def test_factors_and_untied_output(self) -> None:
        factors = np.linspace(1, 8, tiny_model.HEAD_DIM // 2, dtype=np.float32)
        self.weights["rope_freqs.weight"] = factors
        self.weights["output.weight"] = tiny_model.tensors(seed=2)["token_embd.weight"]
        model = self.export("--name", "N", "--source", "S", "--license", "L")
        self.assert_same_logits(model)
        self.assertEqual((model.info.name, model.info.source, model.info.license), ("N", "S", "L"))

    def test_qwen_rows_stay_in_place(self) -> None:
        random = np.random.default_rng(3)
        extra = {
            "qwen2": {"attn_q.bias": 48, "attn_k.bias": 24, "attn_v.bias": 24},
            "qwen3": {"attn_q_norm.weight": 12, "attn_k_norm.weight": 12},
        }
        ours = {"attn_q.bias": "bq", "attn_k.bias": "bk", "attn_v.bias": "bv"}
        ours |= {"attn_q_norm.weight": "q_norm", "attn_k_norm.weight": "k_norm"}
        for architecture, tensors in extra.items():
            self.weights = tiny_model.tensors()
            for layer in range(3):
                for name, size in tensors.items():
                    values = random.standard_normal(size).astype(np.float32)
                    self.weights[f"blk.{layer}.{name}"] = values
            model = self.export(architecture=architecture)
            self.assertEqual(model.info.architecture, architecture)
            np.testing.assert_array_equal(
                model.tensor("layers/2/wq"), self.weights["blk.2.attn_q.weight"]
            )
            for name in tensors:
                np.testing.assert_array_equal(
                    model.tensor(f"layers/1/{ours[name]}"), self.weights[f"blk.1.{name}"]
                )

    def test_llama_bias_is_permuted_with_its_rows(self) -> None:
        self.weights["blk.0.attn_k.bias"] = np.arange(24, dtype=np.float32)
        bias = self.export().tensor("layers/0/bk")
        np.testing.assert_array_equal(bias[:12], [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])

    def test_scaling_rules(self) -> None:
        self.fields |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
        self.fields |= {"llama.rope.scaling.original_context_length": 32}
        scaling = json.loads(self.export().info.rope_scaling)
        self.assertEqual(scaling.pop("rope_type"), "yarn")
        self.assertEqual(scaling, {"factor": 4, "original_max_position_embeddings": 32})

    def test_bad_vocabularies_are_refused(self) -> None:
        for change, sentence in (
            ({"tokenizer.ggml.tokens": tiny_model.VOCABULARY[:-1]}, "bos_token is 260, not a"),
            ({"tokenizer.ggml.merges": ["t x"]}, 'the merge "t x" names a token that does not'),
            (
                {"tokenizer.ggml.tokens": [*tiny_model.VOCABULARY[:-1], "th"]},
                "a token is twice in the vocabulary",
            ),
            ({"tokenizer.ggml.model": "llama"}, "only byte-level BPE"),
            (
                {"tokenizer.ggml.tokens": [*tiny_model.VOCABULARY, "more"]},
                "262 tokens, but 261 rows in the embedding",
            ),
        ):
            with self.subTest(sentence):
                self.fields = tiny_model.fields() | change
                self.assert_refused(sentence, self.export)
        self.assertIsNone(self.export("--no-tokenizer").vocabulary)

    def test_exit_codes_and_the_previous_file(self) -> None:
        def exit_code(*arguments: str) -> int:
            with (
                mock.patch("sys.argv", ["export_model.py", *arguments]),
                self.assertRaises(SystemExit) as left,
            ):
                cli.run_command(export_model)
            return left.exception.code

        self.export()
        before = self.out.read_bytes()
        bad = ["--model", str(self.model), "--out", str(self.out)]
        self.weights["blk.2.ffn_up.weight"][3, 4] = np.inf
        tiny_model.write_gguf(self.model, self.weights, self.fields)
        self.assertEqual(exit_code(*bad), 2)
        self.assertEqual(exit_code(*bad, "--dtype", "fp8"), 2)
        self.assertEqual(exit_code("--model", str(self.folder / "no"), "--out", "x.h5"), 2)
        self.assertEqual(self.out.read_bytes(), before)
        self.assertFalse(self.out.with_name("out.h5.partial").exists())


class HfExportTest(CaptureTestCase):
    """A hand-written folder; its tensors are those of a tiny model, under their other names."""

    def setUp(self) -> None:
        super().setUp()
        self.saved = self.folder / "saved"
        self.saved.mkdir()
        self.source = ModelFile(TINY / "qwen2.h5")
        info = self.source.info
        self.config = {
            "model_type": "qwen2",
            "num_hidden_layers": info.num_layers,
            "num_attention_heads": info.num_query_heads,
            "num_key_value_heads": info.num_kv_heads,
            "head_dim": info.head_dim,
            "hidden_size": info.hidden_size,
            "intermediate_size": info.intermediate_size,
            "vocab_size": info.vocab_size,
            "max_position_embeddings": info.max_positions,
            "rope_theta": info.rope_theta,
            "rope_scaling": {"type": "yarn", "factor": 4.0}
            | {"original_max_position_embeddings": 512},
            "rms_norm_eps": info.rms_norm_eps,
            "tie_word_embeddings": False,
            "eos_token_id": [1, 3],
        }
        import hf_model

        self.tensors = {hf_model._hf_name(n): self.source.tensor(n) for n in self.source.names()}
        vocabulary = self.source.vocabulary
        self.tokenizer = {
            "model": {
                "type": "BPE",
                "vocab": {t: i for i, t in enumerate(vocabulary.tokens[:297]) if i > 3},
                "merges": [merge.split(" ") for merge in vocabulary.merges],
            },
            "added_tokens": [
                {"id": i, "content": vocabulary.tokens[i], "special": True} for i in range(4)
            ],
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": hf_model.QWEN2_WORDS}},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            },
        }
        (self.saved / "tokenizer_config.json").write_text('{"bos_token": null}')
        (self.saved / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n")

    def write(self, shards: int = 1) -> None:
        (self.saved / "config.json").write_text(json.dumps(self.config))
        (self.saved / "tokenizer.json").write_text(json.dumps(self.tokenizer))
        names = sorted(self.tensors)
        if shards == 1:
            self.write_shard("model.safetensors", names)
            return
        parts = {f"part-{i}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in parts.items():
            self.write_shard(file, part)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (self.saved / "model.safetensors.index.json").write_text(json.dumps(index))

    def write_shard(self, file: str, names: list[str]) -> None:
        header, data = {"__metadata__": {"format": "pt"}}, b""
        for number, name in enumerate(names):
            kind = ("F32", "F16", "BF16")[number % 3]
            tensor = self.tensors[name]
            if kind == "BF16" and tensor.ndim == 2:
                content = to_bf16(tensor).tobytes()
            elif kind == "F16" and tensor.ndim == 2:
                content = tensor.astype(np.float16).tobytes()
            else:
                kind, content = "F32", tensor.tobytes()
            offsets = [len(data), len(data) + len(content)]
            header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": offsets}
            data += content
        text = json.dumps(header).encode()
        (self.saved / file).write_bytes(struct.pack("<Q", len(text)) + text + data)

    def export(self, *options: str) -> ModelFile:
        arguments = ["--model", str(self.saved), "--out", str(self.out), "--dtype", "fp32"]
        self.assertEqual(export_model([*arguments, *options]), 0)
        return ModelFile(self.out)

    def test_export(self) -> None:
        for shards in (1, 3):
            with self.subTest(shards=shards):
                self.write(shards)
                model = self.export()
                self.assertEqual(
                    model.info,
                    replace(self.source.info, name="saved", source="saved", license="mit"),
                )
                for name in self.source.names():
                    np.testing.assert_array_equal(model.tensor(name), self.source.tensor(name))
        expected = self.source.vocabulary
        self.assertEqual(model.vocabulary.tokens[:297], expected.tokens[:297])
        self.assertEqual(model.vocabulary.tokens[297:299], ["[UNUSED297]", "[UNUSED298]"])
        self.assertEqual(model.vocabulary.types[:5] + model.vocabulary.types[296:298],
                         [3, 3, 3, 3, 1, 1, 5])  # fmt: skip
        self.assertEqual(model.vocabulary.merges, expected.merges)
        self.assertEqual(model.vocabulary.pre_tokenizer, "qwen2")
        special = (model.vocabulary.bos_token, model.vocabulary.eos_token)
        self.assertEqual((*special, model.vocabulary.add_bos), (-1, 1, False))

    def test_pre_tokenizers_and_begin_token(self) -> None:
        import hf_model

        level = {"type": "ByteLevel", "add_prefix_space": False}
        for rule, name in (
            (level, "gpt-2"),
            ([{"type": "Digits", "individual_digits": True}, level], "smollm"),
            (
                [
                    {"type": "Split", "pattern": {"Regex": hf_model.LLAMA3_WORDS}},
                    level | {"use_regex": False},
                ],
                "llama-bpe",
            ),
        ):
            if isinstance(rule, list):
                rule = {"type": "Sequence", "pretokenizers": rule}
            self.tokenizer["pre_tokenizer"] = rule
            self.tokenizer["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|begin|>"}}, {"Sequence": {"id": "A"}}],
            }
            self.config["bos_token_id"] = 0
            self.write()
            vocabulary = self.export().vocabulary
            self.assertEqual(vocabulary.pre_tokenizer, name)
            self.assertEqual((vocabulary.bos_token, vocabulary.add_bos), (0, True))

    def test_tied_and_windowed(self) -> None:
        del self.tensors["lm_head.weight"]
        self.config |= {"sliding_window": 100, "use_sliding_window": False}
        self.write()
        info = self.export().info
        self.assertEqual((info.tie_embeddings, info.max_positions), (1, 2048))
        self.config |= {"model_type": "mistral"}
        self.write()
        self.assertEqual(self.export().info.max_positions, 100)

    def test_bad_folders_are_refused(self) -> None:
        tensor = "model.layers.1.mlp.up_proj.weight"
        for change, sentence in (
            (lambda: self.config.pop("num_attention_heads"), "lacks a number for num_attention_"),
            (lambda: self.config.update(model_type="gpt2"), 'of type "gpt2"; supported are'),
            (lambda: self.config.update(hidden_act="gelu"), 'activation "gelu"'),
            (lambda: self.config.update(rope_scaling={"type": "su"}), '"su" is not supported'),
            (lambda: self.config.update(num_hidden_layers=0), "num_layers is 0"),
            (lambda: self.tensors.pop(tensor), f"lacks the tensor {tensor}"),
            (lambda: self.tensors.update({tensor: np.zeros((2, 3))}), "shape (2, 3), expected"),
            (lambda: self.tensors.update({"x": np.zeros(3)}), "tensor x is not part of a plain"),
            (lambda: self.tokenizer["model"].update(type="Unigram"), "only byte-level BPE"),
            (lambda: self.tokenizer.update(pre_tokenizer=None), "its pre-tokenizer is none of"),
        ):
            with self.subTest(sentence):
                self.setUp()
                change()
                self.tensors = {n: t.astype(np.float32) for n, t in self.tensors.items()}
                self.write()
                self.assert_refused(sentence, self.export)
        self.setUp()
        self.write()
        weights = self.saved / "model.safetensors"
        content = weights.read_bytes()
        for size, sentence in ((0, "is not a safetensors"), (50, "its end is missing")):
            weights.write_bytes(content[:size])
            self.assert_refused(sentence, self.export)
        weights.write_bytes(content[:-5])
        self.assert_refused("ends behind the end of the file", self.export)
        weights.unlink()
        self.assert_refused("model.safetensors: No such file", self.export)
        (self.saved / "config.json").write_text("{")
        self.assert_refused("config.json is not JSON", self.export)


@skip_without(MISSING_FOR_TRANSFORMERS)
class TransformersExportTest(CaptureTestCase):
    """Logits of transformers models against those of their export, by both forward passes."""

    def test_families_and_scaling_rules(self) -> None:
        llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        for family, scaling, tied in (
            ("llama", {"rope_type": "default"}, True),
            ("llama", llama3, False),
            ("mistral", {"rope_type": "linear", "factor": 3.0}, False),
            ("qwen2", yarn, False),
            ("qwen3", {"rope_type": "default"}, True),
        ):
            with self.subTest(family=family, scaling=scaling["rope_type"]):
                config = transformers.AutoConfig.for_model(
                    family,
                    vocab_size=300,
                    hidden_size=48,
                    intermediate_size=80,
                    num_hidden_layers=3,
                    num_attention_heads=6,
                    num_key_value_heads=2,
                    head_dim=16,
                    max_position_embeddings=128,
                    rope_parameters=scaling | {"rope_theta": 1000.0},
                    initializer_range=0.3,
                    tie_word_embeddings=tied,
                )
                torch.manual_seed(11)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # biases start as zeros and norms as ones
                        torch.nn.init.uniform_(parameter, 0.5, 1.5)
                saved = self.folder / f"{family}-{scaling['rope_type']}"
                model.eval().save_pretrained(saved)
                arguments = ["--model", str(saved), "--out", str(self.out), "--no-tokenizer"]
                self.assertEqual(export_model([*arguments, "--dtype", "fp32"]), 0)
                exported = ModelFile(self.out)
                self.assertEqual(exported.info.tie_embeddings, int(tied))
                ids = torch.from_numpy(TOKENS.astype(np.int64))[None]
                with torch.inference_mode():
                    expected = model(ids).logits[0].numpy()
                self.assert_close(model_reference.run(exported, TOKENS).logits, expected, 1e-4)
                self.assert_close(logits_of(exported, TOKENS), expected, 1e-4)


class PipelinesTest(CaptureTestCase):
    """The evaluation reference, in the cases where the answer is known."""

    HEADS, LENGTH, DIM = 2, 300, 64

    def setUp(self) -> None:
        super().setUp()
        random = np.random.default_rng(2)
        shape = (self.LENGTH, self.HEADS, self.DIM)
        self.keys = random.standard_normal(shape).astype(np.float32)
        self.values = random.standard_normal(shape).astype(np.float32)
        self.queries = random.standard_normal((60, 4, self.DIM)).astype(np.float32)
        self.prompt = rp.PromptLayer(self.keys, self.values, self.queries[: rp.WINDOW])

    def answers(self, layer, steps: int = 12) -> np.ndarray:
        return np.array(
            [
                layer.attend(self.queries[rp.WINDOW + i], self.keys[i], self.values[-1 - i])
                for i in range(steps)
            ]
        )

    def sparse(self, codec: rp.Codec, budget: int | None, **options) -> rp.SparseLayer:
        pipeline = rp.Pipeline("test", codec, budget, **options)
        return rp.SparseLayer(self.prompt, pipeline, np.full(self.HEADS, pipeline.period))

    def test_rotation(self) -> None:
        for dim in (64, 96, 128):
            turn = rp.rotation(dim)
            np.testing.assert_allclose(turn @ turn.T, np.eye(dim), atol=1e-6)
        self.assertEqual(np.count_nonzero(rp.rotation(96)[0]), 32)
        self.assertEqual(rp._splitmix64(0), 0xE220A8397B1DCDAF)  # of the published sequence

    def test_codec_errors(self) -> None:
        """Of normal numbers: Lloyd-Max's distortion (Max, 1960), a little less by the scale."""
        x = np.random.default_rng(4).standard_normal((1, 4000, 64)).astype(np.float32)
        for bits, distortion in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
            error = ((rp.rot_lm(x, bits) - x) ** 2).mean()
            self.assertLess(error / distortion, 1)
            self.assertGreater(error / distortion, 0.9)
        self.assertLess(np.abs(rp.sign_vq_keys(x, 16) - x).max(), 0.01)
        self.assertLess(np.abs(rp.min_max(x, 16) - x).max(), 0.01)
        np.testing.assert_array_equal(rp.min_max(np.full((1, 2, 64), 0.5), 2), 0.5)

    def test_scan_follows_the_codebook(self) -> None:
        mean_query = self.queries[0].reshape(self.HEADS, -1, self.DIM).mean(axis=1)
        for rotated in (False, True):
            index = rp.make_index(self.prompt.keys, rotated)
            scores = rp.scan(index, mean_query)
            exact = np.einsum("hd,hed->he", mean_query, self.prompt.keys)
            for head in range(self.HEADS):
                # Signs of normal numbers correlate with them by sqrt(2 / pi) = 0.80.
                correlation = np.corrcoef(scores[head], exact[head])[0, 1]
                self.assertAlmostEqual(correlation, 0.8, delta=0.04)

    def test_ties_go_to_the_lower_position(self) -> None:
        np.testing.assert_array_equal(rp.best(np.array([[1, 2, 1, 2, 1]]), 3), [[0, 1, 3]])

    def test_everything_at_many_bits_is_dense(self) -> None:
        dense = self.answers(rp.DenseLayer(self.prompt))
        self.assert_close(self.answers(self.sparse(rp.Codec("sign_vq", 16, 16), None)), dense, 2e-3)

    def test_a_budget_of_everything(self) -> None:
        codec = rp.Codec("rot_lm", 3, 2)
        everything = self.answers(self.sparse(codec, None))
        rest = self.LENGTH - rp.PINNED
        self.assert_close(self.answers(self.sparse(codec, rest)), everything, 1e-5)
        self.assert_close(self.answers(self.sparse(codec, rest, rerank=2)), everything, 1e-5)

    def test_scans_are_counted(self) -> None:
        codec = rp.Codec("rot_lm", 3, 2)
        for options, scans in (({}, 12), ({"period": 8}, 2), ({"period": 5}, 3)):
            layer = self.sparse(codec, 16, rerank=2, **options)
            self.answers(layer)
            self.assertEqual(layer.scans, scans * self.HEADS)
        always = self.sparse(codec, 16, rerank=2, period=8, refresh_cosine=1.1)
        never = self.sparse(codec, 16, rerank=2, period=8, refresh_cosine=-1.1)
        each = self.answers(self.sparse(codec, 16, rerank=2))
        np.testing.assert_array_equal(self.answers(always), each)
        self.answers(never)
        self.assertEqual((always.scans, never.scans), (12 * self.HEADS, 2 * self.HEADS))

    def test_schedule(self) -> None:
        """Queries that never change need no second scan; unrelated ones need one each step."""
        pipeline = rp.Pipeline("test", rp.Codec("rot_lm", 3, 2), 8, 2, None, 0.002)
        same = np.repeat(self.queries[:1], rp.WINDOW, axis=0)
        layer = rp.PromptLayer(self.keys, self.values, same)
        np.testing.assert_array_equal(layer.schedule(pipeline), [8, 8])
        layer = rp.PromptLayer(self.keys, self.values, 3 * self.queries[: rp.WINDOW])
        np.testing.assert_array_equal(layer.schedule(pipeline), [1, 1])

    def test_evaluation_of_a_tiny_model(self) -> None:
        model = ModelFile(TINY / "llama.h5")
        tokens = np.random.default_rng(1).integers(0, 300, 200 + 9, dtype=np.int32)
        prompts = reference_eval.prefill(model, tokens[:200])
        pipelines = [
            rp.Pipeline("all", rp.Codec("rot_lm", 4, 4), None),
            rp.Pipeline("some", rp.Codec("rot_lm", 3, 2), 32, 2, 4),
        ]
        rows = reference_eval.evaluate(model, prompts, tokens, 200, pipelines)
        log_p = reference_eval.log_softmax(logits_of(model, tokens).astype(np.float64))
        wanted = -np.mean([log_p[200 + i, tokens[201 + i]] for i in range(8)])
        self.assertAlmostEqual(rows[0].nll, wanted, delta=1e-4)
        self.assertEqual((rows[0].kl, rows[0].top1, rows[0].scans), (0, 1, None))
        self.assertLess(0, rows[1].kl)
        self.assertLess(rows[1].kl, rows[2].kl)
        self.assertEqual(rows[2].scans, 0.25)

        expected = [(None, rows[1].nll_added, rows[1].kl, None)]
        expected += [(0.25, rows[2].nll_added, rows[2].kl, 1.0)]
        with (
            contextlib.redirect_stdout(io.StringIO()) as printed,
            mock.patch.object(reference_eval, "DENSE_NLL", rows[0].nll),
        ):
            self.assertEqual(reference_eval.report(rows, expected), 0)
            expected[1] = (0.35, *expected[1][1:])
            self.assertEqual(reference_eval.report(rows, expected), 1)
        self.assertEqual(printed.getvalue().count("DIFFERENT"), 1)


class ShapesTest(unittest.TestCase):
    def test_names(self) -> None:
        info = ModelFile(TINY / "llama.h5").info
        self.assertEqual(len(required_shapes(info)), 2 + 9 * info.num_layers)
        self.assertEqual(len(optional_shapes(info)), 5 * info.num_layers)


if __name__ == "__main__":
    unittest.main()
