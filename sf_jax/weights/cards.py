"""Model cards: a README.md next to exported weights, with the YAML header that the Hugging Face hub reads."""

import dataclasses
import glob
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sf_jax
from sf_jax.config import to_dict
from sf_jax.files import replacing
from sf_jax.weights.export import Network
from sf_jax.weights.package import Package

CARD = "README.md"
PAPER = "2506.08009"
# Figures of a log line that describe the machine's speed or are unrelated to the weights.
_NO_FIGURES = ("seconds_per_step", "frames_per_second", "model_flop_utilization", "warnings", "step")
_REPORTS = ("results.json", "evaluation/results.json")
_WHOSE = {
    "official": "the official code's",
    "diffusers": "diffusers'",
    "transformers": "transformers'",
    "comfy": "ComfyUI's",
    "kohya": "kohya's",
    "rcm": "NVlabs/rcm's",
}
_PROGRAMS = {"diffusers": "diffusers' WanPipeline", "comfy": "ComfyUI"}
_KINDS = {
    "student": "causal student of few steps",
    "teacher": "bidirectional network of many steps",
    "causal": "causal network of many steps",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Facts about exported weights from the folder of their training run.

    Attributes:
      config: its config, as JSON.
      step: iterations after which the weights were saved.
      code: version of the package that trained them.
      digests: config field -> short hash of the data or weights it names.
      figures: latest value of each logged metric up to `step`.
      reports: name of an evaluated model -> its figures.
    """

    config: Mapping[str, Any]
    step: int
    code: str
    digests: Mapping[str, str]
    figures: Mapping[str, float]
    reports: Mapping[str, Mapping[str, float]]

    @property
    def digest(self) -> str:
        """A short hash of the config."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]


def read_run(folder: Path, step: int | None = None) -> Run | None:
    """Reads the facts for a card from a run's folder; the run may be unfinished, and damaged files count as missing.

    Args:
      folder: workdir of `sf_jax.train`.
      step: iterations after which the weights were saved; None is the newest checkpoint.

    Returns:
      The facts; None if there is no checkpoint.
    """
    steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.is_dir() and path.name.isdecimal()]
    if not steps:
        return None
    newest = step if step in steps else max(steps)
    about = _json(folder / "checkpoints" / str(newest) / "about" / "metadata")
    config, data = about.get("config"), about.get("data")
    if not isinstance(config, dict) or not isinstance(data, dict):
        return None
    digests = {str(k): str(v) for k, v in _table_of(data, "digests").items()}
    step = newest if step is None else step
    reports = {}
    for name in _REPORTS:
        reports |= {str(k): _numbers(v) for k, v in _table_of(_json(folder / name), "figures").items()}
    return Run(config, step, str(about.get("code")), digests, _figures(folder / "log.jsonl", step), reports)


def run_of(weights: Path, header: Package | None) -> Run | None:
    """The run that produced a weight file, if the file is still in that run's folder.

    Args:
      weights: the file; the names that `convert --from` writes end in the step.
      header: the file's header; None for files that do not come from a run.

    Returns:
      The run; None if the folder is not a run's, or the run has other settings.
    """
    if header is None or not weights.is_file():
        return None
    match = re.search(r"_(\d{6,})$", weights.stem)
    run = read_run(weights.parent, int(match[1]) if match else None)
    # With other settings the file was copied there, not written by this run.
    rollout = json.loads(json.dumps(to_dict(header.rollout)))
    return run if run is not None and run.config.get("rollout") == rollout else None


def is_json(path: Path, content: dict) -> bool:
    """Whether a file contains this JSON object."""
    return _json(path) == content


def _json(path: Path) -> dict:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _table_of(values: Mapping, name: str) -> dict:
    """An entry that should be a dict; empty if it is not."""
    return values[name] if isinstance(values.get(name), dict) else {}


