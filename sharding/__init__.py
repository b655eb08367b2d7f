"""Meshes, rules and collectives: the only place that names mesh axes."""
