"""Tokenizers from SentencePiece models: `spiece.model`, and the tensor in ComfyUI's text encoders."""

import base64
import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sf_jax.inference import load, sentencepiece
from sf_jax.inference.job import Job
from sf_jax.inference.load import WanOptions, find_wan, load_pipeline
from sf_jax.inference.tokenizer import clean_text, load_tokenizer
from sf_jax.models import umt5
from sf_jax.weights import folders, hub, mapping
from sf_jax.weights import umt5 as umt5_names
from sf_jax.weights.export_folder import Source, Target, write_folder
from tests import spiece
from tests.spiece import BYTES, CONTROL, MARKS, NORMAL, PIECES, UNKNOWN, USER_DEFINED, WORDS
from tests.test_weights import convert
from tests.wan_folder import TEXT, make_folder, random_like

SIZES = dataclasses.replace(TEXT, vocab=len(PIECES))


def ids_of(*words):
    """Tokens of words and of bytes."""
    row = {word: 260 + number for number, word in enumerate(WORDS)}
    return [4 + word if isinstance(word, int) else row[word] for word in words]


def published(pieces=PIECES, byte_fallback=True) -> dict:
    """The model as a tokenizer.json in UMT5's format."""
    special = [row for row, (_, _, type_) in enumerate(pieces) if type_ in (CONTROL, UNKNOWN)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": row, "content": pieces[row][0]} | flags for row in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {
                    "type": "Precompiled",
                    "precompiled_charsmap": base64.b64encode(spiece.charsmap(spiece.CHARACTERS)).decode(),
                },
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [[text, score] for text, score, _ in pieces],
            "byte_fallback": byte_fallback,
        },
    }


def tokenizer_of(folder, data, length=64):
    """The tokenizer loaded from a file with this message."""
    path = folder / "spiece.model"
    path.write_bytes(data)
    return load_tokenizer(path, length)


def encoded(tokenizer, text):
    """The tokens of a text before `</s>`."""
    ids, mask = tokenizer.encode([text])
    assert ids[0, mask.sum() - 1] == 1 and not ids[0, mask.sum() :].any()
    return ids[0, : mask.sum() - 1].tolist()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("spiece"), spiece.model())


# Tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("a cats", ["▁a", "▁cat", "s"]),
        ("\u200ba \u200b cat\u200b", ["▁a", "▁cat"]),
        ("\ufb01\u2460\uff0c", ["▁", "fi", "1", ","]),
        ("猫 e\u0301", ["▁猫", "▁", "é"]),
        ("a\U0001f408", ["▁a", 0xF0, 0x9F, 0x90, 0x88]),
        ("a\ufeff.", ["▁a", "."]),
        ("\u0645\u0631", ["▁", "م", 0xD8, 0xB1]),
        ("t \u2581 cat", ["▁t", "▁", "▁", "▁cat"]),
    ],
)
def test_tokens_of_odd_texts(tokenizer, text, tokens):
    assert encoded(tokenizer, text) == ids_of(*tokens)


