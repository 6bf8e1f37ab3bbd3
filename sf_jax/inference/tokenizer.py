"""Converts prompts to the text encoder's tokens.

Source: official `HuggingfaceTokenizer` with `clean='whitespace'` (wan/modules/tokenizers.py), using only the
`tokenizers` library.
"""

import base64
import contextlib
import dataclasses
import html
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers

from sf_jax import strict_json
from sf_jax.inference import sentencepiece
from sf_jax.messages import quoted, shortened

# Possible places of the tokenizer: its own folder, the official model folder, a diffusers model folder.
FOLDERS = ("", "google/umt5-xxl", "tokenizer")
# Supported files; the first that exists is read.
NAMES = ("tokenizer.json", "spiece.model")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
PAD, END = ("<pad>", 0), ("</s>", 1)
# UMT5's tokens have at most 16 characters, so text beyond this would exceed the token limit anyway.
_CHARACTERS_PER_TOKEN = 128
_MAX_BYTES = 256 << 20  # of tokenizer.json; UMT5's has 17 MB
_MAX_GROWTH = 256  # limit on the factor by which a tokenizer's steps lengthen a text; UMT5's is at most 66
_MAX_STEPS = 64
# Varied texts: a tokenizer that fails on one of them is damaged.
_TRIAL = ("", "a cat", "\u00e9\u732b \U0001f408\u200b\ufffd", "a" * 300 + "!", " a" * 300, "\t\x00 \n")


def clean_text(prompt: str) -> str:
    """Cleans a prompt for the tokenizer: repairs broken Unicode, unescapes HTML entities, collapses white space."""
    import ftfy  # imported here, as the moving digits do not need it

    # Twice, because entities are often escaped themselves: "&amp;lt;".
    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", unescaped).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Converts prompts to tokens.

    Attributes:
      backend: the tokenizer of the `tokenizers` library, which pads and truncates to `length`.
      length: tokens per prompt.
    """

    backend: tokenizers.Tokenizer
    length: int = 512

    @property
    def vocab(self) -> int:
        """Highest token id plus one; the encoder's embedding must have at least as many rows."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes prompts.

        Args:
          prompts: B prompts; the empty one is the unconditional input.

        Returns:
          ids int32 [B, length]: the text, truncated if too long, then `</s>`, then `<pad>`; mask int32 [B, length]: 1
          up to and including `</s>`, then 0.

        Raises:
          ValueError: if `prompts` is not a sequence of strings, or the tokenizer fails on one.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts: got the single string {quoted(prompts)}, allowed: a sequence of strings")
        ids, mask = np.zeros((2, len(prompts), self.length), np.int32)
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompts[{row}]: got {type(prompt).__name__}, allowed: a string")
            # Truncated first, as tokenizing megabytes of text takes minutes.
            prompt = prompt.lstrip()[: _CHARACTERS_PER_TOKEN * self.length]
            with _in_one_line(f"prompts[{row}]: the tokenizer cannot take {quoted(prompt)}"):
                encoding = self.backend.encode(clean_text(prompt))
                ids[row], mask[row] = encoding.ids, encoding.attention_mask
        return ids, mask


def find_file(place: str | pathlib.Path) -> pathlib.Path:
    """Finds the file of a tokenizer.

    Args:
      place: the tokenizer's folder, or the model folder that has it as `google/umt5-xxl` or `tokenizer`; or its file: a
        `tokenizer.json`, a SentencePiece model, or weights that contain one.

    Raises:
      ValueError: if there is none.
    """
    place = pathlib.Path(place)
    if place.is_file() and (place.suffix in (".json", ".model") or _is_weights(place)):
        return place
    paths = (place / part / name for name in NAMES for part in FOLDERS)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(_missing(place))
    return path


def load_tokenizer(folder: str | pathlib.Path, length: int = 512) -> Tokenizer:
    """Loads `tokenizer.json`, or a SentencePiece model.

    Both give the same tokens, except for characters that no token contains. A model with `byte_fallback` converts these
    to bytes, as SentencePiece and thus ComfyUI do; a `tokenizer.json` does so only if it is configured to.

    Args:
      folder: its location, see `find_file`.
      length: tokens per prompt, including `</s>`; Wan2.1 was trained with 512.

    Raises:
      ValueError: if there is no such file, it is damaged, or it is the tokenizer of another model.
    """
    if length < 1:
        raise ValueError(f"length is {length}: it must be at least 1")
    path = find_file(folder)
    if not _is_weights(path) and path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: a tokenizer of at most {_MAX_BYTES} bytes is read")
    model = _read_model(path)
    with _in_one_line(f"{path} is no readable tokenizer", ": download the file again"), _without_panics():
        if model is None:
            _check_growth(strict_json.read(path, max_bytes=_MAX_BYTES, finite=False))
        if model is None:
            backend = tokenizers.Tokenizer.from_file(str(path))
        else:
            backend = sentencepiece.build_tokenizer(model)
        backend.enable_truncation(max_length=length)
        backend.enable_padding(length=length, pad_id=PAD[1], pad_token=PAD[0])
        numbers = {token: backend.token_to_id(token) for token, _ in (PAD, END)}
        trials = [backend.encode(text).ids for text in _TRIAL]
        np.asarray(trials, np.int32)  # raises OverflowError if a token id exceeds int32
        ends = backend.num_special_tokens_to_add(False) == 1 and trials[0][0] == END[1]
    for token, expected in (PAD, END):
        if numbers[token] != expected:
            raise ValueError(
                f"{path} is not the tokenizer of UMT5: {token} is {numbers[token]}, must be {expected}; take "
                "google/umt5-xxl's"
            )
    if not ends:
        raise ValueError(
            f"{path} is not the tokenizer of UMT5: it does not end a text with </s>; take google/umt5-xxl's"
        )
    return Tokenizer(backend, length)


