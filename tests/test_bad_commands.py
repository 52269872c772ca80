"""Mistakes at the command line: one line that names key, value and remedy, and nothing is left behind.

Most run in this process, by the entry that the console script calls.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.bad_commands import refused_line

USAGE = 2  # exit code for options; 1 for all else

# A command, and what its line holds: the key with its value, then words of what is wrong or what to do.
VALUES = [
    # types
    ("seed=abc", "seed=abc: must be a whole number", "seed=0"),
    ("seed=1.5", "seed=1.5: must be a whole number", "seed=0"),
    ("seed=1e30", "seed=1e30: must be a whole number", "seed=0"),
    ("seed=null", "seed=null: must be a whole number", "seed=0"),
    ("'seed=1 2'", "seed=1 2: must be a whole number", "seed=0"),
    ("threads=abc", "threads=abc: must be a whole number or null", "leave threads out"),
    ("threads=1.5", "threads=1.5: must be a whole number or null", "leave threads out"),
    ("replicas=1e9", "replicas=1e9: must be a whole number", "replicas=1"),
    ("replicas=null", "replicas=null: must be a whole number", "replicas=1"),
    ("dtype=null", "dtype=null: must be a text", "dtype=float64"),
    ("dry_run=maybe", "dry_run=maybe: must be true or false", "dry_run=false"),
    ("optimizer.lr=abc", "optimizer.lr=abc: must be a number", "optimizer.lr=0.01"),
    ("optimizer.lr=null", "optimizer.lr=null: must be a number", "optimizer.lr=0.01"),
    ("optimizer={lr:abc}", "optimizer.lr=abc: must be a number", "optimizer.lr=0.01"),
    ("optimizer.betas=[0.9,abc]", "optimizer.betas=[0.9,abc]: must be a list of numbers", "leave optimizer.betas out"),
    ("optimizer.fused=maybe", "optimizer.fused=maybe: must be true or false or null", "optimizer.fused=true"),
    ("optimizer=sgd optimizer.momentum=abc", "optimizer.momentum=abc: must be a number", "optimizer.momentum=0.9"),
    ("optimizer=lbfgs optimizer.max_iter=1.5", "optimizer.max_iter=1.5: must be a whole number", "max_iter=20"),
    ("schedule.hold=abc", "schedule.hold=abc: must be a number", "schedule.hold=0.5"),
    ("model.negative_slope=abc", "model.negative_slope=abc: must be a number", "model.negative_slope=0.0"),
    ("model.negative_slope=null", "model.negative_slope=null: must be a number", "model.negative_slope=0.0"),
    ("model.regression=maybe", "model.regression=maybe: must be true or false", "model.regression=false"),
    ("model.threshold=abc", "model.threshold=abc: must be a number or null", "leave model.threshold out"),
    ("model.hidden_dims=[1.5]", "model.hidden_dims=[1.5]: must be a list of whole numbers", "leave"),
    ("model.input_dim=abc", "model.input_dim=abc: must be a whole number or null", "leave model.input_dim out"),
    ("data.num_samples=abc", "data.num_samples=abc: must be a whole number", "data.num_samples=320"),
    ("data.shuffle=maybe", "data.shuffle=maybe: must be true or false", "data.shuffle=true"),
    ("data.batch_size=1.5", "data.batch_size=1.5: must be a whole number or null", "leave data.batch_size out"),
    ("data=mnist data.whiten=abc", "data.whiten=abc: must be a number or null", "leave data.whiten out"),
    ("data=mnist data.download=maybe", "data.download=maybe: must be true or false", "data.download=false"),
    ("data=image_folder data.workers=abc", "data.workers=abc: must be a whole number or null", "leave"),
    ("trainer.max_epochs=abc", "trainer.max_epochs=abc: must be a whole number or null", "trainer.max_epochs=2000"),
    ("trainer.max_epochs=1.5", "trainer.max_epochs=1.5: must be a whole number or null", "trainer.max_epochs=2000"),
    ("trainer.log_every_n_steps=abc", "trainer.log_every_n_steps=abc: must be a whole number", "=10"),
    ("+trainer.max_steps=abc", "trainer.max_steps=abc: must be a whole number", "leave it out"),
    (
        "+trainer.limit_train_batches=abc",
        "trainer.limit_train_batches=abc: must be a whole number or a number",
        "leave",
    ),
    (
        "experiment=figure_5_1 scan.max_epochs=abc",
        "scan.max_epochs=abc: must be a whole number",
        "scan.max_epochs=2000",
    ),
    ("experiment=figure_5_2 scan.input_dims=abc", "scan.input_dims=abc: must be a list of 1 or more different widths"),
    ("experiment=figure_5_2 scan.ratios=[true]", "scan.ratios=[true]: must be a list of numbers", "leave"),
    ("experiment=census census.max_nodes=abc", "census.max_nodes=abc: must be a whole number", "=20000"),
    (
        "experiment=census census.negative_slopes=[abc]",
        "census.negative_slopes=[abc]: must be a list of numbers",
        "leave",
    ),
    ("task=null", "task=null: must be a text", "task=train"),
    # ranges
    ("seed=-1", "seed=-1: must not be negative", "such as 0"),
    ("threads=0", "threads=0: must be at least 1 and a whole number"),
    ("threads=-1", "threads=-1: must be at least 1 and a whole number"),
    ("threads=100000", "threads=100000: must be at most", "processors"),
    ("replicas=0", "replicas=0: must be at least 1 and a whole number"),
    ("dtype=float16", "dtype=float16: must be one of float32, float64"),
    ("optimizer.lr=-1", "optimizer.lr=-1: must be a number, at least 0"),
    ("optimizer.lr=nan", "optimizer.lr=nan: must be a number, at least 0"),
    ("optimizer.betas=0.9", "optimizer.betas=0.9: must be two numbers, at least 0 and below 1", "[0.9, 0.999]"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be two numbers", "[0.9, 0.999]"),
    ("optimizer.betas=[0.9,2]", "optimizer.betas=[0.9,2]: must be a number, at least 0 and below 1"),
    ("optimizer.eps=-1", "optimizer.eps=-1: must be a number, at least 0"),
    ("optimizer.name=newton", "optimizer.name=newton: must be one of adadelta, adafactor, adagrad, adam"),
    (
        "model.frozen=[weights]",
        "model.frozen=[weights]: names no parameter",
        "choose from output_weights, hidden_weights.0",
    ),
    ("optimizer.name=sgd optimizer.betas=[0.9,0.9]", "optimizer.betas=[0.9,0.9]: is no argument of sgd", "it has lr"),
    ("+optimizer.foo=1", "optimizer.foo=1: is no argument of adam", "leave it out; it has lr, betas"),
    ("optimizer=sgd optimizer.momentum=0", "optimizer.nesterov=true: needs a momentum above 0", "or choose false"),
    ("optimizer=lbfgs optimizer.line_search_fn=x", "optimizer.line_search_fn=x: must be one of null, strong_wolfe"),
    ("optimizer=lbfgs replicas=2", "replicas=2: must be 1 with the optimizer lbfgs", "choose adam or sgd"),
    ("schedule.hold=2", "schedule.hold=2: must be a number, at least 0 and below 1"),
    ("schedule=one_cycle schedule.warmup=3", "schedule.warmup=3: must be a number, at least 0 and below 1"),
    ("schedule=constant +schedule.hold=0.5", "schedule.hold=0.5: is no argument of constant", "leave it out"),
    ("model.negative_slope=1", "model.negative_slope=1: must be a real number other than 1", "choose 0 for ReLU"),
    ("model.negative_slope=inf", "model.negative_slope=inf: must be a real number other than 1", "choose 0 for ReLU"),
    ("model.hidden_dims=[]", "model.hidden_dims=[]: must be a list of one or more widths", "as [40] or [40,20]"),
    ("model.hidden_dims=20", "model.hidden_dims=20: must be a list of one or more widths", "as [40] or [40,20]"),
    ("model.hidden_dims=[0]", "model.hidden_dims=[0]: must be at least 1 and a whole number"),
    ("model.input_dim=7", "model.input_dim=7: must match the data, which have 40 inputs"),
    ("data.num_samples=0", "data.num_samples=0: must be at least 1 and a whole number"),
    ("data.labels=abc", "data.labels=abc: must be one of plus_minus, zero_one, teacher"),
    ("data.num_test=-1", "data.num_test=-1: must be at least 0 and a whole number"),
    ("data.label_noise=2", "data.label_noise=2: must be a number, at least 0 and at most 1"),
    ("data.random_labels=maybe", "data.random_labels=maybe: must be true or false", "data.random_labels=false"),
    ("data=gaussian_teacher data.label_noise=0.1", "data.label_noise=0.1: needs targets with two labels", "leave it"),
    ("data=mnist data.num_samples=9 replicas=2", "data.num_samples=9: needs replicas=1", "train the seeds one by one"),
    ("data=arrays", "data.file=???: has no value", "give data.file=VALUE"),
    ("data.batch_size=0", "data.batch_size=0: must be at least 1 and a whole number"),
    ("data=mnist data.part=abc", "data.part=abc: must be one of all, test, train"),
    ("data=mnist data.residency=disk", "data.residency=disk: must be one of auto, memory, stream"),
    ("data=mnist data.storage=int8", "data.storage=int8: must be one of null, bfloat16, float16, float32"),
    ("data=mnist data.whiten=-1", "data.whiten=-1: must be a finite number that is not negative, or null"),
    ("data=mnist data.groups=[[0],[0]]", "data.groups=[[0],[0]]: must be two lists of classes", "[[cat, cow], [dog]]"),
    ("data=mnist data.groups=[[0],[cat]]", "data.groups=[[0],[cat]]: must not contain ['cat']", "name classes 0 to 9"),
    ("data=image_folder data.root=. data.size=0", "data.size=0: must be at least 1 and a whole number"),
    ("data=image_folder data.root=. data.colour=hsv", "data.colour=hsv: must be one of grey, rgb"),
    ("data=image_folder data.root=. data.classes=cat", "data.classes=cat: must be a list of names", "as [cat, dog]"),
    ("trainer.max_epochs=0", "trainer.max_epochs=0: must be at least 1", "trainer.max_epochs=2000"),
    ("trainer.max_epochs=-5", "trainer.max_epochs=-5: must be at least 1", "trainer.max_epochs=2000"),
    ("trainer.max_epochs=null", "schedule.name=exponential_tail: needs the length of the run", "choose constant"),
    ("trainer.log_every_n_steps=-1", "trainer.log_every_n_steps=-1: must be at least 0 and a whole number"),
    ("+trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0: must be at least 1"),
    ("+trainer.precision=abc", "trainer.precision=abc: Precision 'abc' is invalid", "Allowed precision values"),
    ("+trainer.gradient_clip_val=abc", "trainer.gradient_clip_val=abc: must be a whole number or a number", "leave"),
    ("+trainer.fast_dev_run=abc", "trainer.fast_dev_run=abc: must be a whole number or true or false", "leave it out"),
    ("+trainer.max_time=abc", "trainer.max_time=abc", "DD:HH:MM:SS"),
    ("+trainer.max_step=5", "trainer.max_step=5: Trainer has no such argument", "max_steps"),
    # devices
    ("trainer.devices=0", "trainer.devices=0: must be a positive number or auto", "trainer.devices=1"),
    ("trainer.devices=abc", "trainer.devices=abc: must be a positive number or auto", "trainer.devices=1"),
    ("trainer.devices=1.5", "trainer.devices=1.5: must be a positive number or auto", "trainer.devices=1"),
    ("trainer.devices=-2", "trainer.devices=-2: must be a positive number or auto", "trainer.devices=1"),
    ("trainer.devices=[]", "trainer.devices=[]: must be a positive number or auto", "trainer.devices=1"),
    ("trainer.accelerator=abc", "trainer.accelerator=abc", "Available names are"),
    ("trainer.strategy=abc", "trainer.strategy=abc", "Example choices"),
    ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn: trains in processes whose", "set trainer.strategy=ddp"),
    ("trainer.num_nodes=2", "trainer.num_nodes=2: needs a cluster", "choose hydra/launcher=slurm"),
    ("trainer.num_nodes=0", "trainer.num_nodes=0: must be at least 1 and a whole number"),
    # sizes that cannot be allocated
    ("replicas=1000000000", "replicas=1000000000: needs", "GiB for the", "choose a smaller value"),
    ("model.hidden_dims=[1000000000000]", "model.hidden_dims=[1000000000000]: needs", "GiB for"),
    ("data.num_samples=1000000000000", "data.num_samples=1000000000000: needs", "GiB for the inputs"),
    ("data.input_dim=100000000000", "data.input_dim=100000000000: needs", "GiB for the"),
    (
        "model.hidden_dims=[300000000] data.input_dim=1 data.num_samples=100000",
        "model.hidden_dims=[300000000]: needs",
        "GiB",
    ),
    # callbacks and loggers
    (
        "callbacks.local_minimum_detector.schedule.every=abc",
        "local_minimum_detector.schedule.every=abc: must be at least 1",
    ),
    (
        "callbacks.local_minimum_detector.schedule.every=0",
        "local_minimum_detector.schedule.every=0: must be at least 1",
    ),
    ("callbacks.angular_volume_monitor.schedule.unit=day", "monitor.schedule.unit=day: must be one of epoch, step"),
    (
        "callbacks.activation_pattern_recorder.schedule.growth=1",
        "recorder.schedule.growth=1: must be a number, above 1",
    ),
    ("callbacks.local_minimum_detector.patience=abc", "local_minimum_detector.patience=abc: must be at least 1"),
    ("callbacks.local_minimum_detector.polish=maybe", "local_minimum_detector.polish=maybe: must be true or false"),
    ("callbacks.local_minimum_detector.max_distance=abc", "detector.max_distance=abc: must be a number, at least 0"),
    ("callbacks.angular_volume_monitor.epsilon=2", "monitor.epsilon=2: must be a number, at least 0 and at most 1"),
    ("callbacks.angular_volume_monitor.measure=end", "monitor.measure=end: must contain any of start", "as [end]"),
    ("callbacks.angular_volume_monitor.cones.budget=abc", "cones.budget=abc: must be a number, above 0", "measure=[]"),
    (
        "callbacks.activation_pattern_recorder.probe=abc",
        "recorder.probe=abc: must be a number of samples",
        "such as 32",
    ),
    ("callbacks.activation_pattern_recorder.seed=-1", "recorder.seed=-1: must not be negative", "such as 0"),
    ("callbacks.checkpoint.train_time_interval.minutes=abc", "train_time_interval.minutes=abc: unsupported type"),
    ("callbacks.checkpoint.train_time_interval.minutes=-1", "train_time_interval", "must not be negative", "0 saves"),
    ("+callbacks.local_minimum_detector.foo=1", "detector.foo=1: LocalMinimumDetector has no such argument", "it has"),
    ("+callbacks.mine=1", "callbacks.mine=1: has no _target_", "callbacks.mine={_target_: package.Class"),
    ("+callbacks.mine._target_=no.Such", "callbacks.mine._target_=no.Such: cannot be imported", "package.module.Class"),
    ("logger.mode=abc", "logger.mode=abc: must be online, offline or disabled"),
    ("'+logger.mine={a: 1}'", "logger.mine={a:1}: has no _target_", "logger.mine={_target_: package.Class"),
    ("+logger.mine._target_=no.Such", "logger.mine._target_=no.Such: cannot be imported", "package.module.Class"),
    ("logger.wandb.settings.init_timeout=abc", "logger.wandb.settings.init_timeout=abc", "valid number"),
    (
        "model._target_=lightning_mnn.MNM",
        "model._target_=lightning_mnn.MNM: cannot be imported",
        "package.module.Class",
    ),
    # what does not go together
    ("resume=yes", "resume=yes: must be true or false", "resume=true"),
    ("resume=true ckpt_path=a", "ckpt_path=a: starts a new run", "leave one of them out"),
    ("name=a/b", "name=a/b: must be the name of one folder in outputs", "hydra.run.dir"),
    ("name=", "name='': must be the name of one folder in outputs", "hydra.run.dir"),
    (
        "task=fly",
        "task=fly: there is no such task",
        "task=census|dashboard|evaluate|interpolators|report|scan|slice|train",
    ),
    ("task=scan", "task=scan: has no settings", "experiment=figure_5_1|figure_5_2"),
    ("task=census", "task=census: has no settings", "experiment=census"),
    ("experiment=census census=null", "task=census: has no settings", "experiment=census"),
    (
        "experiment=table_1 data=gaussian",
        "data=gaussian: experiment=table_1 has no settings for it",
        "data=mnist|cifar10",
    ),
    (
        "experiment=census threads=2",
        "threads=2: each worker process of task=census uses one thread",
        "census.processes",
    ),
    ("experiment=census replicas=3", "replicas=3: task=census does not use it", "replicas=1"),
    ("experiment=census data=mnist", "data: task=census does not use it", "leave data out"),
    ("experiment=census debug=fast", "debug=fast: sets trainer", "choose debug=limit"),
    ("experiment=figure_5_2 trainer=cpu", "trainer: task=scan does not use it", "leave trainer out"),
    # experiments in parts
    ("experiment=census census.parts=0", "census.parts=0: must be at least 1 and a whole number"),
    ("experiment=census census.processes=0", "census.processes=0: must be at least 1 and a whole number"),
    (
        "experiment=census census.epsilons=[2]",
        "census.epsilons=[2]: must be a number, at least 0 and below 1",
        "fraction",
    ),
    ("experiment=census census.epsilons=[]", "census.epsilons=[]: must be a list of 1 or more different numbers"),
    ("experiment=census census.labels=abc", "census.labels=abc: must be one of plus_minus, zero_one"),
    (
        "experiment=census census.scans.width.sizes=[[1,2]]",
        "census.scans.width.sizes=[[1,2]]: must contain",
        "[N, d0, d1]",
    ),
    ("experiment=census census.scans.width.num_regions=0", "census.scans.width.num_regions=0: must be at least 1"),
    ("experiment=census census.splitting.runs=1", "census.splitting.runs=1: must be at least 2", "spread"),
    ("experiment=census seed=-1", "seed=-1: must not be negative", "such as 0"),
    ("experiment=figure_5_1 scan.input_dims=[0]", "scan.input_dims=[0]: must be at least 1 and a whole number"),
    ("experiment=figure_5_1 scan.hidden_layers=[3]", "scan.hidden_layers=[3]: must be [1], [2] or [1,2]"),
    ("experiment=figure_5_1 scan.ratios=[-1]", "scan.ratios=[-1]: must be a number, above 0"),
    ("experiment=figure_5_1 scan.ratios=[0.001]", "scan.ratios=[0.001]: must not contain 0.001", "use wider networks"),
    ("experiment=figure_5_1 scan.samples_per=abc", "scan.samples_per=abc: must be one of square, parameter"),
    ("experiment=figure_5_1 scan.figure=abc", "scan.figure=abc: must be one of error, minima"),
    ("experiment=figure_5_1 optimizer.lr=abc", "optimizer.lr=abc: must be a number", "optimizer.lr=0.01"),
]

# Data of the user's own.
ARRAYS = [
    ("data=arrays data.file=no.npz", "data.file=no.npz: is not a file", "give the path of an existing one"),
    ("data=arrays data.file=folder", "data.file=folder: must be a file .npz, .csv, .parquet", "save the data as one"),
    ("data=arrays data.file=broken.npz", "data.file=broken.npz: cannot be read", "save it again by numpy.savez"),
    ("data=arrays data.file=keys.npz", "data.file=keys.npz: lacks targets, it has inputs, labels", "an .npz file has"),
    (
        "data=arrays data.file=shape.npz",
        "data.file=shape.npz: targets must have shape (4,), got (3,)",
        "one target for",
    ),
    ("data=arrays data.file=nan.npz", "data.file=nan.npz: inputs must not contain NaN or infinity", "remove"),
    ("data=arrays data.file=one.npz", "data.file=one.npz: targets must not all be equal, got 1.0", "nothing to learn"),
    ("data=arrays data.file=text.npz", "data.file=text.npz: targets must be two labels, and there are 3", "map the"),
    ("data=arrays data.file=objects.npz", "data.file=objects.npz: cannot be read", "without Python objects"),
    ("data=arrays data.file=real.npz", "labels are not binary", "(model.regression=true)"),
    ("data=arrays data.file=good.npz data.target=a", "data.target=a: has no meaning for an .npz file", "leave it out"),
    ("data=arrays data.file=good.npz data.num_samples=5", "data.num_samples=5: must be at most 4"),
    ("data=arrays data.file=t.csv", "data.target=null: must name the column of the targets", "it has a, b"),
    ("data=arrays data.file=t.csv data.target=c", "data.target=c: is no column of t.csv", "it has a, b"),
]

# What Hydra cannot compose, or would not understand.
COMPOSITION = [
    ("optimizer=adamx", "optimizer=adamx: there is no such option", "choose optimizer=adam"),
    ("schedule=abc", "schedule=abc: there is no such option", "choose schedule="),
    ("model=abc", "model=abc: there is no such option", "choose model=mnn"),
    ("data=cifar11", "data=cifar11: there is no such option", "choose data=cifar10|"),
    ("experiment=abc", "experiment=abc: there is no such option", "choose experiment=census|figure_5_1"),
    ("debug=slow", "debug=slow: there is no such option", "choose debug="),
    ("callbacks=abc", "callbacks=abc: there is no such option", "choose callbacks=checkpoint|default|mnn|progress"),
    ("logger=abc", "logger=abc: there is no such option", "choose logger=default"),
    ("hydra/launcher=abc", "hydra/launcher=abc: there is no such option", "device_pool"),
    (
        "trainer.max_epoch=5",
        "trainer.max_epoch=5: there is no key trainer.max_epoch",
        "did you mean trainer.max_epochs?",
    ),
    ("trianer.devices=2", "trianer.devices=2: there is no key trianer", "did you mean trainer"),
    ("optimizer.momentum=0.9", "optimizer.momentum=0.9: there is no key optimizer.momentum", "+optimizer.momentum=0.9"),
    ("logger.wandb.best.mean=[a]", "logger.wandb.best.mean=[a]: there is no key", "logger.wandb.best.max"),
    ("foo=1", "foo=1: there is no key foo", "A new key needs a +, as +foo=1"),
    ("callbacks.angular_volume_monitor.budget=1", "there is no key", "did you mean", "monitor.cones.budget?"),
    ("callbacks.local_minimum_detector.max_products=9", "there is no key", "detector.second_order.max_products?"),
    ("foo", "foo: is not an override", "write foo=VALUE"),
    ("seed==1", "seed==1: cannot be read", "quote special characters"),
    ("seed=[1", "seed=[1: cannot be read", "quote special characters"),
    ("[seed=1", "[seed=1: cannot be read", "quote special characters"),
    ("seed=1,2", "seed=1,2", "add --multirun"),
    ("'seed=range(0,3)'", "seed=range(0,3)", "requires --multirun"),
    ("data=image_folder", "data.root=???: has no value", "give data.root=VALUE"),
    ("~seed experiment=census", "Interpolation key 'seed' not found", "hydra.run.dir"),
    ("hydra.run.dir=null", "hydra.run.dir=null", "not Optional", "for example hydra.run.dir="),
    ("-m seed=abc", "seed=abc: must be a whole number", "seed=0"),
    ("-m seed=1,abc", "seed=1,abc: must be a whole number", "seed=0"),
    ("-m optimizer=adam,adamx", "optimizer=adamx: there is no such option", "choose optimizer=adam"),
    ("-m foo=1,2", "foo=1,2: there is no key foo", "A new key needs a +"),
    ("-m hydra/launcher=device_pool hydra.launcher.n_jobs=abc", "hydra.launcher.n_jobs=abc", "Integer"),
    (
        "-m hydra/launcher=device_pool hydra.launcher.n_jobs=0",
        "hydra.launcher.n_jobs=0: must be a positive number or null",
    ),
    ("-m hydra/launcher=device_pool trainer.devices=abc", "trainer.devices=abc: must be a positive number, -1 or auto"),
    ("-m hydra/launcher=device_pool hydra.sweep.subdir=x seed=1,2", "hydra.sweep.subdir=x", "choose another"),
    ("-m name=.. seed=1,2", "name=..: must be the name of one folder in outputs", "choose another"),
    ("--config-name abc", "abc: Cannot find primary config", "choose config"),
    ("--config-dir /nowhere", "/nowhere", "not found"),
    ("--resolve", "--resolve", "--cfg"),
]

# Options that there are not.
OPTIONS = [
    ("--foo", "unrecognized arguments: --foo", "lightning-mnn [-m] [KEY=VALUE ...]"),
    ("--cfg abc", "invalid choice: 'abc' (choose from", "lightning-mnn --help"),
    ("seed=1 -m seed=1,2", "unrecognized arguments: seed=1,2", "lightning-mnn [-m] [KEY=VALUE ...]"),
]

# Tasks that read results.
RESULTS = [
    ("task=report", "task=report needs saved results", "folder=DIR"),
    ("task=report folder=/nowhere", "folder=/nowhere: there is no such folder"),
    (
        "task=report folder=.",
        "contains no scan.csv, census.csv, interpolators.csv or metrics.csv",
        "the folder of a run",
    ),
    ("task=report sweep=/nowhere", "sweep=/nowhere: there is no such folder"),
    ("task=report sweep=.", "sweep=. contains no jobs", "give the folder of a sweep"),
    ("task=report folder=a sweep=b", "folder=a and sweep=b are two reports", "give one of them"),
    ("task=dashboard logger.wandb.project=null", "task=dashboard needs a project", "dashboard.project=NAME"),
    ("ckpt_path=/nowhere.ckpt", "ckpt_path=/nowhere.ckpt: is not a file", "give the path of a checkpoint"),
    ("data=mnist data.root=/nowhere", "no MNIST in /nowhere/MNIST/raw", "set data.root"),
    ("data=cifar10 data.root=/nowhere", "no CIFAR-10 in /nowhere", "set data.root"),
    ("data=image_folder data.root=/nowhere", "no folder /nowhere", "set data.root"),
    ("hydra.run.dir=/proc/no/folder", "/proc/no", "check the path"),
    ("hydra.run.dir=/etc/passwd", "/etc/passwd: File exists", "choose another"),
]


@pytest.fixture
def refused(monkeypatch, capfd):
    """Runs a command that is to be refused, and to leave nothing behind; its line."""

    def run(command, code=1):
        before = {*Path.cwd().rglob("*")}
        line = refused_line(command, monkeypatch, capfd, code)
        assert {*Path.cwd().rglob("*")} == before
        return line

    return run


def in_order(line, words):
    """Whether a line holds some words, each behind the one before."""
    place = 0
    for word in words:
        place = line.find(word, place)
        if place < 0:
            return False
        place += len(word)
    return True


@pytest.mark.parametrize(("command", "words"), [(row[0], row[1:]) for row in [*VALUES, *COMPOSITION, *RESULTS]])
def test_a_mistake_is_one_line_and_leaves_nothing(command, words, refused):
    line = refused(command)
    assert in_order(line, words), line


@pytest.fixture
def array_files():
    """Files of arrays in the current folder, all but one with a mistake."""
    inputs, targets = np.arange(8.0).reshape(4, 2), np.array([0, 1, 1, 0])
    np.savez("good.npz", inputs=inputs, targets=targets)
    np.savez("keys.npz", inputs=inputs, labels=targets)
    np.savez("shape.npz", inputs=inputs, targets=targets[:3])
    np.savez("nan.npz", inputs=np.where(inputs > 6, np.nan, inputs), targets=targets)
    np.savez("one.npz", inputs=inputs, targets=np.ones(4))
    np.savez("text.npz", inputs=inputs, targets=["a", "b", "c", "a"])
    np.savez("real.npz", inputs=inputs, targets=[0.5, 1.5, 2.5, 0.5])
    np.savez("objects.npz", inputs=inputs, targets=np.array([None] * 4))
    Path("broken.npz").write_bytes(Path("good.npz").read_bytes()[:300])
    Path("t.csv").write_text("a,b\n1,2\n3,4\n")
    Path("folder").mkdir()


@pytest.mark.usefixtures("array_files")
@pytest.mark.parametrize(("command", "words"), [(row[0], row[1:]) for row in ARRAYS])
def test_a_mistake_in_arrays_is_one_line(command, words, refused):
    line = refused(command)
    assert in_order(line, words), line


@pytest.mark.parametrize(("command", "words"), [(row[0], row[1:]) for row in OPTIONS])
def test_an_unknown_option_is_one_line(command, words, refused):
    line = refused(command, USAGE)
    assert in_order(line, words), line


def test_there_are_enough_of_them():
    rows = [*VALUES, *ARRAYS, *COMPOSITION, *RESULTS, *OPTIONS]
    assert len({row[0] for row in rows}) == len(rows) >= 120
    assert os.environ.get("HYDRA_FULL_ERROR") is None
