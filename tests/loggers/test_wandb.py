"""W&B runs, read back by W&B's own reader; servers that fail in every way, real ones on this machine."""

import contextlib
import functools
import json
import os
import pty
import re
import signal
import socket
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from pytorch_lightning.utilities import rank_zero_only

from lightning_mnn.figures import read_metrics
from lightning_mnn.loggers.csv_logs import ResumableCSVLogger
from lightning_mnn.loggers.media import log_table
from lightning_mnn.loggers.wandb import ResumableWandbLogger
from lightning_mnn.runs.resume import RunState
from lightning_mnn.runs.wandb import wandb_options, wandb_settings
from lightning_mnn.tasks.train import _loggers, _resume_loggers
from tests.children import PATIENCE, processes, run_the_command, wait_for
from tests.wandb_files import records_of, summary_of

pytestmark = pytest.mark.xdist_group("wandb")  # which share runs that take long

KEY = "k" * 40
ID = "abcd"
ROWS = 5
QUIET = {"silent": True, "console": "off"}
FOREIGN_SERVICE = "3-1-unix-/tmp/of-a-process-that-is-gone/socket"
SMALL = (
    "data.num_samples=8", "data.input_dim=6", "model.hidden_dims=[8]", "model.threshold=0.0", "optimizer.lr=0.03",
    "callbacks.angular_volume_monitor.measure=[]",
)  # fmt: skip


@functools.cache
def records(path):
    """All of the runs under a folder: a list of records each."""
    return [records_of(run, whole=False) for run in sorted(path.glob("*run-*/run-*.wandb"))]


def of_kind(run, kind):
    return [record[kind] for record in run if record["type"] == kind]


def rows_of(run):
    return [record["item"] for record in of_kind(run, "history")]


def summary_in(folder):
    (path,) = folder.glob("wandb/*run-*/run-*.wandb")
    return summary_of(path)


class Server(ThreadingHTTPServer):
    """Answers what W&B asks as a run begins; afterwards as ``status`` says."""

    daemon_threads = True

    def __init__(self, status=200):
        self.status = status
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": ID, "displayName": ID, "config": "{}", "historyLineCount": 0, "project": project}
        data = {}
        if "RunResumeStatus" in asked:
            data = {"model": {"id": "m", "bucket": None}}
        elif "UpsertBucket" in asked:
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        elif "CreateRunFiles" in asked:
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        body = json.dumps({"data": data}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *args):
        """Say nothing."""


@contextlib.contextmanager
def trouble(kind):
    """The address of a server that is in trouble from the beginning, or after a run began."""
    server = None
    if kind == "refuses":
        address = ("127.0.0.1", 9)
    elif kind == "accepts and never answers":
        server = socket.create_server(("127.0.0.1", 0))
        address = server.getsockname()
    elif kind == "has no address":
        address = ("no-such-host.invalid", 80)
    else:
        server = Server({"answers 500": 500, "answers 401": 401}.get(kind, 200))
        address = server.server_address
    yield f"http://{address[0]}:{address[1]}", server
    if server is not None:
        server.close() if isinstance(server, socket.socket) else server.server_close()


def befall(kind, server):
    """What comes upon a server, or W&B's own process, as a run goes on."""
    if kind == "dies on the way":
        server.shutdown()
        server.server_close()
    elif kind == "answers 403 on the way":
        server.status = 403
    elif "is killed" in kind:
        children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        pids = set(" ".join(path.read_text() for path in children).split())
        for pid in pids:  # one of which may be what is left of an earlier one
            if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core":
                os.kill(int(pid), signal.SIGKILL)
                wait_for(lambda stat=Path(f"/proc/{pid}/stat"): stat.read_text().rpartition(")")[2].split()[0] == "Z")


