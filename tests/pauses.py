"""Places where a run waits, so that a test can send it a signal there: each is called in the process of the run.

What waits leaves a file ``paused`` in its folder. It waits as the work in its place does: for ever, but for the points
at which that may be stopped.
"""

import os
import time
from pathlib import Path

import torch

from lightning_mnn import MNN
from lightning_mnn.callbacks.evidence import certificate, certification
from lightning_mnn.callbacks.volumes import cones
from lightning_mnn.runs.processes import watch
from lightning_mnn.utilities.interruption import safe_point

STEP = 20  # after which training is slow


def in_training():
    """Slow steps."""
    step = MNN.training_step

    def slow(self, *args):
        if self.trainer.global_step >= STEP:
            Path("paused").touch()
            time.sleep(0.1)
        return step(self, *args)

    MNN.training_step = slow


def in_certificate():
    """In a certificate between the start and the end of training."""
    certify, certify_training_set = certification.certify, certificate.certify_training_set
    steps = []

    def of_run(trainer, *args):
        steps.append(trainer.global_step)
        return certify_training_set(trainer, *args)

    def paused(*args, process_group=None, **options):
        while steps[-1]:
            Path("paused").touch()
            _wait(process_group)
        return certify(*args, process_group=process_group, **options)

    certificate.certify_training_set, certification.certify = of_run, paused


def on_shards():
    """Nowhere: samples are certified on where they are."""
    certification._MAX_GATHERED = 0


def in_certificate_on_shards():
    """In a certificate, on all processes."""
    on_shards()
    in_certificate()


def in_volume():
    """In the volume at the end."""

    def paused(*_, **__):
        Path("paused").touch()
        while True:
            _wait()

    cones.region_log_volume = paused


def in_volume_on_shards():
    """The same where samples are certified on where they are."""
    on_shards()
    in_volume()


def in_job_of_slurm():
    """In training, in a job of SLURM's whose ``scontrol`` is in the folder."""
    in_training()
    os.environ |= {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "PATH": f".:{os.environ['PATH']}"}


def for_ever():
    """In a step, where nothing can be stopped; a second signal counts at once, and patience is short."""
    watch._AGAIN, watch._PATIENCE = 0.0, 3.0

    def stuck(*_):
        Path("paused").touch()
        while True:
            time.sleep(0.01)

    MNN.training_step = stuck


def _wait(process_group=None):
    time.sleep(0.01)
    safe_point()
    if process_group is not None:
        process_group.sum(torch.zeros(1))