def test_tokens_are_those_of_the_published_form(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(json.dumps(published()))
    other = load_tokenizer(tmp_path, 64)
    assert tokenizer.vocab == other.vocab == len(PIECES)
    for text in spiece.ODD:
        np.testing.assert_array_equal(tokenizer.encode([text]), other.encode([text]), err_msg=repr(text))
        # Also texts that prompt cleaning would change, except for leading spaces.
        text = text.lstrip()
        assert tokenizer.backend.encode(text).ids == other.backend.encode(text).ids, repr(text)
    assert clean_text(spiece.ODD[-1]) != "" and encoded(tokenizer, "a</s>cat") == [*ids_of("▁a"), 1, *ids_of("▁cat")]


def test_settings_of_the_model(tmp_path):
    plain = [*MARKS, *((word, -2.0, NORMAL) for word in WORDS)]
    cat, snow, space = (4 + WORDS.index(word) for word in ("cat", "▁snow", "▁"))
    unknown = tokenizer_of(tmp_path, spiece.model(plain, {35: 0}))
    assert encoded(unknown, "\U0001f408\u0631 cat") == [space, 3, 4 + WORDS.index("▁cat")]
    bare = tokenizer_of(tmp_path, spiece.model(plain, {35: 0}, {3: 0, 4: 0}))
    assert encoded(bare, "cat snow") == [cat, snow]
    assert bare.backend.encode("cat  snow ").ids[:6] == [cat, space, snow, space, 1, 0]
    assert encoded(tokenizer_of(tmp_path, spiece.model(plain, {35: 0}, {2: b""})), "\u2460") == [space, 3]
    # User-defined symbols are never split or merged.
    own = tokenizer_of(tmp_path, spiece.model([*plain, ("[x]", 0.0, USER_DEFINED)], {35: 0}))
    assert encoded(own, "cat[x]cat") == [4 + WORDS.index("▁cat"), len(plain), 4 + WORDS.index("▁cat")]
    # A message in parts: the last value counts.
    parts = spiece.model(plain, {35: 0}) + spiece.field(3, spiece.field(3, 0)) + spiece.field(9, b"of the future")
    assert encoded(tokenizer_of(tmp_path, parts), "cat \ufb01") == [cat, space, 4 + WORDS.index("fi")]


def test_umt5_has_tokens_behind_its_pieces(tmp_path, monkeypatch):
    model = sentencepiece.parse_model(spiece.model(), "it")
    assert sentencepiece.build_tokenizer(model).token_to_id("<extra_id_0>") is None
    monkeypatch.setattr(sentencepiece, "_UMT5_PIECES", len(PIECES))
    backend = sentencepiece.build_tokenizer(model)
    last = len(PIECES)
    assert backend.encode("a<extra_id_299>cat <extra_id_0>").ids == [
        *ids_of("▁a"),
        last,
        *ids_of("▁cat"),
        last + 299,
        1,
    ]


def test_messages_are_read_as_protobuf_does(tmp_path):
    pytest.importorskip("google.protobuf", reason="needs protobuf")
    proto = pytest.importorskip("transformers.utils.sentencepiece_model_pb2_new", reason="needs transformers")
    data = spiece.model(normalizer={3: 0}) + spiece.field(2, spiece.field(35, 1))
    theirs, ours = proto.ModelProto.FromString(data), sentencepiece.parse_model(data, "it")
    assert [(piece.piece, piece.score) for piece in theirs.pieces] == list(ours.pieces)
    assert [piece.type for piece in theirs.pieces] == list(ours.types)
    spec = theirs.normalizer_spec
    assert (spec.precompiled_charsmap, spec.add_dummy_prefix) == (ours.charsmap, ours.dummy_prefix)
    assert (spec.remove_extra_whitespaces, theirs.trainer_spec.byte_fallback) == (ours.single_spaces, True)
    written = proto.ModelProto.FromString(data).SerializeToString(deterministic=True)
    assert sentencepiece.parse_model(written, "it") == ours


# Damaged and hostile files

FEW = [*MARKS, ("▁a", -1.0, NORMAL)]


def few(extra=(), trainer=None, normalizer=None):
    return spiece.model([*FEW, *extra], {35: 0} | (trainer or {}), normalizer)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "it has no pieces"),
        (b"\x0a\x07a model", "wire type|cut off|number"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no readable SentencePiece model"),
        (few()[:-3], "it is cut off"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "it is cut off"),
        (b"\x0a" + b"\xff" * 12, "more than 64 bits"),
        (b"\x0b", "field 1 has the wire type 3"),
        (b"\x00\x00", "a field has the number 0"),
        (b"\x08\x01", "field 1 is no message"),
        (spiece.field(1, spiece.field(1, 7)), "field 1 of piece 0 has the wrong type"),
        (few([("", 0.0)]), "piece 5 has 0 bytes"),
        (few([("x" * 129, 0.0)]), "piece 5 has 129 characters, at most 128"),
        (few([(b"\xff", 0.0)]), "piece 5 is no UTF-8"),
        (few([("x", float("nan"))]), "the score of piece 5 is nan"),
        (few([("x", 0.0, 7)]), "the type of piece 5 is 7, allowed: 1 to 6"),
        (few([("▁a", 0.0)]), "the piece '▁a' is there twice"),
        (few([("x", 0.0, UNKNOWN)]), "2 pieces are the unknown token, must be 1"),
        (spiece.model(FEW[:3], {35: 0}), "0 pieces are the unknown token"),
        (spiece.model([FEW[0], FEW[3]], {35: 0}), "it has no token </s>"),
        (few(trainer={3: 2}), "of type BPE, allowed: UNIGRAM"),
        (few(trainer={3: 3}), "of type WORD, allowed: UNIGRAM"),
        (few(trainer={3: b"x"}), "field 3 of its settings has the wrong type"),
        (few(trainer={24: 1}), "with spaces behind words, which is not read"),
        (few(normalizer={5: 0}), "with plain spaces, which is not read"),
        (spiece.model([*FEW, *BYTES[:65], *BYTES[66:]]), r"no token for 1 bytes \(<0x41>\)"),
        (few(normalizer={2: b"\x05\0\0\0aaaaa"}), "its map of characters is damaged"),
        (few(normalizer={2: b"\xf0\xff\xff\xff" + b"a" * 40}), "its map of characters is damaged"),
        (few(normalizer={2: b"\x04\0\0\0aaaa\xff\0"}), "its map of characters is no UTF-8"),
        (few(normalizer={2: b"\x04\0\0\0aaaa" + b"x" * 300}), "makes 300 bytes of a character"),
        (spiece.model([FEW[1], FEW[0], *FEW[2:]], {35: 0}), "<pad> is 1, must be 0"),
    ],
)
def test_damaged_models_are_refused_in_a_line(data, fault, tmp_path, capfd):
    with pytest.raises(ValueError, match=fault) as caught:
        tokenizer_of(tmp_path, data)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 500
    assert not capfd.readouterr().err


