"""Weights from the Hugging Face hub, simulated by a small local server: downloads, cache and errors."""

import hashlib
import http.server
import json
import sys
import threading
import urllib.parse

import numpy as np
import pytest
from safetensors.numpy import save

from sf_jax import config
from sf_jax.inference import load
from sf_jax.options import LoraConfig
from sf_jax.weights import adapters, export_folder, folders, hub
from sf_jax.weights.adapter_list import parse_loras
from sf_jax.weights.files import open_tensors
from sf_jax.weights.package import shipped_path
from tests.test_adapters import run_convert

constants = pytest.importorskip("huggingface_hub.constants", reason="needs the [download] extra")

MODEL, CHECKPOINTS = "Wan-AI/Wan2.1-T2V-1.3B", "gdhe17/Self-Forcing"
CONFIG = {"dim": 256, "ffn_dim": 8, "num_heads": 2, "num_layers": 1, "in_dim": 16, "freq_dim": 8}
NEEDED = ("Wan2.1_VAE.pth", "config.json", "google/umt5-xxl/tokenizer.json", "models_t5_umt5-xxl-enc-bf16.pth")
PARTS = ("vae", "text_encoder", "tokenizer")
COMMIT = {"main": "a" * 40, "v1": "b" * 40}
FAULTS = {"gated": (403, "GatedRepo"), "private": (404, "RepoNotFound"), "down": (503, "")}


