"""Every container with some codec: frames are those that a player shows. `benchmarks/containers.py` has all codecs."""

import av
import pytest

from benchmarks.containers import VARIANTS, cells, is_good, run, summary

CODECS = {
    "mp4": ["libx264", "mpeg4"],
    "fmp4": ["libx264"],
    "mov": ["libx264", "prores_ks"],
    "mkv": ["libx264", "ffv1"],
    "webm": ["libvpx"],
    "avi": ["libx264", "mpeg4", "mjpeg"],
    "flv": ["libx264", "flv"],
    "ts": ["libx264", "mpeg2video"],
    "mpg": ["mpeg1video"],
    "wmv": ["libx264", "wmv2"],
    "ogv": ["libvpx"],
    "gif": ["gif"],
    "webp": ["libwebp_anim"],
}


@pytest.mark.parametrize("container", CODECS)
def test_frames_are_those_that_a_player_shows(tmp_path, container):
    av.logging.set_level(None)
    found = run(cells([container], CODECS[container], VARIANTS), tmp_path)
    print(summary(found))
    assert len(found) >= 5 * len(CODECS[container]) - 1
    assert {cell: result for cell, result in found.items() if not is_good(cell, result)} == {}
