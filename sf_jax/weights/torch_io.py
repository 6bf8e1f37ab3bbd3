"""PyTorch's pickles, read and written; PyTorch is imported here, when it is needed, and nowhere else."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from sf_jax.files import replacing
from sf_jax.weights.tensors import TensorFile, checked_tensor, empty_aligned

# State dicts that a checkpoint of this family may hold; of the first three the earliest is the one to generate with.
PARTS = ("generator_ema", "generator", "model", "critic")


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
    return torch


def _torch_types(torch) -> dict:
    """PyTorch's types that numpy does not have: (an integer type of that width, the type of `ml_dtypes`)."""
    return {
        torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
        torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
        torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
    }


def open_torch(path: Path, part: str | None) -> TensorFile:
    """Opens what `torch.save` wrote: a state dict, or a checkpoint of several."""
    torch = _import_torch(path)
    types = _torch_types(torch)
    held, part = _state_dict(_load_pickle(torch, path), path, part)
    if any(type(value).__name__ in ("DTensor", "ShardedTensor") for value in held.values()):
        raise ValueError(f"{path} {_SHARDED}")
    wrong = [name for name, value in held.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))]
    wrong += [name for name, value in held.items() if name not in wrong and value.layout != torch.strided]
    if wrong or not held:
        what = f"{wrong[0]!r} and {len(wrong) - 1} more are no plain tensors" if wrong else "it is empty"
        raise ValueError(f"{path} does not hold the tensors of a network: {what}")

    def read(name):
        tensor = held[name]
        out = empty_aligned(tuple(tensor.shape), dtypes[name])
        if tensor.dtype in types:
            tensor = tensor.contiguous().view(types[tensor.dtype][0])
            out.view(tensor.numpy().dtype)[...] = tensor.numpy()
        else:
            out[...] = tensor.numpy()
        return out

    held = {name: value.detach() for name, value in held.items()}
    dtypes = {name: _numpy_type(torch, value.dtype) for name, value in held.items()}
    return TensorFile(path, {n: tuple(v.shape) for n, v in held.items()}, dtypes, read, None, part, held.clear)


def _numpy_type(torch, dtype) -> np.dtype:
    types = _torch_types(torch)
    return types[dtype][1] if dtype in types else torch.empty(0, dtype=dtype).numpy().dtype


def _load_pickle(torch, path: Path):
    """What a pickle holds, memory-mapped where its format allows it."""
    try:
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
        held = f"it asks for {code.group(1)}" if code else str(error).splitlines()[0][:200]
        raise ValueError(
            f"{path} is refused: it holds more than tensors, which could run code ({held}); nothing of it was run"
        ) from error
    except Exception as error:  # Damaged pickles make PyTorch raise nearly anything.
        raise ValueError(
            f"{path} is no readable PyTorch file, perhaps an unfinished download ({str(error).splitlines()[0][:200]})"
            if str(error)
            else f"{path} is no readable PyTorch file ({type(error).__name__})"
        ) from error


def _state_dict(held, path: Path, part: str | None) -> tuple[dict, str | None]:
    """The state dict to read, and its name in the checkpoint."""
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, not the tensors of a network by name")
    parts = [str(name) for name, value in held.items() if isinstance(value, Mapping)]
    if not parts:
        return dict(held), None
    if part is None:
        part = next((name for name in PARTS[:3] if name in parts), None)
        if part is None:
            raise ValueError(f"{path} holds {', '.join(parts[:8])}: say which with part")
    if part not in parts:
        raise ValueError(f"part is {part!r}: {path} holds {', '.join(parts[:8])}")
    return dict(held[part]), part


def write_torch(path: Path | str, tensors: TensorFile, part: str | None = None) -> None:
    """Writes what `torch.load` reads: a state dict, under the name `part` in a checkpoint if that is given.

    All tensors are in memory meanwhile: that is how `torch.save` works.

    Raises:
      ValueError: the path cannot be written, or PyTorch is not installed.
    """
    torch = _import_torch(Path(path))
    types = {ours: (narrow, theirs) for theirs, (narrow, ours) in _torch_types(torch).items()}
    held = {}
    for name in tensors:
        value = checked_tensor(tensors, name)
        # PyTorch warns of arrays that it may not write, such as those of JAX.
        value = value if value.flags.writeable else value.copy()
        if value.dtype in types:
            narrow, theirs = types[value.dtype]
            held[name] = torch.from_numpy(value.view(_numpy_type(torch, narrow))).view(theirs)
        else:
            held[name] = torch.from_numpy(value)
    # Through a file object, as torch.save writes the name that it is given into the file.
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        torch.save({part: held} if part else held, file)
