"""A server: requests become jobs in one SQLite file, one worker after the other runs them, videos lie beside it."""
