"""Runs the official code on a CPU: imports it from a given folder and adapts it in memory.

Nothing is copied or changed on disk. The adaptations: packages are imported without their front ends (video, text
encoder and tokenizer are not needed). PyTorch's scaled_dot_product_attention, in the dtype of its input, replaces flash
attention. Moving tensors to a GPU does nothing. With a single process, nothing is broadcast. Sizes that are constants
there (layers, heads, tokens per frame, frames per video) are set to those of the model.
"""

import dataclasses
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

from sf_jax.models.wan import WanConfig

STEPS, SHIFT = (1000, 750, 500, 250), 5.0
_PACKAGES = {"wan": "wan", "wan.modules": "wan/modules", "pipeline": "pipeline", "model": "model", "utils": "utils"}
_UNUSED = {
    "wan.modules.tokenizers": ("HuggingfaceTokenizer",),
    "wan.modules.vae": ("_video_vae",),
    "wan.modules.t5": ("umt5_xxl",),
}


@dataclasses.dataclass(frozen=True)
class Official:
    """Modules of the official code."""

    model: types.ModuleType
    causal: types.ModuleType
    wrapper: types.ModuleType
    pipeline: types.ModuleType
    dmd: types.ModuleType


def import_official(folder: Path) -> Official:
    """Imports the official code.

    Raises:
      SystemExit: if the folder does not contain it.
    """
    if not (folder / "pipeline" / "self_forcing_training.py").is_file():
        raise SystemExit(f"error: --official={folder}: no pipeline/self_forcing_training.py there; give the folder of "
                         "a clone of https://github.com/guandeh17/Self-Forcing")  # fmt: skip
    for name, place in _PACKAGES.items():
        package = types.ModuleType(name)
        package.__path__ = [str(folder / place)]
        sys.modules[name] = package
    for name, attributes in _UNUSED.items():
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[name] = module
    attention = importlib.import_module("wan.modules.attention")
    attention.flash_attention = attention.attention = _attention
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.distributed.broadcast = lambda *_, **__: None
    pipeline = importlib.import_module("pipeline.self_forcing_training")
    sys.modules["pipeline"].SelfForcingTrainingPipeline = pipeline.SelfForcingTrainingPipeline
    names = ("wan.modules.model", "wan.modules.causal_model", "utils.wan_wrapper")
    return Official(*map(importlib.import_module, names), pipeline, importlib.import_module("model.dmd"))


def _attention(q, k, v, k_lens=None, **_):
    """Attention; q, k and v are [B, L, N, D]."""
    mask = None if k_lens is None else (torch.arange(k.shape[1]) < k_lens[:, None])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).contiguous()


def build_network(official: Official, config: WanConfig, causal: bool, tokens: int, seed: int) -> torch.nn.Module:
    """A wrapped network with random weights; `tokens` is the length of a whole video."""
    sizes = {
        "text_len": config.text_len,
        "in_dim": config.channels,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "out_dim": config.channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "qk_norm": True,
        "cross_attn_norm": True,
    }
    torch.manual_seed(seed)
    model = (official.causal.CausalWanModel if causal else official.model.WanModel)(**sizes)
    for value in model.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, 0, value[0].numel() ** -0.5)
    wrapper = official.wrapper.WanDiffusionWrapper.__new__(official.wrapper.WanDiffusionWrapper)
    torch.nn.Module.__init__(wrapper)
    scheduler = official.wrapper.FlowMatchScheduler(shift=SHIFT if causal else 8.0, sigma_min=0.0, extra_one_step=True)
    scheduler.set_timesteps(1000, training=True)
    wrapper.model, wrapper.scheduler, wrapper.uniform_timestep = model.eval(), scheduler, not causal
    wrapper.seq_len = tokens
    wrapper.post_init()
    return wrapper


def build_pipeline(official: Official, generator, config: WanConfig, frames: int, tokens: int):
    """The training rollout of `frames` frames with `tokens` tokens each; `exit_step` is where every chunk exits."""
    timesteps = torch.cat([generator.scheduler.timesteps, torch.zeros(1)])
    pipe = official.pipeline.SelfForcingTrainingPipeline(
        denoising_step_list=timesteps[1000 - torch.tensor(STEPS)],
        scheduler=generator.get_scheduler(),
        generator=generator,
        num_frame_per_block=3,
        same_step_across_blocks=True,
        num_max_frames=frames,
    )
    pipe.num_transformer_blocks, pipe.frame_seq_length = config.num_layers, tokens
    pipe.kv_cache_size, pipe.exit_step = frames * tokens, len(STEPS) - 1
    pipe.generate_and_sync_list = lambda count, *_, **__: [pipe.exit_step] * count
    heads = (config.num_heads, config.head_dim)

    def caches(length, **fields):
        def one():
            shape = (1, length, *heads)
            return {"k": torch.zeros(shape), "v": torch.zeros(shape)} | {name: make() for name, make in fields.items()}

        return [one() for _ in range(config.num_layers)]

    def zero():
        return torch.zeros(1, dtype=torch.long)

    def fill_caches(**_):
        pipe.kv_cache1 = caches(pipe.kv_cache_size, global_end_index=zero, local_end_index=zero)

    def fill_text_caches(**_):
        pipe.crossattn_cache = caches(config.text_len, is_init=lambda: False)

    pipe._initialize_kv_cache, pipe._initialize_crossattn_cache = fill_caches, fill_text_caches
    return pipe


def build_dmd(official: Official, pipe, networks: dict, guidance: float):
    """The official DMD object; `networks` has generator, real_score and fake_score."""
    dmd = official.dmd.DMD.__new__(official.dmd.DMD)
    torch.nn.Module.__init__(dmd)
    for name, network in networks.items():
        setattr(dmd, name, network)
    fields = {
        "scheduler": networks["generator"].get_scheduler(),
        "device": "cpu",
        "dtype": torch.float32,
        "args": types.SimpleNamespace(denoising_loss_type="flow"),
        "num_frame_per_block": 3,
        "num_train_timestep": 1000,
        "min_step": 20,
        "max_step": 980,
        "real_guidance_scale": guidance,
        "fake_guidance_scale": 0.0,
        "timestep_shift": SHIFT,
        "ts_schedule": False,
        "ts_schedule_max": False,
        "min_score_timestep": 0,
        "independent_first_frame": False,
        "denoising_loss_func": importlib.import_module("utils.loss").get_denoising_loss("flow")(),
    }
    for name, value in fields.items():
        setattr(dmd, name, value)
    dmd.scheduler.alphas_cumprod = None

    def run_generator(image_or_video_shape, conditional_dict, initial_latent=None):
        noise = torch.randn(image_or_video_shape)
        video, start, stop = pipe.inference_with_trajectory(noise=noise, **conditional_dict)
        return video, None, start, stop

    dmd._run_generator = run_generator
    return dmd


def weights_of(wrapper) -> dict[str, np.ndarray]:
    """Official names and arrays of a network."""
    return {name: value.detach().numpy() for name, value in wrapper.model.state_dict().items()}
