"""The command line: parse, build a config, call the library, print JSON or a table."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_privacy.errors import LoraPrivacyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["app"]

app: typer.Typer = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="What the random projections of LoRA do to gradients, and what they prove.",
)

# What a user's input ends in where a check of its own was not worth it.
_MISTAKES = (LoraPrivacyError, ValueError, TypeError, OSError, OverflowError, MemoryError)
_TOO_LARGE = re.compile("overflow|memory", re.IGNORECASE)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
SampleRate = Annotated[
    float | None, typer.Option(help="Probability that a record takes part in a step.")
]
BatchSize = Annotated[int | None, typer.Option(help="Expected size of a Poisson batch.")]
DatasetSize = Annotated[int | None, typer.Option(help="Number of records.")]
Adjacency = Annotated[str, typer.Option(help="Neighbours: add-remove or replace.")]
AccountantName = Annotated[
    str, typer.Option("--accountant", help="pld (privacy-loss distributions) or rdp (Rényi).")
]


@app.callback()
def main() -> None:
    """Exists so that a single command keeps its name."""


@app.command()
def assess(
    output: Annotated[Path, typer.Option(help="Folder for the report.")],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of settings, one a line; options given beside it win."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="minilm (default), smollm2, a folder or a hub id.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the model.")] = None,
    task: Annotated[
        str | None, typer.Option(help="classification (default) or causal-lm.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="tickets (default), a file or a hub id.")
    ] = None,
    dev: Annotated[str | None, typer.Option(help="Held-out file or hub id.")] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="Name, or position from 0; twice for pairs.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Name, or position from 0.")] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Does the first line name columns?")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Column separator.")] = None,
    train_size: Annotated[
        int | None, typer.Option(help="Examples at most, 2,000 by default; 0 takes all.")
    ] = None,
    dev_size: Annotated[
        int | None, typer.Option(help="Held-out examples at most, 1,000 by default; 0 takes all.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="full, lora, lora-fa, flora, dp-sgd, dp-lora, dp-lora-fa or dp-flora; private "
            "ones perhaps with +scaling or +denoise; repeat for several. By default lora, flora, "
            "dp-lora and dp-flora."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of every adapter; 8.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha; the rank.")] = None,
    law: Annotated[
        str | None,
        typer.Option(help="Law of A: gaussian (default), uniform, rademacher or orthonormal."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Module names to adapt; queries and values.")
    ] = None,
    last_layers: Annotated[
        int | None, typer.Option(help="Adapt the last so many blocks over a cached prefix; all.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; 3.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step; 32.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW on factors and head; 1e-3.")
    ] = None,
    dense_learning_rate: Annotated[
        float | None, typer.Option(help="AdamW on the dense weights of flora and full; 1e-4.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens an example is cut to; 64.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Written into the report; 0.")] = None,
    probe_every: Annotated[
        int | None, typer.Option(help="Measure every so many steps; 10.")
    ] = None,
    noise_draws: Annotated[
        int | None, typer.Option(help="Fresh draws of A a layer; 2,000.")
    ] = None,
    dynamics_steps: Annotated[
        int | None, typer.Option(help="SGD steps of the check of the dynamics; 20, 0 for none.")
    ] = None,
    dynamics_learning_rate: Annotated[float | None, typer.Option(help="Its rate; 0.05.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ of every ε; 1e-5.")] = None,
    distortion: Annotated[
        float | None, typer.Option(help="τ of the implied reading; the honest one.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Target ε of the private methods; 8.")
    ] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Their clipping norm; 1.")] = None,
    private_epochs: Annotated[
        int | None, typer.Option(help="Their passes over the data; epochs.")
    ] = None,
    private_batch_size: Annotated[
        int | None, typer.Option(help="Their expected records a step; 256.")
    ] = None,
    private_learning_rate: Annotated[
        float | None, typer.Option(help="AdamW of dp-lora and dp-lora-fa; 0.01.")
    ] = None,
    private_dense_learning_rate: Annotated[
        float | None, typer.Option(help="SGD of dp-sgd and dp-flora; 0.2.")
    ] = None,
    references: Annotated[
        int | None,
        typer.Option(help="Reference models a method for membership attacks; 4, 0: none."),
    ] = None,
    audit_records: Annotated[
        int | None, typer.Option(help="Records of these attacks at most; 1,000, 0 for all.")
    ] = None,
    secrets: Annotated[int | None, typer.Option(help="Planted secrets; 8, 0 for none.")] = None,
    alternatives: Annotated[
        int | None, typer.Option(help="Other secrets that each is ranked among; 100.")
    ] = None,
    update_games: Annotated[
        int | None, typer.Option(help="Games of the attack on one update; 300, 0 for none.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes that train reference models.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune by several methods, measure the injected noise, attack each model, and report."""
    given = dict(locals())
    with _named_errors(debug=debug, folder=output):
        from lora_privacy.assess import AssessConfig
        from lora_privacy.assess import assess as run
        from lora_privacy.assess.config import read_settings
        from lora_privacy.assess.tables import main_table

        for name in ("output", "config", "jobs", "resume", "overwrite", "debug"):
            del given[name]
        for option, field in (
            ("method", "methods"),
            ("target", "targets"),
            ("text_column", "text_columns"),
        ):
            given[field] = given.pop(option)
        if text_column:
            given["text_columns"] = [_column(name) for name in text_column]
        if label_column is not None:
            given["label_column"] = _column(label_column)
        settings = {} if config is None else read_settings(config)
        settings |= {name: value for name, value in given.items() if value is not None}
        result = run(
            AssessConfig.from_dict(settings),
            output,
            resume=resume,
            overwrite=overwrite,
            n_jobs=jobs,
        )
        typer.echo(main_table(result).markdown())
        typer.echo(f"\nreport: {output / 'report.html'}\nnumbers: {output / 'report.json'}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of assess.")],
    debug: Debug = False,
) -> None:
    """Render the report of an assessment again, from what its folder holds; nothing is trained."""
    with _named_errors(debug=debug):
        from lora_privacy.assess import Assessment

        page = Assessment.load(folder).save(folder)
        typer.echo(f"report: {page}")


