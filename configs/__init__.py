"""One file for each dataset: `get_config(task)` returns every key that is read; base.py explains them."""
