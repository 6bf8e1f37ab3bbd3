"""Model cards next to exported weights: their content, the hub's parser, and that existing files are kept."""

import dataclasses
import json
from pathlib import Path

import pytest

from sf_jax.config import to_dict
from sf_jax.weights import cards
from sf_jax.weights.package import read_header
from tests.test_export import ROLLOUT, student


def run_folder(folder: Path) -> Path:
    """The files of a run's folder that a card reads."""
    config = {"stage": "distill", "objective": "dmd", "steps": 40, "generator_every": 5, "batch_size": 4, "seed": 7}
    config |= {"student_input": "rollout", "data": {"name": "wan", "dir": str(folder / "data")}, "lora": {"rank": 8}}
    config |= {"optimizer": {"name": "adamw", "lr": 2e-6}, "ema": {"decay": 0.99}, "rollout": to_dict(ROLLOUT)}
    about = {"config": config, "code": "0.1.0+abc", "data": {"digests": {"data.dir": "d1gest", "teacher_weights": "t"}}}
    for step in (20, 40):
        (folder / "checkpoints" / str(step) / "about").mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "about" / "metadata").write_text(json.dumps(about))
    (folder / "checkpoints" / "²").mkdir()
    lines = [
        {"step": 20, "generator_loss": 0.5, "critic_loss": 0.25},
        {"step": 40, "critic_loss": 0.125, "seconds_per_step": 9},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    info = {"name": "wan_prompts", "splits": [{"name": "train", "shardLengths": ["64", "6"]}]}
    (folder / "data" / "prompts").mkdir(parents=True)
    (folder / "data" / "prompts" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "results.json").write_text(json.dumps({"figures": {"ours": {"joint": 0.9, "per_frame": [1]}}}))
    return folder


def test_a_card_says_recipe_data_figures_and_license(tmp_path):
    folder = run_folder(tmp_path)
    header = read_header(student(folder / "student_000040.safetensors"))
    run = cards.run_of(folder / "student_000040.safetensors", header)
    card = cards.Card("A | title", "official", ["a transformer"], header, run, "apache-2.0", "Wan-AI/Wan2.1-T2V-1.3B")
    lines = [line for line in card.text.splitlines() if line.startswith("| ") and line != "| | |"]
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines)
    expected = {
        "kind": "causal student of few steps",
        "steps": "1000, 500",
        "shift": "3",
        "chunk": "2",
        "window": "6",
        "sink": "2",
        "positions": "relative",
        "objective": "dmd",
        "iterations": "40 of 40",
        "critic updates": "40",
        "student updates": "8",
        "LoRA rank": "8",
        "EMA decay": "0.99",
        "code": "`0.1.0+abc`",
        "digest": "`d1gest`",
        "entries of `wan_prompts` when this was written": "70",
        "generator_loss": "0.5",
        "critic_loss": "0.125",
        "joint": "0.9",
    }
    assert {name: rows.get(name) for name in expected} == expected
    assert rows["config (SHA-256, 16 digits)"] == f"`{run.digest}`" and "seconds_per_step" not in rows
    assert str(tmp_path) not in card.text, "no paths of this machine"
    student(folder / "student_000020.safetensors")
    earlier = cards.run_of(folder / "student_000020.safetensors", header)
    assert (earlier.step, earlier.figures) == (20, {"generator_loss": 0.5, "critic_loss": 0.25})


def test_weights_of_another_origin_are_not_called_the_runs(tmp_path):
    folder = run_folder(tmp_path)
    header = read_header(student(folder / "student.safetensors"))
    assert cards.run_of(folder / "student.safetensors", header).step == 40
    other = dataclasses.replace(header, rollout=dataclasses.replace(ROLLOUT, chunk=1))
    assert cards.run_of(folder / "student.safetensors", other) is None
    assert cards.run_of(folder / "student.safetensors", None) is None
    assert cards.run_of(folder, header) is None


def test_no_license_is_invented():
    card = cards.Card("t", "diffusers", ["a VAE"])
    assert "license" not in card.text.split("---")[1] and "base_model" not in card.text
    assert "see the base model, if they derive from one; no license was given" in card.text


@pytest.mark.parametrize(
    "damage", ["", "[1]", '{"config": 3}', "[" * 100_000, '{"config": {}, "data": {"digests": 4}}']
)
def test_a_damaged_run_costs_its_part_of_the_card_alone(damage, tmp_path):
    folder = run_folder(tmp_path)
    for path in folder.glob("checkpoints/*/about/metadata"):
        path.write_text(damage)
    (folder / "log.jsonl").write_bytes(b"\xff\xfe" + damage.encode())
    run = cards.read_run(folder)
    assert run is None or cards.Card("t", "official", [], run=run).text


def test_a_card_is_the_hubs(tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="reading a card as the hub does needs huggingface_hub")
    card = cards.Card(
        'a "b": c', "diffusers", ["x"], read_header(student(tmp_path / "s.safetensors")), None, "mit", "a/b"
    )
    read = hub.ModelCard(card.text, ignore_metadata_errors=False)
    assert read.data.to_dict() == {
        "license": "mit",
        "base_model": "a/b",
        "pipeline_tag": "text-to-video",
        "library_name": "diffusers",
        "tags": ["arxiv:2506.08009", "self-forcing", "video-generation"],
    }
    assert isinstance(read.data, hub.ModelCardData) and read.text.lstrip().startswith('# a "b": c')


def test_a_readme_that_is_there_stays(tmp_path):
    card = cards.Card("t", "official", ["x"])
    assert cards.write_card(card, tmp_path, "student") == (tmp_path / "README.md", "")
    assert cards.write_card(card, tmp_path, "student") == (tmp_path / "README.md", ""), "the same again"
    (tmp_path / "README.md").write_bytes(b"mine \xff")
    path, note = cards.write_card(card, tmp_path, "student")
    assert path == tmp_path / "student.md" and "README.md is there already and stays" in note
    (tmp_path / "student.md").write_text("mine too")
    path, note = cards.write_card(card, tmp_path, "student")
    assert path is None and "no model card was written" in note
    assert (tmp_path / "README.md").read_bytes() == b"mine \xff" and (tmp_path / "student.md").read_text() == "mine too"
