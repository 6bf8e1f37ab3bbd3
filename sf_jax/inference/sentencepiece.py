"""Tokenizers from SentencePiece models: `spiece.model`, or the same bytes as a tensor in ComfyUI's text encoders.

The file is a protobuf message; format: sentencepiece_model.proto of google/sentencepiece. Only the features of UMT5's
model are supported. Source of the conversion to the `tokenizers` library: T5Converter of Hugging Face transformers
(convert_slow_tokenizer.py).
"""

import dataclasses
import math
import pathlib
import re
import struct
from collections.abc import Iterator

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from sf_jax.messages import quoted
from sf_jax.weights.files import open_tensors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_BYTES = 16 << 20  # UMT5's model has 4.5 MB
_MAX_PIECES, _MAX_MARKS = 500_000, 10_000  # the latter for control symbols and user-defined pieces
_MAX_CHARACTERS = 128  # per piece; prompts are cut to as many characters per token
_MAX_EXPANSION = 256  # limit for the bytes that replace one character; Unicode's NFKC needs at most 33
_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
_ADVICE = "take google/umt5-xxl's spiece.model"
# UMT5 has 300 tokens after its pieces that are not in the model file; the last comes first.
_UMT5_PIECES, _UMT5_EXTRA = 256_000, 300
_TENSOR = re.compile(r"(^|\.)spiece_model$")
# Protobuf wire types.
_VARINT, _EIGHT, _SIZED, _FOUR = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a model that determine the tokens.

    Attributes:
      pieces: text and log probability of each token.
      types: type of each piece: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE.
      byte_fallback: whether text that no piece matches becomes its bytes; otherwise the unknown token.
      charsmap: the compiled character map, mostly NFKC; empty for none.
      dummy_prefix: whether to put a space before the text.
      single_spaces: whether to remove leading, trailing and repeated spaces.
    """

    pieces: tuple[tuple[str, float], ...]
    types: tuple[int, ...]
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    single_spaces: bool


def parse_model(data: bytes, title: str) -> SentencePieceModel:
    """Parses a serialized `ModelProto`.

    Args:
      data: the message.
      title: name of the file in error messages.

    Raises:
      ValueError: if it is damaged, or a model of another kind than UMT5's.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{title} has {len(data)} bytes: a SentencePiece model of at most {MAX_BYTES} bytes is read")
    try:
        pieces, types, specs = _read_message(memoryview(data))
        trainer, normalizer = (dict(_read_spec(spec, kinds)) for spec, kinds in zip(specs, _SPECS, strict=True))
        _check_pieces(pieces, types)
        charsmap = normalizer.get(2, b"")
        _check_charsmap(charsmap)
    except ValueError as error:
        raise ValueError(f"{title} is no readable SentencePiece model ({error}): {_ADVICE}") from error
    kind = trainer.get(3, 1)
    if kind != 1:
        kind = _TYPES.get(kind, kind)
        raise ValueError(f"{title} is a SentencePiece model of type {kind}, allowed: UNIGRAM; {_ADVICE}")
    for fault, what in ((trainer.get(24, 0), "spaces behind words"), (not normalizer.get(5, 1), "plain spaces")):
        if fault:
            raise ValueError(f"{title} is a SentencePiece model with {what}, which is not read: {_ADVICE}")
    model = SentencePieceModel(
        tuple(pieces),
        tuple(types),
        bool(trainer.get(35, 0)),
        charsmap,
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )
    if model.byte_fallback:
        stored = {text for (text, _), type_ in zip(pieces, types, strict=True) if type_ == BYTE}
        missing = [name for byte in range(256) if (name := f"<0x{byte:02X}>") not in stored]
        if missing:
            raise ValueError(
                f"{title} has byte_fallback but no token for {len(missing)} bytes ({missing[0]}): {_ADVICE}"
            )
    return model


def build_tokenizer(model: SentencePieceModel, extra_ids: int | None = None) -> tokenizers.Tokenizer:
    """Builds a tokenizer of the `tokenizers` library, which ends texts with `</s>` as T5's tokenizers do.

    Args:
      model: the model.
      extra_ids: number of tokens `<extra_id_0>` and so on after the pieces; None is 300 for a vocabulary of UMT5's
        size, and 0 for others.
    """
    vocabulary = [text for text, _ in model.pieces]
    unigrams = models.Unigram(list(model.pieces), model.types.index(UNKNOWN), model.byte_fallback)
    tokenizer = tokenizers.Tokenizer(unigrams)
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.single_spaces:
        ends, repeated = tokenizers.Regex(r"\A +| +\z"), tokenizers.Regex(" {2,}")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(repeated, " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme)
    end = vocabulary.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    if extra_ids is None:
        extra_ids = _UMT5_EXTRA if len(vocabulary) == _UMT5_PIECES else 0
    special = [text for text, type_ in zip(vocabulary, model.types, strict=True) if type_ in (UNKNOWN, CONTROL)]
    special += [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    own = [text for text, type_ in zip(vocabulary, model.types, strict=True) if type_ == USER_DEFINED]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in own])
    return tokenizer


def find_tensor(path: str | pathlib.Path) -> pathlib.Path | None:
    """The weight file, if it contains a tokenizer as ComfyUI's text encoders do; else None.

    Args:
      path: weights of a text encoder, or of several networks.

    Raises:
      ValueError: if the file is damaged.
    """
    with open_tensors(path) as tensors:
        return tensors.path if any(_TENSOR.search(name) for name in tensors) else None


