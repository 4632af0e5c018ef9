"""Loaders of examples, one in each file, that return a `source.Source` of a split."""
