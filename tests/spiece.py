"""Small SentencePiece models: encodes the protobuf message and its compiled character map by hand."""

import struct

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MARKS = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
WORDS = [
    "▁",
    "▁a",
    "▁cat",
    "▁in",
    "▁the",
    "▁snow",
    "s",
    "cat",
    "fi",
    "1",
    ",",
    "猫",
    "▁猫",
    "م",
    "é",
    "e",
    "t",
    "▁t",
    ".",
]
PIECES = [*MARKS, *BYTES, *((word, -2.0 - 0.25 * row, NORMAL) for row, word in enumerate(WORDS))]
# From NFKC and SentencePiece's own rules: all kinds of spaces become plain ones, and some characters are removed.
CHARACTERS = {
    "\u3000": " ",
    "\u200b": " ",
    "\n": " ",
    "\t": " ",
    "\u00a0": " ",
    "\ufb01": "fi",
    "\u2460": "1",
    "\uff0c": ",",
    "e\u0301": "\u00e9",
    "\ufeff": "",
    "\u00ad": "",
}
# Broken, rare and empty texts.
ODD = (
    "",
    " ",
    "a cat in the snow.",
    "  a   cat ",
    "cats\u3000in \u200b the\u00a0snow\n\n.",
    "\u200ba cat\u200b in",
    "\ufb01 \ufb01\ufb01 \u2460\uff0c",
    "caf\u00e9 cafe\u0301 e\u0301e\u0301 \u0301",
    "猫 猫猫\U0001f408\u200d\U0001f469\U0001f3fd \U0001f1e9\U0001f1ea",
    "\u0645\u0631\u062d\u0628\u0627 \u0645",
    "\ufeffa\u00adcat\ufeff",
    "\u2581a \u2581 \u2581\u2581cat",
    "a</s>cat <pad> <unk><s>",
    "<0x41> <0xF0>",
    "x\x00y\x1f\u2028z",
    "\U0010ffff\ufffd\ue000",
    "a cat " * 300,
)


def number(value: int) -> bytes:
    """A varint."""
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(key: int, value) -> bytes:
    """A field of a message: integers as varints, floats in 4 bytes, strings and messages with their length."""
    if isinstance(value, float):
        return number(key << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return number(key << 3) + number(value)
    value = value.encode() if isinstance(value, str) else value
    return number(key << 3 | 2) + number(len(value)) + value


def piece(text, score=0.0, type_=NORMAL) -> bytes:
    """A piece; omits default values, as SentencePiece does."""
    return field(1, field(1, text) + field(2, score) + (field(3, type_) if type_ != NORMAL else b""))


def charsmap(characters: dict[str, str]) -> bytes:
    """The compiled map: a double array (Darts) from UTF-8 to offsets of the zero-terminated texts after it."""
    texts, trie = b"", {}
    for source, target in characters.items():
        node = trie
        for byte in source.encode():
            node = node.setdefault(byte, {})
        node[0] = len(texts)
        texts += target.encode() + b"\0"
    units = {0: 0}

    def place(node, at):
        base = next(b for b in range(1, 1 << 20) if all(b ^ byte not in units for byte in node))
        units[at] |= (at ^ base) << 10 | (0 in node) << 8
        for byte, child in node.items():
            units[base ^ byte] = child | 1 << 31 if byte == 0 else byte
        for byte, child in node.items():
            if byte:
                place(child, base ^ byte)

    place(trie, 0)
    array = struct.pack(f"<{max(units) + 256}I", *(units.get(at, 0) for at in range(max(units) + 256)))
    return struct.pack("<I", len(array)) + array + texts


def model(pieces=PIECES, trainer: dict | None = None, normalizer: dict | None = None) -> bytes:
    """A ModelProto with UMT5's settings, plus the given ones."""
    trainer = {1: "corpus.txt", 3: 1, 4: len(pieces), 10: 0.9995, 35: 1, 40: 3} | (trainer or {})
    normalizer = {1: "nmt_nfkc", 2: charsmap(CHARACTERS)} | (normalizer or {})
    specs = [b"".join(field(key, value) for key, value in spec.items()) for spec in (trainer, normalizer)]
    return b"".join(piece(*one) for one in pieces) + field(2, specs[0]) + field(3, specs[1])
