"""The networks.

One shape alphabet for the whole package: `b` batch, `f` latent frames, `h w` latent height and width, `c` channels,
`l` tokens, `n` heads, `d` head dim, `e` model dim; capitals `F H W` are the same in pixels. Images and videos are
channels last. A line that changes a shape ends in `# [b, l, n, d]`.

Parameters carry the names of their logical axes (`axes=("embed", "mlp")`); `sharding.rules` maps those to mesh axes.
"""
