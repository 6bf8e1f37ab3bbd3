"""8-bit weights and caches: errors, memory, number of programs, and a warning if quality may suffer."""

import dataclasses
import itertools
import re
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import sf_jax
from sf_jax import load_pipeline, rollout_cache
from sf_jax import rollout as ro
from sf_jax.inference import programs, quantization
from sf_jax.inference.job import Job
from sf_jax.inference.load import WanOptions
from sf_jax.models import eight_bit, kv_cache, wan
from sf_jax.models.slots import unstack_layers
from sf_jax.weights import eight_bit as weights
from sf_jax.weights import transformer
from sf_jax.weights.networks import load_network
from tests.helpers import SIZE, SMALL, inputs, marked, random_params, refused, relative
from tests.wan_folder import MODEL, make_folder

# Relative errors of one matmul: half a step of the largest of about 100 values in int8, half of 2**-4 in float8.
CLOSE = {"int8": 0.02, "fp8": 0.05}
SMOOTH = [(name, products) for name in eight_bit.DTYPES for products in (False, True)]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder."""
    return make_folder(tmp_path_factory.mktemp("wan"))


def quantized(params: dict, name: str, products: bool = False) -> tuple[dict, weights.Quantizer]:
    """Quantized parameters and their quantizer."""
    quantizer = weights.Quantizer(name, products)
    return weights.quantize_params(params, quantizer), quantizer


@pytest.mark.parametrize("name, products", SMOOTH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_with_a_kernel_of_8_bits(name, products, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, bias = (jax.random.normal(k, s) for k, s in zip(keys, [(2, 5, 96), (96, 24), (24,)], strict=True))
    x = x * jnp.array([1.0, 100.0])[:, None, None]  # every token has its own scale
    scaled = eight_bit.quantize(kernel.T, name, products)
    assert scaled.values.dtype.itemsize == 1 and scaled.scale.shape == (24, 1)
    ours = eight_bit.linear(x.astype(dtype), scaled, bias, (None, None))
    assert ours.dtype == dtype
    for i in range(2):
        assert relative(ours[i], x[i] @ kernel + bias) < CLOSE[name]


@pytest.mark.parametrize("name", eight_bit.DTYPES)
def test_all_layers_of_the_list_and_no_others_are_quantized(name):
    params, quantizer = quantized(random_params(), name)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, eight_bit.Scaled))
    }
    found = {path for path, leaf in flat.items() if isinstance(leaf, eight_bit.Scaled)}
    assert found == {f"blocks.{layer}.kernel" for layer in eight_bit.LAYERS}
    assert weights.count(params) == weights.count(random_params())
    assert len(quantizer.errors) == len(eight_bit.LAYERS) and not quantizer.report().faults  # within the gate


@pytest.mark.parametrize("name, products", [("int8", True), ("fp8", False)])
def test_layers_scanned_and_apart_give_the_same(name, products):
    params, _ = quantized(random_params(), name, products)
    noise, text, _ = inputs(2, batch=1)

    def flow(scan_layers, params):
        model = wan.WanTransformer(dataclasses.replace(SMALL, scan_layers=scan_layers))
        apply = jax.jit(
            lambda p: model.apply({"params": p}, noise, jnp.ones((1, 1)), text, wan.bidirectional_layout(2))
        )
        return apply(params)

    scanned = flow(True, params)
    # Activations halfway between two steps may round either way.
    assert relative(flow(False, unstack_layers(params)), scanned) < (1e-2 if products else 1e-5)
    assert 1e-4 < relative(scanned, flow(True, random_params())) < 0.2


@pytest.mark.parametrize("name, scan_layers", [("int8", True), ("fp8", False)])
def test_attention_reads_what_the_cache_of_8_bits_holds(name, scan_layers):
    config = dataclasses.replace(SMALL, num_layers=1)
    model, params = wan.WanTransformer(dataclasses.replace(config, scan_layers=scan_layers)), random_params(config)
    params = params if scan_layers else unstack_layers(params)
    config = ro.RolloutConfig(steps=(1000,), context_noise="none")
    noise, text, draw = inputs(6)
    text = model.apply({"params": params}, text, method="encode_text")

    @jax.jit
    def chunk(cache, start):
        part = jax.lax.dynamic_slice_in_dim(noise, start, 3, 1)
        noisy = ro.NoisyChunk(part, start, start // 3, 0, draw)
        return ro.generate_chunk(model, config, params, text, cache, noisy)[:2]

    cache, first = chunk(rollout_cache.empty_cache(model, config, 2, 6, *SIZE, dtype=name), 0)
    full, exact = chunk(rollout_cache.empty_cache(model, config, 2, 6, *SIZE), 0)
    np.testing.assert_allclose(first, exact, rtol=0, atol=1e-5)  # the first chunk reads no cache
    wide = cache.replace(k=cache.k.astype(jnp.float32), v=cache.v.astype(jnp.float32))
    assert relative(wide.k, full.k) < CLOSE[name] and relative(wide.v, full.v) < CLOSE[name]
    (_, ours), (_, read) = chunk(cache, 3), chunk(wide, 3)
    np.testing.assert_allclose(ours, read, rtol=0, atol=1e-5)
    assert relative(ours, chunk(full, 3)[1]) < 2 * CLOSE[name]


def test_ring_of_8_bits_keeps_the_frames_of_a_wide_one():
    heads, dim, tokens = 2, 16, 3
    caches = [kv_cache.init_cache(2, 1, 4, tokens, heads, dim, dtype, sink=1) for dtype in ("int8", "float32")]
    for start in range(0, 8, 2):
        k, v = (jax.random.normal(jax.random.key(10 * start + i), (2, 1, 2 * tokens, heads, dim)) for i in range(2))
        caches = [kv_cache.write(cache, k, v, start, keep=start == 4) for cache in caches]
    for change in (lambda c: c, lambda c: kv_cache.within(c, 8, 3), lambda c: kv_cache.in_order(c, 8)):
        narrow, plain = map(change, caches)
        np.testing.assert_array_equal(narrow.frames, plain.frames)
        assert relative(narrow.k.astype(jnp.float32), plain.k) < CLOSE["int8"]
        assert relative(narrow.v.astype(jnp.float32), plain.v) < CLOSE["int8"]


def test_streams_with_a_cache_of_8_bits_are_smaller_and_go_on_from_files(digits, tmp_path):
    pipe = load_pipeline(cache_dtype="int8")
    assert "; cache int8; " in pipe.describe()
    wide, narrow = (each.bytes_per_stream().cache for each in (digits, pipe))
    head_dim = pipe.transformer.config.head_dim
    assert narrow * 4 * head_dim == wide * (head_dim + 4)
    stream = sf_jax.Stream(pipe)
    name = stream.join("a 7 moving left, fast", seed=1)
    stream.step()
    for compact in (False, True):
        stream.save(name, tmp_path / f"{compact}.stream", compact=compact)
    later = [stream.step()[name] for _ in range(3)]
    other = sf_jax.Stream(pipe)
    again = other.restore(tmp_path / "False.stream")
    for frames in later:
        np.testing.assert_array_equal(other.step()[again], frames)
    assert (tmp_path / "True.stream").stat().st_size < (tmp_path / "False.stream").stat().st_size
    other.leave(again)
    again = other.restore(tmp_path / "True.stream")
    close = other.step()[again].astype(int) - later[0]
    assert np.abs(close).mean() < 4
    other.prompt(again, "a 3 moving up, slowly", mode="flush")
    other.step()
    with pytest.raises(ValueError, match="was saved with cache_dtype 'int8': here it is None"):
        sf_jax.Stream(digits).restore(tmp_path / "False.stream")


def test_one_program_for_all_videos_and_no_wide_kernel_in_it():
    params, _ = quantized(random_params(), "int8")
    rollout = ro.RolloutConfig(steps=(1000, 500), context_noise="none")
    pipe = sf_jax.VideoPipeline(None, wan.WanTransformer(SMALL), params, rollout, cache_dtype="fp8")
    pipe = pipe.with_sampling(height=SIZE[0], width=SIZE[1], frames=9)
    text = np.ones((1, SMALL.text_len, SMALL.text_dim), np.float32)
    pipe(text, output="latent")
    size = programs.next_chunk._cache_size()
    pipe(text, output="latent", seed=1)
    assert programs.next_chunk._cache_size() == size
    model = pipe.transformer
    kv = jax.eval_shape(lambda: programs.encode_text(model, params, text))
    cache = jax.eval_shape(lambda: rollout_cache.empty_cache(model, rollout, 1, 9, *SIZE, dtype="fp8"))
    source, place = (jax.random.key(0), jnp.arange(1), 5), (jnp.int32(3), jnp.int32(1), jnp.bool_(False))
    arguments = (model, rollout, None, (3, *SIZE, SMALL.channels), params, kv, cache, source, place)
    entry = programs.next_chunk.lower(*arguments).compile().as_text().partition("ENTRY")[2]
    given = re.findall(r"= (\w+)\[([\d,]+)\]\S* parameter\(", entry)
    sizes = {
        ",".join(map(str, (SMALL.num_layers, *pair))) for pair in itertools.permutations((SMALL.dim, SMALL.ffn_dim))
    }
    assert {kind for kind, size in given if size in sizes} == {"s8"}
    assert sum(kind == "f8e4m3fn" for kind, _ in given) == 2


def test_weights_outside_the_gate_are_warned_of(folder, tmp_path):
    params = random_params(MODEL, 2)  # one large input channel leaves no bits for the others
    kernel = params["blocks"]["self_attn"]["q"]["kernel"]
    params["blocks"]["self_attn"]["q"]["kernel"] = kernel.at[1, 5].mul(100.0)
    save_file(transformer.to_official(params, MODEL), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="outside its quality gate: the weights of blocks.1.self_attn.q are off by 2"):
        pipe = load_pipeline(folder, tmp_path / "a.safetensors", vae="none", quantize="int8")
    assert pipe.quantization.layer == "blocks.1.self_attn.q"
    assert "; int8 weights (weights 2" in pipe.describe()
    assert not quantized(params, "fp8")[1].report().faults  # float8 has the range for it


def test_activations_outside_the_gate_are_warned_of(digits):
    config, params = digits.transformer.config, jax.tree.map(jnp.asarray, digits.params)
    narrow, quantizer = quantized(params, "int8", products=True)
    report = quantization.report(quantizer, config, narrow)
    assert 0.01 < report.products_error < 0.04 and "int8 products (weights" in report.describe()
    params["blocks"]["modulation"] = params["blocks"]["modulation"].at[:, :, 1, 7].add(10.0)
    narrow, quantizer = quantized(params, "int8", products=True)
    with pytest.warns(UserWarning, match="gate: activations in 8 bits put the flow off by .* .gate 5.00%.; the video"):
        quantization.report(quantizer, config, narrow)


def test_combinations_that_make_no_sense_are_refused(monkeypatch):
    assert refused(load_pipeline, quantize="int4") == "quantize is 'int4': it must be one of int8, fp8"
    assert "cache_dtype is 'e5m2': it must be one of bfloat16, float32, int8, fp8" in refused(
        load_pipeline, cache_dtype="e5m2"
    )
    assert "teacher is a bidirectional network and has no cache" in refused(
        load_pipeline, "teacher", cache_dtype="int8"
    )
    assert "cache_dtype has no effect without checkpoint" in refused(WanOptions, cache_dtype="int8")
    job = {"prompts": ("a cat",), "model": "folder", "solver": "unipc"}
    assert "cache_dtype has no effect here: it is for a causal network" in refused(Job, **job, cache_dtype="fp8")
    monkeypatch.setitem(sys.modules, "qwix", None)
    assert "8 bit needs qwix (qwix is missing): pip install 'sf_jax[eight_bit]'" in refused(
        load_pipeline, quantize="int8"
    )
    assert "8 bit needs qwix" in refused(load_pipeline, cache_dtype="int8")


def float8_file(params: dict, config: wan.WanConfig, path, scaled: bool) -> dict[str, np.ndarray]:
    """Writes a file with the blocks' matrices in float8; returns the tensors."""
    file = dict(transformer.to_official(params, config))
    for name, value in list(file.items()):
        if name.startswith("blocks.") and value.ndim == 2:
            scale = np.abs(value).max(axis=1, keepdims=True) / 448 if scaled else np.ones((1, 1), np.float32)
            file[name] = (value / scale).astype(E4M3)
            if scaled:
                file[name.replace(".weight", ".weight_scale")] = scale.astype(np.float32)
    save_file(file, path)
    return file


