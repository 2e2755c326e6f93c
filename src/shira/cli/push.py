"""shira push: push an adapter to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .output import bytes_text, cell, console, errors

__all__ = ["push"]


def push(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder, or an adapter's file, that `shira train` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="The repository; it is made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; it is made if there is none.", show_default=False)] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="The commit's message.")] = "Upload a SHiRA adapter",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show what would be sent, and stop.")] = False,
) -> None:
    """Push an adapter with its recipe and model card to the Hugging Face Hub. First log in (hf auth login), or set HF_TOKEN.

    Example: shira push poet user/poet --private
    """
    from ..integrations import hub

    parcel = hub.parcel(source, repository)
    table = Table("file", "size", title=cell(f"{source} → {repository}"), title_justify="left")
    table.columns[1].justify = "right"
    for name, content in parcel.files.items():
        table.add_row(cell(name), bytes_text(len(content) if isinstance(content, bytes) else content.stat().st_size))
    console.print(table)
    if parcel.left_out:
        console.print(f"stays here: {', '.join(map(cell, parcel.left_out))}", highlight=False)
    if dry_run:
        console.print("nothing was sent", highlight=False)
        return
    if not errors.is_terminal:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # they fill a log
    pushed = hub.push(source, repository, private=private, revision=revision, message=message)  # it shows its progress
    name = cell(repository if revision is None else f"{repository}@{revision}")
    console.print(f"shira.load('{name}') reads it; this commit is {cell(pushed)}", highlight=False, soft_wrap=True)
