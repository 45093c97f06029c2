"""Hydra's own errors are one line that names the choices, with exit status 2."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    "given, parts",
    [
        ("method=h20", ["method=h20", "did you mean h2o?", "choose one of a2sf, buzz,"]),
        ("model=random", ["model=random", "choose one of hf, llama2_7b"]),
        ("+experiment=foo", ["experiment=foo", "choose one of demo, fidelity"]),
        ("method.windw=1", ["method.windw=1", "did you mean window?", "compact, history,"]),
        ("method=h2o method.window=1", ["method.window=1", "choose one of heavy, name, recent"]),
        ("task.nosuch=1", ["task.nosuch=1", "chat_template, depths"]),
        ("budgt=0.25", ["budgt=0.25", "did you mean budget?"]),
        ("sweep=pareto", ["sweep=pareto", "did you mean +sweep?"]),
        ("nosuch.foo=1", ["nosuch.foo=1", "there is no nosuch", "budget, budget_by"]),
        ("method", ["method", "write NAME=VALUE"]),
        ("task.lengths=[512", ["task.lengths=[512", "quote lists"]),
        ("output=${nosuch}", ["nosuch"]),
        ("-m method=buzz,h20", ["method=h20", "did you mean h2o?"]),
        ("-m method=buzz method.windw=1,2", ["method.windw=1", "did you mean window?"]),
    ],
)
def test_one_line(main, capsys, given, parts) -> None:
    assert main(*given.split(" ")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_hydra_in_full_when_asked(main, monkeypatch) -> None:
    from hydra.errors import MissingConfigException

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(MissingConfigException):
        main("method=h20")
