"""The table and the figure of a sweep's jobs, finished or not."""

import csv
import json
import re
import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_module
from matplotlib.image import imread
from scipy import stats

from lightning_mnn.figures.sweep import MEASURES, choose_axes
from lightning_mnn.launchers.jobs.records import JobState
from lightning_mnn.sweeps.jobs import Status, read_sweep
from lightning_mnn.tasks.report import report
from tests.children import command, start
from tests.runs.test_resume import kill_when, rows_of

SUMMARY = {
    "mse": 1e-3, "mce": 0.1, "wrong": 5, "kind": "saddle", "min_preactivation": 1e-4, "rank": 20, "log_volume": None,
    "log_volume_lower_bound": -50.0, "learning_coefficient": 2.5,
    "regions_visited": 7, "reason": "why", "finished": True, "epochs": 9, "steps": 90,
    "seconds": 1.5, "num_samples": 50, "input_dim": 6, "hidden_dims": [8], "negative_slope": 0.0, "replicas": 1,
    "seed": 0,
}  # fmt: skip


OWN = [{"path": "hydra.conf", "provider": "hydra"}, {"path": "lightning_mnn.conf", "provider": "main"}]


def settings(*overrides):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return compose("config", ["task=report", "run_dir=.", *overrides])


def write_job(folder, overrides=(), **changes):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))


def write_sweep(folder, axes, change=lambda **values: {}):
    for number, values in enumerate(product(*axes.values())):
        given = dict(zip(axes, values, strict=True))
        write_job(
            folder / str(number),
            [f"{key}={value}" for key, value in given.items()],
            **change(**{key.split(".")[-1]: value for key, value in given.items()}),
        )


def write_plan(folder, *overrides):
    """What Hydra leaves of a sweep before its first job."""
    hydra = {
        "sweep": {"subdir": "${hydra.job.num}"}, "sweeper": {"_target_": "BasicSweeper", "params": None},
        "overrides": {"hydra": [], "task": overrides}, "runtime": {"config_sources": OWN},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "multirun.yaml").write_text(json.dumps({"hydra": hydra}) + "\n")


def read(folder):
    """The table as it stands in both files."""
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file)), pq.read_table(folder / "sweep.parquet")


def panel(figure, title):
    (ax,) = (ax for ax in figure.axes if ax.get_title() == title)
    return ax


def ticks(ax):
    return [text.get_text() for text in ax.get_xticklabels()]


def dots(ax):
    """Places and heights of all dots."""
    parts = [line.get_xydata() for line in ax.lines if line.get_marker() == "o"]
    return sorted(map(tuple, np.concatenate([part for part in parts if len(part)])))


@pytest.mark.slow
def test_a_sweep_that_was_killed_says_what_is_left_and_goes_on_by_the_command_that_it_gives(tmp_path, capsys):
    sweep = tmp_path / "sweep"
    small = (
        "-m", "data.num_samples=20", "data.input_dim=4", "trainer.max_epochs=300", "trainer.log_every_n_steps=1",
        "callbacks.local_minimum_detector.stop_training=false", "callbacks.angular_volume_monitor=null",
        "callbacks.progress=null", "logger.mode=disabled", "model.hidden_dims=[5],[8,3],[6]",
        "report=false",
    )  # fmt: skip
    kill_when(start(tmp_path, *small, "hydra.sweep.dir=sweep"), lambda: rows_of(sweep / "1") > 3)
    report(settings("sweep=sweep"))
    text, typed = read(sweep)
    assert [(row["job"], row["status"]) for row in text] == [("0", "finished"), ("1", "unfinished"), ("2", "waiting")]
    assert typed["model.hidden_dims"].to_pylist() == [[5], [8, 3], [6]]
    assert typed["mse"].null_count == 2
    said = capsys.readouterr().out
    assert "jobs: 1 finished, 1 unfinished, 1 waiting" in said
    assert "unfinished: 1 (model.hidden_dims=[8, 3])\n" in said
    assert "waiting: 2 (model.hidden_dims=[6])\n" in said
    (again,) = (line for line in said.splitlines() if line.startswith("  lightning-mnn -m"))
    assert (sweep / "figure.png").exists()

    before = (sweep / "0" / "summary.json").read_bytes()
    command(tmp_path, *shlex.split(again)[1:])
    assert (sweep / "0" / "summary.json").read_bytes() == before
    report(settings("sweep=sweep"))
    text, typed = read(sweep)
    assert typed["status"].to_pylist() == ["finished"] * 3
    for number, row in enumerate(typed.to_pylist()):  # every value of every summary
        summary = json.loads((sweep / str(number) / "summary.json").read_text())
        assert {key: row[key] for key in summary} == summary
    said = capsys.readouterr().out
    assert "jobs: 3 finished\nswept: model.hidden_dims\n" in said
    assert "resume" not in said
    assert not list(sweep.glob("*.tmp"))


