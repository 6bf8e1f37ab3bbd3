"""Reads and writes PyTorch pickles; the only module that imports PyTorch, and only on use."""

import collections
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from sf_jax.files import replacing
from sf_jax.messages import quoted, shortened, with_article
from sf_jax.weights.tensors import TensorFile, check_announced, checked_tensor, empty_aligned
from sf_jax.weights.torch_archive import check_container, record_sizes

# In older versions, crafted files execute code (CVE-2025-32434, before 2.6) or corrupt memory (CVE-2026-24747).
OLDEST_TORCH = (2, 10)
# How often tensors may share storage on average; tied embeddings and whole copies under a second name do.
MAX_SHARING = 4
_PROTOCOL = 2  # pickle protocol of torch.save
# State dicts in Self Forcing's checkpoints; generation uses the earliest present of the first three.
PARTS = ("generator_ema", "generator", "model", "critic")
# Trainers' keys for the state dict itself, inside a checkpoint or one of its parts.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model", "params", "net", "ema", "model_ema", "ema_model")
# Keys that trainers store next to the tensors of a state dict.
_BESIDE = ("step", "global_step", "iteration", "iter", "epoch", "config", "args", "cfg", "hparams", "hyper_parameters")
_BESIDE += ("metadata", "version", "pytorch-lightning_version", "optimizer", "scheduler", "lr_scheduler")

_SHARDED = (
    "holds DTensors, the sharded tensors of FSDP: write them whole where they are, torch.save({name: "
    "tensor.full_tensor() for name, tensor in state.items()}, FILE), or save with torch.distributed.checkpoint and "
    "convert its folder with python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUTPUT.pt"
)


