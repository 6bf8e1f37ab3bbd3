"""Writes networks for other programs, with their tensor names and our header, as one file or as shards."""

import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sf_jax.files import replacing
from sf_jax.messages import with_article
from sf_jax.models.wan import WanConfig
from sf_jax.weights import load
from sf_jax.weights.experts import refuse_other_transformers
from sf_jax.weights.folders import read_config
from sf_jax.weights.package import Package, parse_header
from sf_jax.weights.recognize import NAMINGS, entries_of, param_shapes_of, recognize
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import TensorFile

LAYOUTS = ("official", "diffusers", "transformers", "comfy")
# ComfyUI's text encoders store the tokenizer, a SentencePiece model, in this tensor.
SPIECE = "spiece_model"
# ComfyUI has no naming of its own; it reads these.
_COMFY_NAMINGS = {"transformer": "official", "vae": "official", "umt5": "transformers"}
# Second name of a tied tensor, which transformers and ComfyUI do not write.
_TIED = "encoder.embed_tokens.weight"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Smaller conversions (in bytes) show no progress bar.
_LONG = 10**9


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of a weight file, ready to be written.

    Attributes:
      kind: "transformer", "vae", "tiny_vae" or "umt5".
      title: human-readable description.
      config: its sizes; None for a transformer whose number of heads is unknown.
      source: the naming of the input file.
      naming: the naming of the output.
      tensors: the tensors with their names and types in the output.
      header: the header of a file that sf_jax.train wrote.
    """

    kind: str
    title: str
    config: object
    source: str
    naming: str
    tensors: TensorFile
    header: Package | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """Strings for the header of a safetensors file; PyTorch libraries reject files without `format`."""
        kept = {"sf_jax": self.tensors.metadata["sf_jax"]} if self.header is not None else {}
        return {"format": "pt"} | kept

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_nbytes(self.tensors, name) for name in self.tensors)


def read_network(tensors: TensorFile, layout: str | None, config: WanConfig | None = None) -> Network:
    """Recognizes a network and renames its tensors for a layout; reads only names and shapes.

    Args:
      tensors: the file.
      layout: one of `LAYOUTS`; None keeps the names.
      config: sizes of a transformer, if known; None looks for a `config.json` next to the file.

    Raises:
      ValueError: if the file contains something else, or this kind of network does not have that layout.
    """
    guess, header = recognize(tensors.shapes, tensors.metadata), None
    if guess.kind == "package":
        header = parse_header(tensors.path, tensors.metadata["sf_jax"])
        guess = recognize(tensors.shapes)
    if guess.kind == "unknown":
        raise ValueError(f"{tensors.path}: this is {with_article(guess.title)}")
    if guess.kind == "transformer":
        refuse_other_transformers(tensors.path)
    naming = _naming(guess, layout)
    if guess.kind != "transformer":
        config = None
    elif config is None:
        config = header.config if header is not None else _sizes_beside(tensors.path, guess.config)
    elif header is not None and (header.config.num_heads, header.config.eps) != (config.num_heads, config.eps):
        raise ValueError(
            f"{tensors.path} has {header.config.num_heads} heads and eps {header.config.eps} (its header): the model "
            f"folder's config.json says {config.num_heads} and {config.eps}"
        )
    source, target = (entries_of(guess.kind, guess.config, name) for name in (guess.naming, naming))
    if guess.kind == "umt5":
        tensors = tensors.without(SPIECE)
    tensors = load.normalized(tensors, [entry.name for entry in source])
    load.check(source, tensors, param_shapes_of(guess.kind, guess.config), guess.title)
    if config is not None:
        load.check(source, tensors, param_shapes_of(guess.kind, config), f"{guess.title} (sizes of config.json)")
    tensors = load.translated(source, target, tensors)
    sizes = config if guess.kind == "transformer" else guess.config
    return Network(guess.kind, guess.title, sizes, guess.naming, naming, tensors, header)


def _naming(guess, layout: str | None) -> str:
    if layout is None:
        return guess.naming
    naming = _COMFY_NAMINGS.get(guess.kind, layout) if layout == "comfy" else layout
    if naming not in NAMINGS[guess.kind]:
        allowed = [name for name in NAMINGS[guess.kind] if name in LAYOUTS]
        allowed += ["comfy"] if guess.kind in _COMFY_NAMINGS else []
        raise ValueError(f"to is {layout!r}: for {with_article(guess.title)} it must be one of {', '.join(allowed)}")
    return naming


def _sizes_beside(path: Path, guess: WanConfig) -> WanConfig | None:
    """Sizes from the `config.json` next to a transformer; else from its shapes, if they determine the heads."""
    beside = path.with_name("config.json")
    if beside.is_file():
        try:
            config = read_config(beside)
        except ValueError:  # the config of something else
            config = None
        heads = {"num_heads": guess.num_heads, "text_len": guess.text_len, "eps": guess.eps}
        if config is not None and dataclasses.replace(config, **heads) == guess:
            return config
    # Every size of Wan has heads of 128 channels; other widths do not determine the number of heads.
    return guess if guess.dim % 128 == 0 else None


def without_tied(network: Network) -> Network:
    """The network without the second name of its embedding, as transformers and ComfyUI store it."""
    return dataclasses.replace(network, tensors=network.tensors.without(_TIED))


def with_tokenizer(network: Network, spiece: bytes) -> Network:
    """A text encoder with an extra tensor that stores its tokenizer, for ComfyUI.

    Args:
      network: the text encoder.
      spiece: contents of the tokenizer's `spiece.model`.
    """
    inner, value = network.tensors, np.frombuffer(spiece, np.uint8)
    tensors = TensorFile(
        inner.path,
        inner.shapes | {SPIECE: value.shape},
        inner.dtypes | {SPIECE: value.dtype},
        lambda name: value if name == SPIECE else inner[name],
        inner.metadata,
        inner.part,
        inner.close,
    )
    return dataclasses.replace(network, tensors=tensors)


def comfy_notes(network: Network) -> list[str]:
    """Warnings about settings that ComfyUI assumes and this network lacks; it reads sizes from shapes only."""
    if network.kind == "vae" and network.config.z_dim != 16:
        return [f"ComfyUI knows VAEs of 16 channels: this one has {network.config.z_dim}"]
    if network.kind == "umt5":
        name = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
        if network.tensors.shapes.get(name, (0,))[-1] != 4096:
            return ["ComfyUI knows this text encoder only in the size of UMT5-XXL"]
    if network.kind != "transformer" or network.config is None:
        return []
    config, fixed = network.config, {"eps": 1e-6, "freq_dim": 256, "patch": (1, 2, 2), "head_dim": 128}
    other = [f"{name} {getattr(config, name)}" for name, value in fixed.items() if getattr(config, name) != value]
    return (
        [f"ComfyUI takes {', '.join(f'{k} {v}' for k, v in fixed.items())}: here {', '.join(other)}"] if other else []
    )


def lost_notes(network: Network, to_torch: bool = False) -> list[str]:
    """Warnings about generation settings that the output file cannot store.

    Args:
      network: the network to write.
      to_torch: whether the output is a `.pt`, which cannot store the header of sf_jax.train.
    """
    if network.source == "rcm" and network.naming != "rcm":
        return [
            "under these names nothing says that the file is of NVlabs/rcm: generate with its own --chunk "
            "and --steps, others are not refused"
        ]
    header = network.header if to_torch else None
    if header is None:
        return []
    rollout, told = header.rollout, {"shift": f"{header.shift:g}"}
    if header.kind == "student":
        told = {"steps": ",".join(f"{step:g}" for step in rollout.steps)} | told
    if header.kind != "teacher":
        told |= {"chunk": rollout.chunk, "window": rollout.window, "sink": rollout.sink, "positions": rollout.positions}
    values = ", ".join(f"{name} {value}" for name, value in told.items())
    return [f"a .pt has no header: how this {header.kind} generates ({values}) is left out, .safetensors keeps it"]


def parse_size(text: str, field: str = "max_shard_size") -> int:
    """Parses a size such as "5GB" or "200MiB" into bytes.

    Raises:
      ValueError: if it is not a size, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if unit else 0
    if size < 1:
        raise ValueError(f"{field} is {text!r}: give a size above 0, such as 5GB, 200MB or 512KiB")
    return size


