"""Commands that are to be refused, run in this process by the entry that the console script calls."""

import logging
import shlex
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from lightning_mnn import app


def refused_line(command, monkeypatch, capfd, code=1):
    """The one line that a command says, which is to end with an exit code."""
    monkeypatch.setattr(sys, "argv", ["lightning-mnn", *shlex.split(command)])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    hydra_config = HydraConfig.instance().cfg
    capfd.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            app.main()
    finally:  # what a process has once
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = hydra_config
        for handler in {*logging.getLogger().handlers} - {*handlers}:
            handler.close()  # or its file would be complained of at any time, also in another command's lines
        logging.getLogger().handlers, logging.getLogger().level = handlers, level
    said = capfd.readouterr()
    assert (ended.value.code, said.out) == (code, ""), (ended.value.code, said)
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    return line
