"""sf_jax.convert's errors and notes: values that a type cannot represent, and settings that a format cannot store."""

import types

import ml_dtypes
import numpy as np
import pytest

from sf_jax.rollout import RolloutConfig
from sf_jax.weights import adapter_export, transformer
from sf_jax.weights.files import open_tensors
from sf_jax.weights.package import Package, read_header, save_package
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import TensorFile
from tests.helpers import SMALL, random_params
from tests.test_adapters import pair, run_convert, written
from tests.test_cards import run_folder
from tests.test_export import student

FLOAT8 = ml_dtypes.float8_e4m3fn


@pytest.fixture
def tensors():
    """A small transformer with official names."""
    return {name: np.array(value) for name, value in transformer.to_official(random_params(), SMALL).items()}


def saved(path, tensors):
    shapes, dtypes = ({name: getattr(value, field) for name, value in tensors.items()} for field in ("shape", "dtype"))
    write_safetensors(path, TensorFile(path, shapes, dtypes, tensors.__getitem__))
    return path


def loaded(path, name):
    with open_tensors(path) as stored:
        return np.array(stored[name])


def test_numbers_that_a_type_cannot_hold_are_refused_by_name(tensors, tmp_path, capsys):
    tensors["blocks.0.self_attn.q.weight"][1, 2] = -70_000
    base, output = saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q.weight holds 70000, float16 ends at 65504: give ano"):
        run_convert(capsys, input=base, output=output, dtype="float16")
    assert not output.exists()
    run_convert(capsys, input=base, output=output, dtype="bfloat16")
    assert loaded(output, "blocks.0.self_attn.q.weight")[1, 2] == ml_dtypes.bfloat16(-70_000)
    tensors["blocks.0.self_attn.q.weight"][1, 2] = np.inf  # non-finite inputs stay unchanged
    run_convert(capsys, input=saved(base, tensors), output=output, dtype="float16", overwrite=True)
    assert np.isinf(loaded(output, "blocks.0.self_attn.q.weight")[1, 2])


def test_sums_with_a_float8_base_are_told_of_and_rounded_once(tensors, tmp_path, capsys):
    name = "blocks.0.self_attn.q.weight"
    narrow = {key: value.astype(FLOAT8) if value.ndim == 2 else value for key, value in tensors.items()}
    base, lora, output = (
        saved(tmp_path / "a.safetensors", narrow),
        written(tmp_path, pair()),
        tmp_path / "b.safetensors",
    )
    assert "note: the base is float8" in run_convert(capsys, input=base, lora=lora.path, output=output)
    down, up = pair().values()
    expected = narrow[name].astype(np.float32) + up @ down
    np.testing.assert_array_equal(loaded(output, name), expected.astype(FLOAT8))
    values = {"input": base, "lora": lora.path, "output": output, "dtype": "bfloat16", "overwrite": True}
    assert "note:" not in run_convert(capsys, **values)
    np.testing.assert_array_equal(loaded(output, name), expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("scale", ["1e300", "-3e38"])
def test_a_scale_beyond_all_numbers_is_not_the_files_fault(scale, tensors, tmp_path, capsys):
    lora = written(tmp_path, {name: 100 * value for name, value in pair().items()})
    base = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match="has the scale .*give a scale near 1"):
        run_convert(capsys, input=base, lora=f"{lora.path}:{scale}", output=tmp_path / "b.safetensors")


def test_names_for_adapters_are_not_those_of_networks(tensors, tmp_path, capsys):
    base = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match="to is 'kohya': for a .* it must be one of official, diffusers, comfy$"):
        run_convert(capsys, input=base, to="kohya", output=tmp_path / "b.safetensors")


def test_a_pt_tells_what_it_has_no_place_for(tmp_path, capsys):
    pytest.importorskip("torch", reason="a .pt needs torch")
    base = student(tmp_path / "s.safetensors")
    printed = run_convert(capsys, input=base, output=tmp_path / "s.pt")
    expected = "(steps 1000,500, shift 3, chunk 2, window 6, sink 2, positions relative) is left out"
    assert f"note: a .pt has no header: how this student generates {expected}" in printed
    assert "no header" not in run_convert(capsys, input=base, to="diffusers", output=tmp_path / "d.safetensors")


