"""MNN, the network as a LightningModule, and how it is trained."""
