"""Video that never ends: streams side by side in one forward pass, whose prompts change while they play.

    stream = sf_jax.Stream(sf_jax.load_pipeline(), slots=4)
    seven = stream.join("a 7 moving left, fast", seed=1)
    while True:
        show(stream.step()[seven])  # uint8 [m, h, w, c]

Memory and time of a chunk stay the same however long a stream plays. Streams join and leave between chunks without
compiling anything, and none of them depends on the others.
"""

import dataclasses
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.inference import programs, stream_files, stream_state
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.sampling import Sampling, example_numbers
from sf_jax.inference.stream_memory import check_memory
from sf_jax.inference.stream_state import StreamSpec

MODES = ("swap", "recache", "flush", "cut")


@dataclasses.dataclass
class _Playing:
    """What the host knows of a stream.

    Attributes:
      slot: its place in the batch.
      embedding: float32 [1, S, D], what its prompt keys and values were made of.
      frames: latent frames since it began, given ones included.
      position: frames since the last cut: the next frame's position where positions are absolute.
      sizes: chunks in the cache, oldest first; frames that have left it are taken off when they are needed.
      ahead: embeddings of the chunks to come, while the prompt changes.
      mode: how the prompt changes.
      given: pixels that the next step gives out before its own.
      fresh: whether the decoder has seen nothing.
    """

    slot: int
    embedding: np.ndarray
    frames: int = 0
    position: int = 0
    sizes: list[int] = dataclasses.field(default_factory=list)
    ahead: deque = dataclasses.field(default_factory=deque)
    mode: str = "swap"
    given: list = dataclasses.field(default_factory=list)
    fresh: bool = True


class Frames:
    """What a step made, still on the devices until it is asked for.

    `frames[id]` is uint8 [m, h, w, c] (or latents float32 [n, H, W, C] of a pipeline without decoder): the stream's new
    frames, after its given ones where it has just begun.
    """

    def __init__(self, latents: jax.Array, pixels: jax.Array | None, parts: dict[int, tuple[int, int, list]]):
        """Keeps arrays of all slots, and the slot, the first frame that counts and what comes before, of each id."""
        self._latents, self._pixels, self._parts = latents, pixels, parts
        self._host: dict[bool, np.ndarray] = {}

    def __getitem__(self, stream: int) -> np.ndarray:
        """The frames of a stream."""
        if self._pixels is None:
            return self.latents(stream)
        slot, first, given = self._parts[stream]
        return np.concatenate([*given, self._fetched(pixels=True)[slot, first:]])

    def latents(self, stream: int) -> np.ndarray:
        """The new clean latents of a stream, float32 [n, H, W, C], without given ones."""
        return self._fetched(pixels=False)[self._parts[stream][0]]

    def count(self, stream: int) -> int:
        """How many frames `self[stream]` has, without waiting for them."""
        if self._pixels is None:
            return self._latents.shape[1]
        _, first, given = self._parts[stream]
        return self._pixels.shape[1] - first + sum(len(part) for part in given)

    def _fetched(self, pixels):
        if pixels not in self._host:
            self._host[pixels] = np.asarray(self._pixels if pixels else self._latents)
        return self._host[pixels]

    def __iter__(self):
        """The ids of the streams that have new frames."""
        return iter(self._parts)

    def __len__(self) -> int:
        """How many streams have new frames."""
        return len(self._parts)

    def block_until_ready(self) -> "Frames":
        """Waits until the devices are done."""
        jax.block_until_ready((self._latents, self._pixels))
        return self


