"""Many scenes: jobs of JSON Lines, one after the other, side by side, or on a Ray cluster.

A job that fails, or whose process dies, becomes a line that says so, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vggt_cli.device import share
from vggt_cli.errors import InputError, VggtError
from vggt_cli.formats import export, scene_read, writers
from vggt_cli.formats.claims import claimed
from vggt_cli.models.store import home
from vggt_cli.models.weights import Networks
from vggt_cli.reconstruction import pipeline
from vggt_cli.reconstruction.content import FILES
from vggt_cli.reconstruction.plan import memory_of
from vggt_cli.reconstruction.settings import Options
from vggt_cli.reconstruction.stages import Progress, silent

log = logging.getLogger(__name__)

FORM = 'a line is an object such as {"input": "photos/a", "out": "scenes/a", "refine": "none"}'
CAMERA = Literal["auto", "per-image", "shared", "per-folder"]
KNOWN = get_type_hints(Options) | {"camera": CAMERA}
# As `vggt reconstruct` bounds them.
LEAST = {"points": 1, "confidence": 0, "resolution": 16, "fps": 0.001, "frames": 1, "window": 2}
MOST = {"confidence": 99.9}
BUG, DIED = 70, 71  # exit codes of a job: our mistake; its process ended without a word


@dataclass(frozen=True)
class Job:
    """One scene to make."""

    source: str
    out: Path
    options: Options
    formats: tuple[str, ...] = ()
    html: bool = True


@dataclass(frozen=True)
class How:
    """What holds for all jobs."""

    resume: bool = False  # a scene that the same photos, weights and options made is left as it is
    overwrite: bool = False
    workers: int = 1  # processes on this machine, each with its own network
    ray: str | None = None  # address of a cluster, "auto" or "local"; instead of workers


def read_jobs(lines: Iterable[str], usual: Options) -> list[Job]:
    """The jobs of JSON Lines: input, out, and options of `reconstruct` where they are not `usual`.

    Empty lines are passed over. Raises InputError, with the number of the line, for what cannot be:
    no object, an unknown key, a value of another kind, two scenes in one folder.
    """
    jobs: list[Job] = []
    taken: dict[Path, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        job = _job(line, usual, f"line {number}")
        if (first := taken.setdefault(job.out.resolve(), number)) != number:
            raise InputError(f"lines {first} and {number} write the same scene: {job.out}")
        jobs.append(job)
    return jobs


def _job(line: str, usual: Options, place: str) -> Job:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is no JSON: {error}", FORM) from error
    if not isinstance(content, dict):
        raise InputError(f"{place} is no object: {line.strip()[:60]}", FORM)
    source, out = content.pop("input", None), content.pop("out", None)
    formats, html = content.pop("format", []), content.pop("html", True)
    if not _fits(formats, list[str]) or not _fits(html, bool):
        raise InputError(f"{place}: format is a list of names, html is true or false", FORM)
    if not isinstance(source, str) or not isinstance(out, str):
        raise InputError(f"{place} lacks input or out: {line.strip()[:60]}", FORM)
    if isinstance(content.get("max_memory"), str):
        content["max_memory"] = memory_of(content["max_memory"])
    for name, value in content.items():
        if name not in KNOWN:
            raise InputError(f"{place}: no such option: {name}", f"options: {', '.join(KNOWN)}")
        if not _fits(value, KNOWN[name]) or not _in_range(name, value):
            raise InputError(f"{place}: {name} cannot be {json.dumps(value)}", FORM)
    unknown = [name for name in formats if name not in writers.WRITERS]
    if unknown:
        raise InputError(f"{place}: no such format: {unknown[0]}")
    options = dataclasses.replace(usual, **content)
    extra = ["tokens"] if options.save_tokens else []
    return Job(source, Path(out), options, (*formats, *extra), bool(html))


def _fits(value: object, kind: Any) -> bool:
    """Whether a value of JSON is of that type."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(one, *inner) for one in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _in_range(name: str, value: Any) -> bool:
    return value is None or LEAST.get(name, value) <= value <= MOST.get(name, value)


def shard(jobs: Sequence[Job], text: str) -> list[Job]:
    """Every n-th job from the i-th on of "i/n", i from 1: what one of n machines does.

    Raises InputError for another form.
    """
    first, slash, count = text.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 0 < int(first) <= int(count)):
        raise InputError(f"no part of the jobs: {text}", "--shard 2/8 is the second of eight parts")
    return list(jobs[int(first) - 1 :: int(count)])


def run(jobs: Sequence[Job], how: How, progress: Progress = silent) -> Iterator[dict[str, Any]]:
    """What became of each job, as they end, in plain types; see `do`."""
    done = _on_ray(jobs, how) if how.ray else _in_turn(jobs, how)
    if how.workers > 1 and not how.ray:
        done = _side_by_side(jobs, how)
    for count, line in enumerate(done, 1):
        progress("scenes", count, len(jobs))
        yield line


