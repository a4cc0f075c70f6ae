"""House rules, and numbers in READMEs against the logs they cite.   python -m pytest tests/test_repo.py"""

import ast
import math
import re
import statistics
from dataclasses import fields
from pathlib import Path

import ablate
import pytest
import runlog
from ablate import events_of

import train_gpt

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for p in ROOT.rglob("*.py") if not {".venv", "logs"} & set(p.relative_to(ROOT).parts)]
SHIPPED = [ROOT / "train_gpt.py", ROOT / "eval_sliding.py"]
MAIN = ROOT / "README.md"
READMES = [MAIN, *sorted((ROOT / "records").rglob("README.md"))]


def table_rows(readme: Path) -> list[dict[str, str]]:
    """Rows of the tables of a README that have a column named `log`, by column name."""
    rows, columns = [], None
    for line in readme.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif "log" in columns and not set(line) <= set("|-: "):
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def mismatches(readme: Path) -> list[str]:
    """Figures in the tables of a README that are not those of the log named in their row."""
    wrong = []
    for row in table_rows(readme):
        log = readme.parent / re.search(r"\(([^)]+)\)", row["log"])[1]
        events, text = events_of(log), log.read_text(encoding="utf-8")
        train = events["train_summary"]
        before = re.search(
            r"^pre-quantization \S+ (val|PARTIAL)_loss:\S+ \w+_bpb:(\S+)", text, re.MULTILINE
        )
        nearest = re.search(
            r"^quantized round to nearest \w+_loss:\S+ \w+_bpb:(\S+)", text, re.MULTILINE
        )
        measured = {
            "run": row["run"],
            "seed": re.search(r"^model_params.* seed:(\d+)", text, re.MULTILINE)[1],
            "log": row["log"],
            "model bytes": f"{train['bytes_model']:,}",
            "steps": f"{train['steps']:,}",
            "train s": f"{train['train_seconds']:.0f}",
            "PARTIAL float" if train["partial"] else "float": f"{float(before[2]):.4f}",
        }
        if not train["partial"]:
            measured |= {
                "int6": f"{train['val_bpb']:.4f}",
                "sliding": f"{events['eval_summary']['val_bpb']:.4f}",
            }
        if nearest and not train["partial"]:
            gap = float(nearest[1]) - train["val_bpb_float"]
            measured |= {"nearest": f"{float(nearest[1]):.4f}"}
            measured |= {"gap left": f"{(train['val_bpb'] - train['val_bpb_float']) / gap:.0%}"}
        wrong += [
            f"{log.name} {name}: {cell} is {measured.get(name)}"
            for name, cell in row.items()
            if cell != measured.get(name)
        ]
    return wrong


@pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_figure_in_a_results_table_is_the_one_in_its_log(readme):
    assert mismatches(readme) == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "records").rglob("codec_table.txt")), ids=lambda p: p.parent.name
)
def test_a_codec_table_in_a_readme_is_what_the_tool_printed(path):
    table = path.read_text(encoding="utf-8").strip()
    assert table.startswith("| tensors | weights | entropy |")
    assert table in (path.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "readme", [p for p in READMES if "Means of n" in p.read_text()], ids=lambda p: p.parent.name
)
def test_the_means_in_the_text_are_those_of_the_logs(readme):
    stated = re.findall(
        r"token-routed (\d\.\d{4}), dense\s+(\d\.\d{4})", readme.read_text(encoding="utf-8")
    )
    scores = {"token-routed (zipf)": [], "dense control": []}
    for row in table_rows(readme):
        log = readme.parent / re.search(r"\(([^)]+)\)", row["log"])[1]
        scores[row["run"]].append(events_of(log)["train_summary"]["val_bpb"])
    assert stated == [tuple(f"{statistics.mean(of_one):.4f}" for of_one in scores.values())]


def test_the_packed_script_alone_repeated_a_log_of_its_folder():
    folder = ROOT / "records" / "track_non_record_16mb" / "2026-11-24_CpuProfile"
    first, again = (
        runlog.Run.read(folder / name) for name in ("train_seed42.log", "repeated/seed42.txt")
    )
    assert [row[:3:2] for row in again.train] == [
        row[:3:2] for row in first.train
    ]  # steps and losses
    assert [row[:4] for row in again.finals] == [row[:4] for row in first.finals]
    assert again.score.bpb == first.score.bpb
    assert again.bytes_total == first.bytes_total
    assert again.code_hashes == first.code_hashes


QUANTIZATION_STUDY = ROOT / "records" / "track_non_record_16mb" / "2026-11-22_QuantizationStudy"


