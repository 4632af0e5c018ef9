"""Where examples come from: a file each, which makes a `datasets.Source` or `Stream` of a split."""
