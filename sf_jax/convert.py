"""Rewrites weight files: other tensor names, another number type, another container.

Names between the official code, diffusers and transformers, tensor by tensor and bit by bit:
`python -m sf_jax.convert --input=Wan2.1-T2V-1.3B --output=diffusion_pytorch_model.safetensors --to=diffusers`.
The input is a safetensors file, a folder (or the index) of shards, a model folder (for its transformer) or a .pt file;
what it is, is recognised. `--part`
chooses from a checkpoint of several networks, and names the network in a `.pt` output:
`python -m sf_jax.convert --input=self_forcing_dmd.pt --output=student.safetensors --part=generator_ema`.

The averaged student of a training run, from its newest checkpoint, finished or not, under the official names:
`python -m sf_jax.convert --from=runs/wan` writes `runs/wan/student_STEP.safetensors`; `--output` another file (a .pt as
generator_ema).

Adapters (LoRA): `--lora=FILE[:SCALE]` merges them into the input's transformer. Those of a training run, without its
network, with `python -m sf_jax.convert --from=runs/wan --part=lora --to=diffusers --output=adapter.safetensors` (or
`--to=kohya`, as ComfyUI and musubi write them); an adapter file as `--input` gets other names the same way.

Files that sf_jax.train wrote, in another number type: `python -m sf_jax.convert --input=A --output=B --dtype=float16`.
This is how the weights that the package ships were made from those that training left.
"""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from sf_jax import command
from sf_jax.files import check_writable
from sf_jax.training import export
from sf_jax.weights import adapter_export, load, transformer
from sf_jax.weights.adapter_list import Lora, parse_loras
from sf_jax.weights.adapters import describe, is_adapter, merge_params, merged, opened
from sf_jax.weights.files import TORCH_SUFFIXES, open_tensors
from sf_jax.weights.package import load_package, save_package
from sf_jax.weights.recognise import NAMINGS, entries_of, param_shapes_of, recognise
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import TensorFile
from sf_jax.weights.torch_io import PARTS, write_torch

_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

_INPUT = command.define_path("input", None, "Weight file, folder of shards, or model folder")
_FROM = command.define_path("from", None, "Instead of --input: workdir of a training run")
_OUTPUT = command.define_path(
    "output", None, "File to write: .safetensors, or .pt (which needs PyTorch); --from has a default"
)
_TO = flags.DEFINE_enum(
    "to", None, ["official", "diffusers", "transformers", "kohya"], "Tensor names to write; as they are"
)
_PART = flags.DEFINE_enum(
    "part",
    None,
    [*PARTS, "lora"],
    "Network of a checkpoint that holds several; also its name in a .pt. With --from, lora: the adapters alone",
)
_LORA = flags.DEFINE_multi_string("lora", None, "Adapter to merge into the input, FILE or FILE:SCALE; several too")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, list(_DTYPES), "Type of the numbers; as they are (float16 for sf_jax's files)"
)


def _convert(tensors: TensorFile, output: Path) -> str:
    """Writes the tensors as the flags say; returns what it did."""
    guess = recognise(tensors.shapes, tensors.metadata)
    if guess.kind == "package":
        # Its tensors have the official names; what else its header says is lost with it.
        guess = recognise(tensors.shapes)
    if guess.kind == "unknown":
        raise ValueError(f"{tensors.path}: this is a {guess.title}")
    naming = _TO.value or guess.naming
    if naming not in NAMINGS[guess.kind]:
        raise ValueError(f"to is {naming!r}: for a {guess.title} it must be one of {', '.join(NAMINGS[guess.kind])}")
    source, target = (entries_of(guess.kind, guess.config, name) for name in (guess.naming, naming))
    tensors = load.normalised(tensors, [entry.name for entry in source])
    load.check(source, tensors, param_shapes_of(guess.kind, guess.config), guess.title)
    tensors = load.translated(source, target, tensors)
    if _DTYPE.value:
        tensors = tensors.astype(_DTYPES[_DTYPE.value])
    if output.suffix in TORCH_SUFFIXES:
        part = _PART.value or tensors.part
        # In the official checkpoints of several networks a transformer sits in a wrapper that calls it `model`.
        prefix = "model." if part and guess.kind == "transformer" and naming == "official" else ""
        write_torch(output, tensors.renamed({prefix + name: name for name in tensors}), part)
    else:
        # Readers of PyTorch's world refuse files without this entry.
        write_safetensors(output, tensors, {"format": "pt"})
    part = f" ({tensors.part})" if tensors.part else ""
    return f"{guess.title}{part}, {len(tensors)} tensors, {guess.naming} -> {naming}"


