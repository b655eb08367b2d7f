"""Frames that are given: masks and control latents as the references make them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import golden_arrays

from wanjax.conditioning.frames import (
    condition_video,
    given_frames,
    join_image_condition,
    latent_frames,
    latent_mask,
    latent_size,
)
from wanjax.config import WAN_VAE, DiTConfig, VAEConfig
from wanjax.errors import InputError

PATCH = DiTConfig().patch_size


def test_official_mask_and_branch():
    golden = golden_arrays("official")
    given = given_frames("flf2v", 17)
    mask = latent_mask(given[None], 8, 12, WAN_VAE)
    np.testing.assert_array_equal(mask[0], np.moveaxis(golden["y_mask"], 0, -1))
    branch = join_image_condition(mask, jnp.moveaxis(golden["y_latent"], 0, -1)[None])
    np.testing.assert_array_equal(branch[0], np.moveaxis(golden["y"], 0, -1))


def test_diffusers_mask():
    condition = np.moveaxis(golden_arrays("diffusers")["condition"], 1, -1)
    _, f, h, w, _ = condition.shape
    mask = latent_mask(given_frames("flf2v", 4 * f - 3)[None], h, w, WAN_VAE)
    np.testing.assert_array_equal(mask, condition[..., :4])


@pytest.mark.parametrize("frames", [1, 5, 9, 33, 81, 121])
def test_any_length(frames):
    mask = latent_mask(given_frames("flf2v", frames)[None], 1, 1, WAN_VAE)[0, :, 0, 0]
    expected = np.zeros((latent_frames(frames, WAN_VAE), 4))
    expected[-1, 3] = 1
    expected[0] = 1
    np.testing.assert_array_equal(mask, expected)


def test_tasks():
    def given(*arguments, **options):
        return np.flatnonzero(given_frames(*arguments, **options)).tolist()

    assert given("t2v", 13) == []
    assert given("i2v", 13) == [0]
    assert given("flf2v", 13) == [0, 12]
    assert given("continuation", 13, count=5) == [0, 1, 2, 3, 4]
    assert given("interpolation", 13, indices=[3, 0, -2]) == [0, 3, 11]


def test_mask_of_mixed_tasks():
    given = np.stack(
        [
            given_frames("t2v", 9),
            given_frames("i2v", 9),
            given_frames("continuation", 9, count=4),
            given_frames("interpolation", 9, indices=[2, 5]),
        ]
    )
    mask = jax.jit(latent_mask, static_argnums=(1, 2, 3))(given, 2, 3, WAN_VAE)
    assert mask.shape == (4, 3, 2, 3, 4)
    expected = [
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
    ]
    for h in range(2):
        for w in range(3):
            np.testing.assert_array_equal(mask[:, :, h, w], expected)


def test_condition_video():
    video = jax.random.uniform(jax.random.key(0), (2, 5, 4, 6, 3), minval=-1, maxval=1)
    given = np.array([[1, 0, 0, 0, 1], [1, 1, 0, 0, 0]], bool)
    image_condition = np.asarray(condition_video(video, given))
    np.testing.assert_array_equal(image_condition[given], np.asarray(video)[given])
    np.testing.assert_array_equal(image_condition[~given], 0)


def test_shardings_are_kept():
    """The mask takes on the sharding of the latents, on a mesh with explicit shardings."""
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "context"))):
        given = jax.device_put(np.ones((4, 5), bool), P("data"))
        latents = jax.device_put(np.ones((4, 2, 2, 4, 16), np.float32), P("data", None, None, "context"))
        branch = join_image_condition(latent_mask(given, 2, 4, WAN_VAE), latents)
        assert jax.typeof(branch).sharding.spec == P("data", None, None, "context", None)
        video = jax.device_put(np.ones((4, 5, 4, 6, 3), np.float32), P("data"))
        image_condition = condition_video(video, given_frames("flf2v", 5)[None])
        assert jax.typeof(image_condition).sharding.spec[0] == "data"


def test_branch_has_the_dtype_of_the_latents():
    mask = latent_mask(np.ones((1, 5), bool), 2, 2, WAN_VAE)
    branch = join_image_condition(mask, jnp.zeros((1, 2, 2, 2, 16), jnp.bfloat16))
    assert branch.dtype == jnp.bfloat16
    assert branch.shape == (1, 2, 2, 2, 20)


@pytest.mark.parametrize(("frames", "expected"), [(1, 1), (5, 2), (81, 21), (121, 31)])
def test_latent_frames(frames, expected):
    assert latent_frames(frames, WAN_VAE) == expected


@pytest.mark.parametrize(
    ("frames", "advice"), [(0, "use 1 or 5"), (-3, "use 1 or 5"), (2, "use 1 or 5"), (80, "77 or 81"), (83, "81 or 85")]
)
def test_wrong_length(frames, advice):
    with pytest.raises(InputError, match=advice):
        latent_frames(frames, WAN_VAE)


def test_latent_size():
    assert latent_size(720, 1280, WAN_VAE, PATCH) == (90, 160)
    assert latent_size(64, 96, WAN_VAE, PATCH) == (8, 12)


@pytest.mark.parametrize(
    ("height", "width", "advice"), [(721, 1280, "720 and 1280"), (480, 8, "480 and 16"), (0, 16, "16 and 16")]
)
def test_wrong_size(height, width, advice):
    with pytest.raises(InputError, match=advice):
        latent_size(height, width, WAN_VAE, PATCH)


def test_another_geometry():
    """Of a VAE with other factors, such as Wan2.2-TI2V-5B's 16x16x4."""
    vae = VAEConfig(temporal_downsample=(False, False, True, True), dim_mult=(1, 2, 4, 4, 4), z_dim=48)
    assert latent_frames(81, vae) == 21
    assert latent_size(704, 1280, vae, PATCH) == (44, 80)
    with pytest.raises(InputError, match="multiples of 32; use 704 and 1280"):
        latent_size(720, 1280, vae, PATCH)
    half = VAEConfig(temporal_downsample=(False, False, True))
    assert latent_frames(7, half) == 4
    with pytest.raises(InputError, match=r"accepted are 2n\+1 \(1, 3, .*; use 7 or 9"):
        latent_frames(8, half)
    mask = latent_mask(given_frames("flf2v", 5)[None], 1, 1, half)[0, :, 0, 0]
    np.testing.assert_array_equal(mask, [[1, 1], [0, 0], [0, 1]])


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("outpainting", {}, "t2v, i2v, flf2v"),
        ("continuation", {"count": 0}, "1 to 8"),
        ("continuation", {"count": 9}, "1 to 8"),
        ("interpolation", {"indices": [9]}, "0 to 8"),
        ("interpolation", {"indices": [-10]}, "0 to 8"),
    ],
)
def test_wrong_task(task, options, message):
    with pytest.raises(InputError, match=message):
        given_frames(task, 9, **options)
