"""SmallLM: train a small GPT language model from scratch on the machine you have.

The public names are resolved when first used, so that importing the package costs nothing.

    import smalllm
    summary = smalllm.train("quickstart", ["train.minutes=1"])
    model = smalllm.load(summary.run)
    print(model.complete("Once upon a time"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "UserError": "smalllm.config",
    "load_recipe": "smalllm.config",
    "recipe_names": "smalllm.config",
    "prepare": "smalllm.data.prepare",
    "load": "smalllm.api",
    "train": "smalllm.api",
    "evaluate": "smalllm.api",
    "StoryTeller": "smalllm.api",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from smalllm.api import StoryTeller as StoryTeller
    from smalllm.api import evaluate as evaluate
    from smalllm.api import load as load
    from smalllm.api import train as train
    from smalllm.config import UserError as UserError
    from smalllm.config import load_recipe as load_recipe
    from smalllm.config import recipe_names as recipe_names
    from smalllm.data.prepare import prepare as prepare


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'smalllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