def test_columns_are_typed_in_the_order_of_the_command_with_a_row_for_each_replica():
    lists = {"replicas": 2, "mse": [0.5, 0.25], "kind": ["saddle", None], "hidden_dims": [8, 8]}
    for number, (optimizer, slope) in enumerate((("adam", "0"), ("adam", "0.1"), ("sgd", "null"))):
        overrides = ["data.num_samples=50", f"optimizer={optimizer}", f"model.negative_slope={slope}", "seed=3"]
        write_job(Path("sweep") / str(number * 5), overrides, mce=None, **lists)
    write_job(Path("sweep/7"), ["data.num_samples=50", "optimizer=sgd", "model.negative_slope=0.2", "seed=3"])
    report(settings("sweep=sweep"))
    text, typed = read(Path("sweep"))
    table = typed.to_pylist()
    assert typed.column_names[:6] == ["job", "folder", "optimizer", "model.negative_slope", "status", "replica"]
    assert typed.column_names[6:] == ["class", "class_is_ahead", *SUMMARY]
    assert [row["job"] for row in table] == [0, 0, 5, 5, 7, 10, 10]
    assert [row["replica"] for row in table] == [0, 1, 0, 1, 0, 0, 1]
    assert [row["model.negative_slope"] for row in table] == [0.0, 0.0, 0.1, 0.1, 0.2, None, None]
    assert [(row["mse"], row["kind"]) for row in table[:2]] == [(0.5, "saddle"), (0.25, None)]
    assert [str(typed.schema.field(name).type) for name in ("job", "optimizer", "mse", "finished", "hidden_dims")] == [
        "int64", "string", "double", "bool", "list<element: int64>"
    ]  # fmt: skip
    assert table[4]["hidden_dims"] == [8]
    assert (text[0]["hidden_dims"], text[0]["mce"], text[5]["model.negative_slope"]) == ("[8, 8]", "", "")
    assert json.loads(typed.schema.metadata[b"swept"]) == ["optimizer", "model.negative_slope"]


@pytest.mark.parametrize("recorded", [True, False])  # as version 0.1 did not
def test_what_ended_badly_is_named_with_its_reason(capsys, monkeypatch, recorded):
    diverged, interrupted = ({"ended_by": ended} if recorded else {} for ended in ("divergence", "interruption"))
    monkeypatch.setenv("COLUMNS", "80")
    folder = Path("outputs/sweep")
    write_job(folder / "0", ["seed=1"])
    write_job(
        folder / "1", ["seed=2"], finished=False, reason="training diverged: lower the rate", num_samples=9, **diverged
    )
    write_job(folder / "2", ["seed=3"], finished=False, reason="interrupted after 3 steps", **interrupted)
    (folder / "3").mkdir()
    note = {"overrides": ["seed=4"], "status": "failed", "error": "Traceback …\nValueError: [no] such"}
    (folder / "3" / "job.json").write_text(json.dumps(note))
    write_job(folder / "4", ["seed=5"])
    (folder / "4" / "job.json").write_text(json.dumps(note | {"overrides": ["seed=5"], "status": "finished"}))
    report(settings(f"sweep={folder}"))
    said = capsys.readouterr().out
    for line in (
        "jobs: 2 finished, 2 failed, 1 unfinished", "failed: 1 (seed=2): training diverged: lower the rate",
        "failed: 3 (seed=4): ValueError: [no] such", "unfinished: 2 (seed=3)\n", "each job by its own command",
    ):  # fmt: skip
        assert line in said, line
    rows, typed = read(folder)
    assert typed["seed"].to_pylist() == [1, 2, 3, 4, 5]
    assert [row["status"] for row in rows] == ["finished", "failed", "unfinished", "failed", "finished"]
    assert typed["mse"].to_pylist() == [1e-3, None, None, None, 1e-3]  # measures of finished jobs alone
    assert typed["replica"].to_pylist() == [0, None, None, None, 0]


