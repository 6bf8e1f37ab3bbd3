"""Loads the trained network from a run's checkpoints, whether or not the run has finished."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from sf_jax.config import MeshConfig, TrainConfig, from_dict
from sf_jax.files import reason_of
from sf_jax.training import sharding, stages
from sf_jax.training.checkpoint import read_about, step_folders
from sf_jax.training.fingerprint import measure
from sf_jax.training.step import new_state, whole_params
from sf_jax.weights.adapter_export import Base, TrainedAdapters
from sf_jax.weights.package import Package, shipped_weights


def load_run(workdir: Path | str) -> tuple[int, Package]:
    """The EMA network of the newest checkpoint of a run; the rest of the checkpoint is not read.

    Args:
      workdir: the workdir of `sf_jax.train`.

    Returns:
      The step and the network.

    Raises:
      ValueError: if there is no checkpoint, or the newest is damaged; the message names the previous one.
    """
    step, about, config, params = _restore(workdir)
    frozen = {}
    if config.lora.rank:
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        frozen["model_base"] = stages.adapted_base(config, mesh)
    return step, stages.package_of(config, jax.device_get(whole_params(config, params, frozen)))


def load_adapters(workdir: Path | str) -> TrainedAdapters:
    """The EMA adapters of the newest checkpoint of a run; their base network is not read.

    Args:
      workdir: the workdir of `sf_jax.train`, with `lora.rank` above 0.

    Raises:
      ValueError: see `load_run`, and if the run trains no adapters.
    """
    step, about, config, params = _restore(workdir)
    if not config.lora.rank:
        raise ValueError(f"part is 'lora': the run in {workdir} trains the whole network, its lora.rank is 0")
    field = "init_weights" if config.init_weights else "teacher_weights"
    base = getattr(config, field)
    file = (shipped_weights(base) or Path(base)).name
    digest = str(about["data"].get("digests", {}).get(field, ""))
    return TrainedAdapters(
        config.model, config.lora.rank, config.lora.alpha, Base(file, digest), step, jax.device_get(params)
    )


def _restore(workdir: Path | str) -> tuple[int, dict, TrainConfig, dict]:
    """Step, description, config and EMA of the trained parameters from the newest checkpoint of a run."""
    workdir = Path(workdir).resolve()  # Orbax needs absolute paths
    found = step_folders(workdir / "checkpoints")
    if not found:
        raise ValueError(f"from is {workdir}: there is no finished checkpoint in {workdir / 'checkpoints'}")
    step, folder = found[0]
    older = f"; move it away to take step {found[1][0]}" if found[1:] else ""
    try:
        about = read_about(folder)
        config = from_dict(about["config"])
        network = jax.eval_shape(lambda: new_state(config)).model
        name = "params" if network.ema is None else "ema"
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), {"model": {name: getattr(network, name)}}
        )
        arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
        handler = ocp.PyTreeCheckpointHandler()
        wanted = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=True)
        tree = handler.restore(folder / "state", args=wanted)
        wrong = [path for path, leaf in measure(tree).items() if [*leaf[:3]] != about["leaves"][path]]
    except Exception as error:  # Orbax raises many types; the user needs the folder and what to do.
        raise ValueError(f"checkpoint {folder} cannot be read ({reason_of(error)}){older}") from error
    if wrong:
        raise ValueError(f"checkpoint {folder} is damaged: {wrong[0]} is not as it was saved{older}")
    return step, about, config, tree["model"][name]
