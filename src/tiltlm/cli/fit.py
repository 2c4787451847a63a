"""`tiltlm fit`: fit the target of a config, without tuning."""

from __future__ import annotations

import json

import typer

from tiltlm.cli.common import AsJson, ConfigFile, Overrides, quiet, terminal


def fit(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Fit the target without tuning: coefficients, moments, ESS, and notes on what will be hard."""
    from tiltlm.config.run import load_config

    parsed = load_config(config, overrides or [])
    from tiltlm.app.build import build_base
    from tiltlm.app.display import Display
    from tiltlm.app.fit import fit_run_target
    from tiltlm.app.plan import plan_run
    from tiltlm.reports.tables import fit_table

    quiet()
    plan = plan_run(parsed)
    console = terminal()
    report = fit_run_target(plan, build_base(parsed), Display(console)).report
    record = report.to_json()
    if as_json:
        moments = {entry["name"]: entry["achieved"] for entry in record["features"]}
        typer.echo(json.dumps({"moments": moments, **record}))
        return
    terminal(stderr=False).print(fit_table(record))
    for warning in report.warnings:
        console.print(f"note: {warning}", soft_wrap=True)
