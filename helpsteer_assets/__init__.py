"""MODPO on HelpSteer as Dagster software-defined assets.

For notebooks and scripts: `load_table` and `load_policy`; helpsteer_assets.api says more.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helpsteer_assets.api import Policy, load_policy, load_table

__all__ = ["Policy", "load_policy", "load_table"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: every process of a run imports this package.
    if name in __all__:
        from helpsteer_assets import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