def test_a_job_that_was_killed_while_its_settings_were_written_is_known_by_its_folder():
    kept = {"config.yaml": "task: train\ndata:\n  num_samples: 30\n"}
    torn = [
        kept, kept | {"overrides.yaml": ""}, kept | {"overrides.yaml": "- data.num_samples=30\n- se"},
        {}, {"config.yaml": ""}, {"config.yaml": "ta"}, {"config.yaml": "data:\n"}, {"config.yaml": "a:\n- b\n c:"},
        kept | {"hydra.yaml": "hydra:\n  run:\n"},
    ]  # fmt: skip
    for place, notes in enumerate(torn):
        folder = Path(f"sweep_{place}")
        write_plan(folder, "data.num_samples=30", "seed=1,2", "+x=${seed}")
        (folder / "0" / ".hydra").mkdir(parents=True)
        for name, text in notes.items():
            (folder / "0" / ".hydra" / name).write_text(text)
        sweep = read_sweep(folder)
        assert [(job.name, str(job.status)) for job in sweep.jobs] == [("0", "unfinished"), ("1", "waiting")], notes
        assert sweep.swept == {"seed": (1, 2)}, notes


def test_jobs_of_other_tasks_are_named_and_not_counted_before_or_after_they_begin(capsys):
    write_plan(Path("sweep"), "experiment=quickstart,census,figure_5_1")
    for number, (name, task) in enumerate((("quickstart", "train"), ("census", "census"))):
        write_job(Path(f"sweep/{number}"), [f"experiment={name}"], finished=False, num_samples=None)
        (Path(f"sweep/{number}/.hydra/config.yaml")).write_text(f"task: {task}\n")
    Path("sweep/1/summary.json").write_text("{}")
    report(settings("sweep=sweep"))
    said = capsys.readouterr().out
    assert "jobs: 1 unfinished\n" in said
    assert "left out: census: 1; scan: 2\n" in said


def test_a_summary_that_cannot_be_read_is_named_and_its_job_is_not_finished(capsys):
    for seed, text in enumerate((None, "", '{"mse": 0.1', "[]", "\udcff")):
        write_job(Path(f"sweep/{seed}"), [f"seed={seed}"])
        if text is not None:
            Path(f"sweep/{seed}/summary.json").write_bytes(text.encode(errors="surrogateescape"))
    report(settings("sweep=sweep"))
    said = capsys.readouterr().out
    assert "jobs: 1 finished, 4 unfinished" in said
    for seed in (1, 2, 3, 4):
        assert f"unfinished: {seed} (seed={seed}): sweep/{seed}/summary.json is damaged" in said
    report(settings("folder=sweep"))
    assert "left out because they are not finished: 1, 2, 3, 4\n" in capsys.readouterr().out


def write_foreign_sweep(folder, *records):
    """A sweep of another program, with one job for each text of a job.json; None: the job has none."""
    write_plan(folder, f"lr={','.join(str(number) for number in range(len(records)))}")
    plan = json.loads((folder / "multirun.yaml").read_text())
    plan["hydra"]["runtime"]["config_sources"][1]["path"] = "/their/conf"
    (folder / "multirun.yaml").write_text(json.dumps(plan) + "\n")
    for number, text in enumerate(records):
        (folder / str(number) / ".hydra").mkdir(parents=True)
        (folder / str(number) / ".hydra" / "overrides.yaml").write_text(f"- lr={number}\n")
        (folder / str(number) / "console.log").touch()
        if text is not None:
            (folder / str(number) / "job.json").write_bytes(text.encode(errors="surrogateescape"))


def test_jobs_of_another_program_are_as_their_codes_say_whatever_their_folders_hold(capsys):
    records = [{"status": status, "return_value": 0.5, "seconds": 3.0, "error": None} for status in JobState]
    write_foreign_sweep(Path("sweep"), *map(json.dumps, records))
    Path("sweep/0/summary.json").write_text('{"accuracy": 1}')
    (Path("sweep/1/.hydra/config.yaml")).write_text("task: classify\n")
    report(settings("sweep=sweep"))
    said = capsys.readouterr().out
    _, typed = read(Path("sweep"))
    expected = {"finished": "finished", "returned": "finished", "failed": "failed"}
    assert typed["status"].to_pylist() == [expected.get(state, "unfinished") for state in JobState]
    assert [row["return_value"] for row in typed.to_pylist() if row["status"] == "finished"] == [0.5, 0.5]
    assert "sweep has no sweep.json" in said
    assert "lightning-mnn" not in said


