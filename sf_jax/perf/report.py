"""The report of `--compile_only`: what a program needs per chip, and which attention it uses."""

from collections.abc import Iterable, Iterator

from sf_jax.parallel.mesh import describe, videos_apart
from sf_jax.perf import generation
from sf_jax.perf.chips import Chip, chip_of
from sf_jax.perf.compile import Compiled, check_kernels, compile_call
from sf_jax.perf.devices import devices_of
from sf_jax.perf.generation import Generation
from sf_jax.perf.traffic import COPIES

GIB = 2**30
MOVERS = 8  # sources of memory traffic listed per program
_TITLES = ("program", "GiB a chip", "of", "TFLOP", "GB moved", "GB outside", "kernels", "roofline, ms", "estimate, ms")


def generation_report(what: Generation, target: str) -> Iterator[str]:
    """Compiles the programs of a generation, with a video per chip or per mesh, and reports what each chip needs.

    Args:
      what: the generation.
      target: such as "h100:1" or "v6e:2x2".

    Yields:
      Lines of text.

    Raises:
      ValueError: if the target is not available, or, after all lines, if an expected fused kernel is missing.
    """
    chip, mesh = chip_of(target), generation.device_mesh(what, list(devices_of(target)))
    spread = f"; mesh {describe(mesh)}, {videos_apart(mesh)} videos" if mesh.size > 1 else ""
    yield f"{target}: {_describe(what)}{spread}"
    yield f"| {' | '.join(_TITLES)} |"
    yield "|---" * len(_TITLES) + "|"
    rows = []
    for call in generation.calls(what, mesh, chip):
        rows.append(compile_call(call, mesh))
        yield _row(rows[-1], chip)
    for row in rows:
        yield from details(row)
    yield rates_of(chip)
    yield fits(rows, chip)
    yield from rates(what, rows, chip)
    check_kernels(rows)


def _row(row: Compiled, chip: Chip) -> str:
    moved = f"{row.flops / 1e12:.2f} | {row.traffic.memory / 1e9:.2f} | {row.traffic.outside / 1e9:.2f}"
    times = f"{1e3 * max(row.bounds(chip).values()):.2f} | {1e3 * row.estimate(chip):.2f}"
    memory = f"{row.memory / GIB:.2f} | {chip.memory / GIB:.0f}"
    return f"| {row.name} | {memory} | {moved} | {row.traffic.kernels:.0f} | {times} |"


def _describe(what: Generation) -> str:
    config, sampling = what.config, what.sampling
    layers = f"{config.num_layers} layers of {config.dim} channels, {config.dtype}"
    parts = [layers, f"{sampling.frames} frames of {sampling.height}x{sampling.width}"]
    if what.rollout is not None:
        window = f"window {what.rollout.window}, sink {what.rollout.sink}" if what.rollout.window else "no window"
        parts += [
            f"chunks of {what.rollout.chunk}, {window}: a full cache is {what.seen} + {what.rollout.chunk} frames"
        ]
    return "; ".join(parts)


def details(row: Compiled) -> Iterator[str]:
    """Details of a program: its attention, bytes by kind, and the largest traffic outside matmuls and attention."""
    moved = row.traffic
    memory = f"{row.arguments / GIB:.2f} GiB of arguments, {row.temporary / GIB:.2f} temporary"
    beside = f", {row.beside / GIB:.2f} stay beside it" if row.beside else ""
    yield f"{row.name}: {memory}{beside}; compiled in {row.seconds:.0f} s"
    for call, times in sorted(moved.attention.items(), key=lambda item: -item[1]):
        shapes = f", {call.shapes}" if call.shapes else ""
        yield f"  attention {call.implementation} in {call.place}{shapes}: {times:g} x"
    kinds = sorted(moved.kinds.items(), key=lambda item: -item[1])
    yield "  moves " + (", ".join(f"{amount(size)} {kind}" for kind, size in kinds) or "nothing")
    for mover in moved.movers[:MOVERS]:
        copies = f" ({COPIES})" if mover.kind == COPIES else ""
        yield f"    {amount(mover.bytes)} {mover.source}{copies}"
    if moved.links:
        yield "  sends " + ", ".join(f"{kind} {amount(size)}" for kind, size in sorted(moved.links.items()))
    if row.host:
        yield f"  reads {row.host / GIB:.2f} GiB a chip from the host, which the times leave out"


def amount(size: float) -> str:
    """Formats bytes as GB, or small numbers as MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3f} MB"


def rates_of(chip: Chip) -> str:
    """The rates on which the times are based."""
    origin = "as measured for large products" if chip.measured else "80.9 % of its peak, the H100's share: not measured"
    peaks = f"arithmetic at {chip.flops / 1e12:.0f} TFLOP/s (bfloat16), memory at {chip.bandwidth / 1e9:.0f} GB/s"
    return (
        f"roofline: the longest of {peaks}, links at {chip.links / 1e9:.0f} GB/s; estimate: arithmetic at "
        f"{chip.products / 1e12:.0f} TFLOP/s ({origin}), and all bytes, one after the other"
    )


def fits(rows: Iterable[Compiled], chip: Chip) -> str:
    """Whether all programs fit a chip's memory."""
    most = max(rows, key=lambda row: row.memory)
    verdict = "fits" if most.memory <= chip.memory else "does NOT fit"
    return f"memory of a chip: {chip.memory / GIB:.0f} GiB; {most.name} needs {most.memory / GIB:.2f} GiB: it {verdict}"


def rates(what: Generation, rows: Iterable[Compiled], chip: Chip) -> Iterator[str]:
    """Estimated frames per second of a few-step student at a full cache."""
    by_name = {row.name: row for row in rows}
    row = by_name.get(generation.CHUNK)
    if row is None:
        return
    frames, seconds = what.rollout.chunk * what.factors[0], row.estimate(chip)
    speed = f"{seconds:.3f} s for {frames} frames, {frames / seconds:.1f} FPS"
    yield f"estimate of a chunk at a full cache, decoder apart: {speed}"
    later = by_name.get(generation.LATER, by_name.get(generation.FIRST))
    if later is not None:
        both = seconds + what.rollout.chunk * later.estimate(chip)
        yield f"estimate with the decoder behind it: {both:.3f} s, {frames / both:.1f} FPS"
