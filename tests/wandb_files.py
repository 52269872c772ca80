"""What W&B keeps of a run in its folder, read by W&B's own reader."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(sys.executable).with_name("wandb")


def records_of(run, *, whole=True):
    """The records of a run's file, in the form in which ``wandb leet inspect`` prints them.

    Args:
        run: the file, or a folder that holds no other.
        whole: whether the file must not be cut off. Else the records before that are returned.
    """
    if not has_inspector():
        return list(_older_records(run, whole=whole))
    done = subprocess.run([TOOL, "leet", "inspect", "--json", run], capture_output=True, text=True, check=whole)
    return [json.loads(line) for line in done.stdout.splitlines()]


def summary_of(run):
    """The summary of a run with all of its updates."""
    if has_inspector():
        arguments = [TOOL, "leet", "inspect", "--summary", "--json", run]
        return json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)["summary"]
    summary = {}
    for record in _older_records(run, named=_set_within):
        if record["type"] == "summary":
            _merge(summary, record["summary"].get("update", {}))
    return summary


@functools.cache
def has_inspector():
    """Whether W&B has the command, and it can print JSON: since W&B 0.31."""
    return b"--json" in subprocess.run([TOOL, "leet", "inspect", "--help"], capture_output=True, check=False).stdout


def _set_flat(tree, path, value):
    tree[".".join(path)] = value


def _set_within(tree, path, value):
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _merge(tree, update):
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _older_records(run, *, whole=True, named=_set_flat):
    """The records of a run's file, by the reader in Python that W&B has until 0.29."""
    module = pytest.importorskip("wandb.sdk.internal.datastore", reason="W&B 0.30 has no reader that can be used")
    import wandb
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = Path(run).glob("run-*.wandb") if Path(run).is_dir() else [run]
    wandb.teardown()  # its process writes the last records after the run has finished
    store = module.DataStore()
    store.open_for_scan(str(path))
    try:
        while (data := store.scan_data()) is not None:
            read = Record.FromString(data)
            record = MessageToDict(read, preserving_proto_field_name=True)
            kind = record["type"] = read.WhichOneof("record_type")
            record.setdefault(kind, {})
            if kind == "exit":
                record[kind]["exit_code"] = read.exit.exit_code  # also 0, the default
            for part in (record[kind], record[kind].get("config", {})):
                for name in {"item", "update"} & part.keys():
                    part[name] = _tree(part[name], named)
            yield record
    except AssertionError:
        if whole:
            raise
    finally:
        store._fp.close()


def _tree(items, named):
    tree = {}
    for item in items:
        named(tree, item.get("nested_key") or [item["key"]], json.loads(item["value_json"]))
    return tree
