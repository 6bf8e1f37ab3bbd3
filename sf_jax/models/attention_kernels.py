"""Fused attention kernels: cuDNN on GPUs, Splash on TPUs. Call them through `attention.attend`."""

import importlib.util
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sf_jax.models.partition import attention_axes, compute_capability, mesh_axes
from sf_jax.models.tiled_attention import RESIDUALS

if importlib.util.find_spec("libtpu") is not None:
    # Only where there may be a TPU, as it is slow. Importing it in the middle of a trace makes JAX trace once more.
    import jax.experimental.pallas.ops.tpu.splash_attention

LANES = 128
CAPABILITY = 8.0  # of the oldest GPUs that cuDNN's attention supports
# Splash's block size for keys and values, and the largest for queries.
BLOCK = 512


def can_cudnn(q: jax.Array, segments: Sequence[tuple]) -> bool:
    """Whether cuDNN's kernel supports this call: 16-bit types, heads of at most 128, key counts instead of masks.

    The GPU must be of NVIDIA, with a compute capability of at least 8.0.
    """
    counted = sum(mask is not None for _, _, mask in segments)
    masked = any(mask is not None and mask.ndim for _, _, mask in segments)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] <= LANES and q.shape[-1] % 8 == 0 and counted <= 1 and not masked and _has_cudnn()


def _has_cudnn() -> bool:
    """Whether cuDNN's attention runs on the device being compiled for, Ampere or newer; assumes so of absent ones."""
    if jax.default_backend() != "gpu":
        return True
    attached, target = jax.local_devices()[0], jax.sharding.get_abstract_mesh().abstract_device
    absent = target is not None and target.device_kind != attached.device_kind
    return absent or compute_capability(attached) >= CAPABILITY


def cudnn(q: jax.Array, segments: Sequence[tuple], split: str = "heads", implementation: str = "cudnn") -> jax.Array:
    """Attention by `jax.nn.dot_product_attention`; arguments as in `attention.attend`.

    The segment with a key count comes last, so that the kernel takes the number of keys as a length and reads no more.
    """
    segments = sorted(segments, key=lambda segment: segment[2] is not None)
    k, v = (jnp.concatenate([segment[i] for segment in segments], axis=1) for i in (0, 1))
    count = segments[-1][2]
    if count is not None:
        count = sum(k.shape[1] for k, _, _ in segments[:-1]) + jnp.asarray(count, jnp.int32)

    def local(q, k, v, count=None):
        length, keys = q.shape[1], k.shape[1]
        count = keys if count is None and keys % 2 else count
        # The kernel's gradient supports only even lengths: pads a single register token or an odd share of a frame.
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = {}
        if count is not None:
            counts = {"query_seq_lengths": q.shape[1], "key_value_seq_lengths": count}
            lengths = {name: _per_row(value, q) for name, value in counts.items()}
        return jax.nn.dot_product_attention(q, k, v, **lengths, implementation=implementation)[:, :length]

    return _on_shares(local, split, q, k, v, *(() if count is None else (count,)))


def _per_row(value, q):
    """int32 [B], the same value for each row of `q`; XLA removes the choice.

    JAX's cuDNN attention (0.10) accepts under `vmap` only lengths that are batched like `q`, which a constant is not.
    """
    value = jnp.asarray(value, jnp.int32)
    return jnp.where(q[:, 0, 0, 0] > 0, value, value)


def splash_attention(
    q: jax.Array,
    segments: Sequence[tuple],
    split: str = "heads",
    most: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention by the Splash kernel; arguments as in `attention.attend`.

    Lengths are padded to the kernel's blocks and heads to its 128 lanes. Padded and masked keys get a different segment
    id from the queries, which hides them. Blocks behind `most` are skipped.
    """
    k, v = (jnp.concatenate([segment[i] for segment in segments], axis=1) for i in (0, 1))
    hidden = jnp.concatenate([_hidden(k.shape[1], mask) for k, _, mask in segments])

    def local(q, k, v, hidden, most=None):
        return _splash_local(q, k, v, hidden, most, interpret)

    return _on_shares(local, split, q, k, v, hidden, *(() if most is None else (most,)))


def _on_shares(kernel, split, q, k, v, *whole):
    """Runs a kernel on every device's shard, as `attention.attend` splits it; `whole` is replicated.

    XLA cannot partition these kernels: Splash not at all, cuDNN only if all three arrays are split alike.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, *whole)
    batch, (tokens, heads) = mesh_axes("batch", q.shape[0]), attention_axes(split, *q.shape[1:3])
    own, keys = PartitionSpec(batch, tokens, heads, None), PartitionSpec(batch, None, heads, None)
    specs = (own, keys, keys, *(PartitionSpec(),) * len(whole))
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)(q, k, v, *whole)


def _hidden(length, mask):
    """int32 [length]: 1 for hidden keys."""
    if mask is None:
        return jnp.zeros(length, jnp.int32)
    visible = mask if mask.ndim else jnp.arange(length) < mask
    return 1 - visible.astype(jnp.int32)


def _splash_local(q, k, v, hidden, most, interpret):
    # Imported here because Pallas is slow to import; see the top of this file.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    batch, length, heads, dim = q.shape
    block = min(BLOCK, -(-length // LANES) * LANES)
    rows, columns = -length % block, -k.shape[1] % BLOCK
    q, k, v = (_padded(x, n) for x, n in ((q * dim**-0.5, rows), (k, columns), (v, columns)))
    ids = splash.SegmentIds(jnp.zeros(length + rows, jnp.int32), jnp.pad(hidden, (0, columns), constant_values=1))
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((q.shape[2], k.shape[2]))] * heads)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=BLOCK,
        block_q_dkv=block,
        block_kv_dkv=BLOCK,
        block_kv_dkv_compute=BLOCK,
        block_q_dq=block,
        block_kv_dq=BLOCK,
    )
    kernel = splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=blocks,
        interpret=interpret,
        residual_checkpoint_name=RESIDUALS,
    )
    if most is not None:
        reads = _blocks_before(most, q.shape[2] // block, k.shape[2] // BLOCK)
        reads = kernel.fwd_mask_info._replace(**reads)
        kernel = splash.SplashAttentionKernel(reads, kernel.dq_mask_info, kernel.dkv_mask_info, **kernel.kwargs)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, ids)
    return out[:, :, :length, :dim].transpose(0, 2, 1, 3)


def _blocks_before(count, rows, columns):
    """Fields of Splash's `MaskInfo` for which it reads only the blocks of the first `count` keys."""
    last = (jnp.asarray(count, jnp.int32) - 1) // BLOCK
    blocks = jnp.arange(columns)
    # a block that is not read keeps the index of the last one, so that nothing is fetched; 2 is a block without mask
    fields = {"data_next": jnp.minimum(blocks, last), "block_mask": jnp.where(blocks <= last, 2, 0)}
    small = jnp.int8 if columns <= 128 else jnp.int16
    return {name: jnp.broadcast_to(a.astype(small), (1, rows, columns)) for name, a in fields.items()}


def _padded(x, tokens):
    """[B, T, N, D] to [B, N, T + tokens, D'], where D' is a multiple of the lanes."""
    x = x.transpose(0, 2, 1, 3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, tokens), (0, -x.shape[-1] % LANES)))
