"""The demo itself: start the processes, send the files through them, kill a worker, and check every result.

Nothing here prints; who watches is told through an :class:`Observer`.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import shutil
import time
from collections import Counter
from pathlib import Path

from zmqcore import Client, Node
from zmqcore.cli.demo.analysis import Analysis
from zmqcore.cli.demo.callers import Callers, Done
from zmqcore.cli.demo.checking import Checkers
from zmqcore.cli.demo.children import END_TIMEOUT, Children, private_directory
from zmqcore.cli.demo.report import DemoFailed, Observer, Report, compare
from zmqcore.cli.demo.roles import ANALYSIS, PROGRESS
from zmqcore.cli.interrupts import Interrupts
from zmqcore.cli.measure import open_fds, percentile

__all__ = ["run_demo"]

# An analysis takes milliseconds. Long enough for a machine that is busy with other things.
_CALL_TIMEOUT = 30.0
_START_TIMEOUT = 60.0


class _Run:
    """One run, phase by phase; :func:`run_demo` is the way in."""

    def __init__(
        self,
        files: list[Path],
        workers: int,
        in_flight: int,
        observer: Observer,
        interrupts: Interrupts,
    ) -> None:
        self._files = files
        self._names = [f"worker-{number}" for number in range(1, workers + 1)]
        self._in_flight = in_flight
        self._observer = observer
        self._interrupts = interrupts
        self._run_id = secrets.token_hex(8)
        self._key = secrets.token_bytes(16)
        self._results: dict[int, Analysis] = {}
        self._served_by: dict[int, str] = {}
        self.report = Report(files=len(files), fds_before=open_fds())

    def run(self) -> Report:
        # Signals interrupt the blocks in allowed() only; what is entered here is always left in order.
        with contextlib.ExitStack() as stack:
            directory = private_directory()
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            children = stack.enter_context(contextlib.closing(Children(directory)))
            self._talk(f"local://{directory}", children)
            self._observer.phase("ending the workers", None)
            self.report.problems += children.end()
            self._check(children)
        self._interrupts.check()
        return self.report

    def _talk(self, url: str, children: Children) -> None:
        """Do everything that needs RPC, with the workers and the collector running."""
        for name in self._names:
            children.start(name, "worker", name, url)
        children.start("collector", "collector", url)
        with (
            Node(matchmaker=url) as node,
            Client(ANALYSIS, node=node, timeout=_CALL_TIMEOUT) as analysis,
            Client(PROGRESS, node=node, timeout=_CALL_TIMEOUT) as progress,
            contextlib.closing(Callers(analysis, self._files, self._in_flight, node.close)) as callers,
            self._interrupts.allowed(),
        ):
            self._wait_for_members(analysis, progress, children)
            self._configure(analysis)
            self._analyse(callers, children)
            self._gather(analysis)
            self._ask_collector(progress)
            self.report.node = node.stats()
            self._sample_fds()

    def _wait_for_members(self, analysis: Client, progress: Client, children: Children) -> None:
        self._observer.phase(f"starting {len(self._names)} workers and a collector", len(self._names) + 1)
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            there = len(analysis.members()) + len(progress.members())
            self._observer.progress(there, "")
            if there == len(self._names) + 1:
                return
            children.expect_running()
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"only {there} of {len(self._names) + 1} processes were there after {_START_TIMEOUT:g} s"
                )
            time.sleep(0.02)

    def _configure(self, analysis: Client) -> None:
        """Fan the configuration out, and ask until every worker has it: a fanout itself is one way."""
        sent = analysis.fanout("configure", self._run_id, self._key)
        self.report.epoch = sent.epoch
        reached = sorted(member.topic.server or "" for member in sent.sent)
        if reached != sorted(self._names):
            failed = ", ".join(f"{member.topic.server}: {error}" for member, error in sent.failed.items())
            raise DemoFailed(
                f"the configuration was sent to {reached} only ({failed or 'the others are unknown'})"
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            answers = analysis.gather("configured")
            if list(answers.results.values()) == [self._run_id] * len(self._names):
                break
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"of {len(self._names)} workers {len(answers.results)} say that they are configured; "
                    f"errors: {[str(error) for error in answers.errors.values()]}"
                )
            time.sleep(0.02)
        self._observer.event(f"configuration sent to {len(reached)} workers, membership epoch {sent.epoch}")

    def _analyse(self, callers: Callers, children: Children) -> None:
        """Send every file, kill a worker when half of them are done, and keep the results."""
        report, total = self.report, len(self._files)
        self._observer.phase("analysing", total)
        seconds: list[float] = []
        started = time.perf_counter()
        callers.start()
        done = 0
        while done < total:
            if done >= total // 2 and report.killed is None and len(self._names) > 1:
                self._kill_one(children, done)
            try:
                one = callers.done.get(timeout=0.1)
            except queue.Empty:
                children.expect_running()
                self._sample_fds()
                continue
            done += 1
            self._take(one)
            if one.answer is not None:
                seconds.append(one.seconds)
            if done % 50 == 0:
                self._sample_fds()
            self._observer.progress(done, f"{len(callers.retried)} retried")
        report.seconds = time.perf_counter() - started
        report.files_per_second = total / report.seconds
        report.retries = len(callers.retried)
        report.retried_for = dict(Counter(callers.retried))
        report.calls = len(seconds) + report.retries
        seconds.sort()
        report.p50_ms = percentile(seconds, 0.50) * 1000
        report.p99_ms = percentile(seconds, 0.99) * 1000

    def _kill_one(self, children: Children, done: int) -> None:
        name = self._names[-1]
        pid = children.kill(name)
        self.report.killed = {"server": name, "pid": pid, "after_files": done}
        self._observer.event(f"{name} (process {pid}) killed after {done} files")

    def _take(self, one: Done) -> None:
        path = str(self._files[one.index])
        if one.answer is None:
            self.report.problems.append(f"{path}: {one.failure}")
            return
        try:
            result = Analysis.from_message(one.answer)
            server = str(one.answer["server"])
        except (KeyError, TypeError) as exc:
            self.report.problems.append(
                f"{path}: the answer is not an analysis ({type(exc).__name__}: {exc})"
            )
            return
        self._results[one.index] = result
        self._served_by[one.index] = server
        self.report.bytes += one.size
        self.report.tokens += result.tokens
        self.report.lines += result.lines
        self.report.not_python += result.error is not None

    def _survivors(self) -> list[str]:
        return [
            name for name in self._names if self.report.killed is None or name != self.report.killed["server"]
        ]

    def _gather(self, analysis: Client) -> None:
        """Ask every worker that is left what it has done."""
        self._observer.phase("gathering statistics", None)
        gathered = analysis.gather("statistics")
        answered = {member.topic.server: answer for member, answer in gathered.results.items()}
        for name in self._survivors():
            if name not in answered:
                errors_text = ", ".join(
                    f"{member.topic.server}: {type(error).__name__}: {error}"
                    for member, error in [*gathered.errors.items(), *gathered.missing.items()]
                )
                self.report.problems.append(
                    f"{name} gave no statistics ({errors_text or 'it is not a member'})"
                )
        results = Counter(self._served_by.values())
        for name in self._names:
            statistics = answered.get(name) or {"server": name, "killed": True}
            self.report.workers.append({**statistics, "results": results[name]})
            if "files" in statistics and statistics["files"] < results[name]:
                self.report.problems.append(
                    f"{name} says {statistics['files']} files but has sent {results[name]}"
                )
            if statistics.get("casts_failed"):
                self.report.problems.append(
                    f"{name} could not cast {statistics['casts_failed']} progress events"
                )

    def _ask_collector(self, progress: Client) -> None:
        """Compare the events counted with those cast; some may be under way, so ask until they agree."""
        survivors = set(self._survivors())
        expected = {
            worker["server"]: worker["casts"]
            for worker in self.report.workers
            if worker["server"] in survivors and "casts" in worker
        }
        surviving_files = {index for index, server in self._served_by.items() if server in survivors}
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            counted = progress.call("counted")
            events: dict[str, int] = counted["events"]
            arrived = {name: events.get(name, 0) for name in expected}
            unseen = surviving_files - set(counted["files"])
            if (arrived == expected and not unseen) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self.report.events = sum(events.values())
        # What the killed worker had cast and not yet sent is lost with it: a cast is at most once.
        self.report.events_expected = sum(expected.values())
        for name, number in expected.items():
            if arrived[name] != number:
                self.report.problems.append(
                    f"{name} cast {number} progress events, {arrived[name]} were counted"
                )
        if unseen:
            self.report.problems.append(
                f"no progress event was counted for {len(unseen)} files of running workers"
            )
        for worker in self.report.workers:
            worker["events"] = events.get(worker["server"], 0)

    def _check(self, children: Children) -> None:
        """Compute everything again without RPC and compare."""
        report, total = self.report, len(self._files)
        self._observer.phase("checking without RPC", total)
        reference: dict[int, Analysis] = {}
        checkers = Checkers(children, self._files, self._key)
        with self._interrupts.allowed():
            for index, analysis in checkers.results():
                reference[index] = analysis
                self._observer.progress(len(reference), "")
        report.problems += checkers.end()
        missing, wrong, unchecked = compare(self._results, reference, total)
        report.checked = total - len(missing) - len(unchecked)
        report.missing = [str(self._files[index]) for index in missing]
        report.wrong = [str(self._files[index]) for index in wrong]
        if missing:
            report.problems.append(f"{len(missing)} results are missing, the first is {report.missing[0]}")
        if wrong:
            report.problems.append(f"{len(wrong)} results are wrong, the first is {report.wrong[0]}")
        if unchecked:
            report.problems.append(f"{len(unchecked)} results could not be checked")

    def _sample_fds(self) -> None:
        now = open_fds()
        if now is not None:
            self.report.fds_peak = max(now, self.report.fds_peak or 0)


def run_demo(
    files: list[Path], *, workers: int, in_flight: int, observer: Observer, interrupts: Interrupts
) -> Report:
    """Analyse *files* through *workers* processes with *in_flight* calls at a time, and check every result.

    The processes, and a directory with the matchmaker's file and the sockets, exist only during the call.

    Raises:
        DemoFailed: it could not be run to its end.
        Interrupted: a signal came; everything has been cleaned up.
        ZmqcoreError: a step other than an analysis failed.
    """
    return _Run(files, workers, in_flight, observer, interrupts).run()
