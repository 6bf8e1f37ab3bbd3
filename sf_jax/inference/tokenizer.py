"""Prompts to the tokens of the text encoder.

Source: official `HuggingfaceTokenizer` with `clean='whitespace'` (wan/modules/tokenizers.py), on the `tokenizers`
library alone.
"""

import dataclasses
import html
import pathlib
import re
from collections.abc import Sequence

import ftfy
import numpy as np
import tokenizers

# Where the tokenizer is: its own folder, the official model folder, a diffusers model folder.
FOLDERS = ("", "google/umt5-xxl", "tokenizer")
PAD, END = ("<pad>", 0), ("</s>", 1)


def clean_text(prompt: str) -> str:
    """A prompt as the tokenizer wants it: broken Unicode and HTML entities repaired, white space single."""
    # Twice, because entities are often escaped themselves: "&amp;lt;".
    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", unescaped).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns prompts into tokens.

    Attributes:
      backend: the tokenizer of the `tokenizers` library, which pads and truncates to `length`.
      length: tokens per prompt.
    """

    backend: tokenizers.Tokenizer
    length: int = 512

    @property
    def vocab(self) -> int:
        """Number of tokens; the encoder's embedding must have at least as many rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of prompts.

        Args:
          prompts: B prompts; the empty one is the unconditional input.

        Returns:
          ids int32 [B, length]: the text, cut where it is too long, then `</s>`, then `<pad>`; mask int32
          [B, length]: 1 up to and including `</s>`, then 0.

        Raises:
          ValueError: if `prompts` is not a sequence of strings.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts: got the single string {prompts!r}, allowed: a sequence of strings")
        ids, mask = np.zeros((2, len(prompts), self.length), np.int32)
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompts[{row}]: got {type(prompt).__name__}, allowed: a string")
            encoding = self.backend.encode(clean_text(prompt))
            ids[row], mask[row] = encoding.ids, encoding.attention_mask
        return ids, mask


def load_tokenizer(folder: str | pathlib.Path, length: int = 512) -> Tokenizer:
    """Reads `tokenizer.json`.

    Args:
      folder: the tokenizer's folder, or the model folder that has it as `google/umt5-xxl` or `tokenizer`; or its file.
      length: tokens per prompt, `</s>` included; the length that Wan2.1 was trained with is 512.

    Raises:
      ValueError: if there is no such file, if it is damaged, or if it is the tokenizer of another model.
    """
    if length < 1:
        raise ValueError(f"length is {length}: it must be at least 1")
    folder = pathlib.Path(folder)
    path = next((p for part in FOLDERS if (p := folder / part / "tokenizer.json").is_file()), None)
    path = folder if folder.is_file() and folder.suffix == ".json" else path
    if path is None:
        raise ValueError(_missing(folder))
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is no readable tokenizer ({reason}): download the file again") from error
    backend.enable_truncation(max_length=length)
    backend.enable_padding(length=length, pad_id=PAD[1], pad_token=PAD[0])
    for token, wanted in (PAD, END):
        if (found := backend.token_to_id(token)) != wanted:
            raise ValueError(
                f"{path} is not the tokenizer of UMT5: {token} is {found}, must be {wanted}; take google/umt5-xxl's"
            )
    if backend.num_special_tokens_to_add(False) != 1 or backend.encode("").ids[0] != END[1]:
        raise ValueError(
            f"{path} is not the tokenizer of UMT5: it does not end a text with </s>; take google/umt5-xxl's"
        )
    return Tokenizer(backend, length)


def _missing(folder):
    """Why a folder has no tokenizer, and what to do."""
    if folder.is_file():
        return (
            f"{folder} is no tokenizer.json, and nothing else is read: take google/umt5-xxl/tokenizer.json of the model"
        )
    if not folder.is_dir():
        return f"{folder} is no folder: give the model folder that holds google/umt5-xxl/tokenizer.json"
    looked = ", ".join(str(pathlib.PurePosixPath(part) / "tokenizer.json") for part in FOLDERS)
    for part in FOLDERS:
        for name in ("spiece.model", "sentencepiece.bpe.model"):
            if (folder / part / name).is_file():
                return (
                    f"{folder / part} has {name} but no tokenizer.json, and only the latter is read: "
                    "download google/umt5-xxl/tokenizer.json of the model to beside it"
                )
    return f"{folder} has no tokenizer.json (looked for {looked}): download google/umt5-xxl/tokenizer.json of the model"