def _is_weights(path):
    return path.name.endswith(_WEIGHTS) or ".index." in path.name


def _read_model(path):
    """The SentencePiece model of a file; None for a tokenizer.json."""
    if _is_weights(path):
        return sentencepiece.parse_model(sentencepiece.read_tensor(path), f"spiece_model of {path}")
    if path.suffix == ".json":
        return None
    try:
        return sentencepiece.parse_model(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


def _check_growth(stored: dict) -> None:
    """Rejects a tokenizer.json that makes short texts very long, as the library would run out of memory and abort.

    Raises:
      ValueError: its steps could make a text more than `_MAX_GROWTH` times longer, or are too many.
    """
    steps = [step for part in ("normalizer", "pre_tokenizer", "post_processor") for step in _steps(stored.get(part))]
    if len(steps) > _MAX_STEPS:
        raise ValueError(f"it has {len(steps)} steps, at most {_MAX_STEPS} are taken")
    start = length = _CHARACTERS_PER_TOKEN * 512
    for step in steps:
        length = _longest(step, length)
        if length > _MAX_GROWTH * start:
            raise ValueError(f"its steps make texts more than {_MAX_GROWTH} times longer, at {step.get('type')}")


def _steps(part) -> Iterator[dict]:
    """Yields the steps of a part of a tokenizer, including those of nested sequences."""
    if not isinstance(part, dict):
        return
    nested = [part[key] for key in ("normalizers", "pretokenizers", "processors") if isinstance(part.get(key), list)]
    if not nested:
        yield part
    for steps in nested:
        for step in steps:
            yield from _steps(step)


def _longest(step: dict, length: int) -> int:
    """The maximum length of a step's output for `length` characters; the library reports invalid steps."""
    kind = step.get("type")
    if kind == "Replace":
        pattern, content = step.get("pattern"), str(step.get("content"))
        text = pattern.get("String") if isinstance(pattern, dict) else pattern
        if isinstance(text, str) and text:
            return max(length, -(-length // len(text)) * len(content))
        return length * (1 + len(content))  # a regular expression may match between all characters
    if kind == "Prepend":
        return length + len(str(step.get("prepend")))
    if kind == "ByteLevel":
        return 4 * length  # one character per byte
    if kind == "Precompiled":
        charsmap = base64.b64decode(str(step.get("precompiled_charsmap")))
        texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]  # after a search tree of so many bytes
        return length * max(1, *map(len, texts.decode(errors="replace").split("\0")))
    if kind == "TemplateProcessing" and isinstance(step.get("single"), list):
        return length * max(1, sum("Sequence" in piece for piece in step["single"] if isinstance(piece, dict)))
    return length


@contextlib.contextmanager
def _in_one_line(what: str, advice: str = "") -> Iterator[None]:
    """Converts everything that the library raises to ValueError: any exception, and Rust's panics."""
    try:
        yield
    except BaseException as error:
        # Panics are not Exceptions, and their class cannot be imported; Ctrl-C must pass.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({shortened(str(error), 120) or type(error).__name__}){advice}") from error


@contextlib.contextmanager
def _without_panics() -> Iterator[None]:
    """Hides what Rust prints for a panic; only for a program's start, when no other thread prints."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _missing(place):
    """The reason why there is no tokenizer, and what to do."""
    if place.is_file():
        return (
            f"{place} is no tokenizer: allowed are tokenizer.json, spiece.model and weights that hold the latter; take "
            "google/umt5-xxl/tokenizer.json of the model"
        )
    if not place.is_dir():
        return f"{place} is no folder: give the model folder that holds google/umt5-xxl/tokenizer.json"
    looked = ", ".join(str(pathlib.PurePosixPath(part) / name) for part in FOLDERS for name in NAMES)
    return f"{place} has no tokenizer.json (looked for {looked}): download google/umt5-xxl/tokenizer.json of the model"
