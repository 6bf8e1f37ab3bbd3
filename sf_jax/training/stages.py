"""The inputs and outputs of each training stage: weights, data, update programs and the exported package."""

import contextlib
import dataclasses
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sf_jax.config import TrainConfig
from sf_jax.data.ode_pairs import PairSource
from sf_jax.models.vae import VaeConfig
from sf_jax.models.wan import WanConfig
from sf_jax.training import lora, pairs, self_forcing, sharding, supervised
from sf_jax.training import step as steps
from sf_jax.training.fingerprint import measure
from sf_jax.training.media import Media
from sf_jax.training.sources import VIDEO_KEYS, Source, digest_of, open_source
from sf_jax.weights import hub
from sf_jax.weights.files import open_tensors
from sf_jax.weights.folders import find_model, read_config
from sf_jax.weights.networks import load_network
from sf_jax.weights.package import Package, check_told_sizes, load_package, read_header, shipped_weights
from sf_jax.weights.recognize import HEAD_DIM
from sf_jax.weights.transformer import naming_of

RECORDS = "records"  # digest of the records that are read from `data.dir` and `ode.dir`


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage, ready to run.

    Attributes:
      params: parameters to start from, or None for random ones.
      critic: the critic's parameters to start from, or None.
      frozen: frozen parameters, which the updates read.
      constants: arrays that are added to every batch.
      keys: entries of a batch that the updates read.
      iterator: endless batches, with `get_state` and `set_state`.
      updates: the update programs, in order; one of them ends each iteration.
      source: source of batches and latents.
      digests: hashes of data and frozen networks, by the config field with their path.
      adapters: adapters to start from, see `lora.read_start`.
    """

    params: dict | None
    critic: dict | None
    frozen: dict
    constants: dict
    keys: tuple[str, ...]
    iterator: grain.DatasetIterator
    updates: tuple[steps.Update, ...]
    source: Source
    digests: dict[str, str]
    adapters: dict = dataclasses.field(default_factory=dict)


def open_stage(config: TrainConfig, workdir: Path, mesh: Mesh, fresh: bool = True) -> Stage:
    """Prepares the stage of a config; may build the dataset, and the ODE pairs of "init".

    Weights are placed on the mesh as they are read. A run that is not `fresh` resumes from a checkpoint: its initial
    weights are not read again, except the base of adapters.

    Raises:
      ValueError: if data or weights are missing or do not fit.
    """
    keys, names = keys_of(config)
    if config.data.cut and VIDEO_KEYS[config.data.name] not in keys:
        raise ValueError(f"data.cut is {config.data.cut}: this run trains on no whole clips, it must be 0")
    if config.data.cut and not config.rollout.sink:
        raise ValueError(
            f"data.cut is {config.data.cut}: it moves the first rollout.sink frames of a clip, and rollout.sink is 0"
        )
    constants = {"seed": np.uint32(config.seed % 2**32)}
    frozen = {}
    vae = None
    if uses_vae(config):
        vae, frozen["vae"] = _vae(config, mesh)
    source = open_source(config, bool({VIDEO_KEYS[config.data.name], "context"} & set(keys)), vae)
    params, adapters = None, {}
    if config.lora.rank:
        if config.lora.init is not None and fresh:
            adapters = lora.read_start(config.lora.init, config.model)
        params = frozen["model_base"] = adapted_base(config, mesh)
    elif fresh:
        params = start_params(config, mesh)
        if params is None and config.stage == "distill":
            raise ValueError(
                "init_weights is None: a student of other sizes than the teacher, or without one, needs weights to "
                "start from; give its file"
            )
    if fresh and jax.process_index() == 0:
        from_teacher = config.teacher_weights if params is not None else "random numbers"
        with_adapters = f" with the adapters {config.lora.init}" if adapters else ""
        print(f"starting from {config.init_weights or from_teacher}{with_adapters}", flush=True)
    updates = updates_of(config, source.media)
    if "trajectory" in keys:

        def load_teacher(mesh):
            return _teacher(config, mesh, config.frozen_dtype)

        found = pairs.open_pairs(config, workdir, load_teacher, source, mesh)
        iterator = pairs.pair_iterator(found, config, source, jax.process_index(), jax.process_count())
        digests = _digests(config, frozen, source, found)
        return Stage(params, None, frozen, constants, keys, iterator, updates, source, digests, adapters)
    critic = None
    if needs_teacher(config):
        frozen["teacher"] = _teacher(config, mesh, config.frozen_dtype, config.offload_teacher)
    if config.stage == "distill" and (fresh or config.critic_lora.rank):
        critic = _critic(config, mesh)
        if config.critic_lora.rank:
            frozen["critic_base"] = _cast(critic, config.frozen_dtype)
    iterator = source.videos() if VIDEO_KEYS[config.data.name] in keys else source.prompts()
    constants |= {"negative": source.negative} if "negative" in names else {}
    digests = _digests(config, frozen, source)
    return Stage(params, critic, frozen, constants, keys, iterator, updates, source, digests, adapters)


def _digests(config: TrainConfig, frozen: dict, source: Source, made: PairSource | None = None) -> dict[str, str]:
    """Hashes of what the updates read in addition to the config; excludes a VAE that is only used for samples.

    Networks are hashed as a whole; records are hashed as in `shards.file_digests`, under the name `RECORDS`.
    """
    fields = {
        "vae": "vae_weights" if config.rollout_frames else None,
        "model_base": "init_weights" if config.init_weights else "teacher_weights",
        "critic_base": "critic_weights" if config.critic_weights else "teacher_weights",
        "teacher": "teacher_weights",
    }
    found = {"data.dir": source.digest}
    records = [source.records, made.records.digest if made else None]
    if any(records):
        found[RECORDS] = digest_of(records)
    for name, field in fields.items():
        if field and name in frozen:
            found[field] = digest_of({path: leaf.checksum for path, leaf in measure(frozen[name]).items()})
    return found


def updates_of(config: TrainConfig, media: Media) -> tuple[steps.Update, ...]:
    """The update programs of a stage."""
    programs = {
        "teacher": lambda: [supervised.teacher_program(config, media)],
        "causal": lambda: [supervised.causal_program(config, media)],
        "ode": lambda: [supervised.ode_program(config)],
        "consistency": lambda: [supervised.consistency_program(config, media)],
        "distill": lambda: self_forcing.programs(config, media),
    }[config.init if config.stage == "init" else config.stage]()
    return tuple(
        steps.Update(program.name, steps.make_step(config, program), program.due, program.trips) for program in programs
    )


def keys_of(config: TrainConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Entries of a batch that the updates read, and names of the arrays that are added to every batch.

    The seed is one of these, so that runs with different seeds share a compiled program.
    """
    if config.stage == "init" and config.init == "ode":
        return ("trajectory", "text") + (("context",) if config.ode.teacher == "causal" else ()), ("seed",)
    own = config.stage == "distill" and config.student_input == "rollout" and config.objective != "gan"
    prompts_alone = own and not config.image_to_video and not config.regression_weight
    keys = ("text",) if prompts_alone else (VIDEO_KEYS[config.data.name], "text")
    return keys, ("seed", "negative") if needs_teacher(config) else ("seed",)