@pytest.mark.parametrize(
    "torn", ["", "{", "[]", "\udcff", "{}", '{"status": 3}', '{"status": {}, "overrides": 7}', None]
)
def test_a_torn_record_of_another_program_leaves_its_job_unfinished(torn):
    write_foreign_sweep(Path("sweep"), json.dumps({"status": "finished"}), torn)
    whole, job = read_sweep(Path("sweep").absolute()).jobs
    assert (whole.status, job.status) == (Status.FINISHED, Status.UNFINISHED)
    assert job.overrides == ("lr=1",)
    if torn not in ("{}", None):
        assert re.match(r"sweep/1/job.json (is damaged|has an unknown status)", job.error)


def test_a_torn_log_of_another_program_is_named_and_costs_its_metrics_alone(capsys):
    write_foreign_sweep(Path("sweep"), json.dumps({"status": "finished", "return_value": 1.5, "seconds": 3.0}))
    Path("sweep/0/metrics.csv").write_bytes(b"\xff\n")
    report(settings("sweep=sweep"))
    said = capsys.readouterr().out
    assert "finished: 0: sweep/0/metrics.csv is damaged (" in said
    assert "save_dir=${hydra:runtime.output_dir}" in said  # there are no other logs
    assert read(Path("sweep"))[1]["return_value"].to_pylist() == [1.5]


def test_references_stand_in_the_table_as_what_they_refer_to():
    for number, hidden in enumerate(("[5]", "[$\\{data.input_dim\\}]")):
        write_job(Path(f"sweep/{number}"), [f"model.hidden_dims={hidden}"])
        config = {"model": {"hidden_dims": ["${data.input_dim}"]}, "data": {"input_dim": 4}}
        Path(f"sweep/{number}/.hydra/config.yaml").write_text(json.dumps(config) + "\n")
    assert read_sweep(Path("sweep").absolute()).swept == {"model.hidden_dims": ([5], [4])}


def test_without_a_finished_job_there_is_a_table_and_no_figure(capsys):
    write_job(Path("sweep/0"), ["seed=1"], finished=False, num_samples=None)
    report(settings("sweep=sweep"))
    assert {path.name for path in Path("sweep").iterdir()} == {"0", "sweep.csv", "sweep.parquet", "report.html"}
    assert "jobs: 1 unfinished" in capsys.readouterr().out


