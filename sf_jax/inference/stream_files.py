"""Stream files, from which another process can continue a stream.

With the same number of slots, it continues bit-identically, unless the file is compact or the networks have different
forms (`WanConfig.scan_layers`).
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sf_jax import strict_json
from sf_jax.inference import stream_forms
from sf_jax.inference.prompt_change import MODES
from sf_jax.inference.stream_state import StreamSpec, StreamState
from sf_jax.messages import quoted
from sf_jax.models.eight_bit import Scaled
from sf_jax.models.slots import QKV, stack_layers
from sf_jax.weights.safetensors_io import open_safetensors, write_safetensors
from sf_jax.weights.tensors import TensorFile

FORMAT = "sf_jax stream 5"
KEYS_VALUES = ("k", "v", "sink_k")
SAMPLE = 4  # entries per axis that the digest reads; of the first axis (the layers) it reads all


def write(
    path: Path,
    spec: StreamSpec,
    weights: Any,
    one: StreamState,
    host: dict[str, Any],
    embeddings: np.ndarray,
    compact: bool,
) -> None:
    """Writes a stream.

    Args:
      path: the file.
      spec: the stream's static settings, which must match in `read`.
      weights: `params` of the student and `decoder`; `read` compares their digest.
      one: the stream's state, with a stream axis of length 1.
      host: the host's state of the stream, JSON-serializable.
      embeddings: float32 [1, S, D] of the prompt, or [3, S, D] with the old and the new one of a pending change.
      compact: whether to omit keys and values.

    Raises:
      ValueError: if the path cannot be written.
    """
    if compact:
        one = one.replace(**dict.fromkeys(KEYS_VALUES, ()))
    arrays = _flat(stream_forms.to_file(jax.tree.map(np.asarray, one.replace(text=()))))
    arrays["embeddings"] = embeddings
    tensors = TensorFile(
        path,
        {name: value.shape for name, value in arrays.items()},
        {name: value.dtype for name, value in arrays.items()},
        lambda name: np.ascontiguousarray(arrays[name]),
    )
    metadata = {"format": FORMAT, "host": json.dumps(host), "spec": json.dumps(_described(spec))}
    write_safetensors(path, tensors, metadata | {"weights": _digest(weights)})


def read(
    path: Path, spec: StreamSpec, weights: Any, like: StreamState
) -> tuple[StreamState, dict[str, Any], np.ndarray, bool]:
    """Reads a file that `write` wrote.

    Args:
      path: the file.
      spec: the static settings of the streams here.
      weights: `params` of the student and `decoder`.
      like: shapes of the stream's state.

    Returns:
      The state, the host's state, the embeddings, and whether the file is compact. The prompt's keys and values in the
      state are zeros, as are all other keys and values from a compact file.

    Raises:
      ValueError: if the file is damaged, or was written with another model or other sizes.
    """
    try:
        file = open_safetensors(path)
    except OSError as error:
        raise ValueError(f"path: cannot read {path} ({error.strerror})") from error
    with file:
        if file.metadata.get("format") != FORMAT:
            raise ValueError(
                f"path: {path} has the format {quoted(file.metadata.get('format'))}: it must be {FORMAT!r}"
            )
        try:
            described, host = (strict_json.parse(file.metadata[name]) for name in ("spec", "host"))
            there, embeddings = file.metadata["weights"], file["embeddings"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"path: {path} is damaged ({error})") from error
        for name, here in _described(spec).items():
            if described.get(name) != here:
                raise ValueError(f"path: {path} was saved with {name} {quoted(described.get(name))}: here it is {here}")
        if there != _digest(weights):
            raise ValueError(f"path: {path} was saved with other weights: load the same checkpoint and decoder")
        compact, arrays = not any(map(_is_cache, file)), {}
        if not compact:
            here, like = like, stream_forms.file_shapes(path, spec, like, slots="k.0" in file)
        for name, shape in _flat(like).items():
            if compact and _is_cache(name):
                arrays[name] = np.zeros(shape.shape, shape.dtype)
            elif name not in file:
                raise ValueError(f"path: {path} is damaged ({name} is missing)")
            elif file.shapes[name] != shape.shape or file.dtypes[name] != shape.dtype:
                raise ValueError(
                    f"path: {name} in {path} is {file.dtypes[name]} {file.shapes[name]}: "
                    f"here it is {shape.dtype} {shape.shape}"
                )
            else:
                arrays[name] = file[name]
    leaves = jax.tree.unflatten(jax.tree.structure(like.replace(text=())), list(arrays.values()))
    _check_host(path, host, leaves, embeddings)
    one = leaves.replace(text=jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like.text))
    return one if compact else stream_forms.from_file(spec, one, here), host, embeddings, compact


def ordered_scale(one: StreamState) -> np.ndarray:
    """A stream's `value_scale` [capacity] after its frames have been computed again, oldest first."""
    held, scale = np.asarray(one.held[0]), np.asarray(one.value_scale[0])
    oldest_first = scale[np.argsort(np.where(held < 0, np.iinfo(np.int32).max, held), kind="stable")]
    return np.where(np.arange(held.size) < (held >= 0).sum(), oldest_first, 1.0)