def log_a_run(folder, kind):
    """Log rows and a summary to a server in trouble; leave what was warned of."""
    os.chdir(folder)
    os.environ |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_SERVICE": FOREIGN_SERVICE}
    os.environ.pop("WANDB_SILENT", None)
    os.environ["WANDB_API_KEY"] = KEY
    silent = kind != "has no key, on a terminal"
    if not silent:
        del os.environ["WANDB_API_KEY"]
        _, terminal = pty.openpty()
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(terminal), mode) for mode in ("r", "w", "w"))
    with trouble(kind) as (url, server), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        os.environ["WANDB_BASE_URL"] = url
        limits = {"init_timeout": 2 if kind in BEFORE else PATIENCE, "finish_timeout": 2 if kind in LATER else PATIENCE}
        settings = wandb.Settings(silent=silent, console="off", finish_timeout_raises=True, **limits)
        best = {"min": ["train/mse"]}
        mode = "offline" if "offline" in kind else "online"
        logger = ResumableWandbLogger(save_dir=folder, project="p", id=ID, mode=mode, settings=settings, best=best)
        for row in range(ROWS):
            logger.log_metrics({"train/mse": 1.0 / (1 + (row - 2) ** 2)}, step=10 * row)
            if row == 1:
                befall(kind, server)
            if row == 3 and "twice" in kind:  # as soon as the first time was noticed, which may take some rows
                wait_for(lambda: said or logger.log_summary({"noticed": False}))
                befall(kind, server)
            if row == 0 and "picture" in kind:
                log_table(logger, "table", ["a"], [[1]], 0)
        logger.log_summary({"mse": 0.5})
        logger.finish()
        assert wandb.run is None
        (folder / "said.json").write_text(json.dumps([str(w.message) for w in said]))


BEFORE = (
    "refuses", "accepts and never answers", "has no address", "answers 500", "answers 401", "has no key, on a terminal",
)  # fmt: skip
LATER = ("dies on the way", "answers 403 on the way")
KILLED = ("W&B's process is killed", "W&B's process is killed, offline")
TWICE = "W&B's process is killed twice, after a picture, offline"


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """Folders of runs with each trouble, all at once."""
    folders = {kind: tmp_path_factory.mktemp("trouble") for kind in (*BEFORE, *LATER, *KILLED, TWICE)}
    started = {kind: processes.Process(target=log_a_run, args=(folder, kind)) for kind, folder in folders.items()}
    for process in started.values():
        process.start()
    for kind, process in started.items():
        process.join(PATIENCE)
        assert process.exitcode == 0, kind
    return folders


def test_a_run_that_comes_to_its_server_says_nothing(tmp_path):
    process = processes.Process(target=log_a_run, args=(tmp_path, "all is well"))
    process.start()
    process.join(PATIENCE)
    assert json.loads((tmp_path / "said.json").read_text()) == []
    (run,) = records(tmp_path / "wandb")
    assert len(rows_of(run)) == ROWS
    assert [path.name[:4] for path in (tmp_path / "wandb").glob("*run-*/")] == ["run-"]


@pytest.mark.parametrize("kind", [*BEFORE, *LATER, *KILLED])
def test_trouble_with_the_server_neither_stops_a_run_nor_loses_anything(troubled, kind):
    folder = troubled[kind]
    (said,) = json.loads((folder / "said.json").read_text())  # once
    (name,) = re.findall(r"upload it with: wandb sync (\S+)$", said)
    assert name.startswith("wandb/offline-run-") == (kind not in LATER), said
    if kind in BEFORE:  # the attempt leaves nothing
        assert [path.name for path in (folder / "wandb").glob("*run-*") if not path.is_symlink()] == [Path(name).name]
    (run,) = [run for run in records(folder / "wandb") if of_kind(run, "run") and len(rows_of(run)) == ROWS]
    assert [row["train/mse"] for row in rows_of(run)] == [0.2, 0.5, 1.0, 0.5, 0.2]
    assert [row["trainer/global_step"] for row in rows_of(run)] == [0, 10, 20, 30, 40]
    assert {"mse": 0.5} in [record.get("update") for record in of_kind(run, "summary")]
    assert [record["exit_code"] for record in of_kind(run, "exit")] == [0]
    assert of_kind(run, "run")[0]["run_id"] == ID


def test_a_run_that_w_and_b_leaves_twice_goes_on_without_it(troubled):
    first, second = json.loads((troubled[TWICE] / "said.json").read_text())
    (offline, other) = sorted(path.name for path in (troubled[TWICE] / "wandb").glob("offline-run-*"))
    assert f"tables and histograms so far stay in wandb/{offline}. Everything else is in wandb/{other}" in first
    assert list((troubled[TWICE] / "wandb" / offline).glob("files/media/table/table_*.json"))
    assert re.search(rf"failed again .* continues without it. Its data are in wandb/{other}$", second)