def test_several_sweeps_in_one_folder_make_one_table():
    write_sweep(Path("all/a"), {"model.negative_slope": [0.1], "seed": [1, 2]})
    write_sweep(Path("all/b"), {"optimizer": ["sgd"], "seed": [1, 2]})
    for place in Path("all").glob("*/*"):
        choices = {"runtime": {"choices": {"optimizer": "adam" if place.parts[1] == "a" else "sgd"}}}
        (place / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": choices}) + "\n")
        config = {
            "task": "train",
            "model": {"negative_slope": "${slope}"},
            "slope": 0.1 if place.parts[1] == "a" else 0,
        }
        (place / ".hydra" / "config.yaml").write_text(json.dumps(config) + "\n")
    write_job(Path("all/b/patterns.zarr"), ["task=scan"], figure="minima", mse=None)
    scan = {"figure": "minima", "sizes": []}
    (Path("all/b/patterns.zarr") / "summary.json").write_text(json.dumps(scan))
    report(settings("sweep=all"))
    _, typed = read(Path("all"))
    assert typed["folder"].to_pylist() == ["a/0", "a/1", "b/0", "b/1"]
    assert typed["optimizer"].to_pylist() == ["adam", "adam", "sgd", "sgd"]
    assert typed["model.negative_slope"].to_pylist() == [0.1, 0.1, 0, 0]


@pytest.mark.parametrize(
    ("prepare", "overrides", "error", "message"),
    [
        ({}, ["sweep=nowhere"], FileNotFoundError, "sweep=nowhere: there is no such folder"),
        ({}, ["sweep=.", "folder=."], ValueError, "give one of them"),
        ({}, [], ValueError, "give folder=DIR, or sweep=DIR"),
        ({}, ["sweep=."], FileNotFoundError, "contains no jobs: give the folder of a sweep"),
        ({"summary.json": SUMMARY}, ["sweep=."], FileNotFoundError, "of one run or experiment"),
        (
            {"0/summary.json": {"figure": "minima"}, "1/summary.json": {"regions_searched": 3}},
            ["sweep=."], FileNotFoundError, "contains no training runs, but another task: 0, 1: task=report folder=DIR",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_said(prepare, overrides, error, message):
    for name, content in prepare.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        report(settings(*overrides))
    assert not list(Path().rglob("sweep.*"))


def test_the_table_and_the_figure_show_classes_at_and_ahead(drawn):
    ahead = {"descends_to": "differentiable_minimum", "descends_to_mse": 0.0, "descends_to_zero_error": True}
    changes = {1: {"kind": "differentiable_minimum", "zero_error": True}, 2: {"kind": "saddle"} | ahead}
    write_sweep(Path("sweep"), {"seed": [1, 2, 3, 4]}, lambda seed: changes.get(seed, {}))  # 3, 4: of earlier versions
    report(settings("sweep=sweep"))
    rows = list(csv.DictReader(Path("sweep/sweep.csv").read_text().splitlines()))
    assert [(row["class"], row["class_is_ahead"], row["descends_to"]) for row in rows] == [
        *[("global", "False", ""), ("global", "True", "differentiable_minimum")],
        *[("not_told", "False", "")] * 2,
    ]
    typed = pq.read_table("sweep/sweep.parquet")
    assert typed["class_is_ahead"].to_pylist() == [False, True, False, False]
    (figure,) = drawn
    bars = [bar for bar in panel(figure, "What training ended in").patches if bar.get_height()]
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in bars}
    assert sorted(bool(hatch) for _, hatch in looks) == [False, False, True]
    assert len({color for color, _ in looks}) == 3


def test_kinds_are_drawn_where_no_certificate_exists(drawn):
    kinds = {1: "differentiable_minimum", 2: "saddle", 3: "undecided"}
    write_sweep(Path("sweep"), {"seed": [1, 2, 3]}, lambda seed: {"kind": kinds[seed], "evidence": "second_order"})
    report(settings("sweep=sweep"))
    (figure,) = drawn
    assert len({bar.get_facecolor() for bar in panel(figure, "Kinds").patches if bar.get_height()}) == 3
    assert {row["class"] for row in pq.read_table("sweep/sweep.parquet").to_pylist()} == {"not_told"}


def test_a_swept_number_is_an_axis_with_every_job_and_the_medians(drawn):
    losses = {1: 1e-8, 2: 0.0, 3: 1e-2}
    write_sweep(
        Path("sweep"),
        {"optimizer.lr": [0.001, 0.01, 0.1], "seed": [1, 2, 3]},
        lambda lr, seed: {
            "mse": losses[seed] * lr,
            "kind": "kink_minimum" if seed == 1 else "saddle",
            "zero_error": False,
        },
    )
    report(settings("sweep=sweep"))
    assert imread("sweep/figure.png").shape[0] > 1000
    (figure,) = drawn
    loss = panel(figure, "Final loss")
    assert (loss.get_xscale(), loss.get_yscale(), loss.get_xlabel()) == ("log", "log", "optimizer.lr")
    assert ticks(loss) == ["0.001", "0.01", "0.1"]
    foot = 1e-13  # of what is exactly zero
    expected = sorted((lr, max(loss * lr, foot)) for lr in (0.001, 0.01, 0.1) for loss in losses.values())
    np.testing.assert_allclose(dots(loss), expected)
    (medians,) = (line for line in loss.lines if len(line.get_xdata()) == 3 and line.get_marker() == "None")
    np.testing.assert_allclose(medians.get_xydata(), [(lr, 1e-8 * lr) for lr in (0.001, 0.01, 0.1)])
    (note,) = (text for text in loss.texts if text.get_text() == "exactly 0")
    assert note.get_window_extent().x0 >= loss.get_window_extent().x1  # where it covers no dot
    shares = [bar.get_height() for bar in panel(figure, "What training ended in").patches if bar.get_height()]
    assert sorted(map(round, shares)) == [33] * 3 + [67] * 3
    assert "pooled over seed (3 values)" in figure.get_suptitle()
    titles = {ax.get_title() for ax in figure.axes}
    assert titles == {measure.title for measure in MEASURES} - {"Test loss", "Test error"} | {"What training ended in"}


def test_the_exact_learning_coefficient_is_printed_and_drawn_where_jobs_have_one(drawn, capsys):
    known = {(4, 1): 3.0, (4, 2): 4.0, (8, 1): 7.5, (8, 2): None}
    write_sweep(
        Path("sweep"),
        {"data.input_dim": [4, 8], "seed": [1, 2]},
        lambda input_dim, seed: {"learning_coefficient": known[input_dim, seed]},
    )
    report(settings("sweep=sweep"))
    (figure,) = drawn
    assert dots(panel(figure, "Local learning coefficient")) == [(4, 3.0), (4, 4.0), (8, 7.5)]
    heads, rows = re.search(r"networks.*?λ *\n.*?\n(.*?)\n(.*?)\n", capsys.readouterr().out, re.DOTALL).groups()
    assert heads.split()[-3:] == ["3.5", "±", "6.4"]  # 12.7 · 0.5, by Student's t
    assert rows.split()[-1] == "7.5"
    assert "learning_coefficient" in Path("sweep/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["1.0", "1.00000001", "2.5"], ["1.0", "1.00000001", "2.5"]),
        (["1", "'1'", "b"], ["1", '"1"', "b"]),
        (["inf", "1.5", "nan"], ["inf", "1.5", "nan"]),
        (["'a$b^^c$'", "'$'", "'数'"], [r"a\$b^^c\$", r"\$", "数"]),
    ],
)
def test_every_value_is_drawn_at_its_place_under_its_name(values, names, drawn):
    write_sweep(Path("sweep"), {"+x": values}, lambda **_: dict.fromkeys(("mce", "rank", "seconds", "steps")))
    report(settings("sweep=sweep"))
    loss = panel(drawn[0], "Final loss")
    assert ticks(loss) == names
    assert len({place for place, _ in dots(loss)}) == 3


def test_networks_of_a_job_are_pooled_where_their_number_was_swept(drawn):
    write_sweep(Path("sweep"), {"replicas": [2, 3]}, lambda replicas: {"replicas": replicas, "mse": [0.1] * replicas})
    report(settings("sweep=sweep"))
    assert "5 networks against replicas\n" in drawn[0].get_suptitle()
    assert drawn[0].get_suptitle().endswith("pooled over the networks of each job")


def test_how_the_jobs_stand_is_said_even_where_no_figure_can_be_drawn(capsys):
    write_job(Path("sweep/0"), ["seed=1"])
    write_job(Path("sweep/1"), ["seed=2"], finished=False)
    Path("sweep/figure.png").mkdir()
    with pytest.raises(IsADirectoryError):
        report(settings("sweep=sweep"))
    assert "unfinished: 1 (seed=2)" in capsys.readouterr().out


def test_a_second_key_is_the_colour_and_names_stand_in_the_order_of_the_command(drawn):
    axes = {"optimizer": ["sgd", "adam", "lbfgs"], "model.hidden_dims": ["[8,8]", "[8]"], "seed": [1, 2]}
    write_sweep(Path("sweep"), axes, lambda **_: {"mce": None, "kind": None, "rank": None})
    report(settings("sweep=sweep"))
    (figure,) = drawn
    assert "Classification error" not in {ax.get_title() for ax in figure.axes}
    assert ticks(figure.axes[0]) == ["sgd", "adam", "lbfgs"]
    (legend,) = figure.legends
    assert (legend.get_title().get_text(), [text.get_text() for text in legend.get_texts()]) == (
        "model.hidden_dims", ["8, 8", "8"]
    )  # fmt: skip
    assert len(dots(panel(figure, "Final loss"))) == 12
    assert "12 finished jobs against optimizer and model.hidden_dims" in figure.get_suptitle()


def test_seeds_are_an_axis_only_where_nothing_else_was_swept(drawn):
    lists = {"replicas": 2, "mse": [1e-3, 1e-4]}
    write_sweep(Path("seeds"), {"seed": list(range(30))}, lambda seed: lists)
    write_job(Path("one/0"), ["seed=1"])
    report(settings("sweep=seeds"))
    report(settings("sweep=one"))
    several, one = drawn
    assert panel(several, "Final loss").get_xlabel() == "seed"
    assert [len(dots(panel(several, title))) for title in ("Final loss", "Time")] == [60, 30]  # time is the job's
    assert "30 finished jobs, 60 networks against seed" in several.get_suptitle()
    assert one.get_suptitle() == "1 finished job\nN = 50, d0 = 6, hidden units = 8, ρ = 0"
    assert ticks(one.axes[0]) == [""]


def test_of_many_keys_those_are_shown_that_explain_most():
    draw = np.random.default_rng(0)
    rows = [
        {"a": a, "b": b, "c": c, "d": "x", "seed": seed, "replica": 0, "mse": 10.0 ** (3 * b + c + 0.1 * draw.random())}
        for a, b, c, seed in product((1, 2, 3), (1, 2, 3), (0, 1), (1, 2))
    ]
    assert choose_axes(rows, ["a", "b", "c", "d", "seed"], MEASURES[:1]) == ("b", "c")
    assert choose_axes(rows, ["a", "d", "seed"], MEASURES[:1]) == ("a", "")


def _curves(ax):
    return {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in ax.lines}


@pytest.mark.parametrize("band", ["std", "quartiles"])
def test_bands_are_over_the_networks_of_each_point(tmp_path, drawn, band):
    def change(num_samples, hidden_dims, seed):
        return {"mse": num_samples * (1 + len(hidden_dims)) * (1 + seed**2), "mce": 0.1 * seed, "seed": seed}

    axes = {"data.num_samples": [40, 80], "model.hidden_dims": ["[8]", "[20]"], "seed": [1, 2, 4]}
    write_sweep(tmp_path, axes, change)
    report(settings(f"sweep={tmp_path}", "x=data.num_samples", "color=model.hidden_dims", "y=mse", f"band={band}"))
    (ax,) = drawn[-1].axes
    factor = {"std": (2 + 5 + 17) / 3, "quartiles": 5}[band]
    expected = {"8": 1 + len("[8]"), "20": 1 + len("[20]")}
    assert _curves(ax) == {
        name: {n: pytest.approx(n * scale * factor) for n in (40, 80)} for name, scale in expected.items()
    }
    edge = ax.collections[0].get_paths()[0].vertices
    low, high = {"std": (8 - 63**0.5, 8 + 63**0.5), "quartiles": (3.5, 11)}[band]
    for n in (40, 80):
        heights = edge[edge[:, 0] == n, 1]
        assert (heights.min(), heights.max()) == (pytest.approx(n * 4 * low), pytest.approx(n * 4 * high))
    assert (tmp_path / "figure_bands.pdf").read_bytes().startswith(b"%PDF")
    assert imread(tmp_path / "figure_bands.png").shape[2] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["x=data.seed"], "x is no column with values of the finished jobs, got 'data.seed': choose from job, folder"),
        (["x=seed", "y=[mse,kind]"], "y has no numbers, got 'kind'"),
        (["x=seed", "color=model"], "color is no column"),
        (["x=seed", "band=range"], "band must be one of std, quartiles, confidence, got 'range'"),
    ],
)
def test_columns_that_cannot_be_drawn_are_named(tmp_path, overrides, message):
    write_sweep(tmp_path, {"seed": [1, 2]}, lambda seed: {"seed": seed})
    with pytest.raises(ValueError, match=message):
        report(settings(f"sweep={tmp_path}", *overrides))


