"""What a command is refused with: one line that names field, value and remedy; exit status 2."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from runs import MODEL, NEEDLE, ROOT, read

import evals.run.runner
from buzz import POLICIES
from evals.results.environment import package_version
from evals.run import checkpoints

ONCE = [name for name, policy in POLICIES.items() if policy.evicts == "prompt"]


@pytest.mark.parametrize(
    "given, parts",
    [
        ("method=h20", ["method=h20", "did you mean h2o?", "choose one of a2sf, buzz,"]),
        ("model=random", ["model=random", "hf, llama2_7b,", "choose one of"]),
        ("+experiment=foo", ["experiment=foo", "choose one of bench, demo, fidelity"]),
        ("method.windw=1", ["method.windw=1", "did you mean window?", "compact, history,"]),
        ("method=h2o method.window=1", ["method.window=1", "choose one of heavy, name, recent"]),
        ("+method.x=1", ["method.x=1: no such setting", "choose one of compact, history,"]),
        ("method=full +method.x=1", ["method.x=1: no such setting; there is none"]),
        ("method=h2o method.name=h20", ["method.name='h20'", "choose one of buzz,"]),
        ("task.nosuch=1", ["task.nosuch=1", "chat_template, depths"]),
        ("budgt=0.25", ["budgt=0.25", "did you mean budget?"]),
        ("sweep=pareto", ["sweep=pareto", "did you mean +sweep?"]),
        ("nosuch.foo=1", ["nosuch.foo=1", "there is no nosuch", "budget, budget_by"]),
        ("method", ["method", "write NAME=VALUE"]),
        ("task.lengths=[512", ["task.lengths=[512", "quote lists"]),
        ("output=${nosuch}", ["nosuch"]),
        ("-m method=buzz,h20", ["method=h20", "did you mean h2o?"]),
        ("-m method=buzz method.windw=1,2", ["method.windw=1", "did you mean window?"]),
        (
            "-m method=h2o,buzz,tova method.stride=3",
            ["method.stride=3: h2o, tova have no stride; set it with method=buzz alone"],
        ),
        ("-m method=h2o,vatp method.recent=3", ["default method has no recent; write ++method."]),
        ("-m method=glob(b*) method.windw=3", ["method.windw=3", "did you mean window?"]),
        ("-m method=h2o,tova method.stride=3", ["of method; choose one of heavy, name, recent"]),
        ("method=buzz,h2o", ["method=buzz,h2o", "write -m method=buzz,h2o"]),
        ("budget=0.1,0.5", ["write -m budget=0.1,0.5", "one list write 'budget=[0.1,0.5]'"]),
        ("+launcher=nosuch", ["launcher=nosuch", "choose one of joblib"]),
        ("+model.hiden_size=32", ["model.hiden_size=32", "no such setting", "dtype"]),
        ("+budgets=0.5", ["budgets=0.5", "no such setting", "budget, budget_by"]),
        ("+cache.base=2", ["cache.base=2", "no such setting"]),
        ("+method.windw=2", ["method.windw=2", "no such setting", "threshold, window"]),
        ("+task.length=2", ["task.length=2", "no such setting", "lengths, "]),
        ("+nothing.token=2", ["nothing={'token': 2}: no such setting", "budget, budget_by,"]),
        ("task.needles=3", ["task.needles=3", "task.variant=multikey"]),
        ("compress_chunk=64", ["compress_chunk=64", "compress=stream"]),
        ("compress=context compress_chunk=64", ["compress_chunk=64", "compress=stream"]),
        ("budget_by=mean", ["budget_by='mean'", "give budget"]),
        ("method=snapkv compress=stream", ["method.name='snapkv'", "write compress=context"]),
    ],
)
def test_errors_of_hydra_are_one_line_with_the_choices(refusal, given, parts) -> None:
    line = refusal(*given.split(" "))
    for part in parts:
        assert part in line


ORIGINAL = "protocol=original|model.max_length=4096|task.data_file=none|"
SEVERAL = "task.lengths=[900] task.variant=multikey task.questions=2"
STREAM = "compress=stream budget=0.25 compress_chunk=100"
ROOM = "task=throughput task.lengths=[100] task.max_new_tokens=8 task.batch_size=max"
BAD = {
    "method.stride=0": "method.stride=0",
    "method.window=-3": "method.window=-3",
    "method.window=2000": "method.window=2000: larger than the model's 1024 tokens",
    "method=h2o method.recent=few": "method.recent='few'",
    "+method.honey=1": "method.honey=1: no such setting",
    "method=stock": "method.name='stock'",
    "budget=0": "budget=0",
    "budget=1.5": "budget=1.5",
    "budget=-0.2": "budget=-0.2",
    "budget=some": "budget='some'",
    "budget=5000": "budget=5000",
    "budget=5": "budget=5: leaves",
    "method=streaming_llm budget=4": "budget=4: leaves",
    "budget=100 budget_by=average": "budget_by='average': ",
    "method=h2o budget=100 method.heavy=90 method.recent=90": "holds 180 and not 100",
    "budget=100 method.compact=once method.window=40": "after a prompt of 4",
    "budget=0.25 method.compact=once task.lengths=[900]": "after a prompt of ",
    "task.samples=0": "task.samples=0",
    "task.batch_size=0": "task.batch_size=0",
    "task.max_new_tokens=0": "task.max_new_tokens=0",
    "task.max_new_tokens=null": "task.max_new_tokens=None",
    "task.max_new_tokens=4000": "task.max_new_tokens=4000",
    "task.lengths=[2000]": "model.max_length=1024",
    "task.lengths=[]": "task.lengths=[]",
    "task.depths=[101]": "task.depths=101",
    "task.depths=[deep]": "task.depths='deep'",
    "task.repeats=0": "task.repeats=0",
    "task.variant=many": "task.variant='many'",
    "task.needles=1": "task.needles=1",
    "task.needles=11": "task.needles=11",
    "seed=x": "seed='x'",
    "time_samples=-1": "time_samples=-1",
    "label=a/b": "label='a/b'",
    "kl=maybe": "kl='maybe': input should be a valid boolean; write true or false",
    "task=xsum task.data_file=/tmp": "task.data_file='/tmp': is a folder; give a JSON-lines file",
    "model.dtype=float8": "model.dtype='float8'",
    "protocol=original budget=0.5": "budget=0.5: protocol=original",
    "cache.logn_base=0.5": "cache.logn_base=0.5",
    "cache.logn_clamp=true": "cache.logn_clamp=True: bounds the scale",
    **{f"cache.positions={v}": "cache.positions=" for v in ("false", "null", "1", "rope", "''")},
    "cache.positions=[cache]": "cache.positions=['cache']",
    "~cache.positions": "cache.positions=None: is missing",
    "cache.granularity=pages": "cache.granularity='pages': choose token",
    "cache.granularity=16": "cache.granularity=16",
    "cache.granularity=page:1024": "a page exceeds the budget of 564 entries",
    "cache.granularity=page:64 budget=60": "a page exceeds the budget of 60 entries",
    "cache.granularity=page:64 budget=200": "buzz needs more pages than a budget of 200",
    "cache.page_score=max": "cache.page_score='max': is of pages",
    "cache.heads=none": "cache.heads='none': choose each, layer or all",
    "cache.dtype=int8": "cache.dtype='int8': keys that are turned",
    "cache.dtype=int4 cache.positions=true": "cache.dtype='int4': choose int8, or null",
    "cache.dtype=int8 cache.positions=true task=throughput method=stock": "cache.dtype='int8'",
    "cache.heads=all method=pyramid_kv": "cache.heads='all': layers of pyramid_kv",
    **{f"task.shard='{v}'": f"task.shard='{v}'" for v in ("8/8", "1", "a/b", "-1/8", "0/0")},
    "task.shard=98/99": "fewer samples than shards",
    "output=/proc/none": "output='/proc/none",
    "output=/dev/null/runs": "output='/dev/null/runs",
    "-m output=/dev/null/runs": "output='/dev/null/runs",
    "task=xsum task.data_file=none.jsonl": "task.data_file='none.jsonl'",
    "task=xsum task.data_file=none.jsonl task.words=0": "task.words=0",
    "task=xsum task.headline=bleu": "task.headline='bleu': choose one of rouge1",
    "task=nq10": "task.data_file=None",
    "task=qa": "task.data_file=None: give a JSON-lines file of context, question and answers",
    "task=qa task.data_file=none.jsonl": "task.data_file='none.jsonl'",
    "task=nq10 task.data_file=none.jsonl": "task.data_file='none.jsonl'",
    "task=wikitext task.data_file=none.txt": "task.data_file='none.txt'",
    "task=wikitext task.chunk=0": "task.chunk=0",
    "task=wikitext task.tokens=10": "task.tokens=10",
    "task=wikitext task.batch_size=2": "task.batch_size=2",
    f"task=wikitext task.data_file={__file__} method=full": "task.tokens=4096: full would hold",
    "task=suite task.tasks=[honey]": "task.tasks='honey': choose among",
    "task=suite task.tasks=[]": "task.tasks=[]",
    "task=longbench task.data_dir=none": "task.data_dir='none'",
    "task=longbench task.subsets=[honey]": "task.subsets='honey': choose among",
    "task=ruler task.lengths=[16384]": "model.max_length=1024: too short for prompts of 16384",
    # What has no effect, and limits that say nothing
    "task=throughput method=stock cache.logn_base=512": "cache.logn_base=512",
    "task=throughput task.hold=true": "task.hold=True",
    "task=throughput task.paired=true task.batch_size=2": "task.batch_size=2",
    ROOM: "task.kv_limit=None",
    f"{ROOM} task.kv_limit=8Mo": "no size",
    f"{ROOM} task.kv_limit=1MB task.lengths=[50,100]": "task.lengths",
    f"{ROOM} task.kv_limit=1MB task.batch_size=2": "task.batch_size=2",
    # Contexts before their question, and several questions on one
    "compress=never": "compress='never'",
    "compress=stream compress_chunk=0": "compress_chunk=0",
    "compress=context task=wikitext task.data_file=README.md": "asks nothing",
    "compress=context task=throughput task.lengths=[100]": "no question",
    **{f"{STREAM} method={name}": f"method.name='{name}': " for name in ONCE},
    SEVERAL: "compress='prompt'",
    "task.questions=2 compress=context": "task.questions=2",
    "task=ruler task.lengths=[900] task.questions=2 compress=context": "has one question",
    "task.variant=multikey task.questions=9 compress=context": "task.questions=9",
    f"{SEVERAL} task.batch_size=2 compress=context": "one by one",
    f"{SEVERAL} task.asked=twice": "task.asked='twice'",
    f"{SEVERAL} task.asked=conversation compress=context kl=true": "task.asked='conversation'",
    # The original's prompts
    ORIGINAL + "task=xsum|task.prompt=TLDR": "='TLDR': must have {article}, may have {words}",
    ORIGINAL + "task=xsum|task.prompt='{article} {number}'": "and nothing else in braces",
    ORIGINAL + "task=xsum|task.prompt='{article} {'": "write {{ or }} for a brace",
    ORIGINAL + "task=xsum|task.prompt='{article!r}'": "nothing else in braces",
    ORIGINAL + "task=self_bleu|task.words=0": "task.words=0",
    ORIGINAL + "task=self_bleu|task.headline=bleu": "='bleu': choose one of rouge1",
    ORIGINAL + "task=nq10|task.prompt='{documents}'": "must have {documents}, {question}, may have",
    ORIGINAL + "task=nq10|task.document='{title}'": "task.document='{title}': must have {text}",
    ORIGINAL + "task=nq10|task.instruction=Answer.": "task.prompt has no {instruction}",
    ORIGINAL + "task=wikitext|task.rows=0": "task.rows=0",
    ORIGINAL + "task=wikitext|task.tokens=512": "task.tokens=512: task.rows are read whole",
    ORIGINAL + "task=wikitext|task.samples=2": "task.samples=2: task.rows are one sample",
}


@pytest.mark.parametrize("given", BAD)
def test_bad_input_is_one_line_before_a_model_is_loaded(refusal, given) -> None:
    if "longbench" in given or "ruler" in given:
        for package in ("jieba", "lm_eval", "wonderwords"):
            pytest.importorskip(package)
    task = [] if "task=" in given else NEEDLE
    assert BAD[given] in refusal(*MODEL, *task, *given.split("|" if "|" in given else " "))


@pytest.mark.parametrize("choice", ["method", "task", "model", "logger", "protocol"])
def test_an_unknown_choice_lists_the_choices(refusal, choice) -> None:
    error = refusal(f"{choice}=honey")
    for path in (ROOT / "configs" / choice).glob("*.yaml"):
        assert path.stem in error


def test_hydra_in_full_when_asked(main, monkeypatch) -> None:
    from hydra.errors import MissingConfigException

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(MissingConfigException):
        main("method=h20")


@pytest.mark.parametrize(
    ("given", "package"),
    [
        ("+launcher=joblib", "hydra-joblib-launcher"),
        ("+launcher=ray", "hydra-ray-launcher"),
        ("+sweep=optuna", "hydra-optuna-sweeper"),
    ],
)
def test_an_extra_that_is_missing_is_named(refusal, given: str, package: str) -> None:
    if package_version(package):
        pytest.skip("it is installed")
    extra = f"pip install -e '.[{given.partition('=')[2]}]'"
    assert extra in refusal(given, "method=full", "-m")


@pytest.mark.parametrize("name", ["daté", "a (1)", "lr=0.1", "it's", 'so "said"', "a,b", "{x}"])
def test_what_must_be_quoted_can_be_copied_from_the_message(refusal, name: str) -> None:
    line = refusal("task=xsum", f"task.data_file=data/{name}.jsonl")
    (given,) = shlex.split(line.rpartition("write ")[2])
    assert OverridesParser.create().parse_override(given).value() == f"data/{name}.jsonl"


def test_a_path_may_start_at_home(refusal, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    said = refusal("task=xsum", "task.data_file=~/nosuch.jsonl")
    assert f"task.data_file='{tmp_path}/nosuch.jsonl'" in said
    refusal("output=~/runs", "method=nosuch")
    refusal(*MODEL, *NEEDLE, "output=~/runs", "method=full", "budget=full")
    assert (tmp_path / "runs").is_dir() and not Path("~").exists()


def test_a_device_that_is_not_there(refusal) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    assert "device='cuda': there is no CUDA device" in refusal(*MODEL, *NEEDLE, "device=cuda")


def test_single_values_stand_for_lists(main) -> None:
    task = ["task.depths=50", "task.repeats=1", "task.max_new_tokens=2"]
    for lengths in ("300", "[300]"):
        assert main(*MODEL, "method=full", f"task.lengths={lengths}", *task) == 0
    (file,) = main.runs.glob("needle-*/full.jsonl")  # the same run
    assert [record["id"] for record in read(file)] == ["300-50-0"]


@pytest.mark.parametrize(("budget", "remark"), [("25", True), ("0.25", False), ("120", False)])
def test_entries_that_look_like_percent(main, capsys, budget: str, remark: bool) -> None:
    assert main(*MODEL, *NEEDLE, "method=streaming_llm", f"budget={budget}") == 0
    said = capsys.readouterr().err
    assert ("budget=0.25 is 25 % of it" in said) == remark
    assert ("budget=25 is 25 entries" in said) == remark


def test_a_model_that_cannot_be_had_is_named_once(main, capsys, monkeypatch) -> None:
    asked = []

    def unreachable(name: str, **options: object) -> None:
        asked.append(name)
        raise OSError("no route to the hub")

    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", unreachable)
    jobs = "method=full,h2o,tova", "task.repeats=1,2"
    assert main("-m", "model=hf", "model.name_or_path=some/model", *jobs) == 2
    said = capsys.readouterr().out.splitlines()
    named = [line for line in said if "some/model" in line]
    assert len(named) == 1 and "and 5 more" in named[0] and "no route" in named[0]
    assert len(asked) == 1


@pytest.mark.parametrize(("budgets", "status"), [("1.5,-1", 2), ("1.5,64", 0)])
def test_a_sweep_of_wrong_input_alone_exits_as_a_run_does(main, budgets: str, status: int) -> None:
    small = "task.lengths=[300]", "task.depths=[50]", "task.repeats=1", "task.max_new_tokens=2"
    assert main("-m", *MODEL, *small, "method=h2o", f"budget={budgets}") == status


def test_a_failed_sample_shows_its_traceback_when_asked(main, capsys, monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("here it broke")

    monkeypatch.setattr(evals.run.runner, "generate", broken)
    assert main(*MODEL, *NEEDLE, "method=h2o") == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(*MODEL, *NEEDLE, "method=tova") == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in broken" in said


def test_a_process_that_no_run_started_knows_the_methods() -> None:
    """As workers of launchers, which may import no more than what they unpickle."""
    code = """
from hydra import compose, initialize_config_dir
from evals import CONFIGS
from evals.launch import messages
with initialize_config_dir(str(CONFIGS), version_base=None):
    print(compose("config", ["method=tova"]).method)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "{'name': 'tova', 'size': 512}\n", done.stderr
