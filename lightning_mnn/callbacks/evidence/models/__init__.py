"""Which model a module trains, on which loss: what certificates of models need."""