def log_offline(logger):
    """Numbers of all kinds, and what a user logs past the logger."""
    own = logger.experiment.log
    for row, value in enumerate((1, np.float32(2), torch.tensor(3.0), np.array(4), np.int64(5), True)):
        logger.log_metrics({"a": value}, step=row)
        for _ in range(row % 3):
            own({"own": float(row)})
        if row % 2:
            log_table(logger, "table", ["a"], [[row]], row)
    assert logger.rows == 6


def test_no_row_is_lost_to_what_is_logged_past_the_logger(tmp_path):
    logger = ResumableWandbLogger(save_dir=tmp_path, mode="offline", best={"min": ["a"]}, settings=QUIET)
    log_offline(logger)
    logger.finish()
    (run,) = records(tmp_path / "wandb")
    rows = rows_of(run)
    assert [(row["trainer/global_step"], row["a"]) for row in rows if "a" in row] == [*enumerate((1, 2, 3, 4, 5, 1))]
    assert [row["own"] for row in rows if "own" in row] == [1, 2, 2, 4, 5, 5]
    assert [row["trainer/global_step"] for row in rows if "table.path" in row] == [1, 3, 5]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert summary_in(tmp_path)["a"] == {"min": 1, "last": 1}


def test_a_folder_of_another_run_is_not_taken_for_a_failed_beginning(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = wandb.Settings(**QUIET, init_timeout=1, base_url="http://127.0.0.1:9", api_key=KEY)
    logger = ResumableWandbLogger(save_dir=tmp_path, mode="online", settings=settings)
    other, init = tmp_path / "wandb" / "run-20300101_000000-of-another", wandb.init

    def meanwhile(**options):
        other.mkdir(parents=True, exist_ok=True)
        return init(**options)

    monkeypatch.setattr(wandb, "init", meanwhile)
    with pytest.warns(UserWarning, match="W&B cannot be used"):
        logger.log_metrics({"a": 1.0}, step=0)
    logger.finish()
    assert other.is_dir()
    assert logger.version


def test_without_a_table_a_run_goes_on_from_its_row(tmp_path):
    logger = ResumableWandbLogger(save_dir=tmp_path, mode="offline", settings=QUIET)
    _resume_loggers([logger], 7)
    logger.log_metrics({"a": 1.0}, step=70)
    assert logger.rows == 8
    logger.finish()
    assert [row["_step"] for row in rows_of(records(tmp_path / "wandb")[0])] == [15]


def test_a_users_own_config_stays(tmp_path):
    logger = ResumableWandbLogger(
        save_dir=tmp_path,
        mode="offline",
        settings=QUIET,
        config={"note": "mine", "seed": 9},
        run_config={"seed": 1, "k": 2},
    )
    assert logger._wandb_init["config"] == {"seed": 9, "k": 2, "note": "mine"}


def test_a_truth_value_is_a_number_in_the_table(tmp_path):
    table = ResumableCSVLogger(tmp_path)
    table.log_metrics({"a": True, "b": np.float32(0.5)}, step=1)
    assert table.path.read_text() == "a,b,step\n1.0,0.5,1\n"
    assert table.read() == [({"a": 1.0, "b": 0.5}, 1)]


def test_a_mode_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="mode must be online, offline or disabled, got 'ofline'"):
        ResumableWandbLogger(mode="ofline")


@pytest.fixture
def composed(tmp_path):
    """Composes the config of a run as Hydra does; what Hydra knows is put back."""
    before = HydraConfig.instance().cfg

    def compose_it(*overrides):
        cfg = compose("config", overrides, return_hydra_config=True)
        cfg.hydra.runtime.output_dir = cfg.hydra.runtime.cwd = str(tmp_path)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg.hydra  # as it is when a task begins
        return cfg

    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        yield compose_it
    HydraConfig.instance().cfg = before


FOUND = RunState({})


