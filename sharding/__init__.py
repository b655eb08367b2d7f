"""Meshes, rules and collectives: the only place that names mesh axes."""

from sharding.ulysses import check_heads as check_heads
from sharding.ulysses import sequence_attention as sequence_attention
