"""What the figures of ``zmqcore bench`` mean, in plain words; and how far to believe them."""

from __future__ import annotations

from zmqcore.cli.bench.run import Result, Run

__all__ = ["QUIET_CPUS", "opinion", "reservations"]

QUIET_CPUS = 0.15
"""How many CPUs others may keep busy on a machine that counts as quiet."""

# Closer than that is equal: two runs on one machine differ by as much.
_EQUAL = 0.05
# Fewer rounds say little: where the scheduler puts the processes of one changes it by a factor of two.
_FEW_ROUNDS = 4
# If the slowest and fastest round of one row differ by so much, its median is not to be trusted far.
_WIDE = 2.0


def _verdict(result: Result) -> str:
    """Return one sentence on one row."""
    plural = result.task != "call"
    subject = f"{result.title} over {result.transport} {'take' if plural else 'takes'}"
    ratio = result.ratio
    if ratio < 1 - _EQUAL:
        return f"{subject} {ratio:.2f} of the time of bare pyzmq"
    if ratio <= 1 + _EQUAL:
        return f"{subject} as long as in bare pyzmq"
    return f"{subject} {ratio:.2g} times as long as in bare pyzmq"


def opinion(run: Run) -> list[str]:
    """Return what the results say, a sentence each; the first is the whole in short."""
    slower = [result for result in run.results if result.ratio > 1 + _EQUAL]
    faster = [result for result in run.results if result.ratio < 1 - _EQUAL]
    if not slower:
        short = "zmqcore is nowhere slower than bare pyzmq here"
    elif not faster:
        short = "zmqcore is nowhere faster than bare pyzmq here"
    else:
        rows = len(run.results)
        short = f"of {rows} rows zmqcore is faster than bare pyzmq in {len(faster)}, slower in {len(slower)}"
    sentences = [short, *map(_verdict, run.results)]
    if slower:
        sentences.append(
            "bare pyzmq sends your bytes and nothing else; names of methods, packed arguments, deadlines, "
            "acknowledgements and the other side's errors are what zmqcore's time goes to"
        )
    return sentences


def reservations(run: Run) -> list[str]:
    """Return why these figures are to be doubted, and what to do about it; empty if there is no reason."""
    doubts = []
    if run.others_cpus is not None and run.others_cpus > QUIET_CPUS:
        doubts.append(
            f"the machine was disturbed: others used {run.others_cpus:.2g} s of CPU time each second. "
            "Repeat when it is quiet"
        )
    if run.rounds < _FEW_ROUNDS:
        doubts.append(
            f"{run.rounds} round{'s' if run.rounds > 1 else ''} only, which says little; give it longer: --seconds"
        )
    wide = [result for result in run.results if result.ratios()[-1] > _WIDE * result.ratios()[0]]
    if wide and run.rounds >= _FEW_ROUNDS:
        rows = ", ".join(f"{result.title} over {result.transport}" for result in wide)
        doubts.append(
            f"the rounds differ by more than a factor of {_WIDE:g} ({rows}): do not rely on more than the direction"
        )
    return doubts
