"""Parity with the official code, on its recorded outputs in tests/goldens/A."""

import json
import pathlib

import jax
import numpy as np
import pytest

from tests.goldens import __main__ as goldens
from tests.goldens import packed
from tests.goldens.folder import Folder, Result, relative

FOLDER = pathlib.Path(__file__).parent / "goldens" / "A"
FILES = Folder(FOLDER).files
SLOW = ("05", "06", "07", "08", "09", "10_causal", "11")


@pytest.mark.parametrize("file", [pytest.param(f, marks=pytest.mark.slow if f.startswith(SLOW) else ()) for f in FILES])
def test_equals_the_official_code(file):
    with jax.default_matmul_precision("highest"):
        results = list(goldens.CASES[file](Folder(FOLDER)))
    assert results
    failed = [f"{r.name}: {r.error} > {r.tolerance} {r.note}" for r in results if not r.passed and r.error is not None]
    assert any(r.passed for r in results)
    assert not failed, "\n".join(failed)


def test_files_without_a_case_are_reported_and_nan_fails(tmp_path, capsys):
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    (tmp_path / "99_new.npz").write_bytes(b"")
    assert goldens.main([str(tmp_path)]) == 1  # nothing passed
    assert "99_new.npz" in capsys.readouterr().out
    assert not Result("nan", float("nan")).passed
    assert goldens.main([str(tmp_path / "nowhere")]) == 2


def test_a_broken_gradient_is_seen():
    folder = Folder(FOLDER)
    _, params = folder.load("generator")
    zeros = jax.tree.map(np.zeros_like, params)
    file = "06_grads_exit1_detachpast_ckpt.safetensors"
    assert not folder.compare_gradients("zeros", file, "generator", zeros)[0].passed
    zeros["head"]["bias"] = zeros["head"]["bias"] * np.nan
    assert np.isnan(folder.compare_gradients("nan", file, "generator", zeros)[0].error)


def test_thinned_outputs_are_compared_where_they_are_kept():
    rng = np.random.default_rng(0)
    sizes = {"noise": (1, 3, 16, 2, 2), "a_flow": (1, 3, 16, 2, 2), "a_cache_k_layer0": (1, 16, 2, 4)}
    arrays = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    thinned = packed.thin(arrays)
    assert (thinned["noise"] == arrays["noise"]).all()
    for name in ("a_flow", "a_cache_k_layer0"):
        kept = ~np.isnan(thinned[name])
        assert kept.mean() == 1 / packed.KEPT and relative(arrays[name], thinned[name]) == 0
        assert name != "a_flow" or kept.any(axis=(0, 2, 3, 4)).all()  # every frame
        wrong = arrays[name].copy()
        wrong[tuple(np.argwhere(kept)[-1])] = np.nan
        assert np.isnan(relative(wrong, thinned[name]))


def test_packed_files_keep_every_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 600, dtype=np.uint32)
    arrays = {
        "b": bits.view(np.float32).reshape(2, 3, 100),  # NaN, infinities and subnormal numbers among them
        "mask": np.array([[True, False]]),
        "json": np.array("{}"),
        "a": np.float32(-0.0).reshape(()),
        "seed": np.arange(3)[::-1],
        "none": np.zeros((0, 4), np.float32),
    }
    metadata = {"grad_norms": json.dumps({"b": 1.5})}
    packed.packed_path(tmp_path / "x.safetensors").write_bytes(packed.pack(arrays, metadata))
    again, about = packed.read(tmp_path / "x.safetensors")
    assert list(again) == list(arrays) and about == metadata
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype and again[name].shape == array.shape
        assert again[name].tobytes() == array.tobytes(), name
