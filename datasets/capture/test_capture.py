#!/usr/bin/env python3
"""Tests of the capture tools: `python3 -m unittest` or pytest in this folder.

No downloads, a few seconds. Tests whose packages are not installed are skipped by name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
import unittest
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import h5py
import numpy as np

import cli
import compare_traces
import llama_numpy
import train_saap
from trace_file import CaptureError, LayerTrace, TraceInfo, TraceWriter, read_trace

# Of an array's largest magnitude: a few hundred fp32 roundings (6e-8 each) through three layers.
FP32_TOLERANCE = 2e-5

TEXT = "the 1234 theatres, then the other 12 there. " * 8

INFO = TraceInfo(
    model="test",
    num_layers=4,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10000.0,
    rope_layout="half",
    rope_applied=True,
    text="noise",
    license="none",
    tokenizer="none",
)


def missing_package(*names: str) -> str | None:
    """The first of these packages that is not installed."""
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


MISSING_FOR_GGUF = missing_package("gguf", "tokenizers")
MISSING_FOR_TRANSFORMERS = missing_package("torch", "transformers")

if MISSING_FOR_GGUF is None:
    import tiny_model
    from capture_gguf import main as capture_gguf
    from gguf_file import GgufFile
    from gguf_tokenizer import GgufTokenizer

if MISSING_FOR_TRANSFORMERS is None:
    import torch
    import transformers

    import transformers_hook
    from capture_transformers import main as capture_transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def skip_without(missing: str | None) -> Callable[[type], type]:
    """Decorator: skip the tests of a class, naming the missing package."""
    return unittest.skipIf(missing is not None, f"package {missing} is not installed")


class CaptureTestCase(unittest.TestCase):
    """A temporary folder, a silent stderr, and comparisons."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.out = self.folder / "out.h5"
        self.text = self.folder / "text.txt"
        self.text.write_text(TEXT, encoding="utf-8")
        self.enterContext(contextlib.redirect_stderr(io.StringIO()))

    def assert_close(self, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
        """Largest difference at most `tolerance` of the largest expected magnitude."""
        self.assertEqual(actual.shape, expected.shape)
        error = np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()
        self.assertLessEqual(error, tolerance)

    def assert_refused(self, sentence: str, call: Callable, *arguments) -> None:
        """call(*arguments) raises a CaptureError that contains `sentence` and leaves no file."""
        with self.assertRaises(CaptureError) as caught:
            call(*arguments)
        self.assertIn(sentence, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))
        self.assertFalse(self.out.exists())
        self.assertFalse(self.out.with_name("out.h5.partial").exists())