def last_budget(log: Path) -> dict[str, dict[str, float]]:
    """The last table of a log of bytes by role, those of its rows that have weights."""
    table = re.split(
        r"^role +weights +bytes +bits/weight +entropy floor$", log.read_text(), flags=re.MULTILINE
    )[-1]
    rows = re.findall(
        r"^(\w+) +([\d,]+) +([\d,]+) +([\d.]+) +([\d,]+)$", table.split("\ntotal ")[0], re.MULTILINE
    )
    columns = ("weights", "bytes", "bits", "floor")
    return {
        role: dict(zip(columns, (float(x.replace(",", "")) for x in cells), strict=True))
        for role, *cells in rows
    }


@pytest.mark.parametrize(("name", "roles"), [("zipf", {"matrix", "expert"}), ("dense", {"matrix"})])
def test_the_quantization_study_states_how_close_to_its_entropy_the_artifact_is(name, roles):
    budget = last_budget(QUANTIZATION_STUDY / f"{name}_seed1337.txt")
    assert set(budget) == roles | {"vector", "embedding"}
    for row in budget.values():
        assert row["bits"] == pytest.approx(8 * row["bytes"] / row["weights"], abs=6e-4)
    assert all(1 <= budget[role]["bytes"] / budget[role]["floor"] < 1.02 for role in roles)
    assert budget["embedding"]["bytes"] < budget["embedding"]["floor"]
    text = (QUANTIZATION_STUDY / "README.md").read_text(encoding="utf-8")
    left = {
        row["gap left"] for row in table_rows(QUANTIZATION_STUDY / "README.md") if "gap left" in row
    }
    assert len(left) == 1
    assert f"leave {left.pop()} of the loss of rounding to nearest" in MAIN.read_text(
        encoding="utf-8"
    )
    assert (
        "Bits per weight stay within 2 % of the entropy of the symbols in both logs (matrix and expert rows"
        in text
    )


def test_a_wrong_figure_in_a_table_is_found(tmp_path):
    source = READMES[0]
    rows = table_rows(source)
    assert rows, "the README has a results table"
    text = source.read_text(encoding="utf-8").replace("](records/", f"]({ROOT}/records/")
    planted = tmp_path / "README.md"
    planted.write_text(text.replace(rows[0]["sliding"], "1.0000"), encoding="utf-8")
    assert any("1.0000" in line for line in mismatches(planted))


def test_line_and_function_limits():
    assert len((ROOT / "train_gpt.py").read_text().splitlines()) <= 1500
    assert len((ROOT / "eval_sliding.py").read_text().splitlines()) < 500
    for path in SHIPPED:
        functions = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
        ]
        long = [
            n.name
            for n in functions
            if n.end_lineno - n.lineno + 1 > (150 if n.name == "train" else 80)
        ]
        assert long == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_is_ascii_and_free_of_globals_and_getattr_defaults(path):
    source = path.read_bytes().decode("ascii")
    tree = ast.parse(source)
    assert not any(isinstance(n, ast.Global) for n in ast.walk(tree))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not [n.lineno for n in calls if n.func.id == "getattr" and len(n.args) > 2]


def test_eval_sliding_defines_no_module_and_reads_the_environment_only_through_the_knobs():
    tree = ast.parse((ROOT / "eval_sliding.py").read_text())
    assert not any(isinstance(n, ast.ClassDef) for n in ast.walk(tree))
    for path, allowed in zip(SHIPPED, ("from_torchrun", None), strict=True):
        functions = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
        ]
        readers = {
            f.name
            for f in functions
            for n in ast.walk(f)
            if isinstance(n, ast.Attribute)
            and n.attr == "environ"
            and isinstance(n.value, ast.Name)
        }
        assert readers <= {"main", allowed}, readers


def test_every_knob_is_read_somewhere():
    text = "\n".join(path.read_text() for path in SHIPPED)
    unused = [
        f.name
        for f in fields(train_gpt.Hyperparameters)
        if not re.search(rf"(hp|self)\.{f.name}\b", text)
    ]
    assert unused == []


def test_the_launcher_sets_only_knobs():
    names = re.findall(r"^\s+default ([A-Z_]+) ", (ROOT / "run_8xh100.sh").read_text(), re.M)
    names += re.findall(r"\) default ([A-Z_]+) ", (ROOT / "run_8xh100.sh").read_text())
    knobs = {f.name.upper() for f in fields(train_gpt.Hyperparameters)}
    assert names
    assert set(names) - knobs - {"PROFILE"} == set()


# ---- The evaluation study


