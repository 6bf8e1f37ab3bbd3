"""Reading weights: the progress bar on a terminal, and weights that are not read."""

import io

import jax
import numpy as np
import pytest

from sf_jax.weights import reading, safetensors_io
from sf_jax.weights.networks import load_network
from tests.wan_folder import MODEL


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("network", ["transformer", "umt5"])
def test_a_bar_shows_how_much_has_been_read_on_a_terminal_alone(network, folder, monkeypatch, capsys):
    names = {"transformer": "diffusion_pytorch_model", "umt5": "models_t5_umt5-xxl-enc-bf16"}
    path = folder / f"{names[network]}.safetensors"
    config = MODEL if network == "transformer" else None
    load_network(path, network, config)
    assert not capsys.readouterr().err  # a small file
    monkeypatch.setattr(reading, "_LONG", 0)
    load_network(path, network, config)
    assert not capsys.readouterr().err  # no terminal
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    load_network(path, network, config)
    monkeypatch.undo()
    title, line = {"transformer": "transformer", "umt5": "text encoder"}[network], shown.getvalue().split("\r")[-1]
    assert line.startswith(f"{title}: 100%") and "B/s]" in line, line
    done, total = line.split("|")[-1].split("[")[0].split("/")  # bytes, such as 19.5k
    assert done.strip() == total.strip() and total.strip()[-1] in "kM"


def test_weights_that_are_not_read_are_zeros_of_the_same_kind(folder, monkeypatch):
    path = folder / "diffusion_pytorch_model.safetensors"
    _, params = load_network(path, "transformer", MODEL, "bfloat16")
    monkeypatch.setattr(safetensors_io, "_read_into", None)  # nothing is read
    _, zeros = load_network(path, "transformer", MODEL, "bfloat16", unread=True)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), zeros) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert not any(np.asarray(leaf, np.float32).any() for leaf in jax.tree.leaves(zeros))
