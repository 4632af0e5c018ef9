"""The tasks: `config.task` names a module, whose `run(config, workdir)` returns the run's summary."""