@pytest.mark.parametrize("scaled", [False, True])
def test_float8_files_stay_float8(scaled, folder, tmp_path):
    file = float8_file(random_params(MODEL, 2), MODEL, tmp_path / "a.safetensors", scaled)
    pipe = load_pipeline(folder, tmp_path / "a.safetensors", vae="none", quantize="fp8", scan_layers=True)
    kernel = pipe.params["blocks"]["ffn_in"]["kernel"]
    stored = np.stack([file[f"blocks.{i}.ffn.0.weight"] for i in range(2)])
    np.testing.assert_array_equal(np.asarray(kernel.values).view(np.uint8), stored.view(np.uint8))
    if scaled:
        scale = np.stack([file[f"blocks.{i}.ffn.0.weight_scale"] for i in range(2)])
        np.testing.assert_array_equal(kernel.scale, scale)
    assert pipe.quantization.error == 0.0
    # In bfloat16: the file's values times their scales, rounded once.
    _, params = load_network(tmp_path / "a.safetensors", "transformer", MODEL, "bfloat16", scaled=True)
    expected = (stored.astype(np.float32) * np.asarray(kernel.scale)).swapaxes(1, 2)
    np.testing.assert_array_equal(params["blocks"]["ffn_in"]["kernel"], expected.astype(ml_dtypes.bfloat16))
    if scaled:
        with pytest.raises(ValueError, match="holds scaled float8"):
            load_pipeline(folder, tmp_path / "a.safetensors", vae="none", quantize="int8")


