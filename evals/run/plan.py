"""A configuration, checked and built, before any model is loaded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from baselines import FullPolicy
from buzz import POLICIES, Budget, Policy
from buzz.compiled import check_policy as check_compiled
from buzz.errors import ConfigError
from buzz.granularity import constrained
from buzz.policy import parameters
from evals.results.folder import REFERENCE, digest, row_name
from evals.results.record import Setting
from evals.run.config import check_config
from evals.run.loggers import Logger
from evals.run.models import (
    check_model,
    complete_model,
    device_of,
    model_digest,
    rope_by_length,
)
from evals.tasks.base import Task
from evals.tasks.build import build, check_fields, construct, with_lists

NOT_OF_STREAMS = (
    "evicts once, after its first step, so that a stream's other chunks all stay; write"
    " compress=context, or take another method"
)


@dataclass(frozen=True, kw_only=True)
class StockPolicy(FullPolicy):
    """Transformers' own cache on the model's own attention, for `task=throughput` alone.

    It grows with every token; compiled, it has room for all of them from the start.
    """

    name: ClassVar[str] = "stock"


ONLY_TIMED = {StockPolicy.name: StockPolicy}  # methods of task=throughput alone

OF_SETTING = ("task", "model", "model_digest", "rope_by_length")
# Defaults of a cache's options, and of the constraints on its method.
USUAL: dict[str, Any] = {
    "positions": "cache",
    "logn_base": None,
    "logn_clamp": False,
    "dtype": None,
}
UNCONSTRAINED: dict[str, Any] = {"granularity": "token", "page_score": "mean", "heads": "each"}
VERSION = 3  # of settings; raise it when a default changes, so that earlier folders stay apart


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
    def of(cls, cfg: DictConfig, fixed: Iterable[str] = (), like: Plan | None = None) -> Plan:
        """Builds and checks a configuration.

        Args:
            like: a plan of the same setting, whose task, data and model are used for this one, too.

        Raises:
            ConfigError: a setting in `cfg` cannot be served.
        """
        try:
            config: Any = OmegaConf.to_container(cfg, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError("config", error.full_key, str(error).splitlines()[0]) from error
        check_config(config)
        config["task"] = with_lists(config["task"])
        if config["model"].get("compile") is False:  # what runs had before it could be said
            del config["model"]["compile"]
        size = config["budget"]
        plan = cls(
            policy=policy_of("method", config["method"]),
            task=like.task if like else build("task", config["task"], Task),
            logger=like.logger if like else build("logger", config["logger"], Logger),
            budget=None if size is None else Budget(size, config["budget_by"]),
            fixed=frozenset(fixed),
            config=config,
        )
        config["task_version"] = plan.task.version
        # Without a budget no parameter changes, so it does not matter who set it.
        own = {field.name for field in dataclasses.fields(plan.policy)} if plan.fits else set()
        config["fixed"] = sorted(own & plan.fixed)
        if like is None:
            complete_model(config["model"])
            check_model(config["model"])
            config["model_digest"] = model_digest(config["model"])
            config["rope_by_length"] = rope_by_length(config["model"])
            plan.task.check()
            plan.logger.check()
            device_of(config["device"])
        else:
            config |= {name: like.config[name] for name in OF_SETTING}
        plan._check()
        if like is None:
            plan.task.prepare()
        return plan

    @property
    def label(self) -> str:
        """The method, or what an experiment calls this variant of it."""
        return self.config["label"] or self.config["method"]["name"]

    @property
    def row(self) -> str:
        """The row's name within its setting: of its file, and in tables."""
        defaults = {field.name: field.default for field in dataclasses.fields(self.policy)}
        own: dict[str, Any] = {}
        if self.config["label"] is None:
            values = parameters(self.policy)
            own = {name: value for name, value in values.items() if value != defaults[name]}
            if same := [name for name in self.config["fixed"] if name not in own]:
                own["fixed"] = "+".join(same)
        usual = USUAL | UNCONSTRAINED
        cache = self.config["cache"]
        if self.policy.evicts == "never":  # these options change nothing
            cache = cache | {"positions": "cache"} | UNCONSTRAINED
        own |= {name: cache[name] for name in usual if cache[name] != usual[name]}
        if "granularity" in own:
            own["granularity"] = own["granularity"].replace(":", "")  # it names a file
        own |= self.variant
        budget = self.config["budget"] if self.fits else None
        return row_name(self.label, budget, self.config["budget_by"], own)

    @property
    def variant(self) -> dict[str, Any]:
        """Settings that tell rows of a timed task apart; in other tasks they make two settings."""
        if not self.task.timed:
            return {}
        known = {"compile": self.config["model"].get("compile")}
        known |= {name: self.config["task"].get(name) for name in self.task.of_rows}
        return {name: value for name, value in known.items() if value}

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of a record that say which row it is of."""
        return {
            "row": self.row,
            "method": self.config["method"]["name"],
            "label": self.label,
            "parameters": parameters(self.policy),
            "budget": self.config["budget"] if self.fits else None,
            "budget_by": self.config["budget_by"] if self.fits else None,
            "fixed": self.config["fixed"],
            "cache": self.config["cache"] | self.variant,
        }

    def reference(self) -> Plan:
        """The plan of the full cache under the same setting.

        Raises:
            ConfigError: it cannot be served, e.g. as it would outgrow the model's positions.
        """
        config = self.config | {
            "method": {"name": REFERENCE},
            "label": None,
            "budget": None,
            "fixed": [],
            "cache": USUAL | UNCONSTRAINED,
        }
        config |= {"task": self._shared("task"), "model": self._shared("model")}
        task = dataclasses.replace(
            self.task, **{name: config["task"][name] for name in self.task.of_rows}
        )
        policy = policy_of("method", config["method"])
        full = dataclasses.replace(
            self, policy=policy, task=task, budget=None, fixed=frozenset(), config=config
        )
        full._check()
        return full

    def _shared(self, section: str) -> dict[str, Any]:
        """The task's or the model's settings, without those that tell timed rows apart."""
        usual, variant = _defaults(type(self.task)), self.variant
        return {
            name: usual[name] if name in variant else value
            for name, value in self.config[section].items()
            if name != "compile" or not self.task.timed
        }

    def _check(self) -> None:
        check_fields("method", self.policy)
        policy = self._constrained()
        if self.budget is None:
            policy.next_length(1, 0)  # raises if pages are too large for its sizes
        if self.policy.name in ONLY_TIMED and not self.task.timed:
            remedy = "is for task=throughput alone; write method=full"
            raise ConfigError("method.name", self.policy.name, remedy)
        for name, does in (("logn_base", "scales nothing"), ("dtype", "holds the model's type")):
            if self.policy.name in ONLY_TIMED and (value := self.config["cache"][name]):
                remedy = f"transformers' own cache {does}; leave it out"
                raise ConfigError(f"cache.{name}", value, remedy)
        if self.config["compress"] == "stream" and self.policy.evicts == "prompt":
            raise ConfigError("method.name", self.config["method"]["name"], NOT_OF_STREAMS)
        self._check_rope()
        if self.cache_options["compiled"] and self.policy.name not in ONLY_TIMED:
            check_compiled(self.policy)
        context, task = self.config["model"]["max_length"], self.task
        answer = task.max_new_tokens or 0
        if self.config["prefill_chunk"] and (task.timed or task.mode == "read"):
            own = "task.prefill_chunk" if task.timed else "task.chunk"
            chunk = self.config["prefill_chunk"]
            raise ConfigError("prefill_chunk", chunk, f"{task.name} has its own; write {own}")
        if task.conversation and self.config["kl"]:
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
        self._check_budget(longest)
        if task.mode == "read":
            if self.config["compress"] != "prompt":
                remedy = f"{task.name} asks nothing of the texts that it reads; leave it out"
                raise ConfigError("compress", self.config["compress"], remedy)
            if task.tokens is not None:
                self.check_reading(task.tokens)

    def _check_rope(self) -> None:
        """Refuses settings under which an answer depends on other texts than its prompt."""
        kind = self.config["rope_by_length"]
        if kind is None:
            return
        several = f"the model's RoPE ({kind}) depends on the longest text that it has read"
        if self.task.batch_size != 1:
            remedy = f"{several}, also in a batch; write 1"
            raise ConfigError("task.batch_size", self.task.batch_size, remedy)
        if chunk := self.config["prefill_chunk"]:
            raise ConfigError("prefill_chunk", chunk, f"{several}, even a chunk; leave it out")
        if self.config["kl"]:
            raise ConfigError("kl", True, f"{several}, with any cache of a pass; leave it out")
        questions = getattr(self.task, "questions", 1)
        if questions > 1 and kind != "longrope":  # which goes by the text at hand
            raise ConfigError("task.questions", questions, f"{several}; write 1")

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
        """Refuses a text that is so long that the cache outgrows the model's positions."""
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

    def doubts(self, prompt_tokens: int) -> str | None:
        """A remark if a budget in entries looks like one in percent, else None."""
        size = self.budget and self.budget.size
        if not isinstance(size, int) or size > 100 or prompt_tokens < 10 * size:
            return None
        fraction = f"; budget={size / 100:g} is {size} % of it" if size < 100 else ""
        share = f"{size / prompt_tokens:.1%} of a prompt of {prompt_tokens:,} tokens"
        return f"budget={size} is {size} entries, {share}{fraction}"

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
            return self._constrained(), None
        return self.budget.policy(self._constrained(), prompt_tokens, self.fixed)

    def _constrained(self) -> Policy:
        """The method under the constraints on pages and heads, if there are any."""
        return constrained(
            self.policy, **{name: self.config["cache"][name] for name in UNCONSTRAINED}
        )

    @property
    def cache_options(self) -> dict[str, Any]:
        """The options of the method's cache, see :class:`buzz.EvictionCache`."""
        own = {name: self.config["cache"][name] for name in USUAL}
        return {**own, "compiled": bool(self.config["model"].get("compile"))}

    @property
    def setting(self) -> Setting:
        """What all rows of the folder share."""
        task = self.task
        return {
            "version": VERSION,
            "task": self._shared("task") | {"shard": None},
            "task_version": task.version,
            "model": self._shared("model"),
            "model_digest": self.config["model_digest"],
            "seed": self.config["seed"],
            "compress": self.config["compress"],
            "compress_chunk": self.config["compress_chunk"],
            "metric": {
                "headline": task.headline,
                "statistic": task.statistic,
                "higher_is_better": task.higher_is_better,
                "grouped_by": task.grouped_by,
            },
        }

    @property
    def folder(self) -> Path:
        """Named by what rows must share for their scores to be compared.

        The hash covers what differs from the defaults, so that a setting that is new to the code
        changes no folder's name. It covers the device only for timed tasks: elsewhere answers
        differ between devices by no more than rounding.
        """
        shared, task = self.setting, self.setting["task"]
        usual = _defaults(type(self.task)) | {"shard": None, "name": task["name"]}
        names = ("version", "task_version", "model", "model_digest", "seed")
        known: dict[str, Any] = {name: shared[name] for name in names}
        known["task"] = {k: v for k, v in task.items() if k not in usual or usual[k] != v}
        if self.config["compress"] != "prompt":
            known["compress"] = self.config["compress"]
        if self.config["compress"] == "stream":
            known["compress_chunk"] = self.config["compress_chunk"]
        if self.task.timed:
            known["device"] = self.config["device"]
        name = f"{task['name']}-{shared['model']['name']}-{digest(known)}"
        return Path(self.config["output"]) / name


