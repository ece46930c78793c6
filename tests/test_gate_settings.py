"""What a marker and a file carry of a site comes back as it was written."""

from __future__ import annotations

import json

import pytest

from sla_compile import SLAConfig
from sla_compile.config import SITE_FIELDS
from sla_compile.gate_settings import (
    NO_GRIDS,
    SeenGrids,
    all_grids,
    grids_from_json,
    grids_to_json,
    settings_from_json,
    settings_to_json,
)
from sla_compile.passes.token_order import Grid, grids_of

SEEN: SeenGrids = (Grid((4, 30, 52), 0, 6240), None)


def test_every_setting_of_a_site_comes_back() -> None:
    config = SLAConfig(topk=0.125, linear="all", always_critical=((0, 128), (-64, None)), sparse_scale=True)
    fields, seen = settings_from_json(settings_to_json(config, SEEN))
    assert fields.keys() == set(SITE_FIELDS)
    assert SLAConfig(**fields) == config
    assert seen == NO_GRIDS, "a raster order needs no grid"


def test_the_call_site_is_in_the_text_and_is_no_setting() -> None:
    plain, sited = (settings_to_json(SLAConfig(), NO_GRIDS, site) for site in ("", "forward+4:8"))
    assert plain != sited
    assert settings_from_json(plain) == settings_from_json(sited)


def test_shares_that_are_read_at_run_time_are_left_out() -> None:
    fields, _ = settings_from_json(settings_to_json(SLAConfig(max_topk=0.5), NO_GRIDS))
    assert set(SITE_FIELDS) - fields.keys() == {"topk", "bottomk"}


def test_the_grid_of_each_size_is_kept_once() -> None:
    wide, tall, small = (
        (Grid((4, 6), 0, 24), None),
        (Grid((6, 4), 0, 24), None),
        (Grid((2, 2), 0, 4), Grid((2, 2), 0, 4)),
    )
    both = all_grids(all_grids(NO_GRIDS, wide), small)
    assert both == (*wide, *small)
    assert all_grids(both, wide) == all_grids(both, NO_GRIDS) == both, "nothing new, so no compiled graph is made again"
    assert all_grids(both, tall) == (*small, *tall), "of as many tokens the last one that was seen"
    assert grids_of(both, 4, 4) == small
    assert grids_of(both, 24, 4) == (wide[0], small[1])
    assert grids_of(both, 99, 99)[0] == wide[0], "one to say in how many tokens a grid was seen"


@pytest.mark.parametrize("seen", [NO_GRIDS, SEEN, (*SEEN, None, Grid((2, 2), 0, 4)), (None, Grid((8, 8), 16, 80))])
def test_grids_that_were_found_come_back_where_an_order_needs_them(seen: SeenGrids) -> None:
    assert grids_from_json(json.loads(json.dumps(grids_to_json(seen)))) == seen
    assert settings_from_json(settings_to_json(SLAConfig(reorder="tiles"), seen))[1] == seen
    assert settings_from_json(settings_to_json(SLAConfig(always_critical="text", grid=(8, 8)), seen))[1] == seen
    given = settings_to_json(SLAConfig(reorder="tiles", grid=(8, 8), grid_start=0), seen)
    assert settings_from_json(given)[1] == NO_GRIDS, "a grid whose place is set needs none that was found"


def test_equal_settings_have_one_text() -> None:
    assert settings_to_json(SLAConfig(topk=0.1, bottomk=0.2), NO_GRIDS) == settings_to_json(
        SLAConfig(bottomk=0.2, topk=0.1), NO_GRIDS
    )
