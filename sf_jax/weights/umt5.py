"""Name maps of the text encoder: official names and those of transformers' `UMT5EncoderModel`."""

import re
from collections.abc import Mapping

from sf_jax.messages import shortened
from sf_jax.models.umt5 import Umt5Config
from sf_jax.weights.mapping import LINEAR, SAME, Entry

# The embedding has two names in transformers; a file may contain either or both.
_EMBEDDING = {
    "official": ("token_embedding.weight",),
    "transformers": ("shared.weight", "encoder.embed_tokens.weight"),
}
_NORM = {"official": "norm.weight", "transformers": "encoder.final_layer_norm.weight"}
_BLOCKS = {"official": "blocks.", "transformers": "encoder.block."}
# (ours, official, transformers) in each block.
_BLOCK = (
    ("norm1.scale", "norm1.weight", "layer.0.layer_norm.weight"),
    *((f"{part}.kernel", f"attn.{part}.weight", f"layer.0.SelfAttention.{part}.weight") for part in "qkvo"),
    (
        "position_bias",
        "pos_embedding.embedding.weight",
        "layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    ("norm2.scale", "norm2.weight", "layer.1.layer_norm.weight"),
    ("gate.kernel", "ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),
    ("ffn_in.kernel", "ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
    ("ffn_out.kernel", "ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
)


def _block_names(naming: str) -> dict[str, str]:
    """Our name -> the file's name of each tensor of a block."""
    column = {"official": 1, "transformers": 2}[naming]
    return {row[0]: row[column] for row in _BLOCK}


def entries(config: Umt5Config, naming: str = "official") -> list[Entry]:
    """The map of a text encoder; `naming` is "official" or "transformers"."""
    found = [Entry(name, ("embedding",)) for name in _EMBEDDING[naming]]
    for layer in range(config.num_layers):
        for ours, theirs in _block_names(naming).items():
            layout = LINEAR if ours.endswith(".kernel") else SAME
            found.append(Entry(f"{_BLOCKS[naming]}{layer}.{theirs}", ("blocks", *ours.split(".")), layer, layout))
    return [*found, Entry(_NORM[naming], ("norm", "scale"))]


def umt5_config_of(shapes: Mapping[str, tuple]) -> Umt5Config:
    """Sizes of a text encoder from its tensors' names (in either naming) and shapes.

    Args:
      shapes: the file's name -> shape.

    Raises:
      ValueError: if this is not a text encoder, naming the missing or misshaped tensor.
    """
    naming = "official" if _EMBEDDING["official"][0] in shapes else "transformers"
    names, prefix = _block_names(naming), _BLOCKS[naming]

    def sizes(*alternatives):
        name = next((name for name in alternatives if name in shapes), None)
        if name is None:
            raise ValueError(f"these are not the weights of a UMT5 encoder: no tensor {' or '.join(alternatives)}")
        shape = tuple(shapes[name])
        if len(shape) != 2:
            raise ValueError(f"these are not the weights of a UMT5 encoder: {name} is {shape}, it must have two axes")
        return shape

    vocab, dim = sizes(*_EMBEDDING[naming])
    num_buckets, num_heads = sizes(f"{prefix}0.{names['position_bias']}")
    numbers = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in shapes)
    layers = {number[1] for number in numbers if number}
    for number in layers:
        # A name can contain any number, so check it before using it as a block count.
        if len(number) > 9 or int(number) >= len(layers):
            raise ValueError(
                f"these are not the weights of a whole UMT5 encoder: there are {len(layers)} blocks, one of number "
                f"{shortened(number, 20)}"
            )
    return Umt5Config(
        vocab=vocab,
        dim=dim,
        dim_attn=sizes(f"{prefix}0.{names['q.kernel']}")[0],
        dim_ffn=sizes(f"{prefix}0.{names['gate.kernel']}")[0],
        num_heads=num_heads,
        num_layers=len(layers),
        num_buckets=num_buckets,
    )
