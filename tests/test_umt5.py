"""The text encoder, its tokenizer and its name maps."""

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from sf_jax.inference.tokenizer import clean_text, load_tokenizer
from sf_jax.models import umt5
from sf_jax.weights import mapping
from sf_jax.weights import umt5 as umt5_weights
from tests.helpers import relative

SMALL = umt5.Umt5Config(vocab=40, dim=24, dim_attn=32, dim_ffn=40, num_heads=4, num_layers=2, num_buckets=16)
MANIFESTS = pathlib.Path(__file__).parent / "manifests"
WORDS = ("a", "cat", "walks", "<b>", "it's", "café")


def random_params(config=SMALL):
    """Numpy parameters, large enough that every path affects the output."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        name, size = path[-1].key, shape.shape
        value = rng.normal(0, size[-2] ** -0.5 if name == "kernel" else 1, size)
        return np.asarray(1 + 0.25 * value if name == "scale" else value, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, umt5.param_shapes(config))


def run(ids, mask, config=SMALL, params=None, method="__call__"):
    """The encoder's output as numpy."""
    params = random_params(config) if params is None else params
    return np.asarray(_apply(config, method, params, ids, mask))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config, method, params, ids, mask):
    return umt5.Umt5Encoder(config).apply({"params": params}, ids, mask, method=method)


def text(lengths=(5, 9), width=9):
    """Random ids and the mask for texts of the given lengths."""
    ids = np.random.default_rng(1).integers(2, SMALL.vocab, (len(lengths), width)).astype(np.int32)
    mask = (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int32)
    return ids * mask, mask


def test_padding_changes_no_row_of_the_text_and_rows_after_its_end_are_zero():
    ids, mask = text()
    short = run(ids[:1, :5], mask[:1, :5])
    padded = run(np.where(mask, ids, 7), mask)  # regardless of the padding's ids
    assert relative(padded[:1, :5], short) < 1e-6
    embeds = run(ids, mask, method="embed")
    assert relative(embeds[:1, :5], short) < 1e-6
    assert not embeds[0, 5:].any() and embeds[1].all(axis=-1).all()
    assert run(ids, mask)[0, 5:].any()


def test_order_and_words_matter():
    ids, mask = text((9,))
    reference = run(ids, mask)
    assert relative(run(ids[:, ::-1].copy(), mask)[:, ::-1], reference) > 0.05
    changed = ids.copy()
    changed[0, 8] = changed[0, 8] % 30 + 3
    assert relative(run(changed, mask)[:, 0], reference[:, 0]) > 1e-3


def test_bucket_table():
    table = umt5.position_buckets(512)
    # Distances where a new bucket begins, before the query; after it, buckets are 16 higher.
    first = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    expected = np.searchsorted(first, np.arange(512), side="right") - 1
    np.testing.assert_array_equal(table[:, 0], expected)
    np.testing.assert_array_equal(table[0, 1:], expected[1:] + 16)
    np.testing.assert_array_equal(table[300, 200:400], table[200, 100:300])
    np.testing.assert_array_equal(umt5.position_buckets(24), table[:24, :24])
    assert umt5.position_buckets(9, num_buckets=4, max_distance=3).max() == 3


