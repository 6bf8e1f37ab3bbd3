"""The flow-matching noise schedule and the solvers that integrate it."""
