"""The configuration of a run: closed data (run.py, model.py), read from YAML (load.py)."""

from medisee.config.load import config_from, dump_config, load_config
from medisee.config.run import Config, Data, Eval, Loss, Source, Train

__all__ = ["Config", "Data", "Eval", "Loss", "Source", "Train", "config_from", "dump_config", "load_config"]