def _numbers(values) -> dict[str, float]:
    """The numeric entries of a dict."""
    values = values if isinstance(values, dict) else {}
    return {str(k): v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _figures(log: Path, step: int) -> dict[str, float]:
    figures = {}
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    for line in lines:
        try:
            values = _numbers(json.loads(line))
        except (ValueError, RecursionError):  # cut short by a kill
            continue
        if 0 < values.get("step", 0) <= step:
            figures |= values
    return {name: value for name, value in figures.items() if name not in _NO_FIGURES}


@dataclasses.dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
      title: its heading.
      layout: naming of the weights, one of `export.LAYOUTS` or `adapter_export.NAMINGS`.
      contents: a phrase for each network in the files.
      header: the transformer's header; None if sf_jax.train did not write the weights.
      run: the run that trained the weights; None if its folder is unknown.
      license: the hub's identifier of the weights' license; None if the user gave none.
      base_model: the hub's name of the model they derive from; None if the user gave none.
      is_adapter: whether these are adapters (LoRA) instead of a network's weights.
    """

    title: str
    layout: str
    contents: Sequence[str]
    header: Package | None = None
    run: Run | None = None
    license: str | None = None
    base_model: str | None = None
    is_adapter: bool = False

    @property
    def text(self) -> str:
        """The card: a YAML header followed by Markdown."""
        sections = [self._introduction(), self._generation(), self._training(), self._data(), self._results()]
        sections.append(self._license())
        return f"---\n{_yaml(self._metadata())}---\n\n" + "\n".join(section for section in sections if section)

    def _metadata(self) -> dict[str, str | list[str]]:
        tags = (
            [f"arxiv:{PAPER}", "self-forcing", "video-generation"] if self.header is not None else ["video-generation"]
        )
        values = {
            "license": self.license,
            "base_model": self.base_model,
            "pipeline_tag": "text-to-video",
            "library_name": "diffusers" if self.layout in ("diffusers", "transformers") else "sf_jax",
            "tags": [
                *tags,
                *(["comfyui"] if self.layout == "comfy" else []),
                *(["lora"] if self.is_adapter else []),
            ],
        }
        return {name: value for name, value in values.items() if value is not None}

    def _introduction(self) -> str:
        lines = [
            f"# {self.title}",
            "",
            f"Weights with {_WHOSE[self.layout]} tensor names, written by sf_jax {sf_jax.__version__}:",
            "",
        ]
        lines += [f"- {phrase}" for phrase in self.contents]
        if self.header is not None and self.header.kind != "teacher" and self.layout in ("diffusers", "comfy"):
            lines += ["", "The transformer is causal and generates chunk by chunk with a cache of keys and values."]
            lines += [
                f"Programs without that cache, {_PROGRAMS[self.layout]} among them, run it as it was not trained."
            ]
        return "\n".join(lines) + "\n"

    def _generation(self) -> str:
        if self.header is None:
            return ""
        header, rollout = self.header, self.header.rollout
        rows = {
            "kind": _KINDS[header.kind],
            "latent frames": header.frames,
            "latent size": "x".join(map(str, header.size)),
        }
        if header.kind == "student":
            rows |= {"steps": rollout.steps, "steps of the first chunk": rollout.first_steps or rollout.steps}
            rows |= {"warped steps": rollout.warp}
        rows |= {"shift": header.shift}
        rows |= {} if header.kind == "student" else {"guidance": header.guidance}
        if header.kind != "teacher":
            rows |= {"chunk": rollout.chunk, "first frame alone": rollout.first_frame_alone}
            rows |= {"window": rollout.window or "all frames", "sink": rollout.sink, "positions": rollout.positions}
            rows |= {"context": rollout.context, "context timestep": rollout.context_timestep}
            rows |= {"context noise": rollout.context_noise}
        return "## How it generates\n\n" + _table(rows)

    def _training(self) -> str:
        if self.run is None:
            return ""
        config = self.run.config
        rows = {"stage": config.get("stage"), "iterations": f"{self.run.step} of {config.get('steps')}"}
        if config.get("stage") == "distill":
            every = _numbers(config).get("generator_every")
            warmup = _numbers(_table_of(config, "gan")).get("warmup") if config.get("objective") == "gan" else None
            updates = -(-self.run.step // every) - -(-(warmup or 0) // every) if every else None
            rows |= {"objective": config.get("objective"), "trained on": config.get("student_input")}
            rows |= {"critic updates": self.run.step, "student updates": max(0, updates) if every else None}
        elif config.get("stage") == "init":
            rows |= {"start by": config.get("init")}
        rows |= {"batch size": config.get("batch_size"), "seed": config.get("seed")}
        optimizer, lora = _table_of(config, "optimizer"), _table_of(config, "lora")
        rows |= {"optimizer": f"{optimizer.get('name')}, learning rate {optimizer.get('lr')}"}
        rows |= {"LoRA rank": lora["rank"]} if lora.get("rank") else {}
        rows |= {"EMA decay": _table_of(config, "ema").get("decay")}
        rows |= {"config (SHA-256, 16 digits)": f"`{self.run.digest}`", "code": f"`{self.run.code}`"}
        rows |= {f"`{name}`": f"`{value}`" for name, value in self.run.digests.items() if name != "data.dir"}
        return "## How it was trained\n\n" + _table({k: v for k, v in rows.items() if v is not None})

    def _data(self) -> str:
        if self.run is None:
            return ""
        data = _table_of(self.run.config, "data")
        captions = str(data.get("captions", "full"))
        digits = "moving digits" + ("" if captions == "full" else f", captions {captions!r}")
        rows = {"dataset": digits if data.get("name") == "digits" else "prepared prompts and videos"}
        rows |= {"digest": f"`{self.run.digests['data.dir']}`"} if "data.dir" in self.run.digests else {}
        counts = _counts(Path(str(data.get("dir"))), captions)
        rows |= {f"entries of `{name}` when this was written": count for name, count in counts.items()}
        return "## Data\n\n" + _table(rows)

    def _results(self) -> str:
        if self.run is None or not (self.run.figures or self.run.reports):
            return ""
        parts = []
        if self.run.figures:
            parts.append("Last logged metrics of the training:\n\n" + _table(self.run.figures))
        for name, figures in self.run.reports.items():
            parts.append(f"Evaluation, {name}:\n\n" + _table(figures))
        return "## Figures\n\n" + "\n".join(parts)

    def _license(self) -> str:
        base = f"[{self.base_model}](https://huggingface.co/{self.base_model})" if self.base_model else "the base model"
        if self.license:
            weights = f"The weights: {self.license}."
        else:
            weights = f"The weights: see {base}, if they derive from one; no license was given when they were exported."
        return f"## License\n\n{weights} The code that wrote them, sf_jax: Apache-2.0.\n"


def _counts(folder: Path, variant: str) -> dict[str, int]:
    """Number of training examples of each dataset in a data folder, from tfds's `dataset_info.json`.

    Args:
      folder: the data folder.
      variant: which of the variants of a dataset counts (`moving_digits.VARIANTS`), for those that have some.
    """
    counts = {}
    paths = [*folder.glob("*/dataset_info.json"), *folder.glob(f"*/{glob.escape(variant)}/*/dataset_info.json")]
    for info in map(_json, sorted(paths)):
        for split in info["splits"] if isinstance(info.get("splits"), list) else []:
            lengths = split.get("shardLengths") if isinstance(split, dict) and split.get("name") == "train" else None
            if isinstance(lengths, list) and all(str(length).isdecimal() for length in lengths):
                counts[str(info.get("name"))] = sum(map(int, lengths))
    return counts


def contents_of(networks: Sequence[Network]) -> list[str]:
    """A phrase for each network: what it is, and the types of its tensors."""
    phrases = []
    for network in networks:
        types = sorted({dtype.name for dtype in network.tensors.dtypes.values()})
        phrases.append(f"{network.title}, {len(network.tensors)} tensors, {' and '.join(types)}")
    return phrases


def write_card(card: Card, folder: Path, stem: str | None = None) -> tuple[Path | None, str]:
    """Writes a card next to weights; never overwrites an existing file.

    Args:
      card: its content.
      folder: the folder in which to write README.md.
      stem: the weights' name without suffix, used as the card's name if README.md exists; None for no second name.

    Returns:
      The path, or None if nothing was written; and a message for the user, empty if README.md was written.
    """
    names, text = [CARD, *([f"{stem}.md"] if stem else [])], card.text
    for name in names:
        path = folder / name
        if path.exists() and not _is_text(path, text):
            continue
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        return path, "" if name == CARD else f"{folder / CARD} is there already and stays: the model card is {path}"
    taken = " and ".join(str(folder / name) for name in names)
    return None, f"{taken} {'are' if len(names) > 1 else 'is'} there already: no model card was written"


def _is_text(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def _yaml(values: Mapping[str, str | list[str]]) -> str:
    """YAML of strings and lists of strings; every JSON string is valid YAML."""
    lines = []
    for name, value in values.items():
        if isinstance(value, str):
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
        else:
            lines += [f"{name}:", *(f"- {json.dumps(item, ensure_ascii=False)}" for item in value)]
    return "".join(f"{line}\n" for line in lines)


def _table(rows: Mapping[str, Any]) -> str:
    """A Markdown table of names and values."""
    lines = ["| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())]) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_cell, value))
    return " ".join(str(value).split()).replace("|", "\\|")