@app.command()
def noise(
    config: Annotated[Path, typer.Argument(help="config.json of a model; no weights are read.")],
    rank: Annotated[list[int] | None, typer.Option(help="Rank; repeat for several.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Laws of the injected noise for a model's layer shapes, from its config alone."""
    with _named_errors(debug=debug):
        from lora_privacy.assess.tables import laws_text
        from lora_privacy.noise import laws_table, model_shapes

        shapes = model_shapes(config)
        rows = [row for r in rank or [8] for row in laws_table(shapes, r)]
        if as_json:
            typer.echo(json.dumps([row.to_dict() for row in rows], indent=1))
            return
        typer.echo(laws_text(rows))


@app.command()
def account(
    noise_multiplier: Annotated[float, typer.Option(help="Noise over clip norm, z = σ/C.")],
    steps: Annotated[int, typer.Option(help="Number of releases.")],
    delta: Annotated[float | None, typer.Option(help="δ at which to bound ε.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="ε at which to bound δ.")] = None,
    sample_rate: SampleRate = None,
    batch_size: BatchSize = None,
    dataset_size: DatasetSize = None,
    adjacency: Adjacency = "add-remove",
    accountant: AccountantName = "pld",
    projected: Annotated[
        list[str] | None,
        typer.Option(help="in_features:rank of a layer under a fresh A; repeat for all layers."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write δ(ε) and the trade-off curve: .png, .svg, .pdf.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """The (ε, δ) that a run of noisy steps is proved to have, and what is left to an attacker."""
    with _named_errors(debug=debug):
        from lora_privacy.assess.accounting import ReleaseConfig, layers_of, sample_rate_of

        config = ReleaseConfig(
            sample_rate=sample_rate_of(sample_rate, batch_size, dataset_size),
            adjacency=adjacency,  # pyright: ignore[reportArgumentType]  (checked by the accountant)
            accountant=accountant,  # pyright: ignore[reportArgumentType]  (checked by the config)
            layers=layers_of(projected or (), with_rank=True),
        )
        answer = config.account(noise_multiplier, steps, delta=delta, epsilon=epsilon)
        if plot is not None:
            from lora_privacy.assess.privacy_plots import write_figure

            write_figure(plot, answer.curve_or_error(), answer.bound)
        typer.echo(json.dumps(answer.to_dict(), indent=1) if as_json else answer.text())
        if plot is not None and not as_json:
            typer.echo(f"\nplot: {plot}")


@app.command()
def calibrate(
    epsilon: Annotated[float, typer.Option(help="Target ε, in nats.")],
    delta: Annotated[float, typer.Option(help="δ of the target.")],
    noise_multiplier: Annotated[
        float | None, typer.Option(help="z = σ/C; searched when absent.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of releases; searched when absent.")
    ] = None,
    sample_rate: SampleRate = None,
    batch_size: BatchSize = None,
    dataset_size: DatasetSize = None,
    adjacency: Adjacency = "add-remove",
    accountant: AccountantName = "pld",
    projected: Annotated[
        list[str] | None,
        typer.Option(
            help="in_features:rank of a layer under a fresh A, or in_features alone to search "
            "one rank for all layers; repeat for all layers."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Whichever is left out of noise, steps and rank, so that a target is met, with the proof."""
    with _named_errors(debug=debug):
        from lora_privacy.assess.accounting import ReleaseConfig, layers_of, sample_rate_of

        by_rank = noise_multiplier is not None and steps is not None
        config = ReleaseConfig(
            sample_rate=sample_rate_of(sample_rate, batch_size, dataset_size),
            adjacency=adjacency,  # pyright: ignore[reportArgumentType]  (checked by the accountant)
            accountant=accountant,  # pyright: ignore[reportArgumentType]  (checked by the config)
            layers=layers_of(projected or (), with_rank=not by_rank),
        )
        answer = config.calibrate(
            noise_multiplier=noise_multiplier, steps=steps, epsilon=epsilon, delta=delta
        )
        typer.echo(json.dumps(answer.to_dict(), indent=1) if as_json else answer.text())


@app.command()
def audit(
    file: Annotated[
        Path,
        typer.Argument(
            help="Scores: a .csv with the columns score,member, or an .npz with scores and "
            "members. Or an .npz of train_shadows, with a target."
        ),
    ],
    delta: Annotated[float, typer.Option(help="δ of the lower bound on ε.")],
    significance: Annotated[
        float, typer.Option(help="Probability of a false claim, of each kind.")
    ] = 0.05,
    fpr: Annotated[float, typer.Option(help="False-positive rate of the TPR.")] = 0.01,
    one_run: Annotated[
        bool,
        typer.Option(
            "--one-run",
            help="All scores come from one training run, in which a fair coin of its own put each "
            "record in or left it out. Without it, each score has a run of its own.",
        ),
    ] = False,
    guesses: Annotated[
        list[int] | None,
        typer.Option(help="Guesses of a one-run audit; half the records if absent; repeatable."),
    ] = None,
    selection: Annotated[
        str,
        typer.Option(help="Pay for 16 thresholds (bonferroni), or choose one on a half (split)."),
    ] = "bonferroni",
    target: Annotated[
        int | None, typer.Option(help="Number of the shadow that plays the target, from 0.")
    ] = None,
    threat_model: Annotated[
        str | None, typer.Option(help="What the attacker sees and chooses; printed.")
    ] = None,
    adjacency: Adjacency = "add-remove",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What attacks got, from saved scores: AUC, TPR, and ε from below. Evidence, no guarantee."""
    with _named_errors(debug=debug):
        from lora_privacy.assess.auditing import AuditConfig, read
        from lora_privacy.assess.auditing import audit as run

        config = AuditConfig(
            delta=delta,
            significance=significance,
            fpr=fpr,
            one_run=one_run,
            guesses=tuple(guesses or ()),
            selection=selection,  # pyright: ignore[reportArgumentType]  (checked by the config)
            adjacency=adjacency,  # pyright: ignore[reportArgumentType]  (checked by the config)
            threat_model=threat_model,
        )
        report = run(read(file, target), config)
        typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else report.text())


def _column(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _one_line(error: BaseException) -> str:
    """The message without what torch appends to it, in characters that can be printed."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].encode("utf-8", "backslashreplace").decode()


def _is_mistake(error: Exception) -> bool:
    """Whether the input is to blame, as far as one can tell: else it is a bug."""
    # torch says RuntimeError where a number is too large for it, or the memory too small.
    torch_says = isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error))
    return bool(torch_says) or isinstance(error, _MISTAKES)


@contextlib.contextmanager
def _named_errors(*, debug: bool, folder: Path | None = None) -> Iterator[None]:
    """One line for a mistake and one for a bug; Ctrl-C says where the finished part is."""
    try:
        yield
    except Exception as error:
        if debug:
            raise
        line = _one_line(error)
        if _is_mistake(error):
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(2) from error
        typer.echo(
            f"error: this is a bug in lora-privacy; --debug shows where. "
            f"({type(error).__name__}: {line})",
            err=True,
        )
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        if folder is not None:
            typer.echo(
                f"\ninterrupted: what is finished is in {folder}; the same command with --resume "
                "(without --overwrite) goes on from there.",
                err=True,
            )
        raise typer.Exit(130) from None