def test_long_names_and_tags_are_cut(composed):
    options = wandb_options(cfg := composed(f"name={'n' * 200}", "logger.wandb.tags=mine"), cfg.logger.wandb, ID)
    assert options["tags"] == ["mine", "n" * 63 + "…", "gaussian"]
    assert options["name"] == options["group"] == "n" * 119 + "…"


def test_a_sweep_is_grouped_by_its_folder(composed):
    groups = []
    for folder in ("a/sweep", "b/sweep", "."):
        cfg = composed(f"hydra.sweep.dir={folder}", "hydra.mode=MULTIRUN", "+hydra.job.num=0")
        groups.append(wandb_options(cfg, cfg.logger.wandb, ID)["group"])
    assert groups[:2] == ["sweep a/sweep", "sweep b/sweep"]
    assert groups[2] == f"sweep {Path.cwd().parent.name}/{Path.cwd().name}"


def test_loggers_of_others_and_none_at_all(composed):
    lightnings = "logger.wandb._target_=pytorch_lightning.loggers.WandbLogger"
    (_, other) = _loggers(composed(lightnings, "logger.wandb.mode=disabled"), FOUND)
    other.log_metrics({"a": 1.0}, step=0)
    assert _loggers(composed("~logger"), FOUND) == []
    with pytest.raises(ValueError, match=r"logger\.board=\{save_dir:a\}: has no _target_: name its class"):
        _loggers(composed("+logger.board={save_dir: a}"), FOUND)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sweep of two jobs in one process; two processes, one of which cannot reach W&B. Their folders by seed."""
    folder = tmp_path_factory.mktemp("runs")
    own = (
        ("hydra.run.dir=three", "seed=3"),
        ("hydra.run.dir=four", "seed=4", "logger.mode=online", "replicas=2", "trainer.max_epochs=20"),
    )
    sweep = (
        "seed=1,2",
        "hydra.sweep.dir=both/sweep",
        "trainer.max_epochs=3",
        "logger.wandb.tags=[mine]",
        "report=false",
    )
    quick = ("logger.wandb.settings.init_timeout=2", f"logger.wandb.settings.finish_timeout={PATIENCE}")
    started = []
    for number, arguments in enumerate((("-m", *SMALL, *quick, *sweep), *((*SMALL, *quick, *one) for one in own))):
        (folder / str(number)).mkdir()
        process = processes.Process(target=run_unreachable, args=(folder / str(number), arguments))
        process.start()
        started.append(process)
    for number, process in enumerate(started):
        process.join(PATIENCE)
        assert process.exitcode == 0, (folder / str(number) / "err.txt").read_text()
    sweep = folder / "0" / "both" / "sweep"
    return {1: sweep / "0", 2: sweep / "1", 3: folder / "1" / "three", 4: folder / "2" / "four"}


def run_unreachable(folder, arguments):
    os.environ |= {"HOME": str(folder), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    run_the_command(folder, arguments)


def test_each_job_is_a_run_of_its_own_with_its_config(runs):
    assert len({of_kind(records(path / "wandb")[0], "run")[0]["run_id"] for path in runs.values()}) == 4
    for seed, path in runs.items():
        (run,) = records(path / "wandb")
        (described,) = of_kind(run, "run")
        assert described["job_type"] == "train"
        assert described["project"] == "lightning-mnn"
        begins = f"quickstart {seed - 1} num_samples=8," if seed < 3 else "quickstart num_samples=8,"
        assert described["display_name"].startswith(begins)
        assert f",seed={seed}" in described["display_name"]
        assert len(described["display_name"]) <= 120
        assert described["run_group"] == ("sweep both/sweep" if seed < 3 else "quickstart")
        assert described["tags"] == [*(["mine"] if seed < 3 else []), "quickstart", "gaussian"]
        config = described["config"]["update"]
        config.pop("_wandb")
        assert config["seed"] == seed
        assert config["optimizer"]["lr"] == 0.03
        assert config["data"].pop("name") == "gaussian"
        assert config["data"]["num_samples"] == 8
        assert config["model"] | {"name": "mnn", "hidden_dims": [8], "negative_slope": 0} == config["model"]
        assert config["callbacks"]["local_minimum_detector"]["schedule"] == {"every": 100, "unit": "epoch"}
        assert not {"optimizer", "schedule", "seed", "replicas"} & config["model"].keys()
        assert not {"run_dir", "logger", "hidden_dims", "input_dim"} & config.keys()
        text = json.dumps(config)
        assert "_target_" not in text
        assert str(path.parent) not in text
        assert "run.dir" not in text
        assert not of_kind(run, "config"), "there is a second copy"


def test_the_summary_keeps_the_best_and_the_last_of_what_is_logged(runs):
    shown = summary_in(runs[3])
    results = json.loads((runs[3] / "summary.json").read_text())
    series = read_metrics(runs[3] / "metrics.csv")
    assert results["kind"] == "differentiable_minimum"
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        best = compose("config", return_hydra_config=True).logger.wandb.best
    directed = {name: direction for direction, names in best.items() for name in names}
    directed = {name: direction for name, direction in directed.items() if not name.startswith("test/")}
    assert directed.keys() <= series.keys()
    for name, (_, values) in series.items():
        kept = {"min": min, "max": max}[directed[name]](values) if name in directed else None
        last = values[-1]
        expected = last if kept is None else {directed[name]: kept, "last": last}
        assert shown.pop(name) == pytest.approx(expected, rel=1e-12), name
    assert results.pop("finished") is True
    known = {key: value for key, value in results.items() if value is not None}
    assert {key: shown.get(key) for key in known} == known
    others = {key for key in shown.keys() - results.keys() if not key.startswith(("_", "volume/units"))}
    assert others == {"trainer/global_step", "figure", "verdict"}
    (run,) = records(runs[3] / "wandb")
    defined = {record.get("name", record.get("glob_name")): record for record in of_kind(run, "metric")}
    assert {defined[name]["step_metric"] for name in directed} == {"trainer/global_step"}


def test_figure_and_table_are_logged_with_a_row_a_replica(runs):
    for seed, replicas in ((3, 1), (4, 2)):
        results = json.loads((runs[seed] / "summary.json").read_text())
        assert list(runs[seed].glob("wandb/offline-run-*/files/media/images/figure_*.png"))
        (path,) = runs[seed].glob("wandb/offline-run-*/files/media/table/verdict_*.table.json")
        table = json.loads(path.read_text())
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert [(row["replica"], row["seed"]) for row in rows] == [(r, seed + r) for r in range(replicas)]
        listed = [[row[key] for row in rows] for key in ("mse", "kind", "rank_cap")]
        single = [results[key] if replicas > 1 else [results[key]] for key in ("mse", "kind", "rank_cap")]
        assert listed == single


def test_an_unreachable_server_does_not_stop_a_command(runs):
    err = (runs[4].parent / "err.txt").read_text()
    assert err.count("the run continues offline") == 1
    assert err.count("W&B") == 1
    assert "wandb sync four/wandb/offline-run-" in err
    (run,) = records(runs[4] / "wandb")
    logged = [row for row in rows_of(run) if "train/mse" in row]
    assert [row["train/mse"] for row in logged] == read_metrics(runs[4] / "metrics.csv")["train/mse"][1]
    assert "upload" not in (runs[3].parent / "err.txt").read_text()


def test_only_the_first_process_talks_to_wandb(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = ResumableWandbLogger(save_dir=tmp_path, mode="offline")
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_summary({"a": 1.0})
    logger.experiment.log({"a": 1.0})
    logger.finish()
    assert not list(tmp_path.iterdir())


def test_directions_are_least_and_greatest():
    with pytest.raises(
        ValueError, match=r"best must have the keys min and max, lists of names, got \{'least': \['a'\]\}"
    ):
        ResumableWandbLogger(best={"least": ["a"]})


def test_settings_by_reference_are_shown_where_they_act(composed):
    cfg = composed("experiment=table_1", "data=cifar10")
    settings = wandb_settings(cfg, HydraConfig.get().runtime.choices)
    assert settings["optimizer"]["lr"] == 0.02
    assert settings["trainer"]["max_epochs"] == 300
    assert settings["model"]["hidden_dims"] == [16]
    assert settings["data"] | {"name": "cifar10", "whiten": 1e-6} == settings["data"]
    assert not {"row", "table_1", "seed"} & {*settings["data"], *settings.keys() - {"seed"}}