def test_maps_that_lead_nowhere_are_refused_in_a_line(tmp_path, capfd):
    stored = spiece.charsmap(spiece.CHARACTERS)
    size = int.from_bytes(stored[:4], "little")
    rng = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(stored)
        for at in rng.integers(4, 4 + size, 200):
            data[at] = rng.integers(256)
        try:
            ids, _ = tokenizer_of(tmp_path, few(normalizer={2: bytes(data)})).encode(spiece.ODD[:-1])
            assert ids.max() < len(FEW)
        except ValueError as error:
            assert "\n" not in str(error)


def test_large_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sentencepiece, "_MAX_PIECES", 4)
    with pytest.raises(ValueError, match="it has more than 4 pieces"):
        tokenizer_of(tmp_path, few())
    monkeypatch.undo()
    monkeypatch.setattr(sentencepiece, "_MAX_MARKS", 2)
    with pytest.raises(ValueError, match="3 pieces are control symbols or the user's own, at most 2"):
        tokenizer_of(tmp_path, few())
    with pytest.raises(ValueError, match=r"has \d+ bytes: a SentencePiece model of at most \d+ bytes"):
        tokenizer_of(tmp_path, b"\0" * (sentencepiece.MAX_BYTES + 1))


# Where models are


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An official model folder with both tokenizer files."""
    made = make_folder(tmp_path_factory.mktemp("models") / "wan")
    tensors = mapping.to_tensors(umt5_names.entries(SIZES), random_like(umt5.param_shapes(SIZES)))
    save_file(tensors, made / "models_t5_umt5-xxl-enc-bf16.safetensors")
    (made / "google" / "umt5-xxl" / "tokenizer.json").write_text(json.dumps(published()))
    (made / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece.model())
    return made


@pytest.fixture(scope="module")
def comfy(folder, tmp_path_factory):
    """The options that name the parts as stored for ComfyUI."""
    out = tmp_path_factory.mktemp("comfy") / "out"
    write_folder(Source(folder), Target(out, "comfy"))
    kinds = {"diffusion_models": "transformer", "vae": "vae", "text_encoders": "text_encoder"}
    named = {option: next((out / kind).glob("*.safetensors")) for kind, option in kinds.items()}
    shutil.copy(folder / "config.json", named["transformer"].parent)
    return named


def test_comfyui_files_need_no_tokenizer(folder, comfy):
    prompts = [text for text in spiece.ODD if clean_text(text)]
    pipe = load_pipeline(**comfy, dtype="float32")
    assert pipe.text_encoder.files.tokenizer == comfy["text_encoder"]
    whole = load_pipeline(folder, dtype="float32")
    ids = load_tokenizer(comfy["text_encoder"]).encode(prompts)
    np.testing.assert_array_equal(ids, load_tokenizer(folder).encode(prompts))
    np.testing.assert_array_equal(pipe.text_encoder.encode(prompts), whole.text_encoder.encode(prompts))
    assert np.abs(pipe.text_encoder.encode(["a cat"])[0, :3]).min() > 0
    # The command's job, with and without other sources.
    student = {"checkpoint": str(folder / "student.safetensors")}
    flags = {name: str(path) for name, path in comfy.items()} | student
    assert find_wan(None, Job(("a cat",), **flags).wan_options()).tokenizer == comfy["text_encoder"]
    path = folder / "google" / "umt5-xxl" / "spiece.model"
    assert find_wan(None, Job(("a cat",), **flags, tokenizer=str(path)).wan_options()).tokenizer == path
    # A model folder's own tokenizer takes precedence.
    assert find_wan(folder, WanOptions(text_encoder=comfy["text_encoder"])).tokenizer == folder / "google" / "umt5-xxl"


@pytest.mark.slow
def test_a_text_encoder_of_comfyui_keeps_its_tokenizer(comfy, tmp_path):
    written = tmp_path / "half.safetensors"
    done = convert(f"--input={comfy['text_encoder']}", f"--output={written}", "--to=comfy", "--dtype=float16")
    assert done.returncode == 0, done.stderr
    tensors = [sentencepiece.read_tensor(path) for path in (written, comfy["text_encoder"])]
    assert tensors[0] == tensors[1]


def test_a_model_folder_without_tokenizer_takes_the_text_encoders(folder, comfy, tmp_path):
    shutil.copytree(folder, tmp_path / "wan", ignore=shutil.ignore_patterns("google"))
    with pytest.raises(ValueError, match="lacks: tokenizer"):
        find_wan(tmp_path / "wan", WanOptions())
    options = WanOptions(text_encoder=comfy["text_encoder"])
    assert find_wan(tmp_path / "wan", options).tokenizer == comfy["text_encoder"]


def test_all_in_one_files_need_no_tokenizer(comfy, tmp_path):
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae.", "text_encoder": "text_encoders.umt5xxl."}
    tensors = {
        (prefix if name != "spiece_model" else "text_encoders.") + name: value
        for part, prefix in prefixes.items()
        for name, value in load_file(comfy[part]).items()
    }
    path = tmp_path / "all.safetensors"
    save_file(tensors, path)
    shutil.copy(comfy["transformer"].with_name("config.json"), tmp_path)
    files = find_wan(None, WanOptions(transformer=path, text_encoder=path, vae=path))
    assert files.tokenizer == path
    assert encoded(load_tokenizer(files.tokenizer), "a cats") == ids_of("▁a", "▁cat", "s")
    embedded = load.Umt5TextEncoder(files, "float32").encode(["a cats"])
    np.testing.assert_array_equal(embedded, load_pipeline(**comfy, dtype="float32").text_encoder.encode(["a cats"]))


def test_text_encoders_with_other_tokenizers_are_refused(folder, comfy, tmp_path):
    stored = load_file(comfy["text_encoder"])
    path = tmp_path / "umt5.safetensors"
    bare = {name: value for name, value in stored.items() if name != "spiece_model"}
    cases = [
        ({}, "without it so are --tokenizer: give --model, or these files"),
        ({"spiece_model": np.zeros(8, np.float32)}, r"spiece_model is float32 \[8\], must be uint8 of one axis"),
        ({"spiece_model": np.zeros((2, 4), np.uint8)}, r"spiece_model is uint8 \[2, 4\], must be uint8"),
        ({"spiece_model": np.zeros(8, np.uint8)}, "spiece_model of .*umt5.safetensors is no readable SentencePiece"),
        ({"spiece_model": np.frombuffer(few(trainer={3: 2}), np.uint8)}, "of type BPE, allowed: UNIGRAM"),
        ({"spiece_model": stored["spiece_model"], "a.spiece_model": np.zeros(8, np.uint8)}, "has several tokenizers"),
    ]
    for beside, fault in cases:
        save_file(bare | beside, path)
        with pytest.raises(ValueError, match=fault) as caught:
            load.Umt5TextEncoder(find_wan(None, WanOptions(**comfy | {"text_encoder": path})), "float32").encode(["a"])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has no tokenizer .no tensor spiece_model.: name one"):
        load_tokenizer(folder / "student.safetensors")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match="vocab.txt is no tokenizer: allowed are tokenizer.json, spiece.model"):
        load_tokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize("inside", ["", "google/umt5-xxl", "tokenizer"])
def test_folders_with_the_model_alone(inside, tmp_path):
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    (tmp_path / inside / "spiece.model").write_bytes(spiece.model())
    assert encoded(load_tokenizer(tmp_path), "a cats") == ids_of("▁a", "▁cat", "s")


def test_the_hub_gives_the_model_where_there_is_no_other_file(tmp_path, monkeypatch):
    names = {
        "org/both": ["tokenizer/spiece.model", "tokenizer/tokenizer.json"],
        "org/model": ["README.md", "google/umt5-xxl/spiece.model"],
    }
    chosen = {}

    def fetch(place, choose):
        chosen[place.repository] = list(choose(names[place.repository]))
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    for repository in names:
        folders.find_tokenizer(f"hf://{repository}")
    assert chosen == {"org/both": ["tokenizer/tokenizer.json"], "org/model": ["google/umt5-xxl/spiece.model"]}
