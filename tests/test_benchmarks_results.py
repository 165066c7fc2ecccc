"""Results: the JSON file and its schema, comparisons, tables, the README and the figure."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import plot, report
from benchmarks.__main__ import main
from benchmarks.cost import CostRow
from benchmarks.results import SCHEMA_VERSION, Results, Row, read, regressions

RESULTS = sorted((Path(report.__file__).parent / "results").glob("*.json"))
MACHINE = {
    "platform": "cpu",
    "device": "Some CPU",
    "cores": 2,
    "memory_gb": 16.0,
    "system": "Linux",
    "bandwidth_gb_s": 20.0,
    "matmul_gflop_s": 100.0,
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "environment": {},
}


def _row(implementation="xla", mode="forward", n=64, median=10.0, **fields):
    times = {"median_ms": median, "q1_ms": 0.95 * median, "q3_ms": 1.05 * median, "samples": 5}
    if fields.get("status", "ok") != "ok":
        times = {}
    defaults = {"compile_s": 0.5, "temp_bytes": 2_000_000, "error": 3e-7, "roofline": 4.0 / median}
    label = {"alphafold": "AlphaFold 2"}.get(implementation, f"ipa_haiku {implementation}")
    return Row("module", n, "float32", mode, implementation, label, **(defaults | times | fields))


def _results(rows, **fields):
    defaults = {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": MACHINE,
        "settings": {"dtype": "float32", "sizes": [64]},
        "is_complete": True,
        "loss": "squared distance",
    }
    return Results(rows=rows, **(defaults | fields))


@pytest.fixture
def results():
    rows = [
        _row(speedup=4.0),
        _row("alphafold", median=40.0, speedup=1.0, temp_bytes=8_000_000),
        _row(mode="grad", median=30.0, speedup=5.0, errors={"value": 1e-7, "pair": 3e-7}),
        _row("alphafold", mode="grad", median=150.0, speedup=1.0),
        _row(n=128, status="out of memory", note="it needs 12.3 GB, 4.0 GB are free"),
        _row("alphafold", n=128, median=160.0, speedup=1.0),
        _row(
            n=128,
            mode="grad",
            status="wrong",
            note="off by 2.0e-01",
            error=0.2,
            errors={"value": 0.2, "pair": None},
        ),
        _row("alphafold", n=128, mode="grad", median=700.0, speedup=1.0),
    ]
    return _results(rows, missing=[{"name": "lucidrains", "reason": "needs torch: pip install"}])


def test_what_is_written_is_read(results, tmp_path):
    results.write(tmp_path / "x.json")
    assert read(tmp_path / "x.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def _set(path, value):
    def change(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set(["schema_version"], SCHEMA_VERSION + 1), "schema_version must be"),
        (_set(["schema_version"], None), "schema_version must be"),
        (_set(["rows", 0, "mode"], "backward"), "rows/0/mode"),
        (_set(["rows", 0, "median_ms"], -1.0), "rows/0/median_ms"),
        (_set(["rows", 1, "samples"], 0), "rows/1/samples"),
        (_set(["rows", 4, "median_ms"], 3.0), "rows/4/median_ms"),  # it has no time
        (_set(["rows", 0, "speed"], 3.0), "rows/0"),
        (_set(["rows", 0, "error"], None), "rows/0"),
        (_set(["machine", "bandwidth_gb_s"], 0), "machine/bandwidth_gb_s"),
        (_set(["date"], "yesterday"), "date"),
        (_set(["is_complete"], "yes"), "is_complete"),
    ],
)
def test_other_files_are_refused(results, tmp_path, change, expected):
    path = tmp_path / "x.json"
    results.write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=expected):
        read(path)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_files_that_are_no_results(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file(results, tmp_path):
    results.write(tmp_path / "x.json")
    broken = dataclasses.replace(results, date="yesterday")
    with pytest.raises(Exception, match="yesterday"):
        broken.write(tmp_path / "x.json")
    assert read(tmp_path / "x.json") == results


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (_row(median=10.0), _row(median=10.0), []),
        (_row(median=10.0), _row(median=10.9), []),  # within the margin
        (_row(median=10.0), _row(median=20.0), ["20 ms, was 10 ms (2.00 times)"]),
        (_row(median=10.0), _row(median=5.0), []),
        # The quartiles overlap: that is noise.
        (_row(median=10.0, q3_ms=13.0), _row(median=13.5, q1_ms=12.0), []),
        (_row(temp_bytes=10**6), _row(temp_bytes=1_010_000), []),
        (_row(temp_bytes=10**6), _row(temp_bytes=1_100_000), ["1.1 MB of temporary memory"]),
        (_row(temp_bytes=None), _row(temp_bytes=10**6), []),
        (_row(), _row(status="wrong"), ["wrong, was ok"]),
        (_row(status="wrong"), _row(), []),
        (_row(n=64), _row(n=128, median=99.0), []),  # not the same row
    ],
)
def test_regressions(old, new, expected):
    found = regressions([old], [new], margin=0.1)
    assert len(found) == len(expected)
    for line, part in zip(found, expected):
        assert part in line


def test_compare_option_finds_what_got_slower(results, tmp_path, capsys):
    rows = [dataclasses.replace(row) for row in results.rows]
    rows[0] = _row(median=15.0, speedup=2.7)
    results.write(tmp_path / "old.json")
    dataclasses.replace(results, rows=rows).write(tmp_path / "new.json")

    options = ["--compare", str(tmp_path / "old.json"), "--from-json"]
    assert main([*options, str(tmp_path / "old.json")]) == 0
    assert "nothing got slower or larger" in capsys.readouterr().out
    assert main([*options, str(tmp_path / "new.json")]) == 1
    line = "module N=64 float32 forward ipa_haiku xla: 15 ms, was 10 ms (1.50 times)"
    assert line in capsys.readouterr().out
    assert main([*options, str(tmp_path / "new.json"), "--margin", "0.6"]) == 0


def test_tables_have_a_line_for_every_row(results):
    text = report.tables(results)
    lines = text.splitlines()
    assert lines[0] == "Haiku module, N = 64, float32"
    assert lines[2].split() == [
        "ipa_haiku", "xla", "forward", "10.0", "9.50", "to", "10.5", "0.5", "4.00", "2.00",
        "3.0e-07", "40%",
    ]  # fmt: skip
    assert "  ipa_haiku xla: it needs 12.3 GB, 4.0 GB are free" in lines
    assert "  lucidrains: needs torch: pip install" in lines
    assert sum("out of memory" in line for line in lines) == 1
    assert "interrupted" not in text
    assert "interrupted" in report.tables(dataclasses.replace(results, is_complete=False))


def test_errors_of_groups_stand_beside_each_other(results):
    lines = [line.split() for line in report.tables(results).splitlines()]
    first, second = (i for i, line in enumerate(lines) if line == ["errors", "value", "pair"])
    assert lines[first + 1] == ["ipa_haiku", "xla", "gradient", "1.0e-07", "3.0e-07"]
    assert lines[second + 1] == ["ipa_haiku", "xla", "gradient", "2.0e-01", "-"]


def test_loss_is_told(results):
    note = "gradient: value and gradient of a squared distance to a target."
    assert note in report.tables(results).splitlines()
    assert f" {note.capitalize()} Generated" in report.markdown(results, "x.json")
    results.loss = "linear"
    assert "squared" not in report.tables(results) + report.markdown(results, None)


def test_gradients_of_another_loss_are_not_compared(results, tmp_path, capsys):
    results.write(tmp_path / "new.json")
    content = json.loads((tmp_path / "new.json").read_text())
    del content["loss"]  # as in older files
    for row in content["rows"]:
        row.pop("errors")
        if row["status"] == "ok":
            row |= {name: 0.1 * row[name] for name in ("median_ms", "q1_ms", "q3_ms")}
    (tmp_path / "old.json").write_text(json.dumps(content))
    files = [str(tmp_path / name) for name in ("new.json", "old.json")]
    assert main(["--from-json", files[0], "--compare", files[1]]) == 1
    output = capsys.readouterr().out
    assert "the gradient of another loss, not compared: linear" in output
    assert "N=64 float32 forward ipa_haiku xla: 10 ms, was 1 ms" in output
    assert "grad" not in output.partition("not compared")[2]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_of_older_versions_are_shown(path):
    results = read(path)
    assert report.tables(results).count("median ms") == len(
        {(row.what, row.n) for row in results.rows}
    )
    assert f"jax {results.machine['versions']['jax']}" in report.markdown(results, None)


def test_a_row_without_a_time_shows_its_status(results):
    (line,) = (x for x in report.tables(results).splitlines() if " wrong " in x)
    assert line.split()[3:5] == ["wrong", "-"]


def test_environment_is_told(results, tmp_path, capsys):
    results.write(tmp_path / "old.json")
    assert "GLIBC" not in report.machine(results) + report.markdown(results, None)
    results.machine = MACHINE | {"environment": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
    results.write(tmp_path / "new.json")
    setting = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
    assert report.machine(results).splitlines()[-1] == setting
    assert f", with `{setting}`. Errors" in report.markdown(results, None)
    main(["--from-json", str(tmp_path / "new.json"), "--compare", str(tmp_path / "old.json")])
    assert "that was another environment: {}" in capsys.readouterr().out


def test_markdown_is_a_table_of_all_rows(results):
    lines = report.markdown(results, "results/x.json").splitlines()
    assert lines[:4] == [
        "| N | Haiku module: forward / gradient | time (ms) | speed (AlphaFold 2 = 1) | "
        "temporary memory (MB) | error |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
        "| 64 | ipa_haiku xla | 10.0 / 30.0 | 4.0 / 5.0 | 2.00 / 2.00 | 3e-07 / 3e-07 |",
        "| 64 | AlphaFold 2 | 40.0 / 150 | 1.0 / 1.0 | 8.00 / 2.00 | 3e-07 / 3e-07 |",
    ]
    assert lines[4].startswith("| 128 | ipa_haiku xla | out of memory / wrong |")
    assert "Some CPU, 2 CPU cores, 16 GB; jax 0.10.2, float32, 2026-01-02" in lines[-1]
    assert "`results/x.json`" in lines[-1]


def test_update_readme_replaces_what_is_between_the_markers(results, tmp_path):
    readme, source = tmp_path / "README.md", tmp_path / "x.json"
    readme.write_text(f"# Title\n{report.README_BEGIN}\nformer text\n{report.README_END}\nend\n")
    results.write(source)
    options = ["--from-json", str(source), "--update-readme", str(readme)]
    assert main(options) == 0
    once = readme.read_text()
    assert once.startswith(f"# Title\n{report.README_BEGIN}\n| N | Haiku module")
    assert once.endswith(f"`{source}`.\n{report.README_END}\nend\n")
    assert "former text" not in once
    assert main(options) == 0
    assert readme.read_text() == once


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        report.README_BEGIN,
        f"{report.README_END}{report.README_BEGIN}",
        f"{report.README_BEGIN}{report.README_BEGIN}{report.README_END}",
        f"{report.README_BEGIN}{report.README_END}{report.README_END}",
    ],
)
def test_update_readme_needs_the_markers(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md must have"):
        report.update_readme(tmp_path / "README.md", "new")
    assert (tmp_path / "README.md").read_text() == text


def test_plot_writes_a_figure(results, tmp_path):
    results.write(tmp_path / "x.json")
    assert main(["--from-json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_plot_draws_every_implementation_and_the_roofline(results):
    figure = plot.figure(results)
    times, gradient_times, memory = figure.axes
    assert times.get_xscale() == times.get_yscale() == memory.get_yscale() == "log"
    lines = {line.get_label(): line for line in times.get_lines()}
    assert lines.keys() == {"ipa_haiku xla", "AlphaFold 2", "least possible time"}
    assert list(lines["AlphaFold 2"].get_xdata()) == [64, 128]
    assert list(lines["AlphaFold 2"].get_ydata()) == [40.0, 160.0]
    assert list(lines["ipa_haiku xla"].get_xdata()) == [64]  # the other has no time
    assert lines["least possible time"].get_ydata()[0] == pytest.approx(4.0)
    assert [x.get_text() for x in figure.legends[0].get_texts()] == list(lines)
    assert gradient_times.get_title() == "module: gradient"


def test_plot_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no row with a time"):
        plot.figure(_results([_row(status="wrong")]))


def test_demonstration_text():
    change = {"attention": 1e-7, "output": 2e-7, "rounding": 3e-7}
    demo = {
        "protein": "PDB 2GTL, chain A",
        "residues": 147,
        "moved": [{"distance": 10_000.0, **change, "alphafold": 4e-7}],
        "agreement": [{"implementation": "reference", "error": 0.0, "identical": 1.0}],
    }
    text = report.demonstration(demo)
    assert "  10,000 Å               1.0e-07  2.0e-07         3.0e-07" in text
    assert "implementation=reference: off by 0.0e+00" in text
    without = demo | {"moved": [{"distance": 0.0, **change}], "agreement": []}
    assert "AlphaFold" not in report.demonstration(without)


def test_cost_text():
    rows = [
        CostRow(1024, "forward", "ipa_haiku xla", 161_000_000, 2.84),
        CostRow(1024, "grad", "ipa_haiku xla", note="cannot"),
    ]
    lines = report.cost("NVIDIA H200", rows).splitlines()
    assert lines[0] == "Compiled for NVIDIA H200"
    assert lines[2].split() == ["1024", "ipa_haiku", "xla", "forward", "161", "2.8"]
    assert lines[3].split() == ["1024", "ipa_haiku", "xla", "gradient", "-", "cannot"]