STUDY = ROOT / "records" / "track_non_record_16mb" / "2026-11-22_EvaluationStudy"


def eval_summary(name: str) -> dict:
    return events_of(STUDY / f"{name}.txt")["eval_summary"]


def test_the_scores_and_gains_of_the_evaluation_study_are_those_of_its_logs():
    text, gains = (STUDY / "README.md").read_text(encoding="utf-8"), []
    rows = re.findall(r"^\| (\d+) \| (\d\.\d{4}) \| (\d\.\d{4}) \| (\S+) \| \[", text, re.MULTILINE)
    assert len(rows) == 3
    for seed, sliding, trained, gain in rows:
        logged = [eval_summary(f"{kind}_seed{seed}") for kind in ("sliding", "ttt")]
        before, after = (event["val_bpb"] for event in logged)
        assert [event["ttt"] for event in logged] == ["off", "sgd"]
        assert (sliding, trained, gain) == (
            f"{before:.4f}",
            f"{after:.4f}",
            f"{before - after:.4f}",
        )
        assert f" seed:{seed}\n" in (STUDY / f"train_seed{seed}.txt").read_text(encoding="utf-8")
        gains.append(before - after)
    mean, deviation = re.search(
        r"^Mean gain (\S+), standard deviation (\S+), n = 3\.", text, re.M
    ).groups()
    assert (mean, deviation) == (f"{statistics.mean(gains):.4f}", f"{statistics.stdev(gains):.4f}")
    assert f"| score-first test-time training | -{mean}, " in MAIN.read_text(encoding="utf-8")
    assert min(gains) > 0


def test_the_speed_in_the_evaluation_study_is_that_of_its_self_check():
    text, log = (
        (STUDY / name).read_text(encoding="utf-8") for name in ("README.md", "sliding_seed1337.txt")
    )
    pattern = r"plain_bpb:(\S+) fast_bpb:(\S+) largest_difference:(\S+) nats, plain tok/s: (\d+) fast tok/s: (\d+)"
    plain_bpb, fast_bpb, worst, plain_rate, fast_rate = re.search(pattern, log).groups()
    assert f"| one window at a time | {plain_bpb} | {int(plain_rate):,} |" in text
    assert f"| eval_sliding.py | {fast_bpb} | {int(fast_rate):,} |" in text
    assert (
        f"loss is {worst} nats, and eval_sliding.py is {int(fast_rate) / int(plain_rate):.1f} times as fast"
        in text
    )
    assert abs(float(plain_bpb) - float(fast_bpb)) < 1e-6
    assert fast_bpb == f"{eval_summary('sliding_seed1337')['val_bpb']:.8f}"


def test_the_sweep_ranks_and_audits_in_the_evaluation_study_are_those_of_its_logs():
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    runs = (STUDY / "sweep.txt").read_text(encoding="utf-8").split("sliding evaluation of ")[1:]
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\d\.\d{5}) \|$", text, re.MULTILINE
    )
    assert len(rows) == len(runs)
    for chunk, rate, epochs, scope, bpb in rows:
        knobs = f"ttt:sgd ttt_scope:{scope} ttt_lr:{rate} ttt_momentum:0.9 ttt_epochs:{epochs} ttt_chunk_tokens:"
        knobs = "ttt:off" if chunk == "off" else knobs + chunk.replace(",", "") + " "
        (run,) = [run for run in runs if knobs in run]
        partial = re.search(r"^final_\w+ \S+ PARTIAL_bpb:(\S+)", run, re.MULTILINE)[1]
        assert f"{float(partial):.5f}" == bpb
    for world in (1, 2):
        logs = [
            (STUDY / f"world{world}_{ttt}.txt").read_text(encoding="utf-8")
            for ttt in ("off", "sgd")
        ]
        scores = [re.search(r"^final_\w+ \S+ PARTIAL_bpb:(\S+)$", log, re.M)[1] for log in logs]
        assert f"| {world} | {scores[0]} | {scores[1]} |" in text
        assert all(f"world_size:{world}\n" in log for log in logs)
    for name in ("audit_sliding", "audit_ttt"):
        table = [
            x
            for x in (STUDY / f"{name}.txt").read_text(encoding="utf-8").splitlines()
            if x.startswith("|")
        ]
        assert "\n".join(table) in text
        assert all(row.endswith("| pass |") for row in table[2:])


# ---- The routing study


ROUTING_STUDY = ROOT / "records" / "track_non_record_16mb" / "2026-11-23_RoutingStudy"


