"""Meshes: what flags say, what is refused, and which devices become neighbours."""

import dataclasses

import jax
import pytest

from sharding.mesh import AXES, MeshShape, make_mesh, parse_mesh, sampling_mesh
from wanjax.errors import InputError
from wanjax.report.topology import topology_mesh


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("", None),
        ("data=1,fsdp=2,ring=2,ulysses=2", MeshShape(1, 2, 2, 2)),
        ("ulysses=4, data=2", MeshShape(data=2, ulysses=4)),
        ("ring=2,fsdp=-1", MeshShape(fsdp=4, ring=2)),
        ("fsdp=8,data=-1", MeshShape(fsdp=8)),
    ],
)
def test_flags(text, shape):
    if shape is None:
        assert parse_mesh(text, 1) == MeshShape()
        return
    assert parse_mesh(text, 8) == shape
    assert parse_mesh(str(shape), 8) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=3", "is 3 devices .* there are 8; .* use data=1,fsdp=8,ring=1,ulysses=1"),
        ("ring=2,ulysses=2", "is 4 devices .* use data=1,fsdp=2,ring=2,ulysses=2"),
        ("ring=3,fsdp=-1", "use data=1,fsdp=8,ring=1,ulysses=1"),
        ("ring=-1,fsdp=-1", "more than one -1"),
        ("tensor=8", "cannot read 'tensor=8'"),
        ("ring=0", "cannot read 'ring=0'"),
        ("ring=2,ring=4", "cannot read 'ring=4'"),
    ],
)
def test_bad_flags_name_a_mesh_that_works(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_mesh(text, 8)
    assert "\n" not in str(error.value)


def test_the_mesh_chosen_for_sampling():
    assert sampling_mesh(8, 40, guided=True) == MeshShape(data=2, ulysses=4)
    assert sampling_mesh(8, 40, guided=False) == MeshShape(ulysses=8)
    assert sampling_mesh(32, 40, guided=True) == MeshShape(data=2, ring=2, ulysses=8)
    assert sampling_mesh(1, 40, guided=True) == MeshShape()


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device that knows its slice, as those of several connected TPU pods do."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_only_data_crosses_slices():
    chips = [Chip(i, i // 4) for i in range(8)]
    mesh = make_mesh(MeshShape(data=4, ulysses=2), chips)
    assert mesh.axis_names == AXES
    for copy in mesh.devices:
        assert len({device.slice_index for device in copy.flat}) == 1
    assert [copy.flat[0].slice_index for copy in mesh.devices] == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"data=1 on 2 slices; .* use data=2"):
        make_mesh(MeshShape(fsdp=8), chips)


def test_the_closest_devices_are_last():
    devices = jax.devices()
    mesh = make_mesh(MeshShape(data=2, ring=2, ulysses=2), devices)
    assert list(mesh.devices.flat) == devices


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("v6e:2x4", "data=2,ulysses=4"),
        ("v6e:16x16", "fsdp=16,ring=4,ulysses=4"),
        ("v6e:16x16", "fsdp=32,ulysses=8"),
        ("v5p:4x4x4", "fsdp=16,ulysses=4"),
    ],
)
def test_devices_that_exchange_tokens_lie_side_by_side(topology, mesh):
    """Direct links between those who share a sample connect all of them; likewise each member of the ring."""
    chips = topology_mesh(topology, mesh).devices
    for sample in chips.reshape(-1, *chips.shape[2:]):
        assert linked(list(sample.flat))
        assert all(linked(list(member)) for member in sample)


def linked(chips):
    """Whether direct links between these chips connect all of them."""
    reached, rest = chips[:1], chips[1:]
    for chip in reached:  # grows
        near = [x for x in rest if sum(abs(a - b) for a, b in zip(x.coords, chip.coords, strict=True)) == 1]
        reached += near
        rest = [x for x in rest if x not in near]
    return not rest
