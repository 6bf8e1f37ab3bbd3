"""A data set of a teacher's ODE trajectories, written by tfds as ArrayRecord files.

Source: CausVid (arXiv 2412.07772); official `scripts/generate_ode_pairs.py`.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sf_jax.data.moving_digits import quiet
from sf_jax.files import check_writable


@dataclasses.dataclass
class PairsConfig(tfds.core.BuilderConfig):
    """What a set of pairs is made of.

    Attributes:
      shape: [S, F, H, W, C] of one trajectory.
      recipe: everything that determines the trajectories; a set made by another recipe is not reused.
      make: () -> iterator of (trajectory float32 `shape`, caption), called only when the set is missing.
    """

    shape: tuple[int, ...] = ()
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    make: Callable[[], Iterator[tuple[np.ndarray, str]]] | None = None


class OdePairs(tfds.core.GeneratorBasedBuilder):
    """Builder of ODE pairs; needs neither TensorFlow nor the network."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # see moving_digits.MovingDigits

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        features = {
            "trajectory": tfds.features.Tensor(
                shape=config.shape, dtype=np.float32, encoding=tfds.features.Encoding.BYTES
            ),
            "caption": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=json.dumps(config.recipe, sort_keys=True),
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, (trajectory, caption) in enumerate(self.builder_config.make()):
            yield index, {"trajectory": trajectory, "caption": caption}


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Random access to pairs: trajectory float32 [S, F, H, W, C], caption str."""

    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.records[index]
        return {"trajectory": example["trajectory"], "caption": example["caption"].decode()}


def open_pairs(
    data_dir: str | Path,
    shape: tuple[int, ...],
    recipe: dict[str, Any],
    make: Callable[[], Iterator[tuple[np.ndarray, str]]],
) -> PairSource:
    """Opens the pairs in a folder, generating them first where they are missing.

    Raises:
      ValueError: The folder cannot be written, or holds pairs made by another recipe.
    """
    config = PairsConfig(name="pairs", shape=shape, recipe=recipe, make=make)
    builder = OdePairs(data_dir=str(data_dir), config=config, file_format="array_record")
    info = Path(builder.data_path) / "dataset_info.json"
    if info.is_file():
        saved = json.loads(json.loads(info.read_text())["description"])
        if saved != json.loads(json.dumps(recipe)):
            raise ValueError(
                f"ode.dir {data_dir} holds pairs of another recipe ({saved}, wanted {recipe}): "
                "remove the folder or use another one"
            )
    else:
        check_writable(data_dir, "ode.dir")
        with quiet():
            builder.download_and_prepare()
    return PairSource(builder.as_data_source("train"))
