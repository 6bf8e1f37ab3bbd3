"""`python -m sf_jax COMMAND ...`, the same as the console script `sf-jax`."""

from sf_jax.cli import main

main()
