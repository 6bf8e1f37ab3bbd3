"""Fading: a new prompt reduces the values of old frames, once, in every kind of cache."""

import dataclasses

import jax
import numpy as np
import pytest

import sf_jax
from sf_jax.models import wan
from sf_jax.models.eight_bit import Scaled
from sf_jax.models.slots import unstack_layers
from tests.helpers import SMALL, random_params
from tests.test_stream import BARE, text


@pytest.mark.parametrize("apart, cache_dtype", [(False, None), (True, None), (False, "int8")])
def test_old_values_fade_to_a_share_of_what_was_written(apart, cache_dtype):
    config = dataclasses.replace(SMALL, scan_layers=not apart)
    params = unstack_layers(random_params()) if apart else random_params()
    model = wan.WanTransformer(config)
    pipe = sf_jax.VideoPipeline(None, model, params, BARE, cache_dtype=cache_dtype).with_sampling(height=4, width=4)
    stream = sf_jax.Stream(pipe, slots=2)
    one, other = stream.join(text(0)), stream.join(text(1))

    def read():
        """What attention reads of each stream: keys, then values."""
        fields = (stream.state.k, stream.state.v)
        wide = jax.tree.map(lambda a: a.astype("float32"), fields, is_leaf=lambda a: isinstance(a, Scaled))
        axis = 0 if apart else 1

        def of(slot, field):
            return np.stack([np.asarray(a).take(slot, axis) for a in jax.tree.leaves(field)])

        return [[of(stream._playing[name].slot, field) for field in wide] for name in (one, other)]

    def change(seed, *arguments, **options):
        """Ratio of a stream's values after and before the changes of its next chunk, which change nothing else."""
        if seed is not None:
            stream.prompt(one, text(seed), *arguments, **options)
        (k, v), unchanged = read()
        stream._prepare(stream._playing[one])
        (new_k, new_v), others = read()
        np.testing.assert_array_equal(new_k, k)
        np.testing.assert_array_equal(others, unchanged)
        written = np.abs(v) > 1e-3
        return sorted({round(float(ratio), 4) for ratio in (new_v[written] / v[written]).ravel()})

    for _ in range(3):
        stream.step()
    assert change(2, transition_chunks=1, fade=0.4) == [1.0]  # the new prompt has half its weight
    assert change(None)[0] == 0.6 and change(None) == [1.0]
    assert change(3, fade=0.4) == [1.0]  # they have faded
    stream.step()  # two new frames, two of the sink and no others: the window is 6
    assert set(change(4, fade=0.4)) == {0.6, 1.0}
    assert change(5, fade=0.7)[0] == 0.5
    np.testing.assert_allclose(stream.state.value_scale[stream._playing[one].slot], 0.3, rtol=1e-6)
    np.testing.assert_array_equal(stream.state.value_scale[stream._playing[other].slot], 1)
    stream.prompt(one, text(6), "flush")
    np.testing.assert_allclose(stream.state.value_scale[stream._playing[one].slot][:3], 0.3, rtol=1e-6)
    stream.prompt(one, text(6), "recache")
    stream.step()
    np.testing.assert_array_equal(stream.state.value_scale, 1)
