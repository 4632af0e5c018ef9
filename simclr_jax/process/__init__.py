"""The process around a run: console, errors, files, signals, and the other processes of the run."""
