"""`undermesh completion`: shells complete verbs, options and their values."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    For one session of bash: `eval "$(undermesh completion bash)"`; for all, put that line into ~/.bashrc.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = ctx.find_root()
    click.echo(kind(root.command, {}, "undermesh", "_UNDERMESH_COMPLETE").source())
