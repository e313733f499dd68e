"""Write the dashboards: `python -m deploy.grafana`."""

import json
from pathlib import Path

from deploy.grafana.adapters import adapters
from deploy.grafana.merged import merged
from deploy.grafana.panels import Dashboard
from deploy.grafana.service import service

FOLDER = Path(__file__).parent / "dashboards"


def dashboards() -> tuple[Dashboard, ...]:
    """Every dashboard, in the order in which one reads them."""
    return service(), adapters(), merged()


def file_of(dashboard: Dashboard) -> Path:
    """Where the dashboard's JSON is kept."""
    return FOLDER / f"{dashboard.uid}.json"


def text_of(dashboard: Dashboard) -> str:
    """The dashboard as its file holds it."""
    return json.dumps(dashboard.to_json(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write every dashboard's file."""
    for dashboard in dashboards():
        file_of(dashboard).write_text(text_of(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main()
