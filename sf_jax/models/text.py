"""A frozen word embedding, which replaces the text encoder in the small models."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from sf_jax.messages import quoted

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = (
    *("a", "an", "moving", "and"),
    *("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    *("right", "down", "left", "up"),
    *("slowly", "fast"),
)


def words_of(prompt: str) -> tuple[str, ...]:
    """Splits a prompt into lower-case words without commas and full stops; "seven" becomes "7"."""
    words = re.sub(r"[,.]", " ", prompt.lower()).split()
    return tuple(str(DIGIT_NAMES.index(word)) if word in DIGIT_NAMES else word for word in words)


def word_vector(word: str, dim: int) -> np.ndarray:
    """Returns the vector of one word.

    The entries are signs taken from the bits of SHA-256. They are exact on every machine and independent of
    numpy's generators, so a checkpoint always gets the embeddings it was trained on.

    Args:
      word: The word, lower-case.
      dim: The number of entries.

    Returns:
      Entries of -1 or 1 (unit variance, norm sqrt(dim)), float32 [dim].
    """
    blocks = (dim + 255) // 256
    digest = b"".join(hashlib.sha256(f"{block}:{word}".encode()).digest() for block in range(blocks))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))[:dim]
    return bits.astype(np.float32) * 2 - 1


@dataclasses.dataclass(frozen=True)
class WordEmbedding:
    """Embeds prompts word by word.

    Attributes:
      dim: Entries per word.
      length: Maximum words per prompt; rows after the prompt's end are exactly zero.
      vocabulary: The words that a prompt may contain.
    """

    dim: int = 64
    length: int = 10
    vocabulary: tuple[str, ...] = VOCABULARY

    def __post_init__(self):
        for field in ("dim", "length"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"WordEmbedding.{field}: got {value}, allowed: 1 or more")

    @functools.cached_property
    def _vectors(self) -> dict[str, np.ndarray]:
        return {word: word_vector(word, self.dim) for word in self.vocabulary}

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeds prompts.

        Args:
          prompts: B prompts; the empty prompt, embedded as zeros, is the unconditional input.

        Returns:
          Word vectors, float32 [B, length, dim].

        Raises:
          ValueError: if `prompts` is a single string, or a prompt has an unknown word or too many words.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts: got the single string {quoted(prompts)}, allowed: a sequence of strings")
        rows = np.zeros((len(prompts), self.length, self.dim), np.float32)
        for row, prompt in zip(rows, prompts, strict=True):
            words = words_of(str(prompt))
            if len(words) > self.length:
                raise ValueError(
                    f"prompt: {quoted(str(prompt))} has {len(words)} words, allowed: at most {self.length}"
                )
            for place, word in enumerate(words):
                if word not in self._vectors:
                    raise ValueError(
                        f"prompt: unknown word {quoted(word)} in {quoted(str(prompt))}, known words: "
                        f"{', '.join(self.vocabulary)}"
                    )
                row[place] = self._vectors[word]
        return rows
