"""What features are worth: how they are made of whole datasets, probes on them, and their health."""