def shards(tensors: TensorFile, limit: int) -> list[list[str]]:
    """Tensor names of each file, in order; a file exceeds `limit` bytes only if a single tensor does."""
    files, size = [[]], 0
    for name in tensors:
        added = _nbytes(tensors, name)
        if files[-1] and size + added > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += added
    return files


def write_shards(
    folder: Path, stem: str, tensors: TensorFile, metadata: Mapping[str, str], limit: int
) -> Iterator[Path]:
    """Writes `STEM.safetensors`, or its shards and then their index, with the names that `save_pretrained` uses.

    Args:
      folder: the output folder.
      stem: beginning of the file names.
      tensors: the tensors to write.
      metadata: strings for the header of each file.
      limit: maximum bytes of tensors in a file.

    Yields:
      The path of each file before it is written.
    """
    files = shards(tensors, limit)
    if len(files) == 1:
        yield folder / f"{stem}.safetensors"
        write_safetensors(folder / f"{stem}.safetensors", tensors, metadata)
        return
    index = {}
    for i, names in enumerate(files):
        path = folder / f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors"
        index |= dict.fromkeys(names, path.name)
        yield path
        write_safetensors(path, tensors.renamed({name: name for name in names}), metadata)
    total = sum(_nbytes(tensors, name) for name in tensors)
    yield folder / f"{stem}.safetensors.index.json"
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", content)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file as diffusers does."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def progress(networks: Sequence[Network]) -> Iterator[list[Network]]:
    """The same networks; reading them updates a progress bar (bytes, remaining time). Short conversions show none."""
    total, terminal = sum(network.nbytes for network in networks), sys.stderr.isatty()
    options = {"unit": "B", "unit_scale": True, "dynamic_ncols": terminal, "mininterval": 0.5 if terminal else 15.0}
    with tqdm(total=total, desc="convert", disable=total < _LONG, **options) as bar:
        yield [dataclasses.replace(network, tensors=_counted(network.tensors, bar)) for network in networks]


def _counted(tensors: TensorFile, bar: tqdm) -> TensorFile:
    def read(name):
        value = tensors[name]
        bar.update(value.nbytes)
        return value

    args = (tensors.shapes, tensors.dtypes, read, tensors.metadata, tensors.part, tensors.close)
    return TensorFile(tensors.path, *args)


def _nbytes(tensors: TensorFile, name: str) -> int:
    return math.prod(tensors.shapes[name]) * tensors.dtypes[name].itemsize
