"""One table a network and layout: which tensor of a checkpoint is which parameter."""
