"""Loaders of examples, a file each; every one returns a `source.Source` of a split."""
