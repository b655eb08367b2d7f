"""The mathematics of sampling and training: noise levels, solvers, step caches. No files, no settings."""
