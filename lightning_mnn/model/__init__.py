"""MNN, the network as a LightningModule, and its training."""
