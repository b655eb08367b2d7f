"""Training data: where samples come from, and how a batch of them gets onto the mesh."""
