"""What the two capture commands share: options, the choice of tokens and layers, errors, progress.

A command is a function main(arguments) that raises CaptureError for what the caller can put
right. `run_command` prints such an error as one sentence and exits with 2, the code argparse uses
for a bad option, so scripts need to know one code only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_file import CaptureError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run main(arguments) and leave the process with its exit code."""
    try:
        code = main(sys.argv[1:])
    except CaptureError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        code = EXIT_ERROR
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide what a trace holds, whichever engine makes it."""
    text = parser.add_argument_group("text")
    text.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain text, UTF-8")
    text.add_argument(
        "--tokens",
        type=positive_int,
        default=4096,
        metavar="N",
        help="tokens to run (default: 4096)",
    )
    text.add_argument(
        "--first-token",
        type=_not_negative_int,
        default=0,
        metavar="N",
        help="skip this many tokens of the text; the first one kept gets position 0 (default: 0)",
    )

    content = parser.add_argument_group("content of the trace")
    content.add_argument(
        "--layers",
        default="all",
        metavar="LIST",
        help='layers to keep: "all", or numbers and ranges such as 0,5,10-12 (default: all)',
    )
    content.add_argument(
        "--queries",
        default="160",
        metavar="N",
        help='keep the queries of the last N positions, or of "all" (default: 160)',
    )
    content.add_argument(
        "--w-o", action="store_true", help="also keep each layer's attention output matrix"
    )
    content.add_argument(
        "--dtype", choices=("fp16", "fp32"), default="fp16", help="element type (default: fp16)"
    )
    content.add_argument("--out", type=Path, metavar="FILE", help="trace to write (HDF5)")

    labels = parser.add_argument_group("labels (root attributes of the trace)")
    labels.add_argument("--model-name", metavar="TEXT", help="default: the model's file name")
    labels.add_argument("--text-name", metavar="TEXT", help="default: the text's file name")
    labels.add_argument(
        "--license", metavar="TEXT", help="of weights and text; default: what the model file says"
    )


@dataclass(frozen=True)
class Selection:
    """Which tokens run and what of them is kept."""

    tokens: np.ndarray  # [T] int32, fed to the model at positions 0 .. T-1
    layers: list[int]  # ascending
    first_query_position: int  # queries kept: positions first_query_position .. T-1
    text_label: str  # which tokens of which text


def select(
    options: argparse.Namespace,
    token_ids: np.ndarray,
    num_layers: int,
    context_length: int,
    bos_token: int | None,
) -> Selection:
    """Apply --tokens, --first-token, --layers and --queries.

    token_ids [n] int32 is the whole text. A model that was trained with a begin-of-sequence token
    gets one at position 0 also in the middle of a text, because such models park attention there;
    it counts as one of --tokens.
    """
    if options.tokens > context_length:
        raise CaptureError(
            f"--tokens {options.tokens} exceeds the model's context of {context_length} tokens"
        )
    prefix = [] if bos_token is None else [bos_token]
    end = options.first_token + options.tokens - len(prefix)
    if end > len(token_ids):
        raise CaptureError(
            f"{options.text} has {len(token_ids)} tokens, but --first-token {options.first_token} "
            f"and --tokens {options.tokens} need {end}"
        )
    tokens = np.concatenate([prefix, token_ids[options.first_token : end]]).astype(np.int32)
    return Selection(
        tokens=tokens,
        layers=parse_layers(options.layers, num_layers),
        first_query_position=len(tokens) - parse_queries(options.queries, len(tokens)),
        text_label=f"{options.text_name or options.text.name}, "
        f"tokens {options.first_token}..{end - 1}",
    )


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Layers named by "all" or by numbers and ranges such as "0,5,10-12", ascending."""
    if text == "all":
        return list(range(num_layers))
    layers: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        try:
            chosen = range(int(first), int(last or first) + 1)
        except ValueError:
            chosen = range(0)
        if not chosen:
            raise CaptureError(
                f'--layers {text}: "{item}" is neither a layer number nor a range such as 10-12'
            )
        if chosen[-1] >= num_layers:
            raise CaptureError(
                f"--layers {text}: layer {chosen[-1]} is out of range, "
                f"the model has layers 0..{num_layers - 1}"
            )
        layers.update(chosen)
    return sorted(layers)


def parse_queries(text: str, num_tokens: int) -> int:
    """How many of the last positions keep their queries: "all" or 1 .. num_tokens."""
    if text == "all":
        return num_tokens
    if not text.isdecimal() or not 1 <= int(text) <= num_tokens:
        raise CaptureError(f'--queries {text}: must be "all" or 1..{num_tokens}')
    return int(text)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CaptureError(f"{path} is not UTF-8 text (byte {error.start})") from error


class Progress:
    """A counter on stderr: rewritten in place on a terminal, a line every 10 s in a log."""

    LOG_INTERVAL_S = 10.0

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._start = self._last = time.monotonic()

    def step(self) -> None:
        """Count one more of `total` as done."""
        self._done += 1
        now = time.monotonic()
        finished = self._done == self._total
        if sys.stderr.isatty():
            end = "\n" if finished else ""
            lead = "\r"
        elif finished or now - self._last >= self.LOG_INTERVAL_S:
            end, lead = "\n", ""
        else:
            return
        self._last = now
        line = f"{lead}{self._label} {self._done}/{self._total}, {now - self._start:.0f} s"
        print(line, end=end, file=sys.stderr, flush=True)


def _not_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value
