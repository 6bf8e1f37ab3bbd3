"""Speed of the official Self Forcing code on this machine's GPU: the rollout of a video, without decoding.

  python -m benchmarks.official_speed --official=official            # 1.3B, 480x832, 21 latent frames, bfloat16
  python -m benchmarks.official_speed --official=official --small    # a small network; without a GPU, on the CPU

`benchmarks/official.py` imports and adapts the code, with PyTorch's scaled_dot_product_attention in place of flash
attention; all tensors are created on the GPU. Random weights, one video, four denoising steps and the clean pass for
every chunk of 3, not compiled. The first run warms up; the result is the median of `--repeats` runs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.streaming import SMALL
from sf_jax.models.wan import WanConfig, wan_1_3b

try:
    import torch

    from benchmarks import official as theirs
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install 'sf_jax[parity]' einops") from error

PIXEL_FRAMES = 4  # per latent frame


def main() -> None:
    """Prints a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="folder of the official code")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jsonl", type=Path, default=Path("official_speed.jsonl"))
    args = parser.parse_args()
    config = WanConfig(channels=16, **SMALL | {"num_layers": 2}) if args.small else wan_1_3b()
    size, frames = ((8, 12), 9) if args.small else ((60, 104), 21)
    on_gpu = torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else "cpu")
    tokens = size[0] * size[1] // 4
    official = theirs.import_official(args.official)
    network = theirs.build_network(official, config, True, frames * tokens, 0)
    network = network.to(torch.bfloat16).requires_grad_(False)
    torch.set_default_dtype(torch.bfloat16)  # the caches use it
    pipe = theirs.build_pipeline(official, network, config, frames, tokens)
    noise = torch.randn(1, frames, config.channels, *size)
    text = torch.randn(1, config.text_len, config.text_dim)
    times = []
    with torch.no_grad():
        for _ in range(args.repeats + 1):
            began = time.perf_counter()
            pipe.inference_with_trajectory(noise=noise, prompt_embeds=text)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    seconds, pixels = statistics.median(times[1:]), PIXEL_FRAMES * (frames - 1) + 1
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    result = {"official_fps": pixels / seconds, "seconds": seconds, "frames": frames, "device": device}
    result["torch"] = torch.__version__
    print(json.dumps(result))
    with args.jsonl.open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
