"""The W&B workspace: every name in it is one that a real run logs; it is saved, or printed without an account."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from lightning_mnn.tasks.dashboard import dashboard, to_json, workspace
from tests.children import command
from tests.wandb_files import records_of

pytest.importorskip("wandb_workspaces")

# One run that logs all there is: it ends by a certificate, and the volume of its region is measured.
EVERYTHING = (
    "data.num_samples=24",
    "data.num_test=8",
    "data.input_dim=6",
    "model.hidden_dims=[16]",
    "trainer.max_epochs=60",
)


def settings(*overrides):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        return compose("config", ["task=dashboard", "run_dir=.", *overrides])


def panels(view):
    return [panel for part in view["spec"]["section"]["panelBankConfig"]["sections"] for panel in part["panels"]]


def flat(tree, prefix=""):
    """Names of what is in a tree, with those of its branches: a.b, a and b's."""
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Names of the history, the summary and the config of a real run, read by W&B's own reader."""
    folder = tmp_path_factory.mktemp("logged")
    command(folder, *EVERYTHING, "hydra.run.dir=run", "logger.mode=offline")
    (run,) = (folder / "run" / "wandb").glob("offline-run-*")
    names = {"history": set(), "summary": set(), "config": set()}
    for record in records_of(run):
        kind = record["type"]
        if kind == "history":
            names[kind] |= set(record[kind]["item"])
        elif kind == "summary":
            names[kind] |= set(flat(record[kind]["update"]))
        for config in (record["run"].get("config") if kind == "run" else record[kind] if kind == "config" else None,):
            names["config"] |= set(flat((config or {}).get("update", {})))
    for key in list(names["history"]):  # a histogram or a picture is a branch
        names["history"].add(key.rpartition(".")[0])
    return names


def named(view):
    """What a workspace names: pairs of (history, summary or config, name)."""
    for panel in panels(view):
        config = panel["config"]
        where = "summary" if panel["viewType"] == "Bar Chart" else "history"
        for name in (*config.get("metrics", ()), *config.get("mediaKeys", ())):
            yield where, name
        if "groupBy" in config:
            yield accessor(f"config:{config['groupBy']}")
        if "targetKey" in config:
            yield "summary", config["targetKey"]
        columns = [column["accessor"] for column in config.get("columns", ())]
        for axis in (*(config[key] for key in ("xAxis", "yAxis", "zAxis") if key in config), *columns):
            yield accessor(axis)
    (runs,) = view["spec"]["section"]["runSets"]
    for column in runs["runFeed"]["columnPinned"]:
        if column != "run:displayName":
            yield accessor(column)
    yield "history", view["spec"]["section"]["settings"]["xAxis"]


def accessor(text):
    """Of `summary:mse`, `config:model.value.negative_slope` or the name of a curve."""
    kind, colon, name = text.partition(":")
    if not colon:
        return "history", text
    return (kind, ".".join(part for part in name.split(".") if part != "value")) if kind == "config" else (kind, name)


def test_every_name_is_one_that_a_run_logs(logged, capsys):
    dashboard(settings("dry_run=true"))
    view = json.loads(capsys.readouterr().out)
    found = list(named(view))
    assert {kind for kind, _ in found} == {"history", "summary", "config"}
    assert not [(kind, name) for kind, name in found if name not in logged[kind]]
    assert [name for name in ("train/mse", "volume/units", "figure") if ("history", name) not in found] == []
    titles = [part["name"] for part in view["spec"]["section"]["panelBankConfig"]["sections"]]
    assert titles == ["training", "minima", "patterns", "volumes", "comparison"]
    curves = {panel["viewType"] for panel in panels(view)}
    assert curves >= {
        "Run History Line Plot",
        "Scatter Plot",
        "Parallel Coordinates Plot",
        "Bar Chart",
        "Media Browser",
    }
    assert (view["entity"], view["project"]) == ("", "lightning-mnn")


def test_it_is_printed_without_a_logger_and_leaves_nothing(capfd):
    dashboard(settings("dry_run=true", "~logger", "dashboard.project=mine", "dashboard.entity=us"))
    out, err = capfd.readouterr()
    assert (json.loads(out)["entity"], json.loads(out)["project"], err) == ("us", "mine", "")
    assert not list(Path().iterdir())


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that speaks as much of W&B's protocol as saving needs; what it was sent."""
    sent = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if b"upsertView" in body:
                sent.append(json.loads(body)["variables"])
            view = {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}
            viewer = {"id": "1", "entity": "somebody", "username": "somebody", "flags": "{}", "teams": {"edges": []}}
            answer = json.dumps({"data": {"viewer": viewer, "upsertView": view}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", sent
    listening.shutdown()
    listening.server_close()


def test_it_is_saved_where_the_runs_go_and_its_address_is_printed(server, tmp_path):
    url, sent = server
    arguments, environment = ("task=dashboard", "logger.wandb.project=sweeps"), {"WANDB_BASE_URL": url}
    refused = command(tmp_path, *arguments, expect=1, environment=environment)
    assert refused.startswith("error: W&B has no account here: run wandb login, or give dry_run=true")
    assert "Traceback" not in refused
    assert not sent

    command(tmp_path, *arguments, environment=environment | {"WANDB_API_KEY": "a" * 40})
    assert Path("out.txt").read_text() == f"saved: {url}/somebody/sweeps?nw=abc\n"
    (view,) = sent
    assert (view["entityName"], view["projectName"]) == ("somebody", "sweeps")
    saved, asked = {"spec": json.loads(view["spec"])}, json.loads(to_json(workspace("somebody", "sweeps", "any")))
    assert [panel["config"] for panel in panels(saved)] == [panel["config"] for panel in panels(asked)]


def test_what_is_missing_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    for overrides in ((), ("dry_run=true",)):
        with pytest.raises(ValueError, match=r"pip install lightning-mnn\[dashboard\]"):
            dashboard(settings(*overrides))
    with pytest.raises(ValueError, match=r"give dashboard.project=NAME"):
        dashboard(settings("~logger.wandb"))
