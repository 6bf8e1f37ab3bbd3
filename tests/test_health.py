"""Warnings during training: drifting figures, skipped updates."""

import jax.numpy as jnp
import numpy as np

from sf_jax.training import health, metrics


def test_figures_that_drift_are_told_once():
    line = {"saturation": 0.01}
    history = [line] * 20 + [{"saturation": 0.01 * 1.1**k} for k in range(12)] + [{"saturation": 0.04}] * 20
    found = []
    for value in (0.045, 0.052, 0.055, 0.058, *[0.06] * 20):
        found += health.warnings(history, {"saturation": value})
        history.append({"saturation": value})
    assert len(found) == 1 and "saturation has drifted to" in found[0] and "it was 0.01 at first" in found[0]


def test_skipped_updates_are_warned_of(tmp_path, capsys):
    log = metrics.Log(tmp_path / "log.jsonl", 0, 4, 2, "test", skip=True)
    bad = {"critic_loss": jnp.float32(np.nan), "critic_finite": jnp.array(False)}
    for step in (1, 2):
        log.step(step, bad)
    log.close()
    assert "2 updates since the last line were not finite and were skipped" in capsys.readouterr().out
