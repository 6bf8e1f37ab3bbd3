"""The training system: state, update programs, sharding, checkpoints, loop."""
