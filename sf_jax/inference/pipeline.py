"""The text-to-video pipeline for every model; with a causal network it streams a video chunk by chunk.

Source: official `CausalInferencePipeline`, `CausalDiffusionInferencePipeline` and `wan/text2video.py`. `load_pipeline`
(in `inference/load.py`) builds one from weight files.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sf_jax import rollout as ro
from sf_jax.diffusion import solvers
from sf_jax.inference import layers, lengths, programs
from sf_jax.inference.decoders import Decoder, Encoder
from sf_jax.inference.executables import Executables
from sf_jax.inference.sampling import Chunk, Sampling, example_numbers, plain_number
from sf_jax.inference.text_encoder import TextEncoder
from sf_jax.models import attention
from sf_jax.models.rope import MAX_FRAMES
from sf_jax.models.wan import WanTransformer
from sf_jax.parallel import mesh as meshes
from sf_jax.weights import eight_bit
from sf_jax.weights.eight_bit import Quantization

if TYPE_CHECKING:
    from sf_jax.inference.stream_memory import StreamBytes

OUTPUTS = ("pixels", "latent")


@dataclasses.dataclass(frozen=True, eq=False)
class VideoPipeline:
    """A text encoder, a transformer and a decoder, on the devices of a mesh.

    Attributes:
      text_encoder: embeds prompts; None if calls pass embeddings instead.
      transformer: the network.
      params: the network's parameters.
      rollout: chunks, window and denoising steps of a causal network; None for a bidirectional one.
      decoder: decodes latents to pixels; None to stop at the latents.
      mesh: devices over which the videos of a batch are split (axis `data`), and the tokens (`context`), heads
        and features (`tensor`) of each; None for the default device only. See `with_mesh`.
      encoder: encodes pixels to latents, to continue given frames.
      sampling: defaults of `stream` and of calls.
      only_frames: the only length that a bidirectional network was trained for; None for any.
      many_steps: whether the network was trained for many steps; None if unknown.
      noise_number: the number folded into the key of the chunks' noise (see `programs.next_chunk`); a seed's videos
        depend on it.
      progress: whether to show a progress bar on a terminal when a whole video is generated in many steps.
      adapters: short descriptions of the adapters merged into the parameters.
      executables: cache of compiled programs, as used by the commands.
      quantization: how the parameters were quantized to 8 bits; None if they were not.
      cache_dtype: type of cached keys and values, one of `kv_cache.DTYPES`; None is the network's type.
      captions: of the digit clips that the network was trained on, one of `options.CAPTIONS`; None for Wan2.1.
    """

    text_encoder: TextEncoder | None
    transformer: WanTransformer
    params: dict
    rollout: ro.RolloutConfig | None
    decoder: Decoder | None = None
    mesh: Mesh | None = None
    encoder: Encoder | None = None
    sampling: Sampling = Sampling()
    only_frames: int | None = None
    many_steps: bool | None = None
    noise_number: int | None = MAX_FRAMES
    progress: bool = True
    adapters: tuple[str, ...] = ()
    executables: Executables | None = None
    quantization: Quantization | None = None
    cache_dtype: str | None = None
    captions: str | None = None

    def __post_init__(self):
        """Checks that the network can be split over the mesh."""
        if self.mesh is not None:
            meshes.check_mesh(self.mesh, self.transformer.config)

    @property
    def kind(self) -> str:
        """A few-step "student", a many-step "causal" network, or a "bidirectional" one, which makes whole videos."""
        if self.rollout is None:
            return "bidirectional"
        return "student" if self.sampling.solver is None else "causal"

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, except for a video's first."""
        return 1 if self.decoder is None else self.decoder.temporal_factor

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along each side."""
        return 1 if self.decoder is None else self.decoder.spatial_factor

    def describe(self) -> str:
        """A one-line description: network, sizes, adapters, devices, attention, window and decoder."""
        config = self.transformer.config
        devices = jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)
        count = eight_bit.count(self.params)
        parts = [f"{self.kind} network, {count / 1e6:.4g} M parameters", *self.adapters, f"{config.dtype}"]
        parts += [] if self.quantization is None else [self.quantization.describe()]
        parts += [] if self.cache_dtype is None else [f"cache {self.cache_dtype}"]
        layers = "" if config.scan_layers else ", layers apart"
        parts += [f"attention {self._attention()}{layers}", f"{len(devices)} x {devices[0].device_kind}"]
        if self.mesh is not None and len(devices) > 1:
            parts += [f"mesh {meshes.describe(self.mesh)}"]
        if self.rollout is not None:
            rollout = self.rollout
            window = f"window {rollout.window}, sink {rollout.sink}" if rollout.window else "no window"
            alone = " behind a lone first frame" if rollout.first_frame_alone else ""
            parts += [f"chunks of {rollout.chunk}{alone}", window, f"positions {rollout.positions}"]
        if self.kind == "student":
            first = f" (first chunk {', '.join(map(str, rollout.first_steps))})" if rollout.first_steps else ""
            parts += [f"steps {', '.join(map(str, rollout.steps))}{first}, shift {rollout.shift:g}"]
            noise = f" at timestep {rollout.context_timestep:g}, noise {rollout.context_noise}"
            parts += [f"context {rollout.context}{noise * (rollout.context_timestep > 0)}"]
        if self.sampling.solver is not None:
            solver = self.sampling.solver
            parts += [f"{solver.name} in {solver.steps} steps, shift {solver.shift:g}"]
            parts += [f"guidance {self.sampling.guidance:g}"]
        name = getattr(self.decoder, "module", self.decoder)
        return "; ".join([*parts, f"decoder {'none' if name is None else type(name).__name__}"])

    def _attention(self) -> str:
        """The attention implementation of self-attention in the steady state."""
        config, rollout = self.transformer.config, self.rollout
        factor = self.spatial_factor
        grid = config.grid(self.sampling.height // factor, self.sampling.width // factor)
        frames = self.latent_frames(self.sampling.frames) if rollout is None else rollout.chunk

        def tokens(count):
            shape = (1, count * grid[0] * grid[1], config.num_heads, config.head_dim)
            return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))

        segments = [(tokens(frames), tokens(frames), None)]
        if rollout is not None:
            # A ring needs only a key count; a full cache with a window needs a mask.
            segments.append((tokens(frames), tokens(frames), jax.ShapeDtypeStruct((), jnp.int32)))
        return attention.choose(config.attention, tokens(frames), segments)

    def latent_frames(self, frames: int) -> int:
        """Number of latent frames of a video of `frames` pixel frames.

        Raises:
          ValueError: unless `frames` is 1 + a multiple of `temporal_factor`.
        """
        return lengths.latent_frames(frames, self.temporal_factor)

    def chunk_starts(self, frames: int) -> tuple[int, ...]:
        """First latent frame of each chunk of a video of `frames` pixel frames."""
        self.check_frames(frames)
        if self.rollout is None:
            return (0,)
        _, chunks = self.rollout.chunks(self.latent_frames(frames))
        return tuple(start for start, _ in attention.chunk_bounds(chunks))

    def check_frames(self, frames: int, initial: int = 0) -> None:
        """Checks that the network can generate a length.

        Args:
          frames: number of pixel frames.
          initial: number of given latent frames to continue from.

        Raises:
          ValueError: if it cannot; names valid lengths.
        """
        latent = self.latent_frames(frames)
        if self.rollout is not None:
            lengths.check_frames(self.rollout, latent, initial, self.temporal_factor)
        elif self.only_frames not in (None, frames):
            raise ValueError(f"frames is {frames}: this bidirectional network generates {self.only_frames}")

    def bytes_per_stream(self, slots: int = 1) -> "StreamBytes":
        """Memory that each of `slots` endless streams (`stream.Stream`) would need, without allocating it.

        Raises:
          ValueError: if this is not a few-step student with a window.
        """
        from sf_jax.inference import stream, stream_memory  # here, as they import this module

        return stream_memory.bytes_per_stream(stream.stream_spec(self), self, slots)

    def with_mesh(self, mesh: Mesh | str) -> "VideoPipeline":
        """The same pipeline on other devices; moves network and decoder there.

        Args:
          mesh: a mesh with axes `data`, `context` and `tensor`, or a string such as "tensor:2,context:2" for this
            process's devices.

        Raises:
          ValueError: if there are too few devices, or the network cannot be split that way.
        """
        if isinstance(mesh, str):
            mesh = meshes.make_mesh(meshes.mesh_sizes(mesh))
        pipe = dataclasses.replace(self, mesh=mesh)
        decoder = jax.device_put(self.decoder, NamedSharding(mesh, PartitionSpec()))
        return dataclasses.replace(pipe, params=layers.on_mesh(self.params, mesh), decoder=decoder)

    def place(self, batch: jax.Array | np.ndarray) -> jax.Array:
        """Splits an array over the devices along its first axis, the videos."""
        if self.mesh is None:
            return jax.device_put(batch)
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec("data")))

    def run(self, program: Callable, *arguments):
        """Calls a program under the pipeline's mesh, which the attention kernels look up."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            if self.executables is not None and program in programs.STATIC:
                return self.executables.call(program, programs.STATIC[program], *arguments, mesh=self.mesh)
            return program(*arguments)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Latents float32 [B, F, H, W, C] of uint8 images or videos [B, f, h, w, c], for `initial`.

        Raises:
          ValueError: if the pipeline was loaded without an encoder.
        """
        if self.encoder is None:
            raise ValueError("the pipeline has no encoder: load it with encoder=True")
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 5:
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}: they must be uint8 [B, f, h, w, c]")
        return np.asarray(programs.encode_pixels(self.encoder, pixels))

    def __call__(
        self,
        prompts: str | Sequence[str] | np.ndarray,
        *,
        output: str = "pixels",
        callback: Callable[[Chunk], None] | None = None,
        **options,
    ) -> np.ndarray:
        """Generates whole videos.

        Args:
          prompts: see `stream`.
          output: "pixels" or "latent".
          callback: called with each `Chunk` as soon as it has been generated.
          **options: see `stream`.

        Returns:
          uint8 [B, F, h, w, c], or latents float32 [B, F, H, W, C].

        Raises:
          ValueError: see `stream`.
        """
        parts = []
        decoded = output == "pixels" or callback is not None
        for chunk in self.chunks(prompts, **self._options(output, options), decoded=decoded):
            if callback is not None:
                callback(chunk)
            parts.append(chunk.on_host(output))
        return np.concatenate(parts, axis=1)

    def stream(
        self, prompts: str | Sequence[str] | np.ndarray, *, output: str = "pixels", **options
    ) -> Iterator[np.ndarray]:
        """Generates videos chunk by chunk.

        A video depends only on its prompt, the seed and its number, not on the rest of the batch.

        Args:
          prompts: B prompts, one prompt, or embeddings [B, S, D].
          output: "pixels" or "latent".
          **options: fields of `Sampling` that differ from `self.sampling`, such as `frames` or `seed`; `first_index`,
            the number of the first video (the others follow); `initial`, latents float32 [B, I, H, W, C] to continue
            from.

        Yields:
          uint8 [B, m, h, w, c], or latents float32 [B, n, H, W, C], of each chunk, including initial ones. A
          bidirectional network yields the whole video at once.

        Raises:
          ValueError: if the network cannot generate such a video, or a prompt has a word it does not know.
        """
        chunks = self.chunks(prompts, **self._options(output, options), decoded=output == "pixels")
        return (chunk.on_host(output) for chunk in chunks)

    def with_sampling(self, **changes) -> "VideoPipeline":
        """The same pipeline with other defaults for fields of `Sampling`.

        Raises:
          ValueError: if a field is unknown or does not apply to this network.
        """
        for name in {"first_index", "initial"} & set(changes):
            raise ValueError(f"{name} is no field of Sampling: give it to the call")
        return dataclasses.replace(self, sampling=self._options("latent", changes)["sampling"])

    def with_rollout(self, **changes) -> "VideoPipeline":
        """The same pipeline with other fields of `RolloutConfig`, such as `window`, `sink` or `steps`.

        Raises:
          ValueError: if a field is unknown, has an invalid value or does not apply, or the network is bidirectional.
        """
        if self.rollout is None:
            names = ", ".join(changes) or "rollout"
            raise ValueError(f"{names}: a bidirectional network has no chunks; give a causal checkpoint")
        fields = sorted(field.name for field in dataclasses.fields(ro.RolloutConfig))
        for name, value in changes.items():
            if name not in fields:
                raise ValueError(f"{name} is no field of RolloutConfig: fields are {', '.join(fields)}")
            if name in ("steps", "first_steps") and isinstance(value, Iterable):
                changes[name] = tuple(map(plain_number, value))
            elif name in ("chunk", "window", "sink") and not isinstance(value, (int, np.integer, type(None))):
                raise ValueError(f"{name} is {value!r}: it must be a whole number")
            few = name in ("steps", "first_steps", "shift") or (name == "context" and value == "noisy")
            few |= name in ("warp", "context_timestep", "context_noise") and value != getattr(self.rollout, name)
            if few and self.kind != "student":
                raise ValueError(f"{name} is {value!r}: it has no effect on a network that takes many steps")
        changes = {name: plain_number(value) for name, value in changes.items()}
        return dataclasses.replace(self, rollout=dataclasses.replace(self.rollout, **changes))

    def _options(self, output: str, options: dict) -> dict:
        """Converts the arguments of `stream` to those of `chunks`."""
        fields = {field.name for field in dataclasses.fields(Sampling)}
        unknown = set(options) - fields - {"first_index", "initial"}
        if unknown:
            known = ", ".join([*sorted(fields), "first_index", "initial", "output"])
            raise ValueError(f"{sorted(unknown)[0]} is no option of a pipeline: options are {known}")
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}: it must be one of {', '.join(OUTPUTS)}")
        if output == "pixels" and self.decoder is None:
            raise ValueError("output is 'pixels': a pipeline without decoder has 'latent' alone")
        changes = {name: plain_number(value) for name, value in options.items() if name in fields}
        sampling = dataclasses.replace(self.sampling, **changes)
        if sampling.solver is None and (self.many_steps or self.rollout is None):
            raise ValueError("solver is None: this network needs many steps, such as Solver('unipc')")
        if sampling.solver is not None and self.many_steps is False:
            raise ValueError(f"solver is {sampling.solver}: this student takes few steps")
        for name in ("guidance", "negative_prompt"):
            if name in changes and sampling.solver is None:
                value = changes[name]
                raise ValueError(f"{name} is {value!r}: a student has none (it was distilled from a guided teacher)")
        return {name: value for name, value in options.items() if name not in fields} | {"sampling": sampling}

    def chunks(
        self,
        prompts: str | Sequence[str] | np.ndarray,
        sampling: Sampling | None = None,
        first_index: int | Sequence[int] = 0,
        initial: np.ndarray | None = None,
        decoded: bool = True,
    ) -> Iterator[Chunk]:
        """`stream`, but with latents and pixels of each chunk on the devices, possibly still being computed.

        Args:
          prompts: see `stream`.
          sampling: the sampling settings; None is `self.sampling`.
          first_index: see `stream`; or the numbers of all videos.
          initial: see `stream`.
          decoded: whether to decode the latents, if there is a decoder.

        Raises:
          ValueError: see `stream`.
        """
        sampling = sampling or self.sampling
        size = self.latent_size(sampling)
        if initial is not None:
            initial = self.checked_initial(initial, size)
        self.check_frames(sampling.frames, 0 if initial is None else initial.shape[1])
        text = self.embed([prompts] if isinstance(prompts, str) else prompts)
        if initial is not None and len(initial) != len(text):
            raise ValueError(f"initial has {len(initial)} videos: there are {len(text)} prompts")
        apart = meshes.videos_apart(self.mesh)
        if len(text) % apart:
            raise ValueError(f"there are {len(text)} prompts: it must be a multiple of mesh.data, {apart}")
        examples = example_numbers(first_index, len(text))
        latents = self._latents(text, examples, sampling, size, initial)
        return self._ahead(self._decoded(latents, len(text), size) if decoded and self.decoder else latents)

    def checked_initial(self, initial: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """Checks that a video with latents of `size` (H, W, C) can continue initial latents [B, I, H, W, C]."""
        if self.rollout is None:
            raise ValueError("a bidirectional network cannot go on from given frames: give a causal checkpoint")
        initial = np.asarray(initial)
        if initial.ndim != 5 or initial.shape[2:] != size or not initial.shape[1]:
            raise ValueError(f"initial has the shape {initial.shape}: it must be [B, I, {', '.join(map(str, size))}]")
        if initial.dtype.kind not in "fV" or not np.isfinite(initial.astype(np.float32)).all():
            raise ValueError(
                f"initial is {initial.dtype}, with values that are no finite floats: give latents, such as those of "
                "`pipe.encode(pixels)`"
            )
        return initial

    def latent_size(self, sampling: Sampling) -> tuple[int, int, int]:
        """(H, W, C) of a latent frame."""
        height, width = (self._latent_side(sampling, name) for name in ("height", "width"))
        meshes.check_tokens(self.mesh, *self.transformer.config.grid(height, width))
        return height, width, self.transformer.config.channels

    def _latent_side(self, sampling: Sampling, name: str) -> int:
        pixels, factor = getattr(sampling, name), self.spatial_factor
        side = self.transformer.config.patch[1 if name == "height" else 2] * factor
        if pixels < side or pixels % side:
            near = max(side, round(pixels / side) * side)
            raise ValueError(f"{name} is {pixels}: it must be a multiple of {side}, such as {near}")
        return pixels // factor

    def embed(self, prompts: Sequence[str] | np.ndarray) -> np.ndarray:
        """Embeddings [B, S, D] of prompts; embeddings are checked and returned."""
        if not isinstance(prompts, (np.ndarray, jax.Array)):
            if self.text_encoder is None:
                raise ValueError("the pipeline has no text encoder: give embeddings [B, S, D] in place of prompts")
            prompts = list(prompts) if isinstance(prompts, Sequence) else prompts
            if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
                raise ValueError(f"prompts is {prompts!r}: give a text, or a list of at least one")
            prompts = self.text_encoder.encode(prompts)
        config = self.transformer.config
        if prompts.ndim != 3 or prompts.shape[1:] != (config.text_len, config.text_dim) or not len(prompts):
            wanted = f"[B, {config.text_len}, {config.text_dim}]"
            raise ValueError(f"embeddings have the shape {prompts.shape}: it must be {wanted} with B >= 1")
        if prompts.dtype.kind not in "fViu" or not np.isfinite(np.asarray(prompts).astype(np.float32)).all():
            raise ValueError(f"embeddings are {prompts.dtype} with values that are no finite numbers: give finite ones")
        return prompts

    def _ahead(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """On a GPU or TPU, starts the next chunk before yielding the current one."""
        ready = collections.deque()
        for chunk in chunks:
            ready.append(chunk)
            # A CPU would run both at once, each at half the speed.
            if jax.default_backend() == "cpu" or len(ready) > 1:
                yield ready.popleft()
        yield from ready

    def _decoded(self, chunks: Iterator[Chunk], batch: int, size: tuple[int, ...]) -> Iterator[Chunk]:
        """Adds pixels to the chunks."""
        cache = self.run(programs.empty_decoder_cache, self.decoder, batch, *size[:2])
        for chunk in chunks:
            # Frame by frame, so that chunks of all sizes share two programs: a large decoder takes minutes to compile.
            pixels = []
            for i in range(chunk.latents.shape[1]):
                frame = self.run(programs.latent_frame, chunk.latents, np.int32(i))
                cache, new = self.run(programs.decode, self.decoder, cache, frame)
                pixels.append(new)
            yield dataclasses.replace(chunk, pixels=self.run(programs.join_frames, pixels))

    def _latents(self, text, examples, sampling, size, initial) -> Iterator[Chunk]:
        """Generates chunks of latents; `size` is (H, W, C)."""
        key = self.run(programs.sample_key, np.uint32(sampling.seed))
        source = (key, self.place(examples), self.noise_number)
        frames = self.latent_frames(sampling.frames)
        if sampling.solver is not None:
            negative = np.broadcast_to(self._negative(sampling, text), text.shape)
            text = np.stack([text, negative], axis=1).reshape(-1, *text.shape[1:])
        text = self.run(programs.encode_text, self.transformer, self.params, self.place(text))
        if self.rollout is None:
            yield Chunk(self._whole(text, source, sampling, (frames, *size)), None, 0)
            return
        many = None if sampling.solver is None else (sampling.solver, sampling.guidance)
        kept = (self.transformer, self.rollout, text.k.shape[1], frames, size, self.cache_dtype, many is not None)
        cache = self.run(programs.empty_cache, *kept)
        given = 0 if initial is None else initial.shape[1]
        first, chunks = self.rollout.chunks(frames - given, given)
        start = 0
        for count in first:
            clean = self.place(np.asarray(initial[:, start : start + count], np.float32))
            cache = self.run(
                programs.write_initial, self.transformer, self.rollout, self.params, text, cache, clean, start
            )
            yield Chunk(clean, None, start, initial=True)
            start += count
        for index, count in enumerate(chunks):
            static = (self.transformer, self.rollout, many, (count, *size))
            place = (start, index, index == len(chunks) - 1)
            cache, clean = self.run(programs.next_chunk, *static, self.params, text, cache, source, place)
            yield Chunk(clean, None, start)
            start += count

    def _negative(self, sampling: Sampling, text: np.ndarray) -> np.ndarray:
        """Embedding [1, S, D] of the negative prompt; zeros if the pipeline has no text encoder."""
        if self.text_encoder is None:
            if sampling.negative_prompt:
                raise ValueError("negative_prompt is given: a pipeline without text encoder cannot embed it")
            return np.zeros_like(text[:1])
        return self.text_encoder.encode([sampling.negative_prompt])

    def _whole(self, text, source, sampling: Sampling, size: tuple[int, ...]) -> jax.Array:
        """Generates whole videos with a bidirectional network; `size` is (F, H, W, C)."""
        key, examples, _ = source
        state = self.run(programs.bidirectional_start, key, examples, (examples.shape[0], *size))
        table = solvers.rows(sampling.solver)
        steps = range(sampling.solver.steps)
        for i in tqdm(steps, desc=sampling.solver.name, unit="step", disable=None if self.progress else True):
            row = tuple(column[i] for column in table)
            static = (self.transformer, sampling.guidance)
            state = self.run(programs.bidirectional_step, *static, self.params, text, state, row)
            jax.block_until_ready(state.x)  # otherwise the bar would show dispatches, not finished steps
        return state.x
