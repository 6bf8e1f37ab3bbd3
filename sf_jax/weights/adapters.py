"""Reads adapters (LoRA, arXiv 2106.09685) of other programs and merges them into a transformer during loading.

Supported files: those of diffusers and peft, kohya and musubi, ComfyUI, lightx2v and CausVid, and LongLive's `.pt`. For
every layer, `weight + scale * alpha / rank * up @ down` is computed in float32 and rounded once. A tensor that cannot
be applied is an error; none is skipped.

Source of the scales: diffusers `loaders/lora_conversion_utils.py` and peft `tuners/lora/layer.py`; of the names and
differences, also ComfyUI `comfy/lora.py` and LightX2V `tools/extract`.
"""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sf_jax.models.wan import WanConfig, param_shapes
from sf_jax.weights import adapter_names, hub, mapping, transformer
from sf_jax.weights.adapter_config import Scaling, find_scaling
from sf_jax.weights.adapter_list import Lora
from sf_jax.weights.files import open_tensors
from sf_jax.weights.load import check, normalized
from sf_jax.weights.mapping import Entry
from sf_jax.weights.places import ADAPTER_FILES
from sf_jax.weights.recognize import recognize
from sf_jax.weights.tensors import TensorFile, cast, is_float

# The part of LongLive's checkpoints that holds adapters; its training sets alpha to the rank.
_LONGLIVE = "generator_lora"


@dataclasses.dataclass(frozen=True)
class Change:
    """What an adapter adds to one tensor of the network.

    Attributes:
      names: the file's tensors: (down, up), or the single one to add.
      scale: factor without the scale of the whole adapter; `alpha / rank` for a pair.
      rank: rank of the pair; None for a difference.
    """

    names: tuple[str, ...]
    scale: float
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter file.

    Attributes:
      lora: its path and scale.
      tensors: the file.
      changes: official name of a tensor of the network -> the changes to add to it.
    """

    lora: Lora
    tensors: TensorFile
    changes: Mapping[str, Sequence[Change]]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its pairs."""
        return tuple(sorted({change.rank for change in self._all if change.rank is not None}))

    @property
    def _all(self) -> list[Change]:
        return [change for changes in self.changes.values() for change in changes]

    def describe(self) -> str:
        """Describes the file, scale, rank and the tensors it changes."""
        blocks = sorted({int(match[1]) for name in self.changes if (match := re.match(r"blocks\.(\d+)\.", name))})
        rank = (
            f", rank {' to '.join(str(rank) for rank in {self.ranks[0]: 0, self.ranks[-1]: 0})}" if self.ranks else ""
        )
        where = f", {len(self.changes)} tensors" + (f" of blocks {blocks[0]} to {blocks[-1]}" if blocks else "")
        return f"adapter {self.lora.path.name} (scale {self.lora.scale:g}{rank}{where})"

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the adapter fits a network.

        Args:
          shapes: official name -> shape of the network's tensors.

        Raises:
          ValueError: naming tensors that the network lacks, or whose shapes differ.
        """
        absent = [name for name in self.changes if name not in shapes]
        if absent:
            blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
            raise ValueError(
                f"lora {self.lora.path} changes {len(absent)} tensors that the network does not have, such as "
                f"{absent[0]}: the network has {blocks} layers"
            )
        wrong = []
        for name, changes in self.changes.items():
            for change in changes:
                if abs(change.scale * self.lora.scale) > float(np.finfo(np.float32).max):
                    raise ValueError(
                        f"lora {self.lora.path} has the scale {self.lora.scale:g}: it makes what is added to {name} "
                        "larger than every float32, give a scale near 1"
                    )
                there = [self.tensors.shapes[part] for part in change.names]
                if not _fits(there, shapes[name]):
                    wrong.append(f"{' and '.join(change.names)} {' and '.join(map(str, there))} for {shapes[name]}")
        if wrong:
            raise ValueError(
                f"lora {self.lora.path} is of a network of other sizes: {len(wrong)} of its changes do not fit, such "
                f"as {wrong[0]}"
            )

    def addition(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The sum to add to a tensor of the network.

        Args:
          name: the tensor's official name, one of `changes`.
          shape: its shape.

        Returns:
          float32 array of that shape.

        Raises:
          ValueError: if a number is not finite.
        """
        total = np.zeros(shape, np.float32)
        for change in self.changes[name]:
            parts = [np.asarray(self.tensors[part]).astype(np.float32) for part in change.names]
            value = parts[0]
            if change.rank is not None:
                down, up = parts
                value = up.reshape(-1, change.rank) @ down.reshape(change.rank, -1)
            if not np.isfinite(value).all():
                raise ValueError(f"lora {self.lora.path}: what it adds to {name} is not finite, the file is damaged")
            with np.errstate(over="ignore"):
                total += np.float32(change.scale * self.lora.scale) * value.reshape(shape)
        if not np.isfinite(total).all():
            raise ValueError(
                f"lora {self.lora.path} has the scale {self.lora.scale:g}: what it adds to {name} is above every "
                "float32, give a scale near 1"
            )
        return total


