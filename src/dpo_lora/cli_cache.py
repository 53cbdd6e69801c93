"""The commands under ``dpo-lora cache``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dpo_lora.engine.reference_cache import ReferenceCache

cache = typer.Typer(help="The reference's log-probabilities, kept for all runs.", no_args_is_help=True)


def _reference_cache() -> ReferenceCache:
    from dpo_lora.engine.reference_cache import ReferenceCache
    from dpo_lora.resources import reference_folder

    return ReferenceCache(reference_folder(), max_bytes=0)


@cache.command("ls")
def cache_list() -> None:
    """List entries, the most recently used first."""
    store = _reference_cache()
    typer.echo(f"{store.folder}", err=True)
    for info in store.list_scopes():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.used))
        base, data = (info.about.get(name, "?") for name in ("base", "data"))
        typer.echo(f"{info.scope}  {info.size / 1e6:9.2f} MB  used {used}  {base} on {data}")


@cache.command("rm")
def cache_remove(entry: Annotated[str, typer.Argument(help="An entry's name from 'cache ls', or 'all'.")]) -> None:
    """Remove an entry; it is computed again when it is next needed."""
    store = _reference_cache()
    names = [info.scope for info in store.list_scopes()] if entry == "all" else [entry]
    for name in names:
        typer.echo(f"{name}: {store.remove(name)} files removed")


@cache.command("verify")
def cache_verify() -> None:
    """Check every file against its checksum; a broken one is set aside and computed again when needed."""
    checked = _reference_cache().verify()
    broken = [path for path, whole in checked.items() if not whole]
    for path in broken:
        typer.echo(f"broken, set aside: {path}")
    typer.echo(f"{len(checked) - len(broken)} of {len(checked)} files are whole")
    if broken:
        raise typer.Exit(1)
