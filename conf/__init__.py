"""The configs, as the package ``lightning_mnn.conf`` that Hydra looks them up in."""

from lightning_mnn.config.schema import register

register()
