"""Helpers for error messages: quotes text from files in a few words, however long it is."""

from typing import Any


def printable(text: str) -> str:
    r"""Escapes a text for the terminal: control characters such as ESC become `\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shortened(text: str, limit: int = 160) -> str:
    """Shortens a text to one printable line of at most `limit` characters."""
    words = printable(" ".join(text[: 4 * limit].split()))
    return words if len(words) <= limit and len(text) <= 4 * limit else f"{words[: limit - 3]}..."


def with_article(noun: str) -> str:
    """A noun with "a" or "an" before it."""
    return f"{'an' if noun[:1].lower() in tuple('aeio') or noun.startswith('up') else 'a'} {noun}"


def quoted(value: Any, limit: int = 80) -> str:
    """The `repr` of a value, cut to `limit` characters.

    Args:
      value: a JSON or Python value, not nested too deeply for `repr`; see `strict_json`.
      limit: maximum number of characters.
    """
    if isinstance(value, (str, bytes)) and len(value) > limit:
        return f"{value[: limit - 3]!r}..."
    return shortened(repr(value), limit)
