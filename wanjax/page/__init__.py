"""The page of `wanjax app`: pictures and a sentence in, a video out, over the server's own queue."""
