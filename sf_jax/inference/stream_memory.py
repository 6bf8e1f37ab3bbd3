"""Device memory of endless streams, computed before any of it is allocated."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sf_jax.inference import stream_state
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.stream_state import StreamSpec
from sf_jax.models import partition
from sf_jax.parallel.mesh import videos_apart
from sf_jax.parallel.params import held_bytes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class StreamBytes:
    """Bytes of one stream among several.

    Attributes:
      cache: keys and values of its window.
      latents: its clean latents.
      prompt: keys and values of its prompt.
      decoder: the decoder's cache.
      workspace: its share of a step's temporary memory, including its frames.
    """

    cache: int
    latents: int
    prompt: int
    decoder: int
    workspace: int

    @property
    def total(self) -> int:
        """Total bytes."""
        return self.cache + self.latents + self.prompt + self.decoder + self.workspace

    def describe(self) -> str:
        """A one-line summary."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts = ", ".join(f"{name} {_size(value)}" for name, value in fields.items())
        return f"{_size(self.total)} ({parts})"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def check_slots(slots: int, mesh: Mesh | None) -> int:
    """Validates a number of streams and returns it as an int.

    Raises:
      ValueError: unless it is an integer, at least 1 and a multiple of the mesh's axis `data`.
    """
    if isinstance(slots, bool) or not isinstance(slots, (int, np.integer)) or slots < 1:
        raise ValueError(f"slots is {slots!r}: it must be a whole number of at least 1")
    if slots % videos_apart(mesh):
        raise ValueError(f"slots is {slots}: it must be a multiple of mesh.data, {videos_apart(mesh)}")
    return int(slots)


def bytes_per_stream(spec: StreamSpec, pipe: VideoPipeline, slots: int = 1) -> StreamBytes:
    """Memory of each of `slots` streams, from the shapes of the state and the memory plan of the compiled step.

    Only the compiler knows the workspace, so this compiles the step, without allocating anything. On a mesh, the bytes
    are those of one device: its part of each of its streams.
    """
    slots = check_slots(slots, pipe.mesh)
    state = jax.eval_shape(lambda: stream_state.empty_state(spec, pipe.decoder, slots))

    own = slots // videos_apart(pipe.mesh)

    def size(tree):
        return held_bytes(tree) // own

    active = jax.ShapeDtypeStruct((slots,), bool)
    if pipe.mesh is not None:
        state = pipe.run(_on_mesh, pipe, state)
    arguments = (spec, pipe.params, pipe.decoder, state, active)
    memory = pipe.run(lambda: stream_state.step.lower(*arguments).compile().memory_analysis())
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    workspace = (memory.temp_size_in_bytes + max(0, results)) // own
    return StreamBytes(
        size((state.k, state.v, state.sink_k)), size(state.latents), size(state.text), size(state.decoder), workspace
    )


def _on_mesh(pipe, state):
    """The state's shapes, with the shardings that `stream_state` uses on the mesh."""

    def leaf(a, *names):
        where = NamedSharding(pipe.mesh, partition.spec(a.shape, *names))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    return stream_state.by_place(leaf, state)


def check_memory(spec: StreamSpec, pipe: VideoPipeline, slots: int, memory: int | None) -> None:
    """Checks that the streams fit into memory, before anything is allocated.

    Args:
      spec: the streams' static settings.
      pipe: the pipeline of the streams.
      slots: number of streams.
      memory: bytes that the streams of one device may use; None is the free memory that the device reports (CPUs report
        none, which skips the check).

    Raises:
      ValueError: if they do not fit; names the number that would.
    """
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, (int, np.integer)) or memory < 0):
        raise ValueError(f"memory is {memory!r}: it must be a whole number of bytes")
    devices = jax.devices()[:1] if pipe.mesh is None else list(pipe.mesh.devices.flat)
    if memory is None:
        free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in map(_stats, devices) if stats]
        memory = min(free, default=None)
    if memory is None:
        return
    apart = videos_apart(pipe.mesh)
    own = slots // apart
    each = bytes_per_stream(spec, pipe, slots)
    if own * each.total <= memory:
        return
    fit, smaller = min(own - 1, memory // each.total), each
    while fit:  # the workspace is not exactly proportional to the slots
        smaller = bytes_per_stream(spec, pipe, fit * apart)
        if fit * smaller.total <= memory:
            break
        fit = min(fit - 1, memory // smaller.total)
    raise ValueError(
        f"slots is {slots}: a stream takes {each.describe()}, and {_size(memory)} are free on a device: "
        + (f"at most {fit * apart} fit" if fit else "not even one fits; take a smaller window or decoder")
    )


def _stats(device) -> dict | None:
    stats = device.memory_stats() or {}
    return stats if {"bytes_limit", "bytes_in_use"} <= set(stats) else None
