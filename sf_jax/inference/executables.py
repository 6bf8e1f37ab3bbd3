"""A cache of serialized executables, so that a second start neither traces nor lowers programs.

JAX's own cache is keyed by the lowered program, and lowering takes longer than reading the result. Here the key is
everything that determines the lowered program: this package's code, the versions and settings of JAX, the devices, and
the shapes and constants of the call (for a custom decoder, its name and fields but not its code). If a file cannot be
read for any reason, JAX compiles the program.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import sf_jax
from sf_jax import compilation, files

FOLDER = "executables"
# Packages that affect compiled programs; qwix and the plugins may be missing.
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "qwix", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_PACKAGES += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
_HIT = "/jax/compilation_cache/cache_hits"
# An option's default value, which changes the key in JAX's cache, and a time longer than any compilation.
_APART, _NEVER = {"xla_embed_ir_in_executable": False}, 1e9
_CHECK = 32  # bytes of the hash at the start of a file
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


@dataclasses.dataclass(frozen=True, eq=False)
class Executables:
    """Compiled programs in a folder.

    A program's file holds machine code and a pickle of its arguments' structure. Like JAX's cache, it is therefore used
    only if it belongs to this user and is not world-writable.

    Attributes:
      folder: the folder of the files.
      loaded: programs that this process has read or compiled.
    """

    folder: Path
    loaded: dict = dataclasses.field(default_factory=dict, repr=False)

    def call(self, program: Callable, static: tuple[int, ...], *arguments, mesh: Mesh | None = None) -> Any:
        """Calls a program.

        Args:
          program: a function returned by `jax.jit`.
          static: indices of its static arguments.
          *arguments: all arguments.
          mesh: the mesh under which it is called.
        """
        constants = tuple(arguments[i] for i in static)
        rest = tuple(value for i, value in enumerate(arguments) if i not in static)
        leaves, tree = jax.tree.flatten(rest)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return program(*arguments)
        call = (program, constants, tree, tuple(map(_described, leaves)), _settings(), mesh)
        if call not in self.loaded:
            self.loaded[call] = self._load(call, arguments)
        return self.loaded[call](*rest)

    def _load(self, call: tuple, arguments: tuple) -> jax.stages.Compiled:
        """Reads a program from its file, or compiles it and writes the file."""
        path, devices = self.folder / f"{call[0].__name__}-{_digest(call)}", _devices(call)
        try:
            if compilation.is_private(path):
                content = path.read_bytes()
                check, content = content[:_CHECK], content[_CHECK:]
                if hashlib.sha256(content).digest() == check:
                    os.utime(path)  # in use, also where the file system records no reads
                    return serialize_executable.deserialize_and_load(*pickle.loads(content), None, devices)
        except Exception:  # no file, or a damaged one, for which pickle and XLA may raise anything
            pass
        compiled, is_new = _compile(call[0], arguments)
        if not is_new:
            return compiled
        try:
            content = pickle.dumps(serialize_executable.serialize(compiled))
            with files.replacing(path) as unfinished:
                unfinished.write_bytes(hashlib.sha256(content).digest() + content)
        except Exception:  # not all programs can be serialized, and the disk may be full
            pass
        return compiled


def _compile(program: Callable, arguments: tuple) -> tuple[jax.stages.Compiled, bool]:
    """A compiled program, and whether it can be written: XLA drops parts of programs from JAX's cache."""
    lowered, hits = program.lower(*arguments), _cache_hits()
    before = len(hits)
    if jax.default_backend() != "cpu":  # compilation takes minutes, and JAX's cache may have it from older code
        return lowered.compile(), len(hits) == before
    name = "jax_persistent_cache_min_compile_time_secs"
    least = getattr(jax.config, name)
    jax.config.update(name, _NEVER)
    try:
        return lowered.compile(_APART), len(hits) == before
    finally:
        jax.config.update(name, least)


@functools.cache
def _cache_hits() -> list[str]:
    """A list that grows whenever JAX reads a program from its cache."""
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event == _HIT else None)
    return hits


def executables() -> Executables | None:
    """The executables in the folder of JAX's cache; None without that cache (see `compilation.keep_compiled`)."""
    place = jax.config.jax_compilation_cache_dir
    if not place or "://" in place or not jax.config.jax_enable_compilation_cache or jax.process_count() > 1:
        return None
    folder = Path(place) / FOLDER
    _code()  # that of now, as the files may change while weights are loaded
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        return Executables(folder) if compilation.is_private(folder) and os.access(folder, os.W_OK) else None
    except OSError:
        return None


def _described(leaf: Any) -> tuple:
    """The properties of an argument that determine the compiled program."""
    aval = jax.typeof(leaf)
    sharding = leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None
    return aval.shape, aval.dtype, aval.weak_type, sharding


def _devices(call: tuple) -> list[jax.Device]:
    """The devices that a call runs on, in order."""
    *_, leaves, _, mesh = call
    places = [mesh, *(sharding for *_, sharding in leaves)]
    meshes = [place if isinstance(place, Mesh) else getattr(place, "mesh", None) for place in places]
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is not None:
        return list(mesh.devices.flat)
    return next((list(place.device_set) for place in places if place is not None), jax.devices()[:1])


def _digest(call: tuple) -> str:
    """A hash of a call and of everything else that determines its program."""
    program, constants, tree, leaves, settings, mesh = call
    leaves = [(shape, str(dtype), weak, _place(sharding)) for shape, dtype, weak, sharding in leaves]
    parts = (program.__module__, program.__name__, constants, tree, leaves, settings, _place(mesh), _surroundings())
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:40]


def _place(where: Any) -> tuple:
    """A description of a mesh or sharding with its devices."""
    mesh = where if isinstance(where, Mesh) else getattr(where, "mesh", None)
    devices = [] if where is None else mesh.devices.flat if mesh is not None else where.device_set
    return repr(where), [(device.id, device.device_kind) for device in devices]


@functools.cache
def _surroundings() -> tuple:
    """The code, the package versions and the machine."""
    device = jax.devices()[0]
    return (
        _code(),
        [_version(name) for name in _PACKAGES],
        sys.version,
        [os.environ.get(name) for name in _VARIABLES],
        (device.platform, device.device_kind, device.client.platform_version, jax.device_count()),
        compilation.processor(),
    )


def _version(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _settings() -> tuple:
    """JAX settings that may affect a program; not cached, as they may change while the process runs."""
    return tuple(sorted((name, repr(value)) for name, value in jax.config.values.items() if "cache" not in name))


@functools.cache
def _code() -> str:
    """A hash of this package's code when this was first called."""
    digest = hashlib.sha256()
    root = Path(sf_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
