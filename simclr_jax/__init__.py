"""SimCLR v1 and v2 in JAX and Flax, from one laptop to a TPU pod."""
