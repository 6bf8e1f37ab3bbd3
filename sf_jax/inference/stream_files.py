"""A stream in a file: it goes on in another process, to the same bits."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sf_jax.inference.stream_state import StreamSpec, StreamState
from sf_jax.weights.safetensors_io import open_safetensors, write_safetensors
from sf_jax.weights.tensors import TensorFile

FORMAT = "sf_jax stream 1"
KEYS_VALUES = ("k", "v")
SAMPLE = 256  # numbers of every parameter that the digest reads


def write(
    path: Path,
    spec: StreamSpec,
    params: dict,
    one: StreamState,
    host: dict[str, Any],
    embeddings: np.ndarray,
    compact: bool,
) -> None:
    """Writes a stream.

    Args:
      path: the file.
      spec: what the stream is compiled for; `read` refuses another.
      params: the student's parameters, by whose digest `read` knows them.
      one: the stream's state, with an axis of length 1.
      host: what the host knows of it, ready for JSON.
      embeddings: float32 [1 + n, S, D], of the prompt and of the chunks in which it changes.
      compact: whether to leave out keys and values.

    Raises:
      ValueError: if the path cannot be written.
    """
    arrays = {name: np.asarray(value) for name, value in _flat(one).items()}
    arrays = {name: value for name, value in arrays.items() if not (compact and name in KEYS_VALUES)}
    arrays["embeddings"] = embeddings
    tensors = TensorFile(
        path,
        {name: value.shape for name, value in arrays.items()},
        {name: value.dtype for name, value in arrays.items()},
        lambda name: np.ascontiguousarray(arrays[name]),
    )
    metadata = {"format": FORMAT, "host": json.dumps(host), "spec": json.dumps(_described(spec))}
    write_safetensors(path, tensors, metadata | {"weights": _digest(params)})


def read(
    path: Path, spec: StreamSpec, params: dict, like: StreamState
) -> tuple[StreamState, dict[str, Any], np.ndarray, bool]:
    """Reads what `write` wrote.

    Args:
      path: the file.
      spec: what the streams here are compiled for.
      params: the student's parameters.
      like: shapes of the stream's state.

    Returns:
      The state (its prompt's keys and values, and all keys and values of a compact file, are zeros), what the host
      knew, the embeddings, and whether the file is compact.

    Raises:
      ValueError: if the file is damaged, or of another model or other sizes.
    """
    try:
        file = open_safetensors(path)
    except OSError as error:
        raise ValueError(f"path: cannot read {path} ({error.strerror})") from error
    with file:
        if file.metadata.get("format") != FORMAT:
            raise ValueError(f"path: {path} is no stream that this version saved")
        for name, here in _described(spec).items():
            there = json.loads(file.metadata["spec"]).get(name)
            if there != here:
                raise ValueError(f"path: {path} was saved with {name} {there}: here it is {here}")
        if file.metadata["weights"] != _digest(params):
            raise ValueError(f"path: {path} was saved with other weights: load the same checkpoint")
        compact, arrays = not set(KEYS_VALUES) & set(file), {}
        for name, shape in _flat(like).items():
            if name not in file:
                arrays[name] = np.zeros(shape.shape, shape.dtype)
                if not (compact and name in KEYS_VALUES):
                    raise ValueError(f"path: {path} lacks {name}: another decoder, or a damaged file")
            elif file.shapes[name] != shape.shape or file.dtypes[name] != shape.dtype:
                raise ValueError(
                    f"path: {name} in {path} is {file.dtypes[name]} {file.shapes[name]}: "
                    f"here it is {shape.dtype} {shape.shape}"
                )
            else:
                arrays[name] = file[name]
        text = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like.text)
        leaves = jax.tree.unflatten(jax.tree.structure(like.replace(text=())), list(arrays.values()))
        return leaves.replace(text=text), json.loads(file.metadata["host"]), file["embeddings"], compact


def _flat(one: StreamState) -> dict[str, Any]:
    """The arrays by name, but for the prompt's keys and values, which its embedding gives again."""
    leaves = jax.tree_util.tree_leaves_with_path(one.replace(text=()))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _described(spec: StreamSpec) -> dict[str, Any]:
    """What must be the same where a stream goes on."""
    fields = {f"model.{name}": value for name, value in dataclasses.asdict(spec.model.config).items()}
    del fields["model.remat"], fields["model.attention"]
    fields |= {f"rollout.{name}": value for name, value in dataclasses.asdict(spec.rollout).items()}
    fields |= {"size": spec.size, "noise_number": spec.noise_number}
    return json.loads(json.dumps(fields))


def _digest(params: dict) -> str:
    """A digest of the first numbers of every parameter."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat = leaf.reshape(-1)[:SAMPLE]
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(flat).tobytes())
    return digest.hexdigest()