def _is_cache(name: str) -> bool:
    """Whether an array holds keys or values, or their scales."""
    return name.partition(".")[0] in KEYS_VALUES


def _check_host(path: Path, host: Any, one: StreamState, embeddings: np.ndarray) -> None:
    """Checks that the host's state is consistent with the stream's."""

    def whole(values):
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    kept = int((one.held >= 0).sum())
    wanted = {"frames", "position", "sizes"}
    good = isinstance(host, dict) and wanted <= set(host) <= wanted | {"change"}
    good = good and whole([host["frames"], host["position"]]) and whole(host["sizes"]) and sum(host["sizes"]) == kept
    rows, change = 1, host.get("change") if good else None
    if change is not None:
        rows = 3
        good = isinstance(change, list) and len(change) == 4 and isinstance(change[0], list) and change[1] in MODES
        good = good and change[0] and change[0][-1] == 1 and all(type(w) is float and 0 < w <= 1 for w in change[0])
        good = good and isinstance(change[2], (int, float, type(None)))
        good = good and isinstance(change[3], (int, float)) and 0 <= change[3] < 1
    good = good and bool(np.all((one.value_scale > 0) & (one.value_scale < np.inf)))
    if not good or embeddings.ndim != 3 or len(embeddings) != rows:
        raise ValueError(f"path: {path} is damaged (its counters do not fit its frames)")


def _flat(one: StreamState) -> dict[str, Any]:
    """The arrays by name, except the prompt's keys and values, which are recomputed from its embedding."""
    leaves = jax.tree_util.tree_leaves_with_path(one.replace(text=()))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _described(spec: StreamSpec) -> dict[str, Any]:
    """The settings that must match for a stream to continue."""
    fields = {f"model.{name}": value for name, value in dataclasses.asdict(spec.model.config).items()}
    for name in ("remat", "attention", "scan_layers"):  # these only change how it is computed
        del fields[f"model.{name}"]
    fields |= {f"rollout.{name}": value for name, value in dataclasses.asdict(spec.rollout).items()}
    fields |= {"size": spec.size, "noise_number": spec.noise_number, "cache_dtype": spec.cache_dtype}
    return json.loads(json.dumps(fields))


def _digest(weights: Any) -> str:
    """A digest of samples of `params` and `decoder` from every layer; the same for stacked and separate layers."""
    digest = hashlib.sha256()
    samples = {"params": _sampled(weights["params"]), "decoder": jax.tree.map(_sample, weights["decoder"])}
    for path, leaf in jax.tree_util.tree_leaves_with_path(samples):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _sample(leaf):
    """Samples of an array, for all of its first axis."""
    return np.asarray(leaf[tuple(slice(SAMPLE if axis else None) for axis in range(np.ndim(leaf)))])


def _sampled(params):
    """Samples of the student's parameters, for all layers."""
    if "blocks" not in params:
        few = {name: _few(params[name]) for name in _layers(params)}
        params = stack_layers(params | few)
    return jax.tree.map(_sample, params)


def _few(block):
    """Samples of a separate layer, of each projection if they are joined; copies nothing else."""
    few = jax.tree.map(lambda a: a[(slice(SAMPLE),) * a.ndim], block)
    joined = block["self_attn"].get("qkv")
    if joined is None:
        return few
    narrow = isinstance(joined["kernel"], Scaled)  # [3 * out, in]

    def third(number):
        def samples(a, axis):
            first = number * (a.shape[axis] // len(QKV))
            own = [slice(SAMPLE)] * a.ndim
            own[axis] = slice(first, first + SAMPLE)
            return a[tuple(own)]

        kernel = jax.tree.map(lambda a: samples(a, 0 if narrow else -1), joined["kernel"])
        return {"kernel": kernel, "bias": samples(joined["bias"], -1)}

    few["self_attn"] = {name: value for name, value in few["self_attn"].items() if name != "qkv"}
    few["self_attn"] |= {name: third(i) for i, name in enumerate(QKV)}
    return few


def _layers(params):
    return [name for name in params if name.startswith("blocks_")]
