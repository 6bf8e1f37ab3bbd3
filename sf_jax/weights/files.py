"""Opens weight files of every kind: safetensors, their shards, and PyTorch pickles."""

import re
from pathlib import Path

from sf_jax import strict_json
from sf_jax.weights import hub, places
from sf_jax.weights.experts import refuse_other_transformers
from sf_jax.weights.folders import find_transformer
from sf_jax.weights.foreign import refuse_foreign, refuse_gguf, title_of_start
from sf_jax.weights.names import NETWORK_PARTS, networks_of
from sf_jax.weights.quantized import dequantized, refuse_lost_scales, refuse_quantized, scale_names
from sf_jax.weights.safetensors_io import open_safetensors
from sf_jax.weights.tensors import MAX_NAME, TensorFile
from sf_jax.weights.torch_io import PARTS, open_torch

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
PART_NAMES = (*PARTS, *NETWORK_PARTS)
# First bytes of a zip archive, and of pickles with protocols 2 to 5.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_tensors(
    path: Path | str,
    part: str | None = None,
    need_part: bool = True,
    scaled: bool = True,
    kind: str | None = None,
    dtype: str | None = None,
) -> TensorFile:
    """Opens a weight file; its content, not its suffix, determines the format.

    Args:
      path: a safetensors file, an index (`*.index.json`) or folder of shards, a model folder (for its transformer), or
        a PyTorch pickle, whose code is never executed; or a file on the hub (see `hub`).
      part: which state dict of a checkpoint with several (see `PARTS`), or which network of an all-in-one file
        (`NETWORK_PARTS`). None takes generator_ema, else generator, else model, else the only one; for an all-in-one
        file, everything.
      need_part: whether to raise if `part` is given and the file has a single state dict, with or without a name;
        otherwise `part` is then ignored.
      scaled: whether to read scaled float8, multiplied by its scales; otherwise it raises.
      kind: the network to read from an all-in-one file, such as "vae"; the others may then be scaled float8.
      dtype: type to which scaled float8 is converted; None is float32.

    Returns:
      The tensors; only names, shapes and types have been read so far. They are numpy arrays with the file's types
      (bfloat16 and float8 from `ml_dtypes`), aligned to 64 bytes.

    Raises:
      ValueError: if the file is missing, damaged, incomplete, not a weight file, or lacks that part.
    """
    path = Path(hub.local_file(path))
    if path.is_dir():
        refuse_foreign(path)
        path = _file_of_folder(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a weight file or a folder of shards")
    refuse_foreign(path)
    shard = re.search(r"-(\d{1,9})-of-(\d{1,9})(\.[\w.]+)?$", path.name)
    if shard and int(shard[2]) > 1:
        raise ValueError(
            f"{path} is shard {int(shard[1])} of {int(shard[2])} of a network: give their folder, or their index "
            "(*.index.json)"
        )
    inner = None if part in NETWORK_PARTS else part
    tensors = _index(path) if path.suffix == ".json" else _by_content(path, inner, need_part)
    try:
        if inner is not None and tensors.part is None and need_part:
            raise ValueError(f"part is {part!r}: {path} is a single state dict, leave part out")
        refuse_quantized(tensors)
        refuse_lost_scales(tensors)
        scales, wanted = scale_names(tensors), networks_of(tensors).get("vae" if kind == "tiny_vae" else kind)
        if wanted is not None:
            scales = {weight: scale for weight, scale in scales.items() if weight in wanted.values()}
        if scales and not scaled:
            raise ValueError(
                f"{path} holds scaled float8 (such as {min(scales.values())}), whose weights are known to 3 bits: "
                f"write them out with python -m sf_jax.convert --input={path} --output=FILE.safetensors "
                "--dtype=bfloat16, or name the file by --transformer or --text_encoder of sf_jax.generate"
            )
        tensors = dequantized(tensors, dtype or "float32")
        return tensors if part not in NETWORK_PARTS else _network(tensors, part)
    except ValueError:
        tensors.close()
        raise


def _network(tensors: TensorFile, part: str) -> TensorFile:
    """One network of an all-in-one file."""
    networks = networks_of(tensors)
    if not networks:
        raise ValueError(f"part is {part!r}: {tensors.path} is no all-in-one file, leave part out")
    if NETWORK_PARTS[part] not in networks:
        held = [name for name, kind in NETWORK_PARTS.items() if kind in networks]
        raise ValueError(f"part is {part!r}: {tensors.path} holds {', '.join(held)}")
    return tensors.renamed(networks[NETWORK_PARTS[part]])


def _by_content(path: Path, part: str | None, need_part: bool = True) -> TensorFile:
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    # Tries safetensors first: their header length can look like the first bytes of any other format.
    if start[4:9] == b"\0\0\0\0{":
        return open_safetensors(path)
    if start.startswith(_PICKLES):
        return open_torch(path, part, need_part)
    text, foreign = start.lstrip().lower(), title_of_start(start)
    if foreign is not None:
        fault = foreign
    elif not start:
        fault = "it is empty; perhaps an unfinished download"
    elif text.startswith(b"version https://git-lfs"):
        fault = "it is the pointer of git-lfs: fetch the file itself with 'git lfs pull'"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        fault = "it is a web page: the download failed"
    elif path.suffix == ".safetensors" and any(start):
        return open_safetensors(path)
    else:
        guess = (
            "allowed: safetensors files and what torch.save wrote" if any(start) else "perhaps an unfinished download"
        )
        fault = f"it starts with {start[:16]!r}; {guess}"
    raise ValueError(f"{path} is no weight file: {fault}")


def _file_of_folder(folder: Path) -> Path:
    """The index or only weight file of a folder; for a model folder, its transformer."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    indices = [name for name in names if ".index." in name and name.endswith(".json")]
    files = [name for name in names if name.endswith((".safetensors", *TORCH_SUFFIXES))]
    found = indices or files
    # Checked first: a model folder's only weight file may be another network's, such as taew2_1.safetensors.
    transformer = find_transformer(folder)
    if transformer is not None:
        return transformer
    if len(found) == 1:
        return folder / found[0]
    try:
        stems = [name for stem in places.STEM_NAMES if (name := places.find_stem(names, stem))]
    except ValueError as error:
        raise ValueError(f"{folder} {error}") from error
    if stems:
        return folder / stems[0]
    if not found:
        refuse_gguf(folder)
        inside = sorted(child.parent.name for child in folder.glob("*/*.safetensors*"))
        for name in inside:
            refuse_other_transformers(folder / name)
        hint = f"; its folders {', '.join(dict.fromkeys(inside))} have some: give one of them" if inside else ""
        raise ValueError(f"{folder} has no weight file (*.safetensors, its index, or .pt, .pth, .bin){hint}")
    if all("-of-" in name for name in found):
        raise ValueError(f"{folder} has {len(found)} shards but not their index, *.safetensors.index.json")
    raise ValueError(f"{folder} has several weight files: give one of {', '.join(found[:8])}")


def _index(path: Path) -> TensorFile:
    """Opens the shards listed in an index."""
    try:
        names = strict_json.read(path, None)["weight_map"]
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise TypeError("weight_map is no table of file names")
        if max(map(len, (*names, *names.values()))) > MAX_NAME:
            raise TypeError(f"a name in weight_map is longer than {MAX_NAME} characters")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "" if isinstance(error, KeyError) else f": {error}"
        raise ValueError(f"{path} is no index of shards (it must hold a weight_map){reason}") from error
    files = sorted(set(names.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise ValueError(f"{path} names files of other folders: {outside[:4]}")
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise ValueError(f"{path.parent} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:4])}")
    shards = {}
    try:
        for file in files:
            shards[file] = _by_content(path.parent / file, None)
        lost = [name for name, file in names.items() if name not in shards[file]]
        if lost:
            raise ValueError(f"{path}: {len(lost)} tensors are not in the shards it names, such as {lost[0]!r}")
    except ValueError:
        for shard in shards.values():
            shard.close()
        raise

    def close():
        for shard in shards.values():
            shard.close()

    return TensorFile(
        path,
        {name: shards[file].shapes[name] for name, file in names.items()},
        {name: shards[file].dtypes[name] for name, file in names.items()},
        lambda name: shards[names[name]][name],
        shards[files[0]].metadata,
        None,
        close,
    )