def read_tensor(path: str | pathlib.Path) -> bytes:
    """The SentencePiece model in a weight file's tensor `spiece_model`.

    Args:
      path: weights of a text encoder, or of several networks.

    Raises:
      ValueError: if the file is damaged, or has no such tensor or several.
    """
    with open_tensors(path) as tensors:
        names = [name for name in tensors if _TENSOR.search(name)]
        if len(names) != 1:
            fault = f"several tokenizers ({', '.join(names[:4])})" if names else "no tokenizer (no tensor spiece_model)"
            raise ValueError(f"{path} has {fault}: name one, google/umt5-xxl's tokenizer.json or spiece.model")
        shape, dtype = tensors.shapes[names[0]], tensors.dtypes[names[0]]
        if len(shape) != 1 or dtype != np.uint8 or not 0 < shape[0] <= MAX_BYTES:
            raise ValueError(
                f"{path}: {names[0]} is {dtype} {list(shape)}, must be uint8 of one axis and at most {MAX_BYTES} bytes"
            )
        return tensors[names[0]].tobytes()


# Fields of TrainerSpec and NormalizerSpec that affect the tokens, with their wire types.
_SPECS = ({3: _VARINT, 24: _VARINT, 35: _VARINT}, {2: _SIZED, 3: _VARINT, 4: _VARINT, 5: _VARINT})


def _read_message(data: memoryview) -> tuple[list[tuple[str, float]], list[int], tuple[bytes, bytes]]:
    """The pieces, their types, and the messages TrainerSpec and NormalizerSpec."""
    pieces, types = [], []
    specs = {2: [], 3: []}
    for number, kind, value in _fields(data):
        if number in (1, 2, 3) and kind != _SIZED:
            raise ValueError(f"field {number} is no message")
        if number == 1:
            if len(pieces) == _MAX_PIECES:
                raise ValueError(f"it has more than {_MAX_PIECES} pieces")
            text, score, type_ = _read_piece(value, len(pieces))
            pieces.append((text, score))
            types.append(type_)
        elif number in specs:
            specs[number].append(value)
    # Protobuf merges the parts of a message that is split.
    return pieces, types, (b"".join(specs[2]), b"".join(specs[3]))


def _read_piece(data: memoryview, row: int) -> tuple[str, float, int]:
    text, score, type_ = b"", 0.0, NORMAL
    for number, kind, value in _fields(data):
        if number == 1 and kind == _SIZED:
            text = value
        elif number == 2 and kind == _FOUR:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and kind == _VARINT:
            type_ = value
        elif number in (1, 2, 3):
            raise ValueError(f"field {number} of piece {row} has the wrong type")
    # A character has at most 4 bytes.
    if not 0 < len(text) <= 4 * _MAX_CHARACTERS:
        raise ValueError(f"piece {row} has {len(text)} bytes, allowed: 1 to {4 * _MAX_CHARACTERS}")
    try:
        text = str(text, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"piece {row} is no UTF-8") from error
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"piece {row} has {len(text)} characters, at most {_MAX_CHARACTERS} are read")
    if not math.isfinite(score):
        raise ValueError(f"the score of piece {row} is {score}")
    if not NORMAL <= type_ <= BYTE:
        raise ValueError(f"the type of piece {row} is {type_}, allowed: {NORMAL} to {BYTE}")
    return text, score, type_


def _read_spec(data: bytes, kinds: dict[int, int]) -> Iterator[tuple[int, int | bytes]]:
    """Yields the fields in `kinds`; of repeated fields, the last one counts."""
    for number, kind, value in _fields(memoryview(data)):
        if number in kinds:
            if kind != kinds[number]:
                raise ValueError(f"field {number} of its settings has the wrong type")
            yield number, value if kind == _VARINT else bytes(value)


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yields number, wire type and value of a message's fields."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if not number:
            raise ValueError("a field has the number 0")
        if kind == _VARINT:
            value, at = _varint(data, at)
        elif kind in (_EIGHT, _SIZED, _FOUR):
            size, start = (8 if kind == _EIGHT else 4, at) if kind != _SIZED else _varint(data, at)
            at = start + size
            value = data[start:at]
        else:
            raise ValueError(f"field {number} has the wire type {kind}")
        if at > end:
            raise ValueError("it is cut off")
        yield number, kind, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of at most 64 bits, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise ValueError("a number has more than 64 bits")


def _check_pieces(pieces: list[tuple[str, float]], types: list[int]) -> None:
    if not pieces:
        raise ValueError("it has no pieces")
    seen = set()
    for text, _ in pieces:
        if text in seen:
            raise ValueError(f"the piece {quoted(text)} is there twice")
        seen.add(text)
    if types.count(UNKNOWN) != 1:
        raise ValueError(f"{types.count(UNKNOWN)} pieces are the unknown token, must be 1")
    marks = types.count(CONTROL) + types.count(USER_DEFINED)
    if marks > _MAX_MARKS:
        raise ValueError(f"{marks} pieces are control symbols or the user's own, at most {_MAX_MARKS} are read")
    if "</s>" not in seen:
        raise ValueError("it has no token </s>")


def _check_charsmap(charsmap: bytes) -> None:
    """Checks the map's structure: its size, a tree of 32-bit units, then the replacement texts."""
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + size :]
    if len(charsmap) < 8 or size % 4 or not size or 4 + size > len(charsmap):
        raise ValueError("its map of characters is damaged")
    longest = max(map(len, texts.split(b"\0")))
    if longest > _MAX_EXPANSION:
        raise ValueError(f"its map makes {longest} bytes of a character, at most {_MAX_EXPANSION} are read")
    try:
        texts.decode()
    except UnicodeDecodeError as error:
        raise ValueError("its map of characters is no UTF-8") from error