class Stream:
    """Endless streams of a few-step student, S of them in one batch.

    `step` makes the next chunk of all of them. It only starts the work: the frames are fetched when they are looked
    at, so that a GPU or TPU can be given the next step before.
    """

    def __init__(self, pipe: VideoPipeline, slots: int = 1, *, memory: int | None = None, **options):
        """Sets up the state; nothing plays yet.

        Args:
          pipe: a few-step student with a window.
          slots: how many streams there can be at once. Their memory is taken now, and every step computes them all.
          memory: bytes that the streams may take; None is what the device says it has left, if it does.
          **options: `height` and `width`, where they are not those of the pipeline.

        Raises:
          ValueError: if the network cannot stream, or the slots do not fit into the memory.
        """
        for name in set(options) - {"height", "width"}:
            raise ValueError(f"{name} is no option of a stream: options are height, width, memory, slots")
        self.pipe = pipe.with_sampling(**options) if options else pipe
        self.spec = stream_spec(self.pipe)
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise ValueError(f"slots is {slots!r}: it must be a whole number of at least 1")
        if pipe.mesh is not None and slots % pipe.mesh.size:
            raise ValueError(f"slots is {slots}: it must be a multiple of the {pipe.mesh.size} devices")
        check_memory(self.spec, self.pipe, slots, memory)
        self.slots = slots
        self.state = self._run(stream_state.empty_on_devices, self.spec, pipe.decoder, slots)
        self._playing: dict[int, _Playing] = {}
        self._next_id = 0

    @property
    def free(self) -> int:
        """How many more streams can join."""
        return self.slots - len(self._playing)

    @property
    def playing(self) -> tuple[int, ...]:
        """The ids of the streams."""
        return tuple(self._playing)

    def frames(self, stream: int) -> int:
        """Latent frames that a stream has had, given ones included."""
        return self._of(stream).frames

    def join(
        self,
        prompt: str | np.ndarray,
        *,
        seed: int = 0,
        number: int = 0,
        initial: np.ndarray | None = None,
    ) -> int:
        """Begins a stream, from noise or from given frames; its first frames come with the next step.

        The frames are those of `pipe(prompt, seed=seed, first_index=number)`, up to rounding.

        Args:
          prompt: a text, or its embedding [S, D].
          seed: seed of the noise.
          number: number of the video; together with the seed it says which noise.
          initial: latents float32 [I, H, W, C] to go on from, such as `pipe.encode(pixels[None])[0]`.

        Returns:
          An id, by which the stream is known from now on.

        Raises:
          ValueError: if all slots play, or something given is wrong.
        """
        if not self.free:
            raise ValueError(f"all {self.slots} slots play: let a stream leave, or make more slots")
        Sampling(seed=seed)
        number = int(example_numbers(number, 1)[0])
        embedding = self._embedded(prompt)
        given, chunks = None, ()
        if initial is not None:
            given = self.pipe.checked_initial(np.asarray(initial)[None], self.spec.size)
            chunks, _ = self.spec.rollout.chunks(self.spec.rollout.chunk, given.shape[1])
        slot = min(set(range(self.slots)) - {playing.slot for playing in self._playing.values()})
        self._change("begin", slot, self._keys_values(embedding), np.uint32(seed), np.int32(number))
        playing = _Playing(slot, embedding)
        if given is not None:
            playing.given = self._decode_given(playing, given)
            for count in chunks:
                part, given = given[:, :count], given[:, count:]
                self._append(playing, np.asarray(part, np.float32))
        elif self.spec.rollout.first_frame_alone:
            self._check_end(self._next_id, 0, 1)
            lone = stream_state.lone_frame
            self.state, clean = self._run(lone, self.spec, self.pipe.params, self.state, np.int32(slot))
            self._count(playing, 1)
            playing.given = self._decode_given(playing, clean)
        self._next_id += 1
        self._playing[self._next_id - 1] = playing
        return self._next_id - 1

    def leave(self, stream: int) -> None:
        """Ends a stream; another can join in its place."""
        self._of(stream)
        del self._playing[stream]

    def prompt(self, stream: int, prompt: str | np.ndarray, mode: str = "swap", transition_chunks: int = 0) -> None:
        """Changes the prompt of a stream, from its next chunk on.

        Args:
          stream: the stream's id.
          prompt: see `join`.
          mode: "swap": new text, nothing else; "recache": the keys and values of the window are computed again under
            the new text from the clean latents (LongLive, arXiv 2509.22622); "flush": the sink and the newest latent
            frame are kept, the others forgotten (Infinity-RoPE, arXiv 2511.20649); "cut": everything is forgotten, and
            a new scene begins.
          transition_chunks: chunks over which the embedding goes from the old prompt's to the new one's, in even
            steps; 0 changes at once. "recache" computes the window again for each of them.

        Raises:
          ValueError: on an unknown id or mode, or a prompt that cannot be embedded.
        """
        playing = self._of(stream)
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: it must be one of {', '.join(MODES)}")
        whole = isinstance(transition_chunks, (int, np.integer)) and not isinstance(transition_chunks, bool)
        if not whole or transition_chunks < 0:
            raise ValueError(f"transition_chunks is {transition_chunks!r}: it must be a whole number of at least 0")
        if mode == "cut" and transition_chunks:
            raise ValueError(f"transition_chunks is {transition_chunks}: a cut is at once, it must be 0")
        new, old = self._embedded(prompt), playing.embedding
        parts = [(i + 1) / (transition_chunks + 1) for i in range(transition_chunks)]
        playing.ahead = deque([*(old + np.float32(part) * (new - old) for part in parts), new])
        playing.mode = mode
        if mode == "flush":
            self._change_of(playing, "flush", self.spec)
            sizes, sink = self._kept_sizes(playing), self.spec.rollout.sink
            newest = min(1, self.spec.capacity - sink)
            playing.sizes = sizes if sum(sizes) <= sink + newest else _first(sizes, sink) + [1] * newest
        elif mode == "cut":
            self._change_of(playing, "cut")
            playing.sizes, playing.position, playing.fresh = [], 0, True

    def step(self, only: tuple[int, ...] | None = None) -> Frames:
        """Starts the next chunk of the streams.

        Args:
          only: ids of the streams that go on, the others pause; None is all.

        Raises:
          ValueError: if a stream is unknown, or at the end of absolute positions.
        """
        chosen = {stream: self._of(stream) for stream in (self._playing if only is None else only)}
        count = self.spec.rollout.chunk
        for stream, playing in chosen.items():
            self._check_end(stream, playing.position, count)
        for playing in chosen.values():
            self._change_text(playing)
        active = np.zeros(self.slots, bool)
        active[[playing.slot for playing in chosen.values()]] = True
        arguments = (self.spec, self.pipe.params, self.pipe.decoder, self.state, active)
        self.state, latents, pixels = self._run(stream_state.step, *arguments)
        parts, factor = {}, self.pipe.temporal_factor
        for stream, playing in chosen.items():
            parts[stream] = (playing.slot, factor - 1 if playing.fresh else 0, playing.given)
            playing.given, playing.fresh = [], False
            self._count(playing, count)
        return Frames(latents, pixels, parts)

    def save(self, stream: int, path: str | Path, compact: bool = False) -> None:
        """Writes a stream to a file, from which any process with the same weights goes on.

        Args:
          stream: the stream's id.
          path: the file, safetensors.
          compact: whether to leave out the keys and values, nearly all of the file: they are then computed again from
            the clean latents of the window, whose chunks no longer see what was before it, and the frames to come are
            close to those without the break. With them, the frames are the same to the bit.

        Raises:
          ValueError: if the stream is unknown, or the path cannot be written.
        """
        playing = self._of(stream)
        if playing.given:
            raise ValueError(f"stream {stream} has just begun: save it after its first step")
        one = self._run(stream_state.take, self.state, np.int32(playing.slot))
        host = {"frames": playing.frames, "position": playing.position, "mode": playing.mode}
        host["sizes"] = self._kept_sizes(playing)
        embeddings = np.concatenate([playing.embedding, *playing.ahead])
        stream_files.write(Path(path), self.spec, self.pipe.params, one, host, embeddings, compact)

    def restore(self, path: str | Path) -> int:
        """Goes on with a stream that `save` wrote; returns its new id.

        Raises:
          ValueError: if all slots play, or the file is damaged or was written with another model or other sizes.
        """
        if not self.free:
            raise ValueError(f"all {self.slots} slots play: let a stream leave, or make more slots")
        slot = min(set(range(self.slots)) - {playing.slot for playing in self._playing.values()})
        like = jax.eval_shape(stream_state.take, self.state, 0)
        one, host, embeddings, compact = stream_files.read(Path(path), self.spec, self.pipe.params, like)
        playing = _Playing(slot, embeddings[:1], **host, fresh=bool(one.fresh[0]))
        playing.ahead.extend(row[None] for row in embeddings[1:])
        self.state = self._run(stream_state.insert, self.state, np.int32(slot), one)
        self._change_of(playing, "set_text", self._keys_values(playing.embedding))
        if compact:
            self._recache(playing)
        self._next_id += 1
        self._playing[self._next_id - 1] = playing
        return self._next_id - 1

    def _of(self, stream: int) -> _Playing:
        if stream not in self._playing:
            playing = ", ".join(map(str, self._playing)) or "none"
            raise ValueError(f"stream {stream!r} does not play: streams that do: {playing}")
        return self._playing[stream]

    def _embedded(self, prompt) -> np.ndarray:
        rows = np.asarray(prompt)[None] if isinstance(prompt, (np.ndarray, jax.Array)) else [prompt]
        return np.asarray(self.pipe.embed(rows), np.float32)

    def _keys_values(self, embedding: np.ndarray):
        arguments = (self.pipe.transformer, self.pipe.params, jnp.asarray(embedding))
        return self._run(programs.encode_text, *arguments)

    def _run(self, program, *arguments):
        return self.pipe.run(program, *arguments)

    def _change(self, name: str, slot: int, *arguments) -> None:
        self.state = self._run(getattr(stream_state, name), self.state, np.int32(slot), *arguments)

    def _change_of(self, playing: _Playing, name: str, *arguments) -> None:
        program, slot = getattr(stream_state, name), np.int32(playing.slot)
        if name == "flush":
            self.state = self._run(program, *arguments, self.state, slot)
        else:
            self.state = self._run(program, self.state, slot, *arguments)

    def _change_text(self, playing: _Playing) -> None:
        """What a new prompt asks for before the next chunk."""
        if not playing.ahead:
            return
        playing.embedding = playing.ahead.popleft()
        self._change_of(playing, "set_text", self._keys_values(playing.embedding))
        if playing.mode == "recache":
            self._recache(playing)

    def _recache(self, playing: _Playing) -> None:
        """Computes the kept keys and values again, chunk by chunk, under the present prompt."""
        sizes, before = self._kept_sizes(playing), (playing.frames, playing.position)
        self.state, latents = self._run(stream_state.recall, self.spec, self.state, np.int32(playing.slot))
        playing.sizes, first = [], 0
        for count in sizes:
            self._append(playing, latents[:, first : first + count])
            first += count
        playing.frames, playing.position = before

    def _append(self, playing: _Playing, clean) -> None:
        arguments = (self.spec, self.pipe.params, self.state, np.int32(playing.slot), clean)
        self.state = self._run(stream_state.append, *arguments)
        self._count(playing, clean.shape[1])

    def _count(self, playing: _Playing, count: int) -> None:
        playing.frames += count
        playing.position += count
        playing.sizes.append(count)
        if len(playing.sizes) > 4 * self.spec.rollout.window:
            playing.sizes = self._kept_sizes(playing)

    def _kept_sizes(self, playing: _Playing) -> list[int]:
        """Sizes of the chunks, or of what is left of them, that are in the cache: the sink's, then the newest."""
        total, sink = sum(playing.sizes), self.spec.rollout.sink
        if total <= self.spec.capacity:
            return list(playing.sizes)
        newest = _first(playing.sizes[::-1], self.spec.capacity - sink)[::-1]
        return _first(playing.sizes, sink) + newest

    def _check_end(self, stream: int, position: int, count: int) -> None:
        end = self.spec.rollout.max_frames
        if end is not None and position + count > end:
            raise ValueError(
                f"stream {stream} is at latent frame {position}: positions 'absolute' end at {end}; use "
                "pipe.with_rollout(positions='relative'), give it a new prompt with mode 'cut', or let it leave"
            )

    def _decode_given(self, playing: _Playing, latents) -> list[np.ndarray]:
        """Pixels of given latents [1, n, H, W, C]; the decoder goes on from there."""
        decoder = self.pipe.decoder
        if decoder is None:
            return []
        cache, pixels = decoder.init_cache(1, *self.spec.size[:2]), []
        for i in range(latents.shape[1]):
            cache, new = programs.decode(decoder, cache, jnp.asarray(latents[:, i : i + 1], jnp.float32))
            pixels.append(np.asarray(new)[0])
        self._change_of(playing, "set_decoder", cache)
        playing.fresh = False
        return pixels


def _first(sizes: list[int], count: int) -> list[int]:
    """The sizes of the first `count` frames."""
    kept = []
    for size in sizes:
        if sum(kept) >= count:
            break
        kept.append(min(size, count - sum(kept)))
    return kept


def stream_spec(pipe: VideoPipeline) -> StreamSpec:
    """What a pipeline's streams are compiled for.

    Raises:
      ValueError: if it is no few-step student, or has no window.
    """
    if pipe.kind != "student":
        raise ValueError(f"the pipeline has a {pipe.kind} network: only few-step students stream for ever")
    if pipe.rollout.window is None:
        raise ValueError("window is None: an endless stream needs one, such as 21 latent frames")
    return StreamSpec(pipe.transformer, pipe.rollout, pipe.latent_size(pipe.sampling), pipe.noise_number)
