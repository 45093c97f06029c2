"""A configuration, checked and built, before any model is loaded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import baselines  # noqa: F401  (registers its methods)
from buzz import POLICIES, Budget, Policy
from buzz.compiled import check_policy as check_compiled
from buzz.errors import ConfigError
from evals.results.compare import REFERENCE
from evals.results.reading import find_references, nearest_reference, put_together
from evals.results.records import digest
from evals.results.runs import Run, comparable, reference
from evals.run.config import check_config
from evals.run.forced import reading_steps
from evals.run.logger import Logger
from evals.run.models import check_model, complete_model, model_digest
from evals.tasks.base import Task
from evals.tasks.build import build, check_fields


@dataclass(frozen=True)
class Plan:
    """A configuration, checked and built, before any model is loaded.

    Attributes:
        fixed: the method's parameters that a budget must leave alone.
        config: the resolved configuration as plain data.
    """

    policy: Policy
    task: Task
    logger: Logger
    budget: Budget | None
    fixed: frozenset[str]
    config: dict[str, Any]

    @classmethod
    def of(cls, cfg: DictConfig, fixed: Iterable[str] = ()) -> Plan:
        """Builds and checks what `cfg` asks for.

        Raises:
            ConfigError: something in `cfg` cannot be served.
        """
        config = _plain(cfg)
        config["method"] = with_class("method", config["method"])
        if config["model"].get("compile") is False:  # what runs had before it could be said
            del config["model"]["compile"]
        plan = cls(
            policy=policy_of("method", config["method"]),
            task=build("task", config["task"], Task),
            logger=build("logger", config["logger"], Logger),
            budget=_budget(config),
            fixed=frozenset(fixed),
            config=config,
        )
        config["task_version"] = plan.task.version
        # Without a budget all parameters are as set, by whomever.
        own = {field.name for field in dataclasses.fields(plan.policy)} if plan.fits else set()
        config["fixed"] = sorted(own & plan.fixed)
        complete_model(config["model"])
        check_model(config["model"])
        config["model_digest"] = model_digest(config["model"])
        plan._check()
        return plan

    @property
    def label(self) -> str:
        """The method, and what tells this run from others of a sweep."""
        own = dataclasses.asdict(self.policy)
        given = {name: value for name, value in own.items() if name in self.fixed}
        given |= {name: self.config[name] for name in ("budget", "compress", "seed")}
        given |= self.config["cache"]
        usual = {"compress": "prompt", "seed": 0, "positions": "cache"}
        if not self.fits:
            del given["budget"]
        said = [f"{k}={v}" for k, v in given.items() if v not in (usual.get(k), None, False)]
        return " ".join([self.config["method"]["name"], *said])

    def _check(self) -> None:
        check_fields("method", self.policy)
        self.task.check()
        self.logger.check()
        if self.cache_options["compiled"]:
            check_compiled(self.policy)
        context, task = self.config["model"]["max_length"], self.task
        answer = task.max_new_tokens or 0
        if task.conversation and (self.config["kl"] or "fidelity" in self.config):
            remedy = "later answers depend on earlier ones; compare with task.asked=copies"
            raise ConfigError("task.asked", "conversation", remedy)
        if answer >= context:
            raise ConfigError(
                "task.max_new_tokens", answer, f"must leave room in the model's {context} tokens"
            )
        if (longest := task.longest_prompt()) + answer > context:
            raise ConfigError(
                "model.max_length",
                context,
                f"too short for prompts of {longest} tokens and {answer} of answer;"
                " shorten the prompts or take another model",
            )
        for field in dataclasses.fields(self.policy):
            value = getattr(self.policy, field.name)
            if isinstance(value, int) and value > context:
                raise ConfigError(
                    f"method.{field.name}", value, f"larger than the model's {context} tokens"
                )
        if self.compares:
            full, unreadable = self.reference()
            if full is None:
                beside = unreadable or nearest_reference(self.config, self._others())
                raise ConfigError(
                    "kl",
                    True,
                    f"needs the {REFERENCE} run of the same task, model and seed in"
                    f" {self.folder.parent}; run method={REFERENCE} first"
                    + "".join(f" ({one})" for one in beside[:1]),
                )
        self._check_budget(longest)
        if task.mode == "read":
            if self.config["compress"] != "prompt":
                remedy = f"{task.name} asks nothing of the texts that it reads; leave it out"
                raise ConfigError("compress", self.config["compress"], remedy)
            if task.tokens is not None:
                self.check_reading(task.tokens)
        task.prepare()

    def _check_budget(self, longest: int) -> None:
        if self.budget is None:
            return
        context, size = self.config["model"]["max_length"], self.budget.size
        if not self.config["protocol"]["budgets"]:
            name = self.config["protocol"]["name"]
            raise ConfigError("budget", size, f"protocol={name} has sizes of its own; leave it out")
        if size > context:
            raise ConfigError("budget", size, f"larger than the model's {context} tokens")
        if longest or isinstance(size, int):
            self.fit(longest)

    def check_reading(self, tokens: int) -> None:
        """Refuses a text during which the cache outgrows the model's positions."""
        policy, _ = self.fit(tokens)
        most = max(policy.lengths(reading_steps(tokens, self.task.chunk)))
        context = self.config["model"]["max_length"]
        if self.config["cache"]["positions"] == "true" and tokens > context:
            raise ConfigError(
                "task.tokens",
                tokens,
                f"at cache.positions=true a text ends at the model's {context} tokens; read less",
            )
        if most > context:
            raise ConfigError(
                "task.tokens",
                tokens,
                f"{policy.name} would hold {most} entries, more than the model's"
                f" {context} tokens; read less, or give it a budget",
            )

    @property
    def compares(self) -> bool:
        """Whether answers are compared with the full cache's, token by token."""
        of_full = self.config["method"]["name"] == REFERENCE
        return self.config["kl"] and not of_full and self.task.mode == "answer"

    def reference(self) -> tuple[Run | None, list[str]]:
        """The finished full-cache run of the same setting, and what beside it cannot be read.

        Of several that of the same shard, then that of the same device.
        """
        found, unreadable = find_references(self.setting, self._others())
        if self.config["method"]["name"] == REFERENCE and not self.config["cache"]["logn_base"]:
            return None, unreadable
        shard, device = self.config["task"].get("shard"), self.config["device"]
        candidates = [run for run in found if run.shard == shard]
        candidates += [run for run in put_together(found) if not run.shard]

        def apart(run: Run) -> tuple[bool, bool]:
            return run.shard != shard, run.config.get("device") != device

        return reference(self.setting, candidates, apart), unreadable

    def _others(self) -> list[Path]:
        return [path for path in self.folder.parent.glob("*/") if path != self.folder]

    @property
    def fits(self) -> bool:
        """Whether there is a budget, for a method that evicts."""
        return self.budget is not None and self.policy.evicts != "never"

    def fit(self, prompt_tokens: int) -> tuple[Policy, int | None]:
        """The policy for a prompt of this length, and the entries that it may hold.

        Raises:
            ConfigError: the method cannot meet the budget.
        """
        if self.budget is None:
            return self.policy, None
        return self.budget.policy(self.policy, prompt_tokens, self.fixed)

    @property
    def cache_options(self) -> dict[str, Any]:
        """Of the method's cache, whether it answers, reads a text, or is compared."""
        return {**self.config["cache"], "compiled": bool(self.config["model"].get("compile"))}

    @property
    def setting(self) -> str:
        """What runs must share for their scores to be compared, as a hash."""
        return comparable(self.config)

    @property
    def folder(self) -> Path:
        """Named by what determines the result."""
        method, task, model = (self.config[key] for key in ("method", "task", "model"))
        result = {
            "setting": self.setting,
            "shard": task.get("shard"),
            "device": self.config["device"],
            "method": method,
            "cache": self.config["cache"],
            "budget": [self.config["budget"], self.config["budget_by"], self.config["fixed"]]
            if self.fits
            else None,
        }
        name = f"{task['name']}-{method['name']}-{model['name']}-{digest(result)}"
        return Path(self.config["output"]) / name


