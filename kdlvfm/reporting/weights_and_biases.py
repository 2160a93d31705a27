# SPDX-License-Identifier: Apache-2.0
"""Table and report page as a run of Weights & Biases, online or in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kdlvfm.reporting.block import Table
from kdlvfm.reporting.render import to_rows


class PublishError(ValueError):
    """What Weights & Biases refuses, in one line."""


class Published(NamedTuple):
    """Where a run is: its folder, and its address unless it is offline."""

    folder: Path
    address: str | None


def check_project(project: str) -> None:
    """Raise for a project that there cannot be, before anything is made.

    Args:
        project: `PROJECT`, or `ENTITY/PROJECT` for one of a team.

    Raises:
        PublishError: naming what is wrong with it.
        ModuleNotFoundError: wandb is not installed.
    """
    import wandb

    name = _split(project)[1]
    if not name:
        raise PublishError(f"{project!r} names no project of Weights & Biases; write PROJECT or ENTITY/PROJECT.")
    try:
        wandb.Settings(project=name)
    except (wandb.errors.Error, ValueError) as error:
        raise PublishError(_first_line(error)) from error


def publish(table: Table, page: Path, project: str) -> Published:
    """Make a run of the job type `report` with `table`, as in the CSV, and `page` as the artifact `report`.

    Whether it goes online is wandb's to know: `WANDB_MODE=offline` writes into a folder and needs no account.

    Raises:
        PublishError: no account, no network, or a project that does not take it.
    """
    import wandb

    entity, name = _split(project)
    rows = to_rows(table)
    columns: list[str | int] = [*rows[0]]
    try:
        settings = wandb.Settings(quiet=True, console="off")  # silent would hide its question for an account
        run = wandb.init(entity=entity, project=name, job_type="report", settings=settings)
        if run.disabled:
            raise PublishError("Weights & Biases: WANDB_MODE=disabled sends and writes nothing.")
        with run:
            run.log({"table": wandb.Table(columns=columns, data=[list(row.values()) for row in rows])})
            artifact = wandb.Artifact("report", type="report")
            artifact.add_file(str(page))
            run.log_artifact(artifact)
            return Published(Path(run.dir).parent, None if run.offline else run.url)
    except (wandb.errors.Error, OSError) as error:
        raise PublishError(_first_line(error)) from error


def _split(project: str) -> tuple[str | None, str]:
    entity, _, name = project.rpartition("/")
    return entity or None, name


def _first_line(error: Exception) -> str:
    return f"Weights & Biases: {str(error).strip().splitlines()[0]}"