def routing_rows() -> list[ablate.Row]:
    """The rows of the study's table, made again from its logs."""
    base, lines = ablate.read_lines(ROUTING_STUDY / "grid.txt")
    cells = []
    for name, (_, own) in lines.items():
        logs = ablate.files_of(ROUTING_STUDY, ablate.Cell(name, "", None, "off", {}))
        knobs = [events_of(log)["ablation"]["knobs"] for log in logs.values()]
        solved = "off" if name == next(iter(lines)) else own.get("SOLVE", "SHARED_DIM")
        asked = {k: v for k, v in (base | own).items() if k not in ("SCRIPT", "SOLVE", solved)}
        assert knobs, name
        assert all(asked.items() <= seed.items() for seed in knobs), name
        cells.append(ablate.Cell(name, "", None, solved, knobs[0]))
    return ablate.compare(ROUTING_STUDY, cells)


def test_the_table_of_the_routing_study_is_what_its_logs_give():
    rows, text = routing_rows(), (ROUTING_STUDY / "README.md").read_text(encoding="utf-8")
    assert ablate.table(rows) in text
    assert not any(row.note for row in rows)
    assert len(rows[0].runs) >= 6
    sizes = [run["bytes_model"] for row in rows for run in row.runs.values()]
    assert max(sizes) < 1.01 * min(sizes)
    assert len(list(ROUTING_STUDY.glob("*_seed*.txt"))) == sum(len(row.runs) for row in rows)


def test_every_difference_in_the_text_of_the_routing_study_is_that_of_its_table():
    text = (ROUTING_STUDY / "README.md").read_text(encoding="utf-8")
    deltas = {row.cell.name: f"{row.delta:+.4f}" for row in routing_rows()[1:]}
    stated = re.findall(r"`(\w+)` ([+-]\d\.\d{4})", text)
    assert len(stated) >= 20
    assert [(name, delta) for name, delta in stated if deltas[name] != delta] == []
    quoted = re.findall(r"`(\w+)` ([+-]\d\.\d{4})", MAIN.read_text(encoding="utf-8"))
    assert len(quoted) >= 8
    assert all(deltas[name] == delta for name, delta in quoted)


def row_of(diagnosis: str, section: str, name: str) -> list[float]:
    """The figures of the first row of this name in a section of a diagnosis; a dash is NaN."""
    text = (ROUTING_STUDY / diagnosis).read_text(encoding="utf-8").split(f"## {section}")[1]
    cells = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")
    return [math.nan if cell == "-" else float(cell) for cell in cells]


def test_the_routing_study_quotes_its_diagnoses():
    text = " ".join((ROUTING_STUDY / "README.md").read_text(encoding="utf-8").split())
    zipf, learned = (f"{name}_seed1_diagnosis.md" for name in ("zipf", "learned"))
    assert (
        f"first layer costs {row_of(zipf, 'Specialisation', '0')[0]:.2f} nats per token under zipf"
        in text
    )
    kept = [
        f"{row_of(learned, 'Specialisation', layer)[-1]:.0%}".replace("%", " %") for layer in "02"
    ]
    assert f"in the first layer {kept[0]} of its choices" in text
    assert f"in the third {kept[1]}" in text
    q, k, v = (f"{row_of(zipf, 'Cost of zeroing', f'mu into {part}')[0]:.2f}" for part in "qkv")
    assert f"costs {k} to {q} nats each, in the values {v}" in text
    by_depth = [row_of(zipf, "Mu by depth", depth) for depth in "012"]
    ratios, cosines = [x for row in by_depth for x in row[1:3]], [row[-1] for row in by_depth[1:]]
    assert f"(ratios of {min(ratios):.1f} to {max(ratios):.1f})" in text
    assert f"(cosine {min(cosines):.2f} to {max(cosines):.2f})" in text


def test_the_routing_study_counts_its_operations():
    text = (ROUTING_STUDY / "README.md").read_text(encoding="utf-8")
    width, heads, kv_dim, window, layers = 32, 32, 16, 128, 3  # heads: of all together
    attention = 2 * width * heads + 2 * width * kv_dim + 2 * heads * window // 2
    dense, routed = (
        layers * (attention + 2 * width * units) + width * 1024 for units in (192, 80 + 24)
    )
    assert (
        f"dense {dense:,} (attention 3 x {attention:,}, MLP 3 x {2 * width * 192:,}, head {width * 1024:,})"
        in text
    )
    assert f"{routed:,}" in text
    steps = re.search(r"on ([\d,]+) steps instead of ([\d,]+)", text).groups()
    more, base = (int(number.replace(",", "")) for number in steps)
    assert more == pytest.approx(base * dense / routed, rel=0.002)
