"""The folder of a run: its lock, its records, its metrics, and the trackers that follow it."""
