"""One file per dataset: `get_config(task)` returns every key that is read. base.py tells what they mean."""
