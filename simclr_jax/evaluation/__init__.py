"""Features of whole datasets, the probes and figures that judge them, and what is found by them."""
