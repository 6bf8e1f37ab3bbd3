"""Checkpoints: state, data position and config in one atomic, asynchronous Orbax step."""

import json
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp

from sf_jax.config import TrainConfig, difference, to_dict

# A run may be continued with other values of these; every other field is part of what is computed.
FREE_FIELDS = ("log_every", "checkpoint_every", "keep_checkpoints", "on_nonfinite", "mesh", "data.dir")


def open_manager(workdir: pathlib.Path, config: TrainConfig) -> ocp.CheckpointManager:
    """The checkpoints of a working directory, without what an interrupted save has left."""
    folder = (workdir / "checkpoints").resolve()
    # Orbax's own clean-up is a thread that nothing waits for: a run that ends early would end in its traceback.
    if jax.process_index() == 0:
        for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.keep_checkpoints, create=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(folder, options=options)


def save(manager: ocp.CheckpointManager, step: int, state, data_state: dict, config: TrainConfig) -> None:
    """Starts saving a step; device memory is copied before this returns, the files are written in the background."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data_state),
            config=ocp.args.JsonSave(json.loads(json.dumps(to_dict(config)))),
        ),
    )


def restore(manager: ocp.CheckpointManager, abstract_state, config: TrainConfig):
    """The newest checkpoint as (step, state, data state), or None if there is none.

    Args:
      manager: from `open_manager`.
      abstract_state: the state as `ShapeDtypeStruct`s that carry shardings.
      config: of this run; must equal the saved one but for `FREE_FIELDS`.

    Raises:
      ValueError: naming the config fields that differ, or the checkpoint that does not fit.
    """
    step = manager.latest_step()
    if step is None:
        return None
    saved = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
    changed = [
        line
        for line in difference(saved, json.loads(json.dumps(to_dict(config))))
        if not line.split(":")[0].startswith(FREE_FIELDS)
    ]
    if changed:
        raise ValueError(
            f"{manager.directory.parent} holds step {step} of a run with another config ({'; '.join(changed[:6])}): "
            "use another --workdir or the old config"
        )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
    try:
        restored = manager.restore(step, args=args)
    except Exception as error:  # Orbax raises many kinds; the user needs the file and what to do
        raise ValueError(
            f"checkpoint {manager.directory / str(step)} cannot be read ({str(error).splitlines()[0][:200]}): "
            "remove that folder to continue from the one before it"
        ) from error
    return step, restored["state"], restored["data"]
