"""Where the time of a step goes: traces, floating point operations, peaks of chips."""
