"""A run's page: what a training left in its workdir, as one HTML file that needs no network."""
