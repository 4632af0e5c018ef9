"""One file per dataset. `get_config(task)` returns every key that a run reads; see base.py for what they mean."""