def expand(cfg: DictConfig) -> list[DictConfig]:
    """One configuration per task: of a suite (configs/task/suite.yaml) those that it names.

    Raises:
        ConfigError: the suite has no settings for a task, or names none.
    """
    if "settings" not in cfg.task:
        return [cfg]
    names = cfg.task.tasks
    if not OmegaConf.is_list(names) or not names:
        raise ConfigError("task.tasks", names, "give a list, e.g. [needle,xsum]")
    single = []
    for name in names:
        if name not in cfg.task.settings:
            raise ConfigError("task.tasks", name, f"choose among {', '.join(cfg.task.settings)}")
        one = copy.deepcopy(cfg)
        with open_dict(one):
            one.task = cfg.task.settings[name]
        single.append(one)
    return single


def with_class(section: str, method: dict[str, Any]) -> dict[str, Any]:
    """A method's section with its class, which is the one of its name unless it says another.

    Raises:
        ConfigError: no method has this name.
    """
    if "_target_" in method:
        return method
    found = POLICIES.get(name := method.get("name"))
    if found is None:
        raise ConfigError(f"{section}.name", name, f"choose one of {', '.join(POLICIES)}")
    return {"_target_": f"{found.__module__.partition('.')[0]}.{found.__name__}"} | method


def policy_of(section: str, method: dict[str, Any]) -> Policy:
    """The policy that a section's settings are of.

    Raises:
        ConfigError: they are of none.
    """
    config = {k: v for k, v in with_class(section, method).items() if k != "name"}
    return build(section, config, Policy)


def _budget(config: dict[str, Any]) -> Budget | None:
    if config["budget"] is None:
        return None
    return Budget(config["budget"], config["budget_by"])


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain data, with all that every one has."""
    try:
        config: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError("config", error.full_key, str(error).splitlines()[0]) from error
    check_config(config)
    return config
