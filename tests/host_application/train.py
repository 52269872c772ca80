"""A program of somebody else: config groups of Hydra, parts of Lightning, nothing of lightning-mnn.

python train.py [experiment=NAME] [group=option] [key=value] [-m]
"""

import hydra
from omegaconf import DictConfig


def made(group: DictConfig | None) -> list:
    """The entries of a config group that name a class, instantiated."""
    return [hydra.utils.instantiate(entry) for entry in (group or {}).values() if entry and "_target_" in entry]


def train(cfg: DictConfig) -> dict[str, float]:
    """Fit and test a model.

    Returns:
        What it logged last.
    """
    hydra.utils.call(cfg.seeding)
    data = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=made(cfg.callbacks), logger=made(cfg.logger))
    trainer.fit(model, data, ckpt_path=cfg.ckpt_path)
    metrics = dict(trainer.callback_metrics)
    if cfg.test:
        trainer.test(model, data, verbose=False)
        metrics |= trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items()}


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train; a sweeper optimises what this returns."""
    metrics = train(cfg)
    return metrics[cfg.objective] if cfg.objective else None


if __name__ == "__main__":
    main()
