"""`train`: a run from configuration to summary. A recipe (config.recipes) makes it pretraining or fine-tuning."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from minimind_v.core.config.limits import check_machine
from minimind_v.core.config.schema import RunConfig
from minimind_v.core.device import autocast, pick_device, require_determinism
from minimind_v.core.formats.load import load_initial
from minimind_v.core.model.kernels.accelerate import accelerate
from minimind_v.core.model.kernels.compiled import compile_decoder
from minimind_v.core.monitor.diagnostics import Start
from minimind_v.core.monitor.metrics import Listener
from minimind_v.core.monitor.recorder import Recorder
from minimind_v.core.train.batch_size import find_batch_size
from minimind_v.core.train.build import companions_of, open_data, open_features
from minimind_v.core.train.distributed import ALONE, World
from minimind_v.core.train.loop import Run, Summary
from minimind_v.core.train.recall import RecallReport, earlier_run
from minimind_v.core.train.records import Records
from minimind_v.core.train.run_folder import Claim, RunFolder
from minimind_v.core.train.saver import Saver
from minimind_v.core.train.step import TrainStep
from minimind_v.core.train.validate import Validator

if TYPE_CHECKING:
    from minimind_v.core.evaluate.by_task import ChosenTask

# Steps; not measured. A compiler takes a minute, and a step is predicted to save some milliseconds on a slow host.
WORTH_COMPILING = 1000


def train(
    config: RunConfig,
    listener: Listener,
    overwrite: bool = False,
    resume: bool = False,
    allowed: Collection[str] = (),
    auto: bool = False,
) -> Summary:
    """Train and save. Each of several processes does its share.

    With `resume` an interrupted run continues, bit for bit as if it had not been (on a GPU only a deterministic one);
    a difference from it is refused unless its name is in `allowed`. With `auto` the rows of a step are divided into the
    largest batches that there is memory for. Raises MissingInput, UsageError, DataError, WeightsError or RunError;
    the run saves first.
    """
    check_machine(config)
    world = World.find()
    with world.contact(), ExitStack() as held:
        summary = assemble(config, listener, overwrite, resume, allowed, auto, world, held).run()
        world.leave()
    return summary


def assemble(
    config: RunConfig,
    listener: Listener,
    overwrite: bool = False,
    resume: bool = False,
    allowed: Collection[str] = (),
    auto: bool = False,
    world: World = ALONE,
    held: ExitStack | None = None,
) -> Run:
    """A run, ready to start.

    `held` gets the lock of what the run writes, and releases it after the run; without `held` the run takes no lock.
    """
    chosen = _choose_task(config)
    folder = RunFolder(config)
    recorder = Recorder(folder.folder / "events.jsonl", listener)
    listener = recorder if world.leads else Listener()  # one process reports
    device = pick_device(config.device, world.local_rank if world.size > 1 else None)
    if config.deterministic and device.type == "cuda":
        require_determinism()
    world.join(device)
    if world.restarts:
        listener.message("a process was lost: all processes have restarted")
        overwrite, resume = False, True
    if held and world.leads:
        folder.lock(held, listener)
    own = folder.claim(world.size, device, overwrite, resume, allowed, listener, auto) if world.leads else None
    claim: Claim = world.broadcast(own)
    if auto:
        config = _choose_batch_size(config, folder, claim, device, world, listener)
    torch.manual_seed(config.seed)
    model, tokenizer, receipt = load_initial(config, listener.message)
    if receipt.loaded:
        listener.message(str(receipt))
    else:
        listener.warning("starting from random weights: the language model is untrained")
    companions = companions_of(config, model, tokenizer)
    data = open_data(config, model.spec, tokenizer, claim.origin, folder.folder, world, listener)
    model = accelerate(model.to(device), device)
    features = open_features(config, model, data, listener)
    unsaid: list[str] = []
    train_step = TrainStep(config, model, features, world, listener.warning if world.leads else unsaid.append)
    validator = Validator(data.held_out, config.dtype, world.gather) if data.held_out else None
    run = Run(config, data.plan, train_step, listener, world, validator, unsaid=unsaid)
    if world.leads:
        start = Start(config, bool(receipt.loaded), bool(receipt.new), _same_tokenizer(config, claim), data.plan.rows)
        run.saver = Saver(config, folder, claim.origin, train_step, companions, listener)
        run.records = Records(config, folder, claim.origin, start, recorder, world.size)
        if chosen:
            from minimind_v.core.train.evaluator import Evaluator

            run.evaluator = Evaluator(config, chosen, model, tokenizer, features, listener)
        if config.recall_rows:
            run.recall = RecallReport(config, data.plan, train_step, recorder, bool(receipt.loaded), world.size)
    if claim.state is not None:
        run.resume(claim.state)
    if device.type == "cuda" and world.size == 1 and not config.deterministic:
        _compile(run, listener)
    return run


def _choose_task(config: RunConfig) -> ChosenTask | None:
    """The task of the run's evaluations; None without any. Raises an error before anything is written."""
    if not config.eval_every:
        return None
    from minimind_v.core.train.evaluator import check_images, choose_run_task

    chosen = choose_run_task(config)
    check_images(config, chosen)
    return chosen


def _compile(run: Run, listener: Listener) -> None:
    """Compile the decoder if enough steps are left; after a failure the run goes on without that.

    A compiler chooses by time, so that another process may add in another order.
    """
    if run.total - run.progress.done < WORTH_COMPILING:
        return
    listener.message("compiling the decoder takes a minute or two; TORCH_COMPILE_DISABLE=1 leaves it out")
    model = run.train_step.model.train()
    reason = compile_decoder(model.model, partial(autocast, model.device, run.config.dtype))
    if reason is not None:
        listener.warning(f"the decoder is not compiled, so steps take longer: {reason}")


def _choose_batch_size(
    config: RunConfig, folder: RunFolder, claim: Claim, device: torch.device, world: World, listener: Listener
) -> RunConfig:
    """The batch size of a run that is resumed stays; else the largest that fits."""
    state = claim.state
    if state is not None and folder.same_rows(state):
        size, accumulate = state.progress["split"]
        return replace(config, data=replace(config.data, batch_size=size), accumulate=accumulate)
    config, why = find_batch_size(config, device, world)
    listener.message(why)
    return config


def _same_tokenizer(config: RunConfig, claim: Claim) -> bool | None:
    """Whether the weights were trained with the run's tokenizer; None: unknown."""
    earlier = earlier_run(config.init, config.model)
    if earlier is None or earlier.tokenizer is None:
        return None
    return bool(earlier.tokenizer == claim.origin["data.tokenizer"])
