"""`tiltlm env`: versions and devices, for bug reports."""

from __future__ import annotations

import typer


def env() -> None:
    """Print versions and devices, for a bug report."""
    import platform

    import torch

    from tiltlm.runs.directory import git_commit, installed_versions

    for package, version in installed_versions().items():
        typer.echo(f"{package:<14}{version}")
    typer.echo(f"{'platform':<14}{platform.platform()}")
    typer.echo(f"{'threads':<14}{torch.get_num_threads()}")
    typer.echo(f"{'git commit':<14}{git_commit() or 'none'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    typer.echo(f"{'devices':<14}{', '.join(['cpu', *devices, *(['mps'] if torch.mps.is_available() else [])])}")
