"""The command `tp-rs`."""

from tp_rs.cli import doctor, plan, run
from tp_rs.cli.app import app

__all__ = ["app", "main"]

app.command("plan", epilog=plan.EXAMPLES, no_args_is_help=True)(plan.command)
app.command("run", epilog=run.EXAMPLES, no_args_is_help=True)(run.command)
app.command("doctor", epilog=doctor.EPILOG)(doctor.command)


def main() -> None:
    """Run the command."""
    app()
