"""wanjax: Wan2.1 first-last-frame-to-video in JAX."""
