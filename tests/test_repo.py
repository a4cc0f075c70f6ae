"""House rules, and tables of READMEs against the logs they cite.   pytest tests/test_repo.py"""

import ast
import re
import statistics
from pathlib import Path

import ablate
import pytest
from common import markdown_table
from runlog import RunLog

from eval_sliding import EvalConfig
from train_gpt import Hyperparameters, knob_fields

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = {".venv", "logs"}
SOURCES = [p for p in ROOT.rglob("*.py") if not FOREIGN & set(p.relative_to(ROOT).parts)]
SHIPPED = [ROOT / "train_gpt.py", ROOT / "eval_sliding.py"]
STUDIES = ROOT / "records" / "track_non_record_16mb"
TOOLS = ROOT / "records" / "README.md"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# ---- Tables


def results_table(rows: list[tuple[str, Path]], readme: Path, nearest: bool = False) -> str:
    """Return the table of results of a README: a row per run, its name and its log."""
    header = ["run", "seed", "steps", "train s", "float"]
    header += ["nearest", "int6", "gap left"] if nearest else ["int6"]
    header += ["sliding", "model bytes", "log"]
    table = []
    for name, log in rows:
        run = RunLog.read(log)
        before, after = run.final("float").bpb, run.final("roundtrip").bpb
        cells = [name, run.seed, f"{run.steps:,}", f"{run.train_seconds:.0f}", f"{before:.4f}"]
        if nearest:
            (rounded,) = [row.bpb for row in run.finals if "round to nearest" in row.label]
            gap = (after - before) / (rounded - before)
            cells += [f"{rounded:.4f}", f"{after:.4f}", f"{gap:.0%}"]
        else:
            cells += [f"{after:.4f}"]
        link = f"[{log.name}]({log.relative_to(readme.parent)})"
        table.append([*cells, f"{run.score.bpb:.4f}", f"{run.bytes_model:,}", link])
    return markdown_table(header, table)


def test_the_results_in_the_main_readme_are_those_of_the_study():
    lines = read(STUDIES / "2026-11-26_EqualSeconds" / "README.md").splitlines()
    for cell in ("dense", "routed_32_16", "routed_32_8"):
        row = next(line for line in lines if line.startswith(f"| {cell} |"))
        assert f"\n{row}\n" in read(ROOT / "README.md")


@pytest.mark.parametrize(
    ("study", "seeds", "nearest"),
    [
        ("2026-11-22_CpuProfile", (1337, 42), False),
        ("2026-11-22_QuantizationStudy", (1337,), True),
    ],
)
def test_the_results_of_a_study_are_those_of_its_logs(study, seeds, nearest):
    readme = STUDIES / study / "README.md"
    rows = []
    for name, prefix in (("token-routed (zipf)", "zipf"), ("dense control", "dense")):
        rows += [(name, STUDIES / study / f"{prefix}_seed{seed}.txt") for seed in seeds]
    assert results_table(rows, readme, nearest) in read(readme)


def test_the_gains_and_audits_of_the_evaluation_study_are_those_of_its_logs():
    study = STUDIES / "2026-11-22_EvaluationStudy"
    text, rows, gains = read(study / "README.md"), [], []
    for seed in (1337, 42, 2025):
        runs = [RunLog.read(study / f"{kind}_seed{seed}.txt") for kind in ("sliding", "ttt")]
        before, after = (run.json_events["eval_summary"]["val_bpb"] for run in runs)
        gains.append(before - after)
        kinds = {"sliding": "sliding", "TTT": "ttt", "training": "train"}
        links = ", ".join(f"[{shown}]({kind}_seed{seed}.txt)" for shown, kind in kinds.items())
        rows.append([seed, f"{before:.4f}", f"{after:.4f}", f"{gains[-1]:.4f}", links])
    assert markdown_table(["seed", "sliding", "TTT", "gain", "logs"], rows) in text
    mean, std = statistics.mean(gains), statistics.stdev(gains)
    assert f"Mean gain {mean:.4f}, standard deviation {std:.4f}, n = 3." in text
    assert f"| score-first test-time training | -{mean:.4f}, " in read(TOOLS)
    for name in ("audit_sliding", "audit_ttt"):
        audit = RunLog.read(study / f"{name}.txt").audit.strip()
        assert audit in text
        assert all(line.endswith("| pass |") for line in audit.splitlines()[2:])


def test_the_gain_of_the_n_gram_memory_in_the_readmes_is_that_of_its_logs():
    summaries = []
    for path in sorted((STUDIES / "2026-11-26_NGram").glob("small_seed?.txt")):
        summaries.append(RunLog.read(path).json_events["eval_summary"])
    assert len(summaries) == 3
    off = statistics.mean(summary["val_bpb"] for summary in summaries)
    on = statistics.mean(summary["ngram"]["val_bpb"] for summary in summaries)
    assert f"three such dense models from {off:.4f} to {on:.4f},\nsliding" in read(
        ROOT / "README.md"
    )
    assert f"text scored before | {on - off:+.4f}, at this size only" in read(TOOLS)
    assert f"from {off:.4f} to {on:.4f} (n = 3)" in read(STUDIES / "2026-11-26_NGram" / "README.md")


