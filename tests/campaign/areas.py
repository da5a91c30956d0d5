"""All areas of the campaign, in the order of the table."""

from __future__ import annotations

from campaign.case import Area
from campaign.flips import Flips
from campaign.kills import Kills
from campaign.readers import Readers

AREAS: dict[str, Area] = {area.name: area for area in (Kills(), Flips(), Readers())}