def test_bfloat16_is_close_to_float32_and_the_output_is_float32():
    ids, mask = text()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params())
    reference = run(ids, mask, params=jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    np.testing.assert_array_equal(run(ids, mask, params=rounded), reference)
    fast = run(ids, mask, dataclasses.replace(SMALL, dtype="bfloat16"), rounded)
    assert fast.dtype == np.float32 and relative(fast, reference) < 0.02


def test_prompts_of_any_length_share_one_program():
    params = random_params()

    @jax.jit
    @chex.assert_max_traces(1)
    def embed(ids, mask):
        return umt5.Umt5Encoder(SMALL).apply({"params": params}, ids, mask, method="embed")

    for lengths in ((5, 9), (1, 3), (9, 9)):
        assert np.isfinite(embed(*text(lengths))).all()


def test_wrong_sizes_and_shapes_are_refused():
    for change in ({"dim": 0}, {"num_heads": 5}, {"num_buckets": 7}, {"max_distance": 4}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(SMALL, **change)
    ids, mask = text()
    with pytest.raises(ValueError, match=r"mask is \(2, 8\)"):
        run(ids, mask[:, 1:])


@pytest.mark.parametrize("naming", ["official", "transformers"])
def test_name_maps_fit_the_real_file(naming):
    manifest = json.loads((MANIFESTS / f"umt5-xxl-encoder.{naming}.json").read_text())["tensors"]
    config = umt5_weights.umt5_config_of(manifest)
    assert config == umt5.umt5_xxl()
    entries = umt5_weights.entries(config, naming)
    assert sorted(entry.name for entry in entries) == sorted(manifest)
    like = umt5.param_shapes(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        found = [entry for entry in entries if entry.path == tuple(part.key for part in path)]
        assert found
        if found[0].layer is not None:
            assert [entry.layer for entry in found] == list(range(config.num_layers))
        for entry in found:
            shape = leaf.shape if entry.layer is None else leaf.shape[1:]
            assert entry.layout.theirs(np.broadcast_to(np.int8(0), shape)).shape == tuple(manifest[entry.name])


def test_name_maps_go_both_ways():
    params = random_params()
    official = mapping.to_tensors(umt5_weights.entries(SMALL), params)
    theirs = mapping.to_tensors(umt5_weights.entries(SMALL, "transformers"), params)
    assert len(theirs) == len(official) + 1
    np.testing.assert_array_equal(theirs["shared.weight"], theirs["encoder.embed_tokens.weight"])
    del theirs["shared.weight"]  # files contain either name or both
    for naming, tensors in (("official", official), ("transformers", theirs)):
        config = umt5_weights.umt5_config_of({name: value.shape for name, value in tensors.items()})
        assert config == SMALL
        entries = umt5_weights.entries(config, naming)
        chex.assert_trees_all_equal(mapping.to_params(entries, tensors, umt5.param_shapes(SMALL), "encoder"), params)


def test_other_weights_are_refused_by_name():
    shapes = {name: value.shape for name, value in _official().items()}
    with pytest.raises(ValueError, match=r"no tensor shared.weight or encoder.embed_tokens.weight"):
        umt5_weights.umt5_config_of({"decoder.conv1.weight": (3, 3)})
    with pytest.raises(ValueError, match=r"no tensor blocks.0.pos_embedding.embedding.weight"):
        umt5_weights.umt5_config_of({name: shape for name, shape in shapes.items() if "pos_embedding" not in name})
    with pytest.raises(ValueError, match=r"token_embedding.weight is \(40,\)"):
        umt5_weights.umt5_config_of({**shapes, "token_embedding.weight": (40,)})


def _official():
    return mapping.to_tensors(umt5_weights.entries(SMALL), random_params())


def tokenizer_file(folder, ending=True, pad="<pad>"):
    """Writes a `tokenizer.json` with a few words; its padding and truncation settings must have no effect."""
    words = [pad, "</s>", "<unk>", *WORDS]
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    if ending:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.enable_padding(length=3, direction="left", pad_id=2)
    made.enable_truncation(max_length=2, direction="left")
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))


def ids_of(*words):
    return [3 + WORDS.index(word) for word in words]


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a\n\tcat\u3000walks \u00a0", "a cat walks"),
        ("&lt;b&gt;", "<b>"),
        ("a < b &amp;lt; c &amp;amp;lt; d", "a < b < c &lt; d"),
        ("it\u2019s a caf\u00c3\u00a9", "it's a caf\u00e9"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_prompts_are_cleaned(prompt, cleaned):
    assert clean_text(prompt) == cleaned


def test_tokens_end_with_the_end_token_and_padding(tmp_path):
    tokenizer_file(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids, mask = tokenizer.encode(["a  cat &lt;b&gt;", "", "it\u2019s a caf\u00c3\u00a9 dog"])
    assert ids.shape == mask.shape == (3, 512) and ids.dtype == mask.dtype == np.int32
    assert tokenizer.vocab == 3 + len(WORDS)
    for row, expected in enumerate([ids_of("a", "cat", "<b>"), [], [*ids_of("it's", "a", "café"), 2]]):
        assert ids[row].tolist() == [*expected, 1] + [0] * (511 - len(expected))
        assert mask[row].tolist() == [1] * (len(expected) + 1) + [0] * (511 - len(expected))
    assert tokenizer.encode([])[0].shape == (0, 512)


def test_truncation_keeps_the_end_token(tmp_path):
    tokenizer_file(tmp_path)
    ids, mask = load_tokenizer(tmp_path, length=4).encode(["a cat walks <b> a", "a cat walks", "cat"])
    first = ids_of("a", "cat", "walks")
    assert ids.tolist() == [[*first, 1], [*first, 1], [*ids_of("cat"), 1, 0, 0]]
    assert mask.tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert load_tokenizer(tmp_path, length=1).encode(["a cat", ""])[0].tolist() == [[1], [1]]


@pytest.mark.parametrize("inside", ["", "google/umt5-xxl", "tokenizer"])
def test_the_tokenizer_is_found_in_model_folders(tmp_path, inside):
    tokenizer_file(tmp_path / inside)
    assert load_tokenizer(str(tmp_path), length=2).encode(["cat"])[0].tolist() == [[*ids_of("cat"), 1]]


def test_tokenizer_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder: give the model folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no tokenizer.json .*download google/umt5-xxl/tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"spiece.model is no readable SentencePiece model"):
        load_tokenizer(tmp_path)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b'{"model": 1}', b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"no readable tokenizer .*download the file again") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
    tokenizer_file(tmp_path, ending=False)
    with pytest.raises(ValueError, match=r"does not end a text with </s>"):
        load_tokenizer(tmp_path)
    tokenizer_file(tmp_path, pad="[PAD]")
    with pytest.raises(ValueError, match=r"<pad> is None, must be 0"):
        load_tokenizer(tmp_path)
    tokenizer_file(tmp_path)
    with pytest.raises(ValueError, match=r"length is 0"):
        load_tokenizer(tmp_path, length=0)
    with pytest.raises(ValueError, match=r"single string 'a cat'"):
        load_tokenizer(tmp_path).encode("a cat")
    with pytest.raises(ValueError, match=r"prompts\[1\]: got NoneType"):
        load_tokenizer(tmp_path).encode(["a", None])
