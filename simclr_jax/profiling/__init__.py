"""The time of a step and how it is spent: traces, floating point operations, peaks of chips."""