def needs_teacher(config: TrainConfig) -> bool:
    """Whether the updates evaluate a frozen teacher; the GAN objective needs none."""
    return (config.stage == "distill" and config.objective != "gan") or (
        config.stage == "init" and config.init == "consistency"
    )


def uses_vae(config: TrainConfig) -> bool:
    """Whether the run decodes latents to pixels, as long rollouts and sample videos of Wan do."""
    long = config.stage == "distill" and any(frames > config.data.frames for frames in config.rollout_frames)
    return config.data.name == "wan" and (long or config.log.sample_every > 0)


def _vae(config: TrainConfig, mesh: Mesh) -> tuple[VaeConfig, dict]:
    """Wan's VAE, replicated on every device."""
    if config.vae_weights is None:
        raise ValueError(
            "vae_weights is None: rollouts longer than data.frames and sample videos (log.sample_every) need Wan's "
            "VAE; give its file, or a model folder"
        )
    try:
        place = hub.parse(config.vae_weights)
        is_folder = Path(config.vae_weights).is_dir() if place is None else not place.path
        path = find_model(config.vae_weights, ["vae"]).vae if is_folder else config.vae_weights
        vae, params = load_network(path, "vae", None, config.frozen_dtype, sharding=sharding.replicated(mesh))
    except ValueError as error:
        raise ValueError(f"vae_weights: {error}") from error
    return dataclasses.replace(vae, dtype=config.model.dtype), params


def _cast(params: dict, dtype: str) -> dict:
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)


def _header_of(path: Path, field: str) -> tuple[Package | None, bool]:
    """The header of a file or shards written by sf_jax.train, and whether their names are the official ones."""
    header = read_header(path)
    if header is None:
        return None, False
    try:
        with open_tensors(path) as tensors:
            return header, naming_of(tensors) == "official"
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def _load(
    path: str, wanted: WanConfig, field: str, dtype: str, mesh: Mesh, offload: bool = False
) -> tuple[dict, Package | None]:
    """Loads a transformer of the wanted sizes onto the mesh; also returns the file's header (None if it has none).

    The file was written by training, or has the official or diffusers names (including `.pt` checkpoints).
    """

    def places(like):
        found = sharding.tree_shardings(like, mesh)
        return sharding.offloaded(found) if offload else found

    advice = f"; {path!r} is shipped, give a file of your own, or None" if shipped_weights(path) else ""
    try:
        path = shipped_weights(path) or Path(hub.local_file(path))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    header, official = _header_of(path, field)
    # Sharded files and files with diffusers names are read like those of others.
    if header is not None and official and path.is_file() and path.suffix != ".json":
        package = load_package(path)
        same = {"remat": wanted.remat, "dtype": wanted.dtype, "attention": wanted.attention}
        if dataclasses.replace(package.config, **same) != wanted:
            raise ValueError(f"{field} {path} has sizes {package.config}: the config says {wanted}{advice}")
        typed = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), package.params)
        return sharding.put(typed, places(typed)), header
    if header is not None:
        check_told_sizes(path, header, wanted, f"the config, {field}")
    else:
        _check_heads(path, wanted, field)
    try:
        _, params = load_network(path, "transformer", wanted, dtype, sharding=places)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    return params, header