class TraceFileTest(CaptureTestCase):
    def setUp(self) -> None:
        super().setUp()
        random = np.random.default_rng(7)
        self.tokens = np.arange(700, dtype=np.int32)
        self.layers = {
            layer: LayerTrace(
                k=random.standard_normal((700, 2, 8)),
                v=random.standard_normal((700, 2, 8)),
                q=random.standard_normal((30, 4, 8)),
                first_query_position=670,
                w_o=random.standard_normal((32, 24)) if layer == 3 else None,
            )
            for layer in (0, 3)
        }

    def write(self, dtype: str = "fp32", path: Path | None = None) -> None:
        with TraceWriter(path or self.out, INFO, self.tokens, dtype) as writer:
            for layer, trace in self.layers.items():
                writer.add_layer(layer, trace)

    def test_round_trip(self) -> None:
        for dtype, numpy_type in (("fp16", np.float16), ("fp32", np.float32)):
            with self.subTest(dtype=dtype):
                self.write(dtype)
                trace = read_trace(self.out)
                self.assertEqual(trace.info, INFO)
                np.testing.assert_array_equal(trace.tokens, self.tokens)
                self.assertEqual(list(trace.layers), [0, 3])
                for layer, expected in self.layers.items():
                    self.assertEqual(trace.layers[layer].first_query_position, 670)
                    for name in ("k", "v", "q"):
                        actual = getattr(trace.layers[layer], name)
                        self.assertEqual(actual.dtype, numpy_type)
                        wanted = getattr(expected, name).astype(numpy_type)
                        np.testing.assert_array_equal(actual, wanted)
                self.assertIsNone(trace.layers[0].w_o)
                self.assertEqual(trace.layers[3].w_o.shape, (32, 24))

    def test_file_layout(self) -> None:
        """Names, types and filters that readers in other languages rely on."""
        self.write("fp16")
        with h5py.File(self.out) as file:
            self.assertEqual(set(file.attrs), set(asdict(INFO)))
            self.assertEqual(set(file), {"tokens", "layers"})
            self.assertEqual(file["tokens"].dtype, np.int32)
            self.assertEqual(set(file["layers"]), {"0", "3"})
            keys = file["layers/0/k"]
            self.assertEqual(keys.chunks, (512, 2, 8))
            self.assertTrue(keys.shuffle)
            self.assertEqual(keys.compression, "gzip")

    def test_same_input_same_bytes(self) -> None:
        self.write()
        first = self.out.read_bytes()
        self.write()
        self.assertEqual(self.out.read_bytes(), first)

    def test_non_finite_is_refused(self) -> None:
        self.layers[3].k[5, 1, 2] = np.nan
        self.assert_refused("/layers/3/k[5, 1, 2] is nan", self.write)

    def test_fp16_overflow_is_refused(self) -> None:
        self.layers[0].q[29, 3, 7] = -70000.0
        self.assert_refused(
            "/layers/0/q[29, 3, 7] is -70000.0, which float16 cannot hold", self.write, "fp16"
        )
        self.write("fp32")

    def test_failure_keeps_the_previous_file(self) -> None:
        self.write()
        before = self.out.read_bytes()
        self.layers[3].v[0] = np.inf
        with self.assertRaises(CaptureError):
            self.write()
        self.assertEqual(self.out.read_bytes(), before)

    def test_unwritable_place(self) -> None:
        self.assert_refused("cannot write", self.write, "fp32", self.folder / "no" / "out.h5")

    def test_bad_files_are_refused(self) -> None:
        cut = self.folder / "cut.h5"
        self.assert_refused("no such file", read_trace, cut)
        self.write(path=self.folder / "good.h5")
        content = (self.folder / "good.h5").read_bytes()
        cut.write_bytes(content[: len(content) // 2])
        self.assert_refused("is not a readable HDF5 file", read_trace, cut)
        cut.write_text("not HDF5")
        self.assert_refused("is not a readable HDF5 file", read_trace, cut)

        def break_attribute(file: h5py.File) -> None:
            del file.attrs["rope_layout"]

        def break_tokens(file: h5py.File) -> None:
            del file["tokens"]

        def break_values(file: h5py.File) -> None:
            del file["layers/3/v"]

        def break_position(file: h5py.File) -> None:
            file["layers/0"].attrs["first_query_position"] = 669

        def break_layers(file: h5py.File) -> None:
            del file["layers/0"], file["layers/3"]

        for damage, sentence in (
            (break_attribute, "lacks the root attribute rope_layout"),
            (break_tokens, "lacks the dataset tokens"),
            (break_values, "lacks the dataset layers/3/v"),
            (break_position, "layers/0/q has shape (30, 4, 8), expected (31, 4, 8)"),
            (break_layers, "holds no layer"),
        ):
            with self.subTest(sentence):
                cut.write_bytes(content)
                with h5py.File(cut, "r+") as file:
                    damage(file)
                self.assert_refused(sentence, read_trace, cut)

    def test_compare(self) -> None:
        self.write(path=self.out)
        expected = read_trace(self.out)

        def problems(actual) -> list[str]:
            with contextlib.redirect_stdout(io.StringIO()):
                return compare_traces.compare(expected, actual, tolerance=1e-3)

        self.assertEqual(problems(expected), [])
        near = replace(expected.layers[0], k=expected.layers[0].k * 1.0005)
        far = replace(expected.layers[0], k=expected.layers[0].k * 1.002)
        broken = replace(expected.layers[0], k=expected.layers[0].k * np.nan)
        layers = expected.layers
        self.assertEqual(problems(replace(expected, layers=layers | {0: near})), [])
        for changed, sentence in (
            (replace(expected, layers=layers | {0: far}), "layers/0/k is off by"),
            (replace(expected, layers=layers | {0: broken}), "layers/0/k is off by nan"),
            (replace(expected, layers={0: layers[0]}), "layers are [0], expected [0, 3]"),
            (replace(expected, tokens=expected.tokens + 1), "tokens are not equal"),
            (replace(expected, info=replace(INFO, rope_theta=1.0)), "rope_theta is 1.0"),
        ):
            with self.subTest(sentence):
                self.assertIn(sentence, "".join(problems(changed)))

        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(compare_traces.main([str(self.out), str(self.out)]), 0)


class SelectionTest(CaptureTestCase):
    def test_layers(self) -> None:
        self.assertEqual(cli.parse_layers("all", 3), [0, 1, 2])
        self.assertEqual(cli.parse_layers("5,0-2,1", 6), [0, 1, 2, 5])
        for text, sentence in (
            ("0,6", "layer 6 is out of range, the model has layers 0..5"),
            ("4-9", "layer 9 is out of range"),
            ("3-1", '"3-1" is neither a layer number nor a range'),
            ("-1", '"-1" is neither'),
            ("1,", '"" is neither'),
            ("first", '"first" is neither'),
        ):
            with self.subTest(text):
                self.assert_refused(sentence, cli.parse_layers, text, 6)

    def test_queries(self) -> None:
        self.assertEqual(cli.parse_queries("all", 9), 9)
        self.assertEqual(cli.parse_queries("9", 9), 9)
        for text in ("0", "10", "-1", "few"):
            with self.subTest(text):
                self.assert_refused('must be "all" or 1..9', cli.parse_queries, text, 9)


class NumpyForwardTest(CaptureTestCase):
    def test_attention_does_not_depend_on_the_block_size(self) -> None:
        random = np.random.default_rng(3)
        q = random.standard_normal((37, 6, 16)).astype(np.float32)
        k = random.standard_normal((37, 2, 16)).astype(np.float32)
        v = random.standard_normal((37, 2, 16)).astype(np.float32)
        whole = llama_numpy.causal_attention(q, k, v)
        for rows in (1, 5, 36):
            with mock.patch.object(llama_numpy, "SCORE_BYTES", rows * 4 * 3 * 37):
                self.assert_close(llama_numpy.causal_attention(q, k, v), whole, FP32_TOLERANCE)

    def test_silu_of_large_negative_numbers(self) -> None:
        with np.errstate(all="raise", under="ignore"):
            result = llama_numpy.silu(np.array([-1000.0, 0.0, 1000.0], dtype=np.float32))
        np.testing.assert_array_equal(result, [0.0, 0.0, 1000.0])


class TrainSaapTest(CaptureTestCase):
    """Queries of 4 kinds, keys of 4 kinds: kind c attends to kind c, but lies closest to another."""

    TOKENS = 1600

    def write_trace(self, first_query: int = 0) -> Path:
        random = np.random.default_rng(0)
        info = replace(INFO, num_query_heads=1, num_kv_heads=1, head_dim=16, rope_applied=True)
        kinds = random.integers(0, 4, self.TOKENS)
        # Channel c marks kind c, channel 4 + c says which kind of query it answers: weakly, so
        # that it hardly turns the key, but queries look for it with all their length.
        keys = 0.1 * random.standard_normal((self.TOKENS, 16))
        keys[np.arange(self.TOKENS), kinds] += 10
        keys[np.arange(self.TOKENS), 4 + kinds] += 1
        queries = 0.1 * random.standard_normal((self.TOKENS, 16))
        asked = random.integers(0, 4, self.TOKENS)
        queries[np.arange(self.TOKENS), 4 + asked] += 40
        k, q = keys[:, None].astype(np.float16), queries[:, None].astype(np.float16)
        path = self.folder / "train.h5"
        tokens = np.zeros(self.TOKENS, np.int32)
        with TraceWriter(path, info, tokens, "fp16") as writer:
            writer.add_layer(2, LayerTrace(k, k, q[first_query:], first_query))
        return path

    def train(self, trace: Path, *more: str) -> int:
        command = ["--trace", str(trace), "--out", str(self.out), "--clusters", "4", "--hidden", "32",
                   "--distance", "256", "--visited", "1", "--rope", "kept", *more]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = train_saap.main(command)
        self.printed = printed.getvalue()
        return code

    def test_learns_where_attention_goes(self) -> None:
        self.assertEqual(self.train(self.write_trace(), "--epochs", "30"), 0)
        data = self.out.read_bytes()
        self.assertEqual(data[:8], b"SIKVSAP1")
        header = np.frombuffer(data, "<u4", 8, 8)
        self.assertEqual(header.tolist(), [1, 1, 1, 16, 4, 32, 0, 0])
        floats = np.frombuffer(data, "<f4", offset=40)
        self.assertEqual(len(floats), 4 * 16 + 16 * 32 + 32 + 32 * 4 + 4)
        self.assert_close(np.linalg.norm(floats[:64].reshape(4, 16), axis=1), np.ones(4), 1e-5)
        self.assertGreater(float(self.printed.split(" by networks")[0].split()[-1]), 0.95)

    def test_refuses_a_trace_without_queries_of_all_positions(self) -> None:
        trace = self.write_trace(first_query=1000)
        with contextlib.redirect_stderr(io.StringIO()) as error:
            self.assertEqual(self.train(trace), 2)
        self.assertIn("layer 2 has queries from position 1000 on; capture the trace with --queries all",
                      error.getvalue())
        self.assertFalse(self.out.exists())

    def test_undoing_rope_makes_products_depend_on_content_alone(self) -> None:
        random = np.random.default_rng(1)
        x = random.standard_normal(8).astype(np.float32)
        positions = np.arange(50)
        for rope in ("half", "interleaved"):
            turned = train_saap.undo_rope(np.tile(x, (50, 1)), -positions, INFO, rope)
            self.assertGreater(np.abs(turned - x).max(), 0.1)
            self.assert_close(train_saap.undo_rope(turned, positions, INFO, rope), np.tile(x, (50, 1)), 1e-5)


@skip_without(MISSING_FOR_GGUF)
class GgufTest(CaptureTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.model = self.folder / "model.gguf"
        self.weights = tiny_model.tensors()
        self.fields = tiny_model.fields()

    def write_model(self, **options) -> None:
        tiny_model.write_gguf(self.model, self.weights, self.fields, **options)

    def capture(self, *options: str) -> str:
        """Run the command on the tiny model; returns what it prints."""
        arguments = ["--model", str(self.model), "--text", str(self.text), "--out", str(self.out)]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.assertEqual(capture_gguf([*arguments, *options]), 0)
        return printed.getvalue()

    def assert_matches_reference(self) -> None:
        """The trace at self.out holds what the fp64 reference computes."""
        trace = read_trace(self.out)
        layers, _ = tiny_model.reference_forward(self.weights, trace.tokens)
        for index, layer in trace.layers.items():
            self.assert_close(layer.k, layers[index].k, FP32_TOLERANCE)
            self.assert_close(layer.v, layers[index].v, FP32_TOLERANCE)
            self.assert_close(
                layer.q, layers[index].q[layer.first_query_position :], FP32_TOLERANCE
            )

    def test_matches_the_reference(self) -> None:
        self.write_model()
        self.capture("--tokens", "29", "--queries", "all", "--dtype", "fp32")
        self.assert_matches_reference()

    def test_frequency_factors(self) -> None:
        factors = np.linspace(1, 8, tiny_model.HEAD_DIM // 2, dtype=np.float32)
        self.weights["rope_freqs.weight"] = factors
        self.write_model()
        self.capture("--tokens", "29", "--queries", "all", "--dtype", "fp32")
        self.assert_matches_reference()

    def test_quantised_weights(self) -> None:
        """The reference gets the dequantised weights, so the tolerance stays that of fp32."""
        names = ("token_embd.weight", "blk.1.attn_q.weight", "blk.1.ffn_down.weight")
        self.write_model(quantised=names)
        file = GgufFile(self.model)
        self.weights |= {name: file.tensor(name) for name in names}
        self.capture("--tokens", "29", "--queries", "all", "--dtype", "fp32")
        self.assert_matches_reference()

    def test_selection_and_attributes(self) -> None:
        self.write_model()
        self.capture(
            *("--tokens", "20", "--first-token", "3", "--layers", "0,2", "--queries", "4", "--w-o")
        )
        trace = read_trace(self.out)
        expected_tokens = GgufTokenizer(GgufFile(self.model)).encode(TEXT)[3:23]
        np.testing.assert_array_equal(trace.tokens, expected_tokens)
        self.assertEqual(
            trace.info,
            TraceInfo(
                model="model",
                num_layers=tiny_model.LAYERS,
                num_query_heads=tiny_model.QUERY_HEADS,
                num_kv_heads=tiny_model.KV_HEADS,
                head_dim=tiny_model.HEAD_DIM,
                rope_theta=tiny_model.THETA,
                rope_layout="half",
                rope_applied=True,
                text="text.txt, tokens 3..22",
                license="weights test-license; text unknown",
                tokenizer="smollm",
            ),
        )
        self.assertEqual(list(trace.layers), [0, 2])
        for index, layer in trace.layers.items():
            self.assertEqual(layer.k.dtype, np.float16)
            self.assertEqual(layer.q.shape, (4, tiny_model.QUERY_HEADS, tiny_model.HEAD_DIM))
            self.assertEqual(layer.first_query_position, 16)
            w_o = self.weights[f"blk.{index}.attn_output.weight"].T
            np.testing.assert_array_equal(layer.w_o, w_o.astype(np.float16))

    def test_labels(self) -> None:
        self.write_model()
        self.capture(
            *("--tokens", "4", "--queries", "1"),
            *("--model-name", "M", "--text-name", "T", "--license", "L"),
        )
        info = read_trace(self.out).info
        self.assertEqual((info.model, info.text, info.license), ("M", "T, tokens 0..3", "L"))

    def test_perplexity(self) -> None:
        self.weights["output.weight"] = tiny_model.tensors(seed=2)["token_embd.weight"]
        for untied in (True, False):
            with self.subTest(untied=untied):
                if not untied:
                    del self.weights["output.weight"]
                self.write_model()
                printed = self.capture("--tokens", "29", "--queries", "all", "--perplexity", "10")
                tokens = read_trace(self.out).tokens
                _, log_probabilities = tiny_model.reference_forward(self.weights, tokens)
                scored = [log_probabilities[p - 1, tokens[p]] for p in range(19, 29)]
                wanted = np.exp(-np.mean(scored))
                self.assertAlmostEqual(float(printed.split()[1]), wanted, delta=1e-3 * wanted)

    def test_begin_of_sequence_token(self) -> None:
        self.fields["tokenizer.ggml.add_bos_token"] = True
        self.write_model()
        self.capture("--tokens", "20", "--first-token", "5", "--queries", "all")
        trace = read_trace(self.out)
        text_tokens = GgufTokenizer(GgufFile(self.model)).encode(TEXT)
        np.testing.assert_array_equal(trace.tokens, [tiny_model.BOS, *text_tokens[5:24]])
        self.assertEqual(trace.info.text, "text.txt, tokens 5..23")

    def test_bad_models_are_refused(self) -> None:
        def without_field(key: str):
            return lambda: self.fields.pop(key)

        def with_field(key: str, value):
            return lambda: self.fields.update({key: value})

        def without_tensor(name: str):
            return lambda: self.weights.pop(name)

        def with_tensor(name: str, shape: tuple[int, ...]):
            return lambda: self.weights.update({name: np.zeros(shape, dtype=np.float32)})

        for damage, sentence in (
            (without_field("llama.block_count"), "lacks the GGUF field llama.block_count"),
            (with_field("llama.attention.head_count_kv", [2, 2, 1]), "vary by layer"),
            (with_field("llama.rope.dimension_count", 6), "6 of 12 channels are rotated"),
            (with_field("llama.rope.scaling.type", "longrope"), 'RoPE scaling of type "longrope"'),
            (with_field("tokenizer.ggml.model", "llama"), 'tokenizer of type "llama"'),
            (with_field("tokenizer.ggml.pre", "new"), 'pre-tokenizer "new" is not supported'),
            (without_tensor("blk.2.ffn_up.weight"), "lacks the tensor blk.2.ffn_up.weight"),
            (without_tensor("token_embd.weight"), "lacks the tensor token_embd.weight"),
            (with_tensor("blk.0.ffn_up.bias", (64,)), "blk.0.ffn_up.bias is not part of a plain"),
            (with_tensor("blk.1.attn_k.weight", (24, 31)), "has shape (24, 31), expected (24, 32)"),
        ):
            with self.subTest(sentence):
                self.weights, self.fields = tiny_model.tensors(), tiny_model.fields()
                damage()
                self.write_model()
                self.assert_refused(sentence, self.capture, "--tokens", "8", "--queries", "1")

        self.write_model(architecture="gemma")
        self.assert_refused('architecture "gemma"; supported are llama', self.capture)

    def test_damaged_files_are_refused(self) -> None:
        self.assert_refused("model.gguf: no such file", self.capture)
        self.write_model()
        content = self.model.read_bytes()
        for size in (0, 3, 30, 2000, len(content) - 100):
            with self.subTest(size=size):
                self.model.write_bytes(content[:size])
                self.assert_refused("is not a readable GGUF file", self.capture)
        self.model.write_bytes(b"PK" + content)
        self.assert_refused("is not a readable GGUF file", self.capture)

    def test_bad_requests_are_refused(self) -> None:
        self.write_model()
        for options, sentence in (
            (["--tokens", "65"], "--tokens 65 exceeds the model's context of 64"),
            (["--tokens", "64", "--first-token", "900"], "--first-token 900 and --tokens 64 need"),
            (["--tokens", "9", "--layers", "3"], "layer 3 is out of range"),
            (["--tokens", "9", "--queries", "10"], 'must be "all" or 1..9'),
            (["--tokens", "9", "--queries", "1", "--perplexity", "9"], "less than --tokens 9"),
        ):
            with self.subTest(sentence):
                self.assert_refused(sentence, self.capture, *options)
        self.text.write_bytes(b"good \xff bad")
        self.assert_refused("text.txt is not UTF-8 text (byte 5)", self.capture)
        self.text.unlink()
        self.assert_refused("text.txt: No such file", self.capture)

    def test_exit_codes(self) -> None:
        def exit_code(*arguments: str) -> int:
            with (
                mock.patch("sys.argv", ["capture_gguf.py", *arguments]),
                self.assertRaises(SystemExit) as left,
            ):
                cli.run_command(capture_gguf)
            return left.exception.code

        self.write_model()
        good = ["--model", str(self.model), "--text", str(self.text), "--tokens", "3"]
        good += ["--queries", "all", "--out", str(self.out)]
        self.assertEqual(exit_code(*good), 0)
        self.assertEqual(exit_code(*good, "--layers", "7"), 2)
        self.assertEqual(exit_code(*good, "--tokens", "0"), 2)
        self.assertEqual(exit_code("--model", str(self.model), "--text", str(self.text)), 2)


@skip_without(MISSING_FOR_GGUF)
class TokenizerTest(CaptureTestCase):
    def pieces(self, text: str, pre: str) -> list[str]:
        path = self.folder / "model.gguf"
        fields = tiny_model.fields() | {"tokenizer.ggml.pre": pre}
        tiny_model.write_gguf(path, tiny_model.tensors(), fields)
        return [tiny_model.VOCABULARY[i] for i in GgufTokenizer(GgufFile(path)).encode(text)]

    def test_merges_and_word_rules(self) -> None:
        # The merge "1 2" tells the rules apart: SmolLM cuts numbers into digits before merging.
        self.assertEqual(self.pieces("the 12 the", "smollm"), ["the", "Ġ", "1", "2", "Ġthe"])
        self.assertEqual(self.pieces("the 12 the", "gpt-2"), ["the", "Ġ", "12", "Ġthe"])
        self.assertEqual(
            self.pieces("1212", "llama-bpe"), ["12", "1", "2"]
        )  # groups of three digits

    def test_special_names_are_ordinary_text(self) -> None:
        self.assertEqual("".join(self.pieces("<bos>", "smollm")), "<bos>")
        self.assertNotIn("<bos>", self.pieces("<bos>", "smollm"))

    def test_llama3_starts_with_bos(self) -> None:
        path = self.folder / "model.gguf"
        fields = tiny_model.fields() | {"tokenizer.ggml.pre": "llama-bpe"}
        tiny_model.write_gguf(path, tiny_model.tensors(), fields)
        self.assertEqual(GgufTokenizer(GgufFile(path)).bos_token, tiny_model.BOS)


@skip_without(MISSING_FOR_TRANSFORMERS)
class TransformersTest(CaptureTestCase):
    TOKENS = 45

    def config(self, family: str, **changes):
        values = {
            "vocab_size": 300,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "initializer_range": 0.3,
        }
        return transformers.AutoConfig.for_model(family, **(values | changes))

    def model(self, config):
        torch.manual_seed(11)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Biases start as zeros and norms as ones, which would hide a mistake with them.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model.eval()

    def tokens(self) -> np.ndarray:
        return np.random.default_rng(5).integers(0, 300, self.TOKENS, dtype=np.int32)

    def capture(self, model, chunk: int, first_query: int = 0) -> list[LayerTrace]:
        layers = list(range(model.config.num_hidden_layers))
        captured = transformers_hook.capture_layers(
            model, self.tokens(), layers, first_query, with_w_o=True, chunk=chunk
        )
        return [trace for _, trace in captured]

    def test_llama_matches_the_numpy_forward(self) -> None:
        model = self.model(self.config("llama"))
        expected: list[llama_numpy.LayerTensors] = []
        hidden = llama_numpy.forward(
            StateDictModel(model), self.tokens(), 3, lambda _, tensors: expected.append(tensors)
        )
        ids = torch.from_numpy(self.tokens().astype(np.int64))[None]
        with torch.inference_mode():
            loss = model(ids, labels=ids).loss
        perplexity = llama_numpy.perplexity(
            StateDictModel(model), hidden, self.tokens(), self.TOKENS - 1
        )
        self.assertAlmostEqual(np.log(perplexity), float(loss), places=4)

        for chunk in (1, 16, self.TOKENS):
            for layer, trace in enumerate(self.capture(model, chunk, first_query=20)):
                with self.subTest(chunk=chunk, layer=layer):
                    self.assert_close(trace.k, expected[layer].k, FP32_TOLERANCE)
                    self.assert_close(trace.v, expected[layer].v, FP32_TOLERANCE)
                    self.assert_close(trace.q, expected[layer].q[20:], FP32_TOLERANCE)
                    np.testing.assert_array_equal(trace.w_o, expected[layer].w_o)

    def test_all_families(self) -> None:
        """Attention recomputed from the trace must be what the model feeds to its output matrix."""
        for family in transformers_hook.FAMILIES:
            with self.subTest(family):
                model = self.model(self.config(family))
                outputs: list[np.ndarray] = []

                def keep_input(_, inputs, outputs=outputs) -> None:
                    outputs.append(inputs[0][0].numpy())

                for layer in model.base_model.layers:
                    layer.self_attn.o_proj.register_forward_pre_hook(keep_input)
                for trace, output in zip(self.capture(model, self.TOKENS), outputs, strict=True):
                    attention = llama_numpy.causal_attention(trace.q, trace.k, trace.v)
                    self.assert_close(attention.reshape(self.TOKENS, -1), output, FP32_TOLERANCE)

    def test_sliding_window_keeps_all_keys(self) -> None:
        """Short chunks make the cache drop old keys; the trace must not notice."""
        model = self.model(self.config("mistral", sliding_window=8))
        for whole, parts in zip(
            self.capture(model, self.TOKENS), self.capture(model, 4), strict=True
        ):
            self.assert_close(parts.k, whole.k, FP32_TOLERANCE)
            self.assert_close(parts.q, whole.q, FP32_TOLERANCE)

    def test_unknown_family_is_refused(self) -> None:
        self.assert_refused('"gpt2" is not supported', transformers_hook.check_family, "gpt2")

    def test_command(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>"])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        saved = self.folder / "saved"
        self.model(self.config("qwen3")).save_pretrained(saved)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
        tokenizer.save_pretrained(saved)

        arguments = ["--model", str(saved), "--text", str(self.text), "--out", str(self.out)]
        self.assertEqual(
            capture_transformers([*arguments, "--tokens", "40", "--layers", "1", "--queries", "7"]),
            0,
        )
        trace = read_trace(self.out)
        self.assertEqual((trace.info.model, trace.info.rope_theta), ("saved", 1000.0))
        self.assertEqual(trace.layers[1].k.shape, (40, 2, 16))
        self.assertEqual(trace.layers[1].q.shape, (7, 6, 16))
        decoded = "".join(alphabet[i] for i in trace.tokens).replace("Ġ", " ")
        self.assertEqual(decoded, TEXT[:40])

        self.out.unlink()
        for options, sentence in (
            (["--tokens", "65"], "exceeds the model's context of 64"),
            (["--tokens", "9", "--layers", "3"], "layer 3 is out of range"),
            (["--model", str(self.folder / "none")], "cannot load"),
        ):
            with self.subTest(sentence):
                self.assert_refused(sentence, capture_transformers, [*arguments, *options])


class StateDictModel:
    """A transformers Llama as a LlamaModel; its matrices are in half-rotation order already."""

    def __init__(self, model) -> None:
        self._weights = {name: w.numpy() for name, w in model.state_dict().items()}
        config = model.config
        self.config = llama_numpy.LlamaConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_query_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_parameters["rope_theta"],
            rms_eps=config.rms_norm_eps,
        )

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self._weights["model.embed_tokens.weight"][tokens]

    def layer(self, index: int) -> llama_numpy.LayerWeights:
        names = {
            "attn_norm": "input_layernorm",
            "wq": "self_attn.q_proj",
            "wk": "self_attn.k_proj",
            "wv": "self_attn.v_proj",
            "wo": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "w_gate": "mlp.gate_proj",
            "w_up": "mlp.up_proj",
            "w_down": "mlp.down_proj",
        }
        return llama_numpy.LayerWeights(
            **{
                ours: self._weights[f"model.layers.{index}.{theirs}.weight"]
                for ours, theirs in names.items()
            }
        )

    def final_norm(self) -> np.ndarray:
        return self._weights["model.norm.weight"]

    def unembedding(self) -> np.ndarray:
        return self._weights["lm_head.weight"]


if __name__ == "__main__":
    unittest.main()