def _import_torch(path: Path):
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file, for which PyTorch is needed: pip install 'sf_jax[convert]'"
        ) from error
    version = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if version is None or tuple(map(int, version.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ValueError(
            f"{path} is a PyTorch file and PyTorch is {torch.__version__}, in which such files can run code or damage "
            f"memory: it must be {oldest} or newer, pip install 'torch>={oldest}'"
        )
    return torch


def _torch_types(torch) -> dict:
    """PyTorch's types that numpy lacks -> (an integer type of the same width, the type in `ml_dtypes`)."""
    return {
        torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
        torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
        torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
    }


def _numpy_types(torch) -> dict:
    """All supported PyTorch types -> numpy types."""
    names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8")
    names += ("uint64", "uint32", "uint16", "uint8", "bool")
    return {getattr(torch, name): np.dtype(name) for name in names} | {
        theirs: ours for theirs, (_, ours) in _torch_types(torch).items()
    }


def open_torch(path: Path, part: str | None, need_part: bool = True) -> TensorFile:
    """Opens a file of `torch.save`: a state dict, or a checkpoint with one or several; see `open_tensors`."""
    torch = _import_torch(path)
    views, types = _torch_types(torch), _numpy_types(torch)
    protocol = check_container(path)
    content = _load_pickle(torch, path, protocol)
    _check_records(torch, content, path)
    held, part = _state_dict(torch, content, path, part, need_part)
    if any(type(value).__name__ in ("DTensor", "ShardedTensor") for value in held.values()):
        raise ValueError(f"{path} {_SHARDED}")
    faults = {name: fault for name, value in held.items() if (fault := _fault(torch, types, name, value))}
    if faults or not held:
        name, fault = next(iter(faults.items()), ("", ""))
        what = f"{quoted(name)} and {len(faults) - 1} more are no plain tensors ({fault})" if faults else "it is empty"
        raise ValueError(f"{path} does not hold the tensors of a network: {what}")
    try:
        check_announced({name: tuple(value.shape) for name, value in held.items()})
        _check_total(held.values(), path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{path} is refused: {error}") from error

    def read(name):
        tensor = held[name].resolve_neg()
        out = empty_aligned(tuple(tensor.shape), dtypes[name])
        if tensor.dtype in views:
            tensor = tensor.contiguous().view(views[tensor.dtype][0])
            out.view(tensor.numpy().dtype)[...] = tensor.numpy()
        else:
            out[...] = tensor.numpy()
        return out

    held = {name: value.detach() for name, value in held.items()}
    dtypes = {name: types[value.dtype] for name, value in held.items()}
    return TensorFile(path, {n: tuple(v.shape) for n, v in held.items()}, dtypes, read, None, part, held.clear)


def _fault(torch, types: dict, name, value) -> str | None:
    """The reason why an entry of a state dict is not a plain tensor, or None."""
    if not isinstance(name, str):
        return f"its key is {with_article(type(name).__name__)}"
    if not isinstance(value, torch.Tensor):
        return f"it is {with_article(type(value).__name__)}"
    if value.is_nested:
        return "it is a nested tensor"
    if value.layout != torch.strided:
        return f"it is a sparse tensor, {value.layout}"
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"it is {with_article(type(value).__name__)}"
    if value.is_quantized:
        return f"it is quantized, {value.dtype}"
    if value.is_meta:
        return "it is a tensor without numbers, of the device meta"
    if value.dtype not in types:
        return f"it is of {value.dtype}, allowed: {', '.join(str(dtype) for dtype in types.values())}"
    size, stored = value.numel() * value.itemsize, value.untyped_storage().nbytes()
    if size > stored:
        return f"it repeats its {stored} bytes to {size}"
    return None


def _check_total(tensors: Iterable, size: int) -> None:
    """Raises if tensors share storage so much that they far exceed the file's size; some sharing is normal."""
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    if total > MAX_SHARING * size:
        raise ValueError(
            f"its tensors have {total} bytes, the file {size}, and share them more than {MAX_SHARING} times"
        )


def _check_records(torch, content, path: Path) -> None:
    """Raises if a storage's size matches no record: memory mapping would read beyond the record's end."""
    sizes = record_sizes(path)
    if sizes is None:
        return
    stack, storages, plain = [content], {}, (torch.Tensor, torch.nn.Parameter)
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value
        elif type(value) in plain and value.layout == torch.strided and not (value.is_meta or value.is_nested):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    odd = collections.Counter(size for size in storages.values() if size) - sizes
    if odd:
        raise ValueError(
            f"{path} is damaged: its pickle tells of {min(odd)} bytes of numbers, and no record of it has so many"
        )


def _load_pickle(torch, path: Path, protocol: int):
    """The contents of a pickle, memory-mapped if its format and name allow it."""
    # PyTorch's own messages advise users to load such files unsafely.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.name.endswith(".safetensors"):  # torch.load would assume another format
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            try:
                return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(str(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if re.search("DTensor|ShardedTensor|sharded_tensor", str(error)):
            raise ValueError(f"{path} {_SHARDED}") from error
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"it asks for {shortened(code.group(1), 80)}"
        elif protocol != _PROTOCOL:
            reason = f"its pickle is of protocol {protocol}, torch.save writes {_PROTOCOL}: save it again"
        else:
            reason = "its pickle has instructions that torch.save never writes"
        raise ValueError(
            f"{path} is refused: it holds more than tensors, which could run code ({reason}); nothing of it was run"
        ) from error
    except Exception as error:  # Damaged pickles can make PyTorch raise almost anything.
        raise ValueError(
            f"{path} is no readable PyTorch file, perhaps an unfinished download ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """PyTorch's message about a damaged file, unless it advises loading the file anyway."""
    text = shortened((str(error).splitlines() or [""])[0], 200)
    return text if text and not re.search(r"weights_only|torch\.load|trust", text) else type(error).__name__


def _state_dict(torch, held, path: Path, part: str | None, need_part: bool) -> tuple[dict, str | None]:
    """The state dict to read, and its name in the checkpoint; None if it is the only one and its name is unknown."""
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds {with_article(type(held).__name__)}, not the tensors of a network by name")
    parts = [name for name, value in held.items() if isinstance(value, Mapping) and isinstance(name, str)]
    inner = {name: _unwrapped(torch, held[name]) for name in parts if name not in _BESIDE}
    networks = {name: value for name, value in inner.items() if value is not None}
    flat = any(isinstance(value, torch.Tensor) for value in held.values())
    if flat and not networks:
        return {name: value for name, value in held.items() if not _is_beside(torch, name, value)}, None
    if not parts:
        return dict(held), None
    names = shortened(", ".join(parts[:8]))
    # A lone network is a fallback only if its name is not one of the known parts, such as the critic.
    alone = next(iter(networks)) if len(networks) == 1 and not set(networks) & set(PARTS) else None
    wanted = part
    if part is None:
        wanted = next((name for name in PARTS[:3] if name in parts), alone)
    elif part not in parts and not need_part:
        wanted = alone
    if wanted not in parts:
        fault = f"{path} holds {names}"
        raise ValueError(f"{fault}: say which with part" if part is None else f"part is {part!r}: {fault}")
    held = networks.get(wanted, held[wanted])
    held = {name: value for name, value in held.items() if not _is_beside(torch, name, value)}
    return held, wanted if wanted in PARTS or wanted == part else None


def _unwrapped(torch, held: Mapping, depth: int = 3) -> Mapping | None:
    """The tensors by name in a part of a checkpoint, possibly inside a wrapper; None if it has no tensors."""
    if any(isinstance(value, torch.Tensor) for value in held.values()):
        return held if all(isinstance(name, str) for name in held) else None
    inner = [held[name] for name in _WRAPPERS if isinstance(held.get(name), Mapping)]
    return _unwrapped(torch, inner[0], depth - 1) if len(inner) == 1 and depth else None


def _is_beside(torch, name, value) -> bool:
    """Whether an entry of a state dict is a trainer's extra state, not a weight."""
    return name in _BESIDE and not (isinstance(value, torch.Tensor) and value.ndim)


def write_torch(path: Path | str, tensors: TensorFile, part: str | None = None) -> None:
    """Writes a state dict that `torch.load` reads, inside a checkpoint under the name `part` if given.

    All tensors are in memory at once, as `torch.save` requires.

    Raises:
      ValueError: if the path cannot be written, or PyTorch is not installed.
    """
    torch = _import_torch(Path(path))
    types = {ours: (narrow, theirs) for theirs, (narrow, ours) in _torch_types(torch).items()}
    held = {}
    for name in tensors:
        value = checked_tensor(tensors, name)
        # PyTorch warns about read-only arrays, such as those of JAX.
        value = value if value.flags.writeable else value.copy()
        if value.dtype in types:
            narrow, theirs = types[value.dtype]
            held[name] = torch.from_numpy(value.view(_numpy_types(torch)[narrow])).view(theirs)
        else:
            held[name] = torch.from_numpy(value)
    # Passes a file object, as torch.save would store the path's name inside the file.
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        torch.save({part: held} if part else held, file)