def _check_heads(path: Path, wanted: WanConfig, field: str) -> None:
    """Compares what no tensor's shape tells, the number of heads and eps, with the `config.json` next to a file."""
    folders = (path, path / "transformer") if path.is_dir() else (path.parent,)
    known = None
    for folder in folders:
        if (folder / "config.json").is_file():
            with contextlib.suppress(ValueError):  # the config of something else
                known = read_config(folder / "config.json")
    if known is not None and (known.dim, known.num_layers) == (wanted.dim, wanted.num_layers):
        for name in ("num_heads", "eps"):
            if getattr(known, name) != getattr(wanted, name):
                raise ValueError(
                    f"{field} {path}: {name} is {getattr(known, name)} in the config.json beside it, the config says "
                    f"{getattr(wanted, name)}"
                )
    elif wanted.dim % HEAD_DIM == 0 and wanted.num_heads != wanted.dim // HEAD_DIM:
        print(
            f"{field} {path}: nothing in the file says how many heads it has; the config says {wanted.num_heads}, and "
            f"Wan's networks of that width have {wanted.dim // HEAD_DIM}",
            flush=True,
        )


def _teacher_field(config: TrainConfig) -> str:
    if config.teacher_weights is None:
        raise ValueError(f"teacher_weights is None: stage {config.stage!r} needs a teacher; give its file")
    return config.teacher_weights


def _teacher(config: TrainConfig, mesh: Mesh, dtype: str, offload: bool = False) -> dict:
    """The stage's teacher: bidirectional, except for stage "init" with a causal teacher."""
    params, header = _load(_teacher_field(config), config.teacher_model, "teacher_weights", dtype, mesh, offload)
    causal = config.stage == "init" and (config.init == "consistency" or config.ode.teacher == "causal")
    wanted = "causal" if causal else "teacher"
    if header is not None and header.kind != wanted:
        raise ValueError(
            f"teacher_weights {config.teacher_weights} is a {header.kind} network: here it must be a {wanted} network"
        )
    _check_captions(config, "teacher_weights", header)
    return params


def _check_captions(config: TrainConfig, field: str, header: Package | None) -> None:
    """Checks that a network, if its file says what it knows, was trained on the captions of the config."""
    if header is not None and header.captions != config.data.captions:
        raise ValueError(
            f"{field} is {getattr(config, field)}, which knows captions {header.captions!r}: data.captions is "
            f"{config.data.captions!r}, it must be a network that was trained on those"
        )


def adapted_base(config: TrainConfig, mesh: Mesh) -> dict:
    """The frozen base network of the adapters, in `frozen_dtype`."""
    params = start_params(config, mesh)
    if params is None:
        raise ValueError("init_weights is None: lora.rank is above 0, and adapters need a network to be added to")
    return _cast(params, config.frozen_dtype)


def start_params(config: TrainConfig, mesh: Mesh) -> dict | None:
    """The trained network's initial parameters: those given, else the teacher's if they fit, else None."""
    if config.init_weights is not None:
        params, header = _load(config.init_weights, config.model, "init_weights", "float32", mesh)
        if config.stage == "distill":  # earlier stages may learn other captions
            _check_captions(config, "init_weights", header)
        return params
    from_teacher = config.stage in ("init", "distill") and config.model == config.teacher_model
    if from_teacher and (config.teacher_weights is not None or needs_teacher(config)):
        return _load(_teacher_field(config), config.model, "teacher_weights", "float32", mesh)[0]
    return None


def _critic(config: TrainConfig, mesh: Mesh) -> dict:
    """The critic's initial parameters."""
    if config.critic_weights is not None:
        return _load(config.critic_weights, config.critic_model, "critic_weights", "float32", mesh)[0]
    if config.critic_model != config.teacher_model:
        raise ValueError("critic_weights is None: a critic of other sizes than the teacher needs weights to start from")
    return _load(_teacher_field(config), config.critic_model, "teacher_weights", "float32", mesh)[0]


def package_of(config: TrainConfig, params: dict) -> Package:
    """The exported result of a finished run: the given weights of the whole network, with the settings to use them."""
    kind = config.stage if config.stage in ("teacher", "causal") else "student"
    return Package(
        kind=kind,
        config=dataclasses.replace(config.model, remat="none"),
        rollout=config.rollout,
        frames=config.data.frames,
        size=(config.data.height, config.data.width),
        shift=config.score.score_shift if kind == "teacher" else config.rollout.shift,
        guidance=config.score.guidance,
        params=params,
        captions=config.data.captions,
    )
