"""What `config.task` names: each module's `run(config, workdir)` returns the run's summary."""
