"""Turns Hydra's errors, which fill a screen, into one line that names the choices."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from evals import CONFIGS

QUOTED = re.compile(r"'([^']*)'")
HOME = re.compile(r"=([\"']?)~(?=/)")
# Names in configs/launcher and configs/sweep, and the extras that install what they need.
EXTRAS = {
    "hydra/launcher=joblib": "joblib",
    "hydra/launcher=ray": "ray",
    "hydra/launcher=submitit_slurm": "slurm",
    "hydra/launcher=submitit_local": "slurm",
    "hydra/sweeper=optuna": "optuna",
}


def in_one_line(error: Exception, overrides: Sequence[str] = ()) -> str:
    """What was wrong with a command line, and what could stand there.

    Args:
        error: Hydra's, or OmegaConf's.
        overrides: the command line's.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options or [] if "/" not in option]
        if extra := EXTRAS.get(f"{group}={name}"):
            return f"{group}={name}: is not installed: pip install -e '.[{extra}]'"
        return f"{group or 'config'}={name}: {_choices(name, options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {_first_line(error)}; write {_quoted(error.override)}"
    if isinstance(error, ConfigCompositionException):
        if str(error).startswith("Ambiguous value"):
            wrong = QUOTED.search(str(error))[1]
            name, _, values = wrong.partition("=")
            if (CONFIGS / name).is_dir():
                one = ""
            elif re.fullmatch(r"[\d., ]*", values):
                one = f"; for one list write '{name}=[{values}]'"
            else:
                one = f"; for one value write {_quoted(wrong)}"
            return f"{wrong}: several values are several runs: write -m {wrong}{one}"
        named = QUOTED.search(str(error))
        wrong = next((one for one in overrides if named and _key(one) == named[1]), None)
        if named and wrong:
            return f"{wrong}: {_unknown(named[1], overrides)}"
    return _first_line(error)


def _quoted(override: str) -> str:
    """What to write for an override that Hydra cannot read, such as a path with brackets."""
    name, given, value = override.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    fixed = f'{name}="{escaped}"'
    try:
        OverridesParser.create().parse_override(fixed)
    except OverrideParseException:
        given = ""
    if not given or value.startswith(("[", "{")):
        return "NAME=VALUE, and quote lists: 'task.lengths=[512,1024]'"
    return shlex.quote(fixed)


def _unknown(key: str, overrides: Sequence[str]) -> str:
    """What may stand where `key` does not exist."""
    above, _, name = key.rpartition(".")
    others = [one for one in overrides if _key(one) != key]
    config = _composed(others)
    if choices := _swept(above, others):
        rest = [one for one in others if _key(one) != above]
        each = {one: _composed([*rest, f"{above}={one}"]) for one in choices}
        having = [one for one in choices if name in each[one].get(above, {})]
        lacking = [one for one in choices if one not in having]
        if not lacking:  # Hydra looks for it in the default choice, too
            return f"the default {above} has no {name}; write ++{key}=..."
        if having:
            has = "has" if len(lacking) == 1 else "have"
            alone = f"set it with {above}={','.join(having)} alone, or use variants"
            return f"{', '.join(lacking)} {has} no {name}; {alone}"
        config = each[lacking[0]]
    section = OmegaConf.select(config, above) if above else config
    if above and not isinstance(section, DictConfig):
        return f"there is no {above}; {_choices(above, [str(name) for name in config])}"
    known = [str(name) for name in section if name != "_target_"]
    if not above:
        known += [
            f"+{group.name}"
            for group in CONFIGS.iterdir()
            if group.name not in known and group.is_dir()
        ]
    return f"no such setting{f' of {above}' if above else ''}; {_choices(name, known)}"


def _swept(group: str, overrides: Iterable[str]) -> list[str]:
    """The choices of a group among which a sweep goes."""
    for one in overrides:
        if _key(one) == group:
            found = OverridesParser.create().parse_override(one)
            if isinstance(found.value(), ChoiceSweep):
                return list(found.sweep_string_iterator())
    return []


def _composed(overrides: Iterable[str]) -> DictConfig:
    """The configuration without the wrong override; of the others as many as can be composed."""
    plain = [one for one in overrides if not one.startswith("hydra") and "," not in one]
    groups = [one for one in plain if "." not in _key(one) and not one.startswith("~")]
    for tried in (plain, groups, []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONFIGS), version_base=None):
                return compose("config", overrides=list(tried))
        except Exception:  # another override is wrong, too
            continue
    return OmegaConf.create()


def _choices(name: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}choose one of {', '.join(sorted(options))}" if options else "there is none"


def _key(override: str) -> str:
    try:
        return str(OverridesParser.create().parse_override(override).key_or_group)
    except OverrideParseException:
        return override.partition("=")[0].lstrip("+~")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def arguments_of(given: Sequence[str]) -> list[str]:
    """A command line with `-m` in front, where Hydra wants it, and `~/` written out."""
    several = [one for one in given if one in ("-m", "--multirun")]
    others = [one for one in given if one not in several]
    home = os.path.expanduser("~")
    return [*several[:1], *(HOME.sub(lambda found: f"={found[1]}{home}", one) for one in others)]


def report(error: Exception) -> None:
    overrides = [one for one in sys.argv[1:] if not one.startswith("-")]
    print(f"error: {in_one_line(error, overrides)}", file=sys.stderr)
