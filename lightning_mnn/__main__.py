"""``python -m lightning_mnn`` is the command ``lightning-mnn``."""

from lightning_mnn.app import main

if __name__ == "__main__":
    main()
