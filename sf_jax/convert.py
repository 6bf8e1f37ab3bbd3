"""Converts weight files: tensor names, data type and container format.

Renames tensors between the official code, diffusers and transformers, bit for bit:

    python -m sf_jax.convert --input=Wan2.1-T2V-1.3B --output=diffusion_pytorch_model.safetensors --to=diffusers

The input is a safetensors file, a folder of shards or its index, a model folder (for its transformer) or a .pt file;
its kind is detected. `--part` selects a network from a checkpoint with several, and names the network in a .pt output:

    python -m sf_jax.convert --input=self_forcing_dmd.pt --output=student.safetensors --part=generator_ema

Converts a whole model folder for diffusers' `from_pretrained`, optionally with a student as its transformer;
`--to=official` converts back, and `--to=comfy` writes ComfyUI's three files:

    python -m sf_jax.convert --input=Wan2.1-T2V-1.3B --checkpoint=student.safetensors --output=student/ --to=diffusers

Exports the averaged (EMA) student of a training run, finished or not, from its newest checkpoint under the official
names. This writes `runs/wan/student_STEP.safetensors`, or the file that `--output` names (a .pt holds it as
generator_ema), and a model card next to it, as in converted folders:

    python -m sf_jax.convert --from=runs/wan

Exports the LoRA adapters of a training run without the network (`--to=kohya` writes the format of ComfyUI and musubi).
An adapter file as `--input` is renamed the same way. `--lora=FILE[:SCALE]` merges adapters into the input's
transformer:

    python -m sf_jax.convert --from=runs/wan --part=lora --to=diffusers --output=adapter.safetensors

Changes the data type of a file that sf_jax.train wrote. The shipped weights were converted this way:

    python -m sf_jax.convert --input=A --output=B --dtype=float16

An existing output file is an error, unless `--overwrite` is set.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from sf_jax import command
from sf_jax.files import check_writable, remove_leftovers
from sf_jax.inference.sentencepiece import read_tensor
from sf_jax.weights import adapter_export, cards, export, export_folder, hub, load, model_configs, transformer
from sf_jax.weights.adapter_list import Lora, parse_loras
from sf_jax.weights.adapters import describe, is_adapter, merged, opened
from sf_jax.weights.export_folder import FLOAT8, Source, Target
from sf_jax.weights.files import PART_NAMES, TORCH_SUFFIXES, open_tensors
from sf_jax.weights.names import NETWORK_PARTS
from sf_jax.weights.package import Package, save_package
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import TensorFile, is_float8
from sf_jax.weights.torch_io import PARTS, write_torch

_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

_INPUT = command.define_weights("input", None, "Weight file, folder of shards, or model folder; also of the hub")
_FROM = command.define_path("from", None, "Instead of --input: workdir of a training run")
_OUTPUT = command.define_path(
    "output",
    None,
    "File to write, .safetensors or .pt (which needs PyTorch), or a folder to make; --from has a default",
)
_TO = flags.DEFINE_enum("to", None, [*export.LAYOUTS, "kohya"], "Whose names to write; as they are. A folder needs it")
_CHECKPOINT = command.define_weights("checkpoint", None, "Folders: weights in place of the model folder's transformer")
_SHARD_SIZE = flags.DEFINE_string("max_shard_size", None, "Folders: size of a weight file at most (5GB)")
_LICENSE = flags.DEFINE_string("license", None, "Model card: the hub's identifier of the weights' license")
_BASE_MODEL = flags.DEFINE_string("base_model", None, "Model card: the hub's name of the model that they derive from")
_PART = flags.DEFINE_string(
    "part",
    None,
    f"Network of a file that holds several: {', '.join(PART_NAMES)}, or another name in it; those of checkpoints are "
    "also its name in a .pt. With --from, lora: the adapters alone",
)
_LORA = flags.DEFINE_multi_string("lora", None, "Adapter to merge into the input, FILE or FILE:SCALE; several too")
_DTYPE = flags.DEFINE_enum("dtype", None, list(_DTYPES), "Type of the numbers (as they are; float32 for --from)")
_OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Replace the file of --output, or that --from writes, if it exists"
)
GROUPS = {
    "Files": ("input", "from", "output", "overwrite", "checkpoint"),
    "What is written": ("to", "part", "dtype", "lora", "max_shard_size"),
    "Model cards": ("license", "base_model"),
}


def _convert(tensors: TensorFile, output: Path) -> tuple[str, export.Network]:
    """Converts the tensors as the flags say; returns a summary and the network."""
    network = export.read_network(tensors, _TO.value)
    if _DTYPE.value:
        network = dataclasses.replace(network, tensors=network.tensors.astype(_DTYPES[_DTYPE.value]))
    to_torch = output.suffix in TORCH_SUFFIXES
    if _PART.value not in (None, tensors.part, *PART_NAMES):
        raise ValueError(f"part is {_PART.value!r}: {tensors.path} has none; in a .pt it is {', '.join(PARTS)}")
    part = tensors.part if _PART.value in NETWORK_PARTS else _PART.value or tensors.part
    if _TO.value == "comfy":
        if to_torch:
            raise ValueError(f"output is {output}: files for ComfyUI are .safetensors")
        if network.kind == "umt5":
            if any(name.endswith(export.SPIECE) for name in tensors):  # the input is in ComfyUI's format
                spiece = read_tensor(tensors.path)
            else:
                spiece = export_folder.read_spiece(export_folder.spiece_folders(tensors.path))
            network = export.with_tokenizer(export.without_tied(network), spiece)
        _tell(export.comfy_notes(network))
    _tell(export.lost_notes(network, to_torch))
    config = None if to_torch else _config_beside(network, output)
    with export.progress([network]) as (counted,):
        if to_torch:
            # In official checkpoints with several networks, the transformer is the attribute `model` of a wrapper.
            prefix = "model." if part and (network.kind, network.naming) == ("transformer", "official") else ""
            write_torch(output, counted.tensors.renamed({prefix + name: name for name in counted.tensors}), part)
        else:
            write_safetensors(output, counted.tensors, network.metadata)
    if config is not None:
        export.write_json(output.with_name("config.json"), config)
    part = f" ({tensors.part})" if tensors.part else ""
    names = network.naming if _TO.value != "comfy" else "comfy"
    return f"{network.title}{part}, {len(network.tensors)} tensors, {network.source} -> {names}", network


def _config_beside(network: export.Network, output: Path) -> dict | None:
    """Content of the `config.json` that the libraries need with the file; None if they need none or it is unknown.

    Raises:
      ValueError: if the folder has a different `config.json`.
    """
    if _TO.value not in ("diffusers", "transformers"):
        return None
    if network.config is None:
        _tell(["no config.json was written: nothing says how many heads it has; put the model's beside the input"])
        return None
    content, path = model_configs.config_of(network.kind, network.config, network.tensors.dtypes), output.parent
    if (path / "config.json").exists() and not cards.is_json(path / "config.json", content):
        raise ValueError(f"output is {output}: {path / 'config.json'} is of something else, give another folder")
    return content


def _tell(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")


def _header(networks: list[export.Network]) -> Package | None:
    return next((network.header for network in networks if network.header is not None), None)


def _card(
    title: str,
    networks: list[export.Network],
    folder: Path,
    stem: str | None,
    run: cards.Run | None,
    adapters: Sequence[str] = (),
) -> None:
    """Writes the model card."""
    header, layout = _header(networks), _TO.value or networks[0].naming
    contents = [*cards.contents_of(networks), *(f"merged into the transformer: {text}" for text in adapters)]
    card = cards.Card(title, layout, contents, header, run, _LICENSE.value, _BASE_MODEL.value)
    _write_card(card, folder, stem)


def _write_card(card: cards.Card, folder: Path, stem: str | None) -> None:
    path, note = cards.write_card(card, folder, stem)
    if path is None and _OVERWRITE.value:
        note += "; what is there may describe the file that was replaced"
    _tell([note] if note else [])


def _export(output: Path | None) -> tuple[str, Path]:
    """Exports the averaged network of a training run; returns a summary and the file."""
    from sf_jax.training.export import load_run  # imported here: Orbax and tfds are slow, and only --from needs them

    if _TO.value not in (None, "official"):
        raise ValueError(f"to is {_TO.value!r}: --from writes the official names, convert its output for others")
    if (output is None or output.suffix not in TORCH_SUFFIXES) and _PART.value is not None:
        raise ValueError(f"part is {_PART.value!r}: a .safetensors file holds one network, leave part out")
    if _PART.value not in (None, *PARTS):
        raise ValueError(f"part is {_PART.value!r}: with --from it must be one of {', '.join((*PARTS, 'lora'))}")
    step, package = load_run(_FROM.value)
    # A finished run's file name would make sf_jax.train treat the run as complete.
    output = output or Path(_FROM.value) / f"{package.kind}_{step:06d}.safetensors"
    _check_free(output)
    dtype = _DTYPE.value or "float32"
    tensors = load.file_tensors(transformer.entries(package.config), package.params).astype(_DTYPES[dtype])
    title = f"{package.kind} of {package.config.num_layers} layers, dim {package.config.dim}"
    network = export.Network("transformer", title, package.config, "official", "official", tensors, package)
    if output.suffix in TORCH_SUFFIXES:
        write_torch(
            output, tensors.renamed({f"model.{name}": name for name in tensors}), _PART.value or "generator_ema"
        )
        _tell(export.lost_notes(network, to_torch=True))
    else:
        save_package(output, package, dtype)
    run = cards.read_run(Path(_FROM.value), step)
    _card(output.stem, [network], output.parent, output.stem, run)
    return f"{package.kind} of step {step}", output


def _write_folder(output: Path, loras: Sequence[Lora]) -> str:
    """Writes a folder; returns a summary."""
    if _TO.value is None:
        raise ValueError(f"output is {output}, a folder: say whose with --to=official, diffusers or comfy")
    checkpoint = Path(hub.local_file(_CHECKPOINT.value)) if _CHECKPOINT.value else None
    path = export_folder.local_source(_INPUT.value, checkpoint is None)
    source = Source(path, checkpoint, _PART.value, tuple(loras))
    dtype = _DTYPES[_DTYPE.value] if _DTYPE.value else None
    target = Target(output, _TO.value, dtype, export.parse_size(_SHARD_SIZE.value or "5GB"))
    written = export_folder.write_folder(source, target)
    _tell(list(written.notes))
    networks = list(written.networks)
    run = cards.run_of(source.checkpoint or source.path, _header(networks))
    adapters = describe(loras)
    _card(output.resolve().name, networks, output, None, run, adapters)
    titles = ", ".join(network.title for network in written.networks) + "".join(f" + {text}" for text in adapters)
    return f"{titles} -> {_TO.value}: wrote {output}, {len(written.files)} files, {written.nbytes / 1e6:.2f} MB"


def _is_folder(text: str) -> bool:
    """Whether an output is a folder: it exists as one, or its name has no file suffix."""
    if Path(text).is_dir() or text.endswith(("/", "\\")):
        return True
    if Path(text).suffix in (".safetensors", *TORCH_SUFFIXES):
        return False
    if re.fullmatch(r"\.[a-z]{2,}\d*", Path(text).suffix.lower()):  # does not match the .3B of Wan2.1-T2V-1.3B
        raise ValueError(
            f"output is {text}: the name of a file must end in .safetensors or {', '.join(TORCH_SUFFIXES)}; "
            "that of a folder in /"
        )
    return True


def _check_flags(output: Path | None, folder: bool, loras: Sequence[Lora]) -> None:
    """Rejects flags without effect, and an output that is part of the input or would be overwritten."""
    for name, flag in (("checkpoint", _CHECKPOINT), ("max_shard_size", _SHARD_SIZE)):
        if flag.value is not None and not folder:
            raise ValueError(f"{name} is {flag.value}: it is for a folder as output")
    if _SHARD_SIZE.value is not None and _TO.value == "comfy":
        raise ValueError(f"max_shard_size is {_SHARD_SIZE.value}: ComfyUI reads single files, leave it out")
    if _LICENSE.value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,60}", _LICENSE.value):
        raise ValueError(f"license is {_LICENSE.value!r}: give an identifier of the hub, such as apache-2.0 or other")
    if _BASE_MODEL.value is not None and not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", _BASE_MODEL.value, re.ASCII):
        raise ValueError(f"base_model is {_BASE_MODEL.value!r}: give a name of the hub, OWNER/NAME")
    if _OVERWRITE.value and folder:
        raise ValueError("overwrite: it is for a file as --output; no folder that holds something is written to")
    if output is None or folder or not output.exists():
        return
    if any(Path(lora.path).exists() and output.samefile(lora.path) for lora in loras):
        raise ValueError(f"output is {output}: it is a file of --lora, give another name")
    if _INPUT.value is not None:
        source = Path(_INPUT.value)
        inside = source if source.is_dir() else source.parent if source.suffix == ".json" else None
        same = source.exists() and output.samefile(source)
        if same or (inside is not None and inside.resolve() in output.resolve().parents):
            raise ValueError(f"output is {output}: it is a file of the input, give another name")
    _check_free(output)


def _check_free(output: Path) -> None:
    """Raises if a file would be replaced without `--overwrite`."""
    if output.exists() and not _OVERWRITE.value:
        raise ValueError(f"output is {output}: the file exists; give another name, or --overwrite to replace it")


def _convert_adapter(output: Path | None) -> str:
    """Writes the adapters of a training run or of the input; returns a summary."""
    if _PART.value not in (None, "lora"):
        raise ValueError(f"part is {_PART.value!r}: {_INPUT.value} is an adapter, leave part out")
    if output is None or output.suffix != ".safetensors":
        raise ValueError(f"output is {output}: adapters are written to a .safetensors file, give its name")
    naming = _TO.value or "diffusers"
    if naming not in adapter_export.NAMINGS:
        raise ValueError(f"to is {naming!r}: for an adapter it must be one of {', '.join(adapter_export.NAMINGS)}")
    dtype = _DTYPES[_DTYPE.value] if _DTYPE.value else None
    if _FROM.value is not None:
        from sf_jax.training.export import load_adapters  # imported here, as only --from needs Orbax

        trained = load_adapters(_FROM.value)
        adapter_export.write_trained(output, trained, naming, dtype)
        run = cards.read_run(Path(_FROM.value), trained.step)
        _adapter_card(output, f"LoRA adapters, {trained.describe()}", naming, run)
        return f"adapters of step {trained.step}, {trained.describe()} -> {naming}"
    with opened([Lora(_INPUT.value)]) as (adapter,):
        adapter_export.write_adapter(output, adapter, naming, dtype)
        if _LICENSE.value or _BASE_MODEL.value:
            _adapter_card(output, f"LoRA {adapter.describe()}", naming, None)
        return f"{adapter.describe()} -> {naming}"


def _adapter_card(output: Path, content: str, naming: str, run: cards.Run | None) -> None:
    """Writes the model card of an adapter file."""
    card = cards.Card(output.stem, naming, [content], None, run, _LICENSE.value, _BASE_MODEL.value, is_adapter=True)
    _write_card(card, output.parent, output.stem)


def main() -> None:
    """Command line: see the module's docstring."""
    loras = parse_loras(_LORA.value or ())
    if loras and _INPUT.value is None:
        raise ValueError("lora: adapters are merged into the file of --input, give one")
    if (_INPUT.value is None) == (_FROM.value is None):
        raise ValueError("input and from: give one of them, a weight file or the workdir of a training run")
    if _OUTPUT.value is None and _FROM.value is None:
        raise ValueError("output is missing: give the file to write, or the folder to make")
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    folder = output is not None and _is_folder(_OUTPUT.value)
    _check_flags(output, folder, loras)
    if output is not None and not folder:
        remove_leftovers(check_writable(output.parent, "output"))
    if (_FROM.value is not None and _PART.value == "lora") or (
        _INPUT.value and _CHECKPOINT.value is None and is_adapter(_INPUT.value)
    ):
        if loras:
            raise ValueError(
                f"lora: {_INPUT.value} is an adapter itself, they are merged into the weights of a network"
            )
        print(f"{_convert_adapter(output)}: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
        return
    if _PART.value == "lora":
        raise ValueError(f"part is 'lora': {_INPUT.value} is no adapter; it is for adapters, and for --from")
    if folder and _FROM.value is not None:
        raise ValueError(f"output is {output}, a folder: --from writes a file, name it .safetensors or .pt")
    if folder:
        print(_write_folder(output, loras))
        return
    if _FROM.value is not None:
        done, output = _export(output)
        print(f"{done}: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
        return
    done = _convert_file(output, loras)
    print(f"{done}: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")


def _convert_file(output: Path, loras: Sequence[Lora]) -> str:
    """Converts one file to one file; returns a summary."""
    to_torch = output.suffix in TORCH_SUFFIXES
    with open_tensors(_INPUT.value, _PART.value, need_part=not to_torch) as tensors:
        ours, adapters = "sf_jax" in tensors.metadata, describe(loras)
        added = "".join(f" + {text}" for text in adapters)
        if loras and _DTYPE.value is None and any(is_float8(dtype) for dtype in tensors.dtypes.values()):
            _tell([FLOAT8])
        same = ours and _TO.value is None and not to_torch and tensors.path.suffix != ".json"  # still one of ours
        if same and _DTYPE.value == "bfloat16":
            raise ValueError("dtype is 'bfloat16': files of sf_jax are float16 or float32")
        if same and (_LICENSE.value or _BASE_MODEL.value):
            raise ValueError("license and base_model are for a model card: one is written with --to, or with a folder")
        with merged(tensors, loras, wide=_DTYPE.value is not None) as changed:
            done, network = _convert(changed, output)
        if not same and (ours or _LICENSE.value or _BASE_MODEL.value):
            run = cards.run_of(tensors.path, network.header)
            _card(output.stem, [network], output.parent, output.stem, run, adapters)
        return done + added


if __name__ == "__main__":
    command.run(main, groups=GROUPS)
