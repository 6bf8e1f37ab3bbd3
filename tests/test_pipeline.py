"""One pipeline for every model: its output, unchanged across versions, and one clear line for every mistake."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sf_jax
from sf_jax import rollout
from sf_jax.diffusion.solvers import Solver
from sf_jax.inference import programs
from sf_jax.inference.load import load_pipeline
from sf_jax.models.rope import MAX_FRAMES
from sf_jax.models.wan import WanTransformer
from sf_jax.rollout import RolloutConfig
from tests.helpers import SMALL, random_params

PROMPTS = ["a 7 moving left, fast", "a 2 moving up, slowly"]
WAN = {"frames": 33, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def wan(folder):
    """A pipeline with a small Wan student."""
    return load_pipeline(folder, folder / "student.safetensors")


@pytest.fixture(scope="module")
def bare():
    """A causal network without text encoder and decoder, from embeddings to latents."""
    config = RolloutConfig(chunk=2, window=4, context_noise="none")
    pipe = sf_jax.VideoPipeline(None, WanTransformer(SMALL), random_params(), config)
    return pipe.with_sampling(frames=6, height=4, width=4)


def close_to_recorded(video, name):
    """Differs by at most one gray level from the recording of an earlier version; exact bits depend on the CPU."""
    recorded = np.load(f"tests/recorded/{name}.npz")["video"]
    assert np.abs(video.astype(int) - recorded).max() <= 1, hashlib.sha256(video.tobytes()).hexdigest()


def test_the_digits_are_those_of_the_first_release(digits):
    close_to_recorded(digits(PROMPTS, frames=12, seed=3), "digits")


def test_wan_videos_are_those_of_the_first_release(wan):
    close_to_recorded(wan("a dog runs", **WAN, first_index=1)[0, ::4], "wan")


@pytest.mark.slow
def test_a_stream_is_the_whole_video(wan, digits):
    for pipe, options in ((wan, WAN), (digits, {"frames": 12})):
        prompts = ["a dog runs", "a cat"] if pipe is wan else PROMPTS
        parts, seen = list(pipe.stream(prompts, **options, seed=5)), []
        whole = pipe(prompts, **options, seed=5, callback=seen.append)
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
        assert [chunk.start for chunk in seen] == list(pipe.chunk_starts(options["frames"]))
        latents = pipe(prompts, **options, seed=5, output="latent")
        assert latents.dtype == np.float32 and latents.shape[1] == pipe.latent_frames(options["frames"])
        again = pipe.decoder.decode_chunk(pipe.decoder.init_cache(2, *latents.shape[2:4]), jnp.asarray(latents))[1]
        assert np.abs(np.round((np.asarray(again) + 1) * 127.5).clip(0, 255) - whole).max() <= 1


def test_a_video_goes_on_from_given_frames(wan):
    alone = wan.with_rollout(first_frame_alone=True)
    with pytest.raises(ValueError, match="the pipeline has no encoder: load it with encoder=True"):
        wan.encode(np.zeros((1, 1, 32, 48, 3), np.uint8))
    first = wan("a dog runs", **WAN, output="latent")[:, :1]
    small = {"height": 32, "width": 48}
    video = alone("a dog runs", **small, frames=13, initial=first, output="latent")
    np.testing.assert_array_equal(video[:, :1], first)
    other = alone("a dog runs", **small, frames=13, initial=first + 1, output="latent")
    assert np.abs(video[:, 1:] - other[:, 1:]).max() > 1e-3
    with pytest.raises(ValueError, match=r"initial has the shape \(1, 1, 4, 4, 16\): it must be \[B, I, 4, 6, 16\]"):
        alone("a dog runs", **small, frames=13, initial=first[:, :, :, :4])


def test_the_noise_of_a_chunk_is_not_that_between_its_steps(digits, monkeypatch):
    keys, draw = [], rollout.example_noise

    def recorded(key, *rest):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return draw(key, *rest)

    monkeypatch.setattr(rollout, "example_noise", recorded)
    digits.with_rollout(steps=[1000, 900, 750, 600, 500, 250])(PROMPTS[:1], frames=3, output="latent")
    jax.effects_barrier()
    assert len(set(keys)) == len(keys) == 6  # one for the chunk, and five between its denoising steps


def test_digits_go_on_from_a_clip(digits):
    own = digits(PROMPTS, frames=12, seed=3)
    longer = digits(PROMPTS, frames=12, seed=3, initial=digits.encode(own[:, :6]))
    assert np.abs(longer[:, :6].astype(int) - own[:, :6]).mean() < 3  # from the codec and clipping
    assert longer.shape == own.shape and longer[:, 6:].std() > 10


def test_all_chunks_and_seeds_are_one_program(bare):
    before = programs.next_chunk._cache_size()
    text = np.ones((1, SMALL.text_len, SMALL.text_dim), np.float32)
    videos = [bare(text, seed=seed, output="latent") for seed in (1, 2)]
    assert programs.next_chunk._cache_size() == before + 1
    assert videos[0].shape == (1, 6, 4, 4, SMALL.channels) and np.abs(videos[0] - videos[1]).max() > 0.1


def test_many_steps_without_a_text_encoder_are_guided_from_nothing(bare):
    text = np.ones((2, SMALL.text_len, SMALL.text_dim), np.float32)
    many = bare.with_sampling(solver=Solver("unipc", 5.0, 2))
    assert many.kind == "causal" and bare.kind == "student"
    one, three = (many(text, guidance=g, output="latent") for g in (1.0, 3.0))
    assert np.abs(one - three).max() > 1e-3
    whole = dataclasses.replace(many, rollout=None, progress=False)
    assert whole.kind == "bidirectional" and whole(text, output="latent").shape == one.shape
    with pytest.raises(ValueError, match="a bidirectional network cannot go on from given frames"):
        whole(text, initial=one[:, :2], output="latent")
    with pytest.raises(ValueError, match="negative_prompt is given: a pipeline without text encoder"):
        many(text, negative_prompt="a dog", output="latent")


def test_prompts_are_embedded_once_and_the_encoder_is_dropped(wan, monkeypatch):
    encoder, loads = wan.text_encoder, []
    whole = encoder.encode(["a cat", "a dog runs"])
    monkeypatch.setattr("sf_jax.inference.text_encoder.load_embedder", lambda *a: loads.append(a))
    np.testing.assert_array_equal(encoder.encode(["a dog runs"])[0], whole[1])
    assert not loads and encoder._embedder is None and whole.shape == (2, 512, 16)


def test_a_pipeline_says_what_it_runs(wan, digits):
    assert digits.describe() == (
        "student network, 1.219 M parameters; float32; attention xla; 1 x cpu; chunks of 3; window 9, sink 3; "
        "positions relative; steps 1000, 750, 500, 250, shift 3; context clean; decoder PatchCodec"
    )
    assert "chunks of 3; no window; positions absolute" in wan.describe() and "decoder WanVae" in wan.describe()
    assert "euler in 24 steps, shift 3; guidance 2.5" in load_pipeline("teacher").describe()


def test_public_names_are_there():
    assert sf_jax.load_pipeline is load_pipeline and sf_jax.RolloutConfig is RolloutConfig
    for name in sf_jax.__all__:
        assert getattr(sf_jax, name) is not None and name in dir(sf_jax)
    assert set(sf_jax.__all__) == set(sf_jax._PUBLIC)
    with pytest.raises(AttributeError, match="module 'sf_jax' has no attribute 'pipeline'"):
        sf_jax.pipeline  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": 9}, "frame is no option of a pipeline: options are frames, guidance"),
        ({"frames": 10}, "frames is 10: with chunks of 3 latent frames the nearest that can be generated: 9 or 12"),
        ({"frames": 0}, "frames is 0: it must be at least 1"),
        ({"height": 30}, "height is 30: it must be a multiple of 8, such as 32"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5: it must be a whole number"),
        ({"frames": "9"}, "frames is '9': it must be a whole number"),
        ({"solver": "euler"}, "solver is 'euler': it must be None or a Solver"),
        ({"solver": Solver("euler")}, "this student takes few steps"),
        ({"first_index": 1.5}, "first_index is 1.5: it must be a whole number"),
        ({"first_index": [1]}, r"first_index is \[1\]: it must give 2 numbers from 0 to"),
        ({"first_index": 2**31}, "first_index is 2147483648"),
        ({"initial": [1.0]}, r"initial has the shape \(1,\): it must be \[B, I, 6, 6, 8\]"),
        ({"initial": np.zeros((1, 3, 6, 6, 8), np.float32)}, "initial has 1 videos: there are 2 prompts"),
        ({"initial": np.full((2, 3, 6, 6, 8), np.nan, np.float32)}, "with values that are no finite floats"),
        ({"initial": np.zeros((2, 3, 6, 6, 8), np.uint8)}, "with values that are no finite floats"),
        ({"guidance": 2.0}, "guidance is 2.0: a student has none"),
        ({"negative_prompt": "a 3"}, "negative_prompt is 'a 3': a student has none"),
        ({"output": "gif"}, "output is 'gif': it must be one of pixels, latent"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(digits, options, message):
    with pytest.raises(ValueError, match=message):
        digits.stream(PROMPTS, **options)


def test_pipelines_that_cannot_be_are_refused(digits, wan, bare, folder, tmp_path):
    with pytest.raises(ValueError, match=f"frames is {MAX_FRAMES * 4 - 3 + 12} .* at most {MAX_FRAMES} in all"):
        wan.check_frames(MAX_FRAMES * 4 - 3 + 12)
    with pytest.raises(ValueError, match="frames is 80: it must be 1 [+] a multiple of 4, such as 77 or 81"):
        wan("a cat", frames=80)
    with pytest.raises(ValueError, match="unknown word 'purple'"):
        digits("a purple 7")
    with pytest.raises(ValueError, match="output is 'pixels': a pipeline without decoder"):
        bare.stream(np.zeros((1, 3, 8), np.float32))
    with pytest.raises(ValueError, match="the pipeline has no text encoder"):
        bare("a cat", output="latent")
    with pytest.raises(ValueError, match=r"embeddings have the shape \(1, 3, 9\): it must be \[B, 3, 8\]"):
        bare(np.zeros((1, 3, 9), np.float32), output="latent")
    with pytest.raises(ValueError, match="window: a bidirectional network has no chunks"):
        load_pipeline("teacher").with_rollout(window=6)
    with pytest.raises(ValueError, match="model .*none does not exist"):
        load_pipeline(tmp_path / "none")
    with pytest.raises(ValueError, match="model 3 is no|model is 3: give a folder"):
        load_pipeline(3)
    with pytest.raises(ValueError, match="checkpoint is empty"):
        load_pipeline(folder, "")
    with pytest.raises(ValueError, match="rollout is .*: it must be a RolloutConfig"):
        load_pipeline(folder, folder / "student.safetensors", rollout={"window": 6})
    for prompts in ([], None, [1, 2]):
        for pipe in (digits, wan):
            with pytest.raises(ValueError, match="prompts is .*: give a text, or a list of at least one"):
                pipe(prompts)
    with pytest.raises(ValueError, match="pixels are float32 .*: they must be uint8"):
        digits.encode(np.zeros((1, 3, 24, 24, 1), np.float32))
    with pytest.raises(ValueError, match="solver is None: this network needs many steps"):
        load_pipeline("teacher").with_sampling(solver=None)
    with pytest.raises(ValueError, match="initial is no field of Sampling: give it to the call"):
        digits.with_sampling(initial=3)
    with pytest.raises(ValueError, match="foo is no field of RolloutConfig"):
        digits.with_rollout(foo=3)
    with pytest.raises(ValueError, match="chunk is 2.0: it must be a whole number"):
        digits.with_rollout(chunk=2.0)
    with pytest.raises(ValueError, match="first_steps is None: it must be a list or tuple of timesteps"):
        digits.with_rollout(first_steps=None)
    many = wan.with_sampling(solver=Solver("unipc", 5.0, 2))
    for changes in ({"context_timestep": 100.0}, {"context_noise": "exact"}, {"warp": not many.rollout.warp}):
        with pytest.raises(ValueError, match="it has no effect on a network that takes many steps"):
            many.with_rollout(**changes)
    with pytest.raises(ValueError, match="context is 'noisy': it has no effect on a network that takes many steps"):
        many.with_rollout(context="noisy")
    with pytest.raises(ValueError, match="none.safetensors does not exist"):
        load_pipeline(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="checkpoint is given without a model folder"):
        load_pipeline(checkpoint="x.pt")
    with pytest.raises(ValueError, match="devics is no option: options are cache_dtype, checkpoint, devices"):
        load_pipeline(folder, folder / "student.safetensors", devics=2)
    with pytest.raises(ValueError, match="vae is 'large': it must be one of wan, tiny, none"):
        load_pipeline(folder, vae="large")
    with pytest.raises(ValueError, match="rollout has no effect without checkpoint"):
        load_pipeline(folder, rollout=RolloutConfig())


def test_a_bidirectional_network_makes_whole_videos(folder):
    pipe = load_pipeline(folder, vae="none").with_sampling(frames=3, height=4, width=6, solver=Solver("unipc", 8.0, 2))
    (video,) = pipe.stream("a cat", output="latent")
    assert video.shape == (1, 3, 4, 6, 16) and jax.tree.leaves(pipe.params)[0].dtype == jnp.float32
    assert pipe.decoder is None and pipe.kind == "bidirectional"
