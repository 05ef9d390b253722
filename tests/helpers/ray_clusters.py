"""How tests start a Ray without a dashboard."""

from __future__ import annotations

from typing import Any

NO_DASHBOARD: dict[str, Any] = {"include_dashboard": False, "dashboard_port": 1}
"""Arguments of a Ray without a dashboard.

Without the port Ray 2.60 tells its processes that the dashboard is at 127.0.0.1:8265. If another Ray has its dashboard
there, Ray Train's PlacementGroupCleaner asks that one for the controller of the training, hears that it knows of none,
and ends the workers.
"""
