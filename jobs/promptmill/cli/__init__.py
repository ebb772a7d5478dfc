"""The command line. Commands are listed here and imported when they are used, so that ``--help`` answers at once."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import traceback
from typing import Any

import click

from promptmill.core.terminal import for_people, nobody_reads, say
from promptmill.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PIPE, PromptmillError

#: Name -> (module:attribute, the line that ``--help`` shows).
COMMANDS = {
    "run": ("promptmill.cli.job.run:run", "Run a dataset on this machine, with nothing else installed."),
    "resume": ("promptmill.cli.job.run:resume", "Go on with an interrupted job."),
    "submit": ("promptmill.cli.job.submit:submit", "Send a dataset to the workers."),
    "worker": ("promptmill.cli.admin.worker:worker", "Start this machine's workers."),
    "workers": ("promptmill.cli.look.inspect:workers", "List the workers that are alive."),
    "list": ("promptmill.cli.look.inspect:list_", "List jobs, the newest first."),
    "status": ("promptmill.cli.look.inspect:status", "Show where a job stands."),
    "watch": ("promptmill.cli.job.control:watch", "Follow a job to its end."),
    "show": ("promptmill.cli.look.inspect:show", "Show one row: prompt, answer, tokens, timings, attempts."),
    "results": ("promptmill.cli.look.results:results", "Write a job's results."),
    "report": ("promptmill.cli.look.report:report", "Report on a job, from its rows."),
    "score": ("promptmill.cli.measure.score:score", "Score stored answers again, with no engine."),
    "bench": ("promptmill.cli.measure.bench:bench", "Measure the engine, a whole job and a server side by side."),
    "verify": ("promptmill.cli.measure.verify:verify", "Run rows again, each alone, and compare the answers."),
    "compare": ("promptmill.cli.measure.compare:compare", "Compare jobs, with intervals."),
    "sweep": ("promptmill.cli.measure.sweep:sweep", "Measure settings against each other and find the best."),
    "trend": ("promptmill.cli.look.trend:trend", "Follow figures over the jobs of a tag."),
    "tag": ("promptmill.cli.job.annotate:tag", "Give jobs tags."),
    "note": ("promptmill.cli.job.annotate:note", "Write a remark beside a job."),
    "query": ("promptmill.cli.look.query:query", "Run SQL over tables and views, read-only."),
    "pause": ("promptmill.cli.job.control:pause", "Start nothing more of a job; what runs may end."),
    "retry": ("promptmill.cli.job.control:retry", "Run the errors of an ended job again."),
    "reconcile": ("promptmill.cli.job.control:reconcile", "Find chunks that lost their worker or their message."),
    "cancel": ("promptmill.cli.job.control:cancel", "End a job."),
    "rm": ("promptmill.cli.admin.retention:rm", "Remove jobs and their results."),
    "gc": ("promptmill.cli.admin.retention:gc", "Remove jobs that ended long ago."),
    "api": ("promptmill.cli.admin.api:api", "Serve the REST API and the live page."),
    "keys": ("promptmill.cli.admin.keys:keys", "Who may use the API: create, list, revoke."),
    "db": ("promptmill.cli.admin.db:db", "The database: upgrade, current revision."),
    "models": ("promptmill.cli.admin.models:models", "Models at hand."),
    "init": ("promptmill.cli.admin.init:init", "Write a commented task file to begin with."),
    "datasets": ("promptmill.cli.admin.datasets:datasets", "Look at datasets before they are run."),
    "config": ("promptmill.cli.admin.config:config", "Print the settings and where each comes from."),
    "shell-init": ("promptmill.cli.admin.shell_init:shell_init", "Print what makes 'jobs' work as a shell command."),
}

EPILOG = """\b
Examples:
  promptmill run prompts.jsonl --model demo
  promptmill run comments.csv --model demo --task ad_comments.task.yaml -o results.jsonl
  promptmill submit prompts.jsonl --model demo --wait
  promptmill report @last
"""


class ReaderGone(Exception):
    """The reader of stdout has gone. click would turn a BrokenPipeError into exit code 1."""


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGone from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from promptmill.core.registry import suggestion

            raise click.UsageError(f"no such command '{args[0]}'. {suggestion(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="promptmill")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Batch inference for local language models: datasets in, results and honest numbers out."""


def main() -> None:
    """Entry point: run a command and turn errors into one clear message and an exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # The parent process closed it.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the end
    try:
        code = _ended()
        sys.stdout.flush()
    except (ReaderGone, BrokenPipeError):
        nobody_reads(sys.stdout)
        code = EXIT_PIPE
    sys.exit(code)


def _ended() -> int:
    """Run the command; its exit code. Raises ReaderGone or BrokenPipeError when the reader of stdout has gone."""
    debug = "--debug" in sys.argv[1:2]
    try:
        return cli.main(standalone_mode=False) or 0
    except ReaderGone:
        raise
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as problem:
        problem.show(for_people(sys.stderr))
        return problem.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("interrupted", err=True)
        return EXIT_INTERRUPTED
    except PromptmillError as problem:
        if "--json" in sys.argv[1:] and not debug:
            say(json.dumps(problem.to_json(), ensure_ascii=False, indent=2))
        say(_without_secrets(traceback.format_exc()) if debug else f"error: {problem}", err=True)
        return problem.exit_code
    except Exception as problem:
        if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
            say(f"error: cannot write: {problem.strerror}", err=True)
            nobody_reads(sys.stdout)
            return EXIT_FAILED
        what = f"internal error: {type(problem).__name__}: {str(problem)[:300]}"
        say(_without_secrets(traceback.format_exc() if debug else what), err=True)
        say("This is a bug. 'promptmill --debug ...' shows where it happened.", err=True)
        return EXIT_FAILED


def _without_secrets(text: str) -> str:
    from promptmill.core.settings import without_secrets

    return without_secrets(text)
