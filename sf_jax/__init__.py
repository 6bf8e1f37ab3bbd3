"""Self Forcing (arXiv 2506.08009) in JAX and Flax: train and stream causal, few-step video diffusion models."""

__version__ = "0.1.0"
