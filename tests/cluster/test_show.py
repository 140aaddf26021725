from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from shardwise.cluster.catalog import catalog
from shardwise.cluster.show import as_json, catalog_json, listing, show
from shardwise.cluster.specs import parse_spec


def _text(shown: RenderableType) -> str:
    console = Console(width=240, file=StringIO(), record=True)
    console.print(shown)
    return console.export_text()


def test_tables_hold_figures_levels_totals_and_sources() -> None:
    text = _text(show(parse_spec("h100:2048x8, oversubscribed 2")))
    for said in (
        "16,384 devices in 2,048 nodes",
        "80 GB",
        "3.35 TB/s",
        "989.4 Tflop/s",
        "0 to 16,383",
        "2,048 of 8 (dgx-h100)",
        "450 GB/s",
        "25 GB/s",
        "2.7 µs",
        "2 : 1",
        "1.311 PB",
        "16.21 Eflop/s",
        "112,721.92 $/h",
        "NVIDIA H100 datasheet, 2023",
        "power_w 700 W",
    ):
        assert said in text, said


def test_every_source_is_shown() -> None:
    found = parse_spec("1x8 a100-80g + 2x4 rtx4090, 25 GbE")
    text = _text(show(found))
    links = {level.link for group in found.groups for level in group.levels}
    assert len(links) == 3
    for spec in (*found.devices, *links):
        assert all(source in text for source in spec.sources.values())
    assert "unknown: no price of rtx4090" in text
    assert "half rate" in text
    assert "cluster of rtx4090" in text and "781.2 MB/s" in text
    assert "8 to 15" in text and "2 of 4 (rtx4090-box)" in text
    assert text.count("fp8 peak") == 1, "of the devices, not of all together: one kind has none"


@pytest.mark.parametrize("line", ["h100", "tpu-v5p:2x512", "mi250:2x8, SHARP", "1x8 a100-80g + 2x4 rtx4090, 25 GbE"])
def test_json_says_the_same(line: str) -> None:
    found = parse_spec(line)
    document = json.loads(json.dumps(as_json(found)))
    assert (document["name"], document["ranks"], document["nodes"]) == (line, found.ranks, found.nodes)
    assert document["memory_bytes"] == found.memory_bytes
    assert document["price_per_hour"] == found.price_per_hour
    for group, said in zip(found.groups, document["groups"], strict=True):
        assert [level["bytes_per_s"] for level in said["levels"]] == [level.bytes_per_s for level in group.levels]
        assert document["devices"][said["device"]]["sources"]["memory_bytes"] == group.device.source("memory_bytes")
    assert all(level["link"] in document["links"] for said in document["groups"] for level in said["levels"])


def test_the_listing_has_everything() -> None:
    text, document, known = _text(listing()), json.loads(json.dumps(catalog_json())), catalog()
    for kind, specs in (("devices", known.devices), ("links", known.links), ("nodes", known.nodes)):
        assert all(name in text for name in specs)
        assert set(document[kind]) == set(specs)