def do(job: Job, how: How, networks: Networks) -> dict[str, Any]:
    """Make one scene. ok, seconds, and what the scene is; or error, hint and exit_code.

    networks: those loaded before, kept for the next job.
    """
    start = time.perf_counter()
    line: dict[str, Any] = {"input": job.source, "out": str(job.out)}
    try:
        line |= {"ok": True, **_made(job, how, networks)}
    except VggtError as error:
        line |= {"ok": False, "error": str(error), "hint": error.hint}
        line["exit_code"] = error.exit_code
    except Exception as error:  # noqa: BLE001  a scene's failure never stops the rest
        log.error("%s: %s", job.source, traceback.format_exc())
        line |= {"ok": False, "error": f"internal: {type(error).__name__}: {error}", "hint": ""}
        line["exit_code"] = BUG
    return {**line, "seconds": round(time.perf_counter() - start, 3)}


def _made(job: Job, how: How, networks: Networks) -> dict[str, Any]:
    with claimed(job.out, home() / "locks"):
        if how.resume and is_done(job):
            return {"skipped": True}
        # A scene of other photos or options gives way to the new one, once that is whole.
        export.refuse_existing(job.out, how.overwrite or how.resume)
        scene = pipeline.reconstruct(job.source, job.options, networks=networks)
        export.write(scene, job.out, job.formats, how.overwrite or how.resume, html=job.html)
    return {
        "skipped": False,
        "images": len(scene.photos),
        "points": len(scene.tracks.xyz),
        "refined": scene.refinement.method if scene.refinement else None,
        "left_out": len(scene.unreadable),
        "findings": [finding.kind for finding in scene.findings],
    }


def is_done(job: Job) -> bool:
    """Whether the scene is there, whole, of the same photos, weights and options,
    with the formats and the page that are wanted."""
    made = scene_read.content(job.out)
    if made is None or not set(job.formats) <= set(writers.held(job.out)):
        return False
    if job.html and not (job.out / "scene.html").is_file():
        return False
    return made != "" and made == pipeline.content_key(job.source, job.options)


def _in_turn(jobs: Sequence[Job], how: How) -> Iterator[dict[str, Any]]:
    networks: Networks = {}
    return (do(job, how, networks) for job in jobs)


_networks: Networks = {}  # of a worker's process


def _work(job: Job, how: How) -> dict[str, Any]:
    with contextlib.suppress(SystemExit):
        return do(job, how, _networks)
    os._exit(DIED)  # told to end: a pool would hand it the next job


def _begin(workers: int) -> None:
    """A worker ends as its parent says, what it began to write removed; and with its parent."""
    share(workers)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, which the parent hears too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and the next run would find its scenes claimed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(DIED)


def _side_by_side(jobs: Sequence[Job], how: How) -> Iterator[dict[str, Any]]:
    """Jobs in several processes; one that dies costs the job that killed it, not the others."""
    rest = list(jobs)
    while rest:
        yield from _in_processes(rest, how, how.workers)
        for job in rest[: how.workers + 1]:  # a process died; these may have been in work
            alone = [job]
            yield from _in_processes(alone, how, 1)
            if alone:
                yield _died(job)
            rest.remove(job)


def _in_processes(rest: list[Job], how: How, workers: int) -> Iterator[dict[str, Any]]:
    """Results as they come, their jobs taken from `rest`; ends early where a process died."""
    # Not forked: threads of torch do not survive it.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _begin, (workers,)) as pool:
        try:
            # Processes keep the mask: none of them hears an interrupt before `_begin` ran.
            heard = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            futures = {pool.submit(_work, job, how): job for job in rest}
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
            for future in as_completed(futures):
                line = future.result()
                rest.remove(futures[future])
                yield line
        except BrokenProcessPool:
            return
        except BaseException:  # interrupted: what is in work ends now, nothing else begins
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _died(job: Job) -> dict[str, Any]:
    error = "its process died, perhaps for memory"
    line = {"input": job.source, "out": str(job.out), "ok": False, "error": error}
    return {**line, "hint": "fewer photos or a smaller --resolution", "exit_code": DIED}


def _on_ray(jobs: Sequence[Job], how: How) -> Iterator[dict[str, Any]]:
    """Jobs on a cluster, which places them and tries again where a node is lost."""
    try:
        import ray
    except ImportError as error:
        hint = "pip install 'vggt-cli[ray]'"
        raise InputError(f"Ray is not installed: {error.name}", hint) from error
    address = None if how.ray == "local" else how.ray
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        # Ray keeps a process for the next task of the same kind, and its network with it.
        gpus = min(1, ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        work = ray.remote(_work)
        waiting = {
            work.options(
                max_retries=2, num_cpus=1, num_gpus=0 if job.options.device == "cpu" else gpus
            ).remote(_absolute(job), how): job
            for job in jobs
        }
        while waiting:
            (ended, *_), _ = ray.wait(list(waiting))
            job = waiting.pop(ended)
            try:
                yield ray.get(ended)
            except ray.exceptions.RayError as error:
                log.debug("%s", error)
                yield _died(job)
    finally:
        ray.shutdown()


def _absolute(job: Job) -> Job:
    """The job for a process that starts in another folder."""
    given = {name: getattr(job.options, name) for name in FILES}
    if Path(job.options.model).suffix:  # a file: names have none
        given["model"] = job.options.model
    there: dict[str, Any] = {
        name: str(Path(p).absolute()) for name, p in given.items() if p and Path(p).exists()
    }
    source = job.source if job.source == "-" else str(Path(job.source).absolute())
    options = dataclasses.replace(job.options, **there)
    return dataclasses.replace(job, source=source, out=job.out.absolute(), options=options)
