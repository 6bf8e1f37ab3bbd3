"""Writes model folders: the official layout, a diffusers pipeline, or ComfyUI's three files in their folders."""

import contextlib
import dataclasses
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sf_jax.files import check_writable, replacing
from sf_jax.weights import export, hub, model_configs
from sf_jax.weights.adapter_list import Lora
from sf_jax.weights.adapters import merged
from sf_jax.weights.export import Network
from sf_jax.weights.files import TORCH_SUFFIXES, open_tensors
from sf_jax.weights.folders import ModelFiles, find_model, read_config, read_solver
from sf_jax.weights.places import find_part
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import is_float8
from sf_jax.weights.torch_io import write_torch

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "umt5": "model"}
_FOLDERS = {"transformer": "transformer", "vae": "vae", "umt5": "text_encoder"}
_OFFICIAL = {"vae": "Wan2.1_VAE", "umt5": "models_t5_umt5-xxl-enc-bf16", "tiny_vae": "taew2_1"}
_COMFY_FOLDERS = {"transformer": "diffusion_models", "vae": "vae", "umt5": "text_encoders"}
_SPIECE_FILE = "spiece.model"
FLOAT8 = "the base is float8, and so are its sums with the adapters, of 3 bits: --dtype=bfloat16 keeps more of them"
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclasses.dataclass(frozen=True)
class Source:
    """The input of a conversion to a folder.

    Attributes:
      path: a model folder (official or diffusers), or the weights of one network.
      checkpoint: weights that replace the model folder's transformer; None keeps it.
      part: which network of a checkpoint that contains several.
      loras: adapters to merge into the transformer.
    """

    path: Path
    checkpoint: Path | None = None
    part: str | None = None
    loras: tuple[Lora, ...] = ()

    @property
    def files(self) -> ModelFiles | None:
        """The files of a model folder; None for a single network.

        Raises:
          ValueError: if parts of the model are missing.
        """
        if not self.path.is_dir():
            return None
        files = find_model(self.path, needed=())
        if files.vae is None and files.text_encoder is None and files.tokenizer is None:
            return None
        needed = _PARTS if self.checkpoint is None else _PARTS[1:]
        return find_model(self.path, needed=needed)


@dataclasses.dataclass(frozen=True)
class Target:
    """The output of a conversion to a folder.

    Attributes:
      path: the folder, which must be empty or missing.
      layout: "official", "diffusers", "transformers" or "comfy".
      dtype: type of the tensors; None keeps the input's.
      shard_bytes: maximum bytes of tensors in a file, if the layout has shards.
    """

    path: Path
    layout: str
    dtype: np.dtype | None = None
    shard_bytes: int = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of a conversion to a folder.

    Attributes:
      networks: the networks; their tensors can no longer be read.
      files: all files, in the order of writing.
      notes: messages for the user.
    """

    networks: tuple[Network, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


def local_source(value: str, transformer: bool) -> Path:
    """The local path of the input folder or file, downloaded from the hub if needed.

    Args:
      value: a path or a name on the hub. A repository with a VAE or a text encoder is downloaded as a whole model.
      transformer: whether the model's own transformer is needed.

    Raises:
      ValueError: see `hub.fetch` and `find_model`.
    """
    place = hub.parse(value)
    if place is None:
        return Path(value)
    model = []

    def choose(names):
        inside = [] if place.path in names else hub.names_inside(place, names)
        if any(find_part(inside, part) for part in ("vae", "text_encoder")):
            model.append(place)
            inside = [name for name in inside if re.fullmatch(r"LICENSE[^/]*", name)]
            return [f"{place.path}/{name}".lstrip("/") for name in inside]
        return []

    hub.fetch(place, choose)
    if not model:
        return Path(hub.local_file(value))
    needed = _PARTS if transformer else _PARTS[1:]
    return find_model(value, needed).folder


def write_folder(source: Source, target: Target) -> Written:
    """Writes a model folder, or the folder of one network; removes incomplete output on failure.

    Raises:
      ValueError: if something is missing or does not fit, or the output folder is not empty.
      OSError: if the disk is full.
    """
    check_empty(target.path, source)
    files, existed = source.files, target.path.is_dir()
    with contextlib.ExitStack() as stack:
        networks = _open(source, target, files, stack)
        if target.dtype is not None:
            networks = [dataclasses.replace(n, tensors=n.tensors.astype(target.dtype)) for n in networks]
        notes = _check(networks, source, target, files)
        _check_room(target.path, networks)
        written = []
        try:
            check_writable(target.path, "output")
            with export.progress(networks) as counted:
                for path in _write(counted, source, target, files):
                    written.append(path)
        except BaseException:
            _remove(target.path, written)
            if not existed:
                with contextlib.suppress(OSError):
                    target.path.rmdir()
            raise
    return Written(tuple(networks), tuple(path for path in written if path.is_file()), tuple(notes))


def check_empty(path: Path, source: Source) -> None:
    """Checks that the output folder is empty or missing, as nothing is overwritten.

    Raises:
      ValueError: naming the folder's contents.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"output is {path}: there is a file of that name, give another folder")
    if source.path.is_dir() and path.resolve() == source.path.resolve():
        raise ValueError(f"output is {path}: it is the input, give another folder")
    inside = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    if inside:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        raise ValueError(
            f"output is {path}: it holds {', '.join(inside[:3])}{more}; give a new folder, or empty this one"
        )


