"""Configs: made from a file of configs/ and changes of its keys, checked, explained by `--help`."""