@pytest.mark.parametrize("quantize, times", [("fp8", 1.25), (None, 2.45)])
def test_float8_files_are_loaded_without_a_wide_copy(quantize, times, tmp_path):
    """Peak host memory in units of the file size: in bfloat16 2, in float32 4; the largest leaf is a fifth."""
    config = dataclasses.replace(MODEL, dim=128, ffn_dim=1024, num_layers=6, text_dim=8, freq_dim=8)
    float8_file(random_params(config), config, tmp_path / "a.safetensors", scaled=True)
    size = (tmp_path / "a.safetensors").stat().st_size
    quantizer = weights.quantizer_for(quantize)
    arguments = (tmp_path / "a.safetensors", "transformer", config, "bfloat16")
    load_network(*arguments, scaled=True, quantizer=quantizer)  # warms up: tracing and imports do not count
    tracemalloc.start()
    try:
        _, params = load_network(*arguments, scaled=True, quantizer=quantizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < times * size, peak / size
    assert jax.tree.leaves(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(eight_bit.DTYPES, exhaustive=("fp8",)))
def test_digits_of_8_bits_are_judged_as_well(name, digits):
    from sf_jax.evaluation import judge as judging
    from sf_jax.evaluation import metrics

    judge, (prompts, _, targets) = judging.load(), metrics.choose_prompts(16)
    params, _ = quantized(digits.params, name, products=True)
    narrow = dataclasses.replace(digits, params=params, cache_dtype=name)
    scores = [metrics.correctness(judge(each(prompts)), targets)["joint"].mean() for each in (digits, narrow)]
    assert scores[1] > scores[0] - 0.03
