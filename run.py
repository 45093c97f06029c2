"""Runs one configuration: `python run.py method=buzz task=needle budget=0.25`.

Several at a time, with one table in the end: `python run.py -m method=full,streaming_llm,h2o,buzz`.
"""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from buzz.errors import ConfigError
from evals.runner import RunFailed, run


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(cfg: DictConfig) -> str:
    overrides = (override.partition("=")[0] for override in HydraConfig.get().overrides.task)
    names = (name.lstrip("+").removeprefix("method.") for name in overrides if "method." in name)
    try:
        return str(run(cfg, fixed=names))
    except (ConfigError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