def _open(source: Source, target: Target, files: ModelFiles | None, stack: contextlib.ExitStack) -> list[Network]:
    """Opens the networks, with the tensor names of the layout."""

    def read(path, layout, config=None, part=None, loras=()):
        tensors = stack.enter_context(open_tensors(path, part))
        if loras:
            tensors = stack.enter_context(merged(tensors, loras, wide=target.dtype is not None))
        return export.read_network(tensors, layout, config)

    if files is None:
        if source.checkpoint is not None:
            raise ValueError(f"checkpoint is {source.checkpoint}: it is for a model folder as input")
        network = read(source.path, target.layout, part=source.part, loras=source.loras)
        return [_lone(network, source, target)]
    if target.layout == "transformers":
        raise ValueError("to is 'transformers': for a model folder it must be one of official, diffusers, comfy")
    path = source.checkpoint or files.transformer
    part = source.part if source.checkpoint else None
    networks = [read(path, target.layout, _sizes(source, files), part, source.loras)]
    if source.part and source.checkpoint is None:
        raise ValueError(f"part is {source.part!r}: it chooses a network of --checkpoint, which is not given")
    if networks[0].kind != "transformer":
        raise ValueError(f"{path}: a transformer is needed; this is a {networks[0].title}")
    networks.append(read(files.vae, target.layout))
    text_layout = {"diffusers": "transformers"}.get(target.layout, target.layout)
    networks.append(_text_encoder(read(files.text_encoder, text_layout), files.tokenizer, target))
    for network, kind in zip(networks[1:], ("vae", "umt5"), strict=True):
        if network.kind != kind:
            raise ValueError(f"{network.tensors.path}: a {kind} is needed; this is a {network.title}")
    return networks


def _sizes(source: Source, files: ModelFiles):
    """Sizes of the transformer from the folder's `config.json`; None without one."""
    if files.config is not None:
        return files.config
    beside = source.path / "transformer" / "config.json"
    return read_config(beside) if beside.is_file() else None


def _lone(network: Network, source: Source, target: Target) -> Network:
    """Checks and prepares a single network for its own folder."""
    if target.layout == "comfy":
        raise ValueError(f"output is {target.path}: one network for ComfyUI is one file, give a name.safetensors")
    if target.layout == "official" and network.kind != "transformer":
        raise ValueError(
            f"output is {target.path}: the official code has a folder for the transformer alone, and {source.path} is "
            f"a {network.title}; give a name.safetensors"
        )
    return export.without_tied(network) if network.kind == "umt5" else network


def _text_encoder(network: Network, tokenizer: Path, target: Target) -> Network:
    if network.kind != "umt5" or target.layout == "official":
        return network
    network = export.without_tied(network)
    if target.layout != "comfy":
        return network
    return export.with_tokenizer(network, read_spiece((tokenizer,)))


def read_spiece(folders: tuple[Path, ...]) -> bytes:
    """The SentencePiece model from the first folder that has one.

    Raises:
      ValueError: naming the folders, if none has one.
    """
    path = next((path for folder in folders if (path := folder / _SPIECE_FILE).is_file()), None)
    if path is None:
        looked = ", ".join(str(folder) for folder in folders)
        raise ValueError(
            f"there is no {_SPIECE_FILE} in {looked}: ComfyUI's text encoders hold their tokenizer, copy that of "
            "google/umt5-xxl to there"
        )
    return path.read_bytes()