def test_test_errors_of_global_minima_have_confidence_intervals(drawn):
    def measures(num_samples, seed):
        kind = "saddle" if seed == 4 else "differentiable_minimum"
        known = {"kind": kind, "zero_error": seed < 3, "evidence": "certificate", "num_samples": num_samples}
        return known | {"test_mse": num_samples * (3.0 + seed**2), "seed": seed}

    axes = {"data.num_samples": [10, 20], "seed": [0, 1, 2, 3, 4]}
    write_sweep(Path("sweep"), axes, measures)
    report(settings("sweep=sweep"))
    figure = drawn[-1]
    (ax,) = figure.axes
    assert "6 of 10 networks, those at certified global minima" in figure.get_suptitle()
    (curve,) = ax.lines
    values = np.array([3.0, 4.0, 7.0])
    half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
    assert curve.get_xydata().ravel() == pytest.approx([10, 10 * values.mean(), 20, 20 * values.mean()])
    (band,) = ax.collections
    found = {float(y) for x, y in band.get_paths()[0].vertices if x == 20}
    low, high = max(20 * (values.mean() - half), 0), 20 * (values.mean() + half)
    assert [min(found), max(found)] == pytest.approx([low, high])
    assert low == 0
    assert Path("sweep/figure_test_error.png").exists()
