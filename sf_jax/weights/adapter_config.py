"""An adapter's scales in peft's config: `adapter_config.json`, or the header of a diffusers file."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from sf_jax.weights.tensors import TensorFile

METADATA = "lora_adapter_metadata"  # entry that diffusers writes to the safetensors header
CONFIG = "adapter_config.json"  # peft writes it next to the weights
# Fields of peft's LoraConfig that make an adapter more than a product of matrices.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "trainable_token_indices",
    "target_parameters",
)
# Initializations that change the base network.
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How peft scales the pairs of an adapter.

    Attributes:
      source: where these settings come from, for messages.
      rank: rank of layers that no pattern matches; None if not given.
      alpha: alpha of layers that no pattern matches; None if not given.
      rank_pattern: layer name pattern -> rank.
      alpha_pattern: layer name pattern -> alpha.
      rank_stabilized: whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
    """

    source: str
    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool

    def scale_of(self, layer: str, rank: int) -> float:
        """The scale of a pair of matrices.

        Args:
          layer: the file's name for the layer.
          rank: rank of the pair's tensors.

        Raises:
          ValueError: if the config has a different rank, or no alpha.
        """
        expected = _matching(self.rank_pattern, layer, self.rank)
        if expected is not None and expected != rank:
            raise ValueError(f"contradicts itself: {layer} has rank {rank}, {self.source} says {expected}")
        alpha = _matching(self.alpha_pattern, layer, self.alpha)
        if alpha is None:
            raise ValueError(f"lacks lora_alpha in {self.source}")
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def find_scaling(tensors: TensorFile) -> Scaling | None:
    """The scaling in the header of an adapter file or in the config next to it; None if there is neither.

    Raises:
      ValueError: if it is damaged, or if this kind of adapter cannot be applied.
    """
    if METADATA in tensors.metadata:
        source = f"its header ({METADATA})"
        values = _table(tensors.metadata[METADATA], source)
        # diffusers prefixes the keys with the component's name.
        parts = {key.removeprefix("transformer."): value for key, value in values.items() if key.startswith("transf")}
        return _parse(parts or values, source)
    path = Path(tensors.path).parent / CONFIG
    is_peft = Path(tensors.path).stem == "adapter_model" or any(name.startswith("base_model.") for name in tensors)
    if not is_peft or not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"has {path} beside it, which cannot be read ({error})") from error
    return _parse(_table(text, str(path)), str(path))


def _table(text: str, source: str) -> dict:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has {source}, which is no JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"has {source}, which is no JSON object")
    return values


def _parse(values: dict, source: str) -> Scaling:
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"is an adapter of peft's kind {kind!r} ({source}): only LORA can be merged")
    for field in _UNSUPPORTED:
        if values.get(field):
            raise ValueError(f"has {field} in {source}: such an adapter cannot be merged")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"has init_lora_weights {init!r} in {source}: it belongs to a network that this start had changed; convert "
            "it with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    rank, alpha = (_number(values.get(field), field, source) for field in ("r", "lora_alpha"))
    patterns = []
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(field) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"has {field} {pattern!r} in {source}: it must be an object")
        patterns.append({key: _number(value, f"{field} {key}", source) for key, value in pattern.items()})
    return Scaling(source, rank, alpha, *patterns, bool(values.get("use_rslora")))


def _number(value, field: str, source: str):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and value != 0):
        raise ValueError(f"has {field} {value!r} in {source}: it must be a number, not 0")
    return value


def _matching(patterns: Mapping[str, float], layer: str, default):
    """The value of the first pattern that matches the end of a layer's name, after a dot, as in peft."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").replace("\\.", ".")
        if name == layer or (not pattern.startswith("^") and layer.endswith(f".{name}")):
            return value
        if re.fullmatch(r"[\w.]+", name):
            continue
        # Repeated groups and many repetitions could backtrack forever on a crafted pattern.
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > 4:
            raise ValueError(f"has the pattern {pattern[:80]!r} in its config: it repeats groups, or more than 4 times")
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise ValueError(f"has the pattern {pattern[:80]!r} in its config, which is none ({error})") from error
    return default