def _export(output: Path | None) -> tuple[str, Path]:
    """Writes the averaged network of a training run; returns what it did, and the file."""
    if _TO.value not in (None, "official"):
        raise ValueError(f"to is {_TO.value!r}: --from writes the official names, convert its output for others")
    if (output is None or output.suffix not in TORCH_SUFFIXES) and _PART.value is not None:
        raise ValueError(f"part is {_PART.value!r}: a .safetensors file holds one network, leave part out")
    step, package = export.load_run(_FROM.value)
    # Not the name of a finished run's file, which means that there is nothing left to train.
    output = output or Path(_FROM.value) / f"{package.kind}_{step:06d}.safetensors"
    dtype = _DTYPE.value or "float32"
    if output.suffix in TORCH_SUFFIXES:
        tensors = load.file_tensors(transformer.entries(package.config), package.params).astype(_DTYPES[dtype])
        write_torch(
            output, tensors.renamed({f"model.{name}": name for name in tensors}), _PART.value or "generator_ema"
        )
    else:
        save_package(output, package, dtype)
    return f"{package.kind} of step {step}", output


def _convert_adapter(output: Path | None) -> str:
    """Writes an adapter file, of a training run or of the input; returns what it did."""
    if output is None or output.suffix != ".safetensors":
        raise ValueError(f"output is {output}: adapters are written to a .safetensors file, give its name")
    naming = _TO.value or "diffusers"
    if naming not in adapter_export.NAMINGS:
        raise ValueError(f"to is {naming!r}: for an adapter it must be one of {', '.join(adapter_export.NAMINGS)}")
    dtype = _DTYPES[_DTYPE.value] if _DTYPE.value else None
    if _FROM.value is not None:
        from sf_jax.training.export import load_adapters  # here, as no other use needs Orbax

        trained = load_adapters(_FROM.value)
        adapter_export.write_trained(output, trained, naming, dtype)
        return f"adapters of step {trained.step}, {trained.describe()} -> {naming}"
    with opened([Lora(_INPUT.value)]) as (adapter,):
        adapter_export.write_adapter(output, adapter, naming, dtype)
        return f"{adapter.describe()} -> {naming}"


def main() -> None:
    """Command line: see the module's docstring."""
    loras = parse_loras(_LORA.value or ())
    if loras and _INPUT.value is None:
        raise ValueError("lora: adapters are merged into the file of --input, give one")
    if (_INPUT.value is None) == (_FROM.value is None):
        raise ValueError("input and from: give one of them, a weight file or the workdir of a training run")
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if output is None and _FROM.value is None:
        raise ValueError("output is missing: give the file to write")
    if output is not None:
        if output.suffix not in (".safetensors", *TORCH_SUFFIXES):
            raise ValueError(f"output is {output}: its name must end in .safetensors or {', '.join(TORCH_SUFFIXES)}")
        check_writable(output.parent, "output")
    if (_FROM.value is not None and _PART.value == "lora") or (_INPUT.value and is_adapter(_INPUT.value)):
        if loras:
            raise ValueError(
                f"lora: {_INPUT.value} is an adapter itself, they are merged into the weights of a network"
            )
        print(f"{_convert_adapter(output)}: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
        return
    if _PART.value == "lora":
        raise ValueError(f"part is 'lora': {_INPUT.value} is no adapter; it is for adapters, and for --from")
    if _FROM.value is not None:
        done, output = _export(output)
        print(f"{done}: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
        return
    to_torch = output.suffix in TORCH_SUFFIXES
    with open_tensors(_INPUT.value, _PART.value, need_part=not to_torch) as tensors:
        if "sf_jax" in tensors.metadata and _TO.value is None and not to_torch:
            dtype = _DTYPE.value or "float16"
            if dtype == "bfloat16":
                raise ValueError("dtype is 'bfloat16': files of sf_jax are float16 or float32")
            package = load_package(_INPUT.value)
            params = merge_params(package.params, package.config, loras)
            save_package(output, dataclasses.replace(package, params=params), dtype)
            done = "package of sf_jax"
        else:
            with merged(tensors, loras) as changed:
                done = _convert(changed, output)
        done += "".join(f" + {text}" for text in describe(loras))
    print(f"{done}: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    command.run(main)