def spiece_folders(path: Path) -> tuple[Path, ...]:
    """Possible tokenizer folders of a single text encoder: its own, the official layout's and diffusers'."""
    folder = path.parent
    return folder, folder / "google" / "umt5-xxl", folder.parent / "tokenizer"


def _check(networks: list[Network], source: Source, target: Target, files: ModelFiles | None) -> list[str]:
    """Raises if the number of heads is unknown; returns messages for the user."""
    notes = []
    transformer = next((n for n in networks if n.kind == "transformer"), None)
    if transformer is not None and transformer.config is None:
        raise ValueError(
            f"{transformer.tensors.path}: nothing says how many heads it has; put the model's config.json beside it"
        )
    if source.loras and target.dtype is None and any(map(is_float8, transformer.tensors.dtypes.values())):
        notes.append(FLOAT8)
    notes += [] if transformer is None else export.lost_notes(transformer)
    if target.layout == "comfy":
        notes += [note for network in networks for note in export.comfy_notes(network)]
    if target.layout == "official" and files is not None:
        if not _has_torch():
            notes.append(
                "PyTorch is not installed: VAE and text encoder are .safetensors; the official code reads .pth"
            )
        solver = read_solver(source.path)
        if solver not in (None, ("unipc", model_configs.OFFICIAL_SHIFT)) and transformer.header is None:
            notes.append(
                f"the official folder has no place for the solver: give --solver={solver[0]} --shift={solver[1]:g}"
            )
    header = None if transformer is None else transformer.header
    if header is not None and header.kind != "teacher" and target.layout in ("diffusers", "comfy"):
        notes.append(
            "this transformer is causal: diffusers and ComfyUI run it without its cache, as one chunk; sf_jax "
            "generates with it as it was trained"
        )
    return notes


def _check_room(path: Path, networks: list[Network]) -> None:
    """Checks the free disk space before writing."""
    place = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())
    needed, free = sum(network.nbytes for network in networks), shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"output is {path}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free there")


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _write(networks: list[Network], source: Source, target: Target, files: ModelFiles | None) -> Iterator[Path]:
    """Writes everything; yields each path before writing it."""
    if files is None:
        yield from _write_network(networks[0], target, target.path)
        return
    writers = {"official": _write_official, "diffusers": _write_diffusers, "comfy": _write_comfy}
    yield from writers[target.layout](networks, source, target, files)


def _write_network(network: Network, target: Target, folder: Path) -> Iterator[Path]:
    """Writes a network with its `config.json`, as `save_pretrained` does."""
    folder.mkdir(parents=True, exist_ok=True)
    official = target.layout == "official"
    content = model_configs.config_of(network.kind, network.config, network.tensors.dtypes, official)
    yield folder / "config.json"
    export.write_json(folder / "config.json", content)
    stem = _STEMS[network.kind]
    yield from export.write_shards(folder, stem, network.tensors, network.metadata, target.shard_bytes)


def _write_diffusers(networks, source: Source, target: Target, files: ModelFiles) -> Iterator[Path]:
    tokenizer_class = yield from _copy_tokenizer(files.tokenizer, target.path / "tokenizer", add_config=True)
    scheduler = _scheduler(networks[0], source.path)
    path = target.path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    yield path
    export.write_json(path, scheduler)
    for network in networks:
        yield from _write_network(network, target, target.path / _FOLDERS[network.kind])
    yield from _copy_rest(files, source.path, target.path)
    # Written last: a folder without it is incomplete.
    yield target.path / "model_index.json"
    index = model_configs.pipeline_index(scheduler["_class_name"], tokenizer_class)
    export.write_json(target.path / "model_index.json", index)


def _scheduler(transformer: Network, root: Path) -> dict:
    """The scheduler's config: with the header's shift, or the source's file, or the shift of the official folder."""
    path = root / "scheduler" / "scheduler_config.json"
    if transformer.header is not None:
        return model_configs.scheduler_config(transformer.header.shift)
    if path.is_file():
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        if isinstance(stored.get("_class_name"), str):
            return {key: value for key, value in stored.items() if key != "_diffusers_version"}
        raise ValueError(f"{path}: _class_name is {stored.get('_class_name')!r}, it must be a scheduler of diffusers")
    return model_configs.scheduler_config(model_configs.OFFICIAL_SHIFT)


