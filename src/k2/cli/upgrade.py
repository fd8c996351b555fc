"""`k2 upgrade`: which form each store of a data folder has, and bringing an older one on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from k2.cli.common import Context, command, start_logging
from k2.cli.main import root

if TYPE_CHECKING:
    from k2.run.upgrade import Form


@command(root, "upgrade")
@click.option("--check", is_flag=True, help="Only tell what would be done.")
def upgrade(context: Context, check: bool) -> None:
    """Bring a data folder of an older K2 to this one's form; every other command does it, too, before it begins.

    A folder of a newer K2 is refused, by this and by every other command. One that was moved or copied is made at
    home where it is now, by this command only.
    """
    from k2.cli.text import table
    from k2.run import upgrade as upgrades

    start_logging()
    settings = context.existing()
    if not check:
        upgrades.upgrade(settings, relocate=True)
    forms = upgrades.forms(settings)
    rows = [(f.store, "-" if f.found is None else str(f.found), str(f.newest), _due(f)) for f in forms]
    context.show(
        [
            {
                "store": f.store,
                "found": f.found,
                "newest": f.newest,
                "behind": f.behind,
                "made_in": None if f.made_in is None else str(f.made_in),
            }
            for f in forms
        ],
        lambda: table(("store", "form", "newest", ""), rows),
    )


def _due(form: Form) -> str:
    moved = f"was made as {form.made_in}, to be made at home here" if form.made_in else ""
    return ", ".join(part for part in ("to be upgraded" if form.behind else "", moved) if part)