class Hub(http.server.ThreadingHTTPServer):
    """Simulates the hub: a repository's description, its files, and errors.

    Attributes:
      repositories: name -> path of a file -> its bytes.
      fetched: the downloaded files, in order.
      is_down: whether to answer every request with 503.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        """Binds a free port."""
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories, self.fetched, self.is_down = repositories, [], False


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub

    def do_HEAD(self):
        """Like GET, without the content."""
        self.do_GET()

    def do_GET(self):
        """A description (`/api/models/...`) or a file (`/NAME/resolve/REVISION/PATH`)."""
        parts = [urllib.parse.unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        fault = FAULTS.get("down" if self.server.is_down else name.partition("/")[2])
        files = self.server.repositories.get(name)
        revision = rest[1] if len(rest) > 1 else "main"
        commit = COMMIT.get(revision, revision)
        if fault and not (fault[1] == "GatedRepo" and is_api):
            return self.answer(fault[0], error=fault[1])
        if files is None and not fault:
            return self.answer(404, error="RepoNotFound")
        if commit not in COMMIT.values():
            return self.answer(404, error="RevisionNotFound")
        files = files or dict.fromkeys(self.server.repositories[MODEL], b"")
        if is_api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": path, "size": len(x), "oid": digest(x)} for path, x in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        if is_api:
            siblings = [{"rfilename": path} for path in files]
            return self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        path = "/".join(rest[2:])
        if path not in files:
            return self.answer(404, error="EntryNotFound", commit=commit)
        if self.command == "GET":
            self.server.fetched.append(path)
        return self.answer(200, files[path], commit=commit)

    def answer(self, status: int, content: bytes = b"", error: str = "", commit: str = ""):
        """Sends headers and, except for HEAD, the content."""
        self.send_response(status)
        headers = {"Content-Length": len(content), "X-Error-Code": error, "X-Repo-Commit": commit}
        headers |= {"ETag": f'"{digest(content)}"' if content else "", "Content-Type": "application/json"}
        for name, value in headers.items():
            if value != "":
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Logs nothing."""


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The simulated hub, with a separate cache and no token."""
    student = save({"blocks.0.modulation": np.zeros(3, np.float32)})
    model = {path: path.encode() for path in (*NEEDED, "diffusion_pytorch_model.safetensors", "taew2_1.pth")}
    model["config.json"] = json.dumps(CONFIG).encode()
    decoys = ("assets/logo.png", "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin")
    layer, narrow = "base_model.model.blocks.0.self_attn.q.lora_{}.weight", np.ones((2, 32), np.float32)
    lora = save({layer.format("A"): narrow, layer.format("B"): np.ascontiguousarray(narrow.T)})
    server = Hub(
        {
            MODEL: model | {path: b"not needed" for path in (*decoys, "diffusion_pytorch_model.fp16.safetensors")},
            CHECKPOINTS: {"checkpoints/dmd.safetensors": student, "checkpoints/sid.safetensors": student},
            "org/single": {"student.safetensors": student, "README.md": b"-"},
            "org/multi": {
                "config.json": json.dumps(CONFIG).encode(),
                "diffusion_pytorch_model.safetensors": b"root",
                "Wan2.1_VAE.pth": b"root",
                **{f"sub/{path}": b"sub " + content for path, content in model.items()},
                "sub/config.json": json.dumps(CONFIG | {"dim": 512}).encode(),
            },
            "org/lora": {
                "README.md": b"-",
                "adapter_model.safetensors": lora,
                "adapter_config.json": b'{"lora_alpha": 1}',
            },
            "org/diffusers": {
                "vae/diffusion_pytorch_model.safetensors": b"vae",
                "transformer/diffusion_pytorch_model.safetensors": b"transformer",
            },
            "org/moe": {"high_noise_model/a.safetensors": b"", "config.json": b"{}"},
        }
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B", hub.Place(MODEL)),
        ("Wan-AI/Wan2.1-T2V-1.3B@v1", hub.Place(MODEL, "v1")),
        ("hf://Wan-AI/Wan2.1-T2V-1.3B@refs/pr/3/vae/a.bin", hub.Place(MODEL, "refs/pr/3", "vae/a.bin")),
        ("gdhe17/Self-Forcing/checkpoints/a.pt", hub.Place(CHECKPOINTS, None, "checkpoints/a.pt")),
        (
            "https://huggingface.co/gdhe17/Self-Forcing/resolve/main/a.pt?download=true",
            hub.Place(CHECKPOINTS, "main", "a.pt"),
        ),
        ("https://huggingface.co/gdhe17/Self-Forcing/blob/v1/b/a.pt", hub.Place(CHECKPOINTS, "v1", "b/a.pt")),
        ("https://huggingface.co/gdhe17/Self-Forcing/", hub.Place(CHECKPOINTS)),
        ("self_forcing_dmd.pt", None),
        ("./Wan-AI/Wan2.1", None),
        ("/data/Wan2.1", None),
        ("here/model", None),
    ],
)
def test_names_of_the_hub_are_told_from_paths(value, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub.parse(value) == place


def test_a_model_of_the_hub_is_fetched_once_and_only_what_is_needed(server, tmp_path, monkeypatch):
    checkpoint = f"{CHECKPOINTS}/checkpoints/dmd.safetensors"
    path, files = hub.local_file(checkpoint), folders.find_model(MODEL, PARTS)
    assert sorted(server.fetched) == sorted([*NEEDED, "checkpoints/dmd.safetensors"])
    assert files.vae.read_bytes() == b"Wan2.1_VAE.pth" and files.transformer is None and files.config.dim == 256
    assert (tmp_path / "cache") in files.folder.parents and files.folder.name == COMMIT["main"]
    assert folders.find_model(MODEL, PARTS) == files and len(server.fetched) == 5
    # Without the hub, the cache is used; missing files are reported.
    server.is_down = True
    assert folders.find_model(MODEL, PARTS) == files
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert folders.find_model(MODEL, PARTS) == files and hub.local_file(checkpoint) == path
    with pytest.raises(ValueError, match=f"model folder {MODEL} lacks: transformer .*only what was fetched is there"):
        folders.find_model(MODEL)
    with pytest.raises(ValueError, match="sid.safetensors is no file or folder here, nor in the .*cache, and"):
        hub.local_file(f"{CHECKPOINTS}/checkpoints/sid.safetensors")


def test_revisions_and_local_folders(server, tmp_path):
    assert folders.find_model(f"hf://{MODEL}@v1", ["vae"]).folder.name == COMMIT["v1"]
    with open_tensors("org/single") as stored:  # its only weight file
        assert list(stored) == ["blocks.0.modulation"]
    assert folders.find_tokenizer(MODEL).joinpath("google/umt5-xxl/tokenizer.json").is_file()
    fetched = len(server.fetched)
    (tmp_path / MODEL).mkdir(parents=True)
    (tmp_path / MODEL / "Wan2.1_VAE.pth").touch()
    assert folders.find_model(MODEL, ["vae"]).folder == folders.Path(MODEL) and len(server.fetched) == fetched


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nobody/nothing", "nobody/nothing is no file or folder here, and the hub has no repository nobody/nothing"),
        ("org/gated", "org/gated is gated: accept its terms at https://huggingface.co/org/gated, then log in"),
        ("org/private", "the hub has no repository org/private that you may read.*if it is private, log in"),
        (f"{MODEL}@v9", "Wan2.1-T2V-1.3B of the hub has no revision v9: see https://huggingface.co/Wan-AI"),
        ("org/down", "org/down is no file or folder here, nor in the hub's cache, and the hub cannot be reached"),
        ("org/moe", "model folder org/moe is Wan2.2-A14B, whose transformer is two experts"),
        (
            "org/single",
            "model folder org/single of the hub lacks: transformer .*its weight files are student.safetensors",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, value, message):
    with pytest.raises(ValueError, match=message) as refusal:
        folders.find_model(value)
    assert "\n" not in str(refusal.value) and not server.fetched


def test_files_that_the_hub_has_not(server, monkeypatch):
    with pytest.raises(ValueError, match="of the hub has no file checkpoints/x.pt: it has checkpoints/dmd"):
        open_tensors(f"{CHECKPOINTS}/checkpoints/x.pt")
    with pytest.raises(ValueError, match="Self-Forcing of the hub is no single file of weights: .*dmd.*sid"):
        open_tensors(CHECKPOINTS)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"Self-Forcing is no file .* pip install 'sf_jax\[download\]'"):
        open_tensors(CHECKPOINTS)


def test_a_folder_of_a_repository_is_a_model(server):
    for value in ("org/multi/sub", "hf://org/multi/sub", "https://huggingface.co/org/multi/tree/main/sub"):
        files = folders.find_model(value)
        assert files.folder.name == "sub" and files.config.dim == 512
        assert files.transformer.read_bytes() == b"sub diffusion_pytorch_model.safetensors"
    assert all(path.startswith("sub/") for path in server.fetched)
    with pytest.raises(ValueError, match="model folder org/multi/sub/config.json is a file of the hub: give a folder"):
        folders.find_model("org/multi/sub/config.json")
    with pytest.raises(ValueError, match="org/multi of the hub has no file other: it has"):
        folders.find_model("org/multi/other")
    assert load._is_wan("org/multi/sub", {}) and not load._is_wan("org/single/student.safetensors", {})


@pytest.mark.parametrize("value", ["org/lora", "hf://org/lora", "org/lora/adapter_model.safetensors"])
def test_an_adapter_comes_with_its_scale(server, value):
    (lora,) = parse_loras([f"{value}:0.5"])
    adapter = adapters.open_adapter(lora)
    with adapter.tensors:
        assert [change.scale for changes in adapter.changes.values() for change in changes] == [0.5]  # alpha / rank
    assert adapters.is_adapter(value) and not adapters.is_adapter("org/single")
    assert config.from_dict({"init": value}, LoraConfig, "lora.").init == value


def test_a_part_is_taken_from_a_model_of_the_hub(server, tmp_path):
    assert folders.find_weights("org/diffusers", "vae").read_bytes() == b"vae"
    assert folders.find_weights("org/diffusers/vae", "vae").is_dir()
    assert server.fetched == ["vae/diffusion_pytorch_model.safetensors"]
    assert load.WanOptions(vae="org/diffusers").vae == "org/diffusers"
    assert folders.find_weights(tmp_path, "vae") == tmp_path


def test_convert_takes_a_whole_model_of_the_hub(server):
    folder = export_folder.local_source(MODEL, transformer=True)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *NEEDED,
        "diffusion_pytorch_model.safetensors",
    }
    assert export_folder.Source(folder).files == folders.find_model(folder, PARTS)
    assert export_folder.local_source("org/multi/sub", transformer=False).name == "sub"
    assert "sub/diffusion_pytorch_model.safetensors" not in server.fetched
    assert (export_folder.local_source("org/single", transformer=True) / "student.safetensors").is_file()


def test_convert_takes_a_student_of_the_hub(server, tmp_path, capsys):
    server.repositories["org/ours"] = {"student.safetensors": shipped_path("student").read_bytes()}
    for number, value in enumerate(("org/ours/student.safetensors", "org/ours")):
        assert "-> official" in run_convert(capsys, input=value, output=tmp_path / f"{number}.safetensors")
