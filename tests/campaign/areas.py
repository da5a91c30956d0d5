"""All areas of the campaign, in the order of the table."""

from __future__ import annotations

from campaign.case import Area
from campaign.flips import Flips
from campaign.kills import Kills
from campaign.plan import Planned
from campaign.readers import Readers
from campaign.room import Room
from campaign.stops import Stops
from campaign.stores import Stores
from campaign.together import Together

AREAS: dict[str, Area] = {
    area.name: area for area in (Kills(), Stops(), Flips(), Stores(), Readers(), Together(), Room(), Planned())
}