def _fits(there: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether the shapes of a pair or a difference match a tensor of the network."""
    if len(there) == 1:
        return [side for side in there[0] if side != 1] == [side for side in shape if side != 1]
    down, up = there
    if len(shape) < 2 or min(len(down), len(up)) < 2 or not down[0]:
        return False
    columns = math.prod(shape[1:])
    sizes = math.prod(down[1:]) == columns and up[0] == shape[0] and math.prod(up[1:]) == down[0]
    return sizes and down[1] in (shape[1], columns)


def is_adapter(path: Path | str) -> bool:
    """Whether a file or a peft folder, local or on the hub, is an adapter; False if it cannot be read.

    A checkpoint with several networks does not count, unless it contains only adapters, like LongLive's.
    """
    try:
        path = Path(hub.local_file(path))
    except ValueError:
        return False
    if path.is_dir():
        return any((path / name).is_file() for name in ADAPTER_FILES)
    for part in (None, _LONGLIVE):
        try:
            with open_tensors(path, part, need_part=False) as tensors:
                return any(adapter_names.is_adapter_name(name) for name in tensors)
        except ValueError:
            continue
    return False


def open_adapter(lora: Lora | Path | str) -> Adapter:
    """Opens an adapter file and reads only names, shapes and scales. The caller closes `tensors`.

    Raises:
      ValueError: if the file is missing, damaged or not an adapter, or if this kind of adapter cannot be applied.
    """
    lora = lora if isinstance(lora, Lora) else Lora(Path(lora))
    try:
        path = Path(hub.local_file(lora.path))
        if path.is_dir():
            path = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), path)
        tensors = open_tensors(path, _LONGLIVE, need_part=False)
    except ValueError as error:
        raise ValueError(f"lora: {error}") from error
    try:
        return Adapter(lora, tensors, _changes(tensors))
    except ValueError as error:
        tensors.close()
        raise ValueError(f"lora {lora.path} {error}") from error


def _changes(tensors: TensorFile) -> dict[str, list[Change]]:
    """The changes to each tensor of the network, by official name."""
    _refuse_others(tensors)
    groups: dict[tuple[str, str], dict[str, str]] = {}
    layers, unknown, adapters = {}, [], set()
    for name in tensors:
        place = adapter_names.place_of(name)
        if place is None:
            unknown.append(name)
            continue
        kind = place.role if place.role in ("bias", "difference") else "pair"
        group = groups.setdefault((place.tensor, kind), {})
        adapters |= {place.adapter} - {None}
        if len(adapters) > 1:
            raise ValueError(f"holds several adapters, {', '.join(sorted(adapters))}: give a file for each")
        if place.role in group:
            raise ValueError(f"changes {place.tensor} twice, by {group[place.role]} and {name}")
        group[place.role], layers[place.tensor] = name, place.layer
        if not is_float(tensors.dtypes[name]) and place.role != "alpha":
            raise ValueError(f"has numbers that are no floats: {name} is {tensors.dtypes[name]}")
    if unknown:
        raise ValueError(
            f"has {len(unknown)} tensors of {len(tensors)} that belong to no layer of Wan's text-to-video transformer, "
            f"such as {', '.join(sorted(unknown)[:3])}"
        )
    scaling = find_scaling(tensors)
    if scaling is None and not any("alpha" in group for group in groups.values()):
        _warn_without_alpha(tensors)
    changes: dict[str, list[Change]] = {}
    scales = {}
    for (tensor, kind), group in sorted(groups.items(), key=lambda item: item[0][1] != "pair"):
        if kind == "pair":
            change = _pair(tensors, tensor, group, scaling, layers[tensor])
            scales[tensor.removesuffix(".weight")] = change.scale if "alpha" not in group else 1.0
        elif kind == "bias":
            # peft scales a bias like its pair.
            layer = tensor.removesuffix(".bias")
            if layer not in scales:
                raise ValueError(f"has {group['bias']} without the pair of matrices that it belongs to")
            change = Change((group["bias"],), scales[layer])
        else:
            change = Change((group["difference"],), 1.0)
        changes.setdefault(tensor, []).append(change)
    return changes


def _refuse_others(tensors: TensorFile) -> None:
    """Raises for files that are not adapters, and for kinds of adapters that cannot be applied."""
    for name in tensors:
        title = adapter_names.unsupported(name) if adapter_names.is_adapter_name(name) else None
        if title is not None:
            raise ValueError(f"is {title}, which cannot be merged ({name})")
    if not any(adapter_names.is_adapter_name(name) for name in tensors):
        guess = recognize(tensors.shapes, tensors.metadata)
        raise ValueError(f"is no adapter: it seems to be: {guess.description}")


def _pair(tensors: TensorFile, tensor: str, group: dict, scaling: Scaling | None, layer: str) -> Change:
    missing = [role for role in ("down", "up") if role not in group]
    if missing:
        there = next(iter(group.values()))
        raise ValueError(f"has {there} without the {missing[0]} matrix that it belongs to")
    shape = tensors.shapes[group["down"]]
    rank = shape[0] if shape else 0
    if rank < 1:
        raise ValueError(f"has no rank: {group['down']} is {shape}")
    scale = 1.0
    if "alpha" in group:
        value = np.asarray(tensors[group["alpha"]]).astype(np.float64).reshape(-1)
        if value.size != 1 or not np.isfinite(value[0]) or value[0] == 0:
            raise ValueError(f"has {group['alpha']} {value.tolist()[:4]}: alpha must be one number, not 0")
        scale = float(value[0]) / rank
    if scaling is not None:
        config_scale = scaling.scale_of(layer, rank)
        if "alpha" in group and not math.isclose(config_scale, scale, rel_tol=1e-5):
            raise ValueError(
                f"contradicts itself: {group['alpha']} makes the scale of {tensor} {scale:g}, {scaling.source} makes "
                f"it {config_scale:g}"
            )
        scale = config_scale
    return Change((group["down"], group["up"]), scale, rank)


def _warn_without_alpha(tensors: TensorFile) -> None:
    """Warns if alpha is unknown: peft stores it in a separate file."""
    if tensors.part != _LONGLIVE and any(name.startswith("base_model.model.") for name in tensors):
        warnings.warn(
            f"lora {tensors.path} is of peft, and no adapter_config.json beside it says its alpha: it is taken to be "
            "the rank; if it is not, give the scale alpha / rank behind the name",
            stacklevel=2,
        )


@contextlib.contextmanager
def opened(loras: Iterable[Lora]) -> Iterator[list[Adapter]]:
    """Context manager that opens adapters and closes their files at the end.

    Raises:
      ValueError: see `open_adapter`.
    """
    with contextlib.ExitStack() as stack:
        adapters = []
        for lora in loras:
            adapters.append(open_adapter(lora))
            stack.enter_context(adapters[-1].tensors)
        yield adapters


def official_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of the tensors of a transformer."""
    return mapping.file_shapes(transformer.entries(config), param_shapes(config))


def describe(loras: Iterable[Lora]) -> tuple[str, ...]:
    """The result of `Adapter.describe` for each."""
    with opened(loras) as adapters:
        return tuple(adapter.describe() for adapter in adapters)


def check_loras(loras: Sequence[Lora], config: WanConfig) -> None:
    """Checks that adapters fit a transformer, from names and shapes only.

    Raises:
      ValueError: see `open_adapter` and `Adapter.check`.
    """
    if loras:
        with opened(loras) as adapters:
            shapes = official_shapes(config)
            for adapter in adapters:
                adapter.check(shapes)


def merged(
    tensors: TensorFile, loras: Sequence[Lora], config: WanConfig | None = None, wide: bool = False
) -> TensorFile:
    """A transformer's weights merged with adapters; each tensor is merged when it is read.

    Args:
      tensors: weights of the transformer with official or diffusers' names, which may have wrappers.
      loras: the adapters; if empty, `tensors` is returned unchanged.
      config: sizes of the transformer; None takes them from the file.
      wide: return the changed tensors in float32, for a caller that rounds them; otherwise in their own type.

    Returns:
      The tensors with their own names, without wrappers. Closing it also closes the adapters.

    Raises:
      ValueError: if the weights are not a transformer's, or an adapter does not fit or cannot be applied.
    """
    if not loras:
        return tensors
    guess = recognize(tensors.shapes)
    if guess.kind != "transformer":
        raise ValueError(
            f"lora: adapters are merged into a transformer, {tensors.path} seems to be: {guess.description}"
        )
    config = config or guess.config
    entries, official = transformer.entries(config, guess.naming), transformer.entries(config)
    tensors, like = normalized(tensors, (entry.name for entry in entries)), param_shapes(config)
    check(entries, tensors, like, "transformer")
    shapes = mapping.file_shapes(official, like)
    with contextlib.ExitStack() as opening:
        adapters = opening.enter_context(opened(loras))
        for adapter in adapters:
            adapter.check(shapes)
        stack = opening.pop_all()
    stack.callback(tensors.close)
    by_place = {(entry.path, entry.layer): entry for entry in official}
    targets = {entry.name: (entry, by_place[entry.path, entry.layer]) for entry in entries}
    changed = {
        name for name, (_, target) in targets.items() if any(target.name in adapter.changes for adapter in adapters)
    }
    dtypes = {name: np.dtype(np.float32) if wide and name in changed else tensors.dtypes[name] for name in tensors}

    def read(name: str) -> np.ndarray:
        if name not in changed:
            return tensors[name]
        entry, target = targets[name]
        total = tensors[name].astype(np.float32)
        for adapter in adapters:
            if target.name in adapter.changes:
                total += _turned(adapter.addition(target.name, shapes[target.name]), entry, target, total.shape)
        return cast(total, dtypes[name], f"lora: {name} with what is added to it")

    return TensorFile(tensors.path, tensors.shapes, dtypes, read, tensors.metadata, tensors.part, stack.close)


def _turned(value: np.ndarray, entry: Entry, official: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """Converts an official tensor to the layout of another name map."""
    return value if value.shape == shape else entry.layout.theirs(official.layout.ours(value))


def merge_params(params: dict, config: WanConfig, loras: Sequence[Lora]) -> dict:
    """Merges adapters into a transformer's parameters (float32 numpy).

    Args:
      params: our parameter tree.
      config: sizes of the transformer.
      loras: the adapters.

    Raises:
      ValueError: see `merged`.
    """
    if not loras:
        return params
    entries = transformer.entries(config)
    tensors = mapping.to_tensors(entries, params)
    shapes = {name: value.shape for name, value in tensors.items()}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    with merged(TensorFile("parameters", shapes, dtypes, tensors.__getitem__), loras, config, wide=True) as changed:
        return mapping.to_params(entries, changed, param_shapes(config), "transformer", np.float32)
