"""Tests on the oldest and newest releases that pyproject.toml allows: make test-versions

For each Python and each resolution a virtual environment in .venvs/, with the built wheel and all
that the tests use; in it the tests of CORE, and README's own-code example away from the checkout,
so with the installed wheel alone. Rows land in results/versions.csv and, as a table, in README.md.

    python tests/tools/versions.py [3.10-oldest ...] [-- tests]   # `-- tests`: all instead of CORE
"""

from __future__ import annotations

import csv
import functools
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, TABLE = ROOT / "README.md", ROOT / "results" / "versions.csv"
BEGIN, END = "<!-- versions -->", "<!-- /versions -->"
VENVS = ROOT / ".venvs"
CELLS = {
    "3.10-oldest": ("3.10", "lowest-direct"),
    "3.10-newest": ("3.10", "highest"),
    "3.13-newest": ("3.13", "highest"),
}
EXTRAS = ("dev", "longbench", "ruler", "math")
# What meets these packages: caches in their models, kernels and Triton, data, sweeps, lm-eval.
CORE = [
    "tests/test_generate.py",
    "tests/test_models.py",
    "tests/test_kernels.py",
    "tests/test_aot.py",
    "tests/test_fake_card.py",
    "tests/test_compiled.py",
    "tests/test_forked.py",
    "tests/test_golden.py",
    "tests/test_evals_data.py",
    "tests/test_math.py",
    "tests/test_lm_eval.py",
    "tests/test_sweeps.py",
    "tests/test_requirements.py",
]
PACKAGES = ("torch", "transformers", "datasets", "lm-eval", "hydra-core")
COUNTS = ("passed", "failed", "skipped")
COLUMNS = ("python", "releases", *PACKAGES, *COUNTS, "example", "seconds", "note")
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# The example names the model on the hub; here it is the embedded one.
EXAMPLE = """
import functools, transformers
for name in ("AutoTokenizer", "AutoModelForCausalLM"):
    cls = getattr(transformers, name)
    load = functools.partial(cls.from_pretrained, {folder!r}, gguf_file={file!r})
    cls.from_pretrained = lambda name, load=load: load()
{code}
import baselines, buzz
for package in (baselines, buzz):
    assert not package.__file__.startswith({root!r}), package.__file__
from buzz.kernels import cpu
assert cpu.SOURCE.exists() and cpu.build().exists()
"""


def command(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], text=True, capture_output=True, **options)


def uv(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """uv, which lives in an environment of its own; Pythons of pyenv are found too."""
    binary = VENVS / "uv" / "bin"
    if not (binary / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", VENVS / "uv"], check=True)
        subprocess.run([binary / "python", "-m", "pip", "-qq", "install", "uv"], check=True)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    pythons = [str(path) for path in sorted(pyenv.glob("versions/*/bin"))]
    path = os.pathsep.join([*pythons, os.environ["PATH"]])
    env = {"UV_CACHE_DIR": str(VENVS / "cache"), **os.environ, "PATH": path}
    return command(binary / "uv", *words, env=env)


@functools.cache
def wheel() -> Path:
    """Built from this checkout."""
    out = VENVS / "wheel"
    for old in out.glob("*.whl"):
        old.unlink()
    done = uv("build", "--quiet", "--wheel", "--out-dir", out, ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    return next(out.glob("*.whl"))


def example(python: Path, where: Path) -> str:
    """README's own-code example with the installed wheel: passed, or how it failed."""
    code = re.search(r"## Your own code\n+```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    code = EXAMPLE.format(code=code, folder=str(GGUF.parent), file=GGUF.name, root=str(ROOT / "b"))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = command(python, "-c", code, cwd=where, env=env)
    return "failed: " + done.stderr.strip().splitlines()[-1] if done.returncode else "passed"


def cell(name: str, options: list[str]) -> dict[str, str]:
    """A row of the table."""
    version, resolution = CELLS[name]
    row = dict.fromkeys(COLUMNS, "") | {"python": version, "releases": name.partition("-")[2]}
    venv = VENVS / name
    python = venv / "bin" / "python"
    start = time.time()
    if uv("venv", "--quiet", "--allow-existing", "--python", version, venv).returncode:
        return row | {"note": f"not run: no Python {version}"}
    install = ("pip", "install", "--quiet", "--upgrade", "--python", python)
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    wanted = ("--resolution", resolution, "-r", ROOT / "pyproject.toml", *extras)
    for arguments in (wanted, ("--reinstall", "--no-deps", wheel())):
        if (done := uv(*install, *arguments)).returncode:
            print(done.stderr)
            return row | {"note": "does not install"}
    ask = "import sys; from importlib.metadata import version as v; print(*map(v, sys.argv[1:]))"
    versions = command(python, "-c", ask, *PACKAGES).stdout.split()
    print(f"{name}: {dict(zip(PACKAGES, versions, strict=True))}", flush=True)
    report = venv / "tests.xml"
    # Whether this table is of today cannot be asked while it is made.
    options = [
        "--continue-on-collection-errors",
        *(options or CORE),
        "--ignore=tests/test_versions.py",
        f"--junitxml={report}",
    ]
    subprocess.run([python, "-m", "pytest", "-q", *options], cwd=ROOT)
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    full = command(python, "-c", "import platform; print(platform.python_version())").stdout.strip()
    counts = map(str, (total - failed - skipped, failed, skipped))
    row |= dict(zip(PACKAGES, versions, strict=True)) | dict(zip(COUNTS, counts, strict=True))
    return row | {
        "python": full,
        "example": example(python, venv),
        "seconds": str(round(time.time() - start)),
    }


def read() -> list[dict[str, str]]:
    if not TABLE.exists():
        return []
    with open(TABLE, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def key(row: dict[str, str]) -> str:
    return f"{'.'.join(row['python'].split('.')[:2])}-{row['releases']}"


def save(row: dict[str, str]) -> None:
    """Puts a row in the place of an older one, or where its cell stands."""
    rows = {key(one): one for one in [*read(), row]}
    with open(TABLE, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in CELLS if name in rows)


def markdown(rows: list[dict[str, str]]) -> str:
    heads = ["Python", "releases", *PACKAGES, *COUNTS, "example"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        tested = [row["passed"] or row["note"], row["failed"], row["skipped"], row["example"]]
        lines.append([row["python"], row["releases"], *(row[name] for name in PACKAGES), *tested])
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def written(page: str) -> str:
    """The page with the table of now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown(read())}\n{END}{after}"


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:cut] or list(CELLS), arguments[cut + 1 :]
    if unknown := set(names) - set(CELLS):
        print(f"{', '.join(sorted(unknown))}: no such cell; there are {', '.join(CELLS)}")
        return 2
    fine = True
    for name in names:
        row = cell(name, options)
        save(row)
        PAGE.write_text(written(PAGE.read_text()))
        not_run = row["note"].startswith("not run")
        fine &= not_run or (row["failed"] == "0" and row["example"] == "passed")
    print(markdown(read()))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