def test_rcm_under_other_names_is_told_of(tensors, tmp_path, capsys):
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].reshape(32, -1)
    base, output = (
        saved(tmp_path / "a.safetensors", {f"net.{k}": v for k, v in tensors.items()}),
        tmp_path / "b.safetensors",
    )
    assert "rcm -> official" in (printed := run_convert(capsys, input=base, to="official", output=output))
    assert "note: under these names nothing says that the file is of NVlabs/rcm" in printed
    assert "note:" not in run_convert(capsys, input=base, output=tmp_path / "c.safetensors")
    run_convert(capsys, input=base, output=tmp_path / "d" / "d.safetensors", license="mit")
    assert "Weights with NVlabs/rcm's tensor names" in (tmp_path / "d" / "README.md").read_text()


def test_options_of_networks_are_no_options_of_adapters(tmp_path, capsys):
    lora, output = written(tmp_path, pair()).path, tmp_path / "out" / "b.safetensors"
    with pytest.raises(ValueError, match="part is 'generator': .* is an adapter, leave part out"):
        run_convert(capsys, input=lora, output=output, part="generator")
    run_convert(capsys, input=lora, output=output)
    assert not (tmp_path / "out" / "README.md").exists()
    values = {"to": "kohya", "license": "mit", "base_model": "Wan-AI/Wan2.1-T2V-1.3B", "overwrite": True}
    run_convert(capsys, input=lora, output=output, **values)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(part in card for part in ('license: "mit"', 'base_model: "Wan-AI/', '- "lora"', "kohya's tensor names"))
    assert "LoRA adapter adapter.safetensors (scale 1, rank 2" in card


def test_a_file_that_is_there_is_only_replaced_on_demand(tensors, tmp_path, capsys):
    base, output = saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    output.write_bytes(b"mine")
    adapter = written(tmp_path, pair()).path
    for values in ({"input": base}, {"input": adapter}, {"from": tmp_path / "run"}):
        with pytest.raises(ValueError, match="output is .*: the file exists; .* --overwrite to replace it"):
            run_convert(capsys, output=output, **values)
        assert output.read_bytes() == b"mine"
    with pytest.raises(ValueError, match="it is a file of the input"):
        run_convert(capsys, input=base, output=base, overwrite=True)
    with pytest.raises(ValueError, match="it is a file of --lora"):
        run_convert(capsys, input=base, lora=adapter, output=adapter, overwrite=True)
    with pytest.raises(ValueError, match="overwrite: it is for a file as --output"):
        run_convert(capsys, input=base, output=f"{tmp_path}/new/", to="official", overwrite=True)
    run_convert(capsys, input=base, output=output, overwrite=True)
    assert output.stat().st_size > 1000


def test_the_export_of_a_run_replaces_nothing_either(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sf_jax.training.export.load_run", lambda folder: (7, types.SimpleNamespace(kind="student")))
    (tmp_path / "student_000007.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="student_000007.safetensors: the file exists"):
        run_convert(capsys, **{"from": tmp_path})


def test_adapters_of_a_run_have_its_card(tmp_path, capsys, monkeypatch):
    pairs = {"blocks": {"attn": {"q": {part: np.zeros((2, 2, 32), np.float32) for part in ("down", "up")}}}}
    made = adapter_export.TrainedAdapters(SMALL, 2, 4.0, adapter_export.Base("wan.safetensors", "d1"), 20, pairs)
    monkeypatch.setattr("sf_jax.training.export.load_adapters", lambda folder: made)
    monkeypatch.setattr(adapter_export, "write_trained", lambda path, *_: path.write_bytes(b""))
    run_convert(capsys, **{"from": run_folder(tmp_path / "run")}, part="lora", output=tmp_path / "a.safetensors")
    card = (tmp_path / "README.md").read_text()
    assert "LoRA adapters, rank 2, alpha 4, of" in card and "| iterations | 20 of 40 |" in card


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_of_sf_jax_keep_their_numbers_and_header(dtype, tmp_path, capsys):
    base, output = tmp_path / "student.safetensors", tmp_path / "b.safetensors"
    save_package(base, Package("student", SMALL, RolloutConfig(), 6, (4, 4), 3.0, 1.0, random_params(SMALL)), dtype)
    run_convert(capsys, input=base, output=output)
    assert read_header(output) == read_header(base)
    with open_tensors(base) as old, open_tensors(output) as new:
        assert old.dtypes == new.dtypes and all(np.array_equal(old[name], new[name]) for name in old)
    run_convert(capsys, input=base, output=tmp_path / "c.safetensors", to="diffusers")
    again = tmp_path / "d.safetensors"
    run_convert(capsys, input=tmp_path / "c.safetensors", output=again, dtype="float32")  # keeps diffusers' names
    with open_tensors(again) as tensors:
        assert set(tensors.dtypes.values()) == {np.dtype("float32")} and "patch_embedding.weight" in tensors.shapes
