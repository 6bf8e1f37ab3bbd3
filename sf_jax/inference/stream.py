"""Endless video: streams batched in one forward pass, whose prompts can change while they play.

    stream = sf_jax.Stream(sf_jax.load_pipeline(), slots=4)
    seven = stream.join("a 7 moving left, fast", seed=1)
    while True:
        show(stream.step()[seven])  # uint8 [m, h, w, c]

Memory is constant, and so is the time per chunk once the window is full. Streams join and leave between chunks without
recompilation, and they are independent of each other.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.diffusion.schedule import TRAIN_STEPS
from sf_jax.inference import programs, stream_files, stream_state
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.prompt_change import Change, change_weights, check_change
from sf_jax.inference.sampling import Sampling, example_numbers
from sf_jax.inference.stream_frames import Frames
from sf_jax.inference.stream_memory import check_memory, check_slots
from sf_jax.inference.stream_state import StreamSpec


@dataclasses.dataclass
class _Playing:
    """The host's state of a stream.

    Attributes:
      slot: its index in the batch.
      embedding: float32 [1, S, D], the embedding of its prompt keys and values.
      frames: number of latent frames since it began, including given ones.
      position: frames since the last cut; with absolute positions, the next frame's position.
      sizes: sizes of its chunks, oldest first; at least of those in the cache, see `_kept_sizes`.
      change: the pending change of its prompt over the coming chunks.
      given: pixels that the next step returns before its own.
      lone: latents [1, H, W, C] that the next step returns before its own.
      fresh: whether the decoder has not decoded anything yet.
      begins: whether a single first frame is still to be generated.
    """

    slot: int
    embedding: np.ndarray
    frames: int = 0
    position: int = 0
    sizes: list[int] = dataclasses.field(default_factory=list)
    change: Change | None = None
    given: list = dataclasses.field(default_factory=list)
    lone: list = dataclasses.field(default_factory=list)
    fresh: bool = True
    begins: bool = False


class Stream:
    """Endless streams of a few-step student, S of them in one batch.

    `step` generates the next chunk of all streams. It returns as soon as the work is dispatched; frames are fetched
    when they are accessed, so a GPU or TPU can get the next step before that.
    """

    def __init__(self, pipe: VideoPipeline, slots: int = 1, *, memory: int | None = None, **options):
        """Allocates the state; no stream plays yet.

        Args:
          pipe: a few-step student with a window.
          slots: maximum number of simultaneous streams. Their memory is allocated now, and every step computes all.
          memory: bytes that the streams of one device may use; None is the free memory that the device reports, if any.
          **options: `height` and `width`, if they differ from the pipeline's.

        Raises:
          ValueError: if the network cannot stream, or the slots do not fit into the memory.
        """
        for name in set(options) - {"height", "width"}:
            raise ValueError(f"{name} is no option of a stream: options are height, width, memory, slots")
        self.spec = stream_spec(pipe)
        self.pipe = pipe
        if options:
            self.pipe = pipe.with_sampling(**options)
            self.spec = stream_spec(self.pipe)
        self.slots = check_slots(slots, pipe.mesh)
        check_memory(self.spec, self.pipe, self.slots, memory)
        self.state = self._run(stream_state.empty_on_devices, self.spec, pipe.decoder, self.slots)
        self._playing: dict[int, _Playing] = {}
        self._next_id = 0

    @property
    def free(self) -> int:
        """Number of streams that can still join."""
        return self.slots - len(self._playing)

    @property
    def playing(self) -> tuple[int, ...]:
        """The ids of the streams."""
        return tuple(self._playing)

    def frames(self, stream: int) -> int:
        """Number of latent frames of a stream so far, including given ones."""
        return self._of(stream).frames

    def join(
        self,
        prompt: str | np.ndarray,
        *,
        seed: int | None = None,
        number: int = 0,
        initial: np.ndarray | None = None,
    ) -> int:
        """Starts a stream from noise or from given frames; the next step returns its first frames.

        The frames equal those of `pipe(prompt, seed=seed, first_index=number)` up to rounding.

        Args:
          prompt: a text, or its embedding [S, D].
          seed: seed of the noise; None is the pipeline's.
          number: number of the video; seed and number determine the noise.
          initial: latents float32 [I, H, W, C] to continue from, such as `pipe.encode(pixels[None])[0]`.

        Returns:
          The stream's id.

        Raises:
          ValueError: if all slots are taken, or an argument is invalid.
        """
        slot, seed = self._free_slot(), self.pipe.sampling.seed if seed is None else seed
        Sampling(seed=seed)
        try:
            number = int(example_numbers(number, 1)[0])
        except ValueError as error:
            raise ValueError(f"number is {number!r}: it must be a whole number from 0 to 2**31 - 1") from error
        embedding, chunks = self._embedded(prompt), ()
        if initial is not None:
            initial, chunks = self._checked_initial(initial)
        self._change("begin", slot, self._keys_values(embedding), np.uint32(seed), np.int32(number))
        playing = _Playing(slot, embedding, begins=self.spec.rollout.first_frame_alone and initial is None)
        if initial is not None:
            playing.given, first = self._decode(playing, initial), 0
            for count in chunks:
                self._append(playing, initial[:, first : first + count], (0.0, 0.0, 0))
                first += count
        return self._add(playing)

    def leave(self, stream: int) -> None:
        """Ends a stream and frees its slot."""
        self._of(stream)
        del self._playing[stream]

    def prompt(
        self,
        stream: int,
        prompt: str | np.ndarray,
        mode: str = "swap",
        transition_chunks: int = 0,
        context_timestep: float | None = None,
        fade: float = 0.0,
    ) -> None:
        """Changes the prompt of a stream from its next chunk on.

        "flush" and "cut" drop frames immediately. Everything else takes effect at the next step; a second prompt before
        that replaces the first.

        Args:
          stream: the stream's id.
          prompt: see `join`.
          mode: "swap": only changes the text; "recache": recomputes the window's keys and values from the clean latents
            under the new text (LongLive, arXiv 2509.22622); "flush": keeps the sink and the newest latent frame and
            drops the others (Infinity-RoPE, arXiv 2511.20649); "cut": drops everything and starts a new scene.
          transition_chunks: number of chunks over which the embedding moves from the old prompt's to the new one's, in
            even steps; 0 changes at once. Recomputation happens for each of these chunks.
          context_timestep: in [0, 1000), for "recache" and "flush": recomputes the kept frames with the noise of this
            timestep, which weakens the influence of earlier frames. None is the rollout's own timestep for "recache",
            and no recomputation for "flush".
          fade: in [0, 1), for all modes but "cut": reduces the attention values of the kept frames by this share, when
            the new prompt reaches full weight. A network that clings to earlier frames then follows sooner.

        Raises:
          ValueError: if the id, the mode or another option is invalid, or the prompt cannot be embedded.
        """
        playing = self._of(stream)
        check_change(mode, transition_chunks, context_timestep, fade)
        if mode == "recache" or context_timestep is not None:
            self._check_recache(f"mode is {mode!r}")
        new, timestep = self._embedded(prompt), None if context_timestep is None else float(context_timestep)
        weights = change_weights(int(transition_chunks))
        playing.change = Change(playing.embedding, new, weights, mode, timestep, float(fade))
        if mode == "flush":
            self.state = self._run(stream_state.flush, self.spec, self.state, np.int32(playing.slot))
            sizes, sink = self._kept_sizes(playing), self.spec.rollout.sink
            newest = min(1, self.spec.capacity - sink)
            playing.sizes = sizes if sum(sizes) <= sink + newest else _first(sizes, sink) + [1] * newest
        elif mode == "cut":
            self._change("cut", playing.slot)
            playing.sizes, playing.position, playing.fresh = [], 0, True
            playing.begins = self.spec.rollout.first_frame_alone

    def step(self, only: Sequence[int] | None = None) -> Frames:
        """Dispatches the next chunk of the streams.

        Args:
          only: ids of the streams to advance, while the others pause; None advances all.

        Raises:
          ValueError: if a stream is unknown, or has reached the end of absolute positions.
        """
        if only is not None and (isinstance(only, str) or not isinstance(only, (Sequence, set, np.ndarray))):
            raise ValueError(f"only is {only!r}: it must be a list of ids")
        chosen = {stream: self._of(stream) for stream in (self._playing if only is None else only)}
        if not chosen:
            return Frames(None, None, {})
        count = self.spec.rollout.chunk
        for stream, playing in chosen.items():
            self._check_end(f"stream {stream} is at latent frame", playing.position, count + playing.begins)
        for stream, playing in chosen.items():
            try:
                self._prepare(playing)
            except BaseException:
                # Its keys and values may be incomplete, so the stream must not continue.
                self._playing.pop(stream, None)
                raise
        active = np.zeros(self.slots, bool)
        active[[playing.slot for playing in chosen.values()]] = True
        arguments = (self.spec, self.pipe.params, self.pipe.decoder, self.state, active)
        self.state, latents, pixels = self._run(stream_state.step, *arguments)
        parts, factor = {}, self.pipe.temporal_factor
        for stream, playing in chosen.items():
            parts[stream] = (playing.slot, factor - 1 if playing.fresh else 0, playing.given, playing.lone)
            playing.given, playing.lone, playing.fresh = [], [], False
            self._count(playing, count)
        return Frames(latents, pixels, parts)

    def save(self, stream: int, path: str | Path, compact: bool = False) -> None:
        """Writes a stream to a file, from which any process with the same weights can continue it.

        Args:
          stream: the stream's id.
          path: the safetensors file.
          compact: whether to omit the keys and values, which are most of the file. `restore` then recomputes them from
            the clean latents, as "recache" does, and later frames are close to those of an uninterrupted stream. With
            keys and values, the same number of slots and the same form of the network (`WanConfig.scan_layers`), later
            frames are bit-identical.

        Raises:
          ValueError: if the stream is unknown, or the path cannot be written.
        """
        playing = self._of(stream)
        if compact:
            self._check_recache("compact is True")
        if playing.given or playing.begins:
            raise ValueError(f"stream {stream} has frames that no step has given out yet: save it after the next step")
        one = self._run(stream_state.take, self.state, np.int32(playing.slot))
        host = {"frames": playing.frames, "position": playing.position, "sizes": self._kept_sizes(playing)}
        embeddings, change = playing.embedding, playing.change
        if change is not None:
            host |= {"change": [list(change.weights), change.mode, change.context_timestep, change.fade]}
            embeddings = np.concatenate([embeddings, change.old, change.new])
        stream_files.write(_path(path), self.spec, self._weights, one, host, embeddings, compact)

    def restore(self, path: str | Path) -> int:
        """Continues a stream written by `save`; returns its new id.

        Raises:
          ValueError: if all slots are taken, or the file is damaged or was written with another model or other sizes.
        """
        slot, path = self._free_slot(), _path(path)
        like = jax.eval_shape(stream_state.take, self.state, 0)
        one, host, embeddings, compact = stream_files.read(path, self.spec, self._weights, like)
        playing = _Playing(slot, self.pipe.embed(embeddings[:1]), fresh=bool(one.fresh[0]))
        playing.frames, playing.position, playing.sizes = host["frames"], host["position"], host["sizes"]
        if "change" in host:
            weights, *options = host["change"]
            old, new = (self.pipe.embed(embeddings[i : i + 1]) for i in (1, 2))
            playing.change = Change(old, new, tuple(weights), *options)
        self._change("insert", slot, one)
        self._change("set_text", slot, self._keys_values(playing.embedding))
        if compact:
            self._recache(playing)
            self._fade(playing, stream_files.ordered_scale(one))
        return self._add(playing)

    def _of(self, stream: int) -> _Playing:
        whole = isinstance(stream, (int, np.integer)) and not isinstance(stream, bool)
        if not whole or stream not in self._playing:
            playing = ", ".join(map(str, self._playing)) or "none"
            raise ValueError(f"stream {stream!r} does not play: streams that do: {playing}")
        return self._playing[stream]

    def _free_slot(self) -> int:
        if not self.free:
            raise ValueError(f"all {self.slots} slots play: let a stream leave, or make more slots")
        return min(set(range(self.slots)) - {playing.slot for playing in self._playing.values()})

    def _add(self, playing: _Playing) -> int:
        self._playing[self._next_id] = playing
        self._next_id += 1
        return self._next_id - 1

    @property
    def _weights(self):
        """The weights on which the frames depend, in addition to the state."""
        return {"params": self.pipe.params, "decoder": self.pipe.decoder}

    def _embedded(self, prompt) -> np.ndarray:
        """Embedding float32 [1, S, D] of a prompt."""
        if isinstance(prompt, (np.ndarray, jax.Array)):
            config = self.pipe.transformer.config
            if prompt.shape != (config.text_len, config.text_dim):
                wanted = f"[{config.text_len}, {config.text_dim}]"
                raise ValueError(f"prompt is an embedding of the shape {prompt.shape}: it must be {wanted}")
            return np.asarray(self.pipe.embed(np.asarray(prompt)[None]), np.float32)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt is {prompt!r}: it must be a text, or an embedding [S, D]")
        return np.asarray(self.pipe.embed([prompt]), np.float32)

    def _checked_initial(self, initial) -> tuple[np.ndarray, tuple[int, ...]]:
        """Latents float32 [1, I, H, W, C], and the sizes of their chunks."""
        initial = np.asarray(initial)
        if initial.ndim != 4 or initial.shape[1:] != self.spec.size or not len(initial):
            wanted = ", ".join(map(str, self.spec.size))
            raise ValueError(f"initial has the shape {initial.shape}: it must be [I, {wanted}]")
        initial = self.pipe.checked_initial(initial[None], self.spec.size)
        count, chunk = initial.shape[1], self.spec.rollout.chunk
        self._check_end("initial ends at latent frame", count, chunk)
        try:
            chunks, _ = self.spec.rollout.chunks(chunk, count)
        except ValueError as error:
            raise ValueError(f"initial has {count} latent frames: {error}") from error
        return initial.astype(np.float32), chunks

    def _check_recache(self, what: str) -> None:
        if self.spec.rollout.context == "noisy":
            raise ValueError(
                f"{what}: rollout.context is 'noisy', whose keys and values are those of a denoising step and cannot "
                "be computed again; it must be 'clean'"
            )

    def _check_end(self, what: str, position: int, count: int) -> None:
        end = self.spec.rollout.max_frames
        if end is not None and position + count > end:
            raise ValueError(
                f"{what} {position}: positions 'absolute' end at {end}; use pipe.with_rollout(positions='relative'), "
                "or prompt with mode 'cut', which begins anew"
            )

    def _keys_values(self, embedding: np.ndarray):
        arguments = (self.pipe.transformer, self.pipe.params, jnp.asarray(embedding))
        return self._run(programs.encode_text, *arguments)

    def _run(self, program, *arguments):
        return self.pipe.run(program, *arguments)

    def _change(self, name: str, slot: int, *arguments) -> None:
        self.state = self._run(getattr(stream_state, name), self.state, np.int32(slot), *arguments)

    def _prepare(self, playing: _Playing) -> None:
        """Prepares a stream for its next chunk: applies a new prompt, and generates a single first frame."""
        if playing.change is not None:
            embedding, rest = playing.change.next()
            self._change("set_text", playing.slot, self._keys_values(embedding))
            if playing.change.recaches:
                self._recache(playing, playing.change.context_timestep)
            if rest is None and playing.change.fade:
                self._fade(playing, np.full(self.spec.capacity, 1 - playing.change.fade))
            playing.embedding, playing.change = embedding, rest
        if playing.begins:
            arguments = (self.spec, self.pipe.params, self.state, np.int32(playing.slot))
            self.state, clean = self._run(stream_state.lone_frame, *arguments)
            self._count(playing, 1)
            playing.given = playing.given + self._decode(playing, clean)  # given frames may wait before a cut
            playing.lone, playing.begins = [np.asarray(clean[0])], False

    def _recache(self, playing: _Playing, timestep: float | None = None) -> None:
        """Recomputes the cached keys and values chunk by chunk under the current prompt."""
        sizes, before = self._kept_sizes(playing), (playing.frames, playing.position)
        self.state, latents = self._run(stream_state.recall, self.spec, self.state, np.int32(playing.slot))
        playing.sizes, first, config = [], 0, self.spec.rollout
        for count in sizes:
            # draw 0 is that of the next chunk's own clean pass
            context = (config.context_timestep, config.context_sigma, 1 + first)
            if timestep is not None:
                context = (timestep, timestep / TRAIN_STEPS, 1 + first)
            self._append(playing, latents[:, first : first + count], context)
            first += count
        playing.frames, playing.position = before

    def _fade(self, playing: _Playing, value_scale: np.ndarray) -> None:
        """Scales the values of the kept frames; for `value_scale` see `stream_state.fade`."""
        arguments = (self.spec, self.state, np.int32(playing.slot), value_scale.astype(np.float32))
        self.state = self._run(stream_state.fade, *arguments)

    def _append(self, playing: _Playing, clean, context: tuple[float, float, int]) -> None:
        """Appends frames to a stream's cache; for `context` see `stream_state.append`."""
        timestep, sigma, number = context
        context = (np.float32(timestep), np.float32(sigma), np.int32(number))
        arguments = (self.spec, self.pipe.params, self.state, np.int32(playing.slot), clean, context)
        self.state = self._run(stream_state.append, *arguments)
        self._count(playing, clean.shape[1])

    def _count(self, playing: _Playing, count: int) -> None:
        playing.frames += count
        playing.position += count
        playing.sizes.append(count)
        if len(playing.sizes) > 4 * self.spec.rollout.window:
            playing.sizes = self._kept_sizes(playing)

    def _kept_sizes(self, playing: _Playing) -> list[int]:
        """Sizes of the chunks, or parts of chunks, in the cache: the sink's, then the newest."""
        total, sink = sum(playing.sizes), self.spec.rollout.sink
        if total <= self.spec.capacity:
            return list(playing.sizes)
        newest = _first(playing.sizes[::-1], self.spec.capacity - sink)[::-1]
        return _first(playing.sizes, sink) + newest

    def _decode(self, playing: _Playing, latents) -> list[np.ndarray]:
        """Decodes a video's first latents [1, n, H, W, C] to pixels; the stream's decoder continues from there."""
        decoder = self.pipe.decoder
        if decoder is None:
            return []
        cache, pixels = self._run(programs.empty_decoder_cache, decoder, 1, *self.spec.size[:2]), []
        for i in range(latents.shape[1]):
            frame = jnp.asarray(latents[:, i : i + 1], jnp.float32)
            cache, new = self._run(programs.decode, decoder, cache, frame)
            pixels.append(np.asarray(new)[0])
        self._change("set_decoder", playing.slot, cache)
        playing.fresh = False
        return pixels


def _path(path) -> Path:
    if not isinstance(path, (str, Path)) or not str(path):
        raise ValueError(f"path is {path!r}: it must be the name of a file")
    return Path(path)


def _first(sizes: list[int], count: int) -> list[int]:
    """The sizes of the first `count` frames."""
    kept = []
    for size in sizes:
        if sum(kept) >= count:
            break
        kept.append(min(size, count - sum(kept)))
    return kept


def stream_spec(pipe: VideoPipeline) -> StreamSpec:
    """The static settings of a pipeline's streams.

    Raises:
      ValueError: if the pipeline is not a few-step student, or has no window.
    """
    if not isinstance(pipe, VideoPipeline):
        raise ValueError(f"pipe is {pipe!r}: it must be a VideoPipeline, such as that of sf_jax.load_pipeline()")
    if pipe.kind != "student":
        raise ValueError(f"pipe has a {pipe.kind} network: only few-step students stream without end")
    if pipe.rollout.window is None:
        raise ValueError(
            "window is None: an endless stream needs one, such as 21 latent frames (pipe.with_rollout(window=21))"
        )
    size = pipe.latent_size(pipe.sampling)
    return StreamSpec(pipe.transformer, pipe.rollout, size, pipe.noise_number, pipe.cache_dtype)