def _write_official(networks, source: Source, target: Target, files: ModelFiles) -> Iterator[Path]:
    yield from _copy_tokenizer(files.tokenizer, target.path / "google" / "umt5-xxl", add_config=False)
    for network in networks[1:]:
        path = target.path / f"{_OFFICIAL[network.kind]}{'.pth' if _has_torch() else '.safetensors'}"
        yield path
        if path.suffix in TORCH_SUFFIXES:
            write_torch(path, network.tensors)
        else:
            write_safetensors(path, network.tensors, network.metadata)
    yield from _copy_rest(files, source.path, target.path)
    yield from _write_network(networks[0], target, target.path)


def _write_comfy(networks, source: Source, target: Target, files: ModelFiles) -> Iterator[Path]:
    for network in networks:
        path = target.path / _COMFY_FOLDERS[network.kind] / f"{_comfy_name(network, source)}.safetensors"
        path.parent.mkdir()
        yield path
        write_safetensors(path, network.tensors, network.metadata)
    yield from _copy_rest(files, source.path, target.path, tiny_vae="vae_approx")


def _comfy_name(network: Network, source: Source) -> str:
    """A name like those of ComfyUI's published files; a checkpoint keeps its own."""
    if network.kind == "vae":
        return "wan_2.1_vae"
    if network.kind == "transformer" and source.checkpoint is not None:
        return source.checkpoint.stem
    types = {np.dtype(dtype).name for dtype in network.tensors.dtypes.values()} - {"uint8"}
    short = _SHORT.get(types.pop(), "mixed") if len(types) == 1 else "mixed"
    size = re.search(r"T2V-(\S+)", network.title)
    return f"umt5_xxl_{short}" if network.kind == "umt5" else f"wan2.1_t2v_{f'{size[1]}_' if size else ''}{short}"


def _copy_tokenizer(source: Path, folder: Path, add_config: bool) -> Iterator[Path]:
    """Copies the tokenizer's files and yields their paths; returns its class for `model_index.json`."""
    folder.mkdir(parents=True)
    paths = source.iterdir() if source.is_dir() else [source]
    for path in sorted(path for path in paths if path.is_file() and not path.name.startswith(".")):
        yield from _copy(path, folder / path.name)
    name, config = _tokenizer_class(folder), folder / "tokenizer_config.json"
    if add_config and not config.is_file():
        yield config
        content = {"eos_token": "</s>", "extra_ids": 0, "model_max_length": 512, "pad_token": "<pad>"}
        export.write_json(config, content | {"tokenizer_class": name, "unk_token": "<unk>"})
    return name


def _tokenizer_class(folder: Path) -> str:
    """The transformers class of a tokenizer: T5's for Unigram models, such as UMT5's."""
    path = folder / "tokenizer.json"
    if not path.is_file():  # T5TokenizerFast converts spiece.model
        return "T5TokenizerFast"
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model"]["type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path.name} of the tokenizer is damaged ({type(error).__name__}): download it again"
        ) from error
    return "T5TokenizerFast" if kind == "Unigram" else "PreTrainedTokenizerFast"


def _copy_rest(files: ModelFiles, root: Path, folder: Path, tiny_vae: str = "") -> Iterator[Path]:
    """Copies the tiny decoder and the license."""
    if files.tiny_vae is not None:
        (folder / tiny_vae).mkdir(exist_ok=True)
        yield from _copy(files.tiny_vae, folder / tiny_vae / files.tiny_vae.name)
    for path in sorted(root.glob("LICENSE*")):
        if path.is_file():
            yield from _copy(path, folder / path.name)


def _copy(source: Path, path: Path) -> Iterator[Path]:
    yield path
    with replacing(path) as unfinished:
        shutil.copyfile(source, unfinished)


def _remove(folder: Path, written: list[Path]) -> None:
    """Removes the files this process has written, and the folders that become empty."""
    with contextlib.suppress(OSError):
        for path in written:
            path.unlink(missing_ok=True)
        for child in sorted(folder.rglob("*"), reverse=True):
            if child.is_dir() and not any(child.iterdir()):
                child.rmdir()