@pytest.mark.parametrize(
    ("study", "folder"),
    [
        ("2026-11-23_RoutingStudy", "."),
        ("2026-11-26_EqualSeconds", "."),
        ("2026-11-26_EqualSeconds", "pilot"),
        ("2026-11-26_LowBitExperts", "."),
        ("2026-11-26_LosslessCase", "sp1024"),
        ("2026-11-26_LosslessCase", "sp8192"),
    ],
)
def test_the_table_of_an_ablation_is_what_its_logs_give(study, folder):
    readme = read(STUDIES / study / "README.md")
    study = STUDIES / study / folder
    base, lines = ablate.read_lines(study / "grid.txt")
    cells = []
    for name, (_, own) in lines.items():
        logs = ablate.files_of(study, ablate.Cell(name, "", "off", {}))
        knobs = [ablate.events_of(log)["ablation"]["knobs"] for log in logs.values()]
        solved = "off" if name == next(iter(lines)) else own.get("SOLVE", "SHARED_DIM")
        others = ("SCRIPT", "SOLVE", "DATA_PATH", "TOKENIZER_PATH", solved)
        asked = {k: v for k, v in (base | own).items() if k not in others}
        assert knobs, name
        assert all(asked.items() <= seed.items() for seed in knobs), name
        cells.append(ablate.Cell(name, "", solved, knobs[0]))
    rows = ablate.compare(study, cells)
    assert ablate.table(rows).strip() in readme
    assert not any(row.note for row in rows)
    deltas = {row.cell.name: f"{row.delta:+.4f}" for row in rows[1:]}
    quoted = re.findall(r"`(\w+)` ([+-]\d\.\d{4})", read(TOOLS))
    assert len(quoted) >= 8
    assert [(cell, delta) for cell, delta in quoted if deltas.get(cell, delta) != delta] == []


CODEC_TABLES = sorted(STUDIES.rglob("codec_table.txt"))


@pytest.mark.parametrize("path", CODEC_TABLES, ids=lambda p: p.parent.name)
def test_a_codec_table_in_a_readme_is_what_the_tool_printed(path):
    assert read(path).strip() in read(path.parent / "README.md")


def test_the_packed_script_alone_repeated_a_log_of_its_folder():
    folder = STUDIES / "2026-11-24_CpuProfile"
    first = RunLog.read(folder / "train_seed42.log")
    again = RunLog.read(folder / "repeated" / "seed42.txt")
    losses = [(row.step, row.loss) for row in first.train]
    assert [(row.step, row.loss) for row in again.train] == losses
    assert again.score.bpb == first.score.bpb
    assert again.bytes_total == first.bytes_total
    assert again.code_hashes == first.code_hashes


# ---- House rules


LIMITS = {  # lines as the formatter writes them; what is new has to find its room
    "train_gpt.py": 2750,
    "eval_sliding.py": 797,
    "README.md": 170,
    "records/README.md": 97,
    "records/*.py records/*.sh": 2700,
    "data/*.py": 950,
    "tests/*.py": 8000,
}


@pytest.mark.parametrize("patterns", LIMITS)
def test_the_repository_stays_small(patterns):
    files = [path for pattern in patterns.split() for path in ROOT.glob(pattern)]
    assert files
    assert sum(len(read(path).splitlines()) for path in files) <= LIMITS[patterns]


READ_ENVIRONMENT = ("main", "from_torchrun", "log_start")  # and no other function


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_no_function_of_the_scripts_is_long(path):
    for function in functions_of(path):
        limit = 150 if function.name == "train" else 80
        assert function.end_lineno - function.lineno < limit, function.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_is_ascii_and_free_of_globals_and_getattr_defaults(path):
    tree = ast.parse(path.read_bytes().decode("ascii"))
    assert not any(isinstance(n, ast.Global) for n in ast.walk(tree))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not [n.lineno for n in calls if n.func.id == "getattr" and len(n.args) > 2]


def test_eval_sliding_has_no_model_of_its_own_and_the_environment_is_read_in_main():
    for node in ast.walk(ast.parse(read(ROOT / "eval_sliding.py"))):
        if isinstance(node, ast.ClassDef):
            assert "Module" not in ast.unparse(node)
    for path in SHIPPED:
        for function in functions_of(path):
            reads = "os.environ" in ast.unparse(function)
            assert not reads or function.name in READ_ENVIRONMENT, function.name


def test_every_knob_is_read_somewhere_and_there_are_few():
    knobs = [*knob_fields(Hyperparameters), *knob_fields(EvalConfig)]
    text = "\n".join(read(path) for path in SHIPPED)
    assert len(knobs) <= 68
    assert [name for name in knobs if not re.search(rf"\.{name}\b", text)] == []


def test_the_launcher_sets_only_knobs():
    names = re.findall(r"(?:^\s+|[;)] )default ([A-Z_]+) ", read(ROOT / "run_8xh100.sh"), re.M)
    knobs = knob_fields(Hyperparameters) | knob_fields(EvalConfig)
    assert len(names) > 20
    assert set(names) - {name.upper() for name in knobs} - {"PROFILE", "RUN_ID"} == set()
