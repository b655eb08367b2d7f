"""Products with matrices in 8 bits that round no tokens: values and gradients of the numbers that these stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import normal, on

from sharding.mesh import MeshShape
from wanjax.models.layers import Linear, QuantizedLinear, apply_all
from wanjax.ops.quantized import DTYPES


@pytest.mark.parametrize("channel_scales", [False, True])
@pytest.mark.parametrize("format", DTYPES)
def test_values_and_gradients_are_those_of_the_dequantised_matrix(format, channel_scales):
    linear = Linear(48, 32, nnx.Rngs(0), axes=("embed", "mlp"))
    linear.bias = linear.bias.replace(jnp.asarray(normal(1, 32)))
    eight = QuantizedLinear(linear, format, channel_scales, weight_only=True)
    linear.kernel = linear.kernel.replace(eight.kernel[...].astype(jnp.float32) * eight.kernel_scale[...])
    x, dy = normal(2, 2, 16, 48), normal(3, 2, 16, 32)

    def both(layer, activation):
        with on(MeshShape(fsdp=2)):  # of samples, as a step on several devices has them
            place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec("fsdp", None, None))
            y, back = jax.vjp(lambda x: layer(x, activation), jax.device_put(x, place))
            return np.asarray(y), np.asarray(back(jax.device_put(dy, place))[0])

    for activation in (jax.nn.gelu, lambda x: x):
        for ours, theirs in zip(both(eight, activation), both(linear, activation), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    (y,) = apply_all((eight,), jnp.asarray(x))
    np.testing.assert_allclose(y, eight(jnp.asarray(x)), rtol=1e-6, atol=1e-6)