def _defaults(kind: type[Task]) -> dict[str, Any]:
    """A task's settings that have a default, as plain data."""
    values = ((field.name, field.default) for field in dataclasses.fields(kind))
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values
        if value is not dataclasses.MISSING
    }


def reading_steps(tokens: int, chunk: int) -> list[int]:
    """Tokens fed by each step of reading a text: its last token is not fed."""
    whole, rest = divmod(tokens - 1, chunk)
    return [chunk] * whole + [rest] * bool(rest)


def expand(cfg: DictConfig) -> list[DictConfig]:
    """One configuration per task; a suite (configs/task/suite.yaml) names several tasks.

    Raises:
        ConfigError: the suite has no settings for a task, or names none.
    """
    if "settings" not in cfg.task:
        return [cfg]
    names = cfg.task.tasks
    if isinstance(names, str):
        names = OmegaConf.create([names])
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


# Hydra's configuration of a method is its dataclass.
for _name, _method in (POLICIES | ONLY_TIMED).items():
    _node = {"name": _name, **dataclasses.asdict(_method())}
    ConfigStore.instance().store(_name, _node, group="method")


def policy_of(section: str, method: dict[str, Any]) -> Policy:
    """The policy that a section asks for by its name and parameters.

    Raises:
        ConfigError: no method has this name, or it has no such parameter, or refuses its value.
    """
    found = (POLICIES | ONLY_TIMED).get(name := method.get("name"))
    if found is None:
        raise ConfigError(f"{section}.name", name, f"choose one of {', '.join(POLICIES)}")
    return construct(section, found, {k: v for k, v in method.items() if k != "name"})
